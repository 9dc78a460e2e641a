//! Answers remembered by their `Idempotency-Key`, so that a client which never saw one may ask again.
//!
//! Only answers of requests that counted something are kept: the others can be sent again without harm, and better. For
//! 24 hours, no more than `limits.idempotency_keys` and 32 MiB of text; the oldest go. The journal keeps the same ones,
//! each with the samples of its request; here they are in memory, and read back from there at the start.
//!
//! Metric: `tallyd_idempotency_keys_forgotten_total`.

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::receipt::{BYTES_MAX, Receipt};
use crate::telemetry;

/// The answers of the last day.
#[derive(Debug)]
pub(super) struct Answers {
    by_key: HashMap<Arc<[u8]>, Receipt>,
    /// Oldest first. Each key stands here once, because an answer is never replaced.
    order: VecDeque<Arc<[u8]>>,
    bytes: usize,
    max: usize,
}

impl Answers {
    /// With those of earlier processes, oldest first.
    pub(super) fn new(max: usize, earlier: Vec<Receipt>) -> Self {
        telemetry::IDEMPOTENCY_FORGOTTEN.begin([[]]);
        let mut answers = Self { by_key: HashMap::new(), order: VecDeque::new(), bytes: 0, max };
        for receipt in earlier {
            let at_ms = receipt.at_ms;
            answers.put(receipt, at_ms);
        }
        answers
    }

    /// The first answer under a key.
    pub(super) fn get(&mut self, key: &[u8], now_ms: u64) -> Option<Receipt> {
        self.forget(now_ms);
        self.by_key.get(key).cloned()
    }

    /// Remembers the first answer under a key.
    pub(super) fn put(&mut self, receipt: Receipt, now_ms: u64) {
        if self.by_key.contains_key(&receipt.key) {
            return;
        }
        self.bytes += receipt.bytes();
        self.order.push_back(Arc::clone(&receipt.key));
        self.by_key.insert(Arc::clone(&receipt.key), receipt);
        self.forget(now_ms);
    }

    fn forget(&mut self, now_ms: u64) {
        while let Some(oldest) = self.order.front() {
            let old = self.by_key.get(oldest).is_none_or(|answer| Receipt::is_old(answer.at_ms, now_ms));
            if !old && self.order.len() <= self.max && self.bytes <= BYTES_MAX {
                return;
            }
            if let Some(answer) = self.by_key.remove(oldest) {
                self.bytes -= answer.bytes();
                telemetry::IDEMPOTENCY_FORGOTTEN.counter(&[]).increment(u64::from(!old));
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::receipt::AGE_MAX_MS;

    fn key(n: usize) -> Arc<[u8]> {
        n.to_string().into_bytes().into()
    }

    fn receipt(n: usize, text: impl Into<Bytes>, at_ms: u64) -> Receipt {
        Receipt { key: key(n), is_json: true, text: text.into(), at_ms }
    }

    #[test]
    fn the_first_answer_stays_and_the_oldest_go() {
        let mut answers = Answers::new(3, vec![receipt(0, "first 0", 0), receipt(1, "first 1", 1)]);
        for n in 0..5 {
            answers.put(receipt(n, format!("first {n}"), n as u64), n as u64);
            answers.put(receipt(n, "second", n as u64), n as u64);
        }
        let kept: Vec<_> = (0..5).map(|n| answers.get(&key(n), 5).map(|answer| answer.text)).collect();
        let first = |n| Some(Bytes::from(format!("first {n}")));
        assert_eq!(kept, [None, None, first(2), first(3), first(4)]);
        assert_eq!(answers.get(&key(2), AGE_MAX_MS + 2), None);
        assert!(answers.get(&key(3), AGE_MAX_MS + 2).is_some());
    }

    #[test]
    fn long_answers_are_bounded_by_their_bytes() {
        let mut answers = Answers::new(usize::MAX, Vec::new());
        for n in 0..40 {
            answers.put(receipt(n, vec![b'x'; 1 << 20], 0), 0);
        }
        assert!(answers.bytes <= BYTES_MAX);
        assert!(answers.get(&key(39), 0).is_some());
        assert!(answers.get(&key(0), 0).is_none());
        assert_eq!(answers.order.len(), answers.by_key.len());
    }
}
