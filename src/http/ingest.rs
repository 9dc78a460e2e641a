//! `POST /ingest/metrics`: a body into the worker's shard, and the answer that says what became of it.
//!
//! A body is read, inflated and counted under limits before the worker sees it; then it is parsed in one step without an
//! await, so two requests with one `Idempotency-Key` can't both be counted. A sample that was answered 200 is in the
//! shard, and every read seals the shard first; with `?durable=1` it is in the journal as well. The answer to a request
//! with a key goes into the journal together with its samples, whether the client waits for that or not. Limits: `body`, `inflated`, `bodies`, `body_time`, `samples`,
//! `idempotency_keys`.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use metrics::Counter;
use serde_json::json;
use tokio::time::timeout;

use super::forward::{Forwarder, Undelivered};
use super::health;
use super::idempotency::Answers;
use super::problem::Problem;
use super::server::{Asked, Body, Endpoint, JSON, On, Site, TEXT, ok};
use super::{Keeping, Limits};
use crate::clock;
use crate::ingest::{self, Answer, Listener, RecordError, Source, Worker};
use crate::protocol::{self, Body as Form};
use crate::receipt::Receipt;
use crate::sample::Reason;
use crate::telemetry;
use crate::units::Time;

/// What the seed system said, and its users look for, when a record was empty.
const EMPTY_INPUT: &str = "ERROR: empty input";

/// The ingest server's part behind the routes.
pub(super) struct Ingest {
    worker: Rc<RefCell<Worker>>,
    forwarder: Option<Forwarder>,
    /// The keys of requests that are being forwarded.
    under_way: RefCell<HashSet<Box<[u8]>>>,
    answers: RefCell<Answers>,
    held: Rc<Cell<usize>>,
    bytes: Counter,
    keeping: Keeping,
    /// Whether receipts and samples go into one transaction: asked for with the first key.
    keeps_receipts: Cell<bool>,
    limits: Limits,
}

/// How long a request waits for the journal.
const KEPT_WITHIN: Duration = Duration::from_secs(10);

impl Ingest {
    pub(super) fn new(
        worker: Rc<RefCell<Worker>>,
        mut keeping: Keeping,
        forwarder: Option<Forwarder>,
        limits: &Limits,
    ) -> Self {
        ingest::begin(Listener::Http);
        let earlier = std::mem::take(&mut keeping.receipts);
        Self {
            worker,
            forwarder,
            under_way: RefCell::default(),
            answers: RefCell::new(Answers::new(limits.idempotency_keys, earlier)),
            held: Rc::default(),
            bytes: telemetry::RECEIVED_BYTES.counter(&[Listener::Http.name()]),
            keeping,
            keeps_receipts: Cell::new(false),
            limits: limits.clone(),
        }
    }

    async fn samples(&self, request: Request<Incoming>, peer: SocketAddr) -> Result<Response<Body>, Problem> {
        let key = idempotency_key(request.headers())?;
        let durable = self.is_durable(request.uri().query().unwrap_or_default())?;
        let media = Media::of(request.headers())?;
        let coding = Coding::of(request.headers())?;
        let read = read(request.into_body(), &self.limits, Held::new(&self.held, self.limits.bodies.bytes()));
        let late = |_| Problem::new(StatusCode::REQUEST_TIMEOUT, too_late(self.limits.body_time));
        let (body, mut held) = timeout(self.limits.body_time.0, read).await.map_err(late)??;
        let source = Source { listener: Listener::Http, address: Some(peer.into()) };
        self.bytes.increment(body.len() as u64);
        self.received(body.len(), source);
        let body = coding.inflate(body, self.limits.inflated.bytes(), &mut held)?;
        if key.is_some() {
            self.keep_receipts().await?;
        }
        // What the first request with a key was told is told again. From here to its own answer nothing waits that counts.
        let (is_json, text) = match (self.earlier(key.as_ref()), &self.forwarder) {
            (Some(first), _) => first,
            (None, Some(forwarder)) => self.forward(forwarder, key, &body, media, source).await?,
            (None, None) => self.count(key, &body, media, source)?,
        };
        drop((body, held));
        if durable && self.forwarder.is_none() {
            self.kept().await?;
        }
        Ok(ok(if is_json { JSON } else { TEXT }, text))
    }

