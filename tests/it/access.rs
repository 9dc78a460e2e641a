//! Who may do what, and by which way: tokens, TLS and the users behind unix sockets, with curl and openssl as peers.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, PATIENCE, until};
use crate::handover::with_sockets;
use crate::http::{self, Answer};
use crate::redis_servers::Server;

const WRITE: &str = "write-canary-0123456789";
const READ: &str = "read-canary-0123456789";
const ADMIN: &str = "admin-canary-0123456789";

/// Writes a file that only its owner may read, and gives its name.
pub fn secret(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path.display().to_string()
}

/// Settings that name a file of tokens for each right.
fn tokens(directory: &Path) -> Vec<String> {
    let files = [("write", WRITE), ("read", READ), ("admin", ADMIN)];
    files.map(|(right, token)| format!("http.tokens.{right}_file={}", secret(directory, right, token))).to_vec()
}

fn words(settings: &[String]) -> Vec<&str> {
    settings.iter().map(String::as_str).collect()
}

fn ask(to: SocketAddr, method: &str, path: &str, token: Option<&str>) -> Answer {
    let value = token.map(|token| format!("Bearer {token}"));
    let mut headers = vec![("Content-Type", "application/json")];
    headers.extend(value.as_deref().map(|value| ("Authorization", value)));
    let body = if path == "/ingest/metrics" { r#"{"name":"n","type":"COUNTER","value":1}"# } else { "" };
    http::request(to, method, path, &headers, body.as_bytes())
}

#[test]
fn each_token_has_its_rights_on_every_route() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = tokens(directory.path());
    settings.extend(["http.scrape=127.0.0.1:0", "log.level=trace"].map(str::to_owned));
    let agent = Agent::start(&words(&settings));
    let document: Value = serde_json::from_str(include_str!("../../src/http/openapi.json")).unwrap();
    let mut denied = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(name, _)| name.len() < 7) {
            let on = if path == "/ingest/metrics" { "ingest" } else { "api" };
            let path = path.replace("{key}", "missing");
            denied += check_route(&agent, on, &method.to_uppercase(), &path, &operation["security"]);
        }
    }
    denied += check_route(&agent, "scrape", "GET", "/metrics", &serde_json::json!([{}, { "read": [] }]));
    // What is open stays so for whoever watches over the process.
    for (on, path) in [("ingest", "/health/ping"), ("api", "/health/ping"), ("api", "/-/healthy"), ("api", "/-/ready")]
    {
        assert_eq!(ask(agent.address(on), "GET", path, None).status, 200, "{path}");
    }
    let scrape = ask(agent.address("api"), "GET", "/metrics", Some(READ)).text();
    let count = |line: &str| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap();
    let counted: u32 = scrape.lines().filter(|line| line.starts_with("tallyd_http_denied_total{")).map(count).sum();
    assert_eq!(counted, denied);
    until("the log to tell", || agent.stderr().contains("request denied").then_some(()));
    no_token_is_told(&agent);
}

