//! The files that a configuration names, read for a start, a reload or a check: mapping rules, secrets, certificates; and
//! what else can be found out beforehand about users and paths. Nothing is written, bound or asked over a network.
//!
//! Every problem is told, each with the key that leads to it and its place.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, Uid, access};

use super::{Code, cannot_read};
use crate::config::{Fault, Kind, Loaded, Origin, Problem};
use crate::http::tokens::{self, Right, Tokens};
use crate::mapping;
use crate::secret;
use crate::store::redis;
use crate::tls::{self, Identity};

/// Reads them all.
pub(super) fn read(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    let problems = problems(loaded);
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Reads all that a check has. Credentials are passed to the service's own process alone, not to its ExecReload= nor to a
/// shell, so what a check cannot look at is noted.
pub(super) fn look(loaded: &mut Loaded) -> Result<Vec<String>, Vec<Problem>> {
    let mut notes = Vec::new();
    let mut problems = problems(loaded);
    problems.retain(|problem| match &problem.fault {
        Fault::NotPassed { key, value, remedy, .. } => {
            let why = "not looked at, since only the service's own process can tell";
            notes.push(format!("{}: {key} = {value}: {why}; here: {remedy}", problem.origin));
            false
        }
        Fault::Syntax(_) | Fault::Unknown { .. } | Fault::Value { .. } | Fault::Refused(_) => true,
        Fault::Argument(_) | Fault::File { .. } => true,
    });
    notes.extend(note_state_dir(loaded));
    if problems.is_empty() { Ok(notes) } else { Err(problems) }
}

fn problems(loaded: &mut Loaded) -> Vec<Problem> {
    let mut problems = Vec::new();
    for step in [read_mapping, read_passwords, read_tokens, read_identity, check_parts, check_paths] {
        problems.extend(step(loaded).err().into_iter().flatten());
    }
    problems
}

/// That a file of secrets can't be used, or that only the service can tell: it has its credentials, and where root looks
/// at its configuration it may be the user whose file that is.
fn unusable(loaded: &Loaded, key: &str, error: &secret::Error) -> Problem {
    let is_owners = matches!(error, secret::Error::Owner(_)) && Uid::effective().is_root();
    told(loaded, key, error.exit_code(), error, is_owners)
}

/// That the file of a key can't be used, unless that is a credential which is kept from this process, or a user's who is
/// not this one.
fn told(loaded: &Loaded, key: &str, code: u8, error: &impl fmt::Display, is_owners: bool) -> Problem {
    if is_owners || secret::is_kept_from_us(&loaded.text(key)) {
        return loaded.not_passed(key, code, error);
    }
    loaded.file_problem(key, code, error)
}

/// Reads the file that `mapping.file` names, if it names one.
pub(super) fn read_mapping(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    let name = loaded.config.mapping.file.clone();
    if name.is_empty() {
        return Ok(());
    }
    let told = |code: Code, what: String| vec![loaded.file_problem("mapping.file", code.into(), &what)];
    let text = read_at_most(&name, mapping::FILE_MAX + 1).map_err(|error| {
        let (code, remedy) = cannot_read(&error);
        told(code, format!("{error}; {remedy}"))
    })?;
    if text.len() as u64 > mapping::FILE_MAX {
        let what = format!("longer than {} bytes; leave rules out", mapping::FILE_MAX);
        return Err(told(Code::Configuration, what));
    }
    loaded.set_mapping(&text)
}

fn read_at_most(name: &str, bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(name)?.take(bytes).read_to_string(&mut text)?;
    Ok(text)
}

/// Reads the passwords of Redis, where it is used, and Kafka.
fn read_passwords(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    let read = |key: &str, name: &str| match name {
        "" => Ok(None),
        name => secret::password(name).map(Some).map_err(|error| unusable(loaded, key, &error)),
    };
    let kafka = read("kafka.password_file", &loaded.config.kafka.password_file);
    let redis = match loaded.config.store.kind {
        Kind::Redis => read("store.redis.password_file", &loaded.config.store.redis.password_file),
        Kind::Memory | Kind::Embedded => Ok(None),
        #[cfg(feature = "kafka")]
        Kind::Kafka => Ok(None),
    };
    match (kafka, redis) {
        (Ok(kafka), Ok(redis)) => {
            loaded.config.kafka.password = kafka;
            loaded.config.store.redis.password = redis;
            Ok(())
        }
        (kafka, redis) => Err(kafka.err().into_iter().chain(redis.err()).collect()),
    }
}

/// Reads the tokens.
fn read_tokens(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    match Tokens::read(&loaded.config.http.tokens) {
        Ok(tokens) => {
            loaded.config.http.tokens.tokens = tokens;
            Ok(())
        }
        Err(wrong) => {
            let problem = |(right, error): &(Right, tokens::Error)| match error {
                tokens::Error::File(error) => unusable(loaded, right.key(), error),
                tokens::Error::Short(_) | tokens::Error::Character(_) | tokens::Error::None => {
                    loaded.file_problem(right.key(), error.exit_code(), error)
                }
            };
            Err(wrong.iter().map(problem).collect())
        }
    }
}

/// Reads who we are in TLS.
fn read_identity(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    match Identity::read(&loaded.config.tls) {
        Ok(identity) => {
            loaded.config.tls.identity = identity;
            Ok(())
        }
        Err(tls::Error::Secret(which, error)) => Err(vec![unusable(loaded, which.key(), &error)]),
        Err(tls::Error::Read(which, error)) => {
            let error = tls::Error::Read(which, error);
            Err(vec![told(loaded, which.key(), error.exit_code(), &error, false)])
        }
        Err(error) => Err(vec![loaded.file_problem(error.which().key(), error.exit_code(), &error)]),
    }
}

/// What the parts find out by themselves: Redis about its files, Kafka about its options, listeners about users.
fn check_parts(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    let config = &loaded.config;
    let redis = match config.store.kind {
        Kind::Redis => config.store.redis.check().err(),
        Kind::Memory | Kind::Embedded => None,
        #[cfg(feature = "kafka")]
        Kind::Kafka => None,
    };
    let redis = redis.map(|error| {
        let is_of_file = matches!(error, redis::Error::Credential(_) | redis::Error::File(..));
        let (key, code) = (error.key(), error.exit_code());
        if is_of_file { told(loaded, key, code, &error, false) } else { loaded.file_problem(key, code, &error) }
    });
    let key = match config.store.kind {
        Kind::Redis => open_key(loaded),
        Kind::Memory | Kind::Embedded => None,
        #[cfg(feature = "kafka")]
        Kind::Kafka => None,
    };
    let accounts = config.listen.check_accounts().err();
    let accounts = accounts.map(|error| loaded.refusal(error.key().unwrap_or_default(), &error));
    let problems: Vec<_> = key.into_iter().chain(redis).chain(accounts).chain(check_kafka(loaded)).collect();
    loaded.config.store.redis.contents = loaded.config.store.redis.look();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// That others can get at the key of our certificate for Redis. All else that may be wrong with its file Redis tells itself.
fn open_key(loaded: &Loaded) -> Option<Problem> {
    let name = &loaded.config.store.redis.key_file;
    let error = Some(name).filter(|name| !name.is_empty()).and_then(|name| secret::read(name).err())?;
    let is_open = matches!(error, secret::Error::Public(_) | secret::Error::Owner(_));
    is_open.then(|| unusable(loaded, "store.redis.key_file", &error))
}

/// Whether librdkafka takes all options together, where it is used.
#[cfg(feature = "kafka")]
fn check_kafka(loaded: &Loaded) -> Option<Problem> {
    let config = &loaded.config;
    let is_used = match config.store.kind {
        Kind::Kafka => true,
        Kind::Memory | Kind::Embedded | Kind::Redis => false,
    };
    let is_used = is_used || config.listen.kafka || config.ingest.forward == crate::http::forward::Forward::Kafka;
    let error = config.kafka.fit().err().filter(|_| is_used)?;
    Some(loaded.refusal(error.key(), &error))
}

#[cfg(not(feature = "kafka"))]
fn check_kafka(_: &Loaded) -> Option<Problem> {
    None
}

/// Whether the state directory and those of the unix sockets can be what they are to be.
fn check_paths(loaded: &mut Loaded) -> Result<(), Vec<Problem>> {
    let listen = &loaded.config.listen;
    let sockets = [("listen.unixgram", &listen.unixgram), ("listen.unix", &listen.unix)];
    let sockets = sockets.into_iter().flat_map(|(key, paths)| paths.iter().map(move |path| (key, path)));
    let sockets = sockets.filter_map(|(key, path)| {
        let (code, what) = wrong_socket(path)?;
        Some(loaded.path_problem(key, path, code, &what))
    });
    let problems: Vec<_> = sockets.chain(check_state_dir(loaded)).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Why no unix socket can be at a path.
fn wrong_socket(path: &Path) -> Option<(u8, &'static str)> {
    use std::os::unix::fs::FileTypeExt as _;
    let directory = path.parent()?;
    match fs::metadata(directory) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Some((66, "its directory is missing; make it, or name another path")),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Some((77, "not permitted; name a directory that this user may write to"));
        }
        Err(_) => return Some((66, "its directory is missing; make it, or name another path")),
    }
    if fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
        return Some((74, "there is a file that is no socket; remove it, or name another path"));
    }
    may_not_write(directory).then_some((77, "not permitted; name a directory that this user may write to"))
}

