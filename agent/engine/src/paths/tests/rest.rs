//! Who has nothing to say comes to rest, whatever the other end does that has nothing to say either.

use super::lively::MS;
use super::*;

const ONE: Message = Message::Ping { txid: [7; TXID_LEN] };

fn list(request: bool) -> Message {
    Message::Candidates { request, candidates: Default::default(), ports: None }
}

/// Lets the time go on until then.
fn run_until(paths: &mut Paths, end: Instant) {
    while let Some(at) = paths.poll_timeout().filter(|at| *at <= end) {
        paths.handle_timeout(at);
    }
}

#[test]
fn a_ping_is_answered_by_an_idle_end_and_does_not_wake_it() {
    let (mut paths, keys) = pair();
    for n in 0..3 {
        paths.handle_probe(START + n * MS, relayed(), &keys.seal(&ONE, nonce(n)));
        paths.handle_probe(START + n * MS, direct(1), &keys.seal(&ONE, nonce(n)));
    }
    assert_eq!(sent(&mut paths, &keys), (0, 3, 0));
    assert!(!paths.is_active(0) && paths.poll_timeout().is_none());
    for limited in 0..10 {
        for _ in 0..MAX_DERIVATIONS_PER_SECOND {
            paths.handle_probe(START + Duration::from_secs(2), relayed(), &keys.seal(&ONE, nonce(9)));
        }
        assert_eq!(sent(&mut paths, &keys).1 > 0, limited == 0);
    }
}

#[test]
fn only_who_asks_keeps_an_end_awake() {
    for (request, rests) in [(false, true), (true, false)] {
        let (mut paths, keys) = pair();
        paths.route(START, 0);
        let mut now = START;
        for n in 0..20 {
            now = START + Duration::from_secs(20) * n;
            run_until(&mut paths, now);
            if paths.is_active(0) {
                paths.handle_probe(now, relayed(), &keys.seal(&list(request), nonce(n)));
            }
        }
        assert_eq!(!paths.is_active(0), rests, "asked: {request}");
        run_until(&mut paths, now + IDLE_AFTER);
        assert!(!paths.is_active(0));
    }
}

#[test]
fn who_has_nothing_to_say_answers_and_says_and_asks_nothing_of_its_own() {
    let (mut paths, keys) = pair();
    paths.handle_probe(START, relayed(), &keys.seal(&list(true), nonce(1)));
    let asks = |paths: &mut Paths| -> Vec<bool> {
        let mut out = Outbox::with_capacity(1 << 20);
        while !paths.poll_transmit(&mut out) {}
        let lists = out.datagrams().filter_map(|(_, probe)| match keys.open(probe) {
            Ok(Message::Candidates { request, .. }) => Some(request),
            _ => None,
        });
        lists.collect()
    };
    assert_eq!(asks(&mut paths), [false], "an answer");
    // Its port is another one each time it looks, and its relay comes and goes.
    let mut now = START;
    for n in 1..8u8 {
        now = START + Duration::from_secs(20) * u32::from(n);
        run_until(&mut paths, now);
        paths.set_reflexive(
            now,
            [SocketAddr::from(([203, 0, 113, n], 9))].into_iter(),
            Some(PortUse::Random),
        );
        [false, true].into_iter().for_each(|up| assert!(paths.set_relay(now, RELAY, up)));
        run_until(&mut paths, now + ANNOUNCE_INTERVAL);
    }
    assert_eq!(asks(&mut paths), [false; 0]);
    // Now it has.
    assert!(paths.is_active(0));
    now += ANNOUNCE_INTERVAL;
    paths.route(now, 0);
    assert_eq!(asks(&mut paths), [true]);
    paths.set_reflexive(now, ["203.0.113.99:9".parse().unwrap()].into_iter(), Some(PortUse::Random));
    run_until(&mut paths, now + ANNOUNCE_INTERVAL);
    assert_eq!(asks(&mut paths), [true]);
}
