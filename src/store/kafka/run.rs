//! The two threads and what they share with readers and with the flush.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;
use tokio::sync::oneshot;

use super::follow::Follower;
use super::publish::Publisher;
use super::read::Reader;
use super::table::Table;
use super::{Config, Limits};
use crate::aggregate::shard::SeriesId;
use crate::kafka::{self, Link, NotStarted};
use crate::sample::{Kind, Marks, SeriesKey};
use crate::store::journal::{self, Journal};
use crate::telemetry;
use crate::units::Time;

/// How many series are remembered by name that are to be produced; beyond, all that are newer than what Kafka has are
/// looked for in the journal.
const TOUCHED_MAX: usize = 200_000;

/// Called with series that a delete in the topic names, and how far the topic was then read. Who waits is told when that
/// is kept. It must not block.
pub type OnDeleted = Arc<dyn Fn(Vec<SeriesId>, Marks, Option<oneshot::Sender<()>>) + Send + Sync>;

/// What is kept up with what.
pub struct Parts {
    /// Whose totals are produced.
    pub journal: Arc<Journal>,
    /// The way to the brokers.
    pub kafka: kafka::Config,
    /// The topic.
    pub config: Config,
    /// How much is kept in memory.
    pub limits: Limits,
    /// `limits.store_expire`: how long a total without an update counts.
    pub expire: Time,
    /// Who resets series.
    pub on_deleted: OnDeleted,
}

/// Why a thread has to try again.
#[derive(Debug)]
pub(super) enum Problem {
    /// The brokers did not do what was asked.
    Kafka(KafkaError),
    /// A client could not be made.
    Client(kafka::Error),
    /// The journal could not be read.
    Journal(journal::Error),
    /// The topic ends before the place up to which it was read: it lost something, or is another one.
    Rewound,
    /// There is no topic, and it could not be made.
    NoTopic(String),
    /// The partitions are not known yet.
    Unknown,
    /// The agent stops.
    Stopped,
}

impl Problem {
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Kafka(error) => kafka::reason(error),
            Self::Client(_) => "configuration",
            Self::Journal(_) => "journal",
            Self::Rewound => "rewound",
            Self::NoTopic(_) => "no_topic",
            Self::Unknown | Self::Stopped => "connection",
        }
    }
}

/// All that a problem may count as.
pub(super) const REASONS: [&str; 10] = [
    "connection",
    "denied",
    "no_topic",
    "other",
    "configuration",
    "journal",
    "rewound",
    "foreign",
    "clone",
    "too_large",
];

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kafka(error) if kafka::is_away(error) => f.write_str("the brokers do not answer"),
            Self::Kafka(error) => error.fmt(f),
            Self::Client(error) => error.fmt(f),
            Self::Journal(error) => write!(f, "the journal: {error}"),
            Self::Rewound => f.write_str("the topic lost records that it had acknowledged; it is filled again"),
            Self::NoTopic(words) => write!(f, "the topic is missing and could not be made: {words}"),
            Self::Unknown => f.write_str("not connected yet"),
            Self::Stopped => f.write_str("the agent stops"),
        }
    }
}

impl From<KafkaError> for Problem {
    fn from(error: KafkaError) -> Self {
        Self::Kafka(error)
    }
}

impl From<journal::Error> for Problem {
    fn from(error: journal::Error) -> Self {
        Self::Journal(error)
    }
}

impl From<kafka::Error> for Problem {
    fn from(error: kafka::Error) -> Self {
        Self::Client(error)
    }
}

/// A delete that was asked for here.
pub(super) struct Delete {
    pub(super) id: SeriesId,
    pub(super) nonce: String,
}

/// What the publisher is to do.
#[derive(Default)]
pub(super) struct Work {
    /// Series whose totals changed or are gone.
    pub(super) touched: HashSet<SeriesId>,
    /// Deletes to log.
    pub(super) deletes: Vec<Delete>,
    /// Keys that are to have no value any more, each with its partition.
    pub(super) gone: Vec<(String, i32)>,
    /// Whether all is to be looked through.
    pub(super) all: bool,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.touched.is_empty() && self.deletes.is_empty() && self.gone.is_empty() && !self.all
    }
}

/// What is known of the brokers and the topic.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// Whether the brokers answer.
    pub(super) connected: bool,
    /// How many partitions the topic has.
    pub(super) partitions: Option<i32>,
    /// Whether the table has all that was in the topic when it began to be read.
    pub(super) loaded: bool,
    /// Why something failed last.
    pub(super) problem: Option<String>,
    /// Why the brokers do not take totals though they answer.
    pub(super) refused: Option<String>,
    /// Whether another process writes under this agent's name.
    pub(super) has_clone: bool,
}

