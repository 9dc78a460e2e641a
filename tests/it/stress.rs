//! Everything at once: senders by every way, readers of JSON and of the scrape beside them, and series that idle so
//! soon that they leave memory and return all the time. In the end each sample is accounted for.
//!
//! ThreadSanitizer takes an executable with a `std` of its own, to be put in the place of `target/debug/tallyd`:
//! `RUSTFLAGS=-Zsanitizer=thread cargo +nightly build -Zbuild-std --target x86_64-unknown-linux-gnu --target-dir
//! target/tsan`. With `TSAN_OPTIONS=log_path=races` each race it sees is in a file `races.*`. The gate leaves it out,
//! since everything is built anew for it.

use std::collections::HashMap;
use std::io::Write;
use std::net::UdpSocket;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::agent::{Agent, until};

/// By which way each sender sends; by UDP, what the kernel drops is lost.
const SENDERS: [&str; 8] = ["udp", "udp", "udp", "tcp", "tcp", "unixgram", "unix", "http"];
/// In each turn every second sender rests, until its series have left memory, or this is over.
const TURNS: usize = 4;
const TURN: Duration = Duration::from_millis(1_500);
/// Packets between two looks at what has been counted.
const CHUNK: usize = 25;

/// What a packet holds: a sample for each of five series, and a line that is none.
const LINES: u64 = 6;

fn packet(sender: usize, n: usize) -> String {
    format!(
        "all:1|c\nc.{sender}:1|c\ng.{sender}:{n}|g\nt.{sender}:{}|ms\ns.{sender}:m{}|s\nno line",
        n % 16,
        n % MEMBERS
    )
}

/// The same as JSON, without the line that is none.
fn body(sender: usize, n: usize) -> String {
    let record = |name: &str, kind: &str, value: String| {
        format!(r#"{{"name":"{name}.{sender}","type":"{kind}","value":{value}}}"#)
    };
    let all = r#"{"name":"all","type":"COUNTER","value":1}"#.to_owned();
    let records = [
        all,
        record("c", "COUNTER", "1".to_owned()),
        record("g", "GAUGE", n.to_string()),
        record("t", "TIMER", (n % 16).to_string()),
        record("s", "SET", format!("\"m{}\"", n % MEMBERS)),
    ];
    format!("[{}]", records.join(","))
}

const MEMBERS: usize = 40;

/// An open way to the agent.
enum Way<'a> {
    Udp(UdpSocket),
    Stream(Box<dyn Write>),
    Packets(UnixStream),
    Unixgram(UnixDatagram),
    Http(&'a Agent),
}

impl<'a> Way<'a> {
    fn open(way: &str, agent: &'a Agent, directory: &Path) -> Self {
        match way {
            "udp" => {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                socket.connect(agent.address("udp")).unwrap();
                Self::Udp(socket)
            }
            "tcp" => Self::Stream(Box::new(agent.connect())),
            "unix" => Self::Packets(UnixStream::connect(directory.join("unix")).unwrap()),
            "unixgram" => {
                let socket = UnixDatagram::unbound().unwrap();
                socket.connect(directory.join("unixgram")).unwrap();
                Self::Unixgram(socket)
            }
            "http" => Self::Http(agent),
            other => panic!("no way {other}"),
        }
    }

    fn send(&mut self, sender: usize, n: usize) {
        let packet = packet(sender, n);
        match self {
            Self::Udp(socket) => assert_eq!(socket.send(packet.as_bytes()).unwrap(), packet.len()),
            Self::Unixgram(socket) => assert_eq!(socket.send(packet.as_bytes()).unwrap(), packet.len()),
            Self::Stream(stream) => stream.write_all(format!("{packet}\n").as_bytes()).unwrap(),
            Self::Packets(stream) => {
                let length = u32::try_from(packet.len()).unwrap().to_le_bytes();
                stream.write_all(&[&length, packet.as_bytes()].concat()).unwrap();
            }
            Self::Http(agent) => {
                let answer = agent.ingest(body(sender, n));
                assert!(answer.status < 300, "{} {}", answer.status, answer.text());
            }
        }
    }
}

/// The highest value that each counter was seen with.
#[derive(Default)]
struct Seen(HashMap<String, f64>);

impl Seen {
    fn look(&mut self, series: &str, value: f64) {
        let highest = self.0.entry(series.to_owned()).or_default();
        assert!(value >= *highest, "{series} fell from {highest} to {value}");
        *highest = value;
    }

    fn look_at_json(&mut self, agent: &Agent, key: &str) {
        let metric = agent.metric(key);
        // It is unknown until its first sample, and never again.
        let value = metric.map_or(0.0, |metric| metric["value"].as_f64().unwrap());
        self.look(key, value);
    }

    /// All counters of the scrape; one that is idle is not there.
    fn look_at_scrape(&mut self, agent: &Agent) {
        for line in agent.get("/metrics").text().lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            if series == "all" || series.starts_with("c_") || series.starts_with("t_") && series.ends_with("_count") {
                self.look(series, value.parse().unwrap());
            }
        }
    }
}

/// Sends while it has its turn, and looks at what is counted meanwhile. The answer is how many packets it sent.
fn send(sender: usize, agent: &Agent, directory: &Path, turn: &AtomicUsize) -> usize {
    let mut way = Way::open(SENDERS[sender], agent, directory);
    let (mut sent, mut seen) = (0, Seen::default());
    loop {
        let turn = turn.load(Ordering::Relaxed);
        if turn == TURNS {
            return sent;
        }
        if (turn + sender).is_multiple_of(2) {
            for n in sent..sent + CHUNK {
                way.send(sender, n);
            }
            sent += CHUNK;
            let key = format!("c.{sender}");
            seen.look_at_json(agent, &key);
            assert!(seen.0[&key] <= sent as f64, "{key} counts {} of {sent}", seen.0[&key]);
        } else {
            seen.look_at_json(agent, "all");
        }
    }
}

