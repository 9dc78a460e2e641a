//! The keys of the topic's records, and the partition of a series.

use serde::{Deserialize, Serialize};

use crate::aggregate::shard::SeriesId;
use crate::sample::{Kind, SeriesKey};
use crate::store::partition;

/// How a delete's key begins; an agent's name has 32 hex digits, so no state's key does.
const DELETE: &str = "delete";

/// What a record is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key<'k> {
    /// An agent's total of a series.
    State(&'k str, SeriesId),
    /// All agents' totals of a series, which begins again.
    Delete(SeriesId),
}

impl<'k> Key<'k> {
    /// Reads a record's key; none if it is not ours.
    pub(super) fn parse(key: &'k [u8]) -> Option<Self> {
        let (whose, series) = str::from_utf8(key).ok()?.split_once(':')?;
        let (letter, key) = series.split_once(':')?;
        let id = SeriesId { kind: Kind::from_letter(letter)?, key: SeriesKey::from_canonical(key) };
        if whose == DELETE {
            return Some(Self::Delete(id));
        }
        (whose.len() == 32 && whose.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(Self::State(whose, id))
    }
}

/// The key of an agent's total.
pub(super) fn state(agent: &str, id: &SeriesId) -> String {
    format!("{agent}:{}:{}", id.kind.letter(), id.key)
}

/// The key of a delete.
pub(super) fn delete(id: &SeriesId) -> String {
    format!("{DELETE}:{}:{}", id.kind.letter(), id.key)
}

/// The partition of all that is said of a series, of so many.
pub(super) fn partition_of(id: &SeriesId, partitions: i32) -> i32 {
    i32::from(partition(&id.key)) % partitions.max(1)
}

/// The value of a delete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Deletion {
    /// The version of this form.
    pub(super) v: u32,
    /// Tells one delete of a series from another.
    pub(super) nonce: String,
    /// The agent that was asked for it.
    pub(super) by: String,
    /// When, in milliseconds since the epoch.
    pub(super) at_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        let agent = "0123456789abcdef0123456789abcdef";
        let id = SeriesId { kind: Kind::Timer, key: SeriesKey::parse("a:b.c;k=v:w") };
        let (state, delete) = (state(agent, &id), delete(&id));
        assert_eq!(Key::parse(state.as_bytes()), Some(Key::State(agent, id.clone())));
        assert_eq!(Key::parse(delete.as_bytes()), Some(Key::Delete(id)));
        for foreign in ["", "a", "x:c:a", "delete:q:a", "delete", &state[1..], &state.replace(":ms:", ":?:")] {
            assert_eq!(Key::parse(foreign.as_bytes()), None, "{foreign}");
        }
        assert_eq!(Key::parse(b"\xff:c:a"), None);
    }
}
