//! Streams: TCP connections of lines and unix connections of packets or lines into the stream worker, on the one thread
//! whose runtime serves HTTP ingest too. A unix stream's first four bytes say which of both it is, for all of its life.
//!
//! A connection reads at most `limits.stream_buffer` before the others have their turn, and holds at most one partial
//! line or packet. What is too long is refused and the stream goes on; an HTTP client's request line, or what cannot be
//! the length of a packet, is counted and the stream closed, as is one that stays silent for `limits.stream_idle`, or
//! inside a line or packet for `limits.partial_line`. A connection to a `tls://` address has a seat from its handshake on,
//! and is told when its stream ends; one of a client of TLS to another address is counted and closed, and so is a unix stream
//! of a user that may not send. Connections beyond `limits.connections`,
//! `limits.connections_per_address` or what `limits.reserved_fds` leaves are accepted and closed.
//!
//! At a stop a connection reads what the kernel holds and closes; where another agent takes over it is [`Passed`] on as it
//! is, and nothing of it is lost or read twice.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use metrics::{Counter, Gauge};
use socket2::{SockAddr, SockRef, Socket};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinSet, LocalSet, spawn_local, yield_now};
use tokio::time::sleep;

use super::frames::{self, Frames};
use super::lines::{self, Form, Lines};
use super::peers::Peers;
use super::{DATAGRAM_MAX, Limits, OWES_SEAL, PAUSE, SEAL_BURSTS, Stop, burst, sockets};
use crate::clock::Clock;
use crate::heartbeat::Beat;
use crate::ingest::{self, Address, Listener, Source, Worker, Workers};
use crate::sample::Reason;
use crate::telemetry;
use crate::tls;

/// Tasks that run before the runtime looks at sockets and timers again, so that a seal is not late under load.
const TASKS_A_LOOK: u32 = 16;

/// What the stream worker's thread needs.
pub(super) struct Streams {
    runtime: Runtime,
    doors: Vec<Door>,
    adopted: mpsc::UnboundedReceiver<Passed>,
    worker: Worker,
    workers: Arc<Workers>,
    peers: Peers,
    limits: Limits,
    stop: Arc<Stop>,
    wake: Arc<Notify>,
    beat: Beat,
}

/// What the streams worker serves.
pub(super) struct Sockets {
    pub(super) tcp: Vec<sockets::Stream>,
    /// What makes connections speak TLS, where they do.
    pub(super) tls: tls::Acceptor,
    pub(super) unix: Vec<Socket>,
    /// Whose processes may connect to these.
    pub(super) peers: Peers,
    /// Streams that another agent had.
    pub(super) adopted: mpsc::UnboundedReceiver<Passed>,
}

/// An open stream on its way from one agent to another.
#[derive(Debug)]
pub struct Passed {
    /// TCP or unix.
    pub listener: Listener,
    /// The connection.
    pub socket: Socket,
    /// What was read of it and not used.
    pub rest: lines::Rest,
}

