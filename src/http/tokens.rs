//! Who may ask for what: bearer tokens out of files, and the judgement of a request by them.
//!
//! Each right has a file with a token a line, several at once while one follows another. A token of `admin_file` has every
//! right; none of the others has another's. Where no file is named at all, whoever reaches a listener has every right. Once
//! one is, to write and to administer without a file of its own is the administrator's alone, and nobody's without
//! `admin_file`; to read is everybody's until `read_file` is named.
//!
//! Of a token only its SHA-256 is kept. A request's token is compared by its digest with every one there is, in a time that
//! depends on none of them. Tokens stand in no log and no answer. A denied request is counted in
//! `tallyd_http_denied_total`; the first of each reason in a second, as many as `limits.reject_log` says, are logged.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, CONNECTION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use subtle::{Choice, ConstantTimeEq as _};

use super::problem::Problem;
use crate::clock::wall_ms;
use crate::secret;
use crate::telemetry;

/// The section `[http.tokens]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Tokens that may send samples.
    pub write_file: String,
    /// Tokens that may read and scrape.
    pub read_file: String,
    /// Tokens that may do all, deletes and reloads too.
    pub admin_file: String,
    /// What stands in the files; whoever reads files puts it here.
    #[serde(skip)]
    pub tokens: Tokens,
}

/// What a route asks of whoever uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Nothing.
    Open,
    /// To send samples.
    Write,
    /// To read figures.
    Read,
    /// To change what is there.
    Admin,
}

impl Right {
    /// Those that have a file, in the order of their declaration.
    pub const GIVEN: [Self; 3] = [Self::Write, Self::Read, Self::Admin];

    /// Its name, in answers and in the API's document.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Write => "write",
            Self::Read => "read",
            Self::Admin => "admin",
        }
    }

    /// The key of its file.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Open => "http.tokens",
            Self::Write => "http.tokens.write_file",
            Self::Read => "http.tokens.read_file",
            Self::Admin => "http.tokens.admin_file",
        }
    }
}

/// Whether everybody has a right, with a token or without, where those of [`Right::GIVEN`] have files or not.
fn is_everybodys(right: Right, have_files: [bool; 3]) -> bool {
    let [_, read, _] = have_files;
    match right {
        Right::Open => true,
        // Who guards writes did not ask for figures to be hidden.
        Right::Read => !read,
        // But who guards anything would not let everybody delete.
        Right::Write | Right::Admin => have_files == [false; 3],
    }
}

impl Config {
    /// Whether everybody has a right, with a token or without.
    pub fn is_everybodys(&self, right: Right) -> bool {
        is_everybodys(right, Right::GIVEN.map(|right| self.file(right).is_some()))
    }

    /// Whether nobody has a right.
    pub fn is_nobodys(&self, right: Right) -> bool {
        !self.is_everybodys(right) && self.file(right).is_none() && self.file(Right::Admin).is_none()
    }

    /// The file of a right, if one is named.
    pub fn file(&self, right: Right) -> Option<&str> {
        let file = match right {
            Right::Open => return None,
            Right::Write => &self.write_file,
            Right::Read => &self.read_file,
            Right::Admin => &self.admin_file,
        };
        Some(file.as_str()).filter(|file| !file.is_empty())
    }
}

/// The shortest token. What is shorter can be guessed.
const BYTES_MIN: usize = 16;

/// Why a file of tokens can't be used.
#[derive(Debug)]
pub enum Error {
    /// It can't be read as a secret.
    File(secret::Error),
    /// A token that is too short; its line, from 1.
    Short(usize),
    /// A token with a blank, or with a character that no header may hold; its line.
    Character(usize),
    /// No token stands in it.
    None,
}

impl Error {
    /// The exit code for it, as sysexits(3) numbers it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::File(error) => error.exit_code(),
            Self::Short(_) | Self::Character(_) | Self::None => 78,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let remedy = "write one such as `openssl rand -hex 32` makes";
        match self {
            Self::File(error) => error.fmt(f),
            Self::Short(line) => write!(f, "line {line}: a token of less than {BYTES_MIN} bytes; {remedy}"),
            Self::Character(line) => write!(f, "line {line}: a token with a blank or a special character; {remedy}"),
            Self::None => write!(f, "no token stands in it; {remedy}"),
        }
    }
}

impl std::error::Error for Error {}

/// The SHA-256 of a token.
type Digest = [u8; 32];

fn digest_of(token: &[u8]) -> Digest {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, token).as_ref());
    bytes
}

/// The tokens of each right in [`Right::GIVEN`]; of a right without a file, none.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tokens([Option<Arc<[Digest]>>; 3]);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.0.iter().map(|digests| digests.as_ref().map(|digests| digests.len()));
        f.debug_list().entries(counts).finish()
    }
}

