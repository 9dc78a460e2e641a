//! A real Redis as the store: many agents share it, it may go away, nothing is lost or counted twice.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::agent::{Agent, same, until};
use crate::redis_servers::Server;

fn agent(redis: &Server) -> Agent {
    Agent::start(&["store.kind=redis", &redis.url(), "flush.interval=100ms", "flush.window=1s"])
}

/// The sum of a counter's increments as redis-cli reads it.
fn stored(redis: &Server, key: &str) -> f64 {
    let pattern = format!("tallyd:*:s:c:{key}");
    let name = redis.cli(&["--scan", "--pattern", &pattern]);
    let fields = redis.cli(&["HMGET", name.trim(), "increments", "incrementsfrac"]);
    fields.lines().map(|field| field.parse::<f64>().unwrap_or(0.0)).sum()
}

/// A field of a series as it stands in Redis; empty where there is none.
fn stored_field(redis: &Server, letter: &str, key: &str, field: &str) -> String {
    let name = redis.cli(&["--scan", "--pattern", &format!("tallyd:*:s:{letter}:{key}")]);
    redis.cli(&["HGET", name.trim(), field]).trim().to_owned()
}

#[test]
fn two_agents_share_one_total() {
    let redis = Server::persistent();
    let (a, b) = (agent(&redis), agent(&redis));
    a.datagram("shared:5|c\nt:1:2|ms\nu:x|s");
    b.datagram("shared:7|c\nt:3|ms\nu:x|s\nu:y|s");
    for reader in [&a, &b] {
        reader.wait_for("shared", "value", 12);
        reader.wait_for("t", "sum", 6);
        reader.wait_for("t", "max", 3);
        reader.wait_for("u", "value", 2);
    }
    until("the store to hold it", || (stored(&redis, "shared") == 12.0).then_some(()));
    let local = a.get("/data/metrics/shared?scope=local").json();
    assert!(same(&local["value"], &json!(5)), "{local}");
}

#[test]
fn agents_share_one_total_where_scripts_are_forbidden() {
    let redis = Server::persistent();
    redis.cli(&["ACL", "SETUSER", "default", "-@scripting"]);
    let (mut a, b) = (agent(&redis), agent(&redis));
    for (agent, count) in [(&a, 5), (&b, 7)] {
        agent.datagram(format!("shared:{count}|c\nt:{count}|ms\nu:{count}|s\nu:x|s\ng:{count}|g\nm:{count}|m"));
        agent.wait_for("g", "value", count);
    }
    for reader in [&a, &b] {
        reader.wait_for("shared", "value", 12);
        reader.wait_for("t", "sum", 12);
        reader.wait_for("u", "value", 3);
        reader.wait_for("m", "count", 12);
    }
    until("the store to hold it", || (stored(&redis, "shared") == 12.0).then_some(()));
    a = a.restart_after("KILL");
    a.datagram("shared:1|c");
    b.wait_for("shared", "value", 13);
    assert_eq!(b.delete("/data/metrics/shared").status, 200);
    until("the other agent to reset", || a.get("/data/metrics/shared?scope=local").status.eq(&404).then_some(()));
}

#[test]
fn a_sample_is_in_the_next_global_read() {
    let redis = Server::persistent();
    let agent = agent(&redis);
    for i in 1..=100 {
        agent.ingest(r#"{"name":"seen","type":"COUNTER","value":1}"#);
        let read = agent.metric("seen").unwrap();
        assert!(same(&read["value"], &json!(i)), "after {i}: {read}");
    }
}

/// A way to a Redis on which all that is asked on the second connection and later ones takes a while: an agent ships on
/// its first one and reads on its second.
fn with_slow_reads(redis: &Server) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("store.redis.url=redis://{}", listener.local_addr().unwrap());
    let port = redis.port;
    std::thread::spawn(move || {
        for (number, agent) in listener.incoming().map_while(Result::ok).enumerate() {
            let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let delay = Duration::from_millis(if number == 0 { 0 } else { 300 });
            let (from, to) = (server.try_clone().unwrap(), agent.try_clone().unwrap());
            std::thread::spawn(move || pass(from, to, Duration::ZERO));
            std::thread::spawn(move || pass(agent, server, delay));
        }
    });
    url
}

fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        std::thread::sleep(delay);
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // It may have ended already.
    drop(to.shutdown(Shutdown::Both));
}

