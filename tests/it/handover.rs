//! Restarts and upgrades that lose nothing: a process that takes over from another at SIGUSR2, and sockets that are open
//! before a process begins.

use std::fs::Permissions;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::json;

use crate::agent::{Agent, same, tallyd, until};

/// Sends lines to an agent as long as `run` runs: what that gives, and how many were sent.
fn under_load<T>(agent: &mut Agent, run: impl FnOnce(&mut Agent) -> T) -> (T, u64) {
    let (to, ends) = (agent.address("udp"), AtomicBool::new(false));
    thread::scope(|scope| {
        let send = || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(to).unwrap();
            let mut sent = 0;
            while !ends.load(Ordering::Relaxed) {
                for _ in 0..20 {
                    socket.send(b"load:1|c\nload.timer:2|ms").unwrap();
                }
                sent += 20;
                thread::sleep(Duration::from_millis(1));
            }
            sent
        };
        let senders: Vec<_> = (0..3).map(|_| scope.spawn(send)).collect();
        let outcome = run(agent);
        ends.store(true, Ordering::Relaxed);
        (outcome, senders.into_iter().map(|sender| sender.join().unwrap()).sum())
    })
}

/// Waits until all that was sent was counted or dropped by the kernel, which the last process knows of all before it.
#[track_caller]
fn all_are_accounted_for(agent: &Agent, sent: u64) {
    let counted = until("the counts to rest", || {
        let read = || agent.metric("load").map(|metric| metric["value"].as_f64().unwrap());
        let first = read()?;
        thread::sleep(Duration::from_millis(300));
        (read()? == first && first > 0.0).then_some(first)
    });
    // They are published once a second.
    until("lines and drops to be all that was sent", || {
        let dropped = agent.own("tallyd_kernel_drops_total", "");
        assert!(counted + dropped <= sent as f64, "{counted} + {dropped} of {sent}");
        (counted + dropped == sent as f64).then_some(())
    });
    assert!(same(&agent.metric("load.timer").unwrap()["count"], &json!(counted)), "timers were counted with them");
}

#[test]
fn no_datagram_is_lost_while_processes_take_over_from_each_other() {
    let mut agent = Agent::start(&["flush.interval=100ms", "flush.window=1s"]);
    let ((), sent) = under_load(&mut agent, |agent| {
        agent.wait_for("load", "type", "COUNTER");
        for _ in 0..3 {
            agent.hand_over();
        }
    });
    all_are_accounted_for(&agent, sent);
    assert_eq!(agent.own("tallyd_handovers_total", "taken_over"), 1.0);
    // The new one is a whole agent.
    let counted = agent.metric("load").unwrap()["value"].as_f64().unwrap();
    agent.ingest(r#"{"name":"load","type":"COUNTER","value":5}"#);
    agent.wait_for("load", "value", counted + 5.0);
    let ready = agent.get("/-/ready").json();
    assert_eq!(ready["addresses"]["udp"], json!([agent.address("udp").to_string()]));
}

#[test]
fn streams_go_on_in_the_middle_of_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let (streams, datagrams) = (directory.path().join("streams"), directory.path().join("datagrams"));
    let settings = [format!("listen.unix={}", streams.display()), format!("listen.unixgram={}", datagrams.display())];
    let mut agent = Agent::start(&[&settings[0], &settings[1]]);
    let mut tcp = agent.connect();
    let mut skipped = agent.connect();
    let mut long = UnixStream::connect(&streams).unwrap();
    // More than one message between the processes holds.
    long.write_all(&60_000_u32.to_le_bytes()).unwrap();
    long.write_all(&[b'\n'; 50_000]).unwrap();
    let mut unix = UnixStream::connect(&streams).unwrap();
    tcp.write_all(b"before:1|c\nwho").unwrap();
    skipped.write_all(&[b'x'; 10_000]).unwrap();
    unix.write_all(b"\x09\0\0\0pack").unwrap();
    // Lines of a unix stream: between two of them, inside one, and where it can't be told yet what they are.
    let mut texts = [b"text:1|c\n".as_slice(), b"text:1|c\nte", b"te"].map(|begun| {
        let mut text = UnixStream::connect(&streams).unwrap();
        text.write_all(begun).unwrap();
        text
    });
    agent.wait_for("before", "value", 1);
    until("the long line to be refused", || {
        (agent.own("tallyd_lines_rejected_total", "line_too_long") == 1.0).then_some(())
    });
    until("the streams to be read", || (agent.own("tallyd_received_bytes_total", "unix") >= 50_034.0).then_some(()));
    agent.hand_over();
    tcp.write_all(b"le:2|c\nagain:3|c\n").unwrap();
    skipped.write_all(b" still the same line\nafter:4|c\n").unwrap();
    unix.write_all(b"et:5|").unwrap();
    unix.write_all(b"c\x06\0\0\0late:6").unwrap();
    long.write_all(&[b'\n'; 9_992]).unwrap();
    long.write_all(b"long:8|c").unwrap();
    for (text, rest) in texts.iter_mut().zip(["text:10|c\n", "xt:100|c\n", "xt:1000|c\n"]) {
        text.write_all(rest.as_bytes()).unwrap();
    }
    agent.wait_for("text", "value", 1_112);
    agent.wait_for("long", "value", 8);
    agent.wait_for("whole", "value", 2);
    agent.wait_for("again", "value", 3);
    agent.wait_for("after", "value", 4);
    agent.hand_over();
    drop(unix);
    let lone = UnixDatagram::unbound().unwrap();
    lone.send_to(b"datagram:7|c", &datagrams).unwrap();
    agent.wait_for("datagram", "value", 7);
    assert_eq!(agent.own("tallyd_connections", "tcp"), 2.0);
    // A stream that ends is the agent's last word to it, and the files of its sockets go with the last agent.
    agent.signal("TERM");
    until("the files to go", || (!streams.exists() && !datagrams.exists()).then_some(()));
}

