//! The system calls that the standard library lacks: receive many datagrams at once and send many, wait for several
//! descriptors, wake a thread that waits, and read or set what a socket's buffer holds. It knows no lines and makes no
//! decisions.
//!
//! All `unsafe` is here. Its invariant: the kernel writes only into memory that `Kept` owns, which never moves, or into
//! a local that outlives the call; what is read back was written by the kernel or is zero.
#![allow(
    unsafe_code,
    reason = "recvmmsg, sendmmsg, ppoll, eventfd and three socket options have no safe form in std or socket2"
)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::iter;
use std::mem::{MaybeUninit, offset_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use libc::{
    c_int, c_void, cmsghdr, iovec, mmsghdr, pollfd, sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t, ucred,
};

use crate::ingest::Address;

/// Datagrams of one system call, at most.
pub const BURST: usize = 256;

/// The same of trains. They may fill their slots, and touched memory stays: 2 MiB of each worker, not 16.
const TRAINS: usize = 32;

/// Bytes by which the slots of a burst are apart beyond their size: the lines of a full packet. Slots a power of two
/// apart would all compete for the same few sets of the cache.
const STAGGER: usize = 23 * LINE;

/// A line of the cache. Slots begin at one: where they did not, the kernel took five times as long to copy trains.
const LINE: usize = 64;

/// No train is longer: it is one datagram of IP to the kernel.
const TRAIN_MAX: usize = 65_535;

/// Memory for the datagrams of one system call. Pages are touched only as far as bursts and datagrams reach, so a quiet
/// agent pays for none of the 17 MiB that 256 datagrams of 64 KiB may need.
///
/// What the kernel hands over at once is a [`Train`]: a datagram alone, or from a socket with [`set_gro`] several of one
/// sender, all of one size but the last, which may be shorter. They lie one behind the other in a slot, and a control
/// message states their size.
pub struct Burst {
    slots: Kept<u8>,
    names: Kept<sockaddr_storage>,
    controls: Controls,
    headers: Kept<mmsghdr>,
    // The headers point into it.
    _iovecs: Kept<iovec>,
    datagram_max: usize,
    slot: usize,
    /// Where the first slot begins, and from one to the next.
    first: usize,
    stride: usize,
    filled: usize,
}

/// What a slot of a burst holds.
#[derive(Debug, Clone, Copy)]
pub struct Train<'a> {
    bytes: &'a [u8],
    /// Bytes of each datagram but the last.
    segment: usize,
    datagram_max: usize,
    /// Whether there was more than the slot holds.
    cut: bool,
    source: Option<Address>,
}

/// One datagram of a burst.
#[derive(Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Its payload, or the beginning of it.
    pub bytes: &'a [u8],
    /// Whether the payload was longer than `bytes`.
    pub truncated: bool,
    /// Who sent it, if the kernel said so.
    pub source: Option<Address>,
}

/// A control message with one value, as the kernel aligns it: its memory ends where the next one would begin.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control<T> {
    header: cmsghdr,
    value: T,
}

impl<T> Control<T> {
    /// What its header states as its length: without the padding behind the value.
    const LENGTH: usize = offset_of!(Self, value) + size_of::<T>();
}

/// Room for the one control message that is asked for with each datagram, and for no other: a unix socket would put
/// descriptors there that somebody sent along.
enum Controls {
    None,
    /// The size of a train's datagrams.
    Trains(Kept<Control<c_int>>),
    /// The process that sent a datagram. Its message comes first, so the kernel gives us no descriptors.
    Processes(Kept<Control<ucred>>),
}

impl Controls {
    /// Where the message of a header goes.
    fn at(&self, i: usize) -> *mut c_void {
        match self {
            Self::None => ptr::null_mut(),
            Self::Trains(controls) => controls.at(i).cast(),
            Self::Processes(controls) => controls.at(i).cast(),
        }
    }

