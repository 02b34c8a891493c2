//! How many handshakes we answer: a device-wide bucket for anyone, and for those who proved their address under load a
//! bucket each and a second device-wide one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use warren_common::ids::DeviceId;
use warren_common::time::Instant;

use crate::io::Source;

/// Initiations answered without a cookie, per second: at about 0.25 ms each, 2.5 % of one core.
pub const FREE_HANDSHAKES_PER_SECOND: u32 = 100;
/// Initiations answered without a cookie in one burst: a site's devices coming back after a power cut.
pub const MAX_FREE_BURST: u32 = 64;
/// Initiations answered per second from all sources that returned a cookie: the ceiling, an eighth of one core.
pub const PROVED_HANDSHAKES_PER_SECOND: u32 = 500;
/// Initiations answered in one burst from all sources that returned a cookie.
pub const MAX_PROVED_BURST: u32 = 100;
/// Initiations answered per second from one source that returned a cookie.
pub const SOURCE_HANDSHAKES_PER_SECOND: u32 = 20;
/// Initiations answered in one burst from one source that returned a cookie.
pub const MAX_SOURCE_BURST: u32 = 5;
/// Sources remembered at once: each had to receive a cookie first; more are refused until one is quiet (40 B each).
pub const MAX_SOURCES: usize = 4096;

/// What to do with an initiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Process,
    AskForCookie,
    Refuse,
}

pub(super) struct Limiter {
    free: Bucket,
    proved: Bucket,
    sources: BTreeMap<SourceKey, Bucket>,
    swept: Instant,
}

impl Limiter {
    pub(super) const fn new() -> Self {
        Self { free: Bucket::FULL, proved: Bucket::FULL, sources: BTreeMap::new(), swept: Instant::ZERO }
    }

    /// Decides about one initiation; `proved` tells if it carries a valid MAC2 and is asked only under load.
    pub(super) fn admit(&mut self, now: Instant, source: Source, proved: impl FnOnce() -> bool) -> Verdict {
        if self.free.take(now, FREE_HANDSHAKES_PER_SECOND, MAX_FREE_BURST) {
            return Verdict::Process;
        }
        if !proved() {
            return Verdict::AskForCookie;
        }
        if !self.take_for(now, source)
            || !self.proved.take(now, PROVED_HANDSHAKES_PER_SECOND, MAX_PROVED_BURST)
        {
            return Verdict::Refuse;
        }
        Verdict::Process
    }

    fn take_for(&mut self, now: Instant, source: Source) -> bool {
        let key = SourceKey::from(source);
        if !self.sources.contains_key(&key) && self.sources.len() >= MAX_SOURCES {
            // A full bucket says nothing, so it may go; looking for one is worth at most one pass a second.
            if now.since(self.swept) < Duration::from_secs(1) {
                return false;
            }
            self.swept = now;
            self.sources.retain(|_, bucket| !bucket.is_full(now));
            if self.sources.len() >= MAX_SOURCES {
                return false;
            }
        }
        self.sources.entry(key).or_insert(Bucket::FULL).take(
            now,
            SOURCE_HANDSHAKES_PER_SECOND,
            MAX_SOURCE_BURST,
        )
    }
}

/// Who shares a bucket: an IPv4 address, an IPv6 /64 (what one customer gets), or a device that a relay vouches for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum SourceKey {
    V4([u8; 4]),
    V6([u8; 8]),
    Device(DeviceId),
}

impl From<Source> for SourceKey {
    fn from(source: Source) -> Self {
        match source {
            Source::Direct { socket: _, remote } => match remote.ip().to_canonical() {
                IpAddr::V4(ip) => Self::V4(ip.octets()),
                IpAddr::V6(ip) => {
                    let [a, b, c, d, e, f, g, h, ..] = ip.octets();
                    Self::V6([a, b, c, d, e, f, g, h])
                }
            },
            Source::Relay { relay: _, device } | Source::Signal { device } => Self::Device(device),
        }
    }
}

/// A token bucket kept as one instant: when it will be full again.
struct Bucket {
    full_at: Instant,
}

impl Bucket {
    const FULL: Self = Self { full_at: Instant::ZERO };

    fn take(&mut self, now: Instant, per_second: u32, burst: u32) -> bool {
        let interval = Duration::from_secs(1) / per_second;
        let full_at = self.full_at.max(now) + interval;
        if full_at.since(now) > interval * burst {
            return false;
        }
        self.full_at = full_at;
        true
    }

    fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn source(n: u32) -> Source {
        Source::Direct { socket: 0, remote: (Ipv4Addr::from(n), 1).into() }
    }

    #[test]
    fn free_burst_then_cookies_then_a_bound_per_source() {
        let mut limiter = Limiter::new();
        let now = Instant::ZERO + Duration::from_secs(9);
        for n in 0..MAX_FREE_BURST {
            assert_eq!(limiter.admit(now, source(n), || false), Verdict::Process);
        }
        assert_eq!(limiter.admit(now, source(1), || false), Verdict::AskForCookie);
        for _ in 0..MAX_SOURCE_BURST {
            assert_eq!(limiter.admit(now, source(1), || true), Verdict::Process);
        }
        assert_eq!(limiter.admit(now, source(1), || true), Verdict::Refuse);
        assert_eq!(limiter.admit(now, source(2), || true), Verdict::Process);
        let later = now + Duration::from_secs(1);
        assert_eq!(limiter.admit(later, source(1), || false), Verdict::Process);
    }

    #[test]
    fn all_proved_sources_together_are_bounded() {
        let mut limiter = Limiter::new();
        let now = Instant::ZERO;
        let admitted =
            (0..1000).filter(|n| limiter.admit(now, source(*n), || true) == Verdict::Process).count();
        assert_eq!(admitted as u32, MAX_FREE_BURST + MAX_PROVED_BURST);
    }

    #[test]
    fn the_source_table_is_bounded_and_forgets_the_quiet() {
        let mut limiter = Limiter::new();
        let mut now = Instant::ZERO + Duration::from_secs(5);
        for n in 0..MAX_SOURCES as u32 + 10 {
            limiter.take_for(now, source(n));
        }
        assert_eq!(limiter.sources.len(), MAX_SOURCES);
        assert!(!limiter.take_for(now, source(u32::MAX)));
        now += Duration::from_secs(2);
        assert!(limiter.take_for(now, source(u32::MAX)));
        assert_eq!(limiter.sources.len(), 1);
    }

    #[test]
    fn v6_sources_share_a_bucket_by_their_64_bit_prefix() {
        let key = |text: &str| SourceKey::from(Source::Direct { socket: 0, remote: text.parse().unwrap() });
        assert!(key("[2001:db8:1:2::1]:1") == key("[2001:db8:1:2:ffff::]:9"));
        assert!(key("[2001:db8:1:2::1]:1") != key("[2001:db8:1:3::1]:1"));
        assert!(key("[::ffff:192.0.2.1]:1") == key("192.0.2.1:5"));
    }
}