/// That the journal can't be in `state_dir`, if it was named.
fn check_state_dir(loaded: &Loaded) -> Option<Problem> {
    let (code, what) = wrong_state_dir(loaded).filter(|_| loaded.origin("state_dir") != Origin::BuiltIn)?;
    Some(loaded.file_problem("state_dir", code.into(), &what))
}

/// The same where it is built in: nobody said that it would be used here.
fn note_state_dir(loaded: &Loaded) -> Option<String> {
    let (_, what) = wrong_state_dir(loaded).filter(|_| loaded.origin("state_dir") == Origin::BuiltIn)?;
    let directory = loaded.config.state_dir.display().to_string();
    Some(format!("{}: state_dir = {directory:?}, in the working directory: {what}", Origin::BuiltIn))
}

fn wrong_state_dir(loaded: &Loaded) -> Option<(Code, &'static str)> {
    let is_kept = match loaded.config.store.kind {
        Kind::Memory => false,
        Kind::Embedded | Kind::Redis => true,
        #[cfg(feature = "kafka")]
        Kind::Kafka => true,
    };
    if !is_kept {
        return None;
    }
    // What is missing is made, below what there is.
    let there = loaded.config.state_dir.ancestors().find_map(existing)?;
    match fs::metadata(&there) {
        Ok(found) if !found.is_dir() => {
            Some((Code::Io, "there is a file in its place; remove it, or name another directory"))
        }
        Ok(_) if may_not_write(&there) => {
            Some((Code::Permission, "not permitted; let this user write there, or name another directory"))
        }
        Ok(_) | Err(_) => None,
    }
}

/// The path itself, if something is there; the empty one stands for the working directory.
fn existing(path: &Path) -> Option<PathBuf> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    match fs::metadata(path) {
        Ok(_) => Some(path.to_owned()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => None,
        Err(_) => None,
    }
}

/// Whether this user may make nothing in a directory, for its permissions or because it is on a read-only file system.
fn may_not_write(directory: &Path) -> bool {
    let error = access(directory, AccessFlags::W_OK | AccessFlags::X_OK).err();
    error.is_some_and(|error| [Errno::EACCES, Errno::EROFS, Errno::EPERM].contains(&error))
}
