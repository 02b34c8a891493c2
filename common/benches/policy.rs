//! What the policy compiler costs, by size: `cargo bench -p warren-common --bench policy`. The results are in
//! docs/performance.md. Sizes up to 100 000 devices take long to prepare: name a group to run it alone.
#![expect(clippy::expect_used, reason = "a bench's helper fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use ipnet::IpNet;
use serde_json::{Value, json};
use warren_common::policy::{AttrValue, Attribute, Compiled, Inventory, Node, Policy, User, compile, diff};

const NOW: i64 = 1_774_000_000;
const HORIZON_S: i64 = 7 * 86_400;
const GRANTS: usize = 1_000;
const TAGS: usize = 200;
const GROUPS: usize = 100;
const SIZES: [usize; 4] = [1_000, 10_000, 30_000, 100_000];

/// Numbers without a pattern, the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// A third of the devices are workloads with one of 200 tags, the others belong to people with ten each; one in a
/// hundred carries a route, one in a thousand is an exit node.
fn world(devices: usize) -> Inventory {
    let mut dice = Dice(1);
    let people = (devices / 15).max(10);
    let users = (0..people).map(|i| User {
        id: (i + 1).to_string(),
        name: format!("u{i}"),
        email: Some(format!("u{i}@example.com")),
        ..User::default()
    });
    let nodes = (0..devices).map(|i| {
        let tagged = i % 3 == 0;
        let mut routes = BTreeSet::new();
        if i % 100 == 0 {
            let net = Ipv4Addr::from_bits(0x0a00_0000 + ((i as u32 / 100) << 12));
            routes.insert(IpNet::new(net.into(), 20).expect("a network"));
        }
        if i % 1_000 == 0 {
            routes.insert("0.0.0.0/0".parse().expect("a network"));
        }
        let os = Attribute {
            value: AttrValue::Text(["linux", "macos", "windows"][dice.below(3)].to_owned()),
            source: None,
            grade: None,
            age_s: Some(60),
        };
        let node = Node {
            hostname: format!("n{i}"),
            user: (!tagged).then(|| (dice.below(people) + 1).to_string()),
            tags: tagged.then(|| format!("tag:t{}", dice.below(TAGS))).into_iter().collect(),
            ipv4: Some(IpAddr::V4(Ipv4Addr::from_bits(0x6440_0000 + 1 + i as u32))),
            ipv6: Some(IpAddr::V6(Ipv6Addr::from_bits((0xfd7a_115c_a1e0 << 80) + 1 + i as u128))),
            routable_ips: routes.clone(),
            approved_routes: routes,
            attributes: BTreeMap::from([("node:os".to_owned(), os)]),
        };
        (format!("n{i:06}"), node)
    });
    Inventory { users: users.collect(), nodes: nodes.collect(), ..Inventory::default() }
}

/// A thousand grants of every kind, with rules about everything and routes, postures, windows and denials.
fn policy(devices: usize, extra: Option<Value>) -> String {
    let mut dice = Dice(2);
    let people = (devices / 15).max(10);
    let groups: BTreeMap<String, Vec<String>> = (0..GROUPS)
        .map(|g| {
            let members = (0..people / 20 + 1).map(|_| format!("u{}@example.com", dice.below(people)));
            (format!("group:g{g}"), members.collect())
        })
        .collect();
    let tags: BTreeMap<String, Vec<String>> =
        (0..TAGS).map(|t| (format!("tag:t{t}"), vec!["group:g0".to_owned()])).collect();
    let mut grants: Vec<Value> = vec![
        json!({"src": ["*"], "dst": ["tag:t0"], "ip": ["udp:53"]}),
        json!({"src": ["autogroup:member"], "dst": ["*"], "ip": ["icmp:*"]}),
        json!({"src": ["autogroup:member"], "dst": ["autogroup:self"], "ip": ["*"]}),
        json!({"src": ["group:g1"], "dst": ["autogroup:internet"], "ip": ["*"]}),
    ];
    while grants.len() < GRANTS {
        let group = format!("group:g{}", dice.below(GROUPS));
        let (a, b) = (format!("tag:t{}", dice.below(TAGS)), format!("tag:t{}", dice.below(TAGS)));
        let port = format!("tcp:{}", 1 + dice.below(9_999));
        grants.push(match dice.below(10) {
            0..=3 => json!({"src": [group], "dst": [a], "ip": [port]}),
            4 => json!({"src": [format!("u{}@example.com", dice.below(people))], "dst": [a], "ip": ["22"]}),
            5 | 6 => json!({"src": [a], "dst": [b], "ip": [port, "udp:53"]}),
            7 => json!({"src": [group], "dst": [a], "ip": [port], "srcPosture": "posture:linux"}),
            8 => json!({"src": [group], "dst": [format!("10.{}.0.0/16", dice.below(8))], "ip": ["*"]}),
            _ => json!({"src": [group], "dst": [a, b], "ip": [port],
                "when": {"days": ["mon", "tue"], "from": "09:00", "to": "17:00", "zone": "Europe/Berlin"}}),
        });
    }
    grants.extend(extra);
    json!({
        "groups": groups,
        "tagOwners": tags,
        "postures": {"posture:linux": ["node:os == 'linux'"]},
        "grants": grants,
        "deny": [{"src": ["tag:t1"], "dst": ["tag:t2"]}],
        "autoApprovers": {"routes": {"10.0.0.0/8": ["group:g0"]}},
        "ssh": [{"action": "check", "src": ["group:g0"], "dst": ["autogroup:tagged"], "users": ["root"]}],
    })
    .to_string()
}

