//! Lines that are sent on: the same ones, to every target, counted.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use crate::agent::{Agent, tallyd, until};

/// A server that keeps what it is sent.
struct Sink {
    socket: UdpSocket,
    datagrams: Vec<Vec<u8>>,
}

impl Sink {
    fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Self { socket, datagrams: Vec::new() }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    fn take(&mut self) {
        let mut buffer = vec![0; 70_000];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            self.datagrams.push(buffer[..length].to_vec());
        }
    }

    fn lines(&self) -> Vec<String> {
        let each = self.datagrams.iter().flat_map(|bytes| bytes.split(|byte| *byte == b'\n'));
        each.filter(|line| !line.is_empty()).map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    /// Waits for so many lines.
    #[track_caller]
    fn wait_for(&mut self, count: usize) -> Vec<String> {
        until("lines that are sent on", || {
            self.take();
            (self.lines().len() >= count).then(|| self.lines())
        })
    }
}

fn relay(targets: &[String]) -> String {
    format!("export.relay.to={}", targets.join(","))
}

/// What became of the lines for one target: sent on, dropped.
fn counts(agent: &Agent, target: &str) -> (f64, f64) {
    let label = format!("target=\"{target}\"");
    (agent.own("tallyd_relay_lines_total", &label), agent.own("tallyd_relay_dropped_lines_total", &label))
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

#[test]
fn lines_of_every_listener_go_to_every_target_and_bodies_do_not() {
    let (mut one, mut two) = (Sink::new(), Sink::new());
    let gone = Sink::new().address().to_string();
    let named = format!("localhost:{}", two.address().port());
    let targets = [one.address().to_string(), gone.clone(), "nowhere.invalid:8125".to_owned(), named.clone()];
    let sockets = tempfile::tempdir().unwrap();
    let path = |name: &str| sockets.path().join(name);
    let at = |key: &str, name: &str| format!("listen.{key}={}", path(name).display());
    let (datagrams, stream) = (at("unixgram", "d"), at("unix", "s"));
    let agent = Agent::start(&[&relay(&targets), &datagrams, &stream]);
    agent.datagram("u:1|c\n\nno line\nu:2|c|#a:b");
    agent.datagram(b"\xff\xfe:1|c");
    agent.connect().write_all(b"t:1|c\r\nt:2|c\nlast:1|c").unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"d:1|g", path("d")).unwrap();
    let packet = b"s:1|ms\ns:2|ms";
    let framed = [&(packet.len() as u32).to_le_bytes()[..], packet].concat();
    UnixStream::connect(path("s")).unwrap().write_all(&framed).unwrap();
    let body = r#"{"level":"a","name":"body","type":"COUNTER","value":1}"#;
    assert_eq!(agent.ingest(body).status, 200);
    let want = ["u:1|c", "no line", "u:2|c|#a:b", "t:1|c\r", "t:2|c", "last:1|c", "d:1|g", "s:1|ms", "s:2|ms"];
    let want: Vec<_> = want.map(str::to_owned).into_iter().chain(["\u{fffd}\u{fffd}:1|c".to_owned()]).collect();
    for sink in [&mut one, &mut two] {
        assert_eq!(sorted(sink.wait_for(want.len())), sorted(want.clone()));
        let whole = b"u:1|c\n\nno line\nu:2|c|#a:b".to_vec();
        assert!(sink.datagrams.iter().any(|datagram| datagram.windows(whole.len()).any(|part| part == whole)));
    }
    // What is sent on and what is dropped are the lines that were read.
    let count = want.len() as f64;
    for (target, sent) in [(one.address().to_string(), count), (named, count), (gone, 0.0), (targets[2].clone(), 0.0)] {
        until("all lines to be counted", || (counts(&agent, &target) == (sent, count - sent)).then_some(()));
    }
    let read: f64 = ["udp", "tcp", "unixgram", "unix"]
        .iter()
        .map(|listener| agent.own("tallyd_lines_total", &format!("listener=\"{listener}\"")))
        .sum();
    assert_eq!(read, count);
    let of = |reason: &str| agent.own("tallyd_relay_dropped_lines_total", &format!("reason=\"{reason}\""));
    assert_eq!((of("refused"), of("unresolved"), of("queue_full")), (count, count, 0.0));
    until("the log to say so", || agent.stderr().contains("lines are not sent on").then_some(()));
}

#[test]
fn lines_that_come_together_are_packed_and_long_ones_go_alone() {
    let mut sink = Sink::new();
    let agent = Agent::start(&[&relay(&[sink.address().to_string()]), "export.relay.packet=100B"]);
    let long = format!("long:{}|s", "x".repeat(7_000));
    let document = "{\"name\":\"a.b\",\n \"type\":\"c\",\"value\":1}";
    let lines: Vec<String> = (0..500).map(|n| format!("name{n}:1|c")).collect();
    agent
        .connect()
        .write_all([lines.join("\n"), "\n".to_owned(), long.clone(), "\n".to_owned()].concat().as_bytes())
        .unwrap();
    sink.wait_for(501);
    agent.datagram(document);
    // Longer than a packet by itself.
    agent.datagram(lines[..50].join("\n"));
    sink.wait_for(501 + 2 + 50);
    assert!(sink.datagrams.contains(&document.as_bytes().to_vec()), "a document of several lines is sent as one");
    assert!(sink.datagrams.contains(&long.clone().into_bytes()));
    let (short, alone): (Vec<_>, Vec<_>) = sink.datagrams.iter().partition(|datagram| datagram.len() <= 100);
    assert_eq!(alone.len(), 1);
    assert!(short.len() < 100, "550 lines of 10 bytes in {} datagrams", short.len());
    let mut want: Vec<String> = lines.iter().chain(&lines[..50]).cloned().collect();
    want.push(long);
    want.extend(document.lines().map(str::to_owned));
    assert_eq!(sorted(sink.lines()), sorted(want));
    let target = sink.address().to_string();
    until("packets and bytes to be counted", || {
        let label = format!("target=\"{target}\"");
        let bytes: usize = sink.datagrams.iter().map(Vec::len).sum();
        let seen = (agent.own("tallyd_relay_packets_total", &label), agent.own("tallyd_relay_bytes_total", &label));
        (seen == (sink.datagrams.len() as f64, bytes as f64)).then_some(())
    });
}

