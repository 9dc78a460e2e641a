//! What the topic says: of the other agents their totals as they stand in it, of this agent only which series it has there.
//!
//! Bounded by `limits.kafka_table`: what does not fit is left out and counted, and the table then is not whole, which
//! readers are told. Metrics: `tallyd_kafka_table_series`, `tallyd_kafka_table_bytes`, `tallyd_kafka_table_refused_total`.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use crate::aggregate::shard::SeriesId;
use crate::sample::{Kind, SeriesKey};
use crate::telemetry;

/// What an entry costs beside its bytes: places in the tree and in lists, and the allocator's.
const ENTRY: usize = 96;

/// The order of lists: by key, then by kind.
type Place = (SeriesKey, Kind);

/// The number of this agent.
const OURS: u32 = 0;

/// An agent's total of a series.
#[derive(Debug)]
struct Entry {
    agent: u32,
    /// The transaction of its agent that wrote it.
    revision: u64,
    /// When it was updated last, in milliseconds since the epoch.
    update_ms: u64,
    /// The partition where it stands.
    partition: i32,
    /// As in the topic; empty for this agent's own.
    record: Box<[u8]>,
}

/// One state of the topic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stated<'r> {
    pub(super) revision: u64,
    pub(super) update_ms: u64,
    pub(super) partition: i32,
    pub(super) record: &'r [u8],
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    series: BTreeMap<Place, Vec<Entry>>,
    agents: Vec<String>,
    numbers: HashMap<String, u32>,
    bytes: usize,
    bytes_max: usize,
    /// Whether something did not fit.
    is_partial: bool,
}

impl Table {
    pub(super) fn new(agent: String, bytes_max: usize) -> Self {
        let numbers = HashMap::from([(agent.clone(), OURS)]);
        Self { series: BTreeMap::new(), agents: vec![agent], numbers, bytes: 0, bytes_max, is_partial: false }
    }

    /// Forgets all, to be filled from the beginning of the topic.
    pub(super) fn clear(&mut self) {
        self.series.clear();
        (self.bytes, self.is_partial) = (0, false);
    }

    /// Whether everything fitted.
    pub(super) fn is_whole(&self) -> bool {
        !self.is_partial
    }

    fn number(&mut self, agent: &str) -> u32 {
        if let Some(number) = self.numbers.get(agent) {
            return *number;
        }
        let number = self.agents.len() as u32;
        self.agents.push(agent.to_owned());
        self.numbers.insert(agent.to_owned(), number);
        number
    }

    /// Takes an agent's total, unless a later one of it is there.
    pub(super) fn put(&mut self, agent: &str, id: &SeriesId, stated: Stated<'_>) {
        let number = self.number(agent);
        let Stated { revision, update_ms, partition, record } = stated;
        let record: Box<[u8]> = if number == OURS { Box::default() } else { record.into() };
        let place = (id.key.clone(), id.kind);
        let old = self.series.get(&place).and_then(|entries| entries.iter().find(|entry| entry.agent == number));
        if old.is_some_and(|old| old.revision > revision && old.partition != partition) {
            // A topic that was given more partitions holds what was said before in another one.
            return;
        }
        let freed = old.map_or(0, |old| cost(&id.key, old.record.len()));
        let needed = cost(&id.key, record.len());
        if self.bytes - freed + needed > self.bytes_max {
            self.is_partial = true;
            telemetry::KAFKA_TABLE_REFUSED.counter(&[]).increment(1);
            return;
        }
        self.bytes = self.bytes - freed + needed;
        let entries = self.series.entry(place).or_default();
        let entry = Entry { agent: number, revision, update_ms, partition, record };
        match entries.iter_mut().find(|entry| entry.agent == number) {
            Some(old) => *old = entry,
            None => entries.push(entry),
        }
    }

    /// Takes an agent's total out, if it stands in this partition.
    pub(super) fn remove(&mut self, agent: &str, id: &SeriesId, partition: i32) {
        let Some(number) = self.numbers.get(agent).copied() else { return };
        self.retain(id, |entry| entry.agent != number || entry.partition != partition);
    }

