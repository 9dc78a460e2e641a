//! What the benches share: lines as clients send them, the limits they are measured beside, an agent's parts in this
//! process or a whole one beside it, clocks, arguments, and the one form in which every figure is printed.

#![allow(dead_code, reason = "each bench takes what it needs")]

pub(crate) mod arguments;
pub(crate) mod clock;
pub(crate) mod engine;
pub(crate) mod process;
pub(crate) mod report;
pub(crate) mod splitter;
pub(crate) mod table;
pub(crate) mod wire;

pub(crate) use arguments::Arguments;

/// Payload of a full datagram on an Ethernet of 1,500 bytes.
pub(crate) const FULL: usize = 1_432;

/// How often the series of a load come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spread {
    /// Each as often as any other.
    Uniform,
    /// By Zipf's law with exponent 1: the second half as often as the first, the third a third as often.
    Zipf,
}

impl Spread {
    pub(crate) const ALL: [Self; 2] = [Self::Uniform, Self::Zipf];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
        }
    }
}

/// What the lines of a load are.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    /// So many names of 30 bytes.
    pub(crate) series: usize,
    pub(crate) spread: Spread,
    /// Payload of a packet in bytes; one line is sent alone if it is longer.
    pub(crate) packet: usize,
    /// 60 % counters, 25 % timers, 10 % gauges and 5 % sets, by series; else counters only.
    pub(crate) mixed: bool,
    /// Whether there are four DogStatsD tags, which go with the series.
    pub(crate) tagged: bool,
}

impl Load {
    /// Counters without tags in full packets, each series as often as any other.
    pub(crate) const fn counters(series: usize) -> Self {
        Self { series, spread: Spread::Uniform, packet: FULL, mixed: false, tagged: false }
    }

    /// What a row of this load is called.
    pub(crate) fn name(self) -> String {
        let packet = if self.packet == FULL { "full packets" } else { "one-line packets" };
        let lines = if self.mixed { "mixed" } else { "counters" };
        let tags = if self.tagged { ", 4 tags" } else { "" };
        format!("{packet}, {lines}{tags}, {} series, {}", self.series, self.spread.name())
    }

    /// Packets with so many lines in all, the same bytes in every run.
    pub(crate) fn packets(self, lines: usize) -> Packets {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let ranks = Ranks::new(self.series, self.spread);
        let number_and_value = (0..lines).map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (ranks.pick(random), (random >> 40) % 1_000)
        });
        self.pack(number_and_value)
    }

    /// Packets in which each series comes once.
    pub(crate) fn each_once(self, value: u64) -> Packets {
        self.pack((0..self.series).map(|number| (number, value)))
    }

    /// Line feeds stand between lines, none behind the last one of a packet.
    fn pack(self, lines: impl Iterator<Item = (usize, u64)>) -> Packets {
        let mut packets = Packets::default();
        for (number, value) in lines {
            let line = self.line(number, value);
            match packets.0.last_mut() {
                Some((packet, count)) if packet.len() + 1 + line.len() <= self.packet => {
                    packet.push(b'\n');
                    packet.extend_from_slice(line.as_bytes());
                    *count += 1;
                }
                Some(_) | None => packets.0.push((line.into_bytes(), 1)),
            }
        }
        packets
    }

    fn line(self, number: usize, value: u64) -> String {
        let wire = match number % 20 {
            12..=16 if self.mixed => "ms",
            17..=18 if self.mixed => "g",
            19 if self.mixed => "s",
            _ => "c",
        };
        let tags = match self.tagged {
            true => format!("|#env:prod,region:eu-west-{},service:checkout,host:web-{number:06}", number % 3),
            false => String::new(),
        };
        format!("service.endpoint.metric{number:07}:{value}|{wire}{tags}")
    }
}

/// The packets of a load, each with the number of its lines.
#[derive(Default)]
pub(crate) struct Packets(Vec<(Vec<u8>, usize)>);

impl Packets {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(packet, _)| packet.as_slice())
    }

    /// About so many lines from place `from` on, round and round: the packets, where they end, and their lines.
    pub(crate) fn part(&self, from: usize, lines: usize) -> Part<'_> {
        let (mut packets, mut count) = (Vec::new(), 0);
        for (packet, held) in self.0.iter().cycle().skip(from % self.0.len()) {
            if count >= lines {
                break;
            }
            packets.push(packet.as_slice());
            count += held;
        }
        Part { end: (from + packets.len()) % self.0.len(), packets, lines: count }
    }
}

/// Some packets of a load.
pub(crate) struct Part<'a> {
    pub(crate) packets: Vec<&'a [u8]>,
    pub(crate) lines: usize,
    pub(crate) end: usize,
}

/// Turns random bits into numbers of series.
struct Ranks {
    series: usize,
    /// For [`Spread::Zipf`]: how often one of the first so many ranks comes.
    sums: Vec<f64>,
}

impl Ranks {
    fn new(series: usize, spread: Spread) -> Self {
        let sum = |sum: &mut f64, rank: usize| {
            *sum += 1.0 / (rank + 1) as f64;
            Some(*sum)
        };
        let sums = match spread {
            Spread::Uniform => Vec::new(),
            Spread::Zipf => (0..series).scan(0.0, sum).collect(),
        };
        Self { series, sums }
    }

    fn pick(&self, random: u64) -> usize {
        let Some(all) = self.sums.last() else { return random as usize % self.series };
        let wanted = (random >> 11) as f64 / (1_u64 << 53) as f64 * all;
        let rank = self.sums.partition_point(|sum| *sum < wanted).min(self.series - 1);
        // Which types are frequent is not to go by the rank: the prime divides no number of series that is used.
        rank * 7_368_787 % self.series
    }
}

/// The middle one of some figures.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// The median of what `figure` takes from each round.
pub(crate) fn median_of<T>(rounds: &[T], figure: impl FnMut(&T) -> f64) -> f64 {
    median(rounds.iter().map(figure).collect())
}
