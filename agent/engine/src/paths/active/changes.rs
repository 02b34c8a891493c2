//! What happens around a peer in use: commands of people, and changes of our own network.

use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::ids::RelayId;
use warren_common::time::Instant;
use warren_common::wire::probe::{CandidateKind, Ports};

use super::{Active, SECOND};
use crate::event::{Event, PingToken};
use crate::io::Destination;
use crate::paths::shared::Shared;
use crate::paths::{Budget, MAX_REMOTES, MAX_USER_PINGS_PER_SECOND, PING_TIMEOUT, Way};

impl Active {
    /// Queues a ping; it goes out when there is a way and its turn has come.
    pub(in crate::paths) fn user_ping(&mut self, now: Instant, token: PingToken, shared: &mut Shared) {
        if self.waiting.try_push((token, now + PING_TIMEOUT)).is_err() {
            shared.push_event(Event::PingResult { token, path: self.told, rtt: None });
        }
    }

    /// Sends the pings that wait, as far as the budget goes.
    pub(super) fn send_waiting(&mut self, now: Instant, to: Destination, shared: &mut Shared) {
        while let Some((token, _)) = self.waiting.first().copied()
            && self.asked.take(now, SECOND, MAX_USER_PINGS_PER_SECOND)
        {
            self.waiting.remove(0);
            self.ping(now, to, Some(token), shared);
        }
    }

    /// Our own addresses changed; if we `moved`, the peer's are asked for too, and both ends ping. So they do if our ports
    /// are others each time: the peer must send to these soon.
    pub(in crate::paths) fn owe_candidates(&mut self, now: Instant, moved: bool, shared: &Shared) {
        let short_lived = shared.varies() && self.may_use_predictions();
        self.owe(now, (moved || short_lived) && self.current.is_none());
    }

    /// True unless the peer's ports change as well: then no prediction of one end's is enough.
    pub(in crate::paths) fn may_use_predictions(&self) -> bool {
        self.peer_ports.is_none_or(|ports| ports == Ports::Fixed)
    }

    /// There is something to say, for the first time or after a long time.
    pub(in crate::paths) fn on_first_data(&mut self, now: Instant) {
        if self.current.is_none() {
            self.owe(now, true);
            // It may have been looked for in vain for a while, since it asked.
            if self.round > 1 {
                self.restart_rounds(now);
            }
        }
    }

    /// The clock jumped.
    pub(in crate::paths) fn on_jump(&mut self, now: Instant) {
        if let Some(current) = &mut self.current {
            current.check_anew(now);
        }
        self.owe(now, true);
        self.restart_rounds(now);
    }

    /// Extra sockets were opened or closed.
    pub(in crate::paths) fn on_extra(&mut self, now: Instant, home: Option<RelayId>, shared: &mut Shared) {
        let closed = |way: Way| way.is_extra() && !shared.extra.contains(&way.socket);
        self.remotes.retain(|r| !closed(r.way));
        if self.current.take_if(|c| closed(c.way)).is_some() {
            self.owe(now, true);
            self.restart_rounds(now);
        }
        let relay = self.relay_to(home, shared);
        if shared.search == Some(self.idx) && !shared.extra.is_empty() {
            self.open_ports(now, relay, shared);
        }
    }

    /// Relays or the signal channel came or went.
    pub(in crate::paths) fn on_relays_changed(&mut self, now: Instant) {
        if self.current.is_none() {
            self.owe(now, true);
            self.restart_rounds(now);
        }
    }

    /// The peer is not at that relay.
    pub(in crate::paths) fn on_gone_from_relay(&mut self, relay: RelayId) {
        self.relays.on_gone(relay);
    }

    /// We are somewhere else: nothing that was proved holds.
    pub(in crate::paths) fn on_network_change(
        &mut self,
        now: Instant,
        home: Option<RelayId>,
        shared: &mut Shared,
    ) {
        let known: ArrayVec<(SocketAddr, CandidateKind), MAX_REMOTES> =
            self.remotes.iter().map(|r| (r.way.remote, r.kind)).collect();
        self.remotes.clear();
        self.held = None;
        self.early_death = None;
        // No peer can bring this about, so what was spent in the former network does not count.
        self.probes = Budget::default();
        self.relay_pings = Budget::default();
        self.announcements = Budget::default();
        self.checks = Budget::default();
        self.inflight.retain(|i| i.token.is_some());
        self.reply_to = None;
        for (addr, kind) in known {
            if shared.accepts(addr) {
                self.learn_on_all(now, addr, kind, shared);
            }
        }
        let relayed = self.relay(home, shared).is_some();
        let remotes = &self.remotes;
        if let Some(lost) = self.current.take_if(|c| relayed || !remotes.iter().any(|r| r.way == c.way)) {
            // Should the relay's connection not survive the move, the peer may still let us in where it did.
            self.former = Some((lost.way, Duration::ZERO, now));
        }
        if let Some(current) = &mut self.current {
            current.check_anew(now);
        }
        self.owe(now, true);
        self.restart_rounds(now);
    }
}
