//! Work shared by threads ends as if one had done it all: the same datagrams, the same frames, the same counts.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use warren_engine::engine::{OpenJob, SealJob};
use warren_engine::io::{Arrival, Destination, Outbox, Source, TunOffload, TunOut};
use warren_engine::offload::segment::SuperFrame;
use warren_engine::offload::vnet::{HEADER_LEN, Header};
use warren_engine::queue::Waited;

use crate::net::{Behind, Net, overlay, super_frame, udp};

/// Node 0 among three others, with a direct path and a session to each of the first two; of the third it only knows.
fn net() -> Net {
    let mut net = Net::new(&[Behind::Nothing; 4]);
    for _ in 0..10 {
        for peer in [1, 2] {
            net.send(0, peer, b"hello");
            net.send(peer, 0, b"hello");
        }
        net.run(Duration::from_millis(100));
    }
    assert_eq!((net.path_kind(0, 1), net.path_kind(0, 2)), ("direct", "direct"));
    net
}

#[derive(Clone, Debug)]
struct Sent {
    to: usize,
    tcp: bool,
    /// Segments; 0 is a packet that is none of a super-frame.
    count: usize,
    size: usize,
    /// From an address that isn't ours.
    forged: bool,
    tell: bool,
}

fn frame(sent: &Sent, from: usize) -> Vec<u8> {
    let src = overlay(if sent.forged { 77 } else { from });
    if sent.count == 0 {
        let packet = udp(src, overlay(sent.to), 4_000, 5_000, &vec![7; sent.size]);
        return [&Header::default().to_bytes()[..], &packet].concat();
    }
    super_frame(src, overlay(sent.to), sent.tcp, sent.count, sent.size)
}

fn sent(to: impl Strategy<Value = usize>) -> impl Strategy<Value = Sent> {
    (to, any::<bool>(), 0usize..30, 1usize..1_200, prop::bool::weighted(0.1), prop::bool::weighted(0.1))
        .prop_map(|(to, tcp, count, size, forged, tell)| Sent { to, tcp, count, size, forged, tell })
}

/// Datagrams by where they go, in order.
type ByPeer = BTreeMap<Destination, Vec<Vec<u8>>>;

fn collect(out: &Outbox, into: &mut ByPeer) {
    for (to, datagram) in out.datagrams() {
        into.entry(to).or_default().push(datagram.to_vec());
    }
}

fn seal_alone(net: &mut Net, turn: &[Sent]) -> ByPeer {
    let (mut all, mut out, now) = (ByPeer::new(), Outbox::new(), net.now);
    for sent in turn {
        net.nodes[0].engine.handle_tun_frame(now, &mut frame(sent, 0), sent.tell, &mut out);
        collect(&out, &mut all);
        out.clear();
    }
    all
}

