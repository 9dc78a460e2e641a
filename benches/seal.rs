//! How long a seal holds a worker up, and what folding what it hands over costs another thread.
//!
//! ```sh
//! cargo bench --bench seal                        # a minute and a half
//! cargo bench --bench seal -- --series 10000      # other numbers of series
//! ```
//!
//! A round gives a worker one line of each series from memory and asks for a seal. *Pause* is all that the worker does
//! instead of reading: it takes back what the fold returned, publishes its counts and hands its cells over; by the wall
//! clock, on which other programs take part, and by that of the processor. *Fold* is the processor time of the fold's
//! thread from there until every cell is in the ledger, for each series. Every series is known to both since a first
//! round, and they have a core each where there are two. Medians of the rounds.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use load::engine::{Engine, Setup};
use load::report::{self, Goal, Line};
use load::{Arguments, Load, clock, median_of};

/// What the worker may be held up at the most, in microseconds.
const PAUSE_MAX: f64 = 50.0;

fn main() {
    let arguments = Arguments::read();
    report::head();
    for mixed in [false, true] {
        for series in arguments.series(&[10_000, 100_000, 1_000_000]) {
            let load = Load { mixed, ..Load::counters(series) };
            let name = format!("{}, {series} series touched", if mixed { "mixed" } else { "counters" });
            if arguments.want(&name) {
                let rounds = if series < 1_000_000 { arguments.rounds(25, 5) } else { arguments.rounds(7, 3) };
                row(&name, load, rounds);
            }
        }
    }
}

struct Round {
    pause_us: f64,
    processor_us: f64,
    fold_ns: f64,
}

fn row(name: &str, load: Load, rounds: usize) {
    let packets = load.each_once(7);
    let [worker, fold] = clock::cores();
    clock::pin(worker);
    let mut engine = Engine::start(Setup::default());
    let folder = engine.folder();
    folder.pin(fold);
    let mut round = || {
        packets.iter().for_each(|packet| engine.datagram(packet));
        let before = folder.rested();
        let (processor_ns, pause) = clock::each(1, || engine.seal());
        engine.fold();
        let fold_ns = (folder.rested() - before).as_secs_f64() * 1e9 / load.series as f64;
        Round { pause_us: pause.as_secs_f64() * 1e6, processor_us: processor_ns / 1e3, fold_ns }
    };
    round();
    let rounds: Vec<Round> = (0..rounds).map(|_| round()).collect();
    assert_eq!(engine.series(), load.series, "a series is missing");
    Line::new(&format!("seal, pause, {name}"), median_of(&rounds, |round| round.pause_us), "us")
        .goal(Goal::AtMost(PAUSE_MAX))
        .print();
    let longest = rounds.iter().map(|round| round.pause_us).fold(0.0, f64::max);
    Line::new(&format!("seal, longest pause, {name}"), longest, "us").print();
    let processor = median_of(&rounds, |round| round.processor_us);
    Line::new(&format!("seal, processor time of the pause, {name}"), processor, "us").print();
    Line::new(&format!("fold, {name}"), median_of(&rounds, |round| round.fold_ns), "ns/series").print();
}
