//! What one device does: its part is cut out of the sets when asked for.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::Serialize;

use super::compile::{Compiled, CompiledRule, Target, TargetKind, is_identity};
use super::ipset::IpSet;
use super::model::{Model, NodeAttr};
use super::nodeset::NodeSet;
use super::posture::Truth;
use super::selector::Selector;
use super::ssh::SshRule;
use super::world::{Device, set_overlaps};
use crate::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId, UnixInterval};

/// What one device lets in, offers and sees.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NodePolicy {
    /// What it lets in, destinations limited to what it answers for.
    pub ingress: Vec<FilterRule>,
    /// Who may log in as whom, in the order in which rules are tried.
    pub ssh: Vec<SshRule>,
    /// Capabilities others have at its applications.
    pub caps: Vec<Capability>,
    /// Its attributes.
    pub attrs: BTreeSet<String>,
    /// Configuration of its applications, by name.
    pub apps: BTreeMap<String, Vec<serde_json::Value>>,
    /// The networks it may take its IPv4 address from; everything if empty.
    pub ip_pools: BTreeSet<IpNet>,
    /// The networks it carries.
    pub approved_routes: BTreeSet<IpNet>,
    /// The networks it offers that `autoApprovers` lets it carry.
    pub auto_approved_routes: BTreeSet<IpNet>,
    /// The devices it needs to know, by name.
    pub peers: BTreeMap<String, Need>,
}

/// Why a device sees another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Need {
    /// It may open connections to the peer.
    pub may_reach: bool,
    /// The peer may open connections to it.
    pub may_be_reached_by: bool,
    /// The peer's routes it may use.
    pub routes: BTreeSet<IpNet>,
    /// It may use the peer as its exit node.
    pub exit: bool,
}

/// A capability of some sources at a device's applications.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Capability {
    /// The rule that gives it.
    pub id: RuleId,
    /// Where the rule stands.
    pub origin: String,
    /// Who has it.
    pub src: Vec<IpRange>,
    /// At which of the device's addresses.
    pub dst: Vec<IpRange>,
    /// `example.com/cap/name`.
    pub name: String,
    /// What the application makes of it.
    pub values: Vec<serde_json::Value>,
    /// When it holds; `None` is always.
    pub active: Option<Vec<UnixInterval>>,
}

impl Compiled {
    pub(super) fn fill_rule(&mut self, index: usize) {
        let rule = &self.rules[index];
        let mut nodes = NodeSet::new();
        for target in &rule.targets {
            match &target.kind {
                TargetKind::Identity(id) => nodes.extend(&self.world.identities.members[*id as usize]),
                TargetKind::Literal(set) => nodes.extend(&self.world.lookup(set, true)),
                TargetKind::Any | TargetKind::Own => nodes.extend(&self.world.everyone),
            }
        }
        let kept: NodeSet = nodes
            .iter()
            .filter(|slot| self.world.device(*slot).is_some_and(|d| self.lets_in(rule, *slot, d)))
            .collect();
        let print = kept
            .iter()
            .filter_map(|slot| self.world.device(slot))
            .fold(0_u128, |sum, d| sum.wrapping_add(rule.part_print(d)));
        let rule = &mut self.rules[index];
        rule.dst_nodes = kept;
        rule.dst_print = print;
    }

    /// Does the device let anything of the rule in?
    pub(super) fn lets_in(&self, rule: &CompiledRule, slot: usize, device: &Device) -> bool {
        if let Some(alt) = rule.dst_alt {
            let truth = self.alts[alt].truth[slot];
            let matches = match rule.action {
                Action::Allow => truth == Truth::True,
                Action::Deny => truth != Truth::False,
            };
            if !matches {
                return false;
            }
        }
        if rule.own {
            return device.user.is_some();
        }
        if let Some(via) = &rule.via
            && !via.iter().any(|id| device.has(*id))
        {
            return false;
        }
        rule.targets.iter().any(|t| self.answers_for(rule, t, device))
    }

    /// True if [`Compiled::part_of`] is not empty.
    fn answers_for(&self, rule: &CompiledRule, target: &Target, device: &Device) -> bool {
        match &target.kind {
            TargetKind::Literal(wanted) if rule.via.is_some() => {
                set_overlaps(wanted, &device.routes) || (device.exit && wanted == self.world.internet())
            }
            TargetKind::Any if rule.via.is_some() => set_overlaps(&self.world.overlay, &device.routes),
            TargetKind::Identity(_) | TargetKind::Own if rule.via.is_some() => false,
            TargetKind::Identity(id) => device.has(*id) && !device.own.is_empty(),
            TargetKind::Literal(set) => set_overlaps(set, &device.answers),
            TargetKind::Any if !rule.app => !device.answers.is_empty(),
            TargetKind::Any | TargetKind::Own => !device.own.is_empty(),
        }
    }

