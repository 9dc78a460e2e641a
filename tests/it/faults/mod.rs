//! Faults: whatever breaks, and whenever, nothing is lost without a count and nothing counts twice.
//!
//! Here stand a wire to Redis that fails as it is told, a load whose sums are known, and [`exact`], which checks from
//! outside that `accepted = store + outbox + ledger + lost{reason}`. The faults themselves are in the files beside it.

mod cluster;
mod copies;
mod journal;
mod keys;
mod killed;
mod server;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::json;

use crate::agent::{Agent, PATIENCE, same, until};
use crate::redis_servers::Server;

/// Settings of an agent that ships to a Redis often, and soon finds out that it is gone.
fn shipping(url: &str) -> Vec<String> {
    let rest = [
        "store.kind=redis",
        "flush.interval=100ms",
        "flush.window=1s",
        "limits.redis_reply=1s",
        "limits.redis_connect=1s",
    ];
    std::iter::once(url).chain(rest).map(str::to_owned).collect()
}

fn start(url: &str) -> Agent {
    begin(&shipping(url))
}

fn begin(settings: &[String]) -> Agent {
    Agent::start(&settings.iter().map(String::as_str).collect::<Vec<_>>())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// What one series of the load has, in the fields that add up: those of JSON and of Redis.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Sums {
    /// Readings: Server' `samples` or `n`.
    samples: f64,
    /// Increments, or the sum of values or marks.
    sum: f64,
    /// Decrements.
    less: f64,
}

/// What a sender was told to be accepted, by wire letter and name; of sets the members.
#[derive(Default)]
struct Load {
    sent: Mutex<BTreeMap<(&'static str, String), Sums>>,
    members: Mutex<BTreeSet<u64>>,
    requests: AtomicU64,
    /// Samples of sets that were accepted.
    of_sets: AtomicU64,
}

impl Load {
    /// The records of the `i`th request, over several kinds and partitions.
    fn body(i: u64) -> String {
        json!([
            {"name": format!("load.c{}", i % 16), "type": "COUNTER", "value": i % 7 + 1},
            {"name": "load.d", "type": "COUNTER", "values": [i % 5 + 1, -((i % 3) as f64) - 1.0]},
            {"name": "load.t", "type": "TIMER", "value": i % 11},
            {"name": "load.m", "type": "METER", "value": i % 4 + 1},
            {"name": "load.h", "type": "HISTOGRAM", "value": (i % 13) as f64 / 4.0},
            {"name": "load.s", "type": "SET", "value": (i % 50).to_string()},
        ])
        .to_string()
    }

    /// Sends one request, which must be accepted whole.
    fn send(&self, agent: &Agent) {
        let i = self.requests.fetch_add(1, Ordering::SeqCst);
        let answer = agent.ingest(Self::body(i));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(same(&answer.json()["rejected"], &json!(0)), "{}", answer.text());
        self.accepted(i);
    }

    /// Counts a counter up by one.
    fn count(&self, agent: &Agent, name: &str) {
        let answer = agent.ingest(json!({"name": name, "type": "COUNTER", "value": 1}).to_string());
        assert_eq!(answer.status, 200, "{}", answer.text());
        self.add("c", name, 1.0, 1.0, 0.0);
    }

    fn add(&self, letter: &'static str, name: &str, samples: f64, sum: f64, less: f64) {
        let mut sent = locked(&self.sent);
        let sums = sent.entry((letter, name.to_owned())).or_default();
        (sums.samples, sums.sum, sums.less) = (sums.samples + samples, sums.sum + sum, sums.less + less);
    }

    fn accepted(&self, i: u64) {
        let add = |letter, name: &str, samples, sum, less| self.add(letter, name, samples, sum, less);
        add("c", &format!("load.c{}", i % 16), 1.0, (i % 7 + 1) as f64, 0.0);
        add("c", "load.d", 2.0, (i % 5 + 1) as f64, (i % 3 + 1) as f64);
        add("ms", "load.t", 1.0, (i % 11) as f64, 0.0);
        add("m", "load.m", 1.0, (i % 4 + 1) as f64, 0.0);
        add("h", "load.h", 1.0, (i % 13) as f64 / 4.0, 0.0);
        locked(&self.members).insert(i % 50);
        self.of_sets.fetch_add(1, Ordering::SeqCst);
    }

    fn send_all(&self, agent: &Agent, requests: u64) {
        (0..requests).for_each(|_| self.send(agent));
    }

