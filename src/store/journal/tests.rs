//! The journal against a model of it: what was committed is there after any end of the process, and nothing else.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::aggregate::ledger::{Changed, Series, State as LedgerState, Total};
use crate::aggregate::shard::SeriesId;
use crate::aggregate::{Aggregate, Counter, Sum};
use crate::store::{Batch, partition};

const NOW: u64 = 1_764_000_000_000;

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
    let id = Arc::new(SeriesId { kind: Kind::Counter, key: key(number) });
    let state = Arc::new(LedgerState::new(total(sum)));
    let series = Arc::new(Series::new(id, LedgerState::new(total(sum)), NOW));
    Changed { series, state, delta: delta.map(|delta| Arc::new(counter(delta))) }
}

fn open(dir: &Path) -> (Journal, Opened) {
    open_with(dir, &Limits::default())
}

fn open_with(dir: &Path, limits: &Limits) -> (Journal, Opened) {
    let config = Config { cache: Size(4 << 20) };
    Journal::open(dir, &config, limits, true).unwrap()
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
    match aggregate {
        Aggregate::Counter(counter) => counter.increments.value(),
        other => panic!("{other:?} is no counter"),
    }
}

/// All batches of a partition, read without marking them.
fn batches(journal: &Journal, partition: Partition) -> Vec<Batch> {
    let snapshot = journal.snapshot().unwrap();
    let first = (0..).find_map(|after| snapshot.batches(partition, after).unwrap());
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
    let dir = TempDir::new().unwrap();
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
    let dir = TempDir::new().unwrap();
    let state_dir = dir.path().join("a/state");
    let (_journal, _) = open(&state_dir);
    assert!(matches!(Journal::open(&state_dir, &Config::default(), &Limits::default(), true), Err(Error::InUse(_))));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state_dir), 0o700);
    assert_eq!(mode(&state_dir.join("journal.redb")), 0o600);
}

#[test]
fn batches_are_numbered_without_gaps_and_cut_by_partition() {
    let dir = TempDir::new().unwrap();
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
                let begun = std::time::Instant::now();
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
        let begun = std::time::Instant::now();
        for number in 0..100_000 {
            journal.total(Kind::Counter, &key(number * 20)).unwrap();
        }
        println!("100,000 look-ups: {:?}", begun.elapsed());
        drop(journal);
        let begun = std::time::Instant::now();
        let (journal, _) = Journal::open(&dir, &Config::default(), &Limits::default(), with_outbox).unwrap();
        println!("open: {:?}", begun.elapsed());
        let begun = std::time::Instant::now();
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
