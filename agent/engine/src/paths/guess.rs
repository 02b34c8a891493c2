//! Guessing ports of NATs that give each destination another one.
//!
//! Such a NAT doesn't hinder when the other end lets anybody in. If that end lets in only whom it knows (port-restricted), it
//! must have sent to the very port that will be used, and nobody knows which. Then the end behind the hard NAT *opens* many
//! ports, from as many sockets, towards the other end's one address; and that end *guesses*: it sends to ports of the first
//! end's address until one is hit. With n ports open, g guesses hit with probability 1 - (1 - n/64 512)^g: 87 % for 128
//! and 1 024. Where the NAT gives out ports in steps the ones near the last are guessed, which always hits unless hundreds
//! of other connections came between.
//!
//! It costs packets and sockets, so it is done for one peer at a time, seldom, and never when both ends' ports are random:
//! that would take some 30 000 times as many for the same chance.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use rand_core::RngCore;
use warren_common::time::Instant;
use warren_common::wire::probe::{CandidateKind, Message, NONCE_LEN, Ports, TXID_LEN};

use super::active::Active;
use super::shared::Shared;
use super::{PeerIdx, Way};
use crate::io::Destination;
use crate::stun::PortUse;

/// The numbers of extra sockets that open ports: 128. More would not fit a byte beside the others, and strain small routers.
pub const OPEN_SOCKETS: RangeInclusive<u8> = 17..=144;
/// Packets that open ports in one search: each socket twice, since the first may come before the other end guesses.
pub const MAX_OPENED_PORTS: usize = 256;
/// Guesses in one search: with [`OPEN_SOCKETS`] a chance of 87 %, and 90 KB.
pub const MAX_GUESSES: u32 = 1_024;
/// Guesses per minute for all peers: one search.
pub const MAX_GUESSES_PER_MINUTE: u32 = MAX_GUESSES;
/// How long ports are held open for the other end's guesses.
pub const SEARCH_TIME: Duration = Duration::from_secs(14);
/// Least time between two searches for a peer.
pub const SEARCH_PAUSE: Duration = Duration::from_secs(600);
/// Ports announced as the likely next ones of our NAT.
pub const MAX_PREDICTED: u16 = 6;

/// Rounds of ordinary probing before a search: a few seconds.
const ROUNDS_BEFORE: usize = 5;
/// When ports are opened for the second time.
const OPEN_AGAIN: Duration = Duration::from_secs(5);
/// Guesses that leave at once, and the pause after them: 100 a second, which no router takes for an attack.
const BURST: u32 = 10;
const BURST_PAUSE: Duration = Duration::from_millis(100);
/// Ports on either side of a known one that are guessed first.
const NEAR: u32 = 128;
/// Ports below this are not given out (RFC 4787 section 4.2.2).
const FIRST_PORT: u32 = 1_024;
const PORTS: u32 = 65_536 - FIRST_PORT;

/// Ports in the order they are guessed: none twice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guesses {
    near: Option<u16>,
    start: u32,
    stride: u32,
}

impl Guesses {
    pub(super) fn new(near: Option<u16>, rng: &mut impl RngCore) -> Self {
        // A stride without a common factor with 64 512 = 2^10 · 3^2 · 7 visits every port once.
        let mut stride = rng.next_u32() % PORTS;
        while stride.is_multiple_of(2) || stride.is_multiple_of(3) || stride.is_multiple_of(7) {
            stride = (stride + 1) % PORTS;
        }
        Self { near, start: rng.next_u32() % PORTS, stride }
    }

    /// The `n`th; `None` if there is no such port.
    pub(super) fn port(&self, n: u32) -> Option<u16> {
        match self.near {
            Some(near) if n < 2 * NEAR => {
                let (near, away) = (i64::from(near), i64::from(n / 2 + 1));
                let port = if n.is_multiple_of(2) { near + away } else { near - away };
                u16::try_from(port).ok().filter(|port| u32::from(*port) >= FIRST_PORT)
            }
            _ => {
                let at = (u64::from(self.start) + u64::from(n) * u64::from(self.stride)) % u64::from(PORTS);
                u16::try_from(at + u64::from(FIRST_PORT)).ok()
            }
        }
    }
}

