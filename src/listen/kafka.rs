//! JSON records from a topic of Kafka into a worker of its own, as a member of a consumer group.
//!
//! How far each partition was read goes with the samples to the journal, in one transaction; only then are the offsets
//! committed to the group. An agent that is given a partition goes on from the later of the two places, so one that was
//! killed at any moment counts each record once. Before a partition is taken away, what was read of it is flushed and
//! committed, for at most 5 s. Across agents a crash may double what the group was not told: a partition that moves after
//! one is read again from the group's offset, which is at most a flush behind the dead agent's journal.
//!
//! The agent is a static member (`group.instance.id` is its name), so one that starts again has its partitions back at
//! once; others get them 10 s after it is gone. A topic that ends before what was read of it was made anew, and is read
//! from its beginning; what it dropped unread is told. A record that is not accepted is counted, kept among the rejects with its
//! partition and offset, and passed over. Without a journal offsets are committed once the samples are in memory.
//!
//! Metrics: those of lines and samples with the listener `kafka`, `tallyd_received_bytes_total`,
//! `tallyd_kafka_partitions`, `tallyd_accept_errors_total`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset, TopicPartitionList};

use super::OWES_SEAL;
use crate::heartbeat::Beat;
use crate::ingest::{self, Address, Listener, Source, Worker, Workers};
use crate::kafka::{self, Config, Link, NotStarted, Quiet};
use crate::sample::Marks;
use crate::telemetry;

/// How many records are read before the worker has its turn.
const BURST: usize = 1_024;

/// How long the flush of what was read is waited for when a partition is taken away.
const REVOKED: Duration = Duration::from_secs(5);

/// How long the group's coordinator has for an answer.
const ANSWER: Duration = Duration::from_secs(5);

/// The pause after an error.
const PAUSE: Duration = Duration::from_millis(500);

/// What others tell the thread.
#[derive(Debug, Default)]
struct Told {
    /// There is something to look at.
    rung: bool,
    /// How far logs were read whose records are kept.
    kept: Marks,
    /// Read no more, and close the worker.
    close: bool,
    /// Commit what is kept, until then, and end.
    end: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    told: Mutex<Told>,
    ring: Condvar,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        // Each step leaves it sound.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        let mut told = self.told();
        change(&mut told);
        told.rung = true;
        drop(told);
        self.ring.notify_all();
    }

    fn wait(&self, patience: Duration) {
        let told = self.ring.wait_timeout_while(self.told(), patience, |told| !told.rung);
        told.unwrap_or_else(PoisonError::into_inner).0.rung = false;
    }
}

/// Told of what the journal keeps.
#[derive(Debug, Clone)]
pub struct Kept(Arc<Shared>);

impl Kept {
    /// Says how far logs were read whose records are kept now.
    pub fn tell(&self, marks: &Marks) {
        if !marks.is_empty() {
            self.0.tell(|told| told.kept.extend(marks.iter().map(|(name, mark)| (Arc::clone(name), *mark))));
        }
    }
}

/// The running input.
#[derive(Debug)]
pub struct Input {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Input {
    /// Reads the topic of a configuration. `member` names this agent in the group, and `kept` is how far the journal has
    /// read it.
    ///
    /// # Errors
    /// When the configuration can't be used or the thread not be made.
    pub fn start(
        config: &Config,
        member: Option<String>,
        kept: Marks,
        workers: &Arc<Workers>,
    ) -> Result<Self, NotStarted> {
        let link = Link::new(config).map_err(NotStarted::Config)?;
        let shared = Arc::new(Shared { told: Mutex::new(Told { kept, ..Told::default() }), ..Shared::default() });
        let (config, inner) = (config.clone(), Arc::clone(&shared));
        // That a client can be made shows at the start, and not only in a log later.
        consumer(&link, &config, member.as_deref(), &shared).map_err(NotStarted::Config)?;
        ingest::begin(Listener::Kafka);
        telemetry::ACCEPT_ERRORS.begin([[Listener::Kafka.name()]]);
        let waker = Arc::clone(&shared);
        let worker = workers.register(move || waker.tell(|_| {}));
        let (workers, bytes) = (Arc::clone(workers), telemetry::RECEIVED_BYTES.counter(&[Listener::Kafka.name()]));
        let beat = workers.beats().begin("kafka-input");
        let partitions = BTreeMap::new();
        let reading = Reading { link, config, member, worker, workers, shared: inner, bytes, partitions, beat };
        let thread = std::thread::Builder::new().name("kafka-input".to_owned()).spawn(move || reading.run());
        thread.map(|thread| Self { shared, thread }).map_err(NotStarted::Thread)
    }

    /// Who is to be told of what the journal keeps.
    pub fn kept(&self) -> Kept {
        Kept(Arc::clone(&self.shared))
    }

