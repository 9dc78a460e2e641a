//! What a series keeps of its samples, by kind.
//!
//! Counts and sums of whole numbers are exact, min and max too; quantiles are exact while the values are kept as they
//! came, then within the error of [`Histogram`]. A merge whose sums would not stay finite is refused
//! as a whole. Bounds: [`Limits`], and [`EXACT_MAX`].

use std::borrow::Cow;
use std::mem::discriminant;

use serde::{Deserialize, Serialize};

use super::histogram::{self, Histogram};
use super::set::{self, Members};
use crate::sample::Kind;

/// The rows of `[limits]` that bound what one series keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How many buckets a histogram has before its scale halves; taken to be within 320 and 32,768.
    pub buckets: usize,
    /// How many members of a set are kept exactly.
    pub set_exact: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { buckets: histogram::BUCKETS_MAX, set_exact: set::EXACT_MAX }
    }
}

/// A sum of finite numbers, exact for whole numbers while it stays below 2^105, else to about 2^-104 of each sum on the
/// way.
///
/// It is a double-word number: the nearest float, and the float nearest to what that leaves. The formulas are
/// algorithms 1 to 6 of M. Joldes, J.-M. Muller, V. Popescu, "Tight and rigorous error bounds for basic building blocks
/// of double-word arithmetic", ACM TOMS 44(2), 2017.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(try_from = "(f64, f64)", into = "(f64, f64)")]
pub struct Sum {
    high: f64,
    low: f64,
}

impl Sum {
    /// Adds a number. A result that is not finite is refused: the sum stays, and the answer is `false`.
    #[inline]
    pub fn add(&mut self, number: f64) -> bool {
        let (high, error) = two_sum(self.high, number);
        self.set(high, self.low + error)
    }

    /// Adds another sum, under the same rule.
    pub fn merge(&mut self, other: &Self) -> bool {
        let (high, error) = two_sum(self.high, other.high);
        let (low, rest) = two_sum(self.low, other.low);
        let (high, error) = fast_two_sum(high, error + low);
        self.set(high, rest + error)
    }

    /// The sum less another; the sum itself, should that not be finite, which it is for two of one sign.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let mut result = *self;
        result.merge(&Self { high: -other.high, low: -other.low });
        result
    }

    /// The sum of two floats, if that is a float without a rest.
    #[inline]
    pub fn exact(a: f64, b: f64) -> Option<f64> {
        let (sum, rest) = two_sum(a, b);
        (rest == 0.0).then_some(sum)
    }

    /// The sum, if it is a float without a rest.
    pub fn as_float(&self) -> Option<f64> {
        (self.low == 0.0).then_some(self.high)
    }

    /// The nearest float.
    pub fn value(&self) -> f64 {
        self.high + self.low
    }

    /// The whole part, rounded towards negative infinity and held within `i64`, and what is left of it, in [0, 1) but
    /// for sums beyond `i64`. The rest is rounded to a float, so up to 2^-53 is lost of
    /// a small sum below 0; whole sums within `i64` come apart exactly.
    pub fn split(&self) -> (i64, f64) {
        let floor = (self.high.floor() as i128).saturating_add(self.low.floor() as i128);
        let whole = floor.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        let fraction = self.minus(&Self::join(whole, 0.0)).value();
        // Two floors may be one less than the floor of the sum.
        match whole.checked_add(1) {
            Some(next) if (1.0..2.0).contains(&fraction) => (next, fraction - 1.0),
            Some(_) | None => (whole, fraction),
        }
    }

    /// The reverse of [`Sum::split`].
    pub fn join(whole: i64, fraction: f64) -> Self {
        // An i64 is the sum of two floats of which each is exact: its upper and its lower 32 bits.
        let mut sum = Self::from(((whole >> 32) as f64) * 4_294_967_296.0);
        sum.add((whole & 0xffff_ffff) as f64);
        sum.add(fraction);
        sum
    }

    /// The square of a number, exact unless it is not finite or next to 0.
    fn square(number: f64) -> Self {
        let high = number * number;
        Self { high, low: number.mul_add(number, -high) }
    }

    fn squared(&self) -> Self {
        let square = Self::square(self.high);
        let (high, low) = fast_two_sum(square.high, 2.0 * self.high * self.low + square.low);
        Self { high, low }
    }

    fn divided_by(&self, divisor: f64) -> Self {
        let quotient = self.high / divisor;
        let rest = (-quotient).mul_add(divisor, self.high) + self.low;
        let (high, low) = fast_two_sum(quotient, rest / divisor);
        Self { high, low }
    }

    #[inline]
    fn set(&mut self, high: f64, low: f64) -> bool {
        let (high, low) = fast_two_sum(high, low);
        let finite = high.is_finite() && low.is_finite();
        if finite {
            *self = Self { high, low };
        }
        finite
    }
}

