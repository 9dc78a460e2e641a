//! What a scrape costs.
//!
//! - *Time*: the processor time to name and order the series and to write them all, as a scraper that reads without a
//!   pause sees it. The limit is a copy of as many bytes, below which nothing can be; the goal is 50 ms for 100,000
//!   counters. Beside it stand the longest pause between two pieces, by the wall clock, and the bytes. *To look each up*
//!   is what would stay of the naming, were names kept: each series found by its address in a map. Medians of seven
//!   scrapes.
//! - *Memory*: what the real executable holds at its peak during its first scrape, more than before it. The limit is the
//!   text itself: a ratio below 1 says that it is never there as a whole.
//! - *Ingest*: 100,000 lines a second for ten seconds to an agent on a core of its own, while nobody scrapes it and while
//!   one scrape follows another without a pause: its processor time for a million lines, what a scrape adds to it, and
//!   lines that were lost. By full packets, 60 % counters, 25 % timers, 10 % gauges and 5 % sets.
//!
//! ```sh
//! cargo bench --bench scrape                          # five minutes
//! cargo bench --bench scrape -- --series 100000 plain # some rows
//! ```

#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    unreachable_pub,
    reason = "a bench is a program for its own terminal, and ends where it can't measure"
)]

mod load;

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use load::clock::{self, thread_time};
use load::process::{Agent, generate};
use load::report::{self, Goal, Line};
use load::wire::{FIRST, Sender};
use load::{Arguments, FULL, median_of};
use tallyd::aggregate::ledger::{Series, State, Total};
use tallyd::aggregate::shard::SeriesId;
use tallyd::aggregate::window::Window;
use tallyd::aggregate::{Aggregate, Counter, Observed};
use tallyd::http::scrape::{Config, Format, Mapped, Mapper, Moment, ObserverType, Page, Wanted};
use tallyd::mapping::Mapping;
use tallyd::sample::{Kind, SeriesKey};

const NOW: Moment = Moment { now_ms: 1_764_000_012_345, steady_ms: 1_764_000_012_345, window_ms: 10_000 };

/// Lines a second while an agent is scraped.
const PACE: u64 = 100_000;

/// After a load, until the last of it is folded and flushed: seals and flushes are a second apart.
const FLUSHED: Duration = Duration::from_millis(1_500);

fn main() {
    let arguments = Arguments::read();
    report::head();
    for size in arguments.series(&[10_000, 100_000, 1_000_000]) {
        let bench = Bench { size, arguments: &arguments };
        let plain = || counters(size, |n| format!("service.requests.node{n:07}.count"));
        bench.run("counters, plain", plain, false, &summaries_shown());
        let tagged = || counters(size, |n| format!("http.requests;code=200;host=web{n:07};zone=eu"));
        bench.run("counters, 3 tags", tagged, false, &summaries_shown());
        let rewritten = || counters(size, |n| format!("http.requests;host=web{n:07};http.code=200"));
        bench.run("counters, a tag rewritten", rewritten, false, &summaries_shown());
        bench.run("counters, gzip", plain, true, &summaries_shown());
        bench.look_up(plain);
        bench.mapped(plain);
        bench.run("summaries, 10 a window", || timers(size), false, &summaries_shown());
        bench.run("histograms, 10 a window", || timers(size), false, &histograms_shown());
        bench.memory("counters", "c", 1, "summary");
        bench.memory("summaries, 10 a window", "ms", 10, "summary");
        bench.memory("histograms, 10 a window", "ms", 10, "histogram");
        bench.ingest();
    }
}

fn summaries_shown() -> Config {
    Config::default()
}

fn histograms_shown() -> Config {
    Config { observer_type: ObserverType::Histogram, ..Config::default() }
}

/// So many series, and which rows about them are asked for.
struct Bench<'a> {
    size: usize,
    arguments: &'a Arguments,
}

