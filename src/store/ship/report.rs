//! How the store is doing, for `/-/ready`, for readers and for `tallyd_store_connected`.

use std::sync::Arc;

use super::{ALARM, Mode, Name, Problem, RolledBack, Shipper, Status, locked};
use crate::telemetry;

impl Shipper {
    /// Publishes how things stand.
    pub(super) fn report(&mut self) {
        let claimed = self.slots.iter().filter(|slot| slot.place.claimed).count();
        let connected = claimed == self.slots.len() && self.away.is_none();
        if connected != self.connected {
            self.connected = connected;
            telemetry::STORE_CONNECTED.gauge(&["redis"]).set(if connected { 1.0 } else { 0.0 });
            if connected {
                tracing::info!(agent = %self.parts.journal.agent(), "the store is connected");
            }
        }
        let mut reasons = self.problems();
        if reasons.is_empty() && !connected {
            // It is being asked; what was said before still holds, but that nobody answers.
            let reasons = self.shared.status.load().reasons.clone();
            return self.publish(Status { connected, away: false, reasons });
        }
        let away = claimed == 0 && !reasons.is_empty();
        reasons.extend(self.warnings());
        self.publish(Status { connected, away, reasons });
    }

    pub(super) fn report_only(&self, problem: &Problem) {
        self.count(problem);
        self.publish(Status { connected: false, away: true, reasons: vec![format!("store: {problem}")] });
    }

    fn publish(&self, status: Status) {
        if **self.shared.status.load() != status {
            self.shared.status.store(Arc::new(status));
        }
    }

    /// What fails at present.
    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<_> = self.away.iter().map(|away| format!("store: {}", away.problem)).collect();
        for (server, node) in &self.nodes {
            let count = self.slots.iter().filter(|slot| slot.server == *server).count();
            if let Some(away) = node.away.as_ref().filter(|_| count > 0) {
                problems.push(format!("store: {}{}", self.share(server, count), away.problem));
            }
        }
        let alone: Vec<_> = self.slots.iter().enumerate().filter(|(_, slot)| slot.away.is_some()).collect();
        if let Some((partition, slot)) = alone.first()
            && let Some(away) = &slot.away
        {
            let others = if alone.len() > 1 { format!(" and {} others", alone.len() - 1) } else { String::new() };
            problems.push(format!("store: partition {partition:03}{others}: {}", away.problem));
        }
        problems
    }

    /// Which server, where there are several, and how much of the store it is.
    fn share(&self, server: &Name, count: usize) -> String {
        match self.parts.config.mode {
            Mode::Cluster if !server.is_empty() => format!("{server} ({count} of {} partitions): ", self.slots.len()),
            Mode::Single | Mode::Sentinel | Mode::Cluster => String::new(),
        }
    }

    /// What works, and yet will not do.
    fn warnings(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        for (server, node) in &self.nodes {
            let count = self.slots.iter().filter(|slot| slot.server == *server).count();
            let share = self.share(server, count);
            let mut reason = |text: String| {
                if count > 0 {
                    reasons.push(format!("store: {share}{text}"));
                }
            };
            if let Some(policy) = &node.eviction {
                reason(format!(
                    "Redis throws series away when memory is short (maxmemory-policy {policy}); set noeviction"
                ));
            }
            if let Some((has, wanted)) = node.short_of_replicas {
                reason(format!(
                    "Redis has {has} of the {wanted} replicas that store.redis.replicas asks for; the outbox keeps all until they are there"
                ));
            }
            if let Some(error) = node.unsettled {
                reason(format!("Redis does not say what it would not lose, so the outbox keeps all: {error}"));
            }
        }
        if let Some(RolledBack { since, batches, samples }) = &*locked(&self.rolled_back)
            && since.elapsed() < ALARM
        {
            reasons.push(format!(
                "store: Redis lost {batches} batches with {samples} samples that it had acknowledged and that are kept nowhere else"
            ));
        }
        reasons
    }
}
