//! The figures that Etsy's StatsD flushes, computed from a window (`lib/process_metrics.js` of Etsy StatsD 0.10).
//!
//! They are of the values received, not of what those stand for; only `count` and `count_ps` go by weight. Exact while a
//! window keeps all its values, else the percentile figures are within the histogram's error and all others are exact.

use std::borrow::Cow;

use super::{Counter, Observed};

/// A figure: its name behind the metric's, and its value.
pub type Figure = (Cow<'static, str>, f64);

/// `count` and `rate` of a counter over so many seconds.
pub fn counter(counter: &Counter, seconds: f64) -> Vec<Figure> {
    let count = counter.increments.minus(&counter.decrements).value();
    vec![("count".into(), count), ("rate".into(), count / seconds)]
}

/// The figures of observations over so many seconds, for thresholds in percent. A positive threshold takes so much of the
/// values from below (`upper_90`), a negative one from above (`lower_top10`); one that takes less than half a value is
/// left out. Without values `count` and `count_ps` are 0, and there is nothing else.
pub fn observed(observed: &Observed, percentiles: &[f64], seconds: f64) -> Vec<Figure> {
    let count = observed.count.value();
    let rates = [("count".into(), count), ("count_ps".into(), count / seconds)];
    if observed.n == 0 {
        return rates.into();
    }
    let ranked = Ranked::new(observed);
    let mut figures = Vec::with_capacity(10 + 5 * percentiles.len());
    for percent in percentiles {
        figures.extend(ranked.threshold(*percent).into_iter().flatten());
    }
    figures.push(("std".into(), ranked.deviation()));
    figures.push(("upper".into(), observed.max));
    figures.push(("lower".into(), observed.min));
    figures.extend(rates);
    figures.push(("sum".into(), observed.sum.value()));
    figures.push(("sum_squares".into(), observed.sum_squares.value()));
    figures.push(("mean".into(), observed.mean()));
    figures.push(("median".into(), ranked.median()));
    figures
}

/// How a percentile stands in a figure's name: `90`, `99_9`, `top10`.
fn label(percent: f64) -> String {
    percent.to_string().replacen('.', "_", 1).replacen('-', "top", 1)
}

/// Values in ascending order, each with how often it came.
struct Ranked<'o> {
    observed: &'o Observed,
    values: Vec<(f64, f64)>,
}

impl<'o> Ranked<'o> {
    fn new(observed: &'o Observed) -> Self {
        let mut values: Vec<_> = observed.exact.iter().map(|(value, _)| (*value, 1.0)).collect();
        // Buckets carry weights. The values in them came with rates that are no longer known one by one, so each weight
        // is taken for the same number of values.
        let buckets: Vec<_> = observed.histogram.buckets().collect();
        let weight: f64 = buckets.iter().map(|(_, _, weight)| weight).sum();
        let times = (observed.n as f64 - values.len() as f64) / weight;
        let middles = buckets.into_iter().map(|(lower, upper, weight)| (middle(lower, upper), weight * times));
        values.extend(middles.map(|(value, times)| (value.clamp(observed.min, observed.max), times)));
        values.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        Self { observed, values }
    }

