//! Every metric tallyd exports about itself, each with its meaning. Client series never go through here.
//!
//! The table [`ALL`] is the single definition: the exporter takes help texts from it, and the README's list is tested
//! against it. What the system knows of the process is [`PROCESS`]. [`install`] comes before the first use of a metric;
//! what is counted earlier is lost.

use std::fmt;
use std::sync::Arc;

use metrics::{Counter, Gauge, Histogram, Label, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use metrics_process::Collector;

/// How a metric behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Observations in seconds, in buckets.
    Seconds,
}

/// One of our own metrics.
#[derive(Debug)]
pub struct Metric {
    /// Its name as scraped.
    pub name: &'static str,
    /// How it behaves.
    pub shape: Shape,
    /// Its label names.
    pub labels: &'static [&'static str],
    /// What it counts, in one sentence with the unit.
    pub help: &'static str,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $shape:ident, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $name: Metric =
                Metric { name: $text, shape: Shape::$shape, labels: &[$($label),*], help: $help };
        )*

        /// Every metric, in the order of the README.
        pub const ALL: &[Metric] = &[$($name),*];
    };
}

table! {
    BUILD_INFO = "tallyd_build_info", Gauge, ["version"], "Always 1; the labels say what was built.";
    STALLED_SECONDS = "tallyd_stalled_seconds", Gauge, ["part"], "How long a part of the agent has made no progress, in seconds, once that is 10 s; 0 while it does.";
    DATAGRAMS = "tallyd_datagrams_total", Counter, ["listener"], "Datagrams read from a socket.";
    DATAGRAMS_TRUNCATED = "tallyd_datagrams_truncated_total", Counter, ["listener"], "Datagrams longer than limits.datagram, dropped whole.";
    RECEIVED_BYTES = "tallyd_received_bytes_total", Counter, ["listener"], "Payload bytes read, of HTTP bodies as sent.";
    KERNEL_DROPS = "tallyd_kernel_drops_total", Counter, ["socket"], "Datagrams that the kernel dropped because a socket's buffer was full; with listen.udp_gro a train of them counts as one.";
    RECEIVE_BUFFER_BYTES = "tallyd_receive_buffer_bytes", Gauge, ["socket"], "Receive buffer that the kernel granted, in bytes.";
    LINES = "tallyd_lines_total", Counter, ["listener"], "Lines and JSON records read, blank ones left out.";
    LINES_ACCEPTED = "tallyd_lines_accepted_total", Counter, ["listener"], "Lines and JSON records of which at least one sample, event or service check was accepted.";
    LINES_REJECTED = "tallyd_lines_rejected_total", Counter, ["listener", "reason"], "Lines and JSON records of which nothing was accepted, by the first reason.";
    SAMPLES = "tallyd_samples_total", Counter, ["listener"], "Samples accepted; packed values count one each.";
    SAMPLES_REJECTED = "tallyd_samples_rejected_total", Counter, ["listener", "reason"], "Samples rejected, those of partly accepted lines among them.";
    EVENTS = "tallyd_events_total", Counter, ["listener"], "Events accepted.";
    SERVICE_CHECKS = "tallyd_service_checks_total", Counter, ["listener"], "Service checks accepted.";
    TIMESTAMPS_UNPLACED = "tallyd_timestamps_unplaced_total", Counter, [], "Samples whose timestamp lies in no window that is kept; they count in the present one.";
    SAMPLES_DROPPED = "tallyd_samples_dropped_total", Counter, ["listener"], "Samples of series that a mapping rule drops; their lines count as accepted.";
    BASELINES_EVICTED = "tallyd_baselines_evicted_total", Counter, [], "Last readings of absolute counters forgotten because there were more than 65,536.";
    TAGS_REJECTED = "tallyd_tags_rejected_total", Counter, [], "Tags without key or value, left out of a series when it was first seen.";
    REJECTS_SUPPRESSED = "tallyd_reject_log_suppressed_total", Counter, ["reason"], "Rejected lines that were counted but not logged.";
    SOURCES_OTHER = "tallyd_sources_other_total", Counter, [], "Lines counted under the source other because as many sources as limits.sources allows were told apart.";
    SOURCES_FORGOTTEN = "tallyd_sources_forgotten_total", Counter, [], "Sources idle for limits.idle that gave their place to a new one; their figures went to other.";
    HANDOVERS = "tallyd_handovers_total", Counter, ["outcome"], "Hand-overs between processes; taken_over: this one took over, failed: another that was to did not, and this one went on.";
    CONNECTIONS = "tallyd_connections", Gauge, ["listener"], "Open stream connections.";
    CONNECTIONS_REFUSED = "tallyd_connections_refused_total", Counter, ["listener", "reason"], "Connections closed at once because a limit was reached.";
    TLS_HANDSHAKES = "tallyd_tls_handshakes_total", Counter, ["listener"], "TLS connections made.";
    TLS_FAILED = "tallyd_tls_failed_total", Counter, ["listener", "reason"], "Connections of which no TLS came; plaintext: something else than TLS came to a tls:// address, unexpected: TLS came to another, alert: the client broke it off.";
    TLS_EXPIRY = "tallyd_tls_certificate_expiry_timestamp_seconds", Gauge, [], "When the certificate in tls.cert_file expires, in seconds since the epoch; missing without one.";
    ACCEPT_ERRORS = "tallyd_accept_errors_total", Counter, ["listener"], "Errors of accept and receive calls; the listener pauses and goes on.";
    SERIES = "tallyd_series", Gauge, ["kind"], "Series held in memory.";
    SERIES_CREATED = "tallyd_series_created_total", Counter, ["kind"], "Series seen for the first time or again after their expiry.";
    SERIES_EXPIRED = "tallyd_series_expired_total", Counter, ["kind"], "Series freed from memory because they were idle.";
    SERIES_REFUSED = "tallyd_series_refused_total", Counter, ["reason"], "Samples of new identities folded into _overflow; budget: no room for more series, rate: too many were new in that second, source: one address made too many of them.";
    SERIES_COARSENED = "tallyd_series_coarsened_total", Counter, ["reason"], "Times a series gave precision up to keep a bound; buckets: the scale of its histogram halved, set_exact: the set is an estimate from then on.";
    SERIES_MEMORY_BYTES = "tallyd_series_memory_bytes", Gauge, [], "Memory charged to series, in bytes.";
    SEALS = "tallyd_seals_total", Counter, ["cause"], "Seals taken from shards.";
    FOLD_SECONDS = "tallyd_fold_seconds", Seconds, [], "Time to fold one seal into the ledger.";
    FLUSHES = "tallyd_flushes_total", Counter, [], "Flushes finished.";
    FLUSH_SECONDS = "tallyd_flush_seconds", Seconds, [], "Time of one flush, from its seals to the end of the journal's transaction.";
    FLUSH_LAG_SECONDS = "tallyd_flush_lag_seconds", Gauge, [], "Age of the oldest change that no flush has written, in seconds.";
    LOST = "tallyd_lost_total", Counter, ["reason"], "Accepted changes of series that could not be kept; store_rolled_back and journal_damaged: batches of them.";
    LOST_SAMPLES = "tallyd_lost_samples_total", Counter, ["reason"], "Samples in these changes; sets, which keep members, have none, and those of a damaged record are not known.";
    STORE_ERRORS = "tallyd_store_errors_total", Counter, ["store", "reason"], "Errors of the journal and of the store.";
    STORE_CONNECTED = "tallyd_store_connected", Gauge, ["store"], "1 while the store answers, every server of it.";
    STORE_EXPIRED = "tallyd_store_expired_total", Counter, [], "Series that the store let go because nothing updated them for limits.store_expire.";
    OUTBOX_BATCHES = "tallyd_outbox_batches", Gauge, [], "Batches kept for the store.";
    OUTBOX_BYTES = "tallyd_outbox_bytes", Gauge, [], "Bytes of these batches.";
    OUTBOX_UNSENT = "tallyd_outbox_unsent_batches", Gauge, [], "Batches that the store has not acknowledged.";
    OUTBOX_UNSENT_SAMPLES = "tallyd_outbox_unsent_samples", Gauge, [], "Samples in these batches.";
    OUTBOX_MERGED = "tallyd_outbox_merged_total", Counter, [], "Batches never sent that went into others because the outbox was past its limit.";
    GRAPHITE_CONNECTED = "tallyd_graphite_connected", Gauge, [], "1 while the last attempt to reach Graphite did not fail; with export.graphite.to alone, as all of these.";
    GRAPHITE_WINDOWS_SENT = "tallyd_graphite_windows_sent_total", Counter, [], "Windows that Graphite took.";
    GRAPHITE_LINES_SENT = "tallyd_graphite_lines_sent_total", Counter, [], "Lines, of pickles items, in what Graphite took.";
    GRAPHITE_SENT_BYTES = "tallyd_graphite_sent_bytes_total", Counter, [], "Bytes of what Graphite took; what was sent again counts once.";
    GRAPHITE_FAILED = "tallyd_graphite_failed_total", Counter, ["reason"], "Attempts to send what waits that failed, and are made again; resolve: the name has no address, connect: nobody listens there, write: it reads nothing, close: it hung up before it had read all.";
    GRAPHITE_WINDOWS_LOST = "tallyd_graphite_windows_lost_total", Counter, ["reason"], "Windows that Graphite does not get; buffer: limits.graphite_buffer was reached, stop: the agent stopped, unread: the connection broke and there had been no room to keep them, late: rendering the one before, or reading the journal back at the start, took too long.";
    GRAPHITE_LINES_LOST = "tallyd_graphite_lines_lost_total", Counter, ["reason"], "Lines in these windows, and those that a window misses; name: series without a character in their name that Graphite may have.";
    GRAPHITE_WAITING_BYTES = "tallyd_graphite_waiting_bytes", Gauge, [], "Bytes that wait for Graphite.";
    GRAPHITE_LAG_SECONDS = "tallyd_graphite_lag_seconds", Gauge, [], "Age of the oldest window that waits for Graphite, as of the last window's end, in seconds.";
    GRAPHITE_RENDER_SECONDS = "tallyd_graphite_render_seconds", Seconds, [], "Time to render a window for Graphite, waiting for room included.";
    KAFKA_PRODUCED = "tallyd_kafka_produced_total", Counter, ["what"], "Records that Kafka acknowledged; state: totals of series, deletes and what is gone, record: JSON that was forwarded.";
    KAFKA_FAILED = "tallyd_kafka_failed_total", Counter, ["reason"], "Records to be forwarded that Kafka did not acknowledge; their requests were told 503.";
    KAFKA_PARTITIONS = "tallyd_kafka_partitions", Gauge, [], "Partitions of kafka.topic that this agent reads.";
    KAFKA_TABLE_SERIES = "tallyd_kafka_table_series", Gauge, [], "Series of which agents have totals in the topic of the store.";
    KAFKA_TABLE_BYTES = "tallyd_kafka_table_bytes", Gauge, [], "Memory that they take, in bytes.";
    KAFKA_TABLE_REFUSED = "tallyd_kafka_table_refused_total", Counter, [], "Totals of other agents left out because limits.kafka_table was reached; reads then show this agent alone.";
    JOURNAL_BYTES = "tallyd_journal_bytes", Gauge, [], "Size of the journal's file, in bytes.";
    JOURNAL_EXPIRED = "tallyd_journal_expired_total", Counter, [], "Totals deleted from the journal because they were idle for too long, or longest when it was past its limit.";
    HTTP_REQUESTS = "tallyd_http_requests_total", Counter, ["listener", "route", "code"], "HTTP requests answered.";
    HTTP_SECONDS = "tallyd_http_request_seconds", Seconds, ["route"], "Time from the request's headers to the answer's headers.";
    HTTP_DENIED = "tallyd_http_denied_total", Counter, ["listener", "reason"], "Requests told 401 or 403 for their token; missing: there was none, malformed: no bearer token, unknown: nobody has it, not_allowed: it has other rights, nobodys: no token has this right.";
    IDEMPOTENCY_FORGOTTEN = "tallyd_idempotency_keys_forgotten_total", Counter, [], "Idempotency-Keys forgotten before their day was over because limits.idempotency_keys or 32 MiB were reached; what is sent again under one counts again.";
    RELAY_LINES = "tallyd_relay_lines_total", Counter, ["target"], "Lines sent on.";
    RELAY_PACKETS = "tallyd_relay_packets_total", Counter, ["target"], "Datagrams in which they were sent.";
    RELAY_BYTES = "tallyd_relay_bytes_total", Counter, ["target"], "Payload bytes of these datagrams.";
    RELAY_DROPPED = "tallyd_relay_dropped_lines_total", Counter, ["target", "reason"], "Lines not sent on; queue_full: they came faster than they were sent, unresolved: the name has no address, loop: it is our own listener's, refused: nobody listens there, buffer_full: the kernel has no room, too_long: no datagram is so long, error: another error.";
    CONSOLE_COMMANDS = "tallyd_console_commands_total", Counter, ["command"], "Commands given to Etsy's console; http_request, tls_hello: a connection closed because it was a client's of HTTP or TLS.";
    SCRAPE_SECONDS = "tallyd_scrape_seconds", Seconds, [], "Time to write one scrape.";
    CONFLICTS = "tallyd_scrape_conflicts", Gauge, [], "Series renamed in the last scrape, or added to others, because their names would collide.";
    SCRAPE_PARTIAL = "tallyd_scrape_partial", Gauge, ["reason"], "Series of which the last scrape does not show all; illegal_negative_counter: the decrements of a counter; empty_metric_name: nothing, since its mapping rule gives an empty name.";
    SCRAPE_UNMAPPED = "tallyd_scrape_unmapped", Gauge, [], "Series of the last scrape that no mapping rule matched; with mapping.file alone.";
}

