//! Bounds: what a remote party can make grow, and how often it can make us speak.

use super::*;
use warren_common::wire::probe::{Candidate, CandidateKind, Ports, TXID_LEN};

mod ages;
mod budgets;
mod lively;
mod moved;
mod neighbour;
mod replayed;
mod rest;

const B: DeviceId = DeviceId::from_bytes([2; 16]);
const RELAY: RelayId = RelayId::from_bytes([3; 16]);
const START: Instant = Instant::from_nanos(1_000_000_000_000);

/// A's paths with B as peer 0, and B's keys.
fn pair() -> (Paths, ProbeKeys) {
    let (a, b) = (ProbeSecretKey::from_bytes([1; 32]), ProbeSecretKey::from_bytes([2; 32]));
    let keys = ProbeKeys::derive(&b, &b.public(), &a.public()).unwrap();
    let mut paths = Paths::new(a, [5; 32], 1_420);
    paths.set_overlay(START, "100.64.0.0/10".parse().unwrap(), "fd00::/48".parse().unwrap());
    paths.set_local(START, &[LocalSocket { id: 0, addr: "192.0.2.1:1000".parse().unwrap() }]);
    paths.set_relay(START, RELAY, true);
    paths.insert(0, B, b.public(), Some(RELAY));
    (paths, keys)
}

fn relayed() -> Source {
    Source::Relay { relay: RELAY, device: B }
}

fn direct(n: u16) -> Source {
    let [high, low] = n.to_be_bytes();
    Source::Direct { socket: 0, remote: SocketAddr::from(([203, 0, high, low], 1 + n)) }
}

fn nonce(n: u32) -> [u8; 24] {
    let mut nonce = [0; 24];
    nonce[..4].copy_from_slice(&n.to_be_bytes());
    nonce
}

fn candidates(from: u8) -> Message {
    let one = |n: u8| Candidate {
        kind: CandidateKind::Reflexive,
        addr: SocketAddr::from(([203, 0, from, n + 1], 5_000)),
    };
    Message::Candidates {
        request: true,
        candidates: (0..MAX_CANDIDATES as u8).map(one).collect(),
        ports: None,
    }
}

/// What was sent, by kind, as B reads it.
fn sent(paths: &mut Paths, keys: &ProbeKeys) -> (usize, usize, usize) {
    let mut out = Outbox::with_capacity(1 << 22);
    let mut counts = (0, 0, 0);
    loop {
        let done = paths.poll_transmit(&mut out);
        for (_, probe) in out.datagrams() {
            match keys.open(probe).unwrap() {
                Message::Ping { .. } => counts.0 += 1,
                Message::Pong { .. } => counts.1 += 1,
                Message::Candidates { .. } => counts.2 += 1,
                Message::Guess { .. } => {}
                Message::Unknown => panic!("unknown"),
            }
        }
        out.clear();
        if done {
            return counts;
        }
    }
}

fn active(paths: &Paths) -> &Active {
    paths.peers[0].as_ref().unwrap().active.as_ref().unwrap()
}

#[test]
fn addresses_and_probes_are_bounded_whatever_the_peer_lists() {
    let (mut paths, keys) = pair();
    let mut now = START;
    for n in 0..=255 {
        paths.handle_probe(now, relayed(), &keys.seal(&candidates(n), nonce(n.into())));
        now += Duration::from_millis(100);
        paths.handle_timeout(now);
        let remotes = active(&paths).remotes();
        assert!(remotes <= MAX_REMOTES);
    }
    let (pings, _, announced) = sent(&mut paths, &keys);
    let earned = |per_minute: u32| per_minute + per_minute * 26 / 60;
    assert!(pings as u32 <= earned(MAX_PROBES_PER_MINUTE), "{pings} pings in 26 s");
    assert!(announced as u32 <= earned(MAX_ANNOUNCEMENTS_PER_MINUTE));
    assert!(paths.counters().probe_limited > 0);
    assert_eq!(active(&paths).remotes(), MAX_CANDIDATES, "those of the last list");
}

