//! What the NAT in front of this host does (RFC 4787), found out as RFC 5780 says, as far as the STUN servers can help.
//!
//! With sockets of its own: what a NAT lets back in to those of the tunnels depends on whom they have talked with. Only a
//! server with a second address can tell how a NAT filters, and two addresses are needed to tell how it maps; what can't be
//! told is left open.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rand_core::RngCore as _;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};
use warren_engine::status::Mapping;
use warren_engine::stun::codec::{self, Change, MAX_RESPONSE_LEN, Response, TXID_LEN};
use warren_engine::stun::mapping;

use crate::api::Nat;
use crate::entropy::OsEntropy;
use crate::os::udp;

/// Most servers that are asked.
pub const MAX_SERVERS: usize = 8;
/// A question that is not answered is asked again after so long.
const RETRANSMIT: Duration = Duration::from_millis(400);
/// How long answers are waited for: three questions, and a slow path's round trip.
const PATIENCE: Duration = Duration::from_millis(1_200);

/// Finds out. `own` are this host's addresses; sockets get `mark`. Takes up to four times `PATIENCE`.
pub async fn nat(servers: &[SocketAddr], own: &[IpAddr], mark: u32) -> Nat {
    let v4 = asks_by_ipv4(servers, own);
    let servers: Vec<_> = servers.iter().copied().filter(|s| s.is_ipv4() == v4).take(MAX_SERVERS).collect();
    let any: IpAddr = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let open = || udp::socket(SocketAddr::new(any, 0), mark).and_then(UdpSocket::from_std);
    match (open(), open()) {
        (Ok(socket), Ok(second)) => Check { socket, second }.run(&servers, own).await,
        _ => Nat::default(), // nothing is known
    }
}

/// IPv4 is what most NATs are about; but a host must have it, and IPv6 is better than nothing.
fn asks_by_ipv4(servers: &[SocketAddr], own: &[IpAddr]) -> bool {
    let there = |v4: bool| servers.iter().any(|server| server.is_ipv4() == v4);
    let here = |v4: bool| own.iter().any(|addr| addr.is_ipv4() == v4);
    there(true) && (here(true) || !(there(false) && here(false)))
}

/// Two sockets: the one that is asked about, and another behind the same NAT.
struct Check {
    socket: UdpSocket,
    second: UdpSocket,
}

/// One question.
struct Ask {
    to: SocketAddr,
    change: Option<Change>,
    /// From the second socket to the first.
    second: bool,
    txid: [u8; TXID_LEN],
    outcome: Outcome,
}

/// What came back to the first socket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Silence,
    Answer(Response),
    /// The server can't do that.
    Refusal,
    /// Our own question.
    Echo,
}

impl Ask {
    fn new(to: SocketAddr, change: Option<Change>, second: bool) -> Self {
        let mut txid = [0; TXID_LEN];
        OsEntropy.fill_bytes(&mut txid);
        Self { to, change, second, txid, outcome: Outcome::Silence }
    }

    fn mapped(&self) -> Option<SocketAddr> {
        match self.outcome {
            Outcome::Answer(response) => Some(response.mapped),
            Outcome::Silence | Outcome::Refusal | Outcome::Echo => None,
        }
    }

    /// Takes a datagram if it is about this question.
    fn take(&mut self, from: SocketAddr, datagram: &[u8]) {
        if codec::transaction(datagram) != Some(self.txid) || self.outcome != Outcome::Silence {
            return;
        }
        if codec::is_request(datagram) {
            self.outcome = Outcome::Echo;
            return;
        }
        let right = match self.change {
            None => from == self.to,
            Some(Change::Port) => from.ip() == self.to.ip() && from.port() != self.to.port(),
            Some(Change::AddressAndPort) => from.ip() != self.to.ip(),
        };
        match codec::response(datagram) {
            Some(response) if right => self.outcome = Outcome::Answer(response),
            // A server that ignores where it should answer from is no help either.
            _ if from == self.to => self.outcome = Outcome::Refusal,
            _ => {}
        }
    }
}

