//! A relay of its own against a coordinator that speaks just enough: welcome, commands, refusals.

use std::time::Duration;

use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};
use tokio_util::sync::CancellationToken;
use warren_common::keys::{ControlPublicKey, ControlSecretKey, NetmapSecretKey, RootSecretKey};
use warren_common::wire::control::{CoordinatorIdentity, Refused};
use warren_common::wire::relay::RefusalCode;
use warren_common::wire::relay_control::{
    MinimumRevision, RelayBody, RelayCommand, RelayHello, RelayJoinKey, RelayJoinSecret, RelayMessage,
    RelayReport, RelayServerBody, RelayServerMessage, RelayWelcome,
};
use warren_common::wire::session::{Session, accept};
use warren_relay::core::Limits;
use warren_relay::join::{JoinConfig, JoinError, run};
use warren_relay::observe::Observed;

use crate::support::{
    Device, Seen, Transport, coordinator, device, network, patient, probe, relay_id, token,
};

const SECRET: [u8; 32] = [6; 32];

struct Coordinator {
    listener: TcpListener,
    netmap: NetmapSecretKey,
    rng: ChaCha20Rng,
}

struct RelaySession {
    socket: WebSocketStream<TcpStream>,
    session: Session,
    key: ControlPublicKey,
}

fn root() -> RootSecretKey {
    RootSecretKey::from_bytes([8; 32])
}

fn join_key() -> RelayJoinKey {
    RelayJoinKey {
        network: network(),
        root: root().public().fingerprint(),
        relay: relay_id(),
        secret: RelayJoinSecret::from_slice(&SECRET).unwrap(),
    }
}

impl Coordinator {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { listener, netmap: coordinator(), rng: ChaCha20Rng::seed_from_u64(1) }
    }

    fn config(&self, dir: &tempfile::TempDir, join_key: Option<RelayJoinKey>) -> JoinConfig {
        JoinConfig {
            coordinator: format!("http://{}", self.listener.local_addr().unwrap()).parse().unwrap(),
            join_key,
            state_dir: dir.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            stun_listen: Some("127.0.0.1:0".parse().unwrap()),
            stun_second: None,
            advertise: Vec::new(),
            advertise_stun: Vec::new(),
            drain: Duration::ZERO,
            limits: Limits::default(),
        }
    }

    /// The next relay, up to its hello.
    async fn accept(&mut self) -> (RelaySession, RelayHello) {
        let (stream, _) = patient(self.listener.accept()).await.unwrap();
        let mut socket = accept_async(stream).await.unwrap();
        let control = ControlSecretKey::from_bytes([9; 32]);
        let identity = CoordinatorIdentity {
            network: network(),
            network_name: "test".into(),
            root: root().public(),
            control: control.public(),
            netmap: self.netmap.public(),
            epoch: 1,
        };
        let signed = identity.sign(&root()).encode_to_vec();
        socket.send(Message::binary(signed)).await.unwrap();
        let hello = frame(&mut socket).await;
        let (session, key, answer) = accept(&control, network(), &hello, &mut self.rng).unwrap();
        socket.send(Message::binary(answer)).await.unwrap();
        let mut relay = RelaySession { socket, session, key };
        let RelayBody::Hello(hello) = relay.receive().await else { panic!("no hello") };
        (relay, hello)
    }

    /// The next relay, welcomed, and its report.
    async fn welcome(&mut self, floor: u64) -> (RelaySession, RelayHello, RelayReport) {
        let (mut relay, hello) = self.accept().await;
        let welcome = RelayWelcome { name: "r".into(), floor, unix_us: 0 };
        relay.send(RelayServerBody::Welcome(welcome)).await;
        let RelayBody::Report(report) = relay.receive().await else { panic!("no report") };
        (relay, hello, report)
    }
}

impl RelaySession {
    async fn receive(&mut self) -> RelayBody {
        loop {
            let bytes = frame(&mut self.socket).await;
            if let Some(message) = self.session.open(&bytes).unwrap() {
                return RelayMessage::decode(message.as_slice()).unwrap().body.unwrap();
            }
        }
    }

    async fn send(&mut self, body: RelayServerBody) {
        let message = RelayServerMessage { body: Some(body) }.encode_to_vec();
        for frame in self.session.seal(&message).unwrap() {
            self.socket.send(Message::binary(frame)).await.unwrap();
        }
    }

    /// Sends a command and waits until it is obeyed.
    async fn command(&mut self, command: RelayCommand) {
        let revision = command.revision;
        self.send(RelayServerBody::Command(command)).await;
        let RelayBody::Ack(ack) = self.receive().await else { panic!("no ack") };
        assert_eq!(ack.revision, revision);
    }
}

