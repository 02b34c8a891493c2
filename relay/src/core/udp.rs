//! Plain UDP: datagrams of an authenticated session, relayed in place.
//!
//! Each datagram that comes in becomes at most one datagram, of the same length and in the same memory: a packet for a
//! device that takes plain UDP, or the answer to a ping. So there is nothing to queue, nothing to allocate, and nothing
//! that a stranger could make larger. Packets for a device that is not reached so wait for its connection as any others.
//!
//! Where a device is comes from its newest authentic datagram, as in WireGuard: a NAT may give it another address at any
//! time. A replayed or forged datagram moves nothing and is answered by nothing.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use warren_common::wire::relay::udp::{Call, Head, Kind, Ping, UDP_HEADER, UdpCipher, UdpKeys};

use super::window::{Seen, Window};
use super::*;

/// A device that was not heard over UDP for so long is not sent anything over UDP: it pings every 15 s, so two pings were
/// lost, or a NAT on the way has forgotten it.
const UDP_FRESH: Duration = Duration::from_secs(40);

/// Where a datagram comes from and goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpPath {
    /// The device's address.
    pub remote: SocketAddr,
    /// The relay's, if the host has several and the system says which.
    pub local: Option<IpAddr>,
}

/// A part of the buffer that was handed in, to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpSend {
    /// Where to.
    pub to: UdpPath,
    /// Which bytes.
    pub range: Range<usize>,
    /// Length of each datagram in it; the last may be shorter.
    pub segment: usize,
}

/// The UDP side of a session: 300 bytes.
#[derive(Debug)]
pub(super) struct UdpSession {
    pub(super) id: u64,
    pub(super) keys: UdpKeys,
    /// Next counter towards the device.
    next: u64,
    window: Window,
    pub(super) at: Option<UdpPath>,
    heard: Instant,
    /// Counters up to this no longer say where the device is.
    lost: Option<u64>,
}

impl UdpSession {
    pub(super) fn new(id: u64, keys: UdpKeys) -> Self {
        Self { id, keys, next: 0, window: Window::new(), at: None, heard: Instant::ZERO, lost: None }
    }

    /// Where the device takes datagrams, if it does.
    fn path(&self, now: Instant) -> Option<UdpPath> {
        self.at.filter(|_| now.since(self.heard) < UDP_FRESH)
    }

    fn lose(&mut self, counter: u64) {
        self.lost = Some(counter);
        self.at = None;
    }

    fn hear(&mut self, now: Instant, from: UdpPath, counter: u64) {
        if self.lost.is_none_or(|lost| counter > lost) {
            self.at = Some(from);
            self.heard = now;
        }
    }

    pub(super) fn seal(
        &mut self,
        cipher: &UdpCipher,
        kind: Kind,
        what: [u8; 16],
        datagram: &mut [u8],
    ) -> bool {
        let head = Head { kind, session: self.id, counter: self.next };
        self.next += 1;
        cipher.seal(head, what, datagram)
    }
}

/// What the datagrams of one buffer have in common, mostly: looked up and set up once.
#[derive(Default)]
struct Batch {
    from: Option<(u64, ConnId, UdpCipher)>,
    to: Option<(u64, UdpCipher)>,
    /// The sender's permission holds: a token can't change inside a buffer.
    route: Option<(ConnId, DeviceId, ConnId)>,
}

impl Session {
    /// The UDP side with this number.
    fn udp_mut(&mut self, id: u64) -> Option<&mut UdpSession> {
        self.udp.iter_mut().chain(&mut self.former_udp).map(|udp| &mut **udp).find(|udp| udp.id == id)
    }

    /// Where the device takes datagrams, if it does, and what seals them.
    pub(super) fn udp_path(&mut self, now: Instant) -> Option<(&mut UdpSession, UdpPath)> {
        let both = self.udp.iter_mut().chain(&mut self.former_udp);
        both.map(|udp| &mut **udp).find_map(|udp| udp.path(now).map(|at| (udp, at)))
    }
}

impl Relay {
    /// Datagrams of `stride` bytes each (the last may be shorter) came from one address. What must be sent lies in
    /// `buffer` afterwards, as `sends` says.
    pub fn handle_udp(
        &mut self,
        now: Now,
        from: UdpPath,
        buffer: &mut [u8],
        stride: usize,
        sends: &mut Vec<UdpSend>,
    ) {
        let stride = stride.max(1);
        let (mut batch, mut at, mut run) = (Batch::default(), 0, None::<UdpSend>);
        for datagram in buffer.chunks_mut(stride) {
            let range = at..at + datagram.len();
            at = range.end;
            let Some(to) = self.take_datagram(now, from, datagram, &mut batch) else { continue };
            match &mut run {
                Some(run) if run.to == to && run.range.end == range.start => run.range.end = range.end,
                _ => {
                    sends.extend(run.take());
                    run = Some(UdpSend { to, segment: datagram.len(), range });
                }
            }
        }
        sends.extend(run);
    }

    /// A datagram for a device, made from what came over a connection. Drain it after each input.
    pub fn poll_datagram(&mut self) -> Option<(UdpPath, Vec<u8>)> {
        self.datagrams.pop_front()
    }