impl Streams {
    /// A worker for these listeners and all that runs beside them.
    pub(super) fn new(sockets: Sockets, limits: Limits, workers: &Arc<Workers>, stop: Arc<Stop>) -> io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().event_interval(TASKS_A_LOOK).build()?;
        let Sockets { tcp, tls, unix, peers, adopted } = sockets;
        let tls = tls.apart();
        let doors = {
            let _inside = runtime.enter();
            let tcp = tcp.into_iter().map(|sockets::Stream { listener, tls: speaks }| {
                let tls = speaks.then(|| tls.clone());
                TcpListener::from_std(listener).map(|listener| Door::Tcp(listener, tls))
            });
            let unix = unix.into_iter().map(|socket| UnixListener::from_std(socket.into()).map(Door::Unix));
            tcp.chain(unix).collect::<io::Result<_>>()?
        };
        let wake = Arc::new(Notify::new());
        let caller = Arc::clone(&wake);
        let worker = workers.register(move || caller.notify_one());
        let beat = workers.beats().begin("streams");
        Ok(Self { runtime, doors, adopted, worker, workers: Arc::clone(workers), peers, limits, stop, wake, beat })
    }

    /// Serves until it is told to stop, and `beside` too.
    pub(super) fn run<F>(self, beside: impl FnOnce(Rc<RefCell<Worker>>, watch::Receiver<bool>) -> F)
    where
        F: Future<Output = ()> + 'static,
    {
        let Self { runtime, doors, adopted, worker, workers, peers, limits, stop, wake, beat } = self;
        let worker = Rc::new(RefCell::new(worker));
        let ends = stop.ends.subscribe();
        let tasks = LocalSet::new();
        tasks.block_on(&runtime, async {
            let intake = Rc::new(Intake::new(Rc::clone(&worker), workers, peers, limits, Arc::clone(&stop)));
            let streams = serve(doors, adopted, intake, ends.clone());
            let beside = beside(Rc::clone(&worker), ends.clone());
            let mut until = ends.clone();
            // Readers wait for every worker, so this one stays even if it has nothing to serve.
            let all = async { tokio::join!(streams, beside, stopped(&mut until)) };
            tokio::select! {
                _ = all => {}
                () = overdue(ends.clone(), &stop) => {}
                () = turns(&worker, &wake, &beat) => {}
            }
        });
        // What outlasted the grace goes here, and with it every other owner of the worker.
        drop(tasks);
        drop(runtime);
        if let Some(worker) = Rc::into_inner(worker) {
            worker.into_inner().close();
        }
    }
}

/// Ends when the grace of a stop is over.
async fn overdue(mut ends: watch::Receiver<bool>, stop: &Stop) {
    stopped(&mut ends).await;
    sleep(stop.grace()).await;
}

/// Ends when a stop is asked for, or nobody is left who could ask.
async fn stopped(ends: &mut watch::Receiver<bool>) {
    drop(ends.wait_for(|ends| *ends).await);
}

/// Gives the worker its turns: when something is due, and when a reader asks. It never ends.
async fn turns(worker: &RefCell<Worker>, wake: &Notify, beat: &Beat) {
    loop {
        beat.beat();
        let question = worker.borrow().question();
        if worker.borrow().owes(question) {
            // What the sockets hold came before the question: let the connections read it.
            for _ in 0..SEAL_BURSTS {
                yield_now().await;
            }
        }
        let wait = worker.borrow_mut().turn(question);
        let wait = if worker.borrow().owes(question) { wait.min(OWES_SEAL) } else { wait };
        tokio::select! {
            () = wake.notified() => {}
            () = sleep(wait) => {}
        }
    }
}

/// Serves streams until `ends` says true; then it reads what the kernel holds or passes them on, and returns.
async fn serve(
    doors: Vec<Door>,
    adopted: mpsc::UnboundedReceiver<Passed>,
    intake: Rc<Intake>,
    ends: watch::Receiver<bool>,
) {
    for listener in doors.iter().map(Door::listener) {
        ingest::begin(listener);
        telemetry::CONNECTIONS_REFUSED.begin(Refusal::ALL.map(|refusal| [listener.name(), refusal.name()]));
    }
    if doors.iter().any(|door| door.listener() == Listener::Tcp) {
        tls::Acceptor::begin(Listener::Tcp.name());
    }
    let adopting = spawn_local(adopt(adopted, Rc::clone(&intake), ends.clone()));
    let accepting = doors.into_iter().map(|door| spawn_local(accept(door, intake.clone(), ends.clone())));
    for task in accepting.chain([adopting]).collect::<Vec<_>>() {
        // A task that panicked has ended too.
        drop(task.await);
    }
}

/// A listening socket.
enum Door {
    /// With what makes its connections speak TLS, where they do.
    Tcp(TcpListener, Option<tls::Acceptor>),
    Unix(UnixListener),
}

impl Door {
    const fn listener(&self) -> Listener {
        match self {
            Self::Tcp(..) => Listener::Tcp,
            Self::Unix(_) => Listener::Unix,
        }
    }

    fn tls(&self) -> Option<tls::Acceptor> {
        match self {
            Self::Tcp(_, tls) => tls.clone(),
            Self::Unix(_) => None,
        }
    }

