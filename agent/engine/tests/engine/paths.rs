//! Join, relay first, direct after, distress, roaming, rest.

use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use warren_common::wire::probe::MAGIC;
use warren_engine::event::{Event, Path};
use warren_engine::io::{LocalSocket, Source};
use warren_engine::paths::{IDLE_AFTER, MAX_HINT_ENDPOINTS, MAX_HINTS, MAX_PROBES_PER_MINUTE, PathHint};
use warren_engine::status::Mapping;

use crate::net::{Behind, DIRECT_DELAY, Net, RELAY, RELAY_DELAY, device};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

fn talk(net: &mut Net, seconds: u32) {
    for _ in 0..seconds * 10 {
        net.send(0, 1, b"ping");
        net.send(1, 0, b"pong");
        net.run(100 * MS);
    }
}

#[test]
fn the_first_packet_takes_the_relay_and_then_it_is_direct() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    let direct_before = net.direct;
    net.send(0, 1, b"first");
    // Handshake (two ways) and the packet, all through the relay.
    net.run(3 * RELAY_DELAY + MS);
    assert_eq!(net.nodes[1].got.len(), 1, "first packet after one and a half round trips");
    assert!(net.nodes[1].got[0].ends_with(b"first"));
    net.run(4 * RELAY_DELAY + 4 * DIRECT_DELAY);
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"), "within three round trips");
    let relayed = net.relayed;
    net.send(0, 1, b"second");
    net.run(DIRECT_DELAY + MS);
    assert_eq!(net.nodes[1].got.len(), 2);
    assert_eq!(net.relayed, relayed, "nothing more through the relay");
    assert!(net.direct > direct_before);
    let changes: Vec<_> =
        net.nodes[0].events.iter().filter(|e| matches!(e, Event::PathChanged { .. })).collect();
    assert_eq!(changes.len(), 2, "relay, then direct: {changes:?}");
    assert!(net.nodes[0].events.contains(&Event::SessionEstablished { device: device(1) }));
    let status = net.nodes[0].engine.status(net.now);
    assert!(status.peers[0].path.rtt_ms.is_some_and(|ms| (19.0..40.0).contains(&ms)));
    assert!(status.peers[0].last_handshake.is_some());
    assert_eq!(status.net.mapping, Some(Mapping::EndpointIndependent));
}

#[test]
fn hosts_without_nat_and_one_behind_a_symmetric_nat_become_direct() {
    for behind in [
        [Behind::Nothing, Behind::Nothing],
        [Behind::Symmetric, Behind::Nothing],
        [Behind::Nothing, Behind::Symmetric],
    ] {
        let mut net = Net::new(&behind);
        net.send(0, 1, b"first");
        net.run(S);
        assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"));
    }
}

#[test]
fn symmetric_on_both_sides_stays_relayed_with_growing_pauses() {
    let mut net = Net::new(&[Behind::Symmetric, Behind::Symmetric]);
    net.send(0, 1, b"first");
    talk(&mut net, 60);
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("relay", "relay"));
    assert!(net.nodes[1].got.len() >= 600);
    assert_eq!(net.nodes[0].engine.status(net.now).net.mapping, Some(Mapping::AddressDependent));
    let before = net.direct;
    talk(&mut net, 60);
    let probes = net.direct - before;
    assert!((2..40).contains(&probes), "{probes} probes in the second minute");
    assert!(before < 2 * u64::from(MAX_PROBES_PER_MINUTE));
}

#[test]
fn without_a_relay_the_coordinator_carries_the_addresses() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    net.set_relay(0, false);
    net.set_relay(1, false);
    net.send(0, 1, b"first");
    net.run(S);
    assert!(net.nodes[0].events.iter().any(|e| matches!(e, Event::Signal { .. })));
    assert!(net.nodes[0].events.contains(&Event::RelayWanted { relay: RELAY }));
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"));
    assert_eq!(net.nodes[1].got.len(), 1, "the packet that waited arrived");
}

