use proptest::prelude::*;

use super::build::{MAX_ICMP_ERROR, Segment, checksum, prohibited, stub, transport_checksum};
use super::*;

const V4: Addrs = Addrs::V4 { src: Ipv4Addr::new(100, 64, 0, 1), dst: Ipv4Addr::new(100, 64, 0, 2) };
const V6: Addrs = Addrs::V6 {
    src: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
    dst: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
};

fn syn(addrs: Addrs) -> Vec<u8> {
    Segment { addrs, src_port: 40_000, dst_port: 443, seq: 7, ack: None, flags: TCP_SYN }.to_bytes()
}

/// An IPv6 packet with a chain of extension headers given as (number, bytes behind the first two).
fn chained(chain: &[(u8, &[u8])], proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for (at, (_, rest)) in chain.iter().enumerate() {
        let next = chain.get(at + 1).map_or(proto, |(number, _)| *number);
        body.extend([next, ((rest.len() + 2) / 8 - 1) as u8]);
        body.extend_from_slice(rest);
    }
    body.extend_from_slice(payload);
    let mut packet = stub(V6, chain.first().map_or(proto, |(number, _)| *number), Selector::None);
    packet.truncate(40);
    packet[4..6].copy_from_slice(&(body.len() as u16).to_be_bytes());
    packet.extend(body);
    packet
}

/// The packet's payload cut into a fragment.
fn fragment_v4(packet: &[u8], offset: usize, len: usize, more: bool) -> Vec<u8> {
    let mut fragment = packet[..20].to_vec();
    fragment.extend_from_slice(&packet[20 + offset..20 + offset + len]);
    let total = fragment.len() as u16;
    fragment[2..4].copy_from_slice(&total.to_be_bytes());
    let field = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
    fragment[6..8].copy_from_slice(&field.to_be_bytes());
    fragment
}

#[test]
fn reads_tcp_in_both_families() {
    for addrs in [V4, V6] {
        let bytes = syn(addrs);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.addrs, addrs);
        assert_eq!(packet.proto, PROTO_TCP);
        assert_eq!((packet.src_port(), packet.dst_port()), (40_000, 443));
        let Transport::Tcp(tcp) = packet.transport else { panic!("{packet:?}") };
        assert!(tcp.opens());
        assert_eq!((tcp.seq, tcp.end(), tcp.payload_len), (7, 8, 0));
        assert_eq!(packet.fragment, None);
    }
}

