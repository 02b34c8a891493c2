//! Policy and inventory to what every device does. Nothing here looks at all pairs of devices: sources and
//! destinations are sets, and a device's part is cut out of them when asked for.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::Policy;
use super::check::resolve_ipsets;
use super::diagnostic::{Diagnostic, Severity};
use super::inventory::{Inventory, Node};
use super::ipset::IpSet;
use super::model::{At, LoginUser, Model, Rule};
use super::nodeset::NodeSet;
use super::posture::{Condition, Truth};
use super::selector::{Autogroup, Selector};
use super::ssh::{CompiledSsh, SshRule};
use super::when;
use super::world::{AddressConflict, Device, World, set_overlaps, wide};
use crate::filter::{
    Action, DEFAULT_PROTOS, FilterDst, FilterRule, IpRange, PortRange, RuleId, UnixInterval,
};

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

/// When something is in force; `None` is always.
type Windows = Option<Vec<UnixInterval>>;

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

/// A hash of a device's whole policy: it differs if anything the device must be told differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub u128);

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
    prints: Vec<Fingerprint>,
    /// What `*` covers besides the overlay: changes with routes only.
    routes: IpSet,
    /// Everything any device answers for.
    answers: IpSet,
    answers_print: u128,
    now: i64,
    horizon_s: i64,
    reevaluate_at: Option<i64>,
}

