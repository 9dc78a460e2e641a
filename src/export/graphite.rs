//! Graphite: what Etsy's StatsD flushes there, at the end of each window.
//!
//! A thread walks the ledger once a window of all shards is closed, and renders its lines; another sends them. What waits is
//! text in a queue, bounded by `limits.graphite_buffer`. Nothing else ever waits for either thread. A window whose
//! sending failed is sent again from its beginning: a line that arrives twice overwrites itself, since it bears the end of
//! its window. Windows arrive in their order.
//!
//! The lines are those of Etsy's backend (`backends/graphite.js`), and of them only what is kept exactly is exact: see
//! [`crate::aggregate::etsy`]. Meters, which it does not know, are sent with their rates as of the walk.
//!
//! Metrics: `tallyd_graphite_*`.

mod lines;
mod names;
mod queue;
mod send;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use serde::{Deserialize, Serialize};

use crate::aggregate::ledger::{Closed, Ledger, Series};
use crate::aggregate::meter::Rates;
use crate::aggregate::window::start_of;
use crate::aggregate::{Aggregate, etsy};
use crate::clock;
use crate::sample::Kind;
use crate::sync::{Receiver, Sender, bounded};
use crate::telemetry;
use crate::units::{Size, Time};
use lines::Lines;
use names::{Name, Names};
use queue::{Loss, Queue};
use send::{Delivered, Sending};

/// The section `[export.graphite]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Where Graphite listens, `host:port`; off when empty.
    pub to: String,
    /// What it reads there.
    pub protocol: Protocol,
    /// Whether names are those of before StatsD had prefixes.
    pub legacy_namespace: bool,
    /// Before all names.
    pub global_prefix: String,
    /// Behind all names.
    pub global_suffix: String,
    /// Before counters.
    pub prefix_counter: String,
    /// Before timers, histograms and distributions.
    pub prefix_timer: String,
    /// Before gauges.
    pub prefix_gauge: String,
    /// Before sets.
    pub prefix_set: String,
    /// Before meters.
    pub prefix_meter: String,
    /// Before the figures of the server itself.
    pub prefix_stats: String,
    /// Whether counters are sent as counts beside their rates.
    pub flush_counts: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            to: String::new(),
            protocol: Protocol::Plaintext,
            legacy_namespace: true,
            global_prefix: "stats".to_owned(),
            global_suffix: String::new(),
            prefix_counter: "counters".to_owned(),
            prefix_timer: "timers".to_owned(),
            prefix_gauge: "gauges".to_owned(),
            prefix_set: "sets".to_owned(),
            prefix_meter: "meters".to_owned(),
            prefix_stats: "statsd".to_owned(),
            flush_counts: true,
        }
    }
}

impl Config {
    /// Whether it can be used.
    ///
    /// # Errors
    /// The first key that can't.
    pub fn check(&self) -> Result<(), Error> {
        let is_address = self.to.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_graphic())
                && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if !self.to.is_empty() && !is_address {
            return Err(Error::To(self.to.clone()));
        }
        let parts = [
            ("global_prefix", &self.global_prefix),
            ("global_suffix", &self.global_suffix),
            ("prefix_counter", &self.prefix_counter),
            ("prefix_timer", &self.prefix_timer),
            ("prefix_gauge", &self.prefix_gauge),
            ("prefix_set", &self.prefix_set),
            ("prefix_meter", &self.prefix_meter),
            ("prefix_stats", &self.prefix_stats),
        ];
        match parts.into_iter().find(|(_, part)| !part.bytes().all(names::is_safe)) {
            Some((key, part)) => Err(Error::Part(key, part.clone())),
            None => Ok(()),
        }
    }
}

/// What Carbon reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// A line for each figure, usually at port 2003.
    #[default]
    Plaintext,
    /// Lists in Python's pickle, usually at port 2004.
    Pickle,
}

/// The rows of `[limits]` about Graphite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How much text may wait.
    pub graphite_buffer: Size,
    /// How long a connection may take to be made.
    pub graphite_connect: Time,
    /// For how long Graphite may take nothing.
    pub graphite_write: Time,
}

