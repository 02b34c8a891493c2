//! Two devices and a bad link between them, in virtual time.

use std::collections::BTreeMap;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use warren_common::keys::WgSecretKey;
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::io::Source;
use warren_engine::wg::{
    Destination, Device, DropReason, Event, PeerHandle, Received, SealError, TransmitKind, WakeReason,
};

pub(crate) const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(crate) const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(crate) fn start() -> Now {
    Now { boot: Instant::from_nanos(1_000_000_000_000), unix: UnixTime::from_secs(1_800_000_000) }
}

pub(crate) fn source(host: u8) -> Source {
    Source::Direct { socket: 0, remote: ([192, 0, 2, host], 40_000).into() }
}

/// An IPv4 packet of `len` bytes (20 at least) that carries `id`.
pub(crate) fn ip_packet(id: u64, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len.max(28)];
    let total = packet.len() as u16;
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[20..28].copy_from_slice(&id.to_be_bytes());
    packet
}

pub(crate) fn packet_id(packet: &[u8]) -> u64 {
    u64::from_be_bytes(packet[20..28].try_into().unwrap())
}

/// One side: a device that knows one peer, and what came out of it.
pub(crate) struct Host {
    pub(crate) device: Device,
    pub(crate) peer: PeerHandle,
    pub(crate) events: Vec<Event>,
    /// Ids of packets that arrived, with how often.
    pub(crate) got: BTreeMap<u64, u32>,
    pub(crate) drops: BTreeMap<DropReason, u32>,
    pub(crate) sent_kinds: Vec<(Now, TransmitKind)>,
    pub(crate) wakes: BTreeMap<WakeReason, u32>,
}

impl Host {
    pub(crate) fn established(&self) -> usize {
        let is = |e: &&Event| matches!(e, Event::SessionEstablished { .. });
        self.events.iter().filter(is).count()
    }

    /// The next datagram that it wants sent.
    pub(crate) fn transmit(&mut self, now: Now) -> Option<(Destination, Vec<u8>)> {
        let mut out = [0; 2048];
        let transmit = self.device.poll_transmit(now, &mut out)?;
        Some((transmit.to, out[..transmit.len].to_vec()))
    }

    /// An initiation that nothing has asked for.
    pub(crate) fn initiation(&mut self, now: Now) -> Vec<u8> {
        self.device.initiate(self.peer, now);
        self.transmit(now).unwrap().1
    }

    pub(crate) fn count(&self, kind: TransmitKind) -> usize {
        self.sent_kinds.iter().filter(|(_, k)| *k == kind).count()
    }
}

/// What the link does to each datagram; chances in per mille.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    pub(crate) loss: u32,
    pub(crate) duplicate: u32,
    pub(crate) delay_ms: (u64, u64),
}

pub(crate) struct Net {
    pub(crate) hosts: [Host; 2],
    pub(crate) now: Now,
    pub(crate) link: Link,
    rng: ChaCha20Rng,
    flying: BTreeMap<(Instant, u64), (usize, Vec<u8>)>,
    launched: u64,
    next_id: u64,
    /// Ids of packets that the link lost.
    pub(crate) lost: Vec<u64>,
    /// Packet id by datagram, for those sealed by `send`.
    in_datagram: BTreeMap<Vec<u8>, u64>,
}

