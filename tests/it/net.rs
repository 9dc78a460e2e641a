//! Other servers of a test: a real Redis on a free port.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

use crate::agent::until;

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A redis-server; it is killed when dropped.
pub struct Redis {
    program: &'static str,
    child: Child,
    directory: Arc<TempDir>,
    pub port: u16,
    options: Vec<String>,
}

impl Redis {
    /// A server that persists every write.
    pub fn start() -> Self {
        Self::start_with(&["--appendonly", "yes", "--appendfsync", "always"])
    }

    /// A server with options of its own.
    pub fn start_with(options: &[&str]) -> Self {
        Self::start_program("redis-server", options)
    }

    /// The same of another make.
    pub fn start_program(program: &'static str, options: &[&str]) -> Self {
        Self::start_in(program, Arc::new(tempfile::tempdir().unwrap()), free_port(), options)
    }

    /// Its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn start_in(program: &'static str, directory: Arc<TempDir>, port: u16, options: &[&str]) -> Self {
        let child = spawn(program, directory.path(), port, options);
        let redis = Self {
            program,
            child,
            directory,
            port,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        };
        until("redis-server to answer", || (redis.try_cli(&["PING"])?.trim() == "PONG").then_some(()));
        redis
    }

    /// What `redis-cli` prints for a command.
    pub fn cli(&self, words: &[&str]) -> String {
        self.try_cli(words).unwrap()
    }

    fn try_cli(&self, words: &[&str]) -> Option<String> {
        TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(words).output().unwrap();
        Some(String::from_utf8(output.stdout).unwrap())
    }

    /// The setting that points an agent to it.
    pub fn url(&self) -> String {
        format!("store.redis.url=redis://127.0.0.1:{}", self.port)
    }

    /// Sends it a signal by its name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Kills it; its files stay.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after [`Redis::kill`], on the same port with the same files.
    pub fn start_again(&mut self) {
        let options: Vec<_> = self.options.iter().map(String::as_str).collect();
        self.child = spawn(self.program, self.directory.path(), self.port, &options);
        until("redis-server to answer again", || (self.try_cli(&["PING"])?.trim() == "PONG").then_some(()));
    }
}

fn spawn(program: &str, directory: &Path, port: u16, options: &[&str]) -> Child {
    Command::new(program)
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
        .arg(directory)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed by packaging/setup.sh tests")
}

impl Drop for Redis {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
