//! The ledger: each series' cumulative state on this agent and its window, in sharded lock-free maps.
//!
//! One thread, which owns the [`Writer`], folds sealed cells in. Scrape, API and flush read beside it: a read of a series
//! is one atomic load of an immutable [`State`], so it takes no lock and never holds up the fold.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use serde::{Deserialize, Serialize};

use super::meter::Rates;
use super::series::EXACT_MAX;
use super::shard::{Budget, Sealed, SeriesId};
use super::window::{Window, start_of};
use super::{Aggregate, Gauge, series};
use crate::sample::{Kind, SeriesKey};

/// A moment by both clocks, in milliseconds since the epoch: windows and labels go by the one that people see, rates and
/// expiry by the one that takes no steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// The wall clock.
    pub wall_ms: u64,
    /// The clock that takes no steps.
    pub steady_ms: u64,
}

impl At {
    /// When something that was stamped by the wall clock, shortly before this, happened by the other one.
    fn steady_of(self, stamp_ms: u64) -> u64 {
        self.steady_ms.saturating_sub(self.wall_ms.saturating_sub(stamp_ms))
    }
}

/// The cumulative figures of a series on this agent since it began: what the journal keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Total {
    /// When the series began, in milliseconds since the epoch.
    pub start_ms: u64,
    /// When its last sample came, in milliseconds since the epoch.
    pub update_ms: u64,
    /// All its samples.
    pub aggregate: Aggregate,
    /// The rates, for a meter.
    pub rates: Option<Rates>,
}

impl Total {
    /// A series that begins now.
    pub fn new(kind: Kind, now_ms: u64) -> Self {
        let rates = (kind == Kind::Meter).then(|| Rates::new(now_ms));
        Self { start_ms: now_ms, update_ms: now_ms, aggregate: Aggregate::new(kind), rates }
    }

    /// Adds what came until `now_ms`. `false` when a sum would not stay finite; then nothing changed.
    pub fn add(&mut self, delta: &Aggregate, now_ms: u64) -> bool {
        self.add_at(delta, At { wall_ms: now_ms, steady_ms: now_ms }, &series::Limits::default())
    }

    /// The same by both clocks. A meter begins with its first mark, not when that was sealed.
    fn add_at(&mut self, delta: &Aggregate, at: At, limits: &series::Limits) -> bool {
        let is_first = self.aggregate.is_empty();
        let finite = self.aggregate.merge_within(delta, 0, limits);
        if finite {
            self.update_ms = self.update_ms.max(at.wall_ms);
            if let (Some(rates), Aggregate::Meter(marks)) = (&mut self.rates, delta) {
                let marked_ms = at.steady_of(marks.last.1);
                if is_first {
                    *rates = Rates::new(marked_ms);
                }
                rates.mark(marks.count.value(), marked_ms);
            }
        }
        finite
    }

    /// Brings back times that lie ahead of now, as a wall clock leaves them that was wrong: a gauge that was set then
    /// would take no value, and a meter would not tick, until that time comes.
    fn hold_back(&mut self, now_ms: u64) {
        self.start_ms = self.start_ms.min(now_ms);
        self.update_ms = self.update_ms.min(now_ms);
        self.aggregate.hold_back(now_ms);
        if let Some(rates) = &mut self.rates {
            rates.hold_back(now_ms);
        }
    }
}

/// A delta that is not yet known to be in the journal's outbox.
#[derive(Debug, Clone)]
pub struct Unshipped {
    /// The flush that carries it, or will.
    pub flush: u64,
    /// What came.
    pub delta: Arc<Aggregate>,
}

/// One published state of a series. It never changes; a fold publishes the next one.
#[derive(Debug, Clone)]
pub struct State {
    /// All the series' life.
    pub total: Arc<Total>,
    /// The window that was written to last.
    pub window: Option<Arc<Window>>,
    /// The window before it that was written to.
    pub before: Option<Arc<Window>>,
    /// What no batch carries yet, oldest first; empty without a remote store.
    pub unshipped: Vec<Unshipped>,
}

impl State {
    /// A state without windows.
    pub fn new(total: Total) -> Self {
        Self { total: Arc::new(total), window: None, before: None, unshipped: Vec::new() }
    }

    /// The window that begins at a moment, if anything came into it.
    pub fn window_at(&self, start_ms: u64) -> Option<&Arc<Window>> {
        [&self.window, &self.before].into_iter().flatten().find(|window| window.start_ms == start_ms)
    }

