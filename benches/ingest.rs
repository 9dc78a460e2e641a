//! What a line costs from the datagram to its cell, beside a hand-written limit over the same packets in the same run.
//!
//! ```sh
//! cargo bench --bench ingest            # a minute
//! cargo bench --bench ingest -- --quick # a few seconds, for a look
//! ```
//!
//! The limit does the least that any agent must: [`load::splitter`] to read a line, one look-up in a private hash table,
//! and the smallest figure that each kind can keep: a sum, a last value, four figures of a timer without its
//! distribution, the hashes of a set's members. It checks nothing, bounds nothing, counts no lines and is never emptied.
//!
//! Sockets are left out of both, and so is the clock that a worker reads once a burst. A round goes over the packets
//! several times, first with the limit, then with a worker, who is asked for a seal at its end, as by a flush each second;
//! the cells are drained behind the clock's back, as another thread does it in an agent. Times are those of the processor,
//! so that what else runs on the machine counts less; a ratio is the median of the rounds' ratios.
//!
//! `cargo bench --bench ingest`, 2026-11, 2 cores of an AMD EPYC (Zen 3), rustc 1.95, beside other work:
//!
//! ```text
//! packets   lines      tags   series  limit ns      M/s  tallyd ns      M/s  ratio  seal us
//! 1,432 B   counters      0     1000      43.5    23.01       57.4    17.41   1.34      7.6
//! 1,432 B   counters      0   100000     335.5     2.98      354.4     2.82   1.08      8.5
//! 1,432 B   mixed         0     1000      60.0    16.68      121.5     8.23   1.93      7.4
//! 1,432 B   mixed         0   100000     382.8     2.61      621.3     1.61   1.67      7.6
//! 1,432 B   mixed         4     1000     131.5     7.60      198.2     5.05   1.58      8.2
//! 1,432 B   mixed         4   100000     493.2     2.03      672.2     1.49   1.38      8.3
//! one line  counters      0     1000      86.8    11.52      110.7     9.03   1.28      9.1
//! one line  counters      0   100000     317.1     3.15      317.7     3.15   1.10      7.4
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::hash::{BuildHasher, Hash, Hasher};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::FixedState;
use hashbrown::{Equivalent, HashMap, HashSet};
use load::{FULL, Load, median, splitter};
use tallyd::aggregate::shard::{self, Budget};
use tallyd::ingest::{self, Delivery, Listener, Rejects, Returned, Settings, Source, Times, Worker, Workers};
use tallyd::protocol::{self, Event, Reject, ServiceCheck, Sink};
use tallyd::sample::{Identity, Kind, Sample, Value};

/// Lines of a load; its packets are 8 to 20 MB, so they come from the cache that cores share, if not from nearer.
const LINES: usize = 200_000;

/// The limit's table.
#[derive(Default)]
struct Table(HashMap<Key, Kept, FixedState>);

#[derive(PartialEq, Eq)]
struct Key {
    kind: Kind,
    name: Box<[u8]>,
    tags: Box<[u8]>,
}

/// A [`Key`] as it stands in a packet.
struct Spelled<'a> {
    kind: Kind,
    name: &'a [u8],
    tags: &'a [u8],
}

impl Hash for Spelled<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(self.kind as u8);
        state.write(self.name);
        state.write(self.tags);
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Spelled { kind: self.kind, name: &self.name, tags: &self.tags }.hash(state);
    }
}

impl Equivalent<Key> for Spelled<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.kind == key.kind && *self.name == *key.name && *self.tags == *key.tags
    }
}

enum Kept {
    Sum(f64),
    Last(f64),
    Observed { count: f64, sum: f64, min: f64, max: f64 },
    Members(HashSet<u64, FixedState>),
}

impl Kept {
    fn new(kind: Kind) -> Self {
        match kind {
            Kind::Counter | Kind::Meter => Self::Sum(0.0),
            Kind::Gauge => Self::Last(0.0),
            Kind::Timer | Kind::Histogram | Kind::Distribution => {
                Self::Observed { count: 0.0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY }
            }
            Kind::Set => Self::Members(HashSet::default()),
        }
    }