impl Tokens {
    /// Reads the files that are named.
    ///
    /// # Errors
    /// Of each file that can't be used, whose it is and why.
    pub fn read(config: &Config) -> Result<Self, Vec<(Right, Error)>> {
        let mut tokens = Self::default();
        let mut wrong = Vec::new();
        for (right, slot) in Right::GIVEN.into_iter().zip(&mut tokens.0) {
            let Some(file) = config.file(right) else { continue };
            let parsed = secret::read(file).map_err(Error::File).and_then(|text| parse(text.reveal()));
            match parsed {
                Ok(digests) => *slot = Some(digests.into()),
                Err(error) => wrong.push((right, error)),
            }
        }
        if wrong.is_empty() { Ok(tokens) } else { Err(wrong) }
    }

    /// What stands for the tokens of a right; nothing where it has no file.
    pub fn of(&self, right: Right) -> Option<&[[u8; 32]]> {
        let [write, read, admin] = &self.0;
        match right {
            Right::Open => None,
            Right::Write => write.as_deref(),
            Right::Read => read.as_deref(),
            Right::Admin => admin.as_deref(),
        }
    }

    /// Whether a request with these headers has a right.
    fn judge(&self, right: Right, headers: &HeaderMap) -> Result<(), Denial> {
        if is_everybodys(right, self.0.each_ref().map(Option::is_some)) {
            return Ok(());
        }
        if self.of(right).or(self.of(Right::Admin)).is_none() {
            return Err(Denial::Nobodys);
        }
        let digest = digest_of(bearer(headers)?);
        // All are compared, whichever is the one.
        let [write, read, admin] = Right::GIVEN.map(|right| {
            let digests = self.of(right).unwrap_or_default();
            digests.iter().fold(Choice::from(0), |found, one| found | one.ct_eq(&digest))
        });
        let (write, read, admin) = (bool::from(write), bool::from(read), bool::from(admin));
        let has = match right {
            Right::Open => true,
            Right::Write => write | admin,
            Right::Read => read | admin,
            Right::Admin => admin,
        };
        match (has, write | read | admin) {
            (true, _) => Ok(()),
            (false, true) => Err(Denial::NotAllowed),
            (false, false) => Err(Denial::Unknown),
        }
    }
}

/// The tokens of a file: one a line, without empty lines and those that begin with `#`.
fn parse(text: &str) -> Result<Vec<Digest>, Error> {
    let lines = text.lines().map(str::trim).enumerate().map(|(at, line)| (at + 1, line));
    let tokens = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let digests = tokens.map(|(line, token)| {
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::Character(line));
        }
        if token.len() < BYTES_MIN { Err(Error::Short(line)) } else { Ok(digest_of(token.as_bytes())) }
    });
    let digests = digests.collect::<Result<Vec<_>, _>>()?;
    if digests.is_empty() { Err(Error::None) } else { Ok(digests) }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Result<&[u8], Denial> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let value = all.next().ok_or(Denial::Missing)?.as_bytes();
    if all.next().is_some() {
        return Err(Denial::Malformed);
    }
    let at = memchr::memchr(b' ', value).ok_or(Denial::Malformed)?;
    let (scheme, token) = (&value[..at], value[at..].trim_ascii());
    if scheme.eq_ignore_ascii_case(b"bearer") && !token.is_empty() { Ok(token) } else { Err(Denial::Malformed) }
}

/// Why a request is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Denial {
    /// It has no token.
    Missing,
    /// What it has is no bearer token, or it has two.
    Malformed,
    /// Nobody has this token.
    Unknown,
    /// The token has other rights.
    NotAllowed,
    /// No token has this right, since no file is named for it.
    Nobodys,
}

impl Denial {
    const ALL: [Self; 5] = [Self::Missing, Self::Malformed, Self::Unknown, Self::NotAllowed, Self::Nobodys];

