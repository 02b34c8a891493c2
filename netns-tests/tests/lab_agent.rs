//! The agent on real packets: its restart while the coordinator is away, auth keys that don't work, netcheck behind NATs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Output;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_agent::api::Nat;
use warren_agent::{clock, netcheck};
use warren_netns_tests::lab::{
    self, Host, Lab, NatKind, RouterSpec, Stopwatch, eventually, workspace_binary,
};
use warren_netns_tests::programs::{Agent, Coordinator, Relay};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

const POLICY: &str = r#"{
  "tagOwners": {"tag:a": [], "tag:b": []},
  "grants": [{"src": ["tag:a"], "dst": ["tag:b"], "ip": ["*"]}],
}"#;

/// Two agents, each behind a NAT of this kind, that reach each other over this kind of path.
fn pair(lab: &Lab, coordinator: &Coordinator, kind: NatKind, path: &str) -> Result<[Agent; 2]> {
    let join = |tag: &str| -> Result<Agent> {
        let router = lab.router(&format!("{path}{tag}nat"), RouterSpec::new(kind))?;
        let agent = Agent::start(router.host(&format!("{path}{tag}"))?)?;
        agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{tag}"))?)?;
        Ok(agent)
    };
    let agents = [join("a")?, join("b")?];
    reaches(&agents[0], &agents[1], path)?;
    Ok(agents)
}

/// Waits until the kernel's own ping gets through, over this kind of path; how long it took.
fn reaches(from: &Agent, to: &Agent, path: &str) -> Result<Duration> {
    let name = to.host.name();
    let ip = *to.addresses()?.first().context("it has an address")?;
    let watch = Stopwatch::start();
    let mut answered = None;
    eventually(&format!("{} reaches {name} over {path}", from.host.name()), LIMIT, || {
        if from.host.pings(ip)? {
            answered.get_or_insert_with(|| watch.elapsed());
        }
        Ok((answered.is_some() && from.peer(name)?["path"]["kind"] == path).then_some(()))
    })?;
    answered.context("it answered")
}

fn failed(output: &Output, code: i32, said: &str) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code) && text.contains(said) && text.contains("fix: "), "{text}");
    Ok(())
}

