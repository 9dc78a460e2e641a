//! What goes into a commit beside totals and batches: how far logs of records were read. And what a copy of the totals
//! elsewhere is kept up with: records as they are, those that are newer than what the copy has, and what expired.

use std::ops::Bound;

use redb::{ReadTransaction, WriteTransaction};

use super::record::{self, Content, Place, Stamp};
use super::{AGENT, Error, Journal, TOTALS, count_damaged, locked};
use crate::aggregate::ledger::Total;
use crate::sample::{Kind, Marks, SeriesKey};

/// Where the marks stand in the table of the agent.
pub(super) const MARKS: u8 = 1;

/// How many totals one look at newer ones passes.
const PASSED_MAX: usize = 4_096;

/// Records of totals that are newer than a revision, of a part of the table.
#[derive(Debug, Default)]
pub struct Newer {
    /// Kind, key and record of each.
    pub records: Vec<(Kind, SeriesKey, Vec<u8>)>,
    /// From where to go on; `None` behind the last.
    next: Option<Place>,
}

impl Newer {
    /// Whether there are no more.
    pub fn is_last(&self) -> bool {
        self.next.is_none()
    }
}

/// Reads the record of a total: the transaction that wrote it, kind, key and total. None when a byte of it is not as it
/// was written.
pub fn read_total(record: &[u8]) -> Option<(u64, Kind, &str, Total)> {
    record::read_stamped_total(record)
}

impl Journal {
    /// How far logs were read when the last commit was made.
    pub fn marks(&self) -> Marks {
        locked(&self.state).marks.clone()
    }

    /// Lets the next commit take a mark along. It does not make one necessary.
    pub fn note(&self, name: &str, mark: i64) {
        locked(&self.noted).insert(name.into(), mark);
    }

    /// The number of the last transaction.
    pub fn revision(&self) -> u64 {
        locked(&self.state).revision
    }

    /// Lets [`Journal::take_expired`] tell of totals that expire from now on.
    pub fn tell_expired(&self) {
        locked(&self.expired).get_or_insert_default();
    }

    /// The series whose totals were deleted because they expired, since this was asked last.
    pub fn take_expired(&self) -> Vec<(Kind, SeriesKey)> {
        locked(&self.expired).as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The records of these totals, in their order; none where there is none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn records<'s>(
        &self,
        series: impl Iterator<Item = (Kind, &'s SeriesKey)>,
    ) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let read = |transaction: &ReadTransaction| {
            let table = transaction.open_table(TOTALS)?;
            let record = |(kind, key): (Kind, &SeriesKey)| {
                let value = table.get(&record::place(kind, key.as_str()))?;
                Ok(value.map(|value| value.value().to_vec()).filter(|record| is_of(record, kind, key)))
            };
            series.map(record).collect()
        };
        self.database.read(read).map_err(Error::counted)
    }

    /// Records that are newer than a revision or that `wanted` asks for, of the next part of the table.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn newer(
        &self,
        after: &Newer,
        revision: u64,
        wanted: impl Fn(Kind, &SeriesKey) -> bool,
    ) -> Result<Newer, Error> {
        let start = after.next.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let read = |transaction: &ReadTransaction| {
            let mut newer = Newer::default();
            let table = transaction.open_table(TOTALS)?;
            for (passed, entry) in table.range::<&Place>((start, Bound::Unbounded))?.enumerate() {
                let (place, value) = entry?;
                let (Some(written), Some(head)) =
                    (record::read_total_revision(value.value()), record::read_total_head(value.value()))
                else {
                    count_damaged("total");
                    continue;
                };
                let key = SeriesKey::from_canonical(head.key);
                if written > revision || wanted(head.kind, &key) {
                    newer.records.push((head.kind, key, value.value().to_vec()));
                }
                if passed + 1 >= PASSED_MAX {
                    newer.next = Some(*place.value());
                    break;
                }
            }
            Ok(newer)
        };
        self.database.read(read).map_err(Error::counted)
    }
}

/// Two series may meet in one place; the record says whose it is.
fn is_of(record: &[u8], kind: Kind, key: &SeriesKey) -> bool {
    record::read_total_head(record).is_some_and(|head| head.kind == kind && head.key == key.as_str())
}

/// Reads the marks back; none where there are none, or they are damaged.
pub(super) fn load(transaction: &ReadTransaction) -> Result<Marks, Error> {
    let table = transaction.open_table(AGENT)?;
    let Some(value) = table.get(MARKS)? else { return Ok(Marks::new()) };
    let marks = record::read_marks(value.value());
    if marks.is_none() {
        count_damaged("marks");
    }
    Ok(marks.unwrap_or_default())
}

/// Writes the marks.
pub(super) fn put(transaction: &WriteTransaction, revision: u64, marks: &Marks) -> Result<(), Error> {
    let mut out = Vec::new();
    record::write(&mut out, Stamp { content: Content::Marks, revision }, |out| record::put(out, marks))?;
    transaction.open_table(AGENT)?.insert(MARKS, out.as_slice())?;
    Ok(())
}
