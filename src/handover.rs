//! One agent takes over from another while lines come in: the process of the successor, and what both tell each other.
//!
//! The one that runs starts the other by the path at which it was started itself, and gives it all listening sockets. When
//! the successor has its configuration and is prepared, it is told to read them, and does so at once. Then the first stops
//! reading, passes its open streams on, writes what it has, lets go of the journal, and says so; the successor opens the
//! journal, starts all its parts and says that it could. With that word the first ends. Until then it can go on with all
//! that it has: of a successor that dies, is silent for too long or cannot open the journal nothing stays but that the
//! datagrams are gone which it had read itself.
//!
//! They speak over a pair of unix sockets, the successor's end of which is its standard input: messages of a line of JSON,
//! bytes behind it, and at most one descriptor. A message that one of them does not know is passed over, since they may be
//! of different versions. Nothing here reads a line or a clock.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{self, Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, sendmsg, shutdown, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use crate::ingest::Listener;
use crate::inherited::{Inherited, Named};
use crate::listen::Passed;
use crate::listen::lines::{Form, Rest};

/// Tells a process that its standard input leads to the agent it is to take over from.
pub const VARIABLE: &str = "TALLYD_HANDOVER";

/// How long a successor may take to read its configuration.
const TO_PREPARE: Duration = Duration::from_secs(30);

/// How long one that is prepared may take to read the sockets.
const TO_READ: Duration = Duration::from_secs(10);

/// How long a successor may take to open the journal and to read back what is in it.
const TO_START: Duration = Duration::from_secs(120);

/// How long a message may wait for the other to take it.
const TO_TAKE: Duration = Duration::from_secs(10);

/// How often something else is done while the successor is waited for.
const WHILE: Duration = Duration::from_secs(5);

/// How long one whose channel has closed may take to end.
const TO_END: Duration = Duration::from_secs(1);

/// No message is longer.
const MESSAGE_MAX: usize = 64 << 10;

/// How much of a line or packet goes with one message.
const PART: usize = 32 << 10;

/// What [`VARIABLE`] says to a successor.
const STDIN: &str = "stdin";

/// What it says to a process that is to start the successor, and no more.
const GO_BETWEEN: &str = "go-between";

/// What they say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
enum Message {
    /// The go-between has started the successor.
    Started {
        /// Its process.
        id: u32,
    },
    /// Here is a listening socket; its descriptor comes along.
    Socket {
        /// Its name, as in [`Named::name`].
        name: String,
    },
    /// Those were all.
    Begin,
    /// The successor has its configuration, and can read when it is told to.
    Prepared,
    /// It is told to.
    Read,
    /// The successor reads.
    Reading,
    /// Here is the beginning of the line or packet of the next stream, or more of it.
    Part,
    /// Here is an open stream, the rest of what was read of its line or packet behind this; its descriptor comes along.
    Stream {
        /// `tcp` or `unix`.
        listener: String,
        /// What is to be skipped of it.
        skip: u64,
        /// What it is made of.
        #[serde(default)]
        form: Form,
    },
    /// Streams and journal are the successor's.
    Yours,
    /// The successor has taken all of it.
    Taken,
    /// What another version says.
    #[serde(other)]
    Unknown,
}

/// Why nobody took over.
#[derive(Debug)]
pub enum Error {
    /// The process could not be started.
    NotStarted {
        /// By which path.
        program: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The successor ended.
    Ended(Option<ExitStatus>),
    /// The successor did not do what it was waited for, in time.
    Silent(Duration),
    /// It could not be told something.
    Channel(io::Error),
    /// This process is the first of its container, with which all others end.
    First,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotStarted { program, error } => write!(f, "{} could not be started: {error}", program.display()),
            Self::Ended(Some(status)) => write!(f, "the successor ended with {status}; its own last lines say why"),
            Self::Ended(None) => f.write_str("the successor closed the channel"),
            Self::Silent(time) => write!(f, "the successor said nothing for {} s", time.as_secs()),
            Self::Channel(error) => write!(f, "the successor could not be told: {error}"),
            Self::First => f.write_str(
                "this process is the first of its container, which would end with it; start another container",
            ),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Channel(error)
    }
}

