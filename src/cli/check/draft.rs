//! A configuration of ours that is made from one of another program, as text: each key with where it comes from, and below
//! them what has no counterpart, each with the reason. Pure.

use toml::Value;

use super::super::{Code, Failure};
use crate::config::{Config, Sources, literal};

/// The sections in the order in which they are printed.
const SECTIONS: [&str; 10] = [
    "listen",
    "http",
    "protocol",
    "flush",
    "mapping",
    "prometheus",
    "export.graphite",
    "export.relay",
    "export.console",
    "log",
];

/// Words in a line of a comment.
const WIDTH: usize = 110;

/// A configuration that is being made.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// Keys with their values and comments.
    keys: Vec<(String, Value, String)>,
    /// What has no counterpart.
    left: Vec<String>,
    /// What a person should look at.
    pub(super) warnings: Vec<String>,
}

impl Draft {
    /// Sets a key, which stands for something: its name, and what differs.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>, comment: impl Into<String>) {
        self.keys.retain(|(other, ..)| other != key);
        self.keys.push((key.to_owned(), value.into(), comment.into()));
    }

    /// The texts of a key that is a list of them.
    pub(super) fn texts(&self, key: &str) -> Vec<&str> {
        let value = self.keys.iter().find(|(other, ..)| other == key).and_then(|(_, value, _)| value.as_array());
        value.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// Takes note of something that has no counterpart, and why.
    pub(super) fn leave(&mut self, name: &str, why: &str) {
        self.left.push(format!("{name}: {why}"));
    }

    /// Takes note of something that should be looked at.
    pub(super) fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// What our own check says against it, once it is printed: whoever takes it must know.
    pub(super) fn refusals(&self) -> Vec<String> {
        let text = self.print("another server");
        let sources = Sources { file: Some(("the configuration printed", &text)), environment: &[], set: &[] };
        let problems = Config::load(&sources).err().unwrap_or_default();
        problems.iter().map(|problem| format!("{problem}; as it stands it would be refused")).collect()
    }

    /// The configuration as a file.
    pub(super) fn print(&self, of: &str) -> String {
        let mut text = comment(&format!("From {of}. `tallyd check --config FILE` checks it."));
        for section in SECTIONS {
            let of_section = self.keys.iter().filter_map(|(key, value, said)| {
                let (head, name) = key.rsplit_once('.')?;
                (head == section).then_some((name, value, said))
            });
            let lines: String = of_section
                .map(|(name, value, said)| format!("{}{name} = {}\n", comment(said), literal(value)))
                .collect();
            if !lines.is_empty() {
                text += &format!("\n[{section}]\n{lines}");
            }
        }
        if !self.left.is_empty() {
            text += "\n# Without a counterpart:\n";
            self.left.iter().for_each(|line| text += &comment(&format!("- {line}")));
        }
        text
    }
}

/// Lines of a comment; none for nothing.
fn comment(text: &str) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + word.chars().count() + 3 > WIDTH {
            lines += &format!("#{line}\n");
            line.clear();
        }
        line.push(' ');
        // No control character ends a comment, and none may stand in it.
        line.extend(word.chars().filter(|c| !c.is_control()));
    }
    if line.is_empty() { lines } else { lines + &format!("#{line}\n") }
}

/// Why something can't be converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) String);

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::told(Code::Configuration, refusal.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_is_toml_whatever_stands_in_comments() {
        let mut draft = Draft::default();
        draft.set("listen.udp", vec!["0.0.0.0:8125"], "old\n= 1\r\u{7} ");
        draft.set("listen.udp", vec!["127.0.0.1:8125"], format!("port {}", "word ".repeat(60)));
        draft.set("flush.percentiles", vec![Value::Float(90.0), Value::Float(f64::INFINITY)], "");
        draft.leave("title\n[x]", "it has no name");
        let text = draft.print("config.js");
        let table: toml::Table = text.parse().unwrap();
        assert_eq!(table["listen"]["udp"].as_array().unwrap().len(), 1);
        assert_eq!(table["flush"]["percentiles"].as_array().unwrap()[1].as_float(), Some(f64::INFINITY));
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.ends_with("# - title [x]: it has no name\n"), "{text}");
    }
}
