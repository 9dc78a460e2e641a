//! The last events and service checks, for `GET /data/events` and `GET /data/checks`. They go nowhere else: they are
//! notes of people and programs, not readings, and what is kept of them ends with the process.
//!
//! One lock is taken for each of them; lines of samples never come here.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::Source;
use crate::protocol::{self, Event, ServiceCheck};

/// How many events are kept, and how many checks.
const KEPT: usize = 100;

/// The last events and checks of an agent.
#[derive(Debug, Default)]
pub struct Events {
    events: Mutex<VecDeque<Received<KeptEvent>>>,
    checks: Mutex<VecDeque<Received<KeptCheck>>>,
}

/// What came, when and from whom.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Received<T> {
    /// When, in milliseconds since the epoch.
    pub time: u64,
    /// By which listener it came.
    pub listener: &'static str,
    /// From which address or process.
    pub source: Option<String>,
    /// What came.
    #[serde(flatten)]
    pub what: T,
}

/// An event, with the names that its fields have in `explain` and in Datadog's API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeptEvent {
    /// What happened, in a few words.
    pub title: String,
    /// What happened, at length.
    pub text: String,
    /// `normal` or `low`.
    pub priority: &'static str,
    /// `info`, `success`, `warning` or `error`.
    pub alert_type: &'static str,
    /// As sent: seconds since the epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// Where it happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Events of one kind share it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregation_key: Option<String>,
    /// What reported it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_type: Option<String>,
    /// Sorted, `key:value` or bare.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// Of the sender.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
}

/// A service check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeptCheck {
    /// Of the check.
    pub name: String,
    /// 0 ok, 1 warning, 2 critical, 3 unknown.
    pub status: u8,
    /// As sent: seconds since the epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// Where it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Sorted, `key:value` or bare.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// What it has to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Of the sender.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
}

impl From<&Event<'_>> for KeptEvent {
    fn from(event: &Event<'_>) -> Self {
        Self {
            title: event.title.to_string(),
            text: event.text.to_string(),
            priority: event.priority.name(),
            alert_type: event.severity.name(),
            timestamp: event.timestamp,
            host: event.host.map(str::to_owned),
            aggregation_key: event.aggregation_key.map(str::to_owned),
            source_type: event.source_type.map(str::to_owned),
            tags: event.tags.map(sorted_tags),
            container_id: event.container_id.map(str::to_owned),
        }
    }
}

impl From<&ServiceCheck<'_>> for KeptCheck {
    fn from(check: &ServiceCheck<'_>) -> Self {
        Self {
            name: check.name.to_owned(),
            status: check.status as u8,
            timestamp: check.timestamp,
            host: check.host.map(str::to_owned),
            tags: check.tags.map(sorted_tags),
            message: check.message.as_ref().map(ToString::to_string),
            container_id: check.container_id.map(str::to_owned),
        }
    }
}

fn sorted_tags(field: &str) -> Vec<String> {
    let mut tags: Vec<String> = protocol::tag_list(field).map(str::to_owned).collect();
    tags.sort_unstable();
    tags
}

impl Events {
    /// The last events, newest first.
    pub fn events(&self) -> Vec<Received<KeptEvent>> {
        newest_first(&self.events)
    }

    /// The last service checks, newest first.
    pub fn checks(&self) -> Vec<Received<KeptCheck>> {
        newest_first(&self.checks)
    }

    pub(super) fn event(&self, event: &Event<'_>, source: Source, now_ms: u64) {
        keep(&self.events, KeptEvent::from(event), source, now_ms);
    }

    pub(super) fn check(&self, check: &ServiceCheck<'_>, source: Source, now_ms: u64) {
        keep(&self.checks, KeptCheck::from(check), source, now_ms);
    }
}

fn newest_first<T: Clone>(kept: &Mutex<VecDeque<T>>) -> Vec<T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
}

fn keep<T>(kept: &Mutex<VecDeque<Received<T>>>, what: T, source: Source, now_ms: u64) {
    let source_address = source.address.map(|address| address.to_string());
    let received = Received { time: now_ms, listener: source.listener.name(), source: source_address, what };
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() == KEPT {
        kept.pop_front();
    }
    kept.push_back(received);
}