/// How this process was started, and so its successor will be.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    /// Whether successors are to be children of the first process of the system, and none of ours.
    is_apart: bool,
}

impl Program {
    /// To be asked at the start: an upgrade puts another file at the path, and the system then no longer says which it was.
    ///
    /// systemd serves a main process as its own only if it is its child at the moment when it is told of it: one that is not
    /// it kills at a stop without waiting for its last flush. There successors are to be `apart`.
    pub fn of_this_process(is_apart: bool) -> io::Result<Self> {
        Ok(Self { path: env::current_exe()?, arguments: env::args_os().skip(1).collect(), is_apart })
    }

    /// The command that runs it as this part of a hand-over.
    fn command(&self, part: &str) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).env(VARIABLE, part);
        // These are about this process alone.
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
            command.env_remove(name);
        }
        command
    }
}

/// Starts the successor, if this process was started for that alone; then it is to end, so that the successor becomes a child
/// of the first process of the system. False in any other process.
///
/// # Errors
/// When the successor could not be started, or the agent not be told.
pub fn go_between() -> io::Result<bool> {
    if env::var_os(VARIABLE).is_none_or(|part| part != GO_BETWEEN) {
        return Ok(false);
    }
    let successor = Program::of_this_process(false)?.command(STDIN).spawn()?;
    let channel = Channel(io::stdin().as_fd().try_clone_to_owned()?);
    channel.send(&Message::Started { id: successor.id() }, &[], None)?;
    Ok(true)
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// The process that is to take over; it is ended when this is dropped before it did.
#[derive(Debug)]
pub struct Successor {
    id: u32,
    /// None once it is on its own.
    process: Option<Process>,
    channel: Channel,
}

/// A process that can be ended.
#[derive(Debug)]
enum Process {
    Child(Child),
    /// Somebody else's child.
    Apart(OwnedFd),
}

impl Process {
    /// Kills it and waits for its end.
    fn end(self) {
        // These fail only for one that has ended.
        match self {
            Self::Child(mut child) => {
                drop(child.kill());
                drop(child.wait());
            }
            Self::Apart(process) => {
                let _ = pidfd_send_signal(&process, Signal::KILL);
                has_ended(&process, TO_END);
            }
        }
    }

    /// Tells it to stop, and waits for its end; false when it has not ended in this time.
    fn stop(self, within: Duration) -> bool {
        match self {
            Self::Child(mut child) => {
                // A child is there until it is waited for, and so is its number.
                let Ok(process) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) else { return false };
                let stopped = Self::Apart(process).stop(within);
                if stopped {
                    drop(child.wait());
                }
                stopped
            }
            Self::Apart(process) => pidfd_send_signal(&process, Signal::TERM).is_err() || has_ended(&process, within),
        }
    }

    /// How it ended, if that is known and it has.
    fn status(&mut self) -> io::Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => child.try_wait(),
            Self::Apart(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Waits until a process has ended, for so long at most.
fn has_ended(process: &OwnedFd, within: Duration) -> bool {
    let within = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&within)).is_ok_and(|count| count > 0)
}

impl Successor {
    /// Starts the successor and gives it the sockets. Blocks until it is prepared to read them.
    pub fn start(program: &Program, sockets: &[Named]) -> Result<Self, Error> {
        if process::id() == 1 {
            return Err(Error::First);
        }
        let (ours, theirs) = Channel::pair()?;
        let mut command = program.command(if program.is_apart { GO_BETWEEN } else { STDIN });
        command.stdin(Stdio::from(theirs.0));
        let process = command.spawn().map_err(|error| Error::NotStarted { program: program.path.clone(), error })?;
        // The command holds the other's end of the channel.
        drop(command);
        let mut successor = Self { id: process.id(), process: Some(Process::Child(process)), channel: ours };
        if program.is_apart {
            successor.become_started()?;
        }
        for named in sockets {
            successor.tell(&Message::Socket { name: named.name() }, &[], Some(named.socket.as_fd()))?;
        }
        successor.tell(&Message::Begin, &[], None)?;
        successor.wait_for(&Message::Prepared, TO_PREPARE, || ())?;
        Ok(successor)
    }

