//! What `cargo xtask bench paths` runs: how soon pairs of machines in different places reach each other, and how soon
//! directly. Prints a table for docs/performance.md.
//!
//! ```text
//! path-bench [RUNS]       each pair so many times, 20 unless told otherwise
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

fn main() -> ExitCode {
    let runs = match std::env::args().nth(1).map(|text| text.parse()) {
        None => RUNS,
        Some(Ok(runs)) if runs > 0 => runs,
        Some(_) => {
            say("usage: path-bench [RUNS]");
            return ExitCode::from(2);
        }
    };
    match bench(runs) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn bench(runs: usize) -> Result<()> {
    say("| pair | cables | ends up | first byte p50 | p95 | direct p50 | p95 |");
    say("|---|---|---|---|---|---|---|");
    part("plain", &PAIRS, None, runs)?;
    part("5 % loss, 50 ms ± each way", &SLOW, Some(HALF), runs)
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
