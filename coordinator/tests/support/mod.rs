//! A small agent for tests: real WebSocket, real session, strict about what it accepts. And ways to run a coordinator.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test binary uses a part; a test's helper fails by panicking"
)]

pub mod process;
pub mod repo;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use tokio_util::sync::CancellationToken;
use warren_common::auth_key::AuthKey;
use warren_common::ids::{DeviceId, NetworkId};
use warren_common::keys::{ControlSecretKey, Fingerprint, NetmapSecretKey, ProbeSecretKey, WgSecretKey};
use warren_common::netmap::Netmap;
use warren_common::time::UnixTime;
use warren_common::wire::control::{
    Ack, ClientBody, ClientMessage, ConfirmGeneration, CoordinatorIdentity, Enroll, NetmapUpdate, Ping,
    Refused, Resume, ServerBody, ServerMessage, Signed, UpdateKind, Welcome,
};
use warren_common::wire::session::{ClientHandshake, Session};
use warren_coordinator::admin::{self, Call, Failure};
use warren_coordinator::domain::{Change, Settings, State};
use warren_coordinator::os;
use warren_coordinator::policy_source::Source;
use warren_coordinator::push::{Config, Coordinator};
use warren_coordinator::relays::Relays;
use warren_coordinator::serve::{Options, serve};
use warren_coordinator::server::{Handle, Server};
use warren_coordinator::store::{Commit, Loaded, Store, StoreError};

/// Longer than anything takes on a busy machine: only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A coordinator in this process.
pub struct TestCoordinator {
    pub dir: TempDir,
    pub addr: SocketAddr,
    options: Options,
    stop: CancellationToken,
    task: Option<JoinHandle<Result<(), String>>>,
}

/// A port that was free a moment ago.
pub fn free_addr() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl TestCoordinator {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// Starts with options as `edit` leaves them; paths in them may use the state directory.
    pub async fn start_with(edit: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let addr = free_addr();
        let mut options = Options {
            state_dir: dir.path().join("state"),
            listen: addr,
            public_url: format!("http://{addr}").parse().unwrap(),
            policy: Source::Api,
            database: None,
            tls: None,
            relay: None,
            ipv4_pool: None,
            ipv6_prefix: None,
            network_name: None,
            lease: Duration::from_secs(3_600),
        };
        edit(&mut options);
        let mut this = Self { dir, addr, options, stop: CancellationToken::new(), task: None };
        this.begin().await;
        this
    }

    /// Starts with TLS; the caller checks that it is up.
    pub async fn start_tls(cert: &str, key: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (cert_path, key_path) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        std::fs::write(&cert_path, cert).unwrap();
        std::fs::write(&key_path, key).unwrap();
        Self::start_with(|o| o.tls = Some((cert_path, key_path))).await
    }

    /// A handle whose coordinator has stopped.
    pub fn dead_handle(&self) -> Handle {
        let config =
            Config { netmap_key: NetmapSecretKey::from_bytes([1; 32]), lease: Duration::from_secs(600) };
        let settings = Settings {
            network: NetworkId::from_bytes([1; 16]),
            name: "gone".into(),
            root: Fingerprint::from_bytes([2; 32]),
            ipv4: "100.64.0.0/10".parse().unwrap(),
            ipv6: "fd00::/48".parse().unwrap(),
            epoch: 1,
            revisions_reserved: 0,
        };
        let coordinator = Coordinator::new(config, State::new(settings), os::now());
        Server::new(coordinator, NoStore, 0, Relays::new(None, 1)).1
    }

    /// Starts it again, with the same options as changed by `edit`.
    pub async fn restart_with(&mut self, edit: impl FnOnce(&mut Options)) {
        self.stop().await;
        edit(&mut self.options);
        self.stop = CancellationToken::new();
        self.begin().await;
    }

    pub async fn restart(&mut self) {
        self.restart_with(|_| {}).await;
    }

    async fn begin(&mut self) {
        let (options, stop) = (self.options.clone(), self.stop.clone());
        // On a thread and runtime of its own, as in the binary.
        let mut task = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            runtime.unwrap().block_on(serve(options, stop)).map_err(|e| e.text)
        });
        let addr = self.addr;
        let up = async {
            let tls = self.options.tls.is_some();
            let answers = async || match tls {
                true => TcpStream::connect(addr).await.is_ok(),
                false => http_get(addr, "/healthz").await.is_some_and(|r| r.starts_with("HTTP/1.1 200")),
            };
            while !answers().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            ended = &mut task => panic!("serve ended: {ended:?}"),
            up = tokio::time::timeout(PATIENCE, up) => up.unwrap(),
        }
        self.task = Some(task);
    }

    pub async fn stop(&mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap().unwrap();
        }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.options.state_dir.clone()
    }

    pub async fn call(&self, call: Call) -> Result<Value, Failure> {
        let dir = self.state_dir();
        tokio::task::spawn_blocking(move || admin::call(&dir, &call)).await.unwrap()
    }

    pub async fn auth_key(&self) -> AuthKey {
        self.auth_key_with(&[], false).await
    }

    pub async fn auth_key_with(&self, tags: &[&str], reusable: bool) -> AuthKey {
        let tags = tags.iter().map(|t| (*t).to_owned()).collect();
        let call = Call::AuthKeyCreate { tags, user: None, reusable, ephemeral: false, life_s: None };
        self.call(call).await.unwrap()["key"].as_str().unwrap().parse().unwrap()
    }

    pub async fn set_policy(&self, text: &str) -> Value {
        self.call(Call::PolicySet { text: text.to_owned() }).await.unwrap()
    }

    pub async fn devices(&self) -> Vec<Value> {
        self.call(Call::DeviceList).await.unwrap().as_array().unwrap().clone()
    }
}

