//! tallyd beside Etsy's StatsD from the npm registry: both are sent the same lines, and Graphite gets the same lines of both.
//!
//! The two end their windows at different moments, so lines are sent in the longest stretch in which neither does; both say
//! how many packets a window had, and where a step was cut in two for one of them, all of it is tried again.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::agent::{Agent, until, until_within};
use crate::clients::TO_INSTALL;
use crate::graphite::Sink;

const VERSION: &str = "0.9.0";

/// The length of both's windows, in seconds.
const WINDOW_S: u64 = 3;

/// How far a figure of many samples may be from the true one: half a bucket; twice that for a sum of squares.
const ERROR_MAX: f64 = 0.005_5;

/// Settings of both that mean the same.
struct Pair {
    name: &'static str,
    theirs: Value,
    ours: &'static [&'static str],
}

fn pairs() -> Vec<Pair> {
    let new = json!({ "legacyNamespace": false });
    let named = json!({
        "legacyNamespace": false, "globalPrefix": "g", "globalSuffix": "end", "prefixCounter": "c", "prefixTimer": "t",
        "prefixGauge": "", "prefixSet": "s",
    });
    let bins = json!([{ "metric": "foo", "bins": [] }, { "metric": "", "bins": [0.5, 10, 100, "inf"] }]);
    let asked = json!(["count", "count_ps", "upper", "mean_percent", "upper_percent", "sum_squares", "histogram"]);
    let pair = |name, theirs, ours| Pair { name, theirs, ours };
    vec![
        pair("as they come", json!({}), &[]),
        pair("new namespace", json!({ "graphite": new }), &["export.graphite.legacy_namespace=false"]),
        pair(
            "prefixes and suffix",
            json!({ "graphite": named, "prefixStats": "me" }),
            &[
                "export.graphite.legacy_namespace=false",
                "export.graphite.global_prefix=g",
                "export.graphite.global_suffix=end",
                "export.graphite.prefix_counter=c",
                "export.graphite.prefix_timer=t",
                "export.graphite.prefix_gauge=",
                "export.graphite.prefix_set=s",
                "export.graphite.prefix_stats=me",
            ],
        ),
        pair(
            "old namespace with a suffix",
            json!({ "graphite": { "globalSuffix": "end" }, "prefixStats": "me" }),
            &["export.graphite.global_suffix=end", "export.graphite.prefix_stats=me"],
        ),
        pair("percentiles", json!({ "percentThreshold": [90, 99.9, 50, -10] }), &["flush.percentiles=90,99.9,50,-10"]),
        pair(
            "bins",
            json!({ "histogram": bins }),
            &[r#"flush.histograms=[{metric="foo",bins=[]},{metric="",bins=[0.5,10,100,"inf"]}]"#],
        ),
        pair(
            "figures that are asked for",
            json!({ "histogram": bins, "calculatedTimerMetrics": asked, "percentThreshold": [90, 99.9] }),
            &[
                r#"flush.histograms=[{metric="foo",bins=[]},{metric="",bins=[0.5,10,100,"inf"]}]"#,
                "flush.timer_metrics=count,count_ps,upper,mean_percent,upper_percent,sum_squares,histogram",
                "flush.percentiles=90,99.9",
            ],
        ),
        pair("nothing idle", json!({ "deleteIdleStats": true }), &["flush.delete_idle_stats=true"]),
        pair(
            "no idle counters, and gauges for two windows",
            json!({ "deleteCounters": true, "deleteGauges": true, "gaugesMaxTTL": 2 }),
            &["flush.delete_counters=true", "flush.delete_gauges=true", "flush.gauges_max_ttl=2"],
        ),
        pair("rates alone", json!({ "flush_counts": false }), &["export.graphite.flush_counts=false"]),
    ]
}

/// What differs on purpose: a part of a path, and why its value is not compared. The path has to be there.
const DIFFERENCES: &[(&str, &str)] = &[
    ("graphiteStats.", "how long each took to send, and when it began"),
    ("processing_time", "how long each took to compute"),
    ("timestamp_lag", "how late the other one's timer is; our windows end when they should"),
];

/// What differs on purpose where gauges are left out: by which setting, in which step, which gauge. A change of a gauge that
/// was left out goes on from its value here, and from 0 there.
const CHANGED: &[(&str, usize, &str)] =
    &[("deleteIdleStats", 1, "a.gauge"), ("deleteIdleStats", 3, "gone.gauge"), ("deleteGauges", 3, "gone.gauge")];

/// The datagrams of each step, a window each. A single datagram of a step may be cut off by no window.
fn steps() -> Vec<Vec<String>> {
    let many = (0..300).map(|n| f64::from((n * 7_919) % 1_009) + 0.125);
    let many: String = many.fold(String::new(), |mut lines, value| {
        let _ = writeln!(lines, "many.timer:{value}|ms");
        lines
    });
    let first = [
        "plain:1|c\nplain:2|c\nrate:3|c|@0.1\nfloat:0.1|c\nfloat:0.2|c\nless:-4|c\nbig:123456789012|c",
        "foo.timer:5|ms\nfoo.timer:15|ms\nfoo.timer:25|ms\nbar.timer:0.25|ms\nbar.timer:10|ms\nbar.timer:9.99|ms",
        "one.timer:42|ms\nsampled.timer:10|ms|@0.5\nsampled.timer:20|ms\npacked.timer:1|ms:2|ms:3|ms:4|ms",
        "a.gauge:7|g\na.gauge:+3|g\nlow.gauge:-5.5|g\ngone.gauge:100|g\nlarge.gauge:1e21|g\nsmall.gauge:1e-7|g",
        "a.set:x|s\na.set:y|s\na.set:x|s\na set/of %things:1|s",
        "tagged:1|c|#zone:b,host:a\ntagged.timer:3|ms|#host:a\ntagged.gauge:3|g|#host:a\nbad\nworse:x|c\n",
    ];
    let second = ["plain:5|c\na.gauge:-1|g\nfoo.timer:1|ms|@0.25\na.set:z|s"];
    let last = ["plain:1|c\ngone.gauge:+5|g\na.set:x|s\none.timer:1|ms"];
    let owned = |lines: &[&str]| lines.iter().map(|&lines| lines.to_owned()).collect::<Vec<_>>();
    let mut steps = vec![owned(&first), owned(&second), owned(&["still:1|c"]), owned(&last)];
    steps[0].extend(many.lines().collect::<Vec<_>>().chunks(100).map(|lines| lines.join("\n")));
    steps
}

/// The package, which is fetched once.
pub fn package() -> &'static Path {
    static PACKAGE: OnceLock<PathBuf> = OnceLock::new();
    PACKAGE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("statsd-{VERSION}"));
        let package = folder.join("node_modules/statsd");
        if !package.join("stats.js").exists() {
            std::fs::create_dir_all(&folder).unwrap();
            let quiet = ["--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"];
            let mut npm = Command::new("npm");
            npm.arg("install").arg("--prefix").arg(&folder).args(quiet).arg(format!("statsd@{VERSION}"));
            crate::clients::run(npm, TO_INSTALL);
        }
        package
    })
}

