//! Which server has a partition: always the same one, the master that the sentinels name, or the node of a cluster that
//! has the partition's slot.
//!
//! The crate's own `ClusterConnection` is not used: while it asks for the map of slots it holds back every request, also
//! those for nodes that answer, and it asks one node after the other, which costs a time-out for each that stands still.
//! Its `Sentinel` knows neither our limits nor certificates together with credentials of each sentinel. Here the nodes
//! are asked at once and the first answer counts; who has an old map is put right by `MOVED`, and asked again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::{ConnectionInfo, Value};
use tokio::task::JoinSet;

use super::deployment::Mode;
use super::node::{Node, Opener};
use super::{Error, list, number, text};
use crate::store::Partition;

/// How many partitions there are.
const PARTITIONS: usize = Partition::MAX as usize + 1;

/// How many slots a cluster has.
const SLOTS: u16 = 16_384;

/// How old the sentinels' word may be when a request relies on it: a master that was deposed answers for some seconds
/// more.
const TRUST: Duration = Duration::from_secs(1);

/// The least time between two questions for the map.
const REFRESH: Duration = Duration::from_millis(100);

/// Where each partition is, as far as is known.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) opener: Arc<Opener>,
    map: Mutex<Map>,
    /// When the map was last asked for, and what came of it.
    refreshed: tokio::sync::Mutex<Option<(Instant, Result<(), Error>)>>,
}

#[derive(Debug, Default)]
struct Map {
    /// Every node that was heard of, by name.
    nodes: BTreeMap<Arc<str>, Arc<Node>>,
    partitions: Vec<Option<Arc<Node>>>,
    /// It may not hold any more.
    stale: bool,
    /// When it was last asked for beside the requests.
    looked: Option<Instant>,
}

impl Map {
    fn node(&mut self, info: ConnectionInfo) -> Arc<Node> {
        let node = Node::new(info);
        Arc::clone(self.nodes.entry(Arc::clone(&node.name)).or_insert_with(|| Arc::new(node)))
    }
}

impl Route {
    pub(super) fn new(opener: Opener) -> Self {
        let mut map = Map { partitions: vec![None; PARTITIONS], stale: true, ..Map::default() };
        if opener.deployment.mode == Mode::Single
            && let Some(server) = opener.deployment.start.first()
        {
            let node = map.node(server.clone());
            map.partitions.fill(Some(node));
            map.stale = false;
        }
        Self { opener: Arc::new(opener), map: Mutex::new(map), refreshed: tokio::sync::Mutex::default() }
    }

    fn map(&self) -> std::sync::MutexGuard<'_, Map> {
        // Each change of it is whole by itself, so a panic elsewhere leaves it sound.
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node that has a partition, as far as is known without asking.
    pub(super) fn known(&self, partition: Partition) -> Option<Arc<Node>> {
        self.map().partitions.get(usize::from(partition)).cloned().flatten()
    }

    /// All nodes that have partitions.
    pub(super) fn nodes(&self) -> Vec<Arc<Node>> {
        let map = self.map();
        let nodes: BTreeMap<_, _> = map.partitions.iter().flatten().map(|node| (&node.name, node)).collect();
        nodes.into_values().cloned().collect()
    }

    /// The node that has a partition.
    pub(super) async fn node(self: &Arc<Self>, partition: Partition) -> Result<Arc<Node>, Error> {
        if self.is_to_look() {
            self.look_again();
        }
        if let Some(node) = self.known(partition).filter(|_| !self.map().stale) {
            return Ok(node);
        }
        let asked = self.refresh().await;
        match (self.known(partition), asked) {
            (Some(node), _) => Ok(node),
            (None, Ok(())) => Err(Error::ClusterDown),
            (None, Err(error)) => Err(error),
        }
    }

    fn is_to_look(&self) -> bool {
        let mut map = self.map();
        let is = self.opener.deployment.mode == Mode::Sentinel && map.looked.is_none_or(|at| at.elapsed() >= TRUST);
        if is {
            map.looked = Some(Instant::now());
        }
        is
    }

