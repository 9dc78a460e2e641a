//! The thread that reads the topic, from its beginning and on, into the table, and heeds the deletes in it.
//!
//! It also watches over what the topic says of this agent, because only it sees that: a state of a series that the journal
//! does not have, one of a producer that was given up, or one that is missing is put right by the publisher.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Builder;

use super::key::{self, Deletion, Key};
use super::run::{OnDeleted, Parts, Problem, Shared, backoff, locked};
use super::table::Stated;
use super::{Config, DELETE_KEPT_MS};
use crate::aggregate::ledger::Total;
use crate::aggregate::shard::SeriesId;
use crate::clock;
use crate::kafka::{self, Link, Quiet};
use crate::sample::Marks;
use crate::store::journal::{self, Journal};
use crate::telemetry;

/// How long a poll waits for a record.
const POLL: Duration = Duration::from_millis(100);

/// How often the brokers are asked whether they are there, and whether a partition still has what was read of it.
const PROBE: Duration = Duration::from_secs(1);

/// How long they have for an answer.
const ANSWER: Duration = Duration::from_secs(2);

/// How often it is looked for what is to be taken out of the topic.
const SWEEP: Duration = Duration::from_secs(60);

/// How long an agent has to take its own total out after a delete, before the one that deleted does it.
const OWN_TURN: Duration = Duration::from_secs(30);

/// How many totals of agents that are gone are taken out at a time.
const SWEPT_MAX: usize = 1_000;

/// So long after the start a record of a process before this one may still come.
const OLD_RECORDS: Duration = Duration::from_secs(30);

/// A partition of the topic.
#[derive(Debug, Clone, Default)]
struct Partition {
    /// The name of its mark.
    mark: Arc<str>,
    /// Deletes from here on have not been heeded.
    heeded: i64,
    /// The next record to read.
    next: i64,
    /// Whether it was read to its end.
    loaded: bool,
}

/// A delete in the topic.
#[derive(Debug)]
struct Logged {
    at_ms: u64,
    by: String,
    partition: i32,
}

