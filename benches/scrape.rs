//! What a scrape costs: the processor time to name and order the series and to write them all, as a scraper that reads
//! without a pause sees it. The limit is a copy of as many bytes, below which nothing can be; the goal is 50 ms for
//! 100,000 counters. Beside it stands the longest pause between two pieces, by the wall clock. Medians of seven
//! scrapes.
//!
//! ```sh
//! cargo bench --bench scrape                          # a minute and a half
//! cargo bench --bench scrape -- --series 100000 plain # some rows
//! ```

#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    unreachable_pub,
    reason = "a bench is a program for its own terminal, and ends where it can't measure"
)]

mod load;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use load::clock::thread_time;
use load::report::{self, Goal, Line};
use load::{Arguments, median_of};
use tallyd::aggregate::ledger::{Series, State, Total};
use tallyd::aggregate::shard::SeriesId;
use tallyd::aggregate::window::Window;
use tallyd::aggregate::{Aggregate, Counter, Observed};
use tallyd::http::scrape::{Config, Format, Mapped, Mapper, Moment, Page, Wanted};
use tallyd::mapping::Mapping;
use tallyd::sample::{Kind, SeriesKey};

const NOW: Moment = Moment { now_ms: 1_764_000_012_345, steady_ms: 1_764_000_012_345, window_ms: 10_000 };

/// A million summaries would take 2 GB, most of it for values that a scrape does not look at.
const SUMMARIES_MAX: usize = 200_000;

fn main() {
    let arguments = Arguments::read();
    report::head();
    for size in arguments.series(&[10_000, 100_000, 1_000_000]) {
        let bench = Bench { size, arguments: &arguments };
        let plain = || counters(size, |n| format!("service.requests.node{n:07}.count"));
        bench.run("counters, plain", plain, false);
        let tagged = || counters(size, |n| format!("http.requests;code=200;host=web{n:07};zone=eu"));
        bench.run("counters, 3 tags", tagged, false);
        let rewritten = || counters(size, |n| format!("http.requests;host=web{n:07};http.code=200"));
        bench.run("counters, a tag rewritten", rewritten, false);
        bench.run("counters, gzip", plain, true);
        bench.mapped(plain);
        if size <= SUMMARIES_MAX {
            bench.run("summaries, 10 a window", || summaries(size), false);
        }
    }
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
    fn run(&self, what: &str, series: impl Fn() -> Vec<Arc<Series>>, gzip: bool) {
        if let Some(name) = self.name(what) {
            let series = series();
            self.print(&name, || scrape(|| series.clone().into(), gzip));
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
                scrape(|| mapper.apply(series.clone()), false)
            });
        }
        if let Some(name) = self.name("counters, mapped") {
            let (series, kept) = (series(), Mapper::new(Some(Arc::clone(&rules))));
            self.print(&name, || scrape(|| kept.apply(series.clone()), false));
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
    }
}

fn scrape(series: impl FnOnce() -> Mapped, gzip: bool) -> Scraped {
    let start = thread_time();
    let mut page = Page::new(series(), Wanted { format: Format::Text, gzip }, &Config::default(), NOW, None);
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

fn summaries(size: usize) -> Vec<Arc<Series>> {
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
