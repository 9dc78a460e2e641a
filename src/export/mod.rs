//! What the agent hands out by itself: [`graphite`] is sent the figures of each window, [`relay`] sends lines on to other
//! servers as they came, and [`console`] answers scripts that were written for the original's admin port. Nothing on a
//! sample's way waits for any of it.

use serde::{Deserialize, Serialize};

pub mod console;
pub mod graphite;
pub mod relay;

/// `[export]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Where the figures of windows are sent.
    pub graphite: graphite::Config,
    /// Where lines are sent on to.
    pub relay: relay::Config,
    /// Where the console listens.
    pub console: console::Config,
}