    /// Sends from two threads, all the time that a fault takes and a little longer.
    fn during<T>(&self, agent: &Agent, fault: impl FnOnce() -> T) -> T {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !ended.load(Ordering::Relaxed) {
                        self.send(agent);
                    }
                });
            }
            let so_far = || self.requests.load(Ordering::SeqCst);
            let more = |than: u64| until("the load to go on", || (so_far() > than + 20).then_some(()));
            more(so_far());
            let done = fault();
            more(so_far());
            ended.store(true, Ordering::Relaxed);
            done
        })
    }

    /// Takes a series out of the sums.
    fn forget(&self, name: &str) {
        locked(&self.sent).retain(|(_, sent), _| sent != name);
    }

    /// All samples but those of sets, which keep members.
    fn samples(&self) -> f64 {
        locked(&self.sent).values().map(|sums| sums.samples).sum()
    }
}

/// Where series are stored: one server, or several that share them.
trait Store {
    /// The ports of all that have some.
    fn ports(&self) -> Vec<u16>;
}

impl Store for Server {
    fn ports(&self) -> Vec<u16> {
        vec![self.port]
    }
}

/// What Redis has of the load, by wire letter and name, as redis-cli reads it; and how many members.
fn stored(store: &impl Store) -> (BTreeMap<(String, String), Sums>, u64) {
    let all = store.ports().into_iter().map(|port| {
        let names = batch(port, "KEYS tallyd:*:s:*\n");
        let names = names.lines().filter(|name| !name.is_empty());
        batch(port, &names.map(|name| format!("ECHO @{name}\nHGETALL {name}\n")).collect::<String>())
    });
    let all: String = all.collect();
    let (mut found, mut members) = (BTreeMap::new(), 0);
    for block in all.split('@').skip(1) {
        let mut lines = block.lines();
        let name = lines.next().unwrap();
        let Some((_, series)) = name.split_once("}:s:") else { continue };
        let (letter, name) = series.split_once(':').unwrap();
        let words: Vec<_> = lines.collect();
        let field = |wanted: &str| {
            let pair = words.chunks_exact(2).find(|pair| pair[0] == wanted);
            // A spoilt one has nothing of ours.
            pair.and_then(|pair| pair[1].parse::<f64>().ok()).unwrap_or(0.0)
        };
        let sum = |name: &str| field(name) + field(&format!("{name}frac"));
        let sums = match letter {
            "c" => Sums { samples: field("samples"), sum: sum("increments"), less: sum("decrements") },
            "m" => Sums { samples: field("samples"), sum: sum("count"), less: 0.0 },
            "s" => {
                members = field("members") as u64;
                continue;
            }
            _ => Sums { samples: field("n"), sum: sum("sum"), less: 0.0 },
        };
        found.insert((letter.to_owned(), name.to_owned()), sums);
    }
    (found, members)
}

