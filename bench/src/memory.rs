//! Two engines in one process: what one sends the other receives, in virtual time.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::engine::Engine;
use warren_engine::event::Event;
use warren_engine::io::{Arrival, LocalSocket, Outbox, Source, TunOffload, TunOut};
use warren_engine::offload::vnet::{Gso, GsoKind, Header, PartialChecksum};
use warren_engine::packet::build;

use crate::pair::{POLICY, Pair, Role, seed_from};

/// The MTU of the tunnel.
pub const MTU: u16 = 1_420;
/// Payload of a full TCP segment with time stamps, as Linux sends it.
pub const SEGMENT: usize = MTU as usize - 20 - 32;
/// Segments of one super-frame, as Linux makes it.
pub const SEGMENTS: usize = 47;

/// Connected engines, and all memory they need.
#[derive(Debug)]
pub struct Tunnel {
    engines: [Engine; 2],
    now: Now,
    out: Outbox,
    tun: TunOut,
    /// What a frame was before it went in.
    frame: Vec<u8>,
    scratch: Vec<u8>,
    wire: Vec<u8>,
}

impl Tunnel {
    /// A pair with a session and a direct path; `seed` makes another pair.
    ///
    /// # Errors
    /// They do not come together.
    pub fn connect(seed: u64) -> Result<Self> {
        let addrs: [IpAddr; 2] = [[10, 99, 0, 1].into(), [10, 99, 0, 2].into()];
        let pair = Pair::new(seed_from(seed), addrs.map(|addr| vec![addr]), POLICY, MTU)?;
        let now =
            Now { boot: Instant::ZERO + Duration::from_secs(100), unix: UnixTime::from_secs(1_800_000_000) };
        let roles = [Role::A, Role::B];
        let mut engines = Vec::new();
        for role in roles {
            let mut engine = pair.engine(role, now, seed_from(seed + 10 + role as u64))?;
            engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: underlay(role) }]);
            engines.push(engine);
        }
        let engines: [Engine; 2] = engines.try_into().map_err(|_| anyhow::anyhow!("two engines"))?;
        let mut tunnel = Self {
            engines,
            now,
            out: Outbox::new(),
            tun: TunOut::vectored(TunOffload { tcp: true, udp: true }),
            frame: super_frame(SEGMENTS, SEGMENT),
            scratch: Vec::with_capacity(65_600),
            wire: vec![0; 65_536],
        };
        let mut small = super_frame(1, 100);
        for step in 0..300 {
            if step % 50 == 0 {
                let now = tunnel.now;
                tunnel.engines[0].handle_tun_frame(now, &mut small.clone(), false, &mut tunnel.out);
            }
            tunnel.exchange();
            tunnel.now = tunnel.now + Duration::from_millis(10);
        }
        small.clear();
        let passed = tunnel.transfer();
        ensure!(passed == SEGMENTS * SEGMENT, "{passed} bytes passed");
        Ok(tunnel)
    }

    /// Everything that the engines have to say to each other at this moment.
    fn exchange(&mut self) {
        for _ in 0..8 {
            for role in [Role::A, Role::B] {
                let (own, other) = (role as usize, role.other() as usize);
                let now = self.now;
                if self.engines[own].poll_timeout(now).is_some_and(|(at, _)| at <= now.boot) {
                    self.engines[own].handle_timeout(now);
                }
                while self.engines[own].poll_transmit(now, &mut self.out) {}
                let datagrams: Vec<Vec<u8>> = self.out.datagrams().map(|(_, bytes)| bytes.to_vec()).collect();
                self.out.clear();
                let source = Source::Direct { socket: 0, remote: underlay(role) };
                for mut datagram in datagrams {
                    self.engines[other].handle_datagram(now, source, &mut datagram, 0, &mut self.tun);
                    self.tun.clear();
                }
                while let Some(event) = self.engines[own].poll_event() {
                    if let Event::Signal { mut sealed, .. } = event {
                        let source = Source::Signal { device: role.device() };
                        self.engines[other].handle_datagram(now, source, &mut sealed, 0, &mut self.tun);
                    }
                }
            }
        }
    }

    /// One super-frame from a to b; the time moves on by as much as 2 Gbit/s take for it.
    pub fn transfer(&mut self) -> usize {
        self.seal();
        self.open()
    }

    /// The first half: cuts and seals a super-frame at a.
    #[inline(never)]
    pub fn seal(&mut self) {
        self.now = self.now + Duration::from_micros(250);
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.frame);
        self.out.clear();
        self.engines[0].handle_tun_frame(self.now, &mut self.scratch, false, &mut self.out);
    }

    /// The second half: opens, joins and judges it at b. Returns the payload bytes for b's TUN.
    #[inline(never)]
    pub fn open(&mut self) -> usize {
        let mut bytes = 0;
        let source = Source::Direct { socket: 0, remote: underlay(Role::A) };
        for (transmit, sealed) in self.out.iter() {
            let data = &mut self.wire[..sealed.len()];
            data.copy_from_slice(sealed);
            let arrival = Arrival { stride: transmit.segment_size.unwrap_or(0), ..Arrival::default() };
            self.engines[1].handle_datagrams(self.now, source, arrival, data, &mut self.tun);
            let headers = warren_engine::offload::vnet::HEADER_LEN + 52;
            bytes += self.tun.frames().flatten().map(<[u8]>::len).sum::<usize>() - self.tun.len() * headers;
            self.tun.clear();
        }
        bytes
    }

    /// What keeps the session alive on long runs: timers and handshakes.
    pub fn tick(&mut self) {
        self.out.clear();
        self.exchange();
    }
}

const fn underlay(role: Role) -> SocketAddr {
    SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::new(192, 0, 2, role as u8 + 1), 52_000))
}

/// What one read of a TUN brings: a virtio header and `count` TCP segments of `size` bytes, with time stamps.
pub fn super_frame(count: usize, size: usize) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(40_000u16.to_be_bytes());
    tcp.extend(5_201u16.to_be_bytes());
    tcp.extend(1_000u32.to_be_bytes());
    tcp.extend(1u32.to_be_bytes());
    tcp.extend([8 << 4, 0x10, 1, 0, 0, 0, 0, 0]);
    tcp.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    let header_len = 20 + tcp.len();
    tcp.extend((0..count * size).map(|i| (i * 7 / 3) as u8));
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 99, 0, 1, 10, 99, 0, 2];
    ip[2..4].copy_from_slice(&(20 + tcp.len() as u16).to_be_bytes());
    let sum = build::checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // The sum of the pseudo-header: addresses, protocol, length.
    let pseudo = !build::checksum(&[&ip[12..20], &[0, 6], &(tcp.len() as u16).to_be_bytes()]);
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
    let header = Header {
        checksum: Some(PartialChecksum { start: 20, offset: 16 }),
        gso: Some(Gso { kind: GsoKind::Tcp4, size: size as u16 }),
        header_len: header_len as u16,
    };
    [&header.to_bytes()[..], &ip, &tcp].concat()
}
