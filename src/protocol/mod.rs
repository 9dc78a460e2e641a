//! Bytes into samples: every dialect on one port. Pure: no I/O, no clock, no table of series.
//!
//! A [`Parser`] takes a datagram, a stream's line or an HTTP body and hands what it finds to a [`Sink`], borrowed from
//! the bytes. Names are not checked and tags are not decoded per line: that is [`series_key`], once for each identity. A
//! bad line, record or sample is handed over as a [`Reject`] and affects nothing else.
//!
//! Limits: `line`, `name`, `identity`, `tags`, `tag_key`, `tag_value`, `values`, `sample_rate_min`, `set_member`,
//! `json_depth`, `samples`. No metrics of its own; the sink counts.

mod dogstatsd;
mod grammar;
mod hint;
mod json;
mod lines;
mod number;
mod statsd;
mod tags;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

pub use dogstatsd::{Cardinality, Extras};
pub use hint::hint;
pub use json::{Record, record};
pub use tags::series_key;

use crate::sample::{Reason, Sample};
use crate::units;

/// `[protocol]`: what depends on the clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What becomes of names on lines; names in JSON are kept as sent.
    pub name_policy: NamePolicy,
    /// What a sign before a gauge's value means.
    pub gauge_sign: GaugeSign,
    /// Where tags are looked for.
    pub tag_dialects: Vec<Dialect>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name_policy: NamePolicy::Etsy,
            gauge_sign: GaugeSign::Relative,
            tag_dialects: vec![
                Dialect::Dogstatsd,
                Dialect::Graphite,
                Dialect::Influx,
                Dialect::Librato,
                Dialect::Signalfx,
            ],
        }
    }
}

/// `protocol.name_policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamePolicy {
    /// Blanks become `_`, `/` becomes `-`, and what is not in `A-Za-z0-9_.-` is dropped.
    Etsy,
    /// As sent; a control character makes the name a bad one.
    None,
}

/// `protocol.gauge_sign`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GaugeSign {
    /// `+3` and `-3` change the gauge.
    Relative,
    /// They set it, as clients of DogStatsD expect.
    Absolute,
}

/// An entry of `protocol.tag_dialects`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// `name:1|c|#tag:value,flag`. A tag field is one whatever this list says: it cannot be anything else.
    Dogstatsd,
    /// `name;tag=value:1|c`
    Graphite,
    /// `name,tag=value:1|c`
    Influx,
    /// `name#tag=value:1|c`
    Librato,
    /// `na[tag=value]me:1|c`
    Signalfx,
}

/// `[limits]`: what is rejected although the rules allow it. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// A line without its end.
    #[serde(with = "units::size")]
    pub line: usize,
    /// A name.
    #[serde(with = "units::size")]
    pub name: usize,
    /// A series key: name with tags.
    #[serde(with = "units::size")]
    pub identity: usize,
    /// Tags of a series.
    pub tags: usize,
    /// A tag's key, or a bare tag.
    #[serde(with = "units::size")]
    pub tag_key: usize,
    /// A tag's value.
    #[serde(with = "units::size")]
    pub tag_value: usize,
    /// Values packed in a line or record.
    pub values: usize,
    /// The least sample rate.
    pub sample_rate_min: f64,
    /// A member of a set.
    #[serde(with = "units::size")]
    pub set_member: usize,
    /// Objects and arrays inside each other.
    pub json_depth: usize,
    /// Records of one HTTP request.
    pub samples: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            line: 8_192,
            name: 512,
            identity: 4_096,
            tags: 32,
            tag_key: 128,
            tag_value: 512,
            values: 1_024,
            sample_rate_min: 1e-6,
            set_member: 512,
            json_depth: 16,
            samples: 100_000,
        }
    }
}

