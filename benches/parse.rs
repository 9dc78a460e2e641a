//! What a line costs to read: the parser between a hand-written splitter, which is the limit, and the plain grammar, over
//! the same packets in one run. The goal is at most 1.3 times the splitter in every row.
//!
//! ```sh
//! cargo bench --bench parse                     # half a minute
//! cargo bench --bench parse -- --quick          # a few seconds, for a look
//! cargo bench --bench parse -- --only parser 3  # no clock: one reader over row 3, for callgrind
//! ```
//!
//! - *splitter*: [`load::splitter`], whose doc says what it does and what it leaves out.
//! - *parser*: [`Parser::datagram`], the fast path with all that lines may be.
//! - *grammar*: [`Parser::datagram_plainly`], nom alone.
//!
//! All three hand the same samples to the same sink, which adds them up; the sums are compared. A round takes each reader
//! once over the packets, which fit in the cache of a core, in so short a time that most rounds are not interrupted; a
//! ratio is the median of the rounds' ratios.
//!
//! `cargo bench --bench parse`, 2026-11, 2 cores of an AMD EPYC (Zen 3), rustc 1.95, beside other work, which changes the
//! nanoseconds from row to row and the ratios little; instructions a line by `valgrind --tool=callgrind`:
//!
//! ```text
//! row packets   lines      tags  splitter ns  parser ns  grammar ns  parser  grammar   instructions: splitter  parser
//! 0   1,432 B   counters      0         27.6       31.3       378.7    1.12    13.35                      238     267
//! 1   1,432 B   counters      4         26.6       31.4       321.5    1.18    12.07                      360     450
//! 2   1,432 B   mixed         0         25.3       27.4       295.4    1.12    10.71                      241     272
//! 3   1,432 B   mixed         4         46.8       58.1       607.2    1.23    12.51                      363     454
//! 4   one line  counters      0         35.3       41.6       395.6    1.16    11.07                      269     325
//! 5   one line  counters      4         47.9       61.9       612.2    1.26    12.36                      387     509
//! 6   one line  mixed         0         39.9       46.5       396.3    1.15     9.75                      272     329
//! 7   one line  mixed         4         34.4       42.2       337.8    1.25     9.83                      391     515
//! ```
//!
//! What the parser does beyond the splitter is to look for bytes that are not ASCII, for a byte order mark and a document
//! at the start of a packet, for `|` before the `:`, for blanks and carriage returns at the end, and for limits.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::hint::black_box;
use std::time::Instant;

use load::{FULL, Load, median, splitter};
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

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--only") {
        return only(&arguments[at + 1], arguments[at + 2].parse().unwrap());
    }
    let rounds = if arguments.iter().any(|argument| argument == "--quick") { 101 } else { 2_001 };
    println!(
        "{:<4}{:<10}{:<10}{:>5}{:>13}{:>11}{:>12}{:>8}{:>9}",
        "row", "packets", "lines", "tags", "splitter ns", "parser ns", "grammar ns", "parser", "grammar"
    );
    for (number, load) in rows().into_iter().enumerate() {
        row(number, load, rounds);
    }
}

fn rows() -> Vec<Load> {
    let load = |packet, mixed, tagged| Load { series: 1_000, packet, mixed, tagged };
    let tags = |packet, mixed| [false, true].map(|tagged| load(packet, mixed, tagged));
    [(FULL, false), (FULL, true), (1, false), (1, true)]
        .into_iter()
        .flat_map(|(packet, mixed)| tags(packet, mixed))
        .collect()
}

fn row(number: usize, load: Load, rounds: usize) {
    let packets = load.packets(LINES);
    let mut parser = Parser::new(&Config::default(), &Limits::default());
    let mut round = || {
        let [splitter, parser, grammar] = READERS.map(|reader| pass(reader, &mut parser, &packets));
        assert_eq!((splitter.1, parser.1), (parser.1, grammar.1), "one of them reads something else");
        [splitter.0, parser.0, grammar.0]
    };
    round();
    let times: Vec<[f64; 3]> = (0..rounds).map(|_| round()).collect();
    let of = |figure: fn(&[f64; 3]) -> f64| median(times.iter().map(figure).collect());
    println!(
        "{number:<4}{:<10}{:<10}{:>5}{:>13.1}{:>11.1}{:>12.1}{:>8.2}{:>9.2}",
        if load.packet == FULL { "1,432 B" } else { "one line" },
        if load.mixed { "mixed" } else { "counters" },
        if load.tagged { 4 } else { 0 },
        of(|times| times[0]),
        of(|times| times[1]),
        of(|times| times[2]),
        of(|times| times[1] / times[0]),
        of(|times| times[2] / times[0]),
    );
}

/// Nanoseconds a line, and what was read.
fn pass((_, read): Reader, parser: &mut Parser, packets: &[Vec<u8>]) -> (f64, Sum) {
    let mut sum = Sum::default();
    let begun = Instant::now();
    for packet in packets {
        read(parser, black_box(packet), &mut sum);
    }
    (begun.elapsed().as_secs_f64() * 1e9 / LINES as f64, sum)
}

/// Many passes of one reader, for a profiler; they outweigh the making of the packets.
fn only(name: &str, row: usize) {
    let reader = READERS.into_iter().find(|reader| reader.0 == name).unwrap();
    let packets = rows()[row].packets(LINES);
    let mut parser = Parser::new(&Config::default(), &Limits::default());
    for _ in 0..200 {
        black_box(pass(reader, &mut parser, &packets));
    }
    println!("{} lines", 200 * LINES);
}
