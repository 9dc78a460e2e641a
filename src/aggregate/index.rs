//! A shard's index: the spellings of identities as they stood on the wire, and the number of the series each names.
//!
//! A private table of one owner: open addressing with linear probing, eight bytes a slot, of which four are a part of the
//! hash, so that a growth reads no spelling. Number and spelling stand side by side in an arena. A look-up thus touches
//! two lines of memory that are not in the cache, one after the other; [`Index::prefetch_slot`] and
//! [`Index::prefetch_record`] let those of many look-ups come at the same time, which is worth more than anything else
//! here (`cargo bench --bench ingest`).
//!
//! The hash is seeded, so nobody outside can choose names that meet in a slot.
//!
//! A prefetch has no safe form, hence the `unsafe` in [`prefetch`]. Its invariant: the address lies within a slice, and a
//! prefetch changes nothing but the cache, whatever the address is. With `MIRIFLAGS=-Zmiri-disable-isolation`, Miri runs it
//! and all around it within minutes: `cargo +nightly miri test --lib ingest::tests`.
#![allow(unsafe_code, reason = "a prefetch has no safe form")]

use std::hash::{BuildHasher, Hasher};

use foldhash::fast::RandomState;

use super::budget::spelling_cost;
use crate::sample::{Identity, Kind};

/// Spellings and the numbers they lead to.
#[derive(Debug)]
pub(super) struct Index {
    hasher: RandomState,
    /// A power of two of them, or none.
    slots: Box<[Slot]>,
    /// How far a tag is shifted to be the number of the slot where its look-up begins.
    shift: u32,
    len: usize,
    arena: Arena,
}

/// A place of the table. Slots are in the order of their tags but for those that had to move on.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    tag: Hash,
    /// Where the record stands in the arena; 0 for none.
    place: u32,
}

/// The upper half of a spelling's hash: its slot comes from the first bits, so the table has at most 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hash(u32);

/// What the index keeps of a spelling.
#[derive(Debug)]
pub(super) struct Record<'a> {
    /// Where it leads.
    pub(super) number: u32,
    /// The series has another spelling.
    pub(super) is_further: bool,
    bytes: &'a [u8],
}

impl Record<'_> {
    /// How many bytes it takes in the arena.
    fn len(&self) -> usize {
        (HEAD + self.bytes.len()).next_multiple_of(UNIT)
    }

    /// What it was charged as a further spelling.
    pub(super) fn cost(&self) -> i64 {
        spelling_cost(self.bytes.len())
    }
}

/// The table is at most three quarters full.
const LOAD: (usize, usize) = (3, 4);
const SLOTS_MIN: usize = 64;

impl Index {
    /// An empty index; it takes no memory before something is put in.
    pub(super) fn new() -> Self {
        Self { hasher: RandomState::default(), slots: Box::default(), shift: 32, len: 0, arena: Arena::default() }
    }

