//! Packet-filter rules: what the policy compiler produces, the netmap carries and the engine matches.
//!
//! A rule is closed data: addresses, ports, protocols and absolute times. Names, groups, postures and time zones
//! are resolved by the coordinator, so an agent can enforce a rule (and end it) with nothing but its own clock.
//! Matching semantics: a packet is allowed when some active, not staged `Allow` rule matches and no active, not
//! staged `Deny` rule matches. No match means denied.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// ICMP's protocol number (RFC 792).
pub const PROTO_ICMP: u8 = 1;
/// TCP's protocol number (RFC 9293).
pub const PROTO_TCP: u8 = 6;
/// UDP's protocol number (RFC 768).
pub const PROTO_UDP: u8 = 17;
/// ICMPv6's protocol number (RFC 4443).
pub const PROTO_ICMPV6: u8 = 58;
/// SCTP's protocol number (RFC 9260).
pub const PROTO_SCTP: u8 = 132;
/// What a rule that names no protocol covers.
pub const DEFAULT_PROTOS: [u8; 4] = [PROTO_TCP, PROTO_UDP, PROTO_ICMP, PROTO_ICMPV6];

/// True for the protocols whose packets carry ports (TCP, UDP, SCTP); port ranges mean nothing for the others.
pub const fn has_ports(proto: u8) -> bool {
    matches!(proto, PROTO_TCP | PROTO_UDP | PROTO_SCTP)
}

/// An inclusive range of addresses of one family, `first <= last`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IpRange {
    first: IpAddr,
    last: IpAddr,
}

impl IpRange {
    /// All of IPv4.
    pub const ALL_V4: Self =
        Self { first: IpAddr::V4(Ipv4Addr::UNSPECIFIED), last: IpAddr::V4(Ipv4Addr::BROADCAST) };
    /// All of IPv6.
    pub const ALL_V6: Self = Self {
        first: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        last: IpAddr::V6(Ipv6Addr::new(0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff)),
    };

    /// A range from `first` to `last`, both included. `None` if the families differ or `first > last`.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(Self { first, last })
    }

    /// The lowest address of the range.
    pub const fn first(&self) -> IpAddr {
        self.first
    }

    /// The highest address of the range.
    pub const fn last(&self) -> IpAddr {
        self.last
    }

    /// True if `addr` is of the range's family and inside it.
    pub fn contains(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.first.is_ipv4() && self.first <= addr && addr <= self.last
    }

    /// The common part of two ranges, if there is one.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        if self.first.is_ipv4() != other.first.is_ipv4() {
            return None;
        }
        Self::new(self.first.max(other.first), self.last.min(other.last))
    }
}

impl From<IpAddr> for IpRange {
    fn from(addr: IpAddr) -> Self {
        Self { first: addr, last: addr }
    }
}

impl From<ipnet::IpNet> for IpRange {
    fn from(net: ipnet::IpNet) -> Self {
        Self { first: net.network(), last: net.broadcast() }
    }
}

impl fmt::Display for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl fmt::Debug for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An inclusive range of ports, `first <= last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRange {
    /// Lowest port, 0 to 65 535.
    pub first: u16,
    /// Highest port, at least `first`.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    /// True if `port` is inside.
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// A destination a rule opens: addresses and ports together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FilterDst {
    /// Addresses.
    pub net: IpRange,
    /// Ports; ignored for protocols without ports.
    pub ports: PortRange,
}

/// Whether a rule opens or closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The rule allows what it matches.
    Allow,
    /// The rule denies what it matches, whatever else allows it.
    Deny,
}

/// A half-open interval of wall-clock time in seconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UnixInterval {
    /// First second inside.
    pub from: i64,
    /// First second outside again.
    pub until: i64,
}

/// Names a rule across revisions: a hash of its text, so that an edit elsewhere in the file does not rename it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RuleId(pub u64);

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule_{:016x}", self.0)
    }
}

/// One compiled rule, seen by one device.
///
/// Rules are compared, ordered and hashed without [`FilterRule::origin`]: a rule that only moved inside the policy file
/// is the same rule, and nobody needs to hear of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FilterRule {
    /// Which policy rule this comes from.
    pub id: RuleId,
    /// Where the rule stood in the policy when it was sent, for people: `grants[3] line 41`. The coordinator knows
    /// where it stands now ([`crate::wire::control::RuleOriginsRequest`]).
    pub origin: String,
    /// Allow or deny.
    pub action: Action,
    /// Decided and counted, never enforced.
    pub staged: bool,
    /// Sources. Empty matches nothing.
    pub src: Vec<IpRange>,
    /// Destinations. Empty matches nothing.
    pub dst: Vec<FilterDst>,
    /// IP protocol numbers, sorted; empty means [`DEFAULT_PROTOS`].
    pub protos: Vec<u8>,
    /// When the rule is in force; `None` is always. Sorted, disjoint.
    pub active: Option<Vec<UnixInterval>>,
}

/// What makes a rule this rule.
type Meaning<'r> =
    (RuleId, Action, bool, &'r [IpRange], &'r [FilterDst], &'r [u8], Option<&'r Vec<UnixInterval>>);

impl FilterRule {
    fn meaning(&self) -> Meaning<'_> {
        (self.id, self.action, self.staged, &self.src, &self.dst, &self.protos, self.active.as_ref())
    }

    /// True if the rule is in force at `now` (seconds since the Unix epoch).
    pub fn is_active(&self, now: i64) -> bool {
        match &self.active {
            None => true,
            Some(windows) => windows.iter().any(|w| w.from <= now && now < w.until),
        }
    }

    /// The obviously right matcher, the oracle for every faster one: does the rule cover this packet?
    /// `dst_port` is ignored for protocols without ports. Says nothing about action, time or staging.
    pub fn covers(&self, src: IpAddr, dst: IpAddr, proto: u8, dst_port: u16) -> bool {
        let protos: &[u8] = if self.protos.is_empty() { &DEFAULT_PROTOS } else { &self.protos };
        protos.contains(&proto)
            && self.src.iter().any(|r| r.contains(src))
            && self
                .dst
                .iter()
                .any(|d| d.net.contains(dst) && (!has_ports(proto) || d.ports.contains(dst_port)))
    }
}

impl PartialEq for FilterRule {
    fn eq(&self, other: &Self) -> bool {
        self.meaning() == other.meaning()
    }
}

impl Eq for FilterRule {}

impl Ord for FilterRule {
    fn cmp(&self, other: &Self) -> Ordering {
        self.meaning().cmp(&other.meaning())
    }
}

impl PartialOrd for FilterRule {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for FilterRule {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.meaning().hash(state);
    }
}