#[test]
fn every_sample_is_accounted_for_while_everybody_sends_and_reads_and_series_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let setting = |kind: &str| format!("listen.{kind}={}", directory.path().join(kind).display());
    let agent = Agent::start(&[
        &setting("unixgram"),
        &setting("unix"),
        "flush.interval=100ms",
        "flush.window=1s",
        "limits.idle=300ms",
        "limits.idle_gauges=300ms",
    ]);
    let (turn, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let expired = || agent.own("tallyd_series_expired_total", "");
    let sent: Vec<usize> = thread::scope(|scope| {
        let (agent, directory, turn, done) = (&agent, directory.path(), &turn, &done);
        let senders: Vec<_> =
            (0..SENDERS.len()).map(|sender| scope.spawn(move || send(sender, agent, directory, turn))).collect();
        scope.spawn(move || {
            let mut seen = Seen::default();
            while !done.load(Ordering::Relaxed) {
                seen.look_at_scrape(agent);
            }
            assert!(seen.0.len() > SENDERS.len(), "the scrape showed {:?}", seen.0.keys());
        });
        for next in 1..=TURNS {
            let (before, begun) = (expired(), Instant::now());
            while begun.elapsed() < TURN && expired() < before + 4.0 * (SENDERS.len() / 2) as f64 {
                thread::sleep(Duration::from_millis(20));
            }
            turn.store(next, Ordering::Relaxed);
        }
        let sent = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        sent
    });
    let read = lines_are_accounted_for(&agent, &sent);
    series_are_accounted_for(&agent, &sent, read);
    // They all leave memory, and what returns goes on where it was.
    until("all series to be idle", || (agent.own("tallyd_series", "") == 0.0).then_some(()));
    assert!(expired() > (SENDERS.len() * 4) as f64, "{} series expired", expired());
    series_are_accounted_for(&agent, &sent, read);
    let mut again = sent;
    for (sender, sent) in again.iter_mut().enumerate() {
        Way::open(SENDERS[sender], &agent, directory.path()).send(sender, *sent);
        *sent += 1;
    }
    let read = lines_are_accounted_for(&agent, &again);
    series_are_accounted_for(&agent, &again, read);
    assert_eq!(agent.own("tallyd_series_refused_total", "") + agent.own("tallyd_lost_total", ""), 0.0);
}

fn packets_of(sent: &[usize], listener: &str) -> u64 {
    let by = SENDERS.iter().zip(sent).filter(|(way, _)| **way == listener);
    by.map(|(_, sent)| *sent as u64).sum()
}

/// Each packet was read, or dropped by the kernel, and each of its lines accepted or rejected. The answer is how many
/// UDP packets were read.
fn lines_are_accounted_for(agent: &Agent, sent: &[usize]) -> u64 {
    let own = |name: &str, listener: &str| agent.own(name, &format!("listener=\"{listener}\"")) as u64;
    let drops = || agent.own("tallyd_kernel_drops_total", "") as u64;
    until("each datagram to be read or dropped", || {
        (own("tallyd_datagrams_total", "udp") + drops() == packets_of(sent, "udp")).then_some(())
    });
    let read = own("tallyd_datagrams_total", "udp");
    for listener in ["udp", "tcp", "unixgram", "unix", "http"] {
        let packets = if listener == "udp" { read } else { packets_of(sent, listener) };
        let bad = if listener == "http" { 0 } else { packets };
        let lines = packets * (LINES - 1) + bad;
        until(&format!("{lines} lines by {listener}"), || (own("tallyd_lines_total", listener) == lines).then_some(()));
        let accepted = own("tallyd_lines_accepted_total", listener);
        let rejected = own("tallyd_lines_rejected_total", listener);
        assert_eq!((accepted, rejected), (lines - bad, bad), "{listener}");
        assert_eq!(own("tallyd_samples_total", listener), accepted, "{listener}");
    }
    read
}

/// Each series has all that was sent to it; those of UDP together have what was read.
fn series_are_accounted_for(agent: &Agent, sent: &[usize], read: u64) {
    let count = |key: &str| agent.metric(key).map_or(0, |metric| metric["count"].as_u64().unwrap());
    let mut by_udp = [0; 3];
    for (sender, (way, sent)) in SENDERS.iter().zip(sent).enumerate() {
        let counts = ["c", "g", "t"].map(|kind| count(&format!("{kind}.{sender}")));
        if *way == "udp" {
            by_udp.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            continue;
        }
        assert_eq!(counts, [*sent as u64; 3], "sender {sender}, {way}");
        assert_eq!(count(&format!("s.{sender}")), MEMBERS.min(*sent) as u64);
        let gauge = agent.metric(&format!("g.{sender}")).unwrap();
        assert_eq!(gauge["value"].as_f64(), Some(*sent as f64 - 1.0), "the last by {way}");
    }
    assert_eq!(by_udp, [read; 3]);
    let all = agent.metric("all").unwrap()["value"].as_u64();
    let others: usize = SENDERS.iter().zip(sent).filter(|(way, _)| **way != "udp").map(|(_, sent)| sent).sum();
    assert_eq!(all, Some(read + others as u64));
}