impl Net {
    pub(crate) fn new(seed: u64, psk: Option<[u8; 32]>, keepalive: [Option<Duration>; 2]) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let secrets = [WgSecretKey::generate(&mut rng), WgSecretKey::generate(&mut rng)];
        let host = |me: usize, rng: &mut ChaCha20Rng| {
            let mut device_seed = [0; 32];
            rng.fill_bytes(&mut device_seed);
            let mut device = Device::new(secrets[me].clone(), device_seed, me as u8);
            let peer = device.add_peer(secrets[1 - me].public(), psk, keepalive[me]).unwrap();
            Host {
                device,
                peer,
                events: Vec::new(),
                got: BTreeMap::new(),
                drops: BTreeMap::new(),
                sent_kinds: Vec::new(),
                wakes: BTreeMap::new(),
            }
        };
        let hosts = [host(0, &mut rng), host(1, &mut rng)];
        Self {
            hosts,
            now: start(),
            link: Link { delay_ms: (10, 10), ..Link::default() },
            rng,
            flying: BTreeMap::new(),
            launched: 0,
            next_id: 0,
            lost: Vec::new(),
            in_datagram: BTreeMap::new(),
        }
    }

    /// Seals a packet at `from` and puts it on the link. Returns its id and what `seal` said.
    pub(crate) fn send(&mut self, from: usize, len: usize) -> (u64, Result<usize, SealError>) {
        let id = self.next_id;
        self.next_id += 1;
        let mut out = [0; 2048];
        let host = &mut self.hosts[from];
        let result = host.device.seal(host.peer, self.now, &ip_packet(id, len), &mut out);
        if let Ok(sealed) = result {
            self.in_datagram.insert(out[..sealed].to_vec(), id);
            self.launch(from, out[..sealed].to_vec());
        }
        self.drain(from);
        (id, result)
    }

    /// Sends a small packet that may have to wait for a session. Returns its id.
    pub(crate) fn post(&mut self, from: usize) -> u64 {
        let (id, result) = self.send(from, 60);
        assert!(matches!(result, Ok(_) | Err(SealError::Queued)));
        id
    }

    fn launch(&mut self, from: usize, datagram: Vec<u8>) {
        let mut chance = |per_mille: u32| self.rng.next_u32() % 1000 < per_mille;
        let id = self.in_datagram.remove(&datagram);
        if chance(self.link.loss) {
            self.lost.extend(id);
            return;
        }
        let copies = 1 + u32::from(chance(self.link.duplicate));
        for _ in 0..copies {
            let (low, high) = self.link.delay_ms;
            let delay = ms(low + self.rng.next_u64() % (high - low + 1));
            self.launched += 1;
            let at = self.now.boot + delay;
            self.flying.insert((at, self.launched), (1 - from, datagram.clone()));
        }
    }

    pub(crate) fn drain(&mut self, from: usize) {
        let mut out = [0; 2048];
        while let Some(transmit) = self.hosts[from].device.poll_transmit(self.now, &mut out) {
            self.hosts[from].sent_kinds.push((self.now, transmit.kind));
            self.launch(from, out[..transmit.len].to_vec());
        }
        let host = &mut self.hosts[from];
        while let Some(event) = host.device.poll_event() {
            host.events.push(event);
        }
    }

    /// Moves time to the next arrival or wake-up, but not past `until`. False if nothing is left before it.
    pub(crate) fn step(&mut self, until: Instant) -> bool {
        let arrival = self.flying.first_key_value().map(|((at, _), _)| *at);
        let wake = |net: &mut Self, n: usize| net.hosts[n].device.poll_timeout().map(|(at, _)| at);
        let wakes = [wake(self, 0), wake(self, 1)];
        let next = wakes.into_iter().chain([arrival]).flatten().min();
        let Some(next) = next.filter(|next| *next <= until) else {
            self.now = self.now + until.since(self.now.boot);
            return false;
        };
        self.now = self.now + next.since(self.now.boot);
        for n in 0..2 {
            let host = &mut self.hosts[n];
            if let Some((at, reason)) = host.device.poll_timeout()
                && at <= self.now.boot
            {
                *host.wakes.entry(reason).or_default() += 1;
                host.device.handle_timeout(self.now);
                self.drain(n);
            }
        }
        while let Some(entry) = self.flying.first_entry()
            && entry.key().0 <= self.now.boot
        {
            let (to, mut datagram) = entry.remove();
            let host = &mut self.hosts[to];
            match host.device.handle(self.now, source(1 - to as u8), &mut datagram) {
                Ok(Received::Data { packet, .. }) => {
                    *host.got.entry(packet_id(&datagram[packet])).or_default() += 1;
                }
                Ok(_) => {}
                Err(reason) => *host.drops.entry(reason).or_default() += 1,
            }
            self.drain(to);
        }
        true
    }

    pub(crate) fn run(&mut self, time: Duration) {
        let until = self.now.boot + time;
        while self.step(until) {}
    }

    /// Both sides hold a session made by one handshake that host 0 started.
    pub(crate) fn connect(&mut self) {
        self.post(0);
        self.run(ms(200));
        for host in &self.hosts {
            assert!(host.device.has_session(host.peer, self.now));
        }
    }
}
