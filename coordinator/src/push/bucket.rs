//! A token bucket: how often something may happen.

use std::time::Duration;

use warren_common::time::Instant;

/// Lets `burst` things happen at once, then one per `interval`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    interval: Duration,
    burst: u32,
    /// When the bucket is full again; each use moves it by one interval.
    full_at: Instant,
}

impl Bucket {
    pub(super) const fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, burst, full_at: Instant::ZERO }
    }

    /// True if it may happen now; counts it.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let next = self.full_at.max(now) + self.interval;
        let allowed = next.since(now) <= self.interval * self.burst;
        if allowed {
            self.full_at = next;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = Bucket::new(Duration::from_millis(100), 3);
        let at = |ms| Instant::ZERO + Duration::from_millis(ms);
        assert_eq!([0, 0, 0, 0].map(|t| bucket.take(at(t))), [true, true, true, false]);
        assert!(bucket.take(at(100)));
        assert!(!bucket.take(at(150)));
        assert_eq!([9_000; 4].map(|t| bucket.take(at(t))), [true, true, true, false]);
    }
}