#[test]
fn a_relay_that_comes_late_brings_what_waited() {
    let mut net = Net::new(&[Behind::Symmetric, Behind::Symmetric]);
    net.set_relay(0, false);
    net.send(0, 1, b"first");
    net.run(500 * MS);
    assert!(net.nodes[1].got.is_empty());
    net.set_relay(0, true);
    net.run(3 * RELAY_DELAY + MS);
    assert_eq!(net.nodes[1].got.len(), 1, "the handshake was repeated at once");
}

/// Node `n` starts anew from what it saved, while relay and coordinator are away. Its socket and its NAT are the same.
fn restart_alone(net: &mut Net, n: usize) {
    let (now, old) = (net.now, &net.nodes[n].engine);
    let (saved, hints) = (old.to_saved(now).unwrap(), old.path_hints());
    let mut engine = crate::net::engine(n, &net.nodes[n].keys, &net.root);
    engine.restore(now, &saved).unwrap();
    engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: net.nodes[n].local }]);
    engine.resume(now, &hints);
    net.nodes[n].engine = engine;
    net.drain(n);
}

#[test]
fn a_restart_without_relay_and_coordinator_goes_on_where_it_was() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    talk(&mut net, 5);
    assert_eq!(net.path_kind(0, 1), "direct");
    for n in 0..2 {
        net.set_relay(n, false);
        net.set_control(n, false);
    }
    restart_alone(&mut net, 0);
    assert_eq!(net.path_kind(0, 1), "none");
    // Ping and pong, initiation, response and what confirms it.
    net.run(5 * DIRECT_DELAY + MS);
    assert_eq!(net.path_kind(0, 1), "direct");
    // The other side has heard nothing of the restart, and may speak first.
    let (a, b) = (net.nodes[0].got.len(), net.nodes[1].got.len());
    net.send(1, 0, b"go on");
    net.send(0, 1, b"go on");
    net.run(2 * DIRECT_DELAY);
    assert_eq!((net.nodes[0].got.len(), net.nodes[1].got.len()), (a + 1, b + 1));
}

#[test]
fn what_is_kept_across_a_restart_is_bounded_and_grants_nothing() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    talk(&mut net, 1);
    let addr = |n: u16| SocketAddr::from(([192, 0, 2, 1], 1_000 + n));
    let (now, overlay) = (net.now, "100.64.0.9:1".parse().unwrap());
    let many = PathHint { device: device(1), endpoints: (0..100).map(addr).collect() };
    let hints = [
        PathHint { device: device(7), endpoints: vec![addr(1)] },
        PathHint { device: device(1), endpoints: vec![overlay, "127.0.0.1:1".parse().unwrap()] },
        many,
    ];
    let mut engine = crate::net::engine(0, &net.nodes[0].keys, &net.root);
    engine.resume(now, &hints); // without a netmap there are no peers
    assert!(engine.path_hints().is_empty());
    engine.restore(now, &net.nodes[0].engine.to_saved(now).unwrap()).unwrap();
    engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: net.nodes[0].local }]);
    engine.resume(now, &hints);
    let kept = engine.path_hints();
    assert_eq!((kept.len(), kept[0].device, kept[0].endpoints.len()), (1, device(1), MAX_HINT_ENDPOINTS));
    assert!(kept[0].endpoints.iter().all(|e| *e == net.nodes[1].local || e.ip() == addr(0).ip()));
    assert_eq!(engine.status(now).drops["candidate-refused"], 2);
    let over: Vec<_> = (0..=MAX_HINTS).map(|_| PathHint { device: device(7), endpoints: vec![] }).collect();
    let mut fresh = crate::net::engine(0, &net.nodes[0].keys, &net.root);
    fresh.restore(now, &net.nodes[0].engine.to_saved(now).unwrap()).unwrap();
    fresh.resume(now, &[over, hints.to_vec()].concat());
    assert!(fresh.path_hints().is_empty(), "more than {MAX_HINTS} are not looked at");
}

#[test]
fn distress_demotes_and_recovery_promotes_again() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    net.send(0, 1, b"first");
    talk(&mut net, 5);
    assert_eq!(net.path_kind(0, 1), "direct");
    net.cut.insert((0, 1));
    talk(&mut net, 6);
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("relay", "relay"));
    let (a, b) = (net.nodes[0].got.len(), net.nodes[1].got.len());
    talk(&mut net, 1);
    net.run(RELAY_DELAY);
    assert!(net.nodes[0].got.len() >= a + 9 && net.nodes[1].got.len() >= b + 9);
    net.cut.clear();
    talk(&mut net, 60);
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"));
}

