//! Start, reload, stop: the order of things.
//!
//! Start: own metrics, addresses of HTTP, journal, listeners for lines, which count into their shards from then on, ledger and
//! flush, store, API, HTTP ingest, and the line `ready` on standard error. Stop: `/-/ready` says 503, the listeners read what
//! the kernel holds, shards seal and close, the last flush, the store's turn, then HTTP ends. What is left at the deadline is
//! in the journal. Reloads are read beside all that, one after the other. systemd is told of each, where it runs the agent.
//!
//! At SIGUSR2 another process takes over ([`crate::handover`]): it starts as above, but opens the journal only when this one
//! has stopped. If it fails, this one starts again with all that it kept.

mod lookout;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::LocalSet;

use crate::aggregate::ledger::Ledger;
use crate::aggregate::shard::{Budget, SeriesId};
use crate::config::{Config, Kind};
use crate::flush::{self, Parts, Running};
use crate::handover::{self, Predecessor, Program, Successor};
use crate::heartbeat::Beat;
use crate::http::forward::{Forward, Forwarder};
use crate::http::scrape::Mapper;
use crate::http::tokens::Right;
use crate::http::{self, Access, Api, Health, Keeping, Reload};
use crate::ingest::{Rejects, Settings, Sources, Times, Worker, Workers};
use crate::inherited::{Inherited, Left, Named, Use};
#[cfg(feature = "kafka")]
use crate::kafka::NotStarted;
#[cfg(feature = "kafka")]
use crate::listen::kafka::{Input, Kept};
use crate::listen::{self, Listeners, Passed};
#[cfg(feature = "kafka")]
use crate::sample::Marks;
use crate::store::journal::{self, Damage, Journal, Opened};
#[cfg(feature = "kafka")]
use crate::store::kafka;
use crate::store::redis::{Deleted, RedisReader};
use crate::store::ship;
use crate::systemd::{self, MoreTime};
use crate::telemetry;
use crate::tls;
use crate::units::ListenAddress;
use crate::view::{Batched, Remote, View};
use lookout::{Lookout, Refused};

/// Why an agent could not start.
#[derive(Debug)]
pub enum Error {
    /// A listener for lines.
    Listen(listen::Error),
    /// A listener for requests.
    Http(http::Error),
    /// The journal.
    Journal(journal::Error),
    /// Fold and flush.
    Flush(flush::Error),
    /// The store.
    Ship(ship::Error),
    /// What speaks to Kafka: store, input or forward.
    #[cfg(feature = "kafka")]
    Kafka(NotStarted),
    /// Our own metrics.
    Telemetry(telemetry::Error),
    /// The agent that was to be taken over from.
    HandOver(io::Error),
    /// A thread, a runtime or a signal.
    System(io::Error),
}

impl Error {
    /// The exit code, after sysexits.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Listen(error) => error.exit_code(),
            Self::Http(error) => error.exit_code(),
            Self::Journal(error) | Self::Flush(flush::Error::Journal(error)) => error.exit_code(),
            Self::Ship(ship::Error::Config(error)) => error.exit_code(),
            #[cfg(feature = "kafka")]
            Self::Kafka(error) => error.exit_code(),
            Self::HandOver(_) => 69,
            Self::Ship(ship::Error::Thread(_))
            | Self::Flush(flush::Error::Thread(_))
            | Self::Telemetry(_)
            | Self::System(_) => 74,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen(error) => error.fmt(f),
            Self::Http(error) => error.fmt(f),
            Self::Journal(error) | Self::Flush(flush::Error::Journal(error)) => error.fmt(f),
            Self::Ship(error) => error.fmt(f),
            #[cfg(feature = "kafka")]
            Self::Kafka(error) => error.fmt(f),
            Self::HandOver(error) => {
                write!(f, "nothing to take over: {error}; start tallyd without {}", handover::VARIABLE)
            }
            Self::Telemetry(error) => error.fmt(f),
            Self::Flush(flush::Error::Thread(error)) | Self::System(error) => {
                write!(f, "{error}; raise the limit of threads or open files")
            }
        }
    }
}

impl std::error::Error for Error {}

