//! What a bench found: for people a line a figure, for machines one JSON object. What is lost is worked out here.

use std::io::{self, Write};

use serde::Serialize;

use super::api::Figures;
use super::pace::Sent;
use crate::cli::send::{Sender, Target};

/// What was sent and, if it was asked, what the agent made of it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    to: String,
    seconds: f64,
    /// The system call by which packets went, and how often it was made.
    call: &'static str,
    calls: u64,
    packets: u64,
    bytes: u64,
    lines: u64,
    counters: u64,
    lines_per_second: f64,
    agent: Option<Counted>,
}

/// By how much the figures of the listener grew.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Counted {
    /// Datagrams, of streams none.
    datagrams: u64,
    kernel_drops: u64,
    /// Whether each packet is among those read or dropped (of a stream, each line among those read), and each line
    /// among those accepted or rejected.
    accounted: bool,
    lines: u64,
    accepted: u64,
    rejected: u64,
    /// Lines sent and not accepted; negative where others sent too.
    lost: i64,
    /// Sum of the counters.
    counters: u64,
    /// Whether that is what the accepted lines must come to.
    counters_agree: bool,
    cpu_seconds: Option<f64>,
    cpu_seconds_per_million_lines: Option<f64>,
    /// Memory of the agent once all was counted.
    resident_bytes: Option<u64>,
}

/// Whether nothing that was sent is still on its way, as far as the transport can tell.
pub(super) fn is_accounted(target: &Target, sent: Sent, grew: &Figures) -> bool {
    let all_came = match target {
        Target::Udp(_) | Target::Unixgram(_) => grew.datagrams + grew.kernel_drops == sent.packets,
        Target::Tcp(_) | Target::Unix(_) => grew.lines == sent.lines,
    };
    all_came && grew.lines == grew.accepted + grew.rejected
}

/// Whether the sum of the counters can be that of so many accepted lines. It is one number if all lines were accepted or
/// all are counters; else it lies within what the other types leave open.
fn counters_agree(sent: Sent, grew: &Figures) -> bool {
    let others = sent.lines - sent.counters;
    (grew.accepted.saturating_sub(others)..=grew.accepted.min(sent.counters)).contains(&grew.counters)
}

impl Counted {
    /// From what was sent and by how much the figures grew.
    pub(super) fn new(target: &Target, sent: Sent, grew: &Figures) -> Self {
        let per_million = |seconds: f64| (grew.lines > 0).then(|| seconds * 1e6 / grew.lines as f64);
        Self {
            datagrams: grew.datagrams,
            kernel_drops: grew.kernel_drops,
            accounted: is_accounted(target, sent, grew),
            lines: grew.lines,
            accepted: grew.accepted,
            rejected: grew.rejected,
            lost: sent.lines.cast_signed() - grew.accepted.cast_signed(),
            counters: grew.counters,
            counters_agree: counters_agree(sent, grew),
            cpu_seconds: grew.cpu_seconds,
            cpu_seconds_per_million_lines: grew.cpu_seconds.and_then(per_million),
            resident_bytes: grew.resident_bytes,
        }
    }

    fn text(&self, sent: &Report, out: &mut impl Write) -> io::Result<()> {
        let accounted = if self.accounted { "" } else { " (others send as well, or some never arrived)" };
        let verdict = if self.counters_agree {
            "as accepted"
        } else {
            "NOT as accepted; look for the rest in _overflow, where new series beyond limits.new_series and limits.series go"
        };
        let percent = if sent.lines == 0 { 0.0 } else { self.lost as f64 * 100.0 / sent.lines as f64 };
        writeln!(out, "read          {} lines{accounted}", self.lines)?;
        writeln!(out, "kernel drops  {} packets", self.kernel_drops)?;
        writeln!(out, "accepted      {} lines", self.accepted)?;
        writeln!(out, "rejected      {} lines", self.rejected)?;
        writeln!(out, "lost          {} lines ({percent:.3} %)", self.lost)?;
        writeln!(out, "counters      {} of {}, {verdict}", self.counters, sent.counters)?;
        if let (Some(seconds), Some(per_million)) = (self.cpu_seconds, self.cpu_seconds_per_million_lines) {
            writeln!(out, "agent's CPU   {seconds:.2} s, {per_million:.3} s per million lines")?;
        }
        if let Some(bytes) = self.resident_bytes {
            writeln!(out, "its memory    {:.1} MiB", bytes as f64 / f64::from(1 << 20))?;
        }
        Ok(())
    }
}

