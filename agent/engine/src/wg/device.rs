//! The device: its peers, what it sends and when it wants to be woken. What it receives is in `receive`.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use ring::aead::LessSafeKey;
use warren_common::keys::{WgPublicKey, WgSecretKey};
use warren_common::time::{Instant, Now, UnixTime};
use zeroize::{Zeroize as _, Zeroizing};

use crate::io::Source;

use super::handshake::{Initiator, StaticKeys, TimestampClock, is_low_order};
use super::index::IndexTable;
use super::limiter::Limiter;
use super::mac::{CookieMaker, ReceiverKeys};
use super::message::{self, COOKIE_LEN, DATA_HEADER_LEN, DATA_OVERHEAD, RESPONSE_LEN, padded_len};
use super::peer::{Active, Peer, Pending};
use super::session::Session;
use super::timers::Timers;
use super::{
    AddPeerError, Counters, DEFAULT_MTU, Destination, Event, MAX_EVENTS, MAX_PACKET, MAX_PEERS,
    MAX_QUEUED_BYTES, MAX_REPLIES, MIN_TRANSMIT_BUFFER, PeerHandle, PeerStats, REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME, SealError, Transmit, TransmitKind, WakeReason,
};

/// One shard of the WireGuard transport (see the [module](super)).
pub struct Device {
    pub(super) keys: StaticKeys,
    /// What others sign their handshake messages to us with.
    pub(super) receiver_keys: ReceiverKeys,
    pub(super) rng: ChaCha20Rng,
    pub(super) indices: IndexTable,
    pub(super) limiter: Limiter,
    pub(super) cookies: CookieMaker,
    pub(super) by_key: BTreeMap<WgPublicKey, u32>,
    pub(super) counters: Counters,
    slots: Vec<Slot>,
    free: Vec<u32>,
    mtu: usize,
    clock: TimestampClock,
    timers: Timers,
    /// Slots of active peers that have something to transmit, each once.
    ready: VecDeque<u32>,
    replies: VecDeque<Reply>,
    events: VecDeque<Event>,
    /// Bytes in all peers' queues.
    queued_bytes: usize,
}

/// Seals packets for one peer, see [`Device::seal_batch`].
pub struct Sealer<'a> {
    session: &'a mut Session,
    key: LessSafeKey,
    mtu: usize,
    bytes: u64,
}

impl fmt::Debug for Sealer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer")
    }
}

impl<'a> Sealer<'a> {
    pub(super) fn new(session: &'a mut Session, mtu: usize) -> Self {
        Self { key: session.sealing_key(), session, mtu, bytes: 0 }
    }

    /// Bytes of the datagrams so far.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Seals a packet of `len` bytes, which `write` writes where they are to be, into the front of `out`; returns the
    /// datagram's length. `None` if `out` is too short for the padded packet and [`DATA_OVERHEAD`], if a packet of that
    /// length can't be, or if the session's last number is used up.
    pub fn seal(&mut self, len: usize, out: &mut [u8], write: impl FnOnce(&mut [u8])) -> Option<usize> {
        let padded = padded_len(len, self.mtu);
        let body = out.get_mut(DATA_HEADER_LEN..DATA_HEADER_LEN + padded)?;
        if len == 0 || len > MAX_PACKET || self.session.sent >= REJECT_AFTER_MESSAGES {
            return None;
        }
        let (packet, padding) = body.split_at_mut(len);
        write(packet);
        padding.fill(0);
        if out.len() < padded + DATA_OVERHEAD {
            return None;
        }
        let sealed = self.session.seal(&self.key, padded, out);
        self.bytes += sealed as u64;
        Some(sealed)
    }
}

struct Slot {
    generation: u32,
    peer: Option<Box<Peer>>,
}

