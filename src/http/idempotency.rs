//! Answers remembered by their `Idempotency-Key`, so that a client which never saw one may ask again.
//!
//! Only answers of requests that counted something are kept: the others can be sent again without harm, and better. In
//! memory, for 24 hours, no more than `limits.idempotency_keys` and 32 MiB of text; the oldest go.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use hashbrown::HashMap;

const AGE_MAX: Duration = Duration::from_secs(24 * 3600);
const BYTES_MAX: usize = 32 << 20;

/// An answer as it was first given.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Remembered {
    pub(super) media_type: &'static str,
    pub(super) text: Bytes,
    at: Duration,
}

/// The answers of the last day.
#[derive(Debug)]
pub(super) struct Answers {
    by_key: HashMap<Rc<[u8]>, Remembered>,
    /// Oldest first. Each key stands here once, because an answer is never replaced.
    order: VecDeque<Rc<[u8]>>,
    bytes: usize,
    max: usize,
}

impl Answers {
    pub(super) fn new(max: usize) -> Self {
        Self { by_key: HashMap::new(), order: VecDeque::new(), bytes: 0, max }
    }

    /// The first answer under a key.
    pub(super) fn get(&mut self, key: &[u8], now: Duration) -> Option<Remembered> {
        self.forget(now);
        self.by_key.get(key).cloned()
    }

    /// Remembers the first answer under a key.
    pub(super) fn put(&mut self, key: Box<[u8]>, media_type: &'static str, text: Bytes, now: Duration) {
        let key: Rc<[u8]> = key.into();
        if self.by_key.contains_key(&key) {
            return;
        }
        self.bytes += key.len() + text.len();
        self.order.push_back(Rc::clone(&key));
        self.by_key.insert(key, Remembered { media_type, text, at: now });
        self.forget(now);
    }

    fn forget(&mut self, now: Duration) {
        while let Some(oldest) = self.order.front() {
            let old = self.by_key.get(oldest).is_none_or(|answer| answer.at + AGE_MAX <= now);
            if !old && self.order.len() <= self.max && self.bytes <= BYTES_MAX {
                return;
            }
            if let Some(answer) = self.by_key.remove(oldest) {
                self.bytes -= oldest.len() + answer.text.len();
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Box<[u8]> {
        n.to_string().into_bytes().into()
    }

    #[test]
    fn the_first_answer_stays_and_the_oldest_go() {
        let mut answers = Answers::new(3);
        for n in 0..5 {
            answers.put(key(n), "a", Bytes::from(format!("first {n}")), Duration::from_secs(n as u64));
            answers.put(key(n), "a", Bytes::from("second"), Duration::from_secs(n as u64));
        }
        let now = Duration::from_secs(5);
        let kept: Vec<_> = (0..5).map(|n| answers.get(&key(n), now).map(|answer| answer.text)).collect();
        let first = |n| Some(Bytes::from(format!("first {n}")));
        assert_eq!(kept, [None, None, first(2), first(3), first(4)]);
        assert_eq!(answers.get(&key(2), AGE_MAX + Duration::from_secs(2)), None);
        assert!(answers.get(&key(3), AGE_MAX + Duration::from_secs(2)).is_some());
    }

    #[test]
    fn long_answers_are_bounded_by_their_bytes() {
        let mut answers = Answers::new(usize::MAX);
        for n in 0..40 {
            answers.put(key(n), "a", Bytes::from(vec![b'x'; 1 << 20]), Duration::ZERO);
        }
        assert!(answers.bytes <= BYTES_MAX);
        assert!(answers.get(&key(39), Duration::ZERO).is_some());
        assert!(answers.get(&key(0), Duration::ZERO).is_none());
        assert_eq!(answers.order.len(), answers.by_key.len());
    }
}
