//! What a peer in use does by the clock: checks, rounds, announcements.

use std::cmp::Reverse;
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::ids::RelayId;
use warren_common::time::Instant;
use warren_common::wire::probe::{CandidateKind, Message};

use super::{Active, Doubt, SECOND};
use crate::event::{Event, Path};
use crate::io::Destination;
use crate::paths::shared::Shared;
use crate::paths::{
    ANNOUNCE_INTERVAL, CANDIDATE_AGE, CHECK_INTERVAL, IDLE_AFTER, MAX_ANNOUNCEMENTS_PER_MINUTE,
    MAX_CHECKS_PER_MINUTE, MAX_DEVICE_PROBES_PER_MINUTE, MAX_RELAY_PINGS_PER_MINUTE, MAX_REMOTES,
    PING_TIMEOUT, ROUND_PAUSES, ROUNDS_AFTER_PROMOTION, UPGRADE_INTERVAL, Way,
};

/// How long an extra socket that the peer has hit, and neither end uses, stays open.
const EXTRA_AGE: Duration = Duration::from_secs(60);

impl Active {
    /// Does what is due. Returns when to come back; `None` if the peer is idle now.
    pub(in crate::paths) fn tick(
        &mut self,
        now: Instant,
        home: Option<RelayId>,
        shared: &mut Shared,
    ) -> Option<Instant> {
        self.expire(now, shared);
        self.relays.expire(now);
        let idle_at = self.used + IDLE_AFTER;
        if idle_at <= now && !self.has_user_pings() {
            return None;
        }
        self.check_current(now, shared);
        self.choose_held(now, shared);
        self.look_after_mtu(now, shared);
        self.run_round(now, home, shared);
        let relay = self.relay_to(home, shared);
        self.run_search(now, relay, shared);
        self.announce(now, home, shared);
        if let Some(to) = self.destination(now, self.device, home, shared) {
            self.send_waiting(now, to, shared);
            if !std::mem::replace(&mut self.reachable, true) {
                shared.ready.push_back(self.idx);
            }
        } else {
            self.reachable = false;
        }
        let (path, _) = self.path(home, shared);
        if path != self.told {
            let former = std::mem::replace(&mut self.told, path);
            shared.push_event(Event::PathChanged { device: self.device, path });
            // A handshake under way may be lost on a former relay.
            let other_relay = matches!((former, path), (Path::Relay { .. }, Path::Relay { .. }));
            if matches!(path, Path::Direct { .. }) || other_relay {
                shared.ready.push_back(self.idx);
            }
        }
        Some(self.next_wake(now, idle_at, shared))
    }

    fn next_wake(&self, now: Instant, idle_at: Instant, shared: &Shared) -> Instant {
        let mtu = self.current.as_ref().filter(|c| !c.is_checked()).map(|c| c.mtu.due());
        let keep = self.current.as_ref().map(|c| match &c.check {
            Some(check) => check.due(now, c.patience()),
            None => c.quiet_since() + self.keepalive(shared),
        });
        let pings = self.inflight.iter().filter(|i| i.token.is_some()).map(|i| i.sent + PING_TIMEOUT);
        let turn = self.reachable.then(|| self.asked.next(SECOND));
        let waiting = self.waiting.iter().map(|(_, until)| turn.map_or(*until, |turn| turn.min(*until)));
        let owed = self.owed.map(|(at, _)| at);
        let held = self.held.map(|(_, at)| at);
        let idle_at = if self.has_user_pings() { None } else { Some(idle_at) };
        let search = self.search.due();
        let times = pings.chain(waiting).chain(keep).chain(owed).chain(search).chain(idle_at);
        let times = times.chain([self.next_round]).chain(mtu).chain(held);
        // Never in the past: a timer that is due again at once would spin.
        times.min().unwrap_or(idle_at.unwrap_or(now)).max(now + Duration::from_millis(1))
    }

    fn has_user_pings(&self) -> bool {
        !self.waiting.is_empty() || self.inflight.iter().any(|i| i.token.is_some())
    }

