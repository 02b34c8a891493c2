//! The addresses known of one peer.

use std::net::SocketAddr;
use std::time::Duration;

use warren_common::time::Instant;
use warren_common::wire::probe::{Candidate, CandidateKind};

use super::{Active, CONFIRMED_FRESH, Losses, Remote};
use crate::paths::shared::Shared;
use crate::paths::{PathCounters, Way};

impl Active {
    pub(super) fn learn_on_all(
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

    /// Forgets what the peer listed before and does not list any more: ports that its NAT had, unless they have worked, and
    /// addresses that are not its own any more, unless one answered a moment ago. They would be pinged for a quarter of an
    /// hour, beside those where it is, and from the same budget.
    pub(super) fn forget_unlisted(&mut self, now: Instant, listed: &[Candidate]) {
        if listed.is_empty() {
            return; // it knows nothing of itself yet
        }
        let reflexive = |kind| kind == CandidateKind::Reflexive;
        let current = self.current.as_ref().map(|c| c.way);
        self.remotes.retain(|r| {
            let at_ip = || listed.iter().filter(|c| c.addr.ip() == r.way.remote.ip());
            // What nobody listed was seen: no list says anything about it.
            if Some(r.way) == current || r.kind == CandidateKind::Observed {
                return true;
            }
            if at_ip().next().is_none() {
                return r.confirmed.is_some_and(|at| now.since(at) < CONFIRMED_FRESH);
            }
            let replaced = at_ip().any(|c| reflexive(c.kind));
            let stands = at_ip().any(|c| c.addr == r.way.remote);
            let works = r.heard || r.confirmed.is_some();
            !reflexive(r.kind) || !replaced || stands || works
        });
    }

    /// Takes note of an address; the one that is least worth keeping makes room. True if it is new.
    pub(super) fn learn(
        &mut self,
        now: Instant,
        way: Way,
        kind: CandidateKind,
        counters: &mut PathCounters,
    ) -> bool {
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
            smoothed: Duration::ZERO,
            losses: Losses::default(),
        };
        self.remotes.push(remote);
        true
    }
}
