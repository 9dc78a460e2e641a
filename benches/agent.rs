//! What all of an agent costs at a paced load, and what one worker takes at most: the real executable with one worker
//! and otherwise its defaults, loaded by `tallyd bench` over loopback.
//!
//! ```sh
//! cargo bench --bench agent                      # all rows, five minutes
//! cargo bench --bench agent -- --quick paced 1000 # a look at some of them
//! ```
//!
//! Both are kept on a core of their own by `taskset`, the generator on the first and all threads of the agent on the
//! second; on a machine with one core they share it, and only the processor times mean something. Lines are 60 %
//! counters, 25 % timers, 10 % gauges and 5 % sets, by series; each series comes equally often. The agent has seen
//! every series before a figure is taken, and nobody scrapes it meanwhile: its counts are read once, at the end.
//!
//! - *paced*: user and system time of the agent from the first line of ten seconds until a second and a half after the
//!   last, when it is folded and flushed, for a million lines. A lost line shows in a row of its own.
//! - *saturated*: lines a second that are read while more come, for some seconds. Where the kernel has dropped nothing
//!   and the agent still had time to rest, the generator was too slow, and the row says so.
//! - *lossless*: the highest rate of one-line packets of which none is lost in ten seconds. Short runs find the rate
//!   that is tried; it is lowered by a twentieth until one run of full length loses nothing. 0: none of eight did, as
//!   where other programs take the cores, or the generator does not keep the pace.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::thread::sleep;
use std::time::Duration;

use load::process::{Agent, Sent, generate};
use load::report::{self, Goal, Line};
use load::{Arguments, FULL, clock};

const MIX: &str = "c=60,ms=25,g=10,s=5";

/// After a load, until the last of it is folded and flushed: seals and flushes are a second apart.
const FLUSHED: Duration = Duration::from_millis(1_500);

/// The two forms of packets.
#[derive(Clone, Copy)]
struct Form {
    name: &'static str,
    bytes: usize,
    /// Lines a second of a paced load.
    paced: u64,
    /// By numbers of series: CPU seconds for a million lines at most, and saturated lines a second at least, in
    /// millions.
    goals: [(usize, f64, f64); 2],
}

const FORMS: [Form; 2] = [
    Form { name: "full packets", bytes: FULL, paced: 100_000, goals: [(1_000, 0.20, 10.0), (100_000, 0.35, 8.0)] },
    Form { name: "one-line packets", bytes: 1, paced: 30_000, goals: [(1_000, 1.5, 1.1), (100_000, 1.7, 1.0)] },
];

impl Form {
    /// The goals of a number of series.
    fn goals(&self, series: usize) -> Option<(f64, f64)> {
        self.goals.iter().find(|(of, ..)| *of == series).map(|(_, cpu, saturated)| (*cpu, *saturated))
    }
}

/// Lines a second in one-line packets of which none may be lost, in millions, with 100,000 series.
const LOSSLESS: f64 = 0.8;

fn main() {
    let arguments = Arguments::read();
    let seconds = arguments.rounds(10, 3);
    report::head();
    for form in FORMS {
        for series in arguments.series(&[1_000, 100_000]) {
            for store in ["memory", "embedded"] {
                let name = format!("paced, {}, {}/s, {series} series, {store}", form.name, form.paced);
                if arguments.want(&name) {
                    paced(&name, form, series, store, seconds);
                }
            }
            let name = format!("saturated, {}, {series} series, embedded", form.name);
            if arguments.want(&name) {
                saturated(&name, form, series, arguments.rounds(4, 2));
            }
        }
    }
    for series in arguments.series(&[100_000]) {
        let name = format!("lossless, one-line packets, {series} series, embedded");
        if arguments.want(&name) {
            lossless(&name, series, seconds);
        }
    }
}

/// An agent on its core that has seen every series, and what it was sent.
struct Loaded {
    agent: Agent,
    series: usize,
    bytes: usize,
    sent: u64,
}

/// What became of a load.
struct Run {
    sent: Sent,
    cpu_seconds: f64,
}

