//! One flush, one transaction: totals, deletions, batches, positions, flush number; and what the bounds ask for.
//!
//! Records are inserted in the order of their places, which a B-tree likes best; each is encoded into one reused buffer.
//! Each commit also looks at the next few totals in the table and deletes those that expired, and merges batches that were
//! never sent when the outbox is past its limit, so that no single flush pays for a bound.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;
use std::sync::Arc;

use redb::{ReadableTable, Table, WriteTransaction};

use super::outbox::{Queue, Size, put_positions};
use super::receipts::Receipts;
use super::record::{self, BatchHead, OperationRef, Place};
use super::{Error, Journal, Limits, OUTBOX, State, TOTALS, count_damaged, locked, marks, put_agent};
use crate::aggregate::ledger::{Changed, Reading, Shipped};
use crate::receipt::Receipt;
use crate::sample::{Kind, Marks, SeriesKey};
use crate::store::{Batch, Operation, Partition, partition, samples_of};
use crate::telemetry;

/// The bytes of encoded operations that close a batch. An operation that is larger has a batch of its own.
const BATCH_BYTES: usize = 512 << 10;

/// How many totals a commit looks at for expiry; and how many when the journal is past its limit.
const SWEEP: usize = 256;
const SWEEP_FULL: usize = 8_192;

/// Past the journal's limit the oldest of the totals looked at go: one in so many.
const SWEEP_SHARE: usize = 4;

/// The batches of a partition that were never sent merge when there are more than this, whatever their bytes.
const UNSENT_MAX: u64 = 4_096;

/// The bytes of batches that one commit merges; it may be exceeded by one partition.
const MERGE_BYTES: u64 = 16 << 20;

/// How many stable batches a commit drops.
const DROP_MAX: u64 = 20_000;

/// What commits keep from one to the next; none of it is needed to be right, but for the receipts that are in the file.
#[derive(Debug, Default)]
pub(super) struct Writing {
    receipts: Receipts,
    out: Vec<u8>,
    operations: Vec<u8>,
    order: Vec<(Place, u32)>,
    by_partition: Vec<(Partition, u32)>,
    swept: Place,
}

/// What a commit wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Committed {
    /// Totals written.
    pub totals: u64,
    /// Batches made.
    pub batches: u64,
    /// Bytes of records written, batches and totals.
    pub bytes: u64,
    /// Batches dropped because the store will not lose them.
    pub dropped: u64,
    /// Totals deleted because they expired or the journal is past its limit.
    pub expired: u64,
    /// Batches that went into others.
    pub merged: u64,
}

/// What is written with a flush because it belongs to just the samples in it.
#[derive(Debug, Clone, Copy)]
pub struct Beside<'a> {
    /// What the requests were told whose samples it has.
    pub receipts: &'a [Receipt],
    /// How far those logs were read whose records it has.
    pub marks: &'a Marks,
}

impl Beside<'_> {
    /// Nothing.
    pub const NOTHING: Self = Self { receipts: &[], marks: &Marks::new() };
}

/// One transaction on its way: the state that will be, and what is counted.
struct Commit<'a> {
    limits: &'a Limits,
    flush: u64,
    now_ms: u64,
    state: State,
    done: Committed,
    /// Deltas that another could not take because a sum would not stay finite, and the samples in them.
    refused: (u64, u64),
    /// The series whose totals expired, where somebody is told.
    expired: Option<Vec<(Kind, SeriesKey)>>,
}

impl Journal {
    /// Writes one flush: the totals of what changed, without those of what was deleted, and the deltas as batches. Both
    /// lists may name a series; then it begins again. Durable when this returns; nothing to write, nothing written.
    ///
    /// # Errors
    /// When it could not be written. Then nothing of it is, and all of it can be given again.
    pub fn commit(
        &self,
        flush: u64,
        changed: &[Changed],
        deleted: &[(Kind, SeriesKey)],
        now_ms: u64,
    ) -> Result<Committed, Error> {
        self.commit_with(flush, changed, deleted, Beside::NOTHING, now_ms)
    }