    /// Takes the other agents' totals of a series out, and says whose they were and where they stand. That this agent has
    /// one in the topic stays known: it is the one to take it out there.
    pub(super) fn end_others(&mut self, id: &SeriesId) -> Vec<(String, i32)> {
        let entries = self.series.get(&(id.key.clone(), id.kind)).into_iter().flatten();
        let others = entries.filter(|entry| entry.agent != OURS);
        let ended = others.map(|entry| (self.agents[entry.agent as usize].clone(), entry.partition)).collect();
        self.retain(id, |entry| entry.agent == OURS);
        ended
    }

    fn retain(&mut self, id: &SeriesId, keep: impl Fn(&Entry) -> bool) {
        let place = (id.key.clone(), id.kind);
        let Some(entries) = self.series.get_mut(&place) else { return };
        let mut freed = 0;
        entries.retain(|entry| {
            let kept = keep(entry);
            freed += if kept { 0 } else { cost(&id.key, entry.record.len()) };
            kept
        });
        let is_empty = entries.is_empty();
        self.bytes -= freed;
        if is_empty {
            self.series.remove(&place);
        }
    }

    /// The other agents' records of a series that were updated since a moment.
    pub(super) fn others(&self, id: &SeriesId, since_ms: u64) -> Vec<Box<[u8]>> {
        let entries = self.series.get(&(id.key.clone(), id.kind)).into_iter().flatten();
        let others = entries.filter(|entry| entry.agent != OURS && entry.update_ms >= since_ms);
        others.map(|entry| entry.record.clone()).collect()
    }

    /// Whether the topic has this agent's total of a series, in this partition.
    pub(super) fn is_ours(&self, id: &SeriesId, partition: i32) -> bool {
        let entries = self.series.get(&(id.key.clone(), id.kind)).into_iter().flatten();
        entries.into_iter().any(|entry| entry.agent == OURS && entry.partition == partition)
    }

    /// Up to `limit` series behind one of them, in the order of keys, that were updated since a moment.
    pub(super) fn list(
        &self,
        after: Option<(&SeriesKey, Kind)>,
        since_ms: u64,
        limit: usize,
        shows: impl Fn(&SeriesId) -> bool,
    ) -> Vec<SeriesId> {
        let is_kept = |entries: &[Entry]| entries.iter().any(|entry| entry.update_ms >= since_ms);
        let series = self.range(after).filter(|(_, entries)| is_kept(entries));
        series.map(|((key, kind), _)| SeriesId { kind: *kind, key: key.clone() }).filter(shows).take(limit).collect()
    }

    fn range(&self, after: Option<(&SeriesKey, Kind)>) -> impl Iterator<Item = (&Place, &Vec<Entry>)> {
        let start = after.map_or(Bound::Unbounded, |(key, kind)| Bound::Excluded((key.clone(), kind)));
        self.series.range((start, Bound::Unbounded))
    }

    /// This agent's series behind a place, each with the partition where it stands, of the next few in the table; and the
    /// place to go on from.
    pub(super) fn ours(&self, after: Option<&Place>, passed_max: usize) -> (Vec<(SeriesId, i32)>, Option<Place>) {
        let mut last = None;
        let mut passed = 0;
        let mut ours = Vec::new();
        for (place, entries) in self.range(after.map(|(key, kind)| (key, *kind))).take(passed_max) {
            (last, passed) = (Some(place), passed + 1);
            let entry = entries.iter().find(|entry| entry.agent == OURS);
            ours.extend(entry.map(|e| (SeriesId { kind: place.1, key: place.0.clone() }, e.partition)));
        }
        (ours, last.filter(|_| passed == passed_max).cloned())
    }

