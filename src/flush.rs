//! Every interval: seal, fold, journal, ship.
//!
//! Two threads. The fold receives what the workers seal, writes the ledger, tells waiting readers when what they asked for
//! is in it, closes windows and expires idle series. The flush writes what changed into the journal, one transaction an
//! interval; while it is busy the fold goes on, and the next flush takes more. Neither is ever waited for by a worker.
//!
//! Metrics: `tallyd_series*`, `tallyd_fold_seconds`, `tallyd_flush*`, `tallyd_lost_total`.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use crossbeam_channel::RecvTimeoutError;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::aggregate::etsy;
use crate::aggregate::fold::Writer;
use crate::aggregate::ledger::{At, Changed, Ledger, Series, Total};
use crate::aggregate::shard::{Budget, SeriesId};
use crate::clock;
use crate::heartbeat::Beat;
use crate::ingest::{Delivery, Returned, Workers};
use crate::receipt::Receipt;
use crate::sample::{Kind, Marks, SeriesKey};
use crate::store::journal::{self, Beside, Journal};
use crate::sync::{AtomicU64, Receiver, Sender, bounded, unbounded};
use crate::telemetry;
use crate::units::Time;

/// The section `[flush]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// How often what changed is written out; it must divide `window`.
    pub interval: Time,
    /// How long the windows of statistics are.
    pub window: Time,
    /// The figures of a window that Etsy's StatsD would flush.
    #[serde(flatten)]
    pub etsy: etsy::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self { interval: Time::secs(1), window: Time::secs(10), etsy: etsy::Config::default() }
    }
}

/// The rows of `[limits]` about idle series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// After how long without a sample a series is freed from memory.
    pub idle: Time,
    /// The same for gauges.
    pub idle_gauges: Time,
}

impl Default for Limits {
    fn default() -> Self {
        Self { idle: Time::secs(3_600), idle_gauges: Time::secs(86_400) }
    }
}

/// Seals that readers ask for begin at most this often.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// How soon it is tried again to hand over what somebody waits for.
const KEEP_SOON: Duration = Duration::from_millis(5);

/// How late a shard may deliver before windows close and flushes go on without it.
const LATE_MS: u64 = 2_000;

/// After how long a flush that failed is tried again when nothing new comes.
const RETRY: Duration = Duration::from_secs(1);

/// What the fold is told by others.
enum Order {
    /// Answer when a seal that starts now is folded.
    Fresh(oneshot::Sender<()>),
    /// Answer when what a seal that starts now has is in the journal.
    Kept(oneshot::Sender<()>),
    /// From now on receipts come: answer when each flush will have just the samples of its own.
    Receipts(oneshot::Sender<()>),
    /// Let series start again from nothing, and answer when that is kept.
    Delete(Vec<SeriesId>, oneshot::Sender<()>),
    /// The same, for nobody.
    Forget(Vec<SeriesId>),
    /// The same, because a log of deletes says so; how far that was read is kept together with it.
    Follow(Vec<SeriesId>, Marks, Option<oneshot::Sender<()>>),
    /// A flush is in the journal.
    Committed(u64, Vec<Arc<Series>>),
    /// End when every worker has delivered its last, or at the deadline.
    Stop(Instant),
}

/// The running fold, as others see it.
#[derive(Clone)]
pub struct Fold {
    orders: Sender<Order>,
    status: Arc<Status>,
}

/// How fold and flush are doing.
#[derive(Debug, Default)]
pub struct Status {
    problem: ArcSwapOption<String>,
    flushed_until_ms: AtomicU64,
    /// The number of the last flush that is in the journal, of this process.
    flush: AtomicU64,
}

impl Status {
    /// Why the last flush failed, if it did.
    pub fn problem(&self) -> Option<String> {
        self.problem.load().as_deref().cloned()
    }

    /// Up to when accepted samples are in the journal, in milliseconds since the epoch.
    pub fn flushed_until_ms(&self) -> u64 {
        self.flushed_until_ms.load(Ordering::Acquire)
    }
}

impl Fold {
    /// Waits until a seal that starts after this call is folded: what was accepted before it can then be read.
    pub async fn fresh(&self) {
        let (answer, folded) = oneshot::channel();
        if self.orders.send(Order::Fresh(answer)).is_ok() {
            // It ends unanswered when the agent stops; the ledger is then as fresh as it will be.
            drop(folded.await);
        }
    }

