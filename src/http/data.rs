//! The read API: metrics as JSON, one or a page of them, and the order to forget one.
//!
//! A key stands in the path, where `%` has a meaning for URLs as well as for keys. A client that prints the key as it was
//! given sends `a;k=x%2Fy`, one that escapes it for the URL sends `a%3Bk%3Dx%252Fy`. Both must find the series, so the path
//! is read as a key first, and if no series has that, as a key that was percent-encoded once more. Limits: `page`, `lists`,
//! `scrapes`.

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Frame, Incoming};
use hyper::header::{CACHE_CONTROL, HeaderMap, HeaderName, HeaderValue, LINK};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;

use super::json::How;
use super::problem::Problem;
use super::scrape::{self, Moment};
use super::server::{Asked, Body, Endpoint, JSON, On, Site, TEXT, ok};
use super::{Api, Limits, health};
use crate::aggregate::ledger::Series;
use crate::clock::{steady_ms, wall_ms};
use crate::sample::{Kind, SeriesKey};
use crate::tls;
use crate::view::{self, Cursor, Filter, Metric, Page, Scope};

/// The quantiles that are shown unless others are asked for.
const QUANTILES: [f64; 3] = [0.5, 0.9, 0.99];
/// How many quantiles one request may ask for, each of which walks the buckets.
const QUANTILES_MAX: usize = 32;
/// The length of a page unless another is asked for.
const PAGE_DEFAULT: usize = 1_000;

/// How many there are of what a page shows a part of.
const TOTAL_COUNT: HeaderName = HeaderName::from_static("total-count");

/// The document of `GET /openapi.json`.
const OPENAPI: &str = include_str!("openapi.json");

/// The API's part behind the routes.
pub(super) struct Data {
    api: Api,
    tls: tls::Acceptor,
    lists: Semaphore,
    scrapes: Arc<Semaphore>,
    page_max: usize,
}

impl Data {
    pub(super) fn new(api: Api, tls: tls::Acceptor, limits: &Limits) -> Self {
        let places = |count: usize| Semaphore::new(count.min(Semaphore::MAX_PERMITS));
        Self { api, tls, lists: places(limits.lists), scrapes: Arc::new(places(limits.scrapes)), page_max: limits.page }
    }

    /// How many a page is to have.
    fn limit(&self, query: &Query) -> Result<usize, Problem> {
        let limit = query.parsed::<usize>("limit", "a whole number")?.unwrap_or(PAGE_DEFAULT.min(self.page_max));
        if limit == 0 || limit > self.page_max {
            let max = self.page_max;
            return Err(Problem::bad_request(format!("limit={limit}: a page has 1 to limits.page, {max}, metrics")));
        }
        Ok(limit)
    }

    async fn list(&self, query: &Query) -> Result<Response<Body>, Problem> {
        let limit = self.limit(query)?;
        let filter = Filter { glob: query.get("match").map(str::to_owned), kind: query.kind()?, tags: query.tags() };
        let after = query.parsed::<Cursor>("cursor", "what the last page's Link said")?;
        let (scope, quantiles) = (query.scope()?, query.quantiles()?);
        let Ok(_permit) = self.lists.try_acquire() else {
            return Err(Problem::busy("as many lists as limits.lists allows are being made; try again"));
        };
        let Page { metrics, next } = self.api.view.page(&filter, after, limit, scope).await;
        let mut response = json(self.how(&quantiles).list(&metrics))?;
        if let Some(next) = next {
            let link = format!("<{}>; rel=\"next\"", query.with_cursor(&next));
            response.headers_mut().extend(HeaderValue::from_str(&link).ok().map(|link| (LINK, link)));
        }
        Ok(response)
    }

    async fn one(&self, path: &str, query: &Query) -> Result<Response<Body>, Problem> {
        let (kind, scope, quantiles) = (query.kind()?, query.scope()?, query.quantiles()?);
        let (key, found) = self.find(path, kind, scope).await;
        // Several kinds under one key: the one that was updated last.
        let metric = found.into_iter().max_by_key(|metric| metric.total.update_ms).ok_or_else(|| unknown(&key))?;
        json(self.how(&quantiles).one(&metric))
    }

