//! statsd_exporter's mapping rules: the name of a series into the name and labels that Prometheus sees, or nothing.
//!
//! [`Mapping::parse`] reads its YAML file, [`Mapping::find`] the rule for a name. It is pure and slow enough to be asked
//! once for each series, never for each line: a worker asks when it first sees an identity, to drop it, and a scrape when
//! it first shows a series. Names are those of our series, so `protocol.name_policy` comes first, and tags are no part.
//!
//! Source of the rules: statsd_exporter 0.31 (`pkg/mapper`), by its code and by asking it.
//! - Globs are tried before regexes, whatever their order in the file; of globs the first in the file wins, or with
//!   `glob_disable_ordering` the one with literal components where others have `*`. `*` is one component between dots,
//!   which may be empty.
//! - Regexes are tried in the order of the file and are searched, not anchored.
//! - `match_metric_type`: sets are gauges here, meters are counters.
//! - A rule's labels take the place of tags of the same name, or with `honor_labels` give way to them.
//! - What neither rule nor `defaults` say is up to the section `[prometheus]`.
//!
//! Where statsd_exporter loses rules this does not: a glob that is the beginning of an earlier one (`a.b` after `a.b.c`)
//! matches, a second rule with the same glob does not take the place of the first, and `glob_disable_ordering` always finds
//! a rule if one fits. The files `file.rs` and `template.rs` have their own lists.
//!
//! Regexes are Go's (RE2) and are translated for the crate `regex`, which has the same syntax, semantics and bound on time
//! but for: Perl's classes and `\b`, which are ASCII in Go; `[`, `&&`, `--` and `~~` inside a class, which are literals in
//! Go; `\Q...\E`. Not translated: `\C`, octal escapes, `\B`. Flags and look-arounds neither has are refused by both.

mod file;
mod glob;
mod template;
#[cfg(test)]
mod tests;
mod yaml;

use std::sync::Arc;
use std::time::Duration;

use regex::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};
use serde::{Deserialize, Serialize};

pub use file::{Fault, Note, Problem, Remark};
pub use yaml::Place;

use self::file::{Defaults, Written};
use self::glob::Globs;
use self::template::Template;
use crate::sample::Kind;

/// `[mapping]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The mapping file; none if empty.
    pub file: String,
    /// What stands in it, read by whoever reads the configuration.
    #[serde(skip)]
    pub rules: Option<Arc<Mapping>>,
}

/// The longest file that is read.
pub const FILE_MAX: u64 = 64 << 20;

/// As what a series is matched by `match_metric_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Counters and meters.
    Counter,
    /// Gauges and sets.
    Gauge,
    /// Timers, histograms and distributions.
    Observer,
}

impl Metric {
    /// Every one, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Counter, Self::Gauge, Self::Observer];

    /// As what a kind is matched.
    pub const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Counter | Kind::Meter => Self::Counter,
            Kind::Gauge | Kind::Set => Self::Gauge,
            Kind::Timer | Kind::Histogram | Kind::Distribution => Self::Observer,
        }
    }

    /// Its name in a mapping file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Observer => "observer",
        }
    }
}

/// How timers, histograms and distributions are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObserverType {
    /// Quantiles of the last closed and the current window, sum and count of the whole life.
    Summary,
    /// Classic buckets, sum and count of the whole life.
    Histogram,
}

impl ObserverType {
    /// Its name in configuration and mapping files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Summary => "summary",
            Self::Histogram => "histogram",
        }
    }

    /// An empty text is the usual one, here and below, whatever `defaults` says.
    fn read(text: &str) -> Option<Self> {
        let found = [Self::Summary, Self::Histogram].into_iter().find(|one| one.name() == text);
        found.or(text.is_empty().then_some(Self::Summary))
    }
}

/// How a rule's `match` is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatchType {
    /// Components, of which `*` is any one.
    Glob,
    /// A regex, searched.
    Regex,
}

impl MatchType {
    /// Its name in a mapping file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Glob => "glob",
            Self::Regex => "regex",
        }
    }

    fn read(text: &str) -> Option<Self> {
        let found = [Self::Glob, Self::Regex].into_iter().find(|one| one.name() == text);
        found.or(text.is_empty().then_some(Self::Glob))
    }
}

