//! A simulated device: the product's engine, and around it what the agent's shell does, without its I/O.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use warren_common::auth_key::AuthKey;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlPublicKey, ControlSecretKey, NetmapPublicKey, ProbeSecretKey, WgSecretKey};
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{
    Ack, ClientBody, ConfirmGeneration, Enroll, RelayTokenRequest, Report, Resume, ServerBody, Signal, Signed,
};
use warren_common::wire::relay::{Binding, RefusalCode};
use warren_common::wire::relay_control::{RelayCommand, RelayDuty, RelayOffer};
use warren_coordinator::push::SessionId;
use warren_engine::engine::{Config, Engine};
use warren_engine::event::Event;
use warren_engine::home::LEAVE_AFTER;
use warren_engine::io::{Destination, LocalSocket, Outbox, Source, TunOut};
use warren_engine::netmap::{Identity, SavedNetmap};
use warren_engine::status::Status;

use super::internet::HostId;
use super::uplink::{DialNo, Out, Uplink};

/// The MTU of every TUN.
const MTU: u16 = 1_420;
/// The numbers of the sockets for IPv4 and IPv6, which share a port.
const SOCKETS: [u8; 2] = [0, 1];
/// The UDP port of every agent.
pub(super) const AGENT_PORT: u16 = 41_641;
/// Extra sockets have this port and their number.
const EXTRA_PORTS: u16 = 42_000;
const BOOT_ID: [u8; 16] = [0xb0; 16];

/// What a device knows of its network before it joins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    pub(super) network: NetworkId,
    pub(super) netmap_key: NetmapPublicKey,
}

/// What a device's shell sends on streams.
#[derive(Debug)]
pub(super) enum Sent {
    Control(SessionId, ClientBody),
    Dial(RelayId, DialNo),
    Relay(RelayId, DialNo, Vec<u8>),
    HangUp(RelayId, DialNo),
    /// What the coordinator says to a device that offers to relay.
    Relaying(Word),
    /// The network may be another one: is the session with the coordinator still alive?
    CheckSession,
}

/// What the coordinator says to a device that offers to relay.
#[derive(Debug)]
pub(super) enum Word {
    Duty(RelayDuty),
    Command(RelayCommand),
}

/// Where a datagram of the engine goes.
#[derive(Debug)]
pub(super) enum Route {
    Internet { port: u16, remote: SocketAddr },
    Relay(RelayId, DialNo, Vec<u8>),
    Nowhere,
}

/// What survives a restart.
#[derive(Debug, Default)]
struct Disk {
    device: Option<DeviceId>,
    generation: u64,
    netmap: Option<SavedNetmap>,
}

/// One device.
#[derive(Debug)]
pub struct Device {
    /// Its host in the internet.
    pub host: HostId,
    /// It was removed, or refused for good.
    pub gone: bool,
    /// It has a session with the coordinator.
    pub(super) session: Option<SessionId>,
    pub(super) timer: Option<Instant>,
    auth_key: AuthKey,
    control: ControlSecretKey,
    wg: WgSecretKey,
    probe: ProbeSecretKey,
    disk: Disk,
    engine: Option<Engine>,
    uplinks: BTreeMap<RelayId, Uplink>,
    /// The number of the last attempt to connect to a relay.
    dials: DialNo,
    /// Relay connections up to this one are dead, and neither end has noticed.
    cut_dials: DialNo,
    rng: ChaCha20Rng,
    sent: Vec<Sent>,
    /// Packets that came through relays: which one, and from whom.
    received: Vec<(RelayId, DeviceId, Vec<u8>)>,
    interfaces_wanted: bool,
    /// The relay to be connected to for good, and the one that peers are told of.
    chosen_home: Option<RelayId>,
    home_relay: Option<RelayId>,
    offer: Option<RelayOffer>,
    /// Revisions applied, for the properties.
    pub applied: u64,
    /// Its session with the coordinator is dead, and neither end has noticed.
    pub(super) cut: bool,
    /// It is in suspend to RAM.
    pub asleep: bool,
    /// Extra sockets that are open.
    pub extra: Vec<u8>,
    /// The most that were open at once.
    pub most_extra: usize,
}

