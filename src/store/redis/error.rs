//! Why the store did not do what was asked, and what a Redis means by its answer.

use std::fmt;
use std::io;
use std::sync::Arc;

use redis::{ErrorKind, RedisError};

/// A file of `[store.redis]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsFile {
    /// `ca_file`.
    Ca,
    /// `cert_file`.
    Certificate,
    /// `key_file`.
    Key,
}

impl TlsFile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ca, Self::Certificate, Self::Key];

    /// The key that names it.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Ca => "store.redis.ca_file",
            Self::Certificate => "store.redis.cert_file",
            Self::Key => "store.redis.key_file",
        }
    }
}

/// Why the store did not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Error {
    /// `store.redis.url` is none.
    Url,
    /// `store.redis.url` wants TLS that trusts anybody.
    Insecure,
    /// A brace in `store.redis.prefix`.
    Prefix,
    /// A unix socket where servers are told by host and port.
    Socket,
    /// A cluster has database 0 alone.
    ClusterDatabase,
    /// Nobody to ask for the master.
    NoSentinels,
    /// An entry of `store.redis.nodes` is no address.
    Node(usize),
    /// An entry of `store.redis.nodes` has what belongs into the URL.
    NodeCredentials(usize),
    /// Nodes of a single server.
    NodesUnused,
    /// A file for TLS, and no TLS.
    FileUnused(TlsFile),
    /// A certificate without its key, or a key without its certificate; the file that is missing.
    HalfCertificate(TlsFile),
    /// A file can't be read.
    File(TlsFile, io::ErrorKind),
    /// A file is said to be a credential, and there is none.
    Credential(TlsFile),
    /// A password in the URL, and one in a file.
    TwoPasswords,
    /// A file is not what it should be.
    Pem(TlsFile),
    /// Nobody answers there.
    Connect,
    /// Who answers there is not who is trusted, or does not trust us.
    Tls,
    /// No sentinel answers.
    Sentinels,
    /// No sentinel knows a master of that name.
    MasterUnknown,
    /// The server refused user or password, or forbids a command.
    Denied,
    /// The connection ended.
    Dropped,
    /// No answer within `limits.redis_reply`.
    Timeout,
    /// The server is out of memory and may evict nothing.
    OutOfMemory,
    /// The server takes no writes now: a replica, one that cannot save, or one without the replicas it wants.
    ReadOnly,
    /// The server is loading its data, or waits for its master.
    Loading,
    /// The server is held up by a script.
    Busy,
    /// The server is a node of a cluster, and used as the only one.
    IsCluster,
    /// The server is no node of a cluster, and used as one.
    NoCluster,
    /// The cluster has no master for the partition.
    ClusterDown,
    /// The partition is on its way from one node to another.
    Moving,
    /// The server answered with another error.
    Refused,
    /// Others changed what a transaction reads, again and again.
    Contended,
    /// An answer, or a key in the store, that is not of our making.
    Foreign,
}

impl Error {
    /// All that may come while an agent runs; the others are told at its start.
    pub(in crate::store) const RUNNING: [Self; 18] = [
        Self::Connect,
        Self::Tls,
        Self::Sentinels,
        Self::MasterUnknown,
        Self::Denied,
        Self::Dropped,
        Self::Timeout,
        Self::OutOfMemory,
        Self::ReadOnly,
        Self::Loading,
        Self::Busy,
        Self::IsCluster,
        Self::NoCluster,
        Self::ClusterDown,
        Self::Moving,
        Self::Refused,
        Self::Contended,
        Self::Foreign,
    ];

