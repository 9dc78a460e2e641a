//! What Carbon reads: lines of text, or lists of Python's pickle behind their length.
//!
//! Lines are collected in chunks, each of which stands for itself: a chunk is written whole or again from its beginning.

use std::io::{Cursor, Write as _};

use super::Protocol;

/// How long a chunk gets before it is handed over: far below the 1 MiB of a pickle that Carbon takes.
const CHUNK: usize = 64 << 10;

/// Lines of one window as they are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) bytes: Vec<u8>,
    pub(super) lines: u64,
}

/// Collects the lines of one moment.
pub(super) struct Lines {
    protocol: Protocol,
    /// In seconds since the epoch.
    at_s: u64,
    bytes: Vec<u8>,
    lines: u64,
}

/// Of a pickle: the length that is not known yet, protocol 2, a list, and the mark before its items.
const PICKLE_HEAD: &[u8] = b"\0\0\0\0\x80\x02](";

/// Append the items since the mark; stop.
const PICKLE_TAIL: &[u8] = b"e.";

impl Lines {
    pub(super) fn new(protocol: Protocol, at_s: u64) -> Self {
        Self { protocol, at_s, bytes: Vec::new(), lines: 0 }
    }

    /// Adds a line.
    pub(super) fn push(&mut self, path: &str, value: f64) {
        self.lines += 1;
        match self.protocol {
            Protocol::Plaintext => self.push_text(path, value),
            Protocol::Pickle => self.push_item(path, value),
        }
    }

    /// The chunk, once it is long enough.
    pub(super) fn full(&mut self) -> Option<Chunk> {
        (self.bytes.len() >= CHUNK).then(|| self.take())
    }

    /// All that was added since the last chunk.
    pub(super) fn take(&mut self) -> Chunk {
        let mut bytes = std::mem::replace(&mut self.bytes, Vec::with_capacity(CHUNK + (CHUNK >> 4)));
        if self.protocol == Protocol::Pickle && !bytes.is_empty() {
            bytes.extend_from_slice(PICKLE_TAIL);
            let length = (bytes.len() - size_of::<u32>()) as u32;
            bytes[..size_of::<u32>()].copy_from_slice(&length.to_be_bytes());
        }
        Chunk { bytes, lines: std::mem::take(&mut self.lines) }
    }

    fn push_text(&mut self, path: &str, value: f64) {
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(b' ');
        push_number(&mut self.bytes, value);
        self.bytes.push(b' ');
        self.bytes.extend_from_slice(itoa::Buffer::new().format(self.at_s).as_bytes());
        self.bytes.push(b'\n');
    }

