//! The cells of a shard: what came into each series since the last seal, by series number.
//!
//! A cell is 16 bytes, four to a line of the cache, so that a line of input meets one line of memory here. It holds what
//! nearly all samples are: a counter whose sum is exact in one float, the last set of a gauge, the readings of a timer as
//! a chain in a log that all cells share. What is more than that ([`Cell::Wide`]) is an [`Aggregate`] of its own, until
//! the fold takes it.
//!
//! Bounds: a cell has at most [`EXACT_MAX`] readings in the log, the log at most [`LOG_MAX`] (24 MiB); beyond, readings
//! go to the buckets of a wide cell.

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::series::EXACT_MAX;
use super::set::Members;
use super::{Aggregate, Counter, Gauge, Marks, Observed, Sum, series};
use crate::sample::{Kind, Reason, Value};

/// What came into one series.
#[derive(Debug, Clone, Copy, Default)]
enum Cell {
    /// Nothing.
    #[default]
    Empty,
    /// Increments whose sum is a float without a rest, and how many they were.
    Counter { increments: f64, samples: u32 },
    /// The last set of a gauge, when that was after the cells' [`Cells::base_ms`], and how many sets there were.
    Gauge { value: f64, after_ms: u32, samples: u16 },
    /// Readings in the log: the newest one's place, how many, and when the last came.
    Timed { newest: u32, after_ms: u32, count: u16 },
    /// All else: a place among [`Cells::wide`].
    Wide(u32),
}

const _: () = assert!(size_of::<Cell>() == 16, "four cells to a line of the cache");

/// One reading of a timer, histogram or distribution.
#[derive(Debug, Clone, Copy)]
struct Reading {
    value: f64,
    weight: f64,
    /// The place of the one before it in the same cell.
    previous: u32,
}

/// How many readings the log holds.
const LOG_MAX: usize = 1 << 20;

/// Readings and weights up to this size are added to nothing here that could overflow.
const LOGGED_MAX: f64 = 1e100;

/// The cells of a shard by series number, and which of them hold something.
#[derive(Debug, Default)]
pub struct Cells {
    cells: Vec<Cell>,
    touched: Vec<u32>,
    log: Vec<Reading>,
    wide: Vec<Aggregate>,
    /// The time of the first sample since the seal, from which cells count theirs.
    base_ms: u64,
    /// Of samples that bear the time of an earlier window, by series number and the start of that window.
    earlier: HashMap<(u32, u64), Aggregate, RandomState>,
    /// For [`Cells::drain`].
    scratch: Option<Box<Observed>>,
}

/// How far ahead of a cell's turn [`Cells::drain`] tells its number.
const AHEAD: usize = 8;

/// What a cell held, for the fold.
#[derive(Debug)]
pub enum Content<'a> {
    /// Increments of a counter, exact, and how many they were.
    Increments {
        /// Their sum.
        sum: f64,
        /// How many.
        samples: u32,
    },
    /// The last set of a gauge.
    Set {
        /// The value.
        value: f64,
        /// When it was set, in milliseconds since the epoch.
        at_ms: u64,
        /// How many sets there were.
        samples: u32,
    },
    /// All else.
    Aggregate(&'a Aggregate),
}

impl Content<'_> {
    /// Whether no sample came.
    pub fn is_empty(&self) -> bool {
        match self {
            Content::Increments { samples, .. } | Content::Set { samples, .. } => *samples == 0,
            Content::Aggregate(aggregate) => aggregate.is_empty(),
        }
    }

    /// The same as an aggregate.
    pub fn to_aggregate(&self) -> Aggregate {
        match *self {
            Content::Increments { sum, samples } => Aggregate::Counter(counter(sum, samples)),
            Content::Set { value, at_ms, samples } => Aggregate::Gauge(gauge(value, at_ms, samples)),
            Content::Aggregate(aggregate) => aggregate.clone(),
        }
    }
}

fn counter(sum: f64, samples: u32) -> Counter {
    Counter { increments: sum.into(), samples: samples.into(), ..Counter::default() }
}

fn gauge(value: f64, at_ms: u64, samples: u32) -> Gauge {
    Gauge { set: Some((value, at_ms)), samples: samples.into(), ..Gauge::default() }
}

