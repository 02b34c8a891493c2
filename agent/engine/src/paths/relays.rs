//! Relays as ways to a peer: which ones a pair can use now, and which one it uses. The only place that decides this.
//!
//! A packet goes where the peer was last heard to send; else to the peer's home; else to another relay where it answers.
//! A relay in doubt (it has stopped answering us, or is about to close) is passed over while there is one that is not: a
//! sender changes over within a second, and the other end follows the first packet.
//!
//! For that, both ends of a pair without a direct way are connected to more than one relay: to the homes of both, and, if
//! that is one and the same, to a *meeting relay* that both can compute, the next one by id. A round of probes pings the
//! peer through each, which proves that it is there, and moves the pair to one that is clearly nearer.
//!
//! *Peer relays*, devices that a grant lets relay for us, are further places to meet for both ends that know of the same
//! one. They are no homes, so nothing but an answer through one says that the peer is there too.
//!
//! The ends need not agree. Each sends over one relay and listens on all it is connected to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::ids::RelayId;
use warren_common::netmap::MAX_PEER_RELAYS;
use warren_common::time::Instant;

use super::PING_TIMEOUT;
use crate::home::is_clearly_nearer;

/// Relays on which one peer is known to listen: the homes of both ends, former ones, meeting relays.
const MAX_SEEN: usize = 6 + MAX_PEER_RELAYS;
/// Meeting relays of one pair, should the first ones be away.
const MAX_MEETING: usize = 3;
/// How long a relay that a peer was heard on is preferred to its home relay.
const SPOKE_FRESH: Duration = Duration::from_secs(60);
/// How long an answer through a relay says that the peer is there: three of the slowest rounds.
const SEEN_FRESH: Duration = Duration::from_secs(90);
/// How long a move of our own holds against packets that the peer sent before it followed.
const HOLD: Duration = Duration::from_secs(1);
/// A peer that is heard on two relays within so short a time is on its way to where it heard us, and we to where it was: the
/// two would change places for ever if they did not both prefer one.
const CROSSING: Duration = Duration::from_millis(300);
/// The round from which on a pair without a direct way wants a meeting relay: the first two seconds find most direct ways.
const MEET_FROM_ROUND: usize = 4;

/// All relays, as this device sees them.
#[derive(Debug, Default)]
pub(super) struct Relays {
    /// Of the netmap, by id.
    known: Vec<RelayId>,
    home: Option<RelayId>,
    /// Devices that a grant lets relay for us: never a home.
    peer_relays: ArrayVec<RelayId, MAX_PEER_RELAYS>,
    /// Those that are connected.
    up: BTreeMap<RelayId, Doubts>,
    /// Those that were tried, or lost, and not connected since.
    failed: BTreeSet<RelayId>,
}

/// Why a relay that is connected had better not be used.
#[derive(Clone, Copy, Debug, Default)]
struct Doubts {
    silent: bool,
    draining: bool,
}

impl Relays {
    /// Takes the relays of the netmap and our home.
    pub(super) fn set_known(&mut self, known: &[RelayId], home: Option<RelayId>) {
        if self.known != known {
            self.known = known.to_vec();
            self.known.sort_unstable();
            self.failed.retain(|relay| known.contains(relay));
        }
        self.home = home;
    }

    /// Takes the netmap's relays that are devices. True if there are others than before.
    pub(super) fn set_peer_relays(&mut self, relays: impl Iterator<Item = RelayId>) -> bool {
        let relays = relays.take(MAX_PEER_RELAYS).collect();
        let former = std::mem::replace(&mut self.peer_relays, relays);
        self.peer_relays.iter().any(|relay| !former.contains(relay))
    }

    /// A connection came up, or went down, or could not be made. True if that is news.
    pub(super) fn set(&mut self, relay: RelayId, connected: bool) -> bool {
        if connected {
            self.failed.remove(&relay);
            self.up.insert(relay, Doubts::default()).is_none_or(|former| former.silent || former.draining)
        } else {
            if self.known.contains(&relay) {
                self.failed.insert(relay);
            }
            self.up.remove(&relay).is_some()
        }
    }

    /// A connection was given up though it worked. True if that is news.
    pub(super) fn leave(&mut self, relay: RelayId) -> bool {
        self.up.remove(&relay).is_some()
    }

