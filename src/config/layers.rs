//! The layers of a configuration, turned into settings: the file, the environment with the seed system's names, `--set`.
//!
//! Each setting is tried by itself against the defaults, so that whatever is wrong with it is told with its own place.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::{Config, Fault, KEYS, Loaded, MAPS, Origin, Problem, Sources, get, is_section, last, literal, put, shown};
use crate::handover;
use crate::units::without_password;

/// Lays the sources over `known`, the tree of the defaults, and checks the whole.
pub(super) fn merge(sources: &Sources<'_>, known: Table) -> Result<Loaded, Vec<Problem>> {
    let mut reader = Reader { known, settings: Vec::new(), problems: Vec::new() };
    reader.state_directory(sources.environment);
    if let Some((name, text)) = sources.file {
        reader.file(name, text);
    }
    reader.environment(sources.environment);
    reader.arguments(sources.set);
    reader.finish()
}

/// One key in one layer.
struct Setting {
    key: String,
    value: Value,
    origin: Origin,
}

impl Setting {
    /// What a type says of a value, which it often quotes.
    fn without_secrets(&self, message: &str) -> String {
        if MAPS.contains(&&*self.key) {
            return "not a table of texts; write one such as { \"security.protocol\" = \"SASL_SSL\" }".to_owned();
        }
        let mut texts: Vec<&str> = self.value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        texts.extend(self.value.as_str());
        texts.iter().filter(|text| !text.is_empty()).fold(message.to_owned(), |message, text| {
            let bare = without_password(text);
            message.replace(&format!("{text:?}"), &format!("{bare:?}")).replace(text, &bare)
        })
    }

    fn wrong(&self, remedy: String) -> Problem {
        // A table that is none may hold a secret anywhere.
        let is_hidden = MAPS.contains(&&*self.key) && !self.value.is_table();
        let value = if is_hidden { "\"***\"".to_owned() } else { shown(&self.value) };
        let key = self.key.clone();
        Problem { origin: self.origin.clone(), fault: Fault::Value { key, value, remedy } }
    }
}

/// Turns the layers into settings, each of them tried against the defaults.
struct Reader {
    known: Table,
    settings: Vec<Setting>,
    problems: Vec<Problem>,
}

impl Reader {
    fn finish(mut self) -> Result<Loaded, Vec<Problem>> {
        let mut tree = self.known;
        let mut origins = BTreeMap::new();
        for setting in self.settings {
            put(&mut tree, &setting.key, setting.value);
            origins.insert(setting.key, setting.origin);
        }
        match Config::deserialize(Value::Table(tree)) {
            Ok(config) => {
                let loaded = Loaded { config, origins };
                self.problems.extend(loaded.problems());
                if self.problems.is_empty() { Ok(loaded) } else { Err(self.problems) }
            }
            Err(error) => {
                self.problems
                    .push(Problem { origin: Origin::BuiltIn, fault: Fault::Syntax(error.message().to_owned()) });
                Err(self.problems)
            }
        }
    }

    fn set(&mut self, setting: Setting) {
        let mut tree = self.known.clone();
        put(&mut tree, &setting.key, setting.value.clone());
        match Config::deserialize(Value::Table(tree)) {
            Ok(_) => self.settings.push(setting),
            Err(error) => {
                let default = get(&self.known, &setting.key).map(literal).unwrap_or_default();
                let message = setting.without_secrets(&plain(error.message()));
                self.problems.push(setting.wrong(format!("{message}; the default is {default}")));
            }
        }
    }

    fn set_text(&mut self, key: &str, text: &str, origin: Origin) {
        if let Some(default) = get(&self.known, key) {
            let value = read(text, default);
            self.set(Setting { key: key.to_owned(), value, origin });
        }
    }

    fn is_leaf(&self, key: &str) -> bool {
        get(&self.known, key).is_some_and(|value| !is_section(key, value))
    }

    fn file(&mut self, name: &str, text: &str) {
        let file = File { name, text };
        let (table, errors) = DeTable::parse_recoverable(text);
        if errors.is_empty() {
            self.table(&file, "", table.into_inner());
        }
        self.problems.extend(errors.iter().map(|error| Problem {
            origin: file.at(error.span().map_or(0, |span| span.start)),
            fault: Fault::Syntax(error.message().to_owned()),
        }));
    }

    fn table(&mut self, file: &File<'_>, section: &str, table: DeTable<'_>) {
        for (name, value) in table {
            let key =
                if section.is_empty() { name.get_ref().to_string() } else { format!("{section}.{}", name.get_ref()) };
            let origin = file.at(value.span().start);
            match get(&self.known, &key).map(|value| is_section(&key, value)) {
                None => {
                    let nearest = self.nearest(&key, true).map(str::to_owned);
                    let fault = Fault::Unknown { name: key, nearest };
                    self.problems.push(Problem { origin: file.at(name.span().start), fault });
                }
                Some(true) => self.section(file, &key, value),
                Some(false) => match Value::deserialize(ValueDeserializer::from(value)) {
                    Ok(value) => self.set(Setting { key, value, origin }),
                    Err(error) => {
                        let fault = Fault::Syntax(error.message().to_owned());
                        self.problems.push(Problem { origin, fault });
                    }
                },
            }
        }
    }

