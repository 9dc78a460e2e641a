//! The ledger: each series' cumulative state on this agent and its windows, in sharded lock-free maps.
//!
//! One thread, which owns the [`Writer`](super::fold::Writer), folds sealed cells in. Scrape, API and flush read beside
//! it. Looking a series up takes no lock. Its figures stand behind one of their own, which is held while a few words are
//! written, or copied, or pointers to more are: never for longer, whatever a series keeps, so a reader does not hold up
//! the fold, and nobody a worker. An immutable state for each fold, swapped in atomically, was measured at three times
//! the memory of a counter and several times the time of a fold, most of it the allocator's.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::RandomState;

use super::Aggregate;
use super::index::prefetch;
use super::shard::SeriesId;
use super::state::Held;
pub use super::state::{At, Reading, State, Total, Unshipped};
use super::window::{Window, start_of};
use crate::sample::{Kind, SeriesKey};

/// One series of this agent.
#[derive(Debug)]
pub struct Series {
    id: Arc<SeriesId>,
    held: Mutex<Held>,
    /// The length of a window, where `held` needs it: 0 for one that does not fit.
    window_ms: u32,
    /// The rest is the writer's own: how many shards know the series; whether it stands in a map, as it does from its
    /// first sample on and not after a reset; whether the next flush takes it; when it was folded last.
    pub(super) holders: AtomicU16,
    pub(super) listed: AtomicBool,
    pub(super) changed: AtomicBool,
    pub(super) folded_at_ms: AtomicU64,
}

const _: () = assert!(size_of::<Series>() <= 104, "with the counts of an `Arc` 120 bytes, a size allocators have");

impl Series {
    /// A series with a state, as a test or a reader of the journal makes it.
    pub fn new(id: Arc<SeriesId>, state: State, window_ms: u64, now_ms: u64) -> Self {
        let held = Held::new(id.kind, state, window_ms);
        Self {
            id,
            held: Mutex::new(held),
            window_ms: u32::try_from(window_ms).unwrap_or(0),
            holders: AtomicU16::new(0),
            listed: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            folded_at_ms: AtomicU64::new(now_ms),
        }
    }

    /// Kind and key.
    pub fn id(&self) -> &SeriesId {
        &self.id
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.id.kind
    }

    /// Its key.
    pub fn key(&self) -> &SeriesKey {
        &self.id.key
    }

    /// The total as of the last fold.
    pub fn total(&self) -> Reading {
        self.held().total()
    }

    /// The state as of the last fold.
    pub fn state(&self) -> State {
        // What has to be made of it is made when others can have it again.
        let held = self.held().clone();
        held.state(self.window_ms.into())
    }

    /// The figures, which are to be let go of at once.
    pub(super) fn held(&self) -> MutexGuard<'_, Held> {
        // A fold that panicked leaves figures behind that are as good as any.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the figures come into the cache.
    pub(super) fn prefetch(&self) {
        prefetch(&self.id);
        prefetch(&self.folded_at_ms);
    }
}

/// A window that is closed, as it stands for a series.
#[derive(Debug, Clone, PartialEq)]
pub struct Closed {
    /// Its figures; a gauge has its value at the end of it, wherever that was set.
    pub window: Arc<Window>,
    /// How many windows ago the last one was into which something came; 0 if that is this one.
    pub idle: u64,
}

/// What one flush takes of one series: its state then, and the delta since the flush before.
#[derive(Debug, Clone)]
pub struct Changed {
    /// The series.
    pub series: Arc<Series>,
    /// Its total at the flush, where no later one may be written. `None` with a remote store, whose deltas have their own,
    /// and where it makes no difference: then the total that is written is the one at that moment.
    pub total: Option<Arc<Total>>,
    /// Its total at the flush, and the samples since the flush before; `None` without a remote store.
    pub shipped: Option<Shipped>,
}

/// What a flush ships of one series.
#[derive(Debug, Clone)]
pub struct Shipped {
    /// The total that has all samples of this delta and those before, and no later ones.
    pub total: Arc<Total>,
    /// The samples since the flush before.
    pub delta: Arc<Aggregate>,
}

/// A series in a map, found by kind and key.
#[derive(Debug, Clone)]
struct ByKey(Arc<Series>);

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ByKey {}

impl Hash for ByKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id.hash(state);
    }
}

impl papaya::Equivalent<ByKey> for SeriesId {
    fn equivalent(&self, key: &ByKey) -> bool {
        *self == *key.0.id
    }
}

