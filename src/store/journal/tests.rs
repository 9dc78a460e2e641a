//! The journal against a model of it: what was committed is there after any end of the process, and nothing else.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::aggregate::ledger::{Changed, Series, Shipped, State as LedgerState, Total};
use crate::aggregate::shard::SeriesId;
use crate::aggregate::{Aggregate, Counter, Sum};
use crate::receipt::Receipt;
use crate::store::{Batch, partition};

const NOW: u64 = 1_764_000_000_000;

/// A directory that goes with the test; in memory where that can be had, since these tests sync a lot.
fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

fn key(number: usize) -> SeriesKey {
    SeriesKey::from_canonical(&format!("application.server{number:06}.requests"))
}

fn counter(value: f64) -> Aggregate {
    Aggregate::Counter(Counter { increments: Sum::from(value), decrements: Sum::default(), samples: 1 })
}

fn total(value: f64) -> Total {
    Total { start_ms: NOW, update_ms: NOW, aggregate: counter(value), rates: None }
}

fn changed(number: usize, sum: f64, delta: Option<f64>) -> Changed {
    changed_to(number, total(sum), delta)
}

fn changed_to(number: usize, total: Total, delta: Option<f64>) -> Changed {
    let id = Arc::new(SeriesId { kind: Kind::Counter, key: key(number) });
    let shipped = delta.map(|delta| Shipped { total: Arc::new(total.clone()), delta: Arc::new(counter(delta)) });
    Changed { series: Arc::new(Series::new(id, LedgerState::new(total), 10_000, NOW)), total: None, shipped }
}

fn open(dir: &Path) -> (Journal, Opened) {
    open_with(dir, &Limits::default())
}

fn open_with(dir: &Path, limits: &Limits) -> (Journal, Opened) {
    let config = Config { cache: Size(4 << 20) };
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Journal::open(dir, &config, limits, true) {
            // A process that another test is starting has all our files until it begins, and so the lock.
            Err(Error::InUse(_)) if Instant::now() < deadline => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

fn totals(journal: &Journal) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    journal
        .totals(|kind, key, total| {
            assert_eq!(kind, Kind::Counter);
            found.insert(key.to_string(), value(&total.aggregate));
        })
        .unwrap();
    found
}

fn value(aggregate: &Aggregate) -> f64 {
    let Aggregate::Counter(counter) = aggregate else { panic!("{aggregate:?} is no counter") };
    counter.increments.value()
}

/// All batches of a partition, read without marking them.
fn batches(journal: &Journal, partition: Partition) -> Vec<Batch> {
    let snapshot = journal.snapshot().unwrap();
    let first = (0..).find_map(|after| snapshot.batches(partition, after, &mut { usize::MAX }).unwrap());
    first.unwrap()
}

/// The sum of all deltas in the outbox, by key.
fn outbox_sums(journal: &Journal) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for partition in 0..=Partition::MAX {
        for batch in batches(journal, partition) {
            for operation in batch.operations {
                *sums.entry(operation.key.to_string()).or_insert(0.0) += value(&operation.delta);
            }
        }
    }
    sums
}

#[test]
fn what_was_committed_is_there_after_a_restart() {
    let dir = scratch();
    let (journal, opened) = open(dir.path());
    assert!(opened.new);
    let changes: Vec<_> = (0..3_000).map(|number| changed(number, number as f64, Some(1.0))).collect();
    journal.commit(1, &changes, &[], NOW).unwrap();
    journal.commit(2, &changes[..10], &[(Kind::Counter, key(20))], NOW).unwrap();
    let (before, sums, agent) = (totals(&journal), outbox_sums(&journal), journal.agent());
    assert_eq!((before.len(), sums.len()), (2_999, 3_000));
    assert_eq!(sums[key(3).as_str()], 2.0);
    drop(journal);
    let (journal, opened) = open(dir.path());
    assert_eq!((opened.new, opened.damage, opened.totals), (false, None, 2_999));
    assert_eq!((journal.last_flush(), journal.agent()), (2, agent));
    assert_eq!((totals(&journal), outbox_sums(&journal)), (before, sums));
    assert_eq!(journal.total(Kind::Counter, &key(7)).unwrap(), Some(total(7.0)));
    assert_eq!(journal.total(Kind::Counter, &key(20)).unwrap(), None);
    assert_eq!(journal.total(Kind::Gauge, &key(7)).unwrap(), None);
}

#[test]
fn a_directory_has_one_owner_and_no_other_reader() {
    let dir = scratch();
    let state_dir = dir.path().join("a/state");
    let (_journal, _) = open(&state_dir);
    assert!(matches!(Journal::open(&state_dir, &Config::default(), &Limits::default(), true), Err(Error::InUse(_))));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state_dir), 0o700);
    assert_eq!(mode(&state_dir.join("journal.redb")), 0o600);
}

