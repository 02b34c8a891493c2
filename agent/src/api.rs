//! The local API: what `warren` and the tray say to `warrend` over a unix socket, as JSON lines.
//!
//! One request per connection, one line: `{"verb": "status"}`. One line back: `{"done": …}` or `{"problem": {…}}`.
//! The socket's directory is made 0750 and its owner and mode are set before it listens; the kernel says who calls
//! (`SO_PEERCRED`). Verbs that change something need root, the daemon's own user, or the configured operator.

mod server;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use warren_common::ids::NetworkId;
pub use warren_engine::status::{NetworkStatus, PathStatus, PeerStatus, SelfStatus};

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
    Bugreport {
        /// Also names of people, devices and networks, and addresses.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        names: bool,
    },
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
    pub network: Option<NetworkStatus>,
    /// This device; absent before the first netmap.
    #[serde(rename = "self")]
    pub device: Option<SelfStatus>,
    /// The coordinator; absent before the first enrolment.
    pub coordinator: Option<Coordinator>,
    /// Peers, by name.
    pub peers: Vec<PeerStatus>,
    /// Relays of the network.
    #[serde(default)]
    pub relays: Vec<RelayLink>,
    /// What this device does as a relay for others; absent unless it was started to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relaying: Option<Relaying>,
    /// What is not as it should be.
    pub health: Vec<HealthItem>,
    /// Packets dropped by reason and timer wake-ups by reason, counted since the agent came up.
    pub counters: serde_json::Value,
    /// What of the kernel's help for many packets at a time is in use: see [`crate::os::Offloads`].
    #[serde(default)]
    pub offloads: std::collections::BTreeMap<String, bool>,
}

/// One relay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelayLink {
    /// Its name.
    pub name: String,
    /// True if it is the one that peers find us at.
    pub home: bool,
    /// True if it is a device that the policy lets relay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub peer: bool,
    /// What packets run over, best first: `udp`, `quic`, `websocket`; absent while not connected.
    pub transport: Option<String>,
    /// The proxy that they go through, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Round-trip time of the connection, or to its STUN service, in milliseconds.
    pub rtt_ms: Option<f64>,
}

/// This device as a relay for others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Relaying {
    /// True while it serves: the policy lets it, and the coordinator said so.
    pub serving: bool,
    /// True while the coordinator wants it to serve, because a grant lets it.
    pub wanted: bool,
    /// The port it was told to listen on.
    pub port: u16,
    /// Devices connected to it.
    pub clients: u64,
    /// Packets passed on.
    pub forwarded_packets: u64,
    /// Their bytes.
    pub forwarded_bytes: u64,
    /// Packets that wait for devices which read slowly, in bytes.
    pub queued_bytes: u64,
    /// Packets dropped, by reason; only those that happened.
    pub dropped: std::collections::BTreeMap<String, u64>,
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
    pub path: PathStatus,
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
    /// Protocols by which the gateway maps ports on request: `pcp`, `nat-pmp`, `upnp`; readers ignore others.
    pub port_mapping: Vec<String>,
    /// Where peers are told that this device is.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// Relays.
    pub relays: Vec<RelayRtt>,
}

/// One of this device's addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Where it comes from: `local` for an interface's, `reflexive` and `observed` for what others see, `mapped` for a port that
    /// the router forwards on request, `static` for `warrend --endpoint`, `predicted` for a guess. Readers ignore others.
    pub kind: String,
    /// The address.
    pub addr: SocketAddr,
}

/// A NAT by RFC 4787; what is not known is absent. Readers ignore words that they don't know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nat {
    /// How it maps (section 4.1): `endpoint-independent`, `address-dependent`, `address-and-port-dependent`, or `none` if
    /// there is no NAT.
    pub mapping: Option<String>,
    /// How it filters (section 5), in the same words; known only if a STUN server can answer from another address
    /// (RFC 5780).
    pub filtering: Option<String>,
    /// Whether it hairpins (section 6).
    pub hairpin: Option<bool>,
}

