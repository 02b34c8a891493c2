//! The relay itself, sans-I/O: who is connected, who may send to whom, and what waits for whom.
//!
//! Inputs are `handle_*`, [`Relay::set_minimum_revision`], [`Relay::set_floor`], [`Relay::revoke`] and
//! [`Relay::drain`]; after each, drain [`Relay::poll_output`]. Frames are pulled: [`Output::Wake`] says that a
//! connection has some, [`Relay::next_frame`] hands them out until it returns `None`. So a connection that is written to
//! slowly fills only its own bounded queue.
//!
//! A connection is *half-open* until it has presented a token and the proof that goes with it, and a *session* after that.
//! A session is *suspended* when the relay hears that its device needs a newer token: nothing is forwarded from or to it
//! until that token comes. It ends with its token, unless it is given another in time. It *rests* when its device has
//! given up the connection and is reached over plain UDP alone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand_core::{CryptoRng, RngCore};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapPublicKey, ProbePublicKey, ProbeSecretKey};
use warren_common::time::{Instant, Now};
use warren_common::wire::relay::udp::FULL_UDP_DATAGRAM;
use warren_common::wire::relay::{
    Binding, Challenge, Class, DATA_QUEUE_BYTES, Frame, FrameQueue, GoneReason, Pushed, QueuedFrame,
    RefusalCode, TokenRef, WantedReason, is_handshake,
};
use warren_common::wire::token::{MAX_TOKEN_LIFE_S, RelayToken};

mod absent;
mod counters;
mod gcra;
mod rest;
mod udp;
mod window;

use absent::Absent;
use rest::Rest;
use udp::UdpSession;

pub use absent::RETURN_TIME;
pub use counters::{Counters, DropReason, Stats};
pub(crate) use gcra::Gcra;
pub use udp::{UdpPath, UdpSend};
pub use window::MAX_UDP_REORDER;

/// Default for [`Limits::max_clients`]: 20 000 × 64 KiB is 1.2 GiB, what a small relay has.
pub const MAX_CLIENTS: usize = 20_000;
/// Default for [`Limits::max_half_open`]: each can make the relay buffer 65 KiB, so 16 MiB in all.
pub const MAX_HALF_OPEN: usize = 256;
/// Most devices whose minimum revision is remembered one by one; one more, and the floor rises for all instead. Bounds
/// memory, at about 100 bytes each, against a coordinator that revokes everybody.
pub const MAX_MINIMUMS: usize = 65_536;
/// How far a relay's clock and a coordinator's may differ before a fresh token looks too long-lived.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60);
/// How long a suspended session may take to present a newer token: a few tries to reach the coordinator.
pub const STALE_GRACE: Duration = Duration::from_secs(10);
/// A token's last part, in which the relay asks for another: time for the device to reach its coordinator again.
pub const REFRESH_BEFORE_END: Duration = Duration::from_secs(120);
/// Longest life of a token once it is accepted, and longest memory of a minimum revision.
const TOKEN_MEMORY: Duration = Duration::from_secs(MAX_TOKEN_LIFE_S as u64 + MAX_CLOCK_SKEW.as_secs());
/// One `PeerGone` costs this much of a second's budget: at most 32 per second and device, so that they can't be a flood.
const NOTICE_COST: Duration = Duration::from_nanos(1_000_000_000 / 32);
const NOTICE_BURST: Duration = Duration::from_secs(1);
/// One `TokenRefresh` (a signature check, 50 µs) per second and device in the long run, ten at once.
const REFRESH_COST: Duration = Duration::from_secs(1);
const REFRESH_BURST: Duration = Duration::from_secs(10);
/// A queue may hold this part of what is still free for all of them together: whoever does not read leaves room for the
/// others, however many they are.
const SHARE_OF_FREE: usize = 16;
/// What a packet costs of the rate limit beside its payload: the headers around it.
const PACKET_OVERHEAD: usize = 64;
/// What it costs at least, in bytes: tiny packets take as much of a processor as others, and a device that sends nothing else
/// could take a whole one. At the default rate they are 250 000 a second.
const MIN_PACKET_COST: usize = 500;

/// A connection, as the relay names it; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(u64);

