//! Connections to relays: the home relay for good, others while traffic flows through them.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use warren_common::endpoint::is_endpoint;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::netmap::{Netmap, Relay};
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{ClientBody, RelayTokenGrant, RelayTokenRequest};
use warren_engine::home::LEAVE_AFTER;
use warren_engine::io::Source;
use warren_engine::relay_link::KEEPALIVE;

use super::{Daemon, Up};
use crate::dataplane::{DataPlane, RelayLinks};
use crate::problem::Problem;
use crate::relay_client::{
    REST_AFTER, RelayClient, RelayClientConfig, RelayEvent, RelayEventKind, Sent, Transport,
};

/// Packets and news from all relays that wait for the daemon; behind them the relays' connections fill.
const QUEUE: usize = 1_024;
/// Events taken in one turn.
const BUDGET: usize = 256;

/// All relay connections.
pub(super) struct Relays {
    clients: BTreeMap<RelayId, Client>,
    /// What the engine wants to be home.
    chosen: Option<RelayId>,
    /// What peers are told, as the engine says.
    home: Option<RelayId>,
    /// Why the last connection failed or ended, and what somebody can change about it.
    trouble: Option<(String, Option<Problem>)>,
    /// How long UDP to a relay may be silent.
    keepalive: Duration,
    sender: mpsc::Sender<RelayEvent>,
    events: mpsc::Receiver<RelayEvent>,
    drops: RelayDrops,
}

/// Packets that did not go out through a relay since the agent came up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RelayDrops {
    /// The queue was full: of this packet, or of older ones that made room for it.
    pub(super) queue_full: u64,
    /// There was no connection any more.
    pub(super) not_connected: u64,
}

struct Client {
    relay: Relay,
    client: RelayClient,
    used: Instant,
}

impl Default for Relays {
    fn default() -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        Self {
            clients: BTreeMap::new(),
            chosen: None,
            home: None,
            trouble: None,
            keepalive: KEEPALIVE,
            sender,
            events,
            drops: RelayDrops::default(),
        }
    }
}

impl Relays {
    /// The relay that peers find us at.
    pub(super) fn home(&self) -> Option<RelayId> {
        self.home
    }

    /// What packets to and from a relay run over now, and the round trip to it.
    pub(super) fn link(&self, relay: RelayId) -> Option<(Transport, Option<Duration>)> {
        let client = &self.clients.get(&relay)?.client;
        Some((client.transport()?, client.rtt()))
    }

    /// True while packets to and from a relay go through a proxy.
    pub(super) fn is_proxied(&self, relay: RelayId) -> bool {
        self.clients.get(&relay).is_some_and(|c| c.client.is_proxied())
    }

    /// Waits for news. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<RelayEvent> {
        self.events.recv().await
    }

    pub(super) const fn drops(&self) -> RelayDrops {
        self.drops
    }

    /// Relays that packets flow through.
    pub(super) fn connected(&self) -> impl Iterator<Item = RelayId> {
        self.clients.iter().filter(|(_, c)| c.client.is_connected()).map(|(id, _)| *id)
    }

    /// Why there is no connection, if one was tried, and what somebody can change about it.
    pub(super) fn trouble(&self) -> Option<(&str, Option<&Problem>)> {
        self.trouble.as_ref().map(|(why, problem)| (why.as_str(), problem.as_ref()))
    }

    pub(super) fn network_changed(&self) {
        self.clients.values().for_each(|c| c.client.network_changed());
    }

    pub(super) fn set_keepalive(&mut self, keepalive: Duration) {
        self.keepalive = keepalive;
        self.clients.values().for_each(|c| c.client.set_keepalive(keepalive));
    }
}

impl RelayLinks for Relays {
    fn send(&mut self, now: Now, relay: RelayId, device: DeviceId, packet: &[u8]) {
        let Some(client) = self.clients.get_mut(&relay) else {
            self.drops.not_connected += 1;
            return;
        };
        client.used = now.boot;
        match client.client.send(device, packet) {
            Sent::Queued { dropped } => self.drops.queue_full += dropped as u64,
            Sent::Full | Sent::Length => self.drops.queue_full += 1,
            Sent::NotConnected => self.drops.not_connected += 1,
        }
    }
}