#[test]
fn pings_under_way_are_bounded_and_those_of_people_go_last() {
    let (mut paths, keys) = pair();
    let mut now = START;
    let pings = 10;
    for n in 0..pings {
        paths.ping(now, 0, PingToken(n));
    }
    // Several rounds over as many addresses as there can be, all within the time that a ping may take.
    for n in 0..4 {
        paths.handle_probe(now, relayed(), &keys.seal(&candidates(n), nonce(n.into())));
        now += ROUND_PAUSES[usize::from(n)];
        paths.handle_timeout(now);
        assert!(active(&paths).inflight() <= MAX_INFLIGHT);
    }
    assert!(paths.counters().ping_replaced > 0);
    let lost = |e: &Event| matches!(e, Event::PingResult { rtt: None, .. });
    assert!(!std::iter::from_fn(|| paths.poll_event()).any(|e| lost(&e)));
    paths.handle_timeout(START + PING_TIMEOUT);
    assert_eq!(std::iter::from_fn(|| paths.poll_event()).filter(lost).count() as u64, pings);
}

#[test]
fn our_sockets_and_events_are_bounded() {
    let (mut paths, _) = pair();
    let local = |n: u8| LocalSocket { id: 0, addr: SocketAddr::from(([192, 0, 2, n], 1_000)) };
    let many: Vec<_> = (0..=255).map(local).collect();
    assert!(paths.set_local(START, &many));
    assert_eq!(paths.local().len(), MAX_LOCAL);
    for _ in 0..MAX_PATH_EVENTS + 7 {
        paths.shared.push_event(Event::LeaseEnded);
    }
    assert_eq!((paths.shared.events.len(), paths.counters().events), (MAX_PATH_EVENTS, 7));
}

#[test]
fn answers_are_bounded() {
    let (mut paths, keys) = pair();
    let asked = MAX_PONGS_PER_SECOND + 100;
    let mut pongs = 0;
    paths.route(START, 0);
    for n in 0..asked {
        let ping = keys.seal(&Message::Ping { txid: [n as u8; TXID_LEN] }, nonce(n));
        paths.handle_probe(START, relayed(), &ping);
        pongs += sent(&mut paths, &keys).1;
    }
    assert_eq!(pongs as u32, MAX_PONGS_PER_SECOND);
    assert_eq!(paths.counters().probe_limited, 100);
}

#[test]
fn pings_from_many_addresses_bring_few_pings_and_few_addresses() {
    let (mut paths, keys) = pair();
    paths.route(START, 0);
    for n in 0..400u16 {
        let ping = keys.seal(&Message::Ping { txid: [1; TXID_LEN] }, nonce(n.into()));
        paths.handle_probe(START, direct(n), &ping);
    }
    assert_eq!(active(&paths).remotes(), MAX_REMOTES);
    assert_eq!(paths.counters().candidate_replaced, (400 - MAX_REMOTES) as u64);
    let (pings, pongs, _) = sent(&mut paths, &keys);
    assert!(pings as u32 <= MAX_PROBES_PER_MINUTE && pongs == 400);
}

#[test]
fn the_queue_of_probes_is_bounded() {
    let (mut paths, _) = pair();
    let b = ProbeSecretKey::from_bytes([2; 32]).public();
    for idx in 1..=(MAX_QUEUED as u32 + 50) {
        let mut id = [9; 16];
        id[..4].copy_from_slice(&idx.to_be_bytes());
        paths.insert(idx, DeviceId::from_bytes(id), b, Some(RELAY));
        paths.route(START, idx);
    }
    assert_eq!(paths.shared.queue.len(), MAX_QUEUED);
    assert_eq!(paths.counters().probe_queue_full, 50);
    assert!(paths.shared.events.len() <= MAX_PATH_EVENTS);
}

#[test]
fn forged_probes_cost_a_bounded_number_of_key_agreements_and_activate_nobody() {
    let (mut paths, keys) = pair();
    let mut forged = keys.seal(&Message::Ping { txid: [1; TXID_LEN] }, nonce(1));
    *forged.last_mut().unwrap() ^= 1;
    for _ in 0..MAX_DERIVATIONS_PER_SECOND + 50 {
        paths.handle_probe(START, relayed(), &forged);
    }
    assert!(!paths.is_active(0));
    assert_eq!(paths.counters().probe_forged, u64::from(MAX_DERIVATIONS_PER_SECOND));
    assert_eq!(paths.counters().probe_limited, 50);
    assert!(paths.poll_timeout().is_none(), "an idle peer has no timer");
}

