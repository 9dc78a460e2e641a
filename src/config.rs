//! The configuration: the parts' own `Config` types composed, and the layers that a value may come from.
//!
//! Built-in defaults < TOML file < environment < `--set`. Every layer is turned into settings (a key, a value, an
//! [`Origin`]), each is tried by itself against the defaults, so that a wrong one is reported with its own place and
//! all of them are reported at once. It is pure: text and environment come as arguments, no file is opened here.
//! What stands in files that a configuration names is handed in afterwards by whoever reads them.
//! [`KEYS`] is the single definition of what a key means and whether a reload may change it; `packaging/tallyd.toml`
//! is printed from it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use crate::agent::limits as agent;
use crate::aggregate::{self, histogram, set, shard};
use crate::export::{console, graphite};
use crate::http::scrape;
use crate::http::tokens::Right;
use crate::kafka;
use crate::mapping::Mapping;
use crate::store::{self, journal, redis};
use crate::units::{ListenAddress, without_password};
use crate::{export, flush, http, ingest, listen, mapping, protocol, tls};

mod layers;
#[cfg(test)]
mod tests;

/// Everything an operator can set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The directory of the journal.
    pub state_dir: PathBuf,
    /// Where lines come in.
    pub listen: listen::Config,
    /// Where requests come in.
    pub http: http::Config,
    /// What becomes of records that come by HTTP.
    pub ingest: http::forward::Config,
    /// How a line is read.
    pub protocol: protocol::Config,
    /// When shards are sealed, and the figures of a window.
    pub flush: flush::Config,
    /// Where batches go.
    pub store: Store,
    /// The way to Kafka.
    pub kafka: kafka::Config,
    /// The rules that give series their names in a scrape.
    pub mapping: mapping::Config,
    /// What a scrape shows.
    pub prometheus: scrape::Config,
    /// What the agent hands out by itself.
    pub export: export::Config,
    /// Who we are in TLS.
    pub tls: tls::Config,
    /// What is written to standard error.
    pub log: Log,
    /// The parts' limits, one table for the operator.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("tallyd-data"),
            listen: listen::Config::default(),
            http: http::Config::default(),
            ingest: http::forward::Config::default(),
            protocol: protocol::Config::default(),
            flush: flush::Config::default(),
            store: Store::default(),
            kafka: kafka::Config::default(),
            mapping: mapping::Config::default(),
            prometheus: scrape::Config::default(),
            export: export::Config::default(),
            tls: tls::Config::default(),
            log: Log::default(),
            limits: Limits::default(),
        }
    }
}

/// `[limits]`: each part declares its own, here they lie side by side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Of lines.
    #[serde(flatten)]
    pub protocol: protocol::Limits,
    /// Of rejected lines.
    #[serde(flatten)]
    pub ingest: ingest::Limits,
    /// Of senders.
    #[serde(flatten)]
    pub sources: ingest::sources::Limits,
    /// Of sockets and streams.
    #[serde(flatten)]
    pub listen: listen::Limits,
    /// Of series in memory.
    #[serde(flatten)]
    pub aggregate: shard::Limits,
    /// Of idle series.
    #[serde(flatten)]
    pub flush: flush::Limits,
    /// Of the journal.
    #[serde(flatten)]
    pub journal: journal::Limits,
    /// Of Redis.
    #[serde(flatten)]
    pub redis: redis::Limits,
    /// Of Kafka.
    #[serde(flatten)]
    pub kafka: store::kafka::Limits,
    /// Of requests.
    #[serde(flatten)]
    pub http: http::Limits,
    /// Of Graphite.
    #[serde(flatten)]
    pub graphite: graphite::Limits,
    /// Of a stop.
    #[serde(flatten)]
    pub agent: agent::Limits,
}

/// `[store]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Store {
    /// Which one.
    pub kind: Kind,
    /// The journal's file.
    pub embedded: journal::Config,
    /// Where Redis is, if it is that.
    pub redis: redis::Config,
    /// The topic of totals, if it is Kafka.
    pub kafka: store::kafka::Config,
}

/// Where totals are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Nowhere: they end with the process.
    Memory,
    /// In the journal alone.
    #[default]
    Embedded,
    /// In the journal and in Redis, which many agents share.
    Redis,
    /// In the journal and in a topic of Kafka, which many agents share.
    #[cfg(feature = "kafka")]
    Kafka,
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "memory" => Ok(Self::Memory),
            "embedded" => Ok(Self::Embedded),
            "redis" => Ok(Self::Redis),
            #[cfg(feature = "kafka")]
            "kafka" => Ok(Self::Kafka),
            #[cfg(not(feature = "kafka"))]
            "kafka" => Err(D::Error::custom(kafka::NOT_BUILT)),
            _ => Err(D::Error::custom("no store; write \"memory\", \"embedded\", \"redis\" or \"kafka\"")),
        }
    }
}

/// `[log]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// The least severe level that is written.
    pub level: Level,
}

/// Severity of what is logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What an operator must act on.
    Error,
    /// What an operator should know.
    Warn,
    /// Starts, stops, reloads.
    #[default]
    Info,
    /// For finding faults.
    Debug,
    /// For developers.
    Trace,
}

/// Whether a running agent takes a key's new value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// From the reload on.
    Now,
    /// At the next start.
    Restart,
}

/// What an operator reads about a key or a section.
#[derive(Debug)]
pub struct Key {
    /// `section.key`, or a section's name.
    pub name: &'static str,
    /// What it does; a section's stands above the section.
    pub help: &'static str,
    /// Whether a reload may change it.
    pub reload: Reload,
}

macro_rules! keys {
    ($($name:literal, $reload:ident, $help:literal;)*) => {
        /// Every key and section in the order in which they are printed.
        pub const KEYS: &[Key] = &[$(Key { name: $name, help: $help, reload: Reload::$reload }),*];
    };
}

