//! Graphite: what arrives there, and what becomes of it when Graphite is away, slow, or hangs up.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use socket2::{Domain, Socket, Type};

use crate::agent::{Agent, until};

/// How a sink reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Manner {
    /// All there is.
    Well,
    /// It hangs up after so many bytes of its first connection, with more unread.
    HangUp(usize),
    /// A few bytes at a time.
    Slowly,
    /// All there is, and its side is left open.
    LeaveOpen,
}

/// A place where Graphite would listen. It keeps what each connection brought to its end.
pub struct Sink {
    pub address: SocketAddr,
    brought: Arc<Mutex<Vec<Vec<u8>>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    pub fn start() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), Manner::Well)
    }

    pub fn at(address: SocketAddr, manner: Manner) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let (address, brought, over) =
            (listener.local_addr().unwrap(), Arc::<Mutex<Vec<_>>>::default(), Arc::<AtomicBool>::default());
        let (into, is_over) = (Arc::clone(&brought), Arc::clone(&over));
        let thread = thread::spawn(move || {
            let (mut manner, mut open) = (manner, Vec::new());
            for stream in listener.incoming() {
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                if manner == Manner::LeaveOpen {
                    open.push(stream.as_ref().unwrap().try_clone().unwrap());
                }
                if let Some(bytes) = read(stream.unwrap(), manner) {
                    into.lock().unwrap().push(bytes);
                }
                if matches!(manner, Manner::HangUp(_)) {
                    manner = Manner::Well;
                }
            }
        });
        Self { address, brought, over, thread: Some(thread) }
    }

    /// The setting that sends there.
    pub fn setting(&self) -> String {
        format!("export.graphite.to={}", self.address)
    }

    /// The bytes of each connection.
    fn brought(&self) -> Vec<Vec<u8>> {
        self.brought.lock().unwrap().clone()
    }

    /// The lines in the order in which they came: path, value, seconds.
    pub fn lines(&self) -> Vec<(String, String, u64)> {
        let text: String = self.brought().into_iter().map(|bytes| String::from_utf8(bytes).unwrap()).collect();
        let line = |line: &str| {
            let mut words = line.split(' ').map(str::to_owned);
            let (path, value) = (words.next().unwrap(), words.next().unwrap());
            let at = words.next().unwrap().parse().unwrap();
            assert_eq!(words.next(), None, "{line}");
            (path, value, at)
        };
        text.lines().map(line).collect()
    }

    /// The lines by their seconds and paths.
    pub fn windows(&self) -> BTreeMap<u64, BTreeMap<String, String>> {
        let mut windows: BTreeMap<u64, BTreeMap<String, String>> = BTreeMap::new();
        for (path, value, at) in self.lines() {
            windows.entry(at).or_default().insert(path, value);
        }
        windows
    }

    /// The values of a path, by their seconds.
    fn values(&self, path: &str) -> BTreeMap<u64, f64> {
        let of_path = self.lines().into_iter().filter(|(of, _, _)| of == path);
        of_path.map(|(_, value, at)| (at, value.parse().unwrap())).collect()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a connection brought, if it was read to its end.
fn read(mut stream: TcpStream, manner: Manner) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    match manner {
        Manner::Well | Manner::LeaveOpen => stream.read_to_end(&mut bytes).ok().map(|_| bytes),
        Manner::HangUp(after) => {
            let mut first = vec![0; after];
            stream.read_exact(&mut first).ok()?;
            // Something must be unread, or nobody could tell that it was not all.
            stream.peek(&mut [0]).ok()?;
            None
        }
        Manner::Slowly => {
            let mut some = [0; 32 << 10];
            loop {
                match stream.read(&mut some).ok()? {
                    0 => return Some(bytes),
                    length => bytes.extend_from_slice(&some[..length]),
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// An address where nobody listens.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

const WINDOW: &str = "flush.window=1s";

/// Windows that follow each other a second apart.
#[track_caller]
fn assert_none_is_missing(values: &BTreeMap<u64, f64>) {
    let (first, last) = (values.keys().next().unwrap(), values.keys().last().unwrap());
    assert_eq!(values.keys().copied().collect::<Vec<_>>(), (*first..=*last).collect::<Vec<_>>());
}

fn sent(agent: &Agent) -> f64 {
    agent.own("tallyd_graphite_windows_sent_total", "")
}

fn lost(agent: &Agent, reason: &str) -> f64 {
    agent.own("tallyd_graphite_windows_lost_total", &format!("reason=\"{reason}\""))
}

/// Nothing is left of its name.
const NAMELESS: &str = "{\"level\":\"\",\"name\":\"日本\",\"type\":\"COUNTER\",\"value\":3}";

#[test]
fn names_and_tags_arrive_as_etsys() {
    let sink = Sink::start();
    let settings = [
        &sink.setting(),
        WINDOW,
        "export.graphite.global_suffix=end",
        "export.graphite.prefix_stats=me",
        "protocol.name_policy=none",
    ];
    let agent = Agent::start(&settings);
    let want = [
        ("stats_counts.with_blanks-and.end;host=a_x;zone=b-c", "1"),
        ("stats.with_blanks-and.end;host=a_x;zone=b-c", "1"),
        ("stats.timers.times.mean_90.end", "3"),
        ("stats.timers.dist.upper.end", "1"),
        ("stats.gauges.level.end", "1e+30"),
        ("stats.sets.who.count.end", "1"),
        ("stats_counts.a.b_c_x_1_1_y=.end", "3"),
        ("stats_counts.me.packets_received.end", "3"),
    ];
    let lines = until("all lines in one window", || {
        let at = sink.windows().into_keys().last().unwrap_or_default();
        agent.datagram(
            "with blanks/and:1|c|#zone:b/c,host:a x\ntimes:2:4|ms\nlevel:1e30|g\nwho:me|s\nrate:1|m\ndist:1|d",
        );
        let json = ["{\"level\":\"a\",\"name\":\"b c\\nx 1 1;y=é\",\"type\":\"COUNTER\",\"value\":3}", NAMELESS];
        json.into_iter().for_each(|json| assert_eq!(agent.ingest(json).status, 200));
        let later =
            until("windows after that", || Some(sink.windows().split_off(&(at + 1))).filter(|later| later.len() > 1));
        // Where a window ended in between it is tried again.
        later
            .into_values()
            .find(|lines| lines.get("stats_counts.me.metrics_received.end").is_some_and(|count| count == "8"))
    });
    for (path, value) in want {
        assert!(lines.get(path).is_some_and(|have| have == value), "{path} {value}: {lines:#?}");
    }
    for path in ["me.numStats.end", "stats.meters.rate.count.end", "stats.meters.rate.m15_rate.end"] {
        assert!(lines.contains_key(path), "{path}: {lines:#?}");
    }
    until("the series without a name to be counted", || {
        (agent.own("tallyd_graphite_lines_lost_total", "reason=\"name\"") > 0.0).then_some(())
    });
    assert!(sink.lines().iter().all(|(path, ..)| path.is_ascii()));
}

#[test]
fn windows_wait_while_graphite_is_away() {
    let address = nobody();
    let agent = Agent::start(&[&format!("export.graphite.to={address}"), WINDOW]);
    agent.datagram("a:5|c");
    let failed = || agent.own("tallyd_graphite_failed_total", "reason=\"connect\"");
    until("some attempts", || (failed() >= 3.0).then_some(()));
    assert_eq!(agent.get("/-/ready").status, 200);
    assert_eq!(agent.own("tallyd_graphite_connected", ""), 0.0);
    assert!(agent.own("tallyd_graphite_waiting_bytes", "") > 0.0);
    agent.datagram("a:7|c");
    until("what came to be counted", || (agent.metric("a")?["value"] == 12).then_some(()));
    let sink = Sink::at(address, Manner::Well);
    let values = until("all that came", || {
        let values = sink.values("stats_counts.a");
        (values.values().sum::<f64>() == 12.0).then_some(values)
    });
    assert_none_is_missing(&values);
    until("another window", || (sink.values("stats_counts.a").len() > values.len()).then_some(()));
    assert_none_is_missing(&sink.values("stats_counts.a"));
    let order: Vec<u64> = sink.lines().into_iter().map(|(_, _, at)| at).collect();
    assert!(order.is_sorted(), "windows come in their order");
    assert_eq!(agent.own("tallyd_graphite_windows_lost_total", ""), 0.0);
    until("the log", || agent.stderr().contains("Graphite takes windows again").then_some(()));
    assert_eq!(agent.stderr().matches("Graphite does not take windows").count(), 1, "an outage is said once");
}

#[test]
fn beyond_the_bound_the_oldest_windows_go() {
    let address = nobody();
    let settings = [&format!("export.graphite.to={address}"), WINDOW, "limits.graphite_buffer=2KiB"];
    let agent = Agent::start(&settings);
    agent.datagram("a:1|g");
    until("windows to be lost", || (lost(&agent, "buffer") >= 2.0).then_some(()));
    assert!(agent.own("tallyd_graphite_waiting_bytes", "") <= 2048.0);
    let sink = Sink::at(address, Manner::Well);
    until("what was kept", || (sent(&agent) >= 2.0).then_some(()));
    assert_none_is_missing(&sink.values("stats.gauges.statsd.timestamp_lag"));
    let windows_lost = lost(&agent, "buffer");
    let lines_lost = agent.own("tallyd_graphite_lines_lost_total", "reason=\"buffer\"");
    // Those of the server itself are in each window, the lag but in the first.
    assert!(lines_lost >= windows_lost * 13.0, "{lines_lost} lines in {windows_lost} windows");
}

#[test]
fn a_window_that_was_not_read_is_sent_again() {
    let sink = Sink::at("127.0.0.1:0".parse().unwrap(), Manner::HangUp(100));
    let agent = Agent::start(&[&sink.setting(), WINDOW]);
    let lines: String = (0..500).map(|n| format!("many.{n}:1|c\n")).collect();
    agent.connect().write_all(lines.as_bytes()).unwrap();
    until("all that was sent", || {
        let sums: f64 = sink.lines().iter().filter(|line| line.0.starts_with("stats_counts.many.")).map(value).sum();
        (sums == 500.0).then_some(())
    });
    let failed = |reason| agent.own("tallyd_graphite_failed_total", reason);
    assert!(failed("reason=\"close\"") + failed("reason=\"write\"") >= 1.0);
    assert_none_is_missing(&sink.values("stats.statsd.packets_received"));
    assert_eq!(agent.own("tallyd_graphite_lines_lost_total", ""), 0.0);
}

fn value((_, value, _): &(String, String, u64)) -> f64 {
    value.parse().unwrap()
}

#[test]
fn a_slow_reader_gets_a_window_larger_than_the_bound_and_holds_nobody_up() {
    const SERIES: usize = 20_000;
    let sink = Sink::at("127.0.0.1:0".parse().unwrap(), Manner::Slowly);
    let settings = [&sink.setting(), "flush.window=10s", "limits.graphite_buffer=256KiB"];
    let agent = Agent::start(&settings);
    let mut stream = agent.connect();
    for part in 0..SERIES / 1_000 {
        let lines: String = (0..1_000).map(|n| format!("slow.{}:1|c\n", part * 1_000 + n)).collect();
        stream.write_all(lines.as_bytes()).unwrap();
    }
    let begun = Instant::now();
    let mut answers = 0;
    let window = loop {
        agent.datagram("beside:1|c");
        assert_eq!(agent.get("/-/ready").status, 200);
        answers += 1;
        let windows = sink.windows();
        let is_whole = |lines: &&BTreeMap<String, String>| {
            lines.keys().filter(|path| path.starts_with("stats_counts.slow.")).count() == SERIES
        };
        if let Some(lines) = windows.values().find(is_whole) {
            break lines.clone();
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "waited 60 s for a window with all series");
        thread::sleep(Duration::from_millis(50));
    };
    assert!(answers > 1 && window.contains_key("statsd.numStats"));
    assert_eq!(agent.own("tallyd_graphite_windows_lost_total", ""), 0.0);
    assert!(agent.own("tallyd_graphite_waiting_bytes", "") <= 256.0 * 1024.0);
}

#[test]
fn a_stop_sends_what_there_is() {
    let sink = Sink::start();
    let mut agent = Agent::start(&[&sink.setting(), "flush.window=1h"]);
    agent.datagram("a:3|c");
    agent.wait_for("a", "value", 3);
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    let values = until("the open window", || Some(sink.values("stats_counts.a")).filter(|values| !values.is_empty()));
    assert_eq!(values.values().copied().collect::<Vec<_>>(), [3.0]);
    assert!(values.keys().all(|at| at % 3_600 == 0), "{values:?}");
    assert!(!agent.stderr().contains("lost"), "{}", agent.stderr());
}

#[test]
fn a_stop_without_graphite_does_not_wait_and_says_what_is_lost() {
    let mut agent = Agent::start(&[&format!("export.graphite.to={}", nobody()), WINDOW]);
    agent.datagram("a:3|c");
    until("a window to wait", || (agent.own("tallyd_graphite_waiting_bytes", "") > 0.0).then_some(()));
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    until("the log", || agent.stderr().contains("stopped with windows that Graphite did not take").then_some(()));
}

#[test]
fn hand_overs_at_the_end_of_windows_leave_none_out() {
    const WINDOW_MS: u128 = 5_000;
    let sink = Sink::start();
    let mut agent = Agent::start(&[&sink.setting(), "flush.window=5s", "flush.delete_counters=true"]);
    // With so many series the journal is read back for a while.
    let lines: String = (0..20_000).map(|n| format!("many.{n}:1|c\n")).collect();
    agent.connect().write_all(lines.as_bytes()).unwrap();
    agent.datagram("level:3|g");
    until("all to be counted", || (agent.own("tallyd_samples_total", "tcp") == 20_000.0).then_some(()));
    until("a window with it", || (!sink.values("stats.gauges.level").is_empty()).then_some(()));
    // So long before the end of a window: it ends while a successor starts, reads the journal back, and begins to render.
    for before_ms in [300, 600, 900] {
        until("the end of a window", || {
            let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
            let left_ms = WINDOW_MS - now_ms % WINDOW_MS;
            (before_ms..before_ms + 50).contains(&left_ms).then_some(())
        });
        agent.hand_over();
    }
    let before = sent(&agent);
    until("two windows more", || (sent(&agent) >= before + 2.0).then_some(()));
    for path in ["stats.gauges.level", "stats.statsd.packets_received", "statsd.numStats"] {
        let ends: Vec<_> = sink.values(path).into_keys().collect();
        assert!(ends.iter().zip(&ends[1..]).all(|(one, next)| next - one == 5), "{path}: {ends:?}");
    }
    assert_eq!(lost(&agent, "late"), 0.0);
}

#[test]
fn windows_that_cannot_be_read_any_more_are_counted() {
    let sink = Sink::start();
    let agent = Agent::start(&[&sink.setting(), WINDOW]);
    until("a window", || (!sink.lines().is_empty()).then_some(()));
    agent.signal("STOP");
    let begun = Instant::now();
    until("some windows to end", || (begun.elapsed() > Duration::from_secs(5)).then_some(()));
    agent.signal("CONT");
    let missing = || {
        let ends: Vec<_> = sink.values("stats.statsd.packets_received").into_keys().collect();
        ends[ends.len() - 1] - ends[0] + 1 - ends.len() as u64
    };
    until("all that is missing to be counted", || {
        let late = lost(&agent, "late");
        (late > 0.0 && late == missing() as f64).then_some(())
    });
}

/// No window ends while a test runs.
const ONE_WINDOW: &str = "flush.window=36500d";

/// The values of a counter in the order in which they came, which are all for one moment.
fn counts(sink: &Sink, name: &str) -> Vec<String> {
    let path = format!("stats_counts.{name}");
    let lines: Vec<_> = sink.lines().into_iter().filter(|(of, ..)| *of == path).collect();
    assert!(lines.iter().all(|(_, _, at)| *at == lines[0].2), "{lines:?}");
    lines.into_iter().map(|(_, value, _)| value).collect()
}

#[test]
fn an_agent_to_which_nothing_came_overwrites_nothing_with_zeros() {
    let sink = Sink::start();
    let agent = Agent::start(&[&sink.setting(), ONE_WINDOW]);
    agent.datagram("first:5|c\nboth:5|c");
    agent.wait_for("both", "value", 5);
    let mut agent = agent.restart_after("TERM");
    agent.datagram("second:7|c\nboth:7|c");
    agent.wait_for("both", "value", 12);
    agent.hand_over();
    agent.datagram("both:9|c");
    agent.wait_for("both", "value", 21);
    agent.signal("TERM");
    agent.wait();
    until("the last line", || (counts(&sink, "both").len() == 3).then_some(()));
    assert_eq!(counts(&sink, "both"), ["5", "7", "9"]);
    assert_eq!((counts(&sink, "first"), counts(&sink, "second")), (vec!["5".to_owned()], vec!["7".to_owned()]));
}

#[test]
fn a_graphite_that_lets_nobody_in_holds_up_no_hand_over() {
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    // Until nobody is answered any more.
    let mut inside = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        inside.push(stream);
        assert!(inside.len() < 10);
    }
    let settings =
        [&format!("export.graphite.to={address}"), ONE_WINDOW, "limits.graphite_connect=1h", "limits.stop=1h"];
    let mut agent = Agent::start(&settings);
    agent.datagram("a:3|c");
    agent.wait_for("a", "value", 3);
    let before = agent.begin_hand_over();
    agent.datagram("a:4|c");
    agent.wait_for("a", "value", 7);
    assert!(!agent.has_ended(before), "it has what Graphite does not take");
    drop((full, inside));
    until("the one before to end", || agent.has_ended(before).then_some(()));
    until("the log", || agent.stderr().contains("stopped with windows that Graphite did not take").then_some(()));
}

#[test]
fn a_graphite_that_leaves_its_side_open_is_believed_at_a_stop() {
    let sink = Sink::at("127.0.0.1:0".parse().unwrap(), Manner::LeaveOpen);
    let mut agent = Agent::start(&[&sink.setting(), ONE_WINDOW]);
    agent.datagram("a:3|c");
    agent.wait_for("a", "value", 3);
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    assert_eq!(until("the line", || Some(counts(&sink, "a")).filter(|counts| !counts.is_empty())), ["3"]);
    assert!(!agent.stderr().contains("lost"), "{}", agent.stderr());
}

#[test]
fn a_stop_tries_again_what_was_not_read() {
    let sink = Sink::at("127.0.0.1:0".parse().unwrap(), Manner::HangUp(100));
    let mut agent = Agent::start(&[&sink.setting(), ONE_WINDOW]);
    let lines: String = (0..500).map(|n| format!("many.{n}:1|c\n")).collect();
    agent.connect().write_all(lines.as_bytes()).unwrap();
    until("all to be counted", || (agent.own("tallyd_samples_total", "tcp") == 500.0).then_some(()));
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    until("all lines", || {
        (sink.lines().iter().filter(|(path, ..)| path.starts_with("stats_counts.many.")).count() == 500).then_some(())
    });
    assert!(!agent.stderr().contains("lost"), "{}", agent.stderr());
}

#[test]
fn what_is_not_finite_is_said_in_javascripts_words() {
    let sink = Sink::start();
    let mut agent = Agent::start(&[&sink.setting(), ONE_WINDOW, "flush.weight_by_rate=true"]);
    agent.datagram("zz:3e153|ms|@0.0001\nbare:1|c|#flag,a:b");
    agent.wait_for("bare;a=b;flag", "value", 1);
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    let lines = until("the lines", || sink.windows().into_values().next());
    assert_eq!(lines.get("stats.timers.zz.sum_squares").map(String::as_str), Some("Infinity"), "{lines:#?}");
    // Carbon refuses a whole line for a tag without a value.
    assert_eq!(lines.get("stats_counts.bare;a=b").map(String::as_str), Some("1"), "{lines:#?}");
}

/// What Carbon does with a stream of pickles: each behind its length, a list of (path, (seconds, value)).
const CARBON: &str = "
import pickle, struct, sys
data = sys.stdin.buffer.read()
while data:
    length, = struct.unpack('!L', data[:4])
    for path, (seconds, value) in pickle.loads(data[4:4 + length]):
        print(path, repr(value), seconds)
    data = data[4 + length:]
";

#[test]
fn a_pickle_is_what_carbon_reads() {
    let sink = Sink::start();
    let agent = Agent::start(&[&sink.setting(), WINDOW, "export.graphite.protocol=pickle"]);
    // More than fit into one pickle.
    let lines: String = (0..3_000).map(|n| format!("many.{n}:0.5|g|#k:v\n")).collect();
    agent.connect().write_all(lines.as_bytes()).unwrap();
    until("all to be counted", || (agent.own("tallyd_samples_total", "tcp") == 3_000.0).then_some(()));
    let windows = sent(&agent);
    until("a window more", || (sent(&agent) >= windows + 2.0).then_some(()));
    let bytes = sink.brought().pop().unwrap();
    let mut carbon =
        Command::new("python3").args(["-c", CARBON]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = carbon.stdin.take().unwrap();
    let writer = thread::spawn(move || stdin.write_all(&bytes));
    let output = carbon.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().filter(|line| line.starts_with("stats.gauges.many.")).count(), 3_000);
    assert!(text.lines().any(|line| line.starts_with("stats.gauges.many.2999;k=v 0.5 ")), "{text}");
}
