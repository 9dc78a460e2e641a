//! A worker's hot path: bytes into lines, lines into the worker's own shard, and the tally of what became of them.
//!
//! A [`Worker`] belongs to one thread. It never waits: when a seal is due, or a reader has asked for one, the next
//! [`Worker::turn`] hands the shard's cells to the fold through a channel and goes on with empty ones. If the fold is so
//! far behind that none of the cells handed over came back, the worker keeps counting into those it has.
//!
//! Metrics: `tallyd_lines_*`, `tallyd_samples_*`, `tallyd_series_refused_total`, `tallyd_seals_total`, published at seals.

pub mod copies;
mod events;
mod group;
mod rejects;
mod sort;
pub mod sources;
mod tally;

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use copies::{Copier, Copies, Wanted};
pub use events::{Events, KeptCheck, KeptEvent, Received};
use group::{Group, Room};
pub use rejects::{Limits, Rejected, Rejects};
pub use sort::Sorted;
use sort::Sorting;
pub use sources::{Address, Sources};
use sources::{Coming, Table};
use tally::Tally;
pub use tally::begin;

use crate::aggregate::baselines::Baselines;
use crate::aggregate::shard::{Budget, Cells, IGNORED, Sealed, Shard, Sight};
use crate::aggregate::window::start_of;
use crate::clock::{self, Clock};
use crate::heartbeat::Board;
use crate::mapping::Mapping;
use crate::protocol::{self, Body, Event, Parser, Reject, ServiceCheck, Sink};
use crate::receipt::Receipt;
use crate::sample::{Identity, Kind, Marks, Reason, Sample, Value, WireType};
use crate::sync::{AtomicU64, Receiver, Sender, unbounded};
use crate::telemetry;

/// By which way bytes came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Listener {
    /// UDP datagrams.
    Udp,
    /// Lines on a TCP stream.
    Tcp,
    /// Datagrams of a unix socket.
    Unixgram,
    /// Length-prefixed messages or lines on a unix stream.
    Unix,
    /// Bodies of `POST /ingest/metrics`.
    Http,
    /// Records of a topic.
    Kafka,
}

impl Listener {
    /// Every listener, in the order of their declaration.
    pub const ALL: [Self; 6] = [Self::Udp, Self::Tcp, Self::Unixgram, Self::Unix, Self::Http, Self::Kafka];

    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Unixgram => "unixgram",
            Self::Unix => "unix",
            Self::Http => "http",
            Self::Kafka => "kafka",
        }
    }
}

/// Who sent something.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// The way it came.
    pub listener: Listener,
    /// Where the sender is, where the way tells.
    pub address: Option<Address>,
}

impl Source {
    /// The sender's address on a network.
    pub fn ip(&self) -> Option<IpAddr> {
        match self.address {
            Some(Address::Inet(address)) => Some(address.ip().to_canonical()),
            Some(Address::Process { .. } | Address::Record { .. }) | None => None,
        }
    }

    /// The address of another machine; none for a process of this one.
    fn remote(&self) -> Option<IpAddr> {
        self.ip().filter(|ip| !ip.is_loopback())
    }

    /// Tells senders of absolute counters apart: by host, since a client's port changes with each of its sockets.
    fn host(&self) -> u64 {
        match self.ip() {
            Some(IpAddr::V4(ip)) => u64::from(u32::from(ip)),
            Some(IpAddr::V6(ip)) => {
                let bits = u128::from(ip);
                (bits >> 64) as u64 ^ bits as u64
            }
            None => u64::MAX,
        }
    }
}

/// What a reload may change under a worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How lines are read.
    pub protocol: protocol::Config,
    /// How long their parts may be.
    pub limits: protocol::Limits,
    /// The rules that may drop series.
    pub mapping: Option<Arc<Mapping>>,
}

/// What readers asked for: a seal that begins after they did. The default is no question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Question(u64);

/// The lengths by which time is divided, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Seals are due at its multiples.
    pub interval_ms: u64,
    /// Windows begin at its multiples.
    pub window_ms: u64,
}

