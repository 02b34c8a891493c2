//! What `cargo xtask bench paths` runs: how soon pairs of machines in different places reach each other, and how soon
//! directly. Prints a table for docs/performance.md.
//!
//! ```text
//! path-bench [RUNS] [plain|slow]       each pair so many times, 20 unless told otherwise; on one kind of cables only
//! ```

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use warren_netns_tests::lab::{Lab, Link, say};
use warren_netns_tests::mesh::{Place, Site, World, meet};

/// Each pair so often.
const RUNS: usize = 20;

/// Half of 5 % loss and 50 ms with jitter: there is one at each end.
const HALF: Link =
    Link { delay: Duration::from_millis(25), jitter: Duration::from_millis(5), loss_per_mille: 25 };

/// Pairs on plain cables.
const PAIRS: [(Place, Place); 13] = [
    (Place::Public, Place::Public),
    (Place::Public, Place::PortRestricted),
    (Place::Public, Place::Symmetric),
    (Place::EndpointIndependent, Place::EndpointIndependent),
    (Place::AddressRestricted, Place::AddressRestricted),
    (Place::PortRestricted, Place::PortRestricted),
    (Place::EndpointIndependent, Place::Symmetric),
    (Place::AddressRestricted, Place::Symmetric),
    (Place::DoubleNat, Place::PortRestricted),
    (Place::DoubleNat, Place::DoubleNat),
    (Place::Ipv6Only, Place::Ipv6Only),
    (Place::Symmetric, Place::Symmetric),
    (Place::PortRestricted, Place::UdpBlocked),
];

/// Pairs on slow and lossy ones.
const SLOW: [(Place, Place); 4] = [
    (Place::Public, Place::Public),
    (Place::PortRestricted, Place::PortRestricted),
    (Place::AddressRestricted, Place::Symmetric),
    (Place::Symmetric, Place::Symmetric),
];

/// Cables to run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cables {
    Plain,
    Slow,
}

fn main() -> ExitCode {
    let Some((runs, cables)) = options(&std::env::args().skip(1).collect::<Vec<_>>()) else {
        say("usage: path-bench [RUNS] [plain|slow]");
        return ExitCode::from(2);
    };
    match bench(runs, cables) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn options(args: &[String]) -> Option<(usize, Option<Cables>)> {
    let (mut runs, mut cables) = (RUNS, None);
    for arg in args {
        match arg.as_str() {
            "plain" => cables = Some(Cables::Plain),
            "slow" => cables = Some(Cables::Slow),
            number => runs = number.parse().ok().filter(|runs| *runs > 0)?,
        }
    }
    Some((runs, cables))
}

fn bench(runs: usize, cables: Option<Cables>) -> Result<()> {
    say("| pair | cables | ends up | first byte p50 | p95 | direct p50 | p95 |");
    say("|---|---|---|---|---|---|---|");
    if cables != Some(Cables::Slow) {
        part("plain", &PAIRS, None, runs)?;
    }
    if cables != Some(Cables::Plain) {
        part("5 % loss, 50 ms ± 10 each way", &SLOW, Some(HALF), runs)?;
    }
    Ok(())
}

/// What the kernel's ping says of a slow cable at one end, without any tunnel: the check that the emulator adds what it is to add.
fn round_trip(site: &Site, to: &str) -> Result<String> {
    let output = site.agent.host.run("ping", &["-n", "-q", "-c", "100", "-i", "0.02", to])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().last().map(str::to_owned).context("ping says nothing")
}

fn part(cables: &str, pairs: &[(Place, Place)], link: Option<Link>, runs: usize) -> Result<()> {
    let lab = Lab::new("bench")?;
    let world = World::new(&lab)?;
    let mut sites: BTreeMap<(Place, usize), Site> = BTreeMap::new();
    for (one, two) in pairs {
        for key in [(*one, 0), (*two, 1)] {
            if let std::collections::btree_map::Entry::Vacant(entry) = sites.entry(key) {
                entry.insert(world.join(key.0, key.1, link)?);
            }
        }
    }
    if let (Some(site), Some(other)) = (sites.get(&(Place::Public, 0)), sites.get(&(Place::Public, 1)))
        && link.is_some()
    {
        say(&format!("ping between two ends: {}", round_trip(site, &other.agent.host.v4().to_string())?));
    }
    for (one, two) in pairs {
        let mut from = sites.remove(&(*one, 0)).context("it has joined")?;
        let mut to = sites.remove(&(*two, 1)).context("it has joined")?;
        let (mut first, mut direct) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let timing = meet(&mut from, &mut to).inspect_err(|_| lab.show_logs())?;
            first.push(timing.first_byte);
            direct.extend(timing.direct);
        }
        let direct = if direct.is_empty() { "- | -".to_owned() } else { shares(direct) };
        say(&format!(
            "| {} × {} | {cables} | {} | {} | {direct} |",
            one.word(),
            two.word(),
            one.expected(*two).word(),
            shares(first),
        ));
        sites.insert((*one, 0), from);
        sites.insert((*two, 1), to);
    }
    Ok(())
}

/// Median and 95th percentile, as two cells.
fn shares(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).clamp(1, times.len()) - 1];
    format!("{} ms | {} ms", at(50).as_millis(), at(95).as_millis())
}