/// A sum of floats as the nearest float and the exact rest.
#[inline]
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_in_sum = sum - a;
    (sum, (a - (sum - b_in_sum)) + (b - b_in_sum))
}

/// The same where `a` is not the smaller one.
#[inline]
fn fast_two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    (sum, b - (sum - a))
}

impl From<f64> for Sum {
    fn from(number: f64) -> Self {
        Self { high: number, low: 0.0 }
    }
}

impl From<Sum> for (f64, f64) {
    fn from(sum: Sum) -> Self {
        (sum.high, sum.low)
    }
}

impl TryFrom<(f64, f64)> for Sum {
    type Error = &'static str;

    fn try_from((high, low): (f64, f64)) -> Result<Self, Self::Error> {
        let mut sum = Self::default();
        if sum.add(high) && sum.add(low) { Ok(sum) } else { Err("a sum is not finite") }
    }
}

/// Increments and decrements of a counter, each a sum of `value / rate`, both positive.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Counter {
    /// What was added.
    pub increments: Sum,
    /// What was taken off, as a positive number.
    pub decrements: Sum,
    /// How many readings were received.
    pub samples: u64,
}

/// The last set of a gauge and the changes after it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Gauge {
    /// The value that was set last and when, in milliseconds since the epoch.
    pub set: Option<(f64, u64)>,
    /// The sum of the changes after that set.
    pub change: Sum,
    /// When the last of these changes came, in milliseconds since the epoch; 0 for none.
    pub changed_at: u64,
    /// How many readings were received.
    pub samples: u64,
}

impl Gauge {
    /// The value: what was set, else 0, and what was changed since; held within the finite floats.
    pub fn value(&self) -> f64 {
        self.exact_value().map_or_else(|| self.change.value().signum() * f64::MAX, |value| value.value())
    }

    /// Changes it. Refused, with nothing changed, when the value would not stay finite.
    pub fn change_by(&mut self, step: f64, now_ms: u64) -> bool {
        let mut changed = self.clone();
        let finite = changed.change.add(step) && changed.exact_value().is_some();
        if finite {
            (changed.changed_at, changed.samples) = (now_ms, self.samples + 1);
            *self = changed;
        }
        finite
    }

    /// The value, if it is finite.
    fn exact_value(&self) -> Option<Sum> {
        let mut value = self.change;
        value.add(self.set.map_or(0.0, |(value, _)| value)).then_some(value)
    }
}

/// How many observations a window keeps as they came. Figures of a window that has no more are exact.
pub const EXACT_MAX: usize = 64;

/// The observations of a timer, histogram or distribution.
///
/// `n`, `sum` and `sum_squares` are of the values received, as Etsy's figures and JSON have them; `count` and
/// `weighted_sum` let each value stand for `1 / rate` observations, as the scrape has them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// How many values were received.
    pub n: u64,
    /// Their sum.
    pub sum: Sum,
    /// The sum of their squares.
    pub sum_squares: Sum,
    /// How many observations they stand for.
    pub count: Sum,
    /// The sum of these observations.
    pub weighted_sum: Sum,
    /// The smallest value; positive infinity when there is none.
    pub min: f64,
    /// The largest value; negative infinity when there is none.
    pub max: f64,
    /// The value received last and when, in milliseconds since the epoch.
    pub last: (f64, u64),
    /// The first values with their weights, as they came; the rest is in `histogram`. Totals keep none.
    pub exact: Vec<(f64, f64)>,
    /// The weights of all values that are not in `exact`.
    pub histogram: Histogram,
}

impl Default for Observed {
    fn default() -> Self {
        Self {
            n: 0,
            sum: Sum::default(),
            sum_squares: Sum::default(),
            count: Sum::default(),
            weighted_sum: Sum::default(),
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            last: (0.0, 0),
            exact: Vec::new(),
            histogram: Histogram::default(),
        }
    }
}

impl Observed {
    /// Whether it has no number that observations can't give.
    fn is_sound(&self) -> bool {
        let is_range = self.min.is_finite() && self.max.is_finite() && self.min <= self.max;
        let is_none = self.n == 0 && self.min == f64::INFINITY && self.max == f64::NEG_INFINITY;
        (is_range || is_none)
            && self.last.0.is_finite()
            && self.exact.iter().all(|(value, weight)| value.is_finite() && weight.is_finite() && *weight > 0.0)
    }

    /// Adds one value that stands for `weight` observations. Refused, with nothing changed, when a sum would not stay
    /// finite; that of the squares counts, so a value lies within 1.3e154.
    pub fn observe(&mut self, value: f64, weight: f64, now_ms: u64) -> bool {
        self.observe_within(value, weight, now_ms, &Limits::default())
    }

