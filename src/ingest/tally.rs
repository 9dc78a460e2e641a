//! What became of lines and samples, counted by the worker alone and published at its seals.

use metrics::Counter;

use super::Listener;
use crate::aggregate::shard::Refusal;
use crate::sample::Reason;
use crate::telemetry;

/// What came by one listener since the last publication.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ListenerTally {
    pub(super) lines: u64,
    pub(super) lines_accepted: u64,
    pub(super) lines_rejected: [u64; Reason::ALL.len()],
    pub(super) samples: u64,
    pub(super) samples_dropped: u64,
    pub(super) samples_rejected: [u64; Reason::ALL.len()],
    pub(super) events: u64,
    pub(super) checks: u64,
}

/// What came to one worker since the last publication.
#[derive(Debug, Default)]
pub(super) struct Tally {
    by_listener: [ListenerTally; Listener::ALL.len()],
    pub(super) bad_tags: u64,
    refused: [u64; Refusal::ALL.len()],
    pub(super) unplaced: u64,
    pub(super) evicted: u64,
}

/// Lets the counters of a listener that starts stand at 0.
pub fn begin(listener: Listener) {
    for metric in [
        telemetry::LINES,
        telemetry::LINES_ACCEPTED,
        telemetry::SAMPLES,
        telemetry::SAMPLES_DROPPED,
        telemetry::EVENTS,
        telemetry::SERVICE_CHECKS,
    ] {
        metric.begin([[listener.name()]]);
    }
    for metric in [telemetry::LINES_REJECTED, telemetry::SAMPLES_REJECTED] {
        metric.begin(Reason::ALL.map(|reason| [listener.name(), reason.name()]));
    }
    telemetry::SERIES_REFUSED.begin(Refusal::ALL.map(|refusal| [refusal.name()]));
    telemetry::TIMESTAMPS_UNPLACED.begin([[]]);
    telemetry::BASELINES_EVICTED.begin([[]]);
}

impl Tally {
    /// The counts of a listener.
    #[inline]
    pub(super) fn of(&mut self, listener: Listener) -> &mut ListenerTally {
        &mut self.by_listener[listener as usize]
    }

    /// The same, to look at.
    pub(super) fn by(&self, listener: Listener) -> &ListenerTally {
        &self.by_listener[listener as usize]
    }

    /// The samples accepted since the last publication.
    pub(super) fn samples(&self) -> u64 {
        self.by_listener.iter().map(|tally| tally.samples).sum()
    }

    /// The lines since the last publication.
    pub(super) fn lines(&self) -> u64 {
        self.by_listener.iter().map(|tally| tally.lines).sum()
    }

    /// The samples rejected since the last publication.
    pub(super) fn rejected(&self) -> u64 {
        self.by_listener.iter().flat_map(|tally| tally.samples_rejected).sum()
    }

    /// Adds the counts to the exported metrics and starts again from zero.
    pub(super) fn publish(&mut self) {
        for listener in Listener::ALL {
            let tally = &mut self.by_listener[listener as usize];
            if tally.lines > 0 {
                publish_listener(listener.name(), &std::mem::take(tally));
            }
        }
        add(&mut self.bad_tags, || telemetry::TAGS_REJECTED.counter(&[]));
        add(&mut self.evicted, || telemetry::BASELINES_EVICTED.counter(&[]));
        add(&mut self.unplaced, || telemetry::TIMESTAMPS_UNPLACED.counter(&[]));
        for refusal in Refusal::ALL {
            add(&mut self.refused[refusal as usize], || telemetry::SERIES_REFUSED.counter(&[refusal.name()]));
        }
    }

    /// Counts samples of new identities that went to `_overflow`.
    pub(super) fn refuse(&mut self, refused: [u64; Refusal::ALL.len()]) {
        self.refused.iter_mut().zip(refused).for_each(|(sum, count)| *sum += count);
    }
}

fn publish_listener(listener: &str, tally: &ListenerTally) {
    add(&mut tally.lines.clone(), || telemetry::LINES.counter(&[listener]));
    add(&mut tally.lines_accepted.clone(), || telemetry::LINES_ACCEPTED.counter(&[listener]));
    add(&mut tally.samples.clone(), || telemetry::SAMPLES.counter(&[listener]));
    add(&mut tally.events.clone(), || telemetry::EVENTS.counter(&[listener]));
    add(&mut tally.checks.clone(), || telemetry::SERVICE_CHECKS.counter(&[listener]));
    add(&mut tally.samples_dropped.clone(), || telemetry::SAMPLES_DROPPED.counter(&[listener]));
    for reason in Reason::ALL {
        let labels = [listener, reason.name()];
        add(&mut tally.lines_rejected[reason as usize].clone(), || telemetry::LINES_REJECTED.counter(&labels));
        add(&mut tally.samples_rejected[reason as usize].clone(), || telemetry::SAMPLES_REJECTED.counter(&labels));
    }
}

/// Moves a count into a metric, which is looked up only when there is something to count.
fn add(count: &mut u64, metric: impl FnOnce() -> Counter) {
    let count = std::mem::take(count);
    if count > 0 {
        metric().increment(count);
    }
}
