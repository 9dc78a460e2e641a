//! The commands and their answers, as the original gives them.
//!
//! | command | answers |
//! |---|---|
//! | `help` | the commands |
//! | `config` | the configuration, `section > key: value` a line |
//! | `health`, `health up`, `health down` | `health: up` or `health: down`: what was said last, `up` before |
//! | `stats` | `uptime`, `messages.last_msg_seen` and all `last_` figures as ages in seconds, `messages.bad_lines_seen` |
//! | `counters`, `gauges`, `timers` | what came into the open window: sums, values, lists of values, as node prints objects |
//! | `sets`, `meters` | ours: how many distinct values, and marks, came into the open window |
//! | `delcounters NAME...` and so on | lets series start from nothing, on every agent; `NAME.*` is all below `NAME.` |
//! | `quit` | closes the connection |
//!
//! Anything else is told `ERROR`. Of a timer the first values of a window are known as they came, the others only by
//! number, as node shows long lists. Histograms and distributions go with timers.

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::{spawn_blocking, yield_now};

use super::inspect::{self, Object};
use super::{Answer, LABEL, Parts};
use crate::aggregate::Aggregate;
use crate::aggregate::ledger::{Ledger, Series, State};
use crate::aggregate::shard::SeriesId;
use crate::aggregate::window::start_of;
use crate::clock;
use crate::sample::{Kind, SeriesKey};
use crate::telemetry;
use crate::view::{self, Filter, Scope};

/// Series that are looked for at one time, to be deleted.
const PAGE: usize = 10_000;

/// Series that are printed before other connections have their turn.
const TURN: usize = 256;

/// What a group of commands is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Counters,
    Gauges,
    Timers,
    Sets,
    Meters,
}

impl Group {
    const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Counters => &[Kind::Counter],
            Self::Gauges => &[Kind::Gauge],
            Self::Timers => &[Kind::Timer, Kind::Histogram, Kind::Distribution],
            Self::Sets => &[Kind::Set],
            Self::Meters => &[Kind::Meter],
        }
    }
}

/// What a client may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Help,
    Config,
    Health,
    Stats,
    Show(Group),
    Delete(Group),
    Quit,
}

/// Each command by its name, in the original's order; then ours.
const COMMANDS: [(&str, Command); 14] = [
    ("stats", Command::Stats),
    ("counters", Command::Show(Group::Counters)),
    ("timers", Command::Show(Group::Timers)),
    ("gauges", Command::Show(Group::Gauges)),
    ("delcounters", Command::Delete(Group::Counters)),
    ("deltimers", Command::Delete(Group::Timers)),
    ("delgauges", Command::Delete(Group::Gauges)),
    ("health", Command::Health),
    ("config", Command::Config),
    ("quit", Command::Quit),
    ("sets", Command::Show(Group::Sets)),
    ("meters", Command::Show(Group::Meters)),
    ("delsets", Command::Delete(Group::Sets)),
    ("delmeters", Command::Delete(Group::Meters)),
];

/// Lets the counters stand at 0.
pub(super) fn begin() {
    let named = COMMANDS.iter().map(|(name, _)| *name).chain(["help", "unknown", "http_request", "tls_hello"]);
    telemetry::CONSOLE_COMMANDS.begin(named.map(|name| [name]));
}

pub(super) fn count(command: &str) {
    telemetry::CONSOLE_COMMANDS.counter(&[command]).increment(1);
}

/// What all connections share.
pub(super) struct Desk {
    parts: Parts,
    is_up: Cell<bool>,
    connections: Cell<usize>,
    /// The right to collect and sort, which one at a time has.
    sorting: Semaphore,
}

/// A connection's right to be there, given back when it ends.
pub(super) struct Seat(Rc<Desk>);

impl std::ops::Deref for Seat {
    type Target = Desk;

    fn deref(&self) -> &Desk {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
        telemetry::CONNECTIONS.gauge(&[LABEL]).decrement(1.0);
    }
}

type Flow = io::Result<ControlFlow<()>>;

