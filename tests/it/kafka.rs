//! Kafka as the store, as an input and as a place to forward to: agents against librdkafka's mock cluster on the loopback
//! address, or against the broker that `TALLYD_TEST_KAFKA` names (`tests/kafka.sh` starts one).

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::types::RDKafkaApiKey;
use rdkafka::types::RDKafkaRespErr::{self, RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::agent::{Agent, collect, same, tallyd, until};
use crate::http;

/// Brokers of a test, with topics of its own.
pub struct Kafka {
    mock: Option<Mock>,
    brokers: String,
    suffix: String,
}

impl Kafka {
    /// Brokers with the topics that agents use.
    pub fn start() -> Self {
        let suffix = format!("{}-{}", std::process::id(), unique());
        let kafka = match std::env::var("TALLYD_TEST_KAFKA") {
            Ok(brokers) => Self { mock: None, brokers, suffix },
            Err(_) => {
                // A real broker gets the topic of totals from the first agent.
                let topics = ["state", "records"].map(|name| format!("{name}-{suffix}"));
                let (mock, brokers) = Mock::start(&topics);
                Self { mock: Some(mock), brokers, suffix }
            }
        };
        if kafka.mock.is_none() {
            kafka.make(&kafka.topic("records"));
        }
        kafka
    }

    fn make(&self, topic: &str) {
        let admin: AdminClient<DefaultClientContext> = self.config().create().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let topic = NewTopic::new(topic, 3, TopicReplication::Fixed(1));
        let made = runtime.block_on(admin.create_topics([&topic], &AdminOptions::new())).unwrap();
        assert!(made.iter().all(Result::is_ok), "{made:?}");
    }

    fn topic(&self, name: &str) -> String {
        format!("{name}-{}", self.suffix)
    }

    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    /// An agent with Kafka as its store and these settings besides.
    fn agent(&self, settings: &[&str]) -> Agent {
        let all = self.settings(settings);
        Agent::start(&all.iter().map(String::as_str).chain(["store.kind=kafka"]).collect::<Vec<_>>())
    }

    fn settings(&self, settings: &[&str]) -> Vec<String> {
        let mut all = vec![
            format!("kafka.brokers={}", self.brokers),
            format!("kafka.topic={}", self.topic("records")),
            format!("kafka.group={}", self.topic("group")),
            format!("store.kafka.topic={}", self.topic("state")),
            "store.kafka.partitions=3".to_owned(),
            "flush.interval=100ms".to_owned(),
            "flush.window=1s".to_owned(),
        ];
        if self.mock.is_some() {
            // It has no static members, so one that was killed is waited for.
            all.push("kafka.options={ 'session.timeout.ms' = '4500', 'heartbeat.interval.ms' = '300' }".to_owned());
        }
        all.extend(settings.iter().map(|setting| (*setting).to_owned()));
        all
    }

    /// Takes the brokers away.
    fn away(&self) {
        match &self.mock {
            Some(mock) => mock.tell("down"),
            None => signal("STOP"),
        }
    }

    /// Brings them back.
    fn back(&self) {
        match &self.mock {
            Some(mock) => mock.tell("up"),
            None => signal("CONT"),
        }
    }

    /// The last value of each key of a topic; none where it has no value any more.
    fn table(&self, topic: &str) -> std::collections::BTreeMap<String, Option<Vec<u8>>> {
        let mut config = self.config();
        config.set("group.id", "test").set("enable.partition.eof", "true").set("enable.auto.commit", "false");
        let consumer: BaseConsumer = config.create().unwrap();
        let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(5)).unwrap();
        let count = metadata.topics()[0].partitions().len();
        let mut all = TopicPartitionList::new();
        for partition in 0..count {
            all.add_partition_offset(topic, partition as i32, Offset::Beginning).unwrap();
        }
        consumer.assign(&all).unwrap();
        let (mut table, mut ended) = (std::collections::BTreeMap::new(), std::collections::BTreeSet::new());
        until("the topic to be read", || {
            match consumer.poll(Duration::from_millis(200))? {
                Ok(message) => {
                    let key = String::from_utf8(message.key().unwrap_or_default().to_vec()).unwrap();
                    table.insert(key, message.payload().map(<[u8]>::to_vec));
                }
                Err(KafkaError::PartitionEOF(partition)) => drop(ended.insert(partition)),
                Err(error) => panic!("{error}"),
            }
            (ended.len() == count).then_some(())
        });
        table
    }

    /// The keys of the topic of totals that have a value, without the agents' names.
    fn stored(&self) -> Vec<String> {
        let table = self.table(&self.topic("state"));
        let mut keys: Vec<_> = table.into_iter().filter(|(_, value)| value.is_some()).map(|(key, _)| key).collect();
        for key in &mut keys {
            if let Some((agent, series)) = key.split_once(':')
                && agent.len() == 32
            {
                *key = series.to_owned();
            }
        }
        keys.sort();
        keys
    }
}

