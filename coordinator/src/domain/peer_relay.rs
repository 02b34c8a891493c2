//! Peer relays: devices that offer to relay, and whom the policy in force lets use them.
//!
//! A device learns of those alone that a grant lets it use, by an id that does not say which device it is; and it is given
//! tokens for those peers alone that have the relay in their netmaps as well.

use std::collections::{BTreeMap, BTreeSet};

use warren_common::ids::{DeviceId, RelayId};
use warren_common::netmap::{MAX_PEER_RELAYS, Relay};
use warren_common::policy::Compiled;
use warren_common::time::UnixTime;

use super::State;
use super::entity::Device;

/// The devices that serve as relays, and for whom: those that offer it, and that a grant lets relay for somebody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerRelays {
    serving: BTreeMap<RelayId, Serving>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Serving {
    device: DeviceId,
    relay: Relay,
    users: BTreeSet<DeviceId>,
}

/// What following a change has touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayDifference {
    /// Devices whose netmap may list other relays.
    pub touched: BTreeSet<DeviceId>,
    /// By relaying device: who could use it and no longer can.
    pub lost: BTreeMap<DeviceId, BTreeSet<DeviceId>>,
    /// By relay: who can use it and could not before.
    pub gained: BTreeMap<RelayId, BTreeSet<DeviceId>>,
}

impl PeerRelays {
    /// Brings what these devices serve up to date.
    pub(super) fn follow(
        &mut self,
        state: &State,
        compiled: &Compiled,
        devices: impl IntoIterator<Item = DeviceId>,
        now: UnixTime,
    ) -> RelayDifference {
        let mut difference = RelayDifference::default();
        for id in devices {
            let old = self.serving.iter().find(|(_, s)| s.device == id).map(|(relay, _)| *relay);
            let old = old.and_then(|relay| self.serving.remove(&relay));
            let new = state.device(id).and_then(|device| serving(device, compiled, now));
            difference.note(id, old.as_ref(), new.as_ref());
            self.serving.extend(new.map(|new| (new.relay.id, new)));
        }
        difference
    }

    /// What a device is told of: the relays that it may use. If there are too many, those with the lowest ids, so that two
    /// devices with the same grants are told the same.
    pub fn listed_for(&self, user: DeviceId) -> impl Iterator<Item = &Relay> {
        let usable = self.serving.values().filter(move |s| s.users.contains(&user));
        usable.map(|s| &s.relay).take(MAX_PEER_RELAYS)
    }

    /// True if the device is told of that relay.
    pub fn lists(&self, user: DeviceId, relay: RelayId) -> bool {
        self.listed_for(user).any(|r| r.id == relay)
    }

    /// The id under which a device serves.
    pub fn served_by(&self, device: DeviceId) -> Option<RelayId> {
        self.serving.iter().find(|(_, s)| s.device == device).map(|(relay, _)| *relay)
    }

    /// The devices that serve, with whom they serve.
    pub fn serving(&self) -> impl Iterator<Item = (DeviceId, &Relay, &BTreeSet<DeviceId>)> {
        self.serving.values().map(|s| (s.device, &s.relay, &s.users))
    }
}

impl RelayDifference {
    fn note(&mut self, id: DeviceId, old: Option<&Serving>, new: Option<&Serving>) {
        let users = |serving: Option<&Serving>| serving.map(|s| s.users.clone()).unwrap_or_default();
        let (before, after) = (users(old), users(new));
        if old.map(|s| &s.relay) != new.map(|s| &s.relay) {
            self.touched.extend(before.union(&after));
        }
        let (lost, gained) = (&before - &after, &after - &before);
        self.touched.extend(lost.union(&gained));
        if !lost.is_empty() {
            self.lost.insert(id, lost);
        }
        if let Some(new) = new.filter(|_| !gained.is_empty()) {
            self.gained.insert(new.relay.id, gained);
        }
    }
}

/// What a device serves, if it offers that and somebody may use it.
fn serving(device: &Device, compiled: &Compiled, now: UnixTime) -> Option<Serving> {
    let offer = device.relay.as_ref()?;
    let users = compiled.relay_users(&device.id.to_string(), now.as_secs());
    let users: BTreeSet<DeviceId> = users.iter().filter_map(|name| name.parse().ok()).collect();
    if users.is_empty() {
        return None;
    }
    let id = device.relay_id();
    let relay = Relay {
        id,
        name: name_of(id),
        addrs: offer.addrs.clone(),
        stun: Vec::new(),
        cert_sha256: offer.cert_sha256,
        peer: true,
    };
    Some(Serving { device: device.id, relay, users })
}

/// For people: says no more than the id.
fn name_of(id: RelayId) -> String {
    let text = id.to_string();
    format!("peer-{}", text.get(text.len().saturating_sub(6)..).unwrap_or(&text))
}