/// Asks with every token and without; gives how often it was denied.
fn check_route(agent: &Agent, on: &str, method: &str, path: &str, security: &Value) -> u32 {
    let needs = |right: &str| security.as_array().is_some_and(|list| list.iter().any(|one| one.get(right).is_some()));
    if security.is_null() {
        return 0;
    }
    let to = agent.address(on);
    let mut denied = 0;
    for token in [None, Some("nobody-has-this-token"), Some(WRITE), Some(READ), Some(ADMIN)] {
        let answer = ask(to, method, path, token);
        let expected = match token {
            None | Some("nobody-has-this-token") => 401,
            Some(ADMIN) => 200,
            Some(WRITE) if needs("write") => 200,
            Some(READ) if needs("read") => 200,
            Some(_) => 403,
        };
        if expected == 200 {
            assert!(![401, 403].contains(&answer.status), "{method} {path} {token:?}: {}", answer.text());
            continue;
        }
        denied += 1;
        assert_eq!(answer.status, expected, "{method} {path} {token:?}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert_eq!(answer.header("connection"), (expected == 401).then_some("close"));
        let challenge = answer.header("www-authenticate").unwrap();
        assert!(challenge.starts_with("Bearer realm=\"tallyd\""), "{challenge}");
        assert_eq!(answer.json()["status"], expected);
    }
    // HEAD needs what GET needs, and OPTIONS says what there is to everybody.
    if method == "GET" {
        assert_eq!(http::request(to, "HEAD", path, &[], b"").status, 401, "{path}");
        denied += 1;
    }
    assert_eq!(http::request(to, "OPTIONS", path, &[], b"").status, 204, "{path}");
    denied
}

/// Neither the log, nor an answer that everybody gets, nor the arguments hold a token.
fn no_token_is_told(agent: &Agent) {
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", agent.process())).unwrap();
    let environment = fs::read(format!("/proc/{}/environ", agent.process())).unwrap();
    let ready = agent.get("/-/ready").text();
    for text in [arguments, String::from_utf8_lossy(&environment).into_owned(), ready, agent.stderr()] {
        assert!(!text.contains("canary"), "{text}");
        assert!(!text.contains("nobody-has-this-token"), "{text}");
    }
}

#[test]
fn naming_one_file_of_tokens_leaves_no_other_change_to_everybody() {
    let directory = tempfile::tempdir().unwrap();
    let [write, read, _] = tokens(directory.path()).try_into().unwrap();
    for (file, post, get) in [(write, 401, 200), (read, 403, 401)] {
        let agent = Agent::start(&[&file]);
        let status = |on: &str, method: &str, path: &str| ask(agent.address(on), method, path, None).status;
        assert_eq!(status("ingest", "POST", "/ingest/metrics"), post, "{file}");
        assert_eq!(status("api", "GET", "/data/metrics"), get, "{file}");
        let refused = ask(agent.address("api"), "POST", "/-/reload", Some(WRITE));
        assert!(refused.status == 403 && refused.text().contains("http.tokens.admin_file"), "{}", refused.text());
        assert_eq!(status("api", "DELETE", "/data/metrics/none"), 403, "{file}");
    }
}

#[test]
fn tokens_are_changed_by_a_reload_together_with_the_rest_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let file = secret(directory.path(), "read", &format!("# since May\n{READ}\n"));
    let admin = secret(directory.path(), "admin", ADMIN);
    let of = |more: &str| format!("{more}\n[http.tokens]\nread_file = {file:?}\nadmin_file = {admin:?}\n");
    let agent = Agent::start_with_file(&of(""));
    let reads = |token: &str| ask(agent.address("api"), "GET", "/data/metrics", Some(token)).status;
    let reload = || ask(agent.address("api"), "POST", "/-/reload", Some(ADMIN));
    let new = "the-next-token-0123456789";
    assert_eq!((reads(READ), reads(new)), (200, 401));

    // Both while one follows the other, then the new one alone.
    secret(directory.path(), "read", &format!("{READ}\n{new}\n"));
    let told = reload();
    assert_eq!(told.json()["changed"], serde_json::json!(["http.tokens.read_file"]), "{}", told.text());
    until("the log to say the same", || agent.stderr().contains("http.tokens.read_file").then_some(()));
    assert_eq!((reads(READ), reads(new)), (200, 200));
    secret(directory.path(), "read", new);
    agent.signal("HUP");
    until("the old token to be unknown", || (reads(READ) == 401).then_some(()));
    assert_eq!(reads(new), 200);

    // One bad thing, and nothing else of that reload comes into force.
    secret(directory.path(), "read", "short");
    agent.write_file(&of("[protocol]\nname_policy = 'none'"));
    let refused = reload();
    assert_eq!(refused.status, 422, "{}", refused.text());
    let errors: Vec<String> = serde_json::from_value(refused.json()["errors"].clone()).unwrap();
    assert!(
        errors.len() == 1 && errors[0].contains("http.tokens.read_file = ") && errors[0].contains("line 1"),
        "{errors:?}"
    );
    assert!(errors[0].contains("tallyd.toml:4:13: "), "{errors:?}");
    until("the log to say the same", || agent.stderr().contains(&errors[0]).then_some(()));
    assert_eq!(reads(new), 200);
    agent.datagram("a b:1|c");
    until("the old policy", || {
        let answer = ask(agent.address("api"), "GET", "/data/metrics/a_b", Some(new));
        (answer.status == 200).then_some(())
    });

    // What needs a restart is named, and what does not waits for it.
    secret(directory.path(), "read", READ);
    agent.write_file(&of("[flush]\nwindow = '20s'\n[store]\nkind = 'memory'"));
    let refused = reload().text();
    assert!(refused.contains("flush.window, store.kind: change only with a restart"), "{refused}");
    assert_eq!((reads(READ), reads(new)), (401, 200));
    agent.write_file(&of(""));
    assert_eq!(reload().status, 200);
    assert_eq!((reads(READ), reads(new)), (200, 401));
    assert!(!agent.stderr().contains(new) && !agent.stderr().contains(READ));
}