    async fn delete(&self, path: &str, query: &Query) -> Result<Response<Body>, Problem> {
        let kind = query.kind()?;
        let (key, found) = self.find(path, kind, Scope::Global).await;
        if found.is_empty() {
            return Err(unknown(&key));
        }
        match self.api.view.delete(&key, kind).await {
            Ok(0) => Err(unknown(&key)),
            Ok(_) => Ok(ok(TEXT, format!("Record {key} DELETED"))),
            Err(view::Error::Stopping) => Err(Problem::busy("the agent is stopping")),
            Err(view::Error::Store) => Err(Problem::busy("the store that agents share is away")),
        }
    }

    /// The series of a key as it stands in a path, and the key by which they were found.
    async fn find(&self, path: &str, kind: Option<Kind>, scope: Scope) -> (SeriesKey, Vec<Metric>) {
        let as_sent = SeriesKey::parse(path);
        let found = self.api.view.metrics(&as_sent, kind, scope).await;
        let decoded = SeriesKey::parse(&percent_decode_str(path).decode_utf8_lossy());
        if !found.is_empty() || decoded == as_sent {
            return (as_sent, found);
        }
        let found = self.api.view.metrics(&decoded, kind, scope).await;
        (if found.is_empty() { as_sent } else { decoded }, found)
    }

    /// Who sends, those of most lines first; how many there are in all is in a header.
    async fn sources(&self, query: &Query) -> Result<Response<Body>, Problem> {
        let limit = self.limit(query)?;
        let Ok(_permit) = self.lists.try_acquire() else {
            return Err(Problem::busy("as many lists as limits.lists allows are being made; try again"));
        };
        let (sources, total) = self.api.view.sources(limit).await;
        let mut response = json(serde_json::to_vec(&sources))?;
        response.headers_mut().insert(TOTAL_COUNT, HeaderValue::from(total));
        Ok(response)
    }

    /// The last events, those among them that were sent before the question.
    async fn events(&self) -> Result<Response<Body>, Problem> {
        self.api.view.fresh().await;
        json(serde_json::to_vec(&self.api.view.events().events()))
    }

    /// The last service checks, those among them that were sent before the question.
    async fn checks(&self) -> Result<Response<Body>, Problem> {
        self.api.view.fresh().await;
        json(serde_json::to_vec(&self.api.view.events().checks()))
    }

    /// Names and orders the series on a thread where that delays no other reader, then writes as the client reads.
    async fn scrape(&self, headers: &HeaderMap) -> Result<Response<Body>, Problem> {
        let Ok(permit) = Arc::clone(&self.scrapes).try_acquire_owned() else {
            return Err(Problem::busy("as many scrapes as limits.scrapes allows are being made; try again"));
        };
        let (headers, config, own) = (headers.clone(), self.api.prometheus.clone(), self.api.exporter.clone());
        let mapper = Arc::clone(&self.api.mapper);
        let respond = move |series, moment| scrape::respond(&headers, mapper.apply(series), &config, moment, own);
        let response = self.beside(respond).await?;
        Ok(response.map(|page| Box::pin(Exposition { page, _permit: permit }) as Body))
    }

    /// What a scrape renames or adds, named and ordered as for a scrape and counted as one.
    async fn conflicts(&self) -> Result<Response<Body>, Problem> {
        let Ok(_permit) = self.scrapes.try_acquire() else {
            return Err(Problem::busy("as many scrapes as limits.scrapes allows are being made; try again"));
        };
        let (config, mapper) = (self.api.prometheus.clone(), Arc::clone(&self.api.mapper));
        let find = move |series, moment| scrape::conflicts(mapper.apply(series), &config, moment);
        json(serde_json::to_vec(&self.beside(find).await?))
    }

    /// The names that no mapping rule matches, the most used first; how many there are in all is in a header.
    async fn unmapped(&self, query: &Query) -> Result<Response<Body>, Problem> {
        let limit = self.limit(query)?;
        let Ok(_permit) = self.scrapes.try_acquire() else {
            return Err(Problem::busy("as many scrapes as limits.scrapes allows are being made; try again"));
        };
        let mapper = Arc::clone(&self.api.mapper);
        let Some((names, total)) = self.beside(move |series, _| mapper.unmapped(series, limit)).await? else {
            return Err(Problem::new(StatusCode::NOT_FOUND, "mapping.file names no mapping file"));
        };
        let mut response = json(serde_json::to_vec(&names))?;
        response.headers_mut().insert(TOTAL_COUNT, HeaderValue::from(total));
        Ok(response)
    }

