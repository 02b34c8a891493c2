//! What we look like from outside: STUN binding requests (RFC 8489) to the relays' STUN services.
//!
//! A round asks every server from every socket of its family, repeats what isn't answered and then rests: an idle
//! engine asks nothing. Only the asked server's answer to a request that is still open counts. Two answers from one
//! socket tell how the NAT maps, and their round-trip times which relay is near.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use rand_core::RngCore;
use warren_common::ids::RelayId;
use warren_common::time::Instant;

use crate::io::LocalSocket;
use crate::status::Mapping;

pub mod codec;
pub(crate) mod lifetime;

pub use codec::MAX_RESPONSE_LEN;
use codec::TXID_LEN;
pub(crate) use codec::{HEADER_LEN as REQUEST_LEN, is_stun};

/// Most server addresses asked in one round; the netmap's first ones. Enough to tell mappings apart and to find a near
/// relay, few enough to be no burden.
pub const MAX_SERVERS: usize = 16;
/// Most requests of one round: servers times sockets.
pub const MAX_REQUESTS: usize = 64;
/// First retransmission time-out (RFC 8489 section 6.2.1); doubled for each repetition.
const RETRANSMIT: Duration = Duration::from_millis(500);
/// Requests per server and round before it counts as silent.
const MAX_ATTEMPTS: u8 = 4;

#[derive(Debug, Clone, Copy)]
struct Request {
    txid: [u8; TXID_LEN],
    socket: u8,
    server: SocketAddr,
    relay: RelayId,
    sent: Instant,
    attempts: u8,
    due: Instant,
    /// Which of the round's requests it is, by the time of the first attempt.
    order: u32,
}

/// What a server said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) socket: u8,
    pub(crate) server: SocketAddr,
    pub(crate) relay: RelayId,
    pub(crate) mapped: SocketAddr,
    pub(crate) rtt: Duration,
    at: Instant,
    order: u32,
}

/// A request to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) socket: u8,
    pub(crate) server: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// The client. See the module.
#[derive(Debug, Default)]
pub(crate) struct Stun {
    servers: Vec<(RelayId, SocketAddr)>,
    requests: Vec<Request>,
    answers: Vec<Answer>,
    last_round: Option<Instant>,
    asked: u32,
}

impl Stun {
    /// Takes the servers of a netmap. True if they changed.
    pub(crate) fn set_servers(&mut self, servers: impl Iterator<Item = (RelayId, SocketAddr)>) -> bool {
        let servers: Vec<_> = servers.take(MAX_SERVERS).collect();
        if servers == self.servers {
            return false;
        }
        let gone = |server| !servers.iter().any(|(_, s)| *s == server);
        self.answers.retain(|a| !gone(a.server));
        self.requests.retain(|r| !gone(r.server));
        self.servers = servers;
        true
    }

    /// Forgets what was true in another network.
    pub(crate) fn forget(&mut self) {
        self.answers.clear();
        self.requests.clear();
        self.last_round = None;
    }

    /// Asks every server from every socket.
    pub(crate) fn start(&mut self, now: Instant, local: &[LocalSocket]) {
        self.last_round = Some(now);
        self.requests.clear();
        for (relay, server) in &self.servers {
            let mut asked = ArrayVec::<u8, 16>::new();
            for socket in local.iter().filter(|s| s.addr.is_ipv4() == server.is_ipv4()) {
                if asked.contains(&socket.id) || self.requests.len() >= MAX_REQUESTS {
                    continue;
                }
                let _ = asked.try_push(socket.id); // more than 16 sockets: asked once per address, still bounded
                self.requests.push(Request {
                    txid: [0; TXID_LEN],
                    socket: socket.id,
                    server: *server,
                    relay: *relay,
                    sent: now,
                    attempts: 0,
                    due: now,
                    order: 0,
                });
            }
        }
    }

    /// When the last round began.
    pub(crate) fn last_round(&self) -> Option<Instant> {
        self.last_round
    }

    /// True while answers may still come.
    pub(crate) fn is_asking(&self) -> bool {
        !self.requests.is_empty()
    }

