//! Metric lines: the fast path, for lines with one good sample in the usual spelling, and the way of all others through
//! the plain grammar.
//!
//! [`Fast`] goes over a line once and looks for its end only where it must: a name is searched for `:` with SIMD, numbers
//! and types end by themselves, tags are searched for `|` and LF. A whole number without a sign, which most values are,
//! has a way of its own; all other values share one. It decides nothing that the grammar decides otherwise (`fuzz/agree`
//! and the tests here compare them); what it does not understand it leaves alone. `benches/parse.rs` says what it costs.

use memchr::{memchr2, memchr3};

use super::grammar::{self, Fault, Line, Reading, Values};
use super::{Extras, GaugeSign, Limits, Parser, Reject, Sink, number, offset, tags};
use crate::sample::{Identity, Kind, Reason, Sample, Value, WireType};

/// What the fast path reads by, and its memory for packed numbers.
pub(super) struct Fast<'p> {
    pub sign: GaugeSign,
    pub limits: &'p Limits,
    pub numbers: &'p mut Vec<f64>,
}

impl Fast<'_> {
    /// Reads the line at the front of `bytes`, which is text, if it is one good sample in the usual spelling, and hands
    /// that over: how many bytes it took with its line end.
    #[inline]
    pub(super) fn first_line(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Option<usize> {
        self.read(bytes, |_| true, sink)
    }

    /// As [`Fast::first_line`], if `line` is that line and nothing else.
    #[inline]
    pub(super) fn line(&mut self, line: &[u8], sink: &mut impl Sink) -> bool {
        self.read(line, |length| length == line.len(), sink).is_some()
    }

    /// Reads the line at the front if `will_do` says so of its length with its line end.
    #[inline]
    fn read(&mut self, bytes: &[u8], will_do: impl Fn(usize) -> bool, sink: &mut impl Sink) -> Option<usize> {
        let Self { sign, limits, numbers } = self;
        let colon = name_end(bytes)?;
        let value_at = colon + 1;
        let one;
        let (wire, fields_at, value) = match number::read_whole(&bytes[value_at..]) {
            (number, length @ 1..=number::WHOLE_DIGITS) if bytes.get(value_at + length) == Some(&b'|') => {
                let (wire, end) = wire_type(bytes, value_at + length)?;
                one = [number as f64];
                (wire, end, whole_value(wire, &bytes[value_at..], length, &one, limits)?)
            }
            _ => other_value(bytes, value_at, *sign, limits, numbers)?,
        };
        let mut fields = Fields { rate: 1.0, timestamp: 0, tags: &[], tags_at: 0 };
        let mut at = fields_at;
        while bytes.get(at) == Some(&b'|') {
            at = field(bytes, at + 1, wire, &mut fields)?;
        }
        let length = line_end(bytes, at, fields_at)?;
        if fields.rate < limits.sample_rate_min || at > limits.line || !will_do(length) {
            return None;
        }
        let Fields { rate, timestamp, tags, .. } = fields;
        let identity = Identity::Line { name: &bytes[..colon], tags };
        sink.sample(&Sample { wire, identity, value, rate, timestamp, fields: &bytes[fields_at..at] });
        sink.line_end();
        Some(length)
    }
}

/// Where the `:` behind a name stands. Blanks are trimmed, and JSON and events told apart, elsewhere.
#[inline]
fn name_end(bytes: &[u8]) -> Option<usize> {
    let colon = memchr3(b':', b'|', b'\n', bytes)?;
    let is_name = bytes[colon] == b':'
        && !matches!(bytes[0], 0..=b' ' | b':' | b'{' | b'[')
        && !(bytes[0] == b'_' && bytes.starts_with(b"_e{"));
    is_name.then_some(colon)
}

/// One whole number without a sign, of so many digits, as the value of this type.
#[inline]
fn whole_value<'a>(
    wire: WireType,
    digits: &'a [u8],
    length: usize,
    number: &'a [f64; 1],
    limits: &Limits,
) -> Option<Value<'a>> {
    if wire == WireType::Plain(Kind::Set) {
        return (length <= limits.set_member).then(|| Value::Member(&digits[..length]));
    }
    (limits.values >= 1).then_some(Value::Numbers(number))
}

/// Any other value, with its type and where that ends: a fraction, a sign, packed numbers, or a member of a set.
#[inline(never)]
fn other_value<'a>(
    bytes: &'a [u8],
    value_at: usize,
    sign: GaugeSign,
    limits: &Limits,
    numbers: &'a mut Vec<f64>,
) -> Option<(WireType, usize, Value<'a>)> {
    let bar = match packed(bytes, value_at, numbers) {
        Some(bar) => bar,
        None => {
            numbers.clear();
            value_at + memchr2(b'|', b'\n', &bytes[value_at..])?
        }
    };
    let (wire, end) = wire_type(bytes, bar)?;
    let value = value(wire, &bytes[value_at..bar], numbers, sign, limits)?;
    Some((wire, end, value))
}

