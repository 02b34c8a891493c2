//! The words of the language: selectors, ports, protocols, durations. Pure text to data, no look-ups.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::filter::{self, IpRange, PortRange};

/// Most ports or port ranges in one list; more is a mistake. Unit: entries.
pub const MAX_PORTS: usize = 1_024;

/// Who or what a rule speaks of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Selector {
    /// `*`: as a source every device and approved route, as a destination everything.
    Any,
    /// A person, `ann@example.com`.
    User(String),
    /// Everyone of a domain, `user:*@example.com`.
    Domain(String),
    /// `group:name`.
    Group(String),
    /// `tag:name`.
    Tag(String),
    /// A name of the `hosts` section.
    Host(String),
    /// `ipset:name`.
    IpSet(String),
    /// An address, a CIDR or `low-high`.
    Addresses(IpRange),
    /// `autogroup:name`.
    Auto(Autogroup),
}

/// Groups that exist without being defined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Autogroup {
    /// Every device of a person.
    Member,
    /// Every device with a tag.
    Tagged,
    /// The devices of the source's own user.
    SelfDevices,
    /// Public addresses, through a device that offers an exit route.
    Internet,
    /// Every address, also of no device. A source only.
    DangerAll,
    /// A login user of an SSH rule: any but root.
    NonRoot,
    /// Devices of other networks shared into this one: none in Warren.
    Shared,
    /// People with this role.
    Role(Role),
}

/// What a person may administer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Role {
    /// Owns the network.
    Owner,
    /// Administers everything.
    Admin,
    /// Administers people and devices.
    ItAdmin,
    /// Administers the policy.
    NetworkAdmin,
    /// Administers billing.
    BillingAdmin,
    /// Reads everything.
    Auditor,
}

impl Role {
    /// The word of the policy file and the inventory.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::ItAdmin => "it-admin",
            Self::NetworkAdmin => "network-admin",
            Self::BillingAdmin => "billing-admin",
            Self::Auditor => "auditor",
        }
    }
}

/// Every autogroup by its word.
pub(crate) const AUTOGROUPS: [(&str, Autogroup); 14] = [
    ("member", Autogroup::Member),
    // What the language called it before; files still say so.
    ("members", Autogroup::Member),
    ("tagged", Autogroup::Tagged),
    ("self", Autogroup::SelfDevices),
    ("internet", Autogroup::Internet),
    ("danger-all", Autogroup::DangerAll),
    ("nonroot", Autogroup::NonRoot),
    ("shared", Autogroup::Shared),
    ("owner", Autogroup::Role(Role::Owner)),
    ("admin", Autogroup::Role(Role::Admin)),
    ("it-admin", Autogroup::Role(Role::ItAdmin)),
    ("network-admin", Autogroup::Role(Role::NetworkAdmin)),
    ("billing-admin", Autogroup::Role(Role::BillingAdmin)),
    ("auditor", Autogroup::Role(Role::Auditor)),
];

impl fmt::Display for Autogroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = AUTOGROUPS.iter().find(|(_, group)| group == self).map_or("", |(word, _)| word);
        write!(f, "autogroup:{word}")
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::User(name) | Self::Group(name) | Self::Tag(name) => f.write_str(name),
            Self::Host(name) | Self::IpSet(name) => f.write_str(name),
            Self::Domain(domain) => write!(f, "user:*@{domain}"),
            Self::Addresses(range) => write!(f, "{}", display_range(*range)),
            Self::Auto(group) => write!(f, "{group}"),
        }
    }
}

/// A range as an address or a CIDR where it is one, else as `low-high`.
pub(crate) fn display_range(range: IpRange) -> String {
    if range.first() == range.last() {
        return range.first().to_string();
    }
    let max = if range.first().is_ipv4() { 32 } else { 128 };
    for bits in 0..=max {
        if let Ok(net) = IpNet::new(range.first(), bits)
            && net.network() == range.first()
            && net.broadcast() == range.last()
        {
            return net.to_string();
        }
    }
    range.to_string()
}

/// Why a word is not a selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WordError {
    pub(crate) message: String,
    /// The nearest word that exists.
    pub(crate) near: Option<String>,
}

impl WordError {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), near: None }
    }
}

