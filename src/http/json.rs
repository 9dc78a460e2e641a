//! A metric as JSON: the seed's fields first, then ours. Times in milliseconds since the epoch, rates per second.
//!
//! Numbers that are whole are written whole, sums beyond 2^53 with every digit; NaN and infinity are never written.

use std::collections::BTreeMap;

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::aggregate::etsy;
use crate::aggregate::ledger::Closed;
use crate::aggregate::{Aggregate, Counter, Observed, Sum};
use crate::sample::SeriesKey;
use crate::view::{Metric, Scope};

/// What the readers of one answer get.
#[derive(Debug)]
pub(super) struct How<'a> {
    /// Which quantiles, each in [0, 1].
    pub(super) quantiles: &'a [f64],
    /// Which of Etsy's figures.
    pub(super) etsy: &'a etsy::Config,
    /// For the rates of meters: by the clock that takes no steps.
    pub(super) now_ms: u64,
}

impl How<'_> {
    /// One metric.
    pub(super) fn one(&self, metric: &Metric) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&Shown { metric, how: self })
    }

    /// An array of metrics.
    pub(super) fn list(&self, metrics: &[Metric]) -> serde_json::Result<Vec<u8>> {
        let shown: Vec<_> = metrics.iter().map(|metric| Shown { metric, how: self }).collect();
        serde_json::to_vec(&shown)
    }
}

struct Shown<'a> {
    metric: &'a Metric,
    how: &'a How<'a>,
}

impl Serialize for Shown<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { metric, how } = self;
        let (level, name) = metric.key.level_and_name();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("level", &level)?;
        map.serialize_entry("name", &name)?;
        map.serialize_entry("type", metric.kind.json())?;
        map.serialize_entry("tags", &tags(&metric.key))?;
        map.serialize_entry("startTime", &metric.total.start_ms)?;
        map.serialize_entry("updateTime", &metric.total.update_ms)?;
        self.figures(&mut map)?;
        map.serialize_entry("window", &metric.window.as_ref().map(|closed| Shut { closed, metric, how }))?;
        match metric.scope {
            Scope::Global => {}
            Scope::Local => map.serialize_entry("scope", "local")?,
        }
        map.end()
    }
}

impl Shown<'_> {
    fn figures<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
        let total = &self.metric.total;
        match &total.aggregate {
            Aggregate::Counter(counter) => {
                map.serialize_entry("count", &counter.samples)?;
                map.serialize_entry("value", &Whole(value_of(counter)))?;
                map.serialize_entry("increments", &Whole(counter.increments))?;
                map.serialize_entry("decrements", &Whole(counter.decrements))
            }
            Aggregate::Gauge(gauge) => {
                map.serialize_entry("count", &gauge.samples)?;
                map.serialize_entry("value", &Number(gauge.value()))
            }
            Aggregate::Observed(observed) => {
                map.serialize_entry("count", &Whole(observed.count))?;
                map.serialize_entry("value", &Number(observed.last.0))?;
                spread(observed, map)?;
                map.serialize_entry("sum", &Whole(observed.sum))?;
                map.serialize_entry("stddev", &Number(observed.stddev()))?;
                map.serialize_entry("quantiles", &Quantiles(observed, self.how.quantiles))
            }
            Aggregate::Set(members) => {
                map.serialize_entry("count", &members.cardinality())?;
                map.serialize_entry("value", &members.cardinality())
            }
            Aggregate::Meter(marks) => {
                let now_ms = self.how.now_ms;
                let rates = total.rates.as_ref();
                let [m1, m5, m15] = rates.map_or([0.0; 3], |rates| rates.at(now_ms));
                map.serialize_entry("count", &Whole(marks.count))?;
                map.serialize_entry("value", &Number(marks.last.0))?;
                map.serialize_entry("meanRate", &Number(rates.map_or(0.0, |rates| rates.mean(now_ms))))?;
                map.serialize_entry("m1Rate", &Number(m1))?;
                map.serialize_entry("m5Rate", &Number(m5))?;
                map.serialize_entry("m15Rate", &Number(m15))
            }
        }
    }
}

/// A counter's total.
fn value_of(counter: &Counter) -> Sum {
    counter.increments.minus(&counter.decrements)
}

/// Minimum, maximum and mean; nothing where nothing was observed.
fn spread<M: SerializeMap>(observed: &Observed, map: &mut M) -> Result<(), M::Error> {
    if observed.n == 0 {
        return Ok(());
    }
    map.serialize_entry("min", &Number(observed.min))?;
    map.serialize_entry("max", &Number(observed.max))?;
    map.serialize_entry("mean", &Number(observed.mean()))
}

