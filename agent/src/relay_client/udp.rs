//! Plain UDP beside a connection: the socket, and the packets through it.

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};
use socket2::{Protocol, SockRef, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::time::sleep;
use warren_common::ids::DeviceId;
use warren_common::wire::relay::udp::{Call, FULL_UDP_DATAGRAM, Head, Kind, Ping, UDP_HEADER, UdpKeys};
use warren_common::wire::relay::{Class, DATA_HEADER, Frame, QueuedFrame};
use warren_engine::offload::Ecn;
use warren_engine::relay_link::{UdpAction, UdpWay};

use super::link::{Footing, Transport};
use super::task::Signs;
use super::{RelayEventKind, Shared, micros, rest};
use crate::clock;
use crate::egress::marked;
use crate::os::udp::send::Sender;

/// Kernel buffer asked for in each direction, in bytes: 20 ms at 1 Gbit/s. The kernel may give less.
const BUFFER: usize = 2 << 20;
/// Bytes of one receive buffer: a GRO batch is at most one IP packet's length.
const SLOT: usize = 65_536;
/// Receive buffers of one call.
const SLOTS: usize = 4;
/// Most bytes of one send: what fits into one IP packet.
const MAX_BATCH: usize = 65_000;

/// The UDP side of one session.
pub(super) struct UdpLink {
    socket: UdpSocket,
    state: UdpSocketState,
    sender: Sender,
    relay: SocketAddr,
    keys: UdpKeys,
    session: u64,
    next: AtomicU64,
    way: Mutex<UdpWay>,
    up: AtomicBool,
    wake: Notify,
}

impl UdpLink {
    pub(super) fn open(relay: SocketAddr, mark: u32, keys: UdpKeys, session: u64) -> io::Result<Self> {
        let socket = marked(relay, Type::DGRAM, Protocol::UDP, mark)?;
        let any: SocketAddr = match relay {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        // Not connected: it survives a change of our address.
        socket.bind(&any.into())?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // Smaller buffers than asked for only cost throughput.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), BUFFER);
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), BUFFER);
        Ok(Self {
            socket: UdpSocket::from_std(socket.into())?,
            sender: Sender::new(state.max_gso_segments()),
            state,
            relay,
            keys,
            session,
            next: AtomicU64::new(0),
            way: Mutex::new(UdpWay::new(clock::now().boot)),
            up: AtomicBool::new(false),
            wake: Notify::new(),
        })
    }

    /// Packets go this way.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// What it takes: a way to the relay, from whatever address.
    pub(super) const fn footing(&self) -> Footing {
        Footing::unbound(self.relay)
    }

    pub(super) fn network_changed(&self) {
        self.way().on_network_change(clock::now().boot);
        self.wake.notify_one();
    }

    /// Sends what may go over UDP, in batches of equal length, and leaves the rest in `batch`.
    pub(super) fn send(&self, batch: &mut Vec<QueuedFrame>, buffer: &mut Vec<u8>) {
        let (sealer, mut segment, mut sent) = (self.keys.sealer(), 0, false);
        batch.retain(|frame| {
            let Some((dst, payload)) = packet(frame) else { return true };
            let len = UDP_HEADER + payload.len();
            let full = buffer.len() + len > MAX_BATCH || buffer.len() >= segment * self.sender.most();
            // Only the last of a batch may be shorter.
            if !buffer.is_empty() && (full || len > segment || !buffer.len().is_multiple_of(segment)) {
                self.flush(buffer, segment);
            }
            if buffer.is_empty() {
                segment = len;
            }
            let start = buffer.len();
            buffer.resize(start + UDP_HEADER, 0);
            buffer.extend_from_slice(payload);
            let counter = self.next.fetch_add(1, Ordering::Relaxed);
            let head = Head { kind: Kind::Send, session: self.session, counter };
            sent |= sealer.seal(head, dst.to_bytes(), &mut buffer[start..]);
            false
        });
        self.flush(buffer, segment);
        if sent && self.way().on_sent(clock::now().boot) {
            self.wake.notify_one();
        }
    }

    fn flush(&self, buffer: &mut Vec<u8>, segment: usize) {
        if !buffer.is_empty() {
            self.transmit(buffer, Some(segment));
        }
        buffer.clear();
    }

    /// What the kernel has no room for is lost, as on any link.
    fn transmit(&self, contents: &[u8], segment: Option<usize>) {
        let sent =
            self.sender.send(&SockRef::from(&self.socket), self.relay, Ecn::NotCapable, contents, segment);
        if let Err(e) = sent {
            tracing::trace!("send to the relay at {}: {e}", self.relay);
        }
    }

    fn way(&self) -> MutexGuard<'_, UdpWay> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives, pings, and says whether packets go this way, for as long as the session lasts.
    pub(super) async fn run(&self, shared: &Shared, events: &super::Events, signs: &Signs) {
        let mut memory = vec![0; SLOT * SLOTS].into_boxed_slice();
        let mut keepalive = shared.keepalive.subscribe();
        loop {
            self.way().set_keepalive(*keepalive.borrow_and_update());
            self.act(shared, events, signs).await;
            let due = self.way().deadline();
            tokio::select! {
                biased;
                ready = self.socket.readable() => {
                    if ready.is_err() {
                        return std::future::pending().await; // the runtime shuts down
                    }
                    self.receive(&mut memory, shared, events, signs).await;
                    self.way().handle_timeout(clock::now().boot);
                }
                () = sleep(due.since(clock::now().boot)) => self.way().handle_timeout(clock::now().boot),
                () = self.wake.notified() => {}
                Ok(()) = keepalive.changed() => {}
            }
        }
    }

    async fn act(&self, shared: &Shared, events: &super::Events, signs: &Signs) {
        loop {
            let Some(action) = self.way().poll() else { return };
            match action {
                UdpAction::Ping { full, settle } => {
                    self.ping(full, settle);
                    if !full {
                        signs.suspect.notify_one(); // is it UDP or the relay?
                    }
                    if let Some(rest) = &signs.rest
                        && self.way().is_in_doubt()
                    {
                        rest.doubt.notify_one();
                    }
                }
                UdpAction::Up => {
                    self.up.store(true, Ordering::Release);
                    shared.set_udp(true);
                    events.send(RelayEventKind::Moved { transport: Transport::Udp }).await;
                }
                UdpAction::Down => {
                    self.up.store(false, Ordering::Release);
                    shared.set_udp(false);
                    if let Some(rest) = &signs.rest {
                        rest.dead.notify_one();
                        continue; // there is no connection to tell the relay by, nor to take instead
                    }
                    let counter = self.next.load(Ordering::Relaxed);
                    shared.push(Class::Control, &Frame::UdpLost { counter });
                    if let Some(transport) = shared.transport() {
                        events.send(RelayEventKind::Moved { transport }).await;
                    }
                }
            }
        }
    }

    /// Tells the relay that the device goes. It has no other way to, while its session rests.
    pub(super) fn leave(&self) {
        self.send_ping(false, Ping { nonce: micros(), settle: false, leave: true });
    }

    fn ping(&self, full: bool, settle: bool) {
        self.send_ping(full, Ping { nonce: micros(), settle, leave: false });
    }

    fn send_ping(&self, full: bool, ping: Ping) {
        let mut datagram = vec![0; if full { FULL_UDP_DATAGRAM } else { UDP_HEADER }];
        let counter = self.next.fetch_add(1, Ordering::Relaxed);
        let head = Head { kind: Kind::Ping, session: self.session, counter };
        if self.keys.sealer().seal(head, ping.to_bytes(), &mut datagram) {
            self.transmit(&datagram, None); // the next one follows
        }
    }

    fn on_pong(&self, nonce: u64, len: usize, shared: &Shared) {
        let micros = micros().saturating_sub(nonce);
        shared.rtt.store(micros, Ordering::Relaxed);
        self.way().on_pong(clock::now().boot, len == FULL_UDP_DATAGRAM, Duration::from_micros(micros));
    }

    async fn receive(&self, memory: &mut [u8], shared: &Shared, events: &super::Events, signs: &Signs) {
        let mut meta = [RecvMeta::default(); SLOTS];
        let received = {
            let mut chunks = memory.chunks_exact_mut(SLOT);
            let mut slots: [IoSliceMut<'_>; SLOTS] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            self.socket.try_io(Interest::READABLE, || {
                self.state.recv(UdpSockRef::from(&self.socket), &mut slots, &mut meta)
            })
        };
        let Ok(count) = received else { return }; // nothing there, or an ICMP error about something sent earlier
        let (opener, mut packets) = (self.keys.opener(), false);
        for (slot, meta) in memory.chunks_exact(SLOT).zip(&meta[..count]) {
            for datagram in slot[..meta.len].chunks(meta.stride.max(1)) {
                let Some(head) = Head::peek(datagram).filter(|h| h.session == self.session) else { continue };
                let Some(what) = opener.open(datagram) else { continue };
                match head.kind {
                    Kind::Recv => {
                        packets = true;
                        self.way().on_heard();
                        let (src, payload) = (DeviceId::from_bytes(what), &datagram[UDP_HEADER..]);
                        let payload = Bytes::copy_from_slice(payload);
                        signs.pass_on(events, RelayEventKind::Received { src, payload }).await;
                    }
                    Kind::Pong => self.on_pong(Ping::from_bytes(&what).nonce, datagram.len(), shared),
                    Kind::Call => {
                        let call = Call::from_bytes(&what);
                        if let Some(nonce) = call.nonce {
                            self.on_pong(nonce, datagram.len(), shared);
                        }
                        if let Some(rest) = &signs.rest {
                            rest::on_call(call, events, rest).await;
                        }
                    }
                    Kind::Send | Kind::Ping => {} // ours, reflected: it does not even open
                }
            }
        }
        if packets {
            signs.mark_active();
        }
    }
}

/// Takes packets that still come over `udp`, for a session that has another: nothing is asked of it, and its end tells nobody.
pub(super) async fn lend(udp: &UdpLink, shared: &Shared, events: &super::Events, signs: &Signs) {
    let mut memory = vec![0; SLOT * SLOTS].into_boxed_slice();
    while udp.socket.readable().await.is_ok() {
        udp.receive(&mut memory, shared, events, signs).await;
    }
}

/// Destination and payload of a frame that may go over UDP.
fn packet(frame: &QueuedFrame) -> Option<(DeviceId, &[u8])> {
    if frame.class == Class::Control || frame.bytes.len() - DATA_HEADER + UDP_HEADER > FULL_UDP_DATAGRAM {
        return None;
    }
    match Frame::decode(&frame.bytes) {
        Ok(Some(Frame::Send { dst, payload })) => Some((dst, payload)),
        _ => None,
    }
}
