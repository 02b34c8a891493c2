//! How long the NAT in front of us remembers a socket that is silent, so that keep-alives are no denser than it needs.
//!
//! Measured on a socket of its own, so that no path is put at risk (RFC 5780 section 4.6): the socket asks a STUN server
//! and is silent for a while; then another socket asks the server to answer to the first one's outside port. If that
//! answer arrives, the NAT still remembered. A few lengths of silence are tried, from a middle one up or down.

use std::net::SocketAddr;
use std::time::Duration;

use rand_core::RngCore;
use warren_common::time::Instant;

use super::Asked;
use super::codec::{self, TXID_LEN};

/// The extra socket that is silent.
pub(crate) const SILENT_SOCKET: u8 = 16;
/// Silences that are tried. NATs are seen to forget after 10 s to 5 min, broken ones sooner; the last is as long as a peer
/// counts as in use.
pub(crate) const SILENCES: [Duration; 10] = [
    Duration::from_secs(2),
    Duration::from_millis(4_500),
    Duration::from_secs(8),
    Duration::from_secs(12),
    Duration::from_secs(18),
    Duration::from_secs(27),
    Duration::from_secs(45),
    Duration::from_secs(75),
    Duration::from_secs(115),
    Duration::from_secs(175),
];
/// The one to begin with: below the 30 s of many NATs.
const FIRST: usize = 5;
/// The next one if that was too long: which NATs there are below it tells this one best.
const SHORT: usize = 2;
/// Between two questions that make firewalls see a conversation, for which they remember longer than for one question.
const SECOND_QUESTION: Duration = Duration::from_secs(3);
/// Pause between attempts of a question.
const RETRY: Duration = Duration::from_millis(700);
/// Attempts of a question.
const MAX_ATTEMPTS: u8 = 3;