/// The certificates of one authority.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::<String>::new()).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, "an authority");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let authority = Self { issuer, directory: tempfile::tempdir().unwrap() };
        secret(authority.directory.path(), "ca", &authority.issuer.pem());
        authority
    }

    /// The name of the authority's own certificate.
    fn ca(&self) -> String {
        self.directory.path().join("ca").display().to_string()
    }

    /// Writes a certificate that ends so many days from now, and its key, by these names.
    fn issue(&self, name: &str, days: u64) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        parameters.not_before = (SystemTime::now() - Duration::from_secs(3_600)).into();
        parameters.not_after = (SystemTime::now() + Duration::from_secs(days * 24 * 3_600 + 60)).into();
        let cert = parameters.signed_by(&key, &self.issuer).unwrap();
        let write = |kind: &str, text: &str| secret(self.directory.path(), &format!("{name}.{kind}"), text);
        (write("pem", &cert.pem()), write("key", &key.serialize_pem()))
    }

    /// Settings of a server with the certificate `name`.
    fn settings(&self, name: &str, days: u64) -> Vec<String> {
        let (cert, key) = self.issue(name, days);
        vec![format!("tls.cert_file={cert}"), format!("tls.key_file={key}")]
    }

    /// A TLS connection that trusts this authority, with a certificate of its own if one is named.
    fn connect(&self, to: SocketAddr, own: Option<&(String, String)>) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.ca()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots);
        let config = match own {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = vec![CertificateDer::from_pem_file(cert).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap()).unwrap()
            }
        };
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // What was written is on its way, not kept until what came before is acknowledged.
        stream.set_nodelay(true).unwrap();
        StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
    }
}

fn curl(arguments: &[&str]) -> Output {
    Command::new("curl").args(["-sS", "--max-time", "20"]).args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), output.stderr.as_slice()].concat()).into_owned()
}

#[test]
fn tls_is_spoken_by_http_and_by_streams_of_lines() {
    let authority = Authority::new();
    let mut settings = authority.settings("server", 100);
    settings.extend(
        ["listen.tcp=127.0.0.1:0,tls://127.0.0.1:0", "http.api=127.0.0.1:0,tls://127.0.0.1:0"].map(str::to_owned),
    );
    settings.extend(["http.ingest=tls://127.0.0.1:0", "http.scrape=tls://127.0.0.1:0"].map(str::to_owned));
    let agent = Agent::start(&words(&settings));
    let [lines, api] = ["tcp", "api"].map(|listener| agent.addresses(listener)[1]);
    let trust = ["--cacert", &authority.ca()];
    let https = |to: SocketAddr, path: &str, more: &[&str]| {
        let url = format!("https://localhost:{}{path}", to.port());
        curl(&[&trust[..], more, &[&url]].concat())
    };
    let body = r#"{"name":"https","type":"COUNTER","value":3}"#;
    let json = ["-H", "Content-Type: application/json", "-d", body];
    assert_eq!(said(&https(agent.address("ingest"), "/ingest/metrics", &json)), "Record https UPDATED");
    assert!(said(&https(api, "/data/metrics/https", &[])).contains("\"value\":3"));
    for version in ["1.2", "1.3"] {
        let limits = ["--tlsv1.2", "--tls-max", version];
        assert!(said(&https(agent.address("scrape"), "/metrics", &limits)).contains("\nhttps 3\n"), "{version}");
    }
    assert!(!https(api, "/data/metrics/https", &["--tls-max", "1.1"]).status.success());

    // Lines by openssl, cut anywhere, and by a client that stays.
    let connect = format!("127.0.0.1:{}", lines.port());
    let mut openssl = Command::new("openssl")
        .args(["s_client", "-quiet", "-verify_return_error", "-CAfile", &authority.ca(), "-connect", &connect])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    openssl.stdin.take().unwrap().write_all(b"openssl:1|c\nopenssl:2|c\n").unwrap();
    agent.wait_for("openssl", "value", 3);
    drop(openssl.kill());
    openssl.wait().unwrap();
    let mut client = authority.connect(lines, None);
    client.write_all(b"tls:1|c\ntl").unwrap();
    agent.wait_for("tls", "value", 1);
    client.write_all(b"s:4|c\nlast:1|c").unwrap();
    agent.wait_for("tls", "value", 5);
    // A last line needs no line feed where the end is a proper one.
    client.conn.send_close_notify();
    client.flush().unwrap();
    agent.wait_for("last", "value", 1);
    assert_eq!(agent.own("tallyd_tls_handshakes_total", "listener=\"tcp\""), 2.0);
    let expiry = agent.own("tallyd_tls_certificate_expiry_timestamp_seconds", "");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((expiry - now - 100.0 * 86_400.0).abs() < 3_600.0, "{expiry}");
    let ready = agent.get("/-/ready").text();
    assert!(ready.contains(&format!("tls://{lines}")) && ready.contains("\"warnings\":[]"), "{ready}");
}