    fn threshold(&self, percent: f64) -> Option<[Figure; 5]> {
        let n = self.observed.n as f64;
        // A single value is not ranked: it stands for every threshold.
        let taken = if self.observed.n == 1 { 1.0 } else { (percent.abs() / 100.0 * n + 0.5).floor().min(n) };
        if taken == 0.0 {
            return None;
        }
        let below = percent > 0.0;
        let (boundary, sum, sum_squares) = self.taken(taken, below);
        let figure = |name: &str, value| (Cow::from(format!("{name}_{}", label(percent))), value);
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
        let all = self.observed;
        if taken >= all.n as f64 {
            return (if below { all.max } else { all.min }, all.sum.value(), all.sum_squares.value());
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

    /// The middle value, or the mean of the two that share the middle.
    fn median(&self) -> f64 {
        let n = self.observed.n;
        let upper = self.taken((n / 2 + 1) as f64, true).0;
        if n % 2 == 1 { upper } else { f64::midpoint(self.taken((n / 2) as f64, true).0, upper) }
    }

    /// Over all values, from their differences to the mean where these are at hand: the sums lose digits when the mean is
    /// large.
    fn deviation(&self) -> f64 {
        if !self.observed.is_exact() {
            return self.observed.stddev();
        }
        let mean = self.observed.mean();
        let squares: f64 = self.values.iter().map(|(value, _)| (value - mean) * (value - mean)).sum();
        (squares / self.observed.n as f64).sqrt()
    }
}

/// Of the values in a bucket the one that is least far, relatively, from all others.
fn middle(lower: f64, upper: f64) -> f64 {
    if lower + upper == 0.0 { 0.0 } else { 2.0 * lower * (upper / (lower + upper)) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    const CORPUS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/aggregation.jsonl"));

    /// Values with their weights.
    type Samples = Vec<(f64, f64)>;

    /// Name, type letters and samples of a plain line; the parser has tests of its own.
    fn read(line: &str) -> Option<(String, &str, Samples)> {
        let (name, parts) = line.split_once(':')?;
        let mut letters = "";
        let mut samples = Vec::new();
        let mut pending: Vec<f64> = Vec::new();
        let (fields, tags) = parts.split_once("|#").map_or((parts, None), |(fields, tags)| (fields, Some(tags)));
        for piece in fields.split(':') {
            let mut fields = piece.split('|');
            pending.push(fields.next()?.parse().ok()?);
            let Some(kind) = fields.next() else { continue };
            letters = kind;
            let rate = fields.find_map(|field| field.strip_prefix('@')).map_or(Some(1.0), |rate| rate.parse().ok())?;
            samples.extend(pending.drain(..).map(|value| (value, 1.0 / rate)));
        }
        let mut tags: Vec<_> = tags.into_iter().flat_map(|tags| tags.split(',')).collect();
        tags.sort_unstable();
        let name = if tags.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", tags.join(",")) };
        Some((name, letters, samples))
    }

    fn observe(samples: &[(f64, f64)]) -> Observed {
        let mut observed = Observed::default();
        samples.iter().for_each(|(value, weight)| assert!(observed.observe(*value, *weight, 0)));
        observed
    }

    fn count(samples: &[(f64, f64)]) -> Counter {
        let mut counter = Counter::default();
        for (value, weight) in samples {
            let side = if *value < 0.0 { &mut counter.decrements } else { &mut counter.increments };
            side.add(value.abs() * weight);
        }
        counter
    }

    /// The figures of a step of a case: all its lines' series.
    fn figures(case: &Value, lines: &[Value]) -> BTreeMap<String, BTreeMap<String, f64>> {
        let percentiles = case["config"]["percentThreshold"].as_array();
        let percentiles = percentiles.map_or(vec![90.0], |list| list.iter().filter_map(Value::as_f64).collect());
        let seconds = case["interval_s"].as_f64().unwrap();
        let mut samples: BTreeMap<(String, &str), Samples> = BTreeMap::new();
        for (name, letters, more) in lines.iter().filter_map(|line| read(line.as_str()?)) {
            samples.entry((name, letters)).or_default().extend(more);
        }
        let figures = samples.into_iter().filter_map(|((name, letters), samples)| match letters {
            "c" => Some((name, counter(&count(&samples), seconds))),
            "ms" => Some((name, observed(&observe(&samples), &percentiles, seconds))),
            _ => None,
        });
        figures.map(|(name, figures)| (name, figures.into_iter().map(|(n, v)| (n.into_owned(), v)).collect())).collect()
    }

    fn agree(case: &Value, name: &str, want: f64, have: Option<f64>, exact: bool) {
        let tolerance = match case["tolerance_abs"].as_f64() {
            Some(tolerance) => tolerance,
            None if exact => 1e-9 * want.abs().max(1.0),
            None => 0.01 * want.abs(),
        };
        let have = have.unwrap_or_else(|| panic!("{}: no {name}", case["id"]));
        assert!((have - want).abs() <= tolerance, "{}: {name} is {have}, not {want}", case["id"]);
    }

    #[test]
    fn figures_are_those_of_etsy() {
        let cases = CORPUS.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let (mut compared, mut ran) = (0, 0);
        for case in cases.filter(|case| matches!(case["formula"].as_str(), Some("etsy" | "ours"))) {
            let foreign = ["timers", "histogram", "prometheus", "gauge_sign", "deleteIdleStats"];
            if foreign.iter().any(|setting| !case["config"][setting].is_null()) {
                continue;
            }
            let before = compared;
            let steps = case["steps"].as_array().cloned().unwrap_or_else(|| vec![case.clone()]);
            for step in steps {
                let lines = step["lines"].as_array().unwrap();
                let have = figures(&case, lines);
                for (name, want) in step["expect"].as_object().unwrap() {
                    let Some(have) = have.get(name) else { continue };
                    for (figure, want) in want.as_object().unwrap() {
                        let whole = matches!(
                            figure.as_str(),
                            "count" | "count_ps" | "rate" | "sum" | "mean" | "upper" | "lower"
                        );
                        agree(
                            &case,
                            figure,
                            want.as_f64().unwrap(),
                            have.get(figure).copied(),
                            whole || lines.len() <= 64,
                        );
                        compared += 1;
                    }
                    let is_partial = case["partial"].as_bool() == Some(true);
                    assert!(is_partial || have.len() == want.as_object().unwrap().len(), "{}: {have:?}", case["id"]);
                }
            }
            ran += usize::from(compared > before);
        }
        // Gauges, sets and other settings are for tests/it/aggregation.rs, which runs or names every case.
        assert_eq!((ran, compared), (30, 293), "cases and figures compared");
    }

    proptest! {
        #[test]
        fn figures_from_buckets_are_near_those_from_values(
            values in prop::collection::vec(0.001_f64..1e6, 65..400),
            percent in prop_oneof![1.0_f64..100.0, -100.0_f64..-1.0],
        ) {
            let kept = observe(&values.iter().map(|value| (*value, 1.0)).collect::<Vec<_>>());
            prop_assume!(!kept.is_exact());
            let mut whole = kept.clone();
            whole.exact = values.iter().map(|value| (*value, 1.0)).collect();
            whole.histogram = Default::default();
            for (near, exact) in observed(&kept, &[percent], 10.0).iter().zip(observed(&whole, &[percent], 10.0)) {
                prop_assert_eq!(&near.0, &exact.0);
                let is_rank = near.0.starts_with("count") || near.0 == "std";
                let tolerance = if is_rank { 1e-6 } else { 0.02 };
                prop_assert!((near.1 - exact.1).abs() <= tolerance * exact.1.abs(), "{near:?} {exact:?}");
            }
        }

        #[test]
        fn figures_stay_within_the_values(
            samples in prop::collection::vec((-1e9_f64..1e9, 1.0_f64..100.0), 1..200),
            percent in -120.0_f64..120.0,
        ) {
            let observed_ = observe(&samples);
            for (name, value) in observed(&observed_, &[percent], 10.0) {
                prop_assert!(value.is_finite(), "{name} is {value}");
                if name.starts_with("upper") || name.starts_with("lower") || name == "median" {
                    prop_assert!((observed_.min..=observed_.max).contains(&value), "{name} is {value}");
                }
            }
        }
    }
}
