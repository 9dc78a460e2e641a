//! What packages install, as far as that shows without making one: pages and completions as their readers take them, the
//! files that `Cargo.toml` names, scripts, and the dashboard's metrics. `packaging/deb.sh` and `rpm.sh` look over the rest.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tallyd::telemetry::{ALL, PROCESS, Shape};

use crate::agent::tallyd;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

fn printed(arguments: &[&str]) -> Vec<u8> {
    let output = tallyd().args(arguments).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    output.stdout
}

/// What a program says of what stands on its standard input; none where it is not installed, which is said.
fn said(program: &str, arguments: &[&str], input: &[u8]) -> Option<Output> {
    let child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C.UTF-8")
        .env("MANWIDTH", "80")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("skipped: {program} is not installed");
        return None;
    };
    // Who reads names a file has no use for it.
    drop(child.stdin.take().unwrap().write_all(input));
    Some(child.wait_with_output().unwrap())
}

fn has_nothing_to_say(program: &str, arguments: &[&str], input: &[u8]) {
    let Some(output) = said(program, arguments, input) else { return };
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.is_empty(), "{program} {arguments:?}: {text}");
}

#[test]
fn manual_pages_are_clean_and_readable() {
    let directory = tempfile::tempdir().unwrap();
    for (page, heading) in [("tallyd", "TALLYD(1)"), ("tallyd.toml", "TALLYD.TOML(5)")] {
        let roff = printed(&["man", page, "--date", "2026-01-31"]);
        has_nothing_to_say("mandoc", &["-T", "lint", "-W", "style"], &roff);
        let file = directory.path().join(page);
        std::fs::write(&file, &roff).unwrap();
        let Some(output) = said("man", &["--warnings", "-E", "UTF-8", "-l", file.to_str().unwrap()], b"") else {
            continue;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        // An image of a container may have a stand-in for man that shows nothing.
        assert!(text.contains(heading) || text.contains("minimized"), "{text}");
    }
}

#[test]
fn completions_are_read_by_their_shells_and_know_every_command() {
    for (shell, check) in [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")] {
        let script = printed(&["completions", shell]);
        has_nothing_to_say(shell, &[check], &script);
        let script = String::from_utf8(script).unwrap();
        for word in ["run", "check", "explain", "send", "bench", "man", "completions", "print-defaults"] {
            assert!(script.contains(word), "{shell} completes no {word}");
        }
    }
}

#[test]
fn bash_completes_a_command_and_its_options() {
    let script = String::from_utf8(printed(&["completions", "bash"])).unwrap();
    let completed = |words: &str, current: usize| {
        let last = words.split(' ').next_back().unwrap();
        let ask = format!(
            "{script}\nCOMP_WORDS=({words}); COMP_CWORD={current}; _tallyd tallyd '{last}' ''; echo \"${{COMPREPLY[@]}}\""
        );
        let output = said("bash", &["-c", &ask], b"").unwrap();
        String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(completed("tallyd ex", 1), ["explain"]);
    assert_eq!(completed("tallyd check --print", 2), ["--print", "--print-defaults"]);
}

/// The files of this repository that both packages install, and those that are made for them in `target/package`.
fn assets() -> Vec<(String, Vec<PathBuf>)> {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let metadata = &manifest["package"]["metadata"];
    let text = |value: &toml::Value| PathBuf::from(value.as_str().unwrap());
    let deb = metadata["deb"]["assets"].as_array().unwrap().iter().map(|asset| text(&asset[0])).collect();
    let rpm =
        metadata["generate-rpm"]["assets"].as_array().unwrap().iter().map(|asset| text(&asset["source"])).collect();
    vec![("deb".to_owned(), deb), ("generate-rpm".to_owned(), rpm)]
}

#[test]
fn every_file_that_packages_install_is_there_or_made_for_them() {
    let makes = read("packaging/assets.sh");
    for (package, files) in assets() {
        assert!(files.len() > 10, "{package}");
        for file in files {
            let name = file.file_name().unwrap().to_str().unwrap();
            let is_made = match file.parent().and_then(Path::to_str) {
                Some("target/release") => name == "tallyd",
                Some("target/package") => {
                    makes.contains(name) || makes.contains("\"$out/tallyd.$shell\"") && is_shell(name)
                }
                Some(_) | None => root().join(&file).is_file(),
            };
            assert!(is_made, "{package} installs {}, which nobody makes", file.display());
        }
    }
}

fn is_shell(name: &str) -> bool {
    ["tallyd.bash", "tallyd.zsh", "tallyd.fish"].contains(&name)
}

#[test]
fn both_packages_install_the_same_files() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let metadata = &manifest["package"]["metadata"];
    let names = |assets: &toml::Value, at: &dyn Fn(&toml::Value) -> String| -> BTreeSet<String> {
        // Each system has places of its own for documents, completions of zsh, and what its packager checks.
        let own = ["/share/doc/", "/share/lintian/", "/share/zsh/", "/share/licenses/", "/lib/debug/"];
        let all = assets.as_array().unwrap().iter().map(|asset| format!("/{}", at(asset).trim_start_matches('/')));
        all.filter(|path| !own.iter().any(|part| path.contains(part))).collect()
    };
    let place = |source: &toml::Value, destination: &toml::Value| {
        let (source, destination) = (source.as_str().unwrap(), destination.as_str().unwrap());
        let name = source.rsplit('/').next().unwrap();
        if destination.ends_with('/') { format!("{destination}{name}") } else { destination.to_owned() }
    };
    let deb = names(&metadata["deb"]["assets"], &|asset| place(&asset[0], &asset[1]));
    let rpm = names(&metadata["generate-rpm"]["assets"], &|asset| place(&asset["source"], &asset["dest"]));
    assert_eq!(deb, rpm);
}

#[test]
fn scripts_are_read_by_their_shells() {
    for (shell, script) in [
        ("sh", "packaging/hand-over.sh"),
        ("sh", "packaging/deb/preinst"),
        ("sh", "packaging/deb/postinst"),
        ("sh", "packaging/deb/prerm"),
        ("sh", "packaging/deb/postrm"),
        ("sh", "packaging/rpm/post"),
        ("sh", "packaging/rpm/preun"),
        ("sh", "packaging/rpm/postun"),
        ("bash", "packaging/assets.sh"),
        ("bash", "packaging/deb.sh"),
        ("bash", "packaging/rpm.sh"),
        ("bash", "packaging/container.sh"),
        ("bash", "packaging/setup.sh"),
    ] {
        has_nothing_to_say(shell, &["-n"], read(script).as_bytes());
    }
}

/// The metrics of ours that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !word(c)).filter(|name| name.starts_with("tallyd_") || name.starts_with("process_"));
    words.map(str::to_owned).collect()
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let dashboard: serde_json::Value = serde_json::from_str(&read("packaging/grafana/tallyd.json")).unwrap();
    let mut expressions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let targets = panel["targets"].as_array().into_iter().flatten();
        let found: Vec<_> = targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
        assert!(!found.is_empty() || panel["type"] == "row", "{panel}");
        expressions.extend(found);
    }
    let all = ALL.iter().map(|metric| (metric.name, metric.shape));
    let known: BTreeSet<String> = all
        .chain(PROCESS.iter().map(|(name, shape, _)| (*name, *shape)))
        .map(|(name, shape)| if shape == Shape::Seconds { format!("{name}_bucket") } else { name.to_owned() })
        .collect();
    let asked = named(&expressions.join("\n"));
    assert!(asked.len() > 25, "{asked:?}");
    let unknown: Vec<_> = asked.difference(&known).collect();
    assert!(unknown.is_empty(), "no such metrics: {unknown:?}");
    // Labels are asked for by the names that the metrics have.
    for expression in &expressions {
        for labels in expression.split("by (").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let metrics = named(expression);
            let has = |label: &str| {
                ["le", "instance", "job"].contains(&label)
                    || ALL.iter().any(|metric| {
                        metrics.iter().any(|name| name.starts_with(metric.name)) && metric.labels.contains(&label)
                    })
            };
            assert!(labels.split(", ").all(has), "{expression}");
        }
    }
}