/// A datagram that goes back to where another came from.
pub(super) enum Reply {
    Response { peer: PeerHandle, source: Source, message: [u8; RESPONSE_LEN] },
    Cookie { source: Source, message: [u8; COOKIE_LEN] },
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("public", &self.keys.public)
            .field("peers", &self.by_key.len())
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// A device with our static key. `seed` feeds its generator and must come from the OS (a simulator's from its
    /// own); `shard` is stamped into its receiver indices (see [`receiver_shard`](super::receiver_shard)).
    pub fn new(secret: WgSecretKey, mut seed: [u8; 32], shard: u8) -> Self {
        let keys = StaticKeys::new(secret);
        let rng = ChaCha20Rng::from_seed(seed);
        seed.zeroize();
        Self {
            receiver_keys: ReceiverKeys::new(&keys.public),
            keys,
            rng,
            indices: IndexTable::new(shard),
            limiter: Limiter::new(),
            cookies: CookieMaker::new(),
            by_key: BTreeMap::new(),
            counters: Counters::default(),
            slots: Vec::new(),
            free: Vec::new(),
            mtu: DEFAULT_MTU,
            clock: TimestampClock::default(),
            timers: Timers::default(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            events: VecDeque::new(),
            queued_bytes: 0,
        }
    }

    /// Our public key.
    pub const fn public_key(&self) -> WgPublicKey {
        self.keys.public
    }

    /// Sets the packet size up to which packets are padded, in bytes: the overlay's MTU.
    pub const fn set_mtu(&mut self, mtu: usize) {
        self.mtu = mtu;
    }

    pub(super) const fn mtu(&self) -> usize {
        self.mtu
    }

    /// Initiations from now on carry time stamps after `floor`. A shell that keeps [`Self::timestamp_floor`] over
    /// restarts is understood by its peers even if the wall clock went back meanwhile.
    pub fn raise_timestamp_floor(&mut self, floor: UnixTime) {
        self.clock.raise(floor);
    }

    /// A time after every time stamp used so far.
    pub fn timestamp_floor(&self) -> UnixTime {
        self.clock.floor()
    }

    /// What bounds made the device drop, since it was made.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Adds a peer. With `persistent_keepalive` a session is made at once and kept; without, nothing is sent before
    /// there is a packet for it.
    ///
    /// # Errors
    /// Keys that are known, our own or no protection are refused, and more than [`MAX_PEERS`] peers.
    pub fn add_peer(
        &mut self,
        key: WgPublicKey,
        psk: Option<[u8; 32]>,
        persistent_keepalive: Option<Duration>,
    ) -> Result<PeerHandle, AddPeerError> {
        if key == self.keys.public {
            return Err(AddPeerError::OwnKey);
        }
        if is_low_order(&key) {
            return Err(AddPeerError::LowOrderKey);
        }
        if self.by_key.contains_key(&key) {
            return Err(AddPeerError::Duplicate);
        }
        if self.by_key.len() >= MAX_PEERS {
            return Err(AddPeerError::TooMany);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, peer: None });
            (self.slots.len() - 1) as u32
        });
        let mut peer = Box::new(Peer {
            public: key,
            psk: Zeroizing::new(psk.unwrap_or_default()),
            persistent_keepalive: persistent_keepalive.filter(|interval| !interval.is_zero()),
            newest_timestamp: Default::default(),
            initiated: None,
            rx_bytes: 0,
            tx_bytes: 0,
            last_handshake: None,
            active: None,
        });
        if peer.persistent_keepalive.is_some() {
            let active = peer.activate();
            active.wants_keepalive = true;
            active.listed = true;
            self.ready.push_back(slot);
        }
        self.by_key.insert(key, slot);
        let place = &mut self.slots[slot as usize];
        place.peer = Some(peer);
        Ok(PeerHandle { slot, generation: place.generation })
    }

    /// Removes a peer and wipes its keys; messages in its sessions are dropped from now on. False if it is gone already.
    pub fn remove_peer(&mut self, peer: PeerHandle) -> bool {
        if self.peer(peer).is_none() {
            return false;
        }
        let place = &mut self.slots[peer.slot as usize];
        let Some(mut state) = place.peer.take() else {
            return false;
        };
        place.generation += 1;
        if place.generation < u32::MAX {
            self.free.push(peer.slot);
        }
        self.by_key.remove(&state.public);
        if let Some(mut active) = state.active.take() {
            active.drop_handshake(&mut self.indices);
            for session in active.sessions() {
                self.indices.remove(session.local);
            }
            self.queued_bytes -= active.queue_bytes();
            self.counters.queued_packets_dropped += active.queue.len() as u64;
        }
        self.timers.set(peer.slot, None);
        self.ready.retain(|slot| *slot != peer.slot);
        self.replies.retain(|reply| !matches!(reply, Reply::Response { peer: to, .. } if *to == peer));
        true
    }

    /// The peer with this key.
    pub fn find_peer(&self, key: &WgPublicKey) -> Option<PeerHandle> {
        self.by_key.get(key).map(|slot| self.handle_of(*slot))
    }

    /// A peer's key.
    pub fn peer_key(&self, peer: PeerHandle) -> Option<WgPublicKey> {
        self.peer(peer).map(|state| state.public)
    }

    /// A peer's counters.
    pub fn peer_stats(&self, peer: PeerHandle) -> Option<PeerStats> {
        self.peer(peer).map(|state| PeerStats {
            rx_bytes: state.rx_bytes,
            tx_bytes: state.tx_bytes,
            last_handshake: state.last_handshake,
        })
    }

    /// True if a packet for `peer` would go out at once.
    pub fn has_session(&self, peer: PeerHandle, now: Now) -> bool {
        self.peer(peer)
            .and_then(|state| state.active.as_ref()?.current.as_ref())
            .is_some_and(|session| session.can_send(now.boot))
    }

    /// Seals `packet` for `peer` into the front of `out` and returns the datagram's length. Allocates nothing when
    /// there is a session. Drain [`Self::poll_transmit`] first: packets that waited go before this one.
    ///
    /// # Errors
    /// [`SealError::Queued`] if there is no session yet: the packet comes out of [`Self::poll_transmit`] when there
    /// is one. Otherwise the packet was dropped.
    pub fn seal(
        &mut self,
        peer: PeerHandle,
        now: Now,
        packet: &[u8],
        out: &mut [u8],
    ) -> Result<usize, SealError> {
        if packet.is_empty() || packet.len() > MAX_PACKET {
            return Err(SealError::PacketSize);
        }
        let needed = padded_len(packet.len(), self.mtu) + DATA_OVERHEAD;
        if out.len() < needed {
            return Err(SealError::BufferTooSmall { needed });
        }
        let sealed = self.seal_batch(peer, now, |sealer| {
            sealer.seal(packet.len(), out, |body| body.copy_from_slice(packet))
        })?;
        if let Some(Some(len)) = sealed {
            return Ok(len);
        }
        self.queue(peer, now, packet)?;
        Err(SealError::Queued)
    }

    /// Seals any number of packets for `peer`: `fill` gets what seals them one after the other, straight where they are
    /// wanted, and the timers are seen to once. `None` without a session; nothing was done then.
    ///
    /// # Errors
    /// [`SealError::UnknownPeer`] only.
    pub fn seal_batch<R>(
        &mut self,
        peer: PeerHandle,
        now: Now,
        fill: impl FnOnce(&mut Sealer<'_>) -> R,
    ) -> Result<Option<R>, SealError> {
        let mtu = self.mtu;
        let state = peer_in(&mut self.slots, peer).ok_or(SealError::UnknownPeer)?;
        let Some(active) = &mut state.active else { return Ok(None) };
        let Some(session) = active.usable(now.boot) else { return Ok(None) };
        let mut sealer = Sealer::new(session, mtu);
        let result = fill(&mut sealer);
        let bytes = sealer.bytes;
        self.count_sealed(peer, now, bytes);
        Ok(Some(result))
    }

    /// Sees to counters and timers after datagrams of `bytes` together were sealed for `peer`.
    pub(super) fn count_sealed(&mut self, peer: PeerHandle, now: Now, bytes: u64) {
        let Some(state) = peer_in(&mut self.slots, peer) else { return };
        let keepalive = state.persistent_keepalive;
        if bytes > 0
            && let Some(active) = &mut state.active
        {
            state.tx_bytes += bytes;
            active.on_data_sent(now.boot, keepalive, false, &mut self.rng);
            self.settle(peer.slot, now.boot);
        }
    }

    /// Keeps a packet until there is a session, and asks for one.
    ///
    /// # Errors
    /// [`SealError::QueueFull`], [`SealError::UnknownPeer`]: the packet was dropped.
    pub fn queue(&mut self, peer: PeerHandle, now: Now, packet: &[u8]) -> Result<(), SealError> {
        let state = peer_in(&mut self.slots, peer).ok_or(SealError::UnknownPeer)?;
        let active = state.activate();
        active.request_handshake(now.boot);
        let before = active.queue_bytes();
        let result = if self.queued_bytes + packet.len() > MAX_QUEUED_BYTES {
            self.counters.queued_packets_dropped += 1;
            Err(SealError::QueueFull)
        } else {
            self.counters.queued_packets_dropped += active.enqueue(packet);
            Ok(())
        };
        self.queued_bytes = self.queued_bytes - before + active.queue_bytes();
        self.settle(peer.slot, now.boot);
        result
    }

    /// Starts a handshake with `peer`, also when there is a session; at most one per [`super::REKEY_TIMEOUT`].
    /// False if there is no such peer.
    pub fn initiate(&mut self, peer: PeerHandle, now: Now) -> bool {
        let Some(state) = peer_in(&mut self.slots, peer) else {
            return false;
        };
        state.activate().request_handshake(now.boot);
        self.settle(peer.slot, now.boot);
        true
    }

    /// Sends an initiation that is under way once more, byte for byte, since there is a new path to `peer`. Nothing
    /// happens if none is.
    pub fn resend_handshake(&mut self, peer: PeerHandle, now: Now) {
        if let Some(active) = peer_in(&mut self.slots, peer).and_then(|state| state.active.as_deref_mut()) {
            active.resend();
            self.settle(peer.slot, now.boot);
        }
    }

    /// The next datagram to send, written to the front of `out`, which should hold the largest packet and
    /// [`DATA_OVERHEAD`]. `None` if there is none, or `out` is shorter than [`MIN_TRANSMIT_BUFFER`].
    pub fn poll_transmit(&mut self, now: Now, out: &mut [u8]) -> Option<Transmit> {
        if out.len() < MIN_TRANSMIT_BUFFER {
            return None;
        }
        if let Some(reply) = self.replies.pop_front() {
            return Some(match reply {
                Reply::Response { peer, source, message } => {
                    let to = Destination::Reply { source, peer: Some(peer) };
                    write(out, &message, to, TransmitKind::Response)
                }
                Reply::Cookie { source, message } => {
                    let to = Destination::Reply { source, peer: None };
                    write(out, &message, to, TransmitKind::Cookie)
                }
            });
        }
        while let Some(slot) = self.ready.front().copied() {
            if let Some(transmit) = self.transmit_for(slot, now, out) {
                return Some(transmit);
            }
            self.ready.pop_front();
            if let Some(active) = active_in(&mut self.slots, slot) {
                active.listed = false;
                self.shrink(slot, now.boot);
            }
        }
        None
    }

    /// What happened since the last call.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`], and why. Exact: something will be due then.
    pub fn poll_timeout(&mut self) -> Option<(Instant, WakeReason)> {
        loop {
            let (slot, at, _) = self.timers.first()?;
            // Traffic moves deadlines later without touching the heap; what comes up first is put right here.
            let actual = active_in(&mut self.slots, slot).and_then(|active| active.deadline());
            if actual.is_some_and(|(actual, _)| actual <= at) {
                return actual;
            }
            self.timers.set(slot, actual);
        }
    }

    /// Does everything that is due at `now`. After a sleep of the machine that is the end of old sessions.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some((slot, at, _)) = self.timers.first() {
            if at > now.boot {
                break;
            }
            self.fire(slot, now);
            let deadline = active_in(&mut self.slots, slot).and_then(|active| active.deadline());
            self.timers.set(slot, deadline);
            self.settle(slot, now.boot);
        }
    }

    fn fire(&mut self, slot: u32, now: Now) {
        let peer = self.handle_of(slot);
        let Some(state) = peer_at(&mut self.slots, slot) else {
            return;
        };
        let keepalive = state.persistent_keepalive;
        let Some(active) = state.active.as_deref_mut() else {
            return;
        };
        let fired = active.fire(now.boot, keepalive);
        let mut expired = false;
        if fired.sessions_expired {
            let had_session = active.current.is_some();
            for place in active.places() {
                if let Some(session) = place.take_if(|session| session.age(now.boot) >= REJECT_AFTER_TIME) {
                    self.indices.remove(session.local);
                }
            }
            expired = had_session && active.current.is_none();
        }
        if fired.failed {
            active.drop_handshake(&mut self.indices);
            self.queued_bytes -= active.queue_bytes();
            self.counters.queued_packets_dropped += active.queue.len() as u64;
            active.queue.clear();
        }
        self.shrink(slot, now.boot);
        if expired {
            self.push_event(Event::SessionExpired { peer });
        }
        if fired.failed {
            self.push_event(Event::HandshakeFailed { peer });
        }
    }

    /// Makes a peer idle again if nothing about it needs remembering.
    fn shrink(&mut self, slot: u32, now: Instant) {
        if let Some(state) = peer_at(&mut self.slots, slot)
            && let Some(active) = &state.active
            && !active.listed
            && active.is_over(now)
        {
            state.active = None;
        }
    }

    fn transmit_for(&mut self, slot: u32, now: Now, out: &mut [u8]) -> Option<Transmit> {
        let to = Destination::Peer(self.handle_of(slot));
        let mtu = self.mtu;
        let state = peer_at(&mut self.slots, slot)?;
        let keepalive = state.persistent_keepalive;
        let active = state.active.as_deref_mut()?;
        if active.wants_resend {
            active.wants_resend = false;
            if let Some(pending) = &active.pending {
                state.tx_bytes += pending.message.len() as u64;
                return Some(write(out, &pending.message, to, TransmitKind::Initiation));
            }
        }
        while active.usable(now.boot).is_some() {
            let Some(packet) = active.queue.pop_front() else {
                break;
            };
            self.queued_bytes -= packet.len();
            let padded = padded_len(packet.len(), mtu);
            if padded + DATA_OVERHEAD > out.len() {
                self.counters.queued_packets_dropped += 1;
                continue;
            }
            let session = active.usable(now.boot)?;
            let body = &mut out[DATA_HEADER_LEN..DATA_HEADER_LEN + padded];
            body[..packet.len()].copy_from_slice(&packet);
            body[packet.len()..].fill(0);
            let len = session.seal(&session.sealing_key(), padded, out);
            state.tx_bytes += len as u64;
            active.wants_keepalive = false;
            active.on_data_sent(now.boot, keepalive, false, &mut self.rng);
            self.settle(slot, now.boot);
            let kind = TransmitKind::Data;
            return Some(Transmit { to, len, kind });
        }
        if std::mem::take(&mut active.wants_keepalive) {
            if let Some(session) = active.usable(now.boot) {
                let len = session.seal(&session.sealing_key(), 0, out);
                state.tx_bytes += len as u64;
                active.on_data_sent(now.boot, keepalive, true, &mut self.rng);
                self.settle(slot, now.boot);
                let kind = TransmitKind::Keepalive;
                return Some(Transmit { to, len, kind });
            }
            if keepalive.is_some() {
                active.request_handshake(now.boot);
            }
        }
        let wants_initiation = active.wants_initiation;
        let len = wants_initiation.then(|| self.write_initiation(slot, now, out)).flatten();
        self.settle(slot, now.boot);
        len.map(|len| Transmit { to, len, kind: TransmitKind::Initiation })
    }

    fn write_initiation(&mut self, slot: u32, now: Now, out: &mut [u8]) -> Option<usize> {
        let state = peer_at(&mut self.slots, slot)?;
        let keepalive = state.persistent_keepalive;
        let active = state.active.as_deref_mut()?;
        active.drop_handshake(&mut self.indices);
        let local = self.indices.insert(slot, &mut self.rng);
        let mut message = message::initiation(local);
        let timestamp = self.clock.next(now.unix);
        let Ok(noise) =
            Initiator::start(&self.keys, &state.public, &state.psk, timestamp, &mut message, &mut self.rng)
        else {
            // Only a low-order key makes this fail, and such a peer can't be added.
            self.indices.remove(local);
            active.end_series();
            return None;
        };
        let cookie = active.cookie.as_ref().and_then(|c| c.value(now.boot));
        let mac1 = ReceiverKeys::new(&state.public).sign(&mut message, cookie);
        out[..message.len()].copy_from_slice(&message);
        state.tx_bytes += message.len() as u64;
        active.pending = Some(Box::new(Pending::new(local, noise, message, mac1)));
        active.on_initiation_sent(now.boot, keepalive, &mut self.rng);
        Some(message.len())
    }

    /// After any change to an active peer: it is listed if it has output, and woken in time.
    pub(super) fn settle(&mut self, slot: u32, now: Instant) {
        let Some(active) = active_in(&mut self.slots, slot) else {
            return;
        };
        if !active.listed && active.has_output(now) {
            active.listed = true;
            self.ready.push_back(slot);
        }
        if let Some(deadline) = active.deadline()
            && self.timers.get(slot).is_none_or(|at| deadline.0 < at)
        {
            self.timers.set(slot, Some(deadline));
        }
    }

    pub(super) fn push_reply(&mut self, reply: Reply) {
        if self.replies.len() >= MAX_REPLIES {
            self.counters.replies_dropped += 1;
        } else {
            self.replies.push_back(reply);
        }
    }

    pub(super) fn push_event(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
            self.counters.events_dropped += 1;
        }
        self.events.push_back(event);
    }

    pub(super) fn handle_of(&self, slot: u32) -> PeerHandle {
        PeerHandle { slot, generation: self.slots[slot as usize].generation }
    }

    /// The peer in `slot`, with what handling its messages needs beside it.
    pub(super) fn peer_and_indices(&mut self, slot: u32) -> Option<(&mut Peer, &mut IndexTable)> {
        peer_at(&mut self.slots, slot).map(|peer| (peer, &mut self.indices))
    }

    pub(super) fn active_of(&mut self, peer: PeerHandle) -> Option<&mut Active> {
        peer_in(&mut self.slots, peer)?.active.as_deref_mut()
    }

    fn peer(&self, peer: PeerHandle) -> Option<&Peer> {
        let place = self.slots.get(peer.slot as usize)?;
        (place.generation == peer.generation).then_some(place.peer.as_deref()).flatten()
    }
}