#[test]
fn a_pong_counts_once_and_only_from_where_its_ping_went() {
    let (mut paths, keys) = pair();
    let one = Candidate { kind: CandidateKind::Local, addr: "203.0.113.1:5000".parse().unwrap() };
    let list = Message::Candidates { request: false, candidates: [one].into_iter().collect(), ports: None };
    paths.handle_probe(START, relayed(), &keys.seal(&list, nonce(1)));
    let mut out = Outbox::new();
    assert!(paths.poll_transmit(&mut out));
    let txid = out.datagrams().find_map(|(_, probe)| match keys.open(probe) {
        Ok(Message::Ping { txid }) => Some(txid),
        _ => None,
    });
    let pong = keys.seal(&Message::Pong { txid: txid.unwrap(), observed: None }, nonce(2));
    paths.handle_probe(START, direct(7), &pong);
    assert!(!matches!(paths.path(0).0, Path::Direct { .. }));
    assert_eq!(paths.counters().pong_unexpected, 1);
    let right = Source::Direct { socket: 0, remote: one.addr };
    paths.handle_probe(START, right, &pong);
    assert_eq!(paths.path(0).0, Path::Direct { endpoint: one.addr });
    paths.handle_probe(START, right, &pong);
    assert_eq!(paths.counters().pong_unexpected, 2);
    let guessed = keys.seal(&Message::Pong { txid: [0; TXID_LEN], observed: None }, nonce(3));
    paths.handle_probe(START, right, &guessed);
    assert_eq!(paths.counters().pong_unexpected, 3);
}

#[test]
fn forbidden_addresses_are_never_pinged() {
    let (mut paths, keys) = pair();
    let bad = [
        "100.64.0.9:1",
        "127.0.0.1:1",
        "224.0.0.1:1",
        "255.255.255.255:1",
        "169.254.0.1:1",
        "0.0.0.1:1",
        "[fd00::9]:1",
        "[::1]:1",
        "[ff02::1]:1",
        "[fe80::1]:1",
        "192.0.2.1:1000",
        "198.51.100.1:0",
    ];
    let list =
        bad.iter().map(|a| Candidate { kind: CandidateKind::Local, addr: a.parse().unwrap() }).collect();
    let list = Message::Candidates { request: false, candidates: list, ports: None };
    paths.handle_probe(START, relayed(), &keys.seal(&list, nonce(1)));
    assert_eq!(active(&paths).remotes(), 0);
    assert_eq!(paths.counters().candidate_refused, bad.len() as u64);
    assert_eq!(sent(&mut paths, &keys).0, 0);
}

#[test]
fn user_pings_are_bounded_and_each_has_a_result() {
    let (mut paths, _) = pair();
    paths.set_relay(START, RELAY, false);
    for n in 0..MAX_USER_PINGS as u64 + 5 {
        paths.ping(START, 0, PingToken(n));
    }
    let results = |paths: &mut Paths| {
        std::iter::from_fn(|| paths.poll_event())
            .filter(|e| matches!(e, Event::PingResult { rtt: None, .. }))
            .count()
    };
    assert_eq!(results(&mut paths), 5);
    paths.handle_timeout(START + PING_TIMEOUT);
    assert_eq!(results(&mut paths), MAX_USER_PINGS);
}

#[test]
fn hasty_pings_wait_for_their_turn_and_none_is_lost() {
    let (mut paths, keys) = pair();
    let (mut now, mut asked, mut answered) = (START, 0, 0);
    // As fast as the answers come, for ten seconds: a loop over `warren ping -c 1`.
    while now < START + Duration::from_secs(10) {
        paths.ping(now, 0, PingToken(asked));
        asked += 1;
        loop {
            let mut out = Outbox::new();
            paths.poll_transmit(&mut out);
            let pings: Vec<_> = out
                .datagrams()
                .filter_map(|(_, probe)| match keys.open(probe) {
                    Ok(Message::Ping { txid }) => Some(txid),
                    _ => None,
                })
                .collect();
            for txid in pings {
                let pong = keys.seal(&Message::Pong { txid, observed: None }, nonce(asked as u32));
                paths.handle_probe(now, relayed(), &pong);
            }
            match std::iter::from_fn(|| paths.poll_event()).find(|e| matches!(e, Event::PingResult { .. })) {
                Some(Event::PingResult { rtt, .. }) => {
                    assert!(rtt.is_some(), "ping {asked} was lost");
                    answered += 1;
                    break;
                }
                _ => {
                    now = paths.poll_timeout().unwrap();
                    paths.handle_timeout(now);
                }
            }
        }
        now += Duration::from_millis(1);
    }
    assert_eq!(asked, answered);
    assert!((150..=220).contains(&asked), "{asked} pings in ten seconds");
}

