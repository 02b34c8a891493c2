//! The simulated world's relays, in regions, and the connections to them: ordered streams, as long as the regions lie apart.
//!
//! A relay can leave in three ways: it is *killed*, and nothing says so, not even its host; it *ends*, and its connections
//! break; it *closes* after draining, and says that it will be back.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use warren_common::ids::{DeviceId, RelayId};
use warren_common::keys::ControlSecretKey;
use warren_common::time::Instant;
use warren_common::wire::relay::RefusalCode;
use warren_common::wire::relay_control::{RelayJoinKey, RelayOffer};
use warren_coordinator::domain::{Command, Reply};
use warren_relay::core::{self as relay, ConnId, Relay};

use super::device::Word;
use super::internet::{HostId, Link, Realm};
use super::model::DeviceNo;
use super::uplink::DialNo;
use super::world::{Parcel, STREAM_LATENCY, STUN_PORT, World};

/// One way each of a handshake: first packet, answer, and what lets the relay take us for connected.
const HANDSHAKE: u32 = 3;

/// Which relay of the world; 0 is the coordinator's.
pub type RelayNo = usize;

/// One relay.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) id: RelayId,
    pub(super) host: HostId,
    /// The device that it is, if it is one that a grant lets relay. It hears of changes in that device's control session.
    device: Option<DeviceNo>,
    cert_sha256: [u8; 32],
    core: Option<Relay>,
    /// Nothing comes back from its host.
    silent: bool,
    /// It stands still until then: what comes in waits.
    frozen: Option<Instant>,
    /// Whose connection that is.
    clients: BTreeMap<ConnId, (DeviceNo, DialNo)>,
    conns: BTreeMap<(DeviceNo, DialNo), ConnId>,
}

impl Server {
    /// A relay that does not run yet.
    pub(super) fn new(id: RelayId, host: HostId, cert_sha256: [u8; 32]) -> Self {
        let (clients, conns) = (BTreeMap::new(), BTreeMap::new());
        Self { id, host, device: None, cert_sha256, core: None, silent: false, frozen: None, clients, conns }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.core.as_ref().and_then(Relay::poll_timeout)
    }

    /// True if it runs.
    pub(super) const fn is_up(&self) -> bool {
        self.core.is_some()
    }

    /// Forgets a connection; true if it was there.
    fn forget(&mut self, no: DeviceNo, dial: DialNo) -> Option<ConnId> {
        let conn = self.conns.remove(&(no, dial))?;
        self.clients.remove(&conn);
        Some(conn)
    }
}

/// # Panics
/// If the simulated coordinator refuses what it never does.
impl World {
    /// Adds a relay in a region (see [`Link::position`]) and starts it. Devices hear of it when time goes on.
    pub fn add_relay(&mut self, name: &str, position: Duration) -> RelayNo {
        let no = self.relays.len();
        let refused = |why: &dyn std::fmt::Display| -> ! { panic!("the relay {name} was refused: {why}") };
        let (id, secret) = match self.command(Command::CreateRelay(name.to_owned())) {
            Ok(Reply::Relay { id, join_key }) => match join_key.parse::<RelayJoinKey>() {
                Ok(key) => (id, key.secret.hash()),
                Err(why) => refused(&why),
            },
            Ok(other) => refused(&format!("{other:?}")),
            Err(why) => refused(&why),
        };
        let control = ControlSecretKey::generate(&mut self.rng).public();
        let addr = IpAddr::from([198, 51, 100, 10 + no as u8]);
        let cert_sha256 = [no as u8; 32];
        let report = Command::ReportRelay {
            relay: id,
            control,
            addrs: vec![SocketAddr::new(addr, 443)],
            stun: vec![SocketAddr::new(addr, STUN_PORT)],
            cert_sha256,
        };
        for command in [Command::JoinRelay { relay: id, control, secret: Some(secret) }, report] {
            self.command(command).unwrap_or_else(|why| refused(&why));
        }
        let host = self.net.add_host(Realm::Public, addr, Link { position, ..Link::default() });
        self.relays.push(Server::new(id, host, cert_sha256));
        self.start_relay(no);
        no
    }

    /// Has a device that has joined offer to relay, in a region. It does so once the coordinator has told it to, and is heard
    /// of by those that the policy lets use it.
    pub fn add_peer_relay(&mut self, device: DeviceNo, position: Duration) -> RelayNo {
        let no = self.relays.len();
        let record = self.devices[device].id().and_then(|id| self.state().device(id));
        let id = record.map_or_else(|| panic!("device {device} has not joined"), |record| record.relay_id());
        let addr = IpAddr::from([198, 51, 100, 10 + no as u8]);
        let cert_sha256 = [no as u8; 32];
        let host = self.net.add_host(Realm::Public, addr, Link { position, ..Link::default() });
        self.relays.push(Server { device: Some(device), ..Server::new(id, host, cert_sha256) });
        let addrs = vec![SocketAddr::new(addr, 443).to_string()];
        self.devices[device].offer_to_relay(RelayOffer { addrs, cert_sha256: cert_sha256.to_vec() });
        self.drain_device(device);
        no
    }

