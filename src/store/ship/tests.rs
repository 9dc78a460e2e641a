//! Agents that ship into a real Redis through a wire that fails: in the end the store has what was flushed, once.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tempfile::TempDir;

use super::super::redis::RedisReader;
use super::super::redis::server::{Server, wait_for};
use super::*;
use crate::aggregate::ledger::{Changed, Series, Shipped, State, Total};
use crate::aggregate::shard::SeriesId;
use crate::aggregate::{Aggregate, Counter, Sum};
use crate::sample::{Kind, SeriesKey};

const NOW: u64 = 1_764_000_000_000;

/// Forwards connections to a server, until it is told to forward no answers, to hold requests back, or to cut.
struct Wire {
    port: u16,
    lines: Arc<Mutex<Vec<Line>>>,
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
    fn to(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Self { port: listener.local_addr().unwrap().port(), lines: Arc::default() };
        let (lines, target) = (Arc::clone(&wire.lines), server.port);
        std::thread::spawn(move || {
            for agent in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let line = Line { agent, server, requests: Arc::default(), answers: Arc::default() };
                forward(&line.agent, &line.server, &line.requests);
                forward(&line.server, &line.agent, &line.answers);
                locked(&lines).push(line);
            }
        });
        wire
    }

    fn config(&self) -> Config {
        Config { url: format!("redis://127.0.0.1:{}", self.port), ..Config::default() }
    }

    /// From now on no answer comes back on the connections there are.
    fn silence(&self) {
        locked(&self.lines).iter().for_each(|line| line.answers.drops.store(true, Ordering::SeqCst));
    }

    /// Ends all connections.
    fn cut(&self) {
        for line in locked(&self.lines).drain(..) {
            // They may have ended already.
            drop(line.agent.shutdown(Shutdown::Both));
            drop(line.server.shutdown(Shutdown::Both));
        }
    }

    /// Takes the connection there is out of the list, with its requests held back.
    fn hold(&self) -> Line {
        let line = locked(&self.lines).pop().unwrap();
        line.requests.holds.store(true, Ordering::SeqCst);
        line
    }
}

/// Copies bytes on a thread of its own. What is held back still goes on after the sender has hung up.
fn forward(from: &TcpStream, to: &TcpStream, direction: &Arc<Direction>) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let direction = Arc::clone(direction);
    std::thread::spawn(move || {
        let mut bytes = [0; 16 << 10];
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            direction.seen.fetch_add(length as u64, Ordering::SeqCst);
            wait_for("what is held back is let go", || !direction.holds.load(Ordering::SeqCst));
            if !direction.drops.load(Ordering::SeqCst) && to.write_all(&bytes[..length]).is_err() {
                break;
            }
        }
        drop(to.shutdown(Shutdown::Write));
    });
}

/// An agent without sockets: what a test flushes is shipped.
struct Agent {
    journal: Arc<Journal>,
    handle: Option<Handle>,
    deleted: Arc<Mutex<Vec<Deleted>>>,
}

impl Agent {
    fn start(dir: &Path, config: Config) -> Self {
        Self::start_within(dir, config, Limits::default())
    }

    fn start_within(dir: &Path, config: Config, limits: Limits) -> Self {
        let (journal, _) = Journal::open(dir, &journal::Config::default(), &journal::Limits::default(), true).unwrap();
        let journal = Arc::new(journal);
        let deleted: Arc<Mutex<Vec<Deleted>>> = Arc::default();
        let heard = Arc::clone(&deleted);
        let on_deleted: OnDeleted = Arc::new(move |deleted| locked(&heard).extend(deleted));
        let parts = Parts { journal: Arc::clone(&journal), config, limits, expire: Time::secs(3_600), on_deleted };
        Self { journal, handle: Some(start(parts).unwrap()), deleted }
    }

    fn flush(&self, numbers: impl Iterator<Item = usize>, value: f64) {
        let changes: Vec<_> = numbers.map(|number| changed(number, value)).collect();
        self.journal.commit(self.journal.last_flush() + 1, &changes, &[], NOW).unwrap();
        self.handle().notify();
    }

    fn handle(&self) -> &Handle {
        self.handle.as_ref().unwrap()
    }

    fn is_shipped(&self) -> bool {
        self.journal.pending().is_empty()
    }

    fn stop(mut self, wait: Duration) -> Duration {
        let begun = Instant::now();
        self.handle.take().unwrap().stop(begun + wait);
        begun.elapsed()
    }
}

