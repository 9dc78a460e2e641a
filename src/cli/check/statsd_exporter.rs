//! The flags of statsd_exporter (0.30) as a configuration of ours. Every flag of its `--help` is known here; what has no
//! counterpart is said with the reason, and another flag is refused, as it refuses it itself. Pure.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::draft::{Draft, Refusal};
use super::relay;
use crate::export::relay::PACKET;
use crate::units::Size;

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// A value, in the same word or in the next.
    Value,
    /// Nothing; `--no-` before it denies it.
    Nothing,
}

/// Every flag, what it takes, and why it has no counterpart if it has none.
const FLAGS: [(&str, Takes, &str); 26] = [
    ("help", Takes::Nothing, "that is `tallyd help`"),
    ("version", Takes::Nothing, "that is `tallyd --version`"),
    ("check-config", Takes::Nothing, "that is `tallyd check`"),
    ("web.listen-address", Takes::Value, ""),
    ("web.enable-lifecycle", Takes::Nothing, ""),
    ("web.telemetry-path", Takes::Value, ""),
    ("statsd.listen-udp", Takes::Value, ""),
    ("statsd.listen-tcp", Takes::Value, ""),
    ("statsd.listen-unixgram", Takes::Value, ""),
    ("statsd.unixsocket-mode", Takes::Value, ""),
    ("statsd.mapping-config", Takes::Value, ""),
    ("statsd.read-buffer", Takes::Value, ""),
    ("statsd.cache-size", Takes::Value, NO_CACHE),
    ("statsd.cache-type", Takes::Value, NO_CACHE),
    ("statsd.event-queue-size", Takes::Value, NO_QUEUE),
    ("statsd.event-flush-threshold", Takes::Value, NO_QUEUE),
    ("statsd.event-flush-interval", Takes::Value, NO_QUEUE),
    (
        "statsd.udp-packet-queue-size",
        Takes::Value,
        "what a worker has not read waits in the kernel, as much as listen.receive_buffer holds",
    ),
    ("debug.dump-fsm", Takes::Value, "`tallyd explain` says which rule matches a line"),
    ("statsd.parse-dogstatsd-tags", Takes::Nothing, ""),
    ("statsd.parse-influxdb-tags", Takes::Nothing, ""),
    ("statsd.parse-librato-tags", Takes::Nothing, ""),
    ("statsd.parse-signalfx-tags", Takes::Nothing, ""),
    ("statsd.relay.address", Takes::Value, ""),
    ("statsd.relay.packet-length", Takes::Value, ""),
    ("log.level", Takes::Value, ""),
];

const NO_CACHE: &str = "rules are applied when a series is first seen, so there is no cache of them";

const NO_QUEUE: &str = "a line is counted when it is read, so there is no queue of events";

/// A flag that is not in the table above, since it says nothing if it has its default.
const FORMAT: &str = "log.format";

/// Flags with which the exporter says something and ends.
const ENDING: [&str; 3] = ["help", "version", "check-config"];

/// Bytes of all flags.
const SIZE_MAX: usize = 64 << 10;

/// Makes a configuration of flags as they stand on a command line.
///
/// # Errors
/// The first flag that the exporter does not know either, or a value that can't be taken.
pub(super) fn convert(text: &str) -> Result<Draft, Refusal> {
    let flags = Flags::parse(text)?;
    let mut draft = Draft::default();
    listeners(&flags, &mut draft)?;
    web(&flags, &mut draft)?;
    protocol(&flags, &mut draft);
    sent_on(&flags, &mut draft)?;
    if let Some(file) = flags.value("statsd.mapping-config").filter(|file| !file.is_empty()) {
        draft.set("mapping.file", file, "--statsd.mapping-config");
    }
    if let Some(level) = flags.value("log.level") {
        let lower = level.to_lowercase();
        if !["debug", "info", "warn", "error"].contains(&lower.as_str()) {
            return refuse("log.level", level, "no level; write debug, info, warn or error");
        }
        draft.set("log.level", lower, "--log.level");
    }
    for name in ENDING.into_iter().filter(|name| flags.is(name, false)) {
        draft.warn(format!("with --{name} the exporter ends at once; what is printed is what its other flags come to"));
    }
    let left = FLAGS.iter().filter(|(name, _, why)| !why.is_empty() && flags.has(name));
    left.for_each(|(name, _, why)| draft.leave(&format!("--{name}"), why));
    if flags.has(FORMAT) {
        draft
            .leave("--log.format", "the log is text with fields behind each line, under systemd fields of its journal");
    }
    let why = "the exporter shows a series for ever unless a rule has a ttl; here one leaves the scrape when it is idle for limits.idle, an hour (limits.idle_gauges, a day), and its total goes on when it returns";
    draft.leave("(no flag)", why);
    Ok(draft)
}

