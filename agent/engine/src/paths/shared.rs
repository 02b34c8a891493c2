//! What all peers' state machines share: our own addresses, relays, the generator, and the queues out.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use ipnet::{Ipv4Net, Ipv6Net};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use warren_common::endpoint::is_endpoint;
use warren_common::time::Instant;
use warren_common::wire::probe::{
    Candidate, CandidateKind, MAX_CANDIDATES, MAX_PROBE_LEN, Message, NONCE_LEN, ProbeKeys, TxId,
};

use super::relays::Relays;
use super::{
    Budget, KEEPALIVE, MAX_OBSERVED, MAX_PATH_EVENTS, MAX_PREDICTED, MAX_QUEUED, MAX_QUEUED_LONG, MAX_STATIC,
    PathCounters, PeerIdx, Rate, SUSPECT_INTERVAL, UNKNOWN_SILENCE,
};
use crate::event::Event;
use crate::io::{Destination, LocalSocket, Source};
use crate::stun::PortUse;

/// Addresses of our own interfaces that are listed before predicted ports.
const FIRST_LOCAL: usize = 6;

/// What all peers' state machines use.
pub(super) struct Shared {
    pub(super) local: Vec<LocalSocket>,
    pub(super) reflexive: Vec<SocketAddr>,
    /// What our NAT forwards to us.
    pub(super) mapped: Option<SocketAddr>,
    /// Where we are reached as somebody says who knows the network, in each network.
    pub(super) fixed: ArrayVec<SocketAddr, MAX_STATIC>,
    pub(super) observed: ArrayVec<SocketAddr, MAX_OBSERVED>,
    pub(super) own: ArrayVec<Candidate, MAX_CANDIDATES>,
    pub(super) overlay: Option<(Ipv4Net, Ipv6Net)>,
    pub(super) relays: Relays,
    pub(super) signal: bool,
    /// A round found no direct way: our reflexive address may be a former one.
    pub(super) wants_fresh_stun: bool,
    /// The network may be another one: it probably is.
    pub(super) wants_stun_now: bool,
    /// What our NAT does with ports.
    pub(super) ports: Option<PortUse>,
    /// STUN has been asked in this network, and answered or not.
    pub(super) stun_settled: bool,
    /// After how much silence an IPv4 way needs a word.
    pub(super) keepalive: Duration,
    /// In how much silence our NAT is known not to forget.
    pub(super) trusted: Duration,
    pub(super) wants_keepalive: bool,
    /// Extra sockets that are open.
    pub(super) extra: BTreeSet<u8>,
    /// Other ones are wanted now.
    pub(super) sockets_changed: bool,
    /// Ports are opened for this peer.
    pub(super) search: Option<PeerIdx>,
    pub(super) guesses: Rate,
    pub(super) probes: Budget,
    suspected: Option<Instant>,
    pub(super) rng: ChaCha20Rng,
    pub(super) queue: VecDeque<(Destination, ArrayVec<u8, MAX_PROBE_LEN>)>,
    /// Those that must arrive whole.
    pub(super) long_queue: VecDeque<(Destination, Vec<u8>)>,
    /// The TUN's MTU, and so a relayed way's: a relay carries whatever the TUN does.
    pub(super) mtu: usize,
    pub(super) events: VecDeque<Event>,
    pub(super) ready: VecDeque<PeerIdx>,
    pub(super) counters: PathCounters,
}

impl Shared {
    pub(super) fn new(seed: [u8; 32], mtu: usize) -> Self {
        Self {
            mtu,
            long_queue: VecDeque::new(),
            local: Vec::new(),
            reflexive: Vec::new(),
            mapped: None,
            fixed: ArrayVec::new(),
            observed: ArrayVec::new(),
            own: ArrayVec::new(),
            overlay: None,
            wants_fresh_stun: false,
            wants_stun_now: false,
            ports: None,
            stun_settled: false,
            keepalive: KEEPALIVE,
            trusted: UNKNOWN_SILENCE,
            wants_keepalive: false,
            extra: BTreeSet::new(),
            sockets_changed: false,
            search: None,
            guesses: Rate::default(),
            probes: Budget::default(),
            suspected: None,
            relays: Relays::default(),
            signal: false,
            rng: ChaCha20Rng::from_seed(seed),
            queue: VecDeque::new(),
            events: VecDeque::new(),
            ready: VecDeque::new(),
            counters: PathCounters::default(),
        }
    }

    /// True if `addr` may be an endpoint of a peer.
    pub(super) fn accepts(&self, addr: SocketAddr) -> bool {
        is_endpoint(self.overlay, addr) && !self.local.iter().any(|l| l.addr == addr)
    }

