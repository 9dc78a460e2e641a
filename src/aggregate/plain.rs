//! The smallest forms of series in the ledger: of counters and gauges, total and two windows in 64 bytes; of timers, a
//! total and eight bytes for each reading of two windows.
//!
//! Nearly all counters are sums of whole numbers that are never taken off from, and nearly all gauges are set and not
//! changed; each figure is then one float. Most windows of most timers have few readings. What does not fit is refused,
//! with nothing changed, and kept as a whole [`State`]. A law below says that both forms are the same.

use std::sync::Arc;

use super::series::EXACT_MAX;
use super::state::{At, State, Total, Within};
use super::window::Window;
use super::{Aggregate, Counter, Gauge, Observed, Sum};

/// A counter whose sums are floats without a rest, and which has no decrements.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlainCounter {
    increments: f64,
    samples: u64,
    start_ms: u64,
    update_ms: u64,
    windows: Windows,
    in_window: f64,
    in_before: f64,
}

/// A gauge without changes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlainGauge {
    /// What was set last, and when; in the present window it is the same.
    value: f64,
    set_ms: u64,
    start_ms: u64,
    update_ms: u64,
    windows: Windows,
    samples: u32,
    /// What the window before ended with, and how long after its start that was set.
    before_after_ms: u32,
    before: f64,
}

/// A timer, histogram or distribution whose windows have few readings that stand for one observation each.
#[derive(Debug, Clone)]
pub(super) struct PlainTimer {
    pub(super) total: Arc<Total>,
    /// The window that was written to last, and the one before it.
    window: Few,
    before: Few,
}

/// The readings of a window: its number, which is its start divided by its length; how long after its start the last one
/// came; and all of them, in the order in which they came. One without readings is none.
#[derive(Debug, Clone, Default)]
struct Few {
    number: u32,
    after_ms: u32,
    readings: Box<[f64]>,
}

/// The window that was written to last and the one before it: their numbers, which are their starts divided by their
/// length, and how many samples each has. One without samples is none.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Windows {
    number: u32,
    samples: u32,
    before: u32,
    before_samples: u32,
}

impl Windows {
    /// The windows after samples that come into one of them; none where that is not the last or a later one.
    #[inline]
    fn count(self, samples: u32, start_ms: u64, window_ms: u64) -> Option<Self> {
        let number = u32::try_from(start_ms / window_ms).ok()?;
        if self.samples == 0 || number > self.number {
            return Some(Self { number, samples, before: self.number, before_samples: self.samples });
        }
        let samples = self.samples.checked_add(samples)?;
        (number == self.number).then_some(Self { samples, ..self })
    }

    /// Whether `next` is in the same window.
    #[inline]
    fn goes_on(self, next: Self) -> bool {
        self.samples > 0 && self.number == next.number
    }

    fn start_ms(self, window_ms: u64) -> u64 {
        u64::from(self.number) * window_ms
    }

    fn before_ms(self, window_ms: u64) -> u64 {
        u64::from(self.before) * window_ms
    }

    /// Those of a state, if they can be kept so.
    fn of(state: &State, window_ms: u64) -> Option<Self> {
        let one = |window: Option<&Arc<Window>>| {
            let Some(window) = window else { return Some((0, 0)) };
            let number = u32::try_from(window.start_ms / window_ms).ok()?;
            let samples = u32::try_from(window.aggregate.samples()).ok()?;
            (samples > 0 && window.start_ms.is_multiple_of(window_ms)).then_some((number, samples))
        };
        let (number, samples) = one(state.window.as_ref())?;
        let (before, before_samples) = one(state.before.as_ref())?;
        (samples > 0 || before_samples == 0).then_some(Self { number, samples, before, before_samples })
    }
}

impl PlainCounter {
    /// The same as a state, if that can be kept so.
    pub(super) fn of(state: &State, window_ms: u64) -> Option<Self> {
        let windows = Windows::of(state, window_ms)?;
        let part = |window: &Option<Arc<Window>>| window.as_ref().map_or(Some(0.0), |window| float(&window.aggregate));
        Some(Self {
            increments: float(&state.total.aggregate)?,
            samples: state.total.aggregate.samples(),
            start_ms: state.total.start_ms,
            update_ms: state.total.update_ms,
            windows,
            in_window: part(&state.window)?,
            in_before: part(&state.before)?,
        })
        .filter(|_| state.unshipped.is_empty() && state.total.rates.is_none())
    }

    /// The total.
    pub(super) fn total(&self) -> Total {
        let Self { start_ms, update_ms, .. } = *self;
        Total { start_ms, update_ms, aggregate: counter(self.increments, self.samples), rates: None }
    }

