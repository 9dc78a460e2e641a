//! What a series keeps of its samples, by kind.

use serde::{Deserialize, Serialize};

use super::histogram::Histogram;
use super::set::Members;
use crate::sample::Kind;

/// A sum of finite numbers, exact for whole numbers up to 2^106, else to about twice the precision of a float.
///
/// It is the unevaluated sum of two floats; adding uses Knuth's TwoSum (The Art of Computer Programming, volume 2,
/// 4.2.2, theorem B).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Sum {
    high: f64,
    low: f64,
}

impl Sum {
    /// Adds a number. A result that is not finite is refused: the sum stays, and the answer is `false`.
    #[inline]
    pub fn add(&mut self, number: f64) -> bool {
        let high = self.high + number;
        if !high.is_finite() {
            return false;
        }
        let shadow = high - self.high;
        let error = (self.high - (high - shadow)) + (number - shadow);
        self.high = high;
        self.low += error;
        true
    }

    /// Adds another sum, under the same rule.
    pub fn merge(&mut self, other: &Self) -> bool {
        self.add(other.high) && self.add(other.low)
    }

    /// The sum less another.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let mut result = *self;
        result.add(-other.high);
        result.add(-other.low);
        result
    }

    /// The nearest float.
    pub fn value(&self) -> f64 {
        self.high + self.low
    }

    /// The whole part, rounded towards negative infinity and held within `i64`, and what is left of it, in [0, 1) but
    /// for sums beyond `i64`.
    pub fn split(&self) -> (i64, f64) {
        let floor = (self.high.floor(), self.low.floor());
        let whole = (floor.0 as i128 + floor.1 as i128).clamp(i128::from(i64::MIN), i128::from(i64::MAX));
        let mut rest = *self;
        // An i64 is the sum of two floats of which each is exact: its upper and its lower 32 bits.
        let whole = whole as i64;
        rest.add(-(((whole >> 32) as f64) * 4_294_967_296.0));
        rest.add(-((whole & 0xffff_ffff) as f64));
        let mut fraction = rest.value();
        if (1.0..2.0).contains(&fraction) {
            fraction -= 1.0;
            return (whole.saturating_add(1), fraction);
        }
        (whole, fraction)
    }

    /// The reverse of [`Sum::split`].
    pub fn join(whole: i64, fraction: f64) -> Self {
        let mut sum = Self::default();
        sum.add(((whole >> 32) as f64) * 4_294_967_296.0);
        sum.add((whole & 0xffff_ffff) as f64);
        sum.add(fraction);
        sum
    }
}

impl From<f64> for Sum {
    fn from(number: f64) -> Self {
        Self { high: number, low: 0.0 }
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
    /// The value: what was set, else 0, and what was changed since.
    pub fn value(&self) -> f64 {
        let mut value = self.change;
        value.add(self.set.map_or(0.0, |(value, _)| value));
        value.value()
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
    /// Adds one value that stands for `weight` observations. Refused, with nothing changed, when a sum would not stay
    /// finite.
    pub fn observe(&mut self, value: f64, weight: f64, now_ms: u64) -> bool {
        let finite = (self.sum_squares.value() + value * value).is_finite()
            && (self.weighted_sum.value() + value * weight).is_finite();
        if !finite {
            return false;
        }
        self.n += 1;
        self.sum.add(value);
        self.sum_squares.add(value * value);
        self.count.add(weight);
        self.weighted_sum.add(value * weight);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        self.last = (value, now_ms);
        if self.exact.len() < EXACT_MAX && self.histogram.is_empty() {
            self.exact.push((value, weight));
        } else {
            self.histogram.record(value, weight);
        }
        true
    }

    /// Adds another's observations. Of its exact values as many stay exact as `exact_max` has room for.
    pub fn merge(&mut self, other: &Self, exact_max: usize) -> bool {
        let finite = (self.sum_squares.value() + other.sum_squares.value()).is_finite()
            && (self.weighted_sum.value() + other.weighted_sum.value()).is_finite();
        if !finite {
            return false;
        }
        self.n += other.n;
        self.sum.merge(&other.sum);
        self.sum_squares.merge(&other.sum_squares);
        self.count.merge(&other.count);
        self.weighted_sum.merge(&other.weighted_sum);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        if other.last.1 >= self.last.1 {
            self.last = other.last;
        }
        let room = exact_max.saturating_sub(self.exact.len()).min(other.exact.len());
        self.exact.extend_from_slice(&other.exact[..room]);
        for (value, weight) in &other.exact[room..] {
            self.histogram.record(*value, *weight);
        }
        self.histogram.merge(&other.histogram);
        true
    }

    /// The mean of the values received; 0 without any.
    pub fn mean(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.sum.value() / self.n as f64 }
    }

    /// The standard deviation of the values received, over all of them (Etsy's): the root of
    /// `sum_squares / n - mean^2`.
    pub fn stddev(&self) -> f64 {
        if self.n == 0 {
            return 0.0;
        }
        let mean = self.mean();
        (self.sum_squares.value() / self.n as f64 - mean * mean).max(0.0).sqrt()
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
        let mut all = self.histogram.clone();
        for (value, weight) in &self.exact {
            all.record(*value, *weight);
        }
        all.quantile(q).map(|value| value.clamp(self.min, self.max))
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let exact = std::mem::take(&mut self.exact);
        *self = Self { exact, ..Self::default() };
        self.exact.clear();
    }
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

    /// Adds what another of the same kind keeps; of its exact values as many stay exact as `exact_max` has room for.
    /// `false` when a sum would not stay finite (nothing changed) or the kinds differ.
    pub fn merge(&mut self, other: &Self, exact_max: usize) -> bool {
        match (self, other) {
            (Self::Counter(a), Self::Counter(b)) => merge_counter(a, b),
            (Self::Gauge(a), Self::Gauge(b)) => merge_gauge(a, b),
            (Self::Observed(a), Self::Observed(b)) => a.merge(b, exact_max),
            (Self::Set(a), Self::Set(b)) => {
                a.merge(b);
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
        merged.samples += b.samples;
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
    let later = match (set_at(newer), set_at(older)) {
        (None, _) => true,
        (Some(set), None) if !b_wins => older.changed_at >= set,
        (Some(set), _) => older.changed_at > set,
    };
    let mut merged = newer.clone();
    let finite = !later || merged.change.merge(&older.change);
    if finite {
        merged.samples = a.samples + b.samples;
        merged.changed_at = newer.changed_at.max(older.changed_at);
        *a = merged;
    }
    finite
}

fn merge_marks(a: &mut Marks, b: &Marks) -> bool {
    let finite = a.count.merge(&b.count);
    if finite {
        a.samples += b.samples;
        if b.last.1 >= a.last.1 {
            a.last = b.last;
        }
    }
    finite
}
