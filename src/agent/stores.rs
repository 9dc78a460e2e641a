//! What keeps the figures: the journal, what brings them to a store that agents share, and what pushes them to Graphite.

use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::Error;
use crate::aggregate::ledger::Ledger;
use crate::aggregate::shard::SeriesId;
use crate::config::{Config, Kind};
use crate::export::graphite;
use crate::flush::{self, Running};
use crate::http::Keeping;
use crate::ingest::{self, Workers};
#[cfg(feature = "kafka")]
use crate::listen::kafka::{Input, Kept};
#[cfg(feature = "kafka")]
use crate::sample::Marks;
use crate::store::journal::{self, Damage, Journal, Opened};
#[cfg(feature = "kafka")]
use crate::store::kafka;
use crate::store::redis::{Deleted, RedisReader};
use crate::store::ship;
use crate::view::{Batched, Remote};

/// Who is told of each commit, once they are there.
#[derive(Default)]
pub(super) struct Bells {
    ship: OnceLock<ship::Bell>,
    #[cfg(feature = "kafka")]
    kafka: OnceLock<kafka::Bell>,
    #[cfg(feature = "kafka")]
    input: OnceLock<Kept>,
}

/// Tells of each commit.
pub(super) fn ring(bells: &Arc<Bells>) -> flush::OnCommit {
    let bells = Arc::clone(bells);
    Box::new(move |written| {
        if let Some(bell) = bells.ship.get() {
            bell.ring();
        }
        #[cfg(feature = "kafka")]
        if let Some(bell) = bells.kafka.get() {
            let changed = written.changed.iter().map(|changed| (changed.series.kind(), changed.series.key()));
            bell.touched(changed.chain(written.deleted.iter().map(|(kind, key)| (*kind, key))));
        }
        #[cfg(feature = "kafka")]
        if let Some(kept) = bells.input.get() {
            kept.tell(written.marks);
        }
        #[cfg(not(feature = "kafka"))]
        let _ = written;
    })
}

/// What brings the journal's figures to a store that agents share.
pub(super) enum Ship {
    Redis(ship::Handle),
    #[cfg(feature = "kafka")]
    Kafka(kafka::Handle),
}

impl Ship {
    pub(super) fn stop(self, deadline: Instant) {
        match self {
            Self::Redis(ship) => ship.stop(deadline),
            #[cfg(feature = "kafka")]
            Self::Kafka(ship) => ship.stop(deadline),
        }
    }
}

pub(super) fn start_ship(
    config: &Config,
    journal: Option<&Arc<Journal>>,
    running: &Running,
) -> Result<Option<Ship>, Error> {
    let Some(journal) = journal else { return Ok(None) };
    match config.store.kind {
        Kind::Memory | Kind::Embedded => Ok(None),
        Kind::Redis => {
            ship::start(parts_of_redis(config, journal, running)).map(Ship::Redis).map(Some).map_err(Error::Ship)
        }
        #[cfg(feature = "kafka")]
        Kind::Kafka => {
            kafka::start(parts_of_kafka(config, journal, running)).map(Ship::Kafka).map(Some).map_err(Error::Kafka)
        }
    }
}

/// Starts to push to Graphite, if there is one.
pub(super) fn start_graphite(
    config: &Config,
    ledger: &Arc<Ledger>,
    workers: &Arc<Workers>,
) -> Result<Option<graphite::Running>, Error> {
    let workers = Arc::clone(workers);
    let begun_ms = workers.begun_ms();
    let intake = move || {
        let ingest::Intake { messages, lines, rejected } = workers.intake();
        graphite::Intake { packets: messages, lines, rejected }
    };
    let parts = graphite::Parts {
        ledger: Arc::clone(ledger),
        etsy: config.flush.etsy.clone(),
        config: config.export.graphite.clone(),
        limits: config.limits.graphite.clone(),
        begun_ms,
        intake: Box::new(intake),
    };
    graphite::start(parts).map_err(Error::System)
}

