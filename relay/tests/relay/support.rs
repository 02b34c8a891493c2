//! A device as the relay sees it, with nothing but what the protocol asks for: tests can misbehave in any way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{SinkExt as _, StreamExt as _};
use rustls::pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_common::time::UnixTime;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::{
    ALPN, Binding, Deframer, Frame, RefusalCode, SERVER_NAME, TokenRef, WEBSOCKET_ALPN, WEBSOCKET_PATH,
    put_on_stream,
};
use warren_common::wire::token::RelayToken;
use warren_relay::core::Limits;
use warren_relay::server::{RelayServer, RelayServerConfig};
use warren_relay::tls::pinned_client_config;

/// A test that waits this long for anything has failed.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn network() -> NetworkId {
    NetworkId::from_bytes([1; 16])
}

pub(crate) fn relay_id() -> RelayId {
    RelayId::from_bytes([2; 16])
}

pub(crate) fn coordinator() -> NetmapSecretKey {
    NetmapSecretKey::from_bytes([77; 32])
}

pub(crate) fn device(n: u8) -> DeviceId {
    DeviceId::from_bytes([n; 16])
}

pub(crate) fn probe(n: u8) -> ProbeSecretKey {
    ProbeSecretKey::from_bytes([n + 100; 32])
}

pub(crate) fn config(state_dir: &std::path::Path, limits: Limits) -> RelayServerConfig {
    RelayServerConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        stun_listen: Some("127.0.0.1:0".parse().unwrap()),
        stun_second: None,
        state_dir: state_dir.to_owned(),
        network: network(),
        relay: relay_id(),
        netmap_key: coordinator().public(),
        floor: 0,
        limits,
    }
}

pub(crate) fn start(limits: Limits) -> (tempfile::TempDir, RelayServer) {
    let dir = tempfile::tempdir().unwrap();
    let server = RelayServer::start(config(dir.path(), limits)).unwrap();
    (dir, server)
}

#[expect(clippy::disallowed_methods, reason = "a shell's test: the relay under test reads the real clock")]
fn unix_now() -> UnixTime {
    UnixTime::default() + SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

pub(crate) fn token(n: u8, revision: u64, peers: &[u8]) -> Signed {
    RelayToken {
        network: network(),
        relay: relay_id(),
        device: device(n),
        probe: probe(n).public(),
        revision,
        expires: unix_now() + Duration::from_secs(600),
        peers: peers.iter().map(|p| device(*p)).collect(),
    }
    .sign(&coordinator())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Quic,
    WebSocket,
}

enum Link {
    Quic {
        _endpoint: quinn::Endpoint,
        connection: quinn::Connection,
        send: quinn::SendStream,
        recv: quinn::RecvStream,
    },
    WebSocket(Box<WebSocketStream<TlsStream<TcpStream>>>),
}

/// A connection to a relay.
pub(crate) struct Device {
    link: Link,
    deframer: Deframer,
    binding: Binding,
}

/// What a device sees.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Frame(Vec<u8>),
    Closed(Option<RefusalCode>),
}

impl Device {
    pub(crate) async fn connect(server: &RelayServer, transport: Transport) -> Self {
        Self::connect_at(server.local_addr(), server.cert_sha256(), transport).await
    }

    pub(crate) async fn connect_at(addr: SocketAddr, cert_sha256: [u8; 32], transport: Transport) -> Self {
        let link = patient(Box::pin(async {
            match transport {
                Transport::Quic => quic(addr, pinned_client_config(cert_sha256, ALPN).unwrap()).await,
                Transport::WebSocket => {
                    let url = format!("wss://{SERVER_NAME}{WEBSOCKET_PATH}");
                    let socket = tokio_tungstenite::client_async(url, tls(addr, cert_sha256).await).await;
                    Link::WebSocket(Box::new(socket.unwrap().0))
                }
            }
        }))
        .await;
        let binding = Binding { network: network(), relay: relay_id(), cert_sha256 };
        Self { link, deframer: Deframer::default(), binding }
    }

    /// Connects and authenticates as device `n`, which may send to `peers`.
    pub(crate) async fn join(server: &RelayServer, transport: Transport, n: u8, peers: &[u8]) -> Self {
        Self::join_at(server.local_addr(), server.cert_sha256(), transport, n, peers).await
    }

    pub(crate) async fn join_at(
        addr: SocketAddr,
        cert_sha256: [u8; 32],
        transport: Transport,
        n: u8,
        peers: &[u8],
    ) -> Self {
        let mut device = Self::connect_at(addr, cert_sha256, transport).await;
        let seen = device.authenticate(&token(n, 1, peers), &probe(n)).await;
        assert_eq!(seen, Seen::Frame(Frame::Ready { revision: 1 }.to_vec()));
        device
    }

    pub(crate) async fn authenticate(&mut self, signed: &Signed, key: &ProbeSecretKey) -> Seen {
        let Seen::Frame(frame) = self.see().await else { panic!("closed before the challenge") };
        let Ok(Some(Frame::Challenge(challenge))) = Frame::decode(&frame) else { panic!("no challenge") };
        let token = TokenRef::new(signed).unwrap();
        let proof = challenge.prove(key, &self.binding, token).unwrap();
        self.stream(&Frame::Auth { proof: proof.proof, token }).await;
        self.see().await
    }