    /// The same, with what belongs to just these samples.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub fn commit_with(
        &self,
        flush: u64,
        changed: &[Changed],
        deleted: &[(Kind, SeriesKey)],
        beside: Beside<'_>,
        now_ms: u64,
    ) -> Result<Committed, Error> {
        let mut writing = locked(&self.writing);
        let mut state = locked(&self.state).clone();
        let told = |queue: &Queue| queue.written != queue.position() || queue.stable > queue.dropped;
        let is_marked = beside.marks.iter().all(|(name, mark)| state.marks.get(name) == Some(mark));
        let nothing = changed.is_empty() && deleted.is_empty() && beside.receipts.is_empty() && is_marked;
        if nothing && !state.queues.iter().any(told) {
            return Ok(Committed::default());
        }
        let before = state.marks.clone();
        let noted = locked(&self.noted).clone();
        state.marks.extend(noted.iter().chain(beside.marks).map(|(name, mark)| (name.clone(), *mark)));
        let limits = &self.limits;
        let expired = locked(&self.expired).is_some().then(Vec::new);
        let mut commit = Commit { limits, flush, now_ms, state, done: Committed::default(), refused: (0, 0), expired };
        commit.state.revision += 1;
        commit.state.agent.flush = flush.max(commit.state.agent.flush);
        let file = self.database.len();
        let receipts = &beside.receipts[beside.receipts.len().saturating_sub(limits.receipts)..];
        let mut forgotten = 0;
        let write = |transaction: &WriteTransaction| {
            commit.put_totals(transaction, &mut writing, changed, deleted)?;
            if self.with_outbox {
                commit.put_batches(transaction, &mut writing, changed)?;
                commit.drop_stable(transaction)?;
                commit.merge_unsent(transaction, &mut writing)?;
            }
            commit.sweep(transaction, &mut writing, file)?;
            let revision = commit.state.revision;
            forgotten = writing.receipts.write(transaction, revision, receipts, now_ms, limits.receipts)?;
            put_positions(transaction, commit.state.revision, &mut commit.state.queues)?;
            if commit.state.marks != before {
                marks::put(transaction, commit.state.revision, &commit.state.marks)?;
            }
            put_agent(transaction, commit.state.revision, &commit.state.agent)
        };
        self.database.write(write).map_err(Error::counted)?;
        let done = commit.done;
        // What was noted once must not come back over what is read later.
        locked(&self.noted).retain(|name, mark| noted.get(name) != Some(mark));
        if let (Some(all), Some(expired)) = (locked(&self.expired).as_mut(), commit.expired.take()) {
            all.extend(expired);
        }
        telemetry::LOST.counter(&["non_finite"]).increment(commit.refused.0);
        telemetry::LOST_SAMPLES.counter(&["non_finite"]).increment(commit.refused.1);
        telemetry::JOURNAL_EXPIRED.counter(&[]).increment(done.expired);
        telemetry::OUTBOX_MERGED.counter(&[]).increment(done.merged);
        self.adopt(commit.state);
        writing.receipts.settle(receipts, forgotten);
        writing.forget_large();
        drop(writing);
        self.publish();
        Ok(done)
    }

    /// Takes over what is committed, but for what was told meanwhile.
    fn adopt(&self, mut committed: State) {
        let mut state = locked(&self.state);
        for (next, now) in committed.queues.iter_mut().zip(&state.queues) {
            (next.acknowledged, next.stable) = (now.acknowledged, now.stable);
        }
        *state = committed;
    }
}

impl Writing {
    /// For a file that has these receipts.
    pub(super) fn after(receipts: Receipts) -> Self {
        Self { receipts, ..Self::default() }
    }

    /// Gives back what a flush of unusual size needed.
    fn forget_large(&mut self) {
        self.out.shrink_to(1 << 20);
        self.operations.shrink_to(1 << 20);
        self.order.clear();
        self.order.shrink_to(1 << 18);
        self.by_partition.clear();
        self.by_partition.shrink_to(1 << 20);
    }
}

