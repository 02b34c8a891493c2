//! Sessions that rest.

use super::*;

impl World {
    /// Lets the connection of `device` go, if the relay agrees.
    fn rest(&mut self, device: &UdpDevice) -> bool {
        while self.relay.next_frame(device.conn).is_some() {}
        self.closed.clear();
        self.frame(device.conn, &Frame::Rest);
        let rests = self.closed == [(device.conn, RefusalCode::Resting)];
        assert_eq!(rests, self.relay.conns[&device.conn].rests());
        if rests {
            self.relay.handle_disconnected(device.conn);
        }
        rests
    }

    /// The one datagram that the relay has made of its own accord, as `to` reads it.
    fn call_to(&mut self, to: &UdpDevice) -> Call {
        let (at, datagram) = self.relay.poll_datagram().expect("no call");
        assert_eq!((at, datagram.len()), (to.at, UDP_HEADER));
        assert!(self.relay.poll_datagram().is_none());
        let (kind, what, _) = to.open(&datagram);
        assert_eq!(kind, Kind::Call);
        Call::from_bytes(&what)
    }

    fn answer(&mut self, device: &mut UdpDevice) -> (Kind, [u8; 16]) {
        let ping = device.ping(true, 0);
        let sent = self.udp(device.at, &ping);
        let [(_, answer)] = sent.as_slice() else { panic!("{} answers", sent.len()) };
        let (kind, what, _) = device.open(answer);
        (kind, what)
    }
}

const CONNECT: Call = Call { nonce: None, why: Calling::Connect };

#[test]
fn a_resting_session_carries_packets_both_ways_for_as_long_as_it_pings() {
    let mut world = World::with_udp();
    let (mut a, mut b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[1], true));
    assert!(world.rest(&a));
    for _ in 0..30 {
        let ping = a.ping(true, 0);
        assert_eq!(world.udp(a.at, &ping).len(), 1);
        let packet = a.packet(2, b"from");
        assert_eq!(world.udp(a.at, &packet)[0].0, b.at);
        let packet = b.packet(1, b"to");
        assert_eq!(world.udp(b.at, &packet)[0].0, a.at);
        world.pass(Duration::from_secs(15));
    }
    world.pass(Limits::default().idle_timeout);
    assert!(world.closed.contains(&(a.conn, RefusalCode::Idle)));
    assert_eq!((world.relay.stats().clients, world.relay.udp_ids.len()), (0, 0), "b was silent as well");
}

#[test]
fn nobody_rests_whom_udp_does_not_reach_or_for_whom_something_waits() {
    let mut world = World::with_udp();
    let unsettled = world.join_udp(1, &[2], false);
    assert!(!world.rest(&unsettled));
    let b = world.join_udp(2, &[1], true);
    world.frame(b.conn, &Frame::Ping { nonce: 1 });
    world.closed.clear();
    world.frame(b.conn, &Frame::Rest); // the pong has not been taken
    assert_eq!(world.closed, []);
    assert_eq!(world.read(b.conn).last(), Some(&Frame::Pong { nonce: 1 }.to_vec()));
    let (half_open, _) = world.connect();
    world.frame(half_open, &Frame::Rest);
    assert_eq!(world.closed, [(half_open, RefusalCode::Protocol)]);
}

#[test]
fn what_takes_a_connection_calls_the_device_until_it_comes() {
    let mut world = World::with_udp();
    let (mut a, b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[1], true));
    assert!(world.rest(&a));
    assert_eq!(world.answer(&mut a).0, Kind::Pong);
    // Too long for UDP.
    world.frame(b.conn, &Frame::Send { dst: device(1), payload: &[0; FULL_UDP_DATAGRAM] });
    assert_eq!(world.call_to(&a), CONNECT);
    assert_eq!((world.dropped(DropReason::NotConnected), world.relay.stats().queued_bytes), (1, 0));
    // Not once more for each packet, but with every ping.
    world.frame(b.conn, &Frame::Send { dst: device(1), payload: &[0; FULL_UDP_DATAGRAM] });
    assert!(world.relay.poll_datagram().is_none());
    let expected = Call { nonce: Some(5), ..CONNECT }.to_bytes();
    assert_eq!(world.answer(&mut a), (Kind::Call, expected));
    let mut back = world.join_udp(1, &[2], true);
    assert_eq!(world.answer(&mut back).0, Kind::Pong);
}

