//! What the scripts do where a server forbids scripts (`EVAL` taken from the user, or renamed): the same keys and
//! arguments, the same answers, by WATCH, MULTI and EXEC.
//!
//! What decides is read after the reply to WATCH has come, and written by an EXEC that the server refuses when any of it
//! changed since: so a sequence is compared and a batch applied in one atomic unit here too. A transaction that was refused
//! is tried again with what is there now. Each has a connection to itself for its length; one that broke off, in the middle
//! or without an answer, is closed and never used again. Costs two more round trips than a script.

mod verbs;

use std::collections::HashMap;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Pipeline, RedisError, Value};
use tokio::sync::{Mutex, Semaphore};

use self::verbs::{Effect, Operation};
use super::{Call, Error, list, number, text};

/// Transactions under way at a time on one server, each with a connection.
const CONNECTIONS: usize = 8;

/// How often one is tried while others change what it reads; each time somebody else went on.
const TRIES: u32 = 64;

/// How long deletes are known, as in the scripts.
const DELETES_KEPT_MS: u64 = 24 * 3_600 * 1_000;

/// The scripts that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Claim,
    Apply,
    Poll,
    Delete,
    Read,
}

/// Connections to one server for transactions.
pub(super) struct Transactions {
    idle: Mutex<Vec<MultiplexedConnection>>,
    under_way: Semaphore,
}

impl Default for Transactions {
    fn default() -> Self {
        Self { idle: Mutex::default(), under_way: Semaphore::new(CONNECTIONS) }
    }
}

impl Transactions {
    /// Does what a script would do with these keys and arguments.
    pub(super) async fn run<F>(&self, call: &Call<'_>, open: impl FnOnce() -> F) -> Result<Value, Problem>
    where
        F: Future<Output = Result<MultiplexedConnection, Error>>,
    {
        let words = call.words().ok_or(Error::Foreign)?;
        let (keys, arguments) = words.split_at(call.keys);
        // It is never closed.
        let _permit = self.under_way.acquire().await.map_err(|_| Error::Dropped)?;
        let idle = self.idle.lock().await.pop();
        let wire = match idle {
            Some(wire) => wire,
            None => open().await?,
        };
        let mut transaction = Transaction { wire, keys, arguments };
        for attempt in 0..TRIES {
            // With an error the connection ends here, and what it watched with it.
            if let Some(answer) = transaction.attempt(call.named.what).await? {
                self.idle.lock().await.push(transaction.wire);
                return Ok(answer);
            }
            tokio::time::sleep(pause(attempt)).await;
        }
        Err(Problem::Ours(Error::Contended))
    }
}

/// Why a request was not done: by the server's word, which may say where to ask, or by ours.
#[derive(Debug)]
pub(super) enum Problem {
    Redis(RedisError),
    Ours(Error),
}

impl From<RedisError> for Problem {
    fn from(error: RedisError) -> Self {
        Self::Redis(error)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

/// A random wait of up to 1 ms doubled each time, at most 32 ms, so that those who met do not meet again.
fn pause(attempt: u32) -> Duration {
    let longest_us = 1_000_u64 << attempt.min(5);
    Duration::from_micros(longest_us * u64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / u64::from(u32::MAX))
}

/// One try after the other on one connection. An answer of `None` says that somebody changed what was read.
struct Transaction<'a> {
    wire: MultiplexedConnection,
    keys: &'a [&'a str],
    arguments: &'a [&'a str],
}

impl<'a> Transaction<'a> {
    async fn attempt(&mut self, what: What) -> Result<Option<Value>, Problem> {
        match what {
            What::Claim => self.claim().await,
            What::Apply => self.apply().await,
            What::Poll => self.poll().await,
            What::Delete => self.delete().await,
            What::Read => self.read().await,
        }
    }

