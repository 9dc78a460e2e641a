//! Which sequences a server has applied and could still lose, by the time when it applied them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::store::Partition;

/// Times closer together than this are held as one, in milliseconds.
const SPAN_MS: u64 = 5_000;

/// How many times are told apart: of 5 KiB each at most. Beyond, neighbours join, and wait for the later of their times.
const TIMES_MAX: usize = 512;

/// Applied and not yet stable.
#[derive(Debug, Default)]
pub(super) struct Unstable(VecDeque<Round>);

#[derive(Debug)]
struct Round {
    first_ms: u64,
    last_ms: u64,
    /// The last sequence of each partition.
    sequences: BTreeMap<Partition, u64>,
}

impl Round {
    fn add(&mut self, partition: Partition, sequence: u64) {
        let last = self.sequences.entry(partition).or_default();
        *last = (*last).max(sequence);
    }

    fn join(&mut self, later: Self) {
        self.last_ms = self.last_ms.max(later.last_ms);
        later.sequences.into_iter().for_each(|(partition, sequence)| self.add(partition, sequence));
    }
}

impl Unstable {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The partitions of which not all is stable.
    pub(super) fn partitions(&self) -> BTreeSet<Partition> {
        self.0.iter().flat_map(|round| round.sequences.keys().copied()).collect()
    }

    /// The server has applied a partition up to this sequence, at this time of its clock.
    pub(super) fn applied(&mut self, now_ms: u64, partition: Partition, sequence: u64) {
        if sequence == 0 {
            return;
        }
        match self.0.back_mut().filter(|last| now_ms < last.first_ms + SPAN_MS) {
            Some(last) => {
                last.last_ms = last.last_ms.max(now_ms);
                last.add(partition, sequence);
            }
            None => {
                let sequences = BTreeMap::from([(partition, sequence)]);
                self.0.push_back(Round { first_ms: now_ms, last_ms: now_ms, sequences });
            }
        }
        if self.0.len() > TIMES_MAX {
            self.halve();
        }
    }

    /// Takes out what was applied before a time: the partitions with their last sequences.
    pub(super) fn stable_before(&mut self, time_ms: u64) -> Vec<(Partition, u64)> {
        let mut stable: Option<Round> = None;
        while self.0.front().is_some_and(|round| round.last_ms < time_ms)
            && let Some(round) = self.0.pop_front()
        {
            match &mut stable {
                Some(stable) => stable.join(round),
                None => stable = Some(round),
            }
        }
        stable.map_or_else(Vec::new, |round| round.sequences.into_iter().collect())
    }

    /// Takes out what there is of a partition up to a sequence.
    pub(super) fn stable_upto(&mut self, partition: Partition, sequence: u64) {
        for round in &mut self.0 {
            if round.sequences.get(&partition).is_some_and(|last| *last <= sequence) {
                round.sequences.remove(&partition);
            }
        }
        self.0.retain(|round| !round.sequences.is_empty());
    }

    fn halve(&mut self) {
        let mut halved = VecDeque::with_capacity(self.0.len());
        while let Some(mut round) = self.0.pop_front() {
            if let Some(later) = self.0.pop_front() {
                round.join(later);
            }
            halved.push_back(round);
        }
        self.0 = halved;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_stable_before_its_time_and_all_is_after() {
        let mut unstable = Unstable::default();
        for round in 1..=2_000_u64 {
            unstable.applied(round * 6_000, 3, round);
            unstable.applied(round * 6_000, 200, 2 * round);
        }
        assert!(unstable.0.len() <= TIMES_MAX);
        let mut last = 0;
        for round in 1..=2_000_u64 {
            for (partition, sequence) in unstable.stable_before(round * 6_000) {
                assert!(sequence < if partition == 3 { round } else { 2 * round });
                last = last.max(sequence);
            }
        }
        assert!(last >= 2 * 1_900, "the newest are told apart: {last}");
        assert_eq!(unstable.stable_before(u64::MAX), [(3, 2_000), (200, 4_000)]);
        assert!(unstable.is_empty());
    }

    #[test]
    fn times_close_together_wait_for_the_last() {
        let mut unstable = Unstable::default();
        unstable.applied(1_000, 0, 1);
        unstable.applied(2_000, 0, 2);
        unstable.applied(9_000, 1, 7);
        assert_eq!(unstable.stable_before(2_000), []);
        assert_eq!(unstable.stable_before(2_001), [(0, 2)]);
        assert_eq!(unstable.stable_before(9_001), [(1, 7)]);
    }

    #[test]
    fn what_replicas_have_is_out_whenever_it_was_applied() {
        let mut unstable = Unstable::default();
        unstable.applied(1_000, 0, 1);
        unstable.applied(1_000, 1, 5);
        unstable.applied(9_000, 0, 2);
        unstable.stable_upto(0, 1);
        assert_eq!(unstable.partitions(), BTreeSet::from([0, 1]));
        unstable.stable_upto(0, 3);
        unstable.stable_upto(1, 4);
        assert_eq!(unstable.partitions(), BTreeSet::from([1]));
        unstable.stable_upto(1, 5);
        assert!(unstable.is_empty());
    }
}
