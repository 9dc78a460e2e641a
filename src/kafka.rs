//! The way to Kafka that store, input and forward share: where the brokers are, what librdkafka is told, and how its
//! clients speak here. It produces and consumes nothing itself.
//!
//! A build without the feature `kafka` has the configuration and refuses to use it; everything else is librdkafka's, by
//! the crate `rdkafka`. What librdkafka logs goes to our log at `debug`: that brokers are away is told once, by the part
//! that finds out.

#[cfg(feature = "kafka")]
mod client;

use std::collections::BTreeMap;
use std::fmt;
#[cfg(feature = "kafka")]
use std::io;

use serde::{Deserialize, Serialize};

use crate::secret::Secret;
#[cfg(feature = "kafka")]
pub use client::{Link, Quiet, is_away, reason};

/// Whether this build can speak to Kafka.
pub const BUILT: bool = cfg!(feature = "kafka");

/// What a build without Kafka says of a key that needs it.
pub const NOT_BUILT: &str = "this build has no Kafka; take a release build, or one of cargo build --features kafka";

/// The section `[kafka]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Brokers to ask for the others, as `host:port`.
    pub brokers: Vec<String>,
    /// The topic of JSON records: what `listen.kafka` reads and `ingest.forward` writes.
    pub topic: String,
    /// The consumer group that shares the topic's partitions.
    pub group: String,
    /// A file, or a credential, whose first line is the value of `sasl.password`; none if empty.
    pub password_file: String,
    /// Any other property of librdkafka, by its name.
    pub options: BTreeMap<String, String>,
    /// What stands in the file; whoever reads files puts it here.
    #[serde(skip)]
    pub password: Option<Secret>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            brokers: vec!["127.0.0.1:9092".to_owned()],
            topic: "metrics-records".to_owned(),
            group: "tallyd".to_owned(),
            password_file: String::new(),
            options: BTreeMap::new(),
            password: None,
        }
    }
}

/// Why a configuration can't be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A name that no topic can have.
    Topic(String),
    /// No broker is named.
    NoBroker,
    /// An option that tallyd sets itself, by what its guarantees rest on.
    Ours(String),
    /// librdkafka takes no option of this name, or not this value; its own words.
    Option(String, String),
    /// librdkafka does not take the options together; its own words.
    Client(String),
}

impl Error {
    /// The key that is to be changed.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Topic(_) => "kafka.topic",
            Self::NoBroker => "kafka.brokers",
            Self::Ours(_) | Self::Option(..) | Self::Client(_) => "kafka.options",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(name) => write!(f, "topic = {name:?}: write 1 to 249 of the characters A-Za-z0-9._-"),
            Self::NoBroker => write!(f, "kafka.brokers = []: no broker; name one such as \"127.0.0.1:9092\""),
            Self::Ours(name) => {
                write!(f, "kafka.options: {name:?} is set by tallyd, which counts right only so; leave it out")
            }
            Self::Option(name, words) => {
                write!(f, "kafka.options: {name:?}: {words}; write a property of librdkafka with a value that it takes")
            }
            Self::Client(words) => write!(f, "kafka.options: {words}; change the options that this names"),
        }
    }
}

impl std::error::Error for Error {}

/// Why a part that speaks to Kafka did not start.
#[cfg(feature = "kafka")]
#[derive(Debug)]
pub enum NotStarted {
    /// The section `[kafka]` can't be used.
    Config(Error),
    /// A thread could not be made.
    Thread(io::Error),
}

#[cfg(feature = "kafka")]
impl NotStarted {
    /// The exit code of a start that failed so, after sysexits.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 78,
            Self::Thread(_) => 74,
        }
    }
}

#[cfg(feature = "kafka")]
impl fmt::Display for NotStarted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(error) => error.fmt(f),
            Self::Thread(error) => write!(f, "a thread for Kafka: {error}; raise the limit of threads"),
        }
    }
}

#[cfg(feature = "kafka")]
impl std::error::Error for NotStarted {}

/// Whether the value of an option is a secret.
pub fn is_secret(option: &str) -> bool {
    ["password", "secret", "jaas", "oauthbearer", "key.pem"].iter().any(|word| option.contains(word))
}

/// Checks a topic's name as brokers do.
///
/// # Errors
/// When no topic can have it.
pub fn check_topic(name: &str) -> Result<(), Error> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let is_name = (1..=249).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != "..";
    if is_name { Ok(()) } else { Err(Error::Topic(name.to_owned())) }
}

#[cfg(not(feature = "kafka"))]
impl Config {
    /// Checks what can be checked without librdkafka.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), Error> {
        if self.brokers.is_empty() {
            return Err(Error::NoBroker);
        }
        check_topic(&self.topic)
    }
}