    /// Lets it read no more, and close its worker.
    pub fn close(&self) {
        self.shared.tell(|told| told.close = true);
    }

    /// Commits what is kept to the group, at most until the deadline, and ends the thread. To be called after the last
    /// flush.
    pub fn end(self, deadline: Instant) {
        self.shared.tell(|told| (told.close, told.end) = (true, Some(deadline)));
        // A thread that panicked has nothing to commit.
        drop(self.thread.join());
    }
}

/// What the group asks for.
enum Asked {
    Assign(TopicPartitionList),
    Revoke(TopicPartitionList),
}

/// Takes what the group asks for, to be done between two polls.
struct Rebalances {
    quiet: Quiet,
    asked: Mutex<Vec<Asked>>,
    /// Nobody looks at what is asked any more: the consumer is being closed, and that waits for it to be done.
    closing: AtomicBool,
    /// Something else than a record was taken from the queue, so a poll that brought none does not say that it is empty.
    stirred: AtomicBool,
}

impl Rebalances {
    fn stir(&self) {
        self.stirred.store(true, Ordering::Release);
    }
}

impl ClientContext for Rebalances {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.stir();
        Quiet::line(level, facility, text);
    }

    fn error(&self, error: KafkaError, text: &str) {
        self.stir();
        self.quiet.failed(&error, text);
    }
}

impl ConsumerContext for Rebalances {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, code: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        self.stir();
        if self.closing.load(Ordering::Acquire) {
            if let Err(error) = consumer.unassign() {
                tracing::debug!(%error, "partitions were not given back");
            }
            return;
        }
        let is_assign = code == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let asked = if is_assign { Asked::Assign(partitions.clone()) } else { Asked::Revoke(partitions.clone()) };
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
    }

    fn commit_callback(&self, result: rdkafka::error::KafkaResult<()>, _: &TopicPartitionList) {
        self.stir();
        if let Err(error) = result {
            // It is committed with what comes next; the journal knows better anyway.
            tracing::debug!(%error, "offsets were not committed");
        }
    }
}

fn consumer(
    link: &Link,
    config: &Config,
    member: Option<&str>,
    shared: &Arc<Shared>,
) -> Result<BaseConsumer<Rebalances>, kafka::Error> {
    let mut properties = vec![
        ("group.id", config.group.as_str()),
        ("enable.auto.commit", "false"),
        ("enable.auto.offset.store", "false"),
        // A place that is not there any more is an error, and looked for again.
        ("auto.offset.reset", "error"),
        ("session.timeout.ms", "10000"),
        ("fetch.wait.max.ms", "100"),
        ("queued.max.messages.kbytes", "16384"),
    ];
    properties.extend(member.map(|member| ("group.instance.id", member)));
    let (closing, stirred) = (AtomicBool::new(false), AtomicBool::new(false));
    let context = Rebalances { quiet: link.context(), asked: Mutex::default(), closing, stirred };
    let mut consumer: BaseConsumer<Rebalances> = link.make_with(&properties, context)?;
    let shared = Arc::clone(shared);
    consumer.set_nonempty_callback(move || shared.tell(|_| {}));
    Ok(consumer)
}

/// A partition that this agent reads.
#[derive(Debug)]
struct Partition {
    /// The name of its mark.
    mark: Arc<str>,
    /// The next record to read; none before the first.
    next: Option<i64>,
    /// What the group was told.
    committed: Option<i64>,
}

/// The thread's own state.
struct Reading {
    link: Link,
    config: Config,
    member: Option<String>,
    worker: Worker,
    workers: Arc<Workers>,
    shared: Arc<Shared>,
    bytes: metrics::Counter,
    partitions: BTreeMap<i32, Partition>,
    beat: Beat,
}

/// Why a consumer is given up.
enum End {
    Closed,
    Failed(KafkaError),
}

impl Reading {
    fn run(mut self) {
        let consumer = loop {
            let (consumer, end) = match self.begin() {
                Ok(consumer) => self.read(consumer),
                Err(error) => (None, End::Failed(error)),
            };
            match end {
                End::Closed => break consumer,
                End::Failed(error) => {
                    tracing::error!(%error, "listen.kafka: the topic can't be read; another try follows");
                    telemetry::ACCEPT_ERRORS.counter(&[Listener::Kafka.name()]).increment(1);
                    self.partitions.clear();
                    consumer.into_iter().for_each(close);
                    self.rest(PAUSE);
                }
            }
        };
        let Self { worker, shared, partitions, .. } = self;
        worker.close();
        if let Some(consumer) = consumer {
            Last { consumer, shared, partitions, topic: self.config.topic }.run();
        }
    }

    fn begin(&self) -> Result<BaseConsumer<Rebalances>, KafkaError> {
        let consumer = consumer(&self.link, &self.config, self.member.as_deref(), &self.shared);
        let consumer = consumer.map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        consumer.subscribe(&[&self.config.topic])?;
        Ok(consumer)
    }

