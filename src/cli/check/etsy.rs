//! A configuration of Etsy's StatsD (0.9 and 0.10) as one of ours. Every key of its example configuration, its
//! documentation and its proxy is known here; what has no counterpart is said with the reason, and other keys are warned
//! of. Pure; nothing in the file is evaluated ([`literal`]).

use std::net::IpAddr;

use toml::{Table, Value as Toml};

use super::draft::{Draft, Refusal};
use super::literal::{self, Member, Node, Value};
use crate::units::Time;

/// Keys without a counterpart, and why.
const LEFT: [(&str, &str); 14] = [
    ("title", "the process is named tallyd; in a unit, by Description="),
    ("healthStatus", "the console's `health` says up after each start; /-/ready says whether the agent is well"),
    (
        "dumpMessages",
        "lines are not logged; `tallyd explain` shows how one is read, GET /data/rejects the last that were rejected",
    ),
    ("keyFlush", "GET /data/metrics lists every name with its counts, GET /data/sources who sends most"),
    ("automaticConfigReload", "a file is read again at SIGHUP or POST /-/reload, and not because it changed"),
    ("stderrPrefix", "the log goes to standard error, or to systemd's journal with fields"),
    ("console", "nothing is printed at a flush; GET /data/metrics and GET /data/stream show the same"),
    ("nodes", "that is the proxy's: agents need none, since several add up in one Redis ([store] kind = \"redis\")"),
    ("host", "that is the proxy's; listen.udp has the addresses"),
    ("udp_version", "that is the proxy's; an address in listen.udp says it"),
    ("checkInterval", "that is the proxy's"),
    ("cacheSize", "that is the proxy's"),
    ("forkCount", "that is the proxy's; listen.workers threads read one address"),
    ("adminport", "that is the proxy's"),
];

/// Keys that are converted.
const KNOWN: [&str; 37] = [
    "port",
    "address",
    "address_ipv6",
    "ipv6",
    "server",
    "servers",
    "socket",
    "socket_mod",
    "socket_mode",
    "mgmt_port",
    "mgmt_address",
    "flushInterval",
    "percentThreshold",
    "flush_counts",
    "backends",
    "graphiteHost",
    "graphitePort",
    "graphitePicklePort",
    "graphiteProtocol",
    "graphite",
    "prefixStats",
    "repeater",
    "repeaterProtocol",
    "histogram",
    "calculatedTimerMetrics",
    "deleteIdleStats",
    "deleteCounters",
    "deleteTimers",
    "deleteSets",
    "deleteGauges",
    "gaugesMaxTTL",
    "keyNameSanitize",
    "debug",
    "log",
    "dumpMessages",
    "title",
    "console",
];

/// Makes a configuration of the text of a file of this name.
///
/// # Errors
/// The first thing that can't be read or converted, with its place.
pub(super) fn convert(file: &str, text: &str) -> Result<Draft, Refusal> {
    let node = literal::read(text).map_err(|error| Refusal(format!("{file}:{}: {}", error.at, error.fault)))?;
    let Value::Object(members) = &node.value else {
        return Err(Refusal(format!(
            "{file}:{}: {} where an object was expected: {{ port: 8125 }}",
            node.at,
            node.value.name()
        )));
    };
    let root = Object { file, path: "", members };
    let mut draft = Draft::default();
    listeners(&root, &mut draft)?;
    console(&root, &mut draft)?;
    names(&root, &mut draft);
    flush(&root, &mut draft)?;
    timers(&root, &mut draft)?;
    idle(&root, &mut draft)?;
    let backends = Backends::of(&root, &mut draft)?;
    graphite(&root, &backends, &mut draft)?;
    repeater(&root, &backends, &mut draft)?;
    log(&root, &mut draft);
    LEFT.iter().filter(|(name, _)| root.get(name).is_some()).for_each(|(name, why)| draft.leave(name, why));
    let known = KNOWN.iter().chain(LEFT.iter().map(|(name, _)| name)).copied();
    root.warn_of_others(&known.collect::<Vec<_>>(), &mut draft);
    Ok(draft)
}

