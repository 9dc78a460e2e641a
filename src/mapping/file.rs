//! What a mapping file says, checked: every key known, every value of its kind, all that is wrong told at once.
//!
//! Keys, values and what excludes what are those of statsd_exporter 0.31, which refuses keys that it does not know and the
//! old spellings `timer_type`, `buckets`, `quantiles` and `match_metric_type: timer`; here the new one is named. It differs
//! in that labels of one letter are taken, as Prometheus takes them, and in that a number without a unit is no duration,
//! since statsd_exporter takes `ttl: 30` for 30 nanoseconds.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::yaml::{self, Key, Node, Place, Value};
use super::{Action, MatchType, Metric, NativeStyle, ObserverType};

/// What is wrong in a mapping file.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Where.
    pub at: Place,
    /// The key, as in `mappings[0].labels.host`; empty for the whole file.
    pub key: String,
    /// What.
    pub fault: Fault,
}

/// What is wrong with a key of a mapping file.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// No YAML, or too much of it.
    Syntax(String),
    /// No such key, and the nearest one there is.
    Unknown(Option<&'static str>),
    /// A key that statsd_exporter had once, and what it is called now.
    Renamed(&'static str),
    /// A key that must be there is not, or is empty.
    Missing,
    /// A value of another kind, or out of its bounds.
    Value {
        /// What stands there.
        found: String,
        /// What is wanted.
        want: &'static str,
    },
    /// The regex is none.
    Regex(String),
    /// Options that belong to the other observer type.
    OtherObserver(ObserverType),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = on_a_line(&self.key);
        match &self.fault {
            Fault::Syntax(message) if key.is_empty() => write!(f, "no YAML: {}", on_a_line(message)),
            Fault::Syntax(message) => write!(f, "{key}: no YAML: {}", on_a_line(message)),
            Fault::Unknown(Some(nearest)) => write!(f, "{key}: unknown key; did you mean {nearest}?"),
            Fault::Unknown(None) => write!(f, "{key}: unknown key; statsd_exporter's README lists those there are"),
            Fault::Renamed(now) => write!(f, "{key}: no longer a key of statsd_exporter; write {now}"),
            Fault::Missing => write!(f, "{key}: missing; every rule needs one, those that drop too"),
            Fault::Value { found, want } => write!(f, "{key} = {found}: write {want}"),
            Fault::Regex(message) => write!(f, "{key}: no regex: {message}"),
            Fault::OtherObserver(observer) => {
                write!(f, "{key}: the observer_type is {}; take the options away, or change it", observer.name())
            }
        }
    }
}

/// How many characters of a text of the file a message shows.
const SHOWN_MAX: usize = 200;

/// A text of the file as a message shows it: on one line, and none too long to be read.
fn on_a_line(text: &str) -> String {
    let (shown, dots) = cut(text);
    // Only what moves the cursor: letters of any language stay as they are.
    let escaped = shown.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() });
    escaped.collect::<String>() + dots
}

/// The same, in quotes.
pub(super) fn quoted(text: &str) -> String {
    let (shown, dots) = cut(text);
    format!("{shown:?}{dots}")
}

/// The beginning of a text that is shown, and what says that there is more.
fn cut(text: &str) -> (&str, &'static str) {
    text.char_indices().nth(SHOWN_MAX).map_or((text, ""), |(end, _)| (&text[..end], "..."))
}

/// What is right, but does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Where.
    pub at: Place,
    /// The key.
    pub key: String,
    /// What.
    pub remark: Remark,
}

/// Why something does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remark {
    /// The option means nothing here, and why.
    NoEffect(&'static str),
    /// A rule before it, on this line, matches all that it would.
    Shadowed(usize),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remark {
            Remark::NoEffect(why) => write!(f, "{}: without effect: {why}", self.key),
            Remark::Shadowed(line) => write!(f, "{}: never matches: the rule on line {line} comes first", self.key),
        }
    }
}

