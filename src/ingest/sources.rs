//! Who sends, and what becomes of it, for `GET /data/sources`.
//!
//! A source is a sender on one kind of listener: an IP address, whatever its port, or the process behind a unix socket.
//! A line costs nothing here. A worker's table is told with each datagram who sent it; what the tally counted
//! meanwhile is put down to a source when another one sends, or at a seal. The seal hands the figures over to the fold,
//! which adds them to those of all workers, [`Sources`], where readers find them.
//!
//! Limits: `sources`. What senders beyond it send is counted under `other` of its listener, and its lines in
//! `tallyd_sources_other_total`. A source keeps its place until a new one needs it and nothing came from it for
//! `limits.idle`; then its figures go to `other` (`tallyd_sources_forgotten_total`). So the figures of all sources
//! always add up to those of the listeners.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use serde::{Deserialize, Serialize};

use super::rejects::{self, LINE_KEPT, Rejected};
use super::tally::Tally;
use super::{Listener, Source};
use crate::protocol::Reject;
use crate::sample::Reason;
use crate::telemetry;
use crate::units::Time;

/// The row of `[limits]` that bounds sources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How many sources are told apart.
    pub sources: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sources: 4_096 }
    }
}

/// Where a sender is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// On a network.
    Inet(SocketAddr),
    /// Behind a unix socket: a process of this machine, as the kernel knows it.
    Process {
        /// The user it runs as.
        uid: u32,
        /// Its number; 0 where this process cannot see it, from within another namespace of processes.
        pid: u32,
    },
    /// In a log of records: whoever wrote one is not known there.
    Record {
        /// The partition.
        partition: i32,
        /// The record's place in it.
        offset: i64,
    },
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Inet(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Process { uid, pid } => write!(f, "pid {pid}, uid {uid}"),
            Self::Record { partition, offset } => write!(f, "partition {partition}, offset {offset}"),
        }
    }
}

/// Whose figures some are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    listener: Listener,
    sender: Sender,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Sender {
    Ip(IpAddr),
    Process {
        uid: u32,
        pid: u32,
    },
    Partition(i32),
    /// The way does not tell.
    Unknown,
    /// Those that are not told apart.
    Other,
}

impl Key {
    #[inline]
    fn of(source: &Source) -> Self {
        let sender = match source.address {
            Some(Address::Inet(address)) => Sender::Ip(address.ip().to_canonical()),
            Some(Address::Process { uid, pid }) => Sender::Process { uid, pid },
            Some(Address::Record { partition, .. }) => Sender::Partition(partition),
            None => Sender::Unknown,
        };
        Self { listener: source.listener, sender }
    }
}

/// What came from a source.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Datagrams, packets or lines of a unix stream, lines of a TCP stream, bodies of HTTP.
    messages: u64,
    /// Those of the datagrams that were longer than `limits.datagram`.
    truncated: u64,
    bytes: u64,
    lines: u64,
    created: u64,
    first_ms: u64,
    last_ms: u64,
    rejects: Option<Box<Rejects>>,
}

#[derive(Debug, Clone, Default)]
struct Rejects {
    lines: [u64; Reason::ALL.len()],
    last: Option<LastReject>,
}

/// What was rejected last, as it came: it is made readable for those who read it.
#[derive(Debug, Clone)]
struct LastReject {
    time_ms: u64,
    source: Source,
    reason: Reason,
    column: usize,
    bytes: Vec<u8>,
    is_whole: bool,
}

impl LastReject {
    fn describe(&self) -> Rejected {
        let reject = Reject { reason: self.reason, line: 1, column: self.column, bytes: &self.bytes };
        let described = rejects::describe(&reject, self.source, self.time_ms);
        // A guess at a part of a line would often be wrong.
        Rejected { hint: described.hint.filter(|_| self.is_whole), ..described }
    }
}

impl Figures {
    /// How many messages came.
    pub(super) fn messages(&self) -> u64 {
        self.messages
    }

