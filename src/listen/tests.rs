//! Listeners from outside: real sockets on free ports, real workers, and what their seals deliver.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::burst::Outgoing;
use super::*;
use crate::aggregate::{self, Aggregate};
use crate::clock;
use crate::ingest::{Delivery, Rejects, Returned, Settings, Times};
use crate::inherited::Inherited;
use crate::protocol;
use crate::sample::Reason;
use crate::sync::Receiver;

fn no_tls() -> tls::Acceptor {
    tls::Acceptor::new(None, Duration::ZERO)
}

/// Seals come only when they are asked for.
const RARELY: Times = Times { interval_ms: 3_600_000, window_ms: 3_600_000 };

/// A wait that fails the test.
const DEADLINE: Duration = Duration::from_secs(20);

/// Workers with their listeners, and what became of all that was sent.
struct House {
    workers: Arc<Workers>,
    deliveries: Receiver<Delivery>,
    rejects: Arc<Rejects>,
    listeners: Option<Listeners>,
    names: HashMap<(usize, u32), String>,
    totals: HashMap<String, f64>,
    answers: Vec<u64>,
    closed: usize,
}

fn free(listener: &str) -> Config {
    let address = |name| if name == listener { vec!["127.0.0.1:0".to_owned()] } else { Vec::new() };
    Config { udp: address("udp"), tcp: address("tcp"), workers: 2, ..Config::default() }
}

impl House {
    fn open(config: &Config, limits: &Limits) -> Self {
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let budget = Arc::new(aggregate::shard::Budget::new(&aggregate::shard::Limits::default()));
        let rejects = Arc::new(Rejects::new(&crate::ingest::Limits { reject_log: 1_000 }));
        let (workers, deliveries) = Workers::new(settings, budget, Arc::clone(&rejects), RARELY);
        let nothing = &mut Inherited::default();
        let listeners = start(config, limits, no_tls(), &workers, nothing, |_worker, _ends| async {}).unwrap();
        let answers = vec![0; workers.len()];
        let (names, totals) = (HashMap::new(), HashMap::new());
        Self { workers, deliveries, rejects, listeners: Some(listeners), names, totals, answers, closed: 0 }
    }

    /// The addresses of a listener.
    fn bound(&self, listener: Listener) -> Vec<SocketAddr> {
        let bound = self.listeners.as_ref().unwrap().bound().iter().filter(|(name, _)| *name == listener);
        bound.map(|(_, address)| address.to_string().parse().unwrap()).collect()
    }

    fn udp(&self) -> SocketAddr {
        self.bound(Listener::Udp)[0]
    }

    fn tcp(&self) -> SocketAddr {
        self.bound(Listener::Tcp)[0]
    }

    fn fold(&mut self, mut delivery: Delivery) {
        for new in delivery.sealed.new.drain(..) {
            self.names.insert((delivery.worker, new.number), new.id.key.to_string());
        }
        for (number, cell) in delivery.sealed.cells.take() {
            let name = self.names[&(delivery.worker, number)].clone();
            match cell {
                Aggregate::Counter(counter) => *self.totals.entry(name).or_default() += counter.increments.value(),
                Aggregate::Gauge(gauge) => drop(self.totals.insert(name, gauge.set.unwrap().1 as f64)),
                other @ (Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_)) => {
                    panic!("the tests send no {other:?}")
                }
            }
        }
        self.answers[delivery.worker] = delivery.answers;
        self.closed += usize::from(delivery.last);
        self.workers.give_back(delivery.worker, Returned::Cells(delivery.sealed.cells));
    }

    /// Waits for a seal of every worker that began after this call, and says how much of a series came in all.
    fn total(&mut self, name: &str) -> f64 {
        let asked = self.workers.ask();
        while self.answers.iter().any(|answers| *answers < asked) {
            let delivery = self.deliveries.recv_timeout(DEADLINE).expect("a seal");
            self.fold(delivery);
        }
        self.totals.get(name).copied().unwrap_or(0.0)
    }

    fn eventually(&mut self, name: &str, total: f64) {
        let deadline = Instant::now() + DEADLINE;
        while self.total(name) < total {
            assert!(Instant::now() < deadline, "{name} is {:?} instead of {total}", self.totals.get(name));
        }
        assert_eq!(self.total(name), total);
    }

    fn eventually_there(&mut self, name: &str) {
        let deadline = Instant::now() + DEADLINE;
        while self.total(name) == 0.0 {
            assert!(Instant::now() < deadline, "nothing of {name}");
        }
    }

    fn rejected(&self) -> Vec<(Reason, String)> {
        self.rejects.last().into_iter().map(|line| (line.reason, line.line)).collect()
    }

    fn stop(&mut self, grace: Duration) {
        self.listeners.take().unwrap().stop(grace);
        while let Ok(delivery) = self.deliveries.try_recv() {
            self.fold(delivery);
        }
        assert_eq!(self.closed, self.answers.len(), "each worker delivers its last");
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if let Some(listeners) = self.listeners.take() {
            listeners.stop(Duration::ZERO);
        }
    }
}