#[test]
fn what_does_not_come_to_tls_is_counted_and_ends_nothing() {
    let authority = Authority::new();
    let mut settings = authority.settings("server", 3);
    let more = ["listen.tcp=127.0.0.1:0,tls://127.0.0.1:0", "http.api=127.0.0.1:0,tls://127.0.0.1:0"];
    settings.extend(more.map(str::to_owned));
    settings.extend(["limits.header_time=500ms", "limits.connections=1"].map(str::to_owned));
    let agent = Agent::start(&words(&settings));
    let failed = |listener: &str, reason: &str| {
        let labels = format!("listener=\"{listener}\",reason=\"{reason}\"");
        until(&labels, || (agent.own("tallyd_tls_failed_total", &labels) >= 1.0).then_some(()));
    };
    let [[lines, lines_tls], [api, api_tls]] =
        ["tcp", "api"].map(|listener| [agent.addresses(listener)[0], agent.addresses(listener)[1]]);

    // Something else to an address of TLS.
    let told = http::raw(api_tls, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(told.status == 400 && told.text().contains("https://"), "{}", told.text());
    failed("api", "plaintext");
    TcpStream::connect(lines_tls).unwrap().write_all(b"plain:1|c\n").unwrap();
    failed("tcp", "plaintext");

    // TLS to other addresses.
    let trust = ["--cacert", &authority.ca()];
    assert!(!curl(&[&trust[..], &[&format!("https://localhost:{}/", api.port())]].concat()).status.success());
    failed("api", "unexpected");
    let mut client = authority.connect(lines, None);
    assert!(client.write_all(b"tls:1|c\n").and_then(|()| client.flush()).is_err());
    failed("tcp", "unexpected");
    assert_eq!(agent.own("tallyd_lines_rejected_total", "reason=\"tls_hello\""), 1.0);

    // Nothing at all: the seat, of which there is one, is given back in time.
    let mut silent = TcpStream::connect(lines_tls).unwrap();
    failed("tcp", "timeout");
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    // Rubbish, and a client that does not trust us.
    let mut rubbish = TcpStream::connect(api_tls).unwrap();
    rubbish.write_all(&[0x16, 3, 1, 0, 4, 0x63, 0, 0, 0]).unwrap();
    failed("api", "protocol");
    assert!(!curl(&[&format!("https://localhost:{}/", api_tls.port())]).status.success());
    failed("api", "alert");

    let mut client = authority.connect(lines_tls, None);
    client.write_all(b"at_last:1|c\n").unwrap();
    agent.wait_for("at_last", "value", 1);
    assert!(agent.metric("plain").is_none() && agent.metric("tls").is_none());
    // A certificate that ends soon is spoken of, and no reason not to be ready.
    let ready = agent.get("/-/ready");
    assert!(ready.status == 200 && ready.text().contains("expires at "), "{}", ready.text());
}

#[test]
fn a_stream_in_tls_keeps_the_limits_of_all_streams() {
    let authority = Authority::new();
    let mut settings = authority.settings("server", 100);
    let more =
        ["listen.tcp=tls://127.0.0.1:0", "limits.line=64B", "limits.stream_idle=2s", "limits.partial_line=400ms"];
    settings.extend(more.map(str::to_owned));
    let agent = Agent::start(&words(&settings));
    let rejected = |reason: &str| {
        let labels = format!("reason=\"{reason}\"");
        until(&labels, || (agent.own("tallyd_lines_rejected_total", &labels) >= 1.0).then_some(()));
    };
    let mut client = authority.connect(agent.address("tcp"), None);
    client.write_all(format!("{}:1|c\nafter:1|c\n", "long".repeat(50_000)).as_bytes()).unwrap();
    agent.wait_for("after", "value", 1);
    rejected("line_too_long");
    client.write_all(b"never_ended:1").unwrap();
    rejected("partial_line");
    // The end is said in TLS too, so that nobody takes it for an attack.
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    let mut idle = authority.connect(agent.address("tcp"), None);
    idle.write_all(b"idle:1|c\n").unwrap();
    agent.wait_for("idle", "value", 1);
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    until("no connection", || (agent.own("tallyd_connections", "listener=\"tcp\"") == 0.0).then_some(()));
    // An end of the agent is as proper, and what came before it counts.
    let mut last = authority.connect(agent.address("tcp"), None);
    last.write_all(b"early:1|c\n").unwrap();
    agent.wait_for("early", "value", 1);
    last.write_all(b"early:1|c\n").unwrap();
    last.flush().unwrap();
    let agent = agent.restart_after("TERM");
    assert_eq!(last.read(&mut [0]).unwrap(), 0);
    agent.wait_for("early", "value", 2);
}

#[test]
fn a_reload_shows_another_certificate_to_whoever_connects_next() {
    let authority = Authority::new();
    let (cert, key) = authority.issue("server", 100);
    let text = format!("[tls]\ncert_file = {cert:?}\nkey_file = {key:?}\n");
    let directory = tempfile::tempdir().unwrap();
    let tls = ["listen.tcp=tls://127.0.0.1:0"];
    fs::write(directory.path().join("tallyd.toml"), &text).unwrap();
    let agent = Agent::start_with(Arc::new(directory), &tls);
    let shown = || {
        let mut client = authority.connect(agent.address("tcp"), None);
        client.write_all(b"hello:1|c\n").unwrap();
        client.conn.peer_certificates().unwrap()[0].to_vec()
    };
    let mut old = authority.connect(agent.address("tcp"), None);
    old.write_all(b"old:1|c\n").unwrap();
    agent.wait_for("old", "value", 1);
    let first = shown();
    assert_eq!(first, shown());
    authority.issue("server", 50);
    assert_eq!(first, shown(), "nothing changes by itself");
    let told = http::request(agent.address("api"), "POST", "/-/reload", &[], b"");
    assert_eq!(told.json()["changed"], serde_json::json!(["tls.cert_file", "tls.key_file"]), "{}", told.text());
    let second = shown();
    assert_ne!(first, second);
    old.write_all(b"old:1|c\n").unwrap();
    agent.wait_for("old", "value", 2);
    // A key that is not the certificate's: refused, and the one before stays.
    let sound = fs::read_to_string(&key).unwrap();
    authority.issue("other", 10);
    secret(
        authority.directory.path(),
        "server.key",
        &fs::read_to_string(authority.directory.path().join("other.key")).unwrap(),
    );
    let refused = http::request(agent.address("api"), "POST", "/-/reload", &[], b"");
    assert!(refused.status == 422 && refused.text().contains("tls.key_file"), "{}", refused.text());
    assert_eq!(second, shown());
    secret(authority.directory.path(), "server.key", &sound);
    assert_eq!(http::request(agent.address("api"), "POST", "/-/reload", &[], b"").status, 200);
}

#[test]
fn clients_show_certificates_where_they_must() {
    let (authority, others) = (Authority::new(), Authority::new());
    let mut settings = authority.settings("server", 100);
    settings.push(format!("tls.client_ca_file={}", authority.ca()));
    settings.push("listen.tcp=tls://127.0.0.1:0".to_owned());
    let agent = Agent::start(&words(&settings));
    let send = |own: Option<&(String, String)>, line: &str| {
        let mut client = authority.connect(agent.address("tcp"), own);
        drop(client.write_all(line.as_bytes()).and_then(|()| client.flush()));
        // With TLS 1.3 the client learns only by reading that it is not wanted.
        let mut rest = Vec::new();
        client.conn.send_close_notify();
        drop(client.flush());
        client.read_to_end(&mut rest).is_ok()
    };
    assert!(send(Some(&authority.issue("client", 10)), "known:1|c\n"));
    agent.wait_for("known", "value", 1);
    assert!(!send(None, "unknown:1|c\n"));
    assert!(!send(Some(&others.issue("client", 10)), "unknown:1|c\n"));
    for reason in ["no_certificate", "bad_certificate"] {
        let labels = format!("reason=\"{reason}\"");
        until(reason, || (agent.own("tallyd_tls_failed_total", &labels) == 1.0).then_some(()));
    }
    assert!(agent.metric("unknown").is_none());
}

/// Sends lines to a unix socket as another user. The executable may lie where that user can't go, so it is copied.
fn send_as(user: u32, executable: &Path, to: &str, lines: &[&str]) -> bool {
    let mut command = Command::new(executable);
    command.args(["send", "--to", to]).args(lines).uid(user).gid(user).current_dir("/");
    command.stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn only_named_users_send_by_unix_sockets() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: only root can send as another user");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let executable = directory.path().join("tallyd");
    fs::copy(env!("CARGO_BIN_EXE_tallyd"), &executable).unwrap();
    let path = |kind: &str| directory.path().join(kind).display().to_string();
    let settings = [
        format!("listen.unixgram={}", path("unixgram")),
        format!("listen.unix={}", path("unix")),
        "listen.unix_uids=4321,daemon".to_owned(),
        "listen.unix_group=4322".to_owned(),
        "listen.unix_mode=0666".to_owned(),
    ];
    let agent = Agent::start(&words(&settings));
    for kind in ["unixgram", "unix"] {
        assert_eq!(fs::metadata(path(kind)).unwrap().gid(), 4_322);
        let to = format!("{kind}://{}", path(kind));
        send_as(5_555, &executable, &to, &["secretly:1|c", "again:1|c"]);
        assert!(send_as(4_321, &executable, &to, &[&format!("{kind}:1|c")]));
        assert!(send_as(1, &executable, &to, &[&format!("{kind}:2|c")]));
        agent.wait_for(kind, "value", 3);
    }
    let rejected = |listener: &str| {
        agent.own("tallyd_lines_rejected_total", &format!("listener=\"{listener}\",reason=\"peer_denied\""))
    };
    until("the reject of the stream", || (rejected("unix") >= 1.0).then_some(()));
    // Each line of a datagram counts.
    until("the rejects of the datagram", || (rejected("unixgram") == 2.0).then_some(()));
    assert!(agent.own("tallyd_connections_refused_total", "listener=\"unix\",reason=\"unix_uids\"") >= 1.0);
    assert!(agent.metric("secretly").is_none() && agent.metric("again").is_none());
    let rejects = agent.get("/data/rejects").text();
    assert!(rejects.contains("uid 5555") && rejects.contains("peer_denied"), "{rejects}");
}

#[test]
fn what_the_user_of_the_process_may_not_is_told_before_anything_is_bound() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let executable = directory.path().join("tallyd");
    fs::copy(env!("CARGO_BIN_EXE_tallyd"), &executable).unwrap();
    let socket = format!("listen.unixgram={}", directory.path().join("socket").display());
    let of = |word: &str, group: &str| {
        let mut command = Command::new(&executable);
        command.uid(4_321).gid(4_321).current_dir("/").arg(word).args(["--set", &socket]);
        let output = command.args(["--set", &format!("listen.unix_group={group}")]).output().unwrap();
        (output.status.code(), said(&output))
    };
    for word in ["check", "run"] {
        let (code, said) = of(word, "4322");
        assert!(code == Some(78) && said.contains("SupplementaryGroups="), "{word}: {said}");
    }
    // What systemd runs by ExecReload= may not read the service's credentials: they are noted, and refused at a start.
    let kept = directory.path().join("credentials");
    fs::create_dir(&kept).unwrap();
    fs::set_permissions(&kept, Permissions::from_mode(0o700)).unwrap();
    for (word, expected, part) in [("check", 0, "not looked at"), ("run", 77, "Permission denied")] {
        let mut command = Command::new(&executable);
        command.uid(4_321).gid(4_321).current_dir("/").env("CREDENTIALS_DIRECTORY", &kept);
        let output = command.args([word, "--set", "http.tokens.admin_file=credential:x"]).output().unwrap();
        assert_eq!(output.status.code(), Some(expected), "{word}: {}", said(&output));
        assert!(said(&output).contains(part), "{word}: {}", said(&output));
    }
    // Its own is right; and where nobody named a state directory, the one that is built in would not do here.
    let (code, said) = of("check", "4321");
    assert!(code == Some(0) && said.contains("built in: state_dir = \"tallyd-data\""), "{said}");
}

