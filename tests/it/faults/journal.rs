//! The journal fails: its file is cut short, a bit of it flips, its disk is full, another process wants it.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use super::Random;
use crate::agent::{Agent, same, tallyd, until};

/// How many series a test has, and what each of them is: its own number, so that none can be taken for another.
const SERIES: u64 = 300;

fn fill(agent: &Agent, of: std::ops::Range<u64>) {
    let records: Vec<_> =
        of.map(|number| json!({"name": format!("own.{number:04}"), "type": "COUNTER", "value": number + 1})).collect();
    let body = serde_json::to_vec(&records).unwrap();
    let headers = [("Content-Type", "application/json")];
    let answer = crate::http::request(agent.address("ingest"), "POST", "/ingest/metrics?durable=1", &headers, &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// How many of the series do not have their value; more than that none has.
fn wrong(agent: &Agent, series: u64, times: u64) -> usize {
    // What else there is comes in the same list.
    let list = agent.get(&format!("/data/metrics?match=own.*&limit={series}")).json();
    let value = |number: u64| {
        let name = format!("{number:04}");
        let found = list.as_array().unwrap().iter().find(|metric| metric["level"] == "own" && metric["name"] == name);
        found.and_then(|metric| metric["value"].as_u64()).unwrap_or(0)
    };
    let off = |number: &u64| {
        let want = times * (number + 1);
        assert!(value(*number) <= want, "own.{number:04} has {} of {want}", value(*number));
        value(*number) != want
    };
    (0..series).filter(off).count()
}

fn file(state_dir: &Path) -> std::path::PathBuf {
    state_dir.join("journal.redb")
}

fn moved_aside(agent: &Agent) -> usize {
    let files = std::fs::read_dir(agent.state_dir()).unwrap();
    files.filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().contains(".damaged-")).count()
}

fn errors(agent: &Agent, reason: &str) -> f64 {
    agent.own("tallyd_store_errors_total", &format!("store=\"journal\",reason=\"{reason}\""))
}

/// `FLIPS=1000 cargo test --test it a_flipped_bit` tries more of them.
fn flips() -> u64 {
    std::env::var("FLIPS").map_or(16, |flips| flips.parse().unwrap())
}

#[test]
fn a_flipped_bit_stops_no_start_and_costs_at_most_the_record_it_is_in() {
    let mut agent = Agent::start(&["flush.interval=100ms", "flush.window=1s"]);
    fill(&agent, 0..SERIES);
    agent.signal("KILL");
    let mut random = Random(0x5eed_0012);
    let (mut refused, mut hurt) = (0, 0);
    let whole = std::fs::read(file(&agent.state_dir())).unwrap();
    for _ in 0..flips() {
        agent = agent.restart_with("KILL", |state_dir| {
            for old in std::fs::read_dir(state_dir).unwrap() {
                std::fs::remove_file(old.unwrap().path()).unwrap();
            }
            let mut bytes = whole.clone();
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
            std::fs::write(file(state_dir), bytes).unwrap();
        });
        let lacks = wrong(&agent, SERIES, 1);
        assert!(lacks <= 1, "{lacks} series lack something");
        let (aside, damaged) = (errors(&agent, "moved_aside"), errors(&agent, "damaged_record"));
        assert_eq!(moved_aside(&agent) as f64, aside);
        assert!(lacks == 0 || damaged >= 1.0, "the damage is counted");
        (refused, hurt) = (refused + aside as u64, hurt + lacks);
        // It counts on.
        fill(&agent, 0..SERIES);
        assert!(wrong(&agent, SERIES, 2) <= 1);
    }
    eprintln!("{refused} files were refused, {hurt} series were hurt");
}

#[test]
fn a_file_cut_short_stops_no_start_and_what_is_left_counts_on() {
    let mut agent = Agent::start(&["flush.interval=100ms", "flush.window=1s"]);
    fill(&agent, 0..SERIES);
    agent.signal("KILL");
    let whole = std::fs::read(file(&agent.state_dir())).unwrap();
    let mut left = Vec::new();
    for part in [10, 9, 5, 1, 0] {
        agent = agent.restart_with("KILL", |state_dir| {
            for old in std::fs::read_dir(state_dir).unwrap() {
                std::fs::remove_file(old.unwrap().path()).unwrap();
            }
            std::fs::write(file(state_dir), &whole[..whole.len() / 10 * part]).unwrap();
        });
        let lacks = wrong(&agent, SERIES, 1) as u64;
        left.push(SERIES - lacks);
        assert!(part != 10 || lacks == 0);
        assert!(
            lacks == 0 || part == 0 || errors(&agent, "moved_aside") == 1.0,
            "{part} tenths: {lacks} lack something"
        );
        agent.ingest(r#"{"name":"after","type":"COUNTER","value":1}"#);
        assert!(same(&agent.metric("after").unwrap()["value"], &json!(1)));
    }
    assert!(left.is_sorted_by(|more, less| more >= less), "{left:?}");
}

/// A file system of a few MiB, unmounted when it is dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        eprintln!("SKIPPED: no right to mount a small file system");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0.path()).status().unwrap();
    }
}