fn refuse<T>(flag: &str, value: &str, remedy: &str) -> Result<T, Refusal> {
    Err(Refusal(format!("--{flag}={value}: {remedy}")))
}

/// Flags with their values, `true` or `false` for those that take none.
#[derive(Debug, Default)]
struct Flags(Vec<(&'static str, String)>);

impl Flags {
    fn parse(text: &str) -> Result<Self, Refusal> {
        if text.len() > SIZE_MAX {
            return Err(Refusal(format!("the flags have more than {} KiB; leave out what is none", SIZE_MAX >> 10)));
        }
        let words = shlex::split(text).ok_or_else(|| Refusal(format!("{text:?}: a quote has no end; close it")))?;
        let mut flags = Self::default();
        let mut words = words.into_iter().peekable();
        // The whole command line, as it stands in a unit, is as good.
        words.next_if(|word| !word.starts_with('-'));
        while let Some(word) = words.next() {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            let (name, takes, denies) = known(name)?;
            let value = match (takes, value) {
                (Takes::Value, Some(value)) => value,
                (Takes::Value, None) => {
                    let value = words.next_if(|next| !next.starts_with('-'));
                    value.ok_or_else(|| Refusal(format!("--{name}: it lacks its value; write --{name}=VALUE")))?
                }
                (Takes::Nothing, None) => (!denies).to_string(),
                (Takes::Nothing, Some(value)) => {
                    return refuse(name, &value, "it takes no value; write --FLAG or --no-FLAG");
                }
            };
            if flags.has(name) {
                return Err(Refusal(format!("--{name}: it stands there twice; leave one out")));
            }
            flags.0.push((name, value));
        }
        Ok(flags)
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| *other == name).map(|(_, value)| value.as_str())
    }

    fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// Whether a flag is set that takes nothing.
    fn is(&self, name: &str, default: bool) -> bool {
        self.value(name).map_or(default, |value| value == "true")
    }

    /// An address; none where the flag is empty. The exporter listens by IPv6 and IPv4 at `:9125` as at `0.0.0.0:9125`.
    fn address(&self, name: &str, default: &str) -> Result<Option<String>, Refusal> {
        let text = self.value(name).unwrap_or(default);
        if text.is_empty() {
            return Ok(None);
        }
        let at = match text.rsplit_once(':') {
            Some(("" | "0.0.0.0", port)) => port.parse().ok().map(|port| SocketAddr::new(ALL, port)),
            Some((host, port)) if host.eq_ignore_ascii_case("localhost") => {
                port.parse().ok().map(|port| SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port))
            }
            Some(_) | None => text.parse().ok(),
        };
        match at {
            Some(at) => Ok(Some(at.to_string())),
            None => refuse(name, text, "no address with a port, and names are not looked up here; write the address"),
        }
    }

    /// A number of bytes or of something else.
    fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let Some(text) = self.value(name) else { return Ok(None) };
        text.parse().map(Some).or_else(|_| refuse(name, text, "no number; write one such as 1400"))
    }
}

/// All addresses, those of IPv4 among them.
const ALL: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// The flag of a word, what it takes, and whether the word denies it.
fn known(word: &str) -> Result<(&'static str, Takes, bool), Refusal> {
    let all = || FLAGS.iter().map(|(name, takes, _)| (*name, *takes)).chain([(FORMAT, Takes::Value)]);
    let find = |bare: &str| all().find(|(name, _)| *name == bare);
    let bare = if word == "-h" { Some("help") } else { word.strip_prefix("--") };
    if let Some((name, takes)) = bare.and_then(find) {
        return Ok((name, takes, false));
    }
    let denied = bare.and_then(|bare| bare.strip_prefix("no-")).and_then(find);
    if let Some((name, takes)) = denied.filter(|(_, takes)| *takes == Takes::Nothing) {
        return Ok((name, takes, true));
    }
    let nearest = all().min_by_key(|(name, _)| strsim::damerau_levenshtein(name, bare.unwrap_or(word)));
    let hint = nearest.filter(|(name, _)| strsim::jaro_winkler(name, bare.unwrap_or(word)) > 0.9);
    let hint = hint.map_or_else(|| "leave it out".to_owned(), |(name, _)| format!("did you mean --{name}?"));
    Err(Refusal(format!("{word:?}: statsd_exporter 0.30 has no such flag; {hint}")))
}

