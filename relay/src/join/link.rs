//! The session with the coordinator: TCP, TLS for `https`, a WebSocket, its identity, Noise, messages.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};
use tokio_util::either::Either;
use warren_common::url::CoordinatorUrl;
use warren_common::wire::control::{CoordinatorIdentity, Signed};
use warren_common::wire::relay_control::{
    PATH, RelayBody, RelayMessage, RelayServerBody, RelayServerMessage,
};
use warren_common::wire::session::{ClientHandshake, Session};

use super::JoinError;
use super::state::State;
use crate::os::OsRng;

/// Longest WebSocket message: one Noise message.
const MAX_FRAME: usize = 65_535;
/// Most addresses of the coordinator's name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Longest time that one address may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(4);

/// A connection, encrypted by TLS or not.
type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// An established session.
pub(super) struct Link {
    socket: WebSocketStream<Stream>,
    session: Session,
    url: String,
}

impl Link {
    /// Connects, checks that it is the coordinator of the relay's network, and shakes hands.
    pub(super) async fn connect(
        url: &CoordinatorUrl,
        state: &State,
    ) -> Result<(Self, CoordinatorIdentity), JoinError> {
        let away = |why: String| JoinError::Away { url: url.to_string(), why };
        let wrong = |why: String| JoinError::WrongCoordinator { url: url.to_string(), why };
        let stream = dial(url).await.map_err(away)?;
        let mut config = WebSocketConfig::default();
        config.max_message_size = Some(MAX_FRAME);
        config.max_frame_size = Some(MAX_FRAME);
        let mut socket = match client_async_with_config(url.websocket(PATH), stream, Some(config)).await {
            Ok((socket, _)) => socket,
            Err(tungstenite::Error::Http(response)) if response.status().is_client_error() => {
                return Err(wrong(format!("it answers {PATH} with {}", response.status())));
            }
            Err(error) => return Err(away(error.to_string())),
        };
        let signed = frame(&mut socket).await.map_err(away)?;
        let signed = Signed::decode(signed.as_ref()).map_err(|e| wrong(e.to_string()))?;
        let identity =
            CoordinatorIdentity::verify(&signed, state.root()).map_err(|e| wrong(e.to_string()))?;
        if identity.network != state.network() {
            return Err(wrong("it serves another network".to_owned()));
        }
        let (handshake, hello) =
            ClientHandshake::start(state.secret(), &identity.control, identity.network, &mut OsRng)
                .map_err(|e| wrong(e.to_string()))?;
        socket.send(Message::binary(hello)).await.map_err(|e| away(e.to_string()))?;
        let answer = frame(&mut socket).await.map_err(away)?;
        let mut session = handshake.finish(&answer).map_err(|e| wrong(e.to_string()))?;
        session.trust_peer();
        Ok((Self { socket, session, url: url.to_string() }, identity))
    }

    pub(super) async fn send(&mut self, body: RelayBody) -> Result<(), JoinError> {
        let message = RelayMessage { body: Some(body) }.encode_to_vec();
        let frames = self.session.seal(&message).map_err(|e| self.away(e.to_string()))?;
        for frame in frames {
            let sent = self.socket.send(Message::binary(frame)).await;
            sent.map_err(|e| self.away(e.to_string()))?;
        }
        Ok(())
    }

    /// The next message; `None` for one of a kind that this version does not know. Cancel safe.
    pub(super) async fn receive(&mut self) -> Result<Option<RelayServerBody>, JoinError> {
        loop {
            let bytes = frame(&mut self.socket).await.map_err(|why| self.away(why))?;
            if let Some(message) = self.session.open(&bytes).map_err(|e| self.away(e.to_string()))? {
                let message = RelayServerMessage::decode(message.as_slice());
                return message.map(|m| m.body).map_err(|e| self.away(e.to_string()));
            }
        }
    }

    fn away(&self, why: String) -> JoinError {
        JoinError::Away { url: self.url.clone(), why }
    }
}

async fn frame(socket: &mut WebSocketStream<Stream>) -> Result<tungstenite::Bytes, String> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Binary(bytes))) => return Ok(bytes),
            Some(Ok(Message::Close(_))) | None => return Err("it closed the session".to_owned()),
            Some(Ok(_)) => {} // WebSocket's own pings
            Some(Err(error)) => return Err(error.to_string()),
        }
    }
}

async fn dial(url: &CoordinatorUrl) -> Result<Stream, String> {
    let found = lookup_host((url.host(), url.port())).await;
    let addresses = found.map_err(|_| format!("the name `{}` is not known", url.host()))?;
    let mut last = "it has no address".to_owned();
    for address in addresses.take(MAX_ADDRESSES) {
        match timeout(DIAL_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true); // without it it is only slower
                return if url.tls() { tls(url, stream).await } else { Ok(Either::Left(stream)) };
            }
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = "it does not answer".to_owned(),
        }
    }
    Err(last)
}

async fn tls(url: &CoordinatorUrl, stream: TcpStream) -> Result<Stream, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(url.host().to_owned()).map_err(|e| e.to_string())?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    stream.map(|s| Either::Right(Box::new(s))).map_err(|e| format!("its certificate is not valid: {e}"))
}
