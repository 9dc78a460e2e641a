//! Every deployment of Redis that a store can be: Sentinel, Cluster, TLS, a unix socket, a user with few rights. Counts
//! are exact in each of them, also while a server is away or another one takes its place.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::json;
use tempfile::TempDir;

use crate::agent::{Agent, same, tallyd, until};
use crate::net::free_port;
use crate::redis::under_load;
use crate::redis_servers::{Cluster, Sentinels, Server};

/// An agent that flushes often and gives a server up soon.
fn agent(settings: &[String]) -> Agent {
    let soon = ["flush.interval=100ms", "flush.window=1s", "limits.redis_reply=1s", "limits.redis_connect=1s"];
    let settings: Vec<_> = settings.iter().map(String::as_str).chain(soon).collect();
    Agent::start(&settings)
}

/// An agent whose store is one server, at an address.
fn single(url: &str, others: &[String]) -> Agent {
    let store = ["store.kind=redis".to_owned(), format!("store.redis.url={url}")];
    agent(&[&store, others].concat())
}

fn check(settings: &[&str]) -> Output {
    let mut command = tallyd();
    command.arg("check").args(["--set", "store.kind=redis"]);
    for setting in settings {
        command.args(["--set", setting]);
    }
    command.output().unwrap()
}

/// A sum of a series, wherever in a cluster it is; 0 where it is not.
fn stored(cluster: &Cluster, series: &str, field: &str) -> f64 {
    let names = cluster.scan(&format!("tallyd:*:s:{series}"));
    let Some((node, name)) = names.first() else { return 0.0 };
    let fields = cluster.cli_anywhere(*node, &["HMGET", name, field, &format!("{field}frac")]);
    fields.lines().map(|field| field.parse::<f64>().unwrap_or(0.0)).sum()
}

#[test]
fn a_cluster_is_one_store() {
    let cluster = Cluster::start(3, 3);
    assert_eq!((cluster.len(), cluster.masters()), (6, vec![0, 1, 2]));
    let nodes = || (0..cluster.len()).map(|at| cluster.node(at));
    nodes().for_each(|node| drop(grant(node, &["+cluster|slots", "+asking", "+wait"])));
    let user = format!("store.redis.url=redis://tallyd:secret@{}", cluster.node(0).address());
    let settings = [cluster.settings(), vec![user]].concat();
    let (a, b) = (agent(&settings), agent(&settings));
    for number in 0..200 {
        for agent in [&a, &b] {
            agent.datagram(format!("many.{number:03}:{}|c", number + 1));
        }
    }
    a.datagram("t:1:2|ms\nu:x|s\nu:y|s\ng:5|g\nh:1|h\nd:4|d\nm:3|m");
    b.datagram("t:3|ms\nu:x|s\nu:z|s\nh:2|h\nd:5|d\nm:4|m");
    for reader in [&a, &b] {
        for (key, field, value) in [
            ("t", "sum", 6),
            ("t", "max", 3),
            ("u", "value", 3),
            ("g", "value", 5),
            ("h", "sum", 3),
            ("d", "sum", 9),
            ("m", "count", 7),
            ("many.000", "value", 2),
            ("many.199", "value", 400),
        ] {
            reader.wait_for(key, field, value);
        }
    }
    // They are spread over all masters, and each is read.
    until("all to be stored", || (cluster.scan("tallyd:*:s:c:many.*").len() == 200).then_some(()));
    let all = cluster.scan("tallyd:*:s:c:many.*");
    for master in cluster.masters() {
        assert!(all.iter().filter(|(node, _)| *node == master).count() > 20, "{all:?}");
    }
    pages(&b);
    deletes(&a, &b);
    nodes().for_each(|node| assert!(!refused(node).contains("tallyd"), "{}", refused(node)));
    assert_eq!(a.get("/-/ready").status, 200, "{}", a.get("/-/ready").text());
}

