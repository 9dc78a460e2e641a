//! Records in JSON: one object, an array of them, or one a line.
//!
//! A document is checked as a whole before anything of it is handed over, and then read record by record, borrowing what
//! it can. It has a reader of its own: of documents that a general one refuses, users expect the other records to count
//! (a number out of range), or another reason (`NaN`), and depth is bounded before it is recursed into. The limits
//! `json_depth`, `samples`, `values`, `set_member`, `sample_rate_min` and those of identities are enforced here.

use std::borrow::Cow;
use std::fmt::Write;

use memchr::memchr2;

use super::{Body, Config, GaugeSign, Limits, Parser, Reject, Scratch, Sink, lines, number, offset, tags};
use crate::sample::{Identity, Kind, Reason, Sample, SeriesKey, Tags, Value, WireType};

/// How a JSON record names its series, as sent: what a [`SeriesKey`] does not tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The first half of the dotted name, empty without.
    pub level: String,
    /// The second half.
    pub name: String,
    /// `key:value`, or as an array had them, sorted.
    pub tags: Vec<String>,
}

/// Reads the naming fields of a record that was accepted, as [`Sample::fields`] has it.
pub fn record(text: &[u8]) -> Option<Record> {
    let fields = Fields::read(str::from_utf8(text).ok()?).ok()?;
    let text = |raw: Option<&str>| raw.and_then(string).unwrap_or_default().into_owned();
    let (tags, _) = fields.tags();
    let mut tags: Vec<String> = tags.into_iter().map(|tag| tag.text).collect();
    tags.sort_unstable();
    Some(Record { level: text(fields.level), name: text(fields.name), tags })
}

impl Parser {
    /// Reads a datagram that may be one document. Whether it was: if not, nothing was handed over.
    pub(super) fn document(&mut self, bytes: &[u8], sink: &mut impl Sink) -> bool {
        let Ok(text) = str::from_utf8(lines::trim_document(bytes)) else { return false };
        match Document::read(text, self.limits.json_depth) {
            Err(_) => false,
            Ok(Document::Many(records)) => {
                self.records(&records, sink);
                true
            }
            Ok(Document::One(record)) => {
                let (bad_tags, reading) = self.read(record);
                let Ok(reading) = reading else { return false };
                self.accept(record, &reading, bad_tags, sink);
                sink.line_end();
                true
            }
        }
    }

    /// Reads a line that is a document.
    pub(super) fn json_line(&mut self, line: &str, number: u32, sink: &mut impl Sink) {
        match Document::read(line, self.limits.json_depth) {
            Ok(Document::Many(records)) => self.records(&records, sink),
            document @ (Ok(Document::One(_)) | Err(_)) => self.one_record(document, line, number, sink),
        }
    }

    /// Reads an HTTP body that is said to be one record a line: what is wrong in a line stays there. Many lines that are
    /// one document are read as that.
    pub(super) fn json_lines(&mut self, body: &[u8], sink: &mut impl Sink) -> Body {
        let is_document = |text: &str| Document::read(text, self.limits.json_depth).is_ok();
        let lines = || body.split(|byte| *byte == b'\n').map(lines::trim);
        let count = lines().filter(|line| !line.is_empty()).count();
        if count == 0 || str::from_utf8(body).is_ok_and(is_document) {
            return self.json_body(body, sink);
        }
        if count > self.limits.samples {
            return Body::TooMany(count);
        }
        for (number, line) in (1..).zip(lines()).filter(|(_, line)| !line.is_empty()) {
            match str::from_utf8(line) {
                Ok(text) => self.one_record(Document::read(text, self.limits.json_depth), text, number, sink),
                Err(error) => {
                    let column = error.valid_up_to();
                    sink.reject(&Reject { reason: Reason::InvalidUtf8, line: number, column, bytes: line });
                    sink.line_end();
                }
            }
        }
        Body::Lines(count)
    }

