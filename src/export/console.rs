//! Etsy's console: lines of commands on a TCP port, answered as the original does, for the scripts that were written for it
//! (`echo stats | nc 127.0.0.1 8126`, Nagios plugins, keepalived). What commands answer is in `commands`.
//!
//! It asks for no token. So it listens beyond loopback only with `http.insecure`, speaks no TLS, and closes a connection
//! that begins a line as a client of HTTP does, since a browser can be made to send such, wherever that line is cut; and
//! one that begins as a client of TLS does.
//!
//! Figures are those of this agent: the open window, which the original too shows and empties at its flush. Deleting is
//! what `DELETE /data/metrics` does. An answer is written in pieces as the reader takes them, with a pointer for each series
//! and never all of its text. A thread of its own does all this, so that neither ingest nor the API waits for it.
//!
//! When another agent takes over it goes on with the listening socket; connections end, and `health down` is forgotten.
//!
//! Bounds: 16 connections, lines of 64 KiB, 10 minutes without a word, 10 s for a piece of an answer to be read. Metrics: `tallyd_connections`, `tallyd_connections_refused_total`, `tallyd_accept_errors_total`,
//! `tallyd_console_commands_total`.

mod commands;
mod inspect;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local, yield_now};
use tokio::time::{sleep, timeout};

use crate::heartbeat::Board;
use crate::inherited::{Inherited, Use};
use crate::listen;
use crate::listen::lines::{self, Lines, Piece};
use crate::telemetry;
use crate::tls;
use crate::units::ListenAddress;
use crate::view::View;
use commands::Desk;

/// `[export.console]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Addresses; none for no console.
    pub listen: Vec<String>,
}

/// The key of the addresses.
pub const KEY: &str = "export.console.listen";

/// The label of its metrics.
const LABEL: &str = "console";

/// Open connections; more are closed at once.
const CONNECTIONS_MAX: usize = 16;

/// Bytes of a line; a longer one is told `ERROR`.
const LINE_MAX: usize = 64 << 10;

/// A connection on which nothing is said for so long is closed.
const IDLE: Duration = Duration::from_secs(600);

/// The same of one that does not read its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The original answers what comes in one packet, whether a line feed ends it or not. Here that is what nothing follows for
/// so long.
const PAUSE: Duration = Duration::from_millis(100);

/// The pause after an error of an accept call.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An answer goes out in pieces of so much.
const PIECE: usize = 16 << 10;

/// Why a console can't listen.
#[derive(Debug)]
pub enum Error {
    /// A socket could not be bound.
    Listen(listen::Error),
    /// A unit's socket is one that other machines reach.
    Open(SocketAddr),
    /// The system refused a thread.
    System(io::Error),
}

impl Error {
    /// The exit code of a start that failed so, after sysexits.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Listen(error) => error.exit_code(),
            Self::Open(_) => 78,
            Self::System(_) => 74,
        }
    }
}

/// What to do about a console that other machines would reach.
pub const OPEN: &str = "other machines reach it and could delete, since the console asks for no token; take a loopback address, \
                        or set http.insecure = true";

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen(error) => error.fmt(f),
            Self::Open(address) => write!(f, "{KEY}: a unit's socket is at {address}: {OPEN}"),
            Self::System(error) => write!(f, "{KEY}: {error}; raise the limit of threads or open files"),
        }
    }
}

impl std::error::Error for Error {}

/// Takes what was inherited, and binds the rest of the addresses.
///
/// # Errors
/// An address that cannot be had, or may be reached by other machines without `is_insecure`.
pub fn bind(config: &Config, is_insecure: bool, inherited: &mut Inherited) -> Result<Vec<TcpListener>, Error> {
    let listeners = listen::bind(KEY, Use::Console, &config.listen, inherited).map_err(Error::Listen)?;
    let is_open = |address: &SocketAddr| !is_insecure && !ListenAddress { address: *address, tls: false }.is_local();
    match listeners.iter().filter_map(|listener| listener.local_addr().ok()).find(is_open) {
        Some(address) => Err(Error::Open(address)),
        None => Ok(listeners),
    }
}

