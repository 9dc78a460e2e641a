//! Kafka as the store: one compacted topic of the agents' own totals, a table of (agent, series) -> state.
//!
//! After each flush the totals that it wrote are produced by one thread (`publish`); what an agent says of a series
//! replaces what it said before, so nothing can count twice, and whatever may be missing is just said again. Another
//! thread (`follow`) reads the topic from its beginning and keeps what the other agents say (`table`), for readers that
//! add it to the agent's own figures. Neither is waited for by the flush, and neither waits for a reader.
//!
//! # The topic
//! A series has one partition, by the hash of its key without its type, so what is said of it is in order. A record's
//! header `by` is who produced it: a random number of the process.
//!
//! | key | value |
//! |---|---|
//! | `<agent, 32 hex digits>:<type letter>:<series key>` | the journal's record of the total: `f7 't' 'j'`, version 1, length and CRC-32 (little-endian), then postcard: what it is, the number of the transaction, kind, key, start and update in ms, aggregate, rates. No value: the agent has no such series any more |
//! | `delete:<type letter>:<series key>` | JSON: `v` (1), `nonce`, `by` (agent), `at_ms`. It has no value once its day is over |
//!
//! # What is kept up, and how
//! - **Nothing accepted is missing in the end.** The journal holds the number of the last transaction of which Kafka has
//!   all. After a start, a failed delivery or an outage every total that is newer is produced again, and so is one that the
//!   topic, once read to its end, does not have.
//! - **Deletes reach every agent**, those that are away too: a `delete` record stays for 25 h, then its agent
//!   takes it away (any agent does after twice that). An agent resets its series when it reads the record and keeps how
//!   far it has read such records in the same transaction, so it does so once. An agent away for longer keeps its part.
//! - **What expired** in the journal is taken out of the topic. What an agent that never came back left there is taken out
//!   by any other, after twice `limits.store_expire`.
//! - **A topic that lost something**, or was made again, is found out by its ends and filled from the journals.
//!
//! Limits: `kafka_table`, `store_expire`. Metrics: `tallyd_store_connected{store="kafka"}`,
//! `tallyd_store_errors_total{store="kafka"}`, `tallyd_kafka_*`.

#[cfg(feature = "kafka")]
mod follow;
#[cfg(feature = "kafka")]
mod key;
#[cfg(feature = "kafka")]
mod publish;
#[cfg(feature = "kafka")]
mod read;
#[cfg(feature = "kafka")]
mod run;
#[cfg(feature = "kafka")]
mod table;

use serde::{Deserialize, Serialize};

#[cfg(feature = "kafka")]
pub use read::Reader;
#[cfg(feature = "kafka")]
pub use run::{Bell, Handle, OnDeleted, Parts, start};

use crate::units::Size;

/// The section `[store.kafka]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The compacted topic of totals.
    pub topic: String,
    /// How many partitions it is made with.
    pub partitions: i32,
    /// How many copies it is made with; 0 is what the brokers do by default.
    pub replication: i32,
}

impl Default for Config {
    fn default() -> Self {
        Self { topic: "tallyd-state".to_owned(), partitions: 6, replication: 0 }
    }
}

/// The row of `[limits]` about Kafka.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How much of the other agents' totals is kept in memory; beyond it readers are told of this agent alone.
    pub kafka_table: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self { kafka_table: Size(256 << 20) }
    }
}

/// How long a delete stays in the topic, in milliseconds: a day, and an hour for clocks that are apart.
#[cfg(feature = "kafka")]
pub const DELETE_KEPT_MS: u64 = 25 * 3_600_000;