fn listeners(flags: &Flags, draft: &mut Draft) -> Result<(), Refusal> {
    let udp = flags.address("statsd.listen-udp", ":9125")?;
    let comment = "--statsd.listen-udp; \"[::]\" is IPv4 too, as in the exporter. On a host without IPv6 write \"0.0.0.0\", here \
                   and below";
    draft.set("listen.udp", udp.into_iter().collect::<Vec<_>>(), comment);
    let tcp = flags.address("statsd.listen-tcp", ":9125")?;
    draft.set("listen.tcp", tcp.into_iter().collect::<Vec<_>>(), "--statsd.listen-tcp");
    let unixgram = flags.value("statsd.listen-unixgram").filter(|path| !path.is_empty());
    if let Some(path) = unixgram {
        if !path.starts_with('/') {
            return refuse("statsd.listen-unixgram", path, "no path from the root; write one that begins with /");
        }
        draft.set("listen.unixgram", vec![path], "--statsd.listen-unixgram");
        let mode = flags.value("statsd.unixsocket-mode").unwrap_or("755");
        let octal = u32::from_str_radix(mode, 8).ok().filter(|octal| *octal <= 0o777);
        let Some(octal) = octal else {
            return refuse("statsd.unixsocket-mode", mode, "no permissions; write some such as 755");
        };
        draft.set("listen.unix_mode", format!("{octal:04o}"), "--statsd.unixsocket-mode");
    } else if flags.has("statsd.unixsocket-mode") {
        draft.leave("--statsd.unixsocket-mode", "there is no unix socket without --statsd.listen-unixgram");
    }
    // 0 is what the exporter takes for not given.
    if let Some(bytes) = flags.number("statsd.read-buffer")?.filter(|bytes| *bytes > 0) {
        draft.set("listen.receive_buffer", Size(bytes).to_string(), "--statsd.read-buffer");
    }
    Ok(())
}

fn web(flags: &Flags, draft: &mut Draft) -> Result<(), Refusal> {
    let comment =
        "--web.listen-address, for /metrics; /-/healthy, /-/ready and /-/reload are at http.api (127.0.0.1:7000).";
    match flags.address("web.listen-address", ":9102")? {
        Some(scrape) => draft.set("http.scrape", vec![scrape], comment),
        None => {
            let why = "an empty one is port 80 to the exporter";
            draft.set(
                "http.scrape",
                vec![SocketAddr::new(ALL, 80).to_string()],
                format!("--web.listen-address: {why}"),
            );
            draft.warn(format!("--web.listen-address=: {why}, and so it is taken; name another port in http.scrape"));
        }
    }
    let comment = "--web.enable-lifecycle, for POST /-/reload, which the exporter refuses by default; a stop is SIGTERM, there is \
                   no /-/quit";
    draft.set("http.lifecycle", flags.is("web.enable-lifecycle", false), comment);
    if let Some(path) = flags.value("web.telemetry-path").filter(|path| *path != "/metrics") {
        let why = "the path is always /metrics; set metrics_path in Prometheus' configuration, or leave it out there";
        draft.leave(&format!("--web.telemetry-path={path}"), why);
        draft.warn(format!("--web.telemetry-path={path} is left out: {why}"));
    }
    Ok(())
}

fn protocol(flags: &Flags, draft: &mut Draft) {
    draft.set("protocol.name_policy", "none", "the exporter matches names as they were sent");
    let dialects = [
        ("statsd.parse-dogstatsd-tags", "dogstatsd"),
        ("statsd.parse-influxdb-tags", "influx"),
        ("statsd.parse-librato-tags", "librato"),
        ("statsd.parse-signalfx-tags", "signalfx"),
    ];
    let on: Vec<_> = dialects.iter().filter(|(flag, _)| flags.is(flag, true)).map(|(_, dialect)| *dialect).collect();
    let comment = "--statsd.parse-*-tags; the exporter does not know tags of Graphite. What stands behind |# are tags whatever \
                   this list says.";
    draft.set("protocol.tag_dialects", on, comment);
}

