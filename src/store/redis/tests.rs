//! The scripts against a real Redis: what was applied is what the model has, whatever was sent twice, late or too early.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use redis::Value;

use super::server::{self, Server};
use super::*;
use crate::aggregate::ledger::Total;
use crate::aggregate::meter::Rates;
use crate::aggregate::set::Members;
use crate::aggregate::{Aggregate, Sum};
use crate::store::{Batch, Operation};

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn asker(agent: &str, owner: &str) -> Asker {
    Asker { agent: agent.to_owned(), owner: owner.to_owned(), expire: Time::secs(3600) }
}

/// Keys of one partition, whatever it is.
fn keys(count: usize) -> Vec<SeriesKey> {
    let all = (0..).map(|number| SeriesKey::parse(&format!("key.{number};host=a b")));
    all.filter(|key| partition(key) == 17).take(count).collect()
}

fn operation(kind: Kind, key: &SeriesKey, at_ms: u64, delta: Aggregate) -> Operation {
    Operation { kind, key: key.clone(), start_ms: at_ms - 5, update_ms: at_ms, delta, rates: None }
}

fn batch(sequence: u64, operations: Vec<Operation>) -> Batch {
    Batch { partition: 17, sequence, flush: sequence, samples: operations.len() as u64, operations }
}

fn counter(key: &SeriesKey, number: f64) -> Operation {
    let mut delta = Aggregate::new(Kind::Counter);
    let Aggregate::Counter(counter) = &mut delta else { unreachable!() };
    counter.increments.add(number);
    counter.samples = 1;
    operation(Kind::Counter, key, 1_000, delta)
}

/// A delta of a kind from numbers in eighths, which add up without an error whatever the order.
fn delta(kind: Kind, at_ms: u64, numbers: &[i32]) -> Aggregate {
    let mut delta = Aggregate::new(kind);
    for (place, number) in numbers.iter().enumerate() {
        let value = f64::from(*number) / 8.0;
        match &mut delta {
            Aggregate::Counter(counter) if value < 0.0 => assert!(counter.decrements.add(-value)),
            Aggregate::Counter(counter) => assert!(counter.increments.add(value * 1e6)),
            Aggregate::Gauge(gauge) if place == 0 && number % 2 == 0 => gauge.set = Some((value, at_ms)),
            Aggregate::Gauge(gauge) => {
                gauge.change.add(value);
                gauge.changed_at = at_ms + 1;
            }
            Aggregate::Observed(observed) => assert!(observed.observe(value, f64::from(1 << place), at_ms)),
            Aggregate::Set(members) => {
                // Many or few members.
                let count = if place == 0 { number.unsigned_abs() % 2_000 } else { 1 };
                for member in 0..count {
                    members.insert(format!("{number} {member}").as_bytes());
                }
            }
            Aggregate::Meter(marks) => {
                marks.count.add(value.abs());
                marks.last = (value, at_ms);
                marks.samples += 1;
            }
        }
    }
    delta
}

/// What a total says, in a form in which equal figures are equal.
fn figures(total: &Total) -> Vec<String> {
    let sum = |sum: &Sum| format!("{:?}", sum.split());
    let mut figures = vec![format!("{} {}", total.start_ms, total.update_ms)];
    figures.extend(match &total.aggregate {
        Aggregate::Counter(counter) => vec![sum(&counter.increments), sum(&counter.decrements)],
        Aggregate::Gauge(gauge) => vec![format!("{:?} {}", gauge.set, gauge.value())],
        Aggregate::Observed(observed) => vec![
            format!("{} {} {} {:?}", observed.n, observed.min, observed.max, observed.last),
            [&observed.sum, &observed.sum_squares, &observed.count, &observed.weighted_sum].map(sum).join(" "),
            format!("{:?}", observed.histogram),
        ],
        Aggregate::Set(members) => vec![members.cardinality().to_string()],
        Aggregate::Meter(marks) => vec![sum(&marks.count), format!("{:?} {}", marks.last, marks.samples)],
    });
    figures
}