    /// Reads a line that is one record, as a look at it as a document has shown.
    fn one_record<'a>(
        &mut self,
        document: Result<Document<'a>, Fault<'a>>,
        line: &'a str,
        number: u32,
        sink: &mut impl Sink,
    ) {
        if let Err(fault) = document.and_then(|_| self.single(line, sink)) {
            sink.reject(&fault.reject(number, line));
        }
        sink.line_end();
    }

    /// Reads an HTTP body.
    pub(super) fn json_body(&mut self, body: &[u8], sink: &mut impl Sink) -> Body {
        let text = match str::from_utf8(body) {
            Ok(text) => text,
            Err(error) => {
                let column = error.valid_up_to();
                sink.reject(&Reject { reason: Reason::InvalidUtf8, line: 1, column, bytes: body });
                sink.line_end();
                return Body::Invalid;
            }
        };
        let document = Document::read(text, self.limits.json_depth);
        if let Ok(Document::Many(records)) = document {
            if records.len() > self.limits.samples {
                return Body::TooMany(records.len());
            }
            self.records(&records, sink);
            return Body::Array(records.len());
        }
        let form = if document.is_ok() { Body::Object } else { Body::Invalid };
        let Err(fault) = document.and_then(|_| self.single(text, sink)) else {
            sink.line_end();
            return Body::Object;
        };
        match record_lines(text) {
            Some(count) if count > self.limits.samples => Body::TooMany(count),
            Some(count) => {
                for (number, line) in (1..).zip(body.split(|byte| *byte == b'\n')) {
                    self.sized_line(lines::trim(line), number, sink);
                }
                Body::Lines(count)
            }
            None => {
                sink.reject(&fault.reject(1, text));
                sink.line_end();
                form
            }
        }
    }

    /// Reads the records of an array. Dropped tags of bad records count too, where they came to be looked at.
    fn records(&mut self, records: &[&str], sink: &mut impl Sink) {
        for (number, record) in (1..).zip(records) {
            match self.read(record) {
                (bad_tags, Ok(reading)) => self.accept(record, &reading, bad_tags, sink),
                (bad_tags, Err(fault)) => {
                    if bad_tags > 0 {
                        sink.bad_tags(bad_tags);
                    }
                    sink.reject(&fault.reject(number, record));
                }
            }
            sink.line_end();
        }
    }

    /// Reads a text that is one record.
    fn single<'a>(&mut self, text: &'a str, sink: &mut impl Sink) -> Result<(), Fault<'a>> {
        let (bad_tags, reading) = self.read(text);
        self.accept(text.trim(), &reading?, bad_tags, sink);
        Ok(())
    }

    fn accept(&self, record: &str, reading: &Reading<'_>, bad_tags: u32, sink: &mut impl Sink) {
        if bad_tags > 0 {
            sink.bad_tags(bad_tags);
        }
        let Scratch { numbers, key, .. } = &self.scratch;
        let value = match &reading.member {
            Some(member) => Value::Member(member.as_bytes()),
            None if reading.is_change => Value::Changes(numbers),
            None => Value::Numbers(numbers),
        };
        let Reading { wire, rate, timestamp, .. } = *reading;
        let fields = record.as_bytes();
        sink.sample(&Sample { wire, identity: Identity::Key(key), value, rate, timestamp, fields });
    }

    /// Reads a record: how many of its tags were dropped, and what it says. Key and numbers are left in the scratch.
    fn read<'a>(&mut self, record: &'a str) -> (u32, Result<Reading<'a>, Fault<'a>>) {
        let mut bad_tags = 0;
        let fields = Fields::read(record);
        let reading = fields
            .and_then(|fields| fields.reading(record, &self.config, &self.limits, &mut self.scratch, &mut bad_tags));
        (bad_tags, reading)
    }
}

/// How many records there are, if a body that is no document is one record a line: more than one, all of them objects.
/// A line of white space that is not trimmed off lines is none of them, and still read.
fn record_lines(text: &str) -> Option<usize> {
    let lines = || text.split('\n').map(|line| line.trim_matches(lines::is_space)).filter(|line| !line.is_empty());
    let are_objects = lines().nth(1).is_some() && lines().all(|line| line.starts_with('{') && line.ends_with('}'));
    let read = text.split('\n').filter(|line| !lines::trim(line.as_bytes()).is_empty());
    are_objects.then(|| read.count())
}

/// Why a document or record is bad, and the part of it that is the reason.
#[derive(Debug, Clone, Copy)]
struct Fault<'a> {
    reason: Reason,
    at: &'a str,
}

