//! The agent's inside without a coordinator: the whole engine on a hand-made netmap, between a real TUN and a real socket.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand_core::RngCore as _;
use warren_agent::clock;
use warren_agent::entropy::OsEntropy;
use warren_agent::os::tun::Tun;
use warren_agent::os::udp::{self, Batch, ReceiveBuffer, Udp};
use warren_agent::os::{self, HostPlan, Offloads};
use warren_agent::state::StateDir;
use warren_common::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlSecretKey, NetmapSecretKey, ProbeSecretKey, WgPublicKey, WgSecretKey};
use warren_common::netmap::{Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::time::UnixTime;
use warren_common::wire::control::{NetmapUpdate, UpdateKind};
use warren_engine::engine::{Config, Engine};
use warren_engine::io::{Destination, LocalSocket, Outbox, Source, TunOut};
use warren_engine::netmap::Identity;
use warren_engine::queue::MAX_FRAME;
use warren_engine::status::Status;
use warren_netns_tests::lab::Host;

use crate::Stock;

/// Our overlay addresses.
pub(crate) const ADDRS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(100, 64, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1))];

const PORT: u16 = 41_641;
const MTU: u16 = 1_420;
const TUN: &str = "warren0";
const US: DeviceId = DeviceId::from_bytes([1; 16]);
const THEM: DeviceId = DeviceId::from_bytes([2; 16]);
const RELAY: RelayId = RelayId::from_bytes([3; 16]);
/// How often the loop looks whether the test is over.
const TICK: Duration = Duration::from_millis(20);

/// How the engine comes to a way to its peer. A stock peer answers no probes, so it can't be found by those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    /// The peer sends first; the engine answers where that came from.
    ByThem,
    /// The engine sends first: it is told of a relay, and that relay is the peer's own socket.
    ByUs,
}

/// The engine's end.
pub(crate) struct Node<'h> {
    host: &'h Host,
    wg: WgSecretKey,
    netmap: Netmap,
}

impl<'h> Node<'h> {
    pub(crate) fn new(host: &'h Host, key: WgPublicKey, addrs: [IpAddr; 2]) -> Result<Self> {
        let wg = WgSecretKey::generate(&mut OsEntropy);
        let peer = Peer {
            id: THEM,
            wg: key,
            probe: ProbeSecretKey::generate(&mut OsEntropy).public(),
            addrs: addrs.to_vec(),
            routes: Vec::new(),
            name: Some("stock".into()),
            user: None,
            tags: vec!["tag:stock".into()],
            home_relay: Some(RELAY),
            key_signature: None,
        };
        let relay = Relay {
            id: RELAY,
            name: "stock".into(),
            addrs: Vec::new(),
            stun: Vec::new(),
            cert_sha256: [0; 32],
            peer: false,
        };
        let allow = |id: u64, from: &[IpAddr], to: &[IpAddr]| FilterRule {
            id: RuleId(id),
            origin: format!("grants[{id}]"),
            action: Action::Allow,
            staged: false,
            src: from.iter().copied().map(IpRange::from).collect(),
            dst: to.iter().map(|to| FilterDst { net: IpRange::from(*to), ports: PortRange::ALL }).collect(),
            protos: Vec::new(),
            active: None,
        };
        let netmap = Netmap {
            network: Network {
                id: NetworkId::from_bytes([4; 16]),
                name: "interop".into(),
                ipv4: "100.64.0.0/10".parse()?,
                ipv6: "fd00:77::/64".parse()?,
            },
            device: SelfDevice {
                id: US,
                name: "ours".into(),
                addrs: ADDRS.to_vec(),
                user: None,
                tags: vec!["tag:ours".into()],
                attrs: Vec::new(),
            },
            peers: [(THEM, peer.into())].into(),
            ingress: [allow(1, &addrs, &ADDRS)].into(),
            egress: [allow(2, &ADDRS, &addrs)].into(),
            relays: [(RELAY, relay)].into(),
            apps: [].into(),
        };
        Ok(Self { host, wg, netmap })
    }

    pub(crate) fn key(&self) -> WgPublicKey {
        self.wg.public()
    }