#[test]
fn our_addresses_are_bounded_and_what_peers_saw_counts_only_where_stun_is_silent() {
    let (mut paths, _) = pair();
    for n in 0..10 {
        paths.shared.observe(SocketAddr::from(([198, 51, 100, n], 9)));
    }
    let observed =
        |paths: &Paths| paths.shared.own.iter().filter(|c| c.kind == CandidateKind::Observed).count();
    assert_eq!(observed(&paths), MAX_OBSERVED);
    let mapped = (0..100).map(|n| SocketAddr::from(([203, 0, 113, n], 9)));
    paths.set_reflexive(START, mapped, None);
    assert_eq!((observed(&paths), paths.shared.own.len()), (0, MAX_CANDIDATES));
}

#[test]
fn an_address_that_somebody_sets_is_told_to_peers_in_every_network() {
    let (mut paths, keys) = pair();
    paths.ping(START, 0, PingToken(1));
    sent(&mut paths, &keys);
    let fixed = |paths: &Paths| -> Vec<SocketAddr> {
        paths.shared.own.iter().filter(|c| c.kind == CandidateKind::Static).map(|c| c.addr).collect()
    };
    let outside: SocketAddr = "198.51.100.7:41641".parse().unwrap();
    // What can be no endpoint is none; the overlay's own addresses neither.
    let set =
        ["100.64.0.9:1", "127.0.0.1:1", "224.0.0.1:1", "198.51.100.7:0", "0.0.0.0:5", "198.51.100.7:41641"];
    let set = set.map(|addr| addr.parse().unwrap());
    paths.set_static(START, &set);
    assert_eq!(fixed(&paths), [outside]);
    let later = START + Duration::from_secs(1);
    paths.handle_timeout(later);
    assert!(sent(&mut paths, &keys).2 > 0, "the peer hears of it");
    // However many there are of the others.
    let many = || (0..100).map(|n| SocketAddr::from(([203, 0, 113, n], 9)));
    paths.set_reflexive(later, many(), None);
    assert_eq!((fixed(&paths), paths.shared.own.len()), (vec![outside], MAX_CANDIDATES));
    paths.set_local(later, &[LocalSocket { id: 0, addr: "192.0.2.2:1000".parse().unwrap() }]);
    assert_eq!(fixed(&paths), [outside], "in another network as well");
    // Where STUN sees us as well, its word counts.
    paths.set_reflexive(later, std::iter::once(outside), None);
    assert!(fixed(&paths).is_empty() && paths.shared.own.iter().any(|c| c.addr == outside));
    let many: Vec<SocketAddr> = many().collect();
    paths.set_static(later, &many);
    assert_eq!(fixed(&paths), many[..MAX_STATIC]);
    paths.set_static(later, &[]);
    assert_eq!(fixed(&paths), []);
}

#[test]
fn a_mapped_port_is_told_to_peers_until_the_network_changes() {
    let (mut paths, keys) = pair();
    paths.ping(START, 0, PingToken(1));
    sent(&mut paths, &keys);
    let mapped = |paths: &Paths| -> Vec<SocketAddr> {
        paths.shared.own.iter().filter(|c| c.kind == CandidateKind::Mapped).map(|c| c.addr).collect()
    };
    let outside: SocketAddr = "198.51.100.7:41641".parse().unwrap();
    paths.set_reflexive(START, (0..100).map(|n| SocketAddr::from(([203, 0, 113, n], 9))), None);
    paths.set_mapped(START, Some(outside));
    assert_eq!((mapped(&paths), paths.shared.own.len()), (vec![outside], MAX_CANDIDATES));
    let later = START + Duration::from_secs(1);
    paths.handle_timeout(later);
    assert!(sent(&mut paths, &keys).2 > 0, "the peer hears of it");
    // What can be no endpoint is none, whatever a gateway says.
    for bad in ["100.64.0.9:1", "127.0.0.1:1", "224.0.0.1:1", "198.51.100.7:0", "0.0.0.0:5"] {
        paths.set_mapped(later, Some(bad.parse().unwrap()));
        assert_eq!(mapped(&paths), [], "{bad}");
    }
    paths.set_mapped(later, Some(outside));
    paths.set_local(later, &[LocalSocket { id: 0, addr: "192.0.2.2:1000".parse().unwrap() }]);
    assert_eq!(mapped(&paths), []);
}

