//! The outbox into the store: one thread, the batches of a partition in order and many partitions at once.
//!
//! Nobody waits for it. Each partition is visited by one task at a time: it is claimed, then its batches are sent until
//! there are no more. What fails waits, for a time that grows to 5 s: the partitions of one server together where the
//! server is why, else the partition alone; all others go on. Then it is claimed again and goes on from where the store
//! says it is, the same batches under the same numbers, so that a store that is away, slow, restarted, older than it was
//! or on another server costs time and never counts twice. It decides nothing about batches: the journal numbers, keeps
//! and merges them, the store compares.
//!
//! Limits: `redis_connect`, `redis_reply`. Metrics: `tallyd_store_connected`, `tallyd_store_errors_total{store="redis"}`,
//! `tallyd_store_expired_total`, `tallyd_lost_total`.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::journal::{self, Journal, PARTITIONS, Resequenced};
use super::redis::{
    Applied, Asker, Claimed, Config, Connection, Deleted, Durability, Inherited, Limits, Mode, News, Polled, Stable,
    backoff,
};
use super::{Batch, Partition, redis, samples_of};
use crate::telemetry;
use crate::units::Time;

#[cfg(test)]
mod tests;
mod unstable;

use unstable::Unstable;

/// How many partitions of a server have a request under way at a time.
const IN_FLIGHT: usize = 32;

/// Bytes of batches that are read from the journal for one partition at a time.
const READ_BYTES: usize = 1 << 20;

/// How often the store is asked for deletes, and whether it still throws nothing away.
const POLL: Duration = Duration::from_secs(10);

/// How often it is asked what it would not lose any more.
const SETTLE: Duration = Duration::from_secs(1);

/// Longer than any stop: what fails while we are asked to stop is not tried again.
const NEVER: Duration = Duration::from_secs(3_600);

/// How long a store that has lost what it acknowledged is a reason not to be ready.
const ALARM: Duration = Duration::from_secs(3_600);

/// How long a copy of this agent has to claim what it takes over, and how often that is looked at.
const COPY_WITHIN: Duration = Duration::from_secs(10);
const COPY_PAUSE: Duration = Duration::from_millis(50);

/// How often in a row a partition may be claimed, or found elsewhere, before it must wait.
const TRIES: u32 = 4;

/// Called with deletes that this agent has still to repeat on its own side. It must not block.
pub type OnDeleted = Arc<dyn Fn(Vec<Deleted>) + Send + Sync>;

/// What ships what to where.
pub struct Parts {
    /// Whose outbox is shipped.
    pub journal: Arc<Journal>,
    /// Where to.
    pub config: Config,
    /// How long to wait.
    pub limits: Limits,
    /// `limits.store_expire`: how long the store keeps a series without an update.
    pub expire: Time,
    /// Who repeats deletes.
    pub on_deleted: OnDeleted,
}

/// How the store is doing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// Whether it answers for every partition.
    pub connected: bool,
    /// Whether it was asked and answers for none: a reader need not wait for it to find that out.
    pub away: bool,
    /// Why the agent is not ready, for a person; empty when all is well.
    pub reasons: Vec<String>,
}

/// The running thread.
pub struct Handle {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// Wakes the thread; may be kept by whoever commits.
#[derive(Clone)]
pub struct Bell(Arc<Shared>);

impl Bell {
    /// Says that there may be something to ship.
    pub fn ring(&self) {
        self.0.wake.notify_one();
    }

    /// How the store is doing.
    pub fn status(&self) -> Arc<Status> {
        self.0.status.load_full()
    }

