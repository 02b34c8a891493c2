//! Packets between the host and the engine: from the TUN and the sockets in, and what the engine has to say out again.
//!
//! A [`DataPlane`] holds the sockets and all memory that packets need, so that none is allocated for them. Whoever owns
//! the engine waits for readiness and calls one `from_…` method, then [`DataPlane::drain`].

use std::io::{self, ErrorKind};
use std::task::Poll;

use rand_core::RngCore as _;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::time::Now;
use warren_engine::engine::Engine;
use warren_engine::io::{Destination, Outbox, Source, TunOffload, TunOut};
use warren_engine::offload::vnet::HEADER_LEN;
use warren_engine::queue::{TunQueue, Waited};

use crate::entropy::OsEntropy;
use crate::os::Offloads;
use crate::os::tun::{self, QUEUE_LEN, Tun};
use crate::os::udp::{ReceiveBuffer, Udp};

/// Frames read from the TUN in one turn: all that its own queue can hold.
const READ_BUDGET: usize = QUEUE_LEN as usize;
/// Frames sealed in one turn, so that the sockets and timers get theirs.
const SEAL_BUDGET: usize = 128;
/// Extra sockets at once, a count: one that measures the NAT, and those of one search for a port.
pub const MAX_EXTRA_SOCKETS: usize = 129;
/// Bytes sealed in one turn: two super-frames, an eighth of a millisecond's work.
const SEAL_BUDGET_BYTES: usize = 2 * 65_536;
/// Receive calls on one socket in one turn.
const UDP_BUDGET: usize = 4;
/// Received bytes after which a turn ends.
const UDP_BUDGET_BYTES: usize = 2 * 65_536;
/// Sealed bytes that are sent before more are made: about one full batch, which is still in the cache then.
const SEND_AT: usize = 48 * 1_024;

/// What carries sealed packets to peers that are not reached directly.
pub trait RelayLinks {
    /// Hands a sealed packet for `device` to `relay`; without a connection it is dropped, as the engine was told.
    fn send(&mut self, now: Now, relay: RelayId, device: DeviceId, packet: &[u8]);
}

/// None of them.
#[derive(Clone, Copy, Debug)]
pub struct NoRelays;

impl RelayLinks for NoRelays {
    fn send(&mut self, _: Now, _: RelayId, _: DeviceId, _: &[u8]) {}
}

/// See the module.
#[derive(Debug)]
pub struct DataPlane {
    sockets: Vec<Udp>,
    /// Sockets on ports of their own that the engine asked for, for a while.
    extra: Vec<Udp>,
    waiting: TunQueue,
    receive: ReceiveBuffer,
    outbox: Outbox,
    tun_out: TunOut,
    /// The kernel refused a super-frame that its TUN said it takes.
    refused: bool,
}

impl DataPlane {
    /// Memory for packets through `sockets`, of which there are one or two.
    pub fn new(sockets: Vec<Udp>) -> Self {
        Self {
            sockets,
            extra: Vec::new(),
            waiting: TunQueue::new([OsEntropy.next_u64(), OsEntropy.next_u64()]),
            receive: ReceiveBuffer::default(),
            outbox: Outbox::new(),
            tun_out: TunOut::default(),
            refused: false,
        }
    }

    /// Prepares for a TUN that was just opened.
    pub fn attach(&mut self, tun: &Tun) {
        self.refused = false;
        self.extra.clear();
        self.tun_out = arena(tun, tun.offload());
        self.waiting.clear();
        self.outbox.clear();
    }

    /// What of the kernel's help is in use now: with a TUN, if there is one.
    pub fn offloads(&self, tun: Option<&Tun>) -> Offloads {
        let offload = tun.map(Tun::offload).unwrap_or_default();
        Offloads {
            tun: offload.tcp && !self.refused,
            tun_udp: offload.udp && !self.refused,
            udp_send: self.sockets.iter().all(Udp::joins_sends),
            udp_receive: self.sockets.iter().all(Udp::joins_receives),
        }
    }

    /// The sockets.
    pub fn sockets(&self) -> &[Udp] {
        &self.sockets
    }

    /// Has exactly the extra IPv4 sockets of these numbers open, at most [`MAX_EXTRA_SOCKETS`]. Returns which are: fewer if
    /// the host has no more.
    pub fn set_extra(&mut self, ids: &[u8]) -> Vec<u8> {
        self.extra.retain(|socket| ids.contains(&socket.id()));
        for id in ids.iter().take(MAX_EXTRA_SOCKETS) {
            if self.extra.iter().any(|socket| socket.id() == *id) {
                continue;
            }
            match Udp::extra(*id) {
                Ok(socket) => self.extra.push(socket),
                Err(e) => {
                    tracing::debug!("no extra socket: {e}");
                    break;
                }
            }
        }
        self.extra.iter().map(Udp::id).collect()
    }

