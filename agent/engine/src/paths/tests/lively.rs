//! A way that was lively and falls silent is noticed by its own rhythm.

use super::*;

pub(super) const MS: Duration = Duration::from_millis(1);

/// A pair with a direct way of 20 ms.
pub(super) struct Talk {
    pub(super) paths: Paths,
    pub(super) keys: ProbeKeys,
    pub(super) now: Instant,
    pub(super) way: Source,
    pub(super) words: u32,
}

impl Talk {
    pub(super) fn new() -> Self {
        let (mut paths, keys) = pair();
        let one = Candidate { kind: CandidateKind::Local, addr: "203.0.113.1:5000".parse().unwrap() };
        let list =
            Message::Candidates { request: false, candidates: [one].into_iter().collect(), ports: None };
        paths.handle_probe(START, relayed(), &keys.seal(&list, nonce(0)));
        let way = Source::Direct { socket: 0, remote: one.addr };
        let mut talk = Self { paths, keys, now: START, way, words: 1 };
        assert_eq!(talk.answer(20 * MS), 1);
        // The rounds that follow the first one, and what finds out how long packets may be.
        for _ in 0..40 {
            talk.now += 50 * MS;
            talk.paths.handle_timeout(talk.now);
            talk.answer(Duration::ZERO);
        }
        talk
    }

    /// Answers short pings on the way after `rtt`. How many there were.
    pub(super) fn answer(&mut self, rtt: Duration) -> usize {
        let mut out = Outbox::new();
        self.paths.poll_transmit(&mut out);
        let txids: Vec<_> = out
            .datagrams()
            .filter_map(|(to, probe)| match (to, self.keys.open(probe)) {
                (Destination::Direct { .. }, Ok(Message::Ping { txid })) => Some(txid),
                _ => None,
            })
            .collect();
        self.now += rtt;
        for txid in &txids {
            let pong = self.keys.seal(&Message::Pong { txid: *txid, observed: None }, nonce(self.words));
            self.words += 1;
            self.paths.handle_probe(self.now, self.way, &pong);
        }
        txids.len()
    }

    /// Packets go out and come in for a while, so far apart.
    pub(super) fn talk(&mut self, pause: Duration, times: u32) {
        for _ in 0..times {
            self.now += pause;
            self.paths.handle_timeout(self.now);
            self.paths.on_authentic(self.now, 0, self.way, Carried::Data);
            assert!(self.send(), "it answers");
            self.answer(Duration::ZERO);
        }
    }

    /// A packet goes out. True if it takes the direct way.
    pub(super) fn send(&mut self) -> bool {
        matches!(self.paths.route(self.now, 0), Some(Destination::Direct { .. }))
    }

    /// Packets go out and nothing comes in. After how long the first of them takes the relay.
    pub(super) fn until_hedged(&mut self) -> Duration {
        let since = self.now;
        while self.send() {
            self.now += 10 * MS;
            self.paths.handle_timeout(self.now);
            assert!(self.now.since(since) < Duration::from_secs(10));
        }
        self.now.since(since)
    }
}

#[test]
fn a_lively_way_that_falls_silent_is_hedged_within_a_second() {
    for (pause, most) in [(1, 700), (20, 700), (50, 750), (100, 1_000), (1_000, 1_900)] {
        let mut talk = Talk::new();
        talk.talk(pause * MS, (3_000 / pause).max(30));
        let took = talk.until_hedged();
        assert!(took <= most * MS, "a packet each {pause} ms: {took:?}");
    }
}

#[test]
fn who_has_nothing_more_to_say_is_asked_once_and_then_at_the_usual_pace() {
    let mut talk = Talk::new();
    talk.talk(20 * MS, 100);
    // From now on we send, and the peer only answers pings.
    let mut asked = 0;
    for _ in 0..1_000 {
        talk.now += 20 * MS;
        talk.paths.handle_timeout(talk.now);
        assert!(talk.send(), "it answers");
        asked += talk.answer(Duration::ZERO);
    }
    assert!((10..=22).contains(&asked), "{asked} pings in 20 s");
}

