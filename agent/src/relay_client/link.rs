//! One connection to a relay: dialled, its certificate checked, frames in and out.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, Endpoint, EndpointConfig, VarInt};
use rustls::pki_types::ServerName;
use socket2::{Protocol, Type};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use warren_common::wire::relay::{
    ALPN, Class, Deframer, Frame, MAX_FRAME, QueuedFrame, RefusalCode, SERVER_NAME, WEBSOCKET_ALPN,
    WEBSOCKET_PATH, put_on_stream,
};

use super::pin::{is_other_certificate, tls_config};
use super::{RelayClientConfig, route};
use crate::egress::{self, Egress, marked};
use crate::problem::{Problem, io_text};

/// A later address gets its chance after this long without a connection (RFC 8305, connection attempt delay).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// How long QUIC may still take when no WebSocket came to be: it would have answered by then, mostly, and what keeps the
/// WebSocket away may be over at the next try.
const LAST_CHANCE: Duration = Duration::from_secs(3);
/// Most addresses of one relay that are tried.
const MAX_ADDRESSES: usize = 8;
/// Datagrams that wait inside QUIC towards the relay, in bytes; the queue proper is ours.
const SEND_BUFFER: usize = 128 * 1024;
/// Datagrams that wait inside QUIC for us, in bytes: a burst of a full congestion window.
const RECEIVE_BUFFER: usize = 1 << 20;
/// A first congestion window of 256 packets: what is inside has its own congestion control, and this path is a fallback.
const INITIAL_WINDOW: u64 = 256 * 1_200;
/// After this long without an answer a path counts as gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes read from a stream at once, and gathered for one TLS record.
const CHUNK_BYTES: usize = 16 * 1024;
/// What the kernel may hold unsent, in bytes: more would only be delay.
const UNSENT_BYTES: u32 = 64 * 1024;

/// What packets run over, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// Plain UDP beside a connection.
    Udp,
    /// QUIC: packets in datagrams.
    Quic,
    /// A WebSocket inside TLS over TCP.
    WebSocket,
}

impl Transport {
    /// A stable word, for JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Quic => "quic",
            Self::WebSocket => "websocket",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Udp => "UDP",
            Self::Quic => "QUIC",
            Self::WebSocket => "a WebSocket",
        })
    }
}

/// Why there is no connection (any more).
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The relay says so.
    #[error("{}", .0.text())]
    Refused(RefusalCode),
    /// Something on the way there is not as it should be, which somebody can change. Its text names hosts, so only its code is
    /// for logs.
    #[error("the way there is not free ({})", .0.code)]
    Barred(Problem),
    /// This host is somewhere else, from where the connection does not lead to the relay. Another may.
    #[error("{0}")]
    Moved(String),
    /// Anything else.
    #[error("{0}")]
    Lost(String),
}

impl End {
    pub(super) const fn refused(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused(code) => Some(*code),
            Self::Barred(_) | Self::Moved(_) | Self::Lost(_) => None,
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Lost(io_text(&error))
    }
}

impl From<egress::Error> for End {
    fn from(error: egress::Error) -> Self {
        match error {
            egress::Error::Away(why) => Self::Lost(why),
            egress::Error::Proxy { problem, .. } => Self::Barred(problem),
        }
    }
}

impl From<WsError> for End {
    fn from(error: WsError) -> Self {
        match error {
            WsError::Io(error) => error.into(),
            WsError::ConnectionClosed | WsError::AlreadyClosed => {
                Self::Lost("it closed the connection".to_owned())
            }
            other => Self::Lost(other.to_string().to_lowercase()),
        }
    }
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => u8::try_from(close.error_code.into_inner())
                .map_or_else(
                    |_| Self::Lost("it closed the connection".to_owned()),
                    |code| Self::Refused(RefusalCode::from_u8(code)),
                ),
            other => Self::Lost(other.to_string()),
        }
    }
}

