//! A Redis Cluster fails over to a replica that lacks what was acknowledged, and moves slots about while batches come in.

use super::{Load, Store, begin, exact, missing};
use crate::agent::{Agent, until};
use crate::redis_servers::Cluster;

fn start(cluster: &Cluster, others: &[&str]) -> Agent {
    let soon = ["flush.interval=100ms", "flush.window=1s", "limits.redis_reply=1s", "limits.redis_connect=1s"];
    let others = soon.iter().chain(others).map(|setting| (*setting).to_owned());
    begin(&cluster.settings().into_iter().chain(others).collect::<Vec<_>>())
}

/// Nodes of a cluster that are masters: known, since one that is frozen answers no question.
struct Masters(Vec<u16>);

impl Masters {
    fn of(cluster: &Cluster, nodes: &[usize]) -> Self {
        Self(nodes.iter().map(|at| cluster.node(*at).port).collect())
    }
}

impl Store for Masters {
    fn ports(&self) -> Vec<u16> {
        self.0.clone()
    }
}

/// Freezes each master's replica, lets the masters acknowledge a load, waits for `then`, kills one master and promotes the
/// replica, which has nothing of that.
fn fail_over(cluster: &mut Cluster, agent: &Agent, load: &Load, then: impl FnOnce()) {
    (3..6).for_each(|replica| cluster.freeze(replica));
    // What is on its way to a frozen process would be there when it goes on.
    (0..3).for_each(|master| drop(cluster.cli(master, &["CLIENT", "KILL", "TYPE", "replica"])));
    load.send_all(agent, 60);
    (0..30).for_each(|number| load.count(agent, &format!("frozen.{number}")));
    until("the masters to have all", || {
        (missing(&Masters::of(cluster, &[0, 1, 2]), load).samples == 0.0).then_some(())
    });
    then();
    load.during(agent, || {
        cluster.kill(1);
        (3..6).for_each(|replica| cluster.thaw(replica));
        assert_eq!(cluster.cli(4, &["KEYS", "tallyd:*:s:c:frozen.*"]).trim(), "", "it has what it is to lack");
        until("the replica to take over", || {
            cluster.node(4).try_cli(&["CLUSTER", "FAILOVER", "TAKEOVER"])?;
            cluster.is_master(4).then_some(())
        });
    });
    until("three masters", || (cluster.masters().len() == 3).then_some(()));
}

#[test]
fn a_replica_that_lacks_what_was_acknowledged_is_sent_it_again() {
    let mut cluster = Cluster::start(3, 3);
    let (agent, load) = (start(&cluster, &["store.redis.replicas=1"]), Load::default());
    load.send_all(&agent, 60);
    exact(&[&agent], &Masters::of(&cluster, &[0, 1, 2]), &load);
    fail_over(&mut cluster, &agent, &load, || ());
    exact(&[&agent], &Masters::of(&cluster, &[0, 2, 4]), &load);
    assert!(agent.own("tallyd_lost_total", "") == 0.0, "the outbox kept what no replica had");
}

#[test]
fn what_left_the_outbox_before_a_replica_had_it_is_counted_to_the_sample() {
    let mut cluster = Cluster::start_with(3, 3, &["--appendonly", "yes", "--appendfsync", "always"]);
    let (agent, load) = (start(&cluster, &["store.redis.replicas=0"]), Load::default());
    load.send_all(&agent, 60);
    exact(&[&agent], &Masters::of(&cluster, &[0, 1, 2]), &load);
    fail_over(&mut cluster, &agent, &load, || {
        until("the masters' files to have it", || (agent.own("tallyd_outbox_batches", "") == 0.0).then_some(()));
    });
    exact(&[&agent], &Masters::of(&cluster, &[0, 2, 4]), &load);
    let lost = agent.own("tallyd_lost_samples_total", "store_rolled_back");
    assert!(lost > 0.0 && lost < load.samples(), "{lost} of {}", load.samples());
    assert!(agent.get("/-/ready").text().contains(&format!("with {lost} samples")));
}

#[test]
fn slots_that_move_back_and_forth_under_load_lose_and_double_nothing() {
    let cluster = Cluster::start(2, 0);
    let (agent, load) = (start(&cluster, &[]), Load::default());
    load.send_all(&agent, 60);
    exact(&[&agent], &Masters::of(&cluster, &[0, 1]), &load);
    let mut slots: Vec<_> =
        cluster.scan("tallyd:*:seq").into_iter().map(|(node, name)| (cluster.slot(&name), node)).collect();
    slots.sort_unstable();
    slots.dedup();
    // Those that the load is in; the others move as easily.
    let names = cluster.scan("tallyd:*:s:*");
    let of_load: Vec<_> = names.iter().map(|(_, name)| cluster.slot(name)).collect();
    slots.retain(|(slot, _)| of_load.contains(slot));
    slots.truncate(6);
    load.during(&agent, || {
        for round in 0..2 {
            for (slot, home) in &slots {
                let (from, to) = if round == 0 { (*home, 1 - *home) } else { (1 - *home, *home) };
                cluster.begin_to_move(*slot, from, to);
                cluster.move_keys(*slot, from, to, 1);
                load.send_all(&agent, 5);
                cluster.move_keys(*slot, from, to, 1_000);
                cluster.end_move(*slot, from, to);
            }
        }
    });
    exact(&[&agent], &Masters::of(&cluster, &[0, 1]), &load);
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}
