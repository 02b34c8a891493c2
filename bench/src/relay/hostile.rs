//! Clients that a relay must bear: what each does, as much of it as one core can.

use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::io::AsyncWriteExt as _;
use tokio::runtime::Runtime;
use warren_common::wire::relay::udp::{Head, Kind, UDP_HEADER};

use super::device::{Device, Transport};
use super::load::{PlainUdp, quic_ends};
use super::server::RelayAt;

/// Devices of the attackers begin here.
const FIRST: u32 = 1_000;
/// Attackers where several are more than one.
const SEVERAL: u32 = 20;

/// What the relay has to bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attack {
    /// Nothing.
    None,
    /// A device that sends full packets over plain UDP as fast as it can, far above its rate.
    Flood,
    /// The same to the very device whose latency is measured.
    FloodReceiver,
    /// Packets of one byte over plain UDP, in batches.
    TinyDatagrams,
    /// Packets of one byte on a WebSocket.
    TinyFrames,
    /// A TLS stream with a byte in each record.
    TinyRecords,
    /// Twenty devices on WebSockets that are sent as much as possible and read nothing.
    NeverReads,
    /// TCP connections that say nothing, and first QUIC packets with nothing behind them: as many as possible.
    HalfOpen,
    /// Plain datagrams of sessions that do not exist, and of one that does, without its key.
    Forged,
}

impl Attack {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "nobody",
            Self::Flood => "flood of full packets to another device",
            Self::FloodReceiver => "flood of full packets to the same device",
            Self::TinyDatagrams => "one-byte packets over plain UDP",
            Self::TinyFrames => "one-byte packets on a stream",
            Self::TinyRecords => "one byte in each TLS record",
            Self::NeverReads => "20 devices that never read",
            Self::HalfOpen => "half-open handshakes",
            Self::Forged => "forged sources and sessions",
        }
    }

    /// Goes on until the process is killed.
    ///
    /// # Errors
    /// The relay does not let it begin.
    pub fn run(self, relay: RelayAt, runtime: &Runtime) -> Result<()> {
        let ends = quic_ends(runtime)?;
        let plain = |n: u32, peers: &[u32]| runtime.block_on(PlainUdp::new(relay, &ends, n, peers));
        let stream = |n: u32, peers: &[u32]| {
            runtime.block_on(Device::join(relay, Transport::WebSocket, &ends, n, peers))
        };
        match self {
            Self::None => loop {
                std::thread::park();
            },
            Self::Flood => {
                let _to = plain(FIRST + 1, &[])?;
                let mut from = plain(FIRST, &[FIRST + 1])?;
                loop {
                    from.send(FIRST + 1, &[7; 1_300], 44)?;
                }
            }
            Self::FloodReceiver => {
                let mut from = plain(FIRST, &[super::load::MEASURED])?;
                loop {
                    from.send(super::load::MEASURED, &[7; 1_300], 44)?;
                }
            }
            Self::TinyDatagrams => {
                let _to = plain(FIRST + 1, &[])?;
                let mut from = plain(FIRST, &[FIRST + 1])?;
                loop {
                    from.send(FIRST + 1, &[7], 64)?;
                }
            }
            Self::TinyFrames => {
                let (mut to, mut from) = (stream(FIRST + 1, &[])?, stream(FIRST, &[FIRST + 1])?);
                runtime.block_on(async {
                    let sending = async {
                        loop {
                            from.send(FIRST + 1, &[7], 256).await?;
                        }
                    };
                    let receiving = async {
                        loop {
                            to.receive().await?;
                        }
                    };
                    tokio::select! {
                        end = sending => end,
                        end = receiving => end,
                    }
                })
            }
            Self::TinyRecords => {
                let mut from = stream(FIRST, &[])?;
                runtime.block_on(async {
                    let tls = from.stream().context("TLS")?;
                    loop {
                        // A binary message, masked with zeros, that holds a ping.
                        for byte in [0x82, 0x89, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 7] {
                            tls.write_all(&[byte]).await?;
                            tls.flush().await?;
                        }
                    }
                })
            }
            Self::NeverReads => {
                let slow: Vec<u32> = (FIRST + 1..=FIRST + SEVERAL).collect();
                let _kept: Vec<Device> = slow.iter().map(|n| stream(*n, &[])).collect::<Result<_>>()?;
                let mut from = plain(FIRST, &slow)?;
                loop {
                    for n in &slow {
                        from.send(*n, &[7; 1_300], 44)?;
                    }
                }
            }
            Self::HalfOpen => {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                let mut silent = std::collections::VecDeque::new();
                for n in 0u64.. {
                    if silent.len() >= 2_000 {
                        silent.pop_front();
                    }
                    silent.push_back(TcpStream::connect(relay.addr)?);
                    // A QUIC long header of version 1 with connection ids, and no handshake that makes sense.
                    let mut first = vec![7; 1_200];
                    first[..6].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8]);
                    first[6..14].copy_from_slice(&n.to_be_bytes());
                    first[14] = 0;
                    // There may be no room.
                    let _ = socket.send_to(&first, relay.addr);
                }
                Ok(())
            }
            Self::Forged => {
                let (keys, session) = {
                    let device = runtime.block_on(Device::join(relay, Transport::Quic, &ends, FIRST, &[]))?;
                    let (keys, session) = device.udp()?;
                    std::mem::forget(device);
                    (keys, session)
                };
                let sockets: Vec<UdpSocket> = (0..SEVERAL)
                    .map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))
                    .collect::<std::io::Result<_>>()?;
                for n in 0u64.. {
                    let mut datagram = vec![7; UDP_HEADER + 100];
                    let forged = if n.is_multiple_of(2) { session } else { n };
                    let head = Head { kind: Kind::Send, session: forged, counter: n };
                    anyhow::ensure!(keys.sealer().seal(head, [7; 16], &mut datagram), "a header");
                    datagram[UDP_HEADER - 1] ^= 1;
                    let _ = sockets[n as usize % sockets.len()].send_to(&datagram, relay.addr);
                }
                Ok(())
            }
        }
    }
}

