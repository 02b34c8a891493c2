//! Policy and inventory to what every device does. Nothing here looks at all pairs of devices: sources and
//! destinations are sets, and a device's part is cut out of them when asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sha2::{Digest, Sha256};

use super::Policy;
use super::check::resolve_ipsets;
use super::diagnostic::{Diagnostic, Severity};
use super::follow::Due;
use super::inventory::Inventory;
use super::ipset::IpSet;
use super::model::{At, LoginUser, Model, Rule};
use super::nodeset::NodeSet;
use super::posture::{Condition, Truth};
use super::prints::Prints;
use super::selector::{Autogroup, Selector};
use super::sources::{SourceKey, SourceSet};
use super::ssh::CompiledSsh;
use super::when;
use super::world::{AddressConflict, Device, World, wide};
use crate::filter::{Action, DEFAULT_PROTOS, PortRange, RuleId, UnixInterval};

/// When something is in force; `None` is always.
pub(super) type Windows = Option<Vec<UnixInterval>>;

/// A policy compiled against an inventory. Keeps what it needs to follow changes of single devices.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub(crate) policy: Policy,
    pub(crate) world: World,
    pub(crate) sources: Vec<SourceSet>,
    pub(crate) alts: Vec<Alt>,
    pub(crate) rules: Vec<CompiledRule>,
    pub(crate) ssh: Vec<CompiledSsh>,
    pub(crate) literals: BTreeMap<Selector, IpSet>,
    pub(super) prints: Prints,
    /// What `*` covers besides the overlay: changes with routes only.
    pub(super) routes: IpSet,
    /// Everything any device answers for.
    pub(super) answers: IpSet,
    pub(super) answers_print: u128,
    pub(super) now: i64,
    pub(super) horizon_s: i64,
    /// Some rule depends on the time beyond its end.
    pub(super) windowed: bool,
    pub(super) due: Due,
}

/// Postures of which one must be met: an "or" of "and"s. Conditions over the clock are not in here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Alt {
    pub(crate) any_of: Vec<BTreeSet<String>>,
    /// By slot.
    pub(crate) truth: Vec<Truth>,
}

#[derive(Clone, Debug)]
pub(crate) struct CompiledRule {
    /// Which rule of the model.
    pub(crate) rule: usize,
    pub(crate) id: RuleId,
    pub(crate) origin: String,
    pub(crate) action: Action,
    pub(crate) staged: bool,
    /// Gives capabilities and opens nothing.
    pub(crate) app: bool,
    pub(crate) protos: Vec<u8>,
    /// A denial of every protocol.
    pub(super) every_proto: bool,
    pub(crate) active: Option<Vec<UnixInterval>>,
    pub(crate) src: usize,
    pub(crate) dst_alt: Option<usize>,
    pub(crate) targets: Vec<Target>,
    /// Only between devices of one user.
    pub(crate) own: bool,
    /// Identities of which one is needed to carry this traffic.
    pub(crate) via: Option<Vec<u32>>,
    /// Devices that let something of it in.
    pub(crate) dst_nodes: NodeSet,
    pub(super) dst_print: u128,
    pub(super) core_print: u128,
}

#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) kind: TargetKind,
    pub(crate) ports: Vec<PortRange>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TargetKind {
    Identity(u32),
    Literal(IpSet),
    Any,
    /// The devices of the source's user.
    Own,
}

/// Compiles `policy` against `inventory` at `now` (seconds since the Unix epoch). Windows of time are worked out up to
/// `now + horizon_s`, at most [`super::MAX_HORIZON_S`].
///
/// # Errors
/// What only the inventory shows: two devices with one address, a mail domain that is not this network's.
pub fn compile(
    policy: &Policy,
    inventory: &Inventory,
    now: i64,
    horizon_s: i64,
) -> Result<Compiled, Vec<Diagnostic>> {
    let model = policy.model();
    check_domains(policy, inventory)?;
    let mut world = World::new(model, inventory, &identities_of(model));
    let mut devices = Vec::with_capacity(inventory.nodes.len());
    let mut seen = BTreeMap::new();
    for (name, node) in &inventory.nodes {
        for addr in node.addresses() {
            if let Some(first) = seen.insert(addr, name) {
                let conflict = AddressConflict { addr, first: first.clone(), second: name.clone() };
                return Err(vec![Diagnostic::general(Severity::Error, conflict.to_string())]);
            }
        }
        devices.push(world.derive(name, node, now));
    }
    world.attach_all(devices);
    let routes = world.all_routes();
    let answers = world.all_answers(&routes);
    let mut compiled = Compiled {
        policy: policy.clone(),
        routes,
        answers_print: print_set(&answers),
        answers,
        world,
        sources: Vec::new(),
        alts: Vec::new(),
        rules: Vec::new(),
        ssh: Vec::new(),
        literals: literals_of(model),
        prints: Prints::default(),
        now,
        horizon_s,
        windowed: false,
        due: Due::default(),
    };
    compiled.build();
    Ok(compiled)
}

