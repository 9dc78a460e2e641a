//! The agent's own file, `journal.redb`: the totals of its series, the outbox of batches for a remote store, and who it is.
//!
//! One transaction a flush, durable when it returns: what [`Journal::commit`] was given is in the file as a whole or not at
//! all, so a kill or a power loss falls between two flushes. An error leaves everything as it was, and the same changes can
//! be given again. A file that cannot be opened is moved aside and its readable records are copied; it never
//! stops a start. A second process on the same directory is refused.
//!
//! Limits: `store_expire`, `journal`, `outbox`, `batch`, `idempotency_keys`. Metrics: `tallyd_journal_*`, `tallyd_outbox_*`,
//! `tallyd_store_errors_total{store="journal"}`, `tallyd_lost_total`.

mod commit;
mod file;
mod marks;
mod outbox;
mod receipts;
mod record;
mod salvage;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use self::commit::Writing;
pub use self::commit::{Beside, Committed};
use self::file::Database;
pub use self::marks::{Newer, read_total};
use self::outbox::Queue;
pub use self::outbox::{PARTITIONS, Resequenced, Snapshot};
use self::receipts::Receipts;
use self::record::{Agent, Content, Place, Stamp};
pub use self::salvage::Damage;
use crate::aggregate::ledger::Total;
use crate::clock;
use crate::sample::{Kind, Marks, SeriesKey};
use crate::store::Partition;
use crate::telemetry;
use crate::units::{Size, Time};

/// The section `[store.embedded]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How much of the file is kept in memory.
    pub cache: Size,
}

impl Default for Config {
    fn default() -> Self {
        Self { cache: Size(64 << 20) }
    }
}

/// The rows of `[limits]` about the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// After how long without an update a total is deleted.
    pub store_expire: Time,
    /// How large the file may become; beyond it the totals that are idle longest are deleted.
    pub journal: Size,
    /// How many bytes of batches are kept; beyond it those that were never sent merge.
    pub outbox: Size,
    /// How many operations a batch has at most.
    pub batch: u32,
    /// `idempotency_keys`, which belongs to HTTP: how many receipts are kept.
    #[serde(skip)]
    pub receipts: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            store_expire: Time::secs(30 * 86_400),
            journal: Size(4 << 30),
            outbox: Size(1 << 30),
            batch: 1_000,
            receipts: 100_000,
        }
    }
}

/// Why the journal could not be opened, read or written.
#[derive(Debug)]
pub enum Error {
    /// Another process has this directory.
    InUse(PathBuf),
    /// A file or directory could not be made, opened, locked or moved.
    Io(PathBuf, io::Error),
    /// The database failed; what was committed before is as it was.
    Database(Box<redb::Error>),
    /// The file could not be opened again after an error.
    Closed,
    /// A record could not be encoded.
    Record,
}

impl Error {
    /// The exit code of a start that failed so, after sysexits.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InUse(_) => 69,
            Self::Io(_, error) if error.kind() == io::ErrorKind::PermissionDenied => 77,
            Self::Io(_, error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => 77,
            Self::Io(..) | Self::Database(_) | Self::Closed | Self::Record => 74,
        }
    }

    /// The label of `tallyd_store_errors_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InUse(_) => "in_use",
            Self::Io(_, error) => Self::reason_of(error),
            Self::Database(error) => Self::reason_of_database(error),
            Self::Closed => "closed",
            Self::Record => "record",
        }
    }

    fn reason_of_database(error: &redb::Error) -> &'static str {
        if let redb::Error::Io(error) = error {
            return Self::reason_of(error);
        }
        if let redb::Error::Corrupted(_) = error { "corrupt" } else { "database" }
    }

    fn reason_of(error: &io::Error) -> &'static str {
        if error.kind() == io::ErrorKind::StorageFull { "no_space" } else { "io" }
    }

    fn counted(self) -> Self {
        telemetry::STORE_ERRORS.counter(&["journal", self.reason()]).increment(1);
        self
    }
}

