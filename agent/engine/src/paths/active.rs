//! One peer in use: its addresses, the pings under way, the way chosen.

use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use rand_core::RngCore as _;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::time::Instant;
use warren_common::wire::probe::{Candidate, CandidateKind, Message, NONCE_LEN, ProbeKeys, TXID_LEN, TxId};

use super::score::Score;
use super::{
    MAX_HINT_ENDPOINTS, MAX_INFLIGHT, MAX_PONGS_PER_SECOND, MAX_PROBES_PER_MINUTE, MAX_REMOTES,
    MAX_USER_PINGS, MAX_USER_PINGS_PER_SECOND, PING_TIMEOUT, PathCounters, PeerIdx, RELAY_FRESH, REPLY_FRESH,
    Rate, Shared, TRUST, Way,
};
use crate::event::{Event, Path, PingToken};
use crate::io::{Destination, Source};

mod time;
mod why;

pub(crate) use why::Obstacle;

const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);
/// How long a check waits for an ordinary answer before it spends a ping.
const CHECK_PATIENCE: Duration = Duration::from_millis(300);
/// Least time between two pings that packets from an unproved address bring about.
const TRIGGERED_INTERVAL: Duration = Duration::from_millis(200);
/// How recent a pong must be for its way to be a choice.
const CONFIRMED_FRESH: Duration = Duration::from_secs(10);

/// See the parent module.
pub(super) struct Active {
    idx: PeerIdx,
    device: DeviceId,
    keys: Option<ProbeKeys>,
    /// When there last was data, or the peer asked for addresses.
    used: Instant,
    current: Option<Current>,
    remotes: ArrayVec<Remote, MAX_REMOTES>,
    inflight: ArrayVec<Inflight, MAX_INFLIGHT>,
    /// Pings of the user that wait for a way or for their turn, with the time to give up.
    waiting: ArrayVec<(PingToken, Instant), MAX_USER_PINGS>,
    round: usize,
    next_round: Instant,
    /// Our addresses are to be sent at this time, with a request for the peer's if true.
    owed: Option<(Instant, bool)>,
    announced: Option<Instant>,
    listed: bool,
    relay_seen: Option<(RelayId, Instant)>,
    relay_rtt: Option<Duration>,
    /// The source of the last authentic packet on a direct way other than the current one.
    reply_to: Option<(Way, Instant)>,
    reachable: bool,
    told: Path,
    probes: Rate,
    checks: Rate,
    pongs: Rate,
    /// Pings for people.
    asked: Rate,
}

struct Current {
    way: Way,
    last_rx: Instant,
    check: Option<Check>,
}

struct Check {
    started: Instant,
    next_ping: Instant,
}

struct Remote {
    way: Way,
    kind: CandidateKind,
    learned: Instant,
    /// An authentic packet came from there.
    heard: bool,
    pinged: Option<Instant>,
    confirmed: Option<Instant>,
    rtt: Duration,
}

struct Inflight {
    txid: TxId,
    to: Destination,
    sent: Instant,
    token: Option<PingToken>,
}

impl Active {
    pub(super) fn new(now: Instant, idx: PeerIdx, device: DeviceId, keys: Option<ProbeKeys>) -> Self {
        Self {
            idx,
            device,
            keys,
            used: now,
            current: None,
            remotes: ArrayVec::new(),
            inflight: ArrayVec::new(),
            waiting: ArrayVec::new(),
            round: 0,
            next_round: now,
            owed: None,
            announced: None,
            listed: false,
            relay_seen: None,
            relay_rtt: None,
            reply_to: None,
            reachable: false,
            told: Path::None,
            probes: Rate::default(),
            checks: Rate::default(),
            pongs: Rate::default(),
            asked: Rate::default(),
        }
    }

    pub(super) const fn keys(&self) -> Option<&ProbeKeys> {
        self.keys.as_ref()
    }

    #[cfg(test)]
    pub(super) fn remotes(&self) -> usize {
        self.remotes.len()
    }

    #[cfg(test)]
    pub(super) fn inflight(&self) -> usize {
        self.inflight.len()
    }

    pub(super) const fn used(&mut self, now: Instant) {
        self.used = now;
    }

