//! One load for all servers: packets of one length at a rate, and how many of them arrive.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use tokio::runtime::Runtime;
use warren_common::wire::relay::udp::{Head, Kind, Ping, UDP_HEADER, UdpKeys};

use super::device::{Device, Transport, endpoint};
use super::server::{RelayAt, device};
use super::turn::Allocation;

/// What was sent, and what arrived.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    /// Packets sent.
    pub sent: u64,
    /// Packets that arrived.
    pub arrived: u64,
    /// From the first packet until the last was sent, in seconds.
    pub seconds: f64,
}

impl Counted {
    /// Packets per second that arrived.
    pub fn rate(&self) -> f64 {
        self.arrived as f64 / self.seconds.max(0.001)
    }
}

/// A way through a server for packets of one length.
pub trait Way {
    /// Sends at `rate` packets a second (as many as possible if that is infinite) for `span`, and counts what arrives.
    ///
    /// # Errors
    /// The way is gone.
    fn run(&mut self, rate: f64, span: Duration) -> Result<Counted>;
}

/// The device whose packets' latency is measured; the one before it sends them.
pub const MEASURED: u32 = 902;
/// Without a packet for so long, no more come.
const QUIET: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(5);
/// Kernel buffer asked for in each direction, in bytes.
const BUFFER: usize = 4 << 20;
/// Calls to send before what has arrived is looked at.
const TURN: u64 = 16;

/// A socket that sends and receives many datagrams at once.
struct Datagrams {
    socket: UdpSocket,
    state: UdpSocketState,
    memory: Box<[u8]>,
}

/// Receive buffers of one call, and their length.
const SLOTS: usize = 16;
const SLOT: usize = 65_536;

impl Datagrams {
    fn new(socket: UdpSocket) -> Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?; // also makes it non-blocking
        // The system's bound may be lower.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), BUFFER);
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), BUFFER);
        Ok(Self { socket, state, memory: vec![0; SLOT * SLOTS].into() })
    }

    /// Sends `contents`, datagrams of `segment` bytes; false if there was no room.
    fn send(&self, to: SocketAddr, contents: &[u8], segment: usize) -> Result<bool> {
        let segment_size = (contents.len() > segment).then_some(segment);
        let transmit = Transmit { destination: to, ecn: None, contents, segment_size, src_ip: None };
        match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("sending"),
        }
    }

    /// What has come: calls `each` with every datagram, and when the kernel had it, by the time of day.
    fn receive(&mut self, mut each: impl FnMut(&[u8], Option<Duration>)) -> Result<u64> {
        let mut meta = [RecvMeta::default(); SLOTS];
        let mut chunks = self.memory.chunks_exact_mut(SLOT);
        let mut slots: [IoSliceMut<'_>; SLOTS] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        let count = match self.state.recv(UdpSockRef::from(&self.socket), &mut slots, &mut meta) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error).context("receiving"),
        };
        let mut datagrams = 0;
        for (slot, meta) in self.memory.chunks_exact(SLOT).zip(&meta[..count]) {
            for datagram in slot[..meta.len].chunks(meta.stride.max(1)) {
                datagrams += 1;
                each(datagram, meta.timestamp);
            }
        }
        Ok(datagrams)
    }
}

/// Runs `send` (which says how many packets went) and `receive` by turns.
fn by_turns(
    rate: f64,
    span: Duration,
    mut send: impl FnMut() -> Result<u64>,
    mut receive: impl FnMut() -> Result<u64>,
) -> Result<Counted> {
    let (began, mut counted) = (now(), Counted::default());
    while began.elapsed() < span {
        for _ in 0..TURN {
            if counted.sent as f64 > began.elapsed().as_secs_f64() * rate {
                break;
            }
            counted.sent += send()?;
        }
        counted.arrived += receive()?;
    }
    counted.seconds = began.elapsed().as_secs_f64();
    let mut last = now();
    while last.elapsed() < QUIET {
        let arrived = receive()?;
        counted.arrived += arrived;
        if arrived > 0 {
            last = now();
        }
    }
    Ok(counted)
}

/// A plain UDP session of a device with our relay.
pub struct PlainUdp {
    datagrams: Datagrams,
    relay: SocketAddr,
    keys: UdpKeys,
    session: u64,
    next: u64,
    buffer: Vec<u8>,
    /// The session lives as long as this connection.
    _connection: Device,
}