/// `defaults`.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Defaults {
    pub(super) observer_type: Option<ObserverType>,
    pub(super) match_type: Option<MatchType>,
    pub(super) glob_disable_ordering: bool,
    pub(super) ttl: Duration,
    pub(super) quantiles: Option<Vec<f64>>,
    pub(super) buckets: Option<Vec<f64>>,
    pub(super) native: NativeStyle,
}

/// One of `mappings`, as written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Written {
    pub(super) at: Place,
    /// `mappings[0]`
    pub(super) path: String,
    pub(super) pattern: (Place, String),
    pub(super) name: String,
    pub(super) labels: Vec<(String, String)>,
    pub(super) honor_labels: bool,
    pub(super) observer_type: Option<ObserverType>,
    pub(super) match_type: MatchType,
    pub(super) help: Option<String>,
    pub(super) action: Action,
    pub(super) metric: Option<Metric>,
    pub(super) ttl: Duration,
    pub(super) quantiles: Option<Vec<f64>>,
    pub(super) buckets: Option<Vec<f64>>,
    pub(super) native: NativeStyle,
    pub(super) scale: f64,
}

/// A whole file.
#[derive(Debug, Default)]
pub(super) struct File {
    pub(super) defaults: Defaults,
    pub(super) rules: Vec<Written>,
    pub(super) notes: Vec<Note>,
}

const ROOT: &[&str] = &["defaults", "mappings"];
const DEFAULTS: &[&str] =
    &["observer_type", "match_type", "glob_disable_ordering", "ttl", "summary_options", "histogram_options"];
const RULE: &[&str] = &[
    "match",
    "name",
    "labels",
    "honor_labels",
    "observer_type",
    "match_type",
    "help",
    "action",
    "match_metric_type",
    "ttl",
    "summary_options",
    "histogram_options",
    "scale",
];
const SUMMARY: &[&str] = &["quantiles", "max_age", "age_buckets", "buf_cap"];
const HISTOGRAM: &[&str] = &["buckets", "native_histogram_bucket_factor", "native_histogram_max_buckets"];
const QUANTILE: &[&str] = &["quantile", "error"];

/// Old keys of rules and defaults, and their successors.
const RENAMED: [(&str, &str); 3] = [
    ("timer_type", "observer_type"),
    ("buckets", "buckets under histogram_options"),
    ("quantiles", "quantiles under summary_options"),
];

/// Reads a file.
///
/// # Errors
/// All that is wrong with it, in its order.
pub(super) fn read(text: &str) -> Result<File, Vec<Problem>> {
    let root = match yaml::read(text) {
        Ok(root) => root,
        Err((at, message)) => return Err(vec![Problem { at, key: String::new(), fault: Fault::Syntax(message) }]),
    };
    let mut reader = Reader::default();
    let file = reader.file(&root);
    if reader.problems.is_empty() {
        Ok(File { notes: reader.notes, ..file })
    } else {
        reader.problems.sort_by_key(|problem| problem.at);
        Err(reader.problems)
    }
}

/// The fields of a map, and its path.
struct Fields<'n> {
    path: String,
    pairs: &'n [(Key, Node)],
}

impl<'n> Fields<'n> {
    fn key(&self, name: &str) -> String {
        below(&self.path, name)
    }

    /// A field that is there and not null.
    fn get(&self, name: &str) -> Option<&'n Node> {
        let (_, node) = self.pairs.iter().find(|(key, _)| key.name == name)?;
        (node.value != Value::Null).then_some(node)
    }
}

