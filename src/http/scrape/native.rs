//! Native histograms: the buckets of our histograms as Prometheus' of a schema, that of a factor or a coarser one.
//!
//! Prometheus' bucket `i` of schema `s` ends at `2^(i 2^-s)`, which it holds; ours is OpenTelemetry's and called by its
//! lower bound, so it is `i - 1` there, and our finest scale is schema 6. A histogram that is shown as it was received goes
//! over bucket by bucket. A time, which is shown in seconds, and whatever a rule scales by another number than a power of
//! two has its bounds elsewhere: there a bucket goes as a whole to where its middle lies, so that a value within 0.54 % of a
//! bound may be on the other side of it. A bucket goes to the same place at every scrape, but for a histogram that has to
//! halve its scale (`limits.buckets`): Prometheus may then see a reset of this series.
//!
//! It is pure, and holds the buckets of one series at a time.

use crate::aggregate::Observed;
use crate::aggregate::histogram::{SCALE_MAX, SCALE_MIN, index_at};

use super::figures::Unit;

/// Magnitudes up to this one are zero, as to other Prometheus clients: 2^-128, a bound of every schema.
pub(super) const ZERO_THRESHOLD: f64 = 2.938_735_877_055_719e-39;

/// How fine a native histogram is at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resolution {
    schema: i8,
    /// 0: as many as there are.
    buckets_max: u32,
}

impl Resolution {
    /// The coarsest schema whose buckets grow by no more than a factor, within ours; none where it is not above 1.
    pub(super) fn of(factor: f64, buckets_max: u32) -> Option<Self> {
        let fits = |schema: &i8| (-f64::from(*schema)).exp2().exp2() <= factor;
        let schema = (SCALE_MIN..=SCALE_MAX).find(fits).unwrap_or(SCALE_MAX);
        (factor > 1.0).then_some(Self { schema, buckets_max })
    }
}

/// A native histogram.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Native {
    pub(super) schema: i8,
    /// The weight of what is shown as zero.
    pub(super) zero: f64,
    /// Magnitudes below zero: Prometheus' index and weight, rising.
    pub(super) negative: Vec<(i32, f64)>,
    /// The same above zero.
    pub(super) positive: Vec<(i32, f64)>,
}

impl Native {
    /// Fills it with what these totals hold, in the units in which they are shown.
    pub(super) fn fill<'t>(
        &mut self,
        totals: impl Iterator<Item = (&'t Observed, Unit)> + Clone,
        resolution: Resolution,
    ) {
        let scales = totals.clone().map(|(observed, _)| observed.histogram.scale());
        self.schema = scales.fold(resolution.schema, i8::min);
        self.zero = 0.0;
        self.negative.clear();
        self.positive.clear();
        for (observed, unit) in totals {
            observed.exact.iter().for_each(|(value, weight)| self.add(unit.shown(*value), *weight));
            for (lower, upper, weight) in observed.histogram.buckets() {
                self.add(unit.shown(middle(lower, upper)), weight);
            }
        }
        join(&mut self.negative, 0);
        join(&mut self.positive, 0);
        while self.is_above(resolution.buckets_max) && self.schema > SCALE_MIN {
            self.schema -= 1;
            join(&mut self.negative, 1);
            join(&mut self.positive, 1);
        }
    }

    fn add(&mut self, value: f64, weight: f64) {
        // A scale may take a value out of range, and zero has no index.
        let magnitude = value.abs().min(f64::MAX);
        if magnitude <= ZERO_THRESHOLD {
            self.zero += weight;
            return;
        }
        let side = if value < 0.0 { &mut self.negative } else { &mut self.positive };
        side.push((index_at(magnitude, self.schema) + 1, weight));
    }

    fn is_above(&self, buckets_max: u32) -> bool {
        buckets_max > 0 && self.negative.len() + self.positive.len() > buckets_max as usize
    }

    /// Whether every weight is a whole number, as those of unsampled values are.
    pub(super) fn is_whole(&self) -> bool {
        self.weights().all(|weight| weight.fract() == 0.0) && self.count() < 9e15
    }

