//! Engines in one process: what one sends another receives, in virtual time.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use warren_agent::crew::Crew;
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::engine::{Engine, OpenJob, SealJob};
use warren_engine::event::Event;
use warren_engine::io::{Arrival, Destination, LocalSocket, Outbox, Source, TunOffload, TunOut};
use warren_engine::offload::vnet::{Gso, GsoKind, HEADER_LEN, Header, PartialChecksum};
use warren_engine::packet::build;
use warren_engine::queue::Waited;

use crate::pair::{Group, POLICY, device_id, seed_from};

/// The MTU of the tunnel.
pub const MTU: u16 = 1_420;
/// Payload of a full TCP segment with time stamps, as Linux sends it.
pub const SEGMENT: usize = MTU as usize - 20 - 32;
/// Segments of one super-frame, as Linux makes it.
pub const SEGMENTS: usize = 47;
/// Segments that fit one batch of datagrams.
const BATCH_SEGMENTS: usize = 44;
/// Bytes in front of a super-frame's payload: the virtio header, IPv4 and TCP with time stamps.
const HEADERS: usize = HEADER_LEN + 52;
const BOTH: TunOffload = TunOffload { tcp: true, udp: true };

/// Connected engines, and all memory they need. The first one, the hub, has a session and a direct path to each other.
#[derive(Debug)]
pub struct Tunnel {
    engines: Vec<Engine>,
    now: Now,
    out: Outbox,
    tun: TunOut,
    /// What the hub's frames for each of the others are before they go in.
    frames: Vec<Vec<u8>>,
    scratch: Vec<u8>,
    wire: Vec<u8>,
}

impl Tunnel {
    /// A pair; `seed` makes another one.
    ///
    /// # Errors
    /// They do not come together.
    pub fn connect(seed: u64) -> Result<Self> {
        Self::star(seed, 1)
    }

