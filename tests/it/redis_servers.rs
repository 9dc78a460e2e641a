//! Deployments of Redis for tests: one server, a cluster, and a master with replicas under Sentinel. All on free ports of the
//! loopback, each server with a directory of its own; what was started ends with the value.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::agent::{until, until_within};
use crate::net::free_port;

/// How long a node may be silent before the others count it as failed, in milliseconds.
const NODE_TIMEOUT_MS: &str = "1500";

/// How many slots a cluster has.
const SLOTS: usize = 16_384;

/// A redis-server, or a sentinel; it is killed when dropped.
pub struct Server {
    program: &'static str,
    child: Child,
    pub port: u16,
    arguments: Vec<String>,
    directory: TempDir,
}

impl Server {
    /// A server that persists every write.
    pub fn persistent() -> Self {
        Self::start(&["--appendonly", "yes", "--appendfsync", "always"])
    }

    /// A server with these options that keeps nothing on disk unless they say so.
    pub fn start(options: &[&str]) -> Self {
        Self::start_program("redis-server", options)
    }

    /// The same of another make.
    pub fn start_program(program: &'static str, options: &[&str]) -> Self {
        let port = free_port();
        let mut arguments: Vec<String> =
            ["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""].map(str::to_owned).to_vec();
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        Self::start_on(program, port, tempfile::tempdir().unwrap(), arguments)
    }

    fn start_on(program: &'static str, port: u16, directory: TempDir, arguments: Vec<String>) -> Self {
        let server = Self { program, child: spawn(program, &directory, &arguments), port, arguments, directory };
        server.await_answer();
        server
    }

    fn await_answer(&self) {
        until("redis-server to answer", || {
            let answer = self.try_cli(&["PING"])?;
            // One that wants a password answers as well.
            (answer.trim() == "PONG" || answer.starts_with("NOAUTH")).then_some(())
        });
    }

    /// What `redis-cli` prints for a command.
    pub fn cli(&self, words: &[&str]) -> String {
        self.try_cli(words).unwrap_or_else(|| panic!("no server at {}", self.port))
    }

    /// The same; `None` when nobody answers.
    pub fn try_cli(&self, words: &[&str]) -> Option<String> {
        TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(words).output().unwrap();
        Some(String::from_utf8(output.stdout).unwrap())
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Sends it a signal by its name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Kills it; its files stay.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after [`Server::kill`], on the same port with the same files.
    pub fn start_again(&mut self) {
        self.child = spawn(self.program, &self.directory, &self.arguments);
        self.await_answer();
    }

    /// The setting that points an agent to it.
    pub fn url(&self) -> String {
        format!("store.redis.url=redis://{}", self.address())
    }

    /// Its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn says(&self, words: &[&str], what: &str) -> bool {
        self.try_cli(words).is_some_and(|answer| answer.contains(what))
    }
}

fn spawn(program: &str, directory: &TempDir, arguments: &[String]) -> Child {
    Command::new(program)
        .args(arguments)
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed by packaging/setup.sh tests")
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A Redis Cluster: masters first, then replicas, which belong to the masters in turn.
pub struct Cluster {
    nodes: Vec<Server>,
    masters: usize,
}

impl Cluster {
    /// So many masters, which share all slots, and so many replicas in all; nothing is kept on disk.
    pub fn start(masters: usize, replicas: usize) -> Self {
        Self::start_with(masters, replicas, &[])
    }

    /// The same, each node with these options.
    pub fn start_with(masters: usize, replicas: usize, options: &[&str]) -> Self {
        let node = |_| {
            let bus = free_port().to_string();
            let own = ["--cluster-enabled", "yes", "--cluster-node-timeout", NODE_TIMEOUT_MS, "--cluster-port", &bus];
            Server::start(&[&own, options].concat())
        };
        let cluster = Self { nodes: (0..masters + replicas).map(node).collect(), masters };
        cluster.share_slots();
        cluster.meet();
        for replica in masters..cluster.nodes.len() {
            let id = cluster.id((replica - masters) % masters);
            until("a replica to be one", || {
                cluster.nodes[replica].says(&["CLUSTER", "REPLICATE", &id], "OK").then_some(())
            });
        }
        cluster.await_whole();
        cluster
    }

    fn share_slots(&self) {
        for (at, node) in self.nodes.iter().enumerate() {
            node.cli(&["CLUSTER", "SET-CONFIG-EPOCH", &(at + 1).to_string()]);
            if at < self.masters {
                let (first, last) = (at * SLOTS / self.masters, (at + 1) * SLOTS / self.masters - 1);
                let answer = node.cli(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
                assert_eq!(answer.trim(), "OK");
            }
        }
    }

    fn meet(&self) {
        for (at, node) in self.nodes.iter().enumerate() {
            for other in &self.nodes[at + 1..] {
                let bus = other.arguments.iter().skip_while(|argument| *argument != "--cluster-port").nth(1).unwrap();
                node.cli(&["CLUSTER", "MEET", "127.0.0.1", &other.port.to_string(), bus]);
            }
        }
        let all = format!("cluster_known_nodes:{}", self.nodes.len());
        for node in &self.nodes {
            until("the nodes to know each other", || node.says(&["CLUSTER", "INFO"], &all).then_some(()));
        }
    }

    /// Waits until every living node serves all slots and every replica follows its master.
    pub fn await_whole(&self) {
        for node in self.nodes.iter().filter(|node| node.try_cli(&["PING"]).is_some()) {
            until("the cluster to be whole", || {
                let well = node.says(&["CLUSTER", "INFO"], "cluster_state:ok");
                let follows = node.says(&["INFO", "replication"], "role:master")
                    || node.says(&["INFO", "replication"], "master_link_status:up");
                (well && follows).then_some(())
            });
        }
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A node.
    pub fn node(&self, at: usize) -> &Server {
        &self.nodes[at]
    }

    /// The name of a node in the cluster.
    pub fn id(&self, at: usize) -> String {
        self.nodes[at].cli(&["CLUSTER", "MYID"]).trim().to_owned()
    }

    /// The settings that point an agent to it: the first master as the address, all nodes as start nodes.
    pub fn settings(&self) -> Vec<String> {
        let addresses: Vec<_> = self.nodes.iter().map(|node| format!("\"{}\"", node.address())).collect();
        vec![
            "store.kind=redis".to_owned(),
            "store.redis.mode=cluster".to_owned(),
            format!("store.redis.url=redis://{}", self.nodes[0].address()),
            format!("store.redis.nodes=[{}]", addresses.join(",")),
        ]
    }

    /// Kills a node; its files stay.
    pub fn kill(&mut self, at: usize) {
        self.nodes[at].kill();
    }

    /// Starts a killed node again.
    pub fn start_again(&mut self, at: usize) {
        self.nodes[at].start_again();
    }

    /// Lets a node stand still.
    pub fn freeze(&self, at: usize) {
        self.nodes[at].signal("STOP");
    }

    /// Lets it go on.
    pub fn thaw(&self, at: usize) {
        self.nodes[at].signal("CONT");
    }

    /// What `redis-cli` prints for a command to a node.
    pub fn cli(&self, at: usize, words: &[&str]) -> String {
        self.nodes[at].cli(words)
    }

    /// What `redis-cli` prints for a command, sent on by a node to where its key is.
    pub fn cli_anywhere(&self, at: usize, words: &[&str]) -> String {
        self.nodes[at].cli(&[&["-c"], words].concat())
    }

    /// Whether a node is a master.
    pub fn is_master(&self, at: usize) -> bool {
        self.nodes[at].says(&["INFO", "replication"], "role:master")
    }

    /// The nodes that answer and are masters.
    pub fn masters(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|at| self.is_master(*at)).collect()
    }

    /// The names of keys that match a pattern, each with the master that has it.
    pub fn scan(&self, pattern: &str) -> Vec<(usize, String)> {
        let on = |at: usize| {
            let names = self.nodes[at].cli(&["--scan", "--pattern", pattern]);
            names.lines().map(|name| (at, name.to_owned())).collect::<Vec<_>>()
        };
        self.masters().into_iter().flat_map(on).collect()
    }
}

/// Slots on their way from one master to another.
impl Cluster {
    /// The slot of a key.
    pub fn slot(&self, key: &str) -> u16 {
        self.nodes[0].cli(&["CLUSTER", "KEYSLOT", key]).trim().parse().unwrap()
    }

    /// From now on keys of a slot that are not there are asked for at another node.
    pub fn begin_to_move(&self, slot: u16, from: usize, to: usize) {
        let slot = slot.to_string();
        assert_eq!(self.cli(to, &["CLUSTER", "SETSLOT", &slot, "IMPORTING", &self.id(from)]).trim(), "OK");
        assert_eq!(self.cli(from, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &self.id(to)]).trim(), "OK");
    }

    /// Moves up to so many keys of the slot.
    pub fn move_keys(&self, slot: u16, from: usize, to: usize, count: usize) {
        let keys = self.cli(from, &["CLUSTER", "GETKEYSINSLOT", &slot.to_string(), &count.to_string()]);
        let port = self.nodes[to].port.to_string();
        for key in keys.lines().filter(|key| !key.is_empty()) {
            assert_eq!(self.cli(from, &["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).trim(), "OK", "{key}");
        }
    }

    /// Gives the slot, which must be empty, to the other node for good.
    pub fn end_move(&self, slot: u16, from: usize, to: usize) {
        let id = self.id(to);
        for at in [to, from] {
            until("the slot to be there", || {
                // Keys that came meanwhile go first.
                self.move_keys(slot, from, to, 1_000);
                self.nodes[at].says(&["CLUSTER", "SETSLOT", &slot.to_string(), "NODE", &id], "OK").then_some(())
            });
        }
    }
}

/// A master with replicas, watched by sentinels under the name `mymaster`.
pub struct Sentinels {
    servers: Vec<Server>,
    sentinels: Vec<Server>,
}

impl Sentinels {
    /// A master, so many replicas and so many sentinels, most of which must agree; nothing is kept on disk.
    pub fn start(replicas: usize, sentinels: usize) -> Self {
        Self::start_with(replicas, sentinels, &[])
    }

    /// The same, each server with these options.
    pub fn start_with(replicas: usize, sentinels: usize, options: &[&str]) -> Self {
        let mut servers = vec![Server::start(options)];
        let master = servers[0].port.to_string();
        for _ in 0..replicas {
            servers.push(Server::start(&[options, &["--replicaof", "127.0.0.1", &master]].concat()));
        }
        let quorum = sentinels / 2 + 1;
        let watch = |_| sentinel(&master, quorum);
        let deployment = Self { sentinels: (0..sentinels).map(watch).collect(), servers };
        deployment.await_whole(replicas, sentinels);
        deployment
    }

    fn await_whole(&self, replicas: usize, sentinels: usize) {
        for replica in &self.servers[1..] {
            until("a replica to follow", || {
                replica.says(&["INFO", "replication"], "master_link_status:up").then_some(())
            });
        }
        for sentinel in &self.sentinels {
            let all = format!("slaves={replicas},sentinels={sentinels}");
            until("a sentinel to know all", || sentinel.says(&["INFO", "sentinel"], &all).then_some(()));
        }
    }

    /// The settings that point an agent to it.
    pub fn settings(&self) -> Vec<String> {
        let addresses: Vec<_> = self.sentinels.iter().map(|node| format!("\"{}\"", node.address())).collect();
        vec![
            "store.kind=redis".to_owned(),
            "store.redis.mode=sentinel".to_owned(),
            format!("store.redis.nodes=[{}]", addresses.join(",")),
        ]
    }

    /// A server: the first master, then the replicas.
    pub fn server(&self, at: usize) -> &Server {
        &self.servers[at]
    }

    /// The same, to kill it and start it again.
    pub fn server_mut(&mut self, at: usize) -> &mut Server {
        &mut self.servers[at]
    }

    /// A sentinel.
    pub fn sentinel(&self, at: usize) -> &Server {
        &self.sentinels[at]
    }

    /// Which server the first sentinel calls the master.
    pub fn master(&self) -> usize {
        let answer = self.sentinels[0].cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"]);
        let port: u16 = answer.lines().nth(1).unwrap().trim().parse().unwrap();
        self.servers.iter().position(|server| server.port == port).unwrap()
    }

    /// Makes a replica the master, and waits until it is; answers which.
    pub fn fail_over(&self) -> usize {
        let before = self.master();
        until_within(Duration::from_secs(60), "another master", || {
            // Refused while one is under way, and given up while no replica follows the master.
            self.sentinels[0].cli(&["SENTINEL", "FAILOVER", "mymaster"]);
            let now = self.master();
            let is = now != before && self.servers[now].says(&["INFO", "replication"], "role:master");
            is.then_some(now)
        })
    }
}

fn sentinel(master: &str, quorum: usize) -> Server {
    let (port, directory) = (free_port(), tempfile::tempdir().unwrap());
    let lines = [
        format!("port {port}"),
        "bind 127.0.0.1".to_owned(),
        format!("sentinel monitor mymaster 127.0.0.1 {master} {quorum}"),
        "sentinel down-after-milliseconds mymaster 1500".to_owned(),
        "sentinel failover-timeout mymaster 5000".to_owned(),
    ];
    // It writes what it learns into this file.
    std::fs::write(directory.path().join("sentinel.conf"), lines.join("\n")).unwrap();
    Server::start_on("redis-server", port, directory, vec!["sentinel.conf".to_owned(), "--sentinel".to_owned()])
}
