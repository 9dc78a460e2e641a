//! One server, and the wires to it: one for requests, of which many may be in flight, and one for those that wait.
//!
//! A wire is opened when it is first needed, by one task for all. Who finds it of no more use gives it up, and the next
//! request opens another. Nothing waits longer than `limits.redis_connect` and `limits.redis_reply`.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ConnectionInfo, Pipeline, RedisError, RedisResult, Script, Value};
use tokio::sync::Mutex;

use super::deployment::{Deployment, Mode};
use super::{Error, Limits};

/// What a request may need: how to open a wire, and what to do first on it.
#[derive(Debug)]
pub(super) struct Opener {
    pub(super) deployment: Deployment,
    limits: Limits,
    /// How long nobody tries again after a failure. A reader would rather have the answer at once.
    patience: Duration,
    /// `SCRIPT LOAD` of each script.
    load: Pipeline,
}

impl Opener {
    pub(super) fn new(deployment: Deployment, limits: &Limits, patience: Duration, load: Pipeline) -> Self {
        Self { deployment, limits: limits.clone(), patience, load }
    }

    /// The longest that a request may take, with all that must be found out for it.
    pub(super) fn whole(&self) -> Duration {
        self.limits.redis_connect.0 + self.limits.redis_reply.0
    }

    /// The longest that an answer may take.
    pub(super) fn reply(&self) -> Duration {
        self.limits.redis_reply.0
    }

    /// A connection to somebody.
    pub(super) async fn open(&self, info: ConnectionInfo) -> Result<MultiplexedConnection, Error> {
        let client = self.deployment.client(info).map_err(|_| Error::Url)?;
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.limits.redis_connect.0))
            .set_response_timeout(Some(self.limits.redis_reply.0))
            .set_pipeline_buffer_size(64)
            .set_write_backpressure_boundary(256 << 10);
        let connected = client.get_multiplexed_async_connection_with_config(&settings).await;
        connected.map_err(|error| {
            tracing::debug!(%error, "no connection to a Redis");
            let kind = Error::from(&error);
            if matches!(kind, Error::Dropped | Error::Timeout) {
                Error::Connect
            } else if error.kind() == redis::ErrorKind::InvalidClientConfig {
                // Its word for certificates that it can't use.
                Error::Tls
            } else {
                kind
            }
        })
    }

    /// A connection for requests, to a server that takes writes.
    async fn open_for_requests(&self, info: ConnectionInfo) -> Result<MultiplexedConnection, Error> {
        let mut redis = self.open(info).await?;
        if self.deployment.mode == Mode::Sentinel {
            // A sentinel may name a server that is no master any more.
            let role: Value = redis::cmd("ROLE").query_async(&mut redis).await?;
            let is_master = super::list(&role).and_then(|role| super::text(role.first()?)) == Some("master");
            if !is_master {
                return Err(Error::ReadOnly);
            }
        }
        self.load.exec_async(&mut redis).await?;
        Ok(redis)
    }
}

/// A server.
pub(super) struct Node {
    /// `host:port`, or the path of a socket.
    pub(super) name: Arc<str>,
    info: ConnectionInfo,
    requests: Line,
    waits: Line,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A wire that is there, or will be.
#[derive(Default)]
struct Line(Mutex<Opened>);

#[derive(Default)]
struct Opened {
    wire: Option<Wire>,
    /// Counts the wires, so that a late word about an old one does not end the present one.
    count: u64,
    failed: Option<(Instant, Error)>,
}

/// A connection on which many requests may be in flight; clones share it.
#[derive(Clone)]
pub(super) struct Wire {
    redis: MultiplexedConnection,
    count: u64,
}

impl Wire {
    /// One command and its answer. `asking` lets a node answer for keys that are on their way to it.
    pub(super) async fn send(&mut self, command: &Cmd, asking: bool) -> RedisResult<Value> {
        if !asking {
            return self.redis.send_packed_command(command).await.and_then(Value::extract_error);
        }
        let mut both = Pipeline::with_capacity(2);
        both.cmd("ASKING").add_command(command.clone());
        let answers = self.redis.send_packed_commands(&both, 0, 2).await?;
        let last = answers.into_iter().next_back();
        last.ok_or_else(|| RedisError::from((redis::ErrorKind::UnexpectedReturnType, "no answer")))?.extract_error()
    }

    /// Loads a script.
    pub(super) async fn load(&mut self, script: &Script) -> RedisResult<()> {
        script.load_async(&mut self.redis).await.map(drop)
    }

    /// Several commands in a row, and the answer to each.
    pub(super) async fn send_all(&mut self, commands: &Pipeline) -> RedisResult<Vec<Value>> {
        self.redis.send_packed_commands(commands, 0, commands.len()).await
    }
}

impl Node {
    pub(super) fn new(info: ConnectionInfo) -> Self {
        Self { name: info.addr().to_string().into(), info, requests: Line::default(), waits: Line::default() }
    }

    /// The host that it was reached by.
    pub(super) fn host(&self) -> &str {
        self.name.rsplit_once(':').map_or(&self.name, |(host, _)| host)
    }

    /// The wire for requests.
    pub(super) async fn wire(&self, opener: &Opener) -> Result<Wire, Error> {
        self.requests.wire(opener, || opener.open_for_requests(self.info.clone())).await
    }

    /// The wire for requests that wait, so that they hold up nothing else.
    pub(super) async fn waiting_wire(&self, opener: &Opener) -> Result<Wire, Error> {
        self.waits.wire(opener, || opener.open(self.info.clone())).await
    }

    /// Ends the wire for requests.
    pub(super) async fn give_up(&self, wire: &Wire, error: Error) {
        self.requests.give_up(wire, error).await;
    }

    /// Ends the wire for requests that wait.
    pub(super) async fn give_up_waiting(&self, wire: &Wire, error: Error) {
        self.waits.give_up(wire, error).await;
    }
}

impl Line {
    async fn wire<F>(&self, opener: &Opener, open: impl FnOnce() -> F) -> Result<Wire, Error>
    where
        F: Future<Output = Result<MultiplexedConnection, Error>>,
    {
        let asked = Instant::now();
        let mut opened = self.0.lock().await;
        if let Some(wire) = &opened.wire {
            return Ok(wire.clone());
        }
        if let Some((since, error)) = opened.failed
            && (since > asked || since.elapsed() < opener.patience)
        {
            return Err(error);
        }
        match open().await {
            Ok(redis) => {
                opened.count += 1;
                let wire = Wire { redis, count: opened.count };
                opened.wire = Some(wire.clone());
                opened.failed = None;
                Ok(wire)
            }
            Err(error) => {
                opened.failed = Some((Instant::now(), error));
                Err(error)
            }
        }
    }

    async fn give_up(&self, wire: &Wire, error: Error) {
        let mut opened = self.0.lock().await;
        if opened.count == wire.count && opened.wire.take().is_some() {
            opened.failed = Some((Instant::now(), error));
        }
    }
}
