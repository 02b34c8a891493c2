//! Later fragments pass only with their first.

use super::*;
use crate::filter::fragments::{FRAGMENT_TIMEOUT, MAX_FRAGMENTED, MAX_FRAGMENTING_PEERS};
use crate::packet::Fragment;

/// A fragment of a datagram, cut at bytes of its payload.
fn cut(whole: &[u8], id: u16, offset: usize, end: usize, last: bool) -> Vec<u8> {
    let header = if whole[0] >> 4 == 4 { 20 } else { 40 };
    let mut fragment = whole[..header].to_vec();
    let field = offset as u16 | u16::from(!last);
    if header == 20 {
        let len = (20 + end - offset) as u16;
        fragment[2..4].copy_from_slice(&len.to_be_bytes());
        fragment[4..6].copy_from_slice(&id.to_be_bytes());
        let field = (offset / 8) as u16 | if last { 0 } else { 0x2000 };
        fragment[6..8].copy_from_slice(&field.to_be_bytes());
    } else {
        let len = (8 + end - offset) as u16;
        fragment[4..6].copy_from_slice(&len.to_be_bytes());
        let next = std::mem::replace(&mut fragment[6], 44);
        fragment.extend([next, 0]);
        fragment.extend(field.to_be_bytes());
        fragment.extend(u32::from(id).to_be_bytes());
    }
    fragment.extend_from_slice(&whole[header + offset..header + end]);
    fragment
}

/// A UDP datagram with 80 bytes behind the IP header.
fn datagram(net: &Net, direction: Direction, ports: (u16, u16)) -> Vec<u8> {
    let mut whole = net.udp(direction, ports);
    let header = whole.len() - 8;
    whole[header + 5] = 80;
    whole.extend([0; 72]);
    whole
}

#[test]
fn later_fragments_pass_with_their_first_only() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(1, 53)], vec![]);
        let whole = datagram(&net, IN, (53, 9));
        let first = cut(&whole, 5, 0, 40, false);
        let last = cut(&whole, 5, 40, 80, true);
        let refused = Some(DropReason::NotFirstFragment);
        assert_eq!(judge(&mut filter, IN, 0, &last), refused);
        assert_eq!(judge(&mut filter, IN, 0, &first), None);
        assert_eq!(judge(&mut filter, IN, 0, &last), None);
        // Another identification, another peer, the other direction.
        assert_eq!(judge(&mut filter, IN, 0, &cut(&whole, 6, 40, 80, true)), refused);
        assert_eq!(filter.ingress(at(0), &last, PEER + 1), Verdict::Drop(DropReason::NotFirstFragment));
        let outwards = datagram(&net, OUT, (53, 9));
        assert_eq!(judge(&mut filter, OUT, 0, &cut(&outwards, 5, 40, 80, true)), refused);
        // One that would rewrite what was judged.
        assert_eq!(judge(&mut filter, IN, 0, &cut(&whole, 5, 8, 48, false)), refused);
        let late = FRAGMENT_TIMEOUT.as_secs();
        assert_eq!(judge(&mut filter, IN, late - 1, &last), None);
        assert_eq!(judge(&mut filter, IN, late, &last), refused);
    }
}

#[test]
fn fragments_end_with_their_flow() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(1, 53)], vec![]);
        let whole = datagram(&net, IN, (53, 9));
        assert_eq!(judge(&mut filter, IN, 0, &cut(&whole, 5, 0, 40, false)), None);
        filter.set_rules(vec![], vec![], 2, at(0));
        let last = cut(&whole, 5, 40, 80, true);
        assert_eq!(judge(&mut filter, IN, 0, &last), Some(DropReason::FlowEnded));
    }
}

#[test]
fn a_refused_first_fragment_lets_nothing_follow() {
    for net in families() {
        let mut filter = filter(vec![], vec![]);
        let whole = datagram(&net, IN, (53, 9));
        assert_eq!(judge(&mut filter, IN, 0, &cut(&whole, 5, 0, 40, false)), Some(DropReason::NoRule));
        let last = cut(&whole, 5, 40, 80, true);
        assert_eq!(judge(&mut filter, IN, 0, &last), Some(DropReason::NotFirstFragment));
    }
}

#[test]
fn datagrams_in_fragments_are_bounded_per_peer_and_by_peers() {
    let net = families()[0];
    let whole = datagram(&net, IN, (53, 9));
    let key = |bytes: &[u8]| {
        let packet = Packet::parse(bytes).unwrap();
        FlowKey::new(IN, packet.addrs, packet.proto, packet.selector())
    };
    let mut fragments = Fragments::default();
    let remember = |fragments: &mut Fragments, peer: u32, id: u16, now: Instant| {
        let bytes = cut(&whole, id, 0, 40, false);
        let packet = Packet::parse(&bytes).unwrap();
        fragments.remember(IN, peer, &packet, packet.fragment.unwrap(), key(&bytes), now);
    };
    let knows = |fragments: &Fragments, peer: u32, id: u16, now: Instant| {
        let bytes = cut(&whole, id, 40, 80, true);
        let packet = Packet::parse(&bytes).unwrap();
        let fragment: Fragment = packet.fragment.unwrap();
        fragments.find(IN, peer, &packet, fragment, now).is_some()
    };
    let start = at(0).boot;
    for id in 0..=MAX_FRAGMENTED as u16 {
        remember(&mut fragments, 1, id, start);
    }
    assert!(!knows(&fragments, 1, 0, start), "the oldest made room");
    assert!((1..=MAX_FRAGMENTED as u16).all(|id| knows(&fragments, 1, id, start)));
    // A peer that fragments as much as it likes takes nothing from another.
    remember(&mut fragments, 2, 0, start);
    for id in 0..1_000 {
        remember(&mut fragments, 1, id, start);
    }
    assert!(knows(&fragments, 2, 0, start));
    for peer in 3..3 + MAX_FRAGMENTING_PEERS as u32 {
        remember(&mut fragments, peer, 0, start + Duration::from_secs(1));
    }
    assert_eq!(fragments.len(), MAX_FRAGMENTING_PEERS);
    assert!(!knows(&fragments, 1, 999, start), "the longest idle made room");
}
