//! A relay of its own: joins a coordinator, serves, and obeys what the coordinator says about devices.
//!
//! It does not serve before the coordinator has welcomed it once: only then does it know which tokens are too old. After
//! that it goes on while the coordinator is away; tokens end within ten minutes anyway, so that is also the longest that a
//! revocation can be missed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use rand_core::RngCore as _;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use warren_common::ids::DeviceId;
use warren_common::keys::NetmapPublicKey;
use warren_common::time::UnixTime;
use warren_common::url::CoordinatorUrl;
use warren_common::wire::control::{Ping, RefusedCode};
use warren_common::wire::relay_control::{
    MAX_COMMAND_DEVICES, RelayAck, RelayBody, RelayCommand, RelayHello, RelayJoinKey, RelayReport,
    RelayServerBody, RelayWelcome,
};

use crate::core::{Limits, MAX_CLOCK_SKEW};
use crate::observe::Observed;
use crate::os;
use crate::server::{RelayServer, RelayServerConfig, StartError};

mod link;
mod state;

use link::Link;
pub use state::{State, StateError};

/// First wait after a lost or failed session.
pub const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between two attempts: what a coordinator's restart costs at most.
pub const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Longest time from the first packet to the coordinator's welcome.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How often the relay asks whether the coordinator is there.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// A session that has been silent for so long is dead: two lost pings.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(40);
/// A session that stood for so long resets the back-off.
const STABLE: Duration = Duration::from_secs(30);

/// How to serve.
#[derive(Clone, Debug)]
pub struct JoinConfig {
    /// Where the coordinator is.
    pub coordinator: CoordinatorUrl,
    /// The join key; needed until the first welcome.
    pub join_key: Option<RelayJoinKey>,
    /// Where identity and certificate are kept.
    pub state_dir: PathBuf,
    /// Where to listen: QUIC and TLS.
    pub listen: SocketAddr,
    /// Where to answer STUN, if at all.
    pub stun_listen: Option<SocketAddr>,
    /// A second address of this host for STUN, with another port.
    pub stun_second: Option<SocketAddr>,
    /// Where devices reach it, if that differs from `listen`.
    pub advertise: Vec<SocketAddr>,
    /// Where devices reach its STUN service, if that differs from `stun_listen`.
    pub advertise_stun: Vec<SocketAddr>,
    /// How long devices may take to go elsewhere when the relay is told to stop.
    pub drain: Duration,
    /// Bounds.
    pub limits: Limits,
}

/// Why a relay does not serve (any more), or is without its coordinator.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The state directory can't be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The sockets or the certificate can't be had.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The coordinator won't have this relay.
    #[error("the coordinator refuses this relay ({code}): {text}. {fix}")]
    Refused {
        /// The coordinator's word for it.
        code: String,
        /// What is wrong.
        text: String,
        /// What to do about it.
        fix: String,
    },
    /// The other end is not this network's coordinator.
    #[error(
        "`{url}` is not this relay's coordinator: {why}. Check the URL; the join key names the coordinator"
    )]
    WrongCoordinator {
        /// Where.
        url: String,
        /// How that shows.
        why: String,
    },
    /// No session, or no longer.
    #[error("the coordinator at `{url}` can't be reached: {why}")]
    Away {
        /// Where.
        url: String,
        /// Why.
        why: String,
    },
}

impl JoinError {
    /// True if trying again can't help.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Away { .. } => false,
            Self::Refused { code, .. } => !matches!(
                RefusedCode::parse(code),
                RefusedCode::Busy | RefusedCode::StoreUnavailable | RefusedCode::Other
            ),
            Self::State(_) | Self::Start(_) | Self::WrongCoordinator { .. } => true,
        }
    }
}

