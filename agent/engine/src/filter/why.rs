//! Why a connection is or isn't possible, answered from rules, flows and recent drops. For people: it scans, it
//! isn't fast.

use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;

use serde::{Serialize, Serializer};
use warren_common::filter::{Action, DEFAULT_PROTOS, FilterRule, PortRange, RuleId, has_ports};
use warren_common::time::{Now, UnixTime, rfc3339};

use super::{DropReason, EndReason, Filter};
use crate::flow::table::FlowHash;
use crate::flow::{Direction, Flow, FlowState, Traffic};
use crate::matcher::Matcher;
use crate::packet::Packet;

/// Dropped tuples remembered, a count; a tuple's place is chosen by its hash, so a newer one may take it.
pub const MAX_RECENT_DROPS: usize = 256;
/// Flows shown in one answer, a count.
pub const MAX_WHY_FLOWS: usize = 8;
/// Rules shown that nearly match, a count per direction.
pub const MAX_NEAR_MISSES: usize = 5;

/// The answer of [`Filter::why`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Why {
    /// The local address asked for; without one, rules count whatever local address they are about.
    pub src: Option<IpAddr>,
    /// The remote address.
    pub dst: IpAddr,
    /// The IP protocol.
    pub proto: u8,
    /// The port; without meaning for protocols without ports.
    pub port: u16,
    /// The revision of the rules.
    pub revision: u64,
    /// Set while nothing is allowed, with the reason.
    pub closed: Option<EndReason>,
    /// May this device open a connection to the port at the remote address?
    pub egress: WhyDecision,
    /// May the remote address open a connection to the port at this device?
    pub ingress: WhyDecision,
    /// Flows with the remote address that were opened to the port, at most [`MAX_WHY_FLOWS`].
    pub flows: Vec<FlowView>,
    /// Recent drops with the remote address and the port at either end, the latest first.
    pub drops: Vec<DropRecord>,
}

impl Why {
    pub(crate) fn rules(&self) -> impl Iterator<Item = &RuleRef> {
        self.egress.rules().chain(self.ingress.rules())
    }

    pub(crate) fn rules_mut(&mut self) -> impl Iterator<Item = &mut RuleRef> {
        self.egress.rules_mut().chain(self.ingress.rules_mut())
    }
}

/// What the rules say about one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WhyDecision {
    /// The verdict on a new connection.
    pub outcome: Outcome,
    /// The rule that decides.
    pub rule: Option<RuleRef>,
    /// Staged rules that would match.
    pub staged: Vec<RuleRef>,
    /// Allow rules that fail by one thing only, the nearest first; none if a connection is allowed.
    pub near_misses: Vec<NearMiss>,
}

impl WhyDecision {
    /// Which rule decides, for people.
    pub(crate) fn verdict(&self) -> String {
        let verb = if self.outcome == Outcome::Allowed { "allowed" } else { "denied" };
        match &self.rule {
            Some(rule) => format!("{verb} by {} ({})", rule.origin, rule.id),
            None => format!("{verb} by a rule"),
        }
    }

    fn rules(&self) -> impl Iterator<Item = &RuleRef> {
        let near = self.near_misses.iter().map(|miss| &miss.rule);
        self.rule.iter().chain(&self.staged).chain(near)
    }

    fn rules_mut(&mut self) -> impl Iterator<Item = &mut RuleRef> {
        let near = self.near_misses.iter_mut().map(|miss| &mut miss.rule);
        self.rule.iter_mut().chain(&mut self.staged).chain(near)
    }
}

/// The verdict on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A rule allows it and none denies it.
    Allowed,
    /// A deny rule covers it.
    DeniedByRule,
    /// No rule allows it.
    NoRule,
    /// Nothing is allowed at present, whatever the rules said.
    Closed,
}

/// Names a rule for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleRef {
    /// Its id.
    #[serde(serialize_with = "as_text")]
    pub id: RuleId,
    /// Where it stands in the policy.
    pub origin: String,
    /// Allow or deny.
    pub action: Action,
}

/// An allow rule that nearly matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleRef,
    /// What keeps it from matching.
    pub miss: Miss,
}

/// The one thing that keeps a rule from matching; the variants are in the order of nearness.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Miss {
    /// It isn't in force now.
    Time {
        /// When it will be, if ever, as RFC 3339 text.
        #[serde(with = "rfc3339::option")]
        next: Option<UnixTime>,
    },
    /// It opens other ports of the destination.
    Port {
        /// Those, such as `22, 8000-8080`.
        opens: String,
    },
    /// It opens other protocols.
    Protocol {
        /// Their numbers.
        opens: Vec<u8>,
    },
    /// It is for other sources.
    Source,
}

