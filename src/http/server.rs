//! What every request goes through before a part answers it: the connection, `Host` and `Origin`, the table of routes, the
//! token.
//!
//! [`ROUTES`] is the single definition of what exists where, and which right each method of it needs; a request that matches no row is told 404, one with another
//! method 405. The route's template, never the path, is a label of our metrics.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::connection::{self, Unasked};
use super::problem::Problem;
use super::tokens::{Asking, Guard, Right};
use super::{Access, Config, Error, HEADER_LINES_MAX, Limits, Socket};
use crate::telemetry;
use crate::tls;

/// The body of an answer, whole or streamed. It cannot fail: what can is asked before the first byte.
pub type Body = Pin<Box<dyn hyper::body::Body<Data = Bytes, Error = Infallible>>>;

/// A body that is at hand.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Box::pin(Full::new(bytes.into()))
}

/// A 200 of a media type.
pub fn ok(media_type: &'static str, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

/// Plain text.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// JSON.
pub const JSON: &str = "application/json";

/// Which listeners a route stands on. The name is the `listener` label of our metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Those of `http.ingest`.
    Ingest,
    /// Those of `http.api`.
    Api,
    /// Those of `http.scrape`.
    Scrape,
}

impl On {
    const fn label(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Api => "api",
            Self::Scrape => "scrape",
        }
    }
}

/// What answers a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /ingest/metrics`
    Samples,
    /// `GET /health/ping`
    Ping,
    /// `GET /-/healthy`
    Healthy,
    /// `GET /-/ready`
    Ready,
    /// `POST /-/reload`
    Reload,
    /// `GET /openapi.json`
    OpenApi,
    /// `GET /data/metrics`
    List,
    /// `GET`, `DELETE /data/metrics/{key}`
    One,
    /// `GET /data/rejects`
    Rejects,
    /// `GET /data/sources`
    Sources,
    /// `GET /data/events`
    Events,
    /// `GET /data/checks`
    Checks,
    /// `GET /data/conflicts`
    Conflicts,
    /// `GET /data/unmapped`
    Unmapped,
    /// `GET /metrics`
    Scrape,
}

/// One row of the table.
#[derive(Debug)]
pub struct Route {
    /// The path; `{key}` at its end stands for the rest of it.
    pub template: &'static str,
    /// What answers it.
    pub endpoint: Endpoint,
    /// The methods it has, and the right that each needs; HEAD comes with GET, OPTIONS with all.
    pub methods: &'static [(&'static str, Right)],
    /// Where it stands.
    pub on: &'static [On],
}

/// Every route.
pub const ROUTES: &[Route] = &[
    Route {
        template: "/ingest/metrics",
        endpoint: Endpoint::Samples,
        methods: &[("POST", Right::Write)],
        on: &[On::Ingest],
    },
    Route {
        template: "/health/ping",
        endpoint: Endpoint::Ping,
        methods: &[("GET", Right::Open)],
        on: &[On::Ingest, On::Api],
    },
    Route { template: "/-/healthy", endpoint: Endpoint::Healthy, methods: &[("GET", Right::Open)], on: &[On::Api] },
    Route { template: "/-/ready", endpoint: Endpoint::Ready, methods: &[("GET", Right::Open)], on: &[On::Api] },
    Route {
        template: "/-/reload",
        endpoint: Endpoint::Reload,
        // PUT as well, since statsd_exporter and Prometheus take both.
        methods: &[("POST", Right::Admin), ("PUT", Right::Admin)],
        on: &[On::Api],
    },
    Route { template: "/openapi.json", endpoint: Endpoint::OpenApi, methods: &[("GET", Right::Read)], on: &[On::Api] },
    Route { template: "/data/metrics", endpoint: Endpoint::List, methods: &[("GET", Right::Read)], on: &[On::Api] },
    Route {
        template: "/data/metrics/{key}",
        endpoint: Endpoint::One,
        methods: &[("GET", Right::Read), ("DELETE", Right::Admin)],
        on: &[On::Api],
    },
    Route { template: "/data/rejects", endpoint: Endpoint::Rejects, methods: &[("GET", Right::Read)], on: &[On::Api] },
    Route { template: "/data/sources", endpoint: Endpoint::Sources, methods: &[("GET", Right::Read)], on: &[On::Api] },
    Route { template: "/data/events", endpoint: Endpoint::Events, methods: &[("GET", Right::Read)], on: &[On::Api] },
    Route { template: "/data/checks", endpoint: Endpoint::Checks, methods: &[("GET", Right::Read)], on: &[On::Api] },
    Route {
        template: "/data/conflicts",
        endpoint: Endpoint::Conflicts,
        methods: &[("GET", Right::Read)],
        on: &[On::Api],
    },
    Route {
        template: "/data/unmapped",
        endpoint: Endpoint::Unmapped,
        methods: &[("GET", Right::Read)],
        on: &[On::Api],
    },
    Route {
        template: "/metrics",
        endpoint: Endpoint::Scrape,
        methods: &[("GET", Right::Read)],
        on: &[On::Api, On::Scrape],
    },
];

