//! What is worth keeping of paths across a restart: where peers in use were reached. It grants nothing; an address only
//! counts once a probe over it was answered, as any other.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use warren_common::ids::DeviceId;
use warren_common::time::Instant;

use super::active::Use;
use super::{Paths, PeerIdx};

/// Peers that are kept, those used last: what a busy device talks with at a time. Each costs a handshake and a round of
/// probes at the start.
pub const MAX_HINTS: usize = 512;
/// Addresses that are kept of each, the best first.
pub const MAX_HINT_ENDPOINTS: usize = 8;

/// Where a peer in use was reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathHint {
    /// The peer.
    pub device: DeviceId,
    /// Its addresses: the one in use, then others that answered, then what else is known.
    pub endpoints: Vec<SocketAddr>,
}

impl Paths {
    /// Peers in use, the latest first.
    pub(crate) fn hints(&self) -> Vec<PathHint> {
        let entry = |idx: &PeerIdx| self.peers.get(*idx as usize)?.as_ref();
        let mut used: Vec<_> = self
            .active
            .iter()
            .filter_map(entry)
            .filter_map(|e| Some((e.device, e.active.as_ref()?)))
            .collect();
        used.sort_by_key(|(device, active)| (std::cmp::Reverse(active.last_used()), *device));
        used.truncate(MAX_HINTS);
        used.into_iter().map(|(device, active)| PathHint { device, endpoints: active.endpoints() }).collect()
    }

    /// Looks for a way to a peer that was in use before a restart, first of all where it was reached then.
    pub(crate) fn resume(&mut self, now: Instant, idx: PeerIdx, endpoints: &[SocketAddr]) {
        self.touch(now, idx, Use::Data);
        self.with_active(now, idx, |active, _, shared| {
            active.relearn(now, endpoints.iter().take(MAX_HINT_ENDPOINTS), shared);
        });
    }
}