/// A list in pages has every series once.
fn pages(agent: &Agent) {
    let mut keys = Vec::new();
    let mut next = Some("/data/metrics?match=many.*&limit=33".to_owned());
    while let Some(path) = next {
        let page = agent.get(&path);
        assert_eq!(page.status, 200, "{}", page.text());
        keys.extend(page.json().as_array().unwrap().iter().map(|metric| metric["name"].as_str().unwrap().to_owned()));
        next = page.header("link").map(|link| link[1..link.find('>').unwrap()].to_owned());
    }
    keys.sort();
    assert_eq!(keys.len(), 200, "{keys:?}");
    keys.dedup();
    assert_eq!(keys.len(), 200, "each once");
}

/// A delete is known everywhere.
fn deletes(a: &Agent, b: &Agent) {
    for key in ["t", "many.007", "many.108"] {
        assert_eq!(a.delete(&format!("/data/metrics/{key}")).status, 200);
        assert_eq!(a.metric(key), None);
        until("the other agent to reset", || {
            b.get(&format!("/data/metrics/{key}?scope=local")).status.eq(&404).then_some(())
        });
    }
    b.datagram("many.007:1|c");
    a.wait_for("many.007", "value", 1);
}

#[test]
fn a_node_that_is_away_holds_up_its_own_partitions_alone() {
    // Else the others would soon refuse all keys.
    let cluster = Cluster::start_with(3, 0, &["--cluster-require-full-coverage", "no"]);
    let agent = agent(&cluster.settings());
    let lines: Vec<_> = (0..60).map(|number| format!("part.{number:02}:1|c")).collect();
    agent.datagram(lines.join("\n"));
    until("all to be stored", || (cluster.scan("tallyd:*:s:c:part.*").len() == 60).then_some(()));
    let held = cluster.scan("tallyd:*:s:c:part.*");
    let key = |name: &str| name.rsplit(':').next().unwrap().to_owned();
    let on = |node| held.iter().filter(|(at, _)| *at == node).map(|(_, name)| key(name)).collect::<Vec<_>>();
    cluster.freeze(1);
    agent.datagram(lines.join("\n"));
    for (at, name) in held.iter().filter(|(at, _)| *at != 1) {
        until("the others to go on", || (cluster.cli(*at, &["HGET", name, "increments"]).trim() == "2").then_some(()));
    }
    let ready = until("the agent to say so", || Some(agent.get("/-/ready")).filter(|ready| ready.status == 503));
    assert!(ready.text().contains(&cluster.node(1).address()), "{}", ready.text());
    // A read of what is there is answered with all, of what is away with what this agent knows.
    for (node, scope) in [(0, json!(null)), (1, json!("local"))] {
        let read = agent.metric(&on(node)[0]).unwrap();
        assert!(read["scope"] == scope && same(&read["value"], &json!(2)), "{read}");
    }
    cluster.thaw(1);
    for key in on(1) {
        until("the rest to be stored", || (stored(&cluster, &format!("c:{key}"), "increments") == 2.0).then_some(()));
    }
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
}

#[test]
fn a_replica_that_takes_over_has_all_in_the_end() {
    let mut cluster = Cluster::start(3, 3);
    let agent = agent(&cluster.settings());
    agent.datagram("taken:1|c");
    until("it to be stored", || (stored(&cluster, "c:taken", "increments") == 1.0).then_some(()));
    let at = cluster.scan("tallyd:*:s:c:taken")[0].0;
    let sum = 1 + under_load(&agent, "taken", || {
        cluster.kill(at);
        until("a replica to take over", || (cluster.masters().len() == 3).then_some(()));
    });
    let holds = |cluster: &Cluster, sum: u64| {
        until("the store to hold all", || (stored(cluster, "c:taken", "increments") == sum as f64).then_some(()));
        agent.wait_for("taken", "value", sum);
        until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    };
    holds(&cluster, sum);
    // It comes back as a replica, and takes over again when the other one goes.
    cluster.start_again(at);
    cluster.await_whole();
    let next = cluster.scan("tallyd:*:s:c:taken")[0].0;
    assert_ne!(next, at);
    let more = under_load(&agent, "taken", || {
        cluster.kill(next);
        until("the first one to take over", || (cluster.masters().len() == 3).then_some(()));
    });
    holds(&cluster, sum + more);
    assert_eq!(cluster.scan("tallyd:*:s:c:taken")[0].0, at);
    assert_eq!(agent.own("tallyd_lost_total", ""), 0.0);
}