/// One flow for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowView {
    /// The local address.
    pub local: IpAddr,
    /// The local port or ICMP identifier, or zero.
    pub local_port: u16,
    /// The remote address.
    pub remote: IpAddr,
    /// The remote port, or zero.
    pub remote_port: u16,
    /// The IP protocol.
    pub proto: u8,
    /// The way the packet went that opened it.
    pub opened: Direction,
    /// Where it stands.
    pub state: FlowState,
    /// The rule that allows it.
    #[serde(serialize_with = "as_text")]
    pub rule: RuleId,
    /// The revision it was last checked against.
    pub revision: u64,
    /// The peer, by the engine's handle.
    pub peer: u32,
    /// Milliseconds since it was opened.
    pub age_ms: u64,
    /// Milliseconds since its last packet.
    pub idle_ms: u64,
    /// What went to the peer.
    pub sent: Traffic,
    /// What came from the peer.
    pub received: Traffic,
}

impl FlowView {
    /// The view of `flow` at `now`.
    pub fn new(flow: &Flow, now: Now) -> Self {
        let millis = |since| u64::try_from(now.boot.since(since).as_millis()).unwrap_or(u64::MAX);
        Self {
            local: flow.key.local(),
            local_port: flow.key.local_port(),
            remote: flow.key.remote(),
            remote_port: flow.key.remote_port(),
            proto: flow.key.proto(),
            opened: flow.opened,
            state: flow.state,
            rule: flow.rule,
            revision: flow.revision,
            peer: flow.peer,
            age_ms: millis(flow.since),
            idle_ms: millis(flow.seen),
            sent: flow.sent,
            received: flow.received,
        }
    }
}

/// Packets of one tuple that were dropped in a row for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DropRecord {
    /// Which way they went.
    pub direction: Direction,
    /// Source address.
    pub src: IpAddr,
    /// Source port, or zero.
    pub src_port: u16,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port, or zero.
    pub dst_port: u16,
    /// The IP protocol.
    pub proto: u8,
    /// Why.
    pub reason: DropReason,
    /// How many.
    pub count: u64,
    /// When the last one was, as RFC 3339 text.
    #[serde(with = "rfc3339")]
    pub last: UnixTime,
}

impl DropRecord {
    const fn remote(&self) -> IpAddr {
        match self.direction {
            Direction::Egress => self.dst,
            Direction::Ingress => self.src,
        }
    }
}

#[derive(Debug)]
pub(super) struct RecentDrops {
    hash: FlowHash,
    slots: Vec<Option<DropRecord>>,
}

impl RecentDrops {
    pub(super) fn new(hash: FlowHash) -> Self {
        Self { hash, slots: vec![None; MAX_RECENT_DROPS] }
    }

    /// Remembers a drop. The source port of a packet that asks for a connection changes at each attempt, so the
    /// place doesn't depend on it.
    pub(super) fn note(&mut self, direction: Direction, now: Now, packet: &Packet<'_>, reason: DropReason) {
        let record = DropRecord {
            direction,
            src: packet.src(),
            src_port: packet.src_port(),
            dst: packet.dst(),
            dst_port: packet.dst_port(),
            proto: packet.proto,
            reason,
            count: 1,
            last: now.unix,
        };
        let mut hasher = self.hash.build_hasher();
        for addr in [record.src, record.dst] {
            let bits = match addr {
                IpAddr::V4(v4) => u128::from(v4.to_bits()),
                IpAddr::V6(v6) => v6.to_bits(),
            };
            hasher.write_u64((bits >> 64) as u64);
            hasher.write_u64(bits as u64);
        }
        hasher.write_u64(u64::from(record.dst_port) << 16 | u64::from(record.proto) << 8 | direction as u64);
        let slot = hasher.finish() as usize % MAX_RECENT_DROPS;
        let Some(slot) = self.slots.get_mut(slot) else {
            return;
        };
        let before = slot
            .filter(|old| {
                (old.direction, old.src, old.dst, old.dst_port)
                    == (direction, record.src, record.dst, record.dst_port)
                    && (old.proto, old.reason) == (record.proto, reason)
            })
            .map_or(0, |old| old.count);
        *slot = Some(DropRecord { count: before + 1, ..record });
    }

    fn with(&self, remote: IpAddr, proto: u8, port: u16) -> Vec<DropRecord> {
        let mut drops: Vec<DropRecord> = self
            .slots
            .iter()
            .flatten()
            .filter(|drop| drop.remote() == remote && drop.proto == proto)
            .filter(|drop| !has_ports(proto) || drop.src_port == port || drop.dst_port == port)
            .copied()
            .collect();
        drops
            .sort_by_key(|drop| (std::cmp::Reverse(drop.last), drop.direction, drop.src_port, drop.dst_port));
        drops
    }
}