/// What an end does in a search.
pub(super) enum Role {
    /// Ports of ours are open, or about to be.
    Opens { until: Instant, again: Option<Instant> },
    /// Guesses the other end's.
    Guesses { ip: IpAddr, guesses: Guesses, done: u32, next: Instant },
}

/// One peer's searches.
#[derive(Default)]
pub(super) struct Search {
    role: Option<Role>,
    last: Option<Instant>,
}

impl Search {
    fn may_begin(&self, now: Instant, pause: Duration) -> bool {
        self.role.is_none() && self.last.is_none_or(|at| now.since(at) >= pause)
    }

    pub(super) fn due(&self) -> Option<Instant> {
        Some(match self.role.as_ref()? {
            Role::Opens { until, again } => again.map_or(*until, |again| again.min(*until)),
            Role::Guesses { next, .. } => *next,
        })
    }
}

impl Shared {
    /// True if our NAT gives each destination another port.
    pub(super) const fn varies(&self) -> bool {
        matches!(self.ports, Some(PortUse::Steps { .. } | PortUse::Random))
    }

    /// The same in the words of the wire.
    pub(super) const fn announced_ports(&self) -> Option<Ports> {
        match self.ports {
            None => None,
            Some(PortUse::Fixed) => Some(Ports::Fixed),
            Some(PortUse::Steps { .. }) => Some(Ports::Predictable),
            Some(PortUse::Random) => Some(Ports::Random),
        }
    }

    fn end_search(&mut self, idx: PeerIdx) {
        if self.search == Some(idx) {
            self.search = None;
            self.sockets_changed = true;
        }
    }
}

impl Active {
    /// Begins to open ports, if nothing less has helped and it can help.
    pub(super) fn consider_search(&mut self, now: Instant, shared: &mut Shared) {
        let can_help = shared.varies()
            && self.peer_ports == Some(Ports::Fixed)
            && !self.is_direct()
            && self.round >= ROUNDS_BEFORE
            && self.target().is_some();
        if can_help && shared.search.is_none() && self.search.may_begin(now, SEARCH_PAUSE) {
            shared.search = Some(self.idx);
            shared.sockets_changed = true;
            self.search.last = Some(now);
            self.search.role = Some(Role::Opens { until: now + SEARCH_TIME, again: None });
        }
    }

    /// The peer's address to open ports towards: where STUN saw it, or its public one.
    fn target(&self) -> Option<SocketAddr> {
        let of_kind = |kind| {
            let mut remotes = self.remotes.iter().filter(move |r| r.kind == kind);
            remotes.find(|r| r.way.remote.is_ipv4() && !is_private(r.way.remote)).map(|r| r.way.remote)
        };
        of_kind(CandidateKind::Reflexive).or_else(|| of_kind(CandidateKind::Local))
    }

    /// The extra sockets are there, or not any more.
    pub(super) fn open_ports(&mut self, now: Instant, relay: Option<Destination>, shared: &mut Shared) {
        let Some(Role::Opens { again, .. }) = &mut self.search.role else { return };
        let first = again.is_none();
        if !first && again.is_some_and(|again| now < again) {
            return;
        }
        // The second time is the last.
        *again = Some(if first { now + OPEN_AGAIN } else { Instant::FAR_FUTURE });
        let (Some(target), Some(relay)) = (self.target(), relay) else { return };
        let sockets: Vec<u8> = shared.extra.iter().copied().filter(|id| OPEN_SOCKETS.contains(id)).collect();
        for socket in sockets {
            self.knock(Way { socket, remote: target }, shared);
        }
        let near = match shared.ports {
            Some(PortUse::Steps { last, .. }) => Some(last),
            _ => shared.reflexive.iter().find(|a| a.is_ipv4()).map(|a| SocketAddr::new(a.ip(), 0)),
        };
        if let Some(near) = near {
            self.send(relay, &Message::Guess { near }, shared);
        }
    }

