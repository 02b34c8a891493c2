//! What a device does with datagrams. Cheap checks come first: shape, MAC1, load, and only then a key agreement.

use std::fmt;
use std::ops::Range;

use warren_common::keys::WgPublicKey;
use warren_common::time::{Instant, Now};

use crate::io::Source;

use super::device::{Device, Reply};
use super::handshake::Responder;
use super::limiter::Verdict;
use super::mac::{Cookie, ReceiverKeys};
use super::message::{
    self, COOKIE_LEN, INITIATION_LEN, Message, RESPONSE_LEN, cookie_receiver, initiation_sender, ip_len,
    response_receiver, response_sender,
};
use super::peer::Response;
use super::session::Session;
use super::{
    DropReason, Event, INITIATION_INTERVAL, PeerHandle, REKEY_AFTER_TIME, RESPONDER_RENEWS_AFTER,
    RESPONDER_RENEWS_AFTER_LATER, Received,
};

/// An authentic initiation on its way to the device that has its peer.
pub struct Initiation {
    responder: Responder,
    sender: u32,
    source: Source,
}

impl Initiation {
    /// Who made it.
    pub const fn peer_key(&self) -> WgPublicKey {
        self.responder.peer
    }
}

/// What [`Device::handle_data_batch`] took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataBatch {
    /// Datagrams from the front, good or not; 0 if the first one is none of a session in use.
    pub datagrams: usize,
    /// The peer that provably made some of them.
    pub peer: Option<PeerHandle>,
    /// Authentic ones with a packet.
    pub packets: usize,
    /// Authentic ones without.
    pub keepalives: usize,
}

