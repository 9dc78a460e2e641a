//! A worker of datagrams: a thread that reads bursts from sockets of its own, of UDP or a unix one, and gives each
//! datagram to its [`Worker`].
//!
//! It waits on purpose. While traffic flows, a worker that has emptied its sockets naps for `listen.linger` and then reads
//! all that came at once, since wake-ups cost more than datagrams: a bare sleep of 1 ms took 29 us of a processor where a
//! datagram took 1. The nap is cut so that half of the receive buffer stays free at the present rate, and at that of a
//! sudden burst: the 208 KiB that kernels give unasked allow 1 ms, 1 MiB allows 5. A reader who asks ends it. When a nap brought nothing it blocks until something comes, a reader asks, or a seal is due.
//!
//! With `listen.udp_gro` the kernel may hand over datagrams in trains; each datagram is counted, measured and read by itself.
//!
//! Counts are plain numbers of the thread, published once a second, and so is what the kernel dropped.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use metrics::Counter;
use socket2::Socket;

use super::burst::{self, BURST, Burst, Wake};
use super::peers::Peers;
use super::{OWES_SEAL, PAUSE, SEAL_BURSTS, Stop, sockets};
use crate::clock::Clock;
use crate::heartbeat::Beat;
use crate::ingest::{self, Listener, Question, Source, Worker};
use crate::telemetry;

/// How often counts and drops are published.
const PUBLISH: Duration = Duration::from_secs(1);

/// One of a worker's sockets.
#[derive(Debug)]
pub(super) struct Inlet {
    socket: Socket,
    /// Its address or path, in metrics.
    name: String,
    /// The receive buffer, as it was asked for.
    receive_buffer: u64,
    /// Whether it may hold trains of datagrams.
    gro: bool,
    /// Drops since the socket was opened, which may have been in another process.
    dropped: u64,
    /// Whether this worker answers for the drops: of workers that share one socket, the first does.
    counts_drops: bool,
    /// Who may send, where processes do.
    peers: Peers,
}

impl Inlet {
    /// A bound unix socket, by which these may send.
    pub(super) fn unix(socket: Socket, peers: Peers) -> io::Result<Self> {
        let path = socket.local_addr()?;
        let name = path.as_pathname().map_or_else(String::new, |path| path.display().to_string());
        let receive_buffer = sockets::receive_buffer(&socket)?.0;
        Ok(Self { socket, name, receive_buffer, gro: false, dropped: 0, counts_drops: true, peers })
    }
}

/// Deals the sockets of each address to `count` workers. Where there are fewer sockets, workers share them; where there are
/// more, as after a start with fewer workers than before, some have several.
pub(super) fn inlets(shared: &[sockets::Shared], count: usize) -> io::Result<Vec<Vec<Inlet>>> {
    let deal = |worker: usize| shared.iter().flat_map(move |shared| dealt(shared, worker, count)).collect();
    (0..count.max(1)).map(deal).collect()
}

fn dealt(shared: &sockets::Shared, worker: usize, count: usize) -> impl Iterator<Item = io::Result<Inlet>> {
    let held = shared.sockets.len();
    let own = (worker..held).step_by(count.max(1));
    let borrowed = (worker >= held).then(|| worker % held.max(1));
    own.chain(borrowed).map(move |number| {
        let socket = shared.sockets[number].try_clone()?;
        let receive_buffer = shared.receive_buffer.0;
        let counts_drops = worker < held;
        let name = format!("{}#{}", shared.address, if counts_drops { number } else { worker });
        Ok(Inlet { socket, name, receive_buffer, gro: shared.gro, dropped: 0, counts_drops, peers: Peers::default() })
    })
}

/// What a UDP worker needs.
pub(super) struct Receiver {
    worker: Worker,
    listener: Listener,
    inlets: Vec<Inlet>,
    burst: Burst,
    wake: Wake,
    stop: Arc<Stop>,
    clock: Clock,
    pace: Pace,
    counts: Counts,
}

impl Receiver {
    /// A worker with sockets for datagrams of at most `datagram` bytes. It is made on the thread that runs it.
    pub(super) fn new(
        worker: Worker,
        listener: Listener,
        inlets: Vec<Inlet>,
        wake: Wake,
        stop: Arc<Stop>,
        datagram: usize,
        linger: Duration,
    ) -> Self {
        // The kernel doubles what is asked for, and charges its own structures against that.
        let room = 2 * inlets.iter().map(|inlet| inlet.receive_buffer).min().unwrap_or(0);
        let trains = inlets.iter().any(|inlet| inlet.gro);
        let burst = match listener {
            Listener::Unixgram => Burst::of_processes(datagram),
            Listener::Udp | Listener::Tcp | Listener::Unix | Listener::Http | Listener::Kafka => {
                Burst::new(datagram, trains)
            }
        };
        let counts = Counts::new(listener, &inlets);
        let pace = Pace { linger, room, ..Pace::default() };
        Self { worker, listener, inlets, burst, wake, stop, clock: Clock::default(), pace, counts }
    }