    /// The next connection, and the address of its peer, if it has one.
    async fn accept(&self) -> io::Result<(Transport, Option<SocketAddr>)> {
        match self {
            Self::Tcp(socket, _) => socket.accept().await.map(|(stream, peer)| (Transport::tcp(stream), Some(peer))),
            Self::Unix(socket) => socket.accept().await.map(|(stream, _)| (Transport::Unix(stream), None)),
        }
    }

    /// Connections that the kernel has accepted and nobody has taken. The runtime may not have looked yet; this does. Those
    /// that would speak TLS have not said anything yet.
    fn waiting(&self, intake: &Rc<Intake>) -> Vec<Connection> {
        let door = match self {
            Self::Tcp(_, Some(_)) => return Vec::new(),
            Self::Tcp(socket, None) => SockRef::from(socket),
            Self::Unix(socket) => SockRef::from(socket),
        };
        let taken = std::iter::from_fn(|| door.accept().ok());
        taken.filter_map(|(socket, peer)| self.taken(socket, &peer, intake)).collect()
    }

    fn taken(&self, socket: Socket, peer: &SockAddr, intake: &Rc<Intake>) -> Option<Connection> {
        socket.set_nonblocking(true).ok()?;
        let stream = match self {
            Self::Tcp(..) => Transport::tcp(TcpStream::from_std(socket.into()).ok()?),
            Self::Unix(_) => Transport::Unix(UnixStream::from_std(socket.into()).ok()?),
        };
        Connection::begin(stream, peer.as_socket(), intake).ok()
    }
}

/// Accepts connections until `ends` says true, and returns when the last of them has ended.
async fn accept(door: Door, intake: Rc<Intake>, mut ends: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stopped(&mut ends) => break,
            Some(_) = connections.join_next() => {}
            accepted = door.accept() => {
                let begun = accepted.map(|(stream, peer)| Connection::begin(stream, peer, &intake));
                match begun {
                    Ok(Ok(connection)) => drop(connections.spawn_local(connection.run(door.tls(), ends.clone()))),
                    Ok(Err(refusal)) => intake.refused(door.listener(), refusal).await,
                    Err(_) => intake.failed(door.listener()).await,
                }
            }
        }
    }
    if !intake.stop.passes_on() {
        for connection in door.waiting(&intake) {
            connections.spawn_local(connection.run(None, ends.clone()));
        }
    }
    drop(door);
    while connections.join_next().await.is_some() {}
}

/// Goes on with connections of another agent until `ends` says true, and returns when the last of them has ended.
async fn adopt(mut adopted: mpsc::UnboundedReceiver<Passed>, intake: Rc<Intake>, mut ends: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            Some(passed) = adopted.recv() => {
                let listener = passed.listener;
                match Connection::resume(passed, &intake) {
                    Ok(Err(refusal)) => intake.refused(listener, refusal).await,
                    Ok(Ok(connection)) => drop(connections.spawn_local(connection.run(None, ends.clone()))),
                    Err(_) => intake.failed(listener).await,
                }
            }
            () = stopped(&mut ends) => break,
            Some(_) = connections.join_next() => {}
        }
    }
    while connections.join_next().await.is_some() {}
}

/// What all connections share.
struct Intake {
    worker: Rc<RefCell<Worker>>,
    workers: Arc<Workers>,
    peers: Peers,
    limits: Limits,
    stop: Arc<Stop>,
    descriptors_max: u64,
    clock: Clock,
    /// Where bytes stand between the kernel and the worker: never across an await, so one is enough for all.
    buffer: RefCell<Box<[u8]>>,
    by_address: RefCell<HashMap<IpAddr, usize>>,
    connections: Cell<usize>,
    tcp: Meters,
    unix: Meters,
}

/// The metrics of one kind of streams.
struct Meters {
    open: Gauge,
    bytes: Counter,
    errors: Counter,
}

impl Meters {
    fn new(listener: Listener) -> Self {
        let label = [listener.name()];
        Self {
            open: telemetry::CONNECTIONS.gauge(&label),
            bytes: telemetry::RECEIVED_BYTES.counter(&label),
            errors: telemetry::ACCEPT_ERRORS.counter(&label),
        }
    }
}

/// Why a connection is closed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Connections,
    PerAddress,
    Descriptors,
    Peer,
}

