//! Rates of meters: the mean, and exponentially weighted ones over 1, 5 and 15 minutes, all per second.
//!
//! The formulas are those of `Meter` and `EWMA` in Dropwizard metrics-core 3.2.6: time is cut into ticks of 5 s; the
//! first tick sets a rate to the marks of that tick per second, each later one moves it by
//! `alpha * (marks per second - rate)`, where `alpha = 1 - exp(-5 s / period)`. Ticks are made up for, when a mark or
//! a reader comes more than 5 s after the last one. Nothing here reads a clock: times are milliseconds since an origin
//! that the caller chooses, the same for all calls and, where rates outlive the process, the epoch.

use serde::{Deserialize, Serialize};

const TICK_MS: u64 = 5_000;

/// The periods of the three rates, in minutes.
const PERIODS: [f64; 3] = [1.0, 5.0, 15.0];

/// The rates of one meter. They stand on the heap, because few series are meters.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates(Box<Parts>);

/// What [`Rates`] consist of, for a store that keeps them by field.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(try_from = "Unchecked", into = "Unchecked")]
pub struct Parts {
    /// When the meter began, in milliseconds.
    pub start_ms: u64,
    /// When the last tick was due, in milliseconds.
    pub tick_ms: u64,
    /// All marks.
    pub count: f64,
    /// The marks since the last tick.
    pub uncounted: f64,
    /// The 1-, 5- and 15-minute rates per second as of the last tick; `None` before the first.
    pub rates: Option<[f64; 3]>,
}

impl Rates {
    /// A meter that begins now.
    pub fn new(start_ms: u64) -> Self {
        Self(Box::new(Parts { start_ms, tick_ms: start_ms, ..Parts::default() }))
    }

    /// Makes up for the ticks that are due, then counts marks. A time before the last tick makes no tick. Marks whose
    /// sum would not stay finite are refused with `false`.
    pub fn mark(&mut self, count: f64, now_ms: u64) -> bool {
        self.tick(now_ms);
        let parts = &mut *self.0;
        let (sum, uncounted) = (parts.count + count, parts.uncounted + count);
        let finite = sum.is_finite() && uncounted.is_finite();
        if finite {
            (parts.count, parts.uncounted) = (sum, uncounted);
        }
        finite
    }

    /// The 1-, 5- and 15-minute rates per second, as they are once the ticks that are due by now are made; 0 before
    /// the first.
    pub fn at(&self, now_ms: u64) -> [f64; 3] {
        self.0.decayed(now_ms).rates.unwrap_or_default()
    }

    /// All marks by the time since the start, per second; 0 at the start.
    pub fn mean(&self, now_ms: u64) -> f64 {
        match now_ms.saturating_sub(self.0.start_ms) {
            0 => 0.0,
            elapsed_ms => self.0.count / (elapsed_ms as f64 / 1_000.0),
        }
    }

    /// The same meter as it is once the ticks that are due by now are made.
    #[must_use]
    pub fn decayed(&self, now_ms: u64) -> Self {
        Self(Box::new(self.0.decayed(now_ms)))
    }

    /// Adds another agent's rates, both first brought up to now. What the other counted since its own last tick waits
    /// for the next tick of this one, so the sum lags by less than 5 s; but for that, and for the first tick, rates of
    /// parts add up to the rates of the whole. A sum that would not stay finite is refused with `false`.
    pub fn add(&mut self, other: &Self, now_ms: u64) -> bool {
        let (ours, theirs) = (self.0.decayed(now_ms), other.0.decayed(now_ms));
        let rates = match (ours.rates, theirs.rates) {
            (Some(a), Some(b)) => Some([a[0] + b[0], a[1] + b[1], a[2] + b[2]]),
            (a, b) => a.or(b),
        };
        let sum = Parts {
            start_ms: ours.start_ms.min(theirs.start_ms),
            tick_ms: ours.tick_ms.max(theirs.tick_ms),
            count: ours.count + theirs.count,
            uncounted: ours.uncounted + theirs.uncounted,
            rates,
        };
        let finite = sum.is_finite();
        if finite {
            *self.0 = sum;
        }
        finite
    }

    /// Brings times back that lie ahead of now: they are of a clock that was wrong, and no tick would come until then.
    pub fn hold_back(&mut self, now_ms: u64) {
        self.0.start_ms = self.0.start_ms.min(now_ms);
        self.0.tick_ms = self.0.tick_ms.min(now_ms);
    }

    /// What it consists of.
    pub fn parts(&self) -> Parts {
        *self.0
    }

    /// The reverse of [`Rates::parts`]. `None` when a number is not finite.
    pub fn from_parts(parts: Parts) -> Option<Self> {
        parts.is_finite().then(|| Self(Box::new(parts)))
    }

