//! What people see of paths: why one is not direct, whether one comes to be, what is wrong with the network, and the report
//! for support.

use std::fs;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Lab, Link, eventually};
use warren_netns_tests::mesh::{Place, Site, World};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);

/// Waits for a health item, which names a fix.
fn told(site: &Site, code: &str) -> Result<()> {
    eventually(&format!("{} is told of {code}", site.name()), LIMIT, || {
        let status = site.agent.json(&["status", "--json"])?;
        let items = status["health"].as_array().context("health")?;
        let item = items.iter().find(|item| item["code"] == code);
        Ok(item.filter(|item| item["fix"].as_str().is_some_and(|fix| !fix.is_empty())).map(drop))
    })
}

/// Waits until the reason why a peer is not reached directly holds `text`.
fn because(site: &Site, peer: &str, text: &str) -> Result<()> {
    let mut last = Value::Null;
    let found = eventually(&format!("{text:?} as the reason for {peer}"), LIMIT, || {
        last = site.agent.peer(peer)?["why_not_direct"].clone();
        Ok(last.as_str().is_some_and(|why| why.contains(text)).then_some(()))
    });
    found.with_context(|| format!("it is {last}"))
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

fn see(lab: &Lab) -> Result<()> {
    let world = World::new(lab)?;
    let [public, home, blocked] = [
        world.join(Place::Public, 0, None)?,
        world.join(Place::PortRestricted, 0, None)?,
        world.join(Place::UdpBlocked, 0, None)?,
    ];
    let symmetric = [world.join(Place::Symmetric, 0, None)?, world.join(Place::Symmetric, 1, None)?];
    let slow = Link { delay: Duration::from_millis(150), ..Link::default() };
    let far = world.join(Place::Public, 1, Some(slow))?;

    // Where there is a direct path, the wait for it ends with it.
    let output = home.agent.warren(&["ping", public.name(), "--until-direct"])?;
    let (out, err) = text(&output);
    ensure!(output.status.success(), "{out}{err}");
    ensure!(out.lines().rev().nth(1).is_some_and(|line| line.contains("direct ")), "{out}");
    ensure!(home.agent.peer(public.name())?["why_not_direct"].is_null(), "it is direct");

    // Where there is none, it says why.
    let peer = symmetric[1].name();
    let output = symmetric[0].agent.warren(&["ping", peer, "--until-direct", "-c", "16"])?;
    let (out, err) = text(&output);
    ensure!(output.status.code() == Some(1) && out.contains("16 sent"), "{out}{err}");
    ensure!(err.contains("no direct path") && err.contains("fix: "), "{err}");
    because(&symmetric[0], peer, "nothing comes back")?;
    let (out, _) = text(&symmetric[0].agent.warren(&["status"])?);
    ensure!(out.contains(&format!("{peer} is not direct: ")), "{out}");
    because(&symmetric[0], public.name(), "nothing was sent")?;

    // What is wrong with the network.
    let _ = blocked.agent.warren(&["ping", public.name(), "-c", "2"])?;
    told(&blocked, "udp-blocked")?;
    because(&blocked, public.name(), "no UDP comes back")?;
    told(&far, "relay-far")?;
    ensure!(!far.agent.health()?.contains(&"no-ipv6".to_owned()), "it has IPv6");
    ensure!(far.agent.warren(&["down"])?.status.success(), "down");
    far.agent.host.sysctl(&["net.ipv6.conf.all.disable_ipv6=1"])?;
    ensure!(far.agent.warren(&["up"])?.status.success(), "up");
    told(&far, "no-ipv6")?;

    // The report, with and without names.
    let report = |file: &str, names: &[&str]| -> Result<String> {
        let file = home.agent.host.dir().join(file);
        let path = file.to_str().context("a path")?;
        let output = home.agent.warren(&[&["bugreport", "--output", path], names].concat())?;
        ensure!(output.status.success() && text(&output).0.contains(path), "{:?}", text(&output));
        Ok(fs::read_to_string(&file)?)
    };
    let (hidden, named) = (report("hidden.txt", &[])?, report("named.txt", &["--with-names"])?);
    let own = home.agent.addresses()?.first().context("an address")?.to_string();
    let names = [home.name(), public.name(), "203.0.113.", &own, "tag:all", "fra"];
    // Addresses wherever they begin, all else as a whole word, whatever stands around it.
    let names_one = |report: &str, name: &str| {
        let is = |word: &str| word == name || (name.contains('.') && word.starts_with(name));
        report.split(|c: char| !(c.is_alphanumeric() || ".:-_".contains(c))).any(is)
    };
    for name in names {
        ensure!(!names_one(&hidden, name), "{name} is in:\n{hidden}");
        ensure!(names_one(&named, name), "{name} is not in:\n{named}");
    }
    for line in ["\nstatus\n", "\nnetcheck\n", "  udp: yes\n", "  nat.hairpin: no\n"] {
        ensure!(hidden.contains(line), "{line:?} is not in:\n{hidden}");
    }
    // The same while something is wrong, which has names in its text.
    let cut = "table inet cut { chain out { type filter hook output priority 0; meta l4proto tcp reject with tcp reset; }; }";
    home.agent.host.nft(cut)?;
    told(&home, "coordinator-away")?;
    let (hidden, named) = (report("hidden-away.txt", &[])?, report("named-away.txt", &["--with-names"])?);
    ensure!(hidden.contains("coordinator-away"), "{hidden}");
    ensure!(names_one(&named, "203.0.113."), "{named}");
    for name in names {
        ensure!(!names_one(&hidden, name), "{name} is in:\n{hidden}");
    }
    Ok(())
}

#[test]
fn people_see_why_a_path_is_not_direct_and_what_is_wrong() -> Result<()> {
    lab::test("ux", see)
}
