//! Why one connection is allowed or denied: every rule, every condition with its value, and what would be missing.

use std::collections::BTreeSet;
use std::net::IpAddr;

use jiff::Timestamp;
use serde::Serialize;

use super::compile::{Compiled, is_identity};
use super::model::{At, Rule};
use super::posture::{Finding, Truth};
use super::relay::CommonRelay;
use super::selector::{self, Autogroup, Selector};
use super::when;
use super::world::Device;
use crate::filter::{Action, DEFAULT_PROTOS, PROTO_TCP, RuleId, has_ports};

/// Most rules named as nearly matching. Unit: rules.
pub const MAX_NEAREST: usize = 3;

/// Why a connection is allowed or denied.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The verdict.
    pub allowed: bool,
    /// The source, for people.
    pub from: String,
    /// The destination, for people.
    pub to: String,
    /// The IP protocol.
    pub proto: u8,
    /// The destination port, for protocols with ports.
    pub port: Option<u16>,
    /// The verdict in one sentence.
    pub because: String,
    /// The rules that match: denials first.
    pub matching: Vec<RuleTrace>,
    /// Staged rules that match: what they would change is decided and counted, not enforced.
    pub staged: Vec<RuleTrace>,
    /// If nothing allows it: the rules that come nearest, best first.
    pub nearest: Vec<RuleTrace>,
    /// If it is allowed: the peer relays that may carry it between the two where they have no direct way.
    pub relays: Vec<CommonRelay>,
}

/// What one rule says about a connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleTrace {
    /// The rule.
    pub id: RuleId,
    /// Where it stands.
    pub origin: String,
    /// Its line.
    pub line: usize,
    /// Allow or deny.
    pub action: Action,
    /// The rule's `comment`.
    pub comment: Option<String>,
    /// Everything it asks for.
    pub checks: Vec<Check>,
    /// What is missing for the rule to match, one thing each: empty if it matches.
    pub missing: Vec<String>,
}

impl RuleTrace {
    fn failed(&self) -> usize {
        self.checks.iter().filter(|c| !c.holds(self.action)).count()
    }

    fn matches(&self) -> bool {
        self.failed() == 0
    }
}

/// What keeps each of `checks` from holding: the conditions that fail, where there are some.
fn missing(checks: &[Check], action: Action) -> Vec<String> {
    let mut out = Vec::new();
    for check in checks.iter().filter(|c| !c.holds(action)) {
        let failing = check.conditions.iter().filter(|f| f.truth != Truth::True);
        let before = out.len();
        out.extend(failing.map(|f| format!("{}: {}: {}", check.what, f.condition, f.why)));
        if out.len() == before {
            out.push(format!("{}: {}", check.what, check.why));
        }
    }
    out
}

/// One thing a rule asks for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// `src`, `dst`, `ip`, `via`, `srcPosture`, `dstPosture`, `when` or `expires`.
    pub what: &'static str,
    /// Does it hold?
    pub truth: Truth,
    /// Why, for people.
    pub why: String,
    /// The conditions looked at, with their values.
    pub conditions: Vec<Finding>,
}

impl Check {
    /// An unknown condition does not fulfil a grant and does fulfil a denial.
    fn holds(&self, action: Action) -> bool {
        match action {
            Action::Allow => self.truth == Truth::True,
            Action::Deny => self.truth != Truth::False,
        }
    }

    fn plain(what: &'static str, holds: bool, why: String) -> Self {
        Self { what, truth: holds.into(), why, conditions: Vec::new() }
    }
}

/// Why a question cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// No device, user or address of this name.
    #[error("\"{name}\" is no device, no user and no address{}", near.as_ref().map(|n| format!("; did you mean \"{n}\"?")).unwrap_or_default())]
    Unknown {
        /// What was asked for.
        name: String,
        /// The nearest name that exists.
        near: Option<String>,
    },
    /// A user with several devices.
    #[error("\"{name}\" is several devices: name one of {}", devices.join(", "))]
    Several {
        /// What was asked for.
        name: String,
        /// The devices.
        devices: Vec<String>,
    },
    /// The destination has no port.
    #[error("\"{0}\" has no port: write \"{0}:443\"")]
    NoPort(String),
    /// The port is not a number.
    #[error("\"{0}\" is not a port")]
    BadPort(String),
}

/// One end of a connection.
struct End<'c> {
    label: String,
    /// The device that owns the address, if any.
    device: Option<(usize, &'c Device)>,
    addrs: Vec<IpAddr>,
}