    /// Takes note of deletes that this agent has already repeated, because it asked for them.
    pub fn already_deleted(&self, deleted: impl IntoIterator<Item = Deleted>) {
        locked(&self.0.own).extend(deleted);
    }
}

/// What the thread and its handle share.
#[derive(Default)]
struct Shared {
    wake: Notify,
    /// Until when to go on; `None` until asked to stop.
    deadline: watch::Sender<Option<Instant>>,
    status: ArcSwap<Status>,
    /// Deletes that this agent made itself, and so need not be told of.
    own: Mutex<HashSet<Deleted>>,
}

/// Starts the thread. Whether the store answers shows in [`Handle::status`].
///
/// # Errors
/// When the configuration can't be used or the thread not be started.
pub fn start(parts: Parts) -> Result<Handle, Error> {
    parts.config.check().map_err(Error::Config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
    begin_counters();
    let shared = Arc::new(Shared::default());
    let shipper = Shipper::new(parts, Arc::clone(&shared));
    let run = move || runtime.block_on(shipper.run());
    let thread = std::thread::Builder::new().name("ship".to_owned()).spawn(run).map_err(Error::Thread)?;
    Ok(Handle { shared, thread })
}

fn begin_counters() {
    telemetry::STORE_ERRORS.begin(["journal", "clone", "restless"].map(|reason| ["redis", reason]));
    telemetry::STORE_ERRORS.begin(redis::Error::RUNNING.map(|error| ["redis", error.reason()]));
    telemetry::LOST.begin(redis::Failure::ALL.map(|failure| [failure.reason()]));
    telemetry::LOST.begin([[ROLLED_BACK]]);
    telemetry::LOST_SAMPLES.begin(redis::Failure::ALL.map(|failure| [failure.reason()]));
    telemetry::LOST_SAMPLES.begin([[ROLLED_BACK]]);
}

/// The reason in `tallyd_lost_total` of what a store had applied and no longer has.
const ROLLED_BACK: &str = "store_rolled_back";

impl Handle {
    /// Says that a flush was committed.
    pub fn notify(&self) {
        self.shared.wake.notify_one();
    }

    /// Something to say so with from elsewhere.
    pub fn bell(&self) -> Bell {
        Bell(Arc::clone(&self.shared))
    }

    /// How the store is doing.
    pub fn status(&self) -> Arc<Status> {
        self.shared.status.load_full()
    }

    /// Ships what the outbox holds, at most until the deadline, and ends the thread. What is left stays in the journal.
    pub fn stop(self, deadline: Instant) {
        self.shared.deadline.send_replace(Some(deadline));
        self.shared.wake.notify_one();
        // A thread that panicked has been reported by the panic.
        drop(self.thread.join());
    }
}

/// Why the thread did not start.
#[derive(Debug)]
pub enum Error {
    /// The section `[store.redis]` can't be used.
    Config(redis::Error),
    /// A thread or its runtime could not be made.
    Thread(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(error) => error.fmt(f),
            Self::Thread(error) => write!(f, "the thread that ships to the store could not be started: {error}"),
        }
    }
}

impl std::error::Error for Error {}

/// Why a partition must wait.
#[derive(Debug)]
enum Problem {
    /// The store did not do what was asked.
    Store(redis::Error),
    /// The outbox could not be read or written.
    Journal(journal::Error),
    /// Another process writes under our name, and inherited this.
    Clone(Inherited),
    /// The store does not come to rest: each answer contradicts the one before.
    Restless,
}

impl From<redis::Error> for Problem {
    fn from(error: redis::Error) -> Self {
        Self::Store(error)
    }
}

impl From<journal::Error> for Problem {
    fn from(error: journal::Error) -> Self {
        Self::Journal(error)
    }
}

impl Problem {
    fn reason(&self) -> &'static str {
        match self {
            Self::Store(error) => error.reason(),
            Self::Journal(_) => "journal",
            Self::Clone(_) => "clone",
            Self::Restless => "restless",
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::Journal(error) => write!(f, "the outbox: {error}"),
            Self::Clone(_) => write!(f, "another agent has our name in the store; this one takes a new name"),
            Self::Restless => write!(f, "the store contradicts itself about our batches"),
        }
    }
}

/// Where a partition stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Place {
    /// The sequence that the store has of us.
    stored: u64,
    /// The number of the last delete that we know; `None` before the first claim.
    seen: Option<u64>,
    /// When the store last applied something, by its clock, in milliseconds since the epoch; 0 if nothing since the last
    /// look.
    applied_ms: u64,
    /// Whether it is ours, and nothing has happened since that would make us ask again.
    claimed: bool,
    /// Whether the store is not, or may not be, the one that it was: what it applied before says nothing any more.
    renewed: bool,
}

/// What the store says that it has of us in a partition.
#[derive(Debug, Clone, Copy)]
struct Stored {
    sequence: u64,
    samples: u64,
    now_ms: u64,
}

/// What the thread knows of a partition.
#[derive(Debug, Default)]
struct Slot {
    place: Place,
    /// A task is visiting it.
    busy: bool,
    /// A visit is due, or as soon as the one under way ends.
    queued: bool,
    /// With that visit it is asked for deletes, and for its sequence.
    poll: bool,
    /// Its claim could still be lost, since then.
    claiming: Option<Instant>,
    /// The server that it was last visited at.
    server: Name,
    away: Option<Away>,
}

/// Of a server; empty while none is known.
type Name = Arc<str>;

/// What the thread knows of a server.
#[derive(Debug, Default)]
struct Node {
    /// How many tasks visit partitions of it.
    visits: usize,
    unstable: Unstable,
    settling: bool,
    settled: Option<Instant>,
    eviction: Option<String>,
    short_of_replicas: Option<(u32, u32)>,
    /// Why it is not known what it would not lose.
    unsettled: Option<redis::Error>,
    away: Option<Away>,
}

impl Node {
    /// When it is to be asked what it would not lose any more.
    fn settles_at(&self) -> Option<Instant> {
        let pause = if self.unstable.is_empty() { POLL } else { SETTLE };
        self.settled.map(|settled| settled + pause)
    }
}

/// Something that failed and waits.
#[derive(Debug, Clone)]
struct Away {
    problem: String,
    failures: u32,
    until: Instant,
}

impl Away {
    /// The failure after those before.
    fn after(before: Option<&Self>, problem: &Problem, is_last: bool) -> Self {
        let failures = before.map_or(0, |before| before.failures);
        let wait = if is_last { NEVER } else { backoff(failures, random()) };
        Self { problem: problem.to_string(), failures: failures + 1, until: Instant::now() + wait }
    }