    fn section(&mut self, file: &File<'_>, key: &str, value: Spanned<DeValue<'_>>) {
        let origin = file.at(value.span().start);
        match value.into_inner() {
            DeValue::Table(table) => self.table(file, key, table),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_) => {
                let remedy = format!("it is a section; write [{key}] and its keys below");
                let fault = Fault::Value { key: key.to_owned(), value: "...".to_owned(), remedy };
                self.problems.push(Problem { origin, fault });
            }
        }
    }

    /// systemd's word on where state belongs: more than our default, less than the operator's.
    fn state_directory(&mut self, environment: &[(String, String)]) {
        let first = environment
            .iter()
            .find(|(name, _)| name == "STATE_DIRECTORY")
            .and_then(|(_, value)| value.split(':').next());
        if let Some(directory) = first.filter(|directory| !directory.is_empty()) {
            let origin = Origin::Environment("STATE_DIRECTORY".to_owned());
            self.set(Setting { key: "state_dir".to_owned(), value: Value::from(directory), origin });
        }
    }

    fn environment(&mut self, environment: &[(String, String)]) {
        let variables: BTreeMap<&str, &str> = environment.iter().map(|(name, value)| (&**name, &**value)).collect();
        self.seed(&variables);
        for (name, value) in variables {
            let Some(rest) = name.strip_prefix("TALLYD_") else { continue };
            let key = rest.to_ascii_lowercase().replace("__", ".");
            if self.is_leaf(&key) {
                // Compose files pass on as empty what is not set. An empty list, though, is one.
                if !value.is_empty() || get(&self.known, &key).is_some_and(Value::is_array) {
                    self.set_text(&key, value, Origin::Environment(name.to_owned()));
                }
            } else if !NO_KEYS.contains(&name) && !is_service_link(name, value) {
                let nearest =
                    self.nearest(&key, false).map(|key| format!("TALLYD_{}", key.to_uppercase().replace('.', "__")));
                let fault = Fault::Unknown { name: name.to_owned(), nearest };
                self.problems.push(Problem { origin: Origin::Environment(name.to_owned()), fault });
            }
        }
    }

    /// The names of the system that tallyd replaces. An empty value is none, and one such as `tcp://10.0.0.1:6379` was
    /// put there by Kubernetes for a service that happens to have that name.
    fn seed(&mut self, variables: &BTreeMap<&str, &str>) {
        let given =
            |name: &str| variables.get(name).copied().filter(|value| !value.is_empty() && !value.contains("://"));
        for (name, key) in [("INGEST_PORT", "http.ingest"), ("API_PORT", "http.api")] {
            if let Some(port) = given(name).and_then(|value| self.port(name, value)) {
                let addresses = vec![Value::from(format!("127.0.0.1:{port}")), Value::from(format!("[::1]:{port}"))];
                self.seeded(name, key, Value::Array(addresses));
            }
        }
        if let Some(value) = given("STORE") {
            match value.to_ascii_uppercase().as_str() {
                "INMEMORY" => self.seeded("STORE", "store.kind", Value::from("memory")),
                "EMBEDDED" => self.seeded("STORE", "store.kind", Value::from("embedded")),
                "REDIS" => self.seeded("STORE", "store.kind", Value::from("redis")),
                "KAFKA" => self.seeded("STORE", "store.kind", Value::from("kafka")),
                _ => self.wrong_seed("STORE", value, "no store; write INMEMORY, EMBEDDED, REDIS or KAFKA"),
            }
        }
        self.seed_kafka(given("KAFKA_BOOTSTRAP_SERVERS"), given("KAFKA_TOPIC"));
        let (host, port) = (given("REDIS_HOST"), given("REDIS_PORT"));
        let number = port.map_or(Some(6379), |value| self.port("REDIS_PORT", value));
        if let Some(number) = number.filter(|_| host.or(port).is_some()) {
            let host = host.unwrap_or("127.0.0.1");
            let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
            let name = if variables.contains_key("REDIS_HOST") { "REDIS_HOST" } else { "REDIS_PORT" };
            self.seeded(name, "store.redis.url", Value::from(format!("redis://{host}:{number}")));
        }
    }

    /// KAFKA_BOOTSTRAP_SERVERS and KAFKA_TOPIC: they may be set, and do nothing, where nothing uses Kafka.
    fn seed_kafka(&mut self, brokers: Option<&str>, topic: Option<&str>) {
        if let Some(brokers) = brokers {
            let list = brokers.split(',').map(|broker| Value::from(broker.trim())).collect();
            self.seeded("KAFKA_BOOTSTRAP_SERVERS", "kafka.brokers", Value::Array(list));
        }
        if let Some(topic) = topic {
            self.seeded("KAFKA_TOPIC", "kafka.topic", Value::from(topic));
        }
    }

    fn seeded(&mut self, name: &str, key: &str, value: Value) {
        self.set(Setting { key: key.to_owned(), value, origin: Origin::Environment(name.to_owned()) });
    }

    fn wrong_seed(&mut self, name: &str, value: &str, remedy: &str) {
        let fault = Fault::Value { key: name.to_owned(), value: format!("{value:?}"), remedy: remedy.to_owned() };
        self.problems.push(Problem { origin: Origin::Environment(name.to_owned()), fault });
    }

    fn port(&mut self, name: &str, value: &str) -> Option<u16> {
        let port = value.trim().parse().ok();
        if port.is_none() {
            self.wrong_seed(name, value, "no port; write a number from 0 to 65535");
        }
        port
    }

    fn arguments(&mut self, set: &[String]) {
        for argument in set {
            let fault = match argument.split_once('=') {
                Some((key, value)) if self.is_leaf(key.trim()) => {
                    self.set_text(key.trim(), value.trim(), Origin::Argument);
                    continue;
                }
                Some((key, _)) => {
                    let nearest = self.nearest(key.trim(), false).map(str::to_owned);
                    Fault::Unknown { name: without_secrets(key.trim()).into_owned(), nearest }
                }
                None => Fault::Argument(without_secrets(argument).into_owned()),
            };
            self.problems.push(Problem { origin: Origin::Argument, fault });
        }
    }

    /// The known key that looks most like this one, or has its last word; sections too if `sections`.
    fn nearest(&self, key: &str, sections: bool) -> Option<&'static str> {
        let likeness = |known: &str| {
            let whole = strsim::normalized_damerau_levenshtein(key, known);
            whole.max(strsim::normalized_damerau_levenshtein(last(key), last(known)) * 0.9)
        };
        let names = KEYS.iter().map(|row| row.name).filter(|name| sections || self.is_leaf(name));
        let ranked = names.map(|name| (name, likeness(name))).max_by(|a, b| a.1.total_cmp(&b.1));
        ranked.filter(|(_, likeness)| *likeness > 0.5).map(|(name, _)| name)
    }
}

