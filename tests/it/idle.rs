//! What an agent that has nothing to do costs: it blocks, and is woken a few times a second.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::agent::{Agent, PATIENCE};

/// How long is looked at.
const SPAN: Duration = Duration::from_secs(5);

/// Part of a core that an idle agent may use. It does not depend on what else runs: time is that of the processor.
const SHARE_MAX: f64 = 0.005;

/// Times a second that all its threads together may wake.
const WAKES_MAX: f64 = 30.0;

/// What the threads of a process have done since they began.
#[derive(Debug, Clone, Copy)]
struct Activity {
    cpu: Duration,
    /// Waits begun.
    waits: u64,
}

impl Activity {
    fn of(process: u32) -> Self {
        let mut sum = Self { cpu: Duration::ZERO, waits: 0 };
        for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
            let thread = thread.unwrap().path();
            let schedule = fs::read_to_string(thread.join("schedstat")).unwrap();
            sum.cpu += Duration::from_nanos(schedule.split(' ').next().unwrap().parse().unwrap());
            let status = fs::read_to_string(thread.join("status")).unwrap();
            let waits = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            sum.waits += waits.trim().parse::<u64>().unwrap();
        }
        sum
    }
}

/// Waits for a span in which the agent is quiet: the first may have the end of a window in it, or of the start.
#[track_caller]
fn becomes_quiet(agent: &Agent) {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let (before, begun) = (Activity::of(agent.process()), Instant::now());
        thread::sleep(SPAN);
        let (after, took) = (Activity::of(agent.process()), begun.elapsed().as_secs_f64());
        let share = (after.cpu - before.cpu).as_secs_f64() / took;
        let wakes = (after.waits - before.waits) as f64 / took;
        eprintln!("idle: {:.3} % of a core, {wakes:.1} wakes a second", share * 100.0);
        if share < SHARE_MAX && wakes < WAKES_MAX {
            return;
        }
        let busy = format!("{:.3} % of a core, {wakes:.1} wakes a second", share * 100.0);
        assert!(Instant::now() < deadline, "an idle agent uses {busy}");
    }
}

/// Every kind of listener, and the journal.
fn agent() -> (tempfile::TempDir, Agent) {
    let directory = tempfile::tempdir().unwrap();
    let path = |kind: &str| format!("listen.{kind}={}", directory.path().join(kind).display());
    let agent = Agent::start(&[&path("unixgram"), &path("unix")]);
    (directory, agent)
}

#[test]
fn an_agent_without_series_is_quiet() {
    let (_directory, agent) = agent();
    becomes_quiet(&agent);
}

/// An open stream and series of every kind, of which nothing comes any more.
#[test]
fn an_agent_with_series_that_rest_is_as_quiet() {
    let (_directory, agent) = agent();
    let lines = (0..20).flat_map(|i| ["c", "g", "ms", "h", "d", "s", "m"].map(|kind| format!("rests{i}:{i}|{kind}")));
    let lines: Vec<_> = lines.collect();
    agent.datagram(lines.join("\n"));
    let _stream = agent.connect();
    agent.datagram("last:1|c");
    agent.wait_for("last", "value", 1);
    becomes_quiet(&agent);
}
