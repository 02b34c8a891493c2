//! The client of one relay: keeps one authenticated connection to it, over QUIC or, where UDP does not pass, TLS over TCP,
//! and beside it plain UDP for the packets, where that passes.
//!
//! A task of its own does the I/O. It asks for tokens by event and is given them by [`RelayClient::provide_token`]; packets
//! go in by [`RelayClient::send`], which never waits, and come out as events. A lost connection is tried again after a
//! back-off that doubles to [`MAX_BACKOFF`], with jitter. A connection over TLS looks for QUIC from time to time and moves
//! over when it is there.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rand_core::RngCore as _;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::ProbeSecretKey;
use warren_common::netmap::Relay;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::udp::UdpKeys;
use warren_common::wire::relay::{
    Binding, Class, DATA_QUEUE_BYTES, Frame, FrameQueue, GoneReason, MAX_PAYLOAD, Proven, Pushed,
    QueuedFrame, RefusalCode, TokenRef, is_handshake,
};
use warren_engine::relay_link::{Check, KEEPALIVE, Liveness};

use crate::clock;
use crate::entropy::OsEntropy;

mod link;
mod udp;

pub use link::Transport;
use link::{End, Link, Reader, Writer};
use udp::UdpLink;

/// First wait after a lost or failed connection.
pub const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// Longest wait between two attempts.
pub const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Wait after another connection of the same device took over: two hosts with one identity must not fight.
const REPLACED_BACKOFF: Duration = Duration::from_secs(20);
/// How long TLS waits for QUIC to come first.
pub const QUIC_HEAD_START: Duration = Duration::from_secs(2);
/// The same where QUIC did not pass last time.
const SHORT_HEAD_START: Duration = Duration::from_millis(300);
/// A relay that said it would close is expected back for so long: it is restarted, mostly.
const RESTART_TIME: Duration = Duration::from_secs(10);
/// Pause between attempts meanwhile, and longest time that one of them takes: what is sent before it listens is lost, and
/// QUIC repeats itself only after a second.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
const RESTART_DIAL_TIMEOUT: Duration = Duration::from_millis(400);
/// Longest time from the first packet to a TLS or QUIC connection.
const DIAL_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the relay may take to authenticate us; it waits for 10 s itself.
const STEP_TIMEOUT: Duration = Duration::from_secs(9);
/// How long the daemon may take to get a token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(7);
/// An answer over a connection may take so long where the round trip is short: it waits its turn behind packets.
const MIN_PING_PAUSE: Duration = Duration::from_millis(500);
/// How often a connection over TLS tries QUIC.
pub const UPGRADE_INTERVAL: Duration = Duration::from_secs(300);
/// A token is asked for again after so long without one.
const ASK_INTERVAL: Duration = Duration::from_secs(5);
/// A token older than this (of at most 10 min of life) is not used for a new connection.
const TOKEN_FRESH: Duration = Duration::from_secs(420);
/// A connection that stood for so long resets the back-off.
const STABLE: Duration = Duration::from_secs(30);
/// Commands that wait; more are refused to the daemon.
const MAX_COMMANDS: usize = 16;
/// Most bytes taken from the queue at once.
const BATCH_BYTES: usize = 64 * 1024;

/// Which relay, and as whom.
#[derive(Clone, Debug)]
pub struct RelayClientConfig {
    /// The relay, as the netmap says.
    pub relay: Relay,
    /// The network.
    pub network: NetworkId,
    /// The device's probe key, which its tokens name.
    pub probe: ProbeSecretKey,
    /// Mark of our sockets, so that no overlay route captures them; 0 for none.
    pub mark: u32,
}

/// What a client tells the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayEvent {
    /// Which relay's client.
    pub relay: RelayId,
    /// What happened.
    pub kind: RelayEventKind,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayEventKind {
    /// Packets flow from now on.
    Connected {
        /// Over what.
        transport: Transport,
        /// The relay's address.
        addr: SocketAddr,
    },
    /// They take another way now; the connection stands as it did.
    Moved {
        /// Over what.
        transport: Transport,
    },
    /// They don't (any more); the client tries again by itself.
    Disconnected {
        /// Why, for people.
        why: String,
        /// The relay's own word for it, if it gave one.
        refused: Option<RefusalCode>,
    },
    /// A packet came, from the device that the relay names.
    Received {
        /// The sender.
        src: DeviceId,
        /// The packet.
        payload: Bytes,
    },
    /// Get a token for this relay from the coordinator and hand it to [`RelayClient::provide_token`]. Repeated until then.
    NeedToken,
    /// A packet went nowhere.
    PeerGone {
        /// The destination.
        device: DeviceId,
        /// Why. After `NotPermitted` a new token is asked for.
        why: GoneReason,
    },
    /// The relay will close soon: peers had better be reached through another.
    Draining {
        /// How soon.
        after: Duration,
    },
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It waits for the transport; so many older ones made room.
    Queued {
        /// Dropped to make room.
        dropped: usize,
    },
    /// There is no connection.
    NotConnected,
    /// The queue is full of handshake messages.
    Full,
    /// It is empty or longer than [`MAX_PAYLOAD`].
    Length,
}