    /// The `reason` in `tallyd_store_errors_total`; of what is told at the start, one for all.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Url | Self::Insecure | Self::Prefix | Self::Socket | Self::ClusterDatabase => "configuration",
            Self::NoSentinels | Self::Node(_) | Self::NodeCredentials(_) | Self::NodesUnused => "configuration",
            Self::FileUnused(_) | Self::HalfCertificate(_) | Self::File(..) | Self::Pem(_) => "configuration",
            Self::Credential(_) | Self::TwoPasswords => "configuration",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Sentinels => "sentinels",
            Self::MasterUnknown => "master_unknown",
            Self::Denied => "denied",
            Self::Dropped => "dropped",
            Self::Timeout => "timeout",
            Self::OutOfMemory => "out_of_memory",
            Self::ReadOnly => "read_only",
            Self::Loading => "loading",
            Self::Busy => "busy",
            Self::IsCluster => "is_cluster",
            Self::NoCluster => "no_cluster",
            Self::ClusterDown => "cluster_down",
            Self::Moving => "moving",
            Self::Refused => "refused",
            Self::Contended => "contended",
            Self::Foreign => "foreign",
        }
    }

    /// The key that is wrong, of what is told at the start.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Prefix => "store.redis.prefix",
            Self::NoSentinels | Self::Node(_) | Self::NodeCredentials(_) | Self::NodesUnused => "store.redis.nodes",
            Self::FileUnused(file) | Self::HalfCertificate(file) | Self::File(file, _) | Self::Pem(file) => file.key(),
            Self::Credential(file) => file.key(),
            Self::TwoPasswords => "store.redis.password_file",
            Self::Url | Self::Insecure | Self::Socket | Self::ClusterDatabase => "store.redis.url",
            Self::Connect | Self::Tls | Self::Sentinels | Self::MasterUnknown | Self::Denied => "store.redis.url",
            Self::Dropped | Self::Timeout | Self::OutOfMemory | Self::ReadOnly | Self::Loading => "store.redis.url",
            Self::IsCluster | Self::NoCluster => "store.redis.mode",
            Self::Busy | Self::ClusterDown | Self::Moving | Self::Refused => "store.redis.url",
            Self::Contended | Self::Foreign => "store.redis.url",
        }
    }

    /// The exit code for it, as sysexits(3) numbers it.
    pub fn exit_code(self) -> u8 {
        let Self::File(_, kind) = self else { return 78 };
        if kind == io::ErrorKind::NotFound {
            66
        } else if kind == io::ErrorKind::PermissionDenied {
            77
        } else {
            74
        }
    }

    /// Whether the connection is of no more use: it ended, or an answer that comes late would be taken for another's.
    /// It says something about the whole server, as does [`Error::concerns_node`].
    pub(in crate::store) const fn ends_connection(self) -> bool {
        match self {
            Self::Url | Self::Insecure | Self::Prefix | Self::Socket | Self::ClusterDatabase => true,
            Self::NoSentinels | Self::Node(_) | Self::NodeCredentials(_) | Self::NodesUnused => true,
            Self::FileUnused(_) | Self::HalfCertificate(_) | Self::File(..) | Self::Pem(_) => true,
            Self::Credential(_) | Self::TwoPasswords => true,
            Self::Connect | Self::Tls | Self::Sentinels | Self::MasterUnknown | Self::Denied => true,
            Self::Dropped | Self::Timeout | Self::ReadOnly | Self::Loading | Self::IsCluster | Self::NoCluster => true,
            Self::OutOfMemory | Self::Busy | Self::ClusterDown | Self::Moving => false,
            Self::Refused | Self::Contended | Self::Foreign => false,
        }
    }

    /// Whether the other partitions of the node would fare no better.
    pub(in crate::store) const fn concerns_node(self) -> bool {
        matches!(self, Self::OutOfMemory | Self::Busy | Self::ClusterDown) || self.ends_connection()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Node(at) => return write!(f, "entry {at} is no address; write host:port or a URL"),
            Self::NodeCredentials(at) => {
                return write!(
                    f,
                    "entry {at} has a user, a password or a database; in a cluster these belong into store.redis.url"
                );
            }
            Self::FileUnused(_) => {
                "does nothing unless store.redis.url begins with rediss://; write that, or leave it out"
            }
            Self::HalfCertificate(_) => "missing; store.redis.cert_file and key_file go together",
            Self::File(_, kind) => return write!(f, "the file can't be read ({kind}); name a readable file"),
            Self::Credential(_) => {
                "no such credential: systemd sets CREDENTIALS_DIRECTORY for a unit with LoadCredential=, and its name has no /; name a file by its path, or add that to the unit"
            }
            Self::TwoPasswords => "store.redis.url has a password too; leave one of them out",
            Self::Pem(TlsFile::Ca | TlsFile::Certificate) => "no certificate in PEM; name a file that has one",
            Self::Pem(TlsFile::Key) => "no private key in PEM; name a file that has one without a password",
            Self::Url => "store.redis.url is no address of a Redis; write one such as \"redis://127.0.0.1:6379\"",
            Self::Insecure => {
                "store.redis.url trusts any server (#insecure); name its CA in store.redis.ca_file instead"
            }
            Self::Prefix => "store.redis.prefix has a brace, which would be the hash tag; leave it out",
            Self::Socket => {
                "store.redis.url is a unix socket, which only store.redis.mode = \"single\" can use; write redis://host:port"
            }
            Self::ClusterDatabase => {
                "store.redis.url has a database number, but a cluster has database 0 alone; leave it out"
            }
            Self::NoSentinels => "store.redis.nodes is empty; name the sentinels, as [\"10.0.0.1:26379\"]",
            Self::NodesUnused => {
                "store.redis.nodes does nothing with store.redis.mode = \"single\"; set \"cluster\" or \"sentinel\", or leave it out"
            }
            Self::Connect => "no Redis answers at store.redis.url; start it, or correct the address",
            Self::Tls => {
                "TLS with Redis failed; compare its certificate with store.redis.ca_file, and store.redis.cert_file with what it asks for"
            }
            Self::Sentinels => "no sentinel answers at store.redis.nodes; start one, or correct the addresses",
            Self::MasterUnknown => "the sentinels know no master that is up by the name store.redis.master",
            Self::Denied => "Redis refuses the user, the password or a command; correct store.redis.url or its ACL",
            Self::Dropped => "the connection to Redis ended",
            Self::Timeout => "Redis did not answer within limits.redis_reply",
            Self::OutOfMemory => "Redis is at its maxmemory; raise it",
            Self::ReadOnly => {
                "Redis takes no writes: it is a replica, cannot save its data, or lacks the replicas it is set to have"
            }
            Self::Loading => "Redis is loading its data, or waits for its master",
            Self::Busy => "Redis is held up by a script",
            Self::IsCluster => "this Redis is a node of a cluster; set store.redis.mode = \"cluster\"",
            Self::NoCluster => "store.redis.mode is \"cluster\", but this Redis is none; set \"single\"",
            Self::ClusterDown => "the cluster has no master for a part of the keys",
            Self::Moving => "the cluster is moving a part of the keys",
            Self::Refused => "Redis answered with an error",
            Self::Contended => "Redis is changed by others faster than a transaction can follow",
            Self::Foreign => "Redis holds something at our keys that tallyd did not write",
        };
        f.write_str(text)
    }
}