impl Default for Limits {
    fn default() -> Self {
        Self { graphite_buffer: Size(64 << 20), graphite_connect: Time::secs(5), graphite_write: Time::secs(10) }
    }
}

/// What is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// No address.
    To(String),
    /// A part of all names that names can't have.
    Part(&'static str, String),
}

impl Error {
    /// The key.
    pub fn key(&self) -> String {
        match self {
            Self::To(_) => "export.graphite.to".to_owned(),
            Self::Part(key, _) => format!("export.graphite.{key}"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        match self {
            Self::To(to) => {
                write!(f, "{key} = {to:?}: no address; write \"host:port\", as in \"graphite.example:2003\"")
            }
            Self::Part(_, part) => write!(f, "{key} = {part:?}: write letters, digits and _-.= alone"),
        }
    }
}

impl std::error::Error for Error {}

/// What the workers have received since the agent began: Etsy's figures of the server itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Intake {
    /// Datagrams, and lines of streams.
    pub packets: u64,
    /// Lines.
    pub lines: u64,
    /// Samples that were rejected.
    pub rejected: u64,
}

/// What the threads work on.
pub struct Parts {
    /// The figures.
    pub ledger: Arc<Ledger>,
    /// Which of them.
    pub etsy: etsy::Config,
    /// How they are named, and where they go.
    pub config: Config,
    /// The bounds.
    pub limits: Limits,
    /// Since when something may have come.
    pub begun_ms: u64,
    /// Asked once a window.
    pub intake: Box<dyn Fn() -> Intake + Send>,
}

/// Both threads, running.
pub struct Running {
    stop: Sender<(Ending, Instant)>,
    queue: Arc<Queue>,
    delivered: Arc<Delivered>,
    render: JoinHandle<()>,
    sent: Receiver<()>,
}

/// Why it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The agent stops: the window that is open is sent as it is.
    Stop,
    /// Another agent goes on with it.
    HandOver,
}

/// Starts both threads, if there is a Graphite.
///
/// # Errors
/// When a thread can't be started.
pub fn start(parts: Parts) -> io::Result<Option<Running>> {
    if parts.config.to.is_empty() {
        return Ok(None);
    }
    begin_metrics();
    let queue = Arc::new(Queue::new(parts.limits.graphite_buffer.bytes()));
    let delivered = Arc::new(Delivered::default());
    let sending = Sending::new(&parts.config.to, &parts.limits, &queue, &delivered);
    let (is_done, sent) = bounded(1);
    let send = move || {
        sending.run();
        // Nobody listens when the deadline of a stop is over.
        let _ = is_done.send(());
    };
    drop(spawn("graphite-send", send)?);
    let (stop, stopped) = bounded(1);
    let rendering = Rendering::new(parts, Arc::clone(&queue), Arc::clone(&delivered));
    let render = spawn("graphite", move || rendering.run(&stopped))?;
    Ok(Some(Running { stop, queue, delivered, render, sent }))
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(run)
}

fn begin_metrics() {
    telemetry::GRAPHITE_WINDOWS_LOST.begin(Loss::ALL.map(|loss| [loss.name()]));
    telemetry::GRAPHITE_LINES_LOST.begin(Loss::ALL.map(|loss| [loss.name()]));
    telemetry::GRAPHITE_FAILED.begin(send::REASONS.map(|reason| [reason]));
    telemetry::GRAPHITE_CONNECTED.gauge(&[]).set(0.0);
    telemetry::GRAPHITE_WAITING_BYTES.gauge(&[]).set(0.0);
    telemetry::GRAPHITE_LAG_SECONDS.gauge(&[]).set(0.0);
}

impl Running {
    /// How the last deliveries went, as the original's backend says it: times in seconds since the epoch, a duration in
    /// milliseconds, bytes.
    pub fn figures(&self) -> impl Fn() -> Vec<(&'static str, u64)> + Send + use<> {
        let delivered = Arc::clone(&self.delivered);
        move || {
            let last = delivered.last();
            vec![
                ("last_flush", last.flushed_s),
                ("last_exception", last.failed_s),
                ("flush_time", last.took_ms),
                ("flush_length", last.bytes),
            ]
        }
    }

