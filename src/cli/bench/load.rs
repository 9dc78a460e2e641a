//! The lines of a load and the packets they go in. The same arguments make the same bytes, each line with what is to
//! become of it; no socket, no clock.

use std::io;
use std::str::FromStr;

use super::popularity::Popularity;
use crate::cli::send::Target;
use crate::listen::burst::Outgoing;

/// Lines that are made at least, however few the series are, so that values differ.
const LINES_MIN: u64 = 1 << 16;

/// Series are taken in steps of this prime: neighbours in a packet are none in a table, and series of like popularity have
/// any type. It is larger than any number of series, so that it divides none.
const STEP: u64 = (1 << 31) - 1;

/// Most bytes of a message: those of a UDP datagram over IPv4, which segments are until the kernel parts them.
const MESSAGE_MAX: usize = 65_507;

/// Most series of a load.
pub(super) const SERIES_MAX: u64 = 20_000_000;

/// What a line changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Counter,
    Timer,
    Gauge,
    Set,
}

impl Type {
    const ALL: [Self; 4] = [Self::Counter, Self::Timer, Self::Gauge, Self::Set];

    /// As a line says it.
    pub(super) const fn letters(self) -> &'static str {
        match self {
            Self::Counter => "c",
            Self::Timer => "ms",
            Self::Gauge => "g",
            Self::Set => "s",
        }
    }
}

/// Shares of the types, as in `c=70,ms=20,g=8,s=2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mix(Vec<Type>);

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut shares = [0_u16; 4];
        for part in text.split(',') {
            let share = part.split_once('=').and_then(|(letters, share)| {
                let at = Type::ALL.iter().position(|kind| kind.letters() == letters)?;
                Some((at, share.parse::<u16>().ok().filter(|share| *share <= 1_000)?))
            });
            let Some((at, share)) = share else {
                return Err(format!(
                    "{part:?} is no share; write c, ms, g or s with up to 1000 such as \"c=70,ms=30\""
                ));
            };
            shares[at] = share;
        }
        if shares == [0; 4] {
            return Err("nothing has a share".to_owned());
        }
        Ok(Self(deal(shares)))
    }
}

/// As many of each type as its share says, each spread evenly: always the one that is furthest behind its share.
fn deal(shares: [u16; 4]) -> Vec<Type> {
    let total: i64 = shares.iter().map(|share| i64::from(*share)).sum();
    let mut owed = [0_i64; 4];
    let next = |_| {
        owed.iter_mut().zip(shares).for_each(|(owed, share)| *owed += i64::from(share));
        let most = (1..4).fold(0, |most, at| if owed[at] > owed[most] { at } else { most });
        owed[most] -= total;
        Type::ALL[most]
    };
    (0..total).map(next).collect()
}

/// What is sent.
#[derive(Debug)]
pub(super) struct Load<'a> {
    /// First part of all names.
    pub(super) name: &'a str,
    /// How many series there are, at most [`SERIES_MAX`].
    pub(super) series: u64,
    /// How often each is sent.
    pub(super) popularity: &'a Popularity,
    pub(super) mix: &'a Mix,
    /// Tags of each line.
    pub(super) tags: u64,
    /// Most bytes of lines in a packet; a longer line has one for itself.
    pub(super) bytes_max: usize,
    /// Most packets of a message.
    pub(super) segments: u64,
    /// Where it goes, since packets are framed for it.
    pub(super) target: &'a Target,
}

/// What is handed to the kernel as one: a packet, or several as segments.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    bytes: Box<[u8]>,
    /// Bytes of each packet but the last, which may have fewer.
    segment: u16,
    /// How many packets there are.
    pub(super) packets: u64,
    /// Number of its first line.
    pub(super) first: u64,
    /// How many lines it has.
    pub(super) lines: u64,
    /// How many of them add 1 to a counter.
    pub(super) counters: u64,
}

/// Lines that are framed together.
struct Packet {
    bytes: Vec<u8>,
    lines: u64,
    counters: u64,
}

impl Message {
    /// For the call that sends it.
    pub(super) fn outgoing(&self) -> Outgoing<'_> {
        Outgoing { bytes: &self.bytes, segment: if self.packets > 1 { self.segment } else { 0 } }
    }
}