impl Selector {
    /// Reads a selector; spaces around it do not count.
    pub(crate) fn parse(text: &str) -> Result<Self, WordError> {
        let text = text.trim();
        if let Some(range) = parse_addresses(text) {
            return Ok(Self::Addresses(range));
        }
        if text == "*" {
            return Ok(Self::Any);
        }
        if text.is_empty() {
            return Err(WordError::new("an empty selector"));
        }
        if let Some(rest) = text.strip_prefix("user:*@") {
            if rest.is_empty() || rest.contains('@') {
                return Err(WordError::new(format!("\"{text}\" names no domain")));
            }
            return Ok(Self::Domain(rest.to_ascii_lowercase()));
        }
        if text.contains('@') {
            return Ok(Self::User(text.strip_prefix("user:").unwrap_or(text).to_owned()));
        }
        if text.starts_with("group:") {
            return Ok(Self::Group(text.to_owned()));
        }
        if text.starts_with("tag:") {
            return Ok(Self::Tag(text.to_owned()));
        }
        if text.starts_with("ipset:") {
            return Ok(Self::IpSet(text.to_owned()));
        }
        if let Some(word) = text.strip_prefix("autogroup:") {
            return match AUTOGROUPS.iter().find(|(known, _)| *known == word) {
                Some((_, group)) => Ok(Self::Auto(*group)),
                None => Err(WordError {
                    message: format!("unknown autogroup \"{text}\""),
                    near: super::diagnostic::nearest(word, AUTOGROUPS.iter().map(|(known, _)| *known))
                        .map(|known| format!("autogroup:{known}")),
                }),
            };
        }
        if let Some(name) = text.strip_prefix("host:") {
            return Ok(Self::Host(name.to_owned()));
        }
        if text.starts_with("svc:") {
            return Err(WordError::new(format!(
                "\"{text}\": Warren has no services; name the devices that serve it by a tag"
            )));
        }
        if let Some((kind, _)) = text.split_once(':') {
            let kinds = ["group", "tag", "autogroup", "ipset", "host"];
            return Err(WordError {
                message: format!("\"{text}\" is not a selector"),
                near: super::diagnostic::nearest(kind, kinds.into_iter()).map(|known| format!("{known}:…")),
            });
        }
        Ok(Self::Host(text.to_owned()))
    }
}

/// An address, a CIDR (host bits may be set) or `low-high`.
pub(crate) fn parse_addresses(text: &str) -> Option<IpRange> {
    if let Ok(addr) = IpAddr::from_str(text) {
        return Some(addr.into());
    }
    if let Ok(net) = IpNet::from_str(text) {
        return Some(net.into());
    }
    let (lo, hi) = text.split_once('-')?;
    IpRange::new(lo.trim().parse().ok()?, hi.trim().parse().ok()?)
}

/// True for a CIDR that covers a whole family.
pub(crate) fn is_default_route(range: IpRange) -> bool {
    range == IpRange::ALL_V4 || range == IpRange::ALL_V6
}

/// Splits `selector:ports` at its last colon. IPv6 addresses may stand in brackets. Returns the selector text, the
/// ports text and where the ports start in `text`.
pub(crate) fn split_ports(text: &str) -> Result<(String, &str, usize), WordError> {
    let Some(colon) = text.rfind(':') else {
        return Err(WordError::new(format!("\"{text}\" has no ports: write \"{text}:443\" or \"{text}:*\"")));
    };
    let (host, ports) = (&text[..colon], &text[colon + 1..]);
    if host.is_empty() {
        return Err(WordError::new(format!("\"{text}\" has nothing before the colon")));
    }
    if ports.is_empty() {
        return Err(WordError::new(format!("\"{text}\" has no ports after the colon")));
    }
    let host = match host.strip_prefix('[') {
        None => host.to_owned(),
        Some(inner) => {
            let bad = || {
                WordError::new(format!(
                    "\"{text}\": square brackets are for IPv6 addresses, as in \"[fd00::1]:443\""
                ))
            };
            let (addr, rest) = inner.split_once(']').ok_or_else(bad)?;
            let is_v6 = IpAddr::from_str(addr).is_ok_and(|a| a.is_ipv6());
            if !is_v6 || !(rest.is_empty() || rest.starts_with('/')) {
                return Err(bad());
            }
            format!("{addr}{rest}")
        }
    };
    Ok((host, ports, colon + 1))
}

