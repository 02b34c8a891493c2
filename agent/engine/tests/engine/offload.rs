//! Super-frames through two engines: what goes in at one TUN comes out at the other, is judged, counted and marked.

use std::time::Duration;

use warren_engine::engine::SEND_AT;
use warren_engine::io::{Arrival, Outbox, Source, TunOffload, TunOut};
use warren_engine::offload::Ecn;
use warren_engine::offload::vnet::{HEADER_LEN, Header};
use warren_engine::queue::TunQueue;

use crate::net::{Behind, Net, overlay, super_frame, udp};

const BOTH: TunOffload = TunOffload { tcp: true, udp: true };

/// Two engines with a direct path and a session.
fn pair() -> Net {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    for _ in 0..10 {
        net.send(0, 1, b"hello");
        net.run(Duration::from_millis(100));
    }
    assert_eq!(net.path_kind(0, 1), "direct");
    net.nodes[1].got.clear();
    net
}

/// Sends a frame and receives all of it in one batch, as the far end's socket would bring it. Returns what is written
/// to the far TUN, frame by frame.
fn transfer(net: &mut Net, frames: &mut [Vec<u8>], offload: TunOffload, ecn: Option<Ecn>) -> Vec<Vec<u8>> {
    let mut out = Outbox::new();
    let now = net.now;
    for frame in frames {
        net.nodes[0].engine.handle_tun_frame(now, frame, false, &mut out);
    }
    let mut tun = TunOut::vectored(offload);
    let source = Source::Direct { socket: 0, remote: net.nodes[0].local };
    for (transmit, sealed) in out.iter() {
        let arrival = Arrival {
            stride: transmit.segment_size.unwrap_or(0),
            ecn: ecn.unwrap_or(transmit.ecn),
            tell: false,
        };
        let mut sealed = sealed.to_vec();
        net.nodes[1].engine.handle_datagrams(now, source, arrival, &mut sealed, &mut tun);
    }
    tun.frames().map(|pieces| pieces.flatten().copied().collect()).collect()
}

fn plain(packet: &[u8]) -> Vec<u8> {
    [&Header::default().to_bytes()[..], packet].concat()
}

#[test]
fn a_super_frame_crosses_the_tunnel_whole() {
    let mut net = pair();
    for tcp in [true, false] {
        let frame = super_frame(overlay(0), overlay(1), tcp, 40, 1_200);
        let got = transfer(&mut net, &mut [frame.clone()], BOTH, None);
        assert_eq!(got, [frame]);
    }
}

#[test]
fn a_tun_without_offloads_gets_packets() {
    let mut net = pair();
    let frame = super_frame(overlay(0), overlay(1), true, 40, 1_200);
    let got = transfer(&mut net, &mut [frame], TunOffload::default(), None);
    assert_eq!(got.len(), 40);
    assert!(got.iter().all(|frame| frame[..HEADER_LEN] == [0; HEADER_LEN] && frame.len() == 1_250));
}

#[test]
fn a_frame_is_judged_once_and_counted_as_its_packets() {
    let mut net = pair();
    let frame = super_frame(overlay(0), overlay(1), true, 40, 1_200);
    let sent = |net: &Net, n: usize| {
        let status = net.nodes[n].engine.status(net.now);
        (status.peers[0].tx_bytes, status.peers[0].rx_bytes)
    };
    let before = (sent(&net, 0).0, sent(&net, 1).1);
    assert_eq!(transfer(&mut net, &mut [frame], BOTH, None).len(), 1);
    let after = (sent(&net, 0).0, sent(&net, 1).1);
    assert_eq!((after.0 - before.0, after.1 - before.1), (40 * 1_240, 40 * 1_240));
}

#[test]
fn a_frame_that_the_receiver_does_not_grant_is_dropped_as_a_whole() {
    let mut net = pair();
    net.netmaps[1].ingress.clear();
    net.push_netmap(1);
    let before = net.drops(1, "ingress-no-flow")
        + net.drops(1, "ingress-flow-ended")
        + net.drops(1, "ingress-no-rule");
    let frame = super_frame(overlay(0), overlay(1), true, 40, 1_200);
    assert!(transfer(&mut net, &mut [frame], BOTH, None).is_empty());
    let after = net.drops(1, "ingress-no-flow")
        + net.drops(1, "ingress-flow-ended")
        + net.drops(1, "ingress-no-rule");
    assert_eq!(after - before, 40);
}