impl Desk {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts, is_up: Cell::new(true), connections: Cell::new(0), sorting: Semaphore::new(1) }
    }

    /// A seat for a connection, if fewer than so many are taken.
    pub(super) fn seat(self: &Rc<Self>, max: usize) -> Option<Seat> {
        if self.connections.get() >= max {
            return None;
        }
        self.connections.set(self.connections.get() + 1);
        telemetry::CONNECTIONS.gauge(&[LABEL]).increment(1.0);
        Some(Seat(Rc::clone(self)))
    }

    /// Answers a line. The connection is over when that says break.
    pub(super) async fn answer(&self, line: &str, to: &mut Answer) -> Flow {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let all = COMMANDS.into_iter().chain([("help", Command::Help)]);
        let Some((name, command)) = all.into_iter().find(|(other, _)| *other == name) else {
            count("unknown");
            to.add("ERROR\n").await?;
            return Ok(ControlFlow::Continue(()));
        };
        count(name);
        match command {
            Command::Help => self.help(to).await?,
            Command::Config => self.config(to).await?,
            Command::Health => self.health(words.next(), to).await?,
            Command::Stats => self.stats(to).await?,
            Command::Show(group) => self.show(group, to).await?,
            Command::Delete(group) => self.delete(group, words, to).await?,
            Command::Quit => return Ok(ControlFlow::Break(())),
        }
        Ok(ControlFlow::Continue(()))
    }

    async fn help(&self, to: &mut Answer) -> io::Result<()> {
        let names = COMMANDS.map(|(name, _)| name).join(", ");
        to.add(&format!("Commands: {names}\n\n")).await
    }

    async fn config(&self, to: &mut Answer) -> io::Result<()> {
        to.add("\n").await?;
        for (key, value) in (self.parts.config)() {
            to.add(&format!("{}: {value}\n", key.replace('.', " > "))).await?;
        }
        Ok(())
    }

    async fn health(&self, word: Option<&str>, to: &mut Answer) -> io::Result<()> {
        match word.map(str::to_lowercase).as_deref() {
            Some("up") => self.is_up.set(true),
            Some("down") => self.is_up.set(false),
            Some(_) | None => {}
        }
        to.add(if self.is_up.get() { "health: up\n" } else { "health: down\n" }).await
    }

    async fn stats(&self, to: &mut Answer) -> io::Result<()> {
        let (sources, _) = self.parts.view.sources(usize::MAX).await;
        let now = clock::wall_ms() / 1_000;
        let begun = self.parts.begun_ms / 1_000;
        let last = sources.iter().map(|source| source.last_seen / 1_000).max().unwrap_or(begun);
        let bad = sources.iter().map(|source| source.rejected).sum();
        to.add(&format!("uptime: {}\n", now.saturating_sub(begun))).await?;
        let messages = ("messages", vec![("last_msg_seen", last), ("bad_lines_seen", bad)]);
        let others = self.parts.backends.iter().map(|backend| (backend.name, (backend.figures)()));
        for (group, figures) in std::iter::once(messages).chain(others) {
            for (figure, value) in figures {
                let value = if figure.starts_with("last_") { now.saturating_sub(value) } else { value };
                to.add(&format!("{group}.{figure}: {value}\n")).await?;
            }
        }
        to.add("END\n\n").await
    }

    async fn show(&self, group: Group, to: &mut Answer) -> io::Result<()> {
        self.parts.view.fresh().await;
        let ledger = Arc::clone(self.parts.view.ledger());
        let start_ms = start_of(clock::wall_ms(), ledger.window_ms());
        let all = self.sorted(ledger, group).await?;
        let mut object = Object::default();
        for turn in all.chunks(TURN) {
            for series in turn {
                let text = object.add(series.key().as_str(), &value(&series.state(), start_ms));
                to.add(&text).await?;
            }
            yield_now().await;
        }
        to.add(&object.end()).await?;
        to.add("\nEND\n\n").await
    }

    /// The series of a group by their names. A million take their time to be sorted, which no other command waits for; but as
    /// many at one time as there are connections would leave the machine no time for the agent.
    async fn sorted(&self, ledger: Arc<Ledger>, group: Group) -> io::Result<Vec<Arc<Series>>> {
        let _turn = self.sorting.acquire().await.map_err(io::Error::other)?;
        spawn_blocking(move || sorted(&ledger, group)).await.map_err(io::Error::other)
    }

    async fn delete(&self, group: Group, names: impl Iterator<Item = &str>, to: &mut Answer) -> io::Result<()> {
        for name in names {
            let mut found = self.delete_one(group, name, to).await?;
            if let Some(folder) = name.strip_suffix('*').filter(|folder| folder.ends_with('.')) {
                found += self.delete_below(group, folder, to).await?;
            }
            if found == 0 {
                to.add(&format!("metric {name} not found\n")).await?;
            }
        }
        to.add("END\n\n").await
    }

    async fn delete_one(&self, group: Group, name: &str, to: &mut Answer) -> io::Result<usize> {
        let metrics = self.parts.view.metrics(&SeriesKey::parse(name), None, Scope::Global).await;
        let of_group = metrics.into_iter().filter(|metric| group.kinds().contains(&metric.kind));
        let ids: Vec<_> = of_group.map(|metric| SeriesId { kind: metric.kind, key: metric.key }).collect();
        self.delete_all(ids, to).await
    }

    /// Deletes all whose names begin so.
    async fn delete_below(&self, group: Group, folder: &str, to: &mut Answer) -> io::Result<usize> {
        let mut found = 0;
        for kind in group.kinds() {
            let filter = Filter { glob: Some(format!("{folder}*")), kind: Some(*kind), tags: Vec::new() };
            let mut cursor = None;
            loop {
                let (mut ids, next) = self.parts.view.series(&filter, cursor, PAGE, Scope::Global).await;
                // To the original an asterisk or a question mark inside is one.
                ids.retain(|id| id.key.as_str().starts_with(folder));
                found += self.delete_all(ids, to).await?;
                cursor = next;
                if cursor.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    async fn delete_all(&self, ids: Vec<SeriesId>, to: &mut Answer) -> io::Result<usize> {
        if ids.is_empty() {
            return Ok(0);
        }
        let keys: Vec<_> = ids.iter().map(|id| id.key.clone()).collect();
        let told = match self.parts.view.delete_all(ids).await {
            Ok(()) => "deleted: ",
            Err(view::Error::Store) => "ERROR not deleted, since the store is away: ",
            Err(view::Error::Stopping) => "ERROR not deleted, since the agent is stopping: ",
        };
        for key in &keys {
            to.add(&format!("{told}{key}\n")).await?;
        }
        Ok(keys.len())
    }
}

/// The series of a group by their names.
fn sorted(ledger: &Ledger, group: Group) -> Vec<Arc<Series>> {
    let mut all = Vec::new();
    ledger.for_each(|series| {
        if group.kinds().contains(&series.kind()) {
            all.push(Arc::clone(series));
        }
    });
    all.sort_unstable_by(|a, b| a.key().cmp(b.key()).then(a.kind().cmp(&b.kind())));
    all
}

/// What a series has to show: of a gauge its value, of all others what came into the window that begins there.
fn value(state: &State, start_ms: u64) -> inspect::Value {
    let window = state.window_at(start_ms).map(|window| &window.aggregate);
    match (&state.total.aggregate, window) {
        (Aggregate::Gauge(gauge), _) => inspect::Value::Number(gauge.value()),
        (_, Some(Aggregate::Counter(counter))) => {
            inspect::Value::Number(counter.increments.minus(&counter.decrements).value())
        }
        (_, Some(Aggregate::Observed(observed))) => {
            let values: Vec<f64> = observed.exact.iter().map(|(value, _)| *value).collect();
            let more = observed.n - (values.len() as u64).min(observed.n);
            inspect::Value::Numbers(values, more)
        }
        (_, Some(Aggregate::Set(set))) => inspect::Value::Number(set.cardinality() as f64),
        (_, Some(Aggregate::Meter(marks))) => inspect::Value::Number(marks.count.value()),
        (Aggregate::Observed(_), _) => inspect::Value::Numbers(Vec::new(), 0),
        (Aggregate::Counter(_) | Aggregate::Set(_) | Aggregate::Meter(_), _) => inspect::Value::Number(0.0),
    }
}