    /// Waits until what was accepted before this call is in the journal; those who wait share a transaction. `false` when
    /// the agent stops before that. Without a journal there is nothing to wait for.
    pub async fn kept(&self) -> bool {
        let (answer, kept) = oneshot::channel();
        self.orders.send(Order::Kept(answer)).is_ok() && kept.await.is_ok()
    }

    /// To be waited for before the first receipt of a process: from then on a receipt and its samples are written in one
    /// transaction, and no other has a part of them. `false` when the agent stops before that.
    pub async fn keep_receipts(&self) -> bool {
        let (answer, ready) = oneshot::channel();
        self.orders.send(Order::Receipts(answer)).is_ok() && ready.await.is_ok()
    }

    /// Lets series start again from nothing. `false` when the agent stops before that is kept.
    pub async fn delete(&self, series: Vec<SeriesId>) -> bool {
        let (answer, kept) = oneshot::channel();
        self.orders.send(Order::Delete(series, answer)).is_ok() && kept.await.is_ok()
    }

    /// Lets series start again from nothing because another agent said so; nobody waits for it.
    pub fn forget(&self, series: Vec<SeriesId>) {
        // It fails only when the agent has stopped; the store tells it again.
        drop(self.orders.send(Order::Forget(series)));
    }

    /// Lets series start again from nothing because a log of deletes said so, which was read up to these marks. Who waits
    /// is told when that is kept.
    pub fn follow(&self, series: Vec<SeriesId>, marks: Marks, answer: Option<oneshot::Sender<()>>) {
        // As above: it is read again.
        drop(self.orders.send(Order::Follow(series, marks, answer)));
    }

    /// How fold and flush are doing.
    pub fn status(&self) -> &Status {
        &self.status
    }
}

/// Called after each commit. It must not block.
pub type OnCommit = Box<dyn Fn(&Written<'_>) + Send>;

/// What a flush wrote; without a journal nothing but the marks, of what is folded.
#[derive(Debug, Clone, Copy)]
pub struct Written<'a> {
    /// Its number.
    pub flush: u64,
    /// The series whose totals it wrote.
    pub changed: &'a [Changed],
    /// The series that it deleted first.
    pub deleted: &'a [(Kind, SeriesKey)],
    /// How far logs were read whose records are in it.
    pub marks: &'a Marks,
}

/// What the threads work on.
pub struct Parts {
    /// The workers that deliver.
    pub workers: Arc<Workers>,
    /// What they deliver.
    pub deliveries: Receiver<Delivery>,
    /// Where it goes.
    pub ledger: Arc<Ledger>,
    /// What the series are charged to.
    pub budget: Arc<Budget>,
    /// Where it is kept; none with `store.kind = "memory"`.
    pub journal: Option<Arc<Journal>>,
    /// Whether deltas are to be kept for a remote store.
    pub remote: bool,
    /// Whether what is written must be the totals as of the flush, because marks are written with them.
    pub exact: bool,
    /// Wakes those who ship.
    pub on_commit: OnCommit,
}

/// Fold and flush, running.
pub struct Running {
    fold: Fold,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// Reads the ledger back from the journal and starts both threads.
    ///
    /// # Errors
    /// When the journal cannot be read or a thread cannot be started.
    pub fn start(parts: Parts, config: &Config, limits: &Limits) -> Result<Self, Error> {
        begin_counters();
        let (orders, inbox) = unbounded();
        let status = Arc::new(Status::default());
        let journal = parts.journal.clone();
        let beats = Arc::clone(parts.workers.beats());
        let mut folding = Folding::new(parts, inbox, Arc::clone(&status), config, limits)?;
        let mut threads = Vec::new();
        if let Some(journal) = journal {
            let (jobs, taken) = bounded(1);
            let on_commit = std::mem::replace(&mut folding.on_commit, Box::new(|_| {}));
            let flushing =
                Flushing { journal, jobs: taken, orders: orders.clone(), status: Arc::clone(&status), on_commit };
            folding.jobs = Some(jobs);
            let beat = beats.begin("flush");
            threads.push(spawn("flush", move || flushing.run(&beat))?);
        }
        let beat = beats.begin("fold");
        threads.insert(0, spawn("fold", move || folding.run(&beat))?);
        Ok(Self { fold: Fold { orders, status }, threads })
    }

    /// The fold, for those who read or delete.
    pub fn fold(&self) -> Fold {
        self.fold.clone()
    }

