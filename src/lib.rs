//! tallyd, a StatsD-compatible metrics agent. The modules stand in the order of a sample's way:
//!
//! ```text
//! socket -> burst of datagrams -> lines -> Sample<'_> -> the worker's own shard == seal ==> ledger -> flush -> journal -> store
//! (listen)                       (protocol)            (aggregate)                        (aggregate)        (store)   (redis, kafka)
//!                                                       ^ drop? (mapping)                    |-> view -> JSON API (http)
//!                          |                                                                 |-> names (mapping) -> scrape (http)
//!                          |-> lines as they came -> relay (export)                          |-> Graphite (export)
//! ```
//!
//! It goes one way. `protocol` knows bytes and nothing else, `aggregate` knows numbers, `mapping` knows names and what
//! Prometheus is to see in their place; all three are pure, and everything that can fail stands around them. Nothing on
//! the right is ever waited for by anything on the left. The words that all share are in `sample`, `receipt`, `units`,
//! `secret`, `clock`, `heartbeat`, `sync` and `telemetry`, and how connections are made to speak TLS in `tls`; `systemd` is
//! who may run the process; `config`, `agent` and `cli` put the parts together.

// Blank lines keep the order, which is that of the way and not of the alphabet.

pub mod sample;

pub mod receipt;

pub mod inherited;

pub mod listen;

pub mod protocol;

pub mod ingest;

pub mod mapping;

pub mod aggregate;

pub mod flush;

pub mod store;

pub mod view;

pub mod export;

pub mod http;

pub mod kafka;

pub mod tls;

pub mod secret;

pub mod units;

pub mod clock;

pub mod heartbeat;

pub mod sync;

pub mod telemetry;

pub mod systemd;

pub mod config;

pub mod handover;

pub mod agent;

pub mod cli;
