//! Clients that a relay must bear: what each does, as much of it as one core can or its link carries.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::runtime::Runtime;
use warren_common::wire::relay::udp::{Head, Kind, UDP_HEADER, UdpKeys};

use super::device::{Device, Transport};
use super::load::{MEASURED, PlainUdp, quic_ends};
use super::server::RelayAt;

/// Devices of the attackers begin here.
const FIRST: u32 = 1_000;
/// Attackers where several are more than one.
const SEVERAL: u32 = 20;
/// Payload of a full packet, and packets in one call: what one IP packet holds.
const FULL: usize = 1_300;
const MANY: usize = 44;
/// One-byte packets in one call: as many as the kernel segments, and as many as a stream takes at once.
const TINY_DATAGRAMS: usize = 64;
const TINY_FRAMES: usize = 256;
/// Connections that are kept open and say nothing: more than the relay has places for.
const SILENT: usize = 2_000;
/// What a datagram costs of a link beside its payload: UDP, IPv4, and Ethernet with preamble and gap.
const AROUND_A_DATAGRAM: usize = 8 + 20 + 38;
/// The same for a TCP connection that is opened and ended: five packets.
const CONNECTION: usize = 5 * 84;
/// A one-byte packet as a frame of the relay's, in a WebSocket message or in a QUIC datagram's packet.
const FRAME: usize = 18;
const WEBSOCKET_FRAME: usize = FRAME + 6;
const QUIC_FRAME: usize = FRAME + 40;
/// As much as an attacker that was held up may catch up with.
const CATCH_UP: Duration = Duration::from_millis(2);

/// What the relay has to bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attack {
    /// Nothing.
    None,
    /// Nothing either, but the attackers' core is busy.
    Computing,
    /// Nothing either: the same as `flood` to a socket of nobody's.
    Elsewhere,
    /// A device that sends full packets over plain UDP, far above its rate.
    Flood,
    /// The same to the very device whose latency is measured.
    FloodReceiver,
    /// Packets of one byte over plain UDP, in batches.
    TinyDatagrams,
    /// Packets of one byte, each in a QUIC datagram.
    TinyQuic,
    /// Packets of one byte on a QUIC stream.
    TinyStream,
    /// Packets of one byte on a WebSocket.
    TinyFrames,
    /// Next to nothing in each TLS record.
    TinyRecords,
    /// Twenty devices on WebSockets that are sent as much as possible and read nothing.
    NeverReads,
    /// TCP connections that say nothing, and first QUIC packets with nothing behind them.
    HalfOpen,
    /// The same, each connection from another address: none is barred.
    HalfOpenOfMany,
    /// TLS handshakes that are begun: the relay signs for each.
    Hellos,
    /// The same, each from another address.
    HellosOfMany,
    /// Plain datagrams of sessions that do not exist, and of one that does, without its key.
    Forged,
}

