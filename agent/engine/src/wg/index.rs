//! Receiver indices: which peer a message is for. Random, so that they can't be guessed off the path and say nothing
//! about how many peers there are; the top byte is the shard, so that any thread can pass a datagram on.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use rand_core::RngCore;

const SHARD_SHIFT: u32 = 24;
const RANDOM_MASK: u32 = (1 << SHARD_SHIFT) - 1;

/// Live indices and the slot of the peer that each belongs to.
pub(super) struct IndexTable {
    shard: u8,
    slots: HashMap<u32, u32, BuildHasherDefault<Spread>>,
}

impl IndexTable {
    pub(super) fn new(shard: u8) -> Self {
        Self { shard, slots: HashMap::default() }
    }

    /// A fresh index for the peer in `slot`: never one that is live.
    ///
    /// A peer holds at most five, so that even with [`MAX_PEERS`](super::MAX_PEERS) 98 % are free and the search is short.
    pub(super) fn insert(&mut self, slot: u32, rng: &mut impl RngCore) -> u32 {
        loop {
            let index = u32::from(self.shard) << SHARD_SHIFT | rng.next_u32() & RANDOM_MASK;
            if let Entry::Vacant(place) = self.slots.entry(index) {
                place.insert(slot);
                return index;
            }
        }
    }

    pub(super) fn get(&self, index: u32) -> Option<u32> {
        self.slots.get(&index).copied()
    }

    pub(super) fn remove(&mut self, index: u32) {
        self.slots.remove(&index);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }
}

/// The shard an index belongs to.
pub(super) const fn shard_of(index: u32) -> u8 {
    (index >> SHARD_SHIFT) as u8
}

/// Indices are random and ours, so nobody can aim at a bucket: one multiplication spreads them enough.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0 ^ u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;
    use std::collections::BTreeSet;

    #[test]
    fn indices_carry_the_shard_and_are_unique_while_live() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut table = IndexTable::new(0xa5);
        let mut seen = BTreeSet::new();
        for slot in 0..20_000 {
            let index = table.insert(slot, &mut rng);
            assert_eq!(shard_of(index), 0xa5);
            assert!(seen.insert(index));
            assert_eq!(table.get(index), Some(slot));
        }
        for index in seen {
            table.remove(index);
            assert_eq!(table.get(index), None);
        }
        assert_eq!(table.len(), 0);
    }
}