impl Load<'_> {
    /// Messages to be sent again and again: each series is in them, and equally often; by a Zipf law, as often as it says.
    pub(super) fn messages(&self) -> io::Result<Vec<Message>> {
        let lines = LINES_MIN.next_multiple_of(self.series);
        let mut messages = Vec::new();
        let mut first = 0;
        while first < lines {
            let message = self.message(first, lines - first)?;
            first += message.lines;
            messages.push(message);
        }
        Ok(messages)
    }

    /// A message that begins with a line of this number, and has so many at most.
    pub(super) fn message(&self, first: u64, lines_max: u64) -> io::Result<Message> {
        let mut packets: Vec<Packet> = Vec::new();
        let (mut lines, mut segment) = (0, 0);
        while lines < lines_max && (packets.len() as u64) < self.segments {
            let packet = self.packet(first + lines, lines_max - lines)?;
            let longest = packet.bytes.len().max(segment);
            if !packets.is_empty() && longest * (packets.len() + 1) > MESSAGE_MAX {
                break;
            }
            (lines, segment) = (lines + packet.lines, longest);
            packets.push(packet);
        }
        // Segments have one size; line ends fill them up, since blank lines count nowhere.
        let last = packets.len().saturating_sub(1);
        packets[..last].iter_mut().for_each(|packet| packet.bytes.resize(segment, b'\n'));
        Ok(Message {
            bytes: packets.iter().flat_map(|packet| &packet.bytes).copied().collect(),
            // A single packet that is longer has no segments.
            segment: u16::try_from(segment).unwrap_or(u16::MAX),
            packets: packets.len() as u64,
            first,
            lines,
            counters: packets.iter().map(|packet| packet.counters).sum(),
        })
    }

    /// A packet that begins with a line of this number, and has so many at most.
    fn packet(&self, first: u64, lines_max: u64) -> io::Result<Packet> {
        let (mut bytes, mut line) = (Vec::new(), Vec::new());
        let (mut lines, mut counters) = (0, 0);
        while lines < lines_max {
            line.clear();
            let kind = self.line(first + lines, &mut line);
            if lines > 0 {
                if bytes.len() + 1 + line.len() > self.bytes_max {
                    break;
                }
                bytes.push(b'\n');
            }
            bytes.extend_from_slice(&line);
            lines += 1;
            counters += u64::from(kind == Type::Counter);
        }
        self.target.frame(&mut bytes)?;
        Ok(Packet { bytes, lines, counters })
    }

    /// Writes the line of a number.
    fn line(&self, number: u64, into: &mut Vec<u8>) -> Type {
        let series = self.popularity.rank(number) * STEP % self.series;
        let kind = self.mix.0[(series % self.mix.0.len() as u64) as usize];
        let (name, letters) = (self.name, kind.letters());
        // Fibonacci hashing: values that differ without a pattern, and the same in every run.
        let any = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        let text = match kind {
            Type::Counter => format!("{name}.c.{series}:1|c"),
            Type::Timer => format!("{name}.ms.{series}:{}.{}|{letters}", any % 1_000, any % 7),
            Type::Gauge => format!("{name}.g.{series}:{}|{letters}", any % 10_000),
            Type::Set => format!("{name}.s.{series}:u{}|{letters}", any % 5_000),
        };
        into.extend_from_slice(text.as_bytes());
        for tag in 0..self.tags {
            let before = if tag == 0 { "|#" } else { "," };
            into.extend_from_slice(format!("{before}tag{tag}:v{}", series % (10 + tag)).as_bytes());
        }
        kind
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn load<'a>(series: u64, bytes_max: usize, mix: &'a Mix, target: &'a Target) -> Load<'a> {
        // Leaked: a few dozen bytes of a test.
        let popularity = Box::leak(Box::new(Popularity::even(series)));
        Load { name: "bench", series, popularity, mix, tags: 2, bytes_max, segments: 1, target }
    }

    fn text(packet: &Message) -> &str {
        std::str::from_utf8(&packet.bytes).unwrap()
    }

    #[test]
    fn shares_are_dealt_evenly() {
        use Type::{Counter, Gauge, Set, Timer};
        assert_eq!("c=2,ms=1".parse::<Mix>().unwrap().0, [Counter, Timer, Counter]);
        assert_eq!("s=1".parse::<Mix>().unwrap().0, [Set]);
        let many = "c=70,ms=20,g=8,s=2".parse::<Mix>().unwrap().0;
        let of = |kind, types: &[Type]| types.iter().filter(|other| **other == kind).count();
        assert_eq!([Counter, Timer, Gauge, Set].map(|kind| of(kind, &many)), [70, 20, 8, 2]);
        assert_eq!([Counter, Timer].map(|kind| of(kind, &many[..10])), [7, 2]);
        for wrong in ["", "c", "c=", "x=1", "c=-1", "c=1001", "c=0,g=0", "c=1;g=1"] {
            assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_series_comes_equally_often_and_no_packet_is_too_long() {
        let (mix, target) = ("c=3,ms=2,g=1,s=1".parse().unwrap(), "udp://[::1]:1".parse().unwrap());
        let packets = load(1_234, 500, &mix, &target).messages().unwrap();
        let mut seen: HashMap<&str, u64> = HashMap::new();
        for packet in &packets {
            assert!(packet.bytes.len() <= 500);
            assert_eq!(text(packet).lines().count() as u64, packet.lines);
            assert_eq!(text(packet).lines().filter(|line| line.contains("|c|#")).count() as u64, packet.counters);
            text(packet).lines().for_each(|line| *seen.entry(line.split(':').next().unwrap()).or_default() += 1);
        }
        assert_eq!(seen.len(), 1_234);
        assert!(seen.values().all(|times| *times == 54), "65,536 rounded up to whole rounds");
    }

    #[test]
    fn a_small_size_is_a_line_a_packet() {
        let (mix, target) = ("c=1,ms=1".parse().unwrap(), "udp://[::1]:1".parse().unwrap());
        let packets = load(3, 1, &mix, &target).messages().unwrap();
        assert!(packets.iter().all(|packet| packet.lines == 1));
        assert_eq!(text(&packets[0]), "bench.c.0:1|c|#tag0:v0,tag1:v0");
    }

    #[test]
    fn segments_have_one_size_and_the_same_lines() {
        let (mix, target) = ("c=1,ms=1".parse().unwrap(), "udp://[::1]:1".parse().unwrap());
        let load = load(1_234, 1_432, &mix, &target);
        let all = |segments| {
            let messages = Load { segments, ..load }.messages().unwrap();
            assert!(messages.iter().all(|message| message.packets <= segments && message.bytes.len() <= MESSAGE_MAX));
            messages
        };
        let lines = |messages: &[Message]| -> Vec<String> {
            let lines =
                messages.iter().flat_map(|message| message.bytes.chunks(message.segment.into())).flat_map(|segment| {
                    let text = std::str::from_utf8(segment).unwrap();
                    text.lines().filter(|line| !line.is_empty()).map(str::to_owned)
                });
            lines.collect()
        };
        let (alone, many) = (all(1), all(64));
        assert_eq!(lines(&alone), lines(&many));
        let packets = |messages: &[Message]| messages.iter().map(|message| message.packets).sum::<u64>();
        assert_eq!((packets(&many), many[0].packets), (packets(&alone), 46), "65,507 bytes hold 46 of 1,424");
    }

    #[test]
    fn a_packet_can_be_cut_to_fewer_lines() {
        let mix = "c=1,g=1".parse().unwrap();
        for to in ["tcp://[::1]:1", "unix:///s"] {
            let target = to.parse().unwrap();
            let load = load(100, 1_432, &mix, &target);
            let packets = load.messages().unwrap();
            let cut = load.message(packets[1].first, 2).unwrap();
            assert!(cut.lines == 2 && cut.bytes.len() < packets[1].bytes.len());
            let frame = if to.starts_with("tcp") { 0 } else { 4 };
            let end = if to.starts_with("tcp") { cut.bytes.len() - 1 } else { cut.bytes.len() };
            assert_eq!(cut.bytes[frame..end], packets[1].bytes[frame..end]);
            assert_eq!(load.message(packets[1].first, u64::MAX).unwrap(), packets[1]);
        }
    }
}