fn key(number: usize) -> SeriesKey {
    SeriesKey::from_canonical(&format!("application.server{number:06}.requests"))
}

fn changed(number: usize, value: f64) -> Changed {
    let delta = Aggregate::Counter(Counter { increments: Sum::from(value), decrements: Sum::default(), samples: 1 });
    let total = Total { start_ms: NOW, update_ms: NOW, aggregate: delta.clone(), rates: None };
    let id = Arc::new(SeriesId { kind: Kind::Counter, key: key(number) });
    let series = Arc::new(Series::new(id, State::new(total.clone()), 10_000, NOW));
    Changed { series, total: None, shipped: Some(Shipped { total: Arc::new(total), delta: Arc::new(delta) }) }
}

/// What the store has of every counter.
fn stored(server: &Server) -> BTreeMap<SeriesKey, f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let reader = RedisReader::new(&server.config(), &Limits::default()).unwrap();
        let page = reader.list(None, "", |_, _| true, usize::MAX).await.unwrap();
        let totals = reader.totals(&page.series, "nobody").await.unwrap();
        let value = |total: Total| match total.aggregate {
            Aggregate::Counter(counter) => counter.increments.value(),
            Aggregate::Gauge(_) | Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_) => f64::NAN,
        };
        let series = page.series.into_iter().map(|(_, key)| key);
        series.zip(totals).map(|(key, stored)| (key, value(stored.unwrap().total.unwrap()))).collect()
    })
}

fn all_are(server: &Server, count: usize, value: f64) {
    let stored = stored(server);
    assert_eq!(stored.len(), count);
    for (key, sum) in stored {
        assert_eq!(sum, value, "{key}");
    }
}

#[test]
fn what_agents_flush_adds_up() {
    let server = Server::start(&[]);
    let dirs = [(); 3].map(|()| TempDir::new().unwrap());
    let agents: Vec<_> = dirs.iter().map(|dir| Agent::start(dir.path(), server.config())).collect();
    for round in 0..4 {
        agents.iter().for_each(|agent| agent.flush(0..2_000, f64::from(round) + 0.25));
    }
    agents.into_iter().for_each(|agent| assert!(agent.stop(Duration::from_secs(60)) < Duration::from_secs(60)));
    all_are(&server, 2_000, 3.0 * (0.25 + 1.25 + 2.25 + 3.25));
}

#[test]
fn a_store_that_is_away_costs_time_alone() {
    let mut server = Server::start(&[]);
    server.kill();
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), server.config());
    agent.flush(0..100, 1.0);
    wait_for("the status says so", || agent.handle().status().reasons == [format!("store: {}", redis::Error::Connect)]);
    agent.flush(0..100, 1.0);
    server.resume();
    agent.flush(50..150, 1.0);
    wait_for("all is shipped", || agent.is_shipped());
    let well = Status { connected: true, away: false, reasons: Vec::new() };
    wait_for("the status says so", || *agent.handle().status() == well);
    let sum: f64 = stored(&server).values().sum();
    assert_eq!(sum, 300.0);
    server.kill();
    agent.flush(0..100, 1.0);
    // A stop does not wait for it either.
    assert!(agent.stop(Duration::from_secs(60)) < Duration::from_secs(20));
}

#[test]
fn a_wire_that_fails_in_the_middle_counts_nothing_twice() {
    let server = Server::start(&[]);
    let wire = Wire::to(&server);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), wire.config());
    wait_for("it is connected", || agent.handle().status().connected);
    for round in 0..10 {
        if round % 2 == 0 {
            // What is sent now is applied, and the agent does not learn of it.
            wire.silence();
        }
        agent.flush(0..500, 1.0);
        if round % 4 == 0 {
            let sum = f64::from(round + 1);
            wait_for("a batch is applied", || stored(&server).values().any(|value| *value == sum));
        }
        wire.cut();
        wait_for("all is shipped", || agent.is_shipped());
    }
    all_are(&server, 500, 10.0);
}

#[test]
fn a_process_that_ends_before_the_answer_sends_again_what_counts_once() {
    let server = Server::start(&[]);
    let wire = Wire::to(&server);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), wire.config());
    wait_for("it is connected", || agent.handle().status().connected);
    agent.flush(0..300, 1.0);
    wait_for("all is shipped", || agent.is_shipped());
    wire.silence();
    agent.flush(0..300, 1.0);
    wait_for("a batch is applied", || stored(&server).values().any(|value| *value == 2.0));
    assert!(!agent.is_shipped());
    agent.stop(Duration::ZERO);
    let agent = Agent::start(dir.path(), server.config());
    agent.flush(0..300, 1.0);
    agent.stop(Duration::from_secs(20));
    all_are(&server, 300, 3.0);
}

