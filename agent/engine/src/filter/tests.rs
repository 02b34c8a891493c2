//! Each rule of the design's section on flows, in both families.

use std::net::IpAddr;
use std::time::Duration;

use warren_common::filter::{
    Action, FilterDst, IpRange, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, PortRange,
};

use super::*;
use crate::flow::{FlowState, TCP_ESTABLISHED, TCP_TRANSITORY};
use crate::packet::{Addrs, ParseError, TCP_ACK, TCP_FIN, TCP_SYN, build};

mod disagreements;
mod ends;
mod fragments;
mod why;

const PEER: u32 = 7;
const START: i64 = 1_800_000_000;

fn at(secs: u64) -> Now {
    Now {
        boot: Instant::from_nanos(1_000_000_000 * (secs + 1_000)),
        unix: UnixTime::from_secs(START) + Duration::from_secs(secs),
    }
}

/// Which family a test runs in: the local host and one peer.
#[derive(Clone, Copy, Debug)]
struct Net {
    local: IpAddr,
    remote: IpAddr,
    icmp: u8,
}

fn families() -> [Net; 2] {
    [
        Net { local: [100, 64, 0, 1].into(), remote: [100, 64, 0, 2].into(), icmp: PROTO_ICMP },
        Net {
            local: [0xfd00, 0, 0, 0, 0, 0, 0, 1].into(),
            remote: [0xfd00, 0, 0, 0, 0, 0, 0, 2].into(),
            icmp: PROTO_ICMPV6,
        },
    ]
}

impl Net {
    fn out(&self) -> Addrs {
        Addrs::new(self.local, self.remote).unwrap()
    }

    fn tcp(&self, direction: Direction, ports: (u16, u16), flags: u8, seq: u32, ack: u32) -> Vec<u8> {
        let (local_port, remote_port) = ports;
        let (addrs, src_port, dst_port) = match direction {
            Direction::Egress => (self.out(), local_port, remote_port),
            Direction::Ingress => (self.out().reversed(), remote_port, local_port),
        };
        let ack = (flags & TCP_ACK != 0).then_some(ack);
        build::Segment { addrs, src_port, dst_port, seq, ack, flags }.to_bytes()
    }

    fn udp(&self, direction: Direction, ports: (u16, u16)) -> Vec<u8> {
        let (local_port, remote_port) = ports;
        match direction {
            Direction::Egress => {
                build::stub(self.out(), PROTO_UDP, Selector::Ports { src: local_port, dst: remote_port })
            }
            Direction::Ingress => build::stub(
                self.out().reversed(),
                PROTO_UDP,
                Selector::Ports { src: remote_port, dst: local_port },
            ),
        }
    }

    fn echo(&self, direction: Direction, request: bool, id: u16) -> Vec<u8> {
        let addrs = match direction {
            Direction::Egress => self.out(),
            Direction::Ingress => self.out().reversed(),
        };
        build::stub(addrs, self.icmp, Selector::Echo { request, id })
    }

    /// From the local host to one port of the peer.
    fn rule_out(&self, id: u64, port: u16) -> FilterRule {
        rule(id, self.local, self.remote, port)
    }

    /// From the peer to one port of the local host.
    fn rule_in(&self, id: u64, port: u16) -> FilterRule {
        rule(id, self.remote, self.local, port)
    }
}

fn rule(id: u64, src: IpAddr, dst: IpAddr, port: u16) -> FilterRule {
    FilterRule {
        id: RuleId(id),
        origin: format!("grants[{id}]"),
        action: Action::Allow,
        staged: false,
        src: vec![IpRange::from(src)],
        dst: vec![FilterDst { net: IpRange::from(dst), ports: PortRange { first: port, last: port } }],
        protos: Vec::new(),
        active: None,
    }
}

fn filter(ingress: Vec<FilterRule>, egress: Vec<FilterRule>) -> Filter {
    let mut filter = Filter::new([1, 2]);
    assert!(filter.set_rules(ingress, egress, 1, at(0)).is_empty());
    filter
}

const OUT: Direction = Direction::Egress;
const IN: Direction = Direction::Ingress;

