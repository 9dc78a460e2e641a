//! The system calls that the standard library lacks: receive many datagrams at once, wait for several descriptors, wake
//! a thread that waits, and read or set what a socket's buffer holds. It knows no lines and makes no decisions.
//!
//! All of `listen`'s `unsafe` is here. Its invariant: the kernel writes only into memory that [`Kept`] owns, which never
//! moves, or into a local that outlives the call; what is read back was written by the kernel or is zero.
#![allow(unsafe_code, reason = "recvmmsg, ppoll, eventfd and two socket options have no safe form in std or socket2")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::{MaybeUninit, offset_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use libc::{c_int, cmsghdr, iovec, mmsghdr, pollfd, sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t, ucred};

use crate::ingest::Address;

/// Datagrams of one system call, at most.
pub(super) const BURST: usize = 256;

/// Bytes by which the slots of a burst are apart beyond their size: the lines of a full packet. Slots a power of two
/// apart would all compete for the same few sets of the cache.
const STAGGER: usize = 23 * 64;

/// Memory for the datagrams of one system call. Pages are touched only as far as bursts and datagrams reach, so a quiet
/// agent pays for none of the 17 MiB that 256 datagrams of 64 KiB may need.
pub(super) struct Burst {
    slots: Kept<u8>,
    names: Kept<sockaddr_storage>,
    /// For unix sockets.
    controls: Option<Kept<Control>>,
    headers: Kept<mmsghdr>,
    // The headers point into it.
    _iovecs: Kept<iovec>,
    size: usize,
    stride: usize,
    filled: usize,
}

/// One datagram of a burst.
#[derive(Debug)]
pub(super) struct Datagram<'a> {
    /// Its payload, or the beginning of it.
    pub(super) bytes: &'a [u8],
    /// Whether the payload was longer than `bytes`.
    pub(super) truncated: bool,
    /// Who sent it, if the kernel said so.
    pub(super) source: Option<Address>,
}

/// Room for the control message that says which process sent a datagram, and for no other. It comes first, so no room
/// is left for descriptors that somebody sends along, and the kernel gives us none.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control {
    header: cmsghdr,
    process: ucred,
}

/// What the header of that message states as its length: without the padding behind it.
const CONTROL_LENGTH: usize = offset_of!(Control, process) + size_of::<ucred>();

impl Burst {
    /// Room for [`BURST`] datagrams of at most `size` bytes each.
    pub(super) fn new(size: usize) -> Self {
        let stride = size + STAGGER;
        let slots = Kept::new(vec![0; BURST * stride].into_boxed_slice());
        // SAFETY: these are plain C structures for which all bits zero is a value.
        let (names, empty) = unsafe { (vec![zeroed(); BURST], zeroed::<mmsghdr>()) };
        let names: Kept<sockaddr_storage> = Kept::new(names.into_boxed_slice());
        let iovecs = (0..BURST).map(|i| iovec { iov_base: slots.at(i * stride).cast(), iov_len: size });
        let iovecs = Kept::new(iovecs.collect());
        let headers = (0..BURST).map(|i| {
            let mut header = empty;
            header.msg_hdr.msg_name = names.at(i).cast();
            header.msg_hdr.msg_namelen = size_of::<sockaddr_storage>() as socklen_t;
            header.msg_hdr.msg_iov = iovecs.at(i);
            header.msg_hdr.msg_iovlen = 1;
            header
        });
        let headers = Kept::new(headers.collect());
        Self { slots, names, controls: None, headers, _iovecs: iovecs, size, stride, filled: 0 }
    }

    /// The same for a unix socket with SO_PASSCRED: its datagrams have processes as their sources.
    pub(super) fn of_processes(size: usize) -> Self {
        let mut burst = Self::new(size);
        // SAFETY: these are plain C structures for which all bits zero is a value.
        let controls = Kept::new(vec![unsafe { zeroed::<Control>() }; BURST].into_boxed_slice());
        for i in 0..BURST {
            // SAFETY: `i` is below `BURST`, and nobody else has the headers.
            let header = unsafe { &mut (*burst.headers.at(i)).msg_hdr };
            header.msg_control = controls.at(i).cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        burst.controls = Some(controls);
        burst
    }

    /// Receives what a socket holds, at most [`BURST`] datagrams, without waiting. Answers how many there were.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let control_max = if self.controls.is_some() { size_of::<Control>() } else { 0 };
        for i in 0..std::mem::take(&mut self.filled) {
            // The kernel left the lengths of the last sender's address and control message here.
            // SAFETY: `i` is below `BURST`, and `&mut self` means that no datagram of the last call is borrowed.
            let header = unsafe { &mut (*self.headers.at(i)).msg_hdr };
            header.msg_namelen = size_of::<sockaddr_storage>() as socklen_t;
            header.msg_controllen = control_max as _;
        }
        // SAFETY: each header points to a name, an iovec, a slot and perhaps a control message of the sizes it states,
        // all kept until `self` drops.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.at(0),
                BURST as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        match usize::try_from(received) {
            Ok(received) => {
                self.filled = received.min(BURST);
                Ok(self.filled)
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            },
        }
    }

