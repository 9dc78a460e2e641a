//! Reads for the JSON API, on connections of their own: one series or many with the sequence of our last batch that is
//! in them, a list of what there is, and the delete.
//!
//! Reads write nothing and wait for no flush. After a failure a server counts as away for a second, so that callers who
//! can answer from the ledger do so at once instead of waiting for a connection each.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::connection::Placed;
use super::{Config, Connection, Deleted, Error, Limits, list, number, series_of, text};
use crate::aggregate::ledger::Total;
use crate::sample::{Kind, SeriesKey};
use crate::store::{Partition, partition};

/// How long a server counts as away after a failure.
const AWAY: Duration = Duration::from_secs(1);

/// How many series one script reads: a bound on how long the server does nothing else.
const READ_AT_ONCE: usize = 100;

/// How many entries of an index one request asks for.
const SCAN_AT_ONCE: usize = 1_000;

/// What the store has of a series.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// All agents' samples; `None` when the store has none of them.
    pub total: Option<Total>,
    /// The sequence of the last batch of the asking agent that was applied then to the series' partition: what came
    /// after it is not in `total`.
    pub sequence: u64,
}

/// A place in the list of series: behind one of them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    partition: Partition,
    after: String,
}

impl Cursor {
    /// Behind a series.
    pub fn after(kind: Kind, key: &SeriesKey) -> Self {
        Self { partition: partition(key), after: format!("{}:{key}", kind.letter()) }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:03}:{}", self.partition, self.after)
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (partition, after) = text.split_once(':').ok_or(Error::Foreign)?;
        Ok(Self { partition: partition.parse().map_err(|_| Error::Foreign)?, after: after.to_owned() })
    }
}

/// A part of the list of series.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// Series in the order of the list: by partition, then by type letter and key.
    pub series: Vec<(Kind, SeriesKey)>,
    /// Where the next page begins; `None` behind the last.
    pub next: Option<Cursor>,
}

/// Reads from the store; clones share its connections.
#[derive(Debug, Clone)]
pub struct RedisReader {
    connection: Connection,
}

impl RedisReader {
    /// A reader that connects when it is first asked.
    ///
    /// # Errors
    /// When the configuration can't be used.
    pub fn new(config: &Config, limits: &Limits) -> Result<Self, Error> {
        Ok(Self { connection: Connection::new(config, limits, AWAY)? })
    }

    /// One series, at one moment with the sequence of `agent`.
    ///
    /// # Errors
    /// When the store is away, or what it holds under the key does not read.
    pub async fn total(&self, kind: Kind, key: &SeriesKey, agent: &str) -> Result<Stored, Error> {
        let mut totals = self.totals(&[(kind, key.clone())], agent).await?;
        totals.pop().unwrap_or(Err(Error::Foreign))
    }

    /// Many series, in the order asked for; those of one partition at one moment. What does not read, or is on a server
    /// that is away, is an error of its own.
    ///
    /// # Errors
    /// When all of them are away.
    pub async fn totals(&self, series: &[(Kind, SeriesKey)], agent: &str) -> Result<Vec<Result<Stored, Error>>, Error> {
        totals(&self.connection, series, agent).await
    }

    /// Up to `limit` series behind a cursor that begin with `prefix` and that `accept` takes.
    ///
    /// # Errors
    /// When the store is away.
    pub async fn list(
        &self,
        from: Option<&Cursor>,
        prefix: &str,
        accept: impl Fn(Kind, &SeriesKey) -> bool,
        limit: usize,
    ) -> Result<Page, Error> {
        page(&self.connection, from, prefix, accept, limit).await
    }

    /// Removes a key's series of these kinds for all agents. Answers those that were there; what comes after them
    /// counts as new, and the other agents hear of it with their next batch, at most 10 s later.
    ///
    /// # Errors
    /// When the store is away. Whether it removed anything is then unknown.
    pub async fn delete(&self, key: &SeriesKey, kinds: &[Kind]) -> Result<Vec<Deleted>, Error> {
        self.connection.delete(key, kinds).await
    }
}

