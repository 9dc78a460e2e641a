//! Whose processes may send by unix sockets: names of users and groups into numbers, and the judgement of a peer by them.
//!
//! The kernel says who a peer is: of a stream who connected it (SO_PEERCRED), whoever writes to it afterwards; of a datagram
//! whom its sender names (SCM_CREDENTIALS), which may be another user only with CAP_SETUID, and another process only with
//! CAP_SYS_ADMIN. So who could become one of these users anyway can pretend to be. Users of a namespace that has no number
//! here are all 65534, mostly called nobody: they may send where that is named.
//!
//! Names are looked up once, at the start.

use std::fs;
use std::sync::Arc;

use nix::unistd::{Gid, Group, Uid, User, getgroups};

use super::{Config, Error, GROUP_KEY};
use crate::ingest::Address;
use crate::units::Account;

/// The users whose processes may send; all, if none is named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Peers(Arc<[u32]>);

impl Peers {
    /// The users of `listen.unix_uids`.
    pub(super) fn new(config: &Config) -> Result<Self, Error> {
        config.unix_uids.iter().map(user).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a process may send.
    #[inline]
    pub(super) fn admit(&self, peer: Option<Address>) -> bool {
        self.0.is_empty() || self.names(peer)
    }

    fn names(&self, peer: Option<Address>) -> bool {
        match peer {
            Some(Address::Process { uid, .. }) => self.0.contains(&uid),
            // Who can't be told apart is not one of those that are named.
            Some(Address::Inet(_) | Address::Record { .. }) | None => false,
        }
    }
}

fn user(account: &Account) -> Result<u32, Error> {
    let name = account.0.as_str();
    let by_name = || User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
    let found = name.parse().ok().or_else(by_name);
    found.ok_or_else(|| Error::Account { key: "listen.unix_uids", value: name.to_owned() })
}

/// The group of `listen.unix_group`, if one is named.
pub(super) fn group(config: &Config) -> Result<Option<u32>, Error> {
    let name = config.unix_group.0.as_str();
    if name.is_empty() {
        return Ok(None);
    }
    let by_name = || Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw());
    let found = name.parse().ok().or_else(by_name);
    found.map(Some).ok_or_else(|| Error::Account { key: GROUP_KEY, value: name.to_owned() })
}

/// Whether this process may give its sockets' files to the group of `listen.unix_group`, if one is named and there are any.
pub(super) fn check_group(config: &Config) -> Result<(), Error> {
    let Some(group) = group(config)? else { return Ok(()) };
    let has_files = !config.unixgram.is_empty() || !config.unix.is_empty();
    let is_member = || Gid::effective().as_raw() == group || getgroups().is_ok_and(|all| all.contains(&group.into()));
    if has_files && !may_chown() && !is_member() {
        return Err(Error::NotMember { value: config.unix_group.0.clone() });
    }
    Ok(())
}

/// Whether this process may give files to any group: CAP_CHOWN is the first bit of its capabilities.
fn may_chown() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    effective.map_or_else(|| Uid::effective().is_root(), |effective| effective & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(uids: &[&str], group: &str) -> Config {
        let account = |text: &&str| Account((*text).to_owned());
        Config { unix_uids: uids.iter().map(account).collect(), unix_group: account(&group), ..Config::default() }
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_by_number() {
        assert_eq!(Peers::new(&config(&["root", "12345"], "")).unwrap(), Peers([0, 12_345].into()));
        assert_eq!(group(&config(&[], "root")).unwrap(), Some(0));
        assert_eq!(group(&config(&[], "4242")).unwrap(), Some(4_242));
        assert_eq!(group(&config(&[], "")).unwrap(), None);
        let error = Peers::new(&config(&["no-such-user"], "")).unwrap_err();
        assert_eq!(error.exit_code(), 78);
        assert!(
            error.to_string().starts_with("listen.unix_uids = \"no-such-user\": this host has no such user"),
            "{error}"
        );
        let error = group(&config(&[], "no-such-group")).unwrap_err();
        assert!(error.to_string().contains("getent group"), "{error}");
    }

    #[test]
    fn only_those_who_are_named_may_send_if_any_are() {
        let process = |uid| Some(Address::Process { uid, pid: 1 });
        let all = Peers::default();
        assert!(all.admit(process(5)) && all.admit(None));
        let some = Peers([5, 7].into());
        assert!(some.admit(process(5)) && some.admit(process(7)));
        assert!(!some.admit(process(6)) && !some.admit(None));
        // Who has no number here is one of those that are named only where this is.
        assert!(!some.admit(process(65_534)) && Peers([65_534].into()).admit(process(65_534)));
    }
}