/// Makes short work of a packet's verdict: `None` is a pass.
fn judge(filter: &mut Filter, direction: Direction, secs: u64, bytes: &[u8]) -> Option<DropReason> {
    let verdict = match direction {
        Direction::Egress => filter.egress(at(secs), bytes, PEER),
        Direction::Ingress => filter.ingress(at(secs), bytes, PEER),
    };
    match verdict {
        Verdict::Pass => None,
        Verdict::Drop(reason) => Some(reason),
    }
}

/// A handshake opened by the local host: it has sent up to 101, the peer up to 501.
fn connect(filter: &mut Filter, net: &Net, ports: (u16, u16), secs: u64) {
    for (direction, flags, seq, ack) in
        [(OUT, TCP_SYN, 100, 0), (IN, TCP_SYN | TCP_ACK, 500, 101), (OUT, TCP_ACK, 101, 501)]
    {
        let segment = net.tcp(direction, ports, flags, seq, ack);
        assert_eq!(judge(filter, direction, secs, &segment), None, "{direction:?}");
    }
}

fn only_flow(filter: &Filter) -> Flow {
    let mut flows = filter.flows().flows();
    let flow = *flows.next().unwrap();
    assert!(flows.next().is_none());
    flow
}

fn parsed(bytes: &[u8]) -> (Packet<'_>, Option<TcpHeader>) {
    let packet = Packet::parse(bytes).unwrap();
    match packet.transport {
        Transport::Tcp(tcp) => (packet, Some(tcp)),
        _ => (packet, None),
    }
}

#[test]
fn denies_everything_without_rules() {
    for net in families() {
        let mut filter = Filter::new([1, 2]);
        for direction in [OUT, IN] {
            let packets = [
                net.tcp(direction, (40_000, 443), TCP_SYN, 1, 0),
                net.udp(direction, (40_000, 443)),
                net.echo(direction, true, 1),
            ];
            for bytes in packets {
                assert_eq!(judge(&mut filter, direction, 0, &bytes), Some(DropReason::NoRule));
            }
            assert_eq!(filter.counters(direction).dropped(&DropReason::NoRule), 3);
        }
        assert!(filter.flows().is_empty());
    }
}

#[test]
fn replies_pass_by_the_flow_alone() {
    for net in families() {
        let mut filter = filter(vec![], vec![net.rule_out(1, 53)]);
        let answer = net.udp(IN, (40_000, 53));
        assert_eq!(judge(&mut filter, IN, 0, &answer), Some(DropReason::NoRule));
        assert_eq!(judge(&mut filter, OUT, 0, &net.udp(OUT, (40_000, 53))), None);
        assert_eq!(judge(&mut filter, IN, 1, &answer), None);
        assert_eq!(only_flow(&filter).state, FlowState::Answered);
        for other in [(40_001, 53), (40_000, 54)] {
            assert!(judge(&mut filter, IN, 1, &net.udp(IN, other)).is_some());
        }
        assert_eq!(judge(&mut filter, OUT, 1, &net.udp(OUT, (40_000, 54))), Some(DropReason::NoRule));
    }
}

#[test]
fn what_peers_may_open_is_answered_but_not_opened() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(1, 22)], vec![]);
        assert!(judge(&mut filter, OUT, 0, &net.tcp(OUT, (22, 40_000), TCP_SYN, 1, 0)).is_some());
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, (22, 40_000), TCP_SYN, 1, 0)), None);
        let answer = net.tcp(OUT, (22, 40_000), TCP_SYN | TCP_ACK, 9, 2);
        assert_eq!(judge(&mut filter, OUT, 0, &answer), None);
        assert_eq!(only_flow(&filter).state, FlowState::SynReceived);
    }
}