impl std::fmt::Debug for PlainUdp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PlainUdp")
    }
}

impl PlainUdp {
    /// A session of device `n`, which may send to `peers`; proven, so that the relay uses it.
    ///
    /// # Errors
    /// The relay won't have it.
    pub async fn new(relay: RelayAt, ends: &quinn::Endpoint, n: u32, peers: &[u32]) -> Result<Self> {
        let connection = Device::join(relay, Transport::Quic, ends, n, peers).await?;
        let (keys, session) = connection.udp()?;
        let datagrams = Datagrams::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?)?;
        let (relay, next, buffer) = (relay.addr, 0, Vec::new());
        let mut plain = Self { datagrams, relay, keys, session, next, buffer, _connection: connection };
        let began = now();
        while plain.datagrams.receive(|_, _| {})? == 0 {
            ensure!(began.elapsed() < PATIENCE, "no answer over plain UDP");
            plain.ping()?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(plain)
    }

    /// Sends to somebody else from here on.
    pub fn misdirect(&mut self, to: SocketAddr) {
        self.relay = to;
    }

    /// Tells the relay to use the session.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn ping(&mut self) -> Result<()> {
        let what = Ping { nonce: 1, settle: true, leave: false }.to_bytes();
        self.put(Kind::Ping, what, &[], 1)
    }

    /// Sends `count` packets to `to` in one call; false if there was no room.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn send(&mut self, to: u32, payload: &[u8], count: usize) -> Result<()> {
        self.put(Kind::Send, device(to).to_bytes(), payload, count)
    }

    fn put(&mut self, kind: Kind, what: [u8; 16], payload: &[u8], count: usize) -> Result<()> {
        let sealer = self.keys.sealer();
        let len = UDP_HEADER + payload.len();
        self.buffer.clear();
        for _ in 0..count {
            let start = self.buffer.len();
            self.buffer.resize(start + UDP_HEADER, 0);
            self.buffer.extend_from_slice(payload);
            let head = Head { kind, session: self.session, counter: self.next };
            ensure!(sealer.seal(head, what, &mut self.buffer[start..]), "a header");
            self.next += 1;
        }
        while !self.datagrams.send(self.relay, &self.buffer, len)? {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Waits until something has come, at most so long.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn wait(&self, longest: Duration) -> Result<()> {
        let socket = &self.datagrams.socket;
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(longest.max(Duration::from_micros(1))))?;
        let _ = socket.peek_from(&mut [0]); // whichever comes first
        Ok(socket.set_nonblocking(true)?)
    }

    /// Calls `each` with the payload of each packet that has come, and when the kernel had it, by the time of day; how many they were.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn receive(&mut self, mut each: impl FnMut(&[u8], Option<Duration>)) -> Result<u64> {
        let mut packets = 0;
        self.datagrams.receive(|datagram, arrived| {
            if Head::peek(datagram).is_some_and(|head| head.kind == Kind::Recv) {
                packets += 1;
                each(&datagram[UDP_HEADER..], arrived);
            }
        })?;
        Ok(packets)
    }
}

/// From one plain UDP session of our relay to another.
#[derive(Debug)]
pub struct UdpWay {
    from: PlainUdp,
    to: PlainUdp,
    payload: Vec<u8>,
    batch: usize,
}

impl UdpWay {
    /// Packets of `payload` bytes, `batch` of them in each call.
    ///
    /// # Errors
    /// The relay won't have it.
    pub fn new(
        relay: RelayAt,
        runtime: &Runtime,
        ends: &quinn::Endpoint,
        payload: usize,
        batch: usize,
    ) -> Result<Self> {
        let from = runtime.block_on(PlainUdp::new(relay, ends, 1, &[2]))?;
        let to = runtime.block_on(PlainUdp::new(relay, ends, 2, &[1]))?;
        Ok(Self { from, to, payload: vec![7; payload], batch })
    }
}

impl Way for UdpWay {
    fn run(&mut self, rate: f64, span: Duration) -> Result<Counted> {
        self.to.ping()?; // the relay is told where it is again and again, as by a real one
        let Self { from, to, payload, batch } = self;
        by_turns(
            rate,
            span,
            || from.send(2, payload, *batch).map(|()| *batch as u64),
            || to.receive(|_, _| {}),
        )
    }
}