keys! {
    "state_dir", Restart, "Directory of the journal. Unset: the first of $STATE_DIRECTORY (systemd sets it), else ./tallyd-data.";

    "listen", Restart, "Where lines come in: StatsD and its dialects, any mix on any socket.";
    "listen.udp", Restart, "Addresses. Both loopbacks, because localhost is often ::1. Port 0 picks a free one.";
    "listen.tcp", Restart, "Addresses of streams of lines; TLS is spoken at one that begins with tls://, as in \"tls://0.0.0.0:8126\".";
    "listen.unixgram", Restart, "Paths of unix sockets for datagrams.";
    "listen.unix", Restart, "Paths of unix sockets for streams: of lines, or of packets, each after its length in 4 bytes, little-endian.";
    "listen.unix_mode", Restart, "Permissions of these sockets: who may write there may send.";
    "listen.unix_group", Restart, "Their group, by name or number. \"\": that of this process.";
    "listen.unix_uids", Restart, "Users, by name or number, whose processes may send there. []: all.";
    "listen.workers", Restart, "Threads that read UDP. 0: one per core.";
    "listen.receive_buffer", Restart, "Asked of the kernel for each UDP socket.";
    "listen.udp_gro", Restart, "true: datagrams of one sender may be read as one where it sends such trains (UDP_SEGMENT). A train that is dropped counts as one drop.";
    "listen.kafka", Restart, "true: read JSON records from kafka.topic, as a member of kafka.group.";
    "listen.linger", Restart, "Longest rest of a worker that has emptied its socket while traffic flows, as far as the receive buffer allows: fewer wake-ups.";

    "http", Restart, "Where requests come in. TLS is spoken at addresses that begin with tls://.";
    "http.ingest", Restart, "POST /ingest/metrics.";
    "http.api", Restart, "The read API, /metrics and /-/ready.";
    "http.scrape", Restart, "/metrics on a listener of its own, usually \":9102\" of an address that Prometheus reaches.";
    "http.hosts", Restart, "Host names by which a loopback listener may be asked, besides localhost and loopback addresses.";
    "http.insecure", Restart, "true: ingest and api may listen beyond loopback without tokens, though whoever reaches them may write.";

    "http.lifecycle", Restart, "false: POST /-/reload is told 403; SIGHUP reloads all the same.";
    "http.tokens", Now, "Bearer tokens: files, or credential:NAME, with a token of 16 bytes or more a line. With none of them everybody may do all; with any, what has no file of its own is only for admin_file, but for reading.";
    "http.tokens.write_file", Now, "May send: POST /ingest/metrics. \"\": only admin_file may, or everybody where no file is named.";
    "http.tokens.read_file", Now, "May read: /data, /metrics on every listener, /openapi.json. \"\": everybody may.";
    "http.tokens.admin_file", Now, "May do all, DELETE and POST /-/reload too. \"\": nobody may do these, or everybody where no file is named.";

    "tls", Now, "Who we are at addresses that begin with tls://. A reload reads the files again.";
    "tls.cert_file", Now, "PEM: our certificate, and those between it and its authority behind it.";
    "tls.key_file", Now, "PEM: its key; or credential:NAME.";
    "tls.client_ca_file", Now, "PEM: who signs the certificates that clients must show. \"\": they need none.";

    "ingest", Restart, "What becomes of records that come by HTTP.";
    "ingest.forward", Restart, "\"none\": they are counted here; \"kafka\": they go to kafka.topic, and the answer comes once they are there.";

    "protocol", Now, "How a line is read.";
    "protocol.name_policy", Now, "\"etsy\": blanks to _, / to -, other characters outside A-Za-z0-9_.- dropped; \"none\": as sent.";
    "protocol.gauge_sign", Now, "\"relative\": +3 and -3 change a gauge; \"absolute\": they set it.";
    "protocol.tag_dialects", Now, "Dialects whose tags are recognised.";

    "flush", Restart, "When deltas go to the journal and the store, and the figures of a window.";
    "flush.interval", Restart, "Time between flushes; it divides the window.";
    "flush.window", Restart, "Length of a window of statistics.";
    "flush.percentiles", Restart, "Percentiles of Etsy's figures (upper_90, mean_90 ...); negative ones count from the top.";
    "flush.timer_metrics", Restart, "Which of Etsy's figures timers have, as in [\"count\", \"upper\", \"mean_percent\", \"histogram\"]: for a threshold _percent stands in place of its number. []: all.";
    "flush.histograms", Restart, "Bins of timers, as in [{ metric = \"render\", bins = [10, 100, inf] }]: a value is in the first bin that is above it. The first entry whose text is in the name holds, \"\" is in each; no bins: none.";
    "flush.weight_by_rate", Restart, "true: in all figures of timers a value stands for 1 / sample rate values; false: in count and count_ps alone, as Etsy's StatsD has it.";
    "flush.delete_idle_stats", Restart, "true: what is idle in a window is left out of Etsy's figures, in window.etsy and in Graphite. Totals stay.";
    "flush.delete_counters", Restart, "true or false: the same for counters. \"auto\": as flush.delete_idle_stats.";
    "flush.delete_timers", Restart, "The same for timers, histograms and distributions.";
    "flush.delete_sets", Restart, "The same for sets.";
    "flush.delete_gauges", Restart, "The same for gauges, flush.gauges_max_ttl windows after their last reading.";
    "flush.gauges_max_ttl", Restart, "In how many windows such a gauge is shown, that of its last reading among them.";

    "store", Restart, "Where totals are kept.";
    "store.kind", Restart, "\"memory\": nowhere; \"embedded\": the journal in state_dir; \"redis\", \"kafka\": shared by many agents, and the journal.";
    "store.embedded", Restart, "The journal: the agent's own file, with every kind of store but memory.";
    "store.embedded.cache", Restart, "How much of the file is kept in memory.";
    "store.redis", Restart, "Redis or Valkey.";
    "store.redis.url", Restart, "redis[s]://[user][:password@]host[:port][/database], or unix:///path[?db=0&user=&pass=].";
    "store.redis.prefix", Restart, "Beginning of every key.";
    "store.redis.mode", Restart, "\"single\": one server; \"sentinel\": the master that the sentinels name; \"cluster\": a Redis Cluster.";
    "store.redis.nodes", Restart, "The sentinels, or further nodes to find the cluster by: host:port or URLs.";
    "store.redis.master", Restart, "What the sentinels call the master.";
    "store.redis.password_file", Restart, "File, or credential:NAME, whose first line is the password of the URL's user. \"\": what the URL says.";
    "store.redis.ca_file", Restart, "PEM: who signs the servers' certificates (rediss://). \"\": the usual authorities, which are built in.";
    "store.redis.cert_file", Restart, "PEM: our own certificate, where the servers ask for one.";
    "store.redis.key_file", Restart, "PEM: its key; or credential:NAME.";
    "store.redis.replicas", Restart, "How many replicas must have a batch before it leaves the outbox. \"auto\": 1 where there are any.";
    "store.kafka", Restart, "The compacted topic of totals.";
    "store.kafka.topic", Restart, "Its name. It is made when it is missing.";
    "store.kafka.partitions", Restart, "Partitions that it is made with. They must not change later.";
    "store.kafka.replication", Restart, "Copies that it is made with. 0: as the brokers do by default.";

    "kafka", Restart, "The way to Kafka, for store.kind, listen.kafka and ingest.forward. A build needs the feature kafka.";
    "kafka.brokers", Restart, "Some of the brokers, as \"host:port\".";
    "kafka.topic", Restart, "JSON records, by the key level.name: what listen.kafka reads and ingest.forward writes.";
    "kafka.group", Restart, "Consumer group of listen.kafka: its agents share the partitions.";
    "kafka.password_file", Restart, "File, or credential:NAME, whose first line is sasl.password. \"\": none.";
    "kafka.options", Restart, "Other properties of librdkafka, as in { \"security.protocol\" = \"SASL_SSL\" }.";

    "mapping", Now, "Which names and labels series have in a scrape, and which series are not kept.";
    "mapping.file", Now, "A mapping file of statsd_exporter. \"\": none.";

    "prometheus", Restart, "What a scrape shows.";
    "prometheus.observer_type", Restart, "\"summary\" or \"histogram\": timers, histograms and distributions.";
    "prometheus.quantiles", Restart, "Of summaries.";
    "prometheus.buckets", Restart, "Upper bounds of histograms, in seconds for timers.";
    "prometheus.openmetrics", Restart, "true: OpenMetrics for whoever accepts it. Prometheus then stores counters as NAME_total.";
    "prometheus.native_histograms", Restart, "true: protobuf for whoever asks for it first, with native histograms beside classic ones.";
    "prometheus.native_bucket_factor", Restart, "By how much the buckets of native histograms grow at most, from 1.011 on.";
    "prometheus.native_max_buckets", Restart, "How many buckets a native histogram has at most before they become coarser; 0: no bound but limits.buckets.";
    "prometheus.expire", Restart, "Series without a sample for so long are not shown. \"0s\": as long as they are in memory.";

    "export", Restart, "What the agent hands out by itself.";
    "export.graphite", Restart, "Graphite gets what Etsy's StatsD would flush there, at the end of each flush.window.";
    "export.graphite.to", Restart, "Where it listens, as in \"graphite.example:2003\". \"\": it gets nothing.";
    "export.graphite.protocol", Restart, "\"plaintext\": lines, usually at port 2003; \"pickle\": Python's, usually at port 2004.";
    "export.graphite.legacy_namespace", Restart, "true: stats.NAME, stats_counts.NAME, stats.timers.NAME ...; false: as the prefixes below say.";
    "export.graphite.global_prefix", Restart, "Before all names, with legacy_namespace = false.";
    "export.graphite.global_suffix", Restart, "Behind all names.";
    "export.graphite.prefix_counter", Restart, "Before counters, with legacy_namespace = false.";
    "export.graphite.prefix_timer", Restart, "The same before timers, histograms and distributions.";
    "export.graphite.prefix_gauge", Restart, "The same before gauges.";
    "export.graphite.prefix_set", Restart, "The same before sets.";
    "export.graphite.prefix_meter", Restart, "The same before meters.";
    "export.graphite.prefix_stats", Restart, "Before the figures of the server itself, in both namespaces.";
    "export.graphite.flush_counts", Restart, "false: counters are sent as rates alone.";

    "export.relay", Restart, "Lines go on to other servers as they came, rejected ones too; HTTP bodies do not.";
    "export.relay.to", Restart, "StatsD servers, as \"host:port\", by UDP; names are looked up again and again. []: none.";
    "export.relay.packet", Restart, "Lines are packed into datagrams of at most so much; a longer line goes alone.";

    "export.console", Restart, "Etsy's console on TCP: help, config, health, stats, counters, timers, gauges, delcounters and so on.";
    "export.console.listen", Restart, "Addresses, usually \"127.0.0.1:8126\". It asks for no token, so beyond loopback it needs http.insecure = true. []: none.";

    "log", Now, "What is written to standard error.";
    "log.level", Now, "error, warn, info, debug or trace.";

    "limits", Restart, "Bounds; each past-due event is counted, and none ends a neighbour's work.";
    "limits.datagram", Restart, "Longer datagrams are dropped whole.";
    "limits.line", Now, "Longer lines are rejected; a stream goes on at the next line.";
    "limits.name", Now, "Longer names are rejected.";
    "limits.identity", Now, "The same for a name with its tags.";
    "limits.tags", Now, "Tags of a line; more are rejected.";
    "limits.tag_key", Now, "Longer keys are rejected.";
    "limits.tag_value", Now, "Longer values are rejected.";
    "limits.values", Now, "Values packed in a line; more are rejected.";
    "limits.sample_rate_min", Now, "Lower rates are rejected.";
    "limits.series", Restart, "Further series are folded into _overflow of their type.";
    "limits.memory", Restart, "Memory that series are charged to; beyond it the same. New ones leave an eighth of it to the growth of others.";
    "limits.new_series", Restart, "New series in one second; beyond it the same.";
    "limits.source_share", Restart, "Part of limits.series that one source address may have made; beyond it the same. Loopback and unix sockets have no share.";
    "limits.buckets", Restart, "Buckets of a histogram, 320 to 2048; beyond it its scale halves.";
    "limits.set_exact", Restart, "Members of a set that are counted exactly, up to 1024; beyond it the set is an estimate.";
    "limits.idle", Restart, "Time without a sample after which a series is freed from memory; the store keeps its total.";
    "limits.idle_gauges", Restart, "The same for gauges.";
    "limits.set_member", Now, "Longer members are rejected.";
    "limits.store_expire", Restart, "Series without update are deleted from store and journal after this time.";
    "limits.journal", Restart, "Size of the journal; beyond it the series idle for longest are deleted.";
    "limits.sources", Restart, "Sources told apart: senders on each kind of listener. Further ones are counted under other; one without a message for limits.idle makes way.";
    "limits.connections", Restart, "Open streams; more are closed at once.";
    "limits.connections_per_address", Restart, "Open streams of one address; more are closed at once.";
    "limits.stream_buffer", Restart, "Bytes of a stream that wait for the end of their line.";
    "limits.stream_idle", Restart, "A stream without a byte for so long is closed.";
    "limits.partial_line", Restart, "A line that is not ended for so long closes its stream.";
    "limits.reserved_fds", Restart, "File descriptors that streams leave for journal, store and UDP.";
    "limits.http_connections", Restart, "Connections of http.ingest, http.api and http.scrape, each; more are told 503.";
    "limits.request_line", Restart, "Longer is told 414.";
    "limits.headers", Restart, "All header lines together; more is told 431.";
    "limits.header_time", Restart, "Slower headers are told 408; a slower TLS handshake, of lines too, is given up.";
    "limits.body_time", Restart, "Slower bodies are told 408.";
    "limits.keep_alive", Restart, "Idle connections are closed.";
    "limits.body", Restart, "A body as sent; longer is told 413.";
    "limits.inflated", Restart, "A body once inflated; longer is told 413.";
    "limits.bodies", Restart, "All bodies held at one time; more are told 503 with Retry-After.";
    "limits.json_depth", Now, "Objects and arrays inside each other; deeper JSON is rejected.";
    "limits.samples", Now, "Samples in a request; more are told 413.";
    "limits.page", Restart, "Metrics on a page of a list; asking for more is told 400.";
    "limits.lists", Restart, "Lists made at one time; more are told 503.";
    "limits.scrapes", Restart, "Scrapes written at one time; more are told 503.";
    "limits.idempotency_keys", Restart, "Answers remembered by their Idempotency-Key; the oldest go.";
    "limits.batch", Restart, "Series in one batch to the store.";
    "limits.redis_connect", Restart, "Time to connect.";
    "limits.redis_reply", Restart, "Time to a reply; then the connection is dropped and the same batch sent again.";
    "limits.kafka_table", Restart, "Memory for the totals of other agents with store.kind = \"kafka\"; beyond, reads show this agent alone.";
    "limits.graphite_buffer", Restart, "Bytes that wait while Graphite is away; beyond, the oldest windows go.";
    "limits.graphite_connect", Restart, "Time to connect.";
    "limits.graphite_write", Restart, "Graphite may read nothing for so long; then the connection is dropped and the same windows sent again.";
    "limits.outbox", Restart, "Bytes kept for the store; beyond, the oldest batches that were never sent merge.";
    "limits.reject_log", Restart, "Rejected lines logged in a second for each reason; more are counted.";
    "limits.stop", Restart, "Time to stop in; what is left then is in the journal.";
}

