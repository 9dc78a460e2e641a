//! Laws before examples: what the parser does to any bytes, and that what workers took in is what the ledger holds,
//! whatever happened on the way. Laws of one type alone stand beside that type in `src/`.

#![allow(clippy::unwrap_used, reason = "a test ends where it finds something wrong")]
#![allow(clippy::panic, reason = "as above")]
#![allow(clippy::expect_used, reason = "as above")]

pub mod laws;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Receiver;
use laws::{Call, Name, Reading, Readings, Record};
use proptest::prelude::*;
use tallyd::aggregate::fold::Writer;
use tallyd::aggregate::ledger::{At, Ledger, Total};
use tallyd::aggregate::meter::Rates;
use tallyd::aggregate::shard::{self, Budget, SeriesId};
use tallyd::aggregate::{Aggregate, Gauge};
use tallyd::config::{Config, Sources};
use tallyd::ingest::{self, Delivery, Listener, Rejects, Returned, Settings, Source, Times, Worker, Workers};
use tallyd::protocol::{self, Event, Parser, Reject, ServiceCheck, Sink, series_key};
use tallyd::sample::{Identity, Kind, Sample, SeriesKey, WireType};
use tallyd::telemetry::{self, Metric};

/// So many cases. An input that fails is printed, and becomes a test of its own.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Lines as clients send them, and nearly so.
fn line() -> impl Strategy<Value = String> {
    let name = "[a-z._/ \\[#;,=é]{0,8}([a-z.]{10,60})?";
    let number = "[+-]?[0-9]{0,20}(\\.[0-9]{0,3})?(e[0-9])?|nan|-0|[a-z]{1,14}";
    let value = format!("({number}|({number}):({number})|[0-9](:[0-9]){{0,5}})");
    let wire = "(c|g|ms|h|d|s|m|kv|C|x|mss|ms |)";
    let field = "(\\|@(0\\.[0-9]{1,3}|1|0|2|1e-7|)|\\|#[a-z:,|]{0,12}|\\|c:[a-z0-9]{0,4}|\\|e:[a-z]|\\|T[0-9]{0,4}|\\|card:low|\\||\\|:|:[0-9]\\|c| )";
    let line = format!("{name}:{value}\\|{wire}({field}){{0,4}}[ \t\r\0]{{0,1}}");
    proptest::string::string_regex(&line).unwrap()
}

fn other_line() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "\\PC{0,20}",
        "_e\\{[0-9],[0-9]\\}:[a-z|]{0,12}",
        "_sc\\|[a-z]{0,2}\\|[0-4]\\|?[#mdh:a-z]{0,4}",
        record(),
        (record(), record()).prop_map(|(one, other)| format!("[{one} , {other}]")),
        "\\[[\\[\\{\\}\\],1a]{0,5}",
    ]
}

/// JSON records, and nearly so.
fn record() -> impl Strategy<Value = String> {
    let number = "(-?[0-9]{1,3}(\\.[0-9])?(e-?[0-9])?|\"[+-]?[0-9]{1,2}\"|null|true)";
    let field = format!(
        "(\"value\":{number}|\"values\":\\[({number},){{0,2}}{number}\\]|\"delta\":{number}|\"rate\":0\\.[0-9]|\"timestamp\":[0-9]{{1,3}}|\
         \"tags\":(\\[\"[a-z:]{{0,4}}\",[0-9]\\]|\\{{\"[a-z:]{{0,3}}\":{number}\\}})|\"level\":\"[a-z]\"|\"x\":(\\[\\]|\\{{\\}}))"
    );
    let record =
        format!("\\{{\"name\":\"[a-z;.\\u{{e9}}]{{0,3}}\",\"type\":\"(g|c|ms|SET|meter|kv|C|x)\"(,{field}){{0,4}}\\}}");
    proptest::string::string_regex(&record).unwrap()
}

fn wire_types() -> Vec<WireType> {
    Kind::ALL.map(WireType::Plain).into_iter().chain([WireType::KeyValue, WireType::AbsoluteCounter]).collect()
}

