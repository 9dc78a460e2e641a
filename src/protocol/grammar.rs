//! The plain grammar of a metric line, in nom: what a line means, said once and slowly. Lines that the fast path of
//! [`super::statsd`] does not take are read by it, and it is the oracle that the fast path is compared with.
//!
//! ```text
//! line   = name ":" part *( ( ":" / "|:" ) part )     ; the second form only before tags
//! part   = value [ "|" type *early [ "|#" tags *late ] ]
//! value  = *( any but "|" )                           ; packed values are split at ":", a set's member is not
//! type   = *( any but "|" and ":" )                   ; or, when it begins with "#", to the next "|"
//! early  = "|" ( "@" *( any but "|" and ":" ) / *( any but "|" ) )   ; not "|#", and not "|:" before a value
//! late   = "|" *( any but "|" )
//! ```
//! A `:` in the type or rate field begins the next sample of the same name, as Etsy's server has it. One bad sample does
//! not spoil the others; one bad value in a packed list spoils that list.

use nom::branch::alt;
use nom::bytes::complete::{tag, take_till, take_till1};
use nom::character::complete::{anychar, char, digit0, digit1, one_of};
use nom::combinator::{all_consuming, not, opt, peek, recognize};
use nom::multi::{many0, separated_list1};
use nom::sequence::{preceded, terminated};
use nom::{IResult, Parser};

use super::{Extras, GaugeSign, dogstatsd, lines, number};
use crate::sample::{Kind, Reason, WireType};

/// A line taken apart.
#[derive(Debug)]
pub(super) struct Line<'a> {
    /// All before the value's colon.
    pub name: &'a [u8],
    /// From behind the first `|#` to the end of the last tag field; empty without tags.
    pub tags: &'a [u8],
    /// What the line's optional fields say about all of its samples.
    pub extras: Extras<'a>,
    /// What became of each sample, in order.
    pub readings: Vec<Result<Reading<'a>, Fault<'a>>>,
}

/// One good sample of a line.
#[derive(Debug, PartialEq)]
pub(super) struct Reading<'a> {
    pub wire: WireType,
    pub values: Values<'a>,
    pub rate: f64,
    /// Seconds, 0 for none.
    pub timestamp: u64,
    /// Behind the type, from the first `|`, up to the next sample.
    pub fields: &'a [u8],
}

/// The value field of a sample.
#[derive(Debug, PartialEq)]
pub(super) enum Values<'a> {
    /// One or more readings; of a gauge, those marked are changes.
    Numbers(Vec<(f64, bool)>),
    /// The member of a set.
    Member(&'a [u8]),
}

/// Why a line or a sample of it is bad, and the bytes that are the reason.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fault<'a> {
    pub reason: Reason,
    /// A part of the line; empty at the place where something is missing.
    pub at: &'a [u8],
}

impl<'a> Fault<'a> {
    fn new(reason: Reason, at: &'a [u8]) -> Self {
        Self { reason, at }
    }
}

/// Reads a trimmed line that is not empty. The name is not looked into: [`super::tags`] does that.
///
/// # Errors
/// When there is no name, no value or no type at all: nothing to read a sample from.
pub(super) fn line(input: &[u8], sign: GaugeSign) -> Result<Line<'_>, Fault<'_>> {
    let Ok((body, name)) = name(input) else { return Err(fault_of_head(input)) };
    if !body.contains(&b'|') {
        return Err(Fault::new(Reason::MissingType, &body[body.len()..]));
    }
    let Ok((_, parts)) = parts(body) else { return Err(Fault::new(Reason::MissingType, body)) };
    let tags = parts
        .last()
        .and_then(Part::all_tags)
        .map_or(&body[..0], |(start, end)| &body[super::offset(body, start)..super::offset(body, end) + end.len()]);
    let mut extras = Extras::default();
    for field in parts.iter().flat_map(Part::fields) {
        dogstatsd::extra(field, &mut extras);
    }
    let readings = parts.iter().map(|part| reading(part, sign)).collect();
    Ok(Line { name, tags, extras, readings })
}

