//! The UDP port that QUIC and plain UDP share.
//!
//! One task reads the socket, in batches where the kernel gives them. Plain datagrams go through the core and out again
//! at once, from the memory they came in; QUIC's are handed to quinn by a bounded queue. Both write to the socket
//! themselves: what it has no room for is lost, as on any full link.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use warren_common::wire::relay::udp::is_plain;

use super::Shared;
use super::turn::Pause;
use crate::core::{UdpPath, UdpSend};

/// Bytes of one receive buffer: a GRO batch is at most one IP packet's length.
const SLOT: usize = 65_536;
/// Receive buffers of one call: 1 MiB in all, of which a quiet relay touches the first pages.
const SLOTS: usize = 16;
/// Receive calls before other tasks get their turn.
const BUDGET: usize = 8;
/// QUIC's datagrams that wait for quinn, in bytes: some 20 ms at 1 Gbit/s. More are dropped, as by a full socket.
const MAX_QUIC_BYTES: usize = 2 << 20;
/// Most of them that quinn gets in one turn: it opens all that it has at once, and plain datagrams wait meanwhile.
const QUIC_TURN: usize = 32;
/// What one of them costs beside its bytes.
const OVERHEAD: usize = 64;

/// The socket, and what waits for quinn.
pub(super) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
    quic: Mutex<Quic>,
    /// QUIC's datagrams that found no room.
    quic_full: AtomicU64,
    /// Datagrams that the socket did not take.
    unsent: AtomicU64,
}

#[derive(Default)]
struct Quic {
    waiting: VecDeque<(RecvMeta, Box<[u8]>)>,
    bytes: usize,
    waker: Option<Waker>,
    /// Given since the last pause.
    given: usize,
    pause: Pause,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Socket")
    }
}

impl Socket {
    pub(super) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self {
            io: UdpSocket::from_std(socket)?,
            state,
            quic: Mutex::default(),
            quic_full: AtomicU64::new(0),
            unsent: AtomicU64::new(0),
        })
    }

    /// Datagrams lost here: on their way to quinn, and on their way out.
    pub(super) fn lost(&self) -> (u64, u64) {
        (self.quic_full.load(Ordering::Relaxed), self.unsent.load(Ordering::Relaxed))
    }

    fn quic(&self) -> MutexGuard<'_, Quic> {
        self.quic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends one datagram, or several of `segment` bytes.
    pub(super) fn send(&self, to: UdpPath, contents: &[u8], segment: usize) {
        let most = segment.max(1) * self.state.max_gso_segments().max(1);
        for batch in contents.chunks(most) {
            if self.send_batch(to, batch, (batch.len() > segment).then_some(segment)).is_ok() {
                continue;
            }
            // No room, or the kernel can't segment here (quinn-udp notices): what can go out alone does.
            let lost = batch.chunks(segment.max(1)).filter(|one| self.send_batch(to, one, None).is_err());
            self.unsent.fetch_add(lost.count() as u64, Ordering::Relaxed);
        }
    }

    fn send_batch(&self, to: UdpPath, contents: &[u8], segment_size: Option<usize>) -> io::Result<()> {
        let transmit =
            Transmit { destination: to.remote, ecn: None, contents, segment_size, src_ip: to.local };
        // Straight to the kernel: there is nothing to wait for, since what has no room is dropped.
        self.state.try_send((&self.io).into(), &transmit)
    }

    /// Hands a buffer with datagrams of QUIC's to quinn.
    fn give_quic(&self, meta: RecvMeta, bytes: &[u8]) {
        let mut quic = self.quic();
        if quic.bytes + bytes.len() + OVERHEAD > MAX_QUIC_BYTES {
            self.quic_full.fetch_add((bytes.len() / meta.stride.max(1)).max(1) as u64, Ordering::Relaxed);
            return;
        }
        quic.bytes += bytes.len() + OVERHEAD;
        quic.waiting.push_back((meta, bytes.into()));
        if let Some(waker) = quic.waker.take() {
            waker.wake();
        }
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), transmit))
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut quic = self.quic();
        if quic.given >= QUIC_TURN {
            quic.given = 0;
            quic.pause.begin();
        }
        ready!(quic.pause.poll(cx));
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta.iter_mut()) {
            if quic.given >= QUIC_TURN {
                break;
            }
            let Some((got, bytes)) = quic.waiting.pop_front() else { break };
            quic.given += bytes.len().div_ceil(got.stride.max(1));
            quic.bytes -= bytes.len() + OVERHEAD;
            let len = bytes.len().min(buf.len()); // quinn's buffers hold a whole GRO batch
            buf[..len].copy_from_slice(&bytes[..len]);
            *meta = RecvMeta { len, ..got };
            count += 1;
        }
        if count == 0 {
            quic.waker = Some(cx.waker().clone());
            quic.given = 0;
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room in the socket, for one connection. Each has a waiting of its own: the socket's `poll_send_ready` would
/// wake only who asked last.
struct Poller {
    socket: Arc<Socket>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl std::fmt::Debug for Poller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Poller")
    }
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { socket, waiting } = &mut *self;
        let waiting = waiting.get_or_insert_with(|| {
            let socket = socket.clone();
            Box::pin(async move { socket.io.writable().await })
        });
        let ready = waiting.as_mut().poll(cx);
        if ready.is_ready() {
            self.waiting = None;
        }
        ready
    }
}