/// What the console answers from.
pub struct Parts {
    /// The figures.
    pub view: View,
    /// When the agent began, in milliseconds since the epoch.
    pub begun_ms: u64,
    /// The configuration in force, each key with its value and without passwords.
    pub config: Box<dyn Fn() -> Vec<(&'static str, String)> + Send>,
    /// Figures of other parts for `stats`, which go by the part's name.
    pub backends: Vec<Backend>,
}

/// A part that has figures for `stats`.
pub struct Backend {
    /// Its name there.
    pub name: &'static str,
    /// Figures by name. Of one that begins with `last_`, a time in seconds since the epoch, `stats` tells the age.
    pub figures: Box<dyn Fn() -> Vec<(&'static str, u64)> + Send>,
}

/// A running console.
#[derive(Debug)]
pub struct Console {
    /// Its end is the console's.
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Console {
    /// Answers at these sockets.
    ///
    /// # Errors
    /// When the system refuses a thread or what belongs to it.
    pub fn start(listeners: Vec<TcpListener>, parts: Parts, board: &Arc<Board>) -> Result<Self, Error> {
        telemetry::CONNECTIONS_REFUSED.begin([[LABEL, "connections"]]);
        commands::begin();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::System)?;
        let listeners = {
            let _inside = runtime.enter();
            let listeners = listeners.into_iter().map(tokio::net::TcpListener::from_std);
            listeners.collect::<io::Result<Vec<_>>>().map_err(Error::System)?
        };
        let (stop, stopped) = oneshot::channel();
        let beat = board.begin(LABEL);
        let run = move || {
            LocalSet::new().block_on(&runtime, async {
                let desk = Rc::new(Desk::new(parts));
                listeners.into_iter().for_each(|listener| drop(spawn_local(accept(listener, Rc::clone(&desk)))));
                let beats = async {
                    loop {
                        beat.beat();
                        sleep(Duration::from_secs(1)).await;
                    }
                };
                tokio::select! {
                    _ = stopped => {}
                    () = beats => {}
                }
            });
            // What is being sorted for nobody holds up no stop.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name(LABEL.to_owned()).spawn(run).map_err(Error::System)?;
        Ok(Self { stop, thread })
    }

    /// Closes all connections and ends.
    pub fn stop(self) {
        drop(self.stop);
        // One that panicked has ended too.
        drop(self.thread.join());
    }
}

async fn accept(listener: tokio::net::TcpListener, desk: Rc<Desk>) {
    loop {
        match listener.accept().await {
            // The desk itself and its listeners have it as well.
            Ok((stream, _)) => match desk.seat(CONNECTIONS_MAX) {
                Some(seat) => drop(spawn_local(async move { drop(converse(stream, &seat).await) })),
                None => telemetry::CONNECTIONS_REFUSED.counter(&[LABEL, "connections"]).increment(1),
            },
            Err(_) => {
                telemetry::ACCEPT_ERRORS.counter(&[LABEL]).increment(1);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers one connection until either side has enough. The error is why it broke.
async fn converse(stream: TcpStream, desk: &Desk) -> io::Result<()> {
    let (mut from, to) = stream.into_split();
    let mut answer = Answer { to, buffer: Vec::new() };
    let mut heard = Heard::default();
    let mut buffer = [0; 4_096];
    loop {
        let patience = if heard.lines.is_inside() { PAUSE } else { IDLE };
        let is_over = match timeout(patience, from.read(&mut buffer)).await {
            Ok(Ok(0)) => {
                heard.end();
                true
            }
            Ok(read) => {
                heard.take(&buffer[..read?]);
                false
            }
            Err(_) if heard.lines.is_inside() => {
                heard.pause();
                false
            }
            Err(_) => return Ok(()),
        };
        for command in heard.commands.drain(..) {
            if desk.answer(&command, &mut answer).await?.is_break() {
                return answer.flush().await;
            }
            // Many commands may stand in one packet, and other connections have their turn between them.
            yield_now().await;
        }
        answer.flush().await?;
        if is_over || heard.is_foreign {
            return Ok(());
        }
    }
}

/// What a client has said and nobody has answered.
struct Heard {
    lines: Lines,
    commands: Vec<String>,
    /// The beginning of a line of which pieces have been answered, as commands that a pause ended.
    cut: Vec<u8>,
    /// Whether nothing has come yet.
    is_new: bool,
    /// Whether it speaks another protocol.
    is_foreign: bool,
}

impl Default for Heard {
    fn default() -> Self {
        let lines = Lines::new(LINE_MAX);
        Self { lines, commands: Vec::new(), cut: Vec::new(), is_new: true, is_foreign: false }
    }
}

impl Heard {
    fn take(&mut self, bytes: &[u8]) {
        if std::mem::take(&mut self.is_new) && tls::is_hello(bytes) {
            commands::count("tls_hello");
            self.is_foreign = true;
            return;
        }
        if self.goes_on_as_request(bytes) {
            return self.refuse();
        }
        if !self.lines.is_inside() && bytes.trim_ascii().is_empty() {
            // The original takes it for a command without a name. Blank lines beside others are none.
            self.commands.push(String::new());
            return;
        }
        let Self { lines, commands, is_foreign, .. } = self;
        let flow = lines.feed(bytes, |piece| understand(piece, commands));
        *is_foreign = flow.is_break();
    }

    /// Whether these bytes make a request line of one that pauses have cut: its pieces would not look like one.
    fn goes_on_as_request(&mut self, bytes: &[u8]) -> bool {
        if self.cut.is_empty() {
            return false;
        }
        let end = memchr::memchr(b'\n', bytes);
        let more = &bytes[..end.unwrap_or(bytes.len())];
        let room = LINE_MAX.saturating_sub(self.cut.len());
        self.cut.extend_from_slice(&more[..more.len().min(room)]);
        let is_request = lines::begins_request(&self.cut) || lines::is_request(self.cut.trim_ascii_end());
        if end.is_some() {
            self.cut = Vec::new();
        }
        is_request
    }

    /// Takes what has come of a line for all of it, unless more of a request is to be feared.
    fn pause(&mut self) {
        if lines::begins_request(self.lines.partial()) {
            return self.refuse();
        }
        if self.cut.is_empty() {
            self.cut.extend_from_slice(self.lines.partial());
        }
        self.end();
    }

    /// Leaves a client of HTTP without an answer.
    fn refuse(&mut self) {
        commands::count("http_request");
        self.commands.clear();
        self.is_foreign = true;
    }

    fn end(&mut self) {
        let Self { lines, commands, is_foreign, .. } = self;
        let mut flow = ControlFlow::Continue(());
        lines.end(|piece| {
            flow = understand(piece, commands);
            flow
        });
        *is_foreign |= flow.is_break();
    }
}

fn understand(piece: Piece<'_>, commands: &mut Vec<String>) -> ControlFlow<()> {
    match piece {
        Piece::Line(line) if line.trim_ascii().is_empty() => {}
        Piece::Line(line) => commands.push(String::from_utf8_lossy(line).trim().to_owned()),
        Piece::TooLong(line) if line.contains(&b' ') => commands.push(String::new()),
        // A method may be of any length, and no command is.
        Piece::TooLong(_) | Piece::Request(_) => {
            commands::count("http_request");
            commands.clear();
            return ControlFlow::Break(());
        }
    }
    ControlFlow::Continue(())
}

/// What is written back.
struct Answer {
    to: tokio::net::tcp::OwnedWriteHalf,
    buffer: Vec<u8>,
}

impl Answer {
    /// Adds text, and waits for the reader when that makes a piece.
    async fn add(&mut self, text: &str) -> io::Result<()> {
        self.buffer.extend_from_slice(text.as_bytes());
        if self.buffer.len() >= PIECE {
            self.flush().await?;
            // A reader that is never behind would keep the thread for itself.
            yield_now().await;
        }
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            timeout(PATIENCE, self.to.write_all(&self.buffer)).await??;
            self.buffer.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(reads: &[&str]) -> (Vec<String>, bool) {
        let mut heard = Heard::default();
        reads.iter().for_each(|read| heard.take(read.as_bytes()));
        heard.end();
        (heard.commands, heard.is_foreign)
    }

    #[test]
    fn commands_are_lines_and_an_empty_packet_is_one_without_a_name() {
        let said = |reads: &[&str]| heard(reads).0;
        assert_eq!(said(&["stats"]), ["stats"]);
        assert_eq!(said(&["stats\r\n\n"]), ["stats"]);
        assert_eq!(said(&["health up\nsta", "ts\n\n", "\n"]), ["health up", "stats", ""]);
        assert_eq!(said(&[" \r\n"]), [""]);
        let long = "x".repeat(LINE_MAX + 1);
        assert_eq!(said(&["stats ", &long, "yy\nquit\n"]), ["", "quit"]);
    }

    #[test]
    fn a_client_of_http_is_not_answered() {
        let request = "delcounters a\nPOST / HTTP/1.1\r\n\r\ndelcounters b\n";
        assert_eq!(heard(&[request]), (Vec::new(), true));
        for method in ["patch", "M-SEARCH", "!#$", "delcounters", &"a".repeat(LINE_MAX + 9)] {
            let request = format!("{method} / HTTP/1.1\r\n\r\ndelcounters b\n");
            assert_eq!(heard(&[&request]), (Vec::new(), true), "{method:.20}");
        }
    }

    /// What is answered if a pause follows each piece, until the connection is closed.
    fn heard_slowly(pieces: &[&str]) -> (Vec<String>, bool) {
        let mut heard = Heard::default();
        for piece in pieces {
            heard.take(piece.as_bytes());
            if heard.lines.is_inside() && !heard.is_foreign {
                heard.pause();
            }
            if heard.is_foreign {
                break;
            }
        }
        (heard.commands, heard.is_foreign)
    }

    #[test]
    fn a_request_is_known_wherever_pauses_cut_its_line() {
        for line in ["POST /aaaabbb HTTP/1.1", "delcounters /a HTTP/1.1", "m http://a/ HTTP/1.1", "OPTIONS * HTTP/1.1"]
        {
            for first in 1..=line.len() {
                for second in first..=line.len() {
                    let rest = format!("{}\r\nHost: a\r\n\r\ndelcounters victim\n", &line[second..]);
                    let pieces = [&line[..first], &line[first..second], &rest];
                    let pieces: Vec<_> = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
                    let (commands, is_foreign) = heard_slowly(&pieces);
                    assert!(is_foreign, "{pieces:?}");
                    assert!(!commands.iter().any(|command| command.contains("victim")), "{pieces:?}");
                }
            }
        }
        // Whoever never ends a line is answered all the same.
        let all = ["stats", "delcounters http.requests a", "health", "\n", "quit\n"];
        let want = ["stats", "delcounters http.requests a", "health", "", "quit"].map(str::to_owned).to_vec();
        assert_eq!(heard_slowly(&all), (want, false));
    }

    #[test]
    fn a_client_of_tls_is_not_answered() {
        assert_eq!(heard(&["\x16\x03\x01\ndelcounters victim\n"]), (Vec::new(), true));
        assert_eq!(heard_slowly(&["\x16", "\x03\x01\ndelcounters victim\n"]), (Vec::new(), true));
    }
}