#[test]
fn a_one_way_stream_keeps_its_direct_path_and_loses_it_when_it_is_dead() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    for _ in 0..100 {
        net.send(0, 1, b"stream");
        net.run(100 * MS);
    }
    assert_eq!(net.path_kind(0, 1), "direct");
    let changes =
        |net: &Net| net.nodes[0].events.iter().filter(|e| matches!(e, Event::PathChanged { .. })).count();
    let before = changes(&net);
    for _ in 0..600 {
        net.send(0, 1, b"stream");
        net.run(100 * MS);
    }
    assert_eq!(changes(&net), before, "checks don't disturb a good path");
    net.cut.insert((0, 1));
    for _ in 0..50 {
        net.send(0, 1, b"stream");
        net.run(100 * MS);
    }
    assert_eq!(net.path_kind(0, 1), "relay");
}

#[test]
fn roaming_recovers_through_the_relay_at_once_and_becomes_direct_again() {
    for behind in [Behind::PortRestricted, Behind::Nothing] {
        let mut net = Net::new(&[behind, Behind::PortRestricted]);
        net.send(0, 1, b"first");
        talk(&mut net, 3);
        assert_eq!(net.path_kind(0, 1), "direct");
        net.roam(0);
        assert_eq!(net.path_kind(0, 1), "relay");
        let got = net.nodes[1].got.len();
        net.send(0, 1, b"from elsewhere");
        net.run(RELAY_DELAY + MS);
        assert_eq!(net.nodes[1].got.len(), got + 1);
        talk(&mut net, 5);
        assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"));
        let status = net.nodes[1].engine.status(net.now);
        assert!(status.peers[0].path.endpoint.unwrap().ip().to_string().starts_with("203.0.113.10"));
    }
}

#[test]
fn a_direct_path_in_use_is_kept_open_and_an_idle_one_is_let_go() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    net.send(0, 1, b"first");
    net.run(IDLE_AFTER - 20 * S);
    assert_eq!(net.path_kind(0, 1), "direct", "kept open over {IDLE_AFTER:?} minus 20 s");
    let got = net.nodes[1].got.len();
    net.run(25 * S);
    assert_eq!(net.path_kind(0, 1), "none");
    net.send(0, 1, b"again");
    net.run(S);
    assert_eq!((net.nodes[1].got.len(), net.path_kind(0, 1)), (got + 1, "direct"));
}

#[test]
fn idle_engines_sleep() {
    let mut net = Net::new(&[Behind::PortRestricted; 100]);
    for to in 1..5 {
        net.send(0, to, b"hello");
    }
    net.run(10 * 60 * S);
    for node in &mut net.nodes {
        node.wakes = 0;
    }
    let (direct, relayed) = (net.direct, net.relayed);
    net.run(3_600 * S);
    let wakes: Vec<u64> = net.nodes.iter().map(|n| n.wakes).collect();
    assert!(wakes.iter().all(|w| *w <= 3), "wake-ups in an idle hour: {wakes:?}");
    assert_eq!((net.direct, net.relayed), (direct, relayed), "not a packet");
}

#[test]
fn ping_measures_the_path_in_use_and_says_when_there_is_no_answer() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    let results = |net: &Net| -> Vec<_> {
        let ping = |e: &Event| match e {
            Event::PingResult { token, path, rtt } => Some((token.0, *path, *rtt)),
            _ => None,
        };
        net.nodes[0].events.iter().filter_map(ping).collect()
    };
    let now = net.now;
    let first = net.nodes[0].engine.start_ping(now, device(1)).unwrap();
    net.drain(0);
    net.run(S);
    assert_eq!(results(&net), [(first.0, Path::Relay { relay: RELAY }, Some(2 * RELAY_DELAY))]);
    let now = net.now;
    net.nodes[0].engine.start_ping(now, device(1)).unwrap();
    net.drain(0);
    net.run(S);
    let (_, path, rtt) = results(&net)[1];
    assert!(matches!(path, Path::Direct { .. }) && rtt == Some(2 * DIRECT_DELAY));
    net.cut.insert((0, 1));
    net.set_relay(1, false);
    let now = net.now;
    net.nodes[0].engine.start_ping(now, device(1)).unwrap();
    net.drain(0);
    net.run(10 * S);
    assert_eq!(results(&net)[2].2, None);
    let now = net.now;
    assert_eq!(net.nodes[0].engine.start_ping(now, device(9)), None);
}

