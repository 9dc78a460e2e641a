//! Loopback: a sender that never has more on its way than the smallest buffer holds, and the limit that receiving is
//! measured beside, a thread that reads datagrams and throws them away.

use std::fs;
use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, setsockopt};

use super::clock::{Thread, until};

/// Datagrams of one system call, as of tallyd's.
const BURST: usize = 256;

/// Room for the longest datagram. Slots are a full packet further apart, so that they don't share sets of the cache.
const SLOT: usize = 65_535;
const STRIDE: usize = SLOT + 1_472;

/// What is asked of the kernel, as by tallyd's default, and how long a receiver rests that has emptied its socket.
const BUFFER: usize = 8 << 20;
const LINGER: Duration = Duration::from_millis(1);

/// Packets from one look at the receiver's buffer to the next, and what may lie there then: less than the smallest
/// buffer in use holds, 208 KiB doubled.
const LOOK: usize = 64;
const QUEUED_MAX: u64 = 160 << 10;

/// What a UDP socket of this machine holds and has dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Queue {
    /// Bytes as the kernel charges them.
    bytes: u64,
    drops: u64,
}

impl Queue {
    /// Of all sockets bound to a port.
    fn of(port: u16) -> Self {
        let port = format!(":{port:04X}");
        let table = fs::read_to_string("/proc/net/udp").expect("/proc");
        let mut sum = Self { bytes: 0, drops: 0 };
        for line in table.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields[1].ends_with(&port) {
                let (_, received) = fields[4].split_once(':').expect("two queues");
                sum.bytes += u64::from_str_radix(received, 16).expect("hexadecimal");
                sum.drops += fields.last().and_then(|drops| drops.parse::<u64>().ok()).expect("a count of drops");
            }
        }
        sum
    }
}

/// Sends packets to one address.
pub(crate) struct Sender {
    socket: UdpSocket,
    port: u16,
}

/// The first series of [`Sender::round`].
pub(crate) const FIRST: &str = "service.endpoint.metric0000000";

impl Sender {
    pub(crate) fn to(address: SocketAddr) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        socket.connect(address).expect("an address of this machine");
        Self { socket, port: address.port() }
    }

    /// Sends as fast as they are read.
    pub(crate) fn flood(&self, packets: &[&[u8]]) {
        for some in packets.chunks(LOOK) {
            some.iter().for_each(|packet| self.send(packet));
            until("packets to be read", || (Queue::of(self.port).bytes <= QUEUED_MAX).then_some(()));
        }
    }

    /// Sends one round of so many series with so many values each, and never more than the agent's socket holds.
    pub(crate) fn round(&self, kind: &str, series: usize, values: usize, round: usize) {
        let mut packets = vec![String::new()];
        for number in 0..series {
            for value in 0..values {
                let reading = (number * 7 + value * 13 + round * 31) % 1_000 + 1;
                let line = format!("service.endpoint.metric{number:07}:{reading}|{kind}\n");
                match packets.last_mut() {
                    Some(packet) if packet.len() + line.len() <= super::FULL => packet.push_str(&line),
                    Some(_) | None => packets.push(line),
                }
            }
            if packets.len() > 10_000 || number + 1 == series {
                let all: Vec<&[u8]> = packets.iter().map(String::as_bytes).collect();
                self.flood(&all);
                packets.clear();
            }
        }
        assert_eq!(self.drops(), 0, "the kernel dropped packets; run it alone, or with a larger net.core.rmem_max");
    }

    /// Sends so many a second, a few every millisecond.
    pub(crate) fn pace(&self, packets: &[&[u8]], per_second: usize) {
        let begun = Instant::now();
        for (tick, some) in (0..).zip(packets.chunks(per_second / 1_000)) {
            sleep(Duration::from_millis(tick).saturating_sub(begun.elapsed()));
            some.iter().for_each(|packet| self.send(packet));
        }
    }

    /// How many packets the kernel dropped for want of room where they are sent to.
    pub(crate) fn drops(&self) -> u64 {
        Queue::of(self.port).drops
    }

    fn send(&self, packet: &[u8]) {
        self.socket.send(packet).expect("a socket that listens");
    }
}

/// A thread that receives and does nothing else. It reads until its socket is empty, then naps while traffic flows and
/// else blocks, as tallyd does.
pub(crate) struct Drain {
    address: SocketAddr,
    taken: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drain {
    pub(crate) fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        // The one is for root alone, the other grants less.
        if setsockopt(&socket, RcvBufForce, &BUFFER).is_err() {
            setsockopt(&socket, RcvBuf, &BUFFER).expect("a receive buffer");
        }
        let address = socket.local_addr().expect("a bound socket");
        let (taken, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (takes, stops) = (Arc::clone(&taken), Arc::clone(&stop));
        let run = move || receive(&socket, &takes, &stops);
        let thread = std::thread::Builder::new().name("drain".to_owned()).spawn(run).expect("a thread");
        Self { address, taken, stop, thread: Some(thread) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn thread(&self) -> Thread {
        Thread::named("drain")
    }

    /// Datagrams read since the start.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().map(JoinHandle::join);
    }
}

fn receive(socket: &UdpSocket, taken: &AtomicU64, stop: &AtomicBool) {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BURST, None);
    let mut memory = vec![0; BURST * STRIDE];
    let mut flows = false;
    while !stop.load(Ordering::Acquire) {
        let mut read = 0;
        loop {
            let count = receive_burst(socket, &mut headers, &mut memory);
            read += count as u64;
            if count < BURST {
                break;
            }
        }
        taken.fetch_add(read, Ordering::Release);
        flows &= read > 0;
        if flows {
            sleep(LINGER);
        } else {
            let blocked = Instant::now();
            // What it says does not matter: the socket is read anyway.
            let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(100_u8));
            flows = blocked.elapsed() < 2 * LINGER;
        }
    }
}

/// One system call. To make the slices anew costs a tenth of a microsecond of it.
fn receive_burst(socket: &UdpSocket, headers: &mut MultiHeaders<SockaddrStorage>, memory: &mut [u8]) -> usize {
    let mut slots: Vec<_> = memory.chunks_exact_mut(STRIDE).map(|slot| [IoSliceMut::new(&mut slot[..SLOT])]).collect();
    let burst = recvmmsg(socket.as_raw_fd(), headers, &mut slots, MsgFlags::MSG_DONTWAIT, None);
    burst.map_or(0, Iterator::count)
}
