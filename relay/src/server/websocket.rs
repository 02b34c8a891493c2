//! WebSockets inside TLS over TCP: for networks that let no UDP through, or nothing but HTTP. One frame per binary message.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::server::Acceptor;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_util::sync::CancellationToken;
use warren_common::time::Instant;
use warren_common::wire::relay::{MAX_FRAME, RefusalCode};

use super::barred::Barred;
use super::handshakes::{Handshake, Handshakes};
use super::{
    Client, GOODBYE_TIMEOUT, HANDSHAKE_TIMEOUT, MAX_HANDSHAKES, Shared, TURN_ACCEPTS, TURN_FRAMES, Turn,
    WRITE_TIMEOUT, family,
};
use crate::{http, os};

/// What the kernel may hold unsent for one connection, in bytes: more would only be delay, and packets that a revocation
/// can't call back.
const UNSENT_BYTES: u32 = 64 * 1024;
/// Bytes read at once; small, since an idle connection holds that much.
const READ_BYTES: usize = 4 * 1024;
/// Bytes that are gathered for one TLS record; an idle connection keeps a buffer for as many.
const WRITE_BYTES: usize = 8 * 1024;
/// Pause after the system refused to accept (out of file descriptors, mostly): it will not be better at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Socket = WebSocketStream<TlsStream<TcpStream>>;

pub(super) async fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    stop: CancellationToken,
) {
    let handshakes = Handshakes::new(MAX_HANDSHAKES);
    let (mut tasks, mut turn) = (JoinSet::new(), Turn::of(TURN_ACCEPTS));
    let mut barred = Barred::default();
    loop {
        turn.one().await;
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => Some(accepted),
            () = until(barred.due()) => None,
        };
        let now = os::now().boot;
        // Looked at each time: while connections come without a pause the timer is never heard.
        let mut changed = barred.due().is_some_and(|due| due <= now);
        if changed {
            barred.lift(now);
        }
        let mut came_to_nothing = |from| {
            if barred.failed(from, now) {
                shared.barred_network();
                changed = true;
            }
        };
        while let Some(ended) = tasks.try_join_next() {
            if let Ok(Ended::Stranger(from)) = ended {
                came_to_nothing(from);
            }
        }
        match accepted {
            Some(Ok((stream, from))) => match handshakes.begin(from.ip(), now) {
                Some(handshake) => {
                    tasks.spawn(serve(shared.clone(), tls.clone(), stream, from, handshake));
                }
                None => {
                    shared.refused_handshake();
                    came_to_nothing(from.ip());
                }
            },
            Some(Err(error)) => {
                tracing::warn!(%error, "the relay can't accept a TCP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None => {}
        }
        if changed && let Err(error) = barred.install(&listener) {
            tracing::debug!(%error, "the relay can't bar networks");
        }
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

/// Returns at that time, if there is one.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep(due.since(os::now().boot)).await,
        None => std::future::pending().await,
    }
}

/// What a connection was.
enum Ended {
    /// Whoever it was opened a WebSocket.
    Served,
    /// Nobody's, from there: it came to nothing.
    Stranger(IpAddr),
}

async fn serve(
    shared: Arc<Shared>,
    tls: Arc<rustls::ServerConfig>,
    stream: TcpStream,
    from: SocketAddr,
    handshake: Handshake,
) -> Ended {
    // It has the listener's filter of when it was made, which costs and, if it came in just before, names this one.
    let _ = socket2::SockRef::from(&stream).detach_filter();
    // Best effort: without these it is only slower.
    let _ = stream.set_nodelay(true);
    let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
    // Boxed: what a handshake needs is not kept for the life of the session.
    let opened = tokio::select! {
        opened = timeout(HANDSHAKE_TIMEOUT, Box::pin(open(&shared, tls, stream))) => opened,
        () = handshake.evicted() => {
            shared.refused_handshake();
            return Ended::Stranger(from.ip());
        }
    };
    drop(handshake);
    let Ok(Some(socket)) = opened else {
        shared.failed_handshake();
        return Ended::Stranger(from.ip());
    };
    let client = shared.connect();
    tracing::debug!(%from, "connected over a WebSocket");
    let (mut writer, mut reader) = socket.split();
    let reason = tokio::select! {
        biased;
        reason = client.closing() => Some(reason),
        reason = read(&client, &mut reader) => reason,
        reason = write(&client, &mut writer) => reason,
    };
    if let (Some(reason), Ok(socket)) = (reason, reader.reunite(writer)) {
        let _ = timeout(GOODBYE_TIMEOUT, Box::pin(goodbye(socket, reason))).await;
    }
    tracing::debug!(
        family = family(from),
        reason = reason.map(RefusalCode::as_str),
        "disconnected (WebSocket)"
    );
    Ended::Served
}

async fn open(shared: &Shared, tls: Arc<rustls::ServerConfig>, stream: TcpStream) -> Option<Socket> {
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await.ok()?;
    let stream = shared.hellos.answer(|| hello.into_stream(tls)).await?.await.ok()?;
    let settings = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(WRITE_BYTES)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME));
    http::upgrade(stream, settings).await.ok()
}

/// Reads frames into the core until the stream ends (`None`) or makes no sense.
async fn read(client: &Client, reader: &mut SplitStream<Socket>) -> Option<RefusalCode> {
    let mut turn = Turn::of(TURN_FRAMES);
    loop {
        match reader.next().await {
            Some(Ok(Message::Binary(frame))) => client.frame(&frame),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {} // the library answers
            Some(
                Ok(Message::Text(_) | Message::Frame(_)) | Err(WsError::Protocol(_) | WsError::Capacity(_)),
            ) => {
                return Some(RefusalCode::Protocol);
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
        }
        turn.one().await;
    }
}

/// Writes what waits, whenever there is something, until the stream breaks or stands still.
async fn write(client: &Client, writer: &mut SplitSink<Socket, Message>) -> Option<RefusalCode> {
    let mut batch = Vec::new();
    loop {
        client.wake().await;
        loop {
            client.take(&mut batch);
            if batch.is_empty() {
                break;
            }
            let write = async {
                for frame in batch.drain(..) {
                    writer.feed(Message::Binary(Bytes::from_owner(frame.bytes))).await?;
                }
                writer.flush().await
            };
            match timeout(WRITE_TIMEOUT, write).await {
                Ok(Ok(())) => tokio::task::yield_now().await,
                Ok(Err(_)) => return None,
                Err(_) => return Some(RefusalCode::SlowReader),
            }
        }
        // An idle connection holds no buffer.
        batch = Vec::new();
    }
}

async fn goodbye(mut socket: Socket, reason: RefusalCode) -> Result<(), WsError> {
    socket.feed(Message::binary(reason.frame().to_vec())).await?;
    socket.close(None).await?;
    socket.get_mut().shutdown().await?;
    Ok(())
}
