//! Requests in, pages out: HTTP/1.1 on hyper, without a framework.
//!
//! [`start_ingest`] takes samples (`POST /ingest/metrics`) and runs on the stream worker's own thread, because it writes to
//! that worker's shard. [`start_api`] answers reads and scrapes on a thread of its own and owns no shard, so that no reader
//! ever delays a sample. Both need a `tokio::task::LocalSet` around them.
//!
//! [`Access`] says who may ask, and by which way: tokens and TLS, which a reload changes under running servers.
//!
//! Nothing a client sends ends a listener or is answered with 500. Limits: [`Limits`]. Metrics: `tallyd_http_requests_total`,
//! `tallyd_http_request_seconds`, `tallyd_connections`, `tallyd_connections_refused_total`, `tallyd_accept_errors_total`, those of `tls`
//! and of [`tokens`].

use std::cell::RefCell;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Type};
use tokio::sync::mpsc;

use crate::aggregate::etsy;
use crate::flush::Fold;
use crate::ingest::Worker;
use crate::inherited::{Inherited, Use};
use crate::receipt::Receipt;
use crate::telemetry;
use crate::tls;
use crate::units::{ListenAddress, Size, Time};
use crate::view::View;

mod connection;
pub mod data;
pub mod forward;
pub mod health;
mod idempotency;
pub mod ingest;
mod json;
pub mod problem;
pub mod scrape;
pub mod server;
#[cfg(test)]
mod tests;
pub mod tokens;

use forward::Forwarder;
pub use health::{Health, Reload};
pub use server::{Body, Server};

/// The section `[http]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Where samples are taken.
    pub ingest: Vec<String>,
    /// Where the read API answers.
    pub api: Vec<String>,
    /// Where `/metrics` is answered besides the API.
    pub scrape: Vec<String>,
    /// Names, besides `localhost` and loopback addresses, that a `Host` header may have on a loopback listener, and whose
    /// pages may send requests.
    pub hosts: Vec<String>,
    /// Whether listeners that are reachable from elsewhere may do without a token.
    pub insecure: bool,
    /// Whether `POST /-/reload` does anything.
    pub lifecycle: bool,
    /// Who may do what.
    pub tokens: tokens::Config,
}

impl Default for Config {
    fn default() -> Self {
        let loopback = |port: u16| vec![format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
        Self {
            ingest: loopback(8000),
            api: loopback(7000),
            scrape: Vec::new(),
            hosts: Vec::new(),
            insecure: false,
            lifecycle: true,
            tokens: tokens::Config::default(),
        }
    }
}

impl Config {
    /// Whether other machines reach an address and have a right there that they need no token for. Nothing listens so: what
    /// is configured is held to this, and so is what is bound, at the start and at each reload.
    pub fn is_open(&self, at: ListenAddress, right: tokens::Right) -> bool {
        !at.is_local() && !self.insecure && self.tokens.is_everybodys(right)
    }

    /// What an operator should know of an address where these rights are asked for.
    pub fn warnings(&self, at: ListenAddress, rights: &[tokens::Right]) -> Vec<&'static str> {
        let shows_all = rights.contains(&tokens::Right::Read) && self.tokens.is_everybodys(tokens::Right::Read);
        let has_tokens = rights.iter().any(|right| self.tokens.file(*right).is_some());
        let reads = shows_all
            .then_some("other machines can read all figures there; http.tokens.read_file would ask them for a token");
        let plain = (has_tokens && !at.tls)
            .then_some("tokens cross the network as they are; tls:// before the address hides them");
        reads.into_iter().chain(plain).filter(|_| !at.is_local()).collect()
    }

    /// Whether bound sockets may stay with this configuration.
    ///
    /// # Errors
    /// The first that other machines reach without the token for what they could do there.
    pub fn admit(&self, bound: &[Guarded]) -> Result<(), Error> {
        match bound.iter().find(|socket| self.is_open(socket.address, socket.right)) {
            Some(&Guarded { key, address, right }) => Err(Error::Open { key, address, right }),
            None => Ok(()),
        }
    }
}

/// A bound socket, and what one could do there that needs a token where other machines reach it.
#[derive(Debug, Clone, Copy)]
pub struct Guarded {
    /// The configuration key, without `http.`.
    pub key: &'static str,
    /// Where it is.
    pub address: ListenAddress,
    /// What one could do.
    pub right: tokens::Right,
}

/// Lines of headers in one request. Not configurable: no client of ours has a reason to send more.
pub const HEADER_LINES_MAX: usize = 64;

