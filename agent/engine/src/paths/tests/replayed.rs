//! What somebody can do who has recorded probes of the peer and sends them again.

use super::lively::{MS, Talk};
use super::*;

const PING: Message = Message::Ping { txid: [7; TXID_LEN] };

#[test]
fn probes_that_are_sent_again_keep_no_dead_way_in_use() {
    for old in [
        PING,
        Message::Pong { txid: [7; TXID_LEN], observed: None },
        Message::Candidates { request: false, candidates: Default::default(), ports: None },
    ] {
        let mut talk = Talk::new();
        talk.talk(50 * MS, 60);
        let old = talk.keys.seal(&old, nonce(0));
        // Nothing of the peer comes in any more.
        let (died, mut hedged) = (talk.now, None);
        while matches!(talk.paths.path(0).0, Path::Direct { .. }) {
            talk.now += 10 * MS;
            talk.paths.handle_timeout(talk.now);
            if talk.now.since(died).as_millis().is_multiple_of(100) {
                talk.paths.handle_probe(talk.now, talk.way, &old);
            }
            if !talk.send() {
                hedged.get_or_insert(talk.now);
            }
            assert!(talk.now.since(died) < Duration::from_secs(5), "the dead way is given up");
        }
        let hedged = hedged.map(|at| at.since(died));
        assert!(hedged.is_some_and(|took| took <= 750 * MS), "packets take the relay after {hedged:?}");
    }
}

#[test]
fn probes_that_are_sent_again_from_elsewhere_draw_no_packets() {
    let (mut paths, keys) = pair();
    paths.route(START, 0);
    paths.set_relay(START, RELAY, false);
    paths.handle_probe(START, direct(7), &keys.seal(&PING, nonce(1)));
    assert_eq!(paths.route(START, 0), None);
    paths.on_authentic(START, 0, direct(7), Carried::Handshake);
    assert!(paths.route(START, 0).is_some(), "a handshake is answered where it came from");
}

/// A peer that asks keeps the way open, and the other end need not do so as well.
#[test]
fn one_end_keeps_a_way_open_for_both() {
    let mut talk = Talk::new();
    talk.talk(50 * MS, 20);
    talk.answer(Duration::ZERO);
    let mut asked = 0;
    for n in 0..6 {
        talk.now += KEEPALIVE - Duration::from_secs(1);
        talk.paths.handle_timeout(talk.now);
        asked += talk.answer(Duration::ZERO);
        talk.paths.handle_probe(talk.now, talk.way, &talk.keys.seal(&PING, nonce(1_000 + n)));
    }
    assert_eq!(asked, 0);
    talk.now += Duration::from_secs(1);
    assert!(talk.send(), "nor is the way in doubt");
}
