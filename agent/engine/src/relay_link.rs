//! Whether a relay still answers, and whether plain UDP to it passes.
//!
//! [`Liveness`] watches one way to a relay. A quiet way is pinged now and then, which also keeps NATs open. A way that
//! is *used* is watched closely: what was sent and followed by nothing is a suspicion, which a few quick pings confirm or
//! clear. So a relay that dies is noticed within two seconds by those who need it, and nobody else hurries. From the second
//! ping on the way is *in doubt*: packets had better go elsewhere, if there is an elsewhere, and it costs nothing to be wrong.
//!
//! [`UdpWay`] proves plain UDP before it is used, with pings as long as the longest packet, and gives it up when it stops
//! passing; then it is tried again after growing pauses, or when the network changes.

use std::collections::VecDeque;
use std::time::Duration;

use warren_common::time::Instant;

/// How often a quiet way is pinged unless the NAT needs it more often: half of the 30 s after which many NATs forget UDP.
pub const KEEPALIVE: Duration = Duration::from_secs(15);
/// What was sent may stay unanswered for so long before that is a suspicion.
const SUSPECT_AFTER: Duration = Duration::from_millis(300);
/// Pings that a suspicion takes; when the last of them stays unanswered the way is dead.
const SUSPECT_PINGS: u32 = 3;
/// Those of them after which the way is in doubt: the first had time for an answer.
const DOUBT_PINGS: u32 = 2;
/// An answer over a connection may take so long where the round trip is short: it waits its turn behind packets.
pub const CONNECTION_MIN_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between them, however long the round trip is: dead is known within 300 ms and three of these.
const MAX_PING_PAUSE: Duration = Duration::from_millis(550);
/// Pings that prove UDP: over half a second, so that a moment's loss does not decide.
const PROOF_PINGS: u32 = 4;
/// Pause between the first two of them; doubles.
const PROOF_PAUSE: Duration = Duration::from_millis(150);
/// First pause after UDP did not pass; doubles to [`MAX_UDP_PAUSE`].
pub const MIN_UDP_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause between two tries of UDP.
pub const MAX_UDP_PAUSE: Duration = Duration::from_secs(300);
/// UDP that passed for so long starts over with the first pause.
const STABLE: Duration = Duration::from_secs(60);

/// What a deadline asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing yet.
    Fine,
    /// Send a ping.
    Ping,
    /// Nothing comes back any more.
    Dead,
}

/// Watches one way to a relay.
#[derive(Clone, Debug)]
pub struct Liveness {
    /// Shortest pause between two pings of a suspicion.
    min_pause: Duration,
    keepalive: Duration,
    /// The last ping; none yet, and one is due at once.
    kept: Option<Instant>,
    rtt: Duration,
    suspicion: Option<Suspicion>,
    /// What [`Liveness::doubt_news`] has told.
    told: bool,
}

#[derive(Clone, Copy, Debug)]
struct Suspicion {
    at: Instant,
    pings: u32,
}

impl Liveness {
    /// A way that works; whether it still does is asked at once. `min_pause` is what an answer may take on a way with a
    /// short round trip.
    pub const fn new(min_pause: Duration) -> Self {
        let (keepalive, rtt) = (KEEPALIVE, Duration::ZERO);
        Self { min_pause, keepalive, kept: None, rtt, suspicion: None, told: false }
    }

    /// True while a ping has been unanswered for longer than an answer takes: packets are better sent another way.
    pub fn is_in_doubt(&self) -> bool {
        self.suspicion.is_some_and(|suspicion| suspicion.pings >= DOUBT_PINGS)
    }

    /// [`Liveness::is_in_doubt`], if that has changed since the last call.
    pub fn doubt_news(&mut self) -> Option<bool> {
        let doubt = self.is_in_doubt();
        (std::mem::replace(&mut self.told, doubt) != doubt).then_some(doubt)
    }

    /// How often to ping it when it is quiet. True if the next deadline came nearer.
    pub fn set_keepalive(&mut self, keepalive: Duration) -> bool {
        std::mem::replace(&mut self.keepalive, keepalive) > keepalive
    }

    /// Something was sent that is usually followed by something else. True if the next deadline came nearer.
    pub fn on_sent(&mut self, now: Instant) -> bool {
        let first = self.suspicion.is_none();
        self.suspicion.get_or_insert(Suspicion { at: now + SUSPECT_AFTER.max(self.rtt * 2), pings: 0 });
        first
    }