    /// The peer has opened ports and asks us to guess.
    pub(super) fn on_guess(&mut self, now: Instant, near: SocketAddr, shared: &mut Shared) {
        if matches!(self.search.role, Some(Role::Guesses { .. })) {
            return; // the same search
        }
        // With random ports of our own there is next to no chance; and a peer must not make us a flood. Its second word in
        // a search may be the first that arrives.
        let fine = shared.ports == Some(PortUse::Fixed)
            && !self.is_direct()
            && near.is_ipv4()
            && shared.accepts(SocketAddr::new(near.ip(), 1))
            && self.search.may_begin(now, SEARCH_PAUSE / 2);
        if !fine {
            shared.counters.guess_refused += 1;
            return;
        }
        self.search.last = Some(now);
        let guesses = Guesses::new(Some(near.port()).filter(|port| *port != 0), &mut shared.rng);
        self.search.role = Some(Role::Guesses { ip: near.ip(), guesses, done: 0, next: now });
    }

    /// Does what is due in a search.
    pub(super) fn run_search(&mut self, now: Instant, relay: Option<Destination>, shared: &mut Shared) {
        match &mut self.search.role {
            None => {}
            Some(Role::Opens { until, again }) => {
                let over = *until <= now || self.current.is_some();
                if over {
                    self.search.role = None;
                    shared.end_search(self.idx);
                } else if again.is_some_and(|again| again <= now) {
                    self.open_ports(now, relay, shared);
                }
            }
            Some(Role::Guesses { ip, guesses, done, next }) => {
                if self.current.is_some() || *done >= MAX_GUESSES {
                    self.search.role = None;
                    return;
                }
                if *next > now {
                    return;
                }
                *next = now + BURST_PAUSE;
                let (ip, guesses, first) = (*ip, *guesses, *done);
                *done += BURST;
                let minute = Duration::from_secs(60);
                for n in first..first + BURST {
                    let Some(port) = guesses.port(n) else { continue };
                    if !shared.guesses.take(now, minute, MAX_GUESSES_PER_MINUTE) {
                        shared.counters.probe_limited += 1;
                        return;
                    }
                    let socket = shared.local.iter().find(|l| l.addr.is_ipv4()).map(|l| l.id);
                    if let Some(socket) = socket {
                        self.knock(Way { socket, remote: SocketAddr::new(ip, port) }, shared);
                    }
                }
            }
        }
    }

    /// The peer is idle or gone.
    pub(super) fn end_searches(&mut self, shared: &mut Shared) {
        self.search.role = None;
        shared.end_search(self.idx);
        shared.sockets_changed |= self.extra_sockets().next().is_some();
    }

    /// A ping of which no answer is expected: what counts is that it opens a NAT, or comes out of one.
    fn knock(&self, way: Way, shared: &mut Shared) {
        let mut txid = [0; TXID_LEN];
        shared.rng.fill_bytes(&mut txid);
        self.send(way.into(), &Message::Ping { txid }, shared);
    }
}

/// True for an address that means something behind one NAT only.
pub(super) fn is_private(addr: SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local() || matches!(ip.octets(), [100, 64..=127, ..]),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

const _: () = assert!(NONCE_LEN >= TXID_LEN, "both come from one generator");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;

    use super::*;

    #[test]
    fn no_port_is_guessed_twice_and_all_may_be() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let guesses = Guesses::new(None, &mut rng);
        let ports: BTreeSet<u16> = (0..PORTS).map(|n| guesses.port(n).unwrap()).collect();
        assert_eq!((ports.len(), *ports.first().unwrap()), (PORTS as usize, FIRST_PORT as u16));
    }

    #[test]
    fn ports_near_a_known_one_come_first() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let guesses = Guesses::new(Some(65_534), &mut rng);
        assert_eq!([0, 1, 2, 3].map(|n| guesses.port(n)), [Some(65_535), Some(65_533), None, Some(65_532)]);
        let low = Guesses::new(Some(1_024), &mut rng);
        assert_eq!([0, 1].map(|n| low.port(n)), [Some(1_025), None]);
    }

    #[test]
    fn a_search_is_what_its_budget_says() {
        assert_eq!(OPEN_SOCKETS.count() * 2, MAX_OPENED_PORTS);
        let time = BURST_PAUSE * (MAX_GUESSES / BURST);
        assert!(time + Duration::from_secs(2) < SEARCH_TIME, "all guesses come while the ports are open");
    }
}