/// Runs an agent until SIGTERM or SIGINT, or until another has taken over. `reload` reads the configuration again, on SIGHUP
/// and `POST /-/reload`; its error is what is wrong with it.
///
/// # Errors
/// When a part cannot start.
pub fn run(config: &Config, reload: impl FnMut() -> Result<Config, Vec<String>> + Send + 'static) -> Result<(), Error> {
    let program = Program::of_this_process().map_err(Error::System)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::System)?;
    let mut signals = Signals::of(&runtime).map_err(Error::System)?;
    let exporter = telemetry::install().map_err(Error::Telemetry)?;
    telemetry::HANDOVERS.begin([["taken_over"], ["failed"]]);
    let reloads = Reloads::serve(config, reload)?;
    let mut origin = Origin::of_this_process().map_err(Error::System)?;
    loop {
        let config = reloads.in_force.config();
        let more_time = MoreTime::asking("starting: reading the journal");
        let agent = Agent::start(&config, origin, &exporter, &reloads)?;
        drop(more_time);
        agent.say_ready();
        agent.lookout.borrow_mut().begin();
        let within = config.limits.agent.stop.0;
        match runtime.block_on(agent.obey(&mut signals, &reloads, &program)) {
            Told::Stop => {
                agent.stop(within);
                return Ok(());
            }
            Told::HandOver(successor) => match agent.hand_over(successor, within) {
                Ok(()) => return Ok(()),
                Err(kept) => origin = kept,
            },
        }
    }
}

/// What an agent begins with.
enum Origin {
    /// Nothing, or what systemd gave it.
    Start(Inherited),
    /// What another gives it, which still runs.
    TakeOver(Predecessor),
    /// What it had itself, since the one that was to take over did not.
    GoOn(Inherited, Vec<Passed>),
}

impl Origin {
    fn of_this_process() -> io::Result<Self> {
        let predecessor = Predecessor::of_this_process()?;
        Ok(predecessor.map_or_else(|| Self::Start(Inherited::from_systemd()), Self::TakeOver))
    }
}

/// What the agent is told by signals.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    hand_over: Signal,
}

impl Signals {
    /// From now on they end nothing by themselves.
    fn of(runtime: &Runtime) -> io::Result<Self> {
        let _inside = runtime.enter();
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            hand_over: signal(SignalKind::user_defined2())?,
        })
    }
}

/// Why an agent ends.
enum Told {
    /// It is to stop.
    Stop,
    /// Another has begun to read its sockets.
    HandOver(Successor),
}

/// The row of `[limits]` that bounds a stop.
pub mod limits {
    use serde::{Deserialize, Serialize};

    use crate::units::Time;

    /// The row of `[limits]` that bounds a stop.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct Limits {
        /// How long a stop may take; what is left then is in the journal.
        pub stop: Time,
    }

    impl Default for Limits {
        fn default() -> Self {
            Self { stop: Time::secs(20) }
        }
    }
}

/// A running agent.
struct Agent {
    running: Running,
    ship: Option<Ship>,
    api: Thread,
    listeners: Listeners,
    #[cfg(feature = "kafka")]
    input: Option<Input>,
    health: Arc<Health>,
    exporter: telemetry::Exporter,
    bound: BTreeMap<String, Vec<String>>,
    sockets: Arc<Vec<Named>>,
    /// To see that nobody has it any more.
    journal: Weak<Journal>,
    lookout: RefCell<Lookout>,
}

/// Who may come in, and as whom we speak TLS: what a reload may change under all listeners. Clones share it.
#[derive(Clone)]
struct Entry {
    access: Access,
    tls: tls::Acceptor,
}

impl Entry {
    fn new(config: &Config) -> Self {
        let tls = tls::Acceptor::new(config.tls.identity.clone(), config.limits.http.header_time.0);
        let access = Access::new(&config.http.tokens, config.limits.ingest.reject_log, tls.clone());
        Self { access, tls }
    }

    fn set(&self, config: &Config) {
        self.access.set(&config.http.tokens);
        self.tls.set(config.tls.identity.clone());
    }
}

