//! What a series costs in memory, by kind, and what it is charged: an agent is started, told of so many series in each of
//! three rounds, and its resident memory is read before and after.
//!
//! `cargo bench --bench memory [-- SERIES]`; 100,000 unless told otherwise. `charged` is `tallyd_series_memory_bytes`, and
//! it is to be no less than `resident`, else `limits.memory` is no bound.
//!
//! Bytes of three runs, 2026-11, 2 cores of an AMD EPYC, debug build, glibc's allocator, names of 30 bytes. What the allocator
//! keeps of memory that was freed differs from run to run; charges differ by whether the rounds lay in one window or two:
//!
//! ```text
//! kind        values    series   resident     charged
//! counter          1    100000    815-881         900
//! gauge            1    100000    754-812         940
//! meter            1    100000    884-925         940
//! set              1    100000  1111-1291   1228-1312
//! timer            1    100000  1558-1824   1830-1881
//! timer           10    100000  1891-1970   2092-2131
//! ```

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a bench is a program for its own terminal")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// A kind as it is sent, and how many values a series gets in each round.
const ROWS: [(&str, &str, usize); 6] = [
    ("counter", "c", 1),
    ("gauge", "g", 1),
    ("meter", "m", 1),
    ("set", "s", 1),
    ("timer", "ms", 1),
    ("timer", "ms", 10),
];
const ROUNDS: usize = 3;

fn main() {
    let series = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(100_000);
    println!("{:<10}{:>8}{:>10}{:>10}{:>10}", "kind", "values", "series", "resident", "charged");
    for (kind, wire, values) in ROWS {
        let agent = Agent::start();
        agent.send(wire, 1, 1);
        let resident = agent.resident();
        for _ in 0..ROUNDS {
            agent.send(wire, series, values);
            // Each round is a flush of its own.
            sleep(Duration::from_millis(1_200));
        }
        let each = |bytes: f64| bytes / series as f64;
        let (resident, charged) = (each(agent.resident() - resident), each(agent.charged()));
        println!("{kind:<10}{values:>8}{series:>10}{resident:>10.0}{charged:>10.0}");
    }
}

/// A running agent with one worker and no store.
struct Agent {
    child: Child,
    udp: UdpSocket,
    api: String,
}

impl Agent {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tallyd"));
        for setting in [
            "listen.udp=127.0.0.1:0",
            "listen.tcp=127.0.0.1:0",
            "http.ingest=127.0.0.1:0",
            "http.api=127.0.0.1:0",
            "listen.workers=1",
            "store.kind=memory",
            "limits.series=10000000",
            "limits.memory=64GiB",
            "limits.new_series=4000000000",
        ] {
            command.args(["--set", setting]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = lines.find_map(|line| line.ok().filter(|line| line.contains("ready"))).unwrap();
        // What it says later must be read for it to go on.
        std::thread::spawn(move || lines.for_each(drop));
        let address = |listener: &str| {
            let mut words = ready.split_whitespace();
            words.find_map(|word| word.strip_prefix(listener)?.strip_prefix('=')).unwrap().to_owned()
        };
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect(address("udp")).unwrap();
        Self { child, udp, api: address("api") }
    }

    /// Sends values to so many series, never more than the agent's socket holds, and waits until all are read.
    fn send(&self, wire: &str, series: usize, values: usize) {
        let mut packet = String::new();
        let mut packets = 0;
        for number in 0..series {
            for value in 0..values {
                let reading = (number * 7 + value * 13) % 1_000 + 1;
                packet += &format!("service.requests.node{number:09}:{reading}|{wire}\n");
            }
            if packet.len() > 1_000 || number + 1 == series {
                self.udp.send(packet.as_bytes()).unwrap();
                packet.clear();
                packets += 1;
                if packets % 32 == 0 || number + 1 == series {
                    self.wait();
                }
            }
        }
    }

    /// Waits until the agent's socket is empty.
    fn wait(&self) {
        let port = format!(":{:04X}", self.udp.peer_addr().unwrap().port());
        let is_empty = |line: &str| {
            let mut fields = line.split_whitespace().skip(1);
            let is_its = fields.next().is_some_and(|local| local.ends_with(&port));
            is_its && fields.nth(2).is_some_and(|queues| queues.ends_with(":00000000"))
        };
        while !fs::read_to_string("/proc/net/udp").unwrap().lines().any(is_empty) {
            sleep(Duration::from_millis(1));
        }
    }

    /// What it says that its series are charged.
    fn charged(&self) -> f64 {
        let mut stream = TcpStream::connect(&self.api).unwrap();
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: {}\r\n\r\n", self.api).unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix("tallyd_series_memory_bytes ")?.parse().ok());
        value.unwrap()
    }

    /// Its resident memory in bytes.
    fn resident(&self) -> f64 {
        // The arrays of the last seal are on their way back.
        sleep(Duration::from_secs(3));
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        kib.unwrap().trim().parse::<f64>().unwrap() * 1024.0
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