impl Refusal {
    const ALL: [Self; 4] = [Self::Connections, Self::PerAddress, Self::Descriptors, Self::Peer];

    /// The key that says so, as a label.
    const fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::PerAddress => "connections_per_address",
            Self::Descriptors => "reserved_fds",
            Self::Peer => "unix_uids",
        }
    }
}

impl Intake {
    fn new(worker: Rc<RefCell<Worker>>, workers: Arc<Workers>, peers: Peers, limits: Limits, stop: Arc<Stop>) -> Self {
        Self {
            worker,
            workers,
            peers,
            stop,
            descriptors_max: burst::descriptors_max(),
            clock: Clock::default(),
            buffer: RefCell::new(vec![0; limits.stream_buffer.bytes().max(1)].into_boxed_slice()),
            by_address: RefCell::default(),
            connections: Cell::new(0),
            tcp: Meters::new(Listener::Tcp),
            unix: Meters::new(Listener::Unix),
            limits,
        }
    }

    fn meters(&self, listener: Listener) -> &Meters {
        if listener == Listener::Unix { &self.unix } else { &self.tcp }
    }

    /// A seat for a connection of this source, if there is one. The kernel numbers descriptors from below, so a
    /// connection's own says how many there are.
    fn admit(self: &Rc<Self>, source: Source, descriptor: u64) -> Result<Seat, Refusal> {
        self.admit_peer(source)?;
        let reserved = self.limits.reserved_fds.min(self.descriptors_max / 2);
        if descriptor >= self.descriptors_max - reserved {
            return Err(Refusal::Descriptors);
        }
        if self.connections.get() >= self.limits.connections {
            return Err(Refusal::Connections);
        }
        let held = |ip| self.by_address.borrow().get(&ip).copied().unwrap_or_default();
        if source.ip().is_some_and(|ip| held(ip) >= self.limits.connections_per_address) {
            return Err(Refusal::PerAddress);
        }
        Ok(self.seat(source))
    }

    /// Refuses a process whose user may not send.
    fn admit_peer(&self, source: Source) -> Result<(), Refusal> {
        if source.listener == Listener::Unix && !self.peers.admit(source.address) {
            self.worker.borrow_mut().refuse(Reason::PeerDenied, b"", source);
            return Err(Refusal::Peer);
        }
        Ok(())
    }

    /// A seat for a connection that has been admitted, here or by another agent.
    fn seat(self: &Rc<Self>, source: Source) -> Seat {
        if let Some(ip) = source.ip() {
            *self.by_address.borrow_mut().entry(ip).or_default() += 1;
        }
        self.connections.set(self.connections.get() + 1);
        self.meters(source.listener).open.increment(1.0);
        Seat { intake: Rc::clone(self), source }
    }

    async fn refused(&self, listener: Listener, refusal: Refusal) {
        telemetry::CONNECTIONS_REFUSED.counter(&[listener.name(), refusal.name()]).increment(1);
        if refusal == Refusal::Descriptors {
            sleep(PAUSE).await;
        }
    }

    async fn failed(&self, listener: Listener) {
        self.meters(listener).errors.increment(1);
        sleep(PAUSE).await;
    }

    /// Tells the worker what comes, before it is given lines or packets of that.
    fn received(&self, bytes: usize, source: Source) {
        let mut worker = self.worker.borrow_mut();
        worker.stamp();
        worker.received(bytes, source);
    }

    /// Counts a client of TLS where none is spoken, as one line of what it said.
    fn hello(&self, bytes: &[u8], source: Source) {
        tls::Failure::Unexpected.count(source.listener.name());
        self.received(bytes.len(), source);
        self.worker.borrow_mut().refuse(Reason::TlsHello, bytes, source);
    }

