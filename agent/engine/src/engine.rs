//! The engine: netmap, WireGuard, paths and filter as one state machine.
//!
//! Call order: one input (`handle_*`, [`Engine::apply_update`], [`Engine::start_ping`]), then drain every output
//! ([`Engine::poll_transmit`] until it returns false, [`Engine::poll_tun`] likewise, [`Engine::poll_event`] until
//! `None`), then sleep until [`Engine::poll_timeout`] and call [`Engine::handle_timeout`]. The data path
//! ([`Engine::handle_tun`], [`Engine::handle_datagram`]) writes straight into caller-owned buffers and allocates nothing
//! once warm.
//!
//! Without a netmap, and when its lease is over, nothing passes: no packet, no handshake, no probe.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use warren_common::filter::FilterRule;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::keys::{ProbeSecretKey, WgSecretKey};
use warren_common::netmap::{MAX_PEERS, Netmap};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::Signed;
use zeroize::Zeroize as _;

use crate::event::{Event, PingToken, WakeReason};
use crate::filter::{EndedFlow, Filter};
use crate::home::Home;
use crate::io::{LocalSocket, Outbox, TunOut};
use crate::netmap::{self, Held, Identity, PendingUpdate, RestoreError, SavedNetmap, UpdateRefused};
use crate::paths::{MAX_HINTS, PathHint, Paths, PeerIdx, Rate};
use crate::relay_link;
use crate::routes::Routes;
use crate::stun::Stun;
use crate::stun::lifetime::{Lifetime, SILENT_SOCKET};
use crate::wg;

mod data;
mod frame;
mod install;
mod jobs;
mod query;

pub use jobs::{OpenJob, SEND_AT, SealJob};

/// Events waiting for [`Engine::poll_event`]; the oldest goes first.
pub const MAX_EVENTS: usize = 8_192;
/// Notices to local applications waiting for [`Engine::poll_tun`]: one for each flow of a full table is too much to
/// deliver at once; the others are reset when they send next.
pub const MAX_NOTICES: usize = 16_384;
/// Age at which what STUN said is asked again before it is relied on: common NATs forget after 30 s.
const STUN_FRESH: Duration = Duration::from_secs(25);
/// How much later than asked for a wake-up may come before the machine must have slept: a busy one is late by less.
const JUMP: Duration = Duration::from_secs(5);

/// What an engine is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who we are.
    pub identity: Identity,
    /// Our WireGuard secret.
    pub wg: WgSecretKey,
    /// Our probe secret.
    pub probe: ProbeSecretKey,
    /// Feeds every generator inside: from the OS in the product, from its own seed in a simulator.
    pub seed: [u8; 32],
    /// Names this boot of the machine (Linux: `/proc/sys/kernel/random/boot_id`), for the lease.
    pub boot_id: [u8; 16],
    /// The TUN's MTU, in bytes: packets are padded up to it, none is longer.
    pub mtu: u16,
    /// [`Engine::handshake_floor`] as saved before the restart: keeps handshakes acceptable to peers even if the wall
    /// clock went back. Zero if nothing was saved.
    pub handshake_floor: UnixTime,
}

/// See the module.
pub struct Engine {
    identity: Identity,
    boot_id: [u8; 16],
    mtu: usize,
    /// Senders told that their packets are too long.
    too_big: Rate,
    rng: ChaCha20Rng,
    held: Option<Held>,
    /// The revision whose rules the filter enforces; `None` while it is closed.
    enforced: Option<(u64, u64)>,
    rules: (BTreeSet<FilterRule>, BTreeSet<FilterRule>),
    peers: Vec<Option<PeerState>>,
    own: Vec<IpAddr>,
    routes: Routes,
    wg: wg::Device,
    filter: Filter,
    paths: Paths,
    stun: Stun,
    lifetime: Lifetime,
    /// How often the shell was told to ping relays.
    relay_keepalive: Duration,
    /// Extra sockets that paths want, and those that the shell was told of.
    path_sockets: Vec<u8>,
    told_sockets: Vec<u8>,
    /// When the shell was asked to wake us.
    promised: Option<Instant>,
    /// The relays of the netmap that may be home.
    relays: Vec<RelayId>,
    home: Home,
    online: BTreeSet<DeviceId>,
    events: VecDeque<Event>,
    notices: VecDeque<Vec<u8>>,
    /// Packets the filter made for peers.
    peer_packets: VecDeque<(PeerIdx, Vec<u8>)>,
    next_ping: u64,
    wakes: [u64; WakeReason::ALL.len()],
    drops: data::Drops,
    busy: jobs::Busy,
}

