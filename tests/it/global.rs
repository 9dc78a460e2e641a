//! What is read where several agents share a store: figures of all of them, from an agent that listens to nothing.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::agent::{Agent, same, until};
use crate::redis_servers::Server;

const FAST: [&str; 3] = ["store.kind=redis", "flush.interval=100ms", "flush.window=1s"];

fn agent_with(redis: &Server, more: &[&str]) -> Agent {
    Agent::start(&[&FAST[..], &[&redis.url()], more].concat())
}

fn agent(redis: &Server) -> Agent {
    agent_with(redis, &[])
}

/// An agent that takes nothing in.
fn reader(redis: &Server) -> Agent {
    agent_with(redis, &["listen.udp=[]", "listen.tcp=[]", "http.ingest=[]"])
}

/// Waits until a metric that somebody else sent shows a figure.
#[track_caller]
fn read(reader: &Agent, key: &str, field: &str, want: impl Into<Value>) -> Value {
    reader.wait_for(key, field, want);
    let metric = reader.metric(key).unwrap();
    assert_eq!(metric.get("scope"), None, "{metric}");
    metric
}

#[track_caller]
fn near(got: &Value, want: f64, within: f64) {
    let got = got.as_f64().unwrap();
    assert!((got - want).abs() <= within * want, "{got} is not {want}");
}

/// Values, a hundred lines to a datagram.
fn send_all(agent: &Agent, name: &str, letter: &str, values: impl Iterator<Item = u32>) {
    let lines: Vec<_> = values.map(|value| format!("{name}:{value}|{letter}")).collect();
    for part in lines.chunks(100) {
        agent.datagram(part.join("\n"));
    }
}

#[test]
fn quantiles_are_those_of_all_that_was_observed_anywhere() {
    let redis = Server::persistent();
    // The second agent has to keep its histogram half as fine: the values fall into 640 buckets.
    let (a, b, reader) = (agent(&redis), agent_with(&redis, &["limits.buckets=320"]), reader(&redis));
    for (name, letter, other, within) in [("t", "ms", &a, 0.01), ("d", "d", &b, 0.02)] {
        send_all(&a, name, letter, (1..=1_000).step_by(2));
        send_all(other, name, letter, (2..=1_000).step_by(2));
        if name == "t" {
            send_all(&b, name, letter, 1_001..=1_100);
        }
        let count = if name == "t" { 1_100 } else { 1_000 };
        let metric = read(&reader, name, "count", count);
        assert!(same(&metric["sum"], &json!(count * (count + 1) / 2)), "{metric}");
        assert!(same(&metric["min"], &json!(1)) && same(&metric["max"], &json!(count)), "{metric}");
        near(&metric["mean"], f64::from(count + 1) / 2.0, 1e-12);
        near(&metric["stddev"], ((f64::from(count).powi(2) - 1.0) / 12.0).sqrt(), 1e-9);
        let metric = reader.get(&format!("/data/metrics/{name}?quantiles=0.01,0.25,0.5,0.9,0.99,0.999")).json();
        let quantiles = metric["quantiles"].as_object().unwrap();
        assert_eq!(quantiles.len(), 6);
        for (quantile, value) in quantiles {
            near(value, (quantile.parse::<f64>().unwrap() * f64::from(count)).ceil(), within);
        }
    }
}

#[test]
fn members_count_once_over_all_agents() {
    let redis = Server::persistent();
    let (a, b, reader) = (agent(&redis), agent(&redis), reader(&redis));
    send_all(&a, "few", "s", 1..=600);
    send_all(&b, "few", "s", 401..=1_000);
    send_all(&a, "many", "s", 1..=6_000);
    send_all(&b, "many", "s", 4_001..=10_000);
    read(&reader, "few", "value", 1_000);
    until("the estimate", || {
        let value = reader.metric("many")?["value"].as_f64()?;
        ((value - 10_000.0).abs() <= 200.0).then_some(())
    });
}

#[test]
fn the_newest_set_of_a_gauge_wins_and_changes_after_it_add_up() {
    let redis = Server::persistent();
    let (a, b, reader) = (agent(&redis), agent(&redis), reader(&redis));
    a.datagram("g:10|g");
    read(&reader, "g", "value", 10);
    b.datagram("g:20|g");
    read(&reader, "g", "value", 20);
    a.datagram("g:+5|g");
    read(&reader, "g", "value", 25);
    b.datagram("g:-7|g");
    read(&reader, "g", "value", 18);
    a.datagram("g:3|g");
    read(&reader, "g", "value", 3);
}

