//! What the ledger holds of a series, and what a reader is shown of it.
//!
//! A reader is given a [`State`]: total, two windows, and what no batch carries yet. It is a few pointers to figures that
//! do not change under him: a fold writes them in place while nobody else has them, and else into a copy. Of the series
//! that there are most of, counters and gauges that need no more than a float, [`Held`] keeps the figures themselves.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::meter::Rates;
use super::plain::{PlainCounter, PlainGauge, PlainTimer};
use super::series::EXACT_MAX;
use super::shard::Content;
use super::window::{Window, start_of};
use super::{Aggregate, Gauge, series};
use crate::sample::Kind;

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
    pub(super) fn add_at(&mut self, delta: &Aggregate, at: At, limits: &series::Limits) -> bool {
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
    pub(super) fn hold_back(&mut self, now_ms: u64) {
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

    /// Whether a window that began at a moment may have been there and is not kept any more, since two later ones are.
    pub fn is_past(&self, start_ms: u64) -> bool {
        [&self.window, &self.before].into_iter().all(|kept| kept.as_ref().is_some_and(|kept| kept.start_ms > start_ms))
    }

    /// The last window that begins before a moment, of those that are kept.
    pub(super) fn window_before(&self, start_ms: u64) -> Option<&Arc<Window>> {
        let windows = [&self.window, &self.before].into_iter().flatten();
        windows.filter(|window| window.start_ms < start_ms).max_by_key(|window| window.start_ms)
    }

    /// What a window that begins at a moment has before anything comes into it: of a gauge its value then, of all others
    /// nothing. `None` where that value is not known any more.
    pub(super) fn carried_into(&self, kind: Kind, start_ms: u64) -> Option<Aggregate> {
        if kind != Kind::Gauge {
            return Some(Aggregate::new(kind));
        }
        let is_total_older = self.window.is_none() && self.before.is_none();
        match self.window_before(start_ms) {
            Some(window) => Some(without_samples(&window.aggregate)),
            None => is_total_older.then(|| without_samples(&self.total.aggregate)),
        }
    }

    /// Adds a cell that was sealed at a moment, to the window that begins at `start_ms`. `false` when a sum would not stay
    /// finite; then nothing changed.
    pub(super) fn fold(&mut self, cell: &Aggregate, kind: Kind, at: At, start_ms: u64, within: Within<'_>) -> bool {
        let Within { window_ms, limits } = within;
        let is_there = self.window_at(start_ms).is_some();
        let carried = if is_there { None } else { self.carried_into(kind, start_ms) };
        let carried = carried.unwrap_or_else(|| Aggregate::new(kind));
        if !Arc::make_mut(&mut self.total).add_at(cell, at, limits) {
            return false;
        }
        let late = |window: &Arc<Window>| start_ms < window.start_ms && start_ms + 2 * window_ms > window.start_ms;
        if self.window.as_ref().is_some_and(late) {
            add_to_window(&mut self.before, cell, carried, start_ms, limits);
        } else {
            // Further back than a late shard can be, so the wall clock was set back: the window is a new one.
            if self.window.as_ref().is_some_and(|window| window.start_ms != start_ms) {
                self.before = self.window.take();
            }
            add_to_window(&mut self.window, cell, carried, start_ms, limits);
        }
        true
    }

    /// How many bytes total and windows hold on the heap.
    pub(super) fn memory(&self) -> usize {
        let windows = [&self.window, &self.before].into_iter().flatten();
        let windows = windows.map(|window| ALLOCATION + size_of::<Window>() + window.aggregate.memory());
        total_memory(&self.total) + windows.sum::<usize>()
    }
}

/// How many bytes a total takes that stands by itself.
fn total_memory(total: &Total) -> usize {
    ALLOCATION + size_of::<Total>() + total.aggregate.memory()
}

/// What an allocation costs beside its contents: the counts of an `Arc`, and the allocator's own.
const ALLOCATION: usize = 24;

/// How long windows are, and what a series may keep.
#[derive(Debug, Clone, Copy)]
pub(super) struct Within<'a> {
    pub(super) window_ms: u64,
    pub(super) limits: &'a series::Limits,
}

/// How far back, in windows, a cell or a clock may be before the clock is taken to have been set back for good.
const BACK_MAX: u64 = 2;

/// The window of a cell that was sealed at a moment: its own, or, if that is closed already, the first that is open.
pub(super) fn open_window(at_ms: u64, window_ms: u64, closed_until_ms: u64) -> u64 {
    let start_ms = start_of(at_ms, window_ms);
    let is_back = start_ms + BACK_MAX * window_ms < closed_until_ms;
    if is_back { start_ms } else { start_ms.max(closed_until_ms) }
}

/// What of a cell counts for a store that takes an agent's later set of a gauge for the newer one: a set that bears an
/// earlier time than the one that stands is none, and so are changes from before that.
pub(super) fn what_counts<'c>(cell: &'c Aggregate, before: &Aggregate) -> Cow<'c, Aggregate> {
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

/// The same gauge, of which no reading came yet; of all else there are no such figures.
fn without_samples(aggregate: &Aggregate) -> Aggregate {
    match aggregate {
        Aggregate::Gauge(gauge) => Aggregate::Gauge(Gauge { samples: 0, ..gauge.clone() }),
        Aggregate::Counter(_) | Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_) => aggregate.clone(),
    }
}

/// Adds a cell to a window that stands at `start_ms`, replacing an older one by one that begins with what is carried into
/// it; a cell older than the window is left out.
fn add_to_window(
    place: &mut Option<Arc<Window>>,
    cell: &Aggregate,
    carried: Aggregate,
    start_ms: u64,
    limits: &series::Limits,
) {
    let old = place.as_ref().map_or(0, |window| window.start_ms);
    if place.is_none() || old < start_ms {
        *place = Some(Arc::new(Window { start_ms, aggregate: carried }));
    }
    match place {
        Some(window) if window.start_ms == start_ms => {
            // The total took the cell, and a window is a part of it, so its sums stay finite as well.
            Arc::make_mut(window).aggregate.merge_within(cell, EXACT_MAX, limits);
        }
        Some(_) | None => {}
    }
}

