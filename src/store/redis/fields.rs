//! The fields of a series' hash, as `apply.lua` left them, as what the series keeps. The reverse of `encode`.
//!
//! A field nobody knows is left alone: a later version may have written it. A field of ours that does not read makes the
//! series [`Error::Foreign`], rather than a figure that is wrong.

use std::collections::HashMap;

use redis::Value;

use super::{Error, text};
use crate::aggregate::histogram::Histogram;
use crate::aggregate::ledger::Total;
use crate::aggregate::meter::{Parts, Rates};
use crate::aggregate::set::{self, Members};
use crate::aggregate::{Aggregate, Counter, Gauge, Marks, Observed, Sum};
use crate::sample::Kind;

/// Reads a series of a kind from fields and values in turn; `None` from none.
pub(super) fn total(kind: Kind, elements: &[Value]) -> Result<Option<Total>, Error> {
    if elements.is_empty() {
        return Ok(None);
    }
    let fields = Fields::new(elements)?;
    let aggregate = match kind {
        Kind::Counter => Aggregate::Counter(fields.counter()?),
        Kind::Gauge => Aggregate::Gauge(fields.gauge()?),
        Kind::Timer | Kind::Histogram | Kind::Distribution => Aggregate::Observed(Box::new(fields.observed()?)),
        Kind::Set => Aggregate::Set(Box::new(fields.members()?)),
        Kind::Meter => Aggregate::Meter(fields.marks()?),
    };
    if !aggregate.is_sound(kind) {
        return Err(Error::Foreign);
    }
    let start_ms = fields.count("startTime")?;
    let update_ms = fields.count("updateTime")?;
    let rates = match &aggregate {
        Aggregate::Meter(marks) => Some(fields.rates(start_ms, marks.count.value())?),
        Aggregate::Counter(_) | Aggregate::Gauge(_) | Aggregate::Observed(_) | Aggregate::Set(_) => None,
    };
    Ok(Some(Total { start_ms, update_ms, aggregate, rates }))
}

struct Fields<'a>(HashMap<&'a str, &'a str>);

impl<'a> Fields<'a> {
    fn new(elements: &'a [Value]) -> Result<Self, Error> {
        let pair = |pair: &'a [Value]| Some((text(&pair[0])?, text(&pair[1])?));
        let fields = elements.chunks_exact(2).map(pair).collect::<Option<_>>();
        fields.map(Self).ok_or(Error::Foreign)
    }

    fn counter(&self) -> Result<Counter, Error> {
        Ok(Counter {
            increments: self.sum("increments", "incrementsfrac")?,
            decrements: self.sum("decrements", "decrementsfrac")?,
            samples: self.count("samples")?,
        })
    }

    fn gauge(&self) -> Result<Gauge, Error> {
        let set = match self.get::<f64>("value")? {
            Some(value) => Some((value, self.count("valueTime")?)),
            None => None,
        };
        Ok(Gauge {
            set,
            change: self.sum("change", "changefrac")?,
            changed_at: self.count("changeTime")?,
            samples: self.count("samples")?,
        })
    }

    fn observed(&self) -> Result<Observed, Error> {
        Ok(Observed {
            n: self.count("n")?,
            sum: self.sum("sum", "sumfrac")?,
            sum_squares: self.sum("sumSquares", "sumSquaresfrac")?,
            count: self.sum("count", "countfrac")?,
            weighted_sum: self.sum("weightedSum", "weightedSumfrac")?,
            min: self.get("min")?.unwrap_or(f64::INFINITY),
            max: self.get("max")?.unwrap_or(f64::NEG_INFINITY),
            last: self.last()?,
            exact: Vec::new(),
            histogram: self.histogram()?,
        })
    }

    /// Buckets of each scale make a histogram; merged they have the coarsest one.
    fn histogram(&self) -> Result<Histogram, Error> {
        let mut scales: HashMap<i8, [Vec<(i32, f64)>; 2]> = HashMap::new();
        for (field, value) in &self.0 {
            let range = match field.split_once(':') {
                Some(("b", place)) => Some((0, place)),
                Some(("neg", place)) => Some((1, place)),
                Some(_) | None => None,
            };
            if let Some((range, place)) = range {
                let (scale, index) = place.split_once(':').ok_or(Error::Foreign)?;
                let bucket = (parse(index)?, parse(value)?);
                scales.entry(parse(scale)?).or_default()[range].push(bucket);
            }
        }
        let zero = self.get("zero")?.unwrap_or(0.0);
        let mut whole = Histogram::default();
        if zero != 0.0 {
            whole.record(0.0, zero);
        }
        for (scale, [positive, negative]) in scales {
            whole.merge(&Histogram::from_parts(scale, 0.0, positive, negative).map_err(|_| Error::Foreign)?);
        }
        Ok(whole)
    }

    fn members(&self) -> Result<Members, Error> {
        let mut members = self.registers()?;
        for field in self.0.keys() {
            if let Some(hash) = field.strip_prefix("m:") {
                members.insert_hash(u64::from_str_radix(hash, 16).map_err(|_| Error::Foreign)?);
            }
        }
        Ok(members)
    }

