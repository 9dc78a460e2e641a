//! What threads hand things to each other by: channels, and the counters that go with them.
//!
//! They are those of crossbeam and `std`, and nothing more. In the library's own tests each of their steps is a place
//! where a model may let another thread go first (`with_steps`): `flush/tests.rs` so leads the real hand-over through
//! many orders of steps. Without a model these steps are as they always are.

#[cfg(not(test))]
pub use std::sync::atomic::AtomicU64;

#[cfg(not(test))]
pub use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

#[cfg(test)]
pub use stepped::{AtomicU64, Receiver, Sender, bounded, step, unbounded, with_steps};

#[cfg(test)]
#[allow(missing_docs, reason = "they are documented where they come from")]
mod stepped {
    use std::cell::Cell;
    use std::ops::Deref;
    use std::sync::atomic::{self, Ordering};

    use crossbeam_channel::{SendError, TryRecvError};

    thread_local! {
        static STEP: Cell<Option<fn()>> = const { Cell::new(None) };
    }

    /// Calls `step` before each step of this thread that others may see.
    pub fn with_steps(step: fn(), run: impl FnOnce()) {
        struct Unset;
        impl Drop for Unset {
            fn drop(&mut self) {
                STEP.set(None);
            }
        }
        STEP.set(Some(step));
        let _unset = Unset;
        run();
    }

    /// A step that others may see follows.
    pub fn step() {
        if let Some(step) = STEP.get().filter(|_| !std::thread::panicking()) {
            step();
        }
    }

    #[derive(Debug, Default)]
    pub struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub fn new(value: u64) -> Self {
            Self(atomic::AtomicU64::new(value))
        }

        pub fn load(&self, ordering: Ordering) -> u64 {
            step();
            self.0.load(ordering)
        }

        pub fn store(&self, value: u64, ordering: Ordering) {
            step();
            self.0.store(value, ordering);
        }

        pub fn fetch_add(&self, value: u64, ordering: Ordering) -> u64 {
            step();
            self.0.fetch_add(value, ordering)
        }
    }

    #[derive(Debug)]
    pub struct Sender<T>(crossbeam_channel::Sender<T>);

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            Self(self.0.clone())
        }
    }

    impl<T> Sender<T> {
        pub fn send(&self, message: T) -> Result<(), SendError<T>> {
            step();
            self.0.send(message)
        }

        pub fn is_full(&self) -> bool {
            step();
            self.0.is_full()
        }
    }

    /// Where a test waits in earnest, it does so by the methods of crossbeam's.
    #[derive(Debug)]
    pub struct Receiver<T>(crossbeam_channel::Receiver<T>);

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            Self(self.0.clone())
        }
    }

    impl<T> Receiver<T> {
        pub fn try_recv(&self) -> Result<T, TryRecvError> {
            step();
            self.0.try_recv()
        }

        pub fn is_empty(&self) -> bool {
            step();
            self.0.is_empty()
        }
    }

    impl<T> Deref for Receiver<T> {
        type Target = crossbeam_channel::Receiver<T>;

        fn deref(&self) -> &Self::Target {
            &self.0
        }
    }

    pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let (sender, receiver) = crossbeam_channel::unbounded();
        (Sender(sender), Receiver(receiver))
    }

    pub fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>) {
        let (sender, receiver) = crossbeam_channel::bounded(room);
        (Sender(sender), Receiver(receiver))
    }
}