/// What the threads, readers and the flush share.
pub(super) struct Shared {
    pub(super) topic: String,
    pub(super) agent: String,
    /// Who produces: a random number of this process.
    pub(super) process: String,
    pub(super) table: RwLock<Table>,
    facts: Mutex<Facts>,
    work: Mutex<Work>,
    wake: Condvar,
    stop: Mutex<Option<Instant>>,
    /// Who waits until a delete is kept here, by its nonce.
    pub(super) waiting: Mutex<HashMap<String, oneshot::Sender<()>>>,
    pub(super) expire: Time,
    /// How many producers there have been.
    pub(super) producers: std::sync::atomic::AtomicU64,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What stands behind these locks is sound after each step, so a panic elsewhere leaves it so.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(parts: &Parts, agent: String) -> Self {
        Self {
            topic: parts.config.topic.clone(),
            table: RwLock::new(Table::new(agent.clone(), parts.limits.kafka_table.bytes())),
            agent,
            process: random(),
            facts: Mutex::default(),
            work: Mutex::new(Work { all: true, ..Work::default() }),
            wake: Condvar::new(),
            stop: Mutex::default(),
            waiting: Mutex::default(),
            expire: parts.expire,
            producers: Default::default(),
        }
    }

    pub(super) fn facts(&self) -> Facts {
        locked(&self.facts).clone()
    }

    /// Changes what is known, and wakes the publisher when that is the brokers' return.
    pub(super) fn learn(&self, change: impl FnOnce(&mut Facts)) {
        let mut facts = locked(&self.facts);
        let before = facts.connected;
        change(&mut facts);
        telemetry::STORE_CONNECTED.gauge(&["kafka"]).set(if facts.connected { 1.0 } else { 0.0 });
        if before != facts.connected {
            let agent = self.agent.as_str();
            if facts.connected {
                tracing::info!(agent, topic = self.topic, "the store is connected");
            } else {
                tracing::warn!("the store is away; the journal keeps what comes");
            }
        }
        let returned = facts.connected && !before;
        drop(facts);
        if returned {
            self.wake.notify_all();
        }
    }

    /// Counts a problem and keeps it for whoever asks.
    pub(super) fn fail(&self, problem: &Problem, is_away: bool) {
        if matches!(problem, Problem::Stopped | Problem::Unknown) {
            return;
        }
        telemetry::STORE_ERRORS.counter(&["kafka", problem.reason()]).increment(1);
        tracing::debug!(%problem, "Kafka");
        self.learn(|facts| {
            facts.problem = Some(problem.to_string());
            facts.connected &= !is_away;
        });
    }

    /// Gives the publisher something to do.
    pub(super) fn order(&self, change: impl FnOnce(&mut Work)) {
        change(&mut locked(&self.work));
        self.wake.notify_all();
    }

    /// Says that totals changed or are gone.
    pub(super) fn touch(&self, series: impl Iterator<Item = SeriesId>) {
        self.order(|work| {
            if !work.all {
                work.touched.extend(series);
            }
            if work.touched.len() > TOUCHED_MAX {
                work.touched = HashSet::new();
                work.all = true;
            }
        });
    }

    /// Waits for something to do, at most so long; none when the agent stops and there is nothing.
    pub(super) fn next_work(&self, patience: Duration) -> Option<Work> {
        let work = locked(&self.work);
        let idle = |work: &mut Work| work.is_empty() && !self.is_stopping();
        let (mut work, _) = self.wake.wait_timeout_while(work, patience, idle).unwrap_or_else(PoisonError::into_inner);
        let work = std::mem::take(&mut *work);
        (!work.is_empty() || !self.is_stopping()).then_some(work)
    }

    /// Waits, at most so long, for the brokers to come back or the agent to stop.
    pub(super) fn rest(&self, patience: Duration) {
        let work = locked(&self.work);
        let was_away = !self.facts().connected;
        let is_over = || self.is_stopping() || (was_away && self.facts().connected);
        let wait = |_: &mut Work| !is_over();
        drop(self.wake.wait_timeout_while(work, patience, wait));
    }

    pub(super) fn is_stopping(&self) -> bool {
        locked(&self.stop).is_some()
    }

