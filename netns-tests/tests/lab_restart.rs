//! Killing any part with `kill -9` and starting it again: traffic that runs and is allowed goes on, and nothing that was
//! acknowledged is lost.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Lab, NatKind, Process, RouterSpec};
use warren_netns_tests::programs::{Agent, Coordinator, Relay};
use warren_netns_tests::traffic::{Echoes, Transfer};

const TCP: u16 = 7000;
const UDP: u16 = 7001;

const POLICY: &str = r#"{
  "tagOwners": {"tag:ann": [], "tag:bob": [], "tag:cyd": []},
  "grants": [
    {"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["icmp:*", "tcp:7000", "udp:7001"]},
    {"src": ["tag:cyd"], "dst": ["tag:bob"], "ip": ["icmp:*"]},
  ],
}
"#;

/// An agent behind a NAT of its own, not joined yet.
fn agent(lab: &Lab, name: &str, nat: NatKind) -> Result<Agent> {
    let router = lab.router(&format!("nat_{name}"), RouterSpec::new(nat))?;
    Agent::start(router.host(name)?)
}

/// `ann` talks with `bob`: TCP over IPv4, UDP over IPv6.
struct Talk {
    ann: Agent,
    bob: Agent,
    servers: [Process; 2],
    transfer: Transfer,
    echoes: Echoes,
}

impl Talk {
    /// Both join, find the kind of path that `nat` allows, and begin.
    fn start(lab: &Lab, coordinator: &Coordinator, nat: NatKind) -> Result<Self> {
        let join = |name: &str| -> Result<Agent> {
            let agent = agent(lab, name, nat)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        ann.wait_for_path("bob", kind_over(nat))?;
        let addresses = bob.addresses()?;
        let find = |v4: bool| addresses.iter().find(|ip| ip.is_ipv4() == v4).copied();
        let v4: IpAddr = find(true).context("an IPv4 overlay address")?;
        let v6: IpAddr = find(false).context("an IPv6 overlay address")?;
        let servers = [bob.serve("tcp-serve", v4, TCP)?, bob.serve("udp-echo", v6, UDP)?];
        let transfer = Transfer::start(&ann.host, SocketAddr::new(v4, TCP))?;
        let echoes = Echoes::start(&ann.host, SocketAddr::new(v6, UDP))?;
        Ok(Self { ann, bob, servers, transfer, echoes })
    }

    /// Both kinds of traffic pass.
    fn goes_on(&self) -> Result<()> {
        self.transfer.goes_on(Duration::from_millis(500))?;
        self.echoes.go_on(5)
    }

    /// Traffic passes for long enough that agents have saved where they reach each other: they do so a second after it
    /// changed. Without that a restarted agent waits for its peer, which notices after fifteen seconds.
    fn let_it_settle(&self) -> Result<()> {
        self.transfer.goes_on(Duration::from_secs(2))
    }

    /// Kills one end's agent and starts it again; traffic goes on.
    fn restart_ann(&mut self) -> Result<()> {
        self.ann.process.kill()?;
        self.ann.start_again()?;
        self.goes_on()
    }

    /// The same for the other end.
    fn restart_bob(&mut self) -> Result<()> {
        self.bob.process.kill()?;
        self.bob.start_again()?;
        self.goes_on()
    }

    /// The transfer comes to a good end; how many datagrams were lost.
    fn finish(self) -> Result<u64> {
        self.transfer.finish()?;
        let (sent, received) = self.echoes.finish()?;
        drop(self.servers);
        Ok(sent - received)
    }
}

const fn kind_over(nat: NatKind) -> &'static str {
    match nat {
        NatKind::Symmetric => "relay",
        NatKind::FullCone | NatKind::AddressRestricted | NatKind::PortRestricted => "direct",
    }
}

/// What the coordinator has acknowledged, without who happens to be connected.
fn acknowledged(coordinator: &Coordinator) -> Result<Vec<Value>> {
    let questions: [&[&str]; 4] =
        [&["device", "list"], &["auth-key", "list"], &["policy", "status"], &["relay", "list"]];
    let mut answers =
        questions.iter().map(|question| coordinator.ask(question)).collect::<Result<Vec<_>>>()?;
    for device in answers[0].as_array_mut().context("a list of devices")? {
        device.as_object_mut().context("a device")?.remove("online");
    }
    Ok(answers)
}