/// The variables of the system that tallyd replaces, each with the key that it sets. `TALLYD_...` goes before them.
pub const SEED: &[(&str, &str)] = &[
    ("INGEST_PORT", "http.ingest"),
    ("API_PORT", "http.api"),
    ("STORE", "store.kind"),
    ("REDIS_HOST", "store.redis.url"),
    ("REDIS_PORT", "store.redis.url"),
    ("KAFKA_BOOTSTRAP_SERVERS", "kafka.brokers"),
    ("KAFKA_TOPIC", "kafka.topic"),
];

/// Keys that hold a table of names that are not ours.
const MAPS: [&str; 1] = ["kafka.options"];

/// Whether a value of the tree is a section, with keys of its own.
fn is_section(name: &str, value: &Value) -> bool {
    value.is_table() && !MAPS.contains(&name)
}

/// Keys that hold addresses to bind, and what comes in there.
const ADDRESSES: [(&str, Access); 6] = [
    ("listen.udp", Access::Lines),
    ("listen.tcp", Access::Lines),
    ("http.ingest", Access::Writes),
    ("http.api", Access::Administration),
    ("http.scrape", Access::Reads),
    (console::KEY, Access::Console),
];

/// What a peer can do at a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Lines,
    Writes,
    Administration,
    Reads,
    /// Administration that nobody is asked for a token for.
    Console,
}