#[test]
fn other_machines_need_tokens_to_write_or_to_administer() {
    let directory = tempfile::tempdir().unwrap();
    let [write, read, admin] = tokens(directory.path()).try_into().unwrap();
    let authority = Authority::new();
    let tls = authority.settings("server", 100);
    let check = |settings: &[&str]| {
        let mut command = crate::agent::tallyd();
        command.arg("check");
        command.args(settings.iter().flat_map(|setting| ["--set", setting]));
        let output = command.output().unwrap();
        (output.status.code(), said(&output))
    };
    for (settings, code, part) in [
        (&["http.ingest=0.0.0.0:8000"][..], 78, "http.tokens.write_file"),
        (&["http.ingest=0.0.0.0:8000", &read][..], 0, "nobody may write there"),
        (&["http.ingest=0.0.0.0:8000", &write][..], 0, "tokens cross the network as they are"),
        (&["http.ingest=tls://[::]:8000", &write, &tls[0], &tls[1]][..], 0, "the configuration is valid"),
        (&["http.ingest=tls://[::]:8000", &write][..], 78, "tls.cert_file"),
        (&["http.api=0.0.0.0:7000"][..], 78, "delete and reload without a token"),
        (&["http.api=0.0.0.0:7000", &write, &read][..], 0, "tokens cross the network"),
        (&["http.api=0.0.0.0:7000", &admin][..], 0, "other machines can read all figures there"),
        (&["http.api=0.0.0.0:7000", &admin, &read][..], 0, "tokens cross the network"),
        (&["http.api=0.0.0.0:7000", "http.insecure=true"][..], 0, "can read all figures"),
        (&["http.scrape=0.0.0.0:9102"][..], 0, "can read all figures"),
        (&["listen.udp=tls://0.0.0.0:8125", &tls[0], &tls[1]][..], 78, "datagrams have no TLS"),
        (&["listen.tcp=0.0.0.0:8125"][..], 0, "the configuration is valid"),
        (&[tls[0].as_str(), &tls[1]][..], 0, "no address begins with tls://"),
    ] {
        let (found, text) = check(settings);
        assert!(found == Some(code) && text.contains(part), "{settings:?}: {found:?} {text}");
    }
}