    /// Reads until it is told to stop.
    pub(super) fn run(mut self, beat: &Beat) {
        let sockets = self.inlets.iter().map(|inlet| burst::readable(&inlet.socket));
        let mut descriptors: Vec<_> = sockets.chain([self.wake.readable()]).collect();
        let time = loop {
            if let Some(time) = self.stop.reads_for() {
                break time;
            }
            let read = self.read(1);
            let question = self.worker.question();
            if self.worker.owes(question) {
                let more = self.read(SEAL_BURSTS);
                self.pace.add(more);
            }
            let wait = self.turn(question);
            beat.beat();
            match self.pace.rest(self.clock.monotonic(), read) {
                Rest::None => {}
                Rest::Nap(time) => self.nap(time.min(wait)),
                Rest::Block => self.block(&mut descriptors, wait),
            }
        };
        self.finish(time);
    }

    /// Reads each socket until it is empty, but at most so many bursts of datagrams.
    fn read(&mut self, bursts: usize) -> Read {
        let calls = bursts * BURST / self.burst.capacity();
        let mut read = Read::default();
        for inlet in &self.inlets {
            let mut more = true;
            for _ in 0..calls {
                let one = read_burst(inlet, self.listener, &mut self.burst, &mut self.worker, &mut self.counts);
                read.charged += one.charged;
                more = one.more;
                if !more {
                    break;
                }
            }
            read.more |= more;
        }
        read
    }

    /// Does what is due, and says how long the worker may wait.
    fn turn(&mut self, question: Question) -> Duration {
        let wait = self.worker.turn(question);
        if self.clock.monotonic() >= self.counts.due {
            self.counts.publish(&mut self.inlets);
            self.counts.due = self.clock.monotonic() + PUBLISH;
        }
        if self.worker.owes(question) { wait.min(OWES_SEAL) } else { wait }
    }

    /// Leaves the sockets alone for a while, but not a reader who asks.
    fn nap(&self, time: Duration) {
        burst::wait(&mut [self.wake.readable()], time);
        self.wake.clear();
    }

    fn block(&mut self, descriptors: &mut [libc::pollfd], time: Duration) {
        let before = self.clock.monotonic();
        burst::wait(descriptors, time);
        self.pace.woke(self.clock.monotonic() - before);
        self.wake.clear();
    }

    /// Reads what the sockets hold, while there is time, and closes. No socket holds more bursts than are read of it, so
    /// a fast sender puts no stop off.
    fn finish(mut self, time: Duration) {
        let deadline = self.clock.monotonic() + time;
        for inlet in &self.inlets {
            let held = 2 * inlet.receive_buffer / CHARGE_MIN;
            for _ in 0..=held / self.burst.capacity() as u64 {
                let more = self.clock.monotonic() < deadline
                    && read_burst(inlet, self.listener, &mut self.burst, &mut self.worker, &mut self.counts).more;
                if !more {
                    break;
                }
                self.worker.turn(Question::default());
            }
        }
        self.counts.publish(&mut self.inlets);
        self.worker.close();
    }
}

/// What became of a read.
#[derive(Debug, Clone, Copy, Default)]
struct Read {
    /// Roughly what the kernel charged the datagrams against the receive buffer.
    charged: u64,
    /// Whether a socket may hold more.
    more: bool,
}

fn read_burst(inlet: &Inlet, listener: Listener, burst: &mut Burst, worker: &mut Worker, counts: &mut Counts) -> Read {
    let received = match burst.receive(inlet.socket.as_fd()) {
        Ok(received) => received,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Read { charged: 0, more: true },
        Err(_) => {
            counts.errors.increment(1);
            thread::sleep(PAUSE);
            return Read::default();
        }
    };
    if received > 0 {
        worker.stamp();
    }
    let mut charged = 0;
    for train in burst.trains() {
        charged += charge(train.len());
        for datagram in train.datagrams() {
            counts.datagrams += 1;
            counts.bytes += datagram.bytes.len() as u64;
            let source = Source { listener, address: datagram.source };
            counts.truncated += u64::from(datagram.truncated);
            // First who it is: of a process that may not send, nothing else has an effect.
            if !inlet.peers.admit(datagram.source) {
                worker.deny(datagram.bytes, source);
            } else if datagram.truncated {
                worker.truncated(datagram.bytes.len(), source);
            } else {
                worker.datagram(datagram.bytes, source);
            }
        }
    }
    Read { charged, more: received == burst.capacity() }
}

/// The least that the kernel charges for a datagram, however short: its structures are larger.
const CHARGE_MIN: u64 = 512;

