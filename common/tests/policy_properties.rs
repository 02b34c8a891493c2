//! Properties of the policy compiler over small random worlds.
#![expect(
    clippy::expect_used,
    reason = "helpers of tests: a failure is a failed test, and a skip must be said"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use serde_json::{Value, json};
use warren_common::filter::{Action, FilterRule};
use warren_common::policy::{AttrValue, Attribute, Compiled, Inventory, Node, Policy, User, compile, diff};

const NOW: i64 = 1_774_000_000;
const HORIZON: i64 = 86_400;
const DEVICES: u8 = 6;
const USERS: [&str; 3] = ["ann", "bob", "cyn"];
const TAGS: [&str; 3] = ["tag:a", "tag:b", "tag:c"];
const ROUTES: [&str; 5] = ["10.0.0.0/8", "10.1.0.0/16", "fd00:1::/64", "0.0.0.0/0", "::/0"];
const SELECTORS: [&str; 13] = [
    "*",
    "ann@example.com",
    "bob@example.com",
    "group:g",
    "tag:a",
    "tag:b",
    "tag:c",
    "autogroup:member",
    "autogroup:tagged",
    "net",
    "10.1.2.0/24",
    "100.64.0.2",
    "ipset:s",
];
const PORTS: [u16; 5] = [21, 22, 80, 443, 8080];

fn users() -> Vec<User> {
    USERS
        .iter()
        .enumerate()
        .map(|(i, name)| User {
            id: (i + 1).to_string(),
            name: (*name).to_owned(),
            email: Some(format!("{name}@example.com")),
            ..User::default()
        })
        .collect()
}

fn addr(i: u8) -> (IpAddr, IpAddr) {
    (
        IpAddr::V4(Ipv4Addr::new(100, 64, 0, i)),
        // Some devices live outside the usual overlay.
        IpAddr::V6(Ipv6Addr::new(
            if i.is_multiple_of(3) { 0xfd00 } else { 0xfd7a },
            0x115c,
            0xa1e0,
            0,
            0,
            0,
            0,
            u16::from(i),
        )),
    )
}

fn node(i: u8) -> impl Strategy<Value = Node> {
    (
        prop_oneof![
            (0..3_usize).prop_map(|u| (Some(USERS[u].to_owned()), BTreeSet::new())),
            proptest::collection::btree_set(0..3_usize, 1..3)
                .prop_map(|t| (None, t.into_iter().map(|t| TAGS[t].to_owned()).collect())),
        ],
        proptest::collection::btree_set(0..5_usize, 0..3),
        proptest::option::of(0..3_u8),
        any::<bool>(),
    )
        .prop_map(move |((user, tags), routes, os, only_v4)| {
            let (v4, v6) = addr(i);
            let routes: BTreeSet<ipnet::IpNet> =
                routes.into_iter().map(|r| ROUTES[r].parse().expect("a network")).collect();
            let attributes = os
                .map(|os| {
                    let value = AttrValue::Text(["linux", "macos", "windows"][usize::from(os)].to_owned());
                    ("node:os".to_owned(), Attribute { value, source: None, grade: None, age_s: Some(60) })
                })
                .into_iter()
                .collect();
            Node {
                hostname: format!("n{i}"),
                user,
                tags,
                ipv4: Some(v4),
                ipv6: (!only_v4).then_some(v6),
                routable_ips: routes.clone(),
                // Half of them carry only what the file approves.
                approved_routes: if i.is_multiple_of(2) { routes } else { BTreeSet::new() },
                attributes,
            }
        })
}

fn nodes() -> impl Strategy<Value = BTreeMap<String, Node>> {
    let all: Vec<_> = (1..=DEVICES).map(node).collect();
    (all, proptest::collection::vec(any::<bool>(), usize::from(DEVICES))).prop_map(|(all, present)| {
        all.into_iter().zip(present).filter(|(_, here)| *here).map(|(n, _)| (n.hostname.clone(), n)).collect()
    })
}

