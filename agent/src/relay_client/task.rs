//! The task behind a client: connects, authenticates, keeps the session, comes back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rand_core::RngCore as _;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use warren_common::wire::control::Signed;
use warren_common::wire::relay::udp::UdpKeys;
use warren_common::wire::relay::{
    Binding, Class, DATA_QUEUE_BYTES, Frame, FrameQueue, GoneReason, Proven, RefusalCode, TokenRef,
};
use warren_engine::redial::{DIAL_TIMEOUT, Ended, HOLD_TIME, Redial};
use warren_engine::relay_link::{CONNECTION_MIN_PAUSE, Check, KEEPALIVE, Liveness};

use super::link::{self, End, Footing, Link, Reader, Transport, Writer};
use super::rest::RestSigns;
use super::udp::{self, UdpLink};
use super::{
    Command, Events, RelayClientConfig, RelayEvent, RelayEventKind, Shared, has_packets, micros, rest,
};
use crate::clock;
use crate::entropy::OsEntropy;
use crate::problem::io_text;

/// How long a WebSocket waits for QUIC to come first.
pub const QUIC_HEAD_START: Duration = Duration::from_secs(2);
/// The same where QUIC did not pass last time.
const SHORT_HEAD_START: Duration = Duration::from_millis(300);
/// How long the relay may take to authenticate us; it waits for 10 s itself.
const STEP_TIMEOUT: Duration = Duration::from_secs(9);
/// How long the daemon may take to get a token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(7);
/// How long what a session rested on carries packets for its next connection: more than it takes to prove UDP anew.
const LEND_TIME: Duration = Duration::from_secs(3);
/// How often a WebSocket tries QUIC.
pub const UPGRADE_INTERVAL: Duration = Duration::from_secs(300);
/// A token is asked for again after so long without one.
const ASK_INTERVAL: Duration = Duration::from_secs(5);
/// A token older than this (of at most 10 min of life) is not used for a new connection.
const TOKEN_FRESH: Duration = Duration::from_secs(420);

pub(super) struct Task {
    pub(super) config: Arc<RelayClientConfig>,
    pub(super) shared: Arc<Shared>,
    pub(super) events: Events,
    pub(super) commands: mpsc::Receiver<Command>,
    token: Option<(Signed, Instant)>,
    /// When the daemon was last asked for a token that has not come.
    asked: Option<Instant>,
    quic_failed: bool,
    redial: Redial,
}

/// How a session ends.
pub(super) enum Outcome {
    End(End),
    /// QUIC passes now.
    Upgrade(Box<Link>),
    /// The session goes on without its connection.
    Rest(Box<UdpLink>),
    /// Another connection to the same relay takes its place: this host has moved, or the relay is restarted.
    Replaced(End),
}

/// How a connection is come by.
enum Next {
    /// It is made, or used if it is there already.
    Connect(Option<Box<Link>>),
    /// The session rests until there is a reason to have one.
    Rest(Box<UdpLink>),
    /// It replaces one that stood for so long.
    Replace(End, Duration),
    /// The last one stood for so long, or never came to be.
    Again(End, Duration),
}

impl Task {
    pub(super) fn new(
        config: RelayClientConfig,
        events: mpsc::Sender<RelayEvent>,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        Self {
            events: Events { relay: config.relay.id, sender: events },
            config: Arc::new(config),
            shared,
            commands,
            token: None,
            asked: None,
            quic_failed: false,
            redial: Redial::default(),
        }
    }