#[derive(Debug)]
enum Command {
    Token(Signed),
    NetworkChanged,
}

/// A running client; dropping it ends the connection.
#[derive(Debug)]
pub struct RelayClient {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<FrameQueue>,
    wake: Notify,
    connected: AtomicBool,
    /// The connection is over QUIC, not TLS.
    quic: AtomicBool,
    /// Packets go over plain UDP.
    udp: AtomicBool,
    /// In microseconds; `u64::MAX` before the first measurement of a connection.
    rtt: AtomicU64,
    /// How long UDP may be silent.
    keepalive: watch::Sender<Duration>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, FrameQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, class: Class, frame: &Frame<'_>) -> Pushed {
        let pushed = self.queue().push(class, frame.to_vec());
        self.wake.notify_one();
        pushed
    }

    fn set_udp(&self, up: bool) {
        self.udp.store(up, Ordering::Release);
    }

    fn transport(&self) -> Option<Transport> {
        let over = match (self.udp.load(Ordering::Acquire), self.quic.load(Ordering::Acquire)) {
            (true, _) => Transport::Udp,
            (false, true) => Transport::Quic,
            (false, false) => Transport::Tls,
        };
        self.connected.load(Ordering::Acquire).then_some(over)
    }

    /// The round trip as last measured, if ever.
    fn last_rtt(&self) -> Duration {
        let micros = self.rtt.load(Ordering::Relaxed);
        if micros == u64::MAX { Duration::ZERO } else { Duration::from_micros(micros) }
    }

    fn take(&self, batch: &mut Vec<QueuedFrame>) {
        let (mut queue, mut bytes) = (self.queue(), 0);
        while bytes < BATCH_BYTES
            && let Some(frame) = queue.pop()
        {
            bytes += frame.bytes.len();
            batch.push(frame);
        }
    }
}

impl RelayClient {
    /// Starts connecting. Events arrive on `events` in order; when it is full, reading from the relay waits.
    pub fn spawn(config: RelayClientConfig, events: mpsc::Sender<RelayEvent>) -> Self {
        let (commands, receiver) = mpsc::channel(MAX_COMMANDS);
        let shared = Arc::new(Shared {
            queue: Mutex::new(FrameQueue::new(DATA_QUEUE_BYTES)),
            wake: Notify::new(),
            connected: AtomicBool::new(false),
            quic: AtomicBool::new(false),
            udp: AtomicBool::new(false),
            rtt: AtomicU64::new(u64::MAX),
            keepalive: watch::Sender::new(KEEPALIVE),
        });
        let task = Task {
            events: Events { relay: config.relay.id, sender: events },
            config: Arc::new(config),
            shared: shared.clone(),
            commands: receiver,
            token: None,
            asked: None,
            quic_failed: false,
            restarting: None,
        };
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(task.run());
        Self { shared, commands, _task: AbortOnDropHandle::new(task) }
    }

    /// Queues a packet for `dst`; never waits. When the relay is slow, the oldest data is dropped, handshakes never are.
    pub fn send(&self, dst: DeviceId, payload: &[u8]) -> Sent {
        if payload.is_empty() || payload.len() > MAX_PAYLOAD {
            return Sent::Length;
        }
        if !self.shared.connected.load(Ordering::Acquire) {
            return Sent::NotConnected;
        }
        let class = if is_handshake(payload) { Class::Handshake } else { Class::Data };
        match self.shared.push(class, &Frame::Send { dst, payload }) {
            Pushed::Queued { dropped } => Sent::Queued { dropped },
            Pushed::Full => Sent::Full,
        }
    }