/// Every identity the policy speaks of.
fn identities_of(model: &Model) -> BTreeSet<Selector> {
    let mut out = BTreeSet::new();
    let rules = model.rules.iter().flat_map(|r| r.src.iter().chain(&r.dst).chain(&r.via));
    let ssh = model.ssh.iter().flat_map(|s| s.src.iter().chain(&s.dst));
    let tests = model.ssh_tests.iter().flat_map(|t| t.dst.iter().chain(std::iter::once(&t.src)));
    let approvers = model.route_approvers.iter().flat_map(|(_, who)| who).chain(&model.exit_approvers);
    let attrs = model.node_attrs.iter().flat_map(|a| &a.target);
    for at in rules.chain(ssh).chain(tests).chain(approvers).chain(attrs) {
        if is_identity(&at.value) {
            out.insert(at.value.clone());
        }
    }
    for test in &model.tests {
        let texts = test.accept.iter().chain(&test.deny);
        let hosts = texts.filter_map(|t| Some(t.value.rsplit_once(':')?.0));
        for text in hosts.chain(std::iter::once(test.src.value.as_str())) {
            if let Ok(selector) = Selector::parse(text)
                && is_identity(&selector)
            {
                out.insert(selector);
            }
        }
    }
    out
}

pub(crate) fn is_identity(selector: &Selector) -> bool {
    matches!(
        selector,
        Selector::User(_)
            | Selector::Domain(_)
            | Selector::Group(_)
            | Selector::Tag(_)
            | Selector::Auto(Autogroup::Member | Autogroup::Tagged | Autogroup::Role(_))
    )
}

/// Hosts and IP sets with their addresses.
fn literals_of(model: &Model) -> BTreeMap<Selector, IpSet> {
    let mut out: BTreeMap<Selector, IpSet> = model
        .hosts
        .iter()
        .map(|(name, at)| (Selector::Host(name.clone()), IpSet::from_iter([at.value])))
        .collect();
    for (name, set) in resolve_ipsets(model) {
        out.insert(Selector::IpSet(name), set);
    }
    out
}

fn check_domains(policy: &Policy, inventory: &Inventory) -> Result<(), Vec<Diagnostic>> {
    let domains = inventory.domains();
    if domains.is_empty() {
        return Ok(());
    }
    let model = policy.model();
    let mut named = Vec::new();
    let rules = model.rules.iter().flat_map(|r| r.src.iter().chain(&r.dst));
    let ssh = model.ssh.iter().flat_map(|s| s.src.iter().chain(&s.dst));
    for at in rules.chain(ssh) {
        if let Selector::Domain(domain) = &at.value {
            named.push((at.span, domain.clone()));
        }
    }
    for ssh in &model.ssh {
        for user in &ssh.users {
            if let LoginUser::Localpart(domain) = &user.value {
                named.push((user.span, domain.clone()));
            }
        }
    }
    let found: Vec<Diagnostic> = named
        .into_iter()
        .filter(|(_, domain)| !domains.contains(domain))
        .map(|(span, domain)| {
            let own: Vec<&str> = domains.iter().map(String::as_str).collect();
            policy.source().locate(
                Severity::Error,
                span,
                format!("{domain} is not associated with this network and cannot be used in *@<domain> expressions"),
                Some(format!("this network's domain is {}", own.join(", "))),
            )
        })
        .collect();
    if found.is_empty() { Ok(()) } else { Err(found) }
}