impl Up {
    /// Connects to a relay of the netmap, if there is no connection yet; else the connection stays.
    pub(super) fn want_relay(&mut self, now: Now, id: RelayId) {
        let Some(netmap) = self.engine.as_ref().and_then(|e| e.netmap()) else { return };
        let Some(relay) = netmap.relays.get(&id).cloned() else { return };
        if let Some(client) = self.relays.clients.get_mut(&id) {
            client.used = now.boot;
            return;
        }
        let mut dialled = relay.clone();
        if relay.peer {
            // Its device says where it is: that must not send us anywhere where a peer's word could not.
            let network = (netmap.network.ipv4, netmap.network.ipv6);
            dialled.addrs.retain(|addr| is_endpoint(Some(network), *addr));
        }
        let config = RelayClientConfig {
            relay: dialled,
            network: self.config.network,
            probe: self.keys.probe.clone(),
            egress: self.config.egress.clone(),
            own: netmap.device.addrs.clone(),
            rest_after: REST_AFTER,
        };
        let client = RelayClient::spawn(config, self.relays.sender.clone());
        client.set_keepalive(self.relays.keepalive);
        if let Some(token) = self.restored_token(now, id) {
            client.provide_token(token);
        }
        self.relays.clients.insert(id, Client { relay, client, used: now.boot });
    }

    pub(super) fn choose_home(&mut self, now: Now, home: Option<RelayId>) {
        self.relays.chosen = home;
        if let Some(id) = home {
            self.want_relay(now, id);
        }
    }

    /// Tells the coordinator where peers find us.
    pub(super) fn announce_home(&mut self, home: Option<RelayId>) {
        if std::mem::replace(&mut self.relays.home, home) != home {
            self.report();
        }
    }

    /// The netmap changed: relays that are gone or moved are left, and tokens are renewed if the peers they must
    /// name are others now, so that the first packet to a new peer passes.
    pub(super) fn follow_netmap(&mut self, now: Now, peers_changed: bool) {
        let Some(netmap) = self.engine.as_ref().and_then(|e| e.netmap()) else { return };
        let stale = |netmap: &Netmap, c: &Client| {
            netmap.relays.get(&c.relay.id).is_none_or(|r| has_moved(&c.relay, r))
        };
        let gone: Vec<RelayId> =
            self.relays.clients.iter().filter(|(_, c)| stale(netmap, c)).map(|(id, _)| *id).collect();
        for id in gone {
            self.leave_relay(now, id);
            if [self.relays.home, self.relays.chosen].contains(&Some(id)) {
                self.want_relay(now, id); // moved, not gone
            }
        }
        if peers_changed {
            self.relays.clients.keys().for_each(|id| self.ask_token(*id));
        }
    }

    /// Leaves relays that nobody used for a while.
    pub(super) fn leave_idle_relays(&mut self, now: Now) {
        let Relays { chosen, home, .. } = self.relays;
        let needed = |id: RelayId| Some(id) == home || Some(id) == chosen;
        let idle = |id: &RelayId, c: &Client| !needed(*id) && now.boot.since(c.used) >= LEAVE_AFTER;
        let ids: Vec<RelayId> =
            self.relays.clients.iter().filter(|(id, c)| idle(id, c)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.leave_relay(now, id));
    }

    fn leave_relay(&mut self, now: Now, id: RelayId) {
        self.relays.clients.remove(&id);
        self.keep.forget_token(now.boot, id);
        if let Some(engine) = &mut self.engine {
            engine.handle_relay_left(now, id);
        }
    }

    /// There is a session with the coordinator again. If it was restarted, so was its embedded relay; and tokens that
    /// were asked for meanwhile will not come, of connected relays neither.
    pub(super) fn look_after_relays(&self) {
        self.relays.network_changed();
        self.relays.clients.keys().for_each(|id| self.ask_token(*id));
    }

    pub(super) fn on_relay_token(&mut self, now: Now, grant: RelayTokenGrant) {
        let Some(relay) = RelayId::from_slice(&grant.relay) else { return };
        if let (Some(client), Some(token)) = (self.relays.clients.get(&relay), grant.token) {
            client.client.provide_token(token.clone());
            self.keep.token(now.boot, relay, token);
        }
    }

    fn ask_token(&self, relay: RelayId) {
        self.control.send(ClientBody::RelayToken(RelayTokenRequest { relay: relay.to_bytes().to_vec() }));
    }

