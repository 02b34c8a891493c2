//! Which of several ways to a peer is the better one.

use std::net::SocketAddr;
use std::time::Duration;

use warren_common::wire::probe::CandidateKind;

/// How much of its round-trip time the way in use is forgiven, so that two like ones don't alternate: a quarter and
/// [`HYSTERESIS`].
const HYSTERESIS: Duration = Duration::from_millis(3);
/// Round-trip times closer than this are the same, in milliseconds.
const BUCKET_MS: u64 = 2;
/// What a lost ping costs beyond half of the round-trip time: even on a short way a loss means a retransmission.
const LOSS_COST: Duration = Duration::from_millis(5);
/// Lost pings that may be chance.
const FORGIVEN: u32 = 1;

/// What became of the last pings on a way that had answered before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Losses {
    /// A bit for each of the last 16, the latest lowest; set if it was lost.
    lost: u16,
}

impl Losses {
    pub(super) const fn note(&mut self, lost: bool) {
        self.lost = self.lost << 1 | lost as u16;
    }

    const fn count(self) -> u32 {
        self.lost.count_ones().saturating_sub(FORGIVEN)
    }
}

/// A total order: the least is the best. Fields decide in the order they are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// Round-trip time and the price of losses in buckets, with the incumbent's bonus.
    cost: u64,
    /// The way in use wins a draw.
    newcomer: bool,
    /// An interface's own address before one that a NAT made.
    kind: CandidateKind,
    family: Family,
    /// So that there is never a draw.
    addr: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V6,
    V4,
}

impl Score {
    pub(super) fn new(
        addr: SocketAddr,
        kind: CandidateKind,
        rtt: Duration,
        losses: Losses,
        incumbent: bool,
    ) -> Self {
        let cost = rtt + losses.count() * (rtt / 2 + LOSS_COST);
        let cost = if incumbent { (cost * 3 / 4).saturating_sub(HYSTERESIS) } else { cost };
        Self {
            cost: u64::try_from(cost.as_millis()).unwrap_or(u64::MAX) / BUCKET_MS,
            newcomer: !incumbent,
            kind,
            family: if addr.is_ipv6() { Family::V6 } else { Family::V4 },
            addr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use CandidateKind::{Local, Reflexive};

    fn score(ms: u64, kind: CandidateKind, incumbent: bool) -> Score {
        lossy(ms, kind, incumbent, 0)
    }

    fn lossy(ms: u64, kind: CandidateKind, incumbent: bool, lost: u32) -> Score {
        let mut losses = Losses::default();
        (0..16).for_each(|n| losses.note(n < lost));
        let addr = SocketAddr::from(([192, 0, 2, 1], 1));
        Score::new(addr, kind, Duration::from_millis(ms), losses, incumbent)
    }

    #[test]
    fn a_way_that_loses_packets_gives_way_to_a_longer_one_that_does_not() {
        assert!(lossy(20, Local, true, 1) < score(25, Local, false), "one loss is chance");
        assert!(lossy(20, Local, true, 4) > score(40, Local, false));
        assert!(lossy(20, Local, true, 2) < score(30, Local, false), "and the one in use has a bonus");
        let mut losses = Losses { lost: u16::MAX };
        (0..16).for_each(|_| losses.note(false));
        assert_eq!(losses, Losses::default(), "sixteen good ones and all is forgotten");
    }

    #[test]
    fn nearer_wins_and_then_the_simpler() {
        assert!(score(10, Reflexive, false) < score(20, Local, false));
        assert!(score(10, Local, false) < score(11, Reflexive, false));
        let v6 = {
            let addr = "[2001:db8::1]:1".parse().unwrap();
            Score::new(addr, Local, Duration::from_millis(10), Losses::default(), false)
        };
        assert!(v6 < score(10, Local, false));
    }

    #[test]
    fn the_way_in_use_stays_unless_another_is_clearly_better() {
        assert!(score(20, Reflexive, true) < score(16, Local, false));
        assert!(score(8, Local, false) < score(20, Reflexive, true));
        assert!(score(1, Reflexive, true) < score(0, Local, false));
    }
}