/// A peer that WireGuard and paths know.
struct PeerState {
    id: DeviceId,
    handle: wg::PeerHandle,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("device", &self.identity.device).finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine without a netmap: it denies everything.
    pub fn new(mut config: Config) -> Self {
        let mut rng = ChaCha20Rng::from_seed(config.seed);
        config.seed.zeroize();
        let mut seed = || {
            let mut seed = [0; 32];
            rng.fill_bytes(&mut seed);
            seed
        };
        let (wg_seed, paths_seed) = (seed(), seed());
        let mut wg = wg::Device::new(config.wg, wg_seed, 0);
        wg.set_mtu(usize::from(config.mtu));
        wg.raise_timestamp_floor(config.handshake_floor);
        let filter = Filter::new([rng.next_u64(), rng.next_u64()]);
        Self {
            identity: config.identity,
            boot_id: config.boot_id,
            mtu: usize::from(config.mtu),
            too_big: Rate::default(),
            rng,
            held: None,
            enforced: None,
            rules: Default::default(),
            peers: Vec::new(),
            own: Vec::new(),
            routes: Routes::default(),
            wg,
            filter,
            paths: Paths::new(config.probe, paths_seed, usize::from(config.mtu)),
            stun: Stun::default(),
            lifetime: Lifetime::default(),
            relay_keepalive: relay_link::KEEPALIVE,
            path_sockets: Vec::new(),
            told_sockets: Vec::new(),
            promised: None,
            relays: Vec::new(),
            home: Home::default(),
            online: BTreeSet::new(),
            events: VecDeque::new(),
            notices: VecDeque::new(),
            peer_packets: VecDeque::new(),
            next_ping: 0,
            wakes: [0; WakeReason::ALL.len()],
            drops: data::Drops::default(),
            busy: jobs::Busy::default(),
        }
    }

    // Netmap.

    /// Puts the netmap from before a restart in force, with what is left of its lease.
    ///
    /// # Errors
    /// The file is damaged, too new, or of another network or device; the engine is unchanged then.
    pub fn restore(&mut self, now: Now, saved: &SavedNetmap) -> Result<(), RestoreError> {
        let held = Held::restore(saved, &self.identity, now, self.boot_id)?;
        self.install(now, held);
        Ok(())
    }

    /// Judges a netmap update. An accepted one is not in force yet: persist [`PendingUpdate::to_saved`] first, then
    /// [`Engine::apply_update`].
    ///
    /// # Errors
    /// Why it is refused; what is held stays in force.
    pub fn check_update(&self, now: Now, update: &Signed) -> Result<PendingUpdate, UpdateRefused> {
        netmap::check(&self.identity, self.held.as_ref(), self.boot_id, now, update)
    }

    /// Puts what a checked update takes away in force, before it is saved: a slow or full disk must not keep open what
    /// was revoked. What it adds waits for [`Self::apply_update`], and so does its revision: after a crash in between
    /// the older netmap is held again until the coordinator is reached, as it would be without this.
    pub fn restrict(&mut self, now: Now, update: &PendingUpdate) {
        let Some(held) = &self.held else { return };
        let netmap = Netmap::without_removed(&held.netmap, update.netmap());
        if netmap != held.netmap {
            let restricted = Held { hash: netmap.hash(), netmap, ..held.clone() };
            self.install(now, restricted);
        }
    }