impl Metric {
    /// The counter of these label values.
    pub fn counter(&self, values: &[&str]) -> Counter {
        metrics::with_recorder(|recorder| recorder.register_counter(&self.key(values), &METADATA))
    }

    /// Lets the counters of these rows of label values stand at 0 before they first count: a rate misses the count with
    /// which a counter appears.
    pub fn begin<'v, const N: usize>(&self, rows: impl IntoIterator<Item = [&'v str; N]>) {
        rows.into_iter().for_each(|row| drop(self.counter(&row)));
    }

    /// The gauge of these label values.
    pub fn gauge(&self, values: &[&str]) -> Gauge {
        metrics::with_recorder(|recorder| recorder.register_gauge(&self.key(values), &METADATA))
    }

    /// The histogram of these label values.
    pub fn histogram(&self, values: &[&str]) -> Histogram {
        metrics::with_recorder(|recorder| recorder.register_histogram(&self.key(values), &METADATA))
    }

    /// Moves a count into the counter of these label values, which is registered only when there is something to count.
    pub fn take(&self, values: &[&str], count: &mut u64) {
        let count = std::mem::take(count);
        if count > 0 {
            self.counter(values).increment(count);
        }
    }

    fn key(&self, values: &[&str]) -> metrics::Key {
        debug_assert_eq!(self.labels.len(), values.len(), "{}", self.name);
        let labels = self.labels.iter().zip(values).map(|(name, value)| Label::new(*name, (*value).to_owned()));
        metrics::Key::from_parts(self.name, labels.collect::<Vec<_>>())
    }
}

