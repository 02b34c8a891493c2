//! Sets of devices as bits, by slot.

/// A set of slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeSet {
    words: Vec<u64>,
}

impl NodeSet {
    pub(crate) const fn new() -> Self {
        Self { words: Vec::new() }
    }

    pub(crate) fn has(&self, slot: usize) -> bool {
        self.words.get(slot / 64).is_some_and(|w| w & (1 << (slot % 64)) != 0)
    }

    /// True if the slot was not in the set.
    pub(crate) fn insert(&mut self, slot: usize) -> bool {
        if slot / 64 >= self.words.len() {
            self.words.resize(slot / 64 + 1, 0);
        }
        let bit = 1 << (slot % 64);
        let word = &mut self.words[slot / 64];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// True if the slot was in the set.
    pub(crate) fn remove(&mut self, slot: usize) -> bool {
        let had = self.has(slot);
        if had {
            self.words[slot / 64] &= !(1 << (slot % 64));
        }
        had
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    pub(crate) fn subtract(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                Some(i * 64 + bit)
            })
        })
    }
}

impl FromIterator<usize> for NodeSet {
    fn from_iter<I: IntoIterator<Item = usize>>(slots: I) -> Self {
        let mut set = Self::new();
        for slot in slots {
            set.insert(slot);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set() {
        let mut set: NodeSet = [1, 64, 500].into_iter().collect();
        assert!(set.has(64) && !set.has(63) && !set.has(100_000));
        assert!(!set.insert(64) && set.insert(65));
        assert!(set.remove(500) && !set.remove(500));
        let other: NodeSet = [700].into_iter().collect();
        set.extend(&other);
        assert_eq!(set.iter().collect::<Vec<_>>(), vec![1, 64, 65, 700]);
        set.subtract(&other);
        assert_eq!(set.iter().collect::<Vec<_>>(), vec![1, 64, 65]);
        assert!(NodeSet::new().is_empty() && !set.is_empty());
    }
}
