//! The servers that another program sends lines on to, as `export.relay.to`: what our own check would refuse is left out,
//! and said. Pure.

use super::draft::Draft;
use crate::export::relay::{Config, TARGETS_MAX};

/// Takes these servers, each as `host:port`; `said` is the name of what they stand for. The addresses of `listen.udp` are to
/// be in the draft already.
pub(super) fn set(draft: &mut Draft, said: &str, given: impl IntoIterator<Item = String>) {
    let own: Vec<_> = draft.texts("listen.udp").iter().filter_map(|text| text.parse().ok()).collect();
    let mut to: Vec<String> = Vec::new();
    for target in given {
        let why = if to.contains(&target) {
            Some("it stands there twice, and each server gets a line once here".to_owned())
        } else if to.len() == TARGETS_MAX {
            Some(format!("there are {TARGETS_MAX} servers at most; let one of them send on to the others"))
        } else {
            let alone = Config { to: vec![target.clone()], ..Config::default() };
            alone.check(&own).err().map(|error| error.to_string())
        };
        match why {
            Some(why) => {
                draft.leave(&format!("{said} {target}"), &why);
                draft.warn(format!("{said} {target:?} is left out: {why}"));
            }
            None => to.push(target),
        }
    }
    if !to.is_empty() {
        draft.set("export.relay.to", to, said);
    }
}

/// `host:port`, an address of IPv6 in brackets; without a host this one, as systems look up none.
pub(super) fn target(host: &str, port: u16) -> String {
    match host {
        "" => format!("127.0.0.1:{port}"),
        _ if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{port}"),
        _ => format!("{host}:{port}"),
    }
}
