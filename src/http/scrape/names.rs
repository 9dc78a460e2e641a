//! What a series is called in an exposition, and the order in which series are written.
//!
//! [`Index`] copies the series' names and labels, rewritten, into one buffer and orders 32 bytes per series that point
//! there; about 75 bytes a series, while the text of a counter alone takes 160. Reading the names where they are takes
//! four dependent cache misses each time one is compared, and took 2 to 3 times as long (`benches/scrape.rs`). The rules
//! are at [`super`](super#names). It never reads a clock and never looks at a value, but for the start time of series
//! that collide.
//!
//! Names are made anew for each scrape. Of 100,000 counters that is some half of a scrape's 70 ms of processor time, of
//! summaries a seventh, of histograms a tenth; to look each series up in names that were kept takes 1 ms
//! (`benches/scrape.rs`, on a machine that did more besides). At a scrape each 15 s, keeping them would save 0.2 % of a
//! core, and would hold for good what a scrape holds for a moment: 84 bytes a series, and some 40 for the way to it, beside the
//! 433 that a counter takes; for each format; and it would have to be made anew whenever a series comes or goes, since it
//! may collide with any other.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::hash::BuildHasher;
use std::hint::black_box;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use foldhash::fast::FixedState;

use super::Names;
use super::mapped::{Mapped, Rules};
use crate::aggregate::ledger::Series;
use crate::mapping::ObserverType;
use crate::sample::{Kind, SeriesKey, Tags};
use crate::telemetry;

/// What one family of an exposition shows. Series of different classes never share a family.
///
/// The numbers stand between name and labels where entries are ordered; all are below every byte of a name, so that
/// `a` with its labels comes before `a1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub(super) enum Class {
    Counter = 1,
    Gauge = 2,
    /// Timers, histograms and distributions: one type to Prometheus, and statsd_exporter shows them as one.
    Summary = 3,
    /// The same, where they are shown in buckets.
    Histogram = 4,
    Set = 5,
    MeterTotal = 6,
    MeterRate = 7,
}

impl Class {
    /// The classes in which a series of a kind is shown.
    pub(super) const fn of(kind: Kind, observer_type: ObserverType) -> &'static [Self] {
        match kind {
            Kind::Counter => &[Self::Counter],
            Kind::Gauge => &[Self::Gauge],
            Kind::Timer | Kind::Histogram | Kind::Distribution => match observer_type {
                ObserverType::Summary => &[Self::Summary],
                ObserverType::Histogram => &[Self::Histogram],
            },
            Kind::Set => &[Self::Set],
            Kind::Meter => &[Self::MeterTotal, Self::MeterRate],
        }
    }

    /// What the names of a family's samples have behind the family's own name. A family also occupies its bare name.
    const fn suffixes(self, names: Names) -> &'static [&'static str] {
        match (self, names) {
            (Self::Summary, Names::Plain) => &["", "_sum", "_count"],
            (Self::Histogram, Names::Plain) => &["", "_bucket", "_sum", "_count"],
            (Self::Summary, Names::OpenMetrics) => &["", "_sum", "_count", "_created"],
            (Self::Histogram, Names::OpenMetrics) => &["", "_bucket", "_sum", "_count", "_created"],
            (Self::Counter | Self::MeterTotal, Names::OpenMetrics) => &["", "_total", "_created"],
            (Self::Counter | Self::MeterTotal, Names::Plain)
            | (Self::Gauge | Self::Set | Self::MeterRate, Names::Plain | Names::OpenMetrics) => &[""],
        }
    }
}

/// Every suffix of [`Class::suffixes`] but the empty one.
const SUFFIXES: [&str; 5] = ["_bucket", "_count", "_created", "_sum", "_total"];

/// Why a series is not shown under the plain rewriting of its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Marks(u8);

impl Marks {
    /// One of our own families has the name.
    pub(super) const OWN: Self = Self(1);
    /// A label has a name that Prometheus or the family needs.
    pub(super) const LABEL: Self = Self(2);
    /// An older family has the name.
    pub(super) const RENAMED: Self = Self(4);
    /// Another series has the same name and labels.
    pub(super) const MERGED: Self = Self(8);