#[test]
fn a_partition_that_moves_under_load_is_followed() {
    let cluster = Cluster::start(2, 0);
    let agent = agent(&cluster.settings());
    agent.datagram("moves:1|c");
    until("it to be stored", || (stored(&cluster, "c:moves", "increments") == 1.0).then_some(()));
    let (from, name) = cluster.scan("tallyd:*:s:c:moves")[0].clone();
    let (to, slot) = (1 - from, cluster.slot(&name));
    let sum = 1 + under_load(&agent, "moves", || {
        cluster.begin_to_move(slot, from, to);
        // Some keys are here and some there: it must wait, and others go on.
        cluster.move_keys(slot, from, to, 1);
        agent.datagram("others.1:1|c\nothers.2:1|c\nothers.3:1|c\nothers.4:1|c");
        until("the others to be stored", || (cluster.scan("tallyd:*:s:c:others.*").len() >= 3).then_some(()));
        cluster.move_keys(slot, from, to, 1_000);
        cluster.end_move(slot, from, to);
    });
    until("the store to hold all", || (stored(&cluster, "c:moves", "increments") == sum as f64).then_some(()));
    assert_eq!(cluster.scan("tallyd:*:s:c:moves")[0].0, to);
    agent.wait_for("moves", "value", sum);
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    assert_eq!(agent.own("tallyd_lost_total", ""), 0.0);
}

/// What a server under Sentinel has of a counter.
fn watched(sentinels: &Sentinels, at: usize, key: &str) -> u64 {
    let server = sentinels.server(at);
    let name = server.cli(&["--scan", "--pattern", &format!("tallyd:*:s:c:{key}")]);
    server.cli(&["HGET", name.trim(), "increments"]).trim().parse().unwrap_or(0)
}

#[test]
fn the_master_that_the_sentinels_name_has_all_in_the_end() {
    let sentinels = Sentinels::start(1, 3);
    let agent = agent(&sentinels.settings());
    let sum = under_load(&agent, "watched", || assert_eq!(sentinels.fail_over(), 1));
    until("the new master to hold all", || (watched(&sentinels, 1, "watched") == sum).then_some(()));
    agent.wait_for("watched", "value", sum);
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    assert_eq!(agent.own("tallyd_lost_total", ""), 0.0);
    // And back.
    let more = under_load(&agent, "watched", || assert_eq!(sentinels.fail_over(), 0));
    until("the old master to hold all", || (watched(&sentinels, 0, "watched") == sum + more).then_some(()));
}

#[test]
fn a_master_that_dies_is_replaced_though_a_sentinel_stands_still() {
    let mut sentinels = Sentinels::start(1, 3);
    sentinels.sentinel(2).signal("STOP");
    let agent = agent(&sentinels.settings());
    let sum = under_load(&agent, "dies", || {
        sentinels.server_mut(0).kill();
        until("the replica to be the master", || (sentinels.master() == 1).then_some(()));
    });
    until("it to hold all", || (watched(&sentinels, 1, "dies") == sum).then_some(()));
    agent.wait_for("dies", "value", sum);
    sentinels.server_mut(0).start_again();
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    assert_eq!(agent.own("tallyd_lost_total", ""), 0.0);
}

#[test]
fn a_replica_that_lacks_what_was_acknowledged_gets_it_when_it_takes_over() {
    for replicas in ["auto", "1"] {
        let mut sentinels = Sentinels::start(1, 1);
        let agent = agent(&[sentinels.settings(), vec![format!("store.redis.replicas={replicas}")]].concat());
        agent.datagram("lacks:1|c");
        until("both to have it", || (watched(&sentinels, 1, "lacks") == 1).then_some(()));
        // From now on the replica hears nothing.
        sentinels.server(1).cli(&["REPLICAOF", "127.0.0.1", "1"]);
        agent.datagram("lacks:10|c");
        until("the master to have it", || (watched(&sentinels, 0, "lacks") == 11).then_some(()));
        until("that to be acknowledged", || (agent.own("tallyd_outbox_unsent_batches", "") == 0.0).then_some(()));
        sentinels.server_mut(0).kill();
        until("the replica to be the master", || (sentinels.master() == 1).then_some(()));
        // Nothing more is sent: that it lacks something must show by itself.
        until("it to have all", || (watched(&sentinels, 1, "lacks") == 11).then_some(()));
        agent.wait_for("lacks", "value", 11);
        assert_eq!(agent.own("tallyd_lost_total", ""), 0.0);
    }
}