impl Device {
    pub(super) fn new(host: HostId, auth_key: AuthKey, rng: &mut ChaCha20Rng) -> Self {
        Self {
            host,
            gone: false,
            session: None,
            timer: None,
            auth_key,
            control: ControlSecretKey::generate(rng),
            wg: WgSecretKey::generate(rng),
            probe: ProbeSecretKey::generate(rng),
            disk: Disk::default(),
            engine: None,
            uplinks: BTreeMap::new(),
            dials: 0,
            cut_dials: 0,
            rng: ChaCha20Rng::seed_from_u64(rng.next_u64()),
            sent: Vec::new(),
            received: Vec::new(),
            interfaces_wanted: false,
            chosen_home: None,
            home_relay: None,
            offer: None,
            applied: 0,
            cut: false,
            asleep: false,
            extra: Vec::new(),
            most_extra: 0,
        }
    }

    /// Its id, once it has joined.
    pub const fn id(&self) -> Option<DeviceId> {
        self.disk.device
    }

    /// True if it has a session and a netmap from it.
    pub const fn connected(&self) -> bool {
        self.session.is_some() && self.applied > 0
    }

    /// True if a relay forwards for it.
    pub fn relay_ready(&self) -> bool {
        self.uplinks.values().any(|uplink| uplink.ready().is_some())
    }

    /// The relays that forward for it.
    pub fn relays(&self) -> impl Iterator<Item = RelayId> {
        self.uplinks.values().filter(|uplink| uplink.ready().is_some()).map(Uplink::relay)
    }

    /// Where peers find it.
    pub const fn home_relay(&self) -> Option<RelayId> {
        self.home_relay
    }

    /// What its engine says of itself.
    pub fn status(&self, now: Now) -> Option<Status> {
        self.engine.as_ref().map(|e| e.status(now))
    }

    pub(super) fn netmap_hash(&self) -> Option<[u8; 32]> {
        self.engine.as_ref().and_then(Engine::held).map(|(_, _, hash)| hash)
    }

    pub(super) fn control_key(&self) -> ControlPublicKey {
        self.control.public()
    }

    /// The attempts to connect, or connections, that it has now.
    pub(super) fn dials(&self) -> impl Iterator<Item = (RelayId, DialNo)> {
        self.uplinks.values().filter_map(|uplink| Some((uplink.relay(), uplink.dial_no()?)))
    }

