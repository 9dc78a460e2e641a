//! The figures that Etsy's StatsD flushes, computed from a window (`lib/process_metrics.js` of Etsy StatsD 0.10), and which
//! series are left out because nothing came (`stats.js`).
//!
//! They are of the values received, not of what those stand for; only `count` and `count_ps` go by weight, or all of them
//! where [`Config::weight_by_rate`] says so. Exact while a window keeps all its values, else the percentile figures, the
//! median and the bins of a histogram are within the histogram's error and all others are exact; by weight the sum of the
//! squares and the deviation are within it too.

mod config;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

pub use config::{Bins, Config, Left};

use super::ledger::Closed;
use super::{Aggregate, Counter, Observed};

/// A figure: its name behind the metric's, and its value. That of a gauge has no name.
pub type Figure = (Cow<'static, str>, f64);

impl Config {
    /// The figures of a series at the end of a window of so many seconds; `None` where it is left out. A meter has none
    /// here: its rates are those of its whole life.
    pub fn figures(&self, key: &str, closed: &Closed, seconds: f64) -> Option<Vec<Figure>> {
        let is_idle = closed.idle > 0;
        let shown = |left: Left, figures: &dyn Fn() -> Vec<Figure>| {
            (!(is_idle && left.is_left(self.delete_idle_stats))).then(figures)
        };
        match &closed.window.aggregate {
            Aggregate::Counter(of) => shown(self.delete_counters, &|| counter(of, seconds)),
            Aggregate::Observed(of) => shown(self.delete_timers, &|| self.observed(key, of, seconds)),
            Aggregate::Set(members) => {
                shown(self.delete_sets, &|| vec![("count".into(), members.cardinality() as f64)])
            }
            Aggregate::Gauge(gauge) => {
                let is_kept = closed.idle < self.gauges_max_ttl.max(1);
                let is_shown = is_kept || !self.delete_gauges.is_left(self.delete_idle_stats);
                is_shown.then(|| vec![("value".into(), gauge.value())])
            }
            Aggregate::Meter(_) => None,
        }
    }

    /// The figures of a timer, those of them that are asked for.
    fn observed(&self, key: &str, observed: &Observed, seconds: f64) -> Vec<Figure> {
        let bins = self.histograms.iter().find(|bins| key.contains(&bins.metric)).map_or(&[][..], |bins| &bins.bins);
        let mut figures = self.all(observed, bins, seconds);
        if !self.timer_metrics.is_empty() {
            figures.retain(|(name, _)| self.timer_metrics.iter().any(|metric| is_of(name, metric)));
        }
        figures
    }

    /// All figures of observations. A positive threshold takes so many percent of the values from below (`upper_90`), a
    /// negative one from above (`lower_top10`); one that takes less than half a value is left out. Without values `count`
    /// and `count_ps` are 0, and there is nothing else.
    fn all(&self, observed: &Observed, bins: &[f64], seconds: f64) -> Vec<Figure> {
        let count = observed.count.value();
        let rates = [("count".into(), count), ("count_ps".into(), count / seconds)];
        if observed.n == 0 {
            return rates.into();
        }
        let ranked = Ranked::new(observed, self.weight_by_rate);
        let mut figures = Vec::with_capacity(10 + 5 * self.percentiles.len() + bins.len());
        for percent in &self.percentiles {
            figures.extend(ranked.threshold(*percent).into_iter().flatten());
        }
        figures.push(("std".into(), ranked.deviation()));
        figures.push(("upper".into(), observed.max));
        figures.push(("lower".into(), observed.min));
        figures.extend(rates);
        figures.push(("sum".into(), ranked.sum));
        figures.push(("sum_squares".into(), ranked.sum_squares));
        figures.push(("mean".into(), ranked.sum / ranked.n));
        figures.push(("median".into(), ranked.median()));
        figures.extend(ranked.histogram(bins));
        figures
    }
}

/// `count` and `rate` of a counter over so many seconds.
fn counter(counter: &Counter, seconds: f64) -> Vec<Figure> {
    let count = counter.increments.minus(&counter.decrements).value();
    vec![("count".into(), count), ("rate".into(), count / seconds)]
}

/// Whether a figure is one that an entry of `timer_metrics` asks for: by its name, or, of a threshold, with `_percent` in
/// place of its last number. Bins go with the word `histogram`.
fn is_of(figure: &str, metric: &str) -> bool {
    let name = figure.split_once('.').map_or(figure, |(histogram, _)| histogram);
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let stem = if stem.len() < name.len() { stem.strip_suffix("top").unwrap_or(stem).strip_suffix('_') } else { None };
    match stem {
        None => name == metric,
        Some(stem) => metric.strip_suffix("_percent") == Some(stem),
    }
}

/// How a number stands in a figure's name: `90`, `99_9`, `0_01`.
fn label(number: f64) -> String {
    number.to_string().replacen('.', "_", 1)
}

/// Values in ascending order, each with how often it came, or what it stands for.
struct Ranked<'o> {
    observed: &'o Observed,
    values: Vec<(f64, f64)>,
    /// How many values there are.
    n: f64,
    sum: f64,
    sum_squares: f64,
    by_weight: bool,
}

