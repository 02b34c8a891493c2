//! Which relay is home: the one that this device stays connected to, and that its peers find it at.
//!
//! The nearest by round trip, with hysteresis: moving costs every peer a new netmap, so another relay must be clearly
//! nearer, and stay so for [`BETTER_FOR`]. A home that fails or drains is left at once, and avoided for [`FAILED_FOR`]
//! unless it is connected again before; coming back to it then takes the same evidence as any move.

use std::collections::BTreeMap;
use std::time::Duration;

use warren_common::ids::RelayId;
use warren_common::time::Instant;

/// How long another relay must be clearly nearer before the home moves.
pub const BETTER_FOR: Duration = Duration::from_secs(60);
/// How long a relay that failed is not chosen.
pub const FAILED_FOR: Duration = Duration::from_secs(60);
/// How often all relays are measured where there are several: a request of 20 bytes to each of at most 16 servers.
pub const MEASURE_EVERY: Duration = Duration::from_secs(300);
/// How long the first choice waits for answers when there are several relays.
const PATIENCE: Duration = Duration::from_secs(1);
/// How much nearer another relay must be, beyond a third.
const MARGIN: Duration = Duration::from_millis(5);
/// A relay that is neither home nor wanted is left after so long without a packet.
pub const LEAVE_AFTER: Duration = Duration::from_secs(300);

/// True if a round trip of `other` is so much shorter than one of `own` that changing is worth what it costs.
pub(crate) fn is_clearly_nearer(other: Duration, own: Duration) -> bool {
    other + MARGIN < own * 2 / 3
}

/// The choice, and what led to it.
#[derive(Debug, Default)]
pub(crate) struct Home {
    current: Option<RelayId>,
    /// What peers are told.
    announced: Option<RelayId>,
    /// Until when a relay is not chosen: at most one entry for each relay of the netmap.
    failed: BTreeMap<RelayId, Instant>,
    /// Another relay that is clearly nearer, and since when.
    better: Option<(RelayId, Instant)>,
    /// When to choose for the first time even without an answer.
    patience: Option<Instant>,
    /// When to measure again.
    measure_at: Option<Instant>,
}

/// What is known about the relays.
pub(crate) struct View<'a> {
    /// All of the netmap.
    pub(crate) relays: &'a [RelayId],
    /// By STUN.
    pub(crate) rtt: &'a dyn Fn(RelayId) -> Option<Duration>,
    pub(crate) connected: &'a dyn Fn(RelayId) -> bool,
    /// No more answers are under way: all have had their chance.
    pub(crate) settled: bool,
}

impl Home {
    pub(crate) const fn current(&self) -> Option<RelayId> {
        self.current
    }

    /// A relay does not answer, closed the connection, or is about to.
    pub(crate) fn on_failed(&mut self, now: Instant, relay: RelayId, relays: &[RelayId]) {
        self.failed.retain(|id, until| relays.contains(id) && *until > now);
        if relays.contains(&relay) {
            self.failed.insert(relay, now + FAILED_FOR);
        }
        self.better = self.better.filter(|(better, _)| *better != relay);
    }

    /// A relay is connected.
    pub(crate) fn on_connected(&mut self, relay: RelayId) {
        self.failed.remove(&relay);
    }

    /// Chooses. True if the choice changed.
    pub(crate) fn choose(&mut self, now: Instant, view: &View<'_>) -> bool {
        let choice = self.choice(now, view);
        // Where there is nothing to choose from there is nothing to measure either.
        let several = view.relays.len() > 1 && choice.is_some();
        self.measure_at = several.then(|| self.measure_at.unwrap_or(now + MEASURE_EVERY));
        // While answers are still under way there is no sense in asking anew.
        if let (true, Some((_, since)), Some(at)) = (view.settled, self.better, &mut self.measure_at) {
            *at = (*at).min(since + BETTER_FOR).max(now);
        }
        let changed = choice != self.current;
        if changed {
            self.current = choice;
            self.better = None;
        }
        changed
    }

    /// What peers are to be told from now on, if that is news. A new home is told of when it is connected, so that no packet
    /// comes to a relay where we are not yet; unless the former one is gone already.
    pub(crate) fn announce(&mut self, connected: impl Fn(RelayId) -> bool) -> Option<Option<RelayId>> {
        let moving = self.current.zip(self.announced);
        let wait = moving.is_some_and(|(to, from)| !connected(to) && connected(from));
        if wait || self.current == self.announced {
            return None;
        }
        self.announced = self.current;
        Some(self.current)
    }