/// Up to five lines, some of them with a wrong byte.
fn datagram() -> impl Strategy<Value = Vec<u8>> {
    let lines = prop::collection::vec(prop_oneof![4 => line(), 1 => other_line()], 0..6);
    (lines, wrong_byte()).prop_map(|(lines, wrong)| spoilt(lines.join("\n"), wrong))
}

/// A record, an array or lines of records, some with a wrong byte.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let text = prop_oneof![
        record(),
        prop::collection::vec(record(), 0..7).prop_map(|records| format!("[{}]", records.join(",\n"))),
        prop::collection::vec(record(), 0..7).prop_map(|records| records.join("\n")),
        other_line(),
    ];
    (text, wrong_byte()).prop_map(|(text, wrong)| spoilt(text, wrong))
}

fn wrong_byte() -> impl Strategy<Value = Option<(prop::sample::Index, u8)>> {
    proptest::option::weighted(0.3, any::<(prop::sample::Index, u8)>())
}

fn spoilt(text: String, wrong: Option<(prop::sample::Index, u8)>) -> Vec<u8> {
    let mut bytes = text.into_bytes();
    if let Some((at, byte)) = wrong.filter(|_| !bytes.is_empty()) {
        let at = at.index(bytes.len());
        bytes[at] = byte;
    }
    bytes
}

proptest! {
    #![proptest_config(cases(1_000))]

    #[test]
    fn the_fast_path_is_the_plain_grammar(bytes in datagram()) {
        laws::agree(&bytes);
    }

    #[test]
    fn a_datagram_is_accounted_for_and_lines_do_not_meddle(bytes in datagram()) {
        laws::datagram(&bytes);
    }

    #[test]
    fn a_stream_is_the_same_however_it_was_cut(bytes in datagram(), cuts in any::<[u8; 4]>()) {
        laws::stream(&[&bytes[..], &cuts[..]].concat());
    }

    #[test]
    fn each_record_of_a_body_is_accepted_or_rejected(bytes in body()) {
        laws::json(&bytes);
    }

    #[test]
    fn any_bytes_are_accounted_for(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        laws::agree(&bytes);
        laws::datagram(&bytes);
        laws::stream(&bytes);
        laws::json(&bytes);
    }

    #[test]
    fn what_is_printed_of_any_sample_is_read_back(
        name in "[a-zA-Z0-9_.-]{1,30}",
        tags in "([a-z]{1,5}(:[a-z0-9:]{0,5})?(,[a-z]{1,3}){0,3})?",
        wire in prop::sample::select(wire_types()),
        numbers in prop::collection::vec(0.0..1e300_f64, 1..4),
        change in -1e9..1e9_f64,
        member in "[a-z:#@]{1,12}",
        rate in 1e-6..=1.0_f64,
        timestamp in any::<u64>(),
    ) {
        let values = match wire {
            WireType::Plain(Kind::Set) => Readings::Member(member.into_bytes()),
            WireType::Plain(Kind::Gauge) if numbers.len() == 1 => Readings::Changes(vec![change]),
            WireType::Plain(_) | WireType::KeyValue | WireType::AbsoluteCounter => Readings::Numbers(numbers),
        };
        let timestamp = if matches!(wire, WireType::Plain(Kind::Counter | Kind::Gauge)) { timestamp } else { 0 };
        let key = format!("{name};b=1:2;flag");
        for name in [Name::Line(name.into_bytes(), tags.into_bytes()), Name::Key(key)] {
            let sample = Reading { wire, name, values: values.clone(), rate, timestamp, fields: Vec::new() };
            laws::reads_back(&sample, &protocol::Config::default(), &protocol::Limits::default());
        }
    }

    #[test]
    fn a_key_does_not_depend_on_the_order_of_its_tags(
        mut tags in prop::collection::vec("[a-z]{1,3}(:[a-z]{0,3})?", 0..6),
    ) {
        let (config, limits) = (protocol::Config::default(), protocol::Limits::default());
        let key = |tags: &[String]| {
            let tags = tags.join(",");
            series_key(&Identity::Line { name: b"a", tags: tags.as_bytes() }, &config, &limits)
        };
        let before = key(&tags);
        tags.reverse();
        prop_assert_eq!(key(&tags), before);
    }
}

