//! `GET /data/sources`: who sends, by which way, what becomes of it, and what happens past `limits.sources`.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};

use serde_json::{Value, json};

use crate::agent::{Agent, PATIENCE, until};

/// All rows, those of most lines first.
fn rows(agent: &Agent) -> Vec<Value> {
    let answer = agent.get("/data/sources");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let rows = answer.json().as_array().unwrap().clone();
    assert_eq!(answer.header("Total-Count"), Some(rows.len().to_string().as_str()));
    rows
}

fn row(rows: &[Value], listener: &str, source: &str) -> Option<Value> {
    rows.iter().find(|row| row["listener"] == listener && row["source"] == source).cloned()
}

/// Waits until so many lines of a source were read, and gives its row.
#[track_caller]
fn of(agent: &Agent, listener: &str, source: &str, lines: u64) -> Value {
    until(&format!("{lines} lines of {source} by {listener}"), || {
        row(&rows(agent), listener, source).filter(|row| row["lines"] == lines)
    })
}

/// The sum of a figure over all sources of a listener.
fn sum(rows: &[Value], listener: &str, figure: &str) -> u64 {
    rows.iter().filter(|row| row["listener"] == listener).map(|row| row[figure].as_u64().unwrap()).sum()
}

/// The figures of all sources are those of their listener.
fn assert_sums(agent: &Agent, listener: &str) {
    let rows = rows(agent);
    for (figure, name) in [
        ("lines", "tallyd_lines_total"),
        ("rejected", "tallyd_lines_rejected_total"),
        // A worker publishes these each second by itself.
        ("bytes", "tallyd_received_bytes_total"),
    ] {
        let sum = sum(&rows, listener, figure);
        until(&format!("{name} of {listener} to be {sum}"), || {
            (agent.own(name, &format!("listener=\"{listener}\"")) == sum as f64).then_some(())
        });
    }
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

fn from(address: &str) -> UdpSocket {
    UdpSocket::bind((address, 0)).unwrap()
}

/// This process, as the kernel tells the agent.
fn this_process() -> (u32, u32, String) {
    let (pid, uid) = (std::process::id(), std::fs::metadata("/proc/self").unwrap().uid());
    (pid, uid, format!("pid {pid}, uid {uid}"))
}

#[test]
fn two_hosts_are_told_apart_and_their_ports_are_not() {
    let begun_ms = now_ms();
    let agent = Agent::start(&["listen.workers=1"]);
    let to = agent.address("udp");
    from("127.0.0.1").send_to(b"a:1|c\nb:1|c\nbad", to).unwrap();
    from("127.0.0.1").send_to(b"a:1|c\nworse:1|zz\nmixed:1|c:x|c", to).unwrap();
    let other = from("127.0.0.2");
    other.send_to(b"c:1|c", to).unwrap();
    let first = of(&agent, "udp", "127.0.0.1", 6);
    assert_eq!((&first["messages"], &first["bytes"]), (&json!(2), &json!(15 + 30)), "{first}");
    assert_eq!((&first["rejected"], &first["seriesCreated"]), (&json!(2), &json!(3)), "{first}");
    assert_eq!(first["reasons"], json!({"no_value": 1, "unknown_type": 1}));
    let last = &first["lastReject"];
    // A part of a line that was accepted for its other part.
    assert_eq!((&last["reason"], &last["line"]), (&json!("bad_value"), &json!("mixed:1|c:x|c")), "{first}");
    assert!(agent.get("/data/rejects").json().as_array().unwrap().contains(last), "as there");
    let second = of(&agent, "udp", "127.0.0.2", 1);
    assert_eq!((&second["rejected"], &second["reasons"], &second["lastReject"]), (&json!(0), &json!({}), &Value::Null));
    let times = ["firstSeen", "lastSeen"].map(|time| first[time].as_u64().unwrap());
    assert!(begun_ms <= times[0] && times[0] <= times[1] && times[1] <= now_ms(), "{begun_ms} {times:?}");
    assert_eq!(rows(&agent).len(), 2);
    let page = agent.get("/data/sources?limit=1");
    assert_eq!((page.json()[0]["source"].as_str(), page.header("Total-Count")), (Some("127.0.0.1"), Some("2")));
    assert_eq!(agent.get("/data/sources?limit=0").status, 400);
    assert_sums(&agent, "udp");
}

#[test]
fn a_source_is_blamed_for_new_series_once() {
    let agent = Agent::start(&["listen.workers=1"]);
    let to = agent.address("udp");
    from("127.0.0.1").send_to(b"a:1|c\nb:1|c", to).unwrap();
    of(&agent, "udp", "127.0.0.1", 2);
    from("127.0.0.2").send_to(b"a:1|c\nb:1|c\nc:1|c", to).unwrap();
    assert_eq!(of(&agent, "udp", "127.0.0.2", 3)["seriesCreated"], 1);
    // What the journal knows is not new after a restart, whoever sends it first.
    agent.wait_for("c", "value", 1);
    let agent = agent.restart_after("TERM");
    assert_eq!(rows(&agent), Vec::<Value>::new(), "from the start of the process");
    from("127.0.0.2").send_to(b"a:1|c\nnew:1|c", agent.address("udp")).unwrap();
    assert_eq!(of(&agent, "udp", "127.0.0.2", 2)["seriesCreated"], 1);
}

#[test]
fn unix_peers_are_known_by_user_and_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let setting = |kind: &str| format!("listen.{kind}={}", path(kind).display());
    let agent = Agent::start(&[&setting("unixgram"), &setting("unix")]);
    let datagrams = UnixDatagram::unbound().unwrap();
    datagrams.send_to(b"a:1|c\nbad", path("unixgram")).unwrap();
    let mut stream = UnixStream::connect(path("unix")).unwrap();
    stream.write_all(b"\x05\0\0\0b:1|c\x05\0\0\0c:1|c").unwrap();
    let (pid, uid, name) = this_process();
    for (listener, lines, messages, bytes, rejected) in [("unixgram", 2, 1, 9, 1), ("unix", 2, 2, 18, 0)] {
        let row = of(&agent, listener, &name, lines);
        assert_eq!((&row["pid"], &row["uid"]), (&json!(pid), &json!(uid)), "{row}");
        assert_eq!((&row["messages"], &row["bytes"]), (&json!(messages), &json!(bytes)), "{row}");
        assert_eq!(row["rejected"], rejected, "{row}");
        assert_sums(&agent, listener);
    }
    let rejects = agent.get("/data/rejects").json();
    assert_eq!(rejects[0]["source"], name, "{rejects}");
    assert_eq!(row(&rows(&agent), "unixgram", &name).unwrap()["lastReject"], rejects[0]);
    // Another process is another source.
    let to = format!("unixgram://{}", path("unixgram").display());
    let mut child = crate::agent::tallyd().args(["send", "--to", &to, "d:1|c"]).spawn().unwrap();
    let name = format!("pid {}, uid {uid}", child.id());
    assert!(child.wait().unwrap().success());
    of(&agent, "unixgram", &name, 1);
}

