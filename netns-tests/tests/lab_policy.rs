//! Edits of the policy while a connection runs: real programs, real packets, the time to each cut.
//!
//! The times are printed, not judged: they depend on the machine's load. What is judged is that each edit changes the
//! verdict of the running connection, that the application is told, and that the way back works too.
#![expect(clippy::print_stdout, reason = "the times are what this test is for")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Lab, eventually, monotonic_ms, workspace_binary};
use warren_netns_tests::programs::{Agent, Coordinator, number, tool};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);
/// Edits that cut.
const ROUNDS: usize = 20;
/// Bytes per second of the transfers.
const RATE: u64 = 1 << 20;
const PORT: u16 = 7000;

fn policy(allowed: bool) -> String {
    let port = if allowed { PORT } else { PORT + 1 };
    format!(
        "{{\n  \"tagOwners\": {{\"tag:ann\": [], \"tag:bob\": []}},\n  \"grants\": [\n    \
         {{\"src\": [\"tag:ann\"], \"dst\": [\"tag:bob\"], \"ip\": [\"icmp:*\", \"tcp:{port}\"]}},\n  ],\n}}\n"
    )
}

#[test]
fn an_edit_of_the_file_cuts_a_running_connection_and_another_opens_it_again() -> Result<()> {
    lab::test("policy", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, &policy(true))?;
        let (ann, bob) = (join(lab, &coordinator, "ann")?, join(lab, &coordinator, "bob")?);
        let ip = *bob.addresses()?.first().context("bob has an address")?;
        ann.ping("bob", 1)?;
        let mut cuts = Vec::new();
        for _ in 0..ROUNDS {
            cuts.push(cut(&coordinator, &ann, &bob, ip)?);
            coordinator.edit_policy(&policy(true))?;
            eventually("the policy allows it again", LIMIT, || {
                Ok((ann.why("bob", PORT)?["allowed"] == true).then_some(()))
            })?;
        }
        cuts.sort_unstable();
        println!("from the edit of the file to the last byte, {ROUNDS} runs: {cuts:?} ms");
        println!("p50 {} ms, p99 {} ms", nearest(&cuts, 50), nearest(&cuts, 99));
        Ok(())
    })
}

fn join(lab: &Lab, coordinator: &Coordinator, name: &str) -> Result<Agent> {
    let agent = Agent::start(lab.host(name)?)?;
    agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
    Ok(agent)
}

/// Milliseconds from an edit to the last byte of a transfer that it cuts.
fn cut(coordinator: &Coordinator, ann: &Agent, bob: &Agent, ip: IpAddr) -> Result<u64> {
    let server = SocketAddr::new(ip, PORT).to_string();
    let _server = bob.serve("tcp-serve", ip, PORT)?;
    let mut command = ann.host.command(workspace_binary("lab-tool")?);
    command.args(["tcp-stream", &server, "--rate", &RATE.to_string()]);
    let mut stream = ann.host.spawn(command)?;
    stream.wait_for_line("echoed", LIMIT)?;
    let edited_ms = monotonic_ms();
    coordinator.edit_policy(&policy(false))?;
    let end: Value = serde_json::from_str(&stream.wait_for_line("\"end\"", LIMIT)?)?;
    ensure!(end["how"] == "reset", "the application saw: {end}");
    let again = tool(&ann.host, &["tcp-stream", &server, "--total", "1"])?;
    ensure!(again["how"] == "refused" || again["how"] == "prohibited", "a new connection ended: {again}");
    Ok(number(&end["last_byte_ms"])?.saturating_sub(edited_ms))
}

/// The value that this share of the sorted values does not exceed (nearest rank).
fn nearest(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}
