//! What changes between two policies: the connections that open or close, grouped the way a reviewer reads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;

use super::compile::Compiled;
use super::device::NodePolicy;
use super::ipset::IpSet;
use super::nodeset::NodeSet;
use super::posture::Truth;
use super::selector;
use crate::filter::{Action, DEFAULT_PROTOS, FilterDst, FilterRule, IpRange, PortRange, has_ports};

/// Most cells (addresses times protocols times ports) compared for one group of sources at one device; beyond, the
/// report says that it could not decide. Unit: cells.
pub const MAX_CELLS: usize = 200_000;

/// What changes between two compilations of the same inventory.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diff {
    /// Connections that open or close at the time of the compilations.
    pub changes: Vec<Change>,
    /// What changes besides connections: logins, capabilities, relaying, attributes, routes; `device: what`.
    pub other: Vec<String>,
    /// What could not be decided, and why.
    pub undecided: Vec<String>,
}

impl Diff {
    /// True if nothing changes.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.other.is_empty()
    }
}

/// A group of connections that open or close together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Change {
    /// True if they become allowed.
    pub opens: bool,
    /// Whose devices: a user, tags, or a network behind a device.
    pub from: String,
    /// Whose devices, or the network.
    pub to: String,
    /// `tcp:443`, `icmp`.
    pub service: String,
    /// The source devices.
    pub sources: BTreeSet<String>,
    /// The destination devices.
    pub destinations: BTreeSet<String>,
    /// The rules that allow or deny it in the policy where they do: `grants[3] line 41`.
    pub rules: BTreeSet<String>,
}

/// Compares two compilations made with the same inventory at the same time.
pub fn diff(old: &Compiled, new: &Compiled) -> Diff {
    let mut out = Diff::default();
    let mut grouped = Grouped::new();
    for name in new.changed_since(old) {
        compare_device(old, new, &name, &mut grouped, &mut out);
    }
    out.changes = grouped
        .into_iter()
        .map(|((closes, from, to, service), group)| Change {
            opens: !closes,
            from,
            to,
            service,
            sources: group.sources.iter().filter_map(|s| Some(new.world.device(s)?.name.clone())).collect(),
            destinations: group.destinations,
            rules: group.rules,
        })
        .collect();
    undecided(old, new, &mut out);
    out
}

/// By whether they close, from whom, to whom, service.
type Grouped = BTreeMap<(bool, String, String, String), Group>;

/// Sources that the same rules cover, for IPv4 and IPv6: one of them, and all by label.
type Alike = BTreeMap<Vec<[bool; 2]>, (Source, BTreeMap<String, NodeSet>)>;

#[derive(Default)]
struct Group {
    sources: NodeSet,
    destinations: BTreeSet<String>,
    rules: BTreeSet<String>,
}

/// A source as a device sees it: addresses that every rule treats alike.
struct Source {
    label: String,
    slot: usize,
    addrs: Vec<IpAddr>,
}

fn compare_device(old: &Compiled, new: &Compiled, name: &str, grouped: &mut Grouped, out: &mut Diff) {
    let Some((_, device)) = new.world.named(name).or_else(|| old.world.named(name)) else {
        return;
    };
    let (old_node, new_node) = (old.node(name).unwrap_or_default(), new.node(name).unwrap_or_default());
    compare_rest(&old_node, &new_node, name, out);
    compare_relayed(old, new, name, out);
    let now = new.now();
    let live = |rules: Vec<FilterRule>| -> Vec<FilterRule> {
        rules.into_iter().filter(|r| !r.staged && r.is_active(now)).collect()
    };
    let (before, after) = (live(old_node.ingress), live(new_node.ingress));
    // Only what the rules that differ say anything about can change.
    let differing: Vec<&FilterRule> = missing(&before, &after).chain(missing(&after, &before)).collect();
    let reached: IpSet = differing.iter().flat_map(|rule| &rule.src).copied().collect();
    let rules: Vec<(&FilterRule, IpSet)> =
        before.iter().chain(&after).map(|rule| (rule, rule.src.iter().copied().collect())).collect();
    // Sources under the same rules share one comparison.
    let mut groups = Alike::new();
    for source in sources(new, &reached, &rules) {
        if new.world.device(source.slot).is_some_and(|d| d.name == name) {
            continue;
        }
        let hits = |(_, from): &(_, IpSet)| {
            [true, false].map(|v4| source.addrs.iter().any(|a| a.is_ipv4() == v4 && from.contains(*a)))
        };
        let key = rules.iter().map(hits).collect();
        let (label, slot) = (source.label.clone(), source.slot);
        let (_, labels) = groups.entry(key).or_insert_with(|| (source, BTreeMap::new()));
        labels.entry(label).or_default().insert(slot);
    }
    for (key, (first, labels)) in groups {
        let hit: Vec<(&FilterRule, [bool; 2])> =
            rules.iter().zip(key).map(|((rule, _), hit)| (*rule, hit)).collect();
        let (a, b) = hit.split_at(before.len());
        let Some(cells) = cells(a, b, &differing, &first) else {
            out.undecided.push(format!("{} -> {name}: more than {MAX_CELLS} cases to compare", first.label));
            continue;
        };
        for cell in cells {
            let to = if device.own.iter().any(|r| r.contains(cell.net.first())) {
                new.owner(device)
            } else {
                selector::display_range(cell.net)
            };
            for (from, slots) in &labels {
                let key = (!cell.opens, from.clone(), to.clone(), cell.service.clone());
                let group = grouped.entry(key).or_default();
                group.sources.extend(slots);
                group.destinations.insert(name.to_owned());
                group.rules.extend(cell.rules.iter().cloned());
            }
        }
    }
}

