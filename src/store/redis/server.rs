//! A real `redis-server` for tests: on a free port of the loopback, its files in a directory that goes with it.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{Config, Connection, Limits};

/// A server; it ends with this value.
pub(crate) struct Server {
    child: Option<Child>,
    pub(crate) port: u16,
    options: Vec<String>,
    directory: TempDir,
}

impl Server {
    /// Starts one with options such as `["--appendonly", "yes"]`. Without any it keeps nothing on disk.
    pub(crate) fn start(options: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut server = Self { child: None, port, options, directory: tempfile::tempdir().unwrap() };
        server.resume();
        server
    }

    /// Starts it again, with what it kept, after [`Server::kill`].
    pub(crate) fn resume(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--save", "", "--dir"]);
        command.arg(self.directory.path()).args(&self.options).stdout(Stdio::null());
        self.child = Some(command.spawn().expect("redis-server must be installed (tests/all.sh does it)"));
        let answers = || TcpStream::connect(("127.0.0.1", self.port)).is_ok() && self.ask(&["PING"]).is_some();
        wait_for("redis-server answers", answers);
    }

    /// Ends it as kill -9 does.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends it a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    pub(crate) fn config(&self) -> Config {
        Config { url: format!("redis://127.0.0.1:{}", self.port), ..Config::default() }
    }

    pub(in crate::store) fn connection(&self) -> Connection {
        Connection::new(&self.config(), &Limits::default(), Duration::ZERO).unwrap()
    }

    /// Runs one command; `None` when it fails.
    pub(crate) fn ask(&self, words: &[&str]) -> Option<redis::Value> {
        let client = redis::Client::open(self.config().url).unwrap();
        let mut connection = client.get_connection_with_timeout(Duration::from_secs(2)).ok()?;
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]).query(&mut connection).ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until something holds, at most 20 s.
pub(crate) fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