    pub(super) async fn run(mut self) {
        let mut next = Next::Connect(None);
        loop {
            let (connected, former) = match next {
                Next::Connect(link) => (self.connect(link).await, None),
                Next::Rest(udp) => self.rest(udp).await,
                Next::Replace(end, stood) => (self.replace(end, stood).await, None),
                Next::Again(end, stood) => (self.again(&end, stood).await, None),
            };
            let (end, stood) = match connected {
                Ok((link, keys)) => {
                    let since = Instant::now();
                    let (transport, addr) = (link.transport, link.addr);
                    self.shared.quic.store(transport == Transport::Quic, Ordering::Release);
                    self.shared.proxied.store(link.proxied, Ordering::Relaxed);
                    self.shared.held.store(false, Ordering::Release);
                    self.shared.connected.store(true, Ordering::Release);
                    self.events.send(RelayEventKind::Connected { transport, addr }).await;
                    let outcome = self.session(link, keys, former).await;
                    let (rests, held) =
                        (matches!(outcome, Outcome::Rest(_)), matches!(outcome, Outcome::Replaced(_)));
                    self.shared.held.store(held, Ordering::Release);
                    self.shared.connected.store(rests || held, Ordering::Release);
                    self.shared.set_udp(rests);
                    match outcome {
                        Outcome::Upgrade(link) => {
                            self.shared.forget_queue();
                            next = Next::Connect(Some(link));
                            continue;
                        }
                        Outcome::Rest(udp) => {
                            next = Next::Rest(udp);
                            continue;
                        }
                        Outcome::Replaced(end) => {
                            tracing::debug!("the connection is replaced: {end}");
                            self.keep_packets();
                            next = Next::Replace(end, since.elapsed());
                            continue;
                        }
                        Outcome::End(end) => (end, since.elapsed()),
                    }
                }
                Err(end) => (end, Duration::ZERO),
            };
            lose(&self.shared, &self.events, &end).await;
            next = Next::Again(end, stood);
        }
    }

    /// What waited is only packets from now on: the rest was about the former connection.
    fn keep_packets(&self) {
        let mut queue = self.shared.queue();
        let mut former = std::mem::replace(&mut *queue, FrameQueue::new(DATA_QUEUE_BYTES));
        while let Some(frame) = former.pop() {
            if frame.class != Class::Control {
                queue.push(frame.class, frame.bytes);
            }
        }
    }

    /// Connects to the same relay in place of a connection that stood for so long. Packets wait, or take another relay: the daemon
    /// hears of doubt, and of a loss only if it takes long.
    async fn replace(&mut self, mut end: End, mut stood: Duration) -> Result<(Link, UdpKeys), End> {
        let (shared, events) = (self.shared.clone(), self.events.clone());
        events.send(RelayEventKind::Doubt { doubt: true }).await;
        let (until, mut failed) = (Instant::now() + HOLD_TIME, None);
        loop {
            let connected = {
                let last = failed.as_ref().unwrap_or(&end);
                let mut attempt = std::pin::pin!(self.again(last, std::mem::take(&mut stood)));
                let Ok(connected) = timeout_at(until, &mut attempt).await else {
                    // Packets wait no longer, but what is under way may still become the connection.
                    lose(&shared, &events, &end).await;
                    return attempt.await;
                };
                connected
            };
            match connected {
                Ok(connected) => {
                    events.send(RelayEventKind::Doubt { doubt: false }).await;
                    return Ok(connected);
                }
                // It is not there yet, which says less than how the connection ended.
                Err(new @ End::Lost(_)) if self.redial.is_restarting(clock::now().boot) => failed = Some(new),
                Err(new) if matches!(new, End::Moved(_)) || self.redial.is_restarting(clock::now().boot) => {
                    (end, failed) = (new, None);
                }
                Err(new) => return Err(new),
            }
        }
    }

