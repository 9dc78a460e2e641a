//! What a line costs to read: the parser between a hand-written splitter, which is the limit, and the plain grammar,
//! over the same packets in one run. The goal is at most 1.3 times the splitter in every row.
//!
//! ```sh
//! cargo bench --bench parse                        # half a minute
//! cargo bench --bench parse -- --quick mixed       # a look at some rows
//! cargo bench --bench parse -- --only parser mixed # no clock: one reader over the first such row, for callgrind
//! ```
//!
//! - *splitter*: [`load::splitter`], whose doc says what it does and what it leaves out.
//! - *parser*: [`Parser::datagram`], the fast path with all that lines may be.
//! - *grammar*: [`Parser::datagram_plainly`], nom alone.
//!
//! All three hand the same samples to the same sink, which adds them up; the sums are compared. A round takes each
//! reader once over the packets, which fit in the cache of a core, in so short a time that most rounds are not
//! interrupted; a ratio is the median of the rounds' ratios.
//!
//! Instructions a line by `valgrind --tool=callgrind`, which don't depend on the machine, splitter and parser: full
//! packets of counters 238 and 267, with 4 tags 360 and 450; mixed 241 and 272, with tags 363 and 454; packets of one
//! line some 30 more for the splitter and 60 for the parser. What the parser does beyond the splitter is to look for
//! bytes that are not ASCII, for a byte order mark and a document at the start of a packet, for `|` before the `:`, for
//! blanks and carriage returns at the end, and for limits.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::hint::black_box;
use std::time::Instant;

use load::report::{self, Goal, Line};
use load::{Arguments, FULL, Load, Packets, Spread, median_of, splitter};
use tallyd::protocol::{Config, Event, Limits, Parser, Reject, ServiceCheck, Sink};
use tallyd::sample::{Identity, Sample, Value};

/// Lines of a pass over the packets.
const LINES: usize = 2_048;

/// Takes samples as cheaply as can be, and so that nothing of them can be left out.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Sum {
    samples: u64,
    bytes: u64,
    values: f64,
    /// Samples, lines and tags that are not good, events, service checks.
    others: u64,
}

impl Sink for Sum {
    #[inline]
    fn sample(&mut self, sample: &Sample<'_>) {
        let sample = black_box(sample);
        self.samples += 1;
        let Identity::Line { name, tags } = sample.identity else { return };
        self.bytes += (name.len() + tags.len() + sample.fields.len()) as u64;
        match sample.value {
            Value::Numbers(numbers) | Value::Changes(numbers) => self.values += numbers[0],
            Value::Member(member) => self.bytes += member.len() as u64,
        }
    }
    fn event(&mut self, _: &Event<'_>) {
        self.others += 1;
    }
    fn service_check(&mut self, _: &ServiceCheck<'_>) {
        self.others += 1;
    }
    fn reject(&mut self, _: &Reject<'_>) {
        self.others += 1;
    }
    fn bad_tags(&mut self, _: u32) {
        self.others += 1;
    }
    fn line_end(&mut self) {}
}

/// A reader's name and what it does with a packet.
type Reader = (&'static str, fn(&mut Parser, &[u8], &mut Sum));

const READERS: [Reader; 3] = [
    ("splitter", |_, packet, sum| splitter::split(packet, sum)),
    ("parser", |parser, packet, sum| parser.datagram(packet, sum)),
    ("grammar", |parser, packet, sum| parser.datagram_plainly(packet, sum)),
];

#[derive(Debug, clap::Parser)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
    /// Times nothing: `splitter`, `parser` or `grammar` many times over the first row that is asked for
    #[arg(long, value_name = "READER")]
    only: Option<String>,
}

fn main() {
    let Command { arguments, only } = <Command as clap::Parser>::parse();
    let mut rows = rows(&arguments);
    if let Some(name) = only {
        let load = rows.next().expect("words that are in the name of a row");
        return many(&name, load);
    }
    report::head();
    rows.for_each(|load| row(load, arguments.rounds(2_001, 101)));
}

fn rows(arguments: &Arguments) -> impl Iterator<Item = Load> {
    let mut loads = Vec::new();
    for series in arguments.series(&[1_000]) {
        for (packet, mixed) in [(FULL, false), (FULL, true), (1, false), (1, true)] {
            for tagged in [false, true] {
                loads.push(Load { series, spread: Spread::Uniform, packet, mixed, tagged });
            }
        }
    }
    loads.into_iter().filter(|load| arguments.want(&load.name()))
}

fn row(load: Load, rounds: usize) {
    let packets = load.packets(LINES);
    let mut parser = Parser::new(&Config::default(), &Limits::default());
    let mut round = || {
        let [splitter, parser, grammar] = READERS.map(|reader| pass(reader, &mut parser, &packets));
        assert_eq!((splitter.1, parser.1), (parser.1, grammar.1), "one of them reads something else");
        [splitter.0, parser.0, grammar.0]
    };
    round();
    let times: Vec<[f64; 3]> = (0..rounds).map(|_| round()).collect();
    let of = |figure: fn(&[f64; 3]) -> f64| median_of(&times, figure);
    let (limit, name) = (of(|times| times[0]), load.name());
    Line::new(&format!("parse, {name}"), of(|times| times[1]), "ns/line")
        .beside(limit, of(|times| times[1] / times[0]))
        .ratio_goal(Goal::AtMost(1.3))
        .print();
    Line::new(&format!("parse by the plain grammar, {name}"), of(|times| times[2]), "ns/line")
        .beside(limit, of(|times| times[2] / times[0]))
        .print();
}

/// Nanoseconds a line, and what was read.
fn pass((_, read): Reader, parser: &mut Parser, packets: &Packets) -> (f64, Sum) {
    let mut sum = Sum::default();
    let begun = Instant::now();
    for packet in packets.iter() {
        read(parser, black_box(packet), &mut sum);
    }
    (begun.elapsed().as_secs_f64() * 1e9 / LINES as f64, sum)
}

/// Many passes of one reader, for a profiler; they outweigh the making of the packets.
fn many(name: &str, load: Load) {
    let reader = READERS.into_iter().find(|reader| reader.0 == name).expect("splitter, parser or grammar");
    let packets = load.packets(LINES);
    let mut parser = Parser::new(&Config::default(), &Limits::default());
    for _ in 0..200 {
        black_box(pass(reader, &mut parser, &packets));
    }
    println!("{} lines", 200 * LINES);
}