    /// Waits until every worker has delivered its last, at most until the deadline, and what they delivered is flushed.
    pub fn stop(self, deadline: Instant) {
        drop(self.fold.orders.send(Order::Stop(deadline)));
        for thread in self.threads {
            drop(thread.join());
        }
    }
}

/// Why fold and flush could not start.
#[derive(Debug)]
pub enum Error {
    /// The journal could not be read back.
    Journal(journal::Error),
    /// A thread could not be started.
    Thread(io::Error),
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(Error::Thread)
}

/// What the fold knows of a worker.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    answers: u64,
    complete_until_ms: u64,
    last: bool,
}

/// Looks up the total of a series that the ledger does not hold.
type Recall = Box<dyn Fn(&SeriesId) -> Option<Total> + Send>;

/// The fold's thread.
struct Folding {
    workers: Arc<Workers>,
    deliveries: Receiver<Delivery>,
    orders: Receiver<Order>,
    ledger: Arc<Ledger>,
    writer: Writer,
    budget: Arc<Budget>,
    recall: Recall,
    on_commit: OnCommit,
    jobs: Option<Sender<Job>>,
    status: Arc<Status>,
    /// The number of the last flush that was handed over.
    handed_over: u64,
    /// Series that were deleted, and may still be in the journal: until this flush is in it.
    forgotten: HashMap<SeriesId, u64>,
    /// From when on a worker may have received something.
    begun_ms: u64,
    seen: Vec<Seen>,
    readers: Readers,
    deleted: Vec<SeriesId>,
    receipts: Vec<Receipt>,
    marks: Marks,
    /// Those who wait until what is here now is in the journal.
    keepers: Vec<oneshot::Sender<()>>,
    interval_ms: u64,
    next_flush_ms: u64,
    limits: Limits,
    next_expiry: Instant,
    stop: Option<Instant>,
}

/// Those who wait for a seal.
struct Readers {
    /// Asked since the last question to the workers.
    waiting: Vec<Reader>,
    /// The question the workers have not all answered, and who waits for it.
    open: Option<(u64, Vec<Reader>)>,
    opened: Option<Instant>,
}

/// Who waits for a seal.
enum Reader {
    /// To read what it has.
    Fresh(oneshot::Sender<()>),
    /// Until that is in the journal.
    Kept(oneshot::Sender<()>),
}

impl Readers {
    /// When the next question may be asked, if somebody waits for it.
    fn due(&self) -> Option<Instant> {
        if self.waiting.is_empty() || self.open.is_some() {
            return None;
        }
        Some(self.opened.map_or_else(Instant::now, |opened| opened + ASK_EVERY))
    }
}

impl Folding {
    fn new(
        parts: Parts,
        orders: Receiver<Order>,
        status: Arc<Status>,
        config: &Config,
        limits: &Limits,
    ) -> Result<Self, Error> {
        let flush = parts.journal.as_ref().map_or(0, |journal| journal.last_flush()) + 1;
        let (ledger, budget) = (parts.ledger, parts.budget);
        let mut writer = Writer::new(Arc::clone(&ledger), Arc::clone(&budget), parts.remote, flush);
        writer.takes_totals = parts.exact;
        if let Some(journal) = &parts.journal {
            restore(&mut writer, journal, limits).map_err(Error::Journal)?;
        }
        budget.ledger_is_read_back();
        let begun_ms = parts.workers.begun_ms();
        writer.close_until(begun_ms);
        let recall: Recall = match parts.journal {
            Some(journal) => Box::new(move |id| recall(&journal, id)),
            None => Box::new(|_| None),
        };
        let interval_ms = config.interval.as_millis();
        Ok(Self {
            workers: parts.workers,
            deliveries: parts.deliveries,
            orders,
            ledger,
            writer,
            budget,
            recall,
            on_commit: parts.on_commit,
            jobs: None,
            status,
            handed_over: 0,
            forgotten: HashMap::new(),
            begun_ms,
            seen: Vec::new(),
            readers: Readers { waiting: Vec::new(), open: None, opened: None },
            deleted: Vec::new(),
            receipts: Vec::new(),
            marks: Marks::new(),
            keepers: Vec::new(),
            interval_ms,
            next_flush_ms: next_multiple(begun_ms, interval_ms),
            limits: limits.clone(),
            next_expiry: Instant::now() + expire_every(limits),
            stop: None,
        })
    }