    fn is_empty(&self) -> bool {
        self.messages == 0 && self.bytes == 0
    }

    #[inline]
    fn hear(&mut self, messages: u64, bytes: usize, now_ms: u64) {
        if self.is_empty() {
            self.first_ms = now_ms;
        }
        self.last_ms = now_ms;
        self.messages += messages;
        self.bytes += bytes as u64;
    }

    fn add(&mut self, more: Self) {
        self.first_ms = if self.is_empty() { more.first_ms } else { self.first_ms.min(more.first_ms) };
        self.last_ms = self.last_ms.max(more.last_ms);
        self.messages += more.messages;
        self.truncated += more.truncated;
        self.bytes += more.bytes;
        self.lines += more.lines;
        self.created += more.created;
        match (&mut self.rejects, more.rejects) {
            (Some(rejects), Some(more)) => rejects.add(*more),
            (rejects @ None, more) => *rejects = more,
            (Some(_), None) => {}
        }
    }
}

impl Rejects {
    fn add(&mut self, more: Self) {
        self.lines.iter_mut().zip(more.lines).for_each(|(sum, count)| *sum += count);
        let time_ms = |reject: &LastReject| reject.time_ms;
        if more.last.as_ref().map(time_ms) >= self.last.as_ref().map(time_ms) {
            self.last = more.last;
        }
    }
}

/// What of a listener's tally has been put down to its sources.
#[derive(Debug, Default)]
struct Settled {
    lines: u64,
    lines_accepted: u64,
    lines_rejected: [u64; Reason::ALL.len()],
}

/// The sources that one worker hears, and what came from them since the last seal.
#[derive(Debug)]
pub(super) struct Table {
    /// Who sends what is being read, and what came from there since somebody else did.
    current: Key,
    open: Figures,
    settled: [Settled; Listener::ALL.len()],
    created: u64,
    rows: HashMap<Key, Figures, RandomState>,
    other: [Figures; Listener::ALL.len()],
    max: usize,
}

impl Table {
    /// A table of at most `max` sources.
    pub(super) fn new(max: usize) -> Self {
        Self {
            current: Key { listener: Listener::Udp, sender: Sender::Unknown },
            open: Figures::default(),
            settled: Default::default(),
            created: 0,
            rows: HashMap::default(),
            other: Default::default(),
            max,
        }
    }

    /// So much comes from a source. All that is counted until the next call is its doing.
    #[inline]
    pub(super) fn hear(&mut self, source: &Source, coming: Coming, tally: &Tally, created: u64, now_ms: u64) {
        let key = Key::of(source);
        if key != self.current {
            self.settle(tally, created);
            self.current = key;
        }
        self.open.hear(coming.messages, coming.bytes, now_ms);
        self.open.truncated += u64::from(coming.is_truncated);
    }

    /// Remembers what was rejected last.
    pub(super) fn reject(&mut self, reject: &Reject<'_>, source: Source, time_ms: u64) {
        let kept = &reject.bytes[..reject.bytes.len().min(LINE_KEPT)];
        let rejects = self.open.rejects.get_or_insert_default();
        let mut bytes = rejects.last.take().map(|last| last.bytes).unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(kept);
        let (reason, column, is_whole) = (reject.reason, reject.column, kept.len() == reject.bytes.len());
        rejects.last = Some(LastReject { time_ms, source, reason, column, bytes, is_whole });
    }

    /// Hands over what came since the last seal. The tally is to begin at zero again.
    pub(super) fn take(&mut self, tally: &Tally, created: u64) -> Vec<(Key, Figures)> {
        self.settle(tally, created);
        self.settled = Default::default();
        let mut heard = Vec::new();
        let mut take = |key, figures: &mut Figures| {
            let has_sent = !figures.is_empty();
            if has_sent {
                heard.push((key, std::mem::take(figures)));
            }
            has_sent
        };
        // A full table keeps the places of those that send all the time: a flood of senders does not get them.
        let is_full = self.rows.len() >= self.max;
        self.rows.retain(|key, figures| take(*key, figures) || !is_full);
        for (listener, figures) in Listener::ALL.into_iter().zip(&mut self.other) {
            take(Key { listener, sender: Sender::Other }, figures);
        }
        heard
    }