    /// What the coordinator says to a device that offers to relay.
    pub(super) fn on_relaying(&mut self, device: DeviceNo, word: Word) {
        let Some(no) = self.relays.iter().position(|server| server.device == Some(device)) else { return };
        let now = self.now;
        match (word, &mut self.relays[no].core) {
            (Word::Duty(duty), None) if !duty.relay.is_empty() => self.start_relay_from(no, duty.floor),
            (Word::Duty(duty), Some(_)) if duty.relay.is_empty() => self.stop_relay(no),
            (Word::Duty(duty), Some(core)) => core.set_floor(duty.floor, now),
            (Word::Command(command), Some(core)) => {
                for device in command.revoked.iter().filter_map(|id| DeviceId::from_slice(id)) {
                    core.revoke(device, command.revision, now);
                }
                for minimum in &command.minimums {
                    if let Some(device) = DeviceId::from_slice(&minimum.device) {
                        core.set_minimum_revision(device, minimum.revision, now);
                    }
                }
                core.set_floor(command.floor, now);
            }
            (Word::Duty(_) | Word::Command(_), None) => {}
        }
        self.drain_relays();
    }

    /// How many packets the relay has passed on since it was started.
    pub fn relay_forwarded(&self, no: RelayNo) -> u64 {
        self.relays[no].core.as_ref().map_or(0, |core| core.stats().counters.forwarded_packets)
    }

    /// The relay's id.
    pub fn relay_id(&self, no: RelayNo) -> RelayId {
        self.relays[no].id
    }

    /// The relay with that id.
    pub fn relay_no(&self, id: RelayId) -> Option<RelayNo> {
        self.relays.iter().position(|relay| relay.id == id)
    }

    /// What the relay is called.
    pub fn relay_name(&self, no: RelayNo) -> String {
        self.state().relays().get(&self.relays[no].id).map_or_else(String::new, |relay| relay.name.clone())
    }

    /// True if the relay runs.
    pub fn relay_up(&self, no: RelayNo) -> bool {
        self.relays[no].is_up()
    }

    /// How many devices the relay forwards for.
    pub fn relay_clients(&self, no: RelayNo) -> usize {
        self.relays[no].core.as_ref().map_or(0, |core| core.stats().clients)
    }

    /// The relay's host goes silent, with all that runs on it.
    pub fn kill_relay(&mut self, no: RelayNo) {
        let server = &mut self.relays[no];
        (server.core, server.silent) = (None, true);
        (server.clients, server.conns) = Default::default();
    }

    /// The relay stands still for so long: what comes in meanwhile is handled afterwards.
    pub fn freeze_relay(&mut self, no: RelayNo, duration: Duration) {
        self.relays[no].frozen = Some(self.now.boot + duration);
    }

    /// Until when what comes to the relay has to wait, if it has.
    fn frozen(&self, no: RelayNo) -> Option<Duration> {
        let until = self.relays[no].frozen.filter(|until| *until > self.now.boot)?;
        Some(until.since(self.now.boot))
    }

    /// The relay's process ends: every connection breaks, and its host refuses new ones.
    pub fn stop_relay(&mut self, no: RelayNo) {
        self.end_relay(no, None);
    }

    /// The relay tells its clients to go elsewhere, and serves on.
    pub fn drain_relay(&mut self, no: RelayNo, after: Duration) {
        if let Some(core) = &mut self.relays[no].core {
            core.drain(after);
        }
        self.drain_relays();
    }

    /// The relay's process ends in good order, and says that it will be back.
    pub fn close_relay(&mut self, no: RelayNo) {
        self.end_relay(no, Some(RefusalCode::ShuttingDown));
    }

    fn end_relay(&mut self, no: RelayNo, why: Option<RefusalCode>) {
        let server = &mut self.relays[no];
        server.core = None;
        let relay = server.id;
        server.clients.clear();
        for (device, dial) in std::mem::take(&mut server.conns).into_keys() {
            self.after(self.way(device, no), Parcel::RelayClosed { device, relay, dial, why });
        }
    }

    /// Starts a relay that remembers nothing.
    pub fn start_relay(&mut self, no: RelayNo) {
        self.start_relay_from(no, self.relay_floor);
    }

    fn start_relay_from(&mut self, no: RelayNo, floor: u64) {
        let network = self.network;
        let netmap_key = self.netmap_key.public();
        let now = self.now.boot;
        let server = &mut self.relays[no];
        server.silent = false;
        let config = relay::Config {
            network,
            relay: server.id,
            cert_sha256: server.cert_sha256,
            netmap_key,
            floor,
            plain_udp: false,
            limits: relay::Limits::default(),
        };
        server.core = Some(Relay::new(config, now));
    }

    /// How long a frame travels between a device and a relay.
    fn way(&self, device: DeviceNo, no: RelayNo) -> Duration {
        STREAM_LATENCY + self.net.distance(self.devices[device].host, self.relays[no].host)
    }

