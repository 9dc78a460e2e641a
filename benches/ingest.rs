//! What a line costs from its socket to its cell, beside limits over the same packets in the same run.
//!
//! ```sh
//! cargo bench --bench ingest                       # all rows, three minutes
//! cargo bench --bench ingest -- --quick mixed 1000 # a look at some of them
//! ```
//!
//! Three limits, each of which does the least that any agent must:
//!
//! - *receive*: a thread that calls `recvmmsg` as tallyd does and throws away what it gets ([`load::wire::Drain`]).
//! - *nap and receive*: the same where one-line packets come at 30,000 a second, so that what it costs is mostly to
//!   wake up.
//! - *parse and add up*: [`load::splitter`] and [`load::table`], over packets that lie in memory.
//!
//! Beside them stand a worker that is given the same packets from memory (`parse + aggregate`) and the listener's
//! thread that reads them from its socket (`receive + parse + aggregate`): it parses, aggregates, naps and seals, as in
//! an agent; the fold, the sender and who waits for them are other threads, and not in the figures.
//!
//! Names are made before the clock starts, and each table has seen every series before. A round goes over the next
//! 200,000 lines (one-line packets over a socket: 6,000) with one after the other, and a seal at its end; a ratio is
//! the median of the rounds' ratios. Times are those of the processor. Where there are two cores, senders run on the
//! first and receivers on the second. A datagram that is lost ends the bench.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::hint::black_box;

use load::clock::{self, Thread, until};
use load::engine::{Engine, Setup};
use load::report::{self, Goal, Line};
use load::table::Table;
use load::wire::{Drain, Sender};
use load::{Arguments, FULL, Load, Part, Spread, median_of, splitter};

/// Lines of a round from memory, and from a socket in full packets.
const LINES: usize = 200_000;

/// The same of one-line packets, and at what pace they come.
const SINGLES: usize = 6_000;
const SINGLES_PER_SECOND: usize = 30_000;

fn main() {
    let arguments = Arguments::read();
    report::head();
    for mixed in [false, true] {
        for series in arguments.series(&[1_000, 100_000, 1_000_000]) {
            let loads = [FULL, 1]
                .into_iter()
                .flat_map(|packet| Spread::ALL.map(|spread| Load { series, spread, packet, mixed, tagged: false }));
            let wanted: Vec<Load> = loads.filter(|load| arguments.want(&load.name())).collect();
            if !wanted.is_empty() {
                let mut bench = Bench::new(series, mixed);
                let thorough = if series < 1_000_000 { 7 } else { 5 };
                wanted.into_iter().for_each(|load| bench.row(load, arguments.rounds(thorough, 3)));
            }
        }
    }
}

/// All that is measured for some names, of which each has been seen by all.
struct Bench {
    drain: Drain,
    table: Table,
    engine: Engine,
    /// To the drain and to the engine's listener.
    senders: [Sender; 2],
    threads: [Thread; 2],
}

/// Nanoseconds a line.
struct Round {
    receive: f64,
    parse_and_add: f64,
    from_memory: f64,
    from_socket: f64,
}

impl Bench {
    fn new(series: usize, mixed: bool) -> Self {
        let [generator, measured] = clock::cores();
        clock::pin(generator);
        let (drain, engine) = (Drain::start(), Engine::start(Setup { listens: true, ..Setup::default() }));
        let senders = [drain.address(), engine.address()].map(Sender::to);
        let threads = [drain.thread(), engine.listener()];
        threads.iter().for_each(|thread| thread.pin(measured));
        let mut bench = Self { drain, table: Table::default(), engine, senders, threads };
        let packets = Load { mixed, ..Load::counters(series) }.each_once(1);
        bench.over_memory(&packets.part(0, series));
        bench.over_socket(&packets.part(0, series), Sender::flood);
        bench
    }

    fn row(&mut self, load: Load, rounds: usize) {
        let packets = load.packets(LINES.max(load.series));
        let mut from = 0;
        let rounds: Vec<Round> = (0..rounds)
            .map(|_| {
                let part = packets.part(from, LINES);
                from = part.end;
                self.round(&part, load.packet == FULL)
            })
            .collect();
        assert_eq!(self.engine.series(), self.table.len(), "one of them lost a series");
        print(load, &rounds);
    }

    fn round(&mut self, part: &Part<'_>, full: bool) -> Round {
        let (parse_and_add, from_memory) = self.over_memory(part);
        let (receive, from_socket) = if full {
            self.over_socket(part, Sender::flood)
        } else {
            let some = Part { packets: part.packets[..SINGLES].to_vec(), lines: SINGLES, end: 0 };
            self.over_socket(&some, |sender, packets| sender.pace(packets, SINGLES_PER_SECOND))
        };
        Round { receive, parse_and_add, from_memory, from_socket }
    }

    /// The limit and a worker over the same packets; the worker seals at the end.
    fn over_memory(&mut self, part: &Part<'_>) -> (f64, f64) {
        let Self { table, engine, .. } = self;
        let packets = || part.packets.iter().map(|packet| black_box(*packet));
        let (limit, ()) = clock::each(part.lines, || packets().for_each(|packet| splitter::split(packet, table)));
        let (tallyd, _) = clock::each(part.lines, || {
            packets().for_each(|packet| engine.datagram(packet));
            engine.seal()
        });
        engine.fold();
        (limit, tallyd)
    }

    /// A thread that only receives and the listener's, over the same packets; the listener's seals at the end.
    fn over_socket(&mut self, part: &Part<'_>, send: impl Fn(&Sender, &[&[u8]])) -> (f64, f64) {
        let Self { drain, engine, senders, threads, .. } = self;
        let wanted = drain.taken() + part.packets.len() as u64;
        let limit = running(&threads[0], part.lines, || {
            send(&senders[0], &part.packets);
            until("all packets to be received", || (drain.taken() >= wanted).then_some(()));
        });
        let tallyd = running(&threads[1], part.lines, || {
            send(&senders[1], &part.packets);
            engine.fold();
        });
        let lost = senders.each_ref().map(Sender::drops);
        assert_eq!(lost, [0, 0], "the kernel dropped packets; run it alone, or with a larger net.core.rmem_max");
        (limit, tallyd)
    }
}

/// Nanoseconds for each of so many lines that a thread runs meanwhile.
fn running(thread: &Thread, lines: usize, work: impl FnOnce()) -> f64 {
    let before = thread.rested();
    work();
    (thread.rested() - before).as_secs_f64() * 1e9 / lines as f64
}

fn print(load: Load, rounds: &[Round]) {
    let name = load.name();
    let of = |figure: fn(&Round) -> f64| median_of(rounds, figure);
    let (socket, memory) = (of(|round| round.from_socket), of(|round| round.from_memory));
    let both = format!("receive + parse + aggregate, {name}");
    let line = Line::new(&both, socket, "ns/line").beside(
        of(|round| round.receive + round.parse_and_add),
        of(|round| round.from_socket / (round.receive + round.parse_and_add)),
    );
    if load.packet == FULL {
        line.ratio_goal(Goal::AtMost(1.5)).print();
    } else {
        line.print();
        let name = format!("{both}, beside nap + recvmmsg");
        Line::new(&name, socket, "ns/line")
            .beside(of(|round| round.receive), of(|round| round.from_socket / round.receive))
            .ratio_goal(Goal::AtMost(1.2))
            .print();
    }
    Line::new(&format!("parse + aggregate, {name}"), memory, "ns/line")
        .beside(of(|round| round.parse_and_add), of(|round| round.from_memory / round.parse_and_add))
        .print();
}