    /// Puts down to the current source what was counted since the last call.
    fn settle(&mut self, tally: &Tally, created: u64) {
        let tally = tally.by(self.current.listener);
        let settled = &mut self.settled[self.current.listener as usize];
        let mut figures = std::mem::take(&mut self.open);
        figures.lines = tally.lines - std::mem::replace(&mut settled.lines, tally.lines);
        figures.created = created - std::mem::replace(&mut self.created, created);
        let accepted = std::mem::replace(&mut settled.lines_accepted, tally.lines_accepted);
        if figures.lines > tally.lines_accepted - accepted {
            let rejects = figures.rejects.get_or_insert_default();
            let counts = tally.lines_rejected.iter().zip(&mut settled.lines_rejected);
            for (sum, (count, before)) in rejects.lines.iter_mut().zip(counts) {
                *sum += count - std::mem::replace(before, *count);
            }
        }
        if !figures.is_empty() {
            self.row(self.current).add(figures);
        }
    }

    fn row(&mut self, key: Key) -> &mut Figures {
        let is_full = self.rows.len() >= self.max;
        match self.rows.entry(key) {
            Entry::Occupied(row) => row.into_mut(),
            Entry::Vacant(place) if !is_full => place.insert(Figures::default()),
            Entry::Vacant(_) => &mut self.other[key.listener as usize],
        }
    }
}

/// What a worker is given to read.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Coming {
    pub(super) messages: u64,
    pub(super) bytes: usize,
    /// It is dropped unread.
    pub(super) is_truncated: bool,
}

/// The sources of an agent since it started.
#[derive(Debug)]
pub struct Sources {
    max: usize,
    idle_ms: u64,
    told_apart: Mutex<ToldApart>,
}

#[derive(Debug, Default)]
struct ToldApart {
    rows: HashMap<Key, Figures, RandomState>,
    other: [Figures; Listener::ALL.len()],
    /// From none of them something came last before this.
    oldest_ms: u64,
}

impl Default for Sources {
    fn default() -> Self {
        Self::new(&Limits::default(), Time::secs(3_600))
    }
}

impl Sources {
    /// None yet. One from which nothing came for the time `idle` may give its place to a new one.
    pub fn new(limits: &Limits, idle: Time) -> Self {
        Self { max: limits.sources, idle_ms: idle.as_millis(), told_apart: Mutex::default() }
    }

    /// How many are told apart.
    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// Adds what a seal handed over.
    pub fn add(&self, heard: Vec<(Key, Figures)>) {
        let mut told_apart = self.told_apart.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut other, mut forgotten) = (0, 0);
        for (key, figures) in heard {
            if told_apart.has_place(key, figures.last_ms, self, &mut forgotten) {
                told_apart.oldest_ms = told_apart.oldest_ms.min(figures.last_ms);
                told_apart.rows.entry(key).or_default().add(figures);
            } else {
                other += figures.lines;
                told_apart.other[key.listener as usize].add(figures);
            }
        }
        drop(told_apart);
        telemetry::SOURCES_OTHER.take(&[], &mut other);
        telemetry::SOURCES_FORGOTTEN.take(&[], &mut forgotten);
    }

    /// The sources of most lines, at most so many, and how many there are in all.
    pub fn most(&self, limit: usize) -> (Vec<Heard>, usize) {
        let told_apart = self.told_apart.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<(Key, &Figures)> = told_apart.rows.iter().map(|(key, figures)| (*key, figures)).collect();
        let other = Listener::ALL.into_iter().zip(&told_apart.other).filter(|(_, figures)| !figures.is_empty());
        all.extend(other.map(|(listener, figures)| (Key { listener, sender: Sender::Other }, figures)));
        all.sort_unstable_by(|(a, of_a), (b, of_b)| of_b.lines.cmp(&of_a.lines).then(a.cmp(b)));
        let total = all.len();
        let most: Vec<_> = all.into_iter().take(limit).map(|(key, figures)| (key, figures.clone())).collect();
        drop(told_apart);
        (most.into_iter().map(|(key, figures)| Heard::new(key, &figures)).collect(), total)
    }
}

