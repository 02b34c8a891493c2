//! The local API: what `warren` and the tray say to `warrend` over a unix socket, as JSON lines.
//!
//! One request per connection, one line: `{"verb": "status"}`. One line back: `{"done": …}` or `{"problem": {…}}`.
//! The socket's directory is made 0750 and its owner and mode are set before it listens; the kernel says who calls
//! (`SO_PEERCRED`). Verbs that change something need root, the daemon's own user, or the configured operator.

mod server;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use warren_common::ids::{DeviceId, NetworkId};
use warren_engine::status::{Mapping, PathStatus};

use crate::problem::{HealthItem, Problem};
pub use server::{Call, Server};

/// Where the socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/warren/warren.sock";
/// Longest request, in bytes.
pub const MAX_REQUEST: usize = 16 << 10;
/// Most connections at a time; more are closed at once.
pub const MAX_CONNECTIONS: usize = 32;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The network it is about; the daemon's only one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkId>,
    /// What to do.
    #[serde(flatten)]
    pub verb: Verb,
}

/// What a caller can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Verb {
    /// Connect, and enrol first if need be.
    Up(Up),
    /// Disconnect and put the host back.
    Down,
    /// Leave the network and forget the keys.
    Logout,
    /// How are things?
    Status,
    /// One round trip to a peer.
    Ping {
        /// Name, address or id.
        peer: String,
    },
    /// The network around this host.
    Netcheck,
    /// Whose address is it?
    Whois {
        /// An overlay address.
        ip: IpAddr,
    },
    /// Would a connection be allowed, and why?
    Why {
        /// Address, or name or id of a peer.
        dst: String,
        /// Destination port; 0 where the protocol has none.
        port: u16,
        /// IP protocol number.
        proto: u8,
    },
    /// The daemon's version.
    Version,
    /// Everything support needs and no secret.
    Bugreport,
}

impl Verb {
    /// True if it changes something.
    pub fn writes(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Down | Self::Logout)
    }
}

/// How to come up.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Up {
    /// The coordinator's URL; the pinned one if absent.
    pub coordinator: Option<String>,
    /// The auth key's text, for the first time.
    pub auth_key: Option<String>,
    /// The root key's fingerprint that the coordinator must show.
    pub fingerprint: Option<String>,
    /// The name to ask for.
    pub hostname: Option<String>,
    /// How long to wait until connected, in milliseconds; 0 for not at all.
    pub timeout_ms: u64,
}

impl std::fmt::Debug for Up {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Up").field("coordinator", &self.coordinator).finish_non_exhaustive()
    }
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It worked; what there is to say is one document.
    Done(serde_json::Value),
    /// It didn't.
    Problem(Problem),
}

/// `warren status --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `running`, `connecting`, `stopped`, `needs-login`; readers ignore what they don't know.
    pub state: String,
    /// The network; absent before the first enrolment.
    pub network: Option<NetworkName>,
    /// This device; absent before the first netmap.
    #[serde(rename = "self")]
    pub device: Option<SelfDevice>,
    /// The coordinator; absent before the first enrolment.
    pub coordinator: Option<Coordinator>,
    /// Peers, by name.
    pub peers: Vec<Peer>,
    /// What is not as it should be.
    pub health: Vec<HealthItem>,
    /// Packets dropped by reason and timer wake-ups by reason, counted since the agent came up.
    pub counters: serde_json::Value,
}

/// A network, in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkName {
    /// Its id.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
}

/// This device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfDevice {
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
}

/// The coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coordinator {
    /// Its URL.
    pub url: String,
    /// True if a session stands.
    pub connected: bool,
    /// The revision of the netmap held.
    pub revision: u64,
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Its id.
    pub id: DeviceId,
    /// Its name, if this device may know it.
    pub name: Option<String>,
    /// Its overlay addresses.
    pub ips: Vec<IpAddr>,
    /// Its user, unless it is a workload.
    pub user: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// Connected to the coordinator, as far as known.
    pub online: bool,
    /// How packets reach it.
    pub path: Path,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// When the last handshake with it was done, RFC 3339.
    pub last_handshake: Option<String>,
}

/// How packets reach a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Path {
    /// `direct`, `relay` or `none`.
    pub kind: String,
    /// The peer's address, if direct.
    pub endpoint: Option<SocketAddr>,
    /// The relay's name, if relayed.
    pub relay: Option<String>,
    /// Round-trip time, in milliseconds.
    pub rtt_ms: Option<f64>,
}

