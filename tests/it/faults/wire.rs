//! The wire to Redis fails: answers are lost, connections end at any byte, what was given up arrives late.

use std::net::Shutdown;
use std::sync::atomic::Ordering;

use super::{Load, Message, Wire, begin, exact, missing, shipping, start};
use crate::agent::{Agent, until};
use crate::redis_servers::Server;

#[test]
fn an_answer_lost_after_the_batch_was_applied_counts_nothing_twice() {
    let redis = Server::persistent();
    let wire = Wire::to(&redis);
    // It must not give the connection up before it is cut.
    let mut settings = shipping(&wire.url());
    settings.push("limits.redis_reply=60s".to_owned());
    let (agent, load) = (begin(&settings), Load::default());
    for _ in 0..5 {
        load.send_all(&agent, 20);
        exact(&[&agent], &redis, &load);
        // The store has all of it, and the agent may still wait for an answer that says so; without that it sends no more.
        until("all answers", || (agent.own("tallyd_outbox_unsent_batches", "") == 0.0).then_some(()));
        wire.silence();
        let before = load.samples();
        load.send_all(&agent, 20);
        // The first of each partition, which may have the samples of one request alone; the second waits for an answer.
        let sent = load.samples() - before;
        until("batches to be applied", || (missing(&redis, &load).samples < sent).then_some(()));
        assert!(agent.own("tallyd_outbox_unsent_batches", "") > 0.0, "the agent knows of no answer");
        wire.cut();
    }
    exact(&[&agent], &redis, &load);
}

/// Of a small batch's request and of its answer each byte is once the last to arrive.
#[test]
fn a_connection_cut_at_any_byte_of_a_batch_counts_nothing_twice() {
    const LANES: u64 = 10;
    let redis = Server::persistent();
    let lanes: Vec<_> = (0..LANES).map(|_| Wire::to(&redis)).collect();
    let agents: Vec<_> = lanes.iter().map(|wire| start(&wire.url())).collect();
    let load = Load::default();
    let cuts: u64 = std::thread::scope(|scope| {
        let lane = |lane: usize| cut_at_each(&lanes[lane], &agents[lane], &load, lane as u64, LANES);
        let running: Vec<_> = (0..lanes.len()).map(|number| scope.spawn(move || lane(number))).collect();
        running.into_iter().map(|lane| lane.join().unwrap()).sum()
    });
    assert!(cuts > 350, "only {cuts} places to cut at");
    let agents: Vec<_> = agents.iter().collect();
    exact(&agents, &redis, &load);
}

/// Cuts at every `lanes`th byte from `first` on, and answers how often.
fn cut_at_each(wire: &Wire, agent: &Agent, load: &Load, first: u64, lanes: u64) -> u64 {
    let name = format!("lane{first}");
    let mut cuts = 0;
    for message in [Message::Batch, Message::Applied] {
        let mut after = first;
        loop {
            let length = wire.cut_next(message, after, || load.count(agent, &name));
            cuts += 1;
            if after >= length {
                break;
            }
            after += lanes;
        }
    }
    cuts
}

#[test]
fn what_was_given_up_and_arrives_after_the_reconnect_counts_nothing_twice() {
    let redis = Server::persistent();
    let wire = Wire::to(&redis);
    let (agent, load) = (start(&wire.url()), Load::default());
    for _ in 0..5 {
        load.send_all(&agent, 10);
        exact(&[&agent], &redis, &load);
        let old = wire.hold();
        let seen = |of_answers: bool| -> u64 {
            let directions = old.iter().map(|line| if of_answers { &line.answers } else { &line.requests });
            directions.map(|direction| direction.seen.load(Ordering::SeqCst)).sum()
        };
        let (requests, answers) = (seen(false), seen(true));
        load.send_all(&agent, 10);
        until("batches to be under way", || (seen(false) > requests).then_some(()));
        old.iter().for_each(|line| drop(line.agent.shutdown(Shutdown::Both)));
        // It connects again and sends the same batches, which overtake the first.
        exact(&[&agent], &redis, &load);
        old.iter().for_each(|line| line.requests.holds.store(false, Ordering::SeqCst));
        until("the first ones to be answered", || (seen(true) > answers).then_some(()));
    }
    load.send_all(&agent, 10);
    exact(&[&agent], &redis, &load);
}