    /// Gives a line to the worker; a request line ends the stream.
    fn line(&self, piece: lines::Piece<'_>, source: Source) -> ControlFlow<()> {
        let mut worker = self.worker.borrow_mut();
        match piece {
            lines::Piece::Line(line) => worker.line(line, source),
            lines::Piece::TooLong(beginning) => worker.refuse(Reason::LineTooLong, beginning, source),
            lines::Piece::Request(line) => {
                worker.refuse(Reason::HttpRequest, line, source);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    /// Gives a packet to the worker; what cannot be a length ends the stream.
    fn packet(&self, piece: frames::Piece<'_>, source: Source) -> ControlFlow<()> {
        let mut worker = self.worker.borrow_mut();
        match piece {
            frames::Piece::Packet(packet) => worker.packet(packet, source),
            frames::Piece::TooLong(length) => worker.refuse(Reason::LineTooLong, length, source),
            frames::Piece::NoLength(length) => {
                worker.refuse(Reason::BadLength, length, source);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }
}

/// The right of a connection to be there, given back when it ends.
struct Seat {
    intake: Rc<Intake>,
    source: Source,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.intake.connections.set(self.intake.connections.get() - 1);
        self.intake.meters(self.source.listener).open.decrement(1.0);
        let Some(ip) = self.source.ip() else { return };
        let mut by_address = self.intake.by_address.borrow_mut();
        if let Some(count) = by_address.get_mut(&ip) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&ip);
            }
        }
    }
}

/// The kernel's side of a connection.
enum Transport {
    Tcp(tls::Stream),
    Unix(UnixStream),
}

impl Transport {
    fn tcp(stream: TcpStream) -> Self {
        Self::Tcp(tls::Stream::Plain(stream))
    }

    fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream.tcp()),
            Self::Unix(stream) => SockRef::from(stream),
        }
    }

    fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }

    /// Reads what there is, without the runtime and without waiting.
    fn read_held(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read_held(buffer),
            Self::Unix(stream) => (&*SockRef::from(&*stream)).read(buffer),
        }
    }

    /// Whether bytes come in TLS, so that nobody else could go on with them.
    fn is_tls(&self) -> bool {
        match self {
            Self::Tcp(tls::Stream::Tls(_)) => true,
            Self::Tcp(tls::Stream::Plain(_)) | Self::Unix(_) => false,
        }
    }

    fn farewell(&mut self) {
        match self {
            Self::Tcp(stream) => stream.farewell(),
            Self::Unix(_) => {}
        }
    }

    /// Who sends by it.
    fn source(&self, peer: Option<SocketAddr>) -> Source {
        match self {
            Self::Tcp(_) => {
                let address = peer.map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()).into());
                Source { listener: Listener::Tcp, address }
            }
            Self::Unix(stream) => Source { listener: Listener::Unix, address: process(stream) },
        }
    }

    /// The socket, if it can be left to another agent.
    fn into_socket(self) -> io::Result<Socket> {
        match self {
            Self::Tcp(tls::Stream::Plain(stream)) => stream.into_std().map(Socket::from),
            Self::Tcp(tls::Stream::Tls(_)) => Err(io::ErrorKind::Unsupported.into()),
            Self::Unix(stream) => stream.into_std().map(Socket::from),
        }
    }
}

/// How a stream's bytes are taken apart.
enum Framing {
    /// What has come of a unix stream before it can be told.
    Open(Vec<u8>),
    Lines(Lines),
    Packets(Frames),
}

impl Framing {
    /// Gives the worker what ends in these bytes, and says whether anything did.
    fn feed(&mut self, bytes: &[u8], intake: &Intake, source: Source) -> ControlFlow<(), bool> {
        match self {
            Self::Open(begun) => {
                begun.extend_from_slice(bytes);
                let Some(form) = frames::form(begun) else { return ControlFlow::Continue(false) };
                let begun = std::mem::take(begun);
                let rest = lines::Rest { form, ..lines::Rest::default() };
                *self = Self::resume(source.listener, rest, intake);
                self.feed(&begun, intake, source)
            }
            Self::Lines(lines) => {
                lines.feed(bytes, |piece| intake.line(piece, source))?;
                ControlFlow::Continue(memchr::memchr(b'\n', bytes).is_some())
            }
            Self::Packets(frames) => {
                let mut ended = false;
                frames.feed(bytes, |piece| {
                    ended = true;
                    intake.packet(piece, source)
                })?;
                ControlFlow::Continue(ended)
            }
        }
    }

