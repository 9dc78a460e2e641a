//! The words that every part shares: a [`Sample`] is one reading as a client sent it, and a [`SeriesKey`] is the name
//! under which readings of the same thing meet.
//!
//! Nothing here allocates but [`SeriesKey`] and [`Tags`], which are made once, when an identity is first seen.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

/// How far each log of records that is read by position has been read: its name, and the position of the next record.
/// What is counted of such records and how far they were read is kept together, so that none counts twice.
pub type Marks = BTreeMap<Arc<str>, i64>;

/// What a series is. Together with the [`SeriesKey`] it names one series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub enum Kind {
    /// Increments and decrements, added up.
    Counter,
    /// The last value, or what changes made of it.
    Gauge,
    /// Observations in milliseconds.
    Timer,
    /// Observations without a unit.
    Histogram,
    /// Observations without a unit, as DogStatsD's `d` says it.
    Distribution,
    /// Distinct values.
    Set,
    /// Marks and their rates.
    Meter,
}

impl Kind {
    /// Every kind, in the order of their declaration.
    pub const ALL: [Self; 7] =
        [Self::Counter, Self::Gauge, Self::Timer, Self::Histogram, Self::Distribution, Self::Set, Self::Meter];

    /// The letters that stand for the kind on the wire, in store keys and in the journal.
    pub const fn letter(self) -> &'static str {
        match self {
            Self::Counter => "c",
            Self::Gauge => "g",
            Self::Timer => "ms",
            Self::Histogram => "h",
            Self::Distribution => "d",
            Self::Set => "s",
            Self::Meter => "m",
        }
    }

    /// The reverse of [`Kind::letter`].
    pub fn from_letter(letter: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.letter() == letter)
    }

    /// The name of the kind in JSON, as in `"type":"TIMER"`.
    pub const fn json(self) -> &'static str {
        match self {
            Self::Counter => "COUNTER",
            Self::Gauge => "GAUGE",
            Self::Timer => "TIMER",
            Self::Histogram => "HISTOGRAM",
            Self::Distribution => "DISTRIBUTION",
            Self::Set => "SET",
            Self::Meter => "METER",
        }
    }

    /// The reverse of [`Kind::json`], in any letter case.
    pub fn from_json(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.json().eq_ignore_ascii_case(name))
    }

    /// Whether samples of this kind are observations with a distribution.
    pub const fn is_observed(self) -> bool {
        matches!(self, Self::Timer | Self::Histogram | Self::Distribution)
    }
}

/// The type field of a line, before it is known what its series keeps: two wire types differ from their kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WireType {
    /// The type of the series itself.
    Plain(Kind),
    /// statsite's `kv`, kept as a gauge.
    KeyValue,
    /// brubeck's `C`: an absolute counter, kept as a counter of differences.
    AbsoluteCounter,
}

impl WireType {
    /// The kind of series that keeps samples of this type.
    pub const fn kind(self) -> Kind {
        match self {
            Self::Plain(kind) => kind,
            Self::KeyValue => Kind::Gauge,
            Self::AbsoluteCounter => Kind::Counter,
        }
    }
}

/// The value field of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Finite readings, one or, when packed, several; never empty.
    Numbers(&'a [f64]),
    /// Changes of a gauge (`+3`, `-3`); never empty.
    Changes(&'a [f64]),
    /// The member of a set.
    Member(&'a [u8]),
}

impl Value<'_> {
    /// How many values it holds.
    pub const fn count(&self) -> usize {
        match self {
            Self::Numbers(numbers) | Self::Changes(numbers) => numbers.len(),
            Self::Member(_) => 1,
        }
    }
}

/// Where the name and the tags of a sample stand, undecoded. Two spellings of one series are two identities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Identity<'a> {
    /// As on a line.
    Line {
        /// All before the value's colon: the name, and tags of the dialects that put them there.
        name: &'a [u8],
        /// From behind the first `|#` to the end of the last tag field, other fields between them included; empty
        /// without tags.
        tags: &'a [u8],
    },
    /// Already in the form of a [`SeriesKey`], as JSON input gives it.
    Key(&'a str),
}

impl Identity<'_> {
    /// How many bytes it has.
    pub const fn len(&self) -> usize {
        match self {
            Self::Line { name, tags } => name.len() + tags.len(),
            Self::Key(key) => key.len(),
        }
    }

    /// Whether it has none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One reading, or several packed ones, as sent. It borrows from the bytes that were received.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample<'a> {
    /// What the type field said.
    pub wire: WireType,
    /// Name and tags, undecoded.
    pub identity: Identity<'a>,
    /// What was read.
    pub value: Value<'a>,
    /// The share of readings that was sent, in (0, 1]; a reading stands for `1 / rate` of them.
    pub rate: f64,
    /// The time of the reading as sent, 0 for none: seconds on a line, seconds or milliseconds in JSON.
    pub timestamp: u64,
    /// The optional fields behind the type, from their first `|`, as on the line; for one of several samples of a line
    /// those that hold for all of them; of JSON input, the record.
    pub fields: &'a [u8],
}