/// What one scrape took.
struct Scraped {
    order: Duration,
    write: Duration,
    /// The longest to a piece.
    pause: Duration,
    bytes: usize,
}

impl Bench<'_> {
    fn run(&self, what: &str, series: impl Fn() -> Vec<Arc<Series>>, gzip: bool, config: &Config) {
        if let Some(name) = self.name(what) {
            let series = series();
            self.print(&name, || scrape(|| series.clone().into(), gzip, config));
        }
    }

    /// What names would cost that were kept from scrape to scrape, as the answers of mapping rules are: the least of it.
    fn look_up(&self, series: impl Fn() -> Vec<Arc<Series>>) {
        let Some(name) = self.name("counters, to look each up") else { return };
        let series = series();
        let place = |one: &Arc<Series>| Arc::as_ptr(one) as usize;
        let entries = (0_u64..).zip(&series).map(|(at, one)| (place(one), (Arc::downgrade(one), at)));
        let kept: HashMap<usize, (Weak<Series>, u64), RandomState> = entries.collect();
        let runs: Vec<Duration> = (0..self.arguments.rounds(7, 3))
            .map(|_| {
                let start = thread_time();
                black_box(series.iter().filter_map(|one| kept.get(&place(one))).map(|(_, at)| at).sum::<u64>());
                thread_time() - start
            })
            .collect();
        Line::new(&name, median_of(&runs, |run| run.as_secs_f64() * 1e3), "ms").print();
    }

    /// What an agent holds at its peak during its first scrape, more than before.
    fn memory(&self, what: &str, wire: &str, values: usize, shown: &str) {
        let Some(name) = self.name(&format!("memory, {what}")) else { return };
        let agent = Agent::start(None, &["store.kind=memory", &format!("prometheus.observer_type={shown}")]);
        Sender::to(agent.udp).round(wire, self.size, values, 1);
        agent.settle(FIRST);
        sleep(2 * FLUSHED);
        let mb = |bytes: f64| bytes / 1e6;
        let before = agent.memory("VmRSS");
        agent.forget_peak();
        let (bytes, took) = agent.read_page();
        let more = agent.memory("VmHWM") - before;
        Line::new(&name, mb(more), "MB").beside(mb(bytes as f64), more / bytes as f64).print();
        Line::new(&format!("{name}: by HTTP"), took.as_secs_f64() * 1e3, "ms").print();
    }

    /// What a load costs an agent, with scrapes and without.
    fn ingest(&self) {
        let Some(name) = self.name("ingest") else { return };
        let loaded = Loaded::start(self.size);
        let seconds = self.arguments.rounds(10, 3);
        let mut idle = 0.0;
        for (state, scrapes) in [("nobody scrapes", false), ("scraped without a pause", true)] {
            let run = loaded.run(seconds, scrapes);
            let name = format!("{name}, {state}");
            let cpu = run.cpu_seconds * 1e6 / run.lines as f64;
            Line::new(&name, cpu, "s/M lines").print();
            Line::new(&format!("{name}, lost"), run.lost, "lines").goal(Goal::AtMost(0.0)).print();
            Line::new(&format!("{name}, dropped by the kernel"), run.dropped, "packets")
                .goal(Goal::AtMost(0.0))
                .print();
            if scrapes {
                let each = (run.cpu_seconds - idle) * 1e3 / run.scrapes.len() as f64;
                Line::new(&format!("{name}: of {} scrapes each", run.scrapes.len()), each, "ms").print();
                let took = median_of(&run.scrapes, |took| took.as_secs_f64() * 1e3);
                Line::new(&format!("{name}: by HTTP"), took, "ms").print();
            }
            idle = run.cpu_seconds;
        }
    }

    /// The series through a thousand mapping rules: when they are new to them, and when the answers are kept.
    fn mapped(&self, series: impl Fn() -> Vec<Arc<Series>>) {
        let others = (0..1_000).map(|rule| format!("- {{match: service.other{rule}.*.count, name: other{rule}}}\n"));
        let rule = "- {match: service.requests.*.count, name: requests, labels: {node: $1}}\n";
        let text = format!("mappings:\n{}{rule}", others.collect::<String>());
        let rules = Arc::new(Mapping::parse(&text).expect("rules"));
        if let Some(name) = self.name("counters, mapped for the first time") {
            let series = series();
            self.print(&name, || {
                let mapper = Mapper::new(Some(Arc::clone(&rules)));
                scrape(|| mapper.apply(series.clone()), false, &summaries_shown())
            });
        }
        if let Some(name) = self.name("counters, mapped") {
            let (series, kept) = (series(), Mapper::new(Some(Arc::clone(&rules))));
            self.print(&name, || scrape(|| kept.apply(series.clone()), false, &summaries_shown()));
        }
    }

    /// The name of a row that is asked for.
    fn name(&self, what: &str) -> Option<String> {
        Some(format!("scrape, {what}, {} series", self.size)).filter(|name| self.arguments.want(name))
    }

    fn print(&self, name: &str, scrape: impl Fn() -> Scraped) {
        let runs: Vec<(Scraped, Duration)> = (0..self.arguments.rounds(7, 3))
            .map(|_| {
                let scraped = scrape();
                let copied = copy(scraped.bytes);
                (scraped, copied)
            })
            .collect();
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let all = |scraped: &Scraped| ms(scraped.order + scraped.write);
        let line = Line::new(name, median_of(&runs, |(scraped, _)| all(scraped)), "ms").beside(
            median_of(&runs, |(_, copied)| ms(*copied)),
            median_of(&runs, |(scraped, copied)| all(scraped) / ms(*copied)),
        );
        let has_goal = self.size == 100_000 && name.contains("counters, plain");
        if has_goal {
            line.goal(Goal::AtMost(50.0)).print()
        } else {
            line.print()
        }
        let order = median_of(&runs, |(scraped, _)| ms(scraped.order));
        Line::new(&format!("{name}: to name and order"), order, "ms").print();
        let pause = median_of(&runs, |(scraped, _)| ms(scraped.pause));
        Line::new(&format!("{name}: longest pause"), pause, "ms").print();
        Line::new(&format!("{name}: bytes"), median_of(&runs, |(scraped, _)| scraped.bytes as f64 / 1e6), "MB").print();
    }
}

