//! The client of one relay: keeps one authenticated connection to it, over QUIC or, where UDP does not pass, a WebSocket, and
//! beside it plain UDP for the packets, where that passes.
//!
//! A task of its own does the I/O. It asks for tokens by event and is given them by [`RelayClient::provide_token`]; packets
//! go in by [`RelayClient::send`], which never waits, and come out as events. A lost connection is tried again after a
//! back-off ([`warren_engine::redial`]); where another one is expected to take its place in a moment, packets wait for that.
//! A WebSocket looks for QUIC from time to time and moves over when it is there.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::ProbeSecretKey;
use warren_common::netmap::Relay;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::{
    Class, DATA_QUEUE_BYTES, Frame, FrameQueue, GoneReason, MAX_PAYLOAD, Pushed, QueuedFrame, RefusalCode,
    is_handshake,
};
use warren_engine::relay_link::KEEPALIVE;

use crate::clock;
use crate::egress::Egress;
use crate::problem::Problem;

mod link;
mod pin;
mod rest;
mod route;
mod task;
mod udp;

pub use link::Transport;
pub use rest::REST_AFTER;
use task::Task;
pub use task::{QUIC_HEAD_START, UPGRADE_INTERVAL};

/// Commands that wait; more are refused to the daemon.
const MAX_COMMANDS: usize = 16;
/// Most bytes taken from the queue at once.
const BATCH_BYTES: usize = 64 * 1024;

/// Which relay, and as whom.
#[derive(Clone, Debug)]
pub struct RelayClientConfig {
    /// The relay, as the netmap says.
    pub relay: Relay,
    /// The network.
    pub network: NetworkId,
    /// The device's probe key, which its tokens name.
    pub probe: ProbeSecretKey,
    /// The way out of this host.
    pub egress: Arc<Egress>,
    /// This device's addresses in the overlay: what comes from one of them is not answered from outside.
    pub own: Vec<IpAddr>,
    /// A connection over which no packet has passed for so long is given up where plain UDP passes: [`REST_AFTER`].
    pub rest_after: Duration,
}

/// What a client tells the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayEvent {
    /// Which relay's client.
    pub relay: RelayId,
    /// What happened.
    pub kind: RelayEventKind,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayEventKind {
    /// Packets flow from now on.
    Connected {
        /// Over what.
        transport: Transport,
        /// The relay's address.
        addr: SocketAddr,
    },
    /// They take another way now; the connection stands as it did.
    Moved {
        /// Over what.
        transport: Transport,
    },
    /// They don't (any more); the client tries again by itself.
    Disconnected {
        /// Why, for people.
        why: String,
        /// The relay's own word for it, if it gave one.
        refused: Option<RefusalCode>,
        /// What somebody can change about it: a proxy, something that opens TLS.
        problem: Option<Problem>,
        /// Packets that waited, and were dropped.
        dropped: usize,
    },
    /// A packet came, from the device that the relay names.
    Received {
        /// The sender.
        src: DeviceId,
        /// The packet.
        payload: Bytes,
    },
    /// Get a token for this relay from the coordinator and hand it to [`RelayClient::provide_token`]. Repeated until then.
    NeedToken,
    /// A packet went nowhere.
    PeerGone {
        /// The destination.
        device: DeviceId,
        /// Why. After `NotPermitted` a new token is asked for.
        why: GoneReason,
    },
    /// The relay has not answered for longer than it should, or does again: the connection stands as it did. Or another one is about
    /// to take its place, for which packets wait, or has come.
    Doubt {
        /// It has not, or is about to.
        doubt: bool,
    },
    /// The relay will close soon: peers had better be reached through another.
    Draining {
        /// How soon.
        after: Duration,
    },
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It waits for the transport; so many older ones made room.
    Queued {
        /// Dropped to make room.
        dropped: usize,
    },
    /// There is no connection.
    NotConnected,
    /// The queue is full of handshake messages.
    Full,
    /// It is empty or longer than [`MAX_PAYLOAD`].
    Length,
}

#[derive(Debug)]
enum Command {
    Token(Signed),
    NetworkChanged,
}

/// A running client; dropping it ends the connection.
#[derive(Debug)]
pub struct RelayClient {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<FrameQueue>,
    wake: Notify,
    /// Packets are taken.
    connected: AtomicBool,
    /// They wait: the connection is being replaced.
    held: AtomicBool,
    /// The connection is over QUIC, not by WebSocket.
    quic: AtomicBool,
    /// It goes through a proxy.
    proxied: AtomicBool,
    /// Packets go over plain UDP.
    udp: AtomicBool,
    /// In microseconds; `u64::MAX` before the first measurement of a connection.
    rtt: AtomicU64,
    /// How long UDP may be silent.
    keepalive: watch::Sender<Duration>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, FrameQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What waited for a connection is of no use to the next one. Returns how many packets that were.
    fn forget_queue(&self) -> usize {
        std::mem::replace(&mut *self.queue(), FrameQueue::new(DATA_QUEUE_BYTES)).drop_payloads(|_| true)
    }

    fn push(&self, class: Class, frame: &Frame<'_>) -> Pushed {
        let pushed = self.queue().push(class, frame.to_vec());
        self.wake.notify_one();
        pushed
    }

    fn set_udp(&self, up: bool) {
        self.udp.store(up, Ordering::Release);
    }

    fn transport(&self) -> Option<Transport> {
        let over = match (self.udp.load(Ordering::Acquire), self.quic.load(Ordering::Acquire)) {
            (true, _) => Transport::Udp,
            (false, true) => Transport::Quic,
            (false, false) => Transport::WebSocket,
        };
        (self.connected.load(Ordering::Acquire) && !self.held.load(Ordering::Acquire)).then_some(over)
    }

