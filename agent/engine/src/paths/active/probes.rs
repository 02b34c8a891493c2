//! What a peer in use says to us: packets and probes of it, and what they prove.

use std::net::SocketAddr;
use std::time::Duration;

use warren_common::ids::RelayId;
use warren_common::time::Instant;
use warren_common::wire::probe::{Candidate, CandidateKind, Message, TxId};

use super::{
    Active, BURST, CONFIRMED_FRESH, Current, Doubt, FORMER_FRESH, Remote, SAFE_PERCENT, SECOND,
    TRIGGERED_INTERVAL,
};
use crate::event::{Event, Path};
use crate::io::{Destination, Source};
use crate::paths::score::Score;
use crate::paths::shared::Shared;
use crate::paths::{ELSEWHERE, MAX_PONGS_PER_SECOND, TRUST, Way};

impl Active {
    /// An authentic packet of WireGuard's came from there: the peer is there now. True if that is worth a closer look.
    pub(in crate::paths) fn on_packet(&mut self, now: Instant, from: Source) -> bool {
        if let Source::Direct { socket, remote } = from {
            let way = Way { socket, remote };
            if let Some(current) = self.current.as_mut().filter(|c| c.way == way) {
                current.heard(now);
                return false;
            }
            self.reply_to = Some((way, now));
        }
        let news = self.on_heard(now, from);
        self.on_spoke(now, from) || news
    }

    /// The peer chose that way for something that it could have sent another way. True if that is another relay than before.
    fn on_spoke(&mut self, now: Instant, from: Source) -> bool {
        matches!(from, Source::Relay { relay, .. } if self.relays.on_spoke(now, relay))
    }

