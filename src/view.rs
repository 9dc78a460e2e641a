//! The figures as a reader sees them: the ledger, the journal for series that are idle, and the store that agents share.
//!
//! A read never writes, never waits for a flush and never waits for a store longer than its timeout: a store that does
//! not answer leaves the ledger's figures, marked [`Scope::Local`].

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::aggregate::ledger::{Closed, Ledger, State, Total};
use crate::aggregate::shard::SeriesId;
use crate::flush::Fold;
use crate::ingest::sources::Heard;
use crate::ingest::{Events, Rejected, Rejects, Sources};
use crate::sample::{Kind, SeriesKey};
use crate::store::journal::{self, Journal, Sizes};
#[cfg(feature = "kafka")]
use crate::store::kafka;
use crate::store::redis::{self, RedisReader, Stored};
use crate::store::{Batch, Operation, Partition, partition, ship};

/// Which agents a figure covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All that share the store; without a remote store this agent is all.
    Global,
    /// This agent alone.
    Local,
}

/// One series as a reader sees it.
#[derive(Debug, Clone)]
pub struct Metric {
    /// Its kind.
    pub kind: Kind,
    /// Its key.
    pub key: SeriesKey,
    /// All its life.
    pub total: Arc<Total>,
    /// The last closed window of this agent; none where it does not know the series from then.
    pub window: Option<Closed>,
    /// The end of the last closed window, in milliseconds since the epoch.
    pub closed_until_ms: u64,
    /// The length of a window in milliseconds.
    pub window_ms: u64,
    /// What `total` covers.
    pub scope: Scope,
}

/// Which series a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Pattern for the whole key: `*` any text, `?` one character.
    pub glob: Option<String>,
    /// Only this kind.
    pub kind: Option<Kind>,
    /// Only with all these tags; without a value any value of the tag will do.
    pub tags: Vec<(String, Option<String>)>,
}

impl Filter {
    /// What every key that is shown begins with.
    fn prefix(&self) -> &str {
        let glob = self.glob.as_deref().unwrap_or_default();
        glob.split(['*', '?']).next().unwrap_or_default()
    }

    /// Whether a series is shown.
    pub fn shows(&self, id: &SeriesId) -> bool {
        self.kind.is_none_or(|kind| kind == id.kind)
            && self.glob.as_deref().is_none_or(|glob| matches(glob.as_bytes(), id.key.as_str().as_bytes()))
            && self.tags.iter().all(|(key, value)| {
                id.key
                    .tags()
                    .any(|(k, v)| k == *key && value.as_deref().is_none_or(|value| v.as_deref() == Some(value)))
            })
    }
}

