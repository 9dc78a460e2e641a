//! A stream's bytes into lines, however they were cut on their way. It reads no clock and no socket; at most one line,
//! as far as it may be long, is held.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

/// What a line of a stream is to the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A line without its line feed. A carriage return may end it.
    Line(&'a [u8]),
    /// The beginning of a line that is too long; the rest of it is skipped.
    TooLong(&'a [u8]),
    /// The request line of an HTTP client, or the beginning of one.
    Request(&'a [u8]),
}

/// What a stream that is taken apart leaves in the hands of who does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rest {
    /// The beginning of a line or packet that has not ended.
    pub partial: Vec<u8>,
    /// Bytes of a packet that are still to be skipped; of a line whether there are any, 1 or 0.
    pub skip: u64,
    /// What the stream is made of.
    pub form: Form,
}

/// What a stream is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// As its listener says; of a unix stream nobody knows before its first four bytes have come.
    #[default]
    Open,
    /// Lines.
    Lines,
    /// Packets, each behind its length.
    Packets,
}

/// Splits a stream into lines.
#[derive(Debug)]
pub struct Lines {
    partial: Vec<u8>,
    skipping: bool,
    max: usize,
}

impl Lines {
    /// For a stream whose lines have at most `max` bytes; the carriage return before a line feed does not count.
    pub fn new(max: usize) -> Self {
        Self { partial: Vec::new(), skipping: false, max }
    }

    /// The same, from where another left off.
    pub fn resume(max: usize, rest: Rest) -> Self {
        Self { partial: rest.partial, skipping: rest.skip > 0, max }
    }

    /// What another needs to go on.
    pub fn into_rest(self) -> Rest {
        Rest { partial: self.partial, skip: self.skipping.into(), form: Form::Lines }
    }

