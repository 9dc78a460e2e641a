//! A shard: one worker's own table of series and what came into them since the last seal.
//!
//! Its worker alone writes it, so there is no lock and no atomic operation on the way of a sample. It has two parts. The
//! index lasts: the bytes that name a series, as they stood on the wire, lead to the number of the series in this shard.
//! The cells are handed over: a seal gives the full array away and goes on with an empty one.
//!
//! Names are decoded only when an identity is first seen, by the caller. What a new identity costs is charged to the
//! [`Budget`] of the whole agent; beyond it samples go to the series `_overflow` of their kind.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashTable};

pub use super::budget::{Budget, Limits, Refusal, Sight};
use super::budget::{Owner, spelling_cost};
use super::set::Members;
use super::{Aggregate, Counter, Gauge, Marks, series};
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

/// The cells of a shard by series number, and which of them hold something.
#[derive(Debug, Default)]
pub struct Cells {
    cells: Vec<Option<Aggregate>>,
    touched: Vec<u32>,
    /// Of samples that bear the time of an earlier window, by series number and the start of that window.
    earlier: HashMap<(u32, u64), Aggregate, RandomState>,
}

impl Cells {
    /// Takes out what came, leaving every cell empty and the memory in place.
    pub fn drain(&mut self) -> impl Iterator<Item = (u32, Aggregate)> {
        let cells = &mut self.cells;
        self.touched.drain(..).filter_map(|number| cells[number as usize].take().map(|cell| (number, cell)))
    }

    /// Takes out what came for earlier windows: series number, start of the window, and the cell.
    pub fn drain_earlier(&mut self) -> impl Iterator<Item = (u32, u64, Aggregate)> {
        self.earlier.drain().map(|((number, start_ms), cell)| (number, start_ms, cell))
    }

    fn is_empty(&self) -> bool {
        self.touched.is_empty() && self.earlier.is_empty()
    }

    /// The series that have a sample since the seal.
    fn held(&self) -> impl Iterator<Item = u32> {
        self.touched.iter().copied().chain(self.earlier.keys().map(|(number, _)| *number))
    }

    /// The cell of a series, made when this is its first sample since the seal.
    #[inline]
    fn cell(&mut self, number: u32, kind: Kind) -> &mut Aggregate {
        let place = number as usize;
        if place >= self.cells.len() {
            self.cells.resize_with(place + 1, || None);
        }
        let cell = &mut self.cells[place];
        if cell.is_none() {
            self.touched.push(number);
        }
        cell.get_or_insert_with(|| Aggregate::new(kind))
    }
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

/// An identity and where it leads.
#[derive(Debug)]
struct Entry {
    /// See [`spell`].
    spelling: Box<[u8]>,
    number: u32,
    /// The series has another spelling, which is paid for with it; this one is charged by itself.
    is_further: bool,
}

/// A place in the index that was looked for and not found.
#[derive(Debug, Clone, Copy)]
pub struct Vacancy(u64);

/// One worker's own table.
#[derive(Debug)]
pub struct Shard {
    hasher: RandomState,
    index: HashTable<Entry>,
    numbers: HashMap<Arc<SeriesId>, u32, RandomState>,
    free: Vec<u32>,
    next: u32,
    cells: Cells,
    spare: Option<Cells>,
    new: Vec<New>,
    released: Vec<u32>,
    budget: Arc<Budget>,
    /// Who made a series, by its number.
    owners: Vec<Owner>,
    refused: [u64; Refusal::ALL.len()],
    created: u64,
    /// Bytes of the entries in the index that lead to [`IGNORED`].
    ignored_bytes: usize,
}

/// The number of identities whose samples are not kept.
pub const IGNORED: u32 = u32::MAX;

/// How many bytes of such identities a shard remembers. Past it, it forgets them all and asks again.
const IGNORED_BYTES_MAX: usize = 4 << 20;

impl Shard {
    /// An empty shard that draws on a budget.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            hasher: RandomState::default(),
            index: HashTable::new(),
            numbers: HashMap::with_hasher(RandomState::default()),
            free: Vec::new(),
            next: 0,
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