#[test]
fn leaves_padding_out_and_refuses_missing_bytes() {
    for addrs in [V4, V6] {
        let bytes = syn(addrs);
        let mut padded = bytes.clone();
        padded.extend([0; 12]);
        let packet = Packet::parse(&padded).unwrap();
        assert_eq!(packet.bytes, bytes);
        for len in 0..bytes.len() {
            assert!(Packet::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
    assert_eq!(Packet::parse(&[]), Err(ParseError::NotIp));
    assert_eq!(Packet::parse(&[0x50; 40]), Err(ParseError::NotIp));
}

#[test]
fn refuses_source_routing_in_both_families() {
    let mut v4 = syn(V4);
    v4[0] = 0x47;
    v4.splice(20..20, [1, 131, 7, 4, 10, 0, 0, 1]);
    let total = v4.len() as u16;
    v4[2..4].copy_from_slice(&total.to_be_bytes());
    assert_eq!(Packet::parse(&v4), Err(ParseError::SourceRoute));
    v4[21] = 68; // a timestamp option is harmless
    assert!(Packet::parse(&v4).is_ok());
    v4[22] = 1;
    assert_eq!(Packet::parse(&v4), Err(ParseError::Options));

    let v6 = chained(&[(ROUTING, &[0, 0, 0, 0, 0, 0])], PROTO_TCP, &syn(V6)[40..]);
    assert_eq!(Packet::parse(&v6), Err(ParseError::SourceRoute));
}

#[test]
fn walks_extension_headers_up_to_the_bound() {
    let tcp = &syn(V6)[40..];
    let option: (u8, &[u8]) = (DESTINATION_OPTIONS, &[1, 4, 0, 0, 0, 0]);
    let hop: (u8, &[u8]) = (HOP_BY_HOP, &[1, 4, 0, 0, 0, 0]);
    let mut chain = vec![hop];
    chain.resize(MAX_EXTENSION_HEADERS, option);
    let bytes = chained(&chain, PROTO_TCP, tcp);
    assert_eq!(Packet::parse(&bytes).unwrap().dst_port(), 443);
    chain.push(option);
    let bytes = chained(&chain, PROTO_TCP, tcp);
    assert_eq!(Packet::parse(&bytes), Err(ParseError::ExtensionHeaders));
    let bytes = chained(&[option, hop], PROTO_TCP, tcp);
    assert_eq!(Packet::parse(&bytes), Err(ParseError::ExtensionHeaders));
    // One that claims to go on behind the packet.
    let mut bytes = chained(&[option], PROTO_TCP, tcp);
    bytes[41] = 200;
    assert!(Packet::parse(&bytes).is_err());
}

#[test]
fn tells_fragments_apart() {
    let whole = stub(V4, PROTO_UDP, Selector::Ports { src: 1, dst: 2 });
    let mut whole = [whole, vec![0; 72]].concat();
    whole[25] = 80;
    whole[4..6].copy_from_slice(&[0xab, 0xcd]);
    let first = fragment_v4(&whole, 0, 40, true);
    let packet = Packet::parse(&first).unwrap();
    assert_eq!(packet.fragment, Some(Fragment { id: 0xabcd, offset: 0, end: 40, more: true }));
    assert_eq!(packet.dst_port(), 2);
    let later = fragment_v4(&whole, 40, 40, false);
    let packet = Packet::parse(&later).unwrap();
    assert_eq!(packet.transport, Transport::LaterFragment);
    assert_eq!((packet.fragment.unwrap().offset, packet.dst_port()), (40, 0));
    let odd = fragment_v4(&whole, 0, 41, true);
    assert_eq!(Packet::parse(&odd), Err(ParseError::FragmentBounds));

    let field = |offset: u16, more: u16| {
        let field = (offset | more).to_be_bytes();
        [field[0], field[1], 1, 2, 3, 4]
    };
    let first = chained(&[(FRAGMENT, &field(0, 1))], PROTO_UDP, &whole[20..60]);
    let packet = Packet::parse(&first).unwrap();
    assert_eq!(packet.fragment.unwrap().id, 0x0102_0304);
    assert_eq!(packet.dst_port(), 2);
    let later = chained(&[(FRAGMENT, &field(40, 0))], PROTO_UDP, &whole[60..]);
    let packet = Packet::parse(&later).unwrap();
    assert_eq!(packet.transport, Transport::LaterFragment);
    // RFC 6946: an atomic fragment is a whole packet.
    let atomic = chained(&[(FRAGMENT, &field(0, 0))], PROTO_UDP, &whole[20..]);
    assert_eq!(Packet::parse(&atomic).unwrap().fragment, None);
}

#[test]
fn refuses_tiny_first_fragments() {
    let mut whole = syn(V4);
    whole.extend([0; 16]);
    assert_eq!(Packet::parse(&fragment_v4(&whole, 0, 16, true)), Err(ParseError::TinyFragment));
    let tiny = chained(&[(FRAGMENT, &[0, 1, 0, 0, 0, 1])], PROTO_TCP, &whole[20..36]);
    assert_eq!(Packet::parse(&tiny), Err(ParseError::TinyFragment));
}

#[test]
fn refuses_contradicting_tcp_flags() {
    for flags in [0, TCP_SYN | TCP_FIN, TCP_SYN | TCP_RST] {
        let mut bytes = syn(V4);
        bytes[33] = flags;
        assert_eq!(Packet::parse(&bytes), Err(ParseError::TcpFlags));
    }
    let mut bytes = syn(V4);
    bytes[32] = 4 << 4;
    assert_eq!(Packet::parse(&bytes), Err(ParseError::HeaderLength));
}

#[test]
fn made_packets_have_right_checksums() {
    for addrs in [V4, V6] {
        let error = prohibited(addrs.reversed(), &syn(addrs));
        for bytes in [syn(addrs), error] {
            let packet = Packet::parse(&bytes).unwrap();
            assert_eq!(packet.bytes.len(), bytes.len());
            let transport = &bytes[packet.transport_at..];
            // A sum over data with its checksum in place is zero.
            if packet.proto == PROTO_ICMP {
                assert_eq!(checksum(&[transport]), 0);
            } else {
                assert_eq!(transport_checksum(packet.addrs, packet.proto, transport), 0);
            }
            if let Addrs::V4 { .. } = packet.addrs {
                assert_eq!(checksum(&[&bytes[..20]]), 0);
            }
        }
    }
    // The example of RFC 1071, section 3.
    assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
    assert_eq!(checksum(&[&[0xff]]), !0xff00);
}

#[test]
fn icmp_errors_quote_what_they_are_about() {
    for addrs in [V4, V6] {
        let selectors = [
            (PROTO_UDP, Selector::Ports { src: 5, dst: 53 }),
            (PROTO_TCP, Selector::Ports { src: 5, dst: 53 }),
            (
                match addrs {
                    Addrs::V4 { .. } => PROTO_ICMP,
                    Addrs::V6 { .. } => PROTO_ICMPV6,
                },
                Selector::Echo { request: true, id: 77 },
            ),
            (47, Selector::None),
        ];
        for (proto, selector) in selectors {
            let bytes = prohibited(addrs.reversed(), &stub(addrs, proto, selector));
            let packet = Packet::parse(&bytes).unwrap();
            assert!(matches!(packet.transport, Transport::IcmpError { .. }));
            let quoted = Quoted { addrs, proto, selector };
            assert_eq!(packet.quoted(), Some(quoted));
        }
        let nested = prohibited(addrs, &prohibited(addrs, &syn(addrs)));
        assert_eq!(Packet::parse(&nested).unwrap().quoted(), None);
        let short = prohibited(addrs, &syn(addrs)[..24]);
        assert_eq!(Packet::parse(&short).unwrap().quoted(), None);
        let long = prohibited(addrs, &vec![0x45; 2_000]);
        assert_eq!(long.len(), MAX_ICMP_ERROR);
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(packet) = Packet::parse(&bytes) {
            let _ = packet.quoted();
        }
    }

    /// Real packets with some bytes changed reach deeper than noise.
    #[test]
    fn damaged_packets_never_panic(
        which in 0usize..6,
        damage in prop::collection::vec((0usize..120, any::<u8>()), 0..6),
        cut in 0usize..120,
    ) {
        let addrs = if which % 2 == 0 { V4 } else { V6 };
        let mut bytes = match which / 2 {
            0 => syn(addrs),
            1 => prohibited(addrs, &syn(addrs)),
            _ => chained(
                &[(HOP_BY_HOP, &[0; 6]), (FRAGMENT, &[0, 1, 0, 0, 0, 9]), (DESTINATION_OPTIONS, &[0; 14])],
                PROTO_TCP,
                &syn(V6)[40..],
            ),
        };
        for (at, value) in damage {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut / 2));
        if let Ok(packet) = Packet::parse(&bytes) {
            let _ = packet.quoted();
            prop_assert!(packet.bytes.len() <= bytes.len());
        }
    }
}