    /// Begins where another left off, or at the beginning of a stream.
    fn resume(listener: Listener, rest: lines::Rest, intake: &Intake) -> Self {
        match rest.form {
            Form::Open if listener == Listener::Unix => Self::Open(rest.partial),
            Form::Open | Form::Lines => {
                let line = intake.workers.settings().limits.line;
                Self::Lines(Lines::resume(line.min(intake.limits.stream_buffer.bytes()), rest))
            }
            Form::Packets => {
                let packet = intake.limits.datagram.0.min(DATAGRAM_MAX) as usize;
                Self::Packets(Frames::resume(packet, rest))
            }
        }
    }

    fn into_rest(self) -> lines::Rest {
        match self {
            Self::Open(partial) => lines::Rest { partial, ..lines::Rest::default() },
            Self::Lines(lines) => lines.into_rest(),
            Self::Packets(frames) => frames.into_rest(),
        }
    }

    fn is_inside(&self) -> bool {
        match self {
            Self::Open(begun) => !begun.is_empty(),
            Self::Lines(lines) => lines.is_inside(),
            Self::Packets(frames) => frames.is_inside(),
        }
    }

    /// What is held of a line or packet that has not ended.
    fn partial(&self) -> &[u8] {
        match self {
            Self::Open(begun) => begun,
            Self::Lines(lines) => lines.partial(),
            Self::Packets(frames) => frames.partial(),
        }
    }
}

/// One stream.
struct Connection {
    stream: Transport,
    framing: Framing,
    /// When something came last, and when the line or packet began that has not ended.
    heard: Duration,
    begun: Option<Duration>,
    /// Whether nothing has come yet.
    is_new: bool,
    seat: Seat,
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The peer had no more to send: its last line needs no line feed. Of a packet, the end is missing.
    Closed,
    /// It broke, or was silent for too long: what is left of a line is none.
    Broken,
    /// A client of another protocol.
    Foreign,
}

impl Connection {
    fn begin(stream: Transport, peer: Option<SocketAddr>, intake: &Rc<Intake>) -> Result<Self, Refusal> {
        let descriptor = u64::from(stream.socket().as_raw_fd().unsigned_abs());
        let seat = intake.admit(stream.source(peer), descriptor)?;
        let framing = Framing::resume(seat.source.listener, lines::Rest::default(), intake);
        let heard = intake.clock.monotonic();
        Ok(Self { stream, framing, heard, begun: None, is_new: true, seat })
    }

    /// Goes on with a stream of another agent, which has admitted it. No limit of number ends it here, but its user may be one
    /// that this configuration does not let send. A plain stream of an address that speaks TLS by now goes on as it is: what
    /// it sent is there already, and its peer cannot change over within a connection.
    fn resume(passed: Passed, intake: &Rc<Intake>) -> io::Result<Result<Self, Refusal>> {
        let Passed { listener, socket, rest } = passed;
        socket.set_nonblocking(true)?;
        let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        let stream = match listener {
            Listener::Unix => Transport::Unix(UnixStream::from_std(socket.into())?),
            Listener::Tcp | Listener::Udp | Listener::Unixgram | Listener::Http | Listener::Kafka => {
                Transport::tcp(TcpStream::from_std(socket.into())?)
            }
        };
        let source = stream.source(peer);
        if let Err(refusal) = intake.admit_peer(source) {
            return Ok(Err(refusal));
        }
        let seat = intake.seat(source);
        let framing = Framing::resume(listener, rest, intake);
        let heard = intake.clock.monotonic();
        let begun = framing.is_inside().then_some(heard);
        // It began with lines: what comes next may be anything.
        Ok(Ok(Self { stream, framing, heard, begun, is_new: false, seat }))
    }

    /// Leaves the stream to another agent.
    fn pass_on(self) {
        let Self { stream, framing, seat, .. } = self;
        // It fails where the runtime has let go of the socket already, and then there is nothing to read any more.
        if let Ok(socket) = stream.into_socket() {
            seat.intake.stop.pass_on(Passed { listener: seat.source.listener, socket, rest: framing.into_rest() });
        }
    }

    async fn run(self, tls: Option<tls::Acceptor>, mut ends: watch::Receiver<bool>) {
        if let Some(connection) = self.secured(tls, &mut ends).await {
            connection.read(ends).await;
        }
    }

