//! New configurations while the process lives: read one after the other, refused as a whole or told to all parts.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;

use super::Error;
use super::lookout::Refused;
use crate::config::Config;
use crate::http::scrape::Mapper;
use crate::http::{Access, Reload};
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
    followers: Mutex<Option<(Arc<Workers>, Arc<Mapper>)>>,
}

impl InForce {
    pub(super) fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    fn put(&self, config: Config) {
        let followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        tell(followers.as_ref(), &config);
        self.entry.set(&config);
        self.config.store(Arc::new(config));
    }

    /// Tells these of the configuration in force, and of each that follows.
    pub(super) fn follow(&self, workers: &Arc<Workers>, mapper: &Arc<Mapper>) {
        let mut followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        *followers = Some((Arc::clone(workers), Arc::clone(mapper)));
        tell(followers.as_ref(), &self.config.load());
    }
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
        mut reload: impl FnMut() -> Result<Config, Vec<String>> + Send + 'static,
    ) -> Result<Self, Error> {
        let (orders, mut inbox) = mpsc::channel::<Reload>(1);
        let entry = Entry::new(config);
        let config = ArcSwap::from_pointee(config.clone());
        let in_force = Arc::new(InForce { config, entry, followers: Mutex::new(None) });
        let changed = Arc::clone(&in_force);
        let mut obey = move || {
            let refused = |wrong: &Vec<String>| {
                wrong.iter().for_each(|problem| tracing::error!("the configuration is refused: {problem}"));
            };
            let config = reload().inspect_err(refused)?;
            let keys = changed.config().reload(&config).unwrap_or_default();
            changed.put(config);
            Ok::<_, Vec<String>>(keys)
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
