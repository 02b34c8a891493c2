//! A path with a narrow hop in its middle: what is too long for it is found out, and nothing stalls.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_netns_tests::lab::{self, NatKind, RouterSpec, Stopwatch, eventually};
use warren_netns_tests::programs::{Agent, Coordinator};
use warren_netns_tests::traffic::Transfer;

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);
const TCP: u16 = 7000;
const POLICY: &str = r#"{
  "tagOwners": {"tag:ann": [], "tag:bob": []},
  "grants": [
    {"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["icmp:*", "tcp:7000"]},
    {"src": ["tag:bob"], "dst": ["tag:ann"], "ip": ["icmp:*"]},
  ],
}"#;
/// 1 280 less the headers of IPv4, UDP and WireGuard, in steps of 16.
const USABLE: u64 = 1_216;

/// The narrow hop drops what is too long without a word in one direction (as a link with a smaller MTU at its far end does),
/// and answers with ICMP errors in the other.
#[test]
fn a_transfer_over_a_hop_of_1280_bytes_does_not_stall() -> Result<()> {
    lab::test("mtu", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let router = lab.router("narrow", RouterSpec::new(NatKind::PortRestricted))?;
        router.ip("link set dev wan mtu 1280")?;
        let join = |agent: Agent| -> Result<Agent> {
            let key = coordinator.auth_key(&format!("tag:{}", agent.host.name()))?;
            agent.up(&coordinator.url, &key)?;
            Ok(agent)
        };
        let ann = join(Agent::start(lab.host("ann")?)?)?;
        let bob = join(Agent::start(router.host("bob")?)?)?;
        let addresses = bob.addresses()?;
        let overlay: IpAddr = *addresses.iter().find(|ip| ip.is_ipv4()).context("an IPv4 overlay address")?;
        let server = bob.serve("tcp-serve", overlay, TCP)?;
        ann.wait_for_path("bob", "direct")?;

        // It begins while the path's length is not known yet.
        let watch = Stopwatch::start();
        let before = Transfer::start(&ann.host, SocketAddr::new(overlay, TCP))?;
        for (agent, peer) in [(&ann, "bob"), (&bob, "ann")] {
            eventually("the path's MTU is found", LIMIT, || {
                Ok((agent.peer(peer)?["path"]["mtu"] == USABLE).then_some(()))
            })?;
        }
        lab::say(&format!(
            "both ends know the path's MTU {} ms after the transfer began",
            watch.elapsed().as_millis()
        ));
        before.goes_on(Duration::from_secs(3))?;
        let after = Transfer::start(&ann.host, SocketAddr::new(overlay, TCP))?;
        after.goes_on(Duration::from_secs(3))?;
        for transfer in [before, after] {
            transfer.finish()?;
        }
        // The kernel's own packets are told as well: it remembers how long they may be.
        let output =
            ann.host.run("ping", &["-c", "1", "-W", "1", "-M", "do", "-s", "1300", &overlay.to_string()]);
        let route = ann.host.run("ip", &["route", "get", &overlay.to_string()])?;
        let route = String::from_utf8_lossy(&route.stdout).into_owned();
        ensure!(route.contains(&format!("mtu {USABLE}")), "{route} {output:?}");
        drop(server);
        Ok(())
    })
}

/// Nothing but IPv6 under the tunnel, and links that are too narrow for a full packet.
#[test]
fn what_may_be_cut_is_cut_outside_over_ipv6_too() -> Result<()> {
    lab::test("mtu over IPv6", |lab| {
        let coordinator = Coordinator::start_dual_stack(lab.host("coord")?, POLICY)?;
        let join = |name: &str| -> Result<Agent> {
            let agent = Agent::start(lab.internet().host_v6_only(name)?)?;
            agent.up(&coordinator.url_v6()?, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        let addresses = bob.addresses()?;
        let overlay: IpAddr = *addresses.iter().find(|ip| ip.is_ipv4()).context("an IPv4 overlay address")?;
        let _server = bob.serve("tcp-serve", overlay, TCP)?;
        ann.wait_for_path("bob", "direct")?;
        for agent in [&ann, &bob] {
            agent.host.ip("link set dev eth0 mtu 1300")?;
        }
        // With 28 bytes of headers as long as the TUN takes, and without the DF bit.
        let output = ann.host.run(
            "ping",
            &["-n", "-c", "5", "-i", "0.2", "-W", "5", "-M", "dont", "-s", "1350", &overlay.to_string()],
        )?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(text.contains(" 5 received"), "{text}");
        // Batches for such a path are refused by the kernel, which is no reason to make none for others.
        let transfer = Transfer::start(&ann.host, SocketAddr::new(overlay, TCP))?;
        transfer.goes_on(Duration::from_secs(2))?;
        transfer.finish()?;
        let offloads = ann.json(&["status", "--json"])?["offloads"].clone();
        ensure!(offloads["udp-send"] == true, "{offloads}");
        Ok(())
    })
}
