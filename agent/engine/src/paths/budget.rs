//! How often something may be done.

use std::time::Duration;

use warren_common::time::Instant;

/// At most so many in a window that starts with the first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rate {
    since: Instant,
    used: u32,
}

impl Rate {
    pub(crate) fn take(&mut self, now: Instant, window: Duration, max: u32) -> bool {
        if now.since(self.since) >= window {
            *self = Self { since: now, used: 0 };
        }
        let free = self.used < max;
        self.used += u32::from(free);
        free
    }

    /// When the next window begins.
    pub(super) fn next(&self, window: Duration) -> Instant {
        self.since + window
    }
}

/// At most so many at once, and as many in each minute after that, one by one: who has spent it all has another one a
/// moment later. With a [`Rate`] a peer that moves when it is spent would not be looked for until the minute is over.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Budget {
    /// When it will be whole again.
    whole_at: Instant,
}

impl Budget {
    const MINUTE: Duration = Duration::from_secs(60);

    pub(crate) fn take(&mut self, now: Instant, per_minute: u32) -> bool {
        let whole_at = self.after_one_more(now, per_minute);
        let free = whole_at.since(now) <= Self::MINUTE;
        if free {
            self.whole_at = whole_at;
        }
        free
    }

    /// When there is one to take.
    pub(super) fn next(&self, now: Instant, per_minute: u32) -> Instant {
        now + self.after_one_more(now, per_minute).since(now).saturating_sub(Self::MINUTE)
    }

    fn after_one_more(&self, now: Instant, per_minute: u32) -> Instant {
        self.whole_at.max(now) + Self::MINUTE / per_minute
    }
}
