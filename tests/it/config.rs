//! Configuration, `check`, `explain` and `send` through the executable.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::access::secret;
use crate::agent::{Agent, tallyd};

fn run(arguments: &[&str], environment: &[(&str, &str)], input: &str) -> Output {
    let mut child = tallyd()
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that does not read its input may have ended already.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tallyd.toml");
    fs::write(&file, "[listen]\nudp = []\nrecieve_buffer = \"1MiB\"\n").unwrap();
    for command in ["check", "run"] {
        let output = run(&[command, "--config", file.to_str().unwrap()], &[], "");
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{stderr}");
        for part in ["tallyd.toml:3", "recieve_buffer", "receive_buffer"] {
            assert!(stderr.contains(part), "{command}: {part} in {stderr}");
        }
    }
}

#[test]
fn exit_codes_follow_sysexits() {
    for (arguments, environment, code, part) in [
        (&["check", "--config", "/nonexistent/tallyd.toml"][..], &[][..], 66, "/nonexistent/tallyd.toml"),
        (&["--no-such-flag"][..], &[][..], 2, "--no-such-flag"),
        (&["check", "--set", "flush.interval=3s"][..], &[][..], 78, "must divide the window"),
        (&["check", "--set", "http.api=0.0.0.0:7000"][..], &[][..], 78, "http.insecure"),
        (&["check"][..], &[("TALLYD_LISTEN__UPD", "x")][..], 78, "TALLYD_LISTEN__UPD"),
        (&["check"][..], &[("STORE", "NOWHERE")][..], 78, "STORE"),
        (&["check"][..], &[("INGEST_PORT", "x")][..], 78, "INGEST_PORT"),
        (&["explain", "a:1"][..], &[][..], 65, "missing_type"),
    ] {
        let output = run(arguments, environment, "");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?} {environment:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {part} in {said}");
    }
}

#[test]
fn the_printed_defaults_are_the_packaged_file() {
    let output = run(&["check", "--print-defaults"], &[], "");
    let packaged = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/tallyd.toml");
    assert_eq!(text(&output.stdout), fs::read_to_string(packaged).unwrap());
    assert_eq!(run(&["check", "--config", packaged], &[], "").status.code(), Some(0));
}

/// Every case of the line corpus through the executable.
#[test]
fn explain_reads_every_case_of_the_corpus() {
    let corpus = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/lines.jsonl")).unwrap();
    let (mut passed, mut wrong) = (0, Vec::new());
    for line in corpus.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        if case["config"]["framing"].is_string() || !case["chunks"].is_null() || !case["input_b64"].is_null() {
            continue; // framing belongs to the listeners, and bytes that are no UTF-8 to the parser's own tests
        }
        let got = explain(&case);
        match differs(&case, &got) {
            None => passed += 1,
            Some(how) => wrong.push(format!("{}: {how}\n  got {got}", case["id"])),
        }
    }
    assert!(wrong.is_empty(), "{passed} passed, but\n{}", wrong.join("\n"));
    assert!(passed > 180, "only {passed} cases");
}

fn explain(case: &Value) -> Value {
    let is_body = case["dialect"] == "json" && case["transport"].is_null();
    let mut arguments = vec!["explain".to_owned(), "--json".to_owned()];
    arguments.push(if is_body { "--body" } else { "--datagram" }.to_owned());
    for (key, value) in case["config"].as_object().into_iter().flatten() {
        arguments.extend(["--set".to_owned(), format!("protocol.{key}={value}")]);
    }
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let output = run(&words, &[], case["input"].as_str().unwrap());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{}: {error}: {output:?}", case["id"]))
}

fn differs(case: &Value, got: &Value) -> Option<String> {
    let none = Value::Array(Vec::new());
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let want = if case["error"].is_null() { list(&case["expect"]["metrics"]) } else { list(&case["expect_also"]) };
    let metrics = got["metrics"].as_array()?;
    if !case["expect"]["totals"].is_null() {
        return None;
    }
    if metrics.len() != want.len() {
        return Some(format!("{} metrics, not {}", metrics.len(), want.len()));
    }
    for (want, got) in want.iter().zip(metrics) {
        for (field, value) in want.as_object()? {
            let equal = serde_json::to_string(&got[field]).ok()? == serde_json::to_string(value).ok()?
                || as_numbers(&got[field]).is_some_and(|numbers| Some(numbers) == as_numbers(value));
            if !equal {
                return Some(format!("{field} is not {value}"));
            }
        }
    }
    let errors: Vec<_> = list(&got["errors"]).iter().map(|error| error["reason"].clone()).collect();
    let expected: Vec<_> = match case["error"].as_str() {
        Some(reason) => vec![Value::from(reason)],
        None => case["expect"]
            .get("errors")
            .unwrap_or(&none)
            .as_array()?
            .iter()
            .map(|error| error["reason"].clone())
            .collect(),
    };
    if errors != expected && case["expect_errors"].is_null() {
        return Some(format!("errors are not {expected:?}"));
    }
    for field in ["events", "service_checks"] {
        if list(&got[field]) != list(&case["expect"][field]) {
            return Some(format!("{field} differ"));
        }
    }
    let tag_errors = case["tag_errors"].as_u64().unwrap_or(0);
    (got["tag_errors"].as_u64() != Some(tag_errors)).then(|| format!("tag_errors is not {tag_errors}"))
}

