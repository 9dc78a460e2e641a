//! The outbox into the store: one thread, one connection, the batches of a partition in order and many partitions at once.
//!
//! Nobody waits for it. An error drops the connection; after a pause that grows to 5 s it connects, claims every partition
//! again and sends on from where the store says it is, the same batches under the same numbers, so that a store that is
//! away, slow, restarted or older than it was costs time and never counts twice. It decides nothing about batches: the
//! journal numbers, keeps and merges them, the store compares.
//!
//! Limits: `redis_connect`, `redis_reply`. Metrics: `tallyd_store_connected`, `tallyd_store_errors_total{store="redis"}`,
//! `tallyd_store_expired_total`, `tallyd_lost_total`.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::journal::{self, Journal, Resequenced};
use super::redis::{Applied, Asker, Claimed, Config, Connection, Deleted, Durability, Limits, News, backoff};
use super::{Batch, Partition, redis, samples_of};
use crate::telemetry;
use crate::units::Time;

#[cfg(test)]
mod tests;
mod unstable;

use unstable::Unstable;

/// How many partitions have a request under way at a time.
const IN_FLIGHT: usize = 32;

/// Bytes of batches that are read from the journal for one partition at a time.
const READ_BYTES: usize = 1 << 20;

/// How often the store is asked for deletes, and whether it still throws nothing away.
const POLL: Duration = Duration::from_secs(10);

/// How often it is asked what it would not lose any more.
const SETTLE: Duration = Duration::from_secs(1);

/// How long a store that has lost what it acknowledged is a reason not to be ready.
const ALARM: Duration = Duration::from_secs(3_600);

/// How often in a row a partition may be claimed, or found elsewhere, before the connection is given up.
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
    /// Whether it answers.
    pub connected: bool,
    /// Whether it was asked and did not answer: a reader need not wait for it to find that out.
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

/// Why a connection was given up.
#[derive(Debug)]
enum Problem {
    /// The store did not do what was asked.
    Store(redis::Error),
    /// The outbox could not be read or written.
    Journal(journal::Error),
    /// Another process writes under our name.
    Clone,
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
            Self::Clone => "clone",
            Self::Restless => "restless",
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::Journal(error) => write!(f, "the outbox: {error}"),
            Self::Clone => write!(f, "another agent has our name in the store; this one takes a new name"),
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
}

/// The thread's own state, from one connection to the next.
struct Shipper {
    parts: Parts,
    shared: Arc<Shared>,
    places: Vec<Place>,
    /// The nonce of the last claims, and whether all of them were granted.
    owner: Option<(String, bool)>,
    unstable: Unstable,
    eviction: Option<String>,
    rolled_back: Arc<Mutex<Option<RolledBack>>>,
}

/// What the store had acknowledged and lost, not long ago.
#[derive(Debug, Clone, Copy)]
struct RolledBack {
    since: Instant,
    batches: u64,
    samples: u64,
}

/// How a connection ended.
enum End {
    /// There is nothing left to ship, and we were asked to stop.
    Stopped,
    Failed(Problem),
}