    /// The addresses a device answers for under one target of a rule.
    pub(super) fn part_of(&self, rule: &CompiledRule, target: &Target, device: &Device) -> IpSet {
        if rule.via.is_some() {
            let wanted = match &target.kind {
                TargetKind::Literal(set) => set,
                TargetKind::Any => &self.world.overlay,
                // Identities are reached directly, never through a carrier.
                TargetKind::Identity(_) | TargetKind::Own => return IpSet::new(),
            };
            let mut part = wanted.intersect(&device.routes);
            if device.exit && wanted == self.world.internet() {
                part.extend(wanted);
            }
            return part;
        }
        match &target.kind {
            TargetKind::Identity(id) if device.has(*id) => device.own.iter().copied().collect(),
            TargetKind::Identity(_) => IpSet::new(),
            TargetKind::Literal(set) => set.intersect(&device.answers),
            // Applications are at the device, not in the networks behind it, unless a rule names those.
            TargetKind::Any if rule.app => device.own.iter().copied().collect(),
            TargetKind::Any => device.answers.clone(),
            TargetKind::Own => device.own.iter().copied().collect(),
        }
    }

    /// What the device lets in of a rule.
    fn dst_at(&self, rule: &CompiledRule, device: &Device) -> Vec<FilterDst> {
        let mut out = Vec::new();
        for target in &rule.targets {
            for net in self.part_of(rule, target, device).ranges() {
                out.extend(target.ports.iter().map(|ports| FilterDst { net, ports: *ports }));
            }
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// The addresses that may be the source of a rule at one device.
    fn src_at(&self, rule: &CompiledRule, device: &Device) -> Vec<IpRange> {
        let source = &self.sources[rule.src];
        if !rule.own {
            return source.set.to_ranges();
        }
        self.same_user(rule, device).flat_map(|(_, d)| d.own.iter().copied()).collect::<IpSet>().to_ranges()
    }

    /// The devices of the device's user that a rule between own devices starts at.
    pub(super) fn same_user<'c>(
        &'c self,
        rule: &'c CompiledRule,
        device: &Device,
    ) -> impl Iterator<Item = (usize, &'c Device)> {
        let nodes = &self.sources[rule.src].nodes;
        device
            .user
            .and_then(|user| self.world.of_user.get(user))
            .into_iter()
            .flatten()
            .filter(move |slot| nodes.has(**slot))
            .filter_map(|slot| Some((*slot, self.world.device(*slot)?)))
    }

    pub(super) fn filter(&self, rule: &CompiledRule, src: Vec<IpRange>, dst: Vec<FilterDst>) -> FilterRule {
        FilterRule {
            id: rule.id,
            origin: rule.origin.clone(),
            action: rule.action,
            staged: rule.staged,
            src,
            dst,
            protos: rule.protos.clone(),
            active: rule.active.clone(),
        }
    }

    /// Where a rule stands now, `grants[3] line 41`. A device may hold an older line number, since an edit that only
    /// moves rules touches no device; the id is the stable name.
    pub fn origin_of(&self, id: RuleId) -> Option<&str> {
        self.rules.iter().find(|r| r.id == id).map(|r| r.origin.as_str())
    }

    /// Where a staged rule stands now; `None` for any other rule.
    pub fn staged_origin_of(&self, id: RuleId) -> Option<&str> {
        self.rules.iter().find(|r| r.staged && r.id == id).map(|r| r.origin.as_str())
    }

    /// The names of all devices, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.world.by_name.keys().map(String::as_str)
    }

    /// What the device lets in.
    pub fn ingress(&self, name: &str) -> Vec<FilterRule> {
        let Some((slot, device)) = self.world.named(name) else {
            return Vec::new();
        };
        self.rules
            .iter()
            .filter(|r| !r.app && r.dst_nodes.has(slot))
            .map(|r| self.filter(r, self.src_at(r, device), self.dst_at(r, device)))
            .filter(|r| !r.src.is_empty() && !r.dst.is_empty())
            .collect()
    }

    /// What the device may send: sources are its own addresses and routes, destinations what its peers answer for.
    pub fn egress(&self, name: &str) -> Vec<FilterRule> {
        let Some((slot, device)) = self.world.named(name) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        for rule in self.rules.iter().filter(|r| !r.app) {
            let source = &self.sources[rule.src];
            if !source.nodes.has(slot) {
                continue;
            }
            let (src, dst) = if rule.own {
                if device.user.is_none() {
                    continue;
                }
                (device.own.clone(), self.own_dst(rule, device))
            } else {
                (source.sent_by(device).to_ranges(), self.dst_all(rule))
            };
            if !src.is_empty() && !dst.is_empty() {
                out.push(self.filter(rule, src, dst));
            }
        }
        out
    }