/// What a seal delivers to the fold.
#[derive(Debug)]
pub struct Delivery {
    /// The worker's number.
    pub worker: usize,
    /// The newest question that the seal answers: it began after that was asked.
    pub answers: u64,
    /// The moment to whose window the cells belong: the seal's due time less a millisecond, or when it was asked for.
    pub at_ms: u64,
    /// All that the worker received before this moment has been delivered.
    pub complete_until_ms: u64,
    /// The cells and names.
    pub sealed: Sealed,
    /// What came from each source.
    pub sources: Vec<(sources::Key, sources::Figures)>,
    /// What the requests were told whose samples are in the cells.
    pub receipts: Vec<Receipt>,
    /// How far the logs were read whose records are in the cells.
    pub marks: Marks,
    /// This is the worker's last.
    pub last: bool,
}

/// What the fold gives back to a worker.
#[derive(Debug)]
pub enum Returned {
    /// Drained cells.
    Cells(Cells),
    /// Series that the ledger wants to expire.
    Retire(Vec<u32>),
}

/// How to reach a worker.
struct Seat {
    returned: Sender<Returned>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The workers of an agent, and the questions of those who wait for a seal.
pub struct Workers {
    seats: Mutex<Vec<Arc<Seat>>>,
    asked: AtomicU64,
    deliveries: Sender<Delivery>,
    settings: ArcSwap<Settings>,
    budget: Arc<Budget>,
    rejects: Arc<Rejects>,
    events: Arc<Events>,
    sources: Arc<Sources>,
    baselines: Arc<Baselines>,
    times: Times,
    begun_ms: u64,
    beats: Arc<Board>,
    /// Samples accepted by all workers, up to their last seals.
    samples: AtomicU64,
    copies: Wanted,
    /// The sums of [`Intake`], in its order.
    intake: [AtomicU64; 3],
}

/// What all workers have received, up to their last seals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Intake {
    /// Datagrams, packets of unix streams, lines of TCP streams, bodies of HTTP.
    pub messages: u64,
    /// Lines and JSON records.
    pub lines: u64,
    /// Samples that were rejected.
    pub rejected: u64,
}

impl Workers {
    /// No workers yet. The receiver is the fold's.
    pub fn new(
        settings: Settings,
        budget: Arc<Budget>,
        rejects: Arc<Rejects>,
        times: Times,
    ) -> (Arc<Self>, Receiver<Delivery>) {
        Self::telling_apart(Sources::default(), settings, budget, rejects, times)
    }

    /// The same, with bounds of one's own for the sources that are told apart.
    pub fn telling_apart(
        sources: Sources,
        settings: Settings,
        budget: Arc<Budget>,
        rejects: Arc<Rejects>,
        times: Times,
    ) -> (Arc<Self>, Receiver<Delivery>) {
        // Bounded by its use: a worker has at most `CELLS_OUT` deliveries on their way.
        let (deliveries, receiver) = unbounded();
        let settings = ArcSwap::from_pointee(settings);
        let asked = AtomicU64::new(0);
        let seats = Mutex::new(Vec::new());
        let (events, baselines) = (Arc::new(Events::default()), Arc::new(Baselines::default()));
        let sources = Arc::new(sources);
        let (beats, samples) = (Arc::default(), AtomicU64::new(0));
        let workers = Self {
            seats,
            asked,
            deliveries,
            settings,
            budget,
            rejects,
            events,
            sources,
            baselines,
            times,
            begun_ms: clock::wall_ms(),
            beats,
            samples,
            copies: Wanted::default(),
            intake: Default::default(),
        };
        (Arc::new(workers), receiver)
    }

    /// A new worker. `wake` is called by other threads when it must take a turn although nothing comes in.
    pub fn register(self: &Arc<Self>, wake: impl Fn() + Send + Sync + 'static) -> Worker {
        let (returned, receiver) = unbounded();
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        seats.push(Arc::new(Seat { returned, wake: Box::new(wake) }));
        Worker::new(Arc::clone(self), seats.len() - 1, receiver)
    }

    /// Lets each worker that is registered from now on make copies of what comes as lines, from datagrams and streams. None
    /// if somebody has them already.
    pub fn copies(&self) -> Option<Copies> {
        self.copies.begin()
    }

    /// When there was no worker yet, in milliseconds since the epoch.
    pub fn begun_ms(&self) -> u64 {
        self.begun_ms
    }

