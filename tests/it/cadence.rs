//! The client `cadence`, with each of its sinks: what its methods send is what the API shows, exactly. Which
//! methods there are is read from its source, so that a new one fails the test until it is called here.

use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cadence::prelude::*;
use cadence::{
    BufferedUdpMetricSink, BufferedUnixMetricSink, MetricSink, QueuingMetricSink, StatsdClient, UdpMetricSink,
    UnixMetricSink,
};
use serde_json::{Value, json};

use crate::clients::{Expected, Listening, run};

#[test]
fn by_udp() {
    let to = Listening::start("udp", "relative");
    let socket = || UdpSocket::bind("127.0.0.1:0").unwrap();
    let sinks = [
        ("direct", boxed(UdpMetricSink::from(&to.address, socket()).unwrap())),
        ("buffered", boxed(BufferedUdpMetricSink::from(&to.address, socket()).unwrap())),
        ("small", boxed(BufferedUdpMetricSink::with_capacity(&to.address, socket(), 64).unwrap())),
        ("queued", boxed(QueuingMetricSink::from(UdpMetricSink::from(&to.address, socket()).unwrap()))),
    ];
    all_of(&to, "udp", sinks);
}

#[test]
fn by_a_unix_socket_of_datagrams() {
    let to = Listening::start("unixgram", "relative");
    let socket = || UnixDatagram::unbound().unwrap();
    let sinks = [
        ("direct", boxed(UnixMetricSink::from(&to.address, socket()))),
        ("buffered", boxed(BufferedUnixMetricSink::from(&to.address, socket()))),
        ("small", boxed(BufferedUnixMetricSink::with_capacity(&to.address, socket(), 64))),
        ("queued", boxed(QueuingMetricSink::with_capacity(UnixMetricSink::from(&to.address, socket()), 1_000))),
    ];
    all_of(&to, "unixgram", sinks);
}

/// A sink of any kind.
struct Sink(Box<dyn MetricSink + Send + Sync + UnwindSafe + RefUnwindSafe>);

impl MetricSink for Sink {
    fn emit(&self, metric: &str) -> std::io::Result<usize> {
        self.0.emit(metric)
    }

    fn flush(&self) -> std::io::Result<()> {
        self.0.flush()
    }
}

fn boxed(sink: impl MetricSink + Send + Sync + UnwindSafe + RefUnwindSafe + 'static) -> Sink {
    Sink(Box::new(sink))
}

fn all_of<const N: usize>(to: &Listening, listener: &str, sinks: [(&str, Sink); N]) {
    let mut want = Expected::default();
    for (name, sink) in sinks {
        let client = StatsdClient::builder(name, sink)
            .with_tag("region", "eu")
            .with_tag_value("canary")
            .with_container_id("ci-8f7d")
            .with_error_handler(|error| panic!("{error}"))
            .build();
        counters(&client, name, &mut want);
        gauges_and_sets(&client, name, &mut want);
        observed(&client, name, &mut want);
        fields(&client, name, &mut want);
        client.flush().unwrap();
    }
    let tagless = StatsdClient::from_sink("", boxed(cadence::NopMetricSink));
    tagless.incr("nowhere").unwrap();
    to.has_exactly(listener, &want.finish());
}

/// The tags that each client has.
fn tags() -> Value {
    json!({"region": "eu", "canary": ""})
}

/// The same, and those of a call.
fn tags_and(more: &[(&str, &str)]) -> Value {
    let mut all = tags();
    for (key, value) in more {
        all[*key] = json!(value);
    }
    all
}

fn counters(client: &StatsdClient, name: &str, want: &mut Expected) {
    client.count("count", 1_i64).unwrap();
    client.count("count", -2_i64).unwrap();
    client.count("count", 4_i32).unwrap();
    client.count("count", 8_u64).unwrap();
    client.count("count", 16_u32).unwrap();
    want.counter(&format!("{name}.count"), 29.0, 2.0, &tags());
    client.incr("incr").unwrap();
    client.incr("incr").unwrap();
    want.counter(&format!("{name}.incr"), 2.0, 0.0, &tags());
    client.decr("decr").unwrap();
    want.counter(&format!("{name}.decr"), 0.0, 1.0, &tags());
    client.count_with_tags("tagged", 3).with_tag("a", "b").with_tag_value("flag").send();
    client.incr_with_tags("tagged").with_tag("a", "b").with_tag_value("flag").try_send().unwrap();
    client.decr_with_tags("tagged").with_tag_value("flag").with_tag("a", "b").send();
    want.counter(&format!("{name}.tagged"), 4.0, 1.0, &tags_and(&[("a", "b"), ("flag", "")]));
}

fn gauges_and_sets(client: &StatsdClient, name: &str, want: &mut Expected) {
    client.gauge("gauge", 7_u64).unwrap();
    client.gauge("gauge", 5.5).unwrap();
    want.metric("GAUGE", &format!("{name}.gauge"), &tags(), &json!({"value": 5.5}));
    client.gauge_with_tags("gauge", 8_u64).with_tag("a", "b").send();
    want.metric("GAUGE", &format!("{name}.gauge"), &tags_and(&[("a", "b")]), &json!({"value": 8}));
    for member in [1_i64, 2, 1, -3] {
        client.set("set", member).unwrap();
        client.set_with_tags("set", member).with_tag("a", "b").send();
    }
    want.metric("SET", &format!("{name}.set"), &tags(), &json!({"value": 3}));
    want.metric("SET", &format!("{name}.set"), &tags_and(&[("a", "b")]), &json!({"value": 3}));
    client.meter("meter", 13_u64).unwrap();
    client.meter("meter", 2_u64).unwrap();
    want.metric("METER", &format!("{name}.meter"), &tags(), &json!({"count": 15, "value": 2}));
    client.meter_with_tags("meter", 5_u64).with_tag("a", "b").send();
    want.metric("METER", &format!("{name}.meter"), &tags_and(&[("a", "b")]), &json!({"count": 5, "value": 5}));
}

