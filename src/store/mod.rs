//! Deltas into a place that outlives the process: batches, their partitions and sequences, and what a store answers.
//!
//! [`journal`] is the agent's own file and holds the outbox; [`redis`] is a place that many agents share; [`ship`] brings
//! what is in the one to the other. A batch is applied at most once: its sequence is compared in the same atomic unit that
//! applies it. [`kafka`] is another such place, which keeps each agent's totals instead of what batches add up to.

pub mod journal;
pub mod kafka;
pub mod redis;
pub mod ship;

use std::hash::Hasher;

use serde::{Deserialize, Serialize};

use crate::aggregate::Aggregate;
use crate::aggregate::meter::Rates;
use crate::sample::{Kind, SeriesKey};

/// One of the 256 logical parts of the key space, each with its own sequence.
pub type Partition = u8;

/// Where a key belongs, whatever its type: the same for all agents, versions and machines.
pub fn partition(key: &SeriesKey) -> Partition {
    // XXH3 with seed 0 is a published format; a change of it would move keys away from their totals.
    let mut hasher = twox_hash::XxHash3_64::with_seed(0);
    hasher.write(key.as_str().as_bytes());
    (hasher.finish() & 0xff) as Partition
}

/// What one flush changed of one series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// The kind of the series.
    pub kind: Kind,
    /// Its key.
    pub key: SeriesKey,
    /// When the series began on this agent, in milliseconds since the epoch.
    pub start_ms: u64,
    /// When it was updated last, in milliseconds since the epoch.
    pub update_ms: u64,
    /// The samples since the flush before.
    pub delta: Aggregate,
    /// The agent's own rates as of the flush, for a meter: they decay, so they can't be added up from deltas.
    pub rates: Option<Rates>,
}

/// The samples of a delta. A set keeps members, not samples, so it has none.
pub fn samples_of(delta: &Aggregate) -> u64 {
    match delta {
        Aggregate::Set(_) => 0,
        Aggregate::Counter(_) | Aggregate::Gauge(_) | Aggregate::Observed(_) | Aggregate::Meter(_) => delta.samples(),
    }
}

/// Operations of one partition that are applied together, once. At most 1,000 of them and 512 KiB encoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Where all its keys belong.
    pub partition: Partition,
    /// 1, 2, 3 ... for each agent and partition.
    pub sequence: u64,
    /// The number of the flush that made it: the agent's flushes count up for ever.
    pub flush: u64,
    /// The samples in it, those of sets left out; what is lost with it, should it be.
    pub samples: u64,
    /// What to apply, each series at most once.
    pub operations: Vec<Operation>,
}
