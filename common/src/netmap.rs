//! The netmap: what one device needs to know — itself, its peers, its filter, its relays — and nothing more.
//!
//! A coordinator sends snapshots and deltas. `apply(old, diff(old, new)) == new` holds for any two netmaps, and
//! [`Netmap::hash`] lets the agent check that it arrived where the coordinator meant it to. What restricts goes first:
//! [`Netmap::without_removed`] is the step between, sent as a revision of its own before anything is added.

mod narrow;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sha2::{Digest as _, Sha256};

use self::narrow::{common_apps, common_rules};
use crate::filter::{Action, FilterRule, IpRange, RuleId, UnixInterval};
use crate::ids::{DeviceId, NetworkId, RelayId};
use crate::keys::{ProbePublicKey, WgPublicKey};

pub use self::narrow::MAX_NARROW_WORK;

/// Most peers one netmap may hold; more is refused as malformed. Bounds memory against a hostile coordinator.
pub const MAX_PEERS: usize = 100_000;
/// Most filter rules per direction, for the same reason.
pub const MAX_RULES: usize = 100_000;
/// Most relays.
pub const MAX_RELAYS: usize = 256;
/// Most peer relays among them: what a device is connected to at once while it looks for a way to a peer.
pub const MAX_PEER_RELAYS: usize = 8;
/// Most application capabilities, for the same reason.
pub const MAX_APPS: usize = 10_000;
/// Most attributes of a device; files give each a handful.
pub const MAX_ATTRS: usize = 1_000;

/// Facts about the network that a device needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The network's id.
    pub id: NetworkId,
    /// Its name, for people.
    pub name: String,
    /// The pool that IPv4 overlay addresses come from.
    pub ipv4: Ipv4Net,
    /// The prefix that IPv6 overlay addresses come from.
    pub ipv6: Ipv6Net,
}

/// What a device is told about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelfDevice {
    /// Its id.
    pub id: DeviceId,
    /// Its name, unique in the network.
    pub name: String,
    /// Its overlay addresses: at most one per family.
    pub addrs: Vec<IpAddr>,
    /// The user it belongs to, unless it is a workload.
    pub user: Option<String>,
    /// Its tags, sorted; not empty for a workload.
    pub tags: Vec<String>,
    /// Its attributes by the policy's `nodeAttrs`, sorted: for its applications and for people.
    pub attrs: Vec<String>,
}

/// Another device, as far as this one needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub id: DeviceId,
    /// Its WireGuard key.
    pub wg: WgPublicKey,
    /// Its probe key.
    pub probe: ProbePublicKey,
    /// Its overlay addresses.
    pub addrs: Vec<IpAddr>,
    /// Subnets behind it that this device may use.
    pub routes: Vec<IpNet>,
    /// Its name; absent when this device may only answer it.
    pub name: Option<String>,
    /// Its user.
    pub user: Option<String>,
    /// Its tags, sorted.
    pub tags: Vec<String>,
    /// The relay it listens on.
    pub home_relay: Option<RelayId>,
    /// Vouches for the peer's keys independently of the coordinator; reserved for the network lock.
    pub key_signature: Option<Vec<u8>>,
}

/// A relay this device may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relay {
    /// Its id.
    pub id: RelayId,
    /// Its name, for people.
    pub name: String,
    /// Where it listens: QUIC on UDP and TLS on TCP, same port.
    pub addrs: Vec<SocketAddr>,
    /// Where it answers STUN.
    pub stun: Vec<SocketAddr>,
    /// SHA-256 of its certificate (DER); any other certificate is refused.
    pub cert_sha256: [u8; 32],
    /// It is a device that a grant lets relay: a way between two devices, never a home. It may be asleep tomorrow.
    pub peer: bool,
}

/// A capability that some devices have at this one's applications. It opens nothing; applications ask for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AppGrant {
    /// Which policy rule this comes from.
    pub id: RuleId,
    /// `example.com/cap/name`.
    pub name: String,
    /// Who has it.
    pub src: Vec<IpRange>,
    /// At which of the device's addresses.
    pub dst: Vec<IpRange>,
    /// What the application makes of it: JSON texts.
    pub values: Vec<String>,
    /// When it holds; `None` is always. Sorted, disjoint.
    pub active: Option<Vec<UnixInterval>>,
}

