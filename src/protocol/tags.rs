//! Names and tags of a line into the key of a series: five dialects, one [`SeriesKey`].
//!
//! This runs when an identity is first seen, never per line. It enforces `limits.name`, `identity`, `tags`, `tag_key`
//! and `tag_value`.

use std::borrow::Cow;

use super::{Config, Dialect, Limits, NamePolicy, dogstatsd, lines};
use crate::sample::{Identity, Reason, SeriesKey, Tags};

/// The key of an identity, and how many tags were dropped because they have no name or, in a dialect that asks for one,
/// no value.
///
/// # Errors
/// When the identity names no series: every sample of it is to be rejected for this reason.
pub fn series_key(identity: &Identity<'_>, config: &Config, limits: &Limits) -> Result<(SeriesKey, u32), Reason> {
    let (name, tags) = match identity {
        // JSON input was decoded, and checked, when it was parsed.
        Identity::Key(key) => return Ok((SeriesKey::from_canonical(key), 0)),
        Identity::Line { name, tags } => (text(name)?, text(tags)?),
    };
    let named = name_and_tags(name, config)?;
    let name = sanitize(&named.name, config.name_policy)?;
    let (tags, bad) = merge(named, tags);
    check(&name, &tags, limits)?;
    let key = SeriesKey::new(&name, &tags);
    if key.as_str().len() > limits.identity {
        return Err(Reason::NameTooLong);
    }
    Ok((key, bad))
}

/// Whether a name without tags needs no second look: only what every policy keeps, no dialect's signs, not too long.
pub(super) fn is_plain(name: &[u8], limits: &Limits) -> bool {
    name.len() <= limits.name.min(limits.identity)
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

/// The limits on a name and its tags, whatever they came in.
pub(super) fn check(name: &str, tags: &Tags, limits: &Limits) -> Result<(), Reason> {
    if name.len() > limits.name {
        return Err(Reason::NameTooLong);
    }
    if tags.len() > limits.tags {
        return Err(Reason::TooManyTags);
    }
    let is_long = |(key, value): (&str, Option<&str>)| {
        key.len() > limits.tag_key || value.is_some_and(|value| value.len() > limits.tag_value)
    };
    if tags.iter().any(is_long) { Err(Reason::TagTooLong) } else { Ok(()) }
}

/// A name as on the line, taken apart by the dialect that it is in.
struct Named<'a> {
    name: Cow<'a, str>,
    pairs: Vec<(&'a str, &'a str)>,
    bad: u32,
}

fn text(bytes: &[u8]) -> Result<&str, Reason> {
    str::from_utf8(bytes).map_err(|_| Reason::InvalidUtf8)
}

fn name_and_tags<'a>(name: &'a str, config: &Config) -> Result<Named<'a>, Reason> {
    let knows = |dialect| config.tag_dialects.contains(&dialect);
    if knows(Dialect::Signalfx) && name.contains(['[', ']']) {
        return signalfx(name);
    }
    let dialects = [(Dialect::Librato, '#', ','), (Dialect::Influx, ',', ','), (Dialect::Graphite, ';', ';')];
    for (dialect, start, between) in dialects {
        if knows(dialect)
            && let Some((name, tags)) = name.split_once(start)
        {
            let (pairs, bad) = pairs(tags, between);
            return Ok(Named { name: name.into(), pairs, bad });
        }
    }
    Ok(Named { name: name.into(), pairs: Vec::new(), bad: 0 })
}

/// `na[tag=value,..]me`
fn signalfx(name: &str) -> Result<Named<'_>, Reason> {
    let (Some(open), Some(close)) = (name.find('['), name.find(']')) else { return Err(Reason::MalformedTags) };
    let tags = name.get(open + 1..close).ok_or(Reason::MalformedTags)?;
    let (pairs, bad) = pairs(tags, ',');
    Ok(Named { name: format!("{}{}", &name[..open], &name[close + 1..]).into(), pairs, bad })
}

/// The good `key=value` items, of equal keys the last one, and how many bad ones there are.
fn pairs(tags: &str, between: char) -> (Vec<(&str, &str)>, u32) {
    let mut bad = 0;
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for item in tags.split(between).filter(|item| !item.is_empty()) {
        match item.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() => pairs.push((key, value)),
            Some(_) | None => bad += 1,
        }
    }
    // Equal keys stay in their order, so the last of them is the one to keep.
    pairs.sort_by_key(|(key, _)| *key);
    let kept = pairs.iter().enumerate().filter(|(at, (key, _))| pairs.get(at + 1).is_none_or(|next| next.0 != *key));
    (kept.map(|(_, pair)| *pair).collect(), bad)
}

/// Tags of the name and of the tag fields together. Where both have a key, those of the fields count.
fn merge(named: Named<'_>, fields: &str) -> (Tags, u32) {
    let mut bad = named.bad;
    let mut tags: Vec<(&str, Option<&str>)> = Vec::new();
    for tag in tag_fields(fields).flat_map(dogstatsd::tags) {
        match tag.split_once(':') {
            Some(("", _)) => bad += 1,
            Some((key, value)) => tags.push((key, Some(value))),
            None => tags.push((tag, None)),
        }
    }
    tags.sort_unstable();
    let is_said = |key: &str| {
        // A bare tag of that name sorts before those with a value and is no reason.
        let after_bare = tags.partition_point(|tag| *tag <= (key, None));
        tags.get(after_bare).is_some_and(|tag| tag.0 == key)
    };
    let of_name: Vec<_> = named.pairs.into_iter().filter(|(key, _)| !is_said(key)).collect();
    tags.extend(of_name.into_iter().map(|(key, value)| (key, Some(value))));
    let owned = tags.into_iter().map(|(key, value)| (key.to_owned(), value.map(str::to_owned)));
    (Tags::new(owned.collect()), bad)
}

/// The tag fields of what [`Identity::Line`] keeps: the first field, and those that begin with `#`.
fn tag_fields(fields: &str) -> impl Iterator<Item = &str> {
    let (first, others) = fields.split_once('|').unwrap_or((fields, ""));
    std::iter::once(first).chain(others.split('|').filter_map(|field| field.strip_prefix('#')))
}

/// The name by the policy: as Etsy's server rewrites it, or as sent.
fn sanitize(name: &str, policy: NamePolicy) -> Result<String, Reason> {
    if policy == NamePolicy::None && name.contains(|c: char| c.is_ascii_control()) {
        return Err(Reason::BadName);
    }
    let name = match policy {
        NamePolicy::None => name.to_owned(),
        NamePolicy::Etsy => etsy(name),
    };
    if name.is_empty() { Err(Reason::EmptyName) } else { Ok(name) }
}

/// A run of white space becomes one `_`, `/` becomes `-`, and what is not in `A-Za-z0-9_.-` is dropped.
fn etsy(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut after_space = false;
    for c in name.chars() {
        let is_space = lines::is_space(c);
        match c {
            _ if is_space && after_space => {}
            _ if is_space => out.push('_'),
            '/' => out.push('-'),
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' | '.' => out.push(c),
            _ => {}
        }
        after_space = is_space;
    }
    out
}
