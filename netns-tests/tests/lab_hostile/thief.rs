//! What somebody can do with a copy of a joined device's state directory: everything that the others do not refuse.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::time::timeout;
use warren_agent::clock;
use warren_agent::control::{ControlClient, ControlConfig, ControlEvent};
use warren_agent::relay_client::{
    REST_AFTER, RelayClient, RelayClientConfig, RelayEvent, RelayEventKind, Transport,
};
use warren_agent::state::{DeviceKeys, Identity, Membership, StateDir};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::ProbeSecretKey;
use warren_common::netmap::{Netmap, Peer, Relay};
use warren_common::wire::control::{
    ClientBody, ConfirmGeneration, RelayTokenRequest, Resume, ServerBody, Signed,
};
use warren_common::wire::relay::{GoneReason, RefusalCode};
use warren_engine::engine::{Config, Engine};
use warren_engine::io::Source;
use warren_engine::netmap::Identity as EngineIdentity;
use warren_engine::wg::{Device, PeerHandle, Received};
use warren_netns_tests::lab::{Host, Stopwatch};
use warren_netns_tests::programs::Agent;

use crate::LIMIT;

/// How long a thief listens for one more answer.
const LISTEN: Duration = Duration::from_millis(100);

/// What lies in a state directory.
pub(crate) struct Loot {
    pub(crate) keys: DeviceKeys,
    pub(crate) identity: Identity,
    pub(crate) membership: Membership,
    pub(crate) network: NetworkId,
    pub(crate) netmap: Netmap,
}

impl Loot {
    /// Copies the state directory of an agent that has joined.
    pub(crate) fn take(agent: &Agent) -> Result<Self> {
        let copy = agent.host.dir().join("loot");
        copy_dir(&agent.state_dir, &copy)?;
        let state = StateDir::open(&copy)?;
        let network = state.settings()?.network.context("the victim has not joined")?;
        let dir = state.network(network)?;
        let (keys, saved) = (dir.keys()?, dir.netmap()?.context("the victim has no netmap")?);
        let identity = dir.identity()?.context("the victim has pinned nobody")?;
        let membership = dir.membership()?.context("the victim is no device")?;
        let mut engine = Engine::new(Config {
            identity: EngineIdentity {
                network,
                device: membership.device,
                control: keys.control.public(),
                netmap_key: identity.netmap,
                epoch: identity.epoch,
            },
            wg: keys.wg.clone(),
            probe: keys.probe.clone(),
            seed: [1; 32],
            boot_id: [0; 16],
            mtu: 1_280,
            handshake_floor: clock::now().unix,
        });
        engine.restore(clock::now(), &saved)?;
        let netmap = engine.netmap().context("a restored netmap")?.clone();
        Ok(Self { keys, identity, membership, network, netmap })
    }

    /// What the device was told of the peer called `name`.
    pub(crate) fn peer(&self, name: &str) -> Result<&Peer> {
        let mut peers = self.netmap.peers.values();
        let peer = peers.find(|p| p.name.as_deref() == Some(name)).map(AsRef::as_ref);
        peer.with_context(|| format!("no peer {name} in the loot"))
    }

    /// What the device was told of the relay called `name`.
    pub(crate) fn relay(&self, name: &str) -> Result<&Relay> {
        let mut relays = self.netmap.relays.values();
        relays.find(|r| r.name == name).with_context(|| format!("no relay {name} in the loot"))
    }
}

/// Copies a directory as it is, modes included.
pub(crate) fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().context("running cp")?;
    ensure!(status.success(), "copying {}", from.display());
    Ok(())
}

/// A runtime whose tasks, and so their sockets, live inside a host.
pub(crate) struct Inside(Runtime);

impl Inside {
    pub(crate) fn new(host: &Host) -> Result<Self> {
        // Threads are born into the namespace of the thread that makes them.
        let runtime = host.enter(|| Builder::new_multi_thread().worker_threads(1).enable_all().build())??;
        Ok(Self(runtime))
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.0
    }

    /// Waits for something that must happen.
    pub(crate) fn wait<T>(&self, what: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
        let patient = async { timeout(LIMIT, future).await };
        self.0
            .block_on(patient)
            .with_context(|| format!("still not: {what}"))?
            .with_context(|| what.to_owned())
    }
}

/// A control session with stolen keys.
pub(crate) struct Session {
    control: ControlClient,
    events: mpsc::Receiver<ControlEvent>,
}