/// What the kernel charges a datagram, more rather than less: its structures, and a buffer of the next power of two.
fn charge(length: usize) -> u64 {
    const STRUCTURES: u64 = 256;
    const HEADROOM: u64 = 512;
    STRUCTURES + (length as u64 + HEADROOM).next_power_of_two()
}

/// What a burst that nobody saw coming is taken to bring in a millisecond, by the measure of [`charge`]: 156 datagrams of
/// one line or 87 full ones.
const SUDDEN: u128 = 200_000;

/// When to nap and when to block. It reads no clock.
#[derive(Debug, Default)]
struct Pace {
    linger: Duration,
    /// What the smallest receive buffer holds, by the measure of [`charge`].
    room: u64,
    /// Since when, and how much, came to the sockets.
    since: Duration,
    charged: u64,
    /// Whether the last wait was so short that a nap would have brought something.
    flowing: bool,
}

/// What to do after a read.
#[derive(Debug, PartialEq)]
enum Rest {
    None,
    Nap(Duration),
    Block,
}

impl Pace {
    fn add(&mut self, read: Read) {
        self.charged += read.charged;
    }

    fn rest(&mut self, now: Duration, read: Read) -> Rest {
        self.add(read);
        if read.more {
            return Rest::None;
        }
        let charged = std::mem::take(&mut self.charged);
        let elapsed = now.saturating_sub(std::mem::replace(&mut self.since, now));
        self.flowing &= charged > 0;
        if !self.flowing {
            return Rest::Block;
        }
        // As long as half of the buffer takes to fill at the rate of late, or at that of a sudden burst.
        let half = u128::from(self.room / 2);
        let fills = (elapsed.as_nanos() * half / u128::from(charged)).min(half * 1_000_000 / SUDDEN);
        Rest::Nap(self.linger.min(Duration::from_nanos(u64::try_from(fills).unwrap_or(u64::MAX))))
    }

    fn woke(&mut self, blocked: Duration) {
        self.flowing = blocked < 2 * self.linger;
    }
}

/// What the thread counted and has not published.
struct Counts {
    datagrams: u64,
    bytes: u64,
    truncated: u64,
    due: Duration,
    errors: Counter,
    published: [Counter; 3],
    /// Of each inlet.
    drops: Vec<Counter>,
}

impl Counts {
    fn new(listener: Listener, inlets: &[Inlet]) -> Self {
        for inlet in inlets {
            telemetry::RECEIVE_BUFFER_BYTES.gauge(&[&inlet.name]).set(inlet.receive_buffer as f64);
        }
        ingest::begin(listener);
        let listener = [listener.name()];
        Self {
            datagrams: 0,
            bytes: 0,
            truncated: 0,
            due: PUBLISH,
            errors: telemetry::ACCEPT_ERRORS.counter(&listener),
            published: [telemetry::DATAGRAMS, telemetry::RECEIVED_BYTES, telemetry::DATAGRAMS_TRUNCATED]
                .map(|metric| metric.counter(&listener)),
            drops: inlets.iter().map(|inlet| telemetry::KERNEL_DROPS.counter(&[&inlet.name])).collect(),
        }
    }