    /// [`Observed::observe`] with a bound on the buckets.
    pub fn observe_within(&mut self, value: f64, weight: f64, now_ms: u64, limits: &Limits) -> bool {
        let sums = Sums {
            sum: value.into(),
            sum_squares: Sum::square(value),
            count: weight.into(),
            weighted_sum: (value * weight).into(),
        };
        if !self.add_sums(&sums) {
            return false;
        }
        self.n = self.n.saturating_add(1);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        self.last = (value, now_ms);
        if self.exact.len() < EXACT_MAX && self.histogram.is_empty() {
            self.exact.push((value, weight));
        } else {
            self.histogram.record_within(value, weight, limits.buckets);
        }
        true
    }

    /// Adds another's observations. Of its exact values as many stay exact as `exact_max` has room for. Refused, with
    /// nothing changed, when a sum would not stay finite.
    pub fn merge(&mut self, other: &Self, exact_max: usize) -> bool {
        self.merge_within(other, exact_max, &Limits::default())
    }

    /// [`Observed::merge`] with a bound on the buckets.
    pub fn merge_within(&mut self, other: &Self, exact_max: usize, limits: &Limits) -> bool {
        let Self { sum, sum_squares, count, weighted_sum, .. } = *other;
        if !self.add_sums(&Sums { sum, sum_squares, count, weighted_sum }) {
            return false;
        }
        if self.n == 0 || (other.n > 0 && other.last.1 >= self.last.1) {
            self.last = other.last;
        }
        self.n = self.n.saturating_add(other.n);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        let room = exact_max.saturating_sub(self.exact.len()).min(other.exact.len());
        self.exact.extend_from_slice(&other.exact[..room]);
        for (value, weight) in &other.exact[room..] {
            self.histogram.record_within(*value, *weight, limits.buckets);
        }
        self.histogram.merge_within(&other.histogram, limits.buckets);
        true
    }

    /// Adds to all sums, or to none.
    fn add_sums(&mut self, other: &Sums) -> bool {
        let mut sums =
            Sums { sum: self.sum, sum_squares: self.sum_squares, count: self.count, weighted_sum: self.weighted_sum };
        let finite = sums.sum.merge(&other.sum)
            && sums.sum_squares.merge(&other.sum_squares)
            && sums.count.merge(&other.count)
            && sums.weighted_sum.merge(&other.weighted_sum);
        if finite {
            self.sum = sums.sum;
            self.sum_squares = sums.sum_squares;
            self.count = sums.count;
            self.weighted_sum = sums.weighted_sum;
        }
        finite
    }

    /// The mean of the values received; 0 without any.
    pub fn mean(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.sum.value() / self.n as f64 }
    }

    /// The standard deviation of the values received, over all of them (Etsy's): the root of
    /// `sum_squares / n - mean^2`, in double-word numbers, so that values far from 0 and close together lose nothing.
    pub fn stddev(&self) -> f64 {
        if self.n == 0 {
            return 0.0;
        }
        let n = self.n as f64;
        let variance = self.sum_squares.divided_by(n).minus(&self.sum.divided_by(n).squared());
        variance.value().max(0.0).sqrt()
    }

    /// Whether every value is at hand as it came.
    pub fn is_exact(&self) -> bool {
        self.histogram.is_empty()
    }

    /// The smallest value such that values up to it carry at least the share `q` of the weight (nearest rank): exact
    /// while all values are kept, else within the histogram's error. `None` without values.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        if self.n == 0 {
            return None;
        }
        if self.is_exact() {
            let mut sorted = self.exact.clone();
            sorted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            let rank = q * self.count.value();
            let mut below = 0.0;
            for (value, weight) in &sorted {
                below += weight;
                if below >= rank * (1.0 - 1e-12) {
                    return Some(*value);
                }
            }
            return Some(self.max);
        }
        self.distribution().quantile(q).map(|value| value.max(self.min).min(self.max))
    }

    /// The weights of all values, those in `exact` included.
    pub fn distribution(&self) -> Cow<'_, Histogram> {
        let mut all = Cow::Borrowed(&self.histogram);
        for (value, weight) in &self.exact {
            all.to_mut().record_within(*value, *weight, usize::MAX);
        }
        all
    }

    /// How many bytes it holds on the heap.
    pub fn memory(&self) -> usize {
        self.exact.capacity() * size_of::<(f64, f64)>() + self.histogram.memory()
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let exact = std::mem::take(&mut self.exact);
        *self = Self { exact, ..Self::default() };
        self.exact.clear();
    }
}