fn built(text: &str, inventory: &Inventory) -> Compiled {
    let policy = Policy::parse(text).expect("valid");
    compile(&policy, inventory, NOW, HORIZON_S).expect("compiles")
}

/// What happens to one device, with a name for it.
type Change = (&'static str, fn(&mut Node));

const CHANGES: [Change; 4] = [
    ("posture", |node| {
        let old = &node.attributes["node:os"].value;
        let new = if *old == AttrValue::Text("linux".to_owned()) { "macos" } else { "linux" };
        node.attributes.insert("node:os".to_owned(), Attribute::server(AttrValue::Text(new.to_owned())));
    }),
    ("tag", |node| {
        node.user = None;
        node.tags = BTreeSet::from(["tag:t7".to_owned()]);
    }),
    ("route", |node| {
        let net: IpNet = "10.200.0.0/20".parse().expect("a network");
        node.routable_ips.insert(net);
        node.approved_routes.insert(net);
    }),
    ("address", |node| node.ipv4 = Some(Ipv4Addr::new(100, 127, 0, 1).into())),
];

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy");
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    for devices in SIZES {
        let (text, inventory) = (policy(devices, None), world(devices));
        group.bench_with_input(BenchmarkId::new("parse", devices), &text, |b, text| {
            b.iter(|| Policy::parse(black_box(text)).expect("valid"));
        });
        let policy_now = Policy::parse(&text).expect("valid");
        group.bench_with_input(BenchmarkId::new("compile", devices), &inventory, |b, inventory| {
            b.iter(|| compile(&policy_now, black_box(inventory), NOW, HORIZON_S).expect("compiles"));
        });
        let compiled = built(&text, &inventory);
        for (what, change) in CHANGES {
            // A device of a person whom the change concerns, and back again: two changes.
            let mut compiled = compiled.clone();
            let concerned = (500..900).map(|i| format!("n{i:06}")).find_map(|name| {
                let (before, mut after) = (&inventory.nodes[&name], inventory.nodes[&name].clone());
                before.user.as_ref()?;
                change(&mut after);
                let told = compiled.set_node(&name, Some(&after), NOW).expect("no conflict").len();
                compiled.set_node(&name, Some(before), NOW).expect("no conflict");
                (told > 10).then_some((name, before, after, told))
            });
            let (name, before, after, told) = concerned.expect("one of so many");
            let id = BenchmarkId::new(format!("change-{what}-there-and-back-tells-{told}"), devices);
            group.bench_function(id, |b| {
                b.iter(|| {
                    compiled.set_node(&name, Some(&after), NOW).expect("no conflict");
                    compiled.set_node(&name, Some(before), NOW).expect("no conflict")
                });
            });
        }
        group.bench_function(BenchmarkId::new("leave-and-join", devices), |b| {
            let mut compiled = compiled.clone();
            let node = &inventory.nodes["n000501"];
            b.iter(|| {
                compiled.set_node("n000501", None, NOW).expect("no conflict");
                compiled.set_node("n000501", Some(node), NOW).expect("no conflict")
            });
        });
        group.bench_function(BenchmarkId::new("one-device-in-full", devices), |b| {
            b.iter(|| (compiled.node(black_box("n000501")), compiled.egress("n000501")));
        });
        let edited =
            policy(devices, Some(json!({"src": ["group:g3"], "dst": ["tag:t9"], "ip": ["tcp:8443"]})));
        let edited = built(&edited, &inventory);
        let told = edited.changed_since(&compiled).len();
        group.bench_function(BenchmarkId::new(format!("who-is-told-of-an-edit-{told}"), devices), |b| {
            b.iter(|| edited.changed_since(black_box(&compiled)));
        });
        group.bench_function(BenchmarkId::new("diff-of-an-edit", devices), |b| {
            b.iter(|| diff(&compiled, black_box(&edited)));
        });
    }
    group.finish();
}

criterion_group!(policy_benches, benches);
criterion_main!(policy_benches);
