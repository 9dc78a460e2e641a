//! TLS of our own listeners: who we are out of two files, and a TCP connection into a stream that speaks TLS or does not.
//!
//! rustls with ring, TLS 1.2 and 1.3; no protocol or cipher of it is configurable. With `tls.client_ca_file` a client must
//! show a certificate that one of these authorities signed. The files are read by `tallyd check`, at the start and at each
//! reload ([`Identity::read`]); a reload changes who we are for connections that come later ([`Acceptor::set`]).
//!
//! A handshake ends within the time that its listener gives it and holds a place among the listener's connections. So many
//! are under way at one time for each kind of listener ([`HANDSHAKES_MAX`]); the others wait, within the same time. What
//! comes of it is counted in `tallyd_tls_handshakes_total`, what does not in `tallyd_tls_failed_total`; no failure ends a
//! listener. The end of our certificate is `tallyd_tls_certificate_expiry_timestamp_seconds`.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, Read as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use ring::digest::{SHA256, digest};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_cert::der::Decode as _;

use crate::secret;
use crate::telemetry;

/// The section `[tls]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// PEM: our certificate, and those between it and its authority behind it.
    pub cert_file: String,
    /// PEM: its key.
    pub key_file: String,
    /// PEM: who signs the certificates of clients; if empty, clients need none.
    pub client_ca_file: String,
    /// What the files make of us; whoever reads files puts it here.
    #[serde(skip)]
    pub identity: Option<Identity>,
}

/// A file of `[tls]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// `cert_file`
    Certificate,
    /// `key_file`
    Key,
    /// `client_ca_file`
    ClientCa,
}

impl Which {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Certificate, Self::Key, Self::ClientCa];

    /// The key that names it.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Certificate => "tls.cert_file",
            Self::Key => "tls.key_file",
            Self::ClientCa => "tls.client_ca_file",
        }
    }
}

/// Why TLS can't be spoken.
#[derive(Debug)]
pub enum Error {
    /// One of certificate and key is named and the other is not; the one that is missing.
    Half(Which),
    /// Authorities of clients, and no certificate of ours.
    Alone,
    /// A file can't be read.
    Read(Which, io::Error),
    /// A file can't be used as a secret, or is no credential that there is.
    Secret(Which, secret::Error),
    /// No certificate, or no key, stands in the file.
    Pem(Which),
    /// The key is another certificate's.
    Mismatch,
    /// rustls does not take it; its own words.
    Refused(Which, String),
}

impl Error {
    /// The file that is wrong.
    pub const fn which(&self) -> Which {
        match self {
            Self::Half(which) | Self::Read(which, _) | Self::Pem(which) => *which,
            Self::Secret(which, _) | Self::Refused(which, _) => *which,
            Self::Alone => Which::ClientCa,
            Self::Mismatch => Which::Key,
        }
    }

    /// The exit code for it, as sysexits(3) numbers it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Read(_, error) if error.kind() == ErrorKind::NotFound => 66,
            Self::Read(_, error) if error.kind() == ErrorKind::PermissionDenied => 77,
            Self::Read(..) => 74,
            Self::Secret(_, error) => error.exit_code(),
            Self::Half(_) | Self::Alone | Self::Pem(_) | Self::Mismatch | Self::Refused(..) => 78,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Half(_) => f.write_str("missing; tls.cert_file and tls.key_file go together"),
            Self::Alone => f.write_str("does nothing without tls.cert_file and tls.key_file; name these too"),
            Self::Read(_, error) if error.kind() == ErrorKind::NotFound => write!(f, "{error}; name an existing file"),
            Self::Read(_, error) => write!(f, "{error}; make it readable for this user, or name another"),
            Self::Secret(_, error) => error.fmt(f),
            Self::Pem(Which::Key) => f.write_str("no private key in PEM; name a file that has one, without a password"),
            Self::Pem(Which::Certificate | Which::ClientCa) => {
                f.write_str("no certificate in PEM; name a file that has one")
            }
            Self::Mismatch => f.write_str("the key is not that of the certificate in tls.cert_file; name its own"),
            Self::Refused(_, words) => write!(f, "{words}; name a file with another"),
        }
    }
}