impl Access {
    /// What must have a token before other machines may reach it.
    const fn guarded(self) -> Option<Right> {
        match self {
            Self::Writes => Some(Right::Write),
            Self::Administration => Some(Right::Admin),
            // Tokens would not guard it.
            Self::Lines | Self::Reads | Self::Console => None,
        }
    }

    /// What tokens are asked for there.
    const fn rights(self) -> &'static [Right] {
        match self {
            Self::Lines | Self::Console => &[],
            Self::Writes => &[Right::Write],
            Self::Administration => &[Right::Admin, Right::Read],
            Self::Reads => &[Right::Read],
        }
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    BuiltIn,
    /// The configuration file; lines and columns count from 1.
    File {
        /// The file's name as given.
        name: String,
        /// The line of the key or value.
        line: usize,
        /// Its column, in characters.
        column: usize,
    },
    /// This variable.
    Environment(String),
    /// A `--set`.
    Argument,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built in"),
            Self::File { name, line, column } => write!(f, "{name}:{line}:{column}"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Argument => f.write_str("--set"),
        }
    }
}

/// What is wrong with a setting, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Its place.
    pub origin: Origin,
    /// The fault.
    pub fault: Fault,
}

/// What is wrong with a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The file is not TOML.
    Syntax(String),
    /// No such key, section or variable, and the nearest one there is.
    Unknown {
        /// As written.
        name: String,
        /// In the same notation.
        nearest: Option<String>,
    },
    /// The value does not fit.
    Value {
        /// `section.key`, or the variable of the seed system.
        key: String,
        /// The value, without passwords.
        value: String,
        /// The reason and the remedy.
        remedy: String,
    },
    /// A part does not take its values; it names key, value and remedy itself.
    Refused(String),
    /// A `--set` without `=`.
    Argument(String),
    /// A file that is named can't be used.
    File {
        /// The key that names it.
        key: String,
        /// The name.
        value: String,
        /// The reason and the remedy.
        remedy: String,
        /// The exit code for it.
        code: u8,
    },
    /// A credential is named, or a file of another user, and this process has not that or is not that: the service may.
    NotPassed {
        /// The key that names it.
        key: String,
        /// The name.
        value: String,
        /// The reason and the remedy.
        remedy: String,
        /// The exit code for it.
        code: u8,
    },
}

