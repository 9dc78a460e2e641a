//! Distinct members.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The distinct members of a set.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Members {
    members: BTreeSet<Vec<u8>>,
}

impl Members {
    /// Adds a member.
    pub fn insert(&mut self, member: &[u8]) {
        self.members.insert(member.to_vec());
    }

    /// Adds another's members.
    pub fn merge(&mut self, other: &Self) {
        self.members.extend(other.members.iter().cloned());
    }

    /// How many there are.
    pub fn cardinality(&self) -> u64 {
        self.members.len() as u64
    }
}
