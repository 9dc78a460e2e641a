//! Sockets into workers. [`start`] binds what is configured and gives every worker its thread: UDP workers, each with
//! sockets of its own (`udp`), one for each unix socket of datagrams, and one worker for all that comes in streams
//! (`stream`), whose runtime serves HTTP ingest too; `kafka` is a worker that reads a topic. Nothing here reads a line; nothing here waits for a store, a scraper or a reader.
//!
//! TLS is spoken at addresses of `listen.tcp` that begin with `tls://`. By unix sockets only the users of `listen.unix_uids`
//! may send, if it names any; what others send is counted and has no other effect.
//!
//! A receive or accept error never ends a listener: it is counted, the listener pauses 100 ms and goes on.
//!
//! Metrics: `tallyd_datagrams_total`, `tallyd_datagrams_truncated_total`, `tallyd_received_bytes_total`,
//! `tallyd_kernel_drops_total`, `tallyd_receive_buffer_bytes`, `tallyd_connections`,
//! `tallyd_connections_refused_total`, `tallyd_accept_errors_total`.

pub mod burst;
mod frames;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod lines;
mod peers;
mod sockets;
mod stream;
#[cfg(test)]
mod tests;
mod udp;
mod unix;

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::Socket;
use tokio::sync::{mpsc, watch};

use crate::ingest::{Listener, Worker, Workers};
use crate::inherited::{Inherited, Use};
use crate::tls;
use crate::units::{Account, ListenAddress, Mode, Size, Time};
use burst::Wake;
use peers::Peers;
pub use stream::Passed;

/// `[listen]`: where lines come in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Addresses for datagrams. Port 0 picks a free one.
    pub udp: Vec<String>,
    /// Addresses for streams of lines.
    pub tcp: Vec<String>,
    /// Paths of unix sockets for datagrams.
    pub unixgram: Vec<PathBuf>,
    /// Paths of unix sockets for streams of packets, each after its length.
    pub unix: Vec<PathBuf>,
    /// Permissions of the unix sockets' files.
    pub unix_mode: Mode,
    /// Their group; that of this process if empty.
    pub unix_group: Account,
    /// Users whose processes may send there; all if none is named.
    pub unix_uids: Vec<Account>,
    /// Threads that read UDP; 0 is one for each core.
    pub workers: usize,
    /// What is asked of the kernel for each UDP socket.
    pub receive_buffer: Size,
    /// Whether the kernel may hand over consecutive datagrams of one sender at once. It then counts those that it drops
    /// together as one.
    pub udp_gro: bool,
    /// Whether the topic of JSON records is read.
    pub kafka: bool,
    /// How long a UDP worker that has emptied its sockets rests at most while traffic flows; 0 for not at all. Readers end it.
    pub linger: Time,
}

impl Default for Config {
    fn default() -> Self {
        // Both families, because localhost is often ::1, and what goes there would be lost silently.
        let loopbacks = || vec!["127.0.0.1:8125".to_owned(), "[::1]:8125".to_owned()];
        Self {
            udp: loopbacks(),
            tcp: loopbacks(),
            unixgram: Vec::new(),
            unix: Vec::new(),
            // Who may send to the loopback address may send here.
            unix_mode: Mode(0o666),
            unix_group: Account::default(),
            unix_uids: Vec::new(),
            workers: 0,
            receive_buffer: Size(8 << 20),
            // Drops are to be counted exactly, and few clients send what can be joined (`benches/receive.rs`).
            udp_gro: false,
            kafka: false,
            linger: Time::millis(5),
        }
    }
}

/// The rows of `[limits]` that bound datagrams and streams.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Longer datagrams are counted and dropped whole.
    pub datagram: Size,
    /// Open streams; those beyond are accepted and closed.
    pub connections: usize,
    /// Open streams of one address.
    pub connections_per_address: usize,
    /// How much is read of one stream before the others have their turn; a line cannot be longer.
    pub stream_buffer: Size,
    /// A stream that is silent for so long is closed.
    pub stream_idle: Time,
    /// A stream that does not end a line it began within this time is closed.
    pub partial_line: Time,
    /// Descriptors that streams leave for journal, store and UDP.
    pub reserved_fds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            datagram: Size(DATAGRAM_MAX),
            connections: 1_024,
            connections_per_address: 256,
            stream_buffer: Size(16 << 10),
            stream_idle: Time::secs(600),
            partial_line: Time::secs(30),
            reserved_fds: 64,
        }
    }
}

