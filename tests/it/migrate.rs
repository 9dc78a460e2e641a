//! Configurations of other servers as ours: what is printed can be taken, and an agent that takes it does what the other did.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use crate::agent::{Agent, tallyd};

/// Every key of the original's example configuration and documentation, but those of Graphite.
const ETSY: &str = r#"
/* The whole of it. */
{
  title: 'stats', healthStatus: "up", dumpMessages: true, debug: false,
  servers: [
    { server: './servers/udp', address: '127.0.0.1', port: 8125, address_ipv6: false }, // lines
    { server: "./servers/tcp", address: '127.0.0.1', port: 0x1FBD },
    { server: './servers/tcp', socket: '/tmp/statsd.sock', socket_mod: 0755, },
  ],
  mgmt_address: "localhost", mgmt_port: 8126,
  flushInterval: 5e3,
  percentThreshold: [ 90, 99.9, -10 ],
  backends: [ "./backends/console", './backends/repeater', 'some-other-backend' ],
  repeater: [ { host: '10.10.10.10', port: 8125 }, { host: 'observer', port: 18125 } ],
  repeaterProtocol: 'udp4',
  keyFlush: { interval: 1000, percent: 100, log: '/tmp/keys.log' },
  keyNameSanitize: false,
  console: { prettyprint: true },
  log: { backend: 'syslog', application: 'statsd', level: 'LOG_INFO' },
  automaticConfigReload: undefined, stderrPrefix: null,
}
"#;

/// Those of Graphite and of the flush.
const FLUSH: &str = r#"{
  graphiteHost: 'graphite.example.com', graphitePort: 2003, graphitePicklePort: 2004, graphiteProtocol: 'text',
  flush_counts: false, prefixStats: 'me',
  graphite: { legacyNamespace: false, globalPrefix: 'p', globalSuffix: 's', prefixCounter: 'c', prefixTimer: 't',
              prefixGauge: 'g', prefixSet: 'e' },
  histogram: [ { metric: 'foo', bins: [] }, { metric: '', bins: [ 0.01, 50, 100, 'inf' ] } ],
  calculatedTimerMetrics: ['count', 'median', 'upper_percent', 'histogram'],
  deleteIdleStats: true, deleteCounters: false, deleteTimers: true, deleteSets: true, deleteGauges: true, gaugesMaxTTL: 3,
}"#;

fn convert(flag: &str, argument: &str, input: &str) -> Output {
    let mut command = tallyd();
    command.args(["check", flag, argument]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Of what is too long it does not read the end.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    child.wait_with_output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// What `tallyd check` says of a configuration.
#[track_caller]
fn check(toml: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), toml).unwrap();
    let output: Output = Command::output(tallyd().args(["check", "--config"]).arg(file.path())).unwrap();
    assert!(output.status.success(), "{}\n{toml}", text(output.stderr));
}

#[test]
fn a_configuration_of_the_original_is_one_of_ours() {
    let output = convert("--from-etsy", "/dev/stdin", ETSY);
    assert!(output.status.success(), "{}", text(output.stderr));
    let (toml, warnings) = (text(output.stdout), text(output.stderr));
    check(&toml);
    for line in [
        "udp = [\"127.0.0.1:8125\"]",
        "tcp = [\"127.0.0.1:8125\"]",
        "unix = [\"/tmp/statsd.sock\"]",
        "unix_mode = \"0755\"",
        "listen = [\"127.0.0.1:8126\"]",
        "window = \"5s\"",
        "percentiles = [90, 99.9, -10]",
        "to = [\"10.10.10.10:8125\", \"observer:18125\"]",
        "name_policy = \"none\"",
        "level = \"info\"",
    ] {
        assert!(toml.lines().any(|ours| ours == line), "{line}\n{toml}");
    }
    let left = ["title", "healthStatus", "dumpMessages", "backends: console", "keyFlush", "log"];
    for name in left.iter().chain(&["backends: some-other-backend", "stderrPrefix", "repeaterProtocol"]) {
        assert!(toml.contains(&format!("\n# - {name}: ")), "{name}\n{toml}");
    }
    assert!(!toml.contains("automaticConfigReload"), "it is undefined");
    assert!(warnings.contains("\"some-other-backend\" is left out"), "{warnings}");
}

#[test]
fn its_keys_for_graphite_and_the_flush_are_ours() {
    let output = convert("--from-etsy", "/dev/stdin", FLUSH);
    let toml = text(output.stdout);
    for line in [
        "to = \"graphite.example.com:2003\"",
        "legacy_namespace = false",
        "global_suffix = \"s\"",
        "prefix_set = \"e\"",
        "prefix_stats = \"me\"",
        "flush_counts = false",
        "delete_counters = false",
        "gauges_max_ttl = 3",
    ] {
        assert!(toml.lines().any(|ours| ours == line), "{line}\n{toml}");
    }
    assert_eq!(toml.parse::<toml::Table>().map(|table| table.len()), Ok(3), "{toml}");
    check(&toml);
}

#[test]
fn an_agent_that_takes_it_listens_where_the_original_did() {
    let text = "{ port: 8125, address: '127.0.0.1', mgmt_address: '127.0.0.1', flushInterval: 2000 }";
    let output = convert("--from-etsy", "/dev/stdin", text);
    let toml = self::text(output.stdout);
    // The ports of a test are free ones; `listen.udp` has one already.
    let toml = toml.replace("127.0.0.1:8126", "127.0.0.1:0");
    let agent = Agent::start_with_file(&toml);
    agent.datagram("a:1|c");
    agent.wait_for("a", "value", 1);
    assert!(agent.address("console").ip().is_loopback());
}