    pub(super) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(super) const fn any(self) -> bool {
        self.0 != 0
    }
}

/// How many keys are touched at once.
const AHEAD: usize = 16;

/// One series in one class.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Eight bytes of the text, from the depth that is being sorted.
    prefix: u64,
    /// Where its text stands.
    start: u64,
    len: u32,
    name_len: u32,
    pub(super) source: u32,
    pub(super) class: Class,
    pub(super) marks: Marks,
}

/// All series of a scrape in the order of the exposition: by family name, then class, then labels.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) sources: Vec<Arc<Series>>,
    pub(super) entries: Vec<Entry>,
    pub(super) families: Vec<Range<u32>>,
    /// Of each entry: the name, the class, the labels as in a key, `name=value;name=value`, their names rewritten, their
    /// values percent-encoded. No text holds a zero: keys percent-encode control characters.
    texts: Vec<u8>,
    names: Names,
    /// The mapping rules of `sources`.
    pub(super) rules: Rules,
}

impl Index {
    /// Names and orders the series, and resolves what collides. Series past the 2^31st are left out. Observations are
    /// shown as `observer_type` unless a mapping rule says otherwise.
    pub(super) fn new(mapped: Mapped, names: Names, observer_type: ObserverType) -> Self {
        let Mapped { series: mut sources, rules, .. } = mapped;
        sources.truncate(i32::MAX as usize);
        let mut index = Self {
            entries: Vec::with_capacity(sources.len()),
            families: Vec::new(),
            texts: Vec::with_capacity(sources.len() * 32),
            sources: Vec::new(),
            names,
            rules,
        };
        for (source, series) in sources.iter().enumerate() {
            if source % AHEAD == 0 {
                // Keys stand anywhere in memory: touched together, their cache misses overlap.
                let ahead = &sources[source..sources.len().min(source + AHEAD)];
                black_box(
                    ahead
                        .iter()
                        .map(|series| series.key().as_str().bytes().next().map_or(0, usize::from))
                        .sum::<usize>(),
                );
            }
            let source = source as u32;
            for class in Class::of(series.kind(), index.rules.observer_type(source, observer_type)) {
                index.enter(source, series, *class);
            }
        }
        index.sources = sources;
        let mut entries = std::mem::take(&mut index.entries);
        index.sort(&mut entries);
        index.entries = entries;
        index.find_families();
        index.resolve();
        index
    }

    /// How many entries are not shown under the plain rewriting of their own name.
    pub(super) fn conflicts(&self) -> usize {
        self.entries.iter().filter(|entry| entry.marks.any()).count()
    }

