//! Prints what the filter costs: nanoseconds per packet of a known flow and per new flow, by number of rules.
//!
//! `cargo run --release -p warren-engine --example filter_bench`. Run it on an idle machine; every line is the best
//! of several rounds, since all that disturbs a round makes it slower.
#![expect(clippy::print_stdout, reason = "a program for people to run")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use warren_common::filter::{
    Action, FilterDst, FilterRule, IpRange, PROTO_TCP, PROTO_UDP, PortRange, RuleId,
};
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::filter::{Filter, Verdict};
use warren_engine::flow::table::FlowTable;
use warren_engine::matcher::{Matcher, Query, Scratch};
use warren_engine::packet::build::{Segment, stub};
use warren_engine::packet::{Addrs, Packet, Selector, TCP_ACK};

const ROUNDS: usize = 15;
const PEER: u32 = 1;

fn main() {
    let packets = udp_packets(1_000);
    let bytes: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    print("parse, UDP over IPv4", || {
        for packet in &bytes {
            let _ = black_box(Packet::parse(black_box(packet)));
        }
        bytes.len()
    });
    for (name, flows) in [("10", 10), ("1 000", 1_000), ("30 000", 30_000)] {
        hit(&format!("flow hit, UDP over IPv4, {name} flows"), &udp_packets(flows));
    }
    hit("flow hit, TCP over IPv4, 1 000 flows", &tcp_packets(1_000, false));
    hit("flow hit, TCP over IPv6, 1 000 flows", &tcp_packets(1_000, true));
    for count in [10, 1_000, 10_000] {
        for (shape, rules) in
            [("one host and port each", hosts(count)), ("overlapping networks and ports", overlapping(count))]
        {
            new_flows(&format!("{count} rules, {shape}"), rules);
        }
    }
    let mut filter = filter(overlapping(10_000));
    for packet in &udp_packets(30_000) {
        filter.egress(now(0), packet, PEER);
    }
    let flows = filter.flows().len();
    let snapshot = filter.rules().clone();
    print(&format!("re-check of {flows} flows against 10 000 rules, per flow"), || {
        assert!(filter.install(snapshot.clone(), now(0)).is_empty());
        flows
    });
    print("compile 10 000 rules, per rule", || {
        black_box(Matcher::compile(overlapping(10_000)));
        10_000
    });
}

fn hit(name: &str, packets: &[Vec<u8>]) {
    let mut filter = filter(vec![rule(0, any(), any(), PortRange::ALL)]);
    for packet in packets {
        assert_eq!(filter.egress(now(0), packet, PEER), Verdict::Pass);
    }
    let mut at = 0;
    print(name, || {
        at += 1_000; // a microsecond per round: not every packet shares one reading
        for packet in packets {
            black_box(filter.egress(now(at), black_box(packet), PEER));
        }
        packets.len()
    });
}

fn new_flows(name: &str, rules: Vec<FilterRule>) {
    let packets = udp_packets(1_000);
    let matcher = Matcher::compile(rules.clone());
    let mut scratch = Scratch::default();
    print(&format!("rule look-up, {name}"), || {
        for packet in &packets {
            let packet = Packet::parse(packet);
            let query = packet.map(|packet| Query {
                src: packet.src(),
                dst: packet.dst(),
                proto: PROTO_UDP,
                dst_port: packet.dst_port(),
            });
            if let Ok(query) = query {
                black_box(matcher.decide(&mut scratch, &query, 0, |_| {}).is_allowed());
            }
        }
        packets.len()
    });
    let filter = filter(rules);
    let snapshot = filter.rules().clone();
    print(&format!("new flow, {name}"), || {
        let mut filter = Filter::with_table([3, 5], FlowTable::with_limits([3, 5], 4_096, 4_096));
        filter.install(snapshot.clone(), now(0));
        for packet in &packets {
            black_box(filter.egress(now(0), packet, PEER));
        }
        packets.len()
    });
}

/// Runs `round`, which says how many things it did, and prints the best round's time for one.
fn print(name: &str, mut round: impl FnMut() -> usize) {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = clock();
        let count = round();
        best = best.min(start.elapsed().as_nanos() as f64 / count as f64);
    }
    println!("{best:9.1} ns  {name}");
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn clock() -> std::time::Instant {
    std::time::Instant::now()
}

fn now(nanos: u64) -> Now {
    Now { boot: Instant::from_nanos(1_000_000_000 + nanos), unix: UnixTime::from_secs(1_800_000_000) }
}

fn filter(egress: Vec<FilterRule>) -> Filter {
    let mut filter = Filter::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344]);
    filter.set_rules(Vec::new(), egress, 1, now(0));
    filter
}

fn local() -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, 1)
}

/// Spread over 4 096 hosts and as many ports.
fn host(at: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(100, 80, 0, 0).to_bits() + (at * 2_654_435_761 % 4_096) as u32)
}

fn port(at: usize) -> u16 {
    (1_000 + at * 40_503 % 4_096) as u16
}

fn udp_packets(count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|at| {
            let addrs = Addrs::V4 { src: local(), dst: host(at) };
            let selector = Selector::Ports { src: (20_000 + at / 7) as u16, dst: port(at) };
            stub(addrs, PROTO_UDP, selector)
        })
        .collect()
}

fn tcp_packets(count: usize, v6: bool) -> Vec<Vec<u8>> {
    let wide = |v4: Ipv4Addr| Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(v4.to_bits()));
    (0..count)
        .map(|at| {
            let addrs = if v6 {
                Addrs::V6 { src: wide(local()), dst: wide(host(at)) }
            } else {
                Addrs::V4 { src: local(), dst: host(at) }
            };
            let (src_port, dst_port) = ((20_000 + at / 7) as u16, port(at));
            let segment = Segment { addrs, src_port, dst_port, seq: 1, ack: Some(1), flags: TCP_ACK };
            segment.to_bytes()
        })
        .collect()
}

fn any() -> Vec<IpRange> {
    vec![IpRange::ALL_V4, IpRange::ALL_V6]
}

fn rule(id: usize, src: Vec<IpRange>, dst: Vec<IpRange>, ports: PortRange) -> FilterRule {
    FilterRule {
        id: RuleId(id as u64),
        origin: String::new(),
        action: Action::Allow,
        staged: false,
        src,
        dst: dst.into_iter().map(|net| FilterDst { net, ports }).collect(),
        protos: vec![PROTO_TCP, PROTO_UDP],
        active: None,
    }
}

fn hosts(count: usize) -> Vec<FilterRule> {
    (0..count)
        .map(|at| {
            let net = IpRange::from(IpAddr::V4(host(at)));
            rule(
                at,
                vec![IpAddr::V4(local()).into()],
                vec![net],
                PortRange { first: port(at), last: port(at) },
            )
        })
        .collect()
}

/// The worst kind: every rule covers many hosts and ports, and many rules cover the same.
fn overlapping(count: usize) -> Vec<FilterRule> {
    (0..count)
        .map(|at| {
            let first = host(at);
            let last = Ipv4Addr::from_bits(first.to_bits() + 700);
            let net = IpRange::new(IpAddr::V4(first), IpAddr::V4(last)).unwrap_or(IpRange::ALL_V4);
            rule(at, any(), vec![net], PortRange { first: port(at), last: port(at) + 40 })
        })
        .collect()
}