static METADATA: metrics::Metadata<'static> = metrics::Metadata::new("tallyd", metrics::Level::INFO, None);

/// Upper bounds of the buckets of [`Shape::Seconds`]: from a seal's fold to a flush that outlasts its interval.
pub const SECONDS_BUCKETS: &[f64] =
    &[1e-5, 1e-4, 2.5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What the system knows of the process: name, shape and meaning. Where it doesn't say, the metric is missing.
pub const PROCESS: &[(&str, Shape, &str)] = &[
    ("process_cpu_seconds_total", Shape::Counter, "Processor time used, in seconds."),
    ("process_open_fds", Shape::Gauge, "Open file descriptors."),
    ("process_max_fds", Shape::Gauge, "File descriptors that may be open."),
    ("process_virtual_memory_bytes", Shape::Gauge, "Address space taken, in bytes."),
    ("process_virtual_memory_max_bytes", Shape::Gauge, "Address space that may be taken, in bytes."),
    ("process_resident_memory_bytes", Shape::Gauge, "Memory in use, in bytes."),
    ("process_start_time_seconds", Shape::Gauge, "When the process began, in seconds since the epoch."),
    ("process_threads", Shape::Gauge, "Threads."),
];

/// The names of all samples of our own families, in the text format and in OpenMetrics. No client's series may have one.
pub fn sample_names() -> impl Iterator<Item = String> {
    let all = ALL.iter().map(|metric| (metric.name, metric.shape));
    let process = PROCESS.iter().map(|(name, shape, _)| (*name, *shape));
    all.chain(process).flat_map(|(name, shape)| {
        let stem = name.strip_suffix("_total").unwrap_or(name);
        let suffixes: &[&str] = match shape {
            Shape::Counter => &["", "_total", "_created"],
            Shape::Gauge => &[""],
            Shape::Seconds => &["", "_bucket", "_sum", "_count", "_created"],
        };
        suffixes.iter().map(move |suffix| [stem, suffix].concat())
    })
}

/// Renders our own metrics. Clones share what they render.
#[derive(Clone)]
pub struct Exporter {
    handle: PrometheusHandle,
    process: Arc<Collector>,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

/// Why our own metrics can't be exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// A recorder was installed before.
    Installed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Installed => f.write_str("another metrics recorder is installed in this process"),
        }
    }
}