/// Takes what a [`Parser`] finds, in order. All borrows are for the call only.
pub trait Sink {
    /// A good sample. Whether its identity names a series is for [`series_key`] to say; where it does not, the sample is
    /// rejected for the reason given there.
    fn sample(&mut self, sample: &Sample<'_>);
    /// A good event.
    fn event(&mut self, event: &Event<'_>);
    /// A good service check.
    fn service_check(&mut self, check: &ServiceCheck<'_>);
    /// A line, a sample of a line or a JSON record that is not accepted. A line whose identity is bad is rejected once
    /// and gives no samples, unless it has one good sample only: that one is handed over, and [`series_key`] finds it.
    fn reject(&mut self, reject: &Reject<'_>);
    /// Tags that were dropped, where no [`series_key`] will say so: of a JSON record, or of a line without a good sample.
    fn bad_tags(&mut self, count: u32);
    /// A line that was not blank, or a JSON record, ends here.
    fn line_end(&mut self);
}

/// What was not accepted, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reject<'a> {
    /// Why.
    pub reason: Reason,
    /// The line of the datagram or stream, or the record of a JSON array, from 1.
    pub line: u32,
    /// The byte of `bytes` where it went wrong, from 0; its length where something is missing at the end.
    pub column: usize,
    /// The line without blanks at its ends, or the record.
    pub bytes: &'a [u8],
}

/// `_e{..}`: something happened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Event<'a> {
    /// What, in a few words.
    pub title: Cow<'a, str>,
    /// What, at length.
    pub text: Cow<'a, str>,
    /// `d:`, seconds.
    pub timestamp: Option<u64>,
    /// `h:`
    pub host: Option<&'a str>,
    /// `k:`, events of one kind.
    pub aggregation_key: Option<&'a str>,
    /// `p:`
    pub priority: Priority,
    /// `s:`, what reported it.
    pub source_type: Option<&'a str>,
    /// `t:`
    pub severity: Severity,
    /// The last tag field, as on the line; [`tag_list`] takes it apart.
    pub tags: Option<&'a str>,
    /// `c:`
    pub container_id: Option<&'a str>,
}

/// How urgent an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// `low`
    Low,
    /// `normal`
    #[default]
    Normal,
}

impl Priority {
    /// As it stands on a line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Low, Self::Normal].into_iter().find(|one| one.name() == text)
    }
}

/// How bad an event is; DogStatsD's "alert type".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Severity {
    /// `error`
    Error,
    /// `warning`
    Warning,
    /// `info`
    #[default]
    Info,
    /// `success`
    Success,
}

impl Severity {
    /// As it stands on a line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Success => "success",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Error, Self::Warning, Self::Info, Self::Success].into_iter().find(|one| one.name() == text)
    }
}

/// `_sc|..`: how a service is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServiceCheck<'a> {
    /// Of the check.
    pub name: &'a str,
    /// What it found.
    pub status: Status,
    /// `d:`, seconds.
    pub timestamp: Option<u64>,
    /// `h:`
    pub host: Option<&'a str>,
    /// The last tag field, as on the line; [`tag_list`] takes it apart.
    pub tags: Option<&'a str>,
    /// `m:`
    pub message: Option<Cow<'a, str>>,
    /// `c:`
    pub container_id: Option<&'a str>,
}

/// The status of a service check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Status {
    /// `0`
    Ok,
    /// `1`
    Warning,
    /// `2`
    Critical,
    /// `3`
    #[default]
    Unknown,
}

impl Status {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "0" => Some(Self::Ok),
            "1" => Some(Self::Warning),
            "2" => Some(Self::Critical),
            "3" => Some(Self::Unknown),
            _ => None,
        }
    }
}

/// The tags of an event's or service check's tag field, `key:value` or bare; those without a key are left out.
pub fn tag_list(field: &str) -> impl Iterator<Item = &str> {
    dogstatsd::tags(field).filter(|tag| !tag.starts_with(':'))
}

/// What an HTTP body was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Body {
    /// One record.
    Object,
    /// An array of so many records, perhaps of none.
    Array(usize),
    /// So many lines that are not blank, each of them a record or rejected by itself.
    Lines(usize),
    /// No JSON at all; it was rejected as a whole.
    #[default]
    Invalid,
    /// More than `limits.samples` records, so many; nothing of it was handed over.
    TooMany(usize),
}

/// Reads bytes. It keeps scratch memory, so one is made for each worker and used again and again.
#[derive(Debug)]
pub struct Parser {
    config: Config,
    limits: Limits,
    scratch: Scratch,
}

/// Memory that samples borrow from for the length of a call.
#[derive(Debug, Default)]
struct Scratch {
    numbers: Vec<f64>,
    fields: Vec<u8>,
    key: String,
}

impl Parser {
    /// A parser by these settings.
    pub fn new(config: &Config, limits: &Limits) -> Self {
        Self { config: config.clone(), limits: limits.clone(), scratch: Scratch::default() }
    }

    /// Reads a datagram: one JSON document, else lines.
    pub fn datagram(&mut self, bytes: &[u8], sink: &mut impl Sink) {
        let bytes = lines::without_bom(bytes);
        if lines::may_be_document(bytes) && self.document(bytes, sink) {
            return;
        }
        // Text as a whole is text in each of its lines.
        let is_text = is_text(bytes);
        let mut rest = bytes;
        let mut number = 0;
        while !rest.is_empty() {
            number += 1;
            if is_text && let Some(length) = self.fast().first_line(rest, sink) {
                rest = &rest[length..];
                continue;
            }
            let (line, after) = lines::split(rest);
            rest = after;
            if is_text { self.any_line(line, number, sink) } else { self.one_line(line, number, sink) }
        }
    }

