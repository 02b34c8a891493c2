//! An agent that ignores its filter cannot deliver a denied packet: the other end alone is enough.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_engine::packet::build::{Segment, checksum, prohibited};
use warren_engine::packet::{Addrs, TCP_FIN, TCP_RST, TCP_SYN};
use warren_netns_tests::lab::{self, Host, Lab, Process, eventually};
use warren_netns_tests::programs::{Agent, Coordinator};
use warren_netns_tests::sim::packet::Datagram;

use crate::LIMIT;
use crate::thief::{Inside, Loot, Outlaw, Session, Visit, Wire};

/// `ann` may send this, and pings; nothing else, and nobody else may.
const ALLOWED: u16 = 7001;
const DENIED: u16 = 7003;

const POLICY: &str = r#"{
  "tagOwners": {"tag:ann": [], "tag:bob": [], "tag:cyd": []},
  "grants": [
    {"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["udp:7001", "icmp:*", "ipv6-icmp:*"]},
    {"src": ["tag:cyd"], "dst": ["tag:ann"], "ip": ["udp:7001"]},
  ],
}"#;

/// An honest agent `bob`, and two whose keys are stolen: `ann`, who may reach a port of his, and `cyd`, who may not
/// reach him at all.
struct World {
    coordinator: Coordinator,
    ann: Agent,
    bob: Agent,
    cyd: Agent,
}