/// A connection whose certificate is the right one; the relay speaks first.
pub(super) struct Link {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) transport: Transport,
    pub(super) addr: SocketAddr,
    /// A proxy is in between.
    pub(super) proxied: bool,
    /// Our address, of a connection that can't go on from another one: over TCP.
    pub(super) bound: Option<IpAddr>,
}

impl Link {
    /// What the connection takes.
    pub(super) fn footing(&self) -> Footing {
        Footing { to: (!self.proxied).then_some(self.addr), bound: self.bound }
    }
}

/// What a connection takes of the network that this host is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Footing {
    /// There must be a way there.
    to: Option<SocketAddr>,
    /// It must be ours.
    bound: Option<IpAddr>,
}

impl Footing {
    /// That of a socket which sends from any address.
    pub(super) const fn unbound(to: SocketAddr) -> Self {
        Self { to: Some(to), bound: None }
    }

    /// Fails if the connection is dead for certain, without a word from anybody. A new address, one that is not preferred any
    /// more, or another one in place of ours says nothing: QUIC and plain UDP go on from there.
    pub(super) fn check(self, config: &RelayClientConfig) -> io::Result<()> {
        if self.bound.is_some_and(route::is_gone) {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        self.to.map_or(Ok(()), |to| route::check(to, config.egress.mark(), &config.own))
    }
}

/// Connects: QUIC to all addresses that there is a way to, a little apart, and after `tcp_after` (`None`: never) by WebSocket as
/// well. The first wins. Takes at most `longest`.
pub(super) async fn dial(
    config: &RelayClientConfig,
    tcp_after: Option<Duration>,
    longest: Duration,
) -> Result<Link, End> {
    let tls = |alpn| tls_config(config.relay.cert_sha256, alpn).map_err(|e| End::Lost(e.to_string()));
    let (quic, websocket) = (tls(ALPN)?, Arc::new(tls(WEBSOCKET_ALPN)?));
    let (mut attempts, mut tcp_left, mut turn) = (JoinSet::new(), 0, 0);
    let mut worst = End::Lost(
        if config.relay.addrs.is_empty() { "it has no address" } else { "it does not answer" }.to_owned(),
    );
    for addr in tried(&config.relay.addrs) {
        let mark = config.egress.mark();
        let way = route::check(addr, mark, &config.own);
        // A proxy has its own ways.
        let proxied = config.egress.proxy_for(&addr.ip().to_string(), addr.port()).is_some();
        let delay = ATTEMPT_DELAY * turn;
        if way.is_ok() {
            let tls = quic.clone();
            attempts.spawn(async move {
                tokio::time::sleep(delay).await;
                (Transport::Quic, dial_quic(addr, mark, tls).await)
            });
        }
        if let Some(after) = tcp_after
            && (way.is_ok() || proxied)
        {
            tcp_left += 1;
            let (egress, tls) = (config.egress.clone(), websocket.clone());
            attempts.spawn(async move {
                tokio::time::sleep(after + delay).await;
                (Transport::WebSocket, dial_websocket(addr, &egress, tls).await)
            });
        }
        match way {
            Err(error) if !proxied => worst = error.into(),
            _ => turn += 1,
        }
    }
    let mut until = Instant::now() + longest;
    while let Ok(Some(result)) = timeout_at(until, attempts.join_next()).await {
        let Ok((transport, result)) = result else { continue };
        match result {
            Ok(link) => return Ok(link), // dropping the set ends the other attempts
            // What somebody can change is worth more than "timed out".
            Err(end) if !matches!(worst, End::Barred(_)) => worst = end,
            Err(_) => {}
        }
        if transport == Transport::WebSocket {
            tcp_left -= 1;
            if tcp_left == 0 {
                until = until.min(Instant::now() + LAST_CHANCE);
            }
        }
    }
    Err(worst)
}

fn tried(addrs: &[SocketAddr]) -> impl Iterator<Item = SocketAddr> {
    addrs.iter().copied().take(MAX_ADDRESSES)
}

async fn dial_quic(addr: SocketAddr, mark: u32, tls: rustls::ClientConfig) -> Result<Link, End> {
    let socket = marked(addr, Type::DGRAM, Protocol::UDP, mark)?;
    let any: SocketAddr = match addr {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    socket.bind(&any.into())?;
    // Both kinds of datagrams share a port, and this bit tells them apart for firewalls that look.
    let mut endpoint = EndpointConfig::default();
    endpoint.grease_quic_bit(false);
    let endpoint = Endpoint::new(endpoint, None, socket.into(), Arc::new(quinn::TokioRuntime))?;
    let mut transport = quinn::TransportConfig::default();
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().map_err(io::Error::other)?))
        .datagram_receive_buffer_size(Some(RECEIVE_BUFFER))
        .datagram_send_buffer_size(SEND_BUFFER)
        .congestion_controller_factory(Arc::new(congestion));
    let tls = QuicClientConfig::try_from(tls).map_err(|e| End::Lost(e.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    let connecting =
        endpoint.connect_with(config, addr, SERVER_NAME).map_err(|e| End::Lost(e.to_string()))?;
    let connection = connecting.await?;
    let (send, recv) = connection.accept_bi().await?;
    let reader = Source::Quic { connection: connection.clone(), recv };
    let writer = Writer(Sink::Quic { _endpoint: endpoint, connection, send }, Vec::new());
    let reader = Reader { source: reader, deframer: Deframer::default() };
    Ok(Link { reader, writer, transport: Transport::Quic, addr, proxied: false, bound: None })
}

async fn dial_websocket(
    addr: SocketAddr,
    egress: &Egress,
    tls: Arc<rustls::ClientConfig>,
) -> Result<Link, End> {
    let host = addr.ip().to_string();
    let proxied = egress.proxy_for(&host, addr.port()).is_some();
    let stream = egress.connect(&host, addr.port()).await?;
    let bound = Some(stream.local_addr()?.ip());
    // Best effort: without it there is only more delay.
    let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
    let name = ServerName::try_from(SERVER_NAME).map_err(|e| End::Lost(e.to_string()))?;
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|error| {
        if is_other_certificate(&error) {
            End::Barred(other_certificate(addr, proxied))
        } else {
            error.into()
        }
    })?;
    let settings = WebSocketConfig::default()
        .read_buffer_size(CHUNK_BYTES)
        .write_buffer_size(CHUNK_BYTES)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME));
    let url = format!("wss://{SERVER_NAME}{WEBSOCKET_PATH}");
    let (socket, _) = tokio_tungstenite::client_async_with_config(url, stream, Some(settings)).await?;
    let (write, read) = socket.split();
    let reader = Reader { source: Source::WebSocket(read), deframer: Deframer::default() };
    let writer = Writer(Sink::WebSocket(write), Vec::new());
    Ok(Link { reader, writer, transport: Transport::WebSocket, addr, proxied, bound })
}