/// A source: which devices, which addresses.
#[derive(Clone, Debug)]
pub(crate) struct SourceSet {
    pub(crate) key: SourceKey,
    /// Addresses named as such.
    base: IpSet,
    /// Devices that may be the source, with an own address or through a route they carry.
    pub(crate) nodes: NodeSet,
    /// Devices a denial does not speak of, as they certainly do not meet its postures.
    excluded: NodeSet,
    /// Of both, those it speaks of by identity and so with all their addresses.
    named: NodeSet,
    /// Every address.
    pub(crate) set: IpSet,
    /// Sum of the weighted prints of `nodes` and `excluded`: equal sums, equal addresses.
    print: u128,
    /// The same with what SSH rules depend on besides: users and tags.
    who: u128,
    base_print: u128,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SourceKey {
    pub(crate) identities: Vec<u32>,
    literals: Vec<Selector>,
    any: bool,
    pub(crate) alt: Option<usize>,
    deny: bool,
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
    dst_print: u128,
    core_print: u128,
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
    let mut compiled = Compiled {
        policy: policy.clone(),
        routes: world.all_routes(),
        answers_print: print_set(&world.all_answers()),
        answers: world.all_answers(),
        world,
        sources: Vec::new(),
        alts: Vec::new(),
        rules: Vec::new(),
        ssh: Vec::new(),
        literals: literals_of(model),
        prints: Vec::new(),
        now,
        horizon_s,
        reevaluate_at: None,
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
                let compiled = CompiledSsh::new(ssh, src, windows);
                self.ssh.push(compiled);
            }
        }
        for i in 0..self.sources.len() {
            self.fill_source(i);
        }
        for i in 0..self.rules.len() {
            self.fill_rule(i);
        }
        self.prints = vec![Fingerprint(0); self.world.devices.len()];
        for slot in self.world.everyone.clone().iter() {
            self.prints[slot] = self.print_of(slot);
        }
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
    }

    /// When the rule is in force by itself; `None` if never again.
    fn windows(&self, rule: &Rule) -> Option<Windows> {
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

    fn alt(&mut self, model: &Model, any_of: Vec<BTreeSet<String>>) -> usize {
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

    fn source(
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

    fn target(&self, selector: &Selector, ports: &[PortRange]) -> Option<Target> {
        let kind = match selector {
            Selector::Any => TargetKind::Any,
            Selector::Auto(Autogroup::SelfDevices) => TargetKind::Own,
            other if is_identity(other) => TargetKind::Identity(self.world.identities.find(other)?),
            other => TargetKind::Literal(self.literal(other)),
        };
        Some(Target { kind, ports: ports.to_vec() })
    }

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

    fn fill_source(&mut self, index: usize) {
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
                let outside: IpSet = self
                    .world
                    .everyone
                    .iter()
                    .filter_map(|slot| self.world.device(slot))
                    .flat_map(|d| d.own.iter().copied())
                    .filter(|r| !base.covers(*r))
                    .collect();
                set.extend(&outside);
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

    /// Takes a device out of a source, and puts it in as it now is. Says whether addresses, or people, changed.
    fn touch_source(&mut self, index: usize, slot: usize, old: Option<&Device>) -> Touched {
        let source = &mut self.sources[index];
        let before = (source.print, source.who);
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
        let source = &self.sources[index];
        Touched { addresses: source.print != before.0, people: source.who != before.1 }
    }

    fn fill_rule(&mut self, index: usize) {
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
    fn lets_in(&self, rule: &CompiledRule, slot: usize, device: &Device) -> bool {
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
        rule.targets.iter().any(|t| !self.part_of(rule, t, device).is_empty())
    }

    /// The addresses a device answers for under one target of a rule.
    fn part_of(&self, rule: &CompiledRule, target: &Target, device: &Device) -> IpSet {
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
    fn same_user<'c>(
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

    fn filter(&self, rule: &CompiledRule, src: Vec<IpRange>, dst: Vec<FilterDst>) -> FilterRule {
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

    /// Where a rule stands now, `grants[3] line 41`. [`FilterRule::origin`] is not part of a [`Fingerprint`], so a
    /// device may hold an older line number; the id is the stable name.
    pub fn origin_of(&self, id: RuleId) -> Option<&str> {
        self.rules.iter().find(|r| r.id == id).map(|r| r.origin.as_str())
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
        let mut from: IpSet = device.own.iter().copied().collect();
        from.extend(&device.routes);
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
                (from.intersect(&source.set).to_ranges(), self.dst_all(rule))
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
            auto_approved_routes: self.auto_approved(model, device),
            peers: self.peers_at(slot, device),
            ..NodePolicy::default()
        };
        if model.randomize_client_port {
            out.attrs.insert("randomize-client-port".to_owned());
        }
        for attr in &model.node_attrs {
            if attr.target.iter().any(|t| self.selects(&t.value, device)) {
                out.attrs.extend(attr.attr.iter().cloned());
                out.ip_pools.extend(&attr.ip_pool);
                for (app, values) in &attr.app {
                    out.apps.entry(app.clone()).or_default().extend(values.iter().cloned());
                }
            }
        }
        Some(out)
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

    fn auto_approved(&self, model: &Model, device: &Device) -> BTreeSet<IpNet> {
        let approves = |who: &[At<Selector>]| who.iter().any(|w| self.selects(&w.value, device));
        device
            .node
            .routable_ips
            .iter()
            .filter(|offered| {
                let exit = offered.prefix_len() == 0 && approves(&model.exit_approvers);
                exit || model.route_approvers.iter().any(|(net, who)| {
                    // An approval of a default route is not one of every network.
                    let covers = if net.value.prefix_len() == 0 {
                        net.value == offered.trunc()
                    } else {
                        net.value.contains(*offered)
                    };
                    covers && approves(who)
                })
            })
            .copied()
            .collect()
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

    /// A hash of the device's whole policy, egress included.
    pub fn fingerprint(&self, name: &str) -> Option<Fingerprint> {
        let slot = *self.world.by_name.get(name)?;
        self.prints.get(slot).copied()
    }

    fn print_of(&self, slot: usize) -> Fingerprint {
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
    fn follow(&mut self, slot: usize, old: Option<&Device>, now: i64, affected: &mut NodeSet) {
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

    fn schedule(&mut self) {
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

fn print_set(set: &IpSet) -> u128 {
    let mut hash = Sha256::new();
    for range in set.ranges() {
        hash.update(range.to_string());
        hash.update([0]);
    }
    wide(hash)
}

/// What changed about a source.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Touched {
    /// The devices and addresses.
    pub(crate) addresses: bool,
    /// Those, or their users or tags.
    pub(crate) people: bool,
}

impl SourceSet {
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

impl CompiledRule {
    /// A device's share of `dst_print`: differs if what the device lets in of the rule differs.
    fn part_print(&self, device: &Device) -> u128 {
        let mut weight = 1_u128;
        for target in &self.targets {
            if let TargetKind::Identity(id) = target.kind {
                weight = weight.wrapping_mul(31).wrapping_add(2 * u128::from(device.has(id)));
            }
        }
        device.print.wrapping_mul(weight | 1)
    }
}

/// The part of a device's own addresses that a source names.
fn own_in(key: &SourceKey, device: &Device, base: &IpSet) -> Vec<IpRange> {
    let named = key.any || key.identities.iter().any(|id| device.has(*id));
    device.own.iter().copied().filter(|r| named || base.overlaps(*r)).collect()
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
fn core_print(rule: &CompiledRule, from: &Rule, names: &[String]) -> u128 {
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
