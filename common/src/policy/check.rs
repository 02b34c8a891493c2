//! Do the names exist, and may they stand where they stand?

use std::collections::{BTreeMap, BTreeSet};

use super::diagnostic::{Report, Span};
use super::ipset::IpSet;
use super::model::{At, Model, Rule, Section, SshDef, TestDef};
use super::selector::{self, Autogroup, Selector};
use crate::filter::IpRange;

pub(crate) fn check(model: &Model, report: &mut Report<'_>) {
    let mut c = Checker { model, report };
    for (tag, owners) in &model.tag_owners {
        c.tag_name(tag, owners.span);
        for owner in &owners.value {
            c.owner(owner, "an owner of a tag");
        }
    }
    c.tag_cycles();
    for rule in &model.rules {
        if c.report.is_full() {
            return;
        }
        c.rule(rule);
    }
    c.postures(&model.default_src_posture);
    for (_, who) in &model.route_approvers {
        who.iter().for_each(|w| c.owner(w, "an approver"));
    }
    model.exit_approvers.iter().for_each(|w| c.owner(w, "an approver"));
    for attr in &model.node_attrs {
        for target in &attr.target {
            match &target.value {
                Selector::Auto(
                    Autogroup::SelfDevices
                    | Autogroup::Internet
                    | Autogroup::DangerAll
                    | Autogroup::NonRoot
                    | Autogroup::Shared,
                ) => c.report.error(
                    target.span,
                    format!("\"{}\" is not a set of devices to give attributes to", target.value),
                ),
                _ => c.name(target, "target"),
            }
        }
    }
    for ssh in &model.ssh {
        c.ssh(ssh);
    }
    for test in &model.tests {
        c.test(test);
    }
    for test in &model.ssh_tests {
        for dst in &test.dst {
            c.ssh_test_dst(dst);
        }
    }
    c.ipset_cycles();
}

struct Checker<'m, 'r, 's> {
    model: &'m Model,
    report: &'r mut Report<'s>,
}

