//! What was probably meant by a line that was not accepted: for `tallyd explain` and `GET /data/rejects`.
//!
//! A hint is for a person who sees one line of a client that somebody else wrote: it says what the line looks like and
//! what to write instead. It is made when somebody reads it, never on the way of a line.

use super::{Reject, lines};
use crate::sample::{Kind, Reason};

/// A few words on what to write instead, where the line looks like something known.
pub fn hint(reject: &Reject<'_>) -> Option<String> {
    let line = String::from_utf8_lossy(reject.bytes);
    let from = String::from_utf8_lossy(reject.bytes.get(reject.column..).unwrap_or_default());
    let field = from.trim_start_matches('|').split(['|', ':']).next().unwrap_or_default().trim();
    match reject.reason {
        Reason::NoValue => no_value(&line),
        Reason::EmptyName => empty_name(&line),
        Reason::MissingType => missing_type(&line),
        Reason::UnknownType => unknown_type(field),
        Reason::BadValue => bad_value(field),
        Reason::BadSampleRate if line.starts_with('{') => says("`sampleRate` is a number above 0 and at most 1"),
        Reason::BadSampleRate => Some(bad_sample_rate(field)),
        Reason::BadEvent => bad_event(&line),
        Reason::BadJson => Some(bad_json(&line, &from)),
        Reason::InvalidUtf8 => Some(invalid_utf8(reject.bytes)),
        Reason::BadName => says("a control character in a name; protocol.name_policy = \"etsy\" would drop it"),
        Reason::EmptyValue if line.starts_with('{') => {
            says("a record needs a `value`; only a METER may go without, and a SET takes no `values`")
        }
        Reason::EmptyValue => says("write a number before the type; a set takes any text there"),
        Reason::NonFinite => says("leave out what is not a number; a division by zero in the client?"),
        Reason::NegativeTimer => says("a duration below zero: was a clock set back? `h` and `d` take any number"),
        Reason::BadTimestamp if line.starts_with('{') => {
            says("`timestamp` is a positive whole number, of seconds or milliseconds since 1970")
        }
        Reason::BadTimestamp => says("`T` is followed by whole seconds since 1970, as in `|T1764000000`"),
        Reason::MalformedTags => says("SignalFX tags stand in one pair of brackets: `name[tag=value,tag=value]:1|c`"),
        Reason::BadServiceCheck => says("write `_sc|name|status`, with a status of 0, 1, 2 or 3"),
        Reason::LineTooLong => says("end each sample with a line feed; limits.line bounds a line"),
        Reason::NameTooLong => says("limits.name bounds a name, limits.identity a name with its tags"),
        Reason::TooManyTags => says("limits.tags bounds the tags of a series"),
        Reason::TagTooLong => says("limits.tag_key and limits.tag_value bound a tag"),
        Reason::TooManyValues => says("spread the values over several lines; limits.values bounds those of one"),
        Reason::MemberTooLong => says("send a hash of it; limits.set_member bounds a member"),
        Reason::HttpRequest => says("this port takes lines; HTTP is served at http.ingest and http.api"),
        Reason::PartialLine => says("end each line with a line feed"),
        Reason::BadLength => says(
            "a unix stream has 4 bytes of length, little-endian, before each packet, or is of lines from its first byte on",
        ),
        Reason::TlsHello => says("this address speaks no TLS; in listen.tcp one that does begins with tls://"),
        Reason::PeerDenied => says("listen.unix_uids names the users that may send by unix sockets"),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "an arm of a match that has none in other arms")]