/// The four sums of [`Observed`].
struct Sums {
    sum: Sum,
    sum_squares: Sum,
    count: Sum,
    weighted_sum: Sum,
}

/// The marks of a meter.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Marks {
    /// The sum of the marks, by weight.
    pub count: Sum,
    /// The last mark and when it came, in milliseconds since the epoch.
    pub last: (f64, u64),
    /// How many readings were received.
    pub samples: u64,
}

/// What a series keeps of some samples: those of a cell, of a flush, of a window or of its whole life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Aggregate {
    /// Of a counter.
    Counter(Counter),
    /// Of a gauge.
    Gauge(Gauge),
    /// Of a timer, a histogram or a distribution.
    Observed(Box<Observed>),
    /// Of a set.
    Set(Box<Members>),
    /// Of a meter.
    Meter(Marks),
}

impl Aggregate {
    /// Nothing yet, of a kind.
    pub fn new(kind: Kind) -> Self {
        match kind {
            Kind::Counter => Self::Counter(Counter::default()),
            Kind::Gauge => Self::Gauge(Gauge::default()),
            Kind::Timer | Kind::Histogram | Kind::Distribution => Self::Observed(Box::default()),
            Kind::Set => Self::Set(Box::default()),
            Kind::Meter => Self::Meter(Marks::default()),
        }
    }

    /// How many readings were received; of a set, how many members it holds.
    pub fn samples(&self) -> u64 {
        match self {
            Self::Counter(counter) => counter.samples,
            Self::Gauge(gauge) => gauge.samples,
            Self::Observed(observed) => observed.n,
            Self::Set(members) => members.cardinality(),
            Self::Meter(marks) => marks.samples,
        }
    }

    /// Whether nothing came. Of a set this does not cost its estimate.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Set(members) => members.is_empty(),
            Self::Counter(_) | Self::Gauge(_) | Self::Observed(_) | Self::Meter(_) => self.samples() == 0,
        }
    }

    /// Whether it is of a kind and has no number that samples can't give. What others write may hold anything.
    pub fn is_sound(&self, kind: Kind) -> bool {
        let finite = |sums: &[&Sum]| sums.iter().all(|sum| sum.value().is_finite());
        discriminant(self) == discriminant(&Self::new(kind))
            && match self {
                Self::Counter(counter) => finite(&[&counter.increments, &counter.decrements]),
                Self::Gauge(gauge) => finite(&[&gauge.change]) && gauge.set.is_none_or(|(value, _)| value.is_finite()),
                Self::Observed(observed) => observed.is_sound(),
                Self::Set(_) => true,
                Self::Meter(marks) => finite(&[&marks.count]) && marks.last.0.is_finite(),
            }
    }

    /// Brings times back that lie ahead of now: they are of a clock that was wrong, and what is newer would seem older.
    pub fn hold_back(&mut self, now_ms: u64) {
        let hold = |at_ms: &mut u64| *at_ms = now_ms.min(*at_ms);
        match self {
            Self::Gauge(gauge) => {
                gauge.set.iter_mut().for_each(|(_, at_ms)| hold(at_ms));
                hold(&mut gauge.changed_at);
            }
            Self::Observed(observed) => hold(&mut observed.last.1),
            Self::Meter(marks) => hold(&mut marks.last.1),
            Self::Counter(_) | Self::Set(_) => {}
        }
    }

    /// How many bytes it holds on the heap.
    pub fn memory(&self) -> usize {
        match self {
            Self::Counter(_) | Self::Gauge(_) | Self::Meter(_) => 0,
            Self::Observed(observed) => size_of::<Observed>() + observed.memory(),
            Self::Set(members) => size_of::<Members>() + members.memory(),
        }
    }

    /// Adds what another of the same kind keeps; of its exact values as many stay exact as `exact_max` has room for.
    /// `false` when a sum would not stay finite (nothing changed) or the kinds differ.
    pub fn merge(&mut self, other: &Self, exact_max: usize) -> bool {
        self.merge_within(other, exact_max, &Limits::default())
    }

    /// [`Aggregate::merge`] with bounds on what it may hold.
    pub fn merge_within(&mut self, other: &Self, exact_max: usize, limits: &Limits) -> bool {
        match (self, other) {
            (Self::Counter(a), Self::Counter(b)) => merge_counter(a, b),
            (Self::Gauge(a), Self::Gauge(b)) => merge_gauge(a, b),
            (Self::Observed(a), Self::Observed(b)) => a.merge_within(b, exact_max, limits),
            (Self::Set(a), Self::Set(b)) => {
                a.merge_within(b, limits.set_exact);
                true
            }
            (Self::Meter(a), Self::Meter(b)) => merge_marks(a, b),
            (Self::Counter(_) | Self::Gauge(_) | Self::Observed(_) | Self::Set(_) | Self::Meter(_), _) => false,
        }
    }
}

