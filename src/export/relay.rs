//! Sends lines on to other StatsD servers over UDP, as they came: those of datagrams and of streams, rejected ones too.
//! HTTP bodies and records of Kafka are not sent on, nor is what was refused before it was read: datagrams and packets beyond
//! their limit, lines of streams beyond theirs, what breaks off inside a line or packet, clients of HTTP or TLS, and what a
//! process sends that may not. A line that is too long inside a datagram goes on with it.
//!
//! A thread of its own takes the copies that workers make ([`crate::ingest::copies`]), packs them into datagrams of at most
//! `export.relay.packet` and sends each to every target. Names are looked up by another thread, at first and every 30 s.
//! Neither waits for a target, and no worker waits for them: what has no room, no address or no taker is counted by target
//! and gone, and the other targets have it all the same. For each target `tallyd_relay_lines_total` and
//! `tallyd_relay_dropped_lines_total` together are the lines of datagrams and streams that were read: all that came, but for
//! what is named above.
//!
//! A target at which this agent itself listens would send everything round for ever: it is refused.
//!
//! Metrics: `tallyd_relay_lines_total`, `tallyd_relay_packets_total`, `tallyd_relay_bytes_total`,
//! `tallyd_relay_dropped_lines_total`.

mod packets;
mod target;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::heartbeat::{Beat, Board};
use crate::ingest::copies::{Copies, Ending, Next};
use crate::units::Size;
use packets::Packets;
use target::{Names, Place, Target};

/// `[export.relay]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `host:port` of each server; none for no relay.
    pub to: Vec<String>,
    /// The longest datagram that several lines are packed into.
    pub packet: Size,
}

impl Default for Config {
    fn default() -> Self {
        // What fits into one frame of Ethernet behind the headers of tunnels.
        Self { to: Vec::new(), packet: Size(1_400) }
    }
}

/// Servers that lines may be sent on to.
pub const TARGETS_MAX: usize = 16;

/// Bytes of the datagrams that lines are packed into, up to the longest payload over IPv4.
pub const PACKET: RangeInclusive<u64> = 64..=65_507;

impl Config {
    /// Whether a relay can work so, beside listeners at these addresses.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, own: &[SocketAddr]) -> Result<(), Error> {
        if self.to.len() > TARGETS_MAX {
            return Err(Error::TooMany(self.to.len()));
        }
        if !PACKET.contains(&self.packet.0) {
            return Err(Error::Packet(self.packet));
        }
        for (number, text) in self.to.iter().enumerate() {
            let place: Place = text.parse().map_err(|()| Error::Target(text.clone()))?;
            if self.to[..number].contains(text) {
                return Err(Error::Twice(text.clone()));
            }
            if place.is_surely_one_of(own) {
                return Err(Error::Loop(text.clone()));
            }
        }
        Ok(())
    }
}

/// Why lines can't be sent on.
#[derive(Debug)]
pub enum Error {
    /// No host with a port.
    Target(String),
    /// The same one twice.
    Twice(String),
    /// One of our own listeners.
    Loop(String),
    /// More than [`TARGETS_MAX`].
    TooMany(usize),
    /// No length of a packet.
    Packet(Size),
    /// The system refused a thread.
    System(io::Error),
}

impl Error {
    /// The key that is to be changed.
    pub const fn key(&self) -> &'static str {
        match self {
            Self::Packet(_) => "export.relay.packet",
            Self::Target(_) | Self::Twice(_) | Self::Loop(_) | Self::TooMany(_) | Self::System(_) => "export.relay.to",
        }
    }

    /// The exit code of a start that failed so, after sysexits.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Target(_) | Self::Twice(_) | Self::Loop(_) | Self::TooMany(_) | Self::Packet(_) => 78,
            Self::System(_) => 74,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        match self {
            Self::Target(text) => {
                write!(f, "{key} = {text:?}: no host with a port; write one such as \"statsd.example.com:8125\"")
            }
            Self::Twice(text) => write!(f, "{key} = {text:?}: it stands there twice; leave one out"),
            Self::Loop(text) => {
                write!(
                    f,
                    "{key} = {text:?}: this agent listens there itself, so lines would go round for ever; name another server"
                )
            }
            Self::TooMany(count) => write!(f, "{key}: {count} servers; name at most {TARGETS_MAX}"),
            Self::Packet(size) => {
                write!(f, "{key} = \"{size}\": out of range; write {}B to {}B", PACKET.start(), PACKET.end())
            }
            Self::System(error) => write!(f, "{key}: {error}; raise the limit of threads or open files"),
        }
    }
}

