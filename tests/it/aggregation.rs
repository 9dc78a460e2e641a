//! `tests/corpus/aggregation.jsonl` through the executable: lines in, figures out by JSON and by the scrape.
//!
//! Every case is either run or stands in `LEFT` with the reason, so that none is left out silently. Cases share an agent where
//! their settings allow it: each has its id in front of its names. Figures of a window are for that agent's window, so rates
//! are those of the case times its interval by ours.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::agent::{Agent, until};
use crate::graphite::Sink;
use crate::redis_servers::Server;

/// Cases that nothing here can run, and why.
const LEFT: &[(&str, &str)] = &[
    ("agg-meter-none", "no series without a mark; a test of `aggregate::meter` has it"),
    ("agg-meter-tick-strict", "a moment no test from outside can hit; a test of `aggregate::meter` has it"),
    ("agg-meter-steady", "takes a minute; a test of `aggregate::meter` has it"),
    ("agg-meter-two-bursts", "takes half a minute; a test of `aggregate::meter` has it"),
    ("agg-meter-late-start", "a meter that begins before its first mark; a test of `aggregate::meter` has it"),
    ("agg-meter-15min", "takes a quarter of an hour; a test of `aggregate::meter` has it"),
    ("agg-meter-hour", "takes an hour; a test of `aggregate::meter` has it"),
    ("agg-dd-hist-20", "the Datadog agent's own flush figures, which none of our outputs has"),
];

/// The length of the agents' windows.
const WINDOW_MS: u64 = 5_000;

const QUANTILES: &str = "0,0.05,0.25,0.5,0.75,0.9,0.95,0.99,0.999,1";

fn cases() -> Vec<Value> {
    let text = include_str!("../corpus/aggregation.jsonl");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"))
}

fn is_left(case: &Value) -> bool {
    LEFT.iter().any(|(id, _)| *id == text(case, "id"))
}

/// By which test here a case is run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Window,
    Scrape,
    Total,
    Meter,
    Agents,
}

fn way(case: &Value) -> Way {
    match text(case, "formula") {
        "prometheus" => Way::Scrape,
        "dropwizard" => Way::Meter,
        _ if !case["agents"].is_null() => Way::Agents,
        "seed" | "ddsketch" => Way::Total,
        _ if text(case, "id").starts_with("agg-dd-") => Way::Total,
        _ => Way::Window,
    }
}

fn of_way(wanted: Way) -> Vec<Value> {
    cases().into_iter().filter(|case| !is_left(case) && way(case) == wanted).collect()
}

#[test]
fn every_case_is_run_or_named() {
    let all = cases();
    for (id, _) in LEFT {
        assert!(all.iter().any(|case| text(case, "id") == *id), "{id} is no case");
    }
    let run: Vec<_> =
        [Way::Window, Way::Scrape, Way::Total, Way::Meter, Way::Agents].map(|way| of_way(way).len()).into();
    assert_eq!(run, [45, 5, 5, 1, 1], "cases by the way they are run");
    assert_eq!(run.iter().sum::<usize>() + LEFT.len(), all.len());
}