    fn waits(away: Option<&Self>, now: Instant) -> bool {
        away.is_some_and(|away| away.until > now)
    }
}

/// What a task did.
enum Done {
    Visited { partition: Partition, server: Name, place: Place, outcome: Result<(), Problem> },
    Settled { server: Name, since: Instant, outcome: Result<Durability, redis::Error> },
}

/// The thread's own state.
struct Shipper {
    parts: Parts,
    shared: Arc<Shared>,
    /// The nonces of this process under its present name.
    own: Vec<String>,
    slots: Vec<Slot>,
    nodes: BTreeMap<Name, Node>,
    /// Partitions whose visit is due.
    queue: VecDeque<Partition>,
    tasks: JoinSet<Done>,
    polled: Instant,
    /// Nothing at all can be done.
    away: Option<Away>,
    /// The owner nonces before the present one are of no use any more.
    pruned: bool,
    /// Asked to stop, everything is tried once more at once.
    stopping: bool,
    connected: bool,
    rolled_back: Arc<Mutex<Option<RolledBack>>>,
}

/// What the store had acknowledged and lost, not long ago.
#[derive(Debug, Clone, Copy)]
struct RolledBack {
    since: Instant,
    batches: u64,
    samples: u64,
}

impl Shipper {
    fn new(parts: Parts, shared: Arc<Shared>) -> Self {
        Self {
            parts,
            shared,
            slots: (0..=Partition::MAX).map(|_| Slot::default()).collect(),
            nodes: BTreeMap::new(),
            queue: VecDeque::new(),
            tasks: JoinSet::new(),
            polled: Instant::now(),
            away: None,
            pruned: false,
            stopping: false,
            connected: false,
            rolled_back: Arc::default(),
            own: Vec::new(),
        }
    }

    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let yet = "store: not connected yet".to_owned();
        self.shared.status.store(Arc::new(Status { reasons: vec![yet], ..Status::default() }));
        tokio::select! {
            () = self.work() => {}
            () = shared.past_deadline() => {}
        }
        telemetry::STORE_CONNECTED.gauge(&["redis"]).set(0.0);
    }

    /// One name in the store after the other, of which the first is the last as a rule.
    async fn work(&mut self) {
        let connection = match Connection::new(&self.parts.config, &self.parts.limits, Duration::ZERO) {
            Ok(connection) => connection,
            // It was checked before the thread was started, but files may have changed since.
            Err(error) => return self.report_only(&Problem::Store(error)),
        };
        loop {
            let problem = match self.session(&connection) {
                Ok(session) => match self.serve(&session).await {
                    Ok(()) => return,
                    Err(problem) => problem,
                },
                Err(problem) => problem,
            };
            if let Problem::Clone(_) = &problem {
                self.drain().await;
            }
            self.start_over().await;
            self.count(&problem);
            if let Problem::Clone(inherited) = &problem {
                let shared = self.shared_with(&connection, inherited).await;
                if self.rename(&shared) {
                    continue;
                }
            }
            let away = Away::after(self.away.as_ref(), &problem, false);
            let until = away.until;
            self.away = Some(away);
            self.report();
            if self.shared.is_stopping() {
                return;
            }
            drop(tokio::time::timeout_at(until.into(), self.shared.stopping()).await);
        }
    }

    /// Up to where another process under our name has the batches that we made. It has any if its journal is a copy of ours
    /// as we live, which shows by the nonce that it inherited: then it sends those that it has, and we must not. It says so
    /// when it claims a partition, so it is waited for until it has claimed all, but not for ever: it may have ended.
    async fn shared_with(&self, connection: &Connection, found: &Inherited) -> [u64; PARTITIONS] {
        let mut shared = [0; PARTITIONS];
        if !self.own.contains(&found.maker) {
            return shared;
        }
        let agent = self.parts.journal.agent().to_string();
        let until = Instant::now() + COPY_WITHIN;
        let mut open: Vec<_> = all();
        while !open.is_empty() && Instant::now() < until && !self.shared.is_stopping() {
            let mut left = Vec::new();
            for partition in open {
                match connection.inherited(&agent, partition).await {
                    Ok(inherited) if self.own.contains(&inherited.maker) => {
                        shared[usize::from(partition)] = inherited.last;
                    }
                    Ok(_) | Err(_) => left.push(partition),
                }
            }
            open = left;
            tokio::time::sleep(COPY_PAUSE).await;
        }
        shared
    }

    /// Takes a new name in the store. `false` when it could not be written down.
    fn rename(&mut self, shared: &[u64; PARTITIONS]) -> bool {
        match self.parts.journal.mint_agent(shared) {
            Ok((agent, shared)) => {
                self.own.clear();
                tracing::error!(%agent, dropped = shared, "another agent had our name in the store, so this one has a new one");
                true
            }
            Err(error) => {
                tracing::error!(%error, "no new name could be written down");
                false
            }
        }
    }

    fn session(&mut self, connection: &Connection) -> Result<Session, Problem> {
        let Parts { journal, expire, on_deleted, .. } = &self.parts;
        let owner = nonce();
        journal.push_owner(&owner)?;
        self.own.push(owner.clone());
        Ok(Session {
            connection: connection.clone(),
            asker: Arc::new(Asker { agent: journal.agent().to_string(), owner, expire: *expire }),
            known: Arc::new(journal.owners()),
            journal: Arc::clone(journal),
            on_deleted: Arc::clone(on_deleted),
            shared: Arc::clone(&self.shared),
            rolled_back: Arc::clone(&self.rolled_back),
        })
    }

    /// Lets the visits under way end: what they sent may be applied, and would be sent again under another name if its
    /// answer were not heard.
    async fn drain(&mut self) {
        let whole = self.parts.limits.redis_connect.0 + self.parts.limits.redis_reply.0;
        let all = async { while self.tasks.join_next().await.is_some() {} };
        drop(tokio::time::timeout(whole, all).await);
    }

    /// Forgets what was known under another name.
    async fn start_over(&mut self) {
        self.tasks.shutdown().await;
        self.slots = (0..=Partition::MAX).map(|_| Slot::default()).collect();
        self.nodes.clear();
        self.queue.clear();
        self.pruned = false;
    }

    /// Ships what comes until asked to stop.
    async fn serve(&mut self, session: &Session) -> Result<(), Problem> {
        all().into_iter().for_each(|partition| self.enqueue(partition));
        loop {
            self.try_at_last();
            self.begin(session);
            self.report();
            if self.stopping && self.is_done() {
                return Ok(());
            }
            let until = self.next(session);
            tokio::select! {
                Some(done) = self.tasks.join_next() => self.finish(session, done)?,
                () = self.shared.wake.notified() => self.enqueue_pending(),
                () = tokio::time::sleep_until(until.into()) => {}
            }
            if self.polled.elapsed() >= POLL {
                self.poll(session);
            }
        }
    }

    /// Once asked to stop, what waits is tried once more, and not again.
    fn try_at_last(&mut self) {
        if self.stopping || !self.shared.is_stopping() {
            return;
        }
        self.stopping = true;
        let now = Instant::now();
        let slots = self.slots.iter_mut().filter_map(|slot| slot.away.as_mut());
        let nodes = self.nodes.values_mut().filter_map(|node| node.away.as_mut());
        slots.chain(nodes).for_each(|away| away.until = now);
        self.enqueue_pending();
    }

    /// Whether nothing is left that can be shipped now. What is left is in the journal; a store that is away would only
    /// hold up the stop.
    fn is_done(&self) -> bool {
        let now = Instant::now();
        self.parts.journal.pending().into_iter().all(|partition| {
            let slot = &self.slots[usize::from(partition)];
            !slot.busy && self.waits(slot, now)
        })
    }

    fn waits(&self, slot: &Slot, now: Instant) -> bool {
        let node = self.nodes.get(&slot.server).and_then(|node| node.away.as_ref());
        Away::waits(slot.away.as_ref(), now) || Away::waits(node, now)
    }

    fn enqueue(&mut self, partition: Partition) {
        let slot = &mut self.slots[usize::from(partition)];
        if !slot.queued {
            slot.queued = true;
            self.queue.push_back(partition);
        }
    }

    fn enqueue_pending(&mut self) {
        self.parts.journal.pending().into_iter().for_each(|partition| self.enqueue(partition));
    }

    /// Has every partition asked for deletes and its sequence, and who has which.
    fn poll(&mut self, session: &Session) {
        self.polled = Instant::now();
        if self.parts.config.mode == Mode::Cluster {
            session.connection.look_again();
        }
        for partition in all() {
            self.slots[usize::from(partition)].poll = true;
            self.enqueue(partition);
        }
    }

    /// When something is due that nobody wakes us for.
    fn next(&self, session: &Session) -> Instant {
        let now = Instant::now();
        let queued = self.queue.iter().map(|partition| &self.slots[usize::from(*partition)]);
        let slots = queued.filter_map(|slot| slot.away.as_ref());
        let nodes = self.nodes.values().filter_map(|node| node.away.as_ref());
        let waits = slots.chain(nodes).map(|away| away.until).filter(|until| *until > now);
        // Those that are asked; a server without partitions is not, and one that is away when that has passed.
        let servers = session.connection.servers();
        let asked = servers.iter().filter_map(|server| self.nodes.get(server.name()));
        let asked = asked.filter(|node| !node.settling && !Away::waits(node.away.as_ref(), now));
        waits.chain(asked.filter_map(Node::settles_at)).chain([self.polled + POLL]).min().unwrap_or(now)
    }

    /// Starts what is due.
    fn begin(&mut self, session: &Session) {
        let now = Instant::now();
        let one_server = self.parts.config.mode != Mode::Cluster;
        for _ in 0..self.queue.len() {
            let Some(partition) = self.queue.pop_front() else { break };
            let server = session.connection.place(partition).unwrap_or_default();
            let slot = &mut self.slots[usize::from(partition)];
            if slot.server != server && !slot.busy {
                // What another server had is to be looked at first.
                slot.server = Arc::clone(&server);
                slot.place.claimed = false;
            }
            let node = self.nodes.entry(Arc::clone(&server)).or_default();
            let waits = Away::waits(slot.away.as_ref(), now) || Away::waits(node.away.as_ref(), now);
            if one_server && node.visits >= IN_FLIGHT {
                self.queue.push_front(partition);
                break;
            }
            if slot.busy || waits || node.visits >= IN_FLIGHT {
                self.queue.push_back(partition);
                continue;
            }
            (slot.busy, slot.queued) = (true, false);
            node.visits += 1;
            let poll = std::mem::take(&mut slot.poll);
            self.tasks.spawn(session.clone().visit(partition, server, slot.place, poll));
        }
        self.begin_to_settle(session, now);
    }

    /// Asks the servers for which it is time what they would not lose any more.
    fn begin_to_settle(&mut self, session: &Session, now: Instant) {
        let mut asked = false;
        for server in session.connection.servers() {
            let Some(node) = self.nodes.get_mut(server.name()) else { continue };
            let due = node.settles_at().is_none_or(|at| at <= now);
            if node.settling || !due || Away::waits(node.away.as_ref(), now) {
                continue;
            }
            (node.settling, node.settled, asked) = (true, Some(now), true);
            let unstable: Vec<_> = node.unstable.partitions().into_iter().collect();
            let (replicas, asker) = (self.parts.config.replicas, Arc::clone(&session.asker));
            self.tasks.spawn(async move {
                let outcome = Durability::ask(&server, &asker.agent, replicas, &unstable).await;
                Done::Settled { server: Arc::clone(server.name()), since: now, outcome }
            });
        }
        if asked && self.parts.config.mode == Mode::Sentinel {
            // A master that was deposed takes writes for some seconds more, and then forgets them.
            session.connection.look_again();
        }
    }

    fn finish(&mut self, session: &Session, done: Result<Done, tokio::task::JoinError>) -> Result<(), Problem> {
        match done {
            Ok(Done::Visited { partition, server, place, outcome }) => {
                self.visited(session, partition, &server, place);
                match outcome {
                    Ok(()) => self.went_well(partition, &server)?,
                    Err(problem) => self.failed(partition, &server, problem)?,
                }
                self.settle_down(partition)
            }
            Ok(Done::Settled { server, since, outcome }) => self.settled(&server, since, outcome),
            // It panicked, which the panic has reported.
            Err(_) => Err(Problem::Restless),
        }
    }

    /// Takes over what a visit found out.
    fn visited(&mut self, session: &Session, partition: Partition, server: &Name, place: Place) {
        if let Some(node) = self.nodes.get_mut(server) {
            node.visits = node.visits.saturating_sub(1);
        }
        let now_at = session.connection.place(partition).unwrap_or_default();
        let slot = &mut self.slots[usize::from(partition)];
        let claimed = place.claimed && !slot.place.claimed;
        if claimed && place.stored > 0 {
            slot.claiming = Some(Instant::now());
        }
        (slot.busy, slot.place) = (false, Place { applied_ms: 0, renewed: false, ..place });
        if now_at != slot.server {
            // It moved under way; it is claimed again where it is now.
            slot.server = Arc::clone(&now_at);
            slot.place.claimed = false;
            self.enqueue(partition);
        }
        if place.renewed {
            // What was applied elsewhere, or before, counts from now on.
            self.nodes.values_mut().for_each(|node| node.unstable.stable_upto(partition, u64::MAX));
        }
        if place.applied_ms > 0 {
            self.nodes.entry(now_at).or_default().unstable.applied(place.applied_ms, partition, place.stored);
        }
    }

    fn went_well(&mut self, partition: Partition, server: &Name) -> Result<(), Problem> {
        self.away = None;
        self.slots[usize::from(partition)].away = None;
        if let Some(node) = self.nodes.get_mut(server)
            && node.away.take().is_some()
        {
            tracing::info!(%server, "the store answers again");
        }
        Ok(())
    }

    fn failed(&mut self, partition: Partition, server: &Name, problem: Problem) -> Result<(), Problem> {
        self.enqueue(partition);
        match problem {
            Problem::Store(error) if error.concerns_node() => self.server_failed(server, error),
            Problem::Store(_) | Problem::Restless => {
                self.count(&problem);
                let is_last = self.stopping;
                let slot = &mut self.slots[usize::from(partition)];
                tracing::warn!(partition, %problem, "the store did not take what it was sent; it is sent again");
                slot.away = Some(Away::after(slot.away.as_ref(), &problem, is_last));
                slot.place.claimed = false;
            }
            Problem::Journal(_) | Problem::Clone(_) => return Err(problem),
        }
        Ok(())
    }

    /// Lets all partitions of a server wait. Each of its requests that was under way fails; that is one failure.
    fn server_failed(&mut self, server: &Name, error: redis::Error) {
        let is_last = self.stopping;
        let node = self.nodes.entry(Arc::clone(server)).or_default();
        if !Away::waits(node.away.as_ref(), Instant::now()) {
            let problem = Problem::Store(error);
            if node.away.is_none() {
                tracing::warn!(%server, %problem, "the store is away; the outbox keeps what comes");
            }
            node.away = Some(Away::after(node.away.as_ref(), &problem, is_last));
            self.count(&problem);
        }
        if error.ends_connection() {
            for partition in all() {
                let slot = &mut self.slots[usize::from(partition)];
                if slot.server == *server {
                    slot.place.claimed = false;
                    self.enqueue(partition);
                }
            }
        }
    }

    fn settled(
        &mut self,
        server: &Name,
        since: Instant,
        outcome: Result<Durability, redis::Error>,
    ) -> Result<(), Problem> {
        let Some(node) = self.nodes.get_mut(server) else { return Ok(()) };
        node.settling = false;
        let durability = match outcome {
            Ok(durability) => durability,
            // A request for batches would fare no better.
            Err(error @ (redis::Error::Connect | redis::Error::Dropped | redis::Error::Timeout)) => {
                self.server_failed(server, error);
                return Ok(());
            }
            Err(error) => {
                node.unsettled = Some(error);
                self.count(&Problem::Store(error));
                return Ok(());
            }
        };
        node.unsettled = None;
        (node.eviction, node.short_of_replicas) = (durability.eviction, durability.short_of_replicas);
        let there: BTreeMap<_, _> = durability.sequences.into_iter().collect();
        let stable = match durability.stable {
            Stable::Nothing => Vec::new(),
            Stable::All => there.iter().map(|(partition, sequence)| (*partition, *sequence)).collect(),
            // What is not there any more is found again by a visit.
            Stable::Before(time_ms) => {
                let old = node.unstable.stable_before(time_ms).into_iter();
                old.filter(|(partition, sequence)| there.get(partition).is_some_and(|there| there >= sequence))
                    .collect()
            }
        };
        for (partition, sequence) in stable {
            self.stable(partition, sequence, since);
        }
        for (partition, sequence) in there {
            self.look_for_loss(partition, sequence);
        }
        self.prune()
    }

    /// Lets the journal drop what the store would not lose.
    fn stable(&mut self, partition: Partition, sequence: u64, since: Instant) {
        self.parts.journal.stable(partition, sequence);
        self.nodes.values_mut().for_each(|node| node.unstable.stable_upto(partition, sequence));
        let slot = &mut self.slots[usize::from(partition)];
        if slot.claiming.is_some_and(|claimed| claimed < since) {
            slot.claiming = None;
        }
    }

    /// Has a partition visited whose store has less of us than it said it had. A visit that is under way finds out itself.
    fn look_for_loss(&mut self, partition: Partition, sequence: u64) {
        let slot = &mut self.slots[usize::from(partition)];
        if slot.place.claimed && !slot.busy && sequence < slot.place.stored {
            slot.poll = true;
            self.enqueue(partition);
        }
    }

    fn settle_down(&mut self, partition: Partition) -> Result<(), Problem> {
        if self.slots[usize::from(partition)].place.claimed { self.prune() } else { Ok(()) }
    }

    /// Forgets the nonces of earlier processes once every partition has been claimed for good with the present one: one
    /// whose claim a failover took back is still ours.
    fn prune(&mut self) -> Result<(), Problem> {
        if !self.pruned && self.slots.iter().all(|slot| slot.place.claimed && slot.claiming.is_none()) {
            self.parts.journal.prune_owners()?;
            self.pruned = true;
        }
        Ok(())
    }

    fn count(&self, problem: &Problem) {
        telemetry::STORE_ERRORS.counter(&["redis", problem.reason()]).increment(1);
    }

    /// Publishes how things stand.
    fn report(&mut self) {
        let claimed = self.slots.iter().filter(|slot| slot.place.claimed).count();
        let connected = claimed == self.slots.len() && self.away.is_none();
        if connected != self.connected {
            self.connected = connected;
            telemetry::STORE_CONNECTED.gauge(&["redis"]).set(if connected { 1.0 } else { 0.0 });
            if connected {
                tracing::info!(agent = %self.parts.journal.agent(), "the store is connected");
            }
        }
        let mut reasons = self.problems();
        if reasons.is_empty() && !connected {
            // It is being asked; what was said before still holds.
            return;
        }
        let away = claimed == 0 && !reasons.is_empty();
        reasons.extend(self.warnings());
        self.publish(Status { connected, away, reasons });
    }

    fn report_only(&self, problem: &Problem) {
        self.count(problem);
        self.publish(Status { connected: false, away: true, reasons: vec![format!("store: {problem}")] });
    }

    fn publish(&self, status: Status) {
        if **self.shared.status.load() != status {
            self.shared.status.store(Arc::new(status));
        }
    }

    /// What fails at present.
    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<_> = self.away.iter().map(|away| format!("store: {}", away.problem)).collect();
        for (server, node) in &self.nodes {
            let count = self.slots.iter().filter(|slot| slot.server == *server).count();
            if let Some(away) = node.away.as_ref().filter(|_| count > 0) {
                problems.push(format!("store: {}{}", self.share(server, count), away.problem));
            }
        }
        let alone: Vec<_> = self.slots.iter().enumerate().filter(|(_, slot)| slot.away.is_some()).collect();
        if let Some((partition, slot)) = alone.first()
            && let Some(away) = &slot.away
        {
            let others = if alone.len() > 1 { format!(" and {} others", alone.len() - 1) } else { String::new() };
            problems.push(format!("store: partition {partition:03}{others}: {}", away.problem));
        }
        problems
    }

    /// Which server, where there are several, and how much of the store it is.
    fn share(&self, server: &Name, count: usize) -> String {
        match self.parts.config.mode {
            Mode::Cluster if !server.is_empty() => format!("{server} ({count} of {} partitions): ", self.slots.len()),
            Mode::Single | Mode::Sentinel | Mode::Cluster => String::new(),
        }
    }

    /// What works, and yet will not do.
    fn warnings(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        for (server, node) in &self.nodes {
            let count = self.slots.iter().filter(|slot| slot.server == *server).count();
            let share = self.share(server, count);
            let mut reason = |text: String| {
                if count > 0 {
                    reasons.push(format!("store: {share}{text}"));
                }
            };
            if let Some(policy) = &node.eviction {
                reason(format!(
                    "Redis throws series away when memory is short (maxmemory-policy {policy}); set noeviction"
                ));
            }
            if let Some((has, wanted)) = node.short_of_replicas {
                reason(format!(
                    "Redis has {has} of the {wanted} replicas that store.redis.replicas asks for; the outbox keeps all until they are there"
                ));
            }
            if let Some(error) = node.unsettled {
                reason(format!("Redis does not say what it would not lose, so the outbox keeps all: {error}"));
            }
        }
        if let Some(RolledBack { since, batches, samples }) = &*locked(&self.rolled_back)
            && since.elapsed() < ALARM
        {
            reasons.push(format!(
                "store: Redis lost {batches} batches with {samples} samples that it had acknowledged and that are kept nowhere else"
            ));
        }
        reasons
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.deadline.borrow().is_some()
    }

    /// Waits until asked to stop, and answers until when to go on.
    async fn stopping(&self) -> Instant {
        let mut deadline = self.deadline.subscribe();
        loop {
            if let Some(deadline) = *deadline.borrow_and_update() {
                return deadline;
            }
            // It can't end before this does: both are ours.
            drop(deadline.changed().await);
        }
    }

    async fn past_deadline(&self) {
        let deadline = self.stopping().await;
        tokio::time::sleep_until(deadline.into()).await;
    }
}

