//! Configuration, `check`, `explain` and `send` through the executable.

use std::io::Write;
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::agent::{Agent, tallyd};

fn run(arguments: &[&str], environment: &[(&str, &str)], input: &str) -> Output {
    let mut child = tallyd()
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that does not read its input may have ended already.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tallyd.toml");
    std::fs::write(&file, "[listen]\nudp = []\nrecieve_buffer = \"1MiB\"\n").unwrap();
    for command in ["check", "run"] {
        let output = run(&[command, "--config", file.to_str().unwrap()], &[], "");
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{stderr}");
        for part in ["tallyd.toml:3", "recieve_buffer", "receive_buffer"] {
            assert!(stderr.contains(part), "{command}: {part} in {stderr}");
        }
    }
}

#[test]
fn exit_codes_follow_sysexits() {
    for (arguments, environment, code, part) in [
        (&["check", "--config", "/nonexistent/tallyd.toml"][..], &[][..], 66, "/nonexistent/tallyd.toml"),
        (&["--no-such-flag"][..], &[][..], 2, "--no-such-flag"),
        (&["check", "--set", "flush.interval=3s"][..], &[][..], 78, "must divide the window"),
        (&["check", "--set", "http.api=0.0.0.0:7000"][..], &[][..], 78, "http.insecure"),
        (&["check"][..], &[("TALLYD_LISTEN__UPD", "x")][..], 78, "TALLYD_LISTEN__UPD"),
        (&["check"][..], &[("STORE", "NOWHERE")][..], 78, "STORE"),
        (&["check"][..], &[("INGEST_PORT", "x")][..], 78, "INGEST_PORT"),
        (&["explain", "a:1"][..], &[][..], 65, "missing_type"),
    ] {
        let output = run(arguments, environment, "");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?} {environment:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {part} in {said}");
    }
}

#[test]
fn the_printed_defaults_are_the_packaged_file() {
    let output = run(&["check", "--print-defaults"], &[], "");
    let packaged = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/tallyd.toml");
    assert_eq!(text(&output.stdout), std::fs::read_to_string(packaged).unwrap());
    assert_eq!(run(&["check", "--config", packaged], &[], "").status.code(), Some(0));
}

/// Every case of the line corpus through the executable.
#[test]
fn explain_reads_every_case_of_the_corpus() {
    let corpus = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/lines.jsonl")).unwrap();
    let (mut passed, mut wrong) = (0, Vec::new());
    for line in corpus.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        if case["config"]["framing"].is_string() || !case["chunks"].is_null() || !case["input_b64"].is_null() {
            continue; // framing belongs to the listeners, and bytes that are no UTF-8 to the parser's own tests
        }
        let got = explain(&case);
        match differs(&case, &got) {
            None => passed += 1,
            Some(how) => wrong.push(format!("{}: {how}\n  got {got}", case["id"])),
        }
    }
    assert!(wrong.is_empty(), "{passed} passed, but\n{}", wrong.join("\n"));
    assert!(passed > 180, "only {passed} cases");
}

fn explain(case: &Value) -> Value {
    let is_body = case["dialect"] == "json" && case["transport"].is_null();
    let mut arguments = vec!["explain".to_owned(), "--json".to_owned()];
    arguments.push(if is_body { "--body" } else { "--datagram" }.to_owned());
    for (key, value) in case["config"].as_object().into_iter().flatten() {
        arguments.extend(["--set".to_owned(), format!("protocol.{key}={value}")]);
    }
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let output = run(&words, &[], case["input"].as_str().unwrap());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{}: {error}: {output:?}", case["id"]))
}

fn differs(case: &Value, got: &Value) -> Option<String> {
    let none = Value::Array(Vec::new());
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let want = if case["error"].is_null() { list(&case["expect"]["metrics"]) } else { list(&case["expect_also"]) };
    let metrics = got["metrics"].as_array()?;
    if !case["expect"]["totals"].is_null() {
        return None;
    }
    if metrics.len() != want.len() {
        return Some(format!("{} metrics, not {}", metrics.len(), want.len()));
    }
    for (want, got) in want.iter().zip(metrics) {
        for (field, value) in want.as_object()? {
            let equal = serde_json::to_string(&got[field]).ok()? == serde_json::to_string(value).ok()?
                || as_numbers(&got[field]).is_some_and(|numbers| Some(numbers) == as_numbers(value));
            if !equal {
                return Some(format!("{field} is not {value}"));
            }
        }
    }
    let errors: Vec<_> = list(&got["errors"]).iter().map(|error| error["reason"].clone()).collect();
    let expected: Vec<_> = match case["error"].as_str() {
        Some(reason) => vec![Value::from(reason)],
        None => case["expect"]
            .get("errors")
            .unwrap_or(&none)
            .as_array()?
            .iter()
            .map(|error| error["reason"].clone())
            .collect(),
    };
    if errors != expected && case["expect_errors"].is_null() {
        return Some(format!("errors are not {expected:?}"));
    }
    for field in ["events", "service_checks"] {
        if list(&got[field]) != list(&case["expect"][field]) {
            return Some(format!("{field} differ"));
        }
    }
    let tag_errors = case["tag_errors"].as_u64().unwrap_or(0);
    (got["tag_errors"].as_u64() != Some(tag_errors)).then(|| format!("tag_errors is not {tag_errors}"))
}

