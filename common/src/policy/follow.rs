//! Following changes: one device at a time, and when to look again.

use std::collections::BTreeSet;

use super::compile::{Compiled, evaluate, print_set};
use super::inventory::Node;
use super::posture::{Condition, Truth};
use super::prints;
use super::world::{AddressConflict, Device};

impl Compiled {
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
        self.prints.resize(self.world.devices.len());
        let before = self.prints.clone();
        self.follow(slot, old.as_ref(), now);

        let slots = self.prints.differing(&before);
        let mut changed: Vec<String> =
            slots.filter_map(|slot| self.world.device(slot)).map(|d| d.name.clone()).collect();
        if old.is_none() != node.is_none() && !changed.iter().any(|n| n == name) {
            changed.push(name.to_owned());
        }
        changed.sort_unstable();
        if node.is_none() {
            self.world.release(slot);
        }
        Ok(changed)
    }

    /// Brings postures, sources, rules and fingerprints up to date after a slot changed.
    fn follow(&mut self, slot: usize, old: Option<&Device>, now: i64) {
        self.follow_facts(slot, now);
        let everything_differs = self.follow_world(slot, old);
        let answers_before = std::mem::replace(&mut self.answers_print, print_set(&self.answers));
        let before: Vec<_> = self.sources.iter().map(|s| (s.print, s.base_print, s.people_print())).collect();
        for index in 0..self.sources.len() {
            self.touch_source(index, slot, old);
            if everything_differs && self.sources[index].is_of_everything() {
                self.refresh_base(index);
            }
        }
        for index in 0..self.rules.len() {
            let dst_before = self.rules[index].dst_print;
            self.touch_rule(index, slot, old);
            let rule = &self.rules[index];
            if rule.own {
                continue;
            }
            let source = &self.sources[rule.src];
            let (print, base_print, _) = before[rule.src];
            if (source.print, source.base_print) != (print, base_print) {
                let amount = prints::inbound(rule, source.print, source.base_print)
                    .wrapping_sub(prints::inbound(rule, print, base_print));
                self.prints.add(&rule.dst_nodes, amount, Some(slot));
            }
            let answers_differ = self.answers_print != answers_before && rule.names_everything();
            if !rule.app && (rule.dst_print != dst_before || answers_differ) {
                let amount = prints::outbound(rule, rule.dst_print, self.answers_print)
                    .wrapping_sub(prints::outbound(rule, dst_before, answers_before));
                self.prints.add(&source.nodes, amount, Some(slot));
            }
        }
        for index in 0..self.ssh.len() {
            self.touch_ssh(index, slot);
            let rule = &self.ssh[index];
            let (people, people_before) = (self.sources[rule.src].people_print(), before[rule.src].2);
            if people != people_before {
                let amount =
                    prints::login(rule.print, people).wrapping_sub(prints::login(rule.print, people_before));
                self.prints.add(&rule.at, amount, Some(slot));
            }
        }
        let sum = self.shared_of(slot);
        self.prints.set_shared(slot, sum);
        let users = [old, self.world.device(slot)].into_iter().flatten().filter_map(|d| d.user);
        let own: BTreeSet<usize> =
            users.flat_map(|u| self.world.of_user[u].iter().copied()).chain([slot]).collect();
        for slot in own {
            let print = self.local_of(slot);
            self.prints.set_local(slot, print);
        }
    }

    /// Which postures the device meets, and when that must be looked at again.
    fn follow_facts(&mut self, slot: usize, now: i64) {
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
        let due = self.facts_due(slot);
        self.due.set(slot, due);
    }

    /// Updates what the devices together answer for. True if that, or their routes, are others now.
    fn follow_world(&mut self, slot: usize, old: Option<&Device>) -> bool {
        let new = self.world.device(slot);
        let routes_differ = old.map(|d| (&d.routes, d.exit)) != new.map(|d| (&d.routes, d.exit));
        // Egress to "*" names every address outside the overlay.
        let outside =
            |d: Option<&Device>| d.is_some_and(|d| d.own.iter().any(|r| !self.world.overlay.covers(*r)));
        if !routes_differ && !outside(old) && !outside(new) {
            return false;
        }
        if routes_differ {
            self.routes = self.world.all_routes();
        }
        self.answers = self.world.all_answers(&self.routes);
        true
    }

    /// Takes a device out of a rule's destinations, and puts it in as it now is.
    fn touch_rule(&mut self, index: usize, slot: usize, old: Option<&Device>) {
        let new = self.world.device(slot).filter(|d| self.lets_in(&self.rules[index], slot, d));
        let part = new.map(|d| self.rules[index].part_print(d));
        let rule = &mut self.rules[index];
        if let (true, Some(old)) = (rule.dst_nodes.remove(slot), old) {
            rule.dst_print = rule.dst_print.wrapping_sub(rule.part_print(old));
        }
        if let Some(part) = part {
            rule.dst_nodes.insert(slot);
            rule.dst_print = rule.dst_print.wrapping_add(part);
        }
    }

    /// When the result should be worked out again although nothing was edited: a fact becomes stale, a rule expires,
    /// or windows are needed beyond the horizon. Seconds since the Unix epoch.
    pub fn reevaluate_at(&self) -> Option<i64> {
        self.due.rules.into_iter().chain(self.due.first()).min()
    }

    /// Works out [`Compiled::reevaluate_at`] for everything.
    pub(super) fn schedule(&mut self) {
        let model = self.policy.model();
        let used: BTreeSet<&str> =
            self.alts.iter().flat_map(|a| &a.any_of).flatten().map(String::as_str).collect();
        let used = used.into_iter().filter_map(|p| model.postures.get(p));
        let facts = used.flat_map(|p| p.value.iter().map(|c| &c.value)).filter(|c| !c.is_time());
        let watched = facts.cloned().collect();
        let mut ends: Vec<i64> = model.rules.iter().filter_map(|r| r.expires).collect();
        if self.windowed {
            ends.push(self.now.saturating_add((self.horizon_s / 2).max(60)));
        }
        // Filters open and close their windows themselves; lists of relays have none.
        let relays = self.rules.iter().filter(|r| r.app && self.gives_relay(r));
        ends.extend(relays.flat_map(|r| r.active.iter().flatten()).flat_map(|w| [w.from, w.until]));
        let rules = ends.into_iter().filter(|at| *at > self.now).min();
        self.due = Due { watched, rules, ..Due::default() };
        for slot in self.world.everyone.clone().iter() {
            let due = self.facts_due(slot);
            self.due.set(slot, due);
        }
    }

    /// When the first fact about a device that a condition looks at becomes stale.
    fn facts_due(&self, slot: usize) -> Option<i64> {
        let device = self.world.device(slot)?;
        let elapsed = self.now.saturating_sub(device.since);
        let due = self.due.watched.iter().filter_map(|condition| {
            let key = condition.key();
            let fact = self.world.fact(device, key.strip_prefix("attest:").unwrap_or(key))?;
            Some(self.now.saturating_add(condition.stale_in(&fact, elapsed)?))
        });
        due.filter(|at| *at > self.now).min()
    }
}

/// When something must be looked at again though nothing was edited, in seconds since the Unix epoch.
#[derive(Clone, Debug, Default)]
pub(super) struct Due {
    /// The conditions over facts that rules ask for.
    watched: Vec<Condition>,
    /// For the rules' sake.
    rules: Option<i64>,
    /// For the sake of a device's facts, by slot.
    of: Vec<Option<i64>>,
    order: BTreeSet<(i64, usize)>,
}

impl Due {
    fn set(&mut self, slot: usize, at: Option<i64>) {
        if slot >= self.of.len() {
            self.of.resize(slot + 1, None);
        }
        if let Some(was) = std::mem::replace(&mut self.of[slot], at) {
            self.order.remove(&(was, slot));
        }
        self.order.extend(at.map(|at| (at, slot)));
    }

    fn first(&self) -> Option<i64> {
        self.order.first().map(|(at, _)| *at)
    }
}