fn sender(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((to.ip(), 0)).unwrap();
    socket.connect(to).unwrap();
    socket
}

fn dial(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Waits until the other side has closed a stream.
fn closed(mut stream: TcpStream) {
    match stream.read(&mut [0; 16]) {
        Ok(0) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        other => panic!("{other:?} instead of the end"),
    }
}

/// Where a unix socket of a test is, and the configuration that names it.
fn unix(listener: Listener) -> (tempfile::TempDir, PathBuf, Config) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut config = free("none");
    if listener == Listener::Unix { &mut config.unix } else { &mut config.unixgram }.push(path.clone());
    (directory, path, config)
}

#[test]
fn datagrams_of_a_unix_socket_are_read_like_those_of_udp() {
    let (_directory, path, config) = unix(Listener::Unixgram);
    let mut house = House::open(&config, &Limits { datagram: Size(20), ..Limits::default() });
    let sender = UnixDatagram::unbound().unwrap();
    sender.connect(&path).unwrap();
    // More than the kernel holds: the sender waits for the worker.
    for _ in 0..1_000 {
        sender.send(b"n:1|c\nm:2|c").unwrap();
    }
    sender.send(b"long:1|c\nlong:1|c\nlong:1|c").unwrap();
    assert_eq!(house.total("n"), 1_000.0);
    assert_eq!((house.totals["m"], house.totals.get("long")), (2_000.0, None));
    sender.send(b"last:1|c").unwrap();
    house.stop(DEADLINE);
    assert_eq!(house.totals["last"], 1.0);
    assert!(!path.exists());
}

fn framed(packet: &[u8]) -> Vec<u8> {
    [&(packet.len() as u32).to_le_bytes(), packet].concat()
}

#[test]
fn packets_of_a_unix_stream_are_read_like_datagrams() {
    let (_directory, path, config) = unix(Listener::Unix);
    let mut house = House::open(&config, &Limits { datagram: Size(20), ..Limits::default() });
    let mut stream = UnixStream::connect(&path).unwrap();
    let packets = [framed(b"n:1|c\nm:2|c"), framed(&[b'x'; 21]), framed(b""), framed(b"n:4|c")].concat();
    for part in packets.chunks(7) {
        stream.write_all(part).unwrap();
    }
    house.eventually("n", 5.0);
    assert_eq!(house.totals["m"], 2.0);
    stream.write_all(&framed(b"n:8|c")[..6]).unwrap();
    drop(stream);
    // Text is lines at the beginning of a stream only.
    let mut text = UnixStream::connect(&path).unwrap();
    text.write_all(&[&framed(b"n:16|c"), b"n:1|c\n".as_slice()].concat()).unwrap();
    text.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(text.read(&mut [0; 1]).unwrap_or(0), 0, "closed: there is no length");
    house.stop(DEADLINE);
    assert_eq!(house.totals["n"], 21.0);
    let mut reasons: Vec<_> = house.rejected().into_iter().map(|(reason, _)| reason).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, [Reason::LineTooLong, Reason::PartialLine, Reason::BadLength]);
    assert!(!path.exists());
}

#[test]
fn a_unix_stream_that_begins_with_text_is_lines() {
    let (_directory, path, config) = unix(Listener::Unix);
    let mut house = House::open(&config, &Limits::default());
    for size in 1..=9 {
        let mut stream = UnixStream::connect(&path).unwrap();
        for part in "n:1|c\nn:2|c\r\nh\u{e9}:1|c\nn:4|c".as_bytes().chunks(size) {
            stream.write_all(part).unwrap();
        }
    }
    // The end of a stream ends its last line.
    house.eventually("n", 63.0);
    // The ends of lines and tabs are text too.
    for text in [b"\nm:1|c\n".as_slice(), b"\r\n\r\nm:2|c\n", b"x\nm:4|c\n", b"a\tb:1|c\nm:8|c\n"] {
        UnixStream::connect(&path).unwrap().write_all(text).unwrap();
    }
    house.eventually("m", 15.0);
    let mut request = UnixStream::connect(&path).unwrap();
    request.write_all(b"POST / HTTP/1.1\r\nn:1|c\n").unwrap();
    request.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(request.read(&mut [0; 1]).unwrap_or(0), 0, "closed: what speaks HTTP may be made to by a page");
    UnixStream::connect(&path).unwrap().write_all(b"n:1").unwrap();
    house.stop(DEADLINE);
    assert_eq!(house.totals["n"], 63.0);
    let reasons: Vec<_> = house.rejected().into_iter().map(|(reason, _)| reason).collect();
    assert!(!reasons.contains(&Reason::BadLength), "{reasons:?}");
    assert!([Reason::PartialLine, Reason::HttpRequest].iter().all(|reason| reasons.contains(reason)), "{reasons:?}");
}

