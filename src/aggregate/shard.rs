//! A shard: one worker's own table of series and what came into them since the last seal.
//!
//! Its worker alone writes it, so there is no lock and no atomic operation on the way of a sample. It has two parts. The
//! index lasts: the bytes that name a series, as they stood on the wire, lead to the number of the series in this shard.
//! The cells are handed over: a seal gives the full array away and goes on with an empty one.
//!
//! Names are decoded only when an identity is first seen, by the caller. What a new identity costs is charged to the
//! [`Budget`] of the whole agent; beyond it samples go to the series `_overflow` of their kind.

use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

pub use super::budget::{Budget, Limits, Refusal, Sight};
use super::budget::{Owner, spelling_cost};
pub use super::cells::{Cells, Content};
pub use super::index::Hash;
use super::index::Index;
use crate::sample::{Identity, Kind, Reason, SeriesKey, Tags, Value};

/// The name of the series that takes samples for which there is no room.
pub const OVERFLOW: &str = "_overflow";

/// Kind and key of a series, shared between shards and ledger.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesId {
    /// The kind.
    pub kind: Kind,
    /// The key.
    pub key: SeriesKey,
}

/// A series that a seal mentions for the first time.
#[derive(Debug)]
pub struct New {
    /// Its number in this shard.
    pub number: u32,
    /// What it is.
    pub id: Arc<SeriesId>,
}

/// What a seal hands over.
#[derive(Debug)]
pub struct Sealed {
    /// What came since the last seal.
    pub cells: Cells,
    /// Series first seen since then; to be read before the cells.
    pub new: Vec<New>,
    /// Numbers given back since then; to be read before `new`, which may use them again.
    pub released: Vec<u32>,
}

/// A place in the index that was looked for and not found.
#[derive(Debug, Clone, Copy)]
pub struct Vacancy(Hash);

/// One worker's own table.
#[derive(Debug)]
pub struct Shard {
    index: Index,
    /// The series by number, and the numbers by series.
    ids: Vec<Option<Arc<SeriesId>>>,
    numbers: HashTable<u32>,
    hasher: RandomState,
    free: Vec<u32>,
    cells: Cells,
    spare: Option<Cells>,
    new: Vec<New>,
    released: Vec<u32>,
    budget: Arc<Budget>,
    /// Who made a series, by its number.
    owners: Vec<Owner>,
    refused: [u64; Refusal::ALL.len()],
    created: u64,
    /// Bytes of the spellings in the index that lead to [`IGNORED`].
    ignored_bytes: usize,
}

/// The number of identities whose samples are not kept.
pub const IGNORED: u32 = u32::MAX;

/// How many bytes of such identities a shard remembers. Past it, it forgets them all and asks again.
const IGNORED_BYTES_MAX: usize = 4 << 20;

/// What each of them takes beside its bytes: the head of its record, and slots of a table that is half empty.
const SLOT_BYTES: usize = 40;

