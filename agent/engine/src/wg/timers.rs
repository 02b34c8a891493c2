//! When each peer next wants attention: a binary heap that knows where each peer is, so that nothing is stale.

use warren_common::time::Instant;

use super::WakeReason;

const ABSENT: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    at: Instant,
    slot: u32,
    reason: WakeReason,
}

/// At most one deadline per peer slot, earliest first, ties by slot.
#[derive(Default)]
pub(super) struct Timers {
    heap: Vec<Entry>,
    /// Where a slot's entry is in `heap`. As long as the highest slot that ever had a deadline.
    position: Vec<u32>,
}

impl Timers {
    /// The earliest deadline and whose it is.
    pub(super) fn first(&self) -> Option<(u32, Instant, WakeReason)> {
        self.heap.first().map(|e| (e.slot, e.at, e.reason))
    }

    /// The deadline of `slot`.
    pub(super) fn get(&self, slot: u32) -> Option<Instant> {
        self.index(slot).map(|index| self.heap[index].at)
    }

    /// Replaces the deadline of `slot`.
    pub(super) fn set(&mut self, slot: u32, deadline: Option<(Instant, WakeReason)>) {
        match (self.index(slot), deadline) {
            (None, None) => {}
            (None, Some((at, reason))) => {
                if self.position.len() <= slot as usize {
                    self.position.resize(slot as usize + 1, ABSENT);
                }
                self.heap.push(Entry { at, slot, reason });
                self.sift_up(self.heap.len() - 1);
            }
            (Some(index), Some((at, reason))) => {
                self.heap[index] = Entry { at, slot, reason };
                self.sift_up(index);
                self.sift_down(index);
            }
            (Some(index), None) => {
                self.heap.swap_remove(index);
                self.position[slot as usize] = ABSENT;
                if index < self.heap.len() {
                    self.sift_up(index);
                    self.sift_down(index);
                }
            }
        }
    }

    fn index(&self, slot: u32) -> Option<usize> {
        let index = *self.position.get(slot as usize)?;
        (index != ABSENT).then_some(index as usize)
    }

    fn sift_up(&mut self, mut index: usize) {
        while index > 0 {
            let parent = (index - 1) / 2;
            if self.heap[parent] <= self.heap[index] {
                break;
            }
            self.swap(index, parent);
            index = parent;
        }
        self.record(index);
    }

    fn sift_down(&mut self, mut index: usize) {
        // After a sift up the entry meant may be elsewhere; what is here then is in order and stays.
        loop {
            let left = 2 * index + 1;
            let smaller = match (self.heap.get(left), self.heap.get(left + 1)) {
                (None, _) => break,
                (Some(a), Some(b)) if b < a => left + 1,
                (Some(_), _) => left,
            };
            if self.heap[index] <= self.heap[smaller] {
                break;
            }
            self.swap(index, smaller);
            index = smaller;
        }
        self.record(index);
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.record(a);
        self.record(b);
    }

    fn record(&mut self, index: usize) {
        if let Some(entry) = self.heap.get(index) {
            self.position[entry.slot as usize] = index as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn agrees_with_a_sorted_map(steps in prop::collection::vec((0u32..20, prop::option::of(0u64..50)), 1..200)) {
            let mut timers = Timers::default();
            let mut oracle = BTreeMap::new();
            for (slot, at) in steps {
                let at = at.map(Instant::from_nanos);
                timers.set(slot, at.map(|at| (at, WakeReason::Keepalive)));
                match at {
                    Some(at) => oracle.insert(slot, at),
                    None => oracle.remove(&slot),
                };
                prop_assert_eq!(timers.get(slot), at);
                let wanted = oracle.iter().map(|(slot, at)| (*at, *slot)).min();
                prop_assert_eq!(timers.first().map(|(slot, at, _)| (at, slot)), wanted);
            }
            for (slot, at) in oracle {
                prop_assert_eq!(timers.get(slot), Some(at));
            }
        }
    }
}