    /// Waits until a socket is readable and says which. Cancel safe.
    pub async fn readable(&self) -> usize {
        tokio::select! {
            index = self.usual_readable() => index,
            index = self.extra_readable(), if !self.extra.is_empty() => self.sockets.len() + index,
        }
    }

    async fn extra_readable(&self) -> usize {
        std::future::poll_fn(|cx| {
            match self.extra.iter().position(|socket| socket.poll_readable(cx).is_ready()) {
                Some(index) => Poll::Ready(index),
                None => Poll::Pending,
            }
        })
        .await
    }

    async fn usual_readable(&self) -> usize {
        match self.sockets.as_slice() {
            [one] => {
                // An error means that the runtime is shutting down; the receive call then says so.
                let _ = one.readable().await;
                0
            }
            [one, two, ..] => tokio::select! {
                _ = one.readable() => 0,
                _ = two.readable() => 1,
            },
            [] => std::future::pending().await,
        }
    }

    /// True if frames from the TUN wait for their turn, so that [`from_tun`](Self::from_tun) has something to do.
    pub const fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// What the queue of frames from the TUN dropped, and how often it told a flow to slow down.
    pub const fn queue_counts(&self) -> (u64, u64) {
        (self.waiting.dropped(), self.waiting.told())
    }

    /// Takes what the host sends: empties the TUN's queue, and seals some of what waits.
    ///
    /// # Errors
    /// The TUN is gone.
    pub fn from_tun(
        &mut self,
        now: Now,
        tun: &Tun,
        engine: &mut Engine,
        relays: &mut impl RelayLinks,
    ) -> io::Result<()> {
        self.read_tun(tun, Tun::receive)?;
        self.seal_waiting(now, tun, engine, relays);
        Ok(())
    }