impl Shard {
    /// An empty shard that draws on a budget.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            index: Index::new(),
            ids: Vec::new(),
            numbers: HashTable::new(),
            hasher: RandomState::default(),
            free: Vec::new(),
            cells: Cells::default(),
            spare: None,
            new: Vec::new(),
            released: Vec::new(),
            budget,
            owners: Vec::new(),
            refused: [0; Refusal::ALL.len()],
            created: 0,
            ignored_bytes: 0,
        }
    }

    /// Begins to look an identity up: the hash by which [`Shard::find_hashed`] goes on. A look-up waits for memory three
    /// times; of several that take their steps together, those waits overlap.
    #[inline]
    pub fn hash(&self, kind: Kind, identity: &Identity<'_>) -> Hash {
        let hash = self.index.hash(kind, identity);
        self.index.prefetch_slot(hash);
        hash
    }

    /// The second step.
    #[inline]
    pub fn look_ahead(&self, hash: Hash) {
        self.index.prefetch_record(hash);
    }

    /// The third step: what [`Shard::find`] answers.
    #[inline]
    pub fn find_hashed(&self, hash: Hash, kind: Kind, identity: &Identity<'_>) -> Result<u32, Vacancy> {
        let number = self.index.find(hash, kind, identity).ok_or(Vacancy(hash))?;
        self.cells.prefetch(number);
        Ok(number)
    }

    /// The number of the series an identity names, [`IGNORED`] if it names none, or the place where [`Shard::admit`] may
    /// put it.
    #[inline]
    pub fn find(&self, kind: Kind, identity: &Identity<'_>) -> Result<u32, Vacancy> {
        let hash = self.index.hash(kind, identity);
        self.index.find(hash, kind, identity).ok_or(Vacancy(hash))
    }

    /// Gives an identity that was not found the number of the series with this key. A further spelling for which there
    /// is no room is not kept: it comes here again with its next sample, which costs time and counts where it should.
    pub fn admit(
        &mut self,
        vacancy: Vacancy,
        kind: Kind,
        identity: &Identity<'_>,
        key: SeriesKey,
        sight: Sight,
    ) -> u32 {
        let id = SeriesId { kind, key };
        let known = self.number_of(&id);
        let is_further = known.is_some();
        let number = match known {
            Some(number) if !self.budget.charge(spelling_cost(identity.len())) => return number,
            Some(number) => number,
            None => match self.budget.admit(&id, sight) {
                Ok(owner) => {
                    self.created += u64::from(!self.budget.is_known(&id));
                    self.number(id, owner)
                }
                Err(refusal) => {
                    self.refused[refusal as usize] += 1;
                    return self.overflow(kind);
                }
            },
        };
        let is_kept = self.index.insert(vacancy.0, kind, identity, number, is_further);
        if is_further && !is_kept {
            self.budget.refund(0, spelling_cost(identity.len()));
        }
        number
    }

    /// Remembers that the samples of an identity that was not found are not kept.
    pub fn ignore(&mut self, vacancy: Vacancy, kind: Kind, identity: &Identity<'_>) {
        if self.ignored_bytes >= IGNORED_BYTES_MAX {
            self.index.retain(|record| record.number != IGNORED);
            self.ignored_bytes = 0;
        }
        self.ignored_bytes += SLOT_BYTES + identity.len();
        self.index.insert(vacancy.0, kind, identity, IGNORED, false);
    }

    /// How many series it was the first to see, ever.
    #[inline]
    pub fn created(&self) -> u64 {
        self.created
    }

    /// How many samples were sent to `_overflow` since this was asked last, by [`Refusal`].
    pub fn take_refused(&mut self) -> [u64; Refusal::ALL.len()] {
        std::mem::take(&mut self.refused)
    }

    /// Adds a sample to the cell of a series. The answer is how many values were added.
    ///
    /// # Errors
    /// [`Reason::NonFinite`] when a sum would not stay finite; values before that one have been added.
    #[inline]
    pub fn add(&mut self, number: u32, kind: Kind, value: &Value<'_>, rate: f64, now_ms: u64) -> Result<u64, Reason> {
        self.cells.add(number, kind, value, rate, now_ms, self.budget.each()).map(|()| value.count() as u64)
    }

    /// Adds a sample of one number: [`Shard::add`] for nearly all there are.
    ///
    /// # Errors
    /// As [`Shard::add`].
    #[inline]
    pub fn add_number(&mut self, number: u32, kind: Kind, value: f64, rate: f64, now_ms: u64) -> Result<(), Reason> {
        self.cells.add_number(number, kind, value, rate, now_ms, self.budget.each())
    }

    /// Adds a sample to an earlier window, one that begins at `start_ms`. The caller bounds how many of them there are.
    ///
    /// # Errors
    /// As [`Shard::add`].
    pub fn add_earlier(
        &mut self,
        number: u32,
        kind: Kind,
        value: &Value<'_>,
        rate: f64,
        at_ms: u64,
        start_ms: u64,
    ) -> Result<u64, Reason> {
        let place = (number, start_ms);
        self.cells.add_earlier(place, kind, value, rate, at_ms, self.budget.each()).map(|()| value.count() as u64)
    }

    /// Hands over what came since the last seal and goes on with empty cells. It takes the same time whatever it holds.
    pub fn seal(&mut self) -> Sealed {
        let cells = std::mem::replace(&mut self.cells, self.spare.take().unwrap_or_default());
        Sealed { cells, new: std::mem::take(&mut self.new), released: std::mem::take(&mut self.released) }
    }

    /// Whether a seal would hand over nothing.
    pub fn is_clean(&self) -> bool {
        self.cells.is_empty() && self.new.is_empty() && self.released.is_empty()
    }

    /// Forgets how identities were read, because they may mean other series from now on. The series stay.
    pub fn forget_spellings(&mut self) {
        let mut bytes = 0;
        self.index.retain(|record| {
            bytes += if record.is_further { record.cost() } else { 0 };
            false
        });
        self.budget.refund(0, bytes);
        self.ignored_bytes = 0;
    }

    /// Takes back cells that were drained. One array is kept: of those that a busy fold held, the rest is freed.
    pub fn give_back(&mut self, cells: Cells) {
        debug_assert!(cells.is_empty());
        self.spare = Some(cells);
    }

    /// Forgets series that the ledger wants to expire, but for those with new samples. The next seal says which.
    pub fn retire(&mut self, numbers: &[u32]) {
        let mut gone = vec![false; self.ids.len()];
        numbers.iter().for_each(|number| gone[*number as usize] = true);
        self.cells.held().for_each(|number| gone[number as usize] = false);
        // The ledger asks again until it knows, so some of them may be free already.
        let mut released: Vec<u32> = numbers.iter().copied().filter(|number| gone[*number as usize]).collect();
        released.sort_unstable();
        released.dedup();
        released.retain(|number| self.give_up(*number));
        let budget = &self.budget;
        self.index.retain(|record| {
            // What is ignored has no number.
            let stays = !gone.get(record.number as usize).is_some_and(|gone| *gone);
            if !stays && record.is_further {
                budget.refund(0, record.cost());
            }
            stays
        });
        self.released.extend(&released);
        self.free.extend(&released);
    }

    /// Gives the series of a number up. `false` when it has none.
    fn give_up(&mut self, number: u32) -> bool {
        let Some(id) = self.ids[number as usize].take() else { return false };
        if let Ok(entry) = self.numbers.find_entry(self.hasher.hash_one(&*id), |other| *other == number) {
            entry.remove();
        }
        self.budget.release(&id, self.owners[number as usize]);
        true
    }

    /// The number that a series has.
    fn number_of(&self, id: &SeriesId) -> Option<u32> {
        let is_it = |number: &u32| self.ids[*number as usize].as_deref() == Some(id);
        self.numbers.find(self.hasher.hash_one(id), is_it).copied()
    }

    /// The number for a new key.
    fn number(&mut self, id: SeriesId, owner: Owner) -> u32 {
        let id = Arc::new(id);
        let number = self.free.pop().unwrap_or_else(|| {
            self.ids.push(None);
            self.owners.push(owner);
            self.ids.len() as u32 - 1
        });
        (self.ids[number as usize], self.owners[number as usize]) = (Some(Arc::clone(&id)), owner);
        let (ids, hasher) = (&self.ids, &self.hasher);
        let hash = |number: &u32| ids[*number as usize].as_deref().map_or(0, |id| hasher.hash_one(id));
        self.numbers.insert_unique(hasher.hash_one(&*id), number, hash);
        self.new.push(New { number, id });
        number
    }

    fn overflow(&mut self, kind: Kind) -> u32 {
        let id = SeriesId { kind, key: SeriesKey::new(OVERFLOW, &Tags::default()) };
        self.number_of(&id).unwrap_or_else(|| {
            let owner = self.budget.admit_always(&id);
            self.number(id, owner)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Aggregate;
    use super::*;
    use crate::units::Size;

    fn shard(series: u64) -> Shard {
        Shard::new(Arc::new(Budget::new(&Limits { series, ..Limits::default() })))
    }

    fn count(shard: &mut Shard, name: &str, value: f64) -> u32 {
        let identity = Identity::Line { name: name.as_bytes(), tags: b"" };
        let number = match shard.find(Kind::Counter, &identity) {
            Ok(number) => number,
            Err(vacancy) => shard.admit(vacancy, Kind::Counter, &identity, SeriesKey::parse(name), Sight::default()),
        };
        shard.add(number, Kind::Counter, &Value::Numbers(&[value]), 1.0, 1).unwrap();
        number
    }

    fn increments(cell: &Aggregate) -> f64 {
        let Aggregate::Counter(counter) = cell else { panic!("{cell:?}") };
        counter.increments.value()
    }

    #[test]
    fn two_spellings_of_a_series_share_a_cell() {
        let mut shard = shard(10);
        let key = SeriesKey::parse("a;k=v;l=w");
        for tags in ["k:v,l:w", "l:w,k:v"] {
            let identity = Identity::Line { name: b"a", tags: tags.as_bytes() };
            let vacancy = shard.find(Kind::Counter, &identity).unwrap_err();
            assert_eq!(shard.admit(vacancy, Kind::Counter, &identity, key.clone(), Sight::default()), 0);
            assert_eq!(shard.find(Kind::Counter, &identity).unwrap(), 0);
        }
        let json = Identity::Key("a;k=v;l=w");
        let vacancy = shard.find(Kind::Counter, &json).unwrap_err();
        assert_eq!(shard.admit(vacancy, Kind::Counter, &json, key, Sight::default()), 0);
        assert_eq!(shard.seal().new.len(), 1);
    }

    #[test]
    fn a_seal_hands_over_and_starts_empty() {
        let mut shard = shard(10);
        count(&mut shard, "a", 1.0);
        count(&mut shard, "a", 2.0);
        let mut sealed = shard.seal();
        assert!(shard.is_clean());
        let cells = sealed.cells.take();
        assert_eq!(cells.len(), 1);
        assert!((increments(&cells[0].1) - 3.0).abs() < f64::EPSILON);
        shard.give_back(sealed.cells);
        count(&mut shard, "a", 5.0);
        let mut sealed = shard.seal();
        assert!(sealed.new.is_empty());
        assert!((increments(&sealed.cells.take().into_iter().next().unwrap().1) - 5.0).abs() < f64::EPSILON);
    }

    #[test]
    fn beyond_the_budget_samples_meet_in_overflow_and_old_series_go_on() {
        let mut shard = shard(2);
        let (a, b) = (count(&mut shard, "a", 1.0), count(&mut shard, "b", 1.0));
        let rest: Vec<_> = (0..5).map(|i| count(&mut shard, &format!("new{i}"), 1.0)).collect();
        assert!(rest.iter().all(|number| *number == rest[0] && *number != a && *number != b));
        assert_eq!(count(&mut shard, "a", 1.0), a);
        assert_eq!(shard.take_refused(), [5, 0, 0]);
        let mut sealed = shard.seal();
        assert_eq!(sealed.new[2].id.key.as_str(), OVERFLOW);
        let sum: f64 = sealed.cells.take().into_iter().map(|(_, cell)| increments(&cell)).sum();
        assert!((sum - 8.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_spelling_without_room_counts_where_it_should_and_is_not_kept() {
        let key = SeriesKey::parse("a;k=v");
        let id = SeriesId { kind: Kind::Counter, key: key.clone() };
        // Of which the series itself may take all but an eighth.
        let room = Budget::new(&Limits::default()).cost(&id) as u64 * 4 / 3;
        let budget = Arc::new(Budget::new(&Limits { series: 10, memory: Size(room), ..Limits::default() }));
        let mut shard = Shard::new(Arc::clone(&budget));
        for time in 0..1_000 {
            let tags = format!("k:v|T{time:010}|#k:v");
            let identity = Identity::Line { name: b"a", tags: tags.as_bytes() };
            let vacancy = shard.find(Kind::Counter, &identity).unwrap_err();
            assert_eq!(shard.admit(vacancy, Kind::Counter, &identity, key.clone(), Sight::default()), 0);
        }
        assert!(shard.index.len() <= 6 && budget.bytes() <= room, "{} of {room}", budget.bytes());
        assert_eq!(shard.take_refused(), [0; 3]);
        shard.retire(&[0]);
        assert_eq!((shard.index.len(), budget.bytes()), (0, 0));
    }

    #[test]
    fn forgotten_spellings_are_read_again() {
        let mut shard = shard(10);
        let (a, b) = (count(&mut shard, "a", 1.0), count(&mut shard, "b", 1.0));
        let charged = shard.budget.bytes();
        shard.forget_spellings();
        assert_eq!((count(&mut shard, "a", 1.0), count(&mut shard, "b", 1.0)), (a, b));
        shard.forget_spellings();
        assert_eq!(shard.budget.bytes(), charged);
    }

    #[test]
    fn a_value_that_is_refused_is_not_counted() {
        let mut shard = shard(10);
        let number = count(&mut shard, "a", f64::MAX);
        let error = shard.add(number, Kind::Counter, &Value::Numbers(&[f64::MAX]), 1.0, 1);
        assert_eq!(error, Err(Reason::NonFinite));
        let mut sealed = shard.seal();
        assert_eq!(sealed.cells.take().into_iter().next().unwrap().1.samples(), 1);
    }

    #[test]
    fn retired_numbers_are_used_again_but_not_those_with_samples() {
        let mut shard = shard(3);
        for name in ["a", "b", "c"] {
            count(&mut shard, name, 1.0);
        }
        let mut sealed = shard.seal();
        sealed.cells.take().into_iter().for_each(drop);
        count(&mut shard, "b", 1.0);
        shard.retire(&[0, 1]);
        assert_eq!(shard.seal().released, [0]);
        assert_eq!(count(&mut shard, "d", 1.0), 0);
        assert_eq!(count(&mut shard, "b", 1.0), 1);
        assert_eq!(shard.seal().new.len(), 1);
    }

    #[test]
    fn a_number_that_is_retired_twice_is_free_once() {
        let mut shard = shard(10);
        let old = count(&mut shard, "old", 1.0);
        shard.seal();
        shard.retire(&[old]);
        shard.retire(&[old]);
        assert_eq!(shard.seal().released, [old]);
        assert_ne!(count(&mut shard, "one", 1.0), count(&mut shard, "other", 1.0));
    }

    #[test]
    fn what_is_ignored_is_remembered_within_bounds_until_it_is_asked_again() {
        let mut shard = shard(3);
        let identity = |name: &'static str| Identity::Line { name: name.as_bytes(), tags: b"" };
        let number = count(&mut shard, "a", 1.0);
        let vacancy = shard.find(Kind::Counter, &identity("b")).unwrap_err();
        shard.ignore(vacancy, Kind::Counter, &identity("b"));
        assert_eq!(shard.find(Kind::Counter, &identity("b")).unwrap(), IGNORED);
        shard.retire(&[]);
        shard.forget_spellings();
        assert!(shard.find(Kind::Counter, &identity("b")).is_err());
        assert_eq!(count(&mut shard, "a", 1.0), number, "the series goes on where it was");
        for n in 0..200_000 {
            let name = format!("{n:64}");
            let identity = Identity::Line { name: name.as_bytes(), tags: b"" };
            let vacancy = shard.find(Kind::Counter, &identity).unwrap_err();
            shard.ignore(vacancy, Kind::Counter, &identity);
        }
        assert!(shard.index.len() < 60_000, "{}", shard.index.len());
    }
}