/// Reads the socket for good: the connections say goodbye through it.
pub(super) async fn serve(shared: Arc<Shared>, socket: Arc<Socket>) {
    let mut memory = vec![0; SLOT * SLOTS].into_boxed_slice();
    let mut sends = Vec::new();
    while socket.io.readable().await.is_ok() {
        if (0..BUDGET).all(|_| receive(&shared, &socket, &mut memory, &mut sends)) {
            tokio::task::yield_now().await; // else the next wait is one
        }
    }
}

/// Takes what is there and passes it on; false if there may be no more.
fn receive(shared: &Shared, socket: &Socket, memory: &mut [u8], sends: &mut Vec<(usize, UdpSend)>) -> bool {
    let mut meta = [RecvMeta::default(); SLOTS];
    let mut count = 0;
    let received = {
        let mut chunks = memory.chunks_exact_mut(SLOT);
        let mut slots: [IoSliceMut<'_>; SLOTS] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        socket.io.try_io(Interest::READABLE, || {
            count = socket.state.recv((&socket.io).into(), &mut slots, &mut meta)?;
            // Fewer than there was room for: the runtime may wait for the next ones without another call.
            if count < SLOTS { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        })
    };
    let more = match received {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(_) => return true, // an ICMP error about something sent earlier
    };
    let parts =
        || memory.chunks_exact(SLOT).zip(&meta[..count]).map(|(slot, meta)| (&slot[..meta.len], meta));
    for (bytes, meta) in parts().filter(|(bytes, _)| !is_plain(bytes)) {
        socket.give_quic(*meta, bytes);
    }
    if parts().any(|(bytes, _)| is_plain(bytes)) {
        let mut one = Vec::new();
        shared.with(|relay, now| {
            for (at, (slot, meta)) in memory.chunks_exact_mut(SLOT).zip(&meta[..count]).enumerate() {
                let bytes = &mut slot[..meta.len];
                if is_plain(bytes) {
                    let from = UdpPath { remote: meta.addr, local: meta.dst_ip };
                    relay.handle_udp(now, from, bytes, meta.stride, &mut one);
                    sends.extend(one.drain(..).map(|send| (at, send)));
                }
            }
        });
        for (at, send) in sends.drain(..) {
            let from = at * SLOT;
            socket.send(send.to, &memory[from + send.range.start..from + send.range.end], send.segment);
        }
    }
    more
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::Ipv4Addr;
    use std::sync::atomic::AtomicUsize;

    use tokio::task::{JoinSet, yield_now};

    use super::*;

    /// What quinn is given for one question.
    async fn given(socket: &Socket) -> usize {
        let mut memory = [[0; 8]; 8];
        let mut bufs = memory.each_mut().map(|buf| IoSliceMut::new(buf));
        let mut meta = [RecvMeta::default(); 8];
        poll_fn(|cx| socket.poll_recv(cx, &mut bufs, &mut meta)).await.unwrap()
    }

    #[tokio::test]
    async fn others_have_their_turn_between_those_of_quinn() {
        let socket = Socket::new(std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).unwrap();
        for n in 0..3 * QUIC_TURN {
            socket.give_quic(RecvMeta { len: 1, stride: 1, ..RecvMeta::default() }, &[n as u8]);
        }
        let turns = Arc::new(AtomicUsize::new(0));
        let (mut others, counted) = (JoinSet::new(), turns.clone());
        others.spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                yield_now().await;
            }
        });
        for turn in 0..3 {
            let (mut total, mut others) = (0, Vec::new());
            while total < QUIC_TURN {
                total += given(&socket).await;
                others.push(turns.load(Ordering::Relaxed));
            }
            assert_eq!(total, QUIC_TURN);
            assert!(others.iter().all(|seen| *seen == others[0]), "one turn: {others:?}");
            assert!(turn == 0 || others[0] > 0, "a pause before turn {turn}");
            turns.store(0, Ordering::Relaxed);
        }
    }
}
