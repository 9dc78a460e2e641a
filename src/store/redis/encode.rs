//! A batch as the arguments of `apply.lua`: each kind's delta in the script's verbs, which know no kinds.
//!
//! Numbers travel as text: a Lua number would lose whole numbers beyond 2^53.

use std::fmt::Write;

use super::{Asker, Call, Named, Names};
use crate::aggregate::histogram::Histogram;
use crate::aggregate::meter::{Parts, Rates};
use crate::aggregate::set::{self, Members};
use crate::aggregate::{Aggregate, Counter, Gauge, Marks, Observed, Sum};
use crate::store::{Batch, Operation};

/// Room for an operation's key and words, with what the protocol puts around them.
const OPERATION_BYTES: usize = 384;

/// The call that applies a batch after the sequence `before`.
pub(super) fn apply<'a>(
    named: &'a Named,
    names: &Names,
    asker: &Asker,
    batch: &Batch,
    before: u64,
    seen: u64,
) -> Call<'a> {
    let series = batch.operations.iter().map(|operation| names.series(operation.kind, &operation.key));
    let keys: Vec<String> = names.common(batch.partition).into_iter().chain(series).collect();
    let count = batch.operations.len();
    let mut call = Call::sized(named, &keys, 16 * count + 7, OPERATION_BYTES * count + 512);
    call.text(&asker.agent).text(&asker.owner).number(batch.sequence).number(before).number(seen);
    call.number(asker.expire.as_millis()).number(batch.samples);
    let mut words = Words::default();
    for operation in &batch.operations {
        words.clear();
        words.operation(operation, &asker.agent);
        call.number(words.ends.len() as u64);
        for word in words.iter() {
            call.text(word);
        }
    }
    call
}

/// The words of one operation, side by side in one buffer.
#[derive(Debug, Default)]
struct Words {
    text: String,
    ends: Vec<usize>,
}

