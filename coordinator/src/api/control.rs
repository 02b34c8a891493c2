//! One control session per WebSocket: identity, Noise handshake, then messages both ways.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, timeout, timeout_at};
use warren_common::keys::ControlPublicKey;
use warren_common::wire::control::{ClientMessage, Refused, ServerBody, ServerMessage};
use warren_common::wire::session::{self, Session};

use super::Shared;
use crate::os::OsEntropy;
use crate::push::{CloseReason, SessionId};
use crate::server::{MAX_OUTBOUND, ToSession};

/// Connections that may be between their upgrade and the end of their handshake; more are told to come back.
pub const MAX_HALF_OPEN: usize = 512;
/// How long a handshake may take.
pub const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Longest frame, in bytes: a Noise message.
pub const MAX_FRAME: usize = 65_535;
/// How often a quiet connection is asked whether it is still there.
pub const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long a connection may say nothing at all, answers to pings included.
pub const IDLE_LIMIT: Duration = Duration::from_secs(90);
/// How long one frame may take to be written.
pub const WRITE_PATIENCE: Duration = Duration::from_secs(20);

/// Takes the WebSocket upgrade of `/control/v1`.
pub(super) async fn upgrade(State(shared): State<Arc<Shared>>, upgrade: WebSocketUpgrade) -> Response {
    let Ok(permit) = shared.half_open.clone().try_acquire_owned() else {
        let text = "too many connections are being set up; try again in a moment\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    upgrade.max_frame_size(MAX_FRAME).max_message_size(MAX_FRAME).on_upgrade(move |mut socket| async move {
        let deadline = Instant::now() + HANDSHAKE_PATIENCE;
        let opened = timeout_at(deadline, open(&mut socket, &shared)).await;
        drop(permit);
        let Ok(Some((session, id, outbound))) = opened else { return };
        let stop = shared.stop.clone();
        let mut connection = Connection { socket, session, outbound };
        let end = tokio::select! {
            end = connection.run(id, &shared) => end,
            () = stop.cancelled() => End::Stopping,
        };
        shared.handle.disconnect(id).await;
        connection.bye(end).await;
    })
}

/// Why a connection ends.
enum End {
    /// The other side is gone, or its bytes make no sense.
    Gone,
    /// The coordinator ends it.
    Closed(CloseReason),
    /// The coordinator took its channel away: it was too slow.
    Slow,
    /// The process stops.
    Stopping,
}

type Opened = (Session, SessionId, mpsc::Receiver<ToSession>);

/// Identity and Noise handshake: the session and the control key that the other side has proved.
pub(super) async fn handshake(
    socket: &mut WebSocket,
    shared: &Shared,
) -> Option<(Session, ControlPublicKey)> {
    socket.send(Message::Binary(Bytes::copy_from_slice(&shared.identity))).await.ok()?;
    let hello = receive(socket).await?;
    let (session, control, answer) =
        session::accept(&shared.control_key, shared.network, &hello, &mut OsEntropy)
            .inspect_err(|error| tracing::debug!(%error, "a handshake failed"))
            .ok()?;
    socket.send(Message::Binary(answer.into())).await.ok()?;
    Some((session, control))
}

async fn open(socket: &mut WebSocket, shared: &Shared) -> Option<Opened> {
    let (mut session, control) = handshake(socket, shared).await?;
    let (sender, outbound) = mpsc::channel(MAX_OUTBOUND);
    match shared.handle.connect(control, sender).await.ok()? {
        Ok(id) => Some((session, id, outbound)),
        Err(refusal) => {
            let refused = Refused {
                code: refusal.code().as_str().to_owned(),
                text: refusal.to_string(),
                fix: refusal.fix().to_owned(),
            };
            send(socket, &mut session, ServerBody::Refused(refused)).await?;
            None
        }
    }
}

/// The next binary message; `None` if the connection ends or sends text.
pub(super) async fn receive(socket: &mut WebSocket) -> Option<Bytes> {
    loop {
        match socket.recv().await?.ok()? {
            Message::Binary(frame) => return Some(frame),
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Text(_) | Message::Close(_) => return None,
        }
    }
}

async fn send(socket: &mut WebSocket, session: &mut Session, body: ServerBody) -> Option<()> {
    let message = ServerMessage { body: Some(body) }.encode_to_vec();
    let frames = session
        .seal(&message)
        .inspect_err(|error| tracing::warn!(%error, "a message can't be sealed"))
        .ok()?;
    for frame in frames {
        timeout(WRITE_PATIENCE, socket.send(Message::Binary(frame.into()))).await.ok()?.ok()?;
    }
    Some(())
}

struct Connection {
    socket: WebSocket,
    session: Session,
    outbound: mpsc::Receiver<ToSession>,
}

impl Connection {
    async fn run(&mut self, id: SessionId, shared: &Shared) -> End {
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                received = self.socket.recv() => {
                    let Some(Ok(message)) = received else { return End::Gone };
                    heard = Instant::now();
                    let frame = match message {
                        Message::Binary(frame) => frame,
                        Message::Ping(_) | Message::Pong(_) => continue,
                        Message::Text(_) | Message::Close(_) => return End::Gone,
                    };
                    let body = match self.session.open(&frame) {
                        Ok(None) => continue,
                        Ok(Some(message)) => match ClientMessage::decode(message.as_slice()) {
                            Ok(message) => message.body,
                            Err(_) => return End::Closed(CloseReason::Protocol),
                        },
                        Err(_) => return End::Gone,
                    };
                    if let Some(body) = body && shared.handle.message(id, body).await.is_err() {
                        return End::Stopping;
                    }
                }
                told = self.outbound.recv() => match told {
                    Some(ToSession::Message(body)) => {
                        if send(&mut self.socket, &mut self.session, *body).await.is_none() {
                            return End::Gone;
                        }
                    }
                    Some(ToSession::Close(reason)) => return End::Closed(reason),
                    None => return End::Slow,
                },
                _ = pings.tick() => {
                    if heard.elapsed() > IDLE_LIMIT {
                        return End::Gone;
                    }
                    let ping = self.socket.send(Message::Ping(Bytes::new()));
                    if !matches!(timeout(WRITE_PATIENCE, ping).await, Ok(Ok(()))) {
                        return End::Gone;
                    }
                }
            }
        }
    }

    /// Says good-bye, if somebody listens.
    async fn bye(mut self, end: End) {
        // Codes of RFC 6455: going away, policy violation, try again later.
        let (code, reason) = match end {
            End::Gone => return,
            End::Stopping => (1001, "the coordinator stops"),
            End::Slow => (1013, "too slow"),
            End::Closed(CloseReason::Refused) => (1000, "refused"),
            End::Closed(CloseReason::Superseded) => (1000, "a newer session of the device"),
            End::Closed(CloseReason::DeviceGone) => (1000, "the device is out"),
            End::Closed(CloseReason::Silent) => (1008, "nobody said who this is"),
            End::Closed(CloseReason::Protocol) => (1008, "out of turn"),
            End::Closed(CloseReason::Flood) => (1008, "too many messages"),
            End::Closed(CloseReason::Stuck) => (1008, "no acknowledgement"),
        };
        let close = Message::Close(Some(CloseFrame { code, reason: reason.into() }));
        // The other side may be gone already: nothing depends on its hearing this.
        let _ = timeout(Duration::from_secs(1), self.socket.send(close)).await;
        // Give it the chance to close first, so that what was sent before is read and not reset.
        let _ =
            timeout(Duration::from_secs(1), async { while let Some(Ok(_)) = self.socket.recv().await {} })
                .await;
    }
}
