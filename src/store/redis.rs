//! Redis as the place that many agents share: the layout, the scripts and the connection to it.
//!
//! Every write is a script that compares a sequence and applies a batch in one atomic unit, so a batch counts once,
//! however often it is sent. Where the server forbids scripts, `transaction` does the same. Every key of a script stands
//! in one partition, whose number in braces is the hash tag that keeps them on one node of a cluster. Needs Redis 5 or
//! later, or Valkey. Here nothing retries and nothing waits longer than `limits.redis_connect` and `limits.redis_reply`;
//! `ship` does the one, its caller the other.
//!
//! # Layout
//!
//! With the default prefix, of partition 17 (XXH3 of the series key, seed 0, its low 8 bits):
//!
//! | key | type | holds |
//! |---|---|---|
//! | `tallyd:{017}:s:<letter>:<key>` | hash | one series; expires `limits.store_expire` after its last update |
//! | `tallyd:{017}:seq` | hash | for each agent `<agent>`: sequence of its last batch, `<agent>:samples`: samples in all of them, `<agent>:owner`: nonce of the process that may write it, `<agent>:seen`: the last delete it knows; `deletes`: number of the last delete |
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

mod durability;
mod encode;
mod fields;
mod read;
#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;
mod transaction;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Arg, AsyncConnectionConfig, Client, Cmd, ErrorKind, Script, ServerErrorKind, Value};
use serde::{Deserialize, Serialize};

pub(super) use durability::Durability;
pub use read::{Cursor, Page, RedisReader, Stored};
use transaction::{Transactions, What};

use super::{Batch, Partition, partition};
use crate::sample::{Kind, SeriesKey};
use crate::units::{Time, without_password};

/// `[store.redis]`
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://[user][:password@]host[:port][/database]`.
    pub url: String,
    /// What every key begins with.
    pub prefix: String,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = without_password(&self.url);
        f.debug_struct("Config").field("url", &url).field("prefix", &self.prefix).finish()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self { url: "redis://127.0.0.1:6379".to_owned(), prefix: "tallyd".to_owned() }
    }
}

impl Config {
    /// Whether it can be used.
    ///
    /// # Errors
    /// [`Error::Url`] or [`Error::Prefix`].
    pub fn check(&self) -> Result<(), Error> {
        Client::open(self.url.as_str()).map_err(|_| Error::Url)?;
        if self.prefix.contains(['{', '}']) { Err(Error::Prefix) } else { Ok(()) }
    }
}

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

/// Why the store did not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Error {
    /// `store.redis.url` is none.
    Url,
    /// A brace in `store.redis.prefix`.
    Prefix,
    /// Nobody answers there.
    Connect,
    /// The server refused user or password, or forbids a command.
    Denied,
    /// The connection ended.
    Dropped,
    /// No answer within `limits.redis_reply`.
    Timeout,
    /// The server is out of memory and may evict nothing.
    OutOfMemory,
    /// The server takes no writes now: a replica, or one that cannot save.
    ReadOnly,
    /// The server is loading its data.
    Loading,
    /// The server answered with another error.
    Refused,
    /// Others changed what a transaction reads, again and again.
    Contended,
    /// An answer, or a key in the store, that is not of our making.
    Foreign,
}

impl Error {
    /// All that may come while an agent runs; the other two are told at its start.
    pub(super) const RUNNING: [Self; 10] = [
        Self::Connect,
        Self::Denied,
        Self::Dropped,
        Self::Timeout,
        Self::OutOfMemory,
        Self::ReadOnly,
        Self::Loading,
        Self::Refused,
        Self::Contended,
        Self::Foreign,
    ];

    /// The `reason` in `tallyd_store_errors_total`.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Url => "url",
            Self::Prefix => "prefix",
            Self::Connect => "connect",
            Self::Denied => "denied",
            Self::Dropped => "dropped",
            Self::Timeout => "timeout",
            Self::OutOfMemory => "out_of_memory",
            Self::ReadOnly => "read_only",
            Self::Loading => "loading",
            Self::Refused => "refused",
            Self::Contended => "contended",
            Self::Foreign => "foreign",
        }
    }
}