impl Route {
    /// What stands for `{key}` in a path of this route; empty for a route without.
    fn rest<'p>(&self, path: &'p str) -> Option<&'p str> {
        match self.template.strip_suffix("{key}") {
            Some(prefix) => path.strip_prefix(prefix).filter(|rest| !rest.is_empty()),
            None => (path == self.template).then_some(""),
        }
    }

    fn allow(&self) -> String {
        let names: Vec<_> = self.methods.iter().map(|(name, _)| *name).collect();
        let mut allow = names.join(", ");
        if names.contains(&"GET") {
            allow.push_str(", HEAD");
        }
        allow.push_str(", OPTIONS");
        allow
    }

    /// The right that a method needs, if the route has it.
    fn right(&self, method: &Method) -> Option<Right> {
        let name = if method == Method::HEAD { "GET" } else { method.as_str() };
        self.methods.iter().find(|(method, _)| *method == name).map(|(_, right)| *right)
    }
}

/// A request that was let through: to what, from whom.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) endpoint: Endpoint,
    /// What stands for `{key}`, as sent.
    pub(super) rest: String,
    pub(super) peer: SocketAddr,
    /// Whether the peer may see more than that the agent is there: it is on this host, or has the right to read.
    pub(super) may_read: bool,
}

/// A set of listeners with one purpose.
pub(super) trait Site: 'static {
    /// Which routes it has.
    const ON: On;

    /// Answers a request of one of these routes. An error is an answer, too.
    fn answer(&self, asked: Asked, request: Request<Incoming>)
    -> impl Future<Output = Result<Response<Body>, Problem>>;
}

/// Listeners and their connections, on the thread that made them.
#[derive(Debug)]
pub struct Server {
    access: Access,
    gate: Gate,
    limits: Rc<Limits>,
    stop: watch::Sender<bool>,
    listeners: JoinSet<()>,
}

/// After an error of accept the listener rests so long, so that it never spins.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections beyond the limit that are told so at one time; the others are closed without a word.
const TURNED_AWAY_MAX: usize = 64;

impl Server {
    pub(super) fn new(access: Access, config: &Config, limits: &Limits) -> Self {
        Self {
            access,
            gate: Gate { hosts: config.hosts.iter().map(|host| host.to_ascii_lowercase()).collect() },
            limits: Rc::new(limits.clone()),
            stop: watch::Sender::new(false),
            listeners: JoinSet::new(),
        }
    }

    pub(super) fn listen<S: Site>(&mut self, sockets: Vec<Socket>, site: &Rc<S>) -> Result<(), Error> {
        Guard::begin(S::ON.label());
        tls::Acceptor::begin(S::ON.label());
        let acceptor = self.access.tls.apart();
        // Each purpose has its own: who may only scrape shuts nobody out of the API.
        let connections = Arc::new(Semaphore::new(self.limits.http_connections.min(Semaphore::MAX_PERMITS)));
        for Socket { listener, tls } in sockets {
            listener.set_nonblocking(true).map_err(Error::Register)?;
            let listener = TcpListener::from_std(listener).map_err(Error::Register)?;
            let door = Rc::new(Door {
                site: Rc::clone(site),
                guard: self.access.guard.clone(),
                tls: tls.then(|| acceptor.clone()),
                gate: self.gate.clone(),
                limits: Rc::clone(&self.limits),
                loopback: listener.local_addr().is_ok_and(|address| is_loopback(address.ip())),
            });
            let connections = Arc::clone(&connections);
            self.listeners.spawn_local(accept(listener, door, connections, self.stop.subscribe()));
        }
        Ok(())
    }

    /// Takes no more connections, lets requests under way finish, and returns when all are answered or `grace` is over;
    /// what is left then is cut off.
    pub async fn stop(mut self, grace: Duration) {
        self.stop.send_replace(true);
        let finished = async { while self.listeners.join_next().await.is_some() {} };
        if timeout(grace, finished).await.is_err() {
            self.listeners.shutdown().await;
        }
    }
}

/// One listener's way in.
struct Door<S> {
    site: Rc<S>,
    guard: Guard,
    /// What makes its connections speak TLS, where they do.
    tls: Option<tls::Acceptor>,
    gate: Gate,
    limits: Rc<Limits>,
    loopback: bool,
}

