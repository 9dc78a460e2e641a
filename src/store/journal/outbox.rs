//! The outbox: the batches of each partition that a remote store has not made safe yet, and how far each has come.
//!
//! A partition's batches are numbered without gaps: `dropped + 1 ..= last`. What [`Journal::outbox`] hands out is marked as
//! sent in the file first, and a batch that is marked never changes again: it may have been applied although no answer
//! came. Those behind the mark have been seen by nobody, so they can merge and take new numbers; a store sees no gap.
//!
//! The methods here are called by the shipping thread while flushes go on. [`Journal::acknowledge`] and [`Journal::stable`]
//! only tell; the next commit writes it down and drops the batches.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use redb::{ReadTransaction, ReadableTable, Table, WriteTransaction};

use super::record::{self, Content, Position, Stamp};
use super::{AGENT, AgentId, Error, Journal, OUTBOX, POSITIONS, count_damaged, locked, put_agent};
use crate::store::{Batch, Partition};
use crate::telemetry;

/// How many partitions there are.
pub const PARTITIONS: usize = 256;

/// So many batches behind the acknowledged one are marked as sent in one go.
const MARK_AHEAD: u64 = 16;

/// What is known of a batch without reading it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    /// The bytes of its record.
    pub(super) bytes: u32,
    pub(super) samples: u32,
}

/// One partition's batches.
#[derive(Debug, Clone, Default)]
pub(super) struct Queue {
    /// The last number whose batch is gone.
    pub(super) dropped: u64,
    /// The samples in those that are gone, under the agent's present name, but for those that the store lost since.
    pub(super) gone_samples: u64,
    /// Up to here what the store lost is counted as lost, in this process.
    pub(super) written_off: u64,
    /// Each record from `dropped + 1` on; zeros for one that is damaged or missing.
    pub(super) sizes: VecDeque<Size>,
    /// The store has applied up to here. This and `stable` are told at any time; all else changes by transactions.
    pub(super) acknowledged: u64,
    /// The store will not lose what it has applied up to here.
    pub(super) stable: u64,
    /// Up to here a batch may have left this machine.
    pub(super) sent: u64,
    /// Up to here batches were there when the journal was opened, so a copy of the journal may hold them as well.
    pub(super) inherited: u64,
    /// The last number when the journal was opened. Merges may make `inherited` less than that, but not what another copy
    /// has.
    pub(super) opened: u64,
    /// Whether the store named its sequence since the journal was opened.
    pub(super) claimed: bool,
    /// The bytes that a merge left last; it is tried again when they have doubled.
    pub(super) merged_bytes: u64,
    /// What the file says.
    pub(super) written: Position,
}

impl Queue {
    /// The number of the last batch.
    pub(super) fn last(&self) -> u64 {
        self.dropped + self.sizes.len() as u64
    }

    /// How many batches there are.
    pub(super) fn held(&self) -> u64 {
        self.sizes.len() as u64
    }

    /// Their bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.sizes.iter().map(|size| u64::from(size.bytes)).sum()
    }

    /// How many of them the store has not acknowledged.
    pub(super) fn unacknowledged(&self) -> u64 {
        self.last() - self.acknowledged.clamp(self.dropped, self.last())
    }

    /// The samples in those.
    pub(super) fn unacknowledged_samples(&self) -> u64 {
        self.sizes.iter().rev().take(self.unacknowledged() as usize).map(|size| u64::from(size.samples)).sum()
    }

    /// How many were never sent.
    pub(super) fn unsent(&self) -> u64 {
        self.last() - self.sent.clamp(self.dropped, self.last())
    }

    /// The bytes of those that were never sent.
    pub(super) fn unsent_bytes(&self) -> u64 {
        self.sizes.iter().rev().take(self.unsent() as usize).map(|size| u64::from(size.bytes)).sum()
    }

    pub(super) fn position(&self) -> Position {
        Position {
            dropped: self.dropped,
            last: self.last(),
            acknowledged: self.acknowledged,
            sent: self.sent,
            samples: self.gone_samples,
        }
    }

    /// The first number that may still change.
    pub(super) fn first_unsent(&self) -> u64 {
        self.sent.max(self.dropped) + 1
    }

    /// The batches after a sequence that are there and marked as sent.
    fn after(&self, after: u64) -> RangeInclusive<u64> {
        after.max(self.dropped) + 1..=self.sent
    }

    /// The same, unless there are only others.
    fn marked(&self, after: u64) -> Option<RangeInclusive<u64>> {
        let marked = self.after(after);
        (!marked.is_empty() || *marked.start() > self.last()).then_some(marked)
    }

    /// How far a shipper that has come to `from` may go once that is marked.
    fn mark_from(&self, from: u64) -> u64 {
        self.last().min(from + MARK_AHEAD)
    }
}