impl std::error::Error for Error {}

/// A running relay.
#[derive(Debug)]
pub struct Relay {
    ending: Ending,
    thread: JoinHandle<()>,
}

impl Relay {
    /// Sends on what is copied, beside our own listeners for datagrams at these addresses.
    ///
    /// # Errors
    /// What [`Config::check`] finds, and a target whose address turns out to be one of this host's with our own port.
    pub fn start(
        config: &Config,
        copies: Copies,
        own: &[SocketAddr],
        board: &std::sync::Arc<Board>,
    ) -> Result<Self, Error> {
        config.check(own)?;
        let mut targets = Vec::with_capacity(config.to.len());
        for text in &config.to {
            let place: Place = text.parse().map_err(|()| Error::Target(text.clone()))?;
            targets.push(Target::new(text, &place, own));
        }
        let names = Names::start(&config.to).map_err(Error::System)?;
        if let Some(own) = targets.iter_mut().find_map(|target| target.loops().then(|| target.name().to_owned())) {
            return Err(Error::Loop(own));
        }
        let ending = copies.ending();
        let packets = Packets::new(config.packet.bytes());
        let sending = Sending { copies, packets, targets, names };
        let beat = board.begin("relay");
        let thread = thread::Builder::new().name("relay".to_owned()).spawn(move || sending.run(&beat));
        Ok(Self { ending, thread: thread.map_err(Error::System)? })
    }

    /// Sends what waits, at most until the deadline, and ends. To be called when the workers are closed.
    pub fn stop(self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        if self.ending.end(left) {
            // One that panicked has ended too.
            drop(self.thread.join());
        }
    }
}

/// How long the first look for names may take, while copies wait.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// How often a relay that has nothing to do looks for news of names.
const PACE: Duration = Duration::from_secs(1);

/// The thread's own.
struct Sending {
    copies: Copies,
    packets: Packets,
    targets: Vec<Target>,
    names: Names,
}

impl Sending {
    fn run(mut self, beat: &Beat) {
        self.names.wait(FIRST_LOOK);
        loop {
            beat.beat();
            self.take_news();
            let next = match self.copies.at_once() {
                Next::Nothing => {
                    // Nothing is held back to be packed with what may come later.
                    self.send_rest();
                    self.copies.within(PACE)
                }
                next @ (Next::Batch(_) | Next::End) => next,
            };
            match next {
                Next::Batch(batch) => {
                    let Self { packets, targets, .. } = &mut self;
                    batch.messages().for_each(|message| packets.add(message, &mut |packet| send(targets, packet)));
                }
                Next::Nothing => {}
                Next::End => break,
            }
        }
        self.send_rest();
        self.take_news();
    }

    fn send_rest(&mut self) {
        let Self { packets, targets, .. } = self;
        packets.finish(&mut |packet| send(targets, packet));
    }

    /// What other threads found out meanwhile.
    fn take_news(&mut self) {
        let lost = self.copies.take_lost();
        for target in &mut self.targets {
            target.lost(lost);
            if let Some(addresses) = self.names.news(target.name()) {
                target.moves_to(addresses);
            }
        }
    }
}

fn send(targets: &mut [Target], packet: &packets::Packet<'_>) {
    targets.iter_mut().for_each(|target| target.send(packet));
}
