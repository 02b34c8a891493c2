//! A machine moves while a TCP transfer and a stream of datagrams run: both go on, without the applications knowing.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use warren_netns_tests::lab::{self, Host, Lab, NatKind, RouterSpec, Stopwatch, eventually};
use warren_netns_tests::programs::{Agent, Coordinator, Relay};
use warren_netns_tests::traffic::{Datagrams, Transfer};

const POLICY: &str =
    r#"{"tagOwners": {"tag:a": []}, "grants": [{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["*"]}]}"#;
const TCP: u16 = 7_000;
const UDP: u16 = 7_001;

/// Bound for a direct path to be found again; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(120);

/// Waits until packets take a direct path again.
fn direct_again(from: &Agent) -> Result<()> {
    let watch = Stopwatch::start();
    let what = format!("{} reaches b directly", from.host.name());
    eventually(&what, LIMIT, || Ok((from.peer("b")?["path"]["kind"] == "direct").then_some(())))?;
    lab::say(&format!("  direct again {} ms later", watch.elapsed().as_millis()));
    Ok(())
}

/// Traffic from `from` to `to` runs while `event` happens, and goes on after it.
fn across(what: &str, from: &Agent, to: IpAddr, event: impl FnOnce() -> Result<()>) -> Result<()> {
    let transfer = Transfer::start(&from.host, SocketAddr::new(to, TCP))?;
    let datagrams = Datagrams::start(&from.host, SocketAddr::new(to, UDP))?;
    datagrams.go_on(10)?;
    let watch = Stopwatch::start();
    event().context("the event")?;
    let took = watch.elapsed();
    transfer.goes_on(Duration::from_secs(2)).with_context(|| what.to_owned())?;
    datagrams.go_on(20).with_context(|| what.to_owned())?;
    let (gap, delivered) = (transfer.finish()?, datagrams.finish()?);
    lab::say(&format!(
        "{what} (takes {} ms): longest gap {} ms for TCP, {} ms for UDP; {} of {} datagrams came back",
        took.as_millis(),
        gap.as_millis(),
        delivered.gap.as_millis(),
        delivered.received,
        delivered.turns,
    ));
    Ok(())
}

/// The only address of its family on `interface`, and the default route with it; none at all without `address`.
fn renumber(host: &Host, interface: &str, family: &str, address: Option<(String, IpAddr)>) -> Result<()> {
    host.ip(&format!("addr flush dev {interface} to {family}"))?;
    if let Some((address, gateway)) = address {
        let nodad = if gateway.is_ipv6() { " nodad" } else { "" };
        host.ip(&format!("addr add {address} dev {interface}{nodad}"))?;
        host.ip(&format!("route replace {family} via {gateway} dev {interface}"))?;
    }
    Ok(())
}

const V4: &str = "0.0.0.0/0";
const V6: &str = "::/0";