impl Checker<'_, '_, '_> {
    fn tag_name(&mut self, tag: &str, span: Span) {
        let Some(name) = tag.strip_prefix("tag:") else {
            self.report.error_help(
                span,
                format!("\"{tag}\" is not the name of a tag"),
                format!("write \"tag:{tag}\""),
            );
            return;
        };
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            self.report.error(span, format!("\"{tag}\": tag names must start with a letter, after 'tag:'"));
        } else if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')) {
            self.report
                .error(span, format!("\"{tag}\": tag names may contain only letters, digits, -, _ and ."));
        }
    }

    /// Somebody who owns tags or approves routes.
    fn owner(&mut self, who: &At<Selector>, what: &str) {
        match &who.value {
            Selector::Group(_) | Selector::Tag(_) => self.name(who, what.trim_start_matches("an ")),
            Selector::User(_)
            | Selector::Domain(_)
            | Selector::Auto(Autogroup::Member | Autogroup::Tagged | Autogroup::Role(_)) => {}
            other => self.report.error_help(
                who.span,
                format!("\"{other}\" cannot be {what}"),
                "expected a user, a group or a tag",
            ),
        }
    }

    /// Does the name exist?
    fn name(&mut self, at: &At<Selector>, side: &str) {
        let model = self.model;
        match &at.value {
            Selector::Group(name) => {
                self.exists(at.span, name, &model.groups, || format!("{side}: unknown group \"{name}\""))
            }
            Selector::Tag(name) => self.exists(at.span, name, &model.tag_owners, || {
                format!("{side}: tag not found: \"{name}\" is not in tagOwners")
            }),
            Selector::Host(name) => {
                self.exists(at.span, name, &model.hosts, || format!("{side}: unknown host \"{name}\""))
            }
            Selector::IpSet(name) => {
                self.exists(at.span, name, &model.ipsets, || format!("{side}: unknown IP set \"{name}\""))
            }
            Selector::Any
            | Selector::User(_)
            | Selector::Domain(_)
            | Selector::Addresses(_)
            | Selector::Auto(_) => {}
        }
    }

    fn exists<T>(
        &mut self,
        span: Span,
        name: &str,
        defined: &BTreeMap<String, T>,
        message: impl Fn() -> String,
    ) {
        if !defined.contains_key(name) {
            self.report.error_near(span, message(), name, defined.keys().map(String::as_str));
        }
    }

    fn rule(&mut self, rule: &Rule) {
        let to_self = rule.dst.iter().any(|d| d.value == Selector::Auto(Autogroup::SelfDevices));
        for src in &rule.src {
            self.rule_src(src, to_self, rule.section);
        }
        for dst in &rule.dst {
            self.rule_dst(dst, rule);
        }
        for via in &rule.via {
            self.name(via, "via");
        }
        self.postures(&rule.src_posture);
        self.postures(&rule.dst_posture);
    }

    fn rule_src(&mut self, src: &At<Selector>, to_self: bool, section: Section) {
        match &src.value {
            Selector::Auto(Autogroup::Internet) => {
                self.report.error(src.span, "src: autogroup:internet can only be used as a destination")
            }
            Selector::Auto(Autogroup::SelfDevices) => {
                self.report.error(src.span, "src: \"autogroup:self\" not valid on the src side of a rule")
            }
            Selector::Auto(Autogroup::NonRoot) => self
                .report
                .error(src.span, "src: autogroup:nonroot is a login user of SSH rules, not a source"),
            _ => self.name(src, "src"),
        }
        let own_devices = match &src.value {
            Selector::User(_) | Selector::Domain(_) | Selector::Group(_) => true,
            Selector::Auto(Autogroup::Member | Autogroup::Role(_)) => true,
            Selector::Any => section != Section::Grants,
            _ => false,
        };
        if to_self && !own_devices {
            self.report.error_help(
                src.span,
                format!(
                    "src \"{}\": autogroup:self can only be used with users, groups, or supported autogroups",
                    src.value
                ),
                "autogroup:member is every device of a person",
            );
        }
    }

    fn rule_dst(&mut self, dst: &At<Selector>, rule: &Rule) {
        match &dst.value {
            Selector::Auto(Autogroup::DangerAll) => {
                self.report.error(dst.span, "dst: cannot use autogroup:danger-all as a dst")
            }
            Selector::Auto(Autogroup::NonRoot) => self
                .report
                .error(dst.span, "dst: autogroup:nonroot is a login user of SSH rules, not a destination"),
            Selector::Auto(Autogroup::Internet) if !rule.app.is_empty() => {
                self.report.error(dst.span, "dst: cannot use app grants with autogroup:internet")
            }
            Selector::Addresses(range)
                if rule.section == Section::Grants && selector::is_default_route(*range) =>
            {
                self.report.error(
                    dst.span,
                    format!(
                        "dst \"{}\": to allow all IP addresses, use \"*\" or \"autogroup:internet\"",
                        dst.value
                    ),
                );
            }
            _ => self.name(dst, "dst"),
        }
    }

    fn postures(&mut self, names: &[At<String>]) {
        let model = self.model;
        for at in names {
            self.exists(at.span, &at.value, &model.postures, || format!("unknown posture \"{}\"", at.value));
        }
    }

    fn ssh(&mut self, ssh: &SshDef) {
        let mut from_tags = false;
        let mut from_sets = false;
        let mut users = BTreeSet::new();
        for src in &ssh.src {
            match &src.value {
                Selector::User(name) => {
                    users.insert(name.as_str());
                }
                Selector::Domain(_)
                | Selector::Group(_)
                | Selector::Auto(Autogroup::Member | Autogroup::Role(_)) => from_sets = true,
                Selector::Tag(_) | Selector::Auto(Autogroup::Tagged) => from_tags = true,
                other => {
                    self.report.error_help(
                        src.span,
                        format!("\"{other}\" cannot be a source of SSH"),
                        "expected users, groups, tags, autogroup:member or autogroup:tagged",
                    );
                    continue;
                }
            }
            self.name(src, "src");
        }
        for dst in &ssh.dst {
            match &dst.value {
                Selector::Tag(_) => self.name(dst, "dst"),
                Selector::Auto(Autogroup::Tagged | Autogroup::Role(_)) => {}
                Selector::Auto(Autogroup::SelfDevices) if from_tags => self.report.error(
                    dst.span,
                    "autogroup:self as a destination needs users or groups as source, not tags",
                ),
                Selector::Auto(Autogroup::Member) if from_tags => {
                    self.report.error(dst.span, "tags cannot log in to devices of people (autogroup:member)")
                }
                Selector::Auto(Autogroup::SelfDevices | Autogroup::Member) => {}
                Selector::User(name) => {
                    let only_self = !from_sets && users.len() == 1 && users.contains(name.as_str());
                    if from_tags {
                        self.report.error(dst.span, format!("tags cannot log in to devices of {name}"));
                    } else if !only_self {
                        self.report.error_help(
                            dst.span,
                            format!("only {name} can log in to devices of {name}"),
                            "use autogroup:self for people's own devices",
                        );
                    }
                }
                Selector::Any => self.report.error_help(
                    dst.span,
                    "wildcard (*) is not supported as SSH destination",
                    "use autogroup:member for people's devices, autogroup:tagged or tags",
                ),
                Selector::Host(name) => {
                    self.report.error(
                        dst.span,
                        format!("invalid dst \"{name}\": a host cannot be a destination of SSH"),
                    );
                }
                other => self.report.error(dst.span, format!("\"{other}\" cannot be a destination of SSH")),
            }
        }
        self.postures(&ssh.src_posture);
    }

    fn test(&mut self, test: &TestDef) {
        if test.src.value.is_empty() {
            self.report.error(test.src.span, "a test must have a source");
        } else {
            match Selector::parse(&test.src.value) {
                Ok(value) => self.name(&At { value, span: test.src.span }, "src"),
                Err(error) => self.report.error(test.src.span, error.message),
            }
        }
        if test.accept.is_empty() && test.deny.is_empty() {
            self.report.error(test.span, "a test must have at least one of \"accept\" or \"deny\"");
        }
        if let Some(proto) = test.proto
            && !crate::filter::has_ports(proto)
        {
            self.report.error(
                test.span,
                format!("a test's protocol must be tcp, udp or sctp, not {}", selector::proto_name(proto)),
            );
        }
        for dst in test.accept.iter().chain(&test.deny) {
            self.test_dst(dst);
        }
    }

    fn test_dst(&mut self, dst: &At<String>) {
        let parsed = selector::split_ports(&dst.value).and_then(|(host, ports, _)| {
            Ok((Selector::parse(&host)?, selector::parse_ports(ports)?, host.contains('/')))
        });
        let (what, ports, cidr) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => {
                self.report.error(dst.span, error.message);
                return;
            }
        };
        if ports.len() != 1 || ports.iter().any(|p| p.first != p.last) {
            self.report.error(dst.span, "a test's destination port must be a single port");
        }
        match &what {
            Selector::Auto(
                Autogroup::Internet | Autogroup::SelfDevices | Autogroup::DangerAll | Autogroup::NonRoot,
            ) => self.report.error_help(
                dst.span,
                format!("{what} not valid as a test destination"),
                "name a user, a tag, a host or an address",
            ),
            Selector::Addresses(range) if cidr || range.first() != range.last() => {
                self.test_network(dst.span);
            }
            Selector::Host(name) => match self.model.hosts.get(name) {
                Some(host) if host.value.first() != host.value.last() => {
                    self.test_network(dst.span);
                }
                Some(_) => {}
                None => self.name(&At { value: what, span: dst.span }, "dst"),
            },
            _ => self.name(&At { value: what, span: dst.span }, "dst"),
        }
    }

    fn test_network(&mut self, span: Span) {
        self.report.error(span, "a test's destination must be a single host, not a CIDR range");
    }

    fn ssh_test_dst(&mut self, dst: &At<Selector>) {
        let single = |range: &IpRange| range.first() == range.last();
        let allowed = match &dst.value {
            Selector::Auto(Autogroup::Internet | Autogroup::DangerAll) => false,
            Selector::Addresses(range) => single(range),
            Selector::Host(name) => self.model.hosts.get(name).is_none_or(|h| single(&h.value)),
            _ => true,
        };
        if !allowed {
            self.report
                .error(dst.span, format!("SSH tests dst contains disallowed element \"{}\"", dst.value));
        }
        self.name(dst, "SSH tests dst");
    }

    /// Who owns a tag through other tags: that two tags own each other is strange, and harmless.
    fn tag_cycles(&mut self) {
        let edges = self.model.tag_owners.iter().map(|(tag, owners)| {
            let owned_by = owners.value.iter().filter_map(|o| match &o.value {
                // A tag that owns itself is common: its devices may use it again.
                Selector::Tag(name) if name != tag => Some(name.as_str()),
                _ => None,
            });
            (tag.as_str(), owned_by.collect())
        });
        if let Some(tag) = order(&edges.collect()).err()
            && let Some(at) = self.model.tag_owners.get(tag)
        {
            self.report.warning(at.span, format!("\"{tag}\" owns itself through other tags"));
        }
    }

    fn ipset_cycles(&mut self) {
        for steps in self.model.ipsets.values() {
            for step in &steps.value {
                self.name(&At { value: step.value.what.clone(), span: step.span }, "ipset");
            }
        }
        if let Some(name) = order(&ipset_parts(self.model)).err()
            && let Some(at) = self.model.ipsets.get(name)
        {
            self.report.error(at.span, format!("\"{name}\" contains itself"));
        }
    }
}