fn as_numbers(value: &Value) -> Option<Vec<f64>> {
    match value {
        Value::Array(values) => values.iter().map(Value::as_f64).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => {
            value.as_f64().map(|number| vec![number])
        }
    }
}

#[test]
fn send_delivers_over_udp_and_tcp() {
    let agent = Agent::start(&[]);
    for (scheme, listener) in [("udp", "udp"), ("tcp", "tcp")] {
        let to = format!("{scheme}://{}", agent.address(listener));
        let output = run(&["send", "--to", &to, "sent:1|c", "sent:2|c"], &[], "");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let output = run(&["send", "--to", &to], &[], "sent:3|c\nsent:4|c\n");
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
    agent.wait_for("sent", "value", 20);
}

/// As a compose file passes on what is not set.
#[test]
fn empty_variables_set_nothing() {
    let names = [
        "INGEST_PORT",
        "API_PORT",
        "STORE",
        "REDIS_HOST",
        "REDIS_PORT",
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_TOPIC",
        "TALLYD_CONFIG",
        "TALLYD_STATE_DIR",
        "TALLYD_LIMITS__BODY",
        "TALLYD_STORE__REDIS__URL",
        "STATE_DIRECTORY",
    ];
    let output = run(&["check", "--print"], &names.map(|name| (name, "")), "");
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(printed.contains("state_dir = \"tallyd-data\"  # built in") && !printed.contains("# env"), "{printed}");
    let none = run(&["check", "--print"], &[("TALLYD_LISTEN__UDP", "")], "");
    assert!(text(&none.stdout).contains("udp = []  # environment TALLYD_LISTEN__UDP"), "an empty list is one");
}

#[test]
fn explain_says_what_prometheus_will_see() {
    for (line, shown) in [
        ("page-views.2:1|c|#Site.x:a\"b,le:1,flag", "page_views_2{Site_x=\"a\\\"b\",exported_le=\"1\"}"),
        ("1st:1|ms", "_1st"),
        ("tallyd_lines_total:1|c", "tallyd_lines_total_client"),
        ("m:1|m|#k:v", "m_total{k=\"v\"}\n  prometheus m_rate{k=\"v\"}"),
        (r#"{"level":"a","name":"b","type":"SET","value":"x"}"#, "a_b"),
    ] {
        let said = text(&run(&["explain", line], &[], "").stdout);
        assert!(said.contains(&format!("\n  prometheus {shown}\n")), "{line}: {said}");
    }
}

#[test]
fn the_seeds_environment_names_work() {
    let output = run(
        &["check", "--print"],
        &[
            ("INGEST_PORT", "18000"),
            ("API_PORT", "17000"),
            ("STORE", "REDIS"),
            ("REDIS_HOST", "127.0.0.9"),
            ("REDIS_PORT", "16379"),
        ],
        "",
    );
    let printed = text(&output.stdout);
    for part in ["127.0.0.1:18000", "[::1]:17000", "redis://127.0.0.9:16379", "kind = \"redis\""] {
        assert!(printed.contains(part), "{part} in {printed}");
    }
}

#[test]
fn explain_shows_a_short_line_whole_and_of_a_long_one_what_is_around_the_place() {
    let short = text(&run(&["explain", "servers.web1.load 12.5 1764000000"], &[], "").stdout);
    assert!(short.contains("\n  servers.web1.load 12.5 1764000000\n"), "{short}");
    let long = text(&run(&["explain", &format!("{}:x|c|#{}", "n".repeat(100), "t".repeat(100))], &[], "").stdout);
    assert!(long.contains(&format!("\n  {}:x|c|#{}\n", "n".repeat(29), "t".repeat(25))), "{long}");
}

#[test]
fn a_key_for_redis_that_others_may_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let key = secret(directory.path(), "key", "no key in PEM either");
    fs::set_permissions(&key, Permissions::from_mode(0o604)).unwrap();
    let set = format!("store.redis.key_file={key}");
    let settings = ["--set", "store.kind=redis", "--set", "store.redis.url=rediss://localhost", "--set", &set];
    for command in ["check", "run"] {
        let output = run(&[&[command][..], &settings].concat(), &[], "");
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{command}: {told}");
        assert!(told.contains("store.redis.key_file = ") && told.contains("0604"), "{command}: {told}");
    }
}

/// What `run` must refuse, and `check` with the same words and the same code: settings, exit code, what is said.
fn wrong(directory: &Path) -> Vec<(Vec<String>, i32, &'static str)> {
    let path = |name: &str| directory.join(name).display().to_string();
    let file = |name: &str, text: &str| secret(directory, name, text);
    let public = file("public", "a-token-of-some-length\n");
    fs::set_permissions(&public, Permissions::from_mode(0o644)).unwrap();
    fs::create_dir(directory.join("folder")).unwrap();
    let (missing, plain) = (path("missing"), file("plain", "text"));
    let redis =
        |setting: String| vec!["store.kind=redis".to_owned(), "store.redis.url=rediss://localhost".to_owned(), setting];
    let one = |setting: String| vec![setting];
    let mut cases = vec![
        (one("listen.udp=localhost".to_owned()), 78, "no address with a port"),
        (one("listen.udp=tls://127.0.0.1:0".to_owned()), 78, "datagrams have no TLS"),
        (one("listen.tcp=tls://127.0.0.1:0".to_owned()), 78, "tls.cert_file"),
        (one("http.api=0.0.0.0:0".to_owned()), 78, "http.tokens.admin_file"),
        (one("http.ingest=[::]:0".to_owned()), 78, "http.tokens.write_file"),
        (one("http.scrape=nowhere".to_owned()), 78, "no address with a port"),
        (one("listen.unixgram=a/relative/path".to_owned()), 78, "begins with /"),
        (one(format!("listen.unixgram={}", path("no/such"))), 66, "its directory is missing"),
        (one(format!("listen.unix={}", path("plain/below"))), 66, "its directory is missing"),
        (one(format!("listen.unix={plain}")), 74, "no socket"),
        (one("listen.unix_uids=no-such-user".to_owned()), 78, "no such user"),
        (one("listen.unix_group=no-such-group".to_owned()), 78, "no such group"),
        (one(format!("mapping.file={missing}")), 66, "No such file"),
        (one(format!("mapping.file={}", file("mapping", "mappings: 3"))), 78, "mapping"),
        (one(format!("mapping.file={}", path("folder"))), 74, "directory"),
        (one(format!("kafka.password_file={missing}")), 66, "No such file"),
        (one(format!("kafka.password_file={public}")), 78, "chmod o-rwx"),
        (one(format!("kafka.password_file={}", file("empty", ""))), 78, "nothing stands on its first line"),
        (redis(format!("store.redis.password_file={missing}")), 66, "No such file"),
        (redis(format!("store.redis.ca_file={missing}")), 66, "can't be read"),
        (redis(format!("store.redis.ca_file={plain}")), 78, "no certificate"),
        (redis("store.redis.prefix=a{b".to_owned()), 78, "brace"),
        (redis("store.redis.mode=sentinel".to_owned()), 78, "store.redis.nodes"),
        (vec!["store.kind=redis".to_owned(), "store.redis.url=http://x".to_owned()], 78, "no address of a Redis"),
        (one(format!("http.tokens.write_file={missing}")), 66, "No such file"),
        (one(format!("http.tokens.read_file={public}")), 78, "0644"),
        (one(format!("http.tokens.read_file={plain}")), 78, "less than 16 bytes"),
        (one(format!("http.tokens.admin_file={}", file("blank", "a token with blanks in it"))), 78, "blank"),
        (one(format!("http.tokens.admin_file={}", file("comment", "# nothing\n"))), 78, "no token stands in it"),
        (one(format!("tls.cert_file={plain}")), 78, "tls.key_file = \"\": missing"),
        (vec![format!("tls.cert_file={missing}"), format!("tls.key_file={plain}")], 66, "No such file"),
        (vec![format!("tls.cert_file={plain}"), format!("tls.key_file={plain}")], 78, "no certificate in PEM"),
        (one(format!("tls.client_ca_file={plain}")), 78, "does nothing without"),
        (one("flush.interval=3s".to_owned()), 78, "must divide the window"),
        (one("flush.percentiles=101".to_owned()), 78, "from -100 to 100"),
        (one("prometheus.quantiles=2".to_owned()), 78, "prometheus.quantiles"),
        (one("limits.buckets=1".to_owned()), 78, "out of range"),
        (one("log.level=loud".to_owned()), 78, "log.level"),
        (one("store.kind=paper".to_owned()), 78, "no store"),
        (one(format!("state_dir={plain}")), 74, "a file in its place"),
        (one(format!("state_dir={}", path("plain/below"))), 74, "a file in its place"),
    ];
    if cfg!(feature = "kafka") {
        let kafka = |setting: &str| vec!["store.kind=kafka".to_owned(), setting.to_owned()];
        cases.push((kafka("kafka.options={ 'sekurity.protocol' = 'x' }"), 78, "sekurity.protocol"));
        cases.push((
            kafka("kafka.options={ 'security.protocol' = 'SSL', 'ssl.ca.location' = '/nowhere' }"),
            78,
            "ssl.ca.location",
        ));
        cases.push((kafka("kafka.brokers=[]"), 78, "no broker"));
        cases.push((kafka("store.kafka.topic=metrics-records"), 78, "name two"));
    } else {
        cases.push((one("store.kind=kafka".to_owned()), 78, "no Kafka"));
        cases.push((one("listen.kafka=true".to_owned()), 78, "no Kafka"));
    }
    cases
}

#[test]
fn a_check_refuses_what_a_start_would_with_the_same_words_and_the_same_code() {
    let directory = tempfile::tempdir().unwrap();
    for (settings, code, part) in wrong(directory.path()) {
        let state = directory.path().join("state");
        let free =
            ["listen.udp=127.0.0.1:0", "listen.tcp=127.0.0.1:0", "http.ingest=127.0.0.1:0", "http.api=127.0.0.1:0"];
        let of = |command: &str| {
            let mut words = vec![command];
            words
                .extend(free.iter().copied().chain(settings.iter().map(String::as_str)).flat_map(|one| ["--set", one]));
            let set_state = settings.iter().all(|one| !one.starts_with("state_dir"));
            let environment = if set_state { vec![("TALLYD_STATE_DIR", state.to_str().unwrap())] } else { Vec::new() };
            let output = run(&words, &environment, "");
            (output.status.code(), text(&output.stderr))
        };
        let (checked, started) = (of("check"), of("run"));
        assert!(checked.0 == Some(code) && checked.1.contains(part), "{settings:?}: {checked:?}");
        let first =
            |text: &str| text.lines().next_back().unwrap_or_default().split(" (and ").next().unwrap().to_owned();
        let expected = checked.1.lines().next().unwrap_or_default();
        assert_eq!((started.0, first(&started.1).as_str()), (Some(code), expected), "{settings:?}");
        assert!(!state.exists(), "{settings:?}: it had begun");
    }
}

#[test]
fn a_check_tells_all_that_is_wrong_with_files_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tallyd.toml");
    let text_of = "[http.tokens]\nread_file = '/no/read'\nadmin_file = '/no/admin'\n[tls]\ncert_file = '/no/cert'\n\
                   key_file = '/no/key'\n[mapping]\nfile = '/no/mapping'\n";
    fs::write(&file, text_of).unwrap();
    let output = run(&["check", "--config", file.to_str().unwrap()], &[], "");
    let said = text(&output.stderr);
    for place in
        ["2:13: http.tokens.read_file", "3:14: http.tokens.admin_file", "5:13: tls.cert_file", "8:8: mapping.file"]
    {
        assert!(said.contains(&format!("tallyd.toml:{place} = \"/no/")), "{place} in {said}");
    }
    assert_eq!((output.status.code(), said.lines().count()), (Some(66), 4), "{said}");
}

