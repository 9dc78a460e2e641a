//! What the configuration promises: layers, places, remedies, and that it is read as it was written.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::aggregate::etsy;
use crate::units::{Mode, Size, Time};

fn pairs(variables: &[(&str, &str)]) -> Vec<(String, String)> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn load(file: &str, variables: &[(&str, &str)], set: &[&str]) -> Result<Loaded, Vec<String>> {
    let environment = pairs(variables);
    let set: Vec<_> = set.iter().map(|&text| text.to_owned()).collect();
    let sources = Sources { file: Some(("t.toml", file)), environment: &environment, set: &set };
    Config::load(&sources).map_err(|problems| problems.iter().map(ToString::to_string).collect())
}

fn problems(file: &str, variables: &[(&str, &str)], set: &[&str]) -> Vec<String> {
    load(file, variables, set).map(|loaded| loaded.print()).unwrap_err()
}

/// The value of a key after loading, as TOML.
fn value(key: &str, file: &str, variables: &[(&str, &str)], set: &[&str]) -> String {
    let loaded = load(file, variables, set).unwrap();
    literal(get(&loaded.config.tree(), key).unwrap())
}

/// The names of all values of a tree.
fn leaves(tree: &Table, section: &str, out: &mut Vec<String>) {
    for (name, value) in tree {
        let key = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
        match value.as_table() {
            Some(table) if is_section(&key, value) => leaves(table, &key, out),
            Some(_) | None => out.push(key),
        }
    }
}

#[test]
fn every_key_is_described_and_every_description_has_a_key() {
    let tree = Config::default().tree();
    let mut keys = Vec::new();
    leaves(&tree, "", &mut keys);
    let mut described: Vec<_> = KEYS.iter().map(|row| row.name.to_owned()).collect();
    for name in &described {
        assert!(get(&tree, name).is_some(), "KEYS names {name}, which is no key");
    }
    described.retain(|name| !is_section(name, get(&tree, name).unwrap()));
    keys.sort();
    described.sort();
    assert_eq!(keys, described);
    assert!(!keys.is_empty());
}

#[test]
fn bounds_of_series_that_nobody_could_keep_are_refused() {
    let set = |setting| problems("", &[], &[setting]);
    assert_eq!(
        set("limits.source_share=1.5"),
        ["--set: limits.source_share = 1.5: no part of the whole; write 0 to 1"]
    );
    assert_eq!(set("limits.source_share=nan").len(), 1);
    assert_eq!(set("limits.buckets=319"), ["--set: limits.buckets = 319: out of range; write 320 to 2048"]);
    assert_eq!(set("limits.buckets=2049").len(), 1);
    assert_eq!(set("limits.set_exact=1025"), ["--set: limits.set_exact = 1025: out of range; write 0 to 1024"]);
    let set = ["limits.source_share=1", "limits.buckets=320", "limits.set_exact=0", "limits.new_series=0"];
    assert!(load("", &[], &set).is_ok());
}

#[test]
fn the_packaged_file_is_the_printed_defaults() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/tallyd.toml");
    let printed = Config::defaults();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &printed).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), printed, "UPDATE=1 cargo test writes it anew");
    // As it is packaged it says nothing at all: another version's defaults would win over this one's.
    let loaded = load(&printed, &[], &[]).unwrap();
    assert!(loaded.config == Config::default() && loaded.origins.is_empty(), "{:?}", loaded.origins);
    assert_eq!(value("state_dir", &printed, &[("STATE_DIRECTORY", "/var/lib/tallyd")], &[]), "\"/var/lib/tallyd\"");
}

