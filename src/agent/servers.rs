//! The threads that serve: the API on one of its own, HTTP ingest beside the listeners of streams.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::task::LocalSet;

use super::Error;
use super::reloads::Entry;
use crate::config::Config;
use crate::heartbeat::Beat;
use crate::http::forward::{Forward, Forwarder};
use crate::http::tokens::Right;
use crate::http::{self, Access, Api, Guarded, Keeping};
use crate::ingest::{Worker, Workers};
use crate::inherited::{Inherited, Use};
#[cfg(feature = "kafka")]
use crate::kafka::NotStarted;
use crate::listen::{self, Listeners};
use crate::units::ListenAddress;

/// The listening sockets of all HTTP servers, bound before anything else starts, since that is what goes wrong first.
pub(super) struct HttpSockets {
    pub(super) ingest: Vec<http::Socket>,
    pub(super) api: Vec<http::Socket>,
    pub(super) scrape: Vec<http::Socket>,
}

impl HttpSockets {
    pub(super) fn bind(config: &http::Config, inherited: &mut Inherited) -> Result<Self, http::Error> {
        Ok(Self {
            ingest: http::bind(Use::Ingest, &config.ingest, inherited)?,
            api: http::bind(Use::Api, &config.api, inherited)?,
            scrape: http::bind(Use::Scrape, &config.scrape, inherited)?,
        })
    }

    /// Those where one could do what needs a token.
    pub(super) fn guarded(&self) -> Vec<Guarded> {
        let of = |r#use: Use, sockets: &[http::Socket], right| {
            let addresses = sockets.iter().filter_map(http::Socket::address);
            addresses.map(|address| Guarded { key: r#use.name(), address, right }).collect::<Vec<_>>()
        };
        [of(Use::Ingest, &self.ingest, Right::Write), of(Use::Api, &self.api, Right::Admin)].concat()
    }

    /// Says of sockets that units opened, which no check sees, what is said of configured addresses.
    pub(super) fn warn(&self, config: &http::Config) {
        let all: [(&str, _, _, &[Right]); 3] = [
            ("ingest", &self.ingest, &config.ingest, &[Right::Write]),
            ("api", &self.api, &config.api, &[Right::Admin, Right::Read]),
            ("scrape", &self.scrape, &config.scrape, &[Right::Read]),
        ];
        for (key, sockets, configured, rights) in all {
            let is_configured = |at: &ListenAddress| configured.iter().any(|text| text.parse() == Ok(*at));
            let others = sockets.iter().filter_map(http::Socket::address).filter(|at| !is_configured(at));
            for at in others {
                config.warnings(at, rights).iter().for_each(|warning| tracing::warn!("http.{key} at {at}: {warning}"));
            }
        }
    }

    pub(super) fn bound(&self) -> BTreeMap<String, Vec<String>> {
        let of = |sockets: &[http::Socket]| {
            sockets.iter().filter_map(http::Socket::address).map(|address| address.to_string()).collect()
        };
        [("ingest", &self.ingest), ("api", &self.api), ("scrape", &self.scrape)]
            .map(|(name, sockets)| (name.to_owned(), of(sockets)))
            .into()
    }
}

/// A thread with a runtime that ends when it is told to.
pub(super) struct Thread {
    /// How long requests under way have.
    stop: oneshot::Sender<Duration>,
    thread: JoinHandle<()>,
}

impl Thread {
    pub(super) fn stop(self, deadline: Instant) {
        let grace = http::GRACE.min(deadline.saturating_duration_since(Instant::now()));
        // Both fail only when it has ended already.
        let _ = self.stop.send(grace);
        drop(self.thread.join());
    }
}

pub(super) fn start_api(
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
pub(super) fn start_forwarder(config: &Config) -> Result<Option<Forwarder>, Error> {
    match config.ingest.forward {
        Forward::None => Ok(None),
        #[cfg(feature = "kafka")]
        Forward::Kafka => {
            Forwarder::new(&config.kafka).map(Some).map_err(|error| Error::Kafka(NotStarted::Config(error)))
        }
    }
}

/// HTTP ingest on the stream worker's thread, which waits for what it needs.
pub(super) struct HttpIngest {
    start: oneshot::Sender<(Keeping, Option<Forwarder>)>,
    started: std::sync::mpsc::Receiver<Result<(), http::Error>>,
}

impl HttpIngest {
    pub(super) fn start(self, keeping: Keeping, forwarder: Option<Forwarder>) -> Result<(), Error> {
        // Where the thread has ended nothing comes back either.
        drop(self.start.send((keeping, forwarder)));
        match self.started.recv() {
            Ok(started) => started.map_err(Error::Http),
            Err(_) => Err(Error::System(io::Error::other("the stream worker's thread ended at once"))),
        }
    }
}

/// Starts the listeners for lines, and beside them on the stream worker's thread what becomes HTTP ingest.
pub(super) fn start_listeners(
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
