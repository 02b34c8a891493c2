//! Sources of rules: which devices and addresses, kept up to date as devices change.

use super::compile::{Compiled, print_set};
use super::ipset::IpSet;
use super::nodeset::NodeSet;
use super::posture::Truth;
use super::selector::Selector;
use super::world::{Device, set_overlaps};
use crate::filter::IpRange;

/// A source: which devices, which addresses.
#[derive(Clone, Debug)]
pub(crate) struct SourceSet {
    pub(crate) key: SourceKey,
    /// Addresses named as such.
    pub(super) base: IpSet,
    /// Devices that may be the source, with an own address or through a route they carry.
    pub(crate) nodes: NodeSet,
    /// Devices a denial does not speak of, as they certainly do not meet its postures.
    pub(super) excluded: NodeSet,
    /// Of both, those it speaks of by identity and so with all their addresses.
    pub(super) named: NodeSet,
    /// Every address.
    pub(crate) set: IpSet,
    /// Sum of the weighted prints of `nodes` and `excluded`: equal sums, equal addresses.
    pub(super) print: u128,
    /// The same with what SSH rules depend on besides: users and tags.
    pub(super) who: u128,
    pub(super) base_print: u128,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SourceKey {
    pub(crate) identities: Vec<u32>,
    pub(super) literals: Vec<Selector>,
    pub(super) any: bool,
    pub(crate) alt: Option<usize>,
    pub(super) deny: bool,
}

/// How a source speaks of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    /// False: a denial leaves it out.
    member: bool,
    /// By identity, with all its addresses; else by an address or a route.
    named: bool,
}

impl Standing {
    /// Tells the four apart in a sum of prints; odd, so that no print is lost.
    const fn weight(self) -> u128 {
        match (self.member, self.named) {
            (true, true) => 1,
            (true, false) => 3,
            (false, true) => 5,
            (false, false) => 7,
        }
    }
}

impl Compiled {
    fn base_of(&self, key: &SourceKey) -> IpSet {
        let mut base = IpSet::new();
        if key.any {
            base.extend(&self.world.overlay);
            base.extend(&self.routes);
        }
        for literal in &key.literals {
            base.extend(&self.literal(literal));
        }
        base
    }

    pub(super) fn fill_source(&mut self, index: usize) {
        let key = self.sources[index].key.clone();
        let base = self.base_of(&key);
        let mut nodes = NodeSet::new();
        if key.any {
            nodes.extend(&self.world.everyone);
        } else {
            for id in &key.identities {
                nodes.extend(&self.world.identities.members[*id as usize]);
            }
            nodes.extend(&self.world.lookup(&base, false));
        }
        let mut set = IpSet::new();
        if key.alt.is_none() || key.deny {
            set.extend(&base);
            for id in &key.identities {
                set.extend(&self.world.identities.addresses[*id as usize]);
            }
            if key.any {
                set.extend(&self.world.outside);
            }
        }
        let source = &mut self.sources[index];
        source.base_print = print_set(&base);
        source.base = base;
        source.set = set;
        source.nodes = NodeSet::new();
        source.excluded = NodeSet::new();
        source.named = NodeSet::new();
        source.print = 0;
        source.who = 0;
        let mut own = Vec::new();
        for slot in nodes.iter() {
            let Some(device) = self.world.device(slot) else { continue };
            let Some(standing) = self.standing(index, slot, device) else { continue };
            let source = &mut self.sources[index];
            source.add(slot, device, standing);
            if !standing.member {
                device.own.iter().for_each(|r| source.set.remove(*r));
            } else if key.alt.is_some() && !key.deny {
                own.extend(own_in(&key, device, &source.base));
            }
        }
        if key.alt.is_some() && !key.deny {
            self.sources[index].set = own.into_iter().collect();
        }
    }

