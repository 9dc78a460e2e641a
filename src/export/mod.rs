//! What the agent hands out by itself: [`relay`] sends lines on to other servers as they came. Nothing here is ever waited
//! for by a worker.

use serde::{Deserialize, Serialize};

pub mod relay;

/// `[export]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Where lines are sent on to.
    pub relay: relay::Config,
}
