//! Samples back into lines: one canonical spelling for each, which means the same sample.

use serde_json::{Value, json};
use tallyd::protocol::{Config, Limits, Parser, series_key};
use tallyd::sample::{SeriesKey, WireType};

use super::{Call, Name, Reading, Readings, Record};

/// The line of a sample, or the JSON record of one that came so. Optional fields are left out: they are no part of it.
pub fn print(sample: &Reading) -> Vec<u8> {
    match &sample.name {
        Name::Line(name, tags) => line(sample, name, tags),
        Name::Key(key) => object(sample, &SeriesKey::from_canonical(key)),
    }
}

fn letters(wire: WireType) -> &'static str {
    match wire {
        WireType::Plain(kind) => kind.letter(),
        WireType::KeyValue => "kv",
        WireType::AbsoluteCounter => "C",
    }
}

/// A number in the shorter of its two spellings.
fn number(number: f64, sign: bool) -> String {
    let (plain, scientific) = if sign {
        (format!("{number:+}"), format!("{number:+e}"))
    } else {
        (number.to_string(), format!("{number:e}"))
    };
    if plain.len() <= scientific.len() { plain } else { scientific }
}

fn line(sample: &Reading, name: &[u8], tags: &[u8]) -> Vec<u8> {
    let packed = |numbers: &[f64], sign| {
        numbers.iter().map(|value| number(*value, sign)).collect::<Vec<_>>().join(":").into_bytes()
    };
    let value = match &sample.values {
        Readings::Numbers(numbers) => packed(numbers, false),
        Readings::Changes(numbers) => packed(numbers, true),
        Readings::Member(member) => member.clone(),
    };
    let mut line = [name, b":", &value, b"|", letters(sample.wire).as_bytes()].concat();
    if !tags.is_empty() {
        line.extend([b"|#", &tag_fields(tags)[..]].concat());
    }
    // The rate stands behind the tags, so that the line ends in no blank.
    line.extend(format!("|@{}", number(sample.rate, false)).into_bytes());
    if sample.timestamp > 0 {
        line.extend(format!("|T{}", sample.timestamp).into_bytes());
    }
    line
}

/// The tag fields without those between them, which are no part of a sample, or of another one of its line.
fn tag_fields(tags: &[u8]) -> Vec<u8> {
    let fields = tags.split(|byte| *byte == b'|').enumerate();
    let kept: Vec<_> =
        fields.filter(|(at, field)| *at == 0 || field.starts_with(b"#")).map(|(_, field)| field).collect();
    kept.join(&b'|')
}

fn object(sample: &Reading, key: &SeriesKey) -> Vec<u8> {
    let mut object = json!({ "name": key.name(), "type": letters(sample.wire), "rate": sample.rate });
    match &sample.values {
        Readings::Numbers(numbers) => object["values"] = json!(numbers),
        Readings::Changes(numbers) if numbers.len() == 1 => object["delta"] = json!(numbers[0]),
        // The sign of the text makes changes of all values.
        Readings::Changes(numbers) => (object["values"], object["value"]) = (json!(numbers), json!("+1")),
        Readings::Member(member) => object["value"] = json!(String::from_utf8_lossy(member)),
    }
    object["tags"] = tags(key);
    if sample.timestamp > 0 {
        object["timestamp"] = json!(sample.timestamp);
    }
    object.to_string().into_bytes()
}

/// An array, unless a key has a colon: that can only come from an object, which has no bare tags and no key twice.
fn tags(key: &SeriesKey) -> Value {
    if key.tags().any(|(key, _)| key.contains(':')) {
        return key.tags().map(|(key, value)| (key.into_owned(), json!(value))).collect();
    }
    key.tags()
        .map(|(key, value)| match value {
            Some(value) => json!(format!("{key}:{value}")),
            None => json!(key),
        })
        .collect()
}

/// What is printed of a sample is read as that sample, and the key of its series is read as it is printed. What is
/// printed may be longer than what came.
pub fn reads_back(sample: &Reading, config: &Config, limits: &Limits) {
    let printed = print(sample);
    let mut record = Record::default();
    let limits = Limits { line: usize::MAX, json_depth: 16, ..limits.clone() };
    Parser::new(config, &limits).line(&printed, 2, &mut record);
    let [Call::Sample(again), Call::LineEnd] = &record.calls[..] else {
        panic!("{}: {:?}", String::from_utf8_lossy(&printed), record.calls)
    };
    let mut expected = sample.clone();
    expected.fields.clone_from(&again.fields);
    if let Name::Line(_, tags) = &mut expected.name {
        *tags = tag_fields(tags);
    }
    assert_eq!(*again, expected, "{}", String::from_utf8_lossy(&printed));
    let key = series_key(&sample.name.identity(), config, &limits);
    assert_eq!(series_key(&again.name.identity(), config, &limits), key);
    if let Ok((key, _)) = key {
        assert!(!key.name().is_empty());
        assert_eq!(SeriesKey::parse(key.as_str()), key);
    }
}