    /// Counts a body and gives the answer: whether it is JSON, and its text. Nothing in here waits.
    fn count(
        &self,
        key: Option<Arc<[u8]>>,
        body: &[u8],
        media: Media,
        source: Source,
    ) -> Result<(bool, Bytes), Problem> {
        let mut worker = self.worker.borrow_mut();
        worker.stamp();
        let answer = match media {
            Media::Json => worker.body(body, source),
            Media::Lines => worker.body_of_lines(body, source),
        };
        let (is_json, text) = tell(&answer, body, media)?;
        Ok((is_json, self.remember(&mut worker, key, is_json, text)))
    }

    /// Delivers the good records of a body. A request with the key of one that is still under way is told to wait, since
    /// what becomes of that one is not known yet.
    async fn forward(
        &self,
        forwarder: &Forwarder,
        key: Option<Arc<[u8]>>,
        body: &[u8],
        media: Media,
        source: Source,
    ) -> Result<(bool, Bytes), Problem> {
        let _under_way = key.as_deref().map(|key| UnderWay::new(&self.under_way, key)).transpose()?;
        let (answer, sorted) = {
            let mut worker = self.worker.borrow_mut();
            worker.stamp();
            worker.sort(body, media == Media::Lines, source)
        };
        forwarder.deliver(&sorted).await.map_err(undelivered)?;
        let (is_json, text) = tell(&answer, body, media)?;
        Ok((is_json, self.remember(&mut self.worker.borrow_mut(), key.clone(), is_json, text)))
    }

    /// What the first request with a key was told.
    fn earlier(&self, key: Option<&Arc<[u8]>>) -> Option<(bool, Bytes)> {
        let first = self.answers.borrow_mut().get(key?, clock::steady_ms())?;
        Some((first.is_json, first.text))
    }

    /// Keeps an answer under its key, in the journal with the samples.
    fn remember(&self, worker: &mut Worker, key: Option<Arc<[u8]>>, is_json: bool, text: String) -> Bytes {
        let text = Bytes::from(text);
        if let Some(key) = key {
            let at_ms = clock::steady_ms();
            let receipt = Receipt { key, is_json, text: text.clone(), at_ms };
            worker.receipt(receipt.clone());
            self.answers.borrow_mut().put(receipt, at_ms);
        }
        text
    }

    /// Before the first key of this process is used. While the journal can't be written no new key can be kept, so
    /// nothing is counted for it.
    async fn keep_receipts(&self) -> Result<(), Problem> {
        if self.keeps_receipts.get() {
            return Ok(());
        }
        match timeout(KEPT_WITHIN, self.keeping.fold.keep_receipts()).await {
            Ok(true) => self.keeps_receipts.set(true),
            Ok(false) | Err(_) => {
                let detail = "the journal can't be written, which /-/ready explains, so the key could not be kept; \
                              nothing was counted, send it again";
                return Err(Problem::busy(detail).member("reason", "key_not_kept"));
            }
        }
        Ok(())
    }

    /// Waits until what was counted is in the journal.
    async fn kept(&self) -> Result<(), Problem> {
        match timeout(KEPT_WITHIN, self.keeping.fold.kept()).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => {
                let detail = "counted, and not yet in the journal, which /-/ready explains; send it again with the same \
                              Idempotency-Key only";
                Err(Problem::busy(detail).member("reason", "not_durable_yet"))
            }
        }
    }

    /// Whether the query asks for an answer after the commit.
    fn is_durable(&self, query: &str) -> Result<bool, Problem> {
        let mut values = query.split('&').filter_map(|pair| pair.strip_prefix("durable="));
        match values.next() {
            None | Some("0" | "false") => Ok(false),
            Some("1" | "true") if self.keeping.has_journal => Ok(true),
            Some("1" | "true") => {
                let detail = "store.kind = \"memory\" keeps nothing: set another, or leave durable out";
                Err(Problem::bad_request(detail).member("reason", "no_journal"))
            }
            Some(other) => Err(Problem::bad_request(format!("durable={other}: not 1, true, 0 or false"))),
        }
    }

    fn received(&self, bytes: usize, source: Source) {
        let mut worker = self.worker.borrow_mut();
        worker.stamp();
        worker.received(bytes, source);
    }
}

