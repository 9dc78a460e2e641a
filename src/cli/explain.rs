//! `tallyd explain`: how a line is understood, or why it is rejected, where, and what was probably meant.
//!
//! It goes the way that an agent's worker goes, parser and then series key, and keeps what it finds; then the way of a
//! scrape, mapping rule and then Prometheus' name. `--json` prints one
//! object for each line, or one for all of standard input as a datagram or an HTTP body.

#[cfg(test)]
mod tests;
mod text;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;

use serde::{Serialize, Serializer};

use super::{Code, Failure, Layers};
use crate::http::scrape;
use crate::ingest::{KeptCheck, KeptEvent};
use crate::mapping::{Mapping, Metric as Mapped};
use crate::protocol::{self, Config, Event, Extras, Limits, Parser, Reject, ServiceCheck, Sink};
use crate::sample::{Identity, Kind, Sample, SeriesKey, Value, WireType};

/// Arguments of `explain`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration to read by; of it, the sections protocol, limits, mapping and prometheus matter.
    #[command(flatten)]
    pub layers: Layers,
    /// Print JSON, one object for each input
    #[arg(long)]
    pub json: bool,
    /// Take all of standard input as one datagram
    #[arg(long, conflicts_with = "body")]
    pub datagram: bool,
    /// Take all of standard input as the body of POST /ingest/metrics
    #[arg(long)]
    pub body: bool,
    /// Lines such as 'page.views:1|c'; without any, those of standard input
    #[arg(value_name = "LINE", conflicts_with_all = ["datagram", "body"])]
    pub lines: Vec<OsString>,
}

/// Explains what it is given. Where something is rejected it says so and fails with [`Code::Data`].
pub fn run(args: &Args, mut stdin: impl Read, out: &mut impl Write) -> Result<(), Failure> {
    let config = args.layers.load_for_lines()?.config;
    let mut reader = Reader::new(&config.protocol, &config.limits.protocol);
    let mut input = Vec::new();
    if args.lines.is_empty() {
        stdin.read_to_end(&mut input).map_err(|error| Failure::told(Code::Io, format!("standard input: {error}")))?;
    }
    let form = match (args.datagram, args.body) {
        (true, _) => Form::Datagram,
        (_, true) => Form::Body,
        (false, false) => Form::Line,
    };
    let inputs: Vec<&[u8]> = match form {
        Form::Line if !args.lines.is_empty() => args.lines.iter().map(|line| line.as_bytes()).collect(),
        Form::Line => input.strip_suffix(b"\n").unwrap_or(&input).split(|byte| *byte == b'\n').collect(),
        Form::Datagram | Form::Body => vec![&input],
    };
    let mut rejected = 0;
    for bytes in inputs {
        let mut found = reader.read(bytes, form);
        found.metrics.iter_mut().for_each(|metric| metric.show(config.mapping.rules.as_deref(), &config.prometheus));
        rejected += found.errors.len();
        if args.json {
            serde_json::to_writer(&mut *out, &found).map_err(std::io::Error::from)?;
            writeln!(out)?;
        } else {
            text::write(&found, bytes, out)?;
        }
    }
    out.flush()?;
    match rejected {
        0 => Ok(()),
        1 => Err(Failure::told(Code::Data, "rejected; correct the client, or see --set protocol.KEY=VALUE")),
        more => Err(Failure::told(
            Code::Data,
            format!("{more} rejected; correct the clients, or see --set protocol.KEY=VALUE"),
        )),
    }
}

/// What bytes are read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// One line, which is a datagram of its own.
    Line,
    /// Lines, or one JSON document.
    Datagram,
    /// The body of a request.
    Body,
}

/// Reads bytes by a configuration.
struct Reader {
    config: Config,
    limits: Limits,
    parser: Parser,
}