#[test]
fn batches_are_numbered_without_gaps_and_cut_by_partition() {
    let dir = scratch();
    let (journal, _) = open_with(dir.path(), &Limits { batch: 3, ..Limits::default() });
    let changes: Vec<_> = (0..3_000).map(|number| changed(number, 1.0, Some(1.0))).collect();
    journal.commit(1, &changes, &[], NOW).unwrap();
    for place in 0..=Partition::MAX {
        for (batch, sequence) in batches(&journal, place).iter().zip(1..) {
            assert_eq!((batch.partition, batch.sequence, batch.flush), (place, sequence, 1));
            assert!((1..=3).contains(&batch.operations.len()));
            assert!(batch.operations.iter().all(|operation| partition(&operation.key) == place));
        }
    }
    assert_eq!(outbox_sums(&journal).len(), 3_000);
}

/// Prints what a commit of many changed series costs; run it with `--release`.
#[test]
#[ignore = "a measurement"]
fn measure_commits() {
    let dir = TempDir::new().unwrap();
    for with_outbox in [false, true] {
        let dir = dir.path().join(with_outbox.to_string());
        let (journal, _) = Journal::open(&dir, &Config::default(), &Limits::default(), with_outbox).unwrap();
        for series in [100_000, 1_000_000] {
            let all: Vec<_> = (0..series).map(|number| changed(number, 1.0, with_outbox.then_some(1.0))).collect();
            let some: Vec<_> = all.iter().step_by(series / 100_000).cloned().collect();
            let mut flush = journal.last_flush();
            for (name, changes) in [("first", &all), ("again", &some), ("again", &some), ("few", &some[..10].to_vec())]
            {
                let begun = Instant::now();
                let cpu = cpu_ms();
                flush += 1;
                let done = journal.commit(flush, changes, &[], NOW).unwrap();
                let sizes = journal.sizes();
                println!(
                    "outbox {with_outbox}, {series} series, {name}: {} totals, {:?}, cpu {} ms, {} MiB written, file {} MiB, totals {} MiB, outbox {} MiB",
                    done.totals,
                    begun.elapsed(),
                    cpu_ms() - cpu,
                    done.bytes >> 20,
                    sizes.file >> 20,
                    sizes.totals_bytes >> 20,
                    sizes.outbox_bytes >> 20
                );
            }
        }
        let begun = Instant::now();
        for number in 0..100_000 {
            journal.total(Kind::Counter, &key(number * 20)).unwrap();
        }
        println!("100,000 look-ups: {:?}", begun.elapsed());
        drop(journal);
        let begun = Instant::now();
        let (journal, _) = Journal::open(&dir, &Config::default(), &Limits::default(), with_outbox).unwrap();
        println!("open: {:?}", begun.elapsed());
        let begun = Instant::now();
        journal.totals(|_, _, _| ()).unwrap();
        println!("totals: {:?}", begun.elapsed());
    }
}

/// Processor time of this process in milliseconds.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    10 * (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap())
}

/// A store that applies a batch when it is the next of its partition, as the script does.
#[derive(Debug, Default)]
struct Remote {
    sequences: BTreeMap<Partition, u64>,
    sums: BTreeMap<String, f64>,
}

impl Remote {
    fn sequence(&self, partition: Partition) -> u64 {
        self.sequences.get(&partition).copied().unwrap_or(0)
    }

    fn apply(&mut self, batch: &Batch) {
        let stored = self.sequences.entry(batch.partition).or_insert(0);
        if batch.sequence <= *stored {
            return;
        }
        assert_eq!(batch.sequence, *stored + 1, "a gap in partition {}", batch.partition);
        *stored = batch.sequence;
        for operation in &batch.operations {
            *self.sums.entry(operation.key.to_string()).or_insert(0.0) += value(&operation.delta);
        }
    }

    /// Ships some batches of a partition; the answers to all but the first `answered` get lost.
    fn ship(&mut self, journal: &Journal, partition: Partition, count: usize, answered: usize) {
        let batches = journal.outbox(partition, self.sequence(partition), 1 << 10).unwrap();
        for (at, batch) in batches.iter().take(count).enumerate() {
            self.apply(batch);
            if at < answered {
                journal.acknowledge(partition, batch.sequence);
            }
        }
    }

    fn claim_and_ship_all(&mut self, journal: &Journal) {
        for partition in 0..=Partition::MAX {
            assert_eq!(journal.resequence(partition, self.sequence(partition), 0).unwrap(), Resequenced::Continues);
        }
        while let Some(partition) = journal.pending().first().copied() {
            self.ship(journal, partition, usize::MAX, usize::MAX);
        }
    }
}

