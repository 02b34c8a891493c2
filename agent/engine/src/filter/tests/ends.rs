//! Permissions end, and flows with them.

use super::*;

#[test]
fn a_flow_that_policy_no_longer_allows_ends_at_once() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443), net.rule_out(2, 53)]);
        connect(&mut filter, &net, ports, 0);
        assert_eq!(judge(&mut filter, OUT, 0, &net.udp(OUT, (5, 53))), None);
        let ended = filter.set_rules(vec![], vec![net.rule_out(2, 53)], 2, at(1));
        let [ended] = ended.as_slice() else { panic!("{ended:?}") };
        assert_eq!((ended.flow.rule, ended.reason), (RuleId(1), EndReason::PolicyChanged));
        // The exact numbers: the peer sent up to 501, the local host up to 101.
        let notice = ended.notice().unwrap();
        let (packet, tcp) = parsed(&notice);
        let tcp = tcp.unwrap();
        assert_eq!(packet.addrs, net.out().reversed());
        assert_eq!((tcp.src_port, tcp.dst_port), (443, 40_000));
        assert_eq!((tcp.flags, tcp.seq, tcp.ack), (TCP_RST | TCP_ACK, 501, 101));
        // Nothing passes any more, and an application that goes on is reset with its own number.
        let data = net.tcp(IN, ports, TCP_ACK, 501, 101);
        assert_eq!(judge(&mut filter, IN, 1, &data), Some(DropReason::FlowEnded));
        assert_eq!(filter.poll_output(), None);
        let more = net.tcp(OUT, ports, TCP_ACK, 101, 777);
        assert_eq!(judge(&mut filter, OUT, 1, &more), Some(DropReason::FlowEnded));
        let Some(Output::Local(reset)) = filter.poll_output() else { panic!("no reset") };
        let tcp = parsed(&reset).1.unwrap();
        assert_eq!((tcp.flags, tcp.seq), (TCP_RST, 777));
        // The other flow was checked and stays.
        assert_eq!(judge(&mut filter, IN, 1, &net.udp(IN, (5, 53))), None);
        let flow = filter.flows().flows().find(|flow| flow.key.proto() == PROTO_UDP);
        assert_eq!(flow.unwrap().revision, 2);
    }
}

#[test]
fn the_reset_number_follows_the_data() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        connect(&mut filter, &net, ports, 0);
        let with_data = |seq: u32, len: usize| {
            let mut bytes = net.tcp(IN, ports, TCP_ACK, seq, 101);
            bytes.extend(vec![0; len]);
            let len = bytes.len();
            match net.local {
                IpAddr::V4(_) => bytes[2..4].copy_from_slice(&(len as u16).to_be_bytes()),
                IpAddr::V6(_) => bytes[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes()),
            }
            bytes
        };
        let expects = |filter: &Filter, seq| {
            assert_eq!(only_flow(filter).reset_numbers().unwrap().seq, seq);
        };
        assert_eq!(judge(&mut filter, IN, 0, &with_data(501, 100)), None);
        expects(&filter, 601);
        assert_eq!(judge(&mut filter, IN, 0, &with_data(701, 100)), None);
        expects(&filter, 601); // a gap
        assert_eq!(judge(&mut filter, IN, 0, &with_data(551, 150)), None);
        expects(&filter, 701); // filled, as far as known
        assert_eq!(judge(&mut filter, OUT, 0, &net.tcp(OUT, ports, TCP_ACK, 101, 801)), None);
        expects(&filter, 801); // the local TCP knows better
        assert_eq!(judge(&mut filter, IN, 0, &with_data(501, 100)), None);
        expects(&filter, 801); // sent again
    }
}