impl Compiled {
    /// Explains the connection from `from` to `to` (`name:port`, `address:port`; protocols without ports need none).
    /// Names are devices' keys, host names, users with one device, or addresses. `proto` is TCP if absent.
    ///
    /// # Errors
    /// A name that is nobody, or more than one device.
    pub fn explain(&self, from: &str, to: &str, proto: Option<u8>) -> Result<Explanation, ExplainError> {
        let proto = proto.unwrap_or(PROTO_TCP);
        let (host, port) = if has_ports(proto) {
            let (host, port, _) =
                selector::split_ports(to).map_err(|_| ExplainError::NoPort(to.to_owned()))?;
            let port = port.parse().map_err(|_| ExplainError::BadPort(port.to_owned()))?;
            (host, Some(port))
        } else {
            // A port of a protocol without ports is ignored.
            let split = selector::split_ports(to).ok().filter(|(h, _, _)| self.end(h).is_ok());
            (split.map_or_else(|| to.to_owned(), |(h, _, _)| h), None)
        };
        let from = self.end(from)?;
        let to = self.end(&host)?;
        Ok(self.explain_ends(&from, &to, proto, port))
    }

    fn explain_ends(&self, from: &End<'_>, to: &End<'_>, proto: u8, port: Option<u16>) -> Explanation {
        let model = self.policy.model();
        let mut matching = Vec::new();
        let mut staged = Vec::new();
        let mut rest = Vec::new();
        for rule in &model.rules {
            if rule.services.is_empty() {
                continue;
            }
            let trace = self.trace(rule, from, to, proto, port);
            match (trace.matches(), rule.staged) {
                (true, true) => staged.push(trace),
                (true, false) => matching.push(trace),
                (false, false) if trace.action == Action::Allow => rest.push(trace),
                (false, _) => {}
            }
        }
        // Deny wins, so it is named first.
        matching.sort_by_key(|t| (t.action == Action::Allow, t.line));
        let denied = matching.iter().any(|t| t.action == Action::Deny);
        let granted = matching.iter().any(|t| t.action == Action::Allow);
        let family = from.addrs.iter().any(|a| to.addrs.iter().any(|b| a.is_ipv4() == b.is_ipv4()));
        let answered = to.device.is_some() || to.addrs.iter().any(|a| self.is_answered(*a));
        let because = if !family {
            "the two ends have no address of the same family".to_owned()
        } else if let Some(deny) = matching.iter().find(|t| t.action == Action::Deny) {
            format!("{} denies it, and a denial wins over every grant", deny.origin)
        } else if !granted {
            "no rule allows it, and what no rule allows is denied".to_owned()
        } else if answered {
            format!("{} allows it", matching.first().map_or("a rule", |t| t.origin.as_str()))
        } else {
            "a rule allows it, but no device answers for this address".to_owned()
        };
        rest.sort_by_key(|t| (t.failed(), t.line));
        let allowed = granted && !denied && answered && family;
        let nearest = if granted || allowed {
            Vec::new()
        } else {
            // A rule about others entirely helps nobody.
            let speaks = |t: &RuleTrace| t.checks.iter().take(2).any(|c| c.truth == Truth::True);
            rest.into_iter().filter(speaks).take(MAX_NEAREST).collect()
        };
        let relays = match (from.device, to.device) {
            (Some((a, _)), Some((b, _))) if allowed && a != b => self.common_relays(a, b, self.now()),
            _ => Vec::new(),
        };
        Explanation {
            allowed,
            from: from.label.clone(),
            to: to.label.clone(),
            proto,
            port,
            because,
            matching,
            staged,
            nearest,
            relays,
        }
    }

    fn is_answered(&self, addr: IpAddr) -> bool {
        self.world
            .routers
            .iter()
            .filter_map(|slot| self.world.device(*slot))
            .any(|d| d.answers.contains(addr))
    }