    fn tick(&mut self, now_ms: u64) {
        *self.0 = self.0.decayed(now_ms);
    }
}

impl Parts {
    fn is_finite(&self) -> bool {
        self.count.is_finite() && self.uncounted.is_finite() && self.rates.iter().flatten().all(|rate| rate.is_finite())
    }

    /// Makes the ticks that are due: one with the marks that are not counted yet, and those after it, without marks,
    /// in one step: each takes `alpha` of a rate away, so `n` of them leave `(1 - alpha)^n`.
    fn decayed(mut self, now_ms: u64) -> Self {
        let age = now_ms.saturating_sub(self.tick_ms);
        // A tick is due once it is over, not when it ends: metrics-core compares so.
        if age <= TICK_MS {
            return self;
        }
        let idle_ticks = (age / TICK_MS - 1) as f64;
        let instant = self.uncounted / (TICK_MS as f64 / 1_000.0);
        let mut rates = [instant; 3];
        for (at, rate) in rates.iter_mut().enumerate() {
            let alpha = 1.0 - (-(TICK_MS as f64) / 60_000.0 / PERIODS[at]).exp();
            if let Some(before) = self.rates {
                *rate = before[at] + alpha * (instant - before[at]);
            }
            *rate *= (idle_ticks * (-alpha).ln_1p()).exp();
        }
        self.rates = Some(rates);
        self.uncounted = 0.0;
        self.tick_ms = now_ms - age % TICK_MS;
        self
    }
}

/// [`Parts`] as they are read, before it is known that their numbers are finite.
#[derive(Serialize, Deserialize)]
struct Unchecked(u64, u64, f64, f64, Option<[f64; 3]>);

impl From<Parts> for Unchecked {
    fn from(parts: Parts) -> Self {
        Self(parts.start_ms, parts.tick_ms, parts.count, parts.uncounted, parts.rates)
    }
}

impl TryFrom<Unchecked> for Parts {
    type Error = &'static str;