impl AppGrant {
    /// True if the capability is given at `now` (seconds since the Unix epoch).
    pub fn is_active(&self, now: i64) -> bool {
        self.active.as_ref().is_none_or(|windows| windows.iter().any(|w| w.from <= now && now < w.until))
    }
}

/// Everything one device needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netmap {
    /// The network.
    pub network: Network,
    /// This device.
    pub device: SelfDevice,
    /// Its peers. Shared, since a coordinator tells many devices the same of one.
    pub peers: BTreeMap<DeviceId, Arc<Peer>>,
    /// What it lets in.
    pub ingress: BTreeSet<FilterRule>,
    /// What it may send.
    pub egress: BTreeSet<FilterRule>,
    /// Relays.
    pub relays: BTreeMap<RelayId, Relay>,
    /// Capabilities of others at its applications.
    pub apps: BTreeSet<AppGrant>,
}

/// Names a rule inside a delta: the first 16 bytes of the SHA-256 of its canonical encoding, which knows no origin.
pub type RuleKey = [u8; 16];

/// The difference between two netmaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// New facts about the network.
    pub network: Option<Network>,
    /// New facts about this device.
    pub device: Option<SelfDevice>,
    /// Peers that are gone.
    pub removed_peers: Vec<DeviceId>,
    /// Peers that are new or changed, whole.
    pub peers: Vec<Arc<Peer>>,
    /// Rules that are gone.
    pub removed_ingress: Vec<RuleKey>,
    /// Rules that are new.
    pub ingress: Vec<FilterRule>,
    /// Rules that are gone.
    pub removed_egress: Vec<RuleKey>,
    /// Rules that are new.
    pub egress: Vec<FilterRule>,
    /// Relays that are gone.
    pub removed_relays: Vec<RelayId>,
    /// Relays that are new or changed, whole.
    pub relays: Vec<Relay>,
    /// Application capabilities that are gone, named like rules.
    pub removed_apps: Vec<RuleKey>,
    /// Application capabilities that are new.
    pub apps: Vec<AppGrant>,
}

impl Delta {
    /// True if applying it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Netmap {
    /// What turns `old` into `new`.
    pub fn diff(old: &Self, new: &Self) -> Delta {
        let (removed_peers, peers) = diff_map(&old.peers, &new.peers);
        let (removed_relays, relays) = diff_map(&old.relays, &new.relays);
        let (removed_ingress, ingress) = diff_rules(&old.ingress, &new.ingress);
        let (removed_egress, egress) = diff_rules(&old.egress, &new.egress);
        Delta {
            network: (old.network != new.network).then(|| new.network.clone()),
            device: (old.device != new.device).then(|| new.device.clone()),
            removed_peers,
            peers,
            removed_ingress,
            ingress,
            removed_egress,
            egress,
            removed_relays,
            relays,
            removed_apps: old.apps.difference(&new.apps).map(app_key).collect(),
            apps: new.apps.difference(&old.apps).cloned().collect(),
        }
    }

    /// Applies what [`Netmap::diff`] made. Removals of what isn't there are harmless; the hash decides.
    pub fn apply(&mut self, delta: Delta) {
        if let Some(network) = delta.network {
            self.network = network;
        }
        if let Some(device) = delta.device {
            self.device = device;
        }
        for id in delta.removed_peers {
            self.peers.remove(&id);
        }
        self.peers.extend(delta.peers.into_iter().map(|p| (p.id, p)));
        for id in delta.removed_relays {
            self.relays.remove(&id);
        }
        self.relays.extend(delta.relays.into_iter().map(|r| (r.id, r)));
        apply_rules(&mut self.ingress, &delta.removed_ingress, delta.ingress);
        apply_rules(&mut self.egress, &delta.removed_egress, delta.egress);
        if !delta.removed_apps.is_empty() {
            let removed: BTreeSet<&RuleKey> = delta.removed_apps.iter().collect();
            self.apps.retain(|app| !removed.contains(&app_key(app)));
        }
        self.apps.extend(delta.apps);
    }

