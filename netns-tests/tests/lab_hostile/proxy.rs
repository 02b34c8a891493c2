//! A machine in the middle of the control session: it ends the WebSocket (as a proxy that ends TLS does), so it sees and
//! can change every message.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, accept_hdr_async, connect_async};
use warren_agent::entropy::OsEntropy;
use warren_common::auth_key::AuthKey;
use warren_common::keys::{ControlSecretKey, NetmapSecretKey, RootSecretKey};
use warren_common::wire::control::{CoordinatorIdentity, Signed};
use warren_common::wire::session;
use warren_netns_tests::lab::Host;

use crate::thief::Inside;

const PORT: u16 = 8080;
/// Messages of the handshake that a coordinator sends: its identity, and the answer.
const HANDSHAKE: usize = 2;

type Victim = WebSocketStream<TcpStream>;
type Upstream = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What the machine does with those who connect from now on.
#[derive(Clone)]
pub(crate) enum Conduct {
    /// Passes everything on.
    Pass,
    /// Passes on what agents say and, after the handshake, nothing of what they are answered.
    DropAnswers,
    /// Changes one bit of everything that a coordinator says after the handshake.
    FlipBits,
    /// Is the coordinator, with a document of this kind and keys of its own.
    Pose(Document),
    /// Says what a coordinator said to somebody before.
    Replay,
}

/// The identity shown by a machine that poses as the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// The real one, although it vouches for another key.
    Real,
    /// The real one with the machine's own key in it: the signature is wrong.
    Patched,
    /// The real names and root key, signed with another root key.
    ForgedSignature,
    /// Everything of its own but the network's id, well signed.
    Own,
}

/// What the machine has seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// Requests and messages of agents, and what could be opened of them.
    pub(crate) from_agents: Vec<Vec<u8>>,
    /// Messages of coordinators.
    pub(crate) from_coordinators: Vec<Vec<u8>>,
}

/// A running machine in the middle.
pub(crate) struct Middle {
    inside: Inside,
    /// Where agents think that the coordinator is.
    pub(crate) url: String,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    key: AuthKey,
    conduct: Mutex<Conduct>,
    seen: Mutex<Seen>,
    sessions: Mutex<JoinSet<Result<()>>>,
}

impl Middle {
    /// Stands on `host` in front of the coordinator at `upstream`; `key` tells it which network it is.
    pub(crate) fn start(host: &Host, upstream: &str, key: &AuthKey, conduct: Conduct) -> Result<Self> {
        let inside = Inside::new(host)?;
        let shared = Arc::new(Shared {
            upstream: upstream.replacen("http", "ws", 1),
            key: key.clone(),
            conduct: Mutex::new(conduct),
            seen: Mutex::default(),
            sessions: Mutex::default(),
        });
        let address = SocketAddr::from((host.v4(), PORT));
        let listener = inside.runtime().block_on(inside.runtime().spawn(TcpListener::bind(address)))??;
        let accepting = shared.clone();
        inside.runtime().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = accepting.clone();
                lock(&accepting.sessions).spawn(async move { shared.session(stream).await });
            }
        });
        Ok(Self { inside, url: format!("http://{address}"), shared })
    }

    /// Behaves otherwise from now on; sessions that stand are cut.
    pub(crate) fn behave(&self, conduct: Conduct) {
        *lock(&self.shared.conduct) = conduct;
        let mut sessions = std::mem::take(&mut *lock(&self.shared.sessions));
        self.inside.runtime().block_on(sessions.shutdown());
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.shared.seen)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn dial(url: &str) -> Result<Upstream> {
    Ok(connect_async(url).await.context("dialling the coordinator")?.0)
}

