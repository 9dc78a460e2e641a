//! The samples of a datagram that are looked up together.
//!
//! A look-up waits for memory three times: for a slot of the index, for the spelling, for the cell. A [`Group`] takes these
//! steps for up to [`GROUP`] samples at a time, so that their waits overlap. Only plain samples of a line wait in it, one
//! number of a kind that is its wire type; before anything else is read all that waits is added, so samples are added in
//! the order in which they came.
//!
//! A line whose one sample waits is counted as accepted at its end; should the sample then be refused, that is put right.

use super::Core;
use crate::aggregate::shard::{Hash, IGNORED};
use crate::protocol::{Event, Reject, ServiceCheck, Sink};
use crate::sample::{Identity, Kind, Reason, Sample, Value, WireType};

/// How many samples wait for each other.
const GROUP: usize = 16;

/// Room for samples that wait. A worker has it for good, since making it anew would cost more than a short packet.
#[derive(Debug)]
pub(super) struct Room([Waiting; GROUP]);

impl Default for Room {
    fn default() -> Self {
        let (hash, span) = (Hash::default(), Span::default());
        Self([Waiting { hash, kind: Kind::Counter, name: span, tags: span, value: 0.0, rate: 1.0 }; GROUP])
    }
}

/// A sample that waits.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    hash: Hash,
    kind: Kind,
    name: Span,
    tags: Span,
    value: f64,
    rate: f64,
}

/// Where a part of the datagram stands in it.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    at: u32,
    len: u32,
}

impl Span {
    /// Where `part` stands in `whole`; none if it is no part of it.
    #[inline]
    fn of(part: &[u8], whole: &[u8]) -> Option<Self> {
        if part.is_empty() {
            return Some(Self { at: 0, len: 0 });
        }
        let at = (part.as_ptr() as usize).wrapping_sub(whole.as_ptr() as usize);
        let is_part = at < whole.len() && part.len() <= whole.len() - at;
        is_part.then_some(Self { at: at as u32, len: part.len() as u32 })
    }

    #[inline]
    fn in_bytes(self, whole: &[u8]) -> &[u8] {
        &whole[self.at as usize..][..self.len as usize]
    }
}

impl Waiting {
    #[inline]
    fn identity<'a>(&self, bytes: &'a [u8]) -> Identity<'a> {
        Identity::Line { name: self.name.in_bytes(bytes), tags: self.tags.in_bytes(bytes) }
    }
}

/// Samples that wait, and the datagram they stand in.
pub(super) struct Group<'w> {
    core: &'w mut Core,
    bytes: &'w [u8],
    waiting: &'w mut [Waiting; GROUP],
    len: usize,
    /// The first of them that is of the line which is being read.
    line_from: usize,
    /// Lines that are over and not counted yet: each had one sample, which waits.
    lines: u64,
}

impl<'w> Group<'w> {
    /// For the samples of a datagram.
    pub(super) fn new(core: &'w mut Core, room: &'w mut Room, bytes: &'w [u8]) -> Self {
        Self { core, bytes, waiting: &mut room.0, len: 0, line_from: 0, lines: 0 }
    }

    /// Adds what waits.
    pub(super) fn finish(mut self) {
        self.add_all();
    }

    /// Lets a sample wait, if it may.
    #[inline]
    fn waits(&mut self, sample: &Sample<'_>) -> bool {
        let (WireType::Plain(kind), Value::Numbers(&[value]), Identity::Line { name, tags }, 0) =
            (sample.wire, sample.value, sample.identity, sample.timestamp)
        else {
            return false;
        };
        let (Some(name), Some(tags)) = (Span::of(name, self.bytes), Span::of(tags, self.bytes)) else { return false };
        let Some(place) = self.waiting.get_mut(self.len) else { return false };
        let hash = self.core.shard.hash(kind, &sample.identity);
        *place = Waiting { hash, kind, name, tags, value, rate: sample.rate };
        self.len += 1;
        true
    }

    /// Adds all that waits, in its order.
    fn add_all(&mut self) {
        let Self { core, bytes, waiting, len, line_from, lines } = self;
        let tally = core.tally.of(core.source.listener);
        tally.lines += *lines;
        tally.lines_accepted += std::mem::take(lines);
        let waiting = &waiting[..std::mem::take(len)];
        if waiting.len() > 1 {
            waiting.iter().for_each(|sample| core.shard.look_ahead(sample.hash));
        }
        let mut numbers = [None; GROUP];
        for (sample, number) in waiting.iter().zip(&mut numbers) {
            *number = core.shard.find_hashed(sample.hash, sample.kind, &sample.identity(bytes)).ok();
        }
        let mut added = 0;
        for (at, (sample, number)) in waiting.iter().zip(numbers).enumerate() {
            match core.add_waiting(sample, number, bytes) {
                Ok(count) => {
                    added += count;
                    core.accepted |= at >= *line_from;
                }
                Err(reason) => core.refuse_waiting(reason, sample.name.in_bytes(bytes), at < *line_from),
            }
        }
        core.tally.of(core.source.listener).samples += added;
        *line_from = 0;
    }
}

