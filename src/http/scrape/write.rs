//! Writes an exposition series by series: the text format 0.0.4, or OpenMetrics 1.0.
//!
//! It keeps a name, a set of labels and the values of one summary; all else goes straight to the buffer it is given.

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use percent_encoding::percent_decode;

use super::names::{Class, Entry, Index, Marks};
use super::{Config, Format, Moment, ObserverType};
use crate::aggregate::ledger::{Series, State};
use crate::aggregate::set::Members;
use crate::aggregate::window::start_of;
use crate::aggregate::{Aggregate, Observed, Sum};
use crate::sample::Kind;

/// How many series are touched at once: as many states as a thread can peek at without counting references.
const AHEAD: usize = 8;

/// Writes the series of an index, as many at a time as asked for.
#[derive(Debug)]
pub(super) struct Writer {
    index: Index,
    format: Format,
    options: Options,
    moment: Moment,
    family: usize,
    /// The next entry, and the name of its family once the family was begun.
    at: usize,
    /// Entries before this one were touched.
    warm: usize,
    name: Vec<u8>,
    labels: Vec<u8>,
    values: Vec<(f64, f64)>,
    /// Counters with decrements so far.
    pub(super) negative: u64,
}

/// How observations are shown, with the labels that say so.
#[derive(Debug)]
struct Options {
    observer_type: ObserverType,
    quantiles: Vec<(f64, String)>,
    buckets: Vec<(f64, String)>,
}

impl Writer {
    pub(super) fn new(index: Index, format: Format, config: &Config, moment: Moment) -> Self {
        let labelled = |name: &str, numbers: &[f64]| -> Vec<(f64, String)> {
            numbers.iter().map(|number| (*number, format!("{name}=\"{}\"", bound(*number, format)))).collect()
        };
        let options = Options {
            observer_type: config.observer_type,
            quantiles: labelled("quantile", &config.quantiles),
            buckets: labelled("le", &config.buckets),
        };
        let (name, labels, values) = (Vec::new(), Vec::new(), Vec::new());
        Self { index, format, options, moment, family: 0, at: 0, warm: 0, name, labels, values, negative: 0 }
    }

    /// Appends series until the buffer holds `enough` bytes. `false` when there are no more.
    pub(super) fn fill(&mut self, out: &mut Vec<u8>, enough: usize) -> bool {
        while out.len() < enough {
            let Some(family) = self.index.families.get(self.family).cloned() else { return false };
            if self.at >= self.warm {
                self.warm_up();
            }
            if self.at == family.start as usize {
                self.begin_family(out);
            }
            self.at = self.series(self.at, &family, out);
            if self.at == family.end as usize {
                self.family += 1;
            }
        }
        true
    }

    /// Touches what the next series keep, all at once: series stand anywhere in memory, and their cache misses overlap
    /// here, while one after the other they are most of a scrape's time (`benches/scrape.rs`).
    fn warm_up(&mut self) {
        let end = self.index.entries.len().min(self.at + AHEAD);
        let series = || self.sources(self.at..end);
        black_box(series().map(|series| series.kind() as usize).sum::<usize>());
        let states: Vec<_> = series().map(|series| series.peek()).collect();
        black_box(states.iter().map(|state| state.total.start_ms).fold(0, u64::wrapping_add));
        let windows = states.iter().flat_map(|state| [&state.window, &state.before]).flatten();
        black_box(windows.map(|window| window.start_ms).fold(0, u64::wrapping_add));
        drop(states);
        self.warm = end;
    }

    fn begin_family(&mut self, out: &mut Vec<u8>) {
        let entry = &self.index.entries[self.at];
        self.name.clear();
        self.name.extend_from_slice(self.index.name(entry));
        let (kind, help) = match (entry.class, self.options.observer_type) {
            (Class::Counter, _) => ("counter", "Counter received by tallyd."),
            (Class::Gauge, _) => ("gauge", "Gauge received by tallyd."),
            (Class::Observed, ObserverType::Summary) => ("summary", "Observations received by tallyd."),
            (Class::Observed, ObserverType::Histogram) => ("histogram", "Observations received by tallyd."),
            (Class::Set, _) => ("gauge", "Distinct values received by tallyd in a window."),
            (Class::MeterTotal, _) => ("counter", "Marks received by tallyd."),
            (Class::MeterRate, _) => ("gauge", "Marks per second received by tallyd."),
        };
        let (help, kind) = (help.as_bytes(), kind.as_bytes());
        for part in [b"# HELP ", &self.name[..], b" ", help, b"\n# TYPE ", &self.name, b" ", kind, b"\n"] {
            out.extend_from_slice(part);
        }
    }