/// A peer asks to guess ports, and again each second, for two minutes.
fn guessed(ports: Option<PortUse>) -> (usize, u64) {
    let (mut paths, keys) = pair();
    paths.set_reflexive(START, ["203.0.113.7:9".parse().unwrap()].into_iter(), ports);
    let near = "198.51.100.9:0".parse().unwrap();
    let (mut now, mut out) = (START, 0);
    for n in 0..120 {
        paths.handle_probe(now, relayed(), &keys.seal(&Message::Guess { near }, nonce(n)));
        let second = now + Duration::from_secs(1);
        while let Some(at) = paths.poll_timeout().filter(|at| *at < second) {
            now = at;
            paths.handle_timeout(now);
            let mut outbox = Outbox::with_capacity(1 << 20);
            paths.poll_transmit(&mut outbox);
            let to_peer = |to: &Destination| matches!(to, Destination::Direct { remote, .. } if remote.ip() == near.ip());
            out += outbox.datagrams().filter(|(to, _)| to_peer(to)).count();
        }
        now = second;
    }
    (out, paths.counters().guess_refused)
}

#[test]
fn guesses_are_bounded_and_made_only_where_they_can_help() {
    let (out, refused) = guessed(Some(PortUse::Fixed));
    assert!(out as u32 <= MAX_GUESSES && out as u32 > MAX_GUESSES * 9 / 10, "{out} in two minutes");
    assert!(refused > 0, "the next search comes after a pause");
    for hard in [None, Some(PortUse::Random)] {
        assert_eq!(guessed(hard), (0, 120), "{hard:?}");
    }
}

#[test]
fn guesses_for_many_peers_share_one_budget() {
    let (mut paths, _) = pair();
    let me = ProbeSecretKey::from_bytes([1; 32]).public();
    paths.set_reflexive(START, ["203.0.113.7:9".parse().unwrap()].into_iter(), Some(PortUse::Fixed));
    for idx in 1..=10u8 {
        let secret = ProbeSecretKey::from_bytes([100 + idx; 32]);
        let keys = ProbeKeys::derive(&secret, &secret.public(), &me).unwrap();
        let device = DeviceId::from_bytes([100 + idx; 16]);
        paths.insert(idx.into(), device, secret.public(), Some(RELAY));
        let near = SocketAddr::from(([198, 51, 100, idx], 0));
        let from = Source::Relay { relay: RELAY, device };
        paths.handle_probe(START, from, &keys.seal(&Message::Guess { near }, nonce(idx.into())));
    }
    let (mut now, mut out) = (START, 0);
    while now < START + Duration::from_secs(59) {
        let mut outbox = Outbox::with_capacity(1 << 20);
        paths.poll_transmit(&mut outbox);
        out += outbox.datagrams().filter(|(to, _)| matches!(to, Destination::Direct { .. })).count();
        now = paths.poll_timeout().unwrap();
        paths.handle_timeout(now);
    }
    assert!(out as u32 <= MAX_GUESSES_PER_MINUTE, "{out} guesses in a minute");
    assert!(paths.counters().probe_limited > 0);
}

#[test]
fn probes_to_many_peers_share_one_budget() {
    let (mut paths, _) = pair();
    let me = ProbeSecretKey::from_bytes([1; 32]).public();
    let mut out = 0;
    for idx in 1..=60u8 {
        let secret = ProbeSecretKey::from_bytes([100 + idx; 32]);
        let keys = ProbeKeys::derive(&secret, &secret.public(), &me).unwrap();
        let device = DeviceId::from_bytes([100 + idx; 16]);
        paths.insert(idx.into(), device, secret.public(), Some(RELAY));
        let from = Source::Relay { relay: RELAY, device };
        for n in 0..8 {
            let list = keys.seal(&candidates(n), nonce(u32::from(n) + 1));
            paths.handle_probe(START, from, &list);
            let mut outbox = Outbox::with_capacity(1 << 20);
            while !paths.poll_transmit(&mut outbox) {
                out += outbox.datagrams().filter(|(to, _)| matches!(to, Destination::Direct { .. })).count();
                outbox.clear();
            }
            out += outbox.datagrams().filter(|(to, _)| matches!(to, Destination::Direct { .. })).count();
        }
    }
    assert_eq!(out as u32, MAX_DEVICE_PROBES_PER_MINUTE);
    assert!(paths.counters().probe_limited > 0);
}