#[test]
fn garbage_from_anywhere_is_counted_and_teaches_nothing() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    net.send(0, 1, b"first");
    net.run(S);
    let stranger = "192.0.2.66:666".parse().unwrap();
    let sources = [
        Source::Direct { socket: 0, remote: stranger },
        Source::Relay { relay: RELAY, device: device(0) },
        Source::Relay { relay: RELAY, device: device(7) },
        Source::Signal { device: device(0) },
    ];
    for from in sources {
        for lead in [
            &MAGIC[..],
            &[1, 0, 0, 0],
            &[2, 0, 0, 0],
            &[4, 0, 0, 0],
            &[1, 1, 0, 12, 0x21, 0x12, 0xa4, 0x42],
            &[9],
        ] {
            for len in [0, 1, 16, 60, 92, 148, 600, 1_400] {
                let mut bytes = lead.to_vec();
                bytes.resize(lead.len().max(len), 0x5a);
                net.deliver(1, from, bytes);
            }
        }
    }
    net.run(S);
    let path = net.nodes[1].engine.status(net.now).peers[0].path.clone();
    assert_eq!(path.endpoint, Some(net.nodes[0].local));
    for counter in ["unknown-protocol", "unknown-sender", "stun-unexpected", "probe-unknown", "probe-forged"]
    {
        assert!(net.drops(1, counter) > 0, "{counter}");
    }
    assert!(net.nodes[1].got.len() == 1);
}

proptest! {
    /// Handshakes, data, probes and STUN as they really are, then cut, changed, spliced and sent from elsewhere.
    #[test]
    fn tampered_traffic_never_panics_and_delivers_nothing_twice(
        edits in proptest::collection::vec(
            (any::<Index>(), any::<Index>(), any::<u8>(), 0usize..4, any::<Index>()), 1..60,
        ),
    ) {
        let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
        net.send(0, 1, b"first");
        talk(&mut net, 1);
        let recorded = net.sent.clone();
        let got = net.nodes[1].got.len();
        let sources = [
            Source::Direct { socket: 0, remote: net.nodes[0].local },
            Source::Direct { socket: 0, remote: "192.0.2.66:666".parse().unwrap() },
            Source::Direct { socket: 0, remote: crate::net::stun_servers()[0] },
            Source::Relay { relay: RELAY, device: device(0) },
            Source::Signal { device: device(0) },
        ];
        for (which, at, value, edit, from) in edits {
            let mut bytes = which.get(&recorded).clone();
            let at = at.index(bytes.len());
            match edit {
                0 => bytes[at] ^= value,
                1 => bytes.truncate(at),
                2 => bytes.extend_from_within(at..),
                _ => {}
            }
            net.deliver(1, *from.get(&sources), bytes);
        }
        net.run(S);
        prop_assert_eq!(net.nodes[1].got.len(), got);
        net.send(0, 1, b"still fine");
        net.run(S);
        prop_assert_eq!(net.nodes[1].got.len(), got + 1);
    }
}

#[test]
fn overlay_loopback_and_multicast_are_no_endpoints() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    for bad in [
        "100.64.0.1:51820",
        "127.0.0.1:51820",
        "224.0.0.1:51820",
        "0.0.0.0:51820",
        "[fd00:1::1]:1",
        "[::1]:1",
        "192.0.2.1:0",
    ] {
        let before = net.drops(1, "bad-endpoint");
        net.deliver(
            1,
            Source::Direct { socket: 0, remote: bad.parse().unwrap() },
            vec![4, 0, 0, 0, 1, 2, 3, 4],
        );
        assert_eq!(net.drops(1, "bad-endpoint"), before + 1, "{bad}");
    }
}
