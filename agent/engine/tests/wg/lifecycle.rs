//! Sessions and timers of two devices, one behaviour a test.

use warren_common::time::UnixTime;
use warren_engine::wg::{
    Destination, DropReason, Event, INITIATION_INTERVAL, KEEPALIVE_TIMEOUT, MAX_HANDSHAKE_ATTEMPTS,
    MAX_QUEUED_PACKETS, PeerStats, REPEAT_INITIATION_AFTER, Received, SealError, TransmitKind, WakeReason,
    receiver_shard,
};

use crate::net::{Net, ip_packet, ms, secs, source};

#[test]
fn the_first_packet_waits_for_the_handshake_and_arrives() {
    let mut net = Net::new(1, Some([9; 32]), [None, None]);
    let (id, result) = net.send(0, 100);
    assert_eq!(result, Err(SealError::Queued));
    net.run(ms(100));
    assert_eq!(net.hosts[1].got.get(&id), Some(&1));
    for host in &net.hosts {
        assert!(matches!(host.events[..], [Event::SessionEstablished { renewed: false, .. }]));
        let stats = host.device.peer_stats(host.peer).unwrap();
        assert_eq!(stats.last_handshake.map(UnixTime::as_secs), Some(1_800_000_000));
    }
    // The packet itself told the responder that the keys work: no keepalive beside it.
    assert_eq!(
        net.hosts[0].sent_kinds.iter().map(|k| k.1).collect::<Vec<_>>(),
        [TransmitKind::Initiation, TransmitKind::Data]
    );
    let stats =
        |n: usize| net.hosts[n].device.peer_stats(net.hosts[n].peer).map(|s| (s.rx_bytes, s.tx_bytes));
    assert_eq!(stats(0), Some((92, 148 + 112 + 32)));
    assert_eq!(stats(1), Some((148 + 112 + 32, 92)));
}

#[test]
fn the_queue_is_bounded_and_keeps_the_newest() {
    let mut net = Net::new(2, None, [None, None]);
    let ids: Vec<u64> = (0..MAX_QUEUED_PACKETS + 3).map(|_| net.send(0, 60).0).collect();
    assert_eq!(net.hosts[0].device.counters().queued_packets_dropped, 3);
    net.run(ms(100));
    let got: Vec<u64> = net.hosts[1].got.keys().copied().collect();
    assert_eq!(got, ids[3..]);
}

#[test]
fn a_handshake_without_answer_is_retried_with_jitter_and_given_up() {
    let mut net = Net::new(3, None, [None, None]);
    net.link.loss = 1000;
    net.post(0);
    net.run(secs(120));
    let host = &net.hosts[0];
    let mut times: Vec<_> = host.sent_kinds.iter().map(|(now, _)| now.boot).collect();
    let began = times[0];
    let repeats = times.extract_if(1..3, |_| true).map(|at| at.since(began));
    assert_eq!(repeats.collect::<Vec<_>>(), REPEAT_INITIATION_AFTER);
    assert_eq!(times.len(), MAX_HANDSHAKE_ATTEMPTS as usize);
    let gaps: Vec<_> = times.windows(2).map(|w| w[1].since(w[0])).collect();
    assert!(gaps.iter().all(|gap| *gap >= secs(5) && *gap < ms(5334)), "{gaps:?}");
    assert!(gaps.iter().any(|gap| *gap != gaps[0]));
    assert!(matches!(host.events[..], [Event::HandshakeFailed { .. }]));
    assert_eq!(host.device.counters().queued_packets_dropped, 1);
    assert_eq!(net.hosts[0].device.poll_timeout(), None, "at rest");
    // The next packet tries again.
    net.link.loss = 0;
    let id = net.post(0);
    net.run(ms(100));
    assert_eq!(net.hosts[1].got.get(&id), Some(&1));
}

