//! The messages in which a scrape goes to who asks for protobuf: Prometheus' `io.prometheus.client.MetricFamily`
//! (`metrics.proto` of its client_model), each with its length before it. They carry what text cannot: native histograms,
//! and when a series began.
//!
//! Written by hand, because a scrape only ever writes eleven small messages, straight from its figures: a crate would want
//! them built in memory first, and `protoc` on every machine that compiles us.
//!
//! A family stands before its series, with its length, so it is gathered; one longer than half a chunk is sent in several
//! messages of the same name, which Prometheus takes one after the other. Counts are whole there but for histograms: those of
//! sampled observations, such as 1 / 0.3, are rounded in a summary, and in a histogram given both ways. A native histogram
//! has whole weights or floats throughout.

use percent_encoding::percent_decode;

use super::figures::{Figures, Observations, RATE_WINDOWS, Same};
use super::names::Class;
use super::native::{Native, ZERO_THRESHOLD, spans};
use super::write::{Kind, pairs};

/// The numbers of fields, by message.
mod field {
    pub(super) mod family {
        pub(in super::super) const NAME: u32 = 1;
        pub(in super::super) const HELP: u32 = 2;
        pub(in super::super) const TYPE: u32 = 3;
        pub(in super::super) const METRIC: u32 = 4;
    }
    pub(super) mod metric {
        pub(in super::super) const LABEL: u32 = 1;
        pub(in super::super) const GAUGE: u32 = 2;
        pub(in super::super) const COUNTER: u32 = 3;
        pub(in super::super) const SUMMARY: u32 = 4;
        pub(in super::super) const HISTOGRAM: u32 = 7;
    }
    pub(super) mod label {
        pub(in super::super) const NAME: u32 = 1;
        pub(in super::super) const VALUE: u32 = 2;
    }
    /// Counters and gauges.
    pub(super) mod number {
        pub(in super::super) const VALUE: u32 = 1;
        pub(in super::super) const CREATED: u32 = 3;
    }
    pub(super) mod summary {
        pub(in super::super) const COUNT: u32 = 1;
        pub(in super::super) const SUM: u32 = 2;
        pub(in super::super) const QUANTILE: u32 = 3;
        pub(in super::super) const CREATED: u32 = 4;
    }
    pub(super) mod quantile {
        pub(in super::super) const QUANTILE: u32 = 1;
        pub(in super::super) const VALUE: u32 = 2;
    }
    pub(super) mod histogram {
        pub(in super::super) const COUNT: u32 = 1;
        pub(in super::super) const SUM: u32 = 2;
        pub(in super::super) const BUCKET: u32 = 3;
        pub(in super::super) const COUNT_FLOAT: u32 = 4;
        pub(in super::super) const SCHEMA: u32 = 5;
        pub(in super::super) const ZERO_THRESHOLD: u32 = 6;
        pub(in super::super) const ZERO_COUNT: u32 = 7;
        pub(in super::super) const ZERO_COUNT_FLOAT: u32 = 8;
        pub(in super::super) const NEGATIVE: Side = Side { span: 9, delta: 10, count: 11 };
        pub(in super::super) const POSITIVE: Side = Side { span: 12, delta: 13, count: 14 };
        pub(in super::super) const CREATED: u32 = 15;

        /// The fields of the buckets above zero, or below.
        pub(in super::super) struct Side {
            pub(in super::super) span: u32,
            pub(in super::super) delta: u32,
            pub(in super::super) count: u32,
        }
    }
    pub(super) mod span {
        pub(in super::super) const OFFSET: u32 = 1;
        pub(in super::super) const LENGTH: u32 = 2;
    }
    pub(super) mod bucket {
        pub(in super::super) const COUNT: u32 = 1;
        pub(in super::super) const BOUND: u32 = 2;
        pub(in super::super) const COUNT_FLOAT: u32 = 4;
    }
    pub(super) mod timestamp {
        pub(in super::super) const SECONDS: u32 = 1;
        pub(in super::super) const NANOS: u32 = 2;
    }
}

/// One family after the other, each as one message or several.
#[derive(Debug, Default)]
pub(super) struct Families {
    /// Name, help and type of the family.
    head: Vec<u8>,
    /// Its series that are not yet written.
    series: Vec<u8>,
}

impl Families {
    pub(super) fn begin(&mut self, name: &[u8], help: &str, kind: Kind) {
        self.head.clear();
        let head = &mut self.head;
        bytes(head, field::family::NAME, name);
        bytes(head, field::family::HELP, help.as_bytes());
        let number = match kind {
            Kind::Counter => 0,
            Kind::Gauge => 1,
            Kind::Summary => 2,
            Kind::Histogram => 4,
        };
        whole(head, field::family::TYPE, number);
    }

