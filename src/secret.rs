//! Secrets out of files: where a name leads, who else may read what is there, and what it holds.
//!
//! A key that names such a file takes a path, or `credential:NAME` for what systemd passes to the service (LoadCredential=
//! and its kin), which lies in `$CREDENTIALS_DIRECTORY`. A file that every user may read is refused, since it keeps no
//! secret, and so is one of a user who is neither root nor the own one, since that user could put another secret there.
//! Pipes and devices are none: reading one may take for ever. What is read is shown to nobody: [`Secret`] prints as stars.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// What the name of a credential begins with.
const CREDENTIAL: &str = "credential:";

/// Where systemd puts a service's credentials.
const DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// No file of secrets is longer.
const BYTES_MAX: u64 = 64 << 10;

/// No file of certificates is longer; those of all the usual authorities have a fifth of that.
const PUBLIC_BYTES_MAX: u64 = 1 << 20;

/// A text that nothing prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for whoever is to be shown it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Why a file of secrets can't be used.
#[derive(Debug)]
pub enum Error {
    /// A credential, and nobody passed any.
    NoCredentials,
    /// No name of a credential.
    CredentialName,
    /// systemd passed others, but not this one.
    NoCredential,
    /// The file can't be read.
    Read(io::Error),
    /// Longer than any file of secrets.
    TooLong,
    /// Every user may read, write or execute it; its permissions.
    Public(u32),
    /// It is another user's, by number.
    Owner(u32),
    /// A pipe, a device or a directory.
    NoFile,
    /// Nothing stands on its first line.
    Empty,
}

impl Error {
    /// The exit code for it, as sysexits(3) numbers it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Read(error) if error.kind() == ErrorKind::NotFound => 66,
            Self::Read(error) if error.kind() == ErrorKind::PermissionDenied => 77,
            Self::Read(error) if error.kind() == ErrorKind::InvalidData => 78,
            Self::Read(_) | Self::NoFile => 74,
            Self::NoCredential => 66,
            Self::Owner(_) => 78,
            Self::NoCredentials | Self::CredentialName | Self::TooLong | Self::Public(_) | Self::Empty => 78,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCredentials => write!(
                f,
                "no credentials were passed: {DIRECTORY} is not set; add LoadCredential= to the unit, or name a file by its path"
            ),
            Self::CredentialName => f.write_str("no name of a credential; write one without / behind credential:"),
            Self::NoCredential => {
                f.write_str("no such credential was passed; add LoadCredential=NAME:/its/path to the unit")
            }
            Self::Read(error) => write!(f, "{error}; {}", unreadable(error.kind())),
            Self::TooLong => write!(f, "longer than {BYTES_MAX} bytes; name a file that holds secrets alone"),
            Self::Public(mode) => {
                write!(f, "its permissions, {mode:04o}, let every user at it; take them away with chmod o-rwx")
            }
            Self::Owner(uid) => {
                write!(
                    f,
                    "it is of user {uid}, who could put another secret there; give it to root or to this user by chown"
                )
            }
            Self::NoFile => f.write_str(NO_FILE),
            Self::Empty => f.write_str("nothing stands on its first line; write the secret there"),
        }
    }
}

impl std::error::Error for Error {}

const NO_FILE: &str = "a directory, a pipe or a device, no file; name one";

/// The remedy for a file that cannot be read.
fn unreadable(kind: ErrorKind) -> &'static str {
    if kind == ErrorKind::NotFound {
        "name an existing file"
    } else if kind == ErrorKind::PermissionDenied {
        "make it readable for this user, or name another"
    } else if kind == ErrorKind::InvalidData {
        "write it in UTF-8, or name another"
    } else {
        "name a readable file"
    }
}

/// The file that a name leads to.
///
/// # Errors
/// When it is a credential's, and there are none.
pub fn locate(name: &str) -> Result<PathBuf, Error> {
    locate_in(name, std::env::var_os(DIRECTORY).filter(|directory| !directory.is_empty()).map(PathBuf::from))
}

fn locate_in(name: &str, directory: Option<PathBuf>) -> Result<PathBuf, Error> {
    let Some(credential) = name.strip_prefix(CREDENTIAL) else { return Ok(name.into()) };
    if credential.is_empty() || credential.contains('/') || [".", ".."].contains(&credential) {
        return Err(Error::CredentialName);
    }
    Ok(directory.ok_or(Error::NoCredentials)?.join(credential))
}

/// Whether a name is a credential's that is kept from this process: it was passed none, or may not read it, as what systemd
/// runs by ExecReload= may not.
pub fn is_kept_from_us(name: &str) -> bool {
    match locate(name) {
        Err(Error::NoCredentials) => true,
        Ok(path) if name.starts_with(CREDENTIAL) => {
            open(&path).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
        }
        Ok(_) | Err(_) => false,
    }
}

/// What a file of secrets holds.
///
/// # Errors
/// When it can't be read, or everybody can read it.
pub fn read(name: &str) -> Result<Secret, Error> {
    let path = locate(name)?;
    match read_path(&path) {
        Err(Error::Read(error)) if name.starts_with(CREDENTIAL) && error.kind() == ErrorKind::NotFound => {
            Err(Error::NoCredential)
        }
        read => read,
    }
}