/// Reads packed numbers up to a `|`: where that stands.
fn packed(bytes: &[u8], mut at: usize, numbers: &mut Vec<f64>) -> Option<usize> {
    numbers.clear();
    loop {
        let (number, length) = number::read(&bytes[at..])?;
        numbers.push(number);
        at += length;
        match bytes.get(at) {
            Some(b'|') => return Some(at),
            Some(b':') => at += 1,
            Some(_) | None => return None,
        }
    }
}

/// The type behind the `|` at `bar`, and where it ends. It and [`field`] are inlined by force: what they answer would go
/// through memory, line by line.
#[inline(always)]
fn wire_type(bytes: &[u8], bar: usize) -> Option<(WireType, usize)> {
    let (wire, length) = match bytes.get(bar..)? {
        [b'|', b'c', ..] => (WireType::Plain(Kind::Counter), 1),
        [b'|', b'm', b's', ..] => (WireType::Plain(Kind::Timer), 2),
        [b'|', b'g', ..] => (WireType::Plain(Kind::Gauge), 1),
        [b'|', b's', ..] => (WireType::Plain(Kind::Set), 1),
        [b'|', b'h', ..] => (WireType::Plain(Kind::Histogram), 1),
        [b'|', b'd', ..] => (WireType::Plain(Kind::Distribution), 1),
        [b'|', b'm', ..] => (WireType::Plain(Kind::Meter), 1),
        [b'|', b'C', ..] => (WireType::AbsoluteCounter, 1),
        [b'|', b'k', b'v', ..] => (WireType::KeyValue, 2),
        _ => return None,
    };
    Some((wire, bar + 1 + length))
}

/// The value of this type; `None` where it is none, or a sign or a limit asks for the long way.
fn value<'a>(
    wire: WireType,
    text: &'a [u8],
    numbers: &'a [f64],
    sign: GaugeSign,
    limits: &Limits,
) -> Option<Value<'a>> {
    let has_sign = || text.iter().any(|byte| matches!(byte, b'+' | b'-'));
    match wire {
        WireType::Plain(Kind::Set) if text.is_empty() || text.len() > limits.set_member => None,
        WireType::Plain(Kind::Set) => Some(Value::Member(text)),
        _ if numbers.is_empty() || numbers.len() > limits.values => None,
        WireType::Plain(Kind::Timer) if numbers.iter().any(|number| *number < 0.0) => None,
        // Packed sets and changes count each for itself.
        WireType::Plain(Kind::Gauge) if sign == GaugeSign::Relative && has_sign() => {
            (numbers.len() == 1).then_some(Value::Changes(numbers))
        }
        WireType::Plain(_) | WireType::KeyValue | WireType::AbsoluteCounter => Some(Value::Numbers(numbers)),
    }
}

struct Fields<'a> {
    rate: f64,
    timestamp: u64,
    /// From behind the first `|#` to the end of the last tag field.
    tags: &'a [u8],
    /// Where they begin; 0 without.
    tags_at: usize,
}

/// Reads the field that begins at `at`, up to the next `|` or the line's end: where that stands.
#[inline(always)]
fn field<'a>(bytes: &'a [u8], at: usize, wire: WireType, fields: &mut Fields<'a>) -> Option<usize> {
    match bytes.get(at)? {
        b'@' => {
            let (rate, length) = number::read(&bytes[at + 1..])?;
            fields.rate = rate;
            (rate > 0.0 && rate <= 1.0).then_some(at + 1 + length)
        }
        b'#' => {
            let end = field_end(bytes, at + 1);
            if fields.tags_at == 0 {
                fields.tags_at = at + 1;
            }
            fields.tags = &bytes[fields.tags_at..end];
            Some(end)
        }
        b'c' | b'e' => Some(field_end(bytes, at + 1)),
        b'T' if matches!(wire, WireType::Plain(Kind::Counter | Kind::Gauge)) => {
            let end = field_end(bytes, at + 1);
            fields.timestamp = number::parse_whole(&bytes[at + 1..end]).filter(|seconds| *seconds > 0)?;
            Some(end)
        }
        _ => None,
    }
}

/// Where the `|` or the line end behind a field stands.
#[inline]
fn field_end(bytes: &[u8], at: usize) -> usize {
    let end = memchr2(b'|', b'\n', &bytes[at..]).map_or(bytes.len(), |length| at + length);
    // Of CRLF, the first belongs to the line end.
    if bytes[at..end].last() == Some(&b'\r') { end - 1 } else { end }
}

/// Where the next line begins, if this one ends at `at`; `None` where blanks must be trimmed off its fields first.
#[inline]
fn line_end(bytes: &[u8], at: usize, fields_at: usize) -> Option<usize> {
    if at > fields_at && matches!(bytes[at - 1], 0 | b' ' | b'\t' | b'\r') {
        return None;
    }
    match &bytes[at..] {
        [] | [b'\r'] => Some(bytes.len()),
        [b'\n', ..] => Some(at + 1),
        [b'\r', b'\n', ..] => Some(at + 2),
        _ => None,
    }
}