/// Joins and serves until `stop`, then lets devices leave; what it does is told to `observed`.
///
/// # Errors
/// What trying again can't help: state, sockets, a refusal, another coordinator.
pub async fn run(config: JoinConfig, stop: CancellationToken, observed: Observed) -> Result<(), JoinError> {
    let state = State::open(&config.state_dir, config.join_key.as_ref())?;
    let mut relay = Joined { config, state, server: None, revision: 0, observed };
    let ended = relay.stay_joined(&stop).await;
    if let Some((server, _)) = relay.server.take() {
        if ended.is_ok() {
            tracing::info!("the relay stops; devices are told to go elsewhere");
            relay.observed.drains();
            server.drained(relay.config.drain).await;
        }
        server.shutdown().await;
    }
    ended
}

struct Joined {
    config: JoinConfig,
    state: State,
    /// With the key that it verifies tokens with.
    server: Option<(RelayServer, NetmapPublicKey)>,
    /// The newest command obeyed, or floor taken, since this process started.
    revision: u64,
    observed: Observed,
}

impl Joined {
    async fn stay_joined(&mut self, stop: &CancellationToken) -> Result<(), JoinError> {
        let mut backoff = MIN_BACKOFF;
        loop {
            let since = Instant::now();
            let ended = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ended = self.session() => ended,
            };
            self.observed.joined(false);
            // Once it serves, a strange answer (a proxy's, mostly) is no reason to stop.
            let strange = matches!(ended, JoinError::WrongCoordinator { .. }) && self.server.is_some();
            if ended.is_permanent() && !strange {
                return Err(ended);
            }
            if since.elapsed() >= STABLE {
                backoff = MIN_BACKOFF;
            }
            let wait = backoff.mul_f64(0.5 + f64::from(os::OsRng.next_u32()) / f64::from(u32::MAX) / 2.0);
            tracing::warn!(error = %ended, retry_in_ms = wait.as_millis() as u64, "no session with the coordinator");
            backoff = (2 * backoff).min(MAX_BACKOFF);
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = sleep(wait) => {}
            }
        }
    }

    /// One session, from the first packet to its end.
    async fn session(&mut self) -> JoinError {
        match self.try_session().await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_session(&mut self) -> Result<std::convert::Infallible, JoinError> {
        let url = self.config.coordinator.clone();
        let away = |why: &str| JoinError::Away { url: url.to_string(), why: why.to_owned() };
        let (mut link, netmap_key, welcome) =
            timeout(CONNECT_TIMEOUT, self.hello()).await.map_err(|_| away("it does not answer"))??;
        self.welcomed(netmap_key, &welcome).await?;
        link.send(RelayBody::Report(self.report())).await?;
        self.observed.joined(true);
        let (mut ping_at, mut silent_at) = (Instant::now() + PING_INTERVAL, Instant::now() + SILENCE_TIMEOUT);
        loop {
            tokio::select! {
                body = link.receive() => {
                    silent_at = Instant::now() + SILENCE_TIMEOUT;
                    match body? {
                        Some(RelayServerBody::Command(command)) => {
                            let revision = self.obey(&command);
                            link.send(RelayBody::Ack(RelayAck { revision })).await?;
                        }
                        Some(RelayServerBody::Refused(refused)) => return Err(refusal(refused)),
                        Some(RelayServerBody::Welcome(_) | RelayServerBody::Pong(_)) | None => {}
                    }
                }
                () = sleep_until(ping_at) => {
                    ping_at = Instant::now() + PING_INTERVAL;
                    link.send(RelayBody::Ping(Ping { nonce: 0 })).await?;
                }
                () = sleep_until(silent_at) => return Err(away("it stopped answering")),
            }
        }
    }

    async fn hello(&self) -> Result<(Link, NetmapPublicKey, RelayWelcome), JoinError> {
        let (mut link, identity) = Link::connect(&self.config.coordinator, &self.state).await?;
        let hello = RelayHello {
            relay: self.state.relay().to_bytes().to_vec(),
            secret: self.state.join_secret().map_or_else(Vec::new, |secret| secret.expose().to_vec()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: self.revision,
        };
        link.send(RelayBody::Hello(hello)).await?;
        loop {
            match link.receive().await? {
                Some(RelayServerBody::Welcome(welcome)) => return Ok((link, identity.netmap, welcome)),
                Some(RelayServerBody::Refused(refused)) => return Err(refusal(refused)),
                _ => {}
            }
        }
    }

    async fn welcomed(
        &mut self,
        netmap_key: NetmapPublicKey,
        welcome: &RelayWelcome,
    ) -> Result<(), JoinError> {
        self.state.joined()?;
        let (ours, theirs) = (os::now().unix, UnixTime::from_micros(welcome.unix_us));
        let off = ours.since(theirs).max(theirs.since(ours));
        if off > MAX_CLOCK_SKEW / 2 {
            tracing::warn!(
                off_s = off.as_secs(),
                "this clock and the coordinator's differ: tokens will be refused; run a time service"
            );
        }
        self.revision = self.revision.max(welcome.floor);
        let mut listen = self.config.listen;
        match self.server.take() {
            Some((server, key)) if key == netmap_key => {
                server.set_floor(welcome.floor);
                self.server = Some((server, key));
                return Ok(());
            }
            // Another key signs now: whoever is connected came with the old one.
            Some((server, _)) => {
                listen = server.local_addr();
                server.shutdown().await;
            }
            None => {}
        }
        tracing::info!(name = %welcome.name, relay = %self.state.relay(), "joined");
        let server = RelayServer::start(RelayServerConfig {
            listen,
            stun_listen: self.config.stun_listen,
            stun_second: self.config.stun_second,
            state_dir: self.config.state_dir.clone(),
            network: self.state.network(),
            relay: self.state.relay(),
            netmap_key,
            floor: welcome.floor,
            limits: self.config.limits.clone(),
        })?;
        self.observed.serves(&server);
        self.server = Some((server, netmap_key));
        Ok(())
    }

    fn report(&self) -> RelayReport {
        let Some((server, _)) = &self.server else { return RelayReport::default() };
        let (local, stun) = (server.local_addr(), server.stun_addr());
        RelayReport {
            addrs: advertised(&self.config.advertise, Some(local)),
            stun: advertised(&self.config.advertise_stun, stun),
            cert_sha256: server.cert_sha256().to_vec(),
            port: u32::from(local.port()),
            stun_port: stun.map_or(0, |addr| u32::from(addr.port())),
            draining: false,
        }
    }

    /// Does what the coordinator says, wholly, and returns what to acknowledge.
    fn obey(&mut self, command: &RelayCommand) -> u64 {
        if let Some((server, _)) = &self.server {
            obey(server, command);
        }
        self.revision = self.revision.max(command.revision);
        command.revision
    }
}

/// Does what a coordinator says about devices, wholly. In force when this returns.
pub fn obey(server: &RelayServer, command: &RelayCommand) {
    if command.minimums.len() + command.revoked.len() > MAX_COMMAND_DEVICES {
        server.set_floor(command.revision); // stricter than what it asks for, and bounded
    }
    for device in command.revoked.iter().filter_map(|id| DeviceId::from_slice(id)) {
        server.revoke(device, command.revision);
    }
    for minimum in command.minimums.iter().take(MAX_COMMAND_DEVICES) {
        if let Some(device) = DeviceId::from_slice(&minimum.device) {
            server.set_minimum_revision(device, minimum.revision);
        }
    }
    server.set_floor(command.floor);
}

/// What was asked for, or else where it listens unless that is everywhere.
fn advertised(wanted: &[SocketAddr], local: Option<SocketAddr>) -> Vec<String> {
    let local = local.filter(|addr| wanted.is_empty() && !addr.ip().is_unspecified());
    wanted.iter().copied().chain(local).map(|addr| addr.to_string()).collect()
}

fn refusal(refused: warren_common::wire::control::Refused) -> JoinError {
    JoinError::Refused { code: refused.code, text: refused.text, fix: refused.fix }
}