impl Error {
    /// Whether the connection is of no more use: it ended, or an answer that comes late would be taken for another's.
    pub(super) const fn ends_connection(self) -> bool {
        match self {
            Self::Url | Self::Prefix | Self::Connect | Self::Denied | Self::Dropped | Self::Timeout => true,
            Self::ReadOnly | Self::Loading => true,
            Self::OutOfMemory | Self::Refused | Self::Contended | Self::Foreign => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Url => "store.redis.url is no address of a Redis; write one such as \"redis://127.0.0.1:6379\"",
            Self::Prefix => "store.redis.prefix has a brace, which would be the hash tag; leave it out",
            Self::Connect => "no Redis answers at store.redis.url; start it, or correct the address",
            Self::Denied => "Redis refuses the user, the password or a command; correct store.redis.url or its ACL",
            Self::Dropped => "the connection to Redis ended",
            Self::Timeout => "Redis did not answer within limits.redis_reply",
            Self::OutOfMemory => "Redis is at its maxmemory; raise it",
            Self::ReadOnly => "Redis takes no writes: it is a replica, or cannot save its data",
            Self::Loading => "Redis is loading its data",
            Self::Refused => "Redis answered with an error",
            Self::Contended => "Redis is changed by others faster than a transaction can follow",
            Self::Foreign => "Redis holds something at our keys that tallyd did not write",
        })
    }
}

impl std::error::Error for Error {}

impl From<&redis::RedisError> for Error {
    fn from(error: &redis::RedisError) -> Self {
        match error.code() {
            Some("OOM") => return Self::OutOfMemory,
            Some("READONLY" | "MISCONF" | "NOREPLICAS") => return Self::ReadOnly,
            Some("LOADING" | "MASTERDOWN") => return Self::Loading,
            Some("NOAUTH" | "WRONGPASS" | "NOPERM") => return Self::Denied,
            Some(_) | None => {}
        }
        if error.is_timeout() {
            Self::Timeout
        } else if error.is_connection_refusal() {
            Self::Connect
        } else if error.kind() == ErrorKind::AuthenticationFailed {
            Self::Denied
        } else if error.is_io_error() || error.is_connection_dropped() {
            Self::Dropped
        } else {
            Self::Refused
        }
    }
}

