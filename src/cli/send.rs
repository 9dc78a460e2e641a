//! `tallyd send`: lines from the command line or standard input to an agent, packed as a good client packs them.
//!
//! It does not read the lines: what an agent would reject can be sent, to see it rejected. UDP tells nobody whether
//! somebody listens, except by an ICMP error, which is passed on as a warning; over a stream it waits until the other
//! side has taken everything and closed.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::{Code, Failure};
use crate::listen::burst::{self, Outgoing};
use crate::units::Size;

/// For a connection, and for the other side to close it.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// For an ICMP error from another machine.
const ICMP_WAIT: Duration = Duration::from_millis(50);

/// Arguments of `send`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// udp://HOST:PORT, tcp://HOST:PORT, unixgram:///PATH or unix:///PATH (packets with a length before them)
    #[arg(long, value_name = "URL", default_value = "udp://127.0.0.1:8125")]
    pub to: Target,
    /// Most bytes of lines that are packed together
    #[arg(long, value_name = "SIZE", default_value = "1432")]
    pub packet: Size,
    /// Lines such as 'page.views:1|c'; without any, standard input is sent
    #[arg(value_name = "LINE")]
    pub lines: Vec<OsString>,
}

/// Where lines are sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Datagrams to `host:port`.
    Udp(String),
    /// A stream of lines to `host:port`.
    Tcp(String),
    /// Datagrams to a unix socket.
    Unixgram(PathBuf),
    /// Packets, each after its length, to a unix socket.
    Unix(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |host: &str| host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        match text.split_once("://") {
            Some(("udp", host)) if port(host) => Ok(Self::Udp(host.to_owned())),
            Some(("tcp", host)) if port(host) => Ok(Self::Tcp(host.to_owned())),
            Some(("udp" | "tcp", _)) => Err("it lacks a port; write one such as udp://127.0.0.1:8125".to_owned()),
            Some(("unixgram", path)) if path.starts_with('/') => Ok(Self::Unixgram(path.into())),
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("unixgram" | "unix", _)) => Err("its path is not absolute; write unix:///run/x.sock".to_owned()),
            Some(_) | None => {
                Err("write udp://HOST:PORT, tcp://HOST:PORT, unixgram:///PATH or unix:///PATH".to_owned())
            }
        }
    }
}

impl Target {
    /// Adds to a packet of lines, of which the last has no end yet, what parts it from the next one on the wire.
    pub(super) fn frame(&self, packet: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Udp(_) | Self::Unixgram(_) => {}
            Self::Tcp(_) => packet.push(b'\n'),
            Self::Unix(_) => {
                let length = u32::try_from(packet.len()).map_err(|_| ErrorKind::InvalidInput)?;
                drop(packet.splice(..0, length.to_le_bytes()));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(host) => write!(f, "udp://{host}"),
            Self::Tcp(host) => write!(f, "tcp://{host}"),
            Self::Unixgram(path) => write!(f, "unixgram://{}", path.display()),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Sends the arguments' lines, or those of `input` if there are none. Warnings go to `warnings`.
pub fn run(args: &Args, input: impl Read, warnings: &mut impl Write) -> Result<(), Failure> {
    let sender = Sender::connect(&args.to).map_err(|error| unreachable(&args.to, &error))?;
    let mut packer = Packer { target: &args.to, sender, packet: Vec::new(), bytes_max: args.packet.bytes() };
    let sent = if args.lines.is_empty() { packer.stream(input) } else { packer.arguments(&args.lines) };
    let warning = sent.and_then(|()| packer.sender.finish()).map_err(|error| broken(&args.to, &error))?;
    match warning {
        Some(warning) => Ok(warning.tell(&args.to, warnings)?),
        None => Ok(()),
    }
}

pub(super) fn unreachable(target: &Target, error: &io::Error) -> Failure {
    let code = if error.kind() == ErrorKind::PermissionDenied { Code::Permission } else { Code::Unavailable };
    Failure::told(code, format!("--to {target}: {error}; name the address of a running agent"))
}

pub(super) fn broken(target: &Target, error: &io::Error) -> Failure {
    Failure::told(Code::Io, format!("--to {target}: {error}; not all lines were sent"))
}

/// Lines waiting to be sent together.
struct Packer<'a> {
    target: &'a Target,
    sender: Sender,
    packet: Vec<u8>,
    bytes_max: usize,
}

impl Packer<'_> {
    fn arguments(&mut self, lines: &[OsString]) -> io::Result<()> {
        let lines = lines.iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b'\n'));
        lines.into_iter().try_for_each(|line| self.line(line))?;
        self.send()
    }

    /// Nothing is held back while the input rests: what another program writes arrives when it is written.
    fn stream(&mut self, input: impl Read) -> io::Result<()> {
        let mut input = BufReader::with_capacity(1 << 16, input);
        let mut line = Vec::new();
        while input.read_until(b'\n', &mut line)? > 0 {
            self.line(line.strip_suffix(b"\n").unwrap_or(&line))?;
            line.clear();
            if input.buffer().is_empty() {
                self.send()?;
            }
        }
        self.send()
    }

    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        if line.is_empty() {
            return Ok(());
        }
        if !self.packet.is_empty() && self.packet.len() + 1 + line.len() > self.bytes_max {
            self.send()?;
        }
        if !self.packet.is_empty() {
            self.packet.push(b'\n');
        }
        self.packet.extend_from_slice(line);
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        if !self.packet.is_empty() {
            self.target.frame(&mut self.packet)?;
            self.sender.send(&self.packet)?;
            self.packet.clear();
        }
        Ok(())
    }
}

