//! One control session: WebSocket, identity, handshake, sealed messages.

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use warren_common::keys::Fingerprint;
use warren_common::url::CoordinatorUrl;
use warren_common::wire::control::{CoordinatorIdentity, Signed};
use warren_common::wire::session::{ClientHandshake, Session};

use super::ControlConfig;
use super::transport::{Stream, dial};
use crate::egress::Egress;
use crate::entropy::OsEntropy;
use crate::problem::Problem;

/// Where the control session is, below the coordinator's URL.
const PATH: &str = "/control/v1";
/// Longest WebSocket message, in bytes: one Noise message (65 535) and room for the identity document.
pub(super) const MAX_FRAME: usize = 1 << 17;
/// Read buffer of the WebSocket: its default of 128 KiB is not worth its memory here.
const READ_BUFFER: usize = 8 << 10;

/// Why no session came to be.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) problem: Problem,
    pub(super) permanent: bool,
}

impl Failure {
    pub(super) fn permanent(problem: Problem) -> Self {
        Self { problem, permanent: true }
    }

    pub(super) fn transient(problem: Problem) -> Self {
        Self { problem, permanent: false }
    }
}

/// The coordinator was or is out of reach.
pub(super) fn away(url: &CoordinatorUrl, why: &str) -> Problem {
    Problem::new(
        "coordinator-away",
        format!("no session with the coordinator at `{url}`: {why}"),
        "check that it runs and can be reached; the agent keeps trying, and what is allowed goes on until the lease ends",
    )
}

/// An established session.
pub(super) struct Link {
    socket: WebSocketStream<Stream>,
    session: Session,
}

/// Asks who answers at `url`, says nothing of ourselves and hangs up. Without `root`, whichever root key it shows will do:
/// only for a URL that TLS has verified.
///
/// # Errors
/// Nobody answers, or not the coordinator that was asked for.
pub async fn look(
    url: &CoordinatorUrl,
    root: Option<Fingerprint>,
    egress: &Egress,
) -> Result<CoordinatorIdentity, Problem> {
    let (_socket, signed) = greet(url, egress).await.map_err(|failure| failure.problem)?;
    let shown = CoordinatorIdentity::claimed_fingerprint(&signed);
    let root = root.or(shown).ok_or_else(|| stranger(url, "its first message is no identity"))?;
    check_root(url, &signed, &root)
}

/// Connects, checks who is there, shakes hands.
pub(super) async fn connect(config: &ControlConfig) -> Result<(CoordinatorIdentity, Link), Failure> {
    let (mut socket, signed) = greet(&config.url, &config.egress).await?;
    let identity = check_identity(config, &signed)?;
    let (handshake, frame) =
        ClientHandshake::start(&config.secret, &identity.control, identity.network, &mut OsEntropy)
            .map_err(|e| Failure::permanent(stranger(&config.url, &e.to_string())))?;
    let lost = |why: String| Failure::transient(away(&config.url, &why));
    socket.send(Message::binary(frame)).await.map_err(|e| lost(e.to_string()))?;
    // Who shows the right identity and can't read a handshake meant for its key hangs up at this point.
    let answer = receive_frame(&mut socket).await.map_err(|why| {
        Failure::transient(Problem::new(
            "coordinator-key",
            format!("the coordinator at `{}` did not prove that it holds its key: {why}", config.url),
            "if this lasts, somebody between here and the coordinator answers in its place: check the URL and the path to it; an agent that has joined keeps trying",
        ))
    })?;
    let mut session = handshake.finish(&answer).map_err(|_| {
        Failure::permanent(Problem::new(
            "coordinator-key",
            format!("whoever answers at `{}` does not hold the coordinator's key", config.url),
            "somebody between here and the coordinator changes the connection, or it serves another network: check the URL and the path to it",
        ))
    })?;
    session.trust_peer();
    Ok((identity, Link { socket, session }))
}