    /// Puts a checked update in force: flows that it no longer allows end first, then peers come and go. One that was
    /// checked before another was applied is ignored; false then.
    pub fn apply_update(&mut self, now: Now, update: PendingUpdate) -> bool {
        let newest = self
            .held
            .as_ref()
            .is_none_or(|held| (held.epoch, held.revision) <= (update.epoch(), update.revision()));
        if newest {
            self.install(now, update.held);
        }
        newest
    }

    /// What is held, with the lease as it is now: to be saved now and then (every few minutes, and at exit), so that
    /// time that passes while the clock is wrong counts.
    pub fn to_saved(&self, now: Now) -> Option<SavedNetmap> {
        self.held.as_ref().map(|held| held.to_saved(now, self.boot_id))
    }

    /// Where peers in use are reached now: to be saved now and then, and given to [`Engine::resume`] after a restart.
    pub fn path_hints(&self) -> Vec<PathHint> {
        self.paths.hints()
    }

    /// After a restart, with the netmap restored and the interfaces told: takes up with the peers that were in use, where
    /// they were reached, without waiting for a packet. So traffic goes on, also without relay or coordinator. What is too
    /// much, or about nobody in the netmap, is ignored.
    pub fn resume(&mut self, now: Now, hints: &[PathHint]) {
        for hint in hints.iter().take(MAX_HINTS) {
            let Some(idx) = self.paths.find(hint.device) else { continue };
            self.paths.resume(now.boot, idx, &hint.endpoints);
            if let Some(state) = self.peers.get(idx as usize).and_then(Option::as_ref) {
                self.wg.initiate(state.handle, now);
            }
        }
        self.resend_handshakes(now);
    }

    /// What a session with the coordinator starts from: epoch, revision and hash of the netmap held.
    pub fn held(&self) -> Option<(u64, u64, [u8; 32])> {
        self.held.as_ref().map(|h| (h.epoch, h.revision, h.hash))
    }

    /// The netmap held, in force or not.
    pub fn netmap(&self) -> Option<&Netmap> {
        self.held.as_ref().map(|h| &h.netmap)
    }

    /// A time after every time stamp in handshakes so far: save it with the keys (see [`Config::handshake_floor`]).
    pub fn handshake_floor(&self) -> UnixTime {
        self.wg.timestamp_floor()
    }

    /// The root key vouches for a later epoch: the coordinator was restored, and numbers its netmaps anew. What is held
    /// stays in force until the first of them. Never goes back.
    pub fn trust_epoch(&mut self, epoch: u64) {
        self.identity.epoch = self.identity.epoch.max(epoch);
    }

    // The world around.

    /// Our sockets and the addresses they can be reached at: after start, and after each network change. Nothing
    /// happens if they are the same as before.
    pub fn handle_interfaces(&mut self, now: Now, local: &[LocalSocket]) {
        if self.paths.set_local(now.boot, local) {
            self.stun.forget();
            self.start_stun(now);
            self.forget_lifetime();
        }
    }

    /// Which extra sockets are open now, after [`Event::SocketsWanted`].
    pub fn handle_extra_sockets(&mut self, now: Now, open: &[u8]) {
        self.lifetime.set_socket(now.boot, open.contains(&SILENT_SOCKET));
        self.paths.set_extra(now.boot, open);
    }

    /// Asks STUN anew, though nothing seems to have changed; [`Engine::net_status`] with the answers then.
    pub fn refresh_net(&mut self, now: Now) {
        self.start_stun(now);
    }

    /// The NAT in front of us forwards this address of its own to us, or none any more. A network change takes it back.
    pub fn handle_port_mapping(&mut self, now: Now, external: Option<SocketAddr>) {
        self.paths.set_mapped(now.boot, external);
    }

