//! What devices are told of others: each record is made once and shared by all who are told the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use warren_common::ids::DeviceId;
use warren_common::netmap::Peer;
use warren_common::policy::Need;

use super::State;
use super::entity::Device;
use super::reach::email_of;

/// The newest record of each device, for those who may only answer it and for those who may reach it.
#[derive(Clone, Debug, Default)]
pub struct PeerRecords(BTreeMap<DeviceId, [Option<Arc<Peer>>; 2]>);

impl PeerRecords {
    /// Brings the records of these devices up to date. Those at hand stay, if they still hold: comparing is cheaper than
    /// making one, and nothing needs to say which change touches which record.
    pub fn prepare(&mut self, state: &State, devices: impl IntoIterator<Item = DeviceId>) {
        for peer in devices.into_iter().filter_map(|id| state.device(id)) {
            let held = self.0.entry(peer.id).or_default();
            for (may_reach, held) in [false, true].into_iter().zip(held) {
                if !held.as_ref().is_some_and(|record| holds(record, state, peer)) {
                    *held = Some(Arc::new(record(state, peer, &Need { may_reach, ..Need::default() })));
                }
            }
        }
    }

    /// The record of `peer` for a device that needs to know it for `need`: shared, if it was prepared.
    pub(super) fn get(&self, state: &State, peer: &Device, need: &Need) -> Arc<Peer> {
        // Whose routes one may use differs from device to device.
        let held = self.0.get(&peer.id).filter(|_| need.routes.is_empty());
        let held = held.and_then(|held| held[usize::from(need.may_reach)].as_ref());
        match held.filter(|record| holds(record, state, peer)) {
            Some(record) => Arc::clone(record),
            None => Arc::new(record(state, peer, need)),
        }
    }

    /// Forgets the devices that are gone.
    pub fn sweep(&mut self, state: &State) {
        self.0.retain(|id, _| state.device(*id).is_some());
    }
}

/// True if `record` says of `peer` what [`record`] would. The name is the one thing that not all are told.
fn holds(record: &Peer, state: &State, peer: &Device) -> bool {
    record.wg == peer.wg
        && record.probe == peer.probe
        && record.addrs == peer.addrs()
        && record.name.as_ref().is_none_or(|name| *name == peer.name)
        && record.user.as_deref() == email_of(state, peer)
        && record.tags == peer.tags
        && record.home_relay == peer.home_relay
}

fn record(state: &State, peer: &Device, need: &Need) -> Peer {
    Peer {
        id: peer.id,
        wg: peer.wg,
        probe: peer.probe,
        addrs: peer.addrs().to_vec(),
        routes: need.routes.iter().copied().collect(),
        // Who may only answer needs to know who asks (user, tags), not what the asking machine is called.
        name: need.may_reach.then(|| peer.name.clone()),
        user: email_of(state, peer).map(str::to_owned),
        tags: peer.tags.clone(),
        home_relay: peer.home_relay,
        key_signature: None,
    }
}