    /// How many bytes are not yet written.
    pub(super) fn len(&self) -> usize {
        self.series.len()
    }

    /// Writes the series that there are, as a message of their family.
    pub(super) fn flush(&mut self, out: &mut Vec<u8>) {
        if !self.series.is_empty() {
            varint(out, (self.head.len() + self.series.len()) as u64);
            out.extend_from_slice(&self.head);
            out.append(&mut self.series);
        }
    }

    /// Adds a series; `first` is the first of its family.
    pub(super) fn series(
        &mut self,
        class: Class,
        labels: &[u8],
        same: &Same<'_>,
        first: &Same<'_>,
        figures: &mut Figures,
    ) {
        let start_ms = same.start_ms();
        let out = &mut self.series;
        let labelled = |out: &mut Vec<u8>| key_labels(out, labels);
        match class {
            Class::Counter => counter(out, labelled, figures.counter(same), Some(start_ms)),
            Class::MeterTotal => counter(out, labelled, figures.meter_total(same), Some(start_ms)),
            Class::Gauge => figures.gauge(same).into_iter().for_each(|value| gauge(out, labelled, value)),
            Class::Set => gauge(out, labelled, figures.set(same)),
            Class::MeterRate => {
                for ((window, _), rate) in RATE_WINDOWS.into_iter().zip(figures.meter_rates(same)) {
                    let labelled = |out: &mut Vec<u8>| {
                        key_labels(out, labels);
                        label(out, b"window", window.as_bytes());
                    };
                    gauge(out, labelled, rate);
                }
            }
            Class::Summary => summary(out, labelled, &figures.summary(same), start_ms),
            Class::Histogram => {
                let shown = figures.histogram(same, Some(first));
                let buckets = shown.points().map(|(bound, _, count)| (bound, count));
                let native = shown.native;
                histogram(
                    out,
                    labelled,
                    &Histogram { sum: shown.sum, count: shown.count, native, start_ms: Some(start_ms) },
                    buckets,
                );
            }
        }
    }

    /// Adds a counter, a gauge or a histogram with these labels; see [`super::own`].
    pub(super) fn add(&mut self, add: impl FnOnce(&mut Vec<u8>)) {
        add(&mut self.series);
    }
}

/// A counter with the labels that `labelled` writes.
pub(super) fn counter(out: &mut Vec<u8>, labelled: impl FnOnce(&mut Vec<u8>), value: f64, start_ms: Option<u64>) {
    message(out, field::family::METRIC, |out| {
        labelled(out);
        message(out, field::metric::COUNTER, |out| {
            double(out, field::number::VALUE, value);
            start_ms.into_iter().for_each(|start_ms| created(out, field::number::CREATED, start_ms));
        });
    });
}

/// A gauge with the labels that `labelled` writes.
pub(super) fn gauge(out: &mut Vec<u8>, labelled: impl FnOnce(&mut Vec<u8>), value: f64) {
    message(out, field::family::METRIC, |out| {
        labelled(out);
        message(out, field::metric::GAUGE, |out| double(out, field::number::VALUE, value));
    });
}

fn summary(out: &mut Vec<u8>, labelled: impl FnOnce(&mut Vec<u8>), shown: &Observations<'_>, start_ms: u64) {
    message(out, field::family::METRIC, |out| {
        labelled(out);
        message(out, field::metric::SUMMARY, |out| {
            whole(out, field::summary::COUNT, shown.count.round() as u64);
            double(out, field::summary::SUM, shown.sum);
            for (quantile, _, value) in shown.points() {
                message(out, field::summary::QUANTILE, |out| {
                    double(out, field::quantile::QUANTILE, quantile);
                    double(out, field::quantile::VALUE, value);
                });
            }
            created(out, field::summary::CREATED, start_ms);
        });
    });
}

/// What a histogram shows besides its classic buckets.
pub(super) struct Histogram<'n> {
    pub(super) sum: f64,
    pub(super) count: f64,
    pub(super) native: Option<&'n Native>,
    pub(super) start_ms: Option<u64>,
}

/// A histogram with the labels that `labelled` writes, and classic buckets: upper bounds, and counts up to each.
pub(super) fn histogram(
    out: &mut Vec<u8>,
    labelled: impl FnOnce(&mut Vec<u8>),
    shown: &Histogram<'_>,
    buckets: impl Iterator<Item = (f64, f64)>,
) {
    // Prometheus refuses a native histogram of whole numbers whose buckets do not add up to its count.
    let count = shown.native.filter(|native| native.is_whole()).map_or(shown.count, Native::count);
    message(out, field::family::METRIC, |out| {
        labelled(out);
        message(out, field::metric::HISTOGRAM, |out| {
            let is_float = shown.native.is_some_and(|native| !native.is_whole());
            either(out, field::histogram::COUNT, field::histogram::COUNT_FLOAT, count, is_float);
            double(out, field::histogram::SUM, shown.sum);
            for (bound, count) in buckets.chain([(f64::INFINITY, count)]) {
                message(out, field::histogram::BUCKET, |out| {
                    either(out, field::bucket::COUNT, field::bucket::COUNT_FLOAT, count, false);
                    double(out, field::bucket::BOUND, bound);
                });
            }
            shown.native.into_iter().for_each(|one| native(out, one));
            shown.start_ms.into_iter().for_each(|start_ms| created(out, field::histogram::CREATED, start_ms));
        });
    });
}