    /// What a device sends to a relay sets out.
    pub(super) fn send_to_relay(&mut self, device: DeviceNo, relay: RelayId, dial: DialNo, frame: Vec<u8>) {
        let Some(no) = self.relay_no(relay).filter(|_| !self.devices[device].is_cut(dial)) else { return };
        self.after(self.way(device, no), Parcel::ToRelay { device, no, dial, frame });
    }

    /// A device begins to connect to a relay.
    pub(super) fn dial_relay(&mut self, device: DeviceNo, relay: RelayId, dial: DialNo) {
        if let Some(no) = self.relay_no(relay) {
            self.after(HANDSHAKE * self.way(device, no), Parcel::DialsRelay { device, no, dial });
        }
    }

    /// A device ends a connection to a relay.
    pub(super) fn hang_up(&mut self, device: DeviceNo, relay: RelayId, dial: DialNo) {
        if let Some(no) = self.relay_no(relay).filter(|_| !self.devices[device].is_cut(dial)) {
            self.after(self.way(device, no), Parcel::HangsUp { device, no, dial });
        }
    }

    pub(super) fn on_dial(&mut self, device: DeviceNo, no: RelayNo, dial: DialNo) {
        if let Some(wait) = self.frozen(no) {
            return self.after(wait, Parcel::DialsRelay { device, no, dial });
        }
        // Given up meanwhile, or begun in a network that it has left.
        let waits = self.devices[device].dials().any(|waiting| waiting == (self.relays[no].id, dial));
        if !waits || self.devices[device].is_cut(dial) {
            return;
        }
        let server = &mut self.relays[no];
        if let Some(core) = &mut server.core {
            let conn = core.handle_connected(self.now, &mut self.rng);
            server.clients.insert(conn, (device, dial));
            server.conns.insert((device, dial), conn);
            self.drain_relays();
        } else if !server.silent {
            let relay = server.id;
            self.after(self.way(device, no), Parcel::RelayClosed { device, relay, dial, why: None });
        }
    }

    pub(super) fn on_frame_to_relay(&mut self, device: DeviceNo, no: RelayNo, dial: DialNo, frame: Vec<u8>) {
        if let Some(wait) = self.frozen(no) {
            return self.after(wait, Parcel::ToRelay { device, no, dial, frame });
        }
        let server = &mut self.relays[no];
        if let (Some(core), Some(conn)) = (&mut server.core, server.conns.get(&(device, dial))) {
            core.handle_frame(*conn, self.now, &frame);
            self.drain_relays();
        }
    }

    pub(super) fn on_hang_up(&mut self, device: DeviceNo, no: RelayNo, dial: DialNo) {
        let server = &mut self.relays[no];
        if let (Some(conn), Some(core)) = (server.forget(device, dial), &mut server.core) {
            core.handle_disconnected(conn);
            self.drain_relays();
        }
    }

    /// Tells every relay that has a session of its own what tokens must have from now on.
    pub(super) fn raise_minimum(&mut self, revision: u64, devices: &[DeviceId], revoked: &[DeviceId]) {
        self.relay_floor = revision;
        let own = self.relays.iter_mut().filter(|server| server.device.is_none());
        for core in own.filter_map(|server| server.core.as_mut()) {
            devices.iter().for_each(|device| core.set_minimum_revision(*device, revision, self.now));
            revoked.iter().for_each(|device| core.revoke(*device, revision, self.now));
        }
        self.drain_relays();
    }

    pub(super) fn relay_timeouts(&mut self) {
        for server in &mut self.relays {
            if let Some(core) = server.core.as_mut()
                && core.poll_timeout().is_some_and(|due| due <= self.now.boot)
            {
                core.handle_timeout(self.now);
            }
        }
        self.drain_relays();
    }

    pub(super) fn drain_relays(&mut self) {
        for no in 0..self.relays.len() {
            while let Some(output) = self.relays[no].core.as_mut().and_then(Relay::poll_output) {
                match output {
                    relay::Output::Wake(conn) => self.deliver_frames(no, conn),
                    relay::Output::Close(conn, why) => {
                        let server = &mut self.relays[no];
                        let Some((device, dial)) = server.clients.remove(&conn) else { continue };
                        server.conns.remove(&(device, dial));
                        let (relay, why) = (server.id, Some(why));
                        self.after(self.way(device, no), Parcel::RelayClosed { device, relay, dial, why });
                    }
                }
            }
        }
    }

    fn deliver_frames(&mut self, no: RelayNo, conn: ConnId) {
        let relay = self.relays[no].id;
        while let Some(frame) = self.relays[no].core.as_mut().and_then(|core| core.next_frame(conn)) {
            if let Some((device, dial)) = self.relays[no].clients.get(&conn).copied() {
                let frame = frame.bytes.to_vec();
                self.after(self.way(device, no), Parcel::FromRelay { device, relay, dial, frame });
            }
        }
    }
}