#[test]
fn a_successor_with_a_wrong_configuration_changes_nothing() {
    let mut agent = Agent::start_with_file("");
    let process = agent.process();
    agent.datagram("load:1|c\nload.timer:1|ms");
    agent.wait_for("load", "value", 1);
    agent.write_file("[flush]\ninterval = '3s'\n");
    let ((), sent) = under_load(&mut agent, |agent| {
        agent.signal("USR2");
        until("the failure to be counted", || (agent.own("tallyd_handovers_total", "failed") == 1.0).then_some(()));
    });
    all_are_accounted_for(&agent, sent + 1);
    assert_eq!(agent.process(), process);
    let log = agent.stderr();
    assert!(log.contains("must divide the window") && log.contains("nobody took over, this agent goes on"), "{log}");
    agent.write_file("");
    agent.hand_over();
    agent.wait_for("load", "value", sent + 1);
}

#[test]
fn an_agent_whose_successor_cannot_start_goes_on_with_all_that_it_had() {
    let directory = tempfile::tempdir().unwrap();
    let state = |name: &str| format!("state_dir = '{}'\n", directory.path().join(name).display());
    let other = Agent::start_with_file(&state("other"));
    let agent = Agent::start_with_file(&state("own"));
    let mut tcp = agent.connect();
    tcp.write_all(b"kept:1|c\nha").unwrap();
    agent.datagram("sent:2|c");
    agent.wait_for("kept", "value", 1);
    agent.wait_for("sent", "value", 2);
    // It reads the sockets and gets all, but not that directory.
    agent.write_file(&state("other"));
    agent.signal("USR2");
    until("the failure to be counted", || {
        let log = agent.stderr();
        (log.contains("nobody took over") && log.matches("\nready ").count() == 1).then_some(())
    });
    agent.wait_until_ready();
    assert_eq!(agent.own("tallyd_handovers_total", "failed"), 1.0);
    tcp.write_all(b"lf:3|c\n").unwrap();
    agent.wait_for("half", "value", 3);
    agent.datagram("sent:4|c");
    agent.wait_for("sent", "value", 6);
    assert!(agent.stderr().contains("in use"), "{}", agent.stderr());
    assert!(other.metric("sent").is_none());
    assert_eq!(other.get("/-/ready").status, 200);
}