/// One step of a history.
#[derive(Debug, Clone)]
enum Step {
    /// Series and deltas of a flush.
    Flush(Vec<(usize, u8)>),
    /// A series that is deleted.
    Delete(usize),
    /// The store names the sequences it has.
    Claim,
    /// Batches of the partition of a series are shipped, some of them without an answer.
    Ship(usize, usize, usize),
    /// What the store has of a partition is safe there.
    Stable(usize),
    /// The process ends in order.
    Restart,
    /// The process is killed: another opens the file as it is.
    Kill,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let series = 0..12_usize;
    let flush = proptest::collection::vec((series.clone(), 1..10_u8), 0..20).prop_map(Step::Flush);
    let step = prop_oneof![
        8 => flush,
        1 => series.clone().prop_map(Step::Delete),
        1 => Just(Step::Claim),
        4 => (series.clone(), 0..5_usize, 0..5_usize).prop_map(|(series, count, answered)| Step::Ship(series, count, answered)),
        2 => series.prop_map(Step::Stable),
        1 => Just(Step::Restart),
        1 => Just(Step::Kill),
    ];
    proptest::collection::vec(step, 1..40)
}

/// What the journal must hold, and a store beside it.
struct History {
    root: TempDir,
    generation: usize,
    limits: Limits,
    journal: Option<Journal>,
    remote: Remote,
    flush: u64,
    totals: BTreeMap<String, f64>,
    shipped: BTreeMap<String, f64>,
}

impl History {
    fn new(limits: Limits) -> Self {
        let root = scratch();
        let journal = Some(open_with(&root.path().join("0"), &limits).0);
        let (totals, shipped) = (BTreeMap::new(), BTreeMap::new());
        Self { root, generation: 0, limits, journal, remote: Remote::default(), flush: 0, totals, shipped }
    }

    fn journal(&self) -> &Journal {
        self.journal.as_ref().unwrap()
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Flush(deltas) => self.flush(deltas),
            Step::Delete(number) => {
                self.flush += 1;
                self.totals.remove(key(*number).as_str());
                self.journal().commit(self.flush, &[], &[(Kind::Counter, key(*number))], NOW).unwrap();
            }
            Step::Claim => {
                for partition in 0..=Partition::MAX {
                    self.journal().resequence(partition, self.remote.sequence(partition), 0).unwrap();
                }
            }
            Step::Ship(number, count, answered) => {
                let journal = self.journal.as_ref().unwrap();
                self.remote.ship(journal, partition(&key(*number)), *count, *answered);
            }
            Step::Stable(number) => {
                let place = partition(&key(*number));
                self.journal().stable(place, self.remote.sequence(place));
            }
            Step::Restart => {
                self.journal = None;
                self.journal = Some(open_with(&self.dir(), &self.limits).0);
            }
            Step::Kill => {
                let old = self.dir();
                self.generation += 1;
                std::fs::create_dir(self.dir()).unwrap();
                std::fs::copy(old.join("journal.redb"), self.dir().join("journal.redb")).unwrap();
                let (journal, opened) = open_with(&self.dir(), &self.limits);
                assert_eq!(opened.damage, None);
                self.journal = Some(journal);
            }
        }
        assert_eq!(self.journal().last_flush(), self.flush);
        assert_eq!(totals(self.journal()), self.totals);
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join(self.generation.to_string())
    }

    fn flush(&mut self, deltas: &[(usize, u8)]) {
        let mut summed = BTreeMap::new();
        for (number, delta) in deltas {
            *summed.entry(*number).or_insert(0.0) += f64::from(*delta);
        }
        let mut changes = Vec::new();
        for (number, delta) in summed {
            *self.shipped.entry(key(number).to_string()).or_insert(0.0) += delta;
            let total = self.totals.entry(key(number).to_string()).or_insert(0.0);
            *total += delta;
            changes.push(changed(number, *total, Some(delta)));
        }
        let told_before = self.journal().last_flush();
        self.journal().commit(self.flush + 1, &changes, &[], NOW).unwrap();
        // A flush without changes is written only where there was something to tell.
        self.flush = if changes.is_empty() { self.journal().last_flush() } else { self.flush + 1 };
        assert!(self.flush >= told_before);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Totals equal the model after every step, and whatever was sent, lost, repeated, merged or killed, the store ends up
    /// with each delta once.
    #[test]
    fn every_delta_is_counted_once(steps in steps(), batch in 1..4_u32, outbox in prop_oneof![Just(0_u64), Just(600), Just(1 << 30)]) {
        let limits = Limits { batch, outbox: Size(outbox), ..Limits::default() };
        let mut history = History::new(limits);
        steps.iter().for_each(|step| history.run(step));
        let journal = history.journal.take().unwrap();
        history.remote.claim_and_ship_all(&journal);
        prop_assert_eq!(&history.remote.sums, &history.shipped);
    }
}