impl Problem {
    /// The exit code of a start that fails so, after sysexits.
    pub fn exit_code(&self) -> u8 {
        match &self.fault {
            Fault::File { code, .. } | Fault::NotPassed { code, .. } => *code,
            Fault::Syntax(_) | Fault::Unknown { .. } | Fault::Value { .. } => 78,
            Fault::Refused(_) | Fault::Argument(_) => 78,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.origin)?;
        match &self.fault {
            Fault::Syntax(message) => write!(f, "no TOML: {message}"),
            Fault::Unknown { name, nearest: Some(nearest) } => {
                write!(f, "unknown key {name:?}; did you mean {nearest:?}?")
            }
            Fault::Unknown { name, nearest: None } => {
                write!(f, "unknown key {name:?}; `tallyd check --print-defaults` lists all keys")
            }
            Fault::Value { key, value, remedy }
            | Fault::File { key, value, remedy, .. }
            | Fault::NotPassed { key, value, remedy, .. } => {
                write!(f, "{key} = {value}: {remedy}")
            }
            Fault::Refused(text) => f.write_str(text),
            Fault::Argument(text) => write!(f, "{text:?} lacks a value; write section.key=value"),
        }
    }
}

/// What a configuration is made of, lowest layer first.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sources<'a> {
    /// Name and text of the configuration file.
    pub file: Option<(&'a str, &'a str)>,
    /// All variables; those that are not ours are passed over.
    pub environment: &'a [(String, String)],
    /// `section.key=value`, the last one of a key wins.
    pub set: &'a [String],
}

/// A configuration and where each key that somebody set comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// By key; what is missing is built in.
    pub origins: BTreeMap<String, Origin>,
}

impl Config {
    /// Merges the layers and checks the whole. On failure all problems are told, in the order of the layers.
    pub fn load(sources: &Sources<'_>) -> Result<Loaded, Vec<Problem>> {
        layers::merge(sources, Self::default().tree())
    }

    /// The keys in which `new` differs, if a running agent can take them all; else those that need a restart. A file that
    /// is named as before and says something else is a difference too.
    pub fn reload(&self, new: &Self) -> Result<Vec<&'static str>, Vec<&'static str>> {
        let (old_tree, new_tree) = (self.tree(), new.tree());
        let differs = |key: &Key| {
            let (old, new) = (get(&old_tree, key.name), get(&new_tree, key.name));
            old.is_some_and(|value| !is_section(key.name, value)) && old != new
        };
        let changed = || KEYS.iter().filter(|key| differs(key) || self.file_differs(new, key.name));
        let restart: Vec<_> = changed().filter(|key| key.reload == Reload::Restart).map(|key| key.name).collect();
        if restart.is_empty() { Ok(changed().map(|key| key.name).collect()) } else { Err(restart) }
    }

    /// Whether the file of a key says something else.
    fn file_differs(&self, new: &Self, key: &str) -> bool {
        let (tokens, others) = (&self.http.tokens.tokens, &new.http.tokens.tokens);
        match Right::GIVEN.into_iter().find(|right| right.key() == key) {
            Some(right) => tokens.of(right) != others.of(right),
            None if key == "mapping.file" => self.mapping.rules != new.mapping.rules,
            None => self.identity_differs(new, key),
        }
    }

    fn identity_differs(&self, new: &Self, key: &str) -> bool {
        let which = tls::Which::ALL.into_iter().find(|which| which.key() == key);
        let both = self.tls.identity.as_ref().zip(new.tls.identity.as_ref());
        which.zip(both).is_some_and(|(which, (old, new))| old.differs(new, which))
    }