#[test]
fn a_lost_initiation_or_response_costs_a_second_not_five() {
    for response in [false, true] {
        let mut net = Net::new(14, None, [None, None]);
        net.link.loss = if response { 0 } else { 1000 };
        let id = net.post(0);
        net.link.loss = if response { 1000 } else { 0 };
        net.run(ms(100));
        assert_eq!(net.hosts[1].device.peer_stats(net.hosts[1].peer).unwrap().tx_bytes > 0, response);
        net.link.loss = 0;
        net.run(ms(900) - ms(1));
        assert!(net.hosts[1].got.is_empty());
        net.run(ms(32));
        assert_eq!(net.hosts[1].got.get(&id), Some(&1), "response lost: {response}");
        let sent = net.hosts[0].sent_kinds.len();
        net.run(secs(5));
        assert_eq!(net.hosts[0].sent_kinds.len(), sent, "no more of either");
        for host in &net.hosts {
            assert_eq!(host.established(), 1);
        }
    }
}

#[test]
fn a_response_is_repeated_until_the_session_is_confirmed_and_not_in_a_row() {
    let mut net = Net::new(15, None, [None, None]);
    let now = net.now;
    let [a, b] = &mut net.hosts;
    let mut initiation = a.initiation(now);
    assert!(b.device.handle(now, source(0), &mut initiation.clone()).is_ok());
    let (_, mut response) = b.transmit(now).unwrap();
    let mut again = |at, from| {
        let replayed = b.device.handle(at, from, &mut initiation.clone());
        assert_eq!(replayed, Err(DropReason::ReplayedInitiation));
        b.transmit(at)
    };
    assert_eq!(again(now + INITIATION_INTERVAL / 2, source(0)), None);
    let later = now + INITIATION_INTERVAL;
    let (to, repeated) = again(later, source(7)).unwrap();
    assert!(matches!(to, Destination::Reply { source: to, .. } if to == source(7)), "to who asked");
    assert_eq!(repeated, response);
    assert_eq!(again(later + ms(1), source(0)), None);
    a.device.handle(later, source(1), &mut response).unwrap();
    let (_, mut keepalive) = a.transmit(later).unwrap();
    assert!(matches!(b.device.handle(later, source(0), &mut keepalive), Ok(Received::Keepalive { .. })));
    let replayed = b.device.handle(later + secs(1), source(0), &mut initiation);
    assert_eq!(replayed, Err(DropReason::ReplayedInitiation));
    assert_eq!(b.transmit(later + secs(1)), None);
}

#[test]
fn a_replay_does_not_hold_up_the_next_initiation() {
    let mut net = Net::new(16, None, [None, None]);
    let now = net.now;
    let [a, b] = &mut net.hosts;
    let mut initiation = a.initiation(now);
    assert!(b.device.handle(now, source(0), &mut initiation.clone()).is_ok());
    let later = now + INITIATION_INTERVAL;
    let replayed = b.device.handle(later, source(9), &mut initiation);
    assert_eq!(replayed, Err(DropReason::ReplayedInitiation));
    a.device.handle_timeout(now + secs(6));
    let (_, mut next) = a.transmit(now + secs(6)).unwrap();
    assert!(b.device.handle(later + ms(1), source(0), &mut next).is_ok());
}

#[test]
fn a_received_packet_is_answered_by_one_keepalive_and_then_all_is_quiet() {
    let mut net = Net::new(4, None, [None, None]);
    net.connect();
    let before = net.hosts[1].sent_kinds.len();
    net.run(KEEPALIVE_TIMEOUT + ms(100));
    let after: Vec<_> = net.hosts[1].sent_kinds[before..].iter().map(|k| k.1).collect();
    assert_eq!(after, [TransmitKind::Keepalive]);
    net.run(secs(150));
    assert_eq!(net.hosts[1].sent_kinds.len(), before + 1);
    assert_eq!(net.hosts[0].count(TransmitKind::Initiation), 1);
}

