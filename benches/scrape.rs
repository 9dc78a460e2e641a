//! What a scrape costs: time per series to name and order the series and to write them all, as a scraper that reads
//! without a pause sees it, and the longest pause between two pieces. The goal is 50 ms for 100,000 series; beside it
//! stands a copy of as many bytes, below which nothing can be. Times are those of the
//! processor but for the pause, so that what else runs on the machine counts less; they advance by 4 ms.
//!
//! `cargo bench --bench scrape [-- SERIES...]`

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and ends where it can't measure")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tallyd::aggregate::ledger::{Series, State, Total};
use tallyd::aggregate::shard::SeriesId;
use tallyd::aggregate::window::Window;
use tallyd::aggregate::{Aggregate, Counter, Observed};
use tallyd::http::scrape::{Config, Format, Mapped, Mapper, Moment, Page, Wanted};
use tallyd::mapping::Mapping;
use tallyd::sample::{Kind, SeriesKey};

const NOW: Moment = Moment { now_ms: 1_764_000_012_345, steady_ms: 1_764_000_012_345, window_ms: 10_000 };
const RUNS: usize = 7;

fn main() {
    let sizes: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![10_000, 100_000, 1_000_000] } else { sizes };
    println!(
        "{:<24}{:>10}{:>9}{:>9}{:>9}{:>9}{:>11}{:>9}{:>9}",
        "what", "series", "order", "write", "ms", "ns each", "bytes", "copy ms", "pause ms"
    );
    for size in sizes {
        run("counters, plain", &counters(size, |n| format!("service.requests.node{n:07}.count")), false);
        run("counters, 3 tags", &counters(size, |n| format!("http.requests;code=200;host=web{n:07};zone=eu")), false);
        run(
            "counters, tag rewritten",
            &counters(size, |n| format!("http.requests;host=web{n:07};http.code=200")),
            false,
        );
        run("counters, gzip", &counters(size, |n| format!("service.requests.node{n:07}.count")), true);
        mapped(&counters(size, |n| format!("service.requests.node{n:07}.count")));
        // A million of these would take 2 GB, most of it for values that a scrape does not look at.
        if size <= 200_000 {
            run("summaries, 10 a window", &summaries(size), false);
        }
    }
}

/// The same counters through a thousand mapping rules: when they are new to them, and when the answers are kept.
fn mapped(series: &[Arc<Series>]) {
    let others = (0..1_000).map(|rule| format!("- {{match: service.other{rule}.*.count, name: other{rule}}}\n"));
    let rule = "- {match: service.requests.*.count, name: requests, labels: {node: $1}}\n";
    let text = format!("mappings:\n{}{rule}", others.collect::<String>());
    let rules = Arc::new(Mapping::parse(&text).expect("rules"));
    let kept = Mapper::new(Some(Arc::clone(&rules)));
    print("counters, mapped first", series.len(), || {
        let mapper = Mapper::new(Some(Arc::clone(&rules)));
        scrape(|| mapper.apply(series.to_vec()), false)
    });
    print("counters, mapped", series.len(), || scrape(|| kept.apply(series.to_vec()), false));
}

/// Prints the medians of some scrapes.
fn run(what: &str, series: &[Arc<Series>], gzip: bool) {
    print(what, series.len(), || scrape(|| series.to_vec().into(), gzip));
}

fn print(what: &str, series: usize, scrape: impl Fn() -> (Duration, Duration, Duration, usize)) {
    let mut runs: Vec<(Duration, Duration, Duration, usize)> = (0..RUNS).map(|_| scrape()).collect();
    runs.sort_unstable_by_key(|(order, write, ..)| *order + *write);
    let (order, write, pause, bytes) = runs[RUNS / 2];
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let total = order + write;
    println!(
        "{what:<24}{:>10}{:>9.1}{:>9.1}{:>9.1}{:>9.0}{bytes:>11}{:>9.1}{:>9.2}",
        series,
        ms(order),
        ms(write),
        ms(total),
        total.as_secs_f64() * 1e9 / series as f64,
        ms(copy(bytes)),
        ms(pause),
    );
}

/// Time to name and order, to write, the longest to a piece, and the bytes.
fn scrape(series: impl FnOnce() -> Mapped, gzip: bool) -> (Duration, Duration, Duration, usize) {
    let start = processor_time();
    let mut page = Page::new(series(), Wanted { format: Format::Text, gzip }, &Config::default(), NOW, None);
    let order = processor_time() - start;
    let (mut bytes, mut pause, mut last) = (0, Duration::ZERO, Instant::now());
    while let Some(chunk) = page.next_chunk() {
        bytes += black_box(chunk).len();
        pause = pause.max(last.elapsed());
        last = Instant::now();
    }
    (order, processor_time() - start - order, pause, bytes)
}

/// Time to copy so many bytes, 64 KiB at a time.
fn copy(bytes: usize) -> Duration {
    let from = vec![b'x'; bytes];
    let start = processor_time();
    for piece in from.chunks(64 << 10) {
        black_box(black_box(piece).to_vec());
    }
    processor_time() - start
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

/// How long this thread has run.
fn processor_time() -> Duration {
    let text =
        std::fs::read_to_string("/proc/thread-self/schedstat").expect("a Linux kernel with scheduler statistics");
    let ran = text.split(' ').next().and_then(|field| field.parse().ok());
    Duration::from_nanos(ran.expect("nanoseconds in the first field"))
}