#[test]
fn what_was_sent_before_a_question_is_in_its_answer() {
    let mut config = free("udp");
    config.udp.push("[::1]:0".to_owned());
    let mut house = House::open(&config, &Limits::default());
    let addresses = house.bound(Listener::Udp);
    let senders: Vec<_> = (0..16).map(|i| sender(addresses[i % 2])).collect();
    let mut sent = 0.0;
    for round in 0..200 {
        for sender in &senders {
            for _ in 0..round % 7 {
                assert_eq!(sender.send(b"n:1|c\nm:2|c").unwrap(), 11);
                sent += 1.0;
            }
        }
        assert_eq!(house.total("n"), sent, "round {round}");
    }
    assert_eq!(house.totals["m"], 2.0 * sent);
    assert!(sent > 5_000.0);
}

#[test]
fn so_is_what_streams_sent() {
    let mut house = House::open(&free("tcp"), &Limits::default());
    let mut streams: Vec<_> = (0..8).map(|_| dial(house.tcp())).collect();
    let mut sent = 0.0;
    for round in 0..200 {
        for stream in &mut streams[round % 7..] {
            stream.write_all(b"n:1|c\nm:2|c\n").unwrap();
            sent += 1.0;
        }
        if round % 10 == 0 {
            streams.rotate_left(1);
            streams[0] = dial(house.tcp());
        }
        assert_eq!(house.total("n"), sent, "round {round}");
    }
    assert_eq!(house.totals["m"], 2.0 * sent);
}

/// Readings of a gauge that come by several workers are put in order by their times.
#[test]
fn a_reading_has_the_time_of_its_read() {
    for listener in ["udp", "tcp"] {
        let mut house = House::open(&free(listener), &Limits::default());
        assert_eq!(house.total("g"), 0.0);
        let begun = clock::wall_ms();
        while clock::wall_ms() == begun {
            thread::yield_now();
        }
        match listener {
            "udp" => drop(sender(house.udp()).send(b"g:1|g").unwrap()),
            _ => dial(house.tcp()).write_all(b"g:1|g\n").unwrap(),
        }
        house.eventually_there("g");
        assert!(house.totals["g"] > begun as f64, "{listener}");
    }
}

#[test]
fn more_than_a_burst_at_once_is_counted_whole() {
    let mut house = House::open(&free("udp"), &Limits::default());
    let sender = sender(house.udp());
    // As much as an unprivileged buffer holds, in one go, to one worker.
    for _ in 0..300 {
        assert_eq!(sender.send(b"n:1|c").unwrap(), 5);
    }
    assert_eq!(house.total("n"), 300.0);
}

#[test]
fn truncated_datagrams_are_dropped_whole() {
    let limits = Limits { datagram: Size(8), ..Limits::default() };
    let mut house = House::open(&free("udp"), &limits);
    let sender = sender(house.udp());
    for line in ["n:1|c", "n:1|c\nm:1|c", "nn:345|c", "n:1|c"] {
        assert_eq!(sender.send(line.as_bytes()).unwrap(), line.len());
    }
    assert_eq!(house.total("n"), 2.0);
    assert_eq!(house.totals.get("m"), None);
    assert_eq!(house.totals["nn"], 345.0);
}

/// Several senders to both families, whose last datagrams are shorter and whose others may be too long by themselves.
#[test]
fn trains_are_read_like_datagrams() {
    let mut config = Config { udp_gro: true, ..free("udp") };
    config.udp.push("[::1]:0".to_owned());
    let mut house = House::open(&config, &Limits { datagram: Size(12), ..Limits::default() });
    let trains = [("n:1|c\nm:2|c", "n:4|c"), ("a:1|c\nbb:1|c", "n:8|c"), ("ccc:1|c\nd:1|c", "n:16|c")];
    let trains = trains.map(|(many, last)| ([&many.repeat(20), last].concat(), many.len() as u16));
    let addresses = house.bound(Listener::Udp);
    let senders: Vec<_> = (0..6).map(|i| sender(addresses[i % 2])).collect();
    for _ in 0..5 {
        for (bytes, segment) in &trains {
            let train = Outgoing { bytes: bytes.as_bytes(), segment: *segment };
            senders.iter().for_each(|sender| assert_eq!(burst::send(sender.as_fd(), &[train]).unwrap(), 1));
        }
    }
    assert_eq!(house.total("n"), 30.0 * f64::from(20 + 4 + 8 + 16));
    assert_eq!(["m", "a", "bb"].map(|name| house.totals[name]), [30.0 * 40.0, 30.0 * 20.0, 30.0 * 20.0]);
    assert_eq!(["ccc", "d"].map(|name| house.totals.get(name)), [None; 2], "13 bytes are too many");
    house.stop(DEADLINE);
}

