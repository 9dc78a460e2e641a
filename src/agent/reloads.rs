//! New configurations while the process lives: read one after the other, refused as a whole or told to all parts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

use super::Error;
use super::lookout::Refused;
use crate::config::{Config, Level, Loaded};
use crate::http::scrape::Mapper;
use crate::http::{self, Access, Guarded, Reload};
use crate::ingest::{Settings, Workers};
use crate::systemd;
use crate::tls;

/// Who may come in, and as whom we speak TLS: what a reload may change under all listeners. Clones share it.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) access: Access,
    pub(super) tls: tls::Acceptor,
}

impl Entry {
    fn new(config: &Config) -> Self {
        let tls = tls::Acceptor::new(config.tls.identity.clone(), config.limits.http.header_time.0);
        let access = Access::new(&config.http.tokens, config.limits.ingest.reject_log, tls.clone());
        Self { access, tls }
    }

    fn set(&self, config: &Config) {
        self.access.set(&config.http.tokens);
        self.tls.set(config.tls.identity.clone());
    }
}

/// What is in force of the configuration, and who is to know.
pub(super) struct InForce {
    config: ArcSwap<Config>,
    pub(super) entry: Entry,
    parts: Mutex<Parts>,
}

/// What a new configuration must suit, and who is told of it.
#[derive(Default)]
struct Parts {
    /// The sockets that are bound.
    guarded: Vec<Guarded>,
    followers: Option<(Arc<Workers>, Arc<Mapper>)>,
}

impl InForce {
    pub(super) fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another in force; what comes back are the keys that changed.
    ///
    /// # Errors
    /// All that keeps a running agent from taking it. Nothing is changed then.
    fn put(&self, config: Config) -> Result<Vec<&'static str>, Vec<String>> {
        let parts = self.parts();
        let changed = self.config.load().reload(&config).map_err(|keys| vec![needs_restart(&keys)])?;
        config.http.admit(&parts.guarded).map_err(|error| vec![error.to_string()])?;
        tell(parts.followers.as_ref(), &config);
        self.entry.set(&config);
        self.config.store(Arc::new(config));
        Ok(changed)
    }

    /// Holds the configuration in force, and each that follows, to these sockets, which are bound.
    ///
    /// # Errors
    /// When that in force does not let them listen.
    pub(super) fn listen(&self, guarded: Vec<Guarded>) -> Result<(), http::Error> {
        let mut parts = self.parts();
        self.config.load().http.admit(&guarded)?;
        parts.guarded = guarded;
        Ok(())
    }

    /// Tells these of the configuration in force, and of each that follows.
    pub(super) fn follow(&self, workers: &Arc<Workers>, mapper: &Arc<Mapper>) {
        let mut parts = self.parts();
        parts.followers = Some((Arc::clone(workers), Arc::clone(mapper)));
        tell(parts.followers.as_ref(), &self.config.load());
    }
}

fn needs_restart(keys: &[&str]) -> String {
    let change = if keys.len() == 1 { "changes" } else { "change" };
    format!("{}: {change} only with a restart; restart tallyd, or take the change back", keys.join(", "))
}

fn tell(followers: Option<&(Arc<Workers>, Arc<Mapper>)>, config: &Config) {
    if let Some((workers, mapper)) = followers {
        workers.set(settings(config));
        mapper.set(config.mapping.rules.clone());
    }
}

/// Takes new configurations, or refuses them as a whole, as long as the process lives.
pub(super) struct Reloads {
    pub(super) orders: mpsc::Sender<Reload>,
    pub(super) in_force: Arc<InForce>,
    pub(super) refused: Arc<Refused>,
}

