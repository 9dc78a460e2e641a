//! What a line costs from the datagram to its cell, beside a hand-written limit over the same bytes in the same run.
//!
//! ```sh
//! cargo bench --bench ingest            # a minute
//! cargo bench --bench ingest -- --quick # a few seconds, for a look
//! ```
//!
//! The limit does the least that any agent must: memchr for the fields, a hand-written number, one look-up in a private
//! hash table, one addition. It has no tags, no rates, no checks, no types but the one it is given. Sockets are left out
//! of both; a seal is taken once a round, as a flush each second would.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench is a program for its own terminal")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashMap;
use tallyd::aggregate::shard::{self, Budget};
use tallyd::ingest::{self, Listener, Rejects, Returned, Settings, Source, Worker, Workers};
use tallyd::protocol;

/// Lines of one kind of load, packed into datagrams.
struct Load {
    name: &'static str,
    series: usize,
    packets: Vec<Vec<u8>>,
    lines: usize,
}

/// Payload of a full datagram on an Ethernet of 1,500 bytes.
const PACKET: usize = 1_432;

fn load(name: &'static str, series: usize, lines: usize, packet: usize, mixed: bool) -> Load {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut packets = vec![Vec::new()];
    for _ in 0..lines {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let number = random as usize % series;
        let line = line(number, random >> 40, mixed);
        if !packets.last().unwrap().is_empty() && packets.last().unwrap().len() + line.len() > packet {
            packets.push(Vec::new());
        }
        packets.last_mut().unwrap().extend_from_slice(line.as_bytes());
    }
    Load { name, series, packets, lines }
}

/// 30 bytes of name; with `mixed` 60 % counters, 25 % timers, 10 % gauges and 5 % sets, by series.
fn line(number: usize, value: u64, mixed: bool) -> String {
    let name = format!("service.endpoint.metric.{number:06}");
    let value = value % 1_000;
    match number % 20 {
        12..=16 if mixed => format!("{name}:{value}|ms\n"),
        17..=18 if mixed => format!("{name}:{value}|g\n"),
        19 if mixed => format!("{name}:{value}|s\n"),
        _ => format!("{name}:{value}|c\n"),
    }
}

/// The least a line can cost: split, parse, look up, add.
#[derive(Default)]
struct Limit {
    cells: HashMap<Box<[u8]>, f64, foldhash::fast::FixedState>,
}

impl Limit {
    fn datagram(&mut self, bytes: &[u8]) {
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let Some(colon) = memchr::memchr(b':', line) else { continue };
            let Some(bar) = memchr::memchr(b'|', &line[colon..]) else { continue };
            let digits = &line[colon + 1..colon + bar];
            let value = digits.iter().fold(0_u64, |value, digit| value * 10 + u64::from(digit - b'0'));
            match self.cells.get_mut(&line[..colon]) {
                Some(cell) => *cell += value as f64,
                None => drop(self.cells.insert(line[..colon].into(), value as f64)),
            }
        }
    }
}

fn worker() -> (Arc<Workers>, crossbeam_channel::Receiver<ingest::Delivery>, Worker) {
    let settings =
        Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
    let limits = shard::Limits { series: 10_000_000, memory: tallyd::units::Size(16 << 30) };
    let budget = Arc::new(Budget::new(&limits));
    let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
    let (workers, deliveries) = Workers::new(settings, budget, rejects, 1_000);
    let worker = workers.register(|| {});
    (workers, deliveries, worker)
}

/// Nanoseconds a line, the median of `rounds`, after one round to warm up.
fn measure(rounds: usize, lines: usize, mut round: impl FnMut()) -> f64 {
    round();
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let begun = Instant::now();
            round();
            begun.elapsed().as_secs_f64() * 1e9 / lines as f64
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (lines, rounds) = if quick { (200_000, 3) } else { (2_000_000, 7) };
    let loads = [
        load("counters, full packets", 1_000, lines, PACKET, false),
        load("counters, full packets", 100_000, lines, PACKET, false),
        load("mixed, full packets", 1_000, lines, PACKET, true),
        load("mixed, full packets", 100_000, lines, PACKET, true),
        load("counters, 1-line packets", 1_000, lines, 1, false),
    ];
    println!("{:<26} {:>8} {:>12} {:>12} {:>7} {:>12}", "load", "series", "limit ns", "tallyd ns", "ratio", "seal us");
    for load in &loads {
        row(load, rounds);
    }
}

fn row(load: &Load, rounds: usize) {
    let mut limit = Limit::default();
    let limit_ns =
        measure(rounds, load.lines, || load.packets.iter().for_each(|packet| limit.datagram(black_box(packet))));
    let (workers, deliveries, mut worker) = worker();
    let source = Source { listener: Listener::Udp, address: None };
    let mut seals = Vec::new();
    let tallyd_ns = measure(rounds, load.lines, || {
        load.packets.iter().for_each(|packet| worker.datagram(black_box(packet), source));
        workers.ask();
        let begun = Instant::now();
        worker.turn();
        seals.push(begun.elapsed().as_secs_f64() * 1e6);
        // The fold's part: what came is taken out and the cells go back.
        for mut delivery in deliveries.try_iter() {
            black_box(delivery.sealed.cells.drain().count());
            workers.give_back(delivery.worker, Returned::Cells(delivery.sealed.cells));
        }
    });
    seals.sort_unstable_by(f64::total_cmp);
    let ratio = tallyd_ns / limit_ns;
    let seal_us = seals[seals.len() / 2];
    println!("{:<26} {:>8} {limit_ns:>12.1} {tallyd_ns:>12.1} {ratio:>7.2} {seal_us:>12.1}", load.name, load.series);
}
