//! Messages into datagrams. Pure.
//!
//! Messages are joined by line feeds as long as they fit; one that does not fit by itself is taken apart at its line ends,
//! and a line that does not fit alone goes alone, however long it is. JSON goes alone as well, since it may be a document of
//! several lines, and one that others would read only as a whole datagram.

use crate::ingest::copies;

/// A datagram to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) bytes: &'a [u8],
    /// Lines in it, blank ones left out.
    pub(super) lines: u64,
}

/// Gathers messages until a datagram is full.
#[derive(Debug)]
pub(super) struct Packets {
    max: usize,
    buffer: Vec<u8>,
    lines: u64,
}

impl Packets {
    /// For datagrams of at most `max` bytes.
    pub(super) fn new(max: usize) -> Self {
        Self { max, buffer: Vec::with_capacity(max), lines: 0 }
    }

    /// Adds a message, and gives each datagram that is full.
    pub(super) fn add(&mut self, message: &[u8], send: &mut impl FnMut(&Packet<'_>)) {
        let message = message.strip_suffix(b"\n").unwrap_or(message);
        let lines = copies::lines(message);
        if lines == 0 {
            return;
        }
        if is_json(message) {
            self.alone(message, lines, send);
        } else if message.len() <= self.max {
            self.append(message, lines, send);
        } else {
            let each = message.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
            each.for_each(
                |line| if line.len() <= self.max { self.append(line, 1, send) } else { self.alone(line, 1, send) },
            );
        }
    }

    /// Gives what is there.
    pub(super) fn finish(&mut self, send: &mut impl FnMut(&Packet<'_>)) {
        if self.lines > 0 {
            send(&Packet { bytes: &self.buffer, lines: self.lines });
        }
        self.buffer.clear();
        self.lines = 0;
    }

    fn append(&mut self, message: &[u8], lines: u64, send: &mut impl FnMut(&Packet<'_>)) {
        if !self.buffer.is_empty() && self.buffer.len() + 1 + message.len() > self.max {
            self.finish(send);
        }
        if !self.buffer.is_empty() {
            self.buffer.push(b'\n');
        }
        self.buffer.extend_from_slice(message);
        self.lines += lines;
    }

    fn alone(&mut self, message: &[u8], lines: u64, send: &mut impl FnMut(&Packet<'_>)) {
        self.finish(send);
        send(&Packet { bytes: message, lines });
    }
}

fn is_json(message: &[u8]) -> bool {
    matches!(message.trim_ascii_start().first(), Some(b'{' | b'['))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(max: usize, messages: &[&[u8]]) -> Vec<(Vec<u8>, u64)> {
        let mut packets = Packets::new(max);
        let mut sent = Vec::new();
        let mut send = |packet: &Packet<'_>| sent.push((packet.bytes.to_vec(), packet.lines));
        messages.iter().for_each(|message| packets.add(message, &mut send));
        packets.finish(&mut send);
        packets.finish(&mut send);
        sent
    }

    #[test]
    fn messages_are_joined_as_long_as_they_fit() {
        let sent = packed(10, &[b"aaa", b"bbb\n", b"", b"\r", b"cc", b"d", b"eeeeeeeeee", b"f\ng"]);
        let want: [(&[u8], u64); 4] = [(b"aaa\nbbb\ncc", 3), (b"d", 1), (b"eeeeeeeeee", 1), (b"f\ng", 2)];
        assert_eq!(sent, want.map(|(bytes, lines)| (bytes.to_vec(), lines)));
    }

    #[test]
    fn what_is_too_long_is_parted_at_line_ends_and_json_goes_alone() {
        let sent = packed(8, &[b"a", b"bb\n\ncccccc\nddddddddd\nee", b" {\n\"x\":1}", b"f", b"[1]"]);
        let want: [(&[u8], u64); 7] = [
            (b"a\nbb", 2),
            (b"cccccc", 1),
            (b"ddddddddd", 1),
            (b"ee", 1),
            (b" {\n\"x\":1}", 2),
            (b"f", 1),
            (b"[1]", 1),
        ];
        assert_eq!(sent, want.map(|(bytes, lines)| (bytes.to_vec(), lines)));
    }

    proptest! {
        #[test]
        fn every_line_is_sent_once_and_in_its_order(
            messages in proptest::collection::vec(proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'{'), b'a'..=b'c'], 0..40), 0..30),
            max in 1_usize..30,
        ) {
            let each = |bytes: &[u8]| bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).map(<[u8]>::to_vec).collect::<Vec<_>>();
            let parts: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
            let sent = packed(max, &parts);
            let lines: Vec<_> = sent.iter().flat_map(|(bytes, _)| each(bytes)).collect();
            prop_assert_eq!(sent.iter().map(|(_, lines)| lines).sum::<u64>(), lines.len() as u64);
            prop_assert_eq!(lines, messages.iter().flat_map(|message| each(message)).collect::<Vec<_>>());
            let is_short = |bytes: &[u8]| bytes.len() <= max || !bytes.contains(&b'\n') || is_json(bytes);
            prop_assert!(sent.iter().all(|(bytes, _)| is_short(bytes)));
        }
    }
}
