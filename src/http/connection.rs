//! One HTTP connection: the limits of time and size that hyper does not know, and a whole answer where hyper's would be bare.
//!
//! hyper answers a head it cannot read with a status alone, takes idle time for header time, and waits for ever for a client
//! that does not read. So it is given a stream that knows where the connection stands ([`Progress`]), and from that follow
//! `limits.request_line` (414), `limits.headers` (431), `limits.header_time` (408, or a close when nothing was sent) and
//! `limits.keep_alive` (a close, for an answer that is not read as well). What hyper says by itself is swallowed and said by
//! us as a problem. Nothing is reset under an answer in flight: what a client still sends is read and dropped for a while.
//!
//! Bytes of a head that came together with the request before it are not counted here; the server looks at it once parsed.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::problem::Problem;
use super::server::Body;
use super::{HEADER_LINES_MAX, Limits};
use crate::tls;

/// How long, and for how many bytes, a client is listened to after the last answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 8 << 20;

/// hyper reads more header lines, and a longer head, than the limits allow, so that it is us who refuse them.
const HEADER_LINES_READ: usize = 4 * HEADER_LINES_MAX;
const HEAD_BYTES_READ_MIN: usize = 64 << 10;

/// Serves requests until the client, a limit or `stop` ends the connection. After `stop` the request under way is the last.
/// Returns how it ended if that was without a request to show for it.
pub(super) async fn run<F, A>(
    stream: tls::Stream,
    limits: &Limits,
    mut stop: watch::Receiver<bool>,
    answer: F,
) -> Option<Unasked>
where
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Body>>,
{
    let progress = Rc::new(RefCell::new(Progress::new(limits)));
    let screened = TokioIo::new(Screened { stream, progress: Rc::clone(&progress) });
    let service = service_fn(|request: Request<Incoming>| {
        progress.borrow_mut().asked(!request.body().is_end_stream());
        let answer = answer(request);
        let progress = Rc::clone(&progress);
        Box::pin(async move {
            let response = answer.await;
            progress.borrow_mut().moved();
            Ok::<_, Infallible>(response.map(|body| Tracked { body, progress }))
        })
    });
    let head_bytes = limits.request_line.bytes().saturating_add(limits.headers.bytes());
    let mut connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_headers(HEADER_LINES_READ)
        .max_buf_size(head_bytes.saturating_mul(2).max(HEAD_BYTES_READ_MIN))
        .serve_connection(screened, service);
    let mut deadline = std::pin::pin!(sleep_until(Instant::now()));
    let mut stopping = false;
    let end = loop {
        let served = poll_fn(|context| {
            if let Poll::Ready(end) = connection.poll_without_shutdown(context) {
                return Poll::Ready(Some(end));
            }
            // Every change of the progress is made by the poll above, so this deadline is never an old one.
            deadline.as_mut().reset(progress.borrow().deadline());
            deadline.as_mut().poll(context).map(|()| None)
        });
        tokio::select! {
            end = served => break end,
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    let stream = connection.into_parts().io.into_inner().stream;
    let (refusal, unread) = progress.borrow().verdict(end);
    let refused = refusal.as_ref().map(|problem| Unasked::Refused(problem.status));
    let is_tls = progress.borrow().is_tls;
    close(stream, refusal, unread).await;
    if is_tls { Some(Unasked::Tls) } else { refused }
}

/// How a connection ended without a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unasked {
    /// With an answer of this status.
    Refused(StatusCode),
    /// The client speaks TLS, and nobody here does.
    Tls,
}

/// Tells the client why, if there is something to tell, and closes without a reset under what was told.
pub(super) async fn close(mut stream: tls::Stream, refusal: Option<Problem>, unread: bool) {
    let linger = async {
        if let Some(problem) = &refusal {
            stream.write_all(&problem.last_words()).await?;
        }
        stream.shutdown().await?;
        let mut left = if unread || refusal.is_some() { LINGER_BYTES_MAX } else { 0 };
        let mut dropped = [0; 4096];
        while left > 0 {
            match stream.read(&mut dropped).await? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        io::Result::Ok(())
    };
    // A client that is gone or does not listen is what this time is bounded for.
    let _gone = timeout(LINGER, linger).await;
}

/// Where a connection stands. The stream and the service write it, the deadline is read from it.
#[derive(Debug)]
struct Progress {
    phase: Phase,
    /// Since when the client has been waited for, or when the last of its bytes or ours went through.
    moved: Instant,
    /// Whether the body of the answer under way was handed over to its end.
    told: bool,
    /// Whether the last request had a body, which may not have been read to its end.
    unread: bool,
    /// Whether hyper had something to say while no answer was under way.
    swallowed: bool,
    /// Whether the first bytes were those of a client of TLS.
    is_tls: bool,
    refusal: Option<StatusCode>,
    header_time: Duration,
    keep_alive: Duration,
    line_bytes_max: usize,
    head_bytes_max: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// No request yet, or none since the last answer. The first head has to come in `header_time`.
    Waiting { first: bool },
    /// A head has begun.
    Head(Head),
    /// A request is under way: its body is read or its answer written.
    Request,
}

/// As much of a head as has come.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Head {
    since: Instant,
    line_bytes: usize,
    header_bytes: usize,
    line_ended: bool,
    /// Whether nothing stands on the current line so far.
    blank: bool,
    ended: bool,
}

impl Head {
    fn new(since: Instant) -> Self {
        Self { since, line_bytes: 0, header_bytes: 0, line_ended: false, blank: true, ended: false }
    }

    /// Counts bytes up to the empty line; what stands behind it is a body or the next head.
    fn count(&mut self, read: &[u8]) {
        for byte in read {
            // Empty lines before a request are allowed and no part of it.
            let leading = !self.line_ended && self.line_bytes == 0 && matches!(byte, b'\r' | b'\n');
            if self.ended || leading {
                continue;
            }
            if self.line_ended {
                self.header_bytes += 1;
            } else {
                self.line_bytes += 1;
            }
            match byte {
                b'\n' => {
                    self.ended = self.line_ended && self.blank;
                    self.line_ended = true;
                    self.blank = true;
                }
                b'\r' => {}
                _ => self.blank = false,
            }
        }
    }
}

impl Progress {
    fn new(limits: &Limits) -> Self {
        Self {
            phase: Phase::Waiting { first: true },
            moved: Instant::now(),
            told: false,
            unread: false,
            swallowed: false,
            is_tls: false,
            refusal: None,
            header_time: limits.header_time.0,
            keep_alive: limits.keep_alive.0,
            line_bytes_max: limits.request_line.bytes(),
            head_bytes_max: limits.headers.bytes(),
        }
    }

    /// When the connection ends if nothing happens before.
    fn deadline(&self) -> Instant {
        match self.phase {
            Phase::Waiting { first: true } => self.moved + self.header_time,
            Phase::Head(head) => head.since + self.header_time,
            Phase::Waiting { first: false } | Phase::Request => self.moved + self.keep_alive,
        }
    }

    /// Counts what the client sent, if it is part of a head. `false` when that head is refused.
    fn heard(&mut self, read: &[u8]) -> bool {
        self.moved();
        if self.phase == (Phase::Waiting { first: true }) && tls::is_hello(read) {
            self.is_tls = true;
            self.refusal = Some(StatusCode::BAD_REQUEST);
            return false;
        }
        let mut head = match self.phase {
            Phase::Waiting { .. } => Head::new(self.moved),
            Phase::Head(head) => head,
            Phase::Request => return true,
        };
        head.count(read);
        self.phase = Phase::Head(head);
        if head.line_bytes > self.line_bytes_max {
            self.refusal = Some(StatusCode::URI_TOO_LONG);
        } else if head.header_bytes > self.head_bytes_max {
            self.refusal = Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        }
        self.refusal.is_none()
    }

    /// A head was read to its end: hyper asks for an answer.
    fn asked(&mut self, body: bool) {
        self.phase = Phase::Request;
        self.told = false;
        self.unread = body;
        self.moved();
    }

    fn moved(&mut self) {
        self.moved = Instant::now();
    }

    /// All that there was to write is written.
    fn flushed(&mut self) {
        if self.phase == Phase::Request && self.told {
            self.phase = Phase::Waiting { first: false };
            self.moved();
        }
    }

    /// What to tell the client at the end of its connection, and whether it may still be sending. `end` is hyper's, `None`
    /// for a deadline that passed.
    fn verdict(&self, end: Option<hyper::Result<()>>) -> (Option<Problem>, bool) {
        let answering = self.phase == Phase::Request;
        let status = match (self.refusal, end) {
            (Some(status), _) => Some(status),
            (None, None) => matches!(self.phase, Phase::Head(_)).then_some(StatusCode::REQUEST_TIMEOUT),
            (None, Some(Err(error))) if error.is_parse_too_large() => Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
            (None, Some(Err(error))) if error.is_parse() || self.swallowed => Some(StatusCode::BAD_REQUEST),
            (None, Some(_)) => None,
        };
        let problem = status.filter(|_| !answering).map(|status| Problem::new(status, self.detail(status)));
        (problem, self.unread)
    }

    fn detail(&self, status: StatusCode) -> String {
        match status {
            StatusCode::URI_TOO_LONG => too_long_line(self.line_bytes_max),
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => too_large_head(self.head_bytes_max),
            StatusCode::REQUEST_TIMEOUT => format!(
                "the request's headers took longer than limits.header_time, {} ms",
                self.header_time.as_millis()
            ),
            _ if self.is_tls => "this address speaks no TLS; write http:// before it".to_owned(),
            _ => "this is no request of HTTP/1.1 or HTTP/1.0".to_owned(),
        }
    }
}

/// Says what `limits.request_line` is.
pub(super) fn too_long_line(max: usize) -> String {
    format!("the request line is longer than limits.request_line, {max} bytes")
}

/// Says what `limits.headers` is.
pub(super) fn too_large_head(max: usize) -> String {
    format!("the headers are longer than limits.headers, {max} bytes, or more than {HEADER_LINES_MAX} lines")
}

/// A stream that keeps account of where its connection stands.
#[derive(Debug)]
struct Screened {
    stream: tls::Stream,
    progress: Rc<RefCell<Progress>>,
}

impl AsyncRead for Screened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let read = &buffer.filled()[before..];
        if read.is_empty() || self.progress.borrow_mut().heard(read) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Ready(Err(io::ErrorKind::InvalidData.into()))
        }
    }
}