    /// What the last call received, in the order of arrival.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        (0..self.filled).map(|i| self.datagram(i))
    }

    fn datagram(&self, i: usize) -> Datagram<'_> {
        // SAFETY: `i` is below `filled`, so the kernel has written this header, its name and so many bytes of its slot;
        // a control message that it never wrote is zero. It writes again only in `receive`, which needs `&mut self`.
        unsafe {
            let header = &*self.headers.at(i);
            let length = (header.msg_len as usize).min(self.size);
            Datagram {
                bytes: slice::from_raw_parts(self.slots.at(i * self.stride), length),
                truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
                source: match &self.controls {
                    Some(controls) => process(&*controls.at(i), header.msg_hdr.msg_controllen as _),
                    None => address(&*self.names.at(i), header.msg_hdr.msg_namelen).map(Address::Inet),
                },
            }
        }
    }
}

/// Memory to which pointers are kept across calls, and which is therefore reached only through them.
struct Kept<T>(NonNull<[T]>);

impl<T> Kept<T> {
    fn new(memory: Box<[T]>) -> Self {
        Self(NonNull::from(Box::leak(memory)))
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
fn process(control: &Control, written: usize) -> Option<Address> {
    let is_process = (control.header.cmsg_level, control.header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS);
    let process = Address::Process { uid: control.process.uid, pid: control.process.pid.unsigned_abs() };
    (is_process && written >= CONTROL_LENGTH).then_some(process)
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

/// Sets a socket's receive buffer beyond `net.core.rmem_max`, for which CAP_NET_ADMIN is needed.
pub(super) fn force_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    // SAFETY: the kernel reads the size of a `c_int` from a local.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of::<c_int>() as socklen_t,
        )
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

    #[test]
    fn a_burst_is_what_was_sent() {
        let (sender, receiver) = pair("127.0.0.1:0");
        let mut burst = Burst::new(1_000);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 0);
        let sent: Vec<Vec<u8>> = (0..100).map(|i| vec![i as u8; i]).collect();
        // Twice, since the second call meets what the first left behind.
        for _ in 0..2 {
            sent.iter().for_each(|payload| assert_eq!(sender.send(payload).unwrap(), payload.len()));
            assert_eq!(burst.receive(receiver.as_fd()).unwrap(), sent.len());
            for (datagram, payload) in burst.datagrams().zip(&sent) {
                assert_eq!(datagram.bytes, payload);
                assert!(!datagram.truncated);
                assert_eq!(datagram.source, Some(sender.local_addr().unwrap().into()));
            }
        }
    }

    #[test]
    fn more_than_a_burst_takes_two_calls() {
        let (sender, receiver) = pair("[::1]:0");
        (0..BURST + 7).for_each(|_| assert_eq!(sender.send(b"x").unwrap(), 1));
        let mut burst = Burst::new(8);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), BURST);
        assert_eq!(burst.datagrams().count(), BURST);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 7);
        assert!(burst.datagrams().all(|datagram| datagram.source == sender.local_addr().ok().map(Address::Inet)));
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 0);
        assert_eq!(burst.datagrams().count(), 0);
    }

    #[test]
    fn what_does_not_fit_is_marked() {
        let (sender, receiver) = pair("127.0.0.1:0");
        for payload in ["12345678", "123456789", ""] {
            assert_eq!(sender.send(payload.as_bytes()).unwrap(), payload.len());
        }
        let mut burst = Burst::new(8);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 3);
        let seen: Vec<_> = burst.datagrams().map(|datagram| (datagram.bytes, datagram.truncated)).collect();
        assert_eq!(seen, [(&b"12345678"[..], false), (b"12345678", true), (b"", false)]);
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
            let seen: Vec<_> = burst.datagrams().map(|datagram| (datagram.bytes, datagram.source)).collect();
            assert_eq!(seen, [&b"1"[..], b"22", b"12345678"].map(|bytes| (bytes, this_process())));
        }
        // A socket that was not told to ask says nothing.
        socket2::SockRef::from(&receiver).set_passcred(false).unwrap();
        assert_eq!(sender.send(b"1").unwrap(), 1);
        assert_eq!(burst.receive(receiver.as_fd()).unwrap(), 1);
        assert!(burst.datagrams().all(|datagram| datagram.source.is_none()));
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
        assert!(burst.datagrams().all(|datagram| datagram.bytes == b"x" && datagram.source == this_process()));
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
        let mut burst = Burst::new(1_000);
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
        // SAFETY: plain C structures for which all bits zero is a value.
        let mut name: sockaddr_storage = unsafe { zeroed() };
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
