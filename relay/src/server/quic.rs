//! QUIC: one stream for the protocol's own frames, datagrams for the packets.
//!
//! Packets that no datagram can hold (before the path's MTU is known, or a small one) go over the stream. The reason of
//! an end travels as the error code of the connection's close.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, EndpointConfig, Incoming, RecvStream, SendStream, VarInt};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use warren_common::wire::relay::{Class, Deframer, QueuedFrame, RefusalCode, put_on_stream};

use crate::os;
use crate::tls::Identity;

use super::connection_ids::ConnectionIds;
use super::handshakes::{Handshake, Handshakes};
use super::{
    Client, GOODBYE_TIMEOUT, HANDSHAKE_TIMEOUT, MAX_HANDSHAKES, Shared, TURN_FRAMES, Turn, WRITE_TIMEOUT,
    family, udp,
};

/// Datagrams that wait inside QUIC, in bytes each way; the queue proper is in the core.
const DATAGRAM_BUFFER: usize = 128 * 1024;
/// What a device may send on its stream ahead of us: one frame and some.
const STREAM_WINDOW: u32 = 128 * 1024;
/// A first congestion window of 256 packets: what is inside has its own congestion control, and this path is a fallback.
const INITIAL_WINDOW: u64 = 256 * 1_200;
/// After this long without an answer a path counts as gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// What may come, in bytes, over a connection that waits for its turn to be answered: some first packets, sent again.
const WAITING_BYTES: u64 = 16 * 1024;
/// Bytes read from the stream at once.
const READ_BYTES: usize = 4 * 1024;

pub(super) fn endpoint(
    identity: &Identity,
    tls: QuicServerConfig,
    socket: Arc<udp::Socket>,
) -> io::Result<Endpoint> {
    let mut transport = quinn::TransportConfig::default();
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().map_err(io::Error::other)?))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(STREAM_WINDOW))
        .send_window(u64::from(STREAM_WINDOW))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER)
        .congestion_controller_factory(Arc::new(congestion));
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(2 * MAX_HANDSHAKES)
        .incoming_buffer_size(WAITING_BYTES)
        .incoming_buffer_size_total(MAX_HANDSHAKES as u64 * WAITING_BYTES);
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new_with_abstract_socket(endpoint_config(identity), Some(config), socket, runtime)
}

/// A relay that was killed and started again knows none of its connections, but can prove that it was their relay: its
/// answer to their next packet is a stateless reset (RFC 9000, section 10.3), and the devices come back at once instead
/// of when [`IDLE_TIMEOUT`] passes. For that, what makes connection ids and reset tokens outlives the process.
fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let reset = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &identity.derive("quic stateless reset"));
    let mut config = EndpointConfig::new(Arc::new(reset));
    let ids = identity.derive("quic connection ids, 48 bits");
    config.cid_generator(move || Box::new(ConnectionIds::new(&ids)));
    // What tells QUIC's datagrams from the others on this port.
    config.grease_quic_bit(false);
    config
}

