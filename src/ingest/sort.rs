//! JSON records of a body that are to go elsewhere: those that would be accepted here, each with its name and its text.
//!
//! They are counted as lines and samples as if they were counted here, and bad ones are rejected in the same words, but
//! nothing of them reaches the shard.

use super::Core;
use crate::protocol::{Event, Reject, ServiceCheck, Sink};
use crate::sample::{Identity, Sample, SeriesKey};

/// A record that is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sorted {
    /// The dotted name: level and name.
    pub name: String,
    /// The record as it was sent.
    pub record: Vec<u8>,
}

/// Sorts good records from bad ones.
pub(super) struct Sorting<'w> {
    pub(super) core: &'w mut Core,
    pub(super) sorted: Vec<Sorted>,
}

impl Sink for Sorting<'_> {
    fn sample(&mut self, sample: &Sample<'_>) {
        // Only lines have an identity of another form, and a body has none.
        let Identity::Key(key) = sample.identity else { return };
        let name = SeriesKey::from_canonical(key).name().into_owned();
        self.sorted.push(Sorted { name, record: sample.fields.to_vec() });
        self.core.accepted = true;
        self.core.tally.of(self.core.source.listener).samples += sample.value.count() as u64;
    }

    fn event(&mut self, event: &Event<'_>) {
        self.core.event(event);
    }

    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        self.core.service_check(check);
    }

    fn reject(&mut self, reject: &Reject<'_>) {
        self.core.reject(reject);
    }

    fn bad_tags(&mut self, count: u32) {
        self.core.bad_tags(count);
    }

    fn line_end(&mut self) {
        self.core.line_end();
    }
}
