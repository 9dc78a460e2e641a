//! An agent without its process, made of the library's own parts: workers, fold, ledger and, where they are wanted, the
//! UDP listener and the journal. Seals come when they are asked for, or by the clock for those who want flushes.

use std::future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tallyd::aggregate::ledger::Ledger;
use tallyd::aggregate::shard::{self, Budget};
use tallyd::flush::{self, OnCommit, Parts, Running};
use tallyd::ingest::{self, Listener, Rejects, Settings, Source, Times, Worker, Workers};
use tallyd::inherited::Inherited;
use tallyd::listen::{self, Address, Listeners};
use tallyd::store::journal::Journal;
use tallyd::telemetry::{self, Exporter};
use tallyd::tls;
use tallyd::units::{Size, Time};

use super::clock::{PATIENCE, Thread};

/// Which parts there are beside a worker, whose datagrams the bench gives it, and the fold.
pub(crate) struct Setup {
    /// A UDP listener with one worker of its own.
    pub(crate) listens: bool,
    /// How often seals are due.
    pub(crate) interval: Time,
    pub(crate) journal: Option<Arc<Journal>>,
    /// Whether the journal keeps batches for a store.
    pub(crate) is_remote: bool,
    pub(crate) on_commit: OnCommit,
}

impl Default for Setup {
    fn default() -> Self {
        let interval = Time::secs(86_400);
        Self { listens: false, interval, journal: None, is_remote: false, on_commit: Box::new(|_| {}) }
    }
}

/// The running parts.
pub(crate) struct Engine {
    workers: Arc<Workers>,
    ledger: Arc<Ledger>,
    /// All three are there until the end.
    worker: Option<Worker>,
    running: Option<Running>,
    listeners: Option<Listeners>,
}

impl Engine {
    pub(crate) fn start(setup: Setup) -> Self {
        static EXPORTER: OnceLock<Exporter> = OnceLock::new();
        EXPORTER.get_or_init(|| telemetry::install().expect("the only metrics of this process"));
        let config = flush::Config { interval: setup.interval, ..flush::Config::default() };
        let memory = Size(64 << 30);
        let limits = shard::Limits { series: 40_000_000, memory, new_series: u32::MAX, ..shard::Limits::default() };
        let ledger = Arc::new(Ledger::new(config.window.as_millis()));
        let budget = Arc::new(Budget::beside(Arc::clone(&ledger), &limits, setup.is_remote));
        let times = Times { interval_ms: config.interval.as_millis(), window_ms: config.window.as_millis() };
        let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
        let settings = Settings { protocol: Default::default(), limits: Default::default(), mapping: None };
        let (workers, deliveries) = Workers::new(settings, Arc::clone(&budget), rejects, times);
        let parts = Parts {
            workers: Arc::clone(&workers),
            deliveries,
            ledger: Arc::clone(&ledger),
            budget,
            journal: setup.journal,
            remote: setup.is_remote,
            exact: false,
            on_commit: setup.on_commit,
        };
        let running = Running::start(parts, &config, &flush::Limits::default()).expect("fold and flush");
        let listeners = setup.listens.then(|| listen(&workers));
        let worker = Some(workers.register(|| {}));
        Self { workers, ledger, worker, running: Some(running), listeners }
    }

    /// Where the listener listens.
    pub(crate) fn address(&self) -> SocketAddr {
        let bound = self.listeners.as_ref().map_or(&[][..], Listeners::bound);
        let udp = bound.iter().find_map(|(_, address)| match address {
            Address::Inet(address) => Some(*address),
            Address::Tls(_) | Address::Unix(_) => None,
        });
        udp.expect("a listener")
    }

    /// The listener's worker.
    pub(crate) fn listener(&self) -> Thread {
        Thread::named("udp-0")
    }

    /// The thread that folds.
    pub(crate) fn folder(&self) -> Thread {
        Thread::named("fold")
    }

    /// Gives the bench's worker a datagram.
    #[inline]
    pub(crate) fn datagram(&mut self, packet: &[u8]) {
        self.worker().datagram(packet, Source { listener: Listener::Udp, address: None });
    }

    /// Lets the bench's worker do what is due.
    pub(crate) fn turn(&mut self) {
        let worker = self.worker();
        worker.turn(worker.question());
        worker.stamp();
    }

    /// Asks for a seal: how long the bench's worker is held up by it.
    pub(crate) fn seal(&mut self) -> Duration {
        self.workers.ask();
        let begun = Instant::now();
        self.turn();
        begun.elapsed()
    }

    /// Seals, and waits until all that came is folded.
    pub(crate) fn fold(&mut self) {
        let fold = self.running().fold();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(async {
            let turns = async {
                loop {
                    self.turn();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::select! {
                () = fold.fresh() => {}
                () = turns => future::pending().await,
            }
        });
    }

    /// Until when accepted samples are in the journal, in milliseconds since the epoch.
    pub(crate) fn flushed_until_ms(&self) -> u64 {
        self.running().fold().status().flushed_until_ms()
    }

    /// How many series the ledger holds.
    pub(crate) fn series(&self) -> usize {
        self.ledger.len()
    }

    fn worker(&mut self) -> &mut Worker {
        self.worker.as_mut().expect("a worker until the end")
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("a fold until the end")
    }
}

/// Starts a listener with one worker on a free port.
fn listen(workers: &Arc<Workers>) -> Listeners {
    let config = listen::Config {
        udp: vec!["127.0.0.1:0".to_owned()],
        tcp: Vec::new(),
        workers: 1,
        ..listen::Config::default()
    };
    let tls = tls::Acceptor::new(None, Duration::ZERO);
    let limits = listen::Limits::default();
    listen::start(&config, &limits, tls, workers, &mut Inherited::default(), |_, _| future::ready(()))
        .expect("a listener")
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(listeners) = self.listeners.take() {
            listeners.stop(PATIENCE);
        }
        if let Some(worker) = self.worker.take() {
            worker.close();
        }
        if let Some(running) = self.running.take() {
            running.stop(Instant::now() + PATIENCE);
        }
    }
}