    /// Begins to send what waits, until the deadline; nobody has to wait for that but who is about to end the process. To be
    /// called when the fold has ended.
    pub fn stop(self, deadline: Instant, ending: Ending) -> Stopping {
        // What a slow Graphite reads while the last window is rendered takes no more than half of the time.
        self.queue.hurry(Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2);
        // It fails only when the thread has ended.
        let _ = self.stop.send((ending, deadline));
        let Self { queue, render, sent, .. } = self;
        Stopping { queue, render, sent, deadline }
    }
}

/// Both threads, while they end.
pub struct Stopping {
    queue: Arc<Queue>,
    render: JoinHandle<()>,
    sent: Receiver<()>,
    deadline: Instant,
}

impl Stopping {
    /// Waits until what there is was sent, at most until the deadline; what is left then is lost, and counted.
    pub fn wait(self) {
        if self.render.join().is_err() {
            self.queue.stop(self.deadline);
        }
        // A name that is being looked up may take longer than there is time: the thread is then left alone.
        if self.sent.recv_deadline(self.deadline).is_err() {
            tell_lost(self.queue.give_up());
        }
    }
}

fn tell_lost((windows, lines): (u64, u64)) {
    if windows > 0 || lines > 0 {
        tracing::error!(windows, lines, "stopped with windows that Graphite did not take; they are lost there");
    }
}

/// The thread that renders.
struct Rendering {
    ledger: Arc<Ledger>,
    etsy: etsy::Config,
    protocol: Protocol,
    names: Names,
    own_prefix: String,
    intake: Box<dyn Fn() -> Intake + Send>,
    queue: Arc<Queue>,
    delivered: Arc<Delivered>,
    /// The end of the last window that was rendered.
    done_ms: u64,
    /// What had been received then.
    before: Intake,
    is_first: bool,
    /// Until then something may have come to another agent, which sent it: to the one that this one took over from, or that
    /// ran before.
    alone_from_ms: u64,
}

/// How many windows that are closed can be read: as many as a series keeps.
const READABLE: u64 = 2;

/// How often it is looked whether a window is closed, near its end; and at least.
const LOOK: Duration = Duration::from_millis(20);
const LOOK_MIN: Duration = Duration::from_millis(500);

