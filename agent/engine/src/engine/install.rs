//! From a netmap to what enforces it. What restricts goes first: rules (and so flows), then peers that are gone, then
//! peers that are new.

use std::collections::BTreeSet;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use warren_common::ids::DeviceId;
use warren_common::netmap::{MAX_PEERS, Netmap, Peer};
use warren_common::time::Now;

use super::{Engine, PeerState};
use crate::event::Event;
use crate::filter::EndReason;
use crate::home::View;
use crate::netmap::Held;
use crate::paths::PeerIdx;
use crate::routes::{Owner, Routes};

impl Engine {
    /// Puts a netmap in force, if its lease isn't over.
    pub(super) fn install(&mut self, now: Now, held: Held) {
        if held.lease_ends <= now.boot {
            self.held = Some(held);
            self.end_lease(now);
            return;
        }
        let netmap = &held.netmap;
        self.install_rules(now, netmap, (held.epoch, held.revision));
        self.remove_peers(now, |id, state, engine| {
            netmap.peers.get(&id).is_none_or(|peer| !engine.is_same(peer, state))
        });
        self.paths.set_overlay(now.boot, netmap.network.ipv4, netmap.network.ipv6);
        self.add_peers(now, netmap);
        self.own.clone_from(&netmap.device.addrs);
        self.routes = self.routes_of(netmap);
        // A device that relays may be asleep tomorrow: it is a way to peers, never a home.
        self.relays = netmap.relays.values().filter(|r| !r.peer).map(|r| r.id).collect();
        let peer_relays = netmap.relays.values().filter(|r| r.peer).map(|r| r.id);
        self.paths.set_peer_relays(now.boot, peer_relays);
        let servers = netmap.relays.values().flat_map(|r| r.stun.iter().map(|addr| (r.id, *addr)));
        let new_servers = self.stun.set_servers(servers);
        let stay: BTreeSet<DeviceId> =
            self.online.iter().filter(|id| netmap.peers.contains_key(id)).copied().collect();
        self.online = stay;
        self.held = Some(held);
        if new_servers {
            self.start_stun(now);
        }
        self.choose_home(now, false);
        self.resend_handshakes(now);
    }

    /// Withdraws everything granted; the netmap stays, so that a renewal is all it takes.
    pub(super) fn end_lease(&mut self, now: Now) {
        self.enforced = None;
        self.rules = Default::default();
        let ended = self.filter.close_all(EndReason::LeaseEnded, now);
        self.on_ended(ended);
        self.remove_peers(now, |_, _, _| true);
        self.routes = Routes::default();
        self.push_event(Event::LeaseEnded);
    }

    /// A renewed lease, or another change that leaves the rules alone, costs the flow table nothing.
    fn install_rules(&mut self, now: Now, netmap: &Netmap, revision: (u64, u64)) {
        let same = self.enforced.is_some() && self.rules.0 == netmap.ingress && self.rules.1 == netmap.egress;
        self.enforced = Some(revision);
        if same {
            return;
        }
        self.rules = (netmap.ingress.clone(), netmap.egress.clone());
        let rules = |set: &BTreeSet<_>| set.iter().cloned().collect();
        let ended = self.filter.set_rules(rules(&netmap.ingress), rules(&netmap.egress), revision.1, now);
        self.on_ended(ended);
    }

    fn remove_peers(&mut self, now: Now, gone: impl Fn(DeviceId, &PeerState, &Self) -> bool) {
        for at in 0..self.peers.len() {
            let Some(state) = &self.peers[at] else { continue };
            if !gone(state.id, state, self) {
                continue;
            }
            let (handle, idx) = (state.handle, state.handle.slot());
            let ended = self.filter.remove_peer(idx, now);
            self.on_ended(ended);
            self.wg.remove_peer(handle);
            self.paths.remove(idx);
            self.peer_packets.retain(|(peer, _)| *peer != idx);
            self.peers[at] = None;
        }
    }

    /// True if the peer is the one we have, by its keys.
    fn is_same(&self, peer: &Peer, state: &PeerState) -> bool {
        self.wg.peer_key(state.handle) == Some(peer.wg)
            && self.paths.probe_key(state.handle.slot()) == Some(peer.probe)
    }

    fn add_peers(&mut self, now: Now, netmap: &Netmap) {
        for peer in netmap.peers.values() {
            if let Some(idx) = self.paths.find(peer.id) {
                self.paths.set_home_relay(now.boot, idx, peer.home_relay);
                continue;
            }
            // The coordinator signed it, but a key that protects nothing is refused all the same: no such peer then.
            let Ok(handle) = self.wg.add_peer(peer.wg, None, None) else {
                self.drops.bad_peers += 1;
                continue;
            };
            let at = handle.slot() as usize;
            debug_assert!(at < MAX_PEERS, "slots are dense");
            if self.peers.len() <= at {
                self.peers.resize_with(at + 1, || None);
            }
            self.peers[at] = Some(PeerState { id: peer.id, handle, rx_bytes: 0, tx_bytes: 0 });
            self.paths.insert(handle.slot(), peer.id, peer.probe, peer.home_relay);
        }
    }

    fn routes_of(&self, netmap: &Netmap) -> Routes {
        let known = || netmap.peers.values().filter_map(|peer| Some((self.paths.find(peer.id)?, peer)));
        let addrs = known().flat_map(|(idx, peer)| {
            peer.addrs.iter().map(move |addr| (IpNet::from(*addr), owner(idx, true)))
        });
        let subnets = known()
            .flat_map(|(idx, peer)| peer.routes.iter().map(move |net| (net.trunc(), owner(idx, false))));
        Routes::new(addrs.chain(subnets))
    }

    pub(super) fn overlay(&self) -> Option<(Ipv4Net, Ipv6Net)> {
        self.held.as_ref().map(|held| (held.netmap.network.ipv4, held.netmap.network.ipv6))
    }

    /// Chooses the relay to listen on; `settled`: no more STUN answers are to come.
    pub(super) fn choose_home(&mut self, now: Now, settled: bool) {
        let view = View {
            relays: &self.relays,
            rtt: &|relay| self.stun.rtt(relay),
            connected: &|relay| self.paths.relay_connected(relay),
            settled,
        };
        let moved = self.home.choose(now.boot, &view);
        self.paths.set_known_relays(&self.relays, self.home.current());
        if moved {
            self.push_event(Event::HomeRelay { relay: self.home.current() });
        }
        self.announce_home();
    }

    /// Has the coordinator, and so peers, told where we are, when that is true.
    pub(super) fn announce_home(&mut self) {
        if let Some(relay) = self.home.announce(|relay| self.paths.relay_connected(relay)) {
            self.push_event(Event::HomeAnnounced { relay });
        }
    }
}

const fn owner(peer: PeerIdx, exact: bool) -> Owner {
    Owner { peer, exact }
}
