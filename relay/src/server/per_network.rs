//! A rate limit for each network, in bounded memory.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hash};

use crate::core::Gcra;

/// Networks that are told apart: those that fall together share one limit.
const NETWORKS: usize = 4_096;

/// The limits.
pub(super) struct PerNetwork {
    limits: Box<[Gcra]>,
    /// Nobody outside can tell which networks fall together.
    hasher: RandomState,
}

impl Default for PerNetwork {
    fn default() -> Self {
        Self { limits: (0..NETWORKS).map(|_| Gcra::default()).collect(), hasher: RandomState::new() }
    }
}

impl std::fmt::Debug for PerNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PerNetwork")
    }
}

impl PerNetwork {
    /// The limit of one network, whatever its user takes for one.
    pub(super) fn of(&mut self, network: impl Hash) -> &mut Gcra {
        let at = self.hasher.hash_one(network) % NETWORKS as u64;
        &mut self.limits[at as usize] // below the length by the line before
    }
}