fn other_certificate(addr: SocketAddr, proxied: bool) -> Problem {
    let (who, fix) = if proxied {
        (
            "the proxy, or something behind it, opens the encrypted connection",
            "have the relay's address exempted from TLS inspection at the proxy; the agent accepts no other certificate, whoever signs it",
        )
    } else {
        (
            "something in between opens the encrypted connection, or something else listens there",
            "have the relay's address exempted from TLS inspection, and check that the relay's address in `warren-coordinator relay list` is right",
        )
    };
    Problem::new(
        "relay-certificate",
        format!("the relay at {addr} shows another certificate than the network's: {who}"),
        fix,
    )
}

type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// Frames from the relay.
pub(super) struct Reader {
    source: Source,
    deframer: Deframer,
}

enum Source {
    Quic { connection: quinn::Connection, recv: quinn::RecvStream },
    WebSocket(SplitStream<Socket>),
}

impl Reader {
    /// The next frame; a refusal is an end. Cancel safe.
    pub(super) async fn frame(&mut self) -> Result<Bytes, End> {
        self.next(true).await
    }

    /// The next frame of the protocol itself. Packets in datagrams, which may overtake it, wait.
    pub(super) async fn control(&mut self) -> Result<Bytes, End> {
        self.next(false).await
    }

    async fn next(&mut self, datagrams: bool) -> Result<Bytes, End> {
        let frame = self.read(datagrams).await?;
        match Frame::decode(&frame) {
            Ok(Some(Frame::Refused { code, .. })) => Err(End::Refused(code)),
            _ => Ok(frame),
        }
    }