    const fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::Unknown => "unknown",
            Self::NotAllowed => "not_allowed",
            Self::Nobodys => "nobodys",
        }
    }

    /// The answer, as RFC 6750 has it.
    fn problem(self, right: Right) -> Problem {
        let name = right.name();
        let (status, challenge, detail) = match self {
            Self::Missing => {
                let detail = format!("this needs a token with the right to {name}: send Authorization: Bearer TOKEN");
                (StatusCode::UNAUTHORIZED, "Bearer realm=\"tallyd\"".to_owned(), detail)
            }
            Self::Malformed => {
                let detail = "Authorization holds no bearer token; send one header Authorization: Bearer TOKEN";
                let challenge = "Bearer realm=\"tallyd\", error=\"invalid_request\"";
                (StatusCode::UNAUTHORIZED, challenge.to_owned(), detail.to_owned())
            }
            Self::Unknown => {
                let challenge = "Bearer realm=\"tallyd\", error=\"invalid_token\"";
                (StatusCode::UNAUTHORIZED, challenge.to_owned(), "this token is not, or no more, known".to_owned())
            }
            Self::NotAllowed => {
                let challenge = format!("Bearer realm=\"tallyd\", error=\"insufficient_scope\", scope=\"{name}\"");
                (StatusCode::FORBIDDEN, challenge, format!("this token has not the right to {name}"))
            }
            Self::Nobodys => {
                let admin = Right::Admin.key();
                let other = if right == Right::Admin { String::new() } else { format!(", or in {admin}") };
                let detail = format!("nobody has the right to {name}; name a file of tokens in {}{other}", right.key());
                (StatusCode::FORBIDDEN, String::new(), detail)
            }
        };
        let mut problem = Problem::new(status, detail).member("reason", self.name());
        if status == StatusCode::UNAUTHORIZED {
            // Who has no right here holds no connection either.
            problem = problem.header(CONNECTION, HeaderValue::from_static("close"));
        }
        match HeaderValue::from_str(&challenge) {
            // No token would help.
            Ok(challenge) if challenge.is_empty() => problem,
            Ok(challenge) => problem.header(WWW_AUTHENTICATE, challenge),
            Err(_) => problem,
        }
    }
}

/// Judges requests by the tokens that are in force. Clones share them.
#[derive(Debug, Clone)]
pub struct Guard {
    tokens: Arc<ArcSwap<Tokens>>,
    log: Arc<Mutex<Log>>,
}

/// A request as far as it is told when it is denied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking<'a> {
    pub(super) listener: &'static str,
    pub(super) route: &'static str,
    pub(super) right: Right,
    pub(super) headers: &'a HeaderMap,
    pub(super) peer: SocketAddr,
}

impl Guard {
    /// With the tokens of a configuration; so many denials of a reason are logged in a second.
    pub fn new(config: &Config, per_second: u32) -> Self {
        let log = Log { per_second, second: 0, noted: [0; Denial::ALL.len()], suppressed: [0; Denial::ALL.len()] };
        Self { tokens: Arc::new(ArcSwap::from_pointee(config.tokens.clone())), log: Arc::new(Mutex::new(log)) }
    }

    /// Puts other tokens in force, for all requests that come from now on.
    pub fn set(&self, tokens: Tokens) {
        self.tokens.store(Arc::new(tokens));
    }

    /// Lets the counters of a listener stand at 0 before they first count.
    pub(super) fn begin(listener: &str) {
        telemetry::HTTP_DENIED.begin(Denial::ALL.map(|denial| [listener, denial.name()]));
    }

    /// Whether a request with these headers has a right. It is not counted.
    pub(super) fn allows(&self, right: Right, headers: &HeaderMap) -> bool {
        self.tokens.load().judge(right, headers).is_ok()
    }

    pub(super) fn check(&self, asking: Asking<'_>) -> Result<(), Problem> {
        self.tokens.load().judge(asking.right, asking.headers).map_err(|denial| {
            telemetry::HTTP_DENIED.counter(&[asking.listener, denial.name()]).increment(1);
            self.note(denial, asking);
            denial.problem(asking.right)
        })
    }

    /// Logs a denial, unless there were too many of its reason in this second. Nobody waits for the lock.
    fn note(&self, denial: Denial, asking: Asking<'_>) {
        let is_told = self.log.try_lock().is_ok_and(|mut log| log.takes(denial, wall_ms() / 1_000));
        if is_told {
            let Asking { listener, route, right, peer, .. } = asking;
            tracing::warn!(reason = denial.name(), listener, route, right = right.name(), from = %peer, "request denied");
        }
    }
}

/// How many denials were logged in this second.
#[derive(Debug)]
struct Log {
    per_second: u32,
    second: u64,
    noted: [u32; Denial::ALL.len()],
    suppressed: [u64; Denial::ALL.len()],
}

impl Log {
    fn takes(&mut self, denial: Denial, second: u64) -> bool {
        if self.second != second {
            self.next(second);
        }
        let at = denial as usize;
        let takes = self.noted[at] < self.per_second;
        if takes {
            self.noted[at] += 1;
        } else {
            self.suppressed[at] += 1;
        }
        takes
    }