/// Whether a pattern matches a whole text. Linear in the text for each `*`, without recursion.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == text[t] => (p, t) = (p + 1, t + 1),
            Some(_) | None => match retry {
                Some((after, from)) => {
                    (p, t) = (after, from + 1);
                    retry = Some((after, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// The place in a list behind its last series: text that a client hands back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cursor {
    /// In the order of keys, as this agent lists what it has.
    Key(SeriesKey, Kind),
    /// In the order of the store's partitions.
    Store(redis::Cursor),
}

impl Cursor {
    /// The series behind which the page begins, in the order of keys.
    fn key(&self) -> Option<(&SeriesKey, Kind)> {
        match self {
            Self::Key(key, kind) => Some((key, *kind)),
            Self::Store(_) => None,
        }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key, kind) => write!(f, "{}:{key}", kind.letter()),
            Self::Store(cursor) => write!(f, "store:{cursor}"),
        }
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.split_once(':').ok_or(())? {
            ("store", cursor) => cursor.parse().map(Self::Store).map_err(|_| ()),
            (letter, key) => Kind::from_letter(letter).map(|kind| Self::Key(SeriesKey::parse(key), kind)).ok_or(()),
        }
    }
}

/// A part of a list: of this agent's series by key and kind, of a store's by partition.
#[derive(Debug, Clone)]
pub struct Page {
    /// The series.
    pub metrics: Vec<Metric>,
    /// Where the next page begins, if there is one.
    pub next: Option<Cursor>,
}

/// A store that many agents share, for reading.
#[derive(Clone)]
pub enum Remote {
    /// Redis, which adds the agents' batches up.
    Redis(Batched),
    /// Kafka, whose topic has each agent's own totals; they are at hand.
    #[cfg(feature = "kafka")]
    Kafka(kafka::Reader),
}

impl Remote {
    /// Whether it is known that it does not answer.
    fn is_away(&self) -> bool {
        match self {
            Self::Redis(remote) => remote.bell.status().away,
            #[cfg(feature = "kafka")]
            Self::Kafka(reader) => !reader.is_available(),
        }
    }

    /// Why the agent is not ready.
    fn unready(&self) -> Vec<String> {
        match self {
            Self::Redis(remote) => remote.bell.status().reasons.clone(),
            #[cfg(feature = "kafka")]
            Self::Kafka(reader) => reader.unready(),
        }
    }
}

/// A store that batches are shipped to, for reading.
#[derive(Clone)]
pub struct Batched {
    /// Reads it.
    pub reader: RedisReader,
    /// Ships to it.
    pub bell: ship::Bell,
    /// Holds what it may not have yet.
    pub journal: Arc<Journal>,
}

/// All that a reader may look at.
#[derive(Clone)]
pub struct View {
    ledger: Arc<Ledger>,
    fold: Fold,
    journal: Option<Arc<Journal>>,
    remote: Option<Remote>,
    rejects: Arc<Rejects>,
    events: Arc<Events>,
    sources: Arc<Sources>,
}

impl View {
    /// A view of a running agent.
    pub fn new(
        ledger: Arc<Ledger>,
        fold: Fold,
        journal: Option<Arc<Journal>>,
        rejects: Arc<Rejects>,
        events: Arc<Events>,
        sources: Arc<Sources>,
    ) -> Self {
        Self { ledger, fold, journal, remote: None, rejects, events, sources }
    }

    /// The same, with the figures of all agents that share a store.
    #[must_use]
    pub fn sharing(self, remote: Option<Remote>) -> Self {
        Self { remote, ..self }
    }

    /// This agent's series.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The last rejected lines, newest first.
    pub fn rejects(&self) -> Vec<Rejected> {
        self.rejects.last()
    }

    /// The last events and service checks.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The sources of most lines, at most so many, and how many there are in all.
    pub async fn sources(&self, limit: usize) -> (Vec<Heard>, usize) {
        self.fresh().await;
        self.sources.most(limit)
    }

    /// Returns when all that was accepted before the call can be read.
    pub async fn fresh(&self) {
        self.fold.fresh().await;
    }

    /// Every series under a key, or the one of a kind.
    pub async fn metrics(&self, key: &SeriesKey, kind: Option<Kind>, scope: Scope) -> Vec<Metric> {
        self.fresh().await;
        let kinds = Kind::ALL.into_iter().filter(|candidate| kind.is_none_or(|kind| kind == *candidate));
        let ids: Vec<_> = kinds.map(|kind| SeriesId { kind, key: key.clone() }).collect();
        self.figures(&ids, scope).await
    }

    /// The series a filter shows, from behind a place on, at most `limit` of them.
    pub async fn page(&self, filter: &Filter, after: Option<Cursor>, limit: usize, scope: Scope) -> Page {
        let (ids, next) = self.series(filter, after, limit, scope).await;
        Page { metrics: self.figures(&ids, scope).await, next }
    }

    /// The same without figures; the other thing is where the next page begins, if there is one.
    pub async fn series(
        &self,
        filter: &Filter,
        after: Option<Cursor>,
        limit: usize,
        scope: Scope,
    ) -> (Vec<SeriesId>, Option<Cursor>) {
        self.fresh().await;
        if let (Some(Remote::Redis(remote)), None | Some(Cursor::Store(_))) = (self.shared(scope), &after) {
            let from = after.as_ref().and_then(|after| match after {
                Cursor::Store(cursor) => Some(cursor),
                Cursor::Key(..) => None,
            });
            if let Ok((ids, next)) = self.listed_by_store(remote, filter, from, limit).await {
                return (ids, next.map(Cursor::Store));
            }
        }
        let mut ids = self.listed(filter, after.as_ref(), limit + 1);
        #[cfg(feature = "kafka")]
        if let Some(Remote::Kafka(reader)) = self.shared(scope) {
            let behind = after.as_ref().and_then(Cursor::key);
            ids.extend(reader.list(behind, limit + 1, |id| filter.shows(id)));
            ids.sort_unstable_by(|a, b| (&a.key, a.kind).cmp(&(&b.key, b.kind)));
            ids.dedup();
        }
        let more = ids.len() > limit;
        ids.truncate(limit);
        let next = ids.last().filter(|_| more).map(|id| Cursor::Key(id.key.clone(), id.kind));
        (ids, next)
    }

    /// Lets the series of a key start again from nothing on every agent, all of them or that of a kind. The answer is how
    /// many there were.
    ///
    /// # Errors
    /// [`Error::Stopping`] when the agent stops before that is kept, [`Error::Store`] when the store is away: then other
    /// agents still have the series, and nothing was done here.
    pub async fn delete(&self, key: &SeriesKey, kind: Option<Kind>) -> Result<u32, Error> {
        let metrics = self.metrics(key, kind, Scope::Global).await;
        let ids: Vec<_> = metrics.iter().map(|metric| SeriesId { kind: metric.kind, key: key.clone() }).collect();
        let count = ids.len() as u32;
        self.delete_all(ids).await.map(|()| count)
    }

    /// The same of series that are known to be there.
    ///
    /// # Errors
    /// As above; with [`Error::Store`] some may be deleted already.
    pub async fn delete_all(&self, ids: Vec<SeriesId>) -> Result<(), Error> {
        if ids.is_empty() {
            return Ok(());
        }
        if let Some(Remote::Redis(remote)) = &self.remote {
            // One request for all kinds of a key.
            for same_key in ids.chunk_by(|a, b| a.key == b.key) {
                let kinds: Vec<_> = same_key.iter().map(|id| id.kind).collect();
                let deleted = remote.reader.delete(&same_key[0].key, &kinds).await.map_err(|_| Error::Store)?;
                remote.bell.already_deleted(deleted);
            }
        }
        #[cfg(feature = "kafka")]
        if let Some(Remote::Kafka(reader)) = &self.remote {
            // It comes back to this agent by the topic, as to all others.
            return reader.delete(ids).await.map_err(|_| Error::Store);
        }
        if self.fold.delete(ids).await { Ok(()) } else { Err(Error::Stopping) }
    }

    /// How much the journal holds; none without one.
    pub fn journal(&self) -> Option<Sizes> {
        self.journal.as_ref().map(|journal| journal.sizes())
    }

    /// Up to when accepted samples are in the journal, in milliseconds since the epoch; 0 without one.
    pub fn flushed_until_ms(&self) -> u64 {
        self.fold.status().flushed_until_ms()
    }

    /// Why the agent is not ready; empty when it is.
    pub fn unready(&self) -> Vec<String> {
        let store = self.remote.iter().flat_map(Remote::unready);
        self.fold.status().problem().into_iter().chain(store).collect()
    }

    /// The figures of those of these series that there are.
    async fn figures(&self, ids: &[SeriesId], scope: Scope) -> Vec<Metric> {
        let mut series = self.states(ids);
        let mut totals = None;
        match self.shared(scope) {
            Some(Remote::Redis(remote)) => {
                let mut answer = self.global(remote, ids, &series).await;
                if matches!(answer, Err(Shortfall::Outbox)) {
                    series = self.states(ids);
                    answer = self.global(remote, ids, &series).await;
                }
                totals = answer.ok();
            }
            #[cfg(feature = "kafka")]
            Some(Remote::Kafka(reader)) => {
                let own = ids.iter().zip(&series).map(|(id, state)| (id, self.local(id, state.as_ref())));
                let global = |(id, own)| Some((reader.add_others(id, own)?, Scope::Global));
                totals = Some(own.map(global).collect());
            }
            None => {}
        }
        let scope = if self.remote.is_some() { Scope::Local } else { scope };
        let local = |(id, state): (&SeriesId, &Option<State>)| Some((self.local(id, state.as_ref())?, scope));
        let totals = totals.unwrap_or_else(|| ids.iter().zip(&series).map(local).collect());
        let found = ids.iter().zip(series).zip(totals);
        let found = found.filter_map(|(series, total)| Some((series, total?)));
        found.map(|((id, state), (total, scope))| self.metric(id, state.as_ref(), total, scope)).collect()
    }

    fn states(&self, ids: &[SeriesId]) -> Vec<Option<State>> {
        ids.iter().map(|id| self.ledger.get(id).map(|series| series.state())).collect()
    }

    /// The store, where a reader wants its figures and it is not known to be away.
    fn shared(&self, scope: Scope) -> Option<&Remote> {
        let remote = self.remote.as_ref().filter(|_| scope == Scope::Global)?;
        (!remote.is_away()).then_some(remote)
    }

    fn metric(&self, id: &SeriesId, state: Option<&State>, total: Arc<Total>, scope: Scope) -> Metric {
        let (closed_until_ms, window_ms) = (self.ledger.closed_until_ms(), self.ledger.window_ms());
        let window = state.and_then(|state| self.ledger.last_window(id.kind, state));
        Metric { kind: id.kind, key: id.key.clone(), total, window, closed_until_ms, window_ms, scope }
    }

    /// This agent's total: of the ledger, or of the journal where the series is idle. With a remote store a series that
    /// is not in the ledger may have been deleted elsewhere, and the journal knows of it later.
    fn local(&self, id: &SeriesId, state: Option<&State>) -> Option<Arc<Total>> {
        match state {
            Some(state) => Some(Arc::clone(&state.total)),
            None => self.journal.as_ref()?.total(id.kind, &id.key).map_or_else(
                |error| {
                    tracing::error!(%error, series = %id.key, "the journal could not be read");
                    None
                },
                |total| total.map(Arc::new),
            ),
        }
    }

    /// The totals of all agents: the store's, then our batches that are not in it, then what no batch carries yet; our own
    /// where the server is away that has a series.
    ///
    /// The order matters: first `states`, then the store, then the journal. What the ledger has no more as unshipped is
    /// then in the journal or the store, and what the store has is in the journal or dropped from it: so the flush of the
    /// snapshot and the sequence of the store tell of every delta where it is, and it counts once.
    async fn global(
        &self,
        remote: &Batched,
        ids: &[SeriesId],
        states: &[Option<State>],
    ) -> Result<Vec<Option<(Arc<Total>, Scope)>>, Shortfall> {
        let agent = remote.journal.agent().to_string();
        let series: Vec<_> = ids.iter().map(|id| (id.kind, id.key.clone())).collect();
        let stored = remote.reader.totals(&series, &agent).await.map_err(|_| Shortfall::Store)?;
        let snapshot = remote.journal.snapshot().map_err(|error| {
            tracing::error!(%error, "the outbox is unreadable");
            Shortfall::Outbox
        })?;
        let mut backlog = Backlog::new(&snapshot);
        let mut totals = Vec::with_capacity(ids.len());
        for ((id, state), stored) in ids.iter().zip(states).zip(stored) {
            // A hash that another program spoilt, or that is on a server that is away, is shown as this agent knows the
            // series.
            totals.push(match stored {
                Ok(stored) => {
                    let total = complete(&mut backlog, id, state.as_ref(), stored)?;
                    total.map(|total| (Arc::new(total), Scope::Global))
                }
                Err(_) => self.local(id, state.as_ref()).map(|total| (total, Scope::Local)),
            });
        }
        Ok(totals)
    }

    /// The first ids behind a place, in order, without sorting more of them than are shown.
    fn listed(&self, filter: &Filter, after: Option<&Cursor>, limit: usize) -> Vec<SeriesId> {
        let after = after.and_then(Cursor::key);
        let mut first: BinaryHeap<(SeriesKey, Kind)> = BinaryHeap::new();
        self.ledger.for_each(|series| {
            let place = (series.key(), series.kind());
            let fits = first.len() < limit || first.peek().is_some_and(|(key, kind)| place < (key, *kind));
            if after.is_none_or(|after| place > after) && fits && filter.shows(series.id()) {
                first.push((series.key().clone(), series.kind()));
                if first.len() > limit {
                    first.pop();
                }
            }
        });
        first.into_sorted_vec().into_iter().map(|(key, kind)| SeriesId { kind, key }).collect()
    }

    /// A page of the store's list, with those of our series in it that the store does not have yet.
    async fn listed_by_store(
        &self,
        remote: &Batched,
        filter: &Filter,
        from: Option<&redis::Cursor>,
        limit: usize,
    ) -> Result<(Vec<SeriesId>, Option<redis::Cursor>), redis::Error> {
        let accept = |kind, key: &SeriesKey| filter.shows(&SeriesId { kind, key: key.clone() });
        let page = remote.reader.list(from, filter.prefix(), accept, limit).await?;
        let mut places: BTreeMap<redis::Cursor, SeriesId> = BTreeMap::new();
        for (kind, key) in page.series {
            places.insert(redis::Cursor::after(kind, &key), SeriesId { kind, key });
        }
        self.ledger.for_each(|series| {
            let place = redis::Cursor::after(series.kind(), series.key());
            let is_here = from.is_none_or(|from| place > *from) && page.next.as_ref().is_none_or(|next| place <= *next);
            if is_here && filter.shows(series.id()) {
                places.entry(place).or_insert_with(|| series.id().clone());
            }
        });
        let more = page.next.is_some() || places.len() > limit;
        let shown: Vec<_> = places.into_iter().take(limit).collect();
        let next = shown.last().filter(|_| more).map(|(place, _)| place.clone());
        Ok((shown.into_iter().map(|(_, id)| id).collect(), next))
    }
}

/// How many bytes of batches one read may add to what the store has: beyond, the store is as good as away.
const BACKLOG_BYTES: usize = 8 << 20;

/// The batches that the store does not have yet, each read once for all series of an answer.
struct Backlog<'s> {
    snapshot: &'s journal::Snapshot,
    room: usize,
    read: HashMap<(Partition, u64), Vec<Batch>>,
}

