//! The corpus through the way of `explain`, and random lines compared with the executable reading of the rules.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::*;

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)
}

fn cases() -> Vec<Value> {
    let text = std::fs::read_to_string(corpus("lines.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn base64(text: &str) -> Vec<u8> {
    let digit =
        |byte: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|b| *b == byte);
    let digits: Vec<usize> = text.bytes().filter_map(digit).collect();
    let bytes = |group: &[usize]| {
        let bits = group.iter().fold(0, |bits, digit| bits << 6 | digit) << (6 * (4 - group.len()));
        (bits as u32).to_be_bytes()[1..group.len()].to_vec()
    };
    digits.chunks(4).flat_map(bytes).collect()
}

fn input(case: &Value) -> Vec<u8> {
    match case["input_b64"].as_str() {
        Some(text) => base64(text),
        None => case["input"].as_str().unwrap().as_bytes().to_vec(),
    }
}

/// As a stream's reader hands it over.
fn read_stream(reader: &mut Reader, bytes: &[u8]) -> Found {
    let Reader { config, limits, parser } = reader;
    let found = Found::default();
    let mut finding = Finding { config, limits, bytes, found, tag_errors_of_line: 0 };
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        parser.line(line, number, &mut finding);
    }
    finding.found
}

fn config(case: &Value) -> Config {
    let mut settings = case.get("config").cloned().unwrap_or(json!({}));
    settings.as_object_mut().unwrap().remove("framing");
    serde_json::from_value(settings).unwrap()
}

/// The pieces of a case as they reach a parser.
fn found(case: &Value) -> Vec<Found> {
    let mut reader = Reader::new(&config(case), &Limits::default());
    let bytes = input(case);
    if case["config"]["framing"] == "len32le" {
        let mut rest = &bytes[..];
        let mut all = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let (frame, after) = after.split_at(u32::from_le_bytes(*length) as usize);
            all.push(reader.read(frame, Form::Datagram));
            rest = after;
        }
        return all;
    }
    let is_stream = case["transport"] == "tcp" || (!case["chunks"].is_null() && case["transport"] != "udp");
    match (case["dialect"].as_str(), case["chunks"].as_array()) {
        (Some("json"), _) => vec![reader.read(&bytes, Form::Body)],
        (_, Some(chunks)) if !is_stream => {
            chunks.iter().map(|chunk| reader.read(chunk.as_str().unwrap().as_bytes(), Form::Datagram)).collect()
        }
        _ if is_stream => vec![read_stream(&mut reader, &bytes)],
        _ => vec![reader.read(&bytes, Form::Datagram)],
    }
}

/// Numbers as they compare, and defaults filled in.
fn canonical(metric: &Value) -> Value {
    let mut metric = metric.clone();
    let fields = metric.as_object_mut().unwrap();
    fields.remove("series");
    let rate = fields.get("rate").map_or(1.0, number);
    fields.insert("rate".into(), rate.into());
    if let Some(values) = fields.get("values") {
        // Zero has no sign here.
        let values: Vec<f64> = list(values).iter().map(|value| number(value) + 0.0).collect();
        fields.insert("values".into(), values.into());
    }
    let mut tags: Vec<String> =
        fields.get("tags").map(|tags| serde_json::from_value(tags.clone()).unwrap()).unwrap_or_default();
    tags.sort_unstable();
    fields.insert("tags".into(), tags.into());
    metric
}