    /// How many spellings it holds.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The hash of an identity.
    #[inline]
    pub(super) fn hash(&self, kind: Kind, identity: &Identity<'_>) -> Hash {
        let mut hasher = self.hasher.build_hasher();
        let mark = match identity {
            Identity::Line { name, tags } => {
                hasher.write(name);
                if !tags.is_empty() {
                    hasher.write(tags);
                }
                mark(kind, false)
            }
            Identity::Key(key) => {
                hasher.write(key.as_bytes());
                mark(kind, true)
            }
        };
        // Slots go by the upper bits, and the fast hash promises little of single bits: so once more an odd factor.
        let mixed = (hasher.finish() ^ u64::from(mark)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Hash((mixed >> 32) as u32)
    }

    /// Lets the slot of a hash come into the cache.
    #[inline]
    pub(super) fn prefetch_slot(&self, hash: Hash) {
        if let Some(slot) = self.slots.get(self.home(hash)) {
            prefetch(slot);
        }
    }

    /// Lets the record of a hash, if there is one, come into the cache.
    #[inline]
    pub(super) fn prefetch_record(&self, hash: Hash) {
        if let Some(slot) = self.slots.get(self.home(hash)).filter(|slot| slot.place != 0) {
            // Where it is another's, which is seldom, the look-up waits.
            self.arena.prefetch(slot.place);
        }
    }

    /// The number an identity leads to.
    #[inline]
    pub(super) fn find(&self, hash: Hash, kind: Kind, identity: &Identity<'_>) -> Option<u32> {
        let (is_key, name, tags) = parts(identity);
        let mark = mark(kind, is_key);
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = self.home(hash);
        // A quarter of the slots is empty, so this ends.
        loop {
            let slot = self.slots[at & mask];
            if slot.place == 0 {
                return None;
            }
            if slot.tag == hash
                && let Some(number) = self.arena.number_of(slot.place, mark, name, tags)
            {
                return Some(number);
            }
            at += 1;
        }
    }

    /// Puts in a spelling that is not there. `false`, with nothing changed, when it or all of them are too long for the
    /// arena: then it is to be read again each time it comes.
    pub(super) fn insert(
        &mut self,
        hash: Hash,
        kind: Kind,
        identity: &Identity<'_>,
        number: u32,
        is_further: bool,
    ) -> bool {
        let (is_key, name, tags) = parts(identity);
        let mark = mark(kind, is_key) | if is_further { FURTHER } else { 0 };
        let Some(place) = self.arena.push(number, mark, name, tags) else { return false };
        if (self.len + 1) * LOAD.1 > self.slots.len() * LOAD.0 {
            self.resize((self.slots.len() * 2).max(SLOTS_MIN));
        }
        self.put(Slot { tag: hash, place });
        true
    }

    /// Drops the spellings for which `stays` says no.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(&Record<'_>) -> bool) {
        let mut old = std::mem::take(&mut self.slots);
        for slot in old.iter_mut().filter(|slot| slot.place != 0) {
            let record = self.arena.record(slot.place);
            if !stays(&record) {
                self.arena.dead += record.len();
                slot.place = 0;
            }
        }
        if self.arena.is_worth_packing() {
            let mut packed = Arena::default();
            for slot in old.iter_mut().filter(|slot| slot.place != 0) {
                // It had room before, so it has now.
                slot.place = packed.copy(&self.arena, slot.place).unwrap_or(0);
            }
            self.arena = packed;
        }
        self.slots = old;
        let count = self.slots.iter().filter(|slot| slot.place != 0).count();
        self.resize(slots_for(count));
    }

    /// Rebuilds the table with so many slots.
    fn resize(&mut self, size: usize) {
        let old = std::mem::replace(&mut self.slots, vec![Slot::default(); size].into_boxed_slice());
        self.shift = 32 - size.trailing_zeros();
        self.len = 0;
        for slot in old.iter().filter(|slot| slot.place != 0) {
            self.put(*slot);
        }
    }

    fn put(&mut self, slot: Slot) {
        let mut at = self.home(slot.tag);
        while self.slots[at].place != 0 {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = slot;
        self.len += 1;
    }

    #[inline]
    fn home(&self, hash: Hash) -> usize {
        (u64::from(hash.0) >> self.shift) as usize
    }
}

fn slots_for(len: usize) -> usize {
    (len * LOAD.1 / LOAD.0 + 1).next_power_of_two().max(SLOTS_MIN)
}

/// Whether an identity is a key, its name and its tags.
#[inline]
fn parts<'a>(identity: &Identity<'a>) -> (bool, &'a [u8], &'a [u8]) {
    match identity {
        Identity::Line { name, tags } => (false, name, tags),
        Identity::Key(key) => (true, key.as_bytes(), b""),
    }
}

/// The kind and the form of an identity in one byte.
#[inline]
const fn mark(kind: Kind, is_key: bool) -> u8 {
    kind as u8 | if is_key { KEY } else { 0 }
}

/// Marks an [`Identity::Key`].
const KEY: u8 = 0x80;
/// Marks a [`Record::is_further`].
const FURTHER: u8 = 0x40;

/// Records of number, mark, lengths, name and tags, one after the other. It grows by chunks, so nothing is ever moved.
#[derive(Debug, Default)]
struct Arena {
    chunks: Vec<Box<[u8]>>,
    /// Bytes used of the last chunk.
    used: usize,
    /// Bytes of records that no slot leads to.
    dead: usize,
}

