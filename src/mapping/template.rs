//! Texts with references to captures, `$1` or `${1}`: a rule's name and the values of its labels.
//!
//! The two match types of statsd_exporter read them differently, and so it is here:
//! - With a glob (its formatter), a reference is `$` or `${`, letters, digits, `_` and `$` as far as they go, and a `}` if
//!   there is one. What is no number of a capture stands for nothing, as in `$1_total`, which must be `${1}_total`, or in
//!   `$1$2`. `$0` is the whole name.
//! - With a regex (Go's `Regexp.Expand`), a reference is `$name` or `${name}` of letters, digits and `_`; a name may be that
//!   of a group. `$$` is a dollar sign, and a `$` without a name stays.
//!
//! It differs in two places, where statsd_exporter garbles the text: a `%` beside a reference stays a `%`, and `$1` beside
//! `$12` is not taken out of it.

use regex::Regex;

/// A text, cut where captures belong.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Template {
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Capture(usize),
}

impl Template {
    /// Reads a text of a glob rule that has this many captures.
    pub(super) fn of_glob(text: &str, captures: usize) -> Self {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$';
        Self::read(text, |rest| {
            let inside = rest.strip_prefix('{').unwrap_or(rest);
            let name = &inside[..inside.find(|c| !is_name(c)).unwrap_or(inside.len())];
            if name.is_empty() {
                return (Some(Piece::Text("$".to_owned())), rest);
            }
            let behind = &inside[name.len()..];
            let number = name.parse().ok().filter(|number| *number <= captures);
            (number.map(Piece::Capture), behind.strip_prefix('}').unwrap_or(behind))
        })
    }

    /// Reads a text of a rule with this regex.
    pub(super) fn of_regex(text: &str, regex: &Regex) -> Self {
        Self::read(text, |rest| {
            let dollar = Some(Piece::Text("$".to_owned()));
            if let Some(behind) = rest.strip_prefix('$') {
                return (dollar, behind);
            }
            let inside = rest.strip_prefix('{').unwrap_or(rest);
            let name = &inside[..inside.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inside.len())];
            let behind = &inside[name.len()..];
            let behind = if inside.len() < rest.len() { behind.strip_prefix('}') } else { Some(behind) };
            match behind {
                Some(behind) if !name.is_empty() => (group(name, regex).map(Piece::Capture), behind),
                Some(_) | None => (dollar, rest),
            }
        })
    }

    /// Cuts a text at each `$`; `reference` gets what is behind it and says what stands for it and where to go on.
    fn read<'t>(text: &'t str, reference: impl Fn(&'t str) -> (Option<Piece>, &'t str)) -> Self {
        let mut template = Self::default();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once('$') {
            template.push(Piece::Text(before.to_owned()));
            let (piece, next) = reference(behind);
            piece.into_iter().for_each(|piece| template.push(piece));
            rest = next;
        }
        template.push(Piece::Text(rest.to_owned()));
        template
    }

    fn push(&mut self, piece: Piece) {
        match (self.pieces.last_mut(), piece) {
            (_, Piece::Text(more)) if more.is_empty() => {}
            (Some(Piece::Text(text)), Piece::Text(more)) => text.push_str(&more),
            (_, piece) => self.pieces.push(piece),
        }
    }

    /// The text with captures in their places; the first one is the whole match.
    pub(super) fn fill(&self, captures: &[&str]) -> String {
        let piece = |piece: &Piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Capture(number) => captures.get(*number).copied().unwrap_or_default().to_owned(),
        };
        self.pieces.iter().map(piece).collect()
    }
}

/// The group that a name means: a number without a zero before it, or the name of a group.
fn group(name: &str, regex: &Regex) -> Option<usize> {
    let is_number = name.bytes().all(|byte| byte.is_ascii_digit()) && (name == "0" || !name.starts_with('0'));
    if is_number {
        return name.parse().ok().filter(|number| *number < regex.captures_len());
    }
    regex.capture_names().position(|group| group == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cases as statsd_exporter 0.31 answers them for the name `a.b`, but for the last two.
    #[test]
    fn references_in_globs() {
        for (text, want) in [
            ("plain", "plain"),
            ("$1", "b"),
            ("${1}_total", "b_total"),
            ("$1_total", ""),
            ("$1-$1", "b-b"),
            ("$1$2", ""),
            ("${1}${2}", "b"),
            ("x$2y", "x"),
            ("$0", "a.b"),
            ("$$", ""),
            ("a$", "a$"),
            ("$-", "$-"),
            ("${}", "${}"),
            ("${1", "b"),
            ("$01", "b"),
            ("$99999999999999999999", ""),
            ("100% of $1", "100% of b"),
            ("$1 $12", "b "),
        ] {
            assert_eq!(Template::of_glob(text, 1).fill(&["a.b", "b"]), want, "{text}");
        }
    }

    #[test]
    fn references_in_regexes() {
        let regex = Regex::new(r"a\.(?P<name>.*)").unwrap();
        for (text, want) in [
            ("$1", "b"),
            ("${1}_total", "b_total"),
            ("$1_total", ""),
            ("$1$2", "b"),
            ("$name ${name}s", "b bs"),
            ("$0", "a.b"),
            ("$$1", "$1"),
            ("a$", "a$"),
            ("$-", "$-"),
            ("${1", "${1"),
            ("${}", "${}"),
            ("$01", ""),
            ("${other}", ""),
            ("100%_$1", "100%_b"),
        ] {
            assert_eq!(Template::of_regex(text, &regex).fill(&["a.b", "b"]), want, "{text}");
        }
    }
}