impl Core {
    /// Adds a sample whose series has been looked up, and says how many values were added.
    #[inline]
    fn add_waiting(&mut self, sample: &Waiting, number: Option<u32>, bytes: &[u8]) -> Result<u64, Reason> {
        let Waiting { kind, value, rate, .. } = *sample;
        let number = match number {
            Some(number) => number,
            // One before it may have been the first of the same series.
            None => self.number_of(kind, &sample.identity(bytes))?,
        };
        if number == IGNORED {
            self.tally.of(self.source.listener).samples_dropped += 1;
            return Ok(0);
        }
        self.shard.add_number(number, kind, value, rate, self.now_ms).map(|()| 1)
    }

    /// Takes note of a sample that is refused after it waited. Its line may have been counted as accepted.
    #[cold]
    fn refuse_waiting(&mut self, reason: Reason, name: &[u8], is_counted: bool) {
        let before = self.reason.take();
        self.reject(&Reject { reason, line: 1, column: 0, bytes: name });
        if is_counted {
            self.reason = before;
            let tally = self.tally.of(self.source.listener);
            tally.lines_accepted -= 1;
            tally.lines_rejected[reason as usize] += 1;
        } else {
            self.reason = before.or(self.reason);
        }
    }
}

impl Sink for Group<'_> {
    #[inline]
    fn sample(&mut self, sample: &Sample<'_>) {
        if !self.waits(sample) {
            self.add_all();
            self.core.sample(sample);
        } else if self.len == GROUP {
            self.add_all();
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        self.core.event(event);
    }

    fn service_check(&mut self, check: &ServiceCheck<'_>) {
        self.core.service_check(check);
    }

    fn reject(&mut self, reject: &Reject<'_>) {
        self.core.reject(reject);
    }

    fn bad_tags(&mut self, count: u32) {
        self.core.bad_tags(count);
    }

    #[inline]
    fn line_end(&mut self) {
        let is_plain = self.len == self.line_from + 1 && !self.core.accepted && self.core.reason.is_none();
        if is_plain {
            self.lines += 1;
            self.line_from = self.len;
        } else {
            self.add_all();
            self.core.line_end();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::worker_within;
    use super::super::{Listener, Source, Worker};
    use crate::aggregate::{Aggregate, shard};

    /// Lines of all sorts about few series, so that they meet in a group.
    fn line() -> impl Strategy<Value = String> {
        let number = prop_oneof![
            4 => (0..9_u32).prop_map(|number| number.to_string()),
            1 => Just("0.1".to_owned()),
            1 => Just("-2".to_owned()),
            1 => Just("+3".to_owned()),
            1 => Just(f64::MAX.to_string()),
            1 => Just("1:2:3".to_owned()),
            1 => Just("x".to_owned()),
        ];
        let kind =
            prop::sample::select(vec!["c", "g", "ms", "s", "m", "c|@0.5", "ms|@0.1", "c|#t:1", "g|T9", "?", "C"]);
        let name = prop::sample::select(vec!["a", "b", "a.b", "a|b", "%20", ""]);
        (name, number, kind).prop_map(|(name, number, kind)| format!("{name}:{number}|{kind}"))
    }

    fn found(worker: &mut Worker) -> Vec<(String, Aggregate)> {
        let mut sealed = worker.core.shard.seal();
        let cells = sealed.cells.take();
        let name = |number| sealed.new.iter().find(|new| new.number == number).map(|new| format!("{:?}", new.id));
        let mut found: Vec<_> = cells.into_iter().map(|(number, cell)| (name(number).unwrap(), cell)).collect();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    proptest! {
        #[test]
        fn together_is_one_by_one(lines in prop::collection::vec(line(), 1..60), series in 1..9_u64) {
            let limits = shard::Limits { series, ..shard::Limits::default() };
            let (_together, _deliveries, mut together) = worker_within(&limits);
            let (_one, _deliveries, mut one) = worker_within(&limits);
            one.core.now_ms = together.core.now_ms;
            let source = Source { listener: Listener::Udp, address: None };
            let packet = lines.join("\n");
            together.datagram(packet.as_bytes(), source);
            one.core.source = source;
            one.parser.datagram(packet.as_bytes(), &mut one.core);
            prop_assert_eq!(together.core.tally.of(Listener::Udp), one.core.tally.of(Listener::Udp));
            prop_assert_eq!(together.core.shard.take_refused(), one.core.shard.take_refused());
            prop_assert_eq!(found(&mut together), found(&mut one));
        }
    }

    #[test]
    fn a_sample_that_is_refused_after_it_waited_is_no_accepted_line() {
        let (_workers, _deliveries, mut worker) = worker_within(&shard::Limits::default());
        let huge = f64::MAX;
        worker.datagram(
            format!("a:1|c\na:{huge}|c\na:{huge}|c\nb:1|c").as_bytes(),
            Source { listener: Listener::Udp, address: None },
        );
        let tally = worker.core.tally.of(Listener::Udp);
        let rejected: u64 = tally.lines_rejected.iter().sum();
        assert_eq!((tally.lines, tally.lines_accepted, rejected, tally.samples), (4, 3, 1, 3));
    }
}
