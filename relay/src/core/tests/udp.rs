//! Plain UDP of the core.

use std::net::Ipv4Addr;

use warren_common::wire::relay::udp::{Call, Calling, Head, Kind, Ping, UDP_HEADER, UdpKeys};

use super::*;

mod rest;

/// A device that takes plain UDP, once it has asked for it.
struct UdpDevice {
    conn: ConnId,
    keys: UdpKeys,
    session: u64,
    next: u64,
    at: UdpPath,
}

fn addr(n: u8, port: u16) -> UdpPath {
    UdpPath { remote: (Ipv4Addr::new(192, 0, 2, n), port).into(), local: None }
}

impl UdpDevice {
    fn seal(&mut self, kind: Kind, what: [u8; 16], payload: &[u8]) -> Vec<u8> {
        let mut datagram = [&[0; UDP_HEADER], payload].concat();
        let head = Head { kind, session: self.session, counter: self.next };
        self.next += 1;
        assert!(self.keys.sealer().seal(head, what, &mut datagram));
        datagram
    }

    fn packet(&mut self, to: u8, payload: &[u8]) -> Vec<u8> {
        self.seal(Kind::Send, device(to).to_bytes(), payload)
    }

    fn ping(&mut self, settle: bool, padding: usize) -> Vec<u8> {
        self.seal(Kind::Ping, Ping { nonce: 5, settle, leave: false }.to_bytes(), &vec![0; padding])
    }

    fn open(&self, datagram: &[u8]) -> (Kind, [u8; 16], Vec<u8>) {
        let head = Head::peek(datagram).unwrap();
        assert_eq!(head.session, self.session);
        let what = self.keys.opener().open(datagram).expect("not for this device");
        (head.kind, what, datagram[UDP_HEADER..].to_vec())
    }
}

impl World {
    fn with_udp() -> Self {
        let mut world = Self::new(limits());
        world.relay.config.plain_udp = true;
        world
    }

    /// Device `n` at an address of its own; `settled`: it has asked for UDP.
    fn join_udp(&mut self, n: u8, peers: &[u8], settled: bool) -> UdpDevice {
        let signed = self.token(n, 1, peers).sign(&coordinator());
        let (conn, challenge) = self.connect();
        let config = &self.relay.config;
        let binding =
            Binding { network: config.network, relay: config.relay, cert_sha256: config.cert_sha256 };
        let token = TokenRef::new(&signed).unwrap();
        let proven = challenge.prove(&probe(n), &binding, token).unwrap();
        self.frame(conn, &Frame::Auth { proof: proven.proof, token });
        let ready = self.relay.next_frame(conn).unwrap();
        assert!(matches!(Frame::decode(&ready.bytes), Ok(Some(Frame::Ready { .. }))));
        let offer = self.relay.next_frame(conn).unwrap();
        let Ok(Some(Frame::UdpOffer { session })) = Frame::decode(&offer.bytes) else { panic!("{offer:?}") };
        let mut made = UdpDevice { conn, keys: proven.udp, session, next: 0, at: addr(n, 1_000) };
        if settled {
            let ping = made.ping(true, 0);
            assert_eq!(self.udp(made.at, &ping).len(), 1);
        }
        made
    }

    /// What the relay sends when datagrams of this length come from `from`.
    fn udp_batch(&mut self, from: UdpPath, datagrams: &[Vec<u8>]) -> Vec<(UdpPath, usize, Vec<u8>)> {
        let mut buffer = datagrams.concat();
        let mut sends = Vec::new();
        self.relay.handle_udp(self.now, from, &mut buffer, datagrams[0].len(), &mut sends);
        self.settle();
        sends.into_iter().map(|s| (s.to, s.segment, buffer[s.range].to_vec())).collect()
    }

    fn udp(&mut self, from: UdpPath, datagram: &[u8]) -> Vec<(UdpPath, Vec<u8>)> {
        let sent = self.udp_batch(from, &[datagram.to_vec()]);
        sent.into_iter().map(|(to, _, bytes)| (to, bytes)).collect()
    }

    fn queued(&mut self, conn: ConnId) -> Vec<Vec<u8>> {
        let frames = std::iter::from_fn(|| self.relay.next_frame(conn));
        frames.filter(|f| f.class != Class::Control).map(|f| f.bytes.to_vec()).collect()
    }
}

#[test]
fn a_batch_is_relayed_in_place_as_a_batch() {
    let mut world = World::with_udp();
    let (mut a, b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[], true));
    let packets: Vec<_> = (0..4u8).map(|i| a.packet(2, &vec![i; if i == 3 { 10 } else { 500 }])).collect();
    let sent = world.udp_batch(a.at, &packets);
    let [(to, segment, bytes)] = sent.as_slice() else { panic!("{} sends", sent.len()) };
    assert_eq!((*to, *segment, bytes.len()), (b.at, UDP_HEADER + 500, packets.concat().len()));
    for (i, datagram) in (0u8..).zip(bytes.chunks(*segment)) {
        let (kind, src, payload) = b.open(datagram);
        assert_eq!((kind, src), (Kind::Recv, device(1).to_bytes()));
        assert!(payload.iter().all(|byte| *byte == i));
    }
    let stats = world.relay.stats();
    assert_eq!((stats.counters.forwarded_packets, stats.counters.forwarded_udp_packets), (4, 4));
    assert_eq!(stats.counters.forwarded_bytes, 1_510);
    assert_eq!(stats.queued_bytes, 0);
}