/// How long packets take from one plain UDP session of the relay to another, at `rate` packets a second for `span`: sorted.
///
/// # Errors
/// The relay won't have them.
pub fn latencies(
    relay: RelayAt,
    runtime: &Runtime,
    rate: u32,
    span: Duration,
) -> Result<(Vec<Duration>, u64)> {
    let ends = quic_ends(runtime)?;
    let measured = super::load::MEASURED;
    let mut from = runtime.block_on(PlainUdp::new(relay, &ends, measured - 1, &[measured]))?;
    let mut to = runtime.block_on(PlainUdp::new(relay, &ends, measured, &[measured - 1]))?;
    let pause = Duration::from_secs(1) / rate;
    let (began, mut sent, mut took) = (now(), 0u64, Vec::new());
    let mut take = |to: &mut PlainUdp| {
        to.receive(|payload| {
            // What floods has no time in it.
            if let Some((b"time", rest)) = payload.split_first_chunk::<4>()
                && let Some(at) = rest.first_chunk()
            {
                took.push(began.elapsed().saturating_sub(Duration::from_nanos(u64::from_be_bytes(*at))));
            }
        })
    };
    while began.elapsed() < span {
        let mut payload = [7; 200];
        payload[..4].copy_from_slice(b"time");
        payload[4..12].copy_from_slice(&(began.elapsed().as_nanos() as u64).to_be_bytes());
        from.send(measured, &payload, 1)?;
        sent += 1;
        let next = pause * sent as u32;
        while began.elapsed() < next {
            to.wait(next.saturating_sub(began.elapsed()))?;
            take(&mut to)?;
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    while take(&mut to)? > 0 {}
    took.sort_unstable();
    Ok((took, sent))
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
