//! Clients as they come from their registries, each by every transport it has: what their public methods send is what the API
//! shows, exactly, and no line is rejected. The scripts are in tests/clients; they say what they expect, and fail when a client
//! has a method that they do not call. The client in Rust is in `cadence`.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::agent::{Agent, PATIENCE, collect, same, until_within};

/// An installation waits for a registry.
pub const TO_INSTALL: Duration = Duration::from_secs(300);

/// A script takes a few seconds on a machine that does nothing else.
const TO_SEND: Duration = Duration::from_secs(120);

#[test]
fn statsd_for_python() {
    for (transport, listener) in [("udp", "udp"), ("udp6", "udp"), ("tcp", "tcp"), ("unix", "unix")] {
        let agent = Listening::start(transport, "relative");
        agent.hears_all_of(listener, &python("statsd_client.py"), &[transport.trim_end_matches('6')]);
    }
}

#[test]
fn datadog_for_python() {
    // The client means a negative gauge as a value, and either way an agent may be asked to read it.
    let transports =
        [("udp", "udp", "relative"), ("unixgram", "unixgram", "absolute"), ("unixstream", "unix", "relative")];
    for (transport, listener, sign) in transports {
        let agent = Listening::start(transport, sign);
        agent.hears_all_of(listener, &python("datadog_client.py"), &[transport, sign]);
    }
}

#[test]
fn hot_shots_for_node() {
    let transports = [
        ("udp", "udp", "relative"),
        ("tcp", "tcp", "relative"),
        ("uds", "unixgram", "absolute"),
        ("stream", "unix", "relative"),
    ];
    for (transport, listener, sign) in transports {
        let agent = Listening::start(transport, sign);
        agent.hears_all_of(listener, &node("hot_shots_client.js"), &[transport, sign]);
    }
}

/// An agent, and the address of the one listener that a client is to send to.
pub struct Listening {
    pub agent: Agent,
    pub address: String,
    _directory: tempfile::TempDir,
}

impl Listening {
    pub fn start(transport: &str, sign: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines").display().to_string();
        let listener = match transport {
            "unixgram" | "uds" => format!("listen.unixgram={path}"),
            "unix" | "unixstream" | "stream" => format!("listen.unix={path}"),
            "udp6" => "listen.udp=[::1]:0".to_owned(),
            "udp" | "tcp" => "listen.udp=127.0.0.1:0".to_owned(),
            other => panic!("{other}"),
        };
        let agent = Agent::start(&[&listener, &format!("protocol.gauge_sign={sign}"), "store.kind=memory"]);
        let address = match transport {
            "udp" | "udp6" => agent.address("udp").to_string(),
            "tcp" => agent.address("tcp").to_string(),
            _ => path,
        };
        Self { agent, address, _directory: directory }
    }

    /// Runs a script with a transport, the address, and what more it takes; then all that it says must be there.
    #[track_caller]
    fn hears_all_of(&self, listener: &str, script: &Script, given: &[&str]) {
        let (transport, more) = given.split_first().unwrap();
        let mut command = Command::new(&script.interpreter);
        command.arg(&script.path).args([transport, self.address.as_str()]).args(more);
        // What a machine says of itself is no part of what a script expects.
        for (name, _) in std::env::vars() {
            if name.starts_with("DD_") || name.starts_with("DATADOG_") {
                command.env_remove(name);
            }
        }
        command.envs(script.environment.iter().cloned());
        let said = run(command, TO_SEND);
        let want: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        self.has_exactly(listener, &want);
    }

    /// Waits until these series, events and service checks are there, and no others; then nothing may be rejected.
    #[track_caller]
    pub fn has_exactly(&self, listener: &str, want: &Value) {
        let mut last = String::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            last = self.differences(want).join("\n");
            if last.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let rejects = self.agent.get("/data/rejects").json();
        assert_eq!(rejects, json!([]), "by {listener}");
        assert!(last.is_empty(), "by {listener}, after {PATIENCE:?}:\n{last}");
        assert_eq!(self.agent.own("tallyd_lines_rejected_total", ""), 0.0);
        let accepted = format!("listener=\"{listener}\"");
        assert!(self.agent.own("tallyd_lines_accepted_total", &accepted) > 0.0, "nothing came by {listener}");
        // A sample of now may be late on a machine that is slow.
        let unplaced = self.agent.own("tallyd_timestamps_unplaced_total", "");
        assert!(unplaced >= want["unplaced"].as_f64().unwrap(), "{unplaced}");
    }

