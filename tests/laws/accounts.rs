//! The account of a datagram, a line or a body: each of its bytes is part of what was handed over, or nothing.
//!
//! What is handed over between two ends of lines covers a part of the bytes: a record what its sample says it was read
//! from, a line all between its blanks, a reject its own bytes. The parts follow each other and do not overlap, and
//! between them is nothing but blanks, line ends and the signs of JSON arrays.

use std::ops::Range;

use tallyd::protocol::{Event, Limits, Reject, ServiceCheck, Sink};
use tallyd::sample::{Identity, Kind, Sample, Value, WireType};

/// Checks what it is given against the bytes it was read from.
pub(super) struct Accounts<'a> {
    bytes: &'a [u8],
    limits: &'a Limits,
    /// All before this is accounted for.
    at: usize,
    /// The number of the line in which that is.
    line: u32,
    /// The number of the record that ends there, inside an array.
    record: Option<u32>,
    /// What the calls since the last end of a line cover.
    covered: Option<Range<usize>>,
    /// The numbers of lines or records that these calls named.
    named: Vec<u32>,
    ended: usize,
}

impl<'a> Accounts<'a> {
    /// Nothing was handed over yet. A byte order mark at the start is nothing.
    pub(super) fn new(bytes: &'a [u8], limits: &'a Limits) -> Self {
        let at = if bytes.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        Self { bytes, limits, at, line: 1, record: None, covered: None, named: Vec::new(), ended: 0 }
    }

    /// Checks that nothing is left, and says how many lines and records there were.
    pub(super) fn close(mut self) -> usize {
        assert!(self.covered.is_none(), "a line that did not end");
        self.skip(self.bytes.len());
        assert_eq!(self.record, None, "an array that does not end");
        self.ended
    }

    /// Where a part of the bytes stands in them.
    fn span(&self, part: &[u8]) -> Range<usize> {
        let start = (part.as_ptr() as usize).wrapping_sub(self.bytes.as_ptr() as usize);
        assert!(start <= self.bytes.len() && part.len() <= self.bytes.len() - start, "no part of what was read");
        start..start + part.len()
    }

    /// The line around a place, without blanks.
    fn line_around(&self, at: usize) -> Range<usize> {
        let is_end = |byte: &u8| *byte == b'\n';
        let start = self.bytes[self.at..at].iter().rposition(is_end).map_or(self.at, |end| self.at + end + 1);
        let end = self.bytes[at..].iter().position(is_end).map_or(self.bytes.len(), |length| at + length);
        let line = &self.bytes[start..end];
        let first = line.iter().position(|byte| !is_blank(*byte)).unwrap_or(line.len());
        let last = line.iter().rposition(|byte| !is_blank(*byte)).map_or(first, |last| last + 1);
        start + first..start + last
    }

    /// The next line in which there is more than blanks and the ends of arrays.
    fn next_line(&self) -> Range<usize> {
        let is_nothing = |byte: &u8| matches!(byte, b'\n' | b'[' | b']') || is_blank(*byte);
        let start = self.bytes[self.at..].iter().position(|byte| !is_nothing(byte));
        self.line_around(self.at + start.unwrap_or_default())
    }

    fn cover(&mut self, span: Range<usize>) {
        let covered = self.covered.get_or_insert_with(|| span.clone());
        assert_eq!(*covered, span, "two parts in one line");
    }

    /// Goes over what belongs to nothing, and finds the arrays in it that begin, go on and end.
    fn skip(&mut self, to: usize) {
        let gap = self.bytes.get(self.at..to).expect("parts follow each other");
        self.line += line_feeds(gap);
        self.at = to;
        let signs: Vec<u8> = gap.iter().copied().filter(|byte| *byte != b'\n' && !is_blank(*byte)).collect();
        let mut signs = &signs[..];
        if let Some(record) = self.record {
            if signs == b"," {
                self.record = Some(record + 1);
                return;
            }
            signs = signs.strip_prefix(b"]").unwrap_or_else(|| panic!("{signs:?} inside an array"));
            self.record = None;
        }
        // An array of no records is nothing.
        while let Some(rest) = signs.strip_prefix(b"[]") {
            signs = rest;
        }
        match signs {
            b"" => {}
            b"[" => self.record = Some(1),
            _ => panic!("{:?} belongs to nothing", String::from_utf8_lossy(signs)),
        }
    }

    fn check_value(&self, sample: &Sample<'_>) {
        match sample.value {
            Value::Member(member) => {
                assert_eq!(sample.wire, WireType::Plain(Kind::Set));
                assert!(member.len() <= self.limits.set_member);
            }
            Value::Numbers(numbers) | Value::Changes(numbers) => {
                assert!(!numbers.is_empty() && numbers.len() <= self.limits.values);
                assert!(numbers.iter().all(|number| number.is_finite() && number.to_bits() != (-0.0_f64).to_bits()));
                let is_timer = sample.wire == WireType::Plain(Kind::Timer);
                assert!(!is_timer || numbers.iter().all(|number| *number >= 0.0));
                let is_change = matches!(sample.value, Value::Changes(_));
                assert!(!is_change || sample.wire == WireType::Plain(Kind::Gauge));
            }
        }
        assert!(sample.rate >= self.limits.sample_rate_min && sample.rate <= 1.0);
    }
}

impl Sink for Accounts<'_> {
    fn sample(&mut self, sample: &Sample<'_>) {
        self.check_value(sample);
        match sample.identity {
            Identity::Key(_) => self.cover(self.span(sample.fields)),
            Identity::Line { name, tags } => {
                let name = self.span(name);
                let line = self.line_around(name.start);
                assert!(!name.is_empty() && name.start == line.start && self.bytes[name.end] == b':');
                // Where there are none, they need not stand anywhere.
                if !tags.is_empty() {
                    let tags = self.span(tags);
                    assert!(self.bytes[..tags.start].ends_with(b"|#") && tags.end <= line.end);
                }
                self.cover(line);
            }
        }
    }

    fn event(&mut self, _event: &Event<'_>) {
        let line = self.next_line();
        assert!(self.bytes[line.clone()].starts_with(b"_e{"));
        self.cover(line);
    }

    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        let line = self.next_line();
        assert!(self.bytes[line.clone()].starts_with(b"_sc|"));
        assert_eq!(self.span(check.name.as_bytes()).start, line.start + b"_sc|".len());
        self.cover(line);
    }

    fn reject(&mut self, reject: &Reject<'_>) {
        assert!(reject.column <= reject.bytes.len());
        self.named.push(reject.line);
        self.cover(self.span(reject.bytes));
    }

    fn bad_tags(&mut self, count: u32) {
        assert!(count > 0);
    }

    fn line_end(&mut self) {
        let span = self.covered.take().expect("a line that gave nothing");
        self.skip(span.start);
        let number = self.record.unwrap_or(self.line);
        assert!(self.named.drain(..).all(|named| named == number), "it is in line or record {number}");
        self.line += line_feeds(&self.bytes[span.clone()]);
        self.at = span.end;
        self.ended += 1;
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | 0)
}

fn line_feeds(bytes: &[u8]) -> u32 {
    bytes.iter().map(|byte| u32::from(*byte == b'\n')).sum()
}