/// Why a line, a part of it or a JSON record was not accepted. The list is fixed: it is a label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Reason {
    /// No colon, so no value.
    NoValue,
    /// Nothing before the colon, or nothing left of it.
    EmptyName,
    /// A control character in a name that is kept as sent.
    BadName,
    /// No type field.
    MissingType,
    /// A type that no dialect knows.
    UnknownType,
    /// Nothing where a value must be.
    EmptyValue,
    /// Not a number.
    BadValue,
    /// NaN or infinite, or a sum that would become so.
    NonFinite,
    /// A timer below zero.
    NegativeTimer,
    /// A rate that is no number in (0, 1], or below the limit.
    BadSampleRate,
    /// A timestamp that is no positive whole number.
    BadTimestamp,
    /// Brackets of SignalFX tags that do not match.
    MalformedTags,
    /// An event that does not say its own lengths.
    BadEvent,
    /// A service check without name or status.
    BadServiceCheck,
    /// Not JSON, or not a record.
    BadJson,
    /// Not UTF-8.
    InvalidUtf8,
    /// Longer than `limits.line`.
    LineTooLong,
    /// Name, or name with tags, longer than `limits.name`, `limits.identity`.
    NameTooLong,
    /// More than `limits.tags`.
    TooManyTags,
    /// A tag longer than `limits.tag_key`, `limits.tag_value`.
    TagTooLong,
    /// More packed values than `limits.values`.
    TooManyValues,
    /// A member of a set longer than `limits.set_member`.
    MemberTooLong,
    /// A line that is the request line of an HTTP client.
    HttpRequest,
    /// A stream's line or packet that was begun and not ended, within `limits.partial_line` or at all.
    PartialLine,
    /// On a unix stream of packets, four bytes that cannot be the length of one.
    BadLength,
    /// A client that speaks TLS to an address that does not.
    TlsHello,
    /// By a unix socket, from a process of a user that may not send there.
    PeerDenied,
}

impl Reason {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 27] = [
        Self::NoValue,
        Self::EmptyName,
        Self::BadName,
        Self::MissingType,
        Self::UnknownType,
        Self::EmptyValue,
        Self::BadValue,
        Self::NonFinite,
        Self::NegativeTimer,
        Self::BadSampleRate,
        Self::BadTimestamp,
        Self::MalformedTags,
        Self::BadEvent,
        Self::BadServiceCheck,
        Self::BadJson,
        Self::InvalidUtf8,
        Self::LineTooLong,
        Self::NameTooLong,
        Self::TooManyTags,
        Self::TagTooLong,
        Self::TooManyValues,
        Self::MemberTooLong,
        Self::HttpRequest,
        Self::PartialLine,
        Self::BadLength,
        Self::TlsHello,
        Self::PeerDenied,
    ];

    /// The name of the reason in metrics, JSON and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoValue => "no_value",
            Self::EmptyName => "empty_name",
            Self::BadName => "bad_name",
            Self::MissingType => "missing_type",
            Self::UnknownType => "unknown_type",
            Self::EmptyValue => "empty_value",
            Self::BadValue => "bad_value",
            Self::NonFinite => "non_finite",
            Self::NegativeTimer => "negative_timer",
            Self::BadSampleRate => "bad_sample_rate",
            Self::BadTimestamp => "bad_timestamp",
            Self::MalformedTags => "malformed_tags",
            Self::BadEvent => "bad_event",
            Self::BadServiceCheck => "bad_service_check",
            Self::BadJson => "bad_json",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::LineTooLong => "line_too_long",
            Self::NameTooLong => "name_too_long",
            Self::TooManyTags => "too_many_tags",
            Self::TagTooLong => "tag_too_long",
            Self::TooManyValues => "too_many_values",
            Self::MemberTooLong => "member_too_long",
            Self::HttpRequest => "http_request",
            Self::PartialLine => "partial_line",
            Self::BadLength => "bad_length",
            Self::TlsHello => "tls_hello",
            Self::PeerDenied => "peer_denied",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The tags of a series: (key, value) pairs, a bare tag without value, sorted, each pair once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Tags(Vec<(String, Option<String>)>);

