//! What a peer in use does by the clock: checks, rounds, announcements.

use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::ids::RelayId;
use warren_common::time::Instant;
use warren_common::wire::probe::Message;

use super::{Active, Check, MINUTE, SECOND};
use crate::event::{Event, Path};
use crate::io::Destination;
use crate::paths::shared::Shared;
use crate::paths::{
    ANNOUNCE_INTERVAL, CANDIDATE_AGE, CHECK_INTERVAL, DISTRESS_AFTER, IDLE_AFTER, KEEPALIVE,
    MAX_CHECKS_PER_MINUTE, MAX_REMOTES, PING_TIMEOUT, ROUND_PAUSES, ROUNDS_AFTER_PROMOTION, UPGRADE_INTERVAL,
    Way,
};

impl Active {
    /// Does what is due. Returns when to come back; `None` if the peer is idle now.
    pub(in crate::paths) fn tick(
        &mut self,
        now: Instant,
        home: Option<RelayId>,
        shared: &mut Shared,
    ) -> Option<Instant> {
        self.expire(now, shared);
        let idle_at = self.used + IDLE_AFTER;
        if idle_at <= now && !self.has_user_pings() {
            return None;
        }
        self.check_current(now, shared);
        self.run_round(now, home, shared);
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
            self.told = path;
            shared.push_event(Event::PathChanged { device: self.device, path });
            if matches!(path, Path::Direct { .. }) {
                shared.ready.push_back(self.idx);
            }
        }
        Some(self.next_wake(now, idle_at))
    }

    fn next_wake(&self, now: Instant, idle_at: Instant) -> Instant {
        let keep = self.current.as_ref().map(|c| match &c.check {
            Some(check) => check.next_ping.min(check.started + DISTRESS_AFTER),
            None => c.last_rx + KEEPALIVE,
        });
        let pings = self.inflight.iter().filter(|i| i.token.is_some()).map(|i| i.sent + PING_TIMEOUT);
        let turn = self.reachable.then(|| self.asked.next(SECOND));
        let waiting = self.waiting.iter().map(|(_, until)| turn.map_or(*until, |turn| turn.min(*until)));
        let owed = self.owed.map(|(at, _)| at);
        let idle_at = if self.has_user_pings() { None } else { Some(idle_at) };
        let times = pings.chain(waiting).chain(keep).chain(owed).chain(idle_at).chain([self.next_round]);
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
            Some(r.way) == current || now.since(last) < CANDIDATE_AGE
        });
    }

    /// Keeps the direct way open, and gives it up when it is dead.
    fn check_current(&mut self, now: Instant, shared: &mut Shared) {
        let Some(current) = &mut self.current else { return };
        let way = current.way;
        if current.check.as_ref().is_some_and(|check| current.last_rx > check.started) {
            current.check = None;
        }
        if current.check.is_none() && now.since(current.last_rx) >= KEEPALIVE {
            current.check = Some(Check { started: now, next_ping: now });
        }
        let Some(check) = &mut current.check else { return };
        if now.since(check.started) >= DISTRESS_AFTER {
            self.current = None;
            if let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) {
                remote.confirmed = None;
            }
            self.owe(now, true);
            self.restart_rounds(now);
        } else if check.next_ping <= now {
            check.next_ping = now + CHECK_INTERVAL;
            if self.checks.take(now, MINUTE, MAX_CHECKS_PER_MINUTE) {
                self.ping(now, way.into(), None, shared);
            } else {
                shared.counters.probe_limited += 1;
            }
        }
    }

    /// Pings every address of the peer, if a round is due.
    fn run_round(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        if now < self.next_round {
            return;
        }
        self.probe_all(now, shared);
        let direct = self.current.is_some();
        if !direct {
            shared.wants_fresh_stun = true;
            // The first announcement may be lost, or the peer's answer; later it may have moved.
            if self.round > 0 && (!self.listed || self.round > 3) {
                self.owe(now, true);
            }
            if let Some(relay) = home.filter(|relay| !shared.relays.contains(relay)) {
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

    /// Pings every address but the one in use, within the budget.
    pub(super) fn probe_all(&mut self, now: Instant, shared: &mut Shared) {
        let direct = self.current.as_ref().map(|c| c.way);
        let ways: ArrayVec<Way, MAX_REMOTES> =
            self.remotes.iter().map(|r| r.way).filter(|way| Some(*way) != direct).collect();
        for way in ways {
            self.probe(now, way, shared);
        }
    }

    pub(super) const fn restart_rounds(&mut self, now: Instant) {
        self.round = 0;
        self.next_round = now;
    }

    pub(super) fn owe(&mut self, now: Instant, request: bool) {
        let soonest = self.announced.map_or(now, |at| (at + ANNOUNCE_INTERVAL).max(now));
        let (at, asks) = self.owed.unwrap_or((soonest, false));
        self.owed = Some((at, asks || request));
    }

    /// Sends our addresses, if they are owed: through the relay, or else through the coordinator.
    fn announce(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        let Some((_, request)) = self.owed.take_if(|(at, _)| *at <= now) else { return };
        let relay = self.relay(now, home, shared);
        let direct = self.current.as_ref().map(|c| Destination::from(c.way));
        // If relayed announcements bring no answer, the peer may not be on its relay.
        let signal = shared.signal
            && (relay.is_none() && direct.is_none() || relay.is_some() && self.round > 3 && direct.is_none());
        if relay.is_none() && direct.is_none() && !signal {
            return; // owed again as soon as a relay or the coordinator is back
        }
        if !self.checks.take(now, MINUTE, MAX_CHECKS_PER_MINUTE) {
            shared.counters.probe_limited += 1;
            return;
        }
        self.announced = Some(now);
        let message = Message::Candidates { request, candidates: shared.own.clone() };
        let relay = relay.map(|relay| Destination::Relay { relay, device: self.device });
        if let Some(to) = relay.or(direct) {
            self.send(to, &message, shared);
        }
        if signal && let Some(probe) = self.seal(&message, shared) {
            shared.push_event(Event::Signal { device: self.device, sealed: probe.to_vec() });
        }
    }
}
