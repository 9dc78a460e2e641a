//! `GET /metrics`: every series of the ledger in Prometheus' text format 0.0.4, in OpenMetrics 1.0 or in its protobuf
//! messages, which have native histograms, then our own metrics. Reads the ledger alone, takes no lock, and writes as the
//! client reads, 64 KiB at a time, so that its text is never in memory at once. It always answers, whatever clients call
//! their series. Metrics: `SCRAPE_SECONDS`, `CONFLICTS`, `SCRAPE_PARTIAL`.
//!
//! # Names
//!
//! Names and labels are rewritten as statsd_exporter 0.30 does it: characters outside `[a-zA-Z0-9_]`, the colon among
//! them, become `_`, a run of dashes a single one, and a digit at the beginning gets `_` before it. A tag without a value
//! is no label (to Prometheus an empty label is none). Labels that become equal join their values with `,`.
//!
//! What collides then is resolved in this order, and listed by [`conflicts`]:
//! 1. A label called `le`, `quantile` or `__...`, and `window` of a meter's rates, gets `exported_` before it.
//! 2. A family that would share a sample name with one of our own gets `_client` behind it.
//! 3. Series of one type, name and labels are one series: added; of gauges the newest. Timers, histograms and
//!    distributions are one type here, as in statsd_exporter; a gauge and a set are two.
//! 4. Of two families that would share a sample name (`a` of two types; `a_sum` beside a summary `a`), the later one gets
//!    its type behind its name, as often as it takes. A family is as old as its oldest series; then the type letter
//!    decides, then the name.
//!
//! Where a mapping rule ([`crate::mapping`]) matches a series, name and labels are what the rule makes of them; what
//! collides then is resolved in the same way. [`Mapper`] asks the rules once for each series.
//!
//! In OpenMetrics a counter's samples end in `_total`, so there `a` and `a_total` are one name.

mod accept;
mod figures;
mod mapped;
mod names;
mod native;
mod own;
mod protobuf;
mod write;

use std::convert::Infallible;
use std::io::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::body::{Body, Bytes, Frame};
use hyper::header::HeaderMap;
use serde::{Deserialize, Serialize};

pub use self::accept::{Format, Wanted};
pub use self::mapped::{Mapped, Mapper, Unmapped};
use self::names::{Class, Index, Marks, rewritten};
use self::write::Writer;
use crate::clock::Clock;
pub use crate::mapping::ObserverType;
use crate::mapping::{Action, Mapping, Metric};
use crate::sample::{Kind, SeriesKey};
use crate::telemetry;
use crate::units::Time;

/// `[prometheus]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How timers, histograms and distributions are shown.
    pub observer_type: ObserverType,
    /// The quantiles of a summary, in [0, 1]; they are of the last closed and the current window.
    pub quantiles: Vec<f64>,
    /// The upper bounds of a histogram's buckets, rising; `+Inf` is added.
    pub buckets: Vec<f64>,
    /// Whether clients that take OpenMetrics get it.
    pub openmetrics: bool,
    /// Whether clients that ask for protobuf get it, with native histograms where the observer type is histogram.
    pub native_histograms: bool,
    /// By how much the buckets of a native histogram grow at most; 2^(1/64) is the least.
    pub native_bucket_factor: f64,
    /// How many buckets a native histogram has at most, before they become coarser; 0: no bound but `limits.buckets`.
    pub native_max_buckets: u32,
    /// Series without samples for so long are not shown; `0s`: as long as they are in memory.
    pub expire: Time,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            observer_type: ObserverType::Summary,
            quantiles: vec![0.5, 0.9, 0.99],
            buckets: vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
            openmetrics: false,
            native_histograms: true,
            native_bucket_factor: 1.1,
            native_max_buckets: 256,
            expire: Time::secs(0),
        }
    }
}

impl Config {
    /// Checks what a type can't say.
    pub fn check(&self) -> Result<(), Error> {
        let share = |quantile: &&f64| !(0.0..=1.0).contains(*quantile);
        if let Some(quantile) = self.quantiles.iter().find(share) {
            return Err(Error::Quantile(*quantile));
        }
        if let Some(bound) = self.buckets.iter().find(|bound| !bound.is_finite()) {
            return Err(Error::InfiniteBucket(*bound));
        }
        if let Some(pair) = self.buckets.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(Error::BucketOrder(pair[1]));
        }
        let factor = self.native_bucket_factor;
        if factor.is_finite() && factor > 1.0 { Ok(()) } else { Err(Error::BucketFactor(factor)) }
    }
}