impl Config {
    /// Finds the users and the group that are named, as far as a start will need them.
    ///
    /// # Errors
    /// The first that this host has not, or the group if this process may not give it files.
    pub fn check_accounts(&self) -> Result<(), Error> {
        Peers::new(self)?;
        peers::check_group(self)
    }
}

/// The key of the unix sockets' group.
const GROUP_KEY: &str = "listen.unix_group";

/// No UDP datagram is longer.
const DATAGRAM_MAX: u64 = 65_535;

/// Longer paths fit into no address of a unix socket.
pub const UNIX_PATH_MAX: usize = 107;

/// How often a worker reads what its sockets hold before it answers a reader who asked for a seal.
const SEAL_BURSTS: usize = 8;

/// How long a worker waits that owes a reader a seal and cannot take it yet, because all its cells are on their way.
const OWES_SEAL: Duration = Duration::from_millis(1);

/// The pause after an error of a receive or accept call.
const PAUSE: Duration = Duration::from_millis(100);

/// Where a listener is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Of IPv4 or IPv6.
    Inet(SocketAddr),
    /// The same, where TLS is spoken.
    Tls(SocketAddr),
    /// Of a unix socket.
    Unix(PathBuf),
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Inet(address)
    }
}

impl From<ListenAddress> for Address {
    fn from(ListenAddress { address, tls }: ListenAddress) -> Self {
        if tls { Self::Tls(address) } else { Self::Inet(address) }
    }
}

impl From<PathBuf> for Address {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Tls(address) => ListenAddress { address: *address, tls: true }.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Why listeners could not start.
#[derive(Debug)]
pub enum Error {
    /// No address.
    Address {
        /// The key in the configuration.
        key: &'static str,
        /// What stands there.
        value: String,
    },
    /// No path for a unix socket.
    Path {
        /// The key in the configuration.
        key: &'static str,
        /// What stands there.
        value: String,
    },
    /// No user, or no group, of this host.
    Account {
        /// The key in the configuration.
        key: &'static str,
        /// What stands there.
        value: String,
    },
    /// This process is not in the group.
    NotMember {
        /// What stands at `listen.unix_group`.
        value: String,
    },
    /// Somebody else listens there.
    InUse {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: Address,
    },
    /// This process may not listen there.
    Denied {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: Address,
    },
    /// This host has no such address.
    NotHere {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: Address,
    },
    /// The directory for a unix socket is missing.
    NoDirectory {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: Address,
    },
    /// Another error at an address.
    Bind {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: Address,
        /// What the kernel said.
        error: io::Error,
    },
    /// The system refused a thread, an event or a runtime.
    System(io::Error),
}

impl Error {
    fn bind(key: &'static str, address: impl Into<Address>, error: io::Error) -> Self {
        let address = address.into();
        match error.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::InUse { key, address },
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => Self::Denied { key, address },
            Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT) => Self::NotHere { key, address },
            Some(libc::ENOENT | libc::ENOTDIR) => Self::NoDirectory { key, address },
            Some(_) | None => Self::Bind { key, address, error },
        }
    }

    /// The key that is to be changed, if it is one.
    pub const fn key(&self) -> Option<&'static str> {
        match self {
            Self::Address { key, .. } | Self::Path { key, .. } | Self::Account { key, .. } => Some(key),
            Self::InUse { key, .. } | Self::Denied { key, .. } | Self::NotHere { key, .. } => Some(key),
            Self::NoDirectory { key, .. } | Self::Bind { key, .. } => Some(key),
            Self::NotMember { .. } => Some(GROUP_KEY),
            Self::System(_) => None,
        }
    }

    /// The exit code of a start that failed so, after sysexits.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Address { .. } | Self::Path { .. } | Self::Account { .. } | Self::NotMember { .. } => 78,
            Self::NoDirectory { .. } => 66,
            Self::InUse { .. } | Self::NotHere { .. } => 69,
            Self::Denied { .. } => 77,
            Self::Bind { .. } | Self::System(_) => 74,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { key, value } => {
                write!(f, "{key} = {value:?}: no address with a port; write one such as \"127.0.0.1:8125\"")
            }
            Self::Path { key, value } => {
                write!(f, "{key} = {value:?}: write a path that begins with / and has at most {UNIX_PATH_MAX} bytes")
            }
            Self::Account { key, value } => {
                let (what, command) = if *key == GROUP_KEY { ("group", "group") } else { ("user", "passwd") };
                write!(
                    f,
                    "{key} = {value:?}: this host has no such {what}; see `getent {command}`, or write its number"
                )
            }
            Self::NotMember { value } => write!(
                f,
                "{GROUP_KEY} = {value:?}: this process is not in that group, so it may not give it files; add it there \
                 (SupplementaryGroups= of a unit), or name another group"
            ),
            Self::InUse { key, address } => {
                let other = match address {
                    Address::Inet(_) | Address::Tls(_) => "port",
                    Address::Unix(_) => "path",
                };
                write!(f, "{key} = \"{address}\": in use; stop the other program there, or take another {other}")
            }
            Self::Denied { key, address: address @ (Address::Inet(_) | Address::Tls(_)) } => {
                write!(f, "{key} = \"{address}\": not permitted; take a port above 1023, or grant CAP_NET_BIND_SERVICE")
            }
            Self::Denied { key, address: address @ Address::Unix(_) } => {
                write!(f, "{key} = \"{address}\": not permitted; name a directory that this user may write to")
            }
            Self::NoDirectory { key, address } => {
                write!(f, "{key} = \"{address}\": its directory is missing; make it, or name another path")
            }
            Self::NotHere { key, address } => {
                write!(f, "{key} = \"{address}\": no address of this host; name one that it has")
            }
            Self::Bind { key, address, error } => {
                write!(f, "{key} = \"{address}\": {error}; mend that, or name another address")
            }
            Self::System(error) => write!(f, "listeners: {error}; raise the limit of threads or open files"),
        }
    }
}