    fn on_relay_event(&mut self, now: Now, event: RelayEvent, plane: &mut DataPlane) {
        let RelayEvent { relay, kind } = event;
        // What a client said before it was dropped means nothing any more.
        let (Some(client), Some(engine)) = (self.relays.clients.get_mut(&relay), &mut self.engine) else {
            return;
        };
        match kind {
            RelayEventKind::Received { src, payload } => {
                client.used = now.boot;
                let from = Source::Relay { relay, device: src };
                let tun = self.tun.as_ref();
                let mut open = |bytes: &mut [u8]| plane.from_elsewhere(now, from, bytes, engine, tun);
                match Bytes::try_into_mut(payload) {
                    Ok(mut bytes) => open(&mut bytes),
                    Err(shared) => open(&mut shared.to_vec()),
                }
            }
            RelayEventKind::Connected { transport, addr } => {
                tracing::info!(%relay, ?transport, "relay connected");
                tracing::debug!(%relay, %addr, "relay address");
                engine.handle_relay_state(now, relay, true);
                self.relays.trouble = None;
            }
            RelayEventKind::Moved { transport } => {
                tracing::info!(%relay, ?transport, "relay packets take another transport");
            }
            RelayEventKind::Disconnected { why, refused, problem, dropped } => {
                self.relays.drops.not_connected += dropped as u64;
                tracing::info!(%relay, ?refused, "relay disconnected: {why}");
                engine.handle_relay_state(now, relay, false);
                if !client.relay.peer {
                    self.relays.trouble = Some((why, problem));
                }
            }
            RelayEventKind::NeedToken => self.ask_token(relay),
            RelayEventKind::PeerGone { device, why } => {
                tracing::debug!(%relay, %device, ?why, "a peer is not there");
                engine.handle_gone_from_relay(now, relay, device);
            }
            RelayEventKind::Doubt { doubt } => {
                tracing::debug!(%relay, doubt, "does the relay answer?");
                engine.handle_relay_doubt(now, relay, doubt);
            }
            RelayEventKind::Draining { after } => {
                tracing::info!(%relay, ?after, "the relay is about to close");
                engine.handle_relay_draining(now, relay);
            }
        }
    }
}

/// True if a connection to the relay can't be the same any more. Its name and its STUN service are no part of one.
fn has_moved(then: &Relay, now: &Relay) -> bool {
    (&then.addrs, then.cert_sha256) != (&now.addrs, now.cert_sha256)
}

impl Daemon {
    pub(super) fn on_relay(&mut self, now: Now, first: RelayEvent) {
        let Self { up: Some(up), plane, .. } = self else { return };
        up.on_relay_event(now, first, plane);
        for _ in 1..BUDGET {
            let Ok(event) = up.relays.events.try_recv() else { return };
            up.on_relay_event(now, event, plane);
        }
    }
}

#[cfg(test)]
mod tests {
    use warren_common::keys::ProbeSecretKey;

    use super::*;

    #[test]
    fn a_relay_that_is_renamed_or_gets_another_stun_service_keeps_its_connections() {
        let then = Relay {
            id: RelayId::from_bytes([2; 16]),
            name: "r".into(),
            addrs: vec!["192.0.2.1:3340".parse().unwrap()],
            stun: vec![],
            cert_sha256: [1; 32],
            peer: false,
        };
        let stun = vec!["192.0.2.1:3478".parse().unwrap()];
        assert!(!has_moved(&then, &Relay { name: "s".into(), stun, ..then.clone() }));
        assert!(has_moved(&then, &Relay { addrs: vec![], ..then.clone() }));
        assert!(has_moved(&then, &Relay { cert_sha256: [2; 32], ..then.clone() }));
    }

    #[tokio::test]
    async fn packets_that_find_no_connection_are_counted() {
        let mut relays = Relays::default();
        let (relay, device) = (RelayId::from_bytes([2; 16]), DeviceId::from_bytes([4; 16]));
        relays.send(Now::default(), relay, device, &[0; 10]);
        let config = RelayClientConfig {
            relay: Relay {
                id: relay,
                name: "r".into(),
                addrs: vec![],
                stun: vec![],
                cert_sha256: [0; 32],
                peer: false,
            },
            network: warren_common::ids::NetworkId::from_bytes([1; 16]),
            probe: ProbeSecretKey::from_bytes([3; 32]),
            egress: std::sync::Arc::default(),
            own: vec![],
            rest_after: REST_AFTER,
        };
        let client = RelayClient::spawn(config.clone(), relays.sender.clone());
        relays.clients.insert(relay, Client { relay: config.relay, client, used: Instant::ZERO });
        relays.send(Now::default(), relay, device, &[0; 10]);
        assert_eq!(relays.drops(), RelayDrops { queue_full: 0, not_connected: 2 });
    }
}