/// The mock cluster, in a process of its own: it ends the process if it can't have its port back, and a process that is
/// being started here may still hold that.
struct Mock {
    child: Child,
    orders: RefCell<ChildStdin>,
    answers: RefCell<BufReader<ChildStdout>>,
}

/// How its answers begin.
const ANSWER: &str = "mock: ";

impl Mock {
    fn start(topics: &[String]) -> (Self, String) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kafka::mock_brokers", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mock = Self { child, orders: orders.into(), answers: answers.into() };
        let brokers = mock.answer();
        topics.iter().for_each(|topic| mock.tell(topic));
        (mock, brokers)
    }

    fn answer(&self) -> String {
        let mut answers = self.answers.borrow_mut();
        let mut lines = std::iter::from_fn(|| {
            let mut line = String::new();
            (answers.read_line(&mut line).unwrap() > 0).then_some(line)
        });
        let answer = lines.find_map(|line| line.strip_prefix(ANSWER).map(|answer| answer.trim().to_owned()));
        answer.expect("the mock cluster ended")
    }

    /// Takes the broker away (`down`), brings it back (`up`), lets it refuse what is produced (`deny`), or fail some of it in
    /// ways that pass (`stumble`), or not any more (`allow`), or makes a topic; returns when that is done.
    fn tell(&self, order: &str) {
        writeln!(self.orders.borrow_mut(), "{order}").unwrap();
        assert_eq!(self.answer(), order);
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What brokers say in passing: of some of it the record was written all the same.
const STUMBLES: [RDKafkaRespErr; 6] = [
    RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
    RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
    RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
    RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
];

#[test]
#[ignore = "these are the brokers of the other tests"]
#[allow(clippy::print_stdout, reason = "they are told so what was done")]
fn mock_brokers() {
    let mock = MockCluster::new(1).unwrap();
    println!("\n{ANSWER}{}", mock.bootstrap_servers());
    for order in std::io::stdin().lines().map_while(Result::ok) {
        match order.as_str() {
            "down" => mock.broker_down(1).unwrap(),
            "up" => mock.broker_up(1).unwrap(),
            "deny" => {
                mock.request_errors(RDKafkaApiKey::Produce, &[RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED; 1_000])
            }
            "stumble" => mock.request_errors(RDKafkaApiKey::Produce, &STUMBLES),
            "allow" => mock.clear_request_errors(RDKafkaApiKey::Produce),
            topic => mock.create_topic(topic, 3, 1).unwrap(),
        }
        println!("{ANSWER}{order}");
    }
}

fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    now * 100 + NEXT.fetch_add(1, Ordering::Relaxed)
}

fn signal(name: &str) {
    let process = std::env::var("TALLYD_TEST_KAFKA_PID").unwrap();
    let status = Command::new("kill").args([format!("-{name}"), process]).status().unwrap();
    assert!(status.success());
}

/// Waits until an agent says that its store has been read.
#[track_caller]
fn ready(agent: &Agent) {
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
}

/// What an agent alone has of a metric's field.
fn local(agent: &Agent, key: &str, field: &str) -> Value {
    agent.get(&format!("/data/metrics/{key}?scope=local")).json()[field].clone()
}