    /// Lets it read the sockets, beside whoever reads them. Blocks until it does.
    pub fn read(&mut self) -> Result<(), Error> {
        self.tell(&Message::Read, &[], None)?;
        self.wait_for(&Message::Reading, TO_READ, || ())
    }

    /// From the go-between to the process that it starts.
    fn become_started(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + TO_PREPARE;
        let id = loop {
            match self.channel.receive(deadline.saturating_duration_since(Instant::now())) {
                Ok(Some(Received { message: Message::Started { id }, .. })) => break id,
                Ok(Some(_)) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Error::Silent(TO_PREPARE)),
                Ok(None) | Err(_) => return Err(self.ended()),
            }
        };
        let process = Pid::from_raw(id.cast_signed()).ok_or(Error::Ended(None))?;
        let process = pidfd_open(process, PidfdFlags::empty()).map_err(|_| Error::Ended(None))?;
        self.id = id;
        if let Some(Process::Child(mut go_between)) = self.process.replace(Process::Apart(process)) {
            // It has said its one word, and ends by itself.
            drop(go_between.wait());
        }
        Ok(())
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Gives it the open streams and the journal, which this process has let go of. Blocks until it has taken both. It then
    /// waits until this is dropped. `meanwhile` is called now and then.
    pub fn hand_over(&mut self, streams: &[Passed], meanwhile: impl Fn()) -> Result<(), Error> {
        for Passed { listener, socket, rest } in streams {
            let message = Message::Stream { listener: listener.name().to_owned(), skip: rest.skip, form: rest.form };
            let mut parts = rest.partial.chunks(PART);
            let last = parts.next_back().unwrap_or_default();
            for part in parts {
                self.tell(&Message::Part, part, None)?;
            }
            self.tell(&message, last, Some(socket.as_fd()))?;
        }
        self.tell(&Message::Yours, &[], None)?;
        self.wait_for(&Message::Taken, TO_START, meanwhile)
    }

    /// Leaves it on its own.
    pub fn release(mut self) {
        self.process = None;
    }

    /// Tells it to stop, once it has taken all, and waits until it has ended; false when it has not in this time.
    pub fn stop(mut self, within: Duration) -> bool {
        // It waits for the end of this channel before it serves a signal.
        let _ = shutdown(&self.channel.0, Shutdown::Both);
        self.process.take().is_none_or(|process| process.stop(within))
    }

    fn tell(&mut self, message: &Message, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        match self.channel.send(message, bytes, descriptor) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(self.ended()),
            told => told.map_err(Error::Channel),
        }
    }

    fn wait_for(&mut self, awaited: &Message, time: Duration, meanwhile: impl Fn()) -> Result<(), Error> {
        let deadline = Instant::now() + time;
        loop {
            meanwhile();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Silent(time));
            }
            match self.channel.receive(left.min(WHILE)) {
                Ok(Some(received)) if received.message == *awaited => return Ok(()),
                Ok(Some(_)) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() != io::ErrorKind::ConnectionReset => return Err(error.into()),
                Ok(None) | Err(_) => return Err(self.ended()),
            }
        }
    }

    /// How it ended, which takes a moment after its end of the channel has closed.
    fn ended(&mut self) -> Error {
        let deadline = Instant::now() + TO_END;
        loop {
            match self.process.as_mut().map(Process::status) {
                Some(Ok(Some(status))) => {
                    self.process = None;
                    return Error::Ended(Some(status));
                }
                Some(Ok(None)) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                Some(_) | None => return Error::Ended(None),
            }
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end();
        }
    }
}

/// The agent that this process takes over from.
#[derive(Debug)]
pub struct Predecessor {
    channel: Channel,
}

