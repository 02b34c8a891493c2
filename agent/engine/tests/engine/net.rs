//! A small internet in virtual time: engines, NATs, one relay, one coordinator's signal channel and STUN.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use warren_common::filter::{
    Action, FilterDst, FilterRule, IpRange, PROTO_TCP, PROTO_UDP, PortRange, RuleId,
};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlSecretKey, NetmapSecretKey, ProbeSecretKey, WgSecretKey};
use warren_common::netmap::{Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::{NetmapUpdate, Signed, UpdateKind};
use warren_engine::engine::{Config, Engine};
use warren_engine::event::Event;
use warren_engine::io::{Destination, LocalSocket, Outbox, Source, TunOut};
use warren_engine::netmap::Identity;
use warren_engine::offload::vnet::{Gso, GsoKind, Header, PartialChecksum};
use warren_engine::packet::{Addrs, build};

pub(crate) const DIRECT_DELAY: Duration = Duration::from_millis(10);
pub(crate) const RELAY_DELAY: Duration = Duration::from_millis(15);
pub(crate) const SIGNAL_DELAY: Duration = Duration::from_millis(40);
pub(crate) const RELAY: RelayId = RelayId::from_bytes([9; 16]);
pub(crate) const LEASE: Duration = Duration::from_secs(24 * 3600);
const NAT_EXPIRY: Duration = Duration::from_secs(30);
const EPOCH: i64 = 1_800_000_000;

/// How a NAT maps; all filter by address and port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behind {
    Nothing,
    PortRestricted,
    Symmetric,
}

pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) device: DeviceId,
    pub(crate) overlay: Ipv4Addr,
    pub(crate) local: SocketAddr,
    pub(crate) keys: Keys,
    pub(crate) relay_up: bool,
    pub(crate) control_up: bool,
    pub(crate) events: Vec<Event>,
    /// Packets that came out of the TUN.
    pub(crate) got: Vec<Vec<u8>>,
    pub(crate) wakes: u64,
    behind: Behind,
    public: IpAddr,
    /// (our port, peer if symmetric) -> public port.
    maps: BTreeMap<(SocketAddr, Option<SocketAddr>), (u16, Instant)>,
    /// Who may answer to a public port.
    allowed: BTreeMap<(u16, SocketAddr), Instant>,
    next_port: u16,
}

enum Arrival {
    Udp { from: SocketAddr, to: SocketAddr, bytes: Vec<u8> },
    Relay { from: DeviceId, to: DeviceId, bytes: Vec<u8> },
    Signal { from: DeviceId, to: DeviceId, bytes: Vec<u8> },
}

pub(crate) struct Net {
    pub(crate) now: Now,
    pub(crate) nodes: Vec<Node>,
    pub(crate) root: NetmapSecretKey,
    pub(crate) netmaps: Vec<Netmap>,
    pub(crate) revisions: Vec<u64>,
    /// UDP between these hosts is lost.
    pub(crate) cut: BTreeSet<(usize, usize)>,
    /// Datagrams given to the relay while it was up.
    pub(crate) relayed: u64,
    /// Datagrams from host to host; questions to STUN servers are none.
    pub(crate) direct: u64,
    /// Every datagram that engines sent.
    pub(crate) sent: Vec<Vec<u8>>,
    queue: BTreeMap<(Instant, u64), Arrival>,
    seq: u64,
}

pub(crate) fn stun_servers() -> [SocketAddr; 2] {
    [SocketAddr::from(([198, 51, 100, 1], 3478)), SocketAddr::from(([198, 51, 100, 2], 3478))]
}

/// One rule that opens everything from `src` to `dst`.
pub(crate) fn allow(id: u64, src: Ipv4Addr, dst: Ipv4Addr) -> FilterRule {
    FilterRule {
        id: RuleId(id),
        origin: format!("grants[{id}]"),
        action: Action::Allow,
        staged: false,
        src: vec![IpRange::from(IpAddr::from(src))],
        dst: vec![FilterDst { net: IpRange::from(IpAddr::from(dst)), ports: PortRange::ALL }],
        protos: Vec::new(),
        active: None,
    }
}

pub(crate) fn overlay(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, n as u8 + 1)
}

pub(crate) fn device(n: usize) -> DeviceId {
    DeviceId::from_bytes([n as u8 + 1; 16])
}

fn network() -> Network {
    Network {
        id: NetworkId::from_bytes([7; 16]),
        name: "test".into(),
        ipv4: "100.64.0.0/10".parse().unwrap(),
        ipv6: "fd00:1::/48".parse().unwrap(),
    }
}