    /// The peer was heard there, or somebody who sends again what it said once: only packets of WireGuard's and answers to
    /// our pings are fresh for sure. True if that is worth a closer look.
    fn on_heard(&mut self, now: Instant, from: Source) -> bool {
        match from {
            Source::Direct { socket, remote } => {
                let way = Way { socket, remote };
                if let Some(current) = &mut self.current {
                    if current.way == way {
                        current.kept = now;
                        return false;
                    }
                    // The peer may be somewhere else now.
                    if now.since(current.last_rx) >= ELSEWHERE {
                        current.check(now, now, Doubt::None);
                    }
                }
                let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) else { return true };
                // The first sign of life is worth a ping though one is under way: that one went before the NAT on the
                // other side was open.
                let first = !std::mem::replace(&mut remote.heard, true);
                first || remote.pinged.is_none_or(|at| now.since(at) >= TRIGGERED_INTERVAL)
            }
            Source::Relay { relay, .. } => {
                self.relays.on_seen(now, relay);
                // The peer may have no direct way any more.
                let silent = self
                    .current
                    .as_mut()
                    .filter(|c| now.since(c.last_rx) >= ELSEWHERE && !c.is_in_doubt(now));
                let suspicious = silent.is_some();
                if let Some(current) = silent {
                    current.check(now, now, Doubt::Dead);
                }
                suspicious
            }
            Source::Signal { .. } => false,
        }
    }

    /// An authentic packet came from an address that isn't proved: prove it.
    pub(in crate::paths) fn on_heard_news(&mut self, now: Instant, from: Source, shared: &mut Shared) {
        if let Source::Direct { socket, remote } = from {
            let way = Way { socket, remote };
            if !shared.accepts(remote) {
                shared.counters.candidate_refused += 1;
                return;
            }
            self.learn(now, way, CandidateKind::Observed, &mut shared.counters);
            self.probe(now, way, shared);
            // Of several ports that the peer has hit, the one that it uses.
            let works = self.remotes.iter().find(|r| r.way == way && r.confirmed.is_some());
            if let (Some(current), Some(works)) = (&mut self.current, works)
                && current.way.is_extra()
                && way.is_extra()
            {
                *current = Current::new(now, way, works.smoothed, shared.mtu);
            }
        }
    }

    pub(in crate::paths) fn on_probe(
        &mut self,
        now: Instant,
        from: Source,
        message: Message,
        home: Option<RelayId>,
        shared: &mut Shared,
    ) {
        let news = !matches!(message, Message::Pong { .. }) && self.on_heard(now, from);
        match message {
            // Pings go over every relay, and an answer back where the question came from: no choice of the peer's.
            Message::Ping { .. } | Message::Pong { .. } | Message::Unknown => {}
            Message::Candidates { .. } | Message::Guess { .. } => {
                self.on_spoke(now, from);
            }
        }
        match message {
            Message::Ping { txid } => {
                self.answer(now, from, txid, shared);
                if news {
                    self.on_heard_news(now, from, shared);
                }
            }
            Message::Pong { txid, observed } => self.on_pong(now, from, txid, observed, home, shared),
            Message::Candidates { request, candidates, ports } => {
                self.peer_ports = ports.or(self.peer_ports);
                self.on_candidates(now, request, &candidates, shared);
            }
            Message::Guess { near } => self.on_guess(now, near, shared),
            Message::Unknown => {}
        }
    }

    pub(super) fn answer(&mut self, now: Instant, from: Source, txid: TxId, shared: &mut Shared) {
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

    pub(super) fn on_pong(
        &mut self,
        now: Instant,
        from: Source,
        txid: TxId,
        observed: Option<SocketAddr>,
        home: Option<RelayId>,
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
                if let Some(current) = self.current.as_mut().filter(|c| c.way == way) {
                    current.heard(now);
                }
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
                self.relays.on_pong(now, relay, rtt, home, &shared.relays);
                Path::Relay { relay }
            }
        };
        if let Some(token) = ping.token {
            shared.push_event(Event::PingResult { token, path, rtt: Some(rtt) });
        }
    }

    /// A pong came over `way`: it works. Take the best of all that do.
    pub(super) fn confirm(&mut self, now: Instant, way: Way, rtt: Duration, shared: &mut Shared) {
        let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) else { return };
        let former = remote.confirmed.map_or(rtt, |_| remote.smoothed);
        (remote.confirmed, remote.rtt, remote.smoothed) = (Some(now), rtt, (3 * former + rtt) / 4);
        remote.heard = true;
        remote.losses.note(false);
        // It was only the NAT that forgot: silences must be shorter.
        if let Some((_, silent, _)) =
            self.former.filter(|(w, _, at)| *w == way && now.since(*at) < FORMER_FRESH)
            && silent >= TRUST
        {
            let safe = silent * SAFE_PERCENT / 100;
            self.early_death = Some(self.early_death.map_or(safe, |known| known.min(safe)));
        }
        self.choose(now, way, shared);
    }

    /// Takes the best of the ways that work; `way` has answered.
    fn choose(&mut self, now: Instant, way: Way, shared: &mut Shared) {
        let held = self.held.take();
        // As soon as the answer to its check is late a way is no choice at all beside one that answers, however good it was.
        let late_at = self.current.as_ref().filter(|c| c.way != way).and_then(Current::late_at);
        let incumbent = self.current.as_ref().filter(|_| late_at.is_none_or(|at| at > now)).map(|c| c.way);
        // Nor is another that last answered before that, or before the way in use came into use: the peer may be somewhere
        // else since.
        let proved = |r: &&Remote| {
            let Some(current) = &self.current else { return false };
            let doubted = current.check.as_ref().filter(|_| incumbent.is_none()).map(|check| check.started);
            let since = doubted.unwrap_or(current.chosen);
            Some(r.way) != Some(current.way)
                && r.confirmed.is_some_and(|at| now.since(at) < CONFIRMED_FRESH && at > since)
        };
        let fresh = |r: &&Remote| r.way == way || Some(r.way) == incumbent || proved(r);
        // The way through our own NAT and back has no bonus: as long as that, the peer's own address is the better one.
        let favoured = |r: &Remote| Some(r.way) == incumbent && !shared.is_our_outside(r.way.remote);
        let score = |r: &&Remote| Score::new(r.way.remote, r.kind, r.smoothed, r.losses, favoured(r));
        let best = self.remotes.iter().filter(fresh).min_by_key(score).map(|r| (r.way, r.smoothed));
        match (&mut self.current, best) {
            (Some(current), Some((best, rtt))) if current.way == best => {
                current.rtt = rtt;
                if late_at.is_some() {
                    // Asked at the same time, it answers next, mostly.
                    current.ask_at_once(now);
                    self.held = current.late_at().map(|at| (way, at));
                }
            }
            (_, Some((best, rtt))) => {
                // Through our own NAT and back is a choice only where the peer's own address does not answer.
                if incumbent.is_none()
                    && shared.is_our_outside(best.remote)
                    && let Some(at) = self.neighbour_answers_by(rtt)
                {
                    let at = held.map_or(at, |(_, held)| at.min(held));
                    if at > now {
                        self.held = Some((best, at));
                        return;
                    }
                }
                self.current = Some(Current::new(now, best, rtt, shared.mtu));
                self.former = None;
                shared.wants_keepalive |= best.remote.is_ipv4();
                shared.sockets_changed |= best.is_extra();
            }
            (_, None) => {}
        }
    }

    /// Until when one of the peer's own addresses may answer a ping that it has not answered yet, if it is as near as a way of
    /// this round trip. The router's answer may well come first: packets to a neighbour wait until that is found (ARP).
    fn neighbour_answers_by(&self, rtt: Duration) -> Option<Instant> {
        let unanswered = |r: &&Remote| r.kind == CandidateKind::Local && r.confirmed < r.pinged;
        self.remotes.iter().filter(unanswered).filter_map(|r| r.pinged).max().map(|at| at + 2 * rtt + BURST)
    }

    /// Chooses again, where a choice was put off until now.
    pub(super) fn choose_held(&mut self, now: Instant, shared: &mut Shared) {
        if let Some((way, _)) = self.held.filter(|(_, at)| *at <= now) {
            self.choose(now, way, shared);
        }
    }

    pub(super) fn on_candidates(
        &mut self,
        now: Instant,
        request: bool,
        candidates: &[Candidate],
        shared: &mut Shared,
    ) {
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
        self.forget_unlisted(now, candidates);
        if request {
            self.owe_answer(now);
            // The peer has no direct way to us; see whether ours to it still works.
            if let Some(current) = &mut self.current {
                current.check(now, now, Doubt::None);
            }
        }
        if news {
            self.restart_rounds(now);
        } else if request {
            // It is pinging now: so do we, for both NATs to be open at once, also if we believe to have a way: it may be back
            // where it was before, and the way dead. No round of ours, or two peers that can't meet would keep each other at it.
            self.probe_all(now, shared);
        }
    }
}
