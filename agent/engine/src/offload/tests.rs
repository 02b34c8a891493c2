use std::net::IpAddr;

use proptest::prelude::*;
use warren_common::filter::{PROTO_TCP, PROTO_UDP};

use super::coalesce::{Class, classify};
use super::segment::{BadFrame, MAX_SEGMENTS, SuperFrame, complete_checksum};
use super::vnet::{Gso, GsoKind, HEADER_LEN, Header, PartialChecksum};
use super::{Ecn, checksum};
use crate::io::{Added, TunOffload, TunOut};
use crate::packet::{Addrs, Packet, TCP_ACK, TCP_PSH, build};

mod tiny;

/// What a flow's packets have in common, and what tells one from the next.
#[derive(Clone, Debug)]
struct Shape {
    ipv6: bool,
    tcp: bool,
    flow: u8,
    tos: u8,
    ttl: u8,
    dont_fragment: bool,
    id: u16,
    seq: u32,
    ack: u32,
    window: u16,
    options: usize,
    flags: u8,
    payload: Vec<u8>,
}

fn addrs(ipv6: bool, flow: u8) -> Addrs {
    let [src, dst]: [IpAddr; 2] = if ipv6 {
        ["fd00::1".parse().unwrap(), IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, flow & 1])]
    } else {
        [[10, 99, 0, 1].into(), [10, 99, 0, 2 + (flow & 1)].into()]
    };
    Addrs::new(src, dst).unwrap()
}

