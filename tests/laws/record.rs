//! What a parser hands over, kept to be compared.

use tallyd::protocol::{Event, Reject, ServiceCheck, Sink};
use tallyd::sample::{Identity, Reason, Sample, Value, WireType};

/// A call of a sink.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// `sample`
    Sample(Reading),
    /// `event`, as text.
    Event(String),
    /// `service_check`, as text.
    ServiceCheck(String),
    /// `reject`
    Reject {
        /// Why.
        reason: Reason,
        /// Line or record.
        line: u32,
        /// Byte of it.
        column: usize,
        /// The line or record.
        bytes: Vec<u8>,
    },
    /// `bad_tags`
    BadTags(u32),
    /// `line_end`
    LineEnd,
}

/// A sample that borrows nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Its type.
    pub wire: WireType,
    /// Its identity.
    pub name: Name,
    /// Its value.
    pub values: Readings,
    /// Its rate.
    pub rate: f64,
    /// Its timestamp.
    pub timestamp: u64,
    /// Its optional fields.
    pub fields: Vec<u8>,
}

/// An identity that borrows nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Name {
    /// Name and tags as on a line.
    Line(Vec<u8>, Vec<u8>),
    /// A series key.
    Key(String),
}

/// A value that borrows nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Readings {
    /// Numbers.
    Numbers(Vec<f64>),
    /// Changes of a gauge.
    Changes(Vec<f64>),
    /// The member of a set.
    Member(Vec<u8>),
}

impl Name {
    /// Borrowed again.
    pub fn identity(&self) -> Identity<'_> {
        match self {
            Self::Line(name, tags) => Identity::Line { name, tags },
            Self::Key(key) => Identity::Key(key),
        }
    }
}

impl From<&Sample<'_>> for Reading {
    fn from(sample: &Sample<'_>) -> Self {
        let name = match sample.identity {
            Identity::Line { name, tags } => Name::Line(name.to_vec(), tags.to_vec()),
            Identity::Key(key) => Name::Key(key.to_owned()),
        };
        let values = match sample.value {
            Value::Numbers(numbers) => Readings::Numbers(numbers.to_vec()),
            Value::Changes(numbers) => Readings::Changes(numbers.to_vec()),
            Value::Member(member) => Readings::Member(member.to_vec()),
        };
        let Sample { wire, rate, timestamp, fields, .. } = *sample;
        Self { wire, name, values, rate, timestamp, fields: fields.to_vec() }
    }
}

/// Writes down all that it is given.
#[derive(Debug, Default)]
pub struct Record {
    /// The calls in their order.
    pub calls: Vec<Call>,
}

impl Sink for Record {
    fn sample(&mut self, sample: &Sample<'_>) {
        self.calls.push(Call::Sample(sample.into()));
    }

    fn event(&mut self, event: &Event<'_>) {
        self.calls.push(Call::Event(format!("{event:?}")));
    }

    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        self.calls.push(Call::ServiceCheck(format!("{check:?}")));
    }

    fn reject(&mut self, reject: &Reject<'_>) {
        let Reject { reason, line, column, bytes } = *reject;
        self.calls.push(Call::Reject { reason, line, column, bytes: bytes.to_vec() });
    }

    fn bad_tags(&mut self, count: u32) {
        self.calls.push(Call::BadTags(count));
    }

    fn line_end(&mut self) {
        self.calls.push(Call::LineEnd);
    }
}