/// The IP sets that each IP set names.
fn ipset_parts(model: &Model) -> BTreeMap<&str, Vec<&str>> {
    let parts = model.ipsets.iter().map(|(name, steps)| {
        let named = steps.value.iter().filter_map(|s| match &s.value.what {
            Selector::IpSet(part) => Some(part.as_str()),
            _ => None,
        });
        (name.as_str(), named.collect())
    });
    parts.collect()
}

/// The names so that everything a name refers to stands before it; on a cycle, a name on it.
fn order<'g>(edges: &BTreeMap<&'g str, Vec<&'g str>>) -> Result<Vec<&'g str>, &'g str> {
    let mut done = BTreeSet::new();
    let mut open = BTreeSet::new();
    let mut out = Vec::new();
    for start in edges.keys() {
        let mut stack = vec![(*start, 0_usize)];
        while let Some((name, next)) = stack.pop() {
            if next == 0 {
                if done.contains(name) {
                    continue;
                }
                open.insert(name);
            }
            match edges.get(name).and_then(|to| to.get(next)) {
                Some(to) => {
                    stack.push((name, next + 1));
                    if open.contains(to) {
                        return Err(to);
                    }
                    if edges.contains_key(to) && !done.contains(to) {
                        stack.push((to, 0));
                    }
                }
                None => {
                    open.remove(name);
                    if done.insert(name) {
                        out.push(name);
                    }
                }
            }
        }
    }
    Ok(out)
}

