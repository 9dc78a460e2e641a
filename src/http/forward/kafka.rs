//! The producer behind `ingest.forward`. Its deliveries are heard on a thread of its own; requests wait for theirs.

use std::cell::RefCell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer};
use tokio::sync::oneshot;

use super::{Sorted, Undelivered};
use crate::kafka::{Config, Error, Link, Quiet, reason};
use crate::telemetry;

/// All copies have a record before it counts as delivered, once, and a request does not wait longer than this for it. Other
/// producers of the same keys put them into the same partitions.
const PROPERTIES: [(&str, &str); 7] = [
    ("enable.idempotence", "true"),
    ("acks", "all"),
    ("compression.type", "lz4"),
    ("linger.ms", "2"),
    ("message.timeout.ms", "5000"),
    ("partitioner", "murmur2_random"),
    ("queue.buffering.max.kbytes", "65536"),
];

/// A request whose records are under way.
#[derive(Debug)]
struct Request {
    left: AtomicUsize,
    failed: AtomicBool,
    answer: Mutex<Option<oneshot::Sender<bool>>>,
}

impl Request {
    /// One of its records, or what was given to librdkafka in all, is done.
    fn done(&self, is_delivered: bool) {
        if !is_delivered {
            self.failed.store(true, Ordering::Release);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner).take();
            // The client may have gone.
            let _ = answer.map(|answer| answer.send(!self.failed.load(Ordering::Acquire)));
        }
    }
}

/// Hears what becomes of records.
struct Deliveries(Quiet);

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        Quiet::line(level, facility, text);
    }

    fn error(&self, error: KafkaError, text: &str) {
        self.0.failed(&error, text);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Arc<Request>;

    fn delivery(&self, result: &DeliveryResult<'_>, request: Arc<Request>) {
        match result {
            Ok(_) => telemetry::KAFKA_PRODUCED.counter(&["record"]).increment(1),
            Err((error, _)) => telemetry::KAFKA_FAILED.counter(&[reason(error)]).increment(1),
        }
        request.done(result.is_ok());
    }
}

/// Delivers records to the topic.
pub struct Forwarder {
    link: Link,
    topic: String,
    producer: RefCell<ThreadedProducer<Deliveries>>,
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwarder").field("topic", &self.topic).finish_non_exhaustive()
    }
}

impl Forwarder {
    /// Forwards to the topic of a configuration.
    ///
    /// # Errors
    /// When the configuration can't be used.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let link = Link::new(config)?;
        let producer = RefCell::new(link.make_with(&PROPERTIES, Deliveries(link.context()))?);
        telemetry::KAFKA_PRODUCED.begin([["record"]]);
        telemetry::KAFKA_FAILED.begin([["connection"], ["denied"], ["no_topic"], ["full"], ["other"]]);
        Ok(Self { link, topic: config.topic.clone(), producer })
    }

    /// Delivers records, each under its name as the key.
    ///
    /// # Errors
    /// When they were not all acknowledged.
    pub async fn deliver(&self, records: &[Sorted]) -> Result<(), Undelivered> {
        let (answer, answered) = oneshot::channel();
        // One more than there are, so that none is the last before all are given.
        let left = AtomicUsize::new(records.len() + 1);
        let request = Arc::new(Request { left, failed: AtomicBool::new(false), answer: Mutex::new(Some(answer)) });
        let given = self.give(records, &request);
        request.done(given.is_ok());
        let is_delivered = answered.await.unwrap_or(false);
        given?;
        if is_delivered {
            return Ok(());
        }
        self.replace_broken();
        Err(Undelivered::Away)
    }

    /// Gives records to librdkafka; those behind one that it does not take count as done.
    fn give(&self, records: &[Sorted], request: &Arc<Request>) -> Result<(), Undelivered> {
        let producer = self.producer.borrow();
        for (at, Sorted { name, record }) in records.iter().enumerate() {
            let message: BaseRecord<'_, str, [u8], Arc<Request>> =
                BaseRecord::with_opaque_to(&self.topic, Arc::clone(request))
                    .key(name.as_str())
                    .payload(record.as_slice());
            if let Err((error, _)) = producer.send(message) {
                let is_full = error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
                telemetry::KAFKA_FAILED.counter(&[if is_full { "full" } else { reason(&error) }]).increment(1);
                (at..records.len()).for_each(|_| request.done(false));
                return Err(if is_full { Undelivered::Full } else { Undelivered::Away });
            }
        }
        Ok(())
    }

    /// A producer that met a fatal error delivers nothing any more.
    fn replace_broken(&self) {
        if self.producer.borrow().client().fatal_error().is_none() {
            return;
        }
        match self.link.make_with(&PROPERTIES, Deliveries(self.link.context())) {
            Ok(producer) => *self.producer.borrow_mut() = producer,
            Err(error) => tracing::error!(%error, "ingest.forward: no producer could be made"),
        }
    }
}