/// What the ledger holds of a series.
#[derive(Debug, Clone)]
pub(super) enum Held {
    Counter(PlainCounter),
    Gauge(PlainGauge),
    Timer(PlainTimer),
    Full(State),
}

const _: () = assert!(size_of::<Held>() <= 72, "there are a million of them");

impl Held {
    /// A state in the smallest form that has all of it.
    pub(super) fn new(kind: Kind, state: State, window_ms: u64) -> Self {
        Self::plain(kind, &state, window_ms).unwrap_or(Self::Full(state))
    }

    /// Adds what a cell held, if this form can keep it. `false`, with nothing changed, if not.
    pub(super) fn fold_plain(&mut self, content: &Content<'_>, at_ms: u64, start_ms: u64, window_ms: u64) -> bool {
        match (self, content) {
            (Self::Counter(counter), Content::Increments { sum, samples }) => {
                counter.add(*sum, *samples, at_ms, start_ms, window_ms)
            }
            (Self::Gauge(gauge), Content::Set { value, at_ms: set_ms, samples }) => {
                gauge.set((*value, *set_ms), *samples, at_ms, start_ms, window_ms)
            }
            (Self::Counter(_) | Self::Gauge(_) | Self::Timer(_) | Self::Full(_), _) => false,
        }
    }

    /// Adds a cell that was sealed at a moment, to the window that begins at `start_ms`. `false` when a sum would not stay
    /// finite; then nothing changed.
    pub(super) fn fold(&mut self, cell: &Aggregate, kind: Kind, at: At, start_ms: u64, within: Within<'_>) -> bool {
        match self {
            Self::Full(state) => return state.fold(cell, kind, at, start_ms, within),
            Self::Timer(timer) => {
                if let Some(finite) = timer.add(cell, at, start_ms, within) {
                    return finite;
                }
            }
            Self::Counter(_) | Self::Gauge(_) => {}
        }
        self.whole(within.window_ms).fold(cell, kind, at, start_ms, within)
    }

    /// The state, in the form that can keep everything.
    pub(super) fn whole(&mut self, window_ms: u64) -> &mut State {
        if !matches!(self, Self::Full(_)) {
            *self = Self::Full(self.state(window_ms));
        }
        match self {
            Self::Full(state) => state,
            Self::Counter(_) | Self::Gauge(_) | Self::Timer(_) => unreachable!("it has just been made whole"),
        }
    }

    /// Takes the smallest form again, after a fold that needed the other one.
    pub(super) fn shrink(&mut self, kind: Kind, window_ms: u64) {
        if let Self::Full(state) = self
            && let Some(plain) = Self::plain(kind, state, window_ms)
        {
            *self = plain;
        }
    }

    /// The state.
    pub(super) fn state(&self, window_ms: u64) -> State {
        match self {
            Self::Counter(counter) => counter.state(window_ms),
            Self::Gauge(gauge) => gauge.state(window_ms),
            Self::Timer(timer) => timer.state(window_ms),
            Self::Full(state) => state.clone(),
        }
    }

    /// The total.
    pub(super) fn total(&self) -> Reading {
        match self {
            Self::Counter(counter) => Reading::Plain(counter.total()),
            Self::Gauge(gauge) => Reading::Plain(gauge.total()),
            Self::Timer(timer) => Reading::Shared(Arc::clone(&timer.total)),
            Self::Full(state) => Reading::Shared(Arc::clone(&state.total)),
        }
    }

    /// How many bytes it takes beside itself.
    pub(super) fn memory(&self) -> i64 {
        match self {
            Self::Counter(_) | Self::Gauge(_) => 0,
            Self::Timer(timer) => (total_memory(&timer.total) + timer.memory()) as i64,
            Self::Full(state) => state.memory() as i64,
        }
    }

    /// The total where it stands by itself.
    pub(super) fn shared_total(&mut self) -> Option<&mut Arc<Total>> {
        match self {
            Self::Counter(_) | Self::Gauge(_) => None,
            Self::Timer(timer) => Some(&mut timer.total),
            Self::Full(state) => Some(&mut state.total),
        }
    }

    fn plain(kind: Kind, state: &State, window_ms: u64) -> Option<Self> {
        // A series keeps the length in 32 bits, enough for windows of 49 days; it is asked for it only in these forms.
        u32::try_from(window_ms).ok()?;
        match kind {
            Kind::Counter => PlainCounter::of(state, window_ms).map(Self::Counter),
            Kind::Gauge => PlainGauge::of(state, window_ms).map(Self::Gauge),
            Kind::Timer | Kind::Histogram | Kind::Distribution => PlainTimer::of(state, window_ms).map(Self::Timer),
            Kind::Set | Kind::Meter => None,
        }
    }
}

/// A total as of the last fold. It does not change any more.
#[derive(Debug)]
pub enum Reading {
    /// By itself.
    Plain(Total),
    /// Shared with the ledger until the next fold.
    Shared(Arc<Total>),
}

impl Reading {
    /// The total, to be kept.
    pub fn into_shared(self) -> Arc<Total> {
        match self {
            Self::Plain(total) => Arc::new(total),
            Self::Shared(total) => total,
        }
    }
}

impl Deref for Reading {
    type Target = Total;

    #[inline]
    fn deref(&self) -> &Total {
        match self {
            Self::Plain(total) => total,
            Self::Shared(total) => total,
        }
    }
}