    /// Bytes of that room.
    fn size(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Trains(_) => size_of::<Control<c_int>>(),
            Self::Processes(_) => size_of::<Control<ucred>>(),
        }
    }
}

impl Burst {
    /// Room for [`BURST`] datagrams of at most `datagram_max` bytes each, or for fewer trains of them.
    pub fn new(datagram_max: usize, trains: bool) -> Self {
        if trains {
            return Self::with(datagram_max, TRAIN_MAX, TRAINS, Controls::Trains(Kept::zeroed(TRAINS)));
        }
        Self::with(datagram_max, datagram_max, BURST, Controls::None)
    }

    /// Room for datagrams of a unix socket with SO_PASSCRED: they have processes as their sources.
    pub fn of_processes(datagram_max: usize) -> Self {
        Self::with(datagram_max, datagram_max, BURST, Controls::Processes(Kept::zeroed(BURST)))
    }

    fn with(datagram_max: usize, slot: usize, count: usize, controls: Controls) -> Self {
        let stride = slot.next_multiple_of(LINE) + STAGGER;
        let slots: Kept<u8> = Kept::new(vec![0; LINE + count * stride].into_boxed_slice());
        let first = slots.at(0).align_offset(LINE);
        let names: Kept<sockaddr_storage> = Kept::zeroed(count);
        let iovecs = (0..count).map(|i| iovec { iov_base: slots.at(first + i * stride).cast(), iov_len: slot });
        let iovecs = Kept::new(iovecs.collect());
        let headers: Kept<mmsghdr> = Kept::zeroed(count);
        for i in 0..count {
            // SAFETY: `headers` was made above for nobody else, and `i` is below its length.
            let header = unsafe { &mut (*headers.at(i)).msg_hdr };
            header.msg_name = names.at(i).cast();
            header.msg_iov = iovecs.at(i);
            header.msg_iovlen = 1;
            header.msg_control = controls.at(i);
        }
        let mut burst =
            Self { slots, names, controls, headers, _iovecs: iovecs, datagram_max, slot, first, stride, filled: count };
        burst.empty();
        burst
    }

    /// How many trains one call receives at most.
    pub fn capacity(&self) -> usize {
        self.headers.len()
    }

    /// Receives what a socket holds, as far as there is room, without waiting. Answers how many trains there were.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.empty();
        // SAFETY: each header points to a name, an iovec, a slot and, if any is asked for, a control message of the sizes
        // it states, all kept until `self` drops.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.at(0),
                self.capacity() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        match usize::try_from(received) {
            Ok(received) => {
                self.filled = received.min(self.capacity());
                Ok(self.filled)
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            },
        }
    }

    /// What the last call received, in the order of arrival.
    pub fn trains(&self) -> impl Iterator<Item = Train<'_>> {
        (0..self.filled).map(|i| self.train(i))
    }

    /// Forgets what the last call received: the kernel left the lengths of names and control messages in the headers.
    fn empty(&mut self) {
        let control_max = self.controls.size();
        for i in 0..std::mem::take(&mut self.filled) {
            // SAFETY: `i` is below the number of headers, and `&mut self` means that no train of the last call is borrowed.
            let header = unsafe { &mut (*self.headers.at(i)).msg_hdr };
            header.msg_namelen = size_of::<sockaddr_storage>() as socklen_t;
            header.msg_controllen = control_max as _;
        }
    }

    fn train(&self, i: usize) -> Train<'_> {
        // SAFETY: `i` is below `filled`, so the kernel has written this header, its name and so many bytes of its slot;
        // it writes again only in `receive`, which needs `&mut self`.
        unsafe {
            let header = &*self.headers.at(i);
            Train {
                bytes: slice::from_raw_parts(
                    self.slots.at(self.first + i * self.stride),
                    (header.msg_len as usize).min(self.slot),
                ),
                segment: self.segment(i, header.msg_hdr.msg_controllen as _).unwrap_or(usize::MAX),
                datagram_max: self.datagram_max,
                cut: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
                source: self.source(i, header),
            }
        }
    }

    /// The size that the control message of a train states, of which the kernel wrote so many bytes.
    fn segment(&self, i: usize, written: usize) -> Option<usize> {
        let Controls::Trains(controls) = &self.controls else { return None };
        if written < Control::<c_int>::LENGTH {
            return None;
        }
        // SAFETY: plain integers, which the kernel has written or which are zero; `receive`, where it writes again, needs
        // `&mut self`.
        let control = unsafe { &*controls.at(i) };
        let is_size = (control.header.cmsg_level, control.header.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO);
        usize::try_from(control.value).ok().filter(|size| is_size && *size > 0)
    }

    /// Who sent a train.
    fn source(&self, i: usize, header: &mmsghdr) -> Option<Address> {
        let Controls::Processes(controls) = &self.controls else {
            // SAFETY: the kernel has written the name, or it is zero; it writes again only in `receive`, which needs
            // `&mut self`.
            return address(unsafe { &*self.names.at(i) }, header.msg_hdr.msg_namelen).map(Address::Inet);
        };
        // SAFETY: as above, of the control message.
        process(unsafe { &*controls.at(i) }, header.msg_hdr.msg_controllen as _)
    }
}

