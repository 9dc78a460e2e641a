//! The limit that aggregating is measured beside: one look-up in a private hash table for each sample, and the smallest
//! figure that each kind can keep: a sum, a last value, four figures of a timer without its distribution, the hashes of
//! a set's members. It checks nothing, bounds nothing, counts no lines and is never emptied.

use std::hash::{BuildHasher, Hash, Hasher};

use foldhash::fast::FixedState;
use hashbrown::{Equivalent, HashMap, HashSet};
use tallyd::protocol::{Event, Reject, ServiceCheck, Sink};
use tallyd::sample::{Identity, Kind, Sample, Value};

/// The limit's table.
#[derive(Default)]
pub(crate) struct Table(HashMap<Key, Kept, FixedState>);

impl Table {
    /// How many series it holds.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

#[derive(PartialEq, Eq)]
struct Key {
    kind: Kind,
    name: Box<[u8]>,
    tags: Box<[u8]>,
}

/// A [`Key`] as it stands in a packet.
struct Spelled<'a> {
    kind: Kind,
    name: &'a [u8],
    tags: &'a [u8],
}

impl Hash for Spelled<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(self.kind as u8);
        state.write(self.name);
        state.write(self.tags);
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Spelled { kind: self.kind, name: &self.name, tags: &self.tags }.hash(state);
    }
}

impl Equivalent<Key> for Spelled<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.kind == key.kind && *self.name == *key.name && *self.tags == *key.tags
    }
}

enum Kept {
    Sum(f64),
    Last(f64),
    Observed { count: f64, sum: f64, min: f64, max: f64 },
    Members(HashSet<u64, FixedState>),
}

impl Kept {
    fn new(kind: Kind) -> Self {
        match kind {
            Kind::Counter | Kind::Meter => Self::Sum(0.0),
            Kind::Gauge => Self::Last(0.0),
            Kind::Timer | Kind::Histogram | Kind::Distribution => {
                Self::Observed { count: 0.0, sum: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY }
            }
            Kind::Set => Self::Members(HashSet::default()),
        }
    }

    fn add(&mut self, value: &Value<'_>, rate: f64) {
        match (self, *value) {
            (Self::Sum(sum), Value::Numbers([number])) => *sum += number / rate,
            (Self::Last(last), Value::Numbers([number])) => *last = *number,
            (Self::Observed { count, sum, min, max }, Value::Numbers([number])) => {
                *count += 1.0 / rate;
                *sum += number;
                *min = min.min(*number);
                *max = max.max(*number);
            }
            (Self::Members(members), Value::Member(member)) => {
                members.insert(hash(member));
            }
            (Self::Sum(_) | Self::Last(_) | Self::Observed { .. } | Self::Members(_), _) => {
                unreachable!("the load has no such line")
            }
        }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = FixedState::default().build_hasher();
    hasher.write(bytes);
    hasher.finish()
}

impl Sink for Table {
    #[inline]
    fn sample(&mut self, sample: &Sample<'_>) {
        let Identity::Line { name, tags } = sample.identity else { return };
        let spelled = Spelled { kind: sample.wire.kind(), name, tags };
        match self.0.get_mut(&spelled) {
            Some(kept) => kept.add(&sample.value, sample.rate),
            None => {
                let mut kept = Kept::new(spelled.kind);
                kept.add(&sample.value, sample.rate);
                self.0.insert(Key { kind: spelled.kind, name: name.into(), tags: tags.into() }, kept);
            }
        }
    }
    fn event(&mut self, _: &Event<'_>) {}
    fn service_check(&mut self, _: &ServiceCheck<'_>) {}
    fn reject(&mut self, _: &Reject<'_>) {}
    fn bad_tags(&mut self, _: u32) {}
    fn line_end(&mut self) {}
}
