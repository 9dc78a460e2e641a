//! One name, two journals: a state directory is copied, or an old one is put back.

use super::{Load, exact, settled, start};
use crate::agent::{Agent, until};
use crate::redis_servers::Server;

/// Waits until one of two agents has taken another name.
fn until_renamed(agents: [&Agent; 2]) {
    until("a new name", || agents.iter().any(|agent| agent.stderr().contains("has a new one")).then_some(()));
}

#[test]
fn of_two_agents_with_one_name_one_takes_another_and_nothing_counts_twice() {
    let redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 30);
    exact(&[&agent], &redis, &load);
    let copy = agent.copy();
    for _ in 0..10 {
        load.send_all(&agent, 5);
        load.send_all(&copy, 5);
    }
    until_renamed([&agent, &copy]);
    load.during(&agent, || load.send_all(&copy, 20));
    exact(&[&agent, &copy], &redis, &load);
    let owners = redis.cli(&["EVAL", OWNERS, "0"]);
    assert_eq!(owners.trim(), "2", "two names in the store");
}

/// How many agents the store knows.
const OWNERS: &str = "local names = {} \
    for _, key in ipairs(redis.call('KEYS', '*:seq')) do \
        for _, field in ipairs(redis.call('HKEYS', key)) do \
            local name = string.match(field, '^(%x+):owner$') if name then names[name] = true end \
        end \
    end \
    local count = 0 for _ in pairs(names) do count = count + 1 end \
    return tostring(count)";

/// What an old state directory does not know of is in the store. It can't be told from a copy that runs elsewhere, so it
/// goes on under a name of its own.
#[test]
fn an_old_state_directory_put_back_counts_on_beside_what_the_store_has() {
    let redis = Server::persistent();
    let (mut agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 30);
    exact(&[&agent], &redis, &load);
    let old = tempfile::tempdir().unwrap();
    agent = agent.restart_with("TERM", |state_dir| copy_all(state_dir, old.path()));
    load.send_all(&agent, 30);
    until("all to be stored", || (super::missing(&redis, &load).samples == 0.0).then_some(()));
    agent = agent.restart_with("TERM", |state_dir| {
        std::fs::remove_dir_all(state_dir).unwrap();
        std::fs::create_dir(state_dir).unwrap();
        copy_all(old.path(), state_dir);
    });
    load.send_all(&agent, 30);
    settled(&[&agent], &redis, &load, || 0.0);
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}

fn copy_all(from: &std::path::Path, to: &std::path::Path) {
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// What is not acknowledged when the copy is made is in both journals, and each could send it under a name of its own.
#[test]
fn batches_that_both_of_two_agents_hold_count_once() {
    let mut redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 30);
    exact(&[&agent], &redis, &load);
    for _ in 0..3 {
        redis.kill();
        load.send_all(&agent, 20);
        assert_eq!(super::post(agent.address("ingest"), "/ingest/metrics?durable=1", "", NOTHING_NEW), Some(200));
        load.add("c", "barrier", 1.0, 0.0, 0.0);
        let copy = agent.copy();
        // Both make more before either can send any.
        load.send_all(&agent, 20);
        load.send_all(&copy, 20);
        redis.start_again();
        until_renamed([&agent, &copy]);
        load.during(&agent, || load.send_all(&copy, 10));
        settled(&[&agent, &copy], &redis, &load, || 0.0);
        assert!(copy.own("tallyd_lost_total", "") == 0.0 && agent.own("tallyd_lost_total", "") == 0.0);
        until("the copy to have shipped all", || (copy.own("tallyd_outbox_unsent_batches", "") == 0.0).then_some(()));
    }
}

/// A counter that adds nothing: it is there so that the answer comes after all that went before is in the journal.
const NOTHING_NEW: &str = r#"{"name":"barrier","type":"COUNTER","value":0}"#;