    /// The number of the series an identity names, [`IGNORED`] if it names none, or the place where [`Shard::admit`] may
    /// put it.
    #[inline]
    pub fn find(&self, kind: Kind, identity: &Identity<'_>) -> Result<u32, Vacancy> {
        let hash = self.hash(kind, identity);
        let entry = self.index.find(hash, |entry| is_spelling(&entry.spelling, kind, identity));
        entry.map(|entry| entry.number).ok_or(Vacancy(hash))
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
        let spelling = spell(kind, identity);
        let known = self.numbers.get(&id).copied();
        let is_further = known.is_some();
        let number = match known {
            Some(number) if !self.budget.charge(spelling_cost(&spelling)) => return number,
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
        self.insert(vacancy, Entry { spelling, number, is_further });
        number
    }

    /// Remembers that the samples of an identity that was not found are not kept.
    pub fn ignore(&mut self, vacancy: Vacancy, kind: Kind, identity: &Identity<'_>) {
        if self.ignored_bytes >= IGNORED_BYTES_MAX {
            self.index.retain(|entry| entry.number != IGNORED);
            self.ignored_bytes = 0;
        }
        let spelling = spell(kind, identity);
        self.ignored_bytes += size_of::<Entry>() + spelling.len();
        self.insert(vacancy, Entry { spelling, number: IGNORED, is_further: false });
    }

    fn insert(&mut self, vacancy: Vacancy, entry: Entry) {
        let hasher = &self.hasher;
        self.index.insert_unique(vacancy.0, entry, |entry| hash_spelling(hasher, &entry.spelling));
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
        add_to(self.cells.cell(number, kind), value, rate, now_ms, self.budget.each())
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
        let cell = self.cells.earlier.entry((number, start_ms)).or_insert_with(|| Aggregate::new(kind));
        add_to(cell, value, rate, at_ms, self.budget.each())
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
        let further = self.index.drain().filter(|entry| entry.is_further);
        let bytes = further.map(|entry| spelling_cost(&entry.spelling)).sum();
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
        let mut gone = vec![false; self.next as usize];
        numbers.iter().for_each(|number| gone[*number as usize] = true);
        self.cells.held().for_each(|number| gone[number as usize] = false);
        // The ledger asks again until it knows, so some of them may be free already.
        let mut released = Vec::new();
        let (budget, owners) = (&self.budget, &self.owners);
        self.numbers.retain(|id, number| {
            let stays = !gone[*number as usize];
            if !stays {
                budget.release(id, owners[*number as usize]);
                released.push(*number);
            }
            stays
        });
        self.index.retain(|entry| {
            // What is ignored has no number.
            let stays = !gone.get(entry.number as usize).is_some_and(|gone| *gone);
            if !stays && entry.is_further {
                budget.refund(0, spelling_cost(&entry.spelling));
            }
            stays
        });
        released.sort_unstable();
        self.released.extend(&released);
        self.free.extend(&released);
    }

    /// The number for a new key.
    fn number(&mut self, id: SeriesId, owner: Owner) -> u32 {
        let number = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.owners.push(owner);
            self.next - 1
        });
        self.owners[number as usize] = owner;
        let id = Arc::new(id);
        self.numbers.insert(Arc::clone(&id), number);
        self.new.push(New { number, id });
        number
    }

    fn overflow(&mut self, kind: Kind) -> u32 {
        let id = SeriesId { kind, key: SeriesKey::new(OVERFLOW, &Tags::default()) };
        if let Some(number) = self.numbers.get(&id) {
            return *number;
        }
        let owner = self.budget.admit_always(&id);
        self.number(id, owner)
    }

    #[inline]
    fn hash(&self, kind: Kind, identity: &Identity<'_>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        match identity {
            Identity::Line { name, tags } => {
                hasher.write_u8(kind as u8);
                hasher.write(name);
                hasher.write(tags);
            }
            Identity::Key(key) => {
                hasher.write_u8(kind as u8 | KEY);
                hasher.write(key.as_bytes());
                hasher.write(b"");
            }
        }
        hasher.finish()
    }
}

/// Marks the spelling of an [`Identity::Key`] in the byte of the kind.
const KEY: u8 = 0x80;

/// Stands between name and tags of a spelling; no UTF-8 text holds it.
const BETWEEN: u8 = 0xff;

/// An identity as the index keeps it: the kind, the name, [`BETWEEN`], the tags.
fn spell(kind: Kind, identity: &Identity<'_>) -> Box<[u8]> {
    match identity {
        Identity::Line { name, tags } => [&[kind as u8], *name, &[BETWEEN], *tags].concat().into_boxed_slice(),
        Identity::Key(key) => [&[kind as u8 | KEY], key.as_bytes(), &[BETWEEN]].concat().into_boxed_slice(),
    }
}

