//! Sets of addresses as sorted, disjoint ranges, one list per family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::filter::IpRange;

/// A set of IPv4 and IPv6 addresses. Ranges are sorted, disjoint and not adjacent, so equal sets are equal values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct IpSet {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl IpSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { v4: Vec::new(), v6: Vec::new() }
    }

    /// Every address of both families.
    pub fn all() -> Self {
        Self { v4: vec![(0, u32::MAX)], v6: vec![(0, u128::MAX)] }
    }

    /// True if the set holds no address.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// How many ranges the set has.
    pub fn range_count(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Adds every address of `range`.
    pub fn insert(&mut self, range: IpRange) {
        match split(range) {
            Bounds::V4(lo, hi) => insert(&mut self.v4, lo, hi),
            Bounds::V6(lo, hi) => insert(&mut self.v6, lo, hi),
        }
    }

    /// Takes every address of `range` out.
    pub fn remove(&mut self, range: IpRange) {
        match split(range) {
            Bounds::V4(lo, hi) => remove(&mut self.v4, lo, hi),
            Bounds::V6(lo, hi) => remove(&mut self.v6, lo, hi),
        }
    }

    /// True if `addr` is in the set.
    pub fn contains(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(a) => overlaps(&self.v4, a.to_bits(), a.to_bits()),
            IpAddr::V6(a) => overlaps(&self.v6, a.to_bits(), a.to_bits()),
        }
    }

    /// True if any address of `range` is in the set.
    pub fn overlaps(&self, range: IpRange) -> bool {
        match split(range) {
            Bounds::V4(lo, hi) => overlaps(&self.v4, lo, hi),
            Bounds::V6(lo, hi) => overlaps(&self.v6, lo, hi),
        }
    }

    /// True if every address of `range` is in the set.
    pub fn covers(&self, range: IpRange) -> bool {
        match split(range) {
            Bounds::V4(lo, hi) => covers(&self.v4, lo, hi),
            Bounds::V6(lo, hi) => covers(&self.v6, lo, hi),
        }
    }

    /// The addresses in both sets. Looks up the ranges of the smaller set in the larger one.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        Self { v4: intersect(&self.v4, &other.v4), v6: intersect(&self.v6, &other.v6) }
    }

    /// The addresses in `self` and not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let mut out = self.clone();
        for range in other.ranges() {
            out.remove(range);
        }
        out
    }

    /// Adds every address of `other`.
    pub fn extend(&mut self, other: &Self) {
        if other.range_count() <= 4 {
            for range in other.ranges() {
                self.insert(range);
            }
        } else {
            self.v4.extend_from_slice(&other.v4);
            normalise(&mut self.v4);
            self.v6.extend_from_slice(&other.v6);
            normalise(&mut self.v6);
        }
    }

    /// The ranges, IPv4 first, each family in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = IpRange> + '_ {
        let v4 = self.v4.iter().filter_map(|&(lo, hi)| IpRange::new(v4(lo), v4(hi)));
        let v6 = self.v6.iter().filter_map(|&(lo, hi)| IpRange::new(v6(lo), v6(hi)));
        v4.chain(v6)
    }

    /// The ranges as a list.
    pub fn to_ranges(&self) -> Vec<IpRange> {
        let mut out = Vec::with_capacity(self.range_count());
        out.extend(self.ranges());
        out
    }
}

impl FromIterator<IpRange> for IpSet {
    fn from_iter<I: IntoIterator<Item = IpRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        for range in ranges {
            match split(range) {
                Bounds::V4(lo, hi) => set.v4.push((lo, hi)),
                Bounds::V6(lo, hi) => set.v6.push((lo, hi)),
            }
        }
        normalise(&mut set.v4);
        normalise(&mut set.v6);
        set
    }
}

enum Bounds {
    V4(u32, u32),
    V6(u128, u128),
}

fn split(range: IpRange) -> Bounds {
    match (range.first(), range.last()) {
        (IpAddr::V4(lo), IpAddr::V4(hi)) => Bounds::V4(lo.to_bits(), hi.to_bits()),
        (lo, hi) => Bounds::V6(wide(lo), wide(hi)),
    }
}

fn wide(addr: IpAddr) -> u128 {
    match addr {
        // Not reached: a range never mixes families.
        IpAddr::V4(a) => a.to_ipv6_mapped().to_bits(),
        IpAddr::V6(a) => a.to_bits(),
    }
}

fn v4(bits: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(bits))
}

fn v6(bits: u128) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from_bits(bits))
}

trait Word: Copy + Ord {
    /// The next value, or the same at the end.
    fn up(self) -> Self;
    /// The value before, or the same at the start.
    fn down(self) -> Self;
}

impl Word for u32 {
    fn up(self) -> Self {
        self.saturating_add(1)
    }
    fn down(self) -> Self {
        self.saturating_sub(1)
    }
}

impl Word for u128 {
    fn up(self) -> Self {
        self.saturating_add(1)
    }
    fn down(self) -> Self {
        self.saturating_sub(1)
    }
}

