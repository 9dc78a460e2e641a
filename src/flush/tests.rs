//! A model of the hand-over: the workers and the fold as they are, in thousands of orders of their steps.
//!
//! [shuttle](https://docs.rs/shuttle) runs all threads of an execution one step at a time and chooses by a seed who
//! takes the next one; before each step there is a call of [`step`], see `sync`. What is real here: `ingest.rs` whole
//! (who asks, who owes, seal, deliver, give back, retire, close), and of `flush.rs` all that the fold's thread does in
//! a turn. What stands for something that waits for the machine, and mirrors it line by line:
//!
//! - [`Reading::run`] for `Receiver::run` and `finish` of `listen/udp.rs`, with a queue for the socket. It blocks
//!   without a time limit, so that a wake-up which is lost is found: the execution then ends at its most steps.
//! - [`fold`] for the loop of `Folding::run`, and [`flush`] for that of `Flushing::run`, with a map for the journal.
//! - the clock, which a thread of the model moves on.
//!
//! Steps are taken in one order at a time, as by sequentially consistent memory. What orders memory beside the channels
//! is one atomic, `Workers::asked`: an asker adds to it with `Release` after what it sent, and a worker that reads the
//! sum with `Acquire` reads its sockets after that.

use std::collections::VecDeque;
use std::sync::Mutex;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::Condvar;
use shuttle::thread;

use super::*;
use crate::aggregate::Aggregate;
use crate::aggregate::shard;
use crate::ingest::{self, CELLS_OUT, Listener, Question, Rejects, Settings, Source, Times, Worker};
use crate::protocol;
use crate::sample::SeriesKey;
use crate::sync::{step, with_steps};

/// How much there is in an execution.
#[derive(Clone, Copy)]
struct Size {
    workers: usize,
    readers: usize,
    /// How many datagrams each reader sends.
    sent: usize,
    /// How often the clock moves on. All of it is less than [`LATE_MS`], so nobody is too late.
    ticks: u64,
}

/// All that can meet.
const LARGE: Size = Size { workers: 2, readers: 2, sent: 3, ticks: 40 };
/// One of each: of few threads, two are more often where they should not meet.
const SMALL: Size = Size { workers: 1, readers: 1, sent: 6, ticks: 12 };

const TICK_MS: u64 = 7;
const INTERVAL_MS: u64 = 20;
const WINDOW_MS: u64 = 100;
/// Three intervals before a window ends.
const BEGIN_MS: u64 = 1_764_000_000_040;

/// Lets another thread of the model go first, or not.
fn another() {
    thread::sleep(Duration::ZERO);
}

/// One socket and the worker's wake.
#[derive(Default)]
struct Socket {
    queue: Mutex<VecDeque<Vec<u8>>>,
    /// Something came, or somebody woke the worker.
    signal: shuttle::sync::Mutex<bool>,
    came: Condvar,
}

impl Socket {
    fn send(&self, datagram: String) {
        step();
        self.queue.lock().unwrap().push_back(datagram.into_bytes());
        self.wake();
    }

    fn receive(&self) -> Option<Vec<u8>> {
        step();
        self.queue.lock().unwrap().pop_front()
    }

    fn wake(&self) {
        *self.signal.lock().unwrap() = true;
        self.came.notify_one();
    }

    fn block(&self) {
        let signal = self.signal.lock().unwrap();
        *self.came.wait_while(signal, |came| !*came).unwrap() = false;
    }
}

/// What all threads of an execution share.
struct Model {
    size: Size,
    workers: Arc<Workers>,
    ledger: Arc<Ledger>,
    sockets: Vec<Arc<Socket>>,
    /// When each worker read each of its datagrams.
    read: Vec<Mutex<Vec<u64>>>,
    /// The journal.
    kept: Arc<Mutex<HashMap<SeriesId, Total>>>,
    ends: AtomicU64,
}

impl Model {
    fn new(size: Size) -> (Arc<Self>, Folding, Fold) {
        clock::MODEL_MS.set(Some(BEGIN_MS));
        let ledger = Arc::new(Ledger::new(WINDOW_MS));
        let budget = Arc::new(Budget::beside(Arc::clone(&ledger), &shard::Limits::default(), false));
        let settings =
            Settings { protocol: protocol::Config::default(), limits: protocol::Limits::default(), mapping: None };
        let rejects = Arc::new(Rejects::new(&ingest::Limits::default()));
        let times = Times { interval_ms: INTERVAL_MS, window_ms: WINDOW_MS };
        let (workers, deliveries) = Workers::new(settings, Arc::clone(&budget), rejects, times);
        let parts = Parts {
            workers: Arc::clone(&workers),
            deliveries,
            ledger: Arc::clone(&ledger),
            budget,
            journal: None,
            remote: false,
            exact: false,
            on_commit: Box::new(|_| {}),
        };
        let config = Config {
            interval: Time::millis(INTERVAL_MS),
            window: Time::millis(WINDOW_MS),
            etsy: etsy::Config::default(),
        };
        // Whatever is not of this very moment is idle.
        let limits = Limits { idle: Time::millis(1), idle_gauges: Time::millis(1) };
        let (orders, inbox) = unbounded();
        let status = Arc::new(Status::default());
        let mut folding = Folding::new(parts, inbox, Arc::clone(&status), &config, &limits).unwrap();
        let kept = Arc::new(Mutex::new(HashMap::new()));
        let journal = Arc::clone(&kept);
        folding.recall = Box::new(move |id| {
            // Half of a delivery is folded, perhaps.
            step();
            journal.lock().unwrap().get(id).cloned()
        });
        let sockets = (0..size.workers).map(|_| Arc::default()).collect();
        let read = (0..size.workers).map(|_| Mutex::default()).collect();
        let model = Self { size, workers, ledger, sockets, read, kept, ends: AtomicU64::new(0) };
        (Arc::new(model), folding, Fold { orders, status })
    }