#[test]
fn each_transport_reaches_each_other() {
    let mut world = World::with_udp();
    let (mut a, b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[1], false));
    // UDP to a connection.
    let packet = a.packet(2, b"one");
    assert!(world.udp(a.at, &packet).is_empty());
    assert_eq!(world.queued(b.conn), [Frame::Recv { src: device(1), payload: b"one" }.to_vec()]);
    // A connection to UDP; a packet that may not pass whole takes the connection.
    world.frame(b.conn, &Frame::Send { dst: device(1), payload: b"two" });
    let (to, datagram) = world.relay.poll_datagram().unwrap();
    assert_eq!((to, a.open(&datagram)), (a.at, (Kind::Recv, device(2).to_bytes(), b"two".to_vec())));
    world.frame(b.conn, &Frame::Send { dst: device(1), payload: &[0; FULL_UDP_DATAGRAM] });
    assert!(world.relay.poll_datagram().is_none());
    assert_eq!(world.queued(a.conn).len(), 1);
}

#[test]
fn an_answer_is_as_long_as_the_question_and_asking_moves_nothing() {
    let mut world = World::with_udp();
    let mut a = world.join_udp(1, &[2], false);
    let b = world.join_udp(2, &[1], false);
    for (settle, padding) in [(false, FULL_UDP_DATAGRAM - UDP_HEADER), (true, 0)] {
        let ping = a.ping(settle, padding);
        let sent = world.udp(a.at, &ping);
        let [(to, pong)] = sent.as_slice() else { panic!("no answer") };
        assert_eq!((*to, pong.len()), (a.at, ping.len()));
        assert_eq!(a.open(pong).1, Ping { nonce: 5, settle, leave: false }.to_bytes());
        world.frame(b.conn, &Frame::Send { dst: device(1), payload: b"x" });
        assert_eq!(world.relay.poll_datagram().is_some(), settle);
    }
    // Whoever is not heard for a while is not sent anything this way.
    world.now = world.now + Duration::from_secs(41);
    world.frame(b.conn, &Frame::Send { dst: device(1), payload: b"x" });
    assert!(world.relay.poll_datagram().is_none());
}

#[test]
fn only_the_newest_authentic_datagram_says_where_a_device_is() {
    let mut world = World::with_udp();
    let mut a = world.join_udp(1, &[2], true);
    let mut b = world.join_udp(2, &[1], true);
    let thief = addr(66, 6);
    let old = b.ping(true, 0);
    let newer = b.packet(1, b"newer");
    assert_eq!(world.udp(b.at, &newer).len(), 1);
    // Late: answered, but the address stays. Again: nothing at all.
    assert_eq!(world.udp(thief, &old).len(), 1);
    assert!(world.udp(thief, &old).is_empty());
    assert!(world.udp(thief, &newer).is_empty());
    assert_eq!(world.dropped(DropReason::UdpReplayed), 2);
    // Forged: another key, another length, another session.
    let mut forged = UdpDevice { keys: a.keys.clone(), ..world.copy(&b) };
    let guess = forged.ping(true, 0);
    assert!(world.udp(thief, &guess).is_empty());
    let longer = [b.ping(true, 0), vec![0]].concat();
    assert!(world.udp(thief, &longer).is_empty());
    assert_eq!(world.dropped(DropReason::UdpForged), 2);
    let unknown = UdpDevice { session: b.session ^ 1, ..world.copy(&b) }.ping(true, 0);
    assert!(world.udp(thief, &unknown).is_empty());
    assert_eq!(world.dropped(DropReason::UdpUnknown), 1);
    for malformed in [vec![], vec![1; UDP_HEADER], vec![2; 100], vec![9; 100], vec![1; 10]] {
        if !malformed.is_empty() {
            assert!(world.udp(thief, &malformed).is_empty());
        }
    }
    assert_eq!(world.dropped(DropReason::UdpMalformed), 4);
    let packet = a.packet(2, b"still there");
    assert_eq!(world.udp(a.at, &packet)[0].0, b.at);
    // A NAT gives it another port: its next packet says so.
    let moved = addr(2, 2_000);
    let packet = b.packet(1, b"moved");
    world.udp(moved, &packet);
    let packet = a.packet(2, b"there");
    assert_eq!(world.udp(a.at, &packet)[0].0, moved);
}

