//! The servers over real sockets, with clients that behave and clients that don't.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc, oneshot};

use super::server::ROUTES;
use super::tokens::Right;
use super::*;
use crate::aggregate::etsy;
use crate::aggregate::ledger::Ledger;
use crate::aggregate::shard::Budget;
use crate::flush::{self, Parts, Running};
use crate::ingest::{Rejects, Settings, Times, Workers};

/// Both servers on a thread of their own.
struct Agent {
    ingest: SocketAddr,
    api: SocketAddr,
    scrape: SocketAddr,
    health: Arc<Health>,
    stop: Option<oneshot::Sender<Duration>>,
    thread: Option<JoinHandle<()>>,
}

/// A worker that takes its turns, and the view of what it counted, without a journal.
fn parts() -> (Rc<RefCell<Worker>>, View, Running) {
    let budget = Arc::new(Budget::new(&Default::default()));
    let rejects = Arc::new(Rejects::new(&Default::default()));
    let settings = Settings { protocol: Default::default(), limits: Default::default(), mapping: None };
    let (workers, deliveries) =
        Workers::new(settings, Arc::clone(&budget), Arc::clone(&rejects), Times { interval_ms: 100, window_ms: 500 });
    let wake = Arc::new(Notify::new());
    let caller = Arc::clone(&wake);
    let worker = Rc::new(RefCell::new(workers.register(move || caller.notify_one())));
    let turning = Rc::clone(&worker);
    tokio::task::spawn_local(async move {
        loop {
            let question = turning.borrow().question();
            let rest = turning.borrow_mut().turn(question);
            let _ = tokio::time::timeout(rest, wake.notified()).await;
        }
    });
    let ledger = Arc::new(Ledger::new(500));
    let (events, sources) = (workers.events(), workers.sources());
    let parts = Parts {
        workers,
        deliveries,
        ledger: Arc::clone(&ledger),
        budget,
        journal: None,
        remote: false,
        exact: false,
        on_commit: Box::new(|_| {}),
    };
    let flush = flush::Config { interval: Time::millis(100), window: Time::millis(500), ..Default::default() };
    let running = Running::start(parts, &flush, &Default::default()).unwrap();
    let view = View::new(ledger, running.fold(), None, rejects, events, sources);
    (worker, view, running)
}

/// Our own metrics, of which a process has only one set.
fn exporter() -> telemetry::Exporter {
    static EXPORTER: OnceLock<telemetry::Exporter> = OnceLock::new();
    EXPORTER.get_or_init(|| telemetry::install().unwrap()).clone()
}

fn bound() -> (Socket, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (Socket { listener, tls: false }, address)
}

impl Agent {
    fn start(change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::default();
        change(&mut limits);
        let config = Config { hosts: vec!["tally.example".into()], ..Config::default() };
        let ((ingest, ingest_at), (api, api_at), (scrape, scrape_at)) = (bound(), bound(), bound());
        let health = Arc::new(Health::default());
        let shared = Arc::clone(&health);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                let (worker, view, running) = parts();
                let (reload, mut orders) = mpsc::channel::<Reload>(1);
                let mut outcomes =
                    [Ok(vec!["log.level"]), Err(vec!["flush.interval = 0s".to_owned()])].into_iter().cycle();
                tokio::task::spawn_local(async move {
                    while let Some(order) = orders.recv().await {
                        order.send(outcomes.next().unwrap()).unwrap();
                    }
                });
                let prometheus = scrape::Config::default();
                let etsy = etsy::Config::default();
                let (mapper, exporter) = (Arc::default(), exporter());
                let reload = Some(reload);
                let api_of = Api { view, etsy, health: shared, reload, prometheus, mapper, exporter };
                let keeping = Keeping { fold: running.fold(), has_journal: false, receipts: Vec::new() };
                let access = Access::new(&config.tokens, 10, tls::Acceptor::new(None, limits.header_time.0));
                let shared = access.clone();
                let ingest = start_ingest(vec![ingest], shared, worker, keeping, None, &config, &limits).unwrap();
                let api = start_api(vec![api], vec![scrape], access, api_of, &config, &limits).unwrap();
                let grace = stopped.await.unwrap_or_default();
                tokio::join!(ingest.stop(grace), api.stop(grace));
                running.stop(Instant::now());
            });
        });
        Self { ingest: ingest_at, api: api_at, scrape: scrape_at, health, stop: Some(stop), thread: Some(thread) }
    }

    fn default() -> Self {
        Self::start(|_| ())
    }

    fn stop(&mut self, grace: Duration) {
        if let Some(stop) = self.stop.take() {
            stop.send(grace).unwrap();
        }
    }

    fn ended(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    fn post(&self, headers: &str, body: impl AsRef<[u8]>) -> Reply {
        let body = body.as_ref();
        let mut request = format!("POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\n{headers}").into_bytes();
        request.extend(format!("Content-Length: {}\r\n\r\n", body.len()).into_bytes());
        request.extend(body);
        Client::to(self.ingest).ask(&request)
    }

    fn get(&self, path: &str) -> Reply {
        Client::to(self.api).ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
        self.ended();
    }
}

