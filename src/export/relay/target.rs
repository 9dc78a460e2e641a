//! One server that lines are sent on to: its name, its addresses, its socket and its counts.
//!
//! A name may have several addresses; the first of them is used until a datagram is refused there (ICMP says that nobody
//! listens), then the next. One that is still among those that a later look-up finds is kept. A datagram that no address
//! takes is counted as dropped, and where the kernel learns of that later, the one after it.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use metrics::Counter;
use socket2::SockRef;

use super::packets::Packet;
use crate::clock::Clock;
use crate::telemetry;

/// How often names are looked up.
pub(super) const LOOK_UP_EVERY: Duration = Duration::from_secs(30);

/// The same while there is one without an address.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(2);

/// Asked of the kernel for what waits to leave the host.
const SEND_BUFFER: usize = 4 << 20;

/// When nothing was dropped for so long, the log says the next time again.
const CALM: Duration = Duration::from_secs(10);

/// Where a target is, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Address(SocketAddr),
    Name { host: String, port: u16 },
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return (address.port() != 0).then_some(Self::Address(address)).ok_or(());
        }
        let (host, port) = text.rsplit_once(':').ok_or(())?;
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(())?;
        let fits = !host.is_empty() && host.len() <= 253 && host.bytes().all(is_host);
        fits.then(|| Self::Name { host: host.to_owned(), port }).ok_or(())
    }
}

impl Place {
    /// Whether it is one of these listeners, as far as that can be told without looking anything up.
    pub(super) fn is_surely_one_of(&self, own: &[SocketAddr]) -> bool {
        let addresses = match self {
            Self::Address(address) => vec![*address],
            Self::Name { host, port } if host.eq_ignore_ascii_case("localhost") => {
                let loopbacks: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                loopbacks.map(|ip| SocketAddr::new(ip, *port)).to_vec()
            }
            Self::Name { .. } => Vec::new(),
        };
        let all = |ip: IpAddr| ip.is_unspecified();
        let reaches = |address: &SocketAddr, own: &SocketAddr| {
            let (to, at) = (address.ip().to_canonical(), own.ip().to_canonical());
            address.port() == own.port()
                && (to == at || all(at) && (to.is_loopback() || all(to)) || all(to) && at.is_loopback())
        };
        addresses.iter().any(|address| own.iter().any(|own| reaches(address, own)))
    }
}

/// Why lines are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dropped {
    /// They came faster than they were sent.
    QueueFull,
    /// The name has no address.
    Unresolved,
    /// The address is one of our own listeners.
    Loop,
    /// Nobody listens there.
    Refused,
    /// The kernel has no room.
    BufferFull,
    /// No datagram is so long.
    TooLong,
    /// Something else.
    Error,
}

impl Dropped {
    const ALL: [Self; 7] =
        [Self::QueueFull, Self::Unresolved, Self::Loop, Self::Refused, Self::BufferFull, Self::TooLong, Self::Error];

    const fn name(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::Unresolved => "unresolved",
            Self::Loop => "loop",
            Self::Refused => "refused",
            Self::BufferFull => "buffer_full",
            Self::TooLong => "too_long",
            Self::Error => "error",
        }
    }

    fn of(error: &io::Error) -> Self {
        match (error.kind(), error.raw_os_error()) {
            (ErrorKind::ConnectionRefused, _) => Self::Refused,
            (ErrorKind::WouldBlock, _) | (_, Some(libc::ENOBUFS)) => Self::BufferFull,
            (_, Some(libc::EMSGSIZE)) => Self::TooLong,
            (_, _) => Self::Error,
        }
    }
}

/// A server that lines are sent on to.
pub(super) struct Target {
    name: String,
    own: Vec<SocketAddr>,
    addresses: Vec<SocketAddr>,
    /// Which of them is used, and the socket that is connected to it.
    at: usize,
    socket: Option<UdpSocket>,
    lines: Counter,
    packets: Counter,
    bytes: Counter,
    clock: Clock,
    /// When something was dropped last, so that the log says it once.
    dropped: Option<Duration>,
}

