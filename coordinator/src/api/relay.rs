//! The session of a relay of its own process, at `/relay/v1`: it joins, says where it is, and hears of changes.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use prost::Message as _;
use tokio::time::{Instant, interval_at, timeout, timeout_at};
use warren_common::ids::RelayId;
use warren_common::keys::ControlPublicKey;
use warren_common::wire::control::{Pong, Refused};
use warren_common::wire::relay_control::{
    MAX_ADDRS, RelayBody, RelayHello, RelayJoinSecret, RelayMessage, RelayReport, RelayServerBody,
    RelayServerMessage, RelayWelcome,
};
use warren_common::wire::session::Session;

use super::Shared;
use super::control::{
    HANDSHAKE_PATIENCE, IDLE_LIMIT, MAX_FRAME, PING_INTERVAL, WRITE_PATIENCE, handshake, receive,
};
use super::http::PeerAddr;
use crate::domain::{Command, Refusal, Reply};
use crate::os;

/// Most messages a relay may send between two of our pings; it has little to say.
pub const MAX_RELAY_MESSAGES: usize = 1_024;

/// Longest version of a relay that is logged, in characters: ours are shorter.
const MAX_VERSION: usize = 32;

/// Takes the WebSocket upgrade of `/relay/v1`.
pub(super) async fn upgrade(
    State(shared): State<Arc<Shared>>,
    Extension(PeerAddr(peer)): Extension<PeerAddr>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let Ok(permit) = shared.half_open.clone().try_acquire_owned() else {
        let text = "too many connections are being set up; try again in a moment\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    upgrade.max_frame_size(MAX_FRAME).max_message_size(MAX_FRAME).on_upgrade(move |mut socket| async move {
        let opened = async {
            let (session, control) = handshake(&mut socket, &shared).await?;
            let mut link = Link { socket, session };
            let hello = loop {
                if let RelayBody::Hello(hello) = link.next().await? {
                    break hello;
                }
            };
            Some((link, control, hello))
        };
        let opened = timeout_at(Instant::now() + HANDSHAKE_PATIENCE, opened).await;
        drop(permit);
        if let Ok(Some((mut link, control, hello))) = opened {
            tokio::select! {
                _ = serve(&mut link, &shared, control, hello, peer) => {}
                () = shared.stop.cancelled() => {}
            }
            // The relay may be gone already.
            let _ = timeout(WRITE_PATIENCE, link.socket.send(Message::Close(None))).await;
        }
    })
}

struct Link {
    socket: WebSocket,
    session: Session,
}

impl Link {
    async fn send(&mut self, body: RelayServerBody) -> Option<()> {
        let message = RelayServerMessage { body: Some(body) }.encode_to_vec();
        for frame in self.session.seal(&message).ok()? {
            timeout(WRITE_PATIENCE, self.socket.send(Message::Binary(frame.into()))).await.ok()?.ok()?;
        }
        Some(())
    }

    /// The next message; `None` if the connection ends or makes no sense. Kinds we don't know are skipped.
    async fn next(&mut self) -> Option<RelayBody> {
        loop {
            let frame = receive(&mut self.socket).await?;
            if let Some(message) = self.session.open(&frame).ok()?
                && let Some(body) = RelayMessage::decode(message.as_slice()).ok()?.body
            {
                return Some(body);
            }
        }
    }

    async fn refuse(&mut self, refusal: &Refusal) -> Option<()> {
        self.send(RelayServerBody::Refused(Refused {
            code: refusal.code().as_str().to_owned(),
            text: refusal.to_string(),
            fix: refusal.fix().to_owned(),
        }))
        .await
    }
}

async fn serve(
    link: &mut Link,
    shared: &Shared,
    control: ControlPublicKey,
    hello: RelayHello,
    peer: SocketAddr,
) -> Option<()> {
    let id = RelayId::from_slice(&hello.relay)?;
    let secret = RelayJoinSecret::from_slice(&hello.secret);
    let joined =
        shared.handle.command(Command::JoinRelay { relay: id, control, secret: secret.map(|s| s.hash()) });
    let name = match joined.await.ok()? {
        Ok(Reply::Joined { name }) => name,
        Ok(_) => return None,
        Err(refusal) => return link.refuse(&refusal).await,
    };
    let mut seat = shared.relays.sit(id, hello.revision);
    // The relay's words: escaped and cut.
    let version: String = hello.version.chars().take(MAX_VERSION).collect();
    tracing::info!(relay = %name, version = version.as_str(), "a relay joins");
    let welcome = RelayWelcome { name, floor: seat.floor, unix_us: os::now().unix.as_micros() };
    link.send(RelayServerBody::Welcome(welcome)).await?;

    let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
    let (mut heard, mut said) = (Instant::now(), 0);
    loop {
        tokio::select! {
            body = link.socket.recv() => {
                let message = body?.ok()?;
                heard = Instant::now();
                let frame = match message {
                    Message::Binary(frame) => frame,
                    Message::Ping(_) | Message::Pong(_) => continue,
                    Message::Text(_) | Message::Close(_) => return None,
                };
                said += 1;
                if said > MAX_RELAY_MESSAGES {
                    tracing::warn!(relay = %id, "a relay says too much");
                    return None;
                }
                let Some(message) = link.session.open(&frame).ok()? else { continue };
                match RelayMessage::decode(message.as_slice()).ok()?.body {
                    Some(RelayBody::Report(report)) => {
                        let command = report_command(id, control, &report, peer)?;
                        if let Err(refusal) = shared.handle.command(command).await.ok()? {
                            return link.refuse(&refusal).await;
                        }
                    }
                    Some(RelayBody::Ping(ping)) => {
                        let pong = Pong { nonce: ping.nonce, unix_us: os::now().unix.as_micros() };
                        link.send(RelayServerBody::Pong(pong)).await?;
                    }
                    Some(RelayBody::Hello(_)) => return None,
                    Some(RelayBody::Ack(_)) | None => {}
                }
            }
            command = seat.commands.recv() => link.send(RelayServerBody::Command(command?)).await?,
            _ = pings.tick() => {
                said = 0;
                if heard.elapsed() > IDLE_LIMIT {
                    return None;
                }
                timeout(WRITE_PATIENCE, link.socket.send(Message::Ping(Vec::new().into()))).await.ok()?.ok()?;
            }
        }
    }
}

/// What a report says; addresses it leaves out are the one we see.
fn report_command(
    relay: RelayId,
    control: ControlPublicKey,
    report: &RelayReport,
    peer: SocketAddr,
) -> Option<Command> {
    let addrs = |given: &[String], port: u32| -> Option<Vec<SocketAddr>> {
        if given.len() > MAX_ADDRS {
            return None;
        }
        let port = u16::try_from(port).ok()?;
        match given {
            [] if port == 0 => Some(Vec::new()),
            [] => Some(vec![SocketAddr::new(peer.ip().to_canonical(), port)]),
            given => given.iter().map(|a| a.parse().ok()).collect(),
        }
    };
    let (mut listens, mut stun) =
        (addrs(&report.addrs, report.port)?, addrs(&report.stun, report.stun_port)?);
    if report.draining {
        // Without addresses it is in no netmap.
        (listens, stun) = (Vec::new(), Vec::new());
    }
    let cert_sha256 = report.cert_sha256.as_slice().try_into().ok()?;
    Some(Command::ReportRelay { relay, control, addrs: listens, stun, cert_sha256 })
}