    fn next(&mut self, second: u64) {
        self.second = second;
        self.noted.fill(0);
        for denial in Denial::ALL {
            let count = std::mem::take(&mut self.suppressed[denial as usize]);
            if count > 0 {
                tracing::warn!(reason = denial.name(), count, "more denied requests were not logged");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: &str = "write-0123456789abcdef";
    const READ: &str = "read-0123456789abcdef";
    const ADMIN: &str = "admin-0123456789abcdef";

    fn tokens(texts: [Option<&str>; 3]) -> Tokens {
        Tokens(texts.map(|text| text.map(|text| parse(text).unwrap().into())))
    }

    fn headers(value: &str) -> HeaderMap {
        [(AUTHORIZATION, HeaderValue::from_str(value).unwrap())].into_iter().collect()
    }

    #[test]
    fn each_token_has_its_rights_and_no_others() {
        let tokens = tokens([Some(WRITE), Some(READ), Some(ADMIN)]);
        for (token, allowed) in
            [(WRITE, [true, false, false]), (READ, [false, true, false]), (ADMIN, [true, true, true])]
        {
            for (right, allowed) in Right::GIVEN.into_iter().zip(allowed) {
                let expected = if allowed { Ok(()) } else { Err(Denial::NotAllowed) };
                assert_eq!(tokens.judge(right, &headers(&format!("Bearer {token}"))), expected, "{token} {right:?}");
            }
        }
        let judge = |headers: &HeaderMap| tokens.judge(Right::Read, headers);
        assert_eq!(judge(&HeaderMap::new()), Err(Denial::Missing));
        assert_eq!(judge(&headers(&format!("bearer  {READ} "))), Ok(()));
        for wrong in [READ, "Bearer", "Bearer ", "Basic cmVhZDo="] {
            assert_eq!(judge(&headers(wrong)), Err(Denial::Malformed), "{wrong}");
        }
        for wrong in [&READ[..READ.len() - 1], &format!("{READ}x"), "x"] {
            assert_eq!(judge(&headers(&format!("Bearer {wrong}"))), Err(Denial::Unknown), "{wrong}");
        }
        let mut twice = headers(&format!("Bearer {READ}"));
        twice.append(AUTHORIZATION, HeaderValue::from_static("Bearer x"));
        assert_eq!(judge(&twice), Err(Denial::Malformed));
    }

    #[test]
    fn rights_without_a_file_are_everybodys_only_while_none_has_one() {
        let judge = |texts, right, headers: &HeaderMap| tokens(texts).judge(right, headers);
        let nothing = HeaderMap::new();
        for right in Right::GIVEN {
            assert_eq!(judge([None; 3], right, &nothing), Ok(()));
        }
        // To read is everybody's until it has a file.
        for texts in [[Some(WRITE), None, None], [None, None, Some(ADMIN)]] {
            assert_eq!(judge(texts, Right::Read, &nothing), Ok(()));
            assert_eq!(judge(texts, Right::Open, &nothing), Ok(()));
        }
        for (texts, right) in [
            ([Some(WRITE), None, None], Right::Admin),
            ([None, Some(READ), None], Right::Admin),
            ([None, Some(READ), None], Right::Write),
            ([Some(WRITE), Some(READ), None], Right::Admin),
        ] {
            for headers in [&nothing, &headers(&format!("Bearer {READ}")), &headers("Bearer nonsense")] {
                assert_eq!(judge(texts, right, headers), Err(Denial::Nobodys), "{texts:?} {right:?}");
            }
        }
        let for_admin = [None, None, Some(ADMIN)];
        assert_eq!(judge(for_admin, Right::Write, &nothing), Err(Denial::Missing));
        assert_eq!(judge(for_admin, Right::Write, &headers(&format!("Bearer {ADMIN}"))), Ok(()));
    }

    #[test]
    fn a_file_holds_a_token_a_line() {
        let both = parse(&format!("# old, until May\n{READ}\r\n\n  {WRITE}  \n")).unwrap();
        assert_eq!(both, [digest_of(READ.as_bytes()), digest_of(WRITE.as_bytes())]);
        assert!(matches!(parse("# none\n\n"), Err(Error::None)));
        assert!(matches!(parse(&format!("{READ}\nshort")), Err(Error::Short(2))));
        assert!(matches!(parse("two words are no token"), Err(Error::Character(1))));
        assert!(matches!(parse("t\u{f6}ken-0123456789abcdef"), Err(Error::Character(1))));
    }

    #[test]
    fn no_token_is_printed() {
        let tokens = tokens([Some(WRITE), None, Some(ADMIN)]);
        assert_eq!(format!("{tokens:?}"), "[Some(1), None, Some(1)]");
    }

    #[test]
    fn of_many_denials_a_few_are_logged() {
        let mut log = Log { per_second: 2, second: 0, noted: [0; 5], suppressed: [0; 5] };
        let taken = (0..5).filter(|_| log.takes(Denial::Unknown, 7)).count();
        assert_eq!((taken, log.suppressed), (2, [0, 0, 3, 0, 0]));
        assert!(log.takes(Denial::Missing, 7) && log.takes(Denial::Unknown, 8));
        assert_eq!(log.suppressed, [0; 5]);
    }
}