#[test]
fn a_batch_that_arrives_while_the_store_is_read_counts_once() {
    let redis = Server::persistent();
    let agent =
        Agent::start(&["store.kind=redis", &with_slow_reads(&redis), "flush.interval=100ms", "flush.window=1s"]);
    for i in 1..=10 {
        agent.ingest(r#"{"name":"slow","type":"COUNTER","value":1}"#);
        let read = agent.metric("slow").unwrap();
        assert!(same(&read["value"], &json!(i)) && read["scope"] != "local", "after {i}: {read}");
    }
}

#[test]
fn a_redis_that_is_away_delays_nothing_and_loses_nothing() {
    let mut redis = Server::persistent();
    let agent = agent(&redis);
    agent.datagram("away:1|c");
    until("the first to be stored", || (stored(&redis, "away") == 1.0).then_some(()));
    redis.kill();
    for _ in 0..20 {
        agent.ingest(r#"{"name":"away","type":"COUNTER","value":1}"#);
    }
    let read = agent.metric("away").unwrap();
    assert!(same(&read["value"], &json!(21)), "{read}");
    assert_eq!(read["scope"], "local", "{read}");
    redis.start_again();
    until("the rest to be stored", || (stored(&redis, "away") == 21.0).then_some(()));
    agent.wait_for("away", "value", 21);
}

#[test]
fn an_agent_killed_at_any_moment_goes_on_exactly() {
    let redis = Server::persistent();
    let mut agent = agent(&redis);
    let mut sent = 0;
    for round in 0..5 {
        for _ in 0..10 {
            agent.ingest(r#"{"name":"killed","type":"COUNTER","value":1}"#);
            sent += 1;
        }
        // What is in the journal when it is killed must be in the store in the end, once.
        let flushes = agent.own("tallyd_flushes_total", "");
        until("a flush", || (agent.own("tallyd_flushes_total", "") >= flushes + 1.0 || round == 0).then_some(()));
        agent.wait_for("killed", "value", sent);
        agent = agent.restart_after(if round % 2 == 0 { "TERM" } else { "KILL" });
        let kept = agent.metric("killed").unwrap()["value"].as_u64().unwrap();
        assert!(kept <= sent && sent - kept <= 10, "{kept} of {sent}");
        sent = kept;
    }
    until("the store to agree", || (stored(&redis, "killed") == sent as f64).then_some(()));
}

#[test]
fn a_delete_resets_every_agent() {
    let redis = Server::persistent();
    let (a, b) = (agent(&redis), agent(&redis));
    a.datagram("both:5|c");
    b.datagram("both:7|c");
    a.wait_for("both", "value", 12);
    b.wait_for("both", "value", 12);
    until("the store to hold it", || (stored(&redis, "both") == 12.0).then_some(()));
    assert_eq!(a.delete("/data/metrics/both").status, 200);
    assert_eq!(a.metric("both"), None);
    until("the other agent to reset", || b.get("/data/metrics/both?scope=local").status.eq(&404).then_some(()));
    b.datagram("both:1|c");
    a.wait_for("both", "value", 1);
}

/// Ends a load with the scope, also where that panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Counts `key` up by one request after the other while `fault` happens; answers how many were acknowledged.
pub fn under_load(agent: &Agent, key: &str, fault: impl FnOnce()) -> u64 {
    let (ended, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
    let record = format!(r#"{{"name":"{key}","type":"COUNTER","value":1}}"#);
    std::thread::scope(|scope| {
        let _ends = Ends(&ended);
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                assert_eq!(agent.ingest(&record).status, 200);
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
        });
        let so_far = || acknowledged.load(Ordering::Relaxed);
        until("the load", || (so_far() > 10).then_some(()));
        fault();
        let before = so_far();
        until("the load to go on", || (so_far() > before + 10).then_some(()));
        ended.store(true, Ordering::Relaxed);
    });
    acknowledged.load(Ordering::Relaxed)
}

#[test]
fn a_redis_that_hangs_or_is_killed_under_load_has_all_in_the_end() {
    let mut redis = Server::persistent();
    let agent = Agent::start(&[
        "store.kind=redis",
        &redis.url(),
        "flush.interval=100ms",
        "flush.window=1s",
        "limits.redis_reply=500ms",
        "limits.redis_connect=500ms",
    ]);
    let stored_all = |redis: &Server, sum: u64| {
        until("the store to hold all", || (stored(redis, "load") == sum as f64).then_some(()));
        agent.wait_for("load", "value", sum);
    };
    let mut sum = under_load(&agent, "load", || {
        redis.signal("STOP");
        let connected = || agent.own("tallyd_store_connected", "");
        until("the agent to find out", || (connected() == 0.0).then_some(()));
        let read = agent.metric("load").unwrap();
        assert_eq!(read["scope"], "local", "{read}");
        redis.signal("CONT");
    });
    stored_all(&redis, sum);
    for _ in 0..2 {
        sum += under_load(&agent, "load", || {
            redis.kill();
            redis.start_again();
        });
        stored_all(&redis, sum);
    }
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}

#[test]
fn a_redis_that_lost_everything_gets_what_is_left_once_and_the_loss_is_named() {
    let redis = Server::persistent();
    let agent = agent(&redis);
    for _ in 0..5 {
        agent.ingest(r#"{"name":"before","type":"COUNTER","value":1}"#);
    }
    // Once these are safe they are in the store alone.
    until("the outbox to be empty", || {
        (stored(&redis, "before") == 5.0 && agent.own("tallyd_outbox_batches", "") == 0.0).then_some(())
    });
    redis.cli(&["FLUSHALL"]);
    for _ in 0..7 {
        agent.ingest(r#"{"name":"before","type":"COUNTER","value":1}"#);
    }
    until("the rest to be stored", || (stored(&redis, "before") == 7.0).then_some(()));
    assert!(agent.own("tallyd_lost_total", "store_rolled_back") >= 1.0);
    let ready = agent.get("/-/ready");
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("lost"), "{}", ready.text());
    agent.wait_for("before", "value", 7);
    assert!(same(&agent.get("/data/metrics/before?scope=local").json()["value"], &json!(12)), "the agent knows better");
}

#[test]
fn a_spoilt_key_spoils_only_itself() {
    let redis = Server::persistent();
    let agent = agent(&redis);
    agent.datagram("spoilt:1|c\nother:1|c");
    until("both to be stored", || (stored(&redis, "spoilt") == 1.0 && stored(&redis, "other") == 1.0).then_some(()));
    let name = redis.cli(&["--scan", "--pattern", "tallyd:*:s:c:spoilt"]);
    redis.cli(&["DEL", name.trim()]);
    redis.cli(&["SET", name.trim(), "not ours"]);
    agent.datagram("spoilt:1|c\nother:1|c");
    until("the other to be stored", || (stored(&redis, "other") == 2.0).then_some(()));
    until("the loss", || (agent.own("tallyd_lost_total", "store_wrong_type") == 1.0).then_some(()));
    agent.wait_for("spoilt", "value", 2);
}

#[test]
fn a_copied_state_directory_counts_nothing_twice() {
    let redis = Server::persistent();
    let agent = agent(&redis);
    let mut sum = 0;
    let mut count = |agent: &Agent| {
        for _ in 0..10 {
            agent.ingest(r#"{"name":"copied","type":"COUNTER","value":1}"#);
            sum += 1;
        }
        sum
    };
    let first = count(&agent);
    until("the first to be stored", || (stored(&redis, "copied") == f64::from(first)).then_some(()));
    // Both hold batches that the store has and might lose yet, under one name.
    let copy = agent.copy();
    for _ in 0..3 {
        count(&agent);
        count(&copy);
    }
    let all = count(&agent);
    until("all to be stored", || (stored(&redis, "copied") >= f64::from(all)).then_some(()));
    for reader in [&agent, &copy] {
        until("a new name", || (agent.stderr() + &copy.stderr()).contains("has a new one").then_some(()));
        reader.wait_for("copied", "value", all);
    }
    assert_eq!(stored(&redis, "copied"), f64::from(all));
}

/// A set that bears an earlier time than the one that stands changes nothing, here and in the store.
#[test]
fn a_late_set_of_a_gauge_changes_nothing_in_the_store_either() {
    let redis = Server::persistent();
    // The window is long enough that the earlier time lies in it or the one before.
    let agent = Agent::start(&["store.kind=redis", &redis.url(), "flush.interval=100ms"]);
    agent.datagram("q:5|g");
    until("the first to be stored", || (stored_field(&redis, "g", "q", "value") == "5").then_some(()));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    agent.datagram(format!("q:3|g|T{}", now - 2));
    until("the second to be stored", || (stored_field(&redis, "g", "q", "samples") == "2").then_some(()));
    assert_eq!(stored_field(&redis, "g", "q", "value"), "5");
    assert!(same(&agent.metric("q").unwrap()["value"], &json!(5)));
    assert!(same(&agent.get("/data/metrics/q?scope=local").json()["value"], &json!(5)));
}