/// The coordinator is away, and for the direct pair the relay as well: nobody can tell a restarted agent where its peers
/// are. It knows from before.
#[test]
fn traffic_goes_on_after_a_restart_while_the_coordinator_is_away() -> Result<()> {
    lab::test("restart", |lab| {
        let mut coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let mut relay = Relay::start(lab.host("relay")?, &coordinator, "fra")?;
        let mut relayed = pair(lab, &coordinator, NatKind::Symmetric, "relay")?;
        let mut direct = pair(lab, &coordinator, NatKind::PortRestricted, "direct")?;
        // What is kept is saved a moment after it changed.
        for agent in relayed.iter().chain(&direct) {
            eventually("paths and tokens are saved", LIMIT, || {
                let networks = agent.state_dir.join("networks");
                let network = std::fs::read_dir(networks)?.next().context("it is in a network")??;
                let saved = std::fs::read_to_string(network.path().join("resume")).unwrap_or_default();
                Ok((saved.contains("rly_") && saved.contains("dev_")).then_some(()))
            })?;
        }
        coordinator.process.kill()?;
        for (kind, agents) in [("relay", &mut relayed), ("direct", &mut direct)] {
            if kind == "direct" {
                relay.process.kill()?;
            }
            for n in [0, 1] {
                agents[n].process.kill()?;
                agents[n].start_again()?;
                let took = reaches(&agents[0], &agents[1], kind)?;
                lab::say(&format!("{kind}: traffic goes on {} ms after a restart", took.as_millis()));
                let status = agents[n].json(&["status", "--json"])?;
                ensure!(status["coordinator"]["connected"] == false, "{status}");
            }
            // Both at once: nobody remembers anything but what is on disk.
            for agent in agents.iter_mut() {
                agent.process.kill()?;
            }
            for agent in agents.iter_mut() {
                agent.start_again()?;
            }
            reaches(&agents[0], &agents[1], kind)?;
        }
        coordinator.start_again()?;
        for agent in relayed.iter().chain(&direct) {
            eventually("it is connected again", LIMIT, || {
                Ok((agent.json(&["status", "--json"])?["coordinator"]["connected"] == true).then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn an_auth_key_of_the_real_coordinator_that_does_not_work_is_told_why() -> Result<()> {
    lab::test("keys", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let (one, two) = (Agent::start(lab.host("one")?)?, Agent::start(lab.host("two")?)?);
        let up = |agent: &Agent, url: &str, key: &str| {
            agent.warren(&["up", "--coordinator", url, "--auth-key", key, "--timeout", "20s"])
        };
        let url = coordinator.url.as_str();
        let expired = coordinator.admin(&["auth-key", "create", "--tag", "tag:a", "--expires", "1s"])?;
        let used = coordinator.auth_key("tag:a")?;
        one.up(url, &used)?;
        failed(&up(&two, url, &used)?, 1, "used")?;
        let over = clock::now().unix + Duration::from_secs(1);
        eventually("the key has expired", LIMIT, || Ok((clock::now().unix > over).then_some(())))?;
        failed(&up(&two, url, expired.trim())?, 1, "expired")?;
        let other = Coordinator::start(lab.host("other")?, POLICY)?;
        failed(&up(&two, url, &other.auth_key("tag:a")?)?, 1, "not the expected one")?;
        failed(&up(&two, url, "wkey-nonsense")?, 2, "auth key")?;
        let nobody = format!("http://{}:9", coordinator.host.v4());
        let good = coordinator.auth_key("tag:b")?;
        let away = ["up", "--coordinator", &nobody, "--auth-key", &good, "--timeout", "1s"];
        failed(&two.warren(&away)?, 1, "can't be reached")?;
        failed(&two.warren(&["up", "--coordinator", url])?, 2, "nothing proves")?;
        // Nothing is lost by any of this.
        two.up(url, &good)?;
        reaches(&one, &two, "direct")?;
        // The first device may reach the second, whose name it knows; of others it says what it can.
        let why = one.why("three", 22)?;
        ensure!(why["reason"] == "not-visible" && why["allowed"] == false, "{why}");
        Ok(())
    })
}

/// RFC 5780's server: at two addresses with two ports each. It answers until the lab ends.
struct Stun {
    at: SocketAddr,
    _threads: Vec<JoinHandle<()>>,
}

impl Stun {
    fn start(host: &Host) -> Result<Self> {
        let ips = [host.v4(), host.add_v4()?];
        let bind = |n: usize| -> Result<UdpSocket> {
            // Neighbours differ by the port, the second half by the address.
            let at = SocketAddr::from((ips[n / 2], [3478, 3479][n % 2]));
            Ok(host.enter(|| UdpSocket::bind(at))??)
        };
        let sockets = [bind(0)?, bind(1)?, bind(2)?, bind(3)?];
        let at = sockets[0].local_addr()?;
        let threads = (0..4).map(|n| {
            let sockets = sockets.iter().map(UdpSocket::try_clone).collect::<std::io::Result<Vec<_>>>()?;
            Ok(std::thread::spawn(move || while answer(&sockets, n).is_ok() {}))
        });
        let threads = threads.collect::<Result<_>>()?;
        Ok(Self { at, _threads: threads })
    }
}

/// Answers one request that came to socket `n`.
fn answer(sockets: &[UdpSocket], n: usize) -> std::io::Result<()> {
    let mut buffer = [0; 128];
    let (len, from) = sockets[n].recv_from(&mut buffer)?;
    let (SocketAddr::V4(seen), true) = (from, len >= 20) else { return Ok(()) };
    let via = match buffer.get(27).filter(|_| len >= 28) {
        Some(2) => n ^ 1,
        Some(6) => n ^ 3,
        _ => n,
    };
    let mut attributes = Vec::new();
    let mut attribute = |kind: u16, ip: &Ipv4Addr, port: u16| {
        attributes.extend(kind.to_be_bytes());
        attributes.extend([0, 8, 0, 1]);
        attributes.extend(port.to_be_bytes());
        attributes.extend(ip.octets());
    };
    attribute(0x0001, seen.ip(), seen.port());
    if let SocketAddr::V4(other) = sockets[n ^ 3].local_addr()? {
        attribute(0x802c, other.ip(), other.port());
    }
    let mut bytes = vec![1, 1, 0, attributes.len() as u8];
    bytes.extend(&buffer[4..20]);
    bytes.extend(attributes);
    sockets[via].send_to(&bytes, from).map(drop)
}

fn check(host: &Host, server: SocketAddr) -> Result<Nat> {
    let own = [IpAddr::from(host.v4())];
    let run = || -> std::io::Result<Nat> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(netcheck::nat(&[server], &own, 0)))
    };
    Ok(host.enter(run)??)
}

#[test]
fn netcheck_knows_every_nat_for_what_it_is() -> Result<()> {
    lab::test("netcheck", |lab| {
        let server = Stun::start(&lab.host("stun")?)?;
        let (ei, ad, apd) = ("endpoint-independent", "address-dependent", "address-and-port-dependent");
        let hairpin = RouterSpec::new(NatKind::FullCone).hairpin();
        for (n, (spec, want)) in [
            (RouterSpec::new(NatKind::FullCone), (ei, ei, false)),
            (RouterSpec::new(NatKind::AddressRestricted), (ei, ad, false)),
            (RouterSpec::new(NatKind::PortRestricted), (ei, apd, false)),
            (RouterSpec::new(NatKind::Symmetric), (apd, apd, false)),
            (hairpin, (ei, ei, true)),
        ]
        .into_iter()
        .enumerate()
        {
            let router = lab.router(&format!("r{n}"), spec.clone())?;
            let inside = router.host(&format!("h{n}"))?;
            // The second time as well: the first has left the NAT open for other sockets than the next one's.
            for _ in 0..2 {
                let nat = check(&inside, server.at)?;
                let got = (nat.mapping.as_deref(), nat.filtering.as_deref(), nat.hairpin);
                ensure!(got == (Some(want.0), Some(want.1), Some(want.2)), "{spec:?}: {nat:?}");
            }
        }
        let nat = check(&lab.host("public")?, server.at)?;
        let none = Some("none".to_owned());
        ensure!(nat == Nat { mapping: none.clone(), filtering: none, hairpin: None }, "{nat:?}");
        Ok(())
    })
}

/// The whole way: our own relay with two addresses for STUN, and what people see.
#[test]
fn warren_netcheck_asks_our_own_relays() -> Result<()> {
    lab::test("netcheck2", |lab| {
        let coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let fra = lab.host("fra")?;
        let (first, second) = (fra.v4(), fra.add_v4()?);
        let key = coordinator.admin(&["relay", "create", "fra"])?;
        let mut command = fra.command(workspace_binary("warren-relay")?);
        command.args(["serve", "--coordinator", &coordinator.url, "--join-key", key.trim(), "--state-dir"]);
        command.arg(fra.dir().join("state")).args(["--listen", &format!("{first}:3340")]);
        command.args(["--stun-listen", &format!("{first}:3478"), "--stun-second", &format!("{second}:3479")]);
        let mut relay = fra.spawn(command)?;
        relay.wait_for_line("joined", LIMIT)?;
        for (n, (kind, mapping)) in [
            (NatKind::PortRestricted, "endpoint-independent"),
            (NatKind::Symmetric, "address-and-port-dependent"),
        ]
        .into_iter()
        .enumerate()
        {
            let router = lab.router(&format!("r{n}"), RouterSpec::new(kind))?;
            let agent = Agent::start(router.host(&format!("h{n}"))?)?;
            agent.up(&coordinator.url, &coordinator.auth_key("tag:a")?)?;
            let found = agent.json(&["netcheck", "--json"])?;
            let nat = &found["nat"];
            ensure!(nat["mapping"] == mapping && nat["hairpin"] == false, "{found}");
            ensure!(nat["filtering"] == "address-and-port-dependent", "{found}");
            let seen: SocketAddr = found["ipv4"].as_str().context("an address")?.parse()?;
            ensure!(found["udp"] == true && seen.ip() == router.v4(), "{found}");
            ensure!(
                found["relays"][0]["name"] == "fra" && found["relays"][0]["rtt_ms"].is_number(),
                "{found}"
            );
        }
        Ok(())
    })
}