/// What is wrong with a [`Config`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Error {
    /// A quantile that is no share.
    Quantile(f64),
    /// A bound that is not finite.
    InfiniteBucket(f64),
    /// A bound that is not above the one before it.
    BucketOrder(f64),
    /// A factor by which nothing grows.
    BucketFactor(f64),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Quantile(quantile) => {
                write!(f, "prometheus.quantiles: {quantile} is no quantile; give numbers from 0 to 1")
            }
            Self::InfiniteBucket(bound) => {
                write!(f, "prometheus.buckets: {bound} is not finite; leave it out, +Inf is always added")
            }
            Self::BucketOrder(bound) => {
                write!(f, "prometheus.buckets: {bound} is not above the bound before it; give them in rising order")
            }
            Self::BucketFactor(factor) => write!(
                f,
                "prometheus.native_bucket_factor: {factor} is not above 1; give a number such as 1.1, or turn \
                 prometheus.native_histograms off"
            ),
        }
    }
}

impl std::error::Error for Error {}

/// When a scrape is made.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// The wall clock, in milliseconds since the epoch.
    pub now_ms: u64,
    /// The clock that takes no steps, by which rates go.
    pub steady_ms: u64,
    /// The length of a window.
    pub window_ms: u64,
}

/// By whose rules series are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Those of the text format, where a name is any name.
    Plain,
    /// Those of OpenMetrics, where the samples of counters end in `_total`.
    OpenMetrics,
}

/// The answer to a scrape: the headers, and the body, which is written while it is read.
///
/// The series are named and ordered before this returns, which takes about 0.2 us each; a server calls it where that
/// delays no one else.
pub fn respond(
    headers: &HeaderMap,
    series: impl Into<Mapped>,
    config: &Config,
    moment: Moment,
    own: telemetry::Exporter,
) -> hyper::Response<Page> {
    let wanted = Wanted::of(headers, config);
    let mut response = hyper::Response::new(Page::new(series, wanted, config, moment, Some(own)));
    *response.headers_mut() = wanted.headers();
    response
}

/// How much is written at a time.
const CHUNK: usize = 64 << 10;

/// An exposition, in pieces.
#[derive(Debug)]
pub struct Page {
    part: Part,
    writer: Writer,
    conflicts: usize,
    nameless: u64,
    unmapped: Option<usize>,
    own: Option<telemetry::Exporter>,
    format: Format,
    gzip: Option<GzEncoder<Vec<u8>>>,
    /// Time spent on it so far; what the client takes to read doesn't count.
    spent: Duration,
    clock: Clock,
}

/// What is written next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Clients,
    Own,
    Done,
}

impl Page {
    /// The exposition of these series and, with `own`, of our own metrics.
    pub fn new(
        series: impl Into<Mapped>,
        wanted: Wanted,
        config: &Config,
        moment: Moment,
        own: Option<telemetry::Exporter>,
    ) -> Self {
        let clock = Clock::default();
        let series = series.into();
        let nameless = series.nameless;
        let index = index(series, wanted.format.names(config), config, moment);
        let conflicts = index.conflicts();
        let unmapped = index.rules.mapping().map(|_| index.rules.unmapped());
        let writer = Writer::new(index, wanted.format, config, moment);
        let gzip = wanted.gzip.then(|| GzEncoder::new(Vec::new(), Compression::fast()));
        let spent = clock.monotonic();
        Self {
            part: Part::Clients,
            writer,
            conflicts,
            nameless,
            unmapped,
            own,
            format: wanted.format,
            gzip,
            spent,
            clock,
        }
    }

    /// The next piece, about 64 KiB before compression; `None` behind the last.
    pub fn next_chunk(&mut self) -> Option<Bytes> {
        while self.part != Part::Done {
            let start = self.clock.monotonic();
            let mut out = Vec::with_capacity(CHUNK + (CHUNK >> 3));
            match self.part {
                Part::Clients => {
                    if !self.writer.fill(&mut out, CHUNK) {
                        self.part = Part::Own;
                    }
                }
                Part::Own => {
                    self.write_own(&mut out);
                    self.part = Part::Done;
                }
                Part::Done => {}
            }
            let out = self.compressed(out);
            self.spent += self.clock.monotonic().saturating_sub(start);
            if !out.is_empty() {
                return Some(out.into());
            }
        }
        None
    }