    /// How many workers there are.
    pub fn len(&self) -> usize {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks every worker for a seal that begins after this call. The answer is the number to look for in
    /// [`Delivery::answers`].
    pub fn ask(&self) -> u64 {
        let asked = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        seats.iter().for_each(|seat| (seat.wake)());
        asked
    }

    /// Gives something back to a worker.
    pub fn give_back(&self, worker: usize, returned: Returned) {
        let seat = self.seats.lock().unwrap_or_else(PoisonError::into_inner).get(worker).map(Arc::clone);
        if let Some(seat) = seat {
            // A worker that is gone needs nothing any more.
            drop(seat.returned.send(returned));
        }
    }

    /// Changes how lines are read, at each worker's next turn.
    pub fn set(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    /// The last events and service checks.
    pub fn events(&self) -> Arc<Events> {
        Arc::clone(&self.events)
    }

    /// Who sends, and what.
    pub fn sources(&self) -> Arc<Sources> {
        Arc::clone(&self.sources)
    }

    /// Where the parts of the agent beat.
    pub fn beats(&self) -> &Arc<Board> {
        &self.beats
    }

    /// How many samples were accepted, up to the workers' last seals.
    pub fn samples(&self) -> u64 {
        self.samples.load(Ordering::Relaxed)
    }

    /// What was received, up to the workers' last seals.
    pub fn intake(&self) -> Intake {
        let [messages, lines, rejected] = self.intake.each_ref().map(|sum| sum.load(Ordering::Relaxed));
        Intake { messages, lines, rejected }
    }

    fn take_in(&self, messages: u64, tally: &Tally) {
        for (sum, count) in self.intake.iter().zip([messages, tally.lines(), tally.rejected()]) {
            sum.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// How lines are read.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.load_full()
    }
}

/// How many seals of a worker may be on their way.
pub(crate) const CELLS_OUT: usize = 3;

/// One owner of sockets with its shard.
pub struct Worker {
    parser: Parser,
    core: Core,
    room: Box<Room>,
    port: Port,
    copies: Option<Box<Copier>>,
}

/// Where the parser puts what it found.
struct Core {
    shard: Shard,
    settings: Arc<Settings>,
    source: Source,
    now_ms: u64,
    tally: Tally,
    sources: Table,
    /// What became of the line that is being read: whether something was accepted, and the first reason against it.
    accepted: bool,
    reason: Option<Reason>,
    answer: Option<Answer>,
    receipts: Vec<Receipt>,
    rejects: Arc<Rejects>,
    events: Arc<Events>,
    window_ms: u64,
    baselines: Arc<Baselines>,
}

/// The worker's end of the hand-over.
struct Port {
    workers: Arc<Workers>,
    number: usize,
    returned: Receiver<Returned>,
    clock: Clock,
    out: usize,
    answered: u64,
    due_ms: u64,
    marks: Marks,
}

/// What became of the records of one HTTP body.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The form of the body.
    pub form: Body,
    /// Records of which something was accepted.
    pub accepted: u64,
    /// Records of which nothing was.
    pub rejected: u64,
    /// The first of the records that were rejected, with their index from 0.
    pub errors: Vec<RecordError>,
}

impl Default for Answer {
    fn default() -> Self {
        Self { form: Body::Invalid, accepted: 0, rejected: 0, errors: Vec::new() }
    }
}

/// Why a record of an HTTP body was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordError {
    /// Its place in the body, from 0.
    pub index: u64,
    /// Why.
    pub reason: Reason,
    /// The byte of the record, from 0, where that was seen.
    pub column: usize,
}

/// How many errors an [`Answer`] names.
const ERRORS_NAMED: usize = 100;

impl Worker {
    fn new(workers: Arc<Workers>, number: usize, returned: Receiver<Returned>) -> Self {
        let settings = workers.settings();
        let mut clock = Clock::default();
        let now_ms = clock.stamp_ms();
        let core = Core {
            shard: Shard::new(Arc::clone(&workers.budget)),
            settings: Arc::clone(&settings),
            source: Source { listener: Listener::Udp, address: None },
            now_ms,
            tally: Tally::default(),
            sources: Table::new(workers.sources.max()),
            accepted: false,
            reason: None,
            answer: None,
            receipts: Vec::new(),
            rejects: Arc::clone(&workers.rejects),
            events: Arc::clone(&workers.events),
            baselines: Arc::clone(&workers.baselines),
            window_ms: workers.times.window_ms,
        };
        let due_ms = next_due(now_ms, workers.times.interval_ms);
        let answered = workers.asked.load(Ordering::Acquire);
        let copies = workers.copies.copier();
        let port = Port { workers, number, returned, clock, out: 0, answered, due_ms, marks: Marks::new() };
        Self { parser: Parser::new(&settings.protocol, &settings.limits), core, room: Box::default(), port, copies }
    }