impl Net {
    /// One node per entry; everybody may reach everybody, the relay is up everywhere, the control sessions too.
    pub(crate) fn new(behind: &[Behind]) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let root = NetmapSecretKey::generate(&mut rng);
        let now = Now { boot: Instant::ZERO + Duration::from_secs(100), unix: UnixTime::from_secs(EPOCH) };
        let nodes: Vec<Node> =
            behind.iter().enumerate().map(|(n, behind)| Node::new(n, *behind, &root, &mut rng)).collect();
        let netmaps = (0..nodes.len()).map(|n| netmap_of(n, &nodes)).collect();
        let revisions = vec![0; nodes.len()];
        let mut net = Self {
            now,
            nodes,
            root,
            netmaps,
            revisions,
            cut: BTreeSet::new(),
            relayed: 0,
            direct: 0,
            sent: Vec::new(),
            queue: BTreeMap::new(),
            seq: 0,
        };
        for n in 0..net.nodes.len() {
            let now = net.now;
            let node = &mut net.nodes[n];
            node.engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: node.local }]);
            node.engine.handle_relay_state(now, RELAY, true);
            node.engine.handle_control_state(now, true);
            net.push_netmap(n);
        }
        net.run(Duration::from_secs(1));
        net
    }

    pub(crate) fn update(&self, n: usize, kind: UpdateKind, from: u64, to: u64) -> NetmapUpdate {
        NetmapUpdate {
            network: self.netmaps[n].network.id,
            device: self.nodes[n].device,
            device_key: self.nodes[n].keys.0.public(),
            epoch: 1,
            from,
            to,
            hash: self.netmaps[n].hash(),
            lease_ms: LEASE.as_millis() as u64,
            issued: self.now.unix,
            kind,
        }
    }

    pub(crate) fn snapshot(&self, n: usize, to: u64) -> Signed {
        let netmap = Box::new(self.netmaps[n].clone());
        self.update(n, UpdateKind::Snapshot(netmap), 0, to).sign(&self.root)
    }

    /// Sends node `n` its netmap as a new revision.
    pub(crate) fn push_netmap(&mut self, n: usize) {
        self.revisions[n] += 1;
        let signed = self.snapshot(n, self.revisions[n]);
        let now = self.now;
        let node = &mut self.nodes[n];
        let pending = node.engine.check_update(now, &signed).expect("a good update");
        assert!(node.engine.apply_update(now, pending));
        self.drain(n);
    }

    /// A UDP packet from one node's application to another's.
    pub(crate) fn send(&mut self, from: usize, to: usize, payload: &[u8]) {
        let packet = udp(self.nodes[from].overlay, self.nodes[to].overlay, 4_000, 5_000, payload);
        self.send_packet(from, &packet);
    }

    pub(crate) fn send_packet(&mut self, from: usize, packet: &[u8]) {
        let mut out = Outbox::new();
        let now = self.now;
        self.nodes[from].engine.handle_tun(now, packet, &mut out);
        self.transmit(from, &out);
        self.drain(from);
    }

    /// Everything that happens in the next `time`.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now.boot + time;
        let mut steps = 0;
        loop {
            steps += 1;
            assert!(steps < 200_000, "a storm of wake-ups");
            let arrival = self.queue.keys().next().map(|(at, _)| *at);
            let now = self.now;
            let timers = self.nodes.iter_mut().filter_map(|n| n.engine.poll_timeout(now)).map(|(at, _)| at);
            let Some(next) = arrival.into_iter().chain(timers).min().filter(|at| *at <= end) else { break };
            self.advance(next);
            while let Some((key, _)) = self.queue.first_key_value().filter(|((at, _), _)| *at <= next) {
                let key = *key;
                let arrival = self.queue.remove(&key).unwrap();
                self.arrive(arrival);
            }
            for n in 0..self.nodes.len() {
                let now = self.now;
                if self.nodes[n].engine.poll_timeout(now).is_some_and(|(at, _)| at <= next) {
                    self.nodes[n].wakes += 1;
                    self.nodes[n].engine.handle_timeout(now);
                    self.drain(n);
                }
            }
        }
        self.advance(end);
    }

    fn advance(&mut self, to: Instant) {
        let step = to.since(self.now.boot);
        self.now = self.now + step;
    }

    /// After any input to node `n`.
    pub(crate) fn drain(&mut self, n: usize) {
        let mut out = Outbox::new();
        let mut tun = TunOut::new(0);
        let now = self.now;
        loop {
            let more = self.nodes[n].engine.poll_transmit(now, &mut out);
            self.transmit(n, &out);
            out.clear();
            if !more {
                break;
            }
        }
        while {
            let more = self.nodes[n].engine.poll_tun(&mut tun);
            self.nodes[n].got.extend(tun.iter().map(<[u8]>::to_vec));
            tun.clear();
            more
        } {}
        while let Some(event) = self.nodes[n].engine.poll_event() {
            if let Event::Signal { device, sealed } = &event
                && self.nodes[n].control_up
            {
                let from = self.nodes[n].device;
                self.later(SIGNAL_DELAY, Arrival::Signal { from, to: *device, bytes: sealed.clone() });
            }
            self.nodes[n].events.push(event);
        }
    }

    fn transmit(&mut self, n: usize, out: &Outbox) {
        for (to, bytes) in out.datagrams() {
            self.sent.push(bytes.to_vec());
            match to {
                Destination::Direct { socket, remote } => {
                    assert_eq!(socket, 0);
                    if !stun_servers().contains(&remote) {
                        self.direct += 1;
                    }
                    let from = self.nodes[n].translate(self.now.boot, remote);
                    self.later(DIRECT_DELAY, Arrival::Udp { from, to: remote, bytes: bytes.to_vec() });
                }
                Destination::Relay { relay, device } => {
                    assert_eq!(relay, RELAY);
                    if self.nodes[n].relay_up {
                        self.relayed += 1;
                        let from = self.nodes[n].device;
                        self.later(RELAY_DELAY, Arrival::Relay { from, to: device, bytes: bytes.to_vec() });
                    }
                }
            }
        }
    }

    fn later(&mut self, delay: Duration, arrival: Arrival) {
        self.seq += 1;
        self.queue.insert((self.now.boot + delay, self.seq), arrival);
    }

    fn arrive(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Udp { from, to, bytes } if stun_servers().contains(&to) => {
                self.answer_stun(from, to, &bytes)
            }
            Arrival::Udp { from, to, bytes } => {
                let now = self.now.boot;
                let Some(n) = (0..self.nodes.len()).find(|n| self.nodes[*n].accepts(now, from, to)) else {
                    return;
                };
                let sender = self.nodes.iter().position(|node| node.owns(from));
                if sender.is_some_and(|s| self.cut.contains(&(s.min(n), s.max(n)))) {
                    return;
                }
                self.deliver(n, Source::Direct { socket: 0, remote: from }, bytes);
            }
            Arrival::Relay { from, to, bytes } => {
                if let Some(n) = self.nodes.iter().position(|node| node.device == to && node.relay_up) {
                    self.deliver(n, Source::Relay { relay: RELAY, device: from }, bytes);
                }
            }
            Arrival::Signal { from, to, bytes } => {
                if let Some(n) = self.nodes.iter().position(|node| node.device == to && node.control_up) {
                    self.deliver(n, Source::Signal { device: from }, bytes);
                }
            }
        }
    }

    pub(crate) fn deliver(&mut self, n: usize, from: Source, mut bytes: Vec<u8>) {
        let mut tun = TunOut::new(0);
        let now = self.now;
        self.nodes[n].engine.handle_datagram(now, from, &mut bytes, 0, &mut tun);
        self.nodes[n].got.extend(tun.iter().map(<[u8]>::to_vec));
        self.drain(n);
    }

    fn answer_stun(&mut self, from: SocketAddr, server: SocketAddr, request: &[u8]) {
        if request.len() != 20 {
            return; // a probe that a replay from this address brought about
        }
        let SocketAddr::V4(seen) = from else { panic!("IPv4 only") };
        let mut answer = vec![1, 1, 0, 12];
        answer.extend(&request[4..20]);
        answer.extend([0, 0x20, 0, 8, 0, 1]);
        answer.extend((seen.port() ^ 0x2112).to_be_bytes());
        answer.extend((seen.ip().to_bits() ^ 0x2112_a442).to_be_bytes());
        self.later(DIRECT_DELAY, Arrival::Udp { from: server, to: from, bytes: answer });
    }

    pub(crate) fn set_relay(&mut self, n: usize, up: bool) {
        let now = self.now;
        self.nodes[n].relay_up = up;
        self.nodes[n].engine.handle_relay_state(now, RELAY, up);
        self.drain(n);
    }

    pub(crate) fn set_control(&mut self, n: usize, up: bool) {
        let now = self.now;
        self.nodes[n].control_up = up;
        self.nodes[n].engine.handle_control_state(now, up);
        self.drain(n);
    }

    /// Node `n` moves to another network.
    pub(crate) fn roam(&mut self, n: usize) {
        let now = self.now;
        let node = &mut self.nodes[n];
        node.local = SocketAddr::from(([10, n as u8, 77, 2], 51_820));
        node.public = if node.behind == Behind::Nothing {
            node.local.ip()
        } else {
            [203, 0, 113, 100 + n as u8].into()
        };
        if node.behind == Behind::Nothing {
            node.local = SocketAddr::from(([203, 0, 113, 100 + n as u8], 51_820));
            node.public = node.local.ip();
        }
        node.maps.clear();
        node.allowed.clear();
        node.engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: node.local }]);
        self.drain(n);
    }

    pub(crate) fn path_kind(&self, n: usize, to: usize) -> &'static str {
        let status = self.nodes[n].engine.status(self.now);
        let peer = status.peers.iter().find(|p| p.id == self.nodes[to].device);
        let known = ["direct", "relay", "none"];
        known.into_iter().find(|kind| peer.is_some_and(|p| p.path.kind == *kind)).unwrap_or("unknown")
    }

    pub(crate) fn drops(&self, n: usize, name: &str) -> u64 {
        *self.nodes[n].engine.status(self.now).drops.get(name).unwrap_or_else(|| panic!("no counter {name}"))
    }
}

