//! The daemon's part of relaying for others: what is offered, and what the coordinator says.

use std::net::IpAddr;

use warren_common::wire::relay_control::{RelayCommand, RelayDuty};
use warren_engine::engine::Engine;

use super::Up;
use crate::peer_relay::PeerRelay;

impl Up {
    /// Offers to relay at the addresses that this host has now.
    pub(super) fn follow_addresses(&mut self, own: &[IpAddr]) {
        let Some(peer_relay) = &mut self.peer_relay else { return };
        let net = self.engine.as_ref().map(Engine::net_status_so_far);
        // A machine behind a NAT that forwards everything, as in a cloud, is reached there at the same port.
        let outside = net.iter().flat_map(|net| [net.ipv4, net.ipv6]).flatten().map(|addr| addr.ip());
        if peer_relay.set_addresses(own.iter().copied(), outside) && self.welcomed {
            self.report();
        }
    }

    /// What a thread of it was asked for has come.
    pub(super) fn on_peer_relay(&mut self, offer_changed: bool) {
        if offer_changed && self.welcomed {
            self.report();
        }
    }

    pub(super) fn on_relay_duty(&mut self, duty: &RelayDuty) {
        if let (Some(peer_relay), Some(identity)) = (&mut self.peer_relay, &self.identity) {
            peer_relay.on_duty(duty, identity.netmap);
        }
    }

    pub(super) fn on_relay_command(&mut self, command: &RelayCommand) {
        if let Some(peer_relay) = &mut self.peer_relay {
            peer_relay.obey(command);
        }
    }
}

/// Ends it, and waits until its devices have been told.
pub(super) async fn farewell(peer_relay: Option<PeerRelay>) {
    if let Some(thread) = peer_relay.and_then(PeerRelay::end) {
        let _ = tokio::task::spawn_blocking(move || thread.join()).await; // a thread that failed has ended too
    }
}
