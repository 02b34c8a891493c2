//! Times the policy compiler: `policy_scale [DEVICES [GRANTS]]`, 10 000 and 1 000 if not said.
//!
//! Prints the time of reading, of a full compile, of working out every device's rules, and of one device's change.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use warren_common::policy::{Inventory, Node, Policy, User, compile};

const NOW: i64 = 1_774_000_000;
const USERS: usize = 2_000;
const GROUPS: usize = 100;
const TAGS: usize = 100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let devices: usize = args.next().map_or(Ok(10_000), |a| a.parse())?;
    let grants: usize = args.next().map_or(Ok(1_000), |a| a.parse())?;
    let mut out = std::io::stdout().lock();
    let text = policy(grants);
    let inventory = inventory(devices);
    writeln!(out, "{devices} devices, {grants} grants, {} bytes of policy", text.len())?;

    let clock = Clock::start();
    let policy =
        Policy::parse(&text).map_err(|found| found.iter().map(ToString::to_string).collect::<String>())?;
    writeln!(out, "read and check          {:>10.3} ms", clock.ms())?;

    let clock = Clock::start();
    let mut compiled = compile(&policy, &inventory, NOW, 86_400)
        .map_err(|found| found.iter().map(ToString::to_string).collect::<String>())?;
    writeln!(out, "full compile            {:>10.3} ms", clock.ms())?;

    let names: Vec<String> = compiled.names().map(str::to_owned).collect();
    let clock = Clock::start();
    let (mut rules, mut ranges) = (0_usize, 0_usize);
    for name in &names {
        for rule in compiled.ingress(name).iter().chain(&compiled.egress(name)) {
            rules += 1;
            ranges += rule.src.len() + rule.dst.len();
        }
    }
    writeln!(out, "every device's filters  {:>10.3} ms  ({rules} rules, {ranges} ranges)", clock.ms())?;

    // A person's laptop, a tagged server and a router change something in turn.
    for (what, pick) in [("a person's device", 0), ("a tagged device", 1), ("a subnet router", 2)] {
        let mut times = Vec::new();
        let mut changed = 0;
        for round in 0..20_usize {
            let index = ((round * 97 + 3) * 3 + pick) % devices;
            let mut node = inventory.nodes[&name_of(index)].clone();
            match pick {
                1 => {
                    node.tags.insert(format!("tag:t{}", round % TAGS));
                }
                2 => {
                    node.routable_ips.insert(format!("10.{round}.0.0/16").parse()?);
                    node.approved_routes = node.routable_ips.clone();
                }
                _ => node.user = Some(format!("user{}", (round * 31) % USERS)),
            }
            let clock = Clock::start();
            changed += compiled.set_node(&name_of(index), Some(&node), NOW)?.len();
            times.push(clock.ms());
        }
        times.sort_by(f64::total_cmp);
        writeln!(
            out,
            "change of {what:<18} p50 {:.3} ms, max {:.3} ms, {} devices told on average",
            times[times.len() / 2],
            times[times.len() - 1],
            changed / times.len()
        )?;
    }
    let edited = text.replacen("tcp:1000", "tcp:1001", 1);
    let clock = Clock::start();
    let policy =
        Policy::parse(&edited).map_err(|found| found.iter().map(ToString::to_string).collect::<String>())?;
    let next = compile(&policy, &inventory, NOW, 86_400)
        .map_err(|found| found.iter().map(ToString::to_string).collect::<String>())?;
    writeln!(out, "edit of one line        {:>10.3} ms", clock.ms())?;
    let before = compile(&Policy::parse(&text).unwrap_or_default(), &inventory, NOW, 86_400)
        .map_err(|_| "compiles")?;
    writeln!(out, "  tells {} devices", next.changed_since(&before).len())?;
    Ok(())
}

fn name_of(index: usize) -> String {
    format!("device{index:06}")
}