    /// The whole state.
    pub(super) fn state(&self, window_ms: u64) -> State {
        let windows = self.windows;
        let window = |samples: u32, start_ms, sum| {
            (samples > 0).then(|| Arc::new(Window { start_ms, aggregate: counter(sum, samples.into()) }))
        };
        State {
            total: Arc::new(self.total()),
            window: window(windows.samples, windows.start_ms(window_ms), self.in_window),
            before: window(windows.before_samples, windows.before_ms(window_ms), self.in_before),
            unshipped: Vec::new(),
        }
    }

    /// Adds increments that were sealed at a moment to the window that begins at `start_ms`. `false`, with nothing
    /// changed, where this form can't keep that.
    #[inline]
    pub(super) fn add(&mut self, sum: f64, samples: u32, at_ms: u64, start_ms: u64, window_ms: u64) -> bool {
        let Some(windows) = self.windows.count(samples, start_ms, window_ms) else { return false };
        let goes_on = self.windows.goes_on(windows);
        let in_window = if goes_on { Sum::exact(self.in_window, sum) } else { Some(sum) };
        let (Some(increments), Some(in_window)) = (Sum::exact(self.increments, sum), in_window) else { return false };
        if !goes_on {
            self.in_before = self.in_window;
        }
        (self.increments, self.in_window, self.windows) = (increments, in_window, windows);
        self.samples = self.samples.saturating_add(samples.into());
        self.update_ms = self.update_ms.max(at_ms);
        true
    }
}

impl PlainGauge {
    /// The same as a state, if that can be kept so.
    pub(super) fn of(state: &State, window_ms: u64) -> Option<Self> {
        let windows = Windows::of(state, window_ms)?;
        let (value, set_ms) = set(&state.total.aggregate)?;
        if state.window.as_ref().is_some_and(|window| set(&window.aggregate) != Some((value, set_ms))) {
            return None;
        }
        let (before, before_ms) = match &state.before {
            None => (0.0, windows.before_ms(window_ms)),
            Some(window) => set(&window.aggregate)?,
        };
        Some(Self {
            value,
            set_ms,
            start_ms: state.total.start_ms,
            update_ms: state.total.update_ms,
            windows,
            samples: u32::try_from(state.total.aggregate.samples()).ok()?,
            before_after_ms: after_ms(before_ms, windows.before_ms(window_ms))?,
            before,
        })
        .filter(|_| state.unshipped.is_empty() && state.total.rates.is_none())
    }

    /// The total.
    pub(super) fn total(&self) -> Total {
        let Self { start_ms, update_ms, .. } = *self;
        let aggregate = gauge(self.value, self.set_ms, self.samples);
        Total { start_ms, update_ms, aggregate, rates: None }
    }

    /// The whole state.
    pub(super) fn state(&self, window_ms: u64) -> State {
        let windows = self.windows;
        let window = |samples: u32, start_ms, value, set_ms| {
            (samples > 0).then(|| Arc::new(Window { start_ms, aggregate: gauge(value, set_ms, samples) }))
        };
        let before_ms = windows.before_ms(window_ms);
        let before_set_ms = before_ms + u64::from(self.before_after_ms);
        State {
            total: Arc::new(self.total()),
            window: window(windows.samples, windows.start_ms(window_ms), self.value, self.set_ms),
            before: window(windows.before_samples, before_ms, self.before, before_set_ms),
            unshipped: Vec::new(),
        }
    }

    /// Sets it as of `set_ms`, the last of so many samples that were sealed at a moment, in the window that begins at
    /// `start_ms`. `false`, with nothing changed, where this form can't keep that.
    #[inline]
    pub(super) fn set(
        &mut self,
        (value, set_ms): (f64, u64),
        samples: u32,
        at_ms: u64,
        start_ms: u64,
        window_ms: u64,
    ) -> bool {
        let (Some(windows), Some(all)) =
            (self.windows.count(samples, start_ms, window_ms), self.samples.checked_add(samples))
        else {
            return false;
        };
        if self.samples > 0 && set_ms < self.set_ms {
            return false;
        }
        if !self.windows.goes_on(windows) && self.windows.samples > 0 {
            let Some(after_ms) = after_ms(self.set_ms, self.windows.start_ms(window_ms)) else { return false };
            (self.before, self.before_after_ms) = (self.value, after_ms);
        }
        (self.value, self.set_ms, self.windows, self.samples) = (value, set_ms, windows, all);
        self.update_ms = self.update_ms.max(at_ms);
        true
    }
}

impl PlainTimer {
    /// The same as a state, if that can be kept so.
    pub(super) fn of(state: &State, window_ms: u64) -> Option<Self> {
        let window = Few::of(state.window.as_ref(), window_ms)?;
        let before = Few::of(state.before.as_ref(), window_ms)?;
        let fits = state.unshipped.is_empty() && (before.readings.is_empty() || !window.readings.is_empty());
        fits.then(|| Self { total: Arc::clone(&state.total), window, before })
    }