    /// Tells the worker what time it is: that of all it is given from now on. For each burst or read, before its bytes,
    /// since readings of a gauge that come by several workers are put in order by it.
    pub fn stamp(&mut self) {
        self.core.now_ms = self.port.clock.stamp_ms();
    }

    /// Reads one datagram.
    #[inline]
    pub fn datagram(&mut self, bytes: &[u8], source: Source) {
        self.core.hear(source, Coming { messages: 1, bytes: bytes.len(), ..Coming::default() });
        self.together(bytes);
    }

    /// Takes note of a datagram that was too long, of which so many bytes came.
    pub fn truncated(&mut self, bytes: usize, source: Source) {
        self.core.hear(source, Coming { messages: 1, bytes, is_truncated: true });
    }

    /// Takes note of so many bytes of a stream or an HTTP body, before what is in them is read.
    pub fn received(&mut self, bytes: usize, source: Source) {
        self.core.hear(source, Coming { bytes, ..Coming::default() });
    }

    /// Reads one packet of a stream, as a datagram.
    #[inline]
    pub fn packet(&mut self, packet: &[u8], source: Source) {
        self.core.hear(source, MESSAGE);
        self.together(packet);
    }

    #[inline]
    fn together(&mut self, bytes: &[u8]) {
        if let Some(copies) = &mut self.copies {
            copies.add(bytes);
        }
        let mut group = Group::new(&mut self.core, &mut self.room, bytes);
        self.parser.datagram(bytes, &mut group);
        group.finish();
    }

    /// Reads one line of a stream, without its line feed.
    #[inline]
    pub fn line(&mut self, line: &[u8], source: Source) {
        self.core.hear(source, MESSAGE);
        if let Some(copies) = &mut self.copies {
            copies.add(line);
        }
        self.parser.line(line, 1, &mut self.core);
    }

    /// Hands over the copies of what was read so far; each turn does so too.
    #[inline]
    pub fn hand_over_copies(&mut self) {
        if let Some(copies) = &mut self.copies {
            copies.hand_over();
        }
    }

    /// Counts a line that the transport could not accept.
    pub fn refuse(&mut self, reason: Reason, bytes: &[u8], source: Source) {
        self.core.hear(source, MESSAGE);
        self.core.reject(&Reject { reason, line: 1, column: 0, bytes });
        self.core.line_end();
    }

    /// Counts what a process sent that may not: every line of it.
    pub fn deny(&mut self, datagram: &[u8], source: Source) {
        self.core.hear(source, Coming { messages: 1, bytes: datagram.len(), ..Coming::default() });
        for line in datagram.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            self.core.reject(&Reject { reason: Reason::PeerDenied, line: 1, column: 0, bytes: line });
            self.core.line_end();
        }
    }

    /// Reads an HTTP body.
    pub fn body(&mut self, body: &[u8], source: Source) -> Answer {
        self.answered(source, |parser, core| parser.body(body, core))
    }

    /// Reads a message of a log: one JSON record, or an array of them. One without any is rejected, and so is one that has
    /// more than `limits.samples`.
    pub fn record(&mut self, message: &[u8], source: Source) {
        if message.trim_ascii().is_empty() {
            self.refuse(Reason::BadJson, message, source);
        } else if let Body::TooMany(_) = self.body(message, source).form {
            self.refuse(Reason::TooManyValues, message, source);
        }
    }

    /// Reads an HTTP body that is said to be one record a line.
    pub fn body_of_lines(&mut self, body: &[u8], source: Source) -> Answer {
        self.answered(source, |parser, core| parser.body_of_lines(body, core))
    }

    /// Lets a receipt go with the samples of the body that was read last.
    pub fn receipt(&mut self, receipt: Receipt) {
        self.core.receipts.push(receipt);
    }