    fn run(mut self, beat: &Beat) {
        while !self.is_done() {
            beat.beat();
            let timeout = self.timeout();
            crossbeam_channel::select! {
                recv(self.deliveries) -> delivery => if let Ok(delivery) = delivery { self.fold(delivery) },
                recv(self.orders) -> order => if let Ok(order) = order { self.obey(order) },
                default(timeout) => {}
            }
            self.do_what_is_due();
        }
        self.finish();
    }

    fn do_what_is_due(&mut self) {
        self.answer_readers();
        self.expire_if_due();
        self.flush_if_due();
    }

    fn is_done(&self) -> bool {
        let Some(deadline) = self.stop else { return false };
        let delivered = self.seen.len() == self.workers.len() && self.seen.iter().all(|seen| seen.last);
        delivered || Instant::now() >= deadline
    }

    fn timeout(&self) -> Duration {
        if !self.keepers.is_empty() {
            // The flush is busy, and does not say when it has done.
            return KEEP_SOON;
        }
        let until_flush = Duration::from_millis(self.next_flush_ms.saturating_sub(clock::wall_ms()).clamp(5, 1_000));
        let until_due = self.readers.due().map_or(until_flush, |due| due.saturating_duration_since(Instant::now()));
        until_flush.min(until_due)
    }