async fn accept<S: Site>(
    listener: TcpListener,
    door: Rc<Door<S>>,
    connections: Arc<Semaphore>,
    mut stop: watch::Receiver<bool>,
) {
    let label = [S::ON.label()];
    let open = telemetry::CONNECTIONS.gauge(&label);
    let errors = telemetry::ACCEPT_ERRORS.counter(&label);
    let refused = telemetry::CONNECTIONS_REFUSED.counter(&[S::ON.label(), "limit"]);
    let turned_away = Arc::new(Semaphore::new(TURNED_AWAY_MAX));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            // The count of open connections falls as they end, not when the next one comes.
            Some(_) = tasks.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(_) => {
                errors.increment(1);
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match Arc::clone(&connections).try_acquire_owned() {
            Ok(permit) => {
                let (door, stop, open) = (Rc::clone(&door), stop.clone(), open.clone());
                tasks.spawn_local(async move {
                    open.increment(1.0);
                    serve(stream, peer, door, permit, stop).await;
                    open.decrement(1.0);
                });
            }
            Err(_) => {
                refused.increment(1);
                // To a client of TLS words without it are none.
                let permit = Arc::clone(&turned_away).try_acquire_owned().ok().filter(|_| door.tls.is_none());
                if let Some(permit) = permit {
                    tasks.spawn_local(turn_away(stream, permit));
                }
            }
        }
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

async fn turn_away(stream: TcpStream, _permit: OwnedSemaphorePermit) {
    let problem = Problem::busy("as many connections as limits.http_connections allows are open; try again");
    connection::close(tls::Stream::Plain(stream), Some(problem), true).await;
}

async fn serve<S: Site>(
    stream: TcpStream,
    peer: SocketAddr,
    door: Rc<Door<S>>,
    _permit: OwnedSemaphorePermit,
    mut stop: watch::Receiver<bool>,
) {
    // Answers are written whole, so waiting for more bytes to fill a segment only delays them. A socket that refuses the
    // option is as good as one that has it.
    let _ = stream.set_nodelay(true);
    let stream = tokio::select! {
        stream = door.secure(stream) => stream,
        // Who has not even asked is not waited for.
        _ = stop.wait_for(|stop| *stop) => None,
    };
    let Some(stream) = stream else { return };
    match connection::run(stream, &door.limits, stop, |request| door.answer(peer, request)).await {
        Some(Unasked::Refused(status)) => {
            telemetry::HTTP_REQUESTS.counter(&[S::ON.label(), "other", status.as_str()]).increment(1);
        }
        Some(Unasked::Tls) => tls::Failure::Unexpected.count(S::ON.label()),
        None => {}
    }
}

impl<S: Site> Door<S> {
    /// The connection as this door speaks, if it comes to that.
    async fn secure(&self, stream: TcpStream) -> Option<tls::Stream> {
        let Some(tls) = &self.tls else { return Some(tls::Stream::Plain(stream)) };
        match tls.accept(stream, S::ON.label()).await {
            Ok(stream) => Some(stream),
            Err((_, None)) => None,
            Err((_, Some(plain))) => {
                let problem = Problem::bad_request("this address speaks TLS; write https:// before it");
                connection::close(tls::Stream::Plain(plain), Some(problem), true).await;
                None
            }
        }
    }

    /// The answer to any request whatever.
    async fn answer(&self, peer: SocketAddr, request: Request<Incoming>) -> Response<Body> {
        let began = Instant::now();
        let found = find(S::ON, request.uri().path());
        let template = found.map_or("other", |(route, _)| route.template);
        let passed = self.pass(peer, &request, found);
        let may_read = self.loopback || self.guard.allows(Right::Read, request.headers());
        let answered = match passed {
            Ok(Passed::To(endpoint, rest)) => self.site.answer(Asked { endpoint, rest, peer, may_read }, request).await,
            Ok(Passed::Answered(response)) => Ok(response),
            Err(problem) => Err(problem),
        };
        let mut response = answered.unwrap_or_else(Response::from);
        let headers = response.headers_mut();
        headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
        telemetry::HTTP_REQUESTS.counter(&[S::ON.label(), template, response.status().as_str()]).increment(1);
        telemetry::HTTP_SECONDS.histogram(&[template]).record(began.elapsed());
        response
    }

    fn pass(
        &self,
        peer: SocketAddr,
        request: &Request<Incoming>,
        found: Option<(&Route, &str)>,
    ) -> Result<Passed, Problem> {
        self.limits.check(request)?;
        self.gate.check(self.loopback, request)?;
        let Some((route, rest)) = found else {
            return match request.method() {
                // What `OPTIONS *` asks about is the server, not a resource.
                &Method::OPTIONS if request.uri().path() == "*" => Ok(Passed::Answered(options("GET, HEAD, OPTIONS"))),
                _ => Err(Problem::new(
                    StatusCode::NOT_FOUND,
                    "nothing stands at this path; see /openapi.json of the API",
                )),
            };
        };
        if request.method() == Method::OPTIONS {
            return Ok(Passed::Answered(options(&route.allow())));
        }
        let right = route.right(request.method()).ok_or_else(|| Problem::method(&route.allow()))?;
        let (listener, route_name, headers) = (S::ON.label(), route.template, request.headers());
        self.guard.check(Asking { listener, route: route_name, right, headers, peer })?;
        Ok(Passed::To(route.endpoint, rest.to_owned()))
    }
}

/// What the checks made of a request.
enum Passed {
    To(Endpoint, String),
    Answered(Response<Body>),
}

fn find(on: On, path: &str) -> Option<(&'static Route, &str)> {
    let here = ROUTES.iter().filter(|route| route.on.contains(&on));
    here.filter_map(|route| Some((route, route.rest(path)?))).next()
}

fn options(allow: &str) -> Response<Body> {
    let mut response = Response::new(Box::pin(Empty::new()) as Body);
    *response.status_mut() = StatusCode::NO_CONTENT;
    if let Ok(allow) = HeaderValue::from_str(allow) {
        response.headers_mut().insert(ALLOW, allow);
    }
    response
}

impl Limits {
    /// Looks at a head that the connection could not look at while it came: a pipelined one.
    fn check(&self, request: &Request<Incoming>) -> Result<(), Problem> {
        let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
        // Two blanks, the version and the line's end are 12 bytes.
        if request.method().as_str().len() + target + 12 > self.request_line.bytes() {
            return Err(Problem::new(StatusCode::URI_TOO_LONG, connection::too_long_line(self.request_line.bytes())));
        }
        let headers = request.headers();
        let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        if bytes > self.headers.bytes() || headers.len() > HEADER_LINES_MAX {
            let detail = connection::too_large_head(self.headers.bytes());
            return Err(Problem::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, detail));
        }
        Ok(())
    }
}

/// Who may ask: the rules against a web page that makes its visitor's browser send requests here.
#[derive(Debug, Clone)]
struct Gate {
    /// Lower case.
    hosts: Rc<[String]>,
}

impl Gate {
    fn check(&self, loopback: bool, request: &Request<Incoming>) -> Result<(), Problem> {
        let headers = request.headers();
        let host = host_of(request)?;
        // A name that resolves to a loopback address only for the browser (DNS rebinding) shows itself here.
        if let Some(host) = host.as_deref().filter(|_| loopback)
            && !self.is_ours(host)
        {
            let detail = format!("Host {host:?} is not this listener's; name it in http.hosts if it should be");
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        }
        let mut origins = headers.get_all(ORIGIN).iter();
        if !origins.all(|origin| self.is_same_origin(origin, host.as_deref())) {
            let detail = "Origin is another site's; name its host in http.hosts if its pages may send requests";
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        }
        Ok(())
    }

    fn is_ours(&self, host: &str) -> bool {
        let name = without_port(host);
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        name.trim_end_matches('.') == "localhost" || bare.parse().is_ok_and(is_loopback) || self.is_named(host)
    }

    fn is_named(&self, host: &str) -> bool {
        self.hosts.iter().any(|ours| ours == host || ours == without_port(host))
    }

    fn is_same_origin(&self, origin: &HeaderValue, host: Option<&str>) -> bool {
        let Some((scheme, authority)) = origin.to_str().ok().and_then(|origin| origin.split_once("://")) else {
            return false;
        };
        let authority = authority.to_ascii_lowercase();
        let default_port = if scheme.eq_ignore_ascii_case("https") { ":443" } else { ":80" };
        let same = |host: &str| host.trim_end_matches(default_port) == authority.trim_end_matches(default_port);
        host.is_some_and(same) || self.is_named(&authority)
    }
}

/// Host and port as the request names them, lower case; `None` only in HTTP/1.0. An absolute target beats the header.
fn host_of(request: &Request<Incoming>) -> Result<Option<String>, Problem> {
    let mut headers = request.headers().get_all(HOST).iter();
    let header = headers.next().map(HeaderValue::to_str).transpose();
    let header = header.map_err(|_| Problem::bad_request("Host is not text"))?;
    if headers.next().is_some() {
        return Err(Problem::bad_request("Host stands there twice"));
    }
    if header.is_none() && request.version() != Version::HTTP_10 {
        return Err(Problem::bad_request("HTTP/1.1 needs the header Host"));
    }
    let target = request.uri().authority().map(|authority| authority.as_str());
    Ok(target.or(header).map(str::to_ascii_lowercase))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => {
            // `::1` without brackets has no port.
            if name.contains(':') && !name.ends_with(']') { host } else { name }
        }
        Some(_) | None => host,
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}
