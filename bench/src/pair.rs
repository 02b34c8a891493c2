//! Devices that know each other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlSecretKey, NetmapSecretKey, ProbeSecretKey, WgSecretKey};
use warren_common::netmap::{Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::policy::{self, Inventory, Node, Policy};
use warren_common::time::{Now, UnixTime};
use warren_common::wire::control::{NetmapUpdate, UpdateKind};
use warren_engine::engine::{Config, Engine};
use warren_engine::netmap::Identity;

/// The tag that both devices have.
pub const TAG: &str = "tag:bench";
/// The policy that the benchmarks use.
pub const POLICY: &str = include_str!("../policy.hujson");
/// Longer than any benchmark.
const LEASE: Duration = Duration::from_secs(24 * 3600);

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// The first.
    A,
    /// The second.
    B,
}

impl Role {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// Its place among the devices.
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// The id of the device at a place.
pub const fn device_id(index: usize) -> DeviceId {
    DeviceId::from_bytes((index as u128 + 1).to_be_bytes())
}

/// Devices that all know each other, the same on all sides.
#[derive(Debug)]
pub struct Group {
    network: Network,
    signer: NetmapSecretKey,
    devices: Vec<Device>,
    policy: Policy,
    mtu: u16,
    relays: BTreeMap<RelayId, Relay>,
}

#[derive(Debug)]
struct Device {
    addrs: Vec<IpAddr>,
    control: ControlSecretKey,
    wg: WgSecretKey,
    probe: ProbeSecretKey,
}

impl Group {
    /// Devices with these overlay addresses under `policy`; all keys follow from `seed`.
    ///
    /// # Errors
    /// The policy is invalid.
    pub fn new(seed: [u8; 32], addrs: Vec<Vec<IpAddr>>, policy: &str, mtu: u16) -> Result<Self> {
        let mut rng = ChaCha20Rng::from_seed(seed);
        let signer = NetmapSecretKey::generate(&mut rng);
        let mut device = |addrs| Device {
            addrs,
            control: ControlSecretKey::generate(&mut rng),
            wg: WgSecretKey::generate(&mut rng),
            probe: ProbeSecretKey::generate(&mut rng),
        };
        let devices = addrs.into_iter().map(&mut device).collect();
        let policy = Policy::parse(policy).map_err(|found| anyhow!("the policy: {}", lines(&found)))?;
        let network = Network {
            id: NetworkId::from_bytes([7; 16]),
            name: "bench".to_owned(),
            ipv4: "10.99.0.0/16".parse()?,
            ipv6: "fd00:99::/48".parse()?,
        };
        Ok(Self { network, signer, devices, policy, mtu, relays: BTreeMap::new() })
    }

    /// The same, all at home at a relay.
    #[must_use]
    pub fn at_relay(mut self, id: RelayId) -> Self {
        let relay = Relay {
            id,
            name: "relay".to_owned(),
            addrs: Vec::new(),
            stun: Vec::new(),
            cert_sha256: [0; 32],
            peer: false,
        };
        self.relays.insert(id, relay);
        self
    }

    /// The WireGuard key of one of them.
    pub fn wg_key(&self, index: usize) -> Option<&WgSecretKey> {
        self.devices.get(index).map(|device| &device.wg)
    }

    /// The engine of one of them, with its netmap in force.
    ///
    /// # Errors
    /// The policy doesn't fit the devices, or the engine refuses the netmap.
    pub fn engine(&self, index: usize, now: Now, seed: [u8; 32]) -> Result<Engine> {
        let own = self.devices.get(index).context("no such device")?;
        let mut engine = Engine::new(Config {
            identity: Identity {
                network: self.network.id,
                device: device_id(index),
                control: own.control.public(),
                netmap_key: self.signer.public(),
                epoch: 1,
            },
            wg: own.wg.clone(),
            probe: own.probe.clone(),
            seed,
            boot_id: [1; 16],
            mtu: self.mtu,
            handshake_floor: UnixTime::default(),
        });
        let netmap = self.netmap(index, now)?;
        let update = NetmapUpdate {
            network: self.network.id,
            device: device_id(index),
            device_key: own.control.public(),
            epoch: 1,
            from: 0,
            to: 1,
            hash: netmap.hash(),
            lease_ms: LEASE.as_millis() as u64,
            issued: now.unix,
            kind: UpdateKind::Snapshot(Box::new(netmap)),
        };
        let update = engine.check_update(now, &update.sign(&self.signer)).context("the netmap")?;
        engine.apply_update(now, update);
        engine.handle_control_state(now, true);
        Ok(engine)
    }

    fn netmap(&self, index: usize, now: Now) -> Result<Netmap> {
        let node = |(at, device): (usize, &Device)| {
            let node = Node {
                hostname: name(at),
                tags: [TAG.to_owned()].into(),
                ipv4: device.addrs.iter().find(|a| a.is_ipv4()).copied(),
                ipv6: device.addrs.iter().find(|a| a.is_ipv6()).copied(),
                ..Node::default()
            };
            (name(at), node)
        };
        let inventory =
            Inventory { nodes: self.devices.iter().enumerate().map(node).collect(), ..Inventory::default() };
        let compiled = policy::compile(&self.policy, &inventory, now.unix.as_secs(), LEASE.as_secs() as i64)
            .map_err(|found| anyhow!("the policy: {}", lines(&found)))?;
        let peer = |(at, device): (usize, &Device)| {
            let peer = Peer {
                id: device_id(at),
                wg: device.wg.public(),
                probe: device.probe.public(),
                addrs: device.addrs.clone(),
                routes: Vec::new(),
                name: Some(name(at)),
                user: None,
                tags: vec![TAG.to_owned()],
                home_relay: self.relays.keys().next().copied(),
                key_signature: None,
            };
            (device_id(at), peer.into())
        };
        Ok(Netmap {
            network: self.network.clone(),
            device: SelfDevice {
                id: device_id(index),
                name: name(index),
                addrs: self.devices[index].addrs.clone(),
                user: None,
                tags: vec![TAG.to_owned()],
                attrs: Vec::new(),
            },
            peers: self.devices.iter().enumerate().filter(|(at, _)| *at != index).map(peer).collect(),
            ingress: compiled.ingress(&name(index)).into_iter().collect(),
            egress: compiled.egress(&name(index)).into_iter().collect(),
            relays: self.relays.clone(),
            apps: [].into(),
        })
    }
}

fn name(index: usize) -> String {
    format!("device-{index}")
}

/// A seed of the day for one side's own randomness.
pub fn seed_from(number: u64) -> [u8; 32] {
    let mut seed = [0; 32];
    ChaCha20Rng::seed_from_u64(number).fill_bytes(&mut seed);
    seed
}

fn lines(found: &[policy::Diagnostic]) -> String {
    found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
