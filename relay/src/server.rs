//! A running relay: its sockets and tasks around [`crate::core::Relay`].
//!
//! Every task belongs to a `JoinSet`: the acceptors to the server, connections to their acceptor. Dropping the server
//! ends them all; [`RelayServer::shutdown`] tells the devices first.
//!
//! The core stands behind one lock that is held for microseconds and never across an await. A connection's task reads
//! frames into the core and, when woken, takes the frames that wait for it and writes them at the pace of its transport.
//!
//! Answers to the first messages of handshakes have a thread of their own (`server/hello.rs`): anybody may ask for one, and each takes
//! longer than a thousand packets.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use quinn::crypto::rustls::QuicServerConfig;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::NetmapPublicKey;
use warren_common::time::Now;
use warren_common::wire::relay::{ALPN, QueuedFrame, RefusalCode, WEBSOCKET_ALPN};

use crate::core::{Config, ConnId, Limits, Output, Relay, Stats};
use crate::os;
use crate::tls::{Identity, IdentityError};

use self::hello::Hellos;
use self::turn::Turn;

mod barred;
mod connection_ids;
mod handshakes;
mod hello;
mod per_network;
mod quic;
mod stun;
mod turn;
mod udp;
mod websocket;

/// Most connections in their handshake (TLS, and the upgrade to a WebSocket), per transport; one more ends another or is refused
/// itself. Each costs some 20 KiB and a signature.
pub const MAX_HANDSHAKES: usize = 256;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a write may stand still before its connection is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last words of a connection may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a draining relay looks whether everybody has left.
const DRAIN_LOOK: Duration = Duration::from_millis(50);
/// How often a relay that has stopped looks whether its port is free.
const FREE_LOOK: Duration = Duration::from_millis(1);
/// Most bytes that a connection takes from the core at once: what a revocation can't call back.
const BATCH_BYTES: usize = 32 * 1024;
/// Most frames of such a batch, and of what a connection reads in one turn: a thousand frames of one byte take as long as
/// many full ones, and everybody else's packets wait for as long.
const TURN_FRAMES: usize = 32;
/// Most TCP connections that are accepted in one turn, for the same reason.
const TURN_ACCEPTS: usize = 4;
/// TCP connections that wait to be accepted; the system's own bound may be lower.
const BACKLOG: i32 = 1_024;
/// Tries to find a port that is free for TCP and for UDP, if any port will do.
const PORT_TRIES: usize = 16;

/// What a relay server needs to know.
#[derive(Clone, Debug)]
pub struct RelayServerConfig {
    /// Where to listen: QUIC and plain UDP on UDP, WebSockets inside TLS on TCP. Port 0 takes any port that is free for both.
    pub listen: SocketAddr,
    /// Where to answer STUN (UDP), if at all.
    pub stun_listen: Option<SocketAddr>,
    /// A second address of this host for STUN, with another port (RFC 5780): devices then find out how their NAT behaves.
    pub stun_second: Option<SocketAddr>,
    /// Where the certificate is kept; must exist.
    pub state_dir: PathBuf,
    /// The network it serves.
    pub network: NetworkId,
    /// Its id.
    pub relay: RelayId,
    /// What verifies tokens.
    pub netmap_key: NetmapPublicKey,
    /// The revision that every token must have: the coordinator's when the relay starts, as it can't know what it missed.
    pub floor: u64,
    /// Bounds.
    pub limits: Limits,
}

/// Why a relay server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket can't be had.
    #[error(
        "the relay can't listen on {addr} ({what}): {source}. Is the port in use, or below 1024 without the right to it?"
    )]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// QUIC and WebSocket, or STUN.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// There is no certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS refuses the certificate or lacks a cipher.
    #[error("the relay's TLS can't be set up: {0}")]
    Tls(String),
    /// The system gives no thread.
    #[error("the relay can't start a thread: {0}")]
    Thread(io::Error),
}

/// What a relay server counts, beside the core.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// The core.
    pub core: Stats,
    /// STUN questions answered.
    pub stun_answered: u64,
    /// STUN datagrams that were no question, or above the rate.
    pub stun_ignored: u64,
    /// Connections refused or ended since too many were in their handshake.
    pub handshakes_refused: u64,
    /// Handshakes that failed or took too long.
    pub handshakes_failed: u64,
    /// Times that a network was barred from TCP for a second, since its connections came to nothing.
    pub networks_barred: u64,
    /// QUIC datagrams dropped since too many waited.
    pub quic_dropped: u64,
    /// Plain UDP datagrams that the socket had no room for or did not take.
    pub udp_unsent: u64,
}