impl Check {
    async fn run(&self, servers: &[SocketAddr], own: &[IpAddr]) -> Nat {
        let mut asks: Vec<Ask> = servers.iter().map(|s| Ask::new(*s, None, false)).collect();
        self.ask(&mut asks).await;
        let answers: Vec<(SocketAddr, SocketAddr)> =
            asks.iter().filter_map(|ask| Some((ask.to, ask.mapped()?))).collect();
        let Some((_, mapped)) = answers.first().copied() else { return Nat::default() };
        let port = self.socket.local_addr().map_or(0, |a| a.port());
        let none = own.contains(&mapped.ip()) && mapped.port() == port;

        // Another address of a server, one that this socket has not sent to yet.
        let untouched = |other: &SocketAddr| servers.iter().all(|s| s.ip() != other.ip());
        let other = asks.iter().find_map(|ask| {
            let Outcome::Answer(Response { other: Some(other), .. }) = ask.outcome else { return None };
            (other.is_ipv4() == ask.to.is_ipv4() && other.port() != ask.to.port() && untouched(&other))
                .then_some((ask.to, other))
        });

        // Filtering first: asking the other address opens the NAT for it.
        let mut second = Vec::new();
        if let Some((server, _)) = other {
            second.push(Ask::new(server, Some(Change::AddressAndPort), false));
            second.push(Ask::new(server, Some(Change::Port), false));
        }
        if !none {
            second.extend([Ask::new(mapped, None, false), Ask::new(mapped, None, true)]);
        }
        self.ask(&mut second).await;
        let hairpin = (!none).then(|| second.iter().any(|ask| ask.outcome == Outcome::Echo));
        let Some((server, other)) = other else {
            let mapping = if none { Some(Mapping::None) } else { mapping(&answers) };
            return Nat { mapping: mapping.map(word), filtering: None, hairpin };
        };
        let mut third =
            [Ask::new(SocketAddr::new(other.ip(), server.port()), None, false), Ask::new(other, None, false)];
        self.ask(&mut third).await;
        let alive = third.iter().all(|ask| ask.mapped().is_some());
        let filtering = match [second[0].outcome, second[1].outcome] {
            [Outcome::Answer(_), _] if none => Some(Mapping::None),
            [Outcome::Answer(_), _] => Some(Mapping::EndpointIndependent),
            [Outcome::Silence, Outcome::Answer(_)] => Some(Mapping::AddressDependent),
            // Unless the other address is dead: then its silence means nothing.
            [Outcome::Silence, Outcome::Silence] if alive => Some(Mapping::AddressAndPortDependent),
            _ => None,
        };
        let first = answers.iter().find(|(to, _)| *to == server).copied();
        let more = third.iter().filter_map(|ask| Some((ask.to, ask.mapped()?)));
        let all: Vec<_> = first.into_iter().chain(more).collect();
        let mapping = if none { Some(Mapping::None) } else { mapping(&all).or_else(|| mapping(&answers)) };
        Nat { mapping: mapping.map(word), filtering: filtering.map(word), hairpin }
    }

    /// Asks until everything is answered or patience ends.
    async fn ask(&self, asks: &mut [Ask]) {
        let start = Instant::now();
        let (end, mut resend) = (start + PATIENCE, start);
        let mut buffer = [0; MAX_RESPONSE_LEN + 1];
        while asks.iter().any(|ask| ask.outcome == Outcome::Silence) && Instant::now() < end {
            if resend <= Instant::now() {
                resend += RETRANSMIT;
                for ask in asks.iter().filter(|ask| ask.outcome == Outcome::Silence) {
                    let socket = if ask.second { &self.second } else { &self.socket };
                    // What can't be sent is not answered.
                    let _ = socket.send_to(&codec::request(ask.txid, ask.change), ask.to).await;
                }
            }
            // An error is about an earlier question: its answer does not come.
            if let Ok(Ok((len, from))) = timeout_at(resend.min(end), self.socket.recv_from(&mut buffer)).await
            {
                asks.iter_mut().for_each(|ask| ask.take(from, &buffer[..len]));
            }
        }
    }
}

/// As the contract says it.
pub fn word(mapping: Mapping) -> String {
    match mapping {
        Mapping::None => "none",
        Mapping::EndpointIndependent => "endpoint-independent",
        Mapping::AddressDependent => "address-dependent",
        Mapping::AddressAndPortDependent => "address-and-port-dependent",
    }
    .to_owned()
}

#[cfg(test)]
mod tests;