/// A relay's distance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelayRtt {
    /// Its name.
    pub name: String,
    /// Round-trip time in milliseconds.
    pub rtt_ms: Option<f64>,
    /// What packets run over, as in [`RelayLink`]; absent while not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<String>,
    /// The proxy that they go through, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use warren_common::ids::DeviceId;
    use warren_common::time::UnixTime;

    use super::*;
    use crate::problem::Severity;

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

    /// The contracts of design section 8, byte for byte.
    #[test]
    fn documents_have_the_contract_s_shape() {
        let path = |kind: &'static str| PathStatus {
            kind: kind.into(),
            endpoint: (kind == "direct").then(|| "192.0.2.1:5".parse().unwrap()),
            relay: (kind == "relay").then(|| "fra".to_owned()),
            rtt_ms: (kind != "none").then_some(1.235),
            why_not_direct: None,
            mtu: None,
        };
        let status = Status {
            state: "running".into(),
            network: Some(NetworkStatus { id: NetworkId::from_bytes([0; 16]), name: "acme".into() }),
            device: Some(SelfStatus {
                id: DeviceId::from_bytes([0; 16]),
                name: "a".into(),
                ips: vec!["100.64.0.1".parse().unwrap()],
                user: Some("ann@example.com".into()),
                tags: vec![],
                attributes: vec![],
            }),
            coordinator: Some(Coordinator { url: "http://c".into(), connected: true, revision: 7 }),
            peers: vec![PeerStatus {
                id: DeviceId::from_bytes([0; 16]),
                name: Some("b".into()),
                ips: vec!["100.64.0.2".parse().unwrap()],
                user: None,
                tags: vec!["tag:b".into()],
                online: true,
                path: path("direct"),
                why_not_direct: None,
                rx_bytes: 1,
                tx_bytes: 2,
                last_handshake: UnixTime::from_rfc3339("2026-11-24T00:00:00Z"),
            }],
            relays: vec![RelayLink {
                name: "fra".into(),
                home: true,
                peer: false,
                transport: Some("udp".into()),
                proxy: None,
                rtt_ms: Some(12.5),
            }],
            relaying: None,
            health: vec![HealthItem {
                code: "clock-skew".into(),
                severity: Severity::Warning,
                text: "t".into(),
                fix: "f".into(),
            }],
            counters: json!({}),
            offloads: [("tun".to_owned(), true)].into(),
        };
        let out = Status {
            state: "needs-login".into(),
            network: None,
            device: None,
            coordinator: None,
            peers: vec![],
            relays: vec![],
            relaying: None,
            health: vec![],
            counters: json!({}),
            offloads: [("tun".to_owned(), true)].into(),
        };
        let check = Netcheck {
            udp: true,
            ipv4: Some("192.0.2.1:5".parse().unwrap()),
            ipv6: None,
            nat: Nat { mapping: Some("endpoint-independent".into()), filtering: None, hairpin: Some(false) },
            port_mapping: vec![],
            endpoints: vec![Endpoint { kind: "static".into(), addr: "192.0.2.1:5".parse().unwrap() }],
            relays: vec![RelayRtt {
                name: "fra".into(),
                rtt_ms: Some(12.5),
                transport: Some("websocket".into()),
                proxy: Some("proxy:3128".into()),
            }],
        };
        for (document, golden) in [
            (
                serde_json::to_string(&status),
                concat!(
                    r#"{"state":"running","network":{"id":"net_00000000000000000000000000","name":"acme"},"#,
                    r#""self":{"id":"dev_00000000000000000000000000","name":"a","ips":["100.64.0.1"],"#,
                    r#""user":"ann@example.com","tags":[]},"#,
                    r#""coordinator":{"url":"http://c","connected":true,"revision":7},"#,
                    r#""peers":[{"id":"dev_00000000000000000000000000","name":"b","ips":["100.64.0.2"],"user":null,"#,
                    r#""tags":["tag:b"],"online":true,"path":{"kind":"direct","endpoint":"192.0.2.1:5","relay":null,"#,
                    r#""rtt_ms":1.235},"why_not_direct":null,"rx_bytes":1,"tx_bytes":2,"last_handshake":"2026-11-24T00:00:00Z"}],"#,
                    r#""relays":[{"name":"fra","home":true,"transport":"udp","rtt_ms":12.5}],"#,
                    r#""health":[{"code":"clock-skew","severity":"warning","text":"t","fix":"f"}],"counters":{},"offloads":{"tun":true}}"#
                ),
            ),
            (
                serde_json::to_string(&out),
                concat!(
                    r#"{"state":"needs-login","network":null,"self":null,"coordinator":null,"peers":[],"#,
                    r#""relays":[],"health":[],"counters":{},"offloads":{"tun":true}}"#
                ),
            ),
            (
                serde_json::to_string(&Pong { rtt_ms: Some(1.235), path: path("relay") }),
                r#"{"rtt_ms":1.235,"path":{"kind":"relay","endpoint":null,"relay":"fra","rtt_ms":1.235}}"#,
            ),
            (
                serde_json::to_string(&Pong { rtt_ms: None, path: path("none") }),
                r#"{"rtt_ms":null,"path":{"kind":"none","endpoint":null,"relay":null,"rtt_ms":null}}"#,
            ),
            (
                serde_json::to_string(&check),
                concat!(
                    r#"{"udp":true,"ipv4":"192.0.2.1:5","ipv6":null,"nat":{"mapping":"endpoint-independent","#,
                    r#""filtering":null,"hairpin":false},"port_mapping":[],"endpoints":[{"kind":"static","addr":"192.0.2.1:5"}],"#,
                    r#""relays":[{"name":"fra","rtt_ms":12.5,"#,
                    r#""transport":"websocket","proxy":"proxy:3128"}]}"#
                ),
            ),
        ] {
            assert_eq!(document.unwrap(), golden);
        }
        // A reader of an earlier version ignores fields and words that it does not know.
        let later = json!({
            "state": "dreaming", "network": null, "self": null, "coordinator": null, "peers": [], "health": [],
            "counters": {}, "mood": 1,
        });
        assert_eq!(serde_json::from_value::<Status>(later).unwrap().state, "dreaming");
    }
}