impl Session {
    /// Resumes the device's session, and waits for its netmap.
    pub(crate) fn resume(inside: &Inside, loot: &Loot) -> Result<Self> {
        let (sender, events) = mpsc::channel(64);
        let config = ControlConfig {
            url: loot.identity.url.parse()?,
            network: loot.network,
            root: loot.identity.root,
            min_epoch: loot.identity.epoch,
            secret: loot.keys.control.clone(),
            egress: std::sync::Arc::default(),
        };
        let control = {
            let _inside = inside.runtime().enter();
            ControlClient::spawn(config, sender)
        };
        let mut session = Self { control, events };
        inside.wait("the stolen session stands", async {
            loop {
                match session.events.recv().await.context("the client is gone")? {
                    ControlEvent::Connected(_) => {
                        session.say(ClientBody::Resume(Resume {
                            device: loot.membership.device.to_bytes().to_vec(),
                            generation: loot.membership.generation,
                            epoch: 0,
                            revision: 0,
                            hash: Vec::new(),
                            version: "stolen".to_owned(),
                        }))?;
                    }
                    ControlEvent::Message(ServerBody::Welcome(welcome)) => {
                        let generation = welcome.generation;
                        session.say(ClientBody::ConfirmGeneration(ConfirmGeneration { generation }))?;
                    }
                    ControlEvent::Message(ServerBody::Update(_)) => return Ok(()),
                    ControlEvent::Message(ServerBody::Refused(refused)) => bail!("refused: {refused:?}"),
                    ControlEvent::Away { problem, .. } => bail!("{problem}"),
                    ControlEvent::Message(_) => {}
                }
            }
        })?;
        Ok(session)
    }

    /// A token for a relay, such as the device itself would get.
    pub(crate) fn relay_token(&mut self, inside: &Inside, relay: RelayId) -> Result<Signed> {
        let wanted = relay.to_bytes().to_vec();
        self.say(ClientBody::RelayToken(RelayTokenRequest { relay: wanted.clone() }))?;
        inside.wait("a relay token comes", async {
            loop {
                match self.events.recv().await.context("the client is gone")? {
                    ControlEvent::Message(ServerBody::RelayToken(grant)) if grant.relay == wanted => {
                        return grant.token.context("a grant without a token");
                    }
                    _ => {}
                }
            }
        })
    }

    /// Says anything at all.
    pub(crate) fn say(&self, body: ClientBody) -> Result<()> {
        ensure!(self.control.send(body), "the stolen session takes nothing");
        Ok(())
    }
}

/// A visit to a relay, with any token or none.
pub(crate) struct Visit {
    client: RelayClient,
    events: mpsc::Receiver<RelayEvent>,
}

/// How a visit begins.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Welcome {
    /// The relay carries packets.
    In(Transport),
    /// It does not; with its word for it, if it gave one.
    Out(Option<RefusalCode>),
}

impl Visit {
    /// Knocks. The token is there before the relay asks for it.
    pub(crate) fn start(
        inside: &Inside,
        relay: &Relay,
        network: NetworkId,
        probe: &ProbeSecretKey,
        token: Option<Signed>,
    ) -> Self {
        let (sender, events) = mpsc::channel(256);
        let config = RelayClientConfig {
            relay: relay.clone(),
            network,
            probe: probe.clone(),
            egress: std::sync::Arc::default(),
            own: vec![],
            rest_after: REST_AFTER,
        };
        let _inside = inside.runtime().enter();
        let client = RelayClient::spawn(config, sender);
        if let Some(token) = token {
            client.provide_token(token);
        }
        Self { client, events }
    }

    /// What the relay says first.
    pub(crate) fn welcome(&mut self, inside: &Inside) -> Result<Welcome> {
        inside.wait("the relay decides", async {
            loop {
                match self.events.recv().await.context("the client is gone")?.kind {
                    RelayEventKind::Connected { transport, .. } => return Ok(Welcome::In(transport)),
                    RelayEventKind::Disconnected { refused, .. } => return Ok(Welcome::Out(refused)),
                    _ => {}
                }
            }
        })
    }

    /// What the relay says about a packet to `device`.
    pub(crate) fn refused_to(&mut self, inside: &Inside, device: DeviceId) -> Result<GoneReason> {
        self.client.send(device, b"\x04\0\0\0 to somebody else");
        inside.wait("the relay refuses the packet", async {
            loop {
                match self.events.recv().await.context("the client is gone")?.kind {
                    RelayEventKind::PeerGone { device: gone, why } if gone == device => return Ok(why),
                    RelayEventKind::Disconnected { why, .. } => bail!("disconnected: {why}"),
                    _ => {}
                }
            }
        })
    }