impl Site for Ingest {
    const ON: On = On::Ingest;

    async fn answer(&self, asked: Asked, request: Request<Incoming>) -> Result<Response<Body>, Problem> {
        match asked.endpoint {
            Endpoint::Samples => self.samples(request, asked.peer).await,
            Endpoint::Ping => Ok(health::ping(On::Ingest)),
            Endpoint::Healthy
            | Endpoint::Ready
            | Endpoint::Reload
            | Endpoint::OpenApi
            | Endpoint::List
            | Endpoint::One
            | Endpoint::Rejects
            | Endpoint::Sources
            | Endpoint::Events
            | Endpoint::Checks
            | Endpoint::Conflicts
            | Endpoint::Unmapped
            | Endpoint::Scrape => Err(Problem::new(StatusCode::NOT_FOUND, "this stands on the API's listeners")),
        }
    }
}

fn undelivered(error: Undelivered) -> Problem {
    Problem::busy(match error {
        Undelivered::Full => "as many records wait for Kafka as may; try again",
        Undelivered::Away => "Kafka did not acknowledge all records; try again",
    })
}

/// The key of a request that is being forwarded, until it is dropped.
struct UnderWay<'a> {
    keys: &'a RefCell<HashSet<Box<[u8]>>>,
    key: &'a [u8],
}

impl<'a> UnderWay<'a> {
    fn new(keys: &'a RefCell<HashSet<Box<[u8]>>>, key: &'a [u8]) -> Result<Self, Problem> {
        if keys.borrow_mut().insert(key.into()) {
            return Ok(Self { keys, key });
        }
        Err(Problem::busy("a request with this Idempotency-Key is under way; try again"))
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.keys.borrow_mut().remove(self.key);
    }
}

/// A body that could not be read, so that nothing of it was even looked at.
fn unreadable(reason: &'static str, detail: &'static str) -> Problem {
    Problem::bad_request(detail).member("reason", reason)
}

fn not_inflated(_: io::Error) -> Problem {
    unreadable("bad_encoding", "the body can't be inflated; compress it as Content-Encoding says")
}

fn too_late(limit: Time) -> String {
    format!("the body took longer than limits.body_time, {limit}")
}