impl Predecessor {
    /// The agent at the other end of standard input, if this process was started to take over.
    pub fn of_this_process() -> io::Result<Option<Self>> {
        if env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        let channel = Channel(io::stdin().as_fd().try_clone_to_owned()?);
        // Nobody is to read it by mistake, nor to hold it open.
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(Some(Self { channel }))
    }

    /// Waits for the listening sockets.
    pub fn sockets(&mut self) -> io::Result<Inherited> {
        let mut inherited = Inherited::shared();
        loop {
            match self.next()? {
                Received { message: Message::Socket { name }, descriptor: Some(descriptor), .. } => {
                    inherited.add(&name, descriptor.into());
                }
                Received { message: Message::Begin, .. } => return Ok(inherited),
                Received { .. } => {}
            }
        }
    }

    /// Says that this process can read the sockets, and waits until it is to.
    pub fn prepare(&mut self) -> io::Result<()> {
        self.channel.send(&Message::Prepared, &[], None)?;
        while self.next()?.message != Message::Read {}
        Ok(())
    }

    /// Says that the sockets are read here, and waits until all else is left to this process: the open streams, and the
    /// journal.
    pub fn replace(&mut self) -> io::Result<Vec<Passed>> {
        self.channel.send(&Message::Reading, &[], None)?;
        let mut streams = Vec::new();
        let mut begun = Vec::new();
        loop {
            match self.next()? {
                Received { message: Message::Part, bytes, .. } => begun.extend(bytes),
                Received { message: Message::Stream { listener, skip, form }, bytes, descriptor: Some(descriptor) } => {
                    let partial = [std::mem::take(&mut begun), bytes].concat();
                    let is = |known: &Listener| known.name() == listener;
                    let Some(listener) = [Listener::Tcp, Listener::Unix].into_iter().find(is) else { continue };
                    let rest = Rest { partial, skip, form };
                    streams.push(Passed { listener, socket: Socket::from(descriptor), rest });
                }
                Received { message: Message::Yours, .. } => return Ok(streams),
                Received { .. } => {}
            }
        }
    }

    /// Says that all is taken, and waits until the other has let go of this process. One that is gone needs no word.
    pub fn dismiss(self) {
        let told = self.channel.send(&Message::Taken, &[], None);
        // It ends with that word, and the channel with it; if it cannot, nothing is to be done about it here.
        drop(told.and_then(|()| self.channel.receive(TO_TAKE)));
    }

    fn next(&mut self) -> io::Result<Received> {
        // As long as the other lives it has its reasons, and it bounds each step itself.
        self.channel.receive(Duration::MAX)?.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the agent that was to be taken over from has ended or gone on",
            )
        })
    }
}

/// One end of what they speak over.
#[derive(Debug)]
struct Channel(OwnedFd);

/// A message with what came along.
#[derive(Debug)]
struct Received {
    message: Message,
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Channel {
    fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&one, Timeout::Send, Some(TO_TAKE))?;
        set_socket_timeout(&other, Timeout::Send, Some(TO_TAKE))?;
        Ok((Self(one), Self(other)))
    }

    fn send(&self, message: &Message, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut head = serde_json::to_vec(message)?;
        head.push(b'\n');
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(descriptors) = &descriptors {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let parts = [IoSlice::new(&head), IoSlice::new(bytes)];
        loop {
            match sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                sent => return sent.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// The next message; none when the other end is closed. `WouldBlock` when there is none for so long.
    fn receive(&self, time: Duration) -> io::Result<Option<Received>> {
        set_socket_timeout(&self.0, Timeout::Recv, (time != Duration::MAX).then_some(time))?;
        let mut bytes = vec![0; MESSAGE_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                received => break received?,
            }
        };
        let mut descriptor = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                descriptor = descriptors.next();
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        bytes.truncate(received.bytes);
        let end = memchr::memchr(b'\n', &bytes).unwrap_or(bytes.len());
        let message = serde_json::from_slice(&bytes[..end]).unwrap_or(Message::Unknown);
        bytes.drain(..(end + 1).min(received.bytes));
        Ok(Some(Received { message, bytes, descriptor }))
    }
}