/// What the tasks need.
#[derive(Clone)]
struct Session {
    connection: Connection,
    asker: Arc<Asker>,
    /// Nonces under which a partition may still be ours.
    known: Arc<Vec<String>>,
    journal: Arc<Journal>,
    on_deleted: OnDeleted,
    shared: Arc<Shared>,
    rolled_back: Arc<Mutex<Option<RolledBack>>>,
}

impl Session {
    /// Does what there is to do for a partition. Where it stands then holds also after a problem.
    async fn visit(self, partition: Partition, server: Name, mut place: Place, poll: bool) -> Done {
        let outcome = self.attend(partition, &mut place, poll).await;
        place.claimed = outcome.is_ok();
        Done::Visited { partition, server, place, outcome }
    }

    async fn attend(&self, partition: Partition, place: &mut Place, poll: bool) -> Result<(), Problem> {
        if !place.claimed {
            self.claim(partition, place).await?;
        }
        self.ship(partition, place).await?;
        if poll {
            self.poll(partition, place).await?;
            self.ship(partition, place).await?;
        }
        Ok(())
    }

    /// Makes a partition ours and finds out where it stands.
    async fn claim(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        let (maker, last) = self.journal.inherited(partition);
        let inherited = Inherited { maker, last };
        match self.connection.claim(&self.asker, partition, place.seen, &self.known, &inherited).await? {
            Claimed::Ours { sequence, samples, seen, news } => {
                place.seen = Some(seen);
                let now_ms = news.now_ms;
                self.hear(place, news);
                self.resume(partition, place, Stored { sequence, samples, now_ms }).await
            }
            Claimed::Clone(inherited) => Err(Problem::Clone(inherited)),
        }
    }

