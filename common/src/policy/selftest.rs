//! The file's own tests: connections and logins that must be allowed or denied.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::Serialize;

use super::Policy;
use super::compile::{Compiled, CompiledRule, TargetKind, compile, is_identity};
use super::diagnostic::Diagnostic;
use super::inventory::Inventory;
use super::ipset::IpSet;
use super::model::{At, SshTestDef, TestDef};
use super::nodeset::NodeSet;
use super::posture::{Attributes, Truth};
use super::selector::{self, Autogroup, Selector};
use super::ssh::{SshAction, SshRule};
use crate::filter::{Action, DEFAULT_PROTOS, IpRange, has_ports};

/// What running the tests of a file found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TestReport {
    /// One per test of the file: `tests`, then `sshTests`.
    pub results: Vec<TestResult>,
}

impl TestReport {
    /// True if nothing failed.
    pub fn passed(&self) -> bool {
        self.results.iter().all(|r| r.failures.is_empty())
    }

    /// How many tests failed.
    pub fn failed(&self) -> usize {
        self.results.iter().filter(|r| !r.failures.is_empty()).count()
    }
}

/// One test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TestResult {
    /// `tests[2]` or `sshTests[0]`.
    pub name: String,
    /// Its line in the file.
    pub line: usize,
    /// The source.
    pub src: String,
    /// What went wrong, for people; empty if it passed.
    pub failures: Vec<String>,
}

/// Runs the `tests` and `sshTests` of a policy against an inventory at `now` (seconds since the Unix epoch).
///
/// # Errors
/// The policy does not compile against the inventory.
pub fn run_tests(policy: &Policy, inventory: &Inventory, now: i64) -> Result<TestReport, Vec<Diagnostic>> {
    Ok(compile(policy, inventory, now, 0)?.run_tests())
}

impl Compiled {
    /// Runs the tests of the policy as compiled.
    pub fn run_tests(&self) -> TestReport {
        let model = self.policy.model();
        let tests = model.tests.iter().map(|test| {
            let failures = match self.with_attributes(&test.src.value, &test.attrs) {
                Some(other) => other.run_test(test),
                None => self.run_test(test),
            };
            TestResult {
                name: format!("tests[{}]", test.index),
                line: test.line,
                src: test.src.value.clone(),
                failures,
            }
        });
        let ssh = model.ssh_tests.iter().map(|test| {
            let src = test.src.value.to_string();
            let failures = match self.with_attributes(&src, &test.attrs) {
                Some(other) => other.run_ssh_test(test),
                None => self.run_ssh_test(test),
            };
            TestResult { name: format!("sshTests[{}]", test.index), line: test.line, src, failures }
        });
        TestReport { results: tests.chain(ssh).collect() }
    }

    /// The same world in which the devices of a source have these attributes. `None` if there are none to give.
    fn with_attributes(&self, src: &str, attrs: &Attributes) -> Option<Self> {
        if attrs.is_empty() {
            return None;
        }
        let selector = Selector::parse(src).ok()?;
        let mut other = self.clone();
        let now = self.now();
        for slot in self.world.everyone.iter() {
            let Some(device) = self.world.device(slot).filter(|d| self.selects(&selector, d)) else {
                continue;
            };
            let mut node = device.node.clone();
            node.attributes.extend(attrs.clone());
            // The addresses do not change, so they cannot conflict.
            let _ = other.set_node(&device.name, Some(&node), now);
        }
        Some(other)
    }

    fn run_test(&self, test: &TestDef) -> Vec<String> {
        let mut failures = Vec::new();
        let Ok(src) = Selector::parse(&test.src.value) else {
            return vec![format!("\"{}\" is not a selector", test.src.value)];
        };
        let units = self.units(&src);
        if units.is_empty() {
            return vec![format!("source \"{src}\" has no addresses: no device matches")];
        }
        for (list, want) in [(&test.accept, true), (&test.deny, false)] {
            for dst in list {
                if let Err(why) = self.assert_reach(&units, dst, test.proto, want) {
                    failures.push(why);
                }
            }
        }
        failures
    }