/// Those of `rules` that `others` lacks.
fn missing<'a>(rules: &'a [FilterRule], others: &[FilterRule]) -> impl Iterator<Item = &'a FilterRule> {
    // Not where it stands in the file, and not when else it is in force.
    type Effect<'a> = (Action, &'a [IpRange], &'a [FilterDst], &'a [u8]);
    fn effect(rule: &FilterRule) -> Effect<'_> {
        (rule.action, &rule.src, &rule.dst, &rule.protos)
    }
    let held: BTreeSet<Effect<'_>> = others.iter().map(effect).collect();
    let missing: Vec<&FilterRule> = rules.iter().filter(|rule| !held.contains(&effect(rule))).collect();
    missing.into_iter()
}

/// Everybody who can be a source within `reached`, cut where the sources of any rule begin or end.
fn sources(compiled: &Compiled, reached: &IpSet, rules: &[(&FilterRule, IpSet)]) -> Vec<Source> {
    let world = &compiled.world;
    let mut out = Vec::new();
    for (slot, device) in world.everyone.iter().filter_map(|slot| Some((slot, world.device(slot)?))) {
        if device.own.iter().any(|own| reached.contains(own.first())) {
            out.push(Source {
                label: compiled.owner(device),
                slot,
                addrs: device.node.addresses().collect(),
            });
        }
    }
    for (slot, device) in world.routers.iter().filter_map(|slot| Some((*slot, world.device(*slot)?))) {
        for route in device.routes.intersect(reached).ranges() {
            let within = IpSet::from_iter([route]);
            let mut firsts = BTreeSet::from([route.first()]);
            for part in rules.iter().flat_map(|(_, from)| from.intersect(&within).to_ranges()) {
                firsts.insert(part.first());
                firsts.extend(next(part.last()).filter(|a| route.contains(*a)));
            }
            let listed: Vec<IpAddr> = firsts.into_iter().collect();
            for (i, first) in listed.iter().enumerate() {
                let last = listed.get(i + 1).and_then(|a| previous(*a)).unwrap_or(route.last());
                let Some(range) = IpRange::new(*first, last) else { continue };
                out.push(Source { label: selector::display_range(range), slot, addrs: vec![*first] });
            }
        }
    }
    out
}

struct Cell {
    opens: bool,
    net: IpRange,
    service: String,
    rules: BTreeSet<String>,
}

/// Rules, each with whether it covers the source's IPv4 and its IPv6 address.
type Side<'a> = [(&'a FilterRule, [bool; 2])];

