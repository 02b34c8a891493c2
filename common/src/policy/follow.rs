//! Following changes: fingerprints, one device at a time, and when to look again.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::compile::{Compiled, CompiledRule, TargetKind, conditions, evaluate, print_set};
use super::inventory::Node;
use super::nodeset::NodeSet;
use super::posture::{Condition, Truth};
use super::sources::Touched;
use super::world::{AddressConflict, Device, wide};

/// A hash of a device's whole policy: it differs if anything the device must be told differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub u128);

impl Compiled {
    /// A hash of the device's whole policy, egress included.
    pub fn fingerprint(&self, name: &str) -> Option<Fingerprint> {
        let slot = *self.world.by_name.get(name)?;
        self.prints.get(slot).copied()
    }

    pub(super) fn print_of(&self, slot: usize) -> Fingerprint {
        let Some(device) = self.world.device(slot) else {
            return Fingerprint(0);
        };
        let mut hash = Sha256::new();
        hash.update(device.print.to_be_bytes());
        let mut world_routes = false;
        for rule in &self.rules {
            let source = &self.sources[rule.src];
            let (inbound, outbound) = (rule.dst_nodes.has(slot), source.nodes.has(slot));
            if !inbound && !outbound {
                continue;
            }
            hash.update(rule.core_print.to_be_bytes());
            hash.update([u8::from(inbound), u8::from(outbound)]);
            if rule.own {
                let user = device.user.and_then(|u| self.world.of_user.get(u));
                // A sum: the result may not depend on the order in which devices came.
                let peers = user.into_iter().flatten().map(|peer| {
                    let print = self.world.device(*peer).map_or(0, |d| d.print);
                    let part = 1
                        + 2 * u128::from(source.nodes.has(*peer))
                        + 4 * u128::from(rule.dst_nodes.has(*peer));
                    print.wrapping_mul(part)
                });
                let sum = peers.fold(0_u128, u128::wrapping_add);
                hash.update(sum.to_be_bytes());
                continue;
            }
            if inbound {
                hash.update(source.print.wrapping_add(source.base_print).to_be_bytes());
                for target in &rule.targets {
                    if let TargetKind::Identity(id) = target.kind {
                        hash.update([u8::from(device.has(id))]);
                    }
                }
            }
            if outbound {
                hash.update(rule.dst_print.to_be_bytes());
                // Whether this device is a source by an own address or by a route shows in what it sends.
                for range in device.own.iter().copied().chain(device.routes.ranges()) {
                    hash.update([u8::from(source.set.overlaps(range))]);
                }
                world_routes |= rule.targets.iter().any(|t| t.kind == TargetKind::Any);
            }
        }
        if world_routes {
            hash.update(self.answers_print.to_be_bytes());
        }
        self.print_ssh(slot, device, &mut hash);
        let model = self.policy.model();
        for attr in &model.node_attrs {
            if attr.target.iter().any(|t| self.selects(&t.value, device)) {
                hash.update([4]);
                for name in &attr.attr {
                    hash.update(name);
                    hash.update([0]);
                }
                for (name, values) in &attr.app {
                    hash.update(name);
                    for value in values {
                        hash.update(value.to_string());
                    }
                }
                for net in &attr.ip_pool {
                    hash.update(net.to_string());
                }
            }
        }
        hash.update([u8::from(model.randomize_client_port)]);
        for route in self.auto_approved(model, device) {
            hash.update(route.to_string());
        }
        Fingerprint(wide(hash))
    }

    /// The time it was compiled for, in seconds since the Unix epoch.
    pub const fn now(&self) -> i64 {
        self.now
    }

    /// The devices whose policy differs between two compilations, also those only one of them knows. Sorted.
    pub fn changed_since(&self, old: &Self) -> Vec<String> {
        let mut out: BTreeSet<&str> = BTreeSet::new();
        for name in self.names().chain(old.names()) {
            if self.fingerprint(name) != old.fingerprint(name) {
                out.insert(name);
            }
        }
        out.into_iter().map(str::to_owned).collect()
    }

    /// Puts a device in, replaces it or takes it out (`None`), and recompiles what depends on it. Returns the names of
    /// the devices whose policy changed, sorted; a device that came or went is among them.
    ///
    /// # Errors
    /// An address of the device is another device's; nothing changes then.
    pub fn set_node(
        &mut self,
        name: &str,
        node: Option<&Node>,
        now: i64,
    ) -> Result<Vec<String>, AddressConflict> {
        if let Some(conflict) = node.and_then(|n| self.world.conflict(name, n)) {
            return Err(conflict);
        }
        if node.is_none() && !self.world.by_name.contains_key(name) {
            return Ok(Vec::new());
        }
        let slot = self.world.slot_for(name);
        let derived = node.map(|n| self.world.derive(name, n, now));
        let old = self.world.detach(slot);
        if let Some(device) = derived {
            self.world.attach(slot, device);
        }
        let mut affected = NodeSet::new();
        affected.insert(slot);
        self.follow(slot, old.as_ref(), now, &mut affected);

        self.prints.resize(self.world.devices.len(), Fingerprint(0));
        let mut changed = BTreeSet::new();
        for slot in affected.iter() {
            let print = self.print_of(slot);
            if print != self.prints[slot] {
                self.prints[slot] = print;
                changed.extend(self.world.device(slot).map(|d| d.name.clone()));
            }
        }
        if old.is_none() != node.is_none() {
            changed.insert(name.to_owned());
        }
        if node.is_none() {
            self.world.release(slot);
        }
        self.schedule();
        Ok(changed.into_iter().collect())
    }

