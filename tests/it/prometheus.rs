//! The scrape as Prometheus sees it: its own checker, and a real server.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tallyd::telemetry::{ALL, Shape};
use tempfile::TempDir;

use crate::agent::{Agent, same, until};
use crate::http;
use crate::net::free_port;

/// Exit code and output of `promtool check metrics`.
pub fn promtool(exposition: &str) -> (i32, String) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed by packaging/setup.sh tests");
    child.stdin.take().unwrap().write_all(exposition.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[test]
fn promtool_finds_nothing_in_our_own_metrics() {
    let agent = Agent::start(&[]);
    agent.datagram("a:1|c\nbad\nb:1|ms");
    agent.ingest(r#"{"name":"e","type":"COUNTER","value":1}"#);
    agent.get("/data/metrics");
    agent.wait_for("a", "value", 1);
    let text = agent.get("/metrics").text();
    let is_own = |line: &&str| line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ").starts_with("tallyd_");
    let is_process =
        |line: &&str| line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ").starts_with("process_");
    let own: Vec<_> = text.lines().filter(|line| is_own(line) || is_process(line)).collect();
    assert!(own.len() > 50, "{text}");
    let (code, output) = promtool(&(own.join("\n") + "\n"));
    assert_eq!(code, 0, "{output}");
}

#[test]
fn bytes_are_counted_by_listener() {
    let agent = Agent::start(&[]);
    agent.datagram("a:1|c");
    agent.connect().write_all(b"a:1|c\na:1|c\n").unwrap();
    let record = r#"{"name":"a","type":"COUNTER","value":1}"#;
    agent.ingest(record);
    agent.wait_for("a", "value", 4);
    for (listener, bytes) in [("udp", 5), ("tcp", 12), ("http", record.len())] {
        let counted = || agent.own("tallyd_received_bytes_total", &format!("listener=\"{listener}\""));
        until(&format!("{bytes} by {listener}"), || (counted() == bytes as f64).then_some(()));
    }
}

/// A rate misses the count with which a counter appears.
#[test]
fn counters_stand_at_0_from_the_start() {
    // Every part that has counters, but for Kafka.
    let parts = ["export.graphite.to=127.0.0.1:1", "export.relay.to=127.0.0.1:1", "export.console.listen=127.0.0.1:0"];
    let text = Agent::start(&parts).get("/metrics").text();
    for counter in ALL.iter().filter(|metric| metric.shape == Shape::Counter) {
        let is_there = text.contains(&format!("\n# TYPE {} counter\n", counter.name));
        // What will be asked is not known before, and Kafka has counters where it is used.
        let is_later = counter.name == "tallyd_http_requests_total" || counter.name.starts_with("tallyd_kafka_");
        assert!(is_there || is_later, "{} in {text}", counter.name);
    }
    for sample in [
        "tallyd_lines_total{listener=\"udp\"} 0",
        "tallyd_lines_rejected_total{listener=\"http\",reason=\"bad_json\"} 0",
        "tallyd_samples_rejected_total{listener=\"tcp\",reason=\"bad_value\"} 0",
        "tallyd_store_errors_total{store=\"journal\",reason=\"no_space\"} 0",
        "tallyd_connections_refused_total{listener=\"tcp\",reason=\"connections\"} 0",
        "tallyd_connections_refused_total{listener=\"ingest\",reason=\"limit\"} 0",
        "tallyd_series_expired_total{kind=\"GAUGE\"} 0",
        "tallyd_series_refused_total{reason=\"budget\"} 0",
        "tallyd_lost_total{reason=\"journal_damaged\"} 0",
    ] {
        assert!(text.contains(&format!("\n{sample}\n")), "{sample} in {text}");
    }
}

#[test]
fn the_scrape_is_valid_whatever_clients_send() {
    let agent = Agent::start(&["protocol.name_policy=none"]);
    agent.datagram(
        "a:1|c\na:1|g\na_sum:1|c\na:1|ms\n1digit:1|c\nspace here:1|c|#le:1,quantile:2,__name__:x,k:a\"b\\c\nü.x:1|g\n\
         tallyd_lines_total:1|c\nb:1|c|#a.b:1,a_b:2\nx-y:1|c\nx.y:2|c\nup:1|s\nm:1|m\nn:-5|c\ninf:1e308|ms\n{}:1|c",
    );
    agent.wait_for("m", "count", 1);
    let answer = agent.get("/metrics");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let (code, output) = promtool(&answer.text());
    assert!([0, 3].contains(&code), "{code}: {output}\n{}", answer.text());
    assert!(answer.text().contains("\nx_y 3\n"), "equal names are added: {}", answer.text());
}

/// A real Prometheus that scrapes an agent each second; it is killed when dropped.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    _directory: TempDir,
}

impl Prometheus {
    fn scraping(agent: &Agent) -> Self {
        Self::scraping_with(agent, &[])
    }

    fn scraping_with(agent: &Agent, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let configuration = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: tallyd\n  static_configs: [{{targets: ['{}']}}]\n",
            agent.address("api")
        );
        fs::write(directory.path().join("prometheus.yml"), configuration).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", directory.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus is installed by packaging/setup.sh tests");
        Self { child, address, _directory: directory }
    }

    /// The value of an instant query that selects one series.
    fn query(&self, expression: &str) -> Option<f64> {
        std::net::TcpStream::connect(self.address).ok()?;
        let encoded = expression
            .replace('{', "%7B")
            .replace('}', "%7D")
            .replace('"', "%22")
            .replace(' ', "%20")
            .replace('+', "%2B");
        let answer = http::request(self.address, "GET", &format!("/api/v1/query?query={encoded}"), &[], b"");
        let json: Value = serde_json::from_slice(&answer.body).ok()?;
        json["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_real_prometheus_stores_what_was_sent() {
    let agent = Agent::start(&[]);
    agent.datagram("page.views:7|c|#site:eu\ntemp:21.5|g\nlatency:250|ms");
    agent.wait_for("latency", "count", 1);
    let prometheus = Prometheus::scraping(&agent);
    for (expression, want) in [
        ("up{job=\"tallyd\"}", 1.0),
        ("page_views{site=\"eu\"}", 7.0),
        ("temp", 21.5),
        ("latency_sum", 0.25),
        ("latency_count", 1.0),
    ] {
        until(&format!("{expression} to be {want}"), || {
            prometheus.query(expression).filter(|value| same(&(*value).into(), &want.into()))
        });
    }
}

/// Waits until a Prometheus computes this, or what is within a share of it.
#[track_caller]
fn wait_for(prometheus: &Prometheus, expression: &str, want: f64, error: f64) {
    until(&format!("{expression} to be {want}"), || {
        prometheus.query(expression).filter(|value| (value - want).abs() <= error * want.abs())
    });
}

/// The values 1 to 1,000, as times in milliseconds (`native.times`) and as they are, half below zero (`native.values`).
fn observe(agent: &Agent) {
    for values in (1..=1_000).collect::<Vec<_>>().chunks(50) {
        let lines = values.iter().map(|value| {
            let signed = if value % 2 == 0 { *value } else { -*value };
            format!("native.times:{value}|ms|#route:a b\nnative.values:{signed}|h\n")
        });
        agent.datagram(lines.collect::<String>());
    }
    agent.datagram("native.count:3|c\nnative.values:0|h\nnative.sampled:8|h|@0.3");
    agent.wait_for("native.times;route=a%20b", "count", 1_000);
    agent.wait_for("native.values", "count", 1_001);
    agent.wait_for("native.sampled", "value", 8);
}

#[test]
fn a_prometheus_with_native_histograms_stores_what_was_observed() {
    let agent = Agent::start(&["prometheus.observer_type=histogram", "prometheus.native_bucket_factor=1.05"]);
    observe(&agent);
    let prometheus = Prometheus::scraping_with(&agent, &["--enable-feature=native-histograms"]);
    wait_for(&prometheus, "up{job=\"tallyd\"}", 1.0, 0.0);
    for (expression, want, error) in [
        ("histogram_count(native_times{route=\"a b\"})", 1_000.0, 0.0),
        ("histogram_sum(native_times)", 500.5, 1e-12),
        // Schema 4: half of a bucket is 2.2 %, and seconds add 0.54 %.
        ("histogram_quantile(0.9, native_times)", 0.9, 0.028),
        ("histogram_quantile(0.5, native_times)", 0.5, 0.028),
        ("histogram_count(native_values)", 1_001.0, 0.0),
        ("histogram_sum(native_values)", 500.0, 1e-12),
        ("histogram_quantile(0.1, native_values)", -800.0, 0.044),
        ("histogram_fraction(-2000, 0, native_values)", 0.5, 0.001),
        ("histogram_count(native_sampled)", 1.0 / 0.3, 1e-12),
        ("native_count", 3.0, 0.0),
        ("tallyd_lines_total{listener=\"udp\"}", 2_003.0, 0.0),
        ("tallyd_build_info", 1.0, 0.0),
    ] {
        wait_for(&prometheus, expression, want, error);
    }
    // Our own histograms have classic buckets alone, and these are stored beside.
    wait_for(&prometheus, "count(tallyd_fold_seconds_bucket) > bool 5", 1.0, 0.0);
}

#[test]
fn a_prometheus_without_native_histograms_stays_with_text() {
    let agent = Agent::start(&["prometheus.observer_type=histogram"]);
    observe(&agent);
    let prometheus = Prometheus::scraping(&agent);
    for (expression, want) in [
        ("native_times_count{route=\"a b\"}", 1_000.0),
        ("native_times_sum", 500.5),
        ("native_times_bucket{le=\"0.25\"}", 250.0),
        ("native_times_bucket{le=\"+Inf\"}", 1_000.0),
        ("native_sampled_count", 1.0 / 0.3),
        ("native_count", 3.0),
    ] {
        wait_for(&prometheus, expression, want, 0.011);
    }
}

#[test]
fn protobuf_comes_as_asked_for_and_can_be_turned_off() {
    const PROTOBUF: &str = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
    let told = |agent: &Agent, accept: &str| {
        let answer = http::request(agent.address("api"), "GET", "/metrics", &[("Accept", accept)], b"");
        assert_eq!(answer.status, 200);
        answer.header("content-type").unwrap().split(';').next().unwrap().to_owned()
    };
    let agent = Agent::start(&[]);
    assert_eq!(told(&agent, PROTOBUF), "application/vnd.google.protobuf");
    assert_eq!(told(&agent, &format!("{PROTOBUF};q=0.3, text/plain;q=0.4")), "text/plain");
    let agent = Agent::start(&["prometheus.native_histograms=false"]);
    assert_eq!(told(&agent, PROTOBUF), "text/plain");
}
