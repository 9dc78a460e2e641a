//! A real Redis as the store: many agents share it, it may go away, nothing is lost or counted twice.

use serde_json::json;

use crate::agent::{Agent, same, until};
use crate::net::Redis;

fn agent(redis: &Redis) -> Agent {
    Agent::start(&["store.kind=redis", &redis.url(), "flush.interval=100ms", "flush.window=1s"])
}

/// The sum of a counter's increments as redis-cli reads it.
fn stored(redis: &Redis, key: &str) -> f64 {
    let pattern = format!("tallyd:*:s:c:{key}");
    let name = redis.cli(&["--scan", "--pattern", &pattern]);
    let fields = redis.cli(&["HMGET", name.trim(), "increments", "incrementsfrac"]);
    fields.lines().map(|field| field.parse::<f64>().unwrap_or(0.0)).sum()
}

#[test]
fn two_agents_share_one_total() {
    let redis = Redis::start();
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
fn a_sample_is_in_the_next_global_read() {
    let redis = Redis::start();
    let agent = agent(&redis);
    for i in 1..=100 {
        agent.ingest(r#"{"name":"seen","type":"COUNTER","value":1}"#);
        assert!(same(&agent.metric("seen").unwrap()["value"], &json!(i)), "after {i}");
    }
}

#[test]
fn a_redis_that_is_away_delays_nothing_and_loses_nothing() {
    let mut redis = Redis::start();
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
    let redis = Redis::start();
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
    let redis = Redis::start();
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