impl Compiled {
    fn build(&mut self) {
        let policy = self.policy.clone();
        let model = policy.model();
        let names = self.world.identities.names();
        let mut source_index: BTreeMap<SourceKey, usize> = BTreeMap::new();
        let deny_protos = every_proto(model);
        for (index, rule) in model.rules.iter().enumerate() {
            self.add_rule(model, index, rule, (&deny_protos, &names), &mut source_index);
        }
        for ssh in &model.ssh {
            let alts = self.alternatives(model, &[], &ssh.src_posture, Action::Allow);
            for (windows, alt) in alts {
                let src = self.source(&mut source_index, &ssh.src, alt, false);
                self.windowed |= windows.is_some();
                self.ssh.push(CompiledSsh::new(ssh, src, windows));
            }
        }
        for i in 0..self.sources.len() {
            self.fill_source(i);
        }
        for i in 0..self.rules.len() {
            self.fill_rule(i);
        }
        for i in 0..self.ssh.len() {
            self.fill_ssh(i);
        }
        self.fill_prints();
        self.schedule();
    }

    fn add_rule(
        &mut self,
        model: &Model,
        index: usize,
        rule: &Rule,
        (deny_protos, names): (&[u8], &[String]),
        source_index: &mut BTreeMap<SourceKey, usize>,
    ) {
        let Some(base) = self.windows(rule) else {
            return;
        };
        let action = rule.section.action();
        let defaults: &[At<String>] = if action == Action::Deny || rule.ignore_default_posture {
            &[]
        } else {
            &model.default_src_posture
        };
        let via = (!rule.via.is_empty()).then(|| {
            rule.via.iter().filter_map(|v| self.world.identities.find(&v.value)).collect::<Vec<_>>()
        });
        let src_alts = self.alternatives(model, defaults, &rule.src_posture, action);
        let dst_alts = self.alternatives(model, &[], &rule.dst_posture, action);
        self.windowed |= rule.when.is_some();
        self.windowed |= src_alts.iter().chain(&dst_alts).any(|(windows, _)| windows.is_some());
        let first = self.rules.len();
        for (src_windows, src_alt) in &src_alts {
            for (dst_windows, dst_alt) in &dst_alts {
                let active = when::both(base.clone(), when::both(src_windows.clone(), dst_windows.clone()));
                if active.as_ref().is_some_and(Vec::is_empty) {
                    continue;
                }
                let src = self.source(source_index, &rule.src, *src_alt, action == Action::Deny);
                let make = |protos: Vec<u8>, targets: Vec<Target>, app: bool, own: bool| {
                    let mut made = CompiledRule {
                        rule: index,
                        id: rule.id,
                        origin: rule.origin(),
                        action,
                        staged: rule.staged,
                        app,
                        every_proto: protos == deny_protos,
                        protos,
                        active: active.clone(),
                        src,
                        dst_alt: *dst_alt,
                        targets,
                        own,
                        via: via.clone(),
                        dst_nodes: NodeSet::new(),
                        dst_print: 0,
                        core_print: 0,
                    };
                    made.core_print = core_print(&made, rule, names);
                    made
                };
                for service in &rule.services {
                    let protos = match (service.proto, action) {
                        (Some(proto), _) => vec![proto],
                        (None, Action::Allow) => Vec::new(),
                        (None, Action::Deny) => deny_protos.to_vec(),
                    };
                    let targets = service
                        .targets
                        .iter()
                        .filter_map(|(dst, ports)| self.target(&rule.dst.get(*dst)?.value, ports))
                        .collect();
                    let (own, other): (Vec<Target>, Vec<Target>) = split_own(targets);
                    if !other.is_empty() {
                        self.rules.push(make(protos.clone(), other, false, false));
                    }
                    if !own.is_empty() {
                        self.rules.push(make(protos, own, false, true));
                    }
                }
                if !rule.app.is_empty() && via.is_none() {
                    let targets =
                        rule.dst.iter().filter_map(|d| self.target(&d.value, &[PortRange::ALL])).collect();
                    let (own, other): (Vec<Target>, Vec<Target>) = split_own(targets);
                    if !other.is_empty() {
                        self.rules.push(make(Vec::new(), other, true, false));
                    }
                    if !own.is_empty() {
                        self.rules.push(make(Vec::new(), own, true, true));
                    }
                }
            }
        }
        // Parts of one rule may be alike but for the devices they are about: the place tells them apart.
        for (place, made) in self.rules.iter_mut().skip(first).enumerate() {
            made.core_print = made.core_print.wrapping_add(place as u128);
        }
    }