    fn fold(&mut self, mut delivery: Delivery) {
        let begun = Instant::now();
        let is_journal_behind = self.is_journal_behind();
        let (recall, forgotten) = (&self.recall, &self.forgotten);
        let recall = |id: &SeriesId| if forgotten.contains_key(id) { None } else { recall(id) };
        self.writer.is_journal_behind = is_journal_behind;
        self.writer.fold(delivery.worker, &mut delivery.sealed, sealed_at(delivery.at_ms), recall);
        self.workers.give_back(delivery.worker, Returned::Cells(delivery.sealed.cells));
        self.workers.sources().add(delivery.sources);
        self.receipts.append(&mut delivery.receipts);
        self.marks.append(&mut delivery.marks);
        if self.seen.len() <= delivery.worker {
            let unseen = Seen { complete_until_ms: self.begun_ms, ..Seen::default() };
            self.seen.resize(delivery.worker + 1, unseen);
        }
        let Delivery { answers, complete_until_ms, last, .. } = delivery;
        self.seen[delivery.worker] = Seen { answers, complete_until_ms, last };
        telemetry::FOLD_SECONDS.histogram(&[]).record(begun.elapsed());
        self.publish();
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Fresh(answer) => self.readers.waiting.push(Reader::Fresh(answer)),
            Order::Kept(answer) => self.readers.waiting.push(Reader::Kept(answer)),
            Order::Receipts(answer) => {
                self.writer.takes_totals = true;
                self.keepers.push(answer);
            }
            Order::Delete(series, answer) => {
                self.delete(series);
                self.keepers.push(answer);
            }
            Order::Forget(series) => self.delete(series),
            Order::Follow(series, mut marks, answer) => {
                self.delete(series);
                self.marks.append(&mut marks);
                self.keepers.extend(answer);
            }
            Order::Committed(flush, series) => self.writer.committed(flush, &series),
            Order::Stop(deadline) => self.stop = Some(deadline),
        }
    }

    fn delete(&mut self, series: Vec<SeriesId>) {
        for id in &series {
            self.writer.reset(id);
            self.forgotten.insert(id.clone(), self.writer.next_flush());
        }
        self.deleted.extend(series);
    }

    /// Asks the workers when readers wait, and answers the readers when all workers have answered.
    fn answer_readers(&mut self) {
        if let Some((asked, _)) = &self.readers.open {
            let asked = *asked;
            let answered = self.seen.len() == self.workers.len()
                && self.seen.iter().all(|seen| seen.last || seen.answers >= asked);
            if answered && let Some((_, readers)) = self.readers.open.take() {
                readers.into_iter().for_each(|reader| self.serve(reader));
            }
        }
        if self.readers.due().is_some_and(|due| due <= Instant::now()) {
            let waiting = std::mem::take(&mut self.readers.waiting);
            self.readers.opened = Some(Instant::now());
            self.readers.open = Some((self.workers.ask(), waiting));
        }
    }

    /// What a reader waits for is folded.
    fn serve(&mut self, reader: Reader) {
        match reader {
            Reader::Fresh(waiting) => answer(waiting),
            Reader::Kept(waiting) => self.keepers.push(waiting),
        }
    }

    /// Closes windows, and hands what changed to the flush when every worker has sealed or one is too late.
    fn flush_if_due(&mut self) {
        let now_ms = clock::wall_ms();
        if self.next_flush_ms > now_ms + self.interval_ms {
            // The wall clock was set back.
            self.next_flush_ms = next_multiple(now_ms, self.interval_ms);
        }
        let complete = self.complete_until(now_ms);
        self.writer.close_until(complete);
        let due = complete >= self.next_flush_ms;
        if due {
            self.next_flush_ms = next_multiple(complete, self.interval_ms);
        }
        if due || !self.keepers.is_empty() {
            self.flush(complete);
        }
    }

    /// Until when all shards have delivered. One that is later than `LATE_MS` is not waited for, but nobody is late whose
    /// delivery waits here.
    fn complete_until(&self, now_ms: u64) -> u64 {
        let delivered = self.seen.iter().filter(|seen| !seen.last).map(|seen| seen.complete_until_ms);
        // A worker that has delivered nothing yet may have received something ever since it began.
        let begun = (self.seen.len() < self.workers.len()).then_some(self.begun_ms);
        let delivered = delivered.chain(begun).min().unwrap_or(now_ms);
        if self.deliveries.is_empty() { delivered.max(now_ms.saturating_sub(LATE_MS)) } else { delivered }
    }

    /// Gives the flush what changed, unless it is still busy with what it got before.
    fn flush(&mut self, until_ms: u64) {
        let Some(jobs) = self.jobs.clone() else {
            self.writer.pass_over_changed();
            self.keepers.drain(..).for_each(answer);
            self.deleted.clear();
            self.receipts.clear();
            self.forgotten.clear();
            let marks = std::mem::take(&mut self.marks);
            (self.on_commit)(&Written {
                flush: self.writer.next_flush() - 1,
                changed: &[],
                deleted: &[],
                marks: &marks,
            });
            return;
        };
        // Before idle series can go the journal must have caught up; where each commit outlasts its interval it would never.
        if jobs.is_full() || self.is_expiry_due() && self.is_journal_behind() {
            return;
        }
        let job = self.next_job(until_ms);
        // It can only fail when the flush's thread has ended, after the last job.
        drop(jobs.send(job));
    }

    /// All that changed since the last job.
    fn next_job(&mut self, until_ms: u64) -> Job {
        let flush = self.writer.next_flush();
        let flushed = self.status.flush.load(Ordering::Acquire);
        self.forgotten.retain(|_, flush| *flush > flushed);
        self.handed_over = flush;
        Job {
            flush,
            changed: self.writer.take_changed(),
            deleted: std::mem::take(&mut self.deleted),
            receipts: std::mem::take(&mut self.receipts),
            marks: std::mem::take(&mut self.marks),
            keepers: std::mem::take(&mut self.keepers),
            until_ms,
        }
    }

    fn is_expiry_due(&self) -> bool {
        Instant::now() >= self.next_expiry
    }

    fn expire_if_due(&mut self) {
        if !self.is_expiry_due() || self.is_journal_behind() {
            return;
        }
        self.next_expiry = Instant::now() + expire_every(&self.limits);
        let now_ms = clock::steady_ms();
        let Limits { idle, idle_gauges } = self.limits;
        let before_ms = |kind| now_ms.saturating_sub(if kind == Kind::Gauge { idle_gauges } else { idle }.as_millis());
        for (worker, numbers) in self.writer.expire(before_ms).into_iter().enumerate() {
            if !numbers.is_empty() {
                self.workers.give_back(worker, Returned::Retire(numbers));
            }
        }
        self.publish();
    }

    /// Whether the journal is behind, or cannot be written: a series freed now could come back from it as it was before.
    fn is_journal_behind(&self) -> bool {
        self.jobs.is_some() && self.status.flush.load(Ordering::Acquire) < self.handed_over
    }

    fn publish(&mut self) {
        for kind in Kind::ALL {
            telemetry::SERIES_CREATED.take(&[kind.json()], &mut self.writer.created[kind as usize]);
            telemetry::SERIES_EXPIRED.take(&[kind.json()], &mut self.writer.expired[kind as usize]);
            telemetry::SERIES.gauge(&[kind.json()]).set(self.writer.held[kind as usize] as f64);
        }
        telemetry::LOST.take(&[NON_FINITE], &mut self.writer.overflowed);
        telemetry::LOST_SAMPLES.take(&[NON_FINITE], &mut self.writer.overflowed_samples);
        telemetry::SERIES_COARSENED.take(&["buckets"], &mut self.writer.halved);
        telemetry::SERIES_COARSENED.take(&["set_exact"], &mut self.writer.estimated);
        telemetry::SERIES_MEMORY_BYTES.gauge(&[]).set(self.budget.bytes() as f64);
    }

    /// Folds what is left and flushes it.
    fn finish(mut self) {
        while let Ok(delivery) = self.deliveries.try_recv() {
            self.fold(delivery);
        }
        self.writer.close_until(clock::wall_ms());
        if let Some(jobs) = self.jobs.take() {
            // See `flush` for when it can fail.
            drop(jobs.send(self.next_job(clock::wall_ms())));
        } else {
            self.flush(clock::wall_ms());
        }
        let windows = self.ledger.closed_until_ms();
        tracing::debug!(series = self.ledger.len(), windows, "fold ended");
    }
}

