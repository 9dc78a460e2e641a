//! `tallyd bench` against a real agent: what it sends is what the agent counts, on every transport and under overload.

use serde_json::Value;

use crate::agent::{Agent, tallyd};

/// What a bench prints for these arguments, read back from the agent.
#[track_caller]
fn bench(agent: &Agent, to: &str, words: &[&str]) -> Value {
    let api = format!("http://{}", agent.address("api"));
    let output = tallyd().args(["bench", "--json", "--api", &api, "--to", to]).args(words).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && errors.is_empty(), "{}: {errors}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_modest_load_is_accepted_to_the_last_line_on_every_transport() {
    let directory = tempfile::tempdir().unwrap();
    let path = |kind: &str| directory.path().join(kind).display().to_string();
    let setting = |kind: &str| format!("listen.{kind}={}", path(kind));
    let agent = Agent::start(&[&setting("unixgram"), &setting("unix")]);
    let one = |kind: &str| {
        let to = match kind {
            "udp" | "tcp" => format!("{kind}://{}", agent.address(kind)),
            _ => format!("{kind}://{}", path(kind)),
        };
        let name = format!("of.{kind}");
        // So few datagrams that the smallest buffer a system grants holds all of them, however slow the agent is.
        let load = ["--name", &name, "--rate", "10000", "--lines", "3001", "--series", "50", "--tags", "2"];
        let report = bench(&agent, &to, &[&load[..], &["--senders", "3"]].concat());
        let counted = &report["agent"];
        assert_eq!((&report["to"], &report["lines"]), (&to.into(), &3_001.into()), "{report}");
        for (figure, want) in [("lines", 3_001), ("accepted", 3_001), ("rejected", 0), ("lost", 0)] {
            assert_eq!(counted[figure], want, "{kind} {figure}: {report}");
        }
        assert!(counted["accounted"] == true && counted["counters_agree"] == true, "{report}");
        assert!(counted["counters"] == report["counters"] && counted["kernel_drops"] == 0, "{report}");
        let datagrams = if ["udp", "unixgram"].contains(&kind) { &report["packets"] } else { &Value::from(0) };
        assert_eq!(&counted["datagrams"], datagrams, "{report}");
        assert!(counted["cpu_seconds"].as_f64().unwrap() > 0.0, "{report}");
    };
    // All at once: each has a listener and series of its own, and has to wait for its turn to read the scrape.
    std::thread::scope(|scope| {
        for kind in ["udp", "tcp", "unixgram", "unix"] {
            let one = &one;
            scope.spawn(move || one(kind));
        }
    });
    assert_eq!(agent.own("tallyd_series", ""), 4.0 * 50.0);
}

/// More than the agent can take: the kernel drops, and each packet and each line is in one count or the other.
#[test]
fn under_overload_every_packet_is_read_or_dropped_and_every_line_accepted_or_rejected() {
    overload(&[]);
}

/// The same where the kernel parts the packets.
#[test]
fn under_overload_every_segment_is_read_or_dropped() {
    overload(&["--segments", "64"]);
}

/// An agent that is sent more than it can take, a line a packet, and what became of that.
#[track_caller]
fn overloaded(settings: &[&str], more: &[&str]) -> (Agent, Value) {
    let agent = Agent::start(&[&["listen.receive_buffer=4KiB", "listen.workers=1"], settings].concat());
    let to = format!("udp://{}", agent.address("udp"));
    let load = ["--rate", "0", "--lines", "200000", "--packet", "1", "--mix", "c=1", "--time", "20s"];
    let report = bench(&agent, &to, &[&load, more].concat());
    (agent, report)
}

