//! Which sequences the store has applied and could still lose, by the time when it applied them.

use std::collections::VecDeque;

use crate::store::Partition;

/// Times closer together than this are held as one, in milliseconds.
const SPAN_MS: u64 = 5_000;

/// How many times are told apart: of 2 KiB each. Beyond, neighbours join, and wait for the later of their times.
const TIMES_MAX: usize = 512;

/// Applied and not yet stable.
#[derive(Debug, Default)]
pub(super) struct Unstable(VecDeque<Round>);

#[derive(Debug)]
struct Round {
    first_ms: u64,
    last_ms: u64,
    /// The last sequence of each partition; 0 for none.
    sequences: Vec<u64>,
}

impl Round {
    fn join(&mut self, later: &Self) {
        self.last_ms = self.last_ms.max(later.last_ms);
        for (sequence, later) in self.sequences.iter_mut().zip(&later.sequences) {
            *sequence = (*sequence).max(*later);
        }
    }
}

impl Unstable {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The store has applied partitions up to these sequences, the last of them at this time of its clock.
    pub(super) fn applied(&mut self, now_ms: u64, sequences: impl Iterator<Item = (Partition, u64)>) {
        let mut round =
            Round { first_ms: now_ms, last_ms: now_ms, sequences: vec![0; usize::from(Partition::MAX) + 1] };
        for (partition, sequence) in sequences {
            round.sequences[usize::from(partition)] = sequence;
        }
        if round.sequences.iter().all(|sequence| *sequence == 0) {
            return;
        }
        match self.0.back_mut().filter(|last| now_ms < last.first_ms + SPAN_MS) {
            Some(last) => last.join(&round),
            None => self.0.push_back(round),
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
                Some(stable) => stable.join(&round),
                None => stable = Some(round),
            }
        }
        let sequences = stable.map_or_else(Vec::new, |round| round.sequences);
        (0..=Partition::MAX).zip(sequences).filter(|(_, sequence)| *sequence > 0).collect()
    }

    fn halve(&mut self) {
        let mut halved = VecDeque::with_capacity(self.0.len());
        while let Some(mut round) = self.0.pop_front() {
            if let Some(later) = self.0.pop_front() {
                round.join(&later);
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
            unstable.applied(round * 6_000, [(3, round), (200, 2 * round)].into_iter());
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
        unstable.applied(1_000, [(0, 1)].into_iter());
        unstable.applied(2_000, [(0, 2)].into_iter());
        unstable.applied(9_000, [(1, 7)].into_iter());
        assert_eq!(unstable.stable_before(2_000), []);
        assert_eq!(unstable.stable_before(2_001), [(0, 2)]);
        assert_eq!(unstable.stable_before(9_001), [(1, 7)]);
    }
}