    /// Goes on from the sequence that the store has.
    async fn resume(&self, partition: Partition, place: &mut Place, stored: Stored) -> Result<(), Problem> {
        let Stored { sequence: stored, samples, now_ms } = stored;
        (place.stored, place.applied_ms, place.renewed) = (stored, now_ms, true);
        match self.journal.resequence(partition, stored, samples)? {
            Resequenced::Continues => Ok(()),
            Resequenced::JournalBehind => {
                tracing::warn!(partition, stored, "the store has batches that this journal, an older copy, never sent");
                Ok(())
            }
            Resequenced::StoreBehind { lost, samples } => self.leap(partition, place, lost, samples).await,
        }
    }

    /// Brings a store that lost batches that nobody has any more to where the outbox begins.
    async fn leap(&self, partition: Partition, place: &mut Place, lost: u64, samples: u64) -> Result<(), Problem> {
        let sequence = place.stored + lost;
        // Counted before it is so: an answer that does not come must not hide it, and counts nothing twice.
        let lost = self.journal.write_off(partition, place.stored, samples);
        self.count_lost(partition, lost, samples);
        let empty = Batch { partition, sequence, flush: 0, samples: 0, operations: Vec::new() };
        match self.connection.apply(&self.asker, &empty, place.stored, place.seen.unwrap_or(0)).await? {
            Applied::Stored { sequence, news, .. } => {
                place.stored = sequence;
                self.hear(place, news);
            }
            Applied::Gap { .. } | Applied::NotOwner => return Err(Problem::Restless),
        }
        Ok(())
    }