/// A JSON record that counts one up.
fn one(name: &str) -> String {
    format!(r#"{{"name":"{name}","type":"COUNTER","value":1}}"#)
}

#[test]
fn two_agents_share_one_total_of_every_kind_and_a_third_reads_it() {
    let kafka = Kafka::start();
    let (a, b) = (kafka.agent(&[]), kafka.agent(&[]));
    let reader = kafka.agent(&["listen.udp=[]", "listen.tcp=[]", "http.ingest=[]"]);
    a.datagram("app.shared:5|c\nt:1:2|ms\nh:4|h\nd:4|d\nu:x|s\ng:1|g\nm:3|m");
    b.datagram("app.shared:7|c\nt:3|ms\nh:6|h\nd:8|d\nu:x|s\nu:y|s\nm:4|m");
    b.wait_for("app.shared", "count", 2);
    a.wait_for("g", "value", 1);
    b.datagram("g:9|g");
    for agent in [&a, &b, &reader] {
        ready(agent);
        agent.wait_for("app.shared", "value", 12);
        agent.wait_for("t", "sum", 6);
        agent.wait_for("t", "max", 3);
        agent.wait_for("h", "sum", 10);
        agent.wait_for("d", "count", 2);
        agent.wait_for("u", "value", 2);
        agent.wait_for("g", "value", 9);
        agent.wait_for("m", "count", 7);
        assert_eq!(agent.metric("app.shared").unwrap()["scope"], Value::Null);
    }
    assert!(same(&local(&a, "app.shared", "value"), &json!(5)));
    assert_eq!(reader.get("/data/metrics/app.shared?scope=local").status, 404);
    let listed = reader.get("/data/metrics").json();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|metric| metric["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["shared", "d", "g", "h", "m", "t", "u"]);
    let page = reader.get("/data/metrics?limit=2&match=?");
    assert_eq!(page.json().as_array().unwrap().len(), 2);
    assert_eq!(kafka.stored().iter().filter(|key| *key == "c:app.shared").count(), 2);
}

#[test]
fn a_sample_is_in_the_next_read_and_a_start_reads_all_again() {
    let kafka = Kafka::start();
    let (a, b) = (kafka.agent(&[]), kafka.agent(&[]));
    ready(&a);
    for i in 1..=50 {
        a.ingest(one("seen"));
        assert!(same(&a.metric("seen").unwrap()["value"], &json!(i)), "after {i}");
    }
    b.ingest(one("seen"));
    a.wait_for("seen", "value", 51);
    b.wait_for("seen", "value", 51);
    let a = a.restart_after("TERM");
    ready(&a);
    a.wait_for("seen", "value", 51);
    let b = b.restart_after("KILL");
    ready(&b);
    b.wait_for("seen", "value", 51);
}

/// Counts `key` up by one request after the other while `fault` happens; answers how many were acknowledged.
fn under_load(agent: &Agent, key: &str, fault: impl FnOnce()) -> u64 {
    let (done, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                assert_eq!(agent.ingest(one(key)).status, 200);
                sent.fetch_add(1, Ordering::AcqRel);
            }
        });
        let begun = || sent.load(Ordering::Acquire);
        until("load", || (begun() > 20).then_some(()));
        fault();
        let before = begun();
        until("load after the fault", || (begun() > before + 20).then_some(()));
        done.store(true, Ordering::Release);
    });
    sent.load(Ordering::Acquire)
}

#[test]
fn brokers_that_are_away_delay_nothing_and_lose_nothing() {
    let kafka = Kafka::start();
    let (agent, other) = (kafka.agent(&[]), kafka.agent(&[]));
    ready(&agent);
    ready(&other);
    let mut sum = 0;
    for _ in 0..2 {
        sum += under_load(&agent, "load", || {
            kafka.away();
            let connected = || agent.own("tallyd_store_connected", "kafka");
            until("the agent to find out", || (connected() == 0.0).then_some(()));
            let read = agent.metric("load").unwrap();
            assert_eq!(read["scope"], "local", "{read}");
            assert_eq!(agent.get("/-/ready").status, 503);
            assert_eq!(agent.delete("/data/metrics/load").status, 503);
            kafka.back();
        });
        agent.wait_for("load", "value", sum);
        other.wait_for("load", "value", sum);
        ready(&agent);
    }
    assert_eq!(agent.own("tallyd_lost_total", ""), 0.0);
}

#[test]
fn errors_in_passing_lose_nothing_and_a_refusal_is_named() {
    let kafka = Kafka::start();
    let Some(mock) = &kafka.mock else { return }; // a real broker fails for nobody's sake
    let (agent, other) = (kafka.agent(&[]), kafka.agent(&[]));
    ready(&agent);
    ready(&other);
    let sum = under_load(&agent, "load", || mock.tell("stumble"));
    other.wait_for("load", "value", sum);
    mock.tell("deny");
    agent.datagram("load:1|c");
    until("the refusal", || agent.get("/-/ready").text().contains("are not taken").then_some(()));
    mock.tell("allow");
    other.wait_for("load", "value", sum + 1);
    ready(&agent);
}

