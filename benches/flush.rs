//! What a flush costs: into the journal, and on into a Redis, beside the same calls pushed by a plain client.
//!
//! ```sh
//! cargo bench --bench flush                             # 100,000 changed series: three minutes
//! cargo bench --bench flush -- --series 1000000         # ten times as many
//! ```
//!
//! The parts are the library's, in this process: a worker, the fold, the journal in a temporary directory, the
//! shipping. Every second each series has changed once, by one line that the worker was given from memory, and a flush
//! is due. Every series is known since a first flush, whose cost stands in lines of its own.
//!
//! - *CPU* is what all threads but the bench's own ran from the seal until the flush was committed: the fold, the
//!   encoding and the transaction. The seal itself is the bench's (see `seal`), and so is the reading of the lines (see
//!   `ingest`).
//! - *Wall* is the time between the same two moments, so the disk's time for making it durable is in it.
//! - *Shipping* is the time from the commit until the store has acknowledged every batch: reading them from the outbox,
//!   encoding the calls, and the store's own work, most of it.
//!
//! The limit of shipping are the same calls: what tallyd sends to a first `redis-server` is kept by a proxy, and its
//! very bytes are sent to another one, all calls of a flush at once, by a client that does nothing but count the
//! answers. Both servers end up with as many keys and samples, or the bench fails.
//!
//! Beside it stands `redis-benchmark` with the same script and one of these batches, again and again. Each call has to
//! bear the sequence after that of the one before, which `redis-benchmark` can't give it; so the script it calls first
//! sets the sequence back, one write more for some hundred operations. It writes the same few hundred keys each time,
//! which the caches like better than what tallyd does. The goal is seven tenths of the rate of either.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a bench is a program for its own terminal"
)]

mod load;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use load::clock::{PATIENCE, process_time, thread_time, until};
use load::engine::{Engine, Setup};
use load::process::Redis;
use load::report::{self, Goal, Line};
use load::{Arguments, Load, Packets, median_of};
use tallyd::clock;
use tallyd::sample::SeriesKey;
use tallyd::store::journal::{self, Journal};
use tallyd::store::{partition, redis, ship};
use tallyd::units::Time;
use tempfile::TempDir;

/// Milliseconds of one core that a flush of 100,000 changed series may take.
const CPU_MAX: f64 = 250.0;

/// Between flushes; of a million series, a second would not do.
const INTERVAL: u64 = 1;
const INTERVAL_OF_MANY: u64 = 10;

fn main() {
    let arguments = Arguments::read();
    report::head();
    for mixed in [false, true] {
        for series in arguments.series(&[100_000]) {
            let load = Load { mixed, ..Load::counters(series) };
            let name = format!("{}, {series} changed series", if mixed { "mixed" } else { "counters" });
            if arguments.want(&format!("journal, {name}")) {
                into_journal(&name, load, arguments.rounds(7, 3));
            }
            if arguments.want(&format!("redis, {name}")) {
                into_redis(&name, load, arguments.rounds(5, 2));
            }
        }
    }
}

/// A worker with a fold and a journal, and what it is told each second.
struct Agent {
    engine: Engine,
    journal: Arc<Journal>,
    interval_ms: u64,
    packets: Packets,
    _directory: TempDir,
}

/// What a flush took, in seconds.
struct Flush {
    cpu: f64,
    wall: f64,
}

impl Agent {
    fn start(load: Load, is_remote: bool, on_commit: impl Fn(u64) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let limits = journal::Limits::default();
        let (journal, _) =
            Journal::open(directory.path(), &journal::Config::default(), &limits, is_remote).expect("a journal");
        let journal = Arc::new(journal);
        let interval = Time::secs(if load.series > 200_000 { INTERVAL_OF_MANY } else { INTERVAL });
        let engine = Engine::start(Setup {
            interval,
            journal: Some(Arc::clone(&journal)),
            is_remote,
            on_commit: Box::new(move |written| on_commit(written.flush)),
            ..Setup::default()
        });
        let interval_ms = interval.as_millis();
        Self { engine, journal, interval_ms, packets: load.each_once(1), _directory: directory }
    }