#[test]
fn past_its_bound_the_outbox_keeps_sums_not_flushes() {
    let dir = scratch();
    let (journal, _) = open_with(dir.path(), &Limits { outbox: Size(64 << 10), ..Limits::default() });
    let changes: Vec<_> = (0..100).map(|number| changed(number, 1.0, Some(0.1))).collect();
    let mut merged = 0;
    for flush in 1..=200 {
        merged += journal.commit(flush, &changes, &[], NOW).unwrap().merged;
    }
    assert!(merged > 1_000, "{merged}");
    let sizes = journal.sizes();
    assert!(sizes.outbox_bytes < 128 << 10, "{sizes:?}");
    let mut remote = Remote::default();
    remote.claim_and_ship_all(&journal);
    assert_eq!(remote.sums.len(), 100);
    assert!(remote.sums.values().all(|sum| (sum - 20.0).abs() < 1e-9), "{:?}", remote.sums);
}

#[test]
fn what_was_handed_out_never_changes() {
    let dir = scratch();
    let limits = Limits { outbox: Size(0), ..Limits::default() };
    let (journal, _) = open_with(dir.path(), &limits);
    let place = partition(&key(0));
    let flush = |journal: &Journal, flush| journal.commit(flush, &[changed(0, 1.0, Some(1.0))], &[], NOW).unwrap();
    flush(&journal, 1);
    flush(&journal, 2);
    let sent = journal.outbox(place, 0, usize::MAX).unwrap();
    drop(journal);
    let (journal, _) = open_with(dir.path(), &limits);
    for number in 3..=9 {
        flush(&journal, number);
    }
    let now = batches(&journal, place);
    assert_eq!(now[..sent.len()], sent);
    assert_eq!(now.len(), sent.len() + 1, "the rest merged");
}

#[test]
fn a_store_that_lost_more_than_the_outbox_holds_is_told_apart() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let place = partition(&key(0));
    for flush in 1..=4 {
        journal.commit(flush, &[changed(0, 1.0, Some(1.0))], &[], NOW).unwrap();
    }
    journal.outbox(place, 0, usize::MAX).unwrap();
    journal.stable(place, 3);
    journal.commit(5, &[], &[], NOW).unwrap();
    assert_eq!(batches(&journal, place).len(), 1);
    let snapshot = journal.snapshot().unwrap();
    let all = |after, mut room| snapshot.batches(place, after, &mut room).unwrap().map(|batches| batches.len());
    assert_eq!([all(2, 1_000), all(3, 1_000), all(3, 10)], [None, Some(1), None]);
    drop(snapshot);
    assert_eq!(journal.resequence(place, 1, 1).unwrap(), Resequenced::StoreBehind { lost: 2, samples: 2 });
    assert_eq!(journal.pending(), [place]);
    assert_eq!(journal.outbox(place, 1, usize::MAX).unwrap().len(), 1, "from the first there is");
    assert_eq!(journal.resequence(place, 4, 0).unwrap(), Resequenced::Continues);
    assert!(journal.pending().is_empty());
    // A failover that lost what was acknowledged, but not what was stable.
    assert_eq!(journal.resequence(place, 3, 0).unwrap(), Resequenced::Continues);
    assert_eq!(journal.pending(), [place]);
}

#[test]
fn an_older_copy_of_the_journal_numbers_on_behind_the_store() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let place = partition(&key(0));
    for flush in 1..=3 {
        journal.commit(flush, &[changed(0, 1.0, Some(1.0))], &[], NOW).unwrap();
    }
    assert_eq!(journal.resequence(place, 10, 0).unwrap(), Resequenced::JournalBehind);
    let sent = journal.outbox(place, 10, usize::MAX).unwrap();
    assert_eq!(sent.iter().map(|batch| batch.sequence).collect::<Vec<_>>(), [11, 12, 13]);
    drop(journal);
    assert_eq!(batches(&open(dir.path()).0, place), sent);
}

#[test]
fn a_copy_that_takes_a_new_name_keeps_only_what_is_its_own() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let place = partition(&key(0));
    journal.push_owner("first").unwrap();
    journal.commit(1, &[changed(0, 1.0, Some(1.0))], &[], NOW).unwrap();
    journal.commit(2, &[changed(0, 3.0, Some(2.0))], &[], NOW).unwrap();
    drop(journal);
    let (journal, opened) = open(dir.path());
    journal.push_owner("second").unwrap();
    assert_eq!(journal.owners(), ["first", "second"]);
    journal.commit(3, &[changed(0, 7.0, Some(4.0))], &[], NOW).unwrap();
    let (agent, dropped) = journal.mint_agent(&[0; PARTITIONS]).unwrap();
    assert_ne!(agent, opened.agent);
    assert_eq!((journal.agent(), journal.owners(), dropped), (agent, Vec::new(), 2));
    let own = batches(&journal, place);
    assert_eq!((own.len(), own[0].sequence, value(&own[0].operations[0].delta)), (1, 1, 4.0));
    drop(journal);
    let (journal, opened) = open(dir.path());
    assert_eq!((opened.agent, batches(&journal, place)), (agent, own));
    journal.push_owner("third").unwrap();
    journal.push_owner("fourth").unwrap();
    journal.prune_owners().unwrap();
    assert_eq!(journal.owners(), ["fourth"]);
}