    /// Somebody who knows the network says that these addresses, [`MAX_STATIC`](crate::paths::MAX_STATIC) at most, lead to us:
    /// peers are told, in every network. What can be no endpoint ([`is_endpoint`](warren_common::endpoint::is_endpoint)) is
    /// left out.
    pub fn handle_static_endpoints(&mut self, now: Now, endpoints: &[SocketAddr]) {
        self.paths.set_static(now.boot, endpoints);
    }

    /// A relay connection came up, or went down.
    pub fn handle_relay_state(&mut self, now: Now, relay: RelayId, connected: bool) {
        let news = self.paths.set_relay(now.boot, relay, connected);
        if connected {
            self.home.on_connected(relay);
        } else {
            self.home.on_failed(now.boot, relay, &self.relays);
            let left = self.home.current() == Some(relay);
            self.choose_home(now, !self.stun.is_asking());
            if news && left {
                self.start_stun(now); // which one is nearest now?
            }
        }
        self.announce_home();
        self.resend_handshakes(now);
    }

    /// The shell gave up a relay that nobody used, or that has changed and is connected to anew: it has not failed.
    pub fn handle_relay_left(&mut self, now: Now, relay: RelayId) {
        self.paths.leave_relay(now.boot, relay);
        self.announce_home();
        self.resend_handshakes(now);
    }

    /// A connected relay has not answered for longer than it should, or answers again
    /// ([`Liveness::doubt_news`](crate::relay_link::Liveness::doubt_news)); or its connection is about to be replaced by another,
    /// or has been. Until it is clear what that means, the connection and the home stay, and packets take another relay if the
    /// peer is known to listen there.
    pub fn handle_relay_doubt(&mut self, now: Now, relay: RelayId, doubt: bool) {
        self.paths.set_relay_silent(now.boot, relay, doubt);
        self.resend_handshakes(now);
    }

    /// A relay says that a packet for `device` went nowhere: it is not connected there, or our token does not name it. Advisory:
    /// packets take another relay, if there is one.
    pub fn handle_gone_from_relay(&mut self, now: Now, relay: RelayId, device: DeviceId) {
        if let Some(idx) = self.paths.find(device) {
            self.paths.on_gone_from_relay(now.boot, idx, relay);
            self.resend_handshakes(now);
        }
    }

    /// A relay says that it will close: packets still flow through it, but others had better be used, and be home.
    pub fn handle_relay_draining(&mut self, now: Now, relay: RelayId) {
        self.paths.set_relay_draining(now.boot, relay);
        self.home.on_failed(now.boot, relay, &self.relays);
        self.choose_home(now, !self.stun.is_asking());
        self.resend_handshakes(now);
    }

    /// The control session came up, or went down: whether [`Event::Signal`] gets anywhere.
    pub fn handle_control_state(&mut self, now: Now, connected: bool) {
        self.paths.set_signal(now.boot, connected);
        if !connected {
            self.online.clear();
        }
    }

    /// Which peers are connected to the coordinator. Advisory: it grants nothing and is only shown.
    pub fn handle_presence(&mut self, online: &[DeviceId], offline: &[DeviceId]) {
        for id in offline {
            self.online.remove(id);
        }
        // Also peers whose netmap is still under way; those that never come are dropped with the next one.
        let room = MAX_PEERS.saturating_sub(self.online.len());
        self.drops.presence += online.len().saturating_sub(room) as u64;
        self.online.extend(online.iter().take(room));
    }

    /// Measures the round-trip time to a peer over the path in use by one authenticated probe; the answer is an
    /// [`Event::PingResult`]. Makes the peer active, so that a path is looked for. `None` if there is no such peer, or
    /// nothing is granted now.
    pub fn start_ping(&mut self, now: Now, device: DeviceId) -> Option<PingToken> {
        self.end_lease_if_over(now);
        let idx = self.paths.find(device)?;
        self.next_ping += 1;
        let token = PingToken(self.next_ping);
        self.before_use(now, idx);
        self.paths.ping(now.boot, idx, token);
        Some(token)
    }

    // Time.