/// Whether the whole field is `[+-]digits[.digits][e[+-]digits]`, digits on one side of the dot at least.
pub(super) fn is_number(field: &[u8]) -> bool {
    fn sign(input: &[u8]) -> IResult<&[u8], Option<char>> {
        opt(one_of("+-")).parse(input)
    }
    let mantissa = alt((recognize((digit1, opt((char('.'), digit0)))), recognize((char('.'), digit1))));
    let exponent = opt((one_of("eE"), sign, digit1));
    all_consuming(recognize((sign, mantissa, exponent))).parse(field).is_ok()
}

type Parsed<'a, T> = IResult<&'a [u8], T>;

/// `value|type|fields` as it stands.
#[derive(Debug)]
struct Part<'a> {
    value: &'a [u8],
    /// `None` when nothing follows the value.
    wire: Option<&'a [u8]>,
    /// The whole of the fields, from the first `|`.
    text: &'a [u8],
    early: Vec<&'a [u8]>,
    /// Behind the first `|#` of the line.
    tags: Option<&'a [u8]>,
    late: Vec<&'a [u8]>,
}

impl<'a> Part<'a> {
    /// The fields but the tags, in order.
    fn fields(&self) -> impl Iterator<Item = &'a [u8]> {
        self.early.iter().chain(&self.late).copied()
    }

    /// The first and the last tag field.
    fn all_tags(&self) -> Option<(&'a [u8], &'a [u8])> {
        let first = self.tags?;
        let last = self.late.iter().copied().rfind(|field| field.starts_with(b"#")).unwrap_or(first);
        Some((first, last))
    }
}

fn name(input: &[u8]) -> Parsed<'_, &[u8]> {
    terminated(take_till1(|byte| byte == b':' || byte == b'|'), char(':')).parse(input)
}

fn parts(input: &[u8]) -> Parsed<'_, Vec<Part<'_>>> {
    let another = terminated(tag(":"), peek(anychar));
    let another_after_empty = terminated(tag("|:"), peek(until_bar1));
    terminated(separated_list1(alt((another, another_after_empty)), part), opt(char(':'))).parse(input)
}

fn part(input: &[u8]) -> Parsed<'_, Part<'_>> {
    let (rest, value) = until_bar(input)?;
    let Ok((rest, wire)) = preceded(char('|'), wire).parse(rest) else {
        return Ok((rest, Part { value, wire: None, text: rest, early: vec![], tags: None, late: vec![] }));
    };
    let (end, (early, tags)) = (many0(early), opt(preceded(tag("|#"), until_bar))).parse(rest)?;
    let (end, late) = match tags {
        Some(_) => many0(preceded(char('|'), until_bar)).parse(end)?,
        None => (end, vec![]),
    };
    let text = &rest[..rest.len() - end.len()];
    Ok((end, Part { value, wire: Some(wire), text, early, tags, late }))
}

fn wire(input: &[u8]) -> Parsed<'_, &[u8]> {
    match input.first() {
        Some(b'#') => until_bar(input),
        _ => until_bar_or_colon(input),
    }
}

fn early(input: &[u8]) -> Parsed<'_, &[u8]> {
    let rate = recognize(preceded(char('@'), until_bar_or_colon));
    let other = preceded(not(alt((recognize(char('#')), recognize((char(':'), until_bar1))))), until_bar);
    preceded(char('|'), alt((rate, other))).parse(input)
}

fn until_bar(input: &[u8]) -> Parsed<'_, &[u8]> {
    take_till(|byte| byte == b'|').parse(input)
}

fn until_bar1(input: &[u8]) -> Parsed<'_, &[u8]> {
    take_till1(|byte| byte == b'|').parse(input)
}