#[test]
fn an_idle_worker_is_woken_by_a_question() {
    let mut config = free("udp");
    config.tcp = vec!["127.0.0.1:0".to_owned()];
    let mut house = House::open(&config, &Limits::default());
    let begun = Instant::now();
    // Of themselves the workers would look up once a second.
    for _ in 0..20 {
        assert_eq!(house.total("n"), 0.0);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "20 answers took {:?}", begun.elapsed());
}

#[test]
fn a_stop_reads_what_the_kernel_holds() {
    let mut config = free("udp");
    config.tcp = vec!["127.0.0.1:0".to_owned()];
    for round in 0..20 {
        let mut house = House::open(&config, &Limits::default());
        let datagrams = sender(house.udp());
        let mut stream = dial(house.tcp());
        for _ in 0..100 {
            assert_eq!(datagrams.send(b"u:1|c").unwrap(), 5);
        }
        stream.write_all(&b"t:1|c\n".repeat(5_000)).unwrap();
        stream.write_all(b"t:1").unwrap();
        house.stop(DEADLINE);
        assert_eq!(house.totals.get("u"), Some(&100.0), "round {round}");
        assert_eq!(house.totals.get("t"), Some(&5_000.0), "round {round}");
        assert_eq!(house.rejected(), [(Reason::PartialLine, "t:1".to_owned())], "round {round}");
        closed(stream);
    }
}

#[test]
fn senders_that_go_on_put_no_stop_off() {
    let mut config = free("udp");
    config.tcp = vec!["127.0.0.1:0".to_owned()];
    let mut house = House::open(&config, &Limits::default());
    let (udp, tcp) = (sender(house.udp()), dial(house.tcp()));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut tcp = tcp;
            while !over.load(Ordering::Relaxed) {
                // Once nobody listens, both fail.
                drop(udp.send(b"u:1|c"));
                drop(tcp.write_all(b"t:1|c\n"));
            }
        });
        house.eventually_any("u");
        house.eventually_any("t");
        let begun = Instant::now();
        house.stop(DEADLINE);
        let took = begun.elapsed();
        over.store(true, Ordering::Relaxed);
        assert!(took < DEADLINE / 2, "the stop took {took:?}");
    });
}

impl House {
    fn eventually_any(&mut self, name: &str) {
        let deadline = Instant::now() + DEADLINE;
        while self.total(name) == 0.0 {
            assert!(Instant::now() < deadline, "no {name}");
        }
    }
}

#[test]
fn what_runs_beside_has_the_worker_of_the_streams() {
    let settings =
        Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
    let budget = Arc::new(aggregate::shard::Budget::new(&aggregate::shard::Limits::default()));
    let rejects = Arc::new(Rejects::new(&crate::ingest::Limits::default()));
    let (workers, deliveries) = Workers::new(settings, budget, rejects, RARELY);
    let config = Config { workers: 1, ..free("") };
    let beside = |worker: Rc<RefCell<Worker>>, mut ends: watch::Receiver<bool>| async move {
        let source = crate::ingest::Source { listener: Listener::Http, address: None };
        worker.borrow_mut().line(b"n:1|c", source);
        ends.wait_for(|ends| *ends).await.unwrap();
        worker.borrow_mut().line(b"n:1|c", source);
        // A task that never ends is dropped with what it owns.
        tokio::task::spawn_local(async move {
            let _owned = worker;
            std::future::pending::<()>().await;
        });
    };
    let listeners = start(&config, &Limits::default(), no_tls(), &workers, &mut Inherited::default(), beside).unwrap();
    listeners.stop(DEADLINE);
    let mut last = deliveries.try_iter().last().unwrap();
    assert!(last.last);
    let cells: Vec<_> = last.sealed.cells.take().into_iter().collect();
    assert!(matches!(&cells[..], [(_, Aggregate::Counter(counter))] if counter.increments.value() == 2.0), "{cells:?}");
}