#[test]
fn a_packet_without_any_answer_makes_a_new_handshake_after_15_s() {
    let mut net = Net::new(5, None, [None, None]);
    net.connect();
    net.run(secs(30));
    net.link.loss = 1000;
    net.post(0);
    net.run(ms(14_900));
    assert_eq!(net.hosts[0].count(TransmitKind::Initiation), 1);
    net.run(ms(500));
    assert_eq!(net.hosts[0].count(TransmitKind::Initiation), 2);
    assert_eq!(net.hosts[0].wakes[&WakeReason::AnswerDue], 1);
}

#[test]
fn an_idle_session_expires_on_both_sides_and_costs_nothing_after() {
    let mut net = Net::new(6, None, [None, None]);
    net.connect();
    net.run(secs(200));
    for host in &mut net.hosts {
        assert!(matches!(host.events.last(), Some(Event::SessionExpired { .. })));
        assert!(!host.device.has_session(host.peer, net.now));
        assert_eq!(host.device.poll_timeout(), None);
    }
}

#[test]
fn only_the_initiator_renews_by_time() {
    let mut net = Net::new(7, None, [None, None]);
    net.connect();
    // The responder alone sends; the initiator answers with keepalives and renews.
    for _ in 0..300 {
        assert!(net.send(1, 60).1.is_ok());
        net.run(secs(1));
    }
    assert_eq!(net.hosts[1].count(TransmitKind::Initiation), 0);
    assert_eq!(net.hosts[0].count(TransmitKind::Initiation), 3);
    assert_eq!(net.hosts[1].established(), 3);
}

#[test]
fn persistent_keepalives_make_and_keep_a_session_without_packets() {
    let mut net = Net::new(8, None, [Some(secs(25)), None]);
    net.drain(0);
    net.run(secs(600));
    assert!(net.hosts[0].device.has_session(net.hosts[0].peer, net.now));
    let keepalives = net.hosts[0].count(TransmitKind::Keepalive);
    assert!((20..=30).contains(&keepalives), "{keepalives}");
    assert_eq!(net.hosts[0].established(), 5);
    // Out of reach for an hour, it goes on trying and is back at once.
    net.link.loss = 1000;
    net.run(secs(3600));
    net.link.loss = 0;
    net.run(secs(6));
    assert!(net.hosts[1].device.has_session(net.hosts[1].peer, net.now));
}

#[test]
fn after_a_long_sleep_the_session_is_over_and_the_next_packet_makes_a_new_one() {
    let mut net = Net::new(9, None, [None, None]);
    net.connect();
    net.now = net.now + secs(8 * 3600);
    let (id, result) = net.send(0, 60);
    assert_eq!(result, Err(SealError::Queued), "even before the timers were served");
    net.run(ms(100));
    assert_eq!(net.hosts[1].got.get(&id), Some(&1));
    for host in &net.hosts {
        assert_eq!(host.established(), 2);
    }
}

#[test]
fn a_peer_that_restarted_without_memory_is_understood_at_once() {
    let mut net = Net::new(10, None, [None, None]);
    net.connect();
    let fresh = Net::new(10, None, [None, None]);
    let [_, reborn] = fresh.hosts;
    net.hosts[1] = reborn;
    net.run(secs(3));
    let id = net.post(1);
    net.run(ms(100));
    assert_eq!(net.hosts[0].got.get(&id), Some(&1));
    let (id, result) = net.send(0, 60);
    assert!(result.is_ok());
    net.run(ms(100));
    assert_eq!(net.hosts[1].got.get(&id), Some(&1));
}