/// A total as it stands in a record: kind, key and times, then its figures and, of a meter, rates.
fn total() -> impl Strategy<Value = Vec<u8>> {
    let values = prop::collection::vec(-1e9..1e9_f64, 0..40);
    (prop::sample::select(Kind::ALL.to_vec()), values, any::<u64>()).prop_map(|(kind, values, at_ms)| {
        let mut aggregate = Aggregate::new(kind);
        for value in &values {
            match &mut aggregate {
                Aggregate::Counter(counter) => _ = counter.increments.add(value.abs()),
                Aggregate::Gauge(gauge) => gauge.set = Some((*value, at_ms)),
                Aggregate::Observed(observed) => _ = observed.observe(*value, 2.0, at_ms),
                Aggregate::Set(members) => _ = members.insert(&value.to_le_bytes()),
                Aggregate::Meter(marks) => _ = marks.count.add(value.abs()),
            }
        }
        let rates = (kind == Kind::Meter).then(|| Rates::new(at_ms));
        let head = (kind, "a.b;tag=value", at_ms, at_ms);
        [postcard::to_stdvec(&head), postcard::to_stdvec(&aggregate), postcard::to_stdvec(&rates)]
            .map(Result::unwrap)
            .concat()
    })
}

proptest! {
    #![proptest_config(cases(2_000))]

    #[test]
    fn a_total_of_a_topic_is_of_its_kind_or_left_out(bytes in total(), wrong in wrong_byte()) {
        prop_assert!(laws::total(&bytes));
        let mut bytes = bytes;
        if let Some((at, byte)) = wrong {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        laws::total(&bytes);
    }
}

#[test]
fn a_gauge_that_is_no_number_is_left_out() {
    // Found by fuzz/total.
    let gauge = Aggregate::Gauge(Gauge { set: Some((f64::NAN, 1)), ..Gauge::default() });
    let head = (Kind::Gauge, "a", 1_u64, 1_u64);
    let bytes = [postcard::to_stdvec(&head), postcard::to_stdvec(&gauge), postcard::to_stdvec(&None::<Rates>)];
    assert!(!laws::total(&bytes.map(Result::unwrap).concat()));
}

#[test]
fn mapping_files_of_the_corpus_obey_the_laws() {
    let corpus = include_str!("corpus/mapping.jsonl");
    let cases = corpus.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    for case in cases {
        let lines = case["lines"].as_array().into_iter().flatten();
        let names = lines.filter_map(|line| line.as_str()?.split(':').next());
        let parts: Vec<_> = [case["mapping"].as_str().unwrap()].into_iter().chain(names).collect();
        laws::mapping(parts.join("\0").as_bytes());
    }
}

#[test]
fn the_cases_of_the_corpus_obey_the_laws() {
    let corpus = include_str!("corpus/lines.jsonl");
    let mut texts = 0;
    for case in corpus.lines() {
        let case: serde_json::Value = serde_json::from_str(case).unwrap();
        let Some(text) = case["input"].as_str() else { continue };
        for law in [laws::agree, laws::datagram, laws::stream, laws::json] {
            law(text.as_bytes());
        }
        texts += 1;
    }
    assert!(texts > 150, "only {texts} cases have a text");
    // Found by fuzz/datagram: what stands between two tag fields spoils one sample of the line, not all.
    laws::datagram(b"a:1|s:2|s|#t|.5|#u");
}

#[test]
fn configurations_are_read_back_from_what_is_printed() {
    laws::config(Config::defaults().as_bytes());
    laws::config(Config::default().to_toml().as_bytes());
    for set in ["store.redis.url=redis://u:p@h", "listen.udp=", "limits.idle=90m", "flush.percentiles=50,99.9", "x=1"] {
        laws::config(format!("\0{set}").as_bytes());
        let (key, value) = set.split_once('=').unwrap();
        let name = key.to_uppercase().replace('.', "__");
        laws::config(format!("[log]\nlevel = 'debug'\0$TALLYD_{name}={value}").as_bytes());
    }
    assert!(Config::load(&Sources::default()).is_ok());
}

/// Takes what a parser finds and does nothing.
struct Nobody;

impl Sink for Nobody {
    fn sample(&mut self, _sample: &Sample<'_>) {}
    fn event(&mut self, _event: &Event<'_>) {}
    fn service_check(&mut self, _check: &ServiceCheck<'_>) {}
    fn reject(&mut self, _reject: &Reject<'_>) {}
    fn bad_tags(&mut self, _count: u32) {}
    fn line_end(&mut self) {}
}

/// Inputs of which a careless parser looks at some bytes again and again.
fn worst_cases(length: usize) -> Vec<(&'static str, Vec<u8>)> {
    let filled = |head: &str, part: &str, tail: &str| {
        let parts = length.saturating_sub(head.len() + tail.len()) / part.len();
        [head, &part.repeat(parts), tail].concat().into_bytes()
    };
    vec![
        ("colons", filled("", ":", "")),
        ("bars", filled("", "|", "")),
        ("packed nothing", filled("a", ":", "1|c")),
        ("packed values", filled("a", ":1", "|c")),
        ("changes of a gauge", filled("a", ":+1", "|g")),
        ("bad values", filled("a", ":x", "|c")),
        ("samples of a line", filled("a", ":1|c", "")),
        ("samples behind bars", filled("a:1|c", "|:1|c", "|#t")),
        ("empty fields", filled("a:1|c", "|", "")),
        ("rates", filled("a:1|c", "|@1", "")),
        ("tag fields", filled("a:1|c", "|#t", "")),
        ("empty tags", filled("a:1|c|#", ",", "")),
        ("tags", filled("a:1|c|#", "t,", "x")),
        ("tags of one key", filled("a", ",t=1", ":1|c:2|c")),
        ("brackets of a name", filled("", "[", "a:1|c:2|c")),
        ("digits", filled("a:", "1", "|c")),
        ("zeros", filled("a:0.", "0", "|c")),
        ("blanks", filled("a:1|c", " ", "x")),
        ("blank lines", filled("", "\n", "")),
        ("lines", filled("", "a:1|c\n", "")),
        ("lines that are not text", filled("\u{ff}", "a:1|c\n", "")),
        ("short lines", filled("", "a\n", "")),
        ("backslashes", filled("_e{1,60000}:a|", "\\", "")),
        ("line ends", filled("_e{1,60000}:a|", "\\n", "")),
        ("message", filled("_sc|a|0|m:", "m\\:", "")),
        ("fields of an event", filled("_e{1,1}:a|b", "|t:x", "")),
        ("arrays in each other", filled("", "[", "")),
        ("objects in each other", filled("", "{\"a\":", "")),
        ("empty arrays", filled("{\"name\":\"a\",\"type\":\"s\",\"value\":[", "[],", "[]]}")),
        ("array lines", filled("", "[\n", "")),
        ("object lines", filled("", "{\n", "}")),
        ("records", filled("[", "{},", "{}]")),
        ("record lines", filled("", "{}\n", "")),
        ("escapes", filled("{\"name\":\"", "\\u0041", "\",\"type\":\"c\",\"value\":1}")),
        ("half escapes", filled("{\"name\":\"", "\\ud800", "\"}")),
        ("members", filled("{", "\"name\":\"a\",", "\"type\":\"c\",\"value\":1}")),
        ("tags of an object", filled("{\"name\":\"a\",\"type\":\"c\",\"tags\":{", "\"t\":1,", "\"t\":2},\"value\":1}")),
        ("number", filled("{\"name\":\"a\",\"type\":\"s\",\"value\":1", "1", "}")),
    ]
}

/// The time this thread has run: what others do beside it does not count.
#[allow(unsafe_code, reason = "the standard library does not tell")]
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec` to the address it is given, which is that of one.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(answer, 0);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// How long some work took at least, of this and earlier runs: a cold cache only adds to it. Below 10 microseconds
/// nothing is measured.
fn least(before: Duration, work: impl FnOnce()) -> Duration {
    let begun = thread_time();
    work();
    (thread_time() - begun).min(before).max(Duration::from_micros(10))
}

/// How long a case that seems to take too long is measured again and again.
const MEASURE: Duration = Duration::from_secs(3);

/// Four times the bytes take about four times the work; work that grows with their square takes 16 times. Only more than
/// 10 times fails, and only if it stays so, however often both are measured again.
#[test]
fn time_is_linear_in_the_bytes() {
    // No limit cuts a case short, and one line holds it all.
    let limits = protocol::Limits {
        line: usize::MAX,
        name: usize::MAX,
        identity: usize::MAX,
        tags: usize::MAX,
        values: usize::MAX,
        samples: usize::MAX,
        ..protocol::Limits::default()
    };
    let limits = [protocol::Limits::default(), limits];
    let reads: [fn(&mut Parser, &[u8]); 3] = [
        |parser, bytes| parser.datagram(bytes, &mut Nobody),
        |parser, bytes| parser.line(bytes, 1, &mut Nobody),
        |parser, bytes| {
            parser.body(bytes, &mut Nobody);
        },
    ];
    for ((name, short), (_, long)) in worst_cases(1 << 14).into_iter().zip(worst_cases(1 << 16)) {
        for (read, limits) in reads.iter().flat_map(|read| limits.iter().map(move |limits| (read, limits))) {
            let mut parser = Parser::new(&protocol::Config::default(), limits);
            let (mut quarter, mut whole) = (Duration::MAX, Duration::MAX);
            let begun = thread_time();
            loop {
                quarter = least(quarter, || read(&mut parser, &short));
                whole = least(whole, || read(&mut parser, &long));
                if whole <= 10 * quarter {
                    break;
                }
                let measured = thread_time() - begun;
                assert!(measured < MEASURE, "{name}: 16 KiB took {quarter:?}, 64 KiB {whole:?}");
            }
        }
    }
}

/// Counts by metric and labels.
#[derive(Default)]
struct Counts(Mutex<HashMap<metrics::Key, Arc<AtomicU64>>>);

impl Counts {
    /// The sum over all labels.
    fn of(&self, metric: &Metric) -> u64 {
        let counts = self.0.lock().unwrap();
        let named = counts.iter().filter(|(key, _)| key.name() == metric.name);
        named.map(|(_, count)| count.load(Ordering::Relaxed)).sum()
    }
}

impl metrics::Recorder for Counts {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(Arc::clone(self.0.lock().unwrap().entry(key.clone()).or_default()))
    }

    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }

    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

const WORKERS: usize = 3;

/// Workers, fold and ledger without threads and sockets; the flushed totals stand for the journal.
struct Agent {
    workers: Arc<Workers>,
    each: Vec<Worker>,
    deliveries: Receiver<Delivery>,
    waiting: [VecDeque<Delivery>; WORKERS],
    writer: Writer,
    flushed: HashMap<SeriesId, Total>,
}

/// What happens to an agent.
#[derive(Debug, Clone)]
enum Step {
    /// A datagram comes to a worker.
    Datagram(usize, Vec<String>),
    /// A worker seals.
    Seal(usize),
    /// The fold takes what a worker has delivered.
    Fold(usize),
    /// What changed is flushed.
    Flush,
    /// Every series that may go is freed from memory.
    Expire,
}

impl Agent {
    fn new() -> Self {
        let budget = Arc::new(Budget::new(&shard::Limits::default()));
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
        // Nothing is due for an hour; a seal that is due all the same changes no total.
        let times = Times { interval_ms: 3_600_000, window_ms: 10_000 };
        let (workers, deliveries) = Workers::new(settings, Arc::clone(&budget), rejects, times);
        let each = (0..WORKERS).map(|_| workers.register(|| {})).collect();
        let writer = Writer::new(Arc::new(Ledger::new(10_000)), budget, false, 1);
        Self { workers, each, deliveries, waiting: Default::default(), writer, flushed: HashMap::new() }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Datagram(worker, lines) => {
                let source = Source { listener: Listener::Udp, address: None };
                self.each[*worker].datagram(lines.join("\n").as_bytes(), source);
            }
            Step::Seal(worker) => {
                self.workers.ask();
                let question = self.each[*worker].question();
                self.each[*worker].turn(question);
            }
            Step::Fold(worker) => self.fold(*worker),
            Step::Flush => self.flush(),
            Step::Expire => {
                for (worker, numbers) in self.writer.expire(|_| u64::MAX).into_iter().enumerate() {
                    self.workers.give_back(worker, Returned::Retire(numbers));
                }
            }
        }
    }

    fn fold(&mut self, worker: usize) {
        for delivery in self.deliveries.try_iter() {
            self.waiting[delivery.worker].push_back(delivery);
        }
        while let Some(mut delivery) = self.waiting[worker].pop_front() {
            let recall = |id: &SeriesId| self.flushed.get(id).cloned();
            let at = At { wall_ms: delivery.at_ms, steady_ms: delivery.at_ms };
            self.writer.fold(worker, &mut delivery.sealed, at, recall);
            self.workers.give_back(worker, Returned::Cells(delivery.sealed.cells));
        }
    }

    fn flush(&mut self) {
        for changed in self.writer.take_changed() {
            self.flushed.insert(changed.series.id().clone(), Total::clone(&changed.series.total()));
        }
    }

    /// The totals after the last of all has been folded and flushed.
    fn stop(mut self) -> HashMap<SeriesId, Total> {
        std::mem::take(&mut self.each).into_iter().for_each(Worker::close);
        (0..WORKERS).for_each(|worker| self.fold(worker));
        self.flush();
        self.flushed
    }
}

/// What a series must come to, from its samples in their order.
#[derive(Debug, Default)]
struct Expected {
    /// Values with the number of readings each stands for.
    values: Vec<(f64, f64)>,
    members: BTreeSet<Vec<u8>>,
    gauge: f64,
}

impl Expected {
    fn add(&mut self, sample: Reading) {
        match sample.values {
            Readings::Numbers(numbers) => {
                self.gauge = numbers[numbers.len() - 1];
                self.values.extend(numbers.into_iter().map(|number| (number, 1.0 / sample.rate)));
            }
            Readings::Changes(changes) => {
                self.gauge += changes.iter().sum::<f64>();
                self.values.extend(changes.into_iter().map(|change| (change, 1.0 / sample.rate)));
            }
            Readings::Member(member) => {
                self.members.insert(member);
            }
        }
    }

    fn weighted(&self, keep: impl Fn(f64) -> bool) -> f64 {
        self.values.iter().filter(|(value, _)| keep(*value)).map(|(value, weight)| value * weight).sum()
    }

    /// The smallest value such that it and those below carry this share of the weight.
    fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        // A rank that is missed by rounding is reached.
        let rank = q * sorted.iter().map(|(_, weight)| weight).sum::<f64>() * (1.0 - 1e-12);
        let mut below = 0.0;
        let reaches = |(_, weight): &&(f64, f64)| {
            below += weight;
            below >= rank
        };
        sorted.iter().find(reaches).map_or(f64::NAN, |(value, _)| *value)
    }

    fn check(&self, total: &Aggregate) {
        match total {
            Aggregate::Counter(counter) => {
                assert_eq!(counter.samples as usize, self.values.len());
                assert_eq!(counter.increments.value(), self.weighted(|value| value > 0.0));
                assert_eq!(counter.decrements.value(), -self.weighted(|value| value < 0.0));
            }
            Aggregate::Gauge(gauge) => {
                assert_eq!(gauge.samples as usize, self.values.len());
                assert_eq!(Gauge::value(gauge), self.gauge);
            }
            Aggregate::Observed(observed) => {
                assert_eq!(observed.n as usize, self.values.len());
                assert_eq!(observed.count.value(), self.values.iter().map(|(_, weight)| weight).sum::<f64>());
                assert_eq!(observed.weighted_sum.value(), self.weighted(|_| true));
                assert_eq!((observed.min, observed.max), (self.quantile(0.0), self.quantile(1.0)));
                for q in [0.25, 0.5, 0.75, 0.95] {
                    let (answer, exact) = (observed.quantile(q).unwrap(), self.quantile(q));
                    let error = observed.histogram.error() * (1.0 + 1e-9);
                    assert!((answer - exact).abs() <= exact.abs() * error, "{q}: {answer} is not near {exact}");
                }
            }
            Aggregate::Set(members) => assert_eq!(members.cardinality() as usize, self.members.len()),
            Aggregate::Meter(marks) => {
                assert_eq!(marks.samples as usize, self.values.len());
                assert_eq!(marks.count.value(), self.weighted(|_| true));
            }
        }
    }
}

/// The series of an agent by what the parser finds in its datagrams, how many lines there were, and how many values of
/// samples.
fn expected(steps: &[Step]) -> (BTreeMap<SeriesId, Expected>, u64, u64) {
    let (config, limits) = (protocol::Config::default(), protocol::Limits::default());
    let mut record = Record::default();
    for step in steps {
        match step {
            Step::Datagram(_, lines) => {
                Parser::new(&config, &limits).datagram(lines.join("\n").as_bytes(), &mut record);
            }
            Step::Seal(_) | Step::Fold(_) | Step::Flush | Step::Expire => {}
        }
    }
    let mut series: BTreeMap<SeriesId, Expected> = BTreeMap::new();
    let (mut lines, mut values) = (0, 0);
    for call in record.calls {
        match call {
            Call::Sample(sample) => {
                let Ok((key, _)) = series_key(&sample.name.identity(), &config, &limits) else { continue };
                values += match &sample.values {
                    Readings::Numbers(numbers) | Readings::Changes(numbers) => numbers.len() as u64,
                    Readings::Member(_) => 1,
                };
                series.entry(SeriesId { kind: sample.wire.kind(), key }).or_default().add(sample);
            }
            Call::LineEnd => lines += 1,
            Call::Event(_) | Call::ServiceCheck(_) | Call::Reject { .. } | Call::BadTags(_) => {}
        }
    }
    (series, lines, values)
}

/// Lines with numbers and rates whose sums are exact, of few series, in several spellings; some are bad, some in part.
fn counted_line(worker: usize) -> impl Strategy<Value = String> {
    let number = || (-400..4_000_i32).prop_map(|number| (f64::from(number) / 4.0).to_string());
    let rate = || prop::sample::select(vec!["", "|@0.5", "|@0.25", "|@1"]);
    let tags = || prop::sample::select(vec!["", "|#a:1,b", "|#b,a:1", "|#b,,a:1|c:x", "|#c:2"]);
    prop_oneof![
        6 => (0..3_u8, prop::collection::vec(number(), 1..3), prop::sample::select(vec!["c", "ms", "h", "d", "m"]), rate(), tags())
            .prop_map(|(name, numbers, wire, rate, tags)| format!("n.{name}:{}|{wire}{rate}{tags}", numbers.join(":"))),
        2 => (0..9_u8, tags()).prop_map(|(member, tags)| format!("users:m{member}|s{tags}")),
        // Time decides between the gauges of workers, so here each has its own.
        2 => (number(), prop::sample::select(vec!["", "+"]), prop::sample::select(vec!["g", "kv"]))
            .prop_map(move |(number, sign, wire)| format!("gauge.{wire}.{worker}:{}{number}|{wire}", if number.starts_with('-') { "" } else { sign })),
        1 => prop::sample::select(vec!["", "\0", "a:1|x", "$:1|c", "n.0:1|c:x|c:2|c", "n.1:1|c:2|ms", "_e{1,1}:a|b", "_sc|a|0",
            "{\"name\":\"n.0\",\"type\":\"c\",\"value\":3}", "[{\"name\":\"n.1\",\"type\":\"ms\",\"values\":[1,2]},{}]", "é\u{ff}:1|c"]).prop_map(str::to_owned),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let datagram = |worker| {
        prop::collection::vec(counted_line(worker), 1..12).prop_map(move |lines| Step::Datagram(worker, lines))
    };
    let step = prop_oneof![
        8 => (0..WORKERS).prop_flat_map(datagram),
        3 => (0..WORKERS).prop_map(Step::Seal),
        3 => (0..WORKERS).prop_map(Step::Fold),
        1 => Just(Step::Flush),
        1 => Just(Step::Expire),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn what_came_in_is_held_whatever_happened_between(steps in steps()) {
        is_held(&steps);
    }
}

/// An agent to which this happens holds what came in, and counts it.
fn is_held(steps: &[Step]) {
    let counts = Counts::default();
    let totals = metrics::with_local_recorder(&counts, || {
        let mut agent = Agent::new();
        steps.iter().for_each(|step| agent.step(step));
        agent.stop()
    });
    let (series, lines, values) = expected(steps);
    assert_eq!(totals.keys().collect::<BTreeSet<_>>(), series.keys().collect::<BTreeSet<_>>());
    for (id, expected) in &series {
        expected.check(&totals[id].aggregate);
    }
    assert_eq!(counts.of(&telemetry::LINES), lines);
    assert_eq!(counts.of(&telemetry::LINES_ACCEPTED) + counts.of(&telemetry::LINES_REJECTED), lines);
    assert_eq!(counts.of(&telemetry::SAMPLES), values);
}

fn lines(worker: usize, lines: &[&str]) -> Step {
    Step::Datagram(worker, lines.iter().map(|&line| line.to_owned()).collect())
}

#[test]
fn samples_on_their_way_outlast_the_expiry_of_their_series() {
    let first = [lines(0, &["a:1|c"]), Step::Seal(0)];
    let second = [lines(0, &["a:1|c"]), Step::Fold(0), Step::Flush, Step::Seal(0), Step::Expire];
    is_held(&[&first[..], &second[..]].concat());
}

#[test]
fn a_series_that_expires_twice_leaves_one_number() {
    let idle = [lines(0, &["a:1|c"]), Step::Seal(0), Step::Fold(0), Step::Flush, Step::Expire, Step::Expire];
    let next = [Step::Seal(0), lines(0, &["a:1|c", "b:1|c"])];
    is_held(&[&idle[..], &next[..]].concat());
}

#[test]
fn a_large_set_is_counted_closely_whoever_saw_its_members() {
    let mut agent = Agent::new();
    for member in 0..9_000 {
        // Two workers see each member, and seals come between.
        let line = vec![format!("users:member-{member}|s")];
        agent.step(&Step::Datagram(member % WORKERS, line.clone()));
        agent.step(&Step::Datagram(member / 7 % WORKERS, line));
        if member % 400 == 0 {
            agent.step(&Step::Seal(member / 400 % WORKERS));
            agent.step(&Step::Fold(member / 800 % WORKERS));
        }
    }
    let totals = agent.stop();
    let id = SeriesId { kind: Kind::Set, key: SeriesKey::parse("users") };
    let Aggregate::Set(members) = &totals[&id].aggregate else { panic!("{totals:?}") };
    let error = members.cardinality() as f64 / 9_000.0 - 1.0;
    assert!(error.abs() < 0.02, "{error}");
}