impl fmt::Debug for Initiation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Initiation")
            .field("peer", &self.responder.peer)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// Takes a datagram that came from `source`; a data message is opened in place. Allocates nothing for data.
    ///
    /// # Errors
    /// Why it was dropped. Nothing about the sender may be concluded then.
    pub fn handle(&mut self, now: Now, source: Source, datagram: &mut [u8]) -> Result<Received, DropReason> {
        match message::parse(datagram)? {
            Message::Data { receiver, counter } => self.handle_data(now, receiver, counter, datagram),
            Message::Initiation(message) => {
                let initiation = self.check_initiation(now, source, message)?;
                self.accept_initiation(now, initiation)
            }
            Message::Response(message) => self.handle_response(now, message),
            Message::Cookie(message) => self.handle_cookie(now, message),
        }
    }

    /// The first half of handling an initiation: who made it. Any shard can do it, since all have the same static key;
    /// [`Self::accept_initiation`] on the shard that has the peer does the rest.
    ///
    /// # Errors
    /// Why it was dropped. A cookie may be ready to be transmitted then.
    pub fn read_initiation(
        &mut self,
        now: Now,
        source: Source,
        datagram: &[u8],
    ) -> Result<Initiation, DropReason> {
        match message::parse(datagram)? {
            Message::Initiation(message) => self.check_initiation(now, source, message),
            Message::Response(_) | Message::Cookie(_) | Message::Data { .. } => Err(DropReason::Malformed),
        }
    }

    fn check_initiation(
        &mut self,
        now: Now,
        source: Source,
        message: &[u8; INITIATION_LEN],
    ) -> Result<Initiation, DropReason> {
        if !self.receiver_keys.verify_mac1(message) {
            return Err(DropReason::BadMac1);
        }
        let proved = || self.cookies.verify_mac2(now.boot, source, message);
        match self.limiter.admit(now.boot, source, proved) {
            Verdict::Process => {}
            Verdict::Refuse => return Err(DropReason::RateLimited),
            Verdict::AskForCookie => {
                if let Some(reply) = self.cookies.reply(
                    now.boot,
                    source,
                    initiation_sender(message),
                    message,
                    &self.receiver_keys,
                    &mut self.rng,
                ) {
                    self.counters.cookies_sent += 1;
                    let message = reply;
                    self.push_reply(Reply::Cookie { source, message });
                }
                return Err(DropReason::CookieSent);
            }
        }
        let responder =
            Responder::read(&self.keys, message, &mut self.rng).map_err(|_| DropReason::BadHandshake)?;
        Ok(Initiation { responder, sender: initiation_sender(message), source })
    }

    /// The second half of handling an initiation: answers it. The session is used once its first message comes.
    ///
    /// # Errors
    /// Why it was dropped.
    pub fn accept_initiation(&mut self, now: Now, initiation: Initiation) -> Result<Received, DropReason> {
        let Initiation { responder, sender, source } = initiation;
        let slot = *self.by_key.get(&responder.peer).ok_or(DropReason::UnknownPeer)?;
        let peer = self.handle_of(slot);
        let ours = self.keys.public;
        let local = {
            let (state, _) = self.peer_and_indices(slot).ok_or(DropReason::UnknownPeer)?;
            if responder.timestamp <= state.newest_timestamp {
                if responder.timestamp == state.newest_timestamp {
                    self.repeat_response(now, slot, sender, source);
                }
                return Err(DropReason::ReplayedInitiation);
            }
            if state.initiated.is_some_and(|at| now.boot.since(at) < INITIATION_INTERVAL) {
                return Err(DropReason::InitiationTooSoon);
            }
            self.indices.insert(slot, &mut self.rng)
        };
        let (state, indices) = self.peer_and_indices(slot).ok_or(DropReason::UnknownPeer)?;
        let timestamp = responder.timestamp;
        let mut message = message::response(local, sender);
        let Ok(keys) = responder.respond(&state.psk, &mut message) else {
            indices.remove(local);
            return Err(DropReason::BadHandshake);
        };
        state.newest_timestamp = timestamp;
        state.initiated = Some(now.boot);
        state.rx_bytes += INITIATION_LEN as u64;
        state.tx_bytes += RESPONSE_LEN as u64;
        let keepalive = state.persistent_keepalive;
        let receiver_keys = ReceiverKeys::new(&state.public);
        let renew_after =
            if ours > state.public { RESPONDER_RENEWS_AFTER } else { RESPONDER_RENEWS_AFTER_LATER };
        let active = state.activate();
        let cookie = active.cookie.as_ref().and_then(|c| c.value(now.boot));
        let mac1 = receiver_keys.sign(&mut message, cookie);
        active.response = Some(Box::new(Response { local, message, mac1, sent: now.boot }));
        let session = Session::new(local, sender, false, renew_after, keys, now.boot);
        if let Some(old) = active.next.replace(Box::new(session)) {
            indices.remove(old.local);
        }
        active.on_authentic_received(now.boot, keepalive);
        active.on_authentic_sent(now.boot, keepalive);
        self.push_reply(Reply::Response { peer, source, message });
        self.settle(slot, now.boot);
        Ok(Received::Initiation { peer })
    }

    /// Sends our last response once more, to where its initiation came from again: one of the two was lost, or somebody
    /// replays it, and then learns nothing new. Only until the session is confirmed, and not in a row.
    fn repeat_response(&mut self, now: Now, slot: u32, sender: u32, source: Source) {
        let peer = self.handle_of(slot);
        let Some((state, _)) = self.peer_and_indices(slot) else { return };
        let Some(active) = state.active.as_deref_mut() else { return };
        let Some(Response { local, message, sent, .. }) = active.response.as_deref_mut() else { return };
        let waits = active.next.as_ref().is_some_and(|next| next.local == *local);
        let soon = now.boot.since(*sent) < INITIATION_INTERVAL;
        if !waits || soon || response_receiver(message) != sender {
            return;
        }
        *sent = now.boot;
        let message = *message;
        state.tx_bytes += RESPONSE_LEN as u64;
        self.push_reply(Reply::Response { peer, source, message });
    }

    fn handle_response(&mut self, now: Now, message: &[u8; RESPONSE_LEN]) -> Result<Received, DropReason> {
        let receiver = response_receiver(message);
        let slot = self.indices.get(receiver).ok_or(DropReason::UnknownIndex)?;
        if !self.receiver_keys.verify_mac1(message) {
            return Err(DropReason::BadMac1);
        }
        let peer = self.handle_of(slot);
        let (state, indices) = self.peer_and_indices(slot).ok_or(DropReason::UnknownIndex)?;
        let keepalive = state.persistent_keepalive;
        let active = state.active.as_deref_mut().ok_or(DropReason::UnknownIndex)?;
        let pending = active
            .pending
            .as_deref_mut()
            .filter(|pending| pending.local == receiver)
            .ok_or(DropReason::UnknownIndex)?;
        pending.responses_left = pending.responses_left.checked_sub(1).ok_or(DropReason::TooManyResponses)?;
        let keys = pending.noise.finish(message).map_err(|_| DropReason::BadHandshake)?;
        active.pending = None; // its index lives on in the session
        let sender = response_sender(message);
        let session = Session::new(receiver, sender, true, REKEY_AFTER_TIME, keys, now.boot);
        let renewed = active.usable(now.boot).is_some();
        active.make_current(Box::new(session), indices);
        active.on_established();
        active.on_authentic_received(now.boot, keepalive);
        // The first message tells the responder that we have the keys.
        active.wants_keepalive = true;
        state.rx_bytes += RESPONSE_LEN as u64;
        state.last_handshake = Some(now.unix);
        self.push_event(Event::SessionEstablished { peer, renewed });
        self.settle(slot, now.boot);
        Ok(Received::Response { peer })
    }

    fn handle_cookie(&mut self, now: Now, message: &[u8; COOKIE_LEN]) -> Result<Received, DropReason> {
        let receiver = cookie_receiver(message);
        let slot = self.indices.get(receiver).ok_or(DropReason::UnknownIndex)?;
        let peer = self.handle_of(slot);
        let (state, _) = self.peer_and_indices(slot).ok_or(DropReason::UnknownIndex)?;
        let receiver_keys = ReceiverKeys::new(&state.public);
        let active = state.active.as_deref_mut().ok_or(DropReason::UnknownIndex)?;
        let mac1 = active
            .pending
            .as_ref()
            .filter(|pending| pending.local == receiver)
            .map(|pending| pending.mac1)
            .or_else(|| {
                let Response { local, mac1, .. } = active.response.as_deref()?;
                (*local == receiver).then_some(*mac1)
            })
            .ok_or(DropReason::BadCookie)?;
        let value = receiver_keys.open_cookie(message, &mac1).ok_or(DropReason::BadCookie)?;
        active.on_cookie(Cookie::new(value, now.boot));
        Ok(Received::Cookie { peer })
    }

    /// Opens data messages of one session in place: those at the front of `data`, which lie `stride` bytes apart (the
    /// last may be shorter), up to the first that is something else. `each` gets every one, with the place of its packet
    /// (empty for a keepalive) or why it was dropped. Allocates nothing; the session is looked for once.
    pub fn handle_data_batch(
        &mut self,
        now: Now,
        data: &mut [u8],
        stride: usize,
        mut each: impl FnMut(PeerHandle, Result<Range<usize>, DropReason>, &mut [u8]),
    ) -> DataBatch {
        let batch = DataBatch::default();
        let first = data.get(..stride.min(data.len())).unwrap_or_default();
        let Ok(Message::Data { receiver, .. }) = message::parse(first) else { return batch };
        let Some(slot) = self.indices.get(receiver) else { return batch };
        let peer = self.handle_of(slot);
        let Some((state, _)) = self.peer_and_indices(slot) else { return batch };
        let Some(active) = state.active.as_deref_mut() else { return batch };
        if active.next.as_ref().is_some_and(|next| next.local == receiver) {
            return batch; // its first message changes which session is current: see `handle`
        }
        let Some(session) = active.sessions().find(|session| session.local == receiver) else { return batch };
        let (mut batch, bytes) =
            open_batch(session, now.boot, data, stride, |opened, datagram| each(peer, opened, datagram));
        if bytes > 0 {
            batch.peer = Some(peer);
            self.count_opened(peer, now, batch, bytes);
        }
        batch
    }

    /// Sees to counters and timers after `batch` of a peer with authentic datagrams of `bytes` together.
    pub(super) fn count_opened(&mut self, peer: PeerHandle, now: Now, batch: DataBatch, bytes: u64) {
        let Some((state, _)) = self.peer_and_indices(peer.slot) else { return };
        state.rx_bytes += bytes;
        let keepalive = state.persistent_keepalive;
        let Some(active) = state.active.as_deref_mut() else { return };
        // Twice says that there was another one; more say no more.
        for _ in 0..batch.packets.min(2) {
            active.on_data_received(now.boot, keepalive, false);
        }
        if batch.packets == 0 {
            active.on_data_received(now.boot, keepalive, true);
        }
        self.settle(peer.slot, now.boot);
    }

    fn handle_data(
        &mut self,
        now: Now,
        receiver: u32,
        counter: u64,
        datagram: &mut [u8],
    ) -> Result<Received, DropReason> {
        let slot = self.indices.get(receiver).ok_or(DropReason::UnknownIndex)?;
        let peer = self.handle_of(slot);
        let (state, indices) = self.peer_and_indices(slot).ok_or(DropReason::UnknownIndex)?;
        let keepalive = state.persistent_keepalive;
        let active = state.active.as_deref_mut().ok_or(DropReason::UnknownIndex)?;
        let session =
            active.sessions().find(|session| session.local == receiver).ok_or(DropReason::UnknownIndex)?;
        let packet = session.open(&session.opening_key(), counter, datagram, now.boot)?;
        state.rx_bytes += datagram.len() as u64;
        let is_keepalive = packet.is_empty();
        let confirmed = active.next.take_if(|next| next.local == receiver);
        if let Some(session) = confirmed {
            let renewed = active.usable(now.boot).is_some();
            active.drop_handshake(indices);
            active.make_current(session, indices);
            active.on_established();
            active.on_data_received(now.boot, keepalive, is_keepalive);
            state.last_handshake = Some(now.unix);
            self.push_event(Event::SessionEstablished { peer, renewed });
        } else {
            active.on_data_received(now.boot, keepalive, is_keepalive);
        }
        self.settle(slot, now.boot);
        if is_keepalive {
            return Ok(Received::Keepalive { peer });
        }
        let len = ip_len(&datagram[packet.clone()]).ok_or(DropReason::NotIp)?;
        Ok(Received::Data { peer, packet: packet.start..packet.start + len })
    }
}

