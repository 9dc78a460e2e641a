//! Redis as the place that many agents share: the layout, the scripts and the connection to it.
//!
//! Every write is a script that compares a sequence and applies a batch in one atomic unit, so a batch counts once,
//! however often it is sent. Where a server forbids scripts, `transaction` does the same. Every key of a script stands in
//! one partition, whose number in braces is the hash tag that keeps them on one node of a cluster. Needs Redis 5 or
//! later, or Valkey: one server, a master under Sentinel or a cluster (`deployment`, `route`, `node`). Here nothing
//! retries what failed and nothing waits longer than `limits.redis_connect` and `limits.redis_reply` together; `ship` does
//! the one, its caller the other.
//!
//! # Layout
//!
//! With the default prefix, of partition 17 (XXH3 of the series key, seed 0, its low 8 bits):
//!
//! | key | type | holds |
//! |---|---|---|
//! | `tallyd:{017}:s:<letter>:<key>` | hash | one series; expires `limits.store_expire` after its last update |
//! | `tallyd:{017}:seq` | hash | for each agent `<agent>`: sequence of its last batch, `<agent>:samples`: samples in all of them, `<agent>:owner`: nonce of the process that may write it, `<agent>:inherited`: the newest nonce and the last sequence in the journal that it opened, `<agent>:seen`: the last delete it knows, `<agent>:waited`: when it last waited for replicas; `deletes`: number of the last delete |
//! | `tallyd:{017}:index` | sorted set | `<letter>:<key>` by the server's time of its last update, in ms |
//! | `tallyd:{017}:del` | sorted set | `<letter>:<key>` by number of its last delete, which is the server's time in ms made to rise; kept 24 h |
//!
//! Fields of a series. A sum is two fields that add up: `sum`, a whole number, and `sumfrac`, the rest. Times are
//! milliseconds since the epoch.
//!
//! | kind | fields |
//! |---|---|
//! | all | `startTime`, `updateTime` |
//! | `c` | `samples`; sums `increments`, `decrements` |
//! | `g` | `samples`; `value`, `valueTime`, `valueAgent`: the newest set and who sent it; sum `change` and `changeTime`: what changed it since |
//! | `ms`, `h`, `d` | `n`; sums `sum`, `sumSquares`, `count`, `weightedSum`; `min`, `max`; `value`, `valueTime`: the last; `zero`, `b:<scale>:<index>`, `neg:<scale>:<index>`: weights by bucket of an exponential histogram with base 2^(2^-scale) |
//! | `s` | `m:<hash>`: a member, as long as there are at most 1,024 (`members`); `r:<register>`: rank in a HyperLogLog of the others |
//! | `m` | `samples`; sum `count`; `value`, `valueTime`: the last mark; `rates:<agent>`: an agent's start, last tick, marks, marks since the tick, and its 1-, 5- and 15-minute rates per second at the tick |
//!
//! Agents may use different scales at the same time: buckets of each scale stand side by side, and the reader brings
//! them to the coarsest. A cardinality is that of the registers with the members added to them.

mod connection;
mod deployment;
mod durability;
mod encode;
mod error;
mod fields;
mod node;
mod read;
mod route;
#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;
mod transaction;

use std::fmt;
use std::time::Duration;

use redis::{Arg, Cmd, Script, Value};
use serde::{Deserialize, Serialize};

pub(super) use connection::Connection;
pub use deployment::{Config, Mode, Replicas};
pub(super) use durability::{Durability, Stable};
pub use error::{Error, TlsFile};
pub use read::{Cursor, Page, RedisReader, Stored};
use transaction::What;

use super::{Partition, partition};
use crate::sample::{Kind, SeriesKey};
use crate::units::Time;

/// Rows of `[limits]` that this part enforces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Longest wait for a connection.
    pub redis_connect: Time,
    /// Longest wait for an answer; past it the connection is dropped and the same sequence sent again.
    pub redis_reply: Time,
}

impl Default for Limits {
    fn default() -> Self {
        Self { redis_connect: Time::secs(2), redis_reply: Time::secs(5) }
    }
}

/// The delete of a series, which every agent that has it repeats on its own side.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Deleted {
    /// The kind of the series.
    pub kind: Kind,
    /// Its key.
    pub key: SeriesKey,
    /// The number of the delete, rising within a partition: the store's time in milliseconds.
    pub number: u64,
}