impl Target {
    /// A target beside our own listeners; its address is known if that is what is configured.
    pub(super) fn new(name: &str, place: &Place, own: &[SocketAddr]) -> Self {
        telemetry::RELAY_DROPPED.begin(Dropped::ALL.map(|dropped| [name, dropped.name()]));
        let addresses = match place {
            Place::Address(address) => vec![*address],
            Place::Name { .. } => Vec::new(),
        };
        let label = [name];
        Self {
            name: name.to_owned(),
            own: own.to_vec(),
            addresses,
            at: 0,
            socket: None,
            lines: telemetry::RELAY_LINES.counter(&label),
            packets: telemetry::RELAY_PACKETS.counter(&label),
            bytes: telemetry::RELAY_BYTES.counter(&label),
            clock: Clock::default(),
            dropped: None,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is at one of our own listeners.
    pub(super) fn loops(&mut self) -> bool {
        !self.addresses.is_empty() && matches!(self.connected().map(|_| ()), Err(Dropped::Loop))
    }

    /// Counts lines that never came this far.
    pub(super) fn lost(&mut self, lines: u64) {
        if lines > 0 {
            self.drop_lines(lines, Dropped::QueueFull);
        }
    }

    /// Takes the addresses that its name has now.
    pub(super) fn moves_to(&mut self, addresses: Vec<SocketAddr>) {
        let present = self.addresses.get(self.at);
        match addresses.iter().position(|address| Some(address) == present) {
            Some(place) => self.at = place,
            None => (self.at, self.socket) = (0, None),
        }
        self.addresses = addresses;
    }

    /// Sends a datagram, or drops it: it is counted the one way or the other.
    pub(super) fn send(&mut self, packet: &Packet<'_>) {
        let mut outcome = self.send_once(packet.bytes);
        for _ in 1..self.addresses.len() {
            if outcome != Err(Dropped::Refused) {
                break;
            }
            (self.at, self.socket) = ((self.at + 1) % self.addresses.len(), None);
            outcome = self.send_once(packet.bytes);
        }
        match outcome {
            Ok(()) => {
                self.lines.increment(packet.lines);
                self.packets.increment(1);
                self.bytes.increment(packet.bytes.len() as u64);
            }
            Err(dropped) => self.drop_lines(packet.lines, dropped),
        }
    }

    fn drop_lines(&mut self, lines: u64, dropped: Dropped) {
        telemetry::RELAY_DROPPED.counter(&[&self.name, dropped.name()]).increment(lines);
        let now = self.clock.monotonic();
        let before = self.dropped.replace(now);
        if before.is_none_or(|before| now - before >= CALM) {
            tracing::warn!(target = self.name, reason = dropped.name(), "lines are not sent on");
        }
    }

    fn send_once(&mut self, bytes: &[u8]) -> Result<(), Dropped> {
        let socket = self.connected()?;
        // That nobody listens on another host is said of an earlier datagram; this one is then not sent.
        let sent = socket.send(bytes);
        // On this host the kernel knows it at once.
        let refused = socket.take_error().ok().flatten();
        match (sent, refused) {
            (Err(error), _) | (Ok(_), Some(error)) => Err(Dropped::of(&error)),
            (Ok(_), None) => Ok(()),
        }
    }

    /// The socket that is connected to the present address.
    fn connected(&mut self) -> Result<&UdpSocket, Dropped> {
        let address = *self.addresses.get(self.at).ok_or(Dropped::Unresolved)?;
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => {
                let socket = connect(address).map_err(|error| Dropped::of(&error))?;
                if reaches_own(&socket, &self.own) {
                    return Err(Dropped::Loop);
                }
                socket
            }
        };
        Ok(self.socket.insert(socket))
    }
}

fn connect(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    socket.set_nonblocking(true)?;
    // As much as the system allows.
    drop(SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER));
    Ok(socket)
}

/// Whether what is sent by a connected socket comes to one of our own listeners: to an address of this host the kernel
/// sends from that very address.
fn reaches_own(socket: &UdpSocket, own: &[SocketAddr]) -> bool {
    let (Ok(from), Ok(to)) = (socket.local_addr(), socket.peer_addr()) else { return false };
    let (from, ip) = (from.ip().to_canonical(), to.ip().to_canonical());
    let is_here = ip.is_loopback() || from == ip;
    let takes = |own: IpAddr| own == ip || own.is_unspecified() && is_here;
    own.iter().any(|own| own.port() == to.port() && takes(own.ip().to_canonical()))
}

/// What is known of names, kept up to date by a thread of its own: a look-up may take its time.
#[derive(Debug)]
pub(super) struct Names {
    news: Arc<Mutex<HashMap<String, Vec<SocketAddr>>>>,
    first: Option<Receiver<()>>,
    /// Its end lets the thread end; none without names.
    running: Option<Sender<()>>,
}