impl<'a> Fault<'a> {
    fn new(reason: Reason, at: &'a str) -> Self {
        Self { reason, at }
    }

    fn reject(&self, line: u32, text: &'a str) -> Reject<'a> {
        let bytes = text.as_bytes();
        Reject { reason: self.reason, line, column: offset(bytes, self.at.as_bytes()), bytes }
    }
}

/// A document that is JSON throughout.
enum Document<'a> {
    One(&'a str),
    Many(Vec<&'a str>),
}

impl<'a> Document<'a> {
    fn read(text: &'a str, depth: usize) -> Result<Self, Fault<'a>> {
        let mut reader = Reader { text, at: 0, lone_surrogate: None };
        let mut records = Vec::new();
        reader.blanks();
        let start = reader.at;
        let is_array = reader.peek() == Some(b'[');
        if is_array {
            reader.items(depth, &mut |record| records.push(record))?;
        } else {
            reader.skip(depth)?;
        }
        let one = &text[start..reader.at];
        reader.blanks();
        if reader.at < text.len() {
            return Err(reader.fault());
        }
        if let Some(at) = reader.lone_surrogate {
            return Err(Fault::new(Reason::BadJson, at));
        }
        match records[..] {
            [inner] if inner.starts_with('[') => Err(Fault::new(Reason::BadJson, inner)),
            _ if is_array => Ok(Self::Many(records)),
            _ => Ok(Self::One(one)),
        }
    }
}

/// The fields of a record that mean something, as they stand. Of equal keys the last one counts.
#[derive(Default)]
struct Fields<'a> {
    level: Option<&'a str>,
    name: Option<&'a str>,
    wire: Option<&'a str>,
    /// `rate`, `sampleRate`, `sample_rate`: the first that is there counts.
    rates: [Option<&'a str>; 3],
    tags: Option<&'a str>,
    timestamp: Option<&'a str>,
    value: Option<&'a str>,
    values: Option<&'a str>,
    delta: Option<&'a str>,
}

/// What a record says, but for its key and its numbers.
struct Reading<'a> {
    wire: WireType,
    member: Option<Cow<'a, str>>,
    is_change: bool,
    rate: f64,
    timestamp: u64,
}

/// A tag as sent, and where its key ends, which in an array only a colon tells.
struct Tag {
    text: String,
    key_end: Option<usize>,
}

impl<'a> Fields<'a> {
    fn read(record: &'a str) -> Result<Self, Fault<'a>> {
        let mut reader = Reader { text: record, at: 0, lone_surrogate: None };
        let mut fields = Self::default();
        reader.blanks();
        if reader.peek() != Some(b'{') {
            return Err(Fault::new(Reason::BadJson, record));
        }
        // The document was checked with its depth; here it is only walked.
        reader.members(usize::MAX, &mut |key, value| match string(key).as_deref() {
            Some("level") => fields.level = Some(value),
            Some("name") => fields.name = Some(value),
            Some("type") => fields.wire = Some(value),
            Some("rate") => fields.rates[0] = Some(value),
            Some("sampleRate") => fields.rates[1] = Some(value),
            Some("sample_rate") => fields.rates[2] = Some(value),
            Some("tags") => fields.tags = Some(value),
            Some("timestamp") => fields.timestamp = Some(value),
            Some("value") => fields.value = Some(value),
            Some("values") => fields.values = Some(value),
            Some("delta") => fields.delta = Some(value),
            Some(_) | None => {}
        })?;
        Ok(fields)
    }

    fn reading(
        &self,
        record: &'a str,
        config: &Config,
        limits: &Limits,
        scratch: &mut Scratch,
        bad_tags: &mut u32,
    ) -> Result<Reading<'a>, Fault<'a>> {
        let missing = &record[record.len()..];
        let fault = |reason, at: Option<&'a str>| Fault::new(reason, at.unwrap_or(missing));
        let text = |raw: Option<&'a str>| raw.and_then(string).filter(|text| !text.is_empty());

        let name = text(self.name).ok_or(fault(Reason::EmptyName, self.name))?;
        let wire = text(self.wire).ok_or(fault(Reason::MissingType, self.wire))?;
        let wire = wire_type(&wire).ok_or(fault(Reason::UnknownType, self.wire))?;
        let rate = self.rates.into_iter().flatten().next();
        let rate = rate.map_or(Some(1.0), rate_of).ok_or(fault(Reason::BadSampleRate, rate))?;
        let (tags, bad) = self.tags();
        *bad_tags = bad;
        let timestamp =
            self.timestamp.map_or(Some(0), timestamp_of).ok_or(fault(Reason::BadTimestamp, self.timestamp))?;
        let member = if wire.kind() == Kind::Set {
            Some(self.value.and_then(member).ok_or(fault(Reason::EmptyValue, self.value))?)
        } else {
            self.numbers(wire, missing, &mut scratch.numbers)?;
            None
        };
        let reading = Reading { wire, member, is_change: self.is_change(wire, config), rate, timestamp };
        let key = level_and_name(text(self.level), name);
        match reading.past_limits(&scratch.numbers, limits).or_else(|| write_key(&key, tags, limits, &mut scratch.key))
        {
            Some(reason) => Err(fault(reason, self.name)),
            None => Ok(reading),
        }
    }

    fn numbers(&self, wire: WireType, missing: &'a str, numbers: &mut Vec<f64>) -> Result<(), Fault<'a>> {
        numbers.clear();
        if let (WireType::Plain(Kind::Gauge), Some(delta)) = (wire, self.delta) {
            numbers.push(number_of(delta)?);
            return Ok(());
        }
        match (self.values, self.value) {
            (Some(values), _) if !values.starts_with('[') => return Err(Fault::new(Reason::BadValue, values)),
            (Some(values), _) => {
                let mut fault = None;
                let mut reader = Reader { text: values, at: 0, lone_surrogate: None };
                reader.items(usize::MAX, &mut |item| match number_of(item) {
                    Ok(number) => numbers.push(number),
                    Err(bad) => fault = fault.or(Some(bad)),
                })?;
                if let Some(fault) = fault {
                    return Err(fault);
                }
                if numbers.is_empty() {
                    return Err(Fault::new(Reason::EmptyValue, values));
                }
            }
            (None, Some(value)) => numbers.push(number_of(value)?),
            (None, None) if wire == WireType::Plain(Kind::Meter) => numbers.push(1.0),
            (None, None) => return Err(Fault::new(Reason::EmptyValue, missing)),
        }
        if wire == WireType::Plain(Kind::Timer) && numbers.iter().any(|number| *number < 0.0) {
            return Err(Fault::new(Reason::NegativeTimer, self.values.or(self.value).unwrap_or(missing)));
        }
        Ok(())
    }

    /// `delta`, or a text with a sign, changes a gauge.
    fn is_change(&self, wire: WireType, config: &Config) -> bool {
        let is_signed = || {
            let text = self.value.and_then(string).unwrap_or_default();
            text.trim_start_matches(lines::is_space).starts_with(['+', '-'])
        };
        wire == WireType::Plain(Kind::Gauge)
            && (self.delta.is_some() || (config.gauge_sign == GaugeSign::Relative && is_signed()))
    }

    /// The tags, and how many were dropped because their value is no text, number or boolean.
    fn tags(&self) -> (Vec<Tag>, u32) {
        let Some(raw) = self.tags else { return (Vec::new(), 0) };
        let mut items: Vec<(Option<Cow<'_, str>>, &str)> = Vec::new();
        let mut reader = Reader { text: raw, at: 0, lone_surrogate: None };
        // The walk cannot fail: the document was checked.
        let _walked = match raw.as_bytes()[0] {
            b'{' => reader.members(usize::MAX, &mut |key, value| items.push((string(key), value))),
            b'[' => reader.items(usize::MAX, &mut |value| items.push((None, value))),
            _ => Ok(()),
        };
        // Equal keys stay in their order, and the last of them counts.
        items.sort_by(|a, b| a.0.cmp(&b.0));
        let is_last = |at: usize, key: &Option<Cow<'_, str>>| items.get(at + 1).is_none_or(|next| next.0 != *key);
        let kept = items.iter().enumerate().filter(|(at, (key, _))| key.is_none() || is_last(*at, key));
        let mut bad = 0;
        let mut tags = Vec::new();
        for (_, (key, value)) in kept {
            match (key, tag_text(value)) {
                (_, None) => bad += 1,
                (Some(key), Some(value)) => {
                    tags.push(Tag { text: format!("{key}:{value}"), key_end: Some(key.len()) });
                }
                (None, Some(text)) => tags.push(Tag { key_end: text.find(':'), text: text.into_owned() }),
            }
        }
        (tags, bad)
    }
}

impl Reading<'_> {
    fn past_limits(&self, numbers: &[f64], limits: &Limits) -> Option<Reason> {
        match &self.member {
            Some(member) if member.len() > limits.set_member => Some(Reason::MemberTooLong),
            None if numbers.len() > limits.values => Some(Reason::TooManyValues),
            Some(_) | None if self.rate < limits.sample_rate_min => Some(Reason::BadSampleRate),
            Some(_) | None => None,
        }
    }
}

/// `level.name`
fn level_and_name<'a>(level: Option<Cow<'a, str>>, name: Cow<'a, str>) -> Cow<'a, str> {
    match level {
        Some(level) => format!("{level}.{name}").into(),
        None => name,
    }
}

/// Writes the key of a series, or says which limit forbids it.
fn write_key(name: &str, tags: Vec<Tag>, limits: &Limits, key: &mut String) -> Option<Reason> {
    let pair = |mut tag: Tag| match tag.key_end {
        Some(end) => {
            let value = tag.text[end + 1..].to_owned();
            tag.text.truncate(end);
            // A bare tag is shown with an empty text, so that is how it is sent.
            (tag.text, Some(value).filter(|value| !value.is_empty()))
        }
        None => (tag.text, None),
    };
    // Neither key nor value is no tag.
    let pairs = tags.into_iter().map(pair).filter(|(key, value)| !key.is_empty() || value.is_some());
    let tags = Tags::new(pairs.collect());
    if let Err(reason) = tags::check(name, &tags, limits) {
        return Some(reason);
    }
    key.clear();
    SeriesKey::write(key, name, tags.iter());
    (key.len() > limits.identity).then_some(Reason::NameTooLong)
}

fn wire_type(name: &str) -> Option<WireType> {
    match name {
        "kv" => Some(WireType::KeyValue),
        "C" => Some(WireType::AbsoluteCounter),
        _ => Kind::from_letter(name).or_else(|| Kind::from_json(name)).map(WireType::Plain),
    }
}

/// A text as it is meant; `None` for what is no text.
fn string(raw: &str) -> Option<Cow<'_, str>> {
    let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
    Some(if memchr::memchr(b'\\', inner.as_bytes()).is_none() { inner.into() } else { unescape(inner).into() })
}

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let (c, length) = match after.as_bytes().first() {
            Some(b'u') => unicode_escape(after),
            Some(b'b') => ('\x08', 1),
            Some(b'f') => ('\x0c', 1),
            Some(b'n') => ('\n', 1),
            Some(b'r') => ('\r', 1),
            Some(b't') => ('\t', 1),
            // A quotation mark, a backslash or a slash; the reader let no other through.
            Some(other) => (char::from(*other), 1),
            None => break,
        };
        out.push(c);
        rest = &after[length..];
    }
    out.push_str(rest);
    out
}

/// What `uXXXX`, or a pair of them with a backslash between, stands for, and its length.
fn unicode_escape(text: &str) -> (char, usize) {
    match (hex4(text, 1), hex4(text, 7)) {
        (Some(high @ 0xD800..=0xDBFF), Some(low @ 0xDC00..=0xDFFF)) => {
            let code = 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
            (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 11)
        }
        (Some(code), _) => (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 5),
        (None, _) => (char::REPLACEMENT_CHARACTER, 1),
    }
}

fn hex4(text: &str, at: usize) -> Option<u32> {
    let digits = text.as_bytes().get(at..at + 4).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
    u32::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

fn is_number(raw: &str) -> bool {
    matches!(raw.as_bytes().first(), Some(b'-' | b'0'..=b'9'))
}

/// A number, or a text that is one.
fn number_of(raw: &str) -> Result<f64, Fault<'_>> {
    let value = match raw.as_bytes().first() {
        Some(b'"') => number::parse(string(raw).unwrap_or_default().as_bytes()),
        Some(b'-' | b'0'..=b'9') => number::parse(raw.as_bytes()),
        Some(b'n') | None => Err(Reason::EmptyValue),
        Some(_) => Err(Reason::BadValue),
    };
    value.map_err(|reason| Fault::new(reason, raw))
}

fn rate_of(raw: &str) -> Option<f64> {
    if is_number(raw) { number::parse_rate(raw.as_bytes()).ok() } else { None }
}

fn timestamp_of(raw: &str) -> Option<u64> {
    number::parse_whole(raw.as_bytes()).filter(|timestamp| *timestamp > 0)
}

/// A member of a set: a text, or another value's own spelling.
fn member(raw: &str) -> Option<Cow<'_, str>> {
    match raw.as_bytes().first() {
        Some(b'"') => string(raw),
        Some(b'n') | None => None,
        Some(_) => {
            let mut out = String::new();
            respell(raw, &mut out);
            Some(out.into())
        }
    }
}