    /// A token for this relay: asked for by [`RelayEventKind::NeedToken`], or because what it permits has changed.
    pub fn provide_token(&self, token: Signed) {
        // If the queue is full, the client asks again.
        let _ = self.commands.try_send(Command::Token(token));
    }

    /// The network changed: find out soon whether the connection still stands, try at once if there is none.
    pub fn network_changed(&self) {
        // If the queue is full, the task is awake anyway.
        let _ = self.commands.try_send(Command::NetworkChanged);
    }

    /// How long UDP to the relay may be silent before it needs a word: [`KEEPALIVE`] unless told otherwise.
    pub fn set_keepalive(&self, keepalive: Duration) {
        self.shared.keepalive.send_replace(keepalive);
    }

    /// True while packets flow.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }

    /// What packets run over now.
    pub fn transport(&self) -> Option<Transport> {
        self.shared.transport()
    }

    /// The round trip to the relay, measured by the last ping of this connection.
    pub fn rtt(&self) -> Option<Duration> {
        let micros = self.shared.rtt.load(Ordering::Relaxed);
        (self.is_connected() && micros != u64::MAX).then(|| Duration::from_micros(micros))
    }
}

#[derive(Clone)]
struct Events {
    relay: RelayId,
    sender: mpsc::Sender<RelayEvent>,
}

impl Events {
    /// A daemon that is gone takes its clients with it: a closed channel needs no answer.
    async fn send(&self, kind: RelayEventKind) {
        let _ = self.sender.send(RelayEvent { relay: self.relay, kind }).await;
    }
}

struct Task {
    config: Arc<RelayClientConfig>,
    shared: Arc<Shared>,
    events: Events,
    commands: mpsc::Receiver<Command>,
    token: Option<(Signed, Instant)>,
    /// When the daemon was last asked for a token that has not come.
    asked: Option<Instant>,
    quic_failed: bool,
    /// Until when the relay is expected back at any moment.
    restarting: Option<Instant>,
}

/// How a session ends.
enum Outcome {
    End(End),
    /// QUIC passes now.
    Upgrade(Box<Link>),
}

impl Task {
    async fn run(mut self) {
        let mut backoff = MIN_BACKOFF;
        let mut upgrade = None;
        loop {
            let end = match self.connect(upgrade.take()).await {
                Ok((link, keys)) => {
                    let since = Instant::now();
                    let (transport, addr) = (link.transport, link.addr);
                    self.shared.quic.store(transport == Transport::Quic, Ordering::Release);
                    self.shared.connected.store(true, Ordering::Release);
                    self.events.send(RelayEventKind::Connected { transport, addr }).await;
                    let outcome = self.session(link, keys).await;
                    self.shared.connected.store(false, Ordering::Release);
                    self.shared.set_udp(false);
                    if since.elapsed() >= STABLE {
                        backoff = MIN_BACKOFF;
                    }
                    match outcome {
                        Outcome::Upgrade(link) => {
                            upgrade = Some(link);
                            continue;
                        }
                        Outcome::End(end) => end,
                    }
                }
                Err(end) => end,
            };
            let refused = end.refused();
            if refused.is_some_and(is_about_token) {
                self.token = None;
            }
            if refused == Some(RefusalCode::ShuttingDown) {
                self.restarting = Some(Instant::now() + RESTART_TIME);
            }
            let why = end.to_string();
            self.events.send(RelayEventKind::Disconnected { why, refused }).await;
            let wait = match refused {
                Some(RefusalCode::Replaced) => REPLACED_BACKOFF,
                _ if self.is_restarting() => RESTART_PAUSE,
                _ => backoff,
            };
            if self.pause(jittered(wait)).await {
                backoff = MIN_BACKOFF;
            } else {
                backoff = (2 * backoff).min(MAX_BACKOFF);
            }
        }
    }

    /// Waits, keeping tokens that come; true if the network changed.
    async fn pause(&mut self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        loop {
            tokio::select! {
                () = sleep_until(until) => return false,
                command = self.commands.recv() => match command {
                    Some(Command::Token(token)) => self.keep(token),
                    Some(Command::NetworkChanged) => return true,
                    None => std::future::pending().await, // the handle is gone: so is this task, in a moment
                },
            }
        }
    }

    fn is_restarting(&self) -> bool {
        self.restarting.is_some_and(|until| Instant::now() < until)
    }

    fn keep(&mut self, token: Signed) {
        self.asked = None;
        self.token = Some((token, Instant::now()));
    }

