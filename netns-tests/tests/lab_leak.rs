//! Overlay addresses belong to the TUN alone (promise 12), and the host gets back what was changed on it (promise 11).

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Host, Lab, NatKind, Process, Router, RouterSpec, workspace_binary};
use warren_netns_tests::programs::{Agent, Coordinator, tool};
use warren_netns_tests::traffic::{Echoes, Transfer};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);

/// Time for an answer that must not come.
const GRACE: Duration = Duration::from_secs(1);

const TCP: u16 = 7000;
const UDP: u16 = 7001;

/// Grants everything: it is not policy that keeps neighbours out.
const POLICY: &str = r#"{
  "tagOwners": {"tag:ann": [], "tag:bob": []},
  "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}],
}
"#;

/// `ann` and `bob`, each behind a router of its own with IPv4 and IPv6.
struct World {
    coordinator: Coordinator,
    homes: [Router; 2],
    ann: Agent,
    bob: Agent,
}

impl World {
    fn new(lab: &Lab) -> Result<Self> {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let home = |name: &str| lab.router(name, RouterSpec::new(NatKind::PortRestricted).ipv6());
        let homes = [home("home_ann")?, home("home_bob")?];
        let (ann, bob) = (Agent::start(homes[0].host("ann")?)?, Agent::start(homes[1].host("bob")?)?);
        Ok(Self { coordinator, homes, ann, bob })
    }

    fn joined(lab: &Lab) -> Result<Self> {
        let world = Self::new(lab)?;
        for agent in [&world.ann, &world.bob] {
            world.join(agent)?;
        }
        Ok(world)
    }

    fn join(&self, agent: &Agent) -> Result<()> {
        let key = self.coordinator.auth_key(&format!("tag:{}", agent.host.name()))?;
        agent.up(&self.coordinator.url, &key).map(drop)
    }
}

/// Everything of a host that the agent may touch, as text.
fn configuration(host: &Host) -> Result<String> {
    let questions: [&[&str]; 6] = [
        &["ip", "rule"],
        &["ip", "-6", "rule"],
        &["ip", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "-br", "addr"],
        &["nft", "list", "ruleset"],
    ];
    let mut text = String::new();
    for question in questions {
        let output = host.run(question[0], &question[1..])?;
        ensure!(output.status.success(), "{question:?}: {}", String::from_utf8_lossy(&output.stderr));
        text += &format!("$ {}\n{}", question.join(" "), String::from_utf8_lossy(&output.stdout));
    }
    Ok(text)
}

fn expect_same(what: &str, before: &str, host: &Host) -> Result<()> {
    let after = configuration(host)?;
    ensure!(before == after, "{what}: before:\n{before}\nafter:\n{after}");
    Ok(())
}

/// A packet to one of ann's services, in one family, by one protocol.
struct Knock {
    what: String,
    process: Process,
}

impl Knock {
    fn new(from: &Host, verb: &str, to: SocketAddr, patience: Duration) -> Result<Self> {
        let mut command = from.command(workspace_binary("lab-tool")?);
        let answer = patience.as_millis().to_string();
        command.args([verb, &to.to_string(), "--answer", &answer]);
        if verb == "tcp-stream" {
            command.args(["--total", "1"]);
        }
        Ok(Self { what: format!("{verb} to {to}"), process: from.spawn(command)? })
    }