    pub(crate) fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.host.v4().into(), PORT)
    }

    /// An engine with the netmap in force, by all the checks that a coordinator's would have to pass.
    fn engine(&self) -> Result<Engine> {
        let (control, signer) =
            (ControlSecretKey::generate(&mut OsEntropy), NetmapSecretKey::generate(&mut OsEntropy));
        let mut seed = [0; 32];
        OsEntropy.fill_bytes(&mut seed);
        let mut engine = Engine::new(Config {
            identity: Identity {
                network: self.netmap.network.id,
                device: US,
                control: control.public(),
                netmap_key: signer.public(),
                epoch: 1,
            },
            wg: self.wg.clone(),
            probe: ProbeSecretKey::generate(&mut OsEntropy),
            seed,
            boot_id: [0; 16],
            mtu: MTU,
            handshake_floor: UnixTime::default(),
        });
        let now = clock::now();
        let update = NetmapUpdate {
            network: self.netmap.network.id,
            device: US,
            device_key: control.public(),
            epoch: 1,
            from: 0,
            to: 1,
            hash: self.netmap.hash(),
            lease_ms: 3_600_000,
            issued: now.unix,
            kind: UpdateKind::Snapshot(Box::new(self.netmap.clone())),
        };
        let update = engine.check_update(now, &update.sign(&signer))?;
        ensure!(engine.apply_update(now, update), "the netmap is in force");
        Ok(engine)
    }

    /// Runs the engine inside the host while `test` runs; what the engine says of itself at the end.
    pub(crate) fn run(
        &self,
        stock: &Stock,
        reached: Reached,
        test: impl FnOnce() -> Result<()>,
    ) -> Result<Status> {
        let (up, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let inside = || -> Result<Status> {
            self.host.enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(self.turn(stock.endpoint(), reached, &up, &over))
            })?
        };
        std::thread::scope(|scope| {
            let engine = scope.spawn(|| {
                let ended = inside();
                up.store(true, Ordering::SeqCst); // also when it failed: nobody waits for it then
                ended
            });
            while !up.load(Ordering::SeqCst) {
                std::thread::sleep(TICK);
            }
            let result = test();
            over.store(true, Ordering::SeqCst);
            let status = engine.join().map_err(|_| anyhow::anyhow!("the engine panicked"))??;
            result.with_context(|| format!("the engine says: {:?}; {:?}", status.peers, status.drops))?;
            Ok(status)
        })
    }

    async fn turn(
        &self,
        stock: SocketAddr,
        reached: Reached,
        up: &AtomicBool,
        over: &AtomicBool,
    ) -> Result<Status> {
        let state = StateDir::open(&self.host.dir().join("state"))?;
        let os = os::Host::open()?;
        let tun = Tun::open(TUN, Offloads::ALL)?;
        let pools = vec![self.netmap.network.ipv4.into(), self.netmap.network.ipv6.into()];
        let plan = HostPlan { tun: TUN.into(), addrs: ADDRS.to_vec(), pools, mtu: MTU.into() };
        os.apply(&plan, &state).await?;
        let sockets = udp::bind(Some(PORT), None, Offloads::ALL)?;
        let socket = sockets.first().context("a socket")?;

        let mut engine = self.engine()?;
        let local = LocalSocket { id: socket.id(), addr: self.endpoint() };
        engine.handle_interfaces(clock::now(), &[local]);
        if reached == Reached::ByUs {
            engine.handle_relay_state(clock::now(), RELAY, true);
        }
        up.store(true, Ordering::SeqCst);

        let mut edge =
            Edge { stock, reached, socket, tun: &tun, outbox: Outbox::new(), packets: packets_for(&tun) };
        let (mut receive, mut frame) = (ReceiveBuffer::default(), vec![0; MAX_FRAME]);
        while !over.load(Ordering::SeqCst) {
            let now = clock::now();
            let due = engine.poll_timeout(now).map_or(TICK, |(at, _)| at.since(now.boot)).min(TICK);
            tokio::select! {
                () = poll_fn(|cx| tun.poll_readable(cx)) => match tun.receive(&mut frame) {
                    Ok(len) if tun.has_virtio_headers() => {
                        engine.handle_tun_frame(clock::now(), &mut frame[..len], false, &mut edge.outbox);
                    }
                    Ok(len) => engine.handle_tun(clock::now(), &frame[..len], &mut edge.outbox),
                    Err(error) => ensure!(error.kind() == ErrorKind::WouldBlock, "TUN: {error}"),
                },
                () = poll_fn(|cx| socket.poll_readable(cx)) => {
                    let now = clock::now();
                    // Errors are about what was sent earlier.
                    let _ = socket.receive(&mut receive, now);
                    for Batch { remote, arrival, slot, len } in receive.batches() {
                        let from = match reached {
                            Reached::ByThem => Source::Direct { socket: socket.id(), remote },
                            Reached::ByUs => Source::Relay { relay: RELAY, device: THEM },
                        };
                        engine.handle_datagrams(now, from, arrival, &mut slot[..len], &mut edge.packets);
                        edge.deliver();
                    }
                }
                () = tokio::time::sleep(due) => engine.handle_timeout(clock::now()),
            }
            edge.drain(&mut engine);
        }
        let status = engine.status(clock::now());
        drop(tun);
        os.restore(&state).await?;
        Ok(status)
    }
}

/// Super-frames where this kernel has them: the far end has none, and its kernel checks every packet.
fn packets_for(tun: &Tun) -> TunOut {
    if tun.has_virtio_headers() { TunOut::vectored(tun.offload()) } else { TunOut::default() }
}

/// Where what the engine gives out goes.
struct Edge<'a> {
    stock: SocketAddr,
    reached: Reached,
    socket: &'a Udp,
    tun: &'a Tun,
    outbox: Outbox,
    packets: TunOut,
}

impl Edge<'_> {
    fn drain(&mut self, engine: &mut Engine) {
        let now = clock::now();
        self.send();
        while engine.poll_transmit(now, &mut self.outbox) {
            self.send();
        }
        self.send();
        while engine.poll_tun(&mut self.packets) {
            self.deliver();
        }
        self.deliver();
        while engine.poll_event().is_some() {}
    }

    fn send(&mut self) {
        for (transmit, bytes) in self.outbox.iter() {
            let to = match (transmit.to, self.reached) {
                (Destination::Direct { remote, .. }, Reached::ByThem) => remote,
                (Destination::Relay { .. }, Reached::ByUs) => self.stock,
                (Destination::Direct { .. }, Reached::ByUs)
                | (Destination::Relay { .. }, Reached::ByThem) => continue,
            };
            // What the network does not take is lost, as on any path.
            let _ = self.socket.send(to, transmit.ecn, bytes, transmit.segment_size);
        }
        self.outbox.clear();
    }

    fn deliver(&mut self) {
        for frame in self.packets.frames() {
            // So is what the TUN does not take.
            let _ = self.tun.send(frame);
        }
        self.packets.clear();
    }
}