    pub(super) fn take_sent(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.sent)
    }

    pub(super) fn take_interfaces_wanted(&mut self) -> bool {
        std::mem::take(&mut self.interfaces_wanted)
    }

    /// What it says first in a new session.
    pub(super) fn greet(&mut self, session: SessionId) -> ClientBody {
        (self.session, self.cut) = (Some(session), false);
        self.applied = 0;
        match self.disk.device {
            Some(device) => {
                let (epoch, revision, hash) = self.engine.as_ref().and_then(Engine::held).unwrap_or_default();
                ClientBody::Resume(Resume {
                    device: device.to_bytes().to_vec(),
                    generation: self.disk.generation,
                    epoch,
                    revision,
                    hash: hash.to_vec(),
                    version: "sim".into(),
                })
            }
            None => ClientBody::Enroll(Enroll {
                auth_key: self.auth_key.expose(),
                hostname: "sim".into(),
                wg: self.wg.public().as_bytes().to_vec(),
                probe: self.probe.public().as_bytes().to_vec(),
                os: "sim".into(),
                version: "sim".into(),
            }),
        }
    }

    pub(super) fn session_lost(&mut self) {
        self.session = None;
        if let Some(engine) = &mut self.engine {
            engine.handle_control_state(Now::default(), false);
        }
    }

    /// Takes a message of the coordinator.
    pub(super) fn handle_control(&mut self, now: Now, context: &Context, body: ServerBody, seed: u64) {
        let Some(session) = self.session else { return };
        match body {
            ServerBody::Welcome(welcome) => {
                self.disk.device = DeviceId::from_slice(&welcome.device);
                self.disk.generation = welcome.generation;
                let confirm = ConfirmGeneration { generation: welcome.generation };
                self.sent.push(Sent::Control(session, ClientBody::ConfirmGeneration(confirm)));
                if self.engine.is_none() {
                    self.start_engine(context, seed);
                    self.interfaces_wanted = true;
                }
                if let Some(engine) = &mut self.engine {
                    engine.handle_control_state(now, true);
                }
                self.report();
                // Whatever ended the former session may have ended other connections, and tokens asked for did not come.
                self.check_uplinks(now);
                self.with_uplinks(now, |uplink, now, _, out| {
                    if uplink.ready().is_none() {
                        uplink.want_token(now, out);
                    }
                });
            }
            ServerBody::Refused(_) => self.gone = true,
            ServerBody::Update(signed) => {
                let peers = |device: &Self| {
                    let netmap = device.engine.as_ref().and_then(Engine::netmap)?;
                    Some(netmap.peers.keys().copied().collect::<Vec<_>>())
                };
                let before = peers(self);
                self.update(now, session, &signed);
                self.leave_gone_relays(now);
                // The relay passes packets to the peers that a token names.
                if before != peers(self) {
                    self.with_uplinks(now, |uplink, now, _, out| uplink.want_token(now, out));
                }
            }
            ServerBody::Signal(signal) => {
                if let (Some(engine), Some(device)) = (&mut self.engine, DeviceId::from_slice(&signal.device))
                {
                    let mut sealed = signal.sealed;
                    let stride = sealed.len();
                    let source = Source::Signal { device };
                    engine.handle_datagram(now, source, &mut sealed, stride, &mut TunOut::new(0));
                }
            }
            ServerBody::RelayToken(grant) => {
                let probe = self.probe.clone();
                if let (Some(relay), Some(token)) = (RelayId::from_slice(&grant.relay), grant.token) {
                    self.with_uplink(now, relay, |uplink, now, _, out| {
                        uplink.on_token(now, token, &probe, out)
                    });
                }
            }
            ServerBody::RelayDuty(duty) => self.sent.push(Sent::Relaying(Word::Duty(duty))),
            ServerBody::RelayCommand(command) => self.sent.push(Sent::Relaying(Word::Command(command))),
            ServerBody::Presence(_) | ServerBody::Pong(_) | ServerBody::RuleOrigins(_) => {}
        }
    }

    fn update(&mut self, now: Now, session: SessionId, signed: &Signed) {
        let Some(engine) = &mut self.engine else { return };
        let (want_snapshot, reason) = match engine.check_update(now, signed) {
            Ok(pending) => {
                self.disk.netmap = Some(pending.to_saved());
                engine.apply_update(now, pending);
                self.applied += 1;
                (false, String::new())
            }
            Err(refused) => (refused.wants_snapshot(), refused.to_string()),
        };
        let (epoch, revision, _) = engine.held().unwrap_or_default();
        let ack = Ack { epoch, revision, want_snapshot, reason };
        self.sent.push(Sent::Control(session, ClientBody::Ack(ack)));
    }

    fn start_engine(&mut self, context: &Context, seed: u64) {
        let Some(device) = self.disk.device else { return };
        let mut bytes = [0; 32];
        ChaCha20Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
        self.engine = Some(Engine::new(Config {
            identity: Identity {
                network: context.network,
                device,
                control: self.control.public(),
                netmap_key: context.netmap_key,
                epoch: super::world::EPOCH,
            },
            wg: self.wg.clone(),
            probe: self.probe.clone(),
            seed: bytes,
            boot_id: BOOT_ID,
            mtu: MTU,
            handshake_floor: warren_common::time::UnixTime::default(),
        }));
    }

    /// Starts the agent again from its disk.
    pub(super) fn restart(&mut self, now: Now, context: &Context, seed: u64) {
        (self.engine, self.session) = (None, None);
        (self.chosen_home, self.home_relay) = (None, None);
        (self.cut, self.extra) = (false, Vec::new());
        self.uplinks.clear();
        self.sent.clear();
        self.applied = 0;
        self.start_engine(context, seed);
        if let (Some(engine), Some(saved)) = (&mut self.engine, &self.disk.netmap) {
            engine.restore(now, saved).unwrap_or_else(|e| panic!("what was saved can't be restored: {e}"));
        }
    }

    pub(super) fn interfaces_changed(&mut self, now: Now, addrs: impl Iterator<Item = IpAddr>) {
        let local: Vec<LocalSocket> = addrs
            .map(|ip| LocalSocket {
                id: SOCKETS[usize::from(ip.is_ipv6())],
                addr: SocketAddr::new(ip, AGENT_PORT),
            })
            .collect();
        if let Some(engine) = &mut self.engine {
            engine.handle_interfaces(now, &local);
        }
    }

    /// The socket at that port, if it is open.
    pub(super) fn socket_at(&self, port: u16, v6: bool) -> Option<u8> {
        if port == AGENT_PORT {
            return Some(SOCKETS[usize::from(v6)]);
        }
        let id = u8::try_from(port.checked_sub(EXTRA_PORTS)?).ok()?;
        self.extra.contains(&id).then_some(id)
    }

    // Relays.

    /// Runs `change` on the connection to `relay`, and does what follows.
    fn with_uplink(
        &mut self,
        now: Now,
        relay: RelayId,
        change: impl FnOnce(&mut Uplink, Instant, u32, &mut Vec<Out>),
    ) {
        let random = self.rng.next_u32();
        let Some(uplink) = self.uplinks.get_mut(&relay) else { return };
        let mut out = Vec::new();
        change(uplink, now.boot, random, &mut out);
        for out in out {
            self.follow(now, relay, out);
        }
    }

    fn with_uplinks(&mut self, now: Now, change: impl Fn(&mut Uplink, Instant, u32, &mut Vec<Out>)) {
        let relays: Vec<RelayId> = self.uplinks.keys().copied().collect();
        relays.into_iter().for_each(|relay| self.with_uplink(now, relay, &change));
    }

    fn follow(&mut self, now: Now, relay: RelayId, out: Out) {
        let Some(engine) = &mut self.engine else { return };
        match out {
            Out::Dial(dial) => self.sent.push(Sent::Dial(relay, dial)),
            Out::Frame(dial, frame) => self.sent.push(Sent::Relay(relay, dial, frame)),
            Out::HangUp(dial) => self.sent.push(Sent::HangUp(relay, dial)),
            Out::WantToken => {
                if let Some(session) = self.session {
                    let request = RelayTokenRequest { relay: relay.to_bytes().to_vec() };
                    self.sent.push(Sent::Control(session, ClientBody::RelayToken(request)));
                }
            }
            Out::Up => engine.handle_relay_state(now, relay, true),
            Out::Down => engine.handle_relay_state(now, relay, false),
            Out::Doubt(doubt) => engine.handle_relay_doubt(now, relay, doubt),
            Out::Draining => engine.handle_relay_draining(now, relay),
            Out::Gone(device) => engine.handle_gone_from_relay(now, relay, device),
            Out::Received(src, payload) => self.received.push((relay, src, payload)),
        }
    }

    /// Connects to a relay of the netmap, if there is no connection yet; else it stays.
    fn want_relay(&mut self, now: Now, relay: RelayId) {
        if let Some(uplink) = self.uplinks.get_mut(&relay) {
            uplink.used = now.boot;
            return;
        }
        let Some(netmap) = self.engine.as_ref().and_then(Engine::netmap) else { return };
        let Some(known) = netmap.relays.get(&relay) else { return };
        let binding = Binding { network: netmap.network.id, relay, cert_sha256: known.cert_sha256 };
        self.uplinks.insert(relay, Uplink::new(now.boot, binding));
        self.handle_uplink_timeouts(now);
    }

    fn leave_idle_relays(&mut self, now: Now) {
        let homes = [self.chosen_home, self.home_relay];
        let idle = |u: &Uplink| !homes.contains(&Some(u.relay())) && now.boot.since(u.used) >= LEAVE_AFTER;
        self.leave_relays(now, idle);
    }

    /// Leaves relays that are gone from the netmap.
    fn leave_gone_relays(&mut self, now: Now) {
        let Some(netmap) = self.engine.as_ref().and_then(Engine::netmap) else { return };
        let known: Vec<RelayId> = netmap.relays.keys().copied().collect();
        self.leave_relays(now, |uplink| !known.contains(&uplink.relay()));
    }

    fn leave_relays(&mut self, now: Now, which: impl Fn(&Uplink) -> bool) {
        let left: Vec<RelayId> = self.uplinks.values().filter(|u| which(u)).map(Uplink::relay).collect();
        for relay in left {
            if let Some(dial) = self.uplinks.remove(&relay).and_then(|uplink| uplink.dial_no()) {
                self.sent.push(Sent::HangUp(relay, dial));
            }
            if let Some(engine) = &mut self.engine {
                engine.handle_relay_left(now, relay);
            }
        }
    }

    fn handle_uplink_timeouts(&mut self, now: Now) {
        let due: Vec<RelayId> =
            self.uplinks.values().filter(|u| u.deadline() <= now.boot).map(Uplink::relay).collect();
        for relay in due {
            let mut dials = self.dials;
            self.with_uplink(now, relay, |uplink, now, random, out| {
                uplink.handle_timeout(now, &mut dials, random, out);
            });
            self.dials = dials;
        }
    }

    /// Are the relay connections still alive?
    fn check_uplinks(&mut self, now: Now) {
        self.with_uplinks(now, Uplink::on_network_change);
    }

    /// Its streams are dead from now on, and neither end knows.
    pub(super) const fn cut_streams(&mut self) {
        (self.cut, self.cut_dials) = (true, self.dials);
    }

    /// It finds all its relay connections dead.
    pub(super) fn lose_uplinks(&mut self, now: Now) {
        self.cut_dials = self.dials;
        self.with_uplinks(now, |uplink, now, random, out| {
            if uplink.dial_no().is_some() {
                uplink.on_ended(now, None, random, out);
            }
            uplink.on_network_change(now, random, out);
        });
    }

    /// True if what travels on that connection gets nowhere.
    pub(super) const fn is_cut(&self, dial: DialNo) -> bool {
        dial <= self.cut_dials
    }

    /// The relay, or its host, ended a connection or refused one.
    pub(super) fn relay_closed(&mut self, now: Now, relay: RelayId, dial: DialNo, why: Option<RefusalCode>) {
        self.with_uplink(now, relay, |uplink, now, random, out| {
            if uplink.dial_no() == Some(dial) {
                uplink.on_ended(now, why, random, out);
            }
        });
    }

    /// Takes a frame of a relay.
    pub(super) fn handle_relay_frame(
        &mut self,
        now: Now,
        (relay, dial): (RelayId, DialNo),
        frame: &[u8],
        tun: &mut TunOut,
    ) {
        let probe = self.probe.clone();
        self.with_uplink(now, relay, |uplink, now, _, out| {
            if uplink.dial_no() == Some(dial) {
                uplink.on_frame(now, frame, &probe, out);
            }
        });
        let Some(engine) = &mut self.engine else { return };
        for (relay, device, mut payload) in self.received.drain(..) {
            let stride = payload.len();
            engine.handle_datagram(now, Source::Relay { relay, device }, &mut payload, stride, tun);
        }
    }

    pub(super) fn handle_tun(&mut self, now: Now, packet: &[u8], out: &mut Outbox) {
        if let Some(engine) = &mut self.engine {
            engine.handle_tun(now, packet, out);
        }
    }

    pub(super) fn handle_datagram(
        &mut self,
        now: Now,
        socket: u8,
        from: SocketAddr,
        payload: &mut [u8],
        tun: &mut TunOut,
    ) {
        if let Some(engine) = &mut self.engine {
            let stride = payload.len();
            engine.handle_datagram(now, Source::Direct { socket, remote: from }, payload, stride, tun);
        }
    }

    /// It wakes from a sleep, and had wanted to be woken by `deadline`.
    pub(super) fn handle_wake(&mut self, now: Now, deadline: Option<Instant>) {
        if let (Some(engine), Some(deadline)) = (&mut self.engine, deadline) {
            engine.handle_wake(now, deadline);
        }
        self.handle_timeout(now);
    }

    /// Does what is due. True if the engine's own timer was.
    pub(super) fn handle_timeout(&mut self, now: Now) -> bool {
        self.handle_uplink_timeouts(now);
        self.leave_idle_relays(now);
        let Some(engine) = &mut self.engine else { return false };
        let due = engine.poll_timeout(now).is_some_and(|(at, _)| at <= now.boot);
        if due {
            engine.handle_timeout(now);
        }
        due
    }

    pub(super) fn poll_timeout(&mut self, now: Now) -> Option<Instant> {
        let engine = self.engine.as_mut().and_then(|e| e.poll_timeout(now)).map(|(at, _)| at);
        self.uplinks.values().map(Uplink::deadline).chain(engine).min()
    }

    pub(super) fn poll_transmit(&mut self, now: Now, out: &mut Outbox) -> bool {
        self.engine.as_mut().is_some_and(|e| e.poll_transmit(now, out))
    }

    /// Takes packets for the TUN, and events on the way.
    pub(super) fn poll_tun(&mut self, now: Now, tun: &mut TunOut) -> bool {
        let Some(engine) = &mut self.engine else { return false };
        let mut more = engine.poll_tun(tun);
        while let Some(event) = self.engine.as_mut().and_then(Engine::poll_event) {
            match (event, self.session) {
                (Event::Signal { device, sealed }, Some(session)) => {
                    let signal = Signal { device: device.to_bytes().to_vec(), sealed };
                    self.sent.push(Sent::Control(session, ClientBody::Signal(signal)));
                }
                (Event::RelayWanted { relay }, _) => self.want_relay(now, relay),
                (Event::HomeRelay { relay }, _) => {
                    self.chosen_home = relay;
                    relay.into_iter().for_each(|relay| self.want_relay(now, relay));
                }
                (Event::HomeAnnounced { relay }, _) => {
                    self.home_relay = relay;
                    self.report();
                }
                (Event::SocketsWanted { ids }, _) => {
                    self.extra.clone_from(&ids);
                    self.most_extra = self.most_extra.max(ids.len());
                    if let Some(engine) = &mut self.engine {
                        engine.handle_extra_sockets(now, &ids);
                    }
                    more = true;
                }
                (Event::NetworkSuspect, _) => {
                    self.check_uplinks(now);
                    self.sent.push(Sent::CheckSession);
                }
                _ => {}
            }
        }
        more
    }

    /// Tells the coordinator which relay it listens on.
    fn report(&mut self) {
        let home_relay = self.home_relay.map_or_else(Vec::new, |relay| relay.to_bytes().to_vec());
        if let Some(session) = self.session.filter(|_| !home_relay.is_empty() || self.offer.is_some()) {
            let report = Report { home_relay, relay: self.offer.clone(), ..Report::default() };
            self.sent.push(Sent::Control(session, ClientBody::Report(report)));
        }
    }

    /// Offers to relay for others.
    pub(super) fn offer_to_relay(&mut self, offer: RelayOffer) {
        self.offer = Some(offer);
        self.report();
    }

    /// Where a datagram of the engine goes.
    pub(super) fn route(&mut self, now: Instant, to: Destination, bytes: &[u8]) -> Route {
        match to {
            Destination::Direct { socket, remote } if SOCKETS.contains(&socket) => {
                Route::Internet { port: AGENT_PORT, remote }
            }
            Destination::Direct { socket, remote } if self.extra.contains(&socket) => {
                Route::Internet { port: EXTRA_PORTS + u16::from(socket), remote }
            }
            Destination::Direct { .. } => Route::Nowhere,
            Destination::Relay { relay, device } => {
                let uplink = self.uplinks.get_mut(&relay);
                let sent = uplink.and_then(|uplink| uplink.send(now, device, bytes));
                sent.map_or(Route::Nowhere, |(dial, frame)| Route::Relay(relay, dial, frame))
            }
        }
    }
}
