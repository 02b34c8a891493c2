//! Fingerprints: which devices must be told something new, without working out what.
//!
//! A device's fingerprint is a sum over the rules that speak of it. What a rule adds is the same for every device it is
//! in force at, so that a change of the rule's sources or destinations moves all of them by one difference: the cost of
//! a change is what it touches, not what there is. Each device adds what depends on itself and on its user's other
//! devices alone. Every summand comes from SHA-256 over what it stands for.

use sha2::{Digest, Sha256};

use super::compile::{Compiled, CompiledRule, TargetKind};
use super::nodeset::NodeSet;
use super::sources::SourceSet;
use super::world::{Device, wide};

/// A hash of a device's whole policy: it differs if anything the device must be told differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub u128);

/// The two parts of every fingerprint, by slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prints {
    /// What rules add.
    shared: Vec<u128>,
    /// What depends on the device and its user's other devices alone.
    local: Vec<u128>,
}

impl Prints {
    pub(super) fn resize(&mut self, slots: usize) {
        self.shared.resize(slots, 0);
        self.local.resize(slots, 0);
    }

    pub(super) fn get(&self, slot: usize) -> Fingerprint {
        let part = |list: &Vec<u128>| list.get(slot).copied().unwrap_or(0);
        Fingerprint(part(&self.shared).wrapping_add(part(&self.local)))
    }

    /// Adds `amount` for every slot of `slots` but one, which is counted anew anyway.
    pub(super) fn add(&mut self, slots: &NodeSet, amount: u128, but: Option<usize>) {
        for slot in slots.iter().filter(|slot| Some(*slot) != but) {
            if let Some(sum) = self.shared.get_mut(slot) {
                *sum = sum.wrapping_add(amount);
            }
        }
    }

    pub(super) fn set_shared(&mut self, slot: usize, sum: u128) {
        if let Some(held) = self.shared.get_mut(slot) {
            *held = sum;
        }
    }

    pub(super) fn set_local(&mut self, slot: usize, print: u128) {
        if let Some(held) = self.local.get_mut(slot) {
            *held = print;
        }
    }

    /// The slots at which the two differ.
    pub(super) fn differing(&self, other: &Self) -> impl Iterator<Item = usize> {
        let slots = self.shared.len().max(other.shared.len());
        (0..slots).filter(move |slot| self.get(*slot) != other.get(*slot))
    }
}

/// What a rule adds at the devices that let something of it in, for these prints of its source.
pub(super) fn inbound(rule: &CompiledRule, source_print: u128, base_print: u128) -> u128 {
    digest(rule.core_print, 1, source_print, base_print)
}

/// What a rule adds at the devices that send under it.
pub(super) fn outbound(rule: &CompiledRule, dst_print: u128, answers_print: u128) -> u128 {
    digest(rule.core_print, 2, dst_print, if rule.names_everything() { answers_print } else { 0 })
}

/// What an SSH rule adds at the devices where it lets people log in.
pub(super) fn login(ssh_print: u128, people_print: u128) -> u128 {
    digest(ssh_print, 3, people_print, 0)
}

fn digest(core: u128, kind: u8, a: u128, b: u128) -> u128 {
    let mut hash = Sha256::new();
    hash.update([kind]);
    for part in [core, a, b] {
        hash.update(part.to_be_bytes());
    }
    wide(hash)
}

impl CompiledRule {
    /// Does what it opens depend on everything there is?
    pub(super) fn names_everything(&self) -> bool {
        self.dst_alt.is_none() && self.via.is_none() && self.targets.iter().any(|t| t.kind == TargetKind::Any)
    }

    /// A device's share of `dst_print`: differs if what the device lets in of the rule differs.
    pub(super) fn part_print(&self, device: &Device) -> u128 {
        device.print.wrapping_mul(self.hits(device))
    }

    /// Which of the rule's destinations a device is, as an odd number.
    fn hits(&self, device: &Device) -> u128 {
        let identities = self.targets.iter().filter_map(|target| match target.kind {
            TargetKind::Identity(id) => Some(id),
            _ => None,
        });
        let weight =
            identities.fold(1_u128, |w, id| w.wrapping_mul(31).wrapping_add(2 * u128::from(device.has(id))));
        weight | 1
    }

    /// What only this device adds at itself, beside [`inbound`].
    fn inbound_at(&self, device: &Device) -> u128 {
        self.core_print.rotate_left(17).wrapping_mul(self.hits(device))
    }