/// Bytes of a chunk; zeroed pages that nobody wrote to take no memory.
const CHUNK: usize = 1 << 20;
/// Places are multiples of it, so an arena holds up to 16 GiB.
const UNIT: usize = 4;
/// Number; mark and length of the name; length of the tags: three words.
const HEAD: usize = 12;
const LENGTH_MAX: usize = (1 << 24) - 1;

impl Arena {
    fn push(&mut self, number: u32, mark: u8, name: &[u8], tags: &[u8]) -> Option<u32> {
        let size = (HEAD + name.len() + tags.len()).next_multiple_of(UNIT);
        if size > CHUNK - UNIT || name.len() > LENGTH_MAX {
            return None;
        }
        if self.chunks.is_empty() || self.used + size > CHUNK {
            // The first place is none.
            self.used = if self.chunks.is_empty() { UNIT } else { 0 };
            if self.chunks.len() >= (1 << 32) / (CHUNK / UNIT) {
                return None;
            }
            self.chunks.push(vec![0; CHUNK].into_boxed_slice());
        }
        let chunk = self.chunks.last_mut()?;
        let record = &mut chunk[self.used..][..size];
        record[..4].copy_from_slice(&number.to_le_bytes());
        record[4..8].copy_from_slice(&(name.len() as u32 | u32::from(mark) << 24).to_le_bytes());
        record[8..12].copy_from_slice(&(tags.len() as u32).to_le_bytes());
        record[HEAD..][..name.len()].copy_from_slice(name);
        record[HEAD + name.len()..][..tags.len()].copy_from_slice(tags);
        let place = ((self.chunks.len() - 1) * CHUNK + self.used) / UNIT;
        self.used += size;
        Some(place as u32)
    }

    /// Copies a record of another arena.
    fn copy(&mut self, other: &Self, place: u32) -> Option<u32> {
        let (number, mark, name_len) = other.head(place);
        let (name, tags) = other.record(place).bytes.split_at(name_len);
        self.push(number, mark, name, tags)
    }

    /// The number of a record, if it is that of these parts.
    #[inline]
    fn number_of(&self, place: u32, mark: u8, name: &[u8], tags: &[u8]) -> Option<u32> {
        let rest = self.at(place);
        let head = rest.first_chunk::<HEAD>()?;
        let is_so_long = word(head, 4) & !(u32::from(FURTHER) << 24) == (name.len() as u32 | u32::from(mark) << 24)
            && word(head, 8) == tags.len() as u32;
        let is_it = is_so_long
            && rest.get(HEAD..HEAD + name.len())? == name
            && (tags.is_empty() || rest.get(HEAD + name.len()..HEAD + name.len() + tags.len())? == tags);
        is_it.then(|| word(head, 0))
    }

    fn record(&self, place: u32) -> Record<'_> {
        let (number, mark, name_len) = self.head(place);
        let rest = self.at(place);
        let tags_len = word(&rest[..HEAD], 8) as usize;
        Record { number, is_further: mark & FURTHER != 0, bytes: &rest[HEAD..][..name_len + tags_len] }
    }

    /// Number, mark and length of the name.
    fn head(&self, place: u32) -> (u32, u8, usize) {
        let head = &self.at(place)[..HEAD];
        (word(head, 0), head[7], word(head, 4) as usize & LENGTH_MAX)
    }

    #[inline]
    fn at(&self, place: u32) -> &[u8] {
        let at = place as usize * UNIT;
        &self.chunks[at / CHUNK][at % CHUNK..]
    }

    #[inline]
    fn prefetch(&self, place: u32) {
        let at = place as usize * UNIT;
        let Some(chunk) = self.chunks.get(at / CHUNK) else { return };
        // Head and spelling often reach into a second line.
        prefetch(&chunk[at % CHUNK]);
        if let Some(next) = chunk.get(at % CHUNK + 44) {
            prefetch(next);
        }
    }

    /// Whether half of it is dead, and that is a chunk or more.
    fn is_worth_packing(&self) -> bool {
        let used = self.chunks.len().saturating_sub(1) * CHUNK + self.used;
        self.dead >= CHUNK / 4 && self.dead * 2 >= used
    }
}

#[inline]
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word))
}