impl Names {
    /// Looks up those of these targets that have names.
    pub(super) fn start(targets: &[String]) -> io::Result<Self> {
        let is_name = |text: &&String| matches!(text.parse(), Ok(Place::Name { .. }));
        let names: Vec<String> = targets.iter().filter(is_name).cloned().collect();
        let news = Arc::default();
        if names.is_empty() {
            return Ok(Self { news, first: None, running: None });
        }
        let (told, first) = bounded(1);
        let (running, ended) = bounded(0);
        let found = Arc::clone(&news);
        let run = move || look_up(&names, &found, &told, &ended);
        thread::Builder::new().name("relay-names".to_owned()).spawn(run)?;
        Ok(Self { news, first: Some(first), running: Some(running) })
    }

    /// Waits until all names were looked up once, at most so long.
    pub(super) fn wait(&mut self, time: Duration) {
        if let Some(first) = self.first.take() {
            let _ = first.recv_timeout(time);
        }
    }

    /// The addresses of a name, if they were looked up since the last call.
    pub(super) fn news(&self, name: &str) -> Option<Vec<SocketAddr>> {
        self.running.as_ref()?;
        self.news.lock().unwrap_or_else(PoisonError::into_inner).remove(name)
    }
}

/// Looks names up again and again, as long as somebody wants to know. One that can't be looked up keeps its addresses.
fn look_up(names: &[String], news: &Mutex<HashMap<String, Vec<SocketAddr>>>, told: &Sender<()>, ended: &Receiver<()>) {
    let mut known: HashMap<&str, Vec<SocketAddr>> = HashMap::new();
    loop {
        for name in names {
            let found: Vec<_> = name.to_socket_addrs().map(Iterator::collect).unwrap_or_default();
            if !found.is_empty() && known.get(name.as_str()) != Some(&found) {
                news.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), found.clone());
                known.insert(name, found);
            }
        }
        // Nobody waits for the second time.
        let _ = told.try_send(());
        let pause = if known.len() < names.len() { LOOK_UP_AGAIN } else { LOOK_UP_EVERY };
        if ended.recv_timeout(pause).is_err_and(|error| error.is_disconnected()) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Option<Place> {
        text.parse().ok()
    }

    #[test]
    fn a_target_is_a_host_with_a_port() {
        assert_eq!(place("[::1]:8125"), Some(Place::Address("[::1]:8125".parse().unwrap())));
        assert_eq!(place("a-b.example:1"), Some(Place::Name { host: "a-b.example".to_owned(), port: 1 }));
        for wrong in ["", "a", ":1", "a:0", "127.0.0.1:0", "::1:8125", "a:65536", "udp://a:1", "a b:1", "[::1]"] {
            assert_eq!(place(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn our_own_listeners_are_known_before_anything_is_looked_up() {
        let loops = |target: &str, own: &str| place(target).unwrap().is_surely_one_of(&[own.parse().unwrap()]);
        for (target, own) in [
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("localhost:1", "[::1]:1"),
            ("LocalHost:1", "0.0.0.0:1"),
            ("127.0.0.1:1", "[::]:1"),
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::ffff:127.0.0.1]:1", "127.0.0.1:1"),
            ("192.0.2.1:1", "192.0.2.1:1"),
        ] {
            assert!(loops(target, own), "{target} {own}");
        }
        for (target, own) in
            [("127.0.0.1:1", "127.0.0.1:2"), ("192.0.2.1:1", "0.0.0.0:1"), ("a.example:1", "0.0.0.0:1")]
        {
            assert!(!loops(target, own), "{target} {own}");
        }
    }

    #[test]
    fn a_name_that_is_ours_is_known_when_it_is_connected() {
        let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap();
        let anywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), own.port());
        for own in [own, anywhere] {
            let mut target = Target::new("x:1", &place("x:1").unwrap(), &[own]);
            assert!(!target.loops());
            assert_eq!(target.send_once(b"a"), Err(Dropped::Unresolved));
            target.moves_to(vec![listener.local_addr().unwrap()]);
            assert!(target.loops());
            assert_eq!(target.send_once(b"a"), Err(Dropped::Loop));
        }
    }

    #[test]
    fn an_address_that_refuses_makes_way_for_the_next() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut target = Target::new("x:1", &place("x:1").unwrap(), &[]);
        target.moves_to(vec![gone, server.local_addr().unwrap()]);
        target.send(&Packet { bytes: b"a:1|c", lines: 1 });
        let mut buffer = [0; 16];
        assert_eq!(server.recv(&mut buffer).unwrap(), 5);
        assert_eq!(target.at, 1);
        // The order of a name's addresses means nothing.
        target.moves_to(vec![server.local_addr().unwrap(), gone]);
        assert!(target.at == 0 && target.socket.is_some());
        target.moves_to(vec![gone]);
        assert_eq!(target.send_once(b"b"), Err(Dropped::Refused));
    }
}