#[test]
fn what_the_store_has_under_the_old_name_is_not_sent_under_the_new_one() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let place = partition(&key(0));
    for flush in 1..=3 {
        journal.commit(flush, &[changed(0, 1.0, Some(1.0))], &[], NOW).unwrap();
    }
    assert_eq!(journal.outbox(place, 0, usize::MAX).unwrap().len(), 3);
    // Two are in the store, which might still lose them; a copy of this journal then takes the name.
    journal.acknowledge(place, 2);
    let (_, dropped) = journal.mint_agent(&[0; PARTITIONS]).unwrap();
    assert_eq!((dropped, batches(&journal, place).len()), (0, 1));
}

#[test]
fn totals_without_an_update_expire() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let changes: Vec<_> = (0..1_000).map(|number| changed(number, 1.0, None)).collect();
    journal.commit(1, &changes, &[], NOW).unwrap();
    let late = NOW + 31 * 86_400_000;
    let mut expired = 0;
    for flush in 2..=20 {
        let fresh = changed_to(0, Total { update_ms: late, ..total(2.0) }, None);
        expired += journal.commit(flush, &[fresh], &[], late).unwrap().expired;
    }
    assert_eq!(expired, 999);
    assert_eq!(totals(&journal).into_keys().collect::<Vec<_>>(), [key(0).to_string()]);
    assert_eq!(journal.sizes().totals, 1);
}

#[test]
fn past_its_size_the_journal_loses_what_is_idle_longest() {
    let dir = scratch();
    let (journal, _) = open_with(dir.path(), &Limits { journal: Size(1 << 20), ..Limits::default() });
    let mut flush = 0;
    for round in 0..20_u64 {
        let changes: Vec<_> = (0..1_000)
            .map(|number| {
                let total = Total { update_ms: NOW + round, ..total(1.0) };
                changed_to(1_000 * round as usize + number, total, None)
            })
            .collect();
        flush += 1;
        journal.commit(flush, &changes, &[], NOW + round).unwrap();
    }
    let left = totals(&journal);
    assert!((1_000..10_000).contains(&left.len()), "{}", left.len());
    let newest = (19_000..20_000).filter(|number| left.contains_key(key(*number).as_str())).count();
    assert!(newest > 900, "{newest} of the newest are left");
    assert!(journal.sizes().file < 4 << 20, "{:?}", journal.sizes());
}

/// The bytes of a journal with some flushes, and what it holds.
fn sample_file() -> (Vec<u8>, BTreeMap<String, f64>) {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    for flush in 1..=5 {
        let changes: Vec<_> = (0..200).map(|number| changed(number, flush as f64, Some(1.0))).collect();
        journal.commit(flush, &changes, &[], NOW).unwrap();
    }
    let place = partition(&key(0));
    journal.resequence(place, 0, 0).unwrap();
    let sent = journal.outbox(place, 0, usize::MAX).unwrap();
    journal.stable(place, sent[1].sequence);
    journal.commit(6, &[changed(0, 6.0, Some(1.0))], &[], NOW).unwrap();
    let held = totals(&journal);
    drop(journal);
    (std::fs::read(dir.path().join("journal.redb")).unwrap(), held)
}

fn open_bytes(bytes: &[u8]) -> (TempDir, Journal, Opened) {
    let dir = scratch();
    std::fs::write(dir.path().join("journal.redb"), bytes).unwrap();
    let (journal, opened) = open(dir.path());
    (dir, journal, opened)
}

/// How many totals are gone or older than they were; none may hold anything that was never written.
fn worse(journal: &Journal, held: &BTreeMap<String, f64>) -> usize {
    let found = totals(journal);
    assert!(found.iter().all(|(key, value)| *value >= 1.0 && *value <= held[key]), "{found:?}");
    held.iter().filter(|(key, value)| found.get(*key) != Some(value)).count()
}

fn shipped_all(journal: &Journal) -> f64 {
    let mut remote = Remote::default();
    let mut sum = 0.0;
    for place in 0..=Partition::MAX {
        let first = locked(&journal.state).queues[usize::from(place)].dropped;
        remote.sequences.insert(place, first);
        journal.resequence(place, first, 0).unwrap();
    }
    remote.claim_and_ship_all(journal);
    sum += remote.sums.values().sum::<f64>();
    sum
}