#[test]
fn a_batch_that_comes_late_on_a_dead_connection_counts_once() {
    let server = Server::start(&[]);
    let wire = Wire::to(&server);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), wire.config());
    wait_for("it is connected", || agent.handle().status().connected);
    agent.flush(0..100, 1.0);
    wait_for("all is shipped", || agent.is_shipped());
    let old = wire.hold();
    let (requests, answers) = (old.requests.seen.load(Ordering::SeqCst), old.answers.seen.load(Ordering::SeqCst));
    agent.flush(0..100, 1.0);
    wait_for("the batch is under way", || old.requests.seen.load(Ordering::SeqCst) > requests);
    drop(old.agent.shutdown(Shutdown::Both));
    // It connects again and sends the same batch, which overtakes the first.
    wait_for("all is shipped", || agent.is_shipped());
    old.requests.holds.store(false, Ordering::SeqCst);
    wait_for("the first one is answered", || old.answers.seen.load(Ordering::SeqCst) > answers);
    agent.flush(0..100, 1.0);
    agent.stop(Duration::from_secs(20));
    all_are(&server, 100, 3.0);
}

#[test]
fn a_server_that_stands_still_is_given_up_and_found_again() {
    let server = Server::start(&[]);
    let dir = TempDir::new().unwrap();
    let limits = Limits { redis_connect: Time::millis(200), redis_reply: Time::millis(200) };
    let agent = Agent::start_within(dir.path(), server.config(), limits);
    wait_for("it is connected", || agent.handle().status().connected);
    server.signal("STOP");
    agent.flush(0..300, 1.0);
    wait_for("it is given up", || !agent.handle().status().connected);
    server.signal("CONT");
    wait_for("all is shipped", || agent.is_shipped());
    all_are(&server, 300, 1.0);
}

#[test]
fn a_server_that_is_killed_has_all_again_whether_it_kept_it_or_not() {
    for options in [&["--appendonly", "yes"][..], &[]] {
        let mut server = Server::start(options);
        let dir = TempDir::new().unwrap();
        let agent = Agent::start(dir.path(), server.config());
        for _ in 0..3 {
            agent.flush(0..300, 1.0);
            wait_for("all is shipped", || agent.is_shipped());
            server.kill();
            agent.flush(0..300, 1.0);
            server.resume();
            wait_for("all is shipped again", || agent.is_shipped() && agent.handle().status().connected);
        }
        agent.stop(Duration::from_secs(20));
        all_are(&server, 300, 6.0);
    }
}

#[test]
fn a_store_emptied_under_way_gets_all_that_is_kept() {
    let server = Server::start(&[]);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), server.config());
    agent.flush(0..300, 1.0);
    wait_for("all is shipped", || agent.is_shipped());
    server.ask(&["FLUSHALL"]).unwrap();
    agent.flush(0..300, 1.0);
    wait_for("all is shipped again", || agent.is_shipped());
    all_are(&server, 300, 2.0);
    assert_eq!(agent.handle().status().reasons, Vec::<String>::new());
}

#[test]
fn a_store_emptied_while_nothing_is_sent_gets_all_that_is_kept() {
    let server = Server::start(&[]);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), server.config());
    agent.flush(0..300, 1.0);
    wait_for("all is shipped", || agent.is_shipped());
    // No batch comes that would find out, and no connection ends.
    server.ask(&["FLUSHALL"]).unwrap();
    wait_for("all is there again", || stored(&server).len() == 300);
    all_are(&server, 300, 1.0);
}