/// A running relay. Dropping it stops it at once.
#[derive(Debug)]
pub struct RelayServer {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    stun_addr: Option<SocketAddr>,
    cert_sha256: [u8; 32],
    stop: CancellationToken,
    tasks: JoinSet<()>,
    /// Goes last: the connections say goodbye through it.
    reader: udp::Reader,
}

impl RelayServer {
    /// Binds and starts, inside a tokio runtime.
    ///
    /// # Errors
    /// A socket or the certificate can't be had.
    pub fn start(config: RelayServerConfig) -> Result<Self, StartError> {
        let identity = Identity::load_or_create(&config.state_dir)?;
        let cert_sha256 = identity.sha256();
        let tls = |alpn| identity.server_config(alpn).map_err(|e| StartError::Tls(e.to_string()));
        let quic_tls = QuicServerConfig::try_from(tls(ALPN)?).map_err(|e| StartError::Tls(e.to_string()))?;
        let websocket_tls = Arc::new(tls(WEBSOCKET_ALPN)?);
        let listen_error = |what, addr| move |source| StartError::Listen { addr, what, source };
        let (tcp, udp) = bind(config.listen).map_err(listen_error("QUIC and WebSocket", config.listen))?;
        let local_addr = tcp.local_addr().map_err(listen_error("QUIC and WebSocket", config.listen))?;
        let stun = config
            .stun_listen
            .map(|addr| stun::Sockets::bind(addr, config.stun_second).map_err(listen_error("STUN", addr)))
            .transpose()?;
        let stun_addr = stun.as_ref().and_then(stun::Sockets::local_addr);
        let socket = Arc::new(udp::Socket::new(udp).map_err(listen_error("UDP", local_addr))?);
        let hellos = Hellos::start().map_err(StartError::Thread)?;
        let endpoint =
            quic::endpoint(&identity, quic_tls, socket.clone()).map_err(listen_error("QUIC", local_addr))?;
        let listener = tokio::net::TcpListener::from_std(tcp).map_err(listen_error("TLS", local_addr))?;

        let core = Config {
            network: config.network,
            relay: config.relay,
            cert_sha256,
            netmap_key: config.netmap_key,
            floor: config.floor,
            plain_udp: true,
            limits: config.limits,
        };
        let shared = Arc::new(Shared::new(Relay::new(core, os::now().boot), Arc::downgrade(&socket), hellos));
        let reader = udp::Reader::start(shared.clone(), socket).map_err(StartError::Thread)?;
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn(keep_time(shared.clone()));
        tasks.spawn(quic::accept(shared.clone(), endpoint, stop.clone()));
        tasks.spawn(websocket::accept(shared.clone(), listener, websocket_tls, stop.clone()));
        if let Some(sockets) = stun {
            tasks.spawn(stun::serve(shared.clone(), sockets));
        }
        tracing::info!(%local_addr, ?stun_addr, relay = %config.relay, "the relay listens");
        Ok(Self { shared, local_addr, stun_addr, cert_sha256, stop, tasks, reader })
    }

    /// Where it listens (QUIC, plain UDP and WebSockets).
    pub const fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where it answers STUN.
    pub const fn stun_addr(&self) -> Option<SocketAddr> {
        self.stun_addr
    }

    /// SHA-256 of its certificate, for netmaps.
    pub const fn cert_sha256(&self) -> [u8; 32] {
        self.cert_sha256
    }

    /// See [`Relay::set_minimum_revision`]. In force when this returns.
    pub fn set_minimum_revision(&self, device: DeviceId, revision: u64) {
        self.shared.with(|relay, now| relay.set_minimum_revision(device, revision, now));
    }

    /// See [`Relay::set_floor`]. In force when this returns.
    pub fn set_floor(&self, revision: u64) {
        self.shared.with(|relay, now| relay.set_floor(revision, now));
    }

    /// See [`Relay::revoke`]. In force when this returns.
    pub fn revoke(&self, device: DeviceId, revision: u64) {
        self.shared.with(|relay, now| relay.revoke(device, revision, now));
    }