    /// The next request to send, if one is due.
    pub(crate) fn poll(&mut self, now: Instant, rng: &mut impl RngCore) -> Option<Asked> {
        let request = self.requests.iter_mut().find(|r| r.attempts < MAX_ATTEMPTS && r.due <= now)?;
        if request.attempts == 0 {
            self.asked = self.asked.wrapping_add(1);
            request.order = self.asked;
        }
        rng.fill_bytes(&mut request.txid); // a new one each time, so that the round-trip time is exact
        request.sent = now;
        request.due = now + RETRANSMIT * (1 << request.attempts);
        request.attempts += 1;
        Some(Asked {
            socket: request.socket,
            server: request.server,
            bytes: codec::request(request.txid, None),
        })
    }

    /// Gives up on silent servers. True if that ended the round.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> bool {
        let was_asking = self.is_asking();
        let (requests, answers) = (&mut self.requests, &mut self.answers);
        requests.retain(|r| {
            let silent = r.attempts >= MAX_ATTEMPTS && r.due <= now;
            if silent {
                answers.retain(|a| a.server != r.server || a.socket != r.socket);
            }
            !silent
        });
        was_asking && !self.is_asking()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.requests.iter().map(|r| r.due).min()
    }

    /// Takes a message. Returns the answer if it is one we asked for.
    pub(crate) fn handle(
        &mut self,
        now: Instant,
        socket: u8,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Option<Answer> {
        let txid = codec::transaction(datagram)?;
        let at = self
            .requests
            .iter()
            .position(|r| r.attempts > 0 && r.socket == socket && r.server == from && r.txid == txid)?;
        let mapped = codec::response(datagram)?.mapped;
        let request = self.requests.remove(at);
        let Request { relay, order, .. } = request;
        let rtt = now.since(request.sent);
        let answer = Answer { socket, server: from, relay, mapped, rtt, at: now, order };
        self.answers.retain(|a| a.server != from || a.socket != socket);
        self.answers.push(answer);
        Some(answer)
    }

    /// Only what the current round has brought.
    pub(crate) fn fresh(&self) -> Self {
        let since = self.last_round.unwrap_or(Instant::FAR_FUTURE);
        let answers = self.answers.iter().filter(|a| a.at >= since).copied().collect();
        Self { answers, ..Self::default() }
    }

    /// Our address as seen from outside, by one socket and family, each distinct one once, the latest first.
    pub(crate) fn mapped(&self) -> impl Iterator<Item = SocketAddr> {
        let latest = self.answers.iter().rev();
        latest.clone().enumerate().filter_map(move |(i, answer)| {
            let seen = latest.clone().take(i).any(|a| a.mapped == answer.mapped);
            (!seen).then_some(answer.mapped)
        })
    }

    /// The first server of that family, to find out how long the NAT remembers.
    pub(crate) fn server(&self, ipv4: bool) -> Option<SocketAddr> {
        self.answers.iter().map(|a| a.server).find(|server| server.is_ipv4() == ipv4)
    }

    /// What the IPv4 NAT does with ports, by the socket that knows most; `None` if two answers to compare are missing.
    pub(crate) fn port_use(&self, local: &[LocalSocket]) -> Option<PortUse> {
        let of_family = || self.answers.iter().filter(|a| a.mapped.is_ipv4());
        if of_family().any(|a| local.iter().any(|l| l.addr == a.mapped)) {
            return Some(PortUse::Fixed);
        }
        let sockets: BTreeSet<u8> = of_family().map(|a| a.socket).collect();
        let by_socket = sockets.into_iter().filter_map(|socket| {
            let mut answers: Vec<&Answer> = of_family().filter(|a| a.socket == socket).collect();
            answers.sort_by_key(|a| a.order);
            port_use(&answers.iter().map(|a| (a.server, a.mapped)).collect::<Vec<_>>())
        });
        by_socket.max()
    }

    /// Round-trip time to a relay's nearest STUN address.
    pub(crate) fn rtt(&self, relay: RelayId) -> Option<Duration> {
        self.answers.iter().filter(|a| a.relay == relay).map(|a| a.rtt).min()
    }

    /// How the NAT maps, from IPv4 if there is any.
    pub(crate) fn mapping(&self, local: &[LocalSocket]) -> Option<Mapping> {
        [true, false].into_iter().find_map(|v4| {
            let of_family = || self.answers.iter().filter(move |a| a.mapped.is_ipv4() == v4);
            if of_family().any(|a| local.iter().any(|l| l.addr == a.mapped)) {
                return Some(Mapping::None);
            }
            // Families have sockets of their own; the worst that any socket meets counts.
            let sockets: BTreeSet<u8> = of_family().map(|a| a.socket).collect();
            let by_socket = sockets.into_iter().filter_map(|socket| {
                let answers: Vec<_> =
                    of_family().filter(|a| a.socket == socket).map(|a| (a.server, a.mapped)).collect();
                mapping(&answers)
            });
            by_socket.max()
        })
    }
}

