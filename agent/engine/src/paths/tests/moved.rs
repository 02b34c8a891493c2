//! A peer that moves is looked for where it is, and not where it was.

use super::*;

#[test]
fn a_budget_is_so_many_at_once_and_so_many_a_minute_one_by_one() {
    let mut budget = Budget::default();
    let taken = |budget: &mut Budget, now| (0..1_000).filter(|_| budget.take(now, 120)).count();
    assert_eq!(budget.next(START, 120), START);
    assert_eq!(taken(&mut budget, START), 120);
    let next = budget.next(START, 120);
    assert_eq!(next, START + Duration::from_millis(500));
    assert_eq!(taken(&mut budget, START + Duration::from_millis(499)), 0);
    assert_eq!(taken(&mut budget, next), 1);
    let minute = Duration::from_secs(60);
    let later: usize = (1..=60).map(|s| taken(&mut budget, next + Duration::from_secs(s))).sum();
    assert_eq!(later, 120);
    assert_eq!(taken(&mut budget, next + 10 * minute), 120, "no more than that is saved up");
}

/// Where pings went since the last look.
fn pinged(paths: &mut Paths, keys: &ProbeKeys) -> Vec<SocketAddr> {
    let mut out = Outbox::with_capacity(1 << 22);
    while !paths.poll_transmit(&mut out) {}
    let pings = out.datagrams().filter_map(|(to, probe)| match (to, keys.open(probe)) {
        (Destination::Direct { remote, .. }, Ok(Message::Ping { .. })) => Some(remote),
        _ => None,
    });
    pings.collect()
}

/// Answers the pings that went there at once; those that went elsewhere get no answer.
fn answer(paths: &mut Paths, keys: &ProbeKeys, now: Instant, there: &[SocketAddr]) {
    let mut out = Outbox::with_capacity(1 << 22);
    while !paths.poll_transmit(&mut out) {}
    for (to, probe) in out.datagrams() {
        if let (Destination::Direct { socket, remote }, Ok(Message::Ping { txid })) = (to, keys.open(probe))
            && there.contains(&remote)
        {
            let pong = keys.seal(&Message::Pong { txid, observed: None }, nonce(7));
            paths.handle_probe(now, Source::Direct { socket, remote }, &pong);
        }
    }
}

/// A list of addresses that are as good as each other.
fn list(addrs: &[SocketAddr], request: bool) -> Message {
    let one = |addr: &SocketAddr| Candidate { kind: CandidateKind::Reflexive, addr: *addr };
    Message::Candidates { request, candidates: addrs.iter().map(one).collect(), ports: None }
}

#[test]
fn a_peer_that_moved_is_sent_to_where_it_answers_and_not_where_it_did() {
    let (mut paths, keys) = pair();
    let [first, second, third] = [1, 2, 3].map(|n| SocketAddr::from(([203, 0, 113, n], 5_000)));
    paths.route(START, 0);
    paths.handle_probe(START, relayed(), &keys.seal(&list(&[first, second], false), nonce(1)));
    answer(&mut paths, &keys, START, &[first, second]);
    assert_eq!(paths.path(0).0, Path::Direct { endpoint: first });
    // Both worked a moment ago. Now it is heard over the relay, and is at none of them.
    let moved = START + Duration::from_secs(1);
    run_until(&mut paths, moved);
    answer(&mut paths, &keys, moved, &[]);
    paths.handle_probe(moved, relayed(), &keys.seal(&list(&[third], true), nonce(2)));
    let later = moved + Duration::from_millis(20);
    answer(&mut paths, &keys, later, &[third]);
    assert_eq!(paths.path(0).0, Path::Direct { endpoint: third });
    assert!(matches!(paths.route(later, 0), Some(Destination::Direct { remote, .. }) if remote == third));
}

/// Lets the time go on until then.
fn run_until(paths: &mut Paths, end: Instant) {
    while let Some(at) = paths.poll_timeout().filter(|at| *at <= end) {
        paths.handle_timeout(at);
    }
}

#[test]
fn a_peer_that_moves_when_the_budget_is_spent_is_pinged_where_it_is_all_the_same() {
    let (mut paths, keys) = pair();
    paths.route(START, 0);
    for n in 0..20 {
        paths.handle_probe(START, relayed(), &keys.seal(&candidates(n), nonce(n.into())));
    }
    pinged(&mut paths, &keys);
    assert!(paths.counters().probe_limited > 0, "it is spent");
    // It is somewhere else now, with an address that leads there and others that don't.
    let moved = START + Duration::from_secs(1);
    run_until(&mut paths, moved);
    pinged(&mut paths, &keys);
    let listed: Vec<SocketAddr> = (1..=3).map(|n| SocketAddr::from(([198, 51, 100, n], 7_000))).collect();
    paths.handle_probe(moved, relayed(), &keys.seal(&list(&listed, true), nonce(99)));
    run_until(&mut paths, moved + Duration::from_millis(2_100));
    let pinged = pinged(&mut paths, &keys);
    for addr in &listed {
        assert!(pinged.contains(addr), "{addr} within two seconds: {pinged:?}");
    }
    assert!(pinged.iter().all(|addr| listed.contains(addr)), "and nothing is spent on where it was");
}

#[test]
fn what_a_peer_lists_no_more_is_forgotten_unless_it_works() {
    let (mut paths, keys) = pair();
    let [first, second, third] = [1, 2, 3].map(|n| SocketAddr::from(([203, 0, 113, n], 5_000)));
    paths.handle_probe(START, relayed(), &keys.seal(&list(&[first, second], false), nonce(1)));
    answer(&mut paths, &keys, START, &[first]);
    assert_eq!(paths.path(0).0, Path::Direct { endpoint: first });
    // A list of nothing says nothing.
    paths.handle_probe(START, relayed(), &keys.seal(&list(&[], false), nonce(3)));
    assert_eq!(active(&paths).remotes(), 2);
    // The way in use stays, and what was seen and never listed.
    paths.handle_probe(START, direct(9), &keys.seal(&Message::Ping { txid: [1; TXID_LEN] }, nonce(4)));
    paths.handle_probe(START, relayed(), &keys.seal(&list(&[third], false), nonce(5)));
    let Source::Direct { remote: seen, .. } = direct(9) else { unreachable!("it is direct") };
    let known = active(&paths).endpoints();
    assert_eq!(known.len(), 3, "{known:?}");
    assert!([first, third, seen].iter().all(|addr| known.contains(addr)), "{known:?}");
}
