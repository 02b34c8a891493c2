//! The netmap's and delta's protobuf forms, and the checks on the way in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use prost::Message;

use super::WireError;
use crate::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId, UnixInterval};
use crate::ids::{DeviceId, NetworkId, RelayId};
use crate::keys::{ProbePublicKey, WgPublicKey};
use crate::netmap::{
    AppGrant, Delta, MAX_APPS, MAX_ATTRS, MAX_PEERS, MAX_RELAYS, MAX_RULES, Netmap, Network, Peer, Relay,
    SelfDevice,
};

#[derive(Clone, PartialEq, Message)]
struct NetworkMsg {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "3")]
    ipv4: String,
    #[prost(string, tag = "4")]
    ipv6: String,
}

#[derive(Clone, PartialEq, Message)]
struct SelfMsg {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    addrs: Vec<Vec<u8>>,
    #[prost(string, optional, tag = "4")]
    user: Option<String>,
    #[prost(string, repeated, tag = "5")]
    tags: Vec<String>,
    #[prost(string, repeated, tag = "6")]
    attrs: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct PeerMsg {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    wg: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    probe: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "4")]
    addrs: Vec<Vec<u8>>,
    #[prost(string, repeated, tag = "5")]
    routes: Vec<String>,
    #[prost(string, optional, tag = "6")]
    name: Option<String>,
    #[prost(string, optional, tag = "7")]
    user: Option<String>,
    #[prost(string, repeated, tag = "8")]
    tags: Vec<String>,
    #[prost(bytes = "vec", optional, tag = "9")]
    home_relay: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "10")]
    key_signature: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct DstMsg {
    #[prost(bytes = "vec", tag = "1")]
    first: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    last: Vec<u8>,
    #[prost(uint32, tag = "3")]
    first_port: u32,
    #[prost(uint32, tag = "4")]
    last_port: u32,
}

#[derive(Clone, PartialEq, Message)]
struct SrcMsg {
    #[prost(bytes = "vec", tag = "1")]
    first: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    last: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct IntervalMsg {
    #[prost(int64, tag = "1")]
    from: i64,
    #[prost(int64, tag = "2")]
    until: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ActiveMsg {
    #[prost(message, repeated, tag = "1")]
    windows: Vec<IntervalMsg>,
}

#[derive(Clone, PartialEq, Message)]
struct RuleMsg {
    #[prost(fixed64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    origin: String,
    #[prost(bool, tag = "3")]
    deny: bool,
    #[prost(bool, tag = "4")]
    staged: bool,
    #[prost(message, repeated, tag = "5")]
    src: Vec<SrcMsg>,
    #[prost(message, repeated, tag = "6")]
    dst: Vec<DstMsg>,
    #[prost(bytes = "vec", tag = "7")]
    protos: Vec<u8>,
    #[prost(message, optional, tag = "8")]
    active: Option<ActiveMsg>,
}

#[derive(Clone, PartialEq, Message)]
struct RelayMsg {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, repeated, tag = "3")]
    addrs: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    stun: Vec<String>,
    #[prost(bytes = "vec", tag = "5")]
    cert_sha256: Vec<u8>,
    #[prost(bool, tag = "6")]
    peer: bool,
}

#[derive(Clone, PartialEq, Message)]
struct AppMsg {
    #[prost(fixed64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "3")]
    src: Vec<SrcMsg>,
    #[prost(message, repeated, tag = "4")]
    dst: Vec<SrcMsg>,
    #[prost(string, repeated, tag = "5")]
    values: Vec<String>,
    #[prost(message, optional, tag = "6")]
    active: Option<ActiveMsg>,
}

/// A whole netmap, as encoded.
#[derive(Clone, PartialEq, Message)]
pub struct NetmapMsg {
    #[prost(message, optional, tag = "1")]
    network: Option<NetworkMsg>,
    #[prost(message, optional, tag = "2")]
    device: Option<SelfMsg>,
    #[prost(message, repeated, tag = "3")]
    peers: Vec<PeerMsg>,
    #[prost(message, repeated, tag = "4")]
    ingress: Vec<RuleMsg>,
    #[prost(message, repeated, tag = "5")]
    egress: Vec<RuleMsg>,
    #[prost(message, repeated, tag = "6")]
    relays: Vec<RelayMsg>,
    #[prost(message, repeated, tag = "7")]
    apps: Vec<AppMsg>,
}

