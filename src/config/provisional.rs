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

pub mod protocol {
    use super::*;
    config! { Config {
        name_policy: String = "etsy".into(),
        gauge_sign: String = "relative".into(),
        tag_dialects: Vec<String> = texts(&["dogstatsd", "graphite", "influx", "librato", "signalfx"]),
    } }
    config! { Limits {
        line: usize = 8192,
        name: usize = 512,
        identity: usize = 4096,
        tags: usize = 32,
        tag_key: usize = 128,
        tag_value: usize = 512,
        values: usize = 1024,
        sample_rate_min: f64 = 1e-6,
        set_member: usize = 512,
        json_depth: usize = 16,
        samples: usize = 100_000,
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

pub mod ingest {
    use super::*;
    config! { Limits { reject_log: u32 = 10, } }
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
