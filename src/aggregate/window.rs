//! Windows: the figures of a stretch of time that begins at a multiple of its own length.

use serde::{Deserialize, Serialize};

use super::Aggregate;

/// What came into one series during one window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// When it began, in milliseconds since the epoch: a multiple of `flush.window`.
    pub start_ms: u64,
    /// What came.
    pub aggregate: Aggregate,
}

/// The start of the window in which a moment lies.
pub const fn start_of(at_ms: u64, window_ms: u64) -> u64 {
    at_ms - at_ms % window_ms
}
