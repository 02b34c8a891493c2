//! One network in virtual time: a coordinator, relays, and devices that run the product's engine.
//!
//! What is simulated is what lies between them: datagrams cross the virtual internet, while control sessions and relay
//! connections are ordered streams with latency that break when an end goes away. What is *not* simulated is any decision:
//! the engine, the relay's core and the coordinator's domain are the product's own, and so are all messages.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use warren_common::auth_key::AuthKey;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, RootSecretKey};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::{ClientBody, ServerBody};
use warren_common::wire::probe;
use warren_common::wire::relay::RefusalCode;
use warren_coordinator::domain::{Command, NewAuthKey, Refusal, Reply, Settings, State, derive_ipv6_prefix};
use warren_coordinator::push::{Coordinator, SessionId};
use warren_engine::io::{Outbox, TunOut};

use super::device::{Device, Sent};
use super::internet::{HostId, Internet, Link, NatId, Oversize, Realm};
use super::model::DeviceNo;
use super::nat::NatBehaviour;
use super::packet::{Datagram, too_big};
use super::relays::{RelayNo, Server};
use super::uplink::DialNo;

/// One-way delay of control sessions, and of relay connections within a region.
pub(super) const STREAM_LATENCY: Duration = Duration::from_millis(20);
/// How long a device waits before it connects again to the coordinator.
pub(super) const RECONNECT_AFTER: Duration = Duration::from_secs(1);
/// The port that simulated applications listen on.
pub const APP_PORT: u16 = 7_000;
pub(super) const STUN_PORT: u16 = 3_478;
/// The second STUN server's second port.
const OTHER_STUN_PORT: u16 = 3_479;
/// How long a device waits for a sign of life in a session with the coordinator that it has doubts about.
const STREAM_PROBE: Duration = Duration::from_secs(3);
/// After so much silence it has doubts about it without any other hint.
const STREAM_SILENCE: Duration = Duration::from_secs(35);
/// A TCP, a TLS and a protocol handshake: how long a new session takes when the old one's end was noticed at once.
pub(super) const STREAM_SETUP: Duration = Duration::from_millis(120);
/// Virtual time starts here: an arbitrary moment long after boot.
const START: Now =
    Now { boot: Instant::from_nanos(3_600_000_000_000), unix: UnixTime::from_secs(1_800_000_000) };

/// Something that travels on a stream, or a device's own wake-up.
pub(super) enum Parcel {
    ToCoordinator(SessionId, ClientBody),
    ToDevice(DeviceNo, SessionId, Box<ServerBody>),
    ConnectCoordinator(DeviceNo),
    /// Its session is dead and it finds out.
    SessionLost(DeviceNo),
    DialsRelay {
        device: DeviceNo,
        no: RelayNo,
        dial: DialNo,
    },
    ToRelay {
        device: DeviceNo,
        no: RelayNo,
        dial: DialNo,
        frame: Vec<u8>,
    },
    HangsUp {
        device: DeviceNo,
        no: RelayNo,
        dial: DialNo,
    },
    FromRelay {
        device: DeviceNo,
        relay: RelayId,
        dial: DialNo,
        frame: Vec<u8>,
    },
    /// `why` is what the relay says, if it does.
    RelayClosed {
        device: DeviceNo,
        relay: RelayId,
        dial: DialNo,
        why: Option<RefusalCode>,
    },
    Wake(DeviceNo, Option<Instant>),
}

/// A datagram of an application that came out of a TUN.
#[derive(Clone, Copy, Debug)]
pub struct Delivery {
    /// When.
    pub at: Instant,
    /// At which device.
    pub device: DeviceNo,
    /// What.
    pub datagram: Datagram,
}

/// Counts of one run, for the bounds that a property checks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Wake-ups of engines by their own timers.
    pub wakes: u64,
    /// Datagrams that agents sent into the internet.
    pub datagrams: u64,
    /// Packets that agents sent to relays.
    pub relayed: u64,
    /// Application datagrams delivered.
    pub delivered: u64,
    /// Of the datagrams and frames: probes.
    pub probes: u64,
    /// STUN requests.
    pub stun: u64,
    /// WireGuard handshakes and empty messages.
    pub upkeep: u64,
    /// Bytes of probes, STUN and WireGuard's upkeep, without headers.
    pub upkeep_bytes: u64,
}

