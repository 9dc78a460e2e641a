//! Objects as node prints them (`util.inspect`): what scripts that read the original's console know. Pure.
//!
//! An object whose properties fit into one line of 80 columns stands on one, else each property on a line of its own; a list
//! of more than six numbers is set in columns. Layout by the rules of node 12 and later.

use std::fmt::Write as _;

/// Columns of a line.
const WIDTH: usize = 80;

/// Members of a list that are shown.
const SHOWN_MAX: usize = 100;

/// The indentation of a property.
const INDENT: usize = 2;

/// The value of a property.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(f64),
    /// Numbers, and how many more there are.
    Numbers(Vec<f64>, u64),
}

/// An object that is printed property by property, so that it may be of any size.
#[derive(Debug, Default)]
pub(super) struct Object {
    /// The properties so far, as long as they may fit into one line.
    held: Vec<String>,
    /// Whether they did not.
    is_long: bool,
    /// Whether a property has been printed.
    is_begun: bool,
}

impl Object {
    /// Adds a property, and gives the text that can be printed by now.
    pub(super) fn add(&mut self, key: &str, value: &Value) -> String {
        let property = format!("{}: {}", property_name(key), text(value));
        let mut printed = String::new();
        if !self.is_long {
            self.held.push(property);
            if !fits(&self.held) {
                self.is_long = true;
                printed.push('{');
                let held = std::mem::take(&mut self.held);
                held.iter().for_each(|property| self.print(property, &mut printed));
            }
        } else {
            self.print(&property, &mut printed);
        }
        printed
    }

    /// Gives the rest.
    pub(super) fn end(self) -> String {
        match (self.is_long, self.held.as_slice()) {
            (true, _) => "\n}".to_owned(),
            (false, []) => "{}".to_owned(),
            (false, held) => format!("{{ {} }}", held.join(", ")),
        }
    }

    fn print(&mut self, property: &str, printed: &mut String) {
        let comma = if std::mem::replace(&mut self.is_begun, true) { "," } else { "" };
        // Writing to a text does not fail.
        let _ = write!(printed, "{comma}\n  {property}");
    }
}

/// Whether properties fit into one line, by the measure of node.
fn fits(properties: &[String]) -> bool {
    let count = properties.len();
    let length: usize = properties.iter().map(|property| width(property)).sum();
    let start = count + 1 + 10;
    let has_lines = properties.iter().any(|property| property.contains('\n'));
    !has_lines && 2 * count + start <= WIDTH && length + count + start <= WIDTH
}

/// Length as JavaScript counts it.
fn width(text: &str) -> usize {
    text.chars().map(char::len_utf16).sum()
}

fn text(value: &Value) -> String {
    match value {
        Value::Number(number) => js_number(*number),
        Value::Numbers(numbers, more) => list(numbers, *more),
    }
}

fn list(numbers: &[f64], more: u64) -> String {
    if numbers.is_empty() && more == 0 {
        return "[]".to_owned();
    }
    let shown = numbers.len().min(SHOWN_MAX);
    let more = more + (numbers.len() - shown) as u64;
    let mut members: Vec<String> = numbers[..shown].iter().map(|number| js_number(*number)).collect();
    let rest = (more > 0).then(|| format!("... {more} more item{}", if more > 1 { "s" } else { "" }));
    let count = members.len() + usize::from(rest.is_some());
    if count > 6 {
        members = grouped(members, rest.as_deref());
    }
    let is_grouped = count > 6 && members.len() + usize::from(rest.is_some()) != count;
    members.extend(rest);
    let length: usize = members.iter().map(|member| width(member)).sum();
    let start = members.len() + INDENT + 1 + 10;
    let fits = 2 * members.len() + start <= WIDTH && length + members.len() + start <= WIDTH;
    if !is_grouped && fits {
        return format!("[ {} ]", members.join(", "));
    }
    format!("[\n    {}\n  ]", members.join(",\n    "))
}

/// Numbers in columns, a line each, where that looks well.
fn grouped(members: Vec<String>, rest: Option<&str>) -> Vec<String> {
    const SPACE: usize = 2;
    let lengths: Vec<usize> = members.iter().map(|member| member.len()).collect();
    let total: usize = lengths.iter().map(|length| length + SPACE).sum();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let room = longest + SPACE;
    if room * 3 + INDENT >= WIDTH || (total as f64 / room as f64 <= 5.0 && longest > 6) {
        return members;
    }
    let all = members.len() + usize::from(rest.is_some());
    let bias = (room as f64 - total as f64 / all as f64).sqrt();
    let biased = (room as f64 - 3.0 - bias).max(1.0);
    let biased = if bias.is_nan() { 1.0 } else { biased };
    let square = ((2.5 * biased * members.len() as f64).sqrt() / biased).round() as usize;
    let columns = square.min((WIDTH - INDENT) / room).min(12).min(15);
    if columns <= 1 {
        return members;
    }
    let widths: Vec<usize> = (0..columns)
        .map(|column| lengths.iter().skip(column).step_by(columns).copied().max().unwrap_or(0) + SPACE)
        .collect();
    let line = |members: &[String]| {
        let last = members.len() - 1;
        let each = members.iter().zip(&widths).enumerate().map(|(place, (member, width))| {
            let comma = if place < last { ", " } else { "" };
            let width = if place < last { *width } else { width - SPACE };
            format!("{:>width$}", [member, comma].concat())
        });
        each.collect::<String>()
    };
    members.chunks(columns).map(line).collect()
}