    fn choice(&mut self, now: Instant, view: &View<'_>) -> Option<RelayId> {
        let failed = |relay: &RelayId| self.failed.get(relay).is_some_and(|until| *until > now);
        let all_failed = view.relays.iter().all(failed);
        let usable = || view.relays.iter().copied().filter(|relay| all_failed || !failed(relay));
        let nearest = usable().filter_map(|r| Some(((view.rtt)(r)?, r))).min();
        // Nobody waits any more unless it is said below: the relays may all be gone meanwhile.
        let patience = self.patience.take();
        let Some(home) = self.current.filter(|home| view.relays.contains(home)) else {
            let single = view.relays.len() <= 1;
            return match nearest {
                Some((_, relay)) if view.settled || single || patience.is_some_and(|at| at <= now) => {
                    Some(relay)
                }
                None if view.settled || single => usable().next(),
                // The first answer is the nearest relay's, mostly; the others get a moment.
                _ => {
                    self.patience = Some(patience.unwrap_or(now + PATIENCE));
                    None
                }
            };
        };
        if failed(&home) && !all_failed {
            return nearest.map(|(_, relay)| relay).or_else(|| usable().next());
        }
        // While answers are still coming in, the others have had no chance yet.
        let (true, Some((best, relay))) = (view.settled, nearest.filter(|(_, relay)| *relay != home)) else {
            if view.settled {
                self.better = None;
            }
            return Some(home);
        };
        match (view.rtt)(home) {
            Some(own) if is_clearly_nearer(best, own) => {
                let since = self.better.filter(|(better, _)| *better == relay).map_or(now, |(_, at)| at);
                self.better = Some((relay, since));
                Some(if now.since(since) >= BETTER_FOR { relay } else { home })
            }
            None if !(view.connected)(home) => Some(relay),
            _ => {
                self.better = None;
                Some(home)
            }
        }
    }

    fn patience_is_over(&self, now: Instant) -> bool {
        self.patience.is_some_and(|at| at <= now)
    }

