//! What all shards of an agent may hold together: how many series, in how much memory, and how fast and from where new
//! ones come.
//!
//! It is asked when an identity is first seen and when a fold lets a series grow, never on the way of a sample. A series
//! that the ledger holds is not new, however late a shard sees it: at a start all that the journal gave back is there. One
//! that only the journal still knows, because it was idle, counts as new, since looking there would let a worker wait for a disk.
//!
//! A worker may begin before the ledger is read back. Until then nobody can tell what is new: every series is taken for
//! known that fits.
//!
//! Limits: `series`, `memory`, `new_series`, `source_share`. Past them samples go to `_overflow`, counted by [`Refusal`] in
//! `tallyd_series_refused_total`.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};

use foldhash::fast::RandomState;
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::series;
use super::shard::SeriesId;
use crate::sample::Kind;
use crate::units::Size;

/// The rows of `[limits]` that bound series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How many series there may be.
    pub series: u64,
    /// How much memory they may take.
    pub memory: Size,
    /// How many of them may be new in one second.
    pub new_series: u32,
    /// Which part of `series` one source address may have made, 0 to 1.
    pub source_share: f64,
    /// What each of them keeps.
    #[serde(flatten)]
    pub each: series::Limits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            series: 1_000_000,
            memory: Size(512 << 20),
            new_series: 50_000,
            source_share: 0.5,
            each: series::Limits::default(),
        }
    }
}

/// Why a new identity goes to `_overflow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// There is no room for its series: `series` or `memory`.
    Budget,
    /// Too many were new in this second: `new_series`.
    Rate,
    /// Its source has made too many of those there are: `source_share`.
    Source,
}

impl Refusal {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Budget, Self::Rate, Self::Source];

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Budget => "budget",
            Self::Rate => "rate",
            Self::Source => "source",
        }
    }
}

/// When an identity is seen for the first time, and from where.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sight {
    /// The time in milliseconds since the epoch.
    pub at_ms: u64,
    /// The sender's address; none for one that may make as many series as there are: a process of this machine.
    pub source: Option<IpAddr>,
}

/// What all shards of an agent may still hold.
#[derive(Debug)]
pub struct Budget {
    series: AtomicI64,
    bytes: AtomicI64,
    series_max: i64,
    bytes_max: i64,
    rate: Rate,
    sources: Sources,
    ledger: Option<Arc<Ledger>>,
    /// Whether all that the journal has is in the ledger.
    is_read_back: AtomicBool,
    is_remote: bool,
    each: series::Limits,
}

/// What a series of a kind costs beside the bytes of its key and beside what its total and windows keep on the heap: its
/// slots in index, cells and ledger, and the allocator's own. Measured by `cargo bench --bench memory`: resident memory of an agent with
/// `store.kind = "memory"`, one worker and 100,000 series of 30-byte names. Cells are not charged by what they keep: they are
/// empty again after each seal.
const fn identity_bytes(kind: Kind) -> i64 {
    match kind {
        Kind::Counter | Kind::Gauge => 405,
        Kind::Timer | Kind::Histogram | Kind::Distribution => 540,
        Kind::Meter => 560,
        Kind::Set => 640,
    }
}

/// What a series costs besides with a remote store: its delta that no batch carries yet, and the batch on its way.
const UNSHIPPED_BYTES: i64 = 700;

/// What a further spelling costs beside its bytes.
const SPELLING_BYTES: i64 = 40;

/// New series leave this part of the memory for the growth of those there are: a flood of names takes no precision from them.
const GROWTH_PART: i64 = 8;

impl Budget {
    /// A budget nothing is charged to, to which every identity is new.
    pub fn new(limits: &Limits) -> Self {
        let series_max = i64::try_from(limits.series).unwrap_or(i64::MAX);
        Self {
            series: AtomicI64::new(0),
            bytes: AtomicI64::new(0),
            series_max,
            bytes_max: i64::try_from(limits.memory.0).unwrap_or(i64::MAX),
            rate: Rate { per_second: limits.new_series, state: AtomicU64::new(0) },
            sources: Sources::new((series_max as f64 * limits.source_share) as u64),
            ledger: None,
            is_read_back: AtomicBool::new(true),
            is_remote: false,
            each: limits.each,
        }
    }

    /// The budget of an agent with this ledger, whose series are paid for, and to which [`Budget::ledger_is_read_back`] is still to
    /// be said. With `is_remote` deltas wait there for a store.
    pub fn beside(ledger: Arc<Ledger>, limits: &Limits, is_remote: bool) -> Self {
        Self { ledger: Some(ledger), is_read_back: AtomicBool::new(false), is_remote, ..Self::new(limits) }
    }