    /// The whole state.
    pub(super) fn state(&self, window_ms: u64) -> State {
        State {
            total: Arc::clone(&self.total),
            window: self.window.show(window_ms),
            before: self.before.show(window_ms),
            unshipped: Vec::new(),
        }
    }

    /// Adds a cell that was sealed at a moment to the window that begins at `start_ms`; none, with nothing changed, where
    /// this form can't keep that, and `false` when a sum would not stay finite.
    pub(super) fn add(&mut self, cell: &Aggregate, at: At, start_ms: u64, within: Within<'_>) -> Option<bool> {
        let Aggregate::Observed(observed) = cell else { return None };
        let came = Few::of_readings(observed, start_ms, within.window_ms)?;
        let is_first = self.window.readings.is_empty();
        let goes_on = !is_first && came.number == self.window.number;
        if !is_first && came.number < self.window.number
            || goes_on
                && (came.after_ms < self.window.after_ms
                    || self.window.readings.len() + came.readings.len() > EXACT_MAX)
        {
            return None;
        }
        if !Arc::make_mut(&mut self.total).add_at(cell, at, within.limits) {
            return Some(false);
        }
        if goes_on {
            self.window.readings = [&*self.window.readings, &*came.readings].concat().into_boxed_slice();
            self.window.after_ms = came.after_ms;
        } else {
            self.before = std::mem::replace(&mut self.window, came);
        }
        Some(true)
    }

    /// How many bytes its windows hold on the heap.
    pub(super) fn memory(&self) -> usize {
        [&self.window, &self.before].into_iter().map(Few::memory).sum()
    }
}

impl Few {
    /// The readings of a window, if they can be kept so.
    fn of(window: Option<&Arc<Window>>, window_ms: u64) -> Option<Self> {
        match window.map(|window| (&window.aggregate, window.start_ms)) {
            None => Some(Self::default()),
            Some((Aggregate::Observed(observed), start_ms)) => Self::of_readings(observed, start_ms, window_ms),
            Some(_) => None,
        }
    }

    fn of_readings(observed: &Observed, start_ms: u64, window_ms: u64) -> Option<Self> {
        let exact = &observed.exact;
        let (last, last_ms) = observed.last;
        let fits = observed.is_exact()
            && exact.len() as u64 == observed.n
            && exact.len() <= EXACT_MAX
            && exact.iter().all(|(_, weight)| *weight == 1.0)
            && exact.last().is_some_and(|(value, _)| value.to_bits() == last.to_bits())
            && start_ms.is_multiple_of(window_ms);
        let number = u32::try_from(start_ms / window_ms).ok().filter(|_| fits)?;
        let after_ms = after_ms(last_ms, start_ms)?;
        Some(Self { number, after_ms, readings: exact.iter().map(|(value, _)| *value).collect() })
    }

    fn show(&self, window_ms: u64) -> Option<Arc<Window>> {
        let start_ms = u64::from(self.number) * window_ms;
        let mut observed = Box::<Observed>::default();
        observed.exact.reserve_exact(self.readings.len());
        for value in &self.readings {
            observed.observe(*value, 1.0, start_ms + u64::from(self.after_ms));
        }
        let is_any = !self.readings.is_empty();
        is_any.then(|| Arc::new(Window { start_ms, aggregate: Aggregate::Observed(observed) }))
    }

    fn memory(&self) -> usize {
        size_of_val(&*self.readings) + if self.readings.is_empty() { 0 } else { 8 }
    }
}

fn after_ms(set_ms: u64, start_ms: u64) -> Option<u32> {
    u32::try_from(set_ms.checked_sub(start_ms)?).ok()
}

fn counter(increments: f64, samples: u64) -> Aggregate {
    Aggregate::Counter(Counter { increments: increments.into(), samples, ..Counter::default() })
}

fn gauge(value: f64, set_ms: u64, samples: u32) -> Aggregate {
    let set = (samples > 0).then_some((value, set_ms));
    Aggregate::Gauge(Gauge { set, samples: samples.into(), ..Gauge::default() })
}

/// The increments of a counter that is no more than that.
fn float(aggregate: &Aggregate) -> Option<f64> {
    let Aggregate::Counter(Counter { increments, decrements, .. }) = aggregate else { return None };
    (*decrements == Sum::default()).then(|| increments.as_float()).flatten()
}