fn merge_counter(a: &mut Counter, b: &Counter) -> bool {
    let mut merged = a.clone();
    let finite = merged.increments.merge(&b.increments) && merged.decrements.merge(&b.decrements);
    if finite {
        merged.samples = merged.samples.saturating_add(b.samples);
        *a = merged;
    }
    finite
}

/// Folds `b`, the later of the two where their times are equal, into `a`. The newest set wins; the other's changes
/// count if they came after it.
fn merge_gauge(a: &mut Gauge, b: &Gauge) -> bool {
    let set_at = |gauge: &Gauge| gauge.set.map(|(_, at)| at);
    let b_wins = b.set.is_some() && set_at(b) >= set_at(a);
    let (newer, older) = if b_wins { (b, &*a) } else { (&*a, b) };
    let counts = match set_at(newer) {
        None => true,
        Some(set) if b_wins => older.changed_at > set,
        Some(set) => older.changed_at >= set,
    };
    let mut merged = newer.clone();
    if counts {
        merged.changed_at = newer.changed_at.max(older.changed_at);
    }
    let finite = (!counts || merged.change.merge(&older.change)) && merged.exact_value().is_some();
    if finite {
        merged.samples = a.samples.saturating_add(b.samples);
        *a = merged;
    }
    finite
}

fn merge_marks(a: &mut Marks, b: &Marks) -> bool {
    let finite = a.count.merge(&b.count);
    if finite {
        if a.samples == 0 || (b.samples > 0 && b.last.1 >= a.last.1) {
            a.last = b.last;
        }
        a.samples = a.samples.saturating_add(b.samples);
    }
    finite
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is added and merged in these laws is a multiple of 2^-20 below 2^73, so that an `i128` holds sums exactly.
    const UNIT: f64 = 1.0 / 1_048_576.0;

    fn part() -> impl Strategy<Value = i128> {
        let bits = prop_oneof![0..20_u32, 0..74_u32];
        (any::<u64>(), bits, any::<bool>()).prop_map(|(random, bits, negative)| {
            // At most 53 bits, so that it is a float.
            let number = i128::from(random >> 11) << 21 >> (74 - bits);
            let number = number >> bits.saturating_sub(53) << bits.saturating_sub(53);
            if negative { -number } else { number }
        })
    }

    fn float(number: i128) -> f64 {
        number as f64 * UNIT
    }

    fn sum(numbers: &[i128]) -> Sum {
        let mut sum = Sum::default();
        for number in numbers {
            assert!(sum.add(float(*number)));
        }
        sum
    }

    proptest! {
        #[test]
        fn a_sum_is_exact_in_any_order(numbers in prop::collection::vec(part(), 0..60), cut in any::<prop::sample::Index>()) {
            let exact: i128 = numbers.iter().sum();
            let forward = sum(&numbers);
            prop_assert_eq!(forward.value(), float(exact));
            let mut reversed = numbers.clone();
            reversed.reverse();
            prop_assert_eq!(sum(&reversed), forward);
            let (left, right) = numbers.split_at(cut.index(numbers.len() + 1));
            let mut merged = sum(right);
            prop_assert!(merged.merge(&sum(left)));
            prop_assert_eq!(merged, forward);
            prop_assert_eq!(forward.minus(&sum(left)), sum(right));
        }

        #[test]
        fn a_sum_comes_apart_and_together(numbers in prop::collection::vec(part(), 0..60)) {
            let exact: i128 = numbers.iter().sum();
            let sum = sum(&numbers);
            let (whole, fraction) = sum.split();
            // 2^20 units are one; the shift rounds down.
            let floor = exact >> 20;
            prop_assert_eq!(i128::from(whole), floor.clamp(i64::MIN.into(), i64::MAX.into()));
            if floor == i128::from(whole) {
                prop_assert_eq!(fraction, float(exact - (floor << 20)));
                prop_assert!((0.0..1.0).contains(&fraction));
                prop_assert_eq!(Sum::join(whole, fraction), sum);
            } else {
                prop_assert_eq!(Sum::join(whole, fraction).value(), sum.value());
            }
        }

        #[test]
        fn any_sum_comes_apart(a in any::<f64>(), b in any::<f64>()) {
            let mut sum = Sum::default();
            let added = sum.add(a) && sum.add(b);
            prop_assert_eq!(added, a.is_finite() && b.is_finite() && (a + b).is_finite());
            let (whole, fraction) = sum.split();
            let back = Sum::join(whole, fraction).value();
            prop_assert!((back - sum.value()).abs() <= (1.0 + sum.value().abs()) * f64::EPSILON);
        }

        #[test]
        fn fractions_add_up_closely(numbers in prop::collection::vec(0.0..1e6_f64, 1..200)) {
            let mut forward = Sum::default();
            let mut backward = Sum::default();
            for (first, last) in numbers.iter().zip(numbers.iter().rev()) {
                forward.add(*first);
                backward.add(*last);
            }
            prop_assert!(forward.minus(&backward).value().abs() <= 1e-28 * forward.value());
        }
    }

    #[test]
    fn a_counter_counts_on_beyond_2_to_53() {
        // The case agg-counter-big, and then on to where the second float would run full if it were not carried over.
        let mut sum = Sum::from(9_007_199_254_740_992.0);
        assert!(sum.add(1.0) && sum.add(1.0));
        assert_eq!(sum.value(), 9_007_199_254_740_994.0);
        let (large, small) = (f64::from(100).exp2(), f64::from(47).exp2() - 1.0);
        let mut sum = Sum::from(large);
        for _ in 0..1_000 {
            sum.add(small);
        }
        sum.add(-large);
        assert_eq!(sum.value(), small * 1_000.0);
    }

    #[test]
    fn a_sum_just_beyond_an_i64_loses_nothing() {
        for (number, rest) in [(1.5, 1.5), (2.0, 2.0), (0.5, 0.5)] {
            let mut sum = Sum::join(i64::MAX, 0.0);
            sum.add(number);
            assert_eq!(sum.split(), (i64::MAX, rest));
            assert_eq!(Sum::join(i64::MAX, rest), sum);
        }
        let mut below = Sum::join(i64::MIN, 0.0);
        below.add(-1.5);
        assert_eq!(below.split(), (i64::MIN, -1.5));
        assert_eq!(Sum::join(i64::MIN, 0.25).split(), (i64::MIN, 0.25));
        assert_eq!(Sum::join(-1, 0.25).value(), -0.75);
        assert_eq!(Sum::from(f64::MAX).split().0, i64::MAX);
    }

    #[test]
    fn a_sum_that_would_not_be_finite_is_refused() {
        let mut sum = Sum::from(f64::MAX);
        sum.add(1.0);
        let before = sum;
        assert!(!sum.add(f64::MAX) && !sum.merge(&before) && !sum.add(f64::NAN) && !sum.add(f64::NEG_INFINITY));
        assert_eq!(sum, before);
        assert!(sum.add(-f64::MAX));
        assert_eq!(sum.value(), 1.0);
    }

    /// A reading of some kind: its number is a multiple of 1/64, so that every order of additions gives the same sums.
    fn reading() -> impl Strategy<Value = f64> {
        prop_oneof![8 => (-5_000..50_000_i32).prop_map(|n| f64::from(n) / 64.0), 1 => Just(0.0)]
    }

    fn apply(aggregate: &mut Aggregate, number: f64, now_ms: u64) {
        match aggregate {
            Aggregate::Counter(counter) => {
                let side = if number < 0.0 { &mut counter.decrements } else { &mut counter.increments };
                assert!(side.add(number.abs()));
                counter.samples += 1;
            }
            Aggregate::Gauge(gauge) if number < 100.0 => {
                assert!(gauge.change.add(number));
                gauge.changed_at = now_ms;
                gauge.samples += 1;
            }
            Aggregate::Gauge(gauge) => {
                *gauge = Gauge { set: Some((number, now_ms)), samples: gauge.samples + 1, ..Gauge::default() };
            }
            Aggregate::Observed(observed) => assert!(observed.observe(number, 2.0, now_ms)),
            Aggregate::Set(members) => {
                members.insert(&number.to_le_bytes());
            }
            Aggregate::Meter(marks) => {
                assert!(marks.count.add(number));
                marks.last = (number, now_ms);
                marks.samples += 1;
            }
        }
    }

    /// Readings with their times, which ascend, as one aggregate.
    fn aggregate(kind: Kind, readings: &[(f64, u64)]) -> Aggregate {
        let mut aggregate = Aggregate::new(kind);
        for (number, now_ms) in readings {
            apply(&mut aggregate, *number, *now_ms);
        }
        aggregate
    }

    fn merged(a: &Aggregate, b: &Aggregate, exact_max: usize) -> Aggregate {
        let mut merged = a.clone();
        assert!(merged.merge(b, exact_max));
        merged
    }

    /// The same with all values in the histogram and in no order, as totals have them.
    fn total(aggregate: &Aggregate) -> Aggregate {
        let mut total = aggregate.clone();
        if let Aggregate::Observed(observed) = &mut total {
            observed.histogram = observed.distribution().into_owned();
            observed.exact.clear();
        }
        total
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn merging_parts_is_having_all(
            kind in prop::sample::select(Kind::ALL.to_vec()),
            numbers in prop::collection::vec(reading(), 0..300),
            cuts in any::<[prop::sample::Index; 2]>(),
            exact_max in prop_oneof![Just(0), Just(EXACT_MAX)],
        ) {
            let readings: Vec<_> = numbers.iter().zip(1_u64..).map(|(number, at)| (*number, at)).collect();
            let mut cuts = cuts.map(|cut| cut.index(readings.len() + 1));
            cuts.sort_unstable();
            let all = total(&aggregate(kind, &readings));
            let a = aggregate(kind, &readings[..cuts[0]]);
            let b = aggregate(kind, &readings[cuts[0]..cuts[1]]);
            let c = aggregate(kind, &readings[cuts[1]..]);
            let empty = Aggregate::new(kind);
            prop_assert_eq!(total(&merged(&merged(&a, &b, exact_max), &c, exact_max)), all.clone());
            prop_assert_eq!(total(&merged(&a, &merged(&b, &c, exact_max), exact_max)), all.clone());
            prop_assert_eq!(total(&merged(&merged(&empty, &a, exact_max), &empty, exact_max)), total(&a));
            if kind != Kind::Gauge {
                prop_assert_eq!(total(&merged(&c, &merged(&b, &a, exact_max), exact_max)), all);
            }
        }

        #[test]
        fn a_gauge_follows_the_newest_set_of_two_shards(
            ops in prop::collection::vec((reading(), any::<bool>()), 1..40),
        ) {
            // Each shard's changes after the newest set count, whichever shard is folded first.
            let mut shards = [Vec::new(), Vec::new()];
            let mut value = 0.0;
            let last_set = ops.iter().rposition(|(number, _)| *number >= 100.0);
            for (at, (number, shard)) in ops.iter().enumerate() {
                // Changes of a shard are one sum; those before a set of the other shard are left out here.
                if *number >= 100.0 || last_set.is_none_or(|set| at > set) {
                    shards[usize::from(*shard)].push((*number, at as u64 + 1));
                    value = if *number >= 100.0 { *number } else { value + number };
                }
            }
            let [a, b] = shards.map(|readings| aggregate(Kind::Gauge, &readings));
            for fold in [merged(&a, &b, 0), merged(&b, &a, 0)] {
                let Aggregate::Gauge(gauge) = fold else { unreachable!() };
                prop_assert_eq!(gauge.value(), value);
            }
        }

        #[test]
        fn figures_of_observations_hold(
            numbers in prop::collection::vec(reading(), 1..300),
            offset in prop_oneof![Just(0.0), Just(1e9)],
            q in 0.0..=1.0_f64,
        ) {
            let mut numbers: Vec<_> = numbers.iter().map(|number| number + offset).collect();
            let mut observed = Observed::default();
            for (number, at) in numbers.iter().zip(1..) {
                observed.observe(*number, 1.0, at);
            }
            let n = numbers.len() as f64;
            let mean = numbers.iter().map(|number| number - offset).sum::<f64>() / n;
            let variance = numbers.iter().map(|number| (number - offset - mean).powi(2)).sum::<f64>() / n;
            prop_assert!((observed.mean() - offset - mean).abs() <= 1e-15 * observed.mean().abs() + 1e-9);
            prop_assert!((observed.stddev() - variance.sqrt()).abs() <= 1e-9 * variance.sqrt());
            prop_assert_eq!(observed.n as usize, numbers.len());
            prop_assert_eq!(observed.last, (numbers[numbers.len() - 1], numbers.len() as u64));
            numbers.sort_by(f64::total_cmp);
            prop_assert_eq!((observed.min, observed.max), (numbers[0], numbers[numbers.len() - 1]));
            let rank = ((q * n * (1.0 - 1e-12)).ceil() as usize).max(1) - 1;
            let answer = observed.quantile(q).unwrap();
            if observed.is_exact() {
                prop_assert_eq!(answer, numbers[rank]);
            } else {
                prop_assert!((answer - numbers[rank]).abs() <= 0.005_42 * numbers[rank].abs());
            }
        }

        #[test]
        fn spoilt_bytes_are_refused_or_an_aggregate(
            kind in prop::sample::select(Kind::ALL.to_vec()),
            numbers in prop::collection::vec(reading(), 0..80),
            spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        ) {
            let readings: Vec<_> = numbers.iter().map(|number| (*number, 1)).collect();
            let whole = aggregate(kind, &readings);
            let mut bytes = postcard::to_stdvec(&whole).unwrap();
            prop_assert_eq!(&postcard::from_bytes::<Aggregate>(&bytes).unwrap(), &whole);
            for (at, byte) in spoilt {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(mut read) = postcard::from_bytes::<Aggregate>(&bytes) {
                let copy = read.clone();
                read.merge(&copy, EXACT_MAX);
                let figure = match read {
                    Aggregate::Counter(counter) => counter.increments.minus(&counter.decrements).split().1,
                    Aggregate::Gauge(gauge) => gauge.value(),
                    Aggregate::Observed(observed) => observed.quantile(0.5).unwrap_or_default() + observed.stddev(),
                    Aggregate::Set(members) => members.cardinality() as f64,
                    Aggregate::Meter(marks) => marks.count.split().1,
                };
                prop_assert!(kind != Kind::Counter || figure.is_finite());
            }
        }
    }

    #[test]
    fn a_merge_that_would_not_stay_finite_changes_nothing() {
        let huge = Sum::from(f64::MAX);
        let counter = Counter { increments: Sum::from(1.0), decrements: huge, samples: 1 };
        let gauge = Gauge { change: huge, changed_at: 5, samples: 1, ..Gauge::default() };
        let set = Gauge { set: Some((f64::MAX, 4)), samples: 1, ..Gauge::default() };
        let mut observed = Observed::default();
        assert!(observed.observe(1.2e154, 1.0, 1));
        let mut weighted = Observed::default();
        assert!(weighted.observe(1e150, 1e158, 1));
        let pairs = [
            (Aggregate::Counter(counter.clone()), Aggregate::Counter(counter)),
            (Aggregate::Gauge(gauge.clone()), Aggregate::Gauge(gauge.clone())),
            (Aggregate::Gauge(set), Aggregate::Gauge(gauge)),
            (Aggregate::Observed(Box::new(observed.clone())), Aggregate::Observed(Box::new(observed.clone()))),
            (Aggregate::Observed(Box::new(weighted.clone())), Aggregate::Observed(Box::new(weighted))),
            (
                Aggregate::Meter(Marks { count: huge, last: (1.0, 1), samples: 1 }),
                Aggregate::Meter(Marks { count: huge, last: (2.0, 2), samples: 1 }),
            ),
            (Aggregate::new(Kind::Counter), Aggregate::new(Kind::Set)),
        ];
        for (mut a, b) in pairs {
            let before = a.clone();
            assert!(!a.merge(&b, EXACT_MAX), "{a:?}");
            assert_eq!(a, before);
        }
        let before = observed.clone();
        for value in [1.2e154, 1e300, f64::NAN, f64::INFINITY] {
            assert!(!observed.observe(value, 1.0, 2));
            assert_eq!(observed, before);
        }
    }

    #[test]
    fn a_change_that_would_take_a_gauge_beyond_all_numbers_is_refused() {
        let mut gauge = Gauge { set: Some((f64::MAX, 1)), samples: 1, ..Gauge::default() };
        let before = gauge.clone();
        assert!(!gauge.change_by(f64::MAX, 2) && !gauge.change_by(f64::NAN, 2));
        assert_eq!(gauge, before);
        assert!(gauge.change_by(-f64::MAX, 3));
        assert_eq!((gauge.value(), gauge.changed_at, gauge.samples), (0.0, 3, 2));
    }

    #[test]
    fn changes_at_the_moment_of_a_set_go_by_the_order_of_folding() {
        let set = Aggregate::Gauge(Gauge { set: Some((10.0, 7)), samples: 1, ..Gauge::default() });
        let mut change = Gauge { changed_at: 7, samples: 1, ..Gauge::default() };
        change.change.add(2.0);
        let change = Aggregate::Gauge(change);
        let value = |aggregate| match aggregate {
            Aggregate::Gauge(gauge) => gauge.value(),
            Aggregate::Counter(_) | Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_) => f64::NAN,
        };
        assert_eq!(value(merged(&set, &change, 0)), 12.0);
        assert_eq!(value(merged(&change, &set, 0)), 10.0);
    }

    #[test]
    fn limits_bound_what_a_series_keeps() {
        let limits = Limits { buckets: 320, set_exact: 10 };
        let mut wide = Aggregate::new(Kind::Timer);
        let mut set = Aggregate::new(Kind::Set);
        for number in 0..1_000_i32 {
            let (mut value, mut member) = (Aggregate::new(Kind::Timer), Aggregate::new(Kind::Set));
            apply(&mut value, (f64::from(number) / 10.0).exp2(), 1);
            apply(&mut member, f64::from(number), 1);
            assert!(wide.merge_within(&value, 0, &limits) && set.merge_within(&member, 0, &limits));
        }
        let (Aggregate::Observed(wide), Aggregate::Set(set)) = (wide, set) else { unreachable!() };
        assert!(wide.histogram.occupied() <= 320 && wide.histogram.halvings() > 0);
        assert!(set.exact().is_none());
    }
}
