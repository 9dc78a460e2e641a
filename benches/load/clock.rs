//! Processor time, which other programs on the machine disturb less than the wall clock, and the cores it is spent on.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// How long any condition may take to come true.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long this thread has run.
pub(crate) fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock for each thread").into()
}

/// How long all threads of this process have run, those that ended among them.
pub(crate) fn process_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).expect("a clock for each process").into()
}

/// Nanoseconds of this thread for each of so many, and the answer of what was done.
pub(crate) fn each<T>(count: usize, work: impl FnOnce() -> T) -> (f64, T) {
    let begun = thread_time();
    let answer = work();
    ((thread_time() - begun).as_secs_f64() * 1e9 / count as f64, answer)
}

/// Waits until `check` gives something.
pub(crate) fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        sleep(Duration::from_millis(1));
    }
}

/// Keeps this thread, and those that it starts from now on, on one core.
pub(crate) fn pin(core: usize) {
    set_affinity(0, core);
}

fn set_affinity(thread: i32, core: usize) {
    let mut set = CpuSet::new();
    set.set(core).expect("the number of a core");
    sched_setaffinity(Pid::from_raw(thread), &set).expect("leave to run on that core");
}

/// The core of generators and the one of what is measured: different ones, where there are two.
pub(crate) fn cores() -> [usize; 2] {
    [0, 1].map(|core| core.min(std::thread::available_parallelism().map_or(1, Into::into) - 1))
}

/// Another thread of this process.
pub(crate) struct Thread {
    directory: PathBuf,
    number: i32,
}

impl Thread {
    /// The one of this name, if there is one.
    pub(crate) fn find(name: &str) -> Option<Self> {
        let mut threads = fs::read_dir("/proc/self/task").expect("/proc").filter_map(Result::ok);
        let is_it =
            |directory: &PathBuf| fs::read_to_string(directory.join("comm")).is_ok_and(|comm| comm.trim() == name);
        let directory = threads.find_map(|entry| Some(entry.path()).filter(is_it))?;
        let number = directory.file_name()?.to_str()?.parse().ok()?;
        Some(Self { directory, number })
    }

    /// The one of this name, when it has begun to run: before that it has no name.
    pub(crate) fn named(name: &str) -> Self {
        until(name, || Self::find(name))
    }

    /// Keeps it on one core.
    pub(crate) fn pin(&self, core: usize) {
        set_affinity(self.number, core);
    }

    /// How long it has run until it rests. The kernel's sum is exact then, and up to 4 ms old while it runs.
    pub(crate) fn rested(&self) -> Duration {
        until("a thread to rest", || {
            let before = self.ran();
            let stat = fs::read_to_string(self.directory.join("stat")).expect("a thread that lives");
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            (state == Some('S') && self.ran() == before).then_some(before)
        })
    }

    fn ran(&self) -> Duration {
        let text = fs::read_to_string(self.directory.join("schedstat")).expect("a kernel with scheduler statistics");
        let ran = text.split(' ').next().and_then(|field| field.parse().ok());
        Duration::from_nanos(ran.expect("nanoseconds in the first field"))
    }
}
