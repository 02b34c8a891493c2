//! A simulated device: the product's engine, and around it what the agent's shell does, without its I/O.

use std::net::{IpAddr, SocketAddr};

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use warren_common::auth_key::AuthKey;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlPublicKey, ControlSecretKey, NetmapPublicKey, ProbeSecretKey, WgSecretKey};
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{
    Ack, ClientBody, ConfirmGeneration, Enroll, RelayTokenRequest, Report, Resume, ServerBody, Signal, Signed,
};
use warren_common::wire::relay::{Binding, Challenge, Frame, GoneReason, TokenRef};
use warren_coordinator::push::SessionId;
use warren_engine::engine::{Config, Engine};
use warren_engine::event::Event;
use warren_engine::io::{Destination, LocalSocket, Outbox, Source, TunOut};
use warren_engine::netmap::{Identity, SavedNetmap};
use warren_engine::status::Status;
use warren_relay::core::ConnId;

use super::internet::HostId;

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
    pub(super) relay: RelayId,
    pub(super) binding: Binding,
}

/// What a device's shell sends on streams.
#[derive(Debug)]
pub(super) enum Sent {
    Control(SessionId, ClientBody),
    Relay(ConnId, Vec<u8>),
    ConnectRelay,
    /// The network may be another one: are the streams still alive?
    CheckStreams,
}

/// Where a datagram of the engine goes.
#[derive(Debug)]
pub(super) enum Route {
    Internet { port: u16, remote: SocketAddr },
    Relay(ConnId, Vec<u8>),
    Nowhere,
}

/// What survives a restart.
#[derive(Debug, Default)]
struct Disk {
    device: Option<DeviceId>,
    generation: u64,
    netmap: Option<SavedNetmap>,
}

#[derive(Debug)]
struct RelayLink {
    conn: ConnId,
    challenge: Option<Challenge>,
    ready: bool,
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
    relay: Option<RelayLink>,
    token: Option<Signed>,
    sent: Vec<Sent>,
    interfaces_wanted: bool,
    home_relay: Option<RelayId>,
    /// Revisions applied, for the properties.
    pub applied: u64,
    /// Its streams are dead, and neither end has noticed.
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
            relay: None,
            token: None,
            sent: Vec::new(),
            interfaces_wanted: false,
            home_relay: None,
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

    /// True if the relay forwards for it.
    pub fn relay_ready(&self) -> bool {
        self.relay.as_ref().is_some_and(|r| r.ready)
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

    pub(super) fn relay_conn(&self) -> Option<ConnId> {
        self.relay.as_ref().map(|r| r.conn)
    }

    pub(super) fn take_sent(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.sent)
    }

    pub(super) fn take_interfaces_wanted(&mut self) -> bool {
        std::mem::take(&mut self.interfaces_wanted)
    }