#[test]
fn a_flipped_bit_costs_at_most_one_record() {
    let (bytes, held) = sample_file();
    let batches = outbox_sums(&open_bytes(&bytes).1).values().sum::<f64>();
    let mut moved = 0;
    for round in 0..120_usize {
        let at = if round < 80 { round * 4 } else { (round * 7_919 + round * round * 104_729) % bytes.len() };
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (round % 8);
        let (dir, journal, opened) = open_bytes(&bytes);
        assert!(worse(&journal, &held) <= 1, "byte {at}: {opened:?}");
        let lost = batches - outbox_sums(&journal).values().sum::<f64>();
        assert!((0.0..=20.0).contains(&lost), "byte {at}: {lost} of {batches} lost, {opened:?}");
        if let Some(damage) = opened.damage {
            moved += 1;
            assert_eq!(std::fs::read(&damage.moved_to).unwrap().len(), bytes.len());
            journal.commit(7, &[changed(0, 7.0, Some(1.0))], &[], NOW).unwrap();
            drop(journal);
            assert_eq!(open(dir.path()).1.damage, None, "byte {at}");
        }
    }
    assert!(moved > 30, "only {moved} files were refused");
}

#[test]
fn a_file_cut_short_keeps_what_is_left_of_it() {
    let (bytes, held) = sample_file();
    let mut left = Vec::new();
    for round in 0..60 {
        let length = if round < 20 { round * 200 } else { bytes.len() * (round - 20) / 40 };
        let (_dir, journal, opened) = open_bytes(&bytes[..length]);
        worse(&journal, &held);
        assert_eq!(opened.totals, totals(&journal).len() as u64);
        left.push(opened.totals);
        journal.commit(7, &[changed(0, 7.0, Some(1.0))], &[], NOW).unwrap();
        assert_eq!(journal.total(Kind::Counter, &key(0)).unwrap(), Some(total(7.0)));
    }
    assert!(left.is_sorted() && left.ends_with(&[200]), "{left:?}");
}

#[test]
fn what_is_no_journal_is_moved_aside() {
    for bytes in [b"not a journal".to_vec(), vec![0; 100_000], vec![0xff; 4_096], MAGIC_FLOOD.repeat(50_000)] {
        let (dir, journal, opened) = open_bytes(&bytes);
        let damage = opened.damage.unwrap();
        assert_eq!((damage.totals, damage.batches), (0, 0));
        assert!(damage.moved_to.starts_with(dir.path()), "{damage:?}");
        journal.commit(1, &[changed(0, 1.0, None)], &[], NOW).unwrap();
    }
}

/// The header of a record of 16 MiB, and nothing else.
const MAGIC_FLOOD: &[u8] = b"\xf7tj\x01\x00\x00\x00\x01....";

#[test]
fn after_starts_that_ended_while_they_opened_the_file_it_is_read_without_the_database() {
    let (bytes, held) = sample_file();
    let dir = scratch();
    std::fs::write(dir.path().join("journal.redb"), &bytes).unwrap();
    let batches = shipped_all(&open_bytes(&bytes).1);
    std::fs::write(dir.path().join("journal.opening"), "..").unwrap();
    assert_eq!(open(dir.path()).1.damage, None);
    std::fs::write(dir.path().join("journal.opening"), "...").unwrap();
    let (journal, opened) = open(dir.path());
    assert_eq!(opened.damage.as_ref().map(|damage| (damage.totals, damage.damaged)), Some((200, 0)), "{opened:?}");
    assert_eq!((totals(&journal), shipped_all(&journal)), (held, batches));
    assert_eq!(journal.last_flush(), 6);
    drop(journal);
    assert_eq!(open(dir.path()).1.damage, None);
}

/// A file system of a few MiB, unmounted when it is dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = scratch();
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        println!("skipped: no right to mount a small file system");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0.path()).status().unwrap();
    }
}