    /// Reads an HTTP body whose records are to go elsewhere: counted and rejected as by [`Worker::body`], or if they are
    /// one a line as by [`Worker::body_of_lines`], but of those that are accepted nothing is kept here.
    pub fn sort(&mut self, body: &[u8], are_lines: bool, source: Source) -> (Answer, Vec<Sorted>) {
        let mut sorted = Vec::new();
        let answer = self.answered(source, |parser, core| {
            let mut sorting = Sorting { core, sorted: Vec::new() };
            let form =
                if are_lines { parser.body_of_lines(body, &mut sorting) } else { parser.body(body, &mut sorting) };
            sorted = sorting.sorted;
            form
        });
        (answer, sorted)
    }

    fn answered(&mut self, source: Source, read: impl FnOnce(&mut Parser, &mut Core) -> Body) -> Answer {
        self.core.hear(source, MESSAGE);
        self.core.answer = Some(Answer::default());
        let form = read(&mut self.parser, &mut self.core);
        Answer { form, ..self.core.answer.take().unwrap_or_default() }
    }

    /// Says how far a log was read: what this worker read until then goes to the journal together with that.
    pub fn mark(&mut self, log: &Arc<str>, next: i64) {
        match self.port.marks.get_mut(log) {
            Some(mark) => *mark = next,
            None => drop(self.port.marks.insert(Arc::clone(log), next)),
        }
    }

    /// The newest question of readers. What the sockets hold now came before it was asked: it is to be read before
    /// [`Worker::turn`] answers.
    #[inline]
    pub fn question(&self) -> Question {
        Question(self.port.workers.asked.load(Ordering::Acquire))
    }

    /// Whether a question has no answer yet.
    #[inline]
    pub fn owes(&self, question: Question) -> bool {
        question.0 > self.port.answered
    }

    /// Does what is due between two bursts, answers a question, and says how long the worker may then wait for the next
    /// burst. A later question is left for the next turn, since what came before it may not have been read.
    pub fn turn(&mut self, question: Question) -> Duration {
        self.take_returned();
        self.hand_over_copies();
        let now_ms = self.port.clock.wall_ms();
        let interval_ms = self.port.workers.times.interval_ms;
        // A wall clock that was set back must not put the next seal off.
        let due = now_ms >= self.port.due_ms || self.port.due_ms > now_ms + interval_ms;
        if due || self.owes(question) {
            self.seal(now_ms, due, question);
        }
        Duration::from_millis(self.port.due_ms.saturating_sub(now_ms).clamp(1, 1_000))
    }

    /// Delivers what is left and ends.
    pub fn close(mut self) {
        self.take_returned();
        self.hand_over_copies();
        let now_ms = self.port.clock.wall_ms();
        self.deliver(now_ms, now_ms, self.port.answered, true);
    }

    fn take_returned(&mut self) {
        while let Ok(returned) = self.port.returned.try_recv() {
            match returned {
                Returned::Cells(cells) => {
                    self.port.out -= 1;
                    self.core.shard.give_back(cells);
                }
                Returned::Retire(numbers) => self.core.shard.retire(&numbers),
            }
        }
    }

    fn seal(&mut self, now_ms: u64, due: bool, question: Question) {
        if self.port.out >= CELLS_OUT {
            return;
        }
        let answers = question.0.max(self.port.answered);
        let due_ms = self.port.due_ms;
        let late = due && now_ms >= due_ms && now_ms - due_ms < self.port.workers.times.interval_ms;
        let (at_ms, complete_until_ms) = if late { (due_ms - 1, due_ms) } else { (now_ms, now_ms) };
        telemetry_seal(due);
        self.deliver(at_ms, complete_until_ms, answers, false);
        self.port.answered = answers;
        self.port.due_ms = next_due(now_ms, self.port.workers.times.interval_ms);
        self.take_settings();
    }

    fn deliver(&mut self, at_ms: u64, complete_until_ms: u64, answers: u64, last: bool) {
        self.core.tally.refuse(self.core.shard.take_refused());
        let sources = self.core.sources.take(&self.core.tally, self.core.shard.created());
        self.port.workers.samples.fetch_add(self.core.tally.samples(), Ordering::Relaxed);
        self.port.workers.take_in(sources.iter().map(|(_, figures)| figures.messages()).sum(), &self.core.tally);
        self.core.tally.publish();
        let sealed = self.core.shard.seal();
        self.port.out += 1;
        let (receipts, marks) = (std::mem::take(&mut self.core.receipts), std::mem::take(&mut self.port.marks));
        let worker = self.port.number;
        let delivery = Delivery { worker, answers, at_ms, complete_until_ms, sealed, sources, receipts, marks, last };
        // The fold ends after the last worker; if it ended before, there is nobody to count for.
        drop(self.port.workers.deliveries.send(delivery));
    }