/// The reasons in `tallyd_store_errors_total` of a journal that is open.
const REASONS: [&str; 8] =
    ["io", "no_space", "corrupt", "database", "closed", "record", "damaged_record", "moved_aside"];

impl<E: Into<redb::Error>> From<E> for Error {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse(dir) => {
                write!(f, "state_dir = {dir:?}: in use by another process; stop it or set another state_dir")
            }
            Self::Io(path, error) => {
                let remedy = if error.kind() == io::ErrorKind::PermissionDenied {
                    "let this user write there, or set another state_dir"
                } else if error.kind() == io::ErrorKind::StorageFull {
                    "make room there"
                } else {
                    "mend that, or set another state_dir"
                };
                write!(f, "state_dir: {}: {error}; {remedy}", path.display())
            }
            Self::Database(error) => write!(f, "{error}"),
            Self::Closed => write!(f, "the file could not be opened again after an error"),
            Self::Record => write!(f, "a record could not be encoded"),
        }
    }
}

impl std::error::Error for Error {}

/// Who an agent is in a store that it shares with others: 128 random bits, kept for ever.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AgentId([u8; 16]);

impl AgentId {
    fn mint() -> Result<Self, Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| Error::Io(PathBuf::from("getrandom"), io::Error::other(error)))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What was found when the journal was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Who we are.
    pub agent: AgentId,
    /// Whether there was no journal before.
    pub new: bool,
    /// What happened to a file that could not be opened.
    pub damage: Option<Damage>,
    /// How many totals there are.
    pub totals: u64,
    /// How many batches the outbox holds.
    pub batches: u64,
}

/// How much the journal holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// The length of the file in bytes.
    pub file: u64,
    /// How many totals there are.
    pub totals: u64,
    /// The bytes of their records.
    pub totals_bytes: u64,
    /// How many batches the outbox holds.
    pub batches: u64,
    /// The bytes of their records.
    pub outbox_bytes: u64,
    /// How many of them the store has not acknowledged.
    pub unacknowledged: u64,
    /// The samples in those.
    pub unacknowledged_samples: u64,
}

/// `agent` under one key, marks under another.
const AGENT: TableDefinition<'_, u8, &[u8]> = TableDefinition::new("agent");
/// Totals by the hash of kind and key.
const TOTALS: TableDefinition<'_, &Place, &[u8]> = TableDefinition::new("totals");
/// Batches by partition and sequence.
const OUTBOX: TableDefinition<'_, (Partition, u64), &[u8]> = TableDefinition::new("outbox");
/// What requests were told under their keys, by a rising number.
const RECEIPTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("receipts");
/// Where each partition's outbox stands.
const POSITIONS: TableDefinition<'_, Partition, &[u8]> = TableDefinition::new("positions");

/// The most owner nonces that are kept; a start adds one, and a claim of all partitions leaves one.
const OWNERS_MAX: usize = 1_024;

/// What is committed.
#[derive(Debug, Clone)]
struct State {
    agent: Agent,
    /// The number of the last transaction.
    revision: u64,
    totals: u64,
    totals_bytes: u64,
    queues: Vec<Queue>,
    marks: Marks,
    /// The newest owner nonce when the journal was opened, of the name that the agent had then.
    maker: String,
}