/// The measurement. See the module.
#[derive(Debug, Default)]
pub(crate) struct Lifetime {
    server: Option<SocketAddr>,
    state: State,
    /// Silences up to this one were survived.
    survived: Option<usize>,
    /// Silences from this one on were not.
    forgotten: Option<usize>,
    /// There is nothing to be found out here.
    given_up: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Rest,
    /// Waits for the socket.
    Opening {
        until: Instant,
    },
    /// Asks from the silent socket: where am I? `again`: once more, after a while.
    Where {
        question: Question,
        again: bool,
    },
    Silent {
        until: Instant,
        port: u16,
        index: Option<usize>,
    },
    /// Asks from the other socket for an answer to the silent one.
    Asks {
        question: Question,
        port: u16,
        index: Option<usize>,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Question {
    txid: [u8; TXID_LEN],
    attempts: u8,
    due: Instant,
}

impl Question {
    const fn at(due: Instant) -> Self {
        Self { txid: [0; TXID_LEN], attempts: 0, due }
    }

    /// True if it is to be asked now.
    fn ask(&mut self, now: Instant, rng: &mut impl RngCore) -> bool {
        let due = self.due <= now && self.attempts < MAX_ATTEMPTS;
        if due {
            if self.attempts == 0 {
                rng.fill_bytes(&mut self.txid);
            }
            self.attempts += 1;
            self.due = now + RETRY;
        }
        due
    }

    fn is_over(&self, now: Instant) -> bool {
        self.due <= now && self.attempts >= MAX_ATTEMPTS
    }
}

impl Lifetime {
    /// Forgets what was true in another network.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// True if there is something to find out, and nothing under way.
    pub(crate) fn is_due(&self) -> bool {
        self.state == State::Rest && !self.given_up && self.next_index().is_some()
    }

    /// Begins, with the help of a server that answers.
    pub(crate) fn start(&mut self, now: Instant, server: SocketAddr) {
        self.server = Some(server);
        self.state = State::Opening { until: now + RETRY };
    }

    /// True while the silent socket is needed.
    pub(crate) fn wants_socket(&self) -> bool {
        self.state != State::Rest
    }

    /// The silent socket is open, or not.
    pub(crate) fn set_socket(&mut self, now: Instant, open: bool) {
        match self.state {
            State::Opening { .. } if open => {
                self.state = State::Where { question: Question::at(now), again: true };
            }
            State::Rest | State::Opening { .. } => {}
            _ if !open => self.give_up(),
            _ => {}
        }
    }

    /// After how much silence to say something where the NAT must not forget; `None` while nothing is known.
    pub(crate) fn keepalive(&self) -> Option<Duration> {
        let sure = |index: usize| SILENCES[index] * 17 / 20;
        match (self.survived, self.forgotten) {
            (Some(index), _) => Some(sure(index)),
            (None, Some(_)) => Some(sure(0)),
            // While the answer is to come, the shortest is the safest.
            (None, None) => matches!(self.state, State::Silent { .. } | State::Asks { .. }).then(|| sure(0)),
        }
    }

    /// The longest silence that is known to be survived.
    pub(crate) fn survived(&self) -> Option<Duration> {
        self.survived.map(|index| SILENCES[index])
    }

    /// The silence to try next; `None` if enough is known.
    fn next_index(&self) -> Option<usize> {
        let next = match (self.survived, self.forgotten) {
            (None, None) => FIRST,
            (Some(survived), _) => survived + 1,
            (None, Some(FIRST)) => SHORT,
            (None, Some(forgotten)) => forgotten.checked_sub(1)?,
        };
        (next < self.forgotten.unwrap_or(SILENCES.len())).then_some(next)
    }

    fn give_up(&mut self) {
        self.given_up = true;
        self.state = State::Rest;
    }

    /// What is to be asked now. `other` is the socket that isn't silent.
    pub(crate) fn poll(&mut self, now: Instant, other: u8, rng: &mut impl RngCore) -> Option<Asked> {
        let server = self.server?;
        match &mut self.state {
            State::Where { question, .. } => question.ask(now, rng).then(|| Asked {
                socket: SILENT_SOCKET,
                server,
                bytes: codec::request(question.txid, None),
            }),
            State::Asks { question, port, .. } => question.ask(now, rng).then(|| Asked {
                socket: other,
                server,
                bytes: codec::request_to_port(question.txid, *port),
            }),
            _ => None,
        }
    }

    /// Takes a message. True if it was for us.
    pub(crate) fn handle(&mut self, now: Instant, socket: u8, from: SocketAddr, datagram: &[u8]) -> bool {
        let txid = codec::transaction(datagram);
        let expected = |question: &Question| Some(question.txid) == txid && question.attempts > 0;
        match self.state {
            State::Where { question, again } if expected(&question) && socket == SILENT_SOCKET => {
                let Some(response) = codec::response(datagram).filter(|_| Some(from) == self.server) else {
                    return true;
                };
                self.state = if again {
                    State::Where { question: Question::at(now + SECOND_QUESTION), again: false }
                } else {
                    // The first time without silence, to see whether the server does it at all.
                    let known = self.survived.is_some() || self.forgotten.is_some();
                    let index = if known { self.next_index() } else { None };
                    let until = now + index.map_or(Duration::ZERO, |index| SILENCES[index]);
                    State::Silent { until, port: response.mapped.port(), index }
                };
                true
            }
            State::Asks { question, port, index } if expected(&question) => {
                if socket != SILENT_SOCKET || codec::response(datagram).is_none() {
                    // It answered to who asked, or with an error: it can't do it.
                    self.give_up();
                } else if let Some(index) = index {
                    self.survived = Some(index);
                    self.next(now);
                } else if let Some(index) = self.next_index() {
                    self.state = State::Silent { until: now + SILENCES[index], port, index: Some(index) };
                }
                true
            }
            _ => socket == SILENT_SOCKET,
        }
    }

    /// On to the next silence, which begins with a word.
    fn next(&mut self, now: Instant) {
        self.state = match self.next_index() {
            // After it was forgotten the socket is a stranger to firewalls again.
            Some(_) => State::Where { question: Question::at(now), again: self.forgotten.is_some() },
            None => State::Rest,
        };
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Rest => None,
            State::Opening { until } | State::Silent { until, .. } => Some(until),
            State::Where { question, .. } | State::Asks { question, .. } => Some(question.due),
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::Opening { until } if until <= now => self.give_up(),
            State::Where { question, .. } if question.is_over(now) => self.give_up(),
            State::Silent { until, port, index } if until <= now => {
                self.state = State::Asks { question: Question::at(now), port, index };
            }
            State::Asks { question, index, .. } if question.is_over(now) => match index {
                Some(index) => {
                    self.forgotten = Some(index);
                    self.next(now);
                }
                None => self.give_up(),
            },
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;

    use super::*;

    const SERVER: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1)), 3_478);