    fn publish(&mut self, inlets: &mut [Inlet]) {
        let counts = [&mut self.datagrams, &mut self.bytes, &mut self.truncated];
        for (counter, count) in self.published.iter().zip(counts) {
            counter.increment(std::mem::take(count));
        }
        for (inlet, counter) in inlets.iter_mut().zip(&self.drops).filter(|(inlet, _)| inlet.counts_drops) {
            // Before Linux 4.12 the kernel does not say. Its count is of 32 bits.
            let since = burst::drops(inlet.socket.as_fd()).map_or(0, |drops| drops.wrapping_sub(inlet.dropped as u32));
            inlet.dropped += u64::from(since);
            // Where the socket came from another process, the count goes on where that had it.
            counter.absolute(inlet.dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::slice;

    use super::*;
    use crate::aggregate::shard::{self, Budget};
    use crate::ingest::{Rejects, Settings, Workers};
    use crate::protocol;

    const LINGER: Duration = Duration::from_millis(1);

    fn pace(room: u64) -> Pace {
        Pace { linger: LINGER, room, ..Pace::default() }
    }

    fn socket() -> (UdpSocket, Inlet) {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_nonblocking(true).unwrap();
        let address = receiver.local_addr().unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(address).unwrap();
        let inlet = Inlet {
            socket: receiver.into(),
            name: address.to_string(),
            receive_buffer: 1 << 16,
            gro: false,
            dropped: 0,
            counts_drops: true,
            peers: Peers::default(),
        };
        (sender, inlet)
    }

    fn worker() -> Worker {
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let budget = Arc::new(Budget::new(&shard::Limits::default()));
        let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
        Workers::new(settings, budget, rejects, ingest::Times { interval_ms: 1_000, window_ms: 10_000 })
            .0
            .register(|| {})
    }

    #[test]
    fn datagrams_and_bytes_are_those_read_truncated_ones_among_them() {
        let (sender, inlet) = socket();
        let stop = Arc::new(Stop::new());
        let mut receiver = Receiver::new(worker(), Listener::Udp, vec![inlet], Wake::new().unwrap(), stop, 8, LINGER);
        for payload in ["n:1|c", "n:2345|c", "n:23456|c", ""] {
            assert_eq!(sender.send(payload.as_bytes()).unwrap(), payload.len());
        }
        let read = receiver.read(1);
        assert!(!read.more);
        let counts = &receiver.counts;
        assert_eq!((counts.datagrams, counts.bytes, counts.truncated), (4, 5 + 8 + 8, 1));
        receiver.counts.publish(&mut receiver.inlets);
        assert_eq!(receiver.counts.datagrams, 0);
    }

    #[test]
    fn an_error_of_a_socket_is_paused_for_and_passed_over() {
        // Nobody listens where this socket is connected to, and the kernel reports that at its next call.
        let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (_, inlet) = socket();
        inlet.socket.connect(&closed.into()).unwrap();
        assert_eq!(inlet.socket.send(b"x").unwrap(), 1);
        let (mut burst, mut worker) = (Burst::new(100, false), worker());
        let mut counts = Counts::new(Listener::Udp, slice::from_ref(&inlet));
        let clock = Clock::default();
        let read = read_burst(&inlet, Listener::Udp, &mut burst, &mut worker, &mut counts);
        assert!(!read.more);
        assert!(clock.monotonic() >= PAUSE);
        // The socket goes on: it hears its peer, once there is one.
        let peer = UdpSocket::bind(closed).unwrap();
        assert_eq!(peer.send_to(b"n:1|c", inlet.name.as_str()).unwrap(), 5);
        let read = read_burst(&inlet, Listener::Udp, &mut burst, &mut worker, &mut counts);
        assert_eq!((read.charged, counts.datagrams), (charge(5), 1));
    }

    fn some(charged: u64) -> Read {
        Read { charged, more: false }
    }

    #[test]
    fn a_worker_naps_while_traffic_flows_and_else_blocks() {
        let mut pace = pace(1 << 20);
        let at = Duration::from_millis;
        assert_eq!(pace.rest(at(0), some(0)), Rest::Block);
        // A datagram now and then costs one wake-up and no nap.
        pace.woke(at(500));
        assert_eq!(pace.rest(at(500), some(1_000)), Rest::Block);
        pace.woke(at(1));
        assert_eq!(pace.rest(at(501), some(1_000)), Rest::Nap(LINGER));
        assert_eq!(pace.rest(at(502), some(1_000)), Rest::Nap(LINGER));
        // More than a burst is read without a rest, and counts for the nap after it.
        assert_eq!(pace.rest(at(503), Read { charged: 1_000, more: true }), Rest::None);
        assert_eq!(pace.rest(at(504), some(0)), Rest::Nap(LINGER));
        assert_eq!(pace.rest(at(505), some(0)), Rest::Block);
        pace.woke(at(900));
        assert_eq!(pace.rest(at(1_405), some(1_000)), Rest::Block);
    }

    #[test]
    fn a_nap_leaves_half_of_the_buffer_free() {
        let mut pace = pace(100_000);
        pace.woke(Duration::ZERO);
        // 200,000 in a millisecond fill 50,000 in a quarter of one.
        assert_eq!(pace.rest(Duration::from_millis(1), some(200_000)), Rest::Nap(Duration::from_micros(250)));
        assert_eq!(pace.rest(Duration::from_micros(1_250), some(50_000)), Rest::Nap(Duration::from_micros(250)));
        assert_eq!(pace.rest(Duration::from_micros(1_500), some(50_000)), Rest::Nap(Duration::from_micros(250)));
    }

    #[test]
    fn a_nap_is_no_longer_than_a_sudden_burst_allows() {
        // The kernel's own default of 208 KiB, doubled as it does, allows a millisecond.
        let mut pace = Pace { linger: Duration::from_millis(5), room: 425_984, ..Pace::default() };
        pace.woke(Duration::ZERO);
        assert_eq!(pace.rest(Duration::from_millis(10), some(1_000)), Rest::Nap(Duration::from_nanos(1_064_960)));
        pace.room = 2 << 20;
        assert_eq!(pace.rest(Duration::from_millis(20), some(1_000)), Rest::Nap(Duration::from_millis(5)));
    }

    #[test]
    fn no_linger_is_no_nap() {
        let mut pace = Pace { room: 1 << 20, ..Pace::default() };
        pace.woke(Duration::ZERO);
        assert_eq!(pace.rest(Duration::from_millis(1), some(1_000)), Rest::Block);
    }
}
