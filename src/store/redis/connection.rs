//! The store as the rest of the agent asks it: by partition. Which server that is, whether it has moved, and whether it
//! knows the scripts is found out here.
//!
//! Every request concerns the keys of one partition, which share a hash tag. A server that says that it did not do it
//! (`MOVED`, `ASK`, `NOSCRIPT`) is followed or helped at once; any other error goes to the caller, who may ask again:
//! what the scripts write they write after comparing a sequence, so that nothing counts twice.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, ErrorKind, Pipeline, RedisError, Script, ServerErrorKind, Value};

use super::deployment::{Deployment, Mode};
use super::node::{Node, Opener, Wire};
use super::read::Stored;
use super::route::Route;
use super::transaction::{Problem, What};
use super::{
    Answer, Applied, Asker, Call, Claimed, Config, Deleted, Error, Inherited, Limits, Named, Names, Polled, Stable,
    deleted, encode, fields, list, number,
};
use crate::sample::{Kind, SeriesKey};
use crate::store::{Batch, Partition, partition};

/// How often a request follows a partition, or loads the scripts, before it is given up.
const REDIRECTS: usize = 6;

/// The longest that a WAIT waits. What no replica has by then is asked for again.
const WAIT: Duration = Duration::from_secs(1);

/// Series of one partition, each with its place in the question.
pub(super) type Placed<T> = Vec<(usize, T)>;

/// The scripts, ready to be called by their digest.
#[derive(Debug)]
struct Scripts {
    claim: Named,
    apply: Named,
    poll: Named,
    delete: Named,
    read: Named,
    /// What loads them all.
    load: Pipeline,
}

impl Default for Scripts {
    fn default() -> Self {
        const COMMON: &str = include_str!("common.lua");
        let mut load = Pipeline::new();
        let mut script = |what, text: &str| {
            load.cmd("SCRIPT").arg("LOAD").arg(text);
            Named { what, script: Script::new(text) }
        };
        let claim = script(What::Claim, &format!("{COMMON}\n{}", include_str!("claim.lua")));
        let apply = script(What::Apply, &format!("{COMMON}\n{}", include_str!("apply.lua")));
        let poll = script(What::Poll, &format!("{COMMON}\n{}", include_str!("poll.lua")));
        let delete = script(What::Delete, &format!("{COMMON}\n{}", include_str!("delete.lua")));
        let read = script(What::Read, include_str!("read.lua"));
        // Who may load a script may perhaps not call it.
        load.cmd("EVALSHA").arg(read.script.get_hash()).arg(0);
        Self { claim, apply, poll, delete, read, load }
    }
}