/// What a relay is.
#[derive(Clone, Debug)]
pub struct Config {
    /// The network it serves.
    pub network: NetworkId,
    /// Its id.
    pub relay: RelayId,
    /// SHA-256 of its certificate (DER), which proofs are bound to.
    pub cert_sha256: [u8; 32],
    /// What verifies tokens.
    pub netmap_key: NetmapPublicKey,
    /// The revision that every token must have: what happened before this process started.
    pub floor: u64,
    /// Whether the shell carries plain UDP.
    pub plain_udp: bool,
    /// Bounds.
    pub limits: Limits,
}

/// What a relay lets others make of it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most sessions.
    pub max_clients: usize,
    /// Most half-open connections; one more closes the oldest, so that strangers can't keep devices out.
    pub max_half_open: usize,
    /// How long a connection may stay half-open.
    pub auth_timeout: Duration,
    /// How long a session may be silent.
    pub idle_timeout: Duration,
    /// What one device may send in the long run, in bytes per second.
    pub rate: u64,
    /// What one device may send at once, in bytes.
    pub burst: u64,
    /// What may wait for one device, in bytes of data.
    pub queue_bytes: usize,
    /// What may wait for all devices together, in bytes of data.
    pub total_queue_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_clients: MAX_CLIENTS,
            max_half_open: MAX_HALF_OPEN,
            auth_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            rate: 125_000_000, // 1 Gbit/s: more than a relay path should carry, less than a relay's own link
            burst: 1 << 20,    // 8 ms of it: sixteen full GSO batches
            queue_bytes: DATA_QUEUE_BYTES,
            total_queue_bytes: 256 << 20,
        }
    }
}

/// What the shell must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Take frames with [`Relay::next_frame`] until there are none, and write them.
    Wake(ConnId),
    /// Write [`RefusalCode::frame`] of the reason if that is possible without waiting long, then close. The relay has
    /// forgotten the connection; its session goes on if the reason is [`RefusalCode::Resting`].
    Close(ConnId, RefusalCode),
}

/// A relay.
#[derive(Debug)]
pub struct Relay {
    config: Config,
    next_conn: u64,
    conns: BTreeMap<ConnId, Conn>,
    half_open: BTreeSet<ConnId>,
    sessions: BTreeMap<DeviceId, ConnId>,
    /// By the number that their datagrams carry.
    udp_ids: BTreeMap<u64, ConnId>,
    timers: BTreeSet<(Instant, ConnId)>,
    /// Connections with a `Wake` out for which `next_frame` has not returned `None` since: all that have frames waiting.
    woken: BTreeSet<ConnId>,
    minimums: BTreeMap<DeviceId, Minimum>,
    floor: u64,
    absent: Absent,
    queued_bytes: usize,
    outputs: VecDeque<Output>,
    datagrams: VecDeque<(UdpPath, Vec<u8>)>,
    counters: Counters,
}

#[derive(Debug)]
struct Conn {
    queue: FrameQueue,
    heard: Instant,
    timer: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    HalfOpen { challenge: Challenge, ephemeral: ProbeSecretKey, udp_id: u64, until: Instant },
    Session(Box<Session>),
}

#[derive(Debug)]
struct Session {
    device: DeviceId,
    probe: ProbePublicKey,
    revision: u64,
    peers: Box<[DeviceId]>,
    ends: Instant,
    ask_at: Option<Instant>,
    /// Set while suspended: when it ends for want of a newer token.
    suspended: Option<Instant>,
    rate: Gcra,
    notices: Gcra,
    refreshes: Gcra,
    /// `None` if the shell carries no plain UDP.
    udp: Option<Box<UdpSession>>,
    /// Of the session that this one took over while it rested: carries packets until `udp` does.
    former_udp: Option<Box<UdpSession>>,
    /// Set while it rests.
    rest: Option<Rest>,
}

impl Session {
    fn carries(&self, now: Instant) -> bool {
        self.suspended.is_none() && now < self.ends
    }
}

#[derive(Clone, Copy, Debug)]
struct Minimum {
    revision: u64,
    /// No token from before the minimum can be alive by then.
    forget_at: Instant,
}