/// A process of Etsy's, which is killed when dropped.
struct Theirs {
    child: Child,
    port: u16,
}

impl Theirs {
    fn start(config: &Value, sink: &Sink, folder: &Path) -> Self {
        let (port, other) = (free_port(), free_port());
        let mut config = config.clone();
        let own = json!({
            "address": "127.0.0.1", "port": port, "mgmt_address": "127.0.0.1", "mgmt_port": other,
            "graphiteHost": "127.0.0.1", "graphitePort": sink.address.port(), "flushInterval": WINDOW_S * 1_000,
        });
        config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        let file = folder.join("etsy.js");
        std::fs::write(&file, config.to_string()).unwrap();
        let mut node = Command::new("node");
        node.arg(package().join("stats.js")).arg(&file).current_dir(package());
        let child = node.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self { child: child.expect("node can't be run; packaging/setup.sh tests installs it"), port }
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A port that is free for both TCP and UDP.
fn free_port() -> u16 {
    until("a free port", || {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        UdpSocket::bind(("127.0.0.1", port)).is_ok().then_some(port)
    })
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

type Lines = BTreeMap<String, String>;

/// The lines of both, of each step; `None` where a step was cut by the end of a window.
fn run(pair: &Pair) -> Option<Vec<[Lines; 2]>> {
    let sinks = [Sink::start(), Sink::start()];
    let mut settings = vec![format!("flush.window={WINDOW_S}s"), "listen.workers=1".to_owned(), sinks[1].setting()];
    settings.extend(pair.ours.iter().map(|&setting| setting.to_owned()));
    let agent = Agent::start(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    let theirs = Theirs::start(&pair.theirs, &sinks[0], agent.directory());
    // The first window of each has no lag yet.
    let phases = until_within(Duration::from_secs(60), "the first window of both", || {
        let first = sinks.each_ref().map(|sink| sink.windows().keys().next().copied());
        Some([first[0]? % WINDOW_S, first[1]? % WINDOW_S])
    });
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let ports = [theirs.port, agent.address("udp").port()];
    steps().iter().map(|step| run_step(step, &sinks, phases, &socket, ports)).collect()
}

fn run_step(
    step: &[String],
    sinks: &[Sink; 2],
    phases: [u64; 2],
    socket: &UdpSocket,
    ports: [u16; 2],
) -> Option<[Lines; 2]> {
    wait_for_the_middle(phases);
    let at_s = now_ms() / 1_000;
    for datagram in step {
        for port in ports {
            socket.send_to(datagram.as_bytes(), ("127.0.0.1", port)).unwrap();
        }
    }
    let lines = until("the window of both", || {
        let lines = sinks.each_ref().map(|sink| sink.windows().into_iter().find(|(end_s, _)| *end_s > at_s));
        let [theirs, ours] = lines;
        Some([theirs?.1, ours?.1])
    });
    let packets = |lines: &Lines| {
        let (_, count) = lines.iter().find(|(path, _)| path.contains("packets_received")).unwrap();
        count.parse::<f64>().unwrap()
    };
    // Of the two lines one is a rate; which one is found first is the same on both sides.
    let want = [step.len() as f64, step.len() as f64 / WINDOW_S as f64];
    let is_whole = |lines: &Lines| want.iter().any(|want| (packets(lines) - want).abs() < 1e-9);
    lines.iter().all(is_whole).then_some(lines)
}

/// Waits until a second after the end of a window of one of both, where that of the other has ended too and neither ends soon.
fn wait_for_the_middle(phases: [u64; 2]) {
    // The longest stretch without an end of either begins at the one after which the other is the further away.
    let apart = (phases[1] + WINDOW_S - phases[0]) % WINDOW_S;
    let begin_s = if apart == 0 || apart > WINDOW_S / 2 { phases[0] } else { phases[1] };
    until("the middle of a window", || {
        let in_ms = (now_ms() + (WINDOW_S - begin_s) * 1_000) % (WINDOW_S * 1_000);
        (500..1_000).contains(&in_ms).then_some(())
    });
}

/// A path with its tags in order: Etsy's are as they were sent.
fn sorted(path: &str) -> String {
    let mut parts: Vec<_> = path.split(';').collect();
    parts[1..].sort_unstable();
    parts.join(";")
}

/// How many figures were the same to the last digit, the same but for rounding, within the histogram's error, and not
/// compared.
#[derive(Debug, Default)]
struct Compared {
    same: usize,
    rounded: usize,
    within: usize,
    different: usize,
}

impl Compared {
    fn total(&self) -> usize {
        self.same + self.rounded + self.within + self.different
    }
}

fn compare(pair: &Pair, step: usize, [theirs, ours]: &[Lines; 2], compared: &mut Compared) -> Vec<String> {
    let by_path = |lines: &Lines| lines.iter().map(|(path, value)| (sorted(path), value.clone())).collect::<Lines>();
    let (theirs, ours) = (by_path(theirs), by_path(ours));
    let mut wrong = Vec::new();
    let mut say = |what: String| wrong.push(format!("{}, step {step}: {what}", pair.name));
    ours.keys().filter(|path| !theirs.contains_key(*path)).for_each(|path| say(format!("{path} is ours alone")));
    for (path, theirs) in theirs {
        let Some(ours) = ours.get(&path) else {
            say(format!("{path} is theirs alone"));
            continue;
        };
        let is_changed = CHANGED.iter().any(|(setting, in_step, gauge)| {
            pair.theirs.get(*setting).is_some() && step == *in_step && path.contains(gauge)
        });
        let numbers = [&theirs, ours].map(|text| text.parse::<f64>().unwrap());
        let apart = (numbers[0] - numbers[1]).abs();
        let size = numbers[0].abs().max(numbers[1].abs());
        if DIFFERENCES.iter().any(|(part, _)| path.contains(part)) || is_changed {
            compared.different += 1;
        } else if theirs == *ours {
            compared.same += 1;
        } else if apart <= 1e-9 * size {
            compared.rounded += 1;
        } else if path.contains("many.timer") && apart <= error_max(&path, size) {
            compared.within += 1;
        } else {
            say(format!("{path} is {ours}, and {theirs} with them"));
        }
    }
    wrong
}

/// How far a figure of many samples may be off: counts, sums, mean, deviation and extremes not at all.
fn error_max(path: &str, size: f64) -> f64 {
    let figure = path.split("many.timer.").nth(1).unwrap_or_default();
    if figure.starts_with("histogram.") {
        // Three hundred values from 0 to 1,009, and what lies in the bucket of a bound.
        2.0
    } else if figure.starts_with("count_") {
        // How many values a threshold takes is known, wherever they lie.
        0.0
    } else if figure.starts_with("sum_squares_") {
        2.0 * ERROR_MAX * size
    } else if figure.starts_with("median") || figure.contains("_9") || figure.contains("_50") || figure.contains("_top")
    {
        ERROR_MAX * size
    } else {
        0.0
    }
}

#[test]
fn graphite_gets_the_same_lines_from_both() {
    let begun = Instant::now();
    package();
    let (mut compared, mut wrong) = (Compared::default(), Vec::new());
    let threads: Vec<_> = pairs()
        .into_iter()
        .map(|pair| {
            thread::spawn(move || {
                let steps = (0..4).find_map(|_| run(&pair));
                (steps.unwrap_or_else(|| panic!("{}: each time a window ended within a step", pair.name)), pair)
            })
        })
        .collect();
    for thread in threads {
        let (steps, pair) = thread.join().unwrap();
        let before = compared.total();
        for (number, lines) in steps.iter().enumerate() {
            wrong.extend(compare(&pair, number, lines, &mut compared));
        }
        assert!(compared.total() - before > 60, "{}: {} figures", pair.name, compared.total() - before);
    }
    let Compared { same, rounded, within, different } = compared;
    eprintln!(
        "{} figures in {:.0} s: {same} the same to the last digit, {rounded} but for rounding, {within} within the error of \
         the histogram, {different} that differ on purpose, {} wrong",
        compared.total(),
        begun.elapsed().as_secs_f64(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(within > 0 && different > 0, "both are there to be seen");
}
