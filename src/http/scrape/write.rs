//! Writes an exposition series by series: the text format 0.0.4, OpenMetrics 1.0, or messages ([`super::protobuf`]).
//!
//! It keeps a name, a set of labels and the figures of one series; all else goes straight to the buffer it is given, but
//! for the messages of a family, which are gathered up to a chunk.

use std::hint::black_box;
use std::ops::Range;

use percent_encoding::percent_decode;

use super::figures::{Figures, Observations, RATE_WINDOWS, Same};
use super::names::{Class, Entry, Index, Marks};
use super::protobuf::Families;
use super::{CHUNK, Config, Format, Moment, Names};

/// How many series are touched at once: as many states as a thread can peek at without counting references.
const AHEAD: usize = 8;

/// Writes the series of an index, as many at a time as asked for.
#[derive(Debug)]
pub(super) struct Writer {
    index: Index,
    names: Names,
    pub(super) figures: Figures,
    form: Form,
    family: usize,
    /// The next entry.
    at: usize,
    /// Entries before this one were touched.
    warm: usize,
}

/// What it writes.
#[derive(Debug)]
enum Form {
    Text(Text),
    Messages(Families),
}

impl Writer {
    pub(super) fn new(index: Index, format: Format, config: &Config, moment: Moment) -> Self {
        let names = format.names(config);
        let figures = Figures::new(&index.rules, config, moment, names);
        let form = match format {
            Format::Text | Format::OpenMetrics => Form::Text(Text::default()),
            Format::Protobuf => Form::Messages(Families::default()),
        };
        Self { index, names, figures, form, family: 0, at: 0, warm: 0 }
    }

    /// Appends series until the buffer holds `enough` bytes. `false` when there are no more.
    pub(super) fn fill(&mut self, out: &mut Vec<u8>, enough: usize) -> bool {
        while out.len() < enough {
            let Some(family) = self.index.families.get(self.family).cloned() else { return false };
            if self.at >= self.warm {
                self.warm_up();
            }
            if self.at == family.start as usize {
                self.begin_family(out);
            }
            self.at = self.series(self.at, &family, out);
            if self.at == family.end as usize {
                if let Form::Messages(families) = &mut self.form {
                    families.flush(out);
                }
                self.family += 1;
            }
        }
        true
    }

    /// Touches what the next series keep, all at once: series stand anywhere in memory, and their cache misses overlap
    /// here, while one after the other they are most of a scrape's time (`benches/scrape.rs`).
    fn warm_up(&mut self) {
        let end = self.index.entries.len().min(self.at + AHEAD);
        let same = Same { index: &self.index, entries: self.at..end };
        black_box(same.sources().map(|series| series.kind() as usize).sum::<usize>());
        let totals: Vec<_> = same.sources().map(|series| series.total()).collect();
        black_box(totals.iter().map(|total| total.start_ms).fold(0, u64::wrapping_add));
        drop(totals);
        self.warm = end;
    }

    fn begin_family(&mut self, out: &mut Vec<u8>) {
        let entry = &self.index.entries[self.at];
        let name = self.index.name(entry);
        let (kind, help) = match entry.class {
            Class::Counter => (Kind::Counter, "Counter received by tallyd."),
            Class::Gauge => (Kind::Gauge, "Gauge received by tallyd."),
            Class::Summary => (Kind::Summary, "Observations received by tallyd."),
            Class::Histogram => (Kind::Histogram, "Observations received by tallyd."),
            Class::Set => (Kind::Gauge, "Distinct values received by tallyd in a window."),
            Class::MeterTotal => (Kind::Counter, "Marks received by tallyd."),
            Class::MeterRate => (Kind::Gauge, "Marks per second received by tallyd."),
        };
        // Of several rules that give a family its name, that of its first series speaks.
        let own = self.index.rules.rule(entry.source).and_then(|(_, rule)| rule.help.as_deref());
        match &mut self.form {
            Form::Text(text) => {
                let help = own.map_or_else(|| help.as_bytes().to_vec(), |own| help_text(own, self.names));
                text.begin_family(name, &help, kind, out);
            }
            // A counter's family is called there what its sample is called in text.
            Form::Messages(families) => {
                let suffix = if kind == Kind::Counter { total_suffix(self.names) } else { "" };
                families.begin(&[name, suffix.as_bytes()].concat(), own.unwrap_or(help), kind);
            }
        }
    }

