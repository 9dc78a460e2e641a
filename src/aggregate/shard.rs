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
use std::sync::atomic::{AtomicI64, Ordering};

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet, HashTable};
use serde::{Deserialize, Serialize};

use super::{Aggregate, Counter, Gauge, Marks};
use crate::sample::{Identity, Kind, Reason, SeriesKey, Tags, Value, WireType};
use crate::units::Size;

/// The rows of `[limits]` that bound series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How many series there may be.
    pub series: u64,
    /// How much memory they may take.
    pub memory: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self { series: 1_000_000, memory: Size(512 << 20) }
    }
}

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

/// What all shards of an agent may still hold. Charged when an identity is first seen, never on the way of a sample.
#[derive(Debug)]
pub struct Budget {
    series: AtomicI64,
    bytes: AtomicI64,
    series_max: i64,
    bytes_max: i64,
}

/// What an identity costs beside its bytes: its slots in index, cells and ledger, by measurement of a counter series.
const IDENTITY_BYTES: i64 = 400;

impl Budget {
    /// A budget nothing is charged to.
    pub fn new(limits: &Limits) -> Self {
        Self {
            series: AtomicI64::new(0),
            bytes: AtomicI64::new(0),
            series_max: i64::try_from(limits.series).unwrap_or(i64::MAX),
            bytes_max: i64::try_from(limits.memory.0).unwrap_or(i64::MAX),
        }
    }

    /// Takes one series and its bytes, if there is room for both.
    fn charge(&self, bytes: i64) -> bool {
        let series = self.series.fetch_add(1, Ordering::Relaxed);
        let held = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = series < self.series_max && held + bytes <= self.bytes_max;
        if !fits {
            self.refund(1, bytes);
        }
        fits
    }

    /// Gives series and bytes back.
    pub fn refund(&self, series: i64, bytes: i64) {
        self.series.fetch_sub(series, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Charges what could not be refused, as what the journal holds at a start.
    pub fn force(&self, series: i64, bytes: i64) {
        self.refund(-series, -bytes);
    }

    /// Bytes charged now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed).max(0) as u64
    }
}

/// What a series with a key of this length is charged.
pub fn cost(key: &SeriesKey) -> i64 {
    IDENTITY_BYTES + 2 * key.as_str().len() as i64
}

/// The cells of a shard by series number, and which of them hold something.
#[derive(Debug, Default)]
pub struct Cells {
    cells: Vec<Option<Aggregate>>,
    touched: Vec<u32>,
}

impl Cells {
    /// Takes out what came, leaving every cell empty and the memory in place.
    pub fn drain(&mut self) -> impl Iterator<Item = (u32, Aggregate)> {
        let cells = &mut self.cells;
        self.touched.drain(..).filter_map(|number| cells[number as usize].take().map(|cell| (number, cell)))
    }

    fn is_empty(&self) -> bool {
        self.touched.is_empty()
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
    spares: Vec<Cells>,
    new: Vec<New>,
    released: Vec<u32>,
    baselines: HashMap<(u32, u64), f64, RandomState>,
    budget: Arc<Budget>,
    refused: u64,
    /// Bytes of the entries in the index that lead to [`IGNORED`].
    ignored_bytes: usize,
}

/// How many (series, source) pairs of absolute counters a shard tells apart.
const BASELINES_MAX: usize = 65_536;

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
            spares: Vec::new(),
            new: Vec::new(),
            released: Vec::new(),
            baselines: HashMap::with_hasher(RandomState::default()),
            budget,
            refused: 0,
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

    /// Gives an identity that was not found the number of the series with this key.
    pub fn admit(&mut self, vacancy: Vacancy, kind: Kind, identity: &Identity<'_>, key: SeriesKey) -> u32 {
        let id = SeriesId { kind, key };
        let known = self.numbers.get(&id).copied();
        let bytes = if known.is_some() { IDENTITY_BYTES / 4 } else { cost(&id.key) };
        if known.is_some() {
            self.budget.force(0, bytes);
        } else if !self.budget.charge(bytes) {
            self.refused += 1;
            return self.overflow(kind);
        }
        let number = known.unwrap_or_else(|| self.number(id));
        self.insert(vacancy, kind, identity, number);
        number
    }

    /// Remembers that the samples of an identity that was not found are not kept.
    pub fn ignore(&mut self, vacancy: Vacancy, kind: Kind, identity: &Identity<'_>) {
        if self.ignored_bytes >= IGNORED_BYTES_MAX {
            self.forget_ignored();
        }
        self.ignored_bytes += size_of::<Entry>() + spell(kind, identity).len();
        self.insert(vacancy, kind, identity, IGNORED);
    }

