//! A unix stream's bytes into packets, each after its length in 4 bytes, little-endian, as DogStatsD clients send them.
//! It reads no clock and no socket; at most one packet, as far as it may be long, is held.

use std::ops::ControlFlow;

use super::lines::{Form, Rest};

/// What a packet of a stream is to the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// A packet without its length: what a datagram would hold.
    Packet(&'a [u8]),
    /// The length of a packet that is too long; its bytes are skipped.
    TooLong(&'a [u8]),
    /// A length that cannot be one, so that nobody knows where the next packet begins: most likely text.
    NoLength(&'a [u8]),
}

const LENGTH: usize = 4;

/// What a unix stream is that begins with these bytes, as soon as there are enough of them. Text can only be lines, as Etsy's
/// server has them on such a socket: the least length that is text, of four tabs, would be 151 MB, which is no packet's.
/// All else is taken for a length, which is refused if it cannot be one.
pub(super) fn form(beginning: &[u8]) -> Option<Form> {
    let head = beginning.first_chunk::<LENGTH>()?;
    // A character may be cut behind the fourth byte.
    let is_utf8 = std::str::from_utf8(head).map_or_else(|error| error.error_len().is_none(), |_| true);
    let is_text = is_utf8 && head.iter().all(|byte| !byte.is_ascii_control() || b"\t\n\r".contains(byte));
    Some(if is_text { Form::Lines } else { Form::Packets })
}

/// No client sends a packet of this size, and four characters of text, read as a length, are far more.
const LENGTH_MAX: usize = 16 << 20;

/// Splits a stream into packets.
#[derive(Debug)]
pub(super) struct Frames {
    /// The beginning of a packet, its length included.
    partial: Vec<u8>,
    /// Bytes still to come of a packet that is too long.
    skip: usize,
    max: usize,
}

impl Frames {
    /// For a stream whose packets have at most `max` bytes, from where another left off. A packet that was not too long for
    /// that one, but is for this, is skipped.
    pub(super) fn resume(max: usize, rest: Rest) -> Self {
        let skip = usize::try_from(rest.skip).unwrap_or(usize::MAX);
        let Rest { partial, .. } = rest;
        match partial.first_chunk().map(|head| length(*head)) {
            Some(length) if length > max => {
                Self { skip: (LENGTH + length).saturating_sub(partial.len()), partial: Vec::new(), max }
            }
            Some(_) | None => Self { partial, skip, max },
        }
    }

    /// What another needs to go on.
    pub(super) fn into_rest(self) -> Rest {
        Rest { partial: self.partial, skip: self.skip as u64, form: Form::Packets }
    }

    /// Takes the next bytes of the stream and hands over each packet that ends in them, until told to stop.
    pub(super) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if self.partial.is_empty()
                && let Some((head, rest)) = bytes.split_first_chunk()
                && let length = length(*head)
                && length <= self.max
                && length <= rest.len()
            {
                // The usual case: a packet that was not cut is not copied.
                let (packet, rest) = rest.split_at(length);
                bytes = rest;
                each(Piece::Packet(packet))?;
            } else if !self.fill(&mut bytes) {
                return ControlFlow::Continue(());
            } else {
                self.take(&mut each)?;
            }
        }
    }

    /// Whether a packet has begun and not ended.
    pub(super) fn is_inside(&self) -> bool {
        self.skip > 0 || !self.partial.is_empty()
    }

    /// What is held of a packet that has begun, without its length; empty too while a long packet is skipped.
    pub(super) fn partial(&self) -> &[u8] {
        self.partial.get(LENGTH..).unwrap_or_default()
    }

    /// Moves bytes to the held ones, up to the end of the length or of the packet. Whether that end was reached.
    fn fill(&mut self, bytes: &mut &[u8]) -> bool {
        let end = self.partial.first_chunk().map_or(LENGTH, |head| LENGTH + length(*head));
        let (moved, rest) = bytes.split_at(bytes.len().min(end - self.partial.len()));
        self.partial.extend_from_slice(moved);
        *bytes = rest;
        self.partial.len() == end && !moved.is_empty()
    }

    /// Does what is to be done with a whole length or a whole packet.
    fn take(&mut self, each: &mut impl FnMut(Piece<'_>) -> ControlFlow<()>) -> ControlFlow<()> {
        let Some(head) = self.partial.first_chunk::<LENGTH>().copied() else { return ControlFlow::Continue(()) };
        let length = length(head);
        let flow = if length > LENGTH_MAX.max(self.max) {
            each(Piece::NoLength(&head))
        } else if length > self.max {
            self.skip = length;
            each(Piece::TooLong(&head))
        } else if self.partial.len() == LENGTH + length {
            each(Piece::Packet(&self.partial[LENGTH..]))
        } else {
            return ControlFlow::Continue(());
        };
        self.partial.clear();
        flow
    }
}

fn length(head: [u8; LENGTH]) -> usize {
    u32::from_le_bytes(head) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Each piece with a letter for what it is.
    fn pieces<'a>(chunks: impl IntoIterator<Item = &'a [u8]>, max: usize) -> Vec<(char, Vec<u8>)> {
        let mut frames = Frames::resume(max, Rest::default());
        let mut seen = Vec::new();
        for chunk in chunks {
            let flow = frames.feed(chunk, |piece| match piece {
                Piece::Packet(bytes) => {
                    seen.push(('p', bytes.to_vec()));
                    ControlFlow::Continue(())
                }
                Piece::TooLong(bytes) => {
                    seen.push(('l', bytes.to_vec()));
                    ControlFlow::Continue(())
                }
                Piece::NoLength(bytes) => {
                    seen.push(('n', bytes.to_vec()));
                    ControlFlow::Break(())
                }
            });
            assert!(frames.partial().len() <= max);
            // Another may go on from here.
            frames = Frames::resume(max, frames.into_rest());
            if flow.is_break() {
                break;
            }
        }
        seen
    }

    fn framed(payload: &[u8]) -> Vec<u8> {
        [&(payload.len() as u32).to_le_bytes(), payload].concat()
    }

    #[test]
    fn packets_are_found_wherever_they_are_cut() {
        let stream = [framed(b"a:1|c\nb:2|c"), framed(b""), framed(&[b'x'; 30]), framed(b"c:3|c"), b"text".to_vec()];
        let stream = stream.concat();
        let want = [
            ('p', b"a:1|c\nb:2|c".to_vec()),
            ('p', Vec::new()),
            ('l', 30_u32.to_le_bytes().to_vec()),
            ('p', b"c:3|c".to_vec()),
            ('n', b"text".to_vec()),
        ];
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let cut = [&stream[..first], &stream[first..second], &stream[second..]];
                assert_eq!(pieces(cut, 12), want, "cut at {first} and {second}");
            }
        }
        assert_eq!(pieces(stream.chunks(1), 12), want);
    }

    proptest! {
        #[test]
        fn any_cuts_of_any_stream_give_the_same_packets(
            stream in proptest::collection::vec(prop_oneof![Just(0_u8), 0_u8..9, any::<u8>()], 0..200),
            size in 1_usize..50,
        ) {
            let whole = pieces([stream.as_slice()], 7);
            prop_assert_eq!(pieces(stream.chunks(size), 7), whole.clone());
            let mut rest = stream.as_slice();
            for (kind, bytes) in whole {
                let length = length(*rest.first_chunk().unwrap());
                prop_assert_eq!(kind, if length > LENGTH_MAX { 'n' } else if length > 7 { 'l' } else { 'p' });
                prop_assert!(kind != 'p' || bytes == rest[LENGTH..LENGTH + length]);
                rest = rest.get(LENGTH + length..).unwrap_or_default();
            }
        }
    }

    #[test]
    fn text_is_told_from_a_length() {
        for (beginning, want) in [
            (b"a:1".as_slice(), None),
            (b"a:1|c", Some(Form::Lines)),
            (b"{\"na", Some(Form::Lines)),
            ("gr\u{f6}\u{df}e:1|c".as_bytes(), Some(Form::Lines)),
            ("abc\u{e9}:1|c".as_bytes(), Some(Form::Lines)),
            (b"\x05\0\0\0a:1|c", Some(Form::Packets)),
            (b"abc\0", Some(Form::Packets)),
            (b"abc\x1f", Some(Form::Packets)),
            (b"a\nb:", Some(Form::Lines)),
            (b"\na:1|c", Some(Form::Lines)),
            (b"\r\n\r\n", Some(Form::Lines)),
            (b"a\tb:1|c", Some(Form::Lines)),
            (b"\t\t\t\t", Some(Form::Lines)),
            (b"\n\0\0\0a:1|c\nb:1|c", Some(Form::Packets)),
            (b"\t\n\r\x01", Some(Form::Packets)),
            (b"\xff\xff\xff\x7e", Some(Form::Packets)),
            (b"abc\xff", Some(Form::Packets)),
        ] {
            assert_eq!(form(beginning), want, "{beginning:?}");
        }
    }

    proptest! {
        #[test]
        fn no_length_of_a_packet_is_taken_for_text(length in 0..=LENGTH_MAX as u32, payload in any::<u8>()) {
            let [a, b, c, d] = length.to_le_bytes();
            prop_assert_eq!(form(&[a, b, c, d, payload]), Some(Form::Packets));
        }
    }

    #[test]
    fn what_is_inside_a_packet_is_known() {
        let mut frames = Frames::resume(12, Rest::default());
        let go = |_: Piece<'_>| ControlFlow::Continue(());
        assert_eq!(frames.feed(b"\x05\0\0", go), ControlFlow::Continue(()));
        assert!(frames.is_inside() && frames.partial().is_empty());
        assert_eq!(frames.feed(b"\0a:1", go), ControlFlow::Continue(()));
        assert_eq!(frames.partial(), b"a:1");
        assert_eq!(frames.feed(b"|c\xff\0\0\0", go), ControlFlow::Continue(()));
        assert!(frames.is_inside() && frames.partial().is_empty(), "a long packet is skipped");
    }
}