impl From<PathStatus> for Path {
    fn from(path: PathStatus) -> Self {
        Self {
            kind: path.kind.to_owned(),
            endpoint: path.endpoint,
            relay: path.relay,
            rtt_ms: path.rtt_ms.map(round_ms),
        }
    }
}

/// Milliseconds with three digits after the point: a clock says no more.
pub fn round_ms(ms: f64) -> f64 {
    (ms * 1_000.0).round() / 1_000.0
}

/// The answer to one ping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    /// Round-trip time in milliseconds; absent if no answer came in time.
    pub rtt_ms: Option<f64>,
    /// The way it went.
    pub path: Path,
}

/// `warren netcheck --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Netcheck {
    /// True if UDP gets out and back.
    pub udp: bool,
    /// Our IPv4 address as others see it.
    pub ipv4: Option<SocketAddr>,
    /// Our IPv6 address as others see it.
    pub ipv6: Option<SocketAddr>,
    /// The NAT in front of us.
    pub nat: Nat,
    /// Protocols by which the NAT maps ports on request.
    pub port_mapping: Vec<String>,
    /// Relays.
    pub relays: Vec<RelayRtt>,
}

/// A NAT by RFC 4787; what is not known is absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nat {
    /// How it maps (section 4.1).
    pub mapping: Option<String>,
    /// How it filters (section 5).
    pub filtering: Option<String>,
    /// Whether it hairpins (section 6).
    pub hairpin: Option<bool>,
}

impl Nat {
    /// What STUN found out.
    pub fn new(mapping: Option<Mapping>) -> Self {
        let mapping = mapping.map(|m| match m {
            Mapping::None => "none",
            Mapping::EndpointIndependent => "endpoint-independent",
            Mapping::AddressDependent => "address-dependent",
            Mapping::AddressAndPortDependent => "address-and-port-dependent",
        });
        Self { mapping: mapping.map(str::to_owned), filtering: None, hairpin: None }
    }
}

/// A relay's distance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelayRtt {
    /// Its name.
    pub name: String,
    /// Round-trip time in milliseconds.
    pub rtt_ms: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_flat_and_hide_the_key_in_debug() {
        let text = r#"{"verb":"up","coordinator":"http://c","auth_key":"wkey-secret","timeout_ms":5}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert!(matches!(&request.verb, Verb::Up(up) if up.auth_key.as_deref() == Some("wkey-secret")));
        assert!(request.verb.writes() && !format!("{request:?}").contains("secret"));
        let status: Request = serde_json::from_str(r#"{"verb":"status","later":1}"#).unwrap();
        assert_eq!(status, Request { network: None, verb: Verb::Status });
        assert_eq!(serde_json::to_string(&status).unwrap(), r#"{"verb":"status"}"#);
    }

    #[test]
    fn status_has_the_contract_s_shape() {
        let status = Status {
            state: "running".into(),
            network: Some(NetworkName { id: NetworkId::from_bytes([0; 16]), name: "acme".into() }),
            device: None,
            coordinator: Some(Coordinator { url: "http://c".into(), connected: true, revision: 7 }),
            peers: vec![Peer {
                id: DeviceId::from_bytes([0; 16]),
                name: Some("b".into()),
                ips: vec!["100.64.0.2".parse().unwrap()],
                user: None,
                tags: vec![],
                online: true,
                path: Path {
                    kind: "direct".into(),
                    endpoint: Some("192.0.2.1:5".parse().unwrap()),
                    relay: None,
                    rtt_ms: Some(round_ms(1.234_56)),
                },
                rx_bytes: 1,
                tx_bytes: 2,
                last_handshake: Some("2026-11-24T00:00:00Z".into()),
            }],
            health: vec![],
            counters: serde_json::json!({}),
        };
        assert_eq!(
            serde_json::to_string(&status).unwrap(),
            concat!(
                r#"{"state":"running","network":{"id":"net_00000000000000000000000000","name":"acme"},"self":null,"#,
                r#""coordinator":{"url":"http://c","connected":true,"revision":7},"#,
                r#""peers":[{"id":"dev_00000000000000000000000000","name":"b","ips":["100.64.0.2"],"user":null,"#,
                r#""tags":[],"online":true,"path":{"kind":"direct","endpoint":"192.0.2.1:5","relay":null,"#,
                r#""rtt_ms":1.235},"rx_bytes":1,"tx_bytes":2,"last_handshake":"2026-11-24T00:00:00Z"}],"#,
                r#""health":[],"counters":{}}"#
            )
        );
    }
}