/// The thread's own state.
pub(super) struct Follower {
    shared: Arc<Shared>,
    journal: Arc<Journal>,
    link: Link,
    config: Config,
    on_deleted: OnDeleted,
    partitions: Vec<Partition>,
    deletes: HashMap<SeriesId, Logged>,
    /// Other agents' totals that a delete of ours ended and that still stand in the topic: where, and since when.
    ended: HashMap<(String, SeriesId), (i32, Instant)>,
    begun: Instant,
    probed: Instant,
    swept: Instant,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>, parts: Parts, link: Link) -> Result<Self, kafka::Error> {
        // That a client can be made shows at the start, and not only in a log later.
        let _: BaseConsumer<Quiet> = consumer(&link, &shared.agent)?;
        let now = Instant::now();
        Ok(Self {
            shared,
            journal: parts.journal,
            link,
            config: parts.config,
            on_deleted: parts.on_deleted,
            partitions: Vec::new(),
            deletes: HashMap::new(),
            ended: HashMap::new(),
            begun: now,
            probed: now,
            swept: now,
        })
    }

    pub(super) fn run(mut self) {
        let mut failures = 0;
        while !self.shared.is_stopping() {
            if let Err(problem) = self.follow(&mut failures) {
                self.shared.fail(&problem, !matches!(problem, Problem::Rewound));
                // A client that is refused finds no broker that answers; why, it says by the way.
                let refusal = self.link.take_refusal();
                self.shared.learn(|facts| {
                    facts.loaded = false;
                    facts.problem = refusal.or(facts.problem.take());
                });
                failures += 1;
                self.shared.rest(backoff(failures));
            }
        }
        telemetry::STORE_CONNECTED.gauge(&["kafka"]).set(0.0);
    }

    /// Reads the topic from its beginning until asked to stop.
    fn follow(&mut self, failures: &mut u32) -> Result<(), Problem> {
        let consumer = consumer(&self.link, &self.shared.agent)?;
        self.begin(&consumer)?;
        *failures = 0;
        self.shared.learn(|facts| facts.connected = true);
        while !self.shared.is_stopping() {
            match consumer.poll(POLL) {
                Some(Ok(message)) => self.hear(&message),
                Some(Err(KafkaError::PartitionEOF(partition))) => self.ended(partition),
                Some(Err(error)) => tracing::debug!(%error, "the topic could not be read"),
                None => {}
            }
            if self.link.take_down() {
                self.shared.learn(|facts| facts.connected = false);
            }
            self.probe(&consumer)?;
            self.sweep();
        }
        Ok(())
    }

    /// Finds the partitions, makes the topic if it is missing, and assigns all of it.
    fn begin(&mut self, consumer: &BaseConsumer<Quiet>) -> Result<(), Problem> {
        let topic = self.shared.topic.clone();
        let count = self.count_partitions(consumer)?;
        let marks = self.journal.marks();
        let mut assignment = TopicPartitionList::new();
        self.partitions.clear();
        for number in 0..count {
            let (_, high) = consumer.fetch_watermarks(&topic, number, ANSWER)?;
            let mark: Arc<str> = format!("kafka:{topic}/{number}").into();
            // A delete from before this agent first saw the topic does not concern it, nor does one of another topic.
            let heeded = marks.get(&mark).copied().filter(|heeded| *heeded <= high);
            let heeded = heeded.unwrap_or_else(|| {
                self.journal.note(&mark, high);
                high
            });
            self.partitions.push(Partition { mark, heeded, next: 0, loaded: false });
            assignment.add_partition_offset(&topic, number, Offset::Beginning)?;
        }
        self.shared.table_mut().clear();
        self.deletes.clear();
        self.ended.clear();
        consumer.assign(&assignment)?;
        self.shared.learn(|facts| (facts.partitions, facts.loaded) = (Some(count), false));
        Ok(())
    }

    fn count_partitions(&self, consumer: &BaseConsumer<Quiet>) -> Result<i32, Problem> {
        let topic = &self.shared.topic;
        let metadata = consumer.fetch_metadata(Some(topic), ANSWER)?;
        let found = metadata.topics().iter().find(|found| found.name() == topic);
        match found.map(|found| (found.partitions().len() as i32, found.error())) {
            Some((count, None)) if count > 0 => Ok(count),
            Some((_, Some(error))) if !is_missing(error.into()) => Err(KafkaError::MetadataFetch(error.into()).into()),
            Some(_) | None => {
                self.make_topic()?;
                // Brokers take a moment until all of them know it.
                Err(Problem::Unknown)
            }
        }
    }

    fn make_topic(&self) -> Result<(), Problem> {
        let admin: AdminClient<Quiet> = self.link.make(&[])?;
        let runtime = Builder::new_current_thread().build().map_err(|error| Problem::NoTopic(error.to_string()))?;
        let replication = if self.config.replication > 0 { self.config.replication } else { -1 };
        let topic = NewTopic::new(&self.shared.topic, self.config.partitions, TopicReplication::Fixed(replication))
            .set("cleanup.policy", "compact");
        let options = AdminOptions::new().operation_timeout(Some(ANSWER)).request_timeout(Some(2 * ANSWER));
        let results = runtime.block_on(admin.create_topics([&topic], &options))?;
        for result in results {
            match result {
                Ok(_) => {
                    tracing::info!(topic = self.shared.topic, partitions = self.config.partitions, "the topic was made")
                }
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => return Err(Problem::NoTopic(code.to_string())),
            }
        }
        Ok(())
    }

    /// Takes a record.
    fn hear(&mut self, message: &BorrowedMessage<'_>) {
        let number = message.partition();
        let Some(partition) = self.partitions.get_mut(number as usize) else { return };
        partition.next = message.offset() + 1;
        match message.key().and_then(Key::parse) {
            Some(Key::State(agent, id)) => self.hear_state(message, agent, &id),
            Some(Key::Delete(id)) => self.hear_delete(message, id),
            None => count_foreign(),
        }
    }

    fn hear_state(&mut self, message: &BorrowedMessage<'_>, agent: &str, id: &SeriesId) {
        let partition = message.partition();
        let is_state = match message.payload() {
            Some(record) => {
                // Readers take it as it is, so it is looked at here, where what is no total of the series is counted.
                let total = journal::read_total(record);
                let total = total.filter(|(_, kind, key, _)| (*kind, *key) == (id.kind, id.key.as_str()));
                let Some((revision, _, _, Total { update_ms, .. })) = total else { return count_foreign() };
                self.shared.table_mut().put(agent, id, Stated { revision, update_ms, partition, record });
                true
            }
            None => {
                self.shared.table_mut().remove(agent, id, partition);
                false
            }
        };
        self.ended.remove(&(agent.to_owned(), id.clone()));
        if agent == self.shared.agent && self.partitions[partition as usize].loaded {
            self.check_ours(message, id, is_state);
        }
    }

    /// Puts right what the topic says of this agent: what it says must be what the journal says, by its own producer.
    fn check_ours(&self, message: &BorrowedMessage<'_>, id: &SeriesId, is_state: bool) {
        let Ok(records) = self.journal.records(std::iter::once((id.kind, &id.key))) else { return };
        let is_kept = records.first().is_some_and(Option::is_some);
        let by = by(message);
        let process = by.split('.').next().unwrap_or_default();
        let latest = self.shared.producers.load(std::sync::atomic::Ordering::Acquire);
        let is_latest = process == self.shared.process && by.ends_with(&format!(".{latest}"));
        if process != self.shared.process && is_state && self.begun.elapsed() > OLD_RECORDS {
            self.report_clone();
        }
        if is_kept != is_state || !is_latest {
            self.shared.touch(std::iter::once(id.clone()));
        }
    }

    fn report_clone(&self) {
        telemetry::STORE_ERRORS.counter(&["kafka", "clone"]).increment(1);
        if !self.shared.facts().has_clone {
            tracing::error!(agent = self.shared.agent, "another process writes totals under this agent's name");
        }
        self.shared.learn(|facts| facts.has_clone = true);
    }

    fn hear_delete(&mut self, message: &BorrowedMessage<'_>, id: SeriesId) {
        let Some(value) = message.payload() else {
            self.deletes.remove(&id);
            return;
        };
        let Ok(deletion) = serde_json::from_slice::<Deletion>(value) else { return count_foreign() };
        let ended = self.shared.table_mut().end_others(&id);
        if deletion.by == self.shared.agent {
            let since = Instant::now();
            let ended = ended.into_iter().map(|(agent, partition)| ((agent, id.clone()), (partition, since)));
            self.ended.extend(ended);
        }
        let partition = &mut self.partitions[message.partition() as usize];
        if message.offset() >= partition.heeded {
            partition.heeded = message.offset() + 1;
            let marks = Marks::from([(Arc::clone(&partition.mark), partition.heeded)]);
            let answer = locked(&self.shared.waiting).remove(&deletion.nonce);
            (self.on_deleted)(vec![id.clone()], marks, answer);
        }
        let Deletion { at_ms, by, .. } = deletion;
        self.deletes.insert(id, Logged { at_ms, by, partition: message.partition() });
    }

    /// A partition was read to its end.
    fn ended(&mut self, number: i32) {
        if let Some(partition) = self.partitions.get_mut(number as usize) {
            partition.loaded = true;
        }
        if !self.shared.facts().loaded && self.partitions.iter().all(|partition| partition.loaded) {
            self.shared.learn(|facts| facts.loaded = true);
            self.shared.table().publish();
            // Now it is known what the topic has of this agent.
            self.shared.order(|work| work.all = true);
        }
    }

    /// Asks one partition after the other for its end.
    fn probe(&mut self, consumer: &BaseConsumer<Quiet>) -> Result<(), Problem> {
        if self.probed.elapsed() < PROBE || self.partitions.is_empty() {
            return Ok(());
        }
        let number = (self.begun.elapsed().as_secs() as usize) % self.partitions.len();
        let answer = consumer.fetch_watermarks(&self.shared.topic, number as i32, ANSWER);
        self.probed = Instant::now();
        self.shared.table().publish();
        match answer {
            Ok((_, high)) if high < self.partitions[number].next => Err(Problem::Rewound),
            Ok(_) => {
                self.shared.learn(|facts| facts.connected = true);
                Ok(())
            }
            // Somebody took the topic away; it is made and filled again.
            Err(_) if self.is_gone(consumer) => Err(Problem::Rewound),
            Err(error) => {
                self.shared.fail(&error.into(), true);
                Ok(())
            }
        }
    }

    /// Whether the brokers answer, and have no such topic any more.
    fn is_gone(&self, consumer: &BaseConsumer<Quiet>) -> bool {
        let Ok(metadata) = consumer.fetch_metadata(Some(&self.shared.topic), ANSWER) else { return false };
        let found = metadata.topics().iter().find(|found| found.name() == self.shared.topic);
        found.is_none_or(|found| found.error().is_some_and(|error| is_missing(error.into())))
    }

    /// Looks for what is to be taken out of the topic.
    fn sweep(&mut self) {
        if !self.shared.facts().loaded {
            return;
        }
        let mut gone = Vec::new();
        self.ended.retain(|(agent, id), (partition, since)| {
            let is_due = since.elapsed() >= OWN_TURN;
            if is_due {
                gone.push((key::state(agent, id), *partition));
            }
            !is_due
        });
        if self.swept.elapsed() >= SWEEP {
            self.swept = Instant::now();
            gone.extend(self.outlived());
        }
        if !gone.is_empty() {
            self.shared.order(|work| work.gone.extend(gone));
        }
    }

    /// Deletes whose time is over, and totals of agents that are gone.
    fn outlived(&self) -> Vec<(String, i32)> {
        let now_ms = clock::wall_ms();
        let is_over = |logged: &Logged| {
            let kept = if logged.by == self.shared.agent { DELETE_KEPT_MS } else { 2 * DELETE_KEPT_MS };
            logged.at_ms.saturating_add(kept) < now_ms
        };
        let deletes = self.deletes.iter().filter(|(_, logged)| is_over(logged));
        let mut gone: Vec<_> = deletes.map(|(id, logged)| (key::delete(id), logged.partition)).collect();
        let before_ms = now_ms.saturating_sub(self.shared.expire.as_millis().saturating_mul(2));
        let older = self.shared.table().older(before_ms, SWEPT_MAX);
        gone.extend(older.into_iter().map(|(agent, id, partition)| (key::state(&agent, &id), partition)));
        gone
    }
}

/// A consumer that belongs to no group: it reads all partitions and commits nothing.
fn consumer(link: &Link, agent: &str) -> Result<BaseConsumer<Quiet>, kafka::Error> {
    let group = format!("tallyd-table-{agent}");
    link.make(&[
        ("group.id", group.as_str()),
        ("enable.auto.commit", "false"),
        ("enable.auto.offset.store", "false"),
        ("enable.partition.eof", "true"),
        ("auto.offset.reset", "earliest"),
        ("fetch.wait.max.ms", "100"),
        ("queued.max.messages.kbytes", "16384"),
    ])
}

fn is_missing(code: RDKafkaErrorCode) -> bool {
    matches!(code, RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic)
}

/// Who produced a record.
fn by(message: &BorrowedMessage<'_>) -> String {
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    let by = headers.filter(|header| header.key == "by").find_map(|header| header.value);
    by.map(|value| String::from_utf8_lossy(value).into_owned()).unwrap_or_default()
}

fn count_foreign() {
    telemetry::STORE_ERRORS.counter(&["kafka", "foreign"]).increment(1);
}