    async fn ask(&mut self) {
        if self.asked.is_none_or(|at| at.elapsed() >= ASK_INTERVAL) {
            self.asked = Some(Instant::now());
            self.events.send(RelayEventKind::NeedToken).await;
        }
    }

    fn fresh_token(&self) -> Option<&Signed> {
        self.token.as_ref().filter(|(_, since)| since.elapsed() < TOKEN_FRESH).map(|(token, _)| token)
    }

    /// Connects (unless there is a link already) and authenticates.
    async fn connect(&mut self, link: Option<Box<Link>>) -> Result<(Link, UdpKeys), End> {
        if self.fresh_token().is_none() {
            self.token = None;
            self.asked = None;
            self.ask().await; // it can come while we dial
        }
        let mut link = match link {
            Some(link) => *link,
            None => {
                let head_start = if self.quic_failed { SHORT_HEAD_START } else { QUIC_HEAD_START };
                let longest = if self.is_restarting() {
                    RESTART_DIAL_TIMEOUT.max(2 * self.shared.last_rtt())
                } else {
                    DIAL_TIMEOUT
                };
                let config = self.config.clone();
                tokio::select! {
                    dialled = timeout(longest, link::dial(&config, Some(head_start.min(longest / 2)))) => {
                        dialled.map_err(|_| End::Lost("it does not answer".to_owned()))??
                    }
                    // What was sent in the former network is lost, and QUIC repeats it only after a second.
                    true = self.pause(2 * DIAL_TIMEOUT) => return Err(End::Lost("the network changed".to_owned())),
                }
            }
        };
        self.quic_failed = link.transport == Transport::Tls;
        let keys = timeout(STEP_TIMEOUT, self.authenticate(&mut link.reader, &mut link.writer))
            .await
            .map_err(|_| End::Lost("it does not go on after connecting".to_owned()))??;
        // What waited for an earlier connection is of no use any more.
        *self.shared.queue() = FrameQueue::new(DATA_QUEUE_BYTES);
        self.shared.rtt.store(u64::MAX, Ordering::Relaxed);
        self.restarting = None;
        Ok((link, keys))
    }

    async fn authenticate(&mut self, reader: &mut Reader, writer: &mut Writer) -> Result<UdpKeys, End> {
        let challenge = reader.frame().await?;
        let Ok(Some(Frame::Challenge(challenge))) = Frame::decode(&challenge) else {
            return Err(End::Lost("it does not speak the relay protocol".to_owned()));
        };
        let token = loop {
            if let Some(token) = self.fresh_token() {
                break token;
            }
            self.ask().await;
            let wait = self.pause_for_token();
            if timeout(TOKEN_TIMEOUT, wait).await.is_err() {
                return Err(End::Lost("no token came from the coordinator".to_owned()));
            }
        };
        let token = TokenRef::new(token).ok_or_else(|| End::Lost("the token is malformed".to_owned()))?;
        let binding = Binding {
            network: self.config.network,
            relay: self.config.relay.id,
            cert_sha256: self.config.relay.cert_sha256,
        };
        let Proven { proof, udp } = challenge
            .prove(&self.config.probe, &binding, token)
            .ok_or_else(|| End::Lost("its challenge is invalid".to_owned()))?;
        writer.control(&Frame::Auth { proof, token }.to_vec()).await?;
        loop {
            let frame = reader.frame().await?;
            if matches!(Frame::decode(&frame), Ok(Some(Frame::Ready { .. }))) {
                return Ok(udp);
            }
        }
    }

    async fn pause_for_token(&mut self) {
        while let Some(command) = self.commands.recv().await {
            if let Command::Token(token) = command {
                return self.keep(token);
            }
        }
    }

    async fn session(&mut self, link: Link, keys: UdpKeys) -> Outcome {
        let Link { mut reader, mut writer, transport, addr } = link;
        let (shared, config, events) = (self.shared.clone(), self.config.clone(), self.events.clone());
        let signs = Signs::new();
        tokio::select! {
            end = read(&mut reader, &shared, &events, &signs) => Outcome::End(end),
            end = write(&mut writer, &shared, &signs) => Outcome::End(end),
            end = self.watch(&signs, transport, addr) => Outcome::End(end),
            link = upgrade(&config, &signs), if transport == Transport::Tls => Outcome::Upgrade(Box::new(link)),
            () = over_udp(addr, config.mark, keys, &shared, &events, &signs) => {
                Outcome::End(End::Lost("the host is shutting down".to_owned()))
            }
        }
    }

