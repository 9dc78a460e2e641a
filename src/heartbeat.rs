//! Which parts of the agent make progress. Each part beats as often as it goes round; whoever asks is told which have not
//! for how long. A beat is one store to memory that no other thread writes, so a worker can afford one for each burst.
//!
//! A part that ends leaves the board; one that panicked stays on it, and stands still.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A part that stands still for so long is stalled. All go round once a second or more often when there is nothing to do.
pub const STALLED: Duration = Duration::from_secs(10);

/// The lowest bit says that the part waits for something to do, as long as that takes; the others count.
const RESTS: u64 = 1;

/// A cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Count(AtomicU64);

/// All parts that beat.
#[derive(Debug, Default)]
pub struct Board {
    parts: Mutex<Vec<Part>>,
}

#[derive(Debug)]
struct Part {
    name: String,
    count: Arc<Count>,
    seen: u64,
    moved: Instant,
}

/// A part's own end. Only one thread may have it.
#[derive(Debug)]
pub struct Beat {
    count: Arc<Count>,
    board: Arc<Board>,
}

impl Beat {
    /// Says that the part goes on.
    #[inline]
    pub fn beat(&self) {
        // The only writer, so this needs no locked instruction.
        let count = self.count.0.load(Ordering::Relaxed);
        self.count.0.store((count & !RESTS).wrapping_add(2), Ordering::Relaxed);
    }

    /// Says that the part waits for something to do, until it beats again.
    #[inline]
    pub fn rest(&self) {
        let count = self.count.0.load(Ordering::Relaxed);
        self.count.0.store(count | RESTS, Ordering::Relaxed);
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.board.parts().retain(|part| !Arc::ptr_eq(&part.count, &self.count));
        }
    }
}

/// A part that makes no progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Still {
    /// Which.
    pub part: String,
    /// For how long.
    pub time: Duration,
}

impl fmt::Display for Still {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stalled: {} for {} s", self.part, self.time.as_secs())
    }
}

impl Board {
    fn parts(&self) -> MutexGuard<'_, Vec<Part>> {
        // Each step leaves it sound.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new part, which has just moved.
    pub fn begin(self: &Arc<Self>, name: impl Into<String>) -> Beat {
        let count = Arc::new(Count::default());
        let part = Part { name: name.into(), count: Arc::clone(&count), seen: 0, moved: Instant::now() };
        self.parts().push(part);
        Beat { count, board: Arc::clone(self) }
    }

    /// How long each part has stood still, as far as those who look can tell: zero for one that moved since the last look.
    pub fn look(&self, now: Instant) -> Vec<Still> {
        let look = |part: &mut Part| {
            let count = part.count.0.load(Ordering::Relaxed);
            if std::mem::replace(&mut part.seen, count) != count || count & RESTS != 0 {
                part.moved = now;
            }
            Still { part: part.name.clone(), time: now.saturating_duration_since(part.moved) }
        };
        self.parts().iter_mut().map(look).collect()
    }

    /// The parts that are stalled.
    pub fn stalled(&self, now: Instant) -> Vec<Still> {
        self.look(now).into_iter().filter(|still| still.time >= STALLED).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(board: &Board, at: Instant, second: u64) -> Vec<(String, u64)> {
        let found = board.look(at + Duration::from_secs(second));
        found.into_iter().map(|still| (still.part, still.time.as_secs())).collect()
    }

    #[test]
    fn a_part_that_beats_or_rests_is_not_still() {
        let board = Arc::new(Board::default());
        let (worker, flush) = (board.begin("udp-0"), board.begin("flush"));
        let start = Instant::now();
        let look = |second| seconds(&board, start, second);
        let of = |worker, flush| vec![("udp-0".to_owned(), worker), ("flush".to_owned(), flush)];
        worker.beat();
        flush.rest();
        assert_eq!(look(0), of(0, 0));
        assert_eq!(look(20), of(20, 0));
        worker.beat();
        flush.beat();
        assert_eq!(look(21), of(0, 0));
        assert_eq!(look(33), of(12, 12));
        flush.rest();
        let told: Vec<_> = board.stalled(start + Duration::from_secs(33)).iter().map(Still::to_string).collect();
        assert_eq!(told, ["stalled: udp-0 for 12 s"]);
    }

    #[test]
    fn a_part_that_ended_is_gone_and_one_that_panicked_is_not() {
        let board = Arc::new(Board::default());
        drop(board.begin("ended"));
        let panics = board.begin("panicked");
        let ended = thread::spawn(move || {
            let _beat = panics;
            std::panic::resume_unwind(Box::new("no message"));
        });
        assert!(ended.join().is_err());
        assert_eq!(seconds(&board, Instant::now(), 60).iter().map(|(name, _)| name).collect::<Vec<_>>(), ["panicked"]);
        assert_eq!(board.stalled(Instant::now() + Duration::from_secs(70))[0].part, "panicked");
    }
}