    fn take_settings(&mut self) {
        let settings = self.port.workers.settings.load();
        if !Arc::ptr_eq(&settings, &self.core.settings) {
            // Names may be kept otherwise from now on, and rules may drop others.
            self.core.shard.forget_spellings();
            self.core.settings = Arc::clone(&settings);
            self.parser = Parser::new(&settings.protocol, &settings.limits);
        }
    }
}

fn telemetry_seal(due: bool) {
    telemetry::SEALS.counter(&[if due { "due" } else { "asked" }]).increment(1);
}

fn next_due(now_ms: u64, interval_ms: u64) -> u64 {
    (now_ms / interval_ms + 1) * interval_ms
}

/// A timestamp as it was sent, in milliseconds. Below 1e11 it is seconds, as in JSON: that many milliseconds were 1973.
fn stamp_ms(timestamp: u64) -> u64 {
    if timestamp < 100_000_000_000 { timestamp * 1_000 } else { timestamp }
}

/// Something whose bytes were counted as they were read.
const MESSAGE: Coming = Coming { messages: 1, bytes: 0, is_truncated: false };

impl Core {
    /// What is read from now on comes from this source.
    #[inline]
    fn hear(&mut self, source: Source, coming: Coming) {
        self.source = source;
        self.sources.hear(&source, coming, &self.tally, self.shard.created(), self.now_ms);
    }

    /// The number of an identity's series, admitted if this is its first sample here and no mapping rule drops it.
    #[inline]
    fn number_of(&mut self, kind: Kind, identity: &Identity<'_>) -> Result<u32, Reason> {
        match self.shard.find(kind, identity) {
            Ok(number) => Ok(number),
            Err(vacancy) => {
                let settings = &self.settings;
                let (key, bad_tags) = protocol::series_key(identity, &settings.protocol, &settings.limits)?;
                let is_dropped = settings.mapping.as_ref().is_some_and(|mapping| mapping.drops(kind, &key.name()));
                self.bad_tags(bad_tags);
                if is_dropped {
                    self.shard.ignore(vacancy, kind, identity);
                    return Ok(IGNORED);
                }
                let sight = Sight { at_ms: self.now_ms, source: self.source.remote() };
                Ok(self.shard.admit(vacancy, kind, identity, key, sight))
            }
        }
    }

    fn try_sample(&mut self, sample: &Sample<'_>) -> Result<(), Reason> {
        let number = self.number_of(sample.wire.kind(), &sample.identity)?;
        if number == IGNORED {
            self.tally.of(self.source.listener).samples_dropped += sample.value.count() as u64;
            return Ok(());
        }
        let values = match (sample.wire, sample.timestamp) {
            (WireType::AbsoluteCounter, _) => self.add_absolute(number, sample)?,
            (wire, 0) => self.shard.add(number, wire.kind(), &sample.value, sample.rate, self.now_ms)?,
            (wire, _) => self.add_stamped(number, wire.kind(), sample)?,
        };
        self.tally.of(self.source.listener).samples += values;
        Ok(())
    }

    /// A sample that says when it was taken goes into the window of that time if it is the present one or the one before,
    /// which is kept. With any other time it counts as taken now, and so do marks, whose rates are those of their arrival.
    fn add_stamped(&mut self, number: u32, kind: Kind, sample: &Sample<'_>) -> Result<u64, Reason> {
        let Sample { value, rate, .. } = sample;
        let present_ms = start_of(self.now_ms, self.window_ms);
        let at_ms = stamp_ms(sample.timestamp);
        if kind == Kind::Meter {
            return self.shard.add(number, kind, value, *rate, self.now_ms);
        }
        if at_ms >= present_ms && at_ms < present_ms + self.window_ms {
            return self.shard.add(number, kind, value, *rate, at_ms.min(self.now_ms));
        }
        let before_ms = present_ms.saturating_sub(self.window_ms);
        if at_ms >= before_ms && at_ms < present_ms {
            return self.shard.add_earlier(number, kind, value, *rate, at_ms, before_ms);
        }
        self.tally.unplaced += 1;
        self.shard.add(number, kind, value, *rate, self.now_ms)
    }

