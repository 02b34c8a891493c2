//! Every kind of place with every other: each pair ends up with the path that theory says exists, seen from both ends.
//!
//! All machines are in one network and look for each other at the same time, as they do in the field.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_netns_tests::lab::{self, Lab, Link, Stopwatch, eventually};
use warren_netns_tests::mesh::{Expected, Place, Site, World};
use warren_netns_tests::office::TINYPROXY;

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(90);
/// How long pairs without a direct path are watched: they must not claim one.
const WATCH: Duration = Duration::from_secs(5);

/// Two machines in each place, all at once.
fn sites(world: &World<'_>, places: &[Place], link: Option<Link>) -> Result<Vec<[Site; 2]>> {
    std::thread::scope(|scope| {
        let joining: Vec<_> = places
            .iter()
            .map(|place| scope.spawn(|| Ok([world.join(*place, 0, link)?, world.join(*place, 1, link)?])))
            .collect();
        joining
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .collect()
    })
}

/// Kind of the path to each peer, by name.
fn paths(site: &Site) -> Result<BTreeMap<String, String>> {
    let status = site.agent.json(&["status", "--json"])?;
    let peers = status["peers"].as_array().context("peers")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(peers.iter().map(|p| (text(&p["name"]), text(&p["path"]["kind"]))).collect())
}

/// Pings of all pairs from both ends, side by side. All are answered, or some where links lose packets.
fn ping_all(pairs: &[(&Site, &Site)], count: usize, lossy: bool) -> Result<()> {
    let ping = |from: &Site, to: &Site| -> Result<()> {
        if !lossy {
            return from.agent.ping(to.name(), count).map(drop);
        }
        let answered = from.agent.warren(&["ping", to.name(), "-c", &(3 * count).to_string()])?;
        ensure!(answered.status.success(), "{}", String::from_utf8_lossy(&answered.stdout).trim());
        Ok(())
    };
    std::thread::scope(|scope| {
        let pings: Vec<_> = pairs
            .iter()
            .flat_map(|(one, two)| [(*one, *two), (*two, *one)])
            .map(|(from, to)| (from, to, scope.spawn(move || ping(from, to))))
            .collect();
        for (from, to, ping) in pings {
            let answers = ping.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            answers.with_context(|| format!("{} to {}", from.name(), to.name()))?;
        }
        Ok(())
    })
}

fn matrix(lab: &Lab, places: &[Place], link: Option<Link>) -> Result<()> {
    let watch = Stopwatch::start();
    let world = World::new(lab)?;
    let sites = sites(&world, places, link)?;
    lab::say(&format!("{} machines joined in {} ms", 2 * sites.len(), watch.elapsed().as_millis()));
    for site in sites.iter().flatten() {
        site.agent.wait_until_relayed()?;
    }
    let mut pairs = Vec::new();
    for (n, one) in sites.iter().enumerate() {
        for two in &sites[n..] {
            pairs.push((&one[0], &two[1]));
        }
    }
    let watch = Stopwatch::start();
    // The first one to a machine that has only just joined may get lost: the relay is about to hear of the pair.
    ping_all(&pairs, 1, true)?;
    lab::say(&format!("{} pairs answered each other in {} ms", pairs.len(), watch.elapsed().as_millis()));
    let is = |kinds: &BTreeMap<&str, BTreeMap<String, String>>, (one, two): &(&Site, &Site), kind: &str| {
        kinds[one.name()].get(two.name()).is_some_and(|k| k == kind)
            && kinds[two.name()].get(one.name()).is_some_and(|k| k == kind)
    };
    let look = || -> Result<BTreeMap<&str, BTreeMap<String, String>>> {
        sites.iter().flatten().map(|site| Ok((site.name(), paths(site)?))).collect()
    };
    let direct: Vec<_> =
        pairs.iter().filter(|(one, two)| one.place.expected(two.place) == Expected::Direct).collect();
    let mut missing = Vec::new();
    let met = eventually("all that can meet directly do", LIMIT, || {
        let kinds = look()?;
        missing = direct
            .iter()
            .filter(|pair| !is(&kinds, pair, "direct"))
            .map(|(a, b)| (a.name(), b.name()))
            .collect();
        Ok(missing.is_empty().then_some(()))
    });
    met.with_context(|| format!("still relayed: {missing:?}"))?;
    let took = watch.elapsed();
    lab::say(&format!("{} of them direct from both ends after {} ms", direct.len(), took.as_millis()));
    std::thread::sleep(WATCH.saturating_sub(took));
    ping_all(&pairs, 2, link.is_some())?;
    let kinds = look()?;
    let mut wrong = Vec::new();
    for pair in &pairs {
        let (one, two) = pair;
        let expected = one.place.expected(two.place).word();
        if !is(&kinds, pair, expected) && !one.place.may_be_guessed(two.place) {
            wrong.push(format!("{} with {}: not {expected}", one.place.word(), two.place.word()));
        }
        lab::say(&format!("{:<21} {:<21} {expected}", one.place.word(), two.place.word()));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

#[test]
fn every_place_meets_every_other_as_theory_says() -> Result<()> {
    lab::test_with("matrix", &[TINYPROXY], |lab| matrix(lab, &Place::ALL, None))
}

/// 5 % loss and 50 ms with jitter in each direction: half of it at each end.
#[test]
fn the_same_over_slow_and_lossy_links() -> Result<()> {
    const HALF: Link =
        Link { delay: Duration::from_millis(25), jitter: Duration::from_millis(5), loss_per_mille: 25 };
    let places = [
        Place::Public,
        Place::AddressRestricted,
        Place::PortRestricted,
        Place::Symmetric,
        Place::UdpBlocked,
        Place::ProxyOnly,
    ];
    lab::test_with("lossy", &[TINYPROXY], |lab| {
        // The links do what they say: four crossings make a round trip.
        let (one, two) = (lab.internet().host_over("one", HALF)?, lab.internet().host_over("two", HALF)?);
        let output = one.run("ping", &["-n", "-c", "100", "-i", "0.02", "-W", "2", &two.v4().to_string()])?;
        let text = String::from_utf8(output.stdout)?;
        let mut times: Vec<f64> = text
            .lines()
            .filter_map(|line| line.split_once("time=")?.1.split_once(' ')?.0.parse().ok())
            .collect();
        times.sort_by(f64::total_cmp);
        let (median, lost) = (times.get(times.len() / 2).copied().unwrap_or_default(), 100 - times.len());
        lab::say(&format!("without a tunnel: round trip {median:.1} ms in the median, {lost} of 100 lost"));
        ensure!(times.first().is_some_and(|min| *min >= 100.0) && median < 150.0, "{text}");
        ensure!((1..=30).contains(&lost), "{lost} of 100 lost, of about 10");
        matrix(lab, &places, Some(HALF))
    })
}