#[test]
fn packets_in_bursts_are_as_far_apart_as_the_bursts() {
    let mut talk = Talk::new();
    for _ in 0..50 {
        for _ in 0..10 {
            talk.now += MS;
            talk.paths.on_authentic(talk.now, 0, talk.way, Carried::Data);
        }
        talk.paths.handle_timeout(talk.now);
        talk.answer(Duration::ZERO);
        talk.now += 400 * MS;
        talk.send();
        assert_eq!(talk.answer(Duration::ZERO), 0, "that pause is usual");
        talk.now += 90 * MS;
    }
}

/// How often something else said that the network may be another one.
fn suspected(paths: &mut Paths) -> usize {
    let urgent = usize::from(paths.take_urgent_stun_wish());
    urgent + std::iter::from_fn(|| paths.poll_event()).filter(|e| *e == Event::NetworkSuspect).count()
}

#[test]
fn a_pause_is_no_hint_that_the_network_is_another_one_and_an_answer_that_is_late_is_one() {
    let mut talk = Talk::new();
    for _ in 0..20 {
        talk.talk(20 * MS, 50);
        talk.now += UNKNOWN_SILENCE + TRUST;
        talk.paths.handle_timeout(talk.now);
        assert!(!talk.send(), "packets take the relay, by way of precaution");
        assert_eq!(suspected(&mut talk.paths), 0);
        talk.paths.handle_timeout(talk.now);
        assert_eq!(talk.answer(20 * MS), 1);
        talk.paths.handle_timeout(talk.now);
        assert_eq!(suspected(&mut talk.paths), 0, "the way has answered");
    }
    talk.now += UNKNOWN_SILENCE + TRUST;
    assert!(!talk.send());
    let asked = talk.now;
    while suspected(&mut talk.paths) == 0 {
        talk.now = talk.paths.poll_timeout().unwrap();
        talk.paths.handle_timeout(talk.now);
        assert!(talk.now.since(asked) < Duration::from_secs(1));
    }
    assert!(talk.now.since(asked) >= 2 * 15 * MS, "not before an answer can be there");
}

#[test]
fn a_longer_way_that_answers_takes_no_silent_one_away() {
    let mut talk = Talk::new();
    let Source::Direct { remote: near, .. } = talk.way else { panic!("it is direct") };
    let far: SocketAddr = "203.0.113.2:5000".parse().unwrap();
    let both = [near, far].map(|addr| Candidate { kind: CandidateKind::Local, addr });
    let list = Message::Candidates { request: false, candidates: both.into_iter().collect(), ports: None };
    talk.paths.handle_probe(talk.now, relayed(), &talk.keys.seal(&list, nonce(9_000)));
    let (mut answers, start) = (0, talk.now);
    for n in 0..10_000 {
        talk.now = start + 100 * n * MS;
        if n.is_multiple_of(250) {
            talk.send();
        }
        talk.paths.handle_timeout(talk.now);
        let mut out = Outbox::with_capacity(1 << 20);
        talk.paths.poll_transmit(&mut out);
        for (to, probe) in out.datagrams() {
            let (Destination::Direct { socket, remote }, Ok(Message::Ping { txid })) =
                (to, talk.keys.open(probe))
            else {
                continue;
            };
            answers += usize::from(remote == far);
            let pong = talk.keys.seal(&Message::Pong { txid, observed: None }, nonce(10_000 + n));
            let took = if remote == far { 50 * MS } else { 20 * MS };
            talk.paths.handle_probe(talk.now + took, Source::Direct { socket, remote }, &pong);
            assert_eq!(talk.paths.path(0).0, Path::Direct { endpoint: near }, "after {n}");
        }
    }
    assert!(answers > 15, "{answers}: it was looked for a better one");
}