impl std::error::Error for Error {}

/// Makes every [`Metric`] of this process count, once per process, and says what was built.
pub fn install() -> Result<Exporter, Error> {
    let (recorder, exporter) = recorder();
    metrics::set_global_recorder(recorder).map_err(|_| Error::Installed)?;
    BUILD_INFO.gauge(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    let bare = ALL.iter().filter(|metric| metric.shape == Shape::Counter && metric.labels.is_empty());
    bare.for_each(|metric| metric.begin([[]]));
    Ok(exporter)
}

/// A recorder with our buckets and help texts, and what renders it. It starts no thread and no listener.
fn recorder() -> (PrometheusRecorder, Exporter) {
    let seconds = ALL.iter().filter(|metric| metric.shape == Shape::Seconds);
    let builder = seconds.fold(PrometheusBuilder::new(), |builder, metric| {
        // Refused only without bounds, and there are some; the metric would then be a summary.
        builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), SECONDS_BUCKETS).unwrap_or_default()
    });
    let recorder = builder.build_recorder();
    let all = ALL.iter().map(|metric| (metric.name, metric.shape, metric.help));
    for (name, shape, help) in all.chain(PROCESS.iter().copied()) {
        describe(&recorder, name, shape, help);
    }
    let exporter = Exporter { handle: recorder.handle(), process: Arc::new(Collector::default()) };
    (recorder, exporter)
}