#[test]
fn batches_stay_in_the_outbox_until_the_replicas_have_them() {
    let sentinels = Sentinels::start(1, 1);
    (0..2).for_each(|at| drop(grant(sentinels.server(at), &["+wait", "+role", "+select"])));
    let more = ["store.redis.replicas=1", "store.redis.url=redis://tallyd:secret@any/5"].map(str::to_owned);
    let agent = agent(&[sentinels.settings(), more.to_vec()].concat());
    let kept = || agent.own("tallyd_outbox_batches", "");
    agent.datagram("kept:1|c");
    agent.wait_for("kept", "value", 1);
    until("the replica to have it", || (kept() == 0.0 && agent.own("tallyd_flushes_total", "") > 2.0).then_some(()));
    sentinels.server(1).signal("STOP");
    agent.datagram("kept:1|c");
    until("the master to have it", || {
        let name = sentinels.server(0).cli(&["-n", "5", "--scan", "--pattern", "tallyd:*:s:c:kept"]);
        (sentinels.server(0).cli(&["-n", "5", "HGET", name.trim(), "increments"]).trim() == "2").then_some(())
    });
    // Each second it is asked whether the replica has it; several answers must not have dropped it.
    let calls = || {
        let stats = sentinels.server(0).cli(&["INFO", "commandstats"]);
        let row = stats.lines().find_map(|line| line.strip_prefix("cmdstat_wait:calls=")).unwrap().to_owned();
        row.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    let before = calls();
    until("it to be asked again", || (calls() >= before + 3).then_some(()));
    assert!(kept() >= 1.0);
    assert_eq!(refused(sentinels.server(0)).trim(), "");
    sentinels.server(1).signal("CONT");
    until("the replica to have it as well", || (kept() == 0.0).then_some(()));
}

#[test]
fn a_unix_socket_and_a_database_number_are_used() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("redis.sock");
    let server = Server::start(&["--unixsocket", socket.to_str().unwrap()]);
    let urls = [format!("unix://{}?db=3&protocol=3", socket.display()), format!("redis://{}/4", server.address())];
    for (url, database) in urls.iter().zip(["3", "4"]) {
        let agent = single(url, &[]);
        agent.datagram("there:5|c");
        agent.wait_for("there", "value", 5);
        until("the store to hold it", || {
            let names = server.cli(&["-n", database, "--scan", "--pattern", "tallyd:*:s:c:there"]);
            (!names.trim().is_empty()).then_some(())
        });
        until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    }
    assert_eq!(server.cli(&["-n", "0", "DBSIZE"]).trim(), "0");
}

/// The rights that README lists, as `ACL SETUSER` takes them, with some for a deployment.
fn grant(server: &Server, others: &[&str]) -> Vec<String> {
    let readme = include_str!("../../README.md");
    let line = readme.lines().find(|line| line.starts_with("ACL SETUSER tallyd ")).expect("README lists the rights");
    let words: Vec<_> = line.split(' ').chain(others.iter().copied()).collect();
    assert_eq!(server.cli(&words).trim(), "OK");
    others.iter().for_each(|right| assert!(readme.contains(*right), "README lacks {right}"));
    words.iter().filter_map(|word| word.strip_prefix('+')).map(str::to_owned).collect()
}

/// Whether a user was refused something.
fn refused(server: &Server) -> String {
    server.cli(&["ACL", "LOG"])
}