impl<'a> Train<'a> {
    /// Bytes of all its datagrams.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether all it has is a datagram without payload.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Its datagrams, one at least.
    pub fn datagrams(self) -> impl Iterator<Item = Datagram<'a>> {
        let mut rest = Some(self.bytes);
        iter::from_fn(move || {
            let (datagram, behind) = rest.take().map(|rest| rest.split_at(rest.len().min(self.segment)))?;
            rest = (!behind.is_empty()).then_some(behind);
            let bytes = &datagram[..datagram.len().min(self.datagram_max)];
            let truncated = bytes.len() < datagram.len() || (self.cut && rest.is_none());
            Some(Datagram { bytes, truncated, source: self.source })
        })
    }
}

/// Memory to which pointers are kept across calls, and which is therefore reached only through them.
struct Kept<T>(NonNull<[T]>);

impl<T> Kept<T> {
    fn new(memory: Box<[T]>) -> Self {
        Self(NonNull::from(Box::leak(memory)))
    }

    /// So many structures that are all zero.
    fn zeroed(count: usize) -> Self
    where
        T: Plain,
    {
        Self::new(vec![zero(); count].into_boxed_slice())
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    /// A pointer to the element at `index`.
    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.0.len());
        // SAFETY: within the allocation, as just checked.
        unsafe { self.0.as_ptr().cast::<T>().add(index) }
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        // SAFETY: `new` took it out of a box, and nobody but `self` has it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// A C structure of integers and pointers.
///
/// # Safety
///
/// All bits zero is a value of it.
unsafe trait Plain: Copy {}

// SAFETY: an address of no family.
unsafe impl Plain for sockaddr_storage {}
// SAFETY: a message without name, buffers and control messages.
unsafe impl Plain for mmsghdr {}
// SAFETY: a buffer of no bytes.
unsafe impl Plain for iovec {}
// SAFETY: integers.
unsafe impl Plain for c_int {}
// SAFETY: an integer.
unsafe impl Plain for u16 {}
// SAFETY: integers.
unsafe impl Plain for ucred {}
// SAFETY: integers and what is one itself.
unsafe impl<T: Plain> Plain for Control<T> {}

fn zero<T: Plain>() -> T {
    // SAFETY: `Plain` says so.
    unsafe { zeroed() }
}

/// An address as the kernel wrote it. IPv4 senders of an IPv6 socket look as they do on an IPv4 socket.
fn address(name: &sockaddr_storage, length: socklen_t) -> Option<SocketAddr> {
    let length = length as usize;
    match c_int::from(name.ss_family) {
        libc::AF_INET if length >= size_of::<sockaddr_in>() => {
            // SAFETY: the family says that a `sockaddr_in` stands here, and the storage is larger and aligned for all.
            let name = unsafe { &*ptr::from_ref(name).cast::<sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 if length >= size_of::<sockaddr_in6>() => {
            // SAFETY: as above, for a `sockaddr_in6`.
            let name = unsafe { &*ptr::from_ref(name).cast::<sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            let port = u16::from_be(name.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(ip) => SocketAddrV4::new(ip, port).into(),
                None => SocketAddrV6::new(ip, port, 0, name.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}

/// A process as the kernel wrote it, with so many bytes in all.
fn process(control: &Control<ucred>, written: usize) -> Option<Address> {
    let is_process = (control.header.cmsg_level, control.header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS);
    let process = Address::Process { uid: control.value.uid, pid: control.value.pid.unsigned_abs() };
    (is_process && written >= Control::<ucred>::LENGTH).then_some(process)
}

/// Messages of one call of [`send`], at most.
pub const VOLLEY: usize = 64;

/// A message to be sent: a datagram, or a train of them.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// Payloads, one behind the other.
    pub bytes: &'a [u8],
    /// Bytes of each datagram but the last, which may be shorter (UDP_SEGMENT, Linux 4.18); 0 for a datagram alone.
    pub segment: u16,
}

/// Sends the first [`VOLLEY`] of these messages by one call to where a socket is connected. Answers how many went, which
/// may be fewer: the next call then says why. An error is that of the first message, and nothing was sent.
pub fn send(socket: BorrowedFd<'_>, messages: &[Outgoing<'_>]) -> io::Result<usize> {
    let mut headers = [zero::<mmsghdr>(); VOLLEY];
    let mut iovecs = [zero::<iovec>(); VOLLEY];
    let mut controls = [zero::<Control<u16>>(); VOLLEY];
    let places = headers.iter_mut().zip(iovecs.iter_mut().zip(&mut controls));
    for (message, (header, (iovec, control))) in messages.iter().zip(places) {
        iovec.iov_base = message.bytes.as_ptr().cast_mut().cast();
        iovec.iov_len = message.bytes.len();
        header.msg_hdr.msg_iov = iovec;
        header.msg_hdr.msg_iovlen = 1;
        if message.segment > 0 {
            control.header.cmsg_len = Control::<u16>::LENGTH as _;
            control.header.cmsg_level = libc::SOL_UDP;
            control.header.cmsg_type = libc::UDP_SEGMENT;
            control.value = message.segment;
            header.msg_hdr.msg_control = ptr::from_mut(control).cast();
            header.msg_hdr.msg_controllen = size_of::<Control<u16>>() as _;
        }
    }
    let count = messages.len().min(VOLLEY) as libc::c_uint;
    // SAFETY: each of so many headers points to an iovec and perhaps a control message, both locals, and through the iovec
    // to bytes that are borrowed until this returns. The kernel reads them, and writes the lengths sent into the headers.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Wakes a thread that waits for descriptors.
#[derive(Debug, Clone)]
pub(super) struct Wake(Arc<File>);

impl Wake {
    /// A new event that has not happened.
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self(Arc::new(File::from(fd))))
    }

    /// Ends the wait that is, or the next one.
    pub(super) fn wake(&self) {
        // It fails only where so many calls are unanswered that the thread is awake anyway.
        drop((&*self.0).write(&1_u64.to_ne_bytes()));
    }

    /// Takes note, so that the next wait waits.
    pub(super) fn clear(&self) {
        // It fails where nobody called.
        drop((&*self.0).read(&mut [0; 8]));
    }

    /// For [`wait`].
    pub(super) fn readable(&self) -> pollfd {
        readable(&*self.0)
    }
}

/// A descriptor for [`wait`].
pub(super) fn readable(fd: &impl AsRawFd) -> pollfd {
    pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

/// Waits until one of the descriptors has something to read or an error to report, or the time is over.
pub(super) fn wait(descriptors: &mut [pollfd], time: Duration) {
    let time = libc::timespec {
        tv_sec: time.as_secs().min(i32::MAX as u64) as libc::time_t,
        tv_nsec: time.subsec_nanos() as _,
    };
    // The answer does not matter: whoever waits reads all sockets afterwards, also after a signal or an error.
    // SAFETY: the slice is valid for writes of its own length, the time is a local; descriptors are mere numbers.
    unsafe { libc::ppoll(descriptors.as_mut_ptr(), descriptors.len() as libc::nfds_t, &raw const time, ptr::null()) };
}

/// How many datagrams the kernel has dropped since the socket was made, modulo 2^32.
pub(super) fn drops(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const DROPS: usize = libc::SK_MEMINFO_DROPS as usize;
    let mut words = [0_u32; DROPS + 1];
    let mut length = size_of_val(&words) as socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `words`.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            words.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(words[DROPS]) }
}

/// Lets the kernel hand over consecutive datagrams of one sender as a train (UDP_GRO, Linux 5.0). The socket is then read
/// with a [`Burst`] for trains and stays so, since a train in its queue is told from a datagram only while this is set.
pub fn set_gro(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Whether a socket may hold trains.
pub(super) fn has_gro(socket: BorrowedFd<'_>) -> bool {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the size of `value`, which outlives the call.
    let answer = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_GRO, (&raw mut value).cast(), &raw mut length)
    };
    answer == 0 && value != 0
}

/// Sets a socket's receive buffer beyond `net.core.rmem_max`, for which CAP_NET_ADMIN is needed.
pub(super) fn force_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, c_int::try_from(bytes).unwrap_or(c_int::MAX))
}

fn set(socket: BorrowedFd<'_>, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the kernel reads the size of a `c_int` from a local.
    let answer = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size_of::<c_int>() as socklen_t)
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many descriptors the process may have open.
pub(super) fn descriptors_max() -> u64 {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: the kernel writes one `rlimit`, and it is read only if the call succeeded.
    unsafe {
        match libc::getrlimit(libc::RLIMIT_NOFILE, limit.as_mut_ptr()) {
            0 => limit.assume_init().rlim_cur,
            _ => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixDatagram;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::{collection, sample};

    use super::*;

    fn pair(to: &str) -> (UdpSocket, UdpSocket) {
        let receiver = UdpSocket::bind(to).unwrap();
        // Room for some hundred short datagrams, whatever the system's default is.
        let socket = socket2::SockRef::from(&receiver);
        force_receive_buffer(receiver.as_fd(), 1 << 20).or_else(|_| socket.set_recv_buffer_size(1 << 20)).unwrap();
        let sender = UdpSocket::bind(to).unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        (sender, receiver)
    }

    fn datagrams(burst: &Burst) -> impl Iterator<Item = Datagram<'_>> {
        burst.trains().flat_map(Train::datagrams)
    }

    #[test]
    fn a_burst_is_what_was_sent() {
        let (sender, receiver) = pair("127.0.0.1:0");
        let mut burst = Burst::new(1_000, false);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 0);
        let sent: Vec<Vec<u8>> = (0..100).map(|i| vec![i as u8; i]).collect();
        // Twice, since the second call meets what the first left behind.
        for _ in 0..2 {
            sent.iter().for_each(|payload| assert_eq!(sender.send(payload).unwrap(), payload.len()));
            assert_eq!(burst.receive(receiver.as_fd()).unwrap(), sent.len());
            for (datagram, payload) in datagrams(&burst).zip(&sent) {
                assert_eq!(datagram.bytes, payload);
                assert!(!datagram.truncated);
                assert_eq!(datagram.source, Some(sender.local_addr().unwrap().into()));
            }
        }
    }

    #[test]
    fn more_than_a_burst_takes_two_calls() {
        for (trains, room) in [(false, BURST), (true, TRAINS)] {
            let (sender, receiver) = pair("[::1]:0");
            (0..room + 7).for_each(|_| assert_eq!(sender.send(b"x").unwrap(), 1));
            let mut burst = Burst::new(8, trains);
            assert_eq!(burst.capacity(), room);
            assert_eq!(burst.receive(receiver.as_fd()).unwrap(), room);
            assert_eq!(datagrams(&burst).count(), room);
            assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 7);
            assert!(datagrams(&burst).all(|datagram| datagram.source == sender.local_addr().ok().map(Address::Inet)));
            assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 0);
            assert_eq!(datagrams(&burst).count(), 0);
        }
    }