impl Tally {
    /// Takes note of what an agent sends.
    fn count(&mut self, bytes: &[u8]) {
        let kind = match bytes {
            [4, 0, 0, 0, ..] if bytes.len() > EMPTY_MESSAGE => return,
            [1..=4, 0, 0, 0, ..] => &mut self.upkeep,
            _ if probe::is_probe(bytes) => &mut self.probes,
            _ => &mut self.stun,
        };
        *kind += 1;
        self.upkeep_bytes += bytes.len() as u64;
    }
}

/// Bytes of a WireGuard message without contents.
const EMPTY_MESSAGE: usize = 32;

/// The simulated world.
pub struct World {
    /// The time.
    pub now: Now,
    /// The internet, to break it.
    pub net: Internet,
    /// The devices ever made; a removed one stays in its place, silent.
    pub devices: Vec<Device>,
    /// What came out of TUNs since the last look.
    pub deliveries: Vec<Delivery>,
    /// What applications were told of too long packets since the last look: the device, and the MTU.
    pub too_big: Vec<(DeviceNo, u16)>,
    /// Counts.
    pub tally: Tally,
    pub(super) rng: ChaCha20Rng,
    pub(super) network: NetworkId,
    pub(super) netmap_key: NetmapSecretKey,
    pub(super) coordinator: Option<Coordinator>,
    pub(super) disk: State,
    pub(super) relays: Vec<Server>,
    stun_host: HostId,
    /// The last revision that took something away: a relay that starts anew must not take older tokens.
    pub(super) relay_floor: u64,
    pub(super) sessions: BTreeMap<SessionId, DeviceNo>,
    parcels: BTreeMap<(Instant, u64), Parcel>,
    timers: BTreeSet<(Instant, DeviceNo)>,
    pub(super) sequence: u64,
    pub(super) next_ticket: u64,
    pub(super) replies: BTreeMap<u64, Result<Reply, Refusal>>,
    hosts: BTreeMap<HostId, DeviceNo>,
    outbox: Outbox,
    tun: TunOut,
    next_addr: u32,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "World({} devices at {:?})", self.devices.len(), self.now.boot)
    }
}

const RELAY_CERT: [u8; 32] = [0xce; 32];

/// The coordinator's epoch: in the simulator none is ever restored from a backup.
pub(super) const EPOCH: u64 = 1;