fn says(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn is_number(text: &str) -> bool {
    super::grammar::is_number(text.as_bytes())
}

fn no_value(line: &str) -> Option<String> {
    let mut words = line.split(lines::is_space).filter(|word| !word.is_empty());
    let (name, value, third) = (words.next()?, words.next(), words.next());
    let is_request = |version: &str| version.starts_with("HTTP/");
    if third.is_some_and(is_request) || value.is_some_and(is_request) {
        return says("an HTTP request: this port takes lines; HTTP is served at http.ingest and http.api");
    }
    if name.contains('{') && value.is_some_and(is_number) {
        let (bare, value) = (name.split('{').next()?, value?);
        return Some(format!("Prometheus exposition format? Write `{bare}:{value}|g`, tags as `|#key:value`"));
    }
    if let Some(value) = value.filter(|value| is_number(value))
        && third.is_none_or(is_number)
    {
        return Some(format!("Graphite plaintext? Write `{name}:{value}|g`"));
    }
    let (head, rest) = line.split_once('|').unwrap_or((line, "c"));
    if let Some((name, value)) = head.split_once(['=', ' ']).filter(|(_, value)| is_number(value)) {
        return Some(format!("a colon ends the name: `{name}:{value}|{rest}`"));
    }
    if rest.contains(':') {
        return says("a `|` ends name and value: it cannot stand in a name");
    }
    Some(format!("write the value behind a colon: `{head}:1|{rest}`"))
}

fn empty_name(line: &str) -> Option<String> {
    if line.starts_with('{') {
        return says("a record needs a \"name\" that is a text");
    }
    if line.starts_with(':') {
        return says("write a name before the colon");
    }
    says("of this name nothing is left: protocol.name_policy = \"etsy\" keeps A-Z a-z 0-9 _ . - only")
}

fn missing_type(line: &str) -> Option<String> {
    if line.starts_with('{') {
        return says("a record needs a \"type\" such as \"COUNTER\"");
    }
    if line.contains(": ") && !line.contains('|') {
        return says("an HTTP header or a log line? This port takes lines such as `name:1|c`");
    }
    if line.contains("|@") || line.contains("|#") {
        return says("the type comes before rate and tags: `name:1|c|@0.1|#tag:value`");
    }
    if let Some((name, value)) = line.split_once(':')
        && let Some(at) = value.find(|c: char| c.is_ascii_alphabetic())
        && is_number(&value[..at])
        && Kind::from_letter(&value[at..]).is_some()
    {
        return Some(format!("a `|` stands before the type: `{name}:{}|{}`", &value[..at], &value[at..]));
    }
    Some(format!("add a type, as in `{}|c`; known are c, g, ms, h, d, s, m, kv, C", line.trim_end_matches('|')))
}

fn unknown_type(field: &str) -> Option<String> {
    if let Some((wire, rest)) = field.split_once(['@', '#'])
        && Kind::from_letter(wire).is_some()
    {
        return Some(format!("a `|` stands before each field: `|{wire}|{}{rest}`", &field[wire.len()..=wire.len()]));
    }
    let lower = field.to_ascii_lowercase();
    let kind = Kind::from_letter(&lower).or_else(|| Kind::from_json(&lower)).or(match lower.as_str() {
        "t" | "time" | "timing" | "sec" => Some(Kind::Timer),
        "count" | "counters" | "i" => Some(Kind::Counter),
        "gauges" => Some(Kind::Gauge),
        _ => None,
    });
    match kind {
        Some(kind) => Some(format!("write `{}`: types are letters, and their case counts", kind.letter())),
        None => says("known types are c, g, ms, h, d, s, m, kv, C"),
    }
}

fn bad_value(field: &str) -> Option<String> {
    let dotted = field.replace(',', ".");
    if field.contains(',') && is_number(&dotted) {
        return Some(format!("a decimal comma? Write `{dotted}`; a client must not format numbers by its locale"));
    }
    if field.contains([',', '_', '\'', ' ']) && is_number(&field.replace([',', '_', '\'', ' '], "")) {
        return says("write the digits without separators");
    }
    let digits = field.find(|c: char| c.is_ascii_alphabetic() || c == '%')?;
    if digits > 0 && is_number(&field[..digits]) && !field.starts_with("0x") {
        return Some(format!("write the number alone: `{}`", &field[..digits]));
    }
    says("write a number; only a set (`s`) takes other text")
}

fn bad_sample_rate(field: &str) -> String {
    match field.strip_prefix('@') {
        None if is_number(field) => format!("`@` is missing before the rate: `|@{field}`"),
        Some(rate) if rate.parse::<f64>().is_ok_and(|rate| rate > 1.0) => {
            "the rate is the share that is sent, at most 1: of every tenth sample it is `@0.1`".to_owned()
        }
        Some(_) | None => "a rate lies above 0, is at most 1 and at least limits.sample_rate_min".to_owned(),
    }
}

fn bad_event(line: &str) -> Option<String> {
    let fields = line.split_once("}:").map(|(_, fields)| fields);
    if let Some((title, rest)) = fields.and_then(|fields| fields.split_once('|'))
        && !title.is_empty()
    {
        let text = rest.split('|').next().unwrap_or_default();
        let (title, text) = (title.len(), text.len());
        return Some(format!("the lengths are bytes of title and text: `_e{{{title},{text}}}:`, if neither has a `|`"));
    }
    says("write `_e{5,4}:title|text`: the lengths in bytes of a title, which is not empty, and a text")
}

fn bad_json(line: &str, from: &str) -> String {
    if line.contains('|') && !line.contains('"') {
        return "what begins with `{` is JSON; a name cannot".to_owned();
    }
    match from.trim_start().chars().next() {
        Some('\'') => "JSON has double quotation marks".to_owned(),
        Some('}' | ']') => "is there a comma too much before this, or a value missing?".to_owned(),
        None => "it ends too early; one record stands on one line".to_owned(),
        Some(_) => "no JSON from here on, or deeper than limits.json_depth, or no record: write an object".to_owned(),
    }
}

fn invalid_utf8(line: &[u8]) -> String {
    match line {
        [0x16, 0x03, ..] => "the first bytes of TLS: this port takes lines as they are",
        [0x1f, 0x8b, ..] => "gzip: lines are not compressed",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd: lines are not compressed",
        _ => "not UTF-8; Latin-1 from the client?",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Config, Limits, Parser};

    fn hint_of(line: &str) -> String {
        struct Hints(Vec<String>);
        impl crate::protocol::Sink for Hints {
            fn sample(&mut self, sample: &crate::sample::Sample<'_>) {
                panic!("accepted: {sample:?}");
            }
            fn event(&mut self, _: &crate::protocol::Event<'_>) {}
            fn service_check(&mut self, _: &crate::protocol::ServiceCheck<'_>) {}
            fn reject(&mut self, reject: &Reject<'_>) {
                self.0.push(hint(reject).unwrap_or_default());
            }
            fn bad_tags(&mut self, _: u32) {}
            fn line_end(&mut self) {}
        }
        let mut hints = Hints(Vec::new());
        Parser::new(&Config::default(), &Limits::default()).line(line.as_bytes(), 1, &mut hints);
        hints.0.concat()
    }

    #[test]
    fn common_mistakes_are_recognised() {
        for (line, expected) in [
            ("servers.a.load 1.5 1764000000", "Graphite plaintext? Write `servers.a.load:1.5|g`"),
            ("up{job=\"x\"} 1", "Prometheus exposition format? Write `up:1|g`"),
            ("GET /metrics HTTP/1.1", "an HTTP request"),
            ("a=1|c", "a colon ends the name: `a:1|c`"),
            ("a|c", "`a:1|c`"),
            ("a|b:1|c", "it cannot stand in a name"),
            ("a:1", "`a:1|c`"),
            ("a:320ms", "`a:320|ms`"),
            ("a:1|@0.1|c", "the type comes before"),
            ("a:1|MS", "write `ms`"),
            ("a:1|counter", "write `c`"),
            ("a:1|c@0.1", "`|c|@0.1`"),
            ("a:1,5|g", "Write `1.5`"),
            ("a:1,000,000|g", "without separators"),
            ("a:15ms|g", "`15`"),
            ("a:1|c|0.1", "`|@0.1`"),
            ("a:1|c|@10", "at most 1"),
            ("_e{6,4}:Zürich|text", "`_e{7,4}:`"),
            ("{'name':'a'}", "double quotation marks"),
            ("{\"name\":\"a\",}", "a comma too much"),
            ("{\"name\":\"a\"", "ends too early"),
            ("{\"name\":\"a\",\"type\":\"SET\",\"values\":[\"b\"]}", "a SET takes no `values`"),
            ("{\"name\":\"a\",\"type\":\"METER\",\"rate\":2}", "`sampleRate` is"),
            ("{\"name\":\"a\",\"type\":\"METER\",\"timestamp\":-1}", "whole number, of seconds or milliseconds"),
            ("$$$:x|c", "nothing is left"),
        ] {
            let hint = hint_of(line);
            assert!(hint.contains(expected), "{line}: {hint}");
        }
    }
}
