//! Nothing is lost or counted twice: what was sent is what is counted, whoever reads meanwhile.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::agent::{Agent, until};

/// Many senders, both listeners, readers beside them: the sums are exact.
#[test]
fn every_line_is_counted_once_under_concurrent_reads() {
    const SENDERS: u64 = 4;
    const DATAGRAMS: u64 = 2_000;
    let agent = Agent::start(&["flush.interval=100ms", "flush.window=1s"]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                scope.spawn({
                    let agent = &agent;
                    move || send(agent, sender, DATAGRAMS)
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                agent.metric("all");
                agent.get("/metrics");
            }
        });
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    let drops = || agent.own("tallyd_kernel_drops_total", "");
    until("every datagram to be read or dropped", || {
        let read = agent.own("tallyd_datagrams_total", "listener=\"udp\"");
        ((read + drops()) as u64 == SENDERS * DATAGRAMS).then_some(())
    });
    let read = agent.own("tallyd_datagrams_total", "listener=\"udp\"") as u64;
    let lines = agent.own("tallyd_lines_total", "listener=\"udp\"") as u64;
    let accepted = agent.own("tallyd_lines_accepted_total", "listener=\"udp\"") as u64;
    let rejected = agent.own("tallyd_lines_rejected_total", "listener=\"udp\"") as u64;
    assert_eq!((lines, rejected), (read * 3, read));
    assert_eq!(lines, accepted + rejected);
    agent.wait_for("all", "value", read);
    let own: u64 =
        (0..SENDERS).map(|sender| agent.metric(&format!("of.{sender}")).unwrap()["value"].as_u64().unwrap()).sum();
    assert_eq!(own, read);
}

fn send(agent: &Agent, sender: u64, datagrams: u64) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..datagrams {
        socket.send_to(format!("all:1|c\nof.{sender}:1|c\nno line").as_bytes(), agent.address("udp")).unwrap();
    }
}

#[test]
fn own_metrics_count_what_came_by_each_listener() {
    use std::io::Write;
    let agent = Agent::start(&[]);
    agent.datagram("a:1|c\nb:2:3|ms");
    agent.connect().write_all(b"c:1|c\nd:1|c").unwrap();
    agent.ingest(r#"{"name":"e","type":"COUNTER","value":1}"#);
    agent.wait_for("a", "value", 1);
    agent.wait_for("d", "value", 1);
    for (name, labels, want) in [
        ("tallyd_datagrams_total", "listener=\"udp\"", 1.0),
        ("tallyd_received_bytes_total", "listener=\"udp\"", 14.0),
        ("tallyd_lines_total", "listener=\"udp\"", 2.0),
        ("tallyd_samples_total", "listener=\"udp\"", 3.0),
        ("tallyd_lines_total", "listener=\"tcp\"", 2.0),
        ("tallyd_lines_total", "listener=\"http\"", 1.0),
        ("tallyd_series", "", 5.0),
        ("tallyd_build_info", "", 1.0),
    ] {
        until(&format!("{name}{{{labels}}} to be {want}"), || (agent.own(name, labels) == want).then_some(()));
    }
    assert!(agent.own("process_resident_memory_bytes", "") > 1e6);
}