    fn expire(&mut self, now: Instant, shared: &mut Shared) {
        let path = self.told;
        self.inflight.retain(|i| {
            let late = now.since(i.sent) >= PING_TIMEOUT;
            // A padded ping that is lost tells of its length, not of the way.
            if let (true, Destination::Direct { socket, remote }) = (late && i.length.is_none(), i.to)
                && let Some(remote) = self.remotes.iter_mut().find(|r| r.way == Way { socket, remote })
                && remote.confirmed.is_some()
            {
                remote.losses.note(true);
            }
            if let Some(token) = i.token.filter(|_| late) {
                shared.push_event(Event::PingResult { token, path, rtt: None });
            }
            !late
        });
        self.waiting.retain(|(token, until)| {
            let late = *until <= now;
            if late {
                shared.push_event(Event::PingResult { token: *token, path: Path::None, rtt: None });
            }
            !late
        });
        let current = self.current.as_ref().map(|c| c.way);
        self.remotes.retain(|r| {
            let last = r.confirmed.map_or(r.learned, |at| at.max(r.learned));
            let age = if r.way.is_extra() { EXTRA_AGE } else { CANDIDATE_AGE };
            let stays = Some(r.way) == current || now.since(last) < age;
            shared.sockets_changed |= !stays && r.way.is_extra();
            stays
        });
    }

