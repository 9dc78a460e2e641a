//! Etsy's figures: the corpus, and laws.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::aggregate::window::Window;
use crate::sample::Kind;

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

/// What a case asks for.
fn config(case: &Value) -> Config {
    let settings = &case["config"];
    let numbers = |list: &Value| list.as_array().map(|list| list.iter().filter_map(Value::as_f64).collect());
    let bins = |entry: &Value| serde_json::from_value::<Bins>(entry.clone()).unwrap();
    Config {
        percentiles: numbers(&settings["percentThreshold"]).unwrap_or_else(|| vec![90.0]),
        histograms: settings["histogram"].as_array().into_iter().flatten().map(bins).collect(),
        weight_by_rate: settings["timers"]["weight_by_rate"] == true,
        ..Config::default()
    }
}

/// The figures of a step of a case: all its lines' series.
fn figures(case: &Value, lines: &[Value]) -> BTreeMap<String, BTreeMap<String, f64>> {
    let config = config(case);
    let seconds = case["interval_s"].as_f64().unwrap();
    let mut samples: BTreeMap<(String, &str), Samples> = BTreeMap::new();
    for (name, letters, more) in lines.iter().filter_map(|line| read(line.as_str()?)) {
        samples.entry((name, letters)).or_default().extend(more);
    }
    let figures = samples.into_iter().filter_map(|((name, letters), samples)| {
        let aggregate = match letters {
            "c" => Aggregate::Counter(count(&samples)),
            "ms" => Aggregate::Observed(Box::new(observe(&samples))),
            _ => return None,
        };
        let figures = config.figures(&name, &closed(aggregate), seconds)?;
        Some((name, figures))
    });
    figures.map(|(name, figures)| (name, figures.into_iter().map(|(n, v)| (n.into_owned(), v)).collect())).collect()
}

fn closed(aggregate: Aggregate) -> Closed {
    Closed { window: Arc::new(Window { start_ms: 0, aggregate }), idle: 0 }
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
        let foreign = ["prometheus", "gauge_sign"];
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
                    let whole =
                        matches!(figure.as_str(), "count" | "count_ps" | "rate" | "sum" | "mean" | "upper" | "lower");
                    agree(&case, figure, want.as_f64().unwrap(), have.get(figure).copied(), whole || lines.len() <= 64);
                    compared += 1;
                }
                let is_partial = case["partial"].as_bool() == Some(true);
                assert!(is_partial || have.len() == want.as_object().unwrap().len(), "{}: {have:?}", case["id"]);
            }
        }
        ran += usize::from(compared > before);
    }
    // Gauges, sets and other settings are for tests/it/aggregation.rs, which runs or names every case.
    assert_eq!((ran, compared), (36, 396), "cases and figures compared");
}

fn names(config: &Config, observed: &Observed) -> Vec<String> {
    let closed = closed(Aggregate::Observed(Box::new(observed.clone())));
    config.figures("a", &closed, 1.0).unwrap().into_iter().map(|(name, _)| name.into_owned()).collect()
}

#[test]
fn metrics_that_are_asked_for_are_shown_alone() {
    let asked = |metrics: &[&str]| {
        let timer_metrics = metrics.iter().map(|&metric| metric.to_owned()).collect();
        let bins = Bins { metric: String::new(), bins: vec![1.0, f64::INFINITY] };
        let percentiles = vec![90.0, 99.9, -10.0];
        let config = Config { percentiles, timer_metrics, histograms: vec![bins], ..Config::default() };
        names(&config, &observe(&[(1.0, 1.0), (2.0, 1.0)]))
    };
    assert_eq!(asked(&["count", "sum_squares", "none"]), ["count", "sum_squares"]);
    // As in the original, whose pattern takes the digits behind the last underscore for the number: not those of 99.9.
    assert_eq!(asked(&["upper_percent", "lower_percent"]), ["upper_90"]);
    assert_eq!(asked(&["upper_99_percent", "mean_90"]), ["upper_99_9"]);
    assert_eq!(asked(&["histogram"]), ["histogram.bin_1", "histogram.bin_inf"]);
    assert_eq!(asked(&[]).len(), 9 + 2 * 5 + 2);
    assert_eq!(asked(&["count_percent"]), ["count_90"], "two values have no tenth");
}

#[test]
fn what_is_idle_is_left_out_where_it_is_asked_for() {
    let idle = |kind, windows| Closed {
        window: Arc::new(Window { start_ms: 0, aggregate: Aggregate::new(kind) }),
        idle: windows,
    };
    let kinds = [Kind::Counter, Kind::Timer, Kind::Set, Kind::Gauge];
    let shown = |config: &Config, windows| kinds.map(|kind| config.figures("a", &idle(kind, windows), 1.0).is_some());
    assert_eq!(shown(&Config::default(), 1), [true; 4]);
    let all = Config { delete_idle_stats: true, ..Config::default() };
    assert_eq!((shown(&all, 0), shown(&all, 1)), ([true; 4], [false; 4]));
    let but_sets = Config { delete_sets: Left::In, gauges_max_ttl: 3, ..all };
    assert_eq!(shown(&but_sets, 2), [false, false, true, true]);
    assert_eq!(shown(&but_sets, 3), [false, false, true, false]);
    let timers = Config { delete_timers: Left::Out, gauges_max_ttl: 0, ..Config::default() };
    assert_eq!(shown(&timers, 9), [true, false, true, true]);
}

#[test]
fn bins_of_buckets_hold_all_values() {
    let values: Vec<_> = (0..1_000).map(|n| (f64::from(n) / 10.0, 1.0 + f64::from(n % 3))).collect();
    let bins = [-1.0, 10.0, 50.0, f64::INFINITY];
    for by_weight in [false, true] {
        let config = Config { weight_by_rate: by_weight, ..Config::default() };
        let figures = config.all(&observe(&values), &bins, 1.0);
        let bin = |name: &str| figures.iter().find(|(of, _)| of == &format!("histogram.bin_{name}")).unwrap().1;
        let times = if by_weight { 2.0 } else { 1.0 };
        assert_eq!(bin("-1"), 0.0);
        assert!((bin("10") - 100.0 * times).abs() <= 2.0 * times, "{}", bin("10"));
        assert!((bin("50") - 400.0 * times).abs() <= 8.0 * times, "{}", bin("50"));
        let all = bin("10") + bin("50") + bin("inf");
        let want = if by_weight { values.iter().map(|(_, weight)| weight).sum() } else { 1_000.0 };
        assert!((all - want).abs() <= 1.5, "{all}");
    }
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
        let config = Config { percentiles: vec![percent], ..Config::default() };
        for (near, exact) in config.all(&kept, &[], 10.0).iter().zip(config.all(&whole, &[], 10.0)) {
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
        let kept = observe(&samples);
        let config = Config { percentiles: vec![percent], ..Config::default() };
        for (name, value) in config.all(&kept, &[], 10.0) {
            prop_assert!(value.is_finite(), "{name} is {value}");
            if name.starts_with("upper") || name.starts_with("lower") || name == "median" {
                prop_assert!((kept.min..=kept.max).contains(&value), "{name} is {value}");
            }
        }
    }
}