impl Screened {
    /// Whether bytes are hyper's own answer, since none of ours is under way.
    fn swallows(&self) -> bool {
        let mut progress = self.progress.borrow_mut();
        let swallows = progress.phase != Phase::Request;
        progress.swallowed |= swallows;
        swallows
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.progress.borrow_mut().moved();
        }
        written
    }
}

impl AsyncWrite for Screened {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.swallows() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.swallows() {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.progress.borrow_mut().flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The body of an answer, which tells when hyper has all of it.
struct Tracked {
    body: Body,
    progress: Rc<RefCell<Progress>>,
}

impl hyper::body::Body for Tracked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.body.as_mut().poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.progress.borrow_mut().told = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counted<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> Head {
        let mut head = Head::new(Instant::now());
        parts.into_iter().for_each(|part| head.count(part));
        head
    }

    #[test]
    fn a_head_is_counted_up_to_its_empty_line() {
        for (text, line_bytes, header_bytes, ended) in [
            ("GET / HTTP/1.1\r\n\r\nbody\r\n\r\n", 16, 2, true),
            ("\r\n\nGET / HTTP/1.1\nA: b\n\nbody", 15, 6, true),
            ("GET / HTTP/1.1\r\nA: b\r\n\r", 16, 7, false),
            ("GET /aaaa", 9, 0, false),
        ] {
            let head = counted([text.as_bytes()]);
            assert_eq!((head.line_bytes, head.header_bytes, head.ended), (line_bytes, header_bytes, ended), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_head_counts_the_same_in_whatever_pieces_it_comes(bytes in "[ab:\r\n]{0,60}", size in 1_usize..20) {
            let whole = counted([bytes.as_bytes()]);
            let pieces = counted(bytes.as_bytes().chunks(size));
            prop_assert_eq!(Head { since: whole.since, ..pieces }, whole);
        }
    }
}