    /// UDP does not reach the device of `conn`, as it says itself: not before a datagram with a higher counter, and by what
    /// it was lent never again.
    pub(super) fn lose_udp(&mut self, conn: ConnId, counter: u64) {
        let Some(session) = self.session_mut(conn) else { return };
        if let Some(udp) = &mut session.udp {
            udp.lose(counter);
        }
        if let Some(former) = session.former_udp.take() {
            self.udp_ids.remove(&former.id);
        }
    }

    /// Turns a datagram into what goes out in its place.
    fn take_datagram(
        &mut self,
        now: Now,
        from: UdpPath,
        datagram: &mut [u8],
        batch: &mut Batch,
    ) -> Option<UdpPath> {
        let Some(head) = Head::peek(datagram).filter(|h| matches!(h.kind, Kind::Send | Kind::Ping)) else {
            self.counters.drop(DropReason::UdpMalformed, 1);
            return None;
        };
        if batch.from.as_ref().is_none_or(|(session, ..)| *session != head.session) {
            let found = self.udp_ids.get(&head.session).copied();
            batch.from = found.and_then(|conn| {
                let session = self.session(conn)?;
                let mut both = session.udp.iter().chain(&session.former_udp);
                let cipher = both.find(|udp| udp.id == head.session)?.keys.opener();
                Some((head.session, conn, cipher))
            });
        }
        let Some((_, conn, opener)) = &batch.from else {
            self.counters.drop(DropReason::UdpUnknown, 1);
            return None;
        };
        let conn = *conn;
        let (cost, burst) = self.cost(datagram.len() - UDP_HEADER);
        let entry = self.conns.get_mut(&conn)?;
        let State::Session(session) = &mut entry.state else { return None };
        // Whoever made it: what is too much of a flood costs no more than this.
        if !session.rate.would_allow(now.boot, cost, burst) {
            self.counters.drop(DropReason::RateLimited, 1);
            return None;
        }
        let Some(what) = opener.open(datagram) else {
            self.counters.drop(DropReason::UdpForged, 1);
            return None;
        };
        let udp = session.udp_mut(head.session)?;
        let seen = udp.window.record(head.counter);
        if seen == Seen::Replayed {
            self.counters.drop(DropReason::UdpReplayed, 1);
            return None;
        }
        entry.heard = now.boot;
        session.rate.allow(now.boot, cost, burst); // it would, as was seen above
        let ping = (head.kind == Kind::Ping).then(|| Ping::from_bytes(&what));
        let udp = session.udp_mut(head.session)?;
        if seen == Seen::Newest && ping.is_none_or(|ping| ping.settle) {
            udp.hear(now.boot, from, head.counter);
            if let Some(former) = session.former_udp.take_if(|former| former.id != head.session) {
                self.udp_ids.remove(&former.id);
            }
        }
        if let Some(ping) = ping {
            if ping.leave && seen == Seen::Newest && session.rest.is_some() {
                self.forget(conn);
                return None;
            }
            let (kind, what) = match session.rest.as_ref().and_then(|rest| rest.called) {
                Some(why) => (Kind::Call, Call { nonce: Some(ping.nonce), why }.to_bytes()),
                None => (Kind::Pong, what),
            };
            let udp = session.udp_mut(head.session)?;
            let sealer = udp.keys.sealer();
            return udp.seal(&sealer, kind, what, datagram).then_some(from);
        }
        let (dst, src) = (DeviceId::from_bytes(what), session.device);
        let to = match batch.route {
            Some((by, same, to)) if (by, same) == (conn, dst) => to,
            _ => self.route(conn, now.boot, dst, &datagram[UDP_HEADER..])?,
        };
        batch.route = Some((conn, dst, to));
        let Some(Conn { state: State::Session(session), .. }) = self.conns.get_mut(&to) else {
            batch.route = None;
            return None;
        };
        if !session.carries(now.boot) {
            self.counters.drop(DropReason::Suspended, 1);
            return None;
        }
        let Some((udp, path)) = session.udp_path(now.boot) else {
            self.deliver(to, src, &datagram[UDP_HEADER..]);
            return None;
        };
        if batch.to.as_ref().is_none_or(|(session, _)| *session != udp.id) {
            batch.to = Some((udp.id, udp.keys.sealer()));
        }
        let (_, sealer) = batch.to.as_ref()?;
        let sealed = udp.seal(sealer, Kind::Recv, src.to_bytes(), datagram);
        self.counters.forward(datagram.len() - UDP_HEADER, true);
        sealed.then_some(path)
    }

    /// Sends a packet as a datagram if `to` takes them; `None` if it doesn't.
    pub(super) fn deliver_udp(
        &mut self,
        now: Instant,
        to: ConnId,
        src: DeviceId,
        payload: &[u8],
    ) -> Option<()> {
        let (udp, path) = self.session_mut(to)?.udp_path(now)?;
        if UDP_HEADER + payload.len() > FULL_UDP_DATAGRAM {
            return None; // not known to pass
        }
        let mut datagram = Vec::with_capacity(UDP_HEADER + payload.len());
        datagram.resize(UDP_HEADER, 0);
        datagram.extend_from_slice(payload);
        let sealer = udp.keys.sealer();
        if udp.seal(&sealer, Kind::Recv, src.to_bytes(), &mut datagram) {
            self.datagrams.push_back((path, datagram));
            self.counters.forward(payload.len(), true);
        }
        Some(())
    }
}