    /// What it says first in a new session.
    pub(super) fn greet(&mut self, session: SessionId) -> ClientBody {
        self.session = Some(session);
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
                if self.relay.is_none() {
                    self.sent.push(Sent::ConnectRelay);
                }
                self.report();
            }
            ServerBody::Refused(_) => self.gone = true,
            ServerBody::Update(signed) => {
                let peers = |device: &Self| {
                    let netmap = device.engine.as_ref().and_then(Engine::netmap)?;
                    Some(netmap.peers.keys().copied().collect::<Vec<_>>())
                };
                let before = peers(self);
                self.update(now, session, &signed);
                // The relay passes packets to the peers that a token names.
                if before != peers(self) && self.relay.is_some() {
                    self.want_token(context);
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
                self.token = grant.token;
                self.present_token(context);
            }
            ServerBody::Presence(_)
            | ServerBody::Pong(_)
            | ServerBody::RuleOrigins(_)
            | ServerBody::RelayDuty(_)
            | ServerBody::RelayCommand(_) => {}
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
        rand_core::RngCore::fill_bytes(&mut ChaCha20Rng::seed_from_u64(seed), &mut bytes);
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
        (self.engine, self.session, self.relay, self.token) = (None, None, None, None);
        (self.cut, self.extra) = (false, Vec::new());
        self.sent.clear();
        self.applied = 0;
        self.start_engine(context, seed);
        if let (Some(engine), Some(saved)) = (&mut self.engine, &self.disk.netmap) {
            engine.restore(now, saved).unwrap_or_else(|e| panic!("what was saved can't be restored: {e}"));
        }
        if self.engine.is_some() {
            self.sent.push(Sent::ConnectRelay);
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

    pub(super) fn relay_connecting(&mut self, conn: ConnId) {
        self.relay = Some(RelayLink { conn, challenge: None, ready: false });
    }

    pub(super) fn relay_lost(&mut self, now: Now, relay: RelayId) {
        self.relay = None;
        self.token = None;
        if let Some(engine) = &mut self.engine {
            engine.handle_relay_state(now, relay, false);
        }
    }

    /// Takes a frame of the relay.
    pub(super) fn handle_relay_frame(&mut self, now: Now, context: &Context, frame: &[u8], tun: &mut TunOut) {
        let Some(link) = &mut self.relay else { return };
        let Ok(Some(frame)) = Frame::decode(frame) else { return };
        match frame {
            Frame::Challenge(challenge) => {
                link.challenge = Some(challenge);
                self.want_token(context);
            }
            Frame::Ready { .. } => {
                link.ready = true;
                if let Some(engine) = &mut self.engine {
                    engine.handle_relay_state(now, context.relay, true);
                }
            }
            Frame::Recv { src, payload } => {
                if let Some(engine) = &mut self.engine {
                    let mut bytes = payload.to_vec();
                    let source = Source::Relay { relay: context.relay, device: src };
                    engine.handle_datagram(now, source, &mut bytes, payload.len(), tun);
                }
            }
            Frame::TokenWanted { .. } | Frame::PeerGone { why: GoneReason::NotPermitted, .. } => {
                self.want_token(context);
            }
            Frame::Ping { nonce } => {
                let conn = link.conn;
                self.sent.push(Sent::Relay(conn, Frame::Pong { nonce }.to_vec()));
            }
            _ => {}
        }
    }

    fn want_token(&mut self, context: &Context) {
        self.token = None;
        if let Some(session) = self.session {
            let request = RelayTokenRequest { relay: context.relay.to_bytes().to_vec() };
            self.sent.push(Sent::Control(session, ClientBody::RelayToken(request)));
        }
    }

    fn present_token(&mut self, context: &Context) {
        let (Some(link), Some(signed)) = (&mut self.relay, &self.token) else { return };
        let Some(token) = TokenRef::new(signed) else { return };
        let frame = if link.ready {
            Frame::TokenRefresh { token }.to_vec()
        } else {
            let Some(challenge) = link.challenge else { return };
            let Some(proven) = challenge.prove(&self.probe, &context.binding, token) else { return };
            Frame::Auth { proof: proven.proof, token }.to_vec()
        };
        self.sent.push(Sent::Relay(link.conn, frame));
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

    pub(super) fn handle_timeout(&mut self, now: Now) {
        if let Some(engine) = &mut self.engine {
            engine.handle_timeout(now);
        }
    }

    pub(super) fn poll_timeout(&mut self, now: Now) -> Option<Instant> {
        self.engine.as_mut().and_then(|e| e.poll_timeout(now)).map(|(at, _)| at)
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
                (Event::HomeRelay { relay }, _) => {
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
                (Event::NetworkSuspect, _) => self.sent.push(Sent::CheckStreams),
                _ => {}
            }
        }
        more
    }

    /// Tells the coordinator which relay it listens on.
    fn report(&mut self) {
        if let (Some(session), Some(relay)) = (self.session, self.home_relay) {
            let report = Report { home_relay: relay.to_bytes().to_vec(), ..Report::default() };
            self.sent.push(Sent::Control(session, ClientBody::Report(report)));
        }
    }

    /// Where a datagram of the engine goes.
    pub(super) fn route(&self, to: Destination, bytes: &[u8]) -> Route {
        match (to, &self.relay) {
            (Destination::Direct { socket, remote }, _) if SOCKETS.contains(&socket) => {
                Route::Internet { port: AGENT_PORT, remote }
            }
            (Destination::Direct { socket, remote }, _) if self.extra.contains(&socket) => {
                Route::Internet { port: EXTRA_PORTS + u16::from(socket), remote }
            }
            (Destination::Direct { .. }, _) => Route::Nowhere,
            (Destination::Relay { device, .. }, Some(link)) if link.ready => {
                Route::Relay(link.conn, Frame::Send { dst: device, payload: bytes }.to_vec())
            }
            (Destination::Relay { .. }, _) => Route::Nowhere,
        }
    }
}