#[test]
fn tcp_goes_through_its_states() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        let steps = [
            (OUT, TCP_SYN, 100, 0, FlowState::SynSent),
            (OUT, TCP_SYN, 100, 0, FlowState::SynSent),
            (IN, TCP_SYN | TCP_ACK, 500, 101, FlowState::SynReceived),
            (OUT, TCP_ACK, 101, 501, FlowState::Established),
            (OUT, TCP_FIN | TCP_ACK, 101, 501, FlowState::HalfClosed),
            (IN, TCP_ACK, 501, 102, FlowState::HalfClosed),
            (IN, TCP_FIN | TCP_ACK, 501, 102, FlowState::TimeWait),
            (OUT, TCP_ACK, 102, 502, FlowState::TimeWait),
            // The ports again: a new connection.
            (OUT, TCP_SYN, 9_000, 0, FlowState::SynSent),
            (IN, TCP_RST | TCP_ACK, 0, 9_001, FlowState::Closed),
        ];
        for (step, (direction, flags, seq, ack, state)) in steps.into_iter().enumerate() {
            let segment = net.tcp(direction, ports, flags, seq, ack);
            assert_eq!(judge(&mut filter, direction, 0, &segment), None, "step {step}");
            assert_eq!(only_flow(&filter).state, state, "step {step}");
        }
    }
}

#[test]
fn a_made_up_reset_does_not_close_the_flow() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        connect(&mut filter, &net, ports, 0);
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, ports, TCP_RST, 77, 0)), None);
        assert_eq!(only_flow(&filter).state, FlowState::Established);
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, ports, TCP_RST, 501, 0)), None);
        assert_eq!(only_flow(&filter).state, FlowState::Closed);
    }
}

#[test]
fn a_peer_cannot_open_along_a_flow() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        connect(&mut filter, &net, ports, 0);
        let syn = net.tcp(IN, ports, TCP_SYN, 1, 0);
        assert_eq!(judge(&mut filter, IN, 0, &syn), Some(DropReason::NoRule));
        // Nor once the flow is over.
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, ports, TCP_RST, 501, 0)), None);
        assert_eq!(judge(&mut filter, IN, 0, &syn), Some(DropReason::NoRule));
    }
}

#[test]
fn timeouts_are_as_documented() {
    for net in families() {
        let udp = (40_000, 53);
        let tcp = (40_000, 443);
        let rules = vec![net.rule_out(1, 53), net.rule_out(2, 443)];
        let lasts = |open: &dyn Fn(&mut Filter), answer: Vec<u8>, timeout: Duration| {
            let secs = timeout.as_secs();
            for (after, passes) in [(secs - 1, true), (secs, false)] {
                let mut filter = filter(vec![], rules.clone());
                open(&mut filter);
                assert_eq!(judge(&mut filter, IN, after, &answer).is_none(), passes, "{after} s");
            }
        };
        let send_udp = |filter: &mut Filter| {
            assert_eq!(judge(filter, OUT, 0, &net.udp(OUT, udp)), None);
        };
        lasts(&send_udp, net.udp(IN, udp), crate::flow::DATAGRAM_UNANSWERED);
        let exchange_udp = |filter: &mut Filter| {
            send_udp(filter);
            assert_eq!(judge(filter, IN, 0, &net.udp(IN, udp)), None);
        };
        lasts(&exchange_udp, net.udp(IN, udp), crate::flow::DATAGRAM_ANSWERED);
        let ping = |filter: &mut Filter| {
            assert_eq!(judge(filter, OUT, 0, &net.echo(OUT, true, 5)), None);
        };
        lasts(&ping, net.echo(IN, false, 5), crate::flow::ICMP_QUERY);
        let knock = |filter: &mut Filter| {
            assert_eq!(judge(filter, OUT, 0, &net.tcp(OUT, tcp, TCP_SYN, 1, 0)), None);
        };
        lasts(&knock, net.tcp(IN, tcp, TCP_SYN | TCP_ACK, 1, 2), TCP_TRANSITORY);
        let establish = |filter: &mut Filter| connect(filter, &net, tcp, 0);
        lasts(&establish, net.tcp(IN, tcp, TCP_ACK, 501, 101), TCP_ESTABLISHED);
        let reset = |filter: &mut Filter| {
            connect(filter, &net, tcp, 0);
            assert_eq!(judge(filter, IN, 0, &net.tcp(IN, tcp, TCP_RST, 501, 0)), None);
        };
        lasts(&reset, net.tcp(IN, tcp, TCP_ACK, 501, 101), crate::flow::TCP_CLOSED);
    }
}