/// A window that is closed.
struct Shut<'a> {
    closed: &'a Closed,
    metric: &'a Metric,
    how: &'a How<'a>,
}

impl Serialize for Shut<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let window = &self.closed.window;
        let seconds = self.metric.window_ms as f64 / 1_000.0;
        let rate = |count: f64| Number(count / seconds);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("start", &window.start_ms)?;
        map.serialize_entry("seconds", &Number(seconds))?;
        match &window.aggregate {
            Aggregate::Counter(counter) => {
                map.serialize_entry("count", &counter.samples)?;
                map.serialize_entry("value", &Whole(value_of(counter)))?;
                map.serialize_entry("rate", &rate(value_of(counter).value()))?;
            }
            Aggregate::Gauge(gauge) => {
                map.serialize_entry("count", &gauge.samples)?;
                map.serialize_entry("rate", &rate(gauge.samples as f64))?;
            }
            Aggregate::Observed(observed) => {
                map.serialize_entry("count", &Whole(observed.count))?;
                map.serialize_entry("rate", &rate(observed.count.value()))?;
                spread(observed, &mut map)?;
                map.serialize_entry("quantiles", &Quantiles(observed, self.how.quantiles))?;
            }
            Aggregate::Set(members) => {
                map.serialize_entry("count", &members.cardinality())?;
                map.serialize_entry("value", &members.cardinality())?;
            }
            Aggregate::Meter(marks) => {
                map.serialize_entry("count", &Whole(marks.count))?;
                map.serialize_entry("rate", &rate(marks.count.value()))?;
            }
        }
        if let Some(figures) = self.how.etsy.figures(self.metric.key.as_str(), self.closed, seconds) {
            map.serialize_entry("etsy", &Figures(&figures))?;
        }
        map.end()
    }
}

/// The tags as an object: a bare tag is `""`, values of a repeated tag stand in an array.
fn tags(key: &SeriesKey) -> BTreeMap<String, Tag> {
    let mut tags: BTreeMap<String, Tag> = BTreeMap::new();
    for (name, value) in key.tags() {
        let value = value.unwrap_or_default().into_owned();
        match tags.get_mut(name.as_ref()) {
            Some(Tag::Many(values)) => values.push(value),
            Some(Tag::One(first)) => {
                let both = Tag::Many(vec![std::mem::take(first), value]);
                tags.insert(name.into_owned(), both);
            }
            None => {
                tags.insert(name.into_owned(), Tag::One(value));
            }
        }
    }
    tags
}

#[derive(serde::Serialize)]
#[serde(untagged)]
enum Tag {
    One(String),
    Many(Vec<String>),
}

struct Quantiles<'a>(&'a Observed, &'a [f64]);

impl Serialize for Quantiles<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let found = self.1.iter().filter_map(|q| Some((q.to_string(), Number(self.0.quantile(*q)?))));
        serializer.collect_map(found)
    }
}

struct Figures<'a>(&'a [etsy::Figure]);

impl Serialize for Figures<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, Number(*value))))
    }
}

/// A number without a needless `.0`.
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let number = self.0;
        if !number.is_finite() {
            // What would be infinite was refused as a sample; this only keeps the text valid whatever happens.
            serializer.serialize_unit()
        } else if number.fract() == 0.0 && number.abs() < i64::MAX as f64 {
            serializer.serialize_i64(number as i64)
        } else {
            serializer.serialize_f64(number)
        }
    }
}

/// A sum with all of its digits, where it is whole.
struct Whole(Sum);

impl Serialize for Whole {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.split() {
            (whole, 0.0) if whole != i64::MIN && whole != i64::MAX => serializer.serialize_i64(whole),
            _ => Number(self.0.value()).serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::aggregate::ledger::Total;
    use crate::aggregate::meter::Rates;
    use crate::aggregate::window::Window;
    use crate::aggregate::{Gauge, Marks};
    use crate::sample::{Kind, Tags};

    fn metric(kind: Kind, key: &str, aggregate: Aggregate) -> Metric {
        let total = Total { start_ms: 1_000, update_ms: 3_000, aggregate: aggregate.clone(), rates: None };
        let window = Window { start_ms: 10_000, aggregate };
        Metric {
            kind,
            key: SeriesKey::parse(key),
            total: Arc::new(total),
            window: Some(Closed { window: Arc::new(window), idle: 0 }),
            closed_until_ms: 20_000,
            window_ms: 10_000,
            scope: Scope::Global,
        }
    }

    fn show(metric: &Metric) -> Value {
        let how = How { quantiles: &[0.5, 0.99], etsy: &etsy::Config::default(), now_ms: 5_000 };
        serde_json::from_slice(&how.one(metric).unwrap()).unwrap()
    }

