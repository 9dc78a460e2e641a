//! Our own metrics as messages, read back from the text that their exporter renders: it knows no other form. Only what it
//! writes is read; help texts have no escapes.

use super::protobuf::{self, Families, Histogram};
use super::write::Kind;

/// Appends the families of a text.
pub(super) fn write(text: &str, out: &mut Vec<u8>) {
    let mut families = Families::default();
    let (mut help, mut kind) = ("", None);
    let mut buckets: Vec<(f64, f64)> = Vec::new();
    let mut sum = 0.0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            families.flush(out);
            help = rest.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((name, text)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            kind = Kind::ALL.into_iter().find(|kind| kind.text() == text);
            kind.into_iter().for_each(|kind| families.begin(name.as_bytes(), help, kind));
        } else if let Some(sample) = Sample::parse(line) {
            let labelled = |out: &mut Vec<u8>| sample.write_labels(out);
            match kind {
                Some(Kind::Counter) => families.add(|out| protobuf::counter(out, labelled, sample.value, None)),
                Some(Kind::Gauge) => families.add(|out| protobuf::gauge(out, labelled, sample.value)),
                // The buckets of a series stand before its sum, and that before its count.
                Some(Kind::Histogram) => match sample.bound() {
                    Some(bound) => buckets.extend(bound.is_finite().then_some((bound, sample.value))),
                    None if sample.name.ends_with("_sum") => sum = sample.value,
                    None => {
                        let shown = Histogram { sum, count: sample.value, native: None, start_ms: None };
                        families.add(|out| protobuf::histogram(out, labelled, &shown, buckets.drain(..)));
                    }
                },
                // We have none.
                Some(Kind::Summary) | None => {}
            }
        }
    }
    families.flush(out);
}

/// A line of text.
struct Sample<'t> {
    name: &'t str,
    labels: Vec<(&'t str, String)>,
    value: f64,
}

impl<'t> Sample<'t> {
    fn parse(line: &'t str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, mut rest) = series.split_once('{').unwrap_or((series, ""));
        let mut labels = Vec::new();
        while let Some((label, behind)) = rest.split_once("=\"") {
            let (value, next) = unescaped(behind)?;
            labels.push((label, value));
            rest = next.strip_prefix(',').unwrap_or(next);
        }
        Some(Self { name, labels, value: value.parse().ok()? })
    }

    /// The upper bound of a bucket.
    fn bound(&self) -> Option<f64> {
        let (_, bound) = self.labels.iter().find(|(label, _)| *label == "le")?;
        bound.parse().ok()
    }

    fn write_labels(&self, out: &mut Vec<u8>) {
        for (name, value) in self.labels.iter().filter(|(name, _)| *name != "le") {
            protobuf::label(out, name.as_bytes(), value.as_bytes());
        }
    }
}

/// A label's value up to its closing quote, and what is behind that.
fn unescaped(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            c => value.push(c),
        }
    }
    None
}