fn until_bar_or_colon(input: &[u8]) -> Parsed<'_, &[u8]> {
    take_till(|byte| byte == b'|' || byte == b':').parse(input)
}

fn fault_of_head(input: &[u8]) -> Fault<'_> {
    match (input.iter().position(|byte| *byte == b'|'), input.iter().position(|byte| *byte == b':')) {
        (_, Some(0)) => Fault::new(Reason::EmptyName, &input[..0]),
        (Some(bar), _) => Fault::new(Reason::NoValue, &input[bar..=bar]),
        (None, _) => Fault::new(Reason::NoValue, &input[input.len()..]),
    }
}

fn wire_type(name: &[u8]) -> Option<WireType> {
    match name {
        b"kv" => Some(WireType::KeyValue),
        b"C" => Some(WireType::AbsoluteCounter),
        _ => str::from_utf8(name).ok().and_then(Kind::from_letter).map(WireType::Plain),
    }
}

fn reading<'a>(part: &Part<'a>, sign: GaugeSign) -> Result<Reading<'a>, Fault<'a>> {
    let name = lines::trim_blanks(part.wire.unwrap_or(part.text));
    if name.is_empty() || name.starts_with(b"#") || name.starts_with(b"@") {
        return Err(Fault::new(Reason::MissingType, name));
    }
    let wire = wire_type(name).ok_or(Fault::new(Reason::UnknownType, name))?;
    let values = values(part.value, wire, sign)?;
    let (rate, timestamp) = rate_and_timestamp(part, wire)?;
    if wire == WireType::Plain(Kind::Timer)
        && let Values::Numbers(numbers) = &values
        && numbers.iter().any(|(value, _)| *value < 0.0)
    {
        return Err(Fault::new(Reason::NegativeTimer, part.value));
    }
    Ok(Reading { wire, values, rate, timestamp, fields: part.text })
}

fn values(field: &[u8], wire: WireType, sign: GaugeSign) -> Result<Values<'_>, Fault<'_>> {
    if wire == WireType::Plain(Kind::Set) {
        return if field.is_empty() { Err(Fault::new(Reason::EmptyValue, field)) } else { Ok(Values::Member(field)) };
    }
    let signs_change = wire == WireType::Plain(Kind::Gauge) && sign == GaugeSign::Relative;
    let texts = field.split(|byte| *byte == b':').filter(|text| !text.is_empty());
    let read = |text| match number::parse(text) {
        Ok(value) => Ok((value, signs_change && matches!(lines::trim_blanks(text).first(), Some(b'+' | b'-')))),
        Err(reason) => Err(Fault::new(reason, text)),
    };
    let numbers = texts.map(read).collect::<Result<Vec<_>, _>>()?;
    if numbers.is_empty() { Err(Fault::new(Reason::EmptyValue, field)) } else { Ok(Values::Numbers(numbers)) }
}

/// The last rate and the last timestamp count; all of them must be good.
fn rate_and_timestamp<'a>(part: &Part<'a>, wire: WireType) -> Result<(f64, u64), Fault<'a>> {
    let (mut rate, mut timestamp) = (1.0, 0);
    for field in part.fields() {
        match field {
            [b'@', text @ ..] => rate = number::parse_rate(text).map_err(|reason| Fault::new(reason, field))?,
            [b'T', text @ ..] if matches!(wire, WireType::Plain(Kind::Counter | Kind::Gauge)) => {
                let seconds = number::parse_whole(text).filter(|seconds| *seconds > 0);
                timestamp = seconds.ok_or(Fault::new(Reason::BadTimestamp, field))?;
            }
            // What looks like a number is a rate whose `@` was forgotten: read as 1, the count would be wrong.
            [b'0'..=b'9' | b'.' | b'+' | b'-', ..] => return Err(Fault::new(Reason::BadSampleRate, field)),
            _ => {}
        }
    }
    Ok((rate, timestamp))
}