    /// Says that the map may not hold any more.
    pub(super) fn doubt(&self) {
        if self.opener.deployment.mode != Mode::Single {
            self.map().stale = true;
        }
    }

    /// A node that another one names: `host:port`, or `:port` for its own host.
    pub(super) fn named(&self, name: &str, by: &Node) -> Option<Arc<Node>> {
        let (host, port) = name.rsplit_once(':')?;
        let host = if host.is_empty() { by.host() } else { host };
        Some(self.map().node(self.opener.deployment.server(host, port.parse().ok()?)))
    }

    /// Takes note that a partition is with another node.
    pub(super) fn moved(&self, partition: Partition, node: &Arc<Node>) {
        let mut map = self.map();
        map.stale = true;
        if let Some(place) = map.partitions.get_mut(usize::from(partition)) {
            *place = Some(Arc::clone(node));
        }
    }

    /// Asks for the map beside the requests, which go on with what is known.
    pub(super) fn look_again(self: &Arc<Self>) {
        let route = Arc::clone(self);
        tokio::spawn(async move { route.refresh().await });
    }

    /// Asks for the map, unless somebody else just did.
    async fn refresh(&self) -> Result<(), Error> {
        let begun = Instant::now();
        let mut refreshed = self.refreshed.lock().await;
        if let Some((at, answer)) = *refreshed
            && (at > begun || at.elapsed() < REFRESH)
        {
            return answer;
        }
        let answer = match self.opener.deployment.mode {
            Mode::Single => Ok(()),
            Mode::Sentinel => self.ask_sentinels().await,
            Mode::Cluster => self.ask_nodes().await,
        };
        *refreshed = Some((Instant::now(), answer));
        answer
    }