impl Tags {
    /// Sorts the pairs and drops those that are there twice.
    pub fn new(mut pairs: Vec<(String, Option<String>)>) -> Self {
        pairs.sort_unstable();
        pairs.dedup();
        Self(pairs)
    }

    /// The pairs in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, Option<&str>)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_deref()))
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What `%`-encoding hides in a key, because the key's own grammar, a URL path or a terminal would read it.
const ENCODED: &AsciiSet = &CONTROLS.add(b'%').add(b';').add(b'=').add(b'/');

/// Name and sorted tags as one text: `name` or `name;tag=value;flag`. Equal series have equal keys.
///
/// `%`, `;`, `=`, `/` and control characters inside a name or a tag are percent-encoded; all else stands as it is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SeriesKey(Box<str>);

impl SeriesKey {
    /// The key of a name with tags.
    pub fn new(name: &str, tags: &Tags) -> Self {
        let mut text = String::with_capacity(name.len() + 16 * tags.len());
        Self::write(&mut text, name, tags.iter());
        Self(text.into_boxed_str())
    }

    /// Appends the key of a name with tags, which are sorted and there once, to a text.
    pub fn write<'a>(text: &mut String, name: &str, tags: impl Iterator<Item = (&'a str, Option<&'a str>)>) {
        text.extend(utf8_percent_encode(name, ENCODED));
        for (key, value) in tags {
            text.push(';');
            text.extend(utf8_percent_encode(key, ENCODED));
            if let Some(value) = value {
                text.push('=');
                text.extend(utf8_percent_encode(value, ENCODED));
            }
        }
    }

    /// Reads a key as a person or a URL spells it: tags in any order, anything percent-encoded that need not be.
    /// Bytes that do not decode to UTF-8 are replaced, so such a text names no series.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.split(';');
        let decode = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
        let name = decode(parts.next().unwrap_or_default());
        let tags = parts.filter(|part| !part.is_empty()).map(|part| match part.split_once('=') {
            Some((key, value)) => (decode(key), Some(decode(value))),
            None => (decode(part), None),
        });
        Self::new(&name, &Tags::new(tags.collect()))
    }

    /// Takes a text that [`SeriesKey::as_str`] gave earlier, as the journal and the store do.
    pub fn from_canonical(text: &str) -> Self {
        Self(text.into())
    }

    /// The whole key.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, decoded.
    pub fn name(&self) -> Cow<'_, str> {
        let name = self.0.split(';').next().unwrap_or_default();
        percent_decode_str(name).decode_utf8_lossy()
    }

    /// The two halves of the dotted name as JSON shows them: before the first dot and behind it. Where one of them
    /// would be empty, the level is, and the name is whole.
    pub fn level_and_name(&self) -> (String, String) {
        let name = self.name();
        match name.split_once('.') {
            Some((level, rest)) if !level.is_empty() && !rest.is_empty() => (level.to_owned(), rest.to_owned()),
            _ => (String::new(), name.into_owned()),
        }
    }

    /// The tags, decoded, in order.
    pub fn tags(&self) -> impl Iterator<Item = (Cow<'_, str>, Option<Cow<'_, str>>)> {
        let decode = |part| percent_decode_str(part).decode_utf8_lossy();
        self.0.split(';').skip(1).map(move |part| match part.split_once('=') {
            Some((key, value)) => (decode(key), Some(decode(value))),
            None => (decode(part), None),
        })
    }
}

impl fmt::Debug for SeriesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for SeriesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_parsed_from_what_it_prints() {
        let tags = Tags::new(vec![
            ("z".into(), Some("a=b;c%/\n".into())),
            ("flag".into(), None),
            ("k".into(), Some(String::new())),
            ("flag".into(), None),
        ]);
        let key = SeriesKey::new("a.b/c", &tags);
        assert_eq!(key.as_str(), "a.b%2Fc;flag;k=;z=a%3Db%3Bc%25%2F%0A");
        assert_eq!(SeriesKey::parse(key.as_str()), key);
        assert_eq!(SeriesKey::parse("a.b%2fc;z=a%3db%3bc%25%2F%0a;k=;flag"), key);
        assert_eq!(key.name(), "a.b/c");
        assert_eq!(key.level_and_name(), ("a".to_owned(), "b/c".to_owned()));
        let back: Vec<_> = key.tags().map(|(k, v)| (k.into_owned(), v.map(Cow::into_owned))).collect();
        assert_eq!(Tags::new(back), tags);
    }

    #[test]
    fn kinds_are_found_by_their_names() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_letter(kind.letter()), Some(kind));
            assert_eq!(Kind::from_json(&kind.json().to_lowercase()), Some(kind));
        }
    }
}