#[test]
fn a_frame_from_an_address_of_somebody_else_is_refused_at_both_ends() {
    let mut net = pair();
    let frame = super_frame(overlay(5), overlay(1), true, 10, 1_200);
    assert!(transfer(&mut net, &mut [frame], BOTH, None).is_empty());
    assert_eq!(net.drops(0, "egress-spoofed-source"), 10);
}

#[test]
fn segments_longer_than_the_mtu_are_dropped_and_counted() {
    let mut net = pair();
    let frame = super_frame(overlay(0), overlay(1), true, 10, 1_300);
    assert!(transfer(&mut net, &mut [frame], BOTH, None).is_empty());
    assert_eq!(net.drops(0, "longer-than-mtu"), 10);
}

#[test]
fn nonsense_from_the_tun_is_counted() {
    let mut net = pair();
    let mut frame = super_frame(overlay(0), overlay(1), true, 10, 1_200);
    frame[1] = 3; // a kind that was never asked for
    assert!(transfer(&mut net, &mut [frame, vec![0; 5], vec![0; HEADER_LEN]], BOTH, None).is_empty());
    assert_eq!(net.drops(0, "bad-super-frame"), 2);
    assert_eq!(net.drops(0, "egress-malformed"), 1);
}

#[test]
fn a_damaged_inner_packet_arrives_alone_and_is_counted() {
    let mut net = pair();
    let packet = |n: u8| {
        let mut packet = udp(overlay(0), overlay(1), 4_000, 5_000, &[n; 1_200]);
        packet[6] = 0x40; // mustn't be fragmented, so that its identification means nothing
        packet[10..12].fill(0);
        let sum = warren_engine::packet::build::checksum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    };
    let mut frames: Vec<Vec<u8>> = (0..9).map(|n| plain(&packet(n))).collect();
    let last = frames[4].len() - 1;
    frames[4][last] ^= 0x55;
    let got = transfer(&mut net, &mut frames.clone(), BOTH, None);
    assert_eq!(net.drops(1, "bad-inner-checksum"), 1);
    assert_eq!(got.len(), 3, "joined, alone, joined");
    assert_eq!(got[1], frames[4], "byte for byte, for the host to refuse");
}

#[test]
fn congestion_marks_are_copied_out_and_brought_in() {
    let mut net = pair();
    for (bits, outside) in
        [(0u8, Ecn::NotCapable), (1, Ecn::Capable1), (2, Ecn::Capable0), (3, Ecn::Capable0)]
    {
        let mut packet = udp(overlay(0), overlay(1), 4_000, 5_000, &[1; 100]);
        packet[1] = bits;
        let mut out = Outbox::new();
        let now = net.now;
        net.nodes[0].engine.handle_tun(now, &packet, &mut out);
        assert_eq!(out.iter().map(|(t, _)| t.ecn).collect::<Vec<_>>(), [outside]);
    }
    // A queue on the way marks the outer packets: capable inner ones are marked, others stay as they are.
    for (bits, after) in [(0u8, 0u8), (1, 3), (2, 3)] {
        let mut frame = super_frame(overlay(0), overlay(1), true, 5, 1_000);
        let ip = &mut frame[HEADER_LEN..];
        ip[1] = bits;
        ip[10..12].fill(0);
        let sum = warren_engine::packet::build::checksum(&[&ip[..20]]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let got = transfer(&mut net, &mut [frame], BOTH, Some(Ecn::Congested));
        assert_eq!(got.iter().map(|f| f[HEADER_LEN + 1] & 3).collect::<Vec<_>>(), [after]);
    }
}

#[test]
fn frames_wait_for_the_handshake_as_packets() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    let mut frame = super_frame(overlay(0), overlay(1), false, 5, 1_000);
    let mut out = Outbox::new();
    let now = net.now;
    net.nodes[0].engine.handle_tun_frame(now, &mut frame, false, &mut out);
    assert!(out.is_empty());
    net.drain(0);
    net.run(Duration::from_secs(2));
    assert_eq!(net.nodes[1].got.len(), 5);
}

