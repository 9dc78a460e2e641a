//! A tallyd process of a test.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::http::{self, Answer};

/// How long any condition may take to come true.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The executable under test.
pub fn tallyd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tallyd"));
    // Nothing of the machine's environment may reach the configuration.
    for (name, _) in std::env::vars() {
        let seed = [
            "INGEST_PORT",
            "API_PORT",
            "STORE",
            "REDIS_HOST",
            "REDIS_PORT",
            "STATE_DIRECTORY",
            "CREDENTIALS_DIRECTORY",
        ];
        if name.starts_with("TALLYD_") || name.starts_with("KAFKA_") || seed.contains(&name.as_str()) {
            command.env_remove(name);
        }
    }
    command
}

/// Waits until `check` gives something.
#[track_caller]
pub fn until<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, check)
}

/// Waits longer than for most things.
#[track_caller]
pub fn until_within<T>(patience: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A running agent; it is killed when dropped.
pub struct Agent {
    child: Child,
    /// The process that took over from the child, or from the one before it.
    successor: Option<u32>,
    state: Arc<TempDir>,
    settings: Vec<String>,
    addresses: BTreeMap<String, Vec<SocketAddr>>,
    stderr: Arc<Mutex<String>>,
}

impl Agent {
    /// An agent on free ports of 127.0.0.1 with a new state directory and these `section.key=value` settings.
    pub fn start(settings: &[&str]) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), settings)
    }

    /// An agent with a configuration file of this text, which [`Agent::write_file`] may replace.
    pub fn start_with_file(text: &str) -> Self {
        let state = Arc::new(tempfile::tempdir().unwrap());
        std::fs::write(state.path().join("tallyd.toml"), text).unwrap();
        Self::start_in(state, &[])
    }

    /// An agent with the configuration file in a directory, if there is one, and these settings above it.
    pub fn start_with(directory: Arc<TempDir>, settings: &[&str]) -> Self {
        Self::start_in(directory, settings)
    }

    /// Replaces the configuration file.
    pub fn write_file(&self, text: &str) {
        std::fs::write(self.state.path().join("tallyd.toml"), text).unwrap();
    }

    /// An agent with other sockets or another environment than usual: `command` is what starts it, with these settings.
    pub fn start_by(command: Command, settings: &[&str]) -> Self {
        Self::run(command, Arc::new(tempfile::tempdir().unwrap()), settings)
    }

    fn start_in(state: Arc<TempDir>, settings: &[&str]) -> Self {
        Self::run(tallyd(), state, settings)
    }

    /// An agent in this directory whose command is changed before it starts.
    pub fn start_changed(state: Arc<TempDir>, settings: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let mut command = tallyd();
        change(&mut command);
        Self::run(command, state, settings)
    }

    fn run(mut command: Command, state: Arc<TempDir>, settings: &[&str]) -> Self {
        let free = [
            "listen.udp=127.0.0.1:0",
            "listen.tcp=127.0.0.1:0",
            "listen.workers=2",
            "http.ingest=127.0.0.1:0",
            "http.api=127.0.0.1:0",
        ];
        let file = state.path().join("tallyd.toml");
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        if file.exists() {
            command.arg("--config").arg(file);
        }
        // The environment is above the file.
        if !text.contains("state_dir") {
            command.env("TALLYD_STATE_DIR", state.path().join("state"));
        }
        for setting in free.iter().chain(settings) {
            command.args(["--set", setting]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = collect(child.stderr.take().unwrap());
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let ready = until("the line `ready`", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("tallyd ended with {status} before it was ready:\n{}", stderr.lock().unwrap());
            }
            ready_line(&stderr.lock().unwrap())
        });
        Self { child, successor: None, state, settings, addresses: addresses(&ready), stderr }
    }

    /// The first address of a listener: `udp`, `tcp`, `ingest`, `api`, `scrape`.
    #[track_caller]
    pub fn address(&self, listener: &str) -> SocketAddr {
        self.addresses(listener)[0]
    }

    /// All addresses of a listener.
    #[track_caller]
    pub fn addresses(&self, listener: &str) -> &[SocketAddr] {
        self.addresses.get(listener).unwrap_or_else(|| panic!("no {listener} in {:?}", self.addresses))
    }

    /// Its process.
    pub fn process(&self) -> u32 {
        self.successor.unwrap_or(self.child.id())
    }

    /// Lets another process take over, and waits until it has and the one before has ended.
    pub fn hand_over(&mut self) {
        let before = self.begin_hand_over();
        until("the one before to end", || self.has_ended(before).then_some(()));
    }

    /// Lets another process take over, and waits until it has. The answer is the one before, which may still have something
    /// to do.
    pub fn begin_hand_over(&mut self) -> u32 {
        let before = self.process();
        self.signal("USR2");
        self.successor = Some(until("another process to take over", || {
            let successors = self.stderr();
            let last = successors.lines().rfind(|line| line.contains("handed over"))?;
            let id = last.split("successor=").nth(1)?.split(' ').next()?.parse().ok()?;
            (id != before).then_some(id)
        }));
        self.wait_until_ready();
        before
    }

    /// Waits until `/-/ready` is 200.
    pub fn wait_until_ready(&self) {
        until("the API to be ready", || (self.get("/-/ready").status == 200).then_some(()));
    }

    /// Whether one of its processes has ended.
    pub fn has_ended(&mut self, process: u32) -> bool {
        if process == self.child.id() {
            return self.child.try_wait().unwrap().inspect(|status| assert_eq!(status.code(), Some(0))).is_some();
        }
        // What has no parent here may be left as a zombie by whoever is to bury it.
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z') || rest.is_empty())
    }

    /// All that it wrote to standard error.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Its state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.state.path().join("state")
    }

    /// A directory for the test's own files, gone with the agent.
    pub fn directory(&self) -> &Path {
        self.state.path()
    }

    /// Sends one datagram.
    pub fn datagram(&self, bytes: impl AsRef<[u8]>) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(bytes.as_ref(), self.address("udp")).unwrap();
    }

    /// A connection to the TCP listener.
    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address("tcp")).unwrap()
    }

    /// `GET` on the API.
    pub fn get(&self, path: &str) -> Answer {
        http::request(self.address("api"), "GET", path, &[], b"")
    }

    /// `DELETE` on the API.
    pub fn delete(&self, path: &str) -> Answer {
        http::request(self.address("api"), "DELETE", path, &[], b"")
    }

    /// `POST /ingest/metrics` of a JSON body.
    pub fn ingest(&self, body: impl AsRef<[u8]>) -> Answer {
        let headers = [("Content-Type", "application/json")];
        http::request(self.address("ingest"), "POST", "/ingest/metrics", &headers, body.as_ref())
    }

    /// The JSON of a metric; `None` when there is none.
    pub fn metric(&self, key: &str) -> Option<Value> {
        let answer = self.get(&format!("/data/metrics/{key}"));
        match answer.status {
            200 => Some(answer.json()),
            404 => None,
            other => panic!("GET {key}: {other} {}", answer.text()),
        }
    }

    /// Waits until a field of a metric has a value. What comes by a socket is not acknowledged, so only waiting tells.
    #[track_caller]
    pub fn wait_for(&self, key: &str, field: &str, want: impl Into<Value>) {
        let want = want.into();
        let mut last = None;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            last = self.metric(key);
            if last.as_ref().is_some_and(|metric| same(&metric[field], &want)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{key}.{field} is not {want}: {last:?}");
    }

    /// The value of one of our own metrics in the scrape, all label sets that hold `labels` added; 0 when absent.
    pub fn own(&self, name: &str, labels: &str) -> f64 {
        let text = self.get("/metrics").text();
        let of_name = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
                && line.contains(labels)
        });
        of_name.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// A row of its `/proc/self/status` in bytes: `VmRSS`, what it holds now, or `VmHWM`, the most it held.
    pub fn memory(&self, row: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process())).unwrap();
        let row = status.lines().find_map(|line| line.strip_prefix(row)).unwrap();
        row.trim_matches([':', '\t', ' ', 'k', 'B']).parse::<u64>().unwrap() << 10
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.process().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end and gives the exit status.
    pub fn wait(&mut self) -> ExitStatus {
        let child = &mut self.child;
        until("tallyd to end", || child.try_wait().unwrap())
    }

    /// Another agent with the same settings and a copy of the state as it is now.
    pub fn copy(&self) -> Self {
        let copy = Arc::new(tempfile::tempdir().unwrap());
        let to = copy.path().join("state");
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(self.state_dir()).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
        let settings: Vec<_> = self.settings.iter().map(String::as_str).collect();
        Self::start_in(copy, &settings)
    }

    /// Ends it by a signal and starts it again with the same state.
    pub fn restart_after(self, signal: &str) -> Self {
        self.restart_with(signal, |_| {})
    }

    /// The same by another command, with something done before it starts again.
    pub fn restart_by(mut self, signal: &str, command: Command, meanwhile: impl FnOnce()) -> Self {
        self.signal(signal);
        self.wait();
        meanwhile();
        let settings: Vec<_> = self.settings.iter().map(String::as_str).collect();
        Self::run(command, Arc::clone(&self.state), &settings)
    }

    /// The same, with a change of its state directory before it starts again.
    pub fn restart_with(mut self, signal: &str, change: impl FnOnce(&Path)) -> Self {
        self.signal(signal);
        self.wait();
        change(&self.state_dir());
        self.again()
    }

    /// The same, of one that has ended.
    pub fn again(&self) -> Self {
        let settings: Vec<_> = self.settings.iter().map(String::as_str).collect();
        Self::start_in(Arc::clone(&self.state), &settings)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
        if let Some(successor) = self.successor.filter(|successor| Path::new(&format!("/proc/{successor}")).exists()) {
            drop(Command::new("kill").args(["-KILL", &successor.to_string()]).status());
        }
        if std::thread::panicking() {
            eprintln!("tallyd wrote:\n{}", self.stderr());
        }
    }
}

/// Whether two JSON values are the same, numbers by value.
pub fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-9 * a.abs().max(b.abs()),
        _ => a == b,
    }
}

/// Reads a pipe to its end on a thread.
pub fn collect(pipe: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let into = Arc::clone(&text);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let mut into = into.lock().unwrap();
            into.push_str(&line);
            into.push('\n');
        }
    });
    text
}

fn ready_line(stderr: &str) -> Option<String> {
    stderr.lines().find(|line| line.starts_with("ready ")).map(str::to_owned)
}

/// The addresses of `ready udp=127.0.0.1:8125 udp=[::1]:8125 tcp=...`.
fn addresses(ready: &str) -> BTreeMap<String, Vec<SocketAddr>> {
    let mut addresses: BTreeMap<String, Vec<SocketAddr>> = BTreeMap::new();
    for (listener, address) in ready.split(' ').filter_map(|word| word.split_once('=')) {
        // Unix sockets have paths, which the test chose itself.
        let bare = address.strip_prefix("tls://").unwrap_or(address);
        addresses.entry(listener.to_owned()).or_default().extend(bare.parse::<SocketAddr>());
    }
    addresses
}
