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
    config! { Config {
        ingest: Vec<String> = texts(&["127.0.0.1:8000", "[::1]:8000"]),
        api: Vec<String> = texts(&["127.0.0.1:7000", "[::1]:7000"]),
        scrape: Vec<String> = Vec::new(),
        hosts: Vec<String> = Vec::new(),
        insecure: bool = false,
    } }
}

pub mod protocol {
    use super::*;
    config! { Config {
        name_policy: String = "etsy".into(),
        gauge_sign: String = "relative".into(),
        tag_dialects: Vec<String> = texts(&["dogstatsd", "influx", "librato", "signalfx", "graphite"]),
    } }
    config! { Limits {
        line: Size = Size(8192),
        name: Size = Size(512),
    } }
}

pub mod flush {
    use super::*;
    config! { Config {
        interval: Time = Time::secs(1),
        window: Time = Time::secs(10),
        percentiles: Vec<f64> = vec![90.0],
    } }
}

pub mod store {
    use super::*;
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Kind {
        Memory,
        #[default]
        Embedded,
        Redis,
        Kafka,
    }
    config! { Config {
        kind: Kind = Kind::default(),
        redis: redis::Config = redis::Config::default(),
    } }
    pub mod redis {
        use super::*;
        config! { Config {
            url: String = "redis://127.0.0.1:6379".into(),
            prefix: String = "tallyd".into(),
        } }
    }
}

pub mod prometheus {
    use super::*;
    config! { Config {
        observer_type: String = "summary".into(),
        quantiles: Vec<f64> = vec![0.5, 0.9, 0.99],
        buckets: Vec<f64> = vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
        openmetrics: bool = false,
    } }
}