    /// Counts what the store lost.
    fn count_lost(&self, partition: Partition, lost: u64, samples: u64) {
        if (lost, samples) == (0, 0) {
            return;
        }
        telemetry::LOST.counter(&[ROLLED_BACK]).increment(lost);
        telemetry::LOST_SAMPLES.counter(&[ROLLED_BACK]).increment(samples);
        tracing::error!(
            partition,
            lost,
            samples,
            "the store lost batches that it had acknowledged and that are kept nowhere else"
        );
        let mut rolled_back = locked(&self.rolled_back);
        let before = rolled_back.filter(|before| before.since.elapsed() < ALARM);
        let (batches, before) = before.map_or((0, 0), |before| (before.batches, before.samples));
        *rolled_back = Some(RolledBack { since: Instant::now(), batches: batches + lost, samples: before + samples });
    }

    /// Sends a partition's batches, one after the other, until there are no more.
    async fn ship(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        let mut tries = 0;
        loop {
            let batches = self.journal.outbox(partition, place.stored, READ_BYTES)?;
            if batches.is_empty() {
                return Ok(());
            }
            for batch in &batches {
                if self.send(batch, place).await? {
                    tries = 0;
                } else {
                    tries += 1;
                    break;
                }
            }
            if tries >= TRIES {
                return Err(Problem::Restless);
            }
        }
    }