impl std::error::Error for Error {}

/// Who we are, ready to be shown.
#[derive(Clone)]
pub struct Identity {
    server: Arc<ServerConfig>,
    expires: Option<SystemTime>,
    /// Of the files it was read from, in the order of [`Which::ALL`].
    digests: [[u8; 32]; 3],
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// The same files.
impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.digests == other.digests
    }
}

/// How long before its end a certificate is spoken of.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 24 * 3_600);

impl Identity {
    /// Reads the files that are named, if any are.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(config: &Config) -> Result<Option<Self>, Error> {
        let Config { cert_file, key_file, client_ca_file, .. } = config;
        match (cert_file.is_empty(), key_file.is_empty(), client_ca_file.is_empty()) {
            (true, true, true) => return Ok(None),
            (true, true, false) => return Err(Error::Alone),
            (true, false, _) => return Err(Error::Half(Which::Certificate)),
            (false, true, _) => return Err(Error::Half(Which::Key)),
            (false, false, _) => {}
        }
        let cert = read(Which::Certificate, cert_file)?;
        let client_ca = if client_ca_file.is_empty() { None } else { Some(read(Which::ClientCa, client_ca_file)?) };
        // The key last: a check has not got it where it is a credential, and looks at all else.
        certificates(Which::Certificate, &cert)?;
        client_ca.as_deref().map(|pem| certificates(Which::ClientCa, pem)).transpose()?;
        let key = secret::read(key_file).map_err(|error| Error::Secret(Which::Key, error))?;
        Self::new(&cert, key.reveal().as_bytes(), client_ca.as_deref()).map(Some)
    }

    fn new(cert: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> Result<Self, Error> {
        let chain = certificates(Which::Certificate, cert)?;
        let private = PrivateKeyDer::from_pem_slice(key).map_err(|_| Error::Pem(Which::Key))?;
        let expires = chain.first().and_then(expiry);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let refused = |which| move |error: rustls::Error| Error::Refused(which, error.to_string());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(refused(Which::Certificate))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(authorities) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(Which::ClientCa, authorities)? {
                    roots.add(certificate).map_err(refused(Which::ClientCa))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                let verifier = verifier.map_err(|error| Error::Refused(Which::ClientCa, error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let server = builder.with_single_cert(chain, private).map_err(|error| unusable(&error))?;
        let digests = [cert, key, client_ca.unwrap_or_default()].map(|text| {
            let mut of_text = [0; 32];
            of_text.copy_from_slice(digest(&SHA256, text).as_ref());
            of_text
        });
        Ok(Self { server: Arc::new(server), expires, digests })
    }

    /// Whether a file of another says something else.
    pub fn differs(&self, other: &Self, which: Which) -> bool {
        self.digests[which as usize] != other.digests[which as usize]
    }

    /// What an operator should know of the certificate's end at this time, if it has come or is near.
    pub fn warning(&self, now: SystemTime) -> Option<String> {
        let expires = self.expires?;
        let at = humantime::format_rfc3339_seconds(expires);
        match expires.duration_since(now) {
            Err(_) => Some(format!("tls.cert_file: the certificate expired at {at}; renew it and reload")),
            Ok(left) if left < EXPIRES_SOON => {
                let days = left.as_secs() / (24 * 3_600);
                Some(format!("tls.cert_file: the certificate expires at {at}, in {days} days; renew it and reload"))
            }
            Ok(_) => None,
        }
    }
}

/// Why rustls does not take a certificate with a key.
fn unusable(error: &rustls::Error) -> Error {
    if let rustls::Error::InconsistentKeys(_) = error {
        return Error::Mismatch;
    }
    let which = if let rustls::Error::InvalidCertificate(_) = error { Which::Certificate } else { Which::Key };
    Error::Refused(which, error.to_string())
}

fn read(which: Which, name: &str) -> Result<Vec<u8>, Error> {
    let path = secret::locate(name).map_err(|error| Error::Secret(which, error))?;
    secret::public(&path).map_err(|error| Error::Read(which, error))
}

fn certificates(which: Which, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|_| Error::Pem(which))?;
    if all.is_empty() { Err(Error::Pem(which)) } else { Ok(all) }
}

/// When a certificate ends. One that can't be read for that is not kept from use.
fn expiry(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let certificate = x509_cert::Certificate::from_der(certificate).ok()?;
    Some(UNIX_EPOCH + certificate.tbs_certificate.validity.not_after.to_unix_duration())
}

/// Why no TLS connection came of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Something else than TLS came.
    Plaintext,
    /// TLS came to an address that speaks none.
    Unexpected,
    /// The handshake took too long.
    Timeout,
    /// The client went away.
    Closed,
    /// The client showed no certificate, and needs one.
    NoCertificate,
    /// The client's certificate is not one of those that are trusted, or not valid now.
    BadCertificate,
    /// The client broke it off: it does not trust our certificate, say.
    Alert,
    /// The client has no version or cipher that we have.
    Incompatible,
    /// What came is no sound TLS.
    Protocol,
}

impl Failure {
    /// Every failure, in the order of their declaration.
    pub const ALL: [Self; 9] = [
        Self::Plaintext,
        Self::Unexpected,
        Self::Timeout,
        Self::Closed,
        Self::NoCertificate,
        Self::BadCertificate,
        Self::Alert,
        Self::Incompatible,
        Self::Protocol,
    ];

    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Unexpected => "unexpected",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::NoCertificate => "no_certificate",
            Self::BadCertificate => "bad_certificate",
            Self::Alert => "alert",
            Self::Incompatible => "incompatible",
            Self::Protocol => "protocol",
        }
    }

    fn of(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::NoCertificatesPresented) => Self::NoCertificate,
            None => Self::Closed,
            Some(rustls::Error::InvalidCertificate(_)) => Self::BadCertificate,
            Some(rustls::Error::AlertReceived(_)) => Self::Alert,
            Some(rustls::Error::PeerIncompatible(_)) => Self::Incompatible,
            Some(_) => Self::Protocol,
        }
    }

    /// Counts it for a listener.
    pub fn count(self, listener: &str) {
        telemetry::TLS_FAILED.counter(&[listener, self.name()]).increment(1);
    }
}