    /// How a source speaks of a device; `None` if not at all.
    fn standing(&self, index: usize, slot: usize, device: &Device) -> Option<Standing> {
        let source = &self.sources[index];
        let key = &source.key;
        let named = key.any || key.identities.iter().any(|id| device.has(*id));
        let own = named || device.own.iter().any(|r| source.base.overlaps(*r));
        let spoken_of = own || set_overlaps(&source.base, &device.routes);
        match (key.alt.map(|alt| self.alts[alt].truth[slot]), key.deny) {
            // Nobody knows what stands behind a route, so a posture is only met by the device itself.
            (Some(Truth::True), false) => own.then_some(Standing { member: true, named }),
            (Some(_), false) => None,
            (Some(Truth::False), true) => spoken_of.then_some(Standing { member: false, named }),
            (Some(_), true) | (None, _) => spoken_of.then_some(Standing { member: true, named }),
        }
    }

    /// The same source after a change of what `*` covers: who it speaks of stays.
    pub(super) fn refresh_base(&mut self, index: usize) {
        let base = self.base_of(&self.sources[index].key);
        let source = &mut self.sources[index];
        source.base_print = print_set(&base);
        if source.key.alt.is_none() || source.key.deny {
            source.set.clone_from(&base);
            source.set.extend(&self.world.outside);
            for device in source.excluded.iter().filter_map(|slot| self.world.device(slot)) {
                device.own.iter().for_each(|r| source.set.remove(*r));
            }
        }
        source.base = base;
    }

    /// Takes a device out of a source, and puts it in as it now is.
    pub(super) fn touch_source(&mut self, index: usize, slot: usize, old: Option<&Device>) {
        let source = &mut self.sources[index];
        let plain = source.key.alt.is_none() || source.key.deny;
        if let Some(old) = old {
            source.take(slot, old);
            for range in &old.own {
                source.set.remove(*range);
                if plain && source.base.covers(*range) {
                    source.set.insert(*range);
                }
            }
        }
        if let Some(device) = self.world.device(slot)
            && let Some(standing) = self.standing(index, slot, device)
        {
            let source = &mut self.sources[index];
            source.add(slot, device, standing);
            if !standing.member {
                device.own.iter().for_each(|r| source.set.remove(*r));
            } else {
                for range in own_in(&source.key, device, &source.base) {
                    source.set.insert(range);
                }
            }
        }
    }
}

impl SourceSet {
    /// Does it depend on every route there is?
    pub(super) const fn is_of_everything(&self) -> bool {
        self.key.any
    }

    /// True if traffic from the network behind one of its devices is traffic of the source. Nobody knows what stands
    /// there, so a posture is only met by the device itself.
    pub(super) fn carries(&self, route: IpRange) -> bool {
        (self.key.alt.is_none() || self.key.deny) && self.base.overlaps(route)
    }

    /// The addresses from which a device sends as this source.
    pub(super) fn sent_by(&self, device: &Device) -> IpSet {
        let mut out = self.set.intersect(&device.own.iter().copied().collect());
        if self.key.alt.is_none() || self.key.deny {
            out.extend(&self.base.intersect(&device.routes));
        }
        out
    }

    /// Changes whenever the devices that may be the source change, or their users or tags.
    pub(crate) fn people_print(&self) -> u128 {
        self.who
    }

    fn add(&mut self, slot: usize, device: &Device, standing: Standing) {
        let weight = standing.weight();
        self.print = self.print.wrapping_add(device.print.wrapping_mul(weight));
        self.who = self.who.wrapping_add(device.who.wrapping_mul(weight));
        if standing.member {
            self.nodes.insert(slot);
        } else {
            self.excluded.insert(slot);
        }
        if standing.named {
            self.named.insert(slot);
        }
    }

    fn take(&mut self, slot: usize, device: &Device) {
        let named = self.named.remove(slot);
        let member = self.nodes.remove(slot);
        if member || self.excluded.remove(slot) {
            let weight = Standing { member, named }.weight();
            self.print = self.print.wrapping_sub(device.print.wrapping_mul(weight));
            self.who = self.who.wrapping_sub(device.who.wrapping_mul(weight));
        }
    }
}

/// The part of a device's own addresses that a source names.
fn own_in(key: &SourceKey, device: &Device, base: &IpSet) -> Vec<IpRange> {
    let named = key.any || key.identities.iter().any(|id| device.has(*id));
    device.own.iter().copied().filter(|r| named || base.overlaps(*r)).collect()
}