fn describe(recorder: &impl metrics::Recorder, name: &'static str, shape: Shape, help: &'static str) {
    let (name, help) = (metrics::KeyName::from_const_str(name), SharedString::const_str(help));
    match shape {
        Shape::Counter => recorder.describe_counter(name, None, help),
        Shape::Gauge => recorder.describe_gauge(name, None, help),
        Shape::Seconds => recorder.describe_histogram(name, None, help),
    }
}

impl Exporter {
    /// Moves observations into their buckets, so that those no scrape fetches don't pile up. To be called about once a
    /// second.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Our own metrics as of now, families and series in order, as text or as OpenMetrics (without its last line).
    pub fn render(&self, openmetrics: bool) -> String {
        self.process.collect();
        let text = self.handle.render();
        let mut families: Vec<Family<'_>> = text.split("\n\n").filter_map(Family::parse).collect();
        families.sort_unstable_by_key(|family| family.name);
        let mut out = String::with_capacity(text.len());
        for family in families {
            family.write(openmetrics, &mut out);
        }
        out
    }
}

/// A family as the recorder renders it.
struct Family<'a> {
    name: &'a str,
    shape: &'a str,
    help: &'a str,
    samples: Vec<&'a str>,
}

impl<'a> Family<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let mut lines = text.lines();
        let (_, help) = lines.next()?.strip_prefix("# HELP ")?.split_once(' ')?;
        let (name, shape) = lines.next()?.strip_prefix("# TYPE ")?.split_once(' ')?;
        // The collector has processor time as a gauge, because its counters hold whole numbers only.
        let shape = if name.ends_with("_total") { "counter" } else { shape };
        let mut samples: Vec<&str> = lines.collect();
        if shape != "histogram" {
            samples.sort_unstable();
        }
        Some(Self { name, shape, help, samples })
    }

    fn write(&self, openmetrics: bool, out: &mut String) {
        let stem = self.name.strip_suffix("_total").filter(|_| openmetrics).unwrap_or(self.name);
        for part in ["# HELP ", stem, " ", self.help, "\n# TYPE ", stem, " ", self.shape, "\n"] {
            out.push_str(part);
        }
        for sample in &self.samples {
            out.push_str(sample);
            out.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    /// Every metric with a value of its own, rendered.
    fn rendered(openmetrics: bool) -> String {
        let (recorder, exporter) = recorder();
        metrics::with_local_recorder(&recorder, || {
            for metric in ALL {
                let values = vec!["some \"value\""; metric.labels.len()];
                match metric.shape {
                    Shape::Counter => metric.counter(&values).increment(3),
                    Shape::Gauge => metric.gauge(&values).set(0.5),
                    Shape::Seconds => metric.histogram(&values).record(0.002),
                }
            }
            exporter.upkeep();
            exporter.render(openmetrics)
        })
    }

    #[test]
    fn every_metric_is_rendered_with_its_help_and_type() {
        let text = rendered(false);
        for metric in ALL {
            assert!(text.contains(&format!("# HELP {} {}\n", metric.name, metric.help)), "{}", metric.name);
            let shape = match metric.shape {
                Shape::Counter => "counter",
                Shape::Gauge => "gauge",
                Shape::Seconds => "histogram",
            };
            assert!(text.contains(&format!("# TYPE {} {shape}\n", metric.name)), "{}", metric.name);
        }
        for (name, ..) in PROCESS {
            assert!(text.contains(&format!("\n{name} ")), "{name}");
        }
        let names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        assert!(names.is_sorted());
    }

    #[test]
    fn names_say_what_a_metric_is() {
        for Metric { name, shape, help, .. } in ALL {
            assert!(name.starts_with("tallyd_"), "{name}");
            assert_eq!(name.ends_with("_total"), *shape == Shape::Counter, "{name}");
            assert!(*shape != Shape::Seconds || name.ends_with("_seconds"), "{name}");
            assert!(!["_sum", "_count", "_bucket"].iter().any(|suffix| name.ends_with(suffix)), "{name}");
            assert!(help.ends_with('.'), "{name}");
        }
    }

    #[test]
    fn openmetrics_names_counters_without_total_and_has_no_empty_lines() {
        let text = rendered(true);
        assert!(text.contains("# TYPE tallyd_flushes counter\ntallyd_flushes_total 3\n"), "{text}");
        assert!(text.lines().all(|line| !line.is_empty()));
    }

    #[test]
    fn observations_are_in_buckets() {
        let text = rendered(false);
        assert!(text.contains("tallyd_fold_seconds_bucket{le=\"0.001\"} 0\n"), "{text}");
        assert!(text.contains("tallyd_fold_seconds_bucket{le=\"0.0025\"} 1\n"), "{text}");
    }

    #[test]
    fn promtool_finds_nothing_to_say() {
        let Ok(mut promtool) =
            Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()
        else {
            return; // not installed; the tests above parse what is rendered
        };
        promtool.stdin.take().unwrap().write_all(rendered(false).as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