/// How a NAT maps (RFC 4787 section 4.1), from what servers (the first of each pair) saw one socket as. `None` if they
/// can't tell: that takes two of different addresses, or one that sees two ports differently.
pub fn mapping(answers: &[(SocketAddr, SocketAddr)]) -> Option<Mapping> {
    let pairs = || answers.iter().enumerate().flat_map(|(i, a)| answers[i + 1..].iter().map(move |b| (a, b)));
    if pairs().any(|(a, b)| a.0.ip() == b.0.ip() && a.1 != b.1) {
        return Some(Mapping::AddressAndPortDependent);
    }
    let mut apart = pairs().filter(|(a, b)| a.0.ip() != b.0.ip()).peekable();
    apart.peek()?;
    Some(if apart.any(|(a, b)| a.1 != b.1) {
        Mapping::AddressDependent
    } else {
        Mapping::EndpointIndependent
    })
}

/// What a NAT does with the outside port when a socket sends to somebody else, the easiest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PortUse {
    /// It stays.
    Fixed,
    /// It is another one: the last one and so much.
    Steps {
        /// The last mapping seen.
        last: SocketAddr,
        /// From one port to the next.
        step: i16,
    },
    /// It is another one, and any.
    Random,
}

impl PortUse {
    /// The `n`th port from now on, if that can be told.
    pub(crate) fn predict(self, n: u16) -> Option<SocketAddr> {
        let Self::Steps { last, step } = self else { return None };
        let port = i32::from(last.port()) + i32::from(step) * i32::from(n);
        let port = u16::try_from(port).ok().filter(|port| *port >= FIRST_PORT)?;
        Some(SocketAddr::new(last.ip(), port))
    }
}

/// The least port that NATs give out (RFC 4787 section 4.2.2).
const FIRST_PORT: u16 = 1_024;
/// The longest step that counts as one, in ports: a NAT of this kind goes on by one or two, and others behind it take some
/// in between. Two random ports are as near once in 2 000 times.
const MAX_STEP: i32 = 16;

/// What a NAT does with ports, from what servers (the first of each pair) saw one socket as, in the order asked.
fn port_use(answers: &[(SocketAddr, SocketAddr)]) -> Option<PortUse> {
    if mapping(answers)? == Mapping::EndpointIndependent {
        return Some(PortUse::Fixed);
    }
    let mut ports: Vec<SocketAddr> = answers.iter().map(|(_, mapped)| *mapped).collect();
    ports.dedup();
    let steps: Vec<i32> =
        ports.windows(2).map(|two| i32::from(two[1].port()) - i32::from(two[0].port())).collect();
    let one_way = steps.iter().all(|s| *s > 0) || steps.iter().all(|s| *s < 0);
    let short = steps.iter().all(|s| s.abs() <= MAX_STEP);
    let same_ip = ports.iter().all(|a| a.ip() == ports[0].ip());
    let step = steps.into_iter().min_by_key(|s| s.abs()).and_then(|s| i16::try_from(s).ok());
    Some(match (ports.last(), step) {
        (Some(last), Some(step)) if one_way && short && same_ip => PortUse::Steps { last: *last, step },
        _ => PortUse::Random,
    })
}

#[cfg(test)]
mod tests {
    use bytecodec::EncodeExt as _;
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;
    use stun_codec::rfc5389::Attribute;
    use stun_codec::rfc5389::attributes::XorMappedAddress;
    use stun_codec::rfc5389::methods::BINDING;
    use stun_codec::{Message, MessageClass, MessageEncoder, TransactionId};

