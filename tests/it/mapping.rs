//! statsd_exporter's mapping files through the executable: every case of the corpus, `check`, `explain`, reload, drop,
//! ttl and the names that no rule matches.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::agent::{Agent, same, tallyd, until};
use crate::http;
use crate::prometheus::promtool;

/// What an agent says of itself; all else in a scrape is of clients.
fn is_own(line: &str) -> bool {
    let name = line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ");
    name.starts_with("tallyd_") || name.starts_with("process_")
}

/// The lines of a scrape about clients' series, help texts left out.
fn exposition(agent: &Agent) -> Vec<String> {
    let text = agent.get("/metrics").text();
    text.lines().filter(|line| !is_own(line) && !line.starts_with("# HELP ")).map(str::to_owned).collect()
}

/// Families and samples as a set, numbers by value.
fn canonical(lines: &[String]) -> Vec<(String, Option<f64>)> {
    let line = |line: &String| match line.rsplit_once(' ').filter(|_| !line.starts_with('#')) {
        Some((series, number)) => (series.to_owned(), number.parse().ok()),
        None => (line.clone(), None),
    };
    let mut all: Vec<_> = lines.iter().map(line).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn is_same(a: &[(String, Option<f64>)], b: &[(String, Option<f64>)]) -> bool {
    let number = |number: Option<f64>| number.map_or(Value::Null, Value::from);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && same(&number(a.1), &number(b.1)))
}

/// A mapping file with a directory that goes when the test ends.
struct Rules {
    directory: tempfile::TempDir,
}

impl Rules {
    fn new(text: &str) -> Self {
        let rules = Self { directory: tempfile::tempdir().unwrap() };
        rules.write(text);
        rules
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("mapping.yml")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path(), text).unwrap();
    }

    fn setting(&self) -> String {
        format!("mapping.file={}", self.path().display())
    }

    /// An agent with these rules.
    fn agent(&self) -> Agent {
        Agent::start(&["store.kind=memory", &self.setting()])
    }
}

/// A command with these rules; exit code and all that it printed.
fn run(arguments: &[&str], file: &Path) -> (i32, String) {
    let setting = format!("mapping.file={}", file.display());
    let output = tallyd().args(arguments).args(["--set", &setting]).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code().unwrap(), text)
}

fn reload(agent: &Agent) -> http::Answer {
    http::request(agent.address("api"), "POST", "/-/reload", &[], b"")
}

