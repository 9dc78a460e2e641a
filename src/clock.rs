//! The one place that reads a clock.
//!
//! Rates, expiry and waiting go by [`Clock::monotonic`]; labels, windows and seals by [`Clock::wall_ms`]. A step of the
//! wall clock changes neither a rate nor the order of readings: [`Clock::stamp_ms`] stands still rather than going back.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A clock. Each thread has its own; they agree but for `stamp_ms` after the wall clock was set back.
#[derive(Debug, Clone)]
pub struct Clock {
    start: Instant,
    stamp_ms: u64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now(), stamp_ms: 0 }
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

    /// The wall clock in milliseconds since the epoch, but never less than this clock said before.
    pub fn stamp_ms(&mut self) -> u64 {
        self.stamp_ms = self.stamp_ms.max(wall_ms());
        self.stamp_ms
    }
}

/// The wall clock in milliseconds since the epoch.
pub fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
