//! The way to Graphite: a connection for what waits, as Etsy's backend makes one for each flush.
//!
//! The address is looked up for each. When all is written, our side of the connection is closed, and Graphite closes its own
//! once it has read all: that is how it is known to have arrived, since Carbon says nothing. A receiver that leaves its side
//! open is believed after a while. A connection that breaks before is an error: what it had is sent again, after a pause
//! that grows to 10 s and is spread, so that many agents do not come back at once. One that closes its own side before it
//! has read anything can't be told from one that hung up, so none of its windows is ever taken for read.

use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream, ToSocketAddrs as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::queue::{Queue, Read};
use super::{Limits, tell_lost};
use crate::clock;
use crate::telemetry;

/// The shortest and the longest pause before the next attempt.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// For how long an outage is waited for at a stop. One that was there before has the one attempt.
const LAST_ATTEMPTS: Duration = Duration::from_secs(2);

/// How long a receiver that has everything may leave the connection open before it is believed to have read it; at a stop.
const CLOSE: Duration = Duration::from_secs(5);
const CLOSE_AT_STOP: Duration = Duration::from_millis(500);

/// How often it is looked whether there is a stop meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// Why a delivery failed.
#[derive(Debug)]
enum Failure {
    Resolve(io::Error),
    Connect(io::Error),
    Write(io::Error),
    /// It hung up before it had read all.
    Close(io::Error),
}

/// The labels of failures.
pub(super) const REASONS: [&str; 4] = ["resolve", "connect", "write", "close"];

impl Failure {
    const fn reason(&self) -> &'static str {
        match self {
            Self::Resolve(_) => REASONS[0],
            Self::Connect(_) => REASONS[1],
            Self::Write(_) => REASONS[2],
            Self::Close(_) => REASONS[3],
        }
    }

    const fn error(&self) -> &io::Error {
        match self {
            Self::Resolve(error) | Self::Connect(error) | Self::Write(error) | Self::Close(error) => error,
        }
    }
}

/// How the last deliveries went: Etsy's `graphiteStats`.
#[derive(Debug, Default)]
pub(super) struct Delivered(Mutex<Last>);

/// What Etsy's backend says of itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Last {
    pub(super) flushed_s: u64,
    pub(super) failed_s: u64,
    pub(super) took_ms: u64,
    pub(super) bytes: u64,
}

