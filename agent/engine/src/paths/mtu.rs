//! How long packets may be on a direct way (datagram packetization layer path MTU discovery, RFC 8899).
//!
//! A way is believed to carry packets of the TUN's length, and at once asked by a padded ping that must not be fragmented.
//! If none of three is answered while the way is alive, all lengths that an Ethernet carries are asked at the same time, and
//! the longest one that is answered holds. If not even the shortest is, the peer doesn't know padded pings. Nothing depends on ICMP from routers. Until it is known, longer packets travel in fragments, as far as
//! the network lets them: what is found out here keeps them from it.
//!
//! Lengths are those of packets in the tunnel; a ping of a length is as long as the sealed packet would be.

use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::time::Instant;
use warren_common::wire::probe::MAX_PADDED_LEN;

use crate::wg::DATA_OVERHEAD;

/// What every way carries: IPv6's smallest link (RFC 8200) less the headers of IPv6, UDP and WireGuard, in bytes.
pub const MIN_PATH_MTU: usize = 1_200;
/// The longest packet that a ping can stand for, in bytes.
pub const MAX_PATH_MTU: usize = MAX_PADDED_LEN - DATA_OVERHEAD;
/// Lengths asked at once at most: each one in steps of WireGuard's padding, and the TUN's. 21 KB, and once more the TUN's MTU.
pub const MAX_LENGTHS: usize = (ETHERNET_PATH_MTU - MIN_PATH_MTU) / STEP + 2;
/// How long what was found is believed: a route may have become wider (RFC 8899's `PMTU_RAISE_TIMER`).
pub const MTU_FRESH: Duration = Duration::from_secs(600);
/// Padded pings per peer and minute: a search of each kind, and its repetition.
pub const MAX_LONG_PROBES_PER_MINUTE: u32 = 64;

/// The longest packet that an Ethernet without jumbo frames carries, over IPv4, in bytes. Between it and a TUN's that is
/// longer nothing is looked for: links are either this or that.
const ETHERNET_PATH_MTU: usize = 1_440;
/// WireGuard pads to multiples of this.
const STEP: usize = 16;
/// Pings of one length before it counts as too long (RFC 8899's `MAX_PROBES`).
const TRIES: u8 = 3;
/// Least time between two looks because of a suspicion.
const SUSPECT_AGAIN: Duration = Duration::from_secs(10);

/// What is known of one way. See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PathMtu {
    most: usize,
    usable: usize,
    /// The peer answers padded pings at all.
    answers: bool,
    phase: Phase,
    due: Instant,
    suspected: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Does the length in use pass?
    Verify {
        tries: u8,
    },
    /// Which of the longer ones does?
    Search {
        tries: u8,
    },
    Rest,
}

impl PathMtu {
    /// A new way, for packets of at most `most` bytes.
    pub(super) fn new(now: Instant, most: usize) -> Self {
        let most = most.clamp(MIN_PATH_MTU, MAX_PATH_MTU);
        Self {
            most,
            usable: most,
            answers: false,
            phase: Phase::Verify { tries: 0 },
            due: now,
            suspected: None,
        }
    }

    /// The longest packet for the way, in bytes.
    pub(super) const fn usable(&self) -> usize {
        self.usable
    }

    pub(super) const fn due(&self) -> Instant {
        self.due
    }

    /// Long packets may have stopped passing.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.phase == Phase::Rest && self.suspected.is_none_or(|at| now.since(at) >= SUSPECT_AGAIN) {
            self.suspected = Some(now);
            (self.phase, self.due) = (Phase::Verify { tries: 0 }, now);
        }
    }

    /// The lengths to ask for now. `patience` is how long an answer may take.
    pub(super) fn poll(&mut self, now: Instant, patience: Duration) -> ArrayVec<usize, MAX_LENGTHS> {
        let mut lengths = ArrayVec::new();
        if now < self.due {
            return lengths;
        }
        if self.phase == Phase::Rest {
            self.phase = Phase::Verify { tries: 0 };
        }
        if self.phase == (Phase::Verify { tries: TRIES }) {
            (self.usable, self.answers) = (MIN_PATH_MTU, false);
            self.phase = Phase::Search { tries: 0 };
        }
        self.due = now + patience;
        match &mut self.phase {
            Phase::Verify { tries } => {
                *tries += 1;
                lengths.push(self.usable);
            }
            // A second round for what was lost by chance; a third if nothing passed at all.
            Phase::Search { tries } if *tries < 2 || *tries < TRIES && !self.answers => {
                *tries += 1;
                let first = if self.answers { (self.usable / STEP + 1) * STEP } else { MIN_PATH_MTU };
                lengths.extend((first..self.most.min(ETHERNET_PATH_MTU + 1)).step_by(STEP));
                lengths.push(self.most);
            }
            Phase::Search { .. } | Phase::Rest => {
                if !self.answers {
                    self.usable = self.most; // nothing can be found out: fragments must do
                }
                self.rest(now);
            }
        }
        lengths
    }

    /// A ping for that length was answered.
    pub(super) fn on_answer(&mut self, now: Instant, length: usize) {
        let length = length.min(self.most);
        self.answers = true;
        match self.phase {
            Phase::Verify { .. } if length < self.usable => return,
            Phase::Verify { .. } if length < self.most => {
                (self.phase, self.due) = (Phase::Search { tries: 0 }, now);
            }
            _ if length == self.most => self.rest(now),
            _ => {}
        }
        self.usable = self.usable.max(length);
    }

    fn rest(&mut self, now: Instant) {
        (self.phase, self.due) = (Phase::Rest, now + MTU_FRESH);
    }
}