#[inline]
fn is_spelling(spelling: &[u8], kind: Kind, identity: &Identity<'_>) -> bool {
    let (mark, name, tags): (u8, &[u8], &[u8]) = match identity {
        Identity::Line { name, tags } => (kind as u8, name, tags),
        Identity::Key(key) => (kind as u8 | KEY, key.as_bytes(), b""),
    };
    spelling.len() == name.len() + tags.len() + 2
        && spelling[0] == mark
        && spelling[1..=name.len()] == *name
        && spelling[name.len() + 1] == BETWEEN
        && spelling[name.len() + 2..] == *tags
}

/// The hash of a spelling: that of its identity.
fn hash_spelling(hasher: &RandomState, spelling: &[u8]) -> u64 {
    let between = memchr::memchr(BETWEEN, spelling).unwrap_or(spelling.len() - 1);
    let mut hasher = hasher.build_hasher();
    hasher.write_u8(spelling[0]);
    hasher.write(&spelling[1..between]);
    hasher.write(&spelling[between + 1..]);
    hasher.finish()
}

/// Adds a sample to a cell of its kind, and says how many values were added.
#[inline]
fn add_to(
    cell: &mut Aggregate,
    value: &Value<'_>,
    rate: f64,
    at_ms: u64,
    limits: &series::Limits,
) -> Result<u64, Reason> {
    let added = match (cell, value) {
        (Aggregate::Counter(cell), Value::Numbers(numbers)) => add_counter(cell, numbers, rate),
        (Aggregate::Gauge(cell), Value::Numbers(numbers)) => set_gauge(cell, numbers, at_ms),
        (Aggregate::Gauge(cell), Value::Changes(changes)) => change_gauge(cell, changes, at_ms),
        (Aggregate::Observed(cell), Value::Numbers(numbers)) => {
            numbers.iter().all(|number| cell.observe_within(*number, 1.0 / rate, at_ms, limits))
        }
        (Aggregate::Set(cell), Value::Member(member)) => {
            cell.insert_hash_within(Members::hash(member), limits.set_exact);
            true
        }
        (Aggregate::Meter(cell), Value::Numbers(numbers)) => add_marks(cell, numbers, rate, at_ms),
        (
            Aggregate::Counter(_)
            | Aggregate::Gauge(_)
            | Aggregate::Observed(_)
            | Aggregate::Set(_)
            | Aggregate::Meter(_),
            Value::Numbers(_) | Value::Changes(_) | Value::Member(_),
        ) => return Err(Reason::BadValue),
    };
    if added { Ok(value.count() as u64) } else { Err(Reason::NonFinite) }
}

#[inline]
fn add_counter(cell: &mut Counter, numbers: &[f64], rate: f64) -> bool {
    numbers.iter().all(|number| {
        let step = number / rate;
        let added = if step >= 0.0 { cell.increments.add(step) } else { cell.decrements.add(-step) };
        cell.samples += u64::from(added);
        added
    })
}

fn set_gauge(cell: &mut Gauge, numbers: &[f64], now_ms: u64) -> bool {
    if let Some(last) = numbers.last() {
        *cell = Gauge { set: Some((*last, now_ms)), samples: cell.samples + numbers.len() as u64, ..Gauge::default() };
    }
    true
}

fn change_gauge(cell: &mut Gauge, changes: &[f64], now_ms: u64) -> bool {
    changes.iter().all(|change| cell.change_by(*change, now_ms))
}

fn add_marks(cell: &mut Marks, numbers: &[f64], rate: f64, now_ms: u64) -> bool {
    numbers.iter().all(|number| {
        let added = cell.count.add(number / rate);
        if added {
            cell.last = (*number, now_ms);
            cell.samples += 1;
        }
        added
    })
}

#[cfg(test)]
mod tests {
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
        let cells: Vec<_> = sealed.cells.drain().collect();
        assert_eq!(cells.len(), 1);
        assert!((increments(&cells[0].1) - 3.0).abs() < f64::EPSILON);
        shard.give_back(sealed.cells);
        count(&mut shard, "a", 5.0);
        let mut sealed = shard.seal();
        assert!(sealed.new.is_empty());
        assert!((increments(&sealed.cells.drain().next().unwrap().1) - 5.0).abs() < f64::EPSILON);
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
        let sum: f64 = sealed.cells.drain().map(|(_, cell)| increments(&cell)).sum();
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
        assert!(shard.index.len() <= 4 && budget.bytes() <= room, "{} of {room}", budget.bytes());
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
        assert_eq!(sealed.cells.drain().next().unwrap().1.samples(), 1);
    }

    #[test]
    fn retired_numbers_are_used_again_but_not_those_with_samples() {
        let mut shard = shard(3);
        for name in ["a", "b", "c"] {
            count(&mut shard, name, 1.0);
        }
        let mut sealed = shard.seal();
        sealed.cells.drain().for_each(drop);
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