    fn assert_reach(
        &self,
        units: &[Unit],
        dst: &At<String>,
        proto: Option<u8>,
        want: bool,
    ) -> Result<(), String> {
        let wrong = || format!("\"{}\" is not a destination", dst.value);
        let (host, ports, _) = selector::split_ports(&dst.value).map_err(|e| e.message)?;
        let what = Selector::parse(&host).map_err(|e| e.message)?;
        let port =
            selector::parse_ports(ports).ok().and_then(|p| Some(p.first()?.first)).ok_or_else(wrong)?;
        let points = self.points(&what);
        if points.is_empty() {
            return Err(format!("destination \"{what}\" has no addresses: no device matches"));
        }
        let reach = self.reach(units, &points, proto, port);
        let fails = |unit: &&Unit| reach.has(unit.index) != want;
        match units.iter().find(fails) {
            None => Ok(()),
            Some(unit) => {
                let (expected, got) = if want { ("allowed", "denied") } else { ("denied", "allowed") };
                Err(format!("{} -> {}: expected {expected}, is {got}", unit.name, dst.value))
            }
        }
    }

    /// Which units reach at least one of the points.
    fn reach(&self, units: &[Unit], points: &[Point], proto: Option<u8>, port: u16) -> NodeSet {
        // Per rule, which units and which points it matches.
        let mut allowed: Vec<(NodeSet, NodeSet)> = Vec::new();
        let mut denies: Vec<(NodeSet, NodeSet)> = Vec::new();
        let mut all = NodeSet::new();
        for rule in &self.rules {
            if rule.app || rule.staged || !is_active(rule, self.now()) {
                continue;
            }
            let protos: &[u8] = if rule.protos.is_empty() { &DEFAULT_PROTOS } else { &rule.protos };
            let matches_proto = match proto {
                Some(proto) => protos.contains(&proto),
                None => protos.iter().any(|p| DEFAULT_PROTOS.contains(p)),
            };
            if !matches_proto {
                continue;
            }
            // Without a protocol the test means any of the default ones; ICMP alone has no ports to miss.
            let portless = proto.is_none() && !protos.iter().any(|p| has_ports(*p));
            let hit: NodeSet = points
                .iter()
                .enumerate()
                .filter(|(_, p)| self.point_in(rule, p, port, portless))
                .map(|(i, _)| i)
                .collect();
            if hit.is_empty() {
                continue;
            }
            let from: NodeSet = units.iter().filter(|u| self.unit_in(rule, u)).map(|u| u.index).collect();
            match rule.action {
                Action::Allow => {
                    all.extend(&from);
                    allowed.push((from, hit));
                }
                Action::Deny => denies.push((from, hit)),
            }
        }
        if denies.is_empty() && !self.rules.iter().any(|r| r.own) {
            return all;
        }
        all.iter()
            .filter(|unit| {
                let mut open = NodeSet::new();
                for (_, hit) in allowed.iter().filter(|(from, _)| from.has(*unit)) {
                    open.extend(hit);
                }
                for (_, hit) in denies.iter().filter(|(from, _)| from.has(*unit)) {
                    open.subtract(hit);
                }
                open.iter().any(|p| units.get(*unit).is_some_and(|u| u.meets(&points[p])))
            })
            .collect()
    }

    fn unit_in(&self, rule: &CompiledRule, unit: &Unit) -> bool {
        let source = &self.sources[rule.src];
        unit.ranges.iter().any(|r| source.set.overlaps(*r))
    }

