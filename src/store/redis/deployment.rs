//! `[store.redis]`, and what comes of it: which servers to ask first, with which credentials and certificates.
//!
//! Everything that can be found out without asking a server is told here, by `tallyd check` as well as at the start.

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use redis::{
    Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, TlsCertificates,
};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{Error, TlsFile};
use crate::secret::{self, Secret};
use crate::units::without_password;

/// Where sentinels listen unless they are told otherwise.
const SENTINEL_PORT: u16 = 26_379;

/// Where a Redis listens unless it is told otherwise.
const PORT: u16 = 6_379;

/// `[store.redis]`
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis[s]://[user][:password@]host[:port][/database]` or `unix:///path[?db=0&user=&pass=]`. Under Sentinel the
    /// host and the port are the sentinels' business.
    pub url: String,
    /// What every key begins with.
    pub prefix: String,
    /// How many servers there are, and who tells which of them to use.
    pub mode: Mode,
    /// The sentinels, or further nodes of the cluster: `host:port`, or URLs.
    pub nodes: Vec<String>,
    /// What the sentinels call the master.
    pub master: String,
    /// A file, or a credential, whose first line is the password of the URL's user; none if empty.
    pub password_file: String,
    /// PEM: who signs the servers' certificates, instead of the roots that are built in.
    pub ca_file: String,
    /// PEM: our certificate.
    pub cert_file: String,
    /// PEM: its key.
    pub key_file: String,
    /// How many replicas must have a batch before it leaves the outbox.
    pub replicas: Replicas,
    /// What stands in the password's file; whoever reads files puts it here.
    #[serde(skip)]
    pub password: Option<Secret>,
    /// What the files for TLS held when they were checked, as [`Config::look`] tells it, in the order of [`TlsFile::ALL`].
    #[serde(skip)]
    pub contents: [Option<u64>; 3],
}

/// How many servers there are, and who tells which of them to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One server, or one address behind which somebody else takes care.
    #[default]
    Single,
    /// A master with replicas; the sentinels say which it is.
    Sentinel,
    /// A Redis Cluster, whose nodes say who has which partition.
    Cluster,
}

/// How many replicas must have a batch before it leaves the outbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Replicas {
    /// One where the node has any, else none.
    #[default]
    Auto,
    /// So many of each node.
    Count(u32),
}

impl Replicas {
    /// How many of a node that has so many.
    pub(super) fn of(self, connected: u32) -> u32 {
        match self {
            Self::Auto => connected.min(1),
            Self::Count(count) => count,
        }
    }
}

impl Serialize for Replicas {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Count(count) => serializer.serialize_u32(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Replicas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u32),
            Text(String),
        }
        let wrong = "no number of replicas; write \"auto\", or 0, 1, 2 ...";
        match Written::deserialize(deserializer).map_err(|_| D::Error::custom(wrong))? {
            Written::Number(count) => Ok(Self::Count(count)),
            Written::Text(text) if text == "auto" => Ok(Self::Auto),
            Written::Text(text) => text.parse().map(Self::Count).map_err(|_| D::Error::custom(wrong)),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, prefix, mode, nodes, master, password_file, ca_file, cert_file, key_file, .. } = self;
        let Self { replicas, password, .. } = self;
        let nodes: Vec<_> = nodes.iter().map(|node| without_password(node)).collect();
        let mut shown = f.debug_struct("Config");
        shown.field("url", &without_password(url)).field("prefix", prefix).field("mode", mode).field("nodes", &nodes);
        shown.field("master", master).field("password_file", password_file).field("password", password);
        shown.field("ca_file", ca_file).field("cert_file", cert_file);
        shown.field("key_file", key_file).field("replicas", replicas).finish()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".to_owned(),
            prefix: "tallyd".to_owned(),
            mode: Mode::default(),
            nodes: Vec::new(),
            master: "mymaster".to_owned(),
            password_file: String::new(),
            ca_file: String::new(),
            cert_file: String::new(),
            key_file: String::new(),
            replicas: Replicas::default(),
            password: None,
            contents: [None; 3],
        }
    }
}