    /// From now on what the ledger does not hold is new.
    pub fn ledger_is_read_back(&self) {
        self.is_read_back.store(true, Ordering::Release);
    }

    /// What each series may keep.
    pub fn each(&self) -> &series::Limits {
        &self.each
    }

    /// Takes a series that a shard sees first, or says why not. What was taken is given back by [`Budget::release`].
    pub(super) fn admit(&self, id: &SeriesId, sight: Sight) -> Result<Owner, Refusal> {
        let cost = self.cost(id);
        if !self.is_read_back.load(Ordering::Acquire) {
            return self.charge_within(1, cost, self.bytes_max).then_some(NOBODY).ok_or(Refusal::Budget);
        }
        if self.is_known(id) {
            // Paid for twice until the fold hears that this shard holds it too.
            self.force(1, cost);
            return Ok(NOBODY);
        }
        if self.series.load(Ordering::Relaxed) >= self.series_max {
            // So that a flood of new names beyond the limit only reads what all workers share.
            return Err(Refusal::Budget);
        }
        let owner = sight.source.map_or(NOBODY, |source| self.sources.owner(source));
        if !self.sources.take(owner) {
            return Err(Refusal::Source);
        }
        // After the source, so that one which is refused takes nothing from the others.
        let refusal = if !self.rate.take(sight.at_ms) {
            Some(Refusal::Rate)
        } else {
            (!self.charge_within(1, cost, self.bytes_max - self.bytes_max / GROWTH_PART)).then_some(Refusal::Budget)
        };
        match refusal {
            Some(refusal) => {
                self.sources.give_back(owner);
                Err(refusal)
            }
            None => Ok(owner),
        }
    }

    /// Whether the ledger has a series, or nobody can tell yet.
    pub(super) fn is_known(&self, id: &SeriesId) -> bool {
        !self.is_read_back.load(Ordering::Acquire) || self.ledger.as_ref().is_some_and(|ledger| ledger.contains(id))
    }

    /// Takes a series that must be there, `_overflow`.
    pub(super) fn admit_always(&self, id: &SeriesId) -> Owner {
        self.force(1, self.cost(id));
        NOBODY
    }

    /// Gives back what [`Budget::admit`] took.
    pub(super) fn release(&self, id: &SeriesId, owner: Owner) {
        self.sources.give_back(owner);
        self.refund(1, self.cost(id));
    }

    /// Takes bytes for what grew, if there is room, or gives back those of what shrank.
    pub(super) fn charge_change(&self, bytes: i64) -> bool {
        match bytes {
            0 => true,
            ..0 => {
                self.refund(0, -bytes);
                true
            }
            1.. => self.charge(bytes),
        }
    }

    /// Takes bytes for what grew, if there is room.
    pub(super) fn charge(&self, bytes: i64) -> bool {
        self.charge_within(0, bytes, self.bytes_max)
    }

    /// Takes so many series and bytes, if there is room for both.
    fn charge_within(&self, series: i64, bytes: i64, bytes_max: i64) -> bool {
        let held = self.series.fetch_add(series, Ordering::Relaxed) + series;
        let held_bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let fits = (series == 0 || held <= self.series_max) && held_bytes <= bytes_max;
        if !fits {
            self.refund(series, bytes);
        }
        fits
    }

    /// Gives series and bytes back.
    pub fn refund(&self, series: i64, bytes: i64) {
        self.series.fetch_sub(series, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Charges what could not be refused, as what the journal holds at a start.
    pub fn force(&self, series: i64, bytes: i64) {
        self.refund(-series, -bytes);
    }

    /// Bytes charged now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed).max(0) as u64
    }

    /// What a series is charged, but for what it grows to: see `charge`.
    pub fn cost(&self, id: &SeriesId) -> i64 {
        let unshipped = if self.is_remote { UNSHIPPED_BYTES } else { 0 };
        identity_bytes(id.kind) + unshipped + 2 * id.key.as_str().len() as i64
    }
}

/// What each further spelling of a series is charged, by its length.
pub(super) fn spelling_cost(bytes: usize) -> i64 {
    SPELLING_BYTES + bytes as i64
}

/// How many were new in the present second: the second in the upper half, the number in the lower.
#[derive(Debug)]
struct Rate {
    per_second: u32,
    state: AtomicU64,
}

/// By how many seconds the clocks of workers may lie apart; by more, the clock was set back.
const APART_MAX: u32 = 2;

impl Rate {
    fn take(&self, at_ms: u64) -> bool {
        let second = (at_ms / 1_000) as u32;
        let one_more = |state: u64| {
            let (begun, taken) = ((state >> 32) as u32, state as u32);
            let goes_on = begun.checked_sub(second).is_some_and(|behind| behind <= APART_MAX);
            let (begun, taken) = if goes_on { (begun, taken) } else { (second, 0) };
            (taken < self.per_second).then(|| u64::from(begun) << 32 | u64::from(taken + 1))
        };
        self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }
}

/// The place of a source among [`Sources`].
pub(super) type Owner = u16;

/// Owns as many series as there are.
const NOBODY: Owner = Owner::MAX;

/// How many sources are told apart. Those beyond have one share together.
const SOURCES_MAX: usize = 4_096;

/// How many series the sources have made of those there are. A source that several workers hear counts a series once for
/// each of them that saw it before the first fold.
#[derive(Debug)]
struct Sources {
    owners: papaya::HashMap<IpAddr, Owner, RandomState>,
    next: AtomicUsize,
    held: Box<[AtomicU64]>,
    max: u64,
}

impl Sources {
    fn new(max: u64) -> Self {
        let owners = papaya::HashMap::builder().hasher(RandomState::default()).build();
        Self { owners, next: AtomicUsize::new(0), held: (0..=SOURCES_MAX).map(|_| AtomicU64::new(0)).collect(), max }
    }