#[test]
fn a_flow_that_makes_packets_wait_is_marked_or_loses_one() {
    let mut net = pair();
    let now = net.now;
    let (mut out, source) = (Outbox::new(), Source::Direct { socket: 0, remote: net.nodes[0].local });
    // On the way out: the first packet is lost, the rest go.
    let mut frame = super_frame(overlay(0), overlay(1), true, 10, 1_000);
    net.nodes[0].engine.handle_tun_frame(now, &mut frame.clone(), true, &mut out);
    assert_eq!((out.datagrams().count(), net.drops(0, "queue-delay")), (9, 1));
    // A sender that understands marks loses nothing.
    frame[HEADER_LEN + 1] = 2;
    out.clear();
    net.nodes[0].engine.handle_tun_frame(now, &mut frame.clone(), true, &mut out);
    assert_eq!((out.datagrams().count(), net.drops(0, "queue-delay")), (10, 1));
    // The same on the way in.
    let mut tun = TunOut::vectored(BOTH);
    for (bits, wanted, delayed) in [(0, 9, 1), (2, 10, 1)] {
        let mut packets = Vec::new();
        for n in 0..10u8 {
            let mut packet = udp(overlay(0), overlay(1), 4_000, 5_000, &[n; 1_000]);
            packet[1] = bits;
            packet[10..12].fill(0);
            let sum = warren_engine::packet::build::checksum(&[&packet[..20]]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packets.push(packet);
        }
        out.clear();
        packets.iter().for_each(|packet| net.nodes[0].engine.handle_tun(now, packet, &mut out));
        let mut got = 0;
        for (transmit, sealed) in out.iter() {
            let arrival =
                Arrival { stride: transmit.segment_size.unwrap_or(0), tell: true, ..Arrival::default() };
            let mut sealed = sealed.to_vec();
            tun.clear();
            net.nodes[1].engine.handle_datagrams(now, source, arrival, &mut sealed, &mut tun);
            let bytes: usize = tun.frames().flatten().map(<[u8]>::len).sum();
            got += (bytes - tun.len() * (HEADER_LEN + 28)) / 1_000;
        }
        assert_eq!((got, net.drops(1, "queue-delay")), (wanted, delayed), "bits {bits}");
    }
}

/// Frames of one flow through the queue, sealed and sent as the daemon does it, with a full batch kept before. Returns the
/// payloads that come out, end to end.
fn through_the_queue(net: &mut Net, frames: &[Vec<u8>]) -> Vec<u8> {
    let (now, mut out, mut queue) = (net.now, Outbox::new(), TunQueue::new([1, 2]));
    let source = Source::Direct { socket: 0, remote: net.nodes[0].local };
    for frame in frames {
        queue.space()[..frame.len()].copy_from_slice(frame);
        queue.commit(frame.len(), HEADER_LEN);
    }
    let (mut tun, mut got) = (TunOut::new(0), Vec::new());
    loop {
        let waited = queue.pop(now.boot);
        let more = waited.is_some();
        if let Some(waited) = waited {
            net.nodes[0].engine.handle_tun_frame(now, waited.frame, false, &mut out);
        }
        if more && out.bytes() < SEND_AT {
            continue;
        }
        let keep = more && out.is_last_open() && out.len() > 1;
        for (transmit, sealed) in out.iter().take(out.len() - usize::from(keep)) {
            let arrival = Arrival { stride: transmit.segment_size.unwrap_or(0), ..Arrival::default() };
            net.nodes[1].engine.handle_datagrams(now, source, arrival, &mut sealed.to_vec(), &mut tun);
            got.extend(tun.iter().flat_map(|packet| packet[40..].to_vec()));
            tun.clear();
        }
        if keep {
            out.clear_but_last()
        } else {
            out.clear()
        }
        if !more {
            return got;
        }
    }
}

#[test]
fn a_flow_of_tiny_segments_loses_nothing() {
    // The least that Linux' TCP sends, what it sends with its smallest segment size and time stamps, and as many as just fit.
    for size in [8, 36, 48, 150] {
        let mut net = pair();
        let count = 65_400 / size;
        let frames = vec![super_frame(overlay(0), overlay(1), true, count, size); 3];
        let payload = frames.iter().flat_map(|frame| frame[HEADER_LEN + 40..].to_vec()).collect::<Vec<_>>();
        let got = through_the_queue(&mut net, &frames);
        assert_eq!(got.len(), payload.len(), "{size} bytes each");
        assert!(got == payload, "another content");
        for counter in ["bad-super-frame", "outbox-full"] {
            assert_eq!(net.drops(0, counter), 0, "{counter}");
        }
    }
}