    /// Does something with all series, fresh as of now, on a thread where that delays no other reader.
    async fn beside<T: Send + 'static>(
        &self,
        work: impl FnOnce(Vec<Arc<Series>>, Moment) -> T + Send + 'static,
    ) -> Result<T, Problem> {
        self.api.view.fresh().await;
        let ledger = Arc::clone(self.api.view.ledger());
        let work = move || {
            let mut series = Vec::with_capacity(ledger.len());
            ledger.for_each(|one| series.push(Arc::clone(one)));
            work(series, Moment { now_ms: wall_ms(), steady_ms: steady_ms(), window_ms: ledger.window_ms() })
        };
        spawn_blocking(work).await.map_err(|_| Problem::busy("the agent is stopping"))
    }

    fn how<'h>(&'h self, quantiles: &'h [f64]) -> How<'h> {
        How { quantiles, etsy: &self.api.etsy, now_ms: steady_ms() }
    }
}

fn unknown(key: &SeriesKey) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("no series has the key {key}"))
}

fn json(text: serde_json::Result<Vec<u8>>) -> Result<Response<Body>, Problem> {
    // A vector takes every byte and every key is text, so there is nothing that could fail.
    let text = text.map_err(|error| Problem::busy(format!("the answer can't be written: {error}")))?;
    let mut response = ok(JSON, text);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

impl Site for Data {
    const ON: On = On::Api;

    async fn answer(&self, asked: Asked, request: Request<Incoming>) -> Result<Response<Body>, Problem> {
        let query = Query::of(&request);
        match asked.endpoint {
            Endpoint::List => self.list(&query).await,
            Endpoint::One if request.method() == Method::DELETE => self.delete(&asked.rest, &query).await,
            Endpoint::One => self.one(&asked.rest, &query).await,
            Endpoint::Rejects => json(serde_json::to_vec(&self.api.view.rejects())),
            Endpoint::Sources => self.sources(&query).await,
            Endpoint::Events => self.events().await,
            Endpoint::Checks => self.checks().await,
            Endpoint::Conflicts => self.conflicts().await,
            Endpoint::Unmapped => self.unmapped(&query).await,
            Endpoint::Scrape => self.scrape(request.headers()).await,
            Endpoint::Ping => Ok(health::ping(Self::ON)),
            Endpoint::Healthy => Ok(health::healthy()),
            Endpoint::Ready => {
                let (others, warning) = (self.api.view.unready(), self.tls.warning());
                Ok(health::ready(&self.api.health, others, warning, asked.may_read))
            }
            Endpoint::Reload => health::reload(self.api.reload.as_ref()).await,
            Endpoint::OpenApi => Ok(ok(JSON, OPENAPI)),
            Endpoint::Samples => Err(Problem::new(StatusCode::NOT_FOUND, "this stands on the ingest listeners")),
        }
    }
}

/// The listeners of `http.scrape`, which answer scrapes and nothing else.
pub(super) struct Scrape(pub(super) Rc<Data>);

impl Site for Scrape {
    const ON: On = On::Scrape;

    async fn answer(&self, asked: Asked, request: Request<Incoming>) -> Result<Response<Body>, Problem> {
        self.0.answer(asked, request).await
    }
}

/// A scrape that is being read, and its place among `limits.scrapes`.
struct Exposition {
    page: scrape::Page,
    _permit: OwnedSemaphorePermit,
}

impl hyper::body::Body for Exposition {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.page).poll_frame(context)
    }
}

/// A query string, decoded.
#[derive(Debug, PartialEq)]
struct Query {
    path: String,
    pairs: Vec<(String, String)>,
}

impl Query {
    fn of(request: &Request<Incoming>) -> Self {
        Self::read(request.uri().path(), request.uri().query().unwrap_or_default())
    }