#[test]
fn a_stream_may_be_cut_anywhere() {
    let script = b"n:1|c\r\nn:2|c\n\nn:4|c|#a:b\nn:8|c";
    let mut house = House::open(&free("tcp"), &Limits::default());
    for cut in 0..=script.len() {
        let mut stream = dial(house.tcp());
        stream.write_all(&script[..cut]).unwrap();
        if cut % 3 == 0 {
            // Often enough the reader has the first part before the second is there.
            house.total("n");
        }
        stream.write_all(&script[cut..]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        closed(stream);
    }
    let cuts = script.len() as f64 + 1.0;
    house.eventually("n", 11.0 * cuts);
    assert_eq!(house.totals["n;a=b"], 4.0 * cuts);
    assert_eq!(house.rejected(), []);
}

#[test]
fn long_lines_are_refused_once_and_the_stream_goes_on() {
    let mut house = House::open(&free("tcp"), &Limits::default());
    let mut stream = dial(house.tcp());
    stream.write_all(b"n:1|c\n").unwrap();
    stream.write_all(&[b'x'; 100_000]).unwrap();
    stream.write_all(b"\nn:1|c\nlast:1|c").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    closed(stream);
    house.eventually("n", 2.0);
    assert_eq!(house.total("last"), 1.0);
    let reasons: Vec<_> = house.rejected().into_iter().map(|(reason, _)| reason).collect();
    assert_eq!(reasons, [Reason::LineTooLong]);
}

#[test]
fn a_client_of_http_is_counted_and_closed() {
    let mut house = House::open(&free("tcp"), &Limits::default());
    let mut stream = dial(house.tcp());
    stream.write_all(b"POST / HTTP/1.1\r\nHost: localhost:8125\r\nContent-Length: 6\r\n\r\nn:1|c\n").unwrap();
    closed(stream);
    assert_eq!(house.total("n"), 0.0);
    assert_eq!(house.rejected().len(), 1);
    assert_eq!(house.rejected()[0].0, Reason::HttpRequest);
}

#[test]
fn silent_streams_are_closed() {
    let limits = Limits { stream_idle: Time::millis(50), ..Limits::default() };
    let mut house = House::open(&free("tcp"), &limits);
    let mut stream = dial(house.tcp());
    stream.write_all(b"n:1|c\n").unwrap();
    closed(stream);
    assert_eq!(house.total("n"), 1.0);
    assert_eq!(house.rejected(), []);
}

#[test]
fn a_line_must_be_ended_in_time_however_busy_its_stream() {
    let limits = Limits { partial_line: Time::millis(50), ..Limits::default() };
    let mut house = House::open(&free("tcp"), &limits);
    let mut stream = dial(house.tcp());
    stream.write_all(b"n:1|c\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let begun = Instant::now();
    // One byte more each millisecond, and no end of the line.
    while stream.write_all(b"x").is_ok() && stream.read(&mut [0]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
    {
        assert!(begun.elapsed() < DEADLINE);
    }
    assert!(begun.elapsed() >= Duration::from_millis(50));
    assert_eq!(house.total("n"), 1.0);
    let rejected = house.rejected();
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0].0, Reason::PartialLine);
    assert!(rejected[0].1.starts_with('x'));
}

#[test]
fn connections_are_limited_in_all_and_for_each_address() {
    fn dial_from(from: &str, to: SocketAddr) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(from.parse().unwrap(), 0).into()).unwrap();
        socket.connect(&to.into()).unwrap();
        let stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }
    let limits = Limits { connections: 3, connections_per_address: 2, ..Limits::default() };
    let mut house = House::open(&free("tcp"), &limits);
    let to = house.tcp();
    let mut open: Vec<_> = ["127.0.0.1", "127.0.0.1", "127.0.0.2"].map(|from| dial_from(from, to)).into();
    let mut heard = 0.0;
    let mut hear = |house: &mut House, streams: &mut Vec<TcpStream>| {
        for stream in streams {
            stream.write_all(b"n:1|c\n").unwrap();
            heard += 1.0;
        }
        house.eventually("n", heard);
    };
    hear(&mut house, &mut open);
    // One too many of its address, and of all.
    closed(dial_from("127.0.0.1", to));
    closed(dial_from("127.0.0.2", to));
    closed(dial_from("127.0.0.3", to));
    hear(&mut house, &mut open);
    // A seat that was given back is another's.
    let gone = open.remove(0);
    gone.shutdown(Shutdown::Write).unwrap();
    closed(gone);
    open.push(dial_from("127.0.0.3", to));
    hear(&mut house, &mut open);
}