    /// A connected relay is silent, or not any more. True if that is news.
    pub(super) fn set_silent(&mut self, relay: RelayId, silent: bool) -> bool {
        self.up.get_mut(&relay).is_some_and(|doubts| std::mem::replace(&mut doubts.silent, silent) != silent)
    }

    /// A connected relay is about to close. True if that is news.
    pub(super) fn set_draining(&mut self, relay: RelayId) -> bool {
        self.up.get_mut(&relay).is_some_and(|doubts| !std::mem::replace(&mut doubts.draining, true))
    }

    pub(super) fn is_up(&self, relay: RelayId) -> bool {
        self.up.contains_key(&relay)
    }

    fn is_sound(&self, relay: RelayId) -> bool {
        self.up.get(&relay).is_some_and(|doubts| !doubts.silent && !doubts.draining)
    }

    /// Where two whose home is the same relay meet should it fail: the next one by id, and while that is away, the next but
    /// one as well. So a relay's clients have one other relay in common, and the relays share each other's clients evenly.
    fn meeting(&self, peer_home: Option<RelayId>) -> ArrayVec<RelayId, MAX_MEETING> {
        let mut meeting = ArrayVec::new();
        let Some(home) = self.home.filter(|home| peer_home == Some(*home)) else { return meeting };
        let at = self.known.partition_point(|relay| *relay <= home);
        for relay in self.known[at..].iter().chain(&self.known[..at]).filter(|relay| **relay != home) {
            if meeting.try_push(*relay).is_err() || !self.failed.contains(relay) {
                break;
            }
        }
        meeting
    }

    /// The relays to be connected to for a peer without a direct way, after so many rounds of probes.
    pub(super) fn wanted(
        &self,
        peer_home: Option<RelayId>,
        round: usize,
    ) -> impl Iterator<Item = RelayId> + use<> {
        let late = round >= MEET_FROM_ROUND;
        let meeting = if late { self.meeting(peer_home) } else { ArrayVec::new() };
        // Where nothing else carries packets they are wanted at once.
        let reached = peer_home.is_some_and(|home| self.is_up(home));
        let peer_relays = if late || !reached { self.peer_relays.clone() } else { ArrayVec::new() };
        peer_home.into_iter().chain(meeting).chain(peer_relays)
    }
}

/// What one peer in use shows of itself on relays.
#[derive(Debug, Default)]
pub(super) struct PairRelays {
    /// Where it was heard.
    seen: ArrayVec<Seen, MAX_SEEN>,
    /// Where it last sent packets, or we moved to.
    spoke: Option<(RelayId, Instant)>,
    /// Until when our own move holds.
    hold: Option<Instant>,
}

#[derive(Debug)]
struct Seen {
    relay: RelayId,
    at: Instant,
    /// The round trip to the peer through this relay, smoothed where it gets longer.
    rtt: Option<Duration>,
    /// When it was measured last.
    measured: Option<Instant>,
}

impl PairRelays {
    /// The peer was heard through `relay`: it listens there.
    pub(super) fn on_seen(&mut self, now: Instant, relay: RelayId) {
        if let Some(seen) = self.seen.iter_mut().find(|seen| seen.relay == relay) {
            seen.at = now;
            return;
        }
        if self.seen.is_full()
            && let Some(oldest) = (0..MAX_SEEN).min_by_key(|at| self.seen[*at].at)
        {
            self.seen.remove(oldest);
        }
        self.seen.push(Seen { relay, at: now, rtt: None, measured: None });
    }

    /// The peer chose `relay` for a packet. True if we follow it there.
    pub(super) fn on_spoke(&mut self, now: Instant, relay: RelayId) -> bool {
        self.on_seen(now, relay);
        let held = self.hold.is_some_and(|until| now < until);
        let crosses = |spoke: RelayId, at: Instant| now.since(at) < CROSSING && spoke < relay;
        match self.spoke {
            Some((spoke, _)) if spoke == relay => self.spoke = Some((relay, now)),
            Some((spoke, at)) if held || crosses(spoke, at) => return false,
            _ => {
                self.spoke = Some((relay, now));
                return true;
            }
        }
        false
    }