/// What the journal had of a partition when a process opened it: the batches up to a sequence, the last of them made by
/// the process whose newest nonce was this. If that one still lives, the other has a copy of its journal.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Inherited {
    /// The newest nonce in the journal; empty for none.
    pub(super) maker: String,
    /// The sequence of the last batch.
    pub(super) last: u64,
}

impl Inherited {
    /// The reverse of its text; what is no such text is nothing inherited.
    fn read(text: &str) -> Self {
        let parts = text.split_once(' ').and_then(|(maker, last)| Some((maker, last.parse().ok()?)));
        parts.map_or_else(Self::default, |(maker, last)| Self { maker: maker.to_owned(), last })
    }
}

impl fmt::Display for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { maker, last } = self;
        write!(f, "{maker} {last}")
    }
}

/// What a script said to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claimed {
    /// The partition is ours.
    Ours {
        /// The sequence of the last batch that the store has of us.
        sequence: u64,
        /// The samples in all our batches up to that one.
        samples: u64,
        /// The number of the last delete that we are known to know.
        seen: u64,
        /// What else the answer carried.
        news: News,
    },
    /// Another process writes under our name, and inherited this.
    Clone(Inherited),
}

/// What a script said to a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Applied {
    /// The store has the batch: since now, or since an earlier try.
    Stored {
        /// The sequence of the last batch that the store has of us.
        sequence: u64,
        /// Which operations failed, by position, and why.
        failed: Vec<(usize, Failure)>,
        /// What else the answer carried.
        news: News,
    },
    /// The store has another sequence than that before the batch.
    Gap {
        /// The sequence of the last batch that the store has of us.
        sequence: u64,
        /// The samples in all our batches up to that one.
        samples: u64,
        /// What else the answer carried.
        news: News,
    },
    /// The partition is not ours, or not any more: claim it.
    NotOwner,
}

/// What a script said to a poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Polled {
    /// The sequence of the last batch that the store has of us.
    pub(super) sequence: u64,
    /// The samples in all our batches up to that one.
    pub(super) samples: u64,
    /// What else the answer carried.
    pub(super) news: News,
}

/// What every answer carries beside the matter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct News {
    /// The server's clock, in milliseconds since the epoch.
    pub(super) now_ms: u64,
    /// How many series the store has just let go.
    pub(super) expired: u64,
    /// Deletes since the last one that the agent knew, oldest first.
    pub(super) deletes: Vec<Deleted>,
}

/// Why one operation of a batch failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Failure {
    /// The key is there and no hash.
    WrongType,
    /// A field is no number.
    NotANumber,
    /// Something else.
    Other,
}

impl Failure {
    pub(super) const ALL: [Self; 3] = [Self::WrongType, Self::NotANumber, Self::Other];

    /// The `reason` in `tallyd_lost_total`.
    pub(super) const fn reason(self) -> &'static str {
        match self {
            Self::WrongType => "store_wrong_type",
            Self::NotANumber => "store_not_a_number",
            Self::Other => "store_refused",
        }
    }

    fn of(text: &str) -> Self {
        if text.starts_with("WRONGTYPE") {
            Self::WrongType
        } else if text.contains("not a float") || text.contains("not an integer") {
            Self::NotANumber
        } else {
            Self::Other
        }
    }
}

/// Who is asking: an agent, and how long the store keeps what it brings.
#[derive(Debug, Clone)]
pub(super) struct Asker {
    /// The agent's name in the store.
    pub(super) agent: String,
    /// The nonce of this connection.
    pub(super) owner: String,
    /// `limits.store_expire`.
    pub(super) expire: Time,
}

/// The names of keys.
#[derive(Debug, Clone)]
pub(super) struct Names {
    prefix: String,
}

impl Names {
    /// Names under a prefix.
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    fn of(&self, partition: Partition, what: &str) -> String {
        format!("{}:{{{partition:03}}}:{what}", self.prefix)
    }

    /// The three keys that claim, apply, poll and delete begin with.
    fn common(&self, partition: Partition) -> [String; 3] {
        [self.of(partition, "seq"), self.of(partition, "index"), self.of(partition, "del")]
    }

    fn series(&self, kind: Kind, key: &SeriesKey) -> String {
        self.of(partition(key), &format!("s:{}:{key}", kind.letter()))
    }
}

