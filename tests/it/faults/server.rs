//! Redis itself fails: it is killed, stands still, comes back empty or older, refuses writes, or a key of it is spoilt.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Load, balanced, exact, missing, settled, start};
use crate::agent::{Agent, until};
use crate::redis_servers::Server;

const EVERY_SECOND: &[&str] = &["--appendonly", "yes", "--appendfsync", "everysec"];

/// Waits until what is in the store is nowhere else.
fn until_stable(agent: &Agent) {
    until("the outbox to be empty", || (agent.own("tallyd_outbox_batches", "") == 0.0).then_some(()));
}

/// What Redis appends writes to: the newest part of its append-only file.
fn append_file(redis: &Server) -> std::path::PathBuf {
    let files = std::fs::read_dir(redis.directory().join("appendonlydir")).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.retain(|path| path.to_string_lossy().ends_with(".incr.aof"));
    files.sort();
    files.pop().unwrap()
}

#[test]
fn a_redis_killed_under_load_that_lost_its_last_second_has_all_in_the_end() {
    let mut redis = Server::start(EVERY_SECOND);
    let (agent, load) = (start(&redis.url()), Load::default());
    for round in 0..4 {
        load.during(&agent, || {
            // As when the machine goes down: what the kernel had not written, at most a second's worth, is not there.
            let length = std::fs::metadata(append_file(&redis)).unwrap().len();
            std::thread::sleep(Duration::from_millis(200 + 250 * round));
            redis.kill();
            let file = std::fs::OpenOptions::new().write(true).open(append_file(&redis)).unwrap();
            file.set_len(length).unwrap();
            redis.start_again();
        });
        exact(&[&agent], &redis, &load);
    }
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}

#[test]
fn a_redis_that_stands_still_for_ten_seconds_under_load_has_all_in_the_end() {
    let redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    load.during(&agent, || {
        redis.signal("STOP");
        std::thread::sleep(Duration::from_secs(10));
        redis.signal("CONT");
    });
    exact(&[&agent], &redis, &load);
    assert!(agent.own("tallyd_store_errors_total", "store=\"redis\"") > 0.0, "the agent found out");
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}

#[test]
fn a_redis_that_keeps_nothing_and_comes_back_empty_gets_all_again() {
    let mut redis = Server::start(&[]);
    let (agent, load) = (start(&redis.url()), Load::default());
    for _ in 0..2 {
        load.during(&agent, || {
            redis.kill();
            redis.start_again();
        });
        exact(&[&agent], &redis, &load);
    }
    assert!(agent.own("tallyd_lost_total", "") == 0.0, "all of a minute is in the outbox");
}

/// The loss is said: by `/-/ready`, by reason, and in samples.
fn loss_is_told(agent: &Agent) {
    assert!(agent.own("tallyd_lost_total", "store_rolled_back") >= 1.0);
    let samples = agent.own("tallyd_lost_samples_total", "store_rolled_back");
    assert!(samples > 0.0);
    let ready = agent.get("/-/ready");
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains(&format!("with {samples} samples")), "{}", ready.text());
}

#[test]
fn what_flushall_took_is_counted_to_the_sample_and_nothing_is_applied_twice() {
    let redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 50);
    exact(&[&agent], &redis, &load);
    until_stable(&agent);
    load.during(&agent, || redis.cli(&["FLUSHALL"]));
    exact(&[&agent], &redis, &load);
    loss_is_told(&agent);
    // A second time, and from a place in the middle.
    load.send_all(&agent, 50);
    exact(&[&agent], &redis, &load);
    until_stable(&agent);
    let before = agent.own("tallyd_lost_samples_total", "store_rolled_back");
    load.during(&agent, || redis.cli(&["FLUSHALL"]));
    exact(&[&agent], &redis, &load);
    assert!(agent.own("tallyd_lost_samples_total", "store_rolled_back") > before);
}

#[test]
fn a_redis_restored_from_an_older_copy_lacks_what_is_counted_as_lost() {
    let mut redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 50);
    exact(&[&agent], &redis, &load);
    until_stable(&agent);
    let copy = tempfile::tempdir().unwrap();
    let copy_all = |from: &Path, to: &Path| {
        assert!(Command::new("cp").arg("-rT").args([from, to]).status().unwrap().success());
    };
    copy_all(redis.directory(), copy.path());
    load.send_all(&agent, 60);
    exact(&[&agent], &redis, &load);
    until_stable(&agent);
    load.during(&agent, || {
        redis.kill();
        std::fs::remove_dir_all(redis.directory().join("appendonlydir")).unwrap();
        copy_all(copy.path(), redis.directory());
        redis.start_again();
    });
    exact(&[&agent], &redis, &load);
    loss_is_told(&agent);
    let lost = agent.own("tallyd_lost_samples_total", "store_rolled_back");
    assert!((60.0 * 6.0..110.0 * 6.0).contains(&lost), "what the copy had is not lost: {lost}");
}

