//! Unix sockets of both kinds, with `tallyd send` as the client.

use crate::agent::{Agent, tallyd};

#[test]
fn lines_come_by_unix_sockets_of_both_kinds() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let setting = |kind: &str| format!("listen.{kind}={}", path(kind));
    let agent = Agent::start(&[&setting("unixgram"), &setting("unix")]);
    for (kind, value) in [("unixgram", 3), ("unix", 4)] {
        let to = format!("{kind}://{}", path(kind));
        assert!(tallyd().args(["send", "--to", &to, &format!("{kind}:{value}|c")]).status().unwrap().success());
        agent.wait_for(kind, "value", value);
        assert!(agent.own("tallyd_lines_accepted_total", &format!("listener=\"{kind}\"")) == 1.0);
        assert!(agent.get("/-/ready").text().contains(&path(kind)));
    }
    // What a killed agent leaves behind is taken over.
    let agent = agent.restart_after("KILL");
    assert!(
        tallyd()
            .args(["send", "--to", &format!("unixgram://{}", path("unixgram")), "again:1|c"])
            .status()
            .unwrap()
            .success()
    );
    agent.wait_for("again", "value", 1);
}