impl std::error::Error for Error {}

impl From<&RedisError> for Error {
    fn from(error: &RedisError) -> Self {
        match error.code() {
            Some("OOM") => return Self::OutOfMemory,
            Some("READONLY" | "MISCONF" | "NOREPLICAS") => return Self::ReadOnly,
            Some("LOADING" | "MASTERDOWN") => return Self::Loading,
            Some("BUSY") => return Self::Busy,
            Some("CLUSTERDOWN") => return Self::ClusterDown,
            Some("TRYAGAIN" | "MOVED" | "ASK") => return Self::Moving,
            Some("NOAUTH" | "WRONGPASS" | "NOPERM") => return Self::Denied,
            // What a script may not do has no code of its own.
            Some(_) if error.detail().is_some_and(|detail| detail.contains("user executing the script can't")) => {
                return Self::Denied;
            }
            Some(_) if error.detail().is_some_and(|detail| detail.contains("cluster support disabled")) => {
                return Self::NoCluster;
            }
            Some(_) | None => {}
        }
        if is_tls(error) {
            Self::Tls
        } else if error.is_timeout() {
            Self::Timeout
        } else if error.is_connection_refusal() {
            Self::Connect
        } else if error.kind() == ErrorKind::AuthenticationFailed {
            Self::Denied
        } else if error.is_io_error() || error.is_connection_dropped() {
            Self::Dropped
        } else {
            Self::Refused
        }
    }
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Self {
        Self::from(&error)
    }
}

/// Whether TLS is why: a certificate that is not trusted, here or there, or a key that is not the certificate's.
fn is_tls(error: &RedisError) -> bool {
    let Some(source) = std::error::Error::source(error) else { return false };
    let shared = source.downcast_ref::<Arc<dyn std::error::Error + Send + Sync>>();
    let io = shared.and_then(|error| error.downcast_ref::<io::Error>());
    let inner = io.and_then(io::Error::get_ref);
    inner.is_some_and(|inner| inner.is::<rustls::Error>())
}