    async fn read(&mut self, datagrams: bool) -> Result<Bytes, End> {
        loop {
            match self.deframer.next_frame() {
                Ok(Some(frame)) => return Ok(Bytes::copy_from_slice(frame)),
                Ok(None) => {}
                Err(error) => return Err(End::Lost(error.to_string())),
            }
            match &mut self.source {
                Source::Quic { connection, recv } => tokio::select! {
                    datagram = connection.read_datagram(), if datagrams => return Ok(datagram?),
                    chunk = recv.read_chunk(CHUNK_BYTES, true) => match chunk {
                        Ok(Some(chunk)) => self.deframer.buffer().extend_from_slice(&chunk.bytes),
                        // The connection says why.
                        _ => return Err(connection.closed().await.into()),
                    },
                },
                Source::WebSocket(socket) => match socket.next().await {
                    Some(Ok(Message::Binary(frame))) => return Ok(frame),
                    Some(Ok(Message::Close(_))) | None => return Err(WsError::ConnectionClosed.into()),
                    Some(Ok(_)) => {} // the library answers pings
                    Some(Err(error)) => return Err(error.into()),
                },
            }
        }
    }
}

/// Frames to the relay, and a buffer for QUIC's stream.
pub(super) struct Writer(Sink, Vec<u8>);

enum Sink {
    Quic { _endpoint: Endpoint, connection: quinn::Connection, send: quinn::SendStream },
    WebSocket(SplitSink<Socket, Message>),
}

impl Writer {
    /// Writes one frame to the stream.
    pub(super) async fn control(&mut self, frame: Vec<u8>) -> Result<(), End> {
        self.put(frame.into()).await?;
        self.flush().await
    }

    /// Writes frames, each where it belongs.
    pub(super) async fn batch(&mut self, batch: &mut Vec<QueuedFrame>) -> Result<(), End> {
        for frame in batch.drain(..) {
            if let Sink::Quic { connection, .. } = &self.0
                && frame.class != Class::Control
                && connection.max_datagram_size().is_some_and(|max| frame.bytes.len() <= max)
            {
                match connection.send_datagram_wait(Bytes::from_owner(frame.bytes)).await {
                    // Too large: the path got smaller in between. Lost, as on any path.
                    Ok(()) | Err(quinn::SendDatagramError::TooLarge) => {}
                    Err(quinn::SendDatagramError::ConnectionLost(error)) => return Err(error.into()),
                    Err(error) => return Err(End::Lost(error.to_string())),
                }
            } else {
                self.put(Bytes::from_owner(frame.bytes)).await?;
            }
        }
        self.flush().await
    }

    async fn put(&mut self, frame: Bytes) -> Result<(), End> {
        match &mut self.0 {
            Sink::Quic { .. } => put_on_stream(&frame, &mut self.1),
            Sink::WebSocket(socket) => socket.feed(Message::Binary(frame)).await?,
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), End> {
        match &mut self.0 {
            Sink::Quic { connection, send, .. } => {
                if send.write_all(&self.1).await.is_err() {
                    return Err(connection.closed().await.into());
                }
                self.1.clear();
            }
            Sink::WebSocket(socket) => socket.flush().await?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_of_many_addresses_is_tried_at_a_few() {
        let addrs = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 1)); 100];
        assert_eq!(tried(&addrs).count(), MAX_ADDRESSES);
    }
}