    /// True if `addr` is at our own NAT's outside: who is reached there is behind it too, or the NAT leads back to us.
    pub(super) fn is_our_outside(&self, addr: SocketAddr) -> bool {
        let seen = self.reflexive.iter().chain(&self.mapped).any(|own| own.ip() == addr.ip());
        seen && !self.local.iter().any(|l| l.addr.ip() == addr.ip())
    }

    /// Lists our own addresses anew: what the router or somebody says, STUN, what peers saw where STUN knows nothing, interfaces. True if that changed
    /// the list.
    pub(super) fn rebuild_own(&mut self) -> bool {
        let mut own = ArrayVec::<Candidate, MAX_CANDIDATES>::new();
        let stunned = |addr: &SocketAddr| self.reflexive.iter().any(|r| r.is_ipv4() == addr.is_ipv4());
        let mut local = self.local.iter().map(|l| (CandidateKind::Local, l.addr));
        let first_local: ArrayVec<_, FIRST_LOCAL> = local.by_ref().take(FIRST_LOCAL).collect();
        let predicted = (1..=MAX_PREDICTED).filter_map(|n| self.ports?.predict(n));
        let predicted = predicted.map(|addr| (CandidateKind::Predicted, addr));
        let reflexive = self.reflexive.iter().map(|a| (CandidateKind::Reflexive, *a));
        let mapped = self.mapped.iter().map(|a| (CandidateKind::Mapped, *a));
        // Known to STUN, it is more than what somebody says.
        let fixed = self.fixed.iter().filter(|a| !self.reflexive.contains(a));
        let fixed = fixed.map(|a| (CandidateKind::Static, *a));
        let observed = self.observed.iter().filter(|a| !stunned(a)).map(|a| (CandidateKind::Observed, *a));
        // Those from outside come first: should the list overflow, they are the ones that count.
        for (kind, addr) in mapped
            .chain(fixed)
            .chain(reflexive)
            .chain(observed)
            .chain(first_local)
            .chain(predicted)
            .chain(local)
        {
            let known = own.iter().any(|c| c.addr == addr);
            if is_endpoint(self.overlay, addr) && !known && !own.is_full() {
                own.push(Candidate { kind, addr });
            }
        }
        own.sort_unstable();
        let changed = own != self.own;
        self.own = own;
        changed
    }

    /// A peer saw us at `addr`. Worth passing on only if it is news and STUN is silent.
    pub(super) fn observe(&mut self, addr: SocketAddr) {
        let known = self.own.iter().any(|c| c.addr == addr) || self.observed.contains(&addr);
        if !known && is_endpoint(self.overlay, addr) {
            if self.observed.is_full() {
                self.observed.remove(0);
            }
            self.observed.push(addr);
            self.rebuild_own();
        }
    }

    /// The network may be another one, and connections over it dead: their owner should look.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.suspected.is_none_or(|at| now.since(at) >= SUSPECT_INTERVAL) {
            self.suspected = Some(now);
            self.wants_stun_now = true;
            self.push_event(Event::NetworkSuspect);
        }
    }

    /// After how much silence a way to `remote` needs a word.
    pub(super) fn keepalive_of(&self, remote: SocketAddr) -> Duration {
        // For IPv6 there is no NAT to measure; its firewalls remember longer.
        if remote.is_ipv4() { self.keepalive } else { KEEPALIVE }
    }

    /// After how much silence a way to `remote` is in doubt.
    pub(super) fn trusted_silence(&self, remote: SocketAddr) -> Duration {
        if remote.is_ipv4() { self.trusted } else { KEEPALIVE }
    }

    /// Answers a ping of a peer that isn't in use. Only one that came through a relay can be such: by its tag nobody is found.
    pub(super) fn answer_from_idle(&mut self, keys: &ProbeKeys, txid: TxId, from: Source) {
        let Source::Relay { relay, device } = from else { return };
        let mut nonce = [0; NONCE_LEN];
        self.rng.fill_bytes(&mut nonce);
        let pong = keys.seal(&Message::Pong { txid, observed: None }, nonce);
        self.enqueue(Destination::Relay { relay, device }, pong);
    }

    pub(super) fn enqueue(&mut self, to: Destination, probe: ArrayVec<u8, MAX_PROBE_LEN>) {
        if self.queue.len() >= MAX_QUEUED {
            self.counters.probe_queue_full += 1;
        } else {
            self.queue.push_back((to, probe));
        }
    }

    pub(super) fn enqueue_long(&mut self, to: Destination, probe: Vec<u8>) {
        if self.long_queue.len() >= MAX_QUEUED_LONG {
            self.counters.probe_queue_full += 1;
        } else {
            self.long_queue.push_back((to, probe));
        }
    }

    pub(super) fn push_event(&mut self, event: Event) {
        if self.events.len() >= MAX_PATH_EVENTS {
            self.events.pop_front();
            self.counters.events += 1;
        }
        self.events.push_back(event);
    }
}
