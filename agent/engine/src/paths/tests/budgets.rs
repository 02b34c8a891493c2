//! What is spent on one thing must not be missing for another.

use super::lively::{MS, Talk};
use super::*;

/// How often the way is asked until it is given up, from now on.
fn asked_until_dead(talk: &mut Talk) -> usize {
    let (since, mut asked) = (talk.now, 0);
    while matches!(talk.paths.path(0).0, Path::Direct { .. }) {
        talk.now += 10 * MS;
        talk.send();
        talk.paths.handle_timeout(talk.now);
        let mut out = Outbox::new();
        talk.paths.poll_transmit(&mut out);
        let pings = out.datagrams().filter(|(to, bytes)| {
            let short = bytes.len() <= probe::MAX_PROBE_LEN;
            short
                && matches!(to, Destination::Direct { .. })
                && matches!(talk.keys.open(bytes), Ok(Message::Ping { .. }))
        });
        asked += pings.count();
        assert!(talk.now.since(since) < Duration::from_secs(10), "it is dead");
    }
    asked
}

#[test]
fn a_way_is_asked_before_it_is_given_up_whatever_relays_and_announcements_have_cost() {
    let mut talk = Talk::new();
    let relays: Vec<RelayId> = (50..50 + 8).map(|n| RelayId::from_bytes([n; 16])).collect();
    talk.paths.set_peer_relays(talk.now, relays.iter().copied());
    relays.iter().for_each(|relay| assert!(talk.paths.set_relay(talk.now, *relay, true)));
    assert!(asked_until_dead(&mut talk) >= 5);
    sent(&mut talk.paths, &talk.keys);
    // A connection to a relay that comes and goes starts a round each time.
    let (mut pings, mut announced) = (0, 0);
    for _ in 0..25 {
        talk.now += 200 * MS;
        [false, true].into_iter().for_each(|up| assert!(talk.paths.set_relay(talk.now, relays[0], up)));
        talk.paths.handle_timeout(talk.now);
        let (some, _, lists) = sent(&mut talk.paths, &talk.keys);
        (pings, announced) = (pings + some, announced + lists);
    }
    assert!((MAX_RELAY_PINGS_PER_MINUTE as usize..200).contains(&pings), "{pings} pings");
    assert!((20..=MAX_ANNOUNCEMENTS_PER_MINUTE as usize).contains(&announced), "{announced} announcements");
    talk.now += 200 * MS;
    [false, true].into_iter().for_each(|up| assert!(talk.paths.set_relay(talk.now, relays[0], up)));
    assert!(talk.answer(20 * MS) > 0);
    assert!(matches!(talk.paths.path(0).0, Path::Direct { .. }));
    assert!(asked_until_dead(&mut talk) >= 5);
}

#[test]
fn a_way_in_use_is_not_asked_all_the_time_whatever_brings_it_about() {
    let mut talk = Talk::new();
    talk.talk(20 * MS, 50);
    sent(&mut talk.paths, &talk.keys);
    // Requests, and probes of the peer's from elsewhere, a thousand a second.
    let (mut asked, start) = (0, talk.now);
    let old = talk.keys.seal(&Message::Ping { txid: [7; TXID_LEN] }, nonce(0));
    let list = Message::Candidates { request: true, candidates: Default::default(), ports: None };
    let list = talk.keys.seal(&list, nonce(1));
    while talk.now.since(start) < Duration::from_secs(60) {
        talk.now += MS;
        talk.paths.handle_probe(talk.now, direct(900), &old);
        talk.paths.handle_probe(talk.now, relayed(), &list);
        asked += talk.answer(Duration::ZERO);
        assert!(matches!(talk.paths.path(0).0, Path::Direct { .. }));
    }
    // What looks for a path is so much at once, and as much in the minute.
    let most = 2 * MAX_PROBES_PER_MINUTE + MAX_CHECKS_PER_MINUTE + MAX_LONG_PROBES_PER_MINUTE;
    assert!(asked as u32 <= most, "{asked} pings");
    assert!(talk.paths.counters().probe_limited > 0);
}
