//! Start, reload, stop: the order of things.
//!
//! Start: own metrics, addresses of HTTP, journal, listeners for lines, which count into their shards from then on, ledger and
//! flush, store, API, HTTP ingest, and the line `ready` on standard error. Stop: `/-/ready` says 503, the listeners read what
//! the kernel holds, shards seal and close, the last flush, the turns of Graphite and of the store side by side, then HTTP ends.
//! What is left at the deadline is in the journal, but for what waits for Graphite. Reloads are read beside all that, one after
//! the other. systemd is told of each, where it runs the agent.
//!
//! At SIGUSR2 another process takes over ([`crate::handover`]): it starts as above, but opens the journal only when this one
//! has stopped. What this one has for Graphite it sends then, beside the other one. If that fails, this one starts again with
//! all that it kept.

mod lookout;
mod reloads;
mod servers;
mod start;
mod stores;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::config::{Config, Level, Loaded};
use crate::export::console::{self, Console};
use crate::export::graphite::{self, Ending};
use crate::export::relay::{self, Relay};
use crate::flush::{self, Running};
use crate::handover::{self, Predecessor, Program, Successor};
use crate::http::{self, Health};
use crate::inherited::{Inherited, Named};
#[cfg(feature = "kafka")]
use crate::kafka::NotStarted;
#[cfg(feature = "kafka")]
use crate::listen::kafka::Input;
use crate::listen::{self, Listeners, Passed};
use crate::store::journal::{self, Journal};
use crate::store::ship;
use crate::systemd::{self, MoreTime};
use crate::telemetry;
use lookout::Lookout;
use reloads::Reloads;
use servers::Thread;
use stores::Ship;

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
    /// What sends lines on.
    Relay(relay::Error),
    /// Etsy's console.
    Console(console::Error),
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
            Self::Relay(error) => error.exit_code(),
            Self::Console(error) => error.exit_code(),
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
            Self::Relay(error) => error.fmt(f),
            Self::Console(error) => error.fmt(f),
            Self::Telemetry(error) => error.fmt(f),
            Self::Flush(flush::Error::Thread(error)) | Self::System(error) => {
                write!(f, "{error}; raise the limit of threads or open files")
            }
        }
    }
}

impl std::error::Error for Error {}

/// Runs an agent until SIGTERM or SIGINT, or until another has taken over. `reload` reads the configuration again, on SIGHUP
/// and `POST /-/reload`; its error is what is wrong with it. `set_level` sets the log's level, once a new one is in force.
///
/// # Errors
/// When a part cannot start.
pub fn run(
    config: &Config,
    reload: impl FnMut() -> Result<Loaded, Vec<String>> + Send + 'static,
    set_level: impl Fn(Level) + Send + 'static,
) -> Result<(), Error> {
    let program = Program::of_this_process(systemd::is_there()).map_err(Error::System)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::System)?;
    let mut signals = Signals::of(&runtime).map_err(Error::System)?;
    let exporter = telemetry::install().map_err(Error::Telemetry)?;
    telemetry::HANDOVERS.begin([["taken_over"], ["failed"]]);
    let reloads = Reloads::serve(config, reload, set_level)?;
    let mut origin = Origin::of_this_process().map_err(Error::System)?;
    loop {
        let config = reloads.in_force.config();
        // Of one that takes over systemd does not listen to yet.
        let is_first = matches!(origin, Origin::Start(_));
        let more_time = is_first.then(|| MoreTime::asking("starting: reading the journal"));
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
                Ok((successor, graphite)) => {
                    let is_to_stop = runtime.block_on(signals.are_to_stop());
                    leave(successor, is_to_stop, within);
                    // The successor is on its own and misses nothing of this process, whatever Graphite takes.
                    if let Some(graphite) = graphite {
                        graphite.wait();
                    }
                    return Ok(());
                }
                Err(kept) => origin = kept,
            },
        }
    }
}

/// Ends the hand-over to a successor that has taken all. Who told this process to stop meanwhile has told the successor too.
fn leave(successor: Successor, is_to_stop: bool, within: Duration) {
    if is_to_stop {
        systemd::stopping(within);
        if !successor.stop(within) {
            tracing::error!("the successor was told to stop, and has not ended");
        }
        return;
    }
    systemd::main_pid(successor.id());
    // The successor says nothing itself before that.
    systemd::barrier(BARRIER);
    successor.release();
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

    /// Whether one has come that says stop, while nobody looked.
    async fn are_to_stop(&mut self) -> bool {
        tokio::select! {
            _ = self.terminate.recv() => true,
            _ = self.interrupt.recv() => true,
            // Long enough for the runtime to look.
            () = tokio::time::sleep(Duration::from_millis(20)) => false,
        }
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
    relay: Option<Relay>,
    console: Option<Console>,
    graphite: Option<graphite::Running>,
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

impl Agent {
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
                    match found.and_then(|mut successor| successor.read().map(|()| successor)) {
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
        self.end(deadline, Ending::Stop, |listeners| listeners.stop(within / 2));
        tracing::info!("stopped");
    }

    /// Leaves all to the successor, which reads the sockets already. The error is what to go on with, since it did not take
    /// it.
    fn hand_over(
        self,
        mut successor: Successor,
        within: Duration,
    ) -> Result<(Successor, Option<graphite::Stopping>), Origin> {
        let id = successor.id();
        tracing::info!(successor = id, "handing over");
        systemd::alive();
        let deadline = Instant::now() + within;
        let (sockets, journal) = (Arc::clone(&self.sockets), Weak::clone(&self.journal));
        let pass_on = |listeners: Listeners| listeners.pass_on(http::GRACE.min(within / 2));
        let (streams, graphite) = self.end(deadline, Ending::HandOver, pass_on);
        while journal.strong_count() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        match successor.hand_over(&streams, systemd::alive) {
            Ok(()) => {
                tracing::info!(successor = id, streams = streams.len(), "handed over");
                Ok((successor, graphite))
            }
            Err(error) => {
                not_taken_over(&error);
                Err(Origin::GoOn(Inherited::again(&sockets), streams))
            }
        }
    }

    /// Ends all parts in their order, but at a hand-over Graphite's, which the successor is not to wait for.
    fn end<T>(
        self,
        deadline: Instant,
        ending: Ending,
        end_listeners: impl FnOnce(Listeners) -> T,
    ) -> (T, Option<graphite::Stopping>) {
        self.health.stopping();
        #[cfg(feature = "kafka")]
        if let Some(input) = &self.input {
            input.close();
        }
        if let Some(console) = self.console {
            console.stop();
        }
        let left = end_listeners(self.listeners);
        if let Some(relay) = self.relay {
            relay.stop(deadline);
        }
        self.running.stop(deadline);
        #[cfg(feature = "kafka")]
        if let Some(input) = self.input {
            input.end(deadline);
        }
        let ends = self.graphite.map(|graphite| graphite.stop(deadline, ending));
        if let Some(ship) = self.ship {
            ship.stop(deadline);
        }
        let still_ends = match ending {
            Ending::Stop => {
                ends.into_iter().for_each(graphite::Stopping::wait);
                None
            }
            Ending::HandOver => ends,
        };
        self.api.stop(deadline);
        (left, still_ends)
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
    // The packages' scripts look for these words.
    systemd::status(&format!("nobody took over: {error}"));
}