fn native(out: &mut Vec<u8>, native: &Native) {
    let is_whole = native.is_whole();
    signed(out, field::histogram::SCHEMA, native.schema.into());
    double(out, field::histogram::ZERO_THRESHOLD, ZERO_THRESHOLD);
    if is_whole {
        whole(out, field::histogram::ZERO_COUNT, native.zero as u64);
    } else {
        double(out, field::histogram::ZERO_COUNT_FLOAT, native.zero);
    }
    for (fields, buckets) in
        [(field::histogram::NEGATIVE, &native.negative), (field::histogram::POSITIVE, &native.positive)]
    {
        side(out, &fields, buckets, is_whole);
    }
}

/// Buckets on one side of zero.
fn side(out: &mut Vec<u8>, fields: &field::histogram::Side, buckets: &[(i32, f64)], is_whole: bool) {
    for (offset, length) in spans(buckets) {
        message(out, fields.span, |out| {
            signed(out, field::span::OFFSET, offset.into());
            whole(out, field::span::LENGTH, length.into());
        });
    }
    if buckets.is_empty() {
        return;
    }
    if is_whole {
        // Each weight as its difference to that of the bucket before.
        message(out, fields.delta, |out| {
            let mut before = 0;
            for (_, weight) in buckets {
                varint(out, zigzag(*weight as i64 - before));
                before = *weight as i64;
            }
        });
    } else {
        message(out, fields.count, |out| {
            buckets.iter().for_each(|(_, weight)| out.extend_from_slice(&weight.to_le_bytes()));
        });
    }
}

/// A count, which readers take from the second field if there is one, else, and where they don't know of it, from the first.
fn either(out: &mut Vec<u8>, of_whole: u32, of_float: u32, count: f64, is_float: bool) {
    whole(out, of_whole, count.round() as u64);
    if is_float || count.fract() != 0.0 {
        double(out, of_float, count);
    }
}

/// The labels of a key, their values percent-encoded.
fn key_labels(out: &mut Vec<u8>, labels: &[u8]) {
    for (name, value) in pairs(labels) {
        label(out, name, &std::borrow::Cow::from(percent_decode(value)));
    }
}

pub(super) fn label(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    message(out, field::metric::LABEL, |out| {
        bytes(out, field::label::NAME, name);
        bytes(out, field::label::VALUE, value);
    });
}

/// A `google.protobuf.Timestamp`.
fn created(out: &mut Vec<u8>, number: u32, start_ms: u64) {
    message(out, number, |out| {
        whole(out, field::timestamp::SECONDS, start_ms / 1_000);
        whole(out, field::timestamp::NANOS, start_ms % 1_000 * 1_000_000);
    });
}

// ---- the encoding: https://protobuf.dev/programming-guides/encoding/ ------------------------------------------------

const VARINT: u32 = 0;
const EIGHT_BYTES: u32 = 1;
const LENGTH: u32 = 2;

fn varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

const fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63) as u64
}

fn tag(out: &mut Vec<u8>, number: u32, wire: u32) {
    varint(out, u64::from(number << 3 | wire));
}

fn whole(out: &mut Vec<u8>, number: u32, value: u64) {
    tag(out, number, VARINT);
    varint(out, value);
}

fn signed(out: &mut Vec<u8>, number: u32, value: i64) {
    whole(out, number, zigzag(value));
}

fn double(out: &mut Vec<u8>, number: u32, value: f64) {
    tag(out, number, EIGHT_BYTES);
    out.extend_from_slice(&value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    tag(out, number, LENGTH);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// A message inside of another, or packed numbers: what `body` writes, with its length before it.
fn message(out: &mut Vec<u8>, number: u32, body: impl FnOnce(&mut Vec<u8>)) {
    tag(out, number, LENGTH);
    // Most are shorter than 128 bytes, whose length takes one; the others are moved.
    let at = out.len();
    out.push(0);
    body(out);
    let len = out.len() - at - 1;
    if len < 0x80 {
        out[at] = len as u8;
    } else {
        let mut length = Vec::with_capacity(5);
        varint(&mut length, len as u64);
        out.splice(at..=at, length);
    }
}