/// Opens in place the datagrams at the front of `data` that are for `session`, each `stride` bytes long, and hands `each`
/// every one. Returns what it took, and the bytes of the authentic ones.
pub(super) fn open_batch(
    session: &mut Session,
    now: Instant,
    data: &mut [u8],
    stride: usize,
    mut each: impl FnMut(Result<Range<usize>, DropReason>, &mut [u8]),
) -> (DataBatch, u64) {
    let mut batch = DataBatch::default();
    let key = session.opening_key();
    let mut bytes = 0;
    for datagram in data.chunks_mut(stride.max(1)) {
        let counter = match message::parse(datagram) {
            Ok(Message::Data { receiver, counter }) if receiver == session.local => counter,
            _ => break,
        };
        batch.datagrams += 1;
        let opened = session.open(&key, counter, datagram, now);
        if let Ok(packet) = &opened {
            bytes += datagram.len() as u64;
            batch.keepalives += usize::from(packet.is_empty());
            batch.packets += usize::from(!packet.is_empty());
        }
        let packet = opened.and_then(|packet| match ip_len(&datagram[packet.clone()]) {
            _ if packet.is_empty() => Ok(packet),
            Some(len) => Ok(packet.start..packet.start + len),
            None => Err(DropReason::NotIp),
        });
        each(packet, datagram);
    }
    (batch, bytes)
}
