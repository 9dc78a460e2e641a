//! tallyd from outside: the real executable, real sockets, a real Redis, a real Prometheus. Each test starts its own
//! servers on free ports with a temporary directory, waits for conditions with a deadline, and ends what it started.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test ends where it finds something wrong, and says so; its modules are its own"
)]

mod agent;
mod http;
mod net;
mod redis_servers;

mod access;
mod accounting;
mod addresses;
mod aggregation;
mod cadence;
mod clients;
mod config;
mod console;
mod etsy;
mod faults;
mod flood;
mod global;
mod graphite;
mod handover;
mod idle;
mod ingest;
#[cfg(feature = "kafka")]
mod kafka;
mod lifecycle;
mod limits;
mod load;
mod mapping;
mod migrate;
mod package;
mod prometheus;
mod readme;
mod redis;
mod redis_modes;
mod relay;
mod sources;
mod stress;
mod systemd;
mod unix;