#[test]
fn tcp_and_http_have_their_sources_too() {
    let agent = Agent::start(&[]);
    let mut stream = agent.connect();
    stream.write_all(b"a:1|c\n\nbad\nlast:1|c").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let tcp = of(&agent, "tcp", "127.0.0.1", 3);
    assert_eq!((&tcp["messages"], &tcp["bytes"], &tcp["rejected"]), (&json!(4), &json!(19), &json!(1)), "{tcp}");
    let body = r#"[{"name":"a","type":"COUNTER","value":1},{"name":"b","type":"COUNTER","value":1},{"name":"c"}]"#;
    assert_eq!(agent.ingest(body).status, 200);
    // What was answered is in the next read.
    let http = row(&rows(&agent), "http", "127.0.0.1").unwrap();
    assert_eq!(
        (&http["messages"], &http["lines"], &http["bytes"]),
        (&json!(1), &json!(3), &json!(body.len())),
        "{http}"
    );
    assert_eq!((&http["rejected"], &http["seriesCreated"]), (&json!(1), &json!(1)), "a is known by TCP: {http}");
    ["tcp", "http"].iter().for_each(|listener| assert_sums(&agent, listener));
}

#[test]
fn datagrams_that_are_too_long_are_put_down_to_their_sender() {
    let agent = Agent::start(&["limits.datagram=10B"]);
    let sender = from("127.0.0.2");
    sender.send_to(b"long:1|c\nlong:1|c", agent.address("udp")).unwrap();
    sender.send_to(b"a:1|c", agent.address("udp")).unwrap();
    let row = of(&agent, "udp", "127.0.0.2", 1);
    assert_eq!((&row["messages"], &row["truncated"], &row["bytes"]), (&json!(2), &json!(1), &json!(15)), "{row}");
    assert_sums(&agent, "udp");
}

