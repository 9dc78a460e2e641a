//! What the mapping rules make of each series: its name and labels, nothing, or that it is not shown.
//!
//! A series is asked about once: [`Mapper`] keeps the answers from scrape to scrape, by where the series stands in memory,
//! which a weak pointer keeps from being used again. A reload puts other rules in and forgets all answers. Without rules
//! nothing is kept and nothing costs anything.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use foldhash::fast::RandomState;
use serde::Serialize;

use super::names::escaped;
use super::{Config, Moment};
use crate::aggregate::ledger::Series;
use crate::mapping::{Action, Found, Mapping, Metric, ObserverType, Rule, Style};
use crate::sample::{Kind, SeriesKey, Tags};
use crate::telemetry;

/// The rules of an agent, and what they said of its series.
#[derive(Default)]
pub struct Mapper {
    rules: ArcSwapOption<Mapping>,
    kept: Mutex<Kept>,
}

impl fmt::Debug for Mapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapper").finish_non_exhaustive()
    }
}

/// Answers of one set of rules.
#[derive(Default)]
struct Kept {
    of: Option<Arc<Mapping>>,
    by_place: HashMap<usize, (Weak<Series>, Answer), RandomState>,
}

/// What the rules say of a series.
#[derive(Debug, Clone)]
enum Answer {
    /// No rule matches.
    Unmapped,
    /// It is shown so.
    Given(Arc<Given>),
    /// A rule drops it. It may be there still, from before the rule.
    Dropped,
    /// A rule gives it an empty name, so there is nothing to show it as.
    Nameless,
}

/// What a rule made of a series.
#[derive(Debug)]
pub(super) struct Given {
    rule: u32,
    /// Name and labels; names are ready to be shown, values may be empty.
    pub(super) key: SeriesKey,
}

/// Series to be shown, with the rules' answers.
#[derive(Debug, Default)]
pub struct Mapped {
    pub(super) series: Vec<Arc<Series>>,
    pub(super) rules: Rules,
    /// Series that are left out because their rule gives them no name.
    pub(super) nameless: u64,
}

/// The rules of series, by the series' numbers.
#[derive(Debug, Default)]
pub(super) struct Rules {
    mapping: Option<Arc<Mapping>>,
    /// Empty without mapping.
    given: Vec<Option<Arc<Given>>>,
}

/// Without rules.
impl From<Vec<Arc<Series>>> for Mapped {
    fn from(series: Vec<Arc<Series>>) -> Self {
        Self { series, rules: Rules::default(), nameless: 0 }
    }
}

impl Rules {
    pub(super) fn mapping(&self) -> Option<&Mapping> {
        self.mapping.as_deref()
    }

    /// What a rule made of a series, if one matches.
    pub(super) fn given(&self, source: u32) -> Option<&Given> {
        self.given.get(source as usize)?.as_deref()
    }

    /// The number of the rule of a series, and the rule.
    pub(super) fn rule(&self, source: u32) -> Option<(u32, &Rule)> {
        let number = self.given(source)?.rule;
        Some((number, self.mapping.as_ref()?.rules().get(number as usize)?))
    }

    /// What rules and defaults say of how a series is shown.
    fn style(&self, source: u32) -> Option<&Style> {
        let rule = self.rule(source).map(|(_, rule)| &rule.style);
        rule.or_else(|| self.mapping.as_ref().map(|mapping| mapping.defaults()))
    }

    /// How the observations of a series are shown.
    pub(super) fn observer_type(&self, source: u32, otherwise: ObserverType) -> ObserverType {
        self.style(source).and_then(|style| style.observer_type).unwrap_or(otherwise)
    }

    /// How many series no rule matches; none without rules.
    pub(super) fn unmapped(&self) -> usize {
        self.given.iter().filter(|given| given.is_none()).count()
    }
}

impl Mapped {
    /// Leaves out what had no sample for so long that it is not shown any more.
    pub(super) fn unexpired(mut self, config: &Config, moment: Moment) -> Self {
        let expire_ms = config.expire.as_millis();
        if expire_ms == 0 && self.rules.mapping.is_none() {
            return self;
        }
        let shown = |source: u32, series: &Series| {
            let ttl_ms = self.rules.style(source).map_or(0, |style| style.ttl.as_nanos().div_ceil(1_000_000) as u64);
            let update_ms = || series.total().update_ms;
            [expire_ms, ttl_ms].iter().all(|ms| *ms == 0 || update_ms().saturating_add(*ms) > moment.now_ms)
        };
        let stays: Vec<bool> =
            self.series.iter().enumerate().map(|(source, series)| shown(source as u32, series)).collect();
        if stays.iter().all(|stays| *stays) {
            return self;
        }
        let mut at = stays.iter();
        self.series.retain(|_| at.next() == Some(&true));
        let mut at = stays.iter();
        self.rules.given.retain(|_| at.next() == Some(&true));
        self
    }
}

impl Mapper {
    /// A mapper with these rules.
    pub fn new(rules: Option<Arc<Mapping>>) -> Self {
        Self { rules: ArcSwapOption::new(rules), kept: Mutex::default() }
    }

