//! A rate limit in one number: the generic cell rate algorithm.

use std::time::Duration;

use warren_common::time::Instant;

/// When the budget would be used up if nothing more came; in the past: all of it is there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gcra {
    empty_until: Instant,
}

impl Gcra {
    /// Takes `cost` if the budget, which refills with time and holds at most `burst`, has it.
    pub(crate) fn allow(&mut self, now: Instant, cost: Duration, burst: Duration) -> bool {
        let allowed = self.would_allow(now, cost, burst);
        if allowed {
            self.empty_until = self.empty_until.max(now) + cost;
        }
        allowed
    }

    /// What [`allow`](Self::allow) would say; takes nothing.
    pub(crate) fn would_allow(&self, now: Instant, cost: Duration, burst: Duration) -> bool {
        (self.empty_until.max(now) + cost).since(now) <= burst
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let (mut limit, cost, burst) =
            (Gcra::default(), Duration::from_millis(10), Duration::from_millis(100));
        let mut now = Instant::from_nanos(1_000_000_000);
        assert_eq!((0..50).filter(|_| limit.allow(now, cost, burst)).count(), 10);
        let mut allowed = 0;
        for _ in 0..1_000 {
            now += Duration::from_millis(1);
            allowed += usize::from(limit.allow(now, cost, burst));
        }
        assert_eq!(allowed, 100);
        assert!(
            !limit.allow(now + Duration::from_secs(1), burst + cost, burst),
            "more than the budget holds"
        );
    }
}