    use super::*;

    const RELAY: RelayId = RelayId::from_bytes([1; 16]);
    const START: Instant = Instant::from_nanos(1_000_000_000);

    fn local() -> Vec<LocalSocket> {
        vec![LocalSocket { id: 0, addr: "10.0.0.2:51820".parse().unwrap() }]
    }

    fn answer(txid: &[u8], mapped: SocketAddr) -> Vec<u8> {
        let txid = TransactionId::new(txid.try_into().unwrap());
        let mut message = Message::<Attribute>::new(MessageClass::SuccessResponse, BINDING, txid);
        message.add_attribute(XorMappedAddress::new(mapped));
        MessageEncoder::new().encode_into_bytes(message).unwrap()
    }

    fn client(servers: &[&str]) -> (Stun, ChaCha20Rng) {
        let mut stun = Stun::default();
        assert!(stun.set_servers(servers.iter().map(|s| (RELAY, s.parse().unwrap()))));
        stun.start(START, &local());
        (stun, ChaCha20Rng::seed_from_u64(1))
    }

    /// What each server sees, in order.
    fn mapping(servers: &[(&str, &str)]) -> Option<Mapping> {
        let names: Vec<&str> = servers.iter().map(|(server, _)| *server).collect();
        let (mut stun, mut rng) = client(&names);
        while let Some(asked) = stun.poll(START, &mut rng) {
            for (_, seen) in servers.iter().filter(|(server, _)| asked.server.to_string() == *server) {
                stun.handle(START, 0, asked.server, &reply(&asked, seen));
            }
        }
        assert!(!stun.is_asking());
        stun.mapping(&local())
    }

    fn reply(asked: &Asked, seen: &str) -> Vec<u8> {
        answer(&asked.bytes[8..20], seen.parse().unwrap())
    }

    #[test]
    fn mappings_are_told_apart() {
        let (a, b, a2) = ("198.51.100.1:1", "198.51.100.2:1", "198.51.100.1:2");
        let (x, y) = ("203.0.113.1:1000", "203.0.113.1:1001");
        assert_eq!(mapping(&[(a, x)]), None, "one answer tells nothing");
        assert_eq!(mapping(&[(a, "10.0.0.2:51820")]), Some(Mapping::None));
        assert_eq!(mapping(&[(a, x), (b, x)]), Some(Mapping::EndpointIndependent));
        assert_eq!(mapping(&[(a, x), (b, y)]), Some(Mapping::AddressDependent));
        assert_eq!(mapping(&[(a, x), (a2, x), (b, y)]), Some(Mapping::AddressDependent));
        assert_eq!(mapping(&[(a, x), (a2, y)]), Some(Mapping::AddressAndPortDependent));
    }

    #[test]
    fn ports_that_go_on_in_steps_are_predicted_and_others_are_not() {
        let seen = |ports: &[u16]| {
            let answers: Vec<_> = ports
                .iter()
                .zip(1u8..)
                .map(|(port, n)| {
                    (SocketAddr::from(([198, 51, 100, n], 1)), SocketAddr::from(([203, 0, 113, 1], *port)))
                })
                .collect();
            port_use(&answers)
        };
        let next = |ports: &[u16]| seen(ports).and_then(|ports| ports.predict(2)).map(|a| a.port());
        assert_eq!((seen(&[5_000]), seen(&[5_000, 5_000])), (None, Some(PortUse::Fixed)));
        assert_eq!(next(&[5_000, 5_001, 5_002]), Some(5_004));
        assert_eq!(next(&[5_000, 4_998, 4_996]), Some(4_992));
        assert_eq!(next(&[5_000, 5_003, 5_004]), Some(5_006), "others took two in between");
        for random in [&[5_000, 5_017][..], &[5_000, 5_001, 5_000], &[5_000, 9_000, 9_001]] {
            assert_eq!(seen(random), Some(PortUse::Random), "{random:?}");
        }
        assert_eq!(next(&[65_533, 65_534]), None, "there is no such port");
    }

