//! Lines and records in, figures out: every kind by every way.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::agent::{Agent, same, until};

#[test]
fn tags_are_sent_in_json_as_they_are_shown() {
    let agent = Agent::start(&[]);
    agent.datagram("a:1|c|#bare,k:v");
    agent.wait_for("a;bare;k=v", "value", 1);
    let tags = agent.metric("a;bare;k=v").unwrap()["tags"].clone();
    assert_eq!(tags, json!({"bare": "", "k": "v"}));
    agent.ingest(json!({"name": "a", "type": "COUNTER", "value": 2, "tags": tags}).to_string());
    assert!(same(&agent.metric("a;bare;k=v").unwrap()["value"], &json!(3)), "one series by both ways");
}

/// The seed system's two curl commands, to the letter but for the ports.
#[test]
fn the_seeds_curl_examples_work() {
    let agent = Agent::start(&[]);
    let post = format!(
        "curl -s -X POST http://localhost:{}/ingest/metrics -H 'Content-Type: application/json' \
         -d '{{\"level\":\"application\",\"name\":\"server.get.timer\",\"type\":\"TIMER\",\"value\":1}}'",
        agent.address("ingest").port()
    );
    assert_eq!(shell(&post), "Record server.get.timer UPDATED");
    let get =
        format!("curl -s http://localhost:{}/data/metrics/application.server.get.timer", agent.address("api").port());
    let metric: Value = serde_json::from_str(&shell(&get)).unwrap();
    for (field, want) in [
        ("level", json!("application")),
        ("name", json!("server.get.timer")),
        ("type", json!("TIMER")),
        ("count", json!(1)),
        ("min", json!(1)),
        ("max", json!(1)),
        ("mean", json!(1)),
        ("value", json!(1)),
    ] {
        assert!(same(&metric[field], &want), "{field}: {metric}");
    }
}