fn selectors() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec(0..SELECTORS.len(), 1..3)
        .prop_map(|v| v.into_iter().map(|i| SELECTORS[i].to_owned()).collect())
}

fn services() -> impl Strategy<Value = Vec<&'static str>> {
    proptest::collection::vec(
        prop_oneof![Just("*"), Just("22"), Just("tcp:80-443"), Just("udp:22"), Just("icmp:*"), Just("47:*")],
        1..3,
    )
}

fn conditions(rule: &mut Value, posture: u8, dst_posture: bool, staged: bool, expires: u8) {
    match posture {
        0 => rule["srcPosture"] = json!("posture:linux"),
        1 => rule["srcPosture"] = json!(["posture:linux", "posture:mac"]),
        _ => {}
    }
    if dst_posture {
        rule["dstPosture"] = json!("posture:linux");
    }
    if staged {
        rule["staged"] = json!(true);
    }
    match expires {
        0 => rule["expires"] = json!("2020-01-01T00:00:00Z"),
        1 => rule["expires"] = json!("2099-01-01T00:00:00Z"),
        2 => {
            rule["when"] =
                json!([{"from": "22:00", "to": "04:00", "zone": "Europe/Berlin"}, {"days": ["wed"]}])
        }
        3 => rule["when"] = json!({"from": "09:00", "to": "17:00"}),
        _ => {}
    }
}

fn grant() -> impl Strategy<Value = Value> {
    (selectors(), selectors(), services(), 0..7_u8, 0..5_u8, proptest::bool::weighted(0.2), 0..12_u8).prop_map(
        |(src, dst, ip, kind, posture, dst_posture, expires)| {
            let mut rule = match kind {
                0 => json!({"src": ["autogroup:member"], "dst": ["autogroup:self"], "ip": ip}),
                1 => json!({"src": src, "dst": ["10.1.0.0/16", "autogroup:internet"], "ip": ip, "via": ["tag:a"]}),
                2 => json!({"src": ["group:g"], "dst": ["autogroup:internet"], "ip": ip}),
                3 => json!({"src": src, "dst": dst, "ip": ip, "app": {"example.com/cap/x": [{"n": posture}]}}),
                _ => json!({"src": src, "dst": dst, "ip": ip}),
            };
            conditions(&mut rule, posture, dst_posture, kind == 4, expires);
            rule
        },
    )
}

fn deny() -> impl Strategy<Value = Value> {
    (selectors(), selectors(), services(), 0..5_u8, proptest::bool::weighted(0.2), any::<bool>()).prop_map(
        |(src, dst, ip, posture, dst_posture, all)| {
            let mut rule = json!({"src": src, "dst": dst});
            if !all {
                rule["ip"] = json!(ip);
            }
            conditions(&mut rule, posture, dst_posture, false, 9);
            rule
        },
    )
}

fn file(grants: &[Value], denies: &[Value], default_posture: bool) -> Value {
    let mut file = json!({
        "groups": {"group:g": ["ann@example.com", "cyn@"]},
        "hosts": {"net": "10.1.0.0/16"},
        "ipsets": {"ipset:s": ["add 100.64.0.0/29", "remove 100.64.0.3", "add fd00:1::/64"]},
        "tagOwners": {"tag:a": [], "tag:b": [], "tag:c": []},
        "postures": {"posture:linux": ["node:os == 'linux'"], "posture:mac": ["node:os != 'linux' WITHIN 1h"]},
        "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:a"]}, "exitNode": ["tag:b"]},
        "nodeAttrs": [{"target": ["tag:a", "ann@example.com"], "attr": ["x"]}],
        "ssh": [
            {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self"], "users": ["root"]},
            {"action": "check", "src": ["group:g", "tag:b"], "dst": ["tag:a"], "users": ["localpart:*@example.com", "autogroup:nonroot"]},
        ],
        "grants": grants,
        "deny": denies,
    });
    if default_posture {
        file["defaultSrcPosture"] = json!(["posture:linux"]);
    }
    file
}