fn normalise<W: Word>(ranges: &mut Vec<(W, W)>) {
    if ranges.windows(2).all(|w| w[0].1.up() < w[1].0) {
        return;
    }
    ranges.sort_unstable();
    let mut kept = 0;
    for i in 1..ranges.len() {
        let (lo, hi) = ranges[i];
        if lo <= ranges[kept].1.up() {
            ranges[kept].1 = ranges[kept].1.max(hi);
        } else {
            kept += 1;
            ranges[kept] = (lo, hi);
        }
    }
    if !ranges.is_empty() {
        ranges.truncate(kept + 1);
    }
}

fn insert<W: Word>(ranges: &mut Vec<(W, W)>, lo: W, hi: W) {
    // Everything that touches or neighbours [lo, hi] melts into it.
    let from = ranges.partition_point(|r| r.1.up() < lo);
    let to = ranges.partition_point(|r| r.0 <= hi.up());
    if from == to {
        ranges.insert(from, (lo, hi));
    } else {
        let melted = (lo.min(ranges[from].0), hi.max(ranges[to - 1].1));
        ranges[from] = melted;
        ranges.drain(from + 1..to);
    }
}

fn remove<W: Word>(ranges: &mut Vec<(W, W)>, lo: W, hi: W) {
    let from = ranges.partition_point(|r| r.1 < lo);
    let to = ranges.partition_point(|r| r.0 <= hi);
    if from >= to {
        return;
    }
    let left = (ranges[from].0 < lo).then(|| (ranges[from].0, lo.down()));
    let right = (ranges[to - 1].1 > hi).then(|| (hi.up(), ranges[to - 1].1));
    ranges.splice(from..to, left.into_iter().chain(right));
}

fn overlaps<W: Word>(ranges: &[(W, W)], lo: W, hi: W) -> bool {
    let at = ranges.partition_point(|r| r.1 < lo);
    ranges.get(at).is_some_and(|r| r.0 <= hi)
}

fn covers<W: Word>(ranges: &[(W, W)], lo: W, hi: W) -> bool {
    let at = ranges.partition_point(|r| r.1 < lo);
    ranges.get(at).is_some_and(|r| r.0 <= lo && hi <= r.1)
}

fn intersect<W: Word>(a: &[(W, W)], b: &[(W, W)]) -> Vec<(W, W)> {
    let (small, large) = if a.len() <= b.len() { (a, b) } else { (b, a) };
    let mut out = Vec::new();
    for &(lo, hi) in small {
        let from = large.partition_point(|r| r.1 < lo);
        for r in large[from..].iter().take_while(|r| r.0 <= hi) {
            out.push((lo.max(r.0), hi.min(r.1)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(lo: u8, hi: u8) -> IpRange {
        let (lo, hi) = (lo.min(hi), lo.max(hi));
        IpRange::new(IpAddr::V4(Ipv4Addr::new(0, 0, 0, lo)), IpAddr::V4(Ipv4Addr::new(0, 0, 0, hi)))
            .expect("ordered")
    }

    fn bits(set: &IpSet) -> Vec<u8> {
        (0..=255).filter(|i| set.contains(IpAddr::V4(Ipv4Addr::new(0, 0, 0, *i)))).collect()
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_addresses(ops in proptest::collection::vec((any::<bool>(), any::<u8>(), any::<u8>()), 0..40), other in proptest::collection::vec((any::<u8>(), any::<u8>()), 0..20)) {
            let mut set = IpSet::new();
            let mut model = std::collections::BTreeSet::new();
            for (add, a, b) in ops {
                let r = range(a, b);
                if add { set.insert(r); } else { set.remove(r); }
                for i in a.min(b)..=a.max(b) {
                    if add { model.insert(i); } else { model.remove(&i); }
                }
            }
            prop_assert_eq!(bits(&set), model.iter().copied().collect::<Vec<_>>());
            let rebuilt: IpSet = set.ranges().collect();
            prop_assert_eq!(&rebuilt, &set);
            let other: IpSet = other.iter().map(|(a, b)| range(*a, *b)).collect();
            let both: Vec<u8> = bits(&other).into_iter().filter(|i| model.contains(i)).collect();
            prop_assert_eq!(&bits(&set.intersect(&other)), &both);
            let not: Vec<u8> = model.iter().copied().filter(|i| !both.contains(i)).collect();
            prop_assert_eq!(bits(&set.minus(&other)), not);
            let mut union = set.clone();
            union.extend(&other);
            prop_assert_eq!(bits(&union).len(), model.len() + bits(&other).len() - both.len());
            for (a, b) in [(3_u8, 9_u8), (100, 120), (0, 255)] {
                prop_assert_eq!(set.overlaps(range(a, b)), (a..=b).any(|i| model.contains(&i)));
                prop_assert_eq!(set.covers(range(a, b)), (a..=b).all(|i| model.contains(&i)));
            }
        }
    }

    #[test]
    fn the_ends_of_the_address_space_do_not_wrap() {
        let mut set = IpSet::all();
        set.remove(IpRange::ALL_V4);
        assert!(set.overlaps(IpRange::ALL_V6) && !set.overlaps(IpRange::ALL_V4));
        set.insert(IpAddr::V4(Ipv4Addr::BROADCAST).into());
        set.insert(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
        assert_eq!(set.to_ranges().len(), 3);
    }
}