    /// Other agents' totals that were updated last before a moment, at most so many.
    pub(super) fn older(&self, before_ms: u64, limit: usize) -> Vec<(String, SeriesId, i32)> {
        let all = self.series.iter().flat_map(|(place, entries)| entries.iter().map(move |entry| (place, entry)));
        let older = all.filter(|(_, entry)| entry.agent != OURS && entry.update_ms < before_ms).take(limit);
        let named = |((key, kind), entry): (&Place, &Entry)| {
            let id = SeriesId { kind: *kind, key: key.clone() };
            (self.agents[entry.agent as usize].clone(), id, entry.partition)
        };
        older.map(named).collect()
    }

    /// Sets the gauges.
    pub(super) fn publish(&self) {
        telemetry::KAFKA_TABLE_SERIES.gauge(&[]).set(self.series.len() as f64);
        telemetry::KAFKA_TABLE_BYTES.gauge(&[]).set(self.bytes as f64);
    }
}

fn cost(key: &SeriesKey, record: usize) -> usize {
    ENTRY + key.as_str().len() + record
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0000000000000000000000000000000a";
    const B: &str = "0000000000000000000000000000000b";

    fn id(name: &str) -> SeriesId {
        SeriesId { kind: Kind::Counter, key: SeriesKey::parse(name) }
    }

    fn stated(revision: u64, record: &[u8]) -> Stated<'_> {
        Stated { revision, update_ms: 1_000 + revision, partition: 0, record }
    }

    #[test]
    fn an_agents_later_total_replaces_its_earlier_one_and_ours_is_not_kept() {
        let mut table = Table::new(A.to_owned(), 1 << 20);
        table.put(B, &id("x"), stated(1, b"one"));
        let bytes = table.bytes;
        table.put(B, &id("x"), stated(2, b"two"));
        table.put(A, &id("x"), stated(9, b"ours"));
        assert_eq!(table.others(&id("x"), 0), [Box::from(*b"two")]);
        assert!(table.is_ours(&id("x"), 0) && !table.is_ours(&id("x"), 1));
        table.remove(A, &id("x"), 0);
        assert_eq!(table.bytes, bytes);
        assert!(table.others(&id("x"), 1_003).is_empty(), "it expired");
        assert_eq!(table.end_others(&id("x")), [(B.to_owned(), 0)]);
        assert_eq!((table.bytes, table.series.len()), (0, 0));
    }

    #[test]
    fn what_stands_in_an_older_partition_does_not_replace_what_is_newer() {
        let mut table = Table::new(A.to_owned(), 1 << 20);
        table.put(B, &id("x"), Stated { partition: 3, ..stated(5, b"new") });
        table.put(B, &id("x"), stated(4, b"old"));
        table.remove(B, &id("x"), 0);
        assert_eq!(table.others(&id("x"), 0), [Box::from(*b"new")]);
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_the_table_says_so() {
        let mut table = Table::new(A.to_owned(), 2 * (ENTRY + 4));
        table.put(B, &id("x"), stated(1, b"123"));
        assert!(table.is_whole());
        table.put(B, &id("y"), stated(2, b"1234"));
        assert!(!table.is_whole() && table.others(&id("y"), 0).is_empty());
        table.clear();
        assert!(table.is_whole());
    }

    #[test]
    fn lists_go_by_key_and_go_on_where_they_ended() {
        let mut table = Table::new(A.to_owned(), 1 << 20);
        for name in ["c", "a", "b"] {
            table.put(B, &id(name), stated(1, b"1"));
        }
        table.put(A, &id("b"), stated(1, b""));
        let first = table.list(None, 0, 2, |_| true);
        assert_eq!(first, [id("a"), id("b")]);
        assert_eq!(table.list(Some((&first[1].key, Kind::Counter)), 0, 2, |_| true), [id("c")]);
        assert!(table.list(None, 0, 9, |id| id.key.as_str() == "x").is_empty());
        let (ours, next) = table.ours(None, 2);
        assert_eq!(ours, [(id("b"), 0)]);
        assert_eq!(table.ours(next.as_ref(), 2), (vec![], None));
        assert_eq!(table.older(2_000, 1), [(B.to_owned(), id("a"), 0)]);
    }
}