    /// Writes a frame to the stream; the relay may have closed it.
    pub(crate) async fn stream(&mut self, frame: &Frame<'_>) {
        match &mut self.link {
            Link::Quic { send, .. } => {
                let mut bytes = Vec::new();
                put_on_stream(&frame.to_vec(), &mut bytes);
                drop(send.write_all(&bytes).await);
            }
            Link::WebSocket(socket) => drop(socket.send(Message::binary(frame.to_vec())).await),
        }
    }

    /// Writes bytes to QUIC's stream.
    pub(crate) async fn quic_raw(&mut self, bytes: &[u8]) {
        let Link::Quic { send, .. } = &mut self.link else { panic!("not over QUIC") };
        drop(send.write_all(bytes).await);
    }

    /// Sends any message of a WebSocket.
    pub(crate) async fn message(&mut self, message: Message) {
        let Link::WebSocket(socket) = &mut self.link else { panic!("not by WebSocket") };
        drop(socket.send(message).await);
    }

    /// Writes bytes past the WebSocket.
    pub(crate) async fn websocket_raw(&mut self, bytes: &[u8]) {
        let Link::WebSocket(socket) = &mut self.link else { panic!("not by WebSocket") };
        drop(socket.get_mut().write_all(bytes).await);
        drop(socket.get_mut().flush().await);
    }

    /// Sends a packet as a good client does: in a datagram if there is one that can hold it.
    pub(crate) async fn send(&mut self, to: u8, payload: &[u8]) {
        let frame = Frame::Send { dst: device(to), payload };
        if let Link::Quic { connection, .. } = &self.link
            && connection.max_datagram_size().is_some_and(|max| frame.encoded_len() <= max)
        {
            connection.send_datagram_wait(frame.to_vec().into()).await.unwrap();
        } else {
            self.stream(&frame).await;
        }
    }

    /// The next frame, or the end.
    pub(crate) async fn see(&mut self) -> Seen {
        patient(self.see_impatiently()).await
    }

    async fn see_impatiently(&mut self) -> Seen {
        loop {
            if let Some(frame) = self.deframer.next_frame().unwrap() {
                if let Ok(Some(Frame::Refused { code, .. })) = Frame::decode(frame) {
                    return Seen::Closed(Some(code));
                }
                // These devices have no use for it.
                if let Ok(Some(Frame::UdpOffer { .. })) = Frame::decode(frame) {
                    continue;
                }
                return Seen::Frame(frame.to_vec());
            }
            match &mut self.link {
                Link::Quic { connection, recv, .. } => tokio::select! {
                    chunk = recv.read_chunk(4_096, true) => match chunk {
                        Ok(Some(chunk)) => self.deframer.buffer().extend_from_slice(&chunk.bytes),
                        _ => return Seen::Closed(close_code(&connection.closed().await)),
                    },
                    datagram = connection.read_datagram() => match datagram {
                        Ok(datagram) => return Seen::Frame(datagram.to_vec()),
                        Err(error) => return Seen::Closed(close_code(&error)),
                    },
                },
                Link::WebSocket(socket) => match socket.next().await {
                    Some(Ok(Message::Binary(frame))) => {
                        put_on_stream(&frame, self.deframer.buffer());
                    }
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return Seen::Closed(None),
                    Some(Ok(_)) => {}
                },
            }
        }
    }

    /// How QUIC says that the connection ended.
    pub(crate) async fn quic_end(&self) -> quinn::ConnectionError {
        let Link::Quic { connection, .. } = &self.link else { panic!("not over QUIC") };
        patient(connection.closed()).await
    }

    /// The next packet: its source and payload.
    pub(crate) async fn receive(&mut self) -> (DeviceId, Vec<u8>) {
        loop {
            match self.see().await {
                Seen::Frame(frame) => {
                    if let Ok(Some(Frame::Recv { src, payload })) = Frame::decode(&frame) {
                        return (src, payload.to_vec());
                    }
                }
                Seen::Closed(reason) => panic!("closed instead of a packet: {reason:?}"),
            }
        }
    }

    /// How the connection ends, whatever comes before.
    pub(crate) async fn end(&mut self) -> Option<RefusalCode> {
        loop {
            if let Seen::Closed(reason) = self.see().await {
                return reason;
            }
        }
    }
}

pub(crate) async fn patient<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happened")
}

fn close_code(error: &quinn::ConnectionError) -> Option<RefusalCode> {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            u8::try_from(close.error_code.into_inner()).ok().map(RefusalCode::from_u8)
        }
        _ => None,
    }
}

async fn quic(addr: SocketAddr, tls: rustls::ClientConfig) -> Link {
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let connection = endpoint.connect_with(config, addr, SERVER_NAME).unwrap().await.unwrap();
    let (send, recv) = connection.accept_bi().await.unwrap();
    Link::Quic { _endpoint: endpoint, connection, send, recv }
}

/// A TLS connection to the relay's TCP port.
pub(crate) async fn tls(addr: SocketAddr, cert_sha256: [u8; 32]) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let config = Arc::new(pinned_client_config(cert_sha256, WEBSOCKET_ALPN).unwrap());
    tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap()
}