impl Shipper {
    fn new(parts: Parts, shared: Arc<Shared>) -> Self {
        Self {
            parts,
            shared,
            places: vec![Place::default(); usize::from(Partition::MAX) + 1],
            owner: None,
            unstable: Unstable::default(),
            eviction: None,
            rolled_back: Arc::default(),
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

    /// Connects again and again.
    async fn work(&mut self) {
        let mut failures = 0;
        loop {
            let problem = match self.connected(&mut failures).await {
                End::Stopped => return,
                End::Failed(problem) => problem,
            };
            telemetry::STORE_ERRORS.counter(&["redis", problem.reason()]).increment(1);
            telemetry::STORE_CONNECTED.gauge(&["redis"]).set(0.0);
            self.report(Some(&problem.to_string()));
            if failures == 0 {
                tracing::warn!(%problem, "the store is away; the outbox keeps what comes");
            }
            if matches!(problem, Problem::Clone) && self.rename() {
                continue;
            }
            if self.shared.is_stopping() && (failures > 0 || self.parts.journal.pending().is_empty()) {
                // What is left is in the journal; a store that is away now would only hold up the stop.
                return;
            }
            failures += 1;
            // Asked to stop, it tries once more at once.
            drop(tokio::time::timeout(backoff(failures, random()), self.shared.stopping()).await);
        }
    }

    /// Takes a new name in the store. `false` when it could not be written down.
    fn rename(&mut self) -> bool {
        self.owner = None;
        match self.parts.journal.mint_agent() {
            Ok((agent, shared)) => {
                tracing::error!(%agent, dropped = shared, "another agent had our name in the store, so this one has a new one");
                true
            }
            Err(error) => {
                tracing::error!(%error, "no new name could be written down");
                false
            }
        }
    }

    /// One connection, from its first byte to its end.
    async fn connected(&mut self, failures: &mut u32) -> End {
        let begun = async {
            let session = self.open().await?;
            self.claim_all(&session).await?;
            Ok::<_, Problem>(session)
        };
        let session = match begun.await {
            Ok(session) => session,
            Err(problem) => return End::Failed(problem),
        };
        *failures = 0;
        telemetry::STORE_CONNECTED.gauge(&["redis"]).set(1.0);
        self.report(None);
        tracing::info!(agent = session.asker.agent, "the store is connected");
        match self.serve(&session).await {
            Ok(()) => End::Stopped,
            Err(problem) => End::Failed(problem),
        }
    }

    /// Ships what comes until asked to stop.
    async fn serve(&mut self, session: &Session) -> Result<(), Problem> {
        let mut polled = Instant::now();
        let mut settled = Instant::now();
        loop {
            self.ship_all(session).await?;
            if self.shared.is_stopping() && self.parts.journal.pending().is_empty() {
                return Ok(());
            }
            if !self.unstable.is_empty() && settled.elapsed() >= SETTLE {
                settled = Instant::now();
                self.settle(session).await?;
            }
            if polled.elapsed() >= POLL {
                polled = Instant::now();
                self.settle(session).await?;
                self.across(all(), |partition, place| session.clone().poll(partition, place)).await?;
            }
            self.report(None);
            let pause = if self.unstable.is_empty() { POLL } else { SETTLE };
            // Running into the pause is as good as being woken.
            drop(tokio::time::timeout(pause, self.shared.wake.notified()).await);
        }
    }

    async fn open(&mut self) -> Result<Session, Problem> {
        let Parts { journal, config, limits, expire, on_deleted } = &self.parts;
        let connection = Connection::open(config, limits).await?;
        let owner = match &self.owner {
            // Claims that were broken off may have been granted or not: with the same nonce that makes no difference.
            Some((owner, false)) => owner.clone(),
            Some((_, true)) | None => {
                let owner = nonce();
                journal.push_owner(&owner)?;
                owner
            }
        };
        self.owner = Some((owner.clone(), false));
        Ok(Session {
            connection,
            asker: Arc::new(Asker { agent: journal.agent().to_string(), owner, expire: *expire }),
            known: Arc::new(journal.owners()),
            journal: Arc::clone(journal),
            on_deleted: Arc::clone(on_deleted),
            shared: Arc::clone(&self.shared),
            rolled_back: Arc::clone(&self.rolled_back),
        })
    }

    async fn claim_all(&mut self, session: &Session) -> Result<(), Problem> {
        self.across(all(), |partition, place| session.clone().claim(partition, place)).await?;
        if let Some((_, granted)) = &mut self.owner {
            *granted = true;
        }
        self.parts.journal.prune_owners()?;
        // What was applied on another connection counts from now on: the store may have restarted since.
        self.unstable = Unstable::default();
        let claimed_ms = self.places.iter().map(|place| place.applied_ms).max().unwrap_or(0);
        let stored = self.places.iter().map(|place| place.stored);
        self.unstable.applied(claimed_ms, (0..=Partition::MAX).zip(stored));
        self.places.iter_mut().for_each(|place| place.applied_ms = 0);
        self.settle(session).await
    }

    async fn ship_all(&mut self, session: &Session) -> Result<(), Problem> {
        let pending = self.parts.journal.pending();
        if pending.is_empty() {
            return Ok(());
        }
        self.across(pending, |partition, place| session.clone().ship(partition, place)).await?;
        let applied: Vec<_> = all().into_iter().zip(&self.places).filter(|(_, place)| place.applied_ms > 0).collect();
        let applied_ms = applied.iter().map(|(_, place)| place.applied_ms).max().unwrap_or(0);
        self.unstable.applied(applied_ms, applied.into_iter().map(|(partition, place)| (partition, place.stored)));
        self.places.iter_mut().for_each(|place| place.applied_ms = 0);
        Ok(())
    }

    /// Lets the journal drop what the store would not lose.
    async fn settle(&mut self, session: &Session) -> Result<(), Problem> {
        let Durability { stable_before_ms, eviction } = Durability::ask(&session.connection).await?;
        for (partition, sequence) in self.unstable.stable_before(stable_before_ms) {
            self.parts.journal.stable(partition, sequence);
        }
        self.eviction = eviction;
        Ok(())
    }

    /// Does a task for partitions, some at a time. The first problem ends them all.
    async fn across<F>(
        &mut self,
        partitions: Vec<Partition>,
        task: impl Fn(Partition, Place) -> F,
    ) -> Result<(), Problem>
    where
        F: Future<Output = Result<(Partition, Place), Problem>> + Send + 'static,
    {
        let mut waiting = partitions.into_iter();
        let mut under_way = JoinSet::new();
        loop {
            while under_way.len() < IN_FLIGHT
                && let Some(partition) = waiting.next()
            {
                under_way.spawn(task(partition, self.places[usize::from(partition)]));
            }
            match under_way.join_next().await {
                None => return Ok(()),
                Some(Ok(done)) => {
                    let (partition, place) = done?;
                    self.places[usize::from(partition)] = place;
                }
                // It panicked, which the panic has reported.
                Some(Err(_)) => return Err(Problem::Restless),
            }
        }
    }

    /// Publishes how things stand.
    fn report(&self, problem: Option<&str>) {
        let mut reasons: Vec<_> = problem.map(|problem| format!("store: {problem}")).into_iter().collect();
        if let Some(policy) = &self.eviction {
            reasons.push(format!(
                "store: Redis throws series away when memory is short (maxmemory-policy {policy}); set noeviction"
            ));
        }
        if let Some(RolledBack { since, batches, samples }) = &*locked(&self.rolled_back)
            && since.elapsed() < ALARM
        {
            reasons.push(format!(
                "store: Redis lost {batches} batches with {samples} samples that it had acknowledged and that are kept nowhere else"
            ));
        }
        let status = Status { connected: problem.is_none(), away: problem.is_some(), reasons };
        if **self.shared.status.load() != status {
            self.shared.status.store(Arc::new(status));
        }
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

/// What the tasks of one connection need.
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
    /// Makes a partition ours and finds out where it stands.
    async fn claim(self, partition: Partition, mut place: Place) -> Result<(Partition, Place), Problem> {
        self.claim_at(partition, &mut place).await?;
        Ok((partition, place))
    }

    async fn claim_at(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        match self.connection.claim(&self.asker, partition, place.seen, &self.known).await? {
            Claimed::Ours { sequence, samples, seen, news } => {
                place.seen = Some(seen);
                place.applied_ms = news.now_ms;
                self.hear(place, news);
                self.resume(partition, place, sequence, samples).await
            }
            Claimed::Clone => Err(Problem::Clone),
        }
    }

    /// Goes on from the sequence that the store has.
    async fn resume(&self, partition: Partition, place: &mut Place, stored: u64, samples: u64) -> Result<(), Problem> {
        place.stored = stored;
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
        let empty = Batch { partition, sequence, flush: 0, samples: 0, operations: Vec::new() };
        match self.connection.apply(&self.asker, &empty, place.stored, place.seen.unwrap_or(0)).await? {
            Applied::Stored { sequence, news, .. } => {
                place.stored = sequence;
                self.hear(place, news);
            }
            Applied::Gap { .. } | Applied::NotOwner => return Err(Problem::Restless),
        }
        self.journal.write_off(partition, samples);
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
        Ok(())
    }

    /// Sends a partition's batches, one after the other, until there are no more.
    async fn ship(self, partition: Partition, mut place: Place) -> Result<(Partition, Place), Problem> {
        let mut tries = 0;
        loop {
            let batches = self.journal.outbox(partition, place.stored, READ_BYTES)?;
            if batches.is_empty() {
                return Ok((partition, place));
            }
            for batch in &batches {
                if self.send(batch, &mut place).await? {
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
                self.hear(place, news);
                self.resume(batch.partition, place, sequence, samples).await?;
                Ok(false)
            }
            Applied::NotOwner => {
                self.claim_at(batch.partition, place).await?;
                Ok(false)
            }
        }
    }

    /// Asks for deletes.
    async fn poll(self, partition: Partition, mut place: Place) -> Result<(Partition, Place), Problem> {
        let news = self.connection.poll(&self.asker, partition, place.seen.unwrap_or(0)).await?;
        self.hear(&mut place, news);
        Ok((partition, place))
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