impl Node {
    fn new(n: usize, behind: Behind, root: &NetmapSecretKey, rng: &mut ChaCha20Rng) -> Self {
        let keys =
            (ControlSecretKey::generate(rng), WgSecretKey::generate(rng), ProbeSecretKey::generate(rng));
        let public = IpAddr::from([203, 0, 113, n as u8 + 1]);
        let local = match behind {
            Behind::Nothing => SocketAddr::new(public, 51_820),
            Behind::PortRestricted | Behind::Symmetric => SocketAddr::from(([10, n as u8, 0, 2], 51_820)),
        };
        Self {
            engine: engine(n, &keys, root),
            device: device(n),
            overlay: overlay(n),
            local,
            keys,
            relay_up: true,
            control_up: true,
            events: Vec::new(),
            got: Vec::new(),
            wakes: 0,
            behind,
            public,
            maps: BTreeMap::new(),
            allowed: BTreeMap::new(),
            next_port: 20_000,
        }
    }

    fn translate(&mut self, now: Instant, remote: SocketAddr) -> SocketAddr {
        if self.behind == Behind::Nothing {
            return self.local;
        }
        let key = (self.local, (self.behind == Behind::Symmetric).then_some(remote));
        self.maps.retain(|_, (_, used)| now.since(*used) < NAT_EXPIRY);
        let next = &mut self.next_port;
        let (port, used) = self.maps.entry(key).or_insert_with(|| {
            *next += 1;
            (*next, now)
        });
        *used = now;
        self.allowed.insert((*port, remote), now);
        SocketAddr::new(self.public, *port)
    }