#[test]
fn sources_beyond_the_limit_are_counted_under_other_of_their_listener() {
    let agent = Agent::start(&["limits.sources=2", "listen.workers=1"]);
    let to = agent.address("udp");
    let [one, two, three, four] = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"].map(from);
    for (sender, name) in [(&one, "127.0.0.1"), (&two, "127.0.0.2")] {
        sender.send_to(b"a:1|c", to).unwrap();
        of(&agent, "udp", name, 1);
    }
    for sender in [&three, &four, &three, &two] {
        sender.send_to(b"a:1|c\nbad", to).unwrap();
    }
    let other = of(&agent, "udp", "other", 6);
    assert_eq!((&other["messages"], &other["rejected"]), (&json!(3), &json!(3)), "{other}");
    of(&agent, "udp", "127.0.0.2", 3);
    agent.ingest(r#"{"name":"a","type":"COUNTER","value":1}"#);
    assert_eq!(row(&rows(&agent), "http", "other").unwrap()["lines"], 1);
    let places: Vec<_> = rows(&agent).iter().map(|row| (row["source"].clone(), row["lines"].clone())).collect();
    let want = [("other", 6), ("127.0.0.2", 3), ("127.0.0.1", 1), ("other", 1)];
    assert_eq!(places, want.map(|(source, lines)| (json!(source), json!(lines))), "most lines first");
    assert_eq!(agent.own("tallyd_sources_other_total", ""), 7.0);
    assert_eq!(agent.own("tallyd_sources_forgotten_total", ""), 0.0);
    ["udp", "http"].iter().for_each(|listener| assert_sums(&agent, listener));
}

#[test]
fn a_source_that_is_idle_makes_way_for_a_new_one() {
    let agent = Agent::start(&["limits.sources=1", "limits.idle=200ms", "listen.workers=1"]);
    let to = agent.address("udp");
    from("127.0.0.1").send_to(b"a:1|c\nbad", to).unwrap();
    of(&agent, "udp", "127.0.0.1", 2);
    let new = from("127.0.0.2");
    until("the new one to have the place of the idle one", || {
        new.send_to(b"a:1|c", to).unwrap();
        row(&rows(&agent), "udp", "127.0.0.2")
    });
    let rows = rows(&agent);
    let other = row(&rows, "udp", "other").unwrap();
    assert_eq!((row(&rows, "udp", "127.0.0.1"), &other["rejected"]), (None, &json!(1)), "{rows:?}");
    assert_eq!(agent.own("tallyd_sources_forgotten_total", ""), 1.0);
    assert_sums(&agent, "udp");
}

/// Many senders by all workers, and readers beside them.
#[test]
fn what_all_sources_sent_is_what_their_listener_counted() {
    let agent = Agent::start(&["limits.sources=5", "flush.interval=100ms", "flush.window=1s"]);
    std::thread::scope(|scope| {
        for sender in 1..=8 {
            let to = agent.address("udp");
            scope.spawn(move || {
                let socket = from(&format!("127.0.1.{sender}"));
                for n in 0..500 {
                    socket.send_to(format!("s{n}:1|c\nall:1|c\nno line").as_bytes(), to).unwrap();
                }
            });
        }
        for _ in 0..50 {
            rows(&agent);
        }
    });
    until("every datagram to be read or dropped", || {
        let read = agent.own("tallyd_datagrams_total", "listener=\"udp\"");
        (read + agent.own("tallyd_kernel_drops_total", "") == 4_000.0).then_some(())
    });
    assert_sums(&agent, "udp");
    let rows = rows(&agent);
    assert_eq!(rows.len(), 6, "five and the others: {rows:?}");
    assert_eq!(sum(&rows, "udp", "messages") as f64, agent.own("tallyd_datagrams_total", "listener=\"udp\""));
    assert_eq!(sum(&rows, "udp", "rejected"), sum(&rows, "udp", "messages"));
    let other = row(&rows, "udp", "other").unwrap()["lines"].as_f64().unwrap();
    assert_eq!(agent.own("tallyd_sources_other_total", ""), other);
}