/// What a model keeps of all that was applied.
type Model = BTreeMap<(Kind, SeriesKey), Total>;

fn apply_to(model: &mut Model, operation: &Operation) {
    let Operation { kind, key, start_ms, update_ms, delta, .. } = operation;
    let total = model.entry((*kind, key.clone())).or_insert_with(|| Total {
        start_ms: *start_ms,
        update_ms: *update_ms,
        aggregate: Aggregate::new(*kind),
        rates: None,
    });
    total.start_ms = total.start_ms.min(*start_ms);
    total.update_ms = total.update_ms.max(*update_ms);
    assert!(total.aggregate.merge(delta, 0));
}

/// One step: which agent, how far from its next batch the one that is sent now stands, and its operations.
#[derive(Debug, Clone)]
struct Step {
    agent: usize,
    off: i64,
    operations: Vec<(usize, Kind, Vec<i32>)>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let operation =
        (0..3_usize, proptest::sample::select(Kind::ALL.to_vec()), prop::collection::vec(-9_000..9_000, 1..4));
    let off = prop_oneof![4 => Just(0_i64), 1 => -3_i64..0, 1 => 1_i64..3];
    let step = (0..3_usize, off, prop::collection::vec(operation, 1..5));
    prop::collection::vec(step.prop_map(|(agent, off, operations)| Step { agent, off, operations }), 1..30)
}

/// The batches of each agent in the order of the steps; each series at most once in a batch, each time only once.
fn batches(steps: &[Step], keys: &[SeriesKey]) -> Vec<Vec<Batch>> {
    let mut agents = vec![Vec::new(); 3];
    for (number, step) in steps.iter().enumerate() {
        let mut seen = BTreeSet::new();
        // The clock of an agent goes forward; clocks of agents differ.
        let at_ms = 1_700_000_000_000 + number as u64 * 10;
        let fresh = step.operations.iter().filter(|(key, kind, _)| seen.insert((*key, *kind)));
        let operations = fresh.map(|(key, kind, numbers)| {
            let at_ms = at_ms + step.agent as u64 * 103;
            operation(*kind, &keys[*key], at_ms, delta(*kind, at_ms, numbers))
        });
        let operations = operations.collect();
        let sequence = agents[step.agent].len() as u64 + 1;
        agents[step.agent].push(batch(sequence, operations));
    }
    agents
}

async fn replay(server: &Server, steps: &[Step]) -> (Model, Model) {
    let keys = keys(3);
    server.ask(&["FLUSHALL"]).unwrap();
    let connection = server.connection();
    let agents = batches(steps, &keys);
    let askers: Vec<_> = (0..3).map(|agent| asker(&format!("agent{agent}"), "owner")).collect();
    for asker in &askers {
        connection.claim(asker, 17, None, &[], &Inherited::default()).await.unwrap();
    }
    let mut model = Model::new();
    let mut stored = [0_u64; 3];
    for step in steps {
        let sequence = (stored[step.agent] as i64 + 1 + step.off).max(1) as u64;
        let Some(batch) = agents[step.agent].get(sequence as usize - 1) else { continue };
        let answer = connection.apply(&askers[step.agent], batch, sequence - 1, 0).await.unwrap();
        let next = stored[step.agent] + 1;
        match answer {
            Applied::Stored { sequence: now, failed, .. } => {
                assert!(sequence <= next);
                assert_eq!((now, failed), (stored[step.agent].max(sequence), vec![]));
                if sequence == next {
                    batch.operations.iter().for_each(|operation| apply_to(&mut model, operation));
                    stored[step.agent] = sequence;
                }
            }
            Applied::Gap { sequence: now, .. } => {
                assert!(sequence > next);
                assert_eq!(now, stored[step.agent]);
            }
            Applied::NotOwner => panic!("the owner is the owner"),
        }
    }
    let reader = reader(server);
    let page = reader.list(None, "", |_, _| true, 1_000).await.unwrap();
    let totals = reader.totals(&page.series, "agent1").await.unwrap();
    let mut read = Model::new();
    for (series, stored_total) in page.series.into_iter().zip(totals) {
        let stored_total = stored_total.unwrap();
        assert_eq!(stored_total.sequence, stored[1]);
        read.insert(series, stored_total.total.unwrap());
    }
    (model, read)
}