    fn accepts(&self, now: Instant, from: SocketAddr, to: SocketAddr) -> bool {
        if self.behind == Behind::Nothing {
            return to == self.local;
        }
        let fresh = |at: &Instant| now.since(*at) < NAT_EXPIRY;
        self.public == to.ip() && self.allowed.get(&(to.port(), from)).is_some_and(fresh)
    }

    fn owns(&self, addr: SocketAddr) -> bool {
        self.public == addr.ip()
    }
}

type Keys = (ControlSecretKey, WgSecretKey, ProbeSecretKey);

pub(crate) fn engine(n: usize, keys: &Keys, root: &NetmapSecretKey) -> Engine {
    engine_booted(n, keys, root, [1; 16])
}

pub(crate) fn engine_booted(n: usize, keys: &Keys, root: &NetmapSecretKey, boot_id: [u8; 16]) -> Engine {
    Engine::new(Config {
        identity: Identity {
            network: network().id,
            device: device(n),
            control: keys.0.public(),
            netmap_key: root.public(),
            epoch: 1,
        },
        wg: keys.1.clone(),
        probe: keys.2.clone(),
        seed: [n as u8 + 1; 32],
        boot_id,
        mtu: 1_280,
        handshake_floor: UnixTime::default(),
    })
}

fn netmap_of(n: usize, nodes: &[Node]) -> Netmap {
    let others = || nodes.iter().enumerate().filter(move |(m, _)| *m != n);
    let peer = |(m, node): (usize, &Node)| {
        let peer = Peer {
            id: node.device,
            wg: node.keys.1.public(),
            probe: node.keys.2.public(),
            addrs: vec![node.overlay.into()],
            routes: Vec::new(),
            name: Some(format!("node-{m}")),
            user: None,
            tags: vec!["tag:test".into()],
            home_relay: Some(RELAY),
            key_signature: None,
        };
        (node.device, peer.into())
    };
    let relay = Relay {
        id: RELAY,
        name: "relay".into(),
        addrs: Vec::new(),
        stun: stun_servers().to_vec(),
        cert_sha256: [0; 32],
        peer: false,
    };
    Netmap {
        network: network(),
        device: SelfDevice {
            id: nodes[n].device,
            name: format!("node-{n}"),
            addrs: vec![nodes[n].overlay.into()],
            user: None,
            tags: vec!["tag:test".into()],
            attrs: Vec::new(),
        },
        peers: others().map(peer).collect(),
        ingress: others().map(|(m, _)| allow(m as u64 + 1, overlay(m), overlay(n))).collect(),
        egress: others().map(|(m, _)| allow(100 + m as u64, overlay(n), overlay(m))).collect(),
        relays: [(RELAY, relay)].into(),
        apps: [].into(),
    }
}

