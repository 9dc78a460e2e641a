//! YAML read into a tree in which every key and value has its place, so that all that is wrong with a file can be told
//! at once with line and column. Scalars stay the text that stands in the file, `1.10` and not 1.1: what they mean is
//! decided by who asks for them. Bounded: [`options`].

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::{Location, Options, Spanned};

/// A place in a file; both count from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

impl Place {
    /// Where a file begins.
    pub const START: Self = Self { line: 1, column: 1 };

    fn of(location: &Location) -> Self {
        Self { line: (location.line() as usize).max(1), column: (location.column() as usize).max(1) }
    }
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) at: Place,
    pub(super) value: Value,
}

/// What stands somewhere.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// A text, a number, a truth value.
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Key {
    pub(super) at: Place,
    pub(super) name: String,
}

/// Reads a file of one document. An empty one is [`Value::Null`].
///
/// # Errors
/// The first thing that is no YAML, or more of it than there may be, and its place.
pub(super) fn read(text: &str) -> Result<Node, (Place, String)> {
    let root: Option<Spanned<Raw>> = serde_saphyr::from_str_with_options(text, options())
        .map_err(|error| (error.location().as_ref().map_or(Place::START, Place::of), one_line(&error)))?;
    Ok(root.map_or(Node { at: Place::START, value: Value::Null }, |root| node(root, text)))
}

/// What an error says, without the place, which is told apart from it, and without advice for programmers.
fn one_line(error: &serde_saphyr::Error) -> String {
    let message = error.without_snippet().to_string();
    let first = message.lines().next().unwrap_or_default();
    let ends = [" at line ", ": line ", ", set DuplicateKeyPolicy"].into_iter().filter_map(|end| first.find(end));
    first[..ends.min().unwrap_or(first.len())].to_owned()
}

/// Far more than the largest mapping files hold, and little enough for any machine: 100,000 rules of ten values.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 4_000_000,
            max_nodes: 2_000_000,
            max_depth: 32,
            max_documents: 1,
            max_anchors: 10_000,
            max_aliases: 100_000,
            max_recorded_anchor_events: 100_000,
            max_recorded_anchor_bytes: 8 << 20,
            max_total_scalar_bytes: 64 << 20,
            max_merge_keys: 10_000,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 16,
            max_alias_expansions_per_anchor: 10_000,
        },
        non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    }
}

/// A tree as the reader hands it over, in which plain scalars have lost their spelling.
#[derive(Debug)]
enum Raw {
    Null,
    /// A number or a truth value, by what its spelling looks like.
    Plain,
    Text(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<Raw>, Spanned<Raw>)>),
}

/// Gives plain scalars back the spelling that they have in `text`.
fn node(raw: Spanned<Raw>, text: &str) -> Node {
    let at = Place::of(&raw.referenced);
    let value = match raw.value {
        Raw::Null => Value::Null,
        Raw::Plain => Value::Scalar(spelling(&raw.defined, text)),
        Raw::Text(text) => Value::Scalar(text),
        Raw::List(items) => Value::List(items.into_iter().map(|item| node(item, text)).collect()),
        Raw::Map(pairs) => {
            Value::Map(pairs.into_iter().map(|(name, value)| (key(name, text), node(value, text))).collect())
        }
    };
    Node { at, value }
}

fn key(raw: Spanned<Raw>, text: &str) -> Key {
    let at = Place::of(&raw.referenced);
    let name = match raw.value {
        Raw::Text(name) => name,
        Raw::Null | Raw::Plain | Raw::List(_) | Raw::Map(_) => spelling(&raw.defined, text),
    };
    Key { at, name }
}

fn spelling(location: &Location, text: &str) -> String {
    let span = location.span();
    let range = span.byte_offset().zip(span.byte_len()).map(|(start, len)| start as usize..(start + len) as usize);
    range.and_then(|range| text.get(range)).unwrap_or_default().trim().to_owned()
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Raw, E> {
        Ok(Raw::Plain)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Raw, E> {
        Ok(Raw::Plain)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Raw, E> {
        Ok(Raw::Plain)
    }

    fn visit_i128<E>(self, _: i128) -> Result<Raw, E> {
        Ok(Raw::Plain)
    }

    fn visit_u128<E>(self, _: u128) -> Result<Raw, E> {
        Ok(Raw::Plain)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Raw, E> {
        Ok(Raw::Plain)
    }

    fn visit_str<E>(self, text: &str) -> Result<Raw, E> {
        Ok(Raw::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Raw::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Raw::Map(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree as one line: places behind `@`.
    fn show(node: &Node) -> String {
        let Place { line, column } = node.at;
        let value = match &node.value {
            Value::Null => "-".to_owned(),
            Value::Scalar(text) => format!("{text:?}"),
            Value::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(" ")),
            Value::Map(pairs) => {
                let pair = |(key, value): &(Key, Node)| {
                    format!("{}@{}:{} {}", key.name, key.at.line, key.at.column, show(value))
                };
                format!("{{{}}}", pairs.iter().map(pair).collect::<Vec<_>>().join(" "))
            }
        };
        format!("{value}@{line}:{column}")
    }

    #[track_caller]
    fn reads(text: &str, want: &str) {
        assert_eq!(read(text).map(|node| show(&node)), Ok(want.to_owned()));
    }

    #[test]
    fn scalars_keep_their_spelling_and_all_has_its_place() {
        reads(
            "a: 1.10\nb: [0755, true, 'x y', \"q\\\"\"]\nc:\n d: ~\n",
            "{a@1:1 \"1.10\"@1:4 b@2:1 [\"0755\"@2:5 \"true\"@2:11 \"x y\"@2:17 \"q\\\"\"@2:24]@2:4 c@3:1 {d@4:2 -@4:5}@4:2}@1:1",
        );
        reads("- 1: é\n  2: .5 # a half\n", "[{1@1:3 \"é\"@1:6 2@2:3 \".5\"@2:6}@1:3]@1:1");
    }

    #[test]
    fn a_file_without_anything_is_null() {
        for empty in ["", "\n# nothing\n", "---\n", "~"] {
            assert_eq!(read(empty).map(|node| node.value), Ok(Value::Null), "{empty:?}");
        }
    }

    #[test]
    fn anchors_and_merges_are_followed() {
        reads(
            "x: &a {k: 1.0}\ny: *a\nz: {<<: *a, l: 2}",
            "{x@1:1 {k@1:8 \"1.0\"@1:11}@1:7 y@2:1 {k@2:4 \"1.0\"@2:4}@2:4 \
             z@3:1 {l@3:13 \"2\"@3:16 k@3:9 \"1.0\"@3:9}@3:4}@1:1",
        );
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_place() {
        for (text, line, want) in [
            ("a: [", 1, "unclosed bracket '['"),
            ("a: b\n c: d", 2, "mapping values are not allowed in this context"),
            ("a: *nowhere", 1, "alias references unknown anchor"),
            ("a: 1\na: 2", 2, "duplicate mapping key: a"),
            ("a: 1\n---\nb: 2", 2, "budget breached: Documents { documents: 2 }"),
        ] {
            let (at, message) = read(text).unwrap_err();
            assert_eq!((at.line, &*message), (line, want), "{text:?}");
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for depth in 1..12 {
            text.push_str(&format!("a{depth}: &a{depth} [{}]\n", vec![format!("*a{}", depth - 1); 10].join(", ")));
        }
        assert!(read(&text).is_err());
        assert!(read(&"[".repeat(10_000)).is_err());
        let deep = (0..40).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect::<String>();
        assert!(read(&deep).is_err());
    }
}
