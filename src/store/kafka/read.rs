//! What readers ask: the other agents' totals of a series, a list of series, and the delete for all agents. All but the
//! delete is answered from memory.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::run::{Delete, Shared, locked, random};
use crate::aggregate::ledger::Total;
use crate::aggregate::shard::SeriesId;
use crate::sample::{Kind, SeriesKey};
use crate::store::journal;

/// How long a delete may take to come back by the topic.
const PATIENCE: Duration = Duration::from_secs(10);

/// The brokers are away, or the topic is not read yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Away;

/// Reads the table; clones read the same one.
#[derive(Clone)]
pub struct Reader(Arc<Shared>);

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Whether it knows what all other agents have said.
    pub fn is_available(&self) -> bool {
        self.0.is_available()
    }

    /// Why the agent is not ready; empty when all is well.
    pub fn unready(&self) -> Vec<String> {
        self.0.unready()
    }

    /// Adds to a total of this agent what all others have of the series. Totals that do not add up to finite sums are left
    /// out.
    pub fn add_others(&self, id: &SeriesId, own: Option<Arc<Total>>) -> Option<Arc<Total>> {
        let others = self.0.table().others(id, self.0.since_ms());
        let mut whole = own;
        for record in others {
            let Some((_, _, _, total)) = journal::read_total(&record) else { continue };
            match &mut whole {
                Some(sum) => {
                    add(Arc::make_mut(sum), &total);
                }
                none @ None => *none = Some(Arc::new(total)),
            }
        }
        whole
    }

    /// Up to `limit` series behind one of them, in the order of keys, of this agent and the others.
    pub fn list(
        &self,
        after: Option<(&SeriesKey, Kind)>,
        limit: usize,
        shows: impl Fn(&SeriesId) -> bool,
    ) -> Vec<SeriesId> {
        self.0.table().list(after, self.0.since_ms(), limit, shows)
    }

    /// Lets series begin again on every agent. It returns when this one has kept that.
    ///
    /// # Errors
    /// When the brokers are away, or the delete did not come back by the topic in time; then it may come yet.
    pub async fn delete(&self, series: Vec<SeriesId>) -> Result<(), Away> {
        if !self.is_available() {
            return Err(Away);
        }
        let mut kept = Vec::new();
        self.0.order(|work| {
            for id in series {
                let (answer, answered) = oneshot::channel();
                let nonce = random();
                locked(&self.0.waiting).insert(nonce.clone(), answer);
                work.deletes.push(Delete { id, nonce });
                kept.push(answered);
            }
        });
        let all = async {
            for answered in kept {
                answered.await.map_err(|_| Away)?;
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, all).await.unwrap_or(Err(Away))
    }
}

/// Adds another agent's total to a total, as if its samples had come here.
fn add(sum: &mut Total, other: &Total) {
    if !sum.aggregate.merge(&other.aggregate, 0) {
        return;
    }
    sum.start_ms = sum.start_ms.min(other.start_ms);
    sum.update_ms = sum.update_ms.max(other.update_ms);
    if let (Some(rates), Some(others)) = (&mut sum.rates, &other.rates) {
        let now_ms = rates.parts().tick_ms.max(others.parts().tick_ms);
        rates.add(others, now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::{Aggregate, Sum};

    #[test]
    fn totals_of_agents_add_up_and_their_times_span_both() {
        let mut a = Total::new(Kind::Counter, 1_000);
        let mut b = Total::new(Kind::Counter, 500);
        for (total, count) in [(&mut a, 2.0), (&mut b, 3.0)] {
            let Aggregate::Counter(counter) = &mut total.aggregate else { unreachable!() };
            counter.increments = Sum::from(count);
            counter.samples = 1;
        }
        b.update_ms = 2_000;
        add(&mut a, &b);
        let Aggregate::Counter(counter) = &a.aggregate else { unreachable!() };
        assert_eq!((counter.increments.value(), counter.samples), (5.0, 2));
        assert_eq!((a.start_ms, a.update_ms), (500, 2_000));
    }

    #[test]
    fn rates_of_agents_add_up() {
        let meter = |start_ms, marks| {
            let mut total = Total::new(Kind::Meter, start_ms);
            total.rates.as_mut().unwrap().mark(marks, start_ms);
            total
        };
        let (mut a, b) = (meter(1_000, 10.0), meter(2_000, 20.0));
        add(&mut a, &b);
        assert_eq!(a.rates.unwrap().parts().count, 30.0);
    }
}