    /// Sends a batch. `false` when the store is elsewhere: then `place` says where.
    async fn send(&self, batch: &Batch, place: &mut Place) -> Result<bool, Problem> {
        let seen = place.seen.unwrap_or(0);
        match self.connection.apply(&self.asker, batch, place.stored, seen).await? {
            Applied::Stored { sequence, failed, news } => {
                for (at, failure) in &failed {
                    telemetry::LOST.counter(&[failure.reason()]).increment(1);
                    let operation = batch.operations.get(*at);
                    let samples = operation.map_or(0, |operation| samples_of(&operation.delta));
                    telemetry::LOST_SAMPLES.counter(&[failure.reason()]).increment(samples);
                    let key = operation.map_or("", |operation| operation.key.as_str());
                    tracing::warn!(
                        key,
                        samples,
                        reason = failure.reason(),
                        "the store could not apply a change of a series"
                    );
                }
                place.stored = sequence;
                place.applied_ms = place.applied_ms.max(news.now_ms);
                self.journal.acknowledge(batch.partition, sequence);
                self.hear(place, news);
                Ok(true)
            }
            Applied::Gap { sequence, samples, news } => {
                let now_ms = news.now_ms;
                self.hear(place, news);
                self.resume(batch.partition, place, Stored { sequence, samples, now_ms }).await?;
                Ok(false)
            }
            Applied::NotOwner => {
                self.claim(batch.partition, place).await?;
                Ok(false)
            }
        }
    }