    /// The step between `old` and `new` that only takes away: `old` without the peers and relays that `new` lacks, with
    /// filters that allow what both allow and nothing else. Sent first, as a revision of its own. What both allow stays
    /// allowed throughout, so that a flow does not end because the rule it lives under has got another source.
    #[must_use]
    pub fn without_removed(old: &Self, new: &Self) -> Self {
        let same_peer = |peer: &Peer| {
            new.peers
                .get(&peer.id)
                .is_some_and(|n| n.wg == peer.wg && n.probe == peer.probe && n.addrs == peer.addrs)
        };
        Self {
            network: old.network.clone(),
            device: old.device.clone(),
            peers: old.peers.iter().filter(|(_, p)| same_peer(p)).map(|(id, p)| (*id, p.clone())).collect(),
            ingress: common_rules(&old.ingress, &new.ingress),
            egress: common_rules(&old.egress, &new.egress),
            relays: old
                .relays
                .iter()
                .filter(|(id, r)| {
                    new.relays.get(*id).is_some_and(|n| (n.cert_sha256, n.peer) == (r.cert_sha256, r.peer))
                })
                .map(|(id, r)| (*id, r.clone()))
                .collect(),
            apps: common_apps(&old.apps, &new.apps),
        }
    }

    /// SHA-256 over the canonical encoding, version 1 (docs/wire.md): sections in a fixed order, maps and sets in key
    /// order, big-endian numbers, every text and list behind its length; capabilities, attributes and the ids of peer
    /// relays, which come last, are left out where there are none of them nor of what follows. Fields of later versions
    /// are not part of it.
    pub fn hash(&self) -> [u8; 32] {
        // About what it comes to, since growing a list costs as much as filling it.
        let rules = self.ingress.len() + self.egress.len();
        let mut out = Canonical(Vec::with_capacity(512 + 256 * (self.peers.len() + rules)));
        out.bytes(b"warren netmap v1");
        out.fixed(&self.network.id.to_bytes());
        out.text(&self.network.name);
        out.text(&self.network.ipv4.to_string());
        out.text(&self.network.ipv6.to_string());
        out.fixed(&self.device.id.to_bytes());
        out.text(&self.device.name);
        out.list(&self.device.addrs, Canonical::addr);
        out.option(self.device.user.as_ref(), |o, t| o.text(t));
        out.list(&self.device.tags, |o, t| o.text(t));
        out.list(self.peers.values(), |o, p| o.peer(p));
        out.list(&self.ingress, Canonical::rule);
        out.list(&self.egress, Canonical::rule);
        out.list(self.relays.values(), Canonical::relay);
        let peer_relays: Vec<RelayId> = self.relays.values().filter(|r| r.peer).map(|r| r.id).collect();
        let (any_peer_relays, any_attrs) = (!peer_relays.is_empty(), !self.device.attrs.is_empty());
        if !self.apps.is_empty() || any_attrs || any_peer_relays {
            out.list(&self.apps, Canonical::app);
        }
        if any_attrs || any_peer_relays {
            out.list(&self.device.attrs, |o, t| o.text(t));
        }
        if any_peer_relays {
            out.list(&peer_relays, |o, id| o.fixed(&id.to_bytes()));
        }
        Sha256::digest(&out.0).into()
    }
}

/// The name of `rule` inside deltas.
pub fn rule_key(rule: &FilterRule) -> RuleKey {
    key(|out| out.rule(rule))
}

fn app_key(app: &AppGrant) -> RuleKey {
    key(|out| out.app(app))
}

fn key(write: impl Fn(&mut Canonical)) -> RuleKey {
    let mut out = Canonical::default();
    write(&mut out);
    let digest = Sha256::digest(&out.0);
    std::array::from_fn(|i| digest[i])
}

fn diff_map<K: Ord + Copy, V: PartialEq + Clone>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> (Vec<K>, Vec<V>) {
    let removed = old.keys().filter(|k| !new.contains_key(*k)).copied().collect();
    let changed = new.iter().filter(|(k, v)| old.get(*k) != Some(*v)).map(|(_, v)| v.clone()).collect();
    (removed, changed)
}