/// How the sequence that a store named fits the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resequenced {
    /// The next batch is in the outbox, or still to come.
    Continues,
    /// The store lost batches that the outbox does not hold any more: go on from its first.
    StoreBehind {
        /// How many batches are lost.
        lost: u64,
        /// How many samples were in them.
        samples: u64,
    },
    /// The store has batches that this journal never sent, so it is an older copy. What was never sent got new numbers.
    JournalBehind,
}

/// What was in the journal at one moment.
pub struct Snapshot {
    transaction: ReadTransaction,
    flush: u64,
}

impl Snapshot {
    /// The last flush that is in it.
    pub fn flush(&self) -> u64 {
        self.flush
    }

    /// All batches of a partition after a sequence, ascending; `None` when some of them are gone, because the store has
    /// them for sure by now, or when they are larger than `room`, of which what they take is taken.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn batches(&self, partition: Partition, after: u64, room: &mut usize) -> Result<Option<Vec<Batch>>, Error> {
        let (position, _) = read_position(&self.transaction, partition)?;
        if after < position.dropped {
            return Ok(None);
        }
        let table = self.transaction.open_table(OUTBOX)?;
        let mut batches = Vec::new();
        for entry in table.range((partition, after + 1)..=(partition, position.last))? {
            let (_, value) = entry?;
            let Some(left) = room.checked_sub(value.value().len()) else { return Ok(None) };
            *room = left;
            match record::read_batch(value.value()) {
                Some(batch) => batches.push(batch),
                None => count_damaged("batch"),
            }
        }
        Ok(Some(batches))
    }
}

impl Journal {
    /// The store has applied a partition's batches up to here.
    pub fn acknowledge(&self, partition: Partition, sequence: u64) {
        let queue = &mut locked(&self.state).queues[usize::from(partition)];
        queue.acknowledged = queue.acknowledged.max(sequence.min(queue.last()));
    }

    /// The store will not lose a partition's batches up to here: the next commit drops them.
    pub fn stable(&self, partition: Partition, sequence: u64) {
        let queue = &mut locked(&self.state).queues[usize::from(partition)];
        queue.stable = queue.stable.max(sequence.min(queue.last()));
        queue.acknowledged = queue.acknowledged.max(queue.stable);
    }

    /// The store, which has batches up to `stored`, lost those from there to the first that is kept, with so many samples:
    /// it can't lose them again. Answers how many batches were not yet known to be lost.
    pub fn write_off(&self, partition: Partition, stored: u64, samples: u64) -> u64 {
        // A commit under way would take it back.
        let writing = locked(&self.writing);
        let queue = &mut locked(&self.state).queues[usize::from(partition)];
        queue.gone_samples = queue.gone_samples.saturating_sub(samples);
        let lost = queue.dropped.saturating_sub(stored.max(queue.written_off));
        queue.written_off = queue.dropped;
        drop(writing);
        lost
    }

    /// What there was when the journal was opened: the newest nonce, empty for none, and the last sequence of a partition.
    pub fn inherited(&self, partition: Partition) -> (String, u64) {
        let state = locked(&self.state);
        (state.maker.clone(), state.queues[usize::from(partition)].opened)
    }

    /// The partitions that hold batches the store has not acknowledged.
    pub fn pending(&self) -> Vec<Partition> {
        let state = locked(&self.state);
        let waits = |partition: &Partition| state.queues[usize::from(*partition)].unacknowledged() > 0;
        (0..=Partition::MAX).filter(waits).collect()
    }

