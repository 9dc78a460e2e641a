//! What happens at the limits: a counter, a clear answer, and no effect on anything beside.

use std::io::{Read, Write};

use crate::agent::{Agent, PATIENCE, until};
use crate::http;

#[test]
fn series_beyond_the_limit_fold_into_overflow_and_old_ones_go_on() {
    let agent = Agent::start(&["limits.series=10", "listen.workers=1"]);
    agent.datagram("old:1|c");
    agent.wait_for("old", "value", 1);
    let lines: Vec<_> = (0..100).map(|i| format!("new{i}:1|c")).collect();
    agent.datagram(lines.join("\n"));
    agent.datagram("old:1|c");
    agent.wait_for("old", "value", 2);
    let page = agent.get("/data/metrics").json();
    let total: u64 = page.as_array().unwrap().iter().map(|metric| metric["value"].as_u64().unwrap()).sum();
    assert_eq!(total, 102, "{page}");
    let refused = agent.own("tallyd_series_refused_total", "");
    let overflow = agent.metric("_overflow").unwrap()["value"].as_f64().unwrap();
    assert!((refused - overflow).abs() < 1e-9 && refused > 80.0, "{refused} {overflow}");
}

/// So many counters of 1 by different names.
fn counters(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{name}{i}:1|c")).collect()
}

#[test]
fn new_series_beyond_the_rate_fold_into_overflow_and_come_in_later() {
    let agent = Agent::start(&["limits.new_series=5", "listen.workers=1"]);
    agent.datagram(counters("first", 100).join("\n"));
    let refused = until("some to be refused", || {
        let refused = agent.own("tallyd_series_refused_total", "reason=\"rate\"");
        (refused > 0.0).then_some(refused)
    });
    // A second may have ended between two lines of the datagram.
    assert!((90.0..=95.0).contains(&refused), "{refused}");
    assert_eq!(agent.metric("_overflow").unwrap()["value"].as_f64().unwrap(), refused);
    until("a second to have room for another", || {
        agent.datagram("later:1|c");
        agent.metric("later")
    });
}

#[test]
fn what_the_journal_gave_back_is_not_new_after_a_restart() {
    let agent = Agent::start_with_file("[limits]\nseries = 100\n");
    agent.datagram(counters("known", 100).join("\n"));
    agent.wait_for("known99", "value", 1);
    agent.write_file("[limits]\nseries = 100\nnew_series = 0\n");
    let agent = agent.restart_after("TERM");
    agent.datagram(counters("known", 100).join("\n"));
    for name in ["known0", "known99"] {
        agent.wait_for(name, "value", 2);
    }
    assert_eq!(agent.own("tallyd_series_refused_total", ""), 0.0);
    agent.datagram("stranger:1|c");
    agent.wait_for("_overflow", "value", 1);
}

#[test]
fn buckets_beyond_the_limit_halve_the_scale_and_are_counted() {
    let agent = Agent::start(&["limits.buckets=320"]);
    let coarsened = || agent.own("tallyd_series_coarsened_total", "reason=\"buckets\"");
    let values = |from: i32, to: i32| {
        let lines: Vec<_> = (from..to).map(|step| format!("t:{}|ms", (f64::from(step) / 40.0).exp2())).collect();
        lines.chunks(50).for_each(|lines| agent.datagram(lines.join("\n")));
        agent.wait_for("t", "count", to.unsigned_abs());
    };
    values(0, 300);
    assert_eq!(coarsened(), 0.0);
    values(300, 600);
    // 15 powers of two, each of 64 buckets, then of 32, of 16.
    assert_eq!(coarsened(), 2.0);
}

#[test]
fn members_beyond_the_limit_turn_a_set_into_an_estimate() {
    let agent = Agent::start(&["limits.set_exact=20"]);
    let estimated = || agent.own("tallyd_series_coarsened_total", "reason=\"set_exact\"");
    let members = |count: usize| {
        let lines: Vec<_> = (0..count).map(|member| format!("s:member{member}|s")).collect();
        agent.datagram(lines.join("\n"));
        agent.wait_for("s", "value", count as u64);
    };
    members(20);
    assert_eq!(estimated(), 0.0);
    members(21);
    assert_eq!(estimated(), 1.0);
}

#[test]
fn growth_is_charged_and_given_back() {
    let agent = Agent::start(&["listen.workers=1"]);
    let charged = || agent.own("tallyd_series_memory_bytes", "");
    agent.datagram("t:1|ms");
    agent.wait_for("t", "count", 1);
    let small = charged();
    let lines: Vec<_> = (1..=1_000).map(|value| format!("t:{value}|ms")).collect();
    lines.chunks(50).for_each(|lines| agent.datagram(lines.join("\n")));
    agent.wait_for("t", "count", 1_001);
    // A byte at least for each of some 400 buckets, in the total and in the window.
    assert!(charged() > small + 600.0, "{small} {}", charged());
    agent.delete("/data/metrics/t");
    until("it to be given back", || (charged() < small).then_some(()));
}

