//! The fold: sealed cells into the ledger.
//!
//! A [`Writer`] belongs to one thread. It puts what each shard sealed into totals and windows, charges what they grow by,
//! keeps deltas for a remote store, and lets idle series go.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::ledger::{At, Changed, Ledger, Series, Shipped, State, Total, Unshipped};
use super::shard::{Budget, Content, Sealed, SeriesId};
use super::state::{Held, Within, open_window, what_counts};
use super::{Aggregate, series};
use crate::sample::{Kind, SeriesKey};

/// The series of a shard by their numbers there.
type Numbered = Vec<Option<Arc<Series>>>;

/// What the writer knows of one shard.
#[derive(Debug, Default)]
struct ShardSeries {
    by_number: Numbered,
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
    /// What a flush takes is taken as it is then, because what else it takes, receipts or marks, belongs to just that.
    pub takes_totals: bool,
    /// The journal does not have all that was taken for it, so no series may go that would be looked for there.
    pub is_journal_behind: bool,
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
    /// The samples in them.
    pub overflowed_samples: u64,
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
            takes_totals: false,
            is_journal_behind: false,
            idle_before_ms: [0; Kind::ALL.len()],
            held: [0; Kind::ALL.len()],
            created: [0; Kind::ALL.len()],
            expired: [0; Kind::ALL.len()],
            overflowed: 0,
            overflowed_samples: 0,
            halved: 0,
            estimated: 0,
        }
    }

    /// Puts back a series that the journal holds, at the start.
    pub fn restore(&mut self, kind: Kind, key: SeriesKey, mut total: Total, now_ms: u64) {
        total.hold_back(now_ms);
        let id = Arc::new(SeriesId { kind, key });
        let series = Arc::new(Series::new(id, State::new(total), self.ledger.window_ms(), now_ms));
        let bytes = series.held().memory();
        self.budget.force(1, self.budget.cost(series.id()) + bytes);
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
        let start_ms = open_window(at.wall_ms, self.ledger.window_ms(), self.ledger.closed_until_ms());
        let mut numbered = std::mem::take(&mut self.shards[shard].by_number);
        // What bears an earlier time came into a window that is closed for all else.
        for (number, start_ms, cell) in sealed.cells.drain_earlier() {
            self.fold_number(&mut numbered, number, &Content::Aggregate(&cell), at, start_ms);
        }
        sealed.cells.drain(|number, content, next| {
            if let Some(Some(series)) = next.and_then(|next| numbered.get(next as usize)) {
                series.prefetch();
            }
            self.fold_number(&mut numbered, number, &content, at, start_ms);
        });
        self.shards[shard].by_number = numbered;
    }

    fn fold_number(&mut self, numbered: &mut Numbered, number: u32, content: &Content<'_>, at: At, start_ms: u64) {
        let Some(Some(series)) = numbered.get_mut(number as usize) else { return };
        if content.is_empty() {
            return;
        }
        if !series.listed.load(Ordering::Relaxed) {
            self.begin_again(series, at);
        }
        self.fold_cell(series, content, at, start_ms);
    }

    /// Says that every shard has delivered what it received before a moment. A wall clock that was set back a little opens
    /// no window again: they stand still until it has come forward.
    pub fn close_until(&self, at_ms: u64) {
        let closed_ms = self.ledger.closed_until_ms();
        let until_ms = open_window(at_ms, self.ledger.window_ms(), closed_ms);
        if closed_ms == 0 || until_ms < closed_ms {
            self.ledger.first_ms.store(until_ms, Ordering::Relaxed);
        }
        self.ledger.closed_until_ms.store(until_ms, Ordering::Release);
    }

    /// Takes what changed since the last time, and begins the next flush.
    pub fn take_changed(&mut self) -> Vec<Changed> {
        let flush = self.flush;
        self.flush += 1;
        let (is_remote, takes_totals) = (self.remote, self.takes_totals);
        let take = |series: Arc<Series>| {
            series.changed.store(false, Ordering::Relaxed);
            let shipped = is_remote.then(|| shipped(&series, flush)).flatten();
            let total = (takes_totals && shipped.is_none()).then(|| series.total().into_shared());
            series.listed.load(Ordering::Relaxed).then_some(Changed { series, total, shipped })
        };
        self.changed.drain(..).filter_map(take).collect()
    }

    /// Begins the next flush without taking what changed, where nothing keeps it.
    pub fn pass_over_changed(&mut self) {
        self.flush += 1;
        for series in self.changed.drain(..) {
            series.changed.store(false, Ordering::Relaxed);
        }
    }

    /// The number of the flush that [`Writer::take_changed`] takes next.
    pub fn next_flush(&self) -> u64 {
        self.flush
    }

    /// Drops the deltas that batches carry now: those of flushes up to `flush`.
    pub fn committed(&self, flush: u64, series: &[Arc<Series>]) {
        for series in series {
            if let Held::Full(state) = &mut *series.held() {
                state.unshipped.retain(|unshipped| unshipped.flush > flush);
            }
        }
    }

    /// Lets a series start again from nothing: it is gone until its next sample. `false` when the ledger does not hold it.
    pub fn reset(&mut self, id: &SeriesId) -> bool {
        let Some(series) = self.ledger.get(id) else { return false };
        if series.holders.load(Ordering::Relaxed) == 0 {
            self.budget.refund(1, self.budget.cost(series.id()));
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
            self.budget.refund(1, self.budget.cost(series.id()));
            self.forget(&series);
        }
        let numbers = |shard: &ShardSeries| {
            let numbered = shard.by_number.iter().enumerate();
            let idle = numbered.filter(|(_, series)| series.as_ref().is_some_and(|series| self.is_idle(series)));
            idle.map(|(number, _)| number as u32).collect()
        };
        self.shards.iter().map(numbers).collect()
    }

    fn fold_cell(&mut self, series: &Arc<Series>, content: &Content<'_>, at: At, start_ms: u64) {
        let window_ms = self.ledger.window_ms();
        let is_plain = !self.remote && series.held().fold_plain(content, at.wall_ms, start_ms, window_ms);
        let is_folded = is_plain
            || match content {
                Content::Aggregate(cell) => self.fold_whole(series, cell, at, start_ms),
                Content::Increments { .. } | Content::Set { .. } => {
                    self.fold_whole(series, &content.to_aggregate(), at, start_ms)
                }
            };
        if !is_folded {
            self.overflowed += 1;
            self.overflowed_samples += content.to_aggregate().samples();
            return;
        }
        series.folded_at_ms.store(at.steady_ms, Ordering::Relaxed);
        if !series.listed.load(Ordering::Relaxed) {
            self.insert(series);
        }
        if !series.changed.load(Ordering::Relaxed) {
            series.changed.store(true, Ordering::Relaxed);
            self.changed.push(Arc::clone(series));
        }
    }

    /// Folds a cell where the smallest form of a series cannot take it. `false` when a sum would not stay finite.
    fn fold_whole(&mut self, series: &Series, cell: &Aggregate, at: At, start_ms: u64) -> bool {
        let limits = *self.budget.each();
        let within = Within { window_ms: self.ledger.window_ms(), limits: &limits };
        let mut held = series.held();
        // What is not listed, as before its first sample and after a reset, has nothing charged to it.
        let is_listed = series.listed.load(Ordering::Relaxed);
        let charged = if is_listed { held.memory() } else { 0 };
        let before = Precision::of(&mut held);
        let finite = if self.remote {
            let state = held.whole(within.window_ms);
            let delta = what_counts(cell, &state.total.aggregate).into_owned();
            let finite = state.fold(cell, series.kind(), at, start_ms, within);
            if finite {
                add_unshipped(&mut state.unshipped, delta, self.flush, &limits);
            }
            finite
        } else {
            let finite = held.fold(cell, series.kind(), at, start_ms, within);
            held.shrink(series.kind(), within.window_ms);
            finite
        };
        if finite || is_listed {
            self.charge_growth(&mut held, charged);
        }
        let after = Precision::of(&mut held);
        self.halved += u64::from(after.halvings.saturating_sub(before.halvings));
        self.estimated += u64::from(after.is_estimate && !before.is_estimate);
        finite
    }

    /// Charges what a state keeps beyond the bytes charged so far. Where there is no room, its histogram gives precision
    /// up, once a fold; what then remains is charged all the same, and new series are refused until there is room.
    fn charge_growth(&self, held: &mut Held, charged: i64) {
        if self.budget.charge_change(held.memory() - charged) {
            return;
        }
        if let Some(total) = held.shared_total()
            && let Aggregate::Observed(observed) = &total.aggregate
            && observed.histogram.scale() > SCALE_SPARED
            && let Aggregate::Observed(observed) = &mut Arc::make_mut(total).aggregate
        {
            observed.histogram.halve();
        }
        self.budget.force(0, held.memory() - charged);
    }

    /// Begins a series again that was reset or freed and to which a cell comes.
    fn begin_again(&self, series: &mut Arc<Series>, at: At) {
        if let Some(other) = self.ledger.get(series.id()) {
            // Another shard began it again first.
            other.holders.fetch_add(1, Ordering::Relaxed);
            *series = other;
        } else if series.changed.load(Ordering::Relaxed) || series.folded_at_ms.load(Ordering::Relaxed) != 0 {
            let state = State::new(Total::new(series.kind(), at.wall_ms));
            *series.held() = Held::new(series.kind(), state, self.ledger.window_ms());
        }
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
        let series = Arc::new(Series::new(Arc::clone(id), State::new(total), self.ledger.window_ms(), 0));
        series.holders.store(1, Ordering::Relaxed);
        series
    }

    fn release(&mut self, shard: usize, number: u32) {
        let place = self.shards[shard].by_number.get_mut(number as usize);
        let Some(series) = place.and_then(Option::take) else { return };
        if series.holders.fetch_sub(1, Ordering::Relaxed) > 1 {
            // The shard gave the whole charge back, and another still holds the series.
            self.budget.force(1, 0);
        } else if series.listed.load(Ordering::Relaxed) && (self.is_journal_behind || !self.is_idle(&series)) {
            // Samples were on their way when the shard was asked, and may be still, to the journal. The ledger holds the series until it is idle again.
            self.budget.force(1, self.budget.cost(series.id()));
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
        self.budget.refund(0, series.held().memory());
        self.held[series.kind() as usize] -= 1;
        self.ledger.remove(series);
    }
}