/// It may look, and it may not touch: what it asks of the kernel is read from a trace.
#[test]
fn a_check_binds_writes_and_asks_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("trace");
    let strace =
        || Command::new("strace").args(["-o", "/dev/null", "true"]).status().is_ok_and(|status| status.success());
    if !strace() {
        eprintln!("skipped: strace is missing or may not trace");
        return;
    }
    let tokens = secret(directory.path(), "tokens", "a-token-of-some-length\n");
    let state = directory.path().join("state");
    let mut settings = vec![
        format!("http.tokens.admin_file={tokens}"),
        format!("listen.unixgram={}", directory.path().join("socket").display()),
        format!("state_dir={}", state.display()),
        "http.api=0.0.0.0:7000".to_owned(),
        "listen.unix_uids=12345".to_owned(),
    ];
    if cfg!(feature = "kafka") {
        settings.push("store.kind=kafka".to_owned());
    }
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=%network,%file", "-o"]).arg(&trace);
    command.arg(env!("CARGO_BIN_EXE_tallyd")).arg("check");
    command.args(settings.iter().flat_map(|setting| ["--set", setting.as_str()]));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let trace = fs::read_to_string(&trace).unwrap();
    assert!(trace.contains("openat(") && trace.lines().count() > 20, "{trace}");
    let calls =
        ["bind(", "connect(", "listen(", "sendto(", "sendmsg(", "mkdir", "unlink", "rename", "chmod", "truncate"];
    for line in trace.lines() {
        let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        assert!(!calls.iter().any(|name| call.starts_with(name)), "{line}");
        let writes = ["O_CREAT", "O_WRONLY", "O_RDWR"].iter().any(|flag| call.contains(flag));
        assert!(!call.starts_with("open") || !writes || call.contains("/dev/"), "{line}");
    }
    assert!(!state.exists());
}