impl Cells {
    /// Shows what came, by series number, and the number of one that will be shown soon; it leaves every cell empty and
    /// the memory in place.
    pub fn drain(&mut self, mut each: impl FnMut(u32, Content<'_>, Option<u32>)) {
        let mut touched = std::mem::take(&mut self.touched);
        if touched.len() >= self.cells.len() / 8 {
            // In the order in which cells and series stand in memory.
            let numbered = self.cells.iter().zip(0..).filter(|(cell, _)| !matches!(cell, Cell::Empty));
            touched.clear();
            touched.extend(numbered.map(|(_, number)| number));
        }
        for (at, number) in touched.iter().copied().enumerate() {
            let ahead = touched.get(at + AHEAD).copied();
            let Some(cell) = self.cells.get_mut(number as usize) else { continue };
            let cell = std::mem::take(cell);
            self.show(cell, |content| each(number, content, ahead));
        }
        touched.clear();
        self.touched = touched;
        empty(&mut self.log);
        empty(&mut self.wide);
    }

    fn show(&mut self, cell: Cell, each: impl FnOnce(Content<'_>)) {
        match cell {
            Cell::Empty => {}
            Cell::Counter { increments, samples } => each(Content::Increments { sum: increments, samples }),
            Cell::Gauge { value, after_ms, samples } => {
                let at_ms = self.base_ms + u64::from(after_ms);
                each(Content::Set { value, at_ms, samples: samples.into() });
            }
            Cell::Timed { newest, after_ms, count } => {
                let mut observed = self.scratch.take().unwrap_or_default();
                observed.clear();
                let at_ms = self.base_ms + u64::from(after_ms);
                observe_logged(&mut observed, &self.log, newest, count, at_ms, &series::Limits::default());
                let observed = Aggregate::Observed(observed);
                each(Content::Aggregate(&observed));
                if let Aggregate::Observed(observed) = observed {
                    self.scratch = Some(observed);
                }
            }
            Cell::Wide(place) => each(Content::Aggregate(&self.wide[place as usize])),
        }
    }

    /// Takes out what came, as whole aggregates.
    pub fn take(&mut self) -> Vec<(u32, Aggregate)> {
        let mut taken = Vec::new();
        self.drain(|number, content, _| taken.push((number, content.to_aggregate())));
        taken
    }

    /// Takes out what came for earlier windows: series number, start of the window, and the cell.
    pub fn drain_earlier(&mut self) -> impl Iterator<Item = (u32, u64, Aggregate)> {
        self.earlier.drain().map(|((number, start_ms), cell)| (number, start_ms, cell))
    }

    /// Whether nothing came since the seal.
    pub(super) fn is_empty(&self) -> bool {
        self.touched.is_empty() && self.earlier.is_empty()
    }

    /// The series that have a sample since the seal.
    pub(super) fn held(&self) -> impl Iterator<Item = u32> {
        self.touched.iter().copied().chain(self.earlier.keys().map(|(number, _)| *number))
    }

    /// Lets a cell come into the cache.
    #[inline]
    pub(super) fn prefetch(&self, number: u32) {
        if let Some(cell) = self.cells.get(number as usize) {
            super::index::prefetch(cell);
        }
    }

    /// Adds a number to a cell.
    #[inline]
    pub(super) fn add_number(
        &mut self,
        number: u32,
        kind: Kind,
        value: f64,
        rate: f64,
        at_ms: u64,
        limits: &series::Limits,
    ) -> Result<(), Reason> {
        if self.touched.is_empty() {
            self.base_ms = at_ms;
        }
        let place = number as usize;
        if place >= self.cells.len() {
            self.grow(place);
        }
        let fits = match (&mut self.cells[place], kind) {
            (Cell::Counter { increments, samples }, _) => add_increment(increments, samples, value / rate),
            (cell @ Cell::Empty, Kind::Counter) => {
                let (mut increments, mut samples) = (0.0, 0);
                let fits = add_increment(&mut increments, &mut samples, value / rate);
                if fits {
                    *cell = Cell::Counter { increments, samples };
                    self.touched.push(number);
                }
                fits
            }
            (Cell::Gauge { .. } | Cell::Empty, Kind::Gauge) => self.set(number, value, at_ms),
            (Cell::Timed { .. } | Cell::Empty, Kind::Timer | Kind::Histogram | Kind::Distribution) => {
                self.log(number, value, 1.0 / rate, at_ms)
            }
            (Cell::Empty, Kind::Set | Kind::Meter) | (Cell::Wide(_) | Cell::Gauge { .. } | Cell::Timed { .. }, _) => {
                false
            }
        };
        if fits {
            return Ok(());
        }
        let value = Value::Numbers(&[value]);
        add_to(self.widened(number, kind, limits), &value, rate, at_ms, limits)
    }

    /// Adds any value to a cell. Of several values those before one that is refused are added.
    pub(super) fn add(
        &mut self,
        number: u32,
        kind: Kind,
        value: &Value<'_>,
        rate: f64,
        at_ms: u64,
        limits: &series::Limits,
    ) -> Result<(), Reason> {
        match value {
            Value::Numbers(numbers) => {
                numbers.iter().try_for_each(|value| self.add_number(number, kind, *value, rate, at_ms, limits))
            }
            Value::Changes(_) | Value::Member(_) => {
                if self.touched.is_empty() {
                    self.base_ms = at_ms;
                }
                self.grow(number as usize);
                add_to(self.widened(number, kind, limits), value, rate, at_ms, limits)
            }
        }
    }

    /// Adds a value to an earlier window, one that begins at `start_ms`.
    pub(super) fn add_earlier(
        &mut self,
        place: (u32, u64),
        kind: Kind,
        value: &Value<'_>,
        rate: f64,
        at_ms: u64,
        limits: &series::Limits,
    ) -> Result<(), Reason> {
        let cell = self.earlier.entry(place).or_insert_with(|| Aggregate::new(kind));
        add_to(cell, value, rate, at_ms, limits)
    }

    /// Makes room for a cell at a place.
    #[cold]
    fn grow(&mut self, place: usize) {
        if place >= self.cells.len() {
            self.cells.resize_with((place + 1).next_multiple_of(64), Cell::default);
        }
    }

    /// When something came, as a cell keeps it; none for a time before the first sample's, as a client may state it.
    #[inline]
    fn after_ms(&self, at_ms: u64) -> Option<u32> {
        u32::try_from(at_ms.checked_sub(self.base_ms)?).ok()
    }

    /// Sets a gauge. `false`, with nothing changed, where the cell cannot keep that.
    #[inline]
    fn set(&mut self, number: u32, value: f64, at_ms: u64) -> bool {
        let Some(after_ms) = self.after_ms(at_ms) else { return false };
        let cell = &mut self.cells[number as usize];
        let before = if let Cell::Gauge { samples, .. } = cell { *samples } else { 0 };
        let Some(samples) = before.checked_add(1) else { return false };
        if before == 0 {
            self.touched.push(number);
        }
        *cell = Cell::Gauge { value, after_ms, samples };
        true
    }

    /// Appends a reading to the log. `false`, with nothing changed, where it has no room for it or sums could overflow.
    #[inline]
    fn log(&mut self, number: u32, value: f64, weight: f64, at_ms: u64) -> bool {
        let Some(after_ms) = self.after_ms(at_ms) else { return false };
        let cell = &mut self.cells[number as usize];
        let (previous, before) = if let Cell::Timed { newest, count, .. } = cell { (*newest, *count) } else { (0, 0) };
        let is_logged = usize::from(before) < EXACT_MAX
            && self.log.len() < LOG_MAX
            && value.abs() <= LOGGED_MAX
            && weight <= LOGGED_MAX;
        if is_logged {
            if before == 0 {
                self.touched.push(number);
            }
            *cell = Cell::Timed { newest: self.log.len() as u32, after_ms, count: before + 1 };
            self.log.push(Reading { value, weight, previous });
        }
        is_logged
    }

    /// The aggregate of a cell, which takes up what the cell held.
    fn widened(&mut self, number: u32, kind: Kind, limits: &series::Limits) -> &mut Aggregate {
        let cell = &mut self.cells[number as usize];
        let aggregate = match *cell {
            Cell::Wide(place) => return &mut self.wide[place as usize],
            Cell::Empty => Aggregate::new(kind),
            Cell::Counter { increments, samples } => Aggregate::Counter(counter(increments, samples)),
            Cell::Gauge { value, after_ms, samples } => {
                Aggregate::Gauge(gauge(value, self.base_ms + u64::from(after_ms), samples.into()))
            }
            Cell::Timed { newest, after_ms, count } => {
                let mut observed = Box::<Observed>::default();
                let at_ms = self.base_ms + u64::from(after_ms);
                observe_logged(&mut observed, &self.log, newest, count, at_ms, limits);
                Aggregate::Observed(observed)
            }
        };
        if matches!(cell, Cell::Empty) {
            self.touched.push(number);
        }
        let place = self.wide.len();
        *cell = Cell::Wide(place as u32);
        self.wide.push(aggregate);
        &mut self.wide[place]
    }
}

/// Empties a list, and gives back what an unusual second needed.
fn empty<T>(list: &mut Vec<T>) {
    let kept = 2 * list.len();
    list.clear();
    list.shrink_to(kept);
}

/// Adds to a sum that is to stay a float without a rest. `false`, with nothing changed, where it would not.
#[inline]
fn add_increment(increments: &mut f64, samples: &mut u32, step: f64) -> bool {
    let fits = step >= 0.0 && *samples < u32::MAX;
    // An infinite sum has a rest that is not a number, so it is none.
    match Sum::exact(*increments, step).filter(|_| fits) {
        Some(sum) => {
            *increments = sum;
            *samples += 1;
            true
        }
        None => false,
    }
}

/// Observes the readings of a cell in the order in which they came.
fn observe_logged(
    observed: &mut Observed,
    log: &[Reading],
    newest: u32,
    count: u16,
    at_ms: u64,
    limits: &series::Limits,
) {
    let mut readings = [(0.0, 0.0); EXACT_MAX];
    let readings = &mut readings[..usize::from(count).min(EXACT_MAX)];
    let mut place = newest;
    for reading in readings.iter_mut().rev() {
        let Reading { value, weight, previous } = log[place as usize];
        (*reading, place) = ((value, weight), previous);
    }
    for (value, weight) in readings {
        observed.observe_within(*value, *weight, at_ms, limits);
    }
}

/// Adds a value to an aggregate of its kind.
fn add_to(
    cell: &mut Aggregate,
    value: &Value<'_>,
    rate: f64,
    at_ms: u64,
    limits: &series::Limits,
) -> Result<(), Reason> {
    let added = match (cell, value) {
        (Aggregate::Counter(cell), Value::Numbers(numbers)) => add_counter(cell, numbers, rate),
        (Aggregate::Gauge(cell), Value::Numbers(numbers)) => set_gauge(cell, numbers, at_ms),
        (Aggregate::Gauge(cell), Value::Changes(changes)) => change_gauge(cell, changes, at_ms),
        (Aggregate::Observed(cell), Value::Numbers(numbers)) => {
            numbers.iter().all(|number| cell.observe_within(*number, 1.0 / rate, at_ms, limits))
        }
        (Aggregate::Set(cell), Value::Member(member)) => {
            cell.insert_hash_within(Members::hash(member), limits.set_exact);
            true
        }
        (Aggregate::Meter(cell), Value::Numbers(numbers)) => add_marks(cell, numbers, rate, at_ms),
        (
            Aggregate::Counter(_)
            | Aggregate::Gauge(_)
            | Aggregate::Observed(_)
            | Aggregate::Set(_)
            | Aggregate::Meter(_),
            Value::Numbers(_) | Value::Changes(_) | Value::Member(_),
        ) => return Err(Reason::BadValue),
    };
    if added { Ok(()) } else { Err(Reason::NonFinite) }
}

#[inline]
fn add_counter(cell: &mut Counter, numbers: &[f64], rate: f64) -> bool {
    numbers.iter().all(|number| {
        let step = number / rate;
        let added = if step >= 0.0 { cell.increments.add(step) } else { cell.decrements.add(-step) };
        cell.samples += u64::from(added);
        added
    })
}

fn set_gauge(cell: &mut Gauge, numbers: &[f64], now_ms: u64) -> bool {
    if let Some(last) = numbers.last() {
        *cell = Gauge { set: Some((*last, now_ms)), samples: cell.samples + numbers.len() as u64, ..Gauge::default() };
    }
    true
}

fn change_gauge(cell: &mut Gauge, changes: &[f64], now_ms: u64) -> bool {
    changes.iter().all(|change| cell.change_by(*change, now_ms))
}

fn add_marks(cell: &mut Marks, numbers: &[f64], rate: f64, now_ms: u64) -> bool {
    numbers.iter().all(|number| {
        let added = cell.count.add(number / rate);
        if added {
            cell.last = (*number, now_ms);
            cell.samples += 1;
        }
        added
    })
}