    fn trace(&self, rule: &Rule, from: &End<'_>, to: &End<'_>, proto: u8, port: Option<u16>) -> RuleTrace {
        let action = rule.section.action();
        let mut checks = vec![self.check_src(rule, from)];
        let hit: BTreeSet<usize> = rule
            .dst
            .iter()
            .enumerate()
            .filter(|(_, dst)| self.is_dst(rule, &dst.value, from, to))
            .map(|(i, _)| i)
            .collect();
        checks.push(Check::plain(
            "dst",
            !hit.is_empty(),
            format!("{} {} {}", to.label, is_in(!hit.is_empty()), list(&rule.dst)),
        ));
        checks.push(check_service(rule, &hit, proto, port));
        if !rule.via.is_empty() {
            let carriers = self.carriers(rule, to);
            checks.push(Check::plain(
                "via",
                !carriers.is_empty(),
                if carriers.is_empty() {
                    format!("no device with {} carries {}", list(&rule.via), to.label)
                } else {
                    format!("carried by {}", carriers.join(", "))
                },
            ));
        }
        let defaults: &[At<String>] = if action == Action::Deny || rule.ignore_default_posture {
            &[]
        } else {
            &self.policy.model().default_src_posture
        };
        for (what, postures, end) in [
            ("defaultSrcPosture", defaults, from),
            ("srcPosture", rule.src_posture.as_slice(), from),
            ("dstPosture", rule.dst_posture.as_slice(), to),
        ] {
            if !postures.is_empty() {
                checks.push(self.check_posture(what, postures, end));
            }
        }
        if let Some(windows) = &rule.when {
            let now = self.now();
            let open = when::expand(windows, now, when::MAX_HORIZON_S);
            let holds = open.iter().any(|w| w.from <= now && now < w.until);
            let next = open.iter().find(|w| w.until > now).map(|w| {
                if holds { format!("until {}", at(w.until)) } else { format!("opens {}", at(w.from)) }
            });
            let why = next.unwrap_or_else(|| "no window opens within a month".to_owned());
            checks.push(Check::plain("when", holds, why));
        }
        if let Some(end) = rule.expires {
            let holds = end > self.now();
            let why = format!("{} {}", if holds { "until" } else { "ended" }, at(end));
            checks.push(Check::plain("expires", holds, why));
        }
        RuleTrace {
            id: rule.id,
            origin: rule.origin(),
            line: rule.line,
            action,
            comment: rule.comment.clone(),
            missing: missing(&checks, action),
            checks,
        }
    }

    fn check_src(&self, rule: &Rule, from: &End<'_>) -> Check {
        let holds = rule.src.iter().any(|src| self.is_src(&src.value, from));
        let why = format!("{} {} {}", from.label, is_in(holds), list(&rule.src));
        Check::plain("src", holds, why)
    }

    fn is_src(&self, selector: &Selector, from: &End<'_>) -> bool {
        match (selector, from.device) {
            (Selector::Any, Some(_)) => true,
            (Selector::Any, None) => {
                let routes = self.world.all_routes();
                from.addrs.iter().any(|a| routes.contains(*a) || self.world.overlay.contains(*a))
            }
            (other, Some((_, device))) if is_identity(other) => self.selects(other, device),
            (other, _) => {
                let set = self.literal(other);
                from.addrs.iter().any(|a| set.contains(*a))
            }
        }
    }

    fn is_dst(&self, rule: &Rule, selector: &Selector, from: &End<'_>, to: &End<'_>) -> bool {
        if !rule.via.is_empty() && is_identity(selector) {
            return false;
        }
        match (selector, to.device) {
            (Selector::Auto(Autogroup::SelfDevices), Some((_, device))) => {
                device.user.is_some() && from.device.is_some_and(|(_, d)| d.user == device.user)
            }
            (Selector::Auto(Autogroup::SelfDevices), None) => false,
            (Selector::Any, _) => true,
            (other, Some((_, device))) if is_identity(other) => self.selects(other, device),
            (other, _) => {
                let set = self.literal(other);
                to.addrs
                    .iter()
                    .any(|a| set.contains(*a) && from.addrs.iter().any(|b| a.is_ipv4() == b.is_ipv4()))
            }
        }
    }

    fn carriers(&self, rule: &Rule, to: &End<'_>) -> Vec<String> {
        self.world
            .routers
            .iter()
            .filter_map(|slot| self.world.device(*slot))
            .filter(|d| rule.via.iter().any(|v| self.selects(&v.value, d)))
            .filter(|d| {
                let public = |a: &IpAddr| d.exit && self.world.internet().contains(*a);
                to.addrs.iter().any(|a| d.routes.contains(*a) || public(a))
            })
            .map(|d| d.name.clone())
            .collect()
    }

    fn check_posture(&self, what: &'static str, postures: &[At<String>], end: &End<'_>) -> Check {
        let mut conditions = Vec::new();
        let mut best = Truth::False;
        let clock = Timestamp::from_second(self.now()).map(when::facts_at);
        for posture in postures {
            let mut all = Truth::True;
            let Some(defined) = self.policy.model().postures.get(&posture.value) else {
                continue;
            };
            for condition in defined.value.iter().map(|c| &c.value) {
                let finding = if let (true, Ok(clock)) = (condition.is_time(), &clock) {
                    Finding {
                        condition: condition.text().to_owned(),
                        truth: condition.evaluate_time(clock),
                        fact: None,
                        why: format!("it is {} in UTC", at(self.now())),
                    }
                } else {
                    match end.device {
                        Some((_, d)) => condition
                            .evaluate(|key| self.world.fact(d, key), self.now().saturating_sub(d.since)),
                        None => condition.evaluate(|_| None, 0),
                    }
                };
                all = all.min(finding.truth);
                conditions.push(finding);
            }
            best = best.max(all);
        }
        let names: Vec<&str> = postures.iter().map(|p| p.value.as_str()).collect();
        let verb = match best {
            Truth::True => "meets",
            Truth::False => "does not meet",
            Truth::Unknown => "is not known to meet",
        };
        Check { what, truth: best, why: format!("{} {verb} {}", end.label, names.join(" or ")), conditions }
    }