fn below(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Turns nodes into values and keeps what is wrong with them.
#[derive(Default)]
struct Reader {
    problems: Vec<Problem>,
    notes: Vec<Note>,
}

impl Reader {
    fn file(&mut self, root: &Node) -> File {
        let fields = self.fields(root, "", ROOT);
        let defaults = fields.get("defaults").map(|node| self.defaults(node)).unwrap_or_default();
        let rules = fields.get("mappings").map(|node| self.rules(node, &defaults)).unwrap_or_default();
        File { defaults, rules, notes: Vec::new() }
    }

    fn defaults(&mut self, node: &Node) -> Defaults {
        let fields = self.fields(node, "defaults", DEFAULTS);
        Defaults {
            observer_type: self.word(&fields, "observer_type", ObserverType::read, OBSERVERS),
            match_type: self.word(&fields, "match_type", MatchType::read, MATCH_TYPES),
            glob_disable_ordering: self.flag(&fields, "glob_disable_ordering"),
            ttl: self.duration(&fields, "ttl"),
            quantiles: self.summary(&fields),
            buckets: self.buckets(&fields),
            native: self.native(&fields),
        }
    }

    fn rules(&mut self, node: &Node, defaults: &Defaults) -> Vec<Written> {
        let Some(items) = self.list(node, "mappings") else { return Vec::new() };
        let rules =
            items.iter().enumerate().map(|(number, item)| self.rule(item, format!("mappings[{number}]"), defaults));
        rules.collect()
    }

    fn rule(&mut self, node: &Node, path: String, defaults: &Defaults) -> Written {
        let fields = self.fields(node, &path, RULE);
        let observer_type = self.word(&fields, "observer_type", ObserverType::read, OBSERVERS);
        let rule = Written {
            at: node.at,
            pattern: self.pattern(&fields, node.at),
            name: self.name(&fields, node.at),
            labels: self.labels(&fields),
            honor_labels: self.flag(&fields, "honor_labels"),
            observer_type,
            match_type: self
                .word(&fields, "match_type", MatchType::read, MATCH_TYPES)
                .or(defaults.match_type)
                .unwrap_or(MatchType::Glob),
            help: fields
                .get("help")
                .and_then(|node| self.scalar(node, &fields.key("help"), "a text"))
                .map(str::to_owned),
            action: self.word(&fields, "action", Action::read, "map or drop").unwrap_or(Action::Map),
            metric: self.metric(&fields),
            ttl: Some(self.duration(&fields, "ttl")).filter(|ttl| !ttl.is_zero()).unwrap_or(defaults.ttl),
            quantiles: self.summary(&fields),
            buckets: self.buckets(&fields),
            native: self.native(&fields),
            scale: self.scale(&fields),
            path,
        };
        self.observer_options(&fields, observer_type.or(defaults.observer_type));
        let is_there = fields.get("match").is_some_and(|node| matches!(node.value, Value::Scalar(_)));
        if rule.match_type == MatchType::Glob && is_there && !is_glob(&rule.pattern.1) {
            self.value(rule.pattern.0, fields.key("match"), &rule.pattern.1, GLOB);
        }
        rule
    }

    /// Options of one observer type exclude the other, whichever of rule and defaults names it.
    fn observer_options(&mut self, fields: &Fields<'_>, observer_type: Option<ObserverType>) {
        let other = match observer_type {
            Some(ObserverType::Histogram) => "summary_options",
            Some(ObserverType::Summary) => "histogram_options",
            None => return,
        };
        if let (Some(node), Some(observer)) = (fields.get(other), observer_type) {
            self.problem(node.at, fields.key(other), Fault::OtherObserver(observer));
        }
    }

    fn pattern(&mut self, fields: &Fields<'_>, at: Place) -> (Place, String) {
        let key = fields.key("match");
        let node = fields.get("match");
        let text = node.and_then(|node| self.scalar(node, &key, "a pattern")).unwrap_or_default();
        if node.is_none() {
            self.problem(at, key, Fault::Missing);
        }
        (node.map_or(at, |node| node.at), text.to_owned())
    }

    /// A name is made of letters, digits, `_` and references by number, and does not begin with a digit.
    fn name(&mut self, fields: &Fields<'_>, at: Place) -> String {
        let key = fields.key("name");
        let node = fields.get("name");
        let text = node.and_then(|node| self.scalar(node, &key, NAME)).unwrap_or_default();
        match node {
            Some(node) if !text.is_empty() && !is_name(text) => self.value(node.at, key, text, NAME),
            Some(node) if text.is_empty() && matches!(node.value, Value::Scalar(_)) => {
                self.problem(node.at, key, Fault::Missing);
            }
            None => self.problem(at, key, Fault::Missing),
            Some(_) => {}
        }
        text.to_owned()
    }

    fn labels(&mut self, fields: &Fields<'_>) -> Vec<(String, String)> {
        let Some(node) = fields.get("labels") else { return Vec::new() };
        let path = fields.key("labels");
        let Value::Map(pairs) = &node.value else {
            self.kind(node, path, "labels with their values, each on a line");
            return Vec::new();
        };
        let mut labels = Vec::with_capacity(pairs.len());
        for (key, node) in pairs {
            if !is_label(&key.name) {
                self.value(key.at, below(&path, &key.name), &key.name, LABEL);
            }
            let value = match &node.value {
                Value::Null => Some(""),
                Value::Scalar(_) | Value::List(_) | Value::Map(_) => {
                    self.scalar(node, &below(&path, &key.name), "a text such as \"$1\"")
                }
            };
            labels.extend(value.map(|value| (key.name.clone(), value.to_owned())));
        }
        labels
    }

    fn metric(&mut self, fields: &Fields<'_>) -> Option<Metric> {
        let node = fields.get("match_metric_type")?;
        let key = fields.key("match_metric_type");
        let text = self.scalar(node, &key, METRICS)?;
        let metric = Metric::ALL.into_iter().find(|metric| metric.name() == text);
        match text {
            _ if metric.is_some() => {}
            "timer" => self.value(node.at, key, text, "observer, as statsd_exporter calls it now"),
            _ => self.value(node.at, key, text, METRICS),
        }
        metric
    }

    /// A number by which values are multiplied.
    fn scale(&mut self, fields: &Fields<'_>) -> f64 {
        fields.get("scale").and_then(|node| self.number(node, &fields.key("scale"))).unwrap_or(1.0)
    }

    /// The quantiles of `summary_options`, in order, each once.
    fn summary(&mut self, fields: &Fields<'_>) -> Option<Vec<f64>> {
        const AGE: &str = "summaries are of the last closed and the current window; see flush.window";
        let node = fields.get("summary_options")?;
        let options = self.fields(node, &fields.key("summary_options"), SUMMARY);
        self.duration(&options, "max_age");
        for count in ["age_buckets", "buf_cap"] {
            self.whole_number(&options, count);
        }
        for key in ["max_age", "age_buckets", "buf_cap"] {
            self.without_effect(&options, key, AGE);
        }
        let quantiles = options.get("quantiles")?;
        let path = options.key("quantiles");
        let items = self.list(quantiles, &path)?;
        let mut found: Vec<f64> = Vec::with_capacity(items.len());
        for (number, item) in items.iter().enumerate() {
            found.extend(self.quantile(item, &format!("{path}[{number}]")));
        }
        found.sort_unstable_by(f64::total_cmp);
        found.dedup();
        Some(found).filter(|found| !found.is_empty())
    }

    fn quantile(&mut self, node: &Node, path: &str) -> Option<f64> {
        let fields = self.fields(node, path, QUANTILE);
        if let Some(error) = fields.get("error") {
            self.number(error, &fields.key("error"));
        }
        let key = fields.key("quantile");
        let Some(node) = fields.get("quantile") else {
            // A number that is not there is 0 to statsd_exporter, which nobody means.
            if matches!(node.value, Value::Map(_)) {
                self.problem(node.at, key, Fault::Missing);
            }
            return None;
        };
        let quantile = self.number(node, &key)?;
        if !(0.0..=1.0).contains(&quantile) {
            self.value(node.at, key, &quantile.to_string(), "a number from 0 to 1");
        }
        Some(quantile)
    }

    /// The bounds of `histogram_options`; an infinite one at the end is always there and left out.
    fn buckets(&mut self, fields: &Fields<'_>) -> Option<Vec<f64>> {
        let node = fields.get("histogram_options")?;
        let options = self.fields(node, &fields.key("histogram_options"), HISTOGRAM);
        let buckets = options.get("buckets")?;
        let path = options.key("buckets");
        let items = self.list(buckets, &path)?;
        let mut bounds: Vec<f64> = Vec::with_capacity(items.len());
        for (number, item) in items.iter().enumerate() {
            let key = format!("{path}[{number}]");
            if number + 1 == items.len() && matches!(&item.value, Value::Scalar(text) if is_infinity(text)) {
                break;
            }
            let Some(bound) = self.number(item, &key) else { continue };
            if bounds.last().is_some_and(|last| *last >= bound) {
                self.value(item.at, key, &bound.to_string(), "bounds in rising order");
            }
            bounds.push(bound);
        }
        Some(bounds).filter(|bounds| !bounds.is_empty())
    }

    /// What `histogram_options` says of native histograms. A number that is not above 0 says nothing, as one that is not
    /// there; a factor up to 1 says that there are none.
    fn native(&mut self, fields: &Fields<'_>) -> NativeStyle {
        const FACTOR: &str = "native_histogram_bucket_factor";
        let Some(Node { value: Value::Map(pairs), .. }) = fields.get("histogram_options") else {
            return NativeStyle::default();
        };
        let options = Fields { path: fields.key("histogram_options"), pairs };
        let factor = options.get(FACTOR).and_then(|node| self.number(node, &options.key(FACTOR)));
        NativeStyle {
            bucket_factor: factor.filter(|factor| *factor > 0.0),
            max_buckets: self.whole_number(&options, "native_histogram_max_buckets").filter(|most| *most > 0),
        }
    }

    fn without_effect(&mut self, fields: &Fields<'_>, name: &str, why: &'static str) {
        if let Some((key, _)) = fields.pairs.iter().find(|(key, _)| key.name == name) {
            self.notes.push(Note { at: key.at, key: fields.key(name), remark: Remark::NoEffect(why) });
        }
    }
}

const OBSERVERS: &str = "summary or histogram";
const MATCH_TYPES: &str = "glob or regex";
const METRICS: &str = "counter, gauge or observer";
const NAME: &str = "letters, digits, _ and references such as ${1}, no digit first";
const LABEL: &str = "a label of letters, digits and _, no digit first";
const GLOB: &str = "components of letters, digits, _ and -, or *, with dots between, no digit first; \
                    or set match_type: regex";

/// The kinds of values.
impl Reader {
    fn problem(&mut self, at: Place, key: String, fault: Fault) {
        self.problems.push(Problem { at, key, fault });
    }

    fn value(&mut self, at: Place, key: String, found: &str, want: &'static str) {
        self.problem(at, key, Fault::Value { found: quoted(found), want });
    }

    /// A node of the wrong kind.
    fn kind(&mut self, node: &Node, key: String, want: &'static str) {
        let found = match &node.value {
            Value::Null => "nothing".to_owned(),
            Value::Scalar(text) => quoted(text),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        };
        self.problem(node.at, key, Fault::Value { found, want });
    }

    /// The fields of a map, of which all must be known.
    fn fields<'n>(&mut self, node: &'n Node, path: &str, known: &[&'static str]) -> Fields<'n> {
        let pairs: &[(Key, Node)] = match &node.value {
            Value::Map(pairs) => pairs,
            Value::Null => &[],
            Value::Scalar(_) | Value::List(_) => {
                let path = if path.is_empty() { "the file" } else { path };
                self.kind(node, path.to_owned(), "keys with their values");
                &[]
            }
        };
        for (key, _) in pairs.iter().filter(|(key, _)| !known.contains(&&*key.name)) {
            let renamed = RENAMED.iter().find(|(old, _)| *old == key.name && known.contains(&"observer_type"));
            let fault = match renamed {
                Some((_, now)) => Fault::Renamed(now),
                None => Fault::Unknown(nearest(&key.name, known)),
            };
            self.problem(key.at, below(path, &key.name), fault);
        }
        Fields { path: path.to_owned(), pairs }
    }

    fn list<'n>(&mut self, node: &'n Node, key: &str) -> Option<&'n [Node]> {
        match &node.value {
            Value::List(items) => Some(items),
            Value::Null | Value::Scalar(_) | Value::Map(_) => {
                self.kind(node, key.to_owned(), "a list");
                None
            }
        }
    }

    fn scalar<'n>(&mut self, node: &'n Node, key: &str, want: &'static str) -> Option<&'n str> {
        match &node.value {
            Value::Scalar(text) => Some(text),
            Value::Null | Value::List(_) | Value::Map(_) => {
                self.kind(node, key.to_owned(), want);
                None
            }
        }
    }

    /// One of some words.
    fn word<T>(
        &mut self,
        fields: &Fields<'_>,
        name: &str,
        read: impl Fn(&str) -> Option<T>,
        want: &'static str,
    ) -> Option<T> {
        let node = fields.get(name)?;
        let text = self.scalar(node, &fields.key(name), want)?;
        let word = read(text);
        if word.is_none() {
            self.value(node.at, fields.key(name), text, want);
        }
        word
    }

    /// A truth value as YAML 1.1 spells them; `false` where there is none.
    fn flag(&mut self, fields: &Fields<'_>, name: &str) -> bool {
        let Some(node) = fields.get(name) else { return false };
        let Some(text) = self.scalar(node, &fields.key(name), "true or false") else { return false };
        match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" => true,
            "false" | "no" | "off" | "n" => false,
            _ => {
                self.value(node.at, fields.key(name), text, "true or false");
                false
            }
        }
    }

    fn number(&mut self, node: &Node, key: &str) -> Option<f64> {
        const WANT: &str = "a finite number";
        let text = self.scalar(node, key, WANT)?;
        let number = f64::from_str(&text.replace('_', "")).ok().filter(|number| number.is_finite());
        if number.is_none() {
            self.value(node.at, key.to_owned(), text, WANT);
        }
        number
    }

    fn whole_number(&mut self, fields: &Fields<'_>, name: &str) -> Option<u32> {
        const WANT: &str = "a whole number";
        let node = fields.get(name)?;
        let key = fields.key(name);
        let text = self.scalar(node, &key, WANT)?;
        let number = text.replace('_', "").parse().ok();
        if number.is_none() {
            self.value(node.at, key, text, WANT);
        }
        number
    }

    /// A length of time, zero where there is none.
    fn duration(&mut self, fields: &Fields<'_>, name: &str) -> Duration {
        const WANT: &str = "a duration with its unit, such as 30s or 1h30m; 0 is none";
        let Some(node) = fields.get(name) else { return Duration::ZERO };
        let key = fields.key(name);
        let Some(text) = self.scalar(node, &key, WANT) else { return Duration::ZERO };
        go_duration(text).unwrap_or_else(|| {
            self.value(node.at, key, text, WANT);
            Duration::ZERO
        })
    }
}

fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let likeness = |known: &&&str| strsim::normalized_damerau_levenshtein(name, known);
    let ranked = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(&ranked) > 0.5).then_some(*ranked)
}

fn is_infinity(text: &str) -> bool {
    matches!(text.trim_start_matches('+').to_ascii_lowercase().as_str(), ".inf" | "inf")
}

/// A duration as Go's `time.ParseDuration` reads it, without a sign: `1m20s`, `1.5h`, `0`.
fn go_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 8] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("\u{b5}s", 1e-6),
        ("\u{3bc}s", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let is_digit = |c: char| c.is_ascii_digit() || c == '.';
        let (number, behind) = rest.split_at(rest.find(|c| !is_digit(c)).unwrap_or(rest.len()));
        let (unit, next) = behind.split_at(behind.find(is_digit).unwrap_or(behind.len()));
        let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit)?;
        let part = Duration::try_from_secs_f64(f64::from_str(number).ok()? * seconds).ok()?;
        total = total.checked_add(part)?;
        rest = next;
    }
    (!text.is_empty()).then_some(total)
}

/// `[a-zA-Z_]` first, or a reference by number; then digits too. As statsd_exporter checks names.
fn is_name(text: &str) -> bool {
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let fits = c.is_ascii_alphabetic() || c == '_' || (c.is_ascii_digit() && rest.len() < text.len());
        rest = match rest.strip_prefix('$') {
            Some(reference) => {
                let inside = reference.strip_prefix('{').unwrap_or(reference);
                let behind = inside.trim_start_matches(|c: char| c.is_ascii_digit());
                if behind.len() == inside.len() {
                    return false;
                }
                behind.strip_prefix('}').unwrap_or(behind)
            }
            None if fits => &rest[c.len_utf8()..],
            None => return false,
        };
    }
    !text.is_empty()
}