/// The rows of `[limits]` that concern HTTP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Connections of the ingest, of the API and of scrapes, each; more are told 503.
    pub http_connections: usize,
    /// Method, target and version; longer is told 414.
    pub request_line: Size,
    /// All header lines together, of which there may be [`HEADER_LINES_MAX`]; more is told 431.
    pub headers: Size,
    /// From the first byte of a request to the end of its headers; longer is told 408.
    pub header_time: Time,
    /// From there to the end of its body; longer is told 408.
    pub body_time: Time,
    /// How long a connection may be idle between requests, or an answer go unread.
    pub keep_alive: Time,
    /// A body as sent; longer is told 413.
    pub body: Size,
    /// A body once inflated; longer is told 413.
    pub inflated: Size,
    /// All bodies held at one time, inflated ones too; more are told 503.
    pub bodies: Size,
    /// Metrics on one page of a list; asking for more is told 400.
    pub page: usize,
    /// Lists made at one time; more are told 503.
    pub lists: usize,
    /// Scrapes answered at one time; more are told 503.
    pub scrapes: usize,
    /// Answers remembered by their `Idempotency-Key`; the oldest go.
    pub idempotency_keys: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            http_connections: 256,
            request_line: Size(4 << 10),
            headers: Size(16 << 10),
            header_time: Time::secs(5),
            body_time: Time::secs(10),
            keep_alive: Time::secs(60),
            body: Size(1 << 20),
            inflated: Size(8 << 20),
            bodies: Size(64 << 20),
            page: 10_000,
            lists: 8,
            scrapes: 2,
            idempotency_keys: 100_000,
        }
    }
}

/// Why a listener did not come up.
#[derive(Debug)]
pub enum Error {
    /// The text is no address.
    Address {
        /// The configuration key.
        key: &'static str,
        /// What stands there.
        text: String,
    },
    /// The address could not be bound; `AddrInUse` when another process has it.
    Bind {
        /// The configuration key.
        key: &'static str,
        /// Which address.
        address: ListenAddress,
        /// What the kernel said.
        error: io::Error,
    },
    /// A bound socket that other machines reach, without a token for what they could do.
    Open {
        /// The configuration key.
        key: &'static str,
        /// Which address.
        address: ListenAddress,
        /// What they could do.
        right: tokens::Right,
    },
    /// A bound socket could not be given to the runtime.
    Register(io::Error),
}

impl Error {
    /// The exit code of a process that can't start for it, after sysexits.
    pub fn exit_code(&self) -> u8 {
        match self {
            // An address that is not there yet may come up with its interface, so a service is started again.
            Self::Bind { error, .. } if [ErrorKind::AddrInUse, ErrorKind::AddrNotAvailable].contains(&error.kind()) => {
                69
            }
            Self::Bind { error, .. } if error.kind() == ErrorKind::PermissionDenied => 77,
            Self::Bind { .. } => 74,
            Self::Address { .. } | Self::Open { .. } => 78,
            Self::Register(_) => 74,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { key, text } => {
                write!(f, "http.{key} = {text:?}: no address with a port; write one such as \"127.0.0.1:8000\"")
            }
            Self::Bind { key, address, error } => {
                let told = [
                    (ErrorKind::AddrInUse, "in use; stop the other program there, or take another port"),
                    (ErrorKind::AddrNotAvailable, "no address of this host; name one that it has"),
                    (
                        ErrorKind::PermissionDenied,
                        "not permitted; take a port above 1023, or grant CAP_NET_BIND_SERVICE",
                    ),
                ];
                write!(f, "http.{key} = \"{address}\": ")?;
                match told.iter().find(|(kind, _)| *kind == error.kind()) {
                    Some((_, told)) => f.write_str(told),
                    None => write!(f, "{error}; mend that, or name another address"),
                }
            }
            Self::Open { key, address, right } => write!(
                f,
                "http.{key}: it listens at {address}, which other machines reach without a token; name a file of tokens in {}, \
                 or let it (a unit's socket: the unit) listen on a loopback address",
                right.key()
            ),
            Self::Register(error) => write!(f, "http: a listener can't be watched: {error}"),
        }
    }
}

impl std::error::Error for Error {}

/// A bound socket of a server, and whether it speaks TLS.
#[derive(Debug)]
pub struct Socket {
    /// The socket.
    pub listener: TcpListener,
    /// Whether what is said there is said in TLS.
    pub tls: bool,
}

impl Socket {
    /// Where it is, as a configuration would have it.
    pub fn address(&self) -> Option<ListenAddress> {
        let address = self.listener.local_addr().ok()?;
        Some(ListenAddress { address, tls: self.tls })
    }
}

