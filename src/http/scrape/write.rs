//! Writes an exposition series by series: the text format 0.0.4, or OpenMetrics 1.0.
//!
//! It keeps a name, a set of labels and the values of one summary; all else goes straight to the buffer it is given.

use std::collections::HashMap;
use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use percent_encoding::percent_decode;

use super::mapped::Rules;
use super::names::{Class, Entry, Index, Marks};
use super::{Config, Format, Moment};
use crate::aggregate::ledger::{Series, State};
use crate::aggregate::set::Members;
use crate::aggregate::window::start_of;
use crate::aggregate::{Aggregate, Observed, Sum};
use crate::mapping::Style;
use crate::sample::Kind;

/// How many series are touched at once: as many states as a thread can peek at without counting references.
const AHEAD: usize = 8;

/// Writes the series of an index, as many at a time as asked for.
#[derive(Debug)]
pub(super) struct Writer {
    index: Index,
    format: Format,
    options: Options,
    /// Those of mapping rules that have their own.
    of_rules: HashMap<u32, Options>,
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
    quantiles: Vec<(f64, String)>,
    buckets: Vec<(f64, String)>,
}

impl Options {
    fn new(quantiles: &[f64], buckets: &[f64], format: Format) -> Self {
        let labelled = |name: &str, numbers: &[f64]| -> Vec<(f64, String)> {
            numbers.iter().map(|number| (*number, format!("{name}=\"{}\"", bound(*number, format)))).collect()
        };
        Self { quantiles: labelled("quantile", quantiles), buckets: labelled("le", buckets) }
    }

    /// Those of the configuration, or of a mapping's defaults; and those of rules that say something else.
    fn of(rules: &Rules, config: &Config, format: Format) -> (Self, HashMap<u32, Self>) {
        let Some(mapping) = rules.mapping() else {
            return (Self::new(&config.quantiles, &config.buckets, format), HashMap::new());
        };
        let defaults = mapping.defaults();
        let of = |style: &Style| {
            let quantiles = style.quantiles.as_ref().unwrap_or(&config.quantiles);
            Self::new(quantiles, style.buckets.as_ref().unwrap_or(&config.buckets), format)
        };
        let own = mapping.rules().iter().enumerate().filter(|(_, rule)| {
            (&rule.style.quantiles, &rule.style.buckets) != (&defaults.quantiles, &defaults.buckets)
        });
        (of(defaults), own.map(|(number, rule)| (number as u32, of(&rule.style))).collect())
    }
}

impl Writer {
    pub(super) fn new(index: Index, format: Format, config: &Config, moment: Moment) -> Self {
        let (options, of_rules) = Options::of(&index.rules, config, format);
        let (name, labels, values) = (Vec::new(), Vec::new(), Vec::new());
        Self { index, format, options, of_rules, moment, family: 0, at: 0, warm: 0, name, labels, values, negative: 0 }
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
        let totals: Vec<_> = series().map(|series| series.total()).collect();
        black_box(totals.iter().map(|total| total.start_ms).fold(0, u64::wrapping_add));
        drop(totals);
        self.warm = end;
    }