impl std::error::Error for Error {}

/// What did not turn out as configured, but is no reason not to start.
#[derive(Debug, Clone, PartialEq)]
pub enum Warning {
    /// The kernel granted a smaller receive buffer.
    ReceiveBuffer {
        /// Of the sockets there.
        address: SocketAddr,
        /// `listen.receive_buffer`.
        asked: Size,
        /// What there is.
        granted: Size,
    },
    /// The kernel has no UDP_GRO.
    NoGro {
        /// Of the sockets there.
        address: SocketAddr,
    },
    /// The sockets were another process's, which could not have read trains.
    GroLater {
        /// Of the sockets there.
        address: SocketAddr,
    },
    /// A built-in address was left out because the host has no IPv6.
    NoIpv6 {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: SocketAddr,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReceiveBuffer { address, asked, granted } => write!(
                f,
                "listen.receive_buffer = \"{asked}\": the kernel granted {granted} at {address}; \
                 raise net.core.rmem_max, or grant CAP_NET_ADMIN"
            ),
            Self::NoGro { address } => write!(
                f,
                "listen.udp_gro = true: the kernel does not do so at {address} (Linux 5.0 and later do), \
                 so datagrams are read one by one"
            ),
            Self::GroLater { address } => write!(
                f,
                "listen.udp_gro = true: it changes at {address} with a restart, not when another process takes over"
            ),
            Self::NoIpv6 { key, address } => {
                write!(f, "{key}: this host has no IPv6, so nothing listens at {address}")
            }
        }
    }
}

/// Running listeners.
#[derive(Debug)]
pub struct Listeners {
    bound: Vec<(Listener, Address)>,
    files: Vec<unix::File>,
    warnings: Vec<Warning>,
    stop: Arc<Stop>,
    wakes: Vec<Wake>,
    threads: Vec<JoinHandle<()>>,
    adopted: mpsc::UnboundedSender<Passed>,
}

