//! What holds for all bytes, as functions that panic where it does not. `properties.rs` hands them generated input, the
//! targets of `fuzz/` whatever the fuzzer finds.

mod accounts;
mod configuration;
mod mapping;
mod print;
mod record;
mod total;

use std::ops::ControlFlow;

use tallyd::listen::lines::{Lines, Piece};
use tallyd::protocol::{Body, Config, GaugeSign, Limits, NamePolicy, Parser};

use accounts::Accounts;
pub use configuration::config;
pub use mapping::mapping;
pub use print::{print, reads_back};
pub use record::{Call, Name, Reading, Readings, Record};
pub use total::total;

/// The settings under which the laws are held: the defaults, and limits that small inputs meet.
fn settings() -> [(Config, Limits); 2] {
    let config = Config { name_policy: NamePolicy::None, gauge_sign: GaugeSign::Absolute, tag_dialects: Vec::new() };
    let limits = Limits {
        line: 120,
        name: 40,
        identity: 60,
        tags: 3,
        tag_key: 10,
        tag_value: 12,
        values: 4,
        sample_rate_min: 1e-3,
        set_member: 12,
        json_depth: 4,
        samples: 5,
    };
    [(Config::default(), Limits::default()), (config, limits)]
}

/// What a parser of its own hands over.
fn record(config: &Config, limits: &Limits, read: impl FnOnce(&mut Parser, &mut Record)) -> Vec<Call> {
    let mut record = Record::default();
    read(&mut Parser::new(config, limits), &mut record);
    record.calls
}

/// A datagram gives the same by the fast path and by the plain grammar, also where one packed value is too many, or any.
pub fn agree(bytes: &[u8]) {
    let few = [0, 1].map(|values| (Config::default(), Limits { values, ..Limits::default() }));
    for (config, limits) in settings().into_iter().chain(few) {
        let fast = record(&config, &limits, |parser, record| parser.datagram(bytes, record));
        let plain = record(&config, &limits, |parser, record| parser.datagram_plainly(bytes, record));
        assert_eq!(fast, plain);
    }
}

/// Every byte of a datagram is accounted for, its lines do not change each other's meaning, and its samples are within
/// their limits and read back from what is printed of them.
pub fn datagram(bytes: &[u8]) {
    for (config, limits) in settings() {
        account(bytes, &config, &limits, |parser, sink| parser.datagram(bytes, sink)).close();
        for call in record(&config, &limits, |parser, record| parser.datagram(bytes, record)) {
            if let Call::Sample(reading) = call {
                reads_back(&reading, &config, &limits);
            }
        }
        neighbours(bytes, &config, &limits);
    }
}

/// Lines among others give what each gives alone. A datagram that begins like a JSON document may be one, over all of its
/// lines, and a byte order mark may begin it; so a line is put before these, once a good one and once one that keeps
/// the whole datagram from being text.
fn neighbours(bytes: &[u8], config: &Config, limits: &Limits) {
    let alone = record(config, limits, |parser, record| {
        for (line, number) in bytes.split(|byte| *byte == b'\n').zip(2..) {
            parser.line(line, number, record);
        }
    });
    for neighbour in [&b"a:1|c\n"[..], b"\xff\n"] {
        let datagram = [neighbour, bytes].concat();
        let together = record(config, limits, |parser, record| parser.datagram(&datagram, record));
        // A sample or a reject, and the line's end.
        assert_eq!(together[2..], alone, "behind {neighbour:?}");
    }
}

/// A stream gives the same lines wherever it was cut on its way, each of its bytes belongs to one of them, and no more
/// than a line of it is held. The last bytes say where it is cut.
pub fn stream(bytes: &[u8]) {
    let (stream, cuts) = bytes.split_at(bytes.len() - bytes.len().min(4));
    for (config, limits) in settings() {
        let whole = pieces([stream], limits.line);
        assert_eq!(pieces(chunks(stream, cuts), limits.line), whole);
        let mut lines: Vec<_> = stream.split(|byte| *byte == b'\n').collect();
        // What ends with a line feed is over.
        lines.pop_if(|last| last.is_empty());
        assert_eq!(whole.len(), lines.len());
        for (line, (form, piece)) in lines.into_iter().zip(whole) {
            let length = line.strip_suffix(b"\r").unwrap_or(line).len();
            assert_eq!(form == Form::TooLong, length > limits.line && form != Form::Request);
            assert!(if length > limits.line { line.starts_with(&piece) } else { line == piece });
            if form == Form::Line {
                account(&piece, &config, &limits, |parser, sink| parser.line(&piece, 1, sink)).close();
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Line,
    TooLong,
    Request,
}

/// A stream cut into pieces as long as `lengths` say, again and again.
fn chunks<'a>(mut stream: &'a [u8], lengths: &[u8]) -> Vec<&'a [u8]> {
    let mut chunks = Vec::new();
    for length in lengths.iter().cycle() {
        if stream.is_empty() || lengths.iter().all(|length| *length == 0) {
            break;
        }
        let (chunk, rest) = stream.split_at(stream.len().min(usize::from(*length)));
        chunks.push(chunk);
        stream = rest;
    }
    chunks.push(stream);
    chunks
}

fn pieces<'a>(chunks: impl IntoIterator<Item = &'a [u8]>, max: usize) -> Vec<(Form, Vec<u8>)> {
    let mut lines = Lines::new(max);
    let mut pieces = Vec::new();
    let mut each = |piece: Piece<'_>| {
        pieces.push(match piece {
            Piece::Line(bytes) => (Form::Line, bytes.to_vec()),
            Piece::TooLong(bytes) => (Form::TooLong, bytes.to_vec()),
            Piece::Request(bytes) => (Form::Request, bytes.to_vec()),
        });
        ControlFlow::Continue(())
    };
    for chunk in chunks {
        assert_eq!(lines.feed(chunk, &mut each), ControlFlow::Continue(()));
        assert!(lines.partial().len() <= max + 1);
        // Another agent may go on from here.
        lines = Lines::resume(max, lines.into_rest());
    }
    lines.end(&mut each);
    assert!(!lines.is_inside());
    pieces
}

/// Of the records of an HTTP body each one is accepted or rejected, and samples read back from what is printed of them.
pub fn json(body: &[u8]) {
    for (config, limits) in settings() {
        let mut form = Body::Invalid;
        let accounts = account(body, &config, &limits, |parser, sink| form = parser.body(body, sink));
        let calls = record(&config, &limits, |parser, record| form = parser.body(body, record));
        match form {
            Body::Object | Body::Invalid => assert_eq!(accounts.close(), 1),
            Body::Array(records) | Body::Lines(records) => assert_eq!(accounts.close(), records),
            Body::TooMany(records) => assert!(records > limits.samples && calls.is_empty()),
        }
        for call in calls {
            if let Call::Sample(reading) = call {
                reads_back(&reading, &config, &limits);
            }
        }
    }
}

/// Reads bytes and accounts for each of them.
fn account<'a>(
    bytes: &'a [u8],
    config: &Config,
    limits: &'a Limits,
    read: impl FnOnce(&mut Parser, &mut Accounts<'a>),
) -> Accounts<'a> {
    let mut accounts = Accounts::new(bytes, limits);
    read(&mut Parser::new(config, limits), &mut accounts);
    accounts
}