/// The store, for requests by partition; clones share the connections to its servers.
#[derive(Clone)]
pub(in crate::store) struct Connection {
    route: Arc<Route>,
    scripts: Arc<Scripts>,
    names: Names,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Connection {
    /// A store that is connected to when it is first asked. For so long after a failure a server is not asked again.
    ///
    /// # Errors
    /// When the configuration can't be used.
    pub(in crate::store) fn new(config: &Config, limits: &Limits, patience: Duration) -> Result<Self, Error> {
        let scripts = Scripts::default();
        let opener = Opener::new(Deployment::new(config)?, limits, patience, scripts.load.clone());
        Ok(Self { route: Arc::new(Route::new(opener)), scripts: Arc::new(scripts), names: Names::new(&config.prefix) })
    }

    /// Makes the asker the owner of its sequence of a partition, where the present owner is nobody or among `known`. What
    /// the asker inherited is told to whoever is refused later.
    pub(in crate::store) async fn claim(
        &self,
        asker: &Asker,
        partition: Partition,
        seen: Option<u64>,
        known: &[String],
        inherited: &Inherited,
    ) -> Result<Claimed, Error> {
        let mut call = Call::new(&self.scripts.claim, self.names.common(partition));
        call.text(&asker.agent).text(&asker.owner).number(asker.expire.as_millis());
        call.text(&seen.map_or(String::new(), |seen| seen.to_string())).text(&inherited.to_string());
        known.iter().for_each(|nonce| {
            call.text(nonce);
        });
        let answer = self.call(partition, &call).await?;
        let mut answer = Answer::new(&answer)?;
        match answer.text()? {
            "clone" => Ok(Claimed::Clone(Inherited::read(answer.text()?))),
            "claimed" => {
                let (sequence, seen, news) = (answer.number()?, answer.number()?, answer.news()?);
                Ok(Claimed::Ours { sequence, samples: answer.number()?, seen, news })
            }
            _ => Err(Error::Foreign),
        }
    }

    /// What the present owner of an agent's sequence inherited, without a claim.
    pub(in crate::store) async fn inherited(&self, agent: &str, partition: Partition) -> Result<Inherited, Error> {
        let mut call = Call::new(&self.scripts.claim, self.names.common(partition));
        call.text(agent).text("").number(0).text("").text("");
        let answer = self.call(partition, &call).await?;
        let mut answer = Answer::new(&answer)?;
        match answer.text()? {
            "clone" => Ok(Inherited::read(answer.text()?)),
            _ => Err(Error::Foreign),
        }
    }

    /// Applies a batch to a store that has `before` as our last sequence.
    pub(in crate::store) async fn apply(
        &self,
        asker: &Asker,
        batch: &Batch,
        before: u64,
        seen: u64,
    ) -> Result<Applied, Error> {
        let call = encode::apply(&self.scripts.apply, &self.names, asker, batch, before, seen);
        let answer = self.call(batch.partition, &call).await?;
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

    /// Asks for the deletes since number `seen`, and for our sequence.
    pub(in crate::store) async fn poll(&self, asker: &Asker, partition: Partition, seen: u64) -> Result<Polled, Error> {
        let mut call = Call::new(&self.scripts.poll, self.names.common(partition));
        call.text(&asker.agent).number(seen).number(asker.expire.as_millis());
        let answer = self.call(partition, &call).await?;
        let mut answer = Answer::new(&answer)?;
        Ok(Polled { sequence: answer.number()?, samples: answer.number()?, news: answer.news()? })
    }

    /// Removes a key's series of these kinds. Answers those that were there.
    pub(super) async fn delete(&self, key: &SeriesKey, kinds: &[Kind]) -> Result<Vec<Deleted>, Error> {
        let partition = partition(key);
        let series = kinds.iter().map(|kind| self.names.series(*kind, key));
        let keys: Vec<_> = self.names.common(partition).into_iter().chain(series).collect();
        let answer = self.call(partition, &Call::new(&self.scripts.delete, keys)).await?;
        list(&answer).map(deleted).ok_or(Error::Foreign)
    }

    /// Series of one partition at one moment, with the sequence of `agent`.
    pub(super) async fn read(
        &self,
        partition: Partition,
        series: &Placed<(Kind, SeriesKey)>,
        agent: &str,
    ) -> Result<Placed<Result<Stored, Error>>, Error> {
        let hashes = series.iter().map(|(_, (kind, key))| self.names.series(*kind, key));
        let keys: Vec<_> = std::iter::once(self.names.of(partition, "seq")).chain(hashes).collect();
        let mut call = Call::new(&self.scripts.read, keys);
        call.text(agent);
        let answer = self.call(partition, &call).await?;
        let [sequence, hashes @ ..] = list(&answer).ok_or(Error::Foreign)? else { return Err(Error::Foreign) };
        let sequence = number(sequence).ok_or(Error::Foreign)?;
        let total = |kind, hash| {
            let total = list(hash).ok_or(Error::Foreign).and_then(|elements| fields::total(kind, elements));
            total.map(|total| Stored { total, sequence })
        };
        Ok(series.iter().zip(hashes).map(|((place, (kind, _)), hash)| (*place, total(*kind, hash))).collect())
    }

    /// A part of a partition's index: entries with their scores, and the cursor behind them.
    pub(super) async fn scan(
        &self,
        partition: Partition,
        cursor: u64,
        pattern: Option<&str>,
        count: usize,
    ) -> Result<Value, Error> {
        let mut command = redis::cmd("ZSCAN");
        command.arg(self.names.of(partition, "index")).arg(cursor).arg("COUNT").arg(count);
        if let Some(pattern) = pattern {
            command.arg("MATCH").arg(pattern);
        }
        self.request(partition, &command, None).await
    }

    /// The name of the server that has a partition, as far as is known.
    pub(in crate::store) fn place(&self, partition: Partition) -> Option<Arc<str>> {
        self.route.known(partition).map(|node| Arc::clone(&node.name))
    }

    /// All servers that have partitions, as far as is known.
    pub(in crate::store) fn servers(&self) -> Vec<Server> {
        let server = |node| Server { node, route: Arc::clone(&self.route), names: self.names.clone() };
        self.route.nodes().into_iter().map(server).collect()
    }

    /// Looks again who has which partition.
    pub(in crate::store) fn look_again(&self) {
        self.route.look_again();
    }

    /// Whether the server that has the first partition allows scripts.
    #[cfg(test)]
    pub(super) async fn calls_scripts(&self) -> bool {
        let node = self.route.node(0).await.unwrap();
        node.wire(&self.route.opener).await.unwrap().scripts
    }

    async fn call(&self, partition: Partition, call: &Call<'_>) -> Result<Value, Error> {
        self.request(partition, &call.command, Some(call)).await
    }

    /// A request about keys of one partition, to whoever has it. In all it takes no longer than one connection and one
    /// reply may take.
    async fn request(&self, partition: Partition, command: &Cmd, call: Option<&Call<'_>>) -> Result<Value, Error> {
        let answer = tokio::time::timeout(self.route.opener.whole(), self.follow(partition, command, call)).await;
        answer.unwrap_or_else(|_| {
            self.route.doubt();
            Err(Error::Timeout)
        })
    }

    async fn follow(&self, partition: Partition, command: &Cmd, call: Option<&Call<'_>>) -> Result<Value, Error> {
        let mut node = self.route.node(partition).await?;
        let mut asking = false;
        for _ in 0..REDIRECTS {
            let mut wire = node.wire(&self.route.opener).await.inspect_err(|_| self.route.doubt())?;
            let answer = match call {
                Some(call) if !wire.scripts => node.transact(&self.route.opener, call, asking).await,
                Some(_) | None => wire.send(command, asking).await.map_err(Problem::Redis),
            };
            let error = match answer {
                Ok(answer) => return Ok(answer),
                Err(Problem::Ours(error)) => return Err(error),
                Err(Problem::Redis(error)) => error,
            };
            if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
                && let Some(call) = call
            {
                // Restarted, promoted, or `SCRIPT FLUSH`.
                wire.load(&call.named.script).await?;
            } else if let Some((to, name)) = redirection(&error) {
                if self.route.opener.deployment.mode == Mode::Single {
                    return Err(Error::IsCluster);
                }
                node = self.route.named(name, &node).ok_or(Error::Moving)?;
                asking = to == ServerErrorKind::Ask;
                if !asking {
                    self.route.moved(partition, &node);
                }
            } else {
                return Err(self.failed(&node, &wire, &error).await);
            }
        }
        Err(Error::Moving)
    }

    async fn failed(&self, node: &Node, wire: &Wire, error: &RedisError) -> Error {
        let error = Error::from(error);
        if error.ends_connection() {
            node.give_up(wire, error).await;
        }
        if error.ends_connection() || error == Error::ClusterDown {
            self.route.doubt();
        }
        error
    }
}

/// Where a cluster's node sends a request on to.
fn redirection(error: &RedisError) -> Option<(ServerErrorKind, &str)> {
    let ErrorKind::Server(kind @ (ServerErrorKind::Moved | ServerErrorKind::Ask)) = error.kind() else { return None };
    error.redirect_node().map(|(name, _)| (kind, name))
}

/// One server, to be asked about itself.
#[derive(Debug, Clone)]
pub(in crate::store) struct Server {
    node: Arc<Node>,
    route: Arc<Route>,
    names: Names,
}

impl Server {
    /// Its name: `host:port`, or the path of a socket.
    pub(in crate::store) fn name(&self) -> &Arc<str> {
        &self.node.name
    }

    /// What the server says about itself, line by line.
    pub(super) async fn info(&self) -> Result<String, Error> {
        let answer = self.ask(redis::cmd("INFO")).await?;
        redis::from_redis_value(answer).map_err(|_| Error::Foreign)
    }

    /// The server's clock, in milliseconds since the epoch.
    pub(super) async fn now_ms(&self) -> Result<u64, Error> {
        let answer = self.ask(redis::cmd("TIME")).await?;
        let seconds = list(&answer).and_then(|time| number(time.first()?));
        Ok(seconds.ok_or(Error::Foreign)? * 1_000)
    }

    /// A parameter of the server; `None` where it does not tell.
    pub(super) async fn parameter(&self, name: &str) -> Result<Option<String>, Error> {
        let mut command = redis::cmd("CONFIG");
        command.arg("GET").arg(name);
        match self.ask(command).await {
            Ok(answer) => {
                let pairs: Result<std::collections::HashMap<String, String>, _> = redis::from_redis_value(answer);
                Ok(pairs.ok().and_then(|mut pairs| pairs.remove(name)))
            }
            Err(error) if matches!(error, Error::Dropped | Error::Timeout | Error::Connect) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// The sequences that the server has of an agent, of those of these partitions that are there.
    pub(super) async fn sequences(&self, agent: &str, partitions: &[Partition]) -> Result<Sequences, Error> {
        if partitions.is_empty() {
            return Ok(Vec::new());
        }
        let mut wire = self.node.wire(&self.route.opener).await?;
        match wire.send_all(&self.ask_sequences(agent, partitions)).await {
            Ok(answers) => Ok(there(partitions, &answers)),
            Err(error) => {
                let error = Error::from(error);
                self.node.give_up(&wire, error).await;
                Err(error)
            }
        }
    }

    /// The same, and whether `replicas` replicas have it too.
    ///
    /// A WAIT speaks of what its own connection wrote, and neither of an earlier connection nor of what a failover took
    /// back. So what it is about is read here, on the same connection before it, with a write between that stands behind
    /// all of it in the stream to the replicas. The connection is one of its own, since WAIT holds up what comes after it.
    pub(super) async fn replicated(
        &self,
        agent: &str,
        partitions: &[Partition],
        replicas: u32,
        now_ms: u64,
    ) -> Result<(Stable, Sequences), Error> {
        let Some(first) = partitions.first() else { return Ok((Stable::All, Vec::new())) };
        let mut commands = self.ask_sequences(agent, partitions);
        commands.cmd("HSET").arg(self.names.of(*first, "seq")).arg(format!("{agent}:waited")).arg(now_ms);
        let wait = (self.route.opener.reply() / 2).min(WAIT);
        commands.cmd("WAIT").arg(replicas).arg(wait.as_millis() as u64);

        let mut wire = self.node.waiting_wire(&self.route.opener).await?;
        let answers = match wire.send_all(&commands).await {
            Ok(answers) => answers,
            Err(error) => {
                let error = Error::from(error);
                self.node.give_up_waiting(&wire, error).await;
                return Err(error);
            }
        };
        let [sequences @ .., written, acknowledged] = &answers[..] else { return Err(Error::Foreign) };
        for answer in [written, acknowledged] {
            if let Value::ServerError(error) = answer {
                self.route.doubt();
                return Err(RedisError::from(error.clone()).into());
            }
        }
        let enough = number(acknowledged).ok_or(Error::Foreign)? >= u64::from(replicas);
        Ok((if enough { Stable::All } else { Stable::Nothing }, there(partitions, sequences)))
    }

    fn ask_sequences(&self, agent: &str, partitions: &[Partition]) -> Pipeline {
        let mut commands = Pipeline::with_capacity(partitions.len() + 2);
        for partition in partitions {
            commands.cmd("HGET").arg(self.names.of(*partition, "seq")).arg(agent);
        }
        commands
    }

    async fn ask(&self, command: Cmd) -> Result<Value, Error> {
        let mut wire = self.node.wire(&self.route.opener).await?;
        let answer = wire.send(&command, false).await.map_err(Error::from);
        if let Err(error @ (Error::Dropped | Error::Timeout)) = answer {
            self.node.give_up(&wire, error).await;
        }
        answer
    }
}

/// Partitions with the sequences of their last batches.
type Sequences = Vec<(Partition, u64)>;

/// Partitions with the answers about them. One that moved away answers with an error, and is left out; what was never
/// there is 0.
fn there(partitions: &[Partition], answers: &[Value]) -> Sequences {
    let sequence = |answer: &Value| if *answer == Value::Nil { Some(0) } else { number(answer) };
    partitions.iter().zip(answers).filter_map(|(partition, answer)| Some((*partition, sequence(answer)?))).collect()
}
