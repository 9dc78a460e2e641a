//! What the series of a scrape show, in numbers: what stands behind a name and labels, whatever the format.
//!
//! It keeps the points of one summary or histogram at a time.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::mapped::Rules;
use super::names::Index;
use super::native::{Native, Resolution};
use super::{Config, Moment, Names, write};
use crate::aggregate::ledger::{Series, State};
use crate::aggregate::set::Members;
use crate::aggregate::window::start_of;
use crate::aggregate::{Aggregate, Observed, Sum};
use crate::mapping::Style;
use crate::sample::Kind;

/// Series that are shown as one: entries of an index with the same name and labels.
#[derive(Debug, Clone)]
pub(super) struct Same<'i> {
    pub(super) index: &'i Index,
    pub(super) entries: Range<usize>,
}

impl<'i> Same<'i> {
    pub(super) fn sources(&self) -> impl Iterator<Item = &'i Arc<Series>> + use<'i> {
        let index = self.index;
        index.entries[self.entries.clone()].iter().map(|entry| &index.sources[entry.source as usize])
    }

    /// Series, and what a mapping rule multiplies their values by.
    fn scaled(&self) -> impl Iterator<Item = (&'i Arc<Series>, f64)> + use<'i> {
        let index = self.index;
        index.entries[self.entries.clone()].iter().map(|entry| {
            let scale = index.rules.rule(entry.source).map_or(1.0, |(_, rule)| rule.scale);
            (&index.sources[entry.source as usize], scale)
        })
    }

    /// The number of the rule of the first of them.
    fn rule(&self) -> Option<u32> {
        let first = self.index.entries.get(self.entries.start)?;
        self.index.rules.rule(first.source).map(|(number, _)| number)
    }

    /// When the oldest of them began, in milliseconds since the epoch.
    pub(super) fn start_ms(&self) -> u64 {
        self.sources().map(|series| series.total().start_ms).min().unwrap_or_default()
    }
}

/// How observations are shown: numbers, and their labels in the text formats.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) quantiles: Vec<(f64, String)>,
    pub(super) buckets: Vec<(f64, String)>,
    native: Option<Resolution>,
}

impl Options {
    fn new(quantiles: &[f64], buckets: &[f64], native: Option<Resolution>, names: Names) -> Self {
        let labelled = |name: &str, numbers: &[f64]| -> Vec<(f64, String)> {
            numbers.iter().map(|number| (*number, format!("{name}=\"{}\"", write::bound(*number, names)))).collect()
        };
        Self { quantiles: labelled("quantile", quantiles), buckets: labelled("le", buckets), native }
    }

    /// Those of the configuration, or of a mapping's defaults; and those of rules that say something else.
    fn of(rules: &Rules, config: &Config, names: Names) -> (Self, HashMap<u32, Self>) {
        let of = |style: &Style| {
            let native = &style.native;
            let factor = native.bucket_factor.unwrap_or(config.native_bucket_factor);
            let resolution = Resolution::of(factor, native.max_buckets.unwrap_or(config.native_max_buckets));
            let quantiles = style.quantiles.as_ref().unwrap_or(&config.quantiles);
            Self::new(quantiles, style.buckets.as_ref().unwrap_or(&config.buckets), resolution, names)
        };
        let Some(mapping) = rules.mapping() else { return (of(&Style::default()), HashMap::new()) };
        let defaults = mapping.defaults();
        let of_observer = |style: &Style| (style.quantiles.clone(), style.buckets.clone(), style.native);
        let usual = of_observer(defaults);
        let own = mapping.rules().iter().enumerate().filter(|(_, rule)| of_observer(&rule.style) != usual);
        (of(defaults), own.map(|(number, rule)| (number as u32, of(&rule.style))).collect())
    }
}

/// What observations show.
#[derive(Debug)]
pub(super) struct Observations<'f> {
    pub(super) sum: f64,
    pub(super) count: f64,
    labels: &'f [(f64, String)],
    points: &'f [f64],
    pub(super) native: Option<&'f Native>,
}

impl<'f> Observations<'f> {
    /// Quantile and value, or bound and count up to it, each with the label that says so in the text formats.
    pub(super) fn points(&self) -> impl Iterator<Item = (f64, &'f str, f64)> {
        self.labels.iter().zip(self.points).map(|((number, label), point)| (*number, label.as_str(), *point))
    }
}

/// Computes what series show.
#[derive(Debug)]
pub(super) struct Figures {
    options: Options,
    /// Those of mapping rules that have their own.
    of_rules: HashMap<u32, Options>,
    moment: Moment,
    // Scratch, so that none of them is allocated for each series.
    values: Vec<(f64, f64)>,
    states: Vec<(State, Unit)>,
    points: Vec<f64>,
    native: Native,
    /// Counters with decrements so far.
    pub(super) negative: u64,
}

impl Figures {
    pub(super) fn new(rules: &Rules, config: &Config, moment: Moment, names: Names) -> Self {
        let (options, of_rules) = Options::of(rules, config, names);
        let (values, states, points) = (Vec::new(), Vec::new(), Vec::new());
        Self { options, of_rules, moment, values, states, points, native: Native::default(), negative: 0 }
    }