/// What redis-cli prints for commands that it reads line by line.
fn batch(port: u16, commands: &str) -> String {
    let mut cli = Command::new("redis-cli")
        .args(["-p", &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = cli.stdin.take().unwrap();
    let commands = commands.to_owned();
    let writing = std::thread::spawn(move || input.write_all(commands.as_bytes()));
    let output = cli.wait_with_output().unwrap();
    // It may have ended before it read all, where the server is gone.
    drop(writing.join().unwrap());
    String::from_utf8(output.stdout).unwrap()
}

/// What Redis lacks of a load, all series together.
fn missing(redis: &impl Store, load: &Load) -> Sums {
    let (found, _) = stored(redis);
    let mut lacks = Sums::default();
    for ((letter, name), sent) in &*locked(&load.sent) {
        let has = found.get(&((*letter).to_owned(), name.clone())).copied().unwrap_or_default();
        lacks.samples += sent.samples - has.samples;
        lacks.sum += sent.sum - has.sum;
        lacks.less += sent.less - has.less;
    }
    lacks
}

/// Checks that once all is shipped the store has what was accepted, less what is counted as lost:
/// `accepted = store + outbox + ledger + lost{reason}` with nothing in the outbox and nothing unflushed.
#[track_caller]
fn exact(agents: &[&Agent], redis: &impl Store, load: &Load) {
    let lost = || agents.iter().map(|agent| agent.own("tallyd_lost_samples_total", "")).sum::<f64>();
    // What the sender knows is what the agents say.
    let of_sets = load.of_sets.load(Ordering::SeqCst) as f64;
    let counted: f64 = agents.iter().map(|agent| agent.own("tallyd_samples_total", "listener=\"http\"")).sum();
    assert_eq!(counted, load.samples() + of_sets, "samples accepted, as the agents count them");
    settled(agents, redis, load, lost);
}

/// The same, where an agent has been started again since and its own counters began anew: `lost` says what all lost.
#[track_caller]
fn settled(agents: &[&Agent], redis: &impl Store, load: &Load, lost: impl Fn() -> f64) {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let lacks = missing(redis, load);
        let lost = lost();
        let unsent: f64 = agents.iter().map(|agent| agent.own("tallyd_outbox_unsent_batches", "")).sum();
        if unsent == 0.0 && lacks.samples == lost {
            break;
        }
        let ahead = std::time::Instant::now() < deadline;
        assert!(ahead, "the store lacks {lacks:?}, {lost} samples are counted as lost, {unsent} batches are unsent");
        std::thread::sleep(Duration::from_millis(20));
    }
    if lost() == 0.0 {
        all_is_there(redis, load);
    }
    // Whoever asks an agent is told the same, as soon as it has heard of all; of a spoilt key it tells its own figures.
    let (mut found, _) = stored(redis);
    found.retain(|(_, name), sums| locked(&load.sent).iter().any(|((_, sent), all)| sent == name && all == sums));
    for (agent, ((letter, name), sums)) in agents.iter().flat_map(|agent| found.iter().map(move |one| (agent, one))) {
        match letter.as_str() {
            "c" => agent.wait_for(name, "value", sums.sum - sums.less),
            "m" => agent.wait_for(name, "count", sums.sum),
            _ => agent.wait_for(name, "sum", sums.sum),
        }
    }
}

/// Checks the same while batches wait for the store: what it has, what waits and what is lost are what was accepted.
#[track_caller]
fn balanced(agent: &Agent, redis: &impl Store, load: &Load) {
    let own = |name: &str| agent.own(name, "");
    let waits = until("batches to wait", || Some(own("tallyd_outbox_unsent_samples")).filter(|waits| *waits > 0.0));
    until(&format!("the sums to agree, {waits} samples waiting at first"), || {
        let kept = own("tallyd_outbox_unsent_samples") + own("tallyd_lost_samples_total");
        (missing(redis, load).samples == kept).then_some(())
    });
    // The ledger has all that was accepted, whatever becomes of the store.
    for ((letter, name), sums) in &*locked(&load.sent) {
        let metric = agent.get(&format!("/data/metrics/{name}?scope=local")).json();
        let (field, want) = match *letter {
            "c" => ("value", sums.sum - sums.less),
            "m" => ("count", sums.sum),
            _ => ("sum", sums.sum),
        };
        assert!(same(&metric[field], &json!(want)), "{name}: {metric}, sent {sums:?}");
    }
}

/// Every series is as it was sent, to the last digit.
#[track_caller]
fn all_is_there(redis: &impl Store, load: &Load) {
    let (found, members) = stored(redis);
    let sent: BTreeMap<_, _> =
        locked(&load.sent).iter().map(|((letter, name), sums)| (((*letter).to_owned(), name.clone()), *sums)).collect();
    assert_eq!(found, sent);
    assert_eq!(members as usize, locked(&load.members).len());
}

/// Sends a request and gives the status, or nothing when no whole answer came.
fn post(to: SocketAddr, path: &str, headers: &str, body: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(to).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let length = body.len();
    let head = format!("POST {path} HTTP/1.0\r\nHost: {to}\r\nContent-Length: {length}\r\n{headers}\r\n");
    stream.write_all((head + body).as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("\r\n\r\n").then(|| answer.split(' ').nth(1)?.parse().ok()).flatten()
}

/// Numbers for instants: the same in each run of a test, so that what it found is found again.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Forwards connections to a server, until it is told to forward no answers, to hold requests back, or to cut.
struct Wire {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    lines: Mutex<Vec<Line>>,
    cut: Mutex<Option<Cut>>,
    /// How many cuts there were, and the bytes of the message that was cut last.
    cuts: AtomicU64,
    length: AtomicU64,
}

/// Where the next message of a kind is cut off, on whatever connection it comes.
#[derive(Clone, Copy)]
struct Cut {
    message: Message,
    /// So many bytes of it arrive; or all, if it has no more.
    after: u64,
}

/// A message that is told by a text in it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Message {
    /// A batch with a counter.
    Batch,
    /// The answer to a batch that was applied.
    Applied,
}

impl Message {
    /// Where it stands in bytes of a connection.
    fn find(self, bytes: &[u8]) -> Option<std::ops::Range<usize>> {
        let text: &[u8] = match self {
            Self::Batch => b"}:s:c:",
            Self::Applied => b"applied\r\n",
        };
        let at = bytes.windows(text.len()).position(|window| window == text)?;
        // Both are arrays, which begin with an asterisk.
        let begin = bytes[..at].iter().rposition(|byte| *byte == b'*')?;
        let next = match self {
            Self::Batch => bytes[at..].iter().position(|byte| *byte == b'*'),
            // It has arrays inside.
            Self::Applied => None,
        };
        Some(begin..next.map_or(bytes.len(), |next| at + next))
    }
}

/// One forwarded connection.
struct Line {
    agent: TcpStream,
    server: TcpStream,
    requests: Arc<Direction>,
    answers: Arc<Direction>,
}

/// What happens to bytes on their way.
#[derive(Default)]
struct Direction {
    drops: AtomicBool,
    holds: AtomicBool,
    /// Bytes that came in.
    seen: AtomicU64,
}

impl Wire {
    fn to(redis: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Self { port: listener.local_addr().unwrap().port(), shared: Arc::default() };
        let (shared, target) = (Arc::clone(&wire.shared), redis.port);
        std::thread::spawn(move || {
            for agent in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let line = Line { agent, server, requests: Arc::default(), answers: Arc::default() };
                forward(&line.agent, &line.server, &line.requests, &shared);
                forward(&line.server, &line.agent, &line.answers, &shared);
                locked(&shared.lines).push(line);
            }
        });
        wire
    }

    fn url(&self) -> String {
        format!("store.redis.url=redis://127.0.0.1:{}", self.port)
    }

    /// Cuts the next message of a kind after so many bytes, and waits for that. Answers how long it was.
    fn cut_next(&self, message: Message, after: u64, send: impl FnOnce()) -> u64 {
        let before = self.shared.cuts.load(Ordering::SeqCst);
        *locked(&self.shared.cut) = Some(Cut { message, after });
        send();
        until(&format!("the cut of a message {message:?} after {after} bytes"), || {
            (self.shared.cuts.load(Ordering::SeqCst) > before).then_some(())
        });
        self.shared.length.load(Ordering::SeqCst)
    }

    /// From now on no answer comes back on the connections there are.
    fn silence(&self) {
        locked(&self.shared.lines).iter().for_each(|line| line.answers.drops.store(true, Ordering::SeqCst));
    }

    /// Ends all connections.
    fn cut(&self) {
        locked(&self.shared.lines).drain(..).for_each(|line| line.cut());
    }

    /// Takes the connections there are out of the list, with their requests held back.
    fn hold(&self) -> Vec<Line> {
        let lines: Vec<_> = locked(&self.shared.lines).drain(..).collect();
        lines.iter().for_each(|line| line.requests.holds.store(true, Ordering::SeqCst));
        lines
    }
}