    /// Tells every device to go elsewhere within `after`.
    pub fn drain(&self, after: Duration) {
        self.shared.with(|relay, _| relay.drain(after));
    }

    /// What it holds and has done.
    pub fn stats(&self) -> ServerStats {
        self.shared.stats()
    }

    /// The same for somebody else, also when the server is gone.
    pub fn stats_handle(&self) -> StatsHandle {
        StatsHandle(self.shared.clone())
    }

    /// Tells every device to go elsewhere, and waits until they have, at most for `longest`. Serves as before meanwhile:
    /// who has nowhere to go loses nothing.
    pub async fn drained(&self, longest: Duration) {
        self.drain(longest);
        let gone = async {
            while self.shared.lock().relay.stats().clients > 0 {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        };
        let _ = tokio::time::timeout(longest, gone).await; // whichever comes first
    }

    /// Tells every device why, then stops: takes at most some three seconds. The ports are free then.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        self.shared.with(|relay, _| relay.close_all(RefusalCode::ShuttingDown));
        // The time keeper and STUN have no end of their own; the acceptors end when their connections have.
        let acceptors = async {
            while self.tasks.len() > 1 + usize::from(self.stun_addr.is_some())
                && self.tasks.join_next().await.is_some()
            {}
        };
        let _ = tokio::time::timeout(2 * GOODBYE_TIMEOUT, acceptors).await;
        self.tasks.shutdown().await;
        drop(self.reader);
        // quinn's own task holds the socket until it has seen that everybody else has left.
        let socket = self.shared.socket.clone();
        let free = async {
            while socket.strong_count() > 0 {
                tokio::time::sleep(FREE_LOOK).await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, free).await; // whichever comes first
    }
}

fn bind(addr: SocketAddr) -> io::Result<(TcpListener, UdpSocket)> {
    let mut tries = 0;
    loop {
        tries += 1;
        let tcp = listener(addr)?;
        match UdpSocket::bind(SocketAddr::new(addr.ip(), tcp.local_addr()?.port())) {
            Ok(udp) => {
                // Best effort: the system's bound may be lower.
                let socket = socket2::SockRef::from(&udp);
                let _ = socket.set_recv_buffer_size(4 << 20).and(socket.set_send_buffer_size(4 << 20));
                return Ok((tcp, udp));
            }
            Err(error) if addr.port() != 0 || tries == PORT_TRIES => return Err(error),
            Err(_) => {} // another program has that port for UDP: any other will do
        }
    }
}

/// As the standard library's, which holds no more than 128 connections that wait to be accepted: of those who come back
/// together after a restart, the rest would be left to try again a second later.
fn listener(addr: SocketAddr) -> io::Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Calls the core when it is due.
async fn keep_time(shared: Arc<Shared>) {
    loop {
        let due = shared.lock().relay.poll_timeout();
        let Some(due) = due else {
            shared.timer.notified().await;
            continue;
        };
        let wait = due.since(os::now().boot);
        if wait.is_zero() {
            shared.with(Relay::handle_timeout);
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.timer.notified() => {}
        }
    }
}

/// What the tasks share.
#[derive(Debug)]
struct Shared {
    /// Those who read it own it: a task that is slow to end must not keep the port.
    socket: Weak<udp::Socket>,
    inner: Mutex<Inner>,
    /// The next timeout may be earlier than it was.
    timer: Notify,
    hellos: Hellos,
    stun_answered: AtomicU64,
    stun_ignored: AtomicU64,
    handshakes_refused: AtomicU64,
    handshakes_failed: AtomicU64,
    networks_barred: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    relay: Relay,
    conns: BTreeMap<ConnId, Arc<Signal>>,
}

/// How the core reaches a connection's task.
#[derive(Debug, Default)]
struct Signal {
    wake: Notify,
    closing: Notify,
    reason: std::sync::OnceLock<RefusalCode>,
}

/// Reads a server's counters.
#[derive(Clone, Debug)]
pub struct StatsHandle(Arc<Shared>);

impl StatsHandle {
    /// What the server holds and has done.
    pub fn stats(&self) -> ServerStats {
        self.0.stats()
    }
}

impl Shared {
    fn stats(&self) -> ServerStats {
        let (quic_dropped, udp_unsent) = self.socket.upgrade().map_or((0, 0), |socket| socket.lost());
        ServerStats {
            core: self.lock().relay.stats(),
            stun_answered: self.stun_answered.load(Ordering::Relaxed),
            stun_ignored: self.stun_ignored.load(Ordering::Relaxed),
            handshakes_refused: self.handshakes_refused.load(Ordering::Relaxed),
            handshakes_failed: self.handshakes_failed.load(Ordering::Relaxed),
            networks_barred: self.networks_barred.load(Ordering::Relaxed),
            quic_dropped,
            udp_unsent,
        }
    }