    /// The batches of a partition after a sequence, ascending, up to so many bytes but at least one if there is one. They
    /// are marked as sent before this returns. In place of a damaged batch stands one without operations, counted as lost.
    ///
    /// # Errors
    /// When the file cannot be read, or the mark not written.
    pub fn outbox(&self, partition: Partition, after: u64, bytes_max: usize) -> Result<Vec<Batch>, Error> {
        let marked = self.marked(partition, after)?;
        let collect = |transaction: &ReadTransaction| {
            let table = transaction.open_table(OUTBOX)?;
            let mut batches = Vec::new();
            let mut bytes = 0;
            for sequence in marked {
                let value = table.get((partition, sequence))?;
                bytes += value.as_ref().map_or(0, |value| value.value().len());
                if bytes > bytes_max && !batches.is_empty() {
                    break;
                }
                batches.push(
                    value
                        .and_then(|value| record::read_batch(value.value()))
                        .unwrap_or_else(|| lost_batch(partition, sequence, self.samples_of(partition, sequence))),
                );
            }
            Ok(batches)
        };
        self.database.read(collect).map_err(Error::counted)
    }

    /// The samples in a batch that can't be read, as far as they were known before.
    fn samples_of(&self, partition: Partition, sequence: u64) -> u64 {
        let queue = &locked(&self.state).queues[usize::from(partition)];
        let place = sequence.checked_sub(queue.dropped + 1);
        place.and_then(|place| queue.sizes.get(place as usize)).map_or(0, |size| size.samples.into())
    }

    /// The batches after a sequence that may be handed out, with the mark raised where it is needed. All partitions are
    /// marked at once that were claimed, so that a round through them costs one transaction.
    fn marked(&self, partition: Partition, after: u64) -> Result<RangeInclusive<u64>, Error> {
        let place = usize::from(partition);
        if let Some(marked) = locked(&self.state).queues[place].marked(after) {
            return Ok(marked);
        }
        let writing = locked(&self.writing);
        let (mut queues, revision) = {
            let state = locked(&self.state);
            (state.queues.clone(), state.revision + 1)
        };
        for (at, queue) in queues.iter_mut().enumerate() {
            let from = if at == place { after.max(queue.dropped) } else { queue.acknowledged };
            // One that the store has not named a sequence for may get new numbers yet, so none of it is marked.
            if at == place || queue.claimed && queue.unsent() > 0 {
                queue.sent = queue.mark_from(from).max(queue.sent);
            }
        }
        self.write_positions(&mut queues, revision)?;
        let marked = queues[place].after(after);
        let mut state = locked(&self.state);
        state.revision = revision;
        for (queue, next) in state.queues.iter_mut().zip(queues) {
            (queue.sent, queue.written) = (next.sent, next.written);
        }
        drop(writing);
        Ok(marked)
    }

    fn write_positions(&self, queues: &mut [Queue], revision: u64) -> Result<(), Error> {
        let write = |transaction: &WriteTransaction| put_positions(transaction, revision, queues);
        self.database.write(write).map_err(Error::counted)
    }

    /// Fits the outbox to the sequence that the store names when it is claimed, and when it answers with a gap, and to the
    /// samples that it says were in the batches up to there. Whoever
    /// calls it owns the partition, so that nothing under way can still be applied.
    ///
    /// # Errors
    /// When new numbers could not be written.
    pub fn resequence(&self, partition: Partition, stored: u64, samples: u64) -> Result<Resequenced, Error> {
        let writing = locked(&self.writing);
        let (mut queue, revision) = {
            let state = locked(&self.state);
            (state.queues[usize::from(partition)].clone(), state.revision + 1)
        };
        queue.claimed = true;
        queue.acknowledged = stored.clamp(queue.dropped, queue.last());
        let result = if stored > queue.sent {
            let (opened, inherited) = (queue.opened, queue.inherited.max(stored));
            let mut moved = Queue { claimed: true, inherited, opened, ..Queue::default() };
            (moved.dropped, moved.acknowledged, moved.stable, moved.sent) = (stored, stored, stored, stored);
            moved.gone_samples = samples;
            // What was there when the journal was opened the store has from where it came from.
            let kept = queue.first_unsent().max(stored.min(opened) + 1)..=queue.last();
            let move_all = |transaction: &WriteTransaction| {
                let mut outbox = transaction.open_table(OUTBOX)?;
                moved.sizes = renumber(&mut outbox, revision, partition, kept, stored)?;
                put_position(transaction, revision, partition, &mut moved)
            };
            self.database.write(move_all).map_err(Error::counted)?;
            queue = moved;
            Resequenced::JournalBehind
        } else if stored < queue.dropped {
            let samples = queue.gone_samples.saturating_sub(samples);
            Resequenced::StoreBehind { lost: queue.dropped - stored, samples }
        } else {
            Resequenced::Continues
        };
        let mut state = locked(&self.state);
        if result == Resequenced::JournalBehind {
            state.revision = revision;
        }
        queue.stable = queue.stable.min(queue.acknowledged);
        state.queues[usize::from(partition)] = queue;
        drop(writing);
        Ok(result)
    }