    /// Changes every series and waits until a flush of all that is committed.
    fn flush(&mut self) -> Flush {
        // Just after a seal, so that there is time until the next one.
        self.seal_when_due();
        self.packets.iter().for_each(|packet| self.engine.datagram(packet));
        let others = || (process_time() - thread_time()).as_secs_f64();
        let due_ms = (clock::wall_ms() / self.interval_ms + 1) * self.interval_ms;
        let (ran, begun) = (others(), Instant::now());
        let early = Duration::from_millis(due_ms.saturating_sub(clock::wall_ms()));
        self.seal_when_due();
        until("a flush", || (self.engine.flushed_until_ms() >= due_ms).then_some(()));
        Flush { cpu: others() - ran, wall: begun.elapsed().saturating_sub(early).as_secs_f64() }
    }

    /// Waits for the time of the next seal, and takes it.
    fn seal_when_due(&mut self) {
        sleep(Duration::from_millis(self.interval_ms - clock::wall_ms() % self.interval_ms));
        self.engine.turn();
    }
}

fn into_journal(name: &str, load: Load, rounds: usize) {
    let mut agent = Agent::start(load, false, |_| {});
    let first = agent.flush();
    let rounds: Vec<Flush> = (0..rounds).map(|_| agent.flush()).collect();
    assert_eq!(agent.journal.sizes().totals, load.series as u64, "a series is missing");
    let line = |what: &str, seconds: f64, goal: bool| {
        let name = format!("flush, journal, {what}, {name}");
        let line = Line::new(&name, seconds * 1e3, "ms");
        if goal { line.goal(Goal::AtMost(CPU_MAX)).print() } else { line.print() }
    };
    line("CPU", median_of(&rounds, |flush| flush.cpu), load.series == 100_000);
    line("wall", median_of(&rounds, |flush| flush.wall), false);
    line("CPU of the first", first.cpu, false);
    line("wall of the first", first.wall, false);
}

/// An agent that ships to a Redis.
struct Shipping {
    agent: Agent,
    ship: Option<ship::Handle>,
}

impl Shipping {
    fn start(load: Load, store: SocketAddr) -> Self {
        let bell: Arc<OnceLock<ship::Bell>> = Arc::default();
        let rung = Arc::clone(&bell);
        let agent = Agent::start(load, true, move |_| {
            if let Some(bell) = rung.get() {
                bell.ring();
            }
        });
        let parts = ship::Parts {
            journal: Arc::clone(&agent.journal),
            config: redis::Config { url: format!("redis://{store}"), ..redis::Config::default() },
            limits: redis::Limits::default(),
            expire: journal::Limits::default().store_expire,
            on_deleted: Arc::new(|_| {}),
        };
        let ship = ship::start(parts).expect("a thread that ships");
        bell.get_or_init(|| ship.bell());
        until("the store to be claimed", || ship.status().connected.then_some(()));
        Self { agent, ship: Some(ship) }
    }

    /// Flushes, and waits until the store has all of it: seconds from the commit, and of processor time of all threads
    /// but this one.
    fn round(&mut self) -> Flush {
        self.agent.flush();
        let others = || (process_time() - thread_time()).as_secs_f64();
        let (ran, begun) = (others(), Instant::now());
        until("the store to acknowledge", || (self.agent.journal.sizes().unacknowledged == 0).then_some(()));
        Flush { cpu: others() - ran, wall: begun.elapsed().as_secs_f64() }
    }
}

impl Drop for Shipping {
    fn drop(&mut self) {
        if let Some(ship) = self.ship.take() {
            ship.stop(Instant::now() + PATIENCE);
        }
    }
}