#[test]
fn rates_of_meters_add_up() {
    let redis = Server::persistent();
    let (a, b, reader) = (agent(&redis), agent(&redis), reader(&redis));
    a.datagram("m:600|m");
    b.datagram("m:300|m");
    read(&reader, "m", "count", 900);
    // A meter ticks every 5 s; until then the rates of the minutes are 0.
    let global = until("the first tick of both", || {
        let metric = reader.metric("m")?;
        (metric["m1Rate"].as_f64()? > 100.0).then_some(metric)
    });
    let parts: f64 =
        [&a, &b].map(|agent| agent.get("/data/metrics/m?scope=local").json()["m15Rate"].as_f64().unwrap()).iter().sum();
    // Each decays a little with every tick; between the reads there are at most two.
    near(&global["m15Rate"], parts, 0.02);
    near(&global["count"], 900.0, 0.0);
}

#[test]
fn a_list_goes_through_all_series_of_all_agents_page_by_page() {
    let redis = Server::persistent();
    let (a, b, reader) = (agent(&redis), agent(&redis), reader(&redis));
    for number in 0..40 {
        a.datagram(format!("list.a{number}:1|c"));
        b.datagram(format!("list.b{number}:1|c\nlist.both{number}:2|c"));
        a.datagram(format!("list.both{number}:3|c"));
    }
    until("all series", || (reader.get("/data/metrics?limit=10000").json().as_array()?.len() == 120).then_some(()));
    read(&reader, "list.both39", "value", 5);
    for limit in [7, 50, 119] {
        let mut names = BTreeSet::new();
        let mut path = format!("/data/metrics?limit={limit}&match=list.*");
        let mut pages = 0;
        loop {
            let page = reader.get(&path);
            let metrics = page.json();
            let metrics = metrics.as_array().unwrap();
            assert!(metrics.len() <= limit, "{} of {limit}", metrics.len());
            for metric in metrics {
                let name = metric["name"].as_str().unwrap().to_owned();
                assert!(same(&metric["value"], &json!(if name.starts_with("both") { 5 } else { 1 })), "{metric}");
                assert!(names.insert(name), "twice: {metric}");
            }
            pages += 1;
            let Some(link) = page.header("link") else { break };
            assert!(link.ends_with("rel=\"next\""), "{link}");
            path = link[link.find('<').unwrap() + 1..link.find('>').unwrap()].to_owned();
        }
        assert_eq!((names.len(), pages), (120, 120_usize.div_ceil(limit)));
    }
    let one = reader.get("/data/metrics?match=list.a7&type=counter").json();
    assert_eq!(one.as_array().unwrap().len(), 1, "{one}");
}

#[test]
fn an_agent_that_listens_to_nothing_reads_and_deletes_for_all() {
    let redis = Server::persistent();
    let (a, reader) = (agent(&redis), reader(&redis));
    a.datagram("gone:5|c");
    read(&reader, "gone", "value", 5);
    assert_eq!(reader.get("/data/metrics/gone?scope=local").status, 404);
    assert_eq!(reader.delete("/data/metrics/gone").status, 200);
    assert_eq!(reader.metric("gone"), None);
    until("the other agent to reset", || (a.get("/data/metrics/gone?scope=local").status == 404).then_some(()));
    a.datagram("gone:1|c");
    read(&reader, "gone", "value", 1);
}

#[test]
fn a_series_leaves_the_store_after_its_time() {
    let redis = Server::persistent();
    let settings = ["limits.store_expire=2s", "limits.idle=500ms"];
    let (a, reader) = (agent_with(&redis, &settings), reader(&redis));
    a.datagram("brief:5|c");
    read(&reader, "brief", "value", 5);
    let name = redis.cli(&["--scan", "--pattern", "tallyd:*:s:c:brief"]);
    let left: i64 = redis.cli(&["PTTL", name.trim()]).trim().parse().unwrap();
    assert!((1..=2_000).contains(&left), "{left}");
    until("it to be gone", || reader.metric("brief").is_none().then_some(()));
    a.datagram("brief:1|c");
    read(&reader, "brief", "value", 1);
}

#[test]
fn without_its_store_a_reader_knows_what_it_has_itself() {
    let mut redis = Server::persistent();
    let (a, reader) = (agent(&redis), reader(&redis));
    a.datagram("away:5|c");
    read(&reader, "away", "value", 5);
    redis.kill();
    until("the reader to find out", || (reader.get("/-/ready").status == 503).then_some(()));
    assert_eq!(reader.metric("away"), None);
    let local = a.metric("away").unwrap();
    assert!(local["scope"] == "local" && same(&local["value"], &json!(5)), "{local}");
    redis.start_again();
    read(&reader, "away", "value", 5);
    until("the reader to be ready", || (reader.get("/-/ready").status == 200).then_some(()));
}