/// What becomes of a series that a rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It gets the rule's name and labels.
    Map,
    /// Its samples are not kept.
    Drop,
}

impl Action {
    /// Its name in a mapping file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Drop => "drop",
        }
    }

    fn read(text: &str) -> Option<Self> {
        let found = [Self::Map, Self::Drop].into_iter().find(|one| one.name() == text);
        found.or(text.is_empty().then_some(Self::Map))
    }
}

/// How series are shown, as far as a rule or `defaults` says it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Style {
    /// The observer type.
    pub observer_type: Option<ObserverType>,
    /// Quantiles of summaries, rising.
    pub quantiles: Option<Vec<f64>>,
    /// Upper bounds of histograms' buckets, rising and finite.
    pub buckets: Option<Vec<f64>>,
    /// How fine native histograms are.
    pub native: NativeStyle,
    /// Time without a sample after which a series is not shown; zero: no end.
    pub ttl: Duration,
}

/// How fine native histograms are, as far as a rule or `defaults` says it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct NativeStyle {
    /// By how much buckets grow at most; with 1 or less there are none.
    pub bucket_factor: Option<f64>,
    /// How many buckets there are at most.
    pub max_buckets: Option<u32>,
}

impl NativeStyle {
    fn or(self, other: Self) -> Self {
        Self {
            bucket_factor: self.bucket_factor.or(other.bucket_factor),
            max_buckets: self.max_buckets.or(other.max_buckets),
        }
    }
}

/// A rule.
#[derive(Debug)]
pub struct Rule {
    /// The line on which it begins.
    pub line: usize,
    /// Its `match`.
    pub pattern: String,
    /// How that is read.
    pub match_type: MatchType,
    /// What becomes of what it matches.
    pub action: Action,
    /// What it says of how series are shown, with what `defaults` says where it says nothing.
    pub style: Style,
    /// Whether a tag wins over a label of the rule.
    pub honor_labels: bool,
    /// What shown values are multiplied by.
    pub scale: f64,
    /// The help text of its family.
    pub help: Option<String>,
    metric: Option<Metric>,
    name: Template,
    labels: Vec<(String, Template)>,
}

/// The rules of a file.
#[derive(Debug)]
pub struct Mapping {
    rules: Vec<Rule>,
    defaults: Style,
    globs: Globs,
    regexes: Regexes,
    notes: Vec<Note>,
    has_drops: bool,
    text: String,
}

/// The same file means the same rules.
impl PartialEq for Mapping {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// A rule that matches a name, and what its captures hold.
#[derive(Debug)]
pub struct Found<'m, 'n> {
    /// The rule's number, from 0.
    pub number: u32,
    /// The rule.
    pub rule: &'m Rule,
    /// The whole name (or match of a regex), then the captures.
    captures: Vec<&'n str>,
}

impl<'m> Found<'m, '_> {
    /// The name that the rule gives, as it comes: it may be empty, or hold what no name may.
    pub fn name(&self) -> String {
        self.rule.name.fill(&self.captures)
    }

    /// The labels that the rule gives, in the order of the file.
    pub fn labels(&self) -> impl Iterator<Item = (&'m str, String)> {
        self.rule.labels.iter().map(|(label, value)| (label.as_str(), value.fill(&self.captures)))
    }
}

