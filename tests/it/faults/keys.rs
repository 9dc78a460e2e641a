//! What an answer promises: `?durable=1` outlives `kill -9`, and a request with an `Idempotency-Key` counts once,
//! however often and to whichever process it is sent.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use super::{Random, begin, post, shipping};
use crate::agent::{Agent, same, until};
use crate::http;
use crate::redis_servers::Server;

const BODY: &str = r#"[{"name":"k.c","type":"COUNTER","value":3},{"name":"k.t","type":"TIMER","value":2},
    {"name":"k.d","type":"COUNTER","value":-1}]"#;

fn embedded() -> Vec<String> {
    ["flush.interval=100ms", "flush.window=1s"].map(str::to_owned).to_vec()
}

/// Sends requests with keys of their own until `ends` says so, one after the other. Answers how many were begun.
fn send_keys(agent: &Agent, first: u64, ends: &AtomicBool, begun: &AtomicU64) -> u64 {
    let to = agent.address("ingest");
    let mut number = first;
    while !ends.load(Ordering::SeqCst) {
        begun.fetch_add(1, Ordering::SeqCst);
        let answered = send_key(to, number);
        number += 1;
        if !answered {
            break;
        }
    }
    number
}

fn send_key(to: std::net::SocketAddr, number: u64) -> bool {
    post(to, "/ingest/metrics", &format!("Idempotency-Key: key-{number}\r\n"), BODY) == Some(200)
}

/// Makes commits long, by many series, and lets readers have what comes meanwhile folded: what a commit writes of a series
/// must be what it was when the flush began.
fn make_noise(agent: &Agent, noise: &str, ends: &AtomicBool) {
    while !ends.load(Ordering::SeqCst) && post(agent.address("ingest"), "/ingest/metrics", "", noise).is_some() {
        // The answer does not matter; the agent may be gone.
        read(agent.address("api"));
    }
}

fn read(api: std::net::SocketAddr) {
    let Ok(mut stream) = TcpStream::connect(api) else { return };
    let request = format!("GET /data/metrics/k.c?scope=local HTTP/1.0\r\nHost: {api}\r\n\r\n");
    if stream.write_all(request.as_bytes()).is_ok() {
        drop(stream.read_to_end(&mut Vec::new()));
    }
}

/// Kills the agent at random instants while requests with keys come in, and sends each of them again: those whose samples
/// were in the journal count no more, those whose samples went with the process count now.
fn retries_after_kills(settings: &[String], kills: u64, seed: u64) -> (Agent, u64) {
    let mut random = Random(seed);
    let mut agent = begin(settings);
    let (mut total, mut told_again) = (0, 0.0);
    let noise: Vec<_> =
        (0..1_000).map(|number| json!({"name": format!("noise.{number}"), "type": "COUNTER", "value": 1})).collect();
    let noise = json!(noise).to_string();
    for _ in 0..kills {
        let (ends, begun) = (AtomicBool::new(false), AtomicU64::new(0));
        let pause = Duration::from_micros(random.below(250_000));
        let last = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send_keys(&agent, total, &ends, &begun));
            scope.spawn(|| make_noise(&agent, &noise, &ends));
            until("the first request", || (begun.load(Ordering::SeqCst) > 0).then_some(()));
            std::thread::sleep(pause);
            agent.signal("KILL");
            ends.store(true, Ordering::SeqCst);
            sender.join().unwrap()
        });
        agent = agent.restart_after("KILL");
        // In reverse, so that the order of keys is no help. Twice, so that the second is a retry in any case.
        for number in (total..last).rev().chain(total..last) {
            assert!(send_key(agent.address("ingest"), number));
        }
        let counted = agent.own("tallyd_samples_total", "listener=\"http\"") / 3.0;
        told_again += (last - total) as f64 - counted;
        total = last;
        let read = |key: &str, field: &str, want: u64| {
            let metric = agent.get(&format!("/data/metrics/{key}?scope=local")).json();
            assert!(same(&metric[field], &json!(want)), "{want}: {metric}");
        };
        read("k.c", "value", 3 * total);
        read("k.t", "count", total);
        read("k.t", "sum", 2 * total);
    }
    assert!(told_again > 0.0, "no key was found in the journal, so nothing was tried");
    (agent, total)
}

#[test]
fn a_retry_after_kill_9_counts_once_with_the_journal() {
    retries_after_kills(&embedded(), 20, 0x5eed_0001);
}