#[test]
fn a_unix_socket_of_the_original_takes_its_lines() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let config = format!("{{ server: './servers/tcp', socket: '{}', socket_mod: 0600 }}", path.display());
    let toml = text(convert("--from-etsy", "/dev/stdin", &config).stdout).replace("127.0.0.1:8126", "127.0.0.1:0");
    let agent = Agent::start_with_file(&toml);
    std::os::unix::net::UnixStream::connect(&path).unwrap().write_all(b"unix:1|c\n").unwrap();
    agent.wait_for("unix", "value", 1);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_listens_everywhere_is_reached_by_ipv4_and_ipv6() {
    // Ports of the kernel's choice, since those of the exporter may be taken.
    let flags = "--statsd.listen-udp=:0 --statsd.listen-tcp=0.0.0.0:0 --web.listen-address=:0";
    let toml = text(convert("--from-statsd-exporter", flags, "").stdout);
    let own: toml::Table = toml.parse().unwrap();
    let first = |section: &str, key: &str| format!("{section}.{key}={}", own[section][key][0].as_str().unwrap());
    let agent = Agent::start(&[&first("listen", "udp"), &first("listen", "tcp"), &first("http", "scrape")]);
    let loopbacks: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for ip in loopbacks {
        let at = |listener: &str| SocketAddr::new(ip, agent.address(listener).port());
        let mut stream = TcpStream::connect(at("tcp")).unwrap();
        stream.write_all(b"all:1|c\n").unwrap();
        UdpSocket::bind((ip, 0)).unwrap().send_to(b"all:1|c", at("udp")).unwrap();
        TcpStream::connect(at("scrape")).unwrap();
    }
    agent.wait_for("all", "value", 4);
}

#[test]
fn a_long_file_is_called_long_though_it_is_cut_within_a_letter() {
    for head in ["", "a", "ab"] {
        let output = convert("--from-etsy", "/dev/stdin", &format!("{head}{}", "\u{20ac}".repeat(400_000)));
        let stderr = text(output.stderr);
        assert!(output.status.code() == Some(78) && stderr.contains("longer than 1024 KiB"), "{stderr}");
    }
}

#[test]
fn what_can_not_be_read_is_named_with_its_place() {
    for (input, want) in [
        (
            "{\n  port: 8125,\n  graphiteHost: process.env.GRAPHITE_HOST || 'x',\n}",
            "/dev/stdin:3:17: \"process.env.GRAPHITE_HOST",
        ),
        ("{ port: 8125", "/dev/stdin:1:13: expected \",\" or \"}\""),
        ("{ port: 99999 }", "/dev/stdin:1:9: port: no port"),
        ("", "/dev/stdin:1:1: expected a value"),
    ] {
        let output = convert("--from-etsy", "/dev/stdin", input);
        let stderr = text(output.stderr);
        assert!(output.status.code() == Some(78) && stderr.contains(want), "{stderr}");
        assert!(output.stdout.is_empty() && stderr.lines().count() == 1, "{stderr}");
    }
    assert_eq!(convert("--from-etsy", "/nowhere/config.js", "").status.code(), Some(66));
    assert_eq!(convert("--from-etsy", "/tmp", "").status.code(), Some(74));
    let both = tallyd().args(["check", "--from-etsy", "a", "--from-statsd-exporter", "b"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn flags_of_the_exporter_are_ours() {
    let directory = tempfile::tempdir().unwrap();
    let (map, socket) = (directory.path().join("my map.yml"), directory.path().join("s"));
    std::fs::write(&map, "mappings:\n- match: a.*\n  name: a\n").unwrap();
    let flags = format!(
        "/bin/statsd_exporter --statsd.mapping-config='{}' --statsd.listen-udp=:9125 --statsd.listen-tcp '' \
         --statsd.listen-unixgram {} --statsd.unixsocket-mode=660 --statsd.read-buffer=4194304 --web.listen-address=127.0.0.1:9102 \
         --no-statsd.parse-signalfx-tags --statsd.relay.address=10.0.0.9:8125 --statsd.relay.packet-length=512 --log.level=debug \
         --log.format=json --statsd.cache-size=1000 --statsd.cache-type=random --statsd.event-queue-size=1 \
         --statsd.event-flush-threshold=1 --statsd.event-flush-interval=1s --statsd.udp-packet-queue-size=1 --debug.dump-fsm=x",
        map.display(),
        socket.display()
    );
    let output = convert("--from-statsd-exporter", &flags, "");
    assert!(output.status.success(), "{}", text(output.stderr));
    let toml = text(output.stdout);
    check(&toml);
    for line in [
        "udp = [\"[::]:9125\"]",
        "tcp = []",
        "unix_mode = \"0660\"",
        "receive_buffer = \"4MiB\"",
        "scrape = [\"127.0.0.1:9102\"]",
        "tag_dialects = [\"dogstatsd\", \"influx\", \"librato\"]",
        "to = [\"10.0.0.9:8125\"]",
        "packet = \"512B\"",
        "level = \"debug\"",
    ] {
        assert!(toml.lines().any(|ours| ours == line), "{line}\n{toml}");
    }
    let toml = text(convert("--from-statsd-exporter", "--web.enable-lifecycle", "").stdout);
    assert!(toml.contains("\nlifecycle = true\n"), "{toml}");
    check(&toml);
    let unknown = convert("--from-statsd-exporter", "--statsd.listen-upd=:1", "");
    let stderr = text(unknown.stderr);
    assert!(unknown.status.code() == Some(78) && stderr.contains("did you mean --statsd.listen-udp?"), "{stderr}");
}