/// A command that talks to an agent's API reads its token from a file.
#[test]
fn bench_reads_its_token_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let settings = tokens(directory.path());
    let agent = Agent::start(&words(&settings));
    let (to, api) = (format!("udp://{}", agent.address("udp")), format!("http://{}", agent.address("api")));
    let bench = |more: &[&str]| {
        let mut command = crate::agent::tallyd();
        command.args(["bench", "--to", &to, "--api", &api, "--time", "500ms", "--rate", "1000", "--json"]).args(more);
        command.output().unwrap()
    };
    let refused = bench(&[]);
    assert!(!refused.status.success() && said(&refused).contains("--token-file"), "{}", said(&refused));
    let file = directory.path().join("read").display().to_string();
    let done = bench(&["--token-file", &file]);
    assert!(done.status.success(), "{}", said(&done));
    let wrong = bench(&["--token-file", &directory.path().join("write").display().to_string()]);
    assert!(!wrong.status.success() && !said(&wrong).contains("canary"), "{}", said(&wrong));
}

/// The blocks of a chapter of the README, each with its language.
fn blocks(chapter: &str) -> Vec<(String, String)> {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let text = readme.split_once(&format!("\n## {chapter}\n")).unwrap().1.split("\n## ").next().unwrap();
    let parts = text.split("```").skip(1).step_by(2);
    parts.map(|part| part.split_once('\n').map(|(kind, text)| (kind.to_owned(), text.to_owned())).unwrap()).collect()
}