fn as_numbers(value: &Value) -> Option<Vec<f64>> {
    match value {
        Value::Array(values) => values.iter().map(Value::as_f64).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            value.as_f64().map(|number| vec![number])
        }
    }
}

#[test]
fn send_delivers_over_udp_and_tcp() {
    let agent = Agent::start(&[]);
    for (scheme, listener) in [("udp", "udp"), ("tcp", "tcp")] {
        let to = format!("{scheme}://{}", agent.address(listener));
        let output = run(&["send", "--to", &to, "sent:1|c", "sent:2|c"], &[], "");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let output = run(&["send", "--to", &to], &[], "sent:3|c\nsent:4|c\n");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
    agent.wait_for("sent", "value", 20);
}

/// As a compose file passes on what is not set.
#[test]
fn empty_variables_set_nothing() {
    let names = [
        "INGEST_PORT",
        "API_PORT",
        "STORE",
        "REDIS_HOST",
        "REDIS_PORT",
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_TOPIC",
        "TALLYD_CONFIG",
        "TALLYD_STATE_DIR",
        "TALLYD_LIMITS__BODY",
        "TALLYD_STORE__REDIS__URL",
        "STATE_DIRECTORY",
    ];
    let output = run(&["check", "--print"], &names.map(|name| (name, "")), "");
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(printed.contains("state_dir = \"tallyd-data\"  # built in") && !printed.contains("# env"), "{printed}");
    let none = run(&["check", "--print"], &[("TALLYD_LISTEN__UDP", "")], "");
    assert!(text(&none.stdout).contains("udp = []  # environment TALLYD_LISTEN__UDP"), "an empty list is one");
}

#[test]
fn explain_says_what_prometheus_will_see() {
    for (line, shown) in [
        ("page-views.2:1|c|#Site.x:a\"b,le:1,flag", "page_views_2{Site_x=\"a\\\"b\",exported_le=\"1\"}"),
        ("1st:1|ms", "_1st"),
        ("tallyd_lines_total:1|c", "tallyd_lines_total_client"),
        ("m:1|m|#k:v", "m_total{k=\"v\"}\n  prometheus m_rate{k=\"v\"}"),
        (r#"{"level":"a","name":"b","type":"SET","value":"x"}"#, "a_b"),
    ] {
        let said = text(&run(&["explain", line], &[], "").stdout);
        assert!(said.contains(&format!("\n  prometheus {shown}\n")), "{line}: {said}");
    }
}

#[test]
fn the_seeds_environment_names_work() {
    let output = run(
        &["check", "--print"],
        &[
            ("INGEST_PORT", "18000"),
            ("API_PORT", "17000"),
            ("STORE", "REDIS"),
            ("REDIS_HOST", "127.0.0.9"),
            ("REDIS_PORT", "16379"),
        ],
        "",
    );
    let printed = text(&output.stdout);
    for part in ["127.0.0.1:18000", "[::1]:17000", "redis://127.0.0.9:16379", "kind = \"redis\""] {
        assert!(printed.contains(part), "{part} in {printed}");
    }
}

#[test]
fn explain_shows_a_short_line_whole_and_of_a_long_one_what_is_around_the_place() {
    let short = text(&run(&["explain", "servers.web1.load 12.5 1764000000"], &[], "").stdout);
    assert!(short.contains("\n  servers.web1.load 12.5 1764000000\n"), "{short}");
    let long = text(&run(&["explain", &format!("{}:x|c|#{}", "n".repeat(100), "t".repeat(100))], &[], "").stdout);
    assert!(long.contains(&format!("\n  {}:x|c|#{}\n", "n".repeat(29), "t".repeat(25))), "{long}");
}