    pub(super) const fn last_used(&self) -> Instant {
        self.used
    }

    /// Addresses worth trying after a restart: the one in use, then those that answered, the latest first, then the others.
    pub(super) fn endpoints(&self) -> Vec<SocketAddr> {
        let current = self.current.as_ref().map(|c| c.way);
        let mut remotes: Vec<&Remote> = self.remotes.iter().collect();
        remotes.sort_by_key(|r| (Some(r.way) != current, std::cmp::Reverse((r.confirmed, r.learned))));
        let mut out = Vec::with_capacity(MAX_HINT_ENDPOINTS);
        for remote in remotes {
            if out.len() < MAX_HINT_ENDPOINTS && !out.contains(&remote.way.remote) {
                out.push(remote.way.remote);
            }
        }
        out
    }

    /// Takes addresses from before a restart.
    pub(super) fn relearn<'a>(
        &mut self,
        now: Instant,
        endpoints: impl Iterator<Item = &'a SocketAddr>,
        shared: &mut Shared,
    ) {
        for addr in endpoints {
            if shared.accepts(*addr) {
                self.learn_on_all(now, *addr, CandidateKind::Observed, shared);
            } else {
                shared.counters.candidate_refused += 1;
            }
        }
        self.restart_rounds(now);
    }

    /// The peer is idle or gone: what waits for it is told so.
    pub(super) fn end(self, shared: &mut Shared) {
        let path = self.told;
        let under_way = self.inflight.iter().filter_map(|i| i.token);
        for token in under_way.chain(self.waiting.iter().map(|(token, _)| *token)) {
            shared.push_event(Event::PingResult { token, path, rtt: None });
        }
        if path != Path::None {
            shared.push_event(Event::PathChanged { device: self.device, path: Path::None });
        }
    }

    // Data path.

    /// Data goes out: on a direct way that has been silent for too long, watch whether an answer comes. Returns when to
    /// look.
    pub(super) fn on_send(&mut self, now: Instant) -> Option<Instant> {
        let current = self.current.as_mut()?;
        if current.check.is_some() || now.since(current.last_rx) < TRUST {
            return None;
        }
        let next_ping = now + CHECK_PATIENCE;
        current.check = Some(Check { started: now, next_ping });
        Some(next_ping)
    }

    pub(super) fn destination(
        &self,
        now: Instant,
        device: DeviceId,
        home: Option<RelayId>,
        shared: &Shared,
    ) -> Option<Destination> {
        if let Some(current) = &self.current {
            return Some(current.way.into());
        }
        if let Some(relay) = self.relay(now, home, shared) {
            return Some(Destination::Relay { relay, device });
        }
        self.reply_to.filter(|(_, at)| now.since(*at) < REPLY_FRESH).map(|(way, _)| way.into())
    }

    /// The relay to use: where the peer was just heard, or else where it listens.
    fn relay(&self, now: Instant, home: Option<RelayId>, shared: &Shared) -> Option<RelayId> {
        let up = |relay: &RelayId| shared.relays.contains(relay);
        let seen = self.relay_seen.filter(|(relay, _)| up(relay));
        seen.filter(|(_, at)| now.since(*at) < RELAY_FRESH)
            .map(|(relay, _)| relay)
            .or_else(|| home.filter(up))
            .or(seen.map(|(relay, _)| relay))
    }

    pub(super) fn path(&self, home: Option<RelayId>, shared: &Shared) -> (Path, Option<Duration>) {
        if let Some(current) = &self.current {
            let rtt = self.remotes.iter().find(|r| r.way == current.way).map(|r| r.rtt);
            return (Path::Direct { endpoint: current.way.remote }, rtt);
        }
        // Without a clock: a relay that is up and was ever heard counts like a fresh one.
        let seen = self.relay_seen.map(|(relay, _)| relay).filter(|r| shared.relays.contains(r));
        match home.filter(|relay| shared.relays.contains(relay)).or(seen) {
            Some(relay) => (Path::Relay { relay }, self.relay_rtt),
            None => (Path::None, None),
        }
    }

    /// An authentic packet came from there. True if that is worth a closer look.
    pub(super) fn on_heard(&mut self, now: Instant, from: Source) -> bool {
        match from {
            Source::Direct { socket, remote } => {
                let way = Way { socket, remote };
                if let Some(current) = self.current.as_mut().filter(|c| c.way == way) {
                    current.last_rx = now;
                    return false;
                }
                self.reply_to = Some((way, now));
                let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) else { return true };
                // The first sign of life is worth a ping though one is under way: that one went before the NAT on the
                // other side was open.
                let first = !std::mem::replace(&mut remote.heard, true);
                first || remote.pinged.is_none_or(|at| now.since(at) >= TRIGGERED_INTERVAL)
            }
            Source::Relay { relay, .. } => {
                let news = self.relay_seen.is_none_or(|(seen, _)| seen != relay);
                self.relay_seen = Some((relay, now));
                news
            }
            Source::Signal { .. } => false,
        }
    }

    /// An authentic packet came from an address that isn't proved: prove it.
    pub(super) fn on_heard_news(
        &mut self,
        now: Instant,
        from: Source,
        _home: Option<RelayId>,
        shared: &mut Shared,
    ) {
        if let Source::Direct { socket, remote } = from {
            let way = Way { socket, remote };
            if !shared.accepts(remote) {
                shared.counters.candidate_refused += 1;
                return;
            }
            self.learn(now, way, CandidateKind::Observed, &mut shared.counters);
            self.probe(now, way, shared);
        }
    }

    // Probes.

    pub(super) fn on_probe(
        &mut self,
        now: Instant,
        from: Source,
        message: Message,
        home: Option<RelayId>,
        shared: &mut Shared,
    ) {
        let news = self.on_heard(now, from);
        match message {
            Message::Ping { txid } => {
                self.answer(now, from, txid, shared);
                if news {
                    self.on_heard_news(now, from, home, shared);
                }
            }
            Message::Pong { txid, observed } => self.on_pong(now, from, txid, observed, shared),
            Message::Candidates { request, candidates } => {
                self.on_candidates(now, request, &candidates, shared);
            }
            Message::Unknown => {}
        }
    }

    fn answer(&mut self, now: Instant, from: Source, txid: TxId, shared: &mut Shared) {
        let (to, observed) = match from {
            Source::Direct { socket, remote } => (Destination::Direct { socket, remote }, Some(remote)),
            Source::Relay { relay, device } => (Destination::Relay { relay, device }, None),
            Source::Signal { .. } => return,
        };
        if observed.is_some_and(|addr| !shared.accepts(addr)) {
            shared.counters.candidate_refused += 1;
        } else if self.pongs.take(now, SECOND, MAX_PONGS_PER_SECOND) {
            self.send(to, &Message::Pong { txid, observed }, shared);
        } else {
            shared.counters.probe_limited += 1;
        }
    }

    fn on_pong(
        &mut self,
        now: Instant,
        from: Source,
        txid: TxId,
        observed: Option<SocketAddr>,
        shared: &mut Shared,
    ) {
        let came = match from {
            Source::Direct { socket, remote } => Destination::Direct { socket, remote },
            Source::Relay { relay, device } => Destination::Relay { relay, device },
            Source::Signal { .. } => return,
        };
        let Some(at) = self.inflight.iter().position(|i| i.txid == txid && i.to == came) else {
            shared.counters.pong_unexpected += 1;
            return;
        };
        let ping = self.inflight.remove(at);
        let rtt = now.since(ping.sent);
        let path = match ping.to {
            Destination::Direct { socket, remote } => {
                self.confirm(now, Way { socket, remote }, rtt);
                if let Some(addr) = observed {
                    shared.observe(addr);
                }
                Path::Direct { endpoint: remote }
            }
            Destination::Relay { relay, .. } => {
                self.relay_rtt = Some(rtt);
                Path::Relay { relay }
            }
        };
        if let Some(token) = ping.token {
            shared.push_event(Event::PingResult { token, path, rtt: Some(rtt) });
        }
    }

    /// A pong came over `way`: it works. Take the best of all that do.
    fn confirm(&mut self, now: Instant, way: Way, rtt: Duration) {
        let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) else { return };
        (remote.confirmed, remote.rtt) = (Some(now), rtt);
        // A way that is being checked and has not answered is no incumbent any more.
        let incumbent = self.current.as_ref().filter(|c| c.check.is_none() || c.way == way).map(|c| c.way);
        let fresh = |r: &&Remote| {
            Some(r.way) == incumbent || r.confirmed.is_some_and(|at| now.since(at) < CONFIRMED_FRESH)
        };
        let best = self
            .remotes
            .iter()
            .filter(fresh)
            .min_by_key(|r| Score::new(r.way.remote, r.kind, r.rtt, Some(r.way) == incumbent))
            .map(|r| r.way);
        match (&mut self.current, best) {
            (Some(current), Some(best)) if current.way == best => {}
            (_, Some(best)) => self.current = Some(Current { way: best, last_rx: now, check: None }),
            (_, None) => {}
        }
    }

    fn on_candidates(&mut self, now: Instant, request: bool, candidates: &[Candidate], shared: &mut Shared) {
        self.listed = true;
        let mut news = false;
        for candidate in candidates {
            if shared.accepts(candidate.addr) {
                // Another port alone is no news: a symmetric NAT shows one at each look, and two peers behind such
                // would never come to rest. The next round pings it, as does what follows a request.
                let known = self.remotes.iter().any(|r| r.way.remote.ip() == candidate.addr.ip());
                let learned = self.learn_on_all(now, candidate.addr, candidate.kind, shared);
                news |= learned && !known;
            } else {
                shared.counters.candidate_refused += 1;
            }
        }
        self.forget_former_ports(candidates);
        if request {
            self.owe(now, false);
            // The peer has no direct way to us; see whether ours to it still works.
            if let Some(current) = self.current.as_mut().filter(|c| c.check.is_none()) {
                current.check = Some(Check { started: now, next_ping: now });
            }
        }
        if news {
            self.restart_rounds(now);
        } else if request && self.current.is_none() {
            // It is pinging now: so do we, for both NATs to be open at once. No round of ours, or two peers that can't
            // meet would keep each other at it.
            self.probe_all(now, shared);
        }
    }

    // Commands.

    /// Queues a ping; it goes out when there is a way and its turn has come.
    pub(super) fn user_ping(&mut self, now: Instant, token: PingToken, shared: &mut Shared) {
        if self.waiting.try_push((token, now + PING_TIMEOUT)).is_err() {
            shared.push_event(Event::PingResult { token, path: self.told, rtt: None });
        }
    }

    /// Sends the pings that wait, as far as the budget goes.
    fn send_waiting(&mut self, now: Instant, to: Destination, shared: &mut Shared) {
        while let Some((token, _)) = self.waiting.first().copied()
            && self.asked.take(now, SECOND, MAX_USER_PINGS_PER_SECOND)
        {
            self.waiting.remove(0);
            self.ping(now, to, Some(token), shared);
        }
    }

    /// Our own addresses changed; if we `moved`, the peer's are asked for too, and both ends ping.
    pub(super) fn owe_candidates(&mut self, now: Instant, moved: bool) {
        self.owe(now, moved && self.current.is_none());
    }

    /// Relays or the signal channel came or went, or the peer has just become active.
    pub(super) fn on_relays_changed(&mut self, now: Instant, _home: Option<RelayId>, _shared: &mut Shared) {
        if self.current.is_none() {
            self.owe(now, true);
            self.restart_rounds(now);
        }
    }

    /// We are somewhere else: nothing that was proved holds.
    pub(super) fn on_network_change(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        let known: ArrayVec<(SocketAddr, CandidateKind), MAX_REMOTES> =
            self.remotes.iter().map(|r| (r.way.remote, r.kind)).collect();
        self.remotes.clear();
        self.inflight.retain(|i| i.token.is_some());
        self.reply_to = None;
        for (addr, kind) in known {
            if shared.accepts(addr) {
                self.learn_on_all(now, addr, kind, shared);
            }
        }
        let relayed = self.relay(now, home, shared).is_some();
        let remotes = &self.remotes;
        self.current.take_if(|c| relayed || !remotes.iter().any(|r| r.way == c.way));
        if let Some(current) = &mut self.current {
            current.check = Some(Check { started: now, next_ping: now });
        }
        self.owe(now, true);
        self.restart_rounds(now);
    }

    // Addresses and bytes.

    fn learn_on_all(
        &mut self,
        now: Instant,
        addr: SocketAddr,
        kind: CandidateKind,
        shared: &mut Shared,
    ) -> bool {
        let mut news = false;
        let mut last = None;
        let Shared { local, counters, .. } = shared;
        // `local` is sorted by socket, so that equal ids are neighbours.
        for local in local.iter().filter(|l| l.addr.is_ipv4() == addr.is_ipv4()) {
            if last.replace(local.id) != Some(local.id) {
                news |= self.learn(now, Way { socket: local.id, remote: addr }, kind, counters);
            }
        }
        news
    }

    /// Forgets ports that the peer's NAT had before those it lists now, unless they have worked.
    fn forget_former_ports(&mut self, listed: &[Candidate]) {
        let reflexive = |kind| kind == CandidateKind::Reflexive;
        let current = self.current.as_ref().map(|c| c.way);
        self.remotes.retain(|r| {
            let replaced = listed.iter().any(|c| reflexive(c.kind) && c.addr.ip() == r.way.remote.ip());
            let stands = listed.iter().any(|c| c.addr == r.way.remote);
            let works = r.heard || r.confirmed.is_some() || Some(r.way) == current;
            !reflexive(r.kind) || !replaced || stands || works
        });
    }

    /// Takes note of an address; the one that is least worth keeping makes room. True if it is new.
    fn learn(&mut self, now: Instant, way: Way, kind: CandidateKind, counters: &mut PathCounters) -> bool {
        if let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) {
            remote.learned = now;
            remote.kind = remote.kind.min(kind);
            return false;
        }
        if self.remotes.is_full() {
            let current = self.current.as_ref().map(|c| c.way);
            let spare = (0..self.remotes.len())
                .filter(|at| Some(self.remotes[*at].way) != current)
                .min_by_key(|at| (self.remotes[*at].confirmed, self.remotes[*at].learned));
            if let Some(at) = spare {
                self.remotes.remove(at);
                counters.candidate_replaced += 1;
            }
        }
        let remote = Remote {
            way,
            kind,
            learned: now,
            heard: false,
            pinged: None,
            confirmed: None,
            rtt: Duration::ZERO,
        };
        self.remotes.push(remote);
        true
    }

    /// Looks for a path over `way`, within the budget.
    fn probe(&mut self, now: Instant, way: Way, shared: &mut Shared) {
        if self.probes.take(now, MINUTE, MAX_PROBES_PER_MINUTE) {
            self.ping(now, way.into(), None, shared);
        } else {
            shared.counters.probe_limited += 1;
        }
    }

    fn ping(&mut self, now: Instant, to: Destination, token: Option<PingToken>, shared: &mut Shared) {
        let mut txid = [0; TXID_LEN];
        shared.rng.fill_bytes(&mut txid);
        if self.inflight.is_full() {
            let at = self.inflight.iter().position(|i| i.token.is_none()).unwrap_or(0);
            let given_up = self.inflight.remove(at);
            shared.counters.ping_replaced += 1;
            if let Some(token) = given_up.token {
                shared.push_event(Event::PingResult { token, path: self.told, rtt: None });
            }
        }
        self.inflight.push(Inflight { txid, to, sent: now, token });
        if let Destination::Direct { socket, remote } = to {
            let way = Way { socket, remote };
            if let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) {
                remote.pinged = Some(now);
            }
        }
        self.send(to, &Message::Ping { txid }, shared);
    }

    fn send(&self, to: Destination, message: &Message, shared: &mut Shared) {
        if let Some(probe) = self.seal(message, shared) {
            shared.enqueue(to, probe);
        }
    }

    fn seal(
        &self,
        message: &Message,
        shared: &mut Shared,
    ) -> Option<ArrayVec<u8, { warren_common::wire::probe::MAX_PROBE_LEN }>> {
        let mut nonce = [0; NONCE_LEN];
        shared.rng.fill_bytes(&mut nonce);
        self.keys.as_ref().map(|keys| keys.seal(message, nonce))
    }
}