/// A command that starts the executable at this path with the environment of the one under test.
fn at(path: &Path) -> Command {
    like_tallyd(Command::new(path))
}

fn like_tallyd(mut command: Command) -> Command {
    for (name, value) in tallyd().get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

#[test]
fn the_file_that_is_at_the_path_now_takes_over() {
    let directory = tempfile::tempdir().unwrap();
    let (path, newer) = (directory.path().join("tallyd"), directory.path().join("newer"));
    std::fs::copy(tallyd().get_program(), &path).unwrap();
    let mut agent = Agent::start_by(at(&path), &[]);
    agent.datagram("load:1|c");
    agent.wait_for("load", "value", 1);
    std::fs::copy(tallyd().get_program(), &newer).unwrap();
    std::fs::rename(&newer, &path).unwrap();
    agent.hand_over();
    let runs = std::fs::metadata(format!("/proc/{}/exe", agent.process())).unwrap();
    assert_eq!(runs.ino(), std::fs::metadata(&path).unwrap().ino());
    agent.datagram("load:2|c");
    agent.wait_for("load", "value", 3);
}

/// What a file at the path does that is no tallyd, and what the agent says of it.
#[track_caller]
fn goes_on_without(script: &str, complaint: &str) {
    let directory = tempfile::tempdir().unwrap();
    let (path, newer) = (directory.path().join("tallyd"), directory.path().join("newer"));
    std::fs::copy(tallyd().get_program(), &path).unwrap();
    let agent = Agent::start_by(at(&path), &[]);
    let mut tcp = agent.connect();
    tcp.write_all(b"before:1|c\nin.the.mid").unwrap();
    agent.wait_for("before", "value", 1);
    std::fs::write(&newer, script).unwrap();
    std::fs::set_permissions(&newer, Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&newer, &path).unwrap();
    agent.signal("USR2");
    until("the complaint", || {
        agent.stderr().lines().any(|line| line.contains("nobody took over") && line.contains(complaint)).then_some(())
    });
    tcp.write_all(b"dle:2|c\n").unwrap();
    agent.wait_for("in.the.middle", "value", 2);
    agent.datagram("before:2|c");
    agent.wait_for("before", "value", 3);
    agent.ingest(r#"{"name":"before","type":"COUNTER","value":4}"#);
    agent.wait_for("before", "value", 7);
}

#[test]
fn one_that_ends_at_once_changes_nothing() {
    goes_on_without("#!/bin/sh\nexit 3\n", "ended with exit status: 3");
}

#[test]
fn one_that_cannot_be_started_changes_nothing() {
    goes_on_without("#!/no/such/interpreter\n", "could not be started");
}

#[test]
fn one_that_takes_all_and_dies_changes_nothing() {
    let script = "#!/usr/bin/env python3
import array, os, socket
channel = socket.socket(fileno=os.dup(0))
names, streams = [], []
while True:
    message, passed, _, _ = channel.recvmsg(1 << 17, socket.CMSG_SPACE(4))
    head, _, rest = message.partition(b'\\n')
    if b'\"begin\"' in head:
        channel.send(b'{\"message\":\"of a later version\"}\\n')
        channel.send(b'{\"message\":\"prepared\"}\\n')
    elif b'\"read\"' in head:
        channel.send(b'{\"message\":\"reading\"}\\n')
    elif b'\"stream\"' in head:
        streams.append((rest, len(passed)))
    elif b'\"yours\"' in head:
        assert streams == [(b'in.the.mid', 1)], streams
        os._exit(4)
";
    goes_on_without(script, "ended with exit status: 4");
}

#[test]
fn a_stop_in_the_middle_of_a_hand_over_is_the_successors_too() {
    let directory = tempfile::tempdir().unwrap();
    let (path, newer) = (directory.path().join("tallyd"), directory.path().join("newer"));
    std::fs::copy(tallyd().get_program(), &path).unwrap();
    let mut agent = Agent::start_by(at(&path), &[]);
    agent.datagram("kept:1|c");
    agent.wait_for("kept", "value", 1);
    // The successor is the real one, behind somebody who lets it wait until the first one has been told to stop.
    let gate = directory.path().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let script =
        format!("#!/bin/sh\nread go <'{}'\nexec '{}' \"$@\"\n", gate.display(), tallyd().get_program().display());
    std::fs::write(&newer, script).unwrap();
    std::fs::set_permissions(&newer, Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&newer, &path).unwrap();
    // A request that is not whole holds the first one up in the middle.
    let mut slow = TcpStream::connect(agent.address("ingest")).unwrap();
    slow.write_all(b"POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{").unwrap();
    agent.signal("USR2");
    std::fs::write(&gate, "go\n").unwrap();
    until("the hand-over to begin", || agent.stderr().contains("handing over").then_some(()));
    agent.datagram("kept:2|c");
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    let log = agent.stderr();
    assert!(log.contains("handed over") && log.contains("stopped"), "{log}");
    // Nobody is left, and what the successor had read is in the journal.
    assert!(TcpStream::connect(agent.address("api")).is_err());
    agent.again().wait_for("kept", "value", 3);
}

#[test]
fn a_successor_that_cannot_bind_leaves_the_files_of_sockets_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (directory.path().join("one"), directory.path().join("other"));
    let _taken = UnixDatagram::bind(&other).unwrap();
    let agent = Agent::start_with_file(&format!("[listen]\nunixgram = ['{}']\n", one.display()));
    agent.write_file(&format!("[listen]\nunixgram = ['{}', '{}']\n", one.display(), other.display()));
    agent.signal("USR2");
    until("the failure", || agent.stderr().contains("nobody took over").then_some(()));
    UnixDatagram::unbound().unwrap().send_to(b"still:1|c", &one).unwrap();
    agent.wait_for("still", "value", 1);
    // A path that is not configured any more goes with the one that takes over.
    let mut agent = agent;
    agent.write_file("");
    agent.hand_over();
    assert!(!one.exists() && other.exists());
}

#[test]
fn a_stop_while_a_successor_starts_is_a_stop() {
    let directory = tempfile::tempdir().unwrap();
    let mut agent = Agent::start_with_file("");
    // The successor waits for its configuration for ever.
    let file = agent.directory().join("tallyd.toml");
    std::fs::remove_file(&file).unwrap();
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    agent.signal("USR2");
    until("a successor", || agent.stderr().contains("is started to take over").then_some(()));
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    // Whoever waits for the pipe now gets an end, and finds nobody to take over from.
    drop(std::fs::OpenOptions::new().write(true).open(&file));
    drop(directory);
}

/// A command that starts tallyd with these sockets, as systemd does.
pub fn with_sockets(sockets: &[(&str, &dyn AsFd)]) -> Command {
    let mut script = String::new();
    let mut names = Vec::new();
    for (number, (name, socket)) in sockets.iter().enumerate() {
        // It has to outlive the shell, and to be none of those that the shell makes of it.
        let socket = rustix::io::fcntl_dupfd_cloexec(socket.as_fd(), 100).unwrap();
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).unwrap();
        let (from, to) = (socket.into_raw_fd(), 3 + number);
        script.push_str(&format!("exec {to}<&{from} {from}<&-; "));
        names.push(*name);
    }
    script.push_str("export LISTEN_PID=$$; exec \"$0\" \"$@\"");
    let mut command = like_tallyd(Command::new("bash"));
    command.env("LISTEN_FDS", sockets.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    command.args(["-c", &script]).arg(tallyd().get_program());
    command
}

#[test]
fn sockets_of_units_stand_in_the_place_of_configured_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let (api, ingest) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let path = directory.path().join("datagrams");
    let unixgram = UnixDatagram::bind(&path).unwrap();
    // What comes before the start waits in the sockets.
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"early:1|c", udp.local_addr().unwrap()).unwrap();
    UnixDatagram::unbound().unwrap().send_to(b"early:2|c", &path).unwrap();
    let mut early = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    early.write_all(b"early:4|c\n").unwrap();
    let command = with_sockets(&[
        ("lines", &udp),
        ("lines", &tcp),
        ("lines", &unixgram),
        ("api", &api),
        ("ingest", &ingest),
        ("lines", &sender_of_nothing()),
    ]);
    let mut agent = Agent::start_by(command, &[]);
    for (listener, address) in [
        ("udp", udp.local_addr().unwrap()),
        ("tcp", tcp.local_addr().unwrap()),
        ("api", api.local_addr().unwrap()),
        ("ingest", ingest.local_addr().unwrap()),
    ] {
        assert_eq!(agent.addresses(listener), [address], "{listener}");
    }
    agent.wait_for("early", "value", 7);
    assert!(agent.stderr().contains("no listening socket"), "{}", agent.stderr());
    agent.hand_over();
    agent.datagram("late:1|c");
    agent.wait_for("late", "value", 1);
    agent.ingest(r#"{"name":"late","type":"COUNTER","value":5}"#);
    agent.wait_for("late", "value", 6);
    agent.signal("TERM");
    let api = agent.address("api");
    drop(agent);
    assert!(TcpStream::connect(api).is_ok(), "it is the unit's, here the test's");
    assert!(path.exists(), "so is the file");
}