/// An argument without `=`, of which only the beginning can be a key.
fn without_secrets(argument: &str) -> Cow<'_, str> {
    let end = argument.find(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c)));
    end.map_or(Cow::Borrowed(argument), |end| Cow::Owned(format!("{}...", &argument[..end])))
}

/// What serde says of a type, in the words of whoever writes a configuration.
fn plain(message: &str) -> String {
    let whole = "a whole number, 0 or more";
    let words = [("usize", whole), ("u64", whole), ("u32", whole), ("f64", "a number")];
    let replace = |message: String, (name, word): (&str, &str)| {
        message.replace(&format!("expected {name}"), &format!("expected {word}"))
    };
    words.into_iter().fold(message.replace("a sequence", "a list"), replace)
}

/// A file's name and text, for places in it.
struct File<'a> {
    name: &'a str,
    text: &'a str,
}

impl File<'_> {
    fn at(&self, offset: usize) -> Origin {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let (line, start) = (before.matches('\n').count() + 1, before.rfind('\n').map_or(0, |end| end + 1));
        Origin::File { name: self.name.to_owned(), line, column: before[start..].chars().count() + 1 }
    }
}

/// Variables that are nobody's key: the name of the file, and what an agent tells the one that takes over from it.
const NO_KEYS: [&str; 2] = ["TALLYD_CONFIG", handover::VARIABLE];

/// Whether Kubernetes or Docker made this variable for a service called `tallyd` or `tallyd-...`. Ours name a section
/// and a key with `__` between them.
fn is_service_link(name: &str, value: &str) -> bool {
    let number = |text: &str| text.bytes().next().is_some_and(|byte| byte.is_ascii_digit());
    !name.contains("__")
        && (name.ends_with("_PORT") && value.contains("://")
            || name.ends_with("_SERVICE_HOST")
            || name.contains("_SERVICE_PORT")
            || name.split_once("_PORT_").is_some_and(|(_, rest)| number(rest)))
}

/// The value that `text` stands for where a default of this type stands. What cannot be read stays text, and the key's
/// own type says what it wants. Lists are separated by commas, or written as in TOML (and JSON).
fn read(text: &str, default: &Value) -> Value {
    let quoted = || ValueDeserializer::parse(text).and_then(Value::deserialize).ok();
    let value = match default {
        Value::String(_) if text.starts_with('"') => quoted(),
        // `[::1]:8125` begins so too.
        Value::Array(items) if !(text.starts_with('[') && text.ends_with(']')) => {
            let item = items.first().cloned().unwrap_or(Value::String(String::new()));
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            Some(Value::Array(parts.map(|part| read(part, &item)).collect()))
        }
        Value::Array(_) | Value::Table(_) => quoted(),
        Value::Integer(_) => text.parse().map(Value::Integer).ok(),
        Value::Float(_) => text.parse().map(Value::Float).ok(),
        Value::Boolean(_) => text.parse().map(Value::Boolean).ok(),
        Value::String(_) | Value::Datetime(_) => None,
    };
    value.unwrap_or_else(|| Value::from(text))
}