impl Commit<'_> {
    fn put_totals(
        &mut self,
        transaction: &WriteTransaction,
        writing: &mut Writing,
        changed: &[Changed],
        deleted: &[(Kind, SeriesKey)],
    ) -> Result<(), Error> {
        let mut table = transaction.open_table(TOTALS)?;
        for (kind, key) in deleted {
            self.remove_total(&mut table, &record::place(*kind, key.as_str()))?;
        }
        writing.order.clear();
        let places = changed.iter().map(|changed| record::place(changed.series.kind(), changed.series.key().as_str()));
        writing.order.extend(places.zip(0..));
        writing.order.sort_unstable();
        for (place, at) in &writing.order {
            let Changed { series, total, shipped } = &changed[*at as usize];
            let taken = shipped.as_ref().map(|shipped| &shipped.total).or(total.as_ref());
            let total = taken.map_or_else(|| series.total(), |total| Reading::Shared(Arc::clone(total)));
            record::write_total(&mut writing.out, self.state.revision, series.kind(), series.key(), &total)?;
            let old = table.insert(place, writing.out.as_slice())?.map(|old| old.value().len() as u64);
            self.state.totals += u64::from(old.is_none());
            self.state.totals_bytes += writing.out.len() as u64;
            self.state.totals_bytes -= old.unwrap_or(0);
            self.done.totals += 1;
            self.done.bytes += writing.out.len() as u64;
        }
        Ok(())
    }

    fn remove_total(&mut self, table: &mut Table<'_, &Place, &[u8]>, place: &Place) -> Result<bool, Error> {
        let Some(old) = table.remove(place)?.map(|old| old.value().len() as u64) else { return Ok(false) };
        self.state.totals -= 1;
        self.state.totals_bytes -= old;
        Ok(true)
    }

    /// Cuts the deltas into batches, by partition.
    fn put_batches(
        &mut self,
        transaction: &WriteTransaction,
        writing: &mut Writing,
        changed: &[Changed],
    ) -> Result<(), Error> {
        let mut order = std::mem::take(&mut writing.by_partition);
        order.clear();
        let shipped = changed.iter().zip(0..).filter(|(changed, _)| changed.shipped.is_some());
        order.extend(shipped.map(|(changed, at)| (partition(changed.series.key()), at)));
        order.sort_unstable();
        let mut table = transaction.open_table(OUTBOX)?;
        let mut batches = Cutter::new(writing, self.limits.batch);
        for same in order.chunk_by(|a, b| a.0 == b.0) {
            let head = BatchHead { partition: same[0].0, flush: self.flush, ..BatchHead::default() };
            let drained = self.queue(head.partition).is_drained();
            for (_, at) in same {
                if let Some(operation) = operation(&changed[*at as usize]) {
                    batches.add(self, &mut table, head, &operation)?;
                }
            }
            batches.close(self, &mut table, head)?;
            if drained {
                // The store has all the others: it is there, and these will be sent at once.
                let queue = self.queue(head.partition);
                queue.sent = queue.last();
            }
        }
        writing.by_partition = order;
        Ok(())
    }

    fn queue(&mut self, partition: Partition) -> &mut Queue {
        &mut self.state.queues[usize::from(partition)]
    }

    /// Drops what the store will not lose.
    fn drop_stable(&mut self, transaction: &WriteTransaction) -> Result<(), Error> {
        let mut table = transaction.open_table(OUTBOX)?;
        for partition in 0..=Partition::MAX {
            let room = DROP_MAX - self.done.dropped.min(DROP_MAX);
            let queue = self.queue(partition);
            let until = queue.stable.min(queue.last()).min(queue.dropped + room);
            if until <= queue.dropped {
                continue;
            }
            table.retain_in((partition, queue.dropped + 1)..=(partition, until), |_, _| false)?;
            let count = until - queue.dropped;
            queue.gone_samples += queue.sizes.drain(..count as usize).map(|size| u64::from(size.samples)).sum::<u64>();
            queue.dropped = until;
            self.done.dropped += count;
        }
        Ok(())
    }

    /// Merges batches that were never sent while there are too many or they are too large: the partition with most first.
    fn merge_unsent(&mut self, transaction: &WriteTransaction, writing: &mut Writing) -> Result<(), Error> {
        let mut total: u64 = self.state.queues.iter().map(Queue::bytes).sum();
        let mut read = 0;
        while read < MERGE_BYTES {
            let Some((partition, bytes)) = self.next_to_merge(total > self.limits.outbox.0) else { break };
            let left = self.merge_partition(transaction, writing, partition)?;
            total = (total + left).saturating_sub(bytes);
            read += bytes;
        }
        Ok(())
    }

    /// The partition to merge next and the bytes that were never sent of it. One that a merge has made small is left alone
    /// until it has doubled: merged again sooner, it would cost as much and give nothing.
    fn next_to_merge(&self, past_limit: bool) -> Option<(Partition, u64)> {
        let candidates = (0..=Partition::MAX).zip(&self.state.queues).filter(|(_, queue)| {
            let too_many = queue.unsent() > UNSENT_MAX;
            queue.unsent() > 1 && (too_many || past_limit && queue.unsent_bytes() >= 2 * queue.merged_bytes)
        });
        candidates.map(|(partition, queue)| (partition, queue.unsent_bytes())).max_by_key(|(_, bytes)| *bytes)
    }

    /// Merges all batches of a partition that were never sent, and answers the bytes that are left. Those that a copy of
    /// the journal may hold do not mix with those it can't hold.
    fn merge_partition(
        &mut self,
        transaction: &WriteTransaction,
        writing: &mut Writing,
        partition: Partition,
    ) -> Result<u64, Error> {
        let mut table = transaction.open_table(OUTBOX)?;
        let (first, last, inherited) = {
            let queue = self.queue(partition);
            (queue.first_unsent(), queue.last(), queue.inherited)
        };
        let older = take_merged(&mut table, partition, first, inherited.min(last))?;
        let newer = take_merged(&mut table, partition, first.max(inherited + 1), last)?;
        let queue = self.queue(partition);
        queue.sizes.truncate((first - 1 - queue.dropped) as usize);
        let mut batches = Cutter::new(writing, self.limits.batch);
        for (merged, is_older) in [(older, true), (newer, false)] {
            self.refused.0 += merged.refused.0;
            self.refused.1 += merged.refused.1;
            let head = BatchHead { partition, flush: merged.flush, ..BatchHead::default() };
            for operation in merged.operations.values() {
                batches.add(self, &mut table, head, &OperationRef::from(operation))?;
            }
            batches.close(self, &mut table, head)?;
            if is_older {
                let queue = self.queue(partition);
                queue.inherited = queue.inherited.min(queue.last());
            }
        }
        let queue = self.queue(partition);
        let bytes = queue.unsent_bytes();
        queue.merged_bytes = bytes;
        let gone = last.saturating_sub(queue.last());
        self.done.merged += gone;
        Ok(bytes)
    }

    /// Deletes totals that expired, of the next few in the table. Past the journal's limit it looks at more of them, and the
    /// oldest go although they did not expire: not the oldest of all, but no index has to be kept up for it.
    fn sweep(&mut self, transaction: &WriteTransaction, writing: &mut Writing, file: u64) -> Result<(), Error> {
        let full = self.is_full(file);
        let mut table = transaction.open_table(TOTALS)?;
        let mut seen = Vec::new();
        let mut end = true;
        for entry in table.range::<&Place>((Bound::Excluded(&writing.swept), Bound::Unbounded))? {
            let (place, value) = entry?;
            let update_ms = record::read_total_head(value.value()).map_or(0, |head| head.update_ms);
            seen.push((update_ms, *place.value()));
            if seen.len() >= if full { SWEEP_FULL } else { SWEEP } {
                end = false;
                break;
            }
        }
        writing.swept = if end { Place::default() } else { seen.last().map_or(Place::default(), |(_, place)| *place) };
        seen.sort_unstable();
        let surplus = if full { seen.len() / SWEEP_SHARE } else { 0 };
        let expire_ms = self.limits.store_expire.as_millis();
        for (at, (update_ms, place)) in seen.iter().enumerate() {
            if at >= surplus && update_ms.saturating_add(expire_ms) > self.now_ms {
                break;
            }
            if let Some(expired) = &mut self.expired
                && let Some(value) = table.get(place)?
                && let Some(head) = record::read_total_head(value.value())
            {
                expired.push((head.kind, SeriesKey::from_canonical(head.key)));
            }
            self.done.expired += u64::from(self.remove_total(&mut table, place)?);
        }
        Ok(())
    }

    /// Whether totals must go to make room. The file does not shrink by that, but what is free in it is used again, so the
    /// bytes of the records count as well: in a file that is updated all over they take about half.
    fn is_full(&self, file: u64) -> bool {
        let held = self.state.totals_bytes + self.state.queues.iter().map(Queue::bytes).sum::<u64>();
        let limit = self.limits.journal.0;
        file > limit && held > limit / 3 || held > limit / 2
    }
}