/// What was found in some bytes.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Found {
    metrics: Vec<Metric>,
    events: Vec<KeptEvent>,
    service_checks: Vec<KeptCheck>,
    errors: Vec<Rejected>,
    tag_errors: u32,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Metric {
    name: String,
    #[serde(rename = "type")]
    wire: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    values: Vec<Number>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    set_values: Vec<String>,
    rate: Number,
    tags: Vec<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    relative: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    external_data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cardinality: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    level: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    series: String,
    #[serde(skip)]
    kind: Option<Kind>,
    /// With a mapping file alone, so that without one the object is that of the conformance cases.
    #[serde(skip_serializing_if = "Option::is_none")]
    mapping: Option<Rule>,
    /// As a scrape shows it in the text format; nothing where it is not shown.
    #[serde(skip)]
    prometheus: Vec<String>,
}

/// What the mapping rules say of a metric.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Rule {
    /// The rule that matches: its place among `mappings` from 0, its line, its `match`; all null where none does.
    rule: Option<u32>,
    line: Option<usize>,
    #[serde(rename = "match")]
    pattern: Option<String>,
    match_type: Option<&'static str>,
    action: Option<&'static str>,
    /// Names and labels in a scrape; two for a meter.
    prometheus: Vec<String>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Rejected {
    line: u32,
    reason: &'static str,
    #[serde(skip)]
    column: usize,
    #[serde(skip)]
    bytes: Vec<u8>,
    #[serde(skip)]
    hint: Option<String>,
}

/// A number that is printed whole when it is.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.fract() == 0.0 && self.0.abs() < 1e15 {
            serializer.serialize_i64(self.0 as i64)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

impl Reader {
    fn new(config: &Config, limits: &Limits) -> Self {
        let parser = Parser::new(config, limits);
        Self { config: config.clone(), limits: limits.clone(), parser }
    }

    fn read(&mut self, bytes: &[u8], form: Form) -> Found {
        let Self { config, limits, parser } = self;
        let found = Found::default();
        let mut finding = Finding { config, limits, bytes, found, tag_errors_of_line: 0 };
        match form {
            Form::Line | Form::Datagram => parser.datagram(bytes, &mut finding),
            Form::Body => {
                let body = parser.body(bytes, &mut finding);
                if let protocol::Body::TooMany(records) = body {
                    let hint = format!("{records} records, more than limits.samples: answered 413");
                    let rejected =
                        Rejected { line: 1, reason: "too_many_samples", column: 0, bytes: vec![], hint: Some(hint) };
                    finding.found.errors.push(rejected);
                }
            }
        }
        finding.found
    }
}

/// Keeps what the parser hands over.
struct Finding<'a> {
    config: &'a Config,
    limits: &'a Limits,
    bytes: &'a [u8],
    found: Found,
    /// The samples of a line share its tags.
    tag_errors_of_line: u32,
}

impl Finding<'_> {
    /// The line of the input in which a part of it stands, and its number.
    fn line_of(&self, part: &[u8]) -> (u32, &[u8]) {
        let at = (part.as_ptr() as usize).wrapping_sub(self.bytes.as_ptr() as usize).min(self.bytes.len());
        let before = &self.bytes[..at];
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let line = self.bytes[start..].split(|byte| *byte == b'\n').next().unwrap_or_default();
        (before.iter().map(|byte| u32::from(*byte == b'\n')).sum::<u32>() + 1, line)
    }
}

impl Sink for Finding<'_> {
    fn sample(&mut self, sample: &Sample<'_>) {
        match protocol::series_key(&sample.identity, self.config, self.limits) {
            Ok((key, bad_tags)) => {
                self.tag_errors_of_line = bad_tags;
                self.found.metrics.push(Metric::new(sample, &key));
            }
            Err(reason) => {
                let name = match sample.identity {
                    Identity::Line { name, .. } => name,
                    Identity::Key(key) => key.as_bytes(),
                };
                let (line, bytes) = self.line_of(name);
                self.found.errors.push(Rejected::new(&Reject { reason, line, column: 0, bytes }));
            }
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        self.found.events.push(KeptEvent::from(event));
    }

    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        self.found.service_checks.push(KeptCheck::from(check));
    }

    fn reject(&mut self, reject: &Reject<'_>) {
        self.found.errors.push(Rejected::new(reject));
    }

    fn bad_tags(&mut self, count: u32) {
        self.found.tag_errors += count;
    }

    fn line_end(&mut self) {
        self.found.tag_errors += std::mem::take(&mut self.tag_errors_of_line);
    }
}