/// A store that holds nothing.
struct NoStore;

impl Store for NoStore {
    async fn load(&mut self) -> Result<Option<Loaded>, StoreError> {
        Ok(None)
    }

    async fn commit(&mut self, _: u64, _: &[Change], _: UnixTime) -> Result<Commit, StoreError> {
        Err(StoreError::Unavailable("there is none".into()))
    }

    async fn close(self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl Drop for TestCoordinator {
    fn drop(&mut self) {
        // The test's runtime waits for the coordinator's thread.
        self.stop.cancel();
    }
}

#[expect(clippy::disallowed_methods, reason = "the handle is kept and awaited")]
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(task)
}

/// A plain HTTP request; the whole response as text.
pub async fn http_get(addr: SocketAddr, path: &str) -> Option<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = TcpStream::connect(addr).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut response = String::new();
    stream.read_to_string(&mut response).await.ok()?;
    Some(response)
}

/// Any HTTP request to a coordinator that is up; as much of the response as there is.
pub async fn http_send(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let length = body.len();
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {length}\r\n"
    );
    headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
    request.push_str("\r\n");
    request.push_str(body);
    // Who refuses early may not read it all.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut response = Vec::new();
    let _ = stream.read_to_end(&mut response).await;
    String::from_utf8(response).unwrap()
}

/// A device's secrets.
#[derive(Clone)]
pub struct DeviceKeys {
    pub control: ControlSecretKey,
    pub wg: WgSecretKey,
    pub probe: ProbeSecretKey,
}

impl DeviceKeys {
    pub fn new(seed: u64) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        Self {
            control: ControlSecretKey::generate(&mut rng),
            wg: WgSecretKey::generate(&mut rng),
            probe: ProbeSecretKey::generate(&mut rng),
        }
    }
}

/// What an agent has on disk.
#[derive(Clone, Default)]
pub struct Disk {
    pub device: Option<DeviceId>,
    pub generation: u64,
    pub epoch: u64,
    pub revision: u64,
    pub netmap: Option<Netmap>,
}

/// A test agent with an open session.
pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: Session,
    pub identity: CoordinatorIdentity,
    pub keys: DeviceKeys,
    pub disk: Disk,
    /// Updates as they came: (from, to).
    pub updates: Vec<(u64, u64)>,
}