/// The first byte that a client of TLS sends: that of a handshake's record.
const HANDSHAKE: u8 = 0x16;

/// Whether a connection that begins with these bytes is one of TLS. No line and no request begins so.
pub fn is_hello(beginning: &[u8]) -> bool {
    beginning.first() == Some(&HANDSHAKE)
}

/// Handshakes that are under way at one time on one kind of listener: each holds some 40 KiB and computes for a
/// millisecond, and whoever is beyond waits for one to end.
pub const HANDSHAKES_MAX: usize = 32;

/// Makes TLS connections as who we are at the time. Clones share that.
#[derive(Debug, Clone)]
pub struct Acceptor {
    seats: Arc<Semaphore>,
    identity: Arc<ArcSwapOption<Identity>>,
    /// How long a handshake may take.
    within: Duration,
}

impl Acceptor {
    /// Speaks as `identity`; without one every handshake fails. One may take so long.
    pub fn new(identity: Option<Identity>, within: Duration) -> Self {
        let acceptor = Self { seats: Arc::new(Semaphore::new(HANDSHAKES_MAX)), identity: Arc::default(), within };
        acceptor.set(identity);
        acceptor
    }

    /// The same for another kind of listener, whose handshakes wait for none of these.
    pub fn apart(&self) -> Self {
        Self { seats: Arc::new(Semaphore::new(HANDSHAKES_MAX)), ..self.clone() }
    }