/// Every IP set with its addresses. The file is checked: no cycles, every name exists.
pub(crate) fn resolve_ipsets(model: &Model) -> BTreeMap<String, IpSet> {
    let mut out: BTreeMap<String, IpSet> = BTreeMap::new();
    for name in order(&ipset_parts(model)).unwrap_or_default() {
        let mut set = IpSet::new();
        for step in model.ipsets.get(name).map(|s| &s.value).into_iter().flatten() {
            let part = match &step.value.what {
                Selector::Addresses(range) => IpSet::from_iter([*range]),
                Selector::Host(host) => model.hosts.get(host).map(|h| h.value).into_iter().collect(),
                Selector::IpSet(other) => out.get(other).cloned().unwrap_or_default(),
                Selector::Auto(Autogroup::Internet) => internet(),
                _ => IpSet::new(),
            };
            if step.value.add {
                set.extend(&part);
            } else {
                set = set.minus(&part);
            }
        }
        out.insert(name.to_owned(), set);
    }
    out
}

/// What autogroup:internet is: the public addresses of both families.
pub(crate) fn internet() -> IpSet {
    const PRIVATE: [&str; 8] = [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        // Multicast and reserved.
        "224.0.0.0/3",
    ];
    let mut set = IpSet::new();
    set.insert(IpRange::ALL_V4);
    set.extend(&selector::parse_addresses("2000::/3").into_iter().collect());
    for net in PRIVATE {
        if let Some(range) = selector::parse_addresses(net) {
            set.remove(range);
        }
    }
    set
}