    pub(super) fn counter(&mut self, same: &Same<'_>) -> f64 {
        let (mut value, mut negative) = (Sum::default(), 0);
        let mut scaled = 0.0;
        for (series, scale) in same.scaled() {
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
        value.value() + scaled
    }

    /// The newest of them.
    pub(super) fn gauge(&self, same: &Same<'_>) -> Option<f64> {
        let totals = same.scaled().map(|(series, scale)| (series.total(), scale));
        let (total, scale) = totals.max_by_key(|(total, _)| total.update_ms)?;
        match &total.aggregate {
            Aggregate::Gauge(gauge) => Some(gauge.value() * scale),
            Aggregate::Counter(_) | Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_) => None,
        }
    }

    /// The larger of two sizes: that of the last closed window, and what the current one has so far. So a value is seen
    /// at once, and a scrape just after a window's end doesn't see next to nothing.
    pub(super) fn set(&self, same: &Same<'_>) -> f64 {
        let current_ms = start_of(self.moment.now_ms, self.moment.window_ms);
        let size = |start_ms: u64| {
            let mut all = Members::default();
            for series in same.sources() {
                if let Some(Aggregate::Set(members)) =
                    series.state().window_at(start_ms).map(|window| &window.aggregate)
                {
                    all.merge(members);
                }
            }
            all.cardinality()
        };
        let largest = size(current_ms).max(size(current_ms.saturating_sub(self.moment.window_ms)));
        let scale = same.scaled().next().map_or(1.0, |(_, scale)| scale);
        largest as f64 * scale
    }

    pub(super) fn meter_total(&self, same: &Same<'_>) -> f64 {
        let (mut count, mut scaled) = (Sum::default(), 0.0);
        for (series, scale) in same.scaled() {
            if let Aggregate::Meter(marks) = &series.total().aggregate {
                if scale == 1.0 {
                    count.merge(&marks.count);
                } else {
                    scaled += marks.count.value() * scale;
                }
            }
        }
        count.value() + scaled
    }

    /// Marks per second, by [`RATE_WINDOWS`].
    pub(super) fn meter_rates(&self, same: &Same<'_>) -> [f64; 4] {
        let mut rates = [0.0; 4];
        for (series, scale) in same.scaled() {
            let total = series.total();
            let Some(own) = &total.rates else { continue };
            let [one, five, fifteen] = own.at(self.moment.steady_ms);
            let now = [one, five, fifteen, own.mean(self.moment.steady_ms)];
            rates.iter_mut().zip(now).for_each(|(all, now)| *all += now * scale);
        }
        rates
    }

    /// Sum, count and quantiles of observations.
    pub(super) fn summary(&mut self, same: &Same<'_>) -> Observations<'_> {
        self.read(same);
        let options = options(&self.options, &self.of_rules, same);
        let start_ms = start_of(self.moment.now_ms, self.moment.window_ms).saturating_sub(self.moment.window_ms);
        gather(&self.states, start_ms, &mut self.values);
        let weight = self.values.iter().map(|(_, weight)| weight).sum();
        let values = options.quantiles.iter().map(|(quantile, _)| nearest_rank(&self.values, weight, *quantile));
        self.points.clear();
        self.points.extend(values);
        self.observations(&options.quantiles, None)
    }

    /// Sum, count and buckets of observations, the native ones of a family by the rule of its first series: to
    /// Prometheus a family has them or has none.
    pub(super) fn histogram(&mut self, same: &Same<'_>, native_of: Option<&Same<'_>>) -> Observations<'_> {
        self.read(same);
        let buckets = &options(&self.options, &self.of_rules, same).buckets;
        self.points.clear();
        for (bound, _) in buckets {
            let count = totals(&self.states).map(|(observed, unit)| unit.count_at_most(observed, *bound)).sum();
            self.points.push(count);
        }
        let resolution = native_of.and_then(|family| options(&self.options, &self.of_rules, family).native);
        if let Some(resolution) = resolution {
            self.native.fill(totals(&self.states), resolution);
        }
        self.observations(buckets, resolution.map(|_| &self.native))
    }

    fn observations<'f>(&'f self, labels: &'f [(f64, String)], native: Option<&'f Native>) -> Observations<'f> {
        let sum = totals(&self.states).map(|(observed, unit)| unit.shown(observed.weighted_sum.value())).sum();
        let count = totals(&self.states).map(|(observed, _)| observed.count.value()).sum();
        Observations { sum, count, labels, points: &self.points, native }
    }

    fn read(&mut self, same: &Same<'_>) {
        self.states.clear();
        let unit = |series: &Series, scale: f64| Unit { divisor: divisor(series.kind()), scale };
        self.states.extend(same.scaled().map(|(series, scale)| (series.state(), unit(series, scale))));
    }
}

/// The windows of a meter's rates, and the labels that say so in the text formats.
pub(super) const RATE_WINDOWS: [(&str, &str); 4] =
    [("1m", "window=\"1m\""), ("5m", "window=\"5m\""), ("15m", "window=\"15m\""), ("mean", "window=\"mean\"")];

/// The options of the rule of series, or those that hold for all.
fn options<'o>(usual: &'o Options, of_rules: &'o HashMap<u32, Options>, same: &Same<'_>) -> &'o Options {
    same.rule().and_then(|rule| of_rules.get(&rule)).unwrap_or(usual)
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

fn totals(states: &[(State, Unit)]) -> impl Iterator<Item = (&Observed, Unit)> + Clone {
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
