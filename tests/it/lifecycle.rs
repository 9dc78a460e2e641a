//! Start, stop, kill and reload.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use serde_json::json;

use crate::agent::{Agent, same, tallyd, until};

#[test]
fn what_was_flushed_survives_kill_9() {
    let agent = Agent::start(&["flush.interval=100ms", "flush.window=1s"]);
    agent.datagram("c:5|c\ng:10|g\nt:1:2|ms\nu:a|s\nm:3|m");
    agent.wait_for("m", "count", 3);
    until("a flush", || (agent.own("tallyd_flushes_total", "") >= 2.0).then_some(()));
    let agent = agent.restart_after("KILL");
    agent.datagram("c:2|c\ng:+1|g\nt:3|ms\nu:a|s\nu:b|s\nm:1|m");
    agent.wait_for("m", "count", 4);
    for (key, field, want) in
        [("c", "value", 7), ("g", "value", 11), ("t", "count", 3), ("t", "sum", 6), ("u", "value", 2)]
    {
        let metric = agent.metric(key).unwrap();
        assert!(same(&metric[field], &json!(want)), "{key}.{field}: {metric}");
    }
}

#[test]
fn sigterm_flushes_what_was_accepted_and_exits_0() {
    let agent = Agent::start(&["flush.interval=10s"]);
    agent.ingest(r#"{"name":"last","type":"COUNTER","value":42}"#);
    let agent = agent.restart_after("TERM");
    assert!(same(&agent.metric("last").unwrap()["value"], &json!(42)));
}

#[test]
fn both_stop_signals_exit_0() {
    for signal in ["TERM", "INT"] {
        let mut agent = Agent::start(&[]);
        agent.signal(signal);
        assert_eq!(agent.wait().code(), Some(0), "{signal}");
    }
}

#[test]
fn the_journal_is_the_owners_alone() {
    let agent = Agent::start(&[]);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&agent.state_dir()), 0o700);
    for file in std::fs::read_dir(agent.state_dir()).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
}

/// Runs an agent that must fail to start, and gives its exit code and what it wrote.
fn failure(settings: &[String]) -> (Option<i32>, String) {
    let mut command = tallyd();
    for setting in settings {
        command.args(["--set", setting]);
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Settings that leave nothing but the wrong one to complain about.
fn otherwise_free(directory: &std::path::Path) -> Vec<String> {
    let state = format!("state_dir={}", directory.join("state").display());
    let free = ["listen.udp=127.0.0.1:0", "listen.tcp=127.0.0.1:0", "http.ingest=127.0.0.1:0", "http.api=127.0.0.1:0"];
    std::iter::once(state).chain(free.map(str::to_owned)).collect()
}

#[test]
fn a_port_in_use_ends_the_start_with_one_line_and_69() {
    let agent = Agent::start(&[]);
    for (key, listener) in
        [("listen.udp", "udp"), ("listen.tcp", "tcp"), ("http.ingest", "ingest"), ("http.api", "api")]
    {
        let directory = tempfile::tempdir().unwrap();
        let mut settings = otherwise_free(directory.path());
        settings.push(format!("{key}={}", agent.address(listener)));
        let (code, stderr) = failure(&settings);
        assert_eq!(code, Some(69), "{key}: {stderr}");
        let complaint = format!("tallyd: {key} = \"{}\": in use; ", agent.address(listener));
        assert!(stderr.contains(&complaint), "{key}: {stderr}");
        let complaints = stderr.lines().filter(|line| line.starts_with("tallyd: ")).count();
        assert_eq!(complaints, 1, "{key}: {stderr}");
    }
}

#[test]
fn a_second_agent_on_the_same_state_directory_is_refused() {
    let agent = Agent::start(&[]);
    let mut settings = otherwise_free(agent.directory());
    settings[0] = format!("state_dir={}", agent.state_dir().display());
    let (code, stderr) = failure(&settings);
    assert_eq!(code, Some(69), "{stderr}");
    assert!(stderr.contains(&format!("tallyd: state_dir = {:?}: in use", agent.state_dir())), "{stderr}");
}

#[test]
fn a_state_directory_that_is_none_ends_the_start_with_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let mut settings = otherwise_free(directory.path());
    settings[0] = format!("state_dir={}", file.display());
    let (code, stderr) = failure(&settings);
    let complaint = format!("tallyd: state_dir: {}: ", file.display());
    assert!(code == Some(74) && stderr.starts_with(&complaint) && stderr.lines().count() == 1, "{code:?} {stderr}");
    settings[0] = "state_dir=".to_owned();
    let (code, stderr) = failure(&settings);
    assert_eq!((code, stderr.as_str()), (Some(78), "tallyd: --set: state_dir = \"\": no directory; name one\n"));
}

#[test]
fn sighup_reads_the_configuration_again() {
    let agent = Agent::start_with_file("[protocol]\nname_policy = \"etsy\"\n");
    agent.datagram("a b:1|c");
    agent.wait_for("a_b", "value", 1);
    agent.write_file("[protocol]\nname_policy = \"none\"\n");
    agent.signal("HUP");
    until("the new policy", || {
        agent.datagram("c d:1|c");
        agent.metric("c%20d")
    });
    agent.write_file("[protocol]\nname_policy = \"nonsense\"\n");
    agent.signal("HUP");
    until("the refusal", || agent.stderr().contains("nonsense").then_some(()));
    agent.datagram("e f:1|c");
    agent.wait_for("e%20f", "value", 1);
}

#[test]
fn idle_series_are_freed_and_go_on_when_they_return() {
    let agent = Agent::start(&["flush.interval=100ms", "flush.window=1s", "limits.idle=1s"]);
    agent.datagram("back:5|c");
    agent.wait_for("back", "value", 5);
    until("the series to expire", || (agent.own("tallyd_series_expired_total", "") >= 1.0).then_some(()));
    assert!(!agent.get("/metrics").text().contains("\nback "));
    assert!(same(&agent.metric("back").unwrap()["value"], &json!(5)), "the journal keeps it");
    agent.datagram("back:2|c");
    agent.wait_for("back", "value", 7);
}