impl World {
    fn new(lab: &Lab) -> Result<Self> {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let join = |name: &str| -> Result<Agent> {
            let agent = Agent::start(lab.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        Ok(Self { ann: join("ann")?, bob: join("bob")?, cyd: join("cyd")?, coordinator })
    }

    /// Copies what `ann` has on disk and stops her.
    fn rob_ann(&mut self) -> Result<(Loot, SocketAddr)> {
        let endpoint = eventually("ann has a direct path to bob", LIMIT, || {
            self.ann.ping("bob", 1)?;
            let path = self.ann.peer("bob")?["path"].clone();
            Ok(path["endpoint"].as_str().map(str::to_owned))
        })?;
        ensure!(self.ann.process.stop(LIMIT)?.success(), "ann stops");
        Ok((Loot::take(&self.ann)?, endpoint.parse()?))
    }
}

/// What cannot lie about what arrives: a counter of the kernel for packets that come out of the victim's TUN.
fn witness(host: &Host) -> Result<()> {
    host.nft(
        "table inet witness {\n counter arrived { }\n chain in {\n  type filter hook prerouting priority -500;\n  \
         iifname \"warren0\" counter name arrived\n }\n}\n",
    )
}

fn arrived(host: &Host) -> Result<u64> {
    let output = host.run("nft", &["list", "counter", "inet", "witness", "arrived"])?;
    let text = String::from_utf8(output.stdout)?;
    let count = text.split("packets ").nth(1).and_then(|rest| rest.split_whitespace().next());
    count.and_then(|n| n.parse().ok()).with_context(|| format!("no count in {text}"))
}

/// The agent's counters of incoming packets that its filter dropped.
fn ingress_drops(agent: &Agent) -> Result<BTreeMap<String, u64>> {
    let status = agent.json(&["status", "--json"])?;
    let drops = status["counters"]["drops"].as_object().context("drops are counted")?;
    let ingress = drops.iter().filter(|(name, _)| name.starts_with("ingress-"));
    Ok(ingress.filter_map(|(name, count)| Some((name.clone(), count.as_u64()?))).collect())
}

fn drops(agent: &Agent, reason: &str) -> Result<u64> {
    Ok(agent.json(&["status", "--json"])?["counters"]["drops"][reason].as_u64().unwrap_or(0))
}

fn udp(src: (IpAddr, u16), dst: (IpAddr, u16), number: u64) -> Result<Vec<u8>> {
    let datagram = Datagram { src: src.into(), dst: dst.into(), number, extra: 0 };
    datagram.to_packet().context("addresses of one family")
}

/// Recomputes the checksum of an IPv4 header that was changed.
fn fix_header(mut packet: Vec<u8>) -> Vec<u8> {
    packet[10..12].fill(0);
    let sum = checksum(&[&packet[..20]]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Every kind of packet that `bob` must not be delivered from `ann`, and the counter it must show up in.
fn forbidden(ann: &[IpAddr], bob: &[IpAddr], cyd: &[IpAddr]) -> Result<Vec<(Vec<u8>, &'static str)>> {
    let mut all = Vec::new();
    for ((&ann, &bob), &cyd) in ann.iter().zip(bob).zip(cyd) {
        let addrs = Addrs::new(ann, bob).context("one family")?;
        let tcp = |port: u16, flags: u8, ack: Option<u32>| {
            Segment { addrs, src_port: 4_000, dst_port: port, seq: 1, ack, flags }.to_bytes()
        };
        let never_sent = udp((bob, 9), (ann, 9), 0)?;
        all.extend([
            (udp((ann, 4_000), (bob, DENIED), 1)?, "ingress-no-rule"),
            // Looks like an answer of a DNS server.
            (udp((ann, 53), (bob, 40_000), 2)?, "ingress-no-rule"),
            (tcp(DENIED, TCP_SYN, None), "ingress-no-rule"),
            (tcp(ALLOWED, TCP_SYN, None), "ingress-no-rule"),
            (tcp(DENIED, 0, Some(7)), "ingress-no-flow"),
            (tcp(DENIED, TCP_SYN, Some(7)), "ingress-no-flow"),
            (tcp(DENIED, TCP_RST, None), "ingress-no-flow"),
            (tcp(DENIED, TCP_SYN | TCP_FIN, None), "ingress-malformed"),
            // In the name of somebody else, of the victim itself, and to somebody behind it.
            (udp((cyd, 4_000), (bob, ALLOWED), 3)?, "ingress-spoofed-source"),
            (udp((bob, 4_000), (bob, ALLOWED), 4)?, "ingress-spoofed-source"),
            (udp((ann, 4_000), (cyd, ALLOWED), 5)?, "ingress-no-peer"),
            (prohibited(addrs, &never_sent), "ingress-unrelated-icmp-error"),
        ]);
        let whole = udp((ann, 4_000), (bob, ALLOWED), 6)?;
        if ann.is_ipv4() {
            let mut later = whole.clone();
            later[6..8].copy_from_slice(&8_u16.to_be_bytes());
            all.push((fix_header(later), "ingress-not-first-fragment"));
            let mut redirect = whole[..28].to_vec();
            (redirect[3], redirect[9]) = (28, 1);
            redirect[20..28].copy_from_slice(&[5, 0, 0, 0, 100, 64, 0, 9]);
            all.push((fix_header(redirect), "ingress-forbidden-icmp"));
        } else {
            let mut advertisement = whole[..48].to_vec();
            (advertisement[5], advertisement[6]) = (8, 58);
            advertisement[40..48].copy_from_slice(&[134, 0, 0, 0, 64, 0, 0, 0]);
            all.push((advertisement, "ingress-forbidden-icmp"));
        }
    }
    Ok(all)
}

impl Outlaw<'_> {
    /// An allowed datagram is delivered: what is not, was refused and not lost.
    fn reach(&mut self, victim: &Agent, from: IpAddr, to: IpAddr) -> Result<()> {
        let before = arrived(&victim.host)?;
        self.send(&udp((from, 4_000), (to, ALLOWED), 0)?)?;
        eventually("an allowed datagram is delivered", LIMIT, || {
            Ok((arrived(&victim.host)? == before + 1).then_some(()))
        })
    }

    /// Sends everything forbidden. Nothing arrives, and each packet is counted by its reason.
    fn break_the_law(&mut self, victim: &Agent, packets: &[(Vec<u8>, &'static str)]) -> Result<()> {
        let (before, had_arrived) = (ingress_drops(victim)?, arrived(&victim.host)?);
        let mut expected = before;
        for (packet, reason) in packets {
            self.send(packet)?;
            *expected.entry((*reason).to_owned()).or_default() += 1;
        }
        let counted = |drops: &BTreeMap<String, u64>| drops.values().sum::<u64>();
        let seen = eventually("every packet is dropped and counted", LIMIT, || {
            let seen = ingress_drops(victim)?;
            Ok((counted(&seen) >= counted(&expected)).then_some(seen))
        })?;
        ensure!(seen == expected, "counted {seen:?}\nand not  {expected:?}");
        ensure!(arrived(&victim.host)? == had_arrived, "something arrived");
        Ok(())
    }
}

#[test]
fn an_agent_without_a_filter_delivers_no_denied_packet() -> Result<()> {
    lab::test("outlaw", |lab| {
        let mut world = World::new(lab)?;
        let (ann, bob, cyd) = (world.ann.addresses()?, world.bob.addresses()?, world.cyd.addresses()?);
        let packets = forbidden(&ann, &bob, &cyd)?;
        let serve =
            |port| bob.iter().map(|ip| world.bob.serve("udp-echo", *ip, port)).collect::<Result<Vec<_>>>();
        let (open, shut) = (serve(ALLOWED)?, serve(DENIED)?);
        let (loot, endpoint) = world.rob_ann()?;
        witness(&world.bob.host)?;

        let eve = lab.host("eve")?;
        let peer = loot.peer("bob")?;
        let mut outlaw = Outlaw::new(&loot, peer, Wire::direct(&eve, endpoint)?)?;
        ensure!(outlaw.handshake(LIMIT)?, "no handshake");
        for (&from, &to) in ann.iter().zip(&bob) {
            outlaw.reach(&world.bob, from, to)?;
        }
        outlaw.break_the_law(&world.bob, &packets)?;
        outlaw.reach(&world.bob, ann[0], bob[0])?;

        // The relay opens no other way.
        let inside = Inside::new(&eve)?;
        let mut session = Session::resume(&inside, &loot)?;
        let relay = loot.relay("embedded")?;
        let token = session.relay_token(&inside, relay.id)?;
        let visit = Visit::start(&inside, relay, loot.network, &loot.keys.probe, Some(token));
        let mut outlaw = Outlaw::new(&loot, peer, Wire::relayed(&inside, visit, peer.id)?)?;
        ensure!(outlaw.handshake(LIMIT)?, "no handshake");
        outlaw.reach(&world.bob, ann[0], bob[0])?;
        outlaw.break_the_law(&world.bob, &packets)?;
        outlaw.reach(&world.bob, ann[0], bob[0])?;
        ensure!(arrived(&world.bob.host)? == 5, "only what is allowed has arrived");

        let heard = |server: &Process| Ok::<_, anyhow::Error>(server.log()?.contains("\"datagram\""));
        for (open, shut) in open.iter().zip(&shut) {
            eventually("the allowed server has heard something", LIMIT, || Ok(heard(open)?.then_some(())))?;
            ensure!(!heard(shut)?, "the denied server has heard something");
        }

        // And the victim can say why.
        for (&from, &to) in ann.iter().zip(&bob) {
            let addrs = Addrs::new(from, to).context("one family")?;
            let syn = Segment { addrs, src_port: 4_000, dst_port: DENIED, seq: 1, ack: None, flags: TCP_SYN };
            outlaw.send(&syn.to_bytes())?;
            eventually("the drop is explained", LIMIT, || {
                let why = world.bob.why(&from.to_string(), DENIED)?;
                ensure!(why["filter"]["ingress"]["outcome"] == "no-rule", "{why}");
                let last = &why["filter"]["drops"][0];
                let told = last["reason"]["code"] == "no-rule" && last["direction"] == "ingress";
                Ok((told && last["src"] == from.to_string()).then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_flow_that_policy_ends_is_cut_by_the_honest_end_alone() -> Result<()> {
    lab::test("cut", |lab| {
        let mut world = World::new(lab)?;
        let (ann, bob) = (world.ann.addresses()?, world.bob.addresses()?);
        let _server = world.bob.serve("udp-echo", bob[0], ALLOWED)?;
        let (loot, endpoint) = world.rob_ann()?;
        witness(&world.bob.host)?;
        let mut outlaw = Outlaw::new(&loot, loot.peer("bob")?, Wire::direct(&lab.host("eve")?, endpoint)?)?;
        ensure!(outlaw.handshake(LIMIT)?, "no handshake");
        outlaw.reach(&world.bob, ann[0], bob[0])?;
        outlaw.reach(&world.bob, ann[0], bob[0])?;
        // She may still ping him: tunnel and session stay, only the flow is over.
        world.coordinator.edit_policy(&POLICY.replacen("udp:7001", "udp:1", 1))?;
        eventually("bob has heard of it", LIMIT, || {
            let asked = format!("{}:{ALLOWED}", ann[0]);
            let why = world.bob.json(&["why", &asked, "--proto", "udp", "--json"])?;
            Ok((why["filter"]["ingress"]["outcome"] == "no-rule").then_some(()))
        })?;
        let (had_arrived, before) = (arrived(&world.bob.host)?, ingress_drops(&world.bob)?);
        for _ in 0..5 {
            outlaw.send(&udp((ann[0], 4_000), (bob[0], ALLOWED), 0)?)?;
        }
        eventually("the dead flow is counted", LIMIT, || {
            let now = ingress_drops(&world.bob)?;
            Ok((now.values().sum::<u64>() == before.values().sum::<u64>() + 5).then_some(()))
        })?;
        let ended = |drops: &BTreeMap<String, u64>| drops.get("ingress-flow-ended").copied().unwrap_or(0);
        ensure!(ended(&ingress_drops(&world.bob)?) == ended(&before) + 5, "{:?}", ingress_drops(&world.bob)?);
        ensure!(arrived(&world.bob.host)? == had_arrived, "something arrived");
        Ok(())
    })
}

#[test]
fn keys_of_a_device_without_a_grant_or_that_was_removed_open_no_tunnel() -> Result<()> {
    lab::test("no-tunnel", |lab| {
        let mut world = World::new(lab)?;
        let (ann, bob) = (world.ann.addresses()?, world.bob.addresses()?);
        let _server = world.bob.serve("udp-echo", bob[0], ALLOWED)?;
        let (loot, endpoint) = world.rob_ann()?;
        witness(&world.bob.host)?;
        let eve = lab.host("eve")?;
        let peer = loot.peer("bob")?;
        let unknown = |agent: &Agent| drops(agent, "wireguard-unknown-peer");

        // `cyd` may reach `ann` and not `bob`; his key, which only `ann` was told, does not help her.
        let stranger = Loot::take(&world.cyd)?;
        ensure!(stranger.peer("bob").is_err(), "cyd was told of bob");
        let before = unknown(&world.bob)?;
        let mut outlaw = Outlaw::new(&stranger, peer, Wire::direct(&eve, endpoint)?)?;
        ensure!(!outlaw.handshake(Duration::from_secs(1))?, "bob shakes hands with a stranger");
        ensure!(unknown(&world.bob)? > before, "the stranger is counted");

        // `ann` may, until she is removed: then her tunnel is dead and there is no other.
        let mut outlaw = Outlaw::new(&loot, peer, Wire::direct(&eve, endpoint)?)?;
        ensure!(outlaw.handshake(LIMIT)?, "no handshake");
        outlaw.reach(&world.bob, ann[0], bob[0])?;
        world.coordinator.admin(&["device", "remove", "ann"])?;
        eventually("bob has heard of it", LIMIT, || {
            let status = world.bob.json(&["status", "--json"])?;
            Ok(status["peers"].as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        let (had_arrived, before) =
            (arrived(&world.bob.host)?, drops(&world.bob, "wireguard-unknown-index")?);
        outlaw.send(&udp((ann[0], 4_000), (bob[0], ALLOWED), 2)?)?;
        eventually("the dead tunnel is counted", LIMIT, || {
            Ok((drops(&world.bob, "wireguard-unknown-index")? > before).then_some(()))
        })?;
        let before = unknown(&world.bob)?;
        let mut outlaw = Outlaw::new(&loot, peer, Wire::direct(&eve, endpoint)?)?;
        ensure!(!outlaw.handshake(Duration::from_secs(1))?, "bob shakes hands with a removed device");
        ensure!(unknown(&world.bob)? > before, "the removed device is counted");
        ensure!(arrived(&world.bob.host)? == had_arrived, "something arrived");
        Ok(())
    })
}