    fn try_from(Unchecked(start_ms, tick_ms, count, uncounted, rates): Unchecked) -> Result<Self, Self::Error> {
        let parts = Self { start_ms, tick_ms, count, uncounted, rates };
        if parts.is_finite() { Ok(parts) } else { Err("a rate is not finite") }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// Meter and EWMA as metrics-core has them, tick by tick.
    #[derive(Default)]
    struct Loop {
        last_tick: u64,
        uncounted: f64,
        ewma: [(bool, f64); 3],
    }

    impl Loop {
        fn tick_if_necessary(&mut self, now_ms: u64) {
            let Some(age) = now_ms.checked_sub(self.last_tick) else { return };
            if age <= 5_000 {
                return;
            }
            self.last_tick = now_ms - age % 5_000;
            for _ in 0..age / 5_000 {
                let instant = self.uncounted / 5.0;
                self.uncounted = 0.0;
                for ((initialized, rate), minutes) in self.ewma.iter_mut().zip([1.0, 5.0, 15.0]) {
                    let alpha = 1.0 - f64::exp(-5.0 / 60.0 / minutes);
                    *rate += if *initialized { alpha * (instant - *rate) } else { instant };
                    *initialized = true;
                }
            }
        }
    }

    fn close(a: f64, b: f64, tolerance: f64) -> bool {
        (a - b).abs() <= tolerance * b.abs() + f64::MIN_POSITIVE
    }

    fn all_close(a: [f64; 3], b: [f64; 3]) -> bool {
        a.into_iter().zip(b).all(|(a, b)| close(a, b, 1e-12))
    }

    /// Marks and the milliseconds after which they come; most soon, some after a long idle.
    fn marks() -> impl Strategy<Value = Vec<(u32, u64)>> {
        let pause = prop_oneof![8 => 0..12_000_u64, 2 => (0..5_u64).prop_map(|n| n * 5_000), 1 => 0..20_000_000_u64];
        prop::collection::vec((0..1_000_u32, pause), 0..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn ticks_made_up_for_are_the_ticks_of_the_loop(marks in marks(), start in 0..1_000_000_u64) {
            let mut rates = Rates::new(start);
            let mut model = Loop { last_tick: start, ..Loop::default() };
            let mut now = start;
            for (count, pause) in marks {
                now += pause;
                model.tick_if_necessary(now);
                let expected = model.ewma.map(|(_, rate)| rate);
                prop_assert!(all_close(rates.at(now), expected), "{:?} is not {:?}", rates.at(now), expected);
                model.uncounted += f64::from(count);
                rates.mark(f64::from(count), now);
                prop_assert_eq!(rates.parts().tick_ms, model.last_tick);
            }
        }

        #[test]
        fn rates_of_agents_add_up(marks in prop::collection::vec((0..1_000_u32, 0..9_000_u64, 0..3_usize), 1..30)) {
            // All began together and had their first tick, so each tick of the whole is a tick of each.
            let begun = || {
                let mut rates = Rates::new(0);
                rates.mark(0.0, 5_001);
                rates
            };
            let (mut whole, mut agents) = (begun(), [begun(), begun(), begun()]);
            let mut now = 5_001;
            for (count, pause, agent) in marks {
                now += pause;
                // Just when a tick ends it is due for who missed the one before, and not for who did not.
                now += u64::from(now % 5_000 == 0);
                whole.mark(f64::from(count), now);
                agents[agent].mark(f64::from(count), now);
            }
            for later in [now, now + 5_000, now + 100_000] {
                let mut sum = agents[0].clone();
                prop_assert!(sum.add(&agents[1], later) && sum.add(&agents[2], later));
                prop_assert!(all_close(sum.at(later), whole.at(later)));
                prop_assert!(close(sum.mean(later), whole.mean(later), 1e-12));
                prop_assert_eq!(sum.parts().uncounted, whole.decayed(later).parts().uncounted);
            }
        }

        #[test]
        fn rates_are_read_from_what_they_wrote(marks in marks(), noise in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut rates = Rates::new(7);
            let mut now = 7;
            for (count, pause) in marks {
                now += pause;
                rates.mark(f64::from(count), now);
            }
            let bytes = postcard::to_stdvec(&rates).unwrap();
            prop_assert_eq!(&postcard::from_bytes::<Rates>(&bytes).unwrap(), &rates);
            prop_assert_eq!(Rates::from_parts(rates.parts()), Some(rates));
            if let Ok(read) = postcard::from_bytes::<Rates>(&noise) {
                prop_assert!(read.parts().is_finite());
            }
        }
    }

    #[test]
    fn dropwizards_cases_hold() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/aggregation.jsonl");
        let text = std::fs::read_to_string(corpus).unwrap();
        let cases = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut checked = 0;
        for case in cases.filter(|case| case["formula"] == "dropwizard") {
            let mut rates = Rates::new(0);
            for step in case["steps"].as_array().unwrap() {
                let now_ms = (step["at_s"].as_f64().unwrap() * 1_000.0) as u64;
                for line in step["lines"].as_array().into_iter().flatten() {
                    let value = line.as_str().unwrap().strip_prefix("req:").unwrap().strip_suffix("|m").unwrap();
                    rates.mark(value.parse().unwrap(), now_ms);
                }
                let Some(expected) = step.get("expect") else { continue };
                let [m1, m5, m15] = rates.at(now_ms);
                let figures = [
                    ("count", rates.parts().count),
                    ("mean_rate", rates.mean(now_ms)),
                    ("m1_rate", m1),
                    ("m5_rate", m5),
                    ("m15_rate", m15),
                ];
                for (name, figure) in figures {
                    let expected = expected["req"][name].as_f64().unwrap();
                    assert!(close(figure, expected, 1e-9), "{}: {name} is {figure}, not {expected}", case["id"]);
                    checked += 1;
                }
            }
        }
        assert!(checked >= 40, "{checked}");
    }

    #[test]
    fn a_time_before_the_last_tick_changes_no_rate() {
        let mut rates = Rates::new(100_000);
        rates.mark(50.0, 100_000);
        rates.mark(0.0, 106_000);
        let before = rates.parts();
        assert!(rates.mark(10.0, 3));
        assert_eq!(rates.parts(), Parts { count: 60.0, uncounted: 10.0, ..before });
        assert_eq!((rates.at(3), rates.mean(3)), ([10.0; 3], 0.0));
    }

    #[test]
    fn an_endless_idle_takes_no_time() {
        let mut rates = Rates::new(0);
        rates.mark(1e9, 0);
        assert_eq!(rates.at(u64::MAX), [0.0; 3]);
    }

    #[test]
    fn a_sum_that_would_not_be_finite_is_refused() {
        let mut rates = Rates::new(0);
        assert!(rates.mark(f64::MAX, 0));
        let before = rates.clone();
        assert!(!rates.mark(f64::MAX, 0) && !rates.mark(f64::NAN, 0) && !rates.add(&before, 0));
        assert_eq!(rates, before);
        assert_eq!(Rates::from_parts(Parts { uncounted: f64::NAN, ..before.parts() }), None);
    }

    #[test]
    fn it_is_small_where_there_is_none() {
        assert_eq!(size_of::<Option<Rates>>(), 8);
    }
}