    /// Adds a cell that was sealed at a moment, to the window that begins at `start_ms`.
    fn fold(&self, cell: &Aggregate, kind: Kind, at: At, start_ms: u64, within: Within<'_>) -> Option<Self> {
        let Within { window_ms, limits } = within;
        let mut next = self.clone();
        if !Arc::make_mut(&mut next.total).add_at(cell, at, limits) {
            return None;
        }
        let late = |window: &Arc<Window>| start_ms < window.start_ms && start_ms + 2 * window_ms > window.start_ms;
        if next.window.as_ref().is_some_and(late) {
            add_to_window(&mut next.before, cell, kind, start_ms, limits);
        } else {
            // Further back than a late shard can be, so the wall clock was set back: the window is a new one.
            if next.window.as_ref().is_some_and(|window| window.start_ms != start_ms) {
                next.before = next.window.take();
            }
            add_to_window(&mut next.window, cell, kind, start_ms, limits);
        }
        Some(next)
    }

    /// How many bytes total and windows hold on the heap beyond what every series has.
    fn memory(&self) -> i64 {
        let windows = [&self.window, &self.before].into_iter().flatten();
        let bytes = self.total.aggregate.memory() + windows.map(|window| window.aggregate.memory()).sum::<usize>();
        bytes as i64
    }
}

/// How long windows are, and what a series may keep.
#[derive(Debug, Clone, Copy)]
struct Within<'a> {
    window_ms: u64,
    limits: &'a series::Limits,
}

/// How far back, in windows, a cell or a clock may be before the clock is taken to have been set back for good.
const BACK_MAX: u64 = 2;

/// The window of a cell that was sealed at a moment: its own, or, if that is closed already, the first that is open.
fn open_window(at_ms: u64, window_ms: u64, closed_until_ms: u64) -> u64 {
    let start_ms = start_of(at_ms, window_ms);
    let is_back = start_ms + BACK_MAX * window_ms < closed_until_ms;
    if is_back { start_ms } else { start_ms.max(closed_until_ms) }
}

/// What of a cell counts for a store that takes an agent's later set of a gauge for the newer one: a set that bears an
/// earlier time than the one that stands is none, and so are changes from before that.
fn what_counts<'c>(cell: &'c Aggregate, before: &Aggregate) -> Cow<'c, Aggregate> {
    let (Aggregate::Gauge(late), Aggregate::Gauge(Gauge { set: Some((_, stands_ms)), .. })) = (cell, before) else {
        return Cow::Borrowed(cell);
    };
    if late.set.is_none_or(|(_, set_ms)| set_ms >= *stands_ms) {
        return Cow::Borrowed(cell);
    }
    let Gauge { change, changed_at, samples, .. } = late.clone();
    let (change, changed_at) = if changed_at < *stands_ms { Default::default() } else { (change, changed_at) };
    Cow::Owned(Aggregate::Gauge(Gauge { set: None, change, changed_at, samples }))
}

/// Adds a cell to a window that stands at `start_ms`, replacing an older one; a cell older than the window is left out.
fn add_to_window(
    place: &mut Option<Arc<Window>>,
    cell: &Aggregate,
    kind: Kind,
    start_ms: u64,
    limits: &series::Limits,
) {
    let old = place.as_ref().map_or(0, |window| window.start_ms);
    if place.is_none() || old < start_ms {
        *place = Some(Arc::new(Window { start_ms, aggregate: Aggregate::new(kind) }));
    }
    match place {
        Some(window) if window.start_ms == start_ms => {
            // The total took the cell, and a window is a part of it, so its sums stay finite as well.
            Arc::make_mut(window).aggregate.merge_within(cell, EXACT_MAX, limits);
        }
        Some(_) | None => {}
    }
}

/// One series of this agent.
#[derive(Debug)]
pub struct Series {
    id: Arc<SeriesId>,
    state: ArcSwap<State>,
    /// The rest is the writer's own: how many shards know the series; whether it stands in a map, as it does from its
    /// first sample on and not after a reset; whether the next flush takes it; when it was folded last.
    holders: AtomicU32,
    listed: AtomicBool,
    changed: AtomicBool,
    folded_at_ms: AtomicU64,
}

