//! What systemd is told of this process, and what it wants to know: that it is ready, reloads, stops or needs more time, a
//! line of status, a sign of life, a new main process, descriptors to keep; and whether standard error is its journal.
//!
//! Outside systemd, where there is no `NOTIFY_SOCKET`, all of it does nothing. A message that could not be sent is logged
//! once and never an error: who runs without being heard runs. Nothing here decides when something is said.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;
use std::{env, fs};

use sd_notify::NotifyState;

/// Whether somebody listens.
pub fn is_there() -> bool {
    env::var_os("NOTIFY_SOCKET").is_some()
}

/// All is up: a start or a reload is over.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
}

/// A reload begins; [`ready`] ends it, whether it was refused or not.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    let states = [NotifyState::Reloading].into_iter().chain(now.ok());
    tell(&states.collect::<Vec<_>>());
}

/// The stop begins, and takes at most so long.
pub fn stopping(within: Duration) {
    let more = NotifyState::ExtendTimeoutUsec(micros(within + MORE_TIME));
    tell(&[NotifyState::Stopping, more, NotifyState::Status("stopping: what the sockets hold, then the last flush")]);
}

/// The line that `systemctl status` shows.
pub fn status(line: &str) {
    tell(&[NotifyState::Status(&one_line(line))]);
}

/// A sign of life, for the watchdog.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// How long the watchdog waits for a sign of life, if there is one.
///
/// `WATCHDOG_PID` names the process that systemd started. One that takes its place is given the environment without that
/// name.
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|time| is_there() && !time.is_zero())
}

/// Another process is the service from now on, this one's words count no more. Systemd has taken note of it when
/// [`barrier`] says so.
pub fn main_pid(pid: u32) {
    tell(&[NotifyState::MainPid(pid)]);
}

/// Waits until systemd has read all that was told before, at most for `patience`; false when it has not. What is not there
/// has nothing to read.
pub fn barrier(patience: Duration) -> bool {
    !is_there() || hang_up(patience).inspect_err(unheard).is_ok()
}

/// Sends one end of a pair along, and waits until systemd closes it.
fn hang_up(patience: Duration) -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    // Nothing is ever written there.
    ours.read(&mut [0]).map(drop)
}

/// Lets systemd keep descriptors under a name, for the process that it starts next. It must not look for errors on them:
/// a datagram that a peer refused is one, and no reason to let the socket go.
pub fn store(name: &str, descriptors: &[BorrowedFd<'_>]) {
    if is_there() {
        let states = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
        drop(sd_notify::notify_with_fds(&states, descriptors).inspect_err(unheard));
    }
}

/// Lets go what systemd keeps under a name.
pub fn forget(name: &str) {
    tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

fn tell(states: &[NotifyState<'_>]) {
    drop(sd_notify::notify(states).inspect_err(unheard));
}

fn unheard(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| tracing::warn!(%error, "systemd could not be told how the agent is; this is said once"));
}

/// A message has a line for each state.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

/// How often it is looked whether a long start or stop goes on.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The time that is then asked for.
const MORE_TIME: Duration = Duration::from_secs(30);

/// While it lives, systemd is asked for more time as long as this process works at something: it is then reading a large
/// journal at its start, or writing the last flush at its stop. One that hangs uses no processor, and gets none.
#[derive(Debug)]
pub struct MoreTime {
    /// Its end is noticed.
    _alive: mpsc::Sender<()>,
}

impl MoreTime {
    /// Begins to ask, and says what takes so long. `None` where nobody is there to be asked.
    pub fn asking(what: &'static str) -> Option<Self> {
        let (alive, ended) = mpsc::channel();
        let ask = move || {
            let mut used = processor_ticks();
            while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                let now = processor_ticks();
                if std::mem::replace(&mut used, now) != now {
                    tell(&[NotifyState::ExtendTimeoutUsec(micros(MORE_TIME)), NotifyState::Status(what)]);
                }
            }
        };
        // Without the thread the time is what the unit says.
        let asks = is_there() && thread::Builder::new().name("more-time".to_owned()).spawn(ask).is_ok();
        asks.then_some(Self { _alive: alive })
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// The processor time that this process has used, in ticks of the kernel; `None` where `/proc` does not say.
fn processor_ticks() -> Option<u64> {
    ticks_in(&fs::read_to_string("/proc/self/stat").ok()?)
}

/// Fields 14 and 15 of proc_pid_stat(5), user and system; the name before them may hold anything.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(ticks()? + ticks()?)
}

/// Whether what is written to standard error goes to systemd's journal: then a log had better go there by itself.
pub fn stderr_is_journal() -> bool {
    let named = env::var("JOURNAL_STREAM").ok();
    // A descriptor of its own, so that what is looked at is what is written to.
    let stderr = || io::stderr().as_fd().try_clone_to_owned().and_then(|stderr| File::from(stderr).metadata());
    named.is_some_and(|named| stderr().is_ok_and(|found| named == format!("{}:{}", found.dev(), found.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_used_is_read_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 40 2 0 0";
        assert_eq!(ticks_in(&format!("7 (tallyd) {fields}")), Some(42));
        assert_eq!(ticks_in(&format!("7 (a) b) (c) {fields}")), Some(42));
        assert_eq!(ticks_in("7 (tallyd) S 1"), None);
        assert!(processor_ticks().is_some());
    }

    #[test]
    fn a_state_stays_in_its_line() {
        assert_eq!(one_line("bad\nREADY=1\r"), "bad READY=1 ");
    }
}