    /// Something authentic came.
    pub const fn on_heard(&mut self) {
        self.suspicion = None;
    }

    /// A ping was answered after so long.
    pub const fn on_pong(&mut self, rtt: Duration) {
        self.rtt = rtt;
        self.suspicion = None;
    }

    /// There is reason to ask at once: the network has changed, or another way to the same relay is silent.
    pub fn suspect(&mut self, now: Instant) {
        self.suspicion.get_or_insert(Suspicion { at: now, pings: 0 });
    }

    /// When [`Liveness::check`] is due.
    pub fn deadline(&self) -> Instant {
        self.suspicion.map_or(self.keepalive_at(), |s| s.at.min(self.keepalive_at()))
    }

    fn keepalive_at(&self) -> Instant {
        self.kept.map_or(Instant::ZERO, |at| at + self.keepalive)
    }

    /// What is due.
    pub fn check(&mut self, now: Instant) -> Check {
        let pause = (self.rtt * 2).clamp(self.min_pause, MAX_PING_PAUSE);
        if let Some(suspicion) = &mut self.suspicion
            && suspicion.at <= now
        {
            if suspicion.pings >= SUSPECT_PINGS {
                return Check::Dead;
            }
            suspicion.pings += 1;
            suspicion.at = now + pause;
        } else if self.keepalive_at() <= now {
            self.suspicion.get_or_insert(Suspicion { at: now + pause, pings: 1 });
        } else {
            return Check::Fine;
        }
        self.kept = Some(now);
        Check::Ping
    }
}

/// What to do about UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpAction {
    /// Send a ping.
    Ping {
        /// As long as the longest packet, or as short as it can be.
        full: bool,
        /// Ask the relay to send what is for us to where it comes from.
        settle: bool,
    },
    /// Packets go over UDP from now on.
    Up,
    /// They take the connection from now on; the relay must be told.
    Down,
}

/// Plain UDP to one relay, beside a connection to it.
#[derive(Debug)]
pub struct UdpWay {
    state: State,
    /// Before the next try.
    pause: Duration,
    keepalive: Duration,
    actions: VecDeque<UdpAction>,
}

#[derive(Debug)]
enum State {
    Proving { at: Instant, pings: u32 },
    Up { since: Instant, liveness: Liveness },
    Waiting { until: Instant },
}

/// An answer over UDP that takes longer than this is suspicious where the round trip is short.
const UDP_MIN_PAUSE: Duration = Duration::from_millis(250);

impl UdpWay {
    /// Nothing is known; proving starts at once.
    pub fn new(now: Instant) -> Self {
        Self {
            state: State::Proving { at: now, pings: 0 },
            pause: MIN_UDP_PAUSE,
            keepalive: KEEPALIVE,
            actions: VecDeque::new(),
        }
    }

    /// How often to ping it when it is quiet, so that the NAT in front of us remembers.
    pub fn set_keepalive(&mut self, keepalive: Duration) {
        self.keepalive = keepalive;
        if let State::Up { liveness, .. } = &mut self.state {
            liveness.set_keepalive(keepalive);
        }
    }

    /// Packets go over UDP.
    pub const fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Packets go over UDP, but it has not answered for longer than it should.
    pub fn is_in_doubt(&self) -> bool {
        matches!(&self.state, State::Up { liveness, .. } if liveness.is_in_doubt())
    }

    /// A packet went out over UDP. True if the next deadline came nearer.
    pub fn on_sent(&mut self, now: Instant) -> bool {
        match &mut self.state {
            State::Up { liveness, .. } => liveness.on_sent(now),
            State::Proving { .. } | State::Waiting { .. } => false,
        }
    }

    /// Something authentic came over UDP.
    pub const fn on_heard(&mut self) {
        if let State::Up { liveness, .. } = &mut self.state {
            liveness.on_heard();
        }
    }

    /// A ping was answered after so long; `full`: it was as long as the longest packet.
    pub fn on_pong(&mut self, now: Instant, full: bool, rtt: Duration) {
        match &mut self.state {
            State::Up { liveness, .. } => liveness.on_pong(rtt),
            State::Proving { .. } if full => {
                let mut liveness = Liveness::new(UDP_MIN_PAUSE);
                liveness.kept = Some(now);
                liveness.set_keepalive(self.keepalive);
                liveness.on_pong(rtt);
                self.state = State::Up { since: now, liveness };
                self.actions.extend([UdpAction::Up, UdpAction::Ping { full: false, settle: true }]);
            }
            State::Proving { .. } | State::Waiting { .. } => {}
        }
    }