/// An object of the file.
struct Object<'a> {
    file: &'a str,
    /// What stands before the names in messages.
    path: &'a str,
    members: &'a [Member],
}

impl<'a> Object<'a> {
    /// The value of a name, unless that is undefined.
    fn get(&self, name: &str) -> Option<&'a Node> {
        let last = self.members.iter().rev().find(|member| member.name == name);
        last.map(|member| &member.node).filter(|node| node.value != Value::Undefined)
    }

    fn wrong<T>(&self, node: &Node, name: &str, remedy: &str) -> Result<T, Refusal> {
        let Self { file, path, .. } = self;
        Err(Refusal(format!("{file}:{}: {path}{name}: {remedy}", node.at)))
    }

    /// A number that is not 0, as one or as a text: where the original has a default for anything else.
    fn number(&self, name: &str) -> Result<Option<f64>, Refusal> {
        let Some(node) = self.get(name).filter(|node| !node.value.is_falsy()) else { return Ok(None) };
        match node.value.number().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number).filter(|number| *number != 0.0)),
            None => self.wrong(node, name, &format!("{} where a number was expected", node.value.name())),
        }
    }

    fn port(&self, name: &str, default: u16) -> Result<u16, Refusal> {
        let number = self.number(name)?.unwrap_or_else(|| default.into());
        if number.fract() == 0.0 && (1.0..=65_535.0).contains(&number) {
            return Ok(number as u16);
        }
        self.get(name).map_or(Ok(default), |node| self.wrong(node, name, "no port; write 1 to 65535"))
    }

    /// A text, or a number for one. What JavaScript takes for false is none.
    fn text(&self, name: &str) -> Result<Option<String>, Refusal> {
        let Some(node) = self.get(name).filter(|node| !node.value.is_falsy()) else { return Ok(None) };
        match (node.value.text(), node.value.number()) {
            (Some(text), _) => Ok(Some(text.to_owned())),
            (None, Some(number)) => Ok(Some(number.to_string())),
            (None, None) => self.wrong(node, name, &format!("{} where a text was expected", node.value.name())),
        }
    }

    /// Whether it stands there, and is true to JavaScript.
    fn truth(&self, name: &str) -> Option<bool> {
        self.get(name).map(|node| !node.value.is_falsy())
    }

    /// A list, of one member where there is no list.
    fn list(&self, name: &str) -> &'a [Node] {
        match self.get(name) {
            Some(Node { value: Value::List(nodes), .. }) => nodes,
            Some(node) if !node.value.is_falsy() => std::slice::from_ref(node),
            Some(_) | None => &[],
        }
    }

    fn warn_of_others(&self, known: &[&str], draft: &mut Draft) {
        for member in self.members.iter().filter(|member| !known.contains(&member.name.as_str())) {
            let nearest = known.iter().min_by_key(|name| strsim::damerau_levenshtein(name, &member.name));
            let nearest = nearest.filter(|name| strsim::jaro_winkler(name, &member.name) > 0.85);
            let hint = nearest.map_or_else(String::new, |name| format!("; did you mean {name:?}?"));
            let (Self { file, path, .. }, Member { at, name, .. }) = (self, member);
            draft.warn(format!("{file}:{at}: unknown key \"{path}{name}\", which is left out{hint}"));
        }
    }
}

/// An address as the original takes it. A name would have to be looked up.
fn ip(object: &Object<'_>, name: &str, default: IpAddr) -> Result<IpAddr, Refusal> {
    let Some(text) = object.text(name)? else { return Ok(default) };
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(IpAddr::from([127, 0, 0, 1]));
    }
    let remedy = || format!("{text:?} is no address, and names are not looked up here; write the address");
    text.parse().or_else(|_| object.get(name).map_or(Ok(default), |node| object.wrong(node, name, &remedy())))
}

