//! Where a figure stands in Graphite: the names that Etsy's backend gives them (`backends/graphite.js`, 0.9 and 0.10).
//!
//! A name is made safe as Etsy's StatsD does it at its input: blanks become `_`, `/` becomes `-`, and what is not one of
//! `A-Za-z0-9_-.=` is dropped, in tags too. So no name can end its line or begin another. `;`, which only JSON's names can
//! have, becomes `_`, since a tag would begin there. A tag without a value is left out: Carbon refuses a line that has one
//! (`TaggedSeries.parse_carbon`). Names that are the same then share their place.

use std::borrow::Cow;

use super::Config;
use crate::sample::{Kind, SeriesKey};

/// The beginnings and the end of all paths.
#[derive(Debug)]
pub(super) struct Names {
    is_legacy: bool,
    flush_counts: bool,
    counter: String,
    timer: String,
    gauge: String,
    set: String,
    meter: String,
    own: String,
    num_stats: String,
    suffix: String,
}

impl Names {
    pub(super) fn new(config: &Config) -> Self {
        let Config { global_prefix, prefix_stats, global_suffix, .. } = config;
        let is_legacy = config.legacy_namespace;
        // The old namespace knows no prefix but that of the server's own figures.
        let under = |legacy: &str, prefix: &str| {
            if is_legacy { legacy.to_owned() } else { joined(&[global_prefix, prefix]) }
        };
        Self {
            is_legacy,
            flush_counts: config.flush_counts,
            counter: under("stats.", &config.prefix_counter),
            timer: under("stats.timers.", &config.prefix_timer),
            gauge: under("stats.gauges.", &config.prefix_gauge),
            set: under("stats.sets.", &config.prefix_set),
            meter: under("stats.meters.", &config.prefix_meter),
            own: if is_legacy { joined(&["stats", prefix_stats]) } else { joined(&[global_prefix, prefix_stats]) },
            num_stats: if is_legacy { joined(&[prefix_stats]) } else { joined(&[global_prefix, prefix_stats]) },
            suffix: if global_suffix.is_empty() { String::new() } else { format!(".{global_suffix}") },
        }
    }

    /// The path of a figure of a series; `None` for one that is not sent.
    pub(super) fn path<'p>(&self, out: &'p mut String, kind: Kind, name: &Name<'_>, figure: &str) -> Option<&'p str> {
        let (namespace, figure) = match kind {
            Kind::Counter if figure == "count" && !self.flush_counts => return None,
            Kind::Counter if self.is_legacy => (if figure == "count" { "stats_counts." } else { &self.counter }, ""),
            Kind::Counter => (self.counter.as_str(), figure),
            Kind::Gauge => (self.gauge.as_str(), ""),
            Kind::Timer | Kind::Histogram | Kind::Distribution => (self.timer.as_str(), figure),
            Kind::Set => (self.set.as_str(), figure),
            Kind::Meter => (self.meter.as_str(), figure),
        };
        Some(self.join(out, namespace, name, figure))
    }

    /// The path of a figure of the server's own, which is no series.
    pub(super) fn own<'p>(&self, out: &'p mut String, figure: &str) -> &'p str {
        let namespace = if figure == "numStats" { &self.num_stats } else { &self.own };
        self.join(out, namespace, &Name { name: figure.into(), tags: Cow::Borrowed("") }, "")
    }

    fn join<'p>(&self, out: &'p mut String, namespace: &str, name: &Name<'_>, figure: &str) -> &'p str {
        out.clear();
        out.push_str(namespace);
        out.push_str(&name.name);
        if !figure.is_empty() {
            out.push('.');
            out.push_str(figure);
        }
        out.push_str(&self.suffix);
        out.push_str(&name.tags);
        out
    }
}

/// What is not empty, with a point behind each.
fn joined(parts: &[&str]) -> String {
    parts.iter().filter(|part| !part.is_empty()).flat_map(|part| [part, "."]).collect()
}

/// A series' name and tags as Graphite may have them; the tags begin with `;`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Name<'k> {
    name: Cow<'k, str>,
    tags: Cow<'k, str>,
}

impl<'k> Name<'k> {
    /// Of a key; `None` where nothing is left of the name.
    pub(super) fn of(key: &'k SeriesKey) -> Option<Self> {
        let text = key.as_str();
        let name = if text.bytes().all(|byte| is_safe(byte) || byte == b';') && has_values(text) {
            let (name, tags) = text.split_at(text.find(';').unwrap_or(text.len()));
            Self { name: name.into(), tags: tags.into() }
        } else {
            let mut tags = String::new();
            for (tag, value) in key.tags() {
                push_tag(&mut tags, &tag, &value.unwrap_or_default());
            }
            let mut name = String::new();
            push_safe(&mut name, &key.name());
            Self { name: name.into(), tags: tags.into() }
        };
        (!name.name.is_empty()).then_some(name)
    }

    /// Of a name that is safe.
    pub(super) fn plain(name: String) -> Name<'static> {
        Name { name: name.into(), tags: "".into() }
    }
}

/// Whether a byte stands for itself in a path.
pub(super) const fn is_safe(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'=')
}