#[test]
fn an_agent_killed_at_any_moment_is_followed_exactly() {
    let kafka = Kafka::start();
    let (mut agent, other) = (kafka.agent(&[]), kafka.agent(&[]));
    ready(&other);
    let mut sent = 0;
    for round in 0..5 {
        for _ in 0..10 {
            agent.ingest(one("killed"));
            sent += 1;
        }
        let flushes = agent.own("tallyd_flushes_total", "");
        until("a flush", || (agent.own("tallyd_flushes_total", "") >= flushes + 1.0 || round == 0).then_some(()));
        agent = agent.restart_after(if round % 2 == 0 { "TERM" } else { "KILL" });
        let kept = local(&agent, "killed", "value").as_u64().unwrap();
        assert!(kept <= sent && sent - kept <= 10, "{kept} of {sent}");
        sent = kept;
        // What was killed may have told more than it kept, never less in the end.
        other.wait_for("killed", "value", sent);
    }
    agent.wait_for("killed", "value", sent);
}

#[test]
fn a_delete_resets_every_agent_and_those_that_were_away() {
    let kafka = Kafka::start();
    let (a, b, mut c) = (kafka.agent(&[]), kafka.agent(&[]), kafka.agent(&[]));
    for (agent, line) in [(&a, "both:5|c"), (&b, "both:7|c"), (&c, "both:1|c")] {
        ready(agent);
        agent.datagram(line);
    }
    for agent in [&a, &b, &c] {
        agent.wait_for("both", "value", 13);
    }
    // This one is down while the series is deleted, and gets a sample before it hears of that again.
    c = c.restart_with("TERM", |_| {
        assert_eq!(a.delete("/data/metrics/both").status, 200);
        assert_eq!(a.metric("both"), None);
        until("the other agent to reset", || b.get("/data/metrics/both?scope=local").status.eq(&404).then_some(()));
        assert_eq!(b.metric("both"), None);
    });
    ready(&c);
    until("the one that was away to reset", || c.get("/data/metrics/both?scope=local").status.eq(&404).then_some(()));
    b.datagram("both:2|c");
    for agent in [&a, &b, &c] {
        agent.wait_for("both", "value", 2);
    }
    // The delete was heeded once: another start does not reset what came since.
    let b = b.restart_after("KILL");
    ready(&b);
    b.wait_for("both", "value", 2);
    a.wait_for("both", "value", 2);
    until("the topic to say so", || (kafka.stored() == ["c:both", "delete:c:both"]).then_some(()));
}

/// Whoever may write the topic may write anything into it.
#[test]
fn a_record_that_is_no_total_of_its_series_is_counted_and_left_out() {
    let kafka = Kafka::start();
    let agent = kafka.agent(&[]);
    ready(&agent);
    agent.datagram("u:x|s\nu:1|c");
    until("the set to be stored", || kafka.stored().contains(&"s:u".to_owned()).then_some(()));
    let table = kafka.table(&kafka.topic("state"));
    let set = table.iter().find(|(key, _)| key.ends_with(":s:u")).and_then(|(_, value)| value.clone()).unwrap();
    let producer: BaseProducer = kafka.config().create().unwrap();
    let other = "0".repeat(32);
    let spoilt = [&set[..set.len() - 1], &[set[set.len() - 1] ^ 1]].concat();
    let foreign = [("c:u", &set), ("s:v", &set), ("s:u", &spoilt), ("nothing", &set)];
    for (series, value) in foreign {
        let key = format!("{other}:{series}");
        producer
            .send(BaseRecord::to(&kafka.topic("state")).key(&key).payload(value))
            .map_err(|(error, _)| error)
            .unwrap();
    }
    producer.flush(Duration::from_secs(20)).unwrap();
    until("all to be counted", || (agent.own("tallyd_store_errors_total", "foreign") == 4.0).then_some(()));
    let counter = agent.get("/data/metrics/u?type=counter").json();
    assert!(same(&counter["value"], &json!(1)) && counter.get("scope").is_none(), "{counter}");
    assert_eq!(agent.get("/data/metrics/v").status, 404);
}

/// A topic that is gone is made again and filled from the journals.
#[test]
fn a_topic_that_was_taken_away_is_filled_again() {
    let kafka = Kafka::start();
    if kafka.mock.is_some() {
        eprintln!("skipped: the mock can't take a topic away; tests/kafka.sh has a broker that can");
        return;
    }
    let (a, b) = (kafka.agent(&[]), kafka.agent(&[]));
    ready(&a);
    a.datagram("kept:5|c");
    b.datagram("kept:7|c");
    a.wait_for("kept", "value", 12);
    let admin: AdminClient<DefaultClientContext> = kafka.config().create().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let topic = kafka.topic("state");
    let gone = runtime.block_on(admin.delete_topics(&[&topic], &AdminOptions::new())).unwrap();
    assert!(gone.iter().all(Result::is_ok), "{gone:?}");
    until("the agents to find out", || (a.own("tallyd_store_errors_total", "rewound") >= 1.0).then_some(()));
    let c = kafka.agent(&[]);
    for agent in [&a, &b, &c] {
        ready(agent);
        agent.wait_for("kept", "value", 12);
    }
    b.datagram("kept:1|c");
    c.wait_for("kept", "value", 13);
}