/// Opens the WebSocket and takes what the coordinator says first: who it claims to be.
async fn greet(url: &CoordinatorUrl, egress: &Egress) -> Result<(WebSocketStream<Stream>, Signed), Failure> {
    let stream = dial(url, egress).await?;
    let settings = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_write_buffer_size(usize::MAX)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME));
    let upgrade =
        tokio_tungstenite::client_async_with_config(url.websocket(PATH), stream, Some(settings)).await;
    let mut socket = match upgrade {
        Ok((socket, _)) => socket,
        Err(WsError::Http(response)) if response.status().is_server_error() => {
            let why = format!("it answers with HTTP status {}", response.status().as_u16());
            return Err(Failure::transient(away(url, &why)));
        }
        Err(WsError::Http(response)) => {
            let why = format!("its answer is HTTP status {}", response.status().as_u16());
            return Err(Failure::permanent(stranger(url, &why)));
        }
        Err(WsError::Io(e)) => {
            return Err(Failure::transient(away(url, &crate::problem::io_text(&e))));
        }
        Err(e) => return Err(Failure::permanent(stranger(url, &e.to_string()))),
    };
    let document = receive_frame(&mut socket).await.map_err(|why| Failure::transient(away(url, &why)))?;
    let signed = Signed::decode(document.as_slice())
        .map_err(|_| Failure::permanent(stranger(url, "its first message is no identity")))?;
    Ok((socket, signed))
}

fn check_identity(config: &ControlConfig, signed: &Signed) -> Result<CoordinatorIdentity, Failure> {
    let identity = check_root(&config.url, signed, &config.root).map_err(Failure::permanent)?;
    if identity.network != config.network {
        return Err(Failure::permanent(Problem::new(
            "wrong-network",
            format!("`{}` serves network {}, not {}", config.url, identity.network, config.network),
            "use the URL of the network that the auth key is for",
        )));
    }
    if identity.epoch < config.min_epoch {
        return Err(Failure::permanent(Problem::new(
            "coordinator-restored",
            format!(
                "the coordinator at `{}` is at epoch {}, this device has seen {}: it runs on an old backup",
                config.url, identity.epoch, config.min_epoch
            ),
            "restore the newest state, or raise the epoch as the coordinator's restore procedure says",
        )));
    }
    Ok(identity)
}

fn check_root(
    url: &CoordinatorUrl,
    signed: &Signed,
    root: &Fingerprint,
) -> Result<CoordinatorIdentity, Problem> {
    CoordinatorIdentity::verify(signed, root).map_err(|_| {
        let shown = CoordinatorIdentity::claimed_fingerprint(signed)
            .map_or_else(|| "nothing".to_owned(), |f| f.to_string());
        Problem::new(
            "coordinator-fingerprint",
            format!("the coordinator at `{url}` is not the expected one: wanted root key {root}, it shows {shown}"),
            "check the URL; an auth key works with the coordinator that made it only. If the network was made anew, run `warren logout` and join with a new auth key",
        )
    })
}

fn stranger(url: &CoordinatorUrl, why: &str) -> Problem {
    Problem::new(
        "not-a-coordinator",
        format!("what answers at `{url}` is not a Warren coordinator: {why}"),
        "check the URL (it is the coordinator's --public-url) and that any proxy in between passes WebSockets",
    )
}

async fn receive_frame(socket: &mut WebSocketStream<Stream>) -> Result<Vec<u8>, String> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Binary(bytes))) => return Ok(bytes.into()),
            Some(Ok(Message::Close(frame))) => {
                let reason = frame.map_or_else(String::new, |f| f.reason.to_string());
                return Err(if reason.is_empty() { "it closed the connection".into() } else { reason });
            }
            Some(Ok(_)) => {} // pings are answered by the library
            Some(Err(e)) => return Err(e.to_string().to_lowercase()),
            None => return Err("it closed the connection".into()),
        }
    }
}

impl Link {
    /// Waits for a whole message. Cancel safe: what arrived of one stays in the session.
    pub(super) async fn receive(&mut self) -> Result<Vec<u8>, String> {
        loop {
            let frame = receive_frame(&mut self.socket).await?;
            if let Some(message) = self.session.open(&frame).map_err(|e| e.to_string())? {
                return Ok(message);
            }
        }
    }

    /// Sends a message.
    pub(super) async fn send(&mut self, message: &[u8]) -> Result<(), String> {
        for frame in self.session.seal(message).map_err(|e| e.to_string())? {
            self.socket.feed(Message::binary(frame)).await.map_err(|e| e.to_string())?;
        }
        self.socket.flush().await.map_err(|e| e.to_string())
    }

    /// Says goodbye.
    pub(super) async fn close(mut self) {
        // The other side may be gone already; then there is nobody to tell.
        let _ = self.socket.close(None).await;
    }
}