impl Active {
    /// Gives up an initiation under way.
    pub(super) fn drop_handshake(&mut self, indices: &mut IndexTable) {
        if let Some(pending) = self.pending.take() {
            indices.remove(pending.local);
        }
    }

    /// Makes `session` the one we send in. The one before stays for receiving, and the one before that as well: when
    /// both sides initiated at once each may still send in either.
    pub(super) fn make_current(&mut self, session: Box<Session>, indices: &mut IndexTable) {
        let old = self.current.replace(session);
        let older = std::mem::replace(&mut self.previous[0], old);
        if let Some(oldest) = std::mem::replace(&mut self.previous[1], older) {
            indices.remove(oldest.local);
        }
    }
}

fn peer_at(slots: &mut [Slot], slot: u32) -> Option<&mut Peer> {
    slots.get_mut(slot as usize)?.peer.as_deref_mut()
}

fn active_in(slots: &mut [Slot], slot: u32) -> Option<&mut Active> {
    peer_at(slots, slot)?.active.as_deref_mut()
}

fn peer_in(slots: &mut [Slot], peer: PeerHandle) -> Option<&mut Peer> {
    let place = slots.get_mut(peer.slot as usize)?;
    if place.generation != peer.generation {
        return None;
    }
    place.peer.as_deref_mut()
}

fn write(out: &mut [u8], message: &[u8], to: Destination, kind: TransmitKind) -> Transmit {
    out[..message.len()].copy_from_slice(message);
    Transmit { to, len: message.len(), kind }
}
