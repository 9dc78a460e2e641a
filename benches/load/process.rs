//! Whole programs beside the bench: the real executable as agent and as generator, and a real `redis-server`. Each has
//! free ports and a directory of its own, and is killed when dropped.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::clock::until;

/// A running tallyd.
pub(crate) struct Agent {
    child: Child,
    pub(crate) udp: SocketAddr,
    api: SocketAddr,
    _state: TempDir,
}

impl Agent {
    /// An agent with one worker and with limits that nothing reaches, on one core if there is a number.
    pub(crate) fn start(core: Option<usize>, settings: &[&str]) -> Self {
        let state = tempfile::tempdir().expect("a temporary directory");
        let mut command = tallyd(core);
        let common = [
            "listen.udp=127.0.0.1:0",
            "listen.tcp=127.0.0.1:0",
            "http.ingest=127.0.0.1:0",
            "http.api=127.0.0.1:0",
            "listen.workers=1",
            "limits.series=10000000",
            "limits.memory=64GiB",
            "limits.new_series=4000000000",
        ];
        for setting in common.iter().chain(settings) {
            command.args(["--set", setting]);
        }
        command.env("TALLYD_STATE_DIR", state.path());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("tallyd, and taskset of util-linux");
        let mut lines = BufReader::new(child.stderr.take().expect("its standard error")).lines();
        let ready =
            lines.find_map(|line| line.ok().filter(|line| line.starts_with("ready"))).expect("the line `ready`");
        // What it says later must be read for it to go on.
        std::thread::spawn(move || lines.for_each(drop));
        let address = |listener: &str| {
            let mut words = ready.split_whitespace();
            let address = words.find_map(|word| word.strip_prefix(listener)?.strip_prefix('='));
            address.and_then(|address| address.parse().ok()).expect("an address of each listener")
        };
        Self { child, udp: address("udp"), api: address("api"), _state: state }
    }

    /// All that it exports: a page that grows with its series, and costs it time and memory.
    pub(crate) fn scrape(&self) -> Scrape {
        let (status, page) = self.get("/metrics");
        assert!(status.contains(" 200 "), "{status}");
        Scrape(page)
    }

    /// Scrapes it as a server would that keeps nothing of it: how many bytes, and how long it took.
    pub(crate) fn read_page(&self) -> (u64, Duration) {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(self.api).expect("its API");
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: {}\r\n\r\n", self.api).expect("its API");
        let bytes = std::io::copy(&mut stream, &mut std::io::sink()).expect("an answer");
        (bytes, begun.elapsed())
    }

    /// Lets the most that it held begin again at what it holds.
    pub(crate) fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").expect("leave to reset a process's peak");
    }

    /// Waits until all that its sockets hold is read and folded: then only it answers who asks for a series.
    pub(crate) fn settle(&self, series: &str) {
        until("a series to be read", || self.get(&format!("/data/metrics/{series}")).0.contains(" 200 ").then_some(()));
    }

    /// The line of the status, and all that follows it.
    fn get(&self, path: &str) -> (String, String) {
        let mut stream = BufReader::new(TcpStream::connect(self.api).expect("its API"));
        write!(stream.get_mut(), "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.api).expect("its API");
        let (mut status, mut rest) = (String::new(), String::new());
        stream.read_line(&mut status).and_then(|_| stream.read_to_string(&mut rest)).expect("an answer");
        (status, rest)
    }

    /// Seconds that it has run on all cores, for itself and in the kernel; they advance by 0.01.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("a running agent");
        let (_, fields) = stat.rsplit_once(") ").expect("a name in parentheses");
        let ticks = fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number"));
        // The kernel counts hundredths of a second for all programs.
        ticks.sum::<f64>() / 100.0
    }

    /// Its memory in bytes: `VmRSS` now, `VmHWM` at most.
    pub(crate) fn memory(&self, figure: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("a running agent");
        let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':')?.strip_suffix(" kB"));
        line.and_then(|kib| kib.trim().parse::<f64>().ok()).expect("a figure in KiB") * 1024.0
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A page of metrics.
pub(crate) struct Scrape(String);

impl Scrape {
    /// The sum of a metric over the labels that hold some text.
    pub(crate) fn sum(&self, metric: &str, labels: &str) -> f64 {
        let value = |line: &str| {
            let (found, value) = line.strip_prefix(metric)?.rsplit_once(' ')?;
            let is_it = (found.is_empty() || found.starts_with('{')) && found.contains(labels);
            is_it.then(|| value.parse::<f64>().expect("a number"))
        };
        self.0.lines().filter_map(value).sum()
    }
}

/// What a generator says that it sent.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Sent {
    pub(crate) seconds: f64,
    pub(crate) lines: u64,
    pub(crate) lines_per_second: f64,
}

/// Runs `tallyd bench` to its end.
pub(crate) fn generate(core: usize, to: SocketAddr, words: &[&str]) -> Sent {
    let mut command = tallyd(Some(core));
    command.args(["bench", "--json", "--to", &format!("udp://{to}")]).args(words);
    let output = command.stderr(Stdio::inherit()).stdout(Stdio::piped()).output().expect("tallyd");
    assert!(output.status.success(), "tallyd bench {words:?}: {}", output.status);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The executable, kept on a core by `taskset`, with nothing of this environment in its configuration.
fn tallyd(core: Option<usize>) -> Command {
    let executable = env!("CARGO_BIN_EXE_tallyd");
    let mut command = match core {
        Some(core) => {
            let mut command = Command::new("taskset");
            command.args(["-c", &core.to_string(), executable]);
            command
        }
        None => Command::new(executable),
    };
    let own = ["INGEST_PORT", "API_PORT", "STORE", "REDIS_HOST", "REDIS_PORT", "STATE_DIRECTORY"];
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TALLYD_") || own.contains(&name.as_str())) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A running `redis-server` that writes nothing to disk.
pub(crate) struct Redis {
    child: Child,
    pub(crate) address: SocketAddr,
    _directory: TempDir,
}

impl Redis {
    /// A new server; `None` where there is no `redis-server`.
    pub(crate) fn start() -> Option<Self> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]);
        command.arg(directory.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().ok()?;
        let redis = Self { child, address: SocketAddr::from(([127, 0, 0, 1], port)), _directory: directory };
        until("redis-server to listen", || TcpStream::connect(redis.address).ok());
        Some(redis)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // Either fails only for a process that has ended already.
    let _ = child.kill();
    let _ = child.wait();
}