    /// Speaks as another to whoever connects from now on.
    pub fn set(&self, identity: Option<Identity>) {
        let expires = identity.as_ref().and_then(|identity| identity.expires);
        if let Some(since) = expires.and_then(|expires| expires.duration_since(UNIX_EPOCH).ok()) {
            telemetry::TLS_EXPIRY.gauge(&[]).set(since.as_secs_f64());
        }
        self.identity.store(identity.map(Arc::new));
    }

    /// What an operator should know of the certificate's end.
    pub fn warning(&self) -> Option<String> {
        self.identity.load().as_ref()?.warning(SystemTime::now())
    }

    /// Lets the counters of a listener stand at 0 before they first count.
    pub fn begin(listener: &str) {
        telemetry::TLS_FAILED.begin(Failure::ALL.map(|failure| [listener, failure.name()]));
        telemetry::TLS_HANDSHAKES.begin([[listener]]);
    }

    /// Makes a connection speak TLS, and counts for its listener what came of it. A connection on which something else came
    /// is given back with that, so that it can be told.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn accept(&self, stream: TcpStream, listener: &str) -> Result<Stream, (Failure, Option<TcpStream>)> {
        let made = timeout(self.within, self.shake_hands(stream)).await.unwrap_or(Err((Failure::Timeout, None)));
        match &made {
            Ok(_) => telemetry::TLS_HANDSHAKES.counter(&[listener]).increment(1),
            Err((failure, _)) => failure.count(listener),
        }
        made
    }

    async fn shake_hands(&self, stream: TcpStream) -> Result<Stream, (Failure, Option<TcpStream>)> {
        let mut first = [0];
        match stream.peek(&mut first).await {
            Ok(1..) if !is_hello(&first) => return Err((Failure::Plaintext, Some(stream))),
            Ok(1..) => {}
            Ok(0) | Err(_) => return Err((Failure::Closed, None)),
        }
        // Who has said nothing yet keeps nobody waiting. The seats are never taken away.
        let _seat = self.seats.acquire().await;
        let Some(server) = self.identity.load().as_ref().map(|identity| Arc::clone(&identity.server)) else {
            return Err((Failure::Protocol, None));
        };
        let made = TlsAcceptor::from(server).accept(stream).await;
        made.map(|stream| Stream::Tls(Box::new(stream))).map_err(|error| {
            tracing::debug!(%error, "no TLS connection");
            (Failure::of(&error), None)
        })
    }
}

/// A TCP connection, in TLS or not.
#[derive(Debug)]
pub enum Stream {
    /// Bytes as they are.
    Plain(TcpStream),
    /// Bytes in TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The TCP connection below.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// Reads what the kernel or TLS holds, without the runtime and without waiting: `WouldBlock` where there is nothing.
    pub fn read_held(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => (&*SockRef::from(&*stream)).read(buffer),
            Self::Tls(stream) => {
                let (tcp, tls) = stream.get_mut();
                read_held(&SockRef::from(&*tcp), tls, buffer)
            }
        }
    }

    /// Tells a peer of TLS that nothing more is said, as far as there is room for that now.
    pub fn farewell(&mut self) {
        if let Self::Tls(stream) = self {
            let (tcp, tls) = stream.get_mut();
            tls.send_close_notify();
            let socket = SockRef::from(&*tcp);
            // A peer that does not read is not told.
            while tls.wants_write() && tls.write_tls(&mut &*socket).is_ok_and(|written| written > 0) {}
        }
    }
}