impl Report {
    /// From what was sent to where, and what was counted.
    pub(super) fn new(target: &Target, sent: Sent, agent: Option<Counted>) -> Self {
        let seconds = sent.took.as_secs_f64();
        Self {
            to: target.to_string(),
            seconds,
            call: Sender::call(target),
            calls: sent.calls,
            packets: sent.packets,
            bytes: sent.bytes,
            lines: sent.lines,
            counters: sent.counters,
            lines_per_second: if seconds > 0.0 { sent.lines as f64 / seconds } else { 0.0 },
            agent,
        }
    }

    /// Writes a line for each figure.
    pub(super) fn text(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "sent          {} lines in {} packets to {}", self.lines, self.packets, self.to)?;
        writeln!(out, "by            {} calls of {}", self.calls, self.call)?;
        writeln!(out, "took          {:.2} s, {:.0} lines a second", self.seconds, self.lines_per_second)?;
        self.agent.as_ref().map_or(Ok(()), |counted| counted.text(self, out))
    }

    /// Writes one JSON object.
    pub(super) fn json(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SENT: Sent =
        Sent { calls: 3, packets: 10, bytes: 100, lines: 20, counters: 15, took: Duration::from_secs(2) };
    const GREW: Figures = Figures {
        datagrams: 8,
        kernel_drops: 2,
        lines: 16,
        accepted: 15,
        rejected: 1,
        counters: 12,
        cpu_seconds: Some(0.5),
        resident_bytes: Some(3 << 19),
    };

    #[test]
    fn what_is_missing_is_told() {
        let udp = Target::Udp("a:1".to_owned());
        assert!(is_accounted(&udp, SENT, &GREW));
        assert!(!is_accounted(&udp, SENT, &Figures { kernel_drops: 1, ..GREW }));
        assert!(!is_accounted(&udp, SENT, &Figures { rejected: 0, ..GREW }));
        assert!(!is_accounted(&Target::Tcp("a:1".to_owned()), SENT, &GREW));
        let mut text = Vec::new();
        Report::new(&udp, SENT, Some(Counted::new(&udp, SENT, &GREW))).text(&mut text).unwrap();
        let expected = "\
            sent          20 lines in 10 packets to udp://a:1\n\
            by            3 calls of sendmmsg\n\
            took          2.00 s, 10 lines a second\n\
            read          16 lines\n\
            kernel drops  2 packets\n\
            accepted      15 lines\n\
            rejected      1 lines\n\
            lost          5 lines (25.000 %)\n\
            counters      12 of 15, as accepted\n\
            agent's CPU   0.50 s, 31250.000 s per million lines\n\
            its memory    1.5 MiB\n";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }

    #[test]
    fn counters_agree_within_what_the_other_types_leave_open() {
        let agree = |sent, accepted, counters| counters_agree(sent, &Figures { accepted, counters, ..GREW });
        // Of 15 accepted lines 0 to 5 are of other types; of 20 all 5 are.
        assert_eq!([9, 10, 15, 16].map(|counters| agree(SENT, 15, counters)), [false, true, true, false]);
        assert_eq!([14, 15, 16].map(|counters| agree(SENT, 20, counters)), [false, true, false]);
        let alone = Sent { counters: 20, ..SENT };
        assert_eq!([14, 15, 16].map(|counters| agree(alone, 15, counters)), [false, true, false]);
    }
}