fn parts_of_redis(config: &Config, journal: &Arc<Journal>, running: &Running) -> ship::Parts {
    let fold = running.fold();
    let on_deleted = move |deleted: Vec<Deleted>| {
        fold.forget(deleted.into_iter().map(|deleted| SeriesId { kind: deleted.kind, key: deleted.key }).collect());
    };
    ship::Parts {
        journal: Arc::clone(journal),
        config: config.store.redis.clone(),
        limits: config.limits.redis.clone(),
        expire: config.limits.journal.store_expire,
        on_deleted: Arc::new(on_deleted),
    }
}

#[cfg(feature = "kafka")]
fn parts_of_kafka(config: &Config, journal: &Arc<Journal>, running: &Running) -> kafka::Parts {
    let fold = running.fold();
    kafka::Parts {
        journal: Arc::clone(journal),
        kafka: config.kafka.clone(),
        config: config.store.kafka.clone(),
        limits: config.limits.kafka.clone(),
        expire: config.limits.journal.store_expire,
        on_deleted: Arc::new(move |series, marks, answer| fold.follow(series, marks, answer)),
    }
}

/// Starts to read the topic of JSON records, if it is to be read, from where the journal has it.
#[cfg(feature = "kafka")]
pub(super) fn start_input(
    config: &Config,
    kept: Option<(String, Marks)>,
    workers: &Arc<Workers>,
    bells: &Bells,
) -> Result<Option<Input>, Error> {
    if !config.listen.kafka {
        return Ok(None);
    }
    let (member, marks) = kept.unzip();
    let input = Input::start(&config.kafka, member, marks.unwrap_or_default(), workers).map_err(Error::Kafka)?;
    bells.input.get_or_init(|| input.kept());
    Ok(Some(input))
}

pub(super) fn remote(
    config: &Config,
    journal: Option<&Arc<Journal>>,
    ship: Option<&Ship>,
    bells: &Bells,
) -> Result<Option<Remote>, Error> {
    let (Some(journal), Some(ship)) = (journal, ship) else { return Ok(None) };
    match ship {
        Ship::Redis(ship) => {
            let reader = RedisReader::new(&config.store.redis, &config.limits.redis);
            let reader = reader.map_err(|error| Error::Ship(ship::Error::Config(error)))?;
            let bell = bells.ship.get_or_init(|| ship.bell()).clone();
            Ok(Some(Remote::Redis(Batched { reader, bell, journal: Arc::clone(journal) })))
        }
        #[cfg(feature = "kafka")]
        Ship::Kafka(ship) => {
            bells.kafka.get_or_init(|| ship.bell()).ring();
            Ok(Some(Remote::Kafka(ship.reader())))
        }
    }
}

pub(super) fn keeping(journal: Option<&Arc<Journal>>, running: &Running) -> Result<Keeping, Error> {
    let receipts = journal.map(|journal| journal.receipts()).transpose().map_err(Error::Journal)?;
    Ok(Keeping { fold: running.fold(), has_journal: receipts.is_some(), receipts: receipts.unwrap_or_default() })
}

/// Opens the journal, if there is to be one. While another still has it, it is waited for as long as patience lasts.
pub(super) fn open_journal(config: &Config, patience: Duration) -> Result<Option<Arc<Journal>>, journal::Error> {
    let with_outbox = match config.store.kind {
        Kind::Memory => return Ok(None),
        Kind::Embedded => false,
        #[cfg(feature = "kafka")]
        Kind::Kafka => false,
        Kind::Redis => true,
    };
    let limits = journal::Limits { receipts: config.limits.http.idempotency_keys, ..config.limits.journal.clone() };
    let open = || Journal::open(&config.state_dir, &config.store.embedded, &limits, with_outbox);
    let until = Instant::now() + patience;
    let (journal, opened) = loop {
        match open() {
            Err(journal::Error::InUse(_)) if Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            opened => break opened?,
        }
    };
    let Opened { agent, new, damage, totals, batches } = opened;
    tracing::info!(%agent, new, totals, batches, directory = %config.state_dir.display(), "the journal is open");
    if let Some(Damage { moved_to, cause, totals, batches, damaged }) = damage {
        let moved_to = moved_to.display();
        tracing::error!(%moved_to, cause, totals, batches, damaged, "the journal could not be opened; what could be read of it was copied");
    }
    Ok(Some(Arc::new(journal)))
}