fn tag_text(raw: &str) -> Option<Cow<'_, str>> {
    match raw.as_bytes().first() {
        Some(b'"') => string(raw),
        Some(b't' | b'f') => Some(raw.into()),
        Some(_) if is_number(raw) => Some(respell_number(raw)),
        Some(_) | None => None,
    }
}

/// Writes a value as Python's `json.dumps` does, so that the same value is always the same member.
fn respell(raw: &str, out: &mut String) {
    let mut reader = Reader { text: raw, at: 0, lone_surrogate: None };
    match raw.as_bytes().first() {
        Some(b'"') => respell_text(&string(raw).unwrap_or_default(), out),
        Some(b'[') => {
            out.push('[');
            let mut between = "";
            let _walked = reader.items(usize::MAX, &mut |item| {
                out.push_str(between);
                respell(item, out);
                between = ", ";
            });
            out.push(']');
        }
        Some(b'{') => {
            out.push('{');
            let mut between = "";
            let _walked = reader.members(usize::MAX, &mut |key, value| {
                out.push_str(between);
                respell_text(&string(key).unwrap_or_default(), out);
                out.push_str(": ");
                respell(value, out);
                between = ", ";
            });
            out.push('}');
        }
        Some(_) if is_number(raw) => out.push_str(&respell_number(raw)),
        Some(_) | None => out.push_str(raw),
    }
}