    fn point_in(&self, rule: &CompiledRule, point: &Point, port: u16, portless: bool) -> bool {
        if rule.own {
            // A test names devices by who they are, and autogroup:self is nobody in particular.
            return false;
        }
        if let Some(alt) = rule.dst_alt {
            let truth = point.slot.map_or(Truth::Unknown, |slot| self.alts[alt].truth[slot]);
            let matches = match rule.action {
                Action::Allow => truth == Truth::True,
                Action::Deny => truth != Truth::False,
            };
            if !matches {
                return false;
            }
        }
        rule.targets.iter().any(|target| {
            let ports = portless || target.ports.iter().any(|p| p.contains(port));
            ports
                && match &target.kind {
                    TargetKind::Any => true,
                    TargetKind::Own => false,
                    TargetKind::Identity(id) => {
                        point.slot.and_then(|slot| self.world.device(slot)).is_some_and(|d| d.has(*id))
                    }
                    TargetKind::Literal(set) => match point.addr {
                        Some(addr) if rule.via.is_none() => set.contains(addr),
                        Some(addr) => {
                            set.contains(addr)
                                && rule
                                    .dst_nodes
                                    .iter()
                                    .filter_map(|slot| self.world.device(slot))
                                    .any(|d| d.answers.contains(addr))
                        }
                        None => true,
                    },
                }
        })
    }

    /// Who the source of a test is: devices, or addresses that are nobody's.
    fn units(&self, src: &Selector) -> Vec<Unit> {
        let mut units = Vec::new();
        let mut rest = IpSet::new();
        let literal = match src {
            other if is_identity(other) || *other == Selector::Any => None,
            other => Some(self.literal(other)),
        };
        if let Some(set) = &literal {
            rest = set.clone();
        }
        for slot in self.world.everyone.iter() {
            let Some(device) = self.world.device(slot) else {
                continue;
            };
            let ranges: Vec<IpRange> = match &literal {
                None if self.selects(src, device) => device.own.clone(),
                None => continue,
                Some(set) => device.own.iter().copied().filter(|r| set.covers(*r)).collect(),
            };
            ranges.iter().for_each(|r| rest.remove(*r));
            if !ranges.is_empty() {
                units.push(Unit { index: units.len(), name: format!("{src} ({})", device.name), ranges });
            }
        }
        // A network that contains devices is the network, not the devices.
        if literal.as_ref().is_some_and(|set| set.ranges().any(|r| r.first() != r.last())) {
            units.clear();
            rest = literal.unwrap_or_default();
        }
        for range in rest.ranges() {
            units.push(Unit { index: units.len(), name: src.to_string(), ranges: vec![range] });
        }
        units
    }

    /// What the destination of a test is.
    fn points(&self, dst: &Selector) -> Vec<Point> {
        if *dst == Selector::Any {
            return vec![Point { slot: None, addr: None }];
        }
        if !is_identity(dst) {
            return self
                .literal(dst)
                .ranges()
                .map(|r| Point {
                    slot: self.world.at(r.first()).map(|(slot, _)| slot),
                    addr: Some(r.first()),
                })
                .collect();
        }
        self.world
            .everyone
            .iter()
            .filter_map(|slot| Some((slot, self.world.device(slot)?)))
            .filter(|(_, d)| self.selects(dst, d))
            .flat_map(|(slot, d)| {
                d.node.addresses().map(move |addr| Point { slot: Some(slot), addr: Some(addr) })
            })
            .collect()
    }

