//! One peer in use: its addresses, the pings under way, the way chosen.

use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use rand_core::RngCore as _;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::time::Instant;
use warren_common::wire::probe::{
    Candidate, CandidateKind, Message, NONCE_LEN, Ports, ProbeKeys, TXID_LEN, TxId,
};

use super::guess::{Search, is_private};
use super::mtu::PathMtu;
use super::score::{Losses, Score};
use super::why::Facts;
use super::{
    ELSEWHERE, HEDGE_AFTER, MAX_DEVICE_PROBES_PER_MINUTE, MAX_HINT_ENDPOINTS, MAX_INFLIGHT,
    MAX_LONG_PROBES_PER_MINUTE, MAX_PONGS_PER_SECOND, MAX_PROBES_PER_MINUTE, MAX_REMOTES, MAX_USER_PINGS,
    MAX_USER_PINGS_PER_SECOND, MIN_KEEPALIVE, PING_TIMEOUT, PeerIdx, RELAY_FRESH, REPLY_FRESH, Rate, Shared,
    TRUST, Way,
};
use crate::event::{Event, Path, PingToken};
use crate::io::{Destination, Source};

mod remotes;
mod time;

/// Rounds that follow each other within seconds.
const EAGER_ROUNDS: usize = 5;
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);
/// How long a check waits for an ordinary answer before it spends a ping.
const CHECK_PATIENCE: Duration = Duration::from_millis(300);
/// Least time between two pings that packets from an unproved address bring about.
const TRIGGERED_INTERVAL: Duration = Duration::from_millis(200);
/// How recent a pong must be for its way to be a choice.
const CONFIRMED_FRESH: Duration = Duration::from_secs(10);
/// Beyond two round trips, what a ping's answer may be late by before packets take another way.
const SLACK: Duration = Duration::from_millis(300);
/// How long a way that was given up is still better than none, and how soon it must answer again for its death to have
/// been a NAT's forgetting.
const FORMER_FRESH: Duration = Duration::from_secs(10);
/// The share of a fatal silence that counts as safe, in percent.
const SAFE_PERCENT: u32 = 60;

/// See the parent module.
pub(super) struct Active {
    pub(super) idx: PeerIdx,
    device: DeviceId,
    keys: Option<ProbeKeys>,
    /// When there last was data, or the peer asked for addresses.
    used: Instant,
    pub(super) current: Option<Current>,
    /// The way in use before, how silent we had been when it was found dead, and when that was.
    former: Option<(Way, Duration, Instant)>,
    /// A silence shorter than one in which a way to this peer died: its NAT may forget sooner than ours.
    early_death: Option<Duration>,
    pub(super) remotes: ArrayVec<Remote, MAX_REMOTES>,
    inflight: ArrayVec<Inflight, MAX_INFLIGHT>,
    /// Pings of the user that wait for a way or for their turn, with the time to give up.
    waiting: ArrayVec<(PingToken, Instant), MAX_USER_PINGS>,
    pub(super) round: usize,
    next_round: Instant,
    /// What the peer's NAT does with ports, as it says.
    pub(super) peer_ports: Option<Ports>,
    pub(super) search: Search,
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
    long_probes: Rate,
    pongs: Rate,
    /// Pings for people.
    asked: Rate,
}

pub(super) struct Current {
    way: Way,
    last_rx: Instant,
    last_tx: Instant,
    check: Option<Check>,
    mtu: PathMtu,
}

struct Check {
    started: Instant,
    next_ping: Instant,
    /// How long we had said nothing on the way before.
    silent: Duration,
    /// It is more likely dead than not: no packet is risked on it.
    doubt: bool,
    /// Data brought it about.
    by_data: bool,
}

impl Current {
    fn new(now: Instant, way: Way, mtu: usize) -> Self {
        Self { way, last_rx: now, last_tx: now, check: None, mtu: PathMtu::new(now, mtu) }
    }

    /// Asks whether the way still works, from `next_ping` on.
    fn check(&mut self, now: Instant, next_ping: Instant, doubt: bool) {
        if !self.is_checked() {
            let silent = now.since(self.last_tx);
            self.check = Some(Check { started: now, next_ping, silent, doubt, by_data: false });
        } else if let Some(check) = &mut self.check {
            check.next_ping = check.next_ping.min(next_ping);
            check.doubt |= doubt;
        }
    }

    /// True while a check has had no answer.
    fn is_checked(&self) -> bool {
        self.check.as_ref().is_some_and(|check| self.last_rx <= check.started)
    }
}

