//! The start of an agent, part by part: what it inherited, listeners that count from then on, the journal, the ledger that
//! is read back from it, the store, the API, HTTP ingest.

use std::cell::RefCell;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::lookout::Lookout;
use super::reloads::{Entry, Reloads, settings};
use super::servers::{HttpIngest, HttpSockets, start_api, start_forwarder, start_listeners};
#[cfg(feature = "kafka")]
use super::stores::start_input;
use super::stores::{Bells, keeping, open_journal, remote, ring, start_graphite, start_ship};
use super::{Agent, Error, Origin};
use crate::aggregate::ledger::Ledger;
use crate::aggregate::shard::Budget;
use crate::config::{Config, Kind};
use crate::flush::{self, Parts, Running};
use crate::handover::Predecessor;
use crate::http::scrape::Mapper;
use crate::http::{self, Api, Health};
use crate::ingest::{Delivery, Rejects, Sources, Times, Workers};
use crate::inherited::{Inherited, Left, Named};
use crate::listen::{Listeners, Passed};
use crate::sync::Receiver;
use crate::systemd;
use crate::telemetry;
use crate::view::View;

impl Origin {
    /// The sockets and streams there are, and who is to be taken over from.
    fn open(self) -> Result<(Inherited, Vec<Passed>, Option<Predecessor>), Error> {
        match self {
            Self::Start(inherited) => Ok((inherited, Vec::new(), None)),
            Self::GoOn(inherited, streams) => Ok((inherited, streams, None)),
            Self::TakeOver(mut predecessor) => {
                let inherited = predecessor.sockets().map_err(Error::HandOver)?;
                Ok((inherited, Vec::new(), Some(predecessor)))
            }
        }
    }
}

/// How long who had the journal may take to let go of it.
const LET_GO: Duration = Duration::from_secs(5);

/// The part that takes lines and counts them in shards, which keep all of it until there is a ledger.
struct Front {
    ledger: Arc<Ledger>,
    budget: Arc<Budget>,
    rejects: Arc<Rejects>,
    workers: Arc<Workers>,
    deliveries: Receiver<Delivery>,
    listeners: Listeners,
    http_ingest: HttpIngest,
}

impl Front {
    fn start(
        config: &Config,
        ingest: Vec<http::Socket>,
        entry: &Entry,
        inherited: &mut Inherited,
    ) -> Result<Self, Error> {
        let flush::Config { interval, window, .. } = config.flush;
        let ledger = Arc::new(Ledger::new(window.as_millis()));
        let is_remote = config.store.kind == Kind::Redis;
        let budget = Arc::new(Budget::beside(Arc::clone(&ledger), &config.limits.aggregate, is_remote));
        let rejects = Arc::new(Rejects::new(&config.limits.ingest));
        let times = Times { interval_ms: interval.as_millis(), window_ms: window.as_millis() };
        let sources = Sources::new(&config.limits.sources, config.limits.flush.idle);
        let (workers, deliveries) =
            Workers::telling_apart(sources, settings(config), Arc::clone(&budget), Arc::clone(&rejects), times);
        let (listeners, http_ingest) = start_listeners(ingest, config, &workers, entry, inherited)?;
        Ok(Self { ledger, budget, rejects, workers, deliveries, listeners, http_ingest })
    }
}

