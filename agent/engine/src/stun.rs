//! What we look like from outside: STUN binding requests (RFC 8489) to the relays' STUN services.
//!
//! A round asks every server from every socket of its family, repeats what isn't answered and then rests: an idle
//! engine asks nothing. Only the asked server's answer to a request that is still open counts. Two answers from one
//! socket tell how the NAT maps, and their round-trip times which relay is near.

use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use bytecodec::{DecodeExt as _, EncodeExt as _};
use rand_core::RngCore;
use stun_codec::rfc5389::attributes::{MappedAddress, XorMappedAddress};
use stun_codec::rfc5389::{Attribute, methods::BINDING};
use stun_codec::{Message, MessageClass, MessageDecoder, MessageEncoder, TransactionId};
use warren_common::ids::RelayId;
use warren_common::time::Instant;

use crate::io::LocalSocket;
use crate::status::Mapping;

/// Most server addresses asked in one round; the netmap's first ones. Enough to tell mappings apart and to find a near
/// relay, few enough to be no burden.
pub const MAX_SERVERS: usize = 16;
/// Most requests of one round: servers times sockets.
pub const MAX_REQUESTS: usize = 64;
/// Longest answer that is looked at, in bytes: a binding response is far shorter.
pub const MAX_RESPONSE_LEN: usize = 548;
/// Bytes of a binding request without attributes.
pub(crate) const REQUEST_LEN: usize = 20;
/// First retransmission time-out (RFC 8489 section 6.2.1); doubled for each repetition.
const RETRANSMIT: Duration = Duration::from_millis(500);
/// Requests per server and round before it counts as silent.
const MAX_ATTEMPTS: u8 = 4;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

/// True if `datagram` is a STUN message by its leading bits and cookie.
pub(crate) fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= 20 && datagram[0] <= 1 && datagram[4..8] == COOKIE
}

#[derive(Debug, Clone, Copy)]
struct Request {
    txid: [u8; 12],
    socket: u8,
    server: SocketAddr,
    relay: RelayId,
    sent: Instant,
    attempts: u8,
    due: Instant,
}

/// What a server said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) socket: u8,
    pub(crate) server: SocketAddr,
    pub(crate) relay: RelayId,
    pub(crate) mapped: SocketAddr,
    pub(crate) rtt: Duration,
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
                    txid: [0; 12],
                    socket: socket.id,
                    server: *server,
                    relay: *relay,
                    sent: now,
                    attempts: 0,
                    due: now,
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
        rng.fill_bytes(&mut request.txid); // a new one each time, so that the round-trip time is exact
        request.sent = now;
        request.due = now + RETRANSMIT * (1 << request.attempts);
        request.attempts += 1;
        Some(Asked { socket: request.socket, server: request.server, bytes: binding_request(request.txid) })
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
        if datagram.len() > MAX_RESPONSE_LEN || !is_stun(datagram) {
            return None;
        }
        let at = self.requests.iter().position(|r| {
            r.attempts > 0 && r.socket == socket && r.server == from && r.txid == datagram[8..20]
        })?;
        let mapped = binding_response(datagram)?;
        let request = self.requests.remove(at);
        let answer =
            Answer { socket, server: from, relay: request.relay, mapped, rtt: now.since(request.sent) };
        self.answers.retain(|a| a.server != from || a.socket != socket);
        self.answers.push(answer);
        Some(answer)
    }

    /// Our address as seen from outside, by one socket and family, each distinct one once, the latest first.
    pub(crate) fn mapped(&self) -> impl Iterator<Item = SocketAddr> {
        let latest = self.answers.iter().rev();
        latest.clone().enumerate().filter_map(move |(i, answer)| {
            let seen = latest.clone().take(i).any(|a| a.mapped == answer.mapped);
            (!seen).then_some(answer.mapped)
        })
    }

    /// Round-trip time to a relay's nearest STUN address.
    pub(crate) fn rtt(&self, relay: RelayId) -> Option<Duration> {
        self.answers.iter().filter(|a| a.relay == relay).map(|a| a.rtt).min()
    }

    /// How the NAT maps, from IPv4 if there is any.
    pub(crate) fn mapping(&self, local: &[LocalSocket]) -> Option<Mapping> {
        [true, false].into_iter().find_map(|v4| {
            let answers = || self.answers.iter().filter(move |a| a.mapped.is_ipv4() == v4);
            if answers().any(|a| local.iter().any(|l| l.addr == a.mapped)) {
                return Some(Mapping::None);
            }
            let pairs = || {
                answers().enumerate().flat_map(move |(i, a)| {
                    answers().skip(i + 1).filter(|b| b.socket == a.socket).map(move |b| (*a, *b))
                })
            };
            if pairs().any(|(a, b)| a.server.ip() == b.server.ip() && a.mapped != b.mapped) {
                return Some(Mapping::AddressAndPortDependent);
            }
            let mut apart = pairs().filter(|(a, b)| a.server.ip() != b.server.ip()).peekable();
            apart.peek()?;
            Some(if apart.any(|(a, b)| a.mapped != b.mapped) {
                Mapping::AddressDependent
            } else {
                Mapping::EndpointIndependent
            })
        })
    }
}

fn binding_request(txid: [u8; 12]) -> Vec<u8> {
    let message = Message::<Attribute>::new(MessageClass::Request, BINDING, TransactionId::new(txid));
    // A message without attributes always encodes; an empty datagram would just go unanswered.
    MessageEncoder::new().encode_into_bytes(message).unwrap_or_default()
}

fn binding_response(datagram: &[u8]) -> Option<SocketAddr> {
    let message = MessageDecoder::<Attribute>::new().decode_from_bytes(datagram).ok()?.ok()?;
    if message.class() != MessageClass::SuccessResponse || message.method() != BINDING {
        return None;
    }
    let xor = message.get_attribute::<XorMappedAddress>().map(XorMappedAddress::address);
    let mapped = xor.or_else(|| message.get_attribute::<MappedAddress>().map(MappedAddress::address))?;
    let mapped = SocketAddr::new(mapped.ip().to_canonical(), mapped.port());
    (mapped.port() != 0 && !mapped.ip().is_unspecified()).then_some(mapped)
}
