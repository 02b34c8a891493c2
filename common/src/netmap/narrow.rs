//! What two rules both cover, so that a rule that only changes is not taken away and put back: flows under it live on.

use std::collections::BTreeSet;

use super::AppGrant;
use crate::filter::{
    Action, DEFAULT_PROTOS, FilterDst, FilterRule, IpRange, PortRange, UnixInterval, has_ports,
};

/// Most comparisons of ranges that finding the common part of two sets of rules may take; after that, rules that differ
/// are taken away whole, and flows under them end although they may begin again. Unit: comparisons.
pub const MAX_NARROW_WORK: usize = 1 << 22;

/// The rules that allow exactly what both `old` and `new` allow: what is in both, `old`'s changed rules cut down to what
/// `new` still allows, and the deny rules of both.
pub(super) fn common_rules(old: &BTreeSet<FilterRule>, new: &BTreeSet<FilterRule>) -> BTreeSet<FilterRule> {
    let denies = old.iter().chain(new).filter(|r| r.action == Action::Deny);
    let mut out: BTreeSet<FilterRule> = denies.chain(old.intersection(new)).cloned().collect();
    let opens = |r: &&FilterRule| r.action == Action::Allow && !r.staged;
    let gone: Vec<&FilterRule> = old.difference(new).filter(opens).collect();
    // A rule that stands in both is kept as it is: it can't be what a changed rule must still cover.
    let come: Vec<&FilterRule> = new.difference(old).filter(opens).collect();
    let mut work = MAX_NARROW_WORK;
    // A rule and its own newer form first, since they have the most in common.
    for same in [true, false] {
        for old in &gone {
            for new in come.iter().filter(|new| (new.id == old.id) == same) {
                out.extend(both(old, new, &mut work).into_iter().flatten().flatten());
            }
        }
    }
    out
}

/// The capabilities that both `old` and `new` give, to those who have them in both.
pub(super) fn common_apps(old: &BTreeSet<AppGrant>, new: &BTreeSet<AppGrant>) -> BTreeSet<AppGrant> {
    let mut work = MAX_NARROW_WORK;
    let mut out: BTreeSet<AppGrant> = old.intersection(new).cloned().collect();
    let come: Vec<&AppGrant> = new.difference(old).collect();
    for old in old.difference(new) {
        let alike = |n: &&&AppGrant| {
            (n.id, &n.name, &n.values, &n.active) == (old.id, &old.name, &old.values, &old.active)
        };
        for new in come.iter().filter(alike) {
            let src = common_ranges(&old.src, &new.src, &mut work);
            let dst = common_ranges(&old.dst, &new.dst, &mut work);
            out.extend(src.zip(dst).map(|(src, dst)| AppGrant { src, dst, ..old.clone() }));
        }
    }
    out
}

/// `old` as far as `new` covers it too; `old` itself if `new` covers all of it. Two rules where they differ in ports,
/// since ports mean nothing for the protocols without.
fn both(old: &FilterRule, new: &FilterRule, work: &mut usize) -> Option<[Option<FilterRule>; 2]> {
    let protos = protos(&old.protos, &new.protos)?;
    let active = match (&old.active, &new.active) {
        (Some(a), Some(b)) => Some(common(a, b, work, |a, b| {
            let window = UnixInterval { from: a.from.max(b.from), until: a.until.min(b.until) };
            (window.from < window.until).then_some(window)
        })?),
        (a, b) => a.as_ref().or(b.as_ref()).cloned(),
    };
    let src = common_ranges(&old.src, &new.src, work)?;
    let with_ports = common(&old.dst, &new.dst, work, |a, b| {
        let ports =
            PortRange { first: a.ports.first.max(b.ports.first), last: a.ports.last.min(b.ports.last) };
        Some(FilterDst { net: a.net.intersect(&b.net)?, ports }).filter(|d| d.ports.first <= d.ports.last)
    });
    let rule =
        |protos, dst| FilterRule { protos, dst, src: src.clone(), active: active.clone(), ..old.clone() };
    let any_port =
        common(&old.dst, &new.dst, work, |a, b| Some(FilterDst { net: a.net.intersect(&b.net)?, ..*a }));
    if with_ports == any_port {
        return Some([Some(rule(protos, with_ports?)), None]);
    }
    let (ported, portless): (Vec<u8>, Vec<u8>) = named(&protos).into_iter().partition(|p| has_ports(*p));
    let part = |protos: Vec<u8>, dst: Option<Vec<FilterDst>>| {
        dst.filter(|_| !protos.is_empty()).map(|dst| rule(protos, dst))
    };
    Some([part(ported, with_ports), part(portless, any_port)])
}

/// Takes `amount` of the work left, or all of it if there is less: `None` then.
fn spend(work: &mut usize, amount: usize) -> Option<()> {
    let left = work.checked_sub(amount);
    *work = left.unwrap_or(0);
    left.map(|_| ())
}

/// The common parts of two lists; `None` if there are none.
fn common_ranges(a: &[IpRange], b: &[IpRange], work: &mut usize) -> Option<Vec<IpRange>> {
    if disjoint(a) && disjoint(b) { sweep(a, b, work) } else { common(a, b, work, IpRange::intersect) }
}

/// True if the ranges are sorted and apart, as a compiled policy has them.
fn disjoint(ranges: &[IpRange]) -> bool {
    ranges.is_sorted_by(|a, b| a.last() < b.first())
}

/// The common parts of two sorted, disjoint lists; `None` if there are none.
fn sweep(a: &[IpRange], b: &[IpRange], work: &mut usize) -> Option<Vec<IpRange>> {
    spend(work, a.len() + b.len())?;
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        out.extend(x.intersect(y));
        // Addresses of the two families have an order too: IPv4 first.
        if x.last() <= y.last() { i += 1 } else { j += 1 }
    }
    (!out.is_empty()).then_some(out)
}

/// The common parts of two lists, without doubles; `None` if there are none. `a` unchanged if it is all common.
fn common<T: Copy + Ord>(
    a: &[T],
    b: &[T],
    work: &mut usize,
    both: impl Fn(&T, &T) -> Option<T>,
) -> Option<Vec<T>> {
    if a == b {
        return (!a.is_empty()).then(|| a.to_vec());
    }
    spend(work, a.len().saturating_mul(b.len()))?;
    let mut parts: Vec<T> = a.iter().flat_map(|x| b.iter().filter_map(|y| both(x, y))).collect();
    parts.sort_unstable();
    parts.dedup();
    let mut whole = a.to_vec();
    whole.sort_unstable();
    match parts.is_empty() {
        true => None,
        false if parts == whole => Some(a.to_vec()),
        false => Some(parts),
    }
}

/// Protocols of both lists.
fn protos(a: &[u8], b: &[u8]) -> Option<Vec<u8>> {
    let (whole, other) = (named(a), named(b));
    let kept: Vec<u8> = whole.iter().copied().filter(|p| other.contains(p)).collect();
    match kept.is_empty() {
        true => None,
        false if kept == whole => Some(a.to_vec()),
        false => Some(kept),
    }
}

/// The protocols of a list: an empty one stands for the default ones.
fn named(list: &[u8]) -> Vec<u8> {
    if list.is_empty() { DEFAULT_PROTOS.to_vec() } else { list.to_vec() }
}