    /// Takes a new name, because another agent goes by ours: this journal, or that one's, is a copy. Batches that were
    /// there when the journal was opened are dropped, since the other holds them as well, and so are those that the store
    /// has under the old name; the others are numbered from 1. `shared` says of each partition up to where the other has
    /// batches that were made since. Answers the new name, and how many batches that were not acknowledged it dropped.
    ///
    /// # Errors
    /// When it could not be written; then nothing is changed.
    pub fn mint_agent(&self, shared: &[u64; PARTITIONS]) -> Result<(AgentId, u64), Error> {
        self.rename(AgentId::mint()?, |partition, queue| {
            queue.inherited.max(queue.acknowledged).max(shared[usize::from(partition)])
        })
    }

    /// Goes on under a name of which the store has nothing: drops batches up to `shared`, and numbers the others from 1.
    pub(super) fn rename(
        &self,
        id: AgentId,
        shared: impl Fn(Partition, &Queue) -> u64,
    ) -> Result<(AgentId, u64), Error> {
        let writing = locked(&self.writing);
        let (mut agent, old, revision) = {
            let state = locked(&self.state);
            (state.agent.clone(), state.queues.clone(), state.revision + 1)
        };
        agent.id = id;
        agent.owners.clear();
        let mut queues = vec![Queue::default(); PARTITIONS];
        let mut dropped = 0;
        let rename = |transaction: &WriteTransaction| {
            let mut outbox = transaction.open_table(OUTBOX)?;
            for (partition, (old, new)) in (0..=Partition::MAX).zip(old.iter().zip(&mut queues)) {
                let shared = shared(partition, old).clamp(old.dropped, old.last());
                dropped += shared - old.acknowledged.clamp(old.dropped, shared);
                new.sizes = renumber(&mut outbox, revision, partition, shared + 1..=old.last(), 0)?;
                put_position(transaction, revision, partition, new)?;
            }
            put_agent(transaction, revision, &agent)
        };
        self.database.write(rename).map_err(Error::counted)?;
        let mut state = locked(&self.state);
        (state.agent, state.queues, state.revision) = (agent, queues, revision);
        state.maker.clear();
        drop(writing);
        Ok((id, dropped))
    }

    /// What is in the journal now: flush number and batches that belong together.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        let snapshot = || {
            let transaction = self.database.begin_read()?;
            let agent = transaction.open_table(AGENT)?.get(0)?.and_then(|value| record::read_agent(value.value()));
            let flush = agent.map_or(0, |(_, agent)| agent.flush);
            Ok(Snapshot { transaction, flush })
        };
        snapshot().map_err(Error::counted)
    }
}

fn lost_batch(partition: Partition, sequence: u64, samples: u64) -> Batch {
    count_damaged("batch");
    telemetry::LOST.counter(&["journal_damaged"]).increment(1);
    telemetry::LOST_SAMPLES.counter(&["journal_damaged"]).increment(samples);
    Batch { partition, sequence, flush: 0, samples, operations: Vec::new() }
}

