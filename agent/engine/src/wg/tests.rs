//! What only shows from inside: that nothing is left behind.

use std::time::Duration;

use warren_common::ids::DeviceId;
use warren_common::keys::WgSecretKey;
use warren_common::time::{Instant, Now, UnixTime};

use super::*;

const SOURCE: Source = Source::Signal { device: DeviceId::from_bytes([1; 16]) };

fn start() -> Now {
    Now { boot: Instant::from_nanos(1_000_000_000_000), unix: UnixTime::from_secs(1_800_000_000) }
}

fn pair() -> [(Device, PeerHandle); 2] {
    let secrets = [[1; 32], [2; 32]].map(WgSecretKey::from_bytes);
    let mut a = Device::new(secrets[0].clone(), [3; 32], 0);
    let mut b = Device::new(secrets[1].clone(), [4; 32], 0);
    let to_b = a.add_peer(b.public_key(), None, None).unwrap();
    let to_a = b.add_peer(a.public_key(), None, None).unwrap();
    [(a, to_b), (b, to_a)]
}

/// Carries everything both ways at once until all is quiet.
fn settle(a: &mut Device, b: &mut Device, now: Now) {
    let mut out = [0; 2048];
    loop {
        let mut quiet = true;
        for forth in [true, false] {
            let (from, to) = if forth { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
            while let Some(transmit) = from.poll_transmit(now, &mut out) {
                quiet = false;
                let _ = to.handle(now, SOURCE, &mut out[..transmit.len]);
            }
        }
        if quiet {
            break;
        }
    }
}

#[test]
fn indices_are_freed_with_their_sessions_and_handshakes() {
    let [(mut a, to_b), (mut b, to_a)] = pair();
    let mut now = start();
    for round in 0..50 {
        a.initiate(to_b, now);
        if round % 3 == 0 {
            b.initiate(to_a, now);
        }
        settle(&mut a, &mut b, now);
        // Current, next, two previous and one handshake under way.
        assert!(a.indices.len() <= 5 && b.indices.len() <= 5);
        now = now + Duration::from_secs(6);
        a.handle_timeout(now);
        b.handle_timeout(now);
    }
    now = now + REJECT_AFTER_TIME;
    a.handle_timeout(now);
    settle(&mut a, &mut b, now);
    a.handle_timeout(now + REJECT_AFTER_TIME);
    assert_eq!(a.indices.len(), 0, "by age");
    b.initiate(to_a, now);
    assert!(b.poll_transmit(now, &mut [0; 2048]).is_some());
    assert!(b.indices.len() > 0);
    b.remove_peer(to_a);
    assert_eq!(b.indices.len(), 0, "with the peer");
}

#[test]
fn events_that_nobody_fetches_are_bounded() {
    let [(mut a, peer), _] = pair();
    for _ in 0..MAX_EVENTS + 3 {
        a.push_event(Event::SessionExpired { peer });
    }
    assert_eq!(a.counters().events_dropped, 3);
    assert_eq!(std::iter::from_fn(|| a.poll_event()).count(), MAX_EVENTS);
}

#[test]
fn a_session_is_renewed_before_its_numbers_run_out() {
    let [(mut a, to_b), (mut b, to_a)] = pair();
    let now = start();
    a.initiate(to_b, now);
    settle(&mut a, &mut b, now);
    let later = now + Duration::from_secs(10);
    let (mut packet, mut out) = ([0; 20], [0; 2048]);
    (packet[0], packet[3]) = (0x45, 20);
    for (sent, renews) in [(REKEY_AFTER_MESSAGES - 2, false), (REKEY_AFTER_MESSAGES - 1, true)] {
        let (peer, _) = a.peer_and_indices(to_b.slot()).unwrap();
        peer.activate().current.as_mut().unwrap().sent = sent;
        let len = a.seal(to_b, later, &packet, &mut out).unwrap();
        assert_eq!(b.handle(later, SOURCE, &mut out[..len]).map(drop), Ok(()));
        let next = a.poll_transmit(later, &mut out).map(|transmit| transmit.kind);
        assert_eq!(next, renews.then_some(TransmitKind::Initiation), "after {sent}");
    }
    assert!(b.has_session(to_a, later));
}
