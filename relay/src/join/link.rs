//! The session with the coordinator: TCP, TLS for `https`, a WebSocket, its identity, Noise, messages.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::http::Uri;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};
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

/// Where a coordinator is: `http://` or `https://`, host, optional port and path.
#[derive(Clone, PartialEq, Eq)]
pub struct CoordinatorUrl {
    text: String,
    tls: bool,
    host: String,
    port: u16,
    path: String,
}

/// Why a text is not a coordinator's URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the URL of a coordinator: write `https://host` or `http://host:port`")]
pub struct ParseUrlError(String);

impl FromStr for CoordinatorUrl {
    type Err = ParseUrlError;

    fn from_str(text: &str) -> Result<Self, ParseUrlError> {
        let text = text.trim().trim_end_matches('/');
        let bad = || ParseUrlError(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let (tls, default_port) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") => (false, 80),
            _ => return Err(bad()),
        };
        let authority = uri.authority().ok_or_else(bad)?;
        let rest = authority.as_str().strip_prefix(authority.host()).ok_or_else(bad)?; // a user name comes first
        let port = match rest.strip_prefix(':') {
            Some(port) => port.parse().map_err(|_| bad())?,
            None => default_port,
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() || uri.query().is_some() {
            return Err(bad());
        }
        Ok(Self { text: text.to_owned(), tls, host, port, path: uri.path().trim_end_matches('/').to_owned() })
    }
}

impl fmt::Display for CoordinatorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for CoordinatorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl CoordinatorUrl {
    fn websocket(&self) -> String {
        let scheme = if self.tls { "wss" } else { "ws" };
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{scheme}://{host}:{}{}{PATH}", self.port, self.path)
    }
}

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
        let mut socket = match client_async_with_config(url.websocket(), stream, Some(config)).await {
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
    let found = lookup_host((url.host.as_str(), url.port)).await;
    let addresses = found.map_err(|_| format!("the name `{}` is not known", url.host))?;
    let mut last = "it has no address".to_owned();
    for address in addresses.take(MAX_ADDRESSES) {
        match timeout(DIAL_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true); // without it it is only slower
                return if url.tls { tls(url, stream).await } else { Ok(Stream::Plain(stream)) };
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
    let name = ServerName::try_from(url.host.clone()).map_err(|e| e.to_string())?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    stream.map(|s| Stream::Tls(Box::new(s))).map_err(|e| format!("its certificate is not valid: {e}"))
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_websocket_urls() {
        for (text, websocket) in [
            ("https://warren.example", "wss://warren.example:443/relay/v1"),
            ("http://10.0.0.1:8080/", "ws://10.0.0.1:8080/relay/v1"),
            ("http://[fd00::1]/base/", "ws://[fd00::1]:80/base/relay/v1"),
        ] {
            assert_eq!(text.parse::<CoordinatorUrl>().unwrap().websocket(), websocket);
        }
        for text in
            ["", "warren", "ftp://x", "http://user@host", "http://h/?x=1", "http://h:99999", "http://h:"]
        {
            assert!(text.parse::<CoordinatorUrl>().is_err(), "{text}");
        }
    }
}