impl Series {
    /// A series with a state, as a test or a reader of the journal makes it.
    pub fn new(id: Arc<SeriesId>, state: State, now_ms: u64) -> Self {
        Self {
            id,
            state: ArcSwap::from_pointee(state),
            holders: AtomicU32::new(0),
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

    /// The state as of the last fold, for a short look: it doesn't count a reference, of which a thread can have eight.
    pub fn peek(&self) -> arc_swap::Guard<Arc<State>> {
        self.state.load()
    }

    /// The state as of the last fold.
    pub fn state(&self) -> Arc<State> {
        self.state.load_full()
    }
}

/// What one flush takes of one series: its state then, and the delta since the flush before.
#[derive(Debug, Clone)]
pub struct Changed {
    /// The series.
    pub series: Arc<Series>,
    /// Its state at the flush.
    pub state: Arc<State>,
    /// The samples since the flush before; `None` without a remote store.
    pub delta: Option<Arc<Aggregate>>,
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
    closed_until_ms: AtomicU64,
    /// The start of the first window of this process; 0 before it is known.
    first_ms: AtomicU64,
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

    /// The last closed window of a series: an empty one where nothing came into it, none where the series or this process
    /// is younger.
    pub fn last_window(&self, kind: Kind, state: &State) -> Option<Arc<Window>> {
        let closed_ms = self.closed_until_ms();
        let start_ms = closed_ms.checked_sub(self.window_ms)?;
        let empty = || Arc::new(Window { start_ms, aggregate: Aggregate::new(kind) });
        let was_there = start_ms >= self.first_ms.load(Ordering::Relaxed) && state.total.start_ms < closed_ms;
        state.window_at(start_ms).map(Arc::clone).or_else(|| was_there.then(empty))
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

    fn insert(&self, series: &Arc<Series>) {
        series.listed.store(true, Ordering::Relaxed);
        self.map(&series.id).pin().insert(ByKey(Arc::clone(series)));
    }

    fn remove(&self, series: &Series) {
        series.listed.store(false, Ordering::Relaxed);
        self.map(&series.id).pin().remove(&*series.id);
    }

    fn map(&self, id: &SeriesId) -> &papaya::HashSet<ByKey, RandomState> {
        &self.maps[self.hasher.hash_one(id) as usize % MAPS]
    }
}

/// What the writer knows of one shard.
#[derive(Debug, Default)]
struct ShardSeries {
    by_number: Vec<Option<Arc<Series>>>,
}

impl ShardSeries {
    fn set(&mut self, number: u32, series: Arc<Series>) {
        let place = number as usize;
        if place >= self.by_number.len() {
            self.by_number.resize(place + 1, None);
        }
        self.by_number[place] = Some(series);
    }
}

/// The one writer of a ledger.
#[derive(Debug)]
pub struct Writer {
    ledger: Arc<Ledger>,
    budget: Arc<Budget>,
    shards: Vec<ShardSeries>,
    changed: Vec<Arc<Series>>,
    /// The number of the flush that will carry what is folded now; kept only with a remote store.
    flush: u64,
    remote: bool,
    /// Series of a kind that were not folded since then were idle when expiry was asked for last.
    idle_before_ms: [u64; Kind::ALL.len()],
    /// Series in the ledger, by kind.
    pub held: [u64; Kind::ALL.len()],
    /// Series made since this was asked last, by kind.
    pub created: [u64; Kind::ALL.len()],
    /// Series freed since this was asked last, by kind.
    pub expired: [u64; Kind::ALL.len()],
    /// Cells that a total refused because it would not have stayed finite, since this was asked last.
    pub overflowed: u64,
    /// How often the scale of a total's histogram fell, since this was asked last.
    pub halved: u64,
    /// Sets that went on as estimates, since this was asked last.
    pub estimated: u64,
}

impl Writer {
    /// The writer of an empty ledger. With `remote`, deltas are kept for batches; `flush` is the number of the next one.
    pub fn new(ledger: Arc<Ledger>, budget: Arc<Budget>, remote: bool, flush: u64) -> Self {
        Self {
            ledger,
            budget,
            shards: Vec::new(),
            changed: Vec::new(),
            flush,
            remote,
            idle_before_ms: [0; Kind::ALL.len()],
            held: [0; Kind::ALL.len()],
            created: [0; Kind::ALL.len()],
            expired: [0; Kind::ALL.len()],
            overflowed: 0,
            halved: 0,
            estimated: 0,
        }
    }

    /// Puts back a series that the journal holds, at the start.
    pub fn restore(&mut self, kind: Kind, key: SeriesKey, mut total: Total, now_ms: u64) {
        total.hold_back(now_ms);
        let id = Arc::new(SeriesId { kind, key });
        let state = State::new(total);
        self.budget.force(1, self.budget.cost(&id) + state.memory());
        let series = Arc::new(Series::new(Arc::clone(&id), state, now_ms));
        self.insert(&series);
    }

    /// Folds in what a shard sealed at a moment. `recall` is asked for the total of a series that the ledger does not
    /// hold: it may be one that was idle and expired.
    pub fn fold(
        &mut self,
        shard: usize,
        sealed: &mut Sealed,
        at: At,
        mut recall: impl FnMut(&SeriesId) -> Option<Total>,
    ) {
        if self.shards.len() <= shard {
            self.shards.resize_with(shard + 1, ShardSeries::default);
        }
        for number in sealed.released.drain(..) {
            self.release(shard, number);
        }
        for new in sealed.new.drain(..) {
            let series = self.join(&new.id, at, &mut recall);
            self.shards[shard].set(new.number, series);
        }
        let start_ms = open_window(at.wall_ms, self.ledger.window_ms, self.ledger.closed_until_ms());
        // What bears an earlier time came into a window that is closed for all else.
        for (number, start_ms, cell) in sealed.cells.drain_earlier() {
            self.fold_number(shard, number, &cell, at, start_ms);
        }
        for (number, cell) in sealed.cells.drain() {
            self.fold_number(shard, number, &cell, at, start_ms);
        }
    }

    fn fold_number(&mut self, shard: usize, number: u32, cell: &Aggregate, at: At, start_ms: u64) {
        if let Some(series) = self.listed(shard, number, at, cell) {
            self.fold_cell(&series, cell, at, start_ms);
        }
    }

    /// Says that every shard has delivered what it received before a moment. A wall clock that was set back a little opens
    /// no window again: they stand still until it has come forward.
    pub fn close_until(&self, at_ms: u64) {
        let closed_ms = self.ledger.closed_until_ms();
        let until_ms = open_window(at_ms, self.ledger.window_ms, closed_ms);
        if closed_ms == 0 || until_ms < closed_ms {
            self.ledger.first_ms.store(until_ms, Ordering::Relaxed);
        }
        self.ledger.closed_until_ms.store(until_ms, Ordering::Release);
    }

    /// Takes what changed since the last time, and begins the next flush.
    pub fn take_changed(&mut self) -> Vec<Changed> {
        let flush = self.flush;
        self.flush += 1;
        let take = |series: Arc<Series>| {
            series.changed.store(false, Ordering::Relaxed);
            let state = series.state();
            let delta = state.unshipped.iter().find(|unshipped| unshipped.flush == flush);
            let delta = delta.map(|unshipped| Arc::clone(&unshipped.delta));
            series.listed.load(Ordering::Relaxed).then_some(Changed { series, state, delta })
        };
        self.changed.drain(..).filter_map(take).collect()
    }

    /// Whether the next flush has anything to take.
    pub fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// The number of the flush that [`Writer::take_changed`] takes next.
    pub fn next_flush(&self) -> u64 {
        self.flush
    }

    /// Drops the deltas that batches carry now: those of flushes up to `flush`.
    pub fn committed(&self, flush: u64, series: &[Arc<Series>]) {
        for series in series {
            let mut state = State::clone(&series.state.load());
            state.unshipped.retain(|unshipped| unshipped.flush > flush);
            series.state.store(Arc::new(state));
        }
    }

    /// Lets a series start again from nothing: it is gone until its next sample. `false` when the ledger does not hold it.
    pub fn reset(&mut self, id: &SeriesId) -> bool {
        let Some(series) = self.ledger.get(id) else { return false };
        if series.holders.load(Ordering::Relaxed) == 0 {
            self.budget.refund(1, self.budget.cost(&series.id));
        }
        self.remove(&series);
        true
    }

    /// The series that were not folded since `before_ms(kind)` of the clock that takes no steps: those no shard knows are
    /// freed at once, of the others the shards are to be asked, each for the numbers it gave them.
    pub fn expire(&mut self, before_ms: impl Fn(Kind) -> u64) -> Vec<Vec<u32>> {
        self.idle_before_ms = Kind::ALL.map(before_ms);
        let mut orphans = Vec::new();
        self.ledger.for_each(|series| {
            if series.holders.load(Ordering::Relaxed) == 0 && self.is_idle(series) {
                orphans.push(Arc::clone(series));
            }
        });
        for series in orphans {
            self.budget.refund(1, self.budget.cost(&series.id));
            self.forget(&series);
        }
        let numbers = |shard: &ShardSeries| {
            let numbered = shard.by_number.iter().enumerate();
            let idle = numbered.filter(|(_, series)| series.as_ref().is_some_and(|series| self.is_idle(series)));
            idle.map(|(number, _)| number as u32).collect()
        };
        self.shards.iter().map(numbers).collect()
    }

    fn fold_cell(&mut self, series: &Arc<Series>, cell: &Aggregate, at: At, start_ms: u64) {
        let state = series.state.load();
        let limits = *self.budget.each();
        let within = Within { window_ms: self.ledger.window_ms, limits: &limits };
        let Some(mut next) = state.fold(cell, series.kind(), at, start_ms, within) else {
            self.overflowed += 1;
            return;
        };
        // What is not listed, as before its first sample and after a reset, has nothing charged to it.
        let held = if series.listed.load(Ordering::Relaxed) { state.memory() } else { 0 };
        self.charge_growth(&mut next, held);
        self.count_coarsened(&state.total.aggregate, &next.total.aggregate);
        if self.remote {
            add_unshipped(&mut next.unshipped, &what_counts(cell, &state.total.aggregate), self.flush, &limits);
        }
        series.state.store(Arc::new(next));
        series.folded_at_ms.store(at.steady_ms, Ordering::Relaxed);
        if !series.listed.load(Ordering::Relaxed) {
            self.insert(series);
        }
        if !series.changed.swap(true, Ordering::Relaxed) {
            self.changed.push(Arc::clone(series));
        }
    }

    /// Charges what a state keeps beyond the bytes charged so far. Where there is no room, its histogram gives precision
    /// up, once a fold; what then remains is charged all the same, and new series are refused until there is room.
    fn charge_growth(&self, next: &mut State, held: i64) {
        if self.budget.charge_change(next.memory() - held) {
            return;
        }
        if let Aggregate::Observed(observed) = &mut Arc::make_mut(&mut next.total).aggregate
            && observed.histogram.scale() > SCALE_SPARED
        {
            observed.histogram.halve();
        }
        self.budget.force(0, next.memory() - held);
    }

    fn count_coarsened(&mut self, before: &Aggregate, after: &Aggregate) {
        match (before, after) {
            (Aggregate::Observed(before), Aggregate::Observed(after)) => {
                self.halved += u64::from(after.histogram.halvings().saturating_sub(before.histogram.halvings()));
            }
            (Aggregate::Set(before), Aggregate::Set(after)) => {
                self.estimated += u64::from(before.registers().is_none() && after.registers().is_some());
            }
            (
                Aggregate::Counter(_)
                | Aggregate::Gauge(_)
                | Aggregate::Observed(_)
                | Aggregate::Set(_)
                | Aggregate::Meter(_),
                _,
            ) => {}
        }
    }

    /// The series to which a shard's cell goes, begun again if it was reset; none for a cell without samples.
    fn listed(&mut self, shard: usize, number: u32, at: At, cell: &Aggregate) -> Option<Arc<Series>> {
        let series = Arc::clone(self.shards[shard].by_number.get(number as usize)?.as_ref()?);
        if cell.is_empty() {
            return None;
        }
        if series.listed.load(Ordering::Relaxed) {
            return Some(series);
        }
        if let Some(other) = self.ledger.get(&series.id) {
            // Another shard began it again first.
            other.holders.fetch_add(1, Ordering::Relaxed);
            self.shards[shard].set(number, Arc::clone(&other));
            return Some(other);
        }
        if series.changed.load(Ordering::Relaxed) || series.folded_at_ms.load(Ordering::Relaxed) != 0 {
            series.state.store(Arc::new(State::new(Total::new(series.kind(), at.wall_ms))));
        }
        Some(series)
    }

    /// The series of a key that a shard has begun to use.
    fn join(&mut self, id: &Arc<SeriesId>, at: At, recall: &mut impl FnMut(&SeriesId) -> Option<Total>) -> Arc<Series> {
        if let Some(series) = self.ledger.get(id) {
            // The shard charged the series as its own; the ledger, or another shard, has done so before.
            let bytes = if series.holders.fetch_add(1, Ordering::Relaxed) == 0 { self.budget.cost(id) } else { 0 };
            self.budget.refund(1, bytes);
            return series;
        }
        self.created[id.kind as usize] += 1;
        let total = match recall(id) {
            Some(mut total) => {
                total.hold_back(at.wall_ms);
                total
            }
            None => Total::new(id.kind, at.wall_ms),
        };
        let series = Arc::new(Series::new(Arc::clone(id), State::new(total), 0));
        series.holders.store(1, Ordering::Relaxed);
        series
    }

    fn release(&mut self, shard: usize, number: u32) {
        let place = self.shards[shard].by_number.get_mut(number as usize);
        let Some(series) = place.and_then(Option::take) else { return };
        if series.holders.fetch_sub(1, Ordering::Relaxed) > 1 {
            // The shard gave the whole charge back, and another still holds the series.
            self.budget.force(1, 0);
        } else if series.listed.load(Ordering::Relaxed) && !self.is_idle(&series) {
            // Samples were on their way when the shard was asked. The ledger holds the series until it is idle again.
            self.budget.force(1, self.budget.cost(&series.id));
        } else {
            self.forget(&series);
        }
    }

    /// Whether nothing waits for a flush, and nothing was folded for as long as the last expiry asked for.
    fn is_idle(&self, series: &Series) -> bool {
        !series.changed.load(Ordering::Relaxed)
            && series.folded_at_ms.load(Ordering::Relaxed) < self.idle_before_ms[series.kind() as usize]
    }

    fn forget(&mut self, series: &Arc<Series>) {
        if series.listed.load(Ordering::Relaxed) {
            self.expired[series.kind() as usize] += 1;
            self.remove(series);
        }
    }

    fn insert(&mut self, series: &Arc<Series>) {
        self.held[series.kind() as usize] += 1;
        self.ledger.insert(series);
    }

    fn remove(&mut self, series: &Series) {
        self.budget.refund(0, series.peek().memory());
        self.held[series.kind() as usize] -= 1;
        self.ledger.remove(series);
    }
}

/// Want of memory halves scales down to this one, whose error is 4.3 %: below, figures would not be worth their memory.
const SCALE_SPARED: i8 = 3;

/// Adds a cell to the delta of a flush.
fn add_unshipped(unshipped: &mut Vec<Unshipped>, cell: &Aggregate, flush: u64, limits: &series::Limits) {
    match unshipped.last_mut() {
        Some(last) if last.flush == flush => {
            Arc::make_mut(&mut last.delta).merge_within(cell, 0, limits);
        }
        Some(_) | None => unshipped.push(Unshipped { flush, delta: Arc::new(cell.clone()) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::shard::{Limits, OVERFLOW, Shard, Sight};
    use crate::sample::{Identity, Value};
    use crate::units::Size;

    const WINDOW_MS: u64 = 10_000;
    /// A multiple of a window.
    const BEGIN_MS: u64 = 1_764_000_000_000;

    /// A shard and the ledger it delivers to.
    struct Pair {
        shard: Shard,
        writer: Writer,
        budget: Arc<Budget>,
    }

    fn pair() -> Pair {
        pair_within(&Limits::default())
    }

    fn pair_within(limits: &Limits) -> Pair {
        let budget = Arc::new(Budget::new(limits));
        let writer = Writer::new(Arc::new(Ledger::new(WINDOW_MS)), Arc::clone(&budget), false, 1);
        Pair { shard: Shard::new(Arc::clone(&budget)), writer, budget }
    }

    impl Pair {
        /// A sample that comes at a moment of the wall clock.
        fn send(&mut self, kind: Kind, name: &str, value: &Value<'_>, now_ms: u64) -> u32 {
            let identity = Identity::Line { name: name.as_bytes(), tags: b"" };
            let number = match self.shard.find(kind, &identity) {
                Ok(number) => number,
                Err(vacancy) => self.shard.admit(vacancy, kind, &identity, SeriesKey::parse(name), Sight::default()),
            };
            self.shard.add(number, kind, value, 1.0, now_ms).unwrap();
            number
        }

        fn fold(&mut self, at: At) {
            let mut sealed = self.shard.seal();
            self.writer.fold(0, &mut sealed, at, |_| None);
            self.shard.give_back(sealed.cells);
        }

        /// A sample of 1, sealed so many milliseconds after [`BEGIN_MS`] by both clocks.
        fn count(&mut self, name: &str, after_ms: u64) -> u32 {
            let number = self.send(Kind::Counter, name, &Value::Numbers(&[1.0]), BEGIN_MS + after_ms);
            self.fold(both(after_ms));
            number
        }

        fn state(&self, kind: Kind, name: &str) -> Arc<State> {
            self.writer.ledger.get(&SeriesId { kind, key: SeriesKey::parse(name) }).unwrap().state()
        }

        /// How many samples the windows of a counter hold, by their starts after [`BEGIN_MS`], the older one first.
        fn windows(&self, name: &str) -> Vec<(u64, u64)> {
            let state = self.state(Kind::Counter, name);
            let windows = [&state.before, &state.window].into_iter().flatten();
            windows.map(|window| (window.start_ms - BEGIN_MS, window.aggregate.samples())).collect()
        }
    }

    fn both(after_ms: u64) -> At {
        At { wall_ms: BEGIN_MS + after_ms, steady_ms: BEGIN_MS + after_ms }
    }

    #[test]
    fn a_late_cell_goes_to_its_window_until_that_is_closed_and_then_to_the_first_open_one() {
        let mut pair = pair();
        pair.count("a", 9_999);
        pair.count("a", 11_000);
        pair.count("a", 9_999);
        assert_eq!(pair.windows("a"), [(0, 2), (10_000, 1)]);
        pair.writer.close_until(BEGIN_MS + 10_500);
        pair.count("a", 9_999);
        assert_eq!(pair.windows("a"), [(0, 2), (10_000, 2)]);
        assert_eq!(pair.state(Kind::Counter, "a").total.aggregate.samples(), 4);
    }

    #[test]
    fn a_wall_clock_that_is_set_back_writes_no_closed_window_again() {
        let mut pair = pair();
        pair.count("a", 25_000);
        pair.writer.close_until(BEGIN_MS + 31_000);
        pair.count("a", 32_000);
        // By some seconds: the open window goes on.
        pair.writer.close_until(BEGIN_MS + 26_000);
        pair.count("a", 26_000);
        assert_eq!(pair.writer.ledger.closed_until_ms(), BEGIN_MS + 30_000);
        assert_eq!(pair.windows("a"), [(20_000, 1), (30_000, 2)]);
        // By more than windows are late: they begin again there.
        pair.writer.close_until(BEGIN_MS + 2_000);
        pair.count("a", 2_500);
        assert_eq!(pair.writer.ledger.closed_until_ms(), BEGIN_MS);
        assert_eq!(pair.windows("a"), [(30_000, 2), (0, 1)]);
    }

    #[test]
    fn an_idle_series_has_an_empty_window_and_a_young_one_none() {
        let mut pair = pair();
        let last = |pair: &Pair| {
            let window = pair.writer.ledger.last_window(Kind::Counter, &pair.state(Kind::Counter, "a"));
            window.map(|window| (window.start_ms - BEGIN_MS, window.aggregate.samples()))
        };
        pair.writer.close_until(BEGIN_MS + 1_000);
        pair.writer.restore(Kind::Counter, SeriesKey::parse("a"), Total::new(Kind::Counter, 0), BEGIN_MS);
        assert_eq!(last(&pair), None, "what came before this process began is not known");
        pair.writer.close_until(BEGIN_MS + 10_000);
        assert_eq!(last(&pair), Some((0, 0)));
        pair.count("a", 12_000);
        assert_eq!(last(&pair), Some((0, 0)));
        pair.writer.close_until(BEGIN_MS + 20_000);
        assert_eq!(last(&pair), Some((10_000, 1)));
        pair.writer.close_until(BEGIN_MS + 30_000);
        assert_eq!(last(&pair), Some((20_000, 0)));
        pair.count("b", 31_000);
        assert!(pair.writer.ledger.last_window(Kind::Counter, &pair.state(Kind::Counter, "b")).is_none());
    }

    #[test]
    fn rates_go_by_the_clock_that_takes_no_steps_and_begin_with_the_first_mark() {
        let mut pair = pair();
        pair.send(Kind::Meter, "m", &Value::Numbers(&[60.0]), BEGIN_MS + 100);
        pair.fold(both(999));
        // The wall clock is set forward by an hour, and back by a day.
        for wall_ms in [BEGIN_MS + 3_604_000, BEGIN_MS - 86_400_000] {
            pair.send(Kind::Meter, "m", &Value::Numbers(&[0.0]), wall_ms);
            pair.fold(At { wall_ms, steady_ms: BEGIN_MS + 4_000 });
        }
        let rates = pair.state(Kind::Meter, "m").total.rates.clone().unwrap();
        assert_eq!(rates.parts().start_ms, BEGIN_MS + 100);
        assert_eq!(rates.at(BEGIN_MS + 5_100), [0.0; 3]);
        assert_eq!(rates.at(BEGIN_MS + 5_101), [12.0; 3]);
    }

    #[test]
    fn growth_without_room_takes_precision_and_is_given_back() {
        let mut pair = pair_within(&Limits { memory: Size(2_000), ..Limits::default() });
        let values: Vec<_> = (1..=200).map(f64::from).collect();
        pair.send(Kind::Timer, "t", &Value::Numbers(&values), BEGIN_MS);
        let id = SeriesId { kind: Kind::Timer, key: SeriesKey::parse("t") };
        let cost = pair.budget.cost(&id) as u64;
        assert_eq!(pair.budget.bytes(), cost, "the series itself has room");
        pair.fold(both(1));
        let state = pair.state(Kind::Timer, "t");
        let Aggregate::Observed(observed) = &state.total.aggregate else { unreachable!() };
        assert_eq!((observed.histogram.scale(), observed.n, pair.writer.halved), (5, 200, 1));
        assert_eq!(pair.budget.bytes(), cost + state.memory() as u64);
        let refused = pair.send(Kind::Counter, "new", &Value::Numbers(&[1.0]), BEGIN_MS);
        assert_eq!(pair.shard.take_refused(), [1, 0, 0], "{refused}");
        let overflow = SeriesId { kind: Kind::Counter, key: SeriesKey::parse(OVERFLOW) };
        assert!(pair.writer.reset(&id));
        assert_eq!(pair.budget.bytes(), cost + pair.budget.cost(&overflow) as u64);
    }

    #[test]
    fn a_sample_on_its_way_while_its_series_expires_is_flushed() {
        let mut pair = pair();
        let number = pair.count("a", 0);
        assert_eq!(pair.writer.take_changed().len(), 1);
        let charged = pair.budget.bytes();
        assert_eq!(pair.writer.expire(|_| u64::MAX), [[number]]);
        // The shard has sealed a sample when it hears of that, and then gives the number back.
        pair.send(Kind::Counter, "a", &Value::Numbers(&[1.0]), BEGIN_MS);
        let mut first = pair.shard.seal();
        pair.shard.retire(&[number]);
        let mut second = pair.shard.seal();
        assert_eq!(second.released, [number]);
        for sealed in [&mut first, &mut second] {
            pair.writer.fold(0, sealed, both(1), |_| None);
        }
        let changed = pair.writer.take_changed();
        assert_eq!(changed.len(), 1, "the sample is not flushed");
        assert_eq!(changed[0].state.total.aggregate.samples(), 2);
        assert_eq!(pair.budget.bytes(), charged);
        // It is free to go after that, and to return.
        pair.writer.expire(|_| u64::MAX);
        assert!(pair.writer.ledger.is_empty());
        assert_eq!(pair.budget.bytes(), 0);
        pair.count("a", 2);
        assert_eq!(pair.budget.bytes(), charged);
    }

    #[test]
    fn what_a_wrong_clock_wrote_into_the_journal_holds_nothing_up() {
        let ahead_ms = BEGIN_MS + 86_400_000;
        let ahead = At { wall_ms: ahead_ms, steady_ms: ahead_ms };
        let mut wrong = pair();
        wrong.send(Kind::Gauge, "g", &Value::Numbers(&[7.0]), ahead_ms);
        wrong.send(Kind::Meter, "m", &Value::Numbers(&[7.0]), ahead_ms);
        wrong.send(Kind::Timer, "t", &Value::Numbers(&[7.0]), ahead_ms);
        wrong.fold(ahead);
        let mut pair = pair();
        for (kind, name) in [(Kind::Gauge, "g"), (Kind::Meter, "m"), (Kind::Timer, "t")] {
            let total = Total::clone(&wrong.state(kind, name).total);
            pair.writer.restore(kind, SeriesKey::parse(name), total, BEGIN_MS);
            pair.send(kind, name, &Value::Numbers(&[3.0]), BEGIN_MS + 10);
        }
        pair.fold(both(20));
        let Aggregate::Gauge(gauge) = &pair.state(Kind::Gauge, "g").total.aggregate else { unreachable!() };
        assert_eq!(gauge.value(), 3.0);
        let Aggregate::Observed(observed) = &pair.state(Kind::Timer, "t").total.aggregate else { unreachable!() };
        assert_eq!(observed.last, (3.0, BEGIN_MS + 10));
        let rates = pair.state(Kind::Meter, "m").total.rates.clone().unwrap();
        assert_eq!(rates.at(BEGIN_MS + 5_001), [2.0; 3]);
    }

    #[test]
    fn precision_that_is_given_up_is_counted() {
        let mut pair = pair();
        for number in 0..2_100_i32 {
            let value = (f64::from(number) / 64.0).exp2();
            pair.send(Kind::Timer, "t", &Value::Numbers(&[value]), BEGIN_MS);
            pair.send(Kind::Set, "u", &Value::Member(&number.to_le_bytes()), BEGIN_MS);
        }
        pair.fold(both(1));
        assert_eq!((pair.writer.halved, pair.writer.estimated), (1, 1));
        pair.send(Kind::Set, "u", &Value::Member(b"another"), BEGIN_MS);
        pair.fold(both(2));
        assert_eq!((pair.writer.halved, pair.writer.estimated), (1, 1));
    }
}