    /// Pings and passes tokens on, until the relay is silent.
    async fn watch(&mut self, signs: &Signs, transport: Transport, addr: SocketAddr) -> End {
        let mut keepalive = self.shared.keepalive.subscribe();
        loop {
            let now = clock::now().boot;
            // Routers remember TCP for long; and where packets take plain UDP it is that way which is kept open.
            let forgotten = transport == Transport::Quic && signs.udp().is_none();
            let pause = if forgotten { *keepalive.borrow_and_update() } else { KEEPALIVE };
            signs.liveness().set_keepalive(pause);
            if signs.stalled.load(Ordering::Relaxed) > 0 {
                signs.liveness().on_heard(); // it is us who don't listen
            }
            match signs.liveness().check(now) {
                Check::Fine => {}
                Check::Ping => {
                    self.shared.push(Class::Control, &Frame::Ping { nonce: micros() });
                }
                Check::Dead => return End::Lost("it stopped answering".to_owned()),
            }
            let due = signs.liveness().deadline();
            let ask_at = self.asked.map(|at| at + ASK_INTERVAL);
            tokio::select! {
                () = sleep(due.since(now)) => {}
                Ok(()) = keepalive.changed() => {}
                () = signs.sent.notified() => {}
                () = signs.suspect.notified() => signs.liveness().suspect(now),
                () = signs.token_wanted.notified() => self.ask().await,
                () = sleep_until(ask_at.unwrap_or_else(Instant::now)), if ask_at.is_some() => self.ask().await,
                command = self.commands.recv() => match command {
                    Some(Command::Token(token)) => {
                        if let Some(token) = TokenRef::new(&token) {
                            self.shared.push(Class::Control, &Frame::TokenRefresh { token });
                        }
                        self.keep(token);
                    }
                    Some(Command::NetworkChanged) => {
                        if let Err(error) = link::check_route(addr, self.config.mark) {
                            return error.into();
                        }
                        signs.liveness().suspect(clock::now().boot);
                        if let Some(udp) = signs.udp.get() {
                            udp.network_changed();
                        }
                        signs.try_quic.notify_one();
                    }
                    None => std::future::pending().await,
                },
            }
        }
    }
}

/// What the parts of a session tell each other.
struct Signs {
    liveness: Mutex<Liveness>,
    /// Something was sent after a silence.
    sent: Notify,
    /// The relay may be dead.
    suspect: Notify,
    token_wanted: Notify,
    try_quic: Notify,
    /// The number of our UDP session, once the relay has named it.
    offer: watch::Sender<Option<u64>>,
    udp: OnceLock<UdpLink>,
    /// Readers that wait until the daemon takes what they have.
    stalled: AtomicUsize,
}

impl Signs {
    fn new() -> Self {
        Self {
            liveness: Mutex::new(Liveness::new(MIN_PING_PAUSE)),
            sent: Notify::new(),
            suspect: Notify::new(),
            token_wanted: Notify::new(),
            try_quic: Notify::new(),
            offer: watch::Sender::new(None),
            udp: OnceLock::new(),
            stalled: AtomicUsize::new(0),
        }
    }

    fn liveness(&self) -> MutexGuard<'_, Liveness> {
        self.liveness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a packet to the daemon, however long it takes. Meanwhile nothing is read, which says nothing about the relay.
    async fn pass_on(&self, events: &Events, kind: RelayEventKind) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
        events.send(kind).await;
        self.stalled.fetch_sub(1, Ordering::Relaxed);
    }

    /// The UDP side, while packets go there.
    fn udp(&self) -> Option<&UdpLink> {
        self.udp.get().filter(|udp| udp.is_up())
    }
}

/// Carries packets over plain UDP once the relay offers it.
async fn over_udp(
    addr: SocketAddr,
    mark: u32,
    keys: UdpKeys,
    shared: &Shared,
    events: &Events,
    signs: &Signs,
) {
    let mut offer = signs.offer.subscribe();
    let Ok(session) = offer.wait_for(Option::is_some).await.map(|session| *session) else { return };
    match UdpLink::open(addr, mark, keys, session.unwrap_or_default()) {
        Ok(link) => signs.udp.get_or_init(|| link).run(shared, events, signs).await,
        Err(error) => {
            tracing::debug!("no socket for plain UDP to the relay: {error}");
            std::future::pending().await
        }
    }
}