async fn frame(socket: &mut WebSocketStream<TcpStream>) -> tokio_tungstenite::tungstenite::Bytes {
    loop {
        match patient(socket.next()).await {
            Some(Ok(Message::Binary(bytes))) => return bytes,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn spawn(config: JoinConfig) -> (JoinHandle<Result<(), JoinError>>, CancellationToken) {
    let stop = CancellationToken::new();
    #[expect(clippy::disallowed_methods, reason = "a test waits for its end or aborts with its runtime")]
    let task = tokio::task::spawn(run(config, stop.clone(), Observed::default()));
    (task, stop)
}

fn address(report: &RelayReport) -> (SocketAddr, [u8; 32]) {
    let addr: SocketAddr = report.addrs[0].parse().unwrap();
    assert_eq!(u32::from(addr.port()), report.port);
    assert_eq!(report.stun[0].parse::<SocketAddr>().unwrap().port(), report.stun_port as u16);
    (addr, report.cert_sha256.as_slice().try_into().unwrap())
}

#[tokio::test]
async fn joins_serves_obeys_and_comes_back_without_its_key() {
    let mut coordinator = Coordinator::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (task, stop) = spawn(coordinator.config(&dir, Some(join_key())));
    let (mut relay, hello, report) = coordinator.welcome(1).await;
    assert_eq!((hello.secret.as_slice(), hello.revision), (&SECRET[..], 0));
    assert_eq!(hello.relay, relay_id().to_bytes());
    let (addr, cert) = address(&report);
    let key = relay.key;

    let mut a = Device::join_at(addr, cert, Transport::Quic, 1, &[2]).await;
    let mut b = Device::join_at(addr, cert, Transport::WebSocket, 2, &[1]).await;
    a.send(2, b"hello").await;
    assert_eq!(b.receive().await, (device(1), b"hello".to_vec()));
    relay
        .command(RelayCommand {
            revision: 5,
            minimums: vec![MinimumRevision { device: device(2).to_bytes().to_vec(), revision: 5 }],
            revoked: vec![device(1).to_bytes().to_vec()],
            floor: 0,
        })
        .await;
    assert_eq!(a.end().await, Some(RefusalCode::Revoked));

    // The coordinator goes away; the relay stays and comes back, saying what it knows.
    drop(relay);
    let (mut relay, hello, again) = coordinator.welcome(0).await;
    assert_eq!((hello.secret.as_slice(), hello.revision), (&[][..], 5));
    assert_eq!(again, report);
    relay.command(RelayCommand { revision: 6, floor: 6, ..RelayCommand::default() }).await;
    let mut c = Device::connect_at(addr, cert, Transport::WebSocket).await;
    assert_eq!(
        c.authenticate(&token(3, 5, &[]), &probe(3)).await,
        Seen::Closed(Some(RefusalCode::TokenStale))
    );
    stop.cancel();
    task.await.unwrap().unwrap();

    // A restart: the same relay and certificate, no key needed.
    let (task, stop) = spawn(coordinator.config(&dir, None));
    let (relay, hello, report) = coordinator.welcome(7).await;
    assert_eq!((hello.secret.len(), hello.revision, relay.key), (0, 0, key));
    assert_eq!(address(&report).1, cert);
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn another_netmap_key_replaces_the_server() {
    let mut coordinator = Coordinator::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (task, stop) = spawn(coordinator.config(&dir, Some(join_key())));
    let (relay, _, report) = coordinator.welcome(1).await;
    let (addr, cert) = address(&report);
    let mut a = Device::join_at(addr, cert, Transport::WebSocket, 1, &[]).await;
    drop(relay);
    coordinator.netmap = NetmapSecretKey::from_bytes([78; 32]);
    let (_relay, _, again) = coordinator.welcome(1).await;
    assert_eq!(a.end().await, Some(RefusalCode::ShuttingDown));
    assert_eq!(address(&again).0, addr);
    let mut a = Device::connect_at(addr, cert, Transport::WebSocket).await;
    let seen = a.authenticate(&token(1, 1, &[]), &probe(1)).await;
    assert_eq!(seen, Seen::Closed(Some(RefusalCode::TokenInvalid)), "signed with the old key");
    stop.cancel();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refusal_ends_it_with_the_reason() {
    let mut coordinator = Coordinator::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (task, _stop) = spawn(coordinator.config(&dir, Some(join_key())));
    let (mut relay, _) = coordinator.accept().await;
    let refused =
        Refused { code: "auth-key-used".into(), text: "the key is used".into(), fix: "make another".into() };
    relay.send(RelayServerBody::Refused(refused)).await;
    let error = patient(task).await.unwrap().unwrap_err();
    assert!(matches!(&error, JoinError::Refused { code, .. } if code == "auth-key-used"), "{error}");
    assert!(error.to_string().contains("make another"));
}

#[tokio::test]
async fn another_coordinator_gets_neither_key_nor_secret() {
    let mut coordinator = Coordinator::new().await;
    let dir = tempfile::tempdir().unwrap();
    let other =
        RelayJoinKey { root: RootSecretKey::from_bytes([1; 32]).public().fingerprint(), ..join_key() };
    let (task, _stop) = spawn(coordinator.config(&dir, Some(other)));
    let (stream, _) = patient(coordinator.listener.accept()).await.unwrap();
    let mut socket = accept_async(stream).await.unwrap();
    let identity = CoordinatorIdentity {
        network: network(),
        network_name: "test".into(),
        root: root().public(),
        control: ControlSecretKey::generate(&mut coordinator.rng).public(),
        netmap: coordinator.netmap.public(),
        epoch: 1,
    };
    socket.send(Message::binary(identity.sign(&root()).encode_to_vec())).await.unwrap();
    let error = patient(task).await.unwrap().unwrap_err();
    assert!(matches!(error, JoinError::WrongCoordinator { .. }), "{error}");
    // It says nothing more: no handshake, no hello.
    assert!(!matches!(patient(socket.next()).await, Some(Ok(Message::Binary(_)))));
}