impl Relay {
    /// A relay that starts now, and that nobody is connected to.
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            floor: config.floor,
            config,
            next_conn: 0,
            conns: BTreeMap::new(),
            half_open: BTreeSet::new(),
            sessions: BTreeMap::new(),
            udp_ids: BTreeMap::new(),
            timers: BTreeSet::new(),
            woken: BTreeSet::new(),
            minimums: BTreeMap::new(),
            absent: Absent::new(now),
            queued_bytes: 0,
            outputs: VecDeque::new(),
            datagrams: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// A transport is connected. Its first frame, the challenge, is queued.
    pub fn handle_connected(&mut self, now: Now, rng: &mut (impl RngCore + CryptoRng)) -> ConnId {
        if self.half_open.len() >= self.config.limits.max_half_open
            && let Some(oldest) = self.half_open.first().copied()
        {
            self.close(oldest, RefusalCode::Busy);
        }
        let id = ConnId(self.next_conn);
        self.next_conn += 1;
        let ephemeral = ProbeSecretKey::generate(rng);
        let mut nonce = [0; 32];
        rng.fill_bytes(&mut nonce);
        let udp_id = rng.next_u64();
        let challenge = Challenge { ephemeral: ephemeral.public(), nonce };
        let until = now.boot + self.config.limits.auth_timeout;
        self.conns.insert(
            id,
            Conn {
                queue: FrameQueue::new(self.config.limits.queue_bytes),
                heard: now.boot,
                timer: until,
                state: State::HalfOpen { challenge, ephemeral, udp_id, until },
            },
        );
        self.half_open.insert(id);
        self.timers.insert((until, id));
        self.control(id, &Frame::Challenge(challenge));
        id
    }

    /// A transport is gone. Harmless for one that the relay has closed itself.
    pub fn handle_disconnected(&mut self, conn: ConnId) {
        if !self.conns.get(&conn).is_some_and(Conn::rests) {
            self.forget(conn);
        }
    }

    /// A frame came in. Whatever it is, it can't panic; one that makes no sense closes the connection.
    pub fn handle_frame(&mut self, conn: ConnId, now: Now, frame: &[u8]) {
        let (cost, burst) = self.cost(frame.len());
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        entry.heard = now.boot;
        let half_open = matches!(entry.state, State::HalfOpen { .. });
        let frame = Frame::decode(frame);
        if let (State::Session(session), Ok(None | Some(Frame::Send { .. } | Frame::Ping { .. }))) =
            (&mut entry.state, &frame)
            && !session.rate.allow(now.boot, cost, burst)
        {
            return self.counters.drop(DropReason::RateLimited, 1);
        }
        match frame {
            Err(_) => self.close(conn, RefusalCode::Protocol),
            Ok(None) => self.counters.drop(DropReason::UnknownFrame, 1),
            Ok(Some(Frame::Auth { proof, token })) if half_open => {
                self.authenticate(conn, now, &proof, token)
            }
            // A datagram may overtake the stream: not worth a connection.
            Ok(Some(Frame::Send { .. })) if half_open => self.counters.drop(DropReason::NotAuthenticated, 1),
            Ok(Some(Frame::Send { dst, payload })) => self.forward(conn, now.boot, dst, payload),
            Ok(Some(Frame::Ping { nonce })) if !half_open => self.control(conn, &Frame::Pong { nonce }),
            Ok(Some(Frame::Pong { .. })) if !half_open => {}
            Ok(Some(Frame::TokenRefresh { token })) if !half_open => self.refresh(conn, now, token),
            Ok(Some(Frame::Rest)) if !half_open => self.rest(conn, now.boot),
            Ok(Some(Frame::UdpLost { counter })) if !half_open => self.lose_udp(conn, counter),
            Ok(Some(_)) => self.close(conn, RefusalCode::Protocol),
        }
    }