impl Agent {
    fn start(
        config: &Config,
        origin: Origin,
        exporter: &telemetry::Exporter,
        reloads: &Reloads,
    ) -> Result<Self, Error> {
        let (mut inherited, mut streams, mut predecessor) = match origin {
            Origin::Start(inherited) => (inherited, Vec::new(), None),
            Origin::TakeOver(mut predecessor) => {
                (predecessor.sockets().map_err(Error::HandOver)?, Vec::new(), Some(predecessor))
            }
            Origin::GoOn(inherited, streams) => (inherited, streams, None),
        };
        let entry = &reloads.in_force.entry;
        let http_sockets = HttpSockets::bind(&config.http, &mut inherited).map_err(Error::Http)?;
        let mut journal = if predecessor.is_none() { open_journal(config).map_err(Error::Journal)? } else { None };
        let ledger = Arc::new(Ledger::new(config.flush.window.as_millis()));
        let is_remote = config.store.kind == Kind::Redis;
        let budget = Arc::new(Budget::beside(Arc::clone(&ledger), &config.limits.aggregate, is_remote));
        let rejects = Arc::new(Rejects::new(&config.limits.ingest));
        let flush::Config { interval, window, .. } = config.flush;
        let times = Times { interval_ms: interval.as_millis(), window_ms: window.as_millis() };
        let sources = Sources::new(&config.limits.sources, config.limits.flush.idle);
        let (workers, deliveries) =
            Workers::telling_apart(sources, settings(config), Arc::clone(&budget), Arc::clone(&rejects), times);
        let mut bound = http_sockets.bound();
        let HttpSockets { ingest, api: api_sockets, scrape } = http_sockets;
        // From here on lines are counted, into shards that keep all of it until there is a ledger.
        let (mut listeners, http_ingest) = start_listeners(ingest, config, &workers, entry, &mut inherited)?;
        if let Some(predecessor) = &mut predecessor {
            listeners.leave_files(true);
            streams = predecessor.replace().map_err(Error::HandOver)?;
            journal = open_journal(config).map_err(Error::Journal)?;
        }
        let (sockets, left) = inherited.sort_out();
        let bells = Arc::new(Bells::default());
        let parts = Parts {
            workers: Arc::clone(&workers),
            deliveries,
            ledger: Arc::clone(&ledger),
            budget,
            journal: journal.clone(),
            remote: is_remote,
            exact: config.listen.kafka,
            on_commit: ring(&bells),
        };
        let running = Running::start(parts, &config.flush, &config.limits.flush).map_err(Error::Flush)?;
        let keeping = keeping(journal.as_ref(), &running)?;
        let ship = start_ship(config, journal.as_ref(), &running)?;
        let remote = remote(config, journal.as_ref(), ship.as_ref(), &bells)?;
        #[cfg(feature = "kafka")]
        let kept = journal.as_ref().map(|journal| (journal.agent().to_string(), journal.marks()));
        let weak = journal.as_ref().map_or_else(Weak::new, Arc::downgrade);
        let view =
            View::new(ledger, running.fold(), journal, rejects, workers.events(), workers.sources()).sharing(remote);
        let health = Arc::new(Health::watching(Arc::clone(workers.beats())));
        let (store, refused) = (config.store.kind, Arc::clone(&reloads.refused));
        let lookout = Lookout::new(Arc::clone(&workers), view.clone(), Arc::clone(&health), store, refused);
        let mapper = Arc::new(Mapper::new(config.mapping.rules.clone()));
        reloads.in_force.follow(&workers, &mapper);
        let api = Api {
            view,
            percentiles: config.flush.percentiles.clone(),
            health: Arc::clone(&health),
            reload: reloads.orders.clone(),
            prometheus: config.prometheus.clone(),
            mapper,
            exporter: exporter.clone(),
        };
        let beat = workers.beats().begin("api");
        let api = start_api(api_sockets, scrape, entry.access.clone(), api, config, beat)?;
        let forwarder = start_forwarder(config)?;
        if let Some(predecessor) = predecessor {
            predecessor.dismiss().map_err(Error::HandOver)?;
            telemetry::HANDOVERS.counter(&["taken_over"]).increment(1);
        }
        // What follows is acknowledged to clients, so nobody else may go on with what was there before.
        listeners.adopt(streams);
        http_ingest.start(keeping, forwarder)?;
        #[cfg(feature = "kafka")]
        let input = start_input(config, kept, &workers, &bells)?;
        for (listener, address) in listeners.bound() {
            bound.entry(listener.name().to_owned()).or_default().push(address.to_string());
        }
        for warning in listeners.warnings() {
            tracing::warn!("{warning}");
        }
        warn_of(&left);
        listeners.leave_files(systemd::is_there());
        keep_at_systemd(&sockets, &left);
        health.started(bound.clone());
        Ok(Self {
            running,
            ship,
            api,
            listeners,
            #[cfg(feature = "kafka")]
            input,
            health,
            exporter: exporter.clone(),
            bound,
            sockets: Arc::new(sockets),
            journal: weak,
            lookout: RefCell::new(lookout),
        })
    }