#[test]
fn what_expired_is_taken_out_of_the_topic() {
    let kafka = Kafka::start();
    let agent = kafka.agent(&["limits.store_expire=2s", "limits.idle=1s"]);
    ready(&agent);
    agent.datagram("gone:1|c");
    until("the first to be stored", || kafka.stored().contains(&"c:gone".to_owned()).then_some(()));
    until("it to go", || {
        // Totals are looked at when something is written.
        agent.datagram("stays:1|c");
        (kafka.stored() == ["c:stays"]).then_some(())
    });
    assert!(agent.own("tallyd_journal_expired_total", "") >= 1.0);
}

#[test]
fn totals_of_others_beyond_the_limit_leave_this_agents_figures() {
    let kafka = Kafka::start();
    let (a, b) = (kafka.agent(&[]), kafka.agent(&["limits.kafka_table=1KiB"]));
    ready(&a);
    let lines: Vec<_> = (0..20).map(|number| format!("many{number}:1|c")).collect();
    a.datagram(lines.join("\n"));
    b.datagram("many1:1|c");
    until("the limit", || (b.own("tallyd_kafka_table_refused_total", "") > 0.0).then_some(()));
    let read = b.metric("many1").unwrap();
    assert!(read["scope"] == "local" && same(&read["value"], &json!(1)), "{read}");
    let ready = b.get("/-/ready");
    assert!(ready.status == 503 && ready.text().contains("limits.kafka_table"), "{}", ready.text());
}

/// Writes records to the topic that agents read, each to the partition of its place.
fn produce(kafka: &Kafka, records: &[String]) {
    let producer: BaseProducer = kafka.config().create().unwrap();
    let topic = kafka.topic("records");
    for (place, record) in records.iter().enumerate() {
        let key = format!("level.name{place}");
        let record = BaseRecord::to(&topic).key(&key).payload(record).partition(place as i32 % 3);
        producer.send(record).map_err(|(error, _)| error).unwrap();
        producer.poll(Duration::ZERO);
    }
    producer.flush(Duration::from_secs(20)).unwrap();
}

/// What the group was told of the topic that agents read, all partitions added up.
fn committed(kafka: &Kafka) -> i64 {
    let mut config = kafka.config();
    config.set("group.id", kafka.topic("group"));
    let consumer: BaseConsumer = config.create().unwrap();
    let mut all = TopicPartitionList::new();
    all.add_partition_range(&kafka.topic("records"), 0, 2);
    let committed = consumer.committed_offsets(all, Duration::from_secs(5)).unwrap();
    committed
        .elements()
        .iter()
        .map(|element| if let Offset::Offset(offset) = element.offset() { offset } else { 0 })
        .sum()
}

fn input(kafka: &Kafka, settings: &[&str]) -> Agent {
    let all = kafka.settings(settings);
    Agent::start(&all.iter().map(String::as_str).chain(["listen.kafka=true"]).collect::<Vec<_>>())
}

#[test]
fn records_of_a_topic_count_and_bad_ones_are_rejected_and_passed_over() {
    let kafka = Kafka::start();
    let agent = input(&kafka, &[]);
    let records = [
        r#"{"level":"app","name":"orders","type":"COUNTER","value":2}"#,
        r#"[{"name":"t","type":"TIMER","value":1},{"name":"t","type":"TIMER","value":3}]"#,
        r#"{"name":"broken","type":"COUNTER","value":"#,
        r#"{"name":"unknown","type":"NONE","value":1}"#,
        "",
        r#"[{"level":"app","name":"orders","type":"COUNTER","value":3},{"name":"","type":"COUNTER","value":1}]"#,
        r#"{"name":"u","type":"SET","value":"x","tags":{"a":"b"}}"#,
    ];
    produce(&kafka, &records.map(str::to_owned));
    agent.wait_for("app.orders", "value", 5);
    agent.wait_for("t", "count", 2);
    agent.wait_for("u;a=b", "value", 1);
    until("the bad ones", || (agent.own("tallyd_lines_rejected_total", "kafka") == 4.0).then_some(()));
    assert_eq!(agent.own("tallyd_lines_accepted_total", "kafka"), 5.0);
    let rejects = agent.get("/data/rejects").json();
    let broken = rejects.as_array().unwrap().iter().find(|reject| reject["reason"] == "unknown_type").unwrap();
    assert_eq!((&broken["listener"], &broken["source"]), (&json!("kafka"), &json!("partition 0, offset 1")));
    let sources = agent.get("/data/sources").text();
    assert!(sources.contains("partition 2"), "{sources}");
    until("the group to be told", || (committed(&kafka) == records.len() as i64).then_some(()));
}