impl Rendering {
    fn new(parts: Parts, queue: Arc<Queue>, delivered: Arc<Delivered>) -> Self {
        let prefix = &parts.config.prefix_stats;
        Self {
            // Since the ledger was read back windows may have been closed already.
            done_ms: start_of(parts.begun_ms, parts.ledger.window_ms()),
            ledger: parts.ledger,
            etsy: parts.etsy,
            protocol: parts.config.protocol,
            names: Names::new(&parts.config),
            own_prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}.") },
            intake: parts.intake,
            queue,
            delivered,
            before: Intake::default(),
            is_first: true,
            alone_from_ms: clock::wall_ms(),
        }
    }

    fn run(mut self, stop: &Receiver<(Ending, Instant)>) {
        loop {
            match stop.recv_timeout(self.pause()) {
                Err(RecvTimeoutError::Timeout) => self.render_closed(),
                Err(RecvTimeoutError::Disconnected) => return self.render_closed(),
                Ok((ending, deadline)) => {
                    self.render_closed();
                    self.render_open(ending);
                    return self.queue.stop(deadline);
                }
            }
        }
    }

    fn pause(&self) -> Duration {
        let end_ms = self.done_ms + self.ledger.window_ms();
        Duration::from_millis(end_ms.saturating_sub(clock::wall_ms())).clamp(LOOK, LOOK_MIN)
    }

    /// Renders the windows that are closed, one after the other. More than can be read are closed when rendering took long,
    /// the journal was read back slowly, the process stood still, or the wall clock was set: the first of them are lost.
    fn render_closed(&mut self) {
        let window_ms = self.ledger.window_ms();
        loop {
            let closed_ms = self.ledger.closed_until_ms();
            if closed_ms <= self.done_ms {
                // Where the wall clock was set back windows begin again there.
                self.done_ms = closed_ms;
                return;
            }
            let start_ms = self.done_ms.max(closed_ms.saturating_sub(READABLE * window_ms));
            let late = (start_ms - self.done_ms) / window_ms;
            if late > 0 {
                tracing::warn!(windows = late, "windows were over before they could be rendered for Graphite");
            }
            Loss::Late.count(late, 0);
            self.render(start_ms, self.whose(start_ms));
        }
    }

    fn render_open(&mut self, ending: Ending) {
        let start_ms = self.ledger.closed_until_ms();
        let whose = match ending {
            Ending::Stop => self.whose(start_ms),
            Ending::HandOver => Whose::Left,
        };
        self.render(start_ms, whose);
    }

    fn whose(&self, start_ms: u64) -> Whose {
        if start_ms < self.alone_from_ms { Whose::Taken } else { Whose::Own }
    }

    /// Renders the window that begins then.
    fn render(&mut self, start_ms: u64, whose: Whose) {
        let window_ms = self.ledger.window_ms();
        let (begun, end_ms) = (Instant::now(), start_ms + window_ms);
        // From then on the ledger has no room for all of it any more; what is late already has some of it.
        let ahead_ms = (end_ms + window_ms).saturating_sub(clock::wall_ms()).clamp(window_ms / 2, 2 * window_ms);
        let deadline = begun + Duration::from_millis(ahead_ms);
        self.queue.begin();
        let mut flush = Flush {
            start_ms,
            end_ms,
            seconds: window_ms as f64 / 1e3,
            deadline,
            steady_ms: clock::steady_ms(),
            whose,
            lines: Lines::new(self.protocol, (end_ms + 500) / 1_000),
            path: String::new(),
            series: 0,
            left: 0,
            unnamed: 0,
        };
        self.ledger.for_each_slowly(|series| flush.add(self, series));
        if whose != Whose::Left {
            self.add_own(&mut flush, begun);
        }
        self.queue.push(end_ms, flush.lines.take(), true, deadline);
        Loss::Late.count(0, flush.left);
        Loss::Name.count(0, flush.unnamed);
        (self.done_ms, self.is_first) = (end_ms, false);
        telemetry::GRAPHITE_RENDER_SECONDS.histogram(&[]).record(begun.elapsed());
        let oldest_ms = self.queue.oldest_ms().unwrap_or(end_ms);
        telemetry::GRAPHITE_LAG_SECONDS.gauge(&[]).set(clock::wall_ms().saturating_sub(oldest_ms) as f64 / 1e3);
    }

    /// Etsy's figures of the server itself: counters, a gauge, and those that are no series.
    fn add_own(&mut self, flush: &mut Flush, begun: Instant) {
        let received = (self.intake)();
        let before = std::mem::replace(&mut self.before, received);
        let counters = [
            ("bad_lines_seen", received.rejected - before.rejected),
            ("packets_received", received.packets - before.packets),
            ("metrics_received", received.lines - before.lines),
        ];
        for (name, count) in counters {
            let name = Name::plain(format!("{}{name}", self.own_prefix));
            let figures = [("count", count as f64), ("rate", count as f64 / flush.seconds)];
            flush.put(self, Kind::Counter, &name, figures);
        }
        if !self.is_first {
            let name = Name::plain(format!("{}timestamp_lag", self.own_prefix));
            let lag_s = (flush.end_ms as f64 - self.done_ms as f64) / 1e3 - flush.seconds;
            flush.put(self, Kind::Gauge, &name, [("value", lag_s)]);
        }
        let rendered_ms = begun.elapsed().as_millis() as f64;
        let last = self.delivered.last();
        let figures = [
            ("numStats", flush.series as f64),
            ("graphiteStats.calculationtime", rendered_ms),
            ("processing_time", rendered_ms),
            ("graphiteStats.last_exception", last.failed_s as f64),
            ("graphiteStats.last_flush", last.flushed_s as f64),
            ("graphiteStats.flush_time", last.took_ms as f64),
            ("graphiteStats.flush_length", last.bytes as f64),
        ];
        for (figure, value) in figures {
            flush.lines.push(self.names.own(&mut flush.path, figure), value);
        }
    }
}

