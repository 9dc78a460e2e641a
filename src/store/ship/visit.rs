//! What is done for one partition at a time: it is claimed, its batches are sent one after the other, and it is asked for
//! deletes. What goes wrong ends the visit; what was found out until then still holds.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{ALARM, Done, Name, OnDeleted, Problem, READ_BYTES, ROLLED_BACK, RolledBack, Shared, TRIES, locked};
use crate::store::journal::{Journal, Resequenced};
use crate::store::redis::{Applied, Asker, Claimed, Connection, Inherited, News, Polled};
use crate::store::{Batch, Partition, samples_of};
use crate::telemetry;

/// Where a partition stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    /// The sequence that the store has of us.
    pub(super) stored: u64,
    /// The number of the last delete that we know; `None` before the first claim.
    pub(super) seen: Option<u64>,
    /// When the store last applied something, by its clock, in milliseconds since the epoch; 0 if nothing since the last
    /// look.
    pub(super) applied_ms: u64,
    /// Whether it is ours, and nothing has happened since that would make us ask again.
    pub(super) claimed: bool,
    /// Whether the store is not, or may not be, the one that it was: what it applied before says nothing any more.
    pub(super) renewed: bool,
}

/// What the store says that it has of us in a partition.
#[derive(Debug, Clone, Copy)]
struct Stored {
    sequence: u64,
    samples: u64,
    now_ms: u64,
}

/// What the tasks need.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) connection: Connection,
    pub(super) asker: Arc<Asker>,
    /// Nonces under which a partition may still be ours.
    pub(super) known: Arc<Vec<String>>,
    pub(super) journal: Arc<Journal>,
    pub(super) on_deleted: OnDeleted,
    pub(super) shared: Arc<Shared>,
    pub(super) rolled_back: Arc<Mutex<Option<RolledBack>>>,
}

impl Session {
    /// Does what there is to do for a partition. Where it stands then holds also after a problem.
    pub(super) async fn visit(self, partition: Partition, server: Name, mut place: Place, poll: bool) -> Done {
        let outcome = self.attend(partition, &mut place, poll).await;
        place.claimed = outcome.is_ok();
        Done::Visited { partition, server, place, outcome }
    }

    async fn attend(&self, partition: Partition, place: &mut Place, poll: bool) -> Result<(), Problem> {
        if !place.claimed {
            self.claim(partition, place).await?;
        }
        self.ship(partition, place).await?;
        if poll {
            self.poll(partition, place).await?;
            self.ship(partition, place).await?;
        }
        Ok(())
    }

    /// Makes a partition ours and finds out where it stands.
    async fn claim(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        let (maker, last) = self.journal.inherited(partition);
        let inherited = Inherited { maker, last };
        match self.connection.claim(&self.asker, partition, place.seen, &self.known, &inherited).await? {
            Claimed::Ours { sequence, samples, seen, news } => {
                place.seen = Some(seen);
                let now_ms = news.now_ms;
                self.hear(place, news);
                self.resume(partition, place, Stored { sequence, samples, now_ms }).await
            }
            Claimed::Clone(inherited) => Err(Problem::Clone(inherited)),
        }
    }

    /// Goes on from the sequence that the store has.
    async fn resume(&self, partition: Partition, place: &mut Place, stored: Stored) -> Result<(), Problem> {
        let Stored { sequence: stored, samples, now_ms } = stored;
        (place.stored, place.applied_ms, place.renewed) = (stored, now_ms, true);
        match self.journal.resequence(partition, stored, samples)? {
            Resequenced::Continues => Ok(()),
            Resequenced::JournalBehind => {
                tracing::warn!(partition, stored, "the store has batches that this journal, an older copy, never sent");
                Ok(())
            }
            Resequenced::StoreBehind { lost, samples } => self.leap(partition, place, lost, samples).await,
        }
    }

    /// Brings a store that lost batches that nobody has any more to where the outbox begins.
    async fn leap(&self, partition: Partition, place: &mut Place, lost: u64, samples: u64) -> Result<(), Problem> {
        let sequence = place.stored + lost;
        // Counted before it is so: an answer that does not come must not hide it, and counts nothing twice.
        let lost = self.journal.write_off(partition, place.stored, samples);
        self.count_lost(partition, lost, samples);
        let empty = Batch { partition, sequence, flush: 0, samples: 0, operations: Vec::new() };
        match self.connection.apply(&self.asker, &empty, place.stored, place.seen.unwrap_or(0)).await? {
            Applied::Stored { sequence, news, .. } => {
                place.stored = sequence;
                self.hear(place, news);
            }
            Applied::Gap { .. } | Applied::NotOwner => return Err(Problem::Restless),
        }
        Ok(())
    }