/// Takes what was inherited for `http.<key>`, and binds the rest of its addresses. Without SO_REUSEPORT, so an address that
/// another process has is an error. On a host without IPv6 its loopback is left out where the same port of IPv4's stands
/// beside it, as in the defaults and where `INGEST_PORT` and `API_PORT` put both.
pub fn bind(r#use: Use, addresses: &[String], inherited: &mut Inherited) -> Result<Vec<Socket>, Error> {
    let of_units = inherited.take_of_units(r#use).map_err(Error::Register)?;
    if !of_units.is_empty() {
        let of_unit = |listener: TcpListener| {
            let tls = ListenAddress::of_unit(listener.local_addr()?, addresses).tls;
            Ok(Socket { listener, tls })
        };
        let sockets = of_units.into_iter().map(TcpListener::from).map(of_unit);
        return sockets.collect::<io::Result<_>>().map_err(Error::Register);
    }
    let key = r#use.name();
    let mut sockets = Vec::with_capacity(addresses.len());
    for text in addresses {
        let address: ListenAddress = text.parse().map_err(|_| Error::Address { key, text: text.clone() })?;
        match inherit_or_open(r#use, address.address, inherited) {
            Ok(listener) => sockets.push(Socket { listener, tls: address.tls }),
            Err(error) if has_twin(address, addresses) && is_no_such_family(&error) => {}
            Err(error) => return Err(Error::Bind { key, address, error }),
        }
    }
    Ok(sockets)
}

fn inherit_or_open(r#use: Use, address: SocketAddr, inherited: &mut Inherited) -> io::Result<TcpListener> {
    let mut free = address.port() == 0;
    let is_there = |other: &SockAddr| {
        let other = other.as_socket();
        // With port 0 any is right, but only one.
        other == Some(address) || other.is_some_and(|other| other.ip() == address.ip()) && std::mem::take(&mut free)
    };
    if let Some(socket) = inherited.take_bound(r#use, is_there)?.into_iter().next() {
        return Ok(socket.into());
    }
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    // As many as wait while one process takes over from another.
    socket.listen(BACKLOG)?;
    inherited.keep(r#use, &socket)?;
    Ok(socket.into())
}

/// Connections that wait to be accepted; the kernel's own bound is `net.core.somaxconn`.
const BACKLOG: i32 = 1_024;

/// Whether an address is the loopback of IPv6, and that of IPv4 has the same port.
fn has_twin(ListenAddress { address, tls }: ListenAddress, addresses: &[String]) -> bool {
    let twin = ListenAddress { address: (Ipv4Addr::LOCALHOST, address.port()).into(), tls };
    address.ip() == Ipv6Addr::LOCALHOST && addresses.iter().any(|text| text.parse() == Ok(twin))
}

fn is_no_such_family(error: &io::Error) -> bool {
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Who may ask, and as whom the servers speak TLS. Clones share both.
#[derive(Debug, Clone)]
pub struct Access {
    guard: tokens::Guard,
    tls: tls::Acceptor,
}

impl Access {
    /// By these tokens, as this acceptor; so many denials of a reason are logged in a second.
    pub fn new(config: &tokens::Config, denials_logged: u32, tls: tls::Acceptor) -> Self {
        Self { guard: tokens::Guard::new(config, denials_logged), tls }
    }

    /// Puts other tokens in force.
    pub fn set(&self, config: &tokens::Config) {
        self.guard.set(config.tokens.clone());
    }
}

/// What the API answers from.
pub struct Api {
    /// The figures.
    pub view: View,
    /// Which figures of Etsy's a window has.
    pub etsy: etsy::Config,
    /// Whether the agent is ready.
    pub health: Arc<Health>,
    /// Where `POST /-/reload` is heard; none where `http.lifecycle` is false.
    pub reload: Option<mpsc::Sender<Reload>>,
    /// `[prometheus]`: what a scrape shows.
    pub prometheus: scrape::Config,
    /// The mapping rules.
    pub mapper: Arc<scrape::Mapper>,
    /// Our own metrics, shown by a scrape behind all others.
    pub exporter: telemetry::Exporter,
}

/// What ingest needs beside the worker.
pub struct Keeping {
    /// Who says that samples are in the journal.
    pub fold: Fold,
    /// Whether there is one.
    pub has_journal: bool,
    /// What requests of earlier processes were told under their keys, oldest first.
    pub receipts: Vec<Receipt>,
}

/// Takes samples on these listeners into the worker's shard, or by it to where they are forwarded. To be called inside a
/// `LocalSet` on the worker's thread; the worker is borrowed only while a body is parsed, never across an await.
pub fn start_ingest(
    sockets: Vec<Socket>,
    access: Access,
    worker: Rc<RefCell<Worker>>,
    keeping: Keeping,
    forwarder: Option<Forwarder>,
    config: &Config,
    limits: &Limits,
) -> Result<Server, Error> {
    let site = Rc::new(ingest::Ingest::new(worker, keeping, forwarder, limits));
    let mut server = Server::new(access, config, limits);
    server.listen(sockets, &site)?;
    Ok(server)
}

/// Answers reads on the listeners of `http.api`, and scrapes there and on those of `http.scrape`. To be called inside a
/// `LocalSet`.
pub fn start_api(
    sockets: Vec<Socket>,
    scrape: Vec<Socket>,
    access: Access,
    api: Api,
    config: &Config,
    limits: &Limits,
) -> Result<Server, Error> {
    let site = Rc::new(data::Data::new(api, access.tls.clone(), limits));
    let mut server = Server::new(access, config, limits);
    server.listen(scrape, &Rc::new(data::Scrape(Rc::clone(&site))))?;
    server.listen(sockets, &site)?;
    Ok(server)
}

/// How long requests under way have, from [`Server::stop`] on, unless the agent says otherwise.
pub const GRACE: Duration = Duration::from_secs(5);
