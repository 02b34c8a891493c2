//! The file's own tests: connections and logins that must be allowed or denied.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde::Serialize;

use super::Policy;
use super::compile::{Compiled, CompiledRule, Target, TargetKind, compile, is_identity};
use super::diagnostic::Diagnostic;
use super::inventory::Inventory;
use super::ipset::IpSet;
use super::model::{At, SshTestDef, TestDef};
use super::nodeset::NodeSet;
use super::posture::Attributes;
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
    /// What the test leaves open although it passed: a denial that only a part of the source meets.
    pub notes: Vec<String>,
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
            let Outcome { failures, notes } = match self.with_attributes(&test.src.value, &test.attrs) {
                Some(other) => other.run_test(test),
                None => self.run_test(test),
            };
            TestResult {
                name: format!("tests[{}]", test.index),
                line: test.line,
                src: test.src.value.clone(),
                failures,
                notes,
            }
        });
        let ssh = model.ssh_tests.iter().map(|test| {
            let src = test.src.value.to_string();
            let failures = match self.with_attributes(&src, &test.attrs) {
                Some(other) => other.run_ssh_test(test),
                None => self.run_ssh_test(test),
            };
            let name = format!("sshTests[{}]", test.index);
            TestResult { name, line: test.line, src, failures, notes: Vec::new() }
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

    fn run_test(&self, test: &TestDef) -> Outcome {
        let mut out = Outcome::default();
        let Ok(src) = Selector::parse(&test.src.value) else {
            return Outcome::failed(format!("\"{}\" is not a selector", test.src.value));
        };
        let units = self.units(&src);
        if units.is_empty() {
            return Outcome::failed(format!("source \"{src}\" has no addresses: no device matches"));
        }
        for (list, want) in [(&test.accept, true), (&test.deny, false)] {
            for dst in list {
                if let Err(why) = self.assert_reach(&units, dst, test.proto, want, &mut out.notes) {
                    out.failures.push(why);
                }
            }
        }
        out
    }

    /// A source reaches a destination if every one of its addresses reaches one of the destination's.
    fn assert_reach(
        &self,
        units: &[Unit],
        dst: &At<String>,
        proto: Option<u8>,
        want: bool,
        notes: &mut Vec<String>,
    ) -> Result<(), String> {
        let wrong = || format!("\"{}\" is not a destination", dst.value);
        let (host, ports, _) = selector::split_ports(&dst.value).map_err(|e| e.message)?;
        let what = Selector::parse(&host).map_err(|e| e.message)?;
        let port =
            selector::parse_ports(ports).ok().and_then(|p| Some(p.first()?.first)).ok_or_else(wrong)?;
        let points = self.addresses_of(&what);
        if points.is_empty() {
            return Err(format!("destination \"{what}\" has no addresses: no device matches"));
        }
        let reach = self.reach(units, &points, proto, port);
        let missing = units.iter().find(|u| !reach.has(u.index));
        match (want, missing) {
            (true, None) => Ok(()),
            (true, Some(unit)) => Err(format!("{} -> {}: expected allowed, is denied", unit.name, dst.value)),
            (false, None) => match units.first() {
                Some(unit) => Err(format!("{} -> {}: expected denied, is allowed", unit.name, dst.value)),
                None => Ok(()),
            },
            (false, Some(_)) => {
                if let Some(unit) = units.iter().find(|u| reach.has(u.index)) {
                    notes.push(format!(
                        "{} -> {} is allowed; the test holds as not every address of the source gets there",
                        unit.name, dst.value
                    ));
                }
                Ok(())
            }
        }
    }

    /// Which units reach at least one of the points.
    fn reach(&self, units: &[Unit], points: &[IpRange], proto: Option<u8>, port: u16) -> NodeSet {
        // Per rule that speaks of the service, which points it covers.
        let mut allows: Vec<(&IpSet, NodeSet)> = Vec::new();
        let mut denies: Vec<(&IpSet, NodeSet)> = Vec::new();
        for rule in &self.rules {
            // A test names devices by who they are, and autogroup:self is nobody in particular.
            if rule.app || rule.staged || rule.own || !is_active(rule, self.now()) {
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
            let mut hit = NodeSet::new();
            for target in &rule.targets {
                if !portless && !target.ports.iter().any(|p| p.contains(port)) {
                    continue;
                }
                let covered = self.covered(rule, target);
                let hits = |point: IpRange| match rule.action {
                    Action::Allow => covered.overlaps(point),
                    // A denial of a part of a network leaves the rest of it open.
                    Action::Deny => covered.covers(point),
                };
                for (i, _) in points.iter().enumerate().filter(|(_, point)| hits(**point)) {
                    hit.insert(i);
                }
            }
            if !hit.is_empty() {
                let list = if rule.action == Action::Allow { &mut allows } else { &mut denies };
                list.push((&self.sources[rule.src].set, hit));
            }
        }
        let reaches = |unit: &&Unit| {
            let mut open = NodeSet::new();
            for (_, hit) in allows.iter().filter(|(src, _)| src.overlaps(unit.range)) {
                open.extend(hit);
            }
            for (_, hit) in denies.iter().filter(|(src, _)| src.covers(unit.range)) {
                open.subtract(hit);
            }
            !open.is_empty()
        };
        units.iter().filter(reaches).map(|u| u.index).collect()
    }

    /// The addresses that a target of a rule means in a test. Networks count whether or not a device answers for them,
    /// unless the rule asks something of the device.
    fn covered(&self, rule: &CompiledRule, target: &Target) -> Cow<'_, IpSet> {
        if rule.dst_alt.is_none() && rule.via.is_none() {
            return match &target.kind {
                TargetKind::Identity(id) => Cow::Borrowed(&self.world.identities.addresses[*id as usize]),
                TargetKind::Literal(set) => Cow::Owned(set.clone()),
                TargetKind::Any => Cow::Owned(IpSet::all()),
                TargetKind::Own => Cow::Owned(IpSet::new()),
            };
        }
        let devices = rule.dst_nodes.iter().filter_map(|slot| self.world.device(slot));
        Cow::Owned(devices.flat_map(|d| self.part_of(rule, target, d).to_ranges()).collect())
    }

    /// The addresses that a selector means as one side of a test: each of its devices', or ranges named as such.
    fn addresses_of(&self, selector: &Selector) -> Vec<IpRange> {
        match selector {
            Selector::Any => self.world.overlay.to_ranges(),
            other if is_identity(other) => {
                let devices = self.world.everyone.iter().filter_map(|slot| self.world.device(slot));
                devices.filter(|d| self.selects(other, d)).flat_map(|d| d.own.iter().copied()).collect()
            }
            other => self.literal(other).to_ranges(),
        }
    }

    fn units(&self, src: &Selector) -> Vec<Unit> {
        let name = |range: IpRange| match self.world.at(range.first()) {
            Some((_, device)) if range.first() == range.last() => format!("{src} ({})", device.name),
            _ => src.to_string(),
        };
        let ranges = self.addresses_of(src).into_iter().enumerate();
        ranges.map(|(index, range)| Unit { index, name: name(range), range }).collect()
    }

    fn run_ssh_test(&self, test: &SshTestDef) -> Vec<String> {
        let src = &test.src.value;
        let from: IpSet = self.addresses_of(src).into_iter().collect();
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

/// One address of the source of a test, or a range of them that is named as such.
struct Unit {
    index: usize,
    name: String,
    range: IpRange,
}

/// How a test ended.
#[derive(Default)]
struct Outcome {
    failures: Vec<String>,
    notes: Vec<String>,
}

impl Outcome {
    fn failed(why: String) -> Self {
        Self { failures: vec![why], notes: Vec::new() }
    }
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
