//! Whether the agent lives, whether it is ready, and the order to read its configuration again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use hyper::{Response, StatusCode};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};

use super::problem::Problem;
use super::server::{Body, JSON, On, TEXT, ok};
use crate::heartbeat::Board;

/// The addresses really bound, by configuration key: `listen.udp`, `http.api` ...
pub type Bound = BTreeMap<String, Vec<String>>;

/// How far the agent has come. Shared by the agent, which writes it, and the API.
#[derive(Debug, Default)]
pub struct Health {
    bound: OnceLock<Bound>,
    stopping: AtomicBool,
    beats: Arc<Board>,
}

impl Health {
    /// Of an agent whose parts beat there.
    pub fn watching(beats: Arc<Board>) -> Self {
        Self { beats, ..Self::default() }
    }

    /// All listeners are up, on these addresses. Only the first call counts.
    pub fn started(&self, bound: Bound) {
        self.bound.get_or_init(|| bound);
    }

    /// The agent has begun to stop.
    pub fn stopping(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Why the agent is not ready; empty when it is, but for stalled parts.
    pub fn reasons(&self) -> impl Iterator<Item = String> + use<> {
        let starting = self.bound.get().is_none().then(|| "starting: not all listeners are up".to_owned());
        let stopping = self.stopping.load(Ordering::Acquire).then(|| "stopping".to_owned());
        starting.into_iter().chain(stopping)
    }

    /// The parts that make no progress.
    fn stalled(&self) -> impl Iterator<Item = String> + use<> {
        self.beats.stalled(Instant::now()).into_iter().map(|still| still.to_string())
    }
}

/// An order to reload; what comes back are the keys that changed and are in force, or all that is wrong.
pub type Reload = oneshot::Sender<Result<Vec<&'static str>, Vec<String>>>;

pub(super) fn ping(on: On) -> Response<Body> {
    let text = match on {
        On::Ingest => "pong (metrics-ingest service)",
        On::Api | On::Scrape => "pong (metrics-api service)",
    };
    ok(TEXT, text)
}

/// An agent that answers lives.
pub(super) fn healthy() -> Response<Body> {
    ok(JSON, json!({ "healthy": true, "reasons": [] }).to_string())
}

/// `others` are the reasons that are not the agent's own; warnings are what will become one, and make nothing red. Without
/// details only whether it is ready is said.
pub(super) fn ready(
    health: &Health,
    others: Vec<String>,
    warnings: impl IntoIterator<Item = String>,
    details: bool,
) -> Response<Body> {
    let warnings: Vec<String> = warnings.into_iter().collect();
    let reasons: Vec<String> = health.reasons().chain(health.stalled()).chain(others).collect();
    let ready = reasons.is_empty();
    let answer = if details {
        json!({ "ready": ready, "reasons": reasons, "warnings": warnings, "addresses": health.bound.get() })
    } else {
        json!({ "ready": ready })
    };
    let mut response = ok(JSON, answer.to_string());
    if !ready {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

pub(super) async fn reload(orders: Option<&mpsc::Sender<Reload>>) -> Result<Response<Body>, Problem> {
    let Some(orders) = orders else {
        let detail =
            "http.lifecycle is false, so no reload is taken over HTTP; SIGHUP reloads, or set it to true and restart";
        return Err(Problem::new(StatusCode::FORBIDDEN, detail));
    };
    let gone = |()| Problem::busy("the agent is stopping");
    let (order, outcome) = oneshot::channel();
    // One order at a time waits; the others would only repeat it.
    orders.try_send(order).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => Problem::busy("a reload is under way"),
        mpsc::error::TrySendError::Closed(_) => gone(()),
    })?;
    match outcome.await.map_err(|_| gone(()))? {
        Ok(changed) => Ok(ok(JSON, json!({ "reloaded": true, "changed": changed }).to_string())),
        Err(wrong) => {
            let detail = "the configuration is refused as a whole, and the one before stays in force";
            Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail).member("errors", wrong))
        }
    }
}