async fn totals(
    connection: &Connection,
    series: &[(Kind, SeriesKey)],
    agent: &str,
) -> Result<Vec<Result<Stored, Error>>, Error> {
    let mut places: BTreeMap<Partition, Vec<usize>> = BTreeMap::new();
    for (place, (_, key)) in series.iter().enumerate() {
        places.entry(partition(key)).or_default().push(place);
    }
    let mut requests = tokio::task::JoinSet::new();
    for (partition, places) in &places {
        for places in places.chunks(READ_AT_ONCE) {
            let asked: Vec<_> = places.iter().map(|place| (*place, series[*place].clone())).collect();
            requests.spawn(read(connection.clone(), *partition, asked, agent.to_owned()));
        }
    }
    let mut stored: Vec<_> = series.iter().map(|_| Err(Error::Dropped)).collect();
    let (mut any, mut problem) = (requests.is_empty(), Error::Dropped);
    while let Some(answer) = requests.join_next().await {
        let (asked, answer) = answer.map_err(|_| Error::Dropped)?;
        match answer {
            Ok(totals) => {
                any = true;
                totals.into_iter().for_each(|(place, total)| stored[place] = total);
            }
            Err(error) => {
                problem = error;
                asked.into_iter().for_each(|place| stored[place] = Err(error));
            }
        }
    }
    if any { Ok(stored) } else { Err(problem) }
}

/// The answer, with the places that were asked for.
async fn read(
    connection: Connection,
    partition: Partition,
    series: Placed<(Kind, SeriesKey)>,
    agent: String,
) -> (Vec<usize>, Result<Placed<Result<Stored, Error>>, Error>) {
    let answer = connection.read(partition, &series, &agent).await;
    (series.into_iter().map(|(place, _)| place).collect(), answer)
}

async fn page(
    connection: &Connection,
    from: Option<&Cursor>,
    prefix: &str,
    accept: impl Fn(Kind, &SeriesKey) -> bool,
    limit: usize,
) -> Result<Page, Error> {
    let mut page = Page::default();
    let first = from.map_or(0, |cursor| cursor.partition);
    for partition in first..=Partition::MAX {
        let after = from.filter(|cursor| cursor.partition == partition).map_or("", |cursor| cursor.after.as_str());
        let mut members = index(connection, partition, prefix).await?;
        members.retain(|member| member.as_str() > after);
        members.sort_unstable();
        members.dedup();
        for member in members {
            let Some((kind, key)) = series_of(&member) else { continue };
            if !key.as_str().starts_with(prefix) || !accept(kind, &key) {
                continue;
            }
            if page.series.len() == limit {
                page.next = page.series.last().map(|(kind, key)| Cursor::after(*kind, key));
                return Ok(page);
            }
            page.series.push((kind, key));
        }
    }
    Ok(page)
}

/// All entries of a partition's index that may begin with a prefix, some perhaps twice. The server does little at a time.
async fn index(connection: &Connection, partition: Partition, prefix: &str) -> Result<Vec<String>, Error> {
    let pattern = (!prefix.is_empty()).then(|| format!("*:{}*", escaped(prefix)));
    let mut members = Vec::new();
    let mut cursor = 0;
    loop {
        let answer = connection.scan(partition, cursor, pattern.as_deref(), SCAN_AT_ONCE).await?;
        let Some([next, entries]) = list(&answer) else { return Err(Error::Foreign) };
        let entries = list(entries).ok_or(Error::Foreign)?;
        members.extend(entries.iter().step_by(2).filter_map(text).map(str::to_owned));
        cursor = number(next).ok_or(Error::Foreign)?;
        if cursor == 0 {
            return Ok(members);
        }
    }
}

/// A text that stands for itself in a pattern of Redis.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\' | '^') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}