impl Shape {
    /// A whole packet with right checksums.
    fn packet(&self) -> Vec<u8> {
        let addrs = addrs(self.ipv6, self.flow);
        let mut transport = Vec::new();
        transport.extend((4_000 + u16::from(self.flow)).to_be_bytes());
        transport.extend(80u16.to_be_bytes());
        let (proto, place) = if self.tcp {
            transport.extend(self.seq.to_be_bytes());
            transport.extend(self.ack.to_be_bytes());
            transport.extend([((5 + self.options) << 4) as u8, self.flags]);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend((0..self.options * 4).map(|i| i as u8));
            (PROTO_TCP, 16)
        } else {
            transport.extend((8 + self.payload.len() as u16).to_be_bytes());
            transport.extend([0; 2]);
            (PROTO_UDP, 6)
        };
        transport.extend(&self.payload);
        let sum = match build::transport_checksum(addrs, proto, &transport) {
            0 if !self.tcp => 0xffff,
            sum => sum,
        };
        transport[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        let mut packet = match addrs {
            Addrs::V4 { src, dst } => {
                let mut ip = vec![0x45, self.tos, 0, 0, 0, 0, 0, 0, self.ttl, proto, 0, 0];
                ip[2..4].copy_from_slice(&(20 + transport.len() as u16).to_be_bytes());
                ip[4..6].copy_from_slice(&self.id.to_be_bytes());
                ip[6] = if self.dont_fragment { 0x40 } else { 0 };
                ip.extend(src.octets());
                ip.extend(dst.octets());
                let sum = build::checksum(&[&ip]);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                ip
            }
            Addrs::V6 { src, dst } => {
                let mut ip = vec![0x60 | self.tos >> 4, self.tos << 4, 0, self.flow];
                ip.extend((transport.len() as u16).to_be_bytes());
                ip.extend([proto, self.ttl]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                ip
            }
        };
        packet.extend(transport);
        packet
    }

    /// The packet that would follow it in a stream.
    fn next(&self, payload: Vec<u8>) -> Self {
        Self {
            id: self.id.wrapping_add(1),
            seq: self.seq.wrapping_add(self.payload.len() as u32),
            payload,
            ..self.clone()
        }
    }

    /// What the kernel makes of it: a super-frame of segments of `size`, whose checksum holds the sum of the pseudo-header.
    fn frame(&self, size: usize) -> (Header, Vec<u8>) {
        let mut packet = self.packet();
        let at = if self.ipv6 { 40 } else { 20 };
        let (proto, offset) = if self.tcp { (PROTO_TCP, 16) } else { (PROTO_UDP, 6) };
        let pseudo = checksum::pseudo(&addrs(self.ipv6, self.flow), proto, packet.len() - at).folded();
        packet[at + offset..][..2].copy_from_slice(&pseudo);
        let kind = match (self.tcp, self.ipv6) {
            (true, false) => GsoKind::Tcp4,
            (true, true) => GsoKind::Tcp6,
            (false, _) => GsoKind::Udp,
        };
        let header = Header {
            checksum: Some(PartialChecksum { start: at as u16, offset: offset as u16 }),
            gso: Some(Gso { kind, size: size as u16 }),
            header_len: self.headers() as u16,
        };
        (header, packet)
    }

    /// The oracle of what such a frame is cut into: packets made one by one.
    fn packets(&self, size: usize) -> Vec<Vec<u8>> {
        let mut parts = self.payload.chunks(size).peekable();
        let mut shape = Self { payload: Vec::new(), id: self.id.wrapping_sub(1), ..self.clone() };
        std::iter::from_fn(|| {
            shape = shape.next(parts.next()?.to_vec());
            shape.flags = if parts.peek().is_none() { self.flags } else { TCP_ACK };
            Some(shape.packet())
        })
        .collect()
    }

    fn headers(&self) -> usize {
        (if self.ipv6 { 40 } else { 20 }) + if self.tcp { 20 + self.options * 4 } else { 8 }
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let common = (any::<bool>(), any::<bool>(), 0u8..4, any::<u8>(), 1u8.., any::<bool>(), any::<u16>());
    let tcp = (any::<u32>(), any::<u32>(), any::<u16>(), 0usize..4);
    (common, tcp, payload(1..1_400)).prop_map(
        |((ipv6, tcp, flow, tos, ttl, dont_fragment, id), (seq, ack, window, options), payload)| Shape {
            ipv6,
            tcp,
            flow,
            tos,
            ttl,
            dont_fragment,
            id,
            seq,
            ack,
            window,
            options,
            flags: TCP_ACK,
            payload,
        },
    )
}

fn payload(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    (any::<u64>(), len).prop_map(|(seed, len)| {
        let mut state = seed | 1;
        let next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    })
}

/// Cuts a super-frame of the kernel's making into packets.
fn cut(header: &Header, packet: &[u8]) -> Vec<Vec<u8>> {
    let frame = SuperFrame::new(header.gso.unwrap(), header.checksum, packet).unwrap();
    let packets: Vec<Vec<u8>> = (0..frame.segments())
        .map(|index| {
            let mut out = vec![0xee; frame.segment_len(index)];
            assert_eq!(frame.write(index, &mut out), out.len());
            out
        })
        .collect();
    assert_eq!(frame.total_len(), packets.iter().map(Vec::len).sum::<usize>());
    packets
}

/// What the kernel sees of everything written to it: frames cut again, single packets as they are.
fn written(tun: &TunOut) -> Vec<Vec<u8>> {
    tun.frames()
        .flat_map(|pieces| {
            let bytes: Vec<u8> = pieces.flatten().copied().collect();
            let header = Header::read(&bytes).unwrap();
            let packet = &bytes[HEADER_LEN..];
            if header.gso.is_some() { cut(&header, packet) } else { vec![packet.to_vec()] }
        })
        .collect()
}

fn frames(tun: &TunOut) -> usize {
    tun.frames().count()
}

fn vectored() -> TunOut {
    TunOut::vectored(TunOffload { tcp: true, udp: true })
}

fn join(packets: &[Vec<u8>]) -> TunOut {
    let mut tun = vectored();
    for packet in packets {
        assert_ne!(tun.add(1, packet), Added::Full);
    }
    tun.settle(|_, _, _| true);
    tun
}

/// The same with identifications forgotten where they mean nothing (RFC 6864), as a constant one counts up again.
fn without_free_ids(packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    packets
        .into_iter()
        .map(|mut packet| {
            if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
                packet[4..6].fill(0);
                packet[10..12].fill(0);
            }
            packet
        })
        .collect()
}

/// Packets by flow, each flow's in order.
fn by_flow(packets: &[Vec<u8>]) -> std::collections::BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows = std::collections::BTreeMap::<Vec<u8>, Vec<Vec<u8>>>::new();
    for packet in packets {
        let key = match Packet::parse(packet) {
            // Fragments are kept in order with everything of their addresses by a test of its own.
            Ok(parsed) => format!("{:?} {} {:?}", parsed.addrs, parsed.proto, parsed.selector()).into_bytes(),
            Err(_) => b"unknown".to_vec(),
        };
        flows.entry(key).or_default().push(packet.clone());
    }
    flows
}

/// One step of mixed traffic.
#[derive(Clone, Debug)]
enum Step {
    /// The next packet of a flow, with this payload.
    Next(usize, Vec<u8>),
    /// A packet of the flow that differs in one thing.
    Odd(usize, u8, Vec<u8>),
    /// Something that is never joined.
    Other(usize, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let full = any::<u64>().prop_map(|seed| seed.to_le_bytes().repeat(125));
    prop_oneof![
        8 => (0usize..4, full).prop_map(|(flow, payload)| Step::Next(flow, payload)),
        2 => (0usize..4, payload(1..1_001)).prop_map(|(flow, payload)| Step::Next(flow, payload)),
        2 => (0usize..4, 0u8..9, payload(1..1_001)).prop_map(|(flow, what, p)| Step::Odd(flow, what, p)),
        1 => (0usize..4, 0u8..5).prop_map(|(flow, what)| Step::Other(flow, what)),
    ]
}

fn traffic(flows: Vec<Shape>, steps: Vec<Step>) -> Vec<Vec<u8>> {
    let mut flows = flows;
    steps
        .into_iter()
        .map(|step| match step {
            Step::Next(flow, payload) => {
                flows[flow] = flows[flow].next(payload);
                flows[flow].packet()
            }
            Step::Odd(flow, what, payload) => {
                let shape = &mut flows[flow];
                *shape = shape.next(payload);
                match what {
                    0 => shape.seq = shape.seq.wrapping_add(1_000),
                    1 => shape.ack = shape.ack.wrapping_add(1),
                    2 => shape.window ^= 1,
                    3 => shape.ttl = shape.ttl.wrapping_add(1),
                    4 => shape.tos ^= 3,
                    5 => shape.id = shape.id.wrapping_add(5),
                    6 => shape.options = (shape.options + 1) % 4,
                    7 => shape.flags ^= TCP_PSH,
                    _ => shape.dont_fragment ^= true,
                }
                shape.packet()
            }
            Step::Other(flow, what) => {
                let shape = &mut flows[flow];
                match what {
                    // A pure acknowledgement.
                    0 => Shape { payload: Vec::new(), tcp: true, ..shape.clone() }.packet(),
                    // The end of a connection.
                    1 => Shape { flags: TCP_ACK | 1, ..shape.clone() }.packet(),
                    // A fragment.
                    2 => {
                        let mut packet = Shape { ipv6: false, ..shape.clone() }.packet();
                        packet[6] = 0x20;
                        packet
                    }
                    // A damaged one.
                    3 => {
                        let mut packet = shape.packet();
                        let last = packet.len() - 1;
                        packet[last] ^= 1;
                        packet
                    }
                    _ => build::prohibited(addrs(shape.ipv6, shape.flow), &shape.packet()),
                }
            }
        })
        .collect()
}

proptest! {
    #[test]
    fn what_is_cut_is_joined_to_the_same_frame(
        shape in shape(),
        size in 1usize..1_400,
        count in 2usize..64,
        last in 0.0f64..1.0,
        pushed: bool,
    ) {
        let size = size.min(60_000 / count);
        let len = size * (count - 1) + ((size as f64 * last) as usize).max(1);
        let flags = if pushed && shape.tcp { TCP_ACK | TCP_PSH } else { TCP_ACK };
        let whole = Shape { payload: (0..len).map(|i| (i * 7 / 3) as u8).collect(), flags, ..shape };
        let (header, packet) = whole.frame(size);

        let packets = cut(&header, &packet);
        prop_assert_eq!(&packets, &whole.packets(size));

        let tun = join(&packets);
        prop_assert_eq!(frames(&tun), 1);
        let bytes: Vec<u8> = tun.frames().next().unwrap().flatten().copied().collect();
        prop_assert_eq!(Header::read(&bytes), Ok(header));
        prop_assert_eq!(&bytes[HEADER_LEN..], &packet[..]);
    }

    #[test]
    fn any_traffic_arrives_byte_for_byte_and_in_the_order_of_its_flow(
        flows in prop::collection::vec(shape(), 4),
        steps in prop::collection::vec(step(), 1..120),
        tcp: bool,
        udp: bool,
    ) {
        let flows = flows.into_iter().enumerate().map(|(n, s)| Shape { flow: n as u8, ..s }).collect();
        let packets = traffic(flows, steps);
        let mut tun = TunOut::vectored(TunOffload { tcp, udp });
        let mut bad = 0;
        for packet in &packets {
            match tun.add(1, packet) {
                Added::Yes => {}
                Added::BadChecksum => bad += 1,
                Added::Full => prop_assert!(false, "no room"),
            }
        }
        let (mut judged, mut judged_bytes) = (0, 0);
        tun.settle(|peer, first, burst| {
            assert_eq!(peer, 1);
            judged += burst.packets as usize;
            judged_bytes += burst.bytes;
            let payload = if burst.packets == 1 { 0 } else { burst.more_payload as usize };
            assert!(burst.bytes >= first.len() + payload);
            true
        });
        let sent_bytes: usize = packets.iter().map(Vec::len).sum();
        prop_assert_eq!((judged, judged_bytes), (packets.len(), sent_bytes));
        if tcp && udp {
            let damaged = packets.iter().filter(|p| classify(p) == Class::BadChecksum).count();
            prop_assert_eq!(bad, damaged);
        }
        let (sent, got) = (without_free_ids(packets), without_free_ids(written(&tun)));
        prop_assert_eq!(sent.len(), got.len());
        prop_assert_eq!(by_flow(&sent), by_flow(&got));
    }

    #[test]
    fn no_bytes_make_cutting_panic_or_write_outside(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        shape in shape(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        raw: [u8; HEADER_LEN],
        kind in 0u8..6,
        whole: bool,
    ) {
        let mut packet = if whole { shape.packet() } else { bytes };
        for (at, byte) in damage {
            if !packet.is_empty() {
                let at = at.index(packet.len());
                packet[at] = byte;
            }
        }
        let mut raw = raw;
        raw[1] = kind;
        let Ok(header) = Header::read(&raw) else { return Ok(()) };
        // An error is fine, a panic isn't.
        let _ = complete_checksum(&header, &mut packet.clone());
        let Some(gso) = header.gso else { return Ok(()) };
        if let Ok(frame) = SuperFrame::new(gso, header.checksum, &packet) {
            prop_assert!(frame.segments() <= MAX_SEGMENTS);
            let mut payload = 0;
            for index in 0..frame.segments() {
                let mut out = vec![0; frame.segment_len(index)];
                prop_assert_eq!(frame.write(index, &mut out), out.len());
                payload += out.len();
            }
            prop_assert_eq!(payload, frame.total_len());
        }
        let _ = classify(&packet);
        let mut tun = vectored();
        let _ = tun.add(0, &packet);
        tun.settle(|_, _, _| true);
    }

    #[test]
    fn a_checksum_that_is_left_to_us_is_completed(shape in shape()) {
        let right = shape.packet();
        let at = if shape.ipv6 { 40 } else { 20 };
        let (proto, offset) = if shape.tcp { (PROTO_TCP, 16) } else { (PROTO_UDP, 6) };
        let mut packet = right.clone();
        let pseudo = checksum::pseudo(&addrs(shape.ipv6, shape.flow), proto, packet.len() - at).folded();
        packet[at + offset..][..2].copy_from_slice(&pseudo);
        let checksum = Some(PartialChecksum { start: at as u16, offset: offset as u16 });
        complete_checksum(&Header { checksum, ..Header::default() }, &mut packet).unwrap();
        if right[at + offset..][..2] == [0, 0] {
            packet[at + offset..][..2].fill(0); // TCP's zero may also be written as 0xffff
        }
        prop_assert_eq!(packet, right);
    }
}

fn stream(count: usize, tcp: bool) -> Vec<Vec<u8>> {
    let first = Shape {
        ipv6: false,
        tcp,
        flow: 0,
        tos: 0,
        ttl: 64,
        dont_fragment: true,
        id: 7,
        seq: u32::MAX - 1_000,
        ack: 1,
        window: 500,
        options: 3,
        flags: TCP_ACK,
        payload: vec![1; 1_000],
    };
    let mut shapes = vec![first];
    while shapes.len() < count {
        let next = shapes[shapes.len() - 1].next(vec![shapes.len() as u8; 1_000]);
        shapes.push(next);
    }
    shapes.iter().map(Shape::packet).collect()
}

#[test]
fn a_damaged_segment_arrives_alone_and_the_rest_joined() {
    let mut packets = stream(9, true);
    let last = packets[4].len() - 1;
    packets[4][last] ^= 0x55;
    let mut tun = vectored();
    let added: Vec<Added> = packets.iter().map(|packet| tun.add(1, packet)).collect();
    assert_eq!(added.iter().filter(|a| **a == Added::BadChecksum).count(), 1);
    assert_eq!(added[4], Added::BadChecksum);
    tun.settle(|_, _, _| true);
    assert_eq!(frames(&tun), 3);
    assert_eq!(written(&tun), packets);
    let alone: Vec<u8> = tun.frames().nth(1).unwrap().flatten().copied().collect();
    assert_eq!(&alone[..HEADER_LEN], [0; HEADER_LEN], "the kernel is told to check it");
}

#[test]
fn flows_that_take_turns_are_joined_each_by_itself() {
    let a = stream(20, true);
    let b: Vec<_> = stream(20, false);
    let mixed: Vec<Vec<u8>> = a.iter().zip(&b).flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
    let tun = join(&mixed);
    assert_eq!(frames(&tun), 2);
    assert_eq!(written(&tun), [a, b].concat());
}

#[test]
fn frames_of_two_peers_are_never_joined() {
    let mut tun = vectored();
    for (n, packet) in stream(4, true).iter().enumerate() {
        assert_eq!(tun.add(n as u32 % 2, packet), Added::Yes);
    }
    tun.settle(|_, _, _| true);
    assert_eq!(frames(&tun), 4);
}

#[test]
fn what_is_refused_is_gone_as_a_whole_and_the_rest_stays() {
    let (a, b) = (stream(5, true), stream(5, false));
    let mut tun = vectored();
    a.iter().chain(&b).for_each(|packet| assert_eq!(tun.add(1, packet), Added::Yes));
    let mut seen = Vec::new();
    tun.settle(|_, first, burst| {
        seen.push((burst.packets, burst.bytes, burst.more_payload));
        first[9] == PROTO_UDP
    });
    let bytes = |packets: &[Vec<u8>]| packets.iter().map(Vec::len).sum::<usize>();
    assert_eq!(seen, [(5, bytes(&a), 4_000), (5, bytes(&b), 4_000)]);
    assert_eq!((tun.len(), tun.is_empty()), (1, false));
    assert_eq!(written(&tun), b);
}

#[test]
fn a_fragment_is_not_overtaken_by_its_addresses_other_packets() {
    let packets = stream(4, false);
    let mut fragment = packets[1].clone();
    fragment[6] = 0x20;
    let mixed = [packets[0].clone(), packets[1].clone(), fragment, packets[2].clone(), packets[3].clone()];
    let tun = join(&mixed);
    assert_eq!(frames(&tun), 3);
    assert_eq!(written(&tun), mixed);
}

#[test]
fn more_flows_than_can_be_open_are_no_loss() {
    let flow = |n: u8, packet: usize| {
        let mut packet = stream(2, false)[packet].clone();
        packet[15] = n; // another source address
        packet[10..12].fill(0);
        let sum = build::checksum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet[26..28].fill(0);
        let parsed = Packet::parse(&packet).unwrap();
        let sum = build::transport_checksum(parsed.addrs, PROTO_UDP, &packet[20..]);
        packet[26..28].copy_from_slice(&sum.to_be_bytes());
        packet
    };
    let packets: Vec<Vec<u8>> = (0..2).flat_map(|k| (0..20).map(move |n| flow(n, k))).collect();
    let tun = join(&packets);
    assert_eq!(by_flow(&written(&tun)), by_flow(&packets));
}

#[test]
fn an_impossible_frame_is_refused() {
    let mut packet = stream(1, true).remove(0);
    let gso = |kind, size| Gso { kind, size };
    let refused = |gso, packet: &[u8]| SuperFrame::new(gso, None, packet).unwrap_err();
    assert_eq!(refused(gso(GsoKind::Tcp4, 0), &packet), BadFrame::Segments);
    assert_eq!(refused(gso(GsoKind::Tcp6, 100), &packet), BadFrame::Headers);
    assert_eq!(refused(gso(GsoKind::Udp, 100), &packet), BadFrame::Headers);
    assert_eq!(refused(gso(GsoKind::Tcp4, 100), &packet[..packet.len() - 1]), BadFrame::Headers);
    let mut fragment = packet.clone();
    fragment[6] = 0x20;
    assert_eq!(refused(gso(GsoKind::Tcp4, 100), &fragment), BadFrame::Headers);
    let outside = PartialChecksum { start: 20, offset: packet.len() as u16 - 21 };
    let header = Header { checksum: Some(outside), ..Header::default() };
    assert_eq!(complete_checksum(&header, &mut packet), Err(BadFrame::Checksum));
}

fn shape_v4() -> Shape {
    Shape {
        ipv6: false,
        tcp: true,
        flow: 0,
        tos: 0,
        ttl: 64,
        dont_fragment: true,
        id: 0,
        seq: 0,
        ack: 0,
        window: 0,
        options: 0,
        flags: TCP_ACK,
        payload: Vec::new(),
    }
}

#[test]
fn congestion_marks_go_in_and_out_as_rfc_6040_has_it() {
    for (bits, out) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
        assert_eq!(Ecn::from_bits(bits).bits(), bits);
        assert_eq!(Ecn::from_bits(bits).outside().bits(), out);
    }
    for ipv6 in [false, true] {
        for (before, after) in [(0, 0), (1, 3), (2, 3), (3, 3)] {
            let shape = Shape { ipv6, tos: 0xb8 | before, payload: vec![9; 10], ..shape_v4() };
            let mut packet = shape.packet();
            assert_eq!(Ecn::of_packet(&packet).bits(), before);
            assert_eq!(Ecn::mark_congested(&mut packet), before > 0);
            assert_eq!(packet, Shape { tos: 0xb8 | after, ..shape }.packet());
        }
    }
    assert!(!Ecn::mark_congested(&mut []));
    assert!(!Ecn::mark_congested(&mut [0x45, 2]));
}