impl Agent {
    pub(super) fn start(
        config: &Config,
        origin: Origin,
        exporter: &telemetry::Exporter,
        reloads: &Reloads,
    ) -> Result<Self, Error> {
        // Of an agent that goes on, something may still be ending.
        let patience = if matches!(origin, Origin::GoOn(..)) { LET_GO } else { Duration::ZERO };
        let (mut inherited, mut streams, mut predecessor) = origin.open()?;
        let http_sockets = HttpSockets::bind(&config.http, &mut inherited).map_err(Error::Http)?;
        let mut bound = http_sockets.bound();
        reloads.in_force.listen(http_sockets.guarded()).map_err(Error::Http)?;
        http_sockets.warn(&config.http);
        let HttpSockets { ingest, api, scrape } = http_sockets;
        // A directory that is in use ends a start before anything is read.
        let mut journal = None;
        match &mut predecessor {
            None => journal = open_journal(config, patience).map_err(Error::Journal)?,
            Some(predecessor) => predecessor.prepare().map_err(Error::HandOver)?,
        }
        let entry = &reloads.in_force.entry;
        let front = Front::start(config, ingest, entry, &mut inherited)?;
        if let Some(predecessor) = &mut predecessor {
            streams = predecessor.replace().map_err(Error::HandOver)?;
            journal = open_journal(config, LET_GO).map_err(Error::Journal)?;
        }
        let Front { ledger, budget, rejects, workers, deliveries, mut listeners, http_ingest } = front;
        let bells = Arc::new(Bells::default());
        let parts = Parts {
            workers: Arc::clone(&workers),
            deliveries,
            ledger: Arc::clone(&ledger),
            budget,
            journal: journal.clone(),
            remote: config.store.kind == Kind::Redis,
            exact: config.listen.kafka,
            on_commit: ring(&bells),
        };
        let running = Running::start(parts, &config.flush, &config.limits.flush).map_err(Error::Flush)?;
        let keeping = keeping(journal.as_ref(), &running)?;
        let graphite = start_graphite(config, &ledger, &workers)?;
        let ship = start_ship(config, journal.as_ref(), &running)?;
        let remote = remote(config, journal.as_ref(), ship.as_ref(), &bells)?;
        #[cfg(feature = "kafka")]
        let kept = journal.as_ref().map(|journal| (journal.agent().to_string(), journal.marks()));
        let held = journal.as_ref().map_or_else(Weak::new, Arc::downgrade);
        let view =
            View::new(ledger, running.fold(), journal, rejects, workers.events(), workers.sources()).sharing(remote);
        let health = Arc::new(Health::watching(Arc::clone(workers.beats())));
        let lookout = lookout(config, &workers, &view, &health, reloads);
        let pages = pages(config, view, &workers, &health, reloads, exporter);
        let api = start_api(api, scrape, entry.access.clone(), pages, config, workers.beats().begin("api"))?;
        let forwarder = start_forwarder(config)?;
        http_ingest.start(keeping, forwarder)?;
        #[cfg(feature = "kafka")]
        let input = start_input(config, kept, &workers, &bells)?;
        // Nothing can fail from here on.
        if let Some(predecessor) = predecessor {
            predecessor.dismiss();
            telemetry::HANDOVERS.counter(&["taken_over"]).increment(1);
        }
        listeners.adopt(streams);
        for (listener, address) in listeners.bound() {
            bound.entry(listener.name().to_owned()).or_default().push(address.to_string());
        }
        health.started(bound.clone());
        let sockets = Arc::new(settle(inherited, &mut listeners));
        Ok(Self {
            running,
            ship,
            graphite,
            api,
            listeners,
            #[cfg(feature = "kafka")]
            input,
            health,
            exporter: exporter.clone(),
            bound,
            sockets,
            journal: held,
            lookout: RefCell::new(lookout),
        })
    }
}

fn lookout(config: &Config, workers: &Arc<Workers>, view: &View, health: &Arc<Health>, reloads: &Reloads) -> Lookout {
    let refused = Arc::clone(&reloads.refused);
    Lookout::new(Arc::clone(workers), view.clone(), Arc::clone(health), config.store.kind, refused)
}

/// What the API shows. A reload finds its mapper and the workers from here on.
fn pages(
    config: &Config,
    view: View,
    workers: &Arc<Workers>,
    health: &Arc<Health>,
    reloads: &Reloads,
    exporter: &telemetry::Exporter,
) -> Api {
    let mapper = Arc::new(Mapper::new(config.mapping.rules.clone()));
    reloads.in_force.follow(workers, &mapper);
    Api {
        view,
        etsy: config.flush.etsy.clone(),
        health: Arc::clone(health),
        reload: reloads.orders.clone(),
        prometheus: config.prometheus.clone(),
        mapper,
        exporter: exporter.clone(),
    }
}

/// Ends with what was inherited: the sockets in use, which systemd may keep; the others are closed.
fn settle(inherited: Inherited, listeners: &mut Listeners) -> Vec<Named> {
    for warning in listeners.warnings() {
        tracing::warn!("{warning}");
    }
    let (sockets, left) = inherited.sort_out();
    warn_of(&left);
    left.remove_files();
    listeners.leave_files(systemd::is_there());
    keep_at_systemd(&sockets, &left);
    sockets
}

/// Lets systemd keep the sockets that it has not opened itself, for the next start. What it has already it does not keep
/// twice.
fn keep_at_systemd(sockets: &[Named], left: &Left) {
    let own = |named: &&Named| !named.is_of_unit;
    // It forgets by name.
    left.sockets.iter().filter(own).for_each(|named| systemd::forget(&named.name()));
    sockets.iter().filter(own).for_each(|named| systemd::store(&named.name(), &[named.socket.as_fd()]));
}

/// Says what was inherited for nothing. It is closed at the end of the start.
fn warn_of(left: &Left) {
    for named in &left.sockets {
        let address = named.socket.local_addr().ok();
        let address = address.as_ref().and_then(|address| address.as_socket()).map(|address| address.to_string());
        let (name, address) = (named.name(), address.unwrap_or_default());
        tracing::warn!(name, address, "an inherited socket is closed, since it is not configured any more");
    }
    for name in &left.strange {
        tracing::warn!(name, "an inherited descriptor is no listening socket that lines or requests could come by");
    }
}