    /// The count of a series, as a reader finds it: here, or in the journal when it is idle.
    fn count(&self, name: &str) -> usize {
        let id = SeriesId { kind: Kind::Counter, key: SeriesKey::parse(name) };
        let counted = |aggregate: &Aggregate| match aggregate {
            Aggregate::Counter(counter) => counter.increments.value() as usize,
            Aggregate::Gauge(_) | Aggregate::Observed(_) | Aggregate::Set(_) | Aggregate::Meter(_) => 0,
        };
        let held = self.ledger.get(&id).map(|series| counted(&series.total().aggregate));
        held.or_else(|| self.kept.lock().unwrap().get(&id).map(|total| counted(&total.aggregate))).unwrap_or(0)
    }
}

/// A worker of one socket.
struct Reading {
    number: usize,
    worker: Worker,
    socket: Arc<Socket>,
    model: Arc<Model>,
}

impl Reading {
    fn run(mut self) {
        while self.model.ends.load(Ordering::Acquire) == 0 {
            let more = self.read_one();
            let question = self.worker.question();
            if self.worker.owes(question) {
                while self.read_one() {}
            }
            self.turn(question);
            if self.worker.owes(question) {
                // It tries again in a moment, whether it is woken or not.
                thread::yield_now();
            } else if !more {
                self.socket.block();
            }
        }
        while self.read_one() {
            self.turn(Question::default());
        }
        self.worker.close();
    }

    fn read_one(&mut self) -> bool {
        let Some(datagram) = self.socket.receive() else { return false };
        self.worker.stamp();
        self.worker.datagram(&datagram, Source { listener: Listener::Udp, address: None });
        self.model.read[self.number].lock().unwrap().push(clock::wall_ms());
        true
    }

    fn turn(&mut self, question: Question) {
        self.worker.turn(question);
    }
}

/// Sends, asks, and looks whether that is there.
fn send_and_read(number: usize, model: &Model, readers: &Fold) {
    let own = format!("of.{number}");
    let mut seen = 0;
    for sent in 1..=model.size.sent {
        let worker = (number + sent) % model.size.workers;
        model.sockets[worker].send(format!("all:1|c\nby.{worker}:1|c\n{own}:1|c"));
        shuttle::future::block_on(readers.fresh());
        assert_eq!(
            model.count(&own),
            sent,
            "a reader does not see what was accepted before it asked, or sees it twice"
        );
        let all = model.count("all");
        assert!(all >= seen.max(sent), "a counter fell from {seen} to {all}");
        seen = all;
    }
}

fn fold(mut folding: Folding, model: &Model) {
    while !folding.is_done() {
        // Real time is not waited for.
        folding.readers.opened = None;
        folding.next_expiry = Instant::now();
        take_one(&mut folding, model);
        folding.do_what_is_due();
        is_complete(&folding, model);
        thread::yield_now();
    }
    while folding.jobs.as_ref().is_some_and(Sender::is_full) {
        thread::yield_now();
    }
    folding.finish();
}

/// Of what waits in two channels one is taken, either of them.
fn take_one(folding: &mut Folding, model: &Model) {
    let is_order = thread_rng().r#gen::<bool>();
    if is_order && let Ok(order) = folding.orders.try_recv() {
        folding.obey(order);
    } else if let Ok(delivery) = folding.deliveries.try_recv() {
        folding.fold(delivery);
    }
    let waiting = folding.deliveries.len();
    // The last delivery of a worker is not held back.
    let most = CELLS_OUT + usize::from(model.ends.load(Ordering::Acquire) > 0);
    assert!(waiting <= model.size.workers * most, "{waiting} cells wait");
}

/// What workers read before the moment until which the fold is complete is in the ledger.
fn is_complete(folding: &Folding, model: &Model) {
    let complete_ms = folding.complete_until(clock::wall_ms());
    for worker in 0..model.size.workers {
        let read = model.read[worker].lock().unwrap().iter().filter(|read_ms| **read_ms < complete_ms).count();
        let held = model.count(&format!("by.{worker}"));
        assert!(held >= read, "worker {worker} read {read} before {complete_ms}, and {held} are there");
    }
}

