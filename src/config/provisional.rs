//! Stand-ins for the parts' own Config types; this file goes when they are there.
#![allow(missing_docs, reason = "it goes away")]

use crate::units::Time;
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

pub mod redis {
    use super::*;
    config! { Config {
        url: String = "redis://127.0.0.1:6379".into(),
        prefix: String = "tallyd".into(),
    } }
    config! { Limits {
        redis_connect: Time = Time::secs(2),
        redis_reply: Time = Time::secs(5),
    } }
}
