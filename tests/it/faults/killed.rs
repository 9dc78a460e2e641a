//! The agent is killed at random instants, fifty times over one state directory.
//!
//! What is asserted of each kill: a request answered with `?durable=1` is kept; so is all that was acknowledged before
//! such a request began, durable or not; what was acknowledged later and not durably may be gone with the process; nothing
//! is ever there that was not sent, and no request in part. Of the sums in the journal the store has each in the end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use super::{Random, begin, post, shipping};
use crate::agent::{Agent, same, until};
use crate::redis_servers::Server;

const KILLS: u64 = 50;

/// What a sender has done in one life of the agent.
#[derive(Default)]
struct Done {
    begun: AtomicU64,
    acknowledged: AtomicU64,
}

impl Done {
    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }
}

/// Two counters, one of them falling, and a timer.
fn body(name: &str) -> String {
    json!([
        {"name": format!("{name}.c"), "type": "COUNTER", "value": 2},
        {"name": format!("{name}.d"), "type": "COUNTER", "value": -3},
        {"name": format!("{name}.t"), "type": "TIMER", "value": 5},
    ])
    .to_string()
}

/// Sends one request after the other until one is not answered. `before` is called before each.
fn send(agent: &Agent, path: &str, name: &str, ends: &AtomicBool, done: &Done, mut answered: impl FnMut(bool)) {
    while !ends.load(Ordering::SeqCst) {
        done.begun.fetch_add(1, Ordering::SeqCst);
        answered(false);
        if post(agent.address("ingest"), path, "", &body(name)) != Some(200) {
            return;
        }
        done.acknowledged.fetch_add(1, Ordering::SeqCst);
        answered(true);
    }
}

/// How many requests of a name are in the agent's own figures, which must agree with each other.
fn counted(agent: &Agent, name: &str) -> u64 {
    let of = |series: &str| agent.get(&format!("/data/metrics/{name}.{series}?scope=local"));
    let timer = of("t");
    if timer.status == 404 {
        return 0;
    }
    let count = timer.json()["count"].as_u64().unwrap();
    for (series, field, want) in [("c", "value", 2 * count as i64), ("d", "value", -3 * count as i64)] {
        let metric = of(series).json();
        assert!(same(&metric[field], &json!(want)), "{count} requests: {metric}");
    }
    assert!(same(&timer.json()["sum"], &json!(5 * count)));
    count
}

#[test]
fn an_agent_killed_fifty_times_at_random_instants_has_exactly_what_its_journal_had() {
    let redis = Server::persistent();
    let mut agent = begin(&shipping(&redis.url()));
    let mut random = Random(0x5eed_0050);
    let (mut durable_kept, mut quick_kept) = (0, 0);
    for _ in 0..KILLS {
        let (ends, durable, quick) = (AtomicBool::new(false), Done::default(), Done::default());
        // What was acknowledged before the last durable request began that was answered.
        let sure = AtomicU64::new(0);
        let pause = Duration::from_micros(random.below(200_000));
        std::thread::scope(|scope| {
            scope.spawn(|| send(&agent, "/ingest/metrics", "quick", &ends, &quick, |_| ()));
            scope.spawn(|| {
                let mut before = 0;
                send(&agent, "/ingest/metrics?durable=1", "durable", &ends, &durable, |answered| {
                    if answered {
                        sure.store(before, Ordering::SeqCst);
                    }
                    before = quick.acknowledged();
                });
            });
            until("the first request", || (quick.acknowledged() > 0).then_some(()));
            std::thread::sleep(pause);
            agent.signal("KILL");
            ends.store(true, Ordering::SeqCst);
        });
        agent = agent.restart_after("KILL");
        let now = counted(&agent, "durable");
        let range = durable_kept + durable.acknowledged()..=durable_kept + durable.begun.into_inner();
        assert!(range.contains(&now), "{now} durable requests of {range:?}");
        durable_kept = now;
        let now = counted(&agent, "quick");
        let range = quick_kept + sure.into_inner()..=quick_kept + quick.begun.into_inner();
        assert!(range.contains(&now), "{now} quick requests of {range:?}");
        quick_kept = now;
    }
    assert!(durable_kept >= KILLS / 2 && quick_kept > KILLS, "{durable_kept} and {quick_kept}");
    for (name, kept) in [("durable", durable_kept), ("quick", quick_kept)] {
        let field = |letter: &str, series: &str, field: &str| {
            let key = redis.cli(&["--scan", "--pattern", &format!("tallyd:*:s:{letter}:{name}.{series}")]);
            redis.cli(&["HGET", key.trim(), field]).trim().parse::<u64>().unwrap_or(0)
        };
        let fields = || {
            let (c, d, t) = (field("c", "c", "increments"), field("c", "d", "decrements"), field("ms", "t", "sum"));
            [c, d, t, field("ms", "t", "n"), field("c", "c", "samples"), field("c", "d", "samples")]
        };
        let want = [2 * kept, 3 * kept, 5 * kept, kept, kept, kept];
        until("the store to have all", || (fields()[0] >= want[0] && fields()[3] >= want[3]).then_some(()));
        until("the outbox to be shipped", || (agent.own("tallyd_outbox_unsent_batches", "") == 0.0).then_some(()));
        assert_eq!(fields(), want, "{name}");
    }
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}