impl Metric {
    fn new(sample: &Sample<'_>, key: &SeriesKey) -> Self {
        let mut metric = match sample.identity {
            Identity::Line { .. } => Self::of_line(sample, key),
            Identity::Key(_) => Self::of_record(sample),
        };
        metric.wire = wire_name(sample.wire);
        metric.rate = Number(sample.rate);
        metric.timestamp = (sample.timestamp > 0).then_some(sample.timestamp);
        metric.series = key.as_str().to_owned();
        metric.kind = Some(sample.wire.kind());
        match sample.value {
            Value::Numbers(numbers) => metric.values = numbers.iter().copied().map(Number).collect(),
            Value::Changes(numbers) => {
                metric.values = numbers.iter().copied().map(Number).collect();
                metric.relative = true;
            }
            Value::Member(member) => metric.set_values = vec![lossy(member)],
        }
        metric
    }

    fn of_line(sample: &Sample<'_>, key: &SeriesKey) -> Self {
        let tag = |(tag, value): (std::borrow::Cow<'_, str>, Option<std::borrow::Cow<'_, str>>)| match value {
            Some(value) => format!("{tag}:{value}"),
            None => tag.into_owned(),
        };
        let mut tags: Vec<String> = key.tags().map(tag).collect();
        tags.sort_unstable();
        let extras = Extras::parse(sample.fields);
        Self {
            name: key.name().into_owned(),
            tags,
            container_id: extras.container_id.map(lossy),
            external_data: extras.external_data.map(lossy),
            cardinality: extras.cardinality.map(protocol::Cardinality::name),
            ..Self::default()
        }
    }

    /// Adds what becomes of the series in a scrape.
    fn show(&mut self, mapping: Option<&Mapping>, prometheus: &scrape::Config) {
        let Some(kind) = self.kind else { return };
        let key = SeriesKey::from_canonical(&self.series);
        self.prometheus = scrape::shown_as(kind, &key, mapping, prometheus);
        let name = key.name();
        self.mapping = mapping.map(|mapping| match mapping.find(Mapped::of(kind), &name) {
            Some(found) => Rule {
                rule: Some(found.number),
                line: Some(found.rule.line),
                pattern: Some(found.rule.pattern.clone()),
                match_type: Some(found.rule.match_type.name()),
                action: Some(found.rule.action.name()),
                prometheus: self.prometheus.clone(),
            },
            None => Rule { prometheus: self.prometheus.clone(), ..Rule::default() },
        });
    }

    fn of_record(sample: &Sample<'_>) -> Self {
        let Some(protocol::Record { level, name, tags }) = protocol::record(sample.fields) else {
            return Self::default();
        };
        let key = if level.is_empty() { name.clone() } else { format!("{level}.{name}") };
        let level = Some(level).filter(|level| !level.is_empty());
        Self { name, tags, level, key: Some(key), ..Self::default() }
    }
}

impl Rejected {
    fn new(reject: &Reject<'_>) -> Self {
        let Reject { reason, line, column, bytes } = *reject;
        Self { line, reason: reason.name(), column, bytes: bytes.to_vec(), hint: protocol::hint(reject) }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn wire_name(wire: WireType) -> &'static str {
    match wire {
        WireType::KeyValue => "kv",
        WireType::AbsoluteCounter => "abs_counter",
        WireType::Plain(Kind::Counter) => "counter",
        WireType::Plain(Kind::Gauge) => "gauge",
        WireType::Plain(Kind::Timer) => "timer",
        WireType::Plain(Kind::Histogram) => "histogram",
        WireType::Plain(Kind::Distribution) => "distribution",
        WireType::Plain(Kind::Set) => "set",
        WireType::Plain(Kind::Meter) => "meter",
    }
}
