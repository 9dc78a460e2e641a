//! Sockets that were open before this process began, and those that it can pass on.
//!
//! systemd opens some for a `.socket` unit, and keeps others over a restart that an agent gave it (its store of file
//! descriptors); an agent that is taken over passes its own on. Whoever needs a socket asks here before it binds one, and
//! tells of each that it uses. Nothing is read or written here.
//!
//! A socket of a unit says itself where it listens: it stands in the place of what is configured. One that an agent opened
//! is used where it is bound to a configured address, else closed.

use std::io;
use std::os::fd::OwnedFd;
use std::{env, fs};

use listenfd::ListenFd;
use socket2::{SockAddr, Socket, Type};

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Datagrams of lines.
    Udp,
    /// Streams of lines.
    Tcp,
    /// Datagrams of lines, by a path.
    Unixgram,
    /// Streams of packets, by a path.
    Unix,
    /// HTTP ingest.
    Ingest,
    /// The HTTP API.
    Api,
    /// Scrapes alone.
    Scrape,
    /// Etsy's console.
    Console,
}

impl Use {
    /// The last word of its configuration key.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Unixgram => "unixgram",
            Self::Unix => "unix",
            Self::Ingest => "ingest",
            Self::Api => "api",
            Self::Scrape => "scrape",
            Self::Console => "console",
        }
    }

    /// What a listening socket is for by its name and, where that says nothing, by its kind: lines.
    fn of(name: &str, socket: &Socket) -> io::Result<Self> {
        let (kind, is_inet) = (socket.r#type()?, socket.local_addr()?.as_socket().is_some());
        let others = [Self::Ingest, Self::Api, Self::Scrape, Self::Console];
        let other = others.into_iter().find(|other| other.name() == name);
        match (other, kind, is_inet) {
            (Some(other), Type::STREAM, true) => Ok(other),
            (None, Type::DGRAM, true) => Ok(Self::Udp),
            (None, Type::STREAM, true) => Ok(Self::Tcp),
            (None, Type::DGRAM, false) => Ok(Self::Unixgram),
            (None, Type::STREAM, false) => Ok(Self::Unix),
            (Some(_) | None, _, _) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// What the names of sockets begin with that an agent opened itself. No unit's name has such a character.
const OWN: &str = "tallyd/";

/// A socket, what it is for, and who opened it.
#[derive(Debug)]
pub struct Named {
    /// What it is for.
    pub r#use: Use,
    /// Whether systemd opened it for a unit, which has it anyway.
    pub is_of_unit: bool,
    /// Itself.
    pub socket: Socket,
}

impl Named {
    /// The name under which it is kept and passed on, and by which it is known again.
    pub fn name(&self) -> String {
        format!("{}{}", if self.is_of_unit { "" } else { OWN }, self.r#use.name())
    }
}

/// What this process began with, and what it uses.
#[derive(Debug, Default)]
pub struct Inherited {
    found: Vec<Named>,
    used: Vec<Named>,
    strange: Vec<String>,
    /// Whether another process reads the same sockets now.
    is_shared: bool,
}

impl Inherited {
    /// What systemd passed to this process, if it did (`$LISTEN_FDS`).
    pub fn from_systemd() -> Self {
        let mut inherited = Self::default();
        let mut passed = ListenFd::from_env();
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        for index in 0..passed.len() {
            let name = names.next().unwrap_or_default();
            match take(&mut passed, index) {
                Some(socket) => inherited.add(name, socket),
                None => inherited.strange.push(name.to_owned()),
            }
        }
        inherited
    }

    /// What another process passes on that still reads it; its sockets are to be added.
    pub fn shared() -> Self {
        Self { is_shared: true, ..Self::default() }
    }

    /// Whether another process reads the same sockets now, so that they must stay as they are.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// What this process used before, to begin again with.
    pub fn again(used: &[Named]) -> Self {
        let mut inherited = Self::default();
        for named in used {
            // One that cannot be had twice now, for want of descriptors, is bound anew.
            if let Ok(socket) = named.socket.try_clone() {
                inherited.add(&named.name(), socket);
            }
        }
        inherited
    }

    /// Adds a socket by its name.
    pub fn add(&mut self, name: &str, socket: Socket) {
        let (is_of_unit, plain) = name.strip_prefix(OWN).map_or((true, name), |own| (false, own));
        match Use::of(plain, &socket) {
            Ok(r#use) => self.found.push(Named { r#use, is_of_unit, socket }),
            Err(_) => self.strange.push(name.to_owned()),
        }
    }

    /// Takes all that units opened for a use, in the order in which they were.
    pub fn take_of_units(&mut self, r#use: Use) -> io::Result<Vec<Socket>> {
        self.take(|found| found.is_of_unit && found.r#use == r#use)
    }

    /// Takes what an agent opened for a use at an address.
    pub fn take_bound(&mut self, r#use: Use, mut is_there: impl FnMut(&SockAddr) -> bool) -> io::Result<Vec<Socket>> {
        self.take(|found| {
            !found.is_of_unit
                && found.r#use == r#use
                && found.socket.local_addr().is_ok_and(|address| is_there(&address))
        })
    }

    fn take(&mut self, is_wanted: impl FnMut(&Named) -> bool) -> io::Result<Vec<Socket>> {
        let (mut taken, left) = std::mem::take(&mut self.found).into_iter().partition::<Vec<_>, _>(is_wanted);
        self.found = left;
        // The kernel numbers them as they are asked for their number, which `keep` does: so each has its place again, and
        // the counters of what it dropped go on.
        taken.sort_by_key(|named| named.socket.cookie().unwrap_or(u64::MAX));
        let sockets = taken.iter().map(|named| named.socket.try_clone()).collect();
        self.used.append(&mut taken);
        sockets
    }

    /// Takes note of a socket that this process has opened.
    pub fn keep(&mut self, r#use: Use, socket: &Socket) -> io::Result<()> {
        // Old kernels do not number sockets.
        let _number = socket.cookie();
        self.used.push(Named { r#use, is_of_unit: false, socket: socket.try_clone()? });
        Ok(())
    }

    /// Ends the start: what is used, and what nobody took. The latter is closed when it is dropped.
    pub fn sort_out(self) -> (Vec<Named>, Left) {
        (self.used, Left { sockets: self.found, strange: self.strange })
    }
}

/// What was inherited and nobody needs.
#[derive(Debug)]
pub struct Left {
    /// Sockets at addresses that are not configured.
    pub sockets: Vec<Named>,
    /// Names of what is no listening socket of a kind that tallyd knows.
    pub strange: Vec<String>,
}

impl Left {
    /// Removes the files of unix sockets that an agent opened: nobody is behind them any more.
    pub fn remove_files(&self) {
        for named in self.sockets.iter().filter(|named| !named.is_of_unit) {
            let address = named.socket.local_addr().ok();
            if let Some(path) = address.as_ref().and_then(SockAddr::as_pathname) {
                // One that stays is taken over by whoever binds it next.
                drop(fs::remove_file(path));
            }
        }
    }
}

fn take(passed: &mut ListenFd, index: usize) -> Option<Socket> {
    // Each of them refuses what is of another kind, and leaves it there.
    let tcp = passed.take_tcp_listener(index).ok().flatten().map(Socket::from);
    let udp = || passed.take_udp_socket(index).ok().flatten().map(Socket::from);
    let taken = tcp.or_else(udp);
    let taken = taken.or_else(|| passed.take_unix_listener(index).ok().flatten().map(Socket::from));
    let taken = taken.or_else(|| passed.take_unix_datagram(index).ok().flatten().map(Socket::from));
    taken.filter(is_listening)
}

/// A socket for datagrams listens when it is bound.
fn is_listening(socket: &Socket) -> bool {
    socket.r#type().is_ok_and(|kind| kind == Type::DGRAM) || socket.is_listener().unwrap_or(false)
}

impl From<Named> for OwnedFd {
    fn from(named: Named) -> Self {
        named.socket.into()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn udp() -> Socket {
        UdpSocket::bind("127.0.0.1:0").unwrap().into()
    }

    fn tcp() -> Socket {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    #[test]
    fn a_socket_is_known_by_its_name_and_kind() {
        let directory = tempfile::tempdir().unwrap();
        let unixgram = || UnixDatagram::bind(directory.path().join("s")).unwrap().into();
        let mut inherited = Inherited::default();
        let given: [(&str, Socket); 5] = [
            ("tallyd.socket", udp()), // systemd names a unit's sockets so if it is not told otherwise
            ("lines", tcp()),
            ("api", tcp()),
            ("tallyd/ingest", tcp()),
            ("tallyd/unixgram", unixgram()),
        ];
        for (name, socket) in given {
            inherited.add(name, socket);
        }
        inherited.add("scrape", udp());
        assert_eq!(inherited.strange, ["scrape"], "HTTP needs a stream");
        let of_units = |inherited: &mut Inherited, r#use| inherited.take_of_units(r#use).unwrap().len();
        assert_eq!(of_units(&mut inherited, Use::Udp), 1);
        assert_eq!(of_units(&mut inherited, Use::Tcp), 1);
        assert_eq!(of_units(&mut inherited, Use::Api), 1);
        assert_eq!(inherited.take_bound(Use::Ingest, |_| true).unwrap().len(), 1);
        assert_eq!(inherited.take_bound(Use::Unixgram, |address| address.as_pathname().is_some()).unwrap().len(), 1);
        let (used, left) = inherited.sort_out();
        let names: Vec<_> = used.iter().map(Named::name).collect();
        assert_eq!(names, ["udp", "tcp", "api", "tallyd/ingest", "tallyd/unixgram"]);
        assert!(left.sockets.is_empty());
    }

    #[test]
    fn what_was_kept_is_found_by_its_address_and_in_the_order_in_which_it_was_opened() {
        let mut first = Inherited::default();
        let sockets: Vec<Socket> = (0..5).map(|_| udp()).collect();
        for socket in &sockets {
            first.keep(Use::Udp, socket).unwrap();
        }
        let (used, _) = first.sort_out();
        let mut second = Inherited::default();
        for named in used.into_iter().rev() {
            second.add(&named.name(), named.socket);
        }
        let third = sockets[2].local_addr().unwrap();
        let taken = second.take_bound(Use::Udp, |address| *address == third).unwrap();
        assert_eq!(taken.len(), 1);
        let rest = second.take_bound(Use::Udp, |_| true).unwrap();
        let addresses = |sockets: &[Socket]| -> Vec<_> {
            sockets.iter().map(|socket| socket.local_addr().unwrap().as_socket().unwrap()).collect()
        };
        let all = addresses(&sockets);
        assert_eq!(addresses(&rest), [all[0], all[1], all[3], all[4]]);
    }
}
