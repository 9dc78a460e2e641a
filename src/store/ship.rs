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

use super::journal::{self, Journal, PARTITIONS};
use super::redis::{Asker, Config, Connection, Deleted, Durability, Inherited, Limits, Mode, Stable, backoff};
use super::{Partition, redis};
use crate::telemetry;
use crate::units::Time;

mod report;
#[cfg(test)]
mod tests;
mod unstable;
mod visit;

use unstable::Unstable;
use visit::{Place, Session};

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
    let run = move || {
        runtime.block_on(shipper.run());
        // A name that is being looked up holds up no stop.
        runtime.shutdown_background();
    };
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
                    Ok(()) => self.went_well(partition, &server),
                    Err(problem) => self.failed(partition, &server, problem)?,
                }
                self.prune()
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

    fn went_well(&mut self, partition: Partition, server: &Name) {
        self.away = None;
        self.slots[usize::from(partition)].away = None;
        if let Some(node) = self.nodes.get_mut(server)
            && node.away.take().is_some()
        {
            tracing::info!(%server, "the store answers again");
        }
    }

    fn failed(&mut self, partition: Partition, server: &Name, problem: Problem) -> Result<(), Problem> {
        self.enqueue(partition);
        match problem {
            Problem::Store(error) if error.concerns_node() => self.server_failed(server, error),
            Problem::Store(_) | Problem::Restless => {
                self.count(&problem);
                let is_last = self.stopping;
                let slot = &mut self.slots[usize::from(partition)];
                if slot.away.is_none() {
                    tracing::warn!(partition, %problem, "the store did not take what it was sent; it is sent again");
                }
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
        // What is under way may be there already; it is not known yet as sent.
        let sequence = sequence.min(self.slots[usize::from(partition)].place.stored);
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
