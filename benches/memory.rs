//! What a series costs in memory, by kind, and what it is charged: an agent with one worker and no store is told of so
//! many series with names of 30 bytes in each of two rounds, and its resident memory is read before and after.
//!
//! ```sh
//! cargo bench --bench memory                                # a million counters, a million timers: two minutes
//! cargo bench --bench memory -- --series 100000             # fewer
//! cargo bench --bench memory -- --all --series 100000 gauge # another kind
//! ```
//!
//! *Resident* is for each series the growth of the process from the first series to the last, when the folds of both
//! rounds are done. *Charged* is `tallyd_series_memory_bytes`, and is to be no less, else `limits.memory` is no bound:
//! its ratio to the resident size stands beside it. *At most* is what the process held at its peak, the cells on their
//! way to the ledger among it. The allocator keeps some of what was freed, so figures differ a little from run to run.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::thread::sleep;
use std::time::Duration;

use load::Arguments;
use load::process::Agent;
use load::report::{self, Goal, Line};
use load::wire::{FIRST, Sender};
use tallyd::clock;

/// A kind as it is sent, how many values a series gets in each round, and what it may cost at the most, in bytes.
struct Row {
    kind: &'static str,
    wire: &'static str,
    values: usize,
    goal: Option<f64>,
}

/// Those with a goal come first.
const ROWS: [Row; 6] = [
    Row { kind: "counter", wire: "c", values: 1, goal: Some(128.0) },
    Row { kind: "timer", wire: "ms", values: 10, goal: Some(256.0) },
    Row { kind: "timer", wire: "ms", values: 1, goal: None },
    Row { kind: "gauge", wire: "g", values: 1, goal: None },
    Row { kind: "meter", wire: "m", values: 1, goal: None },
    Row { kind: "set", wire: "s", values: 1, goal: None },
];

const ROUNDS: usize = 2;

/// The default of `flush.window`.
const WINDOW_MS: u64 = 10_000;

#[derive(Debug, clap::Parser)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
    /// The kinds without a goal as well
    #[arg(long)]
    all: bool,
}

fn main() {
    let Command { arguments, all } = <Command as clap::Parser>::parse();
    report::head();
    for series in arguments.series(&[1_000_000]) {
        for row in ROWS.iter().filter(|row| all || row.goal.is_some()) {
            let name = format!("memory, {}, values {}, {series} series", row.kind, row.values);
            if arguments.want(&name) {
                measure(&name, row, series);
            }
        }
    }
}

fn measure(name: &str, row: &Row, series: usize) {
    let agent = Agent::start(None, &["store.kind=memory"]);
    let sender = Sender::to(agent.udp);
    sender.round(row.wire, 1, row.values, 0);
    agent.settle(FIRST);
    let before = agent.memory("VmRSS");
    for round in 1..=ROUNDS {
        await_window();
        sender.round(row.wire, series, row.values, round);
        agent.settle(FIRST);
    }
    let each = |bytes: f64| bytes / series as f64;
    let (resident, most) = (each(agent.memory("VmRSS") - before), each(agent.memory("VmHWM") - before));
    let scrape = agent.scrape();
    assert_eq!(scrape.sum("tallyd_lines_accepted_total", "udp") as usize, row.values * (1 + ROUNDS * series));
    let charged = each(scrape.sum("tallyd_series_memory_bytes", ""));
    let line = Line::new(name, resident, "bytes");
    match row.goal {
        Some(most) => line.goal(Goal::AtMost(most)).print(),
        None => line.print(),
    }
    Line::new(&format!("{name}, charged"), charged, "bytes")
        .beside(resident, charged / resident)
        .ratio_goal(Goal::AtLeast(1.0))
        .print();
    Line::new(&format!("{name}, at most"), most, "bytes").print();
}

/// Waits until the next window of statistics begins, so that rounds lie in different ones.
fn await_window() {
    let into_window_ms = clock::wall_ms() % WINDOW_MS;
    sleep(Duration::from_millis(WINDOW_MS - into_window_ms));
}