    /// How it ended: `pong`, `complete` or the reason of a failure.
    fn ended(mut self) -> Result<(String, String)> {
        self.process.wait_for_line(r#""event":"end""#, LIMIT)?;
        let log = self.process.log()?;
        let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let told = |line: &Value| match line["event"].as_str() {
            Some("pong") => Some("pong".to_owned()),
            _ => line["how"].as_str().map(str::to_owned),
        };
        let how = lines.iter().find_map(told).with_context(|| format!("{}: {log}", self.what))?;
        Ok((self.what, how))
    }
}

/// Everything that somebody at `from` can send to these addresses of ann, with how it ended.
fn knock(from: &Host, addresses: &[IpAddr], patience: Duration) -> Result<Vec<(String, String)>> {
    let mut knocks = Vec::new();
    for ip in addresses {
        knocks.push(Knock::new(from, "udp-ping", SocketAddr::new(*ip, UDP), patience)?);
        knocks.push(Knock::new(from, "tcp-stream", SocketAddr::new(*ip, TCP), patience)?);
    }
    knocks.into_iter().map(Knock::ended).collect()
}

/// Packets counted by each rule of a table: what it looks at, and how many.
fn counters(host: &Host, table: &str) -> Result<Vec<(String, u64)>> {
    let output = host.run("nft", &["-j", "list", "ruleset"])?;
    let listed: Value = serde_json::from_slice(&output.stdout)?;
    let objects = listed["nftables"].as_array().context("a list of objects")?;
    let rules = objects.iter().filter_map(|object| object.get("rule")).filter(|rule| rule["table"] == table);
    let count = |rule: &Value| {
        let parts = rule["expr"].as_array()?;
        let packets = parts.iter().find_map(|part| part["counter"]["packets"].as_u64())?;
        let field = &parts.first()?["match"]["left"]["payload"];
        Some((format!("{} {}", field["protocol"].as_str()?, field["field"].as_str()?), packets))
    };
    Ok(rules.filter_map(count).collect())
}

#[test]
fn a_neighbour_reaches_nothing_at_an_overlay_address() -> Result<()> {
    lab::test("weak host", |lab| {
        let World { coordinator: _coordinator, homes, ann, bob } = World::joined(lab)?;
        let overlay = ann.addresses()?;
        let servers: Vec<Process> = overlay
            .iter()
            .flat_map(|ip| [("tcp-serve", *ip, TCP), ("udp-echo", *ip, UDP)])
            .map(|(verb, ip, port)| ann.serve(verb, ip, port))
            .collect::<Result<_>>()?;
        // The services are there, for those who come the right way.
        ensure!(bob.ping("ann", 1)?.len() == 1, "bob reaches ann");
        for (what, how) in knock(&bob.host, &overlay, LIMIT)? {
            ensure!(how == "pong" || how == "complete", "bob: {what}: {how}");
        }
        let served: Vec<String> = servers.iter().map(Process::log).collect::<Result<_>>()?;

        let evil = homes[0].lan().host("evil")?;
        let physical: [IpAddr; 2] = [ann.host.v4().into(), ann.host.v6().context("IPv6 at home")?.into()];
        for (pool, to) in ["100.64.0.0/10", "fc00::/7"].into_iter().zip(physical) {
            evil.route_via(pool, to)?;
        }
        let pings = |to: &IpAddr| -> Result<String> {
            let output = evil.run("ping", &["-n", "-c", "1", "-W", "1", &to.to_string()])?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        for (what, how) in knock(&evil, &overlay, GRACE)? {
            ensure!(how == "timeout", "a neighbour: {what}: {how}");
        }
        for ip in &overlay {
            let told = pings(ip)?;
            ensure!(told.contains("0 received") && !told.contains("From"), "a neighbour pings: {told}");
        }
        for (server, before) in servers.iter().zip(&served) {
            ensure!(server.log()? == *before, "a neighbour reached {}", server.log()?);
        }
        for rule in ["ip daddr", "ip6 daddr"] {
            let count = counters(&ann.host, "warren")?.into_iter().find(|(name, _)| name == rule);
            ensure!(
                count.as_ref().is_some_and(|(_, packets)| *packets >= 3),
                "the guard saw nothing: {count:?}"
            );
        }

        // On the link itself nobody answers for an overlay address either.
        for ip in &overlay {
            let len = if ip.is_ipv4() { 32 } else { 128 };
            evil.ip(&format!("route replace {ip}/{len} dev eth0"))?;
            let told = pings(ip)?;
            ensure!(told.contains("0 received"), "a neighbour pings on the link: {told}");
            let neighbours = evil.run("ip", &["neigh", "show", "to", &ip.to_string()])?;
            let neighbours = String::from_utf8_lossy(&neighbours.stdout).into_owned();
            ensure!(!neighbours.contains("lladdr"), "somebody answers for {ip}: {neighbours}");
            evil.ip(&format!("route del {ip}/{len} dev eth0"))?;
        }

        // It is the guard that keeps the neighbour out: without it all of that works.
        ann.host.nft("delete table inet warren\n")?;
        for (what, how) in knock(&evil, &overlay, LIMIT)? {
            ensure!(how == "pong" || how == "complete", "this test shows nothing: {what}: {how}");
        }
        Ok(())
    })
}

#[test]
fn a_neighbour_cannot_pose_as_a_peer() -> Result<()> {
    lab::test("posing", |lab| {
        let World { coordinator: _coordinator, homes, ann, bob } = World::joined(lab)?;
        let evil = homes[0].lan().host("evil")?;
        let physical: [IpAddr; 2] = [ann.host.v4().into(), ann.host.v6().context("IPv6 at home")?.into()];
        let mut posing = Vec::new();
        for ((to, posed), port) in physical.into_iter().zip(bob.addresses()?).zip(UDP..) {
            let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
            // A service on all of ann's addresses, which goes by the sender's.
            let mut server = ann.serve("udp-echo", any, port)?;
            let len = if posed.is_ipv4() { "/32" } else { "/128 nodad" };
            evil.ip(&format!("addr add {posed}{len} dev eth0"))?;
            let (at, from) =
                (SocketAddr::new(to, port).to_string(), SocketAddr::new(posed, 9999).to_string());
            let told = tool(&evil, &["udp-ping", &at, "--answer", "200", "--from", &from])?;
            ensure!(told["received"] == 0, "{told}");
            // A packet of the neighbour's own came later and is there: the other one never will be.
            let told = tool(&evil, &["udp-ping", &at])?;
            ensure!(told["received"] == 1, "{told}");
            server.wait_for_line("datagram", LIMIT)?;
            let log = server.log()?;
            ensure!(!log.contains(&posed.to_string()), "a neighbour posed as bob: {log}");
            posing.push((at, from, server));
        }
        // It is the guard that prevents it.
        ann.host.nft("delete table inet warren\n")?;
        for (at, from, mut server) in posing {
            tool(&evil, &["udp-ping", &at, "--answer", "200", "--from", &from])?;
            server.wait_for_line(&from, LIMIT)?;
        }
        Ok(())
    })
}

/// Has the kernel count what leaves the network card with an overlay address in it, and UDP for comparison.
fn watch_leaving(host: &Host, overlay: &[IpAddr]) -> Result<()> {
    let list = |v4: bool| {
        let of_family = overlay.iter().filter(|ip| ip.is_ipv4() == v4);
        of_family.map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
    };
    let (v4, v6) = (list(true), list(false));
    host.nft(&format!(
        "table netdev leaving {{\n chain out {{\n  type filter hook egress device \"eth0\" priority 0;\n\
         ip saddr {{ {v4} }} counter\n ip daddr {{ {v4} }} counter\n arp daddr ip {{ {v4} }} counter\n\
         ip6 saddr {{ {v6} }} counter\n ip6 daddr {{ {v6} }} counter\n udp dport != 0 counter\n }}\n}}\n"
    ))
}

#[test]
fn a_killed_agent_leaks_no_overlay_packet() -> Result<()> {
    lab::test("leak", |lab| {
        let mut world = World::joined(lab)?;
        let peers = world.bob.addresses()?;
        let overlay = [world.ann.addresses()?, peers.clone()].concat();
        watch_leaving(&world.ann.host, &overlay)?;
        let left = |host: &Host| -> Result<Vec<(String, u64)>> {
            let counts = counters(host, "leaving")?;
            Ok(counts.into_iter().filter(|(_, packets)| *packets > 0).collect())
        };
        let only_the_tunnel = |host: &Host| -> Result<()> {
            let left = left(host)?;
            ensure!(matches!(left.as_slice(), [(what, _)] if what == "udp dport"), "what left: {left:?}");
            Ok(())
        };
        let (mut servers, mut traffic) = (Vec::new(), Vec::new());
        for ip in &peers {
            servers.push(world.bob.serve("tcp-serve", *ip, TCP)?);
            servers.push(world.bob.serve("udp-echo", *ip, UDP)?);
            let transfer = Transfer::start(&world.ann.host, SocketAddr::new(*ip, TCP))?;
            traffic.push((transfer, Echoes::start(&world.ann.host, SocketAddr::new(*ip, UDP))?));
        }
        world.ann.process.kill()?;
        // What runs goes on trying, and new connections are tried, too: the host itself says that there is no way.
        for (what, how) in knock(&world.ann.host, &peers, LIMIT)? {
            ensure!(how == "unreachable", "{what}: {how}");
        }
        for ip in &peers {
            ensure!(!world.ann.host.pings(*ip)?, "{ip} answers although the agent is dead");
        }
        only_the_tunnel(&world.ann.host)?;

        // The same connections go on when the agent is back.
        world.ann.start_again()?;
        for (transfer, echoes) in &traffic {
            transfer.goes_on(Duration::from_millis(200))?;
            echoes.go_on(1)?;
        }
        only_the_tunnel(&world.ann.host)?;
        traffic.into_iter().try_for_each(|(transfer, _)| transfer.finish().map(drop))?;

        // It is the routes that stay which prevent it.
        world.ann.process.kill()?;
        let table = warren_agent::os::TABLE.to_string();
        for family in ["-4", "-6"] {
            let flushed = world.ann.host.run("ip", &[family, "route", "flush", "table", &table])?;
            ensure!(flushed.status.success(), "{}", String::from_utf8_lossy(&flushed.stderr));
        }
        knock(&world.ann.host, &peers, GRACE)?;
        let leaked = left(&world.ann.host)?;
        for what in ["ip daddr", "ip6 daddr"] {
            ensure!(leaked.iter().any(|(seen, _)| seen == what), "this test shows nothing: {leaked:?}");
        }
        Ok(())
    })
}

#[test]
fn the_host_is_as_it_was_after_down_a_signal_and_a_kill() -> Result<()> {
    lab::test("restore", |lab| {
        let mut world = World::new(lab)?;
        let before = configuration(&world.ann.host)?;
        world.join(&world.ann)?;
        world.join(&world.bob)?;
        let up = configuration(&world.ann.host)?;
        ensure!(up != before, "the agent changes the host, or this test shows nothing");

        ensure!(world.ann.warren(&["down"])?.status.success(), "warren down");
        expect_same("after `warren down`", &before, &world.ann.host)?;
        ensure!(world.ann.warren(&["up"])?.status.success(), "warren up");
        expect_same("up once more", &up, &world.ann.host)?;

        ensure!(world.ann.process.stop(LIMIT)?.success(), "SIGTERM is a good end");
        expect_same("after SIGTERM", &before, &world.ann.host)?;
        world.ann.start_again()?;
        expect_same("started again", &up, &world.ann.host)?;

        world.ann.process.kill()?;
        let killed = configuration(&world.ann.host)?;
        ensure!(killed.contains("unreachable") && killed.contains("table inet warren"), "{killed}");
        world.ann.start_again()?;
        expect_same("taken over after a kill", &up, &world.ann.host)?;
        world.ann.process.kill()?;
        world.ann.start_again()?;
        ensure!(world.ann.process.stop(LIMIT)?.success(), "SIGTERM is a good end");
        expect_same("after a kill, a start and SIGTERM", &before, &world.ann.host)
    })
}