/// How the threads learn that they shall end.
#[derive(Debug)]
struct Stop {
    /// Unset while there is no reason to end.
    end: OnceLock<End>,
    /// The same for tasks: true when they shall end.
    ends: watch::Sender<bool>,
    /// The streams that are passed on.
    passed: Mutex<Vec<Passed>>,
}

/// What becomes of that which the kernel still holds.
#[derive(Debug, Clone, Copy)]
enum End {
    /// It is read, in this time at most.
    Read(Duration),
    /// Who has the same sockets reads it; requests under way are answered in this time.
    PassOn(Duration),
}

impl Stop {
    fn new() -> Self {
        Self { end: OnceLock::new(), ends: watch::Sender::new(false), passed: Mutex::default() }
    }

    /// How long the kernel's datagrams may still be read, once there is an end.
    fn reads_for(&self) -> Option<Duration> {
        self.end.get().map(|end| match end {
            End::Read(time) => *time,
            End::PassOn(_) => Duration::ZERO,
        })
    }

    /// How long tasks may go on after the end.
    fn grace(&self) -> Duration {
        match self.end.get() {
            Some(End::Read(time) | End::PassOn(time)) => *time,
            None => Duration::ZERO,
        }
    }

    fn passes_on(&self) -> bool {
        matches!(self.end.get(), Some(End::PassOn(_)))
    }

    fn pass_on(&self, passed: Passed) {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner).push(passed);
    }
}