    fn registers(&self) -> Result<Members, Error> {
        let mut registers = vec![0; set::REGISTERS];
        let mut any = false;
        for (field, rank) in &self.0 {
            if let Some(register) = field.strip_prefix("r:") {
                let register = registers.get_mut(parse::<usize>(register)?).ok_or(Error::Foreign)?;
                *register = parse(rank)?;
                any = true;
            }
        }
        if any { Members::from_registers(registers).ok_or(Error::Foreign) } else { Ok(Members::default()) }
    }

    fn marks(&self) -> Result<Marks, Error> {
        Ok(Marks { count: self.sum("count", "countfrac")?, last: self.last()?, samples: self.count("samples")? })
    }

    /// The agents' rates, brought to the tick of the latest of them and added up.
    fn rates(&self, start_ms: u64, count: f64) -> Result<Rates, Error> {
        let agents = self.0.iter().filter(|(field, _)| field.starts_with("rates:"));
        let agents = agents.map(|(_, value)| parts(value)).collect::<Result<Vec<_>, _>>()?;
        let now_ms = agents.iter().map(|parts| parts.tick_ms).max().unwrap_or(start_ms);
        let mut whole = Rates::from_parts(Parts { start_ms, tick_ms: now_ms, ..Parts::default() }).unwrap_or_default();
        for parts in agents {
            whole.add(&Rates::from_parts(parts).ok_or(Error::Foreign)?, now_ms);
        }
        // The marks of the series are those of its hash: agents from before a delete remember more.
        Rates::from_parts(Parts { start_ms, count, ..whole.parts() }).ok_or(Error::Foreign)
    }

    fn last(&self) -> Result<(f64, u64), Error> {
        Ok((self.get("value")?.unwrap_or(0.0), self.count("valueTime")?))
    }

    fn sum(&self, whole: &str, fraction: &str) -> Result<Sum, Error> {
        let fraction: f64 = self.get(fraction)?.unwrap_or(0.0);
        if fraction.is_finite() { Ok(Sum::join(self.get(whole)?.unwrap_or(0), fraction)) } else { Err(Error::Foreign) }
    }

    fn count(&self, field: &str) -> Result<u64, Error> {
        Ok(self.get(field)?.unwrap_or(0))
    }

    fn get<T: std::str::FromStr>(&self, field: &str) -> Result<Option<T>, Error> {
        self.0.get(field).map(|value| parse(value)).transpose()
    }
}

/// One agent's rates: start, tick, marks, marks since the tick, and after the first tick the three rates.
fn parts(value: &str) -> Result<Parts, Error> {
    let mut words = value.split(' ');
    let mut next = || words.next().ok_or(Error::Foreign);
    let (start_ms, tick_ms) = (parse(next()?)?, parse(next()?)?);
    let (count, uncounted) = (parse(next()?)?, parse(next()?)?);
    let rates = words.map(parse).collect::<Result<Vec<f64>, _>>()?;
    let rates = if rates.is_empty() { None } else { Some(rates.try_into().map_err(|_| Error::Foreign)?) };
    Ok(Parts { start_ms, tick_ms, count, uncounted, rates })
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, Error> {
    text.parse().map_err(|_| Error::Foreign)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A field as agents write it, or nearly so, and what may stand in it.
    fn field() -> impl Strategy<Value = (String, String)> {
        let names = "samples|increments|incrementsfrac|value|valueTime|change|changefrac|changeTime|n|sum|sumfrac|count|min|max|zero\
            |members|startTime|updateTime|(b|neg):-?[0-9]{1,3}:-?[0-9]{1,11}|m:[0-9a-f]{0,17}|r:[0-9]{0,6}|rates:[a-f]{1,3}";
        let values = "-?[0-9]{1,20}(\\.[0-9]{1,4})?|nan|-?inf|1e30[0-9]|[0-9]{1,3} [0-9]{1,9}( [0-9.e]{1,4}){0,6}|";
        (names, values)
    }

    fn read(kind: Kind, fields: &[(String, String)]) -> Result<Option<Total>, Error> {
        let words = fields.iter().flat_map(|(field, value)| [field, value]);
        let words: Vec<_> = words.map(|word| Value::BulkString(word.clone().into_bytes())).collect();
        total(kind, &words)
    }

    proptest! {
        #[test]
        fn whatever_a_hash_holds_is_a_sound_total_or_foreign(
            kind in prop::sample::select(Kind::ALL.to_vec()),
            fields in prop::collection::vec(field(), 0..12),
        ) {
            if let Ok(Some(total)) = read(kind, &fields) {
                prop_assert!(total.aggregate.is_sound(kind));
                let mut sum = Total::new(kind, 1);
                sum.aggregate.merge(&total.aggregate, 0);
                prop_assert!(sum.aggregate.is_sound(kind));
            }
        }
    }

    #[test]
    fn a_number_that_is_none_makes_a_series_foreign() {
        for (kind, field) in [(Kind::Gauge, "value"), (Kind::Counter, "incrementsfrac"), (Kind::Timer, "min")] {
            for value in ["nan", "inf", "-inf"] {
                let fields = [(field.to_owned(), value.to_owned()), ("n".to_owned(), "1".to_owned())];
                assert_eq!(read(kind, &fields), Err(Error::Foreign), "{field} {value}");
            }
        }
    }
}