    /// Writes the series at an entry, with those that have the same name and labels added to it, and says where the
    /// next one begins.
    fn series(&mut self, at: usize, family: &Range<u32>, out: &mut Vec<u8>) -> usize {
        let rest = &self.index.entries[at..family.end as usize];
        let len = 1 + rest[1..].iter().take_while(|entry| entry.marks.has(Marks::MERGED)).count();
        let (entry, same) = (rest[0], at..at + len);
        self.labels.clear();
        write_labels(&mut self.labels, self.index.labels(&entry));
        match entry.class {
            Class::Counter => self.counter(same, out),
            Class::Gauge => self.gauge(same, out),
            Class::Observed => self.observed(same, out),
            Class::Set => self.set(same, out),
            Class::MeterTotal => self.meter_total(same, out),
            Class::MeterRate => self.meter_rate(same, out),
        }
        at + len
    }

    fn counter(&mut self, same: Range<usize>, out: &mut Vec<u8>) {
        let (mut value, mut negative) = (Sum::default(), 0);
        for series in self.sources(same) {
            if let Aggregate::Counter(counter) = &series.state().total.aggregate {
                value.merge(&counter.increments);
                negative += u64::from(counter.decrements.value() > 0.0);
            }
        }
        self.negative += negative;
        self.sample(out, self.total_suffix(), "", value.value());
    }

    fn gauge(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let newest = self.sources(same).map(|series| series.state()).max_by_key(|state| state.total.update_ms);
        if let Some(Aggregate::Gauge(gauge)) = newest.as_ref().map(|state| &state.total.aggregate) {
            self.sample(out, "", "", gauge.value());
        }
    }

    /// The larger of two sizes: that of the last closed window, and what the current one has so far. So a value is seen
    /// at once, and a scrape just after a window's end doesn't see next to nothing.
    fn set(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let current_ms = start_of(self.moment.now_ms, self.moment.window_ms);
        let size = |start_ms: u64| {
            let mut all = Members::default();
            for series in self.sources(same.clone()) {
                if let Some(Aggregate::Set(members)) =
                    series.state().window_at(start_ms).map(|window| &window.aggregate)
                {
                    all.merge(members);
                }
            }
            all.cardinality()
        };
        let largest = size(current_ms).max(size(current_ms.saturating_sub(self.moment.window_ms)));
        self.sample(out, "", "", largest as f64);
    }

    fn meter_total(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let mut count = Sum::default();
        for series in self.sources(same) {
            if let Aggregate::Meter(marks) = &series.state().total.aggregate {
                count.merge(&marks.count);
            }
        }
        self.sample(out, self.total_suffix(), "", count.value());
    }

    fn meter_rate(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let (mut rates, mut mean) = ([0.0; 3], 0.0);
        for series in self.sources(same) {
            let state = series.state();
            let Some(own) = &state.total.rates else { continue };
            for (all, now) in rates.iter_mut().zip(own.at(self.moment.steady_ms)) {
                *all += now;
            }
            mean += own.mean(self.moment.steady_ms);
        }
        for (window, rate) in ["window=\"1m\"", "window=\"5m\"", "window=\"15m\""].into_iter().zip(rates) {
            self.sample(out, "", window, rate);
        }
        self.sample(out, "", "window=\"mean\"", mean);
    }

    fn observed(&mut self, same: Range<usize>, out: &mut Vec<u8>) {
        let states: Vec<(Arc<State>, f64)> =
            self.sources(same).map(|series| (series.state(), unit(series.kind()))).collect();
        match self.options.observer_type {
            ObserverType::Summary => self.quantiles(&states, out),
            ObserverType::Histogram => self.buckets(&states, out),
        }
        let sum = totals(&states).map(|(observed, unit)| observed.weighted_sum.value() / unit).sum();
        let count = totals(&states).map(|(observed, _)| observed.count.value()).sum();
        self.sample(out, "_sum", "", sum);
        self.sample(out, "_count", "", count);
    }