/// The lines of a case or a step, with the case's id before each name.
fn lines(case: &Value, from: &Value) -> String {
    let id = text(case, "id");
    let lines = from["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap());
    lines.map(|line| if line.starts_with('{') { format!("{line}\n") } else { format!("{id}.{line}\n") }).collect()
}

/// The key of a series that a case calls `name` or `name{k:v,l:w}`.
fn key(case: &Value, name: &str) -> String {
    let (name, tags) = name.split_once('{').unwrap_or((name, "}"));
    let tags: Vec<_> = tags.trim_end_matches('}').split(',').filter(|tag| !tag.is_empty()).collect();
    let tags: String = tags.iter().map(|tag| format!(";{}", tag.replacen(':', "=", 1))).collect();
    format!("{}.{name}{tags}", text(case, "id"))
}

#[track_caller]
fn agree(case: &Value, what: &str, want: f64, have: Option<f64>, tolerance: f64) {
    let id = text(case, "id");
    let have = have.unwrap_or_else(|| panic!("{id}: there is no {what}"));
    let tolerance = case["tolerance_abs"].as_f64().unwrap_or(tolerance * want.abs().max(1.0));
    assert!((have - want).abs() <= tolerance, "{id}: {what} is {have}, not {want}");
}

/// The figures of a metric as a case names them.
fn figures(metric: &Value) -> Map<String, Value> {
    metric["window"]["etsy"].as_object().cloned().unwrap_or_default()
}

/// The same as Graphite got them.
fn graphite_figures(metric: &Value, lines: &BTreeMap<String, String>) -> Map<String, Value> {
    let key = key_of(metric);
    let (name, tags) = key.split_at(key.find(';').unwrap_or(key.len()));
    let number = |path: &str| lines.get(path).map(|value| Value::from(value.parse::<f64>().unwrap()));
    let one = |figure: &str, path: String| number(&path).map(|value| (figure.to_owned(), value));
    match text(metric, "type") {
        "COUNTER" => [one("count", format!("stats_counts.{key}")), one("rate", format!("stats.{key}"))]
            .into_iter()
            .flatten()
            .collect(),
        "GAUGE" => one("value", format!("stats.gauges.{key}")).into_iter().collect(),
        "SET" => one("count", format!("stats.sets.{name}.count{tags}")).into_iter().collect(),
        _ => {
            let before = format!("stats.timers.{name}.");
            let figure = |path: &String| path.strip_prefix(&before)?.strip_suffix(tags).map(str::to_owned);
            lines.keys().filter_map(|path| Some((figure(path)?, number(path)?))).collect()
        }
    }
}

/// All percentiles that cases ask for; an agent shows those of all, and each case looks at its own.
const PERCENTILES: &[f64] = &[90.0, 50.0, 75.0, 95.0, 99.0, 99.9, 0.1, -100.0, -90.0, -10.0];

/// How a percentile stands in a figure's name.
fn label(percentile: f64) -> String {
    percentile.to_string().replace('.', "_").replace('-', "top")
}

/// Whether a figure is one that the case's own setting of percentiles would show.
fn is_asked_for(case: &Value, figure: &str) -> bool {
    let asked = case["config"]["percentThreshold"].as_array().cloned().unwrap_or_else(|| vec![90.into()]);
    let is_asked = |percentile: &f64| asked.iter().any(|asked| asked.as_f64() == Some(*percentile));
    let others = PERCENTILES.iter().filter(|percentile| !is_asked(percentile));
    !others.into_iter().any(|other| figure.strip_suffix(&label(*other)).is_some_and(|stem| stem.ends_with('_')))
}

/// A metric's key, its figures, and where they were found.
type Found = (String, Map<String, Value>, &'static str);

fn compare_window(case: &Value, step: &Value, found: &[Found]) {
    let want = step["expect"].as_object().unwrap();
    for (name, want) in want {
        let key = key(case, name);
        let both: Vec<_> = found.iter().filter(|(of, ..)| *of == key).collect();
        assert_eq!(both.len(), 2, "{key} is not listed");
        both.iter().for_each(|found| compare_figures(case, step, name, want.as_object().unwrap(), found));
    }
    let others = found.iter().filter(|(key, ..)| key.starts_with(&format!("{}.", text(case, "id"))));
    let others = others.filter(|(of, ..)| !want.keys().any(|name| key(case, name) == *of));
    if case["partial"] != true {
        for (key, figures, place) in others {
            assert!(figures.is_empty(), "{key} is to be left out, and has {figures:?} in {place}");
        }
    }
}

fn compare_figures(case: &Value, step: &Value, name: &str, want: &Map<String, Value>, (key, have, place): &Found) {
    let by_window = case["interval_s"].as_f64().unwrap() * 1_000.0 / WINDOW_MS as f64;
    for (figure, want) in want {
        let factor = if ["rate", "count_ps"].contains(&figure.as_str()) { by_window } else { 1.0 };
        let is_ranked = figure.contains('_') && figure != "count_ps" && figure != "sum_squares" || figure == "median";
        let is_kept = step["lines"].as_array().unwrap().len() <= 64;
        let tolerance = if is_ranked && !is_kept { 0.01 } else { 1e-9 };
        let have = have.get(figure).and_then(Value::as_f64);
        agree(case, &format!("{name} {figure} in {place}"), want.as_f64().unwrap() * factor, have, tolerance);
    }
    if case["partial"] != true {
        let surplus = have.keys().filter(|figure| !want.contains_key(*figure) && is_asked_for(case, figure));
        assert_eq!(surplus.collect::<Vec<_>>(), Vec::<&String>::new(), "{key} in {place}");
    }
}

/// The key of a metric of a list: cases have simple tags.
fn key_of(metric: &Value) -> String {
    let name = format!("{}.{}", text(metric, "level"), text(metric, "name"));
    let tags = metric["tags"].as_object().unwrap().iter().map(|(k, v)| format!(";{k}={}", v.as_str().unwrap()));
    name + &tags.collect::<String>()
}

fn window_now() -> (u64, u64) {
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    (now_ms - now_ms % WINDOW_MS, now_ms % WINDOW_MS)
}

/// All metrics of an agent as they are when a window is the last closed one.
fn listed(agent: &Agent, window_ms: u64) -> Vec<Value> {
    until("the window to close", || {
        (window_now().0 > window_ms).then_some(())?;
        let metrics =
            agent.get(&format!("/data/metrics?limit=1000&quantiles={QUANTILES}")).json().as_array().unwrap().clone();
        let starts: Vec<_> = metrics.iter().filter_map(|metric| metric["window"]["start"].as_u64()).collect();
        assert!(starts.iter().all(|start| *start <= window_ms), "too late for the window {window_ms}: {starts:?}");
        (!starts.is_empty() && starts.iter().all(|start| *start == window_ms)).then_some(metrics)
    })
}

/// The settings that a case asks for beside its percentiles.
fn settings_of(case: &Value) -> Vec<String> {
    let config = &case["config"];
    let mut settings = Vec::new();
    if config["gauge_sign"] == "absolute" {
        settings.push("protocol.gauge_sign=absolute".to_owned());
    }
    if let Some(entries) = config["histogram"].as_array() {
        let entry = |entry: &Value| format!("{{metric={},bins={}}}", entry["metric"], entry["bins"]);
        settings.push(format!("flush.histograms=[{}]", entries.iter().map(entry).collect::<Vec<_>>().join(",")));
    }
    let flags = [
        (&config["timers"]["weight_by_rate"], "flush.weight_by_rate"),
        (&config["deleteIdleStats"], "flush.delete_idle_stats"),
        (&config["deleteCounters"], "flush.delete_counters"),
        (&config["deleteGauges"], "flush.delete_gauges"),
        (&config["gaugesMaxTTL"], "flush.gauges_max_ttl"),
    ];
    settings.extend(flags.iter().filter(|(value, _)| !value.is_null()).map(|(value, key)| format!("{key}={value}")));
    settings
}

/// An agent with settings of its own, and where its lines go.
struct Side {
    settings: Vec<String>,
    agent: Agent,
    sink: Sink,
}

impl Side {
    fn start(settings: Vec<String>) -> Self {
        let sink = Sink::start();
        let percentiles = PERCENTILES.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let mut all =
            vec![format!("flush.window={WINDOW_MS}ms"), format!("flush.percentiles={percentiles}"), sink.setting()];
        all.extend(settings.iter().cloned());
        let agent = Agent::start(&all.iter().map(String::as_str).collect::<Vec<_>>());
        Self { settings, agent, sink }
    }

    /// What JSON and Graphite have of a window.
    fn found(&self, window_ms: u64) -> Vec<Found> {
        let metrics = listed(&self.agent, window_ms);
        let lines = until("the window in Graphite", || self.sink.windows().remove(&((window_ms + WINDOW_MS) / 1_000)));
        let of_json = metrics.iter().map(|metric| (key_of(metric), figures(metric), "window.etsy"));
        let of_graphite = metrics.iter().map(|metric| (key_of(metric), graphite_figures(metric, &lines), "Graphite"));
        of_json.chain(of_graphite).collect()
    }
}

#[test]
fn windows_have_the_figures_of_the_corpus() {
    let cases = of_way(Way::Window);
    let mut settings: Vec<_> = cases.iter().map(settings_of).collect();
    settings.sort();
    settings.dedup();
    let sides: Vec<_> = settings.into_iter().map(Side::start).collect();
    let steps = |case: &Value| case["steps"].as_array().cloned().unwrap_or_else(|| vec![case.clone()]);
    for step in 0.. {
        let of_step: Vec<_> = cases.iter().filter_map(|case| Some((case, steps(case).get(step)?.clone()))).collect();
        if of_step.is_empty() {
            break;
        }
        let window_ms = until("the beginning of a window", || {
            let (start_ms, age_ms) = window_now();
            (age_ms < WINDOW_MS / 2).then_some(start_ms)
        });
        let of_side = |case: &Value| sides.iter().find(|side| side.settings == settings_of(case)).unwrap();
        for (case, step) in &of_step {
            of_side(case).agent.connect().write_all(lines(case, step).as_bytes()).unwrap();
        }
        let sides = sides.iter().filter(|side| of_step.iter().any(|(case, _)| of_side(case).settings == side.settings));
        let found: Vec<Found> = sides.flat_map(|side| side.found(window_ms)).collect();
        of_step.iter().for_each(|(case, step)| compare_window(case, step, &found));
    }
}

/// How many timings each series of a test has. In windows the first 64 are kept as they are.
const TIMINGS: [usize; 5] = [1, 16, 64, 65, 1_000];

/// How far from it the middle of a bucket may be: buckets of the finest scale grow by 2^(1/64).
const ERROR_MAX: f64 = 0.005_415_3;

fn timings(count: usize) -> Vec<f64> {
    (0..count).map(|n| ((n * 7_919) % 1_009) as f64 + 0.125).collect()
}

/// Sends the timings in two seals of one window, whose start is the answer; none when it ended before all were counted.
fn send_timings(agent: &Agent, name: &str) -> Option<u64> {
    let (window_ms, _) = window_now();
    let counted = || agent.own("tallyd_samples_total", "listener=\"tcp\"") as usize;
    let mut sent = counted();
    for half in 0..2 {
        let mut stream = agent.connect();
        for count in TIMINGS {
            let timings = timings(count);
            let (first, second) = timings.split_at(count / 2);
            let half = [first, second][half];
            let lines: String = half.iter().map(|timing| format!("{name}.{count}:{timing}|ms\n")).collect();
            stream.write_all(lines.as_bytes()).unwrap();
            sent += half.len();
        }
        // Who looks asks for a seal.
        until("all to be counted", || (counted() == sent).then_some(()));
    }
    (window_now().0 == window_ms).then_some(window_ms)
}

#[test]
fn the_first_64_samples_of_a_window_are_exact_and_more_are_close() {
    let agent = Agent::start(&[&format!("flush.window={WINDOW_MS}ms")]);
    let mut attempt = 0;
    let window_ms = until("all to be in one window", || {
        attempt += 1;
        send_timings(&agent, &format!("of{attempt}"))
    });
    let metrics = listed(&agent, window_ms);
    let metrics: Vec<_> = metrics.iter().filter(|metric| text(metric, "level") == format!("of{attempt}")).collect();
    assert_eq!(metrics.len(), TIMINGS.len());
    for metric in metrics {
        let count = text(metric, "name").parse().unwrap();
        assert_eq!(metric["window"]["count"], count);
        let mut sorted = timings(count);
        sorted.sort_unstable_by(f64::total_cmp);
        let quantiles = metric["window"]["quantiles"].as_object().unwrap();
        assert!(quantiles.len() > 5, "{metric}");
        for (q, have) in quantiles {
            let rank = (q.parse::<f64>().unwrap() * count as f64).ceil() as usize;
            let (want, have) = (sorted[rank.max(1) - 1], have.as_f64().unwrap());
            let error = (have / want - 1.0).abs();
            assert!(error <= if count <= 64 { 0.0 } else { ERROR_MAX }, "{q} of {count}: {have} for {want}");
        }
    }
}

#[test]
fn totals_have_the_figures_of_the_corpus() {
    let agent = Agent::start(&[]);
    for case in of_way(Way::Total) {
        agent.connect().write_all(lines(&case, &case).as_bytes()).unwrap();
        let is_seed = text(&case, "formula") == "seed";
        for (name, want) in case["expect"].as_object().unwrap() {
            let key = if is_seed { name.clone() } else { key(&case, name) };
            agent.wait_for(&key, "count", want["count"].as_f64().unwrap_or_else(|| samples(&case)));
            compare_total(&case, &agent, &key, want);
        }
    }
}

/// How many samples the lines of a case stand for.
fn samples(case: &Value) -> f64 {
    let lines = case["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap());
    lines.map(|line| line.split_once("|@").map_or(1.0, |(_, rate)| 1.0 / rate.parse::<f64>().unwrap())).sum()
}

fn compare_total(case: &Value, agent: &Agent, key: &str, want: &Value) {
    let path = format!("/data/metrics/{key}?quantiles=0.5,0.75,0.9,0.95,0.99");
    let metric = agent.get(&path).json();
    for (figure, want) in want.as_object().unwrap() {
        let have = match figure.as_str() {
            "avg" => &metric["mean"],
            "median" => &metric["quantiles"]["0.5"],
            "95percentile" => &metric["quantiles"]["0.95"],
            "p50" | "p75" | "p90" | "p95" | "p99" => {
                &metric["quantiles"][format!("0.{}", figure[1..].trim_end_matches('0'))]
            }
            other => &metric[other],
        };
        let tolerance = if figure.starts_with('p') { case["tolerance_rel"].as_f64().unwrap() } else { 1e-9 };
        agree(case, figure, want.as_f64().unwrap(), have.as_f64(), tolerance);
    }
}

#[test]
fn agents_that_share_a_store_have_one_true_percentile() {
    let redis = Server::persistent();
    for case in of_way(Way::Agents) {
        let agents: Vec<_> =
            case["agents"].as_array().unwrap().iter().map(|lines_| (store_agent(&redis), lines_)).collect();
        for (agent, lines_) in &agents {
            agent.connect().write_all(lines(&case, &serde_json::json!({ "lines": lines_ })).as_bytes()).unwrap();
        }
        for (name, want) in case["expect"].as_object().unwrap() {
            for (agent, _) in &agents {
                let key = key(&case, name);
                agent.wait_for(&key, "count", want["count"].clone());
                compare_total(&case, agent, &key, want);
            }
        }
    }
}

fn store_agent(redis: &Server) -> Agent {
    Agent::start(&["store.kind=redis", &redis.url(), "flush.interval=100ms", "flush.window=1s"])
}

#[test]
fn a_meter_ticks_five_seconds_after_its_first_mark() {
    let case = of_way(Way::Meter).remove(0);
    let agent = Agent::start(&[]);
    agent.datagram(lines(&case, &case["steps"][0]));
    let key = key(&case, "req");
    let ticked = until("the first tick", || agent.metric(&key).filter(|metric| metric["m1Rate"] != 0));
    for (figure, field) in [("count", "count"), ("m1_rate", "m1Rate"), ("m5_rate", "m5Rate"), ("m15_rate", "m15Rate")] {
        let want = case["expect"]["req"][figure].as_f64().unwrap();
        agree(&case, figure, want, ticked[field].as_f64(), 1e-9);
    }
    let (mean, count) = (ticked["meanRate"].as_f64().unwrap(), ticked["count"].as_f64().unwrap());
    assert!(count / mean > 5.0, "it ticked {} s after its start", count / mean);
}

#[test]
fn the_scrape_has_the_figures_of_the_corpus() {
    for case in of_way(Way::Scrape) {
        let settings = case["config"]["prometheus"].as_object().cloned().unwrap_or_default();
        let settings: Vec<_> =
            settings.iter().map(|(name, value)| format!("prometheus.{name}={}", plain(value))).collect();
        let agent = Agent::start(&settings.iter().map(String::as_str).collect::<Vec<_>>());
        agent.connect().write_all(lines(&case, &case).as_bytes()).unwrap();
        until("all lines", || (agent.own("tallyd_lines_accepted_total", "tcp") as usize == count(&case)).then_some(()));
        let exposition = agent.get("/metrics").text();
        for (name, want) in case["expect"].as_object().unwrap() {
            let family = format!("{}_{name}", text(&case, "id").replace('-', "_"));
            for (figure, want) in want.as_object().unwrap() {
                let have = sample(&exposition, &series_of(&family, figure));
                agree(&case, figure, want.as_f64().unwrap(), have, 1e-9);
            }
        }
    }
}

/// A setting's value as `--set` takes it.
fn plain(value: &Value) -> String {
    match value {
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(","),
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

fn count(case: &Value) -> usize {
    case["lines"].as_array().unwrap().len()
}

/// The sample of a family that a case calls `value`, `sum`, `count` or `bucket_<bound>`.
fn series_of(family: &str, figure: &str) -> String {
    match figure.split_once('_') {
        Some(("bucket", bound)) => format!("{family}_bucket{{le=\"{bound}\"}}"),
        _ if figure == "value" => family.to_owned(),
        _ => format!("{family}_{figure}"),
    }
}

fn sample(exposition: &str, series: &str) -> Option<f64> {
    exposition.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}