impl Attack {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "nobody",
            Self::Computing => "a process that computes (no attack)",
            Self::Elsewhere => "full packets to nobody (no attack)",
            Self::Flood => "flood of full packets to another device",
            Self::FloodReceiver => "flood of full packets to the same device",
            Self::TinyDatagrams => "one-byte packets over plain UDP",
            Self::TinyQuic => "one-byte packets in QUIC datagrams",
            Self::TinyStream => "one-byte packets on a QUIC stream",
            Self::TinyFrames => "one-byte packets on a WebSocket",
            Self::TinyRecords => "ten bytes in each TLS record",
            Self::NeverReads => "20 devices that never read",
            Self::HalfOpen => "half-open connections",
            Self::HalfOpenOfMany => "half-open connections, each from another address",
            Self::Hellos => "half-open TLS handshakes",
            Self::HellosOfMany => "half-open TLS handshakes, each from another address",
            Self::Forged => "forged sources and sessions",
        }
    }

    /// Goes on until the process is killed, over a link of so many bits per second if it has a limit.
    ///
    /// # Errors
    /// The relay does not let it begin.
    pub fn run(self, relay: RelayAt, runtime: &Runtime, link: Option<u64>) -> Result<()> {
        let ends = quic_ends(runtime)?;
        let mut link = Link::new(link);
        let plain = |n: u32, peers: &[u32]| runtime.block_on(PlainUdp::new(relay, &ends, n, peers));
        let joined = |transport, n: u32, peers: &[u32]| {
            runtime.block_on(Device::join(relay, transport, &ends, n, peers))
        };
        match self {
            Self::None => loop {
                std::thread::park();
            },
            Self::Computing => loop {
                std::hint::spin_loop();
            },
            Self::Elsewhere => {
                let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                let mut from = plain(FIRST, &[FIRST + 1])?;
                from.misdirect(nobody.local_addr()?);
                flood(&mut from, &mut link, &[FIRST + 1], FULL, MANY)
            }
            Self::Flood => {
                let _to = plain(FIRST + 1, &[])?;
                flood(&mut plain(FIRST, &[FIRST + 1])?, &mut link, &[FIRST + 1], FULL, MANY)
            }
            Self::FloodReceiver => flood(&mut plain(FIRST, &[MEASURED])?, &mut link, &[MEASURED], FULL, MANY),
            Self::TinyDatagrams => {
                let _to = plain(FIRST + 1, &[])?;
                let mut from = plain(FIRST, &[FIRST + 1])?;
                flood(&mut from, &mut link, &[FIRST + 1], 1, TINY_DATAGRAMS)
            }
            Self::NeverReads => {
                let slow: Vec<u32> = (FIRST + 1..=FIRST + SEVERAL).collect();
                let join = |n: &u32| joined(Transport::WebSocket, *n, &[]);
                let _kept: Vec<Device> = slow.iter().map(join).collect::<Result<_>>()?;
                flood(&mut plain(FIRST, &slow)?, &mut link, &slow, FULL, MANY)
            }
            Self::TinyQuic | Self::TinyStream | Self::TinyFrames => {
                let transport = if self == Self::TinyFrames { Transport::WebSocket } else { Transport::Quic };
                let mut to = joined(transport, FIRST + 1, &[])?;
                let mut from = joined(transport, FIRST, &[FIRST + 1])?;
                let (bytes, stream) = match self {
                    Self::TinyQuic => (QUIC_FRAME + AROUND_A_DATAGRAM, false),
                    Self::TinyStream => (FRAME, true),
                    _ => (WEBSOCKET_FRAME, false),
                };
                let sending = async {
                    loop {
                        if stream {
                            from.send_on_stream(FIRST + 1, &[7], TINY_FRAMES).await?;
                        } else {
                            from.send(FIRST + 1, &[7], TINY_FRAMES).await?;
                        }
                        link.pass(TINY_FRAMES, bytes);
                    }
                };
                beside_reading(runtime, sending, &mut to)
            }
            Self::TinyRecords => {
                let mut to = joined(Transport::WebSocket, FIRST + 1, &[])?;
                let mut from = runtime.block_on(Device::join_in_tiny_records(relay, FIRST, &[FIRST + 1]))?;
                let sending = async {
                    loop {
                        // A packet of 1 300 bytes takes 130 records, of 32 bytes each.
                        from.send(FIRST + 1, &[7; FULL], 4).await?;
                        link.pass(4 * 130, 32);
                    }
                };
                beside_reading(runtime, sending, &mut to)
            }
            Self::HalfOpen => half_open(relay.addr, one_address, &mut link),
            Self::HalfOpenOfMany => half_open(relay.addr, any_address, &mut link),
            Self::Hellos => hellos(relay, one_address, &mut link),
            Self::HellosOfMany => hellos(relay, any_address, &mut link),
            Self::Forged => {
                let device = joined(Transport::Quic, FIRST, &[])?;
                forged(relay.addr, device.udp()?, &mut link)
            }
        }
    }
}

/// What the attacker's own link lets through. Without one, its core is the limit.
struct Link {
    bytes_per_second: Option<f64>,
    free_at: Instant,
}

impl Link {
    fn new(bits: Option<u64>) -> Self {
        Self { bytes_per_second: bits.map(|bits| bits as f64 / 8.0), free_at: now() }
    }

    /// Returns when packets of so many bytes on the wire have passed.
    fn pass(&mut self, packets: usize, bytes: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        let now = now();
        let earliest = now.checked_sub(CATCH_UP).unwrap_or(now);
        self.free_at = self.free_at.max(earliest) + Duration::from_secs_f64((packets * bytes) as f64 / rate);
        std::thread::sleep(self.free_at.saturating_duration_since(now));
    }
}