impl<'o> Ranked<'o> {
    fn new(observed: &'o Observed, by_weight: bool) -> Self {
        let times = |weight: f64| if by_weight { weight } else { 1.0 };
        let mut values: Vec<_> = observed.exact.iter().map(|(value, weight)| (*value, times(*weight))).collect();
        // Buckets carry weights. The values in them came with rates that are no longer known one by one, so each weight
        // is taken for the same number of values.
        let buckets: Vec<_> = observed.histogram.buckets().collect();
        let weight: f64 = buckets.iter().map(|(_, _, weight)| weight).sum();
        let share = if by_weight { 1.0 } else { (observed.n as f64 - values.len() as f64) / weight };
        let middles = buckets.into_iter().map(|(lower, upper, weight)| (middle(lower, upper), weight * share));
        values.extend(middles.map(|(value, times)| (value.clamp(observed.min, observed.max), times)));
        values.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let (n, sum, sum_squares) = if by_weight {
            let squares = values.iter().map(|(value, times)| value * value * times).sum();
            (observed.count.value(), observed.weighted_sum.value(), squares)
        } else {
            (observed.n as f64, observed.sum.value(), observed.sum_squares.value())
        };
        Self { observed, values, n, sum, sum_squares, by_weight }
    }

    fn threshold(&self, percent: f64) -> Option<[Figure; 5]> {
        // A single value is not ranked: it stands for every threshold.
        let taken = if self.n == 1.0 { 1.0 } else { (percent.abs() / 100.0 * self.n + 0.5).floor().min(self.n) };
        if taken == 0.0 {
            return None;
        }
        let below = percent > 0.0;
        let (boundary, sum, sum_squares) = self.taken(taken, below);
        let threshold = label(percent).replacen('-', "top", 1);
        let figure = |name: &str, value| (Cow::from(format!("{name}_{threshold}")), value);
        Some([
            figure("count", taken),
            figure("mean", sum / taken),
            figure(if below { "upper" } else { "lower" }, boundary),
            figure("sum", sum),
            figure("sum_squares", sum_squares),
        ])
    }

    /// The last of the first values from one end, their sum, and the sum of their squares.
    fn taken(&self, taken: f64, below: bool) -> (f64, f64, f64) {
        if taken >= self.n {
            return (if below { self.observed.max } else { self.observed.min }, self.sum, self.sum_squares);
        }
        let mut figures = (0.0, 0.0, 0.0);
        let mut left = taken;
        let mut take = |(value, times): &(f64, f64)| {
            let times = times.min(left);
            left -= times;
            figures = (*value, figures.1 + value * times, figures.2 + value * value * times);
            left > taken * f64::EPSILON
        };
        // Whether more is wanted decides, not the sum of the counts, which rounding may leave short.
        if below {
            let _ = self.values.iter().all(&mut take);
        } else {
            let _ = self.values.iter().rev().all(&mut take);
        }
        figures
    }

    /// How many values lie below each bound, and not below the one before it. Those above the last bound are in none.
    fn histogram(&self, bins: &[f64]) -> Vec<Figure> {
        let mut values = self.values.iter().peekable();
        let mut bin = |bound: f64| {
            let mut times = 0.0;
            while let Some((_, more)) = values.next_if(|(value, _)| *value < bound || bound == f64::INFINITY) {
                times += more;
            }
            // What buckets are taken for need not be whole, and is a number of values.
            let count = if self.by_weight { times } else { times.round() };
            (Cow::from(format!("histogram.bin_{}", label(bound))), count)
        };
        bins.iter().map(|bound| bin(*bound)).collect()
    }

    /// The middle value, or the mean of the two that share the middle.
    fn median(&self) -> f64 {
        let half = (self.n / 2.0).floor();
        let upper = self.taken(half + 1.0, true).0;
        // Of weights that are not whole there is no number of values that could be even.
        if self.n == half * 2.0 { f64::midpoint(self.taken(half, true).0, upper) } else { upper }
    }

    /// Over all values, from their differences to the mean where these are at hand: the sums lose digits when the mean is
    /// large.
    fn deviation(&self) -> f64 {
        if !self.observed.is_exact() && !self.by_weight {
            return self.observed.stddev();
        }
        let mean = self.sum / self.n;
        let squares: f64 = self.values.iter().map(|(value, times)| (value - mean) * (value - mean) * times).sum();
        (squares / self.n).sqrt()
    }
}

/// Of the values in a bucket the one that is least far, relatively, from all others.
fn middle(lower: f64, upper: f64) -> f64 {
    if lower + upper == 0.0 { 0.0 } else { 2.0 * lower * (upper / (lower + upper)) }
}
