//! Stand-ins for the parts' own Config types; this file goes when they are there.
#![allow(missing_docs, reason = "it goes away")]

use crate::units::{Size, Time};
use serde::{Deserialize, Serialize};

macro_rules! config {
    ($(#[$doc:meta])* $name:ident { $($key:ident: $type:ty = $default:expr,)* }) => {
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name { $(pub $key: $type,)* }
        impl Default for $name {
            fn default() -> Self { Self { $($key: $default,)* } }
        }
    };
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

pub mod listen {
    use super::*;
    config! { Limits {
        datagram: Size = Size(65_535),
        connections: usize = 1024,
        connections_per_address: usize = 256,
        stream_buffer: Size = Size(16 << 10),
        stream_idle: Time = Time::secs(600),
        partial_line: Time = Time::secs(30),
        reserved_fds: u64 = 64,
    } }
    config! { Config {
        udp: Vec<String> = texts(&["127.0.0.1:8125", "[::1]:8125"]),
        tcp: Vec<String> = texts(&["127.0.0.1:8125", "[::1]:8125"]),
        unixgram: Vec<String> = Vec::new(),
        unix: Vec<String> = Vec::new(),
        workers: usize = 0,
        receive_buffer: Size = Size(8 << 20),
        linger: Time = Time::millis(1),
    } }
}

pub mod http {
    use super::*;
    config! { Limits {
        http_connections: usize = 256,
        request_line: Size = Size(4 << 10),
        headers: Size = Size(16 << 10),
        header_time: Time = Time::secs(5),
        body_time: Time = Time::secs(10),
        keep_alive: Time = Time::secs(60),
        body: Size = Size(1 << 20),
        inflated: Size = Size(8 << 20),
        bodies: Size = Size(64 << 20),
        page: usize = 10_000,
        lists: usize = 8,
        idempotency_keys: usize = 100_000,
    } }
    config! { Config {
        ingest: Vec<String> = texts(&["127.0.0.1:8000", "[::1]:8000"]),
        api: Vec<String> = texts(&["127.0.0.1:7000", "[::1]:7000"]),
        scrape: Vec<String> = Vec::new(),
        hosts: Vec<String> = Vec::new(),
        insecure: bool = false,
    } }
}

pub mod flush {
    use super::*;
    config! { Limits {
        idle: Time = Time::secs(3600),
        idle_gauges: Time = Time::secs(86_400),
    } }
    config! { Config {
        interval: Time = Time::secs(1),
        window: Time = Time::secs(10),
        percentiles: Vec<f64> = vec![90.0],
    } }
}

pub mod journal {
    use super::*;
    config! { Limits {
        journal: Size = Size(4 << 30),
        outbox: Size = Size(1 << 30),
    } }
}

pub mod agent {
    use super::*;
    config! { Limits { stop: Time = Time::secs(20), } }
}

pub mod redis {
    use super::*;
    config! { Config {
        url: String = "redis://127.0.0.1:6379".into(),
        prefix: String = "tallyd".into(),
    } }
    config! { Limits {
        redis_connect: Time = Time::secs(2),
        redis_reply: Time = Time::secs(5),
        store_expire: Time = Time::secs(30 * 86_400),
    } }
}