impl Client {
    /// Connects, checks the coordinator's identity against `root`, and shakes hands.
    pub async fn connect(addr: SocketAddr, root: &Fingerprint, keys: &DeviceKeys) -> Result<Self, String> {
        let (mut socket, _) =
            connect_async(format!("ws://{addr}/control/v1")).await.map_err(|e| e.to_string())?;
        if let MaybeTlsStream::Plain(stream) = socket.get_ref() {
            stream.set_nodelay(true).map_err(|e| e.to_string())?;
        }
        let identity = receive(&mut socket).await.ok_or("no identity")?;
        let identity = Signed::decode(identity.as_slice()).map_err(|e| e.to_string())?;
        let identity = CoordinatorIdentity::verify(&identity, root).map_err(|e| e.to_string())?;
        let mut rng = ChaCha20Rng::from_seed(*keys.control.public().as_bytes());
        let (handshake, hello) =
            ClientHandshake::start(&keys.control, &identity.control, identity.network, &mut rng)
                .map_err(|e| e.to_string())?;
        socket.send(Message::Binary(hello.into())).await.map_err(|e| e.to_string())?;
        let answer = receive(&mut socket).await.ok_or("no answer to the handshake")?;
        let mut session = handshake.finish(&answer).map_err(|e| e.to_string())?;
        session.trust_peer();
        Ok(Self { socket, session, identity, keys: keys.clone(), disk: Disk::default(), updates: Vec::new() })
    }

    pub async fn send(&mut self, body: ClientBody) {
        let message = ClientMessage { body: Some(body) }.encode_to_vec();
        for frame in self.session.seal(&message).unwrap() {
            // The coordinator may have closed; what it said before is still to be read.
            let _ = self.socket.send(Message::Binary(frame.into())).await;
        }
    }

    /// The next message; `None` once the session is closed.
    pub async fn next(&mut self) -> Option<ServerBody> {
        loop {
            let frame = receive(&mut self.socket).await?;
            if let Some(message) = self.session.open(&frame).unwrap() {
                return ServerMessage::decode(message.as_slice()).unwrap().body;
            }
        }
    }

    pub async fn enroll(&mut self, key: &AuthKey, hostname: &str) -> Result<Welcome, Refused> {
        self.send(self.enroll_message(key, hostname)).await;
        self.welcomed().await
    }

    pub fn enroll_message(&self, key: &AuthKey, hostname: &str) -> ClientBody {
        ClientBody::Enroll(Enroll {
            auth_key: key.expose(),
            hostname: hostname.to_owned(),
            wg: self.keys.wg.public().as_bytes().to_vec(),
            probe: self.keys.probe.public().as_bytes().to_vec(),
            os: "linux".to_owned(),
            version: "test".to_owned(),
        })
    }

    pub async fn resume(&mut self, disk: Disk) -> Result<Welcome, Refused> {
        self.disk = disk;
        let resume = Resume {
            device: self.disk.device.unwrap().to_bytes().to_vec(),
            generation: self.disk.generation,
            epoch: self.disk.epoch,
            revision: self.disk.revision,
            hash: self.disk.netmap.as_ref().map_or_else(Vec::new, |n| n.hash().to_vec()),
            version: "test".to_owned(),
        };
        self.send(ClientBody::Resume(resume)).await;
        self.welcomed().await
    }

    async fn welcomed(&mut self) -> Result<Welcome, Refused> {
        match self.next().await {
            Some(ServerBody::Welcome(welcome)) => {
                self.disk.device = DeviceId::from_slice(&welcome.device);
                Ok(welcome)
            }
            Some(ServerBody::Refused(refused)) => Err(refused),
            other => panic!("expected a welcome or a refusal, got {other:?}"),
        }
    }

    /// Keeps the generation of a welcome and says so.
    pub async fn confirm(&mut self, welcome: &Welcome) {
        self.disk.generation = welcome.generation;
        self.send(ClientBody::ConfirmGeneration(ConfirmGeneration { generation: welcome.generation })).await;
    }