impl World {
    /// A world with a coordinator and its relay, and no devices.
    pub fn new(seed: u64) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let root = RootSecretKey::generate(&mut rng);
        let netmap_key = NetmapSecretKey::generate(&mut rng);
        let network = NetworkId::generate(START.unix.as_millis(), &mut rng);
        let disk = State::new(Settings {
            network,
            name: "sim".into(),
            root: root.public().fingerprint(),
            ipv4: ipnet::Ipv4Net::new_assert([100, 64, 0, 0].into(), 10),
            ipv6: derive_ipv6_prefix(network),
            epoch: EPOCH,
            revisions_reserved: 0,
        });
        let mut net = Internet::new(rng.next_u64());
        let relay_addr: IpAddr = [198, 51, 100, 1].into();
        let relay_host = net.add_host(Realm::Public, relay_addr, Link::default());
        let relay_v6: IpAddr = [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1].into();
        net.set_interfaces(relay_host, &[(Realm::Public, relay_addr), (Realm::Public, relay_v6)]);
        let second_addr: IpAddr = [198, 51, 100, 2].into();
        let stun_host = net.add_host(Realm::Public, second_addr, Link::default());
        let mut world = Self {
            now: START,
            net,
            devices: Vec::new(),
            deliveries: Vec::new(),
            too_big: Vec::new(),
            tally: Tally::default(),
            rng,
            network,
            netmap_key,
            coordinator: None,
            disk,
            relays: Vec::new(),
            stun_host,
            relay_floor: 0,
            sessions: BTreeMap::new(),
            parcels: BTreeMap::new(),
            timers: BTreeSet::new(),
            sequence: 0,
            next_ticket: 0,
            replies: BTreeMap::new(),
            hosts: BTreeMap::new(),
            outbox: Outbox::new(),
            tun: TunOut::new(0),
            next_addr: u32::from_be_bytes([203, 0, 113, 1]),
        };
        world.start_coordinator();
        let embedded = Command::SetEmbeddedRelay {
            name: "home".into(),
            addrs: vec![SocketAddr::new(relay_addr, 443)],
            stun: vec![
                SocketAddr::new(relay_addr, STUN_PORT),
                SocketAddr::new(second_addr, STUN_PORT),
                SocketAddr::new(second_addr, OTHER_STUN_PORT),
                SocketAddr::new(relay_v6, STUN_PORT),
            ],
            cert_sha256: RELAY_CERT,
        };
        world.command(embedded).unwrap_or_else(|e| panic!("the embedded relay was refused: {e}"));
        let id = *world.state().relays().keys().next().unwrap_or_else(|| panic!("there is no relay record"));
        world.relays.push(Server::new(id, relay_host, RELAY_CERT));
        world.start_relay(0);
        world
    }

    /// Where every device asks for its reflexive addresses.
    pub fn stun_servers(&self) -> Vec<SocketAddr> {
        let hosts = self.relays.iter().map(|relay| relay.host).chain([self.stun_host]);
        hosts.flat_map(|h| self.net.addrs(h)).map(|addr| SocketAddr::new(addr, STUN_PORT)).collect()
    }

    /// The coordinator's state as saved.
    pub fn state(&self) -> &State {
        self.coordinator.as_ref().map_or(&self.disk, Coordinator::state)
    }

    /// A public address that nobody has.
    pub fn fresh_addr(&mut self) -> IpAddr {
        self.next_addr += 1;
        std::net::Ipv4Addr::from(self.next_addr).into()
    }

    /// A public IPv6 address that nobody has.
    pub fn fresh_v6(&mut self) -> IpAddr {
        self.next_addr += 1;
        let [a, b] = [self.next_addr >> 16, self.next_addr & 0xffff].map(|half| half as u16);
        [0x2001, 0xdb8, a, b, 0, 0, 0, 1].into()
    }

    /// A translator on the public internet.
    pub fn add_nat(&mut self, behaviour: NatBehaviour) -> NatId {
        let outside = self.fresh_addr();
        self.net.add_nat(Realm::Public, outside, behaviour)
    }

    /// Adds a device tagged `tag` in `realm` and starts its agent. It joins when time goes on.
    ///
    /// # Errors
    /// The coordinator is away or refuses to make an auth key.
    pub fn add_device(
        &mut self,
        tag: &str,
        realm: Realm,
        addr: IpAddr,
        link: Link,
    ) -> Result<DeviceNo, Refusal> {
        self.add_device_at(tag, &[(realm, addr)], link)
    }

    /// The same with several interfaces.
    ///
    /// # Errors
    /// As [`World::add_device`].
    pub fn add_device_at(
        &mut self,
        tag: &str,
        interfaces: &[(Realm, IpAddr)],
        link: Link,
    ) -> Result<DeviceNo, Refusal> {
        let new = NewAuthKey { tags: vec![tag.to_owned()], ..NewAuthKey::default() };
        let Reply::AuthKey(key) = self.command(Command::CreateAuthKey(new))? else {
            return Err(Refusal::Busy("no auth key in the reply"));
        };
        let &[(realm, addr), ..] = interfaces else { return Err(Refusal::Busy("no interface")) };
        let host = self.net.add_host(realm, addr, link);
        self.net.set_interfaces(host, interfaces);
        Ok(self.install(host, key))
    }

    fn install(&mut self, host: HostId, key: AuthKey) -> DeviceNo {
        let no = self.devices.len();
        self.devices.push(Device::new(host, key, &mut self.rng));
        self.hosts.insert(host, no);
        self.after(Duration::ZERO, Parcel::ConnectCoordinator(no));
        no
    }

    /// Stops a device's agent as `kill -9` does, and starts it again from its disk.
    pub fn restart_agent(&mut self, no: DeviceNo) {
        if let Some(session) = self.devices[no].session {
            self.sessions.remove(&session);
            if let Some(coordinator) = &mut self.coordinator {
                coordinator.disconnect(session, self.now);
            }
        }
        let dials: Vec<_> = self.devices[no].dials().collect();
        dials.into_iter().for_each(|(relay, dial)| self.hang_up(no, relay, dial));
        let seed = self.rng.next_u64();
        let context = self.context();
        self.devices[no].restart(self.now, &context, seed);
        self.interfaces_changed(no);
        self.after(RECONNECT_AFTER, Parcel::ConnectCoordinator(no));
        self.drain_coordinator();
    }

    /// Moves a device to another network.
    pub fn move_device(&mut self, no: DeviceNo, realm: Realm, addr: IpAddr) {
        self.net.move_host(self.devices[no].host, realm, addr);
        self.interfaces_changed(no);
    }

    /// Moves a device to other networks as in life: the agent is told at once, and its streams break.
    pub fn roam(&mut self, no: DeviceNo, interfaces: &[(Realm, IpAddr)]) {
        self.net.set_interfaces(self.devices[no].host, interfaces);
        self.interfaces_changed(no);
        self.devices[no].lose_uplinks(self.now);
        self.lose_session(no);
    }

    /// A router starts anew with another public address. The devices behind it are told nothing, and their streams are
    /// dead.
    pub fn reboot_nat(&mut self, nat: NatId) {
        let outside = match self.net.realm_of(nat) {
            Realm::Public => self.fresh_addr(),
            Realm::Behind(_) => {
                let [.., a, b] = self.rng.next_u32().to_be_bytes();
                [100, 64, a, b.clamp(3, 254)].into() // a carrier's customer
            }
        };
        self.net.renumber_nat(nat, outside);
        for no in 0..self.devices.len() {
            if self.net.is_behind(self.devices[no].host, nat) {
                self.devices[no].cut_streams();
                self.after(STREAM_SILENCE, Parcel::SessionLost(no));
            }
        }
    }

    /// Suspends a device: it hears and does nothing for so long, and its streams are dead when it wakes up.
    pub fn sleep(&mut self, no: DeviceNo, duration: Duration) {
        let device = &mut self.devices[no];
        device.asleep = true;
        device.cut_streams();
        let deadline = device.timer.take();
        if let Some(timer) = deadline {
            self.timers.remove(&(timer, no));
        }
        self.after(duration, Parcel::Wake(no, deadline));
    }

    /// `deadline`: when its shell had wanted to be woken.
    fn wake(&mut self, no: DeviceNo, deadline: Option<Instant>) {
        self.devices[no].asleep = false;
        self.devices[no].handle_wake(self.now, deadline);
        self.drain_device(no);
        self.after(STREAM_SILENCE, Parcel::SessionLost(no));
    }

    fn interfaces_changed(&mut self, no: DeviceNo) {
        let addrs: Vec<IpAddr> = self.net.addrs(self.devices[no].host).collect();
        self.devices[no].interfaces_changed(self.now, addrs.into_iter());
        self.drain_device(no);
    }

    /// Sends an application's datagram from one device to another, by IPv4 or IPv6 overlay addresses. Returns its number;
    /// `None` if either has no address yet.
    pub fn send(&mut self, from: DeviceNo, to: DeviceNo, v6: bool) -> Option<u64> {
        self.send_long(from, to, v6, 0)
    }

    /// The same with `extra` bytes in it, and so in the answer.
    pub fn send_long(&mut self, from: DeviceNo, to: DeviceNo, v6: bool, extra: u16) -> Option<u64> {
        let number = self.sequence;
        self.sequence += 1;
        let (src, dst) = (self.overlay_addr(from, v6)?, self.overlay_addr(to, v6)?);
        let datagram = Datagram {
            src: SocketAddr::new(src, 50_000),
            dst: SocketAddr::new(dst, APP_PORT),
            number,
            extra,
        };
        self.send_datagram(from, datagram);
        Some(number)
    }

    fn send_datagram(&mut self, from: DeviceNo, datagram: Datagram) {
        if self.devices[from].asleep {
            return;
        }
        let Some(packet) = datagram.to_packet() else { return };
        self.outbox.clear();
        self.devices[from].handle_tun(self.now, &packet, &mut self.outbox);
        self.flush_outbox(from);
        self.drain_device(from);
    }

    /// The device's overlay address.
    pub fn overlay_addr(&self, no: DeviceNo, v6: bool) -> Option<IpAddr> {
        let device = self.state().device(self.devices[no].id()?)?;
        Some(if v6 { device.ipv6.into() } else { device.ipv4.into() })
    }

    /// The device with that id.
    pub fn device_no(&self, id: DeviceId) -> Option<DeviceNo> {
        self.devices.iter().position(|d| d.id() == Some(id))
    }

    /// What `at` says of its way to `peer`, and what the coordinator thinks it should know: for failure messages.
    pub fn describe(&self, at: DeviceNo, peer: DeviceNo) -> String {
        let id = self.devices[peer].id();
        let status = self.devices[at].status(self.now);
        let (revision, drops) = status.as_ref().map(|s| (s.revision, s.drops.clone())).unwrap_or_default();
        let path = status.and_then(|s| s.peers.into_iter().find(|p| Some(p.id) == id));
        let stale = self.devices[at].id().is_some_and(|own| {
            let wanted = self.coordinator.as_ref().and_then(|c| c.netmap(own)).map(|m| m.hash());
            wanted != self.devices[at].netmap_hash()
        });
        format!("revision {revision}, stale {stale}, peer {path:?}, drops {drops:?}")
    }

    /// Lets time pass until `end`, handling everything in order.
    pub fn run_until(&mut self, end: Instant) {
        while let Some(due) = self.next_due().filter(|due| *due <= end) {
            self.now = self.now + due.since(self.now.boot);
            self.handle_due();
        }
        self.now = self.now + end.since(self.now.boot);
    }

    /// Lets `duration` pass.
    pub fn run(&mut self, duration: Duration) {
        self.run_until(self.now.boot + duration);
    }

    fn next_due(&self) -> Option<Instant> {
        let parcel = self.parcels.keys().next().map(|(at, _)| *at);
        let timer = self.timers.first().map(|(at, _)| *at);
        let coordinator = self.coordinator.as_ref().map(Coordinator::poll_timeout);
        let relay = self.relays.iter().filter_map(Server::poll_timeout).min();
        [self.net.next_arrival(), parcel, timer, coordinator, relay].into_iter().flatten().min()
    }

    fn handle_due(&mut self) {
        while let Some(arrival) = self.net.poll_arrival(self.now.boot) {
            self.handle_arrival(arrival.host, arrival.port, arrival.from, arrival.payload);
        }
        while let Some(((at, _), _)) = self.parcels.first_key_value() {
            if *at > self.now.boot {
                break;
            }
            if let Some((_, parcel)) = self.parcels.pop_first() {
                self.handle_parcel(parcel);
            }
        }
        while let Some((at, no)) = self.timers.first().copied() {
            if at > self.now.boot {
                break;
            }
            self.timers.remove(&(at, no));
            self.devices[no].timer = None;
            self.tally.wakes += u64::from(self.devices[no].handle_timeout(self.now));
            self.drain_device(no);
        }
        if let Some(coordinator) = &mut self.coordinator
            && coordinator.poll_timeout() <= self.now.boot
        {
            coordinator.handle_timeout(self.now);
            self.drain_coordinator();
        }
        if self.relays.iter().filter_map(Server::poll_timeout).any(|due| due <= self.now.boot) {
            self.relay_timeouts();
        }
    }

    fn handle_arrival(&mut self, host: HostId, port: u16, from: SocketAddr, mut payload: Vec<u8>) {
        let relay = self.relays.iter().find(|relay| relay.host == host);
        if relay.is_some() || host == self.stun_host {
            let serves = port == STUN_PORT || host == self.stun_host && port == OTHER_STUN_PORT;
            if serves
                && relay.is_none_or(Server::is_up)
                && let Some((answer, to)) = super::stun::answer(&payload, from)
            {
                let to = SocketAddr::new(from.ip(), to);
                self.net.send(self.now.boot, host, port, to, &answer, Oversize::Lost);
            }
            return;
        }
        let Some(no) = self.hosts.get(&host).copied() else { return };
        if let Some(socket) = self.devices[no].socket_at(port, from.is_ipv6())
            && !self.devices[no].asleep
        {
            self.tun.clear();
            self.devices[no].handle_datagram(self.now, socket, from, &mut payload, &mut self.tun);
            self.flush_tun(no);
            self.drain_device(no);
        }
    }

    fn handle_parcel(&mut self, parcel: Parcel) {
        match parcel {
            Parcel::ToCoordinator(session, body) => {
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.handle(session, body, self.now, &mut self.rng);
                    if coordinator.has_batch() {
                        coordinator.saved(self.now);
                    }
                    self.drain_coordinator();
                }
            }
            Parcel::ToDevice(no, session, body) => {
                if self.devices[no].session == Some(session) && !self.devices[no].cut {
                    let context = self.context();
                    let seed = self.rng.next_u64();
                    self.devices[no].handle_control(self.now, &context, *body, seed);
                    if self.devices[no].take_interfaces_wanted() {
                        self.interfaces_changed(no);
                    }
                    self.drain_device(no);
                }
            }
            Parcel::DialsRelay { device, no, dial } => self.on_dial(device, no, dial),
            Parcel::ToRelay { device, no, dial, frame } => self.on_frame_to_relay(device, no, dial, frame),
            Parcel::HangsUp { device, no, dial } => self.on_hang_up(device, no, dial),
            Parcel::FromRelay { device, relay, dial, frame } => {
                if !self.devices[device].is_cut(dial) {
                    self.tun.clear();
                    let from = (relay, dial);
                    self.devices[device].handle_relay_frame(self.now, from, &frame, &mut self.tun);
                    self.flush_tun(device);
                    self.drain_device(device);
                }
            }
            Parcel::RelayClosed { device, relay, dial, why } => {
                if !self.devices[device].is_cut(dial) {
                    self.devices[device].relay_closed(self.now, relay, dial, why);
                    self.drain_device(device);
                }
            }
            Parcel::ConnectCoordinator(no) => self.connect_coordinator(no),
            Parcel::SessionLost(no) if self.devices[no].cut && !self.devices[no].asleep => {
                self.lose_session(no);
            }
            Parcel::SessionLost(_) => {}
            Parcel::Wake(no, deadline) => self.wake(no, deadline),
        }
    }

    fn drain_transmits(&mut self, no: DeviceNo) {
        loop {
            self.outbox.clear();
            let more = self.devices[no].poll_transmit(self.now, &mut self.outbox);
            self.flush_outbox(no);
            if !more {
                break;
            }
        }
    }

    pub(super) fn drain_device(&mut self, no: DeviceNo) {
        if self.devices[no].asleep {
            return;
        }
        self.drain_transmits(no);
        loop {
            self.tun.clear();
            let more = self.devices[no].poll_tun(self.now, &mut self.tun);
            self.flush_tun(no);
            if !more {
                break;
            }
            self.drain_transmits(no);
        }
        for sent in self.devices[no].take_sent() {
            match sent {
                Sent::Control(..) if self.devices[no].cut => {}
                Sent::CheckSession => self.after(STREAM_PROBE, Parcel::SessionLost(no)),
                Sent::Control(session, body) => {
                    self.after(STREAM_LATENCY, Parcel::ToCoordinator(session, body));
                }
                Sent::Dial(relay, dial) => self.dial_relay(no, relay, dial),
                Sent::Relay(relay, dial, frame) => self.send_to_relay(no, relay, dial, frame),
                Sent::HangUp(relay, dial) => self.hang_up(no, relay, dial),
                Sent::Relaying(word) => self.on_relaying(no, word),
            }
        }
        let timer = self.devices[no].poll_timeout(self.now);
        if timer != self.devices[no].timer {
            if let Some(old) = self.devices[no].timer {
                self.timers.remove(&(old, no));
            }
            self.devices[no].timer = timer;
            self.timers.extend(timer.map(|at| (at, no)));
        }
    }

    fn flush_outbox(&mut self, no: DeviceNo) {
        let host = self.devices[no].host;
        let whole = self.outbox.iter().filter(|(t, _)| t.whole).map(|(t, _)| t.offset);
        let whole: BTreeSet<usize> = whole.collect();
        let (mut offset, mut relayed) = (0, Vec::new());
        for (to, bytes) in self.outbox.datagrams() {
            let oversize = if whole.contains(&offset) { Oversize::Lost } else { Oversize::Fragmented };
            offset += bytes.len();
            match self.devices[no].route(self.now.boot, to, bytes) {
                super::device::Route::Internet { port, remote } => {
                    self.tally.datagrams += 1;
                    self.tally.count(bytes);
                    self.net.send(self.now.boot, host, port, remote, bytes, oversize);
                }
                super::device::Route::Relay(relay, dial, frame) => {
                    self.tally.relayed += 1;
                    self.tally.count(bytes);
                    relayed.push((relay, dial, frame));
                }
                super::device::Route::Nowhere => {}
            }
        }
        self.outbox.clear();
        for (relay, dial, frame) in relayed {
            self.send_to_relay(no, relay, dial, frame);
        }
    }

    fn flush_tun(&mut self, no: DeviceNo) {
        self.too_big.extend(self.tun.iter().filter_map(too_big).map(|mtu| (no, mtu)));
        let arrived: Vec<Datagram> = self.tun.iter().filter_map(Datagram::parse).collect();
        self.tun.clear();
        for datagram in arrived {
            self.tally.delivered += 1;
            self.deliveries.push(Delivery { at: self.now.boot, device: no, datagram });
            if datagram.dst.port() == APP_PORT {
                self.send_datagram(no, datagram.answer());
            }
        }
    }

    pub(super) fn after(&mut self, delay: Duration, parcel: Parcel) {
        self.sequence += 1;
        self.parcels.insert((self.now.boot + delay, self.sequence), parcel);
    }

    fn context(&self) -> super::device::Context {
        super::device::Context { network: self.network, netmap_key: self.netmap_key.public() }
    }
}
