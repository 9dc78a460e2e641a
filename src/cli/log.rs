//! Where the log of a running agent goes: to systemd's journal with its fields, if that is where standard error leads, else
//! to standard error as text.
//!
//! In the journal each field of a message is one there too (`TALLYD_ERROR`, `TALLYD_PART`), priorities are syslog's, and the
//! message has the fields once more as text, since `journalctl` shows that alone. Where the journal's socket is out of
//! reach, lines on standard error begin with the priority, as sd-daemon(3) has it.

use std::io::{self, IsTerminal, Write};

use tracing::field::{Field, Value, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::fmt::{FormatFields as _, MakeWriter};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::Level;
use crate::systemd;

/// Opens the log; what is returned changes its level.
pub(super) fn open(level: Level) -> impl Fn(Level) + Send + 'static {
    let (filter, handle) = reload::Layer::new(filter(level));
    let log = tracing_subscriber::registry().with(filter).with(way());
    // A test that runs two agents in one process has a log already; the first one stays.
    drop(tracing::subscriber::set_global_default(log));
    move |level| set(&handle, level)
}

/// Where messages go that the level lets through.
fn way<S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync>() -> Box<dyn Layer<S> + Send + Sync> {
    if !systemd::stderr_is_journal() {
        return fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).boxed();
    }
    match tracing_journald::layer() {
        Ok(journal) => Journal::new(journal).boxed(),
        // The journal knows the time.
        Err(_) => fmt::layer().with_writer(Prioritized(io::stderr)).with_ansi(false).without_time().boxed(),
    }
}

fn set(handle: &reload::Handle<EnvFilter, Registry>, level: Level) {
    if let Err(error) = handle.reload(filter(level)) {
        tracing::warn!(%error, "log.level stays as it was");
    }
}

fn filter(level: Level) -> EnvFilter {
    EnvFilter::new(match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    })
}

/// What journald calls our levels. What is normal is informational, so that `journalctl -p notice` shows what is not.
const PRIORITIES: PriorityMappings = PriorityMappings {
    error: Priority::Error,
    warn: Priority::Warning,
    info: Priority::Informational,
    debug: Priority::Debug,
    trace: Priority::Debug,
};

/// The digit that says so.
const fn priority(level: tracing::Level) -> u8 {
    let priority = match level {
        tracing::Level::ERROR => PRIORITIES.error,
        tracing::Level::WARN => PRIORITIES.warn,
        tracing::Level::INFO => PRIORITIES.info,
        tracing::Level::DEBUG => PRIORITIES.debug,
        tracing::Level::TRACE => PRIORITIES.trace,
    };
    priority as u8
}

/// Sends messages to the journal, with the fields in the text as well.
struct Journal {
    journal: tracing_journald::Layer,
    text: DefaultFields,
}

impl Journal {
    fn new(journal: tracing_journald::Layer) -> Self {
        let journal = journal.with_syslog_identifier("tallyd".to_owned()).with_field_prefix(Some("TALLYD".to_owned()));
        Self { journal: journal.with_priority_mappings(PRIORITIES), text: DefaultFields::new() }
    }
}

impl<S: Subscriber + for<'span> LookupSpan<'span>> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut text = String::new();
        if self.text.format_fields(Writer::new(&mut text), event).is_err() {
            return self.journal.on_event(event, context);
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let mut values = fields.0;
        values.extend(metadata.fields().field("message").map(|message| (message, text)));
        with_values(metadata, &values, |event| self.journal.on_event(event, context));
    }
}

/// Messages have fewer fields; those beyond stand in the text alone.
const FIELDS_MAX: usize = 32;

/// A message of the same place in the code with these values.
fn with_values(metadata: &'static Metadata<'static>, values: &[(Field, String)], act: impl FnOnce(&Event<'_>)) {
    let Some((first, _)) = values.first() else { return };
    // The text is the last.
    let values = &values[values.len().saturating_sub(FIELDS_MAX)..];
    let set: [(&Field, Option<&dyn Value>); FIELDS_MAX] = std::array::from_fn(|place| match values.get(place) {
        Some((field, value)) => (field, Some(value as &dyn Value)),
        None => (first, None),
    });
    act(&Event::new(metadata, &metadata.fields().value_set(&set)));
}

/// The fields of a message but its text.
#[derive(Default)]
struct Fields(Vec<(Field, String)>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() != "message" {
            self.0.push((field.clone(), format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != "message" {
            self.0.push((field.clone(), value.to_owned()));
        }
    }
}

/// Begins what is written with the priority of its level.
struct Prioritized<M>(M);

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for Prioritized<M> {
    type Writer = Lines<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Lines { to: self.0.make_writer(), priority: priority(tracing::Level::INFO) }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
        Lines { to: self.0.make_writer_for(metadata), priority: priority(*metadata.level()) }
    }
}

/// Takes a message at a time, as the log gives it.
struct Lines<W> {
    to: W,
    priority: u8,
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        let begin = [b'<', self.priority, b'>'];
        // In one call, so that no other thread's comes between.
        self.to.write_all(&[&begin, message].concat()).map(|()| message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_line_for_the_journal_begins_with_its_priority() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&written);
        let way = move || Shared(Arc::clone(&to));
        let layer = fmt::layer().with_writer(Prioritized(way)).with_ansi(false).without_time();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::error!(error = "full", "not written");
            tracing::info!("fine");
        });
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("<3>ERROR ") && lines[0].ends_with(": not written error=\"full\""), "{text}");
        assert!(lines[1].starts_with("<6> INFO ") && lines[1].ends_with(": fine"), "{text}");
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_message_keeps_its_fields_and_has_them_in_its_text() {
        type Seen = Arc<Mutex<Vec<(String, String)>>>;
        struct Retold(Seen);
        impl<S: Subscriber> Layer<S> for Retold {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                let mut fields = Fields::default();
                event.record(&mut fields);
                let mut values = fields.0;
                values.push((event.metadata().fields().field("message").unwrap(), "all of it".to_owned()));
                with_values(event.metadata(), &values, |event| event.record(&mut Keep(&self.0)));
            }
        }
        struct Keep<'a>(&'a Seen);
        impl Visit for Keep<'_> {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                self.0.lock().unwrap().push((field.name().to_owned(), format!("{value:?}")));
            }

            fn record_str(&mut self, field: &Field, value: &str) {
                self.0.lock().unwrap().push((field.name().to_owned(), value.to_owned()));
            }
        }
        let seen = Seen::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(Retold(Arc::clone(&seen))), || {
            tracing::warn!(part = "udp-0", seconds = 12, error = %"a b", "stands still");
        });
        let expected = [("part", "udp-0"), ("seconds", "12"), ("error", "a b"), ("message", "all of it")];
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect::<Vec<_>>(), expected);
    }
}
