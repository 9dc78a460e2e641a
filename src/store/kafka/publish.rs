//! The thread that produces: what the journal says of a series becomes its record, and a series that the journal does not
//! have becomes a record without value.
//!
//! It works in rounds: all that changed since the last one is read from the journal as it is then, produced, and waited
//! for; only then is the transaction that the journal had before the round noted as the one up to which Kafka has all. A
//! round that fails is followed by one that looks through the whole journal. Waiting bounds what is under way; librdkafka's
//! own queue bounds the rest.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, ProducerContext};

use super::key;
use super::run::{Problem, Shared, Work, backoff, locked};
use crate::aggregate::shard::SeriesId;
use crate::kafka::{self, Link, Quiet};
use crate::store::journal::{Journal, Newer};
use crate::telemetry;

/// How producers are made: all copies have a record before it counts as delivered, in the order in which they were given.
const PROPERTIES: [(&str, &str); 6] = [
    ("enable.idempotence", "true"),
    ("acks", "all"),
    ("compression.type", "lz4"),
    ("linger.ms", "5"),
    ("message.timeout.ms", "10000"),
    ("queue.buffering.max.kbytes", "65536"),
];

/// How many series of the table are looked at under one lock.
const PASSED_MAX: usize = 4_096;

/// How many records are read from the journal at a time.
const READ_MAX: usize = 4_096;

/// How long a poll for deliveries takes.
const POLL: Duration = Duration::from_millis(5);

/// What became of the records of a round.
#[derive(Debug, Default)]
pub(super) struct Round {
    open: AtomicUsize,
    failed: Mutex<Option<KafkaError>>,
}

/// Hears what becomes of records.
pub(super) struct Deliveries(Quiet);

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        Quiet::line(level, facility, text);
    }

    fn error(&self, error: KafkaError, text: &str) {
        self.0.failed(&error, text);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Arc<Round>;

    fn delivery(&self, result: &DeliveryResult<'_>, round: Arc<Round>) {
        match result {
            Ok(_) => telemetry::KAFKA_PRODUCED.counter(&["state"]).increment(1),
            Err((error, _)) if is_too_large(error) => count_too_large(),
            Err((error, _)) => drop(locked(&round.failed).get_or_insert_with(|| error.clone())),
        }
        round.open.fetch_sub(1, Ordering::AcqRel);
    }
}

fn is_too_large(error: &KafkaError) -> bool {
    matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::MessageSizeTooLarge))
}

/// A total that no broker takes must not keep the others back.
fn count_too_large() {
    telemetry::STORE_ERRORS.counter(&["kafka", "too_large"]).increment(1);
    tracing::error!("a total is larger than the brokers take (max.message.bytes of the topic)");
}

/// The thread's own state.
pub(super) struct Publisher {
    shared: Arc<Shared>,
    journal: Arc<Journal>,
    link: Link,
    producer: Option<BaseProducer<Deliveries>>,
    /// Who produces, in the records' header.
    by: String,
    /// The transaction up to which Kafka has all.
    acknowledged: u64,
}

impl Publisher {
    pub(super) fn new(shared: Arc<Shared>, journal: Arc<Journal>, link: Link) -> Self {
        let acknowledged = journal.marks().get(mark(&shared.topic).as_str()).map_or(0, |mark| *mark as u64);
        Self { shared, journal, link, producer: None, by: String::new(), acknowledged }
    }

    pub(super) fn run(mut self) {
        let mut failures = 0;
        while let Some(mut work) = self.shared.next_work(Duration::from_secs(1)) {
            match self.round(&work) {
                Ok(()) if failures == 0 => {}
                Ok(()) => {
                    failures = 0;
                    self.shared.learn(|facts| facts.refused = None);
                }
                Err(problem) => {
                    failures += 1;
                    let is_away = matches!(&problem, Problem::Kafka(error) if kafka::is_away(error));
                    self.shared.fail(&problem, is_away);
                    let refused = (!is_away && !matches!(problem, Problem::Unknown)).then(|| problem.to_string());
                    self.shared.learn(|facts| facts.refused = refused);
                    self.producer = None;
                    self.give_up(&mut work);
                    if self.shared.is_stopping() {
                        // A store that is away now would only hold up the stop; the next start produces what is left.
                        break;
                    }
                    self.shared.rest(backoff(failures));
                }
            }
        }
        self.forget_waiting();
    }

    /// Keeps what a round did not do for the next one. Who asked for a delete is told that it failed.
    fn give_up(&self, work: &mut Work) {
        for delete in work.deletes.drain(..) {
            locked(&self.shared.waiting).remove(&delete.nonce);
        }
        let gone = std::mem::take(&mut work.gone);
        self.shared.order(|next| {
            next.all = true;
            next.gone.extend(gone);
        });
    }

    fn forget_waiting(&self) {
        locked(&self.shared.waiting).clear();
    }

    fn round(&mut self, work: &Work) -> Result<(), Problem> {
        if work.touched.is_empty() && work.deletes.is_empty() && work.gone.is_empty() && !work.all {
            return Ok(());
        }
        let partitions = self.shared.facts().partitions.ok_or(Problem::Unknown)?;
        let revision = self.journal.revision();
        self.prepare()?;
        let round = Arc::new(Round::default());
        self.log_deletes(&round, work, partitions)?;
        for (key, partition) in &work.gone {
            self.produce(&round, key, None, *partition)?;
        }
        if work.all {
            self.produce_all(&round, partitions)?;
        } else {
            self.produce_touched(&round, work, partitions)?;
        }
        self.settle(&round)?;
        self.acknowledged = revision;
        self.journal.note(&mark(&self.shared.topic), revision as i64);
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), Problem> {
        if self.producer.is_none() {
            let number = self.shared.producers.fetch_add(1, Ordering::AcqRel) + 1;
            self.by = format!("{}.{number}", self.shared.process);
            self.producer = Some(self.link.make_with(&PROPERTIES, Deliveries(self.link.context()))?);
        }
        Ok(())
    }