    fn own_dst(&self, rule: &CompiledRule, device: &Device) -> Vec<FilterDst> {
        let mut out: Vec<FilterDst> = device
            .user
            .and_then(|user| self.world.of_user.get(user))
            .into_iter()
            .flatten()
            .filter(|slot| rule.dst_nodes.has(**slot))
            .filter_map(|slot| self.world.device(*slot))
            .flat_map(|d| self.dst_at(rule, d))
            .collect();
        out.sort_unstable();
        out.dedup();
        out
    }

    /// What all devices together let in of a rule.
    fn dst_all(&self, rule: &CompiledRule) -> Vec<FilterDst> {
        let mut out = Vec::new();
        let filtered = rule.dst_alt.is_some() || rule.via.is_some();
        for target in &rule.targets {
            let nets = match &target.kind {
                TargetKind::Identity(id) if !filtered => {
                    self.world.identities.addresses[*id as usize].to_ranges()
                }
                TargetKind::Any if !filtered => self.answers.to_ranges(),
                _ => rule
                    .dst_nodes
                    .iter()
                    .filter_map(|slot| self.world.device(slot))
                    .flat_map(|d| self.part_of(rule, target, d).to_ranges())
                    .collect::<IpSet>()
                    .to_ranges(),
            };
            for net in nets {
                out.extend(target.ports.iter().map(|ports| FilterDst { net, ports: *ports }));
            }
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// Everything about one device. `None` if it is not in the inventory.
    pub fn node(&self, name: &str) -> Option<NodePolicy> {
        let (slot, device) = self.world.named(name)?;
        let model = self.policy.model();
        let mut out = NodePolicy {
            ingress: self.ingress(name),
            ssh: self.ssh_at(slot, device),
            caps: self.caps_at(slot, device),
            approved_routes: device
                .node
                .approved_routes
                .intersection(&device.node.routable_ips)
                .copied()
                .collect(),
            auto_approved_routes: self.auto_approved(device),
            peers: self.peers_at(slot, device),
            ..NodePolicy::default()
        };
        out.attrs = self.attrs_of(model, device);
        for attr in self.attrs_for(model, device) {
            out.ip_pools.extend(&attr.ip_pool);
            for (app, values) in &attr.app {
                out.apps.entry(app.clone()).or_default().extend(values.iter().cloned());
            }
        }
        Some(out)
    }

    /// The attributes of a device.
    pub fn attributes(&self, name: &str) -> BTreeSet<String> {
        let named = self.world.named(name);
        named.map_or_else(BTreeSet::new, |(_, device)| self.attrs_of(self.policy.model(), device))
    }

    fn attrs_of(&self, model: &Model, device: &Device) -> BTreeSet<String> {
        let random = model.randomize_client_port.then(|| "randomize-client-port".to_owned());
        let given = self.attrs_for(model, device).flat_map(|entry| entry.attr.iter().cloned());
        given.chain(random).collect()
    }

    /// The entries of `nodeAttrs` that speak of a device.
    pub(super) fn attrs_for<'m>(
        &self,
        model: &'m Model,
        device: &Device,
    ) -> impl Iterator<Item = &'m NodeAttr> {
        model.node_attrs.iter().filter(|entry| entry.target.iter().any(|t| self.selects(&t.value, device)))
    }

    /// Is the device one of these? By identity or by one of its own addresses.
    pub(crate) fn selects(&self, selector: &Selector, device: &Device) -> bool {
        match selector {
            Selector::Any => true,
            other if is_identity(other) => self.world.identities.find(other).is_some_and(|id| device.has(id)),
            other => {
                let set = self.literal(other);
                device.own.iter().any(|r| set.overlaps(*r))
            }
        }
    }

    /// The capabilities that others have at its applications.
    pub fn capabilities(&self, name: &str) -> Vec<Capability> {
        self.world.named(name).map_or_else(Vec::new, |(slot, device)| self.caps_at(slot, device))
    }

    fn caps_at(&self, slot: usize, device: &Device) -> Vec<Capability> {
        let model = self.policy.model();
        let mut out = Vec::new();
        for rule in &self.rules {
            if !rule.app || rule.staged || !rule.dst_nodes.has(slot) {
                continue;
            }
            let src = self.src_at(rule, device);
            let dst: IpSet = self.dst_at(rule, device).into_iter().map(|d| d.net).collect();
            if src.is_empty() || dst.is_empty() {
                continue;
            }
            for (name, values) in &model.rules[rule.rule].app {
                out.push(Capability {
                    id: rule.id,
                    origin: rule.origin.clone(),
                    src: src.clone(),
                    dst: dst.to_ranges(),
                    name: name.clone(),
                    values: values.clone(),
                    active: rule.active.clone(),
                });
            }
        }
        out
    }