#[test]
fn a_spoilt_key_or_field_costs_its_own_samples_which_are_counted() {
    let redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    // The keys must be there to be spoilt; what they have so far is taken away and no part of the sums.
    for name in ["not.a.hash", "no.number"] {
        agent.ingest(format!(r#"{{"name":"{name}","type":"COUNTER","value":1}}"#));
    }
    load.send_all(&agent, 20);
    let key = |name: &str| redis.cli(&["--scan", "--pattern", &format!("tallyd:*:s:c:{name}")]).trim().to_owned();
    until("the keys", || (!key("not.a.hash").is_empty() && !key("no.number").is_empty()).then_some(()));
    let (not_a_hash, no_number) = (key("not.a.hash"), key("no.number"));
    redis.cli(&["DEL", &not_a_hash, &no_number]);
    redis.cli(&["SET", &not_a_hash, "something else"]);
    redis.cli(&["HSET", &no_number, "increments", "many"]);
    load.during(&agent, || {
        for _ in 0..20 {
            load.count(&agent, "not.a.hash");
            load.count(&agent, "no.number");
        }
    });
    let lost = |reason: &str| agent.own("tallyd_lost_samples_total", reason);
    settled(&[&agent], &redis, &load, || lost(""));
    assert_eq!((lost("store_wrong_type"), lost("store_not_a_number")), (20.0, 20.0));
    assert!(agent.own("tallyd_lost_total", "store_wrong_type") >= 1.0);
    // All others are whole.
    assert_eq!(missing(&redis, &load).samples, 40.0);
    load.forget("not.a.hash");
    load.forget("no.number");
    assert_eq!(missing(&redis, &load), super::Sums::default());
}

#[test]
fn at_its_maxmemory_redis_takes_nothing_and_all_of_it_when_there_is_room() {
    let redis = Server::persistent();
    let (agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 20);
    exact(&[&agent], &redis, &load);
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    load.send_all(&agent, 50);
    until("the agent to say so", || agent.get("/-/ready").text().contains("maxmemory").then_some(()));
    balanced(&agent, &redis, &load);
    load.during(&agent, || redis.cli(&["CONFIG", "SET", "maxmemory", "0"]));
    exact(&[&agent], &redis, &load);
    assert!(agent.own("tallyd_store_errors_total", "out_of_memory") > 0.0);
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}

#[test]
fn a_redis_made_a_replica_and_a_master_again_has_all_in_the_end() {
    let (redis, other) = (Server::persistent(), Server::persistent());
    let (agent, load) = (start(&redis.url()), Load::default());
    load.send_all(&agent, 20);
    exact(&[&agent], &redis, &load);
    let linked = |server: &Server| {
        until("the replica to be in step", || {
            server.cli(&["INFO", "replication"]).contains("master_link_status:up").then_some(())
        });
    };
    let (port, other_port) = (redis.port.to_string(), other.port.to_string());
    other.cli(&["REPLICAOF", "127.0.0.1", &port]);
    linked(&other);
    load.send_all(&agent, 20);
    // It takes over the other's data, which lacks what was applied here after they parted.
    other.cli(&["REPLICAOF", "NO", "ONE"]);
    load.send_all(&agent, 20);
    redis.cli(&["REPLICAOF", "127.0.0.1", &other_port]);
    load.send_all(&agent, 20);
    linked(&redis);
    until("the agent to say so", || agent.get("/-/ready").text().contains("takes no writes").then_some(()));
    load.during(&agent, || redis.cli(&["REPLICAOF", "NO", "ONE"]));
    exact(&[&agent], &redis, &load);
    assert!(agent.own("tallyd_store_errors_total", "read_only") > 0.0);
    assert!(agent.own("tallyd_lost_total", "") == 0.0, "the outbox still had what the other lacked");
}

#[test]
fn valkey_is_as_good_as_redis() {
    let found = Command::new("valkey-server").arg("--version").stdout(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no valkey-server on this machine");
        return;
    }
    let mut valkey = Server::start_program("valkey-server", EVERY_SECOND);
    let (agent, load) = (start(&valkey.url()), Load::default());
    for _ in 0..2 {
        load.during(&agent, || {
            valkey.kill();
            valkey.start_again();
        });
        exact(&[&agent], &valkey, &load);
    }
    assert!(agent.own("tallyd_lost_total", "") == 0.0);
}
