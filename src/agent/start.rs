//! The start of an agent, part by part: what it inherited, listeners that count from then on, the journal, the ledger that
//! is read back from it, the store, the API, HTTP ingest.

use std::cell::RefCell;
use std::net::TcpListener;
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
use crate::export::console::{self, Backend, Console};
use crate::export::graphite;
use crate::export::relay::Relay;
use crate::flush::{self, Parts, Running};
use crate::handover::Predecessor;
use crate::http::scrape::Mapper;
use crate::http::{self, Api, Health};
use crate::ingest::copies::Copies;
use crate::ingest::{Delivery, Listener, Rejects, Sources, Times, Workers};
use crate::inherited::{Inherited, Left, Named};
use crate::listen::{Address, Listeners, Passed};
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
    relay: Option<Relay>,
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
        // Workers make copies only if they are wanted before there are any.
        let copies = if config.export.relay.to.is_empty() { None } else { workers.copies() };
        let (listeners, http_ingest) = start_listeners(ingest, config, &workers, entry, inherited)?;
        let relay = copies.map(|copies| start_relay(config, copies, &listeners, &workers)).transpose()?;
        Ok(Self { ledger, budget, rejects, workers, deliveries, listeners, relay, http_ingest })
    }
}

/// Sends on what workers copied since the listeners began.
fn start_relay(config: &Config, copies: Copies, listeners: &Listeners, workers: &Arc<Workers>) -> Result<Relay, Error> {
    let own = listeners.bound().iter().filter_map(|(listener, address)| match address {
        Address::Inet(address) if *listener == Listener::Udp => Some(*address),
        Address::Inet(_) | Address::Tls(_) | Address::Unix(_) => None,
    });
    Relay::start(&config.export.relay, copies, &own.collect::<Vec<_>>(), workers.beats()).map_err(Error::Relay)
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
        let console = console::bind(&config.export.console, config.http.insecure, &mut inherited);
        let console = console.map_err(Error::Console)?;
        let at = |listener: &TcpListener| listener.local_addr().ok().map(|address| address.to_string());
        if !console.is_empty() {
            bound.insert("console".to_owned(), console.iter().filter_map(at).collect());
        }
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
        let Front { ledger, budget, rejects, workers, deliveries, mut listeners, relay, http_ingest } = front;
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
        let console = start_console(console, &view, graphite.as_ref(), &workers, reloads)?;
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
            relay,
            console,
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

/// Etsy's console at these sockets, if there are any.
fn start_console(
    listeners: Vec<TcpListener>,
    view: &View,
    graphite: Option<&graphite::Running>,
    workers: &Arc<Workers>,
    reloads: &Reloads,
) -> Result<Option<Console>, Error> {
    if listeners.is_empty() {
        return Ok(None);
    }
    let in_force = Arc::clone(&reloads.in_force);
    let flushed = view.clone();
    let figures = move || vec![("last_flush", flushed.flushed_until_ms() / 1_000)];
    let journal = view.journal().map(|_| Backend { name: "journal", figures: Box::new(figures) });
    let graphite = graphite.map(|running| Backend { name: "graphite", figures: Box::new(running.figures()) });
    let parts = console::Parts {
        view: view.clone(),
        begun_ms: workers.begun_ms(),
        config: Box::new(move || in_force.config().plain()),
        backends: graphite.into_iter().chain(journal).collect(),
    };
    Console::start(listeners, parts, workers.beats()).map(Some).map_err(Error::Console)
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
        reload: config.http.lifecycle.then(|| reloads.orders.clone()),
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