    /// When the rule is in force by itself; `None` if never again.
    pub(super) fn windows(&self, rule: &Rule) -> Option<Windows> {
        let until = match rule.expires {
            Some(end) if end <= self.now => return None,
            Some(until) => Some(vec![UnixInterval { from: 0, until }]),
            None => None,
        };
        let weekly = rule.when.as_ref().map(|w| when::expand(w, self.now, self.horizon_s));
        let both = when::both(until, weekly);
        if both.as_ref().is_some_and(Vec::is_empty) {
            return None;
        }
        Some(both)
    }

    /// The ways to meet one posture of each list, grouped by the hours in which they can be met.
    fn alternatives(
        &mut self,
        model: &Model,
        defaults: &[At<String>],
        own: &[At<String>],
        action: Action,
    ) -> Vec<(Windows, Option<usize>)> {
        if defaults.is_empty() && own.is_empty() {
            return vec![(None, None)];
        }
        let mut groups: Vec<(Windows, Vec<BTreeSet<String>>)> = Vec::new();
        let one = |list: &[At<String>]| -> Vec<Option<String>> {
            if list.is_empty() { vec![None] } else { list.iter().map(|p| Some(p.value.clone())).collect() }
        };
        for a in one(defaults) {
            for b in one(own) {
                let all: BTreeSet<String> = a.iter().chain(b.iter()).cloned().collect();
                let clock: Vec<&Condition> = conditions(model, &all).filter(|c| c.is_time()).collect();
                let windows = if clock.is_empty() {
                    None
                } else {
                    Some(when::expand_conditions(&clock, self.now, self.horizon_s))
                };
                match groups.iter_mut().find(|(w, _)| *w == windows) {
                    Some((_, any_of)) => any_of.push(all),
                    None => groups.push((windows, vec![all])),
                }
            }
        }
        let mut out = Vec::new();
        for (windows, any_of) in groups {
            // A group without conditions over facts is met by everyone, and so is every "or" with it.
            let open = any_of.iter().any(|all| conditions(model, all).all(Condition::is_time));
            let alt = (!open).then(|| self.alt(model, any_of));
            out.push((windows, alt));
        }
        debug_assert!(!out.is_empty() || action == Action::Deny);
        out
    }

    pub(super) fn alt(&mut self, model: &Model, any_of: Vec<BTreeSet<String>>) -> usize {
        if let Some(found) = self.alts.iter().position(|a| a.any_of == any_of) {
            return found;
        }
        let mut alt = Alt { any_of, truth: vec![Truth::Unknown; self.world.devices.len()] };
        for slot in self.world.everyone.iter() {
            if let Some(device) = self.world.device(slot) {
                alt.truth[slot] = evaluate(&self.world, model, &alt, device, self.now);
            }
        }
        self.alts.push(alt);
        self.alts.len() - 1
    }

    pub(super) fn source(
        &mut self,
        index: &mut BTreeMap<SourceKey, usize>,
        selectors: &[At<Selector>],
        alt: Option<usize>,
        deny: bool,
    ) -> usize {
        let mut key = SourceKey { identities: Vec::new(), literals: Vec::new(), any: false, alt, deny };
        for at in selectors {
            match &at.value {
                Selector::Any => key.any = true,
                other if is_identity(other) => key.identities.extend(self.world.identities.find(other)),
                other => key.literals.push(other.clone()),
            }
        }
        key.identities.sort_unstable();
        key.identities.dedup();
        key.literals.sort();
        key.literals.dedup();
        if let Some(found) = index.get(&key) {
            return *found;
        }
        self.sources.push(SourceSet {
            key: key.clone(),
            base: IpSet::new(),
            nodes: NodeSet::new(),
            excluded: NodeSet::new(),
            named: NodeSet::new(),
            set: IpSet::new(),
            print: 0,
            who: 0,
            base_print: 0,
        });
        index.insert(key, self.sources.len() - 1);
        self.sources.len() - 1
    }