/// The differences of two lists of rules for one source, all inside of the rules that differ, or `None` if there are too
/// many cases.
fn cells(a: &Side<'_>, b: &Side<'_>, differing: &[&FilterRule], source: &Source) -> Option<Vec<Cell>> {
    let covering = a.iter().chain(b).filter(|(_, hit)| hit.contains(&true));
    let protos: BTreeSet<u8> = differing.iter().flat_map(|rule| protos(rule)).copied().collect();
    let mut starts: BTreeSet<IpAddr> = BTreeSet::new();
    let mut ports: BTreeSet<u32> = BTreeSet::from([0, 65_536]);
    for dst in covering.flat_map(|(rule, _)| &rule.dst) {
        starts.insert(dst.net.first());
        starts.extend(next(dst.net.last()));
        ports.insert(u32::from(dst.ports.first));
        ports.insert(u32::from(dst.ports.last) + 1);
    }
    let mut nets = elementary(&starts);
    nets.retain(|net| differing.iter().flat_map(|r| &r.dst).any(|dst| dst.net.contains(net.first())));
    let ports: Vec<u32> = ports.into_iter().collect();
    let steps: Vec<(u16, u16)> = ports
        .windows(2)
        .filter_map(|w| Some((u16::try_from(w[0]).ok()?, u16::try_from(w[1] - 1).ok()?)))
        .filter(|(first, _)| differing.iter().flat_map(|r| &r.dst).any(|dst| dst.ports.contains(*first)))
        .collect();
    if nets.len().saturating_mul(protos.len()).saturating_mul(steps.len()) > MAX_CELLS {
        return None;
    }
    let mut out = Vec::new();
    for net in nets {
        let v4 = net.first().is_ipv4();
        if !source.addrs.iter().any(|s| s.is_ipv4() == v4) {
            continue;
        }
        for proto in &protos {
            let foreign = if v4 { crate::filter::PROTO_ICMPV6 } else { crate::filter::PROTO_ICMP };
            if *proto == foreign {
                continue;
            }
            let steps: &[(u16, u16)] = if has_ports(*proto) { &steps } else { &[(0, u16::MAX)] };
            // Neighbouring ports that change alike become one entry.
            let mut run: Option<(bool, u16, u16, BTreeSet<String>)> = None;
            let mut flush = |run: &mut Option<(bool, u16, u16, BTreeSet<String>)>| {
                if let Some((opens, first, last, rules)) = run.take() {
                    out.push(Cell { opens, net, service: service(*proto, first, last), rules });
                }
            };
            for (first, last) in steps {
                let was = decide(a, net.first(), *proto, *first);
                let is = decide(b, net.first(), *proto, *first);
                if was.0 == is.0 {
                    flush(&mut run);
                    continue;
                }
                // Who opens it is in the new file; who closes it is a denial there, or was in the old file.
                let rules = if is.0 || !is.1.is_empty() { is.1 } else { was.1 };
                match &mut run {
                    Some((opens, _, end, by))
                        if *opens == is.0 && *by == rules && end.checked_add(1) == Some(*first) =>
                    {
                        *end = *last;
                    }
                    _ => {
                        flush(&mut run);
                        run = Some((is.0, *first, *last, rules));
                    }
                }
            }
            flush(&mut run);
        }
    }
    Some(out)
}

fn protos(rule: &FilterRule) -> &[u8] {
    if rule.protos.is_empty() { &DEFAULT_PROTOS } else { &rule.protos }
}

/// Allowed or not, and the rules that say so.
fn decide(side: &Side<'_>, dst: IpAddr, proto: u8, port: u16) -> (bool, BTreeSet<String>) {
    let family = usize::from(!dst.is_ipv4());
    let mut by = [BTreeSet::new(), BTreeSet::new()];
    for (rule, hit) in side {
        let covers = hit[family]
            && protos(rule).contains(&proto)
            && rule.dst.iter().any(|d| d.net.contains(dst) && (!has_ports(proto) || d.ports.contains(port)));
        if covers {
            by[usize::from(rule.action == Action::Deny)].insert(rule.origin.clone());
        }
    }
    let [allow, deny] = by;
    if deny.is_empty() { (!allow.is_empty(), allow) } else { (false, deny) }
}

/// The ranges between consecutive starts of one family.
fn elementary(starts: &BTreeSet<IpAddr>) -> Vec<IpRange> {
    let listed: Vec<IpAddr> = starts.iter().copied().collect();
    listed
        .iter()
        .enumerate()
        .filter_map(|(i, first)| {
            let end = if first.is_ipv4() { IpRange::ALL_V4 } else { IpRange::ALL_V6 };
            let last = listed
                .get(i + 1)
                .filter(|a| a.is_ipv4() == first.is_ipv4())
                .and_then(|a| previous(*a))
                .unwrap_or(end.last());
            IpRange::new(*first, last)
        })
        .collect()
}

fn next(addr: IpAddr) -> Option<IpAddr> {
    match addr {
        IpAddr::V4(a) => Some(IpAddr::V4(a.to_bits().checked_add(1)?.into())),
        IpAddr::V6(a) => Some(IpAddr::V6(a.to_bits().checked_add(1)?.into())),
    }
}