impl Filter {
    /// Explains what happens to connections between this device (its address `src`) and `dst` on `proto` and `port`.
    pub fn why(&self, now: Now, src: Option<IpAddr>, dst: IpAddr, proto: u8, port: u16) -> Why {
        let ask = |direction| {
            let (from, to) = match direction {
                Direction::Egress => (src, Some(dst)),
                Direction::Ingress => (Some(dst), src),
            };
            let question = Question { src: from, dst: to, proto, port };
            let decision = question.decide(self.rules.matcher(direction), now.unix);
            match self.closed {
                Some(_) => WhyDecision { outcome: Outcome::Closed, ..decision },
                None => decision,
            }
        };
        Why {
            src,
            dst,
            proto,
            port,
            revision: self.rules.revision,
            closed: self.closed,
            egress: ask(Direction::Egress),
            ingress: ask(Direction::Ingress),
            flows: self
                .flows
                .flows()
                .filter(|flow| flow.expires() > now.boot)
                .filter(|flow| flow.key.remote() == dst && flow.key.proto() == proto)
                .filter(|flow| src.is_none_or(|src| flow.key.local() == src))
                .filter(|flow| !has_ports(proto) || flow.key.service_port(flow.opened) == port)
                .take(MAX_WHY_FLOWS)
                .map(|flow| FlowView::new(flow, now))
                .collect(),
            drops: self.recent.with(dst, proto, port),
        }
    }
}

/// A query in which an unknown address matches any.
struct Question {
    src: Option<IpAddr>,
    dst: Option<IpAddr>,
    proto: u8,
    port: u16,
}

impl Question {
    fn decide(&self, matcher: &Matcher, now: UnixTime) -> WhyDecision {
        let mut allow = None;
        let mut deny = None;
        let mut staged = Vec::new();
        let mut near_misses = Vec::new();
        for rule in matcher.rules() {
            match self.misses(rule, now).as_slice() {
                [] if rule.staged => staged.push(RuleRef::new(rule)),
                [] => {
                    let first = match rule.action {
                        Action::Allow => &mut allow,
                        Action::Deny => &mut deny,
                    };
                    first.get_or_insert_with(|| RuleRef::new(rule));
                }
                [miss] if !rule.staged && rule.action == Action::Allow => {
                    near_misses.push(NearMiss { rule: RuleRef::new(rule), miss: miss.clone() });
                }
                _ => {}
            }
        }
        let outcome = match (&deny, &allow) {
            (Some(_), _) => Outcome::DeniedByRule,
            (None, Some(_)) => Outcome::Allowed,
            (None, None) => Outcome::NoRule,
        };
        if outcome == Outcome::NoRule {
            near_misses.sort_by(|a, b| a.miss.cmp(&b.miss));
            near_misses.truncate(MAX_NEAR_MISSES);
        } else {
            near_misses.clear();
        }
        WhyDecision { outcome, rule: deny.or(allow), staged, near_misses }
    }

    /// What keeps the rule from matching; a rule for other destinations has nothing to do with the question, which
    /// counts as two things.
    fn misses(&self, rule: &FilterRule, now: UnixTime) -> Vec<Miss> {
        let mut misses = Vec::new();
        if !rule.is_active(now.as_secs()) {
            let begins = rule.active.iter().flatten().map(|window| window.from);
            misses.push(Miss::Time {
                next: begins.filter(|from| *from > now.as_secs()).min().map(UnixTime::from_secs),
            });
        }
        if let Some(src) = self.src
            && !rule.src.iter().any(|range| range.contains(src))
        {
            misses.push(Miss::Source);
        }
        let protos: &[u8] = if rule.protos.is_empty() { &DEFAULT_PROTOS } else { &rule.protos };
        if !protos.contains(&self.proto) {
            misses.push(Miss::Protocol { opens: protos.to_vec() });
        }
        let mut ports: Vec<PortRange> = rule
            .dst
            .iter()
            .filter(|dst| self.dst.is_none_or(|addr| dst.net.contains(addr)))
            .map(|dst| dst.ports)
            .collect();
        if ports.is_empty() {
            misses.extend([Miss::Source, Miss::Source]);
        } else if has_ports(self.proto) && !ports.iter().any(|range| range.contains(self.port)) {
            ports.sort_unstable();
            ports.dedup();
            misses.push(Miss::Port { opens: ports_text(&ports) });
        }
        misses
    }
}

impl RuleRef {
    fn new(rule: &FilterRule) -> Self {
        Self { id: rule.id, origin: rule.origin.clone(), action: rule.action }
    }
}

fn ports_text(ports: &[PortRange]) -> String {
    const SHOWN: usize = 8;
    let mut parts: Vec<String> = ports
        .iter()
        .take(SHOWN)
        .map(|range| {
            if range.first == range.last {
                range.first.to_string()
            } else {
                format!("{}-{}", range.first, range.last)
            }
        })
        .collect();
    if ports.len() > SHOWN {
        parts.push("…".to_owned());
    }
    parts.join(", ")
}

/// Ids as text in JSON: a number of 64 bits doesn't survive every reader.
pub(crate) fn as_text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
