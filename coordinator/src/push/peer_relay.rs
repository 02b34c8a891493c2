//! Devices that serve as relays: whether they are to, whose access has changed, and who needs another token for them.
//!
//! They hear it in their control sessions, in order: first a floor, then each change. A relaying device is told of nobody
//! but those who may, or just could, use it.

use std::collections::{BTreeMap, BTreeSet};

use warren_common::ids::{DeviceId, RelayId};
use warren_common::time::Now;
use warren_common::wire::control::ServerBody;
use warren_common::wire::relay_control::{RelayCommand, RelayDuty};

use super::session::Session;
use super::{Coordinator, SessionId};
use crate::domain::RelayDifference;

impl Coordinator {
    /// The device has said in this session whether it offers to relay.
    pub(super) fn answer_offer(&mut self, id: SessionId, offers: bool) {
        let Some(live) = self.sessions.get_mut(&id).and_then(Session::live_mut) else { return };
        let device = live.device;
        if offers {
            self.tell_duty(id, device);
        } else {
            live.duty = None;
        }
    }

    /// Tells a device that offers to relay what that has come to, unless it knows.
    fn tell_duty(&mut self, id: SessionId, device: DeviceId) {
        let duty = self.reach.relays().served_by(device);
        let Some(live) = self.sessions.get_mut(&id).and_then(Session::live_mut) else { return };
        if live.duty.replace(duty) != Some(duty) {
            let relay = duty.map_or_else(Vec::new, |relay| relay.to_bytes().to_vec());
            let floor = self.newest_cut;
            self.send(id, ServerBody::RelayDuty(RelayDuty { relay, floor }));
        }
    }

    /// Before anybody's netmap changes, tells the devices that relay whose older tokens count no more: of those who lost a
    /// peer (`lost`), who are `out` of the network, and who can no longer use that relay.
    pub(super) fn cut_at_peer_relays(
        &mut self,
        lost: &BTreeSet<DeviceId>,
        out: &BTreeSet<DeviceId>,
        relays: &RelayDifference,
        removals: &mut Option<u64>,
    ) {
        let serving = self.reach.relays().serving();
        let mut cut: BTreeMap<DeviceId, BTreeSet<DeviceId>> =
            serving.map(|(device, _, users)| (device, users & lost)).collect();
        for (device, users) in &relays.lost {
            cut.entry(*device).or_default().extend(users);
        }
        // Those that have offered to relay in their present session; also those who serve nobody any more.
        let offering = |device: &DeviceId| {
            let id = *self.by_device.get(device)?;
            self.sessions.get(&id)?.live()?.duty.map(|_| (*device, id))
        };
        let told: Vec<(DeviceId, SessionId)> = cut.keys().filter_map(offering).collect();
        if cut.values().any(|users| !users.is_empty())
            && let Some(revision) = self.number(removals)
        {
            self.newest_cut = revision;
            for (device, id) in &told {
                let users = cut.remove(device).unwrap_or_default();
                let (revoked, devices): (Vec<_>, Vec<_>) = users.into_iter().partition(|u| out.contains(u));
                if !revoked.is_empty() || !devices.is_empty() {
                    let command = RelayCommand::restrict(revision, &devices, &revoked);
                    self.send(*id, ServerBody::RelayCommand(command));
                }
            }
        }
        told.into_iter().for_each(|(device, id)| self.tell_duty(id, device));
    }

    /// Tokens that connected devices hold for a relay name those of their peers that know of it: here are more of these.
    pub(super) fn renew_tokens(&mut self, gained: &BTreeMap<RelayId, BTreeSet<DeviceId>>, now: Now) {
        for (relay, users) in gained {
            let peers = users.iter().filter_map(|user| self.reach.peers(*user)).flat_map(BTreeMap::keys);
            let peers: BTreeSet<DeviceId> = peers.copied().collect();
            let holds = |id: &SessionId| {
                let live = self.sessions.get(id).and_then(Session::live);
                live.is_some_and(|l| l.tokens.get(relay).is_some_and(|until| now.boot < *until))
            };
            let sessions = peers.iter().filter_map(|peer| self.by_device.get(peer)).copied();
            let sessions: Vec<SessionId> = sessions.filter(holds).collect();
            sessions.into_iter().for_each(|id| self.grant_token(id, *relay, now));
        }
    }
}