/// Lets the line of memory where something stands come into the cache.
#[inline]
pub(super) fn prefetch<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing into the program and faults nowhere, and `target` is a reference besides.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(target).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = target;
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Kind, whether it is a key, name and tags.
    type Spelled = (Kind, bool, Vec<u8>, Vec<u8>);

    /// What the index is to be: a map.
    #[derive(Default)]
    struct Oracle(HashMap<Spelled, (u32, bool)>);

    impl Oracle {
        fn place(kind: Kind, identity: &Identity<'_>) -> Spelled {
            match identity {
                Identity::Line { name, tags } => (kind, false, name.to_vec(), tags.to_vec()),
                Identity::Key(key) => (kind, true, key.as_bytes().to_vec(), Vec::new()),
            }
        }
    }

    fn part() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(prop_oneof![Just(b'a'), Just(0xff)], 0..4),
            prop::collection::vec(any::<u8>(), 0..70)
        ]
    }

    fn identity<'a>(is_key: bool, name: &'a [u8], tags: &'a [u8]) -> Identity<'a> {
        match str::from_utf8(name) {
            Ok(key) if is_key => Identity::Key(key),
            Ok(_) | Err(_) => Identity::Line { name, tags },
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map(
            steps in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), part(), part()), 1..400),
            retained in 0..4_u32,
        ) {
            let (mut index, mut oracle) = (Index::new(), Oracle::default());
            for (number, (kind, is_key, name, tags)) in steps.iter().enumerate() {
                let (kind, number) = (*kind.get(&Kind::ALL), number as u32);
                let identity = identity(*is_key, name, tags);
                let hash = index.hash(kind, &identity);
                index.prefetch_slot(hash);
                index.prefetch_record(hash);
                let known = oracle.0.get(&Oracle::place(kind, &identity));
                prop_assert_eq!(index.find(hash, kind, &identity), known.map(|(number, _)| *number));
                if known.is_none() {
                    prop_assert!(index.insert(hash, kind, &identity, number, number % 3 == 0));
                    oracle.0.insert(Oracle::place(kind, &identity), (number, number % 3 == 0));
                }
                if number % 100 == 99 {
                    index.retain(|record| record.number % 4 >= retained);
                    oracle.0.retain(|_, (number, _)| *number % 4 >= retained);
                }
            }
            prop_assert_eq!(index.len(), oracle.0.len());
            let mut seen = Vec::new();
            index.retain(|record| {
                seen.push((record.number, record.is_further));
                true
            });
            let mut expected: Vec<_> = oracle.0.values().copied().collect();
            expected.sort_unstable();
            seen.sort_unstable();
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn what_was_dropped_gives_its_memory_back() {
        let mut index = Index::new();
        for round in 0..20_u32 {
            for number in 0..20_000 {
                let name = format!("some.name.of.a.series.{round}.{number}");
                let identity = Identity::Line { name: name.as_bytes(), tags: b"" };
                let hash = index.hash(Kind::Counter, &identity);
                assert_eq!(index.find(hash, Kind::Counter, &identity), None);
                assert!(index.insert(hash, Kind::Counter, &identity, number, false));
            }
            index.retain(|record| record.number % 100 == 0);
        }
        assert_eq!(index.len(), 20 * 200);
        assert!(index.arena.chunks.len() <= 3 && index.slots.len() <= 8_192, "{}", index.arena.chunks.len());
    }

    #[test]
    fn what_is_too_long_is_not_kept() {
        let mut index = Index::new();
        let name = vec![b'n'; CHUNK];
        let identity = Identity::Line { name: &name, tags: b"" };
        let hash = index.hash(Kind::Counter, &identity);
        assert!(!index.insert(hash, Kind::Counter, &identity, 1, false));
        assert_eq!((index.find(hash, Kind::Counter, &identity), index.len()), (None, 0));
        let identity = Identity::Line { name: &name[..CHUNK - HEAD - UNIT], tags: b"" };
        let hash = index.hash(Kind::Counter, &identity);
        assert!(index.insert(hash, Kind::Counter, &identity, 1, false));
        assert_eq!(index.find(hash, Kind::Counter, &identity), Some(1));
    }
}