/// Every hash of a series and of sequences, and what stands in it.
fn hashes(server: &Server) -> BTreeMap<String, BTreeMap<String, String>> {
    let words = |value: Option<Value>| redis::from_redis_value::<Vec<String>>(value.unwrap()).unwrap();
    let names = words(server.ask(&["KEYS", "*"]));
    let hashes = names.into_iter().filter(|name| name.contains(":s:") || name.ends_with(":seq"));
    let fields = |name: &str| {
        let pairs = words(server.ask(&["HGETALL", name]));
        pairs.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
    };
    hashes.map(|name| (name.clone(), fields(&name))).collect()
}

#[test]
fn each_batch_counts_once_whatever_is_sent() {
    let server = Server::start(&[]);
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() });
    let law = |steps: Vec<Step>| {
        let show = |model: &Model| model.iter().map(|(id, total)| (id.clone(), figures(total))).collect::<Vec<_>>();
        let mut held = Vec::new();
        for rights in ["+@scripting", "-@scripting"] {
            server.ask(&["ACL", "SETUSER", "default", rights]).unwrap();
            let (model, read) = run(replay(&server, &steps));
            prop_assert_eq!(show(&read), show(&model));
            held.push(hashes(&server));
        }
        prop_assert_eq!(&held[0], &held[1], "with and without scripts");
        Ok(())
    };
    runner.run(&steps(), law).unwrap();
}

async fn apply(connection: &Connection, sequence: u64, operations: Vec<Operation>) -> Applied {
    connection.apply(&asker("a", "o"), &batch(sequence, operations), sequence - 1, 0).await.unwrap()
}

async fn claimed(server: &Server) -> Connection {
    let connection = server.connection();
    let claimed = connection.claim(&asker("a", "o"), 17, None, &[], &Inherited::default()).await.unwrap();
    assert!(matches!(claimed, Claimed::Ours { sequence: 0, .. }));
    connection
}

/// Does a test with scripts and where they are forbidden.
fn both(test: &impl AsyncFn(&Server)) {
    for rights in ["+@scripting", "-@scripting"] {
        let server = Server::start(&[]);
        server.ask(&["ACL", "SETUSER", "default", rights]).unwrap();
        run(async {
            assert_eq!(server.connection().calls_scripts().await, rights.starts_with('+'));
            test(&server).await;
        });
    }
}

fn reader(server: &Server) -> RedisReader {
    RedisReader::new(&server.config(), &Limits::default()).unwrap()
}

async fn total(server: &Server, kind: Kind, key: &SeriesKey) -> Result<Option<Total>, Error> {
    reader(server).total(kind, key, "a").await.map(|stored| stored.total)
}

fn increments(total: Option<Total>) -> Sum {
    match total.map(|total| total.aggregate) {
        Some(Aggregate::Counter(counter)) => counter.increments,
        other => panic!("{other:?} is no counter"),
    }
}

#[test]
fn whole_numbers_beyond_floats_add_up_exactly() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = claimed(server).await;
        let large = (1_u64 << 53) as f64;
        for sequence in 1..=3 {
            apply(&connection, sequence, vec![counter(key, large + 2.0 * sequence as f64)]).await;
        }
        apply(&connection, 4, vec![counter(key, 1.0)]).await;
        let sum = increments(total(server, Kind::Counter, key).await.unwrap());
        assert_eq!(sum.split(), (3 * (1 << 53) + 2 + 4 + 6 + 1, 0.0));
    });
}