impl Config {
    /// Whether it can be used, as far as that shows without asking a server.
    ///
    /// # Errors
    /// What is wrong, with its key and the remedy.
    pub fn check(&self) -> Result<(), Error> {
        Deployment::new(self).map(|_| ())
    }

    /// Numbers that differ, all but surely, where the files for TLS do.
    pub fn look(&self) -> [Option<u64>; 3] {
        TlsFile::ALL.map(|file| {
            let path = secret::locate(self.file(file)).ok().filter(|path| !path.as_os_str().is_empty())?;
            let mut hasher = DefaultHasher::new();
            secret::public(&path).ok()?.hash(&mut hasher);
            Some(hasher.finish())
        })
    }

    /// The name of a file.
    fn file(&self, file: TlsFile) -> &str {
        match file {
            TlsFile::Ca => &self.ca_file,
            TlsFile::Certificate => &self.cert_file,
            TlsFile::Key => &self.key_file,
        }
    }
}

/// Who can be asked, and how.
pub(super) struct Deployment {
    pub(super) mode: Mode,
    /// What the sentinels call the master.
    pub(super) master: String,
    /// The server; or nodes of the cluster; or the sentinels.
    pub(super) start: Vec<ConnectionInfo>,
    /// How to speak to any of the servers; its address is that of the URL.
    server: ConnectionInfo,
    certificates: Option<TlsCertificates>,
}

impl fmt::Debug for Deployment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start: Vec<_> = self.start.iter().map(|info| info.addr().to_string()).collect();
        f.debug_struct("Deployment").field("mode", &self.mode).field("start", &start).finish_non_exhaustive()
    }
}

impl Deployment {
    pub(super) fn new(config: &Config) -> Result<Self, Error> {
        if config.prefix.contains(['{', '}']) {
            return Err(Error::Prefix);
        }
        let server = with_password(config.url.as_str().into_connection_info().map_err(|_| Error::Url)?, config)?;
        match (config.mode, server.addr()) {
            (_, ConnectionAddr::TcpTls { insecure: true, .. }) => return Err(Error::Insecure),
            (Mode::Sentinel | Mode::Cluster, ConnectionAddr::Unix(_)) => return Err(Error::Socket),
            (Mode::Cluster, _) if server.redis_settings().db() != 0 => return Err(Error::ClusterDatabase),
            _ => {}
        }
        let certificates = certificates(config, &server)?;
        let start = start(config, &server)?;
        let deployment = Self { mode: config.mode, master: config.master.clone(), start, server, certificates };
        // What is no key or certificate shows when they are read.
        deployment.client(deployment.server.clone()).map_err(|_| Error::Pem(TlsFile::Key))?;
        Ok(deployment)
    }

    /// How to reach one of the servers.
    pub(super) fn server(&self, host: &str, port: u16) -> ConnectionInfo {
        self.server.clone().set_addr(address(&self.server, host, port))
    }

    /// A client, with our certificates where there is TLS.
    pub(super) fn client(&self, info: ConnectionInfo) -> redis::RedisResult<Client> {
        match &self.certificates {
            Some(certificates) if is_tls(&info) => Client::build_with_tls(info, certificates.clone()),
            Some(_) | None => Client::open(info),
        }
    }
}

/// With the password of the file, if there is one.
fn with_password(server: ConnectionInfo, config: &Config) -> Result<ConnectionInfo, Error> {
    let Some(password) = &config.password else { return Ok(server) };
    let settings = server.redis_settings().clone();
    if settings.password().is_some() {
        return Err(Error::TwoPasswords);
    }
    Ok(server.set_redis_settings(settings.set_password(password.reveal())))
}

fn is_tls(info: &ConnectionInfo) -> bool {
    matches!(info.addr(), ConnectionAddr::TcpTls { .. })
}

/// With TLS where `like` has it.
fn address(like: &ConnectionInfo, host: &str, port: u16) -> ConnectionAddr {
    let host = host.to_owned();
    if is_tls(like) {
        ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
    } else {
        ConnectionAddr::Tcp(host, port)
    }
}