    /// The first sentinel that knows the master decides.
    async fn ask_sentinels(&self) -> Result<(), Error> {
        let mut questions = JoinSet::new();
        for sentinel in &self.opener.deployment.start {
            questions.spawn(master(sentinel.clone(), Arc::clone(&self.opener)));
        }
        let mut problem = Error::Sentinels;
        while let Some(answer) = questions.join_next().await {
            match answer {
                Ok(Ok(Some((host, port)))) => {
                    let mut map = self.map();
                    let node = map.node(self.opener.deployment.server(&host, port));
                    map.nodes.retain(|name, _| *name == node.name);
                    map.partitions.fill(Some(node));
                    map.stale = false;
                    return Ok(());
                }
                Ok(Ok(None)) => problem = Error::MasterUnknown,
                Ok(Err(error @ (Error::Denied | Error::Tls))) => problem = error,
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Err(problem)
    }

    /// The first node that answers decides. One that stands still holds up nothing.
    async fn ask_nodes(&self) -> Result<(), Error> {
        let mut questions = JoinSet::new();
        for node in self.candidates() {
            questions.spawn(slots(node, Arc::clone(&self.opener)));
        }
        let mut problem = Error::Connect;
        while let Some(answer) = questions.join_next().await {
            match answer {
                Ok(Ok(ranges)) => {
                    self.take(ranges);
                    return Ok(());
                }
                Ok(Err(error)) => problem = error,
                // It panicked, which the panic has reported.
                Err(_) => problem = Error::Dropped,
            }
        }
        Err(problem)
    }

    /// Every node that was ever heard of, and those of the configuration.
    fn candidates(&self) -> Vec<Arc<Node>> {
        let mut map = self.map();
        let start: Vec<_> = self.opener.deployment.start.iter().map(|info| map.node(info.clone())).collect();
        let nodes: BTreeMap<_, _> = map.nodes.values().chain(&start).map(|node| (&node.name, node)).collect();
        nodes.into_values().cloned().collect()
    }

    /// Makes a map of what a node says.
    fn take(&self, ranges: Vec<Range>) {
        let mut map = self.map();
        map.partitions.fill(None);
        let mut masters = BTreeSet::new();
        for Range { first, last, host, port } in ranges {
            let node = map.node(self.opener.deployment.server(&host, port));
            masters.insert(Arc::clone(&node.name));
            for (partition, place) in map.partitions.iter_mut().enumerate() {
                if (first..=last).contains(&slot(partition as Partition)) {
                    *place = Some(Arc::clone(&node));
                }
            }
        }
        let start: BTreeSet<_> = self.opener.deployment.start.iter().map(|info| info.addr().to_string()).collect();
        map.nodes.retain(|name, _| masters.contains(name) || start.contains(&**name));
        map.stale = false;
    }
}

/// What a sentinel calls the master.
async fn master(sentinel: ConnectionInfo, opener: Arc<Opener>) -> Result<Option<(String, u16)>, Error> {
    let mut redis = opener.open(sentinel).await?;
    let mut question = redis::cmd("SENTINEL");
    question.arg("GET-MASTER-ADDR-BY-NAME").arg(&opener.deployment.master);
    Ok(question.query_async(&mut redis).await?)
}

/// Slots in a row, and the master that has them.
struct Range {
    first: u16,
    last: u16,
    host: String,
    port: u16,
}

async fn slots(node: Arc<Node>, opener: Arc<Opener>) -> Result<Vec<Range>, Error> {
    let mut wire = node.wire(&opener).await?;
    let mut question = redis::cmd("CLUSTER");
    question.arg("SLOTS");
    match wire.send(&question, false).await {
        Ok(answer) => {
            let ranges = list(&answer).ok_or(Error::Foreign)?;
            // A node that knows of no other yet knows no slots either; let another one speak.
            if ranges.is_empty() {
                return Err(Error::ClusterDown);
            }
            Ok(ranges.iter().filter_map(|range| range_of(range, node.host())).collect())
        }
        Err(error) => {
            let error = Error::from(error);
            if error.ends_connection() {
                node.give_up(&wire, error).await;
            }
            Err(error)
        }
    }
}

/// `[first, last, [host, port, ...], ...]`; without a host it is the one that was asked.
fn range_of(range: &Value, asked: &str) -> Option<Range> {
    let [first, last, master, ..] = list(range)? else { return None };
    let [host, port, ..] = list(master)? else { return None };
    let host = text(host).filter(|host| !host.is_empty() && *host != "?").unwrap_or(asked).to_owned();
    let (first, last) = (u16::try_from(number(first)?).ok()?, u16::try_from(number(last)?).ok()?);
    Some(Range { first, last, host, port: u16::try_from(number(port)?).ok()? })
}

/// The slot of a partition's keys: of the hash tag in their names. CRC-16/XMODEM, as Redis Cluster's specification has it.
fn slot(partition: Partition) -> u16 {
    let tag = format!("{partition:03}");
    let crc = tag.bytes().fold(0, |crc, byte| {
        (0..8).fold(
            crc ^ (u16::from(byte) << 8),
            |crc: u16, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
            },
        )
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_that_of_the_specification() {
        // `CLUSTER KEYSLOT tallyd:{017}:seq`, and so on.
        for (partition, expected) in [(0, 13_923), (17, 13_749), (255, 14_163)] {
            assert_eq!(slot(partition), expected, "{partition}");
        }
    }

    #[test]
    fn a_node_without_a_host_has_that_of_the_one_that_was_asked() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |host| {
            let master = Value::Array(vec![host, Value::Int(7_000), text("id")]);
            range_of(&Value::Array(vec![Value::Int(0), Value::Int(5_460), master]), "asked").unwrap()
        };
        assert_eq!(range(text("10.0.0.1")).host, "10.0.0.1");
        for unknown in [Value::Nil, text(""), text("?")] {
            let Range { first, last, host, port } = range(unknown);
            assert_eq!((first, last, host.as_str(), port), (0, 5_460, "asked", 7_000));
        }
    }
}