#[test]
fn one_partition_that_fails_holds_up_no_other() {
    let server = Server::start(&[]);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), server.config());
    wait_for("it is connected", || agent.handle().status().connected);
    let spoilt = super::super::partition(&key(0));
    server.ask(&["DEL", &format!("tallyd:{{{spoilt:03}}}:seq")]).unwrap();
    server.ask(&["SET", &format!("tallyd:{{{spoilt:03}}}:seq"), "text"]).unwrap();
    agent.flush(0..300, 1.0);
    let others = (0..300).filter(|number| super::super::partition(&key(*number)) != spoilt).count();
    wait_for("all others are shipped", || agent.journal.pending() == [spoilt]);
    all_are(&server, others, 1.0);
    wait_for("the status says so", || {
        agent.handle().status().reasons.iter().any(|reason| reason.contains(&format!("partition {spoilt:03}")))
    });
    assert!(!agent.handle().status().away);
    server.ask(&["DEL", &format!("tallyd:{{{spoilt:03}}}:seq")]).unwrap();
    wait_for("all is shipped", || agent.is_shipped() && agent.handle().status().connected);
    all_are(&server, 300, 1.0);
}

#[test]
fn a_store_that_lost_what_nobody_has_any_more_is_an_alarm() {
    let server = Server::start(&[]);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), server.config());
    agent.flush(0..1, 5.0);
    wait_for("all is shipped", || agent.is_shipped());
    agent.journal.stable(super::super::partition(&key(0)), 1);
    agent.journal.commit(2, &[], &[], NOW).unwrap();
    server.ask(&["FLUSHALL"]).unwrap();
    agent.flush(0..1, 1.0);
    wait_for("all is shipped again", || agent.is_shipped());
    all_are(&server, 1, 1.0);
    wait_for("it is an alarm", || {
        agent.handle().status().reasons.iter().any(|reason| reason.contains("lost 1 batches"))
    });
    // It goes on from there.
    agent.flush(0..1, 1.0);
    agent.stop(Duration::from_secs(20));
    all_are(&server, 1, 2.0);
}

#[test]
fn a_copy_of_an_agent_takes_another_name() {
    let server = Server::start(&[]);
    let (dir, copy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let agent = Agent::start(dir.path(), server.config());
    agent.flush(0..300, 1.0);
    agent.stop(Duration::from_secs(20));
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let agents = [&dir, &copy].map(|dir| Agent::start(dir.path(), server.config()));
    for round in 1..4 {
        for agent in &agents {
            agent.flush(0..300, f64::from(round));
            wait_for("all is shipped", || agent.is_shipped());
        }
    }
    assert_ne!(agents[0].journal.agent(), agents[1].journal.agent());
    agents.into_iter().for_each(|agent| assert!(agent.stop(Duration::from_secs(60)) < Duration::from_secs(60)));
    all_are(&server, 300, 13.0);
}

#[test]
fn deletes_are_heard_by_the_others() {
    let server = Server::start(&[]);
    let dirs = [(); 2].map(|()| TempDir::new().unwrap());
    let agents = [&dirs[0], &dirs[1]].map(|dir| Agent::start(dir.path(), server.config()));
    agents.iter().for_each(|agent| agent.flush(0..2, 1.0));
    wait_for("all is shipped", || agents.iter().all(Agent::is_shipped));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let reader = RedisReader::new(&server.config(), &Limits::default()).unwrap();
    let deleted = runtime.block_on(reader.delete(&key(0), &Kind::ALL)).unwrap();
    agents[0].handle().bell().already_deleted(deleted.clone());
    agents.iter().for_each(|agent| agent.flush(0..2, 1.0));
    wait_for("all is shipped again", || agents.iter().all(Agent::is_shipped));
    assert_eq!((&*locked(&agents[0].deleted), &*locked(&agents[1].deleted)), (&vec![], &deleted));
    assert_eq!(stored(&server), BTreeMap::from([(key(0), 2.0), (key(1), 4.0)]));
}

/// What the README says of the speed: `cargo test --release -- --ignored --nocapture hundred_thousand`.
#[test]
#[ignore = "a measurement"]
fn a_hundred_thousand_counters() {
    let server = Server::start(&[]);
    let dir = TempDir::new().unwrap();
    let agent = Agent::start(dir.path(), server.config());
    wait_for("it is connected", || agent.handle().status().connected);
    for round in 1..=5 {
        let changes: Vec<_> = (0..100_000).map(|number| changed(number, 3.0)).collect();
        let begun = Instant::now();
        agent.journal.commit(agent.journal.last_flush() + 1, &changes, &[], NOW).unwrap();
        let committed = begun.elapsed();
        agent.handle().notify();
        wait_for("all is shipped", || agent.is_shipped());
        println!("round {round}: journal {committed:?}, shipped {:?}", begun.elapsed() - committed);
    }
    agent.stop(Duration::from_secs(20));
    all_are(&server, 100_000, 15.0);
}