    /// Moves what is in the TUN's queue to ours.
    fn read_tun(&mut self, tun: &Tun, read: impl Fn(&Tun, &mut [u8]) -> io::Result<usize>) -> io::Result<()> {
        let packet_at = if tun.has_virtio_headers() { HEADER_LEN } else { 0 };
        for _ in 0..READ_BUDGET {
            match read(tun, self.waiting.space()) {
                Ok(len) => self.waiting.commit(len, packet_at),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn seal_waiting(&mut self, now: Now, tun: &Tun, engine: &mut Engine, relays: &mut impl RelayLinks) {
        let mut bytes = 0;
        for _ in 0..SEAL_BUDGET {
            if bytes >= SEAL_BUDGET_BYTES {
                break;
            }
            let Some(Waited { frame, tell }) = self.waiting.pop(now.boot) else { break };
            bytes += frame.len();
            if tun.has_virtio_headers() {
                engine.handle_tun_frame(now, frame, tell, &mut self.outbox);
            } else {
                engine.handle_tun(now, frame, &mut self.outbox);
            }
            if self.outbox.bytes() >= SEND_AT {
                // A batch that is not full waits for the next frame, if there is one.
                let keep_last =
                    !self.waiting.is_empty() && self.outbox.is_last_open() && self.outbox.len() > 1;
                self.send(now, relays, keep_last);
            }
        }
        // What is left goes now, or with the next turn if that comes at once.
        let keep_last = !self.waiting.is_empty() && self.outbox.is_last_open();
        self.send(now, relays, keep_last);
    }

    /// Takes what came to socket `index`, and what the host answers at once. Without an engine what strangers send is
    /// read and forgotten.
    pub fn from_udp(
        &mut self,
        now: Now,
        index: usize,
        mut engine: Option<&mut Engine>,
        tun: Option<&Tun>,
        relays: &mut impl RelayLinks,
    ) {
        let Self { sockets, extra, receive, tun_out, refused, .. } = self;
        let Some(socket) = sockets.iter().chain(extra.iter()).nth(index) else { return };
        let id = socket.id();
        let mut taken = 0;
        for _ in 0..UDP_BUDGET {
            if taken >= UDP_BUDGET_BYTES {
                break;
            }
            let received = socket.receive(receive, now, |remote, bytes, arrival| {
                taken += bytes.len();
                let Some(engine) = engine.as_deref_mut() else { return };
                engine.handle_datagrams(now, Source::Direct { socket: id, remote }, arrival, bytes, tun_out);
                deliver(tun_out, tun, refused);
            });
            match received {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // An ICMP error about something sent earlier: the paths find out by themselves.
                Err(e) => tracing::trace!("receive: {e}"),
            }
        }
        // TCP acknowledges while it takes a frame: the answer is there before the runtime can tell.
        if taken > 0
            && let (Some(engine), Some(tun)) = (engine, tun)
            && self.read_tun(tun, Tun::receive_now).is_ok()
        {
            self.seal_waiting(now, tun, engine, relays);
        }
    }

    /// Takes one datagram that came through a relay or the coordinator.
    pub fn from_elsewhere(
        &mut self,
        now: Now,
        from: Source,
        datagram: &mut [u8],
        engine: &mut Engine,
        tun: Option<&Tun>,
    ) {
        engine.handle_datagram(now, from, datagram, 0, &mut self.tun_out);
        deliver(&mut self.tun_out, tun, &mut self.refused);
    }

    /// Empties the engine's outputs of packets.
    pub fn drain(&mut self, now: Now, engine: &mut Engine, tun: Option<&Tun>, relays: &mut impl RelayLinks) {
        loop {
            let more = engine.poll_transmit(now, &mut self.outbox);
            let keep_last = !more && !self.waiting.is_empty() && self.outbox.is_last_open();
            self.send(now, relays, keep_last);
            if !more {
                break;
            }
        }
        loop {
            let more = engine.poll_tun(&mut self.tun_out);
            deliver(&mut self.tun_out, tun, &mut self.refused);
            if !more {
                break;
            }
        }
    }

    /// Sends what the engine has sealed, or all of it but the last batch.
    fn send(&mut self, now: Now, relays: &mut impl RelayLinks, keep_last: bool) {
        let count = self.outbox.len() - usize::from(keep_last);
        for (transmit, bytes) in self.outbox.iter().take(count) {
            match transmit.to {
                Destination::Direct { socket, remote } => {
                    let Some(socket) = self.sockets.iter().chain(&self.extra).find(|s| s.id() == socket)
                    else {
                        continue;
                    };
                    let sent = if transmit.whole {
                        socket.send_whole(remote, bytes)
                    } else {
                        socket.send(remote, transmit.ecn, bytes, transmit.segment_size)
                    };
                    if let Err(e) = sent {
                        tracing::trace!("send to {remote}: {e}");
                    }
                }
                Destination::Relay { relay, device } => {
                    let size = transmit.segment_size.unwrap_or(bytes.len()).max(1);
                    bytes.chunks(size).for_each(|packet| relays.send(now, relay, device, packet));
                }
            }
        }
        if keep_last { self.outbox.clear_but_last() } else { self.outbox.clear() }
    }
}

/// Hands plaintext packets to the host; without a TUN they are dropped.
fn deliver(packets: &mut TunOut, tun: Option<&Tun>, refused: &mut bool) {
    let Some(tun) = tun else { return packets.clear() };
    let mut refuses = false;
    for frame in packets.frames() {
        if let Err(e) = tun.send(frame) {
            refuses |= tun::is_refusal(&e);
            tracing::trace!("the TUN does not take a frame: {e}");
        }
    }
    if refuses && !*refused && packets.joins() {
        tracing::warn!("the kernel refuses super-frames: packets go to the TUN one by one from now on");
        *refused = true;
        *packets = arena(tun, TunOffload::default());
    }
    packets.clear();
}

/// Memory for packets that go to `tun`.
fn arena(tun: &Tun, offload: TunOffload) -> TunOut {
    if tun.has_virtio_headers() { TunOut::vectored(offload) } else { TunOut::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    #[tokio::test]
    async fn extra_sockets_are_opened_and_closed_as_asked_and_bounded() {
        let Ok(sockets) = crate::os::udp::bind(None, None, Offloads::ALL) else {
            println!("skipped: no permission for marked sockets");
            return;
        };
        let mut plane = DataPlane::new(sockets);
        assert_eq!(plane.set_extra(&[16, 17]), [16, 17]);
        let port = plane.extra[1].bound().port();
        assert_eq!(plane.set_extra(&[17, 18]), [17, 18]);
        assert_eq!(plane.extra[0].bound().port(), port, "one that stays keeps its port");
        let all: Vec<u8> = (0..=u8::MAX).collect();
        assert!(plane.set_extra(&all).len() <= MAX_EXTRA_SOCKETS);
        let to = std::net::SocketAddr::from(([127, 0, 0, 1], plane.extra[2].bound().port()));
        plane.sockets[0].send(to, warren_engine::offload::Ecn::NotCapable, b"hi", None).unwrap();
        assert_eq!(plane.readable().await, plane.sockets.len() + 2);
        assert!(plane.set_extra(&[]).is_empty());
    }
}