    /// The keys whose files say something else in `new`, and are read at a start alone: that keeps nothing else from being
    /// taken.
    pub fn waiting(&self, new: &Self) -> Vec<&'static str> {
        let (redis, new_redis) = (&self.store.redis, &new.store.redis);
        let passwords = [
            ("kafka.password_file", self.kafka.password != new.kafka.password),
            ("store.redis.password_file", redis.password != new_redis.password),
        ];
        let passwords = passwords.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key);
        let files = redis::TlsFile::ALL.into_iter().zip(redis.contents.iter().zip(&new_redis.contents));
        passwords.chain(files.filter(|(_, (old, new))| old != new).map(|(file, _)| file.key())).collect()
    }

    /// The configuration file that says this, passwords included.
    pub fn to_toml(&self) -> String {
        print(&self.tree(), |_| String::new(), |key, value| format!("{} = {}\n", last(key.name), literal(value)))
    }

    /// The default configuration file: `packaging/tallyd.toml`, which packages install. Every key stands there with its
    /// meaning and its default, commented out, so that the file of an old version freezes no default of a new one, nor
    /// hides the state directory that systemd names.
    pub fn defaults() -> String {
        let head = |key: &Key| format!("# {}\n", key.help);
        let line = |key: &Key, value: &Value| format!("# {}\n#{} = {}\n", key.help, last(key.name), literal(value));
        let opening =
            "# tallyd's configuration: every key with its default. To set one, take away the # before its name.\n\n";
        [opening, &print(&Self::default().tree(), head, line)].concat()
    }

    /// [`KEYS`], each key with its default as TOML; a section has none.
    pub fn described() -> impl Iterator<Item = (&'static Key, Option<String>)> {
        let tree = Self::default().tree();
        KEYS.iter().map(move |key| {
            let value = get(&tree, key.name).filter(|value| !is_section(key.name, value));
            (key, value.map(literal))
        })
    }

    /// Each key with its value as a list of texts is written by hand, without brackets and quotes and without passwords.
    pub fn plain(&self) -> Vec<(&'static str, String)> {
        let tree = self.tree();
        let leaves = KEYS.iter().filter_map(|key| Some((key.name, get(&tree, key.name)?)));
        leaves.filter(|(name, value)| !is_section(name, value)).map(|(name, value)| (name, bare(value))).collect()
    }

    /// As nested tables. A test holds that every configuration can be written so.
    fn tree(&self) -> Table {
        Table::try_from(self).unwrap_or_default()
    }
}

impl Loaded {
    /// The merged configuration, each key with its origin, without passwords.
    pub fn print(&self) -> String {
        let line =
            |key: &Key, value: &Value| format!("{} = {}  # {}\n", last(key.name), shown(value), self.origin(key.name));
        print(&self.config.tree(), |_| String::new(), line)
    }

    /// Takes the text of the file that `mapping.file` names.
    ///
    /// # Errors
    /// All that is wrong in it.
    pub fn set_mapping(&mut self, text: &str) -> Result<(), Vec<Problem>> {
        let name = &self.config.mapping.file;
        let problem = |problem: mapping::Problem| {
            let mapping::Place { line, column } = problem.at;
            let origin = Origin::File { name: name.clone(), line, column };
            Problem { origin, fault: Fault::Refused(problem.to_string()) }
        };
        let rules = Mapping::parse(text).map_err(|problems| problems.into_iter().map(problem).collect::<Vec<_>>())?;
        self.config.mapping.rules = Some(Arc::new(rules));
        Ok(())
    }

    /// That the file of a key can't be used, or what else its value leads to.
    pub fn file_problem(&self, key: &str, code: u8, remedy: &impl fmt::Display) -> Problem {
        let value = get(&self.config.tree(), key).map(shown).unwrap_or_default();
        let fault = Fault::File { key: key.to_owned(), value, remedy: remedy.to_string(), code };
        Problem { origin: self.origin(key), fault }
    }

    /// That what one path of a list leads to can't be used.
    pub fn path_problem(&self, key: &str, path: &Path, code: u8, remedy: &impl fmt::Display) -> Problem {
        let value = literal(&Value::from(path.display().to_string()));
        let fault = Fault::File { key: key.to_owned(), value, remedy: remedy.to_string(), code };
        Problem { origin: self.origin(key), fault }
    }

    /// That the file of a key may be right for the service's own process, and is not for this one.
    pub fn not_passed(&self, key: &str, code: u8, remedy: &impl fmt::Display) -> Problem {
        let value = get(&self.config.tree(), key).map(shown).unwrap_or_default();
        let fault = Fault::NotPassed { key: key.to_owned(), value, remedy: remedy.to_string(), code };
        Problem { origin: self.origin(key), fault }
    }

    /// The value of a key that holds text.
    pub fn text(&self, key: &str) -> String {
        get(&self.config.tree(), key).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// That a part refuses a value; it names the key itself.
    pub fn refusal(&self, key: &str, error: &impl fmt::Display) -> Problem {
        self.refused(key, error)
    }

    /// What is right, but does nothing or is not wise, each with its place.
    pub fn notes(&self) -> Vec<String> {
        let mapping::Config { file, rules } = &self.config.mapping;
        let notes = rules.iter().flat_map(|rules| rules.notes());
        let notes = notes.map(|note| format!("{file}:{}:{}: {note}", note.at.line, note.at.column));
        let expiry = self.config.tls.identity.as_ref().and_then(|identity| identity.warning(SystemTime::now()));
        let expiry = expiry.map(|warning| format!("{}: {warning}", self.origin("tls.cert_file")));
        notes.chain(expiry).chain(self.exposed()).chain(self.shut()).chain(self.unused_tls()).collect()
    }

    /// Listeners whose purpose nobody has a right to.
    fn shut(&self) -> Option<String> {
        let (http, right) = (&self.config.http, Right::Write);
        (!http.ingest.is_empty() && http.tokens.is_nobodys(right)).then(|| {
            let (origin, file, admin) = (self.origin("http.ingest"), right.key(), Right::Admin.key());
            format!("{origin}: http.ingest: nobody may write there; name a file of tokens in {file}, or in {admin}")
        })
    }

    /// Listeners that other machines reach, and what they could see or hear there.
    fn exposed(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for (key, access, text) in self.listed() {
            let Ok(at) = text.parse::<ListenAddress>() else { continue };
            let told = |warning| format!("{}: {key} = {text:?}: {warning}", self.origin(key));
            notes.extend(self.config.http.warnings(at, access.rights()).into_iter().map(told));
        }
        notes
    }

    fn unused_tls(&self) -> Option<String> {
        let is_used = self.listed().iter().any(|(_, _, text)| text.parse().is_ok_and(|at: ListenAddress| at.tls));
        let is_set = !self.config.tls.cert_file.is_empty();
        let note = || format!("{}: tls.cert_file: no address begins with tls://", self.origin("tls.cert_file"));
        (is_set && !is_used).then(note)
    }

    /// The addresses to bind, with their keys.
    fn listed(&self) -> Vec<(&'static str, Access, String)> {
        let tree = self.config.tree();
        let lists = ADDRESSES.iter().filter_map(|(key, access)| Some((*key, *access, get(&tree, key)?.as_array()?)));
        let text = |item: &Value| item.as_str().unwrap_or_default().to_owned();
        lists.flat_map(|(key, access, list)| list.iter().map(move |item| (key, access, text(item)))).collect()
    }

    /// Where the value of a key comes from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::BuiltIn)
    }

