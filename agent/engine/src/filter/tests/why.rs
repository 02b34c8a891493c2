//! What people are told.

use super::*;
use crate::filter::why::{MAX_NEAR_MISSES, MAX_RECENT_DROPS, MAX_WHY_FLOWS, Miss};

#[test]
fn names_the_deciding_rule_and_the_flow() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(3, 22)], vec![net.rule_out(1, 443), net.rule_out(2, 443)]);
        connect(&mut filter, &net, (40_000, 443), 0);
        let why = filter.why(at(5), Some(net.local), net.remote, PROTO_TCP, 443);
        assert_eq!(why.egress.outcome, Outcome::Allowed);
        assert_eq!(why.egress.rule.as_ref().unwrap().origin, "grants[1]");
        assert_eq!(why.ingress.outcome, Outcome::NoRule);
        let [flow] = why.flows.as_slice() else { panic!("{why:?}") };
        assert_eq!((flow.state, flow.local_port, flow.idle_ms), (FlowState::Established, 40_000, 5_000));
        let json = serde_json::to_value(&why).unwrap();
        assert_eq!(json["egress"]["outcome"], "allowed");
        assert_eq!(json["egress"]["rule"]["id"], "rule_0000000000000001");
        assert_eq!(json["flows"][0]["state"], "established");
        let deny = FilterRule { action: Action::Deny, ..net.rule_out(8, 443) };
        filter.set_rules(vec![], vec![net.rule_out(1, 443), deny], 2, at(5));
        let why = filter.why(at(5), Some(net.local), net.remote, PROTO_TCP, 443);
        assert_eq!((why.egress.outcome, why.revision), (Outcome::DeniedByRule, 2));
        assert_eq!(why.egress.rule.unwrap().id, RuleId(8));
    }
}

#[test]
fn names_the_rules_that_nearly_match_the_nearest_first() {
    for net in families() {
        let lapsed = UnixInterval { from: START + 60, until: START + 120 };
        let rules = vec![
            FilterRule { src: vec![IpRange::from(net.remote)], ..net.rule_out(1, 443) },
            FilterRule { protos: vec![PROTO_UDP], ..net.rule_out(2, 443) },
            net.rule_out(3, 8_443),
            FilterRule { active: Some(vec![lapsed]), ..net.rule_out(4, 443) },
            rule(5, net.local, net.local, 443),
            FilterRule { staged: true, ..net.rule_out(6, 443) },
        ];
        let filter = filter(vec![], rules);
        let why = filter.why(at(0), Some(net.local), net.remote, PROTO_TCP, 443);
        assert_eq!(why.egress.staged[0].id, RuleId(6));
        let misses: Vec<_> =
            why.egress.near_misses.into_iter().map(|near| (near.rule.id.0, near.miss)).collect();
        assert_eq!(
            misses,
            [
                (4, Miss::Time { next: Some(UnixTime::from_secs(START + 60)) }),
                (3, Miss::Port { opens: "8443".to_owned() }),
                (2, Miss::Protocol { opens: vec![PROTO_UDP] }),
                (1, Miss::Source),
            ]
        );
        // Without a local address, a rule's local side doesn't matter.
        let why = filter.why(at(0), None, net.remote, PROTO_TCP, 443);
        assert_eq!(why.egress.rule.unwrap().id, RuleId(1));
    }
}

#[test]
fn remembers_recent_drops_of_the_tuple() {
    for net in families() {
        let mut filter = filter(vec![], vec![]);
        for port in 40_000..40_003 {
            judge(&mut filter, OUT, 1, &net.udp(OUT, (port, 53)));
        }
        judge(&mut filter, IN, 2, &net.udp(IN, (53, 9)));
        judge(&mut filter, OUT, 3, &net.udp(OUT, (40_000, 54)));
        filter.record_drop(OUT, at(4), &net.udp(OUT, (1, 55)), DropReason::NoPeer);
        let why = filter.why(at(9), Some(net.local), net.remote, PROTO_UDP, 53);
        let drops: Vec<_> =
            why.drops.iter().map(|d| (d.direction, d.src_port, d.dst_port, d.count)).collect();
        assert_eq!(drops, [(IN, 9, 53, 1), (OUT, 40_002, 53, 3)]);
        assert_eq!(why.drops[1].last, at(1).unix);
        let why = filter.why(at(9), None, net.remote, PROTO_UDP, 55);
        assert_eq!(why.drops[0].reason, DropReason::NoPeer);
        assert_eq!(filter.counters(OUT).dropped(&DropReason::NoPeer), 1);
    }
}

#[test]
fn what_is_shown_and_remembered_is_bounded() {
    let net = families()[0];
    let wide = |id| FilterRule {
        dst: vec![FilterDst { net: IpRange::ALL_V4, ports: PortRange { first: 1, last: 9_999 } }],
        ..net.rule_out(id, 1)
    };
    let mut filter = filter(vec![], (0..20).map(wide).collect());
    for port in 0..100u16 {
        assert_eq!(judge(&mut filter, OUT, 0, &net.udp(OUT, (port, 53))), None);
    }
    for port in 10_000..20_000u16 {
        assert!(judge(&mut filter, OUT, 0, &net.udp(OUT, (10_000, port))).is_some());
    }
    let why = filter.why(at(0), None, net.remote, PROTO_UDP, 53);
    assert_eq!(why.flows.len(), MAX_WHY_FLOWS);
    let why = filter.why(at(0), None, net.remote, PROTO_UDP, 10_000);
    assert_eq!(why.egress.near_misses.len(), MAX_NEAR_MISSES);
    assert!(why.drops.len() <= MAX_RECENT_DROPS);
}