    /// What only this device adds at itself, beside [`outbound`]: by which of its addresses and routes it is a source.
    fn outbound_from(&self, source: &SourceSet, device: &Device) -> u128 {
        let own = device.own.iter().map(|range| source.set.overlaps(*range));
        let routes = device.routes.ranges().map(|range| source.carries(range));
        let weight = own.chain(routes).fold(1_u128, |w, hit| w.wrapping_mul(3).wrapping_add(u128::from(hit)));
        self.core_print.rotate_left(43).wrapping_mul(weight.wrapping_mul(2).wrapping_add(1))
    }
}

impl Compiled {
    /// A hash of the device's whole policy, egress included.
    pub fn fingerprint(&self, name: &str) -> Option<Fingerprint> {
        let slot = *self.world.by_name.get(name)?;
        Some(self.prints.get(slot))
    }

    /// Counts every fingerprint.
    pub(super) fn fill_prints(&mut self) {
        let mut prints = Prints::default();
        prints.resize(self.world.devices.len());
        for rule in self.rules.iter().filter(|r| !r.own) {
            let source = &self.sources[rule.src];
            prints.add(&rule.dst_nodes, inbound(rule, source.print, source.base_print), None);
            if !rule.app {
                prints.add(&source.nodes, outbound(rule, rule.dst_print, self.answers_print), None);
            }
        }
        for rule in &self.ssh {
            prints.add(&rule.at, login(rule.print, self.sources[rule.src].people_print()), None);
        }
        for slot in self.world.everyone.iter() {
            if let Some(device) = self.world.device(slot) {
                let own = self.pairs_of(slot, device);
                let sum = prints.shared[slot].wrapping_add(own);
                prints.set_shared(slot, sum);
                prints.set_local(slot, self.local_of(slot));
            }
        }
        self.prints = prints;
    }

    /// What the rules add at one device; 0 if there is none.
    pub(super) fn shared_of(&self, slot: usize) -> u128 {
        let Some(device) = self.world.device(slot) else { return 0 };
        let mut sum = self.pairs_of(slot, device);
        for rule in self.rules.iter().filter(|r| !r.own) {
            let source = &self.sources[rule.src];
            if rule.dst_nodes.has(slot) {
                sum = sum.wrapping_add(inbound(rule, source.print, source.base_print));
            }
            if !rule.app && source.nodes.has(slot) {
                sum = sum.wrapping_add(outbound(rule, rule.dst_print, self.answers_print));
            }
        }
        for rule in self.ssh.iter().filter(|r| r.at.has(slot)) {
            sum = sum.wrapping_add(login(rule.print, self.sources[rule.src].people_print()));
        }
        sum
    }

    fn pairs_of(&self, slot: usize, device: &Device) -> u128 {
        let mut sum = 0_u128;
        for rule in self.rules.iter().filter(|r| !r.own) {
            let source = &self.sources[rule.src];
            if rule.dst_nodes.has(slot) {
                sum = sum.wrapping_add(rule.inbound_at(device));
            }
            if !rule.app && source.nodes.has(slot) {
                sum = sum.wrapping_add(rule.outbound_from(source, device));
            }
        }
        sum
    }

    /// What depends on the device and its user's other devices alone; 0 if there is none.
    pub(super) fn local_of(&self, slot: usize) -> u128 {
        let Some(device) = self.world.device(slot) else { return 0 };
        let mut hash = Sha256::new();
        hash.update(device.print.to_be_bytes());
        let user = device.user.and_then(|u| self.world.of_user.get(u));
        for rule in self.rules.iter().filter(|r| r.own) {
            let source = &self.sources[rule.src];
            let (inbound, outbound) = (rule.dst_nodes.has(slot), source.nodes.has(slot));
            if !inbound && !outbound {
                continue;
            }
            hash.update(rule.core_print.to_be_bytes());
            hash.update([u8::from(inbound), u8::from(outbound)]);
            // A sum: the result may not depend on the order in which devices came.
            let peers = user.into_iter().flatten().map(|peer| {
                let print = self.world.device(*peer).map_or(0, |d| d.print);
                let part =
                    1 + 2 * u128::from(source.nodes.has(*peer)) + 4 * u128::from(rule.dst_nodes.has(*peer));
                print.wrapping_mul(part)
            });
            hash.update(peers.fold(0_u128, u128::wrapping_add).to_be_bytes());
        }
        self.print_own_logins(slot, device, &mut hash);
        let model = self.policy.model();
        for attr in self.attrs_for(model, device) {
            hash.update([4]);
            for name in &attr.attr {
                hash.update(name);
                hash.update([0]);
            }
            for (name, values) in &attr.app {
                hash.update(name);
                values.iter().for_each(|value| hash.update(value.to_string()));
            }
            attr.ip_pool.iter().for_each(|net| hash.update(net.to_string()));
        }
        hash.update([u8::from(model.randomize_client_port)]);
        for route in self.auto_approved(device) {
            hash.update(route.to_string());
        }
        wide(hash)
    }
}