impl Queue {
    /// Whether the store has answered since the journal was opened, and has all there is.
    fn is_drained(&self) -> bool {
        self.claimed && self.acknowledged >= self.last()
    }
}

fn operation(changed: &Changed) -> Option<OperationRef<'_>> {
    changed.shipped.as_ref().map(|Shipped { total, delta }| OperationRef {
        kind: changed.series.kind(),
        key: changed.series.key(),
        start_ms: total.start_ms,
        update_ms: total.update_ms,
        delta,
        rates: total.rates.as_ref(),
    })
}

impl<'a> From<&'a Operation> for OperationRef<'a> {
    fn from(operation: &'a Operation) -> Self {
        let Operation { kind, key, start_ms, update_ms, delta, rates } = operation;
        Self { kind: *kind, key, start_ms: *start_ms, update_ms: *update_ms, delta, rates: rates.as_ref() }
    }
}

/// Cuts operations into batches and puts them behind the last of their partition.
struct Cutter<'a> {
    out: &'a mut Vec<u8>,
    operations: &'a mut Vec<u8>,
    count: u32,
    count_max: u32,
    samples: u32,
}

impl<'a> Cutter<'a> {
    fn new(writing: &'a mut Writing, count_max: u32) -> Self {
        let Writing { out, operations, .. } = writing;
        operations.clear();
        Self { out, operations, count: 0, count_max: count_max.max(1), samples: 0 }
    }