/// The last set of a gauge that has nothing else; one that has no samples was set to 0 at no time.
fn set(aggregate: &Aggregate) -> Option<(f64, u64)> {
    let Aggregate::Gauge(Gauge { set, change, changed_at: 0, samples }) = aggregate else { return None };
    let is_set = set.is_some() == (*samples > 0);
    (is_set && *change == Sum::default()).then(|| set.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::series::Limits;
    use super::super::shard::Content;
    use super::super::state::{At, Held, Within};
    use super::*;
    use crate::sample::Kind;

    const WINDOW_MS: u64 = 10_000;
    const BEGIN_MS: u64 = 1_764_000_000_000;

    /// What comes to a series: a number, how late its seal is, how much later the next one comes.
    fn step() -> impl Strategy<Value = (f64, u64, u64)> {
        let number = prop_oneof![
            6 => (0..1_000_i32).prop_map(f64::from),
            1 => Just(0.1),
            1 => Just(-3.0),
            1 => Just(9_007_199_254_740_993.0),
        ];
        (number, prop_oneof![4 => Just(0_u64), 1 => 0..25_000_u64], prop_oneof![Just(100_u64), 0..30_000_u64])
    }

    fn content(kind: Kind, number: f64, at_ms: u64) -> Content<'static> {
        if kind == Kind::Counter {
            return Content::Increments { sum: number, samples: 2 };
        }
        Content::Set { value: number, at_ms, samples: 3 }
    }

    /// Some readings of a timer, of which every order of additions gives the same sums.
    fn readings(number: f64, at_ms: u64) -> Aggregate {
        let number = number.min(1e6);
        let mut observed = Box::<Observed>::default();
        for reading in 0..1 + number.abs() as u64 % 40 {
            let weight = if number == 0.1 { 2.0 } else { 1.0 };
            assert!(observed.observe(number.trunc() + reading as f64, weight, at_ms));
        }
        Aggregate::Observed(observed)
    }

    /// A whole cell of the same.
    fn cell(kind: Kind, number: f64, at_ms: u64) -> Aggregate {
        if kind == Kind::Timer {
            return readings(number, at_ms);
        }
        let mut cell = content(kind, number.abs(), at_ms).to_aggregate();
        match &mut cell {
            Aggregate::Counter(counter) if number < 0.0 => {
                std::mem::swap(&mut counter.increments, &mut counter.decrements);
            }
            Aggregate::Gauge(gauge) if number < 0.0 => {
                assert!(gauge.change_by(number, at_ms));
            }
            Aggregate::Counter(_)
            | Aggregate::Gauge(_)
            | Aggregate::Observed(_)
            | Aggregate::Set(_)
            | Aggregate::Meter(_) => {}
        }
        cell
    }

    proptest! {
        #[test]
        fn both_forms_are_the_same(
            kind in prop::sample::select(vec![Kind::Counter, Kind::Gauge, Kind::Timer]),
            steps in prop::collection::vec(step(), 1..40),
        ) {
            let limits = Limits::default();
            let within = Within { window_ms: WINDOW_MS, limits: &limits };
            let new = || State::new(Total::new(kind, BEGIN_MS));
            let mut whole = Held::Full(new());
            let mut held = Held::new(kind, new(), WINDOW_MS);
            prop_assert!(!matches!(held, Held::Full(_)));
            let (mut now_ms, mut plain) = (BEGIN_MS, 0);
            for (number, late_ms, later_ms) in &steps {
                let sealed_ms = now_ms - late_ms;
                let start_ms = sealed_ms - sealed_ms % WINDOW_MS;
                let at = At { wall_ms: sealed_ms, steady_ms: sealed_ms };
                let cell = cell(kind, *number, sealed_ms);
                prop_assert!(whole.fold(&cell, kind, at, start_ms, within));
                let is_plain = *number >= 0.0
                    && kind != Kind::Timer
                    && held.fold_plain(&content(kind, *number, sealed_ms), sealed_ms, start_ms, WINDOW_MS);
                if !is_plain {
                    prop_assert!(held.fold(&cell, kind, at, start_ms, within));
                    held.shrink(kind, WINDOW_MS);
                }
                plain += u32::from(is_plain);
                now_ms += later_ms;
                let (shown, expected) = (held.state(WINDOW_MS), whole.state(WINDOW_MS));
                prop_assert_eq!(&shown.total, &expected.total);
                prop_assert_eq!((&shown.window, &shown.before), (&expected.window, &expected.before));
                prop_assert_eq!(&*held.total(), &*expected.total);
            }
            let is_simple = steps.iter().all(|(number, late_ms, _)| *late_ms == 0 && *number > 0.5 && *number < 1e9);
            prop_assert!(!is_simple || plain as usize == steps.len() || kind == Kind::Timer);
            let few = steps.len() == 1 || steps.iter().all(|(_, _, later_ms)| *later_ms > WINDOW_MS);
            prop_assert!(!is_simple || !few || matches!(held, Held::Timer(_)) == (kind == Kind::Timer));
        }
    }
}
