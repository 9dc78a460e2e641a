//! Etsy's console beside the original's, and what it does with clients that are none of its own.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::agent::{Agent, tallyd, until};
use crate::etsy;
use crate::handover::with_sockets;
use crate::net::free_port;
use crate::redis_servers::Server;

const CONSOLE: &str = "export.console.listen=127.0.0.1:0";

/// No window ends while a test runs.
const ONE_WINDOW: &str = "flush.window=36500d";

/// All that comes back for packets, each sent when the one before it was answered.
fn ask(at: SocketAddr, packets: &[&str]) -> String {
    let mut stream = TcpStream::connect(at).unwrap();
    let mut all = String::new();
    for packet in packets {
        stream.write_all(packet.as_bytes()).unwrap();
        let mut answer = String::new();
        let mut buffer = [0; 65_536];
        loop {
            // What is whole is waited for as long as it takes; then, for a moment, what should not be there.
            let patience = if is_whole(&answer) { 50 } else { 20_000 };
            stream.set_read_timeout(Some(Duration::from_millis(patience))).unwrap();
            match stream.read(&mut buffer) {
                Ok(0) => return all + &answer + "<closed>",
                Ok(length) => answer += &String::from_utf8_lossy(&buffer[..length]),
                Err(_) => break,
            }
        }
        all += &answer;
    }
    all
}

/// Whether an answer has come to its end, as that of every command but `config` shows.
fn is_whole(answer: &str) -> bool {
    let is_health = answer.starts_with("health: ") && answer.ends_with('\n');
    is_health || answer.ends_with("\n\n") || answer.ends_with("ERROR\n")
}