impl ToldApart {
    /// Whether a source has a place, or gets one at this time.
    fn has_place(&mut self, key: Key, now_ms: u64, sources: &Sources, forgotten: &mut u64) -> bool {
        if key.sender == Sender::Other {
            return false;
        }
        if !self.rows.contains_key(&key) && self.rows.len() >= sources.max {
            *forgotten += self.forget(now_ms, sources.idle_ms);
        }
        self.rows.contains_key(&key) || self.rows.len() < sources.max
    }

    /// Frees the places of all that are idle, and says how many those were. It looks for them only if there may be one.
    fn forget(&mut self, now_ms: u64, idle_ms: u64) -> u64 {
        let is_idle = |last_ms: u64| now_ms.saturating_sub(last_ms) >= idle_ms;
        if !is_idle(self.oldest_ms) {
            return 0;
        }
        let (before, other) = (self.rows.len(), &mut self.other);
        self.oldest_ms = u64::MAX;
        self.rows.retain(|key, figures| {
            let stays = !is_idle(figures.last_ms);
            if stays {
                self.oldest_ms = self.oldest_ms.min(figures.last_ms);
            } else {
                other[key.listener as usize].add(std::mem::take(figures));
            }
            stays
        });
        (before - self.rows.len()) as u64
    }
}

/// What came from a source, as a person reads it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Heard {
    /// By which listener it came.
    pub listener: &'static str,
    /// An IP address or a process; `other` for all that are not told apart; none where the way does not tell.
    pub source: Option<String>,
    /// The user of a process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Its number; 0 in another namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When something came first, in milliseconds since the epoch.
    pub first_seen: u64,
    /// And last.
    pub last_seen: u64,
    /// Datagrams, packets or lines of unix streams, lines of TCP streams, HTTP bodies.
    pub messages: u64,
    /// Datagrams that were dropped because they are too long.
    pub truncated: u64,
    /// Bytes read, of HTTP bodies as sent.
    pub bytes: u64,
    /// Lines and JSON records.
    pub lines: u64,
    /// Those of which nothing was accepted.
    pub rejected: u64,
    /// The same by reason.
    pub reasons: BTreeMap<&'static str, u64>,
    /// Series that were new when it sent them.
    pub series_created: u64,
    /// What was rejected last, be it a part of a line.
    pub last_reject: Option<Rejected>,
}