    fn wrong(&self, key: &str, value: &Value, remedy: &str) -> Problem {
        let fault = Fault::Value { key: key.to_owned(), value: shown(value), remedy: remedy.to_owned() };
        Problem { origin: self.origin(key), fault }
    }

    fn refused(&self, key: &str, error: &impl fmt::Display) -> Problem {
        Problem { origin: self.origin(key), fault: Fault::Refused(error.to_string()) }
    }

    /// What no key shows by itself.
    fn problems(&self) -> Vec<Problem> {
        let mut problems = self.addresses();
        problems.extend(self.paths());
        problems.extend(self.numbers());
        problems.extend(self.state_dir());
        problems.extend(self.interval());
        problems.extend(self.prometheus());
        problems.extend(self.series());
        problems.extend(self.kafka());
        problems.extend(self.relay());
        problems
    }

    fn relay(&self) -> Option<Problem> {
        let own: Vec<_> = self.config.listen.udp.iter().filter_map(|text| text.parse().ok()).collect();
        let error = self.config.export.relay.check(&own).err()?;
        Some(self.refused(error.key(), &error))
    }

    fn state_dir(&self) -> Option<Problem> {
        let is_empty = self.config.state_dir.as_os_str().is_empty();
        is_empty.then(|| self.wrong("state_dir", &Value::from(""), "no directory; name one"))
    }

    fn prometheus(&self) -> Option<Problem> {
        let error = self.config.prometheus.check().err()?;
        let key = match error {
            scrape::Error::Quantile(_) => "prometheus.quantiles",
            scrape::Error::InfiniteBucket(_) | scrape::Error::BucketOrder(_) => "prometheus.buckets",
            scrape::Error::BucketFactor(_) => "prometheus.native_bucket_factor",
        };
        Some(self.refused(key, &error))
    }

    /// The options are checked only where they are used: they are librdkafka's to judge.
    fn kafka(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let store::kafka::Config { topic, partitions, .. } = &self.config.store.kafka;
        if kafka::check_topic(topic).is_err() {
            let remedy = "no name of a topic; write 1 to 249 of the characters A-Za-z0-9._-";
            problems.push(self.wrong("store.kafka.topic", &Value::from(topic.as_str()), remedy));
        }
        if !(1..=10_000).contains(partitions) {
            let remedy = "out of range; write 1 to 10000";
            problems.push(self.wrong("store.kafka.partitions", &Value::from(*partitions), remedy));
        }
        if self.config.listen.kafka && !kafka::BUILT {
            problems.push(self.wrong("listen.kafka", &Value::from(true), kafka::NOT_BUILT));
        }
        if topic == &self.config.kafka.topic {
            let remedy = "kafka.topic is that topic; name two, since one is compacted and the other is not";
            problems.push(self.wrong("store.kafka.topic", &Value::from(topic.as_str()), remedy));
        }
        if self.config.kafka.group.is_empty() {
            problems.push(self.wrong("kafka.group", &Value::from(""), "no group; name one"));
        }
        let error = self.config.kafka.check().err();
        problems.extend(error.map(|error| self.refused(error.key(), &error)));
        problems
    }

    /// What journal, store and other agents keep is bounded by the defaults, so more could not be kept here.
    fn series(&self) -> Vec<Problem> {
        let limits = &self.config.limits.aggregate;
        let aggregate::series::Limits { buckets, set_exact } = limits.each;
        let mut problems = Vec::new();
        if !(0.0..=1.0).contains(&limits.source_share) {
            let value = Value::from(limits.source_share);
            problems.push(self.wrong("limits.source_share", &value, "no part of the whole; write 0 to 1"));
        }
        if !(320..=histogram::BUCKETS_MAX).contains(&buckets) {
            problems.push(self.wrong(
                "limits.buckets",
                &Value::from(buckets as i64),
                "out of range; write 320 to 2048",
            ));
        }
        if set_exact > set::EXACT_MAX {
            problems.push(self.wrong(
                "limits.set_exact",
                &Value::from(set_exact as i64),
                "out of range; write 0 to 1024",
            ));
        }
        problems
    }

    fn addresses(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut taken: Vec<(&str, SocketAddr)> = Vec::new();
        for (key, access, text) in self.listed() {
            let value = Value::from(text.as_str());
            let Ok(at) = text.parse::<ListenAddress>() else {
                let remedy = "no address with a port; write one such as \"127.0.0.1:8125\" or \"[::1]:8125\"";
                problems.push(self.wrong(key, &value, remedy));
                continue;
            };
            problems.extend(self.tls_at(key, at).map(|remedy| self.wrong(key, &value, remedy)));
            problems.extend(self.open_to_all(access, at).map(|remedy| self.wrong(key, &value, &remedy)));
            // UDP and TCP have ports of their own.
            let clash = taken
                .iter()
                .find(|(other, address)| *address == at.address && (*other == "listen.udp") == (key == "listen.udp"));
            match clash {
                Some((other, address)) if address.port() != 0 => {
                    let remedy = format!("{other} has this address already; take another port");
                    problems.push(self.wrong(key, &value, &remedy));
                }
                Some(_) | None => taken.push((key, at.address)),
            }
        }
        problems
    }