fn parse(file: &Value) -> Policy {
    Policy::parse(&file.to_string()).unwrap_or_else(|found| {
        panic!("{}", found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    })
}

fn world(nodes: &BTreeMap<String, Node>) -> Inventory {
    Inventory { users: users(), nodes: nodes.clone(), auto_approve: true, ..Inventory::default() }
}

fn build(file: &Value, nodes: &BTreeMap<String, Node>) -> Compiled {
    compile(&parse(file), &world(nodes), NOW, HORIZON).expect("compiles")
}

fn bytes(compiled: &Compiled, name: &str) -> String {
    let node = serde_json::to_string(&compiled.node(name)).expect("serialises");
    let egress = serde_json::to_string(&compiled.egress(name)).expect("serialises");
    format!("{node}\n{egress}")
}

fn decide(rules: &[FilterRule], src: IpAddr, dst: IpAddr, proto: u8, port: u16) -> bool {
    let hit = |action| {
        rules
            .iter()
            .any(|r| r.action == action && !r.staged && r.is_active(NOW) && r.covers(src, dst, proto, port))
    };
    hit(Action::Allow) && !hit(Action::Deny)
}

type Probe = (String, String, bool, u8, u16);

/// Every allowed connection between devices' own addresses: source, destination, IPv4, protocol, port.
fn allowed(compiled: &Compiled, nodes: &BTreeMap<String, Node>) -> BTreeSet<Probe> {
    let mut out = BTreeSet::new();
    for (to, b) in nodes {
        let rules = compiled.ingress(to);
        for (from, a) in nodes.iter().filter(|(from, _)| *from != to) {
            for src in a.addresses() {
                for dst in b.addresses().filter(|d| d.is_ipv4() == src.is_ipv4()) {
                    for proto in [6, 17, 1, 58, 47] {
                        if (proto == 1 && !src.is_ipv4()) || (proto == 58 && src.is_ipv4()) {
                            continue;
                        }
                        let ports: &[u16] = if matches!(proto, 6 | 17) { &PORTS } else { &PORTS[..1] };
                        for port in ports {
                            if decide(&rules, src, dst, proto, *port) {
                                out.insert((from.clone(), to.clone(), src.is_ipv4(), proto, *port));
                            }
                        }
                    }
                }
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 256,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn compile_is_a_function_and_both_ends_and_explain_agree(
        nodes in nodes(),
        grants in proptest::collection::vec(grant(), 0..5),
        denies in proptest::collection::vec(deny(), 0..2),
        default_posture in proptest::bool::weighted(0.2),
    ) {
        let file = file(&grants, &denies, default_posture);
        let compiled = build(&file, &nodes);
        let again = build(&file, &nodes);
        for name in nodes.keys() {
            prop_assert_eq!(bytes(&compiled, name), bytes(&again, name));
            prop_assert_eq!(compiled.fingerprint(name), again.fingerprint(name));
        }
        for (from, a) in &nodes {
            let egress = compiled.egress(from);
            let peers = compiled.node(from).expect("exists").peers;
            for (to, b) in nodes.iter().filter(|(to, _)| *to != from) {
                let ingress = compiled.ingress(to);
                for (src, dst) in [(a.ipv4, b.ipv4), (a.ipv6, b.ipv6)] {
                    let (Some(src), Some(dst)) = (src, dst) else { continue };
                    for (proto, port) in [(6, 22), (6, 80), (17, 22), (47, 21)] {
                        let received = decide(&ingress, src, dst, proto, port);
                        prop_assert_eq!(decide(&egress, src, dst, proto, port), received, "{} -> {} {} {}", from, to, proto, port);
                        let end = format!("{dst}:{port}");
                        let found = compiled.explain(&src.to_string(), &end, Some(proto)).expect("answerable");
                        prop_assert_eq!(found.allowed, received, "{:#?}", found);
                        if received {
                            prop_assert!(peers.get(to).is_some_and(|n| n.may_reach));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn incremental_equals_full(
        before in nodes(),
        edits in proptest::collection::vec((1..=DEVICES).prop_flat_map(|i| (Just(i), proptest::option::of(node(i)))), 1..6),
        grants in proptest::collection::vec(grant(), 1..5),
        denies in proptest::collection::vec(deny(), 0..2),
    ) {
        let file = file(&grants, &denies, false);
        let mut compiled = build(&file, &before);
        let mut nodes = before;
        for (i, edit) in edits {
            let name = format!("n{i}");
            let old: BTreeMap<String, String> = nodes.keys().map(|n| (n.clone(), bytes(&compiled, n))).collect();
            match &edit {
                Some(node) => { nodes.insert(name.clone(), node.clone()); }
                None => { nodes.remove(&name); }
            }
            let changed = compiled.set_node(&name, edit.as_ref(), NOW).expect("no conflict");
            let full = build(&file, &nodes);
            for name in nodes.keys() {
                prop_assert_eq!(bytes(&compiled, name), bytes(&full, name), "{}", name);
                prop_assert_eq!(compiled.fingerprint(name), full.fingerprint(name), "{}", name);
                if old.get(name) != Some(&bytes(&compiled, name)) {
                    prop_assert!(changed.contains(name), "{} changed unnoticed: {:?}", name, changed);
                }
            }
        }
    }

    #[test]
    fn denials_and_missing_facts_never_open(
        nodes in nodes(),
        grants in proptest::collection::vec(grant(), 1..5),
        denies in proptest::collection::vec(deny(), 0..2),
        more in deny(),
        victim in 1..=DEVICES,
        age in 0..100_000_i64,
    ) {
        let base = file(&grants, &denies, false);
        let before = allowed(&build(&base, &nodes), &nodes);
        let mut denied = denies;
        denied.push(more);
        let after = allowed(&build(&file(&grants, &denied, false), &nodes), &nodes);
        prop_assert!(after.is_subset(&before));

        let mut withdrawn = nodes.clone();
        if let Some(node) = withdrawn.get_mut(&format!("n{victim}")) {
            node.attributes.clear();
        }
        prop_assert!(allowed(&build(&base, &withdrawn), &nodes).is_subset(&before));

        let mut aged = nodes.clone();
        for fact in aged.values_mut().flat_map(|n| n.attributes.values_mut()) {
            fact.age_s = fact.age_s.map(|a| a + age);
        }
        prop_assert!(allowed(&build(&base, &aged), &nodes).is_subset(&before));
    }

    #[test]
    fn a_fact_is_as_good_as_new_within_its_age_and_as_none_beyond(
        nodes in nodes(),
        grants in proptest::collection::vec(grant(), 1..5),
        denies in proptest::collection::vec(deny(), 0..2),
        age in prop_oneof![3_595..3_606_i64, 0..100_000_i64],
    ) {
        let mut file = file(&grants, &denies, true);
        file["postures"] = json!({
            "posture:linux": ["node:os == 'linux' WITHIN 1h"],
            "posture:mac": ["node:os != 'linux' WITHIN 1h"],
        });
        let with = |facts: &dyn Fn(&mut Node)| {
            let mut nodes = nodes.clone();
            nodes.values_mut().for_each(facts);
            let compiled = build(&file, &nodes);
            nodes.keys().map(|name| (compiled.ingress(name), compiled.egress(name))).collect::<Vec<_>>()
        };
        let aged = with(&|n| n.attributes.values_mut().for_each(|fact| fact.age_s = Some(age)));
        let expected = match age <= 3_600 {
            true => with(&|_| {}),
            false => with(&|n| n.attributes.clear()),
        };
        prop_assert_eq!(aged, expected);
    }

    #[test]
    fn an_expired_rule_is_no_rule(
        nodes in nodes(),
        grants in proptest::collection::vec(grant(), 1..5),
        ended in grant(),
    ) {
        let mut ended = ended;
        ended["expires"] = json!("2020-01-01T00:00:00Z");
        let without = build(&file(&grants, &[], false), &nodes);
        let mut with = grants;
        with.push(ended);
        let with = build(&file(&with, &[], false), &nodes);
        for name in nodes.keys() {
            prop_assert_eq!(bytes(&without, name), bytes(&with, name));
            prop_assert_eq!(without.fingerprint(name), with.fingerprint(name));
        }
    }

    #[test]
    fn diff_is_the_difference_of_probes(
        nodes in nodes(),
        grants in proptest::collection::vec(grant(), 1..4),
        denies in proptest::collection::vec(deny(), 0..2),
        added in proptest::collection::vec(grant(), 0..2),
        removed in any::<prop::sample::Index>(),
        more in proptest::option::of(deny()),
    ) {
        let old = build(&file(&grants, &denies, false), &nodes);
        let mut next = grants.clone();
        next.remove(removed.index(grants.len()));
        next.extend(added);
        let denies: Vec<Value> = denies.into_iter().chain(more).collect();
        let new = build(&file(&next, &denies, false), &nodes);
        let (was, is) = (allowed(&old, &nodes), allowed(&new, &nodes));
        let found = diff(&old, &new);
        // A change names owners; a device's own addresses go by its owner.
        let owner = |name: &str| {
            let node = &nodes[name];
            node.user.as_ref().map_or_else(
                || node.tags.iter().cloned().collect::<Vec<_>>().join(", "),
                |u| format!("{u}@example.com"),
            )
        };
        let covers = |opens: bool, (from, to, _, proto, port): &Probe| {
            found.changes.iter().any(|c| {
                c.opens == opens
                    && c.sources.contains(from)
                    && c.from == owner(from)
                    && c.destinations.contains(to)
                    && c.to == owner(to)
                    && service_covers(&c.service, *proto, *port)
            })
        };
        for probe in is.difference(&was) {
            prop_assert!(covers(true, probe), "not reported as opening: {probe:?} {:#?}", found.changes);
        }
        for probe in was.difference(&is) {
            prop_assert!(covers(false, probe), "not reported as closing: {probe:?} {:#?}", found.changes);
        }
        if was == is {
            let owners: BTreeSet<String> = nodes.keys().map(|n| owner(n)).collect();
            let between: Vec<_> = found
                .changes
                .iter()
                .filter(|c| owners.contains(&c.from) && owners.contains(&c.to))
                .filter(|c| PORTS.iter().any(|p| [6, 17, 1, 58, 47].iter().any(|q| service_covers(&c.service, *q, *p))))
                .collect();
            prop_assert!(between.is_empty(), "nothing changed, but: {between:#?}");
        }
    }

    #[test]
    fn any_text_gives_an_answer(text in "\\PC{0,200}") {
        if let Ok(policy) = Policy::parse(&text) {
            let _ = compile(&policy, &world(&BTreeMap::new()), NOW, HORIZON);
        }
    }
}

fn service_covers(service: &str, proto: u8, port: u16) -> bool {
    let (name, ports) = service.split_once(':').unwrap_or((service, "*"));
    let number = match name {
        "tcp" => 6,
        "udp" => 17,
        "icmp" => 1,
        "ipv6-icmp" => 58,
        "gre" => 47,
        other => other.parse().unwrap_or(0),
    };
    let (first, last) = match ports.split_once('-') {
        _ if ports == "*" => (0, u16::MAX),
        Some((a, b)) => (a.parse().expect("port"), b.parse().expect("port")),
        None => (ports.parse().expect("port"), ports.parse().expect("port")),
    };
    number == proto && first <= port && port <= last
}