pub(super) async fn accept(shared: Arc<Shared>, endpoint: Endpoint, stop: CancellationToken) {
    let handshakes = Handshakes::new(MAX_HANDSHAKES);
    let mut tasks = JoinSet::new();
    loop {
        // Without pauses: what quinn can't hand over it ignores, and the device hears nothing and waits for a second.
        let incoming = tokio::select! {
            () = stop.cancelled() => break,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        while tasks.try_join_next().is_some() {} // a set of those that run
        // When it gets tight, only those who can be reached at the address they give go on.
        if handshakes.count() > MAX_HANDSHAKES / 2
            && !incoming.remote_address_validated()
            && incoming.may_retry()
        {
            let _ = incoming.retry(); // it may retry
            continue;
        }
        match handshakes.begin(incoming.remote_address().ip(), os::now().boot) {
            Some(handshake) => {
                tasks.spawn(serve(shared.clone(), incoming, handshake));
            }
            None => {
                shared.refused_handshake();
                incoming.refuse();
            }
        }
    }
    while tasks.join_next().await.is_some() {}
    endpoint.close(code(RefusalCode::ShuttingDown), b"");
    let _ = timeout(GOODBYE_TIMEOUT, endpoint.wait_idle()).await;
}

async fn serve(shared: Arc<Shared>, incoming: Incoming, handshake: Handshake) {
    let opened = tokio::select! {
        opened = timeout(HANDSHAKE_TIMEOUT, open(&shared, incoming)) => opened,
        () = handshake.evicted() => return shared.refused_handshake(),
    };
    drop(handshake);
    let Ok(Some(connection)) = opened else { return shared.failed_handshake() };
    let client = shared.connect();
    tracing::debug!(from = %connection.remote_address(), "connected over QUIC");
    // Waits only if the device allows no stream.
    let reason = match timeout(HANDSHAKE_TIMEOUT, connection.open_bi()).await {
        Ok(Ok((send, recv))) => tokio::select! {
            biased;
            reason = client.closing() => Some(reason),
            reason = read_stream(&client, recv) => reason,
            () = read_datagrams(&client, &connection) => None,
            reason = write(&client, &connection, send) => reason,
        },
        Ok(Err(_)) => None,
        Err(_) => Some(RefusalCode::AuthTimeout),
    };
    if let Some(reason) = reason {
        connection.close(code(reason), reason.text().as_bytes());
    }
    tracing::debug!(
        family = family(connection.remote_address()),
        reason = reason.map(RefusalCode::as_str),
        "disconnected (QUIC)"
    );
}

async fn open(shared: &Shared, incoming: Incoming) -> Option<Connection> {
    let connecting = shared.hellos.answer(|| incoming.accept()).await?.ok()?;
    connecting.await.ok()
}

fn code(reason: RefusalCode) -> VarInt {
    VarInt::from_u32(u32::from(reason.to_u8()))
}

/// Reads frames into the core until the stream ends (`None`) or makes no sense.
async fn read_stream(client: &Client, mut recv: RecvStream) -> Option<RefusalCode> {
    let (mut deframer, mut turn) = (Deframer::default(), Turn::of(TURN_FRAMES));
    loop {
        match recv.read_chunk(READ_BYTES, true).await {
            Ok(Some(chunk)) => deframer.buffer().extend_from_slice(&chunk.bytes),
            Ok(None) | Err(_) => return None,
        }
        loop {
            match deframer.next_frame() {
                Ok(Some(frame)) => client.frame(frame),
                Ok(None) => break,
                Err(_) => return Some(RefusalCode::Protocol),
            }
            turn.one().await;
        }
    }
}

async fn read_datagrams(client: &Client, connection: &Connection) {
    let mut turn = Turn::of(TURN_FRAMES);
    while let Ok(datagram) = connection.read_datagram().await {
        client.frame(&datagram);
        turn.one().await;
    }
}

/// Writes what waits, whenever there is something, until the connection breaks or stands still.
async fn write(client: &Client, connection: &Connection, mut send: SendStream) -> Option<RefusalCode> {
    let (mut batch, mut stream) = (Vec::new(), Vec::new());
    loop {
        client.wake().await;
        loop {
            client.take(&mut batch);
            if batch.is_empty() {
                break;
            }
            match timeout(WRITE_TIMEOUT, write_batch(connection, &mut send, &mut batch, &mut stream)).await {
                Ok(Some(())) => tokio::task::yield_now().await,
                Ok(None) => return None,
                Err(_) => return Some(RefusalCode::SlowReader),
            }
        }
        // An idle connection holds no buffers.
        (batch, stream) = (Vec::new(), Vec::new());
    }
}

async fn write_batch(
    connection: &Connection,
    send: &mut SendStream,
    batch: &mut Vec<QueuedFrame>,
    stream: &mut Vec<u8>,
) -> Option<()> {
    for frame in batch.drain(..) {
        let fits = connection.max_datagram_size().is_some_and(|max| frame.bytes.len() <= max);
        if frame.class == Class::Control || !fits {
            put_on_stream(&frame.bytes, stream);
            continue;
        }
        match connection.send_datagram_wait(Bytes::from_owner(frame.bytes)).await {
            Ok(()) => {}
            // The path got smaller in between: lost, as on any path.
            Err(quinn::SendDatagramError::TooLarge) => {}
            Err(_) => return None,
        }
    }
    send.write_all(stream).await.ok()?;
    stream.clear();
    Some(())
}
