//! Which of several ways to a peer is the better one.

use std::net::SocketAddr;
use std::time::Duration;

use warren_common::wire::probe::CandidateKind;

/// How much of its round-trip time the way in use is forgiven, so that two like ones don't alternate: a quarter and
/// [`HYSTERESIS`].
const HYSTERESIS: Duration = Duration::from_millis(3);
/// Round-trip times closer than this are the same, in milliseconds.
const BUCKET_MS: u64 = 2;

/// A total order: the least is the best. Fields decide in the order they are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// Round-trip time in buckets, with the incumbent's bonus.
    rtt: u64,
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
    pub(super) fn new(addr: SocketAddr, kind: CandidateKind, rtt: Duration, incumbent: bool) -> Self {
        let rtt = if incumbent { (rtt * 3 / 4).saturating_sub(HYSTERESIS) } else { rtt };
        Self {
            rtt: u64::try_from(rtt.as_millis()).unwrap_or(u64::MAX) / BUCKET_MS,
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
        Score::new(SocketAddr::from(([192, 0, 2, 1], 1)), kind, Duration::from_millis(ms), incumbent)
    }

    #[test]
    fn nearer_wins_and_then_the_simpler() {
        assert!(score(10, Reflexive, false) < score(20, Local, false));
        assert!(score(10, Local, false) < score(11, Reflexive, false));
        let v6 = Score::new("[2001:db8::1]:1".parse().unwrap(), Local, Duration::from_millis(10), false);
        assert!(v6 < score(10, Local, false));
    }

    #[test]
    fn the_way_in_use_stays_unless_another_is_clearly_better() {
        assert!(score(20, Reflexive, true) < score(16, Local, false));
        assert!(score(8, Local, false) < score(20, Reflexive, true));
        assert!(score(1, Reflexive, true) < score(0, Local, false));
    }
}