impl Delivered {
    pub(super) fn last(&self) -> Last {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, set: impl FnOnce(&mut Last)) {
        set(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The thread that sends.
pub(super) struct Sending {
    to: String,
    limits: Limits,
    queue: Arc<Queue>,
    delivered: Arc<Delivered>,
}

/// Attempts that failed, one after the other.
struct Outage {
    since: Instant,
    failures: u32,
}

impl Sending {
    pub(super) fn new(to: &str, limits: &Limits, queue: &Arc<Queue>, delivered: &Arc<Delivered>) -> Self {
        // As Etsy's: before the first flush the time of the start stands there.
        delivered.set(|last| last.flushed_s = now_s());
        let (queue, delivered) = (Arc::clone(queue), Arc::clone(delivered));
        Self { to: to.to_owned(), limits: limits.clone(), queue, delivered }
    }

    pub(super) fn run(self) {
        let mut outage: Option<Outage> = None;
        while self.queue.wait_for_chunks() {
            let since = Instant::now();
            match self.deliver() {
                Ok(read) => self.succeeded(read, outage.take().as_ref()),
                Err(failure) => {
                    let so_far = outage.get_or_insert(Outage { since, failures: 0 });
                    self.failed(&failure, so_far);
                    let deadline = self.queue.deadline();
                    let Some(until) = next_attempt(so_far, deadline) else { break };
                    self.queue.pause(until, deadline.is_some());
                }
            }
        }
        tell_lost(self.queue.give_up());
    }

    fn succeeded(&self, read: Read, outage: Option<&Outage>) {
        telemetry::GRAPHITE_WINDOWS_SENT.counter(&[]).increment(read.windows);
        telemetry::GRAPHITE_LINES_SENT.counter(&[]).increment(read.lines);
        telemetry::GRAPHITE_SENT_BYTES.counter(&[]).increment(read.bytes);
        if let Some(Outage { since, failures }) = outage {
            let seconds = since.elapsed().as_secs();
            tracing::info!(to = self.to, seconds, failures, windows = read.windows, "Graphite takes windows again");
        }
    }

    fn failed(&self, failure: &Failure, outage: &mut Outage) {
        telemetry::GRAPHITE_CONNECTED.gauge(&[]).set(0.0);
        telemetry::GRAPHITE_FAILED.counter(&[failure.reason()]).increment(1);
        self.delivered.set(|last| last.failed_s = now_s());
        self.queue.failed();
        let (step, error) = (failure.reason(), failure.error());
        if outage.failures == 0 {
            tracing::warn!(to = self.to, step, %error, "Graphite does not take windows; they wait");
        } else {
            tracing::debug!(to = self.to, step, %error, "Graphite does not take windows");
        }
        outage.failures += 1;
    }

    /// Sends all that waits on a connection of its own.
    fn deliver(&self) -> Result<Read, Failure> {
        let mut stream = self.connect()?;
        telemetry::GRAPHITE_CONNECTED.gauge(&[]).set(1.0);
        self.queue.set_connected(true);
        let begun = Instant::now();
        while let Some((id, bytes)) = self.queue.next() {
            self.write(&mut stream, &bytes)?;
            self.queue.wrote(id);
        }
        let took_ms = begun.elapsed().as_millis() as u64;
        self.close(&mut stream)?;
        self.queue.set_connected(false);
        let read = self.queue.read();
        self.delivered.set(|last| (last.flushed_s, last.took_ms, last.bytes) = (now_s(), took_ms, read.bytes));
        Ok(read)
    }

    /// Less of a time where a stop leaves less.
    fn within(&self, limit: Duration) -> Duration {
        let left = self.queue.deadline().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // A timeout of 0 would be none.
        left.map_or(limit, |left| left.min(limit)).max(Duration::from_millis(1))
    }

    fn connect(&self) -> Result<TcpStream, Failure> {
        let addresses = self.to.to_socket_addrs().map_err(Failure::Resolve)?;
        let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, self.within(self.limits.graphite_connect.0)) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(Failure::Connect(last))
    }

    fn write(&self, stream: &mut TcpStream, mut bytes: &[u8]) -> Result<(), Failure> {
        is_open(stream).map_err(Failure::Close)?;
        while !bytes.is_empty() {
            stream.set_write_timeout(Some(self.within(self.limits.graphite_write.0))).map_err(Failure::Write)?;
            match stream.write(bytes) {
                Ok(0) => return Err(Failure::Write(ErrorKind::WriteZero.into())),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Write(timed_out(error))),
            }
        }
        Ok(())
    }

    /// Closes our side and waits for the other one.
    fn close(&self, stream: &mut TcpStream) -> Result<(), Failure> {
        is_open(stream).map_err(Failure::Close)?;
        stream.shutdown(Shutdown::Write).map_err(Failure::Close)?;
        let begun = Instant::now();
        let mut said = [0; 512];
        stream.set_read_timeout(Some(LOOK)).map_err(Failure::Close)?;
        while begun.elapsed() < self.within(if self.queue.deadline().is_some() { CLOSE_AT_STOP } else { CLOSE }) {
            match stream.read(&mut said) {
                Ok(0) => return Ok(()),
                // Whatever it says.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted || is_timeout(&error) => {}
                Err(error) => return Err(Failure::Close(error)),
            }
        }
        Ok(())
    }
}

/// Whether the other side has not hung up: after that it reads nothing any more, and would not say so.
fn is_open(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false)?;
    match peeked {
        Ok(0) => Err(io::Error::new(ErrorKind::UnexpectedEof, "it hung up before all was written")),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    }
}

/// What a timeout of a socket is called.
fn timed_out(error: io::Error) -> io::Error {
    if is_timeout(&error) {
        io::Error::new(ErrorKind::TimedOut, "it read nothing for limits.graphite_write")
    } else {
        error
    }
}

/// A read that found nothing in its time, or a write that found no room.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// When it is tried again; `None` where the deadline of a stop is not worth waiting for.
fn next_attempt(outage: &Outage, deadline: Option<Instant>) -> Option<Instant> {
    let Some(deadline) = deadline else { return Some(Instant::now() + pause(outage.failures)) };
    let next = Instant::now() + PAUSE_MIN;
    (next < deadline.min(outage.since + LAST_ATTEMPTS)).then_some(next)
}

/// The pause after so many failures: twice as long each time, and between half and all of that.
fn pause(failures: u32) -> Duration {
    let whole = PAUSE_MIN.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX);
    let random = RandomState::new().hash_one(failures) as f64 / u64::MAX as f64;
    whole.mul_f64(0.5 + random / 2.0)
}

fn now_s() -> u64 {
    clock::wall_ms() / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_waits_for_a_new_outage_alone() {
        let now = Instant::now();
        let is_tried_again = |age_s, left_s: Option<u64>| {
            let outage = Outage { since: now.checked_sub(Duration::from_secs(age_s)).unwrap(), failures: 1 };
            next_attempt(&outage, left_s.map(|left_s| now + Duration::from_secs(left_s))).is_some()
        };
        assert!(is_tried_again(0, Some(20)) && is_tried_again(60, None));
        assert!(!is_tried_again(60, Some(20)) && !is_tried_again(0, Some(0)));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        for failures in 0..40 {
            let pause = pause(failures);
            assert!(pause >= PAUSE_MIN / 2 && pause <= PAUSE_MAX, "{pause:?}");
        }
        let many: std::collections::BTreeSet<_> = (0..50).map(|_| pause(20)).collect();
        assert!(many.len() > 40 && many.iter().all(|pause| *pause >= PAUSE_MAX / 2));
    }
}