    /// `+` is a blank, as in a form: what browsers and `curl --data-urlencode` mean by it.
    fn read(path: &str, query: &str) -> Self {
        let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        });
        Self { path: path.to_owned(), pairs: pairs.collect() }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn parsed<T: FromStr>(&self, name: &str, what: &str) -> Result<Option<T>, Problem> {
        let wrong = |value| Problem::bad_request(format!("{name}={value}: not {what}"));
        self.get(name).map(|value| value.parse().map_err(|_| wrong(value))).transpose()
    }

    fn kind(&self) -> Result<Option<Kind>, Problem> {
        let Some(name) = self.get("type") else { return Ok(None) };
        let kind = Kind::from_json(name).or_else(|| Kind::from_letter(name));
        let known = || Kind::ALL.map(Kind::json).join(", ");
        kind.map(Some).ok_or_else(|| Problem::bad_request(format!("type={name}: not one of {}", known())))
    }

    fn scope(&self) -> Result<Scope, Problem> {
        match self.get("scope") {
            None | Some("global") => Ok(Scope::Global),
            Some("local") => Ok(Scope::Local),
            Some(other) => Err(Problem::bad_request(format!("scope={other}: not one of local, global"))),
        }
    }

    fn tags(&self) -> Vec<(String, Option<String>)> {
        let tags = self.pairs.iter().filter(|(name, _)| name == "tag");
        let split = |tag: &String| match tag.split_once(':') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (tag.clone(), None),
        };
        tags.map(|(_, tag)| split(tag)).collect()
    }

    fn quantiles(&self) -> Result<Vec<f64>, Problem> {
        let Some(list) = self.get("quantiles") else { return Ok(QUANTILES.into()) };
        let parsed: Option<Vec<f64>> = list.split(',').map(|q| q.trim().parse().ok()).collect();
        let fits = |list: &Vec<f64>| list.len() <= QUANTILES_MAX && list.iter().all(|q| (0.0..=1.0).contains(q));
        let mut quantiles = parsed.filter(fits).ok_or_else(|| {
            Problem::bad_request(format!("quantiles={list}: not a list of at most {QUANTILES_MAX} numbers from 0 to 1"))
        })?;
        quantiles.sort_unstable_by(f64::total_cmp);
        quantiles.dedup();
        Ok(quantiles)
    }

    /// The same question from another place on.
    fn with_cursor(&self, cursor: &Cursor) -> String {
        let escape = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let kept = self.pairs.iter().filter(|(name, _)| name != "cursor");
        let mut pairs: Vec<_> = kept.map(|(name, value)| format!("{}={}", escape(name), escape(value))).collect();
        pairs.push(format!("cursor={}", escape(&cursor.to_string())));
        format!("{}?{}", self.path, pairs.join("&"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_query_is_read_like_a_form() {
        let query = Query::read("/", "match=a%2A+b&tag=k:v:w&tag=bare&type=ms&scope=local&limit=5&x");
        assert_eq!(query.get("match"), Some("a* b"));
        assert_eq!(query.tags(), [("k".to_owned(), Some("v:w".to_owned())), ("bare".to_owned(), None)]);
        assert_eq!(query.kind(), Ok(Some(Kind::Timer)));
        assert_eq!(query.scope(), Ok(Scope::Local));
        assert_eq!(query.parsed::<usize>("limit", ""), Ok(Some(5)));
        assert_eq!(query.get("x"), Some(""));
        assert!(Query::read("/", "limit=-1").parsed::<usize>("limit", "a number").is_err());
    }

    #[test]
    fn quantiles_are_sorted_and_within_0_and_1() {
        assert_eq!(Query::read("/", "").quantiles(), Ok(QUANTILES.into()));
        assert_eq!(Query::read("/", "quantiles=0.99,%200.5,1,0.5").quantiles(), Ok(vec![0.5, 0.99, 1.0]));
        for wrong in ["quantiles=", "quantiles=1.1", "quantiles=nan", "quantiles=0.5,,1", "quantiles=-0.1"] {
            assert_eq!(Query::read("/", wrong).quantiles().unwrap_err().status, StatusCode::BAD_REQUEST, "{wrong}");
        }
        let many = vec!["0.5"; QUANTILES_MAX + 1].join(",");
        assert!(Query::read("/", &format!("quantiles={many}")).quantiles().is_err());
    }

    proptest! {
        #[test]
        fn the_link_to_the_next_page_asks_the_same(pairs in prop::collection::vec(("[a-c&=%+ ]{1,3}", ".{0,5}"), 0..4), key in ".{0,9}") {
            let asked = Query { path: "/data/metrics".into(), pairs };
            let cursor: Cursor = format!("ms:{}", SeriesKey::parse(&key)).parse().unwrap();
            let link = asked.with_cursor(&cursor);
            let (path, query) = link.split_once('?').unwrap();
            let again = Query::read(path, query);
            prop_assert_eq!(again.parsed::<Cursor>("cursor", ""), Ok(Some(cursor)));
            let rest: Vec<_> = again.pairs.into_iter().filter(|(name, _)| name != "cursor").collect();
            prop_assert_eq!(rest, asked.pairs);
            prop_assert!(HeaderValue::from_str(&link).is_ok());
        }
    }
}