    /// Counts what the store lost.
    fn count_lost(&self, partition: Partition, lost: u64, samples: u64) {
        if (lost, samples) == (0, 0) {
            return;
        }
        telemetry::LOST.counter(&[ROLLED_BACK]).increment(lost);
        telemetry::LOST_SAMPLES.counter(&[ROLLED_BACK]).increment(samples);
        tracing::error!(
            partition,
            lost,
            samples,
            "the store lost batches that it had acknowledged and that are kept nowhere else"
        );
        let mut rolled_back = locked(&self.rolled_back);
        let before = rolled_back.filter(|before| before.since.elapsed() < ALARM);
        let (batches, before) = before.map_or((0, 0), |before| (before.batches, before.samples));
        *rolled_back = Some(RolledBack { since: Instant::now(), batches: batches + lost, samples: before + samples });
    }

    /// Sends a partition's batches, one after the other, until there are no more.
    async fn ship(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        let mut tries = 0;
        loop {
            let batches = self.journal.outbox(partition, place.stored, READ_BYTES)?;
            if batches.is_empty() {
                return Ok(());
            }
            for batch in &batches {
                if self.send(batch, place).await? {
                    tries = 0;
                } else {
                    tries += 1;
                    break;
                }
            }
            if tries >= TRIES {
                return Err(Problem::Restless);
            }
        }
    }

    /// Sends a batch. `false` when the store is elsewhere: then `place` says where.
    async fn send(&self, batch: &Batch, place: &mut Place) -> Result<bool, Problem> {
        let seen = place.seen.unwrap_or(0);
        match self.connection.apply(&self.asker, batch, place.stored, seen).await? {
            Applied::Stored { sequence, failed, news } => {
                for (at, failure) in &failed {
                    telemetry::LOST.counter(&[failure.reason()]).increment(1);
                    let operation = batch.operations.get(*at);
                    let samples = operation.map_or(0, |operation| samples_of(&operation.delta));
                    telemetry::LOST_SAMPLES.counter(&[failure.reason()]).increment(samples);
                    let key = operation.map_or("", |operation| operation.key.as_str());
                    tracing::warn!(
                        key,
                        samples,
                        reason = failure.reason(),
                        "the store could not apply a change of a series"
                    );
                }
                place.stored = sequence;
                place.applied_ms = place.applied_ms.max(news.now_ms);
                self.journal.acknowledge(batch.partition, sequence);
                self.hear(place, news);
                Ok(true)
            }
            Applied::Gap { sequence, samples, news } => {
                let now_ms = news.now_ms;
                self.hear(place, news);
                self.resume(batch.partition, place, Stored { sequence, samples, now_ms }).await?;
                Ok(false)
            }
            Applied::NotOwner => {
                self.claim(batch.partition, place).await?;
                Ok(false)
            }
        }
    }

    /// Asks for deletes, and whether the store still has what it had: a failover may have lost what it acknowledged.
    async fn poll(&self, partition: Partition, place: &mut Place) -> Result<(), Problem> {
        let Polled { sequence, news, .. } =
            self.connection.poll(&self.asker, partition, place.seen.unwrap_or(0)).await?;
        self.hear(place, news);
        if sequence == place.stored {
            return Ok(());
        }
        // It may not be ours any more either.
        self.claim(partition, place).await
    }

    fn hear(&self, place: &mut Place, news: News) {
        if news.expired > 0 {
            telemetry::STORE_EXPIRED.counter(&[]).increment(news.expired);
        }
        let Some(last) = news.deletes.last() else { return };
        place.seen = Some(last.number.max(place.seen.unwrap_or(0)));
        let mut own = locked(&self.shared.own);
        let others: Vec<_> = news.deletes.into_iter().filter(|deleted| !own.remove(deleted)).collect();
        drop(own);
        if !others.is_empty() {
            (self.on_deleted)(others);
        }
    }
}