    /// The line that scripts and tests wait for.
    #[allow(clippy::print_stderr, reason = "the contract's line, whatever the level of the log")]
    fn say_ready(&self) {
        let addresses =
            self.bound.iter().flat_map(|(name, list)| list.iter().map(move |address| format!(" {name}={address}")));
        eprintln!("ready{}", addresses.collect::<String>());
    }

    /// Serves signals until one says stop, or another agent is there that takes over.
    async fn obey(&self, signals: &mut Signals, reloads: &Reloads, program: &Program) -> Told {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let mut search = None;
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => return Told::Stop,
                _ = signals.interrupt.recv() => return Told::Stop,
                // Where an order waits already, it will read what this one would.
                _ = signals.hangup.recv() => drop(reloads.orders.try_send(oneshot::channel().0)),
                _ = signals.hand_over.recv(), if search.is_none() => search = self.search_successor(program),
                found = outcome(&mut search) => {
                    search = None;
                    match found {
                        Ok(successor) => return Told::HandOver(successor),
                        Err(error) => not_taken_over(&error),
                    }
                }
                _ = second.tick() => {
                    self.exporter.upkeep();
                    self.lookout.borrow_mut().look(Instant::now());
                }
            }
        }
    }

    /// Starts a successor, on a thread of its own since that takes its time, for ever if the configuration is a pipe.
    fn search_successor(&self, program: &Program) -> Option<Search> {
        tracing::info!(program = %program, "another agent is started to take over");
        let (sockets, program) = (Arc::clone(&self.sockets), program.clone());
        let (answer, search) = oneshot::channel();
        // An agent that has stopped meanwhile has no use for it: then it is ended here.
        let run = move || drop(answer.send(Successor::start(&program, &sockets)));
        match thread::Builder::new().name("hand-over".to_owned()).spawn(run) {
            Ok(_) => Some(search),
            Err(error) => {
                not_taken_over(&error.into());
                None
            }
        }
    }

    fn stop(self, within: Duration) {
        tracing::info!("stopping");
        systemd::stopping(within);
        let _more_time = MoreTime::asking("stopping: the last flush");
        let deadline = Instant::now() + within;
        self.end(deadline, |listeners| listeners.stop(within / 2));
        tracing::info!("stopped");
    }

    /// Leaves all to the successor, which reads the sockets already. The error is what to go on with, since it did not take
    /// it.
    fn hand_over(self, mut successor: Successor, within: Duration) -> Result<(), Origin> {
        let id = successor.id();
        tracing::info!(successor = id, "handing over");
        systemd::alive();
        let deadline = Instant::now() + within;
        let (sockets, journal) = (Arc::clone(&self.sockets), Weak::clone(&self.journal));
        let streams = self.end(deadline, |listeners| listeners.pass_on(http::GRACE.min(within / 2)));
        while journal.strong_count() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        match successor.hand_over(&streams, systemd::alive) {
            Ok(()) => {
                tracing::info!(successor = id, streams = streams.len(), "handed over");
                systemd::main_pid(id);
                // The successor waits for the end of this process before it says anything itself.
                systemd::barrier(BARRIER);
                Ok(())
            }
            Err(error) => {
                not_taken_over(&error);
                Err(Origin::GoOn(Inherited::again(&sockets), streams))
            }
        }
    }

    /// Ends all parts in their order.
    fn end<T>(self, deadline: Instant, end_listeners: impl FnOnce(Listeners) -> T) -> T {
        self.health.stopping();
        #[cfg(feature = "kafka")]
        if let Some(input) = &self.input {
            input.close();
        }
        let left = end_listeners(self.listeners);
        self.running.stop(deadline);
        #[cfg(feature = "kafka")]
        if let Some(input) = self.input {
            input.end(deadline);
        }
        if let Some(ship) = self.ship {
            ship.stop(deadline);
        }
        self.api.stop(deadline);
        left
    }
}