/// A word that must appear nowhere.
const CANARY: &str = "s3cret-canary";

#[test]
fn no_output_holds_a_secret() {
    let directory = tempfile::tempdir().unwrap();
    let password = secret(directory.path(), "password", &format!("{CANARY}\n"));
    let token = secret(directory.path(), "token", &format!("{CANARY}-of-some-length\n"));
    let options = format!("{{ 'sasl.password' = '{CANARY}', 'ssl.key.password' = '{CANARY}' }}");
    let broken = format!("'sasl.password' = '{CANARY}'");
    let number = "{ 'sasl.password' = 5318008 }".to_owned();
    let all = [
        ("store.redis.url", format!("redis://user:{CANARY}@127.0.0.1:1")),
        ("store.redis.url", format!("http://user:{CANARY}@127.0.0.1:1")),
        ("store.redis.url", format!("unix:///nowhere?user=u&pass={CANARY}")),
        ("store.redis.nodes", format!("redis://:{CANARY}@127.0.0.1:1")),
        ("store.redis.password_file", password.clone()),
        ("kafka.options", options),
        ("kafka.options", broken),
        ("kafka.options", number),
        ("kafka.password_file", password),
        ("http.tokens.write_file", token.clone()),
        ("http.tokens.read_file", token.clone()),
        ("http.tokens.admin_file", token),
    ];
    let quiet = |output: &Output| {
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(!said.contains(CANARY) && !said.contains("5318008"), "{said}");
    };
    let file = directory.path().join("tallyd.toml");
    let config = file.to_str().unwrap();
    for (key, value) in &all {
        let variable = format!("TALLYD_{}", key.to_uppercase().replace('.', "__"));
        let set = format!("{key}={value}");
        let (section, last) = key.rsplit_once('.').unwrap();
        let is_table = value.starts_with('{');
        let written = if is_table { value.clone() } else { format!("{value:?}") };
        let written = if *key == "store.redis.nodes" { format!("[{written}]") } else { written };
        fs::write(&file, format!("[{section}]\n{last} = {written}\n")).unwrap();
        for more in [&["--set", "store.kind=redis"][..], &["--set", "flush.interval=3s"], &["--print"], &[]] {
            quiet(&run(&[&["check", "--set", &set], more].concat(), &[], ""));
            quiet(&run(&[&["check"], more].concat(), &[(&variable, value)], ""));
            quiet(&run(&[&["check", "--config", config], more].concat(), &[], ""));
        }
        // As a wrong type, under a wrong name, and without a name.
        fs::write(&file, format!("[{section}]\n{last} = [[{value:?}]]\n")).unwrap();
        quiet(&run(&["check", "--config", config], &[], ""));
        quiet(&run(&["check", "--set", &format!("{key}x={value}")], &[], ""));
        quiet(&run(&["check", "--set", &format!("{key} {value}")], &[], ""));
        quiet(&run(&["check", "--set", value], &[], ""));
    }
}

