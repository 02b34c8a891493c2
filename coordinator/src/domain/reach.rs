//! What the policy in force makes of the network: per device, whom it needs to know and what its filter is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use warren_common::filter::FilterRule;
use warren_common::ids::DeviceId;
use warren_common::netmap::{Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::time::UnixTime;

use super::State;
use super::entity::{Device, DeviceState, RelayRecord};

/// Why one device is told of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// It may only answer it: it learns keys and addresses, not the name.
    Answer,
    /// It may open connections to it.
    Initiate,
}

/// What the policy means for one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// What it lets in.
    pub ingress: BTreeSet<FilterRule>,
    /// What it may send.
    pub egress: BTreeSet<FilterRule>,
    /// Whom it needs to know. Symmetric: if A needs B, B needs A.
    pub peers: BTreeMap<DeviceId, Need>,
}

/// What the policy means for every active device. Devices without a view reach nothing.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    views: BTreeMap<DeviceId, Arc<View>>,
}

impl Reach {
    /// The view of one device.
    pub fn view(&self, id: DeviceId) -> Option<&Arc<View>> {
        self.views.get(&id)
    }

    /// Compiles the policy in force against the devices that are active at `now`.
    pub fn compute(state: &State, _now: UnixTime) -> Self {
        let active = state.devices().values().filter(|d| state.device_state(d) == DeviceState::Active);
        Self { views: active.map(|d| (d.id, Arc::default())).collect() }
    }

    /// The devices whose view differs between the two, those in one of them only included.
    pub fn differing(&self, other: &Self) -> BTreeSet<DeviceId> {
        let ids = self.views.keys().chain(other.views.keys());
        ids.filter(|id| self.views.get(id) != other.views.get(id)).copied().collect()
    }

    /// The netmap of `id`; `None` unless it is an active device.
    pub fn netmap(&self, state: &State, id: DeviceId) -> Option<Netmap> {
        let (device, view) = (state.device(id)?, self.views.get(&id)?);
        let settings = state.settings();
        let peers = view.peers.iter().filter_map(|(id, need)| {
            let peer = state.device(*id)?;
            Some((*id, peer_record(state, peer, *need)))
        });
        Some(Netmap {
            network: Network {
                id: settings.network,
                name: settings.name.clone(),
                ipv4: settings.ipv4,
                ipv6: settings.ipv6,
            },
            device: SelfDevice {
                id,
                name: device.name.clone(),
                addrs: device.addrs().to_vec(),
                user: user_of(state, device),
                tags: device.tags.clone(),
            },
            peers: peers.collect(),
            ingress: view.ingress.clone(),
            egress: view.egress.clone(),
            relays: state.relays().values().filter_map(relay_record).map(|r| (r.id, r)).collect(),
        })
    }
}

fn user_of(state: &State, device: &Device) -> Option<String> {
    device.user.and_then(|id| state.users().get(&id)).map(|u| u.email.clone())
}

fn peer_record(state: &State, peer: &Device, need: Need) -> Peer {
    Peer {
        id: peer.id,
        wg: peer.wg,
        probe: peer.probe,
        addrs: peer.addrs().to_vec(),
        routes: Vec::new(),
        name: (need == Need::Initiate).then(|| peer.name.clone()),
        user: user_of(state, peer),
        tags: peer.tags.clone(),
        home_relay: peer.home_relay,
        key_signature: None,
    }
}

/// A relay as devices see it; `None` until it has said where it is.
fn relay_record(relay: &RelayRecord) -> Option<Relay> {
    let cert_sha256 = relay.cert_sha256.filter(|_| !relay.addrs.is_empty())?;
    Some(Relay {
        id: relay.id,
        name: relay.name.clone(),
        addrs: relay.addrs.clone(),
        stun: relay.stun.clone(),
        cert_sha256,
    })
}

/// Checks that `text` is a policy that can be put in force over `state`, its own tests included.
///
/// # Errors
/// What is wrong with it, for people, over several lines.
pub fn check(_state: &State, _text: &str, _now: UnixTime) -> Result<(), String> {
    Ok(())
}