fn inventory(devices: usize) -> Inventory {
    let users = (0..USERS)
        .map(|i| User {
            id: (i + 1).to_string(),
            name: format!("user{i}"),
            email: Some(format!("user{i}@example.com")),
            ..User::default()
        })
        .collect();
    let nodes: BTreeMap<String, Node> = (0..devices)
        .map(|i| {
            let bits = 0x6440_0000 + u32::try_from(i).unwrap_or(0) + 1;
            let low = u128::try_from(i).unwrap_or(0) + 1;
            let mut node = Node {
                hostname: name_of(i),
                ipv4: Some(IpAddr::V4(Ipv4Addr::from_bits(bits))),
                ipv6: Some(IpAddr::V6(Ipv6Addr::from_bits(0xfd7a_115c_a1e0_u128 << 80 | low))),
                ..Node::default()
            };
            match i % 3 {
                0 => node.user = Some(format!("user{}", (i / 3) % USERS)),
                1 => node.tags = [format!("tag:t{}", (i / 3) % TAGS)].into(),
                _ => {
                    node.tags = [format!("tag:t{}", (i / 3) % TAGS)].into();
                    if i % 100 == 2 {
                        node.routable_ips = [ipnet::IpNet::V4(ipnet::Ipv4Net::new_assert(
                            Ipv4Addr::from_bits(0x0a80_0000 + bits % 0x7f00 * 256),
                            24,
                        ))]
                        .into();
                        node.approved_routes = node.routable_ips.clone();
                    }
                }
            }
            (name_of(i), node)
        })
        .collect();
    Inventory { users, nodes, ..Inventory::default() }
}

fn policy(grants: usize) -> String {
    let mut text = String::from("{\n  \"groups\": {\n");
    for g in 0..GROUPS {
        let members: Vec<String> =
            (0..USERS / GROUPS).map(|i| format!("\"user{}@example.com\"", i * GROUPS + g)).collect();
        let _ = writeln!(text, "    \"group:g{g}\": [{}],", members.join(", "));
    }
    text.push_str("  },\n  \"tagOwners\": {\n");
    for t in 0..TAGS {
        let _ = writeln!(text, "    \"tag:t{t}\": [\"group:g{t}\"],");
    }
    text.push_str("  },\n  \"hosts\": {\"lan\": \"10.128.0.0/9\"},\n  \"grants\": [\n");
    for i in 0..grants {
        let (src, dst) = match i % 20 {
            0 => ("\"autogroup:member\"".to_owned(), format!("\"tag:t{}\"", i % TAGS)),
            1 => (format!("\"tag:t{}\"", i % TAGS), "\"lan\"".to_owned()),
            2 => (
                format!("\"user{}@example.com\"", i % USERS),
                format!("\"tag:t{}\", \"tag:t{}\"", i % TAGS, (i + 7) % TAGS),
            ),
            3..=9 => (format!("\"tag:t{}\"", i % TAGS), format!("\"tag:t{}\"", (i * 7 + 1) % TAGS)),
            _ => (format!("\"group:g{}\"", i % GROUPS), format!("\"tag:t{}\"", (i * 3) % TAGS)),
        };
        let _ = writeln!(text, "    {{\"src\": [{src}], \"dst\": [{dst}], \"ip\": [\"tcp:{}\"]}},", 1000 + i);
    }
    text.push_str("    {\"src\": [\"autogroup:member\"], \"dst\": [\"autogroup:self\"], \"ip\": [\"*\"]},\n");
    text.push_str("    {\"src\": [\"*\"], \"dst\": [\"*\"], \"ip\": [\"icmp:*\"]},\n");
    text.push_str("  ],\n}\n");
    text
}

/// A stopwatch.
struct Clock(std::time::Instant);

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "an example that measures is a shell; the compiler itself reads no clock"
    )]
    fn start() -> Self {
        Self(std::time::Instant::now())
    }

    fn ms(&self) -> f64 {
        self.0.elapsed().as_secs_f64() * 1e3
    }
}