    fn quantiles(&mut self, states: &[(Arc<State>, f64)], out: &mut Vec<u8>) {
        let start_ms = start_of(self.moment.now_ms, self.moment.window_ms).saturating_sub(self.moment.window_ms);
        let mut values = std::mem::take(&mut self.values);
        gather(states, start_ms, &mut values);
        let weight = values.iter().map(|(_, weight)| weight).sum();
        for (quantile, label) in &self.options.quantiles {
            self.sample(out, "", label, nearest_rank(&values, weight, *quantile));
        }
        self.values = values;
    }

    fn buckets(&self, states: &[(Arc<State>, f64)], out: &mut Vec<u8>) {
        for (bound, label) in &self.options.buckets {
            let count =
                totals(states).map(|(observed, unit)| count_at_most(observed, bound_in_unit(*bound, unit))).sum();
            self.sample(out, "_bucket", label, count);
        }
        let count = totals(states).map(|(observed, _)| observed.count.value()).sum();
        self.sample(out, "_bucket", "le=\"+Inf\"", count);
    }

    fn sources(&self, same: Range<usize>) -> impl Iterator<Item = &Arc<Series>> {
        self.index.entries[same].iter().map(|entry: &Entry| &self.index.sources[entry.source as usize])
    }

    const fn total_suffix(&self) -> &'static str {
        match self.format {
            Format::Text => "",
            Format::OpenMetrics => "_total",
        }
    }

    /// One line: the family's name with a suffix, the series' labels with one more, a value.
    fn sample(&self, out: &mut Vec<u8>, suffix: &str, label: &str, value: f64) {
        out.extend_from_slice(&self.name);
        out.extend_from_slice(suffix.as_bytes());
        if !self.labels.is_empty() || !label.is_empty() {
            out.push(b'{');
            out.extend_from_slice(&self.labels);
            if !self.labels.is_empty() && !label.is_empty() {
                out.push(b',');
            }
            out.extend_from_slice(label.as_bytes());
            out.push(b'}');
        }
        out.push(b' ');
        write_number(out, value);
        out.push(b'\n');
    }
}

/// What the values of a kind are divided by to be shown: Prometheus wants seconds.
const fn unit(kind: Kind) -> f64 {
    match kind {
        Kind::Timer => 1000.0,
        Kind::Counter | Kind::Gauge | Kind::Histogram | Kind::Distribution | Kind::Set | Kind::Meter => 1.0,
    }
}

fn observed(aggregate: &Aggregate) -> Option<&Observed> {
    match aggregate {
        Aggregate::Observed(observed) => Some(observed),
        Aggregate::Counter(_) | Aggregate::Gauge(_) | Aggregate::Set(_) | Aggregate::Meter(_) => None,
    }
}

fn totals(states: &[(Arc<State>, f64)]) -> impl Iterator<Item = (&Observed, f64)> {
    states.iter().filter_map(|(state, unit)| observed(&state.total.aggregate).zip(Some(*unit)))
}

/// Fills `values` with what the windows that began at `start_ms` or later hold, in order: values that are kept as they
/// came, and of each bucket the value whose largest relative distance to the others is least, each with its weight and
/// in the unit in which it is shown.
fn gather(states: &[(Arc<State>, f64)], start_ms: u64, values: &mut Vec<(f64, f64)>) {
    values.clear();
    let windows = states.iter().flat_map(|(state, unit)| [(&state.before, *unit), (&state.window, *unit)]);
    for (window, unit) in windows.filter_map(|(window, unit)| window.as_ref().zip(Some(unit))) {
        let Some(observed) = observed(&window.aggregate).filter(|_| window.start_ms >= start_ms) else { continue };
        values.extend(observed.exact.iter().map(|(value, weight)| (value / unit, *weight)));
        let middle = |lower: f64, upper: f64| {
            if lower == upper {
                lower
            } else {
                (2.0 * upper / (lower + upper) * lower).clamp(observed.min, observed.max)
            }
        };
        let buckets = observed.histogram.buckets();
        values.extend(buckets.map(|(lower, upper, weight)| (middle(lower, upper) / unit, weight)));
    }
    values.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
}

