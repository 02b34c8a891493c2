//! Port mapping against a real miniupnpd: by each protocol, through its renewal, its restart and its refusal; and two machines
//! behind symmetric NATs that meet directly because of it. And a port that somebody forwards by hand.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_agent::portmap::{Config, Mapper, NONCE_LEN, Protocol, Timing, probe};
use warren_netns_tests::gateway::{Gateway, INTERNET, MINIUPNPD};
use warren_netns_tests::lab::{self, Host, Lab, NatKind, Router, RouterSpec, Stopwatch, eventually};
use warren_netns_tests::programs::{Agent, Coordinator};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// A life short enough to see it renewed twice.
const TIMING: Timing = Timing {
    lifetime: Duration::from_secs(8),
    check: Duration::from_secs(2),
    retry: Duration::from_secs(1),
    rest: Duration::from_secs(4),
};

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// A packet from outside gets in by the mapping.
fn gets_in(outside: &Host, inside: &UdpSocket, external: SocketAddrV4) -> Result<()> {
    let sender = outside.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    let mut buffer = [0; 8];
    eventually(&format!("a packet to {external} gets in"), LIMIT, || {
        sender.send_to(b"in", external)?;
        match inside.recv_from(&mut buffer) {
            Ok((2, from)) if from == SocketAddr::new(outside.v4().into(), sender.local_addr()?.port()) => {
                Ok(Some(()))
            }
            _ => Ok(None),
        }
    })
}

/// The whole life of a mapping by one protocol.
fn one_life(lab: &Lab, outside: &Host, protocol: Protocol, gateway: Gateway) -> Result<()> {
    let name = protocol.word().replace('-', "");
    let router = lab.router(&format!("{name}R"), RouterSpec::new(NatKind::Symmetric).port_mapping())?;
    let mut program = gateway.start(&router)?;
    let host = router.host(&name)?;
    let inside = host.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 41_641)))??;
    inside.set_read_timeout(Some(Duration::from_millis(50)))?;
    let config = Config {
        gateway: router.lan().gateway()?,
        port: 41_641,
        nonce: [5; NONCE_LEN],
        mark: 0,
        timing: TIMING,
    };
    host.enter(|| -> Result<()> {
        let runtime = runtime()?;
        let found = runtime.block_on(probe(config.gateway, 0));
        ensure!(found == [protocol], "the gateway speaks {protocol:?}, and {found:?} was found");
        let mut mapper = runtime.block_on(async { Mapper::spawn(config) });
        let state = runtime.block_on(mapper.changed());
        let (external, by) = state.mapping.context("a mapping")?;
        ensure!(by == protocol && *external.ip() == router.v4() && !state.lost, "{state:?}");
        gets_in(outside, &inside, external)?;

        // Twice its life later it is still there. The mapper runs meanwhile.
        let watch = Stopwatch::start();
        runtime.block_on(async { tokio::time::sleep(TIMING.lifetime * 2).await });
        ensure!(mapper.state() == state, "after {:?}: {:?}", watch.elapsed(), mapper.state());
        gets_in(outside, &inside, external)?;

        // The router starts anew and has forgotten.
        program.kill()?;
        ensure!(!Gateway::mapped(&router)?.is_empty(), "the rule of the mapping");
        program = gateway.start(&router)?;
        ensure!(Gateway::mapped(&router)?.is_empty(), "a new router maps nothing");
        let watch = Stopwatch::start();
        runtime.block_on(async {
            // The mapper runs on this thread.
            while Gateway::mapped(&router)?.is_empty() {
                ensure!(watch.elapsed() < LIMIT, "{protocol:?}: not mapped again");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        })?;
        lab::say(&format!(
            "{}: mapped again {} ms after a restart",
            protocol.word(),
            watch.elapsed().as_millis()
        ));
        let (external, _) = mapper.state().mapping.context("a mapping")?;
        gets_in(outside, &inside, external)?;

        // One that refuses: the mapping is lost, and told. Then it allows again.
        program.kill()?;
        program = Gateway { allows: false, ..gateway }.start(&router)?;
        let lost = runtime.block_on(mapper.changed());
        ensure!(lost.mapping.is_none() && lost.lost, "{lost:?}");
        program.kill()?;
        program = gateway.start(&router)?;
        let back = runtime.block_on(mapper.changed());
        ensure!(back.mapping.is_some() && !back.lost, "{back:?}");

        // The end gives it back.
        runtime.block_on(mapper.close());
        ensure!(Gateway::mapped(&router)?.is_empty(), "left behind: {}", Gateway::mapped(&router)?);
        Ok(())
    })??;
    program.kill()?;
    Ok(())
}