    /// A ping through `relay` was answered after so long. If the way is clearly shorter than the one in use, it is taken; so
    /// is one that was measured a moment ago, once it is first known how long the one in use is.
    pub(super) fn on_pong(
        &mut self,
        now: Instant,
        relay: RelayId,
        rtt: Duration,
        home: Option<RelayId>,
        relays: &Relays,
    ) {
        self.on_seen(now, relay);
        let mut first = false;
        if let Some(seen) = self.seen.iter_mut().find(|seen| seen.relay == relay) {
            first = seen.rtt.is_none();
            // Shorter at once: it is how far the peer is that counts, and a relay that stood still for a moment is no farther.
            seen.rtt = Some(seen.rtt.map_or(rtt, |former| rtt.min((3 * former + rtt) / 4)));
            seen.measured = Some(now);
        }
        let held = self.hold.is_some_and(|until| now < until);
        let used = self.choose(home, relays);
        let (Some(used), Some(own)) = (used, used.and_then(|used| self.rtt(used))) else { return };
        let counts = |seen: &&Seen| {
            let lately = seen.measured.is_some_and(|at| now.since(at) < PING_TIMEOUT);
            seen.relay != used
                && relays.is_sound(seen.relay)
                && (seen.relay == relay || relay == used && first && lately)
        };
        let best = self.seen.iter().filter(counts).filter_map(|seen| Some((seen.rtt?, seen.relay))).min();
        if let Some((_, relay)) = best.filter(|(rtt, _)| !held && is_clearly_nearer(*rtt, own)) {
            self.spoke = Some((relay, now));
            self.hold = Some(now + HOLD);
        }
    }

    /// `relay` says that the peer is not there, or not for us.
    pub(super) fn on_gone(&mut self, relay: RelayId) {
        self.seen.retain(|seen| seen.relay != relay);
        self.spoke = self.spoke.filter(|(spoke, _)| *spoke != relay);
    }

    /// The round trip to the peer through `relay`.
    pub(super) fn rtt(&self, relay: RelayId) -> Option<Duration> {
        self.seen.iter().find(|seen| seen.relay == relay)?.rtt
    }

    /// Forgets what is too old to mean anything.
    pub(super) fn expire(&mut self, now: Instant) {
        self.seen.retain(|seen| now.since(seen.at) < SEEN_FRESH);
        self.spoke = self.spoke.filter(|(_, at)| now.since(*at) < SPOKE_FRESH);
    }

    /// The relay for the next packet to the peer.
    pub(super) fn choose(&self, home: Option<RelayId>, relays: &Relays) -> Option<RelayId> {
        let spoke = self.spoke.map(|(relay, _)| relay);
        if spoke.is_some_and(|relay| relays.is_sound(relay)) {
            return spoke; // the way of nearly every packet
        }
        let latest = self.seen.iter().max_by_key(|seen| seen.at).map(|seen| seen.relay);
        let others = latest.into_iter().chain(self.seen.iter().map(|seen| seen.relay));
        let mut choices = spoke.into_iter().chain(home).chain(others);
        choices.clone().find(|relay| relays.is_sound(*relay)).or_else(|| choices.find(|r| relays.is_up(*r)))
    }