impl Line {
    fn cut(&self) {
        // They may have ended already.
        drop(self.agent.shutdown(Shutdown::Both));
        drop(self.server.shutdown(Shutdown::Both));
    }
}

impl Shared {
    /// Where these bytes are to end, if the connection is to be cut in them.
    fn cut_in(&self, bytes: &[u8]) -> Option<(usize, Cut)> {
        let mut cut = locked(&self.cut);
        let found = (*cut)?.message.find(bytes)?;
        let taken = cut.take()?;
        self.length.store(found.len() as u64, Ordering::SeqCst);
        Some((found.start + found.len().min(taken.after as usize), taken))
    }
}

/// Copies bytes on a thread of its own. What is held back still goes on after the sender has hung up.
fn forward(from: &TcpStream, to: &TcpStream, direction: &Arc<Direction>, shared: &Arc<Shared>) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let (direction, shared) = (Arc::clone(direction), Arc::clone(shared));
    std::thread::spawn(move || {
        let mut bytes = [0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            direction.seen.fetch_add(length as u64, Ordering::SeqCst);
            let end = shared.cut_in(&bytes[..length]);
            until("what is held back to be let go", || (!direction.holds.load(Ordering::SeqCst)).then_some(()));
            let bytes = &bytes[..end.map_or(length, |(end, _)| end)];
            if !direction.drops.load(Ordering::SeqCst) && to.write_all(bytes).is_err() {
                // It was cut before: the message comes again on another connection.
                if let Some((_, cut)) = end {
                    *locked(&shared.cut) = Some(cut);
                }
                break;
            }
            if end.is_some() {
                // Both ends learn of it, and what was written before still arrives.
                drop(to.shutdown(Shutdown::Write));
                drop(from.shutdown(Shutdown::Both));
                shared.cuts.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
        drop(to.shutdown(Shutdown::Write));
    });
}