/// Whom to ask first.
fn start(config: &Config, server: &ConnectionInfo) -> Result<Vec<ConnectionInfo>, Error> {
    let nodes = config.nodes.iter().enumerate();
    match config.mode {
        Mode::Single if config.nodes.is_empty() => Ok(vec![server.clone()]),
        Mode::Single => Err(Error::NodesUnused),
        Mode::Sentinel if config.nodes.is_empty() => Err(Error::NoSentinels),
        Mode::Sentinel => nodes.map(|(at, node)| sentinel(server, at, node)).collect(),
        Mode::Cluster => {
            let further = nodes.map(|(at, node)| cluster_node(server, at, node));
            std::iter::once(Ok(server.clone())).chain(further).collect()
        }
    }
}

/// A sentinel has a user and a password of its own, which only a URL can tell.
fn sentinel(server: &ConnectionInfo, at: usize, node: &str) -> Result<ConnectionInfo, Error> {
    if !node.contains("://") {
        let (host, port) = host_and_port(node, SENTINEL_PORT).ok_or(Error::Node(at))?;
        let bare = server.clone().set_redis_settings(RedisConnectionInfo::default());
        return Ok(bare.set_addr(address(server, host, port)));
    }
    let info = node.into_connection_info().map_err(|_| Error::Node(at))?;
    if matches!(info.addr(), ConnectionAddr::Unix(_)) || info.redis_settings().db() != 0 {
        return Err(Error::Node(at));
    }
    Ok(info)
}

fn cluster_node(server: &ConnectionInfo, at: usize, node: &str) -> Result<ConnectionInfo, Error> {
    if !node.contains("://") {
        let (host, port) = host_and_port(node, PORT).ok_or(Error::Node(at))?;
        return Ok(server.clone().set_addr(address(server, host, port)));
    }
    let info = node.into_connection_info().map_err(|_| Error::Node(at))?;
    let own = info.redis_settings();
    if own.username().is_some() || own.password().is_some() || own.db() != 0 {
        return Err(Error::NodeCredentials(at));
    }
    if matches!(info.addr(), ConnectionAddr::Unix(_)) || is_tls(&info) != is_tls(server) {
        return Err(Error::Node(at));
    }
    Ok(server.clone().set_addr(info.addr().clone()))
}