/// Why an accepted change is lost here: a sum would not be finite, or the total to add it to can't be read.
const NON_FINITE: &str = "non_finite";
const UNREADABLE: &str = "journal_unreadable";

fn begin_counters() {
    telemetry::SERIES_CREATED.begin(Kind::ALL.map(|kind| [kind.json()]));
    telemetry::SERIES_EXPIRED.begin(Kind::ALL.map(|kind| [kind.json()]));
    telemetry::SERIES_COARSENED.begin([["buckets"], ["set_exact"]]);
    telemetry::LOST.begin([[NON_FINITE], [UNREADABLE]]);
    telemetry::LOST_SAMPLES.begin([[NON_FINITE]]);
}

/// A moment by both clocks, from how long ago it was by the wall clock. A wall clock that was set forward since would make
/// that long, and what it was late by is not known then; nothing waits longer than this.
fn sealed_at(at_ms: u64) -> At {
    let ago_ms = clock::wall_ms().saturating_sub(at_ms).min(LATE_MS);
    At { wall_ms: at_ms, steady_ms: clock::steady_ms() - ago_ms }
}

/// Tells somebody who waits; one that is gone needs no answer.
fn answer(waiting: oneshot::Sender<()>) {
    let _ = waiting.send(());
}

fn next_multiple(now_ms: u64, interval_ms: u64) -> u64 {
    (now_ms / interval_ms + 1) * interval_ms
}

/// Idle series are looked for twenty times in the time after which they expire, at least each minute.
fn expire_every(limits: &Limits) -> Duration {
    (limits.idle.0.min(limits.idle_gauges.0) / 20).clamp(Duration::from_millis(100), Duration::from_secs(60))
}

/// Puts back the series that were not idle for too long.
fn restore(writer: &mut Writer, journal: &Journal, limits: &Limits) -> Result<(), journal::Error> {
    let now_ms = clock::steady_ms();
    journal.totals(|kind, key, total| {
        let idle = if kind == Kind::Gauge { limits.idle_gauges } else { limits.idle };
        if total.update_ms + idle.as_millis() > now_ms {
            writer.restore(kind, key, total, now_ms);
        }
    })
}

fn recall(journal: &Journal, id: &SeriesId) -> Option<Total> {
    journal.total(id.kind, &id.key).unwrap_or_else(|error| {
        tracing::error!(%error, series = %id.key, "the journal could not be read for a series that returned");
        telemetry::LOST.counter(&[UNREADABLE]).increment(1);
        None
    })
}

/// What one flush writes.
struct Job {
    flush: u64,
    changed: Vec<Changed>,
    deleted: Vec<SeriesId>,
    receipts: Vec<Receipt>,
    marks: Marks,
    keepers: Vec<oneshot::Sender<()>>,
    until_ms: u64,
}

impl Job {
    /// Puts a later job on top of one that could not be written.
    fn absorb(&mut self, mut later: Self) {
        self.changed.retain(|changed| {
            !later.deleted.iter().any(|id| id.kind == changed.series.kind() && id.key == *changed.series.key())
        });
        let mut places: HashMap<*const Series, usize> = HashMap::new();
        for (place, changed) in self.changed.iter().enumerate() {
            places.insert(Arc::as_ptr(&changed.series), place);
        }
        for changed in later.changed {
            match places.entry(Arc::as_ptr(&changed.series)) {
                Entry::Occupied(place) => add_changed(&mut self.changed[*place.get()], changed),
                Entry::Vacant(_) => self.changed.push(changed),
            }
        }
        self.flush = later.flush;
        self.until_ms = later.until_ms;
        self.deleted.extend(later.deleted);
        self.receipts.extend(later.receipts);
        self.marks.append(&mut later.marks);
        self.keepers.extend(later.keepers);
    }
}