/// The open journal. Its methods may be called from any thread.
#[derive(Debug)]
pub struct Journal {
    limits: Limits,
    with_outbox: bool,
    database: Database,
    /// Held for the length of a write transaction; `state` never is.
    writing: Mutex<Writing>,
    state: Mutex<State>,
    /// Marks that the next commit takes along.
    noted: Mutex<Marks>,
    /// Series whose totals expired, for whoever asked to be told.
    expired: Mutex<Option<Vec<(Kind, SeriesKey)>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked while it held the lock left what was committed: `state` is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    /// Opens the journal of a state directory, and makes both where there is none. Damage is repaired or moved aside, and
    /// reported. Without `with_outbox` batches are neither written nor dropped.
    ///
    /// # Errors
    /// When another process has the directory, or it cannot be made, read or written.
    pub fn open(dir: &Path, config: &Config, limits: &Limits, with_outbox: bool) -> Result<(Self, Opened), Error> {
        telemetry::STORE_ERRORS.begin(REASONS.map(|reason| ["journal", reason]));
        telemetry::LOST.begin([["journal_damaged"]]);
        telemetry::LOST_SAMPLES.begin([["journal_damaged"]]);
        let (database, found) = Database::open(dir, config.cache.bytes())?;
        let (state, minted) = State::load(&database, &found)?;
        let opened = Opened {
            agent: state.agent.id,
            new: found.new,
            damage: found.damage,
            totals: state.totals,
            batches: state.queues.iter().map(Queue::held).sum(),
        };
        let writing = Mutex::new(Writing::after(database.read(Receipts::load)?));
        let (limits, state) = (limits.clone(), Mutex::new(state));
        let (noted, expired) = (Mutex::default(), Mutex::default());
        let journal = Self { limits, with_outbox, database, writing, state, noted, expired };
        if minted && opened.batches > 0 {
            // The name was in a damaged record; the batches are still ours.
            journal.rename(opened.agent, |_, queue| queue.dropped)?;
        }
        journal.publish();
        Ok((journal, opened))
    }

    /// Who we are.
    pub fn agent(&self) -> AgentId {
        locked(&self.state).agent.id
    }

    /// The number of the last flush that is in the journal; 0 before the first.
    pub fn last_flush(&self) -> u64 {
        locked(&self.state).agent.flush
    }

    /// The owner nonces that a store may still hold for us, oldest first.
    pub fn owners(&self) -> Vec<String> {
        locked(&self.state).agent.owners.clone()
    }

    /// Keeps a nonce before it is used in a claim.
    ///
    /// # Errors
    /// When it could not be written; then it must not be used.
    pub fn push_owner(&self, nonce: &str) -> Result<(), Error> {
        self.change_agent(|agent| {
            agent.owners.push(nonce.to_owned());
            let surplus = agent.owners.len().saturating_sub(OWNERS_MAX);
            agent.owners.drain(..surplus);
        })
    }

    /// Forgets all owner nonces but the newest, because all partitions are claimed with it.
    ///
    /// # Errors
    /// When it could not be written.
    pub fn prune_owners(&self) -> Result<(), Error> {
        self.change_agent(|agent| {
            let older = agent.owners.len().saturating_sub(1);
            agent.owners.drain(..older);
        })
    }

    fn change_agent(&self, change: impl FnOnce(&mut Agent)) -> Result<(), Error> {
        let writing = locked(&self.writing);
        let (mut agent, revision) = {
            let state = locked(&self.state);
            (state.agent.clone(), state.revision + 1)
        };
        change(&mut agent);
        self.database.write(|transaction| put_agent(transaction, revision, &agent)).map_err(Error::counted)?;
        let mut state = locked(&self.state);
        state.agent = agent;
        state.revision = revision;
        drop(writing);
        Ok(())
    }