    fn owner(&self, source: IpAddr) -> Owner {
        let owners = self.owners.pin();
        if let Some(owner) = owners.get(&source) {
            return *owner;
        }
        if self.next.load(Ordering::Relaxed) >= SOURCES_MAX {
            return SOURCES_MAX as Owner;
        }
        let next = || self.next.fetch_add(1, Ordering::Relaxed).min(SOURCES_MAX) as Owner;
        *owners.get_or_insert_with(source, next)
    }

    /// Counts one more, if the owner may have it.
    fn take(&self, owner: Owner) -> bool {
        let Some(held) = self.held.get(usize::from(owner)) else { return true };
        let fits = held.fetch_add(1, Ordering::Relaxed) < self.max;
        if !fits {
            held.fetch_sub(1, Ordering::Relaxed);
        }
        fits
    }

    fn give_back(&self, owner: Owner) {
        if let Some(held) = self.held.get(usize::from(owner)) {
            held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::SeriesKey;

    fn id(name: &str) -> SeriesId {
        SeriesId { kind: Kind::Counter, key: SeriesKey::parse(name) }
    }

    fn from(source: &str, at_ms: u64) -> Sight {
        Sight { at_ms, source: Some(source.parse().unwrap()) }
    }

    #[test]
    fn each_second_takes_so_many_new_series_whatever_the_clock_does() {
        let budget = Budget::new(&Limits { new_series: 3, ..Limits::default() });
        let admitted = |at_ms| {
            let sight = Sight { at_ms, source: None };
            (0..5).map(|_| budget.admit(&id("a"), sight)).filter(Result::is_ok).count()
        };
        assert_eq!((admitted(10_000), admitted(10_999), admitted(11_000)), (3, 0, 3));
        assert_eq!(admitted(9_500), 0, "a worker that is a little behind");
        assert_eq!((admitted(4_000), admitted(4_001)), (3, 0), "the clock was set back");
        assert_eq!(budget.admit(&id("a"), Sight { at_ms: 4_002, source: None }), Err(Refusal::Rate));
    }

    #[test]
    fn a_source_has_its_share_and_gets_back_what_expires() {
        let budget = Budget::new(&Limits { series: 10, ..Limits::default() });
        let owner = budget.admit(&id("a"), from("192.0.2.1", 1)).unwrap();
        let more = (0..9).map(|_| budget.admit(&id("a"), from("192.0.2.1", 1)));
        assert_eq!(more.filter(|taken| *taken == Err(Refusal::Source)).count(), 5);
        assert!(budget.admit(&id("a"), from("192.0.2.2", 1)).is_ok(), "another");
        budget.release(&id("a"), owner);
        assert!(budget.admit(&id("a"), from("192.0.2.1", 1)).is_ok());
        assert!((0..4).all(|_| budget.admit(&id("a"), Sight::default()).is_ok()), "this machine");
        assert_eq!(budget.admit(&id("a"), Sight::default()), Err(Refusal::Budget));
    }

    #[test]
    fn sources_beyond_those_told_apart_share_one_share() {
        let sources = Sources::new(1);
        let owners: Vec<_> = (0..5_000_u32).map(|n| sources.owner(IpAddr::from(n.to_be_bytes()))).collect();
        assert_eq!((owners[0], owners[4_095], owners[4_096], owners[4_999]), (0, 4_095, 4_096, 4_096));
        assert!(sources.take(owners[4_096]) && !sources.take(owners[4_999]) && sources.take(owners[7]));
    }
}
