//! `tallyd run`: the configuration read, the log opened, the agent started, and what a reload reads anew.

use super::{Code, Failure, Layers, log};
use crate::agent;
use crate::config::{Config, Level, Loaded};
use crate::handover;

/// Runs the agent until it is told to stop.
pub fn run(layers: &Layers) -> Result<(), Failure> {
    if handover::go_between().map_err(|error| Failure::told(Code::Io, format!("no successor: {error}")))? {
        return Ok(());
    }
    let loaded = layers.load().map_err(Failure::brief)?;
    let set_level = log::open(loaded.config.log.level);
    warn(&loaded);
    let config = loaded.config;
    run_agent(&config, reloader(layers.clone(), config.clone(), set_level))
}

/// Reads all layers again, and all files: the new configuration if a running agent can take it, else all that is wrong with
/// it. A refused one changes nothing.
fn reloader(
    layers: Layers,
    mut current: Config,
    set_level: impl Fn(Level) + Send + 'static,
) -> impl FnMut() -> Result<Config, Vec<String>> + Send + 'static {
    move || {
        let loaded = layers.load().map_err(Failure::lines)?;
        let new = &loaded.config;
        let changed = current.reload(new).map_err(|keys| {
            let (keys, change) = (keys.join(", "), if keys.len() == 1 { "changes" } else { "change" });
            vec![format!("{keys}: {change} only with a restart; restart tallyd, or take the change back")]
        })?;
        set_level(new.log.level);
        warn(&loaded);
        tracing::info!(changed = changed.join(", "), "the configuration was read again");
        current = loaded.config;
        Ok(current.clone())
    }
}

/// Logs what is right in the configuration, but does nothing.
fn warn(loaded: &Loaded) {
    loaded.notes().iter().for_each(|note| tracing::warn!("{note}"));
}

fn run_agent(
    config: &Config,
    reload: impl FnMut() -> Result<Config, Vec<String>> + Send + 'static,
) -> Result<(), Failure> {
    agent::run(config, reload).map_err(|error| Failure::told(error.exit_code(), error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_reload_takes_the_whole_file_or_nothing_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tallyd.toml");
        let layers = Layers { config: path.clone().into(), set: Vec::new() };
        fs::write(&path, "").unwrap();
        let (levels, seen) = mpsc::channel();
        let set_level = move |level| levels.send(level).unwrap();
        let reload = RefCell::new(reloader(layers.clone(), layers.load().unwrap().config, set_level));
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            (reload.borrow_mut())()
        };

        assert_eq!(read("[log]\nlevel = 'debug'").unwrap().log.level, Level::Debug);
        let refused = read("[log]\nlevel = 'warn'\n[flush]\nwindow = '20s'").unwrap_err();
        assert!(refused[0].starts_with("flush.window: changes only with a restart"), "{refused:?}");
        let refused = read("[log]\nlevel = 'loud'\nlvl = 1").unwrap_err();
        assert!(refused.len() == 2 && refused[0].contains("tallyd.toml:2:9: log.level"), "{refused:?}");
        assert_eq!(read("").unwrap().log.level, Level::Info);
        drop(reload);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [Level::Debug, Level::Info]);
    }
}