#[track_caller]
fn overload(more: &[&str]) {
    let (agent, report) = overloaded(&[], more);
    let counted = &report["agent"];
    let figure = |name: &str| counted[name].as_u64().unwrap();
    assert_eq!((&report["lines"], &report["packets"]), (&200_000.into(), &200_000.into()), "{report}");
    assert!(figure("kernel_drops") > 0, "{report}");
    assert_eq!(figure("datagrams") + figure("kernel_drops"), 200_000, "{report}");
    assert_eq!(figure("lines"), figure("accepted") + figure("rejected"), "{report}");
    assert_eq!((figure("lines"), figure("counters")), (figure("datagrams"), figure("accepted")), "{report}");
    assert_eq!(counted["lost"].as_i64(), Some(figure("kernel_drops") as i64), "{report}");
    // And so says the agent itself.
    assert_eq!(agent.own("tallyd_datagrams_total", "listener=\"udp\"") as u64, figure("datagrams"));
    assert_eq!(agent.own("tallyd_kernel_drops_total", "") as u64, figure("kernel_drops"));
}

/// Trains are read whole, one shorter than a segment at the end among them, in both families.
#[test]
fn with_gro_every_segment_is_read() {
    for host in ["127.0.0.1:0", "[::1]:0"] {
        let agent = Agent::start(&["listen.udp_gro=true", &format!("listen.udp={host}"), "limits.datagram=100B"]);
        let to = format!("udp://{}", agent.address("udp"));
        let load = ["--rate", "10000", "--lines", "3001", "--series", "50", "--packet", "1", "--segments", "64"];
        let report = bench(&agent, &to, &load);
        let counted = &report["agent"];
        assert!(counted["accounted"] == true && counted["counters_agree"] == true, "{report}");
        for (figure, want) in [("datagrams", 3_001), ("kernel_drops", 0), ("accepted", 3_001), ("lost", 0)] {
            assert_eq!(counted[figure], want, "{figure}: {report}");
        }
        assert_eq!(agent.own("tallyd_datagrams_truncated_total", ""), 0.0);
    }
}

/// The kernel counts a train that it drops as one, as the README says; what is read stays exact.
#[test]
fn with_gro_a_dropped_train_counts_as_one() {
    let (agent, report) = overloaded(&["listen.udp_gro=true"], &["--segments", "64"]);
    let counted = &report["agent"];
    let figure = |name: &str| counted[name].as_u64().unwrap();
    let (drops, lost) = (figure("kernel_drops"), 200_000 - figure("datagrams"));
    assert!(drops > 0 && drops < lost && lost <= 64 * drops, "{report}");
    assert_eq!((figure("lines"), figure("counters")), (figure("datagrams"), figure("accepted")), "{report}");
    assert_eq!(counted["lost"].as_i64(), Some(lost as i64), "{report}");
    assert_eq!(agent.own("tallyd_kernel_drops_total", "") as u64, drops);
}

/// By a Zipf law the agent is sent as much as evenly, and most of it is of few series.
#[test]
fn a_zipf_load_is_counted_to_the_last_line() {
    let agent = Agent::start(&[]);
    let to = format!("udp://{}", agent.address("udp"));
    let load = ["--zipf", "1.2", "--rate", "20000", "--lines", "5001", "--mix", "c=1", "--series", "100000"];
    let report = bench(&agent, &to, &load);
    let counted = &report["agent"];
    assert!(counted["accounted"] == true && counted["counters_agree"] == true, "{report}");
    assert_eq!((&counted["accepted"], &counted["counters"]), (&5_001.into(), &5_001.into()), "{report}");
    let first = agent.metric("bench.c.0").unwrap()["value"].as_f64().unwrap();
    assert!((500.0..2_500.0).contains(&first), "the first of 100,000 has a fifth of all: {first}");
    // Packets of up to 1,432 bytes, of which several are due each millisecond.
    let (calls, packets) = (report["calls"].as_u64().unwrap(), report["packets"].as_u64().unwrap());
    assert!(report["call"] == "sendmmsg" && calls > 0 && calls <= packets, "{report}");
    assert!(counted["resident_bytes"].as_u64().unwrap() > 1 << 20, "{report}");
}