fn address(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

fn listeners(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let (mut udp, mut tcp) = (Vec::new(), Vec::new());
    match root.get("servers") {
        Some(_) => {
            for node in root.list("servers") {
                let Value::Object(members) = &node.value else {
                    return root.wrong(node, "servers", &format!("{} where an object was expected", node.value.name()));
                };
                let server = Object { path: "servers.", members, ..*root };
                listener(&server, &mut udp, &mut tcp, draft)?;
                let known =
                    ["server", "address", "address_ipv6", "ipv6", "port", "socket", "socket_mod", "socket_mode"];
                server.warn_of_others(&known, draft);
            }
        }
        None => listener(root, &mut udp, &mut tcp, draft)?,
    }
    draft.set(
        "listen.udp",
        udp,
        "port, address, address_ipv6 of each server \"udp\"; the original's default is all addresses of IPv4",
    );
    draft.set("listen.tcp", tcp, "the same of each server \"tcp\"");
    Ok(())
}

fn listener(
    server: &Object<'_>,
    udp: &mut Vec<String>,
    tcp: &mut Vec<String>,
    draft: &mut Draft,
) -> Result<(), Refusal> {
    let is_v6 = ["address_ipv6", "ipv6"].iter().any(|name| server.truth(name) == Some(true));
    let any: IpAddr = if is_v6 { IpAddr::from([0_u16; 8]) } else { IpAddr::from([0_u8; 4]) };
    let module = server.text("server")?.unwrap_or_else(|| "./servers/udp".to_owned());
    if server.text("socket")?.is_some() {
        let why = "lines by a stream of a unix socket are not read here; let clients send datagrams to listen.unixgram (listen.unix takes packets with their length before them), or lines to listen.tcp";
        draft.leave("socket", why);
        draft.warn(format!("{}: socket is left out: {why}", server.file));
        for mode in ["socket_mod", "socket_mode"].into_iter().filter(|mode| server.get(mode).is_some()) {
            draft.leave(mode, "listen.unix_mode has the permissions of unix sockets, as in \"0660\"");
        }
        return Ok(());
    }
    let at = address(ip(server, "address", any)?, server.port("port", 8125)?);
    match last_part(&module) {
        "udp" => udp.push(at),
        "tcp" => tcp.push(at),
        _ => {
            draft.leave(
                &format!("server {module:?}"),
                "a module that only the original can load; here there are listen.udp, listen.tcp and HTTP",
            );
            draft.warn(format!("{}: server {module:?} is left out: no such listener here", server.file));
        }
    }
    Ok(())
}

/// The name of a module without its directory: `./backends/graphite.js` is `graphite`.
fn last_part(module: &str) -> &str {
    let last = module.rsplit('/').next().unwrap_or(module);
    last.strip_suffix(".js").unwrap_or(last)
}

fn console(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let port = root.port("mgmt_port", 8126)?;
    let configured = ip(root, "mgmt_address", IpAddr::from([0_u8; 4]))?;
    if configured.to_canonical().is_loopback() {
        draft.set("export.console.listen", vec![address(configured, port)], "mgmt_address, mgmt_port");
        return Ok(());
    }
    let said = if root.text("mgmt_address")?.is_some() { "mgmt_address" } else { "the original's default" };
    let comment = format!(
        "mgmt_port; {said} is {configured}, where other machines could delete, since nobody is asked for a token. To let them, \
         write \"{}\" and [http] insecure = true.",
        address(configured, port)
    );
    draft.set("export.console.listen", vec![address(IpAddr::from([127, 0, 0, 1]), port)], comment);
    draft.warn(format!("{}: the management port is taken to 127.0.0.1:{port}: {said} is {configured}", root.file));
    Ok(())
}

fn names(root: &Object<'_>, draft: &mut Draft) {
    if let Some(is_sanitized) = root.truth("keyNameSanitize") {
        draft.set("protocol.name_policy", if is_sanitized { "etsy" } else { "none" }, "keyNameSanitize");
    }
}

fn flush(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let window = root.number("flushInterval")?.unwrap_or(10_000.0);
    if let Some(node) =
        root.get("flushInterval").filter(|_| window.fract() != 0.0 || !(1.0..=86_400_000.0).contains(&window))
    {
        return root.wrong(node, "flushInterval", "no number of milliseconds; write 1 to 86400000");
    }
    let window = window as u64;
    draft.set("flush.window", Time::millis(window).to_string(), "flushInterval");
    let interval = interval_of(window);
    if interval != 1_000 {
        let comment = "it must divide the window; the original has no such thing: figures go to the journal so often";
        draft.set("flush.interval", Time::millis(interval).to_string(), comment);
    }
    let percentiles = percentiles(root)?;
    draft.set("flush.percentiles", percentiles, "percentThreshold");
    Ok(())
}

/// The longest time up to a second that divides a window and is not too short to flush.
fn interval_of(window_ms: u64) -> u64 {
    let divides = |interval: &u64| window_ms.is_multiple_of(*interval);
    [1_000, 500, 250, 200, 100].into_iter().find(divides).unwrap_or(window_ms)
}

fn percentiles(root: &Object<'_>) -> Result<Vec<Toml>, Refusal> {
    let mut percentiles = Vec::new();
    for node in root.list("percentThreshold") {
        match node.value.number().filter(|percent| (-100.0..=100.0).contains(percent)) {
            Some(percent) => percentiles.push(Toml::Float(percent)),
            None => return root.wrong(node, "percentThreshold", "no percentile; write numbers from -100 to 100"),
        }
    }
    let is_default =
        !matches!(root.get("percentThreshold"), Some(Node { value: Value::List(_), .. })) && percentiles.is_empty();
    Ok(if is_default { vec![Toml::Float(90.0)] } else { percentiles })
}

fn timers(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let mut metrics = Vec::new();
    for node in root.list("calculatedTimerMetrics") {
        match node.value.text() {
            Some(text) => metrics.push(text.to_owned()),
            None => {
                let remedy = format!("{} where a text was expected", node.value.name());
                return root.wrong(node, "calculatedTimerMetrics", &remedy);
            }
        }
    }
    if !metrics.is_empty() {
        draft.set("flush.timer_metrics", metrics, "calculatedTimerMetrics");
    }
    let histograms = root.list("histogram").iter().map(|node| histogram(root, node)).collect::<Result<Vec<_>, _>>()?;
    if !histograms.is_empty() {
        draft.set("flush.histograms", histograms, "histogram");
    }
    Ok(())
}

fn histogram(root: &Object<'_>, node: &Node) -> Result<Toml, Refusal> {
    let Value::Object(members) = &node.value else {
        return root.wrong(
            node,
            "histogram",
            &format!("{} where an object was expected: {{ metric: '', bins: [10, 'inf'] }}", node.value.name()),
        );
    };
    let entry = Object { path: "histogram.", members, ..*root };
    let bound = |node: &Node| match (node.value.text(), node.value.number()) {
        (Some("inf"), _) => Ok(Toml::Float(f64::INFINITY)),
        (_, Some(number)) if !number.is_nan() => Ok(Toml::Float(number)),
        (_, _) => entry.wrong(node, "bins", &format!("{} where a number or 'inf' was expected", node.value.name())),
    };
    let bins = entry.list("bins").iter().map(bound).collect::<Result<Vec<_>, _>>()?;
    let metric = entry.text("metric")?.unwrap_or_default();
    Ok(Toml::Table(Table::from_iter([
        ("metric".to_owned(), Toml::from(metric)),
        ("bins".to_owned(), Toml::Array(bins)),
    ])))
}

fn idle(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let keys = [
        ("deleteIdleStats", "flush.delete_idle_stats"),
        ("deleteCounters", "flush.delete_counters"),
        ("deleteTimers", "flush.delete_timers"),
        ("deleteSets", "flush.delete_sets"),
        ("deleteGauges", "flush.delete_gauges"),
    ];
    for (theirs, ours) in keys {
        if let Some(is_deleted) = root.truth(theirs) {
            draft.set(ours, is_deleted, theirs);
        }
    }
    // The original takes anything but a whole number above 1 for 1.
    if let Some(windows) = root.number("gaugesMaxTTL")?.filter(|windows| windows.fract() == 0.0 && *windows > 1.0) {
        draft.set("flush.gauges_max_ttl", windows as i64, "gaugesMaxTTL");
    } else if root.get("gaugesMaxTTL").is_some() {
        draft.set("flush.gauges_max_ttl", 1, "gaugesMaxTTL");
    }
    Ok(())
}

/// What the original loads to send figures to.
struct Backends {
    has_graphite: bool,
    has_repeater: bool,
}

impl Backends {
    fn of(root: &Object<'_>, draft: &mut Draft) -> Result<Self, Refusal> {
        let mut backends = Self { has_graphite: root.truth("backends") != Some(true), has_repeater: false };
        for node in root.list("backends") {
            let Value::Text(module) = &node.value else {
                return root.wrong(node, "backends", &format!("{} where a text was expected", node.value.name()));
            };
            match last_part(module) {
                "graphite" => backends.has_graphite = true,
                "repeater" => backends.has_repeater = true,
                "console" => draft.leave(
                    "backends: console",
                    "nothing is printed at a flush; GET /data/metrics and GET /data/stream show the same",
                ),
                _ => {
                    let why = "a module that only the original can load; figures are in GET /metrics, GET /data/metrics, Graphite, Redis and Kafka";
                    draft.leave(&format!("backends: {module}"), why);
                    draft.warn(format!("{}:{}: backend {module:?} is left out: {why}", root.file, node.at));
                }
            }
        }
        Ok(backends)
    }
}

fn graphite(root: &Object<'_>, backends: &Backends, draft: &mut Draft) -> Result<(), Refusal> {
    const NAMES: [&str; 7] = [
        "graphiteHost",
        "graphitePort",
        "graphitePicklePort",
        "graphiteProtocol",
        "graphite",
        "prefixStats",
        "flush_counts",
    ];
    let host = root.text("graphiteHost")?.filter(|_| backends.has_graphite);
    let Some(host) = host else {
        let why = if backends.has_graphite {
            "without graphiteHost the original sends nothing to Graphite"
        } else {
            "backends does not name graphite, so the original sends nothing there"
        };
        NAMES.iter().filter(|name| root.get(name).is_some()).for_each(|name| draft.leave(name, why));
        return Ok(());
    };
    let protocol = root.text("graphiteProtocol")?.unwrap_or_else(|| "text".to_owned());
    let is_pickle = protocol == "pickle";
    let port_name = if is_pickle { "graphitePicklePort" } else { "graphitePort" };
    let port = root.port(port_name, if is_pickle { 2004 } else { 2003 })?;
    draft.set("export.graphite.to", target(&host, port), format!("graphiteHost, {port_name}"));
    let unused = if is_pickle { "graphitePort" } else { "graphitePicklePort" };
    if root.get(unused).is_some() {
        draft.leave(unused, "the other protocol is the one that is used");
    }
    let protocol = if is_pickle { "pickle" } else { "plaintext" };
    draft.set("export.graphite.protocol", protocol, "graphiteProtocol");
    if let Some(counts) = root.truth("flush_counts") {
        draft.set("export.graphite.flush_counts", counts, "");
    }
    // An empty prefix is one.
    if let Some(Node { value: Value::Text(prefix), .. }) = root.get("prefixStats") {
        draft.set("export.graphite.prefix_stats", prefix.as_str(), "prefixStats");
    }
    namespace(root, draft)
}

fn namespace(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let Some(node) = root.get("graphite").filter(|node| !node.value.is_falsy()) else { return Ok(()) };
    let Value::Object(members) = &node.value else {
        return root.wrong(node, "graphite", &format!("{} where an object was expected", node.value.name()));
    };
    let graphite = Object { path: "graphite.", members, ..*root };
    if let Some(node) = graphite.get("legacyNamespace") {
        // The original compares it with false, and nothing else.
        draft.set("export.graphite.legacy_namespace", node.value != Value::Bool(false), "graphite.legacyNamespace");
    }
    let texts = [
        ("globalPrefix", "global_prefix"),
        ("globalSuffix", "global_suffix"),
        ("prefixCounter", "prefix_counter"),
        ("prefixTimer", "prefix_timer"),
        ("prefixGauge", "prefix_gauge"),
        ("prefixSet", "prefix_set"),
    ];
    for (theirs, ours) in texts {
        // An empty text is one, and null is the default.
        let Some(node) = graphite.get(theirs).filter(|node| node.value != Value::Null) else { continue };
        let Some(text) = node.value.text() else {
            return graphite.wrong(node, theirs, &format!("{} where a text was expected", node.value.name()));
        };
        draft.set(&format!("export.graphite.{ours}"), text, format!("graphite.{theirs}"));
    }
    let known: Vec<_> = texts.iter().map(|(theirs, _)| *theirs).chain(["legacyNamespace"]).collect();
    graphite.warn_of_others(&known, draft);
    Ok(())
}

/// `host:port`, an address of IPv6 in brackets.
fn target(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn repeater(root: &Object<'_>, backends: &Backends, draft: &mut Draft) -> Result<(), Refusal> {
    if !backends.has_repeater {
        let names = ["repeater", "repeaterProtocol"].into_iter().filter(|name| root.get(name).is_some());
        names.for_each(|name| draft.leave(name, "backends does not name repeater, so the original sends nothing on"));
        return Ok(());
    }
    let protocol = root.text("repeaterProtocol")?.unwrap_or_else(|| "udp4".to_owned());
    if protocol == "tcp" {
        let why = "lines are sent on by UDP alone; where the other servers listen by UDP, name them in export.relay.to";
        draft.leave("repeater, repeaterProtocol: tcp", why);
        draft.warn(format!("{}: the repeater is left out: {why}", root.file));
        return Ok(());
    }
    let mut targets = Vec::new();
    for node in root.list("repeater") {
        let Value::Object(members) = &node.value else {
            return root.wrong(
                node,
                "repeater",
                &format!("{} where an object was expected: {{ host: 'a', port: 8125 }}", node.value.name()),
            );
        };
        let entry = Object { path: "repeater.", members, ..*root };
        match (entry.text("host")?, entry.number("port")?) {
            (Some(host), Some(_)) => targets.push(target(&host, entry.port("port", 8125)?)),
            (None, _) | (_, None) => return entry.wrong(node, "host", "write host and port"),
        }
        entry.warn_of_others(&["host", "port"], draft);
    }
    if !targets.is_empty() {
        draft.set("export.relay.to", targets, "repeater");
    }
    if root.get("repeaterProtocol").is_some() {
        draft.leave(
            "repeaterProtocol",
            "the addresses of a name say whether it is IPv4 or IPv6; they are tried in turn",
        );
    }
    Ok(())
}

fn log(root: &Object<'_>, draft: &mut Draft) {
    if let Some(is_debug) = root.truth("debug") {
        draft.set("log.level", if is_debug { "debug" } else { "info" }, "debug");
    }
    if root.get("log").is_some() {
        draft.leave("log", "the log goes to standard error, under systemd to its journal with fields; log.level is the least severe that is written");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn converted(text: &str) -> Table {
        let draft = convert("c.js", text).unwrap();
        draft.print("c.js").parse().unwrap()
    }

    fn refusal(text: &str) -> String {
        convert("c.js", text).unwrap_err().0
    }

    fn get<'t>(table: &'t Table, key: &str) -> Option<&'t Toml> {
        let mut words = key.split('.');
        let first = table.get(words.next()?)?;
        words.try_fold(first, |value, word| value.get(word))
    }

    fn at(text: &str, key: &str) -> String {
        get(&converted(text), key).map_or_else(|| "none".to_owned(), ToString::to_string)
    }

    #[test]
    fn each_key_becomes_ours() {
        let graphite = |rest: &str| format!("{{ graphiteHost: 'g', {rest} }}");
        let repeater = |rest: &str| format!("{{ backends: ['repeater'], {rest} }}");
        let cases = [
            ("{}".to_owned(), "listen.udp", r#"["0.0.0.0:8125"]"#),
            ("{}".to_owned(), "listen.tcp", "[]"),
            ("{ port: '8200', address: 'localhost' }".to_owned(), "listen.udp", r#"["127.0.0.1:8200"]"#),
            ("{ address_ipv6: true }".to_owned(), "listen.udp", r#"["[::]:8125"]"#),
            ("{ server: './servers/tcp', port: 1 }".to_owned(), "listen.tcp", r#"["0.0.0.0:1"]"#),
            (
                "{ servers: [{ server: 'x/tcp.js', port: 3 }, {}, {address: '::1'}] }".to_owned(),
                "listen.udp",
                r#"["0.0.0.0:8125", "[::1]:8125"]"#,
            ),
            ("{}".to_owned(), "export.console.listen", r#"["127.0.0.1:8126"]"#),
            ("{ mgmt_port: 9, mgmt_address: '::1' }".to_owned(), "export.console.listen", r#"["[::1]:9"]"#),
            ("{ mgmt_address: '10.0.0.1' }".to_owned(), "export.console.listen", r#"["127.0.0.1:8126"]"#),
            ("{ keyNameSanitize: false }".to_owned(), "protocol.name_policy", "\"none\""),
            ("{}".to_owned(), "flush.window", "\"10s\""),
            ("{ flushInterval: 2500 }".to_owned(), "flush.interval", "\"500ms\""),
            ("{ flushInterval: 1001 }".to_owned(), "flush.interval", "\"1s 1ms\""),
            ("{ flushInterval: 60000 }".to_owned(), "flush.interval", "none"),
            ("{}".to_owned(), "flush.percentiles", "[90]"),
            ("{ percentThreshold: 0 }".to_owned(), "flush.percentiles", "[90]"),
            ("{ percentThreshold: [] }".to_owned(), "flush.percentiles", "[]"),
            ("{ percentThreshold: [99.9, '-5', 50] }".to_owned(), "flush.percentiles", "[99.9, -5, 50]"),
            (
                "{ calculatedTimerMetrics: ['count', 'upper_percent'] }".to_owned(),
                "flush.timer_metrics",
                r#"["count", "upper_percent"]"#,
            ),
            (
                "{ histogram: [{ metric: 'a', bins: [0.5, '1', 'inf'] }] }".to_owned(),
                "flush.histograms",
                r#"[{ metric = "a", bins = [0.5, 1.0, inf] }]"#,
            ),
            ("{ deleteIdleStats: 1, deleteGauges: false }".to_owned(), "flush.delete_gauges", "false"),
            ("{ deleteIdleStats: 1 }".to_owned(), "flush.delete_idle_stats", "true"),
            ("{ deleteIdleStats: 1 }".to_owned(), "flush.delete_timers", "none"),
            ("{ gaugesMaxTTL: 3 }".to_owned(), "flush.gauges_max_ttl", "3"),
            ("{ gaugesMaxTTL: 0.5 }".to_owned(), "flush.gauges_max_ttl", "1"),
            ("{ graphitePort: 1 }".to_owned(), "export.graphite", "none"),
            (graphite("backends: ['./backends/console']"), "export.graphite", "none"),
            (graphite(""), "export.graphite.to", "\"g:2003\""),
            (graphite("graphiteProtocol: 'pickle', graphitePicklePort: 7"), "export.graphite.to", "\"g:7\""),
            (graphite("graphiteProtocol: 'pickle'"), "export.graphite.protocol", "\"pickle\""),
            (graphite("prefixStats: ''"), "export.graphite.prefix_stats", "\"\""),
            (graphite("flush_counts: false"), "export.graphite.flush_counts", "false"),
            (
                graphite("graphite: { legacyNamespace: false, globalPrefix: '' }"),
                "export.graphite.global_prefix",
                "\"\"",
            ),
            (graphite("graphite: { legacyNamespace: false }"), "export.graphite.legacy_namespace", "false"),
            (graphite("repeater: [{ host: 'a', port: 1 }]"), "export.relay", "none"),
            (
                repeater("repeater: [{ host: 'a', port: 1 }, { host: '::1', port: '2' }]"),
                "export.relay.to",
                r#"["a:1", "[::1]:2"]"#,
            ),
            (repeater("repeaterProtocol: 'tcp', repeater: [{ host: 'a', port: 1 }]"), "export.relay", "none"),
            ("{ debug: true }".to_owned(), "log.level", "\"debug\""),
        ];
        for (text, key, want) in cases {
            let found = at(&text, key).replace(".0,", ",").replace(".0]", "]");
            assert_eq!(found, want.replace(".0,", ",").replace(".0]", "]"), "{text} {key}");
        }
    }

    #[test]
    fn what_has_no_counterpart_is_said() {
        let each: String = LEFT.iter().map(|(name, _)| format!("{name}: 1, ")).collect();
        let draft = convert("c.js", &format!("{{ {each} log: {{}}, graphitePort: 1 }}")).unwrap();
        let text = draft.print("c.js");
        for name in LEFT.iter().map(|(name, _)| *name).chain(["log", "graphitePort"]) {
            assert!(text.contains(&format!("\n# - {name}: ")), "{name}: {text}");
        }
        assert_eq!(draft.warnings.len(), 1, "that of the console: {:?}", draft.warnings);
    }

    #[test]
    fn what_nobody_knows_is_warned_of() {
        let text = "{\n prot: 1,\n graphiteHost: 'g', graphite: { globalprefix: '' },\n backends: ['graphite', 'x-influx'], server: 'zmq', mgmt_address: '::1' }";
        let warnings = convert("c.js", text).unwrap().warnings.join("\n");
        for part in [
            "c.js:2:2: unknown key \"prot\", which is left out; did you mean \"port\"?",
            "c.js:3:33: unknown key \"graphite.globalprefix\", which is left out; did you mean \"globalPrefix\"?",
            "c.js:4:25: backend \"x-influx\" is left out",
            "server \"zmq\" is left out",
        ] {
            assert!(warnings.contains(part), "{part}: {warnings}");
        }
    }

    #[test]
    fn what_can_not_be_taken_is_refused_with_its_place() {
        let cases = [
            ("{ port: process.env.PORT }", "c.js:1:9: \"process.env.PORT\" would have to be evaluated"),
            ("[]", "c.js:1:1: a list where an object was expected"),
            ("{ port: 70000 }", "c.js:1:9: port: no port; write 1 to 65535"),
            ("{ port: {} }", "c.js:1:9: port: an object where a number was expected"),
            (
                "{ address: 'stats.example' }",
                "c.js:1:12: address: \"stats.example\" is no address, and names are not looked up here",
            ),
            ("{ flushInterval: 0.5 }", "c.js:1:18: flushInterval: no number of milliseconds"),
            ("{ percentThreshold: [101] }", "c.js:1:22: percentThreshold: no percentile"),
            ("{ histogram: [1] }", "c.js:1:15: histogram: a number where an object was expected"),
            (
                "{ histogram: [{ bins: ['x'] }] }",
                "c.js:1:24: histogram.bins: a text where a number or 'inf' was expected",
            ),
            ("{ backends: [1] }", "c.js:1:14: backends: a number where a text was expected"),
            ("{ backends: ['repeater'], repeater: [{ port: 1 }] }", "c.js:1:38: repeater.host: write host and port"),
            ("{ servers: ['udp'] }", "c.js:1:13: servers: a text where an object was expected"),
        ];
        for (text, want) in cases {
            let said = refusal(text);
            assert!(said.starts_with(want), "{text}: {said}");
        }
    }

    proptest! {
        /// Whatever stands at a key, it becomes TOML or is refused.
        #[test]
        fn any_values_give_toml_or_a_refusal(
            keys in proptest::collection::vec((proptest::sample::select(KNOWN.to_vec()), proptest::sample::select(vec![
                "1", "-1", "1e99", "NaN", "'a'", "'a\\n[x]\\u{7}'", "''", "[]", "{}", "null", "undefined", "true", "[{}]", "[1,'inf']",
                "'./backends/repeater'", "['graphite','repeater']", "'10.0.0.1'", "[{host:'a\\n',port:1}]", "{globalPrefix:'\\\\'}",
            ])), 0..12),
        ) {
            let text: String = keys.iter().map(|(key, value)| format!("{key}: {value},\n")).collect();
            if let Ok(draft) = convert("c.js", &format!("{{{text}}}")) {
                let printed = draft.print("c.js");
                prop_assert!(printed.parse::<Table>().is_ok(), "{}", printed);
            }
        }
    }
}
