//! Every deployment of Redis that a store can be: Sentinel, Cluster, TLS, a unix socket, a user with few rights.

use crate::redis_servers::{Cluster, Sentinels};

#[test]
fn the_deployments_of_tests_start() {
    let begun = std::time::Instant::now();
    let cluster = Cluster::start(3, 3);
    assert_eq!(cluster.masters(), [0, 1, 2]);
    eprintln!("cluster {:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    let sentinels = Sentinels::start(1, 3);
    eprintln!("sentinels {:?}", begun.elapsed());
    assert_eq!((sentinels.master(), sentinels.fail_over()), (0, 1));
    eprintln!("failed over {:?}", begun.elapsed());
}
