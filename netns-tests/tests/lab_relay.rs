//! Relays that stop and die under running traffic: a TCP transfer and a UDP stream of twenty packets per second between
//! two agents whose NATs let nothing but relayed packets through. Each test prints the longest gap that applications saw.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Lab, NatKind, Process, RouterSpec, eventually, say};
use warren_netns_tests::programs::{Agent, Coordinator, Relay};
use warren_netns_tests::traffic::{Datagrams, Transfer};

const TCP: u16 = 7000;
const UDP: u16 = 7001;
/// Bound for what takes time; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);

const POLICY: &str = r#"{
  "tagOwners": {"tag:ann": [], "tag:bob": []},
  "grants": [{"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["icmp:*", "tcp:7000", "udp:7001"]}],
}
"#;

/// `ann` talks with `bob` over relays.
struct Talk {
    ann: Agent,
    bob: Agent,
    _servers: [Process; 2],
    transfer: Transfer,
    datagrams: Datagrams,
}

impl Talk {
    fn start(lab: &Lab, coordinator: &Coordinator) -> Result<Self> {
        let join = |name: &str| -> Result<Agent> {
            let router = lab.router(&format!("nat_{name}"), RouterSpec::new(NatKind::Symmetric))?;
            let agent = Agent::start(router.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        ann.wait_for_path("bob", "relay")?;
        for agent in [&ann, &bob] {
            wait_for_home(agent, None, "udp")?;
        }
        let v4 = bob.addresses()?.into_iter().find(IpAddr::is_ipv4).context("an IPv4 overlay address")?;
        let servers = [bob.serve("tcp-serve", v4, TCP)?, bob.serve("udp-echo", v4, UDP)?];
        let transfer = Transfer::start(&ann.host, SocketAddr::new(v4, TCP))?;
        let datagrams = Datagrams::start(&ann.host, SocketAddr::new(v4, UDP))?;
        Ok(Self { ann, bob, _servers: servers, transfer, datagrams })
    }

    /// Waits until each end is connected to a second relay, where the two meet should the first one fail.
    fn wait_for_second_relay(&self) -> Result<()> {
        for agent in [&self.ann, &self.bob] {
            let what = format!("{} is connected to two relays", agent.host.name());
            eventually(&what, LIMIT, || {
                let connected = relays(agent)?.into_iter().filter(|relay| !relay["transport"].is_null());
                Ok((connected.count() == 2).then_some(()))
            })?;
        }
        Ok(())
    }

    fn goes_on(&self) -> Result<()> {
        self.transfer.goes_on(Duration::from_secs(1))?;
        self.datagrams.go_on(20)
    }

    /// The longest gaps of both, printed.
    fn finish(self, what: &str) -> Result<[Duration; 2]> {
        let tcp = self.transfer.finish()?;
        let udp = self.datagrams.finish()?;
        say(&format!(
            "{what}: longest gap {} ms over TCP, {} ms over UDP; {} of {} datagrams came back",
            tcp.as_millis(),
            udp.gap.as_millis(),
            udp.received,
            udp.turns
        ));
        Ok([tcp, udp.gap])
    }
}

/// Beside a coordinator that has none itself.
struct TwoRelays {
    _coordinator: Coordinator,
    relays: [(Relay, &'static str); 2],
}

impl TwoRelays {
    fn start(lab: &Lab) -> Result<(Self, Talk)> {
        let coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let start = |name| Ok::<_, anyhow::Error>((Relay::start(lab.host(name)?, &coordinator, name)?, name));
        let relays = [start("fra")?, start("ams")?];
        let talk = Talk::start(lab, &coordinator)?;
        Ok((Self { _coordinator: coordinator, relays }, talk))
    }

    /// The one that `ann` is at home at, and the other one's name.
    fn by_home(&mut self, talk: &Talk) -> Result<(&mut Relay, &'static str)> {
        let home = wait_for_home(&talk.ann, None, "udp")?;
        let [first, second] = &mut self.relays;
        Ok(if home == first.1 { (&mut first.0, second.1) } else { (&mut second.0, first.1) })
    }
}

fn relays(agent: &Agent) -> Result<Vec<Value>> {
    Ok(agent.json(&["status", "--json"])?["relays"].as_array().cloned().unwrap_or_default())
}

/// Waits until the agent's home is `name` (any, if not given) and packets run over `transport`; its name.
fn wait_for_home(agent: &Agent, name: Option<&str>, transport: &str) -> Result<String> {
    let what = format!("{} is at home at {name:?} over {transport}", agent.host.name());
    eventually(&what, LIMIT, || {
        let home = relays(agent)?.into_iter().find(|relay| relay["home"] == true);
        let found = home.filter(|home| home["transport"] == transport);
        let found = found.and_then(|home| home["name"].as_str().map(str::to_owned));
        Ok(found.filter(|found| name.is_none_or(|name| name == found)))
    })
}

#[test]
fn a_relay_that_is_restarted_leaves_a_gap_of_a_second_at_most() -> Result<()> {
    lab::test("restarted relay", |lab| {
        let coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let mut relay = Relay::start(lab.host("relay")?, &coordinator, "only")?;
        let talk = Talk::start(lab, &coordinator)?;
        talk.goes_on()?;
        // It serves on while it drains: there is no other one to go to.
        relay.process.stop(LIMIT)?;
        relay.start_again()?;
        talk.goes_on()?;
        for agent in [&talk.ann, &talk.bob] {
            wait_for_home(agent, Some("only"), "udp")?;
        }
        talk.finish("restart of the only relay").map(drop)
    })
}

#[test]
fn a_relay_that_drains_is_left_without_a_gap() -> Result<()> {
    lab::test("draining relay", |lab| {
        let (mut relays, talk) = TwoRelays::start(lab)?;
        talk.goes_on()?;
        let (home, other) = relays.by_home(&talk)?;
        home.process.stop(LIMIT)?;
        talk.goes_on()?;
        for agent in [&talk.ann, &talk.bob] {
            wait_for_home(agent, Some(other), "udp")?;
        }
        talk.finish("drain of one of two relays").map(drop)
    })
}

#[test]
fn a_relay_that_is_restarted_beside_another_is_not_missed() -> Result<()> {
    lab::test("restarted relay of two", |lab| {
        let (mut relays, talk) = TwoRelays::start(lab)?;
        talk.wait_for_second_relay()?;
        talk.goes_on()?;
        let (home, _) = relays.by_home(&talk)?;
        home.process.stop(LIMIT)?;
        home.start_again()?;
        talk.goes_on()?;
        talk.wait_for_second_relay()?;
        talk.finish("restart of one of two relays").map(drop)
    })
}

#[test]
fn a_relay_that_is_killed_is_replaced_by_another() -> Result<()> {
    lab::test("killed relay", |lab| {
        let (mut relays, talk) = TwoRelays::start(lab)?;
        talk.wait_for_second_relay()?;
        talk.goes_on()?;
        let (home, other) = relays.by_home(&talk)?;
        home.process.kill()?;
        talk.goes_on()?;
        for agent in [&talk.ann, &talk.bob] {
            wait_for_home(agent, Some(other), "udp")?;
        }
        talk.finish("kill -9 of one of two relays").map(drop)
    })
}

#[test]
fn a_relay_that_dies_is_replaced_by_another() -> Result<()> {
    lab::test("dying relay", |lab| {
        let (mut relays, talk) = TwoRelays::start(lab)?;
        talk.wait_for_second_relay()?;
        talk.goes_on()?;
        let (home, other) = relays.by_home(&talk)?;
        // Silently: nothing answers any more, no reset, no ICMP.
        home.host.link_down(PORT)?;
        talk.goes_on()?;
        for agent in [&talk.ann, &talk.bob] {
            wait_for_home(agent, Some(other), "udp")?;
        }
        ensure!(talk.ann.peer("bob")?["path"]["relay"] == other, "the path goes over {other}");
        talk.finish("silent death of one of two relays").map(drop)
    })
}

/// The interface of a host of the lab.
const PORT: &str = "eth0";