/// Single values and packed ones, of each type that the client takes.
fn observed(client: &StatsdClient, name: &str, want: &mut Expected) {
    let ms = Duration::from_millis;
    client.time("time", 42_u64).unwrap();
    client.time("time", ms(1_500)).unwrap();
    client.time("time", vec![3_u64, 4]).unwrap();
    client.time("time", vec![ms(5), ms(6)]).unwrap();
    want.observed("TIMER", &format!("{name}.time"), &[42.0, 1_500.0, 3.0, 4.0, 5.0, 6.0], 1.0, &tags());
    client.time_with_tags("time", ms(9)).with_tag("a", "b").send();
    want.observed("TIMER", &format!("{name}.time"), &[9.0], 1.0, &tags_and(&[("a", "b")]));
    client.histogram("histogram", 4_u64).unwrap();
    client.histogram("histogram", 2.5).unwrap();
    client.histogram("histogram", Duration::from_nanos(900)).unwrap();
    client.histogram("histogram", vec![5_u64, 6]).unwrap();
    client.histogram("histogram", vec![0.5, 1.5]).unwrap();
    client.histogram("histogram", vec![Duration::from_nanos(7)]).unwrap();
    let values = [4.0, 2.5, 900.0, 5.0, 6.0, 0.5, 1.5, 7.0];
    want.observed("HISTOGRAM", &format!("{name}.histogram"), &values, 1.0, &tags());
    client.histogram_with_tags("histogram", 4_u64).with_tag("a", "b").send();
    want.observed("HISTOGRAM", &format!("{name}.histogram"), &[4.0], 1.0, &tags_and(&[("a", "b")]));
    client.distribution("distribution", 4_u64).unwrap();
    client.distribution("distribution", 2.5).unwrap();
    client.distribution("distribution", vec![5_u64, 6]).unwrap();
    client.distribution("distribution", vec![0.5, 1.5]).unwrap();
    want.observed("DISTRIBUTION", &format!("{name}.distribution"), &[4.0, 2.5, 5.0, 6.0, 0.5, 1.5], 1.0, &tags());
    client.distribution_with_tags("distribution", vec![4_u64, 5]).with_tag("a", "b").send();
    want.observed("DISTRIBUTION", &format!("{name}.distribution"), &[4.0, 5.0], 1.0, &tags_and(&[("a", "b")]));
}

/// Rates, timestamps and containers of a call. The client does not sample: it says what its caller did.
fn fields(client: &StatsdClient, name: &str, want: &mut Expected) {
    client.count_with_tags("rate", 3).with_sampling_rate(0.1).send();
    want.counter(&format!("{name}.rate"), 30.0, 0.0, &tags());
    client.time_with_tags("rate.time", vec![10_u64, 20]).with_sampling_rate(0.5).with_tag("a", "b").send();
    want.observed("TIMER", &format!("{name}.rate.time"), &[10.0, 20.0], 0.5, &tags_and(&[("a", "b")]));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    client.count_with_tags("at", 3).with_timestamp(now).send();
    client.count_with_tags("at", 4).with_timestamp(1_713_804_588).with_container_id("other").send();
    want.counter(&format!("{name}.at"), 7.0, 0.0, &tags());
    want.unplaced += 1;
}

#[test]
fn every_method_is_called() {
    let mut metadata = Command::new(env!("CARGO"));
    metadata.args(["metadata", "--format-version=1", "--locked", "--offline", "--manifest-path"]);
    metadata.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    let metadata: Value = serde_json::from_str(&run(metadata, Duration::from_secs(60))).unwrap();
    let is_it = |package: &&Value| package["name"] == "cadence";
    let package = metadata["packages"].as_array().unwrap().iter().find(is_it).unwrap();
    let folder = std::path::Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().join("src");
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    let methods = [methods(&read("client.rs")), methods(&read("builder.rs"))].concat();
    assert!(methods.len() > 25 && methods.contains(&"meter_with_tags".to_owned()), "{methods:?}");
    // They are spelt out in this file, so it can tell.
    let here = include_str!("cadence.rs");
    let is_called = |name: &str| here.contains(&format!(".{name}(")) || here.contains(&format!("::{name}("));
    let missing: Vec<_> = methods.iter().filter(|name| !is_called(name)).collect();
    assert!(missing.is_empty(), "never called: {missing:?}");
}

/// The methods of a source file's traits for callers, and of its public types.
fn methods(source: &str) -> Vec<String> {
    // How values are written, and what others may build clients upon.
    let inner = ["ToCounterValue", "ToTimerValue", "ToGaugeValue", "ToMeterValue", "ToHistogramValue"];
    let inner = [&inner[..], &["ToDistributionValue", "ToSetValue", "MetricBackend"]].concat();
    let source = source.split("#[cfg(test)]").next().unwrap();
    let mut found = Vec::new();
    let mut within_trait = false;
    for line in source.lines() {
        if line.starts_with("pub trait ") {
            within_trait = !inner.iter().any(|name| line.starts_with(&format!("pub trait {name}")));
        } else if line.starts_with("impl") {
            within_trait = false;
        }
        let start = if within_trait { "    fn " } else { "    pub fn " };
        if let Some(rest) = line.strip_prefix(start) {
            found.push(rest.split(['(', '<']).next().unwrap().to_owned());
        }
    }
    found
}