    /// Why TLS can't be spoken at an address, if it is to be.
    fn tls_at(&self, key: &str, at: ListenAddress) -> Option<&'static str> {
        let tls::Config { cert_file, key_file, .. } = &self.config.tls;
        match at.tls {
            true if key == console::KEY => Some("the console speaks no TLS; leave tls:// out"),
            true if key == "listen.udp" => Some("datagrams have no TLS; name it in listen.tcp, or leave tls:// out"),
            true if cert_file.is_empty() && key_file.is_empty() => {
                Some("TLS needs a certificate; name one in tls.cert_file, and its key in tls.key_file")
            }
            true | false => None,
        }
    }

    /// Why other machines may not reach an address, if they would.
    fn open_to_all(&self, access: Access, at: ListenAddress) -> Option<String> {
        if access == Access::Console && !at.is_local() && !self.config.http.insecure {
            return Some(console::OPEN.to_owned());
        }
        let right = access.guarded().filter(|right| self.config.http.is_open(at, *right))?;
        let (key, could) = match right {
            Right::Write => (right.key(), "write"),
            Right::Admin | Right::Read | Right::Open => (right.key(), "delete and reload"),
        };
        Some(format!(
            "other machines reach it and could {could} without a token; name a file of tokens in {key}, \
             take a loopback address or set http.insecure = true"
        ))
    }

    /// Unix sockets need absolute paths, each its own.
    fn paths(&self) -> Vec<Problem> {
        let listen::Config { unixgram, unix, .. } = &self.config.listen;
        let unixgram = unixgram.iter().map(|path| ("listen.unixgram", path));
        let all: Vec<_> = unixgram.chain(unix.iter().map(|path| ("listen.unix", path))).collect();
        let wrong = |(place, (key, path)): (usize, &(&'static str, &PathBuf))| {
            let value = Value::from(path.display().to_string());
            if !path.is_absolute() || path.as_os_str().len() > listen::UNIX_PATH_MAX {
                let remedy = format!("write a path that begins with / and has at most {} bytes", listen::UNIX_PATH_MAX);
                return Some(self.wrong(key, &value, &remedy));
            }
            let (other, _) = all[..place].iter().find(|(_, other)| other == path)?;
            Some(self.wrong(key, &value, &format!("{other} has this path already; take another one")))
        };
        all.iter().enumerate().filter_map(wrong).collect()
    }

    /// TOML has numbers that are none, and no limit would hold against them.
    fn numbers(&self) -> Vec<Problem> {
        let rate = self.config.limits.protocol.sample_rate_min;
        let rate = (rate.is_nan() || rate <= 0.0 || rate > 1.0).then(|| {
            self.wrong("limits.sample_rate_min", &Value::from(rate), "write a number above 0 and not above 1")
        });
        let graphite = self.config.export.graphite.check().err().map(|error| self.refused(&error.key(), &error));
        let figures = self.config.flush.etsy.check().err().map(|error| self.refused(error.key(), &error));
        rate.into_iter().chain(figures).chain(graphite).collect()
    }

    fn interval(&self) -> Option<Problem> {
        let flush::Config { interval, window, .. } = self.config.flush;
        let divides = window.0.as_nanos().checked_rem(interval.0.as_nanos()) == Some(0) && !window.0.is_zero();
        // The one that somebody set is the one to change.
        let key = if self.origins.contains_key("flush.interval") { "flush.interval" } else { "flush.window" };
        let value = if key == "flush.interval" { interval } else { window };
        let remedy = || format!("the interval ({interval}) must divide the window ({window}), as 1s divides 10s");
        (!divides).then(|| self.wrong(key, &Value::from(value.to_string()), &remedy()))
    }
}

/// All keys and sections of the table in the order of [`KEYS`], a section by `head`, a key by `line`.
fn print(tree: &Table, head: impl Fn(&Key) -> String, line: impl Fn(&Key, &Value) -> String) -> String {
    KEYS.iter()
        .filter_map(|key| {
            let value = get(tree, key.name)?;
            let is_section = is_section(key.name, value);
            Some(if is_section { format!("\n{}[{}]\n", head(key), key.name) } else { line(key, value) })
        })
        .collect()
}

/// The value as TOML, on one line.
pub(crate) fn literal(value: &Value) -> String {
    match value {
        // `90` rather than `90.0`: a key that holds fractions reads both.
        Value::Float(number) if number.fract() == 0.0 && number.abs() < 1e15 => format!("{number:.0}"),
        Value::Array(items) => format!("[{}]", items.iter().map(literal).collect::<Vec<_>>().join(", ")),
        Value::String(_)
        | Value::Integer(_)
        | Value::Float(_)
        | Value::Boolean(_)
        | Value::Datetime(_)
        | Value::Table(_) => value.to_string(),
    }
}

/// As [`literal`], without passwords.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => literal(&Value::from(without_password(text).into_owned())),
        Value::Array(items) => format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", ")),
        Value::Table(table) => {
            let hidden = |(name, value): (&String, &Value)| {
                let value = if kafka::is_secret(name) { Value::from("***") } else { value.clone() };
                (name.clone(), value)
            };
            literal(&Value::Table(table.iter().map(hidden).collect()))
        }
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => literal(value),
    }
}

/// As [`shown`], texts without quotes and lists without brackets.
fn bare(value: &Value) -> String {
    match value {
        Value::String(text) => without_password(text).into_owned(),
        Value::Array(items) => items.iter().map(bare).collect::<Vec<_>>().join(","),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) | Value::Table(_) => shown(value),
    }
}

/// The last word of `section.key`.
fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

fn get<'a>(tree: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => tree.get(key),
        Some((section, rest)) => get(tree.get(section)?.as_table()?, rest),
    }
}

fn put(tree: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(tree.insert(key.to_owned(), value)),
        Some((section, rest)) => {
            if let Some(Value::Table(table)) = tree.get_mut(section) {
                put(table, rest, value);
            }
        }
    }
}