impl Reloads {
    /// That has a thread of its own, which ends with the process: a file may take its time to be read, for ever if it is a
    /// pipe, and a stop must not wait for it.
    pub(super) fn serve(
        config: &Config,
        mut read: impl FnMut() -> Result<Loaded, Vec<String>> + Send + 'static,
        set_level: impl Fn(Level) + Send + 'static,
    ) -> Result<Self, Error> {
        let (orders, mut inbox) = mpsc::channel::<Reload>(1);
        let entry = Entry::new(config);
        let config = ArcSwap::from_pointee(config.clone());
        let in_force = Arc::new(InForce { config, entry, parts: Mutex::default() });
        let changed = Arc::clone(&in_force);
        let mut obey = move || {
            let outcome = read().and_then(|loaded| {
                let (mut notes, level) = (loaded.notes(), loaded.config.log.level);
                let waiting = changed.config().waiting(&loaded.config);
                let note = |key| format!("{key}: the file says something else now; that takes a restart");
                notes.extend(waiting.into_iter().map(note));
                let keys = changed.put(loaded.config)?;
                // Nothing can refuse it any more.
                set_level(level);
                notes.iter().for_each(|note| tracing::warn!("{note}"));
                tracing::info!(changed = keys.join(", "), "the configuration was read again");
                Ok(keys)
            });
            outcome.inspect_err(|wrong: &Vec<String>| {
                wrong.iter().for_each(|problem| tracing::error!("the configuration is refused: {problem}"));
            })
        };
        let refused = Arc::new(Refused::default());
        let noted = Arc::clone(&refused);
        let serve = move || {
            while let Some(answer) = inbox.blocking_recv() {
                systemd::reloading();
                let outcome = obey();
                noted.note(&outcome);
                // Who asked may have gone.
                drop(answer.send(outcome));
            }
        };
        thread::Builder::new().name("reload".to_owned()).spawn(serve).map_err(Error::System)?;
        Ok(Self { orders, in_force, refused })
    }
}

/// How lines are read.
pub(super) fn settings(config: &Config) -> Settings {
    Settings {
        protocol: config.protocol.clone(),
        limits: config.limits.protocol.clone(),
        mapping: config.mapping.rules.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use tokio::sync::oneshot;

    use super::*;
    use crate::config::Sources;
    use crate::http::tokens::Right;

    fn load(text: &str) -> Result<Loaded, Vec<String>> {
        let sources = Sources { file: Some(("tallyd.toml", text)), ..Sources::default() };
        Config::load(&sources).map_err(|wrong| wrong.iter().map(ToString::to_string).collect())
    }

    /// What a reload of this text comes to, one after the other, and the levels that were set.
    fn reload_each(
        guarded: Vec<Guarded>,
        first: &str,
        texts: &[&'static str],
    ) -> (Vec<Result<usize, String>>, Vec<Level>) {
        let (give, texts_read) = channel();
        texts.iter().for_each(|text| give.send(*text).unwrap());
        let (levels, seen) = channel();
        let read = move || load(texts_read.recv().unwrap());
        let set_level = move |level| levels.send(level).unwrap();
        let reloads = Reloads::serve(&load(first).unwrap().config, read, set_level).unwrap();
        reloads.in_force.listen(guarded).unwrap();
        let outcomes = texts.iter().map(|_| {
            let (order, outcome) = oneshot::channel();
            reloads.orders.blocking_send(order).unwrap();
            outcome.blocking_recv().unwrap().map(|keys| keys.len()).map_err(|wrong| wrong.join("\n"))
        });
        (outcomes.collect(), seen.try_iter().collect())
    }

    #[test]
    fn a_reload_takes_the_whole_configuration_or_nothing_of_it() {
        let texts = [
            "[log]\nlevel = 'debug'",
            "[log]\nlevel = 'warn'\n[flush]\nwindow = '20s'",
            "[log]\nlevel = 'loud'\nlvl = 1",
            "",
        ];
        let (outcomes, levels) = reload_each(Vec::new(), "", &texts);
        assert_eq!((&outcomes[0], &outcomes[3]), (&Ok(1), &Ok(1)));
        let refused = outcomes[1].as_ref().unwrap_err();
        assert!(refused.starts_with("flush.window: changes only with a restart"), "{refused}");
        let refused = outcomes[2].as_ref().unwrap_err();
        assert!(refused.lines().count() == 2 && refused.contains("tallyd.toml:2:9: log.level"), "{refused}");
        assert_eq!(levels, [Level::Debug, Level::Info]);
    }

    #[test]
    fn a_reload_takes_no_token_from_a_socket_that_other_machines_reach() {
        let address = "0.0.0.0:7000".parse().unwrap();
        let guarded = vec![Guarded { key: "api", address, right: Right::Admin }];
        let with_token = "[http.tokens]\nadmin_file = '/etc/admin'";
        let (outcomes, levels) = reload_each(guarded, with_token, &["[log]\nlevel = 'debug'", with_token]);
        let refused = outcomes[0].as_ref().unwrap_err();
        assert!(refused.contains("0.0.0.0:7000") && refused.contains("http.tokens.admin_file"), "{refused}");
        assert_eq!((&outcomes[1], levels), (&Ok(0), vec![Level::Info]));
    }
}