    fn add(&mut self, value: &Value<'_>, rate: f64) {
        match (self, *value) {
            (Self::Sum(sum), Value::Numbers([number])) => *sum += number / rate,
            (Self::Last(last), Value::Numbers([number])) => *last = *number,
            (Self::Observed { count, sum, min, max }, Value::Numbers([number])) => {
                *count += 1.0 / rate;
                *sum += number;
                *min = min.min(*number);
                *max = max.max(*number);
            }
            (Self::Members(members), Value::Member(member)) => {
                members.insert(hash(member));
            }
            (Self::Sum(_) | Self::Last(_) | Self::Observed { .. } | Self::Members(_), _) => {
                unreachable!("the load has no such line")
            }
        }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = FixedState::default().build_hasher();
    hasher.write(bytes);
    hasher.finish()
}

impl Sink for Table {
    #[inline]
    fn sample(&mut self, sample: &Sample<'_>) {
        let Identity::Line { name, tags } = sample.identity else { return };
        let spelled = Spelled { kind: sample.wire.kind(), name, tags };
        match self.0.get_mut(&spelled) {
            Some(kept) => kept.add(&sample.value, sample.rate),
            None => {
                let mut kept = Kept::new(spelled.kind);
                kept.add(&sample.value, sample.rate);
                self.0.insert(Key { kind: spelled.kind, name: name.into(), tags: tags.into() }, kept);
            }
        }
    }
    fn event(&mut self, _: &Event<'_>) {}
    fn service_check(&mut self, _: &ServiceCheck<'_>) {}
    fn reject(&mut self, _: &Reject<'_>) {}
    fn bad_tags(&mut self, _: u32) {}
    fn line_end(&mut self) {}
}

/// A worker and what would stand behind it in an agent.
struct Agent {
    workers: Arc<Workers>,
    deliveries: crossbeam_channel::Receiver<Delivery>,
    worker: Worker,
}

impl Agent {
    fn new() -> Self {
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let memory = tallyd::units::Size(16 << 30);
        let limits = shard::Limits { series: 10_000_000, memory, new_series: u32::MAX, ..shard::Limits::default() };
        let budget = Arc::new(Budget::new(&limits));
        let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
        let (workers, deliveries) =
            Workers::new(settings, budget, rejects, Times { interval_ms: 1_000, window_ms: 10_000 });
        let worker = workers.register(|| {});
        Self { workers, deliveries, worker }
    }

    fn datagram(&mut self, packet: &[u8]) {
        self.worker.datagram(packet, Source { listener: Listener::Udp, address: None });
    }

    /// How long the worker is held up by a seal.
    fn seal(&mut self) -> Duration {
        self.workers.ask();
        let question = self.worker.question();
        let begun = Instant::now();
        self.worker.turn(question);
        begun.elapsed()
    }

    /// The fold's part: takes out what came and gives the cells back. The answer is how many cells held something.
    fn drain(&mut self) -> usize {
        let mut cells = 0;
        for mut delivery in self.deliveries.try_iter() {
            cells += black_box(delivery.sealed.cells.take().into_iter().count());
            self.workers.give_back(delivery.worker, Returned::Cells(delivery.sealed.cells));
        }
        cells
    }
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let (passes, rounds) = if quick { (2, 3) } else { (10, 9) };
    println!(
        "{:<10}{:<10}{:>5}{:>9}{:>10}{:>9}{:>11}{:>9}{:>7}{:>9}",
        "packets", "lines", "tags", "series", "limit ns", "M/s", "tallyd ns", "M/s", "ratio", "seal us"
    );
    for (packet, mixed, tagged) in [(FULL, false, false), (FULL, true, false), (FULL, true, true), (1, false, false)] {
        for series in [1_000, 100_000] {
            row(Load { series, packet, mixed, tagged }, passes, rounds);
        }
    }
}

/// What a round measured.
struct Round {
    limit_ns: f64,
    tallyd_ns: f64,
    seal_us: f64,
}

fn row(load: Load, passes: usize, rounds: usize) {
    let packets = load.packets(LINES);
    let (mut table, mut agent) = (Table::default(), Agent::new());
    round(&mut table, &mut agent, &packets, 1);
    let rounds: Vec<Round> = (0..rounds).map(|_| round(&mut table, &mut agent, &packets, passes)).collect();
    let of = |figure: fn(&Round) -> f64| median(rounds.iter().map(figure).collect());
    let (limit_ns, tallyd_ns) = (of(|round| round.limit_ns), of(|round| round.tallyd_ns));
    println!(
        "{:<10}{:<10}{:>5}{:>9}{limit_ns:>10.1}{:>9.2}{tallyd_ns:>11.1}{:>9.2}{:>7.2}{:>9.1}",
        if load.packet == FULL { "1,432 B" } else { "one line" },
        if load.mixed { "mixed" } else { "counters" },
        if load.tagged { 4 } else { 0 },
        load.series,
        1e3 / limit_ns,
        1e3 / tallyd_ns,
        of(|round| round.tallyd_ns / round.limit_ns),
        of(|round| round.seal_us),
    );
}

fn round(table: &mut Table, agent: &mut Agent, packets: &[Vec<u8>], passes: usize) -> Round {
    let all = || (0..passes).flat_map(|_| packets);
    let ns = |begun: Duration| (processor_time() - begun).as_secs_f64() * 1e9 / (passes * LINES) as f64;
    let begun = processor_time();
    all().for_each(|packet| splitter::split(black_box(packet), table));
    let limit_ns = ns(begun);
    let begun = processor_time();
    all().for_each(|packet| agent.datagram(black_box(packet)));
    let seal = agent.seal();
    let tallyd_ns = ns(begun);
    assert_eq!(agent.drain(), table.0.len(), "one of them lost a series");
    Round { limit_ns, tallyd_ns, seal_us: seal.as_secs_f64() * 1e6 }
}

/// How long this thread has run; it advances by 4 ms.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}