#[test]
fn a_running_agent_tells_no_secret() {
    let directory = tempfile::tempdir().unwrap();
    let token = secret(directory.path(), "token", &format!("{CANARY}-of-some-length\n"));
    let password = secret(directory.path(), "password", &format!("{CANARY}\n"));
    let mut settings = vec![
        "log.level=trace".to_owned(),
        "store.kind=redis".to_owned(),
        "store.redis.url=redis://user@127.0.0.1:1".to_owned(),
        format!("store.redis.password_file={password}"),
        format!("http.tokens.admin_file={token}"),
        format!("http.tokens.write_file={token}"),
        format!("kafka.password_file={password}"),
    ];
    if cfg!(feature = "kafka") {
        settings.push("listen.kafka=true".to_owned());
        settings.push("kafka.brokers=127.0.0.1:1".to_owned());
        settings.push("kafka.options={ 'security.protocol' = 'SASL_PLAINTEXT', 'sasl.mechanism' = 'PLAIN', 'sasl.username' = 'u', 'debug' = 'all' }".to_owned());
    }
    let agent = Agent::start(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    let header = ("Authorization", format!("Bearer {CANARY}-of-some-length"));
    let headers = [(header.0, header.1.as_str()), ("Content-Type", "application/json")];
    let body = br#"{"name":"n","type":"COUNTER","value":1}"#;
    let posted = crate::http::request(agent.address("ingest"), "POST", "/ingest/metrics", &headers, body);
    assert_eq!(posted.status, 200, "{}", posted.text());
    let reloaded = crate::http::request(agent.address("api"), "POST", "/-/reload", &headers, b"");
    assert_eq!(reloaded.status, 200, "{}", reloaded.text());
    crate::agent::until("the store to be away", || agent.get("/-/ready").text().contains("store").then_some(()));
    for path in ["/-/ready", "/metrics", "/data/metrics", "/data/rejects", "/data/sources", "/openapi.json"] {
        assert!(!agent.get(path).text().contains(CANARY), "{path}");
    }
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", agent.process())).unwrap();
    assert!(!agent.stderr().contains(CANARY) && !arguments.contains(CANARY), "{}", agent.stderr());
    assert!(agent.stderr().lines().count() > 3, "{}", agent.stderr());
}

#[test]
fn secrets_may_be_credentials_of_systemd() {
    let directory = tempfile::tempdir().unwrap();
    secret(directory.path(), "admin", "a-token-of-some-length\n");
    let credentials = [("CREDENTIALS_DIRECTORY", directory.path().to_str().unwrap())];
    let check = |name: &str| {
        let set = format!("http.tokens.admin_file=credential:{name}");
        let output = run(&["check", "--set", &set], &credentials, "");
        (output.status.code(), text(&output.stdout) + &text(&output.stderr))
    };
    assert_eq!(check("admin").0, Some(0));
    let (code, said) = check("other");
    assert!(code == Some(66) && said.contains("LoadCredential="), "{said}");
    let (code, said) = check("../admin");
    assert!(code == Some(78) && said.contains("no name of a credential"), "{said}");
}

/// ExecReload= of the service, and a shell, have no credentials.
#[test]
fn a_check_notes_a_credential_that_only_the_service_has() {
    let keys = ["http.tokens.admin_file", "kafka.password_file", "store.redis.password_file"];
    let credential = |key: &&str| ["--set".to_owned(), format!("{key}=credential:x")];
    let redis = ["--set", "store.kind=redis", "--set", "store.redis.url=redis://user@127.0.0.1:1"].map(str::to_owned);
    let settings: Vec<String> = keys.iter().flat_map(credential).chain(redis).collect();
    let of = |command: &str, more: &[&str]| {
        let words: Vec<_> = [command].into_iter().chain(settings.iter().map(String::as_str)).collect();
        let output = run(&[&words, more].concat(), &[], "");
        (output.status.code(), text(&output.stdout) + &text(&output.stderr))
    };
    let (code, said) = of("check", &[]);
    assert!(code == Some(0) && said.contains("the configuration is valid"), "{said}");
    assert!(keys.iter().all(|key| said.contains(&format!("{key} = \"credential:x\": not looked at"))), "{said}");
    let (code, said) = of("run", &[]);
    assert!(code == Some(78) && said.contains("CREDENTIALS_DIRECTORY is not set"), "{said}");
    // What else is wrong is wrong all the same.
    let (code, said) = of("check", &["--set", "tls.key_file=credential:x"]);
    assert!(code == Some(78) && said.contains("tls.cert_file = \"\": missing"), "{said}");
    let (code, said) = of("check", &["--set", "tls.cert_file=/no/cert", "--set", "tls.key_file=credential:x"]);
    assert!(code == Some(66) && said.contains("/no/cert"), "{said}");
}