/// The executable reading's numbers come as texts: as numbers they would lose their last bit on the way.
fn number(value: &Value) -> f64 {
    value.as_str().map_or_else(|| value.as_f64(), |text| text.parse().ok()).unwrap()
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn check(case: &Value) {
    let id = &case["id"];
    let found: Vec<Value> = found(case).iter().map(|found| serde_json::to_value(found).unwrap()).collect();
    let all = |key: &str| found.iter().flat_map(|found| list(&found[key])).collect::<Vec<_>>();
    if let Some(totals) = case["expect"]["totals"].as_object() {
        for (name, total) in totals {
            let of_name = all("metrics").into_iter().filter(|metric| metric["name"] == *name);
            let sum: f64 = of_name.flat_map(|metric| list(&metric["values"])).filter_map(|value| value.as_f64()).sum();
            assert_eq!(Some(sum), total.as_f64(), "{id}");
        }
        return;
    }
    let wanted = if case["error"].is_null() { list(&case["expect"]["metrics"]) } else { list(&case["expect_also"]) };
    let metrics: Vec<Value> = all("metrics")
        .iter()
        .zip(wanted.iter().map(Some).chain(std::iter::repeat(None)))
        .map(|(metric, wanted)| {
            let mut metric = canonical(metric);
            for key in ["key", "level"] {
                if wanted.is_some_and(|wanted| wanted.get(key).is_none()) {
                    metric.as_object_mut().unwrap().remove(key);
                }
            }
            metric
        })
        .collect();
    assert_eq!(metrics, wanted.iter().map(canonical).collect::<Vec<_>>(), "{id}");
    assert_eq!(all("events"), list(&case["expect"]["events"]), "{id}");
    assert_eq!(all("service_checks"), list(&case["expect"]["service_checks"]), "{id}");
    let reasons = |errors: Vec<Value>| errors.iter().map(|error| error["reason"].clone()).collect::<Vec<_>>();
    let errors = all("errors");
    match (case["expect_errors"].as_u64(), case["error"].is_null()) {
        (Some(count), _) => assert_eq!(errors.len() as u64, count, "{id}"),
        (None, true) => assert_eq!(errors, list(&case["expect"]["errors"]), "{id}"),
        (None, false) => assert_eq!(reasons(errors), vec![case["error"].clone()], "{id}"),
    }
    let tag_errors: u64 = found.iter().map(|found| found["tag_errors"].as_u64().unwrap()).sum();
    assert_eq!(tag_errors, case["tag_errors"].as_u64().unwrap_or(0), "{id}");
}

#[test]
fn every_case_of_the_corpus_holds() {
    let cases = cases();
    assert!(cases.len() > 200);
    cases.iter().for_each(check);
}

/// Small and always the same.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

const PIECES: &[&str] = &[
    ":",
    "|",
    "@",
    "#",
    ",",
    ";",
    "=",
    "[",
    "]",
    "{",
    "}",
    "\n",
    "\r",
    " ",
    "\t",
    "\0",
    "+",
    "-",
    ".",
    "1",
    "0",
    "9",
    "e",
    "c",
    "g",
    "ms",
    "h",
    "d",
    "s",
    "m",
    "kv",
    "C",
    "T",
    "|c:",
    "|e:",
    "card:low",
    "|#",
    "|@",
    "||",
    "|:",
    "::",
    "nan",
    "inf",
    "1e400",
    "0.5",
    "a",
    "é",
    "\u{a0}",
    "\u{1c}",
    "/",
    "\\",
    "\\n",
    "\"",
    "null",
    "true",
    "_e{",
    "_sc|",
    "\u{feff}",
    "-0",
    "1e5",
    "\\ud800",
    "NaN",
    "-Infinity",
    "[[",
    "]]",
    "\"tags\":",
    "\"delta\":",
    "\"values\":[1,\"+2\"]",
    "\"value\":",
    "\"rate\":0.5,",
    "\"timestamp\":5,",
    "18446744073709551615",
    "0.1",
    "1e-7",
    "123456789.25",
    "k:v",
    "k=v",
];

fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..random.below(5) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(4)).min(bytes.len());
        match random.below(8) {
            0..=3 => drop(bytes.splice(at..at, random.of(PIECES).bytes())),
            4 => drop(bytes.splice(at..end, random.of(PIECES).bytes())),
            5 => drop(bytes.drain(at..end)),
            6 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                drop(bytes.splice(at.., other[from..].iter().copied()));
            }
            _ => drop(bytes.splice(at..at, [random.below(256) as u8])),
        }
    }
    bytes
}