/// What the client is told of a body: whether it is JSON, and the text, or the problem when nothing of it was accepted.
fn tell(answer: &Answer, body: &[u8], media: Media) -> Result<(bool, String), Problem> {
    if let Form::TooMany(records) = answer.form {
        let detail = format!("{records} records are more than limits.samples; send them in several requests");
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
    }
    if answer.accepted == 0 && (answer.rejected > 0 || body.trim_ascii().is_empty()) {
        return Err(nothing_accepted(answer, body));
    }
    match answer.form {
        Form::Object if media == Media::Json => Ok((false, format!("Record {} UPDATED", name_of(body)))),
        Form::Object | Form::Array(_) | Form::Lines(_) | Form::Invalid | Form::TooMany(_) => {
            let (accepted, rejected, errors) = (answer.accepted, answer.rejected, errors(answer));
            Ok((true, format!(r#"{{"accepted":{accepted},"rejected":{rejected},"errors":{errors}}}"#)))
        }
    }
}

fn errors(answer: &Answer) -> serde_json::Value {
    let told = |error: &RecordError| json!({ "index": error.index, "reason": error.reason });
    answer.errors.iter().map(told).collect()
}

fn nothing_accepted(answer: &Answer, body: &[u8]) -> Problem {
    let first = match answer.errors.first() {
        Some(first) if !body.trim_ascii().is_empty() => first,
        Some(_) | None => return Problem::bad_request(EMPTY_INPUT).reason(Reason::EmptyName),
    };
    match answer.form {
        Form::Array(_) | Form::Lines(_) => {
            Problem::bad_request(format!("record {}: {}", first.index, explained(first.reason)))
                .reason(first.reason)
                .member("accepted", answer.accepted)
                .member("rejected", answer.rejected)
                .member("errors", errors(answer))
        }
        Form::Object | Form::Invalid | Form::TooMany(_) => {
            let (line, column) = place(body, first.column);
            let detail = if first.reason == Reason::EmptyName {
                EMPTY_INPUT.to_owned()
            } else {
                format!("{} (line {line}, column {column})", explained(first.reason))
            };
            Problem::bad_request(detail).reason(first.reason).member("line", line).member("column", column)
        }
    }
}

/// Line and column, both from 1, of a byte of a body.
fn place(body: &[u8], at: usize) -> (usize, usize) {
    let before = &body[..at.min(body.len())];
    let line = memchr::memchr_iter(b'\n', before).count() + 1;
    let column = before.len() - memchr::memrchr(b'\n', before).map_or(0, |line_feed| line_feed + 1) + 1;
    (line, column)
}

/// What is wrong with a record, for the person who wrote the client.
const fn explained(reason: Reason) -> &'static str {
    match reason {
        Reason::EmptyName => EMPTY_INPUT,
        Reason::BadJson => "not JSON, or no record; a record is an object with name, type and value",
        Reason::InvalidUtf8 => "not UTF-8",
        Reason::NoValue | Reason::EmptyValue => {
            "no value; only a METER may go without, and a SET takes one `value`, not `values`"
        }
        Reason::BadValue => "value is no number, and no list of numbers",
        Reason::NonFinite => "value is not finite, or a sum would not stay so",
        Reason::NegativeTimer => "a TIMER is below zero",
        Reason::MissingType => "no type; it is one of COUNTER, GAUGE, TIMER, HISTOGRAM, DISTRIBUTION, SET, METER",
        Reason::UnknownType => "type is none of COUNTER, GAUGE, TIMER, HISTOGRAM, DISTRIBUTION, SET, METER",
        Reason::BadName => "a control character in level or name",
        Reason::BadSampleRate => "sampleRate is no number in (0, 1]",
        Reason::BadTimestamp => "timestamp is no positive whole number",
        Reason::MalformedTags => "tags are no object of texts",
        Reason::NameTooLong => "name, or name with tags, is longer than limits.name or limits.identity",
        Reason::TooManyTags => "more tags than limits.tags",
        Reason::TagTooLong => "a tag is longer than limits.tag_key or limits.tag_value",
        Reason::TooManyValues => "more values than limits.values",
        Reason::MemberTooLong => "the member of a SET is longer than limits.set_member",
        Reason::LineTooLong => "longer than limits.line",
        Reason::BadEvent | Reason::BadServiceCheck | Reason::HttpRequest | Reason::PartialLine => "not accepted",
        Reason::BadLength | Reason::TlsHello | Reason::PeerDenied => "not accepted",
    }
}

/// The record's `name` as sent: the seed's answer says it without the level.
fn name_of(body: &[u8]) -> String {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    protocol::record(body.trim_ascii()).map(|record| record.name).unwrap_or_default()
}

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longer keys are told 400.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

fn idempotency_key(headers: &HeaderMap) -> Result<Option<Arc<[u8]>>, Problem> {
    let Some(value) = headers.get(&IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    if value.is_empty() || value.len() > IDEMPOTENCY_KEY_BYTES_MAX {
        let detail = format!("Idempotency-Key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes");
        return Err(Problem::bad_request(detail).member("reason", "bad_idempotency_key"));
    }
    Ok(Some(value.as_bytes().into()))
}

/// What the client says its body is. A body of lines is read line by line and answered with counts, be it a single record;
/// of any other the body itself says how it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Media {
    Json,
    Lines,
}

impl Media {
    /// JSON or NDJSON, whatever the parameters. No type at all is taken for JSON, as a body that a script sends without
    /// thinking of it is. What `curl -d` says when it is told nothing (`x-www-form-urlencoded`) is refused: a form that is
    /// meant as one would be counted as broken JSON.
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let Some(value) = headers.get(CONTENT_TYPE) else {
            return Ok(Self::Json);
        };
        let essence =
            value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.strip_prefix("application/") {
            Some("json") => Ok(Self::Json),
            Some("x-ndjson" | "ndjson" | "jsonl" | "x-jsonlines") => Ok(Self::Lines),
            Some(subtype) if subtype.ends_with("+json") => Ok(Self::Json),
            Some(_) | None => {
                let detail =
                    format!("Content-Type {essence:?} is not taken; send application/json or application/x-ndjson");
                Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail))
            }
        }
    }
}