    fn differences(&self, want: &Value) -> Vec<String> {
        let mut differences = self.of_series(want);
        for what in ["events", "checks"] {
            let mut have = self.agent.get(&format!("/data/{what}")).json().as_array().unwrap().clone();
            for one in &mut have {
                for own in ["time", "listener", "source"] {
                    one.as_object_mut().unwrap().remove(own);
                }
            }
            for wanted in want[what].as_array().unwrap() {
                match have.iter().position(|one| one == wanted) {
                    Some(at) => drop(have.remove(at)),
                    None => differences.push(format!("none of the {what} is {wanted}")),
                }
            }
            differences.extend(have.iter().map(|one| format!("nobody sent of the {what} {one}")));
        }
        differences
    }

    fn of_series(&self, want: &Value) -> Vec<String> {
        let mut have = self.series();
        let mut differences = Vec::new();
        for wanted in want["metrics"].as_array().unwrap() {
            let name = identity(&wanted["type"], wanted["name"].as_str().unwrap(), &wanted["tags"]);
            let Some(series) = have.remove(&name) else {
                differences.push(format!("no {name}"));
                continue;
            };
            for (field, value) in wanted["fields"].as_object().unwrap() {
                if !same(&series[field], value) {
                    differences.push(format!("{name}: {field} is {}, not {value}", series[field]));
                }
            }
        }
        differences.extend(have.keys().map(|name| format!("nobody sent {name}")));
        differences
    }

    /// All series, by type, name and tags.
    fn series(&self) -> BTreeMap<String, Value> {
        let all = self.agent.get("/data/metrics?limit=10000").json();
        let named = all.as_array().unwrap().iter().map(|series| {
            let (level, name) = (series["level"].as_str().unwrap(), series["name"].as_str().unwrap());
            let dotted = if level.is_empty() { name.to_owned() } else { format!("{level}.{name}") };
            (identity(&series["type"], &dotted, &series["tags"]), series.clone())
        });
        named.collect()
    }
}

/// Tags are sorted in a map of JSON.
fn identity(kind: &Value, name: &str, tags: &Value) -> String {
    format!("{kind} {name} {tags}")
}

/// What a client is expected to come to, in the form in which the scripts say it.
#[derive(Default)]
pub struct Expected {
    metrics: Vec<Value>,
    pub unplaced: u64,
}

impl Expected {
    pub fn counter(&mut self, name: &str, increments: f64, decrements: f64, tags: &Value) {
        let fields = json!({"value": increments - decrements, "increments": increments, "decrements": decrements});
        self.metric("COUNTER", name, tags, &fields);
    }

    /// A timer, histogram or distribution. The rate weighs the count and not the sum, as with Etsy's server.
    pub fn observed(&mut self, kind: &str, name: &str, values: &[f64], rate: f64, tags: &Value) {
        let sum = values.iter().sum::<f64>();
        let count = values.len() as f64;
        let (min, max) =
            values.iter().fold((f64::MAX, f64::MIN), |(min, max), &value| (value.min(min), value.max(max)));
        let fields = json!({"count": count / rate, "sum": sum, "mean": sum / count, "min": min, "max": max});
        self.metric(kind, name, tags, &fields);
    }

    pub fn metric(&mut self, kind: &str, name: &str, tags: &Value, fields: &Value) {
        self.metrics.push(json!({"type": kind, "name": name, "tags": tags, "fields": fields}));
    }

    pub fn finish(self) -> Value {
        json!({"metrics": self.metrics, "events": [], "checks": [], "unplaced": self.unplaced})
    }
}

/// A script with what runs it.
struct Script {
    interpreter: PathBuf,
    path: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

fn python(script: &str) -> Script {
    let interpreter = installed("python").join("bin/python");
    // No compiled files beside the scripts.
    Script { interpreter, path: scripts().join(script), environment: vec![("PYTHONDONTWRITEBYTECODE", "1".into())] }
}

fn node(script: &str) -> Script {
    let modules = installed("node").join("node_modules");
    Script { interpreter: "node".into(), path: scripts().join(script), environment: vec![("NODE_PATH", modules)] }
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// Where the clients of a language are; the first who asks has them installed.
fn installed(kind: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    let mut command = Command::new(scripts().join("install.sh"));
    command.arg(kind).arg(&folder);
    run(command, TO_INSTALL);
    folder.join(kind)
}

/// Runs a command to its end, and gives what it wrote to standard output.
#[track_caller]
pub fn run(mut command: Command, within: Duration) -> String {
    // A group of its own, so that what a script started ends with it.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (stdout, stderr) = (collect(child.stdout.take().unwrap()), collect(child.stderr.take().unwrap()));
    let deadline = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let group = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
            panic!("{command:?} did not end within {within:?}:\n{}", stderr.lock().unwrap());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    // The pipes are read on threads of their own, which end with the pipes.
    until_within(PATIENCE, "the end of the pipes", || {
        [&stdout, &stderr].iter().all(|text| Arc::strong_count(text) == 1).then_some(())
    });
    assert!(status.success(), "{command:?}: {status}\n{}", stderr.lock().unwrap());
    stdout.lock().unwrap().clone()
}