/// `<letter>:<key>`, as the index and the log of deletes have it.
fn series_of(member: &str) -> Option<(Kind, SeriesKey)> {
    let (letter, key) = member.split_once(':')?;
    Some((Kind::from_letter(letter)?, SeriesKey::from_canonical(key)))
}

/// A script, and what it does.
#[derive(Debug)]
struct Named {
    what: What,
    script: Script,
}

/// The call of a script, under way to the wire.
struct Call<'a> {
    named: &'a Named,
    command: Cmd,
    keys: usize,
}

impl<'a> Call<'a> {
    fn new<K: AsRef<str>>(named: &'a Named, keys: impl IntoIterator<Item = K, IntoIter: ExactSizeIterator>) -> Self {
        Self::sized(named, keys, 0, 256)
    }

    /// With room for so many arguments and bytes.
    fn sized<K: AsRef<str>>(
        named: &'a Named,
        keys: impl IntoIterator<Item = K, IntoIter: ExactSizeIterator>,
        arguments: usize,
        bytes: usize,
    ) -> Self {
        let keys = keys.into_iter();
        let count = keys.len();
        let mut command = Cmd::with_capacity(3 + count + arguments, bytes);
        command.arg("EVALSHA").arg(named.script.get_hash()).arg(count);
        keys.for_each(|key| {
            command.arg(key.as_ref());
        });
        Self { named, command, keys: count }
    }

    /// Its keys and then its arguments.
    fn words(&self) -> Option<Vec<&str>> {
        let text = |word| if let Arg::Simple(bytes) = word { std::str::from_utf8(bytes).ok() } else { None };
        self.command.args_iter().skip(3).map(text).collect()
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.command.arg(text);
        self
    }

    fn number(&mut self, number: u64) -> &mut Self {
        self.command.arg(number);
        self
    }
}

/// The elements of a script's answer, in order.
struct Answer<'a>(std::slice::Iter<'a, Value>);

impl<'a> Answer<'a> {
    fn new(value: &'a Value) -> Result<Self, Error> {
        match list(value) {
            Some(elements) => Ok(Self(elements.iter())),
            None => Err(Error::Foreign),
        }
    }

    fn text(&mut self) -> Result<&'a str, Error> {
        self.0.next().and_then(text).ok_or(Error::Foreign)
    }

    fn number(&mut self) -> Result<u64, Error> {
        self.0.next().and_then(number).ok_or(Error::Foreign)
    }

    fn list(&mut self) -> Result<&'a [Value], Error> {
        self.0.next().and_then(list).ok_or(Error::Foreign)
    }

    fn news(&mut self) -> Result<News, Error> {
        Ok(News { now_ms: self.number()?, expired: self.number()?, deletes: deleted(self.list()?) })
    }

    fn failures(&mut self) -> Result<Vec<(usize, Failure)>, Error> {
        let pair = |pair: &[Value]| Some((number(&pair[0])? as usize, Failure::of(text(&pair[1])?)));
        Ok(self.list()?.chunks_exact(2).filter_map(pair).collect())
    }
}

fn list(value: &Value) -> Option<&[Value]> {
    if let Value::Array(elements) = value { Some(elements) } else { None }
}

fn text(value: &Value) -> Option<&str> {
    if let Value::BulkString(bytes) = value { std::str::from_utf8(bytes).ok() } else { None }
}

fn number(value: &Value) -> Option<u64> {
    if let Value::Int(number) = value { u64::try_from(*number).ok() } else { text(value)?.parse().ok() }
}

/// Series and numbers in turn. What is no series of ours is left out: an agent can hold nothing under such a name.
fn deleted(elements: &[Value]) -> Vec<Deleted> {
    let pair = |pair: &[Value]| {
        let (kind, key) = series_of(text(&pair[0])?)?;
        Some(Deleted { kind, key, number: number(&pair[1])? })
    };
    elements.chunks_exact(2).filter_map(pair).collect()
}

/// The wait after so many failures in a row: 100 ms doubled each time up to 5 s, of which a random half is left out, so
/// that agents that lost the same server do not return as one.
pub(super) fn backoff(failures: u32, random: u32) -> Duration {
    let full = 100_u64.saturating_mul(1 << failures.min(6)).min(5_000);
    Duration::from_millis(full / 2 + full * u64::from(random) / (2 * u64::from(u32::MAX)))
}
