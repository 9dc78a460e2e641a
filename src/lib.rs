//! tallyd, a StatsD-compatible metrics agent. The modules stand in the order of a sample's way:
//!
//! ```text
//! socket -> burst of datagrams -> lines -> Sample<'_> -> the worker's own shard == seal ==> ledger -> flush -> journal -> store
//! (listen)                       (protocol)            (aggregate)                        (aggregate)        (store)   (redis)
//!                                                                                            |-> scrape, JSON API (http)
//! ```
//!
//! It goes one way. `protocol` knows bytes and nothing else, `aggregate` knows numbers, `mapping` knows names and what
//! Prometheus is to see in their place; all three are pure, and everything that can fail stands around them. Nothing on the right is ever waited for by anything on the left.

pub mod agent;
pub mod aggregate;
pub mod cli;
pub mod clock;
pub mod config;
pub mod flush;
pub mod http;
pub mod ingest;
pub mod listen;
pub mod mapping;
pub mod protocol;
pub mod sample;
pub mod store;
pub mod telemetry;
pub mod units;
pub mod view;