#[test]
fn echo_is_told_apart_by_who_asks() {
    for net in families() {
        let mut filter = filter(vec![], vec![net.rule_out(1, 0)]);
        assert_eq!(judge(&mut filter, IN, 0, &net.echo(IN, false, 5)), Some(DropReason::NoFlow));
        assert_eq!(judge(&mut filter, OUT, 0, &net.echo(OUT, true, 5)), None);
        assert_eq!(judge(&mut filter, IN, 0, &net.echo(IN, false, 5)), None);
        assert_eq!(judge(&mut filter, IN, 0, &net.echo(IN, false, 6)), Some(DropReason::NoFlow));
        // The same identifier, asked by the other side.
        assert_eq!(judge(&mut filter, IN, 0, &net.echo(IN, true, 5)), Some(DropReason::NoRule));
        assert_eq!(judge(&mut filter, OUT, 0, &net.echo(OUT, false, 5)), Some(DropReason::NoFlow));
    }
}

#[test]
fn icmp_errors_pass_only_about_a_flow() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(2, 69)], vec![net.rule_out(1, 53)]);
        let sent = net.udp(OUT, (40_000, 53));
        let error = build::prohibited(net.out().reversed(), &sent);
        let unrelated = Some(DropReason::UnrelatedIcmpError);
        assert_eq!(judge(&mut filter, IN, 0, &error), unrelated);
        assert_eq!(judge(&mut filter, OUT, 0, &sent), None);
        assert_eq!(judge(&mut filter, IN, 0, &error), None);
        // About another packet; about one that went the other way; from another peer; to another host.
        let other = build::prohibited(net.out().reversed(), &net.udp(OUT, (40_001, 53)));
        assert_eq!(judge(&mut filter, IN, 0, &other), unrelated);
        let turned = build::prohibited(net.out().reversed(), &net.udp(IN, (40_000, 53)));
        assert_eq!(judge(&mut filter, IN, 0, &turned), unrelated);
        assert_eq!(filter.ingress(at(0), &error, PEER + 1), Verdict::Drop(DropReason::UnrelatedIcmpError));
        let stranger = Addrs::new(net.remote, net.remote).unwrap();
        let astray = build::prohibited(stranger, &sent);
        assert_eq!(judge(&mut filter, IN, 0, &astray), unrelated);
        // Outwards: port unreachable about what a peer sent.
        let asked = net.udp(IN, (69, 40_000));
        let refusal = build::prohibited(net.out(), &asked);
        assert_eq!(judge(&mut filter, OUT, 0, &refusal), unrelated);
        assert_eq!(judge(&mut filter, IN, 0, &asked), None);
        assert_eq!(judge(&mut filter, OUT, 0, &refusal), None);
    }
}

#[test]
fn icmp_that_steers_hosts_never_passes() {
    for net in families() {
        let all = |mut rule: FilterRule| {
            rule.protos = vec![net.icmp];
            rule
        };
        let rules = (vec![all(net.rule_in(1, 0))], vec![all(net.rule_out(2, 0))]);
        let mut filter = filter(rules.0, rules.1);
        let kinds: &[u8] = if net.icmp == PROTO_ICMP { &[5] } else { &[133, 134, 135, 136, 137] };
        for kind in kinds {
            let selector = Selector::Icmp { kind: *kind };
            let inwards = build::stub(net.out().reversed(), net.icmp, selector);
            assert_eq!(judge(&mut filter, IN, 0, &inwards), Some(DropReason::ForbiddenIcmp));
            let outwards = build::stub(net.out(), net.icmp, selector);
            assert_eq!(judge(&mut filter, OUT, 0, &outwards), Some(DropReason::ForbiddenIcmp));
        }
    }
}

#[test]
fn after_a_restart_the_permitted_direction_makes_the_flow_again() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        let data = net.tcp(IN, ports, TCP_ACK, 501, 101);
        assert_eq!(judge(&mut filter, IN, 0, &data), Some(DropReason::NoFlow));
        // Its receiver is asked, with a number just before the one it expects.
        let Some(Output::Local(ask)) = filter.poll_output() else { panic!("no request for proof") };
        let (packet, tcp) = parsed(&ask);
        let tcp = tcp.unwrap();
        assert_eq!(packet.addrs, net.out().reversed());
        assert_eq!((tcp.seq, tcp.ack, tcp.flags, tcp.payload_len), (500, 101, TCP_ACK, 0));
        // A host without that connection resets: neither a flow nor a packet on the wire.
        let reset = net.tcp(OUT, ports, TCP_RST, 101, 0);
        assert_eq!(judge(&mut filter, OUT, 0, &reset), Some(DropReason::NoFlow));
        assert_eq!(filter.poll_output(), None);
        // One with it acknowledges, and then the transfer goes on.
        assert_eq!(judge(&mut filter, OUT, 0, &net.tcp(OUT, ports, TCP_ACK, 101, 501)), None);
        assert_eq!(only_flow(&filter).state, FlowState::Relearnt);
        assert_eq!(judge(&mut filter, IN, 0, &data), None);
        assert_eq!(only_flow(&filter).state, FlowState::Established);
    }
}