/// How long systemd may take to note a new main process.
const BARRIER: Duration = Duration::from_secs(5);

/// A successor that is being started.
type Search = oneshot::Receiver<Result<Successor, handover::Error>>;

/// How the search for a successor ends, if there is one.
async fn outcome(search: &mut Option<Search>) -> Result<Successor, handover::Error> {
    match search {
        Some(search) => search.await.unwrap_or(Err(handover::Error::Ended(None))),
        None => std::future::pending().await,
    }
}

fn not_taken_over(error: &handover::Error) {
    telemetry::HANDOVERS.counter(&["failed"]).increment(1);
    tracing::error!("nobody took over, this agent goes on: {error}");
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

/// What is in force of the configuration, and who is to know.
struct InForce {
    config: ArcSwap<Config>,
    entry: Entry,
    followers: Mutex<Option<(Arc<Workers>, Arc<Mapper>)>>,
}

impl InForce {
    fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    fn put(&self, config: Config) {
        let followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        tell(followers.as_ref(), &config);
        self.entry.set(&config);
        self.config.store(Arc::new(config));
    }

    /// Tells these of the configuration in force, and of each that follows.
    fn follow(&self, workers: &Arc<Workers>, mapper: &Arc<Mapper>) {
        let mut followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        *followers = Some((Arc::clone(workers), Arc::clone(mapper)));
        tell(followers.as_ref(), &self.config.load());
    }
}

fn tell(followers: Option<&(Arc<Workers>, Arc<Mapper>)>, config: &Config) {
    if let Some((workers, mapper)) = followers {
        workers.set(settings(config));
        mapper.set(config.mapping.rules.clone());
    }
}

/// Takes new configurations, or refuses them as a whole, as long as the process lives.
struct Reloads {
    orders: mpsc::Sender<Reload>,
    in_force: Arc<InForce>,
    refused: Arc<Refused>,
}

impl Reloads {
    /// That has a thread of its own, which ends with the process: a file may take its time to be read, for ever if it is a
    /// pipe, and a stop must not wait for it.
    fn serve(
        config: &Config,
        mut reload: impl FnMut() -> Result<Config, Vec<String>> + Send + 'static,
    ) -> Result<Self, Error> {
        let (orders, mut inbox) = mpsc::channel::<Reload>(1);
        let entry = Entry::new(config);
        let config = ArcSwap::from_pointee(config.clone());
        let in_force = Arc::new(InForce { config, entry, followers: Mutex::new(None) });
        let changed = Arc::clone(&in_force);
        let mut obey = move || {
            let refused = |wrong: &Vec<String>| {
                wrong.iter().for_each(|problem| tracing::error!("the configuration is refused: {problem}"));
            };
            let config = reload().inspect_err(refused)?;
            changed.put(config);
            Ok::<_, Vec<String>>(())
        };
        let refused = Arc::new(Refused::default());
        let noted = Arc::clone(&refused);
        let serve = move || {
            while let Some(answer) = inbox.blocking_recv() {
                systemd::reloading();
                let outcome = obey();
                noted.note(&outcome);
                let wrong = outcome.err().unwrap_or_default();
                // Who asked may have gone.
                drop(answer.send(wrong));
            }
        };
        thread::Builder::new().name("reload".to_owned()).spawn(serve).map_err(Error::System)?;
        Ok(Self { orders, in_force, refused })
    }
}

/// Who is told of each commit, once they are there.
#[derive(Default)]
struct Bells {
    ship: OnceLock<ship::Bell>,
    #[cfg(feature = "kafka")]
    kafka: OnceLock<kafka::Bell>,
    #[cfg(feature = "kafka")]
    input: OnceLock<Kept>,
}

/// Tells of each commit.
fn ring(bells: &Arc<Bells>) -> flush::OnCommit {
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
enum Ship {
    Redis(ship::Handle),
    #[cfg(feature = "kafka")]
    Kafka(kafka::Handle),
}

impl Ship {
    fn stop(self, deadline: Instant) {
        match self {
            Self::Redis(ship) => ship.stop(deadline),
            #[cfg(feature = "kafka")]
            Self::Kafka(ship) => ship.stop(deadline),
        }
    }
}

fn start_ship(config: &Config, journal: Option<&Arc<Journal>>, running: &Running) -> Result<Option<Ship>, Error> {
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
fn start_input(
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

fn remote(
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

fn keeping(journal: Option<&Arc<Journal>>, running: &Running) -> Result<Keeping, Error> {
    let receipts = journal.map(|journal| journal.receipts()).transpose().map_err(Error::Journal)?;
    Ok(Keeping { fold: running.fold(), has_journal: receipts.is_some(), receipts: receipts.unwrap_or_default() })
}

fn settings(config: &Config) -> Settings {
    Settings {
        protocol: config.protocol.clone(),
        limits: config.limits.protocol.clone(),
        mapping: config.mapping.rules.clone(),
    }
}

fn open_journal(config: &Config) -> Result<Option<Arc<Journal>>, journal::Error> {
    let with_outbox = match config.store.kind {
        Kind::Memory => return Ok(None),
        Kind::Embedded => false,
        #[cfg(feature = "kafka")]
        Kind::Kafka => false,
        Kind::Redis => true,
    };
    let limits = journal::Limits { receipts: config.limits.http.idempotency_keys, ..config.limits.journal.clone() };
    let (journal, opened) = Journal::open(&config.state_dir, &config.store.embedded, &limits, with_outbox)?;
    let Opened { agent, new, damage, totals, batches } = opened;
    tracing::info!(%agent, new, totals, batches, directory = %config.state_dir.display(), "the journal is open");
    if let Some(Damage { moved_to, cause, totals, batches, damaged }) = damage {
        let moved_to = moved_to.display();
        tracing::error!(%moved_to, cause, totals, batches, damaged, "the journal could not be opened; what could be read of it was copied");
    }
    Ok(Some(Arc::new(journal)))
}

/// The listening sockets of all HTTP servers, bound before anything else starts, since that is what goes wrong first.
struct HttpSockets {
    ingest: Vec<http::Socket>,
    api: Vec<http::Socket>,
    scrape: Vec<http::Socket>,
}

impl HttpSockets {
    fn bind(config: &http::Config, inherited: &mut Inherited) -> Result<Self, http::Error> {
        Ok(Self {
            ingest: guarded(Use::Ingest, http::bind(Use::Ingest, &config.ingest, inherited)?, config, Right::Write)?,
            api: guarded(Use::Api, http::bind(Use::Api, &config.api, inherited)?, config, Right::Admin)?,
            scrape: http::bind(Use::Scrape, &config.scrape, inherited)?,
        })
    }

    fn bound(&self) -> BTreeMap<String, Vec<String>> {
        let of = |sockets: &[http::Socket]| {
            sockets.iter().filter_map(http::Socket::address).map(|address| address.to_string()).collect()
        };
        [("ingest", &self.ingest), ("api", &self.api), ("scrape", &self.scrape)]
            .map(|(name, sockets)| (name.to_owned(), of(sockets)))
            .into()
    }
}

/// The sockets, unless other machines reach one without the token that this takes. The configuration is held to that
/// before; what units opened shows only here.
fn guarded(
    r#use: Use,
    sockets: Vec<http::Socket>,
    config: &http::Config,
    right: Right,
) -> Result<Vec<http::Socket>, http::Error> {
    let is_open = config.tokens.file(right).is_none() && !config.insecure;
    let reached = |address: &ListenAddress| !address.address.ip().to_canonical().is_loopback();
    match sockets.iter().filter_map(http::Socket::address).find(reached) {
        Some(address) if is_open => Err(http::Error::Open { key: r#use.name(), address, right }),
        Some(_) | None => Ok(sockets),
    }
}

/// A thread with a runtime that ends when it is told to.
struct Thread {
    /// How long requests under way have.
    stop: oneshot::Sender<Duration>,
    thread: JoinHandle<()>,
}

impl Thread {
    fn stop(self, deadline: Instant) {
        let grace = http::GRACE.min(deadline.saturating_duration_since(Instant::now()));
        // Both fail only when it has ended already.
        let _ = self.stop.send(grace);
        drop(self.thread.join());
    }
}

fn start_api(
    sockets: Vec<http::Socket>,
    scrape: Vec<http::Socket>,
    access: Access,
    api: Api,
    config: &Config,
    beat: Beat,
) -> Result<Thread, Error> {
    let (stop, stopped) = oneshot::channel();
    let (started, outcome) = std::sync::mpsc::channel();
    let (http, limits) = (config.http.clone(), config.limits.http.clone());
    let run = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(started.send(Err(Error::System(error)))),
        };
        LocalSet::new().block_on(&runtime, async {
            match http::start_api(sockets, scrape, access, api, &http, &limits) {
                Ok(server) => {
                    drop(started.send(Ok(())));
                    tokio::task::spawn_local(pulse(beat));
                    // An agent that is gone without a word stops as well.
                    let grace = stopped.await.unwrap_or(http::GRACE);
                    server.stop(grace).await;
                }
                Err(error) => drop(started.send(Err(Error::Http(error)))),
            }
        });
        // A name that is being looked up holds up no stop.
        runtime.shutdown_background();
    };
    let thread = thread::Builder::new().name("api".to_owned()).spawn(run).map_err(Error::System)?;
    match outcome.recv() {
        Ok(result) => result.map(|()| Thread { stop, thread }),
        Err(_) => Err(Error::System(io::Error::other("the API's thread ended at once"))),
    }
}

/// Beats as long as a runtime goes round.
async fn pulse(beat: Beat) {
    loop {
        beat.beat();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// What forwards records that come by HTTP, if they are to be forwarded.
fn start_forwarder(config: &Config) -> Result<Option<Forwarder>, Error> {
    match config.ingest.forward {
        Forward::None => Ok(None),
        #[cfg(feature = "kafka")]
        Forward::Kafka => {
            Forwarder::new(&config.kafka).map(Some).map_err(|error| Error::Kafka(NotStarted::Config(error)))
        }
    }
}

/// HTTP ingest on the stream worker's thread, which waits for what it needs.
struct HttpIngest {
    start: oneshot::Sender<(Keeping, Option<Forwarder>)>,
    started: std::sync::mpsc::Receiver<Result<(), http::Error>>,
}

impl HttpIngest {
    fn start(self, keeping: Keeping, forwarder: Option<Forwarder>) -> Result<(), Error> {
        // Where the thread has ended nothing comes back either.
        drop(self.start.send((keeping, forwarder)));
        match self.started.recv() {
            Ok(started) => started.map_err(Error::Http),
            Err(_) => Err(Error::System(io::Error::other("the stream worker's thread ended at once"))),
        }
    }
}

/// Starts the listeners for lines, and beside them on the stream worker's thread what becomes HTTP ingest.
fn start_listeners(
    ingest: Vec<http::Socket>,
    config: &Config,
    workers: &Arc<Workers>,
    entry: &Entry,
    inherited: &mut Inherited,
) -> Result<(Listeners, HttpIngest), Error> {
    let (http, limits, access) = (config.http.clone(), config.limits.http.clone(), entry.access.clone());
    let (answer, started) = std::sync::mpsc::channel();
    let (start, parts) = oneshot::channel();
    let beside = move |worker: Rc<RefCell<Worker>>, mut ends: watch::Receiver<bool>| async move {
        // An error means that the agent did not come so far.
        let Ok((keeping, forwarder)) = parts.await else { return };
        match http::start_ingest(ingest, access, worker, keeping, forwarder, &http, &limits) {
            Ok(server) => {
                drop(answer.send(Ok(())));
                // An error means that the listeners are gone, which is an end as well.
                drop(ends.wait_for(|ends| *ends).await);
                server.stop(http::GRACE).await;
            }
            Err(error) => drop(answer.send(Err(error))),
        }
    };
    let (of_lines, tls) = (&config.limits.listen, entry.tls.clone());
    let listeners = listen::start(&config.listen, of_lines, tls, workers, inherited, beside);
    Ok((listeners.map_err(Error::Listen)?, HttpIngest { start, started }))
}
