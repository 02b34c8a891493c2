//! Whose an overlay address is: the longest prefix among the peers' addresses and routes.
//!
//! Prefixes nest or are disjoint, so they are flattened into intervals, sorted by their first address, each with the
//! owner of the most specific prefix around it. A lookup is one binary search; a table is built anew for each netmap.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::paths::PeerIdx;

/// An owner, and whether the address is its own rather than in a subnet behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) peer: PeerIdx,
    pub(crate) exact: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    v4: Intervals<u32>,
    v6: Intervals<u128>,
}

impl Routes {
    /// A table of `prefixes`. Of two equal ones the first wins.
    pub(crate) fn new(prefixes: impl Iterator<Item = (IpNet, Owner)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (prefix, owner) in prefixes {
            match prefix {
                IpNet::V4(net) => v4.push((net.network().to_bits(), net.broadcast().to_bits(), owner)),
                IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits(), owner)),
            }
        }
        Self { v4: Intervals::new(v4, |a| a.checked_add(1)), v6: Intervals::new(v6, |a| a.checked_add(1)) }
    }

    pub(crate) fn lookup(&self, addr: IpAddr) -> Option<Owner> {
        match addr {
            IpAddr::V4(ip) => self.v4.lookup(ip.to_bits()),
            IpAddr::V6(ip) => self.v6.lookup(ip.to_bits()),
        }
    }
}

/// Where each interval begins and whose it is; it ends where the next begins.
#[derive(Debug)]
struct Intervals<A>(Vec<(A, Option<Owner>)>);

impl<A> Default for Intervals<A> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<A: Copy + Ord> Intervals<A> {
    fn new(mut prefixes: Vec<(A, A, Owner)>, next: impl Fn(A) -> Option<A>) -> Self {
        // Outer ones before inner ones; the sort is stable, so that the first of equal ones stays first.
        prefixes.sort_by_key(|(first, last, _)| (*first, std::cmp::Reverse(*last)));
        prefixes.dedup_by_key(|(first, last, _)| (*first, *last));
        let mut out = Self(Vec::with_capacity(prefixes.len() * 2));
        let mut around: Vec<(A, Owner)> = Vec::new();
        let close = |out: &mut Self, around: &mut Vec<(A, Owner)>| {
            if let Some((last, _)) = around.pop()
                && let Some(after) = next(last)
            {
                out.begin(after, around.last().map(|(_, owner)| *owner));
            }
        };
        for (first, last, owner) in prefixes {
            while around.last().is_some_and(|(end, _)| *end < first) {
                close(&mut out, &mut around);
            }
            out.begin(first, Some(owner));
            around.push((last, owner));
        }
        while !around.is_empty() {
            close(&mut out, &mut around);
        }
        out
    }

    fn begin(&mut self, first: A, owner: Option<Owner>) {
        match self.0.last_mut() {
            Some(last) if last.0 == first => last.1 = owner,
            _ => self.0.push((first, owner)),
        }
    }

    fn lookup(&self, addr: A) -> Option<Owner> {
        let after = self.0.partition_point(|(first, _)| *first <= addr);
        self.0.get(after.checked_sub(1)?)?.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The obviously right one.
    fn oracle(prefixes: &[(IpNet, Owner)], addr: IpAddr) -> Option<Owner> {
        let mut best: Option<(u8, Owner)> = None;
        for (net, owner) in prefixes.iter().filter(|(net, _)| net.contains(&addr)) {
            if best.is_none_or(|(len, _)| net.prefix_len() > len) {
                best = Some((net.prefix_len(), *owner));
            }
        }
        best.map(|(_, owner)| owner)
    }

    /// Few distinct bits, so that prefixes nest and meet.
    fn addr() -> impl Strategy<Value = IpAddr> {
        let bits = prop_oneof![Just(0u8), Just(255), 0u8..4];
        (any::<bool>(), proptest::collection::vec(bits, 16)).prop_map(|(v4, b)| {
            if v4 {
                IpAddr::from(<[u8; 4]>::try_from(&b[..4]).unwrap())
            } else {
                IpAddr::from(<[u8; 16]>::try_from(&b[..]).unwrap())
            }
        })
    }

    fn prefix() -> impl Strategy<Value = (IpNet, Owner)> {
        (addr(), 0u8..=128, 0u32..5).prop_map(|(addr, len, peer)| {
            let max = if addr.is_ipv4() { 32 } else { 128 };
            let net = IpNet::new(addr, len.min(max)).unwrap().trunc();
            (net, Owner { peer, exact: len >= max })
        })
    }

    proptest! {
        #[test]
        fn agrees_with_the_longest_prefix(
            prefixes in proptest::collection::vec(prefix(), 0..40),
            addrs in proptest::collection::vec(addr(), 1..40),
        ) {
            let table = Routes::new(prefixes.iter().copied());
            let edges = prefixes.iter().flat_map(|(net, _)| [net.network(), net.broadcast()]);
            for addr in addrs.into_iter().chain(edges) {
                prop_assert_eq!(table.lookup(addr), oracle(&prefixes, addr), "{}", addr);
            }
        }
    }
}