#[test]
fn a_sum_beyond_64_bits_goes_on_as_a_float() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = claimed(server).await;
        for (sequence, number) in [(1, 9e18), (2, 9e18), (3, 1e300), (4, 1.5)] {
            let answer = apply(&connection, sequence, vec![counter(key, number)]).await;
            assert!(matches!(&answer, Applied::Stored { failed, .. } if failed.is_empty()), "{answer:?}");
            let sum = increments(total(server, Kind::Counter, key).await.unwrap()).value();
            let model = [9e18, 18e18, 1e300, 1e300][sequence as usize - 1];
            assert!((sum - model).abs() <= model * 1e-15, "{sum} is not {model}");
        }
    });
}

#[test]
fn a_spoilt_key_spoils_only_itself() {
    both(&async |server| {
        let keys = keys(3);
        let connection = claimed(server).await;
        let names = Names::new("tallyd");
        server.ask(&["SET", &names.series(Kind::Counter, &keys[0]), "text"]).unwrap();
        server.ask(&["HSET", &names.series(Kind::Counter, &keys[1]), "increments", "text"]).unwrap();
        let answer = apply(&connection, 1, keys.iter().map(|key| counter(key, 5.0)).collect()).await;
        let Applied::Stored { sequence: 1, failed, .. } = answer else { panic!("{answer:?}") };
        assert_eq!(failed, [(0, Failure::WrongType), (1, Failure::NotANumber)]);
        assert_eq!(total(server, Kind::Counter, &keys[0]).await, Err(Error::Foreign));
        assert_eq!(total(server, Kind::Counter, &keys[1]).await, Err(Error::Foreign));
        assert_eq!(increments(total(server, Kind::Counter, &keys[2]).await.unwrap()).value(), 5.0);
        // A spoilt index and a spoilt log hold up no batch either.
        for key in [names.of(17, "index"), names.of(17, "del")] {
            server.ask(&["DEL", &key]).unwrap();
            server.ask(&["SET", &key, "text"]).unwrap();
        }
        let answer = apply(&connection, 2, vec![counter(&keys[2], 5.0)]).await;
        assert!(matches!(&answer, Applied::Stored { sequence: 2, failed, .. } if failed.is_empty()), "{answer:?}");
        assert_eq!(increments(total(server, Kind::Counter, &keys[2]).await.unwrap()).value(), 10.0);
    });
}

#[test]
fn members_that_share_a_register_raise_it_together() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = claimed(server).await;
        let exact: Members = (0..1_024).collect();
        // The same register: the upper 15 bits. The first of two has the higher rank, the second is there already.
        let hashes = [(1 << 49) | (1 << 20), (1 << 49) | (1 << 40), (1 << 49) | (1 << 30)];
        for (sequence, members) in [(1, exact), (2, hashes.into_iter().collect())] {
            let delta = Aggregate::Set(Box::new(members));
            apply(&connection, sequence, vec![operation(Kind::Set, key, 1_000, delta)]).await;
        }
        let name = Names::new("tallyd").series(Kind::Set, key);
        let rank = (49 - 20).to_string().into_bytes();
        assert_eq!(server.ask(&["HGET", &name, "r:1"]), Some(Value::BulkString(rank)));
        assert_eq!(server.ask(&["HGET", &name, "members"]), Some(Value::BulkString(b"1024".to_vec())));
    });
}

