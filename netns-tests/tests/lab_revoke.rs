//! Promise 4 on real packets: what policy no longer allows ends at once, and both applications hear of it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, NatKind, Process, RouterSpec, eventually, monotonic_ms};
use warren_netns_tests::programs::{Agent, Coordinator, number};
use warren_netns_tests::traffic::Transfer;

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// Revocations: enough that the slowest says something.
const ROUNDS: usize = 20;

const PORT: u16 = 7000;

fn policy(allowed: bool) -> String {
    let tcp = if allowed { format!(r#", "tcp:{PORT}""#) } else { String::new() };
    format!(
        r#"{{
  "tagOwners": {{"tag:ann": [], "tag:bob": []}},
  "grants": [{{"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["icmp:*"{tcp}]}}],
}}
"#
    )
}

/// The last line of a server that tells how a connection ended, of `count` such lines.
fn last_end(server: &Process, count: usize) -> Result<Value> {
    eventually("the server's connection ends", LIMIT, || {
        let log = server.log()?;
        let ends: Vec<&str> = log.lines().filter(|line| line.contains(r#""event":"end""#)).collect();
        (ends.len() == count).then(|| Ok(serde_json::from_str(ends[count - 1])?)).transpose()
    })
}

#[test]
fn twenty_running_transfers_are_cut_and_reset() -> Result<()> {
    lab::test("revoke", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, &policy(true))?;
        let join = |name: &str| -> Result<Agent> {
            let router = lab.router(&format!("nat_{name}"), RouterSpec::new(NatKind::PortRestricted))?;
            let agent = Agent::start(router.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        ann.wait_for_path("bob", "direct")?;
        let (from, to): (Vec<IpAddr>, Vec<IpAddr>) = (ann.addresses()?, bob.addresses()?);
        let servers: Vec<Process> =
            to.iter().map(|ip| bob.serve("tcp-serve", *ip, PORT)).collect::<Result<_>>()?;

        let (mut took, mut noticed) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            // IPv4 and IPv6 in turn.
            let family = round % to.len();
            eventually("both ends allow it", LIMIT, || {
                let here = ann.why("bob", PORT)?["allowed"] == true;
                let there = bob.why(&from[family].to_string(), PORT)?;
                Ok((here && there["filter"]["ingress"]["outcome"] == "allowed").then_some(()))
            })?;
            let transfer = Transfer::start(&ann.host, SocketAddr::new(to[family], PORT))?;
            let edited_ms = monotonic_ms();
            coordinator.edit_policy(&policy(false))?;
            let end = transfer.ended()?;
            ensure!(end["how"] == "reset", "round {round}: the sender saw: {end}");
            let served = last_end(&servers[family], round / to.len() + 1)?;
            ensure!(served["how"] == "reset", "round {round}: the receiver saw: {served}");
            let last = number(&end["last_byte_ms"])?.max(number(&served["last_byte_ms"])?);
            took.push(last.saturating_sub(edited_ms));
            let heard = number(&end["mono_ms"])?.max(number(&served["mono_ms"])?);
            noticed.push(heard.saturating_sub(edited_ms));
            coordinator.edit_policy(&policy(true))?;
        }
        for (what, mut ms) in [("last byte", took), ("both applications reset", noticed)] {
            ms.sort_unstable();
            let (p50, p99) = (ms[ROUNDS / 2], *ms.last().context("a round")?);
            lab::say(&format!(
                "{what} after the edit of the policy file: p50 {p50} ms, p99 {p99} ms ({ROUNDS} revocations)"
            ));
        }
        Ok(())
    })
}