#[test]
fn an_over_long_line_is_refused_and_the_stream_goes_on() {
    let agent = Agent::start(&["limits.line=100B"]);
    let mut stream = agent.connect();
    stream.write_all(&[b"a:1|c\n".as_slice(), &[b'x'; 5_000], b"\nb:1|c\n"].concat()).unwrap();
    agent.wait_for("a", "value", 1);
    agent.wait_for("b", "value", 1);
    assert!(agent.own("tallyd_lines_rejected_total", "reason=\"line_too_long\"") == 1.0);
}

#[test]
fn a_line_begun_and_not_ended_is_closed_in_time() {
    let agent = Agent::start(&["limits.partial_line=300ms"]);
    let mut stream = agent.connect();
    stream.write_all(b"a:1|c\nb:1").unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "closed by the agent");
    agent.wait_for("a", "value", 1);
}

#[test]
fn connections_beyond_the_limit_are_closed_and_counted() {
    let agent = Agent::start(&["limits.connections=2"]);
    let _held = [agent.connect(), agent.connect()];
    until("both to be open", || (agent.own("tallyd_connections", "listener=\"tcp\"") == 2.0).then_some(()));
    let mut third = agent.connect();
    third.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(third.read(&mut [0; 1]).unwrap(), 0);
    assert!(agent.own("tallyd_connections_refused_total", "listener=\"tcp\"") >= 1.0);
}

#[test]
fn an_http_request_on_the_line_port_is_counted_and_closed() {
    let agent = Agent::start(&[]);
    for (method, count) in [("POST", 1.0), ("patch", 2.0), ("M-SEARCH", 3.0), ("!#$", 4.0)] {
        let mut stream = agent.connect();
        stream.write_all(format!("{method} /x HTTP/1.1\r\nHost: a\r\n\r\na:1|c\n").as_bytes()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
        assert_eq!(agent.own("tallyd_lines_rejected_total", "reason=\"http_request\""), count, "{method}");
    }
    assert_eq!(agent.metric("a"), None);
}

#[test]
fn http_says_what_it_does_not_take() {
    let agent = Agent::start(&["limits.body=1KiB", "limits.header_time=300ms"]);
    let (ingest, api) = (agent.address("ingest"), agent.address("api"));
    let post =
        |headers: &[(&str, &str)], body: &[u8]| http::request(ingest, "POST", "/ingest/metrics", headers, body).status;
    let json = ("Content-Type", "application/json");
    assert_eq!(post(&[("Content-Type", "text/html")], b"{}"), 415);
    assert_eq!(post(&[json], &[b' '; 2_000]), 413);
    assert_eq!(post(&[json, ("Host", "evil.example")], b"{}"), 403);
    assert_eq!(post(&[json, ("Origin", "http://evil.example")], b"{}"), 403);
    let get = |path: &str| http::request(api, "GET", path, &[], b"").status;
    assert_eq!(get("/nowhere"), 404);
    assert_eq!(get("/data/metrics/unknown"), 404);
    assert_eq!(get("/data/metrics?limit=1000000"), 400);
    assert_eq!(get("/data/metrics?limit=x"), 400);
    assert_eq!(get(&format!("/{}", "x".repeat(5_000))), 414);
    let long = "x".repeat(20_000);
    assert_eq!(http::request(api, "GET", "/metrics", &[("X-Long", &long)], b"").status, 431);
    assert_eq!(http::request(api, "PUT", "/data/metrics", &[], b"").status, 405);
    assert_eq!(http::raw(api, b"GET / HTTP/1.1\r\nHost: lo").status, 408);
    let problem = http::request(api, "GET", "/nowhere", &[], b"");
    assert_eq!(problem.header("content-type"), Some("application/problem+json"));
    assert_eq!(problem.json()["status"], 404);
}

#[test]
fn health_and_readiness_are_told() {
    let agent = Agent::start(&[]);
    assert_eq!(
        http::request(agent.address("ingest"), "GET", "/health/ping", &[], b"").text(),
        "pong (metrics-ingest service)"
    );
    assert_eq!(agent.get("/health/ping").text(), "pong (metrics-api service)");
    assert_eq!((agent.get("/-/healthy").status, agent.get("/-/ready").status), (200, 200));
    let ready = agent.get("/-/ready").text();
    assert!(ready.contains(&agent.address("udp").to_string()), "{ready}");
}

/// What grammars are made of.
const NOISE: &[u8] = b"a1:|@#,\n\0{}[]\"\xff._e{sc\\";

/// Bytes of every kind on every listener: the agent stays up and counts on.
#[test]
fn noise_ends_nothing() {
    let agent = Agent::start(&[]);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..300 {
        let length = (next() % 400) as usize;
        let noise: Vec<u8> = (0..length).map(|_| NOISE[next() as usize % NOISE.len()]).collect();
        agent.datagram(&noise);
        drop(agent.connect().write_all(&noise));
        agent.ingest(&noise);
    }
    agent.datagram("alive:1|c");
    agent.wait_for("alive", "value", 1);
}