#[test]
fn only_the_last_claimer_writes() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = server.connection();
        let send = async |owner: &str, sequence: u64| {
            let batch = batch(sequence, vec![counter(key, 1.0)]);
            connection.apply(&asker("a", owner), &batch, sequence - 1, 0).await.unwrap()
        };
        let claim = async |owner: &str, known: &[&str]| {
            let known: Vec<_> = known.iter().map(|nonce| (*nonce).to_owned()).collect();
            // What it inherited: the last that it knows of.
            let maker = known.last().cloned().unwrap_or_default();
            connection.claim(&asker("a", owner), 17, None, &known, &Inherited { maker, last: 7 }).await.unwrap()
        };
        assert_eq!(send("one", 1).await, Applied::NotOwner);
        assert!(matches!(claim("one", &[]).await, Claimed::Ours { sequence: 0, .. }));
        assert!(matches!(send("one", 1).await, Applied::Stored { sequence: 1, .. }));
        assert!(matches!(claim("two", &["one"]).await, Claimed::Ours { sequence: 1, .. }));
        assert_eq!(send("one", 2).await, Applied::NotOwner);
        let by_two = Claimed::Clone(Inherited { maker: "one".to_owned(), last: 7 });
        assert_eq!(claim("three", &["one"]).await, by_two);
        assert_eq!(connection.inherited("a", 17).await.unwrap(), Inherited { maker: "one".to_owned(), last: 7 });
        assert!(matches!(send("two", 2).await, Applied::Stored { sequence: 2, .. }));
        assert_eq!(increments(total(server, Kind::Counter, key).await.unwrap()).value(), 2.0);
    });
}

#[test]
fn agents_that_meet_in_a_partition_count_each_other_in() {
    both(&async |server| {
        let keys = keys(2);
        let mut agents = tokio::task::JoinSet::new();
        for agent in 0..6 {
            let (connection, asker, keys) = (server.connection(), asker(&format!("agent{agent}"), "o"), keys.clone());
            agents.spawn(async move {
                connection.claim(&asker, 17, None, &[], &Inherited::default()).await.unwrap();
                for sequence in 1..=30 {
                    let operations = keys.iter().map(|key| counter(key, 1.0)).collect();
                    let answer = connection.apply(&asker, &batch(sequence, operations), sequence - 1, 0).await.unwrap();
                    assert!(matches!(&answer, Applied::Stored { failed, .. } if failed.is_empty()), "{answer:?}");
                }
            });
        }
        agents.join_all().await;
        for key in &keys {
            assert_eq!(increments(total(server, Kind::Counter, key).await.unwrap()).value(), 180.0);
        }
    });
}

#[test]
fn a_server_without_the_commands_for_scripts_applies_batches() {
    let server = Server::start(&["--rename-command", "EVALSHA", ""]);
    run(async {
        let key = &keys(1)[0];
        let connection = claimed(&server).await;
        assert!(!connection.calls_scripts().await);
        apply(&connection, 1, vec![counter(key, 5.0)]).await;
        assert_eq!(increments(total(&server, Kind::Counter, key).await.unwrap()).value(), 5.0);
    });
}

#[test]
fn a_hole_that_a_merge_left_is_no_gap() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = claimed(server).await;
        let merged = batch(9, vec![counter(key, 9.0)]);
        let answer = connection.apply(&asker("a", "o"), &merged, 0, 0).await.unwrap();
        assert!(matches!(answer, Applied::Stored { sequence: 9, .. }));
        let answer = connection.apply(&asker("a", "o"), &merged, 0, 0).await.unwrap();
        assert!(matches!(answer, Applied::Stored { sequence: 9, .. }));
        assert!(matches!(apply(&connection, 11, vec![counter(key, 1.0)]).await, Applied::Gap { sequence: 9, .. }));
        assert_eq!(increments(total(server, Kind::Counter, key).await.unwrap()).value(), 9.0);
    });
}