    fn end(&self, name: &str) -> Result<End<'_>, ExplainError> {
        let of = |slot: usize, device| End {
            label: self.label(device),
            device: Some((slot, device)),
            addrs: device.node.addresses().collect(),
        };
        if let Ok(addr) = name.parse::<IpAddr>() {
            return Ok(match self.world.at(addr) {
                Some((slot, device)) => End { addrs: vec![addr], ..of(slot, device) },
                None => End { label: name.to_owned(), device: None, addrs: vec![addr] },
            });
        }
        if let Some((slot, device)) = self.world.named(name) {
            return Ok(of(slot, device));
        }
        if let Some(set) = self.literals.get(&Selector::Host(name.to_owned()))
            && let Some(range) = set.ranges().next()
        {
            return self.end(&range.first().to_string());
        }
        let mut found: Vec<(usize, &Device)> = self
            .world
            .everyone
            .iter()
            .filter_map(|slot| Some((slot, self.world.device(slot)?)))
            .filter(|(_, d)| {
                d.node.hostname == name
                    || d.node.tags.contains(name)
                    || d.user.is_some_and(|u| {
                        let user = &self.world.users[u];
                        user.name == name || user.email.as_deref() == Some(name)
                    })
            })
            .collect();
        if found.len() > 1 {
            return Err(ExplainError::Several {
                name: name.to_owned(),
                devices: found.iter().map(|(_, d)| d.name.clone()).collect(),
            });
        }
        match found.pop() {
            Some((slot, device)) => Ok(of(slot, device)),
            None => Err(ExplainError::Unknown {
                name: name.to_owned(),
                near: super::diagnostic::nearest(name, self.names()).map(str::to_owned),
            }),
        }
    }

    /// A device with whose it is: `laptop (ann@example.com)`.
    pub(crate) fn label(&self, device: &Device) -> String {
        format!("{} ({})", device.name, self.owner(device))
    }

    /// Whose a device is: a user, or its tags.
    pub(crate) fn owner(&self, device: &Device) -> String {
        match device.user {
            Some(user) => {
                let user = &self.world.users[user];
                user.email.clone().unwrap_or_else(|| user.name.clone())
            }
            None if device.is_tagged() => device.node.tags.iter().cloned().collect::<Vec<_>>().join(", "),
            None => "nobody's".to_owned(),
        }
    }
}

fn check_service(rule: &Rule, hit: &BTreeSet<usize>, proto: u8, port: Option<u16>) -> Check {
    let mut offered = Vec::new();
    let mut holds = false;
    for service in &rule.services {
        let covers = match service.proto {
            Some(p) => p == proto,
            None => rule.section.action() == Action::Deny || DEFAULT_PROTOS.contains(&proto),
        };
        for (dst, ports) in &service.targets {
            // Without a matching destination, show what the rule offers anywhere.
            if !hit.is_empty() && !hit.contains(dst) {
                continue;
            }
            holds |= covers && port.is_none_or(|port| ports.iter().any(|p| p.contains(port)));
            for ports in ports {
                let proto = service.proto.map_or_else(|| "any".to_owned(), selector::proto_name);
                let text = match (ports.first, ports.last) {
                    (0, u16::MAX) => format!("{proto}:*"),
                    (a, b) if a == b => format!("{proto}:{a}"),
                    (a, b) => format!("{proto}:{a}-{b}"),
                };
                if !offered.contains(&text) && offered.len() < 16 {
                    offered.push(text);
                }
            }
        }
    }
    let wanted = match port {
        Some(port) => format!("{}:{port}", selector::proto_name(proto)),
        None => selector::proto_name(proto),
    };
    Check::plain("ip", holds, format!("{wanted} {} {}", is_in(holds), offered.join(", ")))
}

const fn is_in(holds: bool) -> &'static str {
    if holds { "is in" } else { "is not in" }
}

fn list(selectors: &[At<Selector>]) -> String {
    const SHOWN: usize = 8;
    let mut texts: Vec<String> = selectors.iter().take(SHOWN).map(|s| s.value.to_string()).collect();
    if selectors.len() > SHOWN {
        texts.push(format!("and {} more", selectors.len() - SHOWN));
    }
    format!("[{}]", texts.join(", "))
}

fn at(seconds: i64) -> String {
    Timestamp::from_second(seconds).map_or_else(|_| "never".to_owned(), |t| t.to_string())
}