    fn key(&self, at: usize) -> Result<&'a str, Error> {
        self.keys.get(at).copied().ok_or(Error::Foreign)
    }

    fn argument(&self, at: usize) -> Result<&'a str, Error> {
        self.arguments.get(at).copied().ok_or(Error::Foreign)
    }

    fn seq(&self) -> Result<&'a str, Error> {
        self.key(0)
    }

    fn owner_field(&self) -> Result<String, Error> {
        Ok(format!("{}:owner", self.argument(0)?))
    }

    fn seen_field(&self) -> Result<String, Error> {
        Ok(format!("{}:seen", self.argument(0)?))
    }

    fn samples_field(&self) -> Result<String, Error> {
        Ok(format!("{}:samples", self.argument(0)?))
    }

    /// Sends commands and answers their replies, of which each may be an error.
    async fn ask(&mut self, pipe: &Pipeline) -> Result<Vec<Value>, Problem> {
        Ok(self.wire.send_packed_commands(pipe, 0, pipe.len()).await?)
    }

    /// Watches keys. Nothing is read before the reply is here.
    async fn watch(&mut self, keys: &[&str]) -> Result<(), Problem> {
        Ok(redis::cmd("WATCH").arg(keys).exec_async(&mut self.wire).await?)
    }

    async fn unwatch(&mut self) -> Result<(), Problem> {
        Ok(redis::cmd("UNWATCH").exec_async(&mut self.wire).await?)
    }

    /// Does what was collected, all of it or, when something watched has changed, nothing.
    async fn execute(&mut self, writes: &Pipeline) -> Result<Option<Vec<Value>>, Problem> {
        let mut pipe = Pipeline::new();
        pipe.cmd("MULTI");
        for command in writes.cmd_iter() {
            pipe.add_command(command.clone());
        }
        pipe.cmd("EXEC");
        let mut replies = self.ask(&pipe).await?;
        match replies.pop() {
            Some(Value::Array(results)) => Ok(Some(results)),
            Some(Value::Nil) => Ok(None),
            // A command that the server would not take, and so took none of them.
            Some(refused) => {
                let error = replies.into_iter().find_map(error_of).or_else(|| error_of(refused));
                Err(error.map_or(Problem::Ours(Error::Foreign), Problem::Redis))
            }
            None => Err(Error::Foreign.into()),
        }
    }

    async fn claim(&mut self) -> Result<Option<Value>, Problem> {
        let (seq, agent, nonce) = (self.seq()?, self.argument(0)?, self.argument(1)?);
        let (owner_field, seen_field) = (self.owner_field()?, self.seen_field()?);
        self.watch(&[seq]).await?;
        let mut reads = Pipeline::new();
        let samples_field = self.samples_field()?;
        let inherited_field = format!("{agent}:inherited");
        let asked = [agent, &owner_field, &seen_field, "deletes", &samples_field, &inherited_field];
        reads.cmd("HMGET").arg(seq).arg(&asked).cmd("TIME");
        let mut replies = Replies::new(self.ask(&reads).await?)?;
        let (stored, now_ms) = (replies.texts()?, replies.time()?);
        let [sequence, owner, stored_seen, deletes, samples, inherited] = &stored[..] else {
            return Err(Error::Foreign.into());
        };
        let is_ours = |owner: &String| owner == nonce || self.arguments[5..].contains(&owner.as_str());
        if nonce.is_empty() || !owner.as_ref().is_none_or(is_ours) {
            self.unwatch().await?;
            return Ok(Some(Value::Array(vec![bulk("clone"), bulk(inherited.as_deref().unwrap_or_default())])));
        }
        let told = Some(self.argument(3)?).filter(|seen| !seen.is_empty()).map(str::to_owned);
        let seen = told.or_else(|| stored_seen.clone()).or_else(|| deletes.clone()).unwrap_or_else(zero);
        let mut writes = Pipeline::new();
        writes.cmd("HSET").arg(seq).arg(&owner_field).arg(nonce).arg(&inherited_field).arg(self.argument(4)?);
        self.note_seen(&mut writes, stored_seen.as_deref(), &seen)?;
        self.hear(&mut writes, now_ms, self.argument(2)?, &seen)?;
        let Some(results) = self.execute(&writes).await? else { return Ok(None) };
        let mut answer = vec![bulk("claimed"), bulk(sequence.as_deref().unwrap_or("0")), bulk(&seen)];
        answer.extend(heard(now_ms, results));
        answer.push(bulk(samples.as_deref().unwrap_or("0")));
        Ok(Some(Value::Array(answer)))
    }

    async fn poll(&mut self) -> Result<Option<Value>, Problem> {
        let (seq, agent, seen, seen_field) = (self.seq()?, self.argument(0)?, self.argument(1)?, self.seen_field()?);
        let mut reads = Pipeline::new();
        reads.cmd("HMGET").arg(seq).arg(&[agent, &seen_field, &self.samples_field()?]).cmd("TIME");
        let mut replies = Replies::new(self.ask(&reads).await?)?;
        let (stored, now_ms) = (replies.texts()?, replies.time()?);
        let [sequence, stored_seen, samples] = &stored[..] else { return Err(Error::Foreign.into()) };
        let mut writes = Pipeline::new();
        self.note_seen(&mut writes, stored_seen.as_deref(), seen)?;
        self.hear(&mut writes, now_ms, self.argument(2)?, seen)?;
        let Some(results) = self.execute(&writes).await? else { return Ok(None) };
        let mut answer = [sequence, samples].map(|number| bulk(number.as_deref().unwrap_or("0"))).to_vec();
        answer.extend(heard(now_ms, results));
        Ok(Some(Value::Array(answer)))
    }

    async fn delete(&mut self) -> Result<Option<Value>, Problem> {
        let (seq, index, del) = (self.seq()?, self.key(1)?, self.key(2)?);
        let hashes = &self.keys[3..];
        let watched: Vec<_> = std::iter::once(seq).chain(hashes.iter().copied()).collect();
        self.watch(&watched).await?;
        let mut reads = Pipeline::new();
        reads.cmd("HMGET").arg(seq).arg("deletes").cmd("TIME");
        hashes.iter().for_each(|hash| {
            reads.cmd("EXISTS").arg(hash);
        });
        let mut replies = Replies::new(self.ask(&reads).await?)?;
        let (last, now_ms) = (replies.texts()?, replies.time()?);
        let last = last.first().and_then(Option::as_deref).and_then(|last| last.parse().ok()).unwrap_or(0);
        let mut deleted = now_ms.saturating_sub(1).max(last);
        let mut writes = Pipeline::new();
        let mut answer = Vec::new();
        for hash in hashes {
            if replies.next()? == Value::Int(1) {
                let series = series_of_hash(seq, hash);
                deleted += 1;
                writes.cmd("UNLINK").arg(hash).cmd("ZREM").arg(index).arg(series);
                writes.cmd("ZADD").arg(del).arg(deleted).arg(series);
                answer.extend([bulk(series), bulk(&deleted.to_string())]);
            }
        }
        if answer.is_empty() {
            self.unwatch().await?;
            return Ok(Some(Value::Array(answer)));
        }
        writes.cmd("HSET").arg(seq).arg("deletes").arg(deleted);
        Ok(self.execute(&writes).await?.map(|_| Value::Array(answer)))
    }

    async fn read(&mut self) -> Result<Option<Value>, Problem> {
        let mut reads = Pipeline::new();
        reads.cmd("HGET").arg(self.seq()?).arg(self.argument(0)?);
        for hash in &self.keys[1..] {
            reads.cmd("HGETALL").arg(hash);
        }
        let Some(mut answer) = self.execute(&reads).await? else { return Ok(None) };
        if let Some(sequence @ Value::Nil) = answer.first_mut() {
            *sequence = bulk("0");
        }
        // An error is what the script makes of it: its text.
        let plain = |value| if let Value::ServerError(error) = value { bulk(&told(&error)) } else { value };
        Ok(Some(Value::Array(answer.into_iter().map(plain).collect())))
    }

    async fn apply(&mut self) -> Result<Option<Value>, Problem> {
        let operations = self.operations()?;
        let watched: Vec<_> = std::iter::once(self.seq()?).chain(self.keys[3..].iter().copied()).collect();
        self.watch(&watched).await?;
        let mut replies = Replies::new(self.ask(&self.reads(&operations)?).await?)?;
        let (stored, now_ms) = (replies.texts()?, replies.time()?);
        let [at_sequence, owner, stored_seen, samples] = &stored[..] else { return Err(Error::Foreign.into()) };
        if owner.as_deref() != Some(self.argument(1)?) {
            self.unwatch().await?;
            return Ok(Some(Value::Array(vec![bulk("owner")])));
        }
        let sequence = self.argument(2)?;
        let at_sequence = at_sequence.clone().unwrap_or_else(zero);
        let verdict = verdict(&at_sequence, sequence, self.argument(3)?)?;
        let mut work = Work::default();
        if verdict == "applied" {
            work.writes.cmd("HSET").arg(self.seq()?).arg(self.argument(0)?).arg(sequence);
            work.writes.cmd("HINCRBY").arg(self.seq()?).arg(self.samples_field()?).arg(self.argument(6)?);
            self.collect(&mut work, operations, replies, now_ms)?;
        }
        let seen = self.argument(4)?;
        self.note_seen(&mut work.writes, stored_seen.as_deref(), seen)?;
        self.hear(&mut work.writes, now_ms, self.argument(5)?, seen)?;
        let Some(results) = self.execute(&work.writes).await? else { return Ok(None) };
        work.look_for_errors(&results);
        let at_sequence = if verdict == "applied" { sequence } else { &at_sequence };
        let mut answer = vec![bulk(verdict), bulk(at_sequence), bulk(samples.as_deref().unwrap_or("0"))];
        answer.extend(heard(now_ms, results));
        let failed = work.failed.into_iter().flat_map(|(at, why)| [bulk(&at.to_string()), bulk(&why)]);
        answer.push(Value::Array(failed.collect()));
        Ok(Some(Value::Array(answer)))
    }

    /// The operations of the batch, in the order of their hashes.
    fn operations(&self) -> Result<Vec<Result<Operation<'a>, String>>, Error> {
        let mut rest = self.arguments.get(7..).ok_or(Error::Foreign)?;
        let mut operations = Vec::with_capacity(self.keys.len());
        while let [count, words @ ..] = rest {
            let count = count.parse().map_err(|_| Error::Foreign)?;
            let (words, behind) = words.split_at_checked(count).ok_or(Error::Foreign)?;
            operations.push(Operation::read(words));
            rest = behind;
        }
        if operations.len() == self.keys.len().saturating_sub(3) { Ok(operations) } else { Err(Error::Foreign) }
    }

    fn reads(&self, operations: &[Result<Operation<'_>, String>]) -> Result<Pipeline, Error> {
        let mut reads = Pipeline::new();
        let agent = [self.argument(0)?.to_owned(), self.owner_field()?, self.seen_field()?, self.samples_field()?];
        reads.cmd("HMGET").arg(self.seq()?).arg(&agent).cmd("TIME");
        for (hash, operation) in self.keys[3..].iter().zip(operations) {
            if let Ok(operation) = operation {
                reads.cmd("HMGET").arg(hash).arg(operation.fields());
            }
        }
        Ok(reads)
    }

    /// Collects what the operations write, from what their hashes hold.
    fn collect(
        &self,
        work: &mut Work,
        operations: Vec<Result<Operation<'_>, String>>,
        mut replies: Replies,
        now_ms: u64,
    ) -> Result<(), Error> {
        let (seq, index, agent, expire_ms) = (self.seq()?, self.key(1)?, self.argument(0)?, self.argument(5)?);
        let mut touched = Vec::new();
        for (at, (hash, operation)) in self.keys[3..].iter().zip(operations).enumerate() {
            let effects = match operation {
                Ok(operation) => match fields(operation.fields(), &replies.next()?)? {
                    Ok(fields) => operation.effects(agent, fields),
                    Err(refusal) => Err(refusal),
                },
                Err(refusal) => Err(refusal),
            };
            match effects {
                Ok(effects) => {
                    work.operate(at, hash, &effects, expire_ms);
                    touched.push((now_ms, series_of_hash(seq, hash)));
                }
                Err(refusal) => work.failed.push((at, refusal)),
            }
        }
        if !touched.is_empty() {
            work.writes.cmd("ZADD").arg(index).arg(&touched);
        }
        Ok(())
    }

    /// Notes how far the agent knows the deletes.
    fn note_seen(&self, writes: &mut Pipeline, before: Option<&str>, seen: &str) -> Result<(), Error> {
        if before != Some(seen) {
            writes.cmd("HSET").arg(self.seq()?).arg(self.seen_field()?).arg(seen);
        }
        Ok(())
    }

    /// Drops what is past its time, and asks for the deletes since number `seen`: the last three results.
    fn hear(&self, writes: &mut Pipeline, now_ms: u64, expire_ms: &str, seen: &str) -> Result<(), Error> {
        let (index, del) = (self.key(1)?, self.key(2)?);
        let expire_ms: u64 = expire_ms.parse().map_err(|_| Error::Foreign)?;
        let trim = |writes: &mut Pipeline, key, kept_ms| {
            writes.cmd("ZREMRANGEBYSCORE").arg(key).arg("-inf").arg(now_ms.saturating_sub(kept_ms));
        };
        trim(writes, del, DELETES_KEPT_MS);
        trim(writes, index, expire_ms);
        let since = writes.cmd("ZRANGEBYSCORE").arg(del).arg(format!("({seen}")).arg("+inf").arg("WITHSCORES");
        since.arg("LIMIT").arg(0).arg(500);
        Ok(())
    }
}

