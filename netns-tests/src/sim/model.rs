//! The reference model: who may reach whom, and since when no longer. Knows nothing of how the product does it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use warren_common::time::Instant;

/// Names a simulated device for good; a removed one's number is not used again.
pub type DeviceNo = usize;

/// From a change at the coordinator to the last packet, when an end of the pair is connected (promise 4).
pub const REVOCATION_BOUND: Duration = Duration::from_secs(1);

/// When a permission that was taken back must have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// At this time.
    At(Instant),
    /// No end of the pair has heard of it yet; the bound is its lease.
    WhenHeard,
}

/// The rules as they should be.
#[derive(Debug, Default)]
pub struct Model {
    edges: BTreeSet<(DeviceNo, DeviceNo)>,
    ended: BTreeMap<(DeviceNo, DeviceNo), Ends>,
}

impl Model {
    /// The pairs that are allowed now, from and to.
    pub const fn edges(&self) -> &BTreeSet<(DeviceNo, DeviceNo)> {
        &self.edges
    }

    /// Allows `from` to reach `to`.
    pub fn allow(&mut self, from: DeviceNo, to: DeviceNo) {
        self.edges.insert((from, to));
        self.ended.remove(&(from, to));
    }

    /// Takes the permission back at `now`. `connected` says whether either end has a session with the coordinator.
    pub fn deny(&mut self, now: Instant, from: DeviceNo, to: DeviceNo, connected: bool) {
        if self.edges.remove(&(from, to)) {
            let ends = if connected { Ends::At(now + REVOCATION_BOUND) } else { Ends::WhenHeard };
            self.ended.insert((from, to), ends);
        }
    }

    /// `device` got a netmap at `now`: it has heard of all that was taken back.
    pub fn heard(&mut self, now: Instant, device: DeviceNo) {
        for ((from, to), ends) in &mut self.ended {
            if (*from == device || *to == device) && *ends == Ends::WhenHeard {
                *ends = Ends::At(now + REVOCATION_BOUND);
            }
        }
    }

    /// True if a packet that `from` opened may be delivered to `to` at `now`, or one that answers it.
    pub fn may_pass(&self, now: Instant, from: DeviceNo, to: DeviceNo) -> bool {
        self.edges.contains(&(from, to))
            || match self.ended.get(&(from, to)) {
                Some(Ends::At(end)) => now <= *end,
                Some(Ends::WhenHeard) => true,
                None => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_ends_after_the_bound_or_when_somebody_hears() {
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        let mut model = Model::default();
        assert!(!model.may_pass(at(0), 1, 2));
        model.allow(1, 2);
        assert!(model.may_pass(at(0), 1, 2) && !model.may_pass(at(0), 2, 1));
        model.deny(at(10), 1, 2, true);
        assert!(model.may_pass(at(11), 1, 2) && !model.may_pass(at(12), 1, 2));
        model.allow(1, 2);
        model.deny(at(20), 1, 2, false);
        assert!(model.may_pass(at(500), 1, 2));
        model.heard(at(500), 2);
        assert!(!model.may_pass(at(502), 1, 2));
    }
}