    /// How the relay ends it, and what it then says to the same `token` once more.
    pub(crate) fn cut(
        &mut self,
        inside: &Inside,
        token: &Signed,
    ) -> Result<(Option<RefusalCode>, Option<RefusalCode>)> {
        inside.wait("the relay ends the visit", async {
            let mut ends = Vec::new();
            loop {
                match self.events.recv().await.context("the client is gone")?.kind {
                    RelayEventKind::Disconnected { refused, .. } => ends.push(refused),
                    RelayEventKind::NeedToken => self.client.provide_token(token.clone()),
                    _ => {}
                }
                if let [first, second] = ends[..] {
                    return Ok((first, second));
                }
            }
        })
    }
}

/// How sealed packets get to the victim.
pub(crate) enum Wire<'a> {
    Direct { socket: UdpSocket, to: SocketAddr },
    Relayed { inside: &'a Inside, visit: Visit, to: DeviceId },
}

impl<'a> Wire<'a> {
    /// Straight from `host`.
    pub(crate) fn direct(host: &Host, to: SocketAddr) -> Result<Self> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = host.enter(|| UdpSocket::bind(any))??;
        socket.set_read_timeout(Some(LISTEN))?;
        Ok(Self::Direct { socket, to })
    }

    /// Through a relay that lets `visit` in.
    pub(crate) fn relayed(inside: &'a Inside, mut visit: Visit, to: DeviceId) -> Result<Self> {
        let welcome = visit.welcome(inside)?;
        ensure!(matches!(welcome, Welcome::In(_)), "the relay says {welcome:?}");
        Ok(Self::Relayed { inside, visit, to })
    }

    fn send(&self, datagram: &[u8]) -> Result<()> {
        match self {
            Self::Direct { socket, to } => {
                socket.send_to(datagram, to)?;
            }
            Self::Relayed { visit, to, .. } => {
                visit.client.send(*to, datagram);
            }
        }
        Ok(())
    }

    /// The next datagram, if one comes soon.
    fn receive(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Direct { socket, .. } => {
                let mut buffer = [0; 2_048];
                let len = socket.recv(&mut buffer).ok()?;
                Some(buffer[..len].to_vec())
            }
            Self::Relayed { inside, visit, .. } => inside.runtime().block_on(async {
                let received = async {
                    loop {
                        if let RelayEventKind::Received { payload, .. } = visit.events.recv().await?.kind {
                            return Some(payload.to_vec());
                        }
                    }
                };
                timeout(LISTEN, received).await.ok()?
            }),
        }
    }
}

/// An agent without a filter: WireGuard with stolen keys, and any packet at all inside.
pub(crate) struct Outlaw<'a> {
    wire: Wire<'a>,
    device: Device,
    peer: PeerHandle,
}

impl<'a> Outlaw<'a> {
    pub(crate) fn new(loot: &Loot, peer: &Peer, wire: Wire<'a>) -> Result<Self> {
        let mut device = Device::new(loot.keys.wg.clone(), [9; 32], 0);
        let peer = device.add_peer(peer.wg, None, None)?;
        Ok(Self { wire, device, peer })
    }

    /// Shakes hands; false if the victim does not answer within `limit`.
    pub(crate) fn handshake(&mut self, limit: Duration) -> Result<bool> {
        let watch = Stopwatch::start();
        self.device.initiate(self.peer, clock::now());
        while watch.elapsed() < limit {
            self.flush()?;
            self.take();
            if self.device.has_session(self.peer, clock::now()) {
                return Ok(true);
            }
            self.device.handle_timeout(clock::now());
        }
        Ok(false)
    }

    /// Seals a packet and sends it, whatever it is.
    pub(crate) fn send(&mut self, packet: &[u8]) -> Result<()> {
        let mut out = [0; 2_048];
        let len = self.device.seal(self.peer, clock::now(), packet, &mut out)?;
        self.wire.send(&out[..len])
    }

    /// A packet that the victim sent, if one comes soon.
    pub(crate) fn take(&mut self) -> Option<Vec<u8>> {
        let mut datagram = self.wire.receive()?;
        let from = Source::Direct { socket: 0, remote: SocketAddr::from(([192, 0, 2, 1], 1)) };
        match self.device.handle(clock::now(), from, &mut datagram) {
            Ok(Received::Data { packet, .. }) => Some(datagram[packet].to_vec()),
            _ => None,
        }
    }

    fn flush(&mut self) -> Result<()> {
        let mut out = [0; 2_048];
        while let Some(transmit) = self.device.poll_transmit(clock::now(), &mut out) {
            self.wire.send(&out[..transmit.len])?;
        }
        Ok(())
    }
}