    /// A hub with this many others.
    ///
    /// # Errors
    /// They do not come together.
    pub fn star(seed: u64, others: usize) -> Result<Self> {
        let addrs = (0..=others).map(|n| vec![overlay(n)]).collect();
        let group = Group::new(seed_from(seed), addrs, POLICY, MTU)?;
        let now =
            Now { boot: Instant::ZERO + Duration::from_secs(100), unix: UnixTime::from_secs(1_800_000_000) };
        let mut engines = Vec::new();
        for n in 0..=others {
            let mut engine = group.engine(n, now, seed_from(seed + 10 + n as u64))?;
            engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: underlay(n) }]);
            engines.push(engine);
        }
        let mut tunnel = Self {
            engines,
            now,
            out: Outbox::new(),
            tun: TunOut::vectored(BOTH),
            frames: (1..=others).map(|n| super_frame(overlay(0), overlay(n), SEGMENTS, SEGMENT)).collect(),
            scratch: Vec::with_capacity(65_600),
            wire: vec![0; 65_536],
        };
        for step in 0..300 {
            if step % 50 == 0 {
                for n in 1..=others {
                    let mut small = super_frame(overlay(0), overlay(n), 1, 100);
                    let now = tunnel.now;
                    tunnel.engines[0].handle_tun_frame(now, &mut small, false, &mut tunnel.out);
                }
            }
            tunnel.exchange();
            tunnel.now = tunnel.now + Duration::from_millis(10);
        }
        let passed = tunnel.transfer();
        ensure!(passed == SEGMENTS * SEGMENT, "{passed} bytes passed");
        Ok(tunnel)
    }

    /// Everything that the engines have to say to each other at this moment.
    fn exchange(&mut self) {
        for _ in 0..8 {
            for own in 0..self.engines.len() {
                let now = self.now;
                if self.engines[own].poll_timeout(now).is_some_and(|(at, _)| at <= now.boot) {
                    self.engines[own].handle_timeout(now);
                }
                while self.engines[own].poll_transmit(now, &mut self.out) {}
                let datagrams: Vec<_> =
                    self.out.datagrams().map(|(to, bytes)| (to, bytes.to_vec())).collect();
                self.out.clear();
                let source = Source::Direct { socket: 0, remote: underlay(own) };
                for (to, mut datagram) in datagrams {
                    let Destination::Direct { remote, .. } = to else { continue };
                    let Some(other) = (0..self.engines.len()).find(|n| underlay(*n) == remote) else {
                        continue;
                    };
                    self.engines[other].handle_datagram(now, source, &mut datagram, 0, &mut self.tun);
                    self.tun.clear();
                }
                while let Some(event) = self.engines[own].poll_event() {
                    let Event::Signal { device, mut sealed } = event else { continue };
                    let Some(other) = (0..self.engines.len()).find(|n| device_id(*n) == device) else {
                        continue;
                    };
                    let source = Source::Signal { device: device_id(own) };
                    self.engines[other].handle_datagram(now, source, &mut sealed, 0, &mut self.tun);
                }
            }
        }
    }

    /// One super-frame from the hub to the first of the others; the time moves on by as much as 2 Gbit/s take for it.
    pub fn transfer(&mut self) -> usize {
        self.seal();
        self.open()
    }

    /// The first half: cuts and seals a super-frame.
    #[inline(never)]
    pub fn seal(&mut self) {
        self.now = self.now + Duration::from_micros(250);
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.frames[0]);
        self.out.clear();
        self.engines[0].handle_tun_frame(self.now, &mut self.scratch, false, &mut self.out);
    }

    /// The second half: opens, joins and judges it at the other end. Returns the payload bytes for its TUN.
    #[inline(never)]
    pub fn open(&mut self) -> usize {
        let mut bytes = 0;
        let source = Source::Direct { socket: 0, remote: underlay(0) };
        for (transmit, sealed) in self.out.iter() {
            let data = &mut self.wire[..sealed.len()];
            data.copy_from_slice(sealed);
            let arrival = Arrival { stride: transmit.segment_size.unwrap_or(0), ..Arrival::default() };
            self.engines[1].handle_datagrams(self.now, source, arrival, data, &mut self.tun);
            bytes += payload(&self.tun);
            self.tun.clear();
        }
        bytes
    }

    /// What keeps the sessions alive on long runs: timers and handshakes.
    pub fn tick(&mut self) {
        self.out.clear();
        self.exchange();
    }
}

/// What a thread of the crew does.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are as many as threads, and their memory is elsewhere")]
enum Job {
    Seal(SealJob, Arc<Vec<u8>>),
    Open(OpenJob),
}

/// A hub that is busy with several others, and the threads that help it.
#[derive(Debug)]
pub struct Hub {
    tunnel: Tunnel,
    crew: Crew<Job>,
    seal: Vec<SealJob>,
    open: Vec<OpenJob>,
    jobs: Vec<Job>,
    /// A frame for each of the others.
    arena: Arc<Vec<u8>>,
    /// A batch of each of the others: its sender, stride, memory and length.
    batches: Vec<(SocketAddr, usize, Box<[u8]>, usize)>,
}

impl Hub {
    /// With this many others, and as many threads, the caller's included.
    ///
    /// # Errors
    /// They do not come together.
    pub fn connect(others: usize, threads: usize) -> Result<Self> {
        let run = |job: &mut Job| match job {
            Job::Seal(job, arena) => job.run(arena, |out, _| out.clear()),
            Job::Open(job) => job.run(),
        };
        let tunnel = Tunnel::star(1, others)?;
        Ok(Self {
            arena: Arc::new(tunnel.frames.concat()),
            tunnel,
            crew: Crew::with_helpers(threads - 1, run),
            seal: (0..threads).map(|_| SealJob::default()).collect(),
            open: (0..threads).map(|_| OpenJob::new(TunOut::vectored(BOTH))).collect(),
            jobs: Vec::new(),
            batches: Vec::new(),
        })
    }