impl Mapping {
    /// Reads a file.
    ///
    /// # Errors
    /// All that is wrong with it, in its order; never empty.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let file = file::read(text)?;
        let defaults = file.defaults;
        let mut builder = Builder::new(!defaults.glob_disable_ordering);
        let rules: Vec<Rule> = file
            .rules
            .into_iter()
            .enumerate()
            .map(|(number, written)| builder.rule(number as u32, written, &defaults))
            .collect();
        let (globs, regexes) = builder.finish()?;
        let mut notes = file.notes;
        notes.extend(shadowed(&rules, &globs));
        notes.sort_by_key(|note| note.at);
        let has_drops = rules.iter().any(|rule| rule.action == Action::Drop);
        Ok(Self { rules, defaults: style(&defaults), globs, regexes, notes, has_drops, text: text.to_owned() })
    }

    /// The rule for a name.
    pub fn find<'n>(&self, metric: Metric, name: &'n str) -> Option<Found<'_, 'n>> {
        let by_glob = || {
            let (number, mut captures) = self.globs.find(metric, name)?;
            captures.insert(0, name);
            Some((number, captures))
        };
        let (number, captures) = by_glob().or_else(|| self.regexes.find(metric, name))?;
        Some(Found { number, rule: &self.rules[number as usize], captures })
    }

    /// Whether samples of a series are not kept.
    pub fn drops(&self, kind: Kind, name: &str) -> bool {
        self.has_drops && self.find(Metric::of(kind), name).is_some_and(|found| found.rule.action == Action::Drop)
    }

    /// Whether there is a rule that drops.
    pub fn has_drops(&self) -> bool {
        self.has_drops
    }

    /// The rules in the order of the file.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What `defaults` says, which holds for series that no rule matches too.
    pub fn defaults(&self) -> &Style {
        &self.defaults
    }

    /// What is right in the file, but does nothing.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }
}

fn style(defaults: &Defaults) -> Style {
    Style {
        observer_type: defaults.observer_type,
        quantiles: defaults.quantiles.clone(),
        buckets: defaults.buckets.clone(),
        native: defaults.native,
        ttl: defaults.ttl,
    }
}

/// Globs that never come first. A pattern is looked up like a name: its `*` is met by another `*` alone.
fn shadowed(rules: &[Rule], globs: &Globs) -> Vec<Note> {
    let mut notes = Vec::new();
    for (number, rule) in rules.iter().enumerate().filter(|(_, rule)| rule.match_type == MatchType::Glob) {
        let metrics = Metric::ALL.into_iter().filter(|metric| rule.metric.is_none_or(|only| only == *metric));
        let winners: Option<Vec<u32>> = metrics
            .map(|metric| globs.find(metric, &rule.pattern).map(|(winner, _)| winner))
            .map(|winner| winner.filter(|winner| (*winner as usize) < number))
            .collect();
        if let Some(winner) = winners.as_ref().and_then(|winners| winners.first()) {
            let (key, line) = (format!("mappings[{number}].match"), rules[*winner as usize].line);
            notes.push(Note { at: Place { line: rule.line, column: 1 }, key, remark: Remark::Shadowed(line) });
        }
    }
    notes
}

/// Regex rules. One pass over a name says which of them match; where all together are too large for that, each is asked.
#[derive(Debug, Default)]
struct Regexes {
    regexes: Vec<(u32, Option<Metric>, Regex)>,
    set: Option<RegexSet>,
}

/// How large a compiled regex may become, and all of them in one.
const REGEX_MAX: usize = 1 << 20;
const REGEX_SET_MAX: usize = 10 << 20;

impl Regexes {
    fn find<'n>(&self, metric: Metric, name: &'n str) -> Option<(u32, Vec<&'n str>)> {
        let captures = |(number, only, regex): &(u32, Option<Metric>, Regex)| {
            if only.is_some_and(|only| only != metric) {
                return None;
            }
            let captures = regex.captures(name)?;
            let group = |group: Option<regex::Match<'n>>| group.map_or("", |group| group.as_str());
            Some((*number, captures.iter().map(group).collect()))
        };
        match &self.set {
            Some(set) => set.matches(name).iter().find_map(|at| captures(&self.regexes[at])),
            None => self.regexes.iter().find_map(captures),
        }
    }

    fn with_set(self) -> Self {
        let patterns = self.regexes.iter().map(|(_, _, regex)| regex.as_str());
        let set =
            (self.regexes.len() > 1).then(|| RegexSetBuilder::new(patterns).size_limit(REGEX_SET_MAX).build().ok());
        Self { set: set.flatten(), ..self }
    }
}

/// Compiles rules.
struct Builder {
    globs: Globs,
    regexes: Regexes,
    problems: Vec<Problem>,
}

impl Builder {
    fn new(ordered: bool) -> Self {
        Self { globs: Globs::new(ordered), regexes: Regexes::default(), problems: Vec::new() }
    }

    fn finish(self) -> Result<(Globs, Regexes), Vec<Problem>> {
        if self.problems.is_empty() { Ok((self.globs, self.regexes.with_set())) } else { Err(self.problems) }
    }