    pub(crate) fn literal(&self, selector: &Selector) -> IpSet {
        match selector {
            Selector::Addresses(range) => IpSet::from_iter([*range]),
            Selector::Host(_) | Selector::IpSet(_) => {
                self.literals.get(selector).cloned().unwrap_or_default()
            }
            Selector::Auto(Autogroup::DangerAll) => IpSet::all(),
            Selector::Auto(Autogroup::Internet) => self.world.internet().clone(),
            _ => IpSet::new(),
        }
    }

    pub(super) fn target(&self, selector: &Selector, ports: &[PortRange]) -> Option<Target> {
        let kind = match selector {
            Selector::Any => TargetKind::Any,
            Selector::Auto(Autogroup::SelfDevices) => TargetKind::Own,
            other if is_identity(other) => TargetKind::Identity(self.world.identities.find(other)?),
            other => TargetKind::Literal(self.literal(other)),
        };
        Some(Target { kind, ports: ports.to_vec() })
    }
}

pub(super) fn print_set(set: &IpSet) -> u128 {
    let mut hash = Sha256::new();
    for range in set.ranges() {
        for end in [range.first(), range.last()] {
            match end {
                IpAddr::V4(addr) => hash.update(addr.octets()),
                IpAddr::V6(addr) => hash.update(addr.octets()),
            }
        }
        hash.update([u8::from(range.first().is_ipv4())]);
    }
    wide(hash)
}

fn split_own(targets: Vec<Target>) -> (Vec<Target>, Vec<Target>) {
    targets.into_iter().partition(|t| t.kind == TargetKind::Own)
}

/// The conditions of several postures.
pub(crate) fn conditions<'m>(
    model: &'m Model,
    postures: &BTreeSet<String>,
) -> impl Iterator<Item = &'m Condition> {
    postures
        .iter()
        .filter_map(|name| model.postures.get(name))
        .flat_map(|posture| posture.value.iter().map(|c| &c.value))
}

/// The verdict of an alternative for a device.
pub(crate) fn evaluate(world: &World, model: &Model, alt: &Alt, device: &Device, now: i64) -> Truth {
    alt.any_of
        .iter()
        .map(|all| {
            conditions(model, all)
                .filter(|c| !c.is_time())
                .map(|c| c.evaluate(|key| world.fact(device, key), now.saturating_sub(device.since)).truth)
                .min()
                .unwrap_or(Truth::True)
        })
        .max()
        .unwrap_or(Truth::False)
}

/// Every protocol any rule opens: what a denial of everything must cover.
fn every_proto(model: &Model) -> Vec<u8> {
    let named = model.rules.iter().flat_map(|r| r.services.iter().filter_map(|s| s.proto));
    let all: BTreeSet<u8> = named.chain(DEFAULT_PROTOS).collect();
    all.into_iter().collect()
}

/// What a rule is, without who it applies to.
pub(super) fn core_print(rule: &CompiledRule, from: &Rule, names: &[String]) -> u128 {
    let mut hash = Sha256::new();
    hash.update(rule.id.0.to_be_bytes());
    hash.update([
        0,
        u8::from(rule.action == Action::Deny),
        u8::from(rule.staged),
        u8::from(rule.app),
        u8::from(rule.own),
    ]);
    hash.update(&rule.protos);
    match &rule.active {
        None => hash.update([0]),
        Some(windows) => {
            for w in windows {
                hash.update([1]);
                hash.update(w.from.to_be_bytes());
                hash.update(w.until.to_be_bytes());
            }
        }
    }
    for target in &rule.targets {
        match &target.kind {
            TargetKind::Identity(id) => hash.update(names.get(*id as usize).map_or("", |n| n)),
            TargetKind::Any => hash.update([2]),
            TargetKind::Own => hash.update([3]),
            TargetKind::Literal(set) => {
                for range in set.ranges() {
                    hash.update(range.to_string());
                }
            }
        }
        for ports in &target.ports {
            hash.update(ports.first.to_be_bytes());
            hash.update(ports.last.to_be_bytes());
        }
    }
    if rule.app {
        for (name, values) in &from.app {
            hash.update(name);
            for value in values {
                hash.update(value.to_string());
            }
        }
    }
    wide(hash)
}