    #[test]
    fn what_does_not_fit_is_marked() {
        let (sender, receiver) = pair("127.0.0.1:0");
        for payload in ["12345678", "123456789", ""] {
            assert_eq!(sender.send(payload.as_bytes()).unwrap(), payload.len());
        }
        let mut burst = Burst::new(8, false);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 3);
        let seen: Vec<_> = datagrams(&burst).map(|datagram| (datagram.bytes, datagram.truncated)).collect();
        assert_eq!(seen, [(&b"12345678"[..], false), (b"12345678", true), (b"", false)]);
    }

    /// A message of a sender: so many bytes, in datagrams of `segment`.
    #[derive(Debug, Clone)]
    struct Said {
        sender: usize,
        length: usize,
        segment: u16,
    }

    fn said() -> impl Strategy<Value = Said> {
        let segment = prop_oneof![1_u16..40, 1_u16..1_500, sample::select(vec![7, 8, 9, 1_432])];
        (0_usize..3, segment, 0_usize..20, 0.0..1.0).prop_map(|(sender, segment, whole, last)| {
            let length = whole * usize::from(segment) + (last * f64::from(segment)) as usize;
            Said { sender, length, segment }
        })
    }

    /// Payload, whether it was truncated, and source.
    type Owned = (Vec<u8>, bool, Address);

    /// What a socket with trains and one without make of the same messages, and how many trains there were.
    fn both(host: &str, datagram_max: usize, script: &[Said]) -> ([Vec<Owned>; 2], usize) {
        let senders: Vec<_> = (0..3).map(|_| UdpSocket::bind(host).unwrap()).collect();
        let bytes: Vec<u8> = (0..=u16::MAX).map(|i| (i % 251) as u8).collect();
        let mut trains = 0;
        let read = [true, false].map(|gro| {
            let (_, receiver) = pair(host);
            if gro {
                set_gro(receiver.as_fd()).unwrap();
            }
            for Said { sender, length, segment } in script {
                let sender = &senders[*sender];
                sender.connect(receiver.local_addr().unwrap()).unwrap();
                let message = Outgoing { bytes: &bytes[..*length], segment: *segment };
                assert_eq!(send(sender.as_fd(), &[message]).unwrap(), 1);
            }
            let mut burst = Burst::new(datagram_max, gro);
            let mut read = Vec::new();
            loop {
                match burst.receive(receiver.as_fd()).unwrap() {
                    0 => break read,
                    received => trains += received * usize::from(gro),
                }
                let own =
                    |datagram: Datagram<'_>| (datagram.bytes.to_vec(), datagram.truncated, datagram.source.unwrap());
                read.extend(datagrams(&burst).map(own));
            }
        });
        (read, trains)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn a_train_is_the_datagrams_that_it_was_made_of(
            script in collection::vec(said(), 1..8),
            datagram_max in prop_oneof![Just(8_usize), 1_usize..1_500, Just(TRAIN_MAX)],
            host in sample::select(vec!["127.0.0.1:0", "[::1]:0"]),
        ) {
            let ([joined, parted], trains) = both(host, datagram_max, &script);
            prop_assert_eq!(joined, parted);
            prop_assert_eq!(trains, script.len());
        }
    }

    #[test]
    fn each_datagram_of_a_train_is_measured_by_itself() {
        let script = [Said { sender: 0, length: 64 * 100 - 1, segment: 100 }];
        for (datagram_max, truncated) in [(100, 0), (99, 63)] {
            let ([joined, _], trains) = both("[::1]:0", datagram_max, &script);
            assert_eq!((trains, joined.len()), (1, 64));
            assert_eq!(joined.iter().filter(|(_, truncated, _)| *truncated).count(), truncated);
        }
    }

    /// What the kernel counts where a socket takes trains: README and `listen.udp_gro` say so.
    #[test]
    fn a_train_that_is_dropped_counts_as_one() {
        let payload = [0; 50_000];
        let train = Outgoing { bytes: &payload, segment: 1_000 };
        for (gro, parts) in [(true, 1), (false, 50)] {
            let (sender, receiver) = pair("127.0.0.1:0");
            if gro {
                set_gro(receiver.as_fd()).unwrap();
            }
            let sent = 200;
            (0..sent).for_each(|_| assert_eq!(send(sender.as_fd(), &[train]).unwrap(), 1));
            let mut burst = Burst::new(1_000, gro);
            let mut read = 0;
            loop {
                match burst.receive(receiver.as_fd()).unwrap() {
                    0 => break,
                    received => read += received,
                }
            }
            assert_eq!(read + drops(receiver.as_fd()).unwrap() as usize, sent * parts);
            assert!(read < sent * parts, "1 MiB holds fewer");
        }
    }

    #[test]
    fn a_volley_arrives_in_order_and_ends_where_a_message_fails() {
        let (sender, receiver) = pair("127.0.0.1:0");
        let payloads: Vec<Vec<u8>> = (0..VOLLEY + 6).map(|i| vec![i as u8; i]).collect();
        let mut messages: Vec<_> = payloads.iter().map(|bytes| Outgoing { bytes, segment: 0 }).collect();
        assert_eq!(send(sender.as_fd(), &messages).unwrap(), VOLLEY);
        assert_eq!(send(sender.as_fd(), &messages[VOLLEY..]).unwrap(), 6);
        assert_eq!(send(sender.as_fd(), &[]).unwrap(), 0);
        let mut burst = Burst::new(1_000, false);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), payloads.len());
        assert!(datagrams(&burst).map(|datagram| datagram.bytes).eq(&payloads));
        let long = vec![0; 70_000];
        messages[3].bytes = &long;
        assert_eq!(send(sender.as_fd(), &messages).unwrap(), 3);
        let error = send(sender.as_fd(), &messages[3..]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 3);
    }

    /// A unix socket with SO_PASSCRED at a path, and one that sends there.
    fn unix_pair(path: &Path) -> (UnixDatagram, UnixDatagram) {
        let receiver = UnixDatagram::bind(path).unwrap();
        socket2::SockRef::from(&receiver).set_passcred(true).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect(path).unwrap();
        (sender, receiver)
    }

    fn this_process() -> Option<Address> {
        Some(Address::Process { uid: fs::metadata("/proc/self").unwrap().uid(), pid: std::process::id() })
    }

    #[test]
    fn datagrams_of_unix_sockets_say_which_process_sent_them() {
        let directory = tempfile::tempdir().unwrap();
        let (sender, receiver) = unix_pair(&directory.path().join("socket"));
        let mut burst = Burst::of_processes(8);
        // Twice, since the second call meets what the first left behind.
        for _ in 0..2 {
            for payload in ["1", "22", "123456789"] {
                assert_eq!(sender.send(payload.as_bytes()).unwrap(), payload.len());
            }
            assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 3);
            let seen: Vec<_> = datagrams(&burst).map(|datagram| (datagram.bytes, datagram.source)).collect();
            assert_eq!(seen, [&b"1"[..], b"22", b"12345678"].map(|bytes| (bytes, this_process())));
        }
        // A socket that was not told to ask says nothing.
        socket2::SockRef::from(&receiver).set_passcred(false).unwrap();
        assert_eq!(sender.send(b"1").unwrap(), 1);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 1);
        assert!(datagrams(&burst).all(|datagram| datagram.source.is_none()));
    }

    #[test]
    fn descriptors_that_are_sent_along_are_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let (sender, receiver) = unix_pair(&directory.path().join("socket"));
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        for _ in 0..3 {
            send_along(&sender, &file);
        }
        let mut burst = Burst::of_processes(8);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 3);
        assert!(datagrams(&burst).all(|datagram| datagram.bytes == b"x" && datagram.source == this_process()));
        let open = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        assert_eq!(open.filter(|link| *link == path).count(), 1, "ours");
    }

    /// Sends a byte and a descriptor.
    fn send_along(socket: &UnixDatagram, file: &File) {
        #[repr(C)]
        struct Rights {
            header: cmsghdr,
            descriptor: c_int,
        }
        let (byte, length) = (b"x", offset_of!(Rights, descriptor) + size_of::<c_int>());
        let mut payload = iovec { iov_base: byte.as_ptr().cast_mut().cast(), iov_len: 1 };
        // SAFETY: plain C structures for which all bits zero is a value.
        let (mut rights, mut header) = unsafe { (zeroed::<Rights>(), zeroed::<libc::msghdr>()) };
        rights.header.cmsg_len = length as _;
        rights.header.cmsg_level = libc::SOL_SOCKET;
        rights.header.cmsg_type = libc::SCM_RIGHTS;
        rights.descriptor = file.as_raw_fd();
        header.msg_iov = &raw mut payload;
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut rights).cast();
        header.msg_controllen = size_of::<Rights>() as _;
        // SAFETY: the header points to locals and a constant, of the sizes it states; the kernel only reads them.
        assert_eq!(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, 0) }, 1);
    }

    #[test]
    fn drops_are_those_of_a_full_buffer() {
        let (sender, receiver) = pair("127.0.0.1:0");
        assert_eq!(drops(receiver.as_fd()).unwrap(), 0);
        let sent = 10_000;
        (0..sent).for_each(|_| assert_eq!(sender.send(&[0; 1_000]).unwrap(), 1_000));
        let mut burst = Burst::new(1_000, false);
        let mut read = 0;
        loop {
            match burst.receive(receiver.as_fd()).unwrap() {
                0 => break,
                received => read += received,
            }
        }
        assert_eq!(read + drops(receiver.as_fd()).unwrap() as usize, sent);
        assert!(read < sent, "the default buffer holds fewer than {sent}");
    }

    #[test]
    fn a_call_ends_the_wait_that_follows_it() {
        let wake = Wake::new().unwrap();
        let mut descriptors = [wake.readable()];
        wait(&mut descriptors, Duration::ZERO);
        assert_eq!(descriptors[0].revents, 0);
        wake.wake();
        wake.wake();
        wait(&mut descriptors, Duration::from_secs(60));
        assert_eq!(descriptors[0].revents, libc::POLLIN);
        wake.clear();
        wait(&mut descriptors, Duration::ZERO);
        assert_eq!(descriptors[0].revents, 0);
    }

    #[test]
    fn ipv4_senders_look_the_same_on_an_ipv6_socket() {
        let mut name: sockaddr_storage = zero();
        assert_eq!(address(&name, 0), None);
        // SAFETY: the storage is larger than a `sockaddr_in6` and aligned for it.
        let v6 = unsafe { &mut *(&raw mut name).cast::<sockaddr_in6>() };
        v6.sin6_family = libc::AF_INET6 as _;
        v6.sin6_port = 8125_u16.to_be();
        v6.sin6_addr.s6_addr = Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().octets();
        let length = size_of::<sockaddr_in6>() as socklen_t;
        assert_eq!(address(&name, length), Some("192.0.2.1:8125".parse().unwrap()));
        assert_eq!(address(&name, length - 1), None);
    }
}