/// Which agents send a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// This one alone.
    Own,
    /// Another may have sent some of it before.
    Taken,
    /// Another goes on with it, and sends it later.
    Left,
}

impl Whose {
    /// Whether this agent sends the figures of a series. Where those are of what came into the window and nothing else, no
    /// zeros of an agent to which nothing came are to overwrite what came to the other; gauges and meters go on from the
    /// journal, and whoever has the window last sends them whole.
    const fn has(self, kind: Kind, is_idle: bool) -> bool {
        let is_of_window_alone = match kind {
            Kind::Counter | Kind::Timer | Kind::Histogram | Kind::Distribution | Kind::Set => true,
            Kind::Gauge | Kind::Meter => false,
        };
        match self {
            Self::Own => true,
            Self::Taken => !is_idle || !is_of_window_alone,
            Self::Left => !is_idle && is_of_window_alone,
        }
    }
}

/// One window while it is rendered.
struct Flush {
    start_ms: u64,
    end_ms: u64,
    seconds: f64,
    deadline: Instant,
    steady_ms: u64,
    whose: Whose,
    lines: Lines,
    path: String,
    series: u64,
    /// Series that were left out because the time was over.
    left: u64,
    /// Series without a name.
    unnamed: u64,
}

impl Flush {
    fn add(&mut self, rendering: &Rendering, series: &Arc<Series>) {
        if Instant::now() >= self.deadline {
            self.left += 1;
            return;
        }
        let state = series.state();
        if state.total.start_ms < self.end_ms && state.is_past(self.start_ms) {
            self.left += 1;
            return;
        }
        let Some(closed) = rendering.ledger.closed(series.kind(), &state, self.start_ms) else { return };
        if !self.whose.has(series.kind(), closed.idle > 0) {
            return;
        }
        let Some(name) = Name::of(series.key()) else {
            self.unnamed += 1;
            return;
        };
        if series.kind() == Kind::Meter {
            let figures = meter(&state.total.aggregate, state.total.rates.as_ref(), self.steady_ms);
            self.put(rendering, Kind::Meter, &name, figures);
        } else {
            self.add_figures(rendering, series, &closed, &name);
        }
        if let Some(chunk) = self.lines.full() {
            rendering.queue.push(self.end_ms, chunk, false, self.deadline);
        }
    }

    fn add_figures(&mut self, rendering: &Rendering, series: &Series, closed: &Closed, name: &Name<'_>) {
        if let Some(figures) = rendering.etsy.figures(series.key().as_str(), closed, self.seconds) {
            self.put(rendering, series.kind(), name, figures);
        }
    }

    /// Adds the figures of one series.
    fn put<N: AsRef<str>>(
        &mut self,
        rendering: &Rendering,
        kind: Kind,
        name: &Name<'_>,
        figures: impl IntoIterator<Item = (N, f64)>,
    ) {
        self.series += 1;
        for (figure, value) in figures {
            if let Some(path) = rendering.names.path(&mut self.path, kind, name, figure.as_ref()) {
                self.lines.push(path, value);
            }
        }
    }
}

/// The figures of a meter: of its whole life, as of now.
fn meter(total: &Aggregate, rates: Option<&Rates>, now_ms: u64) -> [(&'static str, f64); 5] {
    let count = match total {
        Aggregate::Meter(marks) => marks.count.value(),
        Aggregate::Counter(_) | Aggregate::Gauge(_) | Aggregate::Observed(_) | Aggregate::Set(_) => 0.0,
    };
    let [m1, m5, m15] = rates.map_or([0.0; 3], |rates| rates.at(now_ms));
    let mean = rates.map_or(0.0, |rates| rates.mean(now_ms));
    [("count", count), ("mean_rate", mean), ("m1_rate", m1), ("m5_rate", m5), ("m15_rate", m15)]
}