#[test]
fn a_reader_of_a_topic_killed_at_any_moment_counts_each_record_once() {
    let kafka = Kafka::start();
    let mut agent = input(&kafka, &[]);
    let mut sent = 0;
    let mut more = |count: u64| {
        sent += count;
        produce(&kafka, &(0..count).map(|_| one("once")).collect::<Vec<_>>());
        sent
    };
    agent.wait_for("once", "value", more(30));
    for round in 0..5 {
        let value = || agent.metric("once").map_or(0, |metric| metric["value"].as_u64().unwrap());
        let had = value();
        more(3_000);
        if round > 0 {
            // Some of it is in memory alone, some in the journal, some with the group.
            until("some more", || (value() > had).then_some(()));
        }
        agent = agent.restart_after(if round == 2 { "TERM" } else { "KILL" });
    }
    let all = more(30);
    agent.wait_for("once", "value", all);
    until("the group to be told", || (committed(&kafka) == all as i64).then_some(()));
    agent = agent.restart_after("TERM");
    agent.wait_for("once", "value", all);
    let after = more(1);
    agent.wait_for("once", "value", after);
}

/// What was read of a topic that was taken away and made again says nothing about the records it has now.
#[test]
fn a_topic_that_ends_before_what_was_read_of_it_is_read_from_its_beginning() {
    let kafka = Kafka::start();
    let mut config = kafka.config();
    config.set("group.id", kafka.topic("group"));
    let consumer: BaseConsumer = config.create().unwrap();
    let mut read = TopicPartitionList::new();
    (0..3)
        .for_each(|number| read.add_partition_offset(&kafka.topic("records"), number, Offset::Offset(1_000)).unwrap());
    consumer.commit(&read, CommitMode::Sync).unwrap();
    drop(consumer);
    produce(&kafka, &(0..30).map(|_| one("anew")).collect::<Vec<_>>());
    let agent = input(&kafka, &[]);
    agent.wait_for("anew", "value", 30);
    until("the group to be told", || (committed(&kafka) == 30).then_some(()));
    let agent = agent.restart_after("KILL");
    produce(&kafka, &[one("anew")]);
    agent.wait_for("anew", "value", 31);
}

#[test]
fn two_readers_of_a_group_share_the_partitions_and_one_that_stops_hands_over() {
    let kafka = Kafka::start();
    let (a, b) = (kafka.agent(&["listen.kafka=true"]), kafka.agent(&["listen.kafka=true"]));
    let partitions = |agent: &Agent| agent.own("tallyd_kafka_partitions", "");
    until("both to have some", || {
        (partitions(&a) > 0.0 && partitions(&a) + partitions(&b) == 3.0 && partitions(&b) > 0.0).then_some(())
    });
    produce(&kafka, &(0..300).map(|_| one("shared")).collect::<Vec<_>>());
    a.wait_for("shared", "value", 300);
    b.wait_for("shared", "value", 300);
    assert!(local(&a, "shared", "value").as_u64().is_some_and(|own| own > 0 && own < 300));
    let mut b = b;
    b.signal("TERM");
    b.wait();
    until("one to have all", || (partitions(&a) == 3.0).then_some(()));
    produce(&kafka, &(0..300).map(|_| one("shared")).collect::<Vec<_>>());
    a.wait_for("shared", "value", 600);
}

#[test]
fn without_a_journal_offsets_are_committed_all_the_same() {
    let kafka = Kafka::start();
    let agent = input(&kafka, &["store.kind=memory"]);
    produce(&kafka, &(0..30).map(|_| one("memory")).collect::<Vec<_>>());
    agent.wait_for("memory", "value", 30);
    until("the group to be told", || (committed(&kafka) == 30).then_some(()));
}

