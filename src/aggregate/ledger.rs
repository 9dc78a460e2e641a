//! The ledger: each series' cumulative state on this agent and its window, in sharded lock-free maps.
//!
//! One thread folds sealed cells in. Scrape, API and flush read beside it: a read of a series is one atomic load of an
//! immutable [`State`], so it takes no lock and never holds up the fold.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

use super::Aggregate;
use super::meter::Rates;
use super::window::Window;
use crate::sample::{Kind, SeriesKey};

/// The cumulative figures of a series on this agent since it began: what the journal keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Total {
    /// When the series began, in milliseconds since the epoch.
    pub start_ms: u64,
    /// When its last sample came, in milliseconds since the epoch.
    pub update_ms: u64,
    /// All its samples.
    pub aggregate: Aggregate,
    /// The rates, for a meter.
    pub rates: Option<Rates>,
}

/// A delta that is not yet known to be in the journal's outbox.
#[derive(Debug, Clone)]
pub struct Unshipped {
    /// The flush that carries it, or will.
    pub flush: u64,
    /// What came.
    pub delta: Arc<Aggregate>,
}

/// One published state of a series. It never changes; a fold publishes the next one.
#[derive(Debug, Clone)]
pub struct State {
    /// All the series' life.
    pub total: Total,
    /// The window that was written to last.
    pub window: Option<Window>,
    /// The window before it that was written to.
    pub before: Option<Window>,
    /// What no batch carries yet, oldest first; empty without a remote store.
    pub unshipped: Vec<Unshipped>,
}

/// One series of this agent.
#[derive(Debug)]
pub struct Series {
    /// Its kind.
    pub kind: Kind,
    /// Its key.
    pub key: SeriesKey,
    state: ArcSwap<State>,
}

impl Series {
    /// The state as of the last fold.
    pub fn state(&self) -> Arc<State> {
        self.state.load_full()
    }
}

/// What one flush takes of one series: its state then, and the delta since the flush before.
#[derive(Debug, Clone)]
pub struct Changed {
    /// The series.
    pub series: Arc<Series>,
    /// Its state at the flush.
    pub state: Arc<State>,
    /// The samples since the flush before; `None` without a remote store.
    pub delta: Option<Arc<Aggregate>>,
}
