//! A coordinator made of the shared session code: says what a test tells it to, remembers what it hears.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use warren_agent::clock;
use warren_agent::entropy::OsEntropy;
use warren_common::auth_key::{AuthKey, AuthKeySecret};
use warren_common::ids::{AuthKeyId, DeviceId, NetworkId};
use warren_common::keys::{ControlPublicKey, ControlSecretKey, NetmapSecretKey, RootSecretKey};
use warren_common::netmap::{Netmap, Network, Peer, SelfDevice};
use warren_common::wire::control::{
    Ack, ClientBody, ClientMessage, CoordinatorIdentity, NetmapUpdate, Pong, Refused, RuleOrigin,
    RuleOrigins, ServerBody, ServerMessage, Signed, UpdateKind, Welcome,
};
use warren_common::wire::session;

pub(crate) const NETWORK: NetworkId = NetworkId::from_bytes([3; 16]);
pub(crate) const DEVICE: DeviceId = DeviceId::from_bytes([4; 16]);

/// What the coordinator knows and does.
#[derive(Clone)]
pub(crate) struct Fake {
    root: RootSecretKey,
    control: ControlSecretKey,
    netmap_key: NetmapSecretKey,
    /// The control key that its identity document names.
    shown: ControlPublicKey,
    world: Arc<Mutex<World>>,
}