    /// The family name of an entry: ASCII.
    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        &self.text(entry)[..entry.name_len as usize]
    }

    /// The labels of an entry as in a key: `name=value;name=value`, names ready, values percent-encoded.
    pub(super) fn labels(&self, entry: &Entry) -> &[u8] {
        &self.text(entry)[entry.name_len as usize + 1..]
    }

    fn text(&self, entry: &Entry) -> &[u8] {
        &self.texts[entry.start as usize..][..entry.len as usize]
    }

    /// Adds a series, unordered.
    fn enter(&mut self, source: u32, series: &Series, class: Class) {
        let start = self.texts.len();
        let rules = std::mem::take(&mut self.rules);
        let given = rules.given(source);
        let key = given.map_or(series.key(), |given| &given.key);
        let (name_len, marks) = match self.enter_plain(key.as_str(), class, given.is_some()) {
            Some(name_len) => (name_len, Marks::default()),
            None => {
                self.texts.truncate(start);
                let (text, name_len, marks) = rewritten(key, class, self.names, given.is_some());
                self.push_text(text.as_str().as_bytes(), name_len, class);
                (name_len, marks)
            }
        };
        self.rules = rules;
        self.entries.push(Entry {
            prefix: 0,
            start: start as u64,
            len: (self.texts.len() - start) as u32,
            name_len: name_len as u32,
            source,
            class,
            marks,
        });
    }

    /// Appends the text of a key that can be rewritten byte by byte and has no name near one of our own. The length of
    /// the name; `None`, with a part of it appended, where [`rewritten`] has to look closer.
    fn enter_plain(&mut self, key: &str, class: Class, mapped: bool) -> Option<usize> {
        let name_len = memchr::memchr(b';', key.as_bytes()).unwrap_or(key.len());
        let (name, tags) = key.split_at(name_len);
        let plain_class = match class {
            Class::Counter => self.names == Names::Plain || !name.ends_with("total"),
            Class::Gauge | Class::Summary | Class::Histogram | Class::Set => true,
            Class::MeterTotal | Class::MeterRate => false,
        };
        let near_own = name.starts_with("tallyd") || name.starts_with("process");
        if !plain_class || near_own || !is_plain(name) {
            return None;
        }
        self.push_text(name.as_bytes(), name_len, class);
        if !tags.is_empty() {
            self.push_plain_tags(&tags[1..], mapped)?;
        }
        Some(name_len)
    }

    /// Appends labels whose names can be rewritten byte by byte and stay in order, each once, none of them reserved.
    fn push_plain_tags(&mut self, tags: &str, mapped: bool) -> Option<()> {
        let start = self.texts.len();
        let mut last = start..start;
        for tag in tags.split(';') {
            let is_label = |(name, value): &(&str, &str)| is_plain(name) && (mapped || !value.is_empty());
            let (name, value) = tag.split_once('=').filter(is_label)?;
            if self.texts.len() > start {
                self.texts.push(b';');
            }
            let begin = self.texts.len();
            self.push_name(name.as_bytes());
            let label = begin..self.texts.len();
            if is_reserved(&self.texts[label.clone()]) || self.texts[label.clone()] <= self.texts[last] {
                return None;
            }
            last = label;
            self.texts.push(b'=');
            self.texts.extend_from_slice(value.as_bytes());
        }
        Some(())
    }

    /// Appends a text in the form of a key.
    fn push_text(&mut self, key: &[u8], name_len: usize, class: Class) {
        self.push_name(&key[..name_len]);
        self.texts.push(class as u8);
        self.texts.extend_from_slice(key.get(name_len + 1..).unwrap_or_default());
    }

    fn push_name(&mut self, name: &[u8]) {
        self.texts.extend(name.iter().map(|byte| NAME[usize::from(*byte)]));
    }

    /// Sorts by eight bytes at a time, so that a comparison never has to reach for a text: all entries by their first
    /// eight, then each run of equals by the next eight. Equal texts are ordered by what they are the texts of, so that
    /// rounding lets no sum of theirs fall from one scrape to the next, and marked, all but the first.
    fn sort(&self, entries: &mut [Entry]) {
        let mut runs = vec![(0..entries.len(), 0)];
        while let Some((run, depth)) = runs.pop() {
            let entries = &mut entries[run.clone()];
            for entry in entries.iter_mut() {
                entry.prefix = self.eight(entry, depth);
            }
            entries.sort_unstable_by_key(|entry| entry.prefix);
            let mut start = run.start;
            for equal in entries.chunk_by_mut(|a, b| a.prefix == b.prefix) {
                let end = start + equal.len();
                let ended = equal[0].prefix.to_be_bytes()[7] == 0;
                if equal.len() > 1 && ended {
                    equal.sort_unstable_by_key(|entry| self.identity(entry));
                    for entry in &mut equal[1..] {
                        entry.marks = entry.marks.with(Marks::MERGED);
                    }
                } else if equal.len() > 1 {
                    runs.push((start..end, depth + 8));
                }
                start = end;
            }
        }
    }

    fn identity(&self, entry: &Entry) -> (Kind, &str) {
        let series = &self.sources[entry.source as usize];
        (series.kind(), series.key().as_str())
    }

    /// Eight bytes of an entry's text from `depth`, zeros behind its end.
    fn eight(&self, entry: &Entry, depth: usize) -> u64 {
        let rest = self.text(entry).get(depth..).unwrap_or_default();
        let mut eight = [0; 8];
        match rest.first_chunk() {
            Some(whole) => eight = *whole,
            None => eight[..rest.len()].copy_from_slice(rest),
        }
        u64::from_be_bytes(eight)
    }

    fn find_families(&mut self) {
        let mut families = std::mem::take(&mut self.families);
        families.clear();
        let mut start = 0;
        for family in self.entries.chunk_by(|a, b| a.class == b.class && self.same_name(a, b)) {
            let end = start + family.len() as u32;
            families.push(start..end);
            start = end;
        }
        self.families = families;
    }

    fn same_name(&self, a: &Entry, b: &Entry) -> bool {
        a.name_len == b.name_len && self.name(a) == self.name(b)
    }
}