    /// Time has passed: due by [`Relay::poll_timeout`], harmless at any time.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some((at, conn)) = self.timers.first().copied()
            && at <= now.boot
        {
            self.timers.remove(&(at, conn));
            self.check_deadlines(conn, now.boot);
        }
        self.minimums.retain(|_, minimum| minimum.forget_at > now.boot);
        self.give_up_absent(now.boot);
    }

    /// When [`Relay::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at).into_iter().chain(self.absent.poll_timeout()).min()
    }

    /// What the shell must do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The next frame to write to `conn`.
    pub fn next_frame(&mut self, conn: ConnId) -> Option<QueuedFrame> {
        let entry = self.conns.get_mut(&conn)?;
        let before = entry.queue.data_bytes();
        let frame = entry.queue.pop();
        self.queued_bytes -= before - entry.queue.data_bytes();
        if frame.is_none() {
            self.woken.remove(&conn);
        }
        frame
    }

    /// `device` needs a token of at least `revision`. Until its session presents one, nothing is forwarded from or to it,
    /// and what it sent but nobody was given yet is dropped. Never lowers an earlier minimum.
    pub fn set_minimum_revision(&mut self, device: DeviceId, revision: u64, now: Now) {
        if !self.minimums.contains_key(&device) && self.minimums.len() >= MAX_MINIMUMS {
            let highest = self.minimums.values().map(|m| m.revision).max().unwrap_or(0);
            self.minimums.clear();
            self.set_floor(highest, now);
        }
        let forget_at = now.boot + TOKEN_MEMORY;
        let minimum = self.minimums.entry(device).or_insert(Minimum { revision, forget_at });
        *minimum = Minimum { revision: revision.max(minimum.revision), forget_at };
        self.drop_waiting(Some(device));
        self.suspend_if_older(device, revision, now.boot);
    }

    /// Every device needs a token of at least `revision`; what waits is dropped. Never lowers an earlier floor.
    pub fn set_floor(&mut self, revision: u64, now: Now) {
        if revision <= self.floor {
            return;
        }
        self.floor = revision;
        self.drop_waiting(None);
        let devices: Vec<DeviceId> = self.sessions.keys().copied().collect();
        devices.into_iter().for_each(|device| self.suspend_if_older(device, revision, now.boot));
    }

    /// `device` is out as of the coordinator's `revision`: its session ends, what it sent but nobody was given yet is
    /// dropped, and only a token of that revision or later, which it won't get unless it is let in again, counts.
    pub fn revoke(&mut self, device: DeviceId, revision: u64, now: Now) {
        if let Some(conn) = self.sessions.get(&device).copied() {
            self.close(conn, RefusalCode::Revoked);
        }
        self.set_minimum_revision(device, revision, now);
    }

    /// Tells every device to go elsewhere within `after`. The shell closes them later, with [`Relay::close_all`].
    pub fn drain(&mut self, after: Duration) {
        let after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        let conns: Vec<ConnId> = self.sessions.values().copied().collect();
        conns.into_iter().for_each(|conn| self.control(conn, &Frame::Drain { after_ms }));
    }

    /// Ends every connection, and waits for nobody.
    pub fn close_all(&mut self, reason: RefusalCode) {
        while let Some(conn) = self.conns.keys().next().copied() {
            self.close(conn, reason);
        }
        let (_, bytes) = self.absent.drop_payloads(|_| true);
        self.queued_bytes -= bytes;
    }

    /// What the relay holds and has done.
    pub fn stats(&self) -> Stats {
        Stats {
            clients: self.sessions.len(),
            half_open: self.half_open.len(),
            queued_bytes: self.queued_bytes,
            minimums: self.minimums.len(),
            floor: self.floor,
            counters: self.counters.clone(),
        }
    }

    fn authenticate(&mut self, conn: ConnId, now: Now, proof: &[u8; 32], token_ref: TokenRef<'_>) {
        let token = match self.judge(token_ref, now) {
            Ok(token) => token,
            Err(reason) => return self.close(conn, reason),
        };
        let binding = Binding {
            network: self.config.network,
            relay: self.config.relay,
            cert_sha256: self.config.cert_sha256,
        };
        let Some(Conn { state: State::HalfOpen { challenge, ephemeral, udp_id, .. }, .. }) =
            self.conns.get(&conn)
        else {
            return;
        };
        let udp_id = *udp_id;
        let Some(keys) = challenge.check(ephemeral, &token.probe, &binding, token_ref, proof) else {
            return self.close(conn, RefusalCode::Possession);
        };
        let older = self.sessions.get(&token.device).copied();
        if older.is_none() && self.sessions.len() >= self.config.limits.max_clients {
            return self.close(conn, RefusalCode::Busy);
        }
        // The device keeps its rate limit, or reconnecting would be a way around it.
        let rate = older.and_then(|c| self.session(c)).map_or_else(Gcra::default, |s| s.rate.clone());
        let former_udp = older.and_then(|older| self.take_over(older));
        if let Some(former) = &former_udp {
            self.udp_ids.insert(former.id, conn);
        }
        let (device, revision) = (token.device, token.revision);
        let (ends, ask_at) = token_ends(&token, now);
        let session = Session {
            device,
            probe: token.probe,
            revision,
            peers: sorted(token.peers),
            ends,
            ask_at: Some(ask_at),
            suspended: None,
            rate,
            notices: Gcra::default(),
            refreshes: Gcra::default(),
            udp: self.config.plain_udp.then(|| Box::new(UdpSession::new(udp_id, keys))),
            former_udp,
            rest: None,
        };
        if let Some(entry) = self.conns.get_mut(&conn) {
            entry.state = State::Session(Box::new(session));
        }
        self.half_open.remove(&conn);
        self.sessions.insert(device, conn);
        self.check_deadlines(conn, now.boot);
        self.control(conn, &Frame::Ready { revision });
        if self.config.plain_udp {
            self.udp_ids.insert(udp_id, conn);
            self.control(conn, &Frame::UdpOffer { session: udp_id });
        }
        self.hand_over(conn, device);
    }

    fn refresh(&mut self, conn: ConnId, now: Now, token: TokenRef<'_>) {
        let Some(session) = self.session_mut(conn) else { return };
        if !session.refreshes.allow(now.boot, REFRESH_COST, REFRESH_BURST) {
            return self.counters.drop(DropReason::RefreshLimited, 1);
        }
        let token = match self.judge(token, now) {
            Ok(token) => token,
            Err(reason) => return self.close(conn, reason),
        };
        let Some(session) = self.session_mut(conn) else { return };
        if (token.device, token.probe) != (session.device, session.probe) {
            return self.close(conn, RefusalCode::Possession);
        }
        if token.revision < session.revision {
            return self.counters.drop(DropReason::OldToken, 1); // overtaken by a newer one
        }
        let revision = token.revision;
        let (ends, ask_at) = token_ends(&token, now);
        session.revision = revision;
        session.peers = sorted(token.peers);
        session.ends = ends;
        session.ask_at = Some(ask_at);
        session.suspended = None; // `judge` held the token against the minimum
        self.check_deadlines(conn, now.boot);
        self.control(conn, &Frame::Ready { revision });
    }

    /// Everything about a token but the possession of its key.
    fn judge(&self, token: TokenRef<'_>, now: Now) -> Result<RelayToken, RefusalCode> {
        let token = RelayToken::verify(&token.to_signed(), &self.config.netmap_key)
            .map_err(|_| RefusalCode::TokenInvalid)?;
        if (token.network, token.relay) != (self.config.network, self.config.relay) {
            return Err(RefusalCode::OtherRelay);
        }
        if token.expires <= now.unix {
            return Err(RefusalCode::TokenExpired);
        }
        if token.expires.since(now.unix) > TOKEN_MEMORY {
            return Err(RefusalCode::TokenLife);
        }
        let minimum = self.minimums.get(&token.device).map_or(0, |m| m.revision).max(self.floor);
        if token.revision < minimum {
            return Err(RefusalCode::TokenStale);
        }
        Ok(token)
    }

    fn forward(&mut self, conn: ConnId, now: Instant, dst: DeviceId, payload: &[u8]) {
        let (Some(to), Some(src)) =
            (self.route(conn, now, dst, payload), self.session(conn).map(|s| s.device))
        else {
            return;
        };
        if !self.session(to).is_some_and(|s| s.carries(now)) {
            self.counters.drop(DropReason::Suspended, 1);
        } else if self.deliver_udp(now, to, src, payload).is_none() {
            self.deliver(to, src, payload);
        }
    }

    /// The connection of `dst`, if the session behind `conn` may send to it now. Otherwise what follows from that for `payload`
    /// is done.
    fn route(&mut self, conn: ConnId, now: Instant, dst: DeviceId, payload: &[u8]) -> Option<ConnId> {
        let session = self.session(conn)?;
        let src = session.device;
        if now >= session.ends {
            self.close(conn, RefusalCode::TokenExpired);
        } else if session.suspended.is_some() {
            self.counters.drop(DropReason::Suspended, 1);
        } else if session.peers.binary_search(&dst).is_err() || dst == src {
            self.undeliverable(conn, now, dst, GoneReason::NotPermitted, DropReason::NotPermitted);
        } else if let Some(to) = self.sessions.get(&dst) {
            return Some(*to);
        } else if !self.hold(now, src, dst, payload) {
            self.undeliverable(conn, now, dst, GoneReason::NotConnected, DropReason::NotConnected);
        }
        None
    }

    /// Lets a packet wait for the connection of its destination.
    fn deliver(&mut self, to: ConnId, src: DeviceId, payload: &[u8]) {
        let class = if is_handshake(payload) { Class::Handshake } else { Class::Data };
        let frame: Arc<[u8]> = Frame::Recv { src, payload }.to_vec().into();
        if self.enqueue(to, class, frame) {
            self.counters.forward(payload.len(), false);
        }
    }

    /// What bytes from a device cost of its rate, and its burst.
    fn cost(&self, bytes: usize) -> (Duration, Duration) {
        let Limits { rate, burst, .. } = self.config.limits;
        let burst = usize::try_from(burst).unwrap_or(usize::MAX);
        let cost = (bytes + PACKET_OVERHEAD).max(MIN_PACKET_COST);
        (transmit_time(cost, rate), transmit_time(burst, rate))
    }

    fn undeliverable(
        &mut self,
        conn: ConnId,
        now: Instant,
        device: DeviceId,
        why: GoneReason,
        drop: DropReason,
    ) {
        self.counters.drop(drop, 1);
        let Some(session) = self.session_mut(conn) else { return };
        if session.notices.allow(now, NOTICE_COST, NOTICE_BURST) {
            self.control(conn, &Frame::PeerGone { device, why });
        } else {
            self.counters.drop(DropReason::NoticeLimited, 1);
        }
    }

    /// Queues a frame of the protocol itself; who lets these pile up is cut off.
    fn control(&mut self, conn: ConnId, frame: &Frame<'_>) {
        self.enqueue(conn, Class::Control, frame.to_vec().into());
    }

    /// Returns whether the frame waits now.
    fn enqueue(&mut self, conn: ConnId, class: Class, frame: Arc<[u8]>) -> bool {
        let room = self.room();
        let Some(entry) = self.conns.get_mut(&conn) else { return false };
        if entry.rests() {
            self.call(conn, class, &frame);
            return false;
        }
        let before = entry.queue.data_bytes();
        let pushed = entry.queue.push_within(class, frame, room);
        self.queued_bytes = self.queued_bytes - before + entry.queue.data_bytes();
        self.count_pushed(pushed, class, room);
        match pushed {
            Pushed::Queued { .. } => {
                if self.woken.insert(conn) {
                    self.outputs.push_back(Output::Wake(conn));
                }
                return true;
            }
            Pushed::Full if class == Class::Control => self.close(conn, RefusalCode::SlowReader),
            Pushed::Full => {}
        }
        false
    }

    /// How many bytes of data may wait in one queue.
    const fn room(&self) -> usize {
        self.config.limits.total_queue_bytes.saturating_sub(self.queued_bytes) / SHARE_OF_FREE
    }

    /// Counts what a push into a queue cost, where there was so much room.
    const fn count_pushed(&mut self, pushed: Pushed, class: Class, room: usize) {
        let (reason, dropped) = match (pushed, class) {
            (Pushed::Full, Class::Control) => return,
            (Pushed::Full, Class::Handshake) => (DropReason::HandshakeQueueFull, 1),
            (Pushed::Full, Class::Data) => (DropReason::MemoryFull, 1),
            (Pushed::Queued { dropped }, Class::Handshake) => (DropReason::HandshakeQueueFull, dropped),
            (Pushed::Queued { dropped }, Class::Data) if room < self.config.limits.queue_bytes => {
                (DropReason::MemoryFull, dropped)
            }
            (Pushed::Queued { dropped }, Class::Control | Class::Data) => (DropReason::QueueFull, dropped),
        };
        self.counters.drop(reason, dropped as u64);
    }

    fn suspend_if_older(&mut self, device: DeviceId, revision: u64, now: Instant) {
        let Some(conn) = self.sessions.get(&device).copied() else { return };
        let Some(session) = self.session_mut(conn) else { return };
        if session.revision >= revision {
            return;
        }
        if session.suspended.is_none() {
            session.suspended = Some(now + STALE_GRACE);
        }
        self.drop_queued(conn, |_| true);
        self.check_deadlines(conn, now);
        self.control(conn, &Frame::TokenWanted { why: WantedReason::Stale });
    }

    /// Drops what `from` has sent (`None`: all that was sent) and nobody was given yet, whichever token it was sent with.
    fn drop_waiting(&mut self, from: Option<DeviceId>) {
        let which = |frame: &[u8]| match (Frame::decode(frame), from) {
            (Ok(Some(Frame::Recv { src, .. })), Some(from)) => src == from,
            _ => true,
        };
        let waiting: Vec<ConnId> = self.woken.iter().copied().collect();
        waiting.into_iter().for_each(|conn| self.drop_queued(conn, which));
        let (dropped, bytes) = self.absent.drop_payloads(which);
        self.queued_bytes -= bytes;
        self.counters.drop(DropReason::Withdrawn, dropped as u64);
    }

    fn drop_queued(&mut self, conn: ConnId, which: impl Fn(&[u8]) -> bool) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        let before = entry.queue.data_bytes();
        let dropped = entry.queue.drop_payloads(which);
        self.queued_bytes -= before - entry.queue.data_bytes();
        self.counters.drop(DropReason::Withdrawn, dropped as u64);
    }

    /// Acts on what is due for `conn` and sets its timer to what is due next.
    fn check_deadlines(&mut self, conn: ConnId, now: Instant) {
        let idle_timeout = self.config.limits.idle_timeout;
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        let mut ask = false;
        let next = match &mut entry.state {
            State::HalfOpen { until, .. } if *until <= now => {
                return self.close(conn, RefusalCode::AuthTimeout);
            }
            State::HalfOpen { until, .. } => *until,
            State::Session(session) => {
                let idle_at = entry.heard + idle_timeout;
                let suspended = session.suspended.unwrap_or(Instant::FAR_FUTURE);
                for (at, reason) in [
                    (session.ends, RefusalCode::TokenExpired),
                    (suspended, RefusalCode::TokenStale),
                    (idle_at, RefusalCode::Idle),
                ] {
                    if at <= now {
                        return self.close(conn, reason);
                    }
                }
                ask = session.ask_at.take_if(|at| *at <= now).is_some();
                let ask_at = session.ask_at.unwrap_or(Instant::FAR_FUTURE);
                session.ends.min(suspended).min(idle_at).min(ask_at)
            }
        };
        self.timers.remove(&(entry.timer, conn));
        entry.timer = next;
        self.timers.insert((next, conn));
        if ask {
            self.control(conn, &Frame::TokenWanted { why: WantedReason::Expiring });
        }
    }

    fn close(&mut self, conn: ConnId, reason: RefusalCode) {
        if self.forget(conn) {
            self.counters.close(reason);
            self.outputs.push_back(Output::Close(conn, reason));
        }
    }

    fn forget(&mut self, conn: ConnId) -> bool {
        let Some(entry) = self.conns.remove(&conn) else { return false };
        self.queued_bytes -= entry.queue.data_bytes();
        self.timers.remove(&(entry.timer, conn));
        self.woken.remove(&conn);
        match entry.state {
            State::HalfOpen { .. } => {
                self.half_open.remove(&conn);
            }
            State::Session(session) => {
                self.sessions.remove(&session.device);
                for udp in session.udp.iter().chain(&session.former_udp) {
                    self.udp_ids.remove(&udp.id);
                }
            }
        }
        true
    }

    fn session(&self, conn: ConnId) -> Option<&Session> {
        match &self.conns.get(&conn)?.state {
            State::Session(session) => Some(session),
            State::HalfOpen { .. } => None,
        }
    }

    fn session_mut(&mut self, conn: ConnId) -> Option<&mut Session> {
        match &mut self.conns.get_mut(&conn)?.state {
            State::Session(session) => Some(session),
            State::HalfOpen { .. } => None,
        }
    }
}

/// When a token ends on the boot clock, whatever the wall clock does later, and when to ask for another.
fn token_ends(token: &RelayToken, now: Now) -> (Instant, Instant) {
    let left = token.expires.since(now.unix).min(Duration::from_secs(MAX_TOKEN_LIFE_S as u64));
    let ask_in = left.saturating_sub(REFRESH_BEFORE_END).max(left / 2);
    (now.boot + left, now.boot + ask_in)
}

fn sorted(mut peers: Vec<DeviceId>) -> Box<[DeviceId]> {
    peers.sort_unstable();
    peers.dedup();
    peers.into_boxed_slice()
}

fn transmit_time(bytes: usize, rate: u64) -> Duration {
    let nanos = bytes as u128 * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