/// A stream that does not listen.
fn sender_of_nothing() -> UnixStream {
    UnixStream::pair().unwrap().0
}

/// systemd's part: hears what agents tell, and keeps the sockets that they give it.
struct Manager {
    stored: Arc<Mutex<Vec<(String, OwnedFd)>>>,
}

impl Manager {
    /// It listens at a path as long as the test runs.
    fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        let stored = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&stored);
        thread::spawn(move || {
            while let Some((text, descriptors)) = message(&socket) {
                if text.contains("FDSTORE=1") {
                    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap();
                    let named = descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor));
                    // The one that came last is given out first.
                    keep.lock().unwrap().splice(0..0, named);
                }
            }
        });
        Self { stored }
    }

    fn stored(&self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut *self.stored.lock().unwrap())
    }
}

fn message(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4_096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Some((String::from_utf8_lossy(&bytes[..received.bytes]).into_owned(), descriptors))
}

#[test]
fn what_systemd_keeps_holds_datagrams_over_a_crash_and_counts_drops_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = Manager::new(&path);
    let mut command = tallyd();
    command.env("NOTIFY_SOCKET", &path);
    let unix = directory.path().join("lines").display().to_string();
    let settings = ["flush.interval=100ms", "flush.window=1s", "listen.receive_buffer=64KiB"];
    let unixgram = format!("listen.unixgram={unix}");
    let agent = Agent::start_by(command, &[&settings[..], &[&unixgram]].concat());
    agent.datagram("load:1|c\nload.timer:1|ms");
    agent.wait_for("load", "value", 1);
    until("a flush", || (agent.own("tallyd_flushes_total", "") >= 2.0).then_some(()));
    let stored = manager.stored();
    let mut names: Vec<_> = stored.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let two_workers = ["tallyd/api", "tallyd/ingest", "tallyd/tcp", "tallyd/udp", "tallyd/udp", "tallyd/unixgram"];
    assert_eq!(names, two_workers);
    let given: Vec<_> = stored.iter().map(|(name, socket)| (name.as_str(), socket as &dyn AsFd)).collect();
    let udp = agent.address("udp");
    let mut command = with_sockets(&given);
    command.env("NOTIFY_SOCKET", &path);
    let agent = agent.restart_by("KILL", command, || {
        // More than the buffers hold: the kernel counts what it drops.
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..5_000 {
            sender.send_to(b"load:1|c\nload.timer:1|ms", udp).unwrap();
        }
        UnixDatagram::unbound().unwrap().send_to(b"by.path:1|c", &unix).unwrap();
    });
    assert_eq!(agent.address("udp"), udp);
    all_are_accounted_for(&agent, 5_001);
    let dropped = agent.own("tallyd_kernel_drops_total", "");
    assert!(dropped > 0.0, "the buffers hold 5,000 datagrams");
    agent.wait_for("by.path", "value", 1);
    // A counter of the kernel is no new one in the next process.
    assert!(Path::new(&unix).exists());
    let mut agent = agent;
    agent.hand_over();
    until("drops to be published", || (agent.own("tallyd_kernel_drops_total", "") == dropped).then_some(()));
}