/// An IPv4 UDP packet.
pub(crate) fn udp(src: Ipv4Addr, dst: Ipv4Addr, src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut transport = vec![0; 8];
    transport[..2].copy_from_slice(&src_port.to_be_bytes());
    transport[2..4].copy_from_slice(&dst_port.to_be_bytes());
    transport[4..6].copy_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    transport.extend(payload);
    let addrs = Addrs::new(src.into(), dst.into()).unwrap();
    let sum = build::transport_checksum(addrs, PROTO_UDP, &transport);
    transport[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, PROTO_UDP, 0, 0];
    packet[2..4].copy_from_slice(&(20 + transport.len() as u16).to_be_bytes());
    packet.extend(src.octets());
    packet.extend(dst.octets());
    let sum = build::checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(transport);
    packet
}

/// What one read of a TUN brings: a virtio header and `count` segments of `size` bytes in one IPv4 super-frame, with
/// the checksum left to be completed.
pub(crate) fn super_frame(src: Ipv4Addr, dst: Ipv4Addr, tcp: bool, count: usize, size: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..count * size).map(|i| (i * 7 / 3) as u8).collect();
    let mut transport = Vec::new();
    transport.extend(4_000u16.to_be_bytes());
    transport.extend(5_000u16.to_be_bytes());
    let (proto, kind, offset) = if tcp {
        transport.extend(1_000u32.to_be_bytes());
        transport.extend(1u32.to_be_bytes());
        transport.extend([5 << 4, 0x18, 1, 0, 0, 0, 0, 0]);
        (PROTO_TCP, GsoKind::Tcp4, 16)
    } else {
        transport.extend((8 + payload.len() as u16).to_be_bytes());
        transport.extend([0; 2]);
        (PROTO_UDP, GsoKind::Udp, 6)
    };
    let header_len = 20 + transport.len();
    transport.extend(payload);
    let pseudo = {
        // The sum of the pseudo-header alone, which is what a checksum over nothing else complements.
        let mut sum = u32::from(proto) + transport.len() as u32;
        for half in [src.to_bits() >> 16, src.to_bits() & 0xffff, dst.to_bits() >> 16, dst.to_bits() & 0xffff]
        {
            sum += half;
        }
        (sum & 0xffff) + (sum >> 16)
    };
    let pseudo = ((pseudo & 0xffff) + (pseudo >> 16)) as u16;
    transport[offset..offset + 2].copy_from_slice(&pseudo.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, proto, 0, 0];
    packet[2..4].copy_from_slice(&(20 + transport.len() as u16).to_be_bytes());
    packet.extend(src.octets());
    packet.extend(dst.octets());
    let sum = build::checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(transport);
    let header = Header {
        checksum: Some(PartialChecksum { start: 20, offset: offset as u16 }),
        gso: Some(Gso { kind, size: size as u16 }),
        header_len: header_len as u16,
    };
    let mut frame = header.to_bytes().to_vec();
    frame.extend(packet);
    frame
}
