use super::*;

/// A device that is back, and the others that it may send to.
fn early(limits: Limits) -> (World, ConnId) {
    let mut world = World::restarted(limits);
    let a = world.join(1, 1, &[2, 3]);
    world.read(a);
    (world, a)
}

fn gone(n: u8) -> Vec<u8> {
    Frame::PeerGone { device: device(n), why: GoneReason::NotConnected }.to_vec()
}

#[test]
fn packets_wait_for_a_device_that_comes_back_after_its_peer() {
    let (mut world, a) = early(limits());
    world.send(a, 2, b"one");
    world.pass(RETURN_TIME / 2);
    world.send(a, 2, b"two");
    assert!(world.read(a).is_empty());
    let stats = world.relay.stats();
    assert!(stats.queued_bytes > 0 && stats.counters.forwarded_packets == 0);
    let b = world.join(2, 1, &[1]);
    assert_eq!(world.received(b), [b"one", b"two"].map(|word| (device(1), word.to_vec())));
    world.send(b, 1, b"three");
    assert_eq!(world.received(a), [(device(2), b"three".to_vec())]);
    world.pass(RETURN_TIME);
    let stats = world.relay.stats();
    assert_eq!((stats.counters.forwarded_packets, stats.queued_bytes), (3, 0));
    assert_eq!(world.dropped(DropReason::NotConnected), 0);
}

#[test]
fn who_does_not_come_back_in_time_is_gone() {
    let (mut world, a) = early(limits());
    (0..3).for_each(|_| world.send(a, 2, b"hello"));
    world.send(a, 3, b"hello");
    let due = world.relay.poll_timeout().unwrap();
    assert_eq!(due.since(world.now.boot), RETURN_TIME);
    world.pass(due.since(world.now.boot));
    assert_eq!(world.read(a), [gone(2), gone(3)], "each is told of once");
    assert_eq!((world.dropped(DropReason::NotConnected), world.relay.stats().queued_bytes), (4, 0));
    // Nobody is waited for any more.
    world.send(a, 2, b"hello");
    assert_eq!(world.read(a), [gone(2)]);
    let b = world.join(2, 1, &[1]);
    assert_eq!(world.received(b), []);
}

#[test]
fn packets_wait_for_those_alone_that_the_token_names() {
    let (mut world, a) = early(limits());
    world.send(a, 4, b"hello");
    let refused = Frame::PeerGone { device: device(4), why: GoneReason::NotPermitted }.to_vec();
    assert_eq!((world.read(a), world.relay.stats().queued_bytes), (vec![refused], 0));
    // What was sent when it was permitted does not arrive when it is not any more.
    for n in [2, 3] {
        world.send(a, n, b"hello");
    }
    world.relay.set_minimum_revision(device(1), 2, world.now);
    assert_eq!((world.dropped(DropReason::Withdrawn), world.relay.stats().queued_bytes), (2, 0));
    let b = world.join(2, 1, &[1]);
    assert_eq!(world.received(b), []);
    world.pass(RETURN_TIME);
    assert_eq!(world.dropped(DropReason::NotConnected), 0);
}

#[test]
fn what_waits_for_absent_devices_is_bounded_for_each_and_for_all() {
    let limits = Limits { max_clients: 20, rate: u64::MAX, burst: u64::MAX, ..limits() };
    let mut world = World::restarted(limits.clone());
    let all: Vec<u8> = (2..100).collect();
    let a = world.join(1, 1, &all);
    // Handshakes are no way around it.
    let handshake: Vec<u8> = [1].into_iter().chain([0; 147]).collect();
    assert!(is_handshake(&handshake));
    for _ in 0..1_000 {
        world.send(a, 2, &handshake);
        world.send(a, 2, &[9; 500]);
        assert!(world.relay.stats().queued_bytes <= limits.queue_bytes);
    }
    for _ in 0..100 {
        for n in &all {
            world.send(a, *n, &[9; 1_000]);
            assert!(world.relay.stats().queued_bytes <= limits.total_queue_bytes);
        }
    }
    assert_eq!(world.relay.absent.devices(), limits.max_clients);
    assert!(world.dropped(DropReason::QueueFull) > 0 && world.dropped(DropReason::MemoryFull) > 0);
    // What is too much for it goes nowhere, as at any other time.
    assert!(world.dropped(DropReason::NotConnected) > 0);
    let b = world.join(2, 1, &[1]);
    let got = world.received(b);
    assert_eq!(got.last(), Some(&(device(1), vec![9; 1_000])), "the newest are kept");
    world.pass(RETURN_TIME);
    assert_eq!((world.read(b).len(), world.relay.stats().queued_bytes), (0, 0));
}