#[test]
fn after_a_restart_of_the_serving_side_the_client_is_asked() {
    for net in families() {
        let ports = (22, 40_000);
        let mut filter = filter(vec![net.rule_in(1, 22)], vec![]);
        let data = net.tcp(OUT, ports, TCP_ACK, 901, 301);
        assert_eq!(judge(&mut filter, OUT, 0, &data), Some(DropReason::NoFlow));
        let Some(Output::Peer { peer: PEER, packet }) = filter.poll_output() else {
            panic!("no request for proof")
        };
        let tcp = parsed(&packet).1.unwrap();
        assert_eq!((tcp.seq, tcp.ack, tcp.flags, tcp.payload_len), (900, 301, TCP_ACK, 0));
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, ports, TCP_ACK, 301, 901)), None);
        assert_eq!(judge(&mut filter, OUT, 0, &data), None);
    }
}

#[test]
fn an_unmatched_segment_in_no_permitted_direction_is_dropped_silently() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(1, 22)], vec![net.rule_out(2, 443)]);
        for flags in [TCP_ACK, TCP_FIN | TCP_ACK, TCP_RST, TCP_SYN | TCP_ACK] {
            for direction in [OUT, IN] {
                let segment = net.tcp(direction, (40_000, 80), flags, 5, 6);
                assert_eq!(judge(&mut filter, direction, 0, &segment), Some(DropReason::NoFlow));
            }
        }
        assert_eq!(filter.poll_output(), None);
        assert!(filter.flows().is_empty());
    }
}

#[test]
fn refused_connections_fail_at_once_for_the_local_application_only() {
    for net in families() {
        let mut filter = filter(vec![], vec![]);
        let syn = net.tcp(OUT, (40_000, 443), TCP_SYN, 100, 0);
        assert_eq!(judge(&mut filter, OUT, 0, &syn), Some(DropReason::NoRule));
        let Some(Output::Local(reset)) = filter.poll_output() else { panic!("no reset") };
        let (packet, tcp) = parsed(&reset);
        let tcp = tcp.unwrap();
        assert_eq!(packet.addrs, net.out().reversed());
        assert_eq!((tcp.src_port, tcp.dst_port), (443, 40_000));
        assert_eq!((tcp.flags, tcp.seq, tcp.ack), (TCP_RST | TCP_ACK, 0, 101));
        for bytes in [net.udp(OUT, (40_000, 53)), net.echo(OUT, true, 3)] {
            assert_eq!(judge(&mut filter, OUT, 0, &bytes), Some(DropReason::NoRule));
            let Some(Output::Local(error)) = filter.poll_output() else { panic!("no error") };
            let quoted = parsed(&error).0.quoted().unwrap();
            assert_eq!(quoted.addrs, net.out());
        }
        for bytes in [net.tcp(IN, (22, 9), TCP_SYN, 1, 0), net.udp(IN, (22, 9)), net.echo(IN, true, 3)] {
            assert!(judge(&mut filter, IN, 0, &bytes).is_some());
            assert_eq!(filter.poll_output(), None);
        }
    }
}