    /// Brings postures, sources and rules up to date after a slot changed; collects who may be affected.
    pub(super) fn follow(&mut self, slot: usize, old: Option<&Device>, now: i64, affected: &mut NodeSet) {
        let policy = self.policy.clone();
        for i in 0..self.alts.len() {
            let truth = self
                .world
                .device(slot)
                .map_or(Truth::Unknown, |d| evaluate(&self.world, policy.model(), &self.alts[i], d, now));
            let alt = &mut self.alts[i];
            if alt.truth.len() <= slot {
                alt.truth.resize(slot + 1, Truth::Unknown);
            }
            alt.truth[slot] = truth;
        }
        let new = self.world.device(slot);
        let routes_differ = old.map(|d| (&d.routes, d.exit)) != new.map(|d| (&d.routes, d.exit));
        if routes_differ {
            self.routes = self.world.all_routes();
        }
        // Egress to "*" names every address outside the overlay.
        let outside =
            |d: Option<&Device>| d.is_some_and(|d| d.own.iter().any(|r| !self.world.overlay.covers(*r)));
        let star_differs = routes_differ || outside(old) || outside(new);
        if star_differs {
            self.answers = self.world.all_answers();
            self.answers_print = print_set(&self.answers);
        }
        let mut touched = vec![Touched::default(); self.sources.len()];
        for (i, touched) in touched.iter_mut().enumerate() {
            *touched = if routes_differ && self.sources[i].key.any {
                self.fill_source(i);
                Touched { addresses: true, people: true }
            } else {
                self.touch_source(i, slot, old)
            };
        }
        for i in 0..self.rules.len() {
            let before = self.rules[i].dst_print;
            let was = self.rules[i].dst_nodes.remove(slot);
            if let (true, Some(old)) = (was, old) {
                let part = self.rules[i].part_print(old);
                self.rules[i].dst_print = before.wrapping_sub(part);
            }
            let device = self.world.device(slot).filter(|d| self.lets_in(&self.rules[i], slot, d));
            let part = device.map(|d| self.rules[i].part_print(d));
            if let Some(part) = part {
                let rule = &mut self.rules[i];
                rule.dst_nodes.insert(slot);
                rule.dst_print = rule.dst_print.wrapping_add(part);
            }
            let rule = &self.rules[i];
            if rule.own {
                continue;
            }
            if touched[rule.src].addresses {
                affected.extend(&rule.dst_nodes);
            }
            let star = star_differs && rule.targets.iter().any(|t| t.kind == TargetKind::Any);
            if rule.dst_print != before || star {
                affected.extend(&self.sources[rule.src].nodes);
            }
        }
        for user in [old, self.world.device(slot)].into_iter().flatten().filter_map(|d| d.user) {
            affected.extend(&self.world.of_user[user].iter().copied().collect());
        }
        self.follow_ssh(&touched, affected);
    }

    /// When the result should be worked out again although nothing was edited: a fact becomes stale, a rule expires,
    /// or windows are needed beyond the horizon. Seconds since the Unix epoch.
    pub fn reevaluate_at(&self) -> Option<i64> {
        self.reevaluate_at
    }

    pub(super) fn schedule(&mut self) {
        let model = self.policy.model();
        let mut next: Option<i64> = None;
        let mut sooner = |at: i64| {
            if at > self.now {
                next = Some(next.map_or(at, |n: i64| n.min(at)));
            }
        };
        let clock = self
            .alts
            .iter()
            .flat_map(|a| &a.any_of)
            .flat_map(|all| conditions(model, all))
            .any(Condition::is_time);
        if clock || model.rules.iter().any(|r| r.when.is_some()) {
            sooner(self.now.saturating_add((self.horizon_s / 2).max(60)));
        }
        model.rules.iter().filter_map(|r| r.expires).for_each(&mut sooner);
        let facts: BTreeSet<&str> =
            self.alts.iter().flat_map(|a| &a.any_of).flatten().map(String::as_str).collect();
        if !facts.is_empty() {
            let wanted: Vec<&Condition> = facts
                .iter()
                .filter_map(|p| model.postures.get(*p))
                .flat_map(|p| p.value.iter().map(|c| &c.value))
                .filter(|c| !c.is_time())
                .collect();
            for slot in self.world.everyone.iter() {
                let Some(device) = self.world.device(slot) else {
                    continue;
                };
                for condition in &wanted {
                    let key = condition.key();
                    let key = key.strip_prefix("attest:").unwrap_or(key);
                    let left = self
                        .world
                        .fact(device, key)
                        .and_then(|f| condition.stale_in(&f, self.now - device.since));
                    if let Some(left) = left {
                        sooner(self.now.saturating_add(left));
                    }
                }
            }
        }
        self.reevaluate_at = next;
    }
}

impl CompiledRule {
    /// A device's share of `dst_print`: differs if what the device lets in of the rule differs.
    pub(super) fn part_print(&self, device: &Device) -> u128 {
        let mut weight = 1_u128;
        for target in &self.targets {
            if let TargetKind::Identity(id) = target.kind {
                weight = weight.wrapping_mul(31).wrapping_add(2 * u128::from(device.has(id)));
            }
        }
        device.print.wrapping_mul(weight | 1)
    }
}