    fn begin_family(&mut self, out: &mut Vec<u8>) {
        let entry = &self.index.entries[self.at];
        self.name.clear();
        self.name.extend_from_slice(self.index.name(entry));
        let (kind, help) = match entry.class {
            Class::Counter => ("counter", "Counter received by tallyd."),
            Class::Gauge => ("gauge", "Gauge received by tallyd."),
            Class::Summary => ("summary", "Observations received by tallyd."),
            Class::Histogram => ("histogram", "Observations received by tallyd."),
            Class::Set => ("gauge", "Distinct values received by tallyd in a window."),
            Class::MeterTotal => ("counter", "Marks received by tallyd."),
            Class::MeterRate => ("gauge", "Marks per second received by tallyd."),
        };
        // Of several rules that give a family its name, that of its first series speaks.
        let own = self.index.rules.rule(entry.source).and_then(|(_, rule)| rule.help.as_deref());
        let help = own.map_or_else(|| help.as_bytes().to_vec(), |own| help_text(own, self.format));
        let (help, kind) = (&help[..], kind.as_bytes());
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
            Class::Summary | Class::Histogram => self.observed(&entry, same, out),
            Class::Set => self.set(same, out),
            Class::MeterTotal => self.meter_total(same, out),
            Class::MeterRate => self.meter_rate(same, out),
        }
        at + len
    }

    fn counter(&mut self, same: Range<usize>, out: &mut Vec<u8>) {
        let (mut value, mut negative) = (Sum::default(), 0);
        let mut scaled = 0.0;
        for (series, scale) in self.scaled(same) {
            if let Aggregate::Counter(counter) = &series.total().aggregate {
                // What a negative scale turns round rises where the counter falls.
                let (rise, fall) = if scale < 0.0 {
                    (&counter.decrements, &counter.increments)
                } else {
                    (&counter.increments, &counter.decrements)
                };
                if scale == 1.0 {
                    value.merge(rise);
                } else {
                    scaled += rise.value() * scale.abs();
                }
                negative += u64::from(fall.value() > 0.0);
            }
        }
        self.negative += negative;
        self.sample(out, self.total_suffix(), "", value.value() + scaled);
    }

    fn gauge(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let totals = self.scaled(same).map(|(series, scale)| (series.total(), scale));
        let Some((total, scale)) = totals.max_by_key(|(total, _)| total.update_ms) else { return };
        if let Aggregate::Gauge(gauge) = &total.aggregate {
            self.sample(out, "", "", gauge.value() * scale);
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
        let scale = self.scaled(same).next().map_or(1.0, |(_, scale)| scale);
        self.sample(out, "", "", largest as f64 * scale);
    }

    fn meter_total(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let (mut count, mut scaled) = (Sum::default(), 0.0);
        for (series, scale) in self.scaled(same) {
            if let Aggregate::Meter(marks) = &series.total().aggregate {
                if scale == 1.0 {
                    count.merge(&marks.count);
                } else {
                    scaled += marks.count.value() * scale;
                }
            }
        }
        self.sample(out, self.total_suffix(), "", count.value() + scaled);
    }

    fn meter_rate(&self, same: Range<usize>, out: &mut Vec<u8>) {
        let (mut rates, mut mean) = ([0.0; 3], 0.0);
        for (series, scale) in self.scaled(same) {
            let total = series.total();
            let Some(own) = &total.rates else { continue };
            for (all, now) in rates.iter_mut().zip(own.at(self.moment.steady_ms)) {
                *all += now * scale;
            }
            mean += own.mean(self.moment.steady_ms) * scale;
        }
        for (window, rate) in ["window=\"1m\"", "window=\"5m\"", "window=\"15m\""].into_iter().zip(rates) {
            self.sample(out, "", window, rate);
        }
        self.sample(out, "", "window=\"mean\"", mean);
    }

    fn observed(&mut self, entry: &Entry, same: Range<usize>, out: &mut Vec<u8>) {
        let states: Vec<(State, Unit)> = self
            .scaled(same)
            .map(|(series, scale)| (series.state(), Unit { divisor: divisor(series.kind()), scale }))
            .collect();
        let rule = self.index.rules.rule(entry.source).map(|(number, _)| number);
        if entry.class == Class::Histogram {
            self.buckets(rule, &states, out);
        } else {
            self.quantiles(rule, &states, out);
        }
        let sum = totals(&states).map(|(observed, unit)| unit.shown(observed.weighted_sum.value())).sum();
        let count = totals(&states).map(|(observed, _)| observed.count.value()).sum();
        self.sample(out, "_sum", "", sum);
        self.sample(out, "_count", "", count);
    }

    /// The options of a rule, or those that hold for all.
    fn options(&self, rule: Option<u32>) -> &Options {
        rule.and_then(|rule| self.of_rules.get(&rule)).unwrap_or(&self.options)
    }

    fn quantiles(&mut self, rule: Option<u32>, states: &[(State, Unit)], out: &mut Vec<u8>) {
        let start_ms = start_of(self.moment.now_ms, self.moment.window_ms).saturating_sub(self.moment.window_ms);
        let mut values = std::mem::take(&mut self.values);
        gather(states, start_ms, &mut values);
        let weight = values.iter().map(|(_, weight)| weight).sum();
        for (quantile, label) in &self.options(rule).quantiles {
            self.sample(out, "", label, nearest_rank(&values, weight, *quantile));
        }
        self.values = values;
    }

    fn buckets(&self, rule: Option<u32>, states: &[(State, Unit)], out: &mut Vec<u8>) {
        for (bound, label) in &self.options(rule).buckets {
            let count = totals(states).map(|(observed, unit)| unit.count_at_most(observed, *bound)).sum();
            self.sample(out, "_bucket", label, count);
        }
        let count = totals(states).map(|(observed, _)| observed.count.value()).sum();
        self.sample(out, "_bucket", "le=\"+Inf\"", count);
    }

    fn sources(&self, same: Range<usize>) -> impl Iterator<Item = &Arc<Series>> {
        self.index.entries[same].iter().map(|entry: &Entry| &self.index.sources[entry.source as usize])
    }

    /// Series, and what a mapping rule multiplies their values by.
    fn scaled(&self, same: Range<usize>) -> impl Iterator<Item = (&Arc<Series>, f64)> {
        let entries = self.index.entries[same].iter();
        entries.map(|entry| {
            let scale = self.index.rules.rule(entry.source).map_or(1.0, |(_, rule)| rule.scale);
            (&self.index.sources[entry.source as usize], scale)
        })
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
const fn divisor(kind: Kind) -> f64 {
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

fn totals(states: &[(State, Unit)]) -> impl Iterator<Item = (&Observed, Unit)> {
    states.iter().filter_map(|(state, unit)| observed(&state.total.aggregate).zip(Some(*unit)))
}

/// Fills `values` with what the windows that began at `start_ms` or later hold, in order: values that are kept as they
/// came, and of each bucket the value whose largest relative distance to the others is least, each with its weight and
/// in the unit in which it is shown.
fn gather(states: &[(State, Unit)], start_ms: u64, values: &mut Vec<(f64, f64)>) {
    values.clear();
    let windows = states.iter().flat_map(|(state, unit)| [(&state.before, *unit), (&state.window, *unit)]);
    for (window, unit) in windows.filter_map(|(window, unit)| window.as_ref().zip(Some(unit))) {
        let Some(observed) = observed(&window.aggregate).filter(|_| window.start_ms >= start_ms) else { continue };
        values.extend(observed.exact.iter().map(|(value, weight)| (unit.shown(*value), *weight)));
        let middle = |lower: f64, upper: f64| {
            if lower == upper {
                lower
            } else {
                (2.0 * upper / (lower + upper) * lower).clamp(observed.min, observed.max)
            }
        };
        let buckets = observed.histogram.buckets();
        values.extend(buckets.map(|(lower, upper, weight)| (unit.shown(middle(lower, upper)), weight)));
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

/// The weight of the observations from a bound on, which a negative scale turns into those up to one. A bucket that holds
/// values on both sides counts whole here too.
fn count_at_least(observed: &Observed, bound: f64) -> f64 {
    if bound <= observed.min {
        return observed.count.value();
    }
    if bound > observed.max {
        return 0.0;
    }
    let exact: f64 = observed.exact.iter().filter(|(value, _)| *value >= bound).map(|(_, weight)| weight).sum();
    let reaches = |lower: f64, upper: f64| upper > bound || (upper == bound && (upper > 0.0 || lower == upper));
    let buckets = observed.histogram.buckets().filter(|(lower, upper, _)| reaches(*lower, *upper));
    (exact + buckets.map(|(_, _, weight)| weight).sum::<f64>()).min(observed.count.value())
}

/// From values as received to values as shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    pub(super) divisor: f64,
    pub(super) scale: f64,
}

impl Unit {
    pub(super) fn shown(self, value: f64) -> f64 {
        value / self.divisor * self.scale
    }

    /// The weight of the observations that are shown as a bound or less.
    fn count_at_most(self, observed: &Observed, bound: f64) -> f64 {
        if self.scale > 0.0 {
            count_at_most(observed, self.received(bound))
        } else if self.scale < 0.0 {
            // The smallest value that is not shown above the bound.
            let positive = Self { scale: -self.scale, ..self };
            count_at_least(observed, positive.received((-bound).next_down()).next_up())
        } else {
            if bound >= 0.0 { observed.count.value() } else { 0.0 }
        }
    }

    /// The largest value as received that is not shown above a bound, for a scale above zero. Rounding is a step or two
    /// away from it, but for scales that take a value out of range.
    pub(super) fn received(self, bound: f64) -> f64 {
        const STEPS: usize = 8;
        let mut value = bound / self.scale * self.divisor;
        for _ in 0..STEPS {
            if !value.is_finite() || self.shown(value.next_up()) > bound {
                break;
            }
            value = value.next_up();
        }
        for _ in 0..STEPS {
            if !value.is_finite() || self.shown(value) <= bound {
                break;
            }
            value = value.next_down();
        }
        value
    }
}

/// A rule's help text with the escapes of an exposition.
fn help_text(text: &str, format: Format) -> Vec<u8> {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    match format {
        Format::Text => text.into_bytes(),
        Format::OpenMetrics => text.replace('"', "\\\"").into_bytes(),
    }
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
    line(index.name(entry), index.labels(entry))
}

/// A name and labels in the form of a key, as on a line of the exposition.
pub(super) fn line(name: &[u8], labels_of_key: &[u8]) -> String {
    let (mut line, mut labels) = (name.to_vec(), Vec::new());
    write_labels(&mut labels, labels_of_key);
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