    /// `(path, (seconds, value))`.
    fn push_item(&mut self, path: &str, value: f64) {
        if self.bytes.is_empty() {
            self.bytes.extend_from_slice(PICKLE_HEAD);
        }
        self.bytes.push(b'X');
        self.bytes.extend_from_slice(&(path.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        // A whole number of 8 bytes, so that it is right after 2038 too.
        self.bytes.extend_from_slice(b"\x8a\x08");
        self.bytes.extend_from_slice(&self.at_s.to_le_bytes());
        self.bytes.push(b'G');
        self.bytes.extend_from_slice(&value.to_be_bytes());
        self.bytes.extend_from_slice(b"\x86\x86");
    }
}

/// Adds a number as JavaScript prints it (`Number::toString` of ECMA-262): the shortest digits that are read as the same
/// number, with an exponent from 1e21 on and below 1e-6.
fn push_number(out: &mut Vec<u8>, number: f64) {
    if !number.is_finite() {
        let word = if number.is_nan() { "NaN" } else { "Infinity" };
        out.extend(if number == f64::NEG_INFINITY { b"-".as_slice() } else { b"" });
        out.extend_from_slice(word.as_bytes());
        return;
    }
    if number.fract() == 0.0 && number.abs() < 1e15 {
        out.extend_from_slice(itoa::Buffer::new().format(number as i64).as_bytes());
        return;
    }
    let mut text = [0; 32];
    let mut cursor = Cursor::new(&mut text[..]);
    // At most 17 digits, a point, two signs and four characters of an exponent.
    let _ = write!(cursor, "{number:e}");
    let length = cursor.position() as usize;
    let text = std::str::from_utf8(&text[..length]).unwrap_or_default();
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let mantissa = mantissa.strip_prefix('-').inspect(|_| out.push(b'-')).unwrap_or(mantissa);
    let digits: Vec<u8> = mantissa.bytes().filter(|byte| *byte != b'.').collect();
    push_digits(out, &digits, exponent.parse().unwrap_or(0));
}

/// Adds digits with the point behind the first of them, times a power of ten.
fn push_digits(out: &mut Vec<u8>, digits: &[u8], exponent: i32) {
    let zeros = |out: &mut Vec<u8>, count: i32| out.extend(std::iter::repeat_n(b'0', count.max(0) as usize));
    match exponent {
        0..21 => {
            let whole = digits.len().min(exponent as usize + 1);
            out.extend_from_slice(&digits[..whole]);
            zeros(out, exponent + 1 - whole as i32);
            if whole < digits.len() {
                out.push(b'.');
                out.extend_from_slice(&digits[whole..]);
            }
        }
        -6..0 => {
            out.extend_from_slice(b"0.");
            zeros(out, -exponent - 1);
            out.extend_from_slice(digits);
        }
        i32::MIN..-6 | 21.. => {
            out.extend_from_slice(&digits[..1]);
            if digits.len() > 1 {
                out.push(b'.');
                out.extend_from_slice(&digits[1..]);
            }
            out.extend_from_slice(if exponent < 0 { b"e" } else { b"e+" });
            out.extend_from_slice(itoa::Buffer::new().format(exponent).as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number(number: f64) -> String {
        let mut out = Vec::new();
        push_number(&mut out, number);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_are_printed_as_javascript_prints_them() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (5.0, "5"),
            (-12.5, "-12.5"),
            (0.1 + 0.2, "0.30000000000000004"),
            (1e15, "1000000000000000"),
            (123_456_789_012_345_680_000.0, "123456789012345680000"),
            (1e21, "1e+21"),
            (-1.5e300, "-1.5e+300"),
            (0.000_001, "0.000001"),
            (0.000_000_1, "1e-7"),
            (1.234e-7, "1.234e-7"),
            (1.0 / 3.0, "0.3333333333333333"),
            (f64::MAX, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            (f64::NAN, "NaN"),
            (-f64::NAN, "NaN"),
        ];
        for (value, want) in cases {
            assert_eq!(number(value), want);
        }
    }

    #[test]
    fn chunks_stand_for_themselves() {
        let mut lines = Lines::new(Protocol::Plaintext, 1_764_000_010);
        lines.push("stats.a", 0.5);
        lines.push("stats.b;k=v", 7.0);
        assert!(lines.full().is_none());
        let chunk = lines.take();
        assert_eq!(chunk.bytes, b"stats.a 0.5 1764000010\nstats.b;k=v 7 1764000010\n");
        assert_eq!((chunk.lines, lines.take().lines), (2, 0));
        let mut lines = Lines::new(Protocol::Pickle, 1_764_000_010);
        assert!(lines.take().bytes.is_empty());
        while lines.full().is_none() {
            lines.push("stats.a", 0.5);
            assert!(lines.bytes.len() < 2 * CHUNK);
            if lines.bytes.len() >= CHUNK {
                break;
            }
        }
        let chunk = lines.take();
        assert_eq!(chunk.bytes[..4], ((chunk.bytes.len() - 4) as u32).to_be_bytes());
        assert!(chunk.bytes.ends_with(b"\x86\x86e."));
    }

    proptest! {
        #[test]
        fn a_number_is_read_as_it_was(value in prop::num::f64::ANY) {
            let read = number(value).parse::<f64>().unwrap();
            prop_assert!(read == value || read.is_nan() && value.is_nan(), "{} is {}", value, read);
        }
    }
}
