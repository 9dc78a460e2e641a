//! What a server says about itself: what it would lose with its process, who else has it, and whether it throws series
//! away.
//!
//! `INFO` and, where it may be asked, `CONFIG GET`. A server that tells less is trusted less. Where replicas are to have
//! a batch (`store.redis.replicas`), what they acknowledged is stable, and nothing else; where none are, what the
//! server's own files hold.

use std::collections::HashMap;

use super::connection::Server;
use super::{Error, Replicas};
use crate::store::Partition;

/// What was applied longer ago than this is in an append-only file that is written each second, with a second to spare.
const AOF_MS: u64 = 2_000;

/// How long batches stay in the outbox where the server keeps nothing: what a restart within it loses is sent again.
const NOTHING_KEPT_MS: u64 = 60_000;

/// How a server keeps what it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Durability {
    /// What would not be lost any more.
    pub(in crate::store) stable: Stable,
    /// The sequences that the server had of the agent: less than it once acknowledged where a failover took that back.
    pub(in crate::store) sequences: Vec<(Partition, u64)>,
    /// The server's clock, in milliseconds since the epoch.
    pub(in crate::store) now_ms: u64,
    /// The policy by which the server throws keys away, where it is not `noeviction`.
    pub(in crate::store) eviction: Option<String>,
    /// How many replicas it has and how many it should have, where these are more.
    pub(in crate::store) short_of_replicas: Option<(u32, u32)>,
}

/// What would not be lost any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Stable {
    /// What was applied before this moment of the server's clock, in milliseconds since the epoch, and is still there.
    Before(u64),
    /// All that is there: the replicas have it.
    All,
    /// Nothing: the replicas did not have it in time.
    Nothing,
}

impl Durability {
    /// Asks a server about what it has of an agent in partitions where not all is stable yet.
    pub(in crate::store) async fn ask(
        server: &Server,
        agent: &str,
        replicas: Replicas,
        unstable: &[Partition],
    ) -> Result<Self, Error> {
        let mut info = Info::read(&server.info().await?);
        if !info.is_master {
            return Err(Error::ReadOnly);
        }
        if info.now_ms == 0 {
            // Old servers don't tell it there.
            info.now_ms = server.now_ms().await?;
        }
        let wanted = replicas.of(info.replicas);
        let (stable, sequences) = if wanted > 0 {
            server.replicated(agent, unstable, wanted, info.now_ms).await?
        } else {
            let save = server.parameter("save").await?;
            let fsync = server.parameter("appendfsync").await?;
            let kept_ms = info.kept_ms(save.as_deref(), fsync.as_deref());
            (Stable::Before(kept_ms), server.sequences(agent, unstable).await?)
        };
        let short_of_replicas = (info.replicas < wanted).then_some((info.replicas, wanted));
        Ok(Self { stable, sequences, now_ms: info.now_ms, eviction: info.eviction, short_of_replicas })
    }
}

/// What `INFO` tells.
#[derive(Debug)]
struct Info {
    now_ms: u64,
    is_master: bool,
    /// How many replicas follow it.
    replicas: u32,
    eviction: Option<String>,
    /// An append-only file is written.
    appends: bool,
    /// All of it has reached the disk but for the last seconds.
    appended: bool,
    /// When the last file of all data was begun, in seconds since the epoch.
    saved_at: i64,
}

impl Info {
    fn read(info: &str) -> Self {
        let fields: HashMap<&str, &str> = info.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
        let number = |name| fields.get(name).and_then(|value| value.parse::<i64>().ok()).unwrap_or(0);
        let is = |name, value| fields.get(name) == Some(&value);
        let policy = fields.get("maxmemory_policy").copied().unwrap_or("noeviction");
        let is_replica = |name: &str| {
            name.strip_prefix("slave").is_some_and(|at| !at.is_empty() && at.bytes().all(|b| b.is_ascii_digit()))
        };
        let online = fields.iter().filter(|(name, value)| is_replica(name) && value.contains("state=online"));
        Self {
            now_ms: (number("server_time_usec") / 1_000) as u64,
            is_master: !is("role", "slave"),
            replicas: online.count() as u32,
            eviction: (policy != "noeviction").then(|| policy.to_owned()),
            appends: is("aof_enabled", "1"),
            appended: is("aof_last_write_status", "ok") && number("aof_pending_bio_fsync") == 0,
            // The file holds what there was when the save began, which is told in whole seconds.
            saved_at: number("rdb_last_save_time") - number("rdb_last_bgsave_time_sec").max(0) - 1,
        }
    }

    /// What was applied before this moment is in a file; `None` for a parameter that the server does not tell.
    fn kept_ms(&self, save: Option<&str>, fsync: Option<&str>) -> u64 {
        // An append-only file that the kernel writes when it likes says nothing.
        let appends = self.appends && fsync != Some("no");
        let aof_ms = if appends && self.appended { self.now_ms.saturating_sub(AOF_MS) } else { 0 };
        let saves = save != Some("");
        let rdb_ms = if saves { self.saved_at.max(0) as u64 * 1_000 } else { 0 };
        if appends || saves { aof_ms.max(rdb_ms) } else { self.now_ms.saturating_sub(NOTHING_KEPT_MS) }
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
        Info::read(&info(lines)).kept_ms(save, fsync)
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
        let eviction = |lines: &str| Info::read(&info(lines)).eviction;
        assert_eq!(eviction("maxmemory_policy:noeviction"), None);
        assert_eq!(eviction("maxmemory_policy:allkeys-lru"), Some("allkeys-lru".to_owned()));
    }

    #[test]
    fn replicas_count_once_they_follow() {
        let replicas = |lines: &str| Info::read(&info(lines)).replicas;
        assert_eq!(replicas("role:master connected_slaves:0"), 0);
        let online = "slave0:ip=10.0.0.1,port=6379,state=online,offset=1,lag=0";
        assert_eq!(replicas(&format!("{online} slave1:ip=10.0.0.2,port=6379,state=wait_bgsave,offset=0,lag=0")), 1);
        assert_eq!(Replicas::Auto.of(2), 1);
        assert_eq!(Replicas::Auto.of(0), 0);
        assert_eq!(Replicas::Count(2).of(0), 2);
    }
}