    pub(super) fn auto_approved(&self, device: &Device) -> BTreeSet<IpNet> {
        self.world.auto_approved(&device.node.routable_ips, &device.identities)
    }

    /// Whom a device needs to know: the same as [`Compiled::node`] says, without the rest.
    pub fn peers(&self, name: &str) -> Option<BTreeMap<String, Need>> {
        self.world.named(name).map(|(slot, device)| self.peers_at(slot, device))
    }

    fn peers_at(&self, slot: usize, device: &Device) -> BTreeMap<String, Need> {
        let (mut reach, mut reached) = (NodeSet::new(), NodeSet::new());
        let mut through: BTreeMap<usize, (BTreeSet<IpNet>, bool)> = BTreeMap::new();
        for rule in &self.rules {
            if rule.app || rule.staged || rule.action == Action::Deny {
                continue;
            }
            let source = &self.sources[rule.src];
            if rule.own {
                let Some(user) = device.user else { continue };
                let own = &self.world.of_user[user];
                if rule.dst_nodes.has(slot) {
                    reached.extend(&own.iter().copied().filter(|s| source.nodes.has(*s)).collect());
                }
                if source.nodes.has(slot) {
                    reach.extend(&own.iter().copied().filter(|s| rule.dst_nodes.has(*s)).collect());
                }
                continue;
            }
            if rule.dst_nodes.has(slot) {
                reached.extend(&source.nodes);
            }
            if source.nodes.has(slot) {
                reach.extend(&rule.dst_nodes);
                self.routes_through(rule, &mut through);
            }
        }
        let (no_reach, not_reached) = self.silenced(slot, device);
        reach.subtract(&no_reach);
        reached.subtract(&not_reached);
        reach.remove(slot);
        reached.remove(slot);
        let mut seen = reach.clone();
        seen.extend(&reached);
        seen.iter()
            .filter_map(|peer| {
                let (routes, exit) = through.remove(&peer).unwrap_or_default();
                let need =
                    Need { may_reach: reach.has(peer), may_be_reached_by: reached.has(peer), routes, exit };
                Some((self.world.device(peer)?.name.clone(), need))
            })
            .collect()
    }

    /// Devices that this one can certainly not reach, and that can certainly not reach it, since a denial without
    /// conditions of time covers everything between them. It need not know of them (promise 3).
    pub(super) fn silenced(&self, slot: usize, device: &Device) -> (NodeSet, NodeSet) {
        let (mut no_reach, mut not_reached) = (NodeSet::new(), NodeSet::new());
        let plain = |d: &Device| d.routes.is_empty() && !d.exit;
        for rule in &self.rules {
            let whole = rule.action == Action::Deny && rule.every_proto && !rule.staged && !rule.own;
            if !whole || rule.active.is_some() {
                continue;
            }
            let source = &self.sources[rule.src];
            let wholly_from = |s: usize, d: &Device| {
                source.nodes.has(s) && source.named.has(s) && (source.key.any || plain(d))
            };
            let wholly_to = |s: usize, d: &Device| {
                let covers = |t: &Target| {
                    t.ports.contains(&PortRange::ALL)
                        && match t.kind {
                            TargetKind::Any => true,
                            TargetKind::Identity(id) => d.has(id) && plain(d),
                            TargetKind::Literal(_) | TargetKind::Own => false,
                        }
                };
                rule.dst_nodes.has(s) && rule.targets.iter().any(covers)
            };
            if wholly_from(slot, device) {
                let to = rule.dst_nodes.iter();
                no_reach.extend(
                    &to.filter(|s| self.world.device(*s).is_some_and(|d| wholly_to(*s, d))).collect(),
                );
            }
            if wholly_to(slot, device) {
                let from = source.nodes.iter();
                not_reached.extend(
                    &from.filter(|s| self.world.device(*s).is_some_and(|d| wholly_from(*s, d))).collect(),
                );
            }
        }
        (no_reach, not_reached)
    }

    fn routes_through(&self, rule: &CompiledRule, through: &mut BTreeMap<usize, (BTreeSet<IpNet>, bool)>) {
        for router in &self.world.routers {
            if !rule.dst_nodes.has(*router) {
                continue;
            }
            let Some(device) = self.world.device(*router) else {
                continue;
            };
            let entry = through.entry(*router).or_default();
            for target in &rule.targets {
                let part = self.part_of(rule, target, device);
                for route in device.node.subnet_routes() {
                    if part.overlaps(route.into()) {
                        entry.0.insert(route);
                    }
                }
                entry.1 |=
                    device.exit && part.range_count() > 1 && set_overlaps(&part, self.world.internet());
            }
        }
    }
}