fn flood(from: &mut PlainUdp, link: &mut Link, to: &[u32], payload: usize, many: usize) -> Result<()> {
    let payload = vec![7; payload];
    loop {
        for to in to {
            from.send(*to, &payload, many)?;
            link.pass(many, payload.len() + UDP_HEADER + AROUND_A_DATAGRAM);
        }
    }
}

/// Sends while `to` takes what arrives.
fn beside_reading(
    runtime: &Runtime,
    sending: impl Future<Output = Result<()>>,
    to: &mut Device,
) -> Result<()> {
    let receiving = async {
        loop {
            to.receive().await?;
        }
    };
    runtime.block_on(async {
        tokio::select! {
            end = sending => end,
            end = receiving => end,
        }
    })
}

fn half_open(relay: SocketAddr, from: fn(u64) -> Ipv4Addr, link: &mut Link) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut silent = VecDeque::new();
    for n in 0u64.. {
        if silent.len() >= SILENT {
            silent.pop_front();
        }
        silent.push_back(begin(relay, from(n))?);
        // A QUIC long header of version 1 with connection ids, and no handshake that makes sense.
        let mut first = vec![7; 1_200];
        first[..6].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8]);
        first[6..14].copy_from_slice(&n.to_be_bytes());
        first[14] = 0;
        // There may be no room.
        let _ = socket.send_to(&first, relay);
        link.pass(1, CONNECTION + 1_200 + AROUND_A_DATAGRAM);
    }
    Ok(())
}

/// The address of every connection.
const fn one_address(_: u64) -> Ipv4Addr {
    Ipv4Addr::LOCALHOST
}

/// The address of the `n`th connection, of 65 536.
const fn any_address(n: u64) -> Ipv4Addr {
    let [.., high, low] = n.to_be_bytes();
    Ipv4Addr::new(127, 9, high, low)
}

/// A TCP connection that is not waited for: who attacks does not care whether it is answered.
fn begin(relay: SocketAddr, from: Ipv4Addr) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    match socket.connect(&relay.into()) {
        Err(error) if !under_way_or_refused(&error) => Err(error.into()),
        _ => Ok(socket),
    }
}

fn under_way_or_refused(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error())
        || error.kind() == io::ErrorKind::ConnectionRefused
}

fn hellos(relay: RelayAt, from: fn(u64) -> Ipv4Addr, link: &mut Link) -> Result<()> {
    let config = warren_relay::tls::pinned_client_config(
        relay.cert_sha256,
        warren_common::wire::relay::WEBSOCKET_ALPN,
    )?;
    let name = rustls::pki_types::ServerName::try_from(warren_common::wire::relay::SERVER_NAME)?;
    let mut hello = Vec::new();
    // The same again and again: the attacker computes nothing.
    rustls::ClientConnection::new(config.into(), name)?.write_tls(&mut hello)?;
    let mut begun = VecDeque::new();
    for n in 0u64.. {
        if begun.len() >= SEVERAL as usize {
            begun.pop_front();
        }
        let mut stream = begin(relay.addr, from(n))?;
        // The relay may have refused it already, or the kernel not have answered.
        let _ = stream.write_all(&hello);
        begun.push_back(stream);
        link.pass(1, CONNECTION + hello.len());
    }
    Ok(())
}

fn forged(relay: SocketAddr, (keys, session): (UdpKeys, u64), link: &mut Link) -> Result<()> {
    let sockets: Vec<UdpSocket> = (0..SEVERAL)
        .map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<io::Result<_>>()
        .context("sockets")?;
    for n in 0u64.. {
        let mut datagram = vec![7; UDP_HEADER + 100];
        let forged = if n.is_multiple_of(2) { session } else { n };
        let head = Head { kind: Kind::Send, session: forged, counter: n };
        anyhow::ensure!(keys.sealer().seal(head, [7; 16], &mut datagram), "a header");
        datagram[UDP_HEADER - 1] ^= 1;
        let _ = sockets[n as usize % sockets.len()].send_to(&datagram, relay); // there may be no room
        link.pass(1, datagram.len() + AROUND_A_DATAGRAM);
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
