//! The file itself: made, locked, opened, opened again after an error, moved aside when it is damaged.
//!
//! redb refuses all work after an I/O error until the file is opened again, which rolls the failed transaction back; that
//! is done here, at once and then at most each second, so a full disk costs no more than the flushes that did not fit.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use redb::ReadableDatabase as _;
use redb::backends::FileBackend;

use super::salvage::{self, Damage};
use super::{AGENT, Error, OUTBOX, POSITIONS, RECEIPTS, TOTALS, locked, now_ms};

const FILE: &str = "journal.redb";
const LOCK: &str = "journal.lock";
/// Holds a byte for each start that has begun to open the file and did not end it.
const OPENING: &str = "journal.opening";
/// So many starts may end while they open the file; the next one takes it for damaged. redb reports damage as an error, but
/// should it panic, release builds abort, and nothing in this process could catch that.
const OPENINGS_MAX: usize = 2;

/// How long after an attempt to open the file again the next one is made.
const REOPEN_EVERY: Duration = Duration::from_secs(1);

/// What was found when the file was opened.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub(super) new: bool,
    pub(super) damage: Option<Damage>,
    /// The newest revision and flush that were seen in a damaged file.
    pub(super) revision: u64,
    pub(super) flush: u64,
}

/// The open file.
#[derive(Debug)]
pub(super) struct Database {
    path: PathBuf,
    cache: usize,
    open: RwLock<Option<redb::Database>>,
    reopened: Mutex<Option<Instant>>,
    /// Let go of last, when the file is closed.
    _lock: File,
}

impl Database {
    pub(super) fn open(dir: &Path, cache: usize) -> Result<(Self, Found), Error> {
        let in_dir = |error| Error::Io(dir.to_owned(), error);
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(in_dir)?;
        let lock = lock(dir)?;
        let path = dir.join(FILE);
        let mut found = Found { new: !path.exists(), ..Found::default() };
        let opening = Opening::begin(dir)?;
        let opened = if opening.failed > OPENINGS_MAX {
            Err(Unreadable::Damaged("earlier starts ended while they opened it".to_owned()))
        } else {
            open_file(&path, cache, true)
        };
        let database = match opened {
            Ok(database) => database,
            Err(Unreadable::Failed(error)) => return Err(error),
            Err(Unreadable::Damaged(cause)) => {
                let aside = dir.join(format!("{FILE}.damaged-{}", now_ms()));
                std::fs::rename(&path, &aside).map_err(in_dir)?;
                let database = open_file(&path, cache, false).map_err(|unreadable| unreadable.into_error(&path))?;
                found = salvage::copy(&aside, cause, &database)?;
                database
            }
        };
        drop(opening);
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(in_dir)?;
        let open = RwLock::new(Some(database));
        Ok((Self { path, cache, open, reopened: Mutex::default(), _lock: lock }, found))
    }

    /// The length of the file in bytes.
    pub(super) fn len(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |metadata| metadata.len())
    }

    /// Runs a read transaction.
    pub(super) fn read<T>(&self, read: impl FnOnce(&redb::ReadTransaction) -> Result<T, Error>) -> Result<T, Error> {
        read(&self.begin_read()?)
    }

    pub(super) fn begin_read(&self) -> Result<redb::ReadTransaction, Error> {
        self.with_open(|database| Ok(database.begin_read()?))
    }

    /// Runs a write transaction, durable when this returns. After an error nothing of it is in the file.
    pub(super) fn write<T>(&self, write: impl FnOnce(&redb::WriteTransaction) -> Result<T, Error>) -> Result<T, Error> {
        let result = self.with_open(|database| {
            let transaction = begin_write(database)?;
            let result = write(&transaction)?;
            transaction.commit()?;
            Ok(result)
        });
        if let Err(Error::Database(_)) = &result {
            self.reopen();
        }
        result
    }

    fn with_open<T>(&self, work: impl FnOnce(&redb::Database) -> Result<T, Error>) -> Result<T, Error> {
        let is_open = self.open.read().unwrap_or_else(PoisonError::into_inner).is_some();
        if !is_open && locked(&self.reopened).is_none_or(|at| at.elapsed() >= REOPEN_EVERY) {
            self.reopen();
        }
        match &*self.open.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => work(database),
            None => Err(Error::Closed),
        }
    }

    fn reopen(&self) {
        *locked(&self.reopened) = Some(Instant::now());
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        *open = None;
        match open_file(&self.path, self.cache, false) {
            Ok(database) => *open = Some(database),
            Err(unreadable) => {
                let error = unreadable.into_error(&self.path).counted();
                tracing::error!(%error, "the journal could not be opened again");
            }
        }
    }
}