    /// An absolute counter counts the difference to the last reading of the same host, whatever time it bears.
    fn add_absolute(&mut self, number: u32, sample: &Sample<'_>) -> Result<u64, Reason> {
        let Value::Numbers(readings) = sample.value else { return Err(Reason::BadValue) };
        let host = self.source.host();
        for reading in readings {
            let step = self.baselines.step(&sample.identity, host, *reading);
            self.tally.evicted += u64::from(step.evicted);
            self.shard.add(number, Kind::Counter, &Value::Numbers(&[step.increment]), 1.0, self.now_ms)?;
        }
        Ok(readings.len() as u64)
    }
}

impl Sink for Core {
    #[inline]
    fn sample(&mut self, sample: &Sample<'_>) {
        match self.try_sample(sample) {
            Ok(()) => self.accepted = true,
            Err(reason) => {
                let bytes = match sample.identity {
                    Identity::Line { name, .. } => name,
                    Identity::Key(key) => key.as_bytes(),
                };
                self.reject(&Reject { reason, line: 1, column: 0, bytes });
            }
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        self.accepted = true;
        self.tally.of(self.source.listener).events += 1;
        self.events.event(event, self.source, self.now_ms);
    }

    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        self.accepted = true;
        self.tally.of(self.source.listener).checks += 1;
        self.events.check(check, self.source, self.now_ms);
    }

    fn reject(&mut self, reject: &Reject<'_>) {
        self.tally.of(self.source.listener).samples_rejected[reject.reason as usize] += 1;
        if self.reason.is_none() {
            self.reason = Some(reject.reason);
            if let Some(answer) = self.answer.as_mut().filter(|answer| answer.errors.len() < ERRORS_NAMED) {
                let index = answer.accepted + answer.rejected;
                answer.errors.push(RecordError { index, reason: reject.reason, column: reject.column });
            }
        }
        self.sources.reject(reject, self.source, self.now_ms);
        self.rejects.note(reject, self.source, self.now_ms);
    }

    fn bad_tags(&mut self, count: u32) {
        self.tally.bad_tags += u64::from(count);
    }