/// `*`, `443`, `80,443`, `8000-8999` or a mix with commas.
pub(crate) fn parse_ports(text: &str) -> Result<Vec<PortRange>, WordError> {
    if text == "*" {
        return Ok(vec![PortRange::ALL]);
    }
    let mut out = Vec::new();
    for part in text.split(',') {
        if out.len() >= MAX_PORTS {
            return Err(WordError::new(format!("more than {MAX_PORTS} ports in one list")));
        }
        let range = match part.split_once('-') {
            None => {
                let port = parse_port(part)?;
                if port == 0 {
                    return Err(WordError::new("port 0 is not a port; \"*\" is every port"));
                }
                PortRange { first: port, last: port }
            }
            Some((first, last)) => PortRange { first: parse_port(first)?, last: parse_port(last)? },
        };
        if range.first > range.last {
            return Err(WordError::new(format!("port range \"{part}\" ends before it starts")));
        }
        out.push(range);
    }
    Ok(out)
}

fn parse_port(text: &str) -> Result<u16, WordError> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits {
        let is_proto = parse_proto(text).is_ok_and(|p| p.is_some());
        return Err(WordError {
            message: format!("\"{text}\" is not a port: expected 1 to 65535, a range or \"*\""),
            near: is_proto.then(|| format!("{}:*", text.to_ascii_lowercase())),
        });
    }
    text.parse().map_err(|_| WordError::new(format!("port {text} is larger than 65535")))
}

/// Protocols by name.
pub(crate) const PROTOCOLS: [(&str, u8); 17] = [
    ("icmp", filter::PROTO_ICMP),
    ("icmpv4", filter::PROTO_ICMP),
    ("igmp", 2),
    ("ipv4", 4),
    ("ip-in-ip", 4),
    ("tcp", filter::PROTO_TCP),
    ("egp", 8),
    ("igp", 9),
    ("udp", filter::PROTO_UDP),
    ("dccp", 33),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", filter::PROTO_ICMPV6),
    ("icmpv6", filter::PROTO_ICMPV6),
    ("sctp", filter::PROTO_SCTP),
    ("fc", 133),
];

/// A protocol by name or number; empty text is "not said" (`None`).
pub(crate) fn parse_proto(text: &str) -> Result<Option<u8>, WordError> {
    let word = text.trim().to_ascii_lowercase();
    if word.is_empty() {
        return Ok(None);
    }
    if let Some((_, number)) = PROTOCOLS.iter().find(|(name, _)| *name == word) {
        return Ok(Some(*number));
    }
    if word.bytes().all(|b| b.is_ascii_digit()) {
        if word.starts_with('0') {
            return Err(WordError::new(format!("protocol number \"{text}\" may not start with 0")));
        }
        return match word.parse::<u8>() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(WordError::new(format!("protocol number {text} is larger than 255"))),
        };
    }
    Err(WordError {
        message: format!("unknown protocol \"{text}\": expected a name or a number from 1 to 255"),
        near: super::diagnostic::nearest(&word, PROTOCOLS.iter().map(|(name, _)| *name)).map(str::to_owned),
    })
}

/// A protocol by name or number, as the policy file writes it; `None` for empty text.
///
/// # Errors
/// What was expected, for people.
pub fn parse_protocol(text: &str) -> Result<Option<u8>, String> {
    parse_proto(text).map_err(|e| match e.near {
        Some(near) => format!("{}; did you mean \"{near}\"?", e.message),
        None => e.message,
    })
}

/// What people call a protocol number.
pub(crate) fn proto_name(proto: u8) -> String {
    PROTOCOLS
        .iter()
        .find(|(_, number)| *number == proto)
        .map_or_else(|| proto.to_string(), |(name, _)| (*name).to_owned())
}

/// An entry of a grant's `ip`: `*`, `443`, `tcp:443`, `udp:*`, `47:*`. No protocol means the default ones.
pub(crate) fn parse_service(text: &str) -> Result<(Option<u8>, Vec<PortRange>), WordError> {
    let text = text.trim();
    match text.split_once(':') {
        None => Ok((None, parse_ports(text)?)),
        Some((proto, ports)) => {
            if ports.contains(':') {
                return Err(WordError::new(format!(
                    "\"{text}\" has more than one colon: expected \"protocol:ports\""
                )));
            }
            let Some(proto) = parse_proto(proto)? else {
                return Err(WordError::new(format!("\"{text}\" names no protocol")));
            };
            Ok((Some(proto), parse_ports(ports)?))
        }
    }
}