#[test]
fn a_mapping_is_made_renewed_made_again_and_given_back_by_each_protocol() -> Result<()> {
    lab::test_in("portmap", INTERNET, &[MINIUPNPD], |lab| {
        let outside = lab.host("S")?;
        let none = Gateway { pcp: false, natpmp: false, upnp: false, allows: true };
        let lives = [
            (Protocol::Pcp, Gateway { pcp: true, ..none }),
            (Protocol::NatPmp, Gateway { natpmp: true, ..none }),
            (Protocol::Upnp, Gateway { upnp: true, ..none }),
        ];
        std::thread::scope(|scope| {
            let running: Vec<_> = lives
                .into_iter()
                .map(|(protocol, gateway)| {
                    let outside = &outside;
                    scope.spawn(move || one_life(lab, outside, protocol, gateway).context(protocol.word()))
                })
                .collect();
            for life in running {
                life.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            }
            Ok(())
        })
    })
}

/// After `kill -9` the gateway still holds the mapping, and lets the same device have it again.
#[test]
fn a_mapping_that_was_left_behind_is_taken_up_again() -> Result<()> {
    lab::test_in("leftover", INTERNET, &[MINIUPNPD], |lab| {
        let router = lab.router("R", RouterSpec::new(NatKind::Symmetric).port_mapping())?;
        let _program = Gateway { upnp: false, ..Gateway::ALL }.start(&router)?;
        let host = router.host("A")?;
        let config = |nonce| -> Result<Config> {
            Ok(Config {
                gateway: router.lan().gateway()?,
                port: 41_641,
                nonce: [nonce; NONCE_LEN],
                mark: 0,
                timing: Timing { lifetime: Duration::from_secs(3_600), ..TIMING },
            })
        };
        let map = |config: Config| -> Result<Option<(SocketAddrV4, Protocol)>> {
            host.enter(|| {
                runtime()?.block_on(async { Ok(Mapper::spawn(config).changed().await.mapping) }) // dropped, not closed
            })?
        };
        let first = map(config(1)?)?;
        ensure!(first.is_some_and(|(_, by)| by == Protocol::Pcp), "{first:?}");
        ensure!(map(config(1)?)? == first, "the same device, the same mapping");
        Ok(())
    })
}

const POLICY: &str = r#"{
  "tagOwners": {"tag:a": []},
  "grants": [{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["*"]}],
}"#;

#[test]
fn two_symmetric_nats_meet_directly_once_one_router_maps() -> Result<()> {
    lab::test_in("symmetric", INTERNET, &[MINIUPNPD], |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let join = |name: &str| -> Result<(Router, Agent)> {
            let spec = RouterSpec::new(NatKind::Symmetric).port_mapping();
            let router = lab.router(&format!("{name}R"), spec)?;
            let agent = Agent::start(router.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key("tag:a")?)?;
            Ok((router, agent))
        };
        let ((router, a), (_other, b)) = (join("a")?, join("b")?);
        let health = |agent: &Agent| -> Result<bool> {
            let status = agent.json(&["status", "--json"])?;
            let items = status["health"].as_array().context("health")?;
            Ok(items.iter().any(|item| item["code"] == "port-mapping-lost"))
        };
        a.wait_for_path("b", "relay")?;
        ensure!(a.json(&["netcheck", "--json"])?["port_mapping"] == serde_json::json!([]), "no gateway yet");

        let mut program = Gateway::ALL.start(&router)?;
        let watch = Stopwatch::start();
        a.wait_for_path("b", "direct")?;
        b.wait_for_path("a", "direct")?;
        lab::say(&format!("direct {} ms after the router began to map ports", watch.elapsed().as_millis()));
        a.ping("b", 3)?;
        let found = a.json(&["netcheck", "--json"])?;
        ensure!(found["port_mapping"] == serde_json::json!(["pcp", "nat-pmp", "upnp"]), "{found}");
        ensure!(!health(&a)?, "nothing is lost");

        // A router that has forgotten, and refuses from now on. Its clock counts seconds and may differ from ours by two: one that
        // lived for less could not be told from one that lives on.
        std::thread::sleep(Duration::from_secs(5));
        program.kill()?;
        program = Gateway { allows: false, ..Gateway::ALL }.start(&router)?;
        eventually("the loss is told", LIMIT, || Ok(health(&a)?.then_some(())))?;
        program.kill()?;
        program = Gateway::ALL.start(&router)?;
        eventually("it is mapped again", LIMIT, || Ok((!health(&a)?).then_some(())))?;
        a.wait_for_path("b", "direct")?;

        // Going down gives it back.
        ensure!(!Gateway::mapped(&router)?.is_empty(), "the rule of the mapping");
        ensure!(a.warren(&["down"])?.status.success(), "down");
        ensure!(Gateway::mapped(&router)?.is_empty(), "left behind: {}", Gateway::mapped(&router)?);
        program.kill()?;
        Ok(())
    })
}

