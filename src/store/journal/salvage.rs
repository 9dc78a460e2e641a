//! What can be read of a file that the database refuses: records are found by their magic bytes, wherever they stand, and
//! taken when their CRC is right. Nothing of the database's own structure is needed or trusted.
//!
//! Pages that were written over since may hold older records; of one series or batch the newest counts, and a batch that
//! its partition's position has passed is left out. So nothing is counted twice, but a series that was deleted since may
//! come back.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use redb::TableDefinition;
use twox_hash::XxHash3_128;

use super::file::{Found, begin_write};
use super::marks::MARKS;
use super::record::{self, Content, HEADER, MAGIC, Place, Position};
use super::{AGENT, Error, OUTBOX, POSITIONS, RECEIPTS, TOTALS};
use crate::store::Partition;
use crate::telemetry;

/// What happened to a file that could not be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where it is now.
    pub moved_to: PathBuf,
    /// Why it could not be opened.
    pub cause: String,
    /// How many totals were copied.
    pub totals: u64,
    /// How many batches were copied.
    pub batches: u64,
    /// How many records were found whose bytes are not as they were written.
    pub damaged: u64,
}

/// How much of the file is looked at in one go.
const WINDOW: usize = 4 << 20;

/// How much is copied in one transaction.
const COPY_BYTES: usize = 64 << 20;

/// When what looked like records and was none comes to so many times the file, only small ones are still looked at: bytes
/// that imitate headers must not keep the start waiting.
const WASTE_MAX: u64 = 4;
const SMALL: usize = 64 << 10;

/// Where a record stands in the file, and the transaction that wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Location {
    revision: u64,
    offset: u64,
    length: u32,
}

/// The newest record of each thing.
#[derive(Debug, Default)]
struct Survey {
    agent: Option<(Location, u64)>,
    marks: Option<Location>,
    positions: HashMap<Partition, (Location, Position)>,
    totals: HashMap<Place, Location>,
    batches: HashMap<(Partition, u64), (Location, u64)>,
    receipts: HashMap<u128, Location>,
    damaged: u64,
}

/// Copies what can be read of a file into a new journal.
pub(super) fn copy(aside: &Path, cause: String, database: &redb::Database) -> Result<Found, Error> {
    let failed = |error| Error::Io(aside.to_owned(), error);
    let file = File::open(aside).map_err(failed)?;
    let mut survey = Survey::default();
    scan(&file, |location, record| survey.note(location, record), &mut 0).map_err(failed)?;
    let batches = survey.live_batches();
    let damage = Damage {
        moved_to: aside.to_owned(),
        cause,
        totals: survey.totals.len() as u64,
        batches: batches.len() as u64,
        damaged: survey.damaged,
    };
    telemetry::STORE_ERRORS.counter(&["journal", "moved_aside"]).increment(1);
    telemetry::STORE_ERRORS.counter(&["journal", "damaged_record"]).increment(survey.damaged);
    let found = survey.found(damage);
    copy_records(&file, database, survey, &batches)?;
    Ok(found)
}

fn copy_records(
    file: &File,
    database: &redb::Database,
    survey: Survey,
    mut batches: &[((Partition, u64), Location)],
) -> Result<(), Error> {
    let mut totals: Vec<_> = survey.totals.into_iter().collect();
    totals.sort_unstable();
    let mut totals = totals.as_slice();
    while !totals.is_empty() {
        totals = copy_some(file, database, TOTALS, totals, |place| place)?;
    }
    while !batches.is_empty() {
        batches = copy_some(file, database, OUTBOX, batches, |key| *key)?;
    }
    // In the order in which they were written.
    let mut receipts: Vec<_> = survey.receipts.into_values().collect();
    receipts.sort_unstable();
    let receipts: Vec<_> = (0_u64..).zip(receipts).collect();
    let mut receipts = receipts.as_slice();
    while !receipts.is_empty() {
        receipts = copy_some(file, database, RECEIPTS, receipts, |number| *number)?;
    }
    let positions: Vec<_> =
        survey.positions.into_iter().map(|(partition, (location, _))| (partition, location)).collect();
    copy_some(file, database, POSITIONS, &positions, |partition| *partition)?;
    let agent: Vec<_> = survey.agent.into_iter().map(|(location, _)| (0, location)).collect();
    copy_some(file, database, AGENT, &agent, |key| *key)?;
    let marks: Vec<_> = survey.marks.into_iter().map(|location| (MARKS, location)).collect();
    copy_some(file, database, AGENT, &marks, |key| *key)?;
    Ok(())
}

/// Copies records in one transaction, and answers those that are left for the next.
fn copy_some<'r, T, K: redb::Key + 'static>(
    file: &File,
    database: &redb::Database,
    table: TableDefinition<'_, K, &'static [u8]>,
    records: &'r [(T, Location)],
    key: impl Fn(&'r T) -> K::SelfType<'r>,
) -> Result<&'r [(T, Location)], Error> {
    let transaction = begin_write(database)?;
    let (mut count, mut bytes) = (0, 0);
    {
        let mut table = transaction.open_table(table)?;
        let mut record = Vec::new();
        for (at, location) in records {
            record.resize(location.length as usize, 0);
            // What cannot be read again, or not as before, is left out when it is read from the new file.
            read_up_to(file, &mut record, location.offset).map_err(redb::StorageError::Io)?;
            table.insert(key(at), record.as_slice())?;
            (count, bytes) = (count + 1, bytes + record.len());
            if bytes > COPY_BYTES {
                break;
            }
        }
    }
    transaction.commit()?;
    Ok(&records[count..])
}

