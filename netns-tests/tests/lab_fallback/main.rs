//! Kernels that say they can, and then refuse: the daemon goes on without, says so once and shows it.
//!
//! No kernel here does that by itself, nor is there a network card; a library between daemon and kernel (`refuse.c`) returns
//! the errors that they would.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Lab, eventually};
use warren_netns_tests::programs::{Agent, Coordinator};
use warren_netns_tests::tunnel::tcp;

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 7_000;

const POLICY: &str = r#"{
  "tagOwners": {"tag:peer": []},
  "grants": [{"src": ["tag:peer"], "dst": ["tag:peer"], "ip": ["icmp:*", "tcp:7000"]}],
}"#;

/// The library, built.
fn refusing(lab: &Lab) -> Result<PathBuf> {
    let (source, library) = (lab.dir().join("refuse.c"), lab.dir().join("refuse.so"));
    std::fs::write(&source, include_str!("refuse.c"))?;
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library).arg(&source);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(library)
}

/// Two agents with a direct path, of which the second was started again with this in its environment; and what was in use
/// there before.
fn pair(lab: &Lab, refuses: (&str, &str)) -> Result<(Coordinator, [Agent; 2], Value)> {
    let library = refusing(lab)?;
    let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
    let join = |name: &str| -> Result<Agent> {
        let agent = Agent::start(lab.host(name)?)?;
        agent.up(&coordinator.url, &coordinator.auth_key("tag:peer")?)?;
        Ok(agent)
    };
    let (ann, mut bob) = (join("ann")?, join("bob")?);
    let before = offloads(&bob)?;
    bob.process.stop(LIMIT)?;
    bob.host.set_env("LD_PRELOAD", library.to_str().context("a path")?);
    bob.host.set_env(refuses.0, refuses.1);
    bob.start_again()?;
    bob.wait_until_connected()?;
    bob.wait_for_path("ann", "direct")?;
    ann.wait_for_path("bob", "direct")?;
    Ok((coordinator, [ann, bob], before))
}

/// An IPv4 address of the overlay's.
fn overlay(agent: &Agent) -> Result<SocketAddr> {
    let addresses = agent.addresses()?;
    let ip: IpAddr = *addresses.iter().find(|ip| ip.is_ipv4()).context("an IPv4 overlay address")?;
    Ok(SocketAddr::new(ip, PORT))
}

fn offloads(agent: &Agent) -> Result<Value> {
    Ok(agent.json(&["status", "--json"])?["offloads"].clone())
}

/// What of it was in use before is shown to be so no longer, and nothing else; it was said in one line.
fn gave_up(agent: &Agent, before: &Value, names: &[&str], said: &str) -> Result<()> {
    let mut wanted = before.clone();
    for name in names {
        ensure!(before[name] == true, "{name} was not in use: {before}");
        wanted[name] = Value::Bool(false);
    }
    eventually("it is shown", LIMIT, || Ok((offloads(agent)? == wanted).then_some(())))?;
    let log = agent.process.log()?;
    let lines = log.lines().filter(|line| line.contains(said)).count();
    ensure!(lines == 1, "said {lines} times");
    Ok(())
}

/// As of a network card that can't finish the checksums of segments.
#[test]
fn batches_that_a_network_card_refuses_are_given_up() -> Result<()> {
    lab::test_with("EIO", &[("cc", "gcc")], |lab| {
        let (_coordinator, [ann, bob], before) = pair(lab, ("REFUSE_BATCHES", &libc::EIO.to_string()))?;
        for _ in 0..2 {
            tcp(&bob.host, &ann.host, overlay(&ann)?)?;
            tcp(&ann.host, &bob.host, overlay(&bob)?)?;
        }
        gave_up(&bob, &before, &["udp-send"], "datagrams are sent one by one from now on")?;
        ensure!(offloads(&ann)?["udp-send"] == true, "the other end is not concerned");
        Ok(())
    })
}

/// As of a kernel that can't. `EINVAL` also says that datagrams are too long for a path, which is no reason: only a batch of
/// short ones tells.
#[test]
fn batches_that_a_kernel_refuses_are_given_up() -> Result<()> {
    lab::test_with("EINVAL", &[("cc", "gcc")], |lab| {
        let (_coordinator, [ann, bob], before) = pair(lab, ("REFUSE_BATCHES", &libc::EINVAL.to_string()))?;
        let shorter = "table ip shorter { chain out { type filter hook output priority 0; \
                       tcp flags & syn == syn tcp option maxseg size set 1000; }; }";
        ensure!(ann.host.run("nft", &[shorter])?.status.success(), "nft {shorter}");
        tcp(&bob.host, &ann.host, overlay(&ann)?)?;
        gave_up(&bob, &before, &["udp-send"], "datagrams are sent one by one from now on")
    })
}

#[test]
fn super_frames_that_a_tun_refuses_are_given_up() -> Result<()> {
    lab::test_with("TUN", &[("cc", "gcc")], |lab| {
        let (_coordinator, [ann, bob], before) = pair(lab, ("REFUSE_FRAMES", "1"))?;
        for _ in 0..2 {
            tcp(&ann.host, &bob.host, overlay(&bob)?)?;
            tcp(&bob.host, &ann.host, overlay(&ann)?)?;
        }
        gave_up(&bob, &before, &["tun", "tun-udp"], "the kernel refuses super-frames")?;
        ensure!(offloads(&ann)?["tun"] == true, "the other end is not concerned");
        Ok(())
    })
}