#[test]
fn on_a_full_disk_counting_goes_on_and_all_is_written_when_there_is_room() {
    let Some(disk) = SmallDisk::mount("6m") else { return };
    let state = format!("state_dir={}", disk.0.path().join("state").display());
    let mut agent = Agent::start(&[&state, "flush.interval=100ms", "flush.window=1s"]);
    fill(&agent, 0..100);
    // All the room that is left.
    let filler = disk.0.path().join("filler");
    let fill_up = || {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&filler).unwrap();
        let zeros = [1; 4096];
        while std::io::Write::write_all(&mut &file, &zeros).is_ok() {}
    };
    fill_up();
    // So much that the pages that are free in the file do not do for it.
    let mut sent = 100;
    until("the journal to be full", || {
        let records: Vec<_> = (sent..sent + 500)
            .map(|number| json!({"name": format!("own.{number:04}"), "type": "COUNTER", "value": number + 1}))
            .collect();
        assert_eq!(agent.ingest(serde_json::to_vec(&records).unwrap()).status, 200);
        sent += 500;
        std::thread::sleep(std::time::Duration::from_millis(150));
        let ready = agent.get("/-/ready");
        (ready.status == 503 && ready.text().contains("journal")).then_some(())
    });
    assert!(errors(&agent, "no_space") > 0.0);
    assert_eq!(wrong(&agent, sent, 1), 0, "all is counted in memory");
    // What can't be promised is not.
    let answer = crate::http::request(
        agent.address("ingest"),
        "POST",
        "/ingest/metrics",
        &[("Idempotency-Key", "first")],
        br#"{"name":"keyed","type":"COUNTER","value":1}"#,
    );
    assert_eq!((answer.status, agent.metric("keyed")), (503, None), "{}", answer.text());
    std::fs::remove_file(&filler).unwrap();
    until("the journal to be written again", || (agent.get("/-/ready").status == 200).then_some(()));
    agent.ingest(r#"{"name":"last","type":"COUNTER","value":1}"#);
    fill(&agent, 0..1);
    agent = agent.restart_after("KILL");
    let first = agent.metric("own.0000").unwrap();
    assert!(same(&first["value"], &json!(2)), "{first}");
    fill(&agent, 1..sent);
    assert_eq!(wrong(&agent, sent, 2), 0, "all that was counted meanwhile is in the journal");
    assert!(same(&agent.metric("last").unwrap()["value"], &json!(1)));
    assert_eq!(moved_aside_in(&disk.0.path().join("state")), 0);
}

fn moved_aside_in(state_dir: &Path) -> usize {
    let files = std::fs::read_dir(state_dir).unwrap();
    files.filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().contains(".damaged-")).count()
}

#[test]
fn a_second_process_on_the_same_state_directory_ends_with_69_and_harms_nothing() {
    let agent = Agent::start(&["flush.interval=100ms", "flush.window=1s"]);
    fill(&agent, 0..50);
    for _ in 0..3 {
        let mut second = tallyd();
        second.env("TALLYD_STATE_DIR", agent.state_dir()).stdin(Stdio::null()).stderr(Stdio::null());
        for setting in
            ["listen.udp=127.0.0.1:0", "listen.tcp=127.0.0.1:0", "http.ingest=127.0.0.1:0", "http.api=127.0.0.1:0"]
        {
            second.args(["--set", setting]);
        }
        assert_eq!(second.status().unwrap().code(), Some(69));
        fill(&agent, 0..50);
    }
    let agent = agent.restart_after("KILL");
    assert_eq!(wrong(&agent, 50, 4), 0);
}

/// A commit after the other, so that the journal is never at rest: a series that is idle is freed all the same.
#[test]
fn idle_series_are_freed_though_every_commit_outlasts_its_interval() {
    let agent = Agent::start(&["flush.interval=10ms", "flush.window=100ms", "limits.idle=1s"]);
    agent.ingest(r#"{"name":"idle","type":"COUNTER","value":1}"#);
    until("the idle series to be freed", || {
        fill_quickly(&agent, 3_000);
        (agent.own("tallyd_series_expired_total", "") >= 1.0).then_some(())
    });
    assert!(same(&agent.metric("idle").unwrap()["value"], &json!(1)), "the journal keeps it");
}

fn fill_quickly(agent: &Agent, series: u64) {
    let records: Vec<_> =
        (0..series).map(|number| json!({"name": format!("busy.{number}"), "type": "COUNTER", "value": 1})).collect();
    assert_eq!(agent.ingest(serde_json::to_vec(&records).unwrap()).status, 200);
}