/// What came back though nothing was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Warning {
    Refused,
    StillOpen,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused; nothing listens there, and lines are lost",
            Self::StillOpen => "still open after 5s; the other side has perhaps not read everything",
        })
    }
}

impl Warning {
    /// Says so in one line.
    pub(super) fn tell(self, target: &Target, warnings: &mut impl Write) -> io::Result<()> {
        writeln!(warnings, "tallyd: warning: {target}: {self}")
    }
}

/// An open socket.
pub(super) enum Sender {
    Udp { socket: UdpSocket, peer: SocketAddr, refused: bool },
    Tcp(TcpStream),
    Unixgram(UnixDatagram),
    Unix(UnixStream),
}

impl Sender {
    /// Opens a socket to a target.
    pub(super) fn connect(target: &Target) -> io::Result<Self> {
        match target {
            Target::Udp(host) => {
                let peer = host.to_socket_addrs()?.next().ok_or(ErrorKind::NotFound)?;
                let any = if peer.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(peer)?;
                Ok(Self::Udp { socket, peer, refused: false })
            }
            Target::Tcp(host) => connect(host).map(Self::Tcp),
            Target::Unixgram(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                Ok(Self::Unixgram(socket))
            }
            Target::Unix(path) => Ok(Self::Unix(UnixStream::connect(path)?)),
        }
    }

    /// Makes a call that the other side blocks for so long an error.
    pub(super) fn limit_writes(&self, time: Duration) -> io::Result<()> {
        match self {
            Self::Udp { socket, .. } => socket.set_write_timeout(Some(time)),
            Self::Tcp(stream) => stream.set_write_timeout(Some(time)),
            Self::Unixgram(socket) => socket.set_write_timeout(Some(time)),
            Self::Unix(stream) => stream.set_write_timeout(Some(time)),
        }
    }

    /// Sends a packet as [`Target::frame`] made it.
    pub(super) fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        match self {
            Self::Udp { socket, refused, .. } => twice(refused, || socket.send(packet)),
            Self::Tcp(stream) => stream.write_all(packet),
            Self::Unixgram(socket) => socket.send(packet).map(drop),
            Self::Unix(stream) => stream.write_all(packet),
        }
    }

    /// Sends messages, datagrams by as few calls as the kernel lets them go by, and answers how many calls those were.
    pub(super) fn send_all(&mut self, messages: &[Outgoing<'_>]) -> io::Result<u64> {
        match self {
            Self::Udp { socket, refused, .. } => volleys(socket.as_fd(), messages, Some(refused)),
            Self::Unixgram(socket) => volleys(socket.as_fd(), messages, None),
            Self::Tcp(_) | Self::Unix(_) => {
                messages.iter().try_for_each(|message| self.send(message.bytes))?;
                Ok(messages.len() as u64)
            }
        }
    }

    /// The system call by which a target's packets go.
    pub(super) const fn call(target: &Target) -> &'static str {
        match target {
            Target::Udp(_) | Target::Unixgram(_) => "sendmmsg",
            Target::Tcp(_) | Target::Unix(_) => "write",
        }
    }

    /// Waits until the other side has taken everything, where a transport tells.
    pub(super) fn finish(&mut self) -> io::Result<Option<Warning>> {
        match self {
            Self::Udp { socket, peer, refused } => {
                Ok((*refused || is_refused(socket, *peer)?).then_some(Warning::Refused))
            }
            Self::Tcp(stream) => {
                stream.shutdown(std::net::Shutdown::Write)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                wait_for_end(stream)
            }
            Self::Unixgram(_) => Ok(None),
            Self::Unix(stream) => {
                stream.shutdown(std::net::Shutdown::Write)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                wait_for_end(stream)
            }
        }
    }
}

