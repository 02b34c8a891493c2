//! Peer relays: which devices a grant lets carry sealed packets, and for whom.
//!
//! A grant with one of [`RELAY_CAPABILITIES`] names in `dst` who relays and in `src` for whom. It opens no port of the
//! overlay. A device uses it, and is it, by its own addresses only: what stands behind a route is neither. A denial of
//! everything between the two ends it too.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::compile::{Compiled, CompiledRule};
use super::nodeset::NodeSet;
use super::world::Device;
use crate::filter::Action;

/// The capabilities that make a device a peer relay: ours, and the one that files for Tailscale and Headscale have.
pub const RELAY_CAPABILITIES: [&str; 2] = ["warren/cap/relay", "tailscale.com/cap/relay"];

/// A device that both ends of a connection may use as a relay, should it run as one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CommonRelay {
    /// The device, for people.
    pub device: String,
    /// The grants that say so: `grants[3] line 41`.
    pub grants: BTreeSet<String>,
}

impl Compiled {
    /// The names of the devices that may use `relay` as a relay at `now` (seconds since the Unix epoch), without itself.
    /// Whether it runs as one is its owner's to say.
    pub fn relay_users(&self, relay: &str, now: i64) -> BTreeSet<String> {
        let Some((slot, device)) = self.world.named(relay) else { return BTreeSet::new() };
        let users = self.users_of_relay(slot, device, now);
        users.iter().filter_map(|slot| Some(self.world.device(slot)?.name.clone())).collect()
    }

    fn users_of_relay(&self, slot: usize, device: &Device, now: i64) -> NodeSet {
        let mut users = NodeSet::new();
        for rule in self.relay_rules().filter(|rule| self.makes_relay(rule, slot, device, now)) {
            users.extend(&self.users_by(rule, device));
        }
        if users.is_empty() {
            return users;
        }
        let (_, denied) = self.silenced(slot, device);
        users.subtract(&denied);
        users.remove(slot);
        users
    }

    fn relay_rules(&self) -> impl Iterator<Item = &CompiledRule> {
        self.rules.iter().filter(|rule| rule.app && self.gives_relay(rule))
    }

    /// True if the rule lets devices relay, at some time.
    pub(super) fn gives_relay(&self, rule: &CompiledRule) -> bool {
        let given = self.policy.model().rules.get(rule.rule).map(|r| &r.app);
        let given = given.is_some_and(|app| RELAY_CAPABILITIES.iter().any(|name| app.contains_key(*name)));
        given && rule.action == Action::Allow && !rule.staged
    }

    fn makes_relay(&self, rule: &CompiledRule, slot: usize, device: &Device, now: i64) -> bool {
        let active = rule.active.as_ref();
        active.is_none_or(|windows| windows.iter().any(|w| w.from <= now && now < w.until))
            && rule.dst_nodes.has(slot)
            && rule.targets.iter().any(|target| {
                let part = self.part_of(rule, target, device);
                device.own.iter().any(|own| part.overlaps(*own))
            })
    }

    /// Whom a rule lets use the device as a relay.
    fn users_by(&self, rule: &CompiledRule, device: &Device) -> NodeSet {
        if rule.own {
            return self.same_user(rule, device).map(|(slot, _)| slot).collect();
        }
        let source = &self.sources[rule.src];
        let in_person = |slot: &usize| {
            let own = self.world.device(*slot).map(|d| d.own.as_slice()).unwrap_or_default();
            own.iter().any(|range| source.set.overlaps(*range))
        };
        source.nodes.iter().filter(in_person).collect()
    }

    /// The devices that both of two may use as a relay.
    pub(super) fn common_relays(&self, a: usize, b: usize, now: i64) -> Vec<CommonRelay> {
        let mut found: BTreeMap<usize, BTreeSet<String>> = BTreeMap::new();
        for rule in self.relay_rules() {
            for slot in rule.dst_nodes.iter() {
                let Some(device) = self.world.device(slot) else { continue };
                if !self.makes_relay(rule, slot, device, now) {
                    continue;
                }
                let by = self.users_by(rule, device);
                if by.has(a) || by.has(b) {
                    found.entry(slot).or_default().insert(rule.origin.clone());
                }
            }
        }
        let serves_both = |(slot, grants): (usize, BTreeSet<String>)| {
            let device = self.world.device(slot)?;
            let users = self.users_of_relay(slot, device, now);
            (users.has(a) && users.has(b)).then(|| CommonRelay { device: self.label(device), grants })
        };
        found.into_iter().filter_map(serves_both).collect()
    }
}
