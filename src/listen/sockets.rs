//! Addresses into bound sockets, those that this process inherited among them. Nothing is read here.
//!
//! Every UDP worker has a socket of its own at each address, joined by SO_REUSEPORT, so that the kernel spreads the
//! senders over them. That option would also let a second agent join and take half of the traffic: each address is
//! first probed without it. Whatever binds or inherits sockets ends in [`Sockets`], from which all listeners start.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Address, Config, Error, Warning, burst, unix};
use crate::ingest::Listener;
use crate::inherited::{Inherited, Use};
use crate::units::{ListenAddress, Size};

/// Connections that wait to be accepted; the kernel's own bound is `net.core.somaxconn`.
pub(super) const BACKLOG: i32 = 1_024;

/// Bound sockets, and what an operator should know about them.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub(super) udp: Vec<Shared>,
    pub(super) tcp: Vec<Stream>,
    pub(super) unixgram: Vec<unix::Bound>,
    pub(super) unix: Vec<unix::Bound>,
    /// What did not turn out as configured.
    pub(super) warnings: Vec<Warning>,
}

impl Sockets {
    /// Where they are bound.
    pub(super) fn addresses(&self) -> Vec<(Listener, Address)> {
        let udp = self.udp.iter().map(|shared| (Listener::Udp, shared.address.into()));
        let tcp = self.tcp.iter().filter_map(|stream| Some((Listener::Tcp, stream.address()?.into())));
        let path = |bound: &unix::Bound| bound.file.path().to_owned().into();
        let unixgram = self.unixgram.iter().map(|bound| (Listener::Unixgram, path(bound)));
        let unix = self.unix.iter().map(|bound| (Listener::Unix, path(bound)));
        udp.chain(tcp).chain(unixgram).chain(unix).collect()
    }
}

/// A listening TCP socket, and whether it speaks TLS.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) listener: TcpListener,
    pub(super) tls: bool,
}

impl Stream {
    /// As bound.
    fn address(&self) -> Option<ListenAddress> {
        let address = self.listener.local_addr().ok()?;
        Some(ListenAddress { address, tls: self.tls })
    }
}

/// The sockets that share one address.
#[derive(Debug)]
pub(super) struct Shared {
    /// As bound.
    pub(super) address: SocketAddr,
    /// One for each worker.
    pub(super) sockets: Vec<Socket>,
    /// The receive buffer that the kernel granted to each.
    pub(super) receive_buffer: Size,
    /// Whether each may hold trains.
    pub(super) gro: bool,
}

/// Binds all that is configured and not inherited, with sockets for so many UDP workers.
pub(super) fn bind(config: &Config, workers: usize, inherited: &mut Inherited) -> Result<Sockets, Error> {
    let mut bound = Sockets::default();
    bound.udp = udp(config, workers, inherited, &mut bound.warnings)?;
    bound.tcp = tcp(config, inherited, &mut bound.warnings)?;
    bound.unixgram = unix::datagrams(config, inherited)?;
    bound.unix = unix::streams(config, inherited)?;
    let asked = config.receive_buffer;
    let small = bound.udp.iter().filter(|shared| shared.receive_buffer < asked);
    let warning =
        |shared: &Shared| Warning::ReceiveBuffer { address: shared.address, asked, granted: shared.receive_buffer };
    bound.warnings.extend(small.map(warning));
    let single = bound.udp.iter().filter(|shared| config.udp_gro && !shared.gro);
    let warning = |shared: &Shared| match inherited.is_shared() {
        true => Warning::GroLater { address: shared.address },
        false => Warning::NoGro { address: shared.address },
    };
    bound.warnings.extend(single.map(warning));
    Ok(bound)
}

