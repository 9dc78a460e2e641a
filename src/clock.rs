//! The one place that reads a clock.
//!
//! Rates, expiry and waiting go by [`Clock::monotonic`] and [`steady_ms`]; labels, windows and seals by
//! [`Clock::wall_ms`]. A step of the wall clock changes neither a rate nor the order of readings:
//! [`Clock::stamp_ms`] goes on from where it was rather than back.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A clock. Each thread has its own.
#[derive(Debug, Clone)]
pub struct Clock {
    start: Instant,
    stamps: Stamps,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now(), stamps: Stamps::default() }
    }
}

impl Clock {
    /// Time since the clock was made; it never goes back and no step changes it.
    pub fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    /// The wall clock in milliseconds since the epoch.
    pub fn wall_ms(&self) -> u64 {
        wall_ms()
    }

    /// The wall clock in milliseconds since the epoch, but never less than this clock said before: while the wall clock
    /// is behind, time goes on from there, so that of two threads the later reading still has the later stamp.
    pub fn stamp_ms(&mut self) -> u64 {
        self.stamps.next(wall_ms(), Instant::now)
    }
}

/// Stamps that never go back.
#[derive(Debug, Clone, Default)]
struct Stamps {
    last_ms: u64,
    /// Since when the wall clock is behind, and the stamp of that moment.
    behind: Option<(Instant, u64)>,
}

impl Stamps {
    #[inline]
    fn next(&mut self, wall_ms: u64, now: impl FnOnce() -> Instant) -> u64 {
        if wall_ms >= self.last_ms {
            (self.last_ms, self.behind) = (wall_ms, None);
        } else {
            let now = now();
            let (since, stamp_ms) = *self.behind.get_or_insert((now, self.last_ms));
            self.last_ms = stamp_ms + now.saturating_duration_since(since).as_millis() as u64;
        }
        self.last_ms
    }
}

#[cfg(test)]
thread_local! {
    /// What this thread's clocks say in a model, whose threads share a time of their own.
    pub(crate) static MODEL_MS: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// The wall clock in milliseconds since the epoch.
pub fn wall_ms() -> u64 {
    #[cfg(test)]
    if let Some(model_ms) = MODEL_MS.get() {
        return model_ms;
    }
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Milliseconds since the epoch as they are if the wall clock was right when this was first asked and took no step since:
/// for durations that outlive the process, such as those of rates. It never goes back.
pub fn steady_ms() -> u64 {
    #[cfg(test)]
    if let Some(model_ms) = MODEL_MS.get() {
        return model_ms;
    }
    static BEGUN: OnceLock<(Instant, u64)> = OnceLock::new();
    let (since, wall_ms) = BEGUN.get_or_init(|| (Instant::now(), wall_ms()));
    wall_ms + since.elapsed().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_go_on_while_the_wall_clock_is_behind() {
        let begun = Instant::now();
        let after = |ms| move || begun + Duration::from_millis(ms);
        let mut stamps = Stamps::default();
        assert_eq!(stamps.next(10_000, after(0)), 10_000);
        assert_eq!(stamps.next(10_500, after(500)), 10_500);
        // Set back by an hour, as far as it goes; another thread's clock, a little ahead, stays a little ahead.
        let mut other = stamps.clone();
        assert_eq!(other.next(10_503, after(503)), 10_503);
        assert_eq!(stamps.next(600, after(600)), 10_500);
        assert_eq!(other.next(600, after(600)), 10_503);
        assert_eq!(stamps.next(1_600, after(1_600)), 11_500);
        assert_eq!(other.next(1_600, after(1_600)), 11_503);
        assert_eq!(stamps.next(20_000, after(1_700)), 20_000);
        assert_eq!(stamps.next(20_001, after(1_701)), 20_001);
    }

    #[test]
    fn steady_time_is_that_of_the_wall_clock_without_its_steps() {
        let before = wall_ms();
        let steady = steady_ms();
        assert!(steady.abs_diff(before) < 60_000 && steady_ms() >= steady);
    }
}