impl Survey {
    fn note(&mut self, location: Location, record: &[u8]) {
        let Some((stamp, _)) = record::open(record) else {
            self.damaged += 1;
            return;
        };
        let location = Location { revision: stamp.revision, ..location };
        match stamp.content {
            Content::Agent => {
                if let Some((_, agent)) = record::read_agent(record)
                    && self.agent.is_none_or(|(old, _)| old < location)
                {
                    self.agent = Some((location, agent.flush));
                }
            }
            Content::Position => {
                if let Some((_, partition, position)) = record::read_position(record) {
                    let newest = self.positions.entry(partition).or_insert((location, position));
                    if newest.0 < location {
                        *newest = (location, position);
                    }
                }
            }
            Content::Total => {
                if let Some(place) = record::read_total_head(record).map(|head| record::place(head.kind, head.key)) {
                    let newest = self.totals.entry(place).or_insert(location);
                    *newest = location.max(*newest);
                }
            }
            Content::Receipt => {
                if let Some(receipt) = record::read_receipt(record) {
                    let newest = self.receipts.entry(XxHash3_128::oneshot(&receipt.key)).or_insert(location);
                    *newest = location.max(*newest);
                }
            }
            Content::Marks => {
                if record::read_marks(record).is_some() {
                    self.marks = self.marks.max(Some(location));
                }
            }
            Content::Batch | Content::Uncounted => {
                if let Some((head, ..)) = record::read_batch_parts(record) {
                    let newest = self.batches.entry((head.partition, head.sequence)).or_insert((location, head.flush));
                    *newest = (location, head.flush).max(*newest);
                }
            }
        }
    }

    /// The batches that the outbox held, as far as can be told: those its position names, and those written after it.
    fn live_batches(&self) -> Vec<((Partition, u64), Location)> {
        let is_live = |(partition, sequence): (Partition, u64), location: Location| {
            let Some((written, position)) = self.positions.get(&partition) else { return true };
            // Without the agent's name the store can't say what it has of us: what it acknowledged must not go again.
            let gone = if self.agent.is_some() { position.dropped } else { position.acknowledged };
            sequence > gone && (sequence <= position.last || location.revision > written.revision)
        };
        let batches = self.batches.iter().map(|(key, (location, _))| (*key, *location));
        let mut live: Vec<_> = batches.filter(|(key, location)| is_live(*key, *location)).collect();
        live.sort_unstable();
        live
    }

    fn found(&self, damage: Damage) -> Found {
        let locations = (self.agent.iter().map(|(location, _)| location))
            .chain(self.positions.values().map(|(location, _)| location))
            .chain(&self.marks)
            .chain(self.totals.values())
            .chain(self.batches.values().map(|(location, _)| location));
        Found {
            new: false,
            damage: Some(damage),
            revision: locations.map(|location| location.revision).max().unwrap_or(0),
            flush: self.batches.values().map(|(_, flush)| *flush).max().unwrap_or(0),
        }
    }
}

/// Shows every record of a file, and what has the header of one but is not as it was written.
fn scan(file: &File, mut each: impl FnMut(Location, &[u8]), wasted: &mut u64) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut window = vec![0; WINDOW];
    let mut record = Vec::new();
    let mut at = 0;
    while at + (HEADER as u64) <= length {
        let read = read_up_to(file, &mut window, at)?;
        let Some(found) = memchr::memmem::find(&window[..read], &MAGIC) else {
            // Magic bytes may begin in the last two.
            at += (read.max(3) - 2) as u64;
            continue;
        };
        at += found as u64;
        let header = window.get(found..found + HEADER).filter(|_| found + HEADER <= read);
        let Some(header) = header else {
            if found == 0 {
                break;
            }
            continue;
        };
        at += examine(file, &mut record, at, header, length, wasted, &mut each)?;
    }
    Ok(())
}

/// Looks at what may be a record, and answers how far to go on.
fn examine(
    file: &File,
    record: &mut Vec<u8>,
    at: u64,
    header: &[u8],
    length: u64,
    wasted: &mut u64,
    each: &mut impl FnMut(Location, &[u8]),
) -> io::Result<u64> {
    let end = record::span(header).map(|span| span.end).filter(|end| at + *end as u64 <= length);
    let Some(end) = end.filter(|end| *end <= SMALL || *wasted <= WASTE_MAX * length) else { return Ok(1) };
    record.resize(end, 0);
    if read_up_to(file, record, at)? < end {
        return Ok(1);
    }
    each(Location { revision: 0, offset: at, length: end as u32 }, record);
    if record::open(record).is_some() {
        return Ok(end as u64);
    }
    *wasted += end as u64;
    Ok(1)
}

/// Reads what there is. A sector that cannot be read counts as zeros.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                let sector = buffer.len().min(filled + 4096);
                buffer[filled..sector].fill(0);
                filled = sector;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