#[test]
fn an_agent_is_secured_as_the_readme_says() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let here = directory.path().display().to_string();
    let blocks = blocks("Secure");
    let of = |kind: &str, number: usize| {
        blocks.iter().filter(|(k, _)| k == kind).nth(number).unwrap().1.replace("/etc/tallyd", &here)
    };
    let shell = |script: &str| {
        let output = Command::new("bash").args(["-euc", script]).output().unwrap();
        assert!(output.status.success(), "{script}\n{}", said(&output));
        said(&output)
    };
    // Where the package is not installed there is no such group; any other shows what the recipe does.
    let has_group = nix::unistd::Group::from_name("tallyd").unwrap().is_some();
    let recipe = of("sh", 0);
    assert!(recipe.contains("chgrp tallyd "), "{recipe}");
    let own = nix::unistd::Gid::effective().as_raw();
    let stand_in = if nix::unistd::Uid::effective().is_root() { 4_323 } else { own };
    let recipe = if has_group { recipe } else { recipe.replace("chgrp tallyd ", &format!("chgrp {stand_in} ")) };
    shell(&recipe);
    for name in ["write.token", "read.token", "admin.token", "key.pem", "cert.pem"] {
        let found = fs::metadata(directory.path().join(name)).unwrap();
        assert_eq!(found.mode() & 0o777, 0o640, "{name}: its group reads it");
        assert!(has_group || found.gid() == stand_in, "{name}: {}", found.gid());
    }
    let file = directory.path().join("tallyd.toml");
    fs::write(&file, of("toml", 0)).unwrap();
    let checked = crate::agent::tallyd().args(["check", "--config"]).arg(&file).output().unwrap();
    assert_eq!(said(&checked), "the configuration is valid\n");
    // The same addresses, with ports that are free.
    let tls = "tls://127.0.0.1:0";
    let free = [format!("listen.tcp=127.0.0.1:0,{tls}"), format!("http.ingest={tls}"), format!("http.api={tls}")];
    let agent = Agent::start_with(Arc::clone(&directory), &words(&free));
    let bound =
        [("8126", agent.addresses("tcp")[1]), ("8443", agent.address("ingest")), ("7443", agent.address("api"))];
    let script = bound
        .iter()
        .fold(of("sh", 1), |text, (port, to)| text.replace(&format!(":{port}"), &format!(":{}", to.port())));
    let told = shell(&script);
    assert!(told.contains("Record safe UPDATED") && told.contains("\"reloaded\":true"), "{told}");
    let token = fs::read_to_string(directory.path().join("read.token")).unwrap();
    until("the lines in TLS", || {
        let url = format!("https://localhost:{}/data/metrics/safe", agent.address("api").port());
        let (header, ca) = (format!("Authorization: Bearer {}", token.trim()), format!("{here}/cert.pem"));
        said(&curl(&["--cacert", &ca, "-H", &header, &url])).contains("\"value\":3").then_some(())
    });
}

#[test]
fn a_units_socket_speaks_as_its_port_is_configured_and_is_held_to_tokens() {
    let authority = Authority::new();
    let (tcp, api) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let mut settings = authority.settings("server", 100);
    settings.push(format!("listen.tcp=tls://127.0.0.1:{}", port(&tcp)));
    let command = with_sockets(&[("lines", &tcp), ("api", &api)]);
    let agent = Agent::start_by(command, &words(&settings));
    let mut client = authority.connect(tcp.local_addr().unwrap(), None);
    client.write_all(b"of_a_unit:1|c\n").unwrap();
    agent.wait_for("of_a_unit", "value", 1);

    let public = TcpListener::bind("0.0.0.0:0").unwrap();
    let state = tempfile::tempdir().unwrap();
    let free = ["listen.udp=127.0.0.1:0", "listen.tcp=127.0.0.1:0", "http.ingest=[]", "http.api=127.0.0.1:0"];
    let mut command = with_sockets(&[("api", &public)]);
    command.env("TALLYD_STATE_DIR", state.path()).args(free.iter().flat_map(|setting| ["--set", setting]));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
    assert!(said(&output).contains("http.tokens.admin_file"), "{}", said(&output));
}

