//! Answers to questions: what an engine knows, as data for `warren status`, `why`, `whois` and metrics.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use warren_common::filter::{Action, RuleId};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::time::{UnixTime, rfc3339};

use crate::event::WakeReason;
use crate::filter::Disagreement;

/// Everything at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// The network; absent before the first netmap.
    pub network: Option<NetworkStatus>,
    /// This device; absent before the first netmap.
    #[serde(rename = "self")]
    pub device: Option<SelfStatus>,
    /// The coordinator's epoch and the netmap's revision, 0 for none.
    pub epoch: u64,
    /// See `epoch`.
    pub revision: u64,
    /// The lease of everything granted.
    pub lease: LeaseStatus,
    /// Peers, by id.
    pub peers: Vec<PeerStatus>,
    /// What is known of the network around us.
    pub net: NetStatus,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Staged rules with what they would have decided.
    pub staged: Vec<StagedRule>,
    /// Connections that peers let out lately and this end refused.
    pub disagreements: Vec<Refused>,
    /// Timer wake-ups that found something due, by reason.
    pub wakes: BTreeMap<WakeReason, u64>,
}

/// A rule that is decided and counted, and never enforced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StagedRule {
    /// The rule.
    #[serde(serialize_with = "crate::filter::as_text")]
    pub rule: RuleId,
    /// Where it stands in the policy.
    pub origin: String,
    /// Would it allow, or deny?
    pub action: Action,
    /// Connections from here that it matched since it came into force here; packets where no connection was made.
    pub sent: u64,
    /// The same for connections to here.
    pub received: u64,
}

/// A connection that a peer let out and this end refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The peer; `None` if it is gone.
    pub device: Option<DeviceId>,
    /// What was refused, and how often.
    #[serde(flatten)]
    pub what: Disagreement,
}

/// The network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// Its id.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
}

/// This device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfStatus {
    /// Its id.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// Its overlay addresses.
    pub ips: Vec<IpAddr>,
    /// Its user, unless it is a workload.
    pub user: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its attributes by the policy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attributes: Vec<String>,
}

/// Whether grants hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum LeaseStatus {
    /// No netmap was ever accepted.
    None,
    /// They hold.
    Valid {
        /// For how long, in milliseconds.
        remaining_ms: u64,
    },
    /// They don't: nothing passes.
    Ended,
}

/// One peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its id.
    pub id: DeviceId,
    /// Its name, if this device may know it.
    pub name: Option<String>,
    /// Its overlay addresses.
    pub ips: Vec<IpAddr>,
    /// Its user.
    pub user: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// Connected to the coordinator, as far as known.
    pub online: bool,
    /// How packets reach it.
    pub path: PathStatus,
    /// Why they do not reach it directly, for people; absent if they do.
    #[serde(default)]
    pub why_not_direct: Option<String>,
    /// Plaintext bytes received from it.
    pub rx_bytes: u64,
    /// Plaintext bytes sent to it.
    pub tx_bytes: u64,
    /// When the last handshake with it was done, as RFC 3339 text.
    #[serde(with = "rfc3339::option")]
    pub last_handshake: Option<UnixTime>,
}

/// How packets reach a peer, as `warren status --json` and `warren ping --json` show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PathStatus {
    /// `direct`, `relay` or `none`; readers ignore what they don't know.
    pub kind: Cow<'static, str>,
    /// The peer's address, if direct.
    pub endpoint: Option<SocketAddr>,
    /// The relay's name, if relayed.
    pub relay: Option<String>,
    /// Round-trip time of the last probe over it, in milliseconds with three digits after the point.
    pub rtt_ms: Option<f64>,
    /// Of a peer's status: why no direct way is in use, one of the words of
    /// [`WhyNotDirect`](crate::paths::WhyNotDirect); readers show what they don't know as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not_direct: Option<Cow<'static, str>>,
    /// Of a peer's status: the longest packet that the path carries without fragments, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<usize>,
}

/// The network around us, for `warren netcheck`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct NetStatus {
    /// True if any STUN server has answered since the last network change.
    pub udp: bool,
    /// Our IPv4 address as STUN servers see it.
    pub ipv4: Option<SocketAddr>,
    /// Our IPv6 address as STUN servers see it.
    pub ipv6: Option<SocketAddr>,
    /// How the NAT in front of us maps (RFC 4787 section 4.1), from IPv4 if there is any; `None` if two answers to
    /// compare are missing.
    pub mapping: Option<Mapping>,
    /// Relays with the round-trip time to their STUN service, by id.
    pub relays: Vec<RelayStatus>,
}

/// How a NAT maps (RFC 4787 section 4.1), the easiest to get through first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// There is no NAT: the mapped address is our own.
    None,
    /// The same whatever the destination.
    EndpointIndependent,
    /// Another one for each destination address.
    AddressDependent,
    /// Another one for each destination address and port.
    AddressAndPortDependent,
}

/// One relay.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RelayStatus {
    /// Its id.
    pub id: RelayId,
    /// Its name.
    pub name: String,
    /// True if the shell is connected to it.
    pub connected: bool,
    /// True if it is the one we listen on.
    pub home: bool,
    /// True if it is a device that a grant lets relay.
    pub peer: bool,
    /// Round-trip time to its STUN service, in milliseconds.
    pub rtt_ms: Option<f64>,
}

/// Whose an address is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Whois {
    /// The device.
    pub id: DeviceId,
    /// Its name, if this device may know it.
    pub name: Option<String>,
    /// Its user.
    pub user: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// True if the address is our own.
    #[serde(rename = "self")]
    pub is_self: bool,
    /// True if the address is the device's own; false if it is in a subnet behind it.
    pub exact: bool,
    /// What it may do at this device's applications: `example.com/cap/name` and what the policy says of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub capabilities: BTreeMap<String, Vec<serde_json::Value>>,
}

/// Answer to `warren why`: what becomes of connections between here and there, and on what grounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Why {
    /// True if this device would open the connection. The other end decides for itself as well.
    pub allowed: bool,
    /// A stable word for what decided: `allowed`, `no-rule`, `denied-by-rule`, `not-visible`, `self`, `no-netmap`,
    /// `lease-ended` or `closed`.
    pub reason: &'static str,
    /// The same for people, with the rule's place in the policy where there is one.
    pub text: String,
    /// The device that owns the destination.
    pub peer: Option<Whois>,
    /// How packets reach it.
    pub path: Option<PathStatus>,
    /// Rules, flows and recent drops, in detail and for both directions; absent if no address is known to ask about.
    pub filter: Option<crate::filter::Why>,
}

impl Why {
    /// The rules it names.
    pub fn rules(&self) -> BTreeSet<RuleId> {
        self.filter.iter().flat_map(crate::filter::Why::rules).map(|rule| rule.id).collect()
    }

    /// Puts in where rules stand in the policy now, as far as `origins` knows.
    pub fn set_origins(&mut self, origins: &BTreeMap<RuleId, String>) {
        let Some(filter) = &mut self.filter else { return };
        for rule in filter.rules_mut() {
            if let Some(origin) = origins.get(&rule.id) {
                rule.origin.clone_from(origin);
            }
        }
        if matches!(self.reason, "allowed" | "denied-by-rule") {
            self.text = filter.egress.verdict();
        }
    }
}
