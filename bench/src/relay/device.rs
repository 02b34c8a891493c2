//! A device as a relay of ours sees it, with nothing but what the protocol asks for.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use quinn::congestion::CubicConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use warren_common::time::UnixTime;
use warren_common::wire::relay::udp::UdpKeys;
use warren_common::wire::relay::{
    ALPN, Binding, Deframer, Frame, Proven, SERVER_NAME, TokenRef, WEBSOCKET_ALPN, WEBSOCKET_PATH,
    put_on_stream,
};
use warren_common::wire::token::{MAX_TOKEN_LIFE_S, RelayToken};

use super::server::{NETWORK, RELAY, RelayAt, coordinator, device, probe};

/// Bytes read at once.
const READ_BYTES: usize = 64 * 1024;
/// Bytes that a WebSocket gathers before it writes: as in the agent.
const WRITE_BYTES: usize = 16 * 1024;
/// QUIC's datagrams that wait each way, in bytes, and its first congestion window: as in the agent.
const DATAGRAM_BUFFER: usize = 1 << 20;
const INITIAL_WINDOW: u64 = 256 * 1_200;
/// Longest time of each step of joining: what an agent gives the whole.
const STEP: Duration = Duration::from_secs(15);
/// How often it is looked whether a full packet fits, and the pause between two looks.
const LOOKS: usize = 500;
const LOOK: Duration = Duration::from_millis(20);
/// The shortest TLS records that rustls makes, in bytes with their header: some ten bytes are in one.
const TINY_RECORD: usize = 32;

/// What packets run over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// QUIC: packets in datagrams.
    Quic,
    /// A WebSocket inside TLS over TCP.
    WebSocket,
}

enum Link {
    Quic { connection: quinn::Connection, send: quinn::SendStream, recv: quinn::RecvStream },
    WebSocket(Box<WebSocketStream<TlsStream<TcpStream>>>),
}

/// An authenticated connection.
pub struct Device {
    link: Link,
    deframer: Deframer,
    keys: Option<UdpKeys>,
    session: Option<u64>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Device")
    }
}

/// A QUIC endpoint for many devices.
///
/// # Errors
/// There is no socket.
pub fn endpoint() -> Result<quinn::Endpoint> {
    Ok(quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into())?)
}

impl Device {
    /// Connects and authenticates as device `n`, which may send to `peers`.
    ///
    /// # Errors
    /// The relay won't have it.
    pub async fn join(
        relay: RelayAt,
        transport: Transport,
        endpoint: &quinn::Endpoint,
        n: u32,
        peers: &[u32],
    ) -> Result<Self> {
        Self::on(Link::connect(relay, transport, endpoint).await?, relay, n, peers).await
    }

    /// The same over a WebSocket whose TLS puts next to nothing into each record, and many records into one packet.
    ///
    /// # Errors
    /// The relay won't have it.
    pub async fn join_in_tiny_records(relay: RelayAt, n: u32, peers: &[u32]) -> Result<Self> {
        let link = Link::websocket(relay, Ipv4Addr::UNSPECIFIED, Some(TINY_RECORD)).await?;
        Self::on(link, relay, n, peers).await
    }

    /// The same over a WebSocket from an address of this host's.
    ///
    /// # Errors
    /// The relay won't have it.
    pub async fn join_from(relay: RelayAt, from: Ipv4Addr, n: u32, peers: &[u32]) -> Result<Self> {
        Self::on(Link::websocket(relay, from, None).await?, relay, n, peers).await
    }

    async fn on(link: Link, relay: RelayAt, n: u32, peers: &[u32]) -> Result<Self> {
        let mut device = Self { link, deframer: Deframer::default(), keys: None, session: None };
        timeout(STEP, device.authenticate(relay, n, peers)).await.context("before the relay's word")??;
        Ok(device)
    }

    /// Keys and number of the plain UDP session beside it.
    ///
    /// # Errors
    /// The relay has offered none.
    pub fn udp(&self) -> Result<(UdpKeys, u64)> {
        self.keys.clone().zip(self.session).context("no offer of plain UDP")
    }

    /// Waits until packets of `payload` bytes fit the transport: QUIC seeks the length that its path takes.
    ///
    /// # Errors
    /// The path takes shorter ones only.
    pub async fn await_room(&self, payload: &[u8]) -> Result<()> {
        let Link::Quic { connection, .. } = &self.link else { return Ok(()) };
        let needed = Frame::Send { dst: device(0), payload }.to_vec().len();
        for _ in 0..LOOKS {
            if connection.max_datagram_size().is_some_and(|size| size >= needed) {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        bail!("QUIC datagrams of {needed} bytes do not pass")
    }

    /// Sends `count` packets of `payload` bytes to `to`; waits while the transport has no room.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&mut self, to: u32, payload: &[u8], count: usize) -> Result<()> {
        let frame = Frame::Send { dst: device(to), payload }.to_vec();
        match &mut self.link {
            Link::Quic { connection, .. } => {
                for _ in 0..count {
                    match connection.send_datagram_wait(frame.clone().into()).await {
                        // QUIC took losses for a shorter path: lost, as in the agent and the relay.
                        Ok(()) | Err(quinn::SendDatagramError::TooLarge) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            Link::WebSocket(socket) => {
                let message = Message::binary(frame);
                for _ in 0..count {
                    socket.feed(message.clone()).await?;
                }
                socket.flush().await?;
            }
        }
        Ok(())
    }

    /// The same on the stream, whichever the transport.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send_on_stream(&mut self, to: u32, payload: &[u8], count: usize) -> Result<()> {
        let Link::Quic { send, .. } = &mut self.link else { return self.send(to, payload, count).await };
        let mut one = Vec::new();
        put_on_stream(&Frame::Send { dst: device(to), payload }.to_vec(), &mut one);
        Ok(send.write_all(&one.repeat(count)).await?)
    }

    /// Writes a frame to the stream.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn control(&mut self, frame: &Frame<'_>) -> Result<()> {
        self.link.control(frame).await
    }

    /// The packets that have come since: at least one. Cancel safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn receive(&mut self) -> Result<u64> {
        self.receive_each(|_| {}).await
    }

    /// The same; calls `each` with the payloads.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn receive_each(&mut self, mut each: impl FnMut(&[u8])) -> Result<u64> {
        let mut take = |frame: &[u8]| match Frame::decode(frame) {
            Ok(Some(Frame::Recv { payload, .. })) => {
                each(payload);
                1
            }
            _ => 0,
        };
        loop {
            let mut packets = 0;
            while let Some(frame) = self.deframer.next_frame()? {
                packets += take(frame);
            }
            if packets == 0
                && let Some(datagram) = self.link.read(&mut self.deframer).await?
            {
                packets += take(&datagram);
            }
            if packets > 0 {
                return Ok(packets);
            }
        }
    }

