//! The house rules that a machine can check: what stands at the top level, which part may name which, how files open.

#![allow(clippy::unwrap_used, reason = "a test ends where it finds something wrong")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each part of `src/` and the parts it may name. `config`, `agent` and `cli` put the others together.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("sample", &[]),
    ("receipt", &[]),
    ("clock", &[]),
    ("units", &[]),
    ("sync", &[]),
    ("telemetry", &[]),
    ("secret", &[]),
    ("tls", &["secret", "telemetry"]),
    ("heartbeat", &[]),
    ("systemd", &[]),
    ("kafka", &["secret"]),
    ("protocol", &["sample"]),
    ("aggregate", &["sample"]),
    ("mapping", &["sample"]),
    ("ingest", &["sample", "receipt", "protocol", "aggregate", "mapping", "clock", "heartbeat", "sync", "telemetry"]),
    ("inherited", &[]),
    ("listen", &["sample", "ingest", "inherited", "kafka", "tls", "clock", "heartbeat", "telemetry"]),
    ("handover", &["ingest", "inherited", "listen"]),
    ("store", &["sample", "receipt", "aggregate", "kafka", "secret", "clock", "telemetry"]),
    ("flush", &["sample", "receipt", "aggregate", "ingest", "store", "clock", "heartbeat", "sync", "telemetry"]),
    ("view", &["sample", "aggregate", "ingest", "store", "flush", "clock"]),
    (
        "http",
        &[
            "sample",
            "receipt",
            "protocol",
            "aggregate",
            "mapping",
            "flush",
            "ingest",
            "inherited",
            "store",
            "view",
            "export",
            "kafka",
            "secret",
            "tls",
            "clock",
            "heartbeat",
            "telemetry",
        ],
    ),
    (
        "export",
        &[
            "sample",
            "aggregate",
            "ingest",
            "inherited",
            "listen",
            "view",
            "clock",
            "heartbeat",
            "sync",
            "tls",
            "telemetry",
        ],
    ),
];

/// Parts that may name any other, in the order of who names whom.
const COMPOSE: &[&str] = &["config", "agent", "cli", "main", "lib"];

/// What every part may name: words for configuration values.
const ANYBODY: &str = "units";

const TOP: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "src",
    "fuzz",
    "benches",
    "tests",
    "packaging",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "clippy.toml",
    "rustfmt.toml",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The part a file of `src/` belongs to: its folder, or its own name.
fn part_of(file: &Path) -> String {
    let inside = file.strip_prefix(root().join("src")).unwrap();
    inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The parts a file names by `crate::part`, each with the first line where it does; comments and tests left out.
fn named(file: &Path) -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    if file.file_name().is_some_and(|name| name == "tests.rs") {
        return names;
    }
    let text = fs::read_to_string(file).unwrap();
    // Unit tests stand at the end of a file; what else is for tests alone stands anywhere, and ends nothing.
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    for (number, line) in code.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            let group = rest.strip_prefix('{').map_or_else(|| vec![rest], |group| group.split(',').collect());
            for item in group {
                let name: String = item.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                if !name.is_empty() {
                    names.entry(name).or_insert(number + 1);
                }
            }
        }
    }
    names
}

#[test]
fn parts_name_only_what_they_may() {
    let mut wrong = Vec::new();
    let mut parts = BTreeSet::new();
    for file in rust_files(&root().join("src")).into_iter().filter(|file| !is_test(file)) {
        let part = part_of(&file);
        parts.insert(part.clone());
        if COMPOSE.contains(&part.as_str()) {
            continue;
        }
        let Some((_, may)) = MAY_NAME.iter().find(|(name, _)| *name == part) else {
            wrong.push(format!("{}: no such part in the house", file.display()));
            continue;
        };
        for (name, line) in named(&file) {
            if name != part && name != ANYBODY && !may.contains(&name.as_str()) {
                wrong.push(format!("{}:{line}: {part} may not name {name}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(parts.len() > 5, "only {parts:?} were looked at");
}

#[test]
fn no_part_names_itself_through_others() {
    fn reach(part: &str, seen: &mut Vec<String>) {
        assert!(!seen.iter().any(|name| name == part), "a cycle: {seen:?} -> {part}");
        seen.push(part.to_owned());
        let may = MAY_NAME.iter().find(|(name, _)| *name == part).map_or(&[][..], |(_, may)| *may);
        may.iter().for_each(|next| reach(next, seen));
        seen.pop();
    }
    MAY_NAME.iter().for_each(|(part, _)| reach(part, &mut Vec::new()));
}

#[test]
fn every_file_says_what_it_is_for() {
    let folders = ["src", "tests", "benches", "fuzz"].map(|folder| rust_files(&root().join(folder)));
    let silent: Vec<_> = folders.concat().into_iter().filter(|file| !opens_with_a_doc(file)).collect();
    assert!(silent.is_empty(), "no module doc at the top of {silent:?}");
}

/// Unit tests in a file of their own may put parts together.
fn is_test(file: &Path) -> bool {
    file.components().any(|name| ["tests", "tests.rs"].contains(&name.as_os_str().to_str().unwrap_or_default()))
}

fn opens_with_a_doc(file: &Path) -> bool {
    fs::read_to_string(file).unwrap().starts_with("//!")
}

#[test]
fn no_file_is_named_for_nothing() {
    let vague = ["util", "utils", "common", "helper", "helpers", "manager", "handler", "processor", "misc"];
    for file in rust_files(&root().join("src")) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        assert!(!vague.contains(&name), "{}", file.display());
    }
}

#[test]
fn the_top_level_is_fixed() {
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_state = ["target", "tallyd-data", "proptest-regressions"].contains(&name.as_str());
        assert!(TOP.contains(&name.as_str()) || name.starts_with('.') || is_state, "{name} at the top level");
    }
}

#[test]
fn unsafe_code_stands_only_where_it_is_fenced() {
    for file in rust_files(&root().join("src")) {
        let text = fs::read_to_string(&file).unwrap();
        let fenced = text.contains("#![allow(unsafe_code");
        // System calls that std lacks, and a prefetch.
        let may = file.ends_with("listen/burst.rs") || file.ends_with("aggregate/index.rs");
        assert!(!fenced || may, "{} allows unsafe code", file.display());
    }
}

#[test]
fn every_file_of_tests_is_run() {
    for file in rust_files(&root().join("tests/it")) {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let folder = file.parent().unwrap();
        // A folder is named by its own name, in the list above it.
        let (name, folder) = match name {
            "mod" => (folder.file_name().unwrap().to_str().unwrap(), folder.parent().unwrap()),
            name => (name, folder),
        };
        let list = ["main.rs", "mod.rs"].map(|list| fs::read_to_string(folder.join(list)).unwrap_or_default()).concat();
        let is_part = name == "main" || list.lines().any(|line| line == format!("mod {name};"));
        assert!(is_part, "{} is not named in main.rs or mod.rs beside it", file.display());
    }
}
