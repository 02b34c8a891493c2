//! Peer relays on real packets: two agents whose NATs let nothing but relayed packets through, and a device that the
//! policy lets relay for them.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Lab, Link, NatKind, Process, RouterSpec, eventually, monotonic_ms, say};
use warren_netns_tests::programs::{Agent, Coordinator, number};
use warren_netns_tests::traffic::{Datagrams, Transfer};

const TCP: u16 = 7000;
const UDP: u16 = 7001;
/// Where the device `gw` relays.
const PORT: &str = "3350";
/// Bound for what takes time; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);

/// `ann` may talk with `bob`; whom `gw` may relay for.
fn policy(users: &[&str]) -> String {
    let relay = match users {
        [] => String::new(),
        _ => format!(
            r#", {{"src": ["{}"], "dst": ["tag:gw"], "app": {{"warren/cap/relay": []}}}}"#,
            users.join("\", \"")
        ),
    };
    format!(
        r#"{{
  "tagOwners": {{"tag:ann": [], "tag:bob": [], "tag:gw": []}},
  "grants": [{{"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["icmp:*", "tcp:{TCP}", "udp:{UDP}"]}}{relay}],
}}
"#
    )
}

const BOTH: [&str; 2] = ["tag:ann", "tag:bob"];

struct World {
    coordinator: Coordinator,
    ann: Agent,
    bob: Agent,
    gw: Agent,
}

impl World {
    fn new(lab: &Lab, coordinator: Coordinator) -> Result<Self> {
        let join = |name: &str| -> Result<Agent> {
            let router = lab.router(&format!("nat_{name}"), RouterSpec::new(NatKind::Symmetric))?;
            let agent = Agent::start(router.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        let gw = Agent::start_with(lab.host("gw")?, vec!["--relay-port".into(), PORT.into()])?;
        gw.up(&coordinator.url, &coordinator.auth_key("tag:gw")?)?;
        Ok(Self { coordinator, ann, bob, gw })
    }

    fn bob_v4(&self) -> Result<IpAddr> {
        self.bob.addresses()?.into_iter().find(IpAddr::is_ipv4).context("an IPv4 overlay address")
    }

    fn servers(&self) -> Result<[Process; 2]> {
        let v4 = self.bob_v4()?;
        Ok([self.bob.serve("tcp-serve", v4, TCP)?, self.bob.serve("udp-echo", v4, UDP)?])
    }

    fn relaying(&self) -> Result<Value> {
        Ok(self.gw.json(&["status", "--json"])?["relaying"].clone())
    }

    fn wait_until_relaying(&self, serving: bool) -> Result<()> {
        eventually(&format!("gw relays: {serving}"), LIMIT, || {
            Ok((self.relaying()?["serving"] == serving).then_some(()))
        })
    }

    /// Waits until packets between the two take a relay whose name begins so.
    fn wait_for_relay(&self, prefix: &str) -> Result<String> {
        eventually(&format!("the path takes a relay called {prefix}…"), LIMIT, || {
            let path = self.ann.peer("bob")?["path"].clone();
            let name = path["relay"].as_str().filter(|name| name.starts_with(prefix));
            Ok(name.map(str::to_owned))
        })
    }
}

/// The peer relays that an agent knows of.
fn peer_relays(agent: &Agent) -> Result<Vec<Value>> {
    let relays = agent.json(&["status", "--json"])?["relays"].as_array().cloned().unwrap_or_default();
    Ok(relays.into_iter().filter(|relay| relay["peer"] == true).collect())
}

#[test]
fn two_behind_symmetric_nats_talk_through_a_device_that_a_grant_lets_relay_and_through_none_without()
-> Result<()> {
    lab::test("peer relay", |lab| {
        // No other relay: either the device carries them, or nothing does.
        let coordinator = Coordinator::start_without_relay(lab.host("coord")?, &policy(&[]))?;
        let world = World::new(lab, coordinator)?;
        let World { coordinator, ann, bob, gw } = &world;
        ensure!(ann.ping("bob", 1).is_err() && ann.peer("bob")?["path"]["kind"] == "none", "without a grant");
        ensure!(peer_relays(ann)?.is_empty() && world.relaying()?["serving"] == false, "nobody learns of it");
        // One end alone is not enough, and the other hears of nothing.
        coordinator.edit_policy(&policy(&["tag:ann"]))?;
        world.wait_until_relaying(true)?;
        eventually("ann knows of the relay", LIMIT, || Ok((peer_relays(ann)?.len() == 1).then_some(())))?;
        ensure!(ann.ping("bob", 1).is_err() && peer_relays(bob)?.is_empty(), "with a grant for one end");

        coordinator.edit_policy(&policy(&BOTH))?;
        ann.wait_for_path("bob", "relay")?;
        let name = world.wait_for_relay("peer-")?;
        let pongs = ann.ping("bob", 5)?;
        say(&format!("{name}: {} ms", pongs[4]["rtt_ms"]));
        say(&ann.icmp(world.bob_v4()?)?);
        let status = ann.json(&["status", "--json"])?;
        ensure!(status["peers"].as_array().is_some_and(|peers| peers.len() == 1), "gw is no peer: {status}");
        ensure!(!status.to_string().contains("\"gw\""), "nor called by its name: {status}");
        ensure!(gw.json(&["status", "--json"])?["peers"] == serde_json::json!([]), "and knows nobody");
        let relaying = world.relaying()?;
        ensure!(
            number(&relaying["clients"])? == 2 && number(&relaying["forwarded_packets"])? > 10,
            "{relaying}"
        );
        let listed = coordinator.ask(&["relay", "list"])?;
        ensure!(listed[0]["device"] == "gw" && listed[0]["users"] == 2, "{listed}");

        // Promise 4 holds for what a device relays too: the grant goes, and the packets stop.
        let _servers = world.servers()?;
        let v4 = world.bob_v4()?;
        let transfer = Transfer::start(&ann.host, SocketAddr::new(v4, TCP))?;
        let datagrams = Datagrams::start(&ann.host, SocketAddr::new(v4, UDP))?;
        transfer.goes_on(Duration::from_secs(1))?;
        datagrams.go_on(20)?;
        let carried = |world: &World| -> Result<u64> { number(&world.relaying()?["forwarded_packets"]) };
        ensure!(carried(&world)? > 50, "gw carries them");
        let edited = monotonic_ms();
        coordinator.edit_policy(&policy(&["tag:ann"]))?;
        eventually("nothing passes any more", LIMIT, || {
            let before = carried(&world)?;
            std::thread::sleep(Duration::from_millis(200)); // four datagrams' worth
            Ok((carried(&world)? == before).then_some(()))
        })?;
        say(&format!("cut within {} ms of the edit, 200 ms of looking included", monotonic_ms() - edited));
        coordinator.edit_policy(&policy(&[]))?;
        world.wait_until_relaying(false)?;
        ensure!(peer_relays(ann)?.is_empty() && peer_relays(bob)?.is_empty(), "and nobody knows of it");
        // It comes back as it went.
        coordinator.edit_policy(&policy(&BOTH))?;
        datagrams.go_on(20)?;
        transfer.goes_on(Duration::from_secs(1))
    })
}

#[test]
fn a_near_peer_relay_is_preferred_to_a_far_relay_and_left_when_it_dies() -> Result<()> {
    lab::test("peer relay and relay", |lab| {
        let far = Link { delay: Duration::from_millis(40), ..Link::default() };
        let coordinator = Coordinator::start(lab.internet().host_over("coord", far)?, &policy(&[]))?;
        let world = World::new(lab, coordinator)?;
        let World { coordinator, ann, gw, .. } = &world;
        ann.wait_for_path("bob", "relay")?;
        world.wait_for_relay("embedded")?;
        let _servers = world.servers()?;
        let v4 = world.bob_v4()?;
        let transfer = Transfer::start(&ann.host, SocketAddr::new(v4, TCP))?;
        let datagrams = Datagrams::start(&ann.host, SocketAddr::new(v4, UDP))?;
        datagrams.go_on(20)?;
        let rtt = |pongs: Vec<Value>| pongs.last().and_then(|pong| pong["rtt_ms"].as_f64()).context("a time");
        let by_far = rtt(ann.ping("bob", 3)?)?;

        coordinator.edit_policy(&policy(&BOTH))?;
        let name = world.wait_for_relay("peer-")?;
        let by_near = rtt(ann.ping("bob", 3)?)?;
        say(&format!("by the far relay {by_far:.1} ms, by {name} {by_near:.1} ms"));
        datagrams.go_on(20)?;
        transfer.goes_on(Duration::from_secs(1))?;
        let home = ann.json(&["status", "--json"])?["relays"].clone();
        let home = home.as_array().and_then(|all| all.iter().find(|relay| relay["home"] == true)).cloned();
        ensure!(home.is_some_and(|home| home["name"] == "embedded"), "home stays an ordinary relay");

        // Silently: nothing answers any more.
        gw.host.link_down("eth0")?;
        datagrams.go_on(20)?;
        transfer.goes_on(Duration::from_secs(1))?;
        world.wait_for_relay("embedded")?;
        let (tcp, udp) = (transfer.finish()?, datagrams.finish()?);
        say(&format!(
            "silent death of the peer relay: longest gap {} ms over TCP, {} ms over UDP; {} of {} datagrams came back",
            tcp.as_millis(),
            udp.gap.as_millis(),
            udp.received,
            udp.turns
        ));
        Ok(())
    })
}