    /// Shows every total, in no order. Damaged records are left out and counted.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn totals(&self, mut each: impl FnMut(Kind, SeriesKey, Total)) -> Result<(), Error> {
        let show = |transaction: &redb::ReadTransaction| {
            for entry in transaction.open_table(TOTALS)?.iter()? {
                let (_, value) = entry?;
                match record::read_total(value.value()) {
                    Some((kind, key, total)) => each(kind, SeriesKey::from_canonical(key), total),
                    None => count_damaged("total"),
                }
            }
            Ok(())
        };
        self.database.read(show).map_err(Error::counted)
    }

    /// The total of one series.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn total(&self, kind: Kind, key: &SeriesKey) -> Result<Option<Total>, Error> {
        let look = |transaction: &redb::ReadTransaction| {
            let table = transaction.open_table(TOTALS)?;
            let Some(value) = table.get(&record::place(kind, key.as_str()))? else { return Ok(None) };
            let Some((found_kind, found_key, total)) = record::read_total(value.value()) else {
                count_damaged("total");
                return Ok(None);
            };
            Ok((found_kind == kind && found_key == key.as_str()).then_some(total))
        };
        self.database.read(look).map_err(Error::counted)
    }

    /// How much the journal holds.
    pub fn sizes(&self) -> Sizes {
        let file = self.database.len();
        let state = locked(&self.state);
        Sizes {
            file,
            totals: state.totals,
            totals_bytes: state.totals_bytes,
            batches: state.queues.iter().map(Queue::held).sum(),
            outbox_bytes: state.queues.iter().map(Queue::bytes).sum(),
            unacknowledged: state.queues.iter().map(Queue::unacknowledged).sum(),
            unacknowledged_samples: state.queues.iter().map(Queue::unacknowledged_samples).sum(),
        }
    }

    /// Sets the gauges.
    fn publish(&self) {
        let sizes = self.sizes();
        telemetry::JOURNAL_BYTES.gauge(&[]).set(sizes.file as f64);
        if self.with_outbox {
            telemetry::OUTBOX_BATCHES.gauge(&[]).set(sizes.batches as f64);
            telemetry::OUTBOX_BYTES.gauge(&[]).set(sizes.outbox_bytes as f64);
            telemetry::OUTBOX_UNSENT.gauge(&[]).set(sizes.unacknowledged as f64);
            telemetry::OUTBOX_UNSENT_SAMPLES.gauge(&[]).set(sizes.unacknowledged_samples as f64);
        }
    }
}

fn count_damaged(what: &'static str) {
    telemetry::STORE_ERRORS.counter(&["journal", "damaged_record"]).increment(1);
    tracing::warn!(what, "a damaged record of the journal was left out");
}

fn put_agent(transaction: &redb::WriteTransaction, revision: u64, agent: &Agent) -> Result<(), Error> {
    let mut out = Vec::new();
    record::write(&mut out, Stamp { content: Content::Agent, revision }, |out| record::put(out, agent))?;
    transaction.open_table(AGENT)?.insert(0, out.as_slice())?;
    Ok(())
}

impl State {
    /// Reads back what is committed, and mints an agent where there is none: then the second answer is `true`.
    fn load(database: &Database, found: &file::Found) -> Result<(Self, bool), Error> {
        let kept = database.read(|transaction| {
            let table = transaction.open_table(AGENT)?;
            Ok(table.get(0)?.and_then(|value| record::read_agent(value.value())))
        })?;
        let (queues, newest) = database.read(outbox::load)?;
        let (totals, totals_bytes) = database.read(|transaction| {
            let mut sums = (0, 0);
            for entry in transaction.open_table(TOTALS)?.iter()? {
                sums = (sums.0 + 1, sums.1 + entry?.1.value().len() as u64);
            }
            Ok(sums)
        })?;
        let mut revision = newest.max(found.revision);
        let minted = kept.is_none();
        let agent = match kept {
            Some((written, agent)) => {
                revision = revision.max(written);
                Agent { flush: agent.flush.max(found.flush), ..agent }
            }
            None => {
                revision += 1;
                let agent = Agent { id: AgentId::mint()?, flush: found.flush, owners: Vec::new() };
                database.write(|transaction| put_agent(transaction, revision, &agent))?;
                agent
            }
        };
        let marks = database.read(marks::load)?;
        let maker = agent.owners.last().cloned().unwrap_or_default();
        Ok((Self { agent, revision, totals, totals_bytes, queues, marks, maker }, minted))
    }
}

/// Now, for the name of a file that is moved aside.
fn now_ms() -> u64 {
    clock::wall_ms()
}