impl Words {
    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.text[start..*end])
    }

    fn word(&mut self, word: impl std::fmt::Display) -> &mut Self {
        // Writing to a String does not fail.
        let _ = write!(self.text, "{word}");
        self.ends.push(self.text.len());
        self
    }

    /// A float such that reading it gives the same float: short for a person where that is possible.
    fn float(&mut self, number: f64) -> &mut Self {
        if number == 0.0 || (1e-5..1e15).contains(&number.abs()) {
            self.word(number)
        } else {
            self.word(format_args!("{number:e}"))
        }
    }

    fn operation(&mut self, operation: &Operation, agent: &str) {
        self.word(operation.start_ms).word(operation.update_ms);
        match &operation.delta {
            Aggregate::Counter(counter) => self.counter(counter),
            Aggregate::Gauge(gauge) => self.gauge(gauge),
            Aggregate::Observed(observed) => self.observed(observed),
            Aggregate::Set(members) => self.members(members),
            Aggregate::Meter(marks) => self.marks(marks, operation.rates.as_ref(), agent),
        }
    }

    fn counter(&mut self, counter: &Counter) {
        self.sum("increments", &counter.increments);
        self.sum("decrements", &counter.decrements);
        self.count("samples", counter.samples);
    }

    fn gauge(&mut self, gauge: &Gauge) {
        self.word("g");
        match gauge.set {
            Some((value, at_ms)) => self.float(value).word(at_ms),
            None => self.word("").word(""),
        };
        let (whole, fraction) = gauge.change.split();
        self.word(gauge.changed_at).word("change").word(whole).word("changefrac").float(fraction);
        self.count("samples", gauge.samples);
    }

    fn observed(&mut self, observed: &Observed) {
        if observed.n == 0 {
            return;
        }
        self.sum("sum", &observed.sum);
        self.sum("sumSquares", &observed.sum_squares);
        self.sum("count", &observed.count);
        self.sum("weightedSum", &observed.weighted_sum);
        self.word("<").word("min").float(observed.min);
        self.word(">").word("max").float(observed.max);
        self.last(observed.last);
        self.buckets(&binned(observed));
        self.count("n", observed.n);
    }

    fn buckets(&mut self, histogram: &Histogram) {
        let scale = histogram.scale();
        if histogram.zero() != 0.0 {
            self.word("f").word("zero").float(histogram.zero());
        }
        for (index, weight) in histogram.positive() {
            self.word("f").word(format_args!("b:{scale}:{index}")).float(weight);
        }
        for (index, weight) in histogram.negative() {
            self.word("f").word(format_args!("neg:{scale}:{index}")).float(weight);
        }
    }

    fn members(&mut self, members: &Members) {
        if let Some(hashes) = members.exact() {
            self.word("h").word(set::EXACT_MAX).word(hashes.len());
            for hash in hashes {
                let (register, rank) = register_of(hash);
                self.word(format_args!("{hash:016x}")).word(register).word(rank);
            }
        }
        if let Some(registers) = members.registers() {
            let raised = || registers.iter().enumerate().filter(|(_, rank)| **rank > 0);
            self.word("r").word(raised().count());
            for (register, rank) in raised() {
                self.word(register).word(rank);
            }
        }
    }

    fn marks(&mut self, marks: &Marks, rates: Option<&Rates>, agent: &str) {
        self.sum("count", &marks.count);
        self.last(marks.last);
        if let Some(rates) = rates {
            let Parts { start_ms, tick_ms, count, uncounted, rates } = rates.parts();
            let ticked = rates.map_or(String::new(), |[m1, m5, m15]| format!(" {m1:e} {m5:e} {m15:e}"));
            self.word("=").word(format_args!("rates:{agent}"));
            self.word(format_args!("{start_ms} {tick_ms} {count:e} {uncounted:e}{ticked}"));
        }
        self.count("samples", marks.samples);
    }

    /// A whole number that is added. The samples come last of an operation: what fails before is not among those that the
    /// store has, and all of the operation's count as lost.
    fn count(&mut self, field: &str, number: u64) {
        if number > 0 {
            // Past i64 there is nothing to add to: that many samples were never sent.
            self.word("i").word(field).word(number.min(i64::MAX as u64));
        }
    }

    /// A sum that is added: its whole part and the rest.
    fn sum(&mut self, field: &str, sum: &Sum) {
        let (whole, fraction) = sum.split();
        if whole != 0 {
            self.word("i").word(field).word(whole);
        }
        if fraction != 0.0 {
            self.word("f").word(format_args!("{field}frac")).float(fraction);
        }
    }

    fn last(&mut self, (value, at_ms): (f64, u64)) {
        if at_ms > 0 {
            self.word("l").float(value).word(at_ms);
        }
    }
}

/// All the observations by bucket: the store keeps none as it came.
fn binned(observed: &Observed) -> Histogram {
    let mut histogram = observed.histogram.clone();
    for (value, weight) in &observed.exact {
        histogram.record(*value, *weight);
    }
    histogram
}

/// The register of a member's hash and its rank there, as [`Members::registers`] describes them.
fn register_of(hash: u64) -> (u64, u32) {
    let precision = set::REGISTERS.trailing_zeros();
    let rest = hash << precision;
    (hash >> (64 - precision), rest.leading_zeros().min(64 - precision) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_register_is_that_of_the_members_themselves(hash: u64) {
            let mut members = Members::default();
            members.insert_hash(hash);
            let registers = members.condense();
            let (register, rank) = register_of(hash);
            prop_assert_eq!(u32::from(registers[register as usize]), rank);
        }

        #[test]
        fn a_float_is_read_as_it_was_written(bits: u64) {
            let number = f64::from_bits(bits);
            prop_assume!(number.is_finite());
            let mut words = Words::default();
            words.float(number);
            prop_assert_eq!(words.text.parse(), Ok(number));
        }
    }
}