    fn log_deletes(&self, round: &Arc<Round>, work: &Work, partitions: i32) -> Result<(), Problem> {
        for delete in &work.deletes {
            let deletion = key::Deletion {
                v: 1,
                nonce: delete.nonce.clone(),
                by: self.shared.agent.clone(),
                at_ms: crate::clock::wall_ms(),
            };
            let value = serde_json::to_vec(&deletion).unwrap_or_default();
            let partition = key::partition_of(&delete.id, partitions);
            self.produce(round, &key::delete(&delete.id), Some(&value), partition)?;
        }
        Ok(())
    }

    fn produce_touched(&self, round: &Arc<Round>, work: &Work, partitions: i32) -> Result<(), Problem> {
        let touched: Vec<_> = work.touched.iter().collect();
        for ids in touched.chunks(READ_MAX) {
            let records = self.journal.records(ids.iter().map(|id| (id.kind, &id.key)))?;
            for (id, record) in ids.iter().zip(records) {
                let partition = key::partition_of(id, partitions);
                self.produce(round, &key::state(&self.shared.agent, id), record.as_deref(), partition)?;
            }
        }
        Ok(())
    }

    /// Produces every total that is newer than what Kafka has, and once the topic is read also those that it does not
    /// have, and takes out of it what the journal does not have.
    fn produce_all(&self, round: &Arc<Round>, partitions: i32) -> Result<(), Problem> {
        let loaded = self.shared.facts().loaded;
        let mut newer = Newer::default();
        loop {
            newer = self.journal.newer(&newer, self.acknowledged, |kind, key| {
                let id = SeriesId { kind, key: key.clone() };
                loaded && !self.shared.table().is_ours(&id, key::partition_of(&id, partitions))
            })?;
            for (kind, series, record) in &newer.records {
                let id = SeriesId { kind: *kind, key: series.clone() };
                let partition = key::partition_of(&id, partitions);
                self.produce(round, &key::state(&self.shared.agent, &id), Some(record), partition)?;
            }
            if newer.is_last() {
                break;
            }
        }
        if loaded { self.bury(round, partitions) } else { Ok(()) }
    }

    /// Takes out of the topic what it has of this agent and the journal has not, or what stands in another partition than
    /// it belongs to.
    fn bury(&self, round: &Arc<Round>, partitions: i32) -> Result<(), Problem> {
        let mut after = None;
        loop {
            let (ours, next) = self.shared.table().ours(after.as_ref(), PASSED_MAX);
            let records = self.journal.records(ours.iter().map(|(id, _)| (id.kind, &id.key)))?;
            for ((id, partition), record) in ours.iter().zip(records) {
                if record.is_none() || *partition != key::partition_of(id, partitions) {
                    self.produce(round, &key::state(&self.shared.agent, id), None, *partition)?;
                }
            }
            if next.is_none() {
                return Ok(());
            }
            after = next;
        }
    }

    /// Gives librdkafka a record, and waits while its queue is full.
    fn produce(&self, round: &Arc<Round>, key: &str, value: Option<&[u8]>, partition: i32) -> Result<(), Problem> {
        let Some(producer) = &self.producer else { return Err(Problem::Unknown) };
        let headers = OwnedHeaders::new().insert(Header { key: "by", value: Some(&self.by) });
        let record: BaseRecord<'_, str, [u8], Arc<Round>> =
            BaseRecord::with_opaque_to(&self.shared.topic, Arc::clone(round));
        let mut record = record.key(key).partition(partition).headers(headers);
        if let Some(value) = value {
            record = record.payload(value);
        }
        round.open.fetch_add(1, Ordering::AcqRel);
        loop {
            record = match producer.send(record) {
                Ok(()) => return Ok(()),
                Err((error, refused)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                    self.go_on(round)?;
                    refused
                }
                Err((error, _)) => {
                    round.open.fetch_sub(1, Ordering::AcqRel);
                    if is_too_large(&error) {
                        count_too_large();
                        return Ok(());
                    }
                    return Err(error.into());
                }
            };
        }
    }

    /// Waits until all of a round are delivered.
    fn settle(&self, round: &Round) -> Result<(), Problem> {
        while round.open.load(Ordering::Acquire) > 0 {
            self.go_on(round)?;
        }
        locked(&round.failed).take().map_or(Ok(()), |error| Err(error.into()))
    }

    /// Hears of deliveries. An error when one failed, or when there is no time to wait for the others.
    fn go_on(&self, round: &Round) -> Result<(), Problem> {
        let Some(producer) = &self.producer else { return Err(Problem::Unknown) };
        producer.poll(POLL);
        if let Some(error) = locked(&round.failed).take() {
            return Err(error.into());
        }
        let is_in_vain = self.shared.is_stopping() && !self.shared.facts().connected;
        if is_in_vain || self.shared.is_past_deadline() { Err(Problem::Stopped) } else { Ok(()) }
    }
}

/// The mark of the transaction up to which Kafka has all.
fn mark(topic: &str) -> String {
    format!("kafka:{topic}/acknowledged")
}
