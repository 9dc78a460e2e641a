//! What the agent hands out by itself: [`relay`] sends lines on to other servers as they came; and [`console`] answers scripts
//! that were written for the original's admin port. Nothing here is ever waited for by a worker.

use serde::{Deserialize, Serialize};

pub mod console;
pub mod relay;

/// `[export]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Where lines are sent on to.
    pub relay: relay::Config,
    /// Where the console listens.
    pub console: console::Config,
}