impl Parser {
    /// Reads a metric line by the plain grammar. It is trimmed and text.
    pub(super) fn metric(&mut self, line: &[u8], number: u32, sink: &mut impl Sink) {
        let reject = |reason, at| Reject { reason, line: number, column: offset(line, at), bytes: line };
        let mut parsed = match grammar::line(line, self.config.gauge_sign) {
            Ok(parsed) => parsed,
            Err(Fault { reason, at }) => return sink.reject(&reject(reason, at)),
        };
        for reading in &mut parsed.readings {
            *reading = std::mem::replace(reading, Err(Fault { reason: Reason::EmptyValue, at: line }))
                .and_then(|reading| within_limits(reading, &self.limits));
        }
        let bad_identity = if is_one_sample(&parsed.readings) { None } else { self.bad_identity(&parsed, sink) };
        match bad_identity {
            // The rules come before the limits, and the name before the samples.
            Some(reason) if !is_limit(reason) => return sink.reject(&reject(reason, parsed.name)),
            Some(_) | None => {}
        }
        for fault in parsed.readings.iter().filter_map(|reading| reading.as_ref().err()) {
            sink.reject(&reject(fault.reason, fault.at));
        }
        match bad_identity {
            Some(reason) if parsed.readings.iter().any(Result::is_ok) => sink.reject(&reject(reason, parsed.name)),
            Some(_) => {}
            None => self.emit(&parsed, sink),
        }
    }

    /// Looks whether an identity names no series, and says how many of its tags are bad if no sample will.
    fn bad_identity(&self, line: &Line<'_>, sink: &mut impl Sink) -> Option<Reason> {
        if line.tags.is_empty() && tags::is_plain(line.name, &self.limits) {
            return None;
        }
        let identity = Identity::Line { name: line.name, tags: line.tags };
        match tags::series_key(&identity, &self.config, &self.limits) {
            Ok((_, bad)) => {
                if bad > 0 && line.readings.iter().all(Result::is_err) {
                    sink.bad_tags(bad);
                }
                None
            }
            Err(reason) => Some(reason),
        }
    }

    fn emit(&mut self, line: &Line<'_>, sink: &mut impl Sink) {
        let identity = Identity::Line { name: line.name, tags: line.tags };
        self.scratch.fields.clear();
        if line.readings.len() > 1 && line.extras != Extras::default() {
            line.extras.write(&mut self.scratch.fields);
        }
        for reading in line.readings.iter().flatten() {
            let fields = if line.readings.len() > 1 { &self.scratch.fields } else { reading.fields };
            let Reading { wire, rate, timestamp, .. } = *reading;
            let sample = |value| Sample { wire, identity, value, rate, timestamp, fields };
            match &reading.values {
                Values::Member(member) => sink.sample(&sample(Value::Member(member))),
                Values::Numbers(values) if values.iter().any(|(_, is_change)| *is_change) => {
                    // Sets and changes of a gauge count in their order, each for itself.
                    for (value, is_change) in values {
                        let value = std::slice::from_ref(value);
                        let value = if *is_change { Value::Changes(value) } else { Value::Numbers(value) };
                        sink.sample(&sample(value));
                    }
                }
                Values::Numbers(values) => {
                    self.scratch.numbers.clear();
                    self.scratch.numbers.extend(values.iter().map(|(value, _)| *value));
                    sink.sample(&sample(Value::Numbers(&self.scratch.numbers)));
                }
            }
        }
    }
}

fn within_limits<'a>(reading: Reading<'a>, limits: &Limits) -> Result<Reading<'a>, Fault<'a>> {
    let reason = match &reading.values {
        Values::Numbers(values) if values.len() > limits.values => Some(Reason::TooManyValues),
        Values::Member(member) if member.len() > limits.set_member => Some(Reason::MemberTooLong),
        Values::Numbers(_) | Values::Member(_) if reading.rate < limits.sample_rate_min => Some(Reason::BadSampleRate),
        Values::Numbers(_) | Values::Member(_) => None,
    };
    match reason {
        Some(reason) => Err(Fault { reason, at: reading.fields }),
        None => Ok(reading),
    }
}

/// Whether a line is one good sample: then its identity is left to the sink, which knows it or looks at it.
fn is_one_sample(readings: &[Result<Reading<'_>, Fault<'_>>]) -> bool {
    match readings {
        [Ok(Reading { values: Values::Member(_), .. })] => true,
        [Ok(Reading { values: Values::Numbers(values), .. })] => {
            values.len() == 1 || values.iter().all(|(_, is_change)| !is_change)
        }
        _ => false,
    }
}

fn is_limit(reason: Reason) -> bool {
    matches!(reason, Reason::NameTooLong | Reason::TooManyTags | Reason::TagTooLong)
}
