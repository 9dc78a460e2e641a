//! librdkafka's clients as this program makes them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};

use super::{Config, Error, check_topic};

/// What store, input and forward rest on; an option of these names is refused.
const OURS: [&str; 9] = [
    "bootstrap.servers",
    "metadata.broker.list",
    "group.id",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "acks",
    "request.required.acks",
    "enable.partition.eof",
];

impl Config {
    /// What all clients are told.
    ///
    /// # Errors
    /// When an option is none that librdkafka takes, or one that is ours to set.
    pub fn client(&self) -> Result<ClientConfig, Error> {
        if self.brokers.is_empty() {
            return Err(Error::NoBroker);
        }
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", self.brokers.join(","))
            .set("client.id", "tallyd")
            // An agent that waits for its brokers again must not wait long after they came back.
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.keepalive.enable", "true")
            .set("allow.auto.create.topics", "false")
            .set_log_level(RDKafkaLogLevel::Debug);
        for (name, value) in &self.options {
            if OURS.contains(&name.as_str()) {
                return Err(Error::Ours(name.clone()));
            }
            config.set(name, value);
        }
        if let Some(password) = &self.password {
            config.set("sasl.password", password.reveal());
        }
        config.create_native_config().map(drop).map_err(refused)?;
        Ok(config)
    }

    /// Checks names and values of all options.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), Error> {
        check_topic(&self.topic)?;
        self.client().map(drop)
    }

    /// Whether the options fit together, and the files that they name are there: a producer and a consumer are made of
    /// them, without a broker, so that nothing is connected to.
    ///
    /// # Errors
    /// What is wrong.
    pub fn fit(&self) -> Result<(), Error> {
        let mut config = self.client()?;
        config.remove("bootstrap.servers");
        config.create_with_context::<_, BaseConsumer<Quiet>>(Quiet::default()).map_err(refused)?;
        // As all that produces here does, and as soon as any of it gives a record up.
        config.set("enable.idempotence", "true").set("acks", "all");
        if config.get("message.timeout.ms").is_none() {
            config.set("message.timeout.ms", "5000");
        }
        config.create_with_context::<_, BaseProducer<Quiet>>(Quiet::default()).map(drop).map_err(refused)
    }
}

/// librdkafka's words, without the value, which may be a password.
pub(super) fn refused(error: KafkaError) -> Error {
    if let KafkaError::ClientConfig(_, words, name, _) = error {
        return Error::Option(name, words);
    }
    if let KafkaError::ClientCreation(words) = error { Error::Client(words) } else { Error::Client(error.to_string()) }
}

/// Makes clients, and knows whether all brokers are gone.
#[derive(Debug, Clone)]
pub struct Link {
    config: ClientConfig,
    heard: Arc<Heard>,
}

/// What clients found out by themselves.
#[derive(Debug, Default)]
struct Heard {
    /// All brokers are gone.
    down: AtomicBool,
    /// Brokers do not take who we say we are, or we not who they are: librdkafka's words.
    refusal: Mutex<Option<String>>,
}

impl Link {
    /// A way to the brokers of a configuration. Nothing connects before it is used.
    ///
    /// # Errors
    /// When the configuration can't be used.
    pub fn new(config: &Config) -> Result<Self, Error> {
        Ok(Self { config: config.client()?, heard: Arc::default() })
    }

    /// A client with further properties.
    ///
    /// # Errors
    /// When librdkafka does not take them together.
    pub fn make<T>(&self, properties: &[(&str, &str)]) -> Result<T, Error>
    where
        T: rdkafka::config::FromClientConfigAndContext<Quiet>,
    {
        self.make_with(properties, self.context())
    }

    /// A client that calls back a context of its own.
    ///
    /// # Errors
    /// When librdkafka does not take the properties together.
    pub fn make_with<C: ClientContext, T>(&self, properties: &[(&str, &str)], context: C) -> Result<T, Error>
    where
        T: rdkafka::config::FromClientConfigAndContext<C>,
    {
        let mut config = self.config.clone();
        for (name, value) in properties {
            // Not above what an operator chose.
            if config.get(name).is_none() {
                config.set(*name, *value);
            }
        }
        config.create_with_context(context).map_err(refused)
    }

    /// What hears librdkafka's log and errors.
    pub fn context(&self) -> Quiet {
        Quiet { heard: Arc::clone(&self.heard) }
    }

    /// Whether a client has found all brokers gone since this was asked last.
    pub fn take_down(&self) -> bool {
        self.heard.down.swap(false, Ordering::AcqRel)
    }

    /// Why brokers refuse us, or we them, if that was so since this was asked last.
    pub fn take_refusal(&self) -> Option<String> {
        self.heard.refusal().take()
    }
}

impl Heard {
    fn refusal(&self) -> MutexGuard<'_, Option<String>> {
        // It is replaced as a whole.
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes librdkafka's log and errors.
#[derive(Debug, Clone, Default)]
pub struct Quiet {
    heard: Arc<Heard>,
}

impl Quiet {
    /// Takes a line of the log.
    pub fn line(level: RDKafkaLogLevel, facility: &str, text: &str) {
        tracing::debug!(target: "librdkafka", ?level, facility, "{text}");
    }

    /// Takes an error that concerns a whole client.
    pub fn failed(&self, error: &KafkaError, text: &str) {
        let code = error.rdkafka_error_code();
        if code == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.heard.down.store(true, Ordering::Release);
        }
        if matches!(code, Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SSL)) {
            *self.heard.refusal() = Some(text.to_owned());
        }
        tracing::debug!(target: "librdkafka", %error, "{text}");
    }
}

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        Self::line(level, facility, text);
    }

    fn error(&self, error: KafkaError, text: &str) {
        self.failed(&error, text);
    }
}

impl ConsumerContext for Quiet {}

/// What becomes of a record is nobody's concern: none is sent.
impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// Whether an error says that the brokers are not to be had now, rather than that they refuse something.
pub fn is_away(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::MessageTimedOut
                | RDKafkaErrorCode::Resolve
        )
    )
}

/// An error as a label of a metric.
pub fn reason(error: &KafkaError) -> &'static str {
    match error.rdkafka_error_code() {
        Some(_) if is_away(error) => "connection",
        Some(
            RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::GroupAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::SaslAuthenticationFailed
            | RDKafkaErrorCode::Authentication,
        ) => "denied",
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => "no_topic",
        Some(_) | None => "other",
    }
}