/// A duration as Go writes it: `1h30m`, `90s`, `0s`, `-5m`, `1.5h`. Unit of the result: milliseconds.
pub(crate) fn parse_duration_ms(text: &str) -> Result<i64, WordError> {
    let bad = || {
        WordError::new(format!("\"{text}\" is not a duration: expected something like \"12h\" or \"1h30m\""))
    };
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(bad)?;
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit_len = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let factor = match &rest[..unit_len] {
            "ns" => 1e-6,
            "us" | "µs" => 1e-3,
            "ms" => 1.0,
            "s" => 1e3,
            "m" => 6e4,
            "h" => 3.6e6,
            // Not Go's, but what people write.
            "d" => 8.64e7,
            _ => return Err(bad()),
        };
        total += number * factor;
        rest = &rest[unit_len..];
    }
    // Float to integer casts saturate.
    let total = total.round() as i64;
    Ok(if negative { -total } else { total })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors() {
        let sel = |t: &str| Selector::parse(t).map_err(|e| e.message);
        assert_eq!(sel(" tag:a "), Ok(Selector::Tag("tag:a".to_owned())));
        assert_eq!(sel("ann@"), Ok(Selector::User("ann@".to_owned())));
        assert_eq!(sel("user:*@Example.com"), Ok(Selector::Domain("example.com".to_owned())));
        assert_eq!(sel("autogroup:admin"), Ok(Selector::Auto(Autogroup::Role(Role::Admin))));
        assert_eq!(sel("web-1"), Ok(Selector::Host("web-1".to_owned())));
        assert_eq!(sel("10.1.2.3/8").map(|s| s.to_string()), Ok("10.0.0.0/8".to_owned()));
        assert_eq!(sel("10.0.0.1-10.0.0.9").map(|s| s.to_string()), Ok("10.0.0.1-10.0.0.9".to_owned()));
        assert_eq!(
            Selector::parse("autogroup:membr").expect_err("unknown").near,
            Some("autogroup:member".to_owned())
        );
        assert_eq!(Selector::parse("grp:x").expect_err("unknown").near, Some("group:…".to_owned()));
        assert!(sel("").is_err() && sel("svc:web").is_err());
    }

    #[test]
    fn ports() {
        let ok = |t: &str| parse_ports(t).map(|p| p.iter().map(|r| (r.first, r.last)).collect());
        assert_eq!(ok("*"), Ok(vec![(0, 65535)]));
        assert_eq!(ok("22,80-90"), Ok(vec![(22, 22), (80, 90)]));
        assert_eq!(ok("0-65535"), Ok(vec![(0, 65535)]));
        for bad in ["", "0", "65536", "90-80", "80-", "-80", "a", "1,,2", " 22", "1-2-3", "*,1"] {
            assert!(parse_ports(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse_ports("icmp").expect_err("a protocol").near, Some("icmp:*".to_owned()));
        let many = vec!["1"; MAX_PORTS + 1].join(",");
        assert!(parse_ports(&many).is_err());
    }

    #[test]
    fn protocols_and_services() {
        assert_eq!(parse_proto("TCP").map_err(|e| e.message), Ok(Some(6)));
        assert_eq!(parse_proto("47").map_err(|e| e.message), Ok(Some(47)));
        assert_eq!(parse_proto("").map_err(|e| e.message), Ok(None));
        for bad in ["0", "06", "256", "*", "tcpp"] {
            assert!(parse_proto(bad).is_err(), "{bad}");
        }
        assert!(parse_service("tcp:443").is_ok_and(|(p, r)| p == Some(6) && r[0].first == 443));
        assert!(parse_service("443").is_ok_and(|(p, _)| p.is_none()));
        for bad in ["icmp", "*:443", ":443", "tcp:", "tcp:1:2", ""] {
            assert!(parse_service(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn destinations_with_ports() {
        let split = |t| split_ports(t).map(|(h, p, _)| (h, p.to_owned())).ok();
        let pair = |h: &str, p: &str| Some((h.to_owned(), p.to_owned()));
        assert_eq!(split("tag:a:22"), pair("tag:a", "22"));
        assert_eq!(split("[fd00::1]:22"), pair("fd00::1", "22"));
        assert_eq!(split("[fd00::]/64:22"), pair("fd00::/64", "22"));
        assert_eq!(split("fd00::1:22"), pair("fd00::1", "22"));
        for bad in ["web", ":22", "web:", "[10.0.0.1]:22", "[fd00::1:22", "[fd00::1]x:22"] {
            assert!(split_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        let ms = |t| parse_duration_ms(t).ok();
        assert_eq!(ms("1h30m"), Some(5_400_000));
        assert_eq!(ms("0s"), Some(0));
        assert_eq!(ms("-5m"), Some(-300_000));
        assert_eq!(ms("1.5s"), Some(1_500));
        for bad in ["", "abc", "1", "1x", "h", "-"] {
            assert_eq!(ms(bad), None, "{bad}");
        }
    }
}