fn diff_rules(old: &BTreeSet<FilterRule>, new: &BTreeSet<FilterRule>) -> (Vec<RuleKey>, Vec<FilterRule>) {
    (old.difference(new).map(rule_key).collect(), new.difference(old).cloned().collect())
}

fn apply_rules(rules: &mut BTreeSet<FilterRule>, removed: &[RuleKey], added: Vec<FilterRule>) {
    if !removed.is_empty() {
        let removed: BTreeSet<&RuleKey> = removed.iter().collect();
        rules.retain(|rule| !removed.contains(&rule_key(rule)));
    }
    for rule in added {
        rules.replace(rule); // the newer origin counts
    }
}

#[derive(Default)]
struct Canonical(Vec<u8>);

impl Canonical {
    fn fixed(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn len(&mut self, len: usize) {
        // Lists are bounded by MAX_* far below 2^32; a longer one could only ever make the hashes differ.
        self.fixed(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.len(bytes.len());
        self.fixed(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn list<T>(
        &mut self,
        items: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
        each: impl Fn(&mut Self, T),
    ) {
        let items = items.into_iter();
        self.len(items.len());
        items.for_each(|item| each(self, item));
    }

    fn option<T>(&mut self, item: Option<T>, each: impl Fn(&mut Self, T)) {
        self.fixed(&[u8::from(item.is_some())]);
        if let Some(item) = item {
            each(self, item);
        }
    }

    fn addr(&mut self, addr: &IpAddr) {
        match addr {
            IpAddr::V4(a) => self.bytes(&a.octets()),
            IpAddr::V6(a) => self.bytes(&a.octets()),
        }
    }

    fn socket_addr(&mut self, addr: &SocketAddr) {
        self.addr(&addr.ip());
        self.fixed(&addr.port().to_be_bytes());
    }

    fn range(&mut self, range: &IpRange) {
        self.addr(&range.first());
        self.addr(&range.last());
    }

    fn peer(&mut self, peer: &Peer) {
        self.fixed(&peer.id.to_bytes());
        self.fixed(peer.wg.as_bytes());
        self.fixed(peer.probe.as_bytes());
        self.list(&peer.addrs, Self::addr);
        self.list(&peer.routes, |o, r| o.text(&r.to_string()));
        self.option(peer.name.as_ref(), |o, t| o.text(t));
        self.option(peer.user.as_ref(), |o, t| o.text(t));
        self.list(&peer.tags, |o, t| o.text(t));
        self.option(peer.home_relay, |o, r| o.fixed(&r.to_bytes()));
        self.option(peer.key_signature.as_ref(), |o, s| o.bytes(s));
    }

    fn rule(&mut self, rule: &FilterRule) {
        self.fixed(&rule.id.0.to_be_bytes());
        self.fixed(&[u8::from(rule.action == Action::Deny), u8::from(rule.staged)]);
        self.list(&rule.src, Self::range);
        self.list(&rule.dst, |o, d| {
            o.range(&d.net);
            o.fixed(&d.ports.first.to_be_bytes());
            o.fixed(&d.ports.last.to_be_bytes());
        });
        self.bytes(&rule.protos);
        self.active(rule.active.as_ref());
    }

    fn active(&mut self, windows: Option<&Vec<UnixInterval>>) {
        self.option(windows, |o, windows| {
            o.list(windows, |o, w| {
                o.fixed(&w.from.to_be_bytes());
                o.fixed(&w.until.to_be_bytes());
            });
        });
    }

    fn app(&mut self, app: &AppGrant) {
        self.fixed(&app.id.0.to_be_bytes());
        self.text(&app.name);
        self.list(&app.src, Self::range);
        self.list(&app.dst, Self::range);
        self.list(&app.values, |o, v| o.text(v));
        self.active(app.active.as_ref());
    }

    fn relay(&mut self, relay: &Relay) {
        self.fixed(&relay.id.to_bytes());
        self.text(&relay.name);
        self.list(&relay.addrs, Self::socket_addr);
        self.list(&relay.stun, Self::socket_addr);
        self.fixed(&relay.cert_sha256);
    }
}

#[cfg(test)]
mod tests;
