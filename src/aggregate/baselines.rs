//! The last readings of absolute counters, by series and host. A reading counts its difference to the last one of the
//! same host, whichever worker had that: the kernel spreads the sockets of a host over all workers.
//!
//! So all shards share one table, and a line of this type takes a lock. Lines of other types never come here. Of
//! 65,536 pairs of series and host the table remembers no more; then one of them makes way, and is counted.

use std::hash::BuildHasher;
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use crate::sample::Identity;

/// Tables, so that workers seldom meet at one lock.
const PARTS: usize = 16;

/// Pairs in each of them.
const PAIRS_MAX: usize = 4_096;

/// What a reading counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// How much the counter rose.
    pub increment: f64,
    /// Whether another pair was forgotten to make room, so that its next reading counts nothing.
    pub evicted: bool,
}

/// The last reading of each pair of series and host, both as hashes.
type Last = HashMap<(u64, u64), f64, RandomState>;

/// The table.
#[derive(Debug)]
pub struct Baselines {
    hasher: RandomState,
    parts: [Mutex<Last>; PARTS],
}

impl Default for Baselines {
    fn default() -> Self {
        let hasher = RandomState::default();
        let parts = std::array::from_fn(|_| Mutex::new(HashMap::with_hasher(hasher.clone())));
        Self { hasher, parts }
    }
}

impl Baselines {
    /// Takes a reading: nothing for the first one of a host, and all of the new value after a fall.
    pub fn step(&self, identity: &Identity<'_>, host: u64, reading: f64) -> Step {
        let pair = (self.hash(identity), host);
        let part = &self.parts[pair.0 as usize % PARTS];
        let mut last = part.lock().unwrap_or_else(PoisonError::into_inner);
        let any = if last.len() >= PAIRS_MAX && !last.contains_key(&pair) { last.keys().next().copied() } else { None };
        let evicted = any.is_some_and(|any| last.remove(&any).is_some());
        let increment = match last.insert(pair, reading) {
            None => 0.0,
            Some(last) if reading >= last => reading - last,
            Some(_) => reading,
        };
        Step { increment, evicted }
    }

    /// Of an identity as it is spelled: a client spells its series one way.
    fn hash(&self, identity: &Identity<'_>) -> u64 {
        match identity {
            Identity::Line { name, tags } => self.hasher.hash_one((name, tags)),
            Identity::Key(key) => self.hasher.hash_one(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Identity<'_> {
        Identity::Line { name: name.as_bytes(), tags: b"" }
    }

    #[test]
    fn a_reading_counts_from_the_last_of_its_host() {
        let baselines = Baselines::default();
        let step = |name: &str, host, reading| baselines.step(&named(name), host, reading).increment;
        assert_eq!(step("a", 1, 100.0), 0.0, "the baseline");
        assert_eq!(step("a", 1, 104.0), 4.0);
        assert_eq!(step("a", 2, 50.0), 0.0, "another host");
        assert_eq!(step("b", 1, 7.0), 0.0, "another series");
        assert_eq!(step("a", 1, 3.0), 3.0, "it began again");
        assert_eq!(step("a", 2, 50.5), 0.5);
    }

    #[test]
    fn it_remembers_so_many_pairs_and_says_when_one_makes_way() {
        let baselines = Baselines::default();
        let evicted = (0..2 * PARTS * PAIRS_MAX)
            .filter(|number| baselines.step(&named(&number.to_string()), 1, 1.0).evicted)
            .count();
        let held: usize = baselines.parts.iter().map(|part| part.lock().unwrap().len()).sum();
        assert_eq!(held + evicted, 2 * PARTS * PAIRS_MAX);
        assert!(held <= PARTS * PAIRS_MAX);
    }
}