/// The name of a property, in quotes unless it is a word.
fn property_name(key: &str) -> String {
    let is_word = !key.starts_with(|first: char| first.is_ascii_digit())
        && !key.is_empty()
        && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if key == "__proto__" {
        return "['__proto__']".to_owned();
    }
    if is_word {
        return key.to_owned();
    }
    let quote = match (key.contains('\''), key.contains('"'), key.contains('`') || key.contains("${")) {
        (true, false, _) => '"',
        (true, true, false) => '`',
        (_, _, _) => '\'',
    };
    let mut quoted = String::from(quote);
    key.chars().for_each(|letter| escape(letter, quote, &mut quoted));
    quoted.push(quote);
    quoted
}

fn escape(letter: char, quote: char, to: &mut String) {
    match letter {
        '\n' => to.push_str("\\n"),
        '\t' => to.push_str("\\t"),
        '\r' => to.push_str("\\r"),
        '\x08' => to.push_str("\\b"),
        '\x0c' => to.push_str("\\f"),
        '\x0b' => to.push_str("\\v"),
        '\\' => to.push_str("\\\\"),
        letter if letter == quote && quote == '\'' => to.push_str("\\'"),
        letter if letter.is_control() => {
            let _ = write!(to, "\\x{:02X}", u32::from(letter));
        }
        letter => to.push(letter),
    }
}

/// A number as JavaScript writes it.
fn js_number(number: f64) -> String {
    if number == 0.0 {
        return if number.is_sign_negative() { "-0" } else { "0" }.to_owned();
    }
    if !number.is_finite() {
        let sign = if number < 0.0 { "-" } else { "" };
        return if number.is_nan() { "NaN".to_owned() } else { format!("{sign}Infinity") };
    }
    // The shortest digits that read back as the same number, and where the point stands.
    let shortest = format!("{number:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-6..21).contains(&exponent) {
        return format!("{number}");
    }
    format!("{digits}e{}{}", if exponent < 0 { "-" } else { "+" }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(properties: &[(&str, Value)]) -> String {
        let mut object = Object::default();
        let parts: String = properties.iter().map(|(key, value)| object.add(key, value)).collect();
        parts + &object.end()
    }

    fn numbers(numbers: &[f64]) -> Value {
        Value::Numbers(numbers.to_vec(), 0)
    }

    #[test]
    fn numbers_are_written_as_in_javascript() {
        let cases = [
            (0.0, "0"),
            (-0.0, "-0"),
            (30.0, "30"),
            (-4.5, "-4.5"),
            (1e-7, "1e-7"),
            (1.5e-7, "1.5e-7"),
            (0.000_001, "0.000001"),
            (1e21, "1e+21"),
            (123_456_789_012_345_680_000.0, "123456789012345680000"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (number, text) in cases {
            assert_eq!(js_number(number), text);
        }
    }

    #[test]
    fn names_are_quoted_unless_they_are_words() {
        let cases = [
            ("a_1", "a_1"),
            ("1a", "'1a'"),
            ("a.b", "'a.b'"),
            ("a-b", "'a-b'"),
            ("it's", "\"it's\""),
            ("it's \"so\"", "`it's \"so\"`"),
            ("`'\"", "'`\\'\"'"),
            ("a\\b\n\x07", "'a\\\\b\\n\\x07'"),
            ("", "''"),
        ];
        for (name, text) in cases {
            assert_eq!(property_name(name), text);
        }
    }

    /// What node 20 prints for the same.
    #[test]
    fn objects_are_laid_out_as_by_node() {
        assert_eq!(printed(&[]), "{}");
        assert_eq!(printed(&[("g", Value::Number(-4.0)), ("g2", Value::Number(1e-7))]), "{ g: -4, g2: 1e-7 }");
        let counters: Vec<_> = ["statsd.bad_lines_seen", "statsd.packets_received", "statsd.metrics_received"]
            .map(|name| (name, Value::Number(23.0)))
            .to_vec();
        let long =
            "{\n  'statsd.bad_lines_seen': 23,\n  'statsd.packets_received': 23,\n  'statsd.metrics_received': 23\n}";
        assert_eq!(printed(&counters), long);
        let twelve: Vec<f64> = (0..12).map(f64::from).collect();
        let timers =
            [("t1", numbers(&[3.0, 4.5])), ("t2", numbers(&[1.0])), ("i", numbers(&[])), ("long", numbers(&twelve))];
        let text = "{\n  t1: [ 3, 4.5 ],\n  t2: [ 1 ],\n  i: [],\n  long: [\n     0,  1, 2, 3, 4,\n     5,  6, 7, 8, 9,\n    10, 11\n  ]\n}";
        assert_eq!(printed(&timers), text);
    }
}