    /// Puts other rules in.
    pub fn set(&self, rules: Option<Arc<Mapping>>) {
        let has_none = rules.is_none();
        let had_some = self.rules.swap(rules).is_some();
        if has_none && had_some {
            // No scrape sets them any more.
            telemetry::SCRAPE_PARTIAL.gauge(&["empty_metric_name"]).set(0.0);
            telemetry::SCRAPE_UNMAPPED.gauge(&[]).set(0.0);
        }
        // Without rules nobody would ask, and so nobody forget.
        let forgotten = std::mem::take(&mut *self.lock());
        // A million answers take their time to go: not under the lock.
        drop(forgotten);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the rules say of these series; those that they hide are left out.
    pub fn apply(&self, series: Vec<Arc<Series>>) -> Mapped {
        let Some(mapping) = self.rules.load_full() else { return series.into() };
        let mut mapped = Mapped::default();
        let mut given = Vec::with_capacity(series.len());
        self.ask(&mapping, series, |series, answer| {
            match answer {
                Answer::Unmapped => given.push(None),
                Answer::Given(one) => given.push(Some(Arc::clone(one))),
                Answer::Nameless => return mapped.nameless += 1,
                Answer::Dropped => return,
            }
            mapped.series.push(series);
        });
        mapped.rules = Rules { mapping: Some(mapping), given };
        mapped
    }

    /// The names that no rule matches, the most used first, at most `limit` of them, and how many there are. `None`
    /// without rules.
    pub fn unmapped(&self, series: Vec<Arc<Series>>, limit: usize) -> Option<(Vec<Unmapped>, usize)> {
        let mapping = self.rules.load_full()?;
        let mut names: HashMap<(String, Kind), Unmapped> = HashMap::new();
        self.ask(&mapping, series, |series, answer| {
            if let Answer::Unmapped = answer {
                let (name, kind) = (series.key().name().into_owned(), series.kind());
                let found = names.entry((name.clone(), kind)).or_insert_with(|| Unmapped::new(name, kind));
                found.series += 1;
                found.count += series.total().aggregate.samples();
            }
        });
        let total = names.len();
        let mut found: Vec<Unmapped> = names.into_values().collect();
        found.sort_unstable_by(|a, b| b.count.cmp(&a.count).then_with(|| (&a.name, a.kind).cmp(&(&b.name, b.kind))));
        found.truncate(limit);
        Some((found, total))
    }

    /// How many answers are kept.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.lock().by_place.len()
    }

    /// Hands each series on with the rules' answer.
    fn ask(&self, mapping: &Arc<Mapping>, series: Vec<Arc<Series>>, mut each: impl FnMut(Arc<Series>, &Answer)) {
        let mut kept = self.lock();
        if !kept.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, mapping)) {
            *kept = Kept { of: Some(Arc::clone(mapping)), by_place: HashMap::default() };
        }
        let known = series.len();
        for series in series {
            let place = Arc::as_ptr(&series) as usize;
            let (_, answer) = match kept.by_place.entry(place) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    entry.insert((Arc::downgrade(&series), answer(mapping, series.kind(), series.key())))
                }
            };
            each(series, answer);
        }
        if kept.by_place.len() > known + known / 4 + 1_000 {
            kept.by_place.retain(|_, (series, _)| series.strong_count() > 0);
        }
    }
}

/// A name that no rule matches, as at `GET /data/unmapped`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unmapped {
    /// The name.
    pub name: String,
    /// The kind, as in JSON.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Samples of all its series.
    pub count: u64,
    /// Series that have it.
    pub series: u64,
}

impl Unmapped {
    fn new(name: String, kind: Kind) -> Self {
        Self { name, kind: kind.json(), count: 0, series: 0 }
    }
}

fn answer(mapping: &Mapping, kind: Kind, key: &SeriesKey) -> Answer {
    let name = key.name();
    match mapping.find(Metric::of(kind), &name) {
        None => Answer::Unmapped,
        Some(found) if found.rule.action == Action::Drop => Answer::Dropped,
        Some(found) => match given(&found, key) {
            Some(key) => Answer::Given(Arc::new(Given { rule: found.number, key })),
            None => Answer::Nameless,
        },
    }
}

/// Name and labels of a series that a rule matches, in the form of a key; `None` where the name is empty.
pub(super) fn given(found: &Found<'_, '_>, key: &SeriesKey) -> Option<SeriesKey> {
    let name = found.name();
    if name.is_empty() {
        return None;
    }
    let tags = key.tags().filter_map(|(tag, value)| Some((tag, value?)));
    let tags = tags.filter(|(tag, value)| !tag.is_empty() && !value.is_empty());
    let tags: Vec<(String, String)> = tags.map(|(tag, value)| (escaped(&tag), value.into_owned())).collect();
    let of_rule: Vec<(&str, String)> = found.labels().collect();
    let honor = found.rule.honor_labels;
    let tagged = |label: &str| tags.iter().any(|(tag, _)| tag == label);
    let from_rule = of_rule.iter().filter(|(label, _)| !(honor && tagged(label)));
    let from_rule = from_rule.map(|(label, value)| ((*label).to_owned(), Some(value.clone())));
    let stays = |tag: &str| honor || of_rule.iter().all(|(label, _)| *label != tag);
    let from_tags = tags.iter().filter(|(tag, _)| stays(tag)).map(|(tag, value)| (tag.clone(), Some(value.clone())));
    Some(SeriesKey::new(&escaped(&name), &Tags::new(from_rule.chain(from_tags).collect())))
}