/// An agent on a core of its own that has seen every series.
struct Loaded {
    agent: Agent,
    series: String,
}

/// What became of a load.
struct Run {
    lines: u64,
    lost: f64,
    dropped: f64,
    cpu_seconds: f64,
    /// How long each scrape took.
    scrapes: Vec<Duration>,
}

impl Loaded {
    fn start(series: usize) -> Self {
        let [_, measured] = clock::cores();
        let loaded = Self { agent: Agent::start(Some(measured), &["store.kind=memory"]), series: series.to_string() };
        loaded.send(&["--time", "60s", "--lines", &(2 * series).max(10_000).to_string()]);
        loaded
    }

    fn run(&self, seconds: usize, scrapes: bool) -> Run {
        let (accepted, dropped) = self.counts();
        let cpu_seconds = self.agent.cpu_seconds();
        let ends = AtomicBool::new(!scrapes);
        let (lines, scrapes) = scope(|scope| {
            let scraper = scope.spawn(|| {
                let [generator, _] = clock::cores();
                clock::pin(generator);
                let goes_on = || (!ends.load(Ordering::Relaxed)).then(|| self.agent.read_page().1);
                std::iter::from_fn(goes_on).collect()
            });
            let lines = self.send(&["--time", &format!("{seconds}s")]);
            ends.store(true, Ordering::Relaxed);
            (lines, scraper.join().expect("scrapes"))
        });
        let cpu_seconds = self.agent.cpu_seconds() - cpu_seconds;
        let (accepted_by_now, dropped_by_now) = self.counts();
        let lost = lines as f64 - (accepted_by_now - accepted);
        Run { lines, lost, dropped: dropped_by_now - dropped, cpu_seconds, scrapes }
    }