    /// Asks for deletes, and whether the store still has what it had: a failover may have lost what it acknowledged.
    async fn poll(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        let Polled { sequence, news, .. } =
            self.connection.poll(&self.asker, partition, place.seen.unwrap_or(0)).await?;
        self.hear(place, news);
        if sequence == place.stored {
            return Ok(());
        }
        // It may not be ours any more either.
        self.claim(partition, place).await
    }

    fn hear(&self, place: &mut Place, news: News) {
        if news.expired > 0 {
            telemetry::STORE_EXPIRED.counter(&[]).increment(news.expired);
        }
        let Some(last) = news.deletes.last() else { return };
        place.seen = Some(last.number.max(place.seen.unwrap_or(0)));
        let mut own = locked(&self.shared.own);
        let others: Vec<_> = news.deletes.into_iter().filter(|deleted| !own.remove(deleted)).collect();
        drop(own);
        if !others.is_empty() {
            (self.on_deleted)(others);
        }
    }
}

fn all() -> Vec<Partition> {
    (0..=Partition::MAX).collect()
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What stands behind these locks is replaced as a whole, so a panic elsewhere leaves it sound.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// 128 random bits, or where the kernel has none the next best: a nonce need only differ from those before.
fn nonce() -> String {
    let mut bytes = [0; 16];
    if getrandom::fill(&mut bytes).is_err() {
        bytes[..8].copy_from_slice(&crate::clock::wall_ms().to_le_bytes());
        bytes[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    }
    bytes.iter().fold(String::with_capacity(32), |text, byte| text + &format!("{byte:02x}"))
}

fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}