    fn run_ssh_test(&self, test: &SshTestDef) -> Vec<String> {
        let src = &test.src.value;
        let from: IpSet = self.units(src).into_iter().flat_map(|u| u.ranges).collect();
        if from.is_empty() {
            return vec![format!("source \"{src}\" has no addresses: no device matches")];
        }
        if test.accept.is_empty() && test.deny.is_empty() && test.check.is_empty() {
            return vec!["has none of \"accept\", \"check\" and \"deny\"".to_owned()];
        }
        let mut failures = Vec::new();
        let mut slots = BTreeSet::new();
        for dst in &test.dst {
            let found = self.ssh_test_dst(src, &dst.value);
            if found.is_empty() {
                failures.push(format!("destination \"{}\" is no device", dst.value));
            }
            slots.extend(found);
        }
        for (slot, device) in slots.into_iter().filter_map(|s| Some((s, self.world.device(s)?))) {
            let rules: Vec<SshRule> = self
                .ssh_at(slot, device)
                .into_iter()
                .filter(|r| {
                    let now = self.now();
                    r.active.as_ref().is_none_or(|w| w.iter().any(|w| w.from <= now && now < w.until))
                })
                .collect();
            for (list, kind) in
                [(&test.accept, Login::Accept), (&test.check, Login::Check), (&test.deny, Login::Deny)]
            {
                for user in list {
                    if let Some(got) = kind.fails(&rules, &from, &user.value) {
                        failures.push(format!(
                            "{src} -> {} as \"{}\": expected {}, is {got}",
                            device.name,
                            user.value,
                            kind.word()
                        ));
                    }
                }
            }
        }
        failures
    }

    fn ssh_test_dst(&self, src: &Selector, dst: &Selector) -> Vec<usize> {
        let all = self.world.everyone.iter();
        let devices = all.filter_map(|slot| Some((slot, self.world.device(slot)?)));
        if *dst == Selector::Auto(Autogroup::SelfDevices) {
            let Selector::User(_) = src else {
                return Vec::new();
            };
            return devices
                .filter(|(_, d)| d.user.is_some() && self.selects(src, d))
                .map(|(slot, _)| slot)
                .collect();
        }
        devices.filter(|(_, d)| self.selects(dst, d)).map(|(slot, _)| slot).collect()
    }
}

/// One source of a test.
struct Unit {
    index: usize,
    name: String,
    ranges: Vec<IpRange>,
}

impl Unit {
    /// Is there a pair of addresses of one family?
    fn meets(&self, point: &Point) -> bool {
        point.addr.is_none_or(|addr| self.ranges.iter().any(|r| r.first().is_ipv4() == addr.is_ipv4()))
    }
}

/// One destination of a test; no address is "anything".
struct Point {
    slot: Option<usize>,
    addr: Option<IpAddr>,
}

fn is_active(rule: &CompiledRule, now: i64) -> bool {
    rule.active.as_ref().is_none_or(|w| w.iter().any(|w| w.from <= now && now < w.until))
}

#[derive(Clone, Copy)]
enum Login {
    Accept,
    Check,
    Deny,
}

impl Login {
    const fn word(self) -> &'static str {
        match self {
            Self::Accept => "accepted",
            Self::Check => "accepted after a check",
            Self::Deny => "denied",
        }
    }

    /// What is the case instead, if the assertion fails.
    fn fails(self, rules: &[SshRule], from: &IpSet, user: &str) -> Option<&'static str> {
        let (mut accepted, mut checked, mut any) = (IpSet::new(), IpSet::new(), false);
        for rule in rules.iter().filter(|r| lets_log_in(r, user)) {
            let hit: IpSet = rule.principals.iter().map(|a| IpRange::from(*a)).collect();
            let hit = hit.intersect(from);
            any |= !hit.is_empty();
            if rule.action == SshAction::Check {
                checked.extend(&hit);
            }
            accepted.extend(&hit);
        }
        let whole = |set: &IpSet| from.ranges().all(|r| set.covers(r));
        match self {
            Self::Accept => (!whole(&accepted)).then_some("denied"),
            Self::Check if whole(&checked) => None,
            Self::Check if whole(&accepted) => Some("accepted without a check"),
            Self::Check => Some("denied"),
            Self::Deny => any.then_some("accepted"),
        }
    }
}

fn lets_log_in(rule: &SshRule, user: &str) -> bool {
    if user.is_empty() {
        return false;
    }
    match rule.users.get(user) {
        Some(local) => !local.is_empty(),
        None => user != "root" && rule.users.get("*").is_some_and(|l| !l.is_empty()),
    }
}