    /// Keeps the direct way open, and gives it up when it is dead.
    fn check_current(&mut self, now: Instant, shared: &mut Shared) {
        let keepalive = self.keepalive(shared);
        let Some(current) = &mut self.current else { return };
        let way = current.way;
        if !current.is_checked() {
            // Answered in the end, but for a while nothing came back: long packets may not have passed.
            if current.check.take().is_some_and(|check| check.by_data) {
                current.mtu.suspect(now);
            }
            let silent = now.since(current.quiet_since());
            if silent >= keepalive {
                current.check(now, now, Doubt::None);
            }
        }
        let patience = current.patience();
        let Some(check) = &mut current.check else { return };
        if check.overdue_at(patience).is_some_and(|at| at <= now) {
            shared.suspect(now);
        }
        if check.asked.is_some() && now >= check.dead_at {
            self.former = Some((way, check.silent, now));
            self.current = None;
            shared.sockets_changed |= way.is_extra();
            if let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) {
                remote.confirmed = None;
            }
            self.owe(now, true);
            self.restart_rounds(now);
        } else if check.next_ping <= now {
            check.next_ping = now + CHECK_INTERVAL;
            if self.checks.take(now, MAX_CHECKS_PER_MINUTE) {
                check.on_asked(now);
                current.asked = Some(now);
                self.ping(now, way.into(), None, shared);
            } else {
                shared.counters.probe_limited += 1;
            }
        }
    }

    /// Finds out how long packets may be. While the way is in doubt, losses tell nothing of that.
    fn look_after_mtu(&mut self, now: Instant, shared: &mut Shared) {
        let Some(current) = self.current.as_mut().filter(|c| !c.is_checked()) else { return };
        let (way, patience) = (current.way, current.patience());
        let lengths = current.mtu.poll(now, patience);
        for length in lengths {
            self.ping_long(now, way, length, shared);
        }
    }

    /// Pings every address of the peer, if a round is due.
    fn run_round(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        if now < self.next_round {
            return;
        }
        self.probe_all(now, shared);
        self.consider_search(now, shared);
        let direct = self.current.is_some();
        if !direct {
            shared.wants_fresh_stun = true;
            // The first announcement may be lost, or the peer's answer; later it may have moved.
            if self.round > 0 && (!self.listed || self.round > 3) {
                self.owe(now, true);
            }
            self.probe_relays(now, home, shared);
            for relay in shared.relays.wanted(home, self.round) {
                shared.push_event(Event::RelayWanted { relay });
            }
        }
        let pause = if direct && self.round >= ROUNDS_AFTER_PROMOTION {
            UPGRADE_INTERVAL
        } else {
            ROUND_PAUSES[self.round.min(ROUND_PAUSES.len() - 1)]
        };
        self.round += 1;
        self.next_round = now + pause;
    }

    /// Pings every address but the one in use, within the budget: first those that the peer told last, which are where it is
    /// now, and of these the one whose turn it is.
    pub(super) fn probe_all(&mut self, now: Instant, shared: &mut Shared) {
        let direct = self.current.as_ref().map(|c| c.way);
        // Extra sockets are as good as each other: one is enough.
        let done = |way: Way| Some(way) == direct || way.is_extra() && direct.is_some();
        let mut remotes: ArrayVec<_, MAX_REMOTES> = self.remotes.iter().filter(|r| !done(r.way)).collect();
        remotes.sort_by_key(|r| (Reverse(r.learned), r.pinged));
        let ways: ArrayVec<Way, MAX_REMOTES> = remotes.into_iter().map(|r| r.way).collect();
        for way in ways {
            self.probe(now, way, shared);
        }
    }

    /// Pings the peer through every relay that it may be reached through, if there are several or none is in use, within the
    /// budget: that it answers there is what makes a relay a choice, should another fail.
    fn probe_relays(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        let relays = self.relays.to_ping(home, &shared.relays);
        let wanted = relays.len() > 1 || self.relay(home, shared).is_none();
        for relay in relays.into_iter().filter(|_| wanted) {
            // Not of the budget for addresses: what those behind hard NATs try in vain must not hide a better relay.
            if self.relay_pings.take(now, MAX_RELAY_PINGS_PER_MINUTE)
                && shared.probes.take(now, MAX_DEVICE_PROBES_PER_MINUTE)
            {
                self.ping(now, Destination::Relay { relay, device: self.device }, None, shared);
            } else {
                shared.counters.probe_limited += 1;
            }
        }
    }

    pub(super) const fn restart_rounds(&mut self, now: Instant) {
        self.round = 0;
        self.next_round = now;
    }

    /// Our addresses are to be told, and the peer's asked for if `request`; not where nobody has anything to say.
    pub(super) fn owe(&mut self, now: Instant, request: bool) {
        if self.has_data(now) {
            self.owe_any(now, request);
        }
    }

    /// The peer asks for our addresses.
    pub(super) fn owe_answer(&mut self, now: Instant) {
        self.owe_any(now, false);
    }

    fn owe_any(&mut self, now: Instant, request: bool) {
        let soonest = self.announced.map_or(now, |at| (at + ANNOUNCE_INTERVAL).max(now));
        let (at, asks) = self.owed.unwrap_or((soonest, false));
        self.owed = Some((at, asks || request));
    }

    /// Sends our addresses, if they are owed: through the relay, or else through the coordinator.
    fn announce(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        let Some((_, request)) = self.owed.take_if(|(at, _)| *at <= now) else { return };
        let relay = self.relay(home, shared);
        let direct = self.current.as_ref().map(|c| Destination::from(c.way));
        // If relayed announcements bring no answer, the peer may not be on its relay.
        let signal = shared.signal
            && (relay.is_none() && direct.is_none() || relay.is_some() && self.round > 3 && direct.is_none());
        if relay.is_none() && direct.is_none() && !signal {
            return; // owed again as soon as a relay or the coordinator is back
        }
        if !self.announcements.take(now, MAX_ANNOUNCEMENTS_PER_MINUTE) {
            shared.counters.probe_limited += 1;
            self.owed = Some((self.announcements.next(now, MAX_ANNOUNCEMENTS_PER_MINUTE), request));
            return;
        }
        self.announced = Some(now);
        let ports = shared.announced_ports();
        let mut candidates = shared.own.clone();
        candidates.retain(|c| c.kind != CandidateKind::Predicted || self.may_use_predictions());
        let message = Message::Candidates { request, candidates, ports };
        let relay = relay.map(|relay| Destination::Relay { relay, device: self.device });
        if let Some(to) = relay.or(direct) {
            self.send(to, &message, shared);
        }
        if signal && let Some(probe) = self.seal(&message, shared) {
            shared.push_event(Event::Signal { device: self.device, sealed: probe.to_vec() });
        }
    }
}