pub(crate) struct World {
    pub(crate) epoch: u64,
    pub(crate) revision: u64,
    pub(crate) netmap: Netmap,
    /// Signs the updates that sessions begin with, in place of the network's key.
    pub(crate) signer: Option<NetmapSecretKey>,
    /// Refuse every session with this code.
    pub(crate) refuse: Option<&'static str>,
    /// Added to the clock it shows.
    pub(crate) clock_offset: Duration,
    /// Where rules stand in the policy now; it doesn't say if absent.
    pub(crate) origins: Option<BTreeMap<u64, String>>,
    pub(crate) heard: Vec<ClientBody>,
    generation: u64,
    device_key: Option<ControlPublicKey>,
    push: Option<mpsc::UnboundedSender<ServerBody>>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let world = World {
            epoch: 1,
            revision: 1,
            netmap: netmap(),
            signer: None,
            refuse: None,
            clock_offset: Duration::ZERO,
            origins: None,
            heard: Vec::new(),
            generation: 0,
            device_key: None,
            push: None,
        };
        let control = ControlSecretKey::generate(&mut OsEntropy);
        Self {
            root: RootSecretKey::generate(&mut OsEntropy),
            shown: control.public(),
            control,
            netmap_key: NetmapSecretKey::generate(&mut OsEntropy),
            world: Arc::new(Mutex::new(world)),
        }
    }

    /// Shows the same identity and does not hold its key: who has copied what a coordinator shows.
    pub(crate) fn impostor(&self) -> Self {
        Self { control: ControlSecretKey::generate(&mut OsEntropy), ..self.clone() }
    }

    pub(crate) fn fingerprint(&self) -> String {
        self.root.public().fingerprint().to_string()
    }

    pub(crate) fn auth_key(&self) -> String {
        AuthKey {
            network: NETWORK,
            root: self.root.public().fingerprint(),
            id: AuthKeyId::from_bytes([9; 16]),
            secret: AuthKeySecret::generate(&mut OsEntropy),
        }
        .expose()
    }

    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut World) -> T) -> T {
        f(&mut self.world.lock().unwrap())
    }

    pub(crate) fn acks(&self) -> Vec<Ack> {
        self.with(|w| {
            let acks = w.heard.iter().filter_map(|b| match b {
                ClientBody::Ack(ack) => Some(ack.clone()),
                _ => None,
            });
            acks.collect()
        })
    }

    /// A snapshot of the netmap as it is, at `revision`, signed.
    pub(crate) fn snapshot(&self, revision: u64) -> Signed {
        let netmap = self.with(|w| w.netmap.clone());
        self.sign(&self.update(revision, netmap))
    }

    /// A snapshot of `netmap` at `revision`, not signed yet.
    pub(crate) fn update(&self, revision: u64, netmap: Netmap) -> NetmapUpdate {
        let world = self.world.lock().unwrap();
        NetmapUpdate {
            network: NETWORK,
            device: DEVICE,
            device_key: world.device_key.unwrap(),
            epoch: world.epoch,
            from: 0,
            to: revision,
            hash: netmap.hash(),
            lease_ms: 3_600_000,
            issued: clock::now().unix,
            kind: UpdateKind::Snapshot(Box::new(netmap)),
        }
    }

    pub(crate) fn sign(&self, update: &NetmapUpdate) -> Signed {
        update.sign(&self.netmap_key)
    }

    /// Sends to the session that stands.
    pub(crate) fn push(&self, update: Signed) {
        self.with(|w| w.push.as_ref().unwrap().send(ServerBody::Update(update)).unwrap());
    }

    /// Serves on a free port of `listener` until dropped.
    pub(crate) fn serve(&self, listener: TcpListener) -> JoinSet<()> {
        let mut set = JoinSet::new();
        let fake = self.clone();
        set.spawn(async move {
            let mut sessions = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let fake = fake.clone();
                sessions.spawn(async move {
                    fake.session(stream).await;
                });
            }
        });
        set
    }

    /// One session, until it ends.
    pub(crate) async fn session(&self, stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<()> {
        let mut socket = tokio_tungstenite::accept_async(stream).await.ok()?;
        let identity = CoordinatorIdentity {
            network: NETWORK,
            network_name: "acme".into(),
            root: self.root.public(),
            control: self.shown,
            netmap: self.netmap_key.public(),
            epoch: self.with(|w| w.epoch),
        };
        socket.send(Message::binary(identity.sign(&self.root).encode_to_vec())).await.ok()?;
        let hello = socket.next().await?.ok()?.into_data();
        let (mut session, peer, answer) =
            session::accept(&self.control, NETWORK, &hello, &mut OsEntropy).ok()?;
        socket.send(Message::binary(answer)).await.ok()?;
        let (push, mut pushed) = mpsc::unbounded_channel();
        self.with(|w| {
            w.device_key = Some(peer);
            w.push = Some(push.clone());
        });
        loop {
            tokio::select! {
                body = pushed.recv() => {
                    let message = ServerMessage { body }.encode_to_vec();
                    for frame in session.seal(&message).unwrap() {
                        socket.send(Message::binary(frame)).await.ok()?;
                    }
                }
                frame = socket.next() => {
                    let Message::Binary(frame) = frame?.ok()? else { return None };
                    let Some(bytes) = session.open(&frame).unwrap() else { continue };
                    let body = ClientMessage::decode(bytes.as_slice()).unwrap().body?;
                    self.answer(body, &push);
                }
            }
        }
    }

    fn answer(&self, body: ClientBody, push: &mpsc::UnboundedSender<ServerBody>) {
        let unix = self.with(|w| {
            w.heard.push(body.clone());
            (clock::now().unix + w.clock_offset).as_micros()
        });
        let reply = match body {
            ClientBody::Enroll(_) | ClientBody::Resume(_) => self.with(|w| match w.refuse {
                Some(code) => ServerBody::Refused(Refused {
                    code: code.into(),
                    text: format!("refused: {code}"),
                    fix: "do something".into(),
                }),
                None => {
                    w.generation += 1;
                    ServerBody::Welcome(Welcome {
                        device: DEVICE.to_bytes().to_vec(),
                        generation: w.generation,
                        unix_us: unix,
                    })
                }
            }),
            ClientBody::ConfirmGeneration(_) => {
                let (revision, netmap, signer) =
                    self.with(|w| (w.revision, w.netmap.clone(), w.signer.clone()));
                let signer = signer.unwrap_or_else(|| self.netmap_key.clone());
                ServerBody::Update(self.update(revision, netmap).sign(&signer))
            }
            ClientBody::RuleOrigins(ask) => match self.with(|w| w.origins.clone()) {
                Some(origins) => {
                    let rules = ask.rules.iter().filter_map(|rule| {
                        Some(RuleOrigin { rule: *rule, origin: origins.get(rule)?.clone() })
                    });
                    ServerBody::RuleOrigins(RuleOrigins { nonce: ask.nonce, rules: rules.collect() })
                }
                None => return,
            },
            ClientBody::Ping(ping) => ServerBody::Pong(Pong { nonce: ping.nonce, unix_us: unix }),
            _ => return,
        };
        // The session may just have ended.
        let _ = push.send(reply);
    }
}

fn netmap() -> Netmap {
    let peer = Peer {
        id: DeviceId::from_bytes([5; 16]),
        wg: warren_common::keys::WgSecretKey::generate(&mut OsEntropy).public(),
        probe: warren_common::keys::ProbeSecretKey::generate(&mut OsEntropy).public(),
        addrs: vec!["100.64.0.2".parse().unwrap()],
        routes: Vec::new(),
        name: Some("db1".into()),
        user: None,
        tags: vec!["tag:db".into()],
        home_relay: None,
        key_signature: None,
    };
    Netmap {
        network: Network {
            id: NETWORK,
            name: "acme".into(),
            ipv4: "100.64.0.0/16".parse().unwrap(),
            ipv6: "fd00:77::/64".parse().unwrap(),
        },
        device: SelfDevice {
            id: DEVICE,
            name: "laptop".into(),
            addrs: vec!["100.64.0.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
            user: Some("ann@example.com".into()),
            tags: Vec::new(),
            attrs: Vec::new(),
        },
        peers: BTreeMap::from([(peer.id, peer.into())]),
        ingress: BTreeSet::new(),
        egress: BTreeSet::new(),
        relays: BTreeMap::new(),
        apps: BTreeSet::new(),
    }
}