    fn send(&self, words: &[&str]) -> u64 {
        let [generator, _] = clock::cores();
        let (rate, packet) = (PACE.to_string(), FULL.to_string());
        let mix = "c=60,ms=25,g=10,s=5";
        let load = ["--senders", "1", "--series", &self.series, "--mix", mix, "--rate", &rate, "--packet", &packet];
        let sent = generate(generator, self.agent.udp, &[&load[..], words].concat());
        sleep(FLUSHED);
        sent.lines
    }

    /// Lines that were accepted, and packets that the kernel dropped.
    fn counts(&self) -> (f64, f64) {
        let page = self.agent.scrape();
        (page.sum("tallyd_lines_accepted_total", "udp"), page.sum("tallyd_kernel_drops_total", ""))
    }
}

fn scrape(series: impl FnOnce() -> Mapped, gzip: bool, config: &Config) -> Scraped {
    let start = thread_time();
    let mut page = Page::new(series(), Wanted { format: Format::Text, gzip }, config, NOW, None);
    let order = thread_time() - start;
    let (mut bytes, mut pause, mut last) = (0, Duration::ZERO, Instant::now());
    while let Some(chunk) = page.next_chunk() {
        bytes += black_box(chunk).len();
        pause = pause.max(last.elapsed());
        last = Instant::now();
    }
    Scraped { order, write: thread_time() - start - order, pause, bytes }
}

/// Time to copy so many bytes, 64 KiB at a time.
fn copy(bytes: usize) -> Duration {
    let from = vec![b'x'; bytes];
    let start = thread_time();
    for piece in from.chunks(64 << 10) {
        black_box(black_box(piece).to_vec());
    }
    thread_time() - start
}

fn counters(size: usize, key: impl Fn(usize) -> String) -> Vec<Arc<Series>> {
    let counter = |n: usize| {
        let mut counter = Counter { samples: 1, ..Counter::default() };
        counter.increments.add(n as f64);
        State::new(Total { aggregate: Aggregate::Counter(counter), ..Total::new(Kind::Counter, 1_000) })
    };
    shuffled(size).map(|n| series(Kind::Counter, &key(n), counter(n))).collect()
}

fn timers(size: usize) -> Vec<Arc<Series>> {
    let window = |n: usize, start_ms| {
        let mut observed = Box::<Observed>::default();
        for sample in 0..10_u32 {
            observed.observe(f64::from(sample) * 7.3 + (n % 97) as f64 * 0.11, 1.0, start_ms);
        }
        Arc::new(Window { start_ms, aggregate: Aggregate::Observed(observed) })
    };
    let state = |n: usize| {
        let (before, window) = (window(n, 1_764_000_000_000), window(n + 1, 1_764_000_010_000));
        let mut total = Total::new(Kind::Timer, 1_000);
        total.add(&before.aggregate, 1_764_000_000_000);
        total.add(&window.aggregate, 1_764_000_010_000);
        State { before: Some(before), window: Some(window), ..State::new(total) }
    };
    shuffled(size).map(|n| series(Kind::Timer, &format!("service.latency.node{n:07}.ms"), state(n))).collect()
}

/// The numbers below `size` in an order without order, as a map gives them.
fn shuffled(size: usize) -> impl Iterator<Item = usize> {
    // A full cycle: the step is a prime, and no size used here is a multiple of it.
    (0..size).map(move |n| n * 7_368_787 % size)
}

fn series(kind: Kind, key: &str, state: State) -> Arc<Series> {
    let id = SeriesId { kind, key: SeriesKey::from_canonical(key) };
    Arc::new(Series::new(Arc::new(id), state, NOW.window_ms, NOW.now_ms))
}