#[test]
fn a_user_needs_the_rights_that_are_documented_and_no_more() {
    let server = Server::start(&[]);
    let rights = grant(&server, &[]);
    let agent = single(&format!("redis://tallyd:secret@{}", server.address()), &[]);
    agent.datagram("may:5|c\nt:1:2|ms\nu:x|s\ng:5|g\nm:3|m");
    for (key, field, value) in [("may", "value", 5), ("t", "sum", 3), ("u", "value", 1), ("g", "value", 5)] {
        agent.wait_for(key, field, value);
    }
    until("all to be stored", || {
        (server.cli(&["--scan", "--pattern", "tallyd:*:s:*"]).lines().count() == 5).then_some(())
    });
    assert_eq!(agent.get("/data/metrics").json().as_array().unwrap().len(), 5);
    assert_eq!(agent.delete("/data/metrics/may").status, 200);
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    for right in &rights {
        until(&format!("{right} to be used"), || {
            // A set after a change is what a gauge needs most rights for.
            agent.datagram("g:+1|g\nt:0.5|ms");
            agent.datagram("g:7|g");
            server.cli(&["INFO", "commandstats"]).contains(&format!("cmdstat_{right}:calls=")).then_some(())
        });
    }
    assert!(!refused(&server).contains("tallyd"), "{}", refused(&server));
    drop(agent);
    // A wrong password is told, and not shown.
    let wrong = single(&format!("redis://tallyd:hunter2@{}", server.address()), &[]);
    let told = |agent: &Agent| Some(agent.get("/-/ready").text()).filter(|ready| ready.contains("refuses the user"));
    let ready = until("the agent to say so", || told(&wrong));
    assert!(!ready.contains("hunter2") && !wrong.stderr().contains("hunter2"), "{ready}");
    // So is a right that is missing.
    server.cli(&["ACL", "SETUSER", "tallyd", "-hset"]);
    let lacks = single(&format!("redis://tallyd:secret@{}", server.address()), &[]);
    lacks.datagram("may:1|c");
    until("the agent to say so", || told(&lacks));
}

#[test]
fn without_the_right_to_scripts_others_do() {
    let server = Server::start(&[]);
    grant(&server, &["-evalsha", "-script|load", "+watch", "+unwatch", "+multi", "+exec", "+exists"]);
    let url = format!("redis://tallyd:secret@{}", server.address());
    let (a, b) = (single(&url, &[]), single(&url, &[]));
    a.datagram("may:5|c\nt:1:2|ms\nu:x|s\ng:5|g\nm:3|m");
    b.datagram("may:7|c\nt:3|ms\nu:y|s");
    for (key, field, value) in [("may", "value", 12), ("t", "sum", 6), ("u", "value", 2), ("g", "value", 5)] {
        a.wait_for(key, field, value);
    }
    assert!(server.cli(&["INFO", "commandstats"]).contains("cmdstat_exec:"));
    assert_eq!(b.delete("/data/metrics/may").status, 200);
    assert_eq!(b.metric("may"), None);
    let refused = refused(&server);
    let lines: Vec<_> = refused.lines().collect();
    let objects = lines.windows(2).filter(|pair| pair[0] == "object").map(|pair| pair[1]);
    assert!(objects.clone().all(|object| ["evalsha", "script|load"].contains(&object)), "{refused}");
    assert!(objects.count() > 0, "{refused}");
}

/// Certificates of an authority of a test: PEM files.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, "an authority");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, directory }
    }

    fn file(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Writes `NAME.pem` and `NAME.key`.
    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut parameters = CertificateParams::new(names).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, name);
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| Path::new(&self.file(name)).with_extension(end);
        std::fs::write(path("pem"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        std::fs::set_permissions(path("key"), Permissions::from_mode(0o600)).unwrap();
        (path("pem"), path("key"))
    }
}