    /// The sum of the weights.
    pub(super) fn count(&self) -> f64 {
        self.weights().sum()
    }

    fn weights(&self) -> impl Iterator<Item = f64> {
        let sides = self.negative.iter().chain(&self.positive).map(|(_, weight)| *weight);
        sides.chain([self.zero])
    }
}

/// The value of a bucket whose largest relative distance to the others is least.
fn middle(lower: f64, upper: f64) -> f64 {
    if lower == upper { lower } else { 2.0 * upper / (lower + upper) * lower }
}

/// Brings buckets in order, each once, `halvings` schemas below.
fn join(buckets: &mut Vec<(i32, f64)>, halvings: u32) {
    // By upper bounds, so rounded up.
    buckets.iter_mut().for_each(|(index, _)| *index = (*index + (1 << halvings) - 1) >> halvings);
    buckets.sort_unstable_by_key(|(index, _)| *index);
    buckets.dedup_by(|next, first| {
        let same = next.0 == first.0;
        if same {
            first.1 += next.1;
        }
        same
    });
}

/// Runs of neighbouring buckets: how far behind the end of the run before (or behind 0) each begins, and how many it has.
pub(super) fn spans(buckets: &[(i32, f64)]) -> impl Iterator<Item = (i32, u32)> {
    let mut end = 0;
    buckets.chunk_by(|(a, _), (b, _)| a + 1 == *b).map(move |run| {
        let offset = run[0].0 - end;
        end = run[0].0 + run.len() as i32;
        (offset, run.len() as u32)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn observed(values: &[(f64, f64)]) -> Observed {
        let mut all = Observed::default();
        values.iter().for_each(|(value, weight)| all.histogram.record(*value, *weight));
        all
    }

    fn native(values: &[(f64, f64)], unit: Unit, factor: f64, buckets_max: u32) -> Native {
        let (mut native, all) = (Native::default(), observed(values));
        native.fill([(&all, unit)].into_iter(), Resolution::of(factor, buckets_max).unwrap());
        native
    }

    const PLAIN: Unit = Unit { divisor: 1.0, scale: 1.0 };

    /// The bounds of Prometheus' bucket: what it holds is above the first and not above the second.
    fn bounds(index: i32, schema: i8) -> (f64, f64) {
        let bound = |index: i32| (f64::from(index) * (-f64::from(schema)).exp2()).exp2();
        (bound(index - 1), bound(index))
    }

    /// As Prometheus' Go client picks them, which goes on to 8.
    #[test]
    fn a_factor_picks_the_schema() {
        for (factor, schema) in [
            (1.1, 3),
            (2.0, 0),
            (1.5, 1),
            (1.0905, 4),
            (1.091, 3),
            (1.011, 6),
            (1.0001, 6),
            (65_536.0, -4),
            (1e9, -4),
            (4.0, -1),
        ] {
            assert_eq!(Resolution::of(factor, 0), Some(Resolution { schema, buckets_max: 0 }), "{factor}");
        }
        assert_eq!((Resolution::of(1.0, 0), Resolution::of(0.0, 0), Resolution::of(f64::NAN, 0)), (None, None, None));
    }

    #[test]
    fn bounds_belong_to_the_bucket_below_them_and_zero_to_its_own() {
        let values =
            [(1.0, 1.0), (2.0, 2.0), (2.1, 4.0), (-2.0, 8.0), (0.0, 16.0), (1e-39, 32.0), (ZERO_THRESHOLD, 64.0)];
        let found = native(&values, PLAIN, 2.0, 0);
        assert_eq!(ZERO_THRESHOLD, (-128.0_f64).exp2());
        assert_eq!((found.schema, found.zero), (0, 112.0));
        assert_eq!(found.positive, [(0, 1.0), (1, 2.0), (2, 4.0)]);
        assert_eq!(found.negative, [(1, 8.0)]);
        assert_eq!((found.count(), found.is_whole()), (127.0, true));
        assert!(!native(&[(1.0, 1.0 / 0.3)], PLAIN, 2.0, 0).is_whole());
    }

    #[test]
    fn a_scale_may_turn_or_overflow_values() {
        let unit = |scale| Unit { divisor: 1.0, scale };
        assert_eq!(native(&[(3.0, 1.0)], unit(-1.0), 2.0, 0).negative, [(2, 1.0)]);
        assert_eq!(native(&[(3.0, 1.0)], unit(0.0), 2.0, 0).zero, 1.0);
        assert_eq!(native(&[(1e300, 1.0)], unit(1e300), 2.0, 0).positive, [(1_024, 1.0)]);
    }

    #[test]
    fn spans_say_where_buckets_are() {
        let of =
            |indexes: &[i32]| spans(&indexes.iter().map(|index| (*index, 1.0)).collect::<Vec<_>>()).collect::<Vec<_>>();
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[-3, -2, 0, 5, 6, 7]), [(-3, 2), (1, 1), (4, 3)]);
    }

    proptest! {
        /// Each bucket has the values between its bounds, whatever the schema and the number of buckets asked for.
        #[test]
        fn every_value_is_within_the_bounds_of_its_bucket(
            values in prop::collection::vec((prop_oneof![-1e6..1e6_f64, 1e-9..1e-3_f64], 1_u32..5), 1..200),
            factor in 1.005..20.0_f64, buckets_max in 0_u32..40,
        ) {
            let values: Vec<(f64, f64)> = values.iter().map(|(value, weight)| (*value, f64::from(*weight))).collect();
            let found = native(&values, PLAIN, factor, buckets_max);
            prop_assert!(!found.is_above(buckets_max) || found.schema == SCALE_MIN);
            for (side, sign) in [(&found.positive, 1.0), (&found.negative, -1.0)] {
                for (index, weight) in side {
                    let (above, most) = bounds(*index, found.schema);
                    // Bounds are computed here by powers, which round.
                    let inside = values.iter().filter(|(value, _)| sign * value > above * (1.0 + 1e-12) && sign * value <= most * (1.0 - 1e-12));
                    let near = values.iter().filter(|(value, _)| sign * value > above * (1.0 - 1e-12) && sign * value <= most * (1.0 + 1e-12));
                    let sum = |found: &mut dyn Iterator<Item = &(f64, f64)>| found.map(|(_, weight)| weight).sum::<f64>();
                    prop_assert!(sum(&mut inside.into_iter()) <= *weight && *weight <= sum(&mut near.into_iter()));
                }
                prop_assert!(side.windows(2).all(|pair| pair[0].0 < pair[1].0));
            }
            prop_assert_eq!(found.count(), values.iter().map(|(_, weight)| weight).sum::<f64>());
        }

        /// Seconds of what came in milliseconds: no value is further from its bucket than half of a bucket of ours.
        #[test]
        fn a_time_is_at_most_half_a_bucket_off(value in 1e-3..1e7_f64, factor in 1.005..3.0_f64) {
            let found = native(&[(value, 1.0)], Unit { divisor: 1000.0, scale: 1.0 }, factor, 0);
            let (above, most) = bounds(found.positive[0].0, found.schema);
            let shown = value / 1000.0;
            prop_assert!(shown > above * (1.0 - 0.00545) && shown <= most * (1.0 + 0.00545), "{} in {}..{}", shown, above, most);
        }

        /// What was counted in a bucket stays there when more comes.
        #[test]
        fn buckets_never_fall(first in prop::collection::vec(0.1..1e5_f64, 1..50), more in prop::collection::vec(0.1..1e5_f64, 1..50)) {
            let unit = Unit { divisor: 1000.0, scale: 1.0 };
            let weighted = |values: &[f64]| values.iter().map(|value| (*value, 1.0)).collect::<Vec<_>>();
            let before = native(&weighted(&first), unit, 1.1, 0);
            let after = native(&weighted(&[first, more].concat()), unit, 1.1, 0);
            for (index, weight) in before.positive {
                let now = after.positive.iter().find(|(other, _)| *other == index);
                prop_assert!(now.is_some_and(|(_, now)| *now >= weight));
            }
        }
    }
}
