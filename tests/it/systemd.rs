//! What systemd sees and is told: the test is the service manager, or the journal at the other end of standard error.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::agent::{Agent, PATIENCE, tallyd};

/// A service manager of one service.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self { socket }
    }

    /// The next message, as its states.
    fn message(&self) -> Option<Vec<String>> {
        let mut bytes = [0; 4_096];
        let length = self.socket.recv(&mut bytes).ok()?;
        let text = std::str::from_utf8(&bytes[..length]).unwrap();
        Some(text.lines().map(str::to_owned).collect())
    }

    /// Waits for a message with a state that begins so; those before it are passed over.
    #[track_caller]
    fn wait_for(&self, state: &str) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            let Some(message) = self.message() else { continue };
            if message.iter().any(|found| found.starts_with(state)) {
                return message;
            }
            seen.push(message);
        }
        panic!("no {state} in {seen:?}");
    }
}

#[track_caller]
fn status(message: &[String]) -> &str {
    message.iter().find_map(|state| state.strip_prefix("STATUS=")).unwrap_or_else(|| panic!("no status: {message:?}"))
}

/// An agent that is told of a service manager, with a configuration file of this text.
fn start(text: &str, environment: &[(&str, &str)]) -> (Manager, Agent) {
    let state = Arc::new(tempfile::tempdir().unwrap());
    std::fs::write(state.path().join("tallyd.toml"), text).unwrap();
    let path = state.path().join("notify");
    let manager = Manager::new(&path);
    let agent = Agent::start_changed(state, &[], |command| {
        command.env("NOTIFY_SOCKET", &path).envs(environment.iter().copied());
    });
    (manager, agent)
}

#[test]
fn a_service_manager_is_told_of_start_reloads_and_stop() {
    let (manager, mut agent) = start("", &[]);
    let ready = manager.wait_for("READY=1");
    assert!(status(&ready).starts_with("ready; 0 samples/s, 0 series, journal "), "{ready:?}");

    agent.write_file("[log]\nlevel = 'debug'\n");
    agent.signal("HUP");
    let reloading = manager.wait_for("RELOADING=1");
    assert!(reloading.iter().any(|state| state.starts_with("MONOTONIC_USEC=")), "{reloading:?}");
    assert_eq!(status(&manager.wait_for("READY=1")), "the configuration was read again");

    agent.write_file("[flush]\nwindow = '20s'\n");
    agent.signal("HUP");
    manager.wait_for("RELOADING=1");
    let refused = manager.wait_for("READY=1");
    assert!(status(&refused).starts_with("reload refused: flush.window: changes only with a restart"), "{refused:?}");

    agent.datagram("a:1|c\nb:2|c");
    agent.wait_for("b", "value", 2);
    let told = manager.wait_for("STATUS=ready; ");
    assert!(status(&told).contains(" samples/s, 2 series, journal "), "{told:?}");
    assert!(status(&told).contains("; the last reload was refused: flush.window: "), "{told:?}");

    agent.signal("TERM");
    let stopping = manager.wait_for("STOPPING=1");
    assert!(stopping.contains(&"EXTEND_TIMEOUT_USEC=50000000".to_owned()), "{stopping:?}");
    assert_eq!(agent.wait().code(), Some(0));
}

/// The parent of a process.
fn parent(process: &str) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_process_that_takes_over_is_nobodys_child_when_systemd_is_told_of_it() {
    let (manager, mut agent) = start("", &[("WATCHDOG_USEC", "6000000")]);
    manager.wait_for("READY=1");
    agent.signal("USR2");
    let message = manager.wait_for("MAINPID=");
    let successor = message.iter().find_map(|state| state.strip_prefix("MAINPID=")).unwrap().to_owned();
    // Else systemd would not wait for its end at a stop.
    assert_ne!(parent(&successor), agent.process());
    manager.wait_for("READY=1");
    assert_eq!(agent.wait().code(), Some(0));
    manager.wait_for("WATCHDOG=1");
    assert!(std::process::Command::new("kill").args(["-TERM", &successor]).status().unwrap().success());
    manager.wait_for("STOPPING=1");
}

