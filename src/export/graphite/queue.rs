//! What waits for Graphite: chunks in the order of their windows, bounded in bytes.
//!
//! A chunk stays after it was written until Graphite has closed the connection, which it does once it has read all: a
//! connection that breaks takes nothing with it, and what it had may come a second time, which overwrites itself. Where
//! there is no room, what was written goes first; then, while Graphite takes something, whoever renders waits; then the
//! oldest whole window goes, and is counted.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::lines::Chunk;
use crate::telemetry;

/// Chunks that wait, between the one who renders them and the one who sends them.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<Waiting>,
    /// How many of them, from the first, were written on the present connection.
    written: usize,
    bytes: usize,
    next_id: u64,
    /// What was written on the present connection and had to go.
    let_go: Read,
    /// Somebody adds to the last window.
    is_rendering: bool,
    /// That window had to go.
    is_given_up: bool,
    is_connected: bool,
    /// Whoever renders waits no longer than that, once the agent stops.
    hurry: Option<Instant>,
    stop: Option<Instant>,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    window_ms: u64,
    is_last: bool,
    bytes: Arc<Vec<u8>>,
    lines: u64,
}

/// What Graphite has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) windows: u64,
    pub(super) lines: u64,
    pub(super) bytes: u64,
}

/// Why lines do not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// There was no room for them.
    Buffer,
    /// The agent stopped.
    Stop,
    /// The connection broke after they were written, and there had been no room to keep them.
    Unread,
    /// Their window could not be read before the ledger had later ones.
    Late,
    /// Nothing is left of their series' name.
    Name,
}

impl Loss {
    pub(super) const ALL: [Self; 5] = [Self::Buffer, Self::Stop, Self::Unread, Self::Late, Self::Name];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Buffer => "buffer",
            Self::Stop => "stop",
            Self::Unread => "unread",
            Self::Late => "late",
            Self::Name => "name",
        }
    }

    pub(super) fn count(self, windows: u64, lines: u64) {
        telemetry::GRAPHITE_WINDOWS_LOST.take(&[self.name()], &mut { windows });
        telemetry::GRAPHITE_LINES_LOST.take(&[self.name()], &mut { lines });
    }
}