fn is_label(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && text.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
}

/// Components of letters, digits, `_` and `-`, which no `-` begins, or `*`; the first one does not begin with a digit.
fn is_glob(text: &str) -> bool {
    text.split('.').enumerate().all(|(number, component)| {
        let first = component
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_' || (number > 0 && byte.is_ascii_digit()));
        let all = component.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        component == "*" || (first && all)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each problem as `line:column key ...`.
    fn problems(text: &str) -> Vec<String> {
        let Err(problems) = read(text) else { return Vec::new() };
        problems.iter().map(|problem| format!("{}:{} {problem}", problem.at.line, problem.at.column)).collect()
    }

    #[test]
    fn all_that_is_wrong_is_told_with_its_place() {
        let text = "defaults:\n  ttl: 30\n  quantiles: []\nmappings:\n- match: a..b\n  nmae: x\n  labels: {9x: 1, ok: [1]}\n\
                    - match: a.*\n  name: n\n  scale: .nan\n  action: explode\nmaping: 1\n";
        assert_eq!(
            problems(text),
            [
                "2:8 defaults.ttl = \"30\": write a duration with its unit, such as 30s or 1h30m; 0 is none",
                "3:3 defaults.quantiles: no longer a key of statsd_exporter; write quantiles under summary_options",
                "5:3 mappings[0].name: missing; every rule needs one, those that drop too",
                "5:10 mappings[0].match = \"a..b\": write components of letters, digits, _ and -, or *, with dots \
                 between, no digit first; or set match_type: regex",
                "6:3 mappings[0].nmae: unknown key; did you mean name?",
                "7:12 mappings[0].labels.9x = \"9x\": write a label of letters, digits and _, no digit first",
                "7:23 mappings[0].labels.ok = a list: write a text such as \"$1\"",
                "10:10 mappings[1].scale = \".nan\": write a finite number",
                "11:11 mappings[1].action = \"explode\": write map or drop",
                "12:1 maping: unknown key; did you mean mappings?",
            ]
        );
    }

    #[test]
    fn a_message_is_one_line_that_can_be_read() {
        let long = "x".repeat(10_000);
        for text in [
            "\"a\\nb\\e[2J\": 1\n",
            "\"a\\nb\": 1\n\"a\\nb\": 2\n",
            "mappings:\n- match: a.*\n  name: n\n  labels: {\"q\\nz\": 1}\n",
            &format!("{long}: 1\n"),
            &format!("mappings:\n- {{match: a.*, name: '{long}-'}}\n"),
            &format!("mappings:\n- {{match: '({long}', match_type: regex, name: n}}\n"),
        ] {
            let problems = crate::mapping::Mapping::parse(text).unwrap_err();
            let told = problems[0].to_string();
            assert!(told.len() < 600 && !told.contains(char::is_control), "{told:?}");
        }
    }

    #[test]
    fn what_statsd_exporter_refuses_is_refused() {
        let rule = |rest: &str| format!("mappings:\n- match: a.*\n  name: n\n{rest}");
        for (rest, line, key) in [
            ("  timer_type: histogram\n", 4, "mappings[0].timer_type"),
            ("  buckets: [1]\n", 4, "mappings[0].buckets"),
            ("  match_metric_type: timer\n", 4, "mappings[0].match_metric_type"),
            ("  match_metric_type: ''\n", 4, "mappings[0].match_metric_type"),
            ("  observer_type: histogram\n  summary_options: {quantiles: []}\n", 5, "mappings[0].summary_options"),
            ("  observer_type: summary\n  histogram_options:\n    buckets: [1]\n", 6, "mappings[0].histogram_options"),
            (
                "  summary_options:\n    quantiles: [{quantile: 2}]\n",
                5,
                "mappings[0].summary_options.quantiles[0].quantile",
            ),
            ("  histogram_options: {buckets: [1, 1]}\n", 4, "mappings[0].histogram_options.buckets[1]"),
            ("  ttl: -3s\n", 4, "mappings[0].ttl"),
        ] {
            let found = read(&rule(rest)).unwrap_err();
            assert_eq!((found.len(), found[0].at.line, &*found[0].key), (1, line, key), "{rest} {found:?}");
        }
        let defaults =
            "defaults: {observer_type: histogram}\nmappings:\n- {match: a.b, name: n, summary_options: {}}\n";
        assert_eq!(read(defaults).unwrap_err()[0].fault, Fault::OtherObserver(ObserverType::Histogram));
    }

    #[test]
    fn what_statsd_exporter_takes_is_taken() {
        for text in [
            "",
            "mappings:\ndefaults:\n",
            "mappings: []\n",
            "mappings:\n- match: '*'\n  name: $1\n  labels:\n  help:\n  action: ''\n  ttl: 0\n  scale: 1_000\n",
            "mappings:\n- {match: 'a.1-.*', name: '_${1}x$2', honor_labels: yes, labels: {x: , y: 1.10, z: true}}\n",
            "defaults:\n  match_type: regex\nmappings:\n- {match: '1.*', name: n}\n",
            "mappings:\n- {match: '', match_type: regex, name: n}\n",
            "mappings:\n- {match: a.b, name: n, histogram_options: {buckets: [.005, 1, .inf]}}\n",
        ] {
            assert_eq!(problems(text), [""; 0], "{text}");
        }
    }

    #[test]
    fn durations_are_gos() {
        for (text, ms) in [
            ("1m20s", Some(80_000)),
            ("1.5h", Some(5_400_000)),
            ("0", Some(0)),
            ("250ms", Some(250)),
            ("30", None),
            ("", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            ("9999999999999999999h", None),
        ] {
            assert_eq!(go_duration(text).map(|duration| duration.as_millis()), ms, "{text}");
        }
    }

    #[test]
    fn options_that_do_nothing_are_noted() {
        let text = "mappings:\n- match: a.*\n  name: n\n  summary_options:\n    max_age: 1m\n    quantiles:\n    - {quantile: 0.9, error: 0.1}\n    - {quantile: 0.5}\n";
        let file = read(text).unwrap();
        assert_eq!(file.rules[0].quantiles, Some(vec![0.5, 0.9]));
        assert_eq!((file.notes.len(), &*file.notes[0].key), (1, "mappings[0].summary_options.max_age"));
        assert_eq!(file.notes[0].at, Place { line: 5, column: 5 });
    }
}