fn read_held(socket: &SockRef<'_>, tls: &mut ServerConnection, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match tls.reader().read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            read => return read,
        }
        tls.read_tls(&mut &**socket)?;
        tls.process_new_packets().map_err(io::Error::other)?;
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A certificate of its own authority that ends so many days from now, and its key.
    fn made(days: i64) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let now = SystemTime::now();
        let day = Duration::from_secs(24 * 3_600);
        let end = if days < 0 { now - day * days.unsigned_abs() as u32 } else { now + day * days as u32 };
        parameters.not_before = (now - day * 400).into();
        parameters.not_after = end.into();
        (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn config(directory: &Path, cert: &str, key: &str) -> Config {
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            path.display().to_string()
        };
        Config { cert_file: write("cert", cert), key_file: write("key", key), ..Config::default() }
    }

    #[test]
    fn the_end_of_a_certificate_is_told_before_it_comes() {
        let directory = tempfile::tempdir().unwrap();
        for (days, said) in [(-1, Some("expired")), (3, Some("in 2 days")), (100, None)] {
            let (cert, key) = made(days);
            let identity = Identity::read(&config(directory.path(), &cert, &key)).unwrap().unwrap();
            let warning = identity.warning(SystemTime::now());
            assert_eq!(warning.is_some(), said.is_some(), "{days}: {warning:?}");
            assert!(warning.is_none_or(|warning| warning.contains(said.unwrap())), "{days}");
        }
    }

    #[test]
    fn handshakes_beyond_the_bound_wait_for_one_to_end() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = made(100);
        let identity = Identity::read(&config(directory.path(), &cert, &key)).unwrap();
        let acceptor = Acceptor::new(identity, Duration::from_secs(60));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let to = listener.local_addr().unwrap();
            let held = acceptor.seats.acquire_many(HANDSHAKES_MAX as u32).await.unwrap();
            let mut client = TcpStream::connect(to).await.unwrap();
            client.write_all(b"\x16 no handshake, however long it is").await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let mut waiting = std::pin::pin!(acceptor.accept(stream, "tcp"));
            assert!(timeout(Duration::from_millis(50), &mut waiting).await.is_err(), "it waits");
            // Another kind of listener has its own.
            let (stream, other) = (TcpStream::connect(to).await.unwrap(), acceptor.apart());
            drop(stream);
            let (stream, _) = listener.accept().await.unwrap();
            assert!(matches!(other.accept(stream, "api").await, Err((Failure::Closed, None))));
            drop(held);
            assert!(matches!(waiting.await, Err((Failure::Protocol, None))));
        });
    }

    #[test]
    fn files_are_looked_at_before_anybody_connects() {
        let directory = tempfile::tempdir().unwrap();
        let ((cert, key), (_, other)) = (made(100), made(100));
        let read = |config: &Config| Identity::read(config).map(|identity| identity.is_some());
        let sound = config(directory.path(), &cert, &key);
        assert!(read(&sound).unwrap() && !read(&Config::default()).unwrap());
        assert_eq!(Identity::read(&sound).unwrap(), Identity::read(&sound).unwrap());
        let without = |change: fn(&mut Config)| {
            let mut config = sound.clone();
            change(&mut config);
            read(&config).unwrap_err()
        };
        assert!(matches!(without(|config| config.key_file.clear()), Error::Half(Which::Key)));
        assert!(matches!(without(|config| config.cert_file.clear()), Error::Half(Which::Certificate)));
        let missing = without(|config| config.cert_file = "/nowhere".to_owned());
        assert_eq!((missing.exit_code(), missing.which().key()), (66, "tls.cert_file"));
        let alone = Config { client_ca_file: "/nowhere".to_owned(), ..Config::default() };
        assert!(matches!(read(&alone).unwrap_err(), Error::Alone));
        assert!(matches!(
            without(|config| config.client_ca_file = config.key_file.clone()),
            Error::Pem(Which::ClientCa)
        ));
        let mismatch = config(directory.path(), &cert, &other);
        assert!(matches!(read(&mismatch).unwrap_err(), Error::Mismatch), "{:?}", read(&mismatch));
        let no_key = config(directory.path(), &cert, "text");
        assert!(matches!(read(&no_key).unwrap_err(), Error::Pem(Which::Key)));
        let no_cert = config(directory.path(), "text", &key);
        assert!(matches!(read(&no_cert).unwrap_err(), Error::Pem(Which::Certificate)));
        let public = config(directory.path(), &cert, &key);
        fs::set_permissions(&public.key_file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(read(&public).unwrap_err(), Error::Secret(Which::Key, secret::Error::Public(0o644))));
    }
}