#[test]
fn a_reload_takes_no_token_from_a_units_socket_that_others_reach() {
    let directory = tempfile::tempdir().unwrap();
    let admin = secret(directory.path(), "admin", ADMIN);
    let file = directory.path().join("tallyd.toml");
    let with_token = format!("[http.tokens]\nadmin_file = {admin:?}\n");
    fs::write(&file, &with_token).unwrap();
    let public = TcpListener::bind("0.0.0.0:0").unwrap();
    let mut command = with_sockets(&[("api", &public)]);
    command.arg("--config").arg(&file);
    let agent = Agent::start_by(command, &[]);
    let to = SocketAddr::from(([127, 0, 0, 1], public.local_addr().unwrap().port()));
    let reload = |token| ask(to, "POST", "/-/reload", token);
    assert_eq!(reload(None).status, 401);
    until("the warning", || agent.stderr().contains("other machines can read all figures there").then_some(()));
    fs::write(&file, "[log]\nlevel = 'debug'\n").unwrap();
    let refused = reload(Some(ADMIN));
    assert!(refused.status == 422 && refused.text().contains("http.tokens.admin_file"), "{}", refused.text());
    assert_eq!(reload(None).status, 401, "the token is still needed");
    fs::write(&file, &with_token).unwrap();
    assert_eq!(reload(Some(ADMIN)).status, 200);
}

#[test]
fn beyond_loopback_the_state_of_the_agent_is_for_who_may_read() {
    let directory = tempfile::tempdir().unwrap();
    let public = TcpListener::bind("0.0.0.0:0").unwrap();
    let _agent = Agent::start_by(with_sockets(&[("api", &public)]), &words(&tokens(directory.path())));
    let to = SocketAddr::from(([127, 0, 0, 1], public.local_addr().unwrap().port()));
    let keys = |token| {
        let answer = until("the agent to be ready", || {
            let answer = ask(to, "GET", "/-/ready", token);
            (answer.status == 200).then_some(answer)
        });
        answer.json().as_object().unwrap().len()
    };
    assert_eq!([keys(None), keys(Some(WRITE)), keys(Some(READ)), keys(Some(ADMIN))], [1, 1, 4, 4]);
}

#[test]
fn connections_of_one_purpose_shut_out_no_other() {
    let agent = Agent::start(&["http.scrape=127.0.0.1:0", "limits.http_connections=1"]);
    let scrapers = [(); 2].map(|()| TcpStream::connect(agent.address("scrape")).unwrap());
    until("the scrape to be full", || {
        (agent.own("tallyd_connections_refused_total", "listener=\"scrape\"") > 0.0).then_some(())
    });
    assert_eq!(agent.get("/-/healthy").status, 200);
    drop(scrapers);
}

#[test]
fn a_password_of_redis_may_stand_in_a_file() {
    let server = Server::start(&["--requirepass", "canary-of-redis"]);
    let directory = tempfile::tempdir().unwrap();
    let file = secret(directory.path(), "password", "canary-of-redis\n");
    let settings = [
        "store.kind=redis".to_owned(),
        format!("store.redis.url=redis://default@{}", server.address()),
        format!("store.redis.password_file={file}"),
        "flush.interval=100ms".to_owned(),
        "flush.window=1s".to_owned(),
    ];
    let agent = Agent::start(&words(&settings));
    agent.datagram("kept:2|c");
    until("the store to have it", || (agent.own("tallyd_outbox_unsent_batches", "") == 0.0).then_some(()));
    until("a connection", || (agent.own("tallyd_store_connected", "store=\"redis\"") == 1.0).then_some(()));
    agent.wait_for("kept", "value", 2);
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    // A password that was changed needs a restart, which keeps nothing else from being taken.
    secret(directory.path(), "password", "another-canary\n");
    let taken = http::request(agent.address("api"), "POST", "/-/reload", &[], b"");
    assert_eq!((taken.status, taken.json()["changed"].clone()), (200, serde_json::json!([])), "{}", taken.text());
    let noted = "store.redis.password_file: the file says something else now";
    until("the note", || agent.stderr().contains(noted).then_some(()));
    assert!(!agent.stderr().contains("canary") && !taken.text().contains("canary"), "{}", agent.stderr());
}
