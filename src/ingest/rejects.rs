//! The last rejected lines, for `GET /data/rejects` and the log.
//!
//! A rejected line costs its counter and, for the first few of a reason in a second, one lock and one log line; the rest
//! are counted as suppressed. Nothing waits for the lock: a worker that finds it taken counts the line as
//! suppressed and passes on.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::PoisonError;

use serde::{Deserialize, Serialize};

use super::Source;
use crate::protocol::{self, Reject};
use crate::sample::Reason;
use crate::telemetry;

/// The row of `[limits]` that bounds the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// How many lines of one reason are logged and kept in a second.
    pub reject_log: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { reject_log: 10 }
    }
}

/// A rejected line as a person reads it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejected {
    /// When, in milliseconds since the epoch.
    pub time: u64,
    /// Why.
    pub reason: Reason,
    /// The byte of the line, from 1, where that was seen.
    pub column: usize,
    /// The line with control and non-ASCII bytes escaped, cut after 256 bytes.
    pub line: String,
    /// What was probably meant.
    pub hint: Option<String>,
    /// By which listener it came.
    pub listener: &'static str,
    /// From which address or process.
    pub source: Option<String>,
}

/// How many rejected lines are kept.
const KEPT: usize = 100;

/// How many bytes of a line are kept.
pub(super) const LINE_KEPT: usize = 256;

/// The last rejected lines of an agent.
#[derive(Debug)]
pub struct Rejects {
    per_second: u32,
    state: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    lines: VecDeque<Rejected>,
    second: u64,
    noted: [u32; Reason::ALL.len()],
    suppressed: [u64; Reason::ALL.len()],
}

impl Rejects {
    /// None yet.
    pub fn new(limits: &Limits) -> Self {
        telemetry::REJECTS_SUPPRESSED.begin(Reason::ALL.map(|reason| [reason.name()]));
        let (noted, suppressed) = ([0; Reason::ALL.len()], [0; Reason::ALL.len()]);
        let state = Kept { lines: VecDeque::new(), second: 0, noted, suppressed };
        Self { per_second: limits.reject_log, state: Mutex::new(state) }
    }

    /// The lines kept, newest first.
    pub fn last(&self) -> Vec<Rejected> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lines.iter().rev().cloned().collect()
    }

    /// Keeps and logs a line, if there were not too many of its reason in this second.
    pub(super) fn note(&self, reject: &Reject<'_>, source: Source, now_ms: u64) {
        let Ok(mut state) = self.state.try_lock() else {
            telemetry::REJECTS_SUPPRESSED.counter(&[reject.reason.name()]).increment(1);
            return;
        };
        if state.second != now_ms / 1_000 {
            state.next_second(now_ms / 1_000);
        }
        let reason = reject.reason as usize;
        if state.noted[reason] >= self.per_second {
            state.suppressed[reason] += 1;
            return;
        }
        state.noted[reason] += 1;
        let rejected = describe(reject, source, now_ms);
        if state.lines.len() == KEPT {
            state.lines.pop_front();
        }
        state.lines.push_back(rejected.clone());
        drop(state);
        let from = rejected.source.as_deref().unwrap_or("-");
        tracing::warn!(
            reason = %rejected.reason, listener = rejected.listener, from, column = rejected.column, line = rejected.line,
            "line rejected"
        );
    }
}

impl Kept {
    fn next_second(&mut self, second: u64) {
        self.second = second;
        self.noted.fill(0);
        for reason in Reason::ALL {
            let count = std::mem::take(&mut self.suppressed[reason as usize]);
            if count > 0 {
                telemetry::REJECTS_SUPPRESSED.counter(&[reason.name()]).increment(count);
                tracing::warn!(reason = %reason, count, "more rejected lines were not logged");
            }
        }
    }
}

/// A rejected line as a person reads it.
pub(super) fn describe(reject: &Reject<'_>, source: Source, now_ms: u64) -> Rejected {
    let kept = &reject.bytes[..reject.bytes.len().min(LINE_KEPT)];
    Rejected {
        time: now_ms,
        reason: reject.reason,
        column: reject.column + 1,
        line: protocol::printable(kept),
        hint: protocol::hint(reject).map(|hint| hint.to_string()),
        listener: source.listener.name(),
        source: source.address.map(|address| address.to_string()),
    }
}