/// What collides, and how it is told apart.
impl Index {
    /// Gives every family whose sample names an older family has too its type as a suffix, as often as it takes.
    fn resolve(&mut self) {
        let colliding = self.colliding();
        if colliding.is_empty() {
            return;
        }
        let mut renamed = self.renames(&colliding);
        if renamed.is_empty() {
            return;
        }
        renamed.sort_unstable_by_key(|(family, _)| *family);
        let mut moved = Vec::new();
        for (family, name) in renamed {
            for at in self.families[family].clone() {
                let mut entry = self.entries[at as usize];
                let behind = entry.start as usize + entry.name_len as usize..entry.start as usize + entry.len as usize;
                entry.len = (name.len() + behind.len()) as u32;
                entry.name_len = name.len() as u32;
                entry.marks = entry.marks.without(Marks::MERGED).with(Marks::RENAMED);
                entry.start = self.texts.len() as u64;
                self.texts.extend_from_slice(name.as_bytes());
                self.texts.extend_from_within(behind);
                moved.push(entry);
                self.entries[at as usize].name_len = GONE;
            }
        }
        self.sort(&mut moved);
        self.entries.retain(|entry| entry.name_len != GONE);
        self.merge(moved);
        self.find_families();
    }

    /// Puts sorted entries between those that stayed. No moved entry shares its family with one of these.
    fn merge(&mut self, moved: Vec<Entry>) {
        let stayed = std::mem::take(&mut self.entries);
        let mut merged = Vec::with_capacity(stayed.len() + moved.len());
        let mut stayed = stayed.into_iter().peekable();
        for entry in moved {
            while let Some(next) = stayed.next_if(|next| self.name(next) <= self.name(&entry)) {
                merged.push(next);
            }
            merged.push(entry);
        }
        merged.extend(stayed);
        self.entries = merged;
    }

    /// The families that share a sample name with another, and those that a new name of theirs could meet.
    fn colliding(&self) -> Vec<usize> {
        let mut found: Vec<usize> = self.same_names().chain(self.same_samples()).collect();
        let mut seen: HashSet<usize> = found.iter().copied().collect();
        found = seen.iter().copied().collect();
        let mut next = 0;
        while let Some(family) = found.get(next).copied() {
            next += 1;
            for attempt in 0.. {
                let met = self.holders(family, &self.candidate(family, attempt));
                let free = met.is_empty();
                found.extend(met.into_iter().filter(|other| seen.insert(*other)));
                if free && attempt > 0 {
                    break;
                }
            }
        }
        found
    }

    /// Families that stand beside one of the same name and another class.
    fn same_names(&self) -> impl Iterator<Item = usize> {
        self.families.windows(2).enumerate().flat_map(|(at, pair)| {
            let (a, b) = (self.first(&pair[0]), self.first(&pair[1]));
            let same = a.class != b.class && self.same_name(a, b);
            if same { at..at + 2 } else { at..at }
        })
    }

    /// Families whose name is that of another's sample, and these others. Names of families that could be that of a
    /// sample are few, so their stems go into a set, and only what is found there is searched for.
    fn same_samples(&self) -> impl Iterator<Item = usize> {
        let hasher = FixedState::default();
        let mut stems = HashSet::with_hasher(hasher.clone());
        for family in &self.families {
            let name = self.name(self.first(family));
            for stem in SUFFIXES.iter().filter_map(|suffix| name.strip_suffix(suffix.as_bytes())) {
                stems.insert(hasher.hash_one(stem));
            }
        }
        let mut found = Vec::new();
        let with_suffix = self.families.iter().enumerate().filter(|_| !stems.is_empty());
        for (at, family) in with_suffix {
            if self.first(family).class.suffixes(self.names).len() == 1 {
                continue;
            }
            if stems.contains(&hasher.hash_one(self.name(self.first(family)))) {
                let met = self.holders(at, &self.candidate(at, 0));
                found.extend((!met.is_empty()).then_some(at));
                found.extend(met);
            }
        }
        found.into_iter()
    }