pub(super) struct Remote {
    pub(super) way: Way,
    pub(super) kind: CandidateKind,
    learned: Instant,
    /// An authentic packet came from there.
    heard: bool,
    pinged: Option<Instant>,
    confirmed: Option<Instant>,
    rtt: Duration,
    /// Round-trip time, smoothed.
    smoothed: Duration,
    losses: Losses,
}

struct Inflight {
    txid: TxId,
    to: Destination,
    sent: Instant,
    token: Option<PingToken>,
    /// It was as long as a sealed packet of so many bytes.
    length: Option<usize>,
}

impl Active {
    pub(super) fn new(now: Instant, idx: PeerIdx, device: DeviceId, keys: Option<ProbeKeys>) -> Self {
        Self {
            idx,
            device,
            keys,
            used: now,
            current: None,
            former: None,
            early_death: None,
            remotes: ArrayVec::new(),
            inflight: ArrayVec::new(),
            waiting: ArrayVec::new(),
            round: 0,
            next_round: now,
            peer_ports: None,
            search: Search::default(),
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
            long_probes: Rate::default(),
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
    pub(super) fn end(mut self, shared: &mut Shared) {
        self.end_searches(shared);
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

    /// Data goes out: on a direct way that has been silent for too long, watch whether an answer comes. After a silence in
    /// which a NAT may have forgotten us, ask first and take the relay meanwhile. Returns when to look.
    pub(super) fn on_send(&mut self, now: Instant, shared: &Shared) -> Option<Instant> {
        let early_death = self.early_death;
        let current = self.current.as_mut()?;
        let silence = now.since(current.last_rx);
        let silent = silence >= TRUST && !current.is_checked();
        let trusted = shared.trusted_silence(current.way.remote);
        let doubt = silence >= early_death.map_or(trusted, |fatal| trusted.min(fatal));
        let next_ping = if doubt { now } else { now + CHECK_PATIENCE };
        if silent {
            current.check(now, next_ping, doubt);
            if let Some(check) = &mut current.check {
                check.by_data = true;
            }
        } else if doubt && let Some(check) = &mut current.check {
            // A keep-alive asks already.
            check.doubt = true;
        }
        current.last_tx = now;
        silent.then_some(next_ping)
    }

    /// After how much silence the way in use needs a word.
    pub(super) fn keepalive(&self, shared: &Shared) -> Duration {
        let Some(current) = &self.current else { return Duration::MAX };
        let measured = shared.keepalive_of(current.way.remote);
        self.early_death.map_or(measured, |fatal| measured.min(fatal.max(MIN_KEEPALIVE)))
    }

    pub(super) const fn is_direct(&self) -> bool {
        self.current.is_some()
    }

    /// The extra sockets in use: the peer may have hit several, and choose another than we do.
    pub(super) fn extra_sockets(&self) -> impl Iterator<Item = u8> {
        let current = self.current.as_ref().map(|c| c.way);
        let heard = self.remotes.iter().filter(|r| r.heard).map(|r| r.way);
        current.into_iter().chain(heard).filter(|way| way.is_extra()).map(|way| way.socket)
    }

    pub(super) fn facts(&self) -> Facts {
        let outside = |r: &Remote| r.kind != CandidateKind::Local || !is_private(r.way.remote);
        Facts {
            has_keys: self.keys.is_some(),
            looks_eagerly: self.round <= EAGER_ROUNDS,
            listed: self.listed,
            common_family: !self.remotes.is_empty(),
            seen_from_outside: self.remotes.iter().any(outside),
            they_vary: matches!(self.peer_ports, Some(Ports::Predictable | Ports::Random)),
        }
    }

    pub(super) fn destination(
        &self,
        now: Instant,
        device: DeviceId,
        home: Option<RelayId>,
        shared: &Shared,
    ) -> Option<Destination> {
        let direct = self.current.as_ref();
        if let Some(current) = direct
            && !self.is_in_doubt(now, current)
        {
            return Some(current.way.into());
        }
        if let Some(relay) = self.relay(now, home, shared) {
            return Some(Destination::Relay { relay, device });
        }
        // Nothing better is known; and if it arrives, the peer learns where we are.
        let reply_to = self.reply_to.filter(|(_, at)| now.since(*at) < REPLY_FRESH).map(|(way, _)| way);
        let former = self.former.filter(|(_, _, at)| now.since(*at) < FORMER_FRESH).map(|(way, ..)| way);
        direct.map(|c| c.way).or(reply_to).or(former).map(Destination::from)
    }

    /// The longest packet for the direct way in use.
    pub(super) fn mtu(&self) -> Option<usize> {
        self.current.as_ref().map(|c| c.mtu.usable())
    }

    /// True if a check of the way in use has been unanswered for so long that packets should not be risked on it.
    fn is_in_doubt(&self, now: Instant, current: &Current) -> bool {
        let patience = || HEDGE_AFTER.max(self.patience(current.way));
        current.is_checked()
            && current.check.as_ref().is_some_and(|c| c.doubt || now.since(c.started) >= patience())
    }

    /// How long the answer to a ping may take.
    fn patience(&self, way: Way) -> Duration {
        let rtt = self.remotes.iter().find(|r| r.way == way).map_or(Duration::ZERO, |r| r.smoothed);
        2 * rtt + SLACK
    }

    /// The relay to use, as a destination.
    pub(super) fn relay_to(
        &self,
        now: Instant,
        home: Option<RelayId>,
        shared: &Shared,
    ) -> Option<Destination> {
        let relay = self.relay(now, home, shared)?;
        Some(Destination::Relay { relay, device: self.device })
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
                if let Some(current) = &mut self.current {
                    if current.way == way {
                        current.last_rx = now;
                        return false;
                    }
                    // The peer may be somewhere else now.
                    if now.since(current.last_rx) >= ELSEWHERE {
                        current.check(now, now, false);
                    }
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
                // The peer may have no direct way any more.
                let silent =
                    self.current.as_mut().filter(|c| now.since(c.last_rx) >= ELSEWHERE && !c.is_checked());
                let suspicious = silent.is_some();
                if let Some(current) = silent {
                    current.check(now, now, true);
                }
                news || suspicious
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
            // Of several ports that the peer has hit, the one that it uses.
            let works = self.remotes.iter().any(|r| r.way == way && r.confirmed.is_some());
            if let Some(current) = &mut self.current
                && current.way.is_extra()
                && way.is_extra()
                && works
            {
                *current = Current::new(now, way, shared.mtu);
            }
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
            Message::Candidates { request, candidates, ports } => {
                self.peer_ports = ports.or(self.peer_ports);
                self.on_candidates(now, request, &candidates, shared);
            }
            Message::Guess { near } => self.on_guess(now, near, shared),
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
            self.note_word(now, to);
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
                let way = Way { socket, remote };
                self.confirm(now, way, rtt, shared);
                if let (Some(length), Some(current)) = (ping.length, &mut self.current)
                    && current.way == way
                {
                    current.mtu.on_answer(now, length);
                }
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
    fn confirm(&mut self, now: Instant, way: Way, rtt: Duration, shared: &mut Shared) {
        let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) else { return };
        let former = remote.confirmed.map_or(rtt, |_| remote.smoothed);
        (remote.confirmed, remote.rtt, remote.smoothed) = (Some(now), rtt, (3 * former + rtt) / 4);
        remote.losses.note(false);
        // It was only the NAT that forgot: silences must be shorter.
        if let Some((_, silent, _)) =
            self.former.filter(|(w, _, at)| *w == way && now.since(*at) < FORMER_FRESH)
            && silent >= TRUST
        {
            let safe = silent * SAFE_PERCENT / 100;
            self.early_death = Some(self.early_death.map_or(safe, |known| known.min(safe)));
        }
        // A way that is being checked and has not answered is no incumbent any more.
        let incumbent = self.current.as_ref().filter(|c| !c.is_checked() || c.way == way).map(|c| c.way);
        let fresh = |r: &&Remote| {
            Some(r.way) == incumbent || r.confirmed.is_some_and(|at| now.since(at) < CONFIRMED_FRESH)
        };
        let score =
            |r: &&Remote| Score::new(r.way.remote, r.kind, r.smoothed, r.losses, Some(r.way) == incumbent);
        let best = self.remotes.iter().filter(fresh).min_by_key(score).map(|r| r.way);
        match (&mut self.current, best) {
            (Some(current), Some(best)) if current.way == best => {}
            (_, Some(best)) => {
                self.current = Some(Current::new(now, best, shared.mtu));
                self.former = None;
                shared.wants_keepalive |= best.remote.is_ipv4();
                shared.sockets_changed |= best.is_extra();
            }
            (_, None) => {}
        }
    }

    fn on_candidates(&mut self, now: Instant, request: bool, candidates: &[Candidate], shared: &mut Shared) {
        self.listed = true;
        let mut news = false;
        for candidate in candidates {
            if candidate.kind == CandidateKind::Predicted && shared.varies() {
                continue;
            }
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
            if let Some(current) = &mut self.current {
                current.check(now, now, false);
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

    /// Our own addresses changed; if we `moved`, the peer's are asked for too, and both ends ping. So they do if our ports
    /// are others each time: the peer must send to these soon.
    pub(super) fn owe_candidates(&mut self, now: Instant, moved: bool, shared: &Shared) {
        let short_lived = shared.varies() && self.may_use_predictions();
        self.owe(now, (moved || short_lived) && self.current.is_none());
    }

    /// True unless the peer's ports change as well: then no prediction of one end's is enough.
    pub(super) fn may_use_predictions(&self) -> bool {
        self.peer_ports.is_none_or(|ports| ports == Ports::Fixed)
    }

    /// The clock jumped.
    pub(super) fn on_jump(&mut self, now: Instant, _shared: &mut Shared) {
        if let Some(current) = &mut self.current {
            current.check(now, now, true);
        }
        self.owe(now, true);
        self.restart_rounds(now);
    }

    /// Extra sockets were opened or closed.
    pub(super) fn on_extra(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        let closed = |way: Way| way.is_extra() && !shared.extra.contains(&way.socket);
        self.remotes.retain(|r| !closed(r.way));
        if self.current.take_if(|c| closed(c.way)).is_some() {
            self.owe(now, true);
            self.restart_rounds(now);
        }
        let relay = self.relay_to(now, home, shared);
        if shared.search == Some(self.idx) && !shared.extra.is_empty() {
            self.open_ports(now, relay, shared);
        }
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
        self.early_death = None;
        self.inflight.retain(|i| i.token.is_some());
        self.reply_to = None;
        for (addr, kind) in known {
            if shared.accepts(addr) {
                self.learn_on_all(now, addr, kind, shared);
            }
        }
        let relayed = self.relay(now, home, shared).is_some();
        let remotes = &self.remotes;
        if let Some(lost) = self.current.take_if(|c| relayed || !remotes.iter().any(|r| r.way == c.way)) {
            // Should the relay's connection not survive the move, the peer may still let us in where it did.
            self.former = Some((lost.way, Duration::ZERO, now));
        }
        if let Some(current) = &mut self.current {
            current.check(now, now, true);
        }
        self.owe(now, true);
        self.restart_rounds(now);
    }

    // Bytes.

    /// Looks for a path over `way`, within the budget.
    fn probe(&mut self, now: Instant, way: Way, shared: &mut Shared) {
        if self.probes.take(now, MINUTE, MAX_PROBES_PER_MINUTE)
            && shared.probes.take(now, MINUTE, MAX_DEVICE_PROBES_PER_MINUTE)
        {
            self.ping(now, way.into(), None, shared);
        } else {
            shared.counters.probe_limited += 1;
        }
    }

    fn ping(&mut self, now: Instant, to: Destination, token: Option<PingToken>, shared: &mut Shared) {
        let txid = self.expect_pong(now, to, token, None, shared);
        if let Destination::Direct { socket, remote } = to {
            let way = Way { socket, remote };
            if let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) {
                remote.pinged = Some(now);
            }
        }
        self.note_word(now, to);
        self.send(to, &Message::Ping { txid }, shared);
    }

    /// Makes a ping and takes note of it.
    fn expect_pong(
        &mut self,
        now: Instant,
        to: Destination,
        token: Option<PingToken>,
        length: Option<usize>,
        shared: &mut Shared,
    ) -> TxId {
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
        self.inflight.push(Inflight { txid, to, sent: now, token, length });
        txid
    }

    /// Asks whether packets of `length` bytes pass on `way`, within the budget.
    fn ping_long(&mut self, now: Instant, way: Way, length: usize, shared: &mut Shared) {
        if !self.long_probes.take(now, MINUTE, MAX_LONG_PROBES_PER_MINUTE) {
            shared.counters.probe_limited += 1;
            return;
        }
        let txid = self.expect_pong(now, way.into(), None, Some(length), shared);
        let mut nonce = [0; NONCE_LEN];
        shared.rng.fill_bytes(&mut nonce);
        if let Some(keys) = &self.keys {
            shared.enqueue_long(way.into(), keys.seal_padded(txid, nonce, super::mtu::sealed_len(length)));
        }
    }

    /// We say something on a way: the NATs on it remember from now on.
    fn note_word(&mut self, now: Instant, to: Destination) {
        if let Some(current) = self.current.as_mut().filter(|c| Destination::from(c.way) == to) {
            current.last_tx = now;
        }
    }

    pub(super) fn send(&self, to: Destination, message: &Message, shared: &mut Shared) {
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