    /// Reads until told to close. The consumer is given back for the last commit.
    fn read(&mut self, consumer: BaseConsumer<Rebalances>) -> (Option<BaseConsumer<Rebalances>>, End) {
        while !self.shared.told().close {
            self.beat.beat();
            let question = self.worker.question();
            let is_empty = match self.read_some(&consumer) {
                Ok(is_empty) => is_empty,
                Err(error) => return (Some(consumer), End::Failed(error)),
            };
            self.rebalance(&consumer);
            self.commit(&consumer);
            let wait = self.worker.turn(question);
            if is_empty {
                let wait = if self.worker.owes(question) { wait.min(OWES_SEAL) } else { wait };
                self.shared.wait(wait);
            }
        }
        (Some(consumer), End::Closed)
    }

    /// Reads a burst of records. `true` when there were no more.
    fn read_some(&mut self, consumer: &BaseConsumer<Rebalances>) -> Result<bool, KafkaError> {
        self.worker.stamp();
        for _ in 0..BURST {
            match consumer.poll(Duration::ZERO) {
                None if consumer.context().stirred.swap(false, Ordering::AcqRel) => {}
                None => return Ok(true),
                Some(Ok(message)) => self.record(&message),
                Some(Err(
                    error @ (KafkaError::MessageConsumptionFatal(_)
                    | KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)),
                )) => return Err(error),
                Some(Err(error)) => {
                    telemetry::ACCEPT_ERRORS.counter(&[Listener::Kafka.name()]).increment(1);
                    tracing::debug!(%error, "a partition could not be read");
                }
            }
        }
        Ok(false)
    }

    /// Counts one record, and what was read up to it.
    fn record(&mut self, message: &BorrowedMessage<'_>) {
        let (number, offset) = (message.partition(), message.offset());
        let Some(partition) = self.partitions.get_mut(&number) else { return };
        // What was in the queue when its partition was given anew may come again.
        if partition.next.is_some_and(|next| offset < next) {
            return;
        }
        let source = Source { listener: Listener::Kafka, address: Some(Address::Record { partition: number, offset }) };
        let payload = message.payload().unwrap_or_default();
        self.bytes.increment(payload.len() as u64);
        self.worker.received(payload.len(), source);
        self.worker.record(payload, source);
        partition.next = Some(offset + 1);
        self.worker.mark(&partition.mark, offset + 1);
    }

    /// Does what the group asked for.
    fn rebalance(&mut self, consumer: &BaseConsumer<Rebalances>) {
        let asked = std::mem::take(&mut *consumer.context().asked.lock().unwrap_or_else(PoisonError::into_inner));
        if asked.is_empty() {
            return;
        }
        let is_cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let mut left = asked.into_iter();
        for asked in left.by_ref() {
            let done = match &asked {
                Asked::Assign(partitions) => self.assign(consumer, partitions, is_cooperative),
                Asked::Revoke(partitions) => self.revoke(consumer, partitions, is_cooperative),
            };
            if let Err(error) = done {
                telemetry::ACCEPT_ERRORS.counter(&[Listener::Kafka.name()]).increment(1);
                tracing::warn!(%error, "listen.kafka: the group's wish could not be followed; another try follows");
                consumer.context().asked.lock().unwrap_or_else(PoisonError::into_inner).insert(0, asked);
                self.rest(PAUSE);
                break;
            }
        }
        let mut waiting = consumer.context().asked.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.extend(left);
        drop(waiting);
        telemetry::KAFKA_PARTITIONS.gauge(&[]).set(self.partitions.len() as f64);
    }

    /// Goes on from the later of the places that the journal and the group know.
    fn assign(
        &mut self,
        consumer: &BaseConsumer<Rebalances>,
        partitions: &TopicPartitionList,
        is_cooperative: bool,
    ) -> Result<(), KafkaError> {
        let committed = consumer.committed_offsets(partitions.clone(), ANSWER)?;
        let mut assignment = TopicPartitionList::new();
        let mut given = BTreeMap::new();
        for element in committed.elements() {
            let (number, topic) = (element.partition(), element.topic());
            let mark: Arc<str> = format!("kafka:{}:{topic}/{number}", self.config.group).into();
            let committed = if let Offset::Offset(offset) = element.offset() { Some(offset) } else { None };
            let known = self.shared.told().kept.get(&mark).copied().max(committed);
            let ends = consumer.fetch_watermarks(topic, number, ANSWER)?;
            let next = known.and_then(|known| place_in(ends, known, number));
            let committed = committed.filter(|committed| *committed <= ends.1);
            assignment.add_partition_offset(topic, number, next.map_or(Offset::Beginning, Offset::Offset))?;
            given.insert(number, Partition { mark, next, committed });
        }
        if is_cooperative {
            consumer.incremental_assign(&assignment)?;
        } else {
            consumer.assign(&assignment)?;
        }
        tracing::info!(partitions = given.len(), topic = self.config.topic, "listen.kafka: partitions were assigned");
        self.partitions.extend(given);
        Ok(())
    }

    /// Lets partitions go once what was read of them is kept and committed, or that takes too long.
    fn revoke(
        &mut self,
        consumer: &BaseConsumer<Rebalances>,
        partitions: &TopicPartitionList,
        is_cooperative: bool,
    ) -> Result<(), KafkaError> {
        let numbers: Vec<_> = partitions.elements().iter().map(|element| element.partition()).collect();
        if !consumer.assignment_lost() {
            self.flush(&numbers);
            self.commit(consumer);
        }
        self.partitions.retain(|number, _| is_cooperative && !numbers.contains(number));
        if is_cooperative { consumer.incremental_unassign(partitions) } else { consumer.unassign() }
    }

    /// Lets what was read be sealed, and waits until it is kept.
    fn flush(&mut self, numbers: &[i32]) {
        self.workers.ask();
        let deadline = Instant::now() + REVOKED;
        while !numbers.iter().all(|number| self.is_kept(*number)) && Instant::now() < deadline {
            let question = self.worker.question();
            let wait = self.worker.turn(question);
            self.shared.wait(wait.min(OWES_SEAL * 10));
        }
    }

    fn is_kept(&self, number: i32) -> bool {
        let Some(Partition { mark, next, .. }) = self.partitions.get(&number) else { return true };
        next.is_none() || self.shared.told().kept.get(mark).copied() >= *next
    }

    /// Tells the group how far what is kept was read.
    fn commit(&mut self, consumer: &BaseConsumer<Rebalances>) {
        commit(consumer, &self.shared, &mut self.partitions, &self.config.topic, CommitMode::Async);
    }

    /// Waits a while, in which the worker has its turns.
    fn rest(&mut self, pause: Duration) {
        let until = Instant::now() + pause;
        while Instant::now() < until && !self.shared.told().close {
            self.beat.beat();
            let question = self.worker.question();
            let wait = self.worker.turn(question).min(until.saturating_duration_since(Instant::now()));
            self.shared.wait(wait);
        }
    }
}

