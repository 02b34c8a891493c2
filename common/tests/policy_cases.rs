//! Recorded decisions of a hosted control plane: policy, users and machines in, accepted or refused, filters and SSH
//! rules out. The cases are others' data and stay outside the repository; without them this prints `skipped`.
//!
//! Filters are compared by meaning: for every source a peer can have, every destination the device answers for, and
//! every port and protocol at which either answer can change.
#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests: a failure is a failed test, and a skip must be said"
)]

mod cases;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use warren_common::filter::{FilterDst, FilterRule, IpRange, PortRange, RuleId, has_ports};
use warren_common::policy::{Compiled, Inventory, Policy, SshAction, compile};

/// Cases in which the recording contradicts itself, with the reason. They are expected to differ, exactly as said.
const ARGUED: [(&str, &str); 1] = [(
    "policytest-allpass-grants-only-tag-src-ipv6-literal-dst",
    "the grant names fd7a:115c:a1e0::10, which is the device's own IPv6 address in the inventory, and the policy's \
     test of this very connection is recorded as passed, yet the device's recorded filter is empty; its IPv4 sibling \
     records the filter. The inventory's addresses were renamed after recording and IPv6 literals in policies were \
     not (grant-k15 names a device's real one, which no device of its inventory has): where this was recorded, nobody \
     had the address. Passing it would mean that a device's IPv6 address selects nothing.",
)];

#[derive(Deserialize)]
struct Case {
    id: String,
    accepted: bool,
    compare_filters: bool,
    policy: Value,
    users: Value,
    nodes: Value,
    filters: Option<BTreeMap<String, Option<Vec<WantFilter>>>>,
    ssh: Option<BTreeMap<String, Option<Vec<WantSsh>>>>,
}

