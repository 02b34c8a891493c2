//! Connections that have not shown yet whether they are a device's: bounded, and strangers can't keep others out.
//!
//! Whoever opens connections and says nothing on them would hold all places until they time out. So when there are too
//! many, one more ends another of the source that has the most: its oldest, or, while none has had its fair time, its
//! newest. Only if that source is the newcomer's own, the newcomer is the one that goes: a relay that restarted sees whole
//! offices come back at once from one address, and handshakes that were begun should end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use warren_common::time::Instant;

/// How long a handshake is left alone, however many want its place: several round trips around the earth.
const FAIR_TIME: Duration = Duration::from_secs(1);

/// The handshakes of one transport.
#[derive(Debug)]
pub(super) struct Handshakes {
    most: usize,
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    next: u64,
    /// By age.
    all: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    source: IpAddr,
    since: Instant,
    evicted: CancellationToken,
}

impl Handshakes {
    /// None are running, and never more than `most` will.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, running: Mutex::default() })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.lock().all.len()
    }

    /// One more begins, and another may have to go for it. `None`: this one has to.
    pub(super) fn begin(self: &Arc<Self>, from: IpAddr, now: Instant) -> Option<Handshake> {
        let source = network_of(from);
        let mut running = self.lock();
        if running.all.len() >= self.most {
            let victim = running.victim(source, now)?;
            if let Some(entry) = running.all.remove(&victim) {
                entry.evicted.cancel();
            }
        }
        let id = running.next;
        running.next += 1;
        let evicted = CancellationToken::new();
        running.all.insert(id, Entry { source, since: now, evicted: evicted.clone() });
        drop(running);
        Some(Handshake { of: self.clone(), id, evicted })
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// Who has to go for somebody from `newcomer`.
    fn victim(&self, newcomer: IpAddr, now: Instant) -> Option<u64> {
        let mut counts = BTreeMap::<IpAddr, usize>::new();
        for entry in self.all.values() {
            *counts.entry(entry.source).or_default() += 1;
        }
        let most = counts.values().copied().max()?;
        let greedy = |entry: &Entry| counts.get(&entry.source) == Some(&most);
        let (oldest, entry) = self.all.iter().find(|(_, entry)| greedy(entry))?;
        if now.since(entry.since) >= FAIR_TIME {
            return Some(*oldest);
        }
        // Nobody gains by ending one that is as likely as the newcomer to be a device.
        if counts.get(&newcomer).copied().unwrap_or(0) + 1 >= most {
            return None;
        }
        self.all.iter().rev().find(|(_, entry)| greedy(entry)).map(|(newest, _)| *newest)
    }
}

/// One handshake; over when dropped.
#[derive(Debug)]
pub(super) struct Handshake {
    of: Arc<Handshakes>,
    id: u64,
    evicted: CancellationToken,
}

impl Handshake {
    /// Returns when another one has got its place.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.of.lock().all.remove(&self.id);
    }
}

/// What one customer of an access provider has at least: an IPv4 address, or 64 bits of IPv6.
pub(super) fn network_of(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLY: Instant = Instant::ZERO;

    fn ip(n: u8) -> IpAddr {
        [192, 0, 2, n].into()
    }

    fn fill(handshakes: &Arc<Handshakes>, sources: &[u8]) -> Vec<Handshake> {
        sources.iter().map(|n| handshakes.begin(ip(*n), EARLY).unwrap()).collect()
    }

    fn gone(held: &[Handshake]) -> Vec<usize> {
        (0..held.len()).filter(|at| held[*at].evicted.is_cancelled()).collect()
    }

    #[test]
    fn one_that_is_over_makes_room() {
        let handshakes = Handshakes::new(2);
        let mut held = fill(&handshakes, &[1, 1]);
        assert!(handshakes.begin(ip(1), EARLY).is_none());
        held.pop();
        assert!(handshakes.begin(ip(1), EARLY).is_some());
        assert!(gone(&held).is_empty());
        drop(held);
        assert_eq!(handshakes.count(), 0);
    }

    #[test]
    fn who_is_silent_for_long_goes_for_anybody() {
        let handshakes = Handshakes::new(3);
        let held = fill(&handshakes, &[2, 1, 1]);
        let _more = handshakes.begin(ip(1), EARLY + FAIR_TIME).unwrap();
        assert_eq!(gone(&held), [1]);
        assert_eq!(handshakes.count(), 3);
    }

    #[test]
    fn a_flood_from_one_place_keeps_no_other_place_out() {
        let handshakes = Handshakes::new(4);
        let held = fill(&handshakes, &[1, 1, 1, 1]);
        let first = handshakes.begin(ip(2), EARLY).unwrap();
        assert_eq!(gone(&held), [3]);
        assert!(handshakes.begin(ip(1), EARLY).is_none(), "it has the most");
        let second = handshakes.begin(ip(2), EARLY).unwrap();
        assert_eq!(gone(&held), [2, 3]);
        assert!(handshakes.begin(ip(2), EARLY).is_none(), "two and two: no place has more");
        assert!(gone(&[first, second]).is_empty());
    }

    #[test]
    fn an_ipv6_host_has_one_place_whatever_address_it_takes() {
        let handshakes = Handshakes::new(3);
        let v6 = |text: &str| text.parse::<IpAddr>().unwrap();
        let held: Vec<_> = ["2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"]
            .map(|a| handshakes.begin(v6(a), EARLY).unwrap())
            .into();
        let _more = handshakes.begin(v6("::ffff:192.0.2.9"), EARLY + FAIR_TIME).unwrap();
        assert_eq!(gone(&held), [0]);
        assert_eq!(network_of(v6("::ffff:192.0.2.9")), ip(9));
    }
}
