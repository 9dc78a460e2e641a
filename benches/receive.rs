//! What a datagram costs to receive, before a byte of it is read, and to send: plain sockets beside such with UDP_GRO, and
//! senders of a datagram a call, of many a call (sendmmsg), and of trains of datagrams (UDP_SEGMENT).
//!
//! ```sh
//! cargo bench --bench receive            # half a minute
//! cargo bench --bench receive -- --quick # a few seconds, for a look
//! ```
//!
//! One thread sends a volley over the loopback interface and then receives all of it, and times both parts; figures are
//! medians of the volleys, each per datagram. A volley fits into the receive buffer that any process is granted.
//!
//! `cargo bench --bench receive`, 2026-11, 2 cores of an AMD EPYC (Zen 3), Linux 6.18, rustc 1.95, beside other work:
//!
//! ```text
//! bytes     socket    sender           send ns   receive ns
//! 30        plain     one a call        3851.4        844.9
//! 30        plain     sendmmsg          3264.4        832.2
//! 30        plain     UDP_SEGMENT        547.3        818.6
//! 30        UDP_GRO   one a call        3819.2        825.6
//! 30        UDP_GRO   sendmmsg          3275.6        821.7
//! 30        UDP_GRO   UDP_SEGMENT         71.7         39.8
//! 1432      plain     one a call        4062.4        947.2
//! 1432      plain     sendmmsg          3421.2        924.9
//! 1432      plain     UDP_SEGMENT        721.7        917.2
//! 1432      UDP_GRO   one a call        3963.6        900.1
//! 1432      UDP_GRO   sendmmsg          3430.9        906.8
//! 1432      UDP_GRO   UDP_SEGMENT        195.4        114.0
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench is a program for its own terminal")]

use std::hint::black_box;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::Instant;

use tallyd::listen::burst::{self, Burst, Outgoing, Train, VOLLEY};

/// A line, and the payload of a full datagram on an Ethernet of 1,500 bytes.
const SIZES: [usize; 2] = [30, 1_432];

/// Datagrams of a volley.
const DATAGRAMS: usize = 64;

/// Volleys of a row in a round.
const VOLLEYS: usize = 100;

/// Most bytes of a train.
const TRAIN_MAX: usize = 65_507;

/// How datagrams are sent.
#[derive(Clone, Copy)]
enum How {
    OneACall,
    ManyACall,
    Trains,
}

impl How {
    const ALL: [(Self, &'static str); 3] =
        [(Self::OneACall, "one a call"), (Self::ManyACall, "sendmmsg"), (Self::Trains, "UDP_SEGMENT")];
}

/// A sender, a receiver, and the nanoseconds that each datagram of each volley cost them.
struct Row {
    size: usize,
    gro: bool,
    how: (How, &'static str),
    sender: UdpSocket,
    receiver: UdpSocket,
    burst: Burst,
    sent: Vec<f64>,
    received: Vec<f64>,
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let rounds = if quick { 5 } else { 100 };
    let mut rows: Vec<_> = SIZES
        .iter()
        .flat_map(|size| [false, true].map(|gro| How::ALL.map(|how| Row::new(*size, gro, how))))
        .flatten()
        .collect();
    for _ in 0..rounds {
        rows.iter_mut().for_each(Row::round);
    }
    println!("{:<10}{:<10}{:<14}{:>10}{:>13}", "bytes", "socket", "sender", "send ns", "receive ns");
    for Row { size, gro, how: (_, sender), sent, received, .. } in rows {
        let socket = if gro { "UDP_GRO" } else { "plain" };
        println!("{size:<10}{socket:<10}{sender:<14}{:>10.1}{:>13.1}", median(sent), median(received));
    }
}

impl Row {
    fn new(size: usize, gro: bool, how: (How, &'static str)) -> Self {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        if gro {
            burst::set_gro(receiver.as_fd()).unwrap();
        }
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        let burst = Burst::new(TRAIN_MAX, gro);
        Self { size, gro, how, sender, receiver, burst, sent: Vec::new(), received: Vec::new() }
    }

    /// Volleys of one row after those of another, so that what else runs for a while bears on all rows.
    fn round(&mut self) {
        let payload = vec![b'x'; DATAGRAMS * self.size];
        let messages = messages(&payload, self.size, self.how.0);
        let ns = |begun: Instant| begun.elapsed().as_secs_f64() * 1e9 / DATAGRAMS as f64;
        for _ in 0..VOLLEYS {
            let begun = Instant::now();
            send(&self.sender, &messages, self.how.0);
            self.sent.push(ns(begun));
            let begun = Instant::now();
            let mut received = 0;
            while self.burst.receive(self.receiver.as_fd()).unwrap() > 0 {
                received += black_box(self.burst.trains().flat_map(Train::datagrams).count());
            }
            self.received.push(ns(begun));
            assert_eq!(received, DATAGRAMS);
        }
    }
}

fn send(sender: &UdpSocket, messages: &[Outgoing<'_>], how: How) {
    let mut left = messages;
    while let [first, ..] = left {
        let sent = match how {
            How::OneACall => sender.send(first.bytes).map(|_| 1),
            How::ManyACall | How::Trains => burst::send(sender.as_fd(), left),
        };
        left = &left[sent.unwrap()..];
    }
}

/// The payload as datagrams, or as trains that are as long as they may be.
fn messages(payload: &[u8], size: usize, how: How) -> Vec<Outgoing<'_>> {
    match how {
        How::Trains => {
            let train = size * VOLLEY.min(TRAIN_MAX / size);
            payload.chunks(train).map(|bytes| Outgoing { bytes, segment: size as u16 }).collect()
        }
        How::OneACall | How::ManyACall => payload.chunks(size).map(|bytes| Outgoing { bytes, segment: 0 }).collect(),
    }
}

/// The middle one of some figures.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}