    /// Writes the series at an entry, with those that have the same name and labels added to it, and says where the
    /// next one begins.
    fn series(&mut self, at: usize, family: &Range<u32>, out: &mut Vec<u8>) -> usize {
        let rest = &self.index.entries[at..family.end as usize];
        let len = 1 + rest[1..].iter().take_while(|entry| entry.marks.has(Marks::MERGED)).count();
        let (entry, same) = (rest[0], Same { index: &self.index, entries: at..at + len });
        let labels = self.index.labels(&entry);
        match &mut self.form {
            Form::Text(text) => {
                text.begin_series(labels);
                text.series(entry.class, &same, &mut self.figures, total_suffix(self.names), out);
            }
            Form::Messages(families) => {
                let first = Same { index: &self.index, entries: family.start as usize..family.start as usize + 1 };
                families.series(entry.class, labels, &same, &first, &mut self.figures);
                if families.len() >= CHUNK / 2 {
                    families.flush(out);
                }
            }
        }
        at + len
    }
}

/// The types of families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Summary,
    Histogram,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Counter, Self::Gauge, Self::Summary, Self::Histogram];

    /// As in text.
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Summary => "summary",
            Self::Histogram => "histogram",
        }
    }
}

const fn total_suffix(names: Names) -> &'static str {
    match names {
        Names::Plain => "",
        Names::OpenMetrics => "_total",
    }
}

/// Lines: the name of the family and the labels of the series that is written.
#[derive(Debug, Default)]
struct Text {
    name: Vec<u8>,
    labels: Vec<u8>,
}

impl Text {
    fn begin_family(&mut self, name: &[u8], help: &[u8], kind: Kind, out: &mut Vec<u8>) {
        self.name.clear();
        self.name.extend_from_slice(name);
        for part in [b"# HELP ", name, b" ", help, b"\n# TYPE ", name, b" ", kind.text().as_bytes(), b"\n"] {
            out.extend_from_slice(part);
        }
    }

    fn begin_series(&mut self, labels: &[u8]) {
        self.labels.clear();
        write_labels(&mut self.labels, labels);
    }

    fn series(&self, class: Class, same: &Same<'_>, figures: &mut Figures, total: &str, out: &mut Vec<u8>) {
        match class {
            Class::Counter => self.sample(out, total, "", figures.counter(same)),
            Class::Gauge => figures.gauge(same).into_iter().for_each(|value| self.sample(out, "", "", value)),
            Class::Summary => self.quantiles(&figures.summary(same), out),
            Class::Histogram => self.buckets(&figures.histogram(same, None), out),
            Class::Set => self.sample(out, "", "", figures.set(same)),
            Class::MeterTotal => self.sample(out, total, "", figures.meter_total(same)),
            Class::MeterRate => {
                for ((_, label), rate) in RATE_WINDOWS.into_iter().zip(figures.meter_rates(same)) {
                    self.sample(out, "", label, rate);
                }
            }
        }
    }

    fn quantiles(&self, shown: &Observations<'_>, out: &mut Vec<u8>) {
        for (_, label, value) in shown.points() {
            self.sample(out, "", label, value);
        }
        self.sum_and_count(shown, out);
    }

    fn buckets(&self, shown: &Observations<'_>, out: &mut Vec<u8>) {
        for (_, label, count) in shown.points() {
            self.sample(out, "_bucket", label, count);
        }
        self.sample(out, "_bucket", "le=\"+Inf\"", shown.count);
        self.sum_and_count(shown, out);
    }

    fn sum_and_count(&self, shown: &Observations<'_>, out: &mut Vec<u8>) {
        self.sample(out, "_sum", "", shown.sum);
        self.sample(out, "_count", "", shown.count);
    }

