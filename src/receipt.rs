//! What a request was told under its `Idempotency-Key`.
//!
//! A receipt goes the way of the request's samples: with them in one seal, in one flush and in one transaction of the
//! journal. So after a crash either both are there, and a retry is told what the first request was, or neither is, and a
//! retry counts. It names nothing; `limits.idempotency_keys` bounds how many are kept, and the constants here how old and
//! how large they become.

use std::sync::Arc;

use bytes::Bytes;

/// How long a receipt is kept, in milliseconds.
pub const AGE_MAX_MS: u64 = 24 * 3_600_000;

/// How many bytes of keys and texts are kept.
pub const BYTES_MAX: usize = 32 << 20;

/// The answer to one request that counted something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The request's `Idempotency-Key`.
    pub key: Arc<[u8]>,
    /// Whether the text is JSON; else it is plain text.
    pub is_json: bool,
    /// The text of the answer.
    pub text: Bytes,
    /// When it was given, by [`crate::clock::steady_ms`].
    pub at_ms: u64,
}

impl Receipt {
    /// The bytes of key and text.
    pub fn bytes(&self) -> usize {
        self.key.len() + self.text.len()
    }

    /// Whether it is to be forgotten.
    pub const fn is_old(at_ms: u64, now_ms: u64) -> bool {
        at_ms.saturating_add(AGE_MAX_MS) <= now_ms
    }
}