    pub(super) fn is_past_deadline(&self) -> bool {
        locked(&self.stop).is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Why the agent is not ready.
    pub(super) fn unready(&self) -> Vec<String> {
        let facts = self.facts();
        let mut reasons = Vec::new();
        if !facts.connected {
            let problem = facts.problem.as_deref().unwrap_or("not connected yet");
            reasons.push(format!("store: Kafka: {problem}"));
        } else if !facts.loaded {
            let topic = &self.topic;
            reasons.push(format!("store: Kafka: topic {topic:?} is still being read; reads show this agent alone"));
        }
        if let Some(refused) = facts.refused.as_deref().filter(|_| facts.connected) {
            reasons.push(format!("store: Kafka: this agent's totals are not taken: {refused}"));
        }
        if !self.table().is_whole() {
            reasons.push(
                "store: Kafka: the other agents' totals are more than limits.kafka_table; reads show this agent alone"
                    .to_owned(),
            );
        }
        if facts.has_clone {
            let agent = &self.agent;
            reasons.push(format!("store: Kafka: another process writes under this agent's name, {agent}; give one of them a new state_dir"));
        }
        reasons
    }

    /// Whether the table has what the other agents say.
    pub(super) fn is_available(&self) -> bool {
        let facts = self.facts();
        facts.connected && facts.loaded && self.table().is_whole()
    }

    pub(super) fn table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn table_mut(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Up to when the totals of others count that were not updated since.
    pub(super) fn since_ms(&self) -> u64 {
        crate::clock::wall_ms().saturating_sub(self.expire.as_millis())
    }
}

/// The running threads.
pub struct Handle {
    shared: Arc<Shared>,
    journal: Arc<Journal>,
    publisher: JoinHandle<()>,
    follower: JoinHandle<()>,
}

/// Starts the threads. Whether the brokers answer shows in [`Reader::unready`].
///
/// # Errors
/// When the configuration can't be used or a thread not be started.
pub fn start(parts: Parts) -> Result<Handle, NotStarted> {
    let link = Link::new(&parts.kafka).map_err(NotStarted::Config)?;
    telemetry::STORE_ERRORS.begin(REASONS.map(|reason| ["kafka", reason]));
    telemetry::KAFKA_PRODUCED.begin([["state"]]);
    telemetry::STORE_CONNECTED.gauge(&["kafka"]).set(0.0);
    parts.journal.tell_expired();
    let shared = Arc::new(Shared::new(&parts, parts.journal.agent().to_string()));
    let publisher = Publisher::new(Arc::clone(&shared), Arc::clone(&parts.journal), link.clone());
    let publisher = spawn("kafka-publish", move || publisher.run())?;
    let journal = Arc::clone(&parts.journal);
    let follower = Follower::new(Arc::clone(&shared), parts, link).map_err(NotStarted::Config)?;
    let follower = spawn("kafka-follow", move || follower.run())?;
    Ok(Handle { shared, journal, publisher, follower })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, NotStarted> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(NotStarted::Thread)
}

impl Handle {
    /// What tells the threads of a flush.
    pub fn bell(&self) -> Bell {
        Bell { shared: Arc::clone(&self.shared), journal: Arc::clone(&self.journal) }
    }

    /// What reads the table.
    pub fn reader(&self) -> Reader {
        Reader::new(Arc::clone(&self.shared))
    }

    /// Produces what the journal has and Kafka has not, at most until the deadline and not while the brokers are away, and
    /// ends the threads. What is left is produced after the next start.
    pub fn stop(self, deadline: Instant) {
        *locked(&self.shared.stop) = Some(deadline);
        self.shared.wake.notify_all();
        // A thread that panicked has been reported by the panic.
        drop(self.publisher.join());
        drop(self.follower.join());
    }
}

/// Tells the publisher what a flush wrote.
#[derive(Clone)]
pub struct Bell {
    shared: Arc<Shared>,
    journal: Arc<Journal>,
}

impl Bell {
    /// Lets the publisher look through the journal: what was written before the bell was there it has not been told.
    pub fn ring(&self) {
        self.shared.order(|work| work.all = true);
    }

    /// Says which totals changed or were deleted; those that expired are known from the journal.
    pub fn touched<'s>(&self, series: impl Iterator<Item = (Kind, &'s SeriesKey)>) {
        let series = series.map(|(kind, key)| SeriesId { kind, key: key.clone() });
        let expired = self.journal.take_expired().into_iter().map(|(kind, key)| SeriesId { kind, key });
        self.shared.touch(series.chain(expired));
    }
}

/// 64 random bits, or where the kernel has none the next best: they need only differ from those before.
pub(super) fn random() -> String {
    let number = getrandom::u64().unwrap_or_else(|_| crate::clock::wall_ms() ^ u64::from(std::process::id()) << 40);
    format!("{number:016x}")
}

/// The pause before a try after so many failures.
pub(super) fn backoff(failures: u32) -> Duration {
    Duration::from_millis((100_u64 << failures.min(6)).min(5_000))
}
