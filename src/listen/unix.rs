//! Unix sockets: paths into bound sockets. Nothing is read here; datagrams go the way of `udp`, streams that of `stream`.
//!
//! The file of a socket outlives a process that was killed. One that nobody answers is taken over; one that somebody
//! answers, or a file that is no socket, is an error. The file goes when its [`File`] does, unless another took its place
//! or the socket lives on elsewhere. An inherited socket whose file is gone can be reached by nobody: it is bound anew.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use super::sockets::BACKLOG;
use super::{Config, Error, peers};
use crate::inherited::{Inherited, Use};
use crate::units::Mode;

/// A bound socket and its file.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) socket: Socket,
    pub(super) file: File,
}

/// The file of a socket, removed when this is dropped.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    device: u64,
    inode: u64,
    is_of_unit: bool,
    stays: bool,
}

impl File {
    /// That of a socket which is bound to this path.
    fn of(path: &Path) -> io::Result<Self> {
        let file = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), device: file.dev(), inode: file.ino(), is_of_unit: false, stays: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file stays there, because others have the socket too.
    pub(super) fn stay(&mut self, stays: bool) {
        self.stays = stays;
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let is_ours = |file: fs::Metadata| (file.dev(), file.ino()) == (self.device, self.inode);
        if !self.stays && !self.is_of_unit && fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            // A file that stays is taken over by the next start.
            drop(fs::remove_file(&self.path));
        }
    }
}