#[derive(Deserialize)]
struct WantFilter {
    src: Vec<String>,
    #[serde(default)]
    dst: Vec<WantDst>,
    #[serde(default)]
    proto: Option<Vec<u8>>,
    #[serde(default)]
    caps: Vec<WantCaps>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WantCaps {
    dsts: Vec<String>,
    cap_map: BTreeMap<String, Option<Vec<Value>>>,
}

#[derive(Deserialize)]
struct WantDst {
    net: String,
    first: u16,
    last: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WantSsh {
    #[serde(default)]
    principals: Vec<BTreeMap<String, Value>>,
    #[serde(default)]
    ssh_users: BTreeMap<String, String>,
    #[serde(default)]
    action: BTreeMap<String, Value>,
}

#[test]
fn recorded_decisions() {
    let Some(cases) = cases::all::<Case>() else { return };
    let mut wrong = Vec::new();
    for case in &cases {
        let argued = ARGUED.iter().any(|(id, _)| *id == case.id);
        match (run(case), argued) {
            (Ok(()), false) | (Err(_), true) => {}
            (Ok(()), true) => wrong.push(format!("{}: argued as wrong, but passes", case.id)),
            (Err(why), false) => wrong.push(format!("{}: {why}", case.id)),
        }
    }
    println!("{} cases, {} wrong, {} argued", cases.len(), wrong.len(), ARGUED.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn run(case: &Case) -> Result<(), String> {
    let text = match &case.policy {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let inventory: Inventory =
        serde_json::from_value(serde_json::json!({"users": case.users, "nodes": case.nodes}))
            .map_err(|e| format!("inventory: {e}"))?;
    let compiled = Policy::parse(&text)
        .and_then(|policy| compile(&policy, &inventory, 1_750_000_000, 86_400))
        .map_err(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        .and_then(|compiled| {
            let report = compiled.run_tests();
            let failures: Vec<String> = report.results.iter().flat_map(|r| r.failures.clone()).collect();
            if report.passed() { Ok(compiled) } else { Err(failures.join("; ")) }
        });
    let compiled = match (compiled, case.accepted) {
        (Ok(compiled), true) => compiled,
        (Ok(_), false) => return Err("expected a refusal".to_owned()),
        (Err(_), false) => return Ok(()),
        (Err(why), true) => return Err(format!("expected acceptance: {why}")),
    };
    if case.compare_filters {
        for (name, want) in case.filters.iter().flatten() {
            if inventory.nodes.contains_key(name) {
                let rules: Vec<FilterRule> = want.iter().flatten().filter_map(want_rule).collect();
                compare(&inventory, name, &rules, &compiled.ingress(name))?;
                compare_caps(&inventory, name, want.iter().flatten(), &compiled)?;
            }
        }
    }
    for name in inventory.nodes.keys() {
        let (want, got) = (attributes(case, &inventory, name), compiled.node(name).unwrap_or_default().attrs);
        if want != got {
            return Err(format!("{name}: attributes {got:?} instead of {want:?}"));
        }
    }
    for (name, want) in case.ssh.iter().flatten() {
        let mut want: Vec<_> = want.iter().flatten().map(want_ssh).collect();
        let mut got: Vec<_> = compiled
            .node(name)
            .unwrap_or_default()
            .ssh
            .into_iter()
            .map(|rule| {
                let mut ips: Vec<String> = rule.principals.iter().map(ToString::to_string).collect();
                ips.sort();
                (ips, rule.users, rule.action)
            })
            .collect();
        want.sort();
        got.sort();
        if want != got {
            return Err(format!("{name}: SSH rules differ"));
        }
    }
    Ok(())
}

fn want_ssh(rule: &WantSsh) -> (Vec<String>, BTreeMap<String, String>, SshAction) {
    let mut ips: Vec<String> = rule
        .principals
        .iter()
        .filter_map(|p| p.get("nodeIP").and_then(Value::as_str).map(str::to_owned))
        .collect();
    ips.sort();
    let held = rule.action.get("holdAndDelegate").is_some_and(|v| v.as_str().is_some_and(|s| !s.is_empty()));
    (ips, rule.ssh_users.clone(), if held { SshAction::Check } else { SshAction::Accept })
}

fn want_rule(want: &WantFilter) -> Option<FilterRule> {
    if want.dst.is_empty() {
        return None;
    }
    Some(FilterRule {
        id: RuleId(0),
        origin: String::new(),
        action: warren_common::filter::Action::Allow,
        staged: false,
        src: want.src.iter().flat_map(|t| spans(t)).collect(),
        dst: want
            .dst
            .iter()
            .flat_map(|d| {
                spans(&d.net)
                    .into_iter()
                    .map(|net| FilterDst { net, ports: PortRange { first: d.first, last: d.last } })
            })
            .collect(),
        protos: want.proto.clone().unwrap_or_default(),
        active: None,
    })
}

fn spans(text: &str) -> Vec<IpRange> {
    if text == "*" {
        return vec![IpRange::ALL_V4, IpRange::ALL_V6];
    }
    if let Ok(addr) = IpAddr::from_str(text) {
        return vec![addr.into()];
    }
    if let Ok(net) = IpNet::from_str(text) {
        return vec![net.into()];
    }
    let (lo, hi) = text.split_once('-').expect("a range");
    vec![IpRange::new(lo.parse().expect("address"), hi.parse().expect("address")).expect("ordered")]
}

/// The addresses worth asking about: a device's own, and the ends of the networks it carries.
fn points(node: &warren_common::policy::Node) -> BTreeSet<IpAddr> {
    let routes = node.approved_routes.iter().filter(|n| n.prefix_len() > 0);
    node.addresses().chain(routes.flat_map(|n| [n.network(), n.broadcast()])).collect()
}

/// A device's attributes by the words of the file alone: the recordings hold none. No recorded person has a role.
fn attributes(case: &Case, inventory: &Inventory, name: &str) -> BTreeSet<String> {
    let policy = match &case.policy {
        Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
        other => other.clone(),
    };
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|v| Some(v.as_str()?.to_owned())).collect()
    };
    let node = &inventory.nodes[name];
    let owner = inventory.users.iter().find(|u| Some(&u.name) == node.user.as_ref() && node.tags.is_empty());
    let owned_by = |who: &str| owner.is_some_and(|u| u.email.as_deref() == Some(who));
    let is = |target: &String| match target.as_str() {
        "*" => true,
        "autogroup:member" => node.tags.is_empty(),
        "autogroup:tagged" => !node.tags.is_empty(),
        group if group.starts_with("group:") => texts(&policy["groups"][group]).iter().any(|m| owned_by(m)),
        tag if tag.starts_with("tag:") => node.tags.contains(tag),
        other => owned_by(other),
    };
    let all = (policy["randomizeClientPort"] == true).then(|| "randomize-client-port".to_owned());
    let entries = policy["nodeAttrs"].as_array().into_iter().flatten();
    let given = entries.filter(|e| texts(&e["target"]).iter().any(is)).flat_map(|e| texts(&e["attr"]));
    given.chain(all).collect()
}

/// What the recording control plane adds by itself: the reverse direction of two of its own applications.
const COMPANIONS: [&str; 2] = ["tailscale.com/cap/drive-sharer", "tailscale.com/cap/relay-target"];

/// Who has which capability at which address of a device.
fn compare_caps<'c>(
    inventory: &Inventory,
    name: &str,
    want: impl Iterator<Item = &'c WantFilter>,
    compiled: &Compiled,
) -> Result<(), String> {
    type Given = BTreeSet<(IpAddr, IpAddr, String, String)>;
    let sources: BTreeSet<IpAddr> = inventory.nodes.values().flat_map(points).collect();
    let destinations = points(&inventory.nodes[name]);
    let give = |out: &mut Given, src: &[IpRange], dst: &[IpRange], cap: &str, values: &[Value]| {
        let inside = |ranges: &[IpRange], addr: &IpAddr| ranges.iter().any(|r| r.contains(*addr));
        for src in sources.iter().filter(|a| inside(src, a)) {
            for dst in destinations.iter().filter(|a| inside(dst, a)) {
                let values = values.iter().map(Value::to_string).chain([String::new()]);
                out.extend(values.map(|value| (*src, *dst, cap.to_owned(), value)));
            }
        }
    };
    let (mut wanted, mut got) = (Given::new(), Given::new());
    for filter in want {
        let src: Vec<IpRange> = filter.src.iter().flat_map(|t| spans(t)).collect();
        for caps in &filter.caps {
            let dst: Vec<IpRange> = caps.dsts.iter().flat_map(|t| spans(t)).collect();
            for (cap, values) in caps.cap_map.iter().filter(|(cap, _)| !COMPANIONS.contains(&cap.as_str())) {
                give(&mut wanted, &src, &dst, cap, values.as_deref().unwrap_or_default());
            }
        }
    }
    for cap in compiled.node(name).unwrap_or_default().caps {
        give(&mut got, &cap.src, &cap.dst, &cap.name, &cap.values);
    }
    match (wanted.difference(&got).next(), got.difference(&wanted).next()) {
        (None, None) => Ok(()),
        (Some(missing), _) => Err(format!("{name}: capability missing: {missing:?}")),
        (_, Some(extra)) => Err(format!("{name}: capability too many: {extra:?}")),
    }
}

fn compare(inventory: &Inventory, name: &str, want: &[FilterRule], got: &[FilterRule]) -> Result<(), String> {
    let sources: BTreeSet<IpAddr> = inventory.nodes.values().flat_map(points).collect();
    let destinations = points(&inventory.nodes[name]);
    let mut ports: BTreeSet<u16> = BTreeSet::from([0, u16::MAX]);
    for dst in want.iter().chain(got).flat_map(|r| &r.dst) {
        ports.extend([
            dst.ports.first,
            dst.ports.last,
            dst.ports.first.saturating_sub(1),
            dst.ports.last.saturating_add(1),
        ]);
    }
    for src in &sources {
        for dst in destinations.iter().filter(|d| d.is_ipv4() == src.is_ipv4()) {
            for proto in [6, 17, 1, 58, 132, 47] {
                if (proto == 58 && dst.is_ipv4()) || (proto == 1 && dst.is_ipv6()) {
                    continue;
                }
                let probes = if has_ports(proto) { ports.clone() } else { BTreeSet::from([0]) };
                for port in probes {
                    let allowed =
                        |rules: &[FilterRule]| rules.iter().any(|r| r.covers(*src, *dst, proto, port));
                    if allowed(want) != allowed(got) {
                        return Err(format!(
                            "{name}: {src} -> {dst} proto {proto} port {port} should be {}",
                            if allowed(want) { "allowed" } else { "denied" }
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}
