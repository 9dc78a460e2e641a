//! What the agent says of itself while it runs, looked at once a second: which part stands still, a line of status, and the
//! sign of life that systemd's watchdog waits for. It is given only while every part makes progress.
//!
//! Metrics: `tallyd_stalled_seconds`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use crate::config::Kind;
use crate::heartbeat::{Board, STALLED};
use crate::http::Health;
use crate::ingest::Workers;
use crate::store::journal::Sizes;
use crate::systemd;
use crate::telemetry;
use crate::view::View;

/// How often the line of status is told when nothing happens.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// So long a part may go without a beat for no reason: a second is its own pace, the rest the system's.
const PACE: Duration = Duration::from_secs(3);

/// Why the last reload was refused, if it was.
#[derive(Debug, Default)]
pub(super) struct Refused(ArcSwapOption<String>);

impl Refused {
    /// Takes note of a reload, and tells that it is over.
    pub(super) fn note<T>(&self, outcome: &Result<T, Vec<String>>) {
        let wrong = outcome.as_ref().err().map(|problems| problems.join("; "));
        let status = match &wrong {
            None => "the configuration was read again".to_owned(),
            Some(problems) => format!("reload refused: {problems}"),
        };
        self.0.store(wrong.map(Arc::new));
        systemd::ready(&status);
    }
}

/// Looks after an agent.
pub(super) struct Lookout {
    workers: Arc<Workers>,
    view: View,
    health: Arc<Health>,
    store: Kind,
    refused: Arc<Refused>,
    /// The parts whose stall was logged.
    stalled: BTreeSet<String>,
    fed: Option<Fed>,
    told: Told,
}

/// What was told last.
struct Told {
    at: Instant,
    samples: u64,
    unready: Unready,
}

/// Why the agent is not ready, and which parts stand still.
type Unready = (Vec<String>, BTreeSet<String>);

impl Lookout {
    pub(super) fn new(
        workers: Arc<Workers>,
        view: View,
        health: Arc<Health>,
        store: Kind,
        refused: Arc<Refused>,
    ) -> Self {
        let now = Instant::now();
        let told = Told { at: now, samples: workers.samples(), unready: Unready::default() };
        let fed = systemd::watchdog().map(|within| Fed { within, at: now });
        Self { workers, view, health, store, refused, stalled: BTreeSet::new(), fed, told }
    }

    /// Says that the agent is ready to take what comes.
    pub(super) fn begin(&mut self) {
        systemd::ready(&self.line(Instant::now()));
    }

    /// To be called about once a second.
    pub(super) fn look(&mut self, now: Instant) {
        self.note_stalled(now);
        if self.fed.as_mut().is_some_and(|fed| fed.is_due(self.workers.beats(), now)) {
            systemd::alive();
        }
        if systemd::is_there() && (now - self.told.at >= TELL_EVERY || self.unready() != self.told.unready) {
            systemd::status(&self.line(now));
        }
    }

    /// Logs a part that stalls once, and again when it goes on.
    fn note_stalled(&mut self, now: Instant) {
        for still in self.workers.beats().look(now) {
            let is_stalled = still.time >= STALLED;
            let seconds = if is_stalled { still.time.as_secs_f64() } else { 0.0 };
            telemetry::STALLED_SECONDS.gauge(&[&still.part]).set(seconds);
            if is_stalled && self.stalled.insert(still.part.clone()) {
                let watchdog = self.fed.as_ref().map_or("there is no watchdog", |_| "the watchdog is not fed");
                tracing::error!(part = still.part, seconds = still.time.as_secs(), watchdog, "a part stands still");
            } else if !is_stalled && self.stalled.remove(&still.part) {
                tracing::info!(part = still.part, "a part that stood still goes on");
            }
        }
    }

    fn unready(&self) -> Unready {
        (self.health.reasons().chain(self.view.unready()).collect(), self.stalled.clone())
    }