fn previous(addr: IpAddr) -> Option<IpAddr> {
    match addr {
        IpAddr::V4(a) => Some(IpAddr::V4(a.to_bits().checked_sub(1)?.into())),
        IpAddr::V6(a) => Some(IpAddr::V6(a.to_bits().checked_sub(1)?.into())),
    }
}

fn service(proto: u8, first: u16, last: u16) -> String {
    let name = selector::proto_name(proto);
    let range = PortRange { first, last };
    if !has_ports(proto) {
        name
    } else if range == PortRange::ALL {
        format!("{name}:*")
    } else if first == last {
        format!("{name}:{first}")
    } else {
        format!("{name}:{first}-{last}")
    }
}

/// For whom the device may relay.
fn compare_relayed(old: &Compiled, new: &Compiled, name: &str, out: &mut Diff) {
    let (before, after) = (old.relay_users(name, old.now()), new.relay_users(name, new.now()));
    for (verb, users) in [("may relay for", &after - &before), ("may no longer relay for", &before - &after)]
    {
        let users: Vec<String> = users.into_iter().collect();
        if !users.is_empty() {
            out.other.push(format!("{name}: {verb} {}", users.join(", ")));
        }
    }
}

/// Logins, capabilities, attributes and routes.
fn compare_rest(a: &NodePolicy, b: &NodePolicy, name: &str, out: &mut Diff) {
    let mut say = |what: String| out.other.push(format!("{name}: {what}"));
    let strip = |rules: &[super::SshRule]| -> Vec<super::SshRule> {
        rules.iter().cloned().map(|r| super::SshRule { origin: String::new(), ..r }).collect()
    };
    if strip(&a.ssh) != strip(&b.ssh) {
        say(format!("logins change ({} rules become {})", a.ssh.len(), b.ssh.len()));
    }
    let caps = |caps: &[super::Capability]| -> BTreeSet<String> {
        caps.iter().map(|c| format!("{:?}", (&c.name, &c.values, &c.src, &c.dst))).collect()
    };
    if caps(&a.caps) != caps(&b.caps) {
        say("application capabilities change".to_owned());
    }
    for attr in b.attrs.difference(&a.attrs) {
        say(format!("gets the attribute {attr}"));
    }
    for attr in a.attrs.difference(&b.attrs) {
        say(format!("loses the attribute {attr}"));
    }
    for route in b.auto_approved_routes.difference(&a.auto_approved_routes) {
        say(format!("may carry {route} without approval"));
    }
    for route in a.auto_approved_routes.difference(&b.auto_approved_routes) {
        say(format!("may no longer carry {route} without approval"));
    }
    if a.apps != b.apps {
        say("the configuration of its applications changes".to_owned());
    }
    if a.ip_pools != b.ip_pools {
        say("takes its address from other networks".to_owned());
    }
    let staged = |rules: &[FilterRule]| -> BTreeSet<String> {
        rules.iter().filter(|r| r.staged).map(|r| r.id.to_string()).collect()
    };
    if staged(&a.ingress) != staged(&b.ingress) {
        say("staged rules change (decided and counted, not enforced)".to_owned());
    }
}

/// What a comparison at one moment with today's facts cannot see.
fn undecided(old: &Compiled, new: &Compiled, out: &mut Diff) {
    let mut notes = BTreeSet::new();
    for compiled in [old, new] {
        let model = compiled.policy.model();
        for rule in &model.rules {
            let same = |other: &Compiled| other.policy.model().rules.iter().any(|r| r.id == rule.id);
            if (rule.when.is_some() || rule.expires.is_some()) && !(same(old) && same(new)) {
                notes.insert(format!("{} depends on the time: compared at this moment only", rule.origin()));
            }
        }
        for alt in &compiled.alts {
            let unknown = compiled
                .world
                .everyone
                .iter()
                .filter(|slot| alt.truth.get(*slot).copied() == Some(Truth::Unknown))
                .count();
            if unknown > 0 {
                let names: BTreeSet<&str> = alt.any_of.iter().flatten().map(String::as_str).collect();
                let names: Vec<&str> = names.into_iter().collect();
                notes.insert(format!(
                    "{}: unknown for {unknown} devices, counted as not met by grants and met by denials",
                    names.join(" or ")
                ));
            }
        }
    }
    out.undecided.extend(notes);
}