#[test]
fn a_delete_reaches_every_agent_once() {
    both(&async |server| {
        let keys = keys(2);
        let connection = claimed(server).await;
        let reader = reader(server);
        apply(&connection, 1, keys.iter().map(|key| counter(key, 5.0)).collect()).await;
        let deleted = reader.delete(&keys[0], &Kind::ALL).await.unwrap();
        assert_eq!(deleted.iter().map(|one| (one.kind, &one.key)).collect::<Vec<_>>(), [(Kind::Counter, &keys[0])]);
        assert_eq!(total(server, Kind::Counter, &keys[0]).await, Ok(None));
        assert_eq!(reader.delete(&keys[0], &Kind::ALL).await, Ok(vec![]));
        // The agent hears of it with its next batch, which counts as after it, and when it claims and asks.
        let answer = apply(&connection, 2, vec![counter(&keys[0], 1.0)]).await;
        let Applied::Stored { news, .. } = answer else { panic!("{answer:?}") };
        assert_eq!(news.deletes, deleted);
        assert_eq!(connection.poll(&asker("a", "o"), 17, 0).await.unwrap().news.deletes, deleted);
        assert_eq!(increments(total(server, Kind::Counter, &keys[0]).await.unwrap()).value(), 1.0);
        // Until it says that it knows, also after a restart; an agent that is new has nothing to forget.
        let heard = async |agent: &str, seen| match connection
            .claim(&asker(agent, "o"), 17, seen, &[], &Inherited::default())
            .await
            .unwrap()
        {
            Claimed::Ours { news, .. } => news.deletes,
            Claimed::Clone(_) => panic!("no clone"),
        };
        assert_eq!(heard("a", None).await, deleted);
        assert_eq!(heard("new", None).await, []);
        let seen = deleted[0].number;
        assert_eq!(connection.poll(&asker("a", "o"), 17, seen).await.unwrap().news.deletes, []);
        assert_eq!(heard("a", None).await, []);
        // A later delete of the same key has a larger number.
        assert!(reader.delete(&keys[0], &[Kind::Counter]).await.unwrap()[0].number > seen);
        assert_eq!(heard("new", None).await.len(), 1);
    });
}

#[test]
fn a_list_is_the_same_in_pages_of_any_size() {
    both(&async |server| {
        let connection = claimed(server).await;
        let all = keys(25);
        apply(&connection, 1, all.iter().map(|key| counter(key, 1.0)).collect()).await;
        let reader = reader(server);
        let whole = reader.list(None, "", |_, _| true, 1_000).await.unwrap();
        assert_eq!((whole.series.len(), &whole.next), (25, &None));
        for limit in [1, 7, 24, 25] {
            let (mut pages, mut cursor) = (Vec::new(), None);
            loop {
                let page = reader.list(cursor.as_ref(), "", |_, _| true, limit).await.unwrap();
                assert!(page.series.len() <= limit);
                pages.extend(page.series);
                // As it goes through a URL.
                cursor = page.next.map(|next| next.to_string().parse().unwrap());
                if cursor.is_none() {
                    break;
                }
            }
            assert_eq!(pages, whole.series);
        }
        let one = all[3].as_str();
        let page = reader.list(None, one, |_, _| true, 1_000).await.unwrap();
        assert!(page.series.iter().all(|(_, key)| key.as_str().starts_with(one)) && !page.series.is_empty());
        assert_eq!(reader.list(None, "key", |kind, _| kind == Kind::Set, 10).await.unwrap(), Page::default());
    });
}

#[test]
fn a_gauge_whose_agent_was_ahead_of_its_time_goes_on() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = claimed(server).await;
        let far_ms = 1_900_000_000_000;
        for (sequence, at_ms, numbers, value) in [
            (1, far_ms, [16, 9].as_slice(), 25.0),
            (2, 1_000, &[32, 1], 33.0),
            (3, far_ms, &[80], 80.0),
            (4, 2_000, &[7], 87.0),
            (5, 3_000, &[48], 48.0),
        ] {
            apply(&connection, sequence, vec![operation(Kind::Gauge, key, at_ms, delta(Kind::Gauge, at_ms, numbers))])
                .await;
            let total = total(server, Kind::Gauge, key).await.unwrap().unwrap();
            let Aggregate::Gauge(gauge) = total.aggregate else { unreachable!() };
            assert_eq!(gauge.value() * 8.0, value, "after batch {sequence}");
        }
    });
}

