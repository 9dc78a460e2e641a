//! Every metric tallyd exports about itself, each with its meaning. Client series never go through here.
//!
//! The table [`ALL`] is the single definition: the exporter takes help texts from it, and the README's list is tested
//! against it.

use metrics::{Counter, Gauge, Histogram, Label};

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
    DATAGRAMS = "tallyd_datagrams_total", Counter, ["listener"], "Datagrams read from a socket.";
    DATAGRAMS_TRUNCATED = "tallyd_datagrams_truncated_total", Counter, ["listener"], "Datagrams longer than limits.datagram, dropped whole.";
    RECEIVED_BYTES = "tallyd_received_bytes_total", Counter, ["listener"], "Payload bytes read.";
    KERNEL_DROPS = "tallyd_kernel_drops_total", Counter, ["socket"], "Datagrams that the kernel dropped because a socket's buffer was full.";
    RECEIVE_BUFFER_BYTES = "tallyd_receive_buffer_bytes", Gauge, ["socket"], "Receive buffer that the kernel granted, in bytes.";
    LINES = "tallyd_lines_total", Counter, ["listener"], "Lines and JSON records read, blank ones left out.";
    LINES_ACCEPTED = "tallyd_lines_accepted_total", Counter, ["listener"], "Lines and JSON records of which at least one sample, event or service check was accepted.";
    LINES_REJECTED = "tallyd_lines_rejected_total", Counter, ["listener", "reason"], "Lines and JSON records of which nothing was accepted, by the first reason.";
    SAMPLES = "tallyd_samples_total", Counter, ["listener"], "Samples accepted; packed values count one each.";
    SAMPLES_REJECTED = "tallyd_samples_rejected_total", Counter, ["listener", "reason"], "Samples rejected, those of partly accepted lines among them.";
    TAGS_REJECTED = "tallyd_tags_rejected_total", Counter, [], "Tags without key or value, left out of a series when it was first seen.";
    REJECTS_SUPPRESSED = "tallyd_reject_log_suppressed_total", Counter, ["reason"], "Rejected lines that were counted but not logged.";
    CONNECTIONS = "tallyd_connections", Gauge, ["listener"], "Open stream connections.";
    CONNECTIONS_REFUSED = "tallyd_connections_refused_total", Counter, ["listener", "reason"], "Connections closed at once because a limit was reached.";
    ACCEPT_ERRORS = "tallyd_accept_errors_total", Counter, ["listener"], "Errors of accept and receive calls; the listener pauses and goes on.";
    SERIES = "tallyd_series", Gauge, ["kind"], "Series held in memory.";
    SERIES_CREATED = "tallyd_series_created_total", Counter, ["kind"], "Series seen for the first time or again after their expiry.";
    SERIES_EXPIRED = "tallyd_series_expired_total", Counter, ["kind"], "Series freed from memory because they were idle.";
    SERIES_REFUSED = "tallyd_series_refused_total", Counter, ["reason"], "Samples of new identities folded into _overflow.";
    SERIES_MEMORY_BYTES = "tallyd_series_memory_bytes", Gauge, [], "Memory charged to series, in bytes.";
    SEALS = "tallyd_seals_total", Counter, ["cause"], "Seals taken from shards.";
    FOLD_SECONDS = "tallyd_fold_seconds", Seconds, [], "Time to fold one seal into the ledger.";
    FLUSHES = "tallyd_flushes_total", Counter, [], "Flushes finished.";
    FLUSH_SECONDS = "tallyd_flush_seconds", Seconds, [], "Time of one flush, from its seals to the end of the journal's transaction.";
    FLUSH_LAG_SECONDS = "tallyd_flush_lag_seconds", Gauge, [], "Age of the oldest change that no flush has written, in seconds.";
    LOST = "tallyd_lost_total", Counter, ["reason"], "Accepted changes of series that could not be kept.";
    STORE_ERRORS = "tallyd_store_errors_total", Counter, ["store", "reason"], "Errors of the journal and of the store.";
    STORE_CONNECTED = "tallyd_store_connected", Gauge, ["store"], "1 while the store answers.";
    OUTBOX_BATCHES = "tallyd_outbox_batches", Gauge, [], "Batches kept for the store.";
    OUTBOX_BYTES = "tallyd_outbox_bytes", Gauge, [], "Bytes of these batches.";
    OUTBOX_UNSENT = "tallyd_outbox_unsent_batches", Gauge, [], "Batches that the store has not acknowledged.";
    JOURNAL_BYTES = "tallyd_journal_bytes", Gauge, [], "Size of the journal's file, in bytes.";
    HTTP_REQUESTS = "tallyd_http_requests_total", Counter, ["listener", "route", "code"], "HTTP requests answered.";
    HTTP_SECONDS = "tallyd_http_request_seconds", Seconds, ["route"], "Time from the request's headers to the answer's headers.";
    SCRAPE_SECONDS = "tallyd_scrape_seconds", Seconds, [], "Time to write one scrape.";
    CONFLICTS = "tallyd_scrape_conflicts", Gauge, [], "Series renamed in the last scrape because their names would collide.";
    ILLEGAL_NEGATIVE_COUNTER = "tallyd_illegal_negative_counter", Gauge, [], "Counters with decrements, of which the scrape shows the increments alone.";
}

impl Metric {
    /// The counter of these label values.
    pub fn counter(&self, values: &[&str]) -> Counter {
        metrics::with_recorder(|recorder| recorder.register_counter(&self.key(values), &METADATA))
    }

    /// The gauge of these label values.
    pub fn gauge(&self, values: &[&str]) -> Gauge {
        metrics::with_recorder(|recorder| recorder.register_gauge(&self.key(values), &METADATA))
    }

    /// The histogram of these label values.
    pub fn histogram(&self, values: &[&str]) -> Histogram {
        metrics::with_recorder(|recorder| recorder.register_histogram(&self.key(values), &METADATA))
    }

    fn key(&self, values: &[&str]) -> metrics::Key {
        debug_assert_eq!(self.labels.len(), values.len(), "{}", self.name);
        let labels = self.labels.iter().zip(values).map(|(name, value)| Label::new(*name, (*value).to_owned()));
        metrics::Key::from_parts(self.name, labels.collect::<Vec<_>>())
    }
}

static METADATA: metrics::Metadata<'static> = metrics::Metadata::new("tallyd", metrics::Level::INFO, None);
