//! One sender: messages from the ring to its socket, a burst every millisecond, as many as the clock says are due, and as
//! many by one call as the kernel takes. What a late burst lacks, the next one makes up for; no error of a sleep adds up.

use std::io;
use std::iter::{Cycle, Skip};
use std::slice;
use std::thread;
use std::time::Duration;

use super::load::{Load, Message};
use crate::cli::send::Sender;
use crate::clock::Clock;
use crate::listen::burst::VOLLEY;

/// From one burst to the next.
const TICK: Duration = Duration::from_millis(1);

/// By how much a paced load may be late and is still finished.
const LATE: Duration = Duration::from_millis(100);

/// What one sender has to send.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// Lines, of all senders together, in a second; 0 is as fast as possible.
    pub(super) rate: u64,
    /// How many senders share the rate.
    pub(super) senders: u64,
    /// Lines of this sender.
    pub(super) lines: u64,
    /// When it ends at the latest.
    pub(super) time: Duration,
}

impl Share {
    /// The share of sender `number` of `senders` in a load of so many lines, or of what the rate makes of the time.
    pub(super) fn new(number: u64, senders: u64, rate: u64, lines: u64, time: Duration) -> Self {
        let all = if rate == 0 { lines } else { lines.min(lines_in(time, rate, 1)) };
        let time = if rate == 0 { time } else { time + LATE };
        Self { rate, senders, lines: all / senders + u64::from(number < all % senders), time }
    }

    /// Lines that are to be sent until the end of the tick of this moment.
    fn due(&self, now: Duration) -> u64 {
        if self.rate == 0 {
            return self.lines;
        }
        let ticks = now.as_nanos() / TICK.as_nanos() + 1;
        let end = TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX));
        lines_in(end, self.rate, self.senders).min(self.lines)
    }

    /// From this moment to the next burst.
    fn rest(now: Duration) -> Duration {
        TICK - Duration::from_nanos((now.as_nanos() % TICK.as_nanos()) as u64)
    }
}

/// Lines in this time for each sender, rounded up so that shares that differ by one are all reached.
fn lines_in(time: Duration, rate: u64, senders: u64) -> u64 {
    let lines = (time.as_nanos() * u128::from(rate)).div_ceil(1_000_000_000 * u128::from(senders));
    u64::try_from(lines).unwrap_or(u64::MAX)
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    /// System calls that took something.
    pub(super) calls: u64,
    pub(super) packets: u64,
    /// With what frames them in streams, without headers of the network.
    pub(super) bytes: u64,
    pub(super) lines: u64,
    /// Lines that add 1 to a counter.
    pub(super) counters: u64,
    /// From the first packet to the last.
    pub(super) took: Duration,
}

impl Sent {
    /// Of two senders that began together.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
            lines: self.lines + other.lines,
            counters: self.counters + other.counters,
            took: self.took.max(other.took),
        }
    }

    /// Sends all of some messages and counts what they hold.
    fn send(&mut self, messages: &[&Message], sender: &mut Sender) -> io::Result<()> {
        let outgoing: Vec<_> = messages.iter().map(|message| message.outgoing()).collect();
        self.calls += sender.send_all(&outgoing)?;
        for message in messages {
            self.packets += message.packets;
            self.bytes += message.outgoing().bytes.len() as u64;
            self.lines += message.lines;
            self.counters += message.counters;
        }
        Ok(())
    }
}

/// The messages of a load, beginning somewhere and without an end.
pub(super) type Ring<'a> = Skip<Cycle<slice::Iter<'a, Message>>>;

/// Sends a share, beginning now.
pub(super) fn send(sender: &mut Sender, load: &Load<'_>, mut ring: Ring<'_>, share: Share) -> io::Result<Sent> {
    let clock = Clock::default();
    let mut sent = Sent::default();
    while sent.lines < share.lines {
        let now = clock.monotonic();
        if now >= share.time {
            break;
        }
        let due = share.due(now);
        if sent.lines >= due {
            thread::sleep(Share::rest(now));
        } else {
            burst(sender, load, &mut ring, &mut sent, due, share.lines)?;
        }
    }
    sent.took = clock.monotonic();
    Ok(sent)
}

/// Sends as many messages as are due, but [`VOLLEY`] at most, and never more than `lines` in all.
fn burst(
    sender: &mut Sender,
    load: &Load<'_>,
    ring: &mut Ring<'_>,
    sent: &mut Sent,
    due: u64,
    lines: u64,
) -> io::Result<()> {
    let mut messages = Vec::with_capacity(VOLLEY);
    let (mut ahead, mut cut) = (sent.lines, None);
    while ahead < due && messages.len() < VOLLEY {
        let Some(message) = ring.next() else { break };
        if message.lines > lines - ahead {
            cut = Some(load.message(message.first, lines - ahead)?);
            break;
        }
        ahead += message.lines;
        messages.push(message);
    }
    messages.extend(&cut);
    sent.send(&messages, sender)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_and_are_all_due_in_the_last_tick() {
        for (senders, rate, lines, all) in [(3, 1_000, 10_000, 2_000), (7, 999, 1_000, 1_000), (4, 1, u64::MAX, 2)] {
            let time = Duration::from_secs(2);
            let shares: Vec<_> = (0..senders).map(|number| Share::new(number, senders, rate, lines, time)).collect();
            assert_eq!(shares.iter().map(|share| share.lines).sum::<u64>(), all);
            assert!(shares.iter().all(|share| share.due(time - TICK) == share.lines));
        }
    }

    #[test]
    fn lines_are_due_by_the_tick_and_none_is_lost_to_rounding() {
        let share = Share::new(0, 1, 2_500, u64::MAX, Duration::from_secs(10));
        let due = [0, 999_999, 1_000_000, 1_500_000, 2_000_000].map(|now| share.due(Duration::from_nanos(now)));
        assert_eq!(due, [3, 3, 5, 5, 8]);
        assert_eq!(Share::rest(Duration::from_micros(1_250)), Duration::from_micros(750));
        assert_eq!(Share::rest(Duration::from_millis(7)), TICK);
    }

    #[test]
    fn without_a_rate_all_is_due_at_once() {
        let share = Share::new(1, 2, 0, 11, Duration::from_secs(1));
        assert_eq!((share.due(Duration::ZERO), share.lines, share.time), (5, 5, Duration::from_secs(1)));
    }
}