/// Opens what is at a path, without waiting for whoever would write into a pipe.
fn open(path: &Path) -> io::Result<(File, Metadata)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

/// What a file of certificates holds, which is no secret.
///
/// # Errors
/// When it can't be read, is none, or is too long.
pub fn public(path: &Path) -> io::Result<Vec<u8>> {
    let (file, metadata) = open(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a directory, a pipe or a device, no file"));
    }
    let mut bytes = Vec::new();
    file.take(PUBLIC_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > PUBLIC_BYTES_MAX {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("longer than {PUBLIC_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

fn read_path(path: &Path) -> Result<Secret, Error> {
    let (file, metadata) = open(path).map_err(Error::Read)?;
    if !metadata.is_file() {
        return Err(Error::NoFile);
    }
    let mode = metadata.mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(Error::Public(mode));
    }
    if ![0, Uid::effective().as_raw()].contains(&metadata.uid()) {
        return Err(Error::Owner(metadata.uid()));
    }
    let mut text = String::new();
    file.take(BYTES_MAX + 1).read_to_string(&mut text).map_err(Error::Read)?;
    if text.len() as u64 > BYTES_MAX { Err(Error::TooLong) } else { Ok(Secret(text)) }
}

/// The first line of such a file: a password.
///
/// # Errors
/// As for [`read`], and when nothing stands there.
pub fn password(name: &str) -> Result<Secret, Error> {
    let text = read(name)?;
    match text.0.lines().next() {
        Some(line) if !line.is_empty() => Ok(Secret(line.to_owned())),
        Some(_) | None => Err(Error::Empty),
    }
}

/// The first token of a file of tokens: neither an empty line nor one that begins with `#`.
///
/// # Errors
/// As for [`password`].
pub fn token(name: &str) -> Result<Secret, Error> {
    let text = read(name)?;
    let token = text.0.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    token.map(|token| Secret(token.to_owned())).ok_or(Error::Empty)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, chown};

    use super::*;

    fn file(directory: &Path, name: &str, text: &[u8], mode: u32) -> String {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    }

    #[test]
    fn a_credential_lies_where_systemd_says() {
        let directory = || Some(PathBuf::from("/run/credentials/tallyd.service"));
        assert_eq!(locate_in("/etc/password", None).unwrap(), PathBuf::from("/etc/password"));
        let found = locate_in("credential:redis", directory()).unwrap();
        assert_eq!(found, PathBuf::from("/run/credentials/tallyd.service/redis"));
        assert!(matches!(locate_in("credential:redis", None), Err(Error::NoCredentials)));
        for name in ["credential:", "credential:../x", "credential:/etc/passwd", "credential:.."] {
            assert!(matches!(locate_in(name, directory()), Err(Error::CredentialName)), "{name}");
        }
    }

    #[test]
    fn what_everybody_may_read_is_no_secret() {
        let directory = tempfile::tempdir().unwrap();
        for (mode, public) in [(0o600, false), (0o640, false), (0o644, true), (0o604, true), (0o602, true)] {
            let read = read(&file(directory.path(), "secret", b"word\n", mode));
            assert_eq!(matches!(read, Err(Error::Public(_))), public, "{mode:o}");
        }
        let error = read(&file(directory.path(), "secret", b"word", 0o644)).unwrap_err();
        assert!(error.to_string().contains("0644") && error.to_string().contains("chmod o-rwx"), "{error}");
    }

    #[test]
    fn a_secret_is_a_file_of_root_or_of_this_user() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        // Nobody writes there, and nobody waits for that.
        for path in [pipe.as_path(), directory.path(), Path::new("/dev/zero")] {
            assert!(matches!(read_path(path), Err(Error::NoFile)), "{}", path.display());
            assert_eq!(public(path).unwrap_err().kind(), ErrorKind::InvalidInput, "{}", path.display());
        }
        let long = file(directory.path(), "long", &[b'x'; (1 << 20) + 1], 0o600);
        assert!(public(Path::new(&long)).is_err());
        let others = file(directory.path(), "others", b"word", 0o600);
        assert!(read(&others).is_ok());
        if Uid::effective().is_root() {
            chown(&others, Some(12_345), None).unwrap();
            assert!(matches!(read(&others), Err(Error::Owner(12_345))));
        }
    }

    #[test]
    fn a_password_is_the_first_line_and_prints_as_stars() {
        let directory = tempfile::tempdir().unwrap();
        let read = |text: &[u8]| password(&file(directory.path(), "password", text, 0o600));
        let secret = read(b" pass word \r\nsecond\n").unwrap();
        assert_eq!((secret.reveal(), format!("{secret:?}")), (" pass word ", "***".to_owned()));
        assert!(matches!(read(b""), Err(Error::Empty)));
        assert!(matches!(read(b"\nx"), Err(Error::Empty)));
        let first = |text: &[u8]| token(&file(directory.path(), "tokens", text, 0o600));
        assert_eq!(first(b"# may\n\n one \ntwo\n").unwrap().reveal(), "one");
        assert!(matches!(first(b"# none\n"), Err(Error::Empty)));
        assert_eq!(read(b"\xff").unwrap_err().exit_code(), 78);
        assert!(matches!(read(&[b'x'; 70_000]), Err(Error::TooLong)));
        assert_eq!(password("/nowhere/password").unwrap_err().exit_code(), 66);
    }
}