    /// A success response with the mapped address 203.0.113.1:9.
    fn answer(request: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, 1, 0, 12];
        bytes.extend(&request[4..20]);
        bytes.extend([0, 0x20, 0, 8, 0, 1, 0x21, 0x1b, 203 ^ 0x21, 0x12, 113 ^ 0xa4, 1 ^ 0x42]);
        bytes
    }

    /// Plays it to the end behind a NAT that forgets after `memory`; how long it took, and how many questions.
    fn play(memory: Duration, knows_ports: bool) -> (Lifetime, Duration, usize) {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut lifetime = Lifetime::default();
        let start = Instant::from_nanos(1_000_000_000);
        let (mut now, mut questions, mut last_word) = (start, 0, start);
        lifetime.start(now, SERVER);
        lifetime.set_socket(now, true);
        while let Some(at) = lifetime.poll_timeout() {
            now = at.max(now);
            lifetime.handle_timeout(now);
            while let Some(asked) = lifetime.poll(now, 0, &mut rng) {
                questions += 1;
                let to_port = asked.bytes.len() > codec::HEADER_LEN;
                assert_eq!((asked.socket, asked.server), (if to_port { 0 } else { SILENT_SOCKET }, SERVER));
                if !to_port {
                    last_word = now;
                }
                let arrives_at = if to_port && knows_ports { SILENT_SOCKET } else { asked.socket };
                if arrives_at != SILENT_SOCKET || now.since(last_word) <= memory {
                    assert!(lifetime.handle(now, arrives_at, SERVER, &answer(&asked.bytes)));
                }
            }
        }
        (lifetime, now.since(start), questions)
    }

    #[test]
    fn the_keepalive_is_as_long_as_the_nat_allows_and_no_longer() {
        for memory in [3, 5, 9, 10, 13, 20, 30, 31, 60, 120, 180, 300] {
            let memory = Duration::from_secs(memory);
            let (lifetime, took, questions) = play(memory, true);
            let keepalive = lifetime.keepalive().unwrap();
            assert!(keepalive < memory, "{keepalive:?} behind a NAT of {memory:?}");
            let longest = SILENCES.last().copied().unwrap();
            assert!(
                keepalive * 2 >= memory.min(longest * 17 / 20),
                "{keepalive:?} for {memory:?} is too dense"
            );
            assert!(took < Duration::from_secs(600) && questions < 40, "{took:?} {questions}");
            assert!(!lifetime.is_due() && !lifetime.wants_socket());
        }
    }

    #[test]
    fn how_soon_a_broken_nat_forgets_is_known_within_a_minute() {
        let (lifetime, took, _) = play(Duration::from_secs(3), true);
        assert_eq!(lifetime.survived(), Some(SILENCES[0]));
        assert!(took <= Duration::from_secs(65), "{took:?}");
    }

    #[test]
    fn without_the_server_s_help_or_a_socket_the_usual_holds() {
        let (lifetime, _, questions) = play(Duration::from_secs(30), false);
        assert_eq!((lifetime.keepalive(), lifetime.is_due(), questions), (None, false, 3));
        let mut lifetime = Lifetime::default();
        assert!(lifetime.is_due());
        lifetime.start(Instant::ZERO, SERVER);
        assert!(lifetime.wants_socket());
        lifetime.handle_timeout(lifetime.poll_timeout().unwrap());
        assert_eq!((lifetime.keepalive(), lifetime.is_due()), (None, false));
        lifetime.forget();
        assert!(lifetime.is_due());
    }

    #[test]
    fn strangers_and_nonsense_change_nothing() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut lifetime = Lifetime::default();
        lifetime.start(Instant::ZERO, SERVER);
        lifetime.set_socket(Instant::ZERO, true);
        let asked = lifetime.poll(Instant::ZERO, 0, &mut rng).unwrap();
        let state = lifetime.state;
        let stranger = "198.51.100.9:1".parse().unwrap();
        assert!(lifetime.handle(Instant::ZERO, SILENT_SOCKET, stranger, &answer(&asked.bytes)));
        assert!(!lifetime.handle(Instant::ZERO, 0, SERVER, &answer(&asked.bytes)));
        assert!(lifetime.handle(Instant::ZERO, SILENT_SOCKET, SERVER, &asked.bytes));
        assert!(lifetime.handle(Instant::ZERO, SILENT_SOCKET, SERVER, &[1; 30]));
        assert_eq!(lifetime.state, state);
    }
}