fn roam(lab: &Lab) -> Result<()> {
    let coordinator = Coordinator::start_dual_stack(lab.host("coord")?, POLICY)?;
    let _relay = Relay::start(lab.host("relay")?, &coordinator, "fra")?;
    let spec = || RouterSpec::new(NatKind::PortRestricted).ipv6();
    let (home, office, other) =
        (lab.router("home", spec())?, lab.router("office", spec())?, lab.router("other", spec())?);
    let mut a = Agent::start(home.host("a")?)?;
    let b = Agent::start(other.host("b")?)?;
    // At first without IPv6.
    let v6 = a.host.v6().context("a dual-stack host")?;
    renumber(&a.host, "eth0", V6, None)?;
    let gateway: IpAddr = home.lan().gateway()?.into();
    for agent in [&a, &b] {
        agent.up(&coordinator.url, &coordinator.auth_key("tag:a")?)?;
    }
    let to = *b.addresses()?.first().context("an address")?;
    let _servers = [b.serve("tcp-serve", to, TCP)?, b.serve("udp-echo", to, UDP)?];
    a.wait_for_path("b", "direct")?;

    across("another address", &a, to, || {
        let [a1, a2, a3, _] = home.lan().subnet().network().octets();
        renumber(&a.host, "eth0", V4, Some((format!("{a1}.{a2}.{a3}.77/24"), gateway)))
    })?;
    direct_again(&a)?;
    across("another interface", &a, to, || {
        a.host.attach(office.lan(), "wlan0")?;
        renumber(&a.host, "wlan0", V6, None)?;
        a.host.link_down("eth0")?;
        a.host.ip(&format!("route replace {V4} via {} dev wlan0", office.lan().gateway()?))
    })?;
    direct_again(&a)?;
    across("the first interface again", &a, to, || {
        a.host.ip("link set eth0 up")?;
        a.host.link_down("wlan0")?;
        a.host.ip(&format!("route replace {V4} via {gateway} dev eth0"))
    })?;
    direct_again(&a)?;
    across("a router restarts with a new public address", &a, to, || home.renumber().map(drop))?;
    direct_again(&a)?;
    across("IPv4 goes, IPv6 comes", &a, to, || {
        renumber(&a.host, "eth0", V4, None)?;
        let gateway = home.lan().gateway_v6().context("the LAN has IPv6")?;
        renumber(&a.host, "eth0", V6, Some((format!("{v6}/64"), gateway.into())))
    })?;
    direct_again(&a)?;
    let endpoint = a.peer("b")?["path"]["endpoint"].clone();
    let endpoint: SocketAddr = endpoint.as_str().context("an endpoint")?.parse()?;
    ensure!(endpoint.is_ipv6(), "over IPv6: {endpoint}");
    across("IPv6 goes, IPv4 comes", &a, to, || {
        renumber(&a.host, "eth0", V6, None)?;
        renumber(&a.host, "eth0", V4, Some((format!("{}/24", a.host.v4()), gateway)))
    })?;
    direct_again(&a)?;

    // As when the lid is closed: nothing of the agent runs meanwhile, and its NAT forgets.
    let asleep = Duration::from_secs(8);
    let transfer = Transfer::start(&a.host, SocketAddr::new(to, TCP))?;
    a.process.signal(Signal::STOP)?;
    std::thread::sleep(asleep);
    home.restart()?;
    a.process.signal(Signal::CONT)?;
    transfer.goes_on(Duration::from_secs(2))?;
    let gap = transfer.finish()?.saturating_sub(asleep);
    lab::say(&format!("{} s of sleep: TCP goes on {} ms after its end", asleep.as_secs(), gap.as_millis()));
    direct_again(&a)
}

#[test]
fn traffic_goes_on_across_every_change_of_the_network() -> Result<()> {
    lab::test("roam", roam)
}

/// The NATs in front of both forget after three seconds.
#[test]
fn after_a_minute_of_silence_the_first_packet_arrives_at_once() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(60);
    lab::test("idle", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let join = |name: &str| -> Result<Agent> {
            let spec = RouterSpec::new(NatKind::PortRestricted).udp_timeout(Duration::from_secs(3));
            let agent = Agent::start(lab.router(&format!("{name}R"), spec)?.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key("tag:a")?)?;
            Ok(agent)
        };
        let (a, b) = (join("a")?, join("b")?);
        a.wait_for_path("b", "direct")?;
        b.wait_for_path("a", "direct")?;
        let to = *b.addresses()?.first().context("an address")?;
        std::thread::sleep(IDLE);
        let watch = Stopwatch::start();
        let output = a.host.run("ping", &["-n", "-c", "1", "-W", "10", &to.to_string()])?;
        ensure!(
            output.status.success(),
            "the first packet is lost: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        lab::say(&format!(
            "after {} s the first packet is answered in {} ms",
            IDLE.as_secs(),
            watch.elapsed().as_millis()
        ));
        Ok(())
    })
}