fn shell(command: &str) -> String {
    let output = Command::new("bash").args(["-c", command]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_line_sent_with_nc_is_read_back() {
    let agent = Agent::start(&[]);
    shell(&format!("echo 'page.views:3|c' | nc -u -q0 127.0.0.1 {}", agent.address("udp").port()));
    agent.wait_for("page.views", "value", 3);
    shell(&format!("echo 'page.views:4|c' > /dev/udp/127.0.0.1/{}", agent.address("udp").port()));
    agent.wait_for("page.views", "value", 7);
}

#[test]
fn every_kind_is_kept_as_it_should_be() {
    let agent = Agent::start(&[]);
    agent.datagram("c:5|c\nc:-2|c\nc:1|c|@0.1\ng:10|g\ng:-3|g\ng:+1|g\nt:1:2:3:10|ms\nh:5|h|#k:v\nd:7|d\nu:a|s\nu:b|s\nu:a|s\nm:60|m");
    agent.wait_for("m", "count", 60);
    let read = |key: &str| agent.metric(key).unwrap_or_else(|| panic!("no {key}"));
    let counter = read("c");
    for (field, want) in [("value", 13), ("increments", 15), ("decrements", 2)] {
        assert!(same(&counter[field], &json!(want)), "{field}: {counter}");
    }
    assert!(same(&read("g")["value"], &json!(8)));
    let timer = read("t");
    for (field, want) in [("count", 4.0), ("sum", 16.0), ("min", 1.0), ("max", 10.0), ("mean", 4.0), ("value", 10.0)] {
        assert!(same(&timer[field], &json!(want)), "{field}: {timer}");
    }
    assert!(same(&timer["stddev"], &json!(3.535_533_905_932_737_8)), "{timer}");
    let histogram = read("h;k=v");
    assert_eq!((&histogram["type"], &histogram["tags"]), (&json!("HISTOGRAM"), &json!({"k": "v"})));
    assert!(same(&histogram["quantiles"]["0.99"], &json!(5)), "{histogram}");
    assert_eq!(read("d")["type"], "DISTRIBUTION");
    assert!(same(&read("u")["value"], &json!(2)));
    assert!(read("m")["meanRate"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_is_answered_200_is_in_the_next_read() {
    let agent = Agent::start(&[]);
    for i in 1..=50 {
        let answer = agent.ingest(r#"{"name":"hits","type":"COUNTER","value":1}"#);
        assert_eq!((answer.status, answer.text().as_str()), (200, "Record hits UPDATED"));
        assert!(same(&agent.metric("hits").unwrap()["value"], &json!(i)), "after {i}");
    }
}

#[test]
fn arrays_and_ndjson_count_their_records() {
    let agent = Agent::start(&[]);
    let answer = agent.ingest(r#"[{"name":"a","type":"COUNTER","value":1},{"name":"","type":"COUNTER","value":1},{"name":"b","type":"GAUGE","value":"+2"}]"#);
    let json = answer.json();
    assert_eq!(answer.status, 200, "{json}");
    assert_eq!((&json["accepted"], &json["rejected"]), (&json!(2), &json!(1)));
    assert_eq!((&json["errors"][0]["index"], &json["errors"][0]["reason"]), (&json!(1), &json!("empty_name")));
    assert_eq!(agent.ingest("[]").json(), json!({"accepted": 0, "rejected": 0, "errors": []}));
    let lines = "{\"name\":\"n\",\"type\":\"c\",\"value\":1}\n{\"name\":\"n\",\"type\":\"c\",\"value\":2}\n";
    let headers = [("Content-Type", "application/x-ndjson")];
    let answer = crate::http::request(agent.address("ingest"), "POST", "/ingest/metrics", &headers, lines.as_bytes());
    assert_eq!(answer.json()["accepted"], 2);
    assert!(same(&agent.metric("n").unwrap()["value"], &json!(3)));
}

#[test]
fn a_bad_line_of_ndjson_does_not_affect_its_neighbours() {
    let agent = Agent::start(&[]);
    let body = "{\"name\":\"n\",\"type\":\"c\",\"value\":1}\nbroken\n{\"name\":\"n\",\"type\":\"c\",\"value\":2}\n{\"name\":\"n\",\"ty";
    let headers = [("Content-Type", "application/x-ndjson")];
    let answer = crate::http::request(agent.address("ingest"), "POST", "/ingest/metrics", &headers, body.as_bytes());
    let errors = json!([{"index": 1, "reason": "bad_json"}, {"index": 3, "reason": "bad_json"}]);
    assert_eq!((answer.status, answer.json()), (200, json!({"accepted": 2, "rejected": 2, "errors": errors})));
    assert!(same(&agent.metric("n").unwrap()["value"], &json!(3)));
}

#[test]
fn json_lines_and_statsd_lines_share_a_packet() {
    let agent = Agent::start(&[]);
    agent.datagram("a:1|c\n{\"level\":\"a\",\"name\":\"b\",\"type\":\"COUNTER\",\"value\":2}\na:2|c\n");
    agent.wait_for("a", "value", 3);
    agent.wait_for("a.b", "value", 2);
}

#[test]
fn tcp_lines_may_be_cut_anywhere_and_the_last_needs_no_newline() {
    let agent = Agent::start(&[]);
    let script = "ünï:1|c|#k:ü\r\nb:2|c\nlast:3|c".as_bytes();
    for cut in 0..=script.len() {
        let mut stream = agent.connect();
        stream.set_nodelay(true).unwrap();
        stream.write_all(&script[..cut]).unwrap();
        stream.write_all(&script[cut..]).unwrap();
    }
    let times = script.len() + 1;
    agent.wait_for("last", "value", 3 * times);
    agent.wait_for("b", "value", 2 * times);
    agent.wait_for("n;k=%C3%BC", "value", times);
}

#[test]
fn a_bad_line_has_a_reason_and_its_neighbours_count() {
    let agent = Agent::start(&[]);
    agent.datagram("good:1|c\nbad\nworse:1|zz\ngood:x|c\n:1|c\ngood:1|c|@7\ngood:nan|g\ngood:2|c");
    agent.wait_for("good", "value", 3);
    for reason in ["no_value", "unknown_type", "bad_value", "empty_name", "bad_sample_rate", "non_finite"] {
        let counted = agent.own("tallyd_lines_rejected_total", &format!("reason=\"{reason}\""));
        assert!((counted - 1.0).abs() < 1e-9, "{reason}: {counted}");
    }
    let rejects = agent.get("/data/rejects").json();
    assert_eq!(rejects.as_array().unwrap().len(), 6, "{rejects}");
    assert!(rejects.to_string().contains("127.0.0.1"), "{rejects}");
    let explained = rejects.as_array().unwrap().iter().find(|reject| reject["reason"] == "unknown_type").unwrap();
    assert_eq!((&explained["line"], &explained["column"]), (&json!("worse:1|zz"), &json!(9)), "as `explain` counts");
}

#[test]
fn bad_json_gets_400_with_the_place() {
    let agent = Agent::start(&[]);
    let answer = agent.ingest("{\"name\":\"b\",\n\"type\":}");
    assert_eq!(answer.status, 400);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    let problem = answer.json();
    assert_eq!(problem["reason"], "bad_json", "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("line 2"), "{problem}");
    for empty in ["", "{}"] {
        let problem = agent.ingest(empty).json();
        assert_eq!((&problem["status"], &problem["detail"]), (&json!(400), &json!("ERROR: empty input")), "{empty:?}");
    }
}

#[test]
fn a_metric_that_is_deleted_starts_again_from_nothing() {
    let agent = Agent::start(&[]);
    agent.ingest(r#"{"name":"gone","type":"COUNTER","value":5}"#);
    assert!(agent.metric("gone").is_some());
    let answer = agent.delete("/data/metrics/gone");
    assert_eq!((answer.status, answer.text().as_str()), (200, "Record gone DELETED"));
    assert_eq!(agent.metric("gone"), None);
    assert_eq!(agent.delete("/data/metrics/gone").status, 404);
    agent.ingest(r#"{"name":"gone","type":"COUNTER","value":2}"#);
    assert!(same(&agent.metric("gone").unwrap()["value"], &json!(2)));
    let agent = agent.restart_after("KILL");
    let value = agent.metric("gone").map(|metric| metric["value"].clone());
    assert!(value.is_none_or(|value| same(&value, &json!(2))), "what was deleted came back");
}

#[test]
fn lists_are_paged_in_order() {
    let agent = Agent::start(&[]);
    let records: Vec<_> =
        (0..25).map(|i| json!({"name": format!("list.{i:02}"), "type": "GAUGE", "value": i})).collect();
    agent.ingest(Value::from(records).to_string());
    let (mut path, mut names) = ("/data/metrics?match=list.*&limit=10".to_owned(), Vec::new());
    loop {
        let answer = agent.get(&path);
        for metric in answer.json().as_array().unwrap() {
            names.push(format!("{}.{}", metric["level"].as_str().unwrap(), metric["name"].as_str().unwrap()));
        }
        let Some(link) = answer.header("link") else { break };
        let next = link.split(['<', '>']).nth(1).unwrap();
        path = next.find("/data").map_or_else(|| next.to_owned(), |at| next[at..].to_owned());
    }
    assert_eq!(names, (0..25).map(|i| format!("list.{i:02}")).collect::<Vec<_>>());
}

#[test]
fn the_last_events_and_service_checks_are_kept() {
    let agent = Agent::start(&[]);
    agent.datagram("_e{5,13}:start|it\\nhas begun|h:web1|t:success|#env:prod,a\n_sc|db.up|2|h:db1|m:no answer\na:1|c");
    agent.wait_for("a", "value", 1);
    let events = agent.get("/data/events").json();
    let event = &events[0];
    assert_eq!(events.as_array().unwrap().len(), 1);
    assert_eq!((&event["title"], &event["text"]), (&json!("start"), &json!("it\nhas begun")));
    assert_eq!((&event["host"], &event["alert_type"]), (&json!("web1"), &json!("success")));
    assert_eq!((&event["tags"], &event["listener"]), (&json!(["a", "env:prod"]), &json!("udp")));
    assert!(event["time"].as_u64().unwrap() > 1_700_000_000_000 && event["source"].is_string(), "{event}");
    let checks = agent.get("/data/checks").json();
    assert_eq!((&checks[0]["name"], &checks[0]["status"]), (&json!("db.up"), &json!(2)));
    assert_eq!(checks[0]["message"], "no answer");
    assert_eq!((agent.own("tallyd_events_total", "udp"), agent.own("tallyd_service_checks_total", "udp")), (1.0, 1.0));
    for number in 0..150 {
        agent.connect().write_all(format!("_sc|check{number}|0\n").as_bytes()).unwrap();
    }
    until("all to be counted", || (agent.own("tallyd_service_checks_total", "tcp") == 150.0).then_some(()));
    assert_eq!(agent.get("/data/checks").json().as_array().unwrap().len(), 100);
}

/// A counter and a timer that say when they were taken are in the window of that time, closed or not.
#[test]
fn a_timestamp_chooses_the_window() {
    let agent = Agent::start(&["flush.interval=500ms", "flush.window=30s"]);
    let now_ms = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    // So that no window begins or ends within the test: what comes at once with a window may count in the one before.
    until("the midst of a window", || (1_000..20_000).contains(&(now_ms() % 30_000)).then_some(()));
    let before = now_ms() / 30_000 * 30 - 1;
    agent.datagram(format!("late:5|c|T{before}\nlate:2|c\nold:1|c|T1"));
    agent.ingest(format!(r#"{{"name":"t","type":"TIMER","value":8,"timestamp":{before}}}"#));
    agent.wait_for("old", "value", 1);
    let late = agent.metric("late").unwrap();
    assert_eq!((&late["value"], &late["window"]["count"]), (&json!(7), &json!(1)), "{late}");
    assert_eq!(late["window"]["start"], (before + 1 - 30) * 1_000);
    assert_eq!(agent.metric("t").unwrap()["window"]["max"], 8);
    assert_eq!(agent.own("tallyd_timestamps_unplaced_total", ""), 1.0);
}