fn cases() -> Vec<Value> {
    let corpus = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/mapping.jsonl")).unwrap();
    corpus.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Why a case does not hold.
fn wrong(case: &Value) -> Option<String> {
    let rules = Rules::new(case["mapping"].as_str().unwrap_or_default());
    // A wart that the case's note says not to copy: labels of one letter are taken.
    if case["config_error"].is_string() && case["id"] != "map-bad-one-letter-label" {
        let (code, text) = run(&["check"], &rules.path());
        let named = text.contains("mapping.yml:") && text.contains("mappings[0]");
        return (code != 78 || !named).then(|| format!("check ended with {code}: {text}"));
    }
    let agent = rules.agent();
    let lines: Vec<&str> = case["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    agent.datagram(lines.join("\n"));
    until("all lines", || (agent.own("tallyd_lines_total", "udp") >= lines.len() as f64).then_some(()));
    let got = canonical(&exposition(&agent));
    match case["expect_exposition"].as_array() {
        Some(want) => {
            let want: Vec<String> = want.iter().map(|line| line.as_str().unwrap().to_owned()).collect();
            (!is_same(&got, &canonical(&want))).then(|| format!("got {got:?}"))
        }
        None => valid(&agent).or_else(|| got.is_empty().then(|| "nothing is shown".to_owned())),
    }
}

/// What `promtool` finds wrong with a scrape, lints left out.
fn valid(agent: &Agent) -> Option<String> {
    let (code, output) = promtool(&agent.get("/metrics").text());
    (![0, 3].contains(&code)).then_some(output)
}

#[test]
fn every_case_of_the_corpus_holds() {
    let cases = cases();
    let failed: Vec<String> =
        cases.iter().filter_map(|case| Some(format!("{}: {}", case["id"], wrong(case)?))).collect();
    assert!(failed.is_empty(), "{} of {} cases failed\n{}", failed.len(), cases.len(), failed.join("\n"));
    assert!(cases.len() >= 29, "only {} cases", cases.len());
}

/// Further cases, as statsd_exporter 0.31 answers them unless the comment says otherwise.
#[test]
fn rules_give_names_labels_and_figures() {
    let rules = Rules::new(
        r#"
defaults:
  ttl: 1h
  summary_options: {quantiles: [{quantile: 0.9, error: 0.1}, {quantile: 0.5}]}
mappings:
- match: req.*.*
  name: req_seconds
  help: "Time of a\nrequest"
  observer_type: histogram
  histogram_options: {buckets: [0.1, 1]}
  labels: {route: "$1", code: "${2}"}
- match: half.*
  name: half
  scale: 0.5
- match: turned
  name: turned
  scale: -2
- match: tags.*
  name: tags
  labels: {env: rule, "a_b": "$1"}
- match: kind.a
  match_metric_type: gauge
  name: kind_gauge
- match: 'nothing\.(x*)'
  match_type: regex
  name: $1
- match: 'dots\.(.*)'
  match_type: regex
  name: "${1}"
"#,
    );
    let agent = rules.agent();
    agent.datagram(
        "req.home.200:50|ms\nreq.home.200:500|ms|@0.5\nhalf.a:3|c\nhalf.b:5|c\nturned:4|g\ntags.1:1|c|#env:line,a.b:2,c:3\n\
         kind.a:1|s\nkind.a:1|c\nnothing.y:1|c\ndots.a.1-b:1|c\nsum:1:2|h",
    );
    until("all lines", || (agent.own("tallyd_lines_total", "udp") >= 11.0).then_some(()));
    let want = [
        "# TYPE a_1_b counter",
        "a_1_b 1",
        "# TYPE half counter",
        "half 4",
        "# TYPE kind_a counter",
        "kind_a 1",
        "# TYPE kind_gauge gauge",
        "kind_gauge 1",
        "# TYPE req_seconds histogram",
        "req_seconds_bucket{code=\"200\",route=\"home\",le=\"0.1\"} 1",
        "req_seconds_bucket{code=\"200\",route=\"home\",le=\"1\"} 3",
        "req_seconds_bucket{code=\"200\",route=\"home\",le=\"+Inf\"} 3",
        "req_seconds_sum{code=\"200\",route=\"home\"} 1.05",
        "req_seconds_count{code=\"200\",route=\"home\"} 3",
        "# TYPE sum summary",
        "sum{quantile=\"0.5\"} 1",
        "sum{quantile=\"0.9\"} 2",
        "sum_sum 3",
        "sum_count 2",
        "# TYPE tags counter",
        "tags{a_b=\"1\",c=\"3\",env=\"rule\"} 1",
        "# TYPE turned gauge",
        "turned -8",
    ];
    let (got, want) = (canonical(&exposition(&agent)), canonical(&want.map(str::to_owned)));
    assert!(is_same(&got, &want), "got {got:#?}");
    let text = agent.get("/metrics").text();
    assert!(text.contains("# HELP req_seconds Time of a\\nrequest\n"), "{text}");
    // statsd_exporter drops a sample whose rule gives it an empty name; here the series is kept, counted, not shown.
    assert!(same(&agent.own("tallyd_scrape_partial", "empty_metric_name").into(), &1.into()));
    assert!(agent.metric("nothing.y").is_some());
    assert_eq!(valid(&agent), None);
}

#[test]
fn dropped_series_are_not_kept_and_their_samples_are_counted() {
    let rules = Rules::new(
        "mappings:\n- {match: good.*, name: good}\n- {match: ., match_type: regex, action: drop, name: d}\n",
    );
    let agent = rules.agent();
    for _ in 0..3 {
        agent.datagram("bad.a:1:2|c\ngood.a:1|c");
    }
    agent.wait_for("good.a", "value", 3);
    assert_eq!(agent.ingest(r#"{"name":"bad.b","type":"COUNTER","value":1}"#).status, 200);
    until("the count", || (agent.own("tallyd_samples_dropped_total", "") >= 7.0).then_some(()));
    assert_eq!((agent.metric("bad.a"), agent.metric("bad.b")), (None, None));
    assert!(same(&agent.own("tallyd_series", "COUNTER").max(agent.own("tallyd_series", "counter")).into(), &1.into()));
}

#[test]
fn a_reload_swaps_the_rules_or_refuses_the_file() {
    let rules = Rules::new("mappings:\n- {match: a.*, name: first}\n");
    let agent = rules.agent();
    agent.datagram("a.b:1|c\nc.d:1|c");
    agent.wait_for("c.d", "value", 1);
    assert_eq!(exposition(&agent), ["# TYPE c_d counter", "c_d 1", "# TYPE first counter", "first 1"]);

    rules.write("mappings:\n- {match: a.*, name: second, nmae: x}\n");
    let answer = reload(&agent);
    assert!(answer.status >= 400 && answer.text().contains("nmae"), "{} {}", answer.status, answer.text());
    assert_eq!(exposition(&agent), ["# TYPE c_d counter", "c_d 1", "# TYPE first counter", "first 1"]);

    rules.write("mappings:\n- {match: a.*, name: second}\n- {match: c.*, name: c, action: drop}\n");
    assert_eq!(reload(&agent).status, 200);
    assert_eq!(exposition(&agent), ["# TYPE second counter", "second 1"], "what is there already is hidden");
    until("samples of c.d to be dropped", || {
        agent.datagram("c.d:1|c");
        (agent.own("tallyd_samples_dropped_total", "udp") > 0.0).then_some(())
    });

    rules.write("mappings:\n- {match: a.*, name: third}\n");
    agent.signal("HUP");
    until("the names to be made anew", || exposition(&agent).contains(&"third 1".to_owned()).then_some(()));
    let before = agent.metric("c.d").unwrap()["value"].as_f64().unwrap();
    until("c.d to be counted again", || {
        agent.datagram("c.d:1|c");
        (agent.metric("c.d")?["value"].as_f64()? > before).then_some(())
    });
}

#[test]
fn a_stop_waits_for_no_reload() {
    let rules = Rules::new("mappings: []\n");
    let mut agent = rules.agent();
    std::fs::remove_file(rules.path()).unwrap();
    assert!(Command::new("mkfifo").arg(rules.path()).status().unwrap().success());
    agent.signal("HUP");
    // A pipe can be opened so once the other end reads it; it will read for ever.
    let mut writer = OpenOptions::new();
    writer.write(true).custom_flags(libc::O_NONBLOCK);
    let _held = until("the reload to begin", || writer.open(rules.path()).ok());
    agent.signal("TERM");
    assert!(agent.wait().success());
}

#[test]
fn without_rules_nothing_is_left_of_them() {
    let rules = Rules::new("mappings:\n- {match: a.*, name: $2}\n");
    let agent = Agent::start_with_file(&format!("[mapping]\nfile = '{}'\n", rules.path().display()));
    agent.datagram("a.b:1|c\nc.d:1|c");
    agent.wait_for("c.d", "value", 1);
    assert_eq!(exposition(&agent), ["# TYPE c_d counter", "c_d 1"]);
    let told = || {
        let text = agent.get("/metrics").text();
        let of = |line: &&str| line.starts_with("tallyd_scrape_unmapped") || line.contains("empty_metric_name\"");
        text.lines().filter(of).map(|line| line.ends_with(" 1")).collect::<Vec<_>>()
    };
    assert_eq!(told(), [true, true]);
    agent.write_file("");
    assert_eq!(reload(&agent).status, 200);
    assert_eq!(exposition(&agent), ["# TYPE a_b counter", "a_b 1", "# TYPE c_d counter", "c_d 1"]);
    assert_eq!(told(), [false, false]);
}

#[test]
fn a_series_is_shown_until_its_ttl_is_over() {
    let rules = Rules::new(
        "defaults: {ttl: 1500ms}\nmappings:\n- {match: short, name: short}\n- {match: long, name: long, ttl: 1h}\n",
    );
    let agent = rules.agent();
    agent.datagram("short:1|c\nlong:1|c\nother:1|c");
    until("all to be shown", || (exposition(&agent).len() == 6).then_some(()));
    until("two to be gone", || (exposition(&agent) == ["# TYPE long counter", "long 1"]).then_some(()));
    agent.datagram("short:1|c");
    until("one to be back", || exposition(&agent).contains(&"short 2".to_owned()).then_some(()));
}

#[test]
fn unmapped_names_are_listed_with_their_counts() {
    let rules = Rules::new("mappings:\n- {match: a.*, name: a}\n");
    let agent = rules.agent();
    agent.datagram("a.b:1|c\nx.y:1|c|#k:1\nx.y:1|c|#k:2\nx.y:1|c|#k:2\nz:5|ms\nw:1|g");
    agent.wait_for("w", "value", 1);
    let answer = agent.get("/data/unmapped?limit=2");
    assert_eq!(answer.header("total-count"), Some("3"));
    assert_eq!(
        answer.json(),
        json!([
            {"name": "x.y", "type": "COUNTER", "count": 3, "series": 2},
            {"name": "w", "type": "GAUGE", "count": 1, "series": 1},
        ])
    );
    assert!(same(&agent.own("tallyd_scrape_unmapped", "").into(), &4.into()));
    assert_eq!(agent.get("/data/unmapped?limit=x").status, 400);
    assert_eq!(Agent::start(&["store.kind=memory"]).get("/data/unmapped").status, 404);
}

#[test]
fn check_names_file_line_and_key() {
    let rules = Rules::new("mappings:\n- match: a.*\n  name: n\n  observer_type: quantile\n  tll: 3s\n");
    let (code, text) = run(&["check"], &rules.path());
    let file = rules.path();
    let want = format!(
        "tallyd: {0}:4:18: mappings[0].observer_type = \"quantile\": write summary or histogram\n\
         tallyd: {0}:5:3: mappings[0].tll: unknown key; did you mean ttl?\n",
        file.display()
    );
    assert_eq!((code, text), (78, want));
    let (code, text) = run(&["run", "--set", "http.api=127.0.0.1:0"], &rules.path());
    assert!(code == 78 && text.lines().count() == 1 && text.contains("(and 1 more: see `tallyd check`)"), "{text}");

    let (code, text) = run(&["check"], Path::new("/nowhere/mapping.yml"));
    assert!(code == 66 && text.contains("mapping.file = \"/nowhere/mapping.yml\""), "{text}");
    assert_eq!(run(&["run"], Path::new("/nowhere/mapping.yml")).0, 66);

    rules.write("mappings:\n- {match: a.*, name: n}\n- {match: a.b, name: m, summary_options: {max_age: 1m}}\n");
    let (code, text) = run(&["check"], &rules.path());
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("mapping.yml:3:1: mappings[1].match: never matches: the rule on line 2 comes first"),
        "{text}"
    );
    assert!(text.contains("mappings[1].summary_options.max_age: without effect"), "{text}");
}

#[test]
fn explain_names_the_rule_and_prometheus_name() {
    let rules = Rules::new(
        "mappings:\n- match: api.*.hits\n  name: api_hits\n  labels: {route: $1}\n- {match: x, name: x, action: drop}\n",
    );
    let (code, text) = run(&["explain", "api.home.hits:1|c|#env:prod", "x:1|c", "y:1|m"], &rules.path());
    assert_eq!(code, 0, "{text}");
    for row in [
        "  mapping    line 2: api.*.hits, mappings[0]\n  prometheus api_hits{env=\"prod\",route=\"home\"}\n",
        "  mapping    line 5: x, mappings[1]; it drops the series\n",
        "  mapping    no rule matches\n  prometheus y_total\n  prometheus y_rate\n",
    ] {
        assert!(text.contains(row), "{row} is not in\n{text}");
    }
    let (_, text) = run(&["explain", "--json", "api.home.hits:1|c", "y:1|c"], &rules.path());
    let objects: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mapping = |at: usize| objects[at]["metrics"][0]["mapping"].clone();
    assert_eq!(
        mapping(0),
        json!({"rule": 0, "line": 2, "match": "api.*.hits", "match_type": "glob", "action": "map",
               "prometheus": ["api_hits{route=\"home\"}"]})
    );
    assert_eq!((mapping(1)["rule"].clone(), mapping(1)["prometheus"][0].clone()), (Value::Null, json!("y")));
}

#[test]
fn a_reload_changes_defaults_ttl_and_observer_types() {
    let rules = Rules::new("defaults: {observer_type: summary}\nmappings:\n- {match: a.*, name: a}\n");
    let agent = rules.agent();
    agent.datagram("a.x:5|h\nother:5|h");
    until("all lines", || (agent.own("tallyd_lines_total", "udp") >= 2.0).then_some(()));
    let shows = |line: &str| agent.get("/metrics").text().contains(line);
    assert!(shows("# TYPE a summary\n") && shows("# TYPE other summary\n"));
    rules.write(
        "defaults: {observer_type: histogram, histogram_options: {buckets: [7]}}\n\
         mappings:\n- {match: a.*, name: b, observer_type: summary, summary_options: {quantiles: [{quantile: 0.25}]}}\n",
    );
    assert_eq!(reload(&agent).status, 200);
    assert!(shows("\nb{quantile=\"0.25\"} 5\n") && shows("\nother_bucket{le=\"7\"} 1\n") && !shows("# TYPE a "));
    // From then on series are gone as soon as they are a millisecond old.
    rules.write("defaults: {ttl: 1ms}\nmappings: []\n");
    let put = http::request(agent.address("api"), "PUT", "/-/reload", &[], b"");
    assert_eq!((put.status, put.json()["reloaded"].as_bool()), (200, Some(true)));
    until("the ttl", || (!shows("# TYPE other ")).then_some(()));
}

#[test]
fn without_lifecycle_only_a_signal_reloads() {
    let rules = Rules::new("mappings:\n- {match: a.*, name: before}\n");
    let agent = Agent::start(&["store.kind=memory", &rules.setting(), "http.lifecycle=false"]);
    agent.datagram("a.x:5|c");
    agent.wait_for("a.x", "value", 5);
    rules.write("mappings:\n- {match: a.*, name: after}\n");
    let answer = reload(&agent);
    assert_eq!((answer.status, answer.header("content-type")), (403, Some("application/problem+json")));
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("http.lifecycle") && detail.contains("SIGHUP"), "{detail}");
    assert!(agent.get("/metrics").text().contains("\nbefore 5\n"));
    agent.signal("HUP");
    until("the new rules", || agent.get("/metrics").text().contains("\nafter 5\n").then_some(()));
}