    /// The network changed: what passed may not pass any more, and the other way round.
    pub fn on_network_change(&mut self, now: Instant) {
        match &mut self.state {
            // A ping from the new address also tells the relay where we are.
            State::Up { liveness, .. } => liveness.suspect(now),
            State::Proving { .. } | State::Waiting { .. } => {
                self.pause = MIN_UDP_PAUSE;
                self.state = State::Proving { at: now, pings: 0 };
            }
        }
    }

    /// When [`UdpWay::handle_timeout`] is due.
    pub fn deadline(&self) -> Instant {
        match &self.state {
            State::Proving { at, .. } => *at,
            State::Up { liveness, .. } => liveness.deadline(),
            State::Waiting { until } => *until,
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        match &mut self.state {
            State::Proving { at, pings } if *at <= now => {
                if *pings == PROOF_PINGS {
                    return self.wait(now);
                }
                *at = now + PROOF_PAUSE * (1 << *pings);
                *pings += 1;
                self.actions.push_back(UdpAction::Ping { full: true, settle: false });
            }
            State::Up { since, liveness } => match liveness.check(now) {
                Check::Fine => {}
                Check::Ping => self.actions.push_back(UdpAction::Ping { full: false, settle: true }),
                Check::Dead => {
                    if now.since(*since) >= STABLE {
                        self.pause = MIN_UDP_PAUSE;
                    }
                    self.actions.push_back(UdpAction::Down);
                    self.wait(now);
                }
            },
            State::Waiting { until } if *until <= now => {
                self.state = State::Proving { at: now, pings: 0 };
                self.handle_timeout(now);
            }
            State::Proving { .. } | State::Waiting { .. } => {}
        }
    }

    /// What to do next.
    pub fn poll(&mut self) -> Option<UdpAction> {
        self.actions.pop_front()
    }

    fn wait(&mut self, now: Instant) {
        self.state = State::Waiting { until: now + self.pause };
        self.pause = (self.pause * 2).min(MAX_UDP_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FULL: UdpAction = UdpAction::Ping { full: true, settle: false };
    const SHORT: UdpAction = UdpAction::Ping { full: false, settle: true };

    /// A way, its clock, and a network that passes UDP or doesn't.
    struct World {
        way: UdpWay,
        now: Instant,
        rtt: Duration,
        passes: bool,
        pings: usize,
        seen: Vec<UdpAction>,
    }

    impl World {
        fn new(passes: bool) -> Self {
            let now = Instant::from_nanos(1_000_000_000_000);
            let rtt = Duration::from_millis(40);
            Self { way: UdpWay::new(now), now, rtt, passes, pings: 0, seen: Vec::new() }
        }

        /// Lets `time` pass; `send`: packets go out all the time, and nothing but pongs comes back.
        fn run(&mut self, time: Duration, send: bool) {
            let end = self.now + time;
            let mut pongs = VecDeque::new();
            while self.now < end {
                self.now += Duration::from_millis(5);
                if send && self.way.is_up() {
                    self.way.on_sent(self.now);
                }
                while let Some((_, full)) =
                    pongs.pop_front_if(|(at, _): &mut (Instant, bool)| *at <= self.now)
                {
                    self.way.on_pong(self.now, full, self.rtt);
                }
                self.way.handle_timeout(self.now);
                while let Some(action) = self.way.poll() {
                    self.seen.push(action);
                    if let UdpAction::Ping { full, .. } = action {
                        self.pings += 1;
                        if self.passes {
                            pongs.push_back((self.now + self.rtt, full));
                        }
                    }
                }
            }
        }

        fn down_after(&mut self, send: bool) -> Duration {
            let since = self.now;
            while self.way.is_up() {
                self.run(Duration::from_millis(10), send);
            }
            self.now.since(since)
        }
    }

    #[test]
    fn udp_is_used_after_a_full_packet_passed_and_settled_at_once() {
        let mut world = World::new(true);
        world.run(Duration::from_millis(100), false);
        assert_eq!(world.seen, [FULL, UdpAction::Up, SHORT]);
        let mut short = UdpWay::new(Instant::ZERO);
        short.on_pong(Instant::ZERO, false, Duration::ZERO);
        assert!(!short.is_up(), "a short answer proves nothing");
    }

    #[test]
    fn udp_that_gets_blocked_is_given_up_within_two_seconds_of_use_and_taken_up_again() {
        let mut world = World::new(true);
        world.run(Duration::from_secs(5), true);
        world.passes = false;
        let took = world.down_after(true);
        assert!(took <= Duration::from_millis(1_300), "{took:?}");
        assert_eq!(world.seen.last(), Some(&UdpAction::Down));
        world.passes = true;
        world.run(MIN_UDP_PAUSE + Duration::from_secs(1), true);
        assert!(world.way.is_up());
        // Unused, it is noticed by the next keep-alive.
        world.passes = false;
        let took = world.down_after(false);
        assert!(took <= KEEPALIVE + Duration::from_secs(1), "{took:?}");
    }

    #[test]
    fn pings_are_few_whether_udp_passes_or_not() {
        let hour = Duration::from_secs(3_600);
        for (passes, send, most) in [(true, false, 250), (false, false, 80), (true, true, 3_600 * 4)] {
            let mut world = World::new(passes);
            world.run(hour, send);
            assert!(world.pings <= most, "{passes} {send}: {}", world.pings);
            assert_eq!(world.way.is_up(), passes);
        }
    }

    #[test]
    fn a_forgetful_nat_is_reminded_in_time() {
        let mut world = World::new(true);
        world.run(Duration::from_secs(20), false);
        world.way.set_keepalive(Duration::from_millis(1_700));
        let before = world.pings;
        world.run(Duration::from_secs(60), false);
        assert!((35..=36).contains(&(world.pings - before)), "{}", world.pings - before);
        // Also after it has gone away and come back.
        world.passes = false;
        world.down_after(true);
        world.passes = true;
        world.run(MIN_UDP_PAUSE + Duration::from_secs(1), false);
        let before = world.pings;
        world.run(Duration::from_secs(17), false);
        assert_eq!(world.pings - before, 10);
    }

    #[test]
    fn a_change_of_the_network_asks_at_once() {
        let mut world = World::new(false);
        world.run(Duration::from_secs(3_600), false);
        world.passes = true;
        world.way.on_network_change(world.now);
        world.run(Duration::from_millis(100), false);
        assert!(world.way.is_up());
        world.seen.clear();
        world.way.on_network_change(world.now);
        world.run(Duration::from_millis(100), false);
        assert_eq!(world.seen, [SHORT]);
    }

    #[test]
    fn a_used_way_is_in_doubt_long_before_it_is_given_up_and_one_word_clears_it() {
        let start = Instant::from_nanos(1_000_000_000_000);
        let mut liveness = Liveness::new(CONNECTION_MIN_PAUSE);
        assert_eq!(liveness.check(start), Check::Ping);
        liveness.on_pong(Duration::from_millis(40));
        liveness.on_sent(start);
        let doubt = start + SUSPECT_AFTER + CONNECTION_MIN_PAUSE;
        let mut now = start;
        while !liveness.is_in_doubt() {
            assert_eq!(liveness.doubt_news(), None);
            now = liveness.deadline();
            assert_eq!(liveness.check(now), Check::Ping);
        }
        assert_eq!((now, liveness.doubt_news(), liveness.doubt_news()), (doubt, Some(true), None));
        liveness.on_heard();
        assert_eq!((liveness.doubt_news(), liveness.doubt_news()), (Some(false), None));
    }

    proptest! {
        #[test]
        fn a_used_way_is_dead_within_two_seconds_of_silence_and_never_while_it_answers(
            rtt_ms in 1..400u64, min_pause_ms in 100..550u64, steps in prop::collection::vec((1..60u64, any::<bool>()), 1..200),
        ) {
            let rtt = Duration::from_millis(rtt_ms);
            let mut now = Instant::from_nanos(1_000_000_000);
            let mut liveness = Liveness::new(Duration::from_millis(min_pause_ms));
            liveness.on_pong(rtt);
            let mut pong_at = None;
            for (step, send) in steps {
                now += Duration::from_millis(step);
                if pong_at.take_if(|at| *at <= now).is_some() {
                    liveness.on_pong(rtt);
                }
                if send {
                    liveness.on_sent(now);
                }
                match liveness.check(now) {
                    Check::Fine => {}
                    Check::Ping => { pong_at.get_or_insert(now + rtt); }
                    Check::Dead => prop_assert!(false, "it answers"),
                }
            }
            // Silence.
            let since = now;
            liveness.on_sent(now);
            while liveness.check(now) != Check::Dead {
                now = now.max(liveness.deadline());
                prop_assert!(now.since(since) <= Duration::from_millis(2_500));
            }
        }
    }
}