    /// One line: the family's name with a suffix, the series' labels with one more, a value.
    fn sample(&self, out: &mut Vec<u8>, suffix: &str, label: &str, value: f64) {
        out.extend_from_slice(&self.name);
        out.extend_from_slice(suffix.as_bytes());
        if !self.labels.is_empty() || !label.is_empty() {
            out.push(b'{');
            out.extend_from_slice(&self.labels);
            if !self.labels.is_empty() && !label.is_empty() {
                out.push(b',');
            }
            out.extend_from_slice(label.as_bytes());
            out.push(b'}');
        }
        out.push(b' ');
        write_number(out, value);
        out.push(b'\n');
    }
}

/// A rule's help text with the escapes of an exposition.
fn help_text(text: &str, names: Names) -> Vec<u8> {
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    match names {
        Names::Plain => text.into_bytes(),
        Names::OpenMetrics => text.replace('"', "\\\"").into_bytes(),
    }
}

/// Writes labels as an exposition has them, `name="value"`, from those of a key.
fn write_labels(to: &mut Vec<u8>, labels: &[u8]) {
    for (name, value) in pairs(labels) {
        if !to.is_empty() {
            to.push(b',');
        }
        to.extend_from_slice(name);
        to.extend_from_slice(b"=\"");
        write_value(to, value);
        to.push(b'"');
    }
}

/// The labels of a key: names, and values percent-encoded.
pub(super) fn pairs(labels: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = labels;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let label = &rest[..memchr::memchr(b';', rest).unwrap_or(rest.len())];
        rest = rest.get(label.len() + 1..).unwrap_or_default();
        let (name, value) = label.split_at(memchr::memchr(b'=', label).unwrap_or(label.len()));
        Some((name, value.get(1..).unwrap_or_default()))
    })
}

/// Writes a percent-encoded value with the escapes of an exposition.
fn write_value(to: &mut Vec<u8>, value: &[u8]) {
    if memchr::memchr3(b'%', b'\\', b'"', value).is_none() {
        return to.extend_from_slice(value);
    }
    for byte in percent_decode(value) {
        match byte {
            b'\\' => to.extend_from_slice(b"\\\\"),
            b'"' => to.extend_from_slice(b"\\\""),
            b'\n' => to.extend_from_slice(b"\\n"),
            byte => to.push(byte),
        }
    }
}

/// Name and labels of an entry, as on a line of the exposition.
pub(super) fn line_name(index: &Index, entry: &Entry) -> String {
    line(index.name(entry), index.labels(entry))
}

/// A name and labels in the form of a key, as on a line of the exposition.
pub(super) fn line(name: &[u8], labels_of_key: &[u8]) -> String {
    let (mut line, mut labels) = (name.to_vec(), Vec::new());
    write_labels(&mut labels, labels_of_key);
    if !labels.is_empty() {
        line.extend([&b"{"[..], &labels, b"}"].concat());
    }
    String::from_utf8_lossy(&line).into_owned()
}

/// A bound as a label's value. OpenMetrics wants it to look like a float.
pub(super) fn bound(number: f64, names: Names) -> String {
    let mut text = Vec::new();
    write_number(&mut text, number);
    let mut text = String::from_utf8(text).unwrap_or_default();
    if names == Names::OpenMetrics && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
        text.push_str(".0");
    }
    text
}

/// The shortest text that reads back as the same number.
fn write_number(out: &mut Vec<u8>, number: f64) {
    const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;
    if number.trunc() == number && number.abs() <= WHOLE_MAX {
        out.extend_from_slice(itoa::Buffer::new().format(number as i64).as_bytes());
    } else if number.is_finite() {
        out.extend_from_slice(zmij::Buffer::new().format_finite(number).as_bytes());
    } else if number.is_nan() {
        out.extend_from_slice(b"NaN");
    } else {
        out.extend_from_slice(if number > 0.0 { b"+Inf" } else { b"-Inf" });
    }
}