fn into_redis(name: &str, load: Load, rounds: usize) {
    let Some(servers) = [(); 3].map(|()| Redis::start()).into_iter().collect::<Option<Vec<_>>>() else {
        eprintln!("flush: there is no redis-server here (packaging/setup.sh tests installs it); its rows are left out");
        return;
    };
    let calls = record(load, servers[0].address, rounds);
    let mut shipping = Shipping::start(load, servers[1].address);
    let mut client = Client::connect(servers[2].address);
    // The first flush makes the keys.
    shipping.round();
    client.push(&calls[0]);
    let times: Vec<(Flush, f64)> = calls[1..].iter().map(|calls| (shipping.round(), client.push(calls))).collect();
    assert_eq!(holds(servers[1].address), holds(servers[2].address), "the client's calls did something else");
    let rate = |seconds: f64| load.series as f64 / seconds / 1e3;
    Line::new(&format!("flush, redis, {name}"), rate(median_of(&times, |(ship, _)| ship.wall)), "k series/s")
        .beside(rate(median_of(&times, |(_, client)| *client)), median_of(&times, |(ship, client)| client / ship.wall))
        .ratio_goal(Goal::AtLeast(0.7))
        .print();
    if let Some(benchmark) = redis_benchmark(&calls) {
        let ship = rate(median_of(&times, |(ship, _)| ship.wall));
        Line::new(&format!("flush, redis, beside redis-benchmark, {name}"), ship, "k series/s")
            .beside(benchmark / 1e3, ship * 1e3 / benchmark)
            .ratio_goal(Goal::AtLeast(0.7))
            .print();
    }
    let cpu = median_of(&times, |(ship, _)| ship.cpu * 1e3);
    Line::new(&format!("flush, redis, CPU to ship, {name}"), cpu, "ms").print();
}

/// How many operations a second `redis-benchmark` gets applied by the script and with one batch of what was recorded, on
/// as many connections as tallyd has requests under way; nothing where it is not installed.
fn redis_benchmark(calls: &[Vec<u8>]) -> Option<f64> {
    let server = Redis::start()?;
    let words: Vec<Vec<String>> = calls.iter().flat_map(|calls| words_of(calls)).collect();
    let says = |word: Option<&String>, what: &str| word.is_some_and(|word| word.contains(what));
    let script = words.iter().find(|words| words[0] == "SCRIPT" && says(words.last(), "Applies a batch"))?.last()?;
    let mut client = Client::connect(server.address);
    let digest = client.ask(&["SCRIPT", "LOAD", script]).trim().to_owned();
    // The last batch that was sent: its keys are known by then, and a batch that makes keys is another thing.
    let batch = words.iter().rfind(|words| words[0] == "EVALSHA" && words[1] == digest)?;
    let keys: usize = batch[2].parse().expect("a number of keys");
    let (seq, arguments) = (&batch[3], &batch[3 + keys..]);
    let (agent, owner) = (&arguments[0], &arguments[1]);
    client.ask(&["HSET", seq, &format!("{agent}:owner"), owner]);
    let set_back = format!("redis.call('HSET', KEYS[1], ARGV[1], ARGV[4])\n{script}");
    let digest = client.ask(&["SCRIPT", "LOAD", &set_back]).trim().to_owned();
    let rate = |rounds: &str| {
        let mut benchmark = Command::new("redis-benchmark");
        benchmark.args(["-h", "127.0.0.1", "-p", &server.address.port().to_string(), "-c", "32", "--csv"]);
        benchmark.args(["-n", rounds, "EVALSHA", &digest]).args(&batch[2..]);
        let output = String::from_utf8(benchmark.output().ok()?.stdout).ok()?;
        // The name of the test is the whole call; seven figures stand behind it, the first of them the rate.
        let figure = output.lines().last()?.rsplit(',').nth(6)?.trim_matches('"').parse::<f64>().ok()?;
        Some(figure * (keys - 3) as f64)
    };
    // The first makes the keys.
    rate("32")?;
    let rates: Vec<f64> = (0..5).map(|_| rate("512")).collect::<Option<_>>()?;
    let samples = client.ask(&["HGET", &batch[6], "updateTime"]);
    assert!(samples.trim().parse::<u64>().is_ok(), "the batch was not applied: {samples}");
    Some(median_of(&rates, |rate| *rate))
}

/// Whole calls as their words.
fn words_of(mut calls: &[u8]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    while !calls.is_empty() {
        let mut line = String::new();
        let mut length = |calls: &mut &[u8]| {
            line.clear();
            calls.read_line(&mut line).expect("a line");
            line[1..].trim_end().parse::<usize>().expect("a length")
        };
        let count = length(&mut calls);
        let word = |_| {
            let bytes = length(&mut calls);
            let (word, rest) = calls.split_at(bytes);
            calls = &rest[2..];
            String::from_utf8(word.to_vec()).expect("text")
        };
        found.push((0..count).map(word).collect());
    }
    found
}