/// Sends on a socket of UDP, which reports an earlier datagram's refusal instead of sending the next one.
fn twice(refused: &mut bool, send: impl Fn() -> io::Result<usize>) -> io::Result<()> {
    match send() {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            *refused = true;
            send().map(drop)
        }
        result => result.map(drop),
    }
}

/// Sends all messages, however many of them the kernel takes by one call, and answers how many calls took some. A socket
/// of UDP notes a refusal of earlier datagrams, which is reported instead of sending the next one.
fn volleys(socket: BorrowedFd<'_>, mut messages: &[Outgoing<'_>], mut refused: Option<&mut bool>) -> io::Result<u64> {
    let mut calls = 0;
    while !messages.is_empty() {
        match (burst::send(socket, messages), &mut refused) {
            (Ok(sent), _) => {
                calls += 1;
                messages = &messages[sent..];
            }
            (Err(error), _) if error.kind() == ErrorKind::Interrupted => {}
            (Err(error), Some(refused)) if error.kind() == ErrorKind::ConnectionRefused => **refused = true,
            (Err(error), _) => return Err(error),
        }
    }
    Ok(calls)
}

/// A connection to the first address of `host:port` that takes one.
pub(super) fn connect(host: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::from(ErrorKind::NotFound);
    for peer in host.to_socket_addrs()? {
        match TcpStream::connect_timeout(&peer, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether an ICMP error has come; from this machine it comes at once.
fn is_refused(socket: &UdpSocket, peer: SocketAddr) -> io::Result<bool> {
    if !peer.ip().is_loopback() {
        socket.set_read_timeout(Some(ICMP_WAIT))?;
        // Time out or answer: the socket's own error tells the rest.
        if let Err(error) = socket.recv(&mut [0]) {
            return Ok(error.kind() == ErrorKind::ConnectionRefused);
        }
    }
    Ok(socket.take_error()?.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused))
}

fn wait_for_end(stream: &mut impl Read) -> io::Result<Option<Warning>> {
    match io::copy(stream, &mut io::sink()) {
        Ok(_) => Ok(None),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Ok(Some(Warning::StillOpen))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn send(to: &str, packet: u64, lines: &[&str], input: &str) -> Result<String, Failure> {
        let lines = lines.iter().map(OsString::from).collect();
        let args = Args { to: to.parse().unwrap(), packet: Size(packet), lines };
        let mut warnings = Vec::new();
        run(&args, input.as_bytes(), &mut warnings).map(|()| String::from_utf8(warnings).unwrap())
    }

    fn code(result: Result<String, Failure>) -> u8 {
        result.unwrap_err().code()
    }

    fn udp() -> (UdpSocket, String) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let to = format!("udp://{}", socket.local_addr().unwrap());
        (socket, to)
    }

    fn datagram(read: impl Fn(&mut [u8]) -> io::Result<usize>) -> String {
        let mut buffer = [0; 1 << 16];
        let length = read(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn lines_are_packed_up_to_the_size_and_never_cut() {
        let (socket, to) = udp();
        assert_eq!(send(&to, 11, &["a:1|c", "b:2|c", "c:3|c", "a.long.name:1|c", "d:4|c\n\ne:5|c"], "").unwrap(), "");
        for expected in ["a:1|c\nb:2|c", "c:3|c", "a.long.name:1|c", "d:4|c\ne:5|c"] {
            assert_eq!(datagram(|buffer| socket.recv(buffer)), expected);
        }
    }

    #[test]
    fn standard_input_is_sent_when_there_are_no_lines() {
        let (socket, to) = udp();
        send(&to, 1432, &[], "a:1|c\n\nb:2|c").unwrap();
        assert_eq!(datagram(|buffer| socket.recv(buffer)), "a:1|c\nb:2|c");
        send(&to, 1432, &[], "").unwrap();
        send(&to, 1432, &["end"], "unread").unwrap();
        assert_eq!(datagram(|buffer| socket.recv(buffer)), "end");
    }

    #[test]
    fn what_is_written_to_a_pipe_is_sent_before_the_pipe_ends() {
        let (socket, to) = udp();
        let (read, mut write) = io::pipe().unwrap();
        let args = Args { to: to.parse().unwrap(), packet: Size(1432), lines: Vec::new() };
        let sender = thread::spawn(move || run(&args, read, &mut Vec::new()).is_ok());
        write.write_all(b"a:1|c\n").unwrap();
        assert_eq!(datagram(|buffer| socket.recv(buffer)), "a:1|c");
        drop(write);
        assert!(sender.join().unwrap());
    }

    #[test]
    fn a_port_where_nobody_listens_is_a_warning() {
        let (socket, to) = udp();
        drop(socket);
        let one = send(&to, 1432, &["a:1|c"], "").unwrap();
        assert!(one.starts_with("tallyd: warning: udp://127.0.0.1:") && one.contains("refused"), "{one}");
        assert!(send(&to, 1, &["a:1|c", "a:1|c", "a:1|c"], "").unwrap().contains("refused"));
    }

    #[test]
    fn tcp_lines_have_ends_and_the_close_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = format!("tcp://{}", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(send(&to, 8, &["a:1|c", "b:2|c"], "").unwrap(), "");
        assert_eq!(server.join().unwrap(), "a:1|c\nb:2|c\n");
        assert_eq!(code(send(&to, 8, &["a:1|c"], "")), 69);
    }

    #[test]
    fn unixgram_carries_datagrams() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("statsd.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        let to = format!("unixgram://{}", path.display());
        send(&to, 1432, &["a:1|c", "b:2|c"], "").unwrap();
        assert_eq!(datagram(|buffer| socket.recv(buffer)), "a:1|c\nb:2|c");
        drop(socket);
        assert_eq!(code(send(&to, 1432, &["a:1|c"], "")), 69);
    }

    #[test]
    fn unix_packets_follow_their_length() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("statsd.sock");
        let to = format!("unix://{}", path.display());
        assert_eq!(code(send(&to, 1432, &["a:1|c"], "")), 69);
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut bytes = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut bytes).unwrap();
            bytes
        });
        send(&to, 5, &["a:1|c", "bc:2|c"], "").unwrap();
        assert_eq!(server.join().unwrap(), b"\x05\0\0\0a:1|c\x06\0\0\0bc:2|c");
    }

    #[test]
    fn messages_of_one_call_arrive_each_for_itself_and_so_do_segments() {
        let (socket, to) = udp();
        let mut sender = Sender::connect(&to.parse().unwrap()).unwrap();
        let [train, alone] = [(&b"a:1|c\nb:22|c\nc:3"[..], 6), (b"d:4|c", 0)];
        let messages = [train, alone].map(|(bytes, segment)| Outgoing { bytes, segment });
        assert_eq!(sender.send_all(&messages).unwrap(), 1);
        for expected in ["a:1|c\n", "b:22|c", "\nc:3", "d:4|c"] {
            assert_eq!(datagram(|buffer| socket.recv(buffer)), expected);
        }
        // A refusal stands in the way of a message, which then goes by a further call.
        drop(socket);
        assert_eq!(sender.send_all(&messages.repeat(3)).unwrap(), 6);
        assert!(sender.finish().unwrap() == Some(Warning::Refused));
    }

    #[test]
    fn a_slow_reader_of_a_unix_socket_gets_all_messages() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let reader = UnixDatagram::bind(&path).unwrap();
        let payloads: Vec<String> = (0..300).map(|number| format!("a:{number}|c")).collect();
        let messages: Vec<_> =
            payloads.iter().map(|payload| Outgoing { bytes: payload.as_bytes(), segment: 0 }).collect();
        let mut sender = Sender::connect(&Target::Unixgram(path)).unwrap();
        thread::scope(|scope| {
            let calls = scope.spawn(|| sender.send_all(&messages).unwrap());
            for payload in &payloads {
                assert_eq!(datagram(|buffer| reader.recv(buffer)), *payload);
            }
            assert_eq!(calls.join().unwrap(), 5, "64 a call");
        });
    }

    #[test]
    fn a_datagram_that_the_system_refuses_is_an_error() {
        let (_socket, to) = udp();
        assert_eq!(code(send(&to, 1432, &[&"a".repeat(70_000)], "")), 74);
    }

    #[test]
    fn targets_are_read_as_they_are_printed() {
        for text in ["udp://localhost:8125", "tcp://[::1]:8125", "unixgram:///run/a.sock", "unix:///run/a.sock"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for text in ["localhost:8125", "udp://localhost", "http://localhost:1", "unix://run/a.sock", "tcp://[::1]"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
