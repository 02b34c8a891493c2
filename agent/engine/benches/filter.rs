//! What the filter costs per packet, by rules: `cargo bench -p warren-engine --bench filter`. The results are in
//! docs/performance.md.
#![expect(
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a bench's helper fails by panicking, and it measures time"
)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use warren_common::filter::{
    Action, FilterDst, FilterRule, IpRange, PROTO_TCP, PROTO_UDP, PortRange, RuleId, UnixInterval,
};
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::filter::{Filter, Snapshot, Verdict};
use warren_engine::matcher::Matcher;
use warren_engine::packet::{Addrs, Selector, build};

const NOW: Now =
    Now { boot: Instant::from_nanos(1_000_000_000_000), unix: UnixTime::from_secs(1_774_000_000) };
const RULES: [usize; 3] = [10, 1_000, 10_000];
/// Sources of one rule: the devices of a group.
const MEMBERS: usize = 20;
/// Devices that rules speak of.
const DEVICES: usize = 10_000;
/// New flows between two empty flow tables: few enough that no peer's share is used up.
const PEERS: usize = 64;
const EACH: usize = 16;

/// Numbers without a pattern, the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

fn addr(n: usize, v4: bool) -> IpAddr {
    if v4 {
        Ipv4Addr::from_bits(0x6440_0000 + n as u32).into()
    } else {
        Ipv6Addr::from_bits((0xfd7a_115c_a1e0 << 80) + n as u128).into()
    }
}

/// Rules of many groups for this device, number 0; one in ten has hours, one in fifty denies, one in fifty is about all.
fn rules(count: usize) -> Vec<FilterRule> {
    let mut dice = Dice(1);
    let mut out: Vec<FilterRule> = (0..count)
        .map(|n| {
            let mut members: Vec<usize> = (0..MEMBERS).map(|_| PEERS + 1 + dice.below(DEVICES)).collect();
            members.sort_unstable();
            members.dedup();
            let src = match n % 50 {
                1 => vec![IpRange::ALL_V4, IpRange::ALL_V6],
                _ => {
                    [true, false].iter().flat_map(|v4| members.iter().map(|m| addr(*m, *v4).into())).collect()
                }
            };
            let first = 1 + dice.below(60_000) as u16;
            let ports = PortRange { first, last: first + dice.below(3) as u16 };
            let hours = UnixInterval { from: NOW.unix.as_secs() - 3_600, until: NOW.unix.as_secs() + 3_600 };
            FilterRule {
                id: RuleId(n as u64),
                origin: format!("grants[{n}] line {n}"),
                action: if n % 50 == 2 { Action::Deny } else { Action::Allow },
                staged: false,
                src,
                dst: [true, false].map(|v4| FilterDst { net: addr(0, v4).into(), ports }).to_vec(),
                protos: if n % 2 == 0 { vec![PROTO_TCP] } else { Vec::new() },
                active: (n % 10 == 3).then(|| vec![hours]),
            }
        })
        .collect();
    // What the measured connections are allowed by.
    out.push(FilterRule {
        id: RuleId(u64::MAX),
        origin: "grants[0] line 3".into(),
        action: Action::Allow,
        staged: false,
        src: (1..=PEERS).map(|n| addr(n, true).into()).collect(),
        dst: vec![FilterDst { net: addr(0, true).into(), ports: PortRange { first: 61_000, last: 61_000 } }],
        protos: vec![PROTO_UDP],
        active: None,
    });
    out
}

fn packet(from: usize, src: u16, dst: u16) -> Vec<u8> {
    let addrs = Addrs::new(addr(from, true), addr(0, true)).expect("one family");
    build::stub(addrs, PROTO_UDP, Selector::Ports { src, dst })
}

fn filter(rules: &Arc<Snapshot>) -> Filter {
    let mut filter = Filter::new([1, 2]);
    filter.install(Arc::clone(rules), NOW);
    filter
}

/// Time that `packets` take, each of them the first of a flow, `iterations` of them.
fn first_packets(snapshot: &Arc<Snapshot>, packets: &[(u32, Vec<u8>)], iterations: u64) -> Duration {
    let (mut spent, mut left) = (Duration::ZERO, iterations as usize);
    while left > 0 {
        let mut filter = filter(snapshot);
        let batch = &packets[..left.min(packets.len())];
        let started = std::time::Instant::now();
        for (peer, bytes) in batch {
            black_box(filter.ingress(NOW, black_box(bytes), *peer));
        }
        spent += started.elapsed();
        left -= batch.len();
    }
    spent
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("filter");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for count in RULES {
        let list = rules(count);
        group.bench_function(BenchmarkId::new("compile", count), |b| {
            b.iter(|| Matcher::compile(black_box(list.clone())));
        });
        let snapshot = Arc::new(Snapshot::compile(list.clone(), Vec::new(), 1));

        let mut warm = filter(&snapshot);
        let known = packet(1, 5_000, 61_000);
        assert!(matches!(warm.ingress(NOW, &known, 1), Verdict::Pass), "the flow is allowed");
        group.bench_function(BenchmarkId::new("flow-hit", count), |b| {
            b.iter(|| warm.ingress(NOW, black_box(&known), 1));
        });

        let firsts = |port: u16| -> Vec<(u32, Vec<u8>)> {
            let each = |n: usize| (1 + n % PEERS, 5_000 + (n / PEERS) as u16);
            let flows = (0..PEERS * EACH).map(each);
            flows.map(|(peer, src)| (peer as u32, packet(peer, src, port))).collect()
        };
        for (what, port) in [("new-flow", 61_000), ("refused", 61_001)] {
            let packets = firsts(port);
            let mut fresh = filter(&snapshot);
            let allowed = |(peer, bytes): &(u32, Vec<u8>)| fresh.ingress(NOW, bytes, *peer) == Verdict::Pass;
            let accepted = packets.iter().map(allowed).filter(|a| *a).count();
            assert_eq!(accepted, if what == "refused" { 0 } else { PEERS * EACH });
            group.bench_function(BenchmarkId::new(what, count), |b| {
                b.iter_custom(|iterations| first_packets(&snapshot, &packets, iterations));
            });
        }
    }
    group.finish();
}

criterion_group!(filter_benches, benches);
criterion_main!(filter_benches);