    /// When to call [`Engine::handle_timeout`], and why.
    pub fn poll_timeout(&mut self, now: Now) -> Option<(Instant, WakeReason)> {
        let lease = self.enforced.and(self.held.as_ref()).map(|held| held.lease_ends);
        let stun = [self.stun.poll_timeout(), self.lifetime.poll_timeout(), self.home.poll_timeout()];
        let stun = stun.into_iter().flatten().min();
        let all = [
            (self.wg.poll_timeout().map(|(at, _)| at), WakeReason::WireGuard),
            (self.paths.poll_timeout(), WakeReason::Path),
            (stun, WakeReason::Stun),
            (self.filter.poll_timeout(now), WakeReason::Filter),
            (lease, WakeReason::Lease),
        ];
        let next = all.into_iter().filter_map(|(at, reason)| Some((at?, reason))).min();
        self.promised = next.map(|(at, _)| at);
        next
    }

    /// The shell woke up, for whatever reason, and had asked to be woken by `deadline` at the latest: if that is long past, the
    /// machine slept. To be told at each turn: the timers of an idle engine are hours apart, those of its shell a minute.
    pub fn handle_wake(&mut self, now: Now, deadline: Instant) {
        if now.boot.since(deadline) >= JUMP {
            self.on_jump(now);
        }
    }

    /// Every input that comes with the time: if it comes far too late, the machine slept.
    fn notice_jump(&mut self, now: Now) {
        if self.promised.is_some_and(|at| now.boot.since(at) >= JUMP) {
            self.on_jump(now);
        }
    }

    /// The machine slept, and may be anywhere.
    fn on_jump(&mut self, now: Now) {
        self.promised = None;
        self.paths.on_jump(now.boot);
        self.start_stun(now);
        self.forget_lifetime();
    }

    fn forget_lifetime(&mut self) {
        self.lifetime.forget();
        self.follow_lifetime();
    }

    /// Keeps open by what is known of the NAT.
    fn follow_lifetime(&mut self) {
        let measured = self.lifetime.keepalive();
        self.paths.set_keepalive(measured, self.lifetime.survived());
        let pause = measured.map_or(relay_link::KEEPALIVE, |pause| pause.min(relay_link::KEEPALIVE));
        if std::mem::replace(&mut self.relay_keepalive, pause) != pause {
            self.push_event(Event::RelayKeepalive { pause });
        }
    }

    /// Finds out how long the NAT remembers, once there is a way for which it matters.
    fn look_after_lifetime(&mut self, now: Now) {
        self.lifetime.handle_timeout(now.boot);
        self.follow_lifetime();
        let at_home = self.home.current().is_some_and(|home| self.paths.relay_connected(home));
        if self.lifetime.is_due()
            && let Some(server) = self.stun.server(true)
            && (self.paths.take_keepalive_wish() || at_home)
        {
            self.lifetime.start(now.boot, server);
        }
    }