impl Shared {
    async fn session(&self, stream: TcpStream) -> Result<()> {
        let path = Mutex::new(String::new());
        #[expect(clippy::result_large_err, reason = "the library's callback")]
        let note = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
            self.saw_agent(format!("{request:?}").as_bytes());
            *lock(&path) = request.uri().path().to_owned();
            Ok(response)
        };
        let victim = accept_hdr_async(stream, note).await?;
        // Agents and relays ask for different ones.
        let url = format!("{}{}", self.upstream, lock(&path));
        let conduct = lock(&self.conduct).clone();
        match conduct {
            Conduct::Pass => self.pass(&url, victim, |_, message| Some(message)).await,
            Conduct::DropAnswers => {
                self.pass(&url, victim, |n, message| (n < HANDSHAKE).then_some(message)).await
            }
            Conduct::FlipBits => {
                let flip = |n, mut message: Vec<u8>| {
                    if n >= HANDSHAKE
                        && let Some(last) = message.last_mut()
                    {
                        *last ^= 1;
                    }
                    Some(message)
                };
                self.pass(&url, victim, flip).await
            }
            Conduct::Pose(document) => self.pose(&url, victim, document).await,
            Conduct::Replay => self.replay(victim).await,
        }
    }

    /// Passes messages on; `answer` says what becomes of the coordinator's n-th one.
    async fn pass(
        &self,
        url: &str,
        mut victim: Victim,
        answer: impl Fn(usize, Vec<u8>) -> Option<Vec<u8>>,
    ) -> Result<()> {
        let mut upstream = dial(url).await?;
        let mut answers = 0;
        loop {
            tokio::select! {
                said = victim.next() => match said.context("the agent is gone")?? {
                    Message::Binary(bytes) => {
                        self.saw_agent(&bytes);
                        upstream.send(Message::Binary(bytes)).await?;
                    }
                    Message::Close(_) => bail!("the agent closes"),
                    _ => {}
                },
                said = upstream.next() => match said.context("the coordinator is gone")?? {
                    Message::Binary(bytes) => {
                        self.saw_coordinator(&bytes);
                        if let Some(bytes) = answer(answers, bytes.to_vec()) {
                            victim.send(Message::binary(bytes)).await?;
                        }
                        answers += 1;
                    }
                    Message::Close(frame) => {
                        victim.send(Message::Close(frame)).await?;
                        bail!("the coordinator closes");
                    }
                    _ => {}
                },
            }
        }
    }

    /// Ends the session itself, with a key of its own.
    async fn pose(&self, url: &str, mut victim: Victim, document: Document) -> Result<()> {
        let (root, control) =
            (RootSecretKey::generate(&mut OsEntropy), ControlSecretKey::generate(&mut OsEntropy));
        let shown = self.document(url, document, &root, &control).await?;
        victim.send(Message::binary(shown)).await?;
        let hello = self.hear(&mut victim).await?;
        match session::accept(&control, self.key.network, &hello, &mut OsEntropy) {
            Ok((mut session, _, answer)) => {
                victim.send(Message::binary(answer)).await?;
                loop {
                    let frame = self.hear(&mut victim).await?;
                    if let Some(message) = session.open(&frame)? {
                        self.saw_agent(&message);
                    }
                }
            }
            Err(_) => {
                // As long as a real answer; perhaps the agent does not look.
                victim.send(Message::binary(vec![0x5a; 50])).await?;
                loop {
                    self.hear(&mut victim).await?;
                }
            }
        }
    }

    async fn document(
        &self,
        url: &str,
        kind: Document,
        root: &RootSecretKey,
        control: &ControlSecretKey,
    ) -> Result<Vec<u8>> {
        let real = match dial(url).await?.next().await.context("an identity")?? {
            Message::Binary(bytes) => bytes.to_vec(),
            other => bail!("not an identity: {other:?}"),
        };
        self.saw_coordinator(&real);
        let mut signed = Signed::decode(real.as_slice())?;
        let identity = CoordinatorIdentity::verify(&signed, &self.key.root)?;
        match kind {
            Document::Real => {}
            Document::Patched => {
                let (old, new) = (*identity.control.as_bytes(), control.public());
                let at = signed.payload.windows(old.len()).position(|w| w == old).context("a control key")?;
                signed.payload[at..at + old.len()].copy_from_slice(new.as_bytes());
            }
            Document::ForgedSignature => {
                signed = CoordinatorIdentity { control: control.public(), ..identity }.sign(root);
            }
            Document::Own => {
                let netmap = NetmapSecretKey::generate(&mut OsEntropy).public();
                let own = CoordinatorIdentity {
                    root: root.public(),
                    control: control.public(),
                    netmap,
                    ..identity
                };
                signed = own.sign(root);
            }
        }
        Ok(signed.encode_to_vec())
    }

    /// Plays a record: what coordinators said so far, in order.
    async fn replay(&self, mut victim: Victim) -> Result<()> {
        let record = lock(&self.seen).from_coordinators.clone();
        ensure!(record.len() > HANDSHAKE, "nothing was recorded");
        for message in record {
            victim.send(Message::binary(message)).await?;
        }
        loop {
            self.hear(&mut victim).await?;
        }
    }

    async fn hear(&self, victim: &mut Victim) -> Result<Vec<u8>> {
        loop {
            match victim.next().await.context("the agent is gone")?? {
                Message::Binary(bytes) => {
                    self.saw_agent(&bytes);
                    return Ok(bytes.to_vec());
                }
                Message::Close(_) => bail!("the agent closes"),
                _ => {}
            }
        }
    }

    fn saw_agent(&self, bytes: &[u8]) {
        lock(&self.seen).from_agents.push(bytes.to_vec());
    }

    fn saw_coordinator(&self, bytes: &[u8]) {
        lock(&self.seen).from_coordinators.push(bytes.to_vec());
    }
}