/// Bytes of bodies that are held, of all requests together. Given back when dropped.
#[derive(Debug)]
struct Held {
    all: Rc<Cell<usize>>,
    max: usize,
    mine: usize,
}

impl Held {
    fn new(all: &Rc<Cell<usize>>, max: usize) -> Self {
        Self { all: Rc::clone(all), max, mine: 0 }
    }

    fn more(&mut self, bytes: usize) -> Result<(), Problem> {
        let all = self.all.get().saturating_add(bytes);
        if all > self.max {
            return Err(Problem::busy("bodies of other requests take all of limits.bodies; try again"));
        }
        self.all.set(all);
        self.mine += bytes;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.set(self.all.get().saturating_sub(self.mine));
    }
}

/// Reads a body, no more of it than the limit.
async fn read(mut body: Incoming, limits: &Limits, mut held: Held) -> Result<(Vec<u8>, Held), Problem> {
    let max = limits.body.bytes();
    let too_long = || {
        let detail = format!("the body is longer than limits.body, {max} bytes");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    };
    if body.size_hint().lower() > max as u64 {
        return Err(too_long());
    }
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|_| unreadable("bad_body", "the body ended before it was complete, or its chunks are broken"))?;
        let Some(data) = frame.data_ref() else { continue };
        if read.len() + data.len() > max {
            return Err(too_long());
        }
        held.more(data.len())?;
        read.extend_from_slice(data);
    }
    Ok((read, held))
}

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Identity,
    Gzip,
    Deflate,
    Zstd,
}

/// What is said with a 415 for another coding.
const CODINGS: HeaderValue = HeaderValue::from_static("gzip, deflate, zstd");

/// A frame of zstd may ask for a window of this size, as a power of two; `zstd -19` uses as much.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How much is inflated before the limits are looked at again.
const INFLATE_STEP: u64 = 64 << 10;

impl Coding {
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let mut lines = headers.get_all(CONTENT_ENCODING).iter();
        let coding = lines.next().map_or("", |value| value.to_str().unwrap_or("?")).trim().to_ascii_lowercase();
        match coding.as_str() {
            "" | "identity" if lines.next().is_none() => Ok(Self::Identity),
            "gzip" | "x-gzip" if lines.next().is_none() => Ok(Self::Gzip),
            "deflate" if lines.next().is_none() => Ok(Self::Deflate),
            "zstd" if lines.next().is_none() => Ok(Self::Zstd),
            _ => {
                let detail =
                    format!("Content-Encoding {coding:?} is not taken; send one of gzip, deflate, zstd, or none");
                Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail).header(ACCEPT_ENCODING, CODINGS))
            }
        }
    }

    fn inflate(self, body: Vec<u8>, max: usize, held: &mut Held) -> Result<Vec<u8>, Problem> {
        match self {
            Self::Identity => Ok(body),
            Self::Gzip => inflate(flate2::bufread::MultiGzDecoder::new(body.as_slice()), max, held),
            // The RFC means zlib's format; some clients leave its two bytes of header out.
            Self::Deflate if is_zlib(&body) => inflate(flate2::bufread::ZlibDecoder::new(body.as_slice()), max, held),
            Self::Deflate => inflate(flate2::bufread::DeflateDecoder::new(body.as_slice()), max, held),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(body.as_slice()).map_err(not_inflated)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(not_inflated)?;
                inflate(decoder, max, held)
            }
        }
    }
}

/// Whether two bytes are zlib's header: the method is 8, and together they are a multiple of 31 (RFC 1950, 2.2).
fn is_zlib(body: &[u8]) -> bool {
    matches!(body, [method, flags, ..] if method & 0x0f == 8 && u16::from_be_bytes([*method, *flags]) % 31 == 0)
}

fn inflate(mut decoder: impl Read, max: usize, held: &mut Held) -> Result<Vec<u8>, Problem> {
    let mut inflated = Vec::new();
    loop {
        held.more(INFLATE_STEP as usize)?;
        let step = decoder.by_ref().take(INFLATE_STEP).read_to_end(&mut inflated).map_err(not_inflated)?;
        if inflated.len() > max {
            let detail = format!("the inflated body is longer than limits.inflated, {max} bytes");
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
        }
        if step == 0 {
            return Ok(inflated);
        }
    }
}