#[test]
fn every_line_of_the_packaged_file_can_be_taken_in() {
    let names =
        |line: &str| line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
    let lines = Config::defaults();
    let all: String = lines.lines().map(|line| line[usize::from(names(line))..].to_owned() + "\n").collect();
    let loaded = load(&all, &[], &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    let keys: Vec<_> = Config::described().filter(|(_, default)| default.is_some()).map(|(key, _)| key.name).collect();
    assert!(keys.len() > 50 && keys.iter().all(|key| loaded.origins.contains_key(*key)), "{:?}", loaded.origins);
    assert_eq!(loaded.origins.len(), keys.len());
}

#[test]
fn the_seeds_variables_set_the_keys_that_are_named_for_them() {
    for (name, key) in SEED {
        let value = if *name == "STORE" { "INMEMORY" } else { "7" };
        let loaded = load("", &[(name, value)], &[]).unwrap();
        assert_eq!(loaded.origins.keys().collect::<Vec<_>>(), [key], "{name}");
    }
}

#[test]
fn a_higher_layer_wins() {
    let file = "[store.redis]\nurl = 'redis://file'";
    let (seed, own) = (("REDIS_HOST", "seed"), ("TALLYD_STORE__REDIS__URL", "redis://own"));
    let set = ["store.redis.url=redis://first", "store.redis.url=redis://last"];
    let url = |file, variables: &[(&str, &str)], set: &[&str]| value("store.redis.url", file, variables, set);
    assert_eq!(url("", &[], &[]), "\"redis://127.0.0.1:6379\"");
    assert_eq!(url(file, &[], &[]), "\"redis://file\"");
    assert_eq!(url(file, &[seed], &[]), "\"redis://seed:6379\"");
    assert_eq!(url(file, &[own, seed], &[]), "\"redis://own\"");
    assert_eq!(url(file, &[own, seed], &set), "\"redis://last\"");
}

#[test]
fn each_key_tells_its_origin() {
    let loaded = load("[flush]\nwindow = '20s'", &[("TALLYD_LOG__LEVEL", "warn")], &["http.insecure=true"]).unwrap();
    let printed = loaded.print();
    for line in [
        "window = \"20s\"  # t.toml:2:10",
        "level = \"warn\"  # environment TALLYD_LOG__LEVEL",
        "insecure = true  # --set",
        "interval = \"1s\"  # built in",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{line} in {printed}");
    }
}

#[test]
fn the_state_directory_is_systemds_unless_the_operator_says() {
    let systemd = ("STATE_DIRECTORY", "/var/lib/tallyd:/var/lib/other");
    assert_eq!(value("state_dir", "", &[], &[]), "\"tallyd-data\"");
    assert_eq!(value("state_dir", "", &[systemd], &[]), "\"/var/lib/tallyd\"");
    assert_eq!(value("state_dir", "state_dir = '/file'", &[systemd], &[]), "\"/file\"");
    assert_eq!(value("state_dir", "", &[systemd, ("TALLYD_STATE_DIR", "/own")], &[]), "\"/own\"");
}

#[test]
fn text_is_read_as_the_keys_type() {
    for (argument, key, expected) in [
        ("listen.udp=127.0.0.1:1, [::1]:1", "listen.udp", "[\"127.0.0.1:1\", \"[::1]:1\"]"),
        ("listen.udp=", "listen.udp", "[]"),
        ("listen.udp=[::1]:1", "listen.udp", "[\"[::1]:1\"]"),
        ("listen.udp=[\"127.0.0.1:1\"]", "listen.udp", "[\"127.0.0.1:1\"]"),
        ("flush.percentiles=50,99.9,-10", "flush.percentiles", "[50, 99.9, -10]"),
        ("flush.percentiles=", "flush.percentiles", "[]"),
        ("listen.workers=3", "listen.workers", "3"),
        ("listen.receive_buffer=4096", "listen.receive_buffer", "\"4KiB\""),
        ("store.redis.prefix=\"a b\"", "store.redis.prefix", "\"a b\""),
        ("store.redis.prefix=a=b", "store.redis.prefix", "\"a=b\""),
        ("store.redis.prefix=7", "store.redis.prefix", "\"7\""),
    ] {
        assert_eq!(value(key, "", &[], &[argument]), expected, "{argument}");
        let (_, text) = argument.split_once('=').unwrap();
        let variable = format!("TALLYD_{}", key.to_uppercase().replace('.', "__"));
        assert_eq!(value(key, "", &[(&variable, text)], &[]), expected, "{variable}={text}");
    }
}

#[test]
fn the_seeds_names_work() {
    for (name, text, key, expected) in [
        ("INGEST_PORT", "9000", "http.ingest", "[\"127.0.0.1:9000\", \"[::1]:9000\"]"),
        ("API_PORT", "9001", "http.api", "[\"127.0.0.1:9001\", \"[::1]:9001\"]"),
        ("STORE", "INMEMORY", "store.kind", "\"memory\""),
        ("STORE", "EMBEDDED", "store.kind", "\"embedded\""),
        ("STORE", "REDIS", "store.kind", "\"redis\""),
        ("STORE", "", "store.kind", "\"embedded\""),
        ("REDIS_HOST", "cache", "store.redis.url", "\"redis://cache:6379\""),
        ("REDIS_HOST", "::1", "store.redis.url", "\"redis://[::1]:6379\""),
        ("REDIS_PORT", "7777", "store.redis.url", "\"redis://127.0.0.1:7777\""),
        ("KAFKA_BOOTSTRAP_SERVERS", "a:9092, b:9092", "kafka.brokers", "[\"a:9092\", \"b:9092\"]"),
        ("KAFKA_TOPIC", "metrics", "kafka.topic", "\"metrics\""),
    ] {
        assert_eq!(value(key, "", &[(name, text)], &[]), expected, "{name}={text}");
    }
    let both = [("REDIS_HOST", "cache"), ("REDIS_PORT", "7777")];
    assert_eq!(value("store.redis.url", "", &both, &[]), "\"redis://cache:7777\"");
    #[cfg(feature = "kafka")]
    assert_eq!(value("store.kind", "", &[("STORE", "KAFKA")], &[]), "\"kafka\"");
    #[cfg(not(feature = "kafka"))]
    assert_eq!(
        problems("", &[("STORE", "KAFKA")], &[]),
        [
            "environment STORE: store.kind = \"kafka\": this build has no Kafka; take a release build, or one of cargo build --features kafka; the default is \"embedded\""
        ]
    );
    assert_eq!(
        problems("", &[("API_PORT", "http"), ("REDIS_PORT", "99999"), ("STORE", "disk")], &[]),
        [
            "environment API_PORT: API_PORT = \"http\": no port; write a number from 0 to 65535",
            "environment STORE: STORE = \"disk\": no store; write INMEMORY, EMBEDDED, REDIS or KAFKA",
            "environment REDIS_PORT: REDIS_PORT = \"99999\": no port; write a number from 0 to 65535",
        ]
    );
}

#[test]
fn what_kubernetes_sets_for_services_of_these_names_is_no_setting() {
    let links = [
        ("REDIS_PORT", "tcp://10.0.0.1:6379"),
        ("API_PORT", "tcp://10.0.0.2:80"),
        ("TALLYD_SERVICE_HOST", "10.0.0.3"),
        ("TALLYD_SERVICE_PORT", "8125"),
        ("TALLYD_SERVICE_PORT_STATSD", "8125"),
        ("TALLYD_PORT", "udp://10.0.0.3:8125"),
        ("TALLYD_PORT_8125_UDP", "udp://10.0.0.3:8125"),
        ("TALLYD_PORT_8125_UDP_ADDR", "10.0.0.3"),
        ("TALLYD_API_PORT", "tcp://10.0.0.4:7000"),
    ];
    assert_eq!(load("", &links, &[]).unwrap(), load("", &[], &[]).unwrap());
}

#[test]
fn an_unknown_key_is_an_error_with_its_place_and_the_nearest_key() {
    let file = "state_dirr = 'x'\n[lisen]\nudp = []\n[flush]\n  intervall = '1s'\n[store.redis]\nurl = 'redis://a'\nprefx = ''\n";
    assert_eq!(
        problems(file, &[("TALLYD_LISTEN_UDP", ""), ("TALLYD_PORT", "9")], &["flush.windo=1s", "port=1"]),
        [
            "t.toml:1:1: unknown key \"state_dirr\"; did you mean \"state_dir\"?",
            "t.toml:2:2: unknown key \"lisen\"; did you mean \"listen\"?",
            "t.toml:5:3: unknown key \"flush.intervall\"; did you mean \"flush.interval\"?",
            "t.toml:8:1: unknown key \"store.redis.prefx\"; did you mean \"store.redis.prefix\"?",
            "environment TALLYD_LISTEN_UDP: unknown key \"TALLYD_LISTEN_UDP\"; did you mean \"TALLYD_LISTEN__UDP\"?",
            "environment TALLYD_PORT: unknown key \"TALLYD_PORT\"; `tallyd check --print-defaults` lists all keys",
            "--set: unknown key \"flush.windo\"; did you mean \"flush.window\"?",
            "--set: unknown key \"port\"; `tallyd check --print-defaults` lists all keys",
        ]
    );
    assert_eq!(
        problems("interval = '1s'", &[], &[]),
        ["t.toml:1:1: unknown key \"interval\"; did you mean \"flush.interval\"?"]
    );
}

#[test]
fn a_wrong_value_is_named_with_its_place_and_the_remedy() {
    for (file, message) in [
        ("[flush]\ninterval = 10", "t.toml:2:12: flush.interval = 10: "),
        ("[flush]\ninterval = 10", "write a duration such as \"10s\"; the default is \"1s\""),
        (
            "[listen]\nworkers = 'all'",
            "t.toml:2:11: listen.workers = \"all\": invalid type: string \"all\", expected a whole number, 0 or more; the default is 0",
        ),
        ("[listen]\nworkers = -1", "t.toml:2:11: listen.workers = -1: "),
        ("listen = 1", "t.toml:1:10: listen = ...: it is a section; write [listen] and its keys below"),
        ("[listen.udp]\na = 1", "t.toml:1:1: listen.udp = "),
        ("[store]\nkind = 'disk'", "no store; write \"memory\", \"embedded\", \"redis\" or \"kafka\""),
        ("[flush]\n\nwindow = ", "t.toml:3:10: no TOML: "),
        ("[flush]\nwindow = '1s'\nwindow = '2s'", "t.toml:3:1: no TOML: "),
    ] {
        let problems = problems(file, &[], &[]);
        assert!(problems.len() == 1 && problems[0].contains(message), "{file:?}: {problems:?}");
        assert!(!problems[0].contains('\n'));
    }
    assert_eq!(
        problems("", &[], &["flush.window"]),
        ["--set: \"flush.window\" lacks a value; write section.key=value"]
    );
    assert_eq!(problems("[listen]\nworkers = 'a'\nlinger = 'b'", &[("TALLYD_HTTP__INSECURE", "si")], &[]).len(), 3);
}

#[test]
fn the_interval_divides_the_window() {
    for (file, place) in [
        (
            "[flush]\ninterval = '3s'",
            "t.toml:2:12: flush.interval = \"3s\": the interval (3s) must divide the window (10s)",
        ),
        ("[flush]\nwindow = '1500ms'", "t.toml:2:10: flush.window = \"1s 500ms\": "),
        ("[flush]\ninterval = '0s'", "t.toml:2:12: flush.interval = \"0s\": "),
        ("[flush]\nwindow = '0s'", "t.toml:2:10: flush.window = \"0s\": "),
    ] {
        let problems = problems(file, &[], &[]);
        assert!(problems.len() == 1 && problems[0].starts_with(place), "{problems:?}");
    }
    assert!(load("[flush]\ninterval = '250ms'\nwindow = '1s'", &[], &[]).is_ok());
}

#[test]
fn addresses_are_addresses_and_each_has_one_owner() {
    for argument in
        ["listen.udp=localhost:8125", "listen.tcp=:8125", "http.api=127.0.0.1", "http.scrape=127.0.0.1:70000"]
    {
        let (key, text) = argument.split_once('=').unwrap();
        let expected = format!("--set: {key} = \"{text}\": no address with a port");
        assert!(problems("", &[], &[argument])[0].starts_with(&expected), "{argument}");
    }
    assert_eq!(
        problems("", &[], &["http.scrape=127.0.0.1:7000"]),
        ["--set: http.scrape = \"127.0.0.1:7000\": http.api has this address already; take another port"]
    );
    assert!(load("", &[], &["http.api=127.0.0.1:0", "http.ingest=127.0.0.1:0", "http.scrape=127.0.0.1:0"]).is_ok());
    assert!(load("", &[], &["listen.udp=127.0.0.1:7000"]).is_ok(), "UDP has its own ports");
}

#[test]
fn unix_sockets_have_absolute_paths_each_its_own() {
    let problem = |set: &[&str]| problems("", &[], set).join("\n");
    assert!(problem(&["listen.unix=run/x"]).contains("begins with /"));
    assert!(problem(&[&format!("listen.unixgram=/{}", "x".repeat(107))]).contains("at most 107 bytes"));
    assert!(problem(&["listen.unix=/run/x", "listen.unixgram=/run/x"]).contains("listen.unixgram has this path"));
    assert!(load("", &[], &["listen.unix=/run/x", "listen.unixgram=/run/y"]).is_ok());
}

#[test]
fn numbers_are_numbers_within_their_range() {
    for text in ["nan", "0", "-0.5", "1.5", "inf"] {
        let problems = problems(&format!("limits.sample_rate_min = {text}"), &[], &[]);
        assert!(problems[0].contains("above 0 and not above 1"), "{text}: {problems:?}");
    }
    for list in ["[nan]", "[90, -101]", "[inf]"] {
        let problems = problems(&format!("flush.percentiles = {list}"), &[], &[]);
        assert!(problems.len() == 1 && problems[0].contains("from -100 to 100"), "{list}: {problems:?}");
    }
}

#[test]
fn graphite_has_an_address_and_names_that_it_can_have() {
    for to in ["graphite", ":2003", "graphite:0", "graphite:x", "a b:2003", "tcp://"] {
        let problems = problems(&format!("export.graphite.to = {to:?}"), &[], &[]);
        assert!(problems.len() == 1 && problems[0].contains("write \"host:port\""), "{to}: {problems:?}");
    }
    for to in ["", "graphite.example:2003", "[::1]:2003", "127.0.0.1:1"] {
        assert!(load("", &[], &[&format!("export.graphite.to={to}")]).is_ok(), "{to}");
    }
    let problems = problems("[export.graphite]\nprefix_set = \"a b\"", &[], &[]);
    assert!(problems[0].contains("export.graphite.prefix_set = \"a b\": write letters"), "{problems:?}");
}

#[test]
fn bins_and_whether_idle_series_are_left_out_are_read_in_every_layer() {
    let bins = r#"[{ metric = "a", bins = [0.5, 10, "inf"] }, { metric = "", bins = [] }]"#;
    for (file, argument) in [(format!("flush.histograms = {bins}"), None), (String::new(), Some(bins))] {
        let argument = argument.map(|bins| format!("flush.histograms={bins}"));
        let loaded = load(&file, &[], &argument.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        let histograms = &loaded.config.flush.etsy.histograms;
        assert_eq!((histograms[0].bins.as_slice(), histograms.len()), (&[0.5, 10.0, f64::INFINITY][..], 2));
    }
    for wrong in ["[2, 1]", "[nan]", "[1, \"x\"]"] {
        let problems = problems(&format!("flush.histograms = [{{ metric = \"a\", bins = {wrong} }}]"), &[], &[]);
        assert!(problems.len() == 1 && problems[0].contains("write numbers"), "{wrong}: {problems:?}");
    }
    let environment = [("TALLYD_FLUSH__DELETE_SETS", "false"), ("TALLYD_FLUSH__DELETE_TIMERS", "true")];
    let loaded = load("flush.delete_counters = true", &environment, &["flush.delete_gauges=auto"]).unwrap();
    let etsy = loaded.config.flush.etsy;
    let left = [etsy.delete_counters, etsy.delete_timers, etsy.delete_sets, etsy.delete_gauges];
    assert_eq!(left, [etsy::Left::Out, etsy::Left::Out, etsy::Left::In, etsy::Left::Auto]);
    let problems = problems("flush.delete_sets = \"no\"", &[], &[]);
    assert!(problems[0].contains("write true, false"), "{problems:?}");
}

#[test]
fn writes_from_other_machines_are_refused_unless_asked_for() {
    for argument in ["http.ingest=0.0.0.0:8000", "http.api=[::]:7000", "http.api=192.0.2.1:7000"] {
        let problems = problems("", &[], &[argument]);
        assert!(problems.len() == 1 && problems[0].contains("http.insecure = true"), "{problems:?}");
        assert!(load("[http]\ninsecure = true", &[], &[argument]).is_ok());
    }
    assert!(load("", &[], &["http.scrape=0.0.0.0:9102", "listen.udp=0.0.0.0:8125"]).is_ok());
    assert!(load("", &[], &["http.api=127.1.2.3:7000,[::ffff:127.0.0.1]:7000"]).is_ok());
}

#[test]
fn what_a_part_refuses_is_told_with_its_place() {
    for (file, expected) in [
        ("quantiles = [0.5, 2]", "t.toml:2:13: prometheus.quantiles: 2 is no quantile; "),
        ("buckets = [inf]", "t.toml:2:11: prometheus.buckets: inf is not finite; "),
        ("native_bucket_factor = 1", "t.toml:2:24: prometheus.native_bucket_factor: 1 is not above 1; "),
        ("buckets = [1, 1]", "t.toml:2:11: prometheus.buckets: 1 is not above the bound before it; "),
    ] {
        let problems = problems(&format!("[prometheus]\n{file}"), &[], &[]);
        assert!(problems.len() == 1 && problems[0].starts_with(expected), "{problems:?}");
    }
}

#[test]
fn a_password_is_not_printed() {
    let set = ["store.redis.url=redis://u:hunter2@h"];
    assert!(!load("", &[], &set).unwrap().print().contains("hunter2"));
    let set = ["store.redis.nodes=[\"redis://u:hunter2@h\"]", "store.redis.url=unix:///s?pass=hunter2"];
    assert!(!load("", &[], &set).unwrap().print().contains("hunter2"));
    for key in ["listen.udp", "listen.workers", "store.kind"] {
        let wrong = problems("", &[], &[&format!("{key}=redis://u:hunter2@h")]).concat();
        assert!(wrong.contains("***") && !wrong.contains("hunter2"), "{wrong}");
    }
}

#[test]
fn options_of_librdkafka_are_a_table_and_their_secrets_are_not_printed() {
    let file = "[kafka]\noptions = { 'security.protocol' = 'SASL_SSL', 'sasl.password' = 'hunter2' }\n";
    let loaded = load(file, &[], &[]).unwrap();
    assert_eq!(loaded.config.kafka.options["security.protocol"], "SASL_SSL");
    let printed = loaded.print();
    assert!(printed.contains("SASL_SSL") && printed.contains("***") && !printed.contains("hunter2"), "{printed}");
    let set = ["kafka.options={ 'linger.ms' = '7' }"];
    assert_eq!(load("", &[], &set).unwrap().config.kafka.options["linger.ms"], "7");
    let variable = [("TALLYD_KAFKA__OPTIONS", "{ 'linger.ms' = '8' }")];
    assert_eq!(load("", &variable, &[]).unwrap().config.kafka.options["linger.ms"], "8");
    assert_eq!(problems("", &[], &["kafka.options=hunter2"]).len(), 1);
}

#[cfg(feature = "kafka")]
#[test]
fn an_option_that_librdkafka_does_not_have_is_refused_at_its_place() {
    for (option, said) in [
        ("'sekurity.protocol' = 'x'", "No such configuration property"),
        ("'sasl.password.x' = 'hunter2'", "No such configuration property"),
        ("'linger.ms' = 'hunter2'", "linger.ms"),
        ("'group.id' = 'x'", "is set by tallyd"),
    ] {
        let told = problems(&format!("[kafka]\noptions = {{ {option} }}\n"), &[], &[]);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with("t.toml:2:11: kafka.options: ") && told[0].contains(said), "{told:?}");
        assert!(!told[0].contains("hunter2"), "{told:?}");
    }
}

#[test]
fn a_reload_takes_what_it_may_and_is_refused_as_a_whole_otherwise() {
    let config = |set: &[&str]| load("", &[], set).unwrap().config;
    let old = config(&[]);
    assert_eq!(old.reload(&old), Ok(vec![]));
    assert_eq!(old.reload(&config(&["protocol.gauge_sign=absolute"])), Ok(vec!["protocol.gauge_sign"]));
    assert_eq!(
        old.reload(&config(&["protocol.gauge_sign=absolute", "flush.window=20s", "state_dir=/x"])),
        Err(vec!["state_dir", "flush.window"])
    );
    assert_eq!(old.reload(&config(&["store.redis.url=redis://:new@127.0.0.1:6379"])), Err(vec!["store.redis.url"]));
}

#[test]
fn other_rules_in_the_same_file_are_a_change() {
    let with = |rules: &str| {
        let mut loaded = load("", &[], &["mapping.file=rules.yml"]).unwrap();
        loaded.set_mapping(rules).unwrap();
        loaded.config
    };
    let (one, other) = (with("mappings: []\n"), with("mappings: [{match: a, name: b}]\n"));
    assert_eq!(one.reload(&one), Ok(vec![]));
    assert_eq!(one.reload(&other), Ok(vec!["mapping.file"]));
}

/// Another value that the key may have.
fn another(key: &str, default: &Value) -> BoxedStrategy<Value> {
    let address = (any::<u128>(), any::<bool>(), 1..u16::MAX).prop_map(|(ip, six, port)| {
        let ip = if six { IpAddr::from(Ipv6Addr::from(ip)) } else { IpAddr::from((ip as u32).to_be_bytes()) };
        Value::from(SocketAddr::new(ip, port).to_string())
    });
    if ADDRESSES.iter().any(|(name, _)| *name == key) {
        return proptest::collection::vec(address, 0..4).prop_map(Value::Array).boxed();
    }
    let either = |choices: &'static [&str]| proptest::sample::select(choices).prop_map(Value::from).boxed();
    match (key, default) {
        ("store.redis.mode", _) => either(&["single", "sentinel", "cluster"]),
        ("store.redis.replicas", _) => (0..9_i64).prop_map(Value::from).boxed(),
        ("store.kind", _) if kafka::BUILT => either(&["memory", "embedded", "redis", "kafka"]),
        ("store.kind", _) => either(&["memory", "embedded", "redis"]),
        ("kafka.topic", _) => "[A-Za-z0-9_-]{1,20}".prop_map(Value::from).boxed(),
        ("store.kafka.topic", _) => "[A-Za-z0-9_-]{21,30}".prop_map(Value::from).boxed(),
        ("kafka.group", _) => "\\PC+".prop_map(Value::from).boxed(),
        ("kafka.brokers", _) => proptest::collection::vec("[a-z]{1,9}:[1-9][0-9]{0,3}".prop_map(Value::from), 1..4)
            .prop_map(Value::Array)
            .boxed(),
        ("kafka.options", _) => (1..900_u32)
            .prop_map(|ms| Table::from_iter([("linger.ms".to_owned(), Value::from(ms.to_string()))]).into())
            .boxed(),
        ("export.relay.to", _) => proptest::collection::btree_set("[a-z]{1,9}\\.example:[1-9][0-9]{0,3}", 0..4)
            .prop_map(|targets| Value::Array(targets.into_iter().map(Value::from).collect()))
            .boxed(),
        ("export.relay.packet", _) => (64..=65_507_u64).prop_map(|size| Value::from(Size(size).to_string())).boxed(),
        ("log.level", _) => either(&["error", "warn", "info", "debug", "trace"]),
        ("protocol.name_policy", _) => either(&["etsy", "none"]),
        ("protocol.gauge_sign", _) => either(&["relative", "absolute"]),
        ("prometheus.quantiles", _) => {
            proptest::collection::vec((0.0..=1.0_f64).prop_map(Value::Float), 0..4).prop_map(Value::Array).boxed()
        }
        ("prometheus.buckets", _) => proptest::collection::btree_set(-1_000_000..1_000_000, 0..9)
            .prop_map(|bounds| bounds.into_iter().map(|bound| Value::Float(f64::from(bound) / 1024.0)).collect())
            .prop_map(Value::Array)
            .boxed(),
        ("prometheus.native_bucket_factor", _) => (1.001..100.0_f64).prop_map(Value::Float).boxed(),
        ("prometheus.observer_type", _) => either(&["summary", "histogram"]),
        ("protocol.tag_dialects", Value::Array(all)) => {
            proptest::sample::subsequence(all.clone(), 0..=all.len()).prop_map(Value::Array).boxed()
        }
        ("listen.unixgram" | "listen.unix", _) => {
            let directory = format!("/{key}/");
            let path = "\\PC{1,20}".prop_map(move |name| format!("{directory}{name}"));
            proptest::collection::btree_set(path, 0..4)
                .prop_map(|paths| Value::Array(paths.into_iter().map(Value::from).collect()))
                .boxed()
        }
        ("limits.buckets", _) => (320..=2_048_i64).prop_map(Value::from).boxed(),
        ("export.graphite.to", _) => "([a-z]{1,9}:[1-9][0-9]{0,3})?".prop_map(Value::from).boxed(),
        ("export.graphite.protocol", _) => either(&["plaintext", "pickle"]),
        (name, Value::String(_)) if name.starts_with("export.graphite.") => {
            "[A-Za-z0-9_.=-]{0,20}".prop_map(Value::from).boxed()
        }
        ("ingest.forward", _) if kafka::BUILT => either(&["none", "kafka"]),
        ("ingest.forward", _) => either(&["none"]),
        // A build without Kafka refuses it.
        ("listen.kafka", _) => Just(Value::from(false)).boxed(),
        ("listen.unix_mode", _) => (0..=0o777_u32).prop_map(|mode| Value::from(Mode(mode).to_string())).boxed(),
        ("http.insecure", _) => Just(Value::from(true)).boxed(),
        ("flush.delete_counters" | "flush.delete_timers" | "flush.delete_sets" | "flush.delete_gauges", _) => {
            any::<bool>().prop_map(Value::from).boxed()
        }
        ("flush.histograms", _) => {
            let bins = proptest::collection::btree_set(-1_000..1_000, 0..5).prop_map(bounds_with_infinity);
            let entry = ("\\PC*", bins).prop_map(|(metric, bins)| {
                Value::from(Table::from_iter([("metric".to_owned(), metric.into()), ("bins".to_owned(), bins)]))
            });
            proptest::collection::vec(entry, 0..3).prop_map(Value::Array).boxed()
        }
        ("flush.interval", _) => proptest::sample::select(&[100, 250, 500, 1000, 5000][..]).prop_map(time).boxed(),
        ("flush.window", _) => (1..50_u64).prop_map(|n| time(n * 5000)).boxed(),
        (_, Value::Array(items)) if matches!(items.first(), Some(Value::Float(_))) => {
            proptest::collection::vec((-100.0..100.0_f64).prop_map(Value::Float), 0..4).prop_map(Value::Array).boxed()
        }
        (_, Value::Array(_)) => {
            proptest::collection::vec("\\PC*".prop_map(Value::from), 0..4).prop_map(Value::Array).boxed()
        }
        (_, Value::Integer(_)) => (1..200_i64).prop_map(Value::from).boxed(),
        (_, Value::Float(_)) => (1e-9..1.0_f64).prop_map(Value::from).boxed(),
        (_, Value::Boolean(_)) => any::<bool>().prop_map(Value::from).boxed(),
        (_, Value::String(text)) if text.parse::<Time>().is_ok() => (1..1_000_000_000_u64).prop_map(time).boxed(),
        (_, Value::String(text)) if text.parse::<Size>().is_ok() => {
            (1..1_u64 << 40).prop_map(|size| Value::from(Size(size).to_string())).boxed()
        }
        ("state_dir", _) => "\\PC+".prop_map(Value::from).boxed(),
        (_, Value::String(_)) => any::<String>().prop_map(Value::from).boxed(),
        (_, Value::Datetime(_) | Value::Table(_)) => panic!("{key} has a type that no key has"),
    }
}

fn bounds_with_infinity(bounds: BTreeSet<i32>) -> Value {
    let bounds = bounds.into_iter().map(|bound| f64::from(bound) / 8.0);
    Value::Array(bounds.chain([f64::INFINITY]).map(Value::Float).collect())
}

fn time(millis: u64) -> Value {
    Value::from(Time::millis(millis).to_string())
}

fn configs() -> impl Strategy<Value = Config> {
    let defaults = Config::default().tree();
    let mut keys = Vec::new();
    leaves(&defaults, "", &mut keys);
    let values: Vec<_> = keys.iter().map(|key| another(key, get(&defaults, key).unwrap())).collect();
    values.prop_map(move |values| {
        let mut tree = defaults.clone();
        for (key, value) in keys.iter().zip(values) {
            put(&mut tree, key, value);
        }
        Config::deserialize(Value::Table(tree)).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_configuration_is_read_as_it_was_written(config in configs()) {
        // Two random addresses of one list are equal so rarely that no case is spent on it.
        let sources = Sources { file: Some(("t.toml", &config.to_toml())), ..Sources::default() };
        let loaded = Config::load(&sources).map_err(|problems| TestCaseError::fail(problems[0].to_string()))?;
        prop_assert_eq!(&loaded.config, &config);
        prop_assert_eq!(Config::default().reload(&config).is_ok(), config.reload(&Config::default()).is_ok());
    }

    #[test]
    fn no_text_brings_the_reader_down(file in any::<String>(), name in "TALLYD_[A-Z_]*", value in any::<String>(), set in any::<String>()) {
        let (environment, set) = ([(name, value)], [set]);
        let _ = Config::load(&Sources { file: Some(("t.toml", &file)), environment: &environment, set: &set });
    }
}