/// Where a partition whose first record and end are here goes on that was read up to a place; none for its beginning.
fn place_in((first, end): (i64, i64), known: i64, partition: i32) -> Option<i64> {
    if known > end {
        // It was made anew, or is another cluster's: what was read then says nothing about the records that it has now.
        tracing::warn!(
            partition,
            known,
            end,
            "listen.kafka: the topic ends before what was read of it; it is read from its beginning"
        );
        return None;
    }
    if known < first {
        let count = first - known;
        tracing::error!(partition, count, "listen.kafka: the topic has dropped records before they were read");
    }
    Some(known.max(first))
}

/// The last commit, after the last flush.
struct Last {
    consumer: BaseConsumer<Rebalances>,
    shared: Arc<Shared>,
    partitions: BTreeMap<i32, Partition>,
    topic: String,
}

impl Last {
    fn run(mut self) {
        let deadline = loop {
            if let Some(deadline) = self.shared.told().end {
                break deadline;
            }
            self.shared.wait(Duration::from_secs(1));
        };
        let Self { consumer, shared, partitions, topic } = &mut self;
        if Instant::now() < deadline {
            commit(consumer, shared, partitions, topic, CommitMode::Sync);
        }
        close(self.consumer);
    }
}

/// Leaves the group.
fn close(consumer: BaseConsumer<Rebalances>) {
    consumer.context().closing.store(true, Ordering::Release);
    // What was asked before that flag stood is asked no more; an assignment that is open would keep it waiting.
    if let Err(error) = consumer.unassign() {
        tracing::debug!(%error, "partitions were not given back");
    }
    drop(consumer);
}

fn commit(
    consumer: &BaseConsumer<Rebalances>,
    shared: &Shared,
    partitions: &mut BTreeMap<i32, Partition>,
    topic: &str,
    mode: CommitMode,
) {
    let mut offsets = TopicPartitionList::new();
    let told = shared.told();
    for (number, partition) in partitions {
        let kept = told.kept.get(&partition.mark).copied();
        // What the journal of an earlier life of the topic says is no offset of this one.
        let kept = kept.filter(|_| kept > partition.committed && kept <= partition.next);
        if let Some(kept) = kept
            && offsets.add_partition_offset(topic, *number, Offset::Offset(kept)).is_ok()
        {
            partition.committed = Some(kept);
        }
    }
    drop(told);
    if offsets.count() > 0
        && let Err(error) = consumer.commit(&offsets, mode)
    {
        tracing::debug!(%error, "offsets were not committed");
    }
}