    /// The same in TLS, where that is to be spoken and comes about.
    async fn secured(self, tls: Option<tls::Acceptor>, ends: &mut watch::Receiver<bool>) -> Option<Self> {
        let stream = match (self.stream, tls) {
            (Transport::Tcp(tls::Stream::Plain(stream)), Some(tls)) => tokio::select! {
                made = tls.accept(stream, Listener::Tcp.name()) => Transport::Tcp(made.ok()?),
                () = stopped(ends) => return None,
            },
            (stream, _) => stream,
        };
        let heard = self.seat.intake.clock.monotonic();
        Some(Self { stream, heard, ..self })
    }

    async fn read(mut self, mut ends: watch::Receiver<bool>) {
        let end = loop {
            let patience = self.patience();
            if patience.is_zero() {
                break End::Broken;
            }
            tokio::select! {
                biased;
                () = stopped(&mut ends) => if self.seat.intake.stop.passes_on() && !self.stream.is_tls() {
                    return self.pass_on();
                } else {
                    break self.drain();
                },
                read = poll_fn(|context| self.poll_read(context)) => match read {
                    ControlFlow::Continue(Fill::Part) => {}
                    // There is more: let the other connections have their turn first.
                    ControlFlow::Continue(Fill::Whole) => yield_now().await,
                    ControlFlow::Break(end) => break end,
                },
                () = sleep(patience) => {}
            }
        };
        self.finish(end);
    }

    /// How long the peer may still be silent.
    fn patience(&self) -> Duration {
        let limits = &self.seat.intake.limits;
        let idle = self.heard + limits.stream_idle.0;
        let until = self.begun.map_or(idle, |begun| idle.min(begun + limits.partial_line.0));
        until.saturating_sub(self.seat.intake.clock.monotonic())
    }

    /// Reads at most one buffer.
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<ControlFlow<End, Fill>> {
        let intake = Rc::clone(&self.seat.intake);
        let mut buffer = intake.buffer.borrow_mut();
        let mut buffer = ReadBuf::new(&mut buffer);
        let read = ready!(self.stream.poll_read(context, &mut buffer));
        Poll::Ready(self.take(read.map(|()| buffer.filled()), buffer.remaining()))
    }

    /// Reads what the kernel holds, but no more than it can hold, so that a fast peer puts no stop off.
    fn drain(&mut self) -> End {
        let intake = Rc::clone(&self.seat.intake);
        let mut buffer = intake.buffer.borrow_mut();
        let mut left = self.stream.socket().recv_buffer_size().unwrap_or(0);
        while left > 0 {
            let read = self.stream.read_held(&mut buffer);
            left = left.saturating_sub(*read.as_ref().unwrap_or(&0));
            if let ControlFlow::Break(end) = self.take(read.map(|length| &buffer[..length]), 0) {
                return end;
            }
        }
        End::Broken
    }

    fn take(&mut self, read: io::Result<&[u8]>, room: usize) -> ControlFlow<End, Fill> {
        let bytes = match read {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return ControlFlow::Continue(Fill::Part),
            Err(_) => return ControlFlow::Break(End::Broken),
            Ok([]) => return ControlFlow::Break(End::Closed),
            Ok(bytes) => bytes,
        };
        let is_lines = matches!(self.framing, Framing::Lines(_));
        if std::mem::take(&mut self.is_new) && is_lines && !self.stream.is_tls() && tls::is_hello(bytes) {
            self.seat.intake.hello(bytes, self.seat.source);
            return ControlFlow::Break(End::Foreign);
        }
        let Self { seat, framing, .. } = self;
        seat.intake.meters(seat.source.listener).bytes.increment(bytes.len() as u64);
        seat.intake.received(bytes.len(), seat.source);
        let fed = framing.feed(bytes, &seat.intake, seat.source);
        seat.intake.worker.borrow_mut().hand_over_copies();
        let ControlFlow::Continue(ended) = fed else { return ControlFlow::Break(End::Foreign) };
        self.heard = seat.intake.clock.monotonic();
        if !self.framing.is_inside() {
            self.begun = None;
        } else if self.begun.is_none() || ended {
            self.begun = Some(self.heard);
        }
        // What TLS holds ready is read without a look at the socket, where the runtime would think of the others.
        let has_more = room == 0 || self.stream.is_tls();
        ControlFlow::Continue(if has_more { Fill::Whole } else { Fill::Part })
    }