fn udp(
    config: &Config,
    workers: usize,
    inherited: &mut Inherited,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<Shared>, Error> {
    let of_units = inherited.take_of_units(Use::Udp).map_err(Error::System)?;
    if !of_units.is_empty() {
        return shared_of_units(of_units, config, !inherited.is_shared()).map_err(Error::System);
    }
    let bind = |place| shared(place, workers, config, inherited);
    bind_each("listen.udp", &config.udp, &Config::default().udp, bind, warnings)
}

fn tcp(config: &Config, inherited: &mut Inherited, warnings: &mut Vec<Warning>) -> Result<Vec<Stream>, Error> {
    let of_units = inherited.take_of_units(Use::Tcp).map_err(Error::System)?;
    if !of_units.is_empty() {
        let of_unit = |socket: Socket| {
            let tls = ListenAddress::of_unit(local(&socket)?, &config.tcp).tls;
            listening(socket, tls)
        };
        return of_units.into_iter().map(of_unit).collect::<io::Result<_>>().map_err(Error::System);
    }
    let bind = |place| stream(place, Use::Tcp, inherited);
    bind_each("listen.tcp", &config.tcp, &Config::default().tcp, bind, warnings)
}

/// Listening sockets for another part, where no TLS is spoken.
pub(super) fn plain(
    key: &'static str,
    r#use: Use,
    texts: &[String],
    inherited: &mut Inherited,
) -> Result<Vec<TcpListener>, Error> {
    let of_units = inherited.take_of_units(r#use).map_err(Error::System)?;
    let streams: Vec<Stream> = if of_units.is_empty() {
        bind_each(key, texts, &[], |place| stream(place, r#use, inherited), &mut Vec::new())?
    } else {
        let of_units = of_units.into_iter().map(|socket| listening(socket, false));
        of_units.collect::<io::Result<_>>().map_err(Error::System)?
    };
    Ok(streams.into_iter().map(|stream| stream.listener).collect())
}

/// An address to bind.
#[derive(Debug, Clone, Copy)]
struct Place {
    address: SocketAddr,
    tls: bool,
    /// An IPv6 socket must leave IPv4 alone, because the list has that port there too.
    only_v6: bool,
}

fn bind_each<T>(
    key: &'static str,
    texts: &[String],
    defaults: &[String],
    mut bind: impl FnMut(Place) -> io::Result<T>,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<T>, Error> {
    let mut bound = Vec::with_capacity(texts.len());
    for place in places(key, texts)? {
        match bind(place) {
            Ok(socket) => bound.push(socket),
            // Nobody asked for IPv6 where the list is the built-in one.
            Err(error) if texts == defaults && lacks_family(place, &error) => {
                warnings.push(Warning::NoIpv6 { key, address: place.address });
            }
            Err(error) => {
                let Place { address, tls, .. } = place;
                return Err(Error::bind(key, ListenAddress { address, tls }, error));
            }
        }
    }
    Ok(bound)
}

fn places(key: &'static str, texts: &[String]) -> Result<Vec<Place>, Error> {
    let parse = |text: &String| {
        let parsed = text.parse().ok().filter(|at: &ListenAddress| !at.tls || key == "listen.tcp");
        parsed.ok_or_else(|| Error::Address { key, value: text.clone() })
    };
    let addresses = texts.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let v4_has = |port| addresses.iter().any(|other| other.address.is_ipv4() && other.address.port() == port);
    let place = |&ListenAddress { address, tls }: &_| Place { address, tls, only_v6: v4_has(address.port()) };
    Ok(addresses.iter().map(place).collect())
}

/// A host without IPv6 either knows no such sockets or has no such address.
fn lacks_family(place: Place, error: &io::Error) -> bool {
    place.address.is_ipv6() && matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

impl Place {
    /// Whether a socket is bound here; with port 0, to any port.
    fn has(self, address: &SockAddr) -> bool {
        let Some(address) = address.as_socket() else { return false };
        address == self.address || self.address.port() == 0 && address.ip() == self.address.ip()
    }
}

/// One socket for each worker, all at the same address; where the port is 0, at the one that the first got. Of inherited
/// ones all are taken, since each may hold something.
fn shared(place: Place, workers: usize, config: &Config, inherited: &mut Inherited) -> io::Result<Shared> {
    let sockets = take_first_bound(Use::Udp, place, inherited)?;
    let mut shared = Shared::of(sockets, place.address, config, !inherited.is_shared())?;
    if shared.sockets.is_empty() && place.address.port() != 0 {
        let probe = socket(place, Type::DGRAM, Protocol::UDP)?;
        probe.bind(&place.address.into())?;
    }
    while shared.sockets.len() < workers.max(1) {
        let socket = socket(place, Type::DGRAM, Protocol::UDP)?;
        socket.set_reuse_port(true)?;
        set_receive_buffer(&socket, config.receive_buffer)?;
        // Before anything can come.
        shared.prepare(&socket, config.udp_gro)?;
        socket.bind(&shared.address.into())?;
        shared.address = local(&socket)?;
        inherited.keep(Use::Udp, &socket)?;
        shared.sockets.push(socket);
    }
    Ok(shared)
}

/// The sockets that units opened, by their addresses.
fn shared_of_units(sockets: Vec<Socket>, config: &Config, are_ours: bool) -> io::Result<Vec<Shared>> {
    let mut by_address: Vec<(SocketAddr, Vec<Socket>)> = Vec::new();
    for socket in sockets {
        let address = local(&socket)?;
        match by_address.iter_mut().find(|(other, _)| *other == address) {
            Some((_, sockets)) => sockets.push(socket),
            None => by_address.push((address, vec![socket])),
        }
    }
    by_address.into_iter().map(|(address, sockets)| Shared::of(sockets, address, config, are_ours)).collect()
}

impl Shared {
    /// Sockets that are bound to one address; without any, to the given one. Unless they are ours alone another process reads
    /// them too, which would not know what to do with trains.
    fn of(sockets: Vec<Socket>, address: SocketAddr, config: &Config, are_ours: bool) -> io::Result<Self> {
        let address = sockets.first().map_or(Ok(address), local)?;
        let mut shared = Self { address, sockets: Vec::new(), receive_buffer: Size(u64::MAX), gro: false };
        for socket in &sockets {
            // It may be larger than this process can ask for, and must not shrink by asking.
            if receive_buffer(socket)? < config.receive_buffer {
                set_receive_buffer(socket, config.receive_buffer)?;
            }
            shared.prepare(socket, config.udp_gro && are_ours)?;
        }
        Ok(Self { sockets, ..shared })
    }

    /// Lets a socket hold trains if it is to. If one of them does, all are read as if they did; an inherited one that did
    /// once stays so, since it may hold some.
    fn prepare(&mut self, socket: &Socket, gro: bool) -> io::Result<()> {
        self.gro |= burst::has_gro(socket.as_fd()) || gro && burst::set_gro(socket.as_fd()).is_ok();
        self.receive_buffer = self.receive_buffer.min(receive_buffer(socket)?);
        Ok(())
    }
}

/// Inherited sockets that are bound here, all to one address.
fn take_first_bound(r#use: Use, place: Place, inherited: &mut Inherited) -> io::Result<Vec<Socket>> {
    let mut first = None;
    inherited.take_bound(r#use, |address| place.has(address) && *first.get_or_insert(address.clone()) == *address)
}

/// A listening TCP socket. SO_REUSEADDR passes over what is left of closed connections, not over another listener.
fn stream(place: Place, r#use: Use, inherited: &mut Inherited) -> io::Result<Stream> {
    if let Some(socket) = take_first_bound(r#use, place, inherited)?.into_iter().next() {
        return listening(socket, place.tls);
    }
    let socket = socket(place, Type::STREAM, Protocol::TCP)?;
    socket.set_reuse_address(true)?;
    socket.bind(&place.address.into())?;
    socket.listen(BACKLOG)?;
    inherited.keep(r#use, &socket)?;
    listening(socket, place.tls)
}

fn listening(socket: Socket, tls: bool) -> io::Result<Stream> {
    socket.set_nonblocking(true)?;
    Ok(Stream { listener: socket.into(), tls })
}

fn socket(place: Place, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(place.address), kind, Some(protocol))?;
    if place.address.is_ipv6() {
        socket.set_only_v6(place.only_v6)?;
    }
    Ok(socket)
}

fn local(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Asks for a receive buffer, beyond the system's maximum where this process may.
fn set_receive_buffer(socket: &Socket, size: Size) -> io::Result<()> {
    // The kernel takes a C int and doubles it.
    let bytes = size.bytes().min(i32::MAX as usize / 2);
    burst::force_receive_buffer(socket.as_fd(), bytes).or_else(|_| socket.set_recv_buffer_size(bytes))
}

/// What the kernel granted, in the measure in which it was asked: it reports the double.
pub(super) fn receive_buffer(socket: &Socket) -> io::Result<Size> {
    Ok(Size(socket.recv_buffer_size()? as u64 / 2))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn bind(config: &Config, workers: usize) -> Result<Sockets, Error> {
        super::bind(config, workers, &mut Inherited::default())
    }

    fn config(udp: &[&str], tcp: &[&str]) -> Config {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        Config { udp: texts(udp), tcp: texts(tcp), ..Config::default() }
    }

    #[test]
    fn workers_share_the_free_port_that_the_first_one_got() {
        let bound = bind(&config(&["127.0.0.1:0", "[::1]:0"], &["127.0.0.1:0"]), 3).unwrap();
        assert_eq!(bound.udp.len(), 2);
        for shared in &bound.udp {
            assert_ne!(shared.address.port(), 0);
            assert_eq!(shared.sockets.len(), 3);
            assert!(shared.sockets.iter().all(|socket| local(socket).unwrap() == shared.address));
            assert!(shared.receive_buffer > Size(0));
        }
        assert_ne!(bound.tcp[0].address().unwrap().address.port(), 0);
    }

    #[test]
    fn an_address_that_another_agent_shares_is_in_use() {
        let first = bind(&config(&["127.0.0.1:0"], &["127.0.0.1:0"]), 2).unwrap();
        let udp = first.udp[0].address.to_string();
        let tcp = first.tcp[0].address().unwrap().to_string();
        for (second, address) in [(config(&[&udp], &[]), &udp), (config(&[], &[&tcp]), &tcp)] {
            let error = bind(&second, 2).unwrap_err();
            assert!(matches!(error, Error::InUse { .. }), "{error}");
            assert!(error.to_string().contains(address.as_str()), "{error}");
            assert_eq!(error.exit_code(), 69);
        }
        drop(first);
        assert!(bind(&config(&[&udp], &[&tcp]), 2).is_ok());
    }

    #[test]
    fn an_address_of_a_plain_server_is_in_use() {
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap().to_string();
        assert!(matches!(bind(&config(&[&address], &[]), 1), Err(Error::InUse { .. })));
    }

    #[test]
    fn both_families_may_be_named_with_one_port() {
        let free = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
        let addresses = [format!("0.0.0.0:{free}"), format!("[::]:{free}")];
        let bound = bind(&config(&[&addresses[0], &addresses[1]], &[]), 2).unwrap();
        assert_eq!(bound.udp.len(), 2);
    }

    #[test]
    fn a_missing_family_is_an_error_only_for_who_asked() {
        let no_such = || Err::<(), _>(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
        let only_v4 = |place: Place| if place.address.is_ipv6() { no_such() } else { Ok(()) };
        let texts = ["127.0.0.1:8125".to_owned(), "[::1]:8125".to_owned()];
        let mut warnings = Vec::new();
        assert_eq!(bind_each("listen.udp", &texts, &texts, only_v4, &mut warnings).unwrap(), [()]);
        let address = "[::1]:8125".parse().unwrap();
        assert_eq!(warnings, [Warning::NoIpv6 { key: "listen.udp", address }]);
        let error = bind_each("listen.udp", &texts[1..], &texts, only_v4, &mut warnings).unwrap_err();
        assert!(matches!(error, Error::NotHere { .. }), "{error}");
        let error = bind_each("listen.udp", &texts, &texts, |_| no_such(), &mut warnings).unwrap_err();
        assert!(matches!(error, Error::NotHere { .. }), "{error}");
    }

    #[test]
    fn errors_name_key_value_and_remedy() {
        let error = bind(&config(&["localhost"], &[]), 1).unwrap_err();
        assert_eq!(error.exit_code(), 78);
        assert!(error.to_string().starts_with("listen.udp = \"localhost\": "), "{error}");
        let address: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let denied = Error::bind("listen.tcp", address, io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(denied.exit_code(), 77);
        assert!(denied.to_string().starts_with("listen.tcp = \"127.0.0.1:80\": "), "{denied}");
    }

    #[test]
    fn a_buffer_that_the_kernel_cut_down_is_a_warning() {
        let huge = Config { receive_buffer: Size(1 << 40), ..config(&["127.0.0.1:0"], &[]) };
        let bound = bind(&huge, 1).unwrap();
        let granted = bound.udp[0].receive_buffer;
        assert!(granted < huge.receive_buffer);
        let expected = Warning::ReceiveBuffer { address: bound.udp[0].address, asked: huge.receive_buffer, granted };
        assert_eq!(bound.warnings, [expected]);
    }
}
