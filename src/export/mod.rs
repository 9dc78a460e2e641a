//! Pushes out: what other systems want to be sent, window by window.
//!
//! Nothing on a sample's way waits for any of it. It only reads the ledger.

pub mod graphite;

use serde::{Deserialize, Serialize};

/// The section `[export]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Graphite.
    pub graphite: graphite::Config,
}