    fn rule(&mut self, number: u32, written: Written, defaults: &Defaults) -> Rule {
        let read: Box<dyn Fn(&str) -> Template> = match written.match_type {
            MatchType::Glob => {
                let captures = self.globs.add(&written.pattern.1, written.metric, number);
                Box::new(move |text| Template::of_glob(text, captures))
            }
            MatchType::Regex => {
                let regex = self.regex(&written);
                self.regexes.regexes.extend(regex.clone().map(|regex| (number, written.metric, regex)));
                Box::new(move |text| regex.as_ref().map(|regex| Template::of_regex(text, regex)).unwrap_or_default())
            }
        };
        let (name, labels) =
            (read(&written.name), written.labels.into_iter().map(|(label, value)| (label, read(&value))).collect());
        let style = Style {
            observer_type: written.observer_type.or(defaults.observer_type),
            quantiles: written.quantiles.or_else(|| defaults.quantiles.clone()),
            buckets: written.buckets.or_else(|| defaults.buckets.clone()),
            native: written.native.or(defaults.native),
            ttl: written.ttl,
        };
        Rule {
            line: written.at.line,
            pattern: written.pattern.1,
            match_type: written.match_type,
            action: written.action,
            style,
            honor_labels: written.honor_labels,
            scale: written.scale,
            help: written.help.filter(|help| !help.is_empty()),
            metric: written.metric,
            name,
            labels,
        }
    }

    fn regex(&mut self, written: &Written) -> Option<Regex> {
        let (at, pattern) = &written.pattern;
        match RegexBuilder::new(&translated(pattern)).size_limit(REGEX_MAX).build() {
            Ok(regex) => Some(regex),
            Err(error) => {
                let key = format!("{}.match", written.path);
                self.problems.push(Problem { at: *at, key, fault: Fault::Regex(reason(&error, pattern)) });
                None
            }
        }
    }
}

/// What is wrong with a regex, in a line; the crate draws a picture, of which the last line says it.
fn reason(error: &regex::Error, pattern: &str) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default();
    format!("{}: {}", file::quoted(pattern), last.strip_prefix("error: ").unwrap_or(last))
}

/// A regex of Go in the syntax of the crate `regex`.
fn translated(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    // Where a class begins, a `]` is a literal.
    let (mut in_class, mut at_start) = (false, false);
    while let Some(c) = rest.chars().next() {
        let was_start = std::mem::take(&mut at_start);
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => rest = escape(rest, in_class, &mut out),
            '[' if !in_class => {
                (in_class, at_start) = (true, true);
                out.push('[');
                if let Some(behind) = rest.strip_prefix('^') {
                    rest = behind;
                    out.push('^');
                }
            }
            '[' => match rest.strip_prefix(':').and_then(|name| name.split_once(":]")) {
                Some((name, behind)) => {
                    rest = behind;
                    out.extend(["[:", name, ":]"]);
                }
                None => out.push_str("\\["),
            },
            ']' if in_class && !was_start => {
                in_class = false;
                out.push(']');
            }
            ']' | '&' | '~' if in_class => out.extend(['\\', c]),
            '-' if in_class && (was_start || rest.starts_with('-')) => out.push_str("\\-"),
            _ => out.push(c),
        }
    }
    out
}

/// What stands for a backslash and what is behind it; the answer is where to go on.
fn escape<'p>(rest: &'p str, in_class: bool, out: &mut String) -> &'p str {
    let Some(c) = rest.chars().next() else {
        out.push('\\');
        return rest;
    };
    let behind = &rest[c.len_utf8()..];
    let class = match c {
        'd' => "[0-9]",
        'D' => "[^0-9]",
        'w' => "[0-9A-Za-z_]",
        'W' => "[^0-9A-Za-z_]",
        's' => r"[\t\n\f\r ]",
        'S' => r"[^\t\n\f\r ]",
        'b' if !in_class => r"(?-u:\b)",
        'Q' => {
            let (literal, behind) = behind.split_once("\\E").unwrap_or((behind, ""));
            out.push_str(&regex::escape(literal));
            return behind;
        }
        _ => {
            out.extend(['\\', c]);
            return behind;
        }
    };
    out.push_str(class);
    behind
}
