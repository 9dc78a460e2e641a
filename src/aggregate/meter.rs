//! Rates of meters.

use serde::{Deserialize, Serialize};

/// The exponentially weighted rates of a meter.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    start_ms: u64,
    count: f64,
}

impl Rates {
    /// A meter that begins now.
    pub fn new(start_ms: u64) -> Self {
        Self { start_ms, count: 0.0 }
    }

    /// Counts marks.
    pub fn mark(&mut self, count: f64, _now_ms: u64) {
        self.count += count;
    }

    /// The 1-, 5- and 15-minute rates per second.
    pub fn at(&self, _now_ms: u64) -> [f64; 3] {
        [0.0; 3]
    }
}
