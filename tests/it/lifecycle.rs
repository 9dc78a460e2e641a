//! Start, stop, kill and reload.

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

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
    let complaint = format!("tallyd: --set: state_dir = {file:?}: there is a file in its place");
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

/// Posts counts of `under` until the agent is gone. Answers how many were acknowledged, and how many more may have been
/// accepted.
fn post_until_gone(address: std::net::SocketAddr, acknowledged: &AtomicU64) -> u64 {
    const BODY: &str = r#"{"name":"under","type":"COUNTER","value":1}"#;
    loop {
        let Ok(mut stream) = std::net::TcpStream::connect(address) else { return 0 };
        let request = format!(
            "POST /ingest/metrics HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        );
        let mut answer = String::new();
        if stream.write_all(request.as_bytes()).is_err() || stream.read_to_string(&mut answer).is_err() {
            return 1;
        }
        match answer.get(9..12) {
            Some("200") => acknowledged.fetch_add(1, Ordering::Relaxed),
            Some(_) => return 0,
            None => return 1,
        };
    }
}

/// Stops an agent by a signal under load of several clients; answers it started again, what was acknowledged, and how many
/// more may have been accepted.
fn stopped_under_load(agent: Agent, signal: &str, acknowledged: &AtomicU64) -> (Agent, u64) {
    let address = agent.address("ingest");
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(|| post_until_gone(address, acknowledged))).collect();
        let before = acknowledged.load(Ordering::Relaxed);
        until("the load", || (acknowledged.load(Ordering::Relaxed) > before + 50).then_some(()));
        let agent = agent.restart_after(signal);
        (agent, clients.into_iter().map(|client| client.join().unwrap()).sum())
    })
}

#[test]
fn sigterm_under_load_loses_nothing_that_was_acknowledged() {
    let acknowledged = AtomicU64::new(0);
    let mut agent = Agent::start(&[]);
    let mut unsure = 0;
    for _ in 0..3 {
        let (next, more) = stopped_under_load(agent, "TERM", &acknowledged);
        agent = next;
        unsure += more;
        let kept = agent.metric("under").unwrap()["value"].as_u64().unwrap();
        let sure = acknowledged.load(Ordering::Relaxed);
        assert!((sure..=sure + unsure).contains(&kept), "{kept} kept, {sure} acknowledged, {unsure} unanswered");
    }
}

#[test]
fn kill_9_under_load_leaves_whole_flushes() {
    let agent = Agent::start(&["flush.interval=50ms", "flush.window=1s"]);
    let both = r#"[{"name":"c","type":"COUNTER","value":1},{"name":"g","type":"GAUGE","value":"+1"},
        {"name":"t","type":"TIMER","value":2},{"name":"m","type":"METER","value":1}]"#;
    let mut agent = agent;
    let mut least = 0;
    for round in 1..=5 {
        assert_eq!(agent.ingest(both).status, 200);
        // One flush may be under way and another be waiting that have nothing of that.
        let flushes = agent.own("tallyd_flushes_total", "") + 3.0;
        for _ in 1..20 * round {
            assert_eq!(agent.ingest(both).status, 200);
        }
        until("a flush", || (agent.own("tallyd_flushes_total", "") >= flushes).then_some(()));
        agent = agent.restart_after("KILL");
        let of = |key: &str, field: &str| agent.metric(key).unwrap()[field].as_u64().unwrap();
        let counted = of("c", "value");
        assert_eq!(
            [of("g", "value"), of("t", "count"), of("m", "count")],
            [counted; 3],
            "one flush is one transaction"
        );
        assert!(counted > least, "{counted} after {least}");
        least = counted;
    }
}

#[test]
fn a_damaged_journal_is_moved_aside_and_its_records_are_read() {
    let agent = Agent::start(&[]);
    agent.datagram("kept:5|c\nlevel:3|g");
    agent.wait_for("kept", "value", 5);
    let agent = agent.restart_with("TERM", |state| {
        let journal = std::fs::OpenOptions::new().write(true).open(state.join("journal.redb")).unwrap();
        journal.write_all_at(&[0xff; 512], 0).unwrap();
    });
    let files =
        std::fs::read_dir(agent.state_dir()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let files: Vec<_> = files.collect();
    assert!(files.iter().any(|file| file.starts_with("journal.redb.damaged-")), "{files:?}");
    assert!(agent.own("tallyd_store_errors_total", "moved_aside") == 1.0);
    agent.datagram("kept:2|c\nlevel:+1|g");
    agent.wait_for("kept", "value", 7);
    agent.wait_for("level", "value", 4);
}

#[test]
fn an_idle_agent_writes_nothing() {
    let agent = Agent::start(&["flush.interval=50ms", "flush.window=1s"]);
    agent.datagram("a:1|c");
    agent.wait_for("a", "value", 1);
    let flushes = || agent.own("tallyd_flushes_total", "");
    let settled = flushes() + 3.0;
    until("the sample to be flushed", || (flushes() >= settled).then_some(()));
    let journal = agent.state_dir().join("journal.redb");
    let written = || std::fs::metadata(&journal).unwrap().modified().unwrap();
    let before = written();
    let later = flushes() + 10.0;
    until("more flushes", || (flushes() >= later).then_some(()));
    assert_eq!(written(), before);
}

#[test]
fn the_journal_does_not_grow_with_time() {
    let agent = Agent::start(&["flush.interval=50ms", "flush.window=1s"]);
    let names: Vec<_> = (0..500).map(|i| format!("grows.{i}:1|c")).collect();
    let flushes = || agent.own("tallyd_flushes_total", "");
    let size = || std::fs::metadata(agent.state_dir().join("journal.redb")).unwrap().len();
    let rewrite = |times: u32| {
        for _ in 0..times {
            let before = flushes();
            names.chunks(40).for_each(|lines| agent.datagram(lines.join("\n")));
            until("a flush", || (flushes() > before).then_some(()));
        }
        size()
    };
    let (early, late) = (rewrite(10), rewrite(60));
    assert!(late <= 2 * early, "{early} bytes after 10 flushes, {late} after 70");
}

#[test]
fn a_series_deleted_while_it_is_idle_does_not_come_back() {
    let agent = Agent::start(&["flush.interval=100ms", "flush.window=1s", "limits.idle=300ms"]);
    for round in 1..=3 {
        agent.datagram("idle:5|c");
        agent.wait_for("idle", "value", 5);
        until("it to expire", || (agent.own("tallyd_series_expired_total", "") >= f64::from(round)).then_some(()));
        assert_eq!(agent.delete("/data/metrics/idle").status, 200);
        assert_eq!(agent.metric("idle"), None);
    }
    agent.datagram("idle:2|c");
    agent.wait_for("idle", "value", 2);
    let agent = agent.restart_after("TERM");
    assert!(same(&agent.metric("idle").unwrap()["value"], &json!(2)));
}