    /// Reads a datagram by the plain grammar alone: what [`Parser::datagram`] is compared with.
    pub fn datagram_plainly(&mut self, bytes: &[u8], sink: &mut impl Sink) {
        let bytes = lines::without_bom(bytes);
        if lines::may_be_document(bytes) && self.document(bytes, sink) {
            return;
        }
        for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
            self.any_line(line, number, sink);
        }
    }

    /// Reads one line of a stream, without its LF. The first line is number 1.
    pub fn line(&mut self, line: &[u8], number: u32, sink: &mut impl Sink) {
        let line = if number == 1 { lines::without_bom(line) } else { line };
        self.one_line(line, number, sink);
    }

    /// Reads an HTTP body: one record, an array of them, or one record a line.
    pub fn body(&mut self, body: &[u8], sink: &mut impl Sink) -> Body {
        let body = lines::without_bom(body);
        self.json_body(body, sink)
    }

    /// Reads an HTTP body that is said to be one record a line.
    pub fn body_of_lines(&mut self, body: &[u8], sink: &mut impl Sink) -> Body {
        self.json_lines(lines::without_bom(body), sink)
    }

    fn one_line(&mut self, line: &[u8], number: u32, sink: &mut impl Sink) {
        if !is_text(line) || !self.fast().line(line, sink) {
            self.any_line(line, number, sink);
        }
    }

    #[inline]
    fn fast(&mut self) -> statsd::Fast<'_> {
        let Self { config, limits, scratch } = self;
        statsd::Fast { sign: config.gauge_sign, limits, numbers: &mut scratch.numbers }
    }

    /// Reads a line by the plain grammar.
    fn any_line(&mut self, line: &[u8], number: u32, sink: &mut impl Sink) {
        let line = lines::trim(line);
        if line.len() > self.limits.line {
            sink.reject(&Reject { reason: Reason::LineTooLong, line: number, column: self.limits.line, bytes: line });
            sink.line_end();
        } else {
            self.sized_line(line, number, sink);
        }
    }

    /// Reads a trimmed line whose length is not too large.
    fn sized_line(&mut self, line: &[u8], number: u32, sink: &mut impl Sink) {
        let reject = |reason, column| Reject { reason, line: number, column, bytes: line };
        if line.is_empty() {
            return;
        }
        match str::from_utf8(line).map(|text| (lines::form(text), text)) {
            Err(error) => sink.reject(&reject(Reason::InvalidUtf8, error.valid_up_to())),
            // Each record ends for itself.
            Ok((lines::Form::Json, text)) => return self.json_line(text, number, sink),
            Ok((lines::Form::Metric, _)) => self.metric(line, number, sink),
            Ok((lines::Form::Event, text)) => match dogstatsd::event(text) {
                Ok(event) => sink.event(&event),
                Err(column) => sink.reject(&reject(Reason::BadEvent, column)),
            },
            Ok((lines::Form::ServiceCheck, text)) => match dogstatsd::service_check(text) {
                Ok(check) => sink.service_check(&check),
                Err(column) => sink.reject(&reject(Reason::BadServiceCheck, column)),
            },
        }
        sink.line_end();
    }
}

/// Bytes as a person reads them: what is no printable ASCII is escaped, and so is the backslash.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            // The line may be JSON: its quotes are no harm here, and who prints them into a text escapes them.
            b'"' | b'\'' => text.push(char::from(*byte)),
            _ => text.extend(byte.escape_ascii().map(char::from)),
        }
    }
    text
}

/// Whether bytes are UTF-8. Nearly all are ASCII, which is seen at a glance.
#[inline]
fn is_text(bytes: &[u8]) -> bool {
    is_ascii(bytes) || str::from_utf8(bytes).is_ok()
}

/// As the standard library's, which goes byte by byte over what is left of its chunks: too slow for packets of one line.
/// The last bytes are looked at twice instead.
#[inline]
fn is_ascii(bytes: &[u8]) -> bool {
    const HIGH_BITS: u64 = u64::from_ne_bytes([0x80; 8]);
    let Some(last) = bytes.last_chunk::<32>() else { return bytes.is_ascii() };
    let (chunks, _) = bytes.as_chunks::<32>();
    let any = |chunk: &[u8; 32]| chunk.as_chunks().0.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word));
    chunks.iter().fold(any(last), |all, chunk| all | any(chunk)) & HIGH_BITS == 0
}

/// Where `part` begins in `whole`, of which it is a part.
fn offset(whole: &[u8], part: &[u8]) -> usize {
    (part.as_ptr() as usize).wrapping_sub(whole.as_ptr() as usize).min(whole.len())
}