#[test]
fn a_killed_coordinator_stops_no_traffic_and_forgets_nothing() -> Result<()> {
    lab::test("coordinator", |lab| {
        let mut coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let talk = Talk::start(lab, &coordinator, NatKind::PortRestricted)?;
        let addresses = [talk.ann.addresses()?, talk.bob.addresses()?];

        // Killed as soon as it has said yes: to an auth key, ...
        let key = coordinator.auth_key("tag:cyd")?;
        let before = acknowledged(&coordinator)?;
        coordinator.process.kill()?;
        talk.goes_on()?;
        talk.goes_on()?;
        coordinator.start_again()?;
        let after = acknowledged(&coordinator)?;
        ensure!(before == after, "before: {before:#?}\nafter: {after:#?}");
        [&talk.ann, &talk.bob].into_iter().try_for_each(Agent::wait_until_connected)?;
        ensure!(addresses == [talk.ann.addresses()?, talk.bob.addresses()?], "other addresses now");

        // ... and to a device, and with it to the use of the key.
        let cyd = agent(lab, "cyd", NatKind::PortRestricted)?;
        cyd.up(&coordinator.url, &key)?;
        coordinator.process.kill()?;
        let cyd_addresses = cyd.addresses()?;
        coordinator.start_again()?;
        let dee = agent(lab, "dee", NatKind::PortRestricted)?;
        let refusal = dee.up(&coordinator.url, &key).err().context("a one-use key was used twice")?;
        ensure!(refusal.to_string().contains("used"), "{refusal:#}");
        [&talk.ann, &talk.bob, &cyd].into_iter().try_for_each(Agent::wait_until_connected)?;
        ensure!(cyd.addresses()? == cyd_addresses, "a device has other addresses now");

        // It is no mere picture of a coordinator: what it decides now takes effect.
        talk.goes_on()?;
        cyd.wait_for_path("bob", "direct")?;
        cyd.ping("bob", 1)?;
        let lost = talk.finish()?;
        ensure!(lost == 0, "{lost} datagrams were lost, and nothing on their way was touched");
        Ok(())
    })
}

#[test]
fn traffic_outlives_the_kill_of_its_relay() -> Result<()> {
    lab::test("relay", |lab| {
        let mut coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let mut relay = Relay::start(lab.host("relay")?, &coordinator, "relay")?;
        let before = acknowledged(&coordinator)?;
        let talk = Talk::start(lab, &coordinator, NatKind::Symmetric)?;
        relay.process.kill()?;
        relay.start_again()?;
        talk.goes_on()?;
        // The coordinator is no part of the way.
        coordinator.process.kill()?;
        talk.goes_on()?;
        coordinator.start_again()?;
        talk.goes_on()?;
        ensure!(talk.ann.peer("bob")?["path"]["kind"] == "relay", "these NATs let nothing else through");
        ensure!(acknowledged(&coordinator)?[3] == before[3], "the relay is another one now");
        talk.finish().map(drop)
    })
}

#[test]
fn traffic_outlives_the_kill_of_either_agent() -> Result<()> {
    lab::test("agents", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let mut talk = Talk::start(lab, &coordinator, NatKind::PortRestricted)?;
        talk.let_it_settle()?;
        talk.restart_bob()?;
        talk.restart_ann()?;
        talk.ann.wait_for_path("bob", "direct")?;
        talk.finish().map(drop)
    })
}

#[test]
fn relayed_traffic_outlives_the_kill_of_the_coordinator_and_of_either_agent() -> Result<()> {
    lab::test("relayed", |lab| {
        let mut coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let mut talk = Talk::start(lab, &coordinator, NatKind::Symmetric)?;
        // The embedded relay goes with it.
        coordinator.process.kill()?;
        coordinator.start_again()?;
        talk.goes_on()?;
        talk.restart_bob()?;
        talk.restart_ann()?;
        ensure!(talk.ann.peer("bob")?["path"]["kind"] == "relay", "these NATs let nothing else through");
        talk.finish().map(drop)
    })
}

#[test]
fn agents_that_start_without_their_coordinator_find_each_other_again() -> Result<()> {
    lab::test("alone direct", |lab| {
        let mut coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let mut talk = Talk::start(lab, &coordinator, NatKind::PortRestricted)?;
        talk.let_it_settle()?;
        // Its relay goes with it: nothing is left but the two of them.
        coordinator.process.kill()?;
        talk.restart_bob()?;
        talk.let_it_settle()?;
        talk.restart_ann()?;
        ensure!(talk.ann.peer("bob")?["path"]["kind"] == "direct", "there is no relay");
        talk.finish().map(drop)
    })
}

#[test]
fn agents_that_start_without_their_coordinator_use_their_relay_again() -> Result<()> {
    lab::test("alone relayed", |lab| {
        let mut coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let _relay = Relay::start(lab.host("relay")?, &coordinator, "relay")?;
        let mut talk = Talk::start(lab, &coordinator, NatKind::Symmetric)?;
        talk.let_it_settle()?;
        coordinator.process.kill()?;
        talk.restart_bob()?;
        talk.let_it_settle()?;
        talk.restart_ann()?;
        ensure!(talk.ann.peer("bob")?["path"]["kind"] == "relay", "these NATs let nothing else through");
        talk.finish().map(drop)
    })
}