#[test]
fn a_connection_that_is_still_opening_is_reset_by_acknowledgement() {
    for net in families() {
        let mut filter = filter(vec![], vec![net.rule_out(1, 443)]);
        assert_eq!(judge(&mut filter, OUT, 0, &net.tcp(OUT, (40_000, 443), TCP_SYN, 100, 0)), None);
        let ended = filter.set_rules(vec![], vec![], 2, at(0));
        let notice = ended[0].notice().unwrap();
        let tcp = parsed(&notice).1.unwrap();
        assert_eq!((tcp.flags, tcp.ack), (TCP_RST | TCP_ACK, 101));
    }
}

#[test]
fn other_protocols_are_told_by_an_icmp_error_about_their_flow() {
    for net in families() {
        let mut filter = filter(vec![], vec![net.rule_out(1, 53)]);
        for bytes in [net.udp(OUT, (40_000, 53)), net.echo(OUT, true, 9)] {
            assert_eq!(judge(&mut filter, OUT, 0, &bytes), None);
            let ended = filter.set_rules(vec![], vec![], 2, at(0));
            let notice = ended[0].notice().unwrap();
            let (packet, _) = parsed(&notice);
            assert_eq!(packet.dst(), net.local);
            let original = parsed(&bytes).0;
            let quoted = packet.quoted().unwrap();
            assert_eq!((quoted.addrs, quoted.proto), (original.addrs, original.proto));
            assert_eq!(quoted.selector, original.selector());
            filter.set_rules(vec![], vec![net.rule_out(1, 53)], 3, at(0));
        }
    }
}

#[test]
fn rules_given_back_let_the_flow_begin_anew() {
    for net in families() {
        let rules = vec![net.rule_out(1, 53)];
        let mut filter = filter(vec![], rules.clone());
        let query = net.udp(OUT, (40_000, 53));
        assert_eq!(judge(&mut filter, OUT, 0, &query), None);
        filter.set_rules(vec![], vec![], 2, at(1));
        assert_eq!(judge(&mut filter, OUT, 1, &query), Some(DropReason::FlowEnded));
        filter.set_rules(vec![], rules, 3, at(2));
        let answer = net.udp(IN, (40_000, 53));
        assert_eq!(judge(&mut filter, IN, 2, &answer), Some(DropReason::FlowEnded));
        assert_eq!(judge(&mut filter, OUT, 2, &query), None);
        assert_eq!(judge(&mut filter, IN, 2, &answer), None);
    }
}

#[test]
fn a_new_deny_rule_ends_flows() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(1, 22)], vec![]);
        assert_eq!(judge(&mut filter, IN, 0, &net.udp(IN, (22, 5))), None);
        let deny = FilterRule { action: Action::Deny, ..net.rule_in(9, 22) };
        let ended = filter.set_rules(vec![net.rule_in(1, 22), deny], vec![], 2, at(0));
        assert_eq!(ended.len(), 1);
        let other = net.udp(IN, (22, 6));
        assert_eq!(judge(&mut filter, IN, 0, &other), Some(DropReason::DeniedByRule(RuleId(9))));
    }
}

#[test]
fn a_window_that_closes_ends_flows_with_the_next_packet_or_timeout() {
    for net in families() {
        let window = UnixInterval { from: START + 10, until: START + 20 };
        let rule = FilterRule { active: Some(vec![window]), ..net.rule_out(1, 53) };
        let packet = net.udp(OUT, (40_000, 53));
        for by_timeout in [false, true] {
            let mut filter = filter(vec![], vec![rule.clone()]);
            assert_eq!(filter.next_change(at(0)), Some(START + 10));
            assert_eq!(filter.poll_timeout(at(0)), Some(at(10).boot));
            assert_eq!(judge(&mut filter, OUT, 9, &packet), Some(DropReason::NoRule));
            assert_eq!(judge(&mut filter, OUT, 10, &packet), None);
            assert_eq!(filter.next_change(at(10)), Some(START + 20));
            assert_eq!(judge(&mut filter, OUT, 19, &packet), None);
            if !by_timeout {
                let answer = net.udp(IN, (40_000, 53));
                assert_eq!(judge(&mut filter, IN, 20, &answer), Some(DropReason::FlowEnded));
                assert_eq!(filter.poll_timeout(at(20)), Some(at(20).boot));
            }
            let ended = filter.handle_timeout(at(20));
            assert_eq!(ended.len(), 1);
            assert_eq!(ended[0].reason, EndReason::WindowClosed);
            assert_eq!(filter.next_change(at(20)), None);
            // A wall clock set back re-opens the window, no more and no less.
            assert_eq!(judge(&mut filter, OUT, 15, &packet), None);
        }
    }
}

