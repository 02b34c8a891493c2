//! The UDP port that QUIC and plain UDP share.
//!
//! A thread of its own reads the socket, in batches where the kernel gives them. Plain datagrams go through the core and
//! out again at once, from the memory they came in; QUIC's are handed to quinn by a bounded queue. Both write to the
//! socket themselves: of plain datagrams, what it has no room for is lost, as on any full link.
//!
//! Not a task of the runtime: those take their turns, and what a stranger has the runtime do between two looks at the
//! socket (open a TLS record, accept and end a connection) would be in every packet's latency. The thread asks for short
//! turns instead ([`ShortTurns`]), so that it also gets a processor that is busy when there is something to do.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use warren_common::wire::relay::udp::is_plain;

use super::Shared;
use super::turn::Pause;
use crate::core::{UdpPath, UdpSend};
use crate::os::ShortTurns;

/// Bytes of one receive buffer: a GRO batch is at most one IP packet's length.
const SLOT: usize = 65_536;
/// Receive buffers of one call: 1 MiB in all, of which a quiet relay touches the first pages.
const SLOTS: usize = 16;
/// QUIC's datagrams that wait for quinn, in bytes: some 20 ms at 1 Gbit/s. More are dropped, as by a full socket.
const MAX_QUIC_BYTES: usize = 2 << 20;
/// Most of them that quinn gets in one turn: it opens all that it has at once, and other connections wait meanwhile.
const QUIC_TURN: usize = 32;
/// What one of them costs beside its bytes.
const OVERHEAD: usize = 64;
/// When a full socket is tried again that can't be watched.
const ROOM_LOOK: Duration = Duration::from_millis(1);

/// The socket, and what waits for quinn.
pub(super) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
    quic: Mutex<Quic>,
    /// It had no room for a datagram of QUIC's.
    full: AtomicBool,
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
    pub(super) fn new(io: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&io).into())?; // also makes it non-blocking
        Ok(Self {
            io,
            state,
            quic: Mutex::default(),
            full: AtomicBool::new(false),
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
        let sent = self.state.send((&self.io).into(), transmit);
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.full.store(true, Ordering::Relaxed);
        }
        sent
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

/// Waits for room in the socket, for one connection, once it was full. The runtime does not watch the socket otherwise:
/// each datagram that comes or has gone out would wake it.
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
        if waiting.is_none() && !socket.full.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        let waiting = waiting.get_or_insert_with(|| Box::pin(room(socket.clone())));
        let ready = waiting.as_mut().poll(cx);
        if ready.is_ready() {
            self.waiting = None;
        }
        ready
    }
}

/// Returns when the socket has room.
async fn room(socket: Arc<Socket>) -> io::Result<()> {
    match socket.io.try_clone().and_then(tokio::net::UdpSocket::from_std) {
        Ok(watched) => watched.writable().await?,
        // No descriptor left: no reason to end the connection.
        Err(_) => tokio::time::sleep(ROOM_LOOK).await,
    }
    socket.full.store(false, Ordering::Relaxed);
    Ok(())
}

/// The thread that reads the socket. Dropping this ends it, and waits until it has: it holds the port.
#[derive(Debug)]
pub(super) struct Reader {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Reads from here on.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn start(shared: Arc<Shared>, socket: Arc<Socket>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("relay-udp".to_owned()).spawn(move || {
            read(&shared, &socket, &stopped);
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Neither fails: the counter is far from full, and the thread's panic was reported.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Reads the socket until it is told to stop: the connections say goodbye through it.
fn read(shared: &Shared, socket: &Socket, stop: &OwnedFd) {
    let mut memory = vec![0; SLOT * SLOTS].into_boxed_slice();
    let (mut sends, mut turns) = (Vec::new(), ShortTurns::take());
    loop {
        let mut watched = [PollFd::new(&socket.io, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        // An error is a signal that came in between.
        let _ = turns.wait(|| poll(&mut watched, None));
        if !watched[1].revents().is_empty() {
            return;
        }
        // Without this thread the relay would be deaf, and look well.
        let received = catch_unwind(AssertUnwindSafe(|| receive(shared, socket, &mut memory, &mut sends)));
        if received.is_err() {
            tracing::error!("a datagram made the relay panic: it is lost, and this is a defect to report");
            sends.clear();
        }
    }
}

/// Takes what is there, as far as there is memory for it, and passes it on.
fn receive(shared: &Shared, socket: &Socket, memory: &mut [u8], sends: &mut Vec<UdpSend>) {
    let mut meta = [RecvMeta::default(); SLOTS];
    let mut chunks = memory.chunks_exact_mut(SLOT);
    let mut slots: [IoSliceMut<'_>; SLOTS] =
        std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
    // None, or an ICMP error about something sent earlier.
    let Ok(count) = socket.state.recv((&socket.io).into(), &mut slots, &mut meta) else { return };
    for (slot, meta) in memory.chunks_exact_mut(SLOT).zip(&meta[..count]) {
        let bytes = &mut slot[..meta.len];
        if !is_plain(bytes) {
            socket.give_quic(*meta, bytes);
            continue;
        }
        let from = UdpPath { remote: meta.addr, local: meta.dst_ip };
        shared.with(|relay, now| relay.handle_udp(now, from, bytes, meta.stride, sends));
        // At once: what came behind it may be a flood.
        for send in sends.drain(..) {
            socket.send(send.to, &slot[send.range], send.segment);
        }
    }
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
        let socket = Socket::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).unwrap();
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

    #[tokio::test]
    async fn a_connection_waits_for_room_only_after_there_was_none() {
        let socket = Socket::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).unwrap();
        let socket = Arc::new(socket);
        let mut poller = socket.clone().create_io_poller();
        let ready = |poller: &mut Pin<Box<dyn UdpPoller>>, cx: &mut Context<'_>| {
            matches!(poller.as_mut().poll_writable(cx), Poll::Ready(Ok(())))
        };
        assert!(poll_fn(|cx| Poll::Ready(ready(&mut poller, cx))).await);
        socket.full.store(true, Ordering::Relaxed);
        // The runtime has not looked at the socket yet.
        assert!(!poll_fn(|cx| Poll::Ready(ready(&mut poller, cx))).await);
        poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();
        assert!(!socket.full.load(Ordering::Relaxed));
    }
}