    #[inline]
    fn line_end(&mut self) {
        let accepted = std::mem::take(&mut self.accepted);
        let reason = self.reason.take();
        let tally = self.tally.of(self.source.listener);
        tally.lines += 1;
        match reason {
            Some(reason) if !accepted => tally.lines_rejected[reason as usize] += 1,
            Some(_) | None => tally.lines_accepted += 1,
        }
        if let Some(answer) = &mut self.answer {
            if accepted { answer.accepted += 1 } else { answer.rejected += 1 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::{Aggregate, shard};

    /// Seals come only when they are asked for.
    const TIMES: Times = Times { interval_ms: 86_400_000, window_ms: 10_000 };

    const SOURCE: Source = Source { listener: Listener::Tcp, address: None };

    fn increments(cell: &Aggregate) -> f64 {
        let Aggregate::Counter(counter) = cell else { panic!("no counter") };
        counter.increments.value()
    }

    fn worker() -> (Arc<Workers>, Receiver<Delivery>, Worker) {
        worker_within(&shard::Limits::default())
    }

    pub(super) fn worker_within(limits: &shard::Limits) -> (Arc<Workers>, Receiver<Delivery>, Worker) {
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let budget = Arc::new(Budget::new(limits));
        let rejects = Arc::new(Rejects::new(&Limits::default()));
        let (workers, deliveries) = Workers::new(settings, budget, rejects, TIMES);
        let worker = workers.register(|| {});
        (workers, deliveries, worker)
    }

    #[test]
    fn a_question_that_came_after_the_last_read_waits_for_the_next_turn() {
        let (workers, deliveries, mut worker) = worker();
        worker.line(b"a:1|c", SOURCE);
        let before = worker.question();
        let asked = workers.ask();
        worker.turn(before);
        assert!(deliveries.is_empty());
        worker.turn(worker.question());
        assert_eq!(deliveries.recv().unwrap().answers, asked);
        assert!(!worker.owes(worker.question()));
    }

    #[test]
    fn one_address_cannot_take_all_series_but_this_machine_can() {
        let (_workers, _deliveries, mut worker) = worker_within(&shard::Limits { series: 10, ..Default::default() });
        let mut send = |address: Option<&str>, name: &str, count: usize| {
            let address = address.map(|address| Address::Inet(address.parse().unwrap()));
            let source = Source { listener: Listener::Udp, address };
            (0..count).for_each(|n| worker.datagram(format!("{name}{n}:1|c").as_bytes(), source));
            worker.core.shard.take_refused()
        };
        assert_eq!(send(Some("192.0.2.1:1000"), "a", 7), [0, 0, 2]);
        assert_eq!(send(Some("[::ffff:192.0.2.1]:2000"), "b", 1), [0, 0, 1], "the same address");
        assert_eq!(send(Some("192.0.2.1:1000"), "a", 5), [0; 3], "those it has go on");
        assert_eq!(send(Some("[2001:db8::1]:1000"), "c", 1), [0; 3]);
        // `_overflow` is one of ten.
        assert_eq!(send(Some("127.0.0.1:1000"), "d", 2), [0; 3]);
        assert_eq!(send(None, "e", 2), [1, 0, 0]);
    }

    #[test]
    fn an_absolute_counter_counts_from_the_last_reading_of_its_host_whichever_worker_had_that() {
        let (workers, deliveries, first) = worker();
        let mut both = [first, workers.register(|| {})];
        let host =
            |port| Source { listener: Listener::Udp, address: Some(Address::Inet(([192, 0, 2, 1], port).into())) };
        for (turn, reading) in [100, 104, 110, 3].into_iter().enumerate() {
            both[turn % 2].datagram(format!("c:{reading}|C").as_bytes(), host(turn as u16));
        }
        both[0].datagram(br#"{"name":"c","type":"C","value":5,"timestamp":1}"#, host(9));
        workers.ask();
        for worker in &mut both {
            worker.turn(worker.question());
        }
        let mut cells = deliveries.try_iter().map(|delivery| delivery.sealed.cells);
        let sum: f64 = cells.by_ref().flat_map(|mut cells| cells.take()).map(|(_, cell)| increments(&cell)).sum();
        assert_eq!(sum, 4.0 + 6.0 + 3.0);
    }

    #[test]
    fn a_sample_goes_into_the_window_of_its_timestamp_if_that_is_kept() {
        let (workers, deliveries, mut worker) = worker();
        worker.core.now_ms = 1_764_000_005_500;
        let inside = [("1764000005", false), ("1764000000", false), ("1764000009", false), ("1764000009999", false)];
        let earlier = [("1763999999", true), ("1763999990", true), ("1763999990000", true)];
        let outside = [("1763999989", false), ("1764000010", false), ("1", false), ("18446744073709551615", false)];
        for (timestamp, _) in inside.into_iter().chain(earlier).chain(outside) {
            worker.line(format!("c:1|c|T{timestamp}").as_bytes(), SOURCE);
        }
        worker.line(b"g:3|g|T1764000004", SOURCE);
        worker.line(b"g:5|g|T1763999999", SOURCE);
        assert_eq!(worker.core.tally.unplaced, outside.len() as u64);
        workers.ask();
        worker.turn(worker.question());
        let mut cells = deliveries.recv().unwrap().sealed.cells;
        let counted = |cell: &Aggregate| match cell {
            Aggregate::Counter(_) => increments(cell),
            Aggregate::Gauge(gauge) => gauge.set.unwrap().1 as f64,
            Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_) => 0.0,
        };
        let mut found: Vec<_> =
            cells.drain_earlier().map(|(number, start, cell)| (number, start, counted(&cell))).collect();
        found.sort_by_key(|(number, ..)| *number);
        assert_eq!(found, [(0, 1_763_999_990_000, 3.0), (1, 1_763_999_990_000, 1_763_999_999_000.0)]);
        let found: Vec<_> = cells.take().into_iter().map(|(number, cell)| (number, counted(&cell))).collect();
        assert_eq!(found, [(0, 8.0), (1, 1_764_000_004_000.0)]);
    }
}