    /// Connects after a pause: `end` is how the last connection, which stood for so long, or attempt ended.
    async fn again(&mut self, end: &End, stood: Duration) -> Result<(Link, UdpKeys), End> {
        if end.refused().is_some_and(is_about_token) {
            self.token = None;
        }
        let wait = self.redial.on_ended(clock::now().boot, stood, how(end), OsEntropy.next_u32());
        if self.pause(wait).await {
            self.redial.on_network_change();
        }
        self.connect(None).await
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

    /// The next connection needs another token.
    pub(super) fn forget_token(&mut self) {
        self.token = None;
    }

    pub(super) fn keep(&mut self, token: Signed) {
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
    pub(super) async fn connect(&mut self, link: Option<Box<Link>>) -> Result<(Link, UdpKeys), End> {
        if self.fresh_token().is_none() {
            self.token = None;
            self.asked = None;
            self.ask().await; // it can come while we dial
        }
        let mut link = match link {
            Some(link) => *link,
            None => {
                let head_start = if self.quic_failed { SHORT_HEAD_START } else { QUIC_HEAD_START };
                let longest = self.redial.dial_timeout(clock::now().boot, self.shared.last_rtt());
                let config = self.config.clone();
                tokio::select! {
                    dialled = link::dial(&config, Some(head_start.min(longest / 2)), longest) => dialled?,
                    // What was sent in the former network is lost, and QUIC repeats it only after a second.
                    true = self.pause(2 * DIAL_TIMEOUT) => return Err(End::Moved("the network changed".to_owned())),
                }
            }
        };
        self.quic_failed = link.transport == Transport::WebSocket;
        let keys = timeout(STEP_TIMEOUT, self.authenticate(&mut link.reader, &mut link.writer))
            .await
            .map_err(|_| End::Lost("it does not go on after connecting".to_owned()))??;
        self.shared.rtt.store(u64::MAX, Ordering::Relaxed);
        self.redial.on_connected();
        Ok((link, keys))
    }

    async fn authenticate(&mut self, reader: &mut Reader, writer: &mut Writer) -> Result<UdpKeys, End> {
        let challenge = reader.control().await?;
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
        writer.control(Frame::Auth { proof, token }.to_vec()).await?;
        loop {
            let frame = reader.control().await?;
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

    /// `former`: what carries packets until the session's own UDP does.
    async fn session(&mut self, link: Link, keys: UdpKeys, former: Option<Box<UdpLink>>) -> Outcome {
        let footing = link.footing();
        let Link { mut reader, mut writer, transport, addr, .. } = link;
        let (shared, config, events) = (self.shared.clone(), self.config.clone(), self.events.clone());
        let signs = Signs::new(former);
        let end = tokio::select! {
            end = read(&mut reader, &shared, &events, &signs) => Outcome::End(end),
            end = write(&mut writer, &shared, &signs) => Outcome::End(end),
            end = self.watch(&signs, transport, footing) => match end {
                End::Moved(_) => Outcome::Replaced(end),
                end => Outcome::End(end),
            },
            link = upgrade(&config, &signs), if transport == Transport::WebSocket => Outcome::Upgrade(Box::new(link)),
            () = over_udp(addr, config.egress.mark(), keys, &shared, &events, &signs) => {
                Outcome::End(End::Lost("the host is shutting down".to_owned()))
            }
            () = signs.lend_former(&shared, &events) => Outcome::End(End::Lost("the session ends".to_owned())),
            () = rest::ask_when_idle(config.rest_after, &shared, &signs) => {
                Outcome::End(End::Lost("the session ends".to_owned()))
            }
        };
        rest::outcome(end, signs.udp.into_inner())
    }

    /// Pings and passes tokens on, until the relay is silent, or the connection has lost its `footing`.
    async fn watch(&mut self, signs: &Signs, transport: Transport, footing: Footing) -> End {
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
            let check = signs.liveness().check(now);
            signs.tell_doubt(&self.events).await;
            match check {
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
                        if let Err(error) = footing.check(&self.config) {
                            return End::Moved(io_text(&error));
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

/// There is no connection, and none that packets could wait for.
async fn lose(shared: &Shared, events: &Events, end: &End) {
    shared.connected.store(false, Ordering::Release);
    shared.held.store(false, Ordering::Release);
    shared.set_udp(false);
    let dropped = shared.forget_queue();
    let why = match end {
        End::Moved(_) => "it is not reached from another network yet".to_owned(),
        End::Refused(_) | End::Barred(_) | End::Lost(_) => end.to_string(),
    };
    let problem = match end {
        End::Barred(problem) => Some(problem.clone()),
        End::Refused(_) | End::Moved(_) | End::Lost(_) => None,
    };
    events.send(RelayEventKind::Disconnected { why, refused: end.refused(), problem, dropped }).await;
}

/// What an end means for the next attempt.
const fn how(end: &End) -> Ended {
    match end {
        End::Refused(RefusalCode::Replaced) => Ended::Replaced,
        End::Refused(RefusalCode::ShuttingDown) => Ended::ShuttingDown,
        End::Moved(_) => Ended::Moved,
        End::Refused(_) | End::Barred(_) | End::Lost(_) => Ended::Lost,
    }
}

/// What the parts of a session tell each other.
pub(super) struct Signs {
    liveness: Mutex<Liveness>,
    /// Something was sent after a silence.
    sent: Notify,
    /// When a packet last went either way, on [`micros`]'s clock.
    pub(super) active: AtomicU64,
    /// Those of a rest, if it is one.
    pub(super) rest: Option<Arc<RestSigns>>,
    /// Of the session that rested, for packets until then.
    former: Option<Box<UdpLink>>,
    former_over: AtomicBool,
    /// The relay may be dead.
    pub(super) suspect: Notify,
    token_wanted: Notify,
    try_quic: Notify,
    /// The number of our UDP session, once the relay has named it.
    offer: watch::Sender<Option<u64>>,
    udp: OnceLock<UdpLink>,
    /// Readers that wait until the daemon takes what they have.
    stalled: AtomicUsize,
}

impl Signs {
    fn new(former: Option<Box<UdpLink>>) -> Self {
        Self {
            former_over: AtomicBool::new(former.is_none()),
            former,
            active: AtomicU64::new(micros()),
            rest: None,
            liveness: Mutex::new(Liveness::new(CONNECTION_MIN_PAUSE)),
            sent: Notify::new(),
            suspect: Notify::new(),
            token_wanted: Notify::new(),
            try_quic: Notify::new(),
            offer: watch::Sender::new(None),
            udp: OnceLock::new(),
            stalled: AtomicUsize::new(0),
        }
    }

    /// Those of a rest.
    pub(super) fn of_rest(rest: Arc<RestSigns>) -> Self {
        Self { rest: Some(rest), ..Self::new(None) }
    }

    /// A packet went out or came in.
    pub(super) fn mark_active(&self) {
        self.active.store(micros(), Ordering::Relaxed);
        if let Some(rest) = &self.rest {
            rest.wanted.notify_one();
        }
    }

    /// Lets what the session rested on carry packets out until its own UDP does, and in for [`LEND_TIME`]: the relay changes over
    /// later than we do. Never returns.
    async fn lend_former(&self, shared: &Shared, events: &Events) {
        if let Some(former) = &self.former {
            tokio::select! {
                () = udp::lend(former, shared, events, self) => {}
                () = sleep(LEND_TIME) => {}
            }
            self.former_over.store(true, Ordering::Relaxed);
            if self.udp().is_none() {
                shared.set_udp(false);
                shared.push(Class::Control, &rest::NOT_OVER_UDP);
            }
        }
        std::future::pending().await
    }

    fn liveness(&self) -> MutexGuard<'_, Liveness> {
        self.liveness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a packet to the daemon, however long it takes. Meanwhile nothing is read, which says nothing about the relay.
    pub(super) async fn pass_on(&self, events: &Events, kind: RelayEventKind) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
        events.send(kind).await;
        self.stalled.fetch_sub(1, Ordering::Relaxed);
    }

    /// Something came from the relay.
    async fn heard(&self, events: &Events) {
        let news = {
            let mut liveness = self.liveness();
            liveness.on_heard();
            liveness.doubt_news()
        };
        self.tell(news, events).await;
    }

    /// Tells the daemon whether the relay is in doubt, if that has changed.
    async fn tell_doubt(&self, events: &Events) {
        let news = self.liveness().doubt_news();
        self.tell(news, events).await;
    }

    async fn tell(&self, doubt: Option<bool>, events: &Events) {
        if let Some(doubt) = doubt {
            events.send(RelayEventKind::Doubt { doubt }).await;
        }
    }

    /// The UDP side, while packets go there.
    pub(super) fn udp(&self) -> Option<&UdpLink> {
        self.udp.get().filter(|udp| udp.is_up())
    }

    /// What packets take now, if not the connection.
    fn way(&self) -> Option<&UdpLink> {
        let former = || self.former.as_deref().filter(|_| !self.former_over.load(Ordering::Relaxed));
        self.udp().or_else(former)
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
        signs.heard(events).await;
        match Frame::decode(&frame) {
            Ok(Some(Frame::Recv { src, payload })) => {
                let payload = frame.slice_ref(payload);
                signs.mark_active();
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
        shared.next_batch(&mut batch).await;
        if has_packets(&batch) {
            signs.mark_active();
        }
        if let Some(udp) = signs.way() {
            udp.send(&mut batch, &mut buffer);
        }
        if has_packets(&batch) && signs.liveness().on_sent(clock::now().boot) {
            signs.sent.notify_one();
        }
        if let Err(end) = writer.batch(&mut batch).await {
            return end;
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
        if let Ok(link) = link::dial(config, None, DIAL_TIMEOUT).await {
            return link;
        }
    }
}

/// Between half and all of `wait`, so that many agents don't come back at once.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + f64::from(OsEntropy.next_u32()) / f64::from(u32::MAX) / 2.0)
}
