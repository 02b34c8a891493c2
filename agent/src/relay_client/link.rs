//! One connection to a relay: dialled, its certificate checked, frames in and out.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, Endpoint, EndpointConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use warren_common::wire::relay::{
    ALPN, Class, Deframer, Frame, QueuedFrame, RefusalCode, SERVER_NAME, put_on_stream,
};

use super::RelayClientConfig;
use crate::problem::io_text;

/// A later address gets its chance after this long without a connection (RFC 8305, connection attempt delay).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
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
/// Bytes read from a stream at once.
const READ_BYTES: usize = 16 * 1024;
/// What the kernel may hold unsent, in bytes: more would only be delay.
const UNSENT_BYTES: u32 = 64 * 1024;

/// What packets run over, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// Plain UDP beside a connection.
    Udp,
    /// QUIC: packets in datagrams.
    Quic,
    /// TLS over TCP.
    Tls,
}

impl Transport {
    /// A stable word, for JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Quic => "quic",
            Self::Tls => "tls",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Udp => "UDP",
            Self::Quic => "QUIC",
            Self::Tls => "TLS",
        })
    }
}

/// Why there is no connection (any more).
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The relay says so.
    #[error("{}", .0.text())]
    Refused(RefusalCode),
    /// Anything else.
    #[error("{0}")]
    Lost(String),
}

impl End {
    pub(super) const fn refused(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused(code) => Some(*code),
            Self::Lost(_) => None,
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Lost(io_text(&error))
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
}

/// Connects: QUIC to all addresses, a little apart, and after `tls_after` (`None`: never) TLS as well. The first wins.
pub(super) async fn dial(config: &RelayClientConfig, tls_after: Option<Duration>) -> Result<Link, End> {
    let tls = tls_config(config.relay.cert_sha256).map_err(|e| End::Lost(e.to_string()))?;
    let mut attempts = JoinSet::new();
    for (i, addr) in (0u32..).zip(tried(&config.relay.addrs)) {
        let mark = config.mark;
        let config = tls.clone();
        attempts.spawn(async move {
            tokio::time::sleep(ATTEMPT_DELAY * i).await;
            dial_quic(addr, mark, config).await
        });
        if let Some(after) = tls_after {
            let config = tls.clone();
            attempts.spawn(async move {
                tokio::time::sleep(after + ATTEMPT_DELAY * i).await;
                dial_tls(addr, mark, config).await
            });
        }
    }
    let mut last = End::Lost("it has no address".to_owned());
    while let Some(result) = attempts.join_next().await {
        match result {
            Ok(Ok(link)) => return Ok(link), // dropping the set ends the other attempts
            Ok(Err(end)) => last = end,
            Err(_) => {}
        }
    }
    Err(last)
}

fn tried(addrs: &[SocketAddr]) -> impl Iterator<Item = SocketAddr> {
    addrs.iter().copied().take(MAX_ADDRESSES)
}

/// Fails if this host has no route there: what is sent would be lost without a word.
pub(super) fn check_route(addr: SocketAddr, mark: u32) -> io::Result<()> {
    socket(addr, Type::DGRAM, Protocol::UDP, mark)?.connect(&addr.into())
}

async fn dial_quic(addr: SocketAddr, mark: u32, tls: rustls::ClientConfig) -> Result<Link, End> {
    check_route(addr, mark)?;
    let socket = socket(addr, Type::DGRAM, Protocol::UDP, mark)?;
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
    Ok(Link { reader, writer, transport: Transport::Quic, addr })
}

async fn dial_tls(addr: SocketAddr, mark: u32, tls: rustls::ClientConfig) -> Result<Link, End> {
    let socket = socket(addr, Type::STREAM, Protocol::TCP, mark)?;
    // Best effort: without it there is only more delay.
    let _ = socket.set_tcp_notsent_lowat(UNSENT_BYTES);
    let stream = TcpSocket::from_std_stream(socket.into()).connect(addr).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(SERVER_NAME).map_err(|e| End::Lost(e.to_string()))?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await?;
    let (read, write) = tokio::io::split(stream);
    let reader = Reader { source: Source::Tls(read), deframer: Deframer::default() };
    Ok(Link { reader, writer: Writer(Sink::Tls(write), Vec::new()), transport: Transport::Tls, addr })
}

pub(super) fn socket(addr: SocketAddr, kind: Type, protocol: Protocol, mark: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

/// Frames from the relay.
pub(super) struct Reader {
    source: Source,
    deframer: Deframer,
}

enum Source {
    Quic { connection: quinn::Connection, recv: quinn::RecvStream },
    Tls(ReadHalf<TlsStream<TcpStream>>),
}

impl Reader {
    /// The next frame, from the stream or a datagram; a refusal is an end. Cancel safe.
    pub(super) async fn frame(&mut self) -> Result<Bytes, End> {
        loop {
            match self.deframer.next_frame() {
                Ok(Some(frame)) => {
                    if let Ok(Some(Frame::Refused { code, .. })) = Frame::decode(frame) {
                        return Err(End::Refused(code));
                    }
                    return Ok(Bytes::copy_from_slice(frame));
                }
                Ok(None) => {}
                Err(error) => return Err(End::Lost(error.to_string())),
            }
            match &mut self.source {
                Source::Quic { connection, recv } => tokio::select! {
                    datagram = connection.read_datagram() => return Ok(datagram?),
                    chunk = recv.read_chunk(READ_BYTES, true) => match chunk {
                        Ok(Some(chunk)) => self.deframer.buffer().extend_from_slice(&chunk.bytes),
                        // The connection says why.
                        _ => return Err(connection.closed().await.into()),
                    },
                },
                Source::Tls(stream) => {
                    let buffer = self.deframer.buffer();
                    buffer.reserve(READ_BYTES);
                    if stream.read_buf(buffer).await? == 0 {
                        return Err(End::Lost("it closed the connection".to_owned()));
                    }
                }
            }
        }
    }
}

/// Frames to the relay, and a buffer for them.
pub(super) struct Writer(Sink, Vec<u8>);

enum Sink {
    Quic { _endpoint: Endpoint, connection: quinn::Connection, send: quinn::SendStream },
    Tls(WriteHalf<TlsStream<TcpStream>>),
}

impl Writer {
    /// Writes one frame to the stream.
    pub(super) async fn control(&mut self, frame: &[u8]) -> Result<(), End> {
        put_on_stream(frame, &mut self.1);
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
                put_on_stream(&frame.bytes, &mut self.1);
            }
        }
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), End> {
        match &mut self.0 {
            Sink::Quic { connection, send, .. } => {
                if send.write_all(&self.1).await.is_err() {
                    return Err(connection.closed().await.into());
                }
            }
            Sink::Tls(stream) => {
                stream.write_all(&self.1).await?;
                stream.flush().await?;
            }
        }
        self.1.clear();
        Ok(())
    }
}

fn tls_config(cert_sha256: [u8; 32]) -> Result<rustls::ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Pin { cert_sha256, provider: provider.clone() });
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Accepts the one certificate that the netmap names, and nothing about its contents.
#[derive(Debug)]
struct Pin {
    cert_sha256: [u8; 32],
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if <[u8; 32]>::from(Sha256::digest(end_entity)) == self.cert_sha256 {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("its certificate is not the one that the netmap names".to_owned()))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerDoesNotSupportTls12Or13.into()) // never offered
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
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