    /// Every relay that the peer may be reached through, to ping it there.
    pub(super) fn to_ping(
        &self,
        home: Option<RelayId>,
        relays: &Relays,
    ) -> ArrayVec<RelayId, { MAX_SEEN + MAX_MEETING + MAX_PEER_RELAYS + 2 }> {
        let mut all = ArrayVec::new();
        let seen = self.seen.iter().map(|seen| seen.relay);
        let others = relays.meeting(home).into_iter().chain(relays.peer_relays.iter().copied());
        for relay in seen.chain(home).chain(relays.home).chain(others) {
            if relays.is_up(relay) && !all.contains(&relay) {
                all.push(relay);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Instant = Instant::from_nanos(1_000_000_000_000);

    fn relay(n: u8) -> RelayId {
        RelayId::from_bytes([n; 16])
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Relays 1 to 4, of which these are connected; our home is 2.
    fn relays(up: &[u8]) -> Relays {
        let mut relays = Relays::default();
        relays.set_known(&[1, 2, 3, 4].map(relay), Some(relay(2)));
        for n in up {
            assert!(relays.set(relay(*n), true));
        }
        relays
    }

    fn wanted(relays: &Relays, peer_home: u8, round: usize) -> Vec<RelayId> {
        relays.wanted(Some(relay(peer_home)), round).collect()
    }

    #[test]
    fn two_with_one_home_meet_at_the_next_relay_and_others_at_their_homes() {
        let mut relays = relays(&[2]);
        assert_eq!(wanted(&relays, 2, 0), [relay(2)], "it may become direct");
        assert_eq!(wanted(&relays, 2, MEET_FROM_ROUND), [2, 3].map(relay));
        assert_eq!(wanted(&relays, 4, MEET_FROM_ROUND), [relay(4)]);
        // It can't be reached: the next but one as well, until it can.
        relays.set(relay(3), false);
        assert_eq!(wanted(&relays, 2, MEET_FROM_ROUND), [2, 3, 4].map(relay));
        relays.set(relay(3), true);
        assert_eq!(wanted(&relays, 2, MEET_FROM_ROUND), [2, 3].map(relay));
        // The last one's next is the first.
        relays.set_known(&[1, 2, 3, 4].map(relay), Some(relay(4)));
        assert_eq!(wanted(&relays, 4, MEET_FROM_ROUND), [4, 1].map(relay));
        // There is one relay only, or none at all.
        relays.set_known(&[relay(4)], Some(relay(4)));
        assert_eq!(wanted(&relays, 4, MEET_FROM_ROUND), [relay(4)]);
        relays.set_known(&[], None);
        assert_eq!(relays.wanted(None, MEET_FROM_ROUND).count(), 0);
    }

    #[test]
    fn however_many_relays_are_away_few_are_tried_for_a_pair() {
        let mut relays = Relays::default();
        let all: Vec<RelayId> = (1..60).map(relay).collect();
        relays.set_known(&all, Some(relay(9)));
        for relay in &all {
            relays.set(*relay, false);
        }
        assert_eq!(relays.wanted(Some(relay(9)), MEET_FROM_ROUND).count(), 1 + MAX_MEETING);
    }

    #[test]
    fn a_relay_in_doubt_is_passed_over_if_the_peer_is_known_to_listen_elsewhere() {
        let mut relays = relays(&[2, 3, 4]);
        let (mut pair, home) = (PairRelays::default(), Some(relay(2)));
        assert_eq!(pair.choose(home, &relays), home);
        assert!(relays.set_silent(relay(2), true) && !relays.set_silent(relay(2), true));
        assert_eq!(pair.choose(home, &relays), home, "nobody knows whether the peer is elsewhere");
        pair.on_seen(START, relay(3));
        assert_eq!(pair.choose(home, &relays), Some(relay(3)));
        relays.set_silent(relay(2), false);
        assert_eq!(pair.choose(home, &relays), home);
        assert!(relays.set_draining(relay(2)));
        assert_eq!(pair.choose(home, &relays), Some(relay(3)));
        // An answer does not stop it from closing, a new connection does.
        relays.set_silent(relay(2), true);
        relays.set_silent(relay(2), false);
        assert_eq!(pair.choose(home, &relays), Some(relay(3)));
        assert!(relays.set(relay(2), true) && !relays.set(relay(2), true));
        assert_eq!(pair.choose(home, &relays), home);
        // The peer was there long ago.
        pair.expire(START + SEEN_FRESH);
        relays.set(relay(2), false);
        assert_eq!(pair.choose(home, &relays), None);
    }

    #[test]
    fn who_hears_the_peer_elsewhere_follows() {
        let relays = relays(&[2, 3]);
        let (mut pair, home) = (PairRelays::default(), Some(relay(2)));
        assert!(pair.on_spoke(START, relay(3)) && !pair.on_spoke(START, relay(3)));
        assert_eq!(pair.choose(home, &relays), Some(relay(3)));
        pair.expire(START + SPOKE_FRESH);
        assert_eq!(pair.choose(home, &relays), home);
    }

    /// Each sends to the other's home at first.
    #[test]
    fn two_that_cross_settle_on_one_relay() {
        let relays = relays(&[2, 3]);
        let mut ends = [PairRelays::default(), PairRelays::default()];
        let homes = [3, 2].map(|n| Some(relay(n))); // of the other end
        let way = 40;
        let mut under_way: Vec<(u64, usize, RelayId)> = Vec::new();
        for now in (0..1_000).step_by(10) {
            for (at, to, used) in under_way.extract_if(.., |(at, ..)| *at <= now).collect::<Vec<_>>() {
                ends[to].on_spoke(START + ms(at), used);
            }
            for from in [0, 1] {
                let used = ends[from].choose(homes[from], &relays).unwrap();
                under_way.push((now + way, 1 - from, used));
            }
        }
        let used: Vec<_> = (0..2).map(|n| ends[n].choose(homes[n], &relays)).collect();
        assert_eq!(used, [Some(relay(2)); 2]);
    }

    #[test]
    fn a_pair_moves_to_a_clearly_nearer_relay_and_stays_there() {
        let relays = relays(&[2, 3]);
        let (mut pair, home) = (PairRelays::default(), Some(relay(2)));
        pair.on_spoke(START, relay(3));
        pair.on_pong(START, relay(3), ms(90), home, &relays);
        pair.on_pong(START, relay(2), ms(70), home, &relays);
        assert_eq!(pair.choose(home, &relays), Some(relay(3)), "not by so little");
        let now = START + ms(500);
        (0..20).for_each(|_| pair.on_pong(now, relay(2), ms(30), home, &relays));
        assert_eq!(pair.choose(home, &relays), Some(relay(2)));
        // Packets that the peer sent before it followed.
        pair.on_spoke(now + ms(100), relay(3));
        assert_eq!(pair.choose(home, &relays), Some(relay(2)));
        // It has its reasons.
        pair.on_spoke(now + HOLD, relay(3));
        assert_eq!(pair.choose(home, &relays), Some(relay(3)));
    }

    #[test]
    fn a_pair_meets_at_peer_relays_and_leaves_one_where_the_other_end_is_not() {
        let mut relays = relays(&[2]);
        assert!(relays.set_peer_relays([8, 9].map(relay).into_iter()));
        assert!(!relays.set_peer_relays([8].map(relay).into_iter()), "nothing new");
        assert!(relays.set_peer_relays([8, 9].map(relay).into_iter()));
        // A relay carries packets already: the first rounds find most direct ways.
        assert_eq!(wanted(&relays, 2, 0), [relay(2)]);
        assert_eq!(wanted(&relays, 2, MEET_FROM_ROUND), [2, 3, 8, 9].map(relay));
        assert_eq!(wanted(&relays, 4, 0), [4, 8, 9].map(relay), "nothing else does yet");
        assert_eq!(relays.wanted(None, 0).collect::<Vec<_>>(), [8, 9].map(relay));
        let (mut pair, home) = (PairRelays::default(), Some(relay(2)));
        assert!(!pair.to_ping(home, &relays).contains(&relay(8)), "not connected yet");
        relays.set(relay(8), true);
        assert!(pair.to_ping(home, &relays).contains(&relay(8)));
        pair.on_pong(START, relay(2), ms(90), home, &relays);
        assert_eq!(pair.choose(home, &relays), home, "no answer came through it");
        pair.on_pong(START, relay(8), ms(10), home, &relays);
        assert_eq!(pair.choose(home, &relays), Some(relay(8)));
        pair.on_gone(relay(8));
        assert_eq!(pair.choose(home, &relays), home);
        // The nearer one answers first, before anybody knows how far the present one is.
        let mut pair = PairRelays::default();
        pair.on_spoke(START, relay(2));
        pair.on_pong(START, relay(8), ms(10), home, &relays);
        assert_eq!(pair.choose(home, &relays), home);
        pair.on_pong(START + ms(80), relay(2), ms(90), home, &relays);
        assert_eq!(pair.choose(home, &relays), Some(relay(8)));
        // Where there is no other relay, an answer is all it takes.
        let mut pair = PairRelays::default();
        assert_eq!(pair.choose(None, &relays), None);
        pair.on_pong(START, relay(8), ms(10), None, &relays);
        assert_eq!(pair.choose(None, &relays), Some(relay(8)));
    }

    #[test]
    fn a_relay_that_was_left_is_met_at_again() {
        let mut relays = relays(&[2, 3]);
        let before = wanted(&relays, 2, MEET_FROM_ROUND);
        assert!(relays.leave(relay(3)) && !relays.leave(relay(3)));
        assert!(!relays.is_up(relay(3)));
        assert_eq!(wanted(&relays, 2, MEET_FROM_ROUND), before, "it has not failed: no other one is needed");
        relays.set(relay(3), false);
        assert_ne!(wanted(&relays, 2, MEET_FROM_ROUND), before);
    }

    #[test]
    fn where_a_peer_was_heard_is_bounded() {
        let mut pair = PairRelays::default();
        for n in 0..100 {
            pair.on_seen(START + ms(n), relay(n as u8));
        }
        assert_eq!(pair.seen.len(), MAX_SEEN);
        assert!(pair.seen.iter().any(|seen| seen.relay == relay(99)));
    }
}