/// Through a channel of a TURN server to a peer that is reached directly.
pub struct TurnWay {
    from: Datagrams,
    server: SocketAddr,
    to: Datagrams,
    message: Vec<u8>,
    contents: Vec<u8>,
    batch: usize,
}

impl std::fmt::Debug for TurnWay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TurnWay")
    }
}

impl TurnWay {
    /// Packets of `payload` bytes, `batch` of them in each call.
    ///
    /// # Errors
    /// The server does not grant it.
    pub fn new(server: SocketAddr, payload: usize, batch: usize) -> Result<Self> {
        let allocation = Allocation::new(server)?;
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        allocation.bind(peer.local_addr()?)?;
        let message = Allocation::message(payload);
        let contents = message.repeat(batch);
        let (from, to) = (Datagrams::new(allocation.socket)?, Datagrams::new(peer)?);
        Ok(Self { from, server, to, message, contents, batch })
    }
}

impl Way for TurnWay {
    fn run(&mut self, rate: f64, span: Duration) -> Result<Counted> {
        let Self { from, server, to, message, contents, batch } = self;
        let send = || {
            while !from.send(*server, contents, message.len())? {
                std::hint::spin_loop();
            }
            Ok(*batch as u64)
        };
        by_turns(rate, span, send, || to.receive(|_, _| {}))
    }
}

/// From one connection of our relay to another.
#[derive(Debug)]
pub struct ConnectionWay<'a> {
    runtime: &'a Runtime,
    from: Device,
    to: Device,
    payload: Vec<u8>,
}

/// How often a paced sender sends.
const TICK: Duration = Duration::from_millis(1);
/// Most packets of one call on a connection: 64 KiB of full ones, as in the agent.
const CALL: u64 = 48;

impl<'a> ConnectionWay<'a> {
    /// Packets of `payload` bytes.
    ///
    /// # Errors
    /// The relay won't have it.
    pub fn new(
        relay: RelayAt,
        runtime: &'a Runtime,
        ends: &quinn::Endpoint,
        transport: Transport,
        payload: usize,
    ) -> Result<Self> {
        let from = runtime.block_on(Device::join(relay, transport, ends, 3, &[4]))?;
        let to = runtime.block_on(Device::join(relay, transport, ends, 4, &[3]))?;
        let payload = vec![7; payload];
        runtime.block_on(from.await_room(&payload))?;
        Ok(Self { runtime, from, to, payload })
    }
}

impl Way for ConnectionWay<'_> {
    fn run(&mut self, rate: f64, span: Duration) -> Result<Counted> {
        let Self { runtime, from, to, payload } = self;
        runtime.block_on(async {
            let began = now();
            let sending = async {
                let mut counted = Counted::default();
                while began.elapsed() < span {
                    let due = began.elapsed().as_secs_f64() * rate - counted.sent as f64;
                    let count = (due.min(CALL as f64)) as u64;
                    if count == 0 {
                        tokio::time::sleep(TICK).await;
                        continue;
                    }
                    from.send(4, payload, count as usize).await?;
                    counted.sent += count;
                    tokio::task::yield_now().await;
                }
                counted.seconds = began.elapsed().as_secs_f64();
                // What is on the way still needs its connection.
                tokio::time::sleep(QUIET).await;
                anyhow::Ok(counted)
            };
            tokio::pin!(sending);
            let (mut arrived, mut sent) = (0, None);
            loop {
                tokio::select! {
                    done = &mut sending, if sent.is_none() => sent = Some(done?),
                    packets = tokio::time::timeout(QUIET, to.receive()) => match packets {
                        Ok(packets) => arrived += packets?,
                        Err(_) => {
                            if let Some(counted) = sent {
                                return Ok(Counted { arrived, ..counted });
                            }
                        }
                    },
                }
            }
        })
    }
}

/// The load's own runtime: one thread.
///
/// # Errors
/// The system has none left.
pub fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The QUIC endpoint of a runtime.
///
/// # Errors
/// There is no socket.
pub fn quic_ends(runtime: &Runtime) -> Result<quinn::Endpoint> {
    runtime.block_on(async { endpoint() })
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