    /// A super-frame to each of the others, judged and sealed, as the daemon does it.
    pub fn seal(&mut self) {
        let Self { tunnel, crew, seal, jobs, arena, .. } = self;
        tunnel.now = tunnel.now + Duration::from_micros(250);
        let now = tunnel.now;
        let mut at = 0;
        for of_one in &tunnel.frames {
            let Some(arena) = Arc::get_mut(arena) else { break };
            let frame = &mut arena[at..at + of_one.len()];
            tunnel.engines[0].begin_seal(now, Waited { frame, at, tell: false }, seal, &mut tunnel.out);
            at += of_one.len();
        }
        jobs.extend(seal.drain(..).map(|job| Job::Seal(job, Arc::clone(arena))));
        crew.run(jobs);
        for job in jobs.drain(..) {
            let Job::Seal(mut job, _) = job else { continue };
            tunnel.engines[0].finish_seal(now, &mut job);
            seal.push(job);
        }
    }

    /// Has each of the others seal a batch for the hub, for [`Self::open`].
    pub fn prepare(&mut self) {
        let Tunnel { engines, now, out, .. } = &mut self.tunnel;
        *now = *now + Duration::from_micros(250);
        self.batches.clear();
        for (n, engine) in engines.iter_mut().enumerate().skip(1) {
            let mut frame = super_frame(overlay(n), overlay(0), BATCH_SEGMENTS, SEGMENT);
            out.clear();
            engine.handle_tun_frame(*now, &mut frame, false, out);
            self.batches.extend(out.iter().map(|(transmit, bytes)| {
                let slot = bytes.to_vec().into_boxed_slice();
                (underlay(n), transmit.segment_size.unwrap_or(0), slot, bytes.len())
            }));
        }
        out.clear();
    }

    /// Opens, joins and judges the batches. Returns the payload bytes for the hub's TUN.
    pub fn open(&mut self) -> usize {
        let Self { tunnel, crew, open, jobs, batches, .. } = self;
        let now = tunnel.now;
        for (remote, stride, slot, len) in batches {
            let arrival = Arrival { stride: *stride, ..Arrival::default() };
            let from = Source::Direct { socket: 0, remote: *remote };
            tunnel.engines[0].begin_open(now, from, arrival, slot, *len, open);
        }
        jobs.extend(open.drain(..).map(Job::Open));
        crew.run(jobs);
        let mut bytes = 0;
        for job in jobs.drain(..) {
            let Job::Open(mut job) = job else { continue };
            tunnel.engines[0].finish_open(now, &mut job, drop);
            bytes += payload(job.tun());
            job.tun().clear();
            open.push(job);
        }
        bytes
    }

    /// As of [`Tunnel::tick`].
    pub fn tick(&mut self) {
        self.tunnel.tick();
    }
}

fn payload(tun: &TunOut) -> usize {
    tun.frames().flatten().map(<[u8]>::len).sum::<usize>() - tun.len() * HEADERS
}

fn overlay(n: usize) -> IpAddr {
    [10, 99, 0, n as u8 + 1].into()
}

const fn underlay(n: usize) -> SocketAddr {
    SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::new(192, 0, 2, n as u8 + 1), 52_000))
}

/// What one read of a TUN brings: a virtio header and `count` TCP segments of `size` bytes, with time stamps, between IPv4
/// addresses.
pub fn super_frame(from: IpAddr, to: IpAddr, count: usize, size: usize) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(40_000u16.to_be_bytes());
    tcp.extend(5_201u16.to_be_bytes());
    tcp.extend(1_000u32.to_be_bytes());
    tcp.extend(1u32.to_be_bytes());
    tcp.extend([8 << 4, 0x10, 1, 0, 0, 0, 0, 0]);
    tcp.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    let header_len = 20 + tcp.len();
    tcp.extend((0..count * size).map(|i| (i * 7 / 3) as u8));
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0];
    for addr in [from, to] {
        if let IpAddr::V4(addr) = addr {
            ip.extend(addr.octets());
        }
    }
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
