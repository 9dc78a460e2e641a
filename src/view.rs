//! The figures as a reader sees them: the ledger, the journal for series that are idle, and the store that agents share.
//!
//! A read never writes, never waits for a flush and never waits for a store longer than its timeout: a store that does
//! not answer leaves the ledger's figures, marked [`Scope::Local`].

use std::collections::BinaryHeap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::aggregate::ledger::{Ledger, Series, Total};
use crate::aggregate::shard::SeriesId;
use crate::aggregate::window::Window;
use crate::flush::Fold;
use crate::ingest::{Rejected, Rejects};
use crate::sample::{Kind, SeriesKey};
use crate::store::journal::Journal;

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
    /// The last closed window of this agent, if anything came into it.
    pub window: Option<Arc<Window>>,
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
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    key: SeriesKey,
    kind: Kind,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.letter(), self.key)
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (letter, key) = text.split_once(':').ok_or(())?;
        Ok(Self { kind: Kind::from_letter(letter).ok_or(())?, key: SeriesKey::parse(key) })
    }
}

/// A part of a list, ordered by key and kind.
#[derive(Debug, Clone)]
pub struct Page {
    /// The series.
    pub metrics: Vec<Metric>,
    /// Where the next page begins, if there is one.
    pub next: Option<Cursor>,
}

/// All that a reader may look at.
#[derive(Clone)]
pub struct View {
    ledger: Arc<Ledger>,
    fold: Fold,
    journal: Option<Arc<Journal>>,
    rejects: Arc<Rejects>,
}

impl View {
    /// A view of a running agent.
    pub fn new(ledger: Arc<Ledger>, fold: Fold, journal: Option<Arc<Journal>>, rejects: Arc<Rejects>) -> Self {
        Self { ledger, fold, journal, rejects }
    }

    /// This agent's series.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The last rejected lines, newest first.
    pub fn rejects(&self) -> Vec<Rejected> {
        self.rejects.last()
    }

    /// Returns when all that was accepted before the call can be read.
    pub async fn fresh(&self) {
        self.fold.fresh().await;
    }

    /// Every series under a key, or the one of a kind.
    pub async fn metrics(&self, key: &SeriesKey, kind: Option<Kind>, scope: Scope) -> Vec<Metric> {
        self.fresh().await;
        let kinds = Kind::ALL.into_iter().filter(|candidate| kind.is_none_or(|kind| kind == *candidate));
        let ids = kinds.map(|kind| SeriesId { kind, key: key.clone() });
        let mut found = Vec::new();
        for id in ids {
            found.extend(self.metric(&id, scope).await);
        }
        found
    }

    /// The series a filter shows, from behind a place on, at most `limit` of them.
    pub async fn page(&self, filter: &Filter, after: Option<Cursor>, limit: usize, scope: Scope) -> Page {
        self.fresh().await;
        let mut ids = self.listed(filter, after.as_ref(), limit + 1);
        let more = ids.len() > limit;
        ids.truncate(limit);
        let next = if more { ids.last().map(|id| Cursor { key: id.key.clone(), kind: id.kind }) } else { None };
        let mut metrics = Vec::with_capacity(ids.len());
        for id in &ids {
            metrics.extend(self.metric(id, scope).await);
        }
        Page { metrics, next }
    }

    /// Lets the series of a key start again from nothing, all of them or that of a kind.
    ///
    /// # Errors
    /// [`Error::Stopping`] when the agent stops before that is kept.
    pub async fn delete(&self, key: &SeriesKey, kind: Option<Kind>) -> Result<u32, Error> {
        let found = self.metrics(key, kind, Scope::Global).await;
        if found.is_empty() {
            return Ok(0);
        }
        let ids: Vec<_> = found.into_iter().map(|metric| SeriesId { kind: metric.kind, key: metric.key }).collect();
        let count = ids.len() as u32;
        if self.fold.delete(ids).await { Ok(count) } else { Err(Error::Stopping) }
    }

    /// Why the agent is not ready; empty when it is.
    pub fn unready(&self) -> Vec<String> {
        self.fold.status().problem().into_iter().collect()
    }

    async fn metric(&self, id: &SeriesId, scope: Scope) -> Option<Metric> {
        let series = self.ledger.get(id);
        let (total, window) = match &series {
            Some(series) => self.figures(series),
            None => (Arc::new(self.kept(id)?), None),
        };
        Some(Metric {
            kind: id.kind,
            key: id.key.clone(),
            total,
            window,
            closed_until_ms: self.ledger.closed_until_ms(),
            window_ms: self.ledger.window_ms(),
            scope,
        })
    }

    fn figures(&self, series: &Series) -> (Arc<Total>, Option<Arc<Window>>) {
        let state = series.state();
        let closed = self.ledger.closed_until_ms().saturating_sub(self.ledger.window_ms());
        (Arc::clone(&state.total), state.window_at(closed).map(Arc::clone))
    }

    /// The total of a series that is idle and no longer in the ledger.
    fn kept(&self, id: &SeriesId) -> Option<Total> {
        self.journal.as_ref()?.total(id.kind, &id.key).unwrap_or_else(|error| {
            tracing::error!(%error, series = %id.key, "the journal could not be read");
            None
        })
    }

    /// The first ids behind a place, in order, without sorting more of them than are shown.
    fn listed(&self, filter: &Filter, after: Option<&Cursor>, limit: usize) -> Vec<SeriesId> {
        let mut first: BinaryHeap<(SeriesKey, Kind)> = BinaryHeap::new();
        self.ledger.for_each(|series| {
            let is_behind = after.is_none_or(|after| (series.key(), series.kind()) > (&after.key, after.kind));
            let fits = first.len() < limit
                || first.peek().is_some_and(|(key, kind)| (series.key(), series.kind()) < (key, *kind));
            if is_behind && fits && filter.shows(series.id()) {
                first.push((series.key().clone(), series.kind()));
                if first.len() > limit {
                    first.pop();
                }
            }
        });
        first.into_sorted_vec().into_iter().map(|(key, kind)| SeriesId { kind, key }).collect()
    }
}

/// Why a change through a view failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The agent is stopping.
    Stopping,
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
        let cursor = Cursor { key: SeriesKey::parse("a.b;k=v:w"), kind: Kind::Timer };
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
    }
}