/// How many maps the ledger has. Each grows by itself, so a growth holds up no more than a part of the fold.
const MAPS: usize = 64;

/// All series of this agent.
#[derive(Debug)]
pub struct Ledger {
    maps: Vec<papaya::HashSet<ByKey, RandomState>>,
    hasher: RandomState,
    window_ms: u64,
    pub(super) closed_until_ms: AtomicU64,
    /// The start of the first window of this process; 0 before it is known.
    pub(super) first_ms: AtomicU64,
}

impl Ledger {
    /// An empty ledger with windows of this length.
    pub fn new(window_ms: u64) -> Self {
        // Blocking resize: incremental resize was measured to cost 4 to 10 times as much at a million keys.
        let map =
            || papaya::HashSet::builder().hasher(RandomState::default()).resize_mode(papaya::ResizeMode::Blocking);
        Self {
            maps: (0..MAPS).map(|_| map().build()).collect(),
            hasher: RandomState::default(),
            window_ms,
            closed_until_ms: AtomicU64::new(0),
            first_ms: AtomicU64::new(0),
        }
    }

    /// The length of a window in milliseconds.
    pub fn window_ms(&self) -> u64 {
        self.window_ms
    }

    /// The end of the last window that all shards have delivered.
    pub fn closed_until_ms(&self) -> u64 {
        self.closed_until_ms.load(Ordering::Acquire)
    }

    /// The last closed window of a series, as [`Ledger::closed`] has it.
    pub fn last_window(&self, kind: Kind, state: &State) -> Option<Closed> {
        self.closed(kind, state, self.closed_until_ms().checked_sub(self.window_ms)?)
    }

    /// The closed window of a series that begins at a moment: an empty one where nothing came into it, none where the series
    /// or this process is younger. To be asked before the second window after it begins: no more are kept.
    pub fn closed(&self, kind: Kind, state: &State, start_ms: u64) -> Option<Closed> {
        if let Some(window) = state.window_at(start_ms) {
            return Some(Closed { window: Arc::clone(window), idle: 0 });
        }
        let end_ms = start_ms + self.window_ms;
        let was_there = start_ms >= self.first_ms.load(Ordering::Relaxed) && state.total.start_ms < end_ms;
        let aggregate = state.carried_into(kind, start_ms).filter(|_| was_there)?;
        let update_ms = state.window_before(start_ms).map_or(state.total.update_ms, |window| window.start_ms);
        let idle = start_ms.saturating_sub(start_of(update_ms, self.window_ms)) / self.window_ms;
        Some(Closed { window: Arc::new(Window { start_ms, aggregate }), idle: idle.max(1) })
    }

    /// The series of a kind and a key.
    pub fn get(&self, id: &SeriesId) -> Option<Arc<Series>> {
        self.map(id).pin().get(id).map(|found| Arc::clone(&found.0))
    }

    /// Whether it holds the series of a kind and a key.
    pub fn contains(&self, id: &SeriesId) -> bool {
        self.map(id).pin().contains(id)
    }

    /// How many series there are.
    pub fn len(&self) -> usize {
        self.maps.iter().map(papaya::HashSet::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.maps.iter().all(papaya::HashSet::is_empty)
    }

    /// Shows every series, in no order. Those that come or go meanwhile may be shown or not.
    pub fn for_each(&self, mut each: impl FnMut(&Arc<Series>)) {
        for map in &self.maps {
            for series in &map.pin() {
                each(&series.0);
            }
        }
    }

    /// Shows every series as [`Ledger::for_each`] does, for one who takes his time: what is removed meanwhile is let go of
    /// all the same, and a part of the series at a time is held on to.
    pub fn for_each_slowly(&self, mut each: impl FnMut(&Arc<Series>)) {
        let mut part = Vec::new();
        for map in &self.maps {
            part.extend(map.pin().iter().map(|series| Arc::clone(&series.0)));
            part.drain(..).for_each(|series| each(&series));
        }
    }

    pub(super) fn insert(&self, series: &Arc<Series>) {
        series.listed.store(true, Ordering::Relaxed);
        self.map(&series.id).pin().insert(ByKey(Arc::clone(series)));
    }

    pub(super) fn remove(&self, series: &Series) {
        series.listed.store(false, Ordering::Relaxed);
        self.map(&series.id).pin().remove(&*series.id);
    }

    fn map(&self, id: &SeriesId) -> &papaya::HashSet<ByKey, RandomState> {
        &self.maps[self.hasher.hash_one(id) as usize % MAPS]
    }
}