#[test]
fn a_full_disk_costs_nothing_that_is_given_again() {
    let Some(disk) = SmallDisk::mount("6m") else { return };
    let dir = disk.0.path().join("state");
    let filler = disk.0.path().join("filler");
    std::fs::write(&filler, vec![1; 3 << 20]).unwrap();
    let (journal, _) = open(&dir);
    let changes = |flush: u64| -> Vec<_> {
        let series = 500 * flush as usize;
        (0..series).map(|number| changed(number, flush as f64, Some(1.0))).collect()
    };
    let mut flush = 1;
    let error = loop {
        let before = (totals(&journal), journal.last_flush());
        match journal.commit(flush, &changes(flush), &[], NOW) {
            Ok(_) => flush += 1,
            Err(error) => {
                assert_eq!((totals(&journal), journal.last_flush()), before, "{error}");
                break error;
            }
        }
        assert!(flush < 100);
    };
    assert_eq!(error.reason(), "no_space", "{error}");
    for _ in 0..3 {
        journal.commit(flush, &changes(flush), &[], NOW).unwrap_err();
        assert_eq!(journal.total(Kind::Counter, &key(1)).unwrap(), Some(total((flush - 1) as f64)), "still read");
    }
    drop(journal);
    let (journal, opened) = open(&dir);
    assert_eq!((opened.damage, journal.last_flush()), (None, flush - 1), "opened while the disk is full");
    journal.commit(flush, &changes(flush), &[], NOW).unwrap_err();
    std::fs::remove_file(&filler).unwrap();
    journal.commit(flush, &changes(flush), &[], NOW).unwrap();
    let shipped: f64 = (1..=flush).map(|flush| 500.0 * flush as f64).sum();
    assert_eq!(outbox_sums(&journal).values().sum::<f64>(), shipped);
    assert_eq!(shipped_all(&journal), shipped);
    let held = totals(&journal);
    assert_eq!(held[key(1).as_str()], flush as f64);
    drop(journal);
    let (journal, opened) = open(&dir);
    assert_eq!((opened.damage, totals(&journal)), (None, held));
}

#[test]
fn an_idle_agent_writes_nothing() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    journal.commit(1, &[changed(0, 1.0, Some(1.0))], &[], NOW).unwrap();
    let file = || std::fs::read(dir.path().join("journal.redb")).unwrap();
    let before = file();
    assert_eq!(journal.commit(2, &[], &[], NOW).unwrap(), Committed::default());
    assert!(before == file(), "the file was written to");
    assert_eq!(journal.last_flush(), 1);
}

#[test]
fn shipping_beside_flushes_and_merges_loses_and_doubles_nothing() {
    const FLUSHES: u64 = 150;
    let dir = scratch();
    let (journal, _) = open_with(dir.path(), &Limits { outbox: Size(2_000), batch: 2, ..Limits::default() });
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut remote = Remote::default();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let changes: Vec<_> = (0..20).map(|number| changed(number, 1.0, Some(1.0))).collect();
            for flush in 1..=FLUSHES {
                journal.commit(flush, &changes[..1 + flush as usize % 20], &[], NOW).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Release);
        });
        let places: Vec<_> = (0..20).map(|number| partition(&key(number))).collect();
        while !done.load(std::sync::atomic::Ordering::Acquire) {
            for place in &places {
                remote.ship(&journal, *place, 3, 2);
                journal.stable(*place, remote.sequence(*place).saturating_sub(2));
            }
        }
    });
    remote.claim_and_ship_all(&journal);
    let shipped: u64 = (1..=FLUSHES).map(|flush| 1 + flush % 20).sum();
    assert_eq!(remote.sums.values().sum::<f64>(), shipped as f64);
}

/// Two processes with one journal: what one of them made before it knew where the store is must not pass for what the
/// other has sent under the same numbers.
#[test]
fn nothing_is_marked_as_sent_before_the_store_was_asked() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let numbers: Vec<_> = (0..64).collect();
    let changes: Vec<_> = numbers.iter().map(|number| changed(*number, 1.0, Some(1.0))).collect();
    journal.commit(1, &changes, &[], NOW).unwrap();
    let first = partition(&key(0));
    journal.resequence(first, 0, 0).unwrap();
    journal.outbox(first, 0, usize::MAX).unwrap();
    let other = numbers.iter().map(|number| partition(&key(*number))).find(|other| *other != first).unwrap();
    // The copy has shipped one batch of its own there.
    assert_eq!(journal.resequence(other, 1, 1).unwrap(), Resequenced::JournalBehind);
    assert_eq!(journal.outbox(other, 1, usize::MAX).unwrap()[0].sequence, 2);
}

fn marks(of: &[(&str, i64)]) -> Marks {
    of.iter().map(|(name, mark)| ((*name).into(), *mark)).collect()
}

fn beside(marks: &Marks) -> Beside<'_> {
    Beside { receipts: &[], marks }
}

#[test]
fn how_far_logs_were_read_is_kept_with_what_was_read() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    journal.note("noted", 7);
    assert_eq!(journal.commit_with(1, &[], &[], Beside::NOTHING, NOW).unwrap(), Committed::default());
    assert_eq!(journal.marks(), Marks::new(), "a note waits for something to write");
    journal.commit_with(2, &[changed(0, 1.0, None)], &[], beside(&marks(&[("log/0", 10), ("log/1", 5)])), NOW).unwrap();
    // Bad records alone are progress too.
    journal.commit_with(3, &[], &[], beside(&marks(&[("log/0", 11), ("noted", 8)])), NOW).unwrap();
    journal.commit(4, &[changed(0, 2.0, None)], &[], NOW).unwrap();
    let expected = marks(&[("log/0", 11), ("log/1", 5), ("noted", 8)]);
    assert_eq!(journal.marks(), expected, "what was noted does not come again");
    drop(journal);
    let (journal, _) = open(dir.path());
    assert_eq!(journal.marks(), expected);
    drop(journal);
    // A file whose structure is lost keeps its records.
    let path = dir.path().join("journal.redb");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..64].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let (journal, opened) = open(dir.path());
    assert!(opened.damage.is_some());
    assert_eq!((journal.marks(), totals(&journal)[key(0).as_str()]), (expected, 2.0));
}

