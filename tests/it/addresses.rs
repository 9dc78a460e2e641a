//! Several addresses of each kind of listener: all of them take lines, and what the kernel granted each is told.

use std::net::SocketAddr;

use crate::agent::{Agent, tallyd};

const BOTH: [&str; 2] = ["listen.udp=127.0.0.1:0, [::1]:0", "listen.tcp=127.0.0.1:0, [::1]:0"];

#[test]
fn every_address_of_every_kind_takes_lines() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let paths = |kind: &str| [path(&format!("{kind}1")), path(&format!("{kind}2"))];
    let setting = |kind: &str| format!("listen.{kind}={}", paths(kind).join(","));
    let agent = Agent::start(&[BOTH[0], BOTH[1], &setting("unixgram"), &setting("unix")]);
    let ready = agent.get("/-/ready").text();
    for kind in ["udp", "tcp", "unixgram", "unix"] {
        let places = match kind {
            "udp" | "tcp" => agent.addresses(kind).iter().map(SocketAddr::to_string).collect(),
            _ => paths(kind).to_vec(),
        };
        assert_eq!(places.len(), 2, "{kind}");
        for place in &places {
            let to = format!("{kind}://{place}");
            assert!(tallyd().args(["send", "--to", &to, &format!("{kind}:1|c")]).status().unwrap().success());
            assert!(ready.contains(place), "{place} is missing in {ready}");
        }
        agent.wait_for(kind, "value", 2);
        assert_eq!(agent.own("tallyd_lines_accepted_total", &format!("listener=\"{kind}\"")), 2.0, "{kind}");
    }
}

/// Each worker has a socket at each address, and each of them a buffer of its own.
#[test]
fn the_buffer_of_each_address_is_told_and_one_that_was_cut_down_is_a_warning() {
    let agent = Agent::start(&[BOTH[0], "listen.receive_buffer=64KiB"]);
    for address in agent.addresses("udp") {
        for worker in 0..2 {
            let granted = agent.own("tallyd_receive_buffer_bytes", &format!("socket=\"{address}#{worker}\""));
            assert_eq!(granted, 65_536.0, "{address}#{worker}");
        }
    }
    assert!(!agent.stderr().contains("granted"), "nothing was cut down");
    // More than a C integer can ask for, so that it is more than the kernel grants anybody.
    let agent = Agent::start(&[BOTH[0], "listen.receive_buffer=1024GiB"]);
    for address in agent.addresses("udp") {
        let granted = agent.own("tallyd_receive_buffer_bytes", &format!("socket=\"{address}#0\""));
        assert!(granted > 0.0 && granted < (1_u64 << 40) as f64, "{granted}");
        let log = agent.stderr();
        let warning =
            log.lines().find(|line| line.contains("the kernel granted") && line.contains(&address.to_string()));
        assert!(warning.is_some_and(|line| line.contains("listen.receive_buffer = ")), "{address}: {log}");
    }
}