    /// Enrols and takes the first snapshot.
    pub async fn join(addr: SocketAddr, key: &AuthKey, seed: u64, hostname: &str) -> Self {
        let mut client = Self::connect(addr, &key.root, &DeviceKeys::new(seed)).await.unwrap();
        let welcome = client.enroll(key, hostname).await.unwrap();
        client.confirm(&welcome).await;
        let update = client.next_update().await;
        assert!(matches!(update.kind, UpdateKind::Snapshot(_)));
        client
    }

    /// Waits for an answer of the coordinator; what comes before it is applied.
    pub async fn ping(&mut self) {
        self.send(ClientBody::Ping(Ping { nonce: 1 })).await;
        while !matches!(self.next_other().await.expect("the session is open"), ServerBody::Pong(_)) {}
    }

    /// The next message that is not an update applied on the way; updates are applied and acknowledged.
    pub async fn next_other(&mut self) -> Option<ServerBody> {
        loop {
            match self.next().await? {
                ServerBody::Update(signed) => {
                    self.apply(&signed).await;
                }
                other => return Some(other),
            }
        }
    }

    /// The next update, applied and acknowledged; other messages on the way are skipped.
    pub async fn next_update(&mut self) -> NetmapUpdate {
        loop {
            match self.next().await.expect("the session is open") {
                ServerBody::Update(signed) => return self.apply(&signed).await,
                ServerBody::Refused(refused) => panic!("refused: {refused:?}"),
                _ => {}
            }
        }
    }

    /// Takes updates until the netmap is as wanted: how many there are on the way depends on when acknowledgements
    /// arrive.
    pub async fn until(&mut self, wanted: impl Fn(&Netmap) -> bool) {
        while !wanted(self.netmap()) {
            self.next_update().await;
        }
    }

    async fn apply(&mut self, signed: &Signed) -> NetmapUpdate {
        let update = NetmapUpdate::verify(signed, &self.identity.netmap).unwrap();
        assert_eq!(Some(update.device), self.disk.device);
        assert_eq!(update.device_key, self.keys.control.public());
        assert!((update.epoch, update.to) >= (self.disk.epoch, self.disk.revision), "an older update");
        let netmap = match &update.kind {
            UpdateKind::Snapshot(netmap) => netmap.as_ref().clone(),
            UpdateKind::Delta(delta) => {
                assert_eq!(update.from, self.disk.revision);
                assert!(update.to > update.from);
                let mut netmap = self.disk.netmap.clone().unwrap();
                netmap.apply(delta.as_ref().clone());
                netmap
            }
            UpdateKind::Lease => {
                assert_eq!((update.from, update.to), (self.disk.revision, self.disk.revision));
                self.disk.netmap.clone().unwrap()
            }
        };
        assert_eq!(netmap.hash(), update.hash, "the agent arrived elsewhere");
        self.updates.push((update.from, update.to));
        self.disk.netmap = Some(netmap);
        self.disk.epoch = update.epoch;
        self.disk.revision = update.to;
        let ack =
            Ack { epoch: update.epoch, revision: update.to, want_snapshot: false, reason: String::new() };
        self.send(ClientBody::Ack(ack)).await;
        update
    }

    pub fn netmap(&self) -> &Netmap {
        self.disk.netmap.as_ref().unwrap()
    }

    pub fn id(&self) -> DeviceId {
        self.disk.device.unwrap()
    }

    /// Closes and waits until the coordinator has seen it.
    pub async fn close(mut self) -> Disk {
        let _ = self.socket.close(None).await;
        while receive(&mut self.socket).await.is_some() {}
        self.disk
    }
}

async fn receive(socket: &mut WebSocketStream<MaybeTlsStream<TcpStream>>) -> Option<Vec<u8>> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let next = tokio::time::timeout_at(deadline, socket.next());
        match next.await.expect("the coordinator answers")?.ok()? {
            Message::Binary(bytes) => return Some(bytes.to_vec()),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}
