//! A flood of names: memory stays within its budget, and nothing that was sent is lost, whatever names it came under.
//!
//! `FLOOD=20000000 cargo test --release --test it flood -- --nocapture` sends so many names, and prints what they took.

use std::io::{BufWriter, Write};
use std::thread;
use std::time::Instant;

use crate::agent::{Agent, until};

/// How much series may take, and how much more the rest of the process.
const BUDGET: u64 = 32 << 20;
const BESIDE: u64 = 64 << 20;

const SENDERS: u64 = 4;
const OLD: u64 = 100;
/// Names in bodies of JSON, where a name is looked up by another form of it.
const BODIES: u64 = 20;
const RECORDS: u64 = 500;

/// How many names come by TCP.
fn names() -> u64 {
    let names = std::env::var("FLOOD").map_or(400_000, |names| names.parse().unwrap());
    names / SENDERS * SENDERS
}

fn count_old(agent: &Agent) {
    let lines: String = (0..OLD).map(|n| format!("old.{n}:1|c\n")).collect();
    agent.connect().write_all(lines.as_bytes()).unwrap();
}

fn flood_by_tcp(agent: &Agent, sender: u64, names: u64) {
    let mut stream = BufWriter::with_capacity(64 << 10, agent.connect());
    (0..names).for_each(|n| writeln!(stream, "flood.{sender}.{n}:1|c").unwrap());
    stream.flush().unwrap();
}

fn flood_by_json(agent: &Agent) {
    for body in 0..BODIES {
        let record = |n| format!(r#"{{"name":"json.{body}.{n}","type":"COUNTER","value":1}}"#);
        let records: Vec<_> = (0..RECORDS).map(record).collect();
        let answer = agent.ingest(format!("[{}]", records.join(",")));
        assert!(answer.status < 300, "{} {}", answer.status, answer.text());
    }
}

fn lines(agent: &Agent, lines: u64) {
    until(&format!("{lines} lines"), || (agent.own("tallyd_lines_accepted_total", "") == lines as f64).then_some(()));
}

fn value(agent: &Agent, key: &str) -> u64 {
    agent.metric(key).map_or(0, |metric| metric["value"].as_u64().unwrap())
}

#[test]
fn a_flood_of_names_stays_within_the_budget_and_is_counted_to_the_last() {
    // Only memory bounds it.
    let budget = format!("limits.memory={BUDGET}");
    let agent = Agent::start(&[&budget, "limits.series=1000000000", "limits.new_series=4294967295"]);
    count_old(&agent);
    lines(&agent, OLD);
    let (begun, names) = (Instant::now(), names());
    let before = agent.memory("VmRSS");
    thread::scope(|scope| {
        let agent = &agent;
        (0..SENDERS).for_each(|sender| drop(scope.spawn(move || flood_by_tcp(agent, sender, names / SENDERS))));
        scope.spawn(move || flood_by_json(agent));
    });
    count_old(&agent);
    let flood = names + BODIES * RECORDS;
    lines(&agent, 2 * OLD + flood);
    let took = begun.elapsed();
    let (peak, after) = (agent.memory("VmHWM"), agent.memory("VmRSS"));
    println!("{flood} names in {took:?}: {before} bytes before, {peak} at most, {after} after");
    assert!(peak <= before + BUDGET + BESIDE, "{before} bytes before, {peak} at most");
    assert!(agent.own("tallyd_series_memory_bytes", "") <= BUDGET as f64);
    for n in 0..OLD {
        assert_eq!(value(&agent, &format!("old.{n}")), 2, "old.{n}");
    }
    // Each name has its one, or it is in `_overflow`.
    let overflow = value(&agent, "_overflow");
    let held = agent.own("tallyd_series", "") as u64;
    assert_eq!(held + overflow, flood + OLD + 1);
    assert_eq!(agent.own("tallyd_series_refused_total", "reason=\"budget\"") as u64, overflow);
    assert_eq!(agent.own("tallyd_series_refused_total", "") as u64, overflow);
    assert!(overflow > flood / 2, "{overflow} of {flood} were refused");
}

/// All orders of some words.
fn orders(words: &[&str]) -> Vec<Vec<String>> {
    if words.is_empty() {
        return vec![Vec::new()];
    }
    let with_first = |first: usize| {
        let (mut rest, word) = (words.to_vec(), words[first].to_owned());
        rest.remove(first);
        orders(&rest).into_iter().map(move |order| [vec![word.clone()], order].concat())
    };
    (0..words.len()).flat_map(with_first).collect()
}

#[test]
fn a_series_in_all_its_spellings_stays_within_the_budget_and_is_counted_to_the_last() {
    const ROOM: u64 = 1 << 20;
    let agent = Agent::start(&[&format!("limits.memory={ROOM}")]);
    let before = agent.memory("VmRSS");
    let orders = orders(&["a:1", "b:2", "c:3", "d:4", "e:5", "f:6", "g:7", "h:8"]);
    let mut stream = BufWriter::new(agent.connect());
    orders.iter().for_each(|tags| writeln!(stream, "spelt:1|c|#{}", tags.join(",")).unwrap());
    drop(stream);
    let in_json = &orders[..1_000];
    let record = |tags: &Vec<String>| {
        format!(r#"{{"name":"spelt","type":"COUNTER","value":1,"tags":["{}"]}}"#, tags.join("\",\""))
    };
    let answer = agent.ingest(format!("[{}]", in_json.iter().map(record).collect::<Vec<_>>().join(",")));
    assert!(answer.status < 300, "{} {}", answer.status, answer.text());
    let sent = (orders.len() + in_json.len()) as u64;
    lines(&agent, sent);
    assert_eq!(value(&agent, "spelt;a=1;b=2;c=3;d=4;e=5;f=6;g=7;h=8"), sent);
    assert_eq!(agent.own("tallyd_series", ""), 1.0);
    assert_eq!(agent.own("tallyd_series_refused_total", ""), 0.0);
    let charged = agent.own("tallyd_series_memory_bytes", "");
    assert!(charged <= ROOM as f64 && charged > ROOM as f64 * 0.9, "{charged} bytes");
    let peak = agent.memory("VmHWM");
    assert!(peak <= before + ROOM + BESIDE, "{before} bytes before, {peak} at most");
}