/// The smallest value such that values up to it carry at least the share `q` of the weight; NaN without values.
fn nearest_rank(values: &[(f64, f64)], weight: f64, q: f64) -> f64 {
    // Weights such as 1 / 0.3 do not add up exactly; a rank that they miss by rounding is reached.
    let rank = q * weight * (1.0 - 1e-12);
    let mut below = 0.0;
    let reached = values.iter().find(|(_, weight)| {
        below += weight;
        below >= rank
    });
    reached.or(values.last()).map_or(f64::NAN, |(value, _)| *value)
}

/// The weight of the observations up to a bound. A bucket that holds values on both sides of the bound counts whole: so
/// a value that lies on the bound counts as it must, and one that counts in error is less than a bucket's width, 1.1 %,
/// above it. A bound outside of smallest and largest value is not in doubt.
fn count_at_most(observed: &Observed, bound: f64) -> f64 {
    if bound >= observed.max {
        return observed.count.value();
    }
    if bound < observed.min {
        return 0.0;
    }
    let exact: f64 = observed.exact.iter().filter(|(value, _)| *value <= bound).map(|(_, weight)| weight).sum();
    // A bucket above zero does not hold its lower bound; one below zero does.
    let begins = |lower: f64, upper: f64| lower < bound || (lower == bound && (lower < 0.0 || lower == upper));
    let buckets = observed.histogram.buckets().take_while(|(lower, upper, _)| begins(*lower, *upper));
    (exact + buckets.map(|(_, _, weight)| weight).sum::<f64>()).min(observed.count.value())
}

/// The largest value as received that is not above a bound as shown.
pub(super) fn bound_in_unit(bound: f64, unit: f64) -> f64 {
    let mut value = bound * unit;
    while value.is_finite() && value.next_up() / unit <= bound {
        value = value.next_up();
    }
    while value.is_finite() && value / unit > bound {
        value = value.next_down();
    }
    value
}

/// Writes labels as an exposition has them, `name="value"`, from those of a key.
fn write_labels(to: &mut Vec<u8>, labels: &[u8]) {
    let mut rest = labels;
    while !rest.is_empty() {
        let label = &rest[..memchr::memchr(b';', rest).unwrap_or(rest.len())];
        rest = rest.get(label.len() + 1..).unwrap_or_default();
        let (name, value) = label.split_at(memchr::memchr(b'=', label).unwrap_or(label.len()));
        if !to.is_empty() {
            to.push(b',');
        }
        to.extend_from_slice(name);
        to.extend_from_slice(b"=\"");
        write_value(to, value.get(1..).unwrap_or_default());
        to.push(b'"');
    }
}

/// Writes a percent-encoded value with the escapes of an exposition.
fn write_value(to: &mut Vec<u8>, value: &[u8]) {
    if memchr::memchr3(b'%', b'\\', b'"', value).is_none() {
        return to.extend_from_slice(value);
    }
    for byte in percent_decode(value) {
        match byte {
            b'\\' => to.extend_from_slice(b"\\\\"),
            b'"' => to.extend_from_slice(b"\\\""),
            b'\n' => to.extend_from_slice(b"\\n"),
            byte => to.push(byte),
        }
    }
}

/// Name and labels of an entry, as on a line of the exposition.
pub(super) fn line_name(index: &Index, entry: &Entry) -> String {
    let (mut line, mut labels) = (index.name(entry).to_vec(), Vec::new());
    write_labels(&mut labels, index.labels(entry));
    if !labels.is_empty() {
        line.extend([&b"{"[..], &labels, b"}"].concat());
    }
    String::from_utf8_lossy(&line).into_owned()
}

/// A bound as a label's value. OpenMetrics wants it to look like a float.
fn bound(number: f64, format: Format) -> String {
    let mut text = Vec::new();
    write_number(&mut text, number);
    let mut text = String::from_utf8(text).unwrap_or_default();
    if format == Format::OpenMetrics && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
        text.push_str(".0");
    }
    text
}

/// The shortest text that reads back as the same number.
fn write_number(out: &mut Vec<u8>, number: f64) {
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;
    if number.trunc() == number && number.abs() <= WHOLE_MAX {
        out.extend_from_slice(itoa::Buffer::new().format(number as i64).as_bytes());
    } else if number.is_finite() {
        out.extend_from_slice(zmij::Buffer::new().format_finite(number).as_bytes());
    } else if number.is_nan() {
        out.extend_from_slice(b"NaN");
    } else {
        out.extend_from_slice(if number > 0.0 { b"+Inf" } else { b"-Inf" });
    }
}