    /// Does everything that is due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.notice_jump(now);
        if let Some((at, reason)) = self.poll_timeout(now)
            && at <= now.boot
        {
            self.wakes[reason as usize] += 1;
        }
        self.end_lease_if_over(now);
        self.wg.handle_timeout(now);
        self.paths.handle_timeout(now.boot);
        if self.paths.take_urgent_stun_wish() {
            self.start_stun(now);
        } else if self.paths.take_stun_wish() {
            self.refresh_stun(now);
        }
        if self.stun.handle_timeout(now.boot) {
            self.on_stun_news(now);
        }
        self.look_after_lifetime(now);
        let (choose, measure) = self.home.handle_timeout(now.boot);
        if choose {
            self.choose_home(now, true);
        }
        if measure {
            self.start_stun(now);
        }
        let ended = self.filter.handle_timeout(now);
        self.on_ended(ended);
        self.resend_handshakes(now);
    }

    // Outputs.

    /// Moves what is to be sent to `out`. True if there is more: drain `out` and call again.
    pub fn poll_transmit(&mut self, now: Now, out: &mut Outbox) -> bool {
        !(self.transmit_probes(now, out) && self.transmit_wireguard(now, out))
    }

    /// Moves resets and ICMP errors for local applications to `tun`. True if there is more: drain `tun` and call again.
    pub fn poll_tun(&mut self, tun: &mut TunOut) -> bool {
        self.take_filter_output();
        while let Some(packet) = self.notices.front() {
            if !tun.push(packet) {
                return true;
            }
            self.notices.pop_front();
        }
        false
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        while let Some(event) = self.wg.poll_event() {
            let (wg::Event::SessionEstablished { peer, .. }
            | wg::Event::SessionExpired { peer }
            | wg::Event::HandshakeFailed { peer }) = event;
            if let (wg::Event::SessionEstablished { .. }, Some(state)) = (event, self.peer_state(peer)) {
                let device = state.id;
                self.push_event(Event::SessionEstablished { device });
            }
        }
        self.ask_for_sockets();
        while let Some(event) = self.paths.poll_event() {
            self.push_event(event);
        }
        while let Some(about) = self.filter.poll_disagreement() {
            let device = self.peers.get(about.peer as usize).and_then(Option::as_ref).map(|p| p.id);
            if let Some(device) = device {
                self.push_event(Event::Disagreement { device, about });
            }
        }
        self.events.pop_front()
    }

    // Inside.

    fn ask_for_sockets(&mut self) {
        if let Some(wanted) = self.paths.take_sockets_wish() {
            self.path_sockets = wanted;
        }
        let silent = self.lifetime.wants_socket().then_some(SILENT_SOCKET);
        let wanted = || silent.iter().chain(&self.path_sockets);
        if !wanted().eq(&self.told_sockets) {
            self.told_sockets = wanted().copied().collect();
            self.push_event(Event::SocketsWanted { ids: self.told_sockets.clone() });
        }
    }

    fn push_event(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
            self.drops.events += 1;
        }
        self.events.push_back(event);
    }

    /// Tells the local applications of ended flows, and the shell.
    fn on_ended(&mut self, ended: Vec<EndedFlow>) {
        for flow in ended {
            if let Some(notice) = flow.notice() {
                self.push_notice(notice);
            }
            let device = self.peers.get(flow.flow.peer as usize).and_then(Option::as_ref).map(|p| p.id);
            self.push_event(Event::FlowEnded { device, rule: flow.flow.rule });
        }
    }

    fn push_notice(&mut self, packet: Vec<u8>) {
        if self.notices.len() >= MAX_NOTICES {
            self.drops.notices += 1;
        } else {
            self.notices.push_back(packet);
        }
    }

    /// The lease is checked against each packet's time, so that a late timer grants nothing.
    fn end_lease_if_over(&mut self, now: Now) {
        if self.enforced.is_some() && self.held.as_ref().is_some_and(|h| h.lease_ends <= now.boot) {
            self.end_lease(now);
        }
    }

    fn start_stun(&mut self, now: Now) {
        self.stun.start(now.boot, self.paths.local());
    }

    /// What STUN said may be stale by the time it is needed for a peer that was idle.
    fn before_use(&mut self, now: Now, idx: PeerIdx) {
        if !self.paths.is_active(idx) {
            self.refresh_stun(now);
        }
    }

    fn refresh_stun(&mut self, now: Now) {
        if self.stun.last_round().is_none_or(|at| now.boot.since(at) >= STUN_FRESH) {
            self.start_stun(now);
        }
    }

    fn on_stun_news(&mut self, now: Now) {
        // When asked again, answers trickle in: what is known stands until all are there, or each of them would be
        // announced to every peer.
        if !self.stun.is_asking() || !self.paths.knows_reflexive() {
            let ports = self.stun.port_use(self.paths.local());
            self.paths.set_reflexive(now.boot, self.stun.mapped(), ports);
        }
        self.choose_home(now, !self.stun.is_asking());
    }

    /// A peer that can be reached now, or better than before, gets a handshake under way once more.
    fn resend_handshakes(&mut self, now: Now) {
        while let Some(idx) = self.paths.poll_ready() {
            if let Some(state) = self.peers.get(idx as usize).and_then(Option::as_ref) {
                self.wg.resend_handshake(state.handle, now);
            }
        }
    }

    fn peer_state(&self, handle: wg::PeerHandle) -> Option<&PeerState> {
        self.peers.get(handle.slot() as usize)?.as_ref().filter(|state| state.handle == handle)
    }
}