/// What differs from the executable reading on purpose: a service check has one of four states, and a timestamp is no
/// longer than 64 bits.
fn is_known_to_differ(bytes: &[u8], expected: &Value) -> bool {
    let statuses = ["01", "12", "23", "012", "123", "0123"];
    let text = String::from_utf8_lossy(bytes);
    let has_status = text.contains("_sc|") && statuses.iter().any(|status| text.contains(&format!("|{status}")));
    let long_timestamp = |metric: &Value| metric["timestamp"].as_f64().is_some_and(|time| time >= u64::MAX as f64);
    has_status || list(&expected["metrics"]).iter().chain(&list(&expected["events"])).any(long_timestamp)
}

const DRIVER: &str = "
import json, sys
sys.path.insert(0, sys.argv[1])
import oracle
for line in sys.stdin:
    case = json.loads(line)
    out = oracle.parse(bytes.fromhex(case['hex']), case['config'], case['form'] == 'body', case['form'] == 'stream')
    out['metrics'] = [oracle.canon(metric) for metric in out['metrics']]
    for metric in out['metrics']:
        metric['rate'] = repr(metric['rate'])
        metric.update({'values': [repr(value) for value in metric['values']]} if 'values' in metric else {})
    print(json.dumps(out))
";

/// A number from the environment, for longer runs than CI's.
fn asked(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// `CASES=500000 SEED=7 cargo test --release --lib random_lines` compares more and others than CI does.
#[test]
fn random_lines_mean_what_the_executable_reading_says() {
    let mut seeds: Vec<Vec<u8>> = cases().iter().map(input).filter(|input| input.len() < 400).collect();
    seeds.extend([
        b"a:1:2|c|@0.5|#k:v|T5|c:x".to_vec(),
        b"{\"name\":\"a\",\"type\":\"SET\",\"value\":[1.0,{\"k\":1e16}],\"tags\":[\"b\",2.5e-7]}".to_vec(),
    ]);
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ asked("SEED", 0));
    let configs = [
        json!({}),
        json!({"name_policy": "none"}),
        json!({"gauge_sign": "absolute"}),
        json!({"tag_dialects": ["dogstatsd", "influx"]}),
        json!({"tag_dialects": ["dogstatsd", "signalfx", "graphite"], "name_policy": "none"}),
    ];
    let cases: Vec<(Vec<u8>, &str, usize)> = (0..asked("CASES", 6_000))
        .map(|_| {
            (mutated(&mut random, &seeds), random.of(&["datagram", "stream", "body"]), random.below(configs.len()))
        })
        .collect();
    let Ok(mut python) = Command::new("python3")
        .args(["-c", DRIVER])
        .arg(corpus(""))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    else {
        println!("skipped: there is no python3 to run tests/corpus/oracle.py");
        return;
    };
    let lines: String = cases
        .iter()
        .map(|(bytes, form, config)| {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            json!({"hex": hex, "form": form, "config": configs[*config]}).to_string() + "\n"
        })
        .collect();
    let mut stdin = python.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = python.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    let expected: Vec<Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    assert_eq!(expected.len(), cases.len());
    // The limits come after the rules.
    let (name, tag_key, identity, sample_rate_min) = (4_096, 4_096, 65_536, 0.0);
    let limits = Limits { name, tag_key, identity, sample_rate_min, ..Limits::default() };
    let mut differing = 0;
    for ((bytes, form, config), expected) in cases.iter().zip(&expected) {
        let config: Config = serde_json::from_value(configs[*config].clone()).unwrap();
        let mut reader = Reader::new(&config, &limits);
        let found = match *form {
            "stream" => read_stream(&mut reader, bytes),
            "body" => reader.read(bytes, Form::Body),
            _ => reader.read(bytes, Form::Datagram),
        };
        let mut found = serde_json::to_value(&found).unwrap();
        let mut wanted = expected.clone();
        for side in [&mut found, &mut wanted] {
            side["metrics"] = list(&side["metrics"]).iter().map(canonical).collect();
        }
        if is_known_to_differ(bytes, expected) {
            differing += 1;
            continue;
        }
        assert_eq!(found, wanted, "{form} {config:?} {:?}", String::from_utf8_lossy(bytes));
    }
    assert!(differing < cases.len() / 100, "{differing} cases differ on purpose");
}
