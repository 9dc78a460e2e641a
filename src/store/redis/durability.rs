//! What a Redis says about itself: what it would lose with its process, and whether it throws series away.
//!
//! `INFO` and, where it may be asked, `CONFIG GET`. A server that tells less is trusted less.

use std::collections::HashMap;

use super::{Connection, Error};

/// What was applied longer ago than this is in an append-only file that is written each second, with a second to spare.
const AOF_MS: u64 = 2_000;

/// How long batches stay in the outbox where the server keeps nothing: what a restart within it loses is sent again.
const NOTHING_KEPT_MS: u64 = 60_000;

/// How a server keeps what it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Durability {
    /// What was applied before this moment of the server's clock, in milliseconds since the epoch, outlives the process.
    pub(in crate::store) stable_before_ms: u64,
    /// The policy by which the server throws keys away, where it is not `noeviction`.
    pub(in crate::store) eviction: Option<String>,
}

impl Durability {
    /// Asks the server.
    pub(in crate::store) async fn ask(connection: &Connection) -> Result<Self, Error> {
        let info = connection.info().await?;
        let save = connection.parameter("save").await?;
        let fsync = connection.parameter("appendfsync").await?;
        Ok(Self::read(&info, save.as_deref(), fsync.as_deref()))
    }

    /// Reads the answers; `None` for a parameter that the server does not tell.
    fn read(info: &str, save: Option<&str>, fsync: Option<&str>) -> Self {
        let fields: HashMap<&str, &str> = info.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
        let number = |name| fields.get(name).and_then(|value| value.parse::<i64>().ok()).unwrap_or(0);
        let is = |name, value| fields.get(name) == Some(&value);
        let now_ms = (number("server_time_usec") / 1_000) as u64;

        // An append-only file that the kernel writes when it likes says nothing.
        let appends = is("aof_enabled", "1") && fsync != Some("no");
        let appended = appends && is("aof_last_write_status", "ok") && number("aof_pending_bio_fsync") == 0;
        let aof_ms = if appended { now_ms.saturating_sub(AOF_MS) } else { 0 };

        // The file holds what there was when the save began, which is told in whole seconds.
        let saved_at = number("rdb_last_save_time") - number("rdb_last_bgsave_time_sec").max(0) - 1;
        let saves = save != Some("");
        let rdb_ms = if saves { saved_at.max(0) as u64 * 1_000 } else { 0 };

        let kept_ms = if appends || saves { aof_ms.max(rdb_ms) } else { now_ms.saturating_sub(NOTHING_KEPT_MS) };
        let policy = fields.get("maxmemory_policy").copied().unwrap_or("noeviction");
        Self { stable_before_ms: kept_ms, eviction: (policy != "noeviction").then(|| policy.to_owned()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_700_000_000_000;

    fn info(lines: &str) -> String {
        format!("# Server\r\nserver_time_usec:{NOW_MS}000\r\n{}\r\n", lines.replace(' ', "\r\n"))
    }

    fn stable(lines: &str, save: Option<&str>, fsync: Option<&str>) -> u64 {
        Durability::read(&info(lines), save, fsync).stable_before_ms
    }

    #[test]
    fn a_file_that_is_appended_to_is_two_seconds_behind() {
        let healthy = "aof_enabled:1 aof_last_write_status:ok aof_pending_bio_fsync:0";
        assert_eq!(stable(healthy, Some(""), Some("everysec")), NOW_MS - 2_000);
        assert_eq!(stable("aof_enabled:1 aof_last_write_status:err", Some(""), None), 0);
        assert_eq!(stable("aof_enabled:1 aof_last_write_status:ok aof_pending_bio_fsync:1", Some(""), None), 0);
        assert_eq!(stable(healthy, Some(""), Some("no")), NOW_MS - 60_000);
    }

    #[test]
    fn a_save_holds_what_there_was_when_it_began() {
        let saved = "aof_enabled:0 rdb_last_save_time:1699999000 rdb_last_bgsave_time_sec:10";
        assert_eq!(stable(saved, Some("3600 1"), None), (1_699_999_000 - 11) * 1_000);
        assert_eq!(stable(saved, None, None), (1_699_999_000 - 11) * 1_000);
        assert_eq!(stable(saved, Some(""), None), NOW_MS - 60_000);
    }

    #[test]
    fn a_policy_that_throws_series_away_is_told() {
        let eviction = |lines: &str| Durability::read(&info(lines), None, None).eviction;
        assert_eq!(eviction("maxmemory_policy:noeviction"), None);
        assert_eq!(eviction("maxmemory_policy:allkeys-lru"), Some("allkeys-lru".to_owned()));
    }
}
