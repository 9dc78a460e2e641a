//! Samples into series. Everything here is pure: bytes, numbers and times come in as arguments.
//!
//! One shape serves as a shard's cell, as a delta, as a window and as a total: [`Aggregate`]. Its merge is
//! associative, and commutative but for gauges, where time decides; so it does not matter how samples were spread over
//! shards, seals, flushes and agents.

pub mod baselines;
pub mod budget;
mod cells;
pub mod etsy;
pub mod fold;
pub mod histogram;
mod index;
pub mod ledger;
pub mod meter;
mod plain;
pub mod series;
pub mod set;
pub mod shard;
mod state;
pub mod window;

pub use series::{Aggregate, Counter, Gauge, Marks, Observed, Sum};