#[test]
fn a_retry_after_kill_9_counts_once_with_redis() {
    let redis = Server::persistent();
    let (agent, total) = retries_after_kills(&shipping(&redis.url()), 20, 0x5eed_0002);
    for (key, field, want) in [("k.c", "value", 3 * total), ("k.t", "sum", 2 * total), ("k.t", "count", total)] {
        agent.wait_for(key, field, want);
    }
    assert!(same(&agent.metric("k.d").unwrap()["value"], &json!(-(total as i64))));
    let field = |letter: &str, key: &str, field: &str| {
        let name = redis.cli(&["--scan", "--pattern", &format!("tallyd:*:s:{letter}:{key}")]);
        redis.cli(&["HGET", name.trim(), field]).trim().to_owned()
    };
    until("the store to hold it", || (field("c", "k.c", "increments") == (3 * total).to_string()).then_some(()));
    until("the store to hold it", || (field("c", "k.d", "decrements") == total.to_string()).then_some(()));
    until("the store to hold it", || (field("ms", "k.t", "n") == total.to_string()).then_some(()));
}

#[test]
fn a_key_is_told_the_first_answer_after_any_restart() {
    let mut agent = Agent::start(&["flush.interval=10s"]);
    let ask = |agent: &Agent, key: &str, body: &str| {
        let headers = [("Idempotency-Key", key), ("Content-Type", "application/json")];
        http::request(agent.address("ingest"), "POST", "/ingest/metrics?durable=1", &headers, body.as_bytes())
    };
    let one = r#"{"name":"told","type":"COUNTER","value":1}"#;
    assert_eq!(ask(&agent, "one", one).text(), "Record told UPDATED");
    let many = ask(&agent, "many", &format!("[{one},{one},7]"));
    for signal in ["KILL", "TERM"] {
        agent = agent.restart_after(signal);
        let again = ask(&agent, "one", one);
        assert_eq!((again.text().as_str(), again.header("content-type")), ("Record told UPDATED", Some(http_text())));
        let again = ask(&agent, "many", "[]");
        assert_eq!((again.text(), again.header("content-type")), (many.text(), Some("application/json")));
        assert!(same(&agent.metric("told").unwrap()["value"], &json!(3)));
    }
    assert_eq!(ask(&agent, "other", one).status, 200);
    assert!(same(&agent.metric("told").unwrap()["value"], &json!(4)));
}

fn http_text() -> &'static str {
    "text/plain; charset=utf-8"
}

#[test]
fn only_as_many_keys_as_the_limit_says_are_kept() {
    let agent = Agent::start(&["flush.interval=100ms", "limits.idempotency_keys=10"]);
    for number in 0..30 {
        assert!(send_key(agent.address("ingest"), number));
    }
    assert_eq!(agent.own("tallyd_idempotency_keys_forgotten_total", ""), 20.0);
    assert_eq!(post(agent.address("ingest"), "/ingest/metrics?durable=1", "", BODY), Some(200));
    let agent = agent.restart_after("KILL");
    // The last ten are known, the others count again.
    for number in (20..30).chain(0..3) {
        assert!(send_key(agent.address("ingest"), number));
    }
    assert!(same(&agent.metric("k.t").unwrap()["count"], &json!(34)));
}

#[test]
fn what_was_answered_durable_outlives_kill_9() {
    let mut agent = begin(&embedded());
    let mut random = Random(0x5eed_0003);
    let mut kept = 0;
    for _ in 0..10 {
        let (ends, acknowledged, begun) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !ends.load(Ordering::SeqCst) {
                        begun.fetch_add(1, Ordering::SeqCst);
                        if post(agent.address("ingest"), "/ingest/metrics?durable=1", "", BODY) != Some(200) {
                            break;
                        }
                        acknowledged.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            until("some answers", || (acknowledged.load(Ordering::SeqCst) > 3).then_some(()));
            std::thread::sleep(Duration::from_micros(random.below(100_000)));
            agent.signal("KILL");
            ends.store(true, Ordering::SeqCst);
        });
        agent = agent.restart_after("KILL");
        let counted = agent.metric("k.t").unwrap()["count"].as_u64().unwrap();
        let (acknowledged, begun) = (acknowledged.into_inner(), begun.into_inner());
        let range = kept + acknowledged..=kept + begun;
        assert!(range.contains(&counted), "{counted} of {range:?}");
        kept = counted;
        assert!(same(&agent.metric("k.c").unwrap()["value"], &json!(3 * kept)), "no request is kept in part");
    }
}

#[test]
fn durable_is_refused_where_nothing_is_kept() {
    let agent = Agent::start(&["store.kind=memory"]);
    for (query, status) in [("durable=1", 400), ("durable=maybe", 400), ("durable=0", 200), ("durable=false", 200)] {
        assert_eq!(post(agent.address("ingest"), &format!("/ingest/metrics?{query}"), "", BODY), Some(status));
    }
    assert!(same(&agent.metric("k.t").unwrap()["count"], &json!(2)), "what is refused is not counted");
    assert!(send_key(agent.address("ingest"), 1) && send_key(agent.address("ingest"), 1));
    assert!(same(&agent.metric("k.t").unwrap()["count"], &json!(3)));
}