impl Queue {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), bytes_max }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until<'s>(&self, state: MutexGuard<'s, State>, deadline: Option<Instant>) -> MutexGuard<'s, State> {
        let Some(deadline) = deadline else {
            return self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        let timeout = deadline.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0
    }

    /// A window is rendered from now on; [`Queue::push`] of a last chunk ends it.
    pub(super) fn begin(&self) {
        let mut state = self.lock();
        (state.is_rendering, state.is_given_up) = (true, false);
    }

    /// Adds a chunk of the window that is rendered. Where Graphite takes what is there, it waits for room until a deadline.
    pub(super) fn push(&self, window_ms: u64, chunk: Chunk, is_last: bool, deadline: Instant) {
        let mut state = self.lock();
        while !state.is_given_up && state.bytes + chunk.bytes.len() > self.bytes_max {
            if state.let_written_go() {
                continue;
            }
            let deadline = state.hurry.map_or(deadline, |hurry| hurry.min(deadline));
            if state.is_connected && Instant::now() < deadline {
                state = self.wait_until(state, Some(deadline));
                continue;
            }
            if !state.drop_oldest(window_ms) {
                break;
            }
        }
        if state.is_given_up {
            Loss::Buffer.count(0, chunk.lines);
        } else {
            state.add(window_ms, chunk, is_last);
        }
        state.is_rendering &= !is_last;
        telemetry::GRAPHITE_WAITING_BYTES.gauge(&[]).set(state.bytes as f64);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for something to send. `false` at a stop, when nothing is left.
    pub(super) fn wait_for_chunks(&self) -> bool {
        let mut state = self.lock();
        while state.chunks.is_empty() {
            if state.stop.is_some() {
                return false;
            }
            state = self.wait_until(state, None);
        }
        true
    }

    /// The next chunk to write on this connection; `None` once it has all there is.
    pub(super) fn next(&self) -> Option<(u64, Arc<Vec<u8>>)> {
        let mut state = self.lock();
        loop {
            if let Some(chunk) = state.chunks.get(state.written) {
                return Some((chunk.id, Arc::clone(&chunk.bytes)));
            }
            if !state.is_rendering || state.is_given_up || state.stop.is_some_and(|deadline| deadline <= Instant::now())
            {
                return None;
            }
            let deadline = state.stop;
            state = self.wait_until(state, deadline);
        }
    }

    /// A chunk was written.
    pub(super) fn wrote(&self, id: u64) {
        let mut state = self.lock();
        if state.chunks.get(state.written).is_some_and(|chunk| chunk.id == id) {
            state.written += 1;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A connection was made, or is over.
    pub(super) fn set_connected(&self, is_connected: bool) {
        self.lock().is_connected = is_connected;
        self.changed.notify_all();
    }

    /// The connection broke: what was written on it waits again.
    pub(super) fn failed(&self) {
        let mut state = self.lock();
        state.written = 0;
        state.is_connected = false;
        let Read { windows, lines, .. } = std::mem::take(&mut state.let_go);
        Loss::Unread.count(windows, lines);
        drop(state);
        self.changed.notify_all();
    }

    /// What was written was read, and need not wait any more.
    pub(super) fn read(&self) -> Read {
        let mut state = self.lock();
        while state.let_written_go() {}
        let read = std::mem::take(&mut state.let_go);
        telemetry::GRAPHITE_WAITING_BYTES.gauge(&[]).set(state.bytes as f64);
        drop(state);
        self.changed.notify_all();
        read
    }

    /// The end of the oldest window that waits.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        self.lock().chunks.front().map(|chunk| chunk.window_ms)
    }

    /// Waits for a moment, less when the agent stops and it is not known yet.
    pub(super) fn pause(&self, until: Instant, is_stop_known: bool) {
        let mut state = self.lock();
        while state.stop.is_some() == is_stop_known && Instant::now() < until {
            state = self.wait_until(state, Some(until));
        }
    }

    /// The agent stops: whoever renders is to wait for room only until then.
    pub(super) fn hurry(&self, deadline: Instant) {
        self.lock().hurry = Some(deadline);
        self.changed.notify_all();
    }

    /// Nothing more comes. What waits may be sent until then.
    pub(super) fn stop(&self, deadline: Instant) {
        let mut state = self.lock();
        (state.stop, state.is_rendering) = (Some(deadline), false);
        drop(state);
        self.changed.notify_all();
    }

    /// Until when what waits may be sent, once the agent stops.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.lock().stop
    }

    /// Counts what waits as lost, and answers how many windows and lines those are.
    pub(super) fn give_up(&self) -> (u64, u64) {
        let mut state = self.lock();
        let Read { windows, lines, .. } = std::mem::take(&mut state.let_go);
        let mut lost = (windows, lines);
        while let Some(chunk) = state.take_first() {
            lost = (lost.0 + u64::from(chunk.is_last), lost.1 + chunk.lines);
        }
        state.written = 0;
        Loss::Stop.count(lost.0, lost.1);
        lost
    }
}

impl State {
    fn add(&mut self, window_ms: u64, Chunk { bytes, lines }: Chunk, is_last: bool) {
        self.bytes += bytes.len();
        let id = self.next_id;
        self.next_id += 1;
        self.chunks.push_back(Waiting { id, window_ms, is_last, bytes: Arc::new(bytes), lines });
    }

    fn take_first(&mut self) -> Option<Waiting> {
        let chunk = self.chunks.pop_front()?;
        self.bytes -= chunk.bytes.len();
        Some(chunk)
    }

    /// Lets the first chunk go if it was written.
    fn let_written_go(&mut self) -> bool {
        if self.written == 0 {
            return false;
        }
        let Some(chunk) = self.take_first() else { return false };
        self.written -= 1;
        self.let_go.windows += u64::from(chunk.is_last);
        self.let_go.lines += chunk.lines;
        self.let_go.bytes += chunk.bytes.len() as u64;
        true
    }