impl Loaded {
    fn start(series: usize, bytes: usize, store: &str) -> Self {
        let [_, measured] = clock::cores();
        let agent = Agent::start(Some(measured), &[&format!("store.kind={store}")]);
        let mut loaded = Self { agent, series, bytes, sent: 0 };
        // Full packets, so that it takes no time, at a rate that nothing is lost at.
        let lines = (2 * series).max(10_000).to_string();
        loaded.send(&["--rate", "100000", "--time", "60s", "--lines", &lines, "--packet", "1432"]);
        loaded
    }

    /// Sends a load and waits until it is flushed.
    fn run(&mut self, rate: u64, segments: usize, seconds: usize) -> Run {
        let before = self.agent.cpu_seconds();
        let (rate, time) = (rate.to_string(), format!("{seconds}s"));
        let (packet, segments) = (self.bytes.to_string(), segments.to_string());
        let sent = self.send(&["--rate", &rate, "--time", &time, "--packet", &packet, "--segments", &segments]);
        Run { sent, cpu_seconds: self.agent.cpu_seconds() - before }
    }

    fn send(&mut self, words: &[&str]) -> Sent {
        let [generator, _] = clock::cores();
        let series = self.series.to_string();
        let load = ["--senders", "1", "--series", &series, "--mix", MIX];
        let sent = generate(generator, self.agent.udp, &[&load[..], words].concat());
        sleep(FLUSHED);
        self.sent += sent.lines;
        sent
    }

    /// Lines that were sent and not accepted.
    fn lost(&self) -> f64 {
        self.sent as f64 - self.agent.scrape().sum("tallyd_lines_accepted_total", "udp")
    }
}

fn paced(name: &str, form: Form, series: usize, store: &str, seconds: usize) {
    let mut loaded = Loaded::start(series, form.bytes, store);
    let run = loaded.run(form.paced, 1, seconds);
    let line = Line::new(name, run.cpu_seconds * 1e6 / run.sent.lines as f64, "s/M lines");
    match form.goals(series) {
        Some((most, _)) => line.goal(Goal::AtMost(most)).print(),
        None => line.print(),
    }
    Line::new(&format!("{name}, lost"), loaded.lost(), "lines").goal(Goal::AtMost(0.0)).print();
}

fn saturated(name: &str, form: Form, series: usize, seconds: usize) {
    let mut loaded = Loaded::start(series, form.bytes, "embedded");
    let before = loaded.sent as f64;
    // By many packets a call: a call for each would be slower than a worker.
    let run = loaded.run(0, if form.bytes == 1 { 64 } else { 32 }, seconds);
    let scrape = loaded.agent.scrape();
    let accepted = scrape.sum("tallyd_lines_accepted_total", "udp") - before;
    let rests = scrape.sum("tallyd_kernel_drops_total", "") == 0.0 && run.cpu_seconds < 0.9 * run.sent.seconds;
    let name = if rests { format!("{name} (the generator is slower)") } else { name.to_owned() };
    let line = Line::new(&name, accepted / run.sent.seconds / 1e6, "M lines/s");
    match form.goals(series) {
        Some((_, least)) => line.goal(Goal::AtLeast(least)).print(),
        None => line.print(),
    }
}

fn lossless(name: &str, series: usize, seconds: usize) {
    let mut loaded = Loaded::start(series, 1, "embedded");
    let mut rate = 400_000;
    // By short runs down to a rate that is lossless and up to one that is not, then down until all of a long run is.
    while rate > 10_000 && is_lossless(&mut loaded, rate, 2).is_none() {
        rate /= 2;
    }
    while rate < 4_000_000 && is_lossless(&mut loaded, rate * 5 / 4, 2).is_some() {
        rate = rate * 5 / 4;
    }
    let reached = (0..8).find_map(|step| is_lossless(&mut loaded, rate * (20 - step) / 20, seconds));
    let reached = reached.unwrap_or(0.0) / 1e6;
    let line = Line::new(name, reached, "M lines/s");
    if series == 100_000 { line.goal(Goal::AtLeast(LOSSLESS)).print() } else { line.print() }
}

/// The rate that was reached, if it was the one asked for and nothing was lost.
fn is_lossless(loaded: &mut Loaded, rate: u64, seconds: usize) -> Option<f64> {
    let before = loaded.lost();
    let run = loaded.run(rate, 16, seconds);
    let kept_pace = run.sent.lines_per_second >= 0.98 * rate as f64;
    (kept_pace && loaded.lost() <= before).then_some(run.sent.lines_per_second)
}
