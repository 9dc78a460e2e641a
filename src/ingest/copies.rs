//! Copies of what came in as lines, for whoever sends them on: each message as it came, before it is read.
//!
//! A worker gathers copies in a buffer of its own and hands them over between bursts, through a queue that it never waits
//! for: when that is full the copies are lost and counted, the samples are not. Where nobody wants copies there is no
//! buffer, and a worker only looks whether there is one.
//!
//! Bound: 256 batches of about 32 KiB.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, TryRecvError, bounded};

/// Batches that may wait.
const QUEUE: usize = 256;

/// A batch of so many bytes is handed over before its burst is at its end.
const BATCH_BYTES: usize = 32 << 10;

/// Messages as they came, one behind the other.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Batch {
    /// The messages: a datagram, a packet of a stream, or a line of one without its line feed.
    pub fn messages(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, end)| &self.bytes[begin..*end])
    }

    fn add(&mut self, message: &[u8]) {
        self.bytes.extend_from_slice(message);
        self.ends.push(self.bytes.len());
    }

    fn lines(&self) -> u64 {
        self.messages().map(lines).sum()
    }
}

/// How many lines a message has, blank ones left out.
pub fn lines(message: &[u8]) -> u64 {
    message.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count() as u64
}

/// The one who takes copies; the workers have the other end.
#[derive(Debug)]
pub struct Copies {
    queue: Receiver<Option<Batch>>,
    shared: Arc<Shared>,
}

/// What came of a wait for copies.
#[derive(Debug)]
pub enum Next {
    /// These came.
    Batch(Batch),
    /// None for now.
    Nothing,
    /// None will come any more.
    End,
}

impl Copies {
    /// The next batch, if there is one at once.
    pub fn at_once(&self) -> Next {
        match self.queue.try_recv() {
            Ok(Some(batch)) => Next::Batch(batch),
            Err(TryRecvError::Empty) => Next::Nothing,
            Ok(None) | Err(TryRecvError::Disconnected) => Next::End,
        }
    }

    /// The next batch that comes within this time.
    pub fn within(&self, time: Duration) -> Next {
        match self.queue.recv_timeout(time) {
            Ok(Some(batch)) => Next::Batch(batch),
            Err(RecvTimeoutError::Timeout) => Next::Nothing,
            Ok(None) | Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    /// Lines that were lost since the last call because the queue was full.
    pub fn take_lost(&self) -> u64 {
        self.shared.lost.swap(0, Ordering::Relaxed)
    }

    /// What lets these copies end.
    pub fn ending(&self) -> Ending {
        Ending(self.shared.to.clone())
    }
}

/// The means to end copies.
#[derive(Debug)]
pub struct Ending(Sender<Option<Batch>>);

impl Ending {
    /// Lets copies end behind those that wait; to be called when the workers are closed. `false` when there is no room to
    /// say so within this time.
    pub fn end(&self, time: Duration) -> bool {
        // Who takes copies may have gone.
        !matches!(self.0.send_timeout(None, time), Err(SendTimeoutError::Timeout(_)))
    }
}

#[derive(Debug)]
struct Shared {
    to: Sender<Option<Batch>>,
    lost: AtomicU64,
}

/// Whether copies are wanted; said before the first worker is there.
#[derive(Debug, Default)]
pub(super) struct Wanted(OnceLock<Arc<Shared>>);

impl Wanted {
    /// From now on each new worker makes copies. Only one can have them.
    pub(super) fn begin(&self) -> Option<Copies> {
        let (to, queue) = bounded(QUEUE);
        let shared = Arc::new(Shared { to, lost: AtomicU64::new(0) });
        self.0.set(Arc::clone(&shared)).ok().map(|()| Copies { queue, shared })
    }

    /// For a new worker.
    pub(super) fn copier(&self) -> Option<Box<Copier>> {
        self.0.get().map(|shared| Box::new(Copier { batch: Batch::default(), shared: Arc::clone(shared) }))
    }
}

/// A worker's own buffer of copies.
#[derive(Debug)]
pub(super) struct Copier {
    batch: Batch,
    shared: Arc<Shared>,
}

impl Copier {
    pub(super) fn add(&mut self, message: &[u8]) {
        self.batch.add(message);
        if self.batch.bytes.len() >= BATCH_BYTES {
            self.hand_over();
        }
    }

    pub(super) fn hand_over(&mut self) {
        if self.batch.ends.is_empty() {
            return;
        }
        let next = Batch {
            bytes: Vec::with_capacity(self.batch.bytes.len()),
            ends: Vec::with_capacity(self.batch.ends.len()),
        };
        let batch = std::mem::replace(&mut self.batch, next);
        if let Err(error) = self.shared.to.try_send(Some(batch)) {
            let lines = error.into_inner().map_or(0, |batch| batch.lines());
            self.shared.lost.fetch_add(lines, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_were_and_what_has_no_room_is_counted() {
        let wanted = Wanted::default();
        assert!(wanted.copier().is_none());
        let copies = wanted.begin().unwrap();
        assert!(wanted.begin().is_none());
        let mut copier = wanted.copier().unwrap();
        copier.hand_over();
        assert!(matches!(copies.at_once(), Next::Nothing));
        for _ in 0..=QUEUE {
            copier.add(b"a:1|c\n\n b:2|c\r\n");
            copier.add(b"");
            copier.add(b"\xff|");
            copier.hand_over();
        }
        let Next::Batch(first) = copies.at_once() else { panic!("nothing came") };
        assert_eq!(first.messages().collect::<Vec<_>>(), [&b"a:1|c\n\n b:2|c\r\n"[..], b"", b"\xff|"]);
        assert_eq!((first.lines(), copies.take_lost(), copies.take_lost()), (3, 3, 0));
        assert!(copies.ending().end(Duration::ZERO), "there is room for one");
        assert!(!copies.ending().end(Duration::ZERO));
        let mut left = 0;
        while let Next::Batch(_) = copies.within(Duration::from_secs(5)) {
            left += 1;
        }
        assert_eq!(left, QUEUE - 1);
    }
}