    fn write_own(&mut self, out: &mut Vec<u8>) {
        if let Some(own) = self.own.take() {
            telemetry::CONFLICTS.gauge(&[]).set(self.conflicts as f64);
            telemetry::SCRAPE_PARTIAL.gauge(&["illegal_negative_counter"]).set(self.writer.figures.negative as f64);
            if let Some(unmapped) = self.unmapped {
                telemetry::SCRAPE_PARTIAL.gauge(&["empty_metric_name"]).set(self.nameless as f64);
                telemetry::SCRAPE_UNMAPPED.gauge(&[]).set(unmapped as f64);
            }
            telemetry::SCRAPE_SECONDS.histogram(&[]).record(self.spent.as_secs_f64());
            match self.format {
                Format::Text => out.extend_from_slice(own.render(false).as_bytes()),
                Format::OpenMetrics => out.extend_from_slice(own.render(true).as_bytes()),
                Format::Protobuf => own::write(&own.render(false), out),
            }
        }
        if self.format == Format::OpenMetrics {
            out.extend_from_slice(b"# EOF\n");
        }
    }

    /// The text itself, or what the compressor gives for it, which may be nothing yet.
    fn compressed(&mut self, text: Vec<u8>) -> Vec<u8> {
        let Some(gzip) = &mut self.gzip else { return text };
        // Writing into memory does not fail.
        let _ = gzip.write_all(&text);
        if self.part == Part::Done {
            let _ = gzip.try_finish();
        }
        std::mem::take(gzip.get_mut())
    }
}

impl Body for Page {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.get_mut().next_chunk().map(|chunk| Ok(Frame::data(chunk))))
    }
}

fn index(series: Mapped, names: Names, config: &Config, moment: Moment) -> Index {
    Index::new(series.unexpired(config, moment), names, config.observer_type)
}

/// What a series is called in the text format, name and labels, before other series are looked at: two for a meter, none
/// where a mapping rule drops it or gives it an empty name.
pub fn shown_as(kind: Kind, key: &SeriesKey, mapping: Option<&Mapping>, config: &Config) -> Vec<String> {
    let name = key.name();
    let found = mapping.and_then(|mapping| mapping.find(Metric::of(kind), &name));
    let style = found.as_ref().map(|found| &found.rule.style).or(mapping.map(Mapping::defaults));
    let observer_type = style.and_then(|style| style.observer_type).unwrap_or(config.observer_type);
    let given = match &found {
        Some(found) if found.rule.action == Action::Drop => return Vec::new(),
        Some(found) => match mapped::given(found, key) {
            Some(given) => Some(given),
            None => return Vec::new(),
        },
        None => None,
    };
    let (key, mapped) = (given.as_ref().unwrap_or(key), given.is_some());
    let line = |class: &Class| {
        let (text, name_len, _) = rewritten(key, *class, Names::Plain, mapped);
        let (name, labels) = text.as_str().as_bytes().split_at(name_len);
        write::line(name, labels.get(1..).unwrap_or_default())
    };
    Class::of(kind, observer_type).iter().map(line).collect()
}

/// A series that is not shown under the plain rewriting of its own name, as at `GET /data/conflicts`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// The key of the series.
    pub key: String,
    /// Its kind, as in JSON.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What it is shown as in the text format: name and labels.
    pub shown: String,
    /// Why.
    pub causes: Vec<Cause>,
}

/// Why a series is not shown under the plain rewriting of its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// One of our own families has the name: `_client` behind it.
    OwnName,
    /// A label has a reserved name: `exported_` before it.
    ReservedLabel,
    /// An older family has the name: the type behind it.
    TypeClash,
    /// Another series of its type has the same name and labels: added, or of gauges the newest.
    SameName,
}

impl Cause {
    const MARKS: [(Self, Marks); 4] = [
        (Self::OwnName, Marks::OWN),
        (Self::ReservedLabel, Marks::LABEL),
        (Self::TypeClash, Marks::RENAMED),
        (Self::SameName, Marks::MERGED),
    ];
}

/// The series of which the text format does not show the plain rewriting of their names, sorted by key; as many as
/// `CONFLICTS` counts. A meter stands there once for each of its families concerned.
pub fn conflicts(series: impl Into<Mapped>, config: &Config, moment: Moment) -> Vec<Conflict> {
    let index = index(series.into(), Names::Plain, config, moment);
    let marked = index.entries.iter().filter(|entry| entry.marks.any());
    let mut found: Vec<Conflict> = marked
        .map(|entry| {
            let series = &index.sources[entry.source as usize];
            let causes = Cause::MARKS.iter().filter(|(_, mark)| entry.marks.has(*mark));
            Conflict {
                key: series.key().as_str().to_owned(),
                kind: Kind::json(series.kind()),
                shown: write::line_name(&index, entry),
                causes: causes.map(|(cause, _)| *cause).collect(),
            }
        })
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests;
