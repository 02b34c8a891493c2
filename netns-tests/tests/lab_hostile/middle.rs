//! A machine in the middle at first contact gets neither the auth key nor a netmap accepted.

use std::fs;

use anyhow::{Result, ensure};
use warren_common::auth_key::AuthKey;
use warren_netns_tests::lab::{self, Lab, eventually};
use warren_netns_tests::programs::{Agent, Coordinator, Relay};

use crate::LIMIT;
use crate::proxy::{Conduct, Document, Middle};
use crate::secrets::Secret;

const POLICY: &str =
    r#"{"tagOwners": {"tag:ann": []}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}"#;

/// Tries to join at `url`; what it says when it fails, which it must.
fn fails(agent: &Agent, url: &str, more: &[&str]) -> Result<String> {
    let mut args = vec!["up", "--coordinator", url, "--timeout", "3s"];
    args.extend_from_slice(more);
    let output = agent.warren(&args)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "up ended with {}: {said}", output.status);
    ensure!(said.contains("fix: "), "no fix: {said}");
    Ok(said)
}

/// The agent is no device, has accepted no netmap and let nothing of the overlay into its host.
fn has_nothing(agent: &Agent, what: &str) -> Result<()> {
    let status = agent.json(&["status", "--json"])?;
    ensure!(status["state"] == "needs-login" && status["self"].is_null(), "{what}: {status}");
    let mut files = Vec::new();
    for network in fs::read_dir(agent.state_dir.join("networks"))? {
        for file in fs::read_dir(network?.path())? {
            files.push(file?.file_name().to_string_lossy().into_owned());
        }
    }
    ensure!(!files.iter().any(|f| f == "netmap" || f == "device"), "{what}: {files:?}");
    let links = agent.host.run("ip", &["link", "show", "warren0"])?;
    ensure!(!links.status.success(), "{what}: the TUN is there");
    Ok(())
}

/// Nothing that the machine has seen holds a secret.
fn saw_no_secret(middle: &Middle, secrets: &[Secret]) -> Result<()> {
    let seen = middle.seen();
    for message in seen.from_agents.iter().chain(&seen.from_coordinators) {
        for secret in secrets {
            secret.is_not_in(message, "what the machine in the middle saw")?;
        }
    }
    Ok(())
}

#[test]
fn a_machine_in_the_middle_gets_neither_key_nor_netmap_through() -> Result<()> {
    lab::test("middle", |lab: &Lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let text = coordinator.auth_key("tag:ann")?;
        let key: AuthKey = text.parse()?;
        let middle = Middle::start(&lab.host("mallory")?, &coordinator.url, &key, Conduct::Pass)?;
        let ann = Agent::start(lab.host("ann")?)?;
        let up = |more: &[&str]| fails(&ann, &middle.url, &[&["--auth-key", &text], more].concat());

        // Another root key than the auth key's: not even a connection is made.
        let other = Coordinator::start(lab.host("other")?, POLICY)?;
        let strange: AuthKey = other.auth_key("tag:ann")?.parse()?;
        let said = up(&["--coordinator-fingerprint", &strange.root.to_string()])?;
        ensure!(said.contains("another root key"), "{said}");
        ensure!(middle.seen().from_agents.is_empty(), "somebody was asked");

        // It poses as the coordinator with papers of every kind. To a false one the agent says nothing at all.
        for (document, reason) in [
            (Document::Patched, "not the expected one"),
            (Document::ForgedSignature, "not the expected one"),
            (Document::Own, "not the expected one"),
            (Document::Real, "does not hold the coordinator's key"),
        ] {
            middle.behave(Conduct::Pose(document));
            let before = middle.seen().from_agents.len();
            let said = up(&[])?;
            ensure!(said.contains(reason), "{document:?}: {said}");
            // The request for the WebSocket is one; a handshake, which tells nothing, would be another.
            let heard = middle.seen().from_agents.len() - before;
            ensure!(heard == if document == Document::Real { 2 } else { 1 }, "{document:?}: heard {heard}");
            has_nothing(&ann, &format!("{document:?}"))?;
        }

        // It passes the session on, and can only break it.
        middle.behave(Conduct::FlipBits);
        up(&[])?;
        has_nothing(&ann, "changed messages")?;
        middle.behave(Conduct::Replay);
        let said = up(&[])?;
        ensure!(said.contains("does not hold the coordinator's key"), "{said}");
        has_nothing(&ann, "replayed messages")?;

        // A coordinator of another network is no better, though it is a real one.
        let said = fails(&ann, &other.url, &["--auth-key", &text])?;
        ensure!(said.contains("not the expected one"), "{said}");
        has_nothing(&ann, "another coordinator")?;
        ensure!(other.admin(&["device", "list", "--json"])?.trim() == "[]", "ann is in another network");

        // The key is as good as before, even through a machine that has seen it all and changes nothing.
        middle.behave(Conduct::Pass);
        let joined = ann.up(&middle.url, &text)?;
        ensure!(!joined.is_empty(), "ann has addresses");
        eventually("the netmap is acknowledged", LIMIT, || {
            let status = ann.json(&["status", "--json"])?;
            Ok((status["coordinator"]["connected"] == true).then_some(()))
        })?;
        let mut secrets = Secret::of_agent("ann", &ann.state_dir)?;
        secrets.push(Secret::of_key("auth key", &text)?);
        saw_no_secret(&middle, &secrets)?;
        ensure!(middle.seen().from_agents.len() > 10, "the machine saw nothing");
        Ok(())
    })
}

#[test]
fn a_machine_in_the_middle_gets_no_join_key_of_a_relay() -> Result<()> {
    lab::test("middle-relay", |lab: &Lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let key: AuthKey = coordinator.auth_key("tag:ann")?.parse()?;
        let join_key = coordinator.admin(&["relay", "create", "fra"])?.trim().to_owned();
        let middle = Middle::start(&lab.host("mallory")?, &coordinator.url, &key, Conduct::Pass)?;
        for (i, document) in [Document::Own, Document::Patched, Document::Real].into_iter().enumerate() {
            middle.behave(Conduct::Pose(document));
            let mut relay = Relay::with_key(lab.host(&format!("fra{i}"))?, &middle.url, &join_key)?;
            relay.process.wait_for_line("is not this relay's coordinator", LIMIT)?;
            ensure!(!relay.process.wait(LIMIT)?.success(), "{document:?}: the relay serves");
        }
        middle.behave(Conduct::Pass);
        let mut relay = Relay::with_key(lab.host("fra")?, &middle.url, &join_key)?;
        relay.process.wait_for_line("joined", LIMIT)?;
        saw_no_secret(&middle, &[Secret::of_key("join key", &join_key)?])
    })
}