/// What a batch writes, and which of its operations failed.
#[derive(Default)]
struct Work {
    writes: Pipeline,
    /// Of each operation its place in the batch and where its commands begin and end.
    commands: Vec<(usize, usize, usize)>,
    failed: Vec<(usize, String)>,
}

impl Work {
    fn operate(&mut self, at: usize, hash: &str, effects: &[Effect], expire_ms: &str) {
        let first = self.writes.len();
        effects.iter().for_each(|effect| effect.add_to(&mut self.writes, hash));
        self.writes.cmd("PEXPIRE").arg(hash).arg(expire_ms);
        self.commands.push((at, first, self.writes.len()));
    }

    /// All that can fail was looked at before; what fails all the same is told, not hidden.
    fn look_for_errors(&mut self, results: &[Value]) {
        for (at, first, end) in &self.commands {
            let error = results[*first..*end].iter().find_map(server_error);
            self.failed.extend(error.map(|error| (*at, error)));
        }
    }
}

fn verdict(stored: &str, sequence: &str, before: &str) -> Result<&'static str, Error> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| Error::Foreign);
    if number(stored)? >= number(sequence)? {
        Ok("already")
    } else if stored == before {
        Ok("applied")
    } else {
        Ok("gap")
    }
}

/// Replies in their order.
struct Replies(std::vec::IntoIter<Value>);