#[test]
fn the_end_of_a_token_a_withdrawal_and_a_drain_reach_a_resting_device() {
    let mut world = World::with_udp();
    let mut a = world.join_udp(1, &[2], true);
    assert!(world.rest(&a));
    for _ in 0..32 {
        world.answer(&mut a);
        world.pass(Duration::from_secs(15));
    }
    assert_eq!(world.call_to(&a), CONNECT, "its token ends within two minutes");
    let b = world.join_udp(2, &[1], true);
    assert!(world.rest(&b));
    world.relay.set_minimum_revision(device(2), 2, world.now);
    assert_eq!(world.call_to(&b), CONNECT);
    world.relay.drain(Duration::from_secs(5));
    let drained: Vec<_> = std::iter::from_fn(|| world.relay.poll_datagram()).map(|(to, _)| to).collect();
    assert_eq!(drained, [a.at, b.at]);
    let expected = Call { nonce: Some(5), why: Calling::Drain { after_ms: 5_000 } }.to_bytes();
    assert_eq!(world.answer(&mut a), (Kind::Call, expected));
    world.relay.revoke(device(1), 2, world.now);
    let ping = a.ping(true, 0);
    assert!(world.udp(a.at, &ping).is_empty());
    // Suspended too long.
    world.pass(STALE_GRACE);
    assert_eq!((world.relay.stats().clients, world.relay.udp_ids.len()), (0, 0));
}

#[test]
fn a_device_that_comes_back_loses_no_packet() {
    let mut world = World::with_udp();
    let (mut a, mut b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[1], true));
    assert!(world.rest(&a));
    let mut back = world.join_udp(1, &[2], false);
    assert_ne!(back.session, a.session);
    // Both ways by the former session, until the new one has proved itself.
    let packet = b.packet(1, b"to");
    let [(to, datagram)] = &world.udp(b.at, &packet)[..] else { panic!() };
    assert_eq!((*to, a.open(datagram).0), (a.at, Kind::Recv));
    let packet = a.packet(2, b"from");
    assert_eq!(world.udp(a.at, &packet).len(), 1);
    let ping = back.ping(false, 0);
    assert_eq!(world.udp(back.at, &ping).len(), 1);
    assert_eq!(world.answer(&mut a).0, Kind::Pong);
    assert_eq!(world.answer(&mut back).0, Kind::Pong); // this one settles
    let packet = b.packet(1, b"to");
    let [(_, datagram)] = &world.udp(b.at, &packet)[..] else { panic!() };
    assert_eq!(back.open(datagram).0, Kind::Recv);
    let packet = a.packet(2, b"from");
    assert!(world.udp(a.at, &packet).is_empty());
    assert_eq!((world.dropped(DropReason::UdpUnknown), world.relay.udp_ids.len()), (1, 2));
    world.relay.handle_disconnected(back.conn);
    assert_eq!(world.relay.udp_ids.len(), 1);
}

#[test]
fn a_device_that_came_back_since_udp_fails_gets_its_packets_over_the_connection() {
    let mut world = World::with_udp();
    let (a, mut b) = (world.join_udp(1, &[2], true), world.join_udp(2, &[1], true));
    assert!(world.rest(&a));
    let mut back = world.join_udp(1, &[2], false);
    world.read(back.conn);
    world.frame(back.conn, &Frame::UdpLost { counter: 0 });
    let packet = b.packet(1, b"to");
    assert!(world.udp(b.at, &packet).is_empty());
    assert_eq!(world.read(back.conn), [Frame::Recv { src: device(2), payload: b"to" }.to_vec()]);
    assert_eq!(world.relay.udp_ids.len(), 2);
    // It may pass again.
    let ping = back.ping(false, 0);
    assert_eq!(world.udp(back.at, &ping).len(), 1);
    assert_eq!(world.answer(&mut back).0, Kind::Pong);
    let packet = b.packet(1, b"again");
    assert_eq!(world.udp(b.at, &packet)[0].0, back.at);
}

#[test]
fn a_session_that_did_not_rest_lends_nothing() {
    let mut world = World::with_udp();
    let mut a = world.join_udp(1, &[2], true);
    let _newer = world.join_udp(1, &[2], false);
    let ping = a.ping(true, 0);
    assert!(world.udp(a.at, &ping).is_empty());
    assert_eq!(world.relay.udp_ids.len(), 1);
}

#[test]
fn a_device_that_leaves_is_gone_at_once_and_only_if_it_rests() {
    let mut world = World::with_udp();
    let mut a = world.join_udp(1, &[2], true);
    let leave =
        |a: &mut UdpDevice| a.seal(Kind::Ping, Ping { nonce: 5, settle: false, leave: true }.to_bytes(), &[]);
    let goodbye = leave(&mut a);
    assert_eq!(world.udp(a.at, &goodbye).len(), 1, "an answer as to any ping");
    assert!(world.rest(&a));
    let late = leave(&mut a);
    let ping = a.ping(true, 0);
    world.udp(a.at, &ping);
    world.udp(a.at, &late);
    assert_eq!(world.relay.stats().clients, 1, "an old goodbye is none");
    let goodbye = leave(&mut a);
    assert!(world.udp(a.at, &goodbye).is_empty());
    assert_eq!((world.relay.stats().clients, world.relay.udp_ids.len(), world.relay.conns.len()), (0, 0, 0));
}