impl Heard {
    fn new(key: Key, figures: &Figures) -> Self {
        let (uid, pid) = match key.sender {
            Sender::Process { uid, pid } => (Some(uid), Some(pid)),
            Sender::Ip(_) | Sender::Partition(_) | Sender::Unknown | Sender::Other => (None, None),
        };
        let source = match key.sender {
            Sender::Ip(ip) => Some(ip.to_string()),
            Sender::Process { uid, pid } => Some(Address::Process { uid, pid }.to_string()),
            Sender::Partition(partition) => Some(format!("partition {partition}")),
            Sender::Unknown => None,
            Sender::Other => Some("other".to_owned()),
        };
        let counts =
            figures.rejects.iter().flat_map(|rejects| Reason::ALL.map(Reason::name).into_iter().zip(rejects.lines));
        let reasons: BTreeMap<_, _> = counts.filter(|(_, count)| *count > 0).collect();
        Self {
            listener: key.listener.name(),
            source,
            uid,
            pid,
            first_seen: figures.first_ms,
            last_seen: figures.last_ms,
            messages: figures.messages,
            truncated: figures.truncated,
            bytes: figures.bytes,
            lines: figures.lines,
            rejected: reasons.values().sum(),
            reasons,
            series_created: figures.created,
            last_reject: figures.rejects.iter().find_map(|rejects| rejects.last.as_ref()).map(LastReject::describe),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::aggregate::shard::{self, Budget};
    use crate::ingest::{self, Delivery, Returned, Settings, Times, Worker, Workers};
    use crate::protocol;
    use crate::sync::Receiver;

    /// Workers whose seals are added up as the fold does it, and what their tallies counted.
    struct Agent {
        workers: Arc<Workers>,
        deliveries: Receiver<Delivery>,
        each: Vec<Worker>,
        counted: HashMap<Listener, Counted>,
    }

    #[derive(Debug, Default, PartialEq)]
    struct Counted {
        lines: u64,
        rejected: u64,
        created: u64,
    }

    impl Agent {
        fn new(sources: usize, idle_ms: u64) -> Self {
            let sources = Sources::new(&Limits { sources }, Time::millis(idle_ms));
            let settings =
                Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
            let budget = Arc::new(Budget::new(&shard::Limits::default()));
            let rejects = Arc::new(ingest::Rejects::new(&ingest::Limits::default()));
            // Seals come only when they are asked for.
            let times = Times { interval_ms: 86_400_000, window_ms: 10_000 };
            let (workers, deliveries) = Workers::telling_apart(sources, settings, budget, rejects, times);
            let each = vec![workers.register(|| {}), workers.register(|| {})];
            Self { workers, deliveries, each, counted: HashMap::new() }
        }

        fn send(&mut self, worker: usize, at_ms: u64, datagram: &[u8], source: Source) {
            let worker = &mut self.each[worker];
            worker.core.now_ms = at_ms;
            let created = worker.core.shard.created();
            worker.datagram(datagram, source);
            self.counted.entry(source.listener).or_default().created += worker.core.shard.created() - created;
        }

        fn seal(&mut self) {
            self.workers.ask();
            for worker in &mut self.each {
                for listener in Listener::ALL {
                    let tally = worker.core.tally.by(listener);
                    let counted = self.counted.entry(listener).or_default();
                    counted.lines += tally.lines;
                    counted.rejected += tally.lines_rejected.iter().sum::<u64>();
                }
                worker.turn(worker.question());
            }
            for mut delivery in self.deliveries.try_iter() {
                delivery.sealed.cells.take();
                self.workers.give_back(delivery.worker, Returned::Cells(delivery.sealed.cells));
                self.workers.sources().add(delivery.sources);
            }
        }

        /// All sources by listener and name.
        fn heard(&mut self) -> HashMap<(&'static str, String), Heard> {
            self.seal();
            let (heard, total) = self.workers.sources().most(usize::MAX);
            assert!(heard.is_sorted_by(|a, b| a.lines >= b.lines) && heard.len() == total);
            let named = |heard: Heard| ((heard.listener, heard.source.clone().unwrap_or_default()), heard);
            heard.into_iter().map(named).collect()
        }

        fn messages(&mut self, source: &str) -> u64 {
            self.heard().get(&("udp", source.to_owned())).map_or(0, |heard| heard.messages)
        }
    }

    fn udp(host: u8) -> Source {
        Source { listener: Listener::Udp, address: Some(Address::Inet(([192, 0, 2, host], 9).into())) }
    }

    #[test]
    fn a_host_is_one_source_whatever_its_port_and_the_family_of_our_socket() {
        let key = |address: &str| {
            Key::of(&Source { listener: Listener::Udp, address: Some(Address::Inet(address.parse().unwrap())) })
        };
        assert_eq!(key("192.0.2.1:1"), key("192.0.2.1:2"));
        assert_eq!(key("192.0.2.1:1"), key("[::ffff:192.0.2.1]:1"));
        assert_ne!(key("192.0.2.1:1"), key("192.0.2.2:1"));
        assert_ne!(key("192.0.2.1:1"), Key { listener: Listener::Tcp, ..key("192.0.2.1:1") });
    }

    #[test]
    fn what_comes_by_turns_is_put_down_to_each_sender() {
        let mut agent = Agent::new(10, 1_000);
        for (at_ms, host, datagram) in [
            (10, 1, "a:1|c\nb:1|c"),
            (20, 2, "bad\nworse:1|zz\nc:1|c"),
            (30, 1, "a:1|c\nbad"),
            (40, 2, ""),
            (50, 2, "c:1|c:x|c"),
        ] {
            agent.send(0, at_ms, datagram.as_bytes(), udp(host));
            if at_ms == 30 {
                // What one sends before a seal and after it is added.
                agent.seal();
            }
        }
        let heard = agent.heard();
        let [one, two] = ["192.0.2.1", "192.0.2.2"].map(|name| &heard[&("udp", name.to_owned())]);
        assert_eq!((one.messages, one.bytes, one.lines, one.rejected, one.series_created), (2, 20, 4, 1, 2));
        assert_eq!((one.first_seen, one.last_seen, &one.reasons), (10, 30, &BTreeMap::from([("no_value", 1)])));
        assert_eq!((two.messages, two.bytes, two.lines, two.rejected, two.series_created), (3, 29, 4, 2, 1));
        assert_eq!((two.first_seen, two.last_seen), (20, 50));
        assert_eq!(two.reasons, BTreeMap::from([("no_value", 1), ("unknown_type", 1)]));
        let last = two.last_reject.as_ref().unwrap();
        assert_eq!((last.time, last.reason, last.line.as_str()), (50, Reason::BadValue, "c:1|c:x|c"));
        assert_eq!(last.source.as_deref(), Some("192.0.2.2:9"), "with its port");
    }

    #[test]
    fn of_a_long_line_the_beginning_is_kept_and_no_guess_is_made_at_it() {
        let mut agent = Agent::new(10, 1_000);
        let long = format!("a:1,5|g|#{}", "x".repeat(300));
        for (line, hint) in [("a:1,5|g", true), (long.as_str(), false)] {
            agent.send(0, 1, line.as_bytes(), udp(1));
            let last = agent.heard()[&("udp", "192.0.2.1".to_owned())].last_reject.clone().unwrap();
            assert_eq!((last.line.as_str(), last.hint.is_some()), (&line[..line.len().min(LINE_KEPT)], hint));
        }
    }

    #[test]
    fn a_flood_of_senders_takes_no_place_from_those_that_are_told_apart() {
        let mut agent = Agent::new(3, 60_000);
        for second in 0..5 {
            for host in 1..=200 {
                agent.send(0, second * 1_000 + 1, b"a:1|c", udp(host));
            }
            agent.send(0, second * 1_000 + 2, b"a:1|c", udp(2));
            agent.seal();
        }
        assert_eq!(agent.each[0].core.sources.rows.len(), 3);
        assert_eq!(["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|name| agent.messages(name)), [5, 10, 5]);
        assert_eq!((agent.messages("other"), agent.heard().len()), (5 * 197, 4));
        // Nor does one at another worker.
        agent.send(1, 6_000, b"a:1|c", udp(4));
        agent.send(1, 6_000, b"a:1|c", udp(3));
        assert_eq!((agent.messages("192.0.2.3"), agent.messages("192.0.2.4")), (6, 0));
    }

    #[test]
    fn an_idle_source_keeps_its_place_until_somebody_needs_it() {
        let mut agent = Agent::new(2, 1_000);
        agent.send(0, 1_000, b"a:1|c\nbad", udp(1));
        agent.send(0, 1_500, b"a:1|c", udp(2));
        assert_eq!(agent.messages("192.0.2.1"), 1);
        agent.send(0, 1_999, b"a:1|c", udp(3));
        assert_eq!((agent.messages("192.0.2.1"), agent.messages("192.0.2.3"), agent.messages("other")), (1, 0, 1));
        agent.send(0, 2_000, b"a:1|c", udp(3));
        assert_eq!((agent.messages("192.0.2.1"), agent.messages("192.0.2.3"), agent.messages("other")), (0, 1, 2));
        assert_eq!(agent.heard()[&("udp", "other".to_owned())].rejected, 1);
        agent.send(1, 2_499, b"a:1|c", udp(4));
        assert_eq!(agent.messages("192.0.2.4"), 0);
        agent.send(1, 2_500, b"a:1|c", udp(4));
        assert_eq!((agent.messages("192.0.2.4"), agent.messages("192.0.2.2"), agent.messages("192.0.2.3")), (1, 0, 1));
    }

    #[test]
    fn none_are_told_apart_where_there_is_no_place() {
        let mut agent = Agent::new(0, 0);
        agent.send(0, 1, b"a:1|c", udp(1));
        agent.send(0, 2, b"a:1|c", udp(2));
        assert_eq!((agent.messages("other"), agent.heard().len()), (2, 1));
    }

    /// One thing that happens: a datagram of so many good and bad lines comes to a worker, or all workers seal.
    #[derive(Debug, Clone)]
    enum Step {
        Datagram { worker: usize, listener: usize, host: u8, good: u64, bad: u64 },
        Seal,
    }

    fn step() -> impl Strategy<Value = Step> {
        let datagram = (0..2_usize, 0..Listener::ALL.len(), 1..6_u8, 0..4_u64, 0..3_u64);
        prop_oneof![
            8 => datagram
                .prop_map(|(worker, listener, host, good, bad)| Step::Datagram { worker, listener, host, good, bad }),
            1 => Just(Step::Seal),
        ]
    }

    proptest! {
        #[test]
        fn the_figures_of_all_sources_are_those_of_their_listeners(
            steps in prop::collection::vec(step(), 0..60), max in 0..12_usize, idle_ms in 0..30_u64,
        ) {
            let mut agent = Agent::new(max, idle_ms);
            let mut sent: HashMap<(&str, String), (u64, u64, u64)> = HashMap::new();
            for (at_ms, step) in steps.into_iter().enumerate() {
                let Step::Datagram { worker, listener, host, good, bad } = step else {
                    agent.seal();
                    continue;
                };
                let source = Source { listener: Listener::ALL[listener], ..udp(host) };
                let line = |rest: &str, n: u64| format!("{host}{n}{rest}\n");
                let lines = |rest: &str, count: u64| (0..count).map(|n| line(rest, n)).collect::<String>();
                let datagram = lines(":1|c", good) + &lines("", bad);
                agent.send(worker, at_ms as u64, datagram.as_bytes(), source);
                let sent = sent.entry((source.listener.name(), format!("192.0.2.{host}"))).or_default();
                *sent = (sent.0 + 1, sent.1 + good + bad, sent.2 + bad);
            }
            let heard = agent.heard();
            prop_assert!(heard.keys().filter(|(_, source)| source != "other").count() <= max);
            for listener in Listener::ALL {
                let of = || heard.values().filter(|heard| heard.listener == listener.name());
                let sum = |figure: fn(&Heard) -> u64| of().map(figure).sum::<u64>();
                let (lines, rejected) = (sum(|heard| heard.lines), sum(|heard| heard.rejected));
                let found = Counted { lines, rejected, created: sum(|heard| heard.series_created) };
                prop_assert_eq!(&found, &agent.counted[&listener]);
                prop_assert_eq!(rejected, of().flat_map(|heard| heard.reasons.values()).sum::<u64>());
            }
            if max >= sent.len() {
                let found = |heard: Heard| (heard.messages, heard.lines, heard.rejected);
                let found: HashMap<_, _> = heard.into_iter().map(|(name, heard)| (name, found(heard))).collect();
                prop_assert_eq!(found, sent);
            }
        }
    }
}