impl Replies {
    /// The first reply is that to HMGET of the sequences: an error there is one of the whole.
    fn new(replies: Vec<Value>) -> Result<Self, Problem> {
        match replies.first().cloned().and_then(error_of) {
            Some(error) => Err(error.into()),
            None => Ok(Self(replies.into_iter())),
        }
    }

    fn next(&mut self) -> Result<Value, Error> {
        self.0.next().ok_or(Error::Foreign)
    }

    fn texts(&mut self) -> Result<Vec<Option<String>>, Error> {
        let reply = self.next()?;
        let values = list(&reply).ok_or(Error::Foreign)?;
        Ok(values.iter().map(|value| text(value).map(str::to_owned)).collect())
    }

    /// The server's clock in milliseconds.
    fn time(&mut self) -> Result<u64, Error> {
        let reply = self.next()?;
        let Some([seconds, micros]) = list(&reply) else { return Err(Error::Foreign) };
        let (seconds, micros) = (number(seconds).ok_or(Error::Foreign)?, number(micros).ok_or(Error::Foreign)?);
        Ok(seconds * 1_000 + micros / 1_000)
    }
}

/// The fields that were read, by name; the inner error is the server's about this hash alone.
fn fields(names: Vec<String>, reply: &Value) -> Result<Result<HashMap<String, String>, String>, Error> {
    if let Some(error) = server_error(reply) {
        return Ok(Err(error));
    }
    let values = list(reply).ok_or(Error::Foreign)?;
    let pairs = names.into_iter().zip(values);
    Ok(Ok(pairs.filter_map(|(name, value)| Some((name, text(value)?.to_owned()))).collect()))
}