    async fn authenticate(&mut self, relay: RelayAt, n: u32, peers: &[u32]) -> Result<()> {
        let signed = token(n, peers).sign(&coordinator());
        let token = TokenRef::new(&signed).context("the token fits")?;
        let binding = Binding { network: NETWORK, relay: RELAY, cert_sha256: relay.cert_sha256 };
        loop {
            while let Some(frame) = self.deframer.next_frame()? {
                match Frame::decode(frame)?.context("a known frame")? {
                    Frame::Challenge(challenge) => {
                        let Proven { proof, udp } =
                            challenge.prove(&probe(n), &binding, token).context("a challenge")?;
                        self.keys = Some(udp);
                        self.link.control(&Frame::Auth { proof, token }).await?;
                    }
                    Frame::UdpOffer { session } => {
                        self.session = Some(session);
                        return Ok(());
                    }
                    Frame::Refused { code, .. } => bail!("refused: {code}"),
                    _ => {}
                }
            }
            self.link.read(&mut self.deframer).await?;
        }
    }
}

impl Link {
    async fn connect(relay: RelayAt, transport: Transport, endpoint: &quinn::Endpoint) -> Result<Self> {
        if transport == Transport::WebSocket {
            return Self::websocket(relay, Ipv4Addr::UNSPECIFIED, None).await;
        }
        let mut transport = quinn::TransportConfig::default();
        let mut congestion = CubicConfig::default();
        congestion.initial_window(INITIAL_WINDOW);
        transport
            .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_BUFFER)
            .congestion_controller_factory(Arc::new(congestion));
        let tls = warren_relay::tls::pinned_client_config(relay.cert_sha256, ALPN)?;
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport));
        let connecting = endpoint.connect_with(config, relay.addr, SERVER_NAME)?;
        let connection = timeout(STEP, connecting).await.context("in a QUIC handshake")??;
        let (send, recv) = timeout(STEP, connection.accept_bi()).await.context("before the stream")??;
        Ok(Self::Quic { connection, send, recv })
    }

    async fn websocket(relay: RelayAt, from: Ipv4Addr, record: Option<usize>) -> Result<Self> {
        let mut tls = warren_relay::tls::pinned_client_config(relay.cert_sha256, WEBSOCKET_ALPN)?;
        tls.max_fragment_size = record;
        let socket = TcpSocket::new_v4()?;
        if !from.is_unspecified() {
            socket.bind((from, 0).into())?;
        }
        let stream = socket.connect(relay.addr).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(SERVER_NAME)?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
        let settings = WebSocketConfig::default().read_buffer_size(READ_BYTES).write_buffer_size(WRITE_BYTES);
        let url = format!("wss://{SERVER_NAME}{WEBSOCKET_PATH}");
        let (socket, _) = tokio_tungstenite::client_async_with_config(url, stream, Some(settings)).await?;
        Ok(Self::WebSocket(Box::new(socket)))
    }

    async fn control(&mut self, frame: &Frame<'_>) -> Result<()> {
        match self {
            Self::Quic { send, .. } => {
                let mut bytes = Vec::new();
                put_on_stream(&frame.to_vec(), &mut bytes);
                send.write_all(&bytes).await?;
            }
            Self::WebSocket(socket) => socket.send(Message::binary(frame.to_vec())).await?,
        }
        Ok(())
    }

    /// Reads what is there, into the deframer unless it was a datagram.
    async fn read(&mut self, deframer: &mut Deframer) -> Result<Option<Bytes>> {
        match self {
            Self::Quic { connection, recv, .. } => tokio::select! {
                biased;
                datagram = connection.read_datagram() => return Ok(Some(datagram?)),
                chunk = recv.read_chunk(READ_BYTES, true) => {
                    let chunk = chunk?.context("the stream ended")?;
                    deframer.buffer().extend_from_slice(&chunk.bytes);
                }
            },
            Self::WebSocket(socket) => {
                if let Message::Binary(frame) = socket.next().await.context("the stream ended")?? {
                    put_on_stream(&frame, deframer.buffer());
                }
            }
        }
        Ok(None)
    }
}

fn token(n: u32, peers: &[u32]) -> RelayToken {
    #[expect(clippy::disallowed_methods, reason = "the relay that is measured reads the same clock")]
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    RelayToken {
        network: NETWORK,
        relay: RELAY,
        device: device(n),
        probe: probe(n).public(),
        revision: 1,
        expires: UnixTime::default() + unix + Duration::from_secs(MAX_TOKEN_LIFE_S as u64),
        peers: peers.iter().map(|peer| device(*peer)).collect(),
    }
}