#[test]
fn what_the_engine_refuses_fails_at_once_too() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        connect(&mut filter, &net, ports, 0);
        // The peer is removed with all its addresses: later packets find no peer.
        assert_eq!(filter.remove_peer(PEER, at(1)).len(), 1);
        let answers = [
            (net.tcp(OUT, ports, TCP_ACK, 101, 501), true),
            (net.tcp(OUT, (9, 443), TCP_ACK, 101, 501), false), // no connection to reset
            (net.tcp(OUT, (9, 443), TCP_SYN, 1, 0), true),
            (net.udp(OUT, (9, 443)), true),
            (net.echo(OUT, false, 4), false),
        ];
        for (bytes, answered) in answers {
            filter.record_drop(OUT, at(1), &bytes, DropReason::NoPeer);
            assert_eq!(matches!(filter.poll_output(), Some(Output::Local(_))), answered);
        }
        filter.record_drop(OUT, at(1), &net.udp(OUT, (9, 443)), DropReason::SpoofedSource);
        filter.record_drop(IN, at(1), &net.udp(IN, (9, 443)), DropReason::NoPeer);
        assert_eq!(filter.poll_output(), None);
    }
}

#[test]
fn refusals_are_bounded() {
    let net = families()[0];
    let mut filter = filter(vec![], vec![]);
    for port in 0..2_000u16 {
        let syn = net.tcp(OUT, (40_000, port), TCP_SYN, 100, 0);
        assert_eq!(filter.egress(at(0), &syn, u32::from(port)), Verdict::Drop(DropReason::NoRule));
    }
    let made = std::iter::from_fn(|| filter.poll_output()).count();
    assert_eq!(made, MAX_OUTPUTS);
    let mut filter = Filter::new([1, 2]);
    let made: usize = (0..100u64)
        .map(|_| {
            judge(&mut filter, OUT, 0, &net.udp(OUT, (1, 2)));
            std::iter::from_fn(|| filter.poll_output()).count()
        })
        .sum();
    assert_eq!(made, 64, "one peer's burst");
}

#[test]
fn another_peer_cannot_use_a_flow() {
    for net in families() {
        let mut filter = filter(vec![], vec![net.rule_out(1, 53)]);
        assert_eq!(judge(&mut filter, OUT, 0, &net.udp(OUT, (5, 53))), None);
        let answer = net.udp(IN, (5, 53));
        assert_eq!(filter.ingress(at(0), &answer, PEER + 1), Verdict::Drop(DropReason::SpoofedSource));
        assert_eq!(judge(&mut filter, IN, 0, &answer), None);
    }
}

#[test]
fn staged_rules_are_counted_and_never_enforced() {
    for net in families() {
        let staged = |rule: FilterRule, action| FilterRule { staged: true, action, ..rule };
        let ingress = vec![net.rule_in(1, 80), staged(net.rule_in(2, 80), Action::Deny)];
        let egress = vec![staged(net.rule_out(3, 443), Action::Allow)];
        let mut filter = filter(ingress.clone(), egress);
        // A staged denial cuts nothing, and a staged grant opens nothing.
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, (80, 5_000), TCP_SYN, 1, 0)), None);
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, (80, 5_000), TCP_ACK, 2, 1)), None);
        for port in 5_000..5_003 {
            let refused = judge(&mut filter, OUT, 0, &net.tcp(OUT, (port, 443), TCP_SYN, 1, 0));
            assert_eq!(refused, Some(DropReason::NoRule));
        }
        let hits = |filter: &Filter| filter.staged_hits().collect::<Vec<_>>();
        assert_eq!(hits(&filter), [(RuleId(2), 0, 1), (RuleId(3), 3, 0)], "a connection counts once");
        // New rules: who stays keeps its count, who goes is forgotten.
        filter.set_rules(ingress, vec![], 2, at(1));
        assert_eq!(hits(&filter), [(RuleId(2), 0, 1)]);
    }
}

#[test]
fn labels_are_the_serialised_codes() {
    let reasons = [
        DropReason::NoRule,
        DropReason::DeniedByRule(RuleId(1)),
        DropReason::LeaseEnded,
        DropReason::Malformed(ParseError::NotIp),
        DropReason::NotFirstFragment,
        DropReason::UnrelatedIcmpError,
        DropReason::ForbiddenIcmp,
        DropReason::NoFlow,
        DropReason::FlowEnded,
        DropReason::FlowTableFull,
        DropReason::SpoofedSource,
        DropReason::NoPeer,
    ];
    assert_eq!(reasons.len(), DropReason::COUNT);
    for (reason, label) in reasons.iter().zip(DropReason::LABELS) {
        assert_eq!(reason.label(), label);
        assert_eq!(serde_json::to_value(reason).unwrap()["code"], label);
    }
}