/// Why a file could not be opened.
enum Unreadable {
    /// It is no journal, or not as it was written.
    Damaged(String),
    /// It may be intact.
    Failed(Error),
}

impl Unreadable {
    fn into_error(self, path: &Path) -> Error {
        match self {
            Self::Failed(error) => error,
            Self::Damaged(cause) => Error::Io(path.to_owned(), io::Error::new(io::ErrorKind::InvalidData, cause)),
        }
    }
}

/// Opens the file, after a check of every page's checksum where that is asked for, and makes the tables.
fn open_file(path: &Path, cache: usize, check: bool) -> Result<redb::Database, Unreadable> {
    let in_path = |error| Unreadable::Failed(Error::Io(path.to_owned(), error));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(in_path)?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(in_path)?;
    let backend = FileBackend::new(file).map_err(|error| refused(path, error.into()))?;
    let mut builder = redb::Builder::new();
    builder.set_cache_size(cache).set_check_integrity_on_open(check);
    let database = builder.create_with_backend(backend).map_err(|error| refused(path, error.into()))?;
    make_tables(&database).map_err(|error| refused(path, error))?;
    Ok(database)
}

/// A transaction that becomes the newest only when all of it is on the disk. So a newest one that can't be read is damage,
/// and what the others hold is copied from the file; in one phase it may be a commit that was cut off, and the database
/// would go back to the one before without a word, whose every change would be lost.
pub(super) fn begin_write(database: &redb::Database) -> Result<redb::WriteTransaction, redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_two_phase_commit(true);
    Ok(transaction)
}

fn make_tables(database: &redb::Database) -> Result<(), redb::Error> {
    let has_all = || -> Result<bool, redb::Error> { Ok(database.begin_read()?.list_tables()?.count() >= 5) };
    if has_all()? {
        return Ok(());
    }
    let transaction = begin_write(database)?;
    transaction.open_table(AGENT)?;
    transaction.open_table(TOTALS)?;
    transaction.open_table(OUTBOX)?;
    transaction.open_table(POSITIONS)?;
    transaction.open_table(RECEIPTS)?;
    transaction.commit()?;
    Ok(())
}

/// Tells damage from errors that another try, more space or more rights would mend.
fn refused(path: &Path, error: redb::Error) -> Unreadable {
    if let redb::Error::DatabaseAlreadyOpen = error {
        return Unreadable::Failed(Error::InUse(path.to_owned()));
    }
    if let redb::Error::Io(error) = error {
        return match is_damage(&error) {
            true => Unreadable::Damaged(error.to_string()),
            false => Unreadable::Failed(Error::Io(path.to_owned(), error)),
        };
    }
    Unreadable::Damaged(error.to_string())
}

fn is_damage(error: &io::Error) -> bool {
    // EIO is a bad sector: what can be read elsewhere in the file is worth more than a refusal to start.
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput)
        || error.raw_os_error() == Some(libc::EIO)
}

fn lock(dir: &Path) -> Result<File, Error> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|error| Error::Io(path.clone(), error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse(dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(Error::Io(path, error)),
    }
}

/// The mark of an open that has not ended; dropped when it has.
struct Opening {
    path: PathBuf,
    failed: usize,
}

impl Opening {
    fn begin(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(OPENING);
        let mut failed = Vec::new();
        match Self::mark(&path, &mut failed) {
            Ok(()) => {}
            // A full disk takes no mark, and the open needs no space.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
            Err(error) => return Err(Error::Io(path, error)),
        }
        Ok(Self { path, failed: failed.len() })
    }

    fn mark(path: &Path, failed: &mut Vec<u8>) -> io::Result<()> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        file.read_to_end(failed)?;
        file.write_all(b".")
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "could not be removed");
        }
    }
}