#[test]
fn rates_of_agents_decay_and_add_up() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = server.connection();
        let (mut first, mut second) = (Rates::new(0), Rates::new(0));
        (0..24).for_each(|at| assert!(first.mark(10.0, at * 5_000)));
        (0..36).for_each(|at| assert!(second.mark(30.0, at * 5_000)));
        for (agent, rates) in [("a", &first), ("b", &second)] {
            connection.claim(&asker(agent, "o"), 17, None, &[], &Inherited::default()).await.unwrap();
            let mut operation = operation(Kind::Meter, key, 180_000, delta(Kind::Meter, 180_000, &[8]));
            operation.rates = Some(rates.clone());
            connection.apply(&asker(agent, "o"), &batch(1, vec![operation]), 0, 0).await.unwrap();
        }
        let read = total(server, Kind::Meter, key).await.unwrap().unwrap().rates.unwrap();
        let model = [first.at(600_000), second.at(600_000)];
        for (period, rate) in read.at(600_000).into_iter().enumerate() {
            let sum = model[0][period] + model[1][period];
            assert!((rate - sum).abs() < 1e-9 * sum, "{rate} is not {sum}");
        }
    });
}

#[test]
fn a_script_that_the_server_forgot_is_loaded_again() {
    let server = Server::start(&[]);
    run(async {
        let connection = server.connection();
        server.ask(&["SCRIPT", "FLUSH"]).unwrap();
        let claimed = connection.claim(&asker("a", "o"), 17, None, &[], &Inherited::default()).await.unwrap();
        assert!(matches!(claimed, Claimed::Ours { sequence: 0, .. }));
    });
}

#[test]
fn a_cluster_without_slots_is_down_until_it_has_them() {
    let bus = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let server = Server::start(&["--cluster-enabled", "yes", "--cluster-port", &bus]);
    let config = Config { mode: Mode::Cluster, ..server.config() };
    let connection = Connection::new(&config, &Limits::default(), Duration::ZERO).unwrap();
    run(async {
        assert_eq!(
            connection.claim(&asker("a", "o"), 17, None, &[], &Inherited::default()).await,
            Err(Error::ClusterDown)
        );
        server.ask(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while connection.claim(&asker("a", "o"), 17, None, &[], &Inherited::default()).await.is_err() {
            assert!(std::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // A node that takes over, or that was started anew, has no scripts.
        server.ask(&["SCRIPT", "FLUSH"]).unwrap();
        assert_eq!(connection.poll(&asker("a", "o"), 17, 0).await.unwrap().sequence, 0);
        let batch = batch(1, vec![counter(&keys(1)[0], 5.0)]);
        let applied = connection.apply(&asker("a", "o"), &batch, 0, 0).await.unwrap();
        assert!(matches!(applied, Applied::Stored { sequence: 1, .. }));
        assert_eq!(connection.poll(&asker("a", "o"), 17, 0).await.unwrap().sequence, 1);
    });
}

#[test]
fn series_expire_and_leave_the_list() {
    both(&async |server| {
        let key = &keys(1)[0];
        let connection = server.connection();
        let asker = Asker { expire: Time::millis(30), ..asker("a", "o") };
        connection.claim(&asker, 17, None, &[], &Inherited::default()).await.unwrap();
        connection.apply(&asker, &batch(1, vec![counter(key, 1.0)]), 0, 0).await.unwrap();
        let name = Names::new("tallyd").series(Kind::Counter, key);
        server::wait_for("the hash expires", || server.ask(&["EXISTS", &name]) == Some(Value::Int(0)));
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while connection.poll(&asker, 17, 0).await.unwrap().news.expired == 0 {
            assert!(std::time::Instant::now() < deadline);
        }
        assert_eq!(server.ask(&["EXISTS", &Names::new("tallyd").of(17, "index")]), Some(Value::Int(0)));
    });
}