#[test]
fn the_watchdog_is_fed_in_its_time() {
    let (manager, agent) = start("", &[("WATCHDOG_USEC", "6000000")]);
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }
    // One that another process was started with is not ours.
    let (manager, other) = start("", &[("WATCHDOG_USEC", "6000000"), ("WATCHDOG_PID", "1")]);
    assert!(!manager.wait_for("STATUS=ready; ").contains(&"WATCHDOG=1".to_owned()));
    // The line of status comes after ten seconds, in which there were several turns for a sign.
    let later = std::iter::from_fn(|| manager.message()).flatten();
    assert!(later.into_iter().all(|state| state != "WATCHDOG=1"));
    drop((agent, other));
}

#[test]
fn without_a_service_manager_there_the_agent_says_so_once_and_runs() {
    let state = Arc::new(tempfile::tempdir().unwrap());
    let path = state.path().join("gone");
    let agent = Agent::start_changed(state, &[], |command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "2000000");
    });
    agent.datagram("c:1|c");
    agent.wait_for("c", "value", 1);
    let count = agent.stderr().matches("systemd could not be told how the agent is").count();
    assert_eq!(count, 1, "{}", agent.stderr());
}

/// Runs an agent whose standard error is a socket, which the environment calls the journal's or not, and gives what it
/// wrote there until it ended.
fn written(arguments: &[&str], is_journal: bool) -> String {
    let state = tempfile::tempdir().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let theirs = std::fs::File::from(OwnedFd::from(theirs));
    let found = theirs.metadata().unwrap();
    let (device, inode) = (found.dev(), found.ino() + u64::from(!is_journal));
    let mut command = tallyd();
    command.args(arguments).env("TALLYD_STATE_DIR", state.path()).env("JOURNAL_STREAM", format!("{device}:{inode}"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(theirs).spawn().unwrap();
    // So that the end of what it writes is seen.
    drop(command);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\n") || !text.windows(6).any(|bytes| bytes == b"ready ") {
        match ours.read(&mut byte).unwrap() {
            0 => break,
            _ => text.extend(byte),
        }
    }
    // It may have ended already.
    drop(std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).output());
    drop(ours.read_to_end(&mut text));
    child.wait().unwrap();
    String::from_utf8(text).unwrap()
}

const FREE: [&str; 8] = [
    "--set",
    "listen.udp=127.0.0.1:0",
    "--set",
    "listen.tcp=127.0.0.1:0",
    "--set",
    "http.ingest=127.0.0.1:0",
    "--set",
    "http.api=127.0.0.1:0",
];

#[test]
fn lines_for_the_journal_say_how_grave_they_are() {
    if Path::new("/run/systemd/journal/socket").exists() {
        // The messages go there with their fields, and this machine's journal is not to be filled by tests.
        drop(writeln!(std::io::stderr(), "skipped: a journal runs on this machine, see packaging/try.sh"));
        return;
    }
    let text = written(&FREE, true);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines.iter().any(|line| line.starts_with("<6> INFO ") && line.contains("the journal is open")), "{text}");
    assert!(lines.iter().any(|line| line.starts_with("ready api=127.0.0.1:")), "{text}");
    assert!(lines.iter().all(|line| line.starts_with('<') || line.starts_with("ready ")), "{text}");
    let text = written(&["--set", "log.level=loud"], true);
    assert!(text.starts_with("<3>tallyd: --set: log.level"), "{text}");
}

#[test]
fn standard_error_that_is_not_the_journal_gets_plain_lines() {
    let text = written(&FREE, false);
    assert!(text.contains(" INFO ") && !text.contains("<6>"), "{text}");
    let text = written(&["--set", "log.level=loud"], false);
    assert!(text.starts_with("tallyd: --set: log.level"), "{text}");
}