/// What an agent sends to a store, cut after each flush; the first part has what comes before it as well.
fn record(load: Load, store: SocketAddr, rounds: usize) -> Vec<Vec<u8>> {
    let proxy = Proxy::start(store);
    let mut shipping = Shipping::start(load, proxy.address);
    (0..=rounds)
        .map(|_| {
            shipping.round();
            proxy.take()
        })
        .collect()
}

/// Passes one connection on and keeps what the client sends.
struct Proxy {
    address: SocketAddr,
    sent: Arc<Mutex<Vec<u8>>>,
}

impl Proxy {
    fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("a bound socket");
        let sent = Arc::new(Mutex::new(Vec::new()));
        let keeps = Arc::clone(&sent);
        // Both threads end with the connection.
        thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a client");
            let mut server = TcpStream::connect(to).expect("a server");
            let (mut answers, mut back) =
                (server.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
            thread::spawn(move || io::copy(&mut answers, &mut back));
            let mut piece = vec![0; 64 << 10];
            while let Ok(count @ 1..) = client.read(&mut piece) {
                keeps.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&piece[..count]);
                server.write_all(&piece[..count]).expect("a server that reads");
            }
        });
        Self { address, sent }
    }

    /// The whole calls that were sent since they were taken last.
    fn take(&self) -> Vec<u8> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, bytes) = whole(&sent);
        sent.drain(..bytes).collect()
    }
}

/// The plain client.
struct Client {
    answers: BufReader<TcpStream>,
}

impl Client {
    fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).expect("a server");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Self { answers: BufReader::with_capacity(64 << 10, stream) }
    }

    /// Sends calls all at once: seconds until every one is answered.
    fn push(&mut self, calls: &[u8]) -> f64 {
        let (count, _) = whole(calls);
        let mut stream = self.answers.get_ref().try_clone().expect("a socket");
        let begun = Instant::now();
        thread::scope(|scope| {
            scope.spawn(move || stream.write_all(calls).expect("a server that reads"));
            (0..count).for_each(|_| pass_over(&mut self.answers).expect("an answer to each call"));
        });
        begun.elapsed().as_secs_f64()
    }

    /// The last line of the answer to one call.
    fn ask(&mut self, words: &[&str]) -> String {
        let count = words.len();
        let words: String = words.iter().map(|word| format!("${}\r\n{word}\r\n", word.len())).collect();
        let call = format!("*{}\r\n{words}", count);
        self.answers.get_mut().write_all(call.as_bytes()).expect("a server that reads");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("an answer");
        if answer.starts_with('$') {
            answer.clear();
            self.answers.read_line(&mut answer).expect("an answer");
        }
        answer
    }
}

/// How many keys a store has, and how many samples one of its series.
fn holds(store: SocketAddr) -> [String; 2] {
    let key = SeriesKey::from_canonical("service.endpoint.metric0000000");
    let series = format!("tallyd:{{{:03}}}:s:c:{key}", partition(&key));
    let mut client = Client::connect(store);
    [client.ask(&["DBSIZE"]), client.ask(&["HGET", &series, "samples"])]
}

/// How many whole calls there are, and how many bytes they have.
fn whole(calls: &[u8]) -> (usize, usize) {
    let (mut rest, mut found) = (calls, (0, 0));
    while pass_over(&mut rest).is_ok() {
        found = (found.0 + 1, calls.len() - rest.len());
    }
    found
}

/// Reads one value of the Redis protocol and forgets it. What a server says against a call is a value as well: an older
/// one knows not all that a connection begins with.
fn pass_over(input: &mut impl BufRead) -> io::Result<()> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    if !line.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (what, count) = line.split_at(1);
    let count = || count.trim_end().parse::<i64>().map_err(io::Error::other);
    match what {
        "*" => (0..count()?).try_for_each(|_| pass_over(input)),
        "$" if count()? >= 0 => {
            let length = count()? as u64 + 2;
            let copied = io::copy(&mut input.take(length), &mut io::sink())?;
            if copied == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
        }
        "$" | "+" | "-" | ":" | "_" => Ok(()),
        _ => Err(io::Error::other(line)),
    }
}