fn flush(jobs: &Receiver<Job>, model: &Model, status: &Status) {
    loop {
        match jobs.try_recv() {
            Ok(job) => {
                for changed in &job.changed {
                    let total = Total::clone(&changed.series.total());
                    step();
                    model.kept.lock().unwrap().insert(changed.series.id().clone(), total);
                }
                status.flush.store(job.flush, Ordering::Release);
            }
            Err(error) if error.is_disconnected() => return,
            Err(_) => thread::yield_now(),
        }
    }
}

/// One execution: senders that read, workers, the fold, the flush, and time, which ends when all is read.
fn execution(size: Size) {
    let (model, mut folding, readers) = Model::new(size);
    let workers: Vec<_> = (0..size.workers)
        .map(|number| {
            let socket = Arc::clone(&model.sockets[number]);
            let woken = Arc::clone(&socket);
            let worker = model.workers.register(move || woken.wake());
            let reading = Reading { number, worker, socket, model: Arc::clone(&model) };
            thread::spawn(move || reading.run())
        })
        .collect();
    let (jobs, taken) = bounded(1);
    folding.jobs = Some(jobs);
    let shared = || (Arc::clone(&model), readers.clone());
    let (of_fold, _) = shared();
    let fold = thread::spawn(move || fold(folding, &of_fold));
    let (of_flush, committed) = shared();
    let flush = thread::spawn(move || flush(&taken, &of_flush, &committed.status));
    let senders: Vec<_> = (0..size.readers)
        .map(|number| {
            let (model, readers) = shared();
            thread::spawn(move || send_and_read(number, &model, &readers))
        })
        .collect();
    let sockets = model.sockets.clone();
    let time = thread::spawn(move || {
        for _ in 0..size.ticks {
            step();
            clock::MODEL_MS.set(clock::MODEL_MS.get().map(|now_ms| now_ms + TICK_MS));
            // As a wait that ends because a seal is due.
            sockets.iter().for_each(|socket| socket.wake());
        }
    });
    senders.into_iter().chain([time]).for_each(|thread| thread.join().unwrap());
    model.sockets[0].send("all:1|c\nlate:1|c".to_owned());
    model.ends.store(1, Ordering::Release);
    model.sockets.iter().for_each(|socket| socket.wake());
    drop(readers.orders.send(Order::Stop(Instant::now() + Duration::from_secs(3_600))));
    workers.into_iter().for_each(|thread| thread.join().unwrap());
    [fold, flush].into_iter().for_each(|thread| thread.join().unwrap());
    let kept = |name: &str| {
        let id = SeriesId { kind: Kind::Counter, key: SeriesKey::parse(name) };
        model.kept.lock().unwrap().get(&id).map(|total| total.aggregate.samples() as usize)
    };
    assert_eq!(kept("all"), Some(size.readers * size.sent + 1), "lost, or counted twice");
    assert_eq!(kept("late"), Some(1), "what came before the end is lost");
}

#[test]
fn a_worker_that_has_delivered_nothing_holds_windows_open() {
    let (model, mut folding, _readers) = Model::new(LARGE);
    let mut workers: Vec<_> = (0..LARGE.workers).map(|_| model.workers.register(|| {})).collect();
    let complete = |folding: &mut Folding| {
        while let Ok(delivery) = folding.deliveries.try_recv() {
            folding.fold(delivery);
        }
        folding.complete_until(clock::wall_ms())
    };
    clock::MODEL_MS.set(Some(BEGIN_MS + INTERVAL_MS));
    assert_eq!(complete(&mut folding), BEGIN_MS);
    // Whichever is first.
    for worker in workers.iter_mut().rev() {
        assert_eq!(complete(&mut folding), BEGIN_MS);
        worker.turn(Question::default());
    }
    assert_eq!(complete(&mut folding), BEGIN_MS + INTERVAL_MS);
    clock::MODEL_MS.set(None);
}

fn check(size: Size, scheduler: impl Scheduler + 'static) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 19;
    config.max_steps = shuttle::MaxSteps::FailAfter(200_000);
    with_steps(another, || {
        shuttle::Runner::new(scheduler, config).run(move || execution(size));
    });
    clock::MODEL_MS.set(None);
}

#[test]
fn nothing_is_lost_counted_twice_or_told_too_early_in_any_order_of_steps() {
    check(LARGE, RandomScheduler::new(300));
    check(SMALL, RandomScheduler::new(1_000));
}

/// The same in orders that let one thread run far ahead of the others, or starve.
#[test]
fn nothing_is_lost_counted_twice_or_told_too_early_when_threads_starve() {
    check(LARGE, PctScheduler::new(4, 100));
    check(SMALL, PctScheduler::new(4, 500));
}