    /// The other families with which one would share a sample name, were it called so.
    fn holders(&self, family: usize, name: &str) -> Vec<usize> {
        let class = self.first(&self.families[family]).class;
        let mut met = Vec::new();
        for suffix in class.suffixes(self.names) {
            let sample = [name, suffix].concat();
            met.extend(self.named(&sample));
            for (stem, suffix) in SUFFIXES.iter().filter_map(|suffix| Some((sample.strip_suffix(suffix)?, suffix))) {
                let has =
                    |family: &usize| self.first(&self.families[*family]).class.suffixes(self.names).contains(suffix);
                met.extend(self.named(stem).filter(has));
            }
        }
        met.retain(|other| *other != family);
        met
    }

    /// The families of a name, one for each class.
    fn named(&self, name: &str) -> Range<usize> {
        let cmp = |family: &Range<u32>| self.name(self.first(family)).cmp(name.as_bytes());
        let start = self.families.partition_point(|family| cmp(family) == Ordering::Less);
        let len = self.families[start..].iter().take_while(|family| cmp(family) == Ordering::Equal).count();
        start..start + len
    }

    /// The new names of those that need one: the oldest keep theirs, the later give way.
    fn renames(&self, colliding: &[usize]) -> Vec<(usize, String)> {
        let mut by_age: Vec<_> = colliding.iter().map(|family| (self.age(*family), *family)).collect();
        by_age.sort_unstable();
        let inside: HashSet<usize> = colliding.iter().copied().collect();
        let mut taken: HashSet<String> = HashSet::new();
        let mut renamed = Vec::new();
        for (_, family) in by_age {
            let class = self.first(&self.families[family]).class;
            for attempt in 0.. {
                let name = self.candidate(family, attempt);
                let samples = class.suffixes(self.names).iter().map(|suffix| [&name, *suffix].concat());
                let samples: Vec<String> = samples.collect();
                let meets_outsider = || self.holders(family, &name).iter().any(|other| !inside.contains(other));
                if samples.iter().any(|sample| taken.contains(sample)) || meets_outsider() {
                    continue;
                }
                taken.extend(samples);
                if attempt > 0 {
                    renamed.push((family, name));
                }
                break;
            }
        }
        renamed
    }

    /// What orders colliding families: the start of their oldest series, its type letter, the name.
    fn age(&self, family: usize) -> (u64, &'static str, &[u8]) {
        let (start_ms, kind) = self.oldest(family);
        (start_ms, kind.letter(), self.name(self.first(&self.families[family])))
    }

    fn oldest(&self, family: usize) -> (u64, Kind) {
        let Range { start, end } = self.families[family];
        let sources =
            self.entries[start as usize..end as usize].iter().map(|entry| &self.sources[entry.source as usize]);
        let ages = sources.map(|source| (source.total().start_ms, source.kind()));
        ages.min_by_key(|(start_ms, kind)| (*start_ms, kind.letter())).unwrap_or((0, Kind::Counter))
    }

    /// The name of a family with its type behind it, `attempt` times.
    fn candidate(&self, family: usize, attempt: usize) -> String {
        let name = self.name(self.first(&self.families[family]));
        let mut name: String = name.iter().copied().map(char::from).collect();
        if attempt > 0 {
            let suffix = ["_", &self.oldest(family).1.json().to_ascii_lowercase()].concat();
            name.push_str(&suffix.repeat(attempt));
        }
        name
    }

    fn first(&self, family: &Range<u32>) -> &Entry {
        &self.entries[family.start as usize]
    }
}

/// The name length of an entry that has moved elsewhere.
const GONE: u32 = u32::MAX;

