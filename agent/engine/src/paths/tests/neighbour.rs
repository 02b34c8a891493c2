//! A peer behind our own NAT, which turns packets round: it has two ways, and one of them is the shorter.

use std::net::{IpAddr, Ipv4Addr};

use warren_common::wire::probe::TxId;

use super::*;

const INSIDE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 168, 1, 11)), 5_000);
const OUTSIDE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 6_000);

/// It lists both.
fn listed(request: bool) -> Message {
    let candidates = [(CandidateKind::Local, INSIDE), (CandidateKind::Reflexive, OUTSIDE)];
    let candidates = candidates.into_iter().map(|(kind, addr)| Candidate { kind, addr }).collect();
    Message::Candidates { request, candidates, ports: None }
}

/// In use since now; both ways have been asked.
fn neighbours() -> (Paths, ProbeKeys) {
    let (mut paths, keys) = pair();
    paths.set_local(START, &[LocalSocket { id: 0, addr: "192.168.1.10:5000".parse().unwrap() }]);
    paths.set_reflexive(START, [SocketAddr::new(OUTSIDE.ip(), 5_000)].into_iter(), None);
    paths.route(START, 0);
    paths.handle_probe(START, relayed(), &keys.seal(&listed(false), nonce(1)));
    (paths, keys)
}

/// The pings that wait to be sent.
fn pings(paths: &mut Paths, keys: &ProbeKeys) -> Vec<(SocketAddr, TxId)> {
    let mut out = Outbox::with_capacity(1 << 22);
    while !paths.poll_transmit(&mut out) {}
    let pings = out.datagrams().filter_map(|(to, probe)| match (to, keys.open(probe)) {
        (Destination::Direct { remote, .. }, Ok(Message::Ping { txid })) => Some((remote, txid)),
        _ => None,
    });
    pings.collect()
}

/// The answer to each of them that went there.
fn pong(paths: &mut Paths, keys: &ProbeKeys, now: Instant, pings: &[(SocketAddr, TxId)], there: SocketAddr) {
    let mut answered = 0;
    for (remote, txid) in pings.iter().filter(|(remote, _)| *remote == there) {
        let pong = keys.seal(&Message::Pong { txid: *txid, observed: None }, nonce(7));
        paths.handle_probe(now, Source::Direct { socket: 0, remote: *remote }, &pong);
        answered += 1;
    }
    assert!(answered > 0, "nothing went to {there}: {pings:?}");
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn run_until(paths: &mut Paths, end: Instant) {
    while let Some(at) = paths.poll_timeout().filter(|at| *at <= end) {
        paths.handle_timeout(at);
    }
}

const WITHIN: Path = Path::Direct { endpoint: INSIDE };
const AROUND: Path = Path::Direct { endpoint: OUTSIDE };

#[test]
fn its_own_address_has_time_to_answer_before_the_way_around_is_taken() {
    let (mut paths, keys) = neighbours();
    let asked = pings(&mut paths, &keys);
    pong(&mut paths, &keys, START + ms(3), &asked, OUTSIDE);
    assert_eq!(paths.path(0).0, Path::Relay { relay: RELAY });
    pong(&mut paths, &keys, START + ms(4), &asked, INSIDE);
    assert_eq!(paths.path(0).0, WITHIN);
    // It does not answer: what there is gets taken.
    let (mut paths, keys) = neighbours();
    let asked = pings(&mut paths, &keys);
    pong(&mut paths, &keys, START + ms(3), &asked, OUTSIDE);
    run_until(&mut paths, START + ms(15));
    assert_eq!(paths.path(0).0, Path::Relay { relay: RELAY });
    run_until(&mut paths, START + ms(16));
    assert_eq!(paths.path(0).0, AROUND);
    // Answering in the end, and as soon, it is the better one, though the other is in use.
    pings(&mut paths, &keys);
    let round = START + ms(150);
    run_until(&mut paths, round);
    let asked = pings(&mut paths, &keys);
    pong(&mut paths, &keys, round + ms(3), &asked, INSIDE);
    assert_eq!(paths.path(0).0, WITHIN);
}

#[test]
fn after_a_silence_it_is_asked_at_once_when_the_way_around_answers_first() {
    for answers in [true, false] {
        let (mut paths, keys) = neighbours();
        let asked = pings(&mut paths, &keys);
        pong(&mut paths, &keys, START + ms(1), &asked, INSIDE);
        assert_eq!(paths.path(0).0, WITHIN);
        // A ping of the peer's from outside, where a round of its own is due: is it somewhere else?
        let later = START + Duration::from_secs(20);
        run_until(&mut paths, later);
        pings(&mut paths, &keys);
        let ping = keys.seal(&Message::Ping { txid: [9; TXID_LEN] }, nonce(2));
        paths.handle_probe(later, Source::Direct { socket: 0, remote: OUTSIDE }, &ping);
        let asked = pings(&mut paths, &keys);
        pong(&mut paths, &keys, later + ms(1), &asked, OUTSIDE);
        assert_eq!(paths.path(0).0, WITHIN);
        if answers {
            pong(&mut paths, &keys, later + ms(3), &asked, INSIDE);
        }
        run_until(&mut paths, later + ms(30));
        assert_eq!(paths.path(0).0, if answers { WITHIN } else { AROUND });
    }
}
