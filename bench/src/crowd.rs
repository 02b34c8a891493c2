//! An engine among many peers, each of which has a session with it, at one moment.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_common::ids::RelayId;
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::engine::Engine;
use warren_engine::io::{Arrival, Destination, Outbox, Source, TunOut};
use warren_engine::packet::{Addrs, build};
use warren_engine::wg::{Device, PeerHandle};

use crate::memory::MTU;
use crate::pair::{Group, POLICY, seed_from};

const RELAY: RelayId = RelayId::from_bytes([9; 16]);
/// Bytes of a packet: what a call, a game or an acknowledgement sends, and as little cipher as is real.
const PACKET: usize = 100;
/// One handshake is answered without a cookie so often.
const PACE: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Debug)]
pub struct Crowd {
    hub: Engine,
    now: Now,
    peers: Vec<(Device, PeerHandle)>,
    out: Outbox,
    tun: TunOut,
}

impl Crowd {
    /// With this many peers: at most 10 000, since the sessions of the first must not be over when the last begins.
    ///
    /// # Errors
    /// One has no session.
    pub fn connect(count: usize) -> Result<Self> {
        ensure!(count <= 10_000, "{count} peers");
        let addrs = (0..=count).map(|n| vec![IpAddr::from(overlay(n))]).collect();
        let group = Group::new(seed_from(7), addrs, POLICY, MTU)?.at_relay(RELAY);
        let boot = Instant::ZERO + Duration::from_secs(100);
        let mut now = Now { boot, unix: UnixTime::from_secs(1_800_000_000) };
        let mut hub = group.engine(0, now, seed_from(8))?;
        hub.handle_relay_state(now, RELAY, true);
        let hub_key = group.wg_key(0).context("the hub's key")?.public();
        let mut crowd = Self { hub, now, peers: Vec::new(), out: Outbox::new(), tun: TunOut::default() };
        for n in 1..=count {
            let secret = group.wg_key(n).context("a peer's key")?.clone();
            let mut device = Device::new(secret, seed_from(n as u64), 0);
            let peer = device.add_peer(hub_key, None, None)?;
            device.queue(peer, now, &packet(overlay(n), overlay(0)))?;
            crowd.call(now, n, &mut device).with_context(|| format!("peer {n}"))?;
            crowd.peers.push((device, peer));
            now = now + PACE;
        }
        crowd.now = now;
        Ok(crowd)
    }

    /// One of them calls, and its packet comes through.
    fn call(&mut self, now: Now, n: usize, device: &mut Device) -> Result<()> {
        let Self { hub, out, tun, .. } = self;
        let mut buffer = [0; 2_048];
        for _ in 0..2 {
            while let Some(sent) = device.poll_transmit(now, &mut buffer) {
                hub.handle_datagram(now, underlay(n), &mut buffer[..sent.len], 0, tun);
            }
            loop {
                let more = hub.poll_transmit(now, out);
                for (to, datagram) in out.datagrams() {
                    let Destination::Direct { remote, .. } = to else { continue };
                    if underlay(n) == (Source::Direct { socket: 0, remote }) && datagram[0] == 2 {
                        device.handle(now, underlay(0), &mut datagram.to_vec())?;
                    }
                }
                out.clear();
                if !more {
                    break;
                }
            }
        }
        while hub.poll_event().is_some() {}
        let came = tun.len();
        tun.clear();
        ensure!(came == 1, "{came} packets came through");
        Ok(())
    }

    /// How many there are.
    pub const fn peers(&self) -> usize {
        self.peers.len()
    }

    /// A packet from the hub to each of `to`, as its TUN brings it.
    pub fn packets(&self, to: &[usize]) -> Vec<Vec<u8>> {
        to.iter().map(|n| packet(overlay(0), overlay(n + 1))).collect()
    }

    /// Routes, judges and seals a packet. Returns how many datagrams wait to be sent.
    #[inline(never)]
    pub fn send(&mut self, packet: &[u8]) -> usize {
        self.hub.handle_tun(self.now, packet, &mut self.out);
        self.out.len()
    }

    /// Has each of `from` seal a packet for the hub.
    ///
    /// # Errors
    /// One can't.
    pub fn seal(&mut self, from: &[usize]) -> Result<Vec<(Source, Vec<u8>)>> {
        let mut buffer = [0; 2_048];
        from.iter()
            .map(|n| {
                let (device, peer) = self.peers.get_mut(*n).context("no such peer")?;
                let len = device.seal(*peer, self.now, &packet(overlay(n + 1), overlay(0)), &mut buffer)?;
                Ok((underlay(n + 1), buffer[..len].to_vec()))
            })
            .collect()
    }

    /// Finds the session of a datagram, opens and judges it. Returns how many packets wait for the TUN.
    #[inline(never)]
    pub fn receive(&mut self, from: Source, datagram: &mut [u8]) -> usize {
        self.hub.handle_datagrams(self.now, from, Arrival::default(), datagram, &mut self.tun);
        self.tun.len()
    }

    /// Forgets what waits.
    pub fn clear(&mut self) {
        self.out.clear();
        self.tun.clear();
    }
}

fn overlay(n: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 99, 0, 1).to_bits() + n as u32)
}

fn underlay(n: usize) -> Source {
    let ip = Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 1).to_bits() + n as u32);
    Source::Direct { socket: 0, remote: SocketAddr::from((ip, 51_820)) }
}

/// A datagram of [`PACKET`] bytes in all, with its checksums.
fn packet(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut udp = vec![0; PACKET - 20];
    udp[..4].copy_from_slice(&[0x1f, 0x40, 0x1f, 0x41]);
    udp[4..6].copy_from_slice(&(PACKET as u16 - 20).to_be_bytes());
    if let Some(ends) = Addrs::new(from.into(), to.into()) {
        let sum = build::transport_checksum(ends, 17, &udp);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
    }
    let mut ip = vec![0x45, 0, 0, PACKET as u8, 0, 0, 0x40, 0, 64, 17, 0, 0];
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum = build::checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [ip, udp].concat()
}