#[test]
fn tls_is_spoken_with_whom_the_own_authority_knows() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("server");
    let port = free_port().to_string();
    let file = |path: &Path| path.display().to_string();
    let tls = [
        ["--tls-port", &port],
        ["--tls-cert-file", &file(&certificate)],
        ["--tls-key-file", &file(&key)],
        ["--tls-ca-cert-file", &authority.file("ca.pem")],
    ];
    let server = Server::start(tls.as_flattened());
    let url = format!("rediss://127.0.0.1:{port}");
    let (ours, our_key) = authority.issue("ours");
    let trusts = |authority: &Authority| format!("store.redis.ca_file={}", authority.file("ca.pem"));
    let shows = [format!("store.redis.cert_file={}", file(&ours)), format!("store.redis.key_file={}", file(&our_key))];
    let agent = single(&url, &[&[trusts(&authority)][..], &shows].concat());
    agent.datagram("secret:5|c");
    agent.wait_for("secret", "value", 5);
    until("the store to hold it", || {
        (!server.cli(&["--scan", "--pattern", "tallyd:*:s:c:secret"]).trim().is_empty()).then_some(())
    });
    until("the agent to be ready", || (agent.get("/-/ready").status == 200).then_some(()));
    // A node of a cluster tells others where it speaks TLS, in the port of the map.
    let (other_port, bus) = (free_port().to_string(), free_port().to_string());
    let as_node =
        ["--tls-port", &other_port, "--tls-cluster", "yes", "--cluster-enabled", "yes", "--cluster-port", &bus];
    let node = Server::start(&[tls.as_flattened(), &as_node].concat());
    node.cli(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    let in_cluster = [trusts(&authority), "store.redis.mode=cluster".to_owned()];
    let clustered = single(&format!("rediss://127.0.0.1:{other_port}"), &[&in_cluster[..], &shows].concat());
    clustered.datagram("secret:6|c");
    until("the node to hold it", || {
        (!node.cli(&["--scan", "--pattern", "tallyd:*:s:c:secret"]).trim().is_empty()).then_some(())
    });
    clustered.wait_for("secret", "value", 6);
    until("the agent to be ready", || (clustered.get("/-/ready").status == 200).then_some(()));
    // Another authority, the usual ones, and no certificate of our own.
    let other = Authority::new();
    for settings in [&[&[trusts(&other)][..], &shows].concat()[..], &shows, &[trusts(&authority)]] {
        let agent = single(&url, settings);
        until("the agent to say so", || {
            agent.get("/-/ready").text().contains("TLS with Redis failed; compare its certificate").then_some(())
        });
        assert_eq!(agent.own("tallyd_store_connected", ""), 0.0);
    }
}

#[test]
fn a_mode_that_is_not_the_servers_is_told() {
    let cluster = Cluster::start(2, 0);
    let plain = Server::start(&[]);
    let url = |server: &Server| format!("store.redis.url=redis://{}", server.address());
    let as_cluster = ["store.kind=redis", "store.redis.mode=cluster"].map(str::to_owned);
    for (settings, told) in [
        (vec!["store.kind=redis".to_owned(), url(cluster.node(0))], "set store.redis.mode = \\\"cluster\\\""),
        ([&as_cluster[..], &[url(&plain)]].concat(), "but this Redis is none"),
    ] {
        let agent = agent(&settings);
        until("the agent to say so", || agent.get("/-/ready").text().contains(told).then_some(()));
    }
}

#[test]
fn what_is_wrong_is_told_at_the_start() {
    for (settings, code, part) in [
        (&["store.redis.mode=cluster", "store.redis.url=redis://h/3"][..], 78, "store.redis.url = \"redis://h/3\": "),
        (&["store.redis.mode=sentinel"], 78, "name the sentinels"),
        (&["store.redis.nodes=[\"h:1\"]"], 78, "store.redis.nodes = [\"h:1\"]: "),
        (&["store.redis.url=http://u:hunter2@h"], 78, "http://u:***@h"),
        (&["store.redis.url=rediss://h", "store.redis.ca_file=/nonexistent/ca.pem"], 66, "/nonexistent/ca.pem"),
        (&["store.redis.ca_file=/nonexistent/ca.pem"], 78, "rediss://"),
        (&["store.redis.replicas=many"], 78, "write \"auto\", or 0, 1, 2"),
        (&["store.redis.mode=both"], 78, "store.redis.mode = \"both\""),
    ] {
        let output = check(settings);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{settings:?}: {said}");
        assert!(said.contains(part) && said.lines().count() == 1 && !said.contains("hunter2"), "{part} in {said}");
    }
    assert!(check(&["store.redis.mode=cluster", "store.redis.nodes=[\"a:1\",\"redis://b:2\"]"]).status.success());
}