/// How long a sealed packet of that length is.
pub(super) fn sealed_len(length: usize) -> usize {
    length + DATA_OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(350);

    /// Lets the search run over a way that carries `carries`. Returns pings and the time it took.
    fn play(mtu: &mut PathMtu, now: &mut Instant, carries: usize, mut lost: impl FnMut() -> bool) -> usize {
        let mut pings = 0;
        while mtu.phase != Phase::Rest {
            *now = (*now).max(mtu.due());
            let lengths = mtu.poll(*now, PATIENCE);
            pings += lengths.len();
            for length in lengths {
                if length <= carries && !lost() {
                    mtu.on_answer(*now + Duration::from_millis(40), length);
                }
            }
        }
        pings
    }

    #[test]
    fn what_passes_is_found_and_nothing_longer_is_used() {
        for most in [1_420, 1_413, MIN_PATH_MTU, 9_000, 0] {
            for carries in [1_100, 1_200, 1_216, 1_220, 1_340, 1_412, 1_420, 2_000, 8_999, 9_000] {
                let (mut mtu, mut now) = (PathMtu::new(Instant::ZERO, most), Instant::ZERO);
                let pings = play(&mut mtu, &mut now, carries, || false);
                let top = most.clamp(MIN_PATH_MTU, MAX_PATH_MTU);
                let best = if carries >= top { top } else { carries.min(ETHERNET_PATH_MTU) / STEP * STEP };
                let best = if carries < MIN_PATH_MTU { top } else { best }; // as if the peer didn't know such pings
                assert_eq!(mtu.usable(), best, "{most} {carries}");
                assert!(pings <= MAX_LONG_PROBES_PER_MINUTE as usize, "{pings}");
                assert!(now.since(Instant::ZERO) <= 6 * PATIENCE + Duration::from_millis(40));
            }
        }
    }

    #[test]
    fn a_way_that_shrinks_or_grows_is_noticed() {
        let (mut mtu, mut now) = (PathMtu::new(Instant::ZERO, 1_420), Instant::ZERO);
        play(&mut mtu, &mut now, 1_420, || false);
        mtu.suspect(now);
        assert_eq!(play(&mut mtu, &mut now, 1_420, || false), 1, "a false alarm costs one ping");
        mtu.suspect(now);
        assert_eq!(mtu.phase, Phase::Rest, "and they are rare");
        now += SUSPECT_AGAIN;
        mtu.suspect(now);
        play(&mut mtu, &mut now, 1_216, || false);
        assert_eq!(mtu.usable(), 1_216);
        now += MTU_FRESH;
        mtu.poll(now, PATIENCE);
        assert_ne!(mtu.phase, Phase::Rest);
        mtu.on_answer(now, 1_216);
        play(&mut mtu, &mut now, 1_420, || false);
        assert_eq!(mtu.usable(), 1_420);
    }

    #[test]
    fn losses_by_chance_do_not_shrink_a_way() {
        let mut n = 0;
        let mut every_other = || {
            n += 1;
            n % 2 == 1
        };
        let (mut mtu, mut now) = (PathMtu::new(Instant::ZERO, 1_420), Instant::ZERO);
        play(&mut mtu, &mut now, 1_420, &mut every_other);
        assert_eq!(mtu.usable(), 1_420);
    }

    #[test]
    fn lengths_are_bounded() {
        let mut mtu = PathMtu::new(Instant::ZERO, usize::MAX);
        (mtu.phase, mtu.usable) = (Phase::Search { tries: 0 }, MIN_PATH_MTU);
        assert!(mtu.poll(Instant::ZERO, PATIENCE).len() <= MAX_LENGTHS);
    }
}