/// Whether each tag of a key that is safe has a name and a value.
fn has_values(key: &str) -> bool {
    key.split(';').skip(1).all(has_value)
}

fn has_value(tag: &str) -> bool {
    tag.split_once('=').is_some_and(|(name, value)| !name.is_empty() && !value.is_empty())
}

/// Adds a tag, if something is left of its name and of its value.
fn push_tag(out: &mut String, tag: &str, value: &str) {
    let before = out.len();
    out.push(';');
    push_safe(out, tag);
    out.push('=');
    push_safe(out, value);
    if !has_value(&out[before + 1..]) {
        out.truncate(before);
    }
}

fn push_safe(out: &mut String, text: &str) {
    let mut is_blank = false;
    for c in text.chars() {
        let was_blank = std::mem::replace(&mut is_blank, c.is_whitespace());
        match c {
            _ if is_blank && was_blank => {}
            _ if is_blank => out.push('_'),
            '/' => out.push('-'),
            ';' => out.push('_'),
            _ if u8::try_from(c).is_ok_and(is_safe) => out.push(c),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sample::Tags;

    fn paths(config: &Config, key: &str) -> Vec<String> {
        let (names, key, mut out) = (Names::new(config), SeriesKey::parse(key), String::new());
        let name = Name::of(&key).unwrap();
        let figures = [
            (Kind::Counter, "rate"),
            (Kind::Counter, "count"),
            (Kind::Timer, "upper_90"),
            (Kind::Gauge, "value"),
            (Kind::Set, "count"),
            (Kind::Meter, "m1_rate"),
        ];
        let mut all: Vec<_> = figures
            .iter()
            .filter_map(|(kind, figure)| names.path(&mut out, *kind, &name, figure).map(str::to_owned))
            .collect();
        all.push(names.own(&mut out, "numStats").to_owned());
        all.push(names.own(&mut out, "graphiteStats.last_flush").to_owned());
        all
    }

    #[test]
    fn the_old_namespace_is_etsys() {
        let suffix = Config { global_suffix: "s".to_owned(), prefix_counter: "no".to_owned(), ..Config::default() };
        let own = ["statsd.numStats", "stats.statsd.graphiteStats.last_flush"];
        let plain = ["stats.a", "stats_counts.a", "stats.timers.a.upper_90", "stats.gauges.a", "stats.sets.a.count"];
        let plain = [&plain[..], &["stats.meters.a.m1_rate"], &own].concat();
        assert_eq!(paths(&Config::default(), "a"), plain);
        let with_suffix: Vec<_> = plain.iter().map(|path| format!("{path}.s")).collect();
        assert_eq!(paths(&suffix, "a"), with_suffix);
        let tags = paths(&suffix, "a;k=v;flag");
        assert_eq!(tags[..2], ["stats.a.s;k=v", "stats_counts.a.s;k=v"]);
    }

    #[test]
    fn the_new_namespace_has_prefixes() {
        let new = Config { legacy_namespace: false, flush_counts: false, ..Config::default() };
        let want = [
            "stats.counters.a.rate",
            "stats.timers.a.upper_90",
            "stats.gauges.a",
            "stats.sets.a.count",
            "stats.meters.a.m1_rate",
            "stats.statsd.numStats",
            "stats.statsd.graphiteStats.last_flush",
        ];
        assert_eq!(paths(&new, "a"), want);
        let bare = Config { global_prefix: String::new(), prefix_timer: String::new(), ..new };
        assert_eq!(paths(&bare, "a")[..3], ["counters.a.rate", "a.upper_90", "gauges.a"]);
    }

    fn safe(name: &str, tags: &[(&str, Option<&str>)]) -> String {
        let tags = tags.iter().map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned)));
        let key = SeriesKey::new(name, &Tags::new(tags.collect()));
        Name::of(&key).map(|name| format!("{}{}", name.name, name.tags)).unwrap_or_default()
    }

    #[test]
    fn names_are_made_safe() {
        assert_eq!(safe("a \t\nb/c", &[]), "a_b-c");
        assert_eq!(safe("a;b=c", &[]), "a_b=c");
        assert_eq!(safe("größe%", &[("k:k", Some("v/w;x y")), ("flag", None)]), "gre;kk=v-w_x_y");
        assert_eq!(safe("日本", &[]), "");
    }

    #[test]
    fn a_tag_without_a_value_is_left_out() {
        let tags = [("k", Some("")), ("flag", None), ("z", Some("日本")), ("日本", Some("v")), ("a", Some("b=c"))];
        assert_eq!(safe("a.b-c_d", &tags), "a.b-c_d;a=b=c");
        assert_eq!(safe("a.b-c_d", &[("flag", None)]), "a.b-c_d");
    }

    proptest! {
        #[test]
        fn no_name_ends_its_line(name in any::<String>(), tag in any::<String>(), value in any::<Option<String>>()) {
            let text = safe(&name, &[(&tag, value.as_deref())]);
            prop_assert!(text.bytes().all(|byte| is_safe(byte) || byte == b';'), "{text}");
            prop_assert!(has_values(&text) && text.matches(';').count() <= 1, "{text}");
        }
    }
}