/// Binds the addresses of a key of another part, if they are not inherited: listening TCP sockets that do not block.
///
/// # Errors
/// The first address that is none, or can't be had.
pub fn bind(
    key: &'static str,
    r#use: Use,
    addresses: &[String],
    inherited: &mut Inherited,
) -> Result<Vec<TcpListener>, Error> {
    sockets::plain(key, r#use, addresses, inherited)
}

/// Binds what is configured and not inherited, and starts the workers' threads. When this returns, all of them are registered and every
/// address takes data.
///
/// `beside` is what else runs on the stream worker's thread with its worker, until the second argument says true: HTTP
/// ingest. It may spawn local tasks; a task that outlasts the grace of [`Listeners::stop`] is dropped.
pub fn start<F>(
    config: &Config,
    limits: &Limits,
    tls: tls::Acceptor,
    workers: &Arc<Workers>,
    inherited: &mut Inherited,
    beside: impl FnOnce(Rc<RefCell<Worker>>, watch::Receiver<bool>) -> F + Send + 'static,
) -> Result<Listeners, Error>
where
    F: Future<Output = ()> + 'static,
{
    let count = match config.workers {
        0 => thread::available_parallelism().map_or(1, Into::into),
        count => count,
    };
    let peers = Peers::new(config)?;
    let sockets = sockets::bind(config, count, inherited)?;
    let (adopted, adopting) = mpsc::unbounded_channel();
    let mut listeners = Listeners {
        bound: sockets.addresses(),
        files: Vec::new(),
        warnings: sockets.warnings,
        stop: Arc::new(Stop::new()),
        wakes: Vec::new(),
        threads: Vec::new(),
        adopted,
    };
    let (unixgram, unix) = (listeners.keep_files(sockets.unixgram), listeners.keep_files(sockets.unix));
    let streams = stream::Sockets { tcp: sockets.tcp, tls, unix, peers: peers.clone(), adopted: adopting };
    let started = listeners
        .start_udp(&sockets.udp, count, config, limits, workers)
        .and_then(|()| listeners.start_unixgram(unixgram, &peers, limits, workers))
        .and_then(|()| listeners.start_streams(streams, limits, workers, beside));
    match started {
        Ok(()) => Ok(listeners),
        Err(error) => {
            listeners.stop(Duration::ZERO);
            Err(Error::System(error))
        }
    }
}

impl Listeners {
    /// Where lines are taken, as bound.
    pub fn bound(&self) -> &[(Listener, Address)] {
        &self.bound
    }

    /// What did not turn out as configured.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Takes streams that another agent has passed on, with what it had read of a line.
    pub fn adopt(&self, passed: Vec<Passed>) {
        for stream in passed {
            // The thread ends only after this.
            drop(self.adopted.send(stream));
        }
    }

    /// Whether the files of unix sockets stay there at the end, because somebody else has the sockets too.
    pub fn leave_files(&mut self, stay: bool) {
        self.files.iter_mut().for_each(|file| file.stay(stay));
    }

    /// Stops reading once all that the kernel held is read, or after `grace`, and closes the workers. Blocks until all
    /// of that is done.
    pub fn stop(self, grace: Duration) {
        self.end(End::Read(grace));
    }

    /// Stops reading at once, since another agent reads the same sockets, and closes the workers; requests under way have
    /// `grace`. Blocks until all of that is done, and gives the open streams, for [`Listeners::adopt`] of the other.
    pub fn pass_on(mut self, grace: Duration) -> Vec<Passed> {
        self.leave_files(true);
        let stop = Arc::clone(&self.stop);
        self.end(End::PassOn(grace));
        let mut passed = stop.passed.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut passed)
    }

    fn end(self, end: End) {
        self.stop.end.get_or_init(|| end);
        self.stop.ends.send_replace(true);
        self.wakes.iter().for_each(Wake::wake);
        // A thread that panicked has nothing left to close.
        self.threads.into_iter().for_each(|thread| drop(thread.join()));
    }

    fn start_udp(
        &mut self,
        shared: &[sockets::Shared],
        count: usize,
        config: &Config,
        limits: &Limits,
        workers: &Arc<Workers>,
    ) -> io::Result<()> {
        if shared.is_empty() {
            return Ok(());
        }
        let linger = config.linger.0;
        for (number, inlets) in udp::inlets(shared, count)?.into_iter().enumerate() {
            self.start_receiver(Listener::Udp, number, inlets, linger, limits, workers)?;
        }
        Ok(())
    }

    /// A worker for each socket, since the kernel spreads none of them over several. It never naps: the kernel holds few
    /// datagrams of a unix socket, and makes their senders wait or fail.
    fn start_unixgram(
        &mut self,
        sockets: Vec<Socket>,
        peers: &Peers,
        limits: &Limits,
        workers: &Arc<Workers>,
    ) -> io::Result<()> {
        for (number, socket) in sockets.into_iter().enumerate() {
            let inlets = vec![udp::Inlet::unix(socket, peers.clone())?];
            self.start_receiver(Listener::Unixgram, number, inlets, Duration::ZERO, limits, workers)?;
        }
        Ok(())
    }

    fn start_receiver(
        &mut self,
        listener: Listener,
        number: usize,
        inlets: Vec<udp::Inlet>,
        linger: Duration,
        limits: &Limits,
        workers: &Arc<Workers>,
    ) -> io::Result<()> {
        let wake = Wake::new()?;
        let caller = wake.clone();
        let worker = workers.register(move || caller.wake());
        self.wakes.push(wake.clone());
        let stop = Arc::clone(&self.stop);
        let datagram = limits.datagram.0.min(DATAGRAM_MAX) as usize;
        let name = format!("{}-{number}", listener.name());
        let beat = workers.beats().begin(name.as_str());
        let run = move || udp::Receiver::new(worker, listener, inlets, wake, stop, datagram, linger).run(&beat);
        self.threads.push(thread::Builder::new().name(name).spawn(run)?);
        Ok(())
    }

    /// The sockets without their files, which stay until the listeners are gone.
    fn keep_files(&mut self, bound: Vec<unix::Bound>) -> Vec<Socket> {
        let keep = |unix::Bound { socket, file }| {
            self.files.push(file);
            socket
        };
        bound.into_iter().map(keep).collect()
    }

    fn start_streams<F>(
        &mut self,
        sockets: stream::Sockets,
        limits: &Limits,
        workers: &Arc<Workers>,
        beside: impl FnOnce(Rc<RefCell<Worker>>, watch::Receiver<bool>) -> F + Send + 'static,
    ) -> io::Result<()>
    where
        F: Future<Output = ()> + 'static,
    {
        let streams = stream::Streams::new(sockets, limits.clone(), workers, Arc::clone(&self.stop))?;
        self.threads.push(thread::Builder::new().name("streams".to_owned()).spawn(|| streams.run(beside))?);
        Ok(())
    }
}