/// Want of memory halves scales down to this one, whose error is 4.3 %: below, figures would not be worth their memory.
const SCALE_SPARED: i8 = 3;

/// Adds a cell to the delta of a flush.
fn add_unshipped(unshipped: &mut Vec<Unshipped>, cell: Aggregate, flush: u64, limits: &series::Limits) {
    match unshipped.last_mut() {
        Some(last) if last.flush == flush => {
            Arc::make_mut(&mut last.delta).merge_within(&cell, 0, limits);
        }
        Some(_) | None => unshipped.push(Unshipped { flush, delta: Arc::new(cell) }),
    }
}

/// What a flush ships of a series.
fn shipped(series: &Series, flush: u64) -> Option<Shipped> {
    let held = series.held();
    let Held::Full(state) = &*held else { return None };
    let unshipped = state.unshipped.iter().find(|unshipped| unshipped.flush == flush)?;
    Some(Shipped { total: Arc::clone(&state.total), delta: Arc::clone(&unshipped.delta) })
}

/// How exactly a total is kept.
#[derive(Default)]
struct Precision {
    halvings: u32,
    is_estimate: bool,
}

impl Precision {
    fn of(held: &mut Held) -> Self {
        let Some(total) = held.shared_total() else { return Self::default() };
        match &total.aggregate {
            Aggregate::Observed(observed) => Self { halvings: observed.histogram.halvings(), is_estimate: false },
            Aggregate::Set(set) => Self { halvings: 0, is_estimate: set.registers().is_some() },
            Aggregate::Counter(_) | Aggregate::Gauge(_) | Aggregate::Meter(_) => Self::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::ledger::Closed;
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

        fn state(&self, kind: Kind, name: &str) -> State {
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
    fn a_window_before_the_two_that_are_kept_is_past() {
        let mut pair = pair();
        pair.count("a", 2_000);
        pair.count("a", 12_000);
        assert!(!pair.state(Kind::Counter, "a").is_past(BEGIN_MS));
        pair.count("a", 32_000);
        let is_past = |after_ms| pair.state(Kind::Counter, "a").is_past(BEGIN_MS + after_ms);
        assert_eq!([0, 10_000, 20_000, 30_000].map(is_past), [true, false, false, false]);
    }

    #[test]
    fn an_idle_series_has_an_empty_window_and_a_young_one_none() {
        let mut pair = pair();
        let last = |pair: &Pair| {
            let window = pair.writer.ledger.last_window(Kind::Counter, &pair.state(Kind::Counter, "a"));
            window.map(|Closed { window, .. }| (window.start_ms - BEGIN_MS, window.aggregate.samples()))
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
    fn a_gauge_has_the_value_at_the_end_of_a_window_wherever_it_was_set() {
        let mut pair = pair();
        pair.writer.close_until(BEGIN_MS);
        let gauge = |pair: &mut Pair, value: &Value<'_>, after_ms| {
            pair.send(Kind::Gauge, "g", value, BEGIN_MS + after_ms);
            pair.fold(both(after_ms));
        };
        let closed = |pair: &Pair, after_ms| {
            let state = pair.state(Kind::Gauge, "g");
            let closed = pair.writer.ledger.closed(Kind::Gauge, &state, BEGIN_MS + after_ms)?;
            let Aggregate::Gauge(gauge) = &closed.window.aggregate else { return None };
            Some((gauge.value(), gauge.samples, closed.idle))
        };
        gauge(&mut pair, &Value::Numbers(&[7.0]), 5_000);
        assert_eq!(closed(&pair, 0), Some((7.0, 1, 0)));
        assert_eq!(closed(&pair, 30_000), Some((7.0, 0, 3)));
        // A change alone, and what comes into the window after that.
        gauge(&mut pair, &Value::Changes(&[2.0]), 31_000);
        assert_eq!(closed(&pair, 20_000), Some((7.0, 0, 2)));
        gauge(&mut pair, &Value::Numbers(&[100.0]), 41_000);
        assert_eq!(closed(&pair, 30_000), Some((9.0, 1, 0)));
        gauge(&mut pair, &Value::Changes(&[-1.0]), 42_000);
        assert_eq!((closed(&pair, 30_000), closed(&pair, 40_000)), (Some((9.0, 1, 0)), Some((99.0, 2, 0))));
        assert_eq!(closed(&pair, 20_000), None, "two windows later that is not known any more");
        // The journal has nothing but the total.
        let mut total = Total::new(Kind::Gauge, BEGIN_MS);
        total.aggregate = Aggregate::Gauge(super::super::Gauge { set: Some((3.0, BEGIN_MS)), ..Default::default() });
        pair.writer.restore(Kind::Gauge, SeriesKey::parse("kept"), total, BEGIN_MS + 50_000);
        let state = pair.state(Kind::Gauge, "kept");
        let idle = pair.writer.ledger.closed(Kind::Gauge, &state, BEGIN_MS + 40_000).map(|closed| closed.idle);
        assert_eq!(idle, Some(4));
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
        assert_eq!(changed[0].series.total().aggregate.samples(), 2);
        assert_eq!(pair.budget.bytes(), charged);
        // It is free to go after that, and to return.
        pair.writer.expire(|_| u64::MAX);
        assert!(pair.writer.ledger.is_empty());
        assert_eq!(pair.budget.bytes(), 0);
        pair.count("a", 2);
        assert_eq!(pair.budget.bytes(), charged);
    }

    #[test]
    fn a_sample_on_its_way_to_the_journal_while_its_series_expires_is_not_forgotten() {
        let mut pair = pair();
        let number = pair.count("a", 0);
        pair.writer.take_changed();
        assert_eq!(pair.writer.expire(|_| u64::MAX), [[number]]);
        // Sealed before the shard hears of that; taken for the journal before the shard gives the number back.
        pair.count("a", 1);
        pair.shard.retire(&[number]);
        assert_eq!(pair.writer.take_changed().len(), 1);
        pair.writer.is_journal_behind = true;
        pair.fold(both(2));
        // The series returns, and the journal would tell of the first sample alone.
        pair.count("a", 3);
        assert_eq!(pair.state(Kind::Counter, "a").total.aggregate.samples(), 3);
    }

    /// Else a flush could write a part of a request whose receipt comes with the next.
    #[test]
    fn what_a_flush_takes_beside_receipts_does_not_change_any_more() {
        let mut pair = pair();
        pair.count("a", 0);
        assert!(pair.writer.take_changed()[0].total.is_none(), "it is read when it is written");
        pair.writer.takes_totals = true;
        pair.count("a", 1);
        let taken = pair.writer.take_changed();
        pair.count("a", 2);
        let samples = |total: &Total| total.aggregate.samples();
        assert_eq!(samples(taken[0].total.as_ref().unwrap()), 2);
        assert_eq!(samples(&taken[0].series.total()), 3);
        assert_eq!(samples(pair.writer.take_changed()[0].total.as_ref().unwrap()), 3);
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
    fn with_a_remote_store_every_kind_ships_its_deltas() {
        let budget = Arc::new(Budget::new(&Limits::default()));
        let writer = Writer::new(Arc::new(Ledger::new(WINDOW_MS)), Arc::clone(&budget), true, 1);
        let mut pair = Pair { shard: Shard::new(Arc::clone(&budget)), writer, budget };
        for flush in 1..=3_u64 {
            for kind in Kind::ALL {
                let number = Value::Numbers(&[flush as f64]);
                let member = flush.to_le_bytes();
                let value = if kind == Kind::Set { Value::Member(&member) } else { number };
                pair.send(kind, kind.letter(), &value, BEGIN_MS + flush);
            }
            pair.fold(both(flush));
            let changed = pair.writer.take_changed();
            assert_eq!(changed.len(), Kind::ALL.len());
            for Changed { series, shipped, .. } in &changed {
                let Shipped { total, delta } = shipped.as_ref().unwrap();
                assert_eq!((delta.samples(), total.aggregate.samples()), (1, flush), "{:?}", series.id());
                assert_eq!(series.state().unshipped.len(), 1);
            }
            let all: Vec<_> = changed.into_iter().map(|changed| changed.series).collect();
            pair.writer.committed(flush, &all);
            assert!(all.iter().all(|series| series.state().unshipped.is_empty()));
        }
    }

    #[test]
    fn windows_of_months_are_as_any_others() {
        let window_ms = 60 * 86_400_000;
        let budget = Arc::new(Budget::new(&Limits::default()));
        let writer = Writer::new(Arc::new(Ledger::new(window_ms)), Arc::clone(&budget), false, 1);
        let mut pair = Pair { shard: Shard::new(Arc::clone(&budget)), writer, budget };
        let start_ms = BEGIN_MS - BEGIN_MS % window_ms;
        for (kind, at_ms) in [(Kind::Counter, BEGIN_MS), (Kind::Gauge, BEGIN_MS), (Kind::Timer, BEGIN_MS)] {
            for _ in 0..2 {
                pair.send(kind, kind.letter(), &Value::Numbers(&[3.0]), at_ms);
                pair.fold(At { wall_ms: at_ms, steady_ms: at_ms });
            }
            let window = pair.state(kind, kind.letter()).window.unwrap();
            assert_eq!((window.start_ms, window.aggregate.samples()), (start_ms, 2), "{kind:?}");
        }
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