    /// Asks again what is ignored: forgets what was, and ignores the series of which `ignores` says so from now on. They
    /// stay in the ledger until they are idle for long enough.
    pub fn reconsider(&mut self, ignores: impl Fn(&SeriesId) -> bool) {
        self.forget_ignored();
        let gone: HashSet<u32, RandomState> =
            self.numbers.iter().filter(|(id, _)| ignores(id)).map(|(_, number)| *number).collect();
        for entry in self.index.iter_mut().filter(|entry| gone.contains(&entry.number)) {
            entry.number = IGNORED;
            self.ignored_bytes += size_of::<Entry>() + entry.spelling.len();
        }
    }

    fn forget_ignored(&mut self) {
        if self.ignored_bytes > 0 {
            self.index.retain(|entry| entry.number != IGNORED);
            self.ignored_bytes = 0;
        }
    }

    fn insert(&mut self, vacancy: Vacancy, kind: Kind, identity: &Identity<'_>, number: u32) {
        let entry = Entry { spelling: spell(kind, identity), number };
        let hasher = &self.hasher;
        self.index.insert_unique(vacancy.0, entry, |entry| hash_spelling(hasher, &entry.spelling));
    }

    /// How many samples were sent to `_overflow` since this was asked last.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// Adds a sample to the cell of a series. `source` tells senders of absolute counters apart. The answer is how many
    /// values were added.
    ///
    /// # Errors
    /// [`Reason::NonFinite`] when a sum would not stay finite; values before that one have been added.
    #[inline]
    pub fn add(
        &mut self,
        number: u32,
        wire: WireType,
        value: &Value<'_>,
        rate: f64,
        now_ms: u64,
        source: u64,
    ) -> Result<u64, Reason> {
        if wire == WireType::AbsoluteCounter {
            return self.add_absolute(number, value, source);
        }
        let added = match (self.cells.cell(number, wire.kind()), value) {
            (Aggregate::Counter(cell), Value::Numbers(numbers)) => add_counter(cell, numbers, rate),
            (Aggregate::Gauge(cell), Value::Numbers(numbers)) => set_gauge(cell, numbers, now_ms),
            (Aggregate::Gauge(cell), Value::Changes(changes)) => change_gauge(cell, changes, now_ms),
            (Aggregate::Observed(cell), Value::Numbers(numbers)) => {
                numbers.iter().all(|number| cell.observe(*number, 1.0 / rate, now_ms))
            }
            (Aggregate::Set(cell), Value::Member(member)) => {
                cell.insert(member);
                true
            }
            (Aggregate::Meter(cell), Value::Numbers(numbers)) => add_marks(cell, numbers, rate, now_ms),
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

    /// An absolute counter counts the difference to the last value of the same source: nothing for the first one, and
    /// all of the new value after a fall.
    fn add_absolute(&mut self, number: u32, value: &Value<'_>, source: u64) -> Result<u64, Reason> {
        let Value::Numbers(numbers) = value else { return Err(Reason::BadValue) };
        for reading in *numbers {
            if self.baselines.len() >= BASELINES_MAX && !self.baselines.contains_key(&(number, source)) {
                self.baselines.clear();
            }
            let last = self.baselines.insert((number, source), *reading);
            let step = last.map_or(0.0, |last| if *reading >= last { *reading - last } else { *reading });
            let Aggregate::Counter(cell) = self.cells.cell(number, Kind::Counter) else { return Err(Reason::BadValue) };
            if !add_counter(cell, &[step], 1.0) {
                return Err(Reason::NonFinite);
            }
        }
        Ok(numbers.len() as u64)
    }

    /// Hands over what came since the last seal and goes on with empty cells. It takes the same time whatever it holds.
    pub fn seal(&mut self) -> Sealed {
        let cells = std::mem::replace(&mut self.cells, self.spares.pop().unwrap_or_default());
        Sealed { cells, new: std::mem::take(&mut self.new), released: std::mem::take(&mut self.released) }
    }

    /// Whether a seal would hand over nothing.
    pub fn is_clean(&self) -> bool {
        self.cells.is_empty() && self.new.is_empty() && self.released.is_empty()
    }

    /// Takes back cells that were drained.
    pub fn give_back(&mut self, cells: Cells) {
        debug_assert!(cells.is_empty());
        self.spares.push(cells);
    }

    /// Forgets series that the ledger wants to expire, but for those with new samples. The next seal says which.
    pub fn retire(&mut self, numbers: &[u32]) {
        let idle = |number: &u32| self.cells.cells.get(*number as usize).is_none_or(Option::is_none);
        let mut gone = vec![false; self.next as usize];
        for number in numbers.iter().filter(|number| idle(number)) {
            gone[*number as usize] = true;
        }
        let budget = &self.budget;
        self.numbers.retain(|id, number| {
            let stays = !gone[*number as usize];
            if !stays {
                budget.refund(1, cost(&id.key));
            }
            stays
        });
        self.index.retain(|entry| !gone.get(entry.number as usize).is_some_and(|gone| *gone));
        self.baselines.retain(|(number, _), _| !gone[*number as usize]);
        let released = (0..self.next).filter(|number| gone[*number as usize]);
        self.released.extend(released.clone());
        self.free.extend(released);
    }

    /// The number for a new key.
    fn number(&mut self, id: SeriesId) -> u32 {
        let number = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
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
        self.budget.force(1, cost(&id.key));
        self.number(id)
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

#[inline]
fn add_counter(cell: &mut Counter, numbers: &[f64], rate: f64) -> bool {
    numbers.iter().all(|number| {
        cell.samples += 1;
        let step = number / rate;
        if step >= 0.0 { cell.increments.add(step) } else { cell.decrements.add(-step) }
    })
}

fn set_gauge(cell: &mut Gauge, numbers: &[f64], now_ms: u64) -> bool {
    if let Some(last) = numbers.last() {
        *cell = Gauge { set: Some((*last, now_ms)), samples: cell.samples + numbers.len() as u64, ..Gauge::default() };
    }
    true
}

fn change_gauge(cell: &mut Gauge, changes: &[f64], now_ms: u64) -> bool {
    cell.changed_at = now_ms;
    cell.samples += changes.len() as u64;
    changes.iter().all(|change| cell.change.add(*change))
}

fn add_marks(cell: &mut Marks, numbers: &[f64], rate: f64, now_ms: u64) -> bool {
    numbers.iter().all(|number| {
        cell.samples += 1;
        cell.last = (*number, now_ms);
        cell.count.add(number / rate)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(series: u64) -> Shard {
        Shard::new(Arc::new(Budget::new(&Limits { series, ..Limits::default() })))
    }

    fn count(shard: &mut Shard, name: &str, value: f64) -> u32 {
        let identity = Identity::Line { name: name.as_bytes(), tags: b"" };
        let number = match shard.find(Kind::Counter, &identity) {
            Ok(number) => number,
            Err(vacancy) => shard.admit(vacancy, Kind::Counter, &identity, SeriesKey::parse(name)),
        };
        let wire = WireType::Plain(Kind::Counter);
        shard.add(number, wire, &Value::Numbers(&[value]), 1.0, 1, 0).unwrap();
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
            assert_eq!(shard.admit(vacancy, Kind::Counter, &identity, key.clone()), 0);
            assert_eq!(shard.find(Kind::Counter, &identity).unwrap(), 0);
        }
        let json = Identity::Key("a;k=v;l=w");
        let vacancy = shard.find(Kind::Counter, &json).unwrap_err();
        assert_eq!(shard.admit(vacancy, Kind::Counter, &json, key), 0);
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
        assert_eq!(shard.take_refused(), 5);
        let mut sealed = shard.seal();
        assert_eq!(sealed.new[2].id.key.as_str(), OVERFLOW);
        let sum: f64 = sealed.cells.drain().map(|(_, cell)| increments(&cell)).sum();
        assert!((sum - 8.0).abs() < f64::EPSILON);
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
    fn what_is_ignored_is_remembered_within_bounds_until_it_is_asked_again() {
        let mut shard = shard(3);
        let identity = |name: &'static str| Identity::Line { name: name.as_bytes(), tags: b"" };
        let number = count(&mut shard, "a", 1.0);
        let vacancy = shard.find(Kind::Counter, &identity("b")).unwrap_err();
        shard.ignore(vacancy, Kind::Counter, &identity("b"));
        assert_eq!(shard.find(Kind::Counter, &identity("b")).unwrap(), IGNORED);
        shard.retire(&[]);
        shard.reconsider(|id| id.key.as_str() == "a");
        assert_eq!(shard.find(Kind::Counter, &identity("a")).unwrap(), IGNORED);
        assert!(shard.find(Kind::Counter, &identity("b")).is_err());
        shard.reconsider(|_| false);
        assert_eq!(count(&mut shard, "a", 1.0), number, "the series goes on where it was");
        for n in 0..200_000 {
            let name = format!("{n:64}");
            let identity = Identity::Line { name: name.as_bytes(), tags: b"" };
            let vacancy = shard.find(Kind::Counter, &identity).unwrap_err();
            shard.ignore(vacancy, Kind::Counter, &identity);
        }
        assert!(shard.index.len() < 60_000, "{}", shard.index.len());
    }

    #[test]
    fn an_absolute_counter_counts_differences_by_source() {
        let mut shard = shard(3);
        let number = count(&mut shard, "a", 0.0);
        let mut read = |source, reading| {
            shard.add(number, WireType::AbsoluteCounter, &Value::Numbers(&[reading]), 1.0, 1, source).unwrap();
        };
        for (source, reading) in [(1, 100.0), (1, 130.0), (2, 1000.0), (1, 5.0), (2, 1001.0)] {
            read(source, reading);
        }
        let mut sealed = shard.seal();
        assert!((increments(&sealed.cells.drain().next().unwrap().1) - 36.0).abs() < f64::EPSILON);
    }
}
