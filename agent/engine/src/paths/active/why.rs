//! What keeps a peer from being reached directly, as far as it can be told from here.

use super::Active;
use crate::event::Path;
use crate::paths::Shared;

/// Rounds after which silence means something: by then everybody's NAT had several chances.
const ROUNDS: usize = 4;

/// Why there is no direct path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// Nobody needs one.
    Idle,
    /// The peer has not said where it is.
    NoAddresses,
    /// All that it has said is of a family (IPv4, IPv6) that we don't have.
    OtherFamily,
    /// It is being looked for.
    Looking,
    /// Nothing comes back from any of its addresses.
    Silence {
        /// How many there are.
        addresses: usize,
    },
}

impl Active {
    /// `None` while the path is direct.
    pub(in crate::paths) fn obstacle(&self, shared: &Shared) -> Option<Obstacle> {
        if matches!(self.path(None, shared).0, Path::Direct { .. }) {
            return None;
        }
        let mut addresses: Vec<_> = self.remotes.iter().map(|remote| remote.way.remote).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Some(match addresses.len() {
            0 if self.listed => Obstacle::OtherFamily,
            0 => Obstacle::NoAddresses,
            _ if self.round < ROUNDS => Obstacle::Looking,
            addresses => Obstacle::Silence { addresses },
        })
    }
}