    /// Takes the next bytes of the stream and hands over each line that ends in them, until told to stop.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Piece<'_>) -> ControlFlow<()>) -> ControlFlow<()> {
        while let Some(at) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = (&bytes[..at], &bytes[at + 1..]);
            bytes = rest;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if self.partial.is_empty() {
                each(classify(line, self.max))?;
            } else {
                self.extend(line);
                each(classify(&self.partial, self.max))?;
                self.partial.clear();
            }
        }
        self.keep(bytes, each)
    }

    /// Hands over the last line, if the stream ends without a line feed.
    pub fn end(&mut self, each: impl FnOnce(Piece<'_>) -> ControlFlow<()>) {
        if !self.partial.is_empty() {
            // Nothing comes after it that could be stopped.
            let _ended = each(classify(&self.partial, self.max));
            self.partial.clear();
        }
        self.skipping = false;
    }

    /// Whether a line has begun and not ended.
    pub fn is_inside(&self) -> bool {
        self.skipping || !self.partial.is_empty()
    }

    /// What is held of a line that has begun; empty too while a long line is skipped.
    pub fn partial(&self) -> &[u8] {
        &self.partial
    }

    fn keep(&mut self, bytes: &[u8], mut each: impl FnMut(Piece<'_>) -> ControlFlow<()>) -> ControlFlow<()> {
        if self.skipping {
            return ControlFlow::Continue(());
        }
        self.extend(bytes);
        // One more byte may be the carriage return.
        if self.partial.len() <= self.max + 1 {
            return ControlFlow::Continue(());
        }
        self.skipping = true;
        let flow = each(classify(&self.partial, self.max));
        self.partial = Vec::new();
        flow
    }

    /// Two bytes beyond the longest line are enough to see that it is too long, whatever they are.
    fn extend(&mut self, bytes: &[u8]) {
        let room = (self.max + 2).saturating_sub(self.partial.len());
        self.partial.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

fn classify(line: &[u8], max: usize) -> Piece<'_> {
    let length = line.strip_suffix(b"\r").unwrap_or(line).len();
    if length > max {
        let beginning = &line[..max];
        if begins_request(beginning) { Piece::Request(beginning) } else { Piece::TooLong(beginning) }
    } else if is_request(&line[..length]) {
        Piece::Request(line)
    } else {
        Piece::Line(line)
    }
}

/// `METHOD target HTTP/1.1`, with any method: the way in which a browser could be made to send lines here. A page chooses its
/// methods freely, in lower case too; but unless it is in upper case, the target must look like one, for a name may begin with
/// a word and a blank.
pub(crate) fn is_request(line: &[u8]) -> bool {
    // Almost every line is told apart by its last byte but two.
    let [head @ .., b'0'..=b'9', b'.', b'0'..=b'9'] = line else { return false };
    let Some(head) = head.strip_suffix(b" HTTP/") else { return false };
    let Some((method, target)) = request(head) else { return false };
    method.iter().all(u8::is_ascii_uppercase) || target == b"*" || begins_target(target)
}

/// The same of a line whose end is not seen, since it is too long or has not come.
pub(crate) fn begins_request(line: &[u8]) -> bool {
    request(line).is_some_and(|(_, target)| begins_target(target))
}

/// No name that has been read has a slash, and few a colon.
fn begins_target(target: &[u8]) -> bool {
    [b"/".as_slice(), b"http:", b"https:"].iter().any(|beginning| target.starts_with(beginning))
}

/// A token of RFC 9110 (5.6.2) and what stands behind the blank that ends it. No token has a colon, so no sample begins so.
fn request(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let (method, target) = line.split_at(memchr::memchr(b' ', line)?);
    let is_token = !method.is_empty() && method.iter().all(|byte| is_of_token(*byte));
    is_token.then_some((method, &target[1..]))
}

fn is_of_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Clone)]
    enum Owned {
        Line(Vec<u8>),
        TooLong(Vec<u8>),
        Request(Vec<u8>),
    }

    fn own(piece: Piece<'_>) -> Owned {
        match piece {
            Piece::Line(bytes) => Owned::Line(bytes.to_vec()),
            Piece::TooLong(bytes) => Owned::TooLong(bytes.to_vec()),
            Piece::Request(bytes) => Owned::Request(bytes.to_vec()),
        }
    }

    fn pieces<'a>(chunks: impl IntoIterator<Item = &'a [u8]>, max: usize) -> Vec<Owned> {
        let mut lines = Lines::new(max);
        let mut seen = Vec::new();
        for chunk in chunks {
            let flow = lines.feed(chunk, |piece| {
                seen.push(own(piece));
                ControlFlow::Continue(())
            });
            assert_eq!(flow, ControlFlow::Continue(()));
            assert!(lines.partial().len() <= max + 1);
        }
        lines.end(|piece| {
            seen.push(own(piece));
            ControlFlow::Continue(())
        });
        assert!(!lines.is_inside());
        seen
    }

    /// The obvious version: the whole stream at once.
    fn plain(stream: &[u8], max: usize) -> Vec<Owned> {
        let mut lines: Vec<_> = stream.split(|&byte| byte == b'\n').collect();
        if lines.last().is_some_and(|line| line.is_empty()) {
            lines.pop();
        }
        lines.into_iter().map(|line| own(classify(line, max))).collect()
    }

    const SCRIPT: &[u8] =
        b"a:1|c\nb:2|g\r\n\n{\"x\":1}\nabcdefghijklmnop\nabcdefghijkl\r\nabcdefghijklm\n\xff\x00\nlast:1|c";

    #[test]
    fn every_cut_gives_the_same_lines() {
        let whole = plain(SCRIPT, 12);
        assert_eq!(whole.len(), 9);
        assert_eq!(whole.iter().filter(|piece| matches!(piece, Owned::TooLong(_))).count(), 2);
        for first in 0..=SCRIPT.len() {
            for second in first..=SCRIPT.len() {
                let cut = [&SCRIPT[..first], &SCRIPT[first..second], &SCRIPT[second..]];
                assert_eq!(pieces(cut, 12), whole, "cut at {first} and {second}");
            }
        }
        assert_eq!(pieces(SCRIPT.chunks(1), 12), whole);
    }

    proptest! {
        #[test]
        fn any_cuts_of_any_stream_give_the_same_lines(
            stream in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'x'), any::<u8>()], 0..200),
            cuts in proptest::collection::vec(0_usize..200, 0..20),
            max in 1_usize..20,
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| at.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let chunks = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]);
            prop_assert_eq!(pieces(chunks, max), plain(&stream, max));
        }
    }

    #[test]
    fn another_goes_on_at_any_byte() {
        for cut in 0..=SCRIPT.len() {
            let mut seen = Vec::new();
            let mut see = |piece: Piece<'_>| {
                seen.push(own(piece));
                ControlFlow::Continue(())
            };
            let mut first = Lines::new(12);
            assert!(first.feed(&SCRIPT[..cut], &mut see).is_continue());
            let mut second = Lines::resume(12, first.into_rest());
            assert!(second.feed(&SCRIPT[cut..], &mut see).is_continue());
            second.end(see);
            assert_eq!(seen, plain(SCRIPT, 12), "cut at {cut}");
        }
    }

    #[test]
    fn request_lines_of_http_are_told_from_samples() {
        for request in [
            "GET / HTTP/1.1",
            "POST /ingest/metrics HTTP/1.0",
            "PRI * HTTP/2.0",
            "GET / HTTP/1.1\r",
            "patch / HTTP/1.1",
            "M-SEARCH / HTTP/1.1",
            "!#$%&'*+-.^_`|~09azAZ / HTTP/1.1",
        ] {
            assert_eq!(classify(request.as_bytes(), 100), Piece::Request(request.as_bytes()));
        }
        assert_eq!(classify(b"POST /aaaaaaaaaaaaaaaaaaa HTTP/1.1", 10), Piece::Request(b"POST /aaaa"));
        assert_eq!(classify(b"patch /aaaaaaaaaaaaaaaaaa HTTP/1.1", 10), Piece::Request(b"patch /aaa"));
        for line in [
            "GET:1|c",
            "GET_requests:1|c",
            "GET_requests:1|c|#proto: HTTP/1.1",
            "a b:1|c",
            "a b:1|c|#proto: HTTP/1.1",
            "a http.b:1|c|#proto: HTTP/1.1",
            " HTTP/1.1",
            " / HTTP/1.1",
            "g\u{f6} / HTTP/1.1",
            "{\"a\": / HTTP/1.1",
            "GET / HTTP/1.",
            "HTTP/1.1",
        ] {
            assert_eq!(classify(line.as_bytes(), 100), Piece::Line(line.as_bytes()));
        }
        assert_eq!(classify(b"GET aaaaaaaaaaaaa", 10), Piece::TooLong(b"GET aaaaaa"));
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut lines = Lines::new(100);
        let mut seen = 0;
        let flow = lines.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\na:1|c\n", |_| {
            seen += 1;
            ControlFlow::Break(())
        });
        assert_eq!((flow, seen), (ControlFlow::Break(()), 1));
    }
}