#[cfg(test)]
mod tests {
    use warren_common::ids::NetworkId;
    use warren_common::keys::{ControlSecretKey, NetmapSecretKey};

    use super::*;

    fn engine() -> Engine {
        Engine::new(Config {
            identity: Identity {
                network: NetworkId::from_bytes([1; 16]),
                device: DeviceId::from_bytes([1; 16]),
                control: ControlSecretKey::from_bytes([1; 32]).public(),
                netmap_key: NetmapSecretKey::from_bytes([1; 32]).public(),
                epoch: 0,
            },
            wg: WgSecretKey::from_bytes([1; 32]),
            probe: ProbeSecretKey::from_bytes([1; 32]),
            seed: [1; 32],
            boot_id: [1; 16],
            mtu: 1_280,
            handshake_floor: UnixTime::default(),
        })
    }

    #[test]
    fn what_nobody_fetches_is_bounded_and_counted() {
        let mut engine = engine();
        for n in 0..MAX_NOTICES + 3 {
            engine.push_notice(vec![n as u8]);
        }
        for n in 0..MAX_EVENTS as u64 + 4 {
            engine.push_event(Event::PingResult {
                token: PingToken(n),
                path: crate::event::Path::None,
                rtt: None,
            });
        }
        let drops = engine.status(Now::default()).drops;
        assert_eq!((drops["notices-full"], drops["events-full"]), (3, 4));
        assert_eq!(engine.notices.len(), MAX_NOTICES);
        // The oldest events went.
        assert!(matches!(engine.poll_event(), Some(Event::PingResult { token: PingToken(4), .. })));
        assert_eq!(std::iter::from_fn(|| engine.poll_event()).count(), MAX_EVENTS - 1);
    }

    /// The events that tell of a sleep.
    fn suspected(engine: &mut Engine) -> usize {
        std::iter::from_fn(|| engine.poll_event()).filter(|e| *e == Event::NetworkSuspect).count()
    }

    #[test]
    fn a_sleep_of_an_idle_device_is_noticed_by_the_timer_of_its_shell() {
        let (mut engine, start) = (engine(), Now::default());
        let minute = Duration::from_secs(60);
        // It wakes up when it should, a little late, or early since something happened.
        let mut now = start;
        for late in [Duration::ZERO, JUMP - Duration::from_nanos(1)] {
            let deadline = now.boot + minute;
            for at in [deadline + late, now.boot + minute / 2] {
                engine.handle_wake(Now { boot: at, ..now }, deadline);
                engine.handle_timeout(Now { boot: at, ..now });
                assert_eq!(suspected(&mut engine), 0);
            }
            now.boot = deadline + late;
        }
        let deadline = now.boot + minute;
        now.boot = deadline + JUMP;
        engine.handle_wake(now, deadline);
        engine.handle_timeout(now);
        assert_eq!(suspected(&mut engine), 1);
    }

    #[test]
    fn presence_is_bounded_and_counted() {
        let mut engine = engine();
        let id = |n: usize| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(n as u64).to_be_bytes());
            DeviceId::from_bytes(id)
        };
        let many: Vec<_> = (0..MAX_PEERS + 5).map(id).collect();
        engine.handle_presence(&many, &[]);
        engine.handle_presence(&many[..1], &many[..2]);
        assert_eq!(engine.online.len(), MAX_PEERS - 1);
        assert_eq!(engine.status(Now::default()).drops["presence-full"], 5);
    }
}