#[test]
fn a_password_from_a_file_lets_an_agent_in_and_a_wrong_one_is_named() {
    let Ok(brokers) = std::env::var("TALLYD_TEST_KAFKA_SASL") else {
        eprintln!("skipped: the mock takes everybody; tests/kafka.sh has a broker that asks for a password");
        return;
    };
    let kafka = Kafka::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    let options = "'security.protocol' = 'SASL_PLAINTEXT', 'sasl.mechanism' = 'PLAIN', 'sasl.username' = 'tallyd'";
    let settings = [
        format!("kafka.brokers={brokers}"),
        format!("kafka.options={{ {options} }}"),
        format!("kafka.password_file={}", file.display()),
    ];
    let settings: Vec<_> = settings.iter().map(String::as_str).chain(["listen.kafka=true"]).collect();
    crate::access::secret(directory.path(), "password", "a wrong one\n");
    let agent = kafka.agent(&settings);
    let reason = || agent.get("/-/ready").text();
    until("the refusal", || reason().contains("uthentication").then_some(()));
    assert!(!(agent.stderr() + &reason()).contains("a wrong one"));
    crate::access::secret(directory.path(), "password", "a password\n");
    let agent = kafka.agent(&settings);
    ready(&agent);
    produce(&kafka, &[one("let_in")]);
    agent.wait_for("let_in", "value", 1);
    assert!(!agent.stderr().contains("a password"));
}

#[test]
fn what_can_not_work_is_refused_at_the_start() {
    for (setting, said) in [
        ("kafka.options={ 'sekurity.protocol' = 'x' }", "sekurity.protocol"),
        ("kafka.options={ 'security.protocol' = 'SSL', 'ssl.ca.location' = '/nowhere' }", "ssl.ca.location"),
        ("kafka.password_file=/nowhere", "kafka.password_file"),
        ("store.kafka.topic=metrics-records", "store.kafka.topic"),
    ] {
        let state = tempfile::tempdir().unwrap();
        let mut command = tallyd();
        command.env("TALLYD_STATE_DIR", state.path()).args(["--set", "store.kind=kafka", "--set", setting]);
        let free =
            ["listen.udp=127.0.0.1:0", "listen.tcp=127.0.0.1:0", "http.ingest=127.0.0.1:0", "http.api=127.0.0.1:0"];
        let output = command.args(free.iter().flat_map(|setting| ["--set", setting])).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let code = if setting.contains("password_file") { 66 } else { 78 };
        assert_eq!(output.status.code(), Some(code), "{setting}: {text}");
        assert!(text.lines().last().unwrap().contains(said), "{setting}: {text}");
    }
}