    fn add(
        &mut self,
        commit: &mut Commit<'_>,
        table: &mut Table<'_, (Partition, u64), &[u8]>,
        head: BatchHead,
        operation: &OperationRef<'_>,
    ) -> Result<(), Error> {
        let before = self.operations.len();
        record::put(self.operations, operation)?;
        if before > 0 && self.operations.len() > BATCH_BYTES {
            let last = self.operations.split_off(before);
            self.close(commit, table, head)?;
            self.operations.extend_from_slice(&last);
        }
        self.count += 1;
        self.samples = self.samples.saturating_add(u32::try_from(samples_of(operation.delta)).unwrap_or(u32::MAX));
        if self.count == self.count_max {
            self.close(commit, table, head)?;
        }
        Ok(())
    }

    fn close(
        &mut self,
        commit: &mut Commit<'_>,
        table: &mut Table<'_, (Partition, u64), &[u8]>,
        head: BatchHead,
    ) -> Result<(), Error> {
        if self.count == 0 {
            return Ok(());
        }
        let revision = commit.state.revision;
        let queue = commit.queue(head.partition);
        let head = BatchHead { sequence: queue.last() + 1, operations: self.count, ..head };
        record::write_batch(self.out, revision, &head, self.operations, self.samples)?;
        table.insert((head.partition, head.sequence), self.out.as_slice())?;
        queue.sizes.push_back(Size { bytes: self.out.len() as u32, samples: self.samples });
        commit.done.batches += 1;
        commit.done.bytes += self.out.len() as u64;
        self.operations.clear();
        (self.count, self.samples) = (0, 0);
        Ok(())
    }
}

/// The sum of some batches.
#[derive(Default)]
struct Merged {
    flush: u64,
    operations: BTreeMap<(Kind, SeriesKey), Operation>,
    refused: (u64, u64),
}

impl Merged {
    fn add(&mut self, batch: Batch) {
        self.flush = self.flush.max(batch.flush);
        for operation in batch.operations {
            match self.operations.entry((operation.kind, operation.key.clone())) {
                Entry::Occupied(sum) => {
                    let samples = samples_of(&operation.delta);
                    if !add_operation(sum.into_mut(), operation) {
                        self.refused = (self.refused.0 + 1, self.refused.1 + samples);
                    }
                }
                Entry::Vacant(place) => drop(place.insert(operation)),
            }
        }
    }
}

/// `false` when a sum would not stay finite: the later delta is left out.
fn add_operation(sum: &mut Operation, later: Operation) -> bool {
    let finite = sum.delta.merge(&later.delta, 0);
    if finite {
        sum.start_ms = sum.start_ms.min(later.start_ms);
        sum.update_ms = sum.update_ms.max(later.update_ms);
        sum.rates = later.rates;
    }
    finite
}

/// Takes batches out of the table and merges them in their order.
fn take_merged(
    table: &mut Table<'_, (Partition, u64), &[u8]>,
    partition: Partition,
    first: u64,
    last: u64,
) -> Result<Merged, Error> {
    let mut merged = Merged::default();
    for sequence in first..=last {
        match table.remove((partition, sequence))?.and_then(|value| record::read_batch(value.value())) {
            Some(batch) => merged.add(batch),
            None => {
                count_damaged("batch");
                telemetry::LOST.counter(&["journal_damaged"]).increment(1);
            }
        }
    }
    Ok(merged)
}