#[test]
fn the_end_of_the_lease_closes_everything() {
    for net in families() {
        let ports = (40_000, 443);
        let mut filter = filter(vec![net.rule_in(2, 22)], vec![net.rule_out(1, 443)]);
        connect(&mut filter, &net, ports, 0);
        let ended = filter.close_all(EndReason::LeaseEnded, at(5));
        assert_eq!((ended.len(), ended[0].reason), (1, EndReason::LeaseEnded));
        let over = Some(DropReason::LeaseEnded);
        assert_eq!(judge(&mut filter, IN, 5, &net.tcp(IN, ports, TCP_ACK, 501, 101)), over);
        assert_eq!(judge(&mut filter, IN, 5, &net.tcp(IN, (22, 5), TCP_SYN, 1, 0)), over);
        assert_eq!(filter.poll_output(), None);
        assert_eq!(judge(&mut filter, OUT, 5, &net.tcp(OUT, (9, 9), TCP_ACK, 1, 1)), over);
        assert_eq!(filter.poll_output(), None);
        for (ports, flags) in [(ports, TCP_ACK), ((9, 443), TCP_SYN)] {
            assert_eq!(judge(&mut filter, OUT, 5, &net.tcp(OUT, ports, flags, 101, 501)), over);
            assert!(matches!(filter.poll_output(), Some(Output::Local(_))));
        }
        let why = filter.why(at(5), None, net.remote, PROTO_TCP, 443);
        assert_eq!((why.egress.outcome, why.closed), (Outcome::Closed, Some(EndReason::LeaseEnded)));
        filter.set_rules(vec![], vec![net.rule_out(1, 443)], 2, at(6));
        connect(&mut filter, &net, ports, 6);
    }
}

#[test]
fn a_removed_peer_takes_its_flows_along() {
    for net in families() {
        let mut filter = filter(vec![], vec![net.rule_out(1, 53)]);
        assert_eq!(judge(&mut filter, OUT, 0, &net.udp(OUT, (5, 53))), None);
        assert_eq!(filter.egress(at(0), &net.udp(OUT, (6, 53)), PEER + 1), Verdict::Pass);
        let ended = filter.remove_peer(PEER, at(0));
        assert_eq!((ended.len(), ended[0].reason), (1, EndReason::PeerRemoved));
        assert_eq!(filter.ingress(at(0), &net.udp(IN, (6, 53)), PEER + 1), Verdict::Pass);
        assert!(judge(&mut filter, IN, 0, &net.udp(IN, (5, 53))).is_some());
    }
}

#[test]
fn ended_flows_that_nobody_takes_are_bounded() {
    let net = families()[0];
    let windows = vec![
        UnixInterval { from: START, until: START + 10 },
        UnixInterval { from: START + 20, until: START + 30 },
    ];
    let rule = FilterRule { active: Some(windows), ..net.rule_out(1, 53) };
    let mut filter = filter(vec![], vec![rule]);
    let packets: Vec<Vec<u8>> = (0..=u16::MAX).map(|port| net.udp(OUT, (port, 53))).collect();
    for open in [0, 20] {
        for (number, packet) in packets.iter().enumerate() {
            // Two peers, since one may not have the whole table.
            assert_eq!(filter.egress(at(open), packet, number as u32 % 2), Verdict::Pass);
        }
        assert!(judge(&mut filter, OUT, open + 10, &packets[0]).is_some());
    }
    assert_eq!(filter.handle_timeout(at(30)).len(), MAX_ENDED);
}