/// True if another token may change the answer.
const fn is_about_token(code: RefusalCode) -> bool {
    matches!(
        code,
        RefusalCode::TokenInvalid
            | RefusalCode::TokenExpired
            | RefusalCode::TokenLife
            | RefusalCode::TokenStale
            | RefusalCode::OtherRelay
            | RefusalCode::Possession
            | RefusalCode::Revoked
    )
}

async fn read(reader: &mut Reader, shared: &Shared, events: &Events, signs: &Signs) -> End {
    loop {
        let frame = match reader.frame().await {
            Ok(frame) => frame,
            Err(end) => return end,
        };
        signs.liveness().on_heard();
        match Frame::decode(&frame) {
            Ok(Some(Frame::Recv { src, payload })) => {
                let payload = frame.slice_ref(payload);
                signs.pass_on(events, RelayEventKind::Received { src, payload }).await;
            }
            Ok(Some(Frame::Pong { nonce })) => {
                let rtt = micros().saturating_sub(nonce);
                shared.rtt.store(rtt, Ordering::Relaxed);
                signs.liveness().on_pong(Duration::from_micros(rtt));
            }
            Ok(Some(Frame::Ping { nonce })) => {
                shared.push(Class::Control, &Frame::Pong { nonce });
            }
            Ok(Some(Frame::PeerGone { device, why })) => {
                events.send(RelayEventKind::PeerGone { device, why }).await;
                if why == GoneReason::NotPermitted {
                    signs.token_wanted.notify_one();
                }
            }
            Ok(Some(Frame::TokenWanted { .. })) => signs.token_wanted.notify_one(),
            Ok(Some(Frame::UdpOffer { session })) => {
                signs.offer.send_replace(Some(session));
            }
            Ok(Some(Frame::Drain { after_ms })) => {
                let after = Duration::from_millis(u64::from(after_ms));
                events.send(RelayEventKind::Draining { after }).await;
            }
            Ok(_) => {}
            Err(error) => return End::Lost(error.to_string()),
        }
    }
}

async fn write(writer: &mut Writer, shared: &Shared, signs: &Signs) -> End {
    let (mut batch, mut buffer) = (Vec::new(), Vec::new());
    loop {
        shared.wake.notified().await;
        loop {
            shared.take(&mut batch);
            if batch.is_empty() {
                break;
            }
            if let Some(udp) = signs.udp() {
                udp.send(&mut batch, &mut buffer);
            }
            let data = batch.iter().any(|frame| frame.class != Class::Control);
            if data && signs.liveness().on_sent(clock::now().boot) {
                signs.sent.notify_one();
            }
            if let Err(end) = writer.batch(&mut batch).await {
                return end;
            }
        }
    }
}

/// Tries QUIC until it passes.
async fn upgrade(config: &RelayClientConfig, signs: &Signs) -> Link {
    loop {
        let _ = timeout(jittered(UPGRADE_INTERVAL), signs.try_quic.notified()).await; // whichever comes first
        if signs.udp().is_some() {
            continue; // better than QUIC already
        }
        if let Ok(Ok(link)) = timeout(DIAL_TIMEOUT, link::dial(config, None)).await {
            return link;
        }
    }
}

/// Between half and all of `wait`, so that many agents don't come back at once.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + f64::from(OsEntropy.next_u32()) / f64::from(u32::MAX) / 2.0)
}

/// A clock for round trips.
fn micros() -> u64 {
    clock::now().boot.as_nanos() / 1_000
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn what_waits_for_the_task_is_bounded() {
        let relay = Relay {
            id: RelayId::from_bytes([2; 16]),
            name: "r".into(),
            addrs: vec![(Ipv4Addr::LOCALHOST, 1).into()],
            stun: vec![],
            cert_sha256: [0; 32],
        };
        let config = RelayClientConfig {
            relay,
            network: NetworkId::from_bytes([1; 16]),
            probe: ProbeSecretKey::from_bytes([3; 32]),
            mark: 0,
        };
        let (sender, _events) = mpsc::channel(1);
        let client = RelayClient::spawn(config, sender);
        // The task does not run meanwhile: this thread is the only one.
        for _ in 0..10 * MAX_COMMANDS {
            client.provide_token(Signed { payload: vec![1], signature: vec![2] });
            client.network_changed();
        }
        assert_eq!((client.commands.max_capacity(), client.commands.capacity()), (MAX_COMMANDS, 0));
        assert_eq!(client.send(DeviceId::from_bytes([4; 16]), &[0; 10]), Sent::NotConnected);
    }
}