/// The answer to one packet behind which the client ends.
fn ask_once(at: SocketAddr, packet: &str) -> String {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.write_all(packet.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The original, as a process that ends with the test.
struct Etsy {
    child: Child,
    _directory: tempfile::TempDir,
    lines: u16,
    console: SocketAddr,
}

impl Etsy {
    fn start() -> Self {
        let package = etsy::package();
        let (lines, console) = (free_port(), free_port());
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.js");
        let text = format!(
            "{{ port: {lines}, address: '127.0.0.1', mgmt_port: {console}, mgmt_address: '127.0.0.1', \
             backends: ['./backends/console'], flushInterval: 3600000 }}"
        );
        std::fs::write(&file, text).unwrap();
        let mut node = Command::new("node");
        node.arg("stats.js").arg(&file).current_dir(package).stdout(Stdio::null()).stderr(Stdio::null());
        let child = node.spawn().expect("node starts the original");
        let console = SocketAddr::from(([127, 0, 0, 1], console));
        until("the original to listen", || TcpStream::connect(console).ok());
        Self { child, _directory: directory, lines, console }
    }
}

impl Drop for Etsy {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Lines of which both make the same.
fn lines() -> String {
    let mut text = String::new();
    // In the order of their names, which is ours; the original's is that of their coming.
    let counts = [1, 2, 5, 6, 7, 8, 12, 20, 26, 27, 40, 64];
    for (place, count) in counts.into_iter().enumerate() {
        for n in 0..count {
            let value = match (n * 7 + place) % 5 {
                0 => format!("{}", n * n * 37),
                1 => format!("{}.5", n),
                2 => format!("{}e-{}", n + 1, n % 12),
                3 => format!("0.{}1", n * 13),
                _ => format!("{}", n % 10),
            };
            text += &format!("folder.t{place:02}:{value}|ms\n");
        }
    }
    text += "t:1|ms\nt:2|ms|@0.1\n";
    text += "a-b:1|c\na.b:3|c|@0.1\nfoo.x:1|c\nfoo.y:2.5|c\nfoo.y:-1|c\nfoobar:7|c\nq_1:1e21|c\n";
    text += "9g:4|g\ng-3:1e-7|g\ng1:-4|g\ng2:123456789.25|g\ng2:+1|g\n";
    text + "bad\n"
}

#[test]
fn answers_are_the_originals_byte_for_byte() {
    let etsy = Etsy::start();
    let agent = Agent::start(&[CONSOLE, ONE_WINDOW, "store.kind=memory", "listen.workers=1"]);
    let ours = agent.address("console");
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    // Both must have what is sent once it can be read; a datagram each, so that no order is lost.
    let text = lines();
    for chunk in text.lines().collect::<Vec<_>>().chunks(100) {
        let datagram = chunk.join("\n");
        socket.send_to(datagram.as_bytes(), ("127.0.0.1", etsy.lines)).unwrap();
        socket.send_to(datagram.as_bytes(), agent.address("udp")).unwrap();
    }
    for at in [etsy.console, ours] {
        until("the last line to be read", || ask(at, &["stats\n"]).contains("bad_lines_seen: 1\n").then_some(()));
    }
    // The original's own counters are not ours.
    ask(etsy.console, &["delcounters statsd.*\n"]);
    let conversations: [&[&str]; 21] = [
        &["health\n"],
        &["health"],
        &["health down\r\n", "health\n", "health UP\n", "health x\n", "health quit\n"],
        &["HEALTH\n"],
        &["\n"],
        &["nothing at all\n"],
        &["timers\n"],
        &["gauges\n"],
        &["counters\n"],
        &["delcounters\n"],
        &["delcounters nothing foo.*\n", "counters\n"],
        &["delcounters  a.b\n", "counters\n"],
        &["delcounters t q_*\n"],
        &["delgauges g1 9g\n", "gauges\n"],
        &["delgauges .*\n", "delgauges *\n"],
        &["delgauges g-3 g2\n", "gauges\n"],
        &["deltimers folder.t0*\n"],
        &["deltimers folder.t03\n", "timers\n"],
        &["deltimers folder.*\n", "timers\n"],
        &["quit\n"],
        &["health\n", "quit now\n"],
    ];
    for packets in conversations {
        let (theirs, ours) = (ask(etsy.console, packets), ask(ours, packets));
        assert_eq!(ours, theirs, "{packets:?}");
    }
    let names = |answer: &str| -> Vec<String> {
        answer.lines().map(|line| line.split(':').next().unwrap().to_owned()).take(3).collect()
    };
    let (theirs, ours_stats) = (ask(etsy.console, &["stats\n"]), ask(ours, &["stats\n"]));
    assert_eq!(names(&ours_stats), names(&theirs));
    assert!(ours_stats.ends_with("END\n\n") && theirs.ends_with("END\n\n"));
    let (theirs, ours_help) = (ask(etsy.console, &["help\n"]), ask(ours, &["help\n"]));
    let commands = |help: &str| {
        help.strip_prefix("Commands: ").unwrap().trim_end().split(", ").map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(commands(&theirs).iter().all(|command| commands(&ours_help).contains(command)), "{theirs} {ours_help}");
    assert!(ask_once(ours, "config\n").starts_with("\nstate_dir: "));
}

#[test]
fn ours_beyond_the_originals() {
    let agent = Agent::start(&[CONSOLE, ONE_WINDOW, "store.redis.url=redis://u:secret@127.0.0.1:1"]);
    let at = agent.address("console");
    agent.datagram("s:a|s\ns:b|s\ns:a|s\nm:2|m\nm:3|m\nh:1|h\nd:2|d\nc:1|c|#k:v");
    agent.wait_for("c;k=v", "value", 1);
    // Several commands in one packet, and one without a line feed.
    let answer = ask_once(at, "sets\r\nmeters\n\ntimers\ncounters");
    let want = ["{ s: 2 }", "{ m: 5 }", "{ d: [ 2 ], h: [ 1 ] }", "{ 'c;k=v': 1 }"];
    assert_eq!(answer, want.map(|object| format!("{object}\nEND\n\n")).concat());
    let answer = ask_once(at, "delsets s\ndelmeters m\ndeltimers h d\ndelcounters c;k=v");
    let want = ["deleted: s\n", "deleted: m\n", "deleted: h\ndeleted: d\n", "deleted: c;k=v\n"];
    assert_eq!(answer, want.map(|told| format!("{told}END\n\n")).concat());
    assert!(["s", "m", "h", "d", "c;k=v"].iter().all(|key| agent.metric(key).is_none()));
    // More values than are kept as they came.
    agent.datagram((0..70).map(|n| format!("long:{n}|ms\n")).collect::<String>());
    agent.wait_for("long", "count", 70);
    let answer = ask_once(at, "timers");
    assert!(answer.contains("... 6 more items\n"), "{answer}");
    let config = ask_once(at, "config");
    assert!(
        config.contains("\nstore > redis > url: redis://u:***@127.0.0.1:1\n") && !config.contains("secret"),
        "{config}"
    );
    assert!(
        config.contains("\nexport > console > listen: 127.0.0.1:0\n") && config.contains("\nflush > percentiles: 90\n")
    );
    until("the journal's flush to be told", || {
        let stats = ask_once(at, "stats");
        let age = stats.lines().find_map(|line| line.strip_prefix("journal.last_flush: "))?;
        age.parse::<u64>().ok().filter(|age| *age < 3_600)
    });
    assert_eq!(agent.own("tallyd_console_commands_total", "command=\"delcounters\""), 1.0);
}

#[test]
fn what_is_deleted_starts_again_after_a_restart_too() {
    let agent = Agent::start(&[CONSOLE]);
    agent.datagram((0..3_000).map(|n| format!("f.c{n:04}:1|c\n")).collect::<String>() + "f:1|c\nfx:1|c\nf.g:1|g");
    agent.wait_for("f.g", "value", 1);
    let answer = ask_once(agent.address("console"), "delcounters f.*");
    assert_eq!(answer.lines().filter(|line| line.starts_with("deleted: f.c")).count(), 3_000);
    assert!(answer.ends_with("END\n\n"));
    let agent = agent.restart_after("KILL");
    agent.datagram("f.c0001:5|c\nf:1|c\nfx:1|c\nf.g:+1|g");
    for (key, value) in [("f.c0001", 5), ("f", 2), ("fx", 2), ("f.g", 2)] {
        agent.wait_for(key, "value", value);
    }
    assert!(agent.metric("f.c0002").is_none());
}

#[test]
fn what_is_deleted_is_gone_at_every_agent_that_shares_the_store() {
    let redis = Server::persistent();
    let url = redis.url();
    let fast = ["store.kind=redis", "flush.interval=100ms", "flush.window=1s", url.as_str(), CONSOLE];
    let (here, there) = (Agent::start(&fast), Agent::start(&fast));
    // One name is known to both, one only to the other.
    here.datagram("f.both:1|c\nf.kept:1|g");
    there.datagram("f.both:2|c\nf.theirs:4|c\nother:8|c");
    for (agent, key, value) in
        [(&here, "f.both", 3), (&there, "f.both", 3), (&here, "f.theirs", 4), (&here, "other", 8)]
    {
        agent.wait_for(key, "value", value);
    }
    let answer = ask_once(here.address("console"), "delcounters f.*");
    assert_eq!(answer, "deleted: f.both\ndeleted: f.theirs\nEND\n\n");
    for agent in [&here, &there] {
        until("both to be gone", || ["f.both", "f.theirs"].iter().all(|key| agent.metric(key).is_none()).then_some(()));
        agent.wait_for("f.kept", "value", 1);
        agent.wait_for("other", "value", 8);
    }
    there.datagram("f.theirs:5|c");
    here.wait_for("f.theirs", "value", 5);
    assert_eq!(ask_once(here.address("console"), "delcounters other"), "deleted: other\nEND\n\n");
    until("it to be gone", || there.metric("other").is_none().then_some(()));
}

#[test]
fn a_successor_goes_on_with_the_socket() {
    let mut agent = Agent::start(&[CONSOLE]);
    let at = agent.address("console");
    let mut open = TcpStream::connect(at).unwrap();
    assert_eq!(ask_once(at, "health down"), "health: down\n");
    // More than once: it must be passed on again by who was given it.
    for _ in 0..2 {
        agent.hand_over();
        assert_eq!(ask_once(at, "health"), "health: up\n", "the word of the one before is forgotten");
    }
    assert_eq!(open.read(&mut [0; 16]).unwrap_or(0), 0, "connections end");
    let uptime = ask_once(at, "stats");
    assert!(uptime.starts_with("uptime: "), "{uptime}");
}

#[test]
fn a_socket_of_a_unit_is_the_consoles_by_its_name_if_only_this_machine_reaches_it() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let agent = Agent::start_by(with_sockets(&[("console", &socket)]), &["store.kind=memory"]);
    assert_eq!(agent.address("console"), socket.local_addr().unwrap());
    assert_eq!(ask_once(agent.address("console"), "health"), "health: up\n");
    let open = TcpListener::bind("0.0.0.0:0").unwrap();
    let free = ["listen.udp=127.0.0.1:0", "listen.tcp=127.0.0.1:0", "http.ingest=127.0.0.1:0", "http.api=127.0.0.1:0"];
    let mut command = with_sockets(&[("console", &open)]);
    command.args(free.iter().chain(&["store.kind=memory"]).flat_map(|setting| ["--set", setting]));
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(78) && stderr.contains("a unit's socket is at 0.0.0.0"), "{stderr}");
}

#[test]
fn clients_that_are_none_are_closed() {
    let agent = Agent::start(&[CONSOLE]);
    let at = agent.address("console");
    agent.datagram("a:1|c");
    agent.wait_for("a", "value", 1);
    for (method, count) in [("POST", 1.0), ("patch", 2.0), ("M-SEARCH", 3.0), ("!#$", 4.0), ("delcounters", 5.0)] {
        let request = format!("{method} / HTTP/1.1\r\nHost: localhost\r\n\r\ndelcounters a\n");
        assert_eq!(ask_once(at, &request), "");
        assert_eq!(agent.own("tallyd_console_commands_total", "http_request"), count, "{method}");
    }
    assert_eq!(ask_once(at, "\x16\x03\x01\ndelcounters a\n"), "");
    assert_eq!(agent.own("tallyd_console_commands_total", "tls_hello"), 1.0);
    // What comes after the beginning of a request's line is not read, however late.
    let mut slow = TcpStream::connect(at).unwrap();
    slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    slow.write_all(b"POST /aaaa").unwrap();
    assert_eq!(slow.read(&mut [0; 64]).unwrap(), 0, "closed without an answer");
    // Here the pause shows by the answer to what seems to be a command.
    let mut slow = TcpStream::connect(at).unwrap();
    slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    slow.write_all(b"POST").unwrap();
    let mut answer = [0; 64];
    let length = slow.read(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"ERROR\n");
    slow.write_all(b" /aaaabbb HTTP/1.1\r\nHost: a\r\n\r\ndelcounters a\n").unwrap();
    assert_eq!(slow.read(&mut answer).unwrap_or(0), 0, "closed without an answer");
    assert!(agent.metric("a").is_some());
    let long = "x".repeat(70_000);
    assert_eq!(ask_once(at, &format!("delcounters {long}\nhealth\n")), "ERROR\nhealth: up\n");
    // As many as there may be, each known to be accepted.
    let greet = |mut stream: &TcpStream| {
        stream.write_all(b"health\n").unwrap();
        stream.read(&mut [0; 64]).unwrap_or(0) > 0
    };
    let open: Vec<_> = (0..16).map(|_| TcpStream::connect(at).unwrap()).collect();
    until("all of them to be answered", || open.iter().all(greet).then_some(()));
    assert_eq!(TcpStream::connect(at).unwrap().read(&mut [0; 64]).unwrap_or(0), 0);
    until("the refusal to be counted", || {
        (agent.own("tallyd_connections_refused_total", "listener=\"console\"") >= 1.0).then_some(())
    });
    assert_eq!(agent.own("tallyd_connections", "listener=\"console\""), 16.0);
    drop(open);
    until("the seats to be free", || (agent.own("tallyd_connections", "listener=\"console\"") == 0.0).then_some(()));
    assert_eq!(ask_once(at, "health"), "health: up\n");
}

#[test]
fn one_that_does_not_read_is_closed_and_delays_nobody() {
    const SERIES: usize = 200_000;
    let agent = Agent::start(&[CONSOLE, "store.kind=memory", "limits.new_series=1000000", "limits.idle=1h"]);
    let at = agent.address("console");
    let mut lines = agent.connect();
    for first in (0..SERIES).step_by(1_000) {
        let text: String = (first..first + 1_000).map(|n| format!("a.name.of.usual.length.{n:06}:1|c\n")).collect();
        lines.write_all(text.as_bytes()).unwrap();
    }
    agent.wait_for(&format!("a.name.of.usual.length.{:06}", SERIES - 1), "value", 1);
    let slow = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    slow.set_recv_buffer_size(4_096).unwrap();
    slow.connect(&at.into()).unwrap();
    (&slow).write_all(b"counters\n").unwrap();
    // The other one gets all of it meanwhile.
    let answer = ask_once(at, "counters");
    assert_eq!(answer.lines().filter(|line| line.starts_with("  'a.name")).count(), SERIES);
    assert!(answer.ends_with("\n}\nEND\n\n"));
    until("the slow one to be closed", || {
        (agent.own("tallyd_connections", "listener=\"console\"") == 0.0).then_some(())
    });
    drop(slow);
}

#[test]
fn those_who_ask_for_much_leave_turns_to_others() {
    const SERIES: usize = 5_000;
    let agent = Agent::start(&[CONSOLE, "store.kind=memory", "limits.new_series=1000000", "limits.idle=1h"]);
    let at = agent.address("console");
    let text: String = (0..SERIES).map(|n| format!("a.name.of.usual.length.{n:06}:1|c\n")).collect();
    agent.connect().write_all(text.as_bytes()).unwrap();
    agent.wait_for(&format!("a.name.of.usual.length.{:06}", SERIES - 1), "value", 1);
    let greedy: Vec<_> = (0..15).map(|_| TcpStream::connect(at).unwrap()).collect();
    let readers: Vec<_> = greedy
        .iter()
        .map(|stream| {
            let mut stream = stream.try_clone().unwrap();
            stream.write_all("counters\n".repeat(400).as_bytes()).unwrap();
            // It reads until the test closes the connection.
            std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()).unwrap_or(0))
        })
        .collect();
    let shown = || agent.own("tallyd_console_commands_total", "command=\"counters\"");
    until("all of them to be answered", || (shown() >= 15.0).then_some(()));
    assert_eq!(ask_once(at, "health"), "health: up\n");
    assert!(shown() < 15.0 * 400.0, "nobody was being answered any more");
    greedy.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    readers.into_iter().for_each(|reader| drop(reader.join()));
}

#[test]
fn it_is_for_this_machine_alone_unless_one_says_otherwise() {
    let check = |settings: &[&str]| {
        let mut command = tallyd();
        command.arg("check").args(settings.iter().flat_map(|setting| ["--set", setting]));
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = check(&["export.console.listen=0.0.0.0:8126"]);
    assert!(
        code == Some(78) && stderr.contains("export.console.listen = \"0.0.0.0:8126\": other machines"),
        "{stderr}"
    );
    // A token would not help, since nobody is asked for one.
    let tokens = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tokens.path(), "0123456789abcdef\n").unwrap();
    let file = format!("http.tokens.admin_file={}", tokens.path().display());
    assert_eq!(check(&["export.console.listen=0.0.0.0:8126", &file]).0, Some(78));
    assert_eq!(check(&["export.console.listen=0.0.0.0:8126", "http.insecure=true"]).0, Some(0));
    let (code, stderr) = check(&["export.console.listen=tls://127.0.0.1:8126"]);
    assert!(code == Some(78) && stderr.contains("no TLS"), "{stderr}");
    let (code, stderr) = check(&["export.console.listen=127.0.0.1:8125"]);
    assert!(code == Some(78) && stderr.contains("listen.tcp has this address"), "{stderr}");
}
