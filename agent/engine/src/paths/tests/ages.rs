//! What is known of a peer grows old.

use super::*;

fn run_until(paths: &mut Paths, end: Instant) {
    while let Some(at) = paths.poll_timeout().filter(|at| *at <= end) {
        paths.handle_timeout(at);
    }
}

/// The peer stays in use for so long, and nothing else happens.
fn use_for(paths: &mut Paths, from: Instant, how_long: Duration) -> Instant {
    let mut now = from;
    while now < from + how_long {
        now = (now + Duration::from_secs(30)).min(from + how_long);
        paths.route(now, 0);
        run_until(paths, now);
    }
    now
}

#[test]
fn an_address_that_never_answered_is_forgotten_after_a_while() {
    let (mut paths, keys) = pair();
    paths.route(START, 0);
    let one = Candidate { kind: CandidateKind::Local, addr: "203.0.113.1:5000".parse().unwrap() };
    let list = Message::Candidates { request: false, candidates: [one].into_iter().collect(), ports: None };
    paths.handle_probe(START, relayed(), &keys.seal(&list, nonce(1)));
    let early = use_for(&mut paths, START, CANDIDATE_AGE - Duration::from_secs(1));
    assert_eq!(active(&paths).remotes(), 1);
    // Who lists it again means it.
    paths.handle_probe(early, relayed(), &keys.seal(&list, nonce(2)));
    let later = use_for(&mut paths, early, CANDIDATE_AGE - Duration::from_secs(1));
    assert_eq!(active(&paths).remotes(), 1);
    use_for(&mut paths, later, Duration::from_secs(31));
    assert_eq!(active(&paths).remotes(), 0);
}

#[test]
fn an_extra_socket_that_was_hit_and_is_not_used_is_given_back_after_a_minute() {
    let (mut paths, keys) = pair();
    paths.route(START, 0);
    let extra = *OPEN_SOCKETS.start();
    paths.set_extra(START, &[extra]);
    let hit = Source::Direct { socket: extra, remote: "203.0.113.1:5000".parse().unwrap() };
    for n in 1..=2 {
        paths.handle_probe(START, hit, &keys.seal(&Message::Ping { txid: [7; TXID_LEN] }, nonce(n)));
    }
    paths.take_sockets_wish();
    let wanted = |paths: &Paths| active(paths).extra_sockets().collect::<Vec<_>>();
    let now = use_for(&mut paths, START, Duration::from_secs(59));
    assert_eq!((wanted(&paths), active(&paths).remotes()), (vec![extra], 1));
    use_for(&mut paths, now, Duration::from_secs(31));
    assert_eq!((wanted(&paths), active(&paths).remotes()), (vec![], 0));
    assert_eq!(paths.take_sockets_wish(), Some(vec![]), "the shell is told");
}