impl From<redis::RedisError> for Error {
    fn from(error: redis::RedisError) -> Self {
        Self::from(&error)
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
    /// Another process writes under our name.
    Clone,
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

/// The scripts, ready to be called by their digest.
#[derive(Debug)]
struct Scripts {
    claim: Named,
    apply: Named,
    poll: Named,
    delete: Named,
    read: Named,
}

impl Default for Scripts {
    fn default() -> Self {
        const COMMON: &str = include_str!("redis/common.lua");
        let with_common = |what, script: &str| Named { what, script: Script::new(&format!("{COMMON}\n{script}")) };
        Self {
            claim: with_common(What::Claim, include_str!("redis/claim.lua")),
            apply: with_common(What::Apply, include_str!("redis/apply.lua")),
            poll: with_common(What::Poll, include_str!("redis/poll.lua")),
            delete: with_common(What::Delete, include_str!("redis/delete.lua")),
            read: Named { what: What::Read, script: Script::new(include_str!("redis/read.lua")) },
        }
    }
}

/// A connection on which many requests may be in flight; clones share it.
#[derive(Clone)]
pub(super) struct Connection {
    wire: MultiplexedConnection,
    scripts: Arc<Scripts>,
    /// Instead of the scripts, where the server forbids them.
    transactions: Option<Arc<Transactions>>,
    names: Names,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects and loads the scripts, or finds out that the server forbids them.
    pub(super) async fn open(config: &Config, limits: &Limits) -> Result<Self, Error> {
        let wire = wire(config, limits).await?;
        let names = Names::new(&config.prefix);
        let mut connection = Self { wire, scripts: Arc::default(), transactions: None, names };
        if connection.are_scripts_forbidden().await? {
            tracing::info!("the store forbids scripts; batches are applied by WATCH and MULTI");
            connection.transactions = Some(Arc::new(Transactions::new(config, limits)));
        }
        Ok(connection)
    }

    /// Loads the scripts and tries one. Another server, or another user, may well allow them.
    async fn are_scripts_forbidden(&self) -> Result<bool, Error> {
        let scripts = Arc::clone(&self.scripts);
        let load = async {
            let mut wire = self.wire.clone();
            for named in [&scripts.claim, &scripts.apply, &scripts.poll, &scripts.delete, &scripts.read] {
                named.script.load_async(&mut wire).await?;
            }
            let mut call = Call::new(&scripts.read, [self.names.of(0, "seq")]);
            call.text("");
            wire.send_packed_command(&call.command).await.and_then(Value::extract_error)
        };
        match load.await {
            Ok(_) => Ok(false),
            Err(error) if is_forbidden(&error) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the asker the owner of its sequence of a partition, where the present owner is nobody or among `known`.
    pub(super) async fn claim(
        &self,
        asker: &Asker,
        partition: Partition,
        seen: Option<u64>,
        known: &[String],
    ) -> Result<Claimed, Error> {
        let mut call = Call::new(&self.scripts.claim, self.names.common(partition));
        call.text(&asker.agent).text(&asker.owner).number(asker.expire.as_millis());
        call.text(&seen.map_or(String::new(), |seen| seen.to_string()));
        known.iter().for_each(|nonce| {
            call.text(nonce);
        });
        let answer = self.call(call).await?;
        let mut answer = Answer::new(&answer)?;
        match answer.text()? {
            "clone" => Ok(Claimed::Clone),
            "claimed" => {
                let (sequence, seen, news) = (answer.number()?, answer.number()?, answer.news()?);
                Ok(Claimed::Ours { sequence, samples: answer.number()?, seen, news })
            }
            _ => Err(Error::Foreign),
        }
    }

    /// Applies a batch to a store that has `before` as our last sequence.
    pub(super) async fn apply(&self, asker: &Asker, batch: &Batch, before: u64, seen: u64) -> Result<Applied, Error> {
        let call = encode::apply(&self.scripts.apply, &self.names, asker, batch, before, seen);
        let answer = self.call(call).await?;
        let mut answer = Answer::new(&answer)?;
        match answer.text()? {
            "owner" => Ok(Applied::NotOwner),
            "gap" => Ok(Applied::Gap { sequence: answer.number()?, samples: answer.number()?, news: answer.news()? }),
            "applied" | "already" => {
                let (sequence, _) = (answer.number()?, answer.number()?);
                Ok(Applied::Stored { sequence, news: answer.news()?, failed: answer.failures()? })
            }
            _ => Err(Error::Foreign),
        }
    }

    /// Asks for the deletes since number `seen`.
    pub(super) async fn poll(&self, asker: &Asker, partition: Partition, seen: u64) -> Result<News, Error> {
        let mut call = Call::new(&self.scripts.poll, self.names.common(partition));
        call.text(&asker.agent).number(seen).number(asker.expire.as_millis());
        let answer = self.call(call).await?;
        Answer::new(&answer)?.news()
    }

    /// What the server says about itself, line by line.
    pub(super) async fn info(&self) -> Result<String, Error> {
        Ok(redis::cmd("INFO").query_async(&mut self.wire.clone()).await?)
    }

    /// A parameter of the server; `None` where it does not tell.
    pub(super) async fn parameter(&self, name: &str) -> Result<Option<String>, Error> {
        let answer = redis::cmd("CONFIG").arg("GET").arg(name).query_async::<Vec<String>>(&mut self.wire.clone()).await;
        match answer {
            Ok(pair) => Ok(pair.into_iter().nth(1)),
            Err(error) if error.is_io_error() || error.is_timeout() => Err(error.into()),
            Err(_) => Ok(None),
        }
    }

    /// Calls a script, loading it again where the server has forgotten it (`SCRIPT FLUSH`).
    async fn call(&self, call: Call<'_>) -> Result<Value, Error> {
        if let Some(transactions) = &self.transactions {
            let words = call.words().ok_or(Error::Foreign)?;
            let (keys, arguments) = words.split_at(call.keys);
            return transactions.run(call.named.what, keys, arguments).await;
        }
        let mut wire = self.wire.clone();
        let mut answer = wire.send_packed_command(&call.command).await.and_then(Value::extract_error);
        if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)) {
            call.named.script.load_async(&mut wire).await?;
            answer = wire.send_packed_command(&call.command).await.and_then(Value::extract_error);
        }
        Ok(answer?)
    }
}

/// Connects.
async fn wire(config: &Config, limits: &Limits) -> Result<MultiplexedConnection, Error> {
    let client = Client::open(config.url.as_str()).map_err(|_| Error::Url)?;
    let settings = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limits.redis_connect.0))
        .set_response_timeout(Some(limits.redis_reply.0))
        .set_pipeline_buffer_size(64)
        .set_write_backpressure_boundary(256 << 10);
    client.get_multiplexed_async_connection_with_config(&settings).await.map_err(|error| {
        let error = Error::from(&error);
        if matches!(error, Error::Dropped | Error::Timeout) { Error::Connect } else { error }
    })
}

/// Whether the server has a command but not for this user, or does not have it.
fn is_forbidden(error: &redis::RedisError) -> bool {
    error.code() == Some("NOPERM") || error.detail().is_some_and(|detail| detail.starts_with("unknown command"))
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
