//! `tallyd run`: the configuration read, the log opened, the agent started, and what a reload reads anew.

use super::{Code, Failure, Layers, log};
use crate::agent;
use crate::handover;

/// Runs the agent until it is told to stop.
pub fn run(layers: &Layers) -> Result<(), Failure> {
    if handover::go_between().map_err(|error| Failure::told(Code::Io, format!("no successor: {error}")))? {
        return Ok(());
    }
    let loaded = layers.load().map_err(Failure::brief)?;
    let set_level = log::open(loaded.config.log.level);
    loaded.notes().iter().for_each(|note| tracing::warn!("{note}"));
    let layers = layers.clone();
    // All layers and all files are read again; what is in force, and whether it can be another, the agent knows.
    let reload = move || layers.load().map_err(Failure::lines);
    agent::run(&loaded.config, reload, set_level).map_err(|error| Failure::told(error.exit_code(), error.to_string()))
}
