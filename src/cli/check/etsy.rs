//! A configuration of Etsy's StatsD (0.9 and 0.10) as one of ours. Every key of its example configuration, its
//! documentation and its proxy is known here; what has no counterpart is said with the reason, and other keys are warned
//! of. Pure; nothing in the file is evaluated ([`literal`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use toml::{Table, Value as Toml};

use super::draft::{Draft, Refusal};
use super::literal::{self, Member, Node, Value};
use super::relay;
use crate::units::{Mode, Time};

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
const KNOWN: [&str; 35] = [
    "port",
    "address",
    "address_ipv6",
    "server",
    "servers",
    "socket",
    "socket_mod",
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
    idle(&root, &mut draft);
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

    /// An object inside of this one; `example` is what could stand there, `path` what stands before its names.
    fn entry(&self, node: &'a Node, path: &'a str, example: &str) -> Result<Self, Refusal> {
        let Value::Object(members) = &node.value else {
            let remedy = format!("{} where an object was expected: {example}", node.value.name());
            return self.wrong(node, path.trim_end_matches('.'), &remedy);
        };
        Ok(Self { path, members, ..*self })
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

    /// A list, where the original takes nothing else for one: it is told then, and the list is empty.
    fn true_list(&self, name: &str, draft: &mut Draft) -> &'a [Node] {
        match self.get(name) {
            Some(Node { value: Value::List(nodes), .. }) => return nodes,
            Some(Node { at, value }) if !value.is_falsy() => {
                let Self { file, path, .. } = self;
                let is = value.name();
                draft.warn(format!(
                    "{file}:{at}: {path}{name} is left out: the original takes no notice of {is}, only of a list"
                ));
            }
            Some(_) | None => {}
        }
        &[]
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

/// All addresses, those of IPv4 among them.
const ALL: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

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

/// Keys of a server.
const OF_SERVER: [&str; 6] = ["server", "address", "address_ipv6", "port", "socket", "socket_mod"];

/// Where the servers listen.
#[derive(Debug, Default)]
struct Listeners {
    udp: Vec<String>,
    tcp: Vec<String>,
    /// Unix sockets with the permissions of their files.
    unix: Vec<(String, Mode)>,
}

fn listeners(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let mut listeners = Listeners::default();
    match root.get("servers").filter(|node| !node.value.is_falsy()) {
        Some(Node { value: Value::List(nodes), .. }) => {
            for node in nodes {
                let server = root.entry(node, "servers.", "{ server: './servers/udp', port: 8125 }")?;
                listener(&server, &mut listeners, draft)?;
                server.warn_of_others(&OF_SERVER, draft);
            }
            let ignored = OF_SERVER.into_iter().filter(|name| root.get(name).is_some());
            ignored.for_each(|name| {
                draft.leave(name, "the original takes it from each of its servers, where there are some")
            });
        }
        Some(node) => {
            return root.wrong(node, "servers", &format!("{} where a list of objects was expected", node.value.name()));
        }
        None => listener(root, &mut listeners, draft)?,
    }
    listeners.write(draft);
    Ok(())
}

impl Listeners {
    fn write(self, draft: &mut Draft) {
        let Self { udp, tcp, unix } = self;
        let comment =
            "port, address, address_ipv6 of each server \"udp\"; the original's default is all addresses of IPv4";
        draft.set("listen.udp", udp, comment);
        let comment = "port, address of each server \"tcp\"; the original's default is all addresses, of IPv6 as of IPv4. On a host \
                       without IPv6 write 0.0.0.0 for [::]";
        draft.set("listen.tcp", tcp, comment);
        let Some(mode) = unix.last().map(|(_, mode)| *mode) else { return };
        if unix.iter().any(|(_, other)| *other != mode) {
            draft.warn(format!("socket_mod: all sockets have the same permissions here, so {mode} is taken"));
        }
        draft.set(
            "listen.unix",
            unix.into_iter().map(|(path, _)| path).collect::<Vec<_>>(),
            "socket of each server \"tcp\"",
        );
        draft.set(
            "listen.unix_mode",
            mode.to_string(),
            "socket_mod; the original's default is what a umask of 022 leaves",
        );
    }
}

fn listener(server: &Object<'_>, listeners: &mut Listeners, draft: &mut Draft) -> Result<(), Refusal> {
    let module = server.text("server")?.unwrap_or_else(|| "./servers/udp".to_owned());
    match last_part(&module) {
        "udp" => {
            let of = |name: &&str| server.get(name).is_some();
            let ignored = ["socket", "socket_mod"].into_iter().filter(of);
            ignored.for_each(|name| draft.leave(name, "the original takes notice of it in a server \"tcp\" alone"));
            let is_v6 = server.truth("address_ipv6") == Some(true);
            let any = if is_v6 { ALL } else { Ipv4Addr::UNSPECIFIED.into() };
            listeners.udp.push(address(ip(server, "address", any)?, server.port("port", 8125)?));
        }
        "tcp" => match server.text("socket")? {
            Some(path) => listeners.unix.push(unix(server, path)?),
            None => listeners.tcp.push(address(ip(server, "address", ALL)?, server.port("port", 8125)?)),
        },
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

/// The path of a socket and the permissions of its file, which the original takes as a number or as octal digits.
fn unix(server: &Object<'_>, path: String) -> Result<(String, Mode), Refusal> {
    let of = |name| server.get(name).filter(|node| !node.value.is_falsy());
    if let Some(node) = of("socket").filter(|_| !path.starts_with('/')) {
        return server.wrong(node, "socket", "no path from the root; write one that begins with /");
    }
    let Some(node) = of("socket_mod") else { return Ok((path, Mode(0o755))) };
    let number = match &node.value {
        Value::Number(number) if number.fract() == 0.0 && *number > 0.0 => Some(*number as u32),
        Value::Text(digits) => u32::from_str_radix(digits, 8).ok(),
        Value::Number(_) | Value::Undefined | Value::Null | Value::Bool(_) | Value::List(_) | Value::Object(_) => None,
    };
    match number.filter(|bits| *bits <= 0o777) {
        Some(bits) => Ok((path, Mode(bits))),
        None => server.wrong(node, "socket_mod", "no permissions; write some such as 0660"),
    }
}

/// The name of a module without its directory: `./backends/graphite.js` is `graphite`.
fn last_part(module: &str) -> &str {
    let last = module.rsplit('/').next().unwrap_or(module);
    last.strip_suffix(".js").unwrap_or(last)
}

fn console(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let port = root.port("mgmt_port", 8126)?;
    let configured = ip(root, "mgmt_address", ALL)?;
    if configured.to_canonical().is_loopback() {
        draft.set("export.console.listen", vec![address(configured, port)], "mgmt_address, mgmt_port");
        return Ok(());
    }
    let said = match root.text("mgmt_address")? {
        Some(_) => format!("mgmt_address is {configured}"),
        None => "the original's default is all addresses".to_owned(),
    };
    let comment = format!(
        "mgmt_port; {said}, where other machines could delete, since nobody is asked for a token. To let them, \
         write \"{}\" and [http] insecure = true.",
        address(configured, port)
    );
    draft.set("export.console.listen", vec![address(IpAddr::from([127, 0, 0, 1]), port)], comment);
    draft.warn(format!("{}: the management port is taken to 127.0.0.1:{port}: {said}", root.file));
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
    if interval > 1_000 {
        let (file, interval) = (root.file, Time::millis(interval));
        draft.warn(format!(
            "{file}: flushInterval: nothing from 100 ms to a second divides it, so figures go to the journal only every {interval}, \
             and what came since is lost if the process is killed; write a rounder one"
        ));
    }
    let percentiles = percentiles(root)?;
    draft.set("flush.percentiles", percentiles, "percentThreshold");
    Ok(())
}

/// The longest time from 100 ms to a second that divides a window, else the whole window.
fn interval_of(window_ms: u64) -> u64 {
    (100..=1_000).rev().find(|interval| window_ms.is_multiple_of(*interval)).unwrap_or(window_ms)
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
    for node in root.true_list("calculatedTimerMetrics", draft) {
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
    let mut histograms = Vec::new();
    for node in root.true_list("histogram", draft) {
        histograms.extend(histogram(root, node, draft)?);
    }
    if !histograms.is_empty() {
        draft.set("flush.histograms", histograms, "histogram");
    }
    Ok(())
}

/// Nothing for an entry that the original finds in no name.
fn histogram(root: &Object<'_>, node: &Node, draft: &mut Draft) -> Result<Option<Toml>, Refusal> {
    let entry = root.entry(node, "histogram.", "{ metric: '', bins: [10, 'inf'] }")?;
    entry.warn_of_others(&["metric", "bins"], draft);
    let metric = match entry.get("metric").map(|node| &node.value) {
        Some(Value::Text(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        Some(_) | None => {
            let (file, at) = (root.file, node.at);
            draft.warn(format!(
                "{file}:{at}: this histogram is left out: without a metric it is for no timer; \"\" is in each name"
            ));
            return Ok(None);
        }
    };
    let bins = bins(&entry, draft)?.into_iter().map(Toml::Float).collect();
    Ok(Some(Toml::Table(Table::from_iter([
        ("metric".to_owned(), Toml::from(metric)),
        ("bins".to_owned(), Toml::Array(bins)),
    ]))))
}

/// Bounds of bins in ascending order: in the original's other ones there is never anything.
fn bins(entry: &Object<'_>, draft: &mut Draft) -> Result<Vec<f64>, Refusal> {
    let mut bins: Vec<f64> = Vec::new();
    for node in entry.true_list("bins", draft) {
        let bound = match (node.value.text(), node.value.number()) {
            (Some("inf"), _) => f64::INFINITY,
            (_, Some(number)) if !number.is_nan() => number,
            (_, _) => {
                let remedy = format!("{} where a number or 'inf' was expected", node.value.name());
                return entry.wrong(node, "bins", &remedy);
            }
        };
        match bins.last() {
            Some(last) if bound < *last => {
                let (file, at) = (entry.file, node.at);
                draft.warn(format!(
                    "{file}:{at}: the bin {bound} is left out: it stands behind {last}, so it is always 0"
                ));
            }
            Some(_) | None => bins.push(bound),
        }
    }
    Ok(bins)
}

fn idle(root: &Object<'_>, draft: &mut Draft) {
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
    // The original takes anything but a whole number above 1 for 1, a text too.
    let Some(node) = root.get("gaugesMaxTTL") else { return };
    let windows = match &node.value {
        Value::Number(number) if number.fract() == 0.0 && *number > 1.0 => *number as i64,
        Value::Number(_)
        | Value::Text(_)
        | Value::Undefined
        | Value::Null
        | Value::Bool(_)
        | Value::List(_)
        | Value::Object(_) => 1,
    };
    draft.set("flush.gauges_max_ttl", windows, "gaugesMaxTTL");
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
    draft.set("export.graphite.to", relay::target(&host, port), format!("graphiteHost, {port_name}"));
    let unused = if is_pickle { "graphitePort" } else { "graphitePicklePort" };
    if root.get(unused).is_some() {
        draft.leave(unused, "the other protocol is the one that is used");
    }
    let protocol = if is_pickle { "pickle" } else { "plaintext" };
    draft.set("export.graphite.protocol", protocol, "graphiteProtocol");
    if let Some(counts) = root.truth("flush_counts") {
        draft.set("export.graphite.flush_counts", counts, "flush_counts");
    }
    if let Some(prefix) = part(root, "prefixStats", draft)? {
        draft.set("export.graphite.prefix_stats", prefix, "prefixStats");
    }
    namespace(root, draft)
}

fn namespace(root: &Object<'_>, draft: &mut Draft) -> Result<(), Refusal> {
    let Some(node) = root.get("graphite").filter(|node| !node.value.is_falsy()) else { return Ok(()) };
    let graphite = root.entry(node, "graphite.", "{ legacyNamespace: false }")?;
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
        if let Some(text) = part(&graphite, theirs, draft)? {
            draft.set(&format!("export.graphite.{ours}"), text, format!("graphite.{theirs}"));
        }
    }
    let known: Vec<_> = texts.iter().map(|(theirs, _)| *theirs).chain(["legacyNamespace"]).collect();
    graphite.warn_of_others(&known, draft);
    Ok(())
}

/// A part of a name. An empty text is one. null is not the default: the original makes the text "null" of it where it is put
/// behind or before a dot, and an empty part between two dots elsewhere.
fn part(object: &Object<'_>, name: &str, draft: &mut Draft) -> Result<Option<String>, Refusal> {
    let Some(node) = object.get(name) else { return Ok(None) };
    match (&node.value, node.value.text(), node.value.number()) {
        (_, Some(text), _) => Ok(Some(text.to_owned())),
        (_, None, Some(number)) => Ok(Some(number.to_string())),
        (Value::Null, ..) if ["globalSuffix", "prefixStats"].contains(&name) => Ok(Some("null".to_owned())),
        (Value::Null, ..) => {
            let Object { file, path, .. } = object;
            draft.warn(format!(
                "{file}:{}: {path}{name} is taken for \"\": of null the original makes an empty part, with two dots in a row",
                node.at
            ));
            Ok(Some(String::new()))
        }
        (_, None, None) => object.wrong(node, name, &format!("{} where a text was expected", node.value.name())),
    }
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
    for node in root.true_list("repeater", draft) {
        let entry = root.entry(node, "repeater.", "{ host: 'a', port: 8125 }")?;
        if entry.number("port")?.is_none() {
            return entry.wrong(node, "port", "write host and port");
        }
        let host = entry.text("host")?.unwrap_or_default();
        targets.push(relay::target(&host, entry.port("port", 8125)?));
        entry.warn_of_others(&["host", "port"], draft);
    }
    relay::set(draft, "repeater", targets);
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
            ("{ server: './servers/tcp', port: 1 }".to_owned(), "listen.tcp", r#"["[::]:1"]"#),
            ("{ server: 'tcp', address: '0.0.0.0' }".to_owned(), "listen.tcp", r#"["0.0.0.0:8125"]"#),
            (
                "{ server: 'tcp', address_ipv6: true, address: '10.0.0.1' }".to_owned(),
                "listen.tcp",
                r#"["10.0.0.1:8125"]"#,
            ),
            ("{ ipv6: true }".to_owned(), "listen.udp", r#"["0.0.0.0:8125"]"#),
            ("{ socket: '/s', port: 1 }".to_owned(), "listen.udp", r#"["0.0.0.0:1"]"#),
            ("{ socket: '/s' }".to_owned(), "listen.unix", "none"),
            ("{ server: 'tcp', socket: '/s', port: 1 }".to_owned(), "listen.unix", r#"["/s"]"#),
            ("{ server: 'tcp', socket: '/s', port: 1 }".to_owned(), "listen.tcp", "[]"),
            ("{ server: 'tcp', socket: '/s' }".to_owned(), "listen.unix_mode", "\"0755\""),
            ("{ server: 'tcp', socket: '/s', socket_mod: 0660 }".to_owned(), "listen.unix_mode", "\"0660\""),
            ("{ server: 'tcp', socket: '/s', socket_mod: '620' }".to_owned(), "listen.unix_mode", "\"0620\""),
            ("{ servers: false, port: 1 }".to_owned(), "listen.udp", r#"["0.0.0.0:1"]"#),
            ("{ servers: null }".to_owned(), "listen.udp", r#"["0.0.0.0:8125"]"#),
            ("{ servers: 0 }".to_owned(), "listen.udp", r#"["0.0.0.0:8125"]"#),
            ("{ servers: '' }".to_owned(), "listen.udp", r#"["0.0.0.0:8125"]"#),
            ("{ servers: [] }".to_owned(), "listen.udp", "[]"),
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
            ("{ flushInterval: 2500 }".to_owned(), "flush.interval", "\"625ms\""),
            ("{ flushInterval: 10010 }".to_owned(), "flush.interval", "\"910ms\""),
            ("{ flushInterval: 10007 }".to_owned(), "flush.interval", "\"10s 7ms\""),
            ("{ flushInterval: 50 }".to_owned(), "flush.interval", "\"50ms\""),
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
            ("{ calculatedTimerMetrics: 'count' }".to_owned(), "flush.timer_metrics", "none"),
            ("{ histogram: [{ bins: [1] }, { metric: null, bins: [1] }] }".to_owned(), "flush.histograms", "none"),
            ("{ histogram: { metric: '', bins: [1] } }".to_owned(), "flush.histograms", "none"),
            (
                "{ histogram: [{ metric: '', bins: [10, 5, 'inf', 20] }, { metric: 7, bins: 3 }] }".to_owned(),
                "flush.histograms",
                r#"[{ metric = "", bins = [10.0, inf] }, { metric = "7", bins = [] }]"#,
            ),
            ("{ gaugesMaxTTL: '5' }".to_owned(), "flush.gauges_max_ttl", "1"),
            ("{ gaugesMaxTTL: 'x' }".to_owned(), "flush.gauges_max_ttl", "1"),
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
            (graphite("prefixStats: null"), "export.graphite.prefix_stats", "\"null\""),
            (graphite("graphite: { globalSuffix: null }"), "export.graphite.global_suffix", "\"null\""),
            (graphite("graphite: { prefixSet: null }"), "export.graphite.prefix_set", "\"\""),
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
            (
                repeater(
                    "repeater: [{ port: 1 }, { host: 'a', port: 1 }, { host: 'a', port: '1' }, { host: 'b c', port: 1 }]",
                ),
                "export.relay.to",
                r#"["127.0.0.1:1", "a:1"]"#,
            ),
            (repeater("repeater: [{ host: 'localhost', port: 8125 }]"), "export.relay", "none"),
            (repeater("repeaterProtocol: 'tcp', repeater: [{ host: 'a', port: 1 }]"), "export.relay", "none"),
            ("{ debug: true }".to_owned(), "log.level", "\"debug\""),
        ];
        for (text, key, want) in cases {
            let found = at(&text, key).replace(".0,", ",").replace(".0]", "]");
            assert_eq!(found, want.replace(".0,", ",").replace(".0]", "]"), "{text} {key}");
            assert_eq!(convert("c.js", &text).unwrap().refusals(), [""; 0], "{text}");
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
    fn what_a_person_should_look_at_is_warned_of() {
        let many: String = (1..=17).map(|port| format!("{{ host: 'a', port: {port} }}, ")).collect();
        let many = format!("{{ backends: ['repeater'], repeater: [{many}] }}");
        let cases = [
            ("{ ipv6: true }", "c.js:1:3: unknown key \"ipv6\", which is left out"),
            (
                "{ socket_mode: 1 }",
                "c.js:1:3: unknown key \"socket_mode\", which is left out; did you mean \"socket_mod\"?",
            ),
            (
                "{ servers: [{ server: 'tcp', socket: '/a', socket_mod: 0600 }, { server: 'tcp', socket: '/b' }] }",
                "socket_mod: all sockets have the same permissions here, so 0755 is taken",
            ),
            ("{ flushInterval: 86399999 }", "c.js: flushInterval: nothing from 100 ms to a second divides it"),
            (
                "{ calculatedTimerMetrics: 'count' }",
                "c.js:1:27: calculatedTimerMetrics is left out: the original takes no notice of a text, only of a list",
            ),
            ("{ histogram: [{ bins: [1] }] }", "c.js:1:15: this histogram is left out: without a metric"),
            ("{ histogram: [{ metric: '', bins: [2, 1] }] }", "c.js:1:39: the bin 1 is left out: it stands behind 2"),
            ("{ graphiteHost: 'g', graphite: { prefixSet: null } }", "c.js:1:45: graphite.prefixSet is taken for \"\""),
            ("{ graphiteHost: 'g h' }", "export.graphite.to = \"g h:2003\": "),
            (&many, "repeater \"a:17\" is left out: there are 16 servers at most"),
            (
                "{ backends: ['repeater'], repeater: [{ host: 'b c', port: 1 }] }",
                "repeater \"b c:1\" is left out: export.relay.to = \"b c:1\": no host with a port",
            ),
            (
                "{ backends: ['repeater'], repeater: [{ host: '127.0.0.1', port: 8125 }] }",
                "repeater \"127.0.0.1:8125\" is left out: export.relay.to = \"127.0.0.1:8125\": this agent listens there",
            ),
            (
                "{ backends: ['repeater'], repeater: [{ host: 'a', port: 1 }, { host: 'a', port: 1 }] }",
                "repeater \"a:1\" is left out: it stands there twice",
            ),
        ];
        for (text, want) in cases {
            let draft = convert("c.js", text).unwrap();
            let all = [draft.warnings.clone(), draft.refusals()].concat();
            // That of the console is the other one.
            assert!(all.len() == 2 && all.iter().any(|warning| warning.contains(want)), "{text}: {all:?}");
        }
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
                "{ histogram: [{ metric: '', bins: ['x'] }] }",
                "c.js:1:36: histogram.bins: a text where a number or 'inf' was expected",
            ),
            ("{ backends: [1] }", "c.js:1:14: backends: a number where a text was expected"),
            ("{ backends: ['repeater'], repeater: [{ host: 'a' }] }", "c.js:1:38: repeater.port: write host and port"),
            ("{ servers: {} }", "c.js:1:12: servers: an object where a list of objects was expected"),
            ("{ server: 'tcp', socket: 's' }", "c.js:1:26: socket: no path from the root"),
            ("{ server: 'tcp', socket: '/s', socket_mod: 01000 }", "c.js:1:44: socket_mod: no permissions"),
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
