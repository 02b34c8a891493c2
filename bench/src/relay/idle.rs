//! Many clients that say nothing but that they are there.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;
use warren_common::wire::relay::Frame;
use warren_common::wire::relay::udp::{Head, Kind as UdpKind, Ping, UDP_HEADER, UdpKeys};

use super::device::{Device, Transport, endpoint};
use super::server::RelayAt;
use super::turn::Allocation;

/// Handshakes at once: fewer than a relay allows.
const AT_ONCE: usize = 64;
/// Clients of one QUIC endpoint.
const PER_ENDPOINT: u32 = 500;
/// How often each says that it is there: as often as an agent.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// From the last handshake until memory is read.
const SETTLE: Duration = Duration::from_secs(20);

/// What a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A session over plain UDP, with the QUIC connection that it began with.
    PlainUdp,
    /// The same after it gave the connection up, as an idle agent does.
    Resting,
    /// Only a connection.
    Connection(Transport),
}

impl Kind {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PlainUdp => "plain UDP and its connection",
            Self::Resting => "plain UDP, resting",
            Self::Connection(Transport::Quic) => "QUIC",
            Self::Connection(Transport::WebSocket) => "a WebSocket",
        }
    }
}

/// Clients that are there until this goes.
#[derive(Debug)]
pub struct Held {
    /// How many they are.
    pub count: u32,
    _tasks: JoinSet<()>,
    _allocations: Vec<Allocation>,
}

/// Connects `count` clients to a relay of ours and waits until nothing happens any more.
///
/// # Errors
/// The relay won't have them, or the system has no more sockets.
pub async fn hold(relay: RelayAt, kind: Kind, count: u32) -> Result<Held> {
    let transport = match kind {
        Kind::PlainUdp | Kind::Resting => Transport::Quic,
        Kind::Connection(transport) => transport,
    };
    let (mut joining, mut tasks) = (JoinSet::new(), JoinSet::new());
    let (mut ends, mut joined) = (endpoint()?, VecDeque::new());
    for n in 0..count {
        if n.is_multiple_of(PER_ENDPOINT) {
            ends = endpoint()?;
        }
        let own = ends.clone();
        joining.spawn(async move { Device::join(relay, transport, &own, n, &[n + 1]).await });
        while joining.len() >= AT_ONCE || n + 1 == count && !joining.is_empty() {
            joined.push_back(joining.join_next().await.context("a client")???);
        }
        while let Some(device) = joined.pop_front() {
            match kind {
                Kind::PlainUdp => drop(tasks.spawn(stay_with_udp(relay, device))),
                Kind::Resting => drop(tasks.spawn(rest(relay, device))),
                Kind::Connection(_) => drop(tasks.spawn(stay(device))),
            }
        }
    }
    tokio::time::sleep(SETTLE).await;
    let alive = tasks.len();
    while tasks.try_join_next().is_some() {}
    anyhow::ensure!(tasks.len() == alive, "{} clients were thrown out", alive - tasks.len());
    Ok(Held { count, _tasks: tasks, _allocations: Vec::new() })
}

/// Pings until the connection is gone.
async fn stay(mut device: Device) {
    loop {
        tokio::select! {
            packets = device.receive() => if packets.is_err() { return },
            () = tokio::time::sleep(KEEPALIVE) => {
                if device.control(&Frame::Ping { nonce: 7 }).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The same over plain UDP as well.
async fn stay_with_udp(relay: RelayAt, device: Device) {
    let udp = device.udp();
    let ping = async {
        let mut pings = Pings::new(relay, udp?).await?;
        loop {
            pings.ask().await?;
            tokio::time::sleep(KEEPALIVE).await;
        }
    };
    let _: Option<Result<()>> = tokio::select! {
        end = ping => Some(end),
        () = stay(device) => None,
    };
}

/// Gives the connection up and pings over UDP until that is not answered.
async fn rest(relay: RelayAt, mut device: Device) {
    let resting = async {
        let mut pings = Pings::new(relay, device.udp()?).await?;
        pings.ask().await?;
        device.control(&Frame::Rest).await?;
        while device.receive().await.is_ok() {}
        drop(device);
        loop {
            pings.ask().await?;
            tokio::time::sleep(KEEPALIVE).await;
        }
    };
    let _: Result<()> = resting.await;
}

/// Pings of one session over plain UDP.
struct Pings {
    socket: tokio::net::UdpSocket,
    relay: RelayAt,
    keys: UdpKeys,
    session: u64,
    counter: u64,
}

impl Pings {
    async fn new(relay: RelayAt, (keys, session): (UdpKeys, u64)) -> Result<Self> {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
        Ok(Self { socket, relay, keys, session, counter: 0 })
    }

    /// Pings and waits for the answer.
    async fn ask(&mut self) -> Result<()> {
        let mut datagram = vec![0; UDP_HEADER];
        let head = Head { kind: UdpKind::Ping, session: self.session, counter: self.counter };
        let what = Ping { nonce: self.counter, settle: true, leave: false }.to_bytes();
        self.counter += 1;
        anyhow::ensure!(self.keys.sealer().seal(head, what, &mut datagram));
        self.socket.send_to(&datagram, self.relay.addr).await?;
        let len = tokio::time::timeout(KEEPALIVE, self.socket.recv(&mut datagram)).await??;
        anyhow::ensure!(self.keys.opener().open(&datagram[..len]).is_some(), "the relay's answer");
        Ok(())
    }
}

/// Makes `count` allocations of a TURN server; they last for ten minutes.
///
/// # Errors
/// The server does not grant them, or the system has no more sockets.
pub fn allocations(server: SocketAddr, count: u32) -> Result<Held> {
    let allocations = (0..count).map(|_| Allocation::new(server)).collect::<Result<_>>()?;
    std::thread::sleep(SETTLE);
    Ok(Held { count, _tasks: JoinSet::new(), _allocations: allocations })
}