impl<'s> Backlog<'s> {
    fn new(snapshot: &'s journal::Snapshot) -> Self {
        Self { snapshot, room: BACKLOG_BYTES, read: HashMap::new() }
    }

    /// What came to a series after a sequence of its partition.
    fn of(&mut self, id: &SeriesId, after: u64) -> Result<impl Iterator<Item = &Operation>, Shortfall> {
        let partition = partition(&id.key);
        let batches = match self.read.entry((partition, after)) {
            Entry::Occupied(read) => read.into_mut(),
            Entry::Vacant(place) => {
                let batches = self.snapshot.batches(partition, after, &mut self.room);
                place.insert(batches.map_err(|_| Shortfall::Outbox)?.ok_or(Shortfall::Outbox)?)
            }
        };
        let operations = batches.iter().flat_map(|batch| &batch.operations);
        Ok(operations.filter(|operation| operation.kind == id.kind && operation.key == id.key))
    }
}

/// Adds to the store's total what it does not have of us. Without anything there is no series.
fn complete(
    backlog: &mut Backlog<'_>,
    id: &SeriesId,
    state: Option<&State>,
    stored: Stored,
) -> Result<Option<Total>, Shortfall> {
    let mut total = stored.total;
    for operation in backlog.of(id, stored.sequence)? {
        let total = total.get_or_insert_with(|| Total::new(id.kind, operation.start_ms));
        total.add(&operation.delta, operation.update_ms);
    }
    let flush = backlog.snapshot.flush();
    for unshipped in state.iter().flat_map(|state| &state.unshipped).filter(|later| later.flush > flush) {
        let update_ms = state.map_or(0, |state| state.total.update_ms);
        total.get_or_insert_with(|| Total::new(id.kind, update_ms)).add(&unshipped.delta, update_ms);
    }
    Ok(total)
}

/// Why the figures of all agents can't be told.
#[derive(Debug)]
enum Shortfall {
    /// The store is away.
    Store,
    /// Batches that the store did not have when it was asked are gone since, are too large, or can't be read.
    Outbox,
}

/// Why a change through a view failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The agent is stopping.
    Stopping,
    /// The store that agents share is away.
    Store,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_keys() {
        for (pattern, text, want) in [
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*aab", "aaaaab", true),
            ("a", "ab", false),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), want, "{pattern} {text}");
        }
    }

    #[test]
    fn a_cursor_is_read_as_it_is_printed() {
        let key = SeriesKey::parse("a.b;k=v:w");
        for cursor in [Cursor::Key(key.clone(), Kind::Timer), Cursor::Store(redis::Cursor::after(Kind::Set, &key))] {
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
    }
}