#[test]
fn a_hundred_thousand_lines_count_the_same_at_a_second_agent() {
    const BATCHES: usize = 20;
    const LINES: usize = 5_000;
    let second = Agent::start(&["store.kind=memory"]);
    let target = second.address("udp").to_string();
    let agent = Agent::start(&[&relay(std::slice::from_ref(&target)), "store.kind=memory"]);
    let mut stream = agent.connect();
    let mut totals: BTreeMap<String, f64> = BTreeMap::new();
    for batch in 0..BATCHES {
        let mut text = String::new();
        for n in 0..LINES {
            let name = format!("load.c{}", (batch * 7 + n) % 50);
            text += &format!("{name}:{}|c\n", n % 10);
            *totals.entry(name).or_default() += (n % 10) as f64;
        }
        stream.write_all(text.as_bytes()).unwrap();
        // No more than the second one's receive buffer holds.
        let count = ((batch + 1) * LINES) as f64;
        until("the second agent to read a batch", || {
            let read = second.own("tallyd_lines_total", "udp");
            let dropped = counts(&agent, &target).1 + second.own("tallyd_kernel_drops_total", "");
            (read >= count || dropped > 0.0).then_some(())
        });
    }
    let count = (BATCHES * LINES) as f64;
    until("all lines to be counted", || (agent.own("tallyd_lines_total", "tcp") == count).then_some(()));
    until("all lines to be sent on or dropped", || {
        let (sent, dropped) = counts(&agent, &target);
        (sent + dropped == count).then_some(())
    });
    assert_eq!(counts(&agent, &target), (count, 0.0));
    for (name, total) in &totals {
        agent.wait_for(name, "value", *total);
        second.wait_for(name, "value", *total);
    }
}

#[test]
fn what_waits_is_sent_before_a_stop_and_a_successor_goes_on() {
    let mut sink = Sink::new();
    let mut agent = Agent::start(&[&relay(&[sink.address().to_string()])]);
    let mut stream = agent.connect();
    stream.write_all(b"a:1|c\nb:").unwrap();
    sink.wait_for(1);
    agent.hand_over();
    stream.write_all(b"2|c\n").unwrap();
    assert_eq!(sink.wait_for(2), ["a:1|c", "b:2|c"]);
    let lines: Vec<String> = (0..1_000).map(|n| format!("c{n}:1|c")).collect();
    stream.write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
    agent.wait_for("c999", "value", 1);
    agent.signal("TERM");
    assert_eq!(sink.wait_for(1_002)[2..], lines);
}

#[test]
fn a_target_that_comes_back_has_what_comes_from_then_on() {
    let place = Sink::new().address();
    let agent = Agent::start(&[&relay(&[place.to_string()])]);
    agent.datagram("gone:1|c");
    until("a line to be dropped", || (counts(&agent, &place.to_string()) == (0.0, 1.0)).then_some(()));
    let socket = UdpSocket::bind(place).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut sink = Sink { socket, datagrams: Vec::new() };
    agent.datagram("back:1|c");
    assert_eq!(sink.wait_for(1), ["back:1|c"]);
    until("it to be counted", || (counts(&agent, &place.to_string()) == (1.0, 1.0)).then_some(()));
}

#[test]
fn a_target_that_is_no_other_server_is_refused() {
    let refused = |settings: &[&str]| {
        let mut command = tallyd();
        command.arg("check").args(settings.iter().flat_map(|setting| ["--set", setting]));
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let many = (0..17).map(|n| format!("a{n}.example:1")).collect::<Vec<_>>();
    for (settings, want) in [
        (&["export.relay.to=localhost:8125"][..], "this agent listens there itself"),
        (&["listen.udp=0.0.0.0:9", "export.relay.to=127.0.0.1:9"], "this agent listens there itself"),
        (&["export.relay.to=a.example"], "no host with a port"),
        (&["export.relay.to=a.example:1,a.example:1"], "it stands there twice"),
        (&["export.relay.packet=10B"], "out of range"),
        (&[&relay(&many)], "name at most 16"),
    ] {
        let (code, stderr) = refused(settings);
        assert!(
            code == Some(78) && stderr.contains(want) && stderr.contains("export.relay."),
            "{settings:?}: {stderr}"
        );
    }
    assert_eq!(refused(&["export.relay.to=127.0.0.1:8126,localhost:8127"]), (Some(0), String::new()));
}