/// Binds the paths of `listen.unixgram`.
pub(super) fn datagrams(config: &Config, inherited: &mut Inherited) -> Result<Vec<Bound>, Error> {
    let group = peers::group(config)?;
    let bind = |path: &PathBuf, inherited: &mut Inherited| {
        let (key, r#use) = ("listen.unixgram", Use::Unixgram);
        Place { key, r#use, path, kind: Type::DGRAM, mode: config.unix_mode, group }.bind(inherited)
    };
    bind_each(&config.unixgram, Use::Unixgram, inherited, bind)
}

/// Binds the paths of `listen.unix`, and listens.
pub(super) fn streams(config: &Config, inherited: &mut Inherited) -> Result<Vec<Bound>, Error> {
    let group = peers::group(config)?;
    let listen = |path: &PathBuf, inherited: &mut Inherited| {
        let (key, r#use) = ("listen.unix", Use::Unix);
        let place = Place { key, r#use, path, kind: Type::STREAM, mode: config.unix_mode, group };
        let bound = place.bind(inherited)?;
        let listening = bound.socket.listen(BACKLOG).and_then(|()| bound.socket.set_nonblocking(true));
        listening.map_err(|error| Error::bind(place.key, path.clone(), error))?;
        Ok(bound)
    };
    bind_each(&config.unix, Use::Unix, inherited, listen)
}

/// The sockets that units opened for a use, or those at the configured paths. The file of a unit's socket is the unit's.
fn bind_each(
    paths: &[PathBuf],
    r#use: Use,
    inherited: &mut Inherited,
    bind: impl Fn(&PathBuf, &mut Inherited) -> Result<Bound, Error>,
) -> Result<Vec<Bound>, Error> {
    let of_units = inherited.take_of_units(r#use).map_err(Error::System)?;
    if of_units.is_empty() {
        return paths.iter().map(|path| bind(path, inherited)).collect();
    }
    let of_unit = |socket: Socket| {
        let path = socket.local_addr()?.as_pathname().unwrap_or_else(|| Path::new("")).to_owned();
        let mut file = File::of(&path)?;
        file.is_of_unit = true;
        socket.set_nonblocking(true)?;
        if r#use == Use::Unixgram {
            socket.set_passcred(true)?;
        }
        Ok(Bound { socket, file })
    };
    of_units.into_iter().map(of_unit).collect::<io::Result<_>>().map_err(Error::System)
}

/// A path to bind.
struct Place<'a> {
    key: &'static str,
    r#use: Use,
    path: &'a Path,
    kind: Type,
    mode: Mode,
    group: Option<u32>,
}

impl Place<'_> {
    fn bind(&self, inherited: &mut Inherited) -> Result<Bound, Error> {
        let wrong = |_| Error::Path { key: self.key, value: self.path.display().to_string() };
        if !self.path.is_absolute() {
            return Err(wrong(io::ErrorKind::InvalidInput.into()));
        }
        let address = SockAddr::unix(self.path).map_err(wrong)?;
        self.inherit_or_open(&address, inherited).map_err(|error| Error::bind(self.key, self.path.to_owned(), error))
    }

    fn inherit_or_open(&self, address: &SockAddr, inherited: &mut Inherited) -> io::Result<Bound> {
        let there = |other: &SockAddr| other.as_pathname() == Some(self.path);
        let is_there = fs::symlink_metadata(self.path).is_ok_and(|file| file.file_type().is_socket());
        let kept = if is_there { inherited.take_bound(self.r#use, there)? } else { Vec::new() };
        let kept = kept.into_iter().next();
        // Until the start is over somebody else may have the socket, or have it again.
        let stays = kept.is_some();
        let socket = match kept {
            Some(socket) => socket,
            None => self.open(address, inherited)?,
        };
        let mut file = File::of(self.path)?;
        file.stay(stays);
        if self.group.is_some() {
            // Before the permissions, so that no other group ever has them.
            chown(self.path, None, self.group)?;
        }
        fs::set_permissions(self.path, Permissions::from_mode(self.mode.0))?;
        Ok(Bound { socket, file })
    }

    fn open(&self, address: &SockAddr, inherited: &mut Inherited) -> io::Result<Socket> {
        let socket = Socket::new(Domain::UNIX, self.kind, None)?;
        if self.kind == Type::DGRAM {
            // Before anybody can send: each datagram then says which process sent it.
            socket.set_passcred(true)?;
        }
        make_way(self.path, address, self.kind)?;
        socket.bind(address)?;
        inherited.keep(self.r#use, &socket)?;
        Ok(socket)
    }
}

/// Removes the file of a socket that nobody answers.
fn make_way(path: &Path, address: &SockAddr, kind: Type) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(file) if !file.file_type().is_socket() => Err(io::Error::other("there is a file that is no socket")),
        Ok(_) => match probe(address, kind) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
            // One of the other kind is somebody's as well, and so is one whose owner is slow to accept.
            Err(error) if ![Some(libc::EPROTOTYPE), Some(libc::EAGAIN)].contains(&error.raw_os_error()) => Err(error),
            Ok(()) | Err(_) => Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        },
    }
}

/// Connects, without waiting for room in the other's queue: that can take as long as the other likes.
fn probe(address: &SockAddr, kind: Type) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, kind, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagrams(config: &Config) -> Result<Vec<Bound>, Error> {
        super::datagrams(config, &mut Inherited::default())
    }

    fn streams(config: &Config) -> Result<Vec<Bound>, Error> {
        super::streams(config, &mut Inherited::default())
    }

    fn config(directory: &Path) -> Config {
        let unixgram = vec![directory.join("datagrams")];
        Config { unixgram, unix: vec![directory.join("streams")], ..Config::default() }
    }

    #[test]
    fn a_file_goes_with_its_socket_unless_another_took_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let bound = datagrams(&config).unwrap();
        let mode = fs::metadata(&config.unixgram[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, config.unix_mode.0);
        drop(bound);
        assert!(!config.unixgram[0].exists());
        let bound = streams(&config).unwrap();
        fs::remove_file(&config.unix[0]).unwrap();
        fs::write(&config.unix[0], "another's").unwrap();
        drop(bound);
        assert!(config.unix[0].exists());
    }

    #[test]
    fn a_socket_without_owner_is_taken_over_and_one_with_an_owner_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let first = (datagrams(&config).unwrap(), streams(&config).unwrap());
        let in_use = |error: Error| matches!(error, Error::InUse { .. }) && error.exit_code() == 69;
        assert!(in_use(datagrams(&config).unwrap_err()));
        assert!(in_use(streams(&config).unwrap_err()));
        let swapped = Config { unixgram: config.unix.clone(), unix: config.unixgram.clone(), ..config.clone() };
        assert!(in_use(datagrams(&swapped).unwrap_err()));
        // As after `kill -9`: the sockets are gone and their files are not.
        let (datagram_sockets, stream_sockets) = first;
        for bound in datagram_sockets.into_iter().chain(stream_sockets) {
            std::mem::forget(bound.file);
        }
        assert!(config.unixgram[0].exists() && config.unix[0].exists());
        assert!(datagrams(&config).is_ok() && streams(&config).is_ok());
    }

    #[test]
    fn an_owner_that_accepts_nobody_holds_up_no_start() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let address = SockAddr::unix(&config.unix[0]).unwrap();
        let owner = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        owner.bind(&address).unwrap();
        owner.listen(0).unwrap();
        let clients: Vec<Socket> = (0..10).map(|_| Socket::new(Domain::UNIX, Type::STREAM, None).unwrap()).collect();
        clients.iter().for_each(|client| client.set_nonblocking(true).unwrap());
        assert!(clients.iter().any(|client| client.connect(&address).is_err()), "the queue is full");
        let error = streams(&config).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }) && error.to_string().ends_with("another path"), "{error}");
    }

    #[test]
    fn errors_name_key_path_and_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: PathBuf| datagrams(&Config { unixgram: vec![path], ..Config::default() }).unwrap_err();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = at(file.clone());
        assert!(error.to_string().starts_with(&format!("listen.unixgram = \"{}\": there is a file", file.display())));
        assert_eq!(
            (at("relative.sock".into()).exit_code(), at(file.with_file_name("x".repeat(200))).exit_code()),
            (78, 78)
        );
        assert_eq!(at(directory.path().join("no/such")).exit_code(), 66);
    }
}
