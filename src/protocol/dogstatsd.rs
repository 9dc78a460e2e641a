//! What DogStatsD adds to metric lines: events `_e{..}`, service checks `_sc|`, and the optional fields that name a
//! container. Bad optional fields are ignored: an alert must not be lost for them.

use std::borrow::Cow;

use nom::Parser;
use nom::bytes::complete::{tag, take_while_m_n};
use nom::sequence::{delimited, separated_pair};

use super::{Event, Priority, ServiceCheck, Severity, Status, number};

/// Optional fields of a metric line that hold for all of its samples. They say where a sample came from; they are no
/// part of the series.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extras<'a> {
    /// `|c:`, the container that sent it.
    pub container_id: Option<&'a [u8]>,
    /// `|e:`, what an orchestrator told the client about itself.
    pub external_data: Option<&'a [u8]>,
    /// `|card:`, which tags an agent should add.
    pub cardinality: Option<Cardinality>,
}

/// The values of `|card:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cardinality {
    /// No tags of the orchestrator.
    None,
    /// Those with few values.
    Low,
    /// Those of the orchestrator's units.
    Orchestrator,
    /// All.
    High,
}

impl Cardinality {
    /// As it stands on a line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Low => "low",
            Self::Orchestrator => "orchestrator",
            Self::High => "high",
        }
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let all = [Self::None, Self::Low, Self::Orchestrator, Self::High];
        all.into_iter().find(|one| one.name().as_bytes().eq_ignore_ascii_case(text))
    }
}

impl<'a> Extras<'a> {
    /// Reads them from the fields of a sample, which begin with `|` or are empty.
    pub fn parse(fields: &'a [u8]) -> Self {
        let mut extras = Self::default();
        for field in fields.split(|byte| *byte == b'|') {
            extra(field, &mut extras);
        }
        extras
    }

    /// Writes them as [`Extras::parse`] reads them.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let cardinality = self.cardinality.map(|cardinality| cardinality.name().as_bytes());
        let fields = [(&b"|c:"[..], self.container_id), (b"|e:", self.external_data), (b"|card:", cardinality)];
        for (prefix, text) in fields {
            if let Some(text) = text {
                out.extend_from_slice(prefix);
                out.extend_from_slice(text);
            }
        }
    }
}

/// Notes a field, if it is one of them and says something. The last one counts.
pub(super) fn extra<'a>(field: &'a [u8], extras: &mut Extras<'a>) {
    match field {
        [b'c', b':', id @ ..] if !id.is_empty() => extras.container_id = Some(id),
        [b'e', b':', data @ ..] if !data.is_empty() => extras.external_data = Some(data),
        [b'c', b'a', b'r', b'd', b':', name @ ..] => {
            extras.cardinality = Cardinality::parse(name).or(extras.cardinality)
        }
        _ => {}
    }
}

/// The tags of a tag field: one `#` before a tag is dropped, empty ones are nothing.
pub(super) fn tags(field: &str) -> impl Iterator<Item = &str> {
    field.split(',').map(|tag| tag.strip_prefix('#').unwrap_or(tag)).filter(|tag| !tag.is_empty())
}

/// `_e{5,4}:title|text|fields`. The lengths are bytes.
///
/// # Errors
/// The column where it stops making sense.
pub(super) fn event(line: &str) -> Result<Event<'_>, usize> {
    let bytes = line.as_bytes();
    let (title_length, text_length, title_at) = event_head(bytes).ok_or(0_usize)?;
    let text_at = title_at + title_length + 1;
    let end = text_at + text_length;
    // A length that ends inside a character ends nowhere.
    let title = line.get(title_at..text_at - 1).filter(|title| !title.is_empty()).ok_or(title_at.min(line.len()))?;
    if bytes.get(text_at - 1) != Some(&b'|') {
        return Err(text_at - 1);
    }
    let (Some(text), Some(fields)) = (line.get(text_at..end), line.get(end..)) else { return Err(line.len()) };
    if !fields.is_empty() && !fields.starts_with('|') {
        return Err(end);
    }
    let mut event = Event { title: unescape(title), text: unescape(text), ..Event::default() };
    for field in fields.split('|').skip(1) {
        event_field(field, &mut event);
    }
    Ok(event)
}

/// Both lengths, and where the title begins.
fn event_head(bytes: &[u8]) -> Option<(usize, usize, usize)> {
    let length = || take_while_m_n(1, 9, |byte: u8| byte.is_ascii_digit());
    let mut head = delimited(tag("_e{"), separated_pair(length(), tag(","), length()), tag("}:"));
    let parsed: nom::IResult<&[u8], (&[u8], &[u8])> = head.parse(bytes);
    let (rest, (title, text)) = parsed.ok()?;
    let length = |digits| number::parse_whole(digits).and_then(|length| usize::try_from(length).ok());
    Some((length(title)?, length(text)?, bytes.len() - rest.len()))
}

fn event_field<'a>(field: &'a str, event: &mut Event<'a>) {
    if let Some(tags) = field.strip_prefix('#') {
        event.tags = Some(tags);
        return;
    }
    let Some((key, text)) = field.split_once(':') else { return };
    match key {
        "d" => event.timestamp = number::parse_whole(text.as_bytes()).or(event.timestamp),
        "h" => event.host = Some(text),
        "k" => event.aggregation_key = Some(text),
        "p" => event.priority = Priority::parse(text).unwrap_or(event.priority),
        "s" => event.source_type = Some(text),
        "t" => event.severity = Severity::parse(text).unwrap_or(event.severity),
        "c" => event.container_id = Some(text),
        _ => {}
    }
}

/// `_sc|name|status|fields`.
///
/// # Errors
/// The column of what is missing or wrong.
pub(super) fn service_check(line: &str) -> Result<ServiceCheck<'_>, usize> {
    let mut parts = line.split('|').skip(1);
    let name = parts.next().filter(|name| !name.is_empty()).ok_or("_sc|".len())?;
    let status_at = "_sc|".len() + name.len() + 1;
    let status = parts.next().and_then(Status::parse).ok_or(status_at.min(line.len()))?;
    let mut check = ServiceCheck { name, status, ..ServiceCheck::default() };
    for field in parts {
        if let Some(tags) = field.strip_prefix('#') {
            check.tags = Some(tags);
            continue;
        }
        match field.split_once(':') {
            Some(("d", text)) => check.timestamp = number::parse_whole(text.as_bytes()).or(check.timestamp),
            Some(("h", text)) => check.host = Some(text),
            Some(("m", text)) => check.message = Some(unescape_message(text)),
            Some(("c", text)) => check.container_id = Some(text),
            _ => {}
        }
    }
    Ok(check)
}

/// `\n` written as two characters is a line end: a real one would end the line.
fn unescape(text: &str) -> Cow<'_, str> {
    if text.contains("\\n") { text.replace("\\n", "\n").into() } else { text.into() }
}

fn unescape_message(text: &str) -> Cow<'_, str> {
    let text = unescape(text);
    if text.contains("m\\:") { text.replace("m\\:", "m:").into() } else { text }
}