impl World {
    fn copy(&self, device: &UdpDevice) -> UdpDevice {
        let UdpDevice { conn, session, next, at, .. } = *device;
        UdpDevice { conn, keys: device.keys.clone(), session, next, at }
    }
}

#[test]
fn a_device_that_lost_udp_gets_its_packets_over_the_connection_until_it_asks_again() {
    let mut world = World::with_udp();
    let (mut a, mut b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[1], true));
    let overtaken = b.packet(1, b"sent before");
    world.frame(b.conn, &Frame::UdpLost { counter: b.next - 1 });
    world.udp(b.at, &overtaken);
    let packet = a.packet(2, b"to the connection");
    assert!(world.udp(a.at, &packet).is_empty());
    assert_eq!(world.queued(b.conn).len(), 1);
    let ping = b.ping(true, 0);
    world.udp(b.at, &ping);
    let packet = a.packet(2, b"over UDP");
    assert_eq!(world.udp(a.at, &packet).len(), 1);
}

#[test]
fn the_rules_are_those_of_the_connection() {
    let mut world = World::with_udp();
    let (mut a, b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[], true));
    for (to, reason) in [(1, DropReason::NotPermitted), (3, DropReason::NotPermitted)] {
        let before = world.dropped(reason);
        let packet = a.packet(to, b"x");
        assert!(world.udp(a.at, &packet).is_empty());
        assert_eq!(world.dropped(reason), before + 1);
    }
    // Suspended, either end, from the moment on that the relay is told.
    for n in [1, 2] {
        world.relay.set_minimum_revision(device(n), 2, world.now);
        let packet = a.packet(2, b"x");
        assert!(world.udp(a.at, &packet).is_empty());
        assert_eq!(world.dropped(DropReason::Suspended), u64::from(n));
        let conn = if n == 1 { a.conn } else { b.conn };
        let signed = world.token(n, 2, &[2]).sign(&coordinator());
        world.frame(conn, &Frame::TokenRefresh { token: TokenRef::new(&signed).unwrap() });
    }
    let packet = a.packet(2, b"x");
    assert_eq!(world.udp(a.at, &packet).len(), 1);
    world.relay.revoke(device(2), 3, world.now);
    let packet = a.packet(2, b"x");
    assert!(world.udp(a.at, &packet).is_empty());
    assert_eq!(world.dropped(DropReason::NotConnected), 1);
    world.relay.revoke(device(1), 3, world.now);
    let packet = a.packet(2, b"x");
    assert!(world.udp(a.at, &packet).is_empty());
    assert_eq!((world.dropped(DropReason::UdpUnknown), world.relay.udp_ids.len()), (1, 0));
}

#[test]
fn a_token_that_has_ended_ends_the_session() {
    let mut world = World::with_udp();
    let (mut a, _b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[], true));
    world.now = world.now + Duration::from_secs(600);
    let packet = a.packet(2, b"x");
    assert!(world.udp(a.at, &packet).is_empty());
    assert!(world.closed.contains(&(a.conn, RefusalCode::TokenExpired)));
}

#[test]
fn tiny_packets_cost_as_much_as_small_ones_and_a_flood_is_not_even_opened() {
    let mut world = World::with_udp();
    world.relay.config.limits.burst = 10 * MIN_PACKET_COST as u64;
    world.relay.config.limits.rate = 1_000;
    let (mut a, _b) = (world.join_udp(1, &[2], false), world.join_udp(2, &[], true));
    let mut through = 0;
    for _ in 0..20 {
        let packet = a.packet(2, b"x");
        through += world.udp(a.at, &packet).len();
    }
    assert_eq!((through, world.dropped(DropReason::RateLimited)), (10, 10));
    let mut forged = a.packet(2, b"x");
    forged[UDP_HEADER - 1] ^= 1;
    assert!(world.udp(a.at, &forged).is_empty());
    assert_eq!((world.dropped(DropReason::RateLimited), world.dropped(DropReason::UdpForged)), (11, 0));
}

#[test]
fn the_rate_of_a_device_is_one_for_all_transports() {
    let mut world = World::with_udp();
    world.relay.config.limits.burst = 10_000;
    world.relay.config.limits.rate = 1_000;
    let (mut a, _b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[], true));
    let mut through = 0;
    for _ in 0..20 {
        let packet = a.packet(2, &[0; 936]);
        through += world.udp(a.at, &packet).len();
    }
    assert_eq!((through, world.dropped(DropReason::RateLimited)), (9, 11));
    world.send(a.conn, 2, &[0; 936]);
    assert_eq!(world.dropped(DropReason::RateLimited), 12);
}

#[test]
fn without_a_shell_that_carries_it_none_is_offered() {
    let mut world = World::new(limits());
    let conn = world.join(1, 1, &[]);
    let frames: Vec<_> = std::iter::from_fn(|| world.relay.next_frame(conn)).collect();
    assert_eq!(frames.len(), 1, "only that it is ready");
}