    /// Lets the oldest window go of which nothing more was written than had to go; it may be that which is rendered. `false`
    /// when there is none.
    fn drop_oldest(&mut self, rendered_ms: u64) -> bool {
        let Some(window_ms) = self.chunks.front().map(|chunk| chunk.window_ms) else { return false };
        let mut lines = 0;
        while self.chunks.front().is_some_and(|chunk| chunk.window_ms == window_ms) {
            lines += self.take_first().map_or(0, |chunk| chunk.lines);
        }
        self.is_given_up = window_ms == rendered_ms;
        Loss::Buffer.count(1, lines);
        tracing::debug!(window_ms, lines, "a window for Graphite is lost: limits.graphite_buffer is reached");
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(length: usize) -> Chunk {
        Chunk { bytes: vec![b'x'; length], lines: length as u64 }
    }

    /// A window of so many chunks of ten bytes.
    fn window(queue: &Queue, window_ms: u64, chunks: u64) {
        window_until(queue, window_ms, chunks, Instant::now());
    }

    fn window_until(queue: &Queue, window_ms: u64, chunks: u64, deadline: Instant) {
        queue.begin();
        for number in 1..=chunks {
            queue.push(window_ms, chunk(10), number == chunks, deadline);
        }
    }

    fn write_all(queue: &Queue) -> u64 {
        let mut written = 0;
        while let Some((id, _)) = queue.next() {
            queue.wrote(id);
            written += 1;
        }
        written
    }

    #[test]
    fn what_was_written_waits_until_it_was_read() {
        let queue = Queue::new(100);
        window(&queue, 1, 2);
        window(&queue, 2, 1);
        assert_eq!(write_all(&queue), 3);
        queue.failed();
        assert_eq!(write_all(&queue), 3, "all of it is sent again");
        window(&queue, 3, 1);
        assert_eq!(queue.read(), Read { windows: 2, lines: 30, bytes: 30 });
        assert_eq!(write_all(&queue), 1);
        assert_eq!((queue.read().windows, queue.oldest_ms()), (1, None));
    }

    #[test]
    fn the_oldest_windows_go_when_there_is_no_room() {
        let queue = Queue::new(45);
        window(&queue, 1, 2);
        window(&queue, 2, 2);
        window(&queue, 3, 1);
        assert_eq!(queue.oldest_ms(), Some(2), "whole windows go");
        // One that is larger than all there may be goes itself, and the next one has room again.
        window(&queue, 4, 6);
        assert_eq!(queue.oldest_ms(), None);
        window(&queue, 5, 3);
        assert_eq!(write_all(&queue), 3);
        assert_eq!(queue.read(), Read { windows: 1, lines: 30, bytes: 30 });
    }

    #[test]
    fn a_window_larger_than_the_bound_is_sent_while_it_is_read() {
        let queue = Arc::new(Queue::new(35));
        queue.set_connected(true);
        let deadline = Instant::now() + std::time::Duration::from_secs(20);
        let rendering = Arc::clone(&queue);
        queue.begin();
        let renderer = std::thread::spawn(move || {
            (1..=50).for_each(|number| rendering.push(1, chunk(10), number == 50, deadline));
        });
        assert_eq!(write_all(&queue), 50);
        renderer.join().unwrap();
        let read = queue.read();
        assert_eq!((read.windows, read.lines), (1, 500));
    }

    #[test]
    fn what_had_to_go_before_it_was_read_is_lost_with_the_connection() {
        let queue = Queue::new(30);
        queue.begin();
        for _ in 0..3 {
            queue.push(1, chunk(10), false, Instant::now());
            let (id, _) = queue.next().unwrap();
            queue.wrote(id);
        }
        queue.push(1, chunk(10), true, Instant::now());
        assert_eq!(queue.lock().let_go, Read { windows: 0, lines: 10, bytes: 10 });
        queue.failed();
        assert_eq!(write_all(&queue), 3);
        assert_eq!(queue.read(), Read { windows: 1, lines: 30, bytes: 30 });
    }

    #[test]
    fn who_waits_for_room_does_not_hold_up_a_stop() {
        let queue = Arc::new(Queue::new(15));
        queue.set_connected(true);
        let rendering = Arc::clone(&queue);
        let never = Instant::now() + std::time::Duration::from_secs(3_600);
        let renderer = std::thread::spawn(move || window_until(&rendering, 1, 2, never));
        assert!(queue.wait_for_chunks());
        queue.hurry(Instant::now());
        renderer.join().unwrap();
        assert_eq!(queue.oldest_ms(), None, "the window was larger than the bound");
    }

    #[test]
    fn a_stop_ends_all_waiting() {
        let queue = Queue::new(100);
        window(&queue, 1, 2);
        queue.stop(Instant::now());
        queue.pause(Instant::now() + std::time::Duration::from_secs(60), false);
        assert!(queue.wait_for_chunks());
        assert_eq!(queue.give_up(), (1, 20));
        assert!(!queue.wait_for_chunks());
    }
}