    #[test]
    fn only_the_asked_server_answers_and_only_once() {
        let (mut stun, mut rng) = client(&["198.51.100.1:1"]);
        let asked = stun.poll(START, &mut rng).unwrap();
        assert_eq!(asked.bytes.len(), REQUEST_LEN);
        let good = answer(&asked.bytes[8..20], "203.0.113.1:9".parse().unwrap());
        let later = START + Duration::from_millis(30);
        assert_eq!(stun.handle(later, 0, "198.51.100.9:1".parse().unwrap(), &good), None);
        assert_eq!(stun.handle(later, 1, asked.server, &good), None);
        let guessed = answer(&[0; 12], "203.0.113.1:9".parse().unwrap());
        assert_eq!(stun.handle(later, 0, asked.server, &guessed), None);
        let zero = answer(&asked.bytes[8..20], "203.0.113.1:0".parse().unwrap());
        assert_eq!(stun.handle(later, 0, asked.server, &zero), None);
        let got = stun.handle(later, 0, asked.server, &good).unwrap();
        assert_eq!((got.mapped.port(), got.rtt), (9, Duration::from_millis(30)));
        assert_eq!(stun.handle(later, 0, asked.server, &good), None);
        assert!(!stun.is_asking() && stun.poll_timeout().is_none());
    }

    #[test]
    fn a_silent_server_is_asked_a_few_times_with_growing_pauses() {
        let (mut stun, mut rng) = client(&["198.51.100.1:1"]);
        let (mut now, mut asked) = (START, Vec::new());
        while let Some(at) = stun.poll_timeout() {
            now = at;
            stun.handle_timeout(now);
            asked.extend(stun.poll(now, &mut rng));
        }
        assert_eq!(asked.len(), usize::from(MAX_ATTEMPTS));
        assert_eq!(now.since(START), Duration::from_millis(500 + 1_000 + 2_000 + 4_000));
        assert_ne!(asked[0].bytes, asked[1].bytes, "transaction ids are never used twice");
    }

    #[test]
    fn a_new_round_starts_with_no_answers_of_its_own() {
        let (mut stun, mut rng) = client(&["198.51.100.1:1", "198.51.100.2:1"]);
        while let Some(asked) = stun.poll(START, &mut rng) {
            stun.handle(START, 0, asked.server, &reply(&asked, "203.0.113.1:9"));
        }
        assert_eq!(stun.fresh().mapping(&local()), Some(Mapping::EndpointIndependent));
        let later = START + Duration::from_secs(60);
        stun.start(later, &local());
        assert_eq!((stun.mapped().count(), stun.fresh().mapped().count()), (1, 0));
        let asked = stun.poll(later, &mut rng).unwrap();
        stun.handle(later, 0, asked.server, &reply(&asked, "203.0.113.1:10"));
        let fresh = stun.fresh();
        assert_eq!(fresh.mapped().map(|a| a.port()).collect::<Vec<_>>(), [10]);
        assert!(fresh.rtt(RELAY).is_some() && fresh.mapping(&local()).is_none());
    }

    #[test]
    fn servers_and_requests_are_bounded() {
        let mut stun = Stun::default();
        stun.set_servers((0..200).map(|n| (RELAY, SocketAddr::from(([198, 51, 100, n], 1)))));
        let many: Vec<_> =
            (0..40).map(|id| LocalSocket { id, addr: "10.0.0.2:1".parse().unwrap() }).collect();
        stun.start(START, &many);
        assert_eq!((stun.servers.len(), stun.requests.len()), (MAX_SERVERS, MAX_REQUESTS));
    }

    proptest! {
        #[test]
        fn no_answer_panics(
            garbage in proptest::collection::vec(any::<u8>(), 0..600), at in 0usize..32, value in any::<u8>(),
        ) {
            let (mut stun, mut rng) = client(&["198.51.100.1:1"]);
            let asked = stun.poll(START, &mut rng).unwrap();
            stun.handle(START, 0, asked.server, &garbage);
            let mut head = vec![1, 1, 0, garbage.len() as u8];
            head.extend(&asked.bytes[4..20]);
            head.extend(&garbage);
            stun.handle(START, 0, asked.server, &head);
            let mut changed = answer(&asked.bytes[8..20], "203.0.113.1:9".parse().unwrap());
            changed[at] = value;
            stun.handle(START, 0, asked.server, &changed);
        }
    }
}