    /// The line of status as of now.
    fn line(&mut self, now: Instant) -> String {
        let samples = self.workers.samples();
        let seconds = (now - self.told.at).as_secs_f64();
        let rate = if seconds > 0.0 { (samples - self.told.samples) as f64 / seconds } else { 0.0 };
        self.told = Told { at: now, samples, unready: self.unready() };
        let (mut reasons, _) = self.told.unready.clone();
        reasons.extend(self.workers.beats().stalled(now).iter().map(ToString::to_string));
        let figures =
            Figures { rate, series: self.view.ledger().len(), store: self.store, journal: self.view.journal() };
        let refused = self.refused.0.load();
        figures.line(&reasons, refused.as_ref().map(|error| error.as_str()))
    }
}

/// When the watchdog was last given its sign.
struct Fed {
    /// How long it waits for one.
    within: Duration,
    at: Instant,
}

impl Fed {
    /// Whether a sign is due and deserved: every part has moved since the last one.
    fn is_due(&mut self, beats: &Board, now: Instant) -> bool {
        let since = now - self.at;
        let is_due = since >= self.within / 4 && beats.look(now).iter().all(|still| still.time <= since.max(PACE));
        if is_due {
            self.at = now;
        }
        is_due
    }
}

/// What the line of status tells.
struct Figures {
    rate: f64,
    series: usize,
    store: Kind,
    journal: Option<Sizes>,
}

impl Figures {
    fn line(&self, reasons: &[String], refused: Option<&str>) -> String {
        let standing =
            if reasons.is_empty() { "ready".to_owned() } else { format!("not ready: {}", reasons.join("; ")) };
        let refused = refused.map_or_else(String::new, |error| format!("; the last reload was refused: {error}"));
        let Self { rate, series, .. } = self;
        format!("{standing}; {rate:.0} samples/s, {series} series, {}{refused}", self.kept())
    }

    /// Where figures are kept, and how that is doing.
    fn kept(&self) -> String {
        let sizes = self.journal.unwrap_or_default();
        let journal = format!("journal {:.1} MiB", sizes.file as f64 / f64::from(1 << 20));
        match self.store {
            Kind::Memory => "in memory alone".to_owned(),
            Kind::Embedded => journal,
            Kind::Redis => format!("{journal}, {} batches to send", sizes.unacknowledged),
            #[cfg(feature = "kafka")]
            Kind::Kafka => format!("{journal}, store kafka"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_wrong_first() {
        let journal = Some(Sizes { file: 3 << 19, unacknowledged: 7, ..Sizes::default() });
        let figures = Figures { rate: 99_999.6, series: 12, store: Kind::Redis, journal };
        let line = figures.line(&[], None);
        assert_eq!(line, "ready; 100000 samples/s, 12 series, journal 1.5 MiB, 7 batches to send");
        let reasons = ["store: away".to_owned(), "stalled: udp-0".to_owned()];
        let line = Figures { store: Kind::Memory, ..figures }.line(&reasons, Some("flush.window: no"));
        let expected = "not ready: store: away; stalled: udp-0; 100000 samples/s, 12 series, in memory alone; \
                        the last reload was refused: flush.window: no";
        assert_eq!(line, expected);
    }

    #[test]
    fn the_watchdog_is_fed_only_while_every_part_moves() {
        let board = Arc::new(Board::default());
        let (udp, fold) = (board.begin("udp-0"), board.begin("fold"));
        let start = Instant::now();
        let mut fed = Fed { within: Duration::from_secs(40), at: start };
        let mut is_due = |second| fed.is_due(&board, start + Duration::from_secs(second));
        let mut at = |second, moves: &[&crate::heartbeat::Beat]| {
            moves.iter().for_each(|part| part.beat());
            is_due(second)
        };
        assert_eq!([at(1, &[&udp, &fold]), at(10, &[&udp, &fold])], [false, true]);
        assert!(at(20, &[&udp, &fold]));
        // `fold` stands still from 20 s on.
        let later: Vec<u64> = (21..=80).filter(|second| at(*second, &[&udp])).collect();
        assert_eq!(later, [30]);
        assert!(at(81, &[&udp, &fold]));
    }
}