    fn new(relay: Relay, socket: Weak<udp::Socket>, hellos: Hellos) -> Self {
        Self {
            socket,
            inner: Mutex::new(Inner { relay, conns: BTreeMap::new() }),
            timer: Notify::new(),
            hellos,
            stun_answered: AtomicU64::new(0),
            stun_ignored: AtomicU64::new(0),
            handshakes_refused: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            networks_barred: AtomicU64::new(0),
        }
    }

    fn refused_handshake(&self) {
        self.handshakes_refused.fetch_add(1, Ordering::Relaxed);
    }

    fn failed_handshake(&self) {
        self.handshakes_failed.fetch_add(1, Ordering::Relaxed);
    }

    fn barred_network(&self) {
        self.networks_barred.fetch_add(1, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the core and does what it asks for.
    fn with<T>(&self, f: impl FnOnce(&mut Relay, Now) -> T) -> T {
        let mut inner = self.lock();
        let due = inner.relay.poll_timeout();
        let result = f(&mut inner.relay, os::now());
        self.settle(&mut inner, due);
        result
    }

    fn settle(&self, inner: &mut Inner, due: Option<warren_common::time::Instant>) {
        while let Some(output) = inner.relay.poll_output() {
            match output {
                Output::Wake(conn) => {
                    if let Some(signal) = inner.conns.get(&conn) {
                        signal.wake.notify_one();
                    }
                }
                Output::Close(conn, reason) => {
                    if let Some(signal) = inner.conns.remove(&conn) {
                        let _ = signal.reason.set(reason); // a connection closes once
                        signal.closing.notify_one();
                    }
                }
            }
        }
        while let Some((to, datagram)) = inner.relay.poll_datagram() {
            if let Some(socket) = self.socket.upgrade() {
                socket.send(to, &datagram, datagram.len());
            }
        }
        if inner.relay.poll_timeout() != due {
            self.timer.notify_one();
        }
    }

    /// A transport is connected.
    fn connect(self: &Arc<Self>) -> Client {
        let mut inner = self.lock();
        let due = inner.relay.poll_timeout();
        let conn = inner.relay.handle_connected(os::now(), &mut os::OsRng);
        let signal = Arc::new(Signal::default());
        inner.conns.insert(conn, signal.clone());
        self.settle(&mut inner, due);
        drop(inner);
        Client { shared: self.clone(), conn, signal }
    }
}

/// A connection as its task sees it; gone from the core when dropped.
#[derive(Debug)]
struct Client {
    shared: Arc<Shared>,
    conn: ConnId,
    signal: Arc<Signal>,
}

impl Client {
    fn frame(&self, frame: &[u8]) {
        self.shared.with(|relay, now| relay.handle_frame(self.conn, now, frame));
    }

    /// Waits until there may be frames.
    async fn wake(&self) {
        self.signal.wake.notified().await;
    }

    /// Takes what waits, up to a batch.
    fn take(&self, batch: &mut Vec<QueuedFrame>) {
        let mut inner = self.shared.lock();
        let mut bytes = 0;
        while bytes < BATCH_BYTES
            && batch.len() < TURN_FRAMES
            && let Some(frame) = inner.relay.next_frame(self.conn)
        {
            bytes += frame.bytes.len();
            batch.push(frame);
        }
    }

    /// Waits until the core ends the connection.
    async fn closing(&self) -> RefusalCode {
        loop {
            self.signal.closing.notified().await;
            if let Some(reason) = self.signal.reason.get() {
                return *reason;
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        inner.conns.remove(&self.conn);
        inner.relay.handle_disconnected(self.conn);
    }
}

/// For logs below debug, where addresses have no place.
const fn family(addr: SocketAddr) -> &'static str {
    match addr {
        SocketAddr::V6(v6) if !is_mapped(v6.ip()) => "IPv6",
        _ => "IPv4",
    }
}

const fn is_mapped(addr: &Ipv6Addr) -> bool {
    addr.to_ipv4_mapped().is_some()
}