fn sent_on(flags: &Flags, draft: &mut Draft) -> Result<(), Refusal> {
    let length = flags.number("statsd.relay.packet-length")?;
    match flags.value("statsd.relay.address").filter(|address| !address.is_empty()) {
        Some(address) => {
            // Without a host it is this one to the exporter.
            let port = address.strip_prefix(':').and_then(|port| port.parse().ok());
            let target = port.map_or_else(|| address.to_owned(), |port| relay::target("", port));
            relay::set(draft, "--statsd.relay.address", [target]);
            packet(length.unwrap_or(1_400), draft);
        }
        None if length.is_some() => {
            draft.leave("--statsd.relay.packet-length", "there is no relay without --statsd.relay.address")
        }
        None => {}
    }
    Ok(())
}

fn packet(length: u64, draft: &mut Draft) {
    let taken = length.clamp(*PACKET.start(), *PACKET.end());
    let comment = "--statsd.relay.packet-length; a longer line goes alone, where the exporter drops it";
    draft.set("export.relay.packet", Size(taken).to_string(), comment);
    if taken != length {
        let (least, most) = (PACKET.start(), PACKET.end());
        draft.warn(format!("--statsd.relay.packet-length={length} is taken as {taken}: it is {least} to {most} here"));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn converted(flags: &str) -> toml::Table {
        let draft = convert(flags).unwrap();
        draft.print("statsd_exporter").parse().unwrap()
    }

    fn at(flags: &str, key: &str) -> String {
        let table = converted(flags);
        let mut words = key.split('.');
        let first = words.next().and_then(|word| table.get(word));
        let value = first.and_then(|first| words.try_fold(first, |value, word| value.get(word)));
        value.map_or_else(|| "none".to_owned(), ToString::to_string)
    }

    #[test]
    fn each_flag_becomes_a_key() {
        let cases = [
            ("", "listen.udp", r#"["[::]:9125"]"#),
            ("--statsd.listen-tcp=0.0.0.0:1", "listen.tcp", r#"["[::]:1"]"#),
            ("--statsd.listen-tcp=127.0.0.1:1", "listen.tcp", r#"["127.0.0.1:1"]"#),
            ("--statsd.listen-udp= --statsd.listen-tcp ''", "listen.udp", "[]"),
            ("--statsd.listen-udp= --statsd.listen-tcp ''", "listen.tcp", "[]"),
            ("/usr/bin/statsd_exporter --statsd.listen-tcp [::1]:1", "listen.tcp", r#"["[::1]:1"]"#),
            ("--statsd.listen-unixgram=/run/s --statsd.unixsocket-mode=0660", "listen.unix_mode", "\"0660\""),
            ("--statsd.listen-unixgram=/run/s", "listen.unix_mode", "\"0755\""),
            ("--statsd.read-buffer=1048576", "listen.receive_buffer", "\"1MiB\""),
            ("", "http.scrape", r#"["[::]:9102"]"#),
            ("--web.listen-address=", "http.scrape", r#"["[::]:80"]"#),
            ("", "http.lifecycle", "false"),
            ("--web.listen-address localhost:1", "http.scrape", r#"["127.0.0.1:1"]"#),
            ("--web.enable-lifecycle", "http.lifecycle", "true"),
            ("--no-web.enable-lifecycle", "http.lifecycle", "false"),
            ("--statsd.mapping-config 'a b.yml'", "mapping.file", "\"a b.yml\""),
            ("", "protocol.tag_dialects", r#"["dogstatsd", "influx", "librato", "signalfx"]"#),
            (
                "--no-statsd.parse-influxdb-tags --statsd.parse-librato-tags",
                "protocol.tag_dialects",
                r#"["dogstatsd", "librato", "signalfx"]"#,
            ),
            ("--statsd.relay.address=a:1", "export.relay.to", r#"["a:1"]"#),
            ("--statsd.relay.address=a:1", "export.relay.packet", "\"1400B\""),
            ("--statsd.relay.address=a:1 --statsd.relay.packet-length=512", "export.relay.packet", "\"512B\""),
            ("--statsd.relay.address=:8125", "export.relay.to", r#"["127.0.0.1:8125"]"#),
            ("--statsd.relay.address=:9125", "export.relay.to", "none"),
            ("--statsd.relay.address=a:1 --statsd.relay.packet-length=10", "export.relay.packet", "\"64B\""),
            ("--statsd.relay.address=a:1 --statsd.relay.packet-length=99999", "export.relay.packet", "\"65507B\""),
            ("--log.level=WARN", "log.level", "\"warn\""),
            ("--log.level=warn --log.format=json", "log.level", "\"warn\""),
        ];
        for (flags, key, want) in cases {
            assert_eq!(at(flags, key), want, "{flags} {key}");
            assert_eq!(convert(flags).unwrap().refusals(), [""; 0], "{flags}");
        }
    }

    #[test]
    fn what_a_person_should_look_at_is_warned_of() {
        let cases = [
            ("--version", "with --version the exporter ends at once"),
            ("--help --no-version", "with --help the exporter ends at once"),
            ("--check-config", "with --check-config the exporter ends at once"),
            ("--web.listen-address=", "--web.listen-address=: an empty one is port 80 to the exporter"),
            (
                "--statsd.relay.address=a:1 --statsd.relay.packet-length=10",
                "--statsd.relay.packet-length=10 is taken as 64: it is 64 to 65507 here",
            ),
            (
                "--statsd.relay.address=:9125",
                "--statsd.relay.address \"127.0.0.1:9125\" is left out: export.relay.to = \"127.0.0.1:9125\": this agent listens",
            ),
            (
                "--statsd.relay.address=nowhere",
                "--statsd.relay.address \"nowhere\" is left out: export.relay.to = \"nowhere\": no host with a port",
            ),
        ];
        for (flags, want) in cases {
            let draft = convert(flags).unwrap();
            assert!(draft.warnings.len() == 1 && draft.warnings[0].starts_with(want), "{flags}: {:?}", draft.warnings);
            assert_eq!(draft.refusals(), [""; 0], "{flags}");
        }
    }

    #[test]
    fn every_other_flag_is_said_with_the_reason() {
        for (name, takes, why) in FLAGS.into_iter().filter(|(_, _, why)| !why.is_empty()) {
            let flag = if takes == Takes::Value { format!("--{name}=1") } else { format!("--{name}") };
            let text = convert(&flag).unwrap().print("flags");
            assert!(text.contains(&format!("# - --{name}: {}", &why[..10])), "{flag}: {text}");
        }
        let draft = convert("--web.telemetry-path=/m").unwrap();
        assert!(draft.warnings[0].starts_with("--web.telemetry-path=/m is left out"), "{:?}", draft.warnings);
    }

    #[test]
    fn what_the_exporter_does_not_take_is_refused() {
        let cases = [
            (
                "--statsd.listen-upd=:1",
                "\"--statsd.listen-upd\": statsd_exporter 0.30 has no such flag; did you mean --statsd.listen-udp?",
            ),
            ("statsd_exporter run", "\"run\": statsd_exporter 0.30 has no such flag; leave it out"),
            ("--no-log.level", "\"--no-log.level\": statsd_exporter 0.30 has no such flag"),
            ("--statsd.listen-udp", "--statsd.listen-udp: it lacks its value"),
            ("--statsd.listen-udp --version", "--statsd.listen-udp: it lacks its value"),
            ("--check-config=true", "--check-config=true: it takes no value"),
            ("--log.level=info --log.level=info", "--log.level: it stands there twice"),
            ("--log.level=loud", "--log.level=loud: no level"),
            ("--statsd.listen-udp=a.example:1", "--statsd.listen-udp=a.example:1: no address with a port"),
            ("--statsd.listen-unixgram=s", "--statsd.listen-unixgram=s: no path from the root"),
            ("--statsd.read-buffer=1k", "--statsd.read-buffer=1k: no number"),
            ("--log.level='info", "\"--log.level='info\": a quote has no end"),
        ];
        for (flags, want) in cases {
            let said = convert(flags).unwrap_err().0;
            assert!(said.starts_with(want), "{flags}: {said}");
        }
    }

    proptest! {
        #[test]
        fn any_flags_give_toml_or_a_refusal(
            flags in proptest::collection::vec((proptest::sample::select(FLAGS.to_vec()), "[ -~\\PC]{0,12}"), 0..6),
            text in "\\PC{0,20}",
        ) {
            let _ = convert(&text);
            let words = flags.iter().map(|((name, takes, _), value)| match takes {
                Takes::Value => format!("--{name}={value}"),
                Takes::Nothing => format!("--{name}"),
            });
            let words: Vec<_> = words.collect();
            let quoted = shlex::try_join(words.iter().map(String::as_str));
            if let Ok(draft) = quoted.map_err(drop).and_then(|text| convert(&text).map_err(drop)) {
                let printed = draft.print("flags");
                prop_assert!(printed.parse::<toml::Table>().is_ok(), "{}", printed);
            }
        }
    }
}