/// `host`, `host:port`, `[::1]:port`.
pub(super) fn host_and_port(text: &str, default: u16) -> Option<(&str, u16)> {
    let (host, port) = match text.rsplit_once(':') {
        // Colons without brackets: an IPv6 address alone.
        Some((host, _)) if host.contains(':') && !host.ends_with(']') => (text, default),
        Some((host, port)) => (host, port.parse().ok()?),
        None => (text, default),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let sound = !host.is_empty() && !host.contains(['/', '@', ' ', '?', '#']);
    sound.then_some((host, port))
}

/// Reads the files, where there are any.
fn certificates(config: &Config, server: &ConnectionInfo) -> Result<Option<TlsCertificates>, Error> {
    let read = |file: TlsFile, path: &str, kinds: &[&str]| {
        if path.is_empty() {
            return Ok(None);
        }
        if !is_tls(server) {
            return Err(Error::FileUnused(file));
        }
        let path = secret::locate(path).map_err(|_| Error::Credential(file))?;
        let bytes = secret::public(&path).map_err(|error| Error::File(file, error.kind()))?;
        let text = String::from_utf8_lossy(&bytes);
        let is_pem = text.lines().any(|line| {
            line.strip_prefix("-----BEGIN ").is_some_and(|kind| kinds.iter().any(|end| kind.trim_end().ends_with(end)))
        });
        if is_pem { Ok(Some(bytes)) } else { Err(Error::Pem(file)) }
    };
    let root_cert = read(TlsFile::Ca, &config.ca_file, &["CERTIFICATE-----"])?;
    let client_cert = read(TlsFile::Certificate, &config.cert_file, &["CERTIFICATE-----"])?;
    let client_key = read(TlsFile::Key, &config.key_file, &["PRIVATE KEY-----"])?;
    let client_tls = match (client_cert, client_key) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
        (Some(_), None) => return Err(Error::HalfCertificate(TlsFile::Key)),
        (None, Some(_)) => return Err(Error::HalfCertificate(TlsFile::Certificate)),
        (None, None) => None,
    };
    let any = root_cert.is_some() || client_tls.is_some();
    Ok(any.then_some(TlsCertificates { client_tls, root_cert }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        change(&mut config);
        config
    }

    #[test]
    fn what_can_be_found_out_beforehand_is() {
        let check = |change: fn(&mut Config)| config(change).check();
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(check(|config| config.url = "http://x".to_owned()), Err(Error::Url));
        assert_eq!(check(|config| config.url = "rediss://x#insecure".to_owned()), Err(Error::Insecure));
        assert_eq!(check(|config| config.prefix = "a{b".to_owned()), Err(Error::Prefix));
        assert_eq!(
            check(|config| config.ca_file = "credential:a/b".to_owned()),
            Err(Error::FileUnused(TlsFile::Ca)),
            "a file is looked for where it is used"
        );
        assert_eq!(check(|config| config.nodes = vec!["x:1".to_owned()]), Err(Error::NodesUnused));
        assert_eq!(check(|config| config.mode = Mode::Sentinel), Err(Error::NoSentinels));
        assert_eq!(check(|config| config.ca_file = "/x".to_owned()), Err(Error::FileUnused(TlsFile::Ca)));
        let cluster = |url: &str, node: &str| {
            let change = |config: &mut Config| {
                config.mode = Mode::Cluster;
                config.url = url.to_owned();
                config.nodes = vec![node.to_owned()];
            };
            config(change).check()
        };
        assert_eq!(cluster("redis://u:p@x", "y:7000"), Ok(()));
        assert_eq!(cluster("redis://x/1", "y"), Err(Error::ClusterDatabase));
        assert_eq!(cluster("unix:///x", "y"), Err(Error::Socket));
        assert_eq!(cluster("redis://x", "y:port"), Err(Error::Node(0)));
        assert_eq!(cluster("redis://x", "redis://:p@y"), Err(Error::NodeCredentials(0)));
        assert_eq!(cluster("redis://x", "rediss://y"), Err(Error::Node(0)));
    }

    #[test]
    fn files_are_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        fs::write(path("text"), "text").unwrap();
        fs::write(path("cert"), "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n").unwrap();
        let check = |ca: &str, cert: &str| {
            let change = |config: &mut Config| {
                config.url = "rediss://x".to_owned();
                config.ca_file = if ca.is_empty() { String::new() } else { path(ca) };
                config.cert_file = if cert.is_empty() { String::new() } else { path(cert) };
            };
            config(change).check()
        };
        assert_eq!(check("none", ""), Err(Error::File(TlsFile::Ca, std::io::ErrorKind::NotFound)));
        assert_eq!(Error::File(TlsFile::Ca, std::io::ErrorKind::NotFound).exit_code(), 66);
        assert_eq!(check("text", ""), Err(Error::Pem(TlsFile::Ca)));
        assert_eq!(check("", "cert"), Err(Error::HalfCertificate(TlsFile::Key)));
        assert!(matches!(check("cert", ""), Err(Error::Pem(_))));
    }

    #[test]
    fn no_password_is_shown() {
        let shown = format!(
            "{:?}",
            config(|config| {
                config.url = "unix:///s?user=u&pass=secret".to_owned();
                config.nodes = vec!["redis://u:secret@h".to_owned()];
            })
        );
        assert!(!shown.contains("secret") && shown.contains("***"), "{shown}");
    }

    #[test]
    fn an_address_is_read_in_each_of_its_spellings() {
        assert_eq!(host_and_port("h", 1), Some(("h", 1)));
        assert_eq!(host_and_port("h:2", 1), Some(("h", 2)));
        assert_eq!(host_and_port("[::1]:2", 1), Some(("::1", 2)));
        assert_eq!(host_and_port("::1", 1), Some(("::1", 1)));
        assert_eq!(host_and_port("", 1), None);
        assert_eq!(host_and_port("h:x", 1), None);
    }
}