#[test]
fn what_is_written_with_a_mark_is_the_total_of_that_flush() {
    let dir = scratch();
    let (journal, _) = open(dir.path());
    let mut change = changed(0, 5.0, None);
    change.total = Some(Arc::new(total(3.0)));
    journal.commit_with(1, &[change], &[], beside(&marks(&[("log/0", 3)])), NOW).unwrap();
    assert_eq!(totals(&journal)[key(0).as_str()], 3.0);
}

#[test]
fn records_newer_than_a_revision_and_those_asked_for_are_found_and_expired_ones_told() {
    let dir = scratch();
    let (journal, _) = open_with(dir.path(), &Limits { store_expire: Time::secs(10), ..Limits::default() });
    let all: Vec<_> = (0..10_000).map(|number| changed(number, 1.0, None)).collect();
    journal.commit(1, &all, &[], NOW).unwrap();
    let revision = journal.revision();
    journal.commit(2, &all[..3], &[], NOW).unwrap();
    let collect = |revision, wanted: &dyn Fn(&SeriesKey) -> bool| {
        let (mut found, mut newer) = (Vec::new(), Newer::default());
        loop {
            newer = journal.newer(&newer, revision, |_, key| wanted(key)).unwrap();
            found.extend(newer.records.iter().map(|(_, key, record)| {
                assert_eq!(read_total(record).unwrap().2, key.as_str());
                key.clone()
            }));
            if newer.is_last() {
                found.sort();
                return found;
            }
        }
    };
    assert_eq!(collect(revision, &|_| false), [key(0), key(1), key(2)]);
    assert_eq!(collect(revision + 1, &|wanted| *wanted == key(9_000)), [key(9_000)]);
    assert_eq!(collect(0, &|_| false).len(), 10_000);
    let records = journal.records([(Kind::Counter, &key(1)), (Kind::Gauge, &key(1))].into_iter()).unwrap();
    assert!(records[0].is_some() && records[1].is_none());
    journal.commit(3, &[changed(0, 1.0, None)], &[], NOW + 20_000).unwrap();
    assert_eq!(journal.take_expired(), [], "nobody asked");
    journal.tell_expired();
    let done = journal.commit(4, &[changed(0, 1.0, None)], &[], NOW + 20_000).unwrap();
    let expired = journal.take_expired();
    assert!(done.expired > 0 && expired.len() as u64 == done.expired, "{}", expired.len());
    assert!(expired.iter().all(|(kind, key)| journal.total(*kind, key).unwrap().is_none()));
    assert_eq!(journal.take_expired(), []);
}

#[test]
fn receipts_are_kept_with_their_flush_and_taken_from_a_damaged_file() {
    let dir = scratch();
    let receipt = |number: u64, at_ms: u64| Receipt {
        key: format!("key {number}").into_bytes().into(),
        is_json: number.is_multiple_of(2),
        text: format!("answer {number}").into(),
        at_ms,
    };
    let limits = Limits { receipts: 40, ..Limits::default() };
    let (journal, _) = open_with(dir.path(), &limits);
    let all: Vec<_> = (0..60).map(|number| receipt(number, NOW + number)).collect();
    for (flush, some) in (1..).zip(all.chunks(20)) {
        journal
            .commit_with(
                flush,
                &[changed(0, flush as f64, Some(1.0))],
                &[],
                Beside { receipts: some, ..Beside::NOTHING },
                NOW + 60,
            )
            .unwrap();
    }
    assert_eq!(journal.receipts().unwrap(), all[20..], "the oldest beyond the limit are gone");
    // With the next flush those go that are a day old.
    let later = NOW + 24 * 3_600_000 + 50;
    journal.commit_with(4, &[], &[], Beside { receipts: &[receipt(60, later)], ..Beside::NOTHING }, later).unwrap();
    let left: Vec<_> = all[51..].iter().cloned().chain([receipt(60, later)]).collect();
    assert_eq!(journal.receipts().unwrap(), left);
    drop(journal);
    std::fs::write(dir.path().join("journal.opening"), "...").unwrap();
    let (journal, opened) = open_with(dir.path(), &limits);
    assert!(opened.damage.is_some());
    let copied = journal.receipts().unwrap();
    assert!(left.iter().all(|receipt| copied.contains(receipt)), "{copied:?}");
}
