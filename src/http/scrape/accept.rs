//! What a client asks for in its headers, and the format that it gets.
//!
//! A Prometheus server asks for OpenMetrics first and for text last, and would store `_total` names if it got what it wants
//! most: between those two the configuration decides. Protobuf has the names of text, so there the client's weights decide;
//! a server asks for it if it stores native histograms. Other clients that name protobuf before text, out of habit, may
//! keep but the last message of a family, and a long family comes in several: they name no OpenMetrics, and get text.

use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, VARY,
};

use super::{Config, Names};

/// The formats of an exposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' messages, each with its length before it.
    Protobuf,
}

impl Format {
    /// How series are called in it: in protobuf as they would be in text, so that a client that begins to ask for it
    /// finds the same series.
    pub(super) const fn names(self, config: &Config) -> Names {
        match self {
            Self::Text => Names::Plain,
            Self::OpenMetrics => Names::OpenMetrics,
            Self::Protobuf if config.openmetrics => Names::OpenMetrics,
            Self::Protobuf => Names::Plain,
        }
    }

    const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
            }
        }
    }
}

/// What a client asks for in its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The format.
    pub format: Format,
    /// Whether the body is to be compressed.
    pub gzip: bool,
}

impl Wanted {
    /// Protobuf if the client names it with its highest weight and the configuration allows it, of equal weights if it
    /// names it first, and names no text or OpenMetrics too. Else text, unless the configuration prefers OpenMetrics and the client takes it, or the client
    /// takes nothing else. What is none of them is answered with text: a scrape always succeeds.
    pub fn of(headers: &HeaderMap, config: &Config) -> Self {
        let accepted: Vec<Choice> = choices(headers, &ACCEPT).collect();
        let format = if config.native_histograms && prefers_protobuf(&accepted) {
            Format::Protobuf
        } else {
            text_format(&accepted, headers.contains_key(ACCEPT), config)
        };
        let gzip = choices(headers, &ACCEPT_ENCODING).any(|choice| matches!(&*choice.range, "gzip" | "*"));
        Self { format, gzip }
    }

    /// The headers of the answer.
    pub fn headers(self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.format.content_type()));
        headers.insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
        if self.gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        headers
    }
}

/// Whether the choice of the highest weight among those that we can answer is protobuf, of a client that reads a family
/// in several messages.
fn prefers_protobuf(accepted: &[Choice]) -> bool {
    let names = |range: &str| accepted.iter().any(|choice| choice.range == range);
    if !names("application/openmetrics-text") && (names("text/plain") || names("text/*")) {
        return false;
    }
    let (mut best, mut is_protobuf) = (0.0, false);
    for choice in accepted {
        let protobuf = choice.is_protobuf();
        let text = matches!(&*choice.range, "text/plain" | "text/*" | "*/*" | "application/openmetrics-text");
        if (protobuf || text) && choice.weight > best {
            (best, is_protobuf) = (choice.weight, protobuf);
        }
    }
    is_protobuf
}

fn text_format(accepted: &[Choice], has_header: bool, config: &Config) -> Format {
    let mut text = !has_header;
    let mut open = text;
    for choice in accepted {
        text |= matches!(&*choice.range, "text/plain" | "text/*" | "*/*");
        open |= matches!(&*choice.range, "application/openmetrics-text" | "application/*" | "*/*");
    }
    let named = || accepted.iter().any(|choice| choice.range == "application/openmetrics-text");
    if (config.openmetrics && open) || (!text && named()) { Format::OpenMetrics } else { Format::Text }
}

/// A value of a header that is a list of choices.
struct Choice {
    /// In lower case.
    range: String,
    parameters: Vec<(String, String)>,
    /// Above 0, at most 1.
    weight: f64,
}

impl Choice {
    /// None where the weight is 0, or none.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let range = parts.next()?.to_ascii_lowercase();
        let parameter = |part: &str| {
            let (name, value) = part.split_once('=')?;
            Some((name.trim().to_ascii_lowercase(), value.trim().trim_matches('"').to_owned()))
        };
        let parameters: Vec<(String, String)> = parts.filter_map(parameter).collect();
        let weight = parameters.iter().find(|(name, _)| name == "q");
        let weight = weight.map_or(Some(1.0_f64), |(_, value)| value.parse().ok())?;
        (weight > 0.0 && weight <= 1.0).then_some(Self { range, parameters, weight })
    }

    fn is_protobuf(&self) -> bool {
        let has = |name: &str, value: &str| self.parameters.iter().any(|(key, text)| key == name && text == value);
        self.range == "application/vnd.google.protobuf"
            && has("proto", "io.prometheus.client.MetricFamily")
            && has("encoding", "delimited")
    }
}

/// The choices of a header, but for those of weight 0.
fn choices<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = Choice> + use<'a> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).filter_map(Choice::parse)
}
