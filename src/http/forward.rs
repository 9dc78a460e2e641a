//! Records into a topic of Kafka instead of into this agent's figures: `ingest.forward = "kafka"`.
//!
//! A request is answered once all its good records are acknowledged by all copies of their partitions. Brokers that are
//! away, or a queue that is full, are a 503: then some of its records may have got through, so a client that sends it
//! again may double those. Limits: librdkafka's queue, 64 MiB and 100,000 records. Metrics: `tallyd_kafka_produced_total`,
//! `tallyd_kafka_failed_total`.

#[cfg(feature = "kafka")]
mod kafka;

use serde::{Deserialize, Deserializer, Serialize};

#[cfg(feature = "kafka")]
pub use self::kafka::Forwarder;
use crate::ingest::Sorted;

/// The section `[ingest]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Where records go that come by HTTP.
    pub forward: Forward,
}

/// `ingest.forward`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Forward {
    /// Nowhere: they are counted here.
    #[default]
    None,
    /// Into `kafka.topic`.
    #[cfg(feature = "kafka")]
    Kafka,
}

impl<'de> Deserialize<'de> for Forward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        match String::deserialize(deserializer)?.as_str() {
            "none" => Ok(Self::None),
            #[cfg(feature = "kafka")]
            "kafka" => Ok(Self::Kafka),
            #[cfg(not(feature = "kafka"))]
            "kafka" => Err(D::Error::custom(crate::kafka::NOT_BUILT)),
            _ => Err(D::Error::custom("write \"none\" or \"kafka\"")),
        }
    }
}

/// Records could not be delivered; some of them may have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undelivered {
    /// As many wait as may.
    Full,
    /// The brokers did not acknowledge them in time.
    Away,
}

/// There is none in a build without Kafka.
#[cfg(not(feature = "kafka"))]
#[derive(Debug)]
pub enum Forwarder {}

#[cfg(not(feature = "kafka"))]
impl Forwarder {
    /// Delivers records.
    ///
    /// # Errors
    /// When they were not acknowledged.
    pub async fn deliver(&self, _: &[Sorted]) -> Result<(), Undelivered> {
        match *self {}
    }
}
