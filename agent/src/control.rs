//! The control session's client: finds the coordinator, checks who it is, keeps one session open.
//!
//! A task of its own does the I/O. It knows nothing of netmaps: it hands decoded messages to the daemon and sends what
//! the daemon says. Each connection: TCP (see [`Egress`]), TLS for `https`, a WebSocket at `/control/v1`, the
//! coordinator's root-signed identity, Noise_IK. Back-off doubles to [`MAX_BACKOFF`] with jitter; a network change
//! skips the wait.

mod session;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rand_core::RngCore as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use warren_common::ids::NetworkId;
use warren_common::keys::{ControlSecretKey, Fingerprint};
use warren_common::url::CoordinatorUrl;
use warren_common::wire::control::{
    ClientBody, ClientMessage, CoordinatorIdentity, Ping, ServerBody, ServerMessage,
};

use crate::egress::Egress;
use crate::entropy::OsEntropy;
use crate::problem::Problem;
use session::Link;
pub use session::look;

/// First wait after a lost or failed connection.
pub const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between two attempts: what a coordinator's restart costs at most.
pub const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Longest time from the first packet to an established session.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How often the agent asks whether the coordinator is there: below the 60 s after which many middleboxes forget TCP.
pub const PING_INTERVAL: Duration = Duration::from_secs(25);
/// A session that has been silent for so long is dead: one lost ping and its answer's time.
pub const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// The same after a hint that the network is another one: a lost packet, its repetition and a round trip around the world.
const SUSPECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Messages waiting for the coordinator; more are refused to the daemon, which keeps what must not be lost.
pub const MAX_QUEUED: usize = 256;
/// A session that stood for so long resets the back-off.
const STABLE: Duration = Duration::from_secs(30);

/// Whom to talk to, and as whom.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Where the coordinator is.
    pub url: CoordinatorUrl,
    /// The network; any other is refused.
    pub network: NetworkId,
    /// The root key it must show.
    pub root: Fingerprint,
    /// The lowest epoch to accept.
    pub min_epoch: u64,
    /// The device's control key.
    pub secret: ControlSecretKey,
    /// The way out of this host.
    pub egress: Arc<Egress>,
}

/// What the client tells the daemon.
#[derive(Debug)]
pub enum ControlEvent {
    /// A session stands; the daemon must now enrol or resume.
    Connected(Box<CoordinatorIdentity>),
    /// The coordinator says something.
    Message(ServerBody),
    /// There is no session (any more).
    Away {
        /// Why.
        problem: Problem,
        /// True if trying again can't help: another coordinator, another network, no WebSocket there.
        permanent: bool,
    },
}

enum Command {
    Send(ClientBody),
    RetryNow,
    Close,
}

/// A running client; dropping it ends the session.
#[derive(Debug)]
pub struct ControlClient {
    commands: mpsc::Sender<Command>,
    _task: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Send(_) => "Send",
            Self::RetryNow => "RetryNow",
            Self::Close => "Close",
        })
    }
}

impl ControlClient {
    /// Starts connecting. Events arrive on `events` in order; when it is full the session waits (TCP pushes back).
    pub fn spawn(config: ControlConfig, events: mpsc::Sender<ControlEvent>) -> Self {
        let (commands, receiver) = mpsc::channel(MAX_QUEUED);
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(run(config, events, receiver));
        Self { commands, _task: AbortOnDropHandle::new(task) }
    }

    /// Sends a message, if a session stands and has room. False if it was not taken. One that is no introduction is dropped
    /// without a word until the coordinator has welcomed us: what must not be lost is said again then.
    pub fn send(&self, body: ClientBody) -> bool {
        self.commands.try_send(Command::Send(body)).is_ok()
    }

    /// The network changed: try again at once, and find out soon whether a standing session is dead.
    pub fn retry_now(&self) {
        // A full queue means that the task has work to do and will notice by itself.
        let _ = self.commands.try_send(Command::RetryNow);
    }

    /// Sends what is queued, then ends the session.
    pub async fn close(self) {
        if self.commands.send(Command::Close).await.is_ok() {
            let _ = timeout(Duration::from_secs(2), self.commands.closed()).await;
        }
    }
}