/// What stands for each byte of a name. Bytes of longer characters never come here.
static NAME: [u8; 256] = {
    let mut table = [b'_'; 256];
    let mut byte = 0;
    while byte < 256 {
        if (byte as u8).is_ascii_alphanumeric() {
            table[byte] = byte as u8;
        }
        byte += 1;
    }
    table
};

/// Whether a name or label can be rewritten byte by byte.
fn is_plain(name: &str) -> bool {
    let Some(first) = name.bytes().next() else { return false };
    let (mut odd, mut last) = (first.is_ascii_digit(), 0);
    for byte in name.bytes() {
        odd |= byte >= 0x80 || byte == b'%' || (byte == b'-' && last == b'-');
        last = byte;
    }
    !odd
}

/// Labels that Prometheus or a family gives itself.
fn is_reserved(label: &[u8]) -> bool {
    matches!(label, b"le" | b"quantile") || label.starts_with(b"__")
}

/// Name and labels as shown, in the form of a key; the length of the name; what was changed.
///
/// Where a mapping rule matches, `mapped`, the key is what it made of the series', and a label may be empty.
pub(super) fn rewritten(key: &SeriesKey, class: Class, names: Names, mapped: bool) -> (SeriesKey, usize, Marks) {
    let mut marks = Marks::default();
    let mut name = family_name(&escaped(&key.name()), class, names);
    if is_own(&name, class, names) {
        name.push_str("_client");
        marks = marks.with(Marks::OWN);
    }
    let mut labels: Vec<(String, String)> = Vec::new();
    for (tag, value) in key.tags() {
        let Some(value) = value.filter(|value| (mapped || !value.is_empty()) && !tag.is_empty()) else { continue };
        let mut label = escaped(&tag);
        if is_reserved(label.as_bytes()) || (class == Class::MeterRate && label == "window") {
            label.insert_str(0, "exported_");
            marks = marks.with(Marks::LABEL);
        }
        labels.push((label, value.into_owned()));
    }
    labels.sort_by(|a, b| a.0.cmp(&b.0));
    labels.dedup_by(|next, first| {
        let same = next.0 == first.0;
        if same {
            first.1.push(',');
            first.1.push_str(&next.1);
        }
        same
    });
    let labels = labels.into_iter().map(|(label, value)| (label, Some(value))).collect();
    (SeriesKey::new(&name, &Tags::new(labels)), name.len(), marks)
}

/// A name or label as statsd_exporter rewrites it: characters outside `[a-zA-Z0-9_]` become `_`, a run of dashes a
/// single one, and a digit at the beginning gets `_` before it.
pub(super) fn escaped(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len() + 1);
    if name.as_bytes().first().is_none_or(u8::is_ascii_digit) {
        escaped.push('_');
    }
    let mut last = None;
    for c in name.chars() {
        if c != '-' || last != Some('-') {
            escaped.push(if c.is_ascii_alphanumeric() { c } else { '_' });
        }
        last = Some(c);
    }
    escaped
}

/// The name of the family in which a series of this name is shown. OpenMetrics gives a counter's sample the suffix
/// `_total` and its family the name without it.
fn family_name(name: &str, class: Class, names: Names) -> String {
    match (class, names) {
        (Class::Counter, Names::OpenMetrics) => match name.strip_suffix("_total") {
            Some(stem) if !stem.is_empty() => stem.to_owned(),
            Some(_) | None => name.to_owned(),
        },
        (Class::MeterTotal, Names::Plain) => [name, "_total"].concat(),
        (Class::MeterRate, Names::Plain | Names::OpenMetrics) => [name, "_rate"].concat(),
        (Class::MeterTotal, Names::OpenMetrics)
        | (Class::Counter, Names::Plain)
        | (Class::Gauge | Class::Summary | Class::Histogram | Class::Set, Names::Plain | Names::OpenMetrics) => {
            name.to_owned()
        }
    }
}

/// Whether a family of this name would share a sample name with one of our own.
fn is_own(name: &str, class: Class, names: Names) -> bool {
    static OWN: LazyLock<HashSet<String>> = LazyLock::new(|| telemetry::sample_names().collect());
    class.suffixes(names).iter().any(|suffix| OWN.contains(&[name, suffix].concat()))
}