/// Time, series expired and deletes, from the last results of a transaction. An index or a log of deletes that somebody
/// spoilt must hold up no batch.
fn heard(now_ms: u64, mut results: Vec<Value>) -> [Value; 3] {
    let deletes = results.pop().filter(|reply| list(reply).is_some()).unwrap_or(Value::Array(Vec::new()));
    let expired = results.pop().filter(|reply| number(reply).is_some()).unwrap_or(Value::Int(0));
    [bulk(&now_ms.to_string()), expired, deletes]
}

/// `prefix:{017}:seq` is as long as what stands before the series in `prefix:{017}:s:<series>`, less one.
fn series_of_hash<'a>(seq: &str, hash: &'a str) -> &'a str {
    hash.get(seq.len() - 1..).unwrap_or_default()
}

fn error_of(reply: Value) -> Option<RedisError> {
    reply.extract_error().err()
}

fn server_error(reply: &Value) -> Option<String> {
    if let Value::ServerError(error) = reply { Some(told(error)) } else { None }
}

/// An error of the server as it is told on the wire.
fn told(error: &redis::ServerError) -> String {
    format!("{} {}", error.code(), error.details().unwrap_or_default())
}

fn bulk(text: &str) -> Value {
    Value::BulkString(text.as_bytes().to_vec())
}

fn zero() -> String {
    "0".to_owned()
}