/// The three services of the system that tallyd replaces: one takes records and forwards them, one counts them, one shows
/// what was counted.
#[test]
fn one_agent_forwards_another_counts_and_a_third_reads() {
    let kafka = Kafka::start();
    let all = kafka.settings(&["ingest.forward=kafka", "store.kind=memory"]);
    let taking = Agent::start(&all.iter().map(String::as_str).collect::<Vec<_>>());
    let counting = kafka.agent(&["listen.kafka=true", "http.ingest=[]"]);
    let reading = kafka.agent(&["listen.udp=[]", "listen.tcp=[]", "http.ingest=[]"]);
    let answer = taking.ingest(r#"{"level":"application","name":"server.get.timer","type":"TIMER","value":1}"#);
    assert_eq!((answer.status, answer.text().as_str()), (200, "Record server.get.timer UPDATED"));
    let many = r#"[{"name":"a","type":"COUNTER","value":2},{"name":"","type":"COUNTER","value":1},{"name":"b","type":"SET","value":"x"}]"#;
    let answer = taking.ingest(many);
    let want = json!({"accepted": 2, "rejected": 1, "errors": [{"index": 1, "reason": "empty_name"}]});
    assert_eq!((answer.status, answer.json()), (200, want));
    let answer = taking.ingest("{");
    assert_eq!((answer.status, &answer.json()["reason"]), (400, &json!("bad_json")));
    assert_eq!(taking.ingest("[]").status, 200);
    for agent in [&counting, &reading] {
        agent.wait_for("application.server.get.timer", "count", 1);
        agent.wait_for("a", "value", 2);
        agent.wait_for("b", "value", 1);
    }
    assert_eq!(taking.metric("a"), None, "it is counted elsewhere");
    let table = kafka.table(&kafka.topic("records"));
    assert!(table.contains_key("application.server.get.timer"), "{:?}", table.keys());
    assert_eq!(taking.own("tallyd_kafka_produced_total", "record"), 3.0);
    assert_eq!(taking.own("tallyd_lines_rejected_total", "http"), 2.0);
}

#[test]
fn a_key_is_forwarded_once_and_brokers_that_are_away_are_a_503() {
    let kafka = Kafka::start();
    let all = kafka.settings(&["ingest.forward=kafka"]);
    let agent = Agent::start(&all.iter().map(String::as_str).collect::<Vec<_>>());
    let headers = [("Content-Type", "application/json"), ("Idempotency-Key", "k")];
    for _ in 0..2 {
        let answer =
            http::request(agent.address("ingest"), "POST", "/ingest/metrics", &headers, one("once").as_bytes());
        assert_eq!(answer.status, 200);
    }
    assert_eq!(agent.own("tallyd_kafka_produced_total", "record"), 1.0);
    kafka.away();
    let answer = agent.ingest(one("lost"));
    assert_eq!(answer.status, 503);
    assert!(answer.header("retry-after").is_some());
    kafka.back();
    until("the brokers", || (agent.ingest(one("there")).status == 200).then_some(()));
}

/// The commands that the README shows for three services, as they stand there but for ports, directories and topics.
#[test]
fn the_readmes_three_services_work_together() {
    let kafka = Kafka::start();
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let commands: Vec<_> = readme.lines().filter(|line| line.starts_with("STORE=")).collect();
    let [taking, counting, reading] = commands.as_slice() else { panic!("{commands:?}") };
    let services = [taking, counting, reading].map(|command| Service::start(&kafka, command));
    let record = one("readme");
    let headers = [("Content-Type", "application/json")];
    let answer = http::request(services[0].address("ingest"), "POST", "/ingest/metrics", &headers, record.as_bytes());
    assert_eq!((answer.status, answer.text().as_str()), (200, "Record readme UPDATED"));
    for service in &services[1..] {
        until("the record to be counted", || {
            let answer = http::request(service.address("api"), "GET", "/data/metrics/readme", &[], b"");
            (answer.status == 200 && same(&answer.json()["value"], &json!(1))).then_some(())
        });
    }
}

/// An agent that a command of a shell starts.
struct Service {
    child: Child,
    ready: String,
    _state: tempfile::TempDir,
}

impl Service {
    fn start(kafka: &Kafka, command: &str) -> Self {
        let state = tempfile::tempdir().unwrap();
        let command = command.split(" #").next().unwrap().trim();
        let directory = std::path::Path::new(env!("CARGO_BIN_EXE_tallyd")).parent().unwrap();
        let mut bash = Command::new("bash");
        bash.args(["-c", command])
            .env("PATH", format!("{}:{}", directory.display(), std::env::var("PATH").unwrap()))
            .env("KAFKA_BOOTSTRAP_SERVERS", &kafka.brokers)
            .env("KAFKA_TOPIC", kafka.topic("records"))
            .env("TALLYD_STORE__KAFKA__TOPIC", kafka.topic("state"))
            .env("TALLYD_KAFKA__GROUP", kafka.topic("group"))
            .env("TALLYD_STATE_DIR", state.path());
        for name in ["", "_PID", "_SASL"] {
            bash.env_remove(format!("TALLYD_TEST_KAFKA{name}"));
        }
        for key in ["LISTEN__UDP", "LISTEN__TCP", "HTTP__INGEST", "HTTP__API"] {
            bash.env(format!("TALLYD_{key}"), "127.0.0.1:0");
        }
        let mut child = bash.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = collect(child.stderr.take().unwrap());
        let ready = || stderr.lock().unwrap().lines().find(|line| line.starts_with("ready")).map(str::to_owned);
        let ready = until(command, ready);
        Self { child, ready, _state: state }
    }

    fn address(&self, listener: &str) -> std::net::SocketAddr {
        let mut addresses = self.ready.split(' ').filter_map(|word| word.split_once('='));
        addresses.find(|(name, _)| *name == listener).unwrap().1.parse().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn agents_stop_in_time_though_the_brokers_are_away() {
    let kafka = Kafka::start();
    let mut agent = kafka.agent(&["listen.kafka=true", "ingest.forward=kafka"]);
    ready(&agent);
    until("partitions", || (agent.own("tallyd_kafka_partitions", "") == 3.0).then_some(()));
    agent.datagram("a:1|c");
    agent.wait_for("a", "value", 1);
    kafka.away();
    agent.datagram("a:1|c");
    agent.wait_for("a", "value", 2);
    agent.signal("TERM");
    assert_eq!(agent.wait().code(), Some(0));
    kafka.back();
}