#[test]
fn predicted_ports_are_few_and_none_is_told_to_who_can_not_use_them() {
    let (mut paths, keys) = pair();
    let last = "203.0.113.7:9000".parse().unwrap();
    paths.set_reflexive(START, [last].into_iter(), Some(PortUse::Steps { last, step: 1 }));
    let predicted = |list: &[Candidate]| list.iter().filter(|c| c.kind == CandidateKind::Predicted).count();
    assert_eq!(predicted(&paths.shared.own), usize::from(MAX_PREDICTED));
    let list = |paths: &mut Paths| -> Vec<usize> {
        let mut out = Outbox::new();
        paths.poll_transmit(&mut out);
        let lists = out.datagrams().filter_map(|(_, probe)| match keys.open(probe) {
            Ok(Message::Candidates { candidates, .. }) => Some(predicted(&candidates)),
            _ => None,
        });
        lists.collect()
    };
    paths.route(START, 0);
    assert_eq!(list(&mut paths), [usize::from(MAX_PREDICTED)]);
    let hard =
        Message::Candidates { request: true, candidates: Default::default(), ports: Some(Ports::Random) };
    let later = START + Duration::from_secs(1);
    paths.handle_probe(later, relayed(), &keys.seal(&hard, nonce(1)));
    assert_eq!(list(&mut paths), [0]);
}

#[test]
fn after_a_silence_that_a_nat_may_not_survive_packets_take_the_relay_until_the_way_answers() {
    let (mut paths, keys) = pair();
    let one = Candidate { kind: CandidateKind::Local, addr: "203.0.113.1:5000".parse().unwrap() };
    let list = Message::Candidates { request: false, candidates: [one].into_iter().collect(), ports: None };
    paths.handle_probe(START, relayed(), &keys.seal(&list, nonce(1)));
    let right = Source::Direct { socket: 0, remote: one.addr };
    let answer = |paths: &mut Paths, now, n| {
        let mut out = Outbox::new();
        paths.poll_transmit(&mut out);
        let txids: Vec<_> = out
            .datagrams()
            .filter_map(|(to, probe)| match (to, keys.open(probe)) {
                (Destination::Direct { .. }, Ok(Message::Ping { txid })) => Some(txid),
                _ => None,
            })
            .collect();
        assert!(!txids.is_empty(), "the way is asked");
        for txid in txids {
            let pong = Message::Pong { txid, observed: None };
            paths.handle_probe(now, right, &keys.seal(&pong, nonce(n)));
        }
    };
    answer(&mut paths, START, 2);
    let is_direct = |to: Option<Destination>| matches!(to, Some(Destination::Direct { .. }));
    assert!(is_direct(paths.route(START + TRUST, 0)));
    let doubt = START + UNKNOWN_SILENCE + TRUST;
    let mut now = START + TRUST + Duration::from_millis(1);
    // What went out meanwhile was answered.
    paths.on_authentic(now, 0, right, Carried::Data);
    assert!(is_direct(paths.route(now, 0)));
    now = doubt + Duration::from_secs(1);
    assert!(!is_direct(paths.route(now, 0)), "the relay at once");
    paths.handle_timeout(now);
    answer(&mut paths, now + Duration::from_millis(20), 3);
    assert!(is_direct(paths.route(now + Duration::from_millis(20), 0)), "a round trip later");
    // Where the NAT is known not to forget so soon, there is no doubt.
    paths.set_keepalive(Some(Duration::from_secs(23)), Some(Duration::from_secs(27)));
    assert!(is_direct(paths.route(now + Duration::from_secs(20), 0)));
}

#[test]
fn padded_pings_that_wait_are_bounded() {
    let (mut paths, _) = pair();
    let to = Destination::Relay { relay: RELAY, device: B };
    for _ in 0..MAX_QUEUED_LONG + 3 {
        paths.shared.enqueue_long(to, vec![0; 10]);
    }
    assert_eq!(paths.shared.long_queue.len(), MAX_QUEUED_LONG);
    assert_eq!(paths.counters().probe_queue_full, 3);
    let mut out = Outbox::with_capacity(1 << 22);
    assert!(paths.poll_transmit(&mut out));
    assert!(out.iter().all(|(t, _)| t.whole) && out.len() == MAX_QUEUED_LONG);
}