#[test]
fn the_wall_clock_may_go_back() {
    let mut net = Net::new(11, None, [None, None]);
    net.connect();
    net.run(secs(200));
    net.now.unix = UnixTime::from_secs(1_000);
    let id = net.post(0);
    net.run(ms(100));
    assert_eq!(net.hosts[1].got.get(&id), Some(&1));
    // Restarted with the clock still wrong: understood only thanks to the floor it kept.
    let floor = net.hosts[0].device.timestamp_floor();
    assert!(floor >= UnixTime::from_secs(1_799_999_999));
    for (keep, wanted) in [(false, None), (true, Some(&1))] {
        let fresh = Net::new(11, None, [None, None]);
        let [reborn, _] = fresh.hosts;
        net.hosts[0] = reborn;
        if keep {
            net.hosts[0].device.raise_timestamp_floor(floor);
        }
        let id = net.post(0);
        net.run(ms(100));
        assert_eq!(net.hosts[1].got.get(&id), wanted, "floor kept: {keep}");
    }
}

#[test]
fn a_new_path_repeats_the_initiation_byte_for_byte() {
    let mut net = Net::new(12, None, [None, None]);
    let mut out = [0; 2048];
    let now = net.now;
    let host = &mut net.hosts[0];
    let _ = host.device.seal(host.peer, now, &ip_packet(1, 60), &mut out);
    let first = host.device.poll_transmit(now, &mut out).unwrap();
    let message = out[..first.len].to_vec();
    assert_eq!(host.device.poll_transmit(now, &mut out), None);
    host.device.resend_handshake(host.peer, now);
    let again = host.device.poll_transmit(now, &mut out).unwrap();
    assert_eq!(first, again);
    assert_eq!(out[..again.len], message);
    // Both arrive: one is answered, the other is a replay and harmless.
    let other = &mut net.hosts[1].device;
    assert!(other.handle(now, source(0), &mut message.clone()).is_ok());
    assert_eq!(other.handle(now, source(9), &mut message.clone()), Err(DropReason::ReplayedInitiation));
    let reply = other.poll_transmit(now, &mut out).unwrap();
    assert!(matches!(reply.to, Destination::Reply { source: to, peer: Some(_) } if to == source(0)));
    assert_eq!(receiver_shard(&message), None);
    assert_eq!(receiver_shard(&out[..reply.len]), Some(0));
    let got = net.hosts[0].device.handle(now, source(1), &mut out[..reply.len]);
    assert!(matches!(got, Ok(Received::Response { .. })));
}

#[test]
fn an_initiation_can_be_read_on_one_shard_and_accepted_on_another() {
    let mut net = Net::new(13, None, [None, None]);
    let now = net.now;
    let [a, b] = &mut net.hosts;
    let initiation = a.initiation(now);
    let initiation = b.device.read_initiation(now, source(0), &initiation).unwrap();
    assert_eq!(initiation.peer_key(), a.device.public_key());
    assert!(matches!(
        b.device.accept_initiation(now, initiation),
        Ok(Received::Initiation { peer }) if peer == b.peer
    ));
    assert_eq!(b.device.read_initiation(now, source(0), &[4; 32]).err(), Some(DropReason::Malformed));
}

#[test]
fn a_removed_peer_is_gone_and_its_handle_finds_nothing() {
    let mut net = Net::new(14, None, [None, None]);
    net.connect();
    let now = net.now;
    let mut out = [0; 2048];
    let (_, sealed) = net.send(0, 60);
    assert!(sealed.is_ok());
    let host = &mut net.hosts[1];
    let (key, psk) = (host.device.peer_key(host.peer).unwrap(), None);
    assert!(host.device.remove_peer(host.peer));
    assert!(!host.device.remove_peer(host.peer));
    assert_eq!(host.device.poll_timeout(), None);
    assert_eq!(host.device.peer_stats(host.peer), None);
    assert_eq!(host.device.seal(host.peer, now, &ip_packet(1, 60), &mut out), Err(SealError::UnknownPeer));
    let again = host.device.add_peer(key, psk, None).unwrap();
    assert_ne!(again, host.peer);
    assert_eq!(host.device.find_peer(&key), Some(again));
    assert_eq!(host.device.peer_stats(again), Some(PeerStats::default()), "nothing is inherited");
    net.run(ms(100));
    assert_eq!(net.hosts[1].drops.get(&DropReason::UnknownIndex), Some(&1));
}