/// Keeps the batches of `kept` under new numbers behind `after`, and removes all others of the partition. Answers their
/// sizes.
fn renumber(
    outbox: &mut Table<'_, (Partition, u64), &[u8]>,
    revision: u64,
    partition: Partition,
    kept: RangeInclusive<u64>,
    after: u64,
) -> Result<VecDeque<Size>, Error> {
    let mut records = Vec::new();
    for sequence in kept {
        records.push(outbox.get((partition, sequence))?.map(|value| value.value().to_vec()));
    }
    outbox.retain_in((partition, 0)..=(partition, u64::MAX), |_, _| false)?;
    let mut sizes = VecDeque::new();
    let mut out = Vec::new();
    for (sequence, old) in (after + 1..).zip(&records) {
        let parts = old.as_deref().and_then(record::read_batch_parts);
        sizes.push_back(match parts {
            Some((mut head, operations, samples)) => {
                head.sequence = sequence;
                record::write_batch(&mut out, revision, &head, operations, samples)?;
                outbox.insert((partition, sequence), out.as_slice())?;
                Size { bytes: out.len() as u32, samples }
            }
            None => Size::default(),
        });
    }
    Ok(sizes)
}

/// Writes the positions that are not as the file has them.
pub(super) fn put_positions(transaction: &WriteTransaction, revision: u64, queues: &mut [Queue]) -> Result<(), Error> {
    for (partition, queue) in (0..=Partition::MAX).zip(queues) {
        if queue.written != queue.position() {
            put_position(transaction, revision, partition, queue)?;
        }
    }
    Ok(())
}

fn put_position(
    transaction: &WriteTransaction,
    revision: u64,
    partition: Partition,
    queue: &mut Queue,
) -> Result<(), Error> {
    let position = queue.position();
    let mut out = Vec::new();
    record::write(&mut out, Stamp { content: Content::Position, revision }, |out| {
        record::put(out, &(partition, position))
    })?;
    transaction.open_table(POSITIONS)?.insert(partition, out.as_slice())?;
    queue.written = position;
    Ok(())
}

/// The position of a partition and the revision that wrote it; zeros when there is none, or it is damaged.
fn read_position(transaction: &ReadTransaction, partition: Partition) -> Result<(Position, u64), Error> {
    let table = transaction.open_table(POSITIONS)?;
    let Some(value) = table.get(partition)? else { return Ok((Position::default(), 0)) };
    let found = record::read_position(value.value());
    Ok(found.map_or((Position::default(), 0), |(revision, _, position)| (position, revision)))
}

/// Reads where each partition stands, and the newest revision that wrote one of them.
pub(super) fn load(transaction: &ReadTransaction) -> Result<(Vec<Queue>, u64), Error> {
    let mut queues = Vec::with_capacity(PARTITIONS);
    let mut newest = 0;
    let outbox = transaction.open_table(OUTBOX)?;
    for partition in 0..=Partition::MAX {
        let (written, revision) = read_position(transaction, partition)?;
        newest = newest.max(revision);
        let mut position = written;
        let mut sizes = Vec::new();
        for entry in outbox.range((partition, position.dropped + 1)..=(partition, u64::MAX))? {
            let (key, value) = entry?;
            let samples = record::read_batch_parts(value.value()).map_or(0, |(.., samples)| samples);
            sizes.push((key.value().1, Size { bytes: value.value().len() as u32, samples }));
        }
        if let (Some((first, _)), Some((last, _))) = (sizes.first(), sizes.last()) {
            if written == Position::default() {
                // The record of the position is damaged: any of the batches there are may have been sent.
                (position.dropped, position.sent) = (first - 1, *last);
            }
            position.last = position.last.max(*last);
        }
        queues.push(Queue { written, ..queue_at(&position, &sizes) });
    }
    Ok((queues, newest))
}

fn queue_at(position: &Position, sizes: &[(u64, Size)]) -> Queue {
    let mut queue = Queue {
        dropped: position.dropped,
        gone_samples: position.samples,
        sizes: std::iter::repeat_n(Size::default(), (position.last - position.dropped) as usize).collect(),
        acknowledged: position.acknowledged,
        stable: position.dropped,
        sent: position.sent,
        inherited: position.last,
        opened: position.last,
        ..Queue::default()
    };
    for (sequence, size) in sizes {
        queue.sizes[(sequence - position.dropped - 1) as usize] = *size;
    }
    queue
}