async fn run(
    config: ControlConfig,
    events: mpsc::Sender<ControlEvent>,
    mut commands: mpsc::Receiver<Command>,
) {
    let mut backoff = MIN_BACKOFF;
    loop {
        let (problem, permanent) = match timeout(CONNECT_TIMEOUT, session::connect(&config)).await {
            Ok(Ok((identity, link))) => {
                // What was queued for an earlier session means nothing in this one.
                while commands.try_recv().is_ok() {}
                if events.send(ControlEvent::Connected(Box::new(identity))).await.is_err() {
                    return;
                }
                let since = Instant::now();
                let end = serve(link, &events, &mut commands).await;
                if since.elapsed() >= STABLE {
                    backoff = MIN_BACKOFF;
                }
                match end {
                    End::Lost(why) => (session::away(&config.url, &why), false),
                    End::Closed => return,
                }
            }
            Ok(Err(failure)) => (failure.problem, failure.permanent),
            Err(_) => (session::away(&config.url, "it does not answer in time"), false),
        };
        tracing::debug!(code = %problem.code, "no control session: {}", problem.text);
        if events.send(ControlEvent::Away { problem, permanent }).await.is_err() {
            return;
        }
        // Half of the wait is jitter, so that the agents of a restarted coordinator do not come back in step.
        let half = backoff / 2;
        let wait = half + half.mul_f64(f64::from(OsEntropy.next_u32()) / f64::from(u32::MAX));
        backoff = (backoff * 2).min(MAX_BACKOFF);
        let pause = sleep(wait);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => break,
                command = commands.recv() => match command {
                    Some(Command::RetryNow) => {
                        backoff = MIN_BACKOFF;
                        break;
                    }
                    Some(Command::Send(_)) => {} // nobody to send it to
                    Some(Command::Close) | None => return,
                },
            }
        }
    }
}

enum End {
    Lost(String),
    Closed,
}

async fn serve(
    mut link: Link,
    events: &mpsc::Sender<ControlEvent>,
    commands: &mut mpsc::Receiver<Command>,
) -> End {
    let mut nonce = 0;
    let mut heard = Instant::now();
    let mut welcomed = false;
    let mut ping_at = Instant::now();
    loop {
        let work = tokio::select! {
            biased;
            command = commands.recv() => match command {
                // The daemon may not know yet that the former session is over, and one that speaks out of turn is ended.
                Some(Command::Send(body)) => Some(body).filter(|body| welcomed || introduces(body)),
                Some(Command::RetryNow) => {
                    // Ask now; silence ends the session after a short grace instead of the usual one.
                    heard = heard.min(Instant::now() - (SILENCE_TIMEOUT - SUSPECT_TIMEOUT));
                    nonce += 1;
                    Some(ClientBody::Ping(Ping { nonce }))
                }
                Some(Command::Close) | None => {
                    link.close().await;
                    return End::Closed;
                }
            },
            message = link.receive() => match message {
                Ok(message) => {
                    heard = Instant::now();
                    match ServerMessage::decode(message.as_slice()) {
                        Ok(ServerMessage { body: Some(body) }) => {
                            welcomed |= matches!(body, ServerBody::Welcome(_));
                            if events.send(ControlEvent::Message(body)).await.is_err() {
                                return End::Closed;
                            }
                        }
                        Ok(ServerMessage { body: None }) => tracing::debug!("a message of a later version is ignored"),
                        Err(e) => return End::Lost(format!("it sent a malformed message ({e})")),
                    }
                    None
                }
                Err(why) => return End::Lost(why),
            },
            () = tokio::time::sleep_until(ping_at) => {
                ping_at = Instant::now() + PING_INTERVAL;
                nonce += 1;
                Some(ClientBody::Ping(Ping { nonce }))
            }
            () = tokio::time::sleep_until(heard + SILENCE_TIMEOUT) => {
                return End::Lost("it fell silent".into());
            }
        };
        if let Some(body) = work {
            let bytes = ClientMessage { body: Some(body) }.encode_to_vec();
            match timeout(SILENCE_TIMEOUT, link.send(&bytes)).await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => return End::Lost(why),
                Err(_) => return End::Lost("it takes no data".into()),
            }
        }
    }
}

/// True for what the coordinator takes before it has welcomed us.
const fn introduces(body: &ClientBody) -> bool {
    matches!(body, ClientBody::Enroll(_) | ClientBody::Resume(_) | ClientBody::Ping(_))
}

#[cfg(test)]
mod tests;