/// `warrend --endpoint`: neither STUN nor a protocol tells of the forwarded port, and no guess finds it.
#[test]
fn two_symmetric_nats_meet_directly_at_a_static_endpoint() -> Result<()> {
    lab::test_in("static", INTERNET, &[], |lab| {
        const PORT: u16 = 41_641;
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let join = |name: &str, args: &[&str]| -> Result<(Router, Agent)> {
            let router = lab.router(&format!("{name}R"), RouterSpec::new(NatKind::Symmetric))?;
            let args = args.iter().chain(&["--no-port-mapping"]).map(Into::into).collect();
            let agent = Agent::start_with(router.host(name)?, args)?;
            agent.up(&coordinator.url, &coordinator.auth_key("tag:a")?)?;
            Ok((router, agent))
        };
        let (router, mut a) = join("a", &["--listen-port", &PORT.to_string()])?;
        let (_other, b) = join("b", &[])?;
        // The port that is forwarded is not the host's own.
        let (outside, inside) = (SocketAddrV4::new(router.v4(), 4_500), SocketAddrV4::new(a.host.v4(), PORT));
        router.nft(&format!(
            "table ip manual {{ chain in {{ type nat hook prerouting priority dstnat - 5; iifname wan udp dport {} dnat to {inside}; }}; }}",
            outside.port()
        ))?;
        a.wait_for_path("b", "relay")?;
        b.wait_for_path("a", "relay")?;

        a.process.stop(LIMIT)?;
        a.args.extend(["--endpoint".into(), outside.to_string().into()]);
        a.start_again()?;
        a.wait_for_path("b", "direct")?;
        let direct = |agent: &Agent, peer: &str| -> Result<serde_json::Value> {
            agent.wait_for_path(peer, "direct")?;
            Ok(agent.peer(peer)?["path"]["endpoint"].clone())
        };
        let endpoint = direct(&b, "a")?;
        ensure!(endpoint == outside.to_string().as_str(), "{endpoint}");
        let told = || -> Result<bool> {
            let own = a.json(&["netcheck", "--json"])?["endpoints"].clone();
            let own = own.as_array().context("endpoints")?;
            Ok(own.iter().any(|e| e["kind"] == "static" && e["addr"] == outside.to_string().as_str()))
        };
        ensure!(told()?, "netcheck lists it");

        // Another network, as far as the agent can see.
        a.host.ip("link add extra type veth peer name extra1")?;
        a.host.ip("addr add 10.77.0.1/24 dev extra")?;
        a.host.ip("link set extra1 up")?;
        a.host.ip("link set extra up")?;
        eventually("the change is seen", LIMIT, || {
            Ok(a.process.log()?.contains("the network changed").then_some(()))
        })?;
        ensure!(told()? && direct(&b, "a")? == outside.to_string().as_str(), "it outlives the network");
        a.ping("b", 3)?;
        Ok(())
    })
}
