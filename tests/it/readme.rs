//! The README's commands, run as they stand there, and its lists compared with the code.

use std::process::{Command, Stdio};

use crate::agent::{Agent, tallyd};

fn readme() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap()
}

/// The commands of all `console` blocks with the output that must follow each.
fn commands(readme: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    let mut inside = false;
    for line in readme.lines() {
        match (inside, line) {
            (false, "```console") => inside = true,
            (true, "```") => inside = false,
            (true, _) => match line.strip_prefix("$ ") {
                Some(command) => commands.push((command.to_owned(), String::new())),
                None => {
                    let last = commands.last_mut().expect("output stands behind a command");
                    if last.0.ends_with('\\') {
                        last.0 += &format!("\n{line}");
                    } else {
                        last.1 += &format!("{line}\n");
                    }
                }
            },
            (false, _) => {}
        }
    }
    commands
}

/// Whether an output is what the README shows; `...` stands for any text, and a line feed at the end for none, since a
/// body without one looks the same.
fn is_as_shown(shown: &str, output: &str) -> bool {
    let (shown, output) = (shown.trim_end_matches('\n'), output.trim_end_matches('\n'));
    let Some((first, more)) = shown.split_once("...") else { return shown == output };
    let (middle, last) = more.rsplit_once("...").map_or((None, more), |(middle, last)| (Some(middle), last));
    let rest = output.strip_prefix(first).and_then(|rest| rest.strip_suffix(last));
    let Some(mut rest) = rest else { return false };
    middle.into_iter().flat_map(|middle| middle.split("...")).all(|part| {
        let found = rest.split_once(part);
        rest = found.map_or("", |(_, behind)| behind);
        found.is_some()
    })
}

#[test]
fn shown_output_is_compared_whole() {
    assert!(is_as_shown("a\n", "a") && !is_as_shown("a\n", "ab\n") && !is_as_shown("", "a"));
    assert!(is_as_shown("a...c\n", "abc\n") && !is_as_shown("a...c\n", "abcd\n") && !is_as_shown("ab...b", "ab"));
    assert!(is_as_shown("a...b...c", "a1b2c") && !is_as_shown("a...b...c", "a12c"));
}

#[test]
fn every_command_prints_what_the_readme_shows() {
    let agent = Agent::start(&[]);
    let commands = commands(&readme());
    assert!(commands.len() >= 8, "only {} commands", commands.len());
    let directory = std::path::Path::new(env!("CARGO_BIN_EXE_tallyd")).parent().unwrap();
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap());
    let ports = [("8125", "udp"), ("8000", "ingest"), ("7000", "api")];
    for (command, shown) in commands {
        let mut here = command.clone();
        for (port, listener) in ports {
            // The lines' port is one number for UDP and TCP by default, and two in a test.
            let tcp = listener == "udp" && (command.contains("tcp") || command.contains("nc -N"));
            let address = agent.address(if tcp { "tcp" } else { listener });
            here = here.replace(port, &address.port().to_string());
        }
        let output = Command::new("bash")
            .args(["-c", &here])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PATH", &path)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(is_as_shown(&shown, &text), "$ {here}\nprinted\n{text}\nand the README shows\n{shown}");
    }
}

#[test]
fn every_metric_of_ours_stands_in_the_readme() {
    let readme = readme();
    for metric in tallyd::telemetry::ALL {
        assert!(readme.contains(&format!("`{}`", metric.name)), "{} is not in the README", metric.name);
    }
}

#[test]
fn every_subcommand_stands_in_the_readme() {
    let help = tallyd().arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let readme = readme();
    for command in ["run", "check", "explain", "send", "bench"] {
        assert!(help.contains(command) && readme.contains(&format!("`tallyd {command}")), "{command}");
    }
}