fn add_changed(earlier: &mut Changed, later: Changed) {
    earlier.total = later.total;
    match (&mut earlier.shipped, later.shipped) {
        (Some(sum), Some(later)) => {
            Arc::make_mut(&mut sum.delta).merge(&later.delta, 0);
            sum.total = later.total;
        }
        (Some(_), None) => {}
        (shipped @ None, later) => *shipped = later,
    }
}

/// The flush's thread.
struct Flushing {
    journal: Arc<Journal>,
    jobs: Receiver<Job>,
    orders: Sender<Order>,
    status: Arc<Status>,
    on_commit: OnCommit,
}

impl Flushing {
    fn run(self, beat: &Beat) {
        let mut unwritten: Option<Job> = None;
        loop {
            beat.rest();
            let next = if unwritten.is_some() { self.jobs.recv_timeout(RETRY) } else { self.wait() };
            beat.beat();
            match (next, &mut unwritten) {
                (Ok(job), Some(earlier)) => earlier.absorb(job),
                (Ok(job), None) => unwritten = Some(job),
                (Err(RecvTimeoutError::Timeout), _) => {}
                (Err(RecvTimeoutError::Disconnected), _) => break,
            }
            if let Some(mut job) = unwritten.take() {
                self.journal.trim_receipts(&mut job.receipts);
                unwritten = self.write(job).err().map(|job| *job);
            }
        }
        if let Some(job) = unwritten.and_then(|job| self.write(job).err()) {
            let problem = self.status.problem().unwrap_or_default();
            tracing::error!(series = job.changed.len(), problem, "stopped with changes that the journal did not take");
        }
    }

    fn wait(&self) -> Result<Job, RecvTimeoutError> {
        self.jobs.recv().map_err(|_| RecvTimeoutError::Disconnected)
    }

    /// Writes a job in one transaction. The error is the job, for the next attempt.
    fn write(&self, job: Job) -> Result<(), Box<Job>> {
        let begun = Instant::now();
        let deleted: Vec<_> = job.deleted.iter().map(|id| (id.kind, id.key.clone())).collect();
        // What is kept for days goes by the clock that is behind: a wall clock that is wrong for a while expires nothing.
        let now_ms = job.until_ms.min(clock::steady_ms());
        let beside = Beside { receipts: &job.receipts, marks: &job.marks };
        if let Err(error) = self.journal.commit_with(job.flush, &job.changed, &deleted, beside, now_ms) {
            if self.status.problem().is_none() {
                tracing::error!(%error, "the journal could not be written; counting goes on in memory");
            }
            self.status.problem.store(Some(Arc::new(format!("journal: {error}"))));
            let behind = clock::wall_ms().saturating_sub(self.status.flushed_until_ms());
            telemetry::FLUSH_LAG_SECONDS.gauge(&[]).set(behind as f64 / 1e3);
            return Err(Box::new(job));
        }
        if self.status.problem.swap(None).is_some() {
            tracing::info!("the journal is written again");
        }
        self.status.flushed_until_ms.store(job.until_ms, Ordering::Release);
        self.status.flush.store(job.flush, Ordering::Release);
        telemetry::FLUSHES.counter(&[]).increment(1);
        telemetry::FLUSH_SECONDS.histogram(&[]).record(begun.elapsed());
        let lag_ms = clock::wall_ms().saturating_sub(job.until_ms);
        telemetry::FLUSH_LAG_SECONDS.gauge(&[]).set(lag_ms as f64 / 1e3);
        let Job { flush, marks, .. } = &job;
        (self.on_commit)(&Written { flush: *flush, changed: &job.changed, deleted: &deleted, marks });
        if job.changed.iter().any(|changed| changed.shipped.is_some()) {
            let series = job.changed.into_iter().map(|changed| changed.series).collect();
            drop(self.orders.send(Order::Committed(job.flush, series)));
        }
        job.keepers.into_iter().for_each(answer);
        Ok(())
    }
}