    /// The round trip as last measured, if ever.
    fn last_rtt(&self) -> Duration {
        let micros = self.rtt.load(Ordering::Relaxed);
        if micros == u64::MAX { Duration::ZERO } else { Duration::from_micros(micros) }
    }

    /// Waits until something is to go out, and takes some of it.
    async fn next_batch(&self, batch: &mut Vec<QueuedFrame>) {
        loop {
            self.take(batch);
            if !batch.is_empty() {
                return;
            }
            self.wake.notified().await;
        }
    }

    fn take(&self, batch: &mut Vec<QueuedFrame>) {
        let (mut queue, mut bytes) = (self.queue(), 0);
        while bytes < BATCH_BYTES
            && let Some(frame) = queue.pop()
        {
            bytes += frame.bytes.len();
            batch.push(frame);
        }
    }
}

impl RelayClient {
    /// Starts connecting. Events arrive on `events` in order; when it is full, reading from the relay waits.
    pub fn spawn(config: RelayClientConfig, events: mpsc::Sender<RelayEvent>) -> Self {
        let (commands, receiver) = mpsc::channel(MAX_COMMANDS);
        let shared = Arc::new(Shared {
            queue: Mutex::new(FrameQueue::new(DATA_QUEUE_BYTES)),
            wake: Notify::new(),
            connected: AtomicBool::new(false),
            held: AtomicBool::new(false),
            quic: AtomicBool::new(false),
            proxied: AtomicBool::new(false),
            udp: AtomicBool::new(false),
            rtt: AtomicU64::new(u64::MAX),
            keepalive: watch::Sender::new(KEEPALIVE),
        });
        let task = Task::new(config, events, shared.clone(), receiver);
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(task.run());
        Self { shared, commands, _task: AbortOnDropHandle::new(task) }
    }

    /// Queues a packet for `dst`; never waits. When the relay is slow, the oldest data is dropped, handshakes never are.
    pub fn send(&self, dst: DeviceId, payload: &[u8]) -> Sent {
        if payload.is_empty() || payload.len() > MAX_PAYLOAD {
            return Sent::Length;
        }
        if !self.shared.connected.load(Ordering::Acquire) {
            return Sent::NotConnected;
        }
        let class = if is_handshake(payload) { Class::Handshake } else { Class::Data };
        match self.shared.push(class, &Frame::Send { dst, payload }) {
            Pushed::Queued { dropped } => Sent::Queued { dropped },
            Pushed::Full => Sent::Full,
        }
    }

    /// A token for this relay: asked for by [`RelayEventKind::NeedToken`], or because what it permits has changed.
    pub fn provide_token(&self, token: Signed) {
        // If the queue is full, the client asks again.
        let _ = self.commands.try_send(Command::Token(token));
    }

    /// The network changed: find out whether the connection still stands, try at once if there is none, or no way for it.
    pub fn network_changed(&self) {
        // If the queue is full, the task is awake anyway.
        let _ = self.commands.try_send(Command::NetworkChanged);
    }

    /// How long UDP to the relay may be silent before it needs a word: [`KEEPALIVE`] unless told otherwise.
    pub fn set_keepalive(&self, keepalive: Duration) {
        self.shared.keepalive.send_replace(keepalive);
    }

    /// True while packets flow.
    pub fn is_connected(&self) -> bool {
        self.transport().is_some()
    }

    /// What packets run over now.
    pub fn transport(&self) -> Option<Transport> {
        self.shared.transport()
    }

    /// True while packets go through a proxy.
    pub fn is_proxied(&self) -> bool {
        self.transport() == Some(Transport::WebSocket) && self.shared.proxied.load(Ordering::Relaxed)
    }

    /// The round trip to the relay, measured by the last ping of this connection.
    pub fn rtt(&self) -> Option<Duration> {
        let micros = self.shared.rtt.load(Ordering::Relaxed);
        (self.is_connected() && micros != u64::MAX).then(|| Duration::from_micros(micros))
    }
}

#[derive(Clone)]
struct Events {
    relay: RelayId,
    sender: mpsc::Sender<RelayEvent>,
}

impl Events {
    /// A daemon that is gone takes its clients with it: a closed channel needs no answer.
    async fn send(&self, kind: RelayEventKind) {
        let _ = self.sender.send(RelayEvent { relay: self.relay, kind }).await;
    }
}

/// True if not all of it is the protocol's own.
fn has_packets(batch: &[QueuedFrame]) -> bool {
    batch.iter().any(|frame| frame.class != Class::Control)
}

/// A clock for round trips.
fn micros() -> u64 {
    clock::now().boot.as_nanos() / 1_000
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn what_waits_for_the_task_is_bounded() {
        let relay = Relay {
            id: RelayId::from_bytes([2; 16]),
            name: "r".into(),
            addrs: vec![(Ipv4Addr::LOCALHOST, 1).into()],
            stun: vec![],
            cert_sha256: [0; 32],
            peer: false,
        };
        let config = RelayClientConfig {
            relay,
            network: NetworkId::from_bytes([1; 16]),
            probe: ProbeSecretKey::from_bytes([3; 32]),
            egress: Arc::default(),
            own: Vec::new(),
            rest_after: REST_AFTER,
        };
        let (sender, _events) = mpsc::channel(1);
        let client = RelayClient::spawn(config, sender);
        // The task does not run meanwhile: this thread is the only one.
        for _ in 0..10 * MAX_COMMANDS {
            client.provide_token(Signed { payload: vec![1], signature: vec![2] });
            client.network_changed();
        }
        assert_eq!((client.commands.max_capacity(), client.commands.capacity()), (MAX_COMMANDS, 0));
        assert_eq!(client.send(DeviceId::from_bytes([4; 16]), &[0; 10]), Sent::NotConnected);
    }
}
