//! What the benches of lines share: packets as clients send them, the same bytes in every run, and the splitter that
//! reading them is measured beside.

pub(crate) mod splitter;

/// Payload of a full datagram on an Ethernet of 1,500 bytes.
pub(crate) const FULL: usize = 1_432;

/// What the lines of a load are.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    /// So many names of 30 bytes, each as likely as any other.
    pub(crate) series: usize,
    /// Payload of a packet in bytes; one line is sent alone if it is longer.
    pub(crate) packet: usize,
    /// 60 % counters, 25 % timers, 10 % gauges and 5 % sets, by series; else counters only.
    pub(crate) mixed: bool,
    /// Whether there are four DogStatsD tags, which go with the series.
    pub(crate) tagged: bool,
}

impl Load {
    /// Packets with so many lines in all. Line feeds stand between lines, none behind the last one of a packet.
    pub(crate) fn packets(self, lines: usize) -> Vec<Vec<u8>> {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut packets: Vec<Vec<u8>> = Vec::new();
        for _ in 0..lines {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let line = self.line(random as usize % self.series, (random >> 40) % 1_000);
            match packets.last_mut() {
                Some(packet) if packet.len() + 1 + line.len() <= self.packet => {
                    packet.push(b'\n');
                    packet.extend_from_slice(line.as_bytes());
                }
                Some(_) | None => packets.push(line.into_bytes()),
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
        format!("service.endpoint.metric.{number:06}:{value}|{wire}{tags}")
    }
}

/// The middle one of some figures.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}