/// A delta, as encoded.
#[derive(Clone, PartialEq, Message)]
pub struct DeltaMsg {
    #[prost(message, optional, tag = "1")]
    network: Option<NetworkMsg>,
    #[prost(message, optional, tag = "2")]
    device: Option<SelfMsg>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    removed_peers: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "4")]
    peers: Vec<PeerMsg>,
    #[prost(bytes = "vec", repeated, tag = "5")]
    removed_ingress: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "6")]
    ingress: Vec<RuleMsg>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    removed_egress: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "8")]
    egress: Vec<RuleMsg>,
    #[prost(bytes = "vec", repeated, tag = "9")]
    removed_relays: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "10")]
    relays: Vec<RelayMsg>,
    #[prost(bytes = "vec", repeated, tag = "11")]
    removed_apps: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "12")]
    apps: Vec<AppMsg>,
}

const WHAT: &str = "netmap";

fn field(name: &'static str) -> WireError {
    WireError::field(WHAT, name)
}

fn addr_bytes(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn addr(bytes: &[u8], name: &'static str) -> Result<IpAddr, WireError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes).map(Into::into).map_err(|_| field(name))
}

fn parsed<T: std::str::FromStr>(texts: &[String], name: &'static str) -> Result<Vec<T>, WireError> {
    texts.iter().map(|text| text.parse().map_err(|_| field(name))).collect()
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

fn range(first: &[u8], last: &[u8], name: &'static str) -> Result<IpRange, WireError> {
    IpRange::new(addr(first, name)?, addr(last, name)?).ok_or(field(name))
}

fn bounded<T>(items: Vec<T>, max: usize, name: &'static str) -> Result<Vec<T>, WireError> {
    if items.len() > max { Err(field(name)) } else { Ok(items) }
}

impl From<&Network> for NetworkMsg {
    fn from(n: &Network) -> Self {
        Self {
            id: n.id.to_bytes().to_vec(),
            name: n.name.clone(),
            ipv4: n.ipv4.to_string(),
            ipv6: n.ipv6.to_string(),
        }
    }
}

impl TryFrom<NetworkMsg> for Network {
    type Error = WireError;

    fn try_from(msg: NetworkMsg) -> Result<Self, WireError> {
        Ok(Self {
            id: NetworkId::from_slice(&msg.id).ok_or(field("network.id"))?,
            name: msg.name,
            ipv4: msg.ipv4.parse().map_err(|_| field("network.ipv4"))?,
            ipv6: msg.ipv6.parse().map_err(|_| field("network.ipv6"))?,
        })
    }
}

impl From<&SelfDevice> for SelfMsg {
    fn from(d: &SelfDevice) -> Self {
        Self {
            id: d.id.to_bytes().to_vec(),
            name: d.name.clone(),
            addrs: d.addrs.iter().map(|a| addr_bytes(*a)).collect(),
            user: d.user.clone(),
            tags: d.tags.clone(),
            attrs: d.attrs.clone(),
        }
    }
}

impl TryFrom<SelfMsg> for SelfDevice {
    type Error = WireError;

    fn try_from(msg: SelfMsg) -> Result<Self, WireError> {
        Ok(Self {
            id: DeviceId::from_slice(&msg.id).ok_or(field("device.id"))?,
            name: msg.name,
            addrs: msg.addrs.iter().map(|a| addr(a, "device.addrs")).collect::<Result<_, _>>()?,
            user: msg.user,
            tags: msg.tags,
            attrs: bounded(msg.attrs, MAX_ATTRS, "device.attrs")?,
        })
    }
}

impl From<&Peer> for PeerMsg {
    fn from(p: &Peer) -> Self {
        Self {
            id: p.id.to_bytes().to_vec(),
            wg: p.wg.as_bytes().to_vec(),
            probe: p.probe.as_bytes().to_vec(),
            addrs: p.addrs.iter().map(|a| addr_bytes(*a)).collect(),
            routes: texts(&p.routes),
            name: p.name.clone(),
            user: p.user.clone(),
            tags: p.tags.clone(),
            home_relay: p.home_relay.map(|r| r.to_bytes().to_vec()),
            key_signature: p.key_signature.clone(),
        }
    }
}

impl TryFrom<PeerMsg> for Peer {
    type Error = WireError;

    fn try_from(msg: PeerMsg) -> Result<Self, WireError> {
        Ok(Self {
            id: DeviceId::from_slice(&msg.id).ok_or(field("peer.id"))?,
            wg: WgPublicKey::from_slice(&msg.wg).ok_or(field("peer.wg"))?,
            probe: ProbePublicKey::from_slice(&msg.probe).ok_or(field("peer.probe"))?,
            addrs: msg.addrs.iter().map(|a| addr(a, "peer.addrs")).collect::<Result<_, _>>()?,
            routes: parsed(&msg.routes, "peer.routes")?,
            name: msg.name,
            user: msg.user,
            tags: msg.tags,
            home_relay: match msg.home_relay {
                Some(id) => Some(RelayId::from_slice(&id).ok_or(field("peer.home_relay"))?),
                None => None,
            },
            key_signature: msg.key_signature,
        })
    }
}

impl From<&FilterRule> for RuleMsg {
    fn from(rule: &FilterRule) -> Self {
        Self {
            id: rule.id.0,
            origin: rule.origin.clone(),
            deny: rule.action == Action::Deny,
            staged: rule.staged,
            src: ranges(&rule.src),
            dst: rule
                .dst
                .iter()
                .map(|d| DstMsg {
                    first: addr_bytes(d.net.first()),
                    last: addr_bytes(d.net.last()),
                    first_port: d.ports.first.into(),
                    last_port: d.ports.last.into(),
                })
                .collect(),
            protos: rule.protos.clone(),
            active: rule.active.as_ref().map(Into::into),
        }
    }
}

fn ranges(ranges: &[IpRange]) -> Vec<SrcMsg> {
    ranges.iter().map(|r| SrcMsg { first: addr_bytes(r.first()), last: addr_bytes(r.last()) }).collect()
}

fn ranges_of(msgs: &[SrcMsg], name: &'static str) -> Result<Vec<IpRange>, WireError> {
    msgs.iter().map(|r| range(&r.first, &r.last, name)).collect()
}

impl From<&Vec<UnixInterval>> for ActiveMsg {
    fn from(windows: &Vec<UnixInterval>) -> Self {
        Self { windows: windows.iter().map(|w| IntervalMsg { from: w.from, until: w.until }).collect() }
    }
}

impl From<ActiveMsg> for Vec<UnixInterval> {
    fn from(msg: ActiveMsg) -> Self {
        msg.windows.iter().map(|w| UnixInterval { from: w.from, until: w.until }).collect()
    }
}

impl TryFrom<RuleMsg> for FilterRule {
    type Error = WireError;

    fn try_from(msg: RuleMsg) -> Result<Self, WireError> {
        let port = |p: u32| u16::try_from(p).map_err(|_| field("rule.dst.ports"));
        Ok(Self {
            id: RuleId(msg.id),
            origin: msg.origin,
            action: if msg.deny { Action::Deny } else { Action::Allow },
            staged: msg.staged,
            src: ranges_of(&msg.src, "rule.src")?,
            dst: msg
                .dst
                .iter()
                .map(|d| {
                    let ports = PortRange { first: port(d.first_port)?, last: port(d.last_port)? };
                    Ok(FilterDst { net: range(&d.first, &d.last, "rule.dst")?, ports })
                })
                .collect::<Result<_, WireError>>()?,
            protos: msg.protos,
            active: msg.active.map(Into::into),
        })
    }
}

impl From<&AppGrant> for AppMsg {
    fn from(app: &AppGrant) -> Self {
        Self {
            id: app.id.0,
            name: app.name.clone(),
            src: ranges(&app.src),
            dst: ranges(&app.dst),
            values: app.values.clone(),
            active: app.active.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<AppMsg> for AppGrant {
    type Error = WireError;

    fn try_from(msg: AppMsg) -> Result<Self, WireError> {
        Ok(Self {
            id: RuleId(msg.id),
            name: msg.name,
            src: ranges_of(&msg.src, "app.src")?,
            dst: ranges_of(&msg.dst, "app.dst")?,
            values: msg.values,
            active: msg.active.map(Into::into),
        })
    }
}

impl From<&Relay> for RelayMsg {
    fn from(r: &Relay) -> Self {
        Self {
            id: r.id.to_bytes().to_vec(),
            name: r.name.clone(),
            addrs: texts(&r.addrs),
            stun: texts(&r.stun),
            cert_sha256: r.cert_sha256.to_vec(),
            peer: r.peer,
        }
    }
}

impl TryFrom<RelayMsg> for Relay {
    type Error = WireError;

    fn try_from(msg: RelayMsg) -> Result<Self, WireError> {
        Ok(Self {
            id: RelayId::from_slice(&msg.id).ok_or(field("relay.id"))?,
            name: msg.name,
            addrs: parsed::<SocketAddr>(&msg.addrs, "relay.addrs")?,
            stun: parsed::<SocketAddr>(&msg.stun, "relay.stun")?,
            cert_sha256: msg.cert_sha256.as_slice().try_into().map_err(|_| field("relay.cert_sha256"))?,
            peer: msg.peer,
        })
    }
}

fn rules(msgs: Vec<RuleMsg>, name: &'static str) -> Result<Vec<FilterRule>, WireError> {
    bounded(msgs, MAX_RULES, name)?.into_iter().map(TryInto::try_into).collect()
}

fn list<T: TryFrom<M, Error = WireError>, M>(
    msgs: Vec<M>,
    max: usize,
    name: &'static str,
) -> Result<Vec<T>, WireError> {
    bounded(msgs, max, name)?.into_iter().map(TryInto::try_into).collect()
}

impl From<&Netmap> for NetmapMsg {
    fn from(map: &Netmap) -> Self {
        Self {
            network: Some((&map.network).into()),
            device: Some((&map.device).into()),
            peers: map.peers.values().map(|p| p.as_ref().into()).collect(),
            ingress: map.ingress.iter().map(Into::into).collect(),
            egress: map.egress.iter().map(Into::into).collect(),
            relays: map.relays.values().map(Into::into).collect(),
            apps: map.apps.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<NetmapMsg> for Netmap {
    type Error = WireError;

    fn try_from(msg: NetmapMsg) -> Result<Self, WireError> {
        let peers: Vec<Peer> = list(msg.peers, MAX_PEERS, "peers")?;
        let relays: Vec<Relay> = list(msg.relays, MAX_RELAYS, "relays")?;
        Ok(Self {
            network: msg.network.ok_or(field("network"))?.try_into()?,
            device: msg.device.ok_or(field("device"))?.try_into()?,
            peers: peers.into_iter().map(|p| (p.id, Arc::new(p))).collect::<BTreeMap<_, _>>(),
            ingress: rules(msg.ingress, "ingress")?.into_iter().collect::<BTreeSet<_>>(),
            egress: rules(msg.egress, "egress")?.into_iter().collect::<BTreeSet<_>>(),
            relays: relays.into_iter().map(|r| (r.id, r)).collect::<BTreeMap<_, _>>(),
            apps: list(msg.apps, MAX_APPS, "apps")?.into_iter().collect::<BTreeSet<_>>(),
        })
    }
}

impl From<&Delta> for DeltaMsg {
    fn from(d: &Delta) -> Self {
        let keys = |keys: &[crate::netmap::RuleKey]| keys.iter().map(|k| k.to_vec()).collect();
        Self {
            network: d.network.as_ref().map(Into::into),
            device: d.device.as_ref().map(Into::into),
            removed_peers: d.removed_peers.iter().map(|id| id.to_bytes().to_vec()).collect(),
            peers: d.peers.iter().map(|p| p.as_ref().into()).collect(),
            removed_ingress: keys(&d.removed_ingress),
            ingress: d.ingress.iter().map(Into::into).collect(),
            removed_egress: keys(&d.removed_egress),
            egress: d.egress.iter().map(Into::into).collect(),
            removed_relays: d.removed_relays.iter().map(|id| id.to_bytes().to_vec()).collect(),
            relays: d.relays.iter().map(Into::into).collect(),
            removed_apps: keys(&d.removed_apps),
            apps: d.apps.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<DeltaMsg> for Delta {
    type Error = WireError;

    fn try_from(msg: DeltaMsg) -> Result<Self, WireError> {
        let keys = |keys: Vec<Vec<u8>>, name| {
            bounded(keys, MAX_RULES, name)?
                .iter()
                .map(|k| k.as_slice().try_into().map_err(|_| field(name)))
                .collect::<Result<Vec<_>, _>>()
        };
        let peers: Vec<Peer> = list(msg.peers, MAX_PEERS, "peers")?;
        Ok(Self {
            network: msg.network.map(TryInto::try_into).transpose()?,
            device: msg.device.map(TryInto::try_into).transpose()?,
            removed_peers: bounded(msg.removed_peers, MAX_PEERS, "removed_peers")?
                .iter()
                .map(|id| DeviceId::from_slice(id).ok_or(field("removed_peers")))
                .collect::<Result<_, _>>()?,
            peers: peers.into_iter().map(Arc::new).collect(),
            removed_ingress: keys(msg.removed_ingress, "removed_ingress")?,
            ingress: rules(msg.ingress, "ingress")?,
            removed_egress: keys(msg.removed_egress, "removed_egress")?,
            egress: rules(msg.egress, "egress")?,
            removed_relays: bounded(msg.removed_relays, MAX_RELAYS, "removed_relays")?
                .iter()
                .map(|id| RelayId::from_slice(id).ok_or(field("removed_relays")))
                .collect::<Result<_, _>>()?,
            relays: list(msg.relays, MAX_RELAYS, "relays")?,
            removed_apps: keys(msg.removed_apps, "removed_apps")?,
            apps: list(msg.apps, MAX_APPS, "apps")?,
        })
    }
}