fn respell_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String does not fail.
                    let _written = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

/// A whole number as it stands; another as the shortest digits that mean it, with an exponent from 1e16 on and below
/// 1e-4.
fn respell_number(raw: &str) -> Cow<'_, str> {
    if !raw.contains(['.', 'e', 'E']) {
        return if raw == "-0" { "0".into() } else { raw.into() };
    }
    let value: f64 = raw.parse().unwrap_or(0.0);
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent @ -4..16) => {
            let plain = value.to_string();
            if exponent >= 0 && !plain.contains('.') { format!("{plain}.0").into() } else { plain.into() }
        }
        Ok(exponent) if exponent < 0 => format!("{digits}e-{:02}", -exponent).into(),
        Ok(_) | Err(_) => format!("{digits}e+{exponent:0>2}").into(),
    }
}

/// Goes over JSON text and finds where its values begin and end.
struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// The first escape of half a character, which is no text.
    lone_surrogate: Option<&'a str>,
}

type Each<'f, 'a> = &'f mut dyn FnMut(&'a str);
type EachMember<'f, 'a> = &'f mut dyn FnMut(&'a str, &'a str);

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    fn fault(&self) -> Fault<'a> {
        // What is not understood may begin inside a character.
        let at = (self.at..=self.text.len()).find(|at| self.text.is_char_boundary(*at)).unwrap_or(self.text.len());
        Fault::new(Reason::BadJson, &self.text[at..])
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> Result<(), Fault<'a>> {
        if self.peek() != Some(byte) {
            return Err(self.fault());
        }
        self.at += 1;
        Ok(())
    }

    /// Goes over one value, at most `depth` objects and arrays deep.
    fn skip(&mut self, depth: usize) -> Result<(), Fault<'a>> {
        match self.peek() {
            Some(b'{') => self.members(depth, &mut |_, _| {}),
            Some(b'[') => self.items(depth, &mut |_| {}),
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(_) => self.word(),
            None => Err(self.fault()),
        }
    }

    fn value(&mut self, depth: usize) -> Result<&'a str, Fault<'a>> {
        self.blanks();
        let start = self.at;
        self.skip(depth)?;
        let value = &self.text[start..self.at];
        self.blanks();
        Ok(value)
    }

    fn items(&mut self, depth: usize, each: Each<'_, 'a>) -> Result<(), Fault<'a>> {
        let depth = depth.checked_sub(1).ok_or(self.fault())?;
        self.take(b'[')?;
        self.blanks();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            each(self.value(depth)?);
            if self.peek() != Some(b',') {
                return self.take(b']');
            }
            self.at += 1;
        }
    }

    fn members(&mut self, depth: usize, each: EachMember<'_, 'a>) -> Result<(), Fault<'a>> {
        let depth = depth.checked_sub(1).ok_or(self.fault())?;
        self.take(b'{')?;
        self.blanks();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.blanks();
            let start = self.at;
            if self.peek() != Some(b'"') {
                return Err(self.fault());
            }
            self.string()?;
            let key = &self.text[start..self.at];
            self.blanks();
            self.take(b':')?;
            each(key, self.value(depth)?);
            if self.peek() != Some(b',') {
                return self.take(b'}');
            }
            self.at += 1;
        }
    }

    fn string(&mut self) -> Result<(), Fault<'a>> {
        self.at += 1;
        loop {
            let length = memchr2(b'"', b'\\', self.rest()).ok_or(self.fault())?;
            if let Some(control) = self.rest()[..length].iter().position(|byte| *byte < b' ') {
                self.at += control;
                return Err(self.fault());
            }
            self.at += length;
            if self.peek() == Some(b'"') {
                self.at += 1;
                return Ok(());
            }
            self.escape()?;
        }
    }

    fn escape(&mut self) -> Result<(), Fault<'a>> {
        let escape = &self.text[self.at..];
        match escape.as_bytes().get(1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 2,
            Some(b'u') => match (hex4(escape, 2), hex4(escape, 8)) {
                (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) if escape.as_bytes()[6..].starts_with(b"\\u") => {
                    self.at += 12;
                }
                (Some(0xD800..=0xDFFF), _) => {
                    self.lone_surrogate.get_or_insert(escape);
                    self.at += 6;
                }
                (Some(_), _) => self.at += 6,
                (None, _) => return Err(self.fault()),
            },
            Some(_) | None => return Err(self.fault()),
        }
        Ok(())
    }

    fn number(&mut self) -> Result<(), Fault<'a>> {
        if self.rest().starts_with(b"-Infinity") {
            return Err(Fault::new(Reason::NonFinite, &self.text[self.at..]));
        }
        self.at += usize::from(self.peek() == Some(b'-'));
        match self.peek() {
            Some(b'0') => self.at += 1,
            Some(b'1'..=b'9') => self.at += digits(self.rest()),
            Some(_) | None => return Err(self.fault()),
        }
        if let [b'.', fraction @ ..] = self.rest() {
            let length = digits(fraction);
            self.at += if length > 0 { 1 + length } else { 0 };
        }
        if let [b'e' | b'E', exponent @ ..] = self.rest() {
            let sign = usize::from(matches!(exponent.first(), Some(b'+' | b'-')));
            let length = digits(&exponent[sign..]);
            self.at += if length > 0 { 1 + sign + length } else { 0 };
        }
        Ok(())
    }

    fn word(&mut self) -> Result<(), Fault<'a>> {
        for word in ["true", "false", "null"] {
            if self.rest().starts_with(word.as_bytes()) {
                self.at += word.len();
                return Ok(());
            }
        }
        let is_constant = self.rest().starts_with(b"NaN") || self.rest().starts_with(b"Infinity");
        if is_constant { Err(Fault::new(Reason::NonFinite, &self.text[self.at..])) } else { Err(self.fault()) }
    }
}

fn digits(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| byte.is_ascii_digit()).count()
}