    fn finish(mut self, end: End) {
        self.stream.farewell();
        let Seat { intake, source } = &self.seat;
        match (end, self.framing) {
            (End::Closed, Framing::Lines(mut lines)) => lines.end(|piece| intake.line(piece, *source)),
            (End::Closed | End::Broken, framing) if !framing.partial().is_empty() => {
                intake.worker.borrow_mut().refuse(Reason::PartialLine, framing.partial(), *source);
            }
            (End::Closed | End::Broken | End::Foreign, _) => {}
        }
    }
}

/// The process that connected a stream.
fn process(stream: &UnixStream) -> Option<Address> {
    let peer = stream.peer_cred().ok()?;
    Some(Address::Process { uid: peer.uid(), pid: peer.pid().map_or(0, i32::unsigned_abs) })
}

/// Whether a read filled the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fill {
    Part,
    Whole,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::shard::{self, Budget};
    use crate::ingest::{Rejects, Settings};
    use crate::protocol;

    fn intake(limits: Limits) -> Intake {
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let budget = Arc::new(Budget::new(&shard::Limits::default()));
        let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
        let workers =
            Workers::new(settings, budget, rejects, ingest::Times { interval_ms: 1_000, window_ms: 10_000 }).0;
        let worker = Rc::new(RefCell::new(workers.register(|| {})));
        Intake::new(worker, workers, Peers::default(), limits, Arc::new(Stop::new()))
    }

    fn source(ip: [u8; 4]) -> Source {
        Source { listener: Listener::Tcp, address: Some(Address::Inet((ip, 1).into())) }
    }

    #[test]
    fn descriptors_are_kept_back() {
        let ip = source([127, 0, 0, 1]);
        let intake = Rc::new(Intake { descriptors_max: 1_000, ..intake(Limits::default()) });
        assert!(intake.admit(ip, 1_000 - 64 - 1).is_ok());
        assert_eq!(intake.admit(ip, 1_000 - 64).err(), Some(Refusal::Descriptors));
        // Where there are few in all, half are for streams.
        let intake = Rc::new(Intake { descriptors_max: 64, ..self::intake(Limits::default()) });
        assert!(intake.admit(ip, 31).is_ok());
        assert_eq!(intake.admit(ip, 32).err(), Some(Refusal::Descriptors));
    }

    #[test]
    fn a_stream_of_another_agent_is_held_to_the_users_that_may_send_here() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let own = nix::unistd::Uid::effective().as_raw();
        let resume = |uid: u32| {
            let unix_uids = vec![crate::units::Account(uid.to_string())];
            let peers = Peers::new(&super::super::Config { unix_uids, ..Default::default() }).unwrap();
            let limits = Limits { connections: 0, ..Limits::default() };
            let intake = Rc::new(Intake { peers, ..intake(limits) });
            let (socket, _peer) = Socket::pair(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
            let passed = Passed { listener: Listener::Unix, socket, rest: lines::Rest::default() };
            Connection::resume(passed, &intake).unwrap().map(|_| intake.connections.get())
        };
        // It has its seat, though no number of connections would allow one.
        assert_eq!((resume(own), resume(own + 1)), (Ok(1), Err(Refusal::Peer)));
    }

    #[test]
    fn seats_are_given_back() {
        let limits = Limits { connections: 2, connections_per_address: 1, ..Limits::default() };
        let intake = Rc::new(Intake { descriptors_max: 1_000, ..intake(limits) });
        let [one, two, three] = [1, 2, 3].map(|last| source([192, 0, 2, last]));
        let first = intake.admit(one, 9).ok().unwrap();
        assert_eq!(intake.admit(one, 9).err(), Some(Refusal::PerAddress));
        let second = intake.admit(two, 9).ok().unwrap();
        assert_eq!(intake.admit(three, 9).err(), Some(Refusal::Connections));
        drop(first);
        assert!(intake.admit(one, 9).is_ok());
        drop(second);
        assert!(intake.by_address.borrow().is_empty(), "nothing is kept of who has gone");
        assert_eq!(intake.connections.get(), 0);
    }
}