struct Client(BufReader<TcpStream>);

#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }

    /// That it is a problem of this status, as a whole.
    fn problem(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let json = self.json();
        assert_eq!(json["status"], status);
        assert!(json["type"].is_string() && json["title"].is_string() && json["detail"].is_string(), "{json}");
        json
    }
}

impl Client {
    fn to(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Reply {
        let is_head = bytes.as_ref().starts_with(b"HEAD");
        self.send(bytes);
        self.reply(is_head)
    }

    fn reply(&mut self, is_head: bool) -> Reply {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(self.0.read_line(&mut head).unwrap() > 0, "closed behind {head:?}");
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut reply = Reply { status, head, body: Vec::new() };
        let length =
            if is_head { 0 } else { reply.header("content-length").map_or(0, |length| length.parse().unwrap()) };
        reply.body.resize(length, 0);
        self.0.read_exact(&mut reply.body).unwrap();
        reply
    }

    /// That the server closes the connection, and when it does.
    fn closed(&mut self) {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }
}

const RECORD: &str = r#"{"level":"application","name":"server.get.timer","type":"TIMER","value":1}"#;

#[test]
fn what_was_answered_200_is_in_the_next_read() {
    let agent = Agent::default();
    for n in 1..=3 {
        let reply = agent.post("Content-Type: application/json\r\n", RECORD);
        assert_eq!((reply.status, reply.text()), (200, "Record server.get.timer UPDATED"));
        assert!(reply.header("content-type").unwrap().starts_with("text/plain"));
        let metric = agent.get("/data/metrics/application.server.get.timer").json();
        assert_eq!((&metric["count"], &metric["type"]), (&json!(n), &json!("TIMER")));
        assert_eq!((&metric["level"], &metric["name"]), (&json!("application"), &json!("server.get.timer")));
    }
}

#[test]
fn a_closed_window_shows_the_figures_of_etsy() {
    let agent = Agent::default();
    let deadline = Instant::now() + Duration::from_secs(20);
    let window = loop {
        assert_eq!(agent.post("", r#"{"name":"t","type":"TIMER","values":[7,7,7]}"#).status, 200);
        let metric = agent.get("/data/metrics/t?quantiles=0.25").json();
        if metric["window"].is_object() {
            break metric["window"].clone();
        }
        assert!(Instant::now() < deadline, "{metric}");
    };
    let count = window["count"].as_f64().unwrap();
    assert_eq!((&window["seconds"], &window["quantiles"]), (&json!(0.5), &json!({ "0.25": 7 })), "{window}");
    assert_eq!((window["rate"].as_f64(), window["etsy"]["count_ps"].as_f64()), (Some(count * 2.0), Some(count * 2.0)));
    assert_eq!((window["etsy"]["upper_90"].as_f64(), window["etsy"]["sum"].as_f64()), (Some(7.0), Some(count * 7.0)));
}

#[test]
fn many_records_are_answered_with_counts() {
    let agent = Agent::default();
    let good = r#"{"name":"a","type":"COUNTER","value":1}"#;
    let reply = agent.post("", format!("[{good},{{}},{good}]"));
    let want = r#"{"accepted":2,"rejected":1,"errors":[{"index":1,"reason":"empty_name"}]}"#;
    assert_eq!((reply.status, reply.text()), (200, want));
    let reply = agent.post("Content-Type: application/x-ndjson; charset=utf-8\r\n", format!("{good}\n{good}\n"));
    assert_eq!((reply.status, &reply.json()["accepted"]), (200, &json!(2)));
    let reply = agent.post("Content-Type: application/x-ndjson\r\n", good);
    assert_eq!((reply.status, reply.json()), (200, json!({ "accepted": 1, "rejected": 0, "errors": [] })));
    let bad = "{\"name\":\"a\",\"type\"";
    let reply =
        agent.post("Content-Type: application/x-ndjson\r\n", format!("{bad}\n\n{good}\n[{good}]\n\u{fe}\n a:1|c\n"));
    let told =
        reply.json()["errors"].as_array().map(|errors| errors.iter().map(|error| error["index"].clone()).collect());
    assert_eq!(
        (reply.status, &reply.json()["accepted"], told),
        (200, &json!(1), Some(vec![json!(0), json!(2), json!(3), json!(4)]))
    );
    let reply = agent.post("Content-Type: application/x-ndjson\r\n", [good.as_bytes(), b"\n\xff\n"].concat());
    assert_eq!(reply.json()["errors"], json!([{ "index": 1, "reason": "invalid_utf8" }]));
    assert_eq!(agent.post("Content-Type: application/x-ndjson\r\n", "x\ny").problem(400)["rejected"], 2);
    assert_eq!(
        agent.post("Content-Type: application/x-ndjson\r\n", "\n \n").problem(400)["detail"],
        "ERROR: empty input"
    );
    let reply = agent.post("", "[]");
    assert_eq!((reply.status, reply.json()), (200, json!({ "accepted": 0, "rejected": 0, "errors": [] })));
    assert_eq!(agent.get("/data/metrics/a").json()["value"], 7);
}

#[test]
fn bodies_are_answered_as_the_corpus_says() {
    let corpus = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/lines.jsonl"));
    let cases = corpus.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut asked = 0;
    for case in cases.filter(|case| case["http"].is_object()) {
        let agent = Agent::default();
        let reply = agent.post("Content-Type: application/json\r\n", case["input"].as_str().unwrap());
        assert_eq!(u64::from(reply.status), case["http"]["status"].as_u64().unwrap(), "{case} {reply:?}");
        let text = if reply.status == 200 { reply.text().to_owned() } else { reply.json()["detail"].to_string() };
        assert!(text.contains(case["http"]["body"].as_str().unwrap_or_default()), "{case} {text}");
        if let Some(reason) = case["error"].as_str() {
            assert_eq!(reply.problem(400)["reason"], reason, "{case}");
        }
        asked += 1;
    }
    assert!(asked > 8, "only {asked} cases");
}

#[test]
fn what_can_not_be_accepted_is_told_with_its_reason() {
    let agent = Agent::default();
    for empty in ["", "  \n", "{}", r#"{"level":"a","type":"COUNTER","value":1}"#] {
        let problem = agent.post("", empty).problem(400);
        assert_eq!(problem["detail"], "ERROR: empty input", "{empty:?}");
        assert!(problem["reason"].is_string());
    }
    let problem = agent.post("", "{\"name\":\"b\",").problem(400);
    assert_eq!(problem["reason"], "bad_json");
    assert!(problem["line"].is_u64() && problem["column"].is_u64(), "{problem}");
    assert_eq!(agent.post("", "[{},{}]").problem(400)["rejected"], 2);
    assert_eq!(agent.post("", r#"{"name":"b","type":"TIMER"}"#).problem(400)["reason"], "empty_value");
    for media_type in ["text/plain", "application/x-www-form-urlencoded", "", "json"] {
        agent.post(&format!("Content-Type: {media_type}\r\n"), RECORD).problem(415);
    }
    for key in [String::new(), "k".repeat(256)] {
        let problem = agent.post(&format!("Idempotency-Key: {key}\r\n"), RECORD).problem(400);
        assert_eq!(problem["reason"], "bad_idempotency_key");
    }
    agent.get("/data/metrics/application.server.get.timer").problem(404);
}

fn compressed(coding: &str, body: &[u8]) -> Vec<u8> {
    use flate2::{Compression, write};
    let level = Compression::fast();
    match coding {
        "gzip" => {
            let mut encoder = write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap()
        }
        "deflate" => {
            let mut encoder = write::ZlibEncoder::new(Vec::new(), level);
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap()
        }
        "raw" => {
            let mut encoder = write::DeflateEncoder::new(Vec::new(), level);
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap()
        }
        "zstd" => zstd::encode_all(body, 3).unwrap(),
        other => panic!("{other}"),
    }
}

#[test]
fn bodies_are_inflated_within_limits() {
    let agent = Agent::start(|limits| limits.inflated = Size(100_000));
    for (coding, named) in [("gzip", "GZip"), ("deflate", "deflate"), ("raw", "deflate"), ("zstd", "zstd")] {
        let header = format!("Content-Encoding: {named}\r\n");
        let reply = agent.post(&header, compressed(coding, RECORD.as_bytes()));
        assert_eq!((reply.status, reply.text()), (200, "Record server.get.timer UPDATED"), "{coding}");
        agent.post(&header, compressed(coding, &vec![b' '; 10_000_000])).problem(413);
        let whole = compressed(coding, RECORD.as_bytes());
        for broken in [RECORD.as_bytes(), &whole[..whole.len() / 2]] {
            assert_eq!(agent.post(&header, broken).problem(400)["reason"], "bad_encoding", "{coding}");
        }
    }
    for coding in ["br", "gzip, gzip"] {
        let reply = agent.post(&format!("Content-Encoding: {coding}\r\n"), RECORD);
        reply.problem(415);
        assert_eq!(reply.header("accept-encoding"), Some("gzip, deflate, zstd"));
    }
}

#[test]
fn bodies_are_bounded_alone_and_together() {
    let agent = Agent::start(|limits| {
        limits.body = Size(1_000);
        limits.bodies = Size(1_500);
    });
    agent.post("", vec![b' '; 1_001]).problem(413);
    let mut chunked = Client::to(agent.ingest);
    chunked.send("POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = format!("190\r\n{}\r\n", " ".repeat(400)); // 0x190
    (0..3).for_each(|_| chunked.send(&chunk));
    chunked.reply(false).problem(413);
    // One body is held half-way; another of the same size does not fit beside it.
    let mut slow = Client::to(agent.ingest);
    slow.send("POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 950\r\n\r\n");
    slow.send(" ".repeat(900));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let reply = agent.post("", vec![b' '; 950]);
        if reply.status == 503 {
            reply.problem(503);
            assert_eq!(reply.header("retry-after"), Some("1"));
            break;
        }
        assert!(Instant::now() < deadline, "{reply:?}");
    }
    slow.send(" ".repeat(50));
    slow.reply(false).problem(400);
    agent.post("", vec![b' '; 950]).problem(400);
}

#[test]
fn one_idempotency_key_counts_once() {
    let agent = Agent::default();
    let clients = (0..8).map(|_| {
        let address = agent.ingest;
        std::thread::spawn(move || {
            let head = "POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: k1\r\n";
            Client::to(address).ask(format!("{head}Content-Length: {}\r\n\r\n{RECORD}", RECORD.len())).text().to_owned()
        })
    });
    let clients: Vec<_> = clients.collect();
    for client in clients {
        assert_eq!(client.join().unwrap(), "Record server.get.timer UPDATED");
    }
    assert_eq!(agent.get("/data/metrics/application.server.get.timer").json()["count"], 1);
    agent.post("Idempotency-Key: k2\r\n", "{}").problem(400);
    assert_eq!(agent.post("Idempotency-Key: k2\r\n", RECORD).status, 200);
    assert_eq!(agent.get("/data/metrics/application.server.get.timer").json()["count"], 2);
}

#[test]
fn a_list_is_paged_by_links() {
    let agent = Agent::start(|limits| limits.page = 50);
    let records: Vec<_> = (0..25).map(|n| format!(r#"{{"name":"a.{n:02};%","type":"COUNTER","value":1}}"#)).collect();
    agent.post("", format!("[{}]", records.join(",")));
    let mut next = "/data/metrics?limit=10&quantiles=0.5".to_owned();
    let mut names = Vec::new();
    for expected in [10, 10, 5] {
        let reply = agent.get(&next);
        let page = reply.json();
        assert_eq!(page.as_array().unwrap().len(), expected);
        names.extend(page.as_array().unwrap().iter().map(|metric| metric["name"].as_str().unwrap().to_owned()));
        let link = reply.header("link").map(str::to_owned);
        assert_eq!(link.is_some(), expected == 10, "{reply:?}");
        next = link.map_or(String::new(), |link| {
            link.strip_prefix('<').unwrap().strip_suffix(">; rel=\"next\"").unwrap().to_owned()
        });
    }
    let want: Vec<_> = (0..25).map(|n| format!("{n:02};%")).collect();
    assert_eq!(names, want);
    for wrong in ["limit=0", "limit=51", "limit=x", "cursor=x", "type=x", "scope=x", "quantiles=2"] {
        agent.get(&format!("/data/metrics?{wrong}")).problem(400);
    }
}

#[test]
fn a_key_is_found_as_printed_and_as_escaped() {
    let agent = Agent::default();
    agent.post("", r#"{"name":"a/b;c%","type":"COUNTER","value":1}"#);
    for path in ["a%2Fb%3Bc%25", "a%2fb%3bc%25", "a%252Fb%253Bc%2525", "%61%2Fb%3Bc%25"] {
        assert_eq!(agent.get(&format!("/data/metrics/{path}")).status, 200, "{path}");
    }
    for path in ["a%ZZ", "%", "%FF", "a;b;c", "x/y/z", "%00"] {
        agent.get(&format!("/data/metrics/{path}")).problem(404);
    }
    let delete = |path: &str| {
        Client::to(agent.api).ask(format!("DELETE /data/metrics/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    };
    delete("a%2Fb%3Bc%25?type=TIMER").problem(404);
    let reply = delete("a%252Fb%253Bc%2525");
    assert_eq!((reply.status, reply.text()), (200, "Record a%2Fb%3Bc%25 DELETED"));
    delete("a%2Fb%3Bc%25").problem(404);
}

#[test]
fn paths_and_methods_are_those_of_the_table() {
    let agent = Agent::default();
    agent.get("/nothing").problem(404);
    agent.get("/ingest/metrics").problem(404);
    agent.get("/data/metrics/").problem(404);
    let reply = Client::to(agent.ingest).ask("GET /ingest/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    reply.problem(405);
    assert_eq!(reply.header("allow"), Some("POST, OPTIONS"));
    let reply = Client::to(agent.api).ask("PATCH /data/metrics/a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    reply.problem(405);
    assert_eq!(reply.header("allow"), Some("GET, DELETE, HEAD, OPTIONS"));
    let reply = Client::to(agent.api).ask("OPTIONS /data/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!((reply.status, reply.header("allow")), (204, Some("GET, HEAD, OPTIONS")));
    assert_eq!(Client::to(agent.api).ask("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 204);
    let reply = Client::to(agent.api).ask("HEAD /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!((reply.status, reply.header("content-length")), (200, Some("26")));
    assert_eq!(agent.get("/health/ping").text(), "pong (metrics-api service)");
    let reply = Client::to(agent.ingest).ask("GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(reply.text(), "pong (metrics-ingest service)");
    let get = |address, path: &str| Client::to(address).ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    get(agent.scrape, "/data/metrics").problem(404);
}

#[test]
fn a_scrape_shows_what_was_answered_200_and_how_requests_fared() {
    let agent = Agent::default();
    agent.post("", r#"{"name":"scraped","type":"COUNTER","value":3}"#);
    let whole = |address| {
        let mut client = Client::to(address);
        client.send("GET /metrics HTTP/1.0\r\n\r\n");
        let mut text = String::new();
        client.0.read_to_string(&mut text).unwrap();
        text
    };
    for address in [agent.scrape, agent.api] {
        let text = whole(address);
        assert!(text.starts_with("HTTP/1.0 200 OK\r\n") && text.contains("version=0.0.4"), "{text}");
        assert!(text.contains("\nscraped 3\n"), "{text}");
        assert!(
            text.contains(r#"tallyd_http_requests_total{listener="ingest",route="/ingest/metrics",code="200"}"#),
            "{text}"
        );
    }
}

#[test]
fn ready_says_why_not_and_where() {
    let agent = Agent::default();
    assert_eq!(agent.get("/-/healthy").status, 200);
    let reply = agent.get("/-/ready");
    assert_eq!((reply.status, reply.json()["reasons"].as_array().unwrap().len()), (503, 1));
    agent.health.started([("http.api".to_owned(), vec![agent.api.to_string()])].into());
    let reply = agent.get("/-/ready");
    assert_eq!((reply.status, &reply.json()["addresses"]["http.api"][0]), (200, &json!(agent.api.to_string())));
    agent.health.stopping();
    assert_eq!(agent.get("/-/ready").json()["reasons"], json!(["stopping"]));
    let reload = || Client::to(agent.api).ask("POST /-/reload HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(reload().status, 200);
    assert_eq!(reload().problem(422)["errors"], json!(["flush.interval = 0s"]));
}

#[test]
fn only_our_own_pages_may_ask() {
    let agent = Agent::default();
    let ask = |headers: &str| Client::to(agent.api).ask(format!("GET /health/ping HTTP/1.1\r\n{headers}\r\n"));
    for host in [
        "localhost",
        "LOCALHOST:7000",
        "127.0.0.1",
        "127.8.8.8:1",
        "[::1]:7000",
        "[::1]",
        "tally.example",
        "Tally.example:80",
    ] {
        assert_eq!(ask(&format!("Host: {host}\r\n")).status, 200, "{host}");
    }
    for host in [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1:7000",
        "",
        "[::2]",
        "127.0.0.1@evil",
    ] {
        ask(&format!("Host: {host}\r\n")).problem(403);
    }
    ask("").problem(400);
    ask("Host: localhost\r\nHost: localhost\r\n").problem(400);
    Client::to(agent.api).ask("GET http://evil.example/health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n").problem(403);
    assert_eq!(Client::to(agent.api).ask("GET /health/ping HTTP/1.0\r\n\r\n").status, 200);
    let from = |origin: &str| ask(&format!("Host: localhost:7000\r\nOrigin: {origin}\r\n"));
    for origin in ["http://localhost:7000", "HTTP://LOCALHOST:7000", "https://tally.example"] {
        assert_eq!(from(origin).status, 200, "{origin}");
    }
    for origin in ["null", "http://localhost:3000", "http://evil.example", "http://127.0.0.1:7000", "", "x"] {
        from(origin).problem(403);
    }
    assert_eq!(ask("Host: localhost:80\r\nOrigin: http://localhost\r\n").status, 200);
}

#[test]
fn heads_are_bounded() {
    let agent = Agent::default();
    let ask = |path: &str, headers: &str| {
        Client::to(agent.api).ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"))
    };
    ask(&format!("/{}", "a".repeat(4_000)), "").problem(404);
    for length in [4_200, 30_000, 70_000, 300_000] {
        ask(&format!("/{}", "a".repeat(length)), "").problem(414);
    }
    assert_eq!(ask("/health/ping", &format!("X: {}\r\n", "b".repeat(16_000))).status, 200);
    for length in [17_000, 300_000] {
        ask("/health/ping", &format!("X: {}\r\n", "b".repeat(length))).problem(431);
    }
    assert_eq!(ask("/health/ping", &"X: y\r\n".repeat(63)).status, 200);
    for lines in [64, 300, 2_000] {
        ask("/health/ping", &"X: y\r\n".repeat(lines)).problem(431);
    }
    // Behind a request in the same segment only the parsed head is looked at.
    let first = "GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut client = Client::to(agent.api);
    client.send(format!("{first}GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(5_000)));
    assert_eq!(client.reply(false).status, 200);
    client.reply(false).problem(414);
}

#[test]
fn what_is_no_http_is_told_so_and_harms_nobody() {
    let agent = Agent::default();
    for garbage in [
        "\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a:1|c\na:1|c\n\n",
        "GET / HTTP/1.1\r\nbad header\r\n\r\n",
        "POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ] {
        let mut client = Client::to(agent.ingest);
        client.ask(garbage).problem(400);
        client.closed();
    }
    let mut client = Client::to(agent.ingest);
    let head = "POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.ask(format!("{head}zz\r\n")).problem(400);
    assert_eq!(agent.post("", RECORD).status, 200);
}

#[test]
fn requests_may_come_close_together_or_in_pieces() {
    let agent = Agent::default();
    let ping = "GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut client = Client::to(agent.api);
    client.send(format!("\r\n{}", ping.repeat(50)));
    for _ in 0..50 {
        assert_eq!(client.reply(false).status, 200);
    }
    for byte in ping.as_bytes() {
        client.send([*byte]);
    }
    assert_eq!(client.reply(false).status, 200);
    let mut old = Client::to(agent.api);
    assert_eq!(old.ask("GET /health/ping HTTP/1.0\r\n\r\n").status, 200);
    old.closed();
    // A body in chunks of every size, and the head's end in a segment of its own.
    let mut client = Client::to(agent.ingest);
    client.send("POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r");
    client.send("\n");
    RECORD.as_bytes().chunks(7).for_each(|part| {
        client.send(format!("{:x}\r\n{}\r\n", part.len(), std::str::from_utf8(part).unwrap()));
    });
    assert_eq!(client.ask("0\r\n\r\n").status, 200);
    // A client that waits to be told to go on.
    let head = format!(
        "POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        RECORD.len()
    );
    assert_eq!(client.ask(head).status, 100);
    assert_eq!(client.ask(RECORD).status, 200);
}

#[test]
fn slow_clients_are_let_go() {
    let agent = Agent::start(|limits| {
        limits.header_time = Time::millis(150);
        limits.body_time = Time::millis(150);
        limits.keep_alive = Time::millis(300);
    });
    let mut silent = Client::to(agent.api);
    let mut slow = Client::to(agent.api);
    slow.send("GET /health/ping HTTP/1.1\r\nHo");
    let mut body = Client::to(agent.ingest);
    body.send("POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{");
    let mut idle = Client::to(agent.api);
    let began = Instant::now();
    assert_eq!(idle.ask("GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 200);
    slow.reply(false).problem(408);
    slow.closed();
    body.reply(false).problem(408);
    silent.closed();
    idle.closed();
    assert!(began.elapsed() >= Duration::from_millis(290), "an idle connection was closed after {:?}", began.elapsed());
}

#[test]
fn a_client_that_does_not_read_is_let_go() {
    let agent = Agent::start(|limits| {
        limits.keep_alive = Time::millis(300);
        limits.http_connections = 1;
    });
    let mut deaf = Client::to(agent.api);
    deaf.send("GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(2_000));
    let deadline = Instant::now() + Duration::from_secs(10);
    while Client::to(agent.api).ask("GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n").status != 200 {
        assert!(Instant::now() < deadline, "it holds its place");
    }
    let mut told = Vec::new();
    let _reset_or_end = deaf.0.read_to_end(&mut told);
    assert!(told.len() < 2_000 * include_str!("openapi.json").len());
}

#[test]
fn connections_beyond_the_limit_are_told_so() {
    let agent = Agent::start(|limits| limits.http_connections = 2);
    let ping = "GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut held: Vec<_> = (0..2).map(|_| Client::to(agent.api)).collect();
    held.iter_mut().for_each(|client| assert_eq!(client.ask(ping).status, 200));
    let reply = Client::to(agent.api).reply(false);
    reply.problem(503);
    assert_eq!(reply.header("retry-after"), Some("1"));
    // The ingest has places of its own.
    assert_eq!(agent.post("", RECORD).status, 200);
    held.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Client::to(agent.api).ask(ping).status != 200 {
        assert!(Instant::now() < deadline, "the place was not given back");
    }
}

#[test]
fn a_stop_lets_the_request_under_way_finish() {
    let mut agent = Agent::default();
    let mut idle = Client::to(agent.ingest);
    assert_eq!(idle.ask("GET /health/ping HTTP/1.1\r\nHost: localhost\r\n\r\n").status, 200);
    let mut busy = Client::to(agent.ingest);
    let head = "POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n";
    let continued = busy.ask(format!("{head}Content-Length: {}\r\n\r\n", RECORD.len()));
    assert_eq!(continued.status, 100);
    agent.stop(Duration::from_secs(10));
    idle.closed();
    assert_eq!(busy.ask(RECORD).status, 200);
    busy.closed();
    let began = Instant::now();
    agent.ended();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(TcpStream::connect(agent.ingest).is_err());
}

#[test]
fn a_stop_does_not_wait_longer_than_its_grace() {
    let mut agent = Agent::default();
    let mut stuck = Client::to(agent.ingest);
    stuck.send("POST /ingest/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n");
    let began = Instant::now();
    agent.stop(Duration::from_millis(50));
    agent.ended();
    assert!(began.elapsed() < Duration::from_secs(5));
}

fn bind_api(addresses: &[String]) -> Result<Vec<Socket>, Error> {
    bind(Use::Api, addresses, &mut Inherited::default())
}

#[test]
fn addresses_are_bound_or_named() {
    let (_held, address) = bound();
    let error = bind_api(&[address.to_string()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("http.api = \"{address}\": in use; stop the other program there, or take another port")
    );
    assert!(matches!(bind_api(&["localhost".to_owned()]), Err(Error::Address { .. })));
    let elsewhere = bind_api(&["192.0.2.1:0".to_owned()]).unwrap_err();
    assert_eq!(elsewhere.to_string(), "http.api = \"192.0.2.1:0\": no address of this host; name one that it has");
    assert_eq!((error.exit_code(), elsewhere.exit_code()), (69, 69));
    let denied = ErrorKind::PermissionDenied.into();
    let denied = Error::Bind { key: "api", address: "127.0.0.1:80".parse().unwrap(), error: denied };
    assert!(denied.to_string().contains("CAP_NET_BIND_SERVICE") && denied.exit_code() == 77, "{denied}");
    assert_eq!(bind_api(&["127.0.0.1:0".to_owned()]).unwrap().len(), 1);
}

#[test]
fn only_a_loopback_of_ipv6_beside_its_twin_may_be_missing() {
    let both = |port: u16| [format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
    for list in [Config::default().ingest, Config::default().api, both(9000).to_vec()] {
        assert!(has_twin(list[1].parse().unwrap(), &list) && !has_twin(list[0].parse().unwrap(), &list), "{list:?}");
    }
    assert!(!has_twin("[::1]:9001".parse().unwrap(), &both(9000)));
    assert!(!has_twin("[fe80::1]:9000".parse().unwrap(), &both(9000)));
}

#[test]
fn the_document_describes_every_route() {
    let document: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
    let mut described: Vec<String> = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let methods = item.as_object().unwrap().keys().filter(|key| !matches!(key.as_str(), "parameters" | "servers"));
        described.extend(methods.map(|method| format!("{} {path}", method.to_uppercase())));
    }
    let routes =
        ROUTES.iter().flat_map(|route| route.methods.iter().map(|(method, _)| format!("{method} {}", route.template)));
    let mut routes: Vec<_> = routes.collect();
    routes.sort();
    described.sort();
    assert_eq!(described, routes);
}

/// The document names for each request the token that it needs where tokens are configured: its right's, or an admin's.
#[test]
fn the_document_says_which_token_each_request_needs() {
    let document: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
    let schemes = document["components"]["securitySchemes"].as_object().unwrap();
    for right in Right::GIVEN {
        let scheme = &schemes[right.name()];
        assert_eq!((&scheme["type"], &scheme["scheme"]), (&json!("http"), &json!("bearer")), "{right:?}");
    }
    for route in ROUTES {
        for (method, right) in route.methods {
            let operation = &document["paths"][route.template][method.to_lowercase()];
            let expected = match right {
                Right::Open => Value::Null,
                Right::Admin => json!([{}, { "admin": [] }]),
                Right::Write | Right::Read => json!([{}, { right.name(): [] }, { "admin": [] }]),
            };
            assert_eq!(operation["security"], expected, "{method} {}", route.template);
            for status in ["401", "403"] {
                let is_told = *right == Right::Open || operation["responses"][status].is_object();
                assert!(is_told, "{method} {}: {status}", route.template);
            }
        }
    }
}

/// Pieces of requests, whole and broken; put together in any order they are what a confused client sends.
const PIECES: [&str; 22] = [
    "GET /health/ping HTTP/1.1\r\n",
    "GET /data/metrics?limit=%zz&cursor=%00 HTTP/1.1\r\n",
    "HEAD /data/metrics/%ff%;=%3b HTTP/1.1\r\n",
    "POST /ingest/metrics HTTP/1.1\r\n",
    "DELETE /data/metrics/a HTTP/1.0\r\n",
    "CONNECT a:1 HTTP/1.1\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "Host: localhost\r\n",
    "Host: \u{fffd}\r\n",
    "Origin: :\r\n",
    "Content-Length: 5\r\n",
    "Content-Length: 99999999999999999999\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: gzip, chunked\r\n",
    "Expect: 100-continue\r\n",
    "Upgrade: websocket\r\nConnection: Upgrade\r\n",
    "Content-Encoding: zstd\r\n",
    "Accept: *;q=x\r\nAccept-Encoding: gzip\r\n",
    "\r\n",
    "5\r\n{\"a\":\r\n",
    "0\r\n\r\n",
    "\0\u{7f}[[[[",
];

#[test]
fn nothing_a_client_sends_is_answered_with_500_or_ends_anything() {
    let agent = Agent::start(|limits| {
        limits.header_time = Time::millis(200);
        limits.body_time = Time::millis(200);
        limits.keep_alive = Time::millis(200);
    });
    let pieces = prop::collection::vec(prop::sample::select(&PIECES[..]), 1..9);
    let law = |pieces: Vec<&str>| {
        for address in [agent.ingest, agent.api] {
            let mut client = Client::to(address);
            client.send(pieces.concat());
            client.0.get_mut().shutdown(Shutdown::Write).unwrap();
            let mut told = Vec::new();
            client.0.read_to_end(&mut told).unwrap();
            let told = String::from_utf8_lossy(&told);
            prop_assert!(!told.contains("HTTP/1.1 5") && !told.contains("HTTP/1.0 5"), "{told}");
            prop_assert!(told.is_empty() || told.starts_with("HTTP/1."), "{told}");
        }
        Ok(())
    };
    let mut runner = TestRunner::new(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() });
    runner.run(&pieces, law).unwrap();
    assert_eq!(agent.get("/health/ping").status, 200);
    assert_eq!(agent.post("", RECORD).status, 200);
}