    fn timer(values: &[f64]) -> Aggregate {
        let mut observed = Observed::default();
        values.iter().for_each(|value| assert!(observed.observe(*value, 1.0, 7)));
        Aggregate::Observed(Box::new(observed))
    }

    #[test]
    fn a_timer_has_the_fields_of_the_contract_in_their_order() {
        let how = How { quantiles: &[0.5], etsy: &etsy::Config::default(), now_ms: 5_000 };
        let text =
            how.one(&metric(Kind::Timer, "application.server.get.timer", timer(&[1.0, 2.0, 3.0, 12.5]))).unwrap();
        let text = String::from_utf8(text).unwrap();
        let want = concat!(
            r#"{"level":"application","name":"server.get.timer","type":"TIMER","tags":{},"startTime":1000,"updateTime":3000,"#,
            r#""count":4,"value":12.5,"min":1,"max":12.5,"mean":4.625,"sum":18.5,"stddev":4.6012905798264905"#,
        );
        assert!(text.starts_with(want), "{text}");
        let window = concat!(
            r#""quantiles":{"0.5":2},"window":{"start":10000,"seconds":10,"count":4,"rate":0.4,"min":1,"max":12.5,"#,
            r#""mean":4.625,"quantiles":{"0.5":2},"etsy":{"count_90":4,"#,
        );
        assert!(text.contains(window), "{text}");
    }

    #[test]
    fn a_counter_beyond_the_precision_of_a_float_keeps_its_digits() {
        let mut counter = Counter { samples: 3, ..Counter::default() };
        counter.increments.add(9_007_199_254_740_992.0);
        counter.increments.add(1.0);
        counter.decrements.add(2.0);
        let how = How { quantiles: &[], etsy: &etsy::Config::default(), now_ms: 0 };
        let text = how.one(&metric(Kind::Counter, "a", Aggregate::Counter(counter))).unwrap();
        let text = String::from_utf8(text).unwrap();
        let want = r#""count":3,"value":9007199254740991,"increments":9007199254740993,"decrements":2,"#;
        assert!(text.contains(want), "{text}");
        assert!(text.starts_with(r#"{"level":"","name":"a","#), "{text}");
    }

    #[test]
    fn tags_are_an_object() {
        let pairs =
            [("env", Some("a;b")), ("flag", None), ("k", Some("1")), ("k", Some("2")), ("k", None), ("e", Some(""))];
        let pairs = pairs.map(|(key, value)| (key.to_owned(), value.map(str::to_owned)));
        let key = SeriesKey::new("a.b.c", &Tags::new(pairs.into()));
        let json = show(&metric(
            Kind::Gauge,
            key.as_str(),
            Aggregate::Gauge(Gauge { set: Some((2.0, 1)), ..Gauge::default() }),
        ));
        assert_eq!(json["tags"], json!({ "env": "a;b", "flag": "", "k": ["", "1", "2"], "e": "" }));
        assert_eq!((&json["level"], &json["name"], &json["value"]), (&json!("a"), &json!("b.c"), &json!(2)));
    }

    #[test]
    fn a_meter_has_rates_even_before_time_has_passed() {
        let marks = Marks { count: Sum::from(8.0), last: (3.0, 1), samples: 2 };
        let mut metric = metric(Kind::Meter, "m", Aggregate::Meter(marks));
        let mut rates = Rates::new(1_000);
        rates.mark(8.0, 1_000);
        Arc::make_mut(&mut metric.total).rates = Some(rates);
        let json = show(&metric);
        assert_eq!((&json["count"], &json["value"], &json["meanRate"]), (&json!(8), &json!(3), &json!(2)));
        Arc::make_mut(&mut metric.total).rates = Some(Rates::new(5_000));
        for rate in ["meanRate", "m1Rate", "m5Rate", "m15Rate"] {
            assert_eq!(show(&metric)[rate], 0);
        }
    }

    #[test]
    fn what_is_empty_is_still_json() {
        for kind in Kind::ALL {
            let mut metric = metric(kind, "", Aggregate::new(kind));
            assert_eq!(show(&metric)["type"], kind.json());
            metric.window = None;
            metric.scope = Scope::Local;
            assert_eq!((&show(&metric)["window"], &show(&metric)["scope"]), (&Value::Null, &json!("local")));
        }
    }

    proptest! {
        #[test]
        fn numbers_are_read_as_they_were(number in prop::num::f64::ANY) {
            let text = serde_json::to_string(&Number(number)).unwrap();
            // Not by serde_json, which reads floats a bit off unless it is told to take its time.
            match text.parse::<f64>() {
                Ok(read) => prop_assert_eq!(read, number),
                Err(_) => prop_assert!(text == "null" && !number.is_finite()),
            }
        }
    }
}