    /// When to look again.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        [self.patience, self.measure_at].into_iter().flatten().min()
    }

    /// What is due at `now`: to choose without further answers, and to measure.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> (bool, bool) {
        let choose = self.patience_is_over(now);
        let measure = self.measure_at.take_if(|at| *at <= now).is_some();
        if measure {
            self.measure_at = Some(now + MEASURE_EVERY);
        }
        (choose, measure)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Instant = Instant::from_nanos(1_000_000_000);

    fn relay(n: u8) -> RelayId {
        RelayId::from_bytes([n; 16])
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Relays 1 to 3 at these distances in milliseconds; 0: no answer.
    fn choose(home: &mut Home, now: Instant, rtts: [u64; 3], connected: &[u8], settled: bool) -> bool {
        let relays = [relay(1), relay(2), relay(3)];
        let rtt = |r: RelayId| {
            let at = relays.iter().position(|x| *x == r)?;
            (rtts[at] > 0).then(|| ms(rtts[at]))
        };
        let connected = |r: RelayId| connected.iter().any(|n| relay(*n) == r);
        home.choose(now, &View { relays: &relays, rtt: &rtt, connected: &connected, settled })
    }

    #[test]
    fn the_first_choice_is_the_nearest_of_those_that_answer_in_a_second() {
        let mut home = Home::default();
        assert!(!choose(&mut home, START, [0, 0, 0], &[], false));
        assert!(!choose(&mut home, START + ms(80), [0, 80, 0], &[], false));
        assert_eq!(home.poll_timeout(), Some(START + PATIENCE));
        assert!(!choose(&mut home, START + ms(90), [0, 80, 30], &[], false));
        assert_eq!(home.handle_timeout(START + PATIENCE), (true, false));
        assert!(choose(&mut home, START + PATIENCE, [0, 80, 30], &[], false));
        assert_eq!(home.current(), Some(relay(3)));
        let mut silent = Home::default();
        assert!(choose(&mut silent, START, [0, 0, 0], &[], true));
        assert_eq!(silent.current(), Some(relay(1)));
    }

    #[test]
    fn another_must_be_clearly_nearer_for_a_minute() {
        let mut home = Home::default();
        choose(&mut home, START, [60, 0, 0], &[1], true);
        let mut now = START;
        for rtts in [[60, 40, 70], [12, 5, 9], [60, 36, 60]] {
            now += MEASURE_EVERY;
            assert!(!choose(&mut home, now, rtts, &[1], true), "{rtts:?}");
            now += BETTER_FOR;
            assert!(!choose(&mut home, now, rtts, &[1], true), "{rtts:?}");
        }
        // Once is chance.
        assert_eq!(home.handle_timeout(now), (false, true));
        assert!(!choose(&mut home, now, [60, 20, 60], &[1], true));
        assert_eq!(home.poll_timeout(), Some(now + BETTER_FOR), "it is measured again soon");
        assert!(!choose(&mut home, now + ms(1), [60, 0, 60], &[1], true));
        assert!(!choose(&mut home, now + BETTER_FOR, [60, 20, 60], &[1], true));
        assert!(choose(&mut home, now + BETTER_FOR * 2, [60, 20, 60], &[1], true));
        assert_eq!(home.current(), Some(relay(2)));
    }

    #[test]
    fn a_home_that_fails_is_left_at_once_and_not_taken_again_soon() {
        let mut home = Home::default();
        choose(&mut home, START, [10, 30, 20], &[1], true);
        let relays = [relay(1), relay(2), relay(3)];
        home.on_failed(START + ms(1), relay(1), &relays);
        assert!(choose(&mut home, START + ms(1), [10, 30, 20], &[], false));
        assert_eq!(home.current(), Some(relay(3)));
        home.on_failed(START + ms(2), relay(3), &relays);
        assert!(choose(&mut home, START + ms(2), [10, 30, 20], &[], true));
        assert_eq!(home.current(), Some(relay(2)));
        // All have failed: any is better than none, and the present one as good as any.
        home.on_failed(START + ms(3), relay(2), &relays);
        assert!(!choose(&mut home, START + ms(3), [10, 30, 20], &[], false));
        // One is back, and the nearest again, for long enough.
        home.on_connected(relay(2));
        home.on_connected(relay(1));
        let later = START + FAILED_FOR;
        assert!(!choose(&mut home, later, [10, 30, 20], &[1, 2], true));
        assert!(choose(&mut home, later + BETTER_FOR, [10, 30, 20], &[1, 2], true));
        assert_eq!(home.current(), Some(relay(1)));
    }

    #[test]
    fn a_new_home_is_told_of_when_it_is_connected_or_the_former_one_is_gone() {
        let mut home = Home::default();
        choose(&mut home, START, [10, 30, 20], &[], true);
        assert_eq!(home.announce(|_| false), Some(Some(relay(1))), "nobody knows of another");
        let relays = [relay(1), relay(2), relay(3)];
        home.on_failed(START, relay(1), &relays); // it drains
        choose(&mut home, START, [10, 30, 20], &[1], true);
        assert_eq!(home.announce(|r| r == relay(1)), None);
        assert_eq!(home.announce(|_| true), Some(Some(relay(3))));
        assert_eq!(home.announce(|_| true), None);
        home.on_failed(START, relay(3), &relays);
        choose(&mut home, START, [10, 30, 20], &[], true);
        assert_eq!(home.announce(|_| false), Some(Some(relay(2))));
    }

    #[test]
    fn a_relay_that_leaves_the_netmap_is_no_home() {
        let mut home = Home::default();
        choose(&mut home, START, [10, 30, 20], &[1], true);
        let view = View { relays: &[relay(2)], rtt: &|_| None, connected: &|_| false, settled: false };
        assert!(home.choose(START, &view));
        assert_eq!((home.current(), home.poll_timeout()), (Some(relay(2)), None));
        assert!(home.choose(START, &View { relays: &[], ..view }));
        assert_eq!(home.current(), None);
    }

    #[test]
    fn nobody_waits_for_relays_that_are_gone() {
        let mut home = Home::default();
        choose(&mut home, START, [0, 80, 0], &[], false);
        assert_eq!(home.poll_timeout(), Some(START + PATIENCE));
        let none = View { relays: &[], rtt: &|_| None, connected: &|_| false, settled: false };
        assert!(!home.choose(START, &none));
        assert_eq!(home.poll_timeout(), None, "a timer in the past would spin");
        // When there are some again, they get their time.
        let later = START + PATIENCE * 2;
        assert!(!choose(&mut home, later, [0, 80, 0], &[], false));
        assert_eq!(home.poll_timeout(), Some(later + PATIENCE));
    }

    #[test]
    fn answers_that_trickle_in_start_no_new_round() {
        let mut home = Home::default();
        choose(&mut home, START, [60, 20, 70], &[1], true);
        home.on_failed(START, relay(2), &[relay(1), relay(2), relay(3)]);
        choose(&mut home, START, [60, 0, 70], &[1], true);
        home.on_connected(relay(2));
        let mut now = START + FAILED_FOR;
        choose(&mut home, now, [60, 20, 70], &[1], true);
        now += BETTER_FOR * 2;
        assert_eq!(home.handle_timeout(now), (false, true));
        assert!(!choose(&mut home, now, [60, 20, 0], &[1], false));
        assert_eq!(home.poll_timeout(), Some(now + MEASURE_EVERY));
    }

    proptest! {
        /// Whatever the round trips do, the home moves at most once a minute while nothing fails.
        #[test]
        fn it_does_not_flap(rounds in prop::collection::vec((any::<[u8; 3]>(), 1..40u64), 1..200)) {
            let (mut home, mut now, mut moved) = (Home::default(), START, None::<Instant>);
            choose(&mut home, now, [1, 2, 3], &[1, 2, 3], true);
            for (rtts, step) in rounds {
                now += Duration::from_secs(step);
                if choose(&mut home, now, rtts.map(|r| u64::from(r) + 1), &[1, 2, 3], true) {
                    prop_assert!(moved.is_none_or(|at| now.since(at) >= BETTER_FOR));
                    moved = Some(now);
                }
            }
        }
    }
}