fn seal_together(net: &mut Net, turn: &[Sent], jobs: &mut [SealJob]) -> ByPeer {
    let (mut all, mut out, now) = (ByPeer::new(), Outbox::new(), net.now);
    let engine = &mut net.nodes[0].engine;
    let mut arena: Vec<u8> = turn.iter().flat_map(|sent| frame(sent, 0)).collect();
    let (mut at, mut rest) = (0, &mut arena[..]);
    for sent in turn {
        let (frame, more) = rest.split_at_mut(frame(sent, 0).len());
        rest = more;
        let len = frame.len();
        engine.begin_seal(now, Waited { frame, at, tell: sent.tell }, jobs, &mut out);
        at += len;
    }
    collect(&out, &mut all);
    let runs: Vec<ByPeer> = std::thread::scope(|scope| {
        let arena = &arena;
        let threads: Vec<_> = jobs
            .iter_mut()
            .map(|job| {
                scope.spawn(move || {
                    let mut sealed = ByPeer::new();
                    job.run(arena, |out, _| {
                        collect(out, &mut sealed);
                        out.clear();
                    });
                    sealed
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (to, datagrams) in runs.into_iter().flatten() {
        all.entry(to).or_default().extend(datagrams);
    }
    for job in jobs {
        engine.finish_seal(now, job);
    }
    all
}

/// What one receive call of node 0 brought from another, and how long its datagrams are.
fn batch(net: &mut Net, from: usize, sent: &Sent) -> (Source, Vec<u8>, usize) {
    let (mut out, now) = (Outbox::new(), net.now);
    let node = &mut net.nodes[from];
    node.engine.handle_tun_frame(
        now,
        &mut frame(&Sent { to: 0, forged: false, ..sent.clone() }, from),
        false,
        &mut out,
    );
    let source = Source::Direct { socket: 0, remote: node.local };
    let (transmit, bytes) = out.iter().next().unwrap();
    (source, bytes.to_vec(), transmit.segment_size.unwrap_or(0))
}

const BOTH: TunOffload = TunOffload { tcp: true, udp: true };

/// Protocol, addresses and ports.
type Flow = (u8, Vec<u8>);

/// Packets for the host by their flow, in order. How many of them one frame holds is another matter: a packet may be joined
/// with earlier ones of its flow before those of other flows. So is their identification, which means nothing where there
/// are no fragments (RFC 6864).
fn packets(tun: &TunOut, into: &mut BTreeMap<Flow, Vec<Vec<u8>>>) {
    let bare = |mut packet: Vec<u8>| {
        packet[4..6].fill(0);
        packet[10..12].fill(0); // the checksum of the header
        packet
    };
    for pieces in tun.frames() {
        let frame: Vec<u8> = pieces.flatten().copied().collect();
        let (header, packet) = (Header::read(&frame).unwrap(), &frame[HEADER_LEN..]);
        let all = into.entry((packet[9], packet[12..24].to_vec())).or_default();
        match header.gso {
            None => all.push(bare(packet.to_vec())),
            Some(gso) => {
                let frame = SuperFrame::new(gso, header.checksum, packet).unwrap();
                all.extend((0..frame.segments()).map(|index| {
                    let mut packet = vec![0; frame.segment_len(index)];
                    frame.write(index, &mut packet);
                    bare(packet)
                }));
            }
        }
    }
}

fn status(net: &Net) -> String {
    let status = net.nodes[0].engine.status(net.now);
    let peers: Vec<_> = status.peers.iter().map(|peer| (peer.rx_bytes, peer.tx_bytes)).collect();
    format!("{:?} {peers:?}", status.drops)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sealing_together_is_sealing_alone(
        turns in prop::collection::vec(prop::collection::vec(sent(1usize..4), 0..8), 1..6),
        count in 1usize..4,
    ) {
        let (mut one, mut other) = (net(), net());
        let mut jobs: Vec<SealJob> = (0..count).map(|_| SealJob::default()).collect();
        for turn in turns {
            let alone = seal_alone(&mut one, &turn);
            let together = seal_together(&mut other, &turn, &mut jobs);
            prop_assert!(jobs.iter().all(SealJob::is_empty));
            prop_assert_eq!(alone, together);
            prop_assert_eq!(status(&one), status(&other));
            for net in [&mut one, &mut other] {
                net.drain(0);
                net.run(Duration::from_millis(50));
            }
        }
    }

    #[test]
    fn opening_together_is_opening_alone(
        turns in prop::collection::vec(
            prop::collection::vec((sent(Just(0)), 1usize..3, 0u8..10), 0..8), 1..6),
        count in 1usize..4,
    ) {
        let mut one = net();
        let mut other = net();
        let mut jobs: Vec<OpenJob> = (0..count).map(|_| OpenJob::new(TunOut::vectored(BOTH))).collect();
        let mut again = None;
        for turn in turns {
            let mut alone = BTreeMap::new();
            let mut together = BTreeMap::new();
            let mut batches = Vec::new();
            for (sent, from, harm) in &turn {
                let made = batch(&mut one, *from, sent);
                // Both senders are in the same state, always.
                prop_assert_eq!(&made, &batch(&mut other, *from, sent));
                let mut made = match harm {
                    0 => again.take().unwrap_or(made), // a replay
                    _ => made,
                };
                match harm {
                    1 => *made.1.last_mut().unwrap() ^= 1,
                    2 => made.1[4] ^= 1, // for another session
                    3 => {
                        // One in the middle is: what follows it is not opened with what is before.
                        let middle = made.1.len() / made.2.max(1) / 2 * made.2;
                        made.1[middle + 4] ^= 1;
                    }
                    _ => again = Some(made.clone()),
                }
                batches.push(made);
            }
            let now = one.now;
            let mut tun = TunOut::vectored(BOTH);
            for (from, data, stride) in batches.clone() {
                let arrival = Arrival { stride, ..Arrival::default() };
                one.nodes[0].engine.handle_datagrams(now, from, arrival, &mut data.clone(), &mut tun);
                packets(&tun, &mut alone);
                tun.clear();
            }
            let engine = &mut other.nodes[0].engine;
            let mut slots: Vec<(Box<[u8]>, usize)> =
                batches.iter().map(|(_, data, _)| (data.clone().into(), data.len())).collect();
            let mut begun = 0;
            for ((from, _, stride), (slot, len)) in batches.iter().zip(&mut slots) {
                let arrival = Arrival { stride: *stride, ..Arrival::default() };
                if !engine.begin_open(now, *from, arrival, slot, *len, &mut jobs) {
                    break;
                }
                begun += 1;
            }
            std::thread::scope(|scope| jobs.iter_mut().for_each(|job| drop(scope.spawn(|| job.run()))));
            let mut back = 0;
            for job in &mut jobs {
                engine.finish_open(now, job, |slot| {
                    back += 1;
                    assert!(!slot.is_empty());
                });
                packets(job.tun(), &mut together);
                job.tun().clear();
            }
            prop_assert_eq!(back, begun);
            for ((from, data, stride), _) in batches.iter().zip(&slots).skip(begun) {
                let arrival = Arrival { stride: *stride, ..Arrival::default() };
                engine.handle_datagrams(now, *from, arrival, &mut data.clone(), &mut tun);
                packets(&tun, &mut together);
                tun.clear();
            }
            prop_assert_eq!(alone, together);
            prop_assert_eq!(status(&one), status(&other));
            for net in [&mut one, &mut other] {
                net.drain(0);
                net.run(Duration::from_millis(50));
            }
        }
    }
}

#[test]
fn two_busy_peers_are_noticed_and_forgotten() {
    let mut net = net();
    let big = |to| Sent { to, tcp: true, count: 40, size: 1_200, forged: false, tell: false };
    let is_busy = |net: &Net| net.nodes[0].engine.has_busy_peers(net.now);
    let burst = |net: &mut Net, peers: &[usize]| {
        for _ in 0..4 {
            for _ in 0..2 {
                peers.iter().for_each(|peer| drop(seal_alone(net, &[big(*peer)])));
            }
            net.run(Duration::from_millis(12));
        }
    };
    burst(&mut net, &[1]);
    assert!(!is_busy(&net), "one alone gains nothing");
    burst(&mut net, &[1, 2]);
    seal_alone(&mut net, &[big(1)]);
    assert!(is_busy(&net));
    net.run(Duration::from_millis(50));
    assert!(!is_busy(&net));
}

#[test]
fn a_peer_that_leaves_meanwhile_takes_its_session_along() {
    let mut net = net();
    let now = net.now;
    let mut jobs = [SealJob::default()];
    let mut out = Outbox::new();
    let sent = Sent { to: 1, tcp: true, count: 3, size: 500, forged: false, tell: false };
    let mut arena = frame(&sent, 0);
    let waited = Waited { frame: &mut arena, at: 0, tell: false };
    net.nodes[0].engine.begin_seal(now, waited, &mut jobs, &mut out);
    assert!(!jobs[0].is_empty() && out.is_empty());
    // Not what its documentation allows; nothing may break.
    let peer = net.nodes[1].device;
    net.netmaps[0].peers.remove(&peer);
    net.push_netmap(0);
    let mut sealed = 0;
    jobs[0].run(&arena, |out, _| {
        sealed += out.datagrams().count();
        out.clear();
    });
    assert_eq!(sealed, 3);
    net.nodes[0].engine.finish_seal(now, &mut jobs[0]);
    assert!(seal_alone(&mut net, &[sent]).is_empty());
}
