//! What a device hears from the network and from its own host: STUN, WireGuard, whole datagrams, IP packets. See `fuzz.rs`
//! for the method.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bolero::check;
use warren_common::filter::{
    Action, DEFAULT_PROTOS, FilterDst, FilterRule, IpRange, PROTO_ICMP, PROTO_TCP, PROTO_UDP, PortRange,
    RuleId,
};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlSecretKey, NetmapSecretKey, ProbeSecretKey, WgSecretKey};
use warren_common::netmap::{Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::{NetmapUpdate, UpdateKind};
use warren_engine::engine::{Config, Engine};
use warren_engine::filter::{EndReason, Filter, MAX_OUTPUTS, Output, Verdict};
use warren_engine::flow::Direction;
use warren_engine::io::{Destination, LocalSocket, Outbox, Source, TunOut};
use warren_engine::netmap::Identity;
use warren_engine::packet::build::{self, MAX_ICMP_ERROR, Segment};
use warren_engine::packet::{Addrs, Packet, Selector, TCP_SYN};
use warren_engine::wg::{self, PeerHandle, Received};
use warren_netns_tests::fuzz::{corpus, inputs, pick, tamper};

const RELAY: RelayId = RelayId::from_bytes([9; 16]);
const MTU: u16 = 1_280;

fn start() -> Now {
    Now { boot: Instant::from_nanos(1_000_000_000_000), unix: UnixTime::from_secs(1_800_000_000) }
}

/// Only the asked server is believed, only once per question, and nonsense doesn't keep its answer out.
#[test]
fn stun_answers() {
    let honest = |txid: &[u8]| stun_answer(txid, 0x20, 0x2112, 0x2112_a442);
    let old = |txid: &[u8]| stun_answer(txid, 0x01, 0, 0);
    let seeds = corpus("stun_answers", vec![("xor_mapped", honest(&[7; 12])), ("mapped", old(&[7; 12]))]);
    check!().with_iterations(inputs(20)).for_each(|input: &[u8]| {
        let mut pair = Pair::new();
        let txid: Vec<u8> = pair.asked.first().map(|request| request[8..20].to_vec()).unwrap();
        let server = Source::Direct { socket: 0, remote: stun_server() };
        let stranger = Source::Direct { socket: 0, remote: SocketAddr::from(([203, 0, 113, 99], 3_478)) };
        let ours = |seed: &Vec<u8>| [&seed[..8], &txid, &seed[20..]].concat();
        let ours: Vec<Vec<u8>> = seeds.iter().map(ours).collect();
        pair.deliver(0, stranger, honest(&txid));
        for part in input.chunks(32).take(16) {
            pair.deliver(0, stranger, pick(part, &ours));
        }
        assert!(!pair.hosts[0].engine.status(pair.now).net.udp, "a stranger's answer was believed");
        for part in input.chunks(32).take(16) {
            pair.deliver(0, server, pick(part, &ours));
        }
        pair.deliver(0, server, honest(&txid));
        let net = pair.hosts[0].engine.status(pair.now).net;
        assert!(net.udp && net.ipv4.or(net.ipv6).is_some());
    });
}

/// A binding response (RFC 8489) that says 192.0.2.77:7777.
fn stun_answer(txid: &[u8], attribute: u8, port_mask: u16, addr_mask: u32) -> Vec<u8> {
    let mut answer = vec![1, 1, 0, 12, 0x21, 0x12, 0xa4, 0x42];
    answer.extend(txid);
    answer.extend([0, attribute, 0, 8, 0, 1]);
    answer.extend((7_777_u16 ^ port_mask).to_be_bytes());
    answer.extend((Ipv4Addr::new(192, 0, 2, 77).to_bits() ^ addr_mask).to_be_bytes());
    answer
}

/// Whatever is mixed into two devices' traffic, each packet arrives at most once and only as it was sent; and when the
/// attack is over, packets arrive.
#[test]
fn wireguard() {
    let seeds = corpus("wireguard", Tunnel::datagrams());
    check!().with_iterations(inputs(40)).for_each(|input: &[u8]| {
        let mut tunnel = Tunnel::new();
        let mut pool = seeds.clone();
        for edit in input.chunks(12).take(64) {
            let (to, which) = (usize::from(edit[0] & 1), edit.get(1).copied().unwrap_or(0));
            match edit[0] >> 1 & 7 {
                0 => tunnel.send(to),
                1 => {
                    tunnel.devices[to].initiate(tunnel.peers[to], tunnel.now);
                }
                2 => tunnel.wait(Duration::from_millis(100 * u64::from(which))),
                3 => tunnel.deliver(to, edit.to_vec()),
                // Held back: what was sent arrives late, tampered with or more than once.
                4 => pool.extend(tunnel.take(to)),
                _ => tunnel
                    .deliver(to, tamper(&pool[usize::from(which) % pool.len()], &edit[2.min(edit.len())..])),
            }
            if edit[0] & 0x80 == 0 {
                pool.extend(tunnel.carry());
                pool.truncate(256);
            }
        }
        for _ in 0..100 {
            tunnel.wait(Duration::from_secs(1));
            tunnel.carry();
            if tunnel.devices.iter().zip(tunnel.peers).all(|(d, peer)| d.has_session(peer, tunnel.now)) {
                break;
            }
            tunnel.send(0);
            tunnel.carry();
        }
        for from in [0, 1] {
            let before = tunnel.arrived;
            tunnel.send(from);
            tunnel.carry();
            assert!(tunnel.arrived > before, "packets no longer arrive");
        }
    });
}

/// Two WireGuard devices and what is under way between them.
struct Tunnel {
    devices: [wg::Device; 2],
    peers: [PeerHandle; 2],
    now: Now,
    next: u64,
    /// Packets that a device has sent and the other has not received.
    under_way: [BTreeSet<Vec<u8>>; 2],
    wire: VecDeque<(usize, Vec<u8>)>,
    arrived: u64,
}

impl Tunnel {
    fn new() -> Self {
        let secrets = [[1; 32], [2; 32]].map(WgSecretKey::from_bytes);
        let mut devices = [0, 1].map(|n| wg::Device::new(secrets[n].clone(), [3 + n as u8; 32], 0));
        let peers = [0, 1].map(|n: usize| devices[n].add_peer(secrets[1 - n].public(), None, None).unwrap());
        let (next, arrived) = (0, 0);
        let under_way = [BTreeSet::new(), BTreeSet::new()];
        Self { devices, peers, now: start(), next, under_way, wire: VecDeque::new(), arrived }
    }

    /// One datagram of each kind between two such devices.
    fn datagrams() -> Vec<(&'static str, Vec<u8>)> {
        let mut tunnel = Self::new();
        tunnel.send(0);
        let seen = tunnel.carry();
        let kind = |kind: u8| seen.iter().find(|d| d[0] == kind).unwrap().clone();
        vec![("initiation", kind(1)), ("response", kind(2)), ("data", kind(4))]
    }

    fn send(&mut self, from: usize) {
        self.next += 1;
        let mut packet = vec![0x45; 40];
        packet[2..4].copy_from_slice(&40_u16.to_be_bytes());
        packet[20..28].copy_from_slice(&self.next.to_be_bytes());
        let mut out = [0; 256];
        if let Ok(len) = self.devices[from].seal(self.peers[from], self.now, &packet, &mut out) {
            self.wire.push_back((1 - from, out[..len].to_vec()));
        }
        self.under_way[from].insert(packet);
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        self.devices.iter_mut().for_each(|d| d.handle_timeout(self.now));
    }

    fn poll(&mut self) {
        let mut out = [0; 256];
        for from in [0, 1] {
            while let Some(transmit) = self.devices[from].poll_transmit(self.now, &mut out) {
                let to = match transmit.to {
                    // The attacker is not at any address.
                    wg::Destination::Reply { source, .. } if source != source_of(1 - from) => continue,
                    _ => 1 - from,
                };
                self.wire.push_back((to, out[..transmit.len].to_vec()));
            }
            while self.devices[from].poll_event().is_some() {}
        }
    }

    /// What is on the wire to `to`.
    fn take(&mut self, to: usize) -> Vec<Vec<u8>> {
        self.poll();
        let (taken, rest) = self.wire.drain(..).partition(|(at, _)| *at == to);
        self.wire = rest;
        let taken: VecDeque<(usize, Vec<u8>)> = taken;
        taken.into_iter().map(|(_, datagram)| datagram).collect()
    }

    /// Carries everything until all is quiet; returns the datagrams.
    fn carry(&mut self) -> Vec<Vec<u8>> {
        let mut seen = Vec::new();
        self.poll();
        while let Some((to, datagram)) = self.wire.pop_front() {
            assert!(seen.len() < 1_000, "two devices talk for ever");
            seen.push(datagram.clone());
            self.handle(to, source_of(1 - to), datagram);
            self.poll();
        }
        seen
    }

    /// From the attacker.
    fn deliver(&mut self, to: usize, datagram: Vec<u8>) {
        self.handle(to, source_of(7), datagram);
    }

    fn handle(&mut self, to: usize, from: Source, mut datagram: Vec<u8>) {
        if let Ok(Received::Data { packet, .. }) = self.devices[to].handle(self.now, from, &mut datagram) {
            let sent = self.under_way[1 - to].remove(&datagram[packet]);
            assert!(sent, "a packet that nobody sent, or that has arrived before");
            self.arrived += 1;
        }
    }
}

fn source_of(host: usize) -> Source {
    Source::Direct { socket: 0, remote: SocketAddr::from(([192, 0, 2, host as u8], 40_000)) }
}

/// The same for whole engines, from every source a datagram can claim: what reaches the TUN is what the peer sent.
#[test]
fn datagrams() {
    let seeds = corpus("datagrams", Pair::datagrams());
    check!().with_iterations(inputs(40)).for_each(|input: &[u8]| {
        let mut pair = Pair::new();
        pair.send(0);
        pair.carry();
        let mut pool: Vec<Vec<u8>> = seeds.iter().chain(&pair.seen).cloned().collect();
        for edit in input.chunks(12).take(64) {
            let (to, which) = (usize::from(edit[0] & 1), edit.get(1).copied().unwrap_or(0));
            let peer = device(1 - to);
            let source = match edit[0] >> 1 & 3 {
                0 => Source::Direct { socket: which % 3, remote: pair.hosts[1 - to].addr },
                1 => Source::Direct { socket: 0, remote: SocketAddr::from(([198, 51, 100, which], 9)) },
                2 => Source::Relay {
                    relay: RELAY,
                    device: if which > 9 { peer } else { DeviceId::from_bytes([which; 16]) },
                },
                _ => Source::Signal { device: peer },
            };
            let forged = tamper(&pool[usize::from(which) % pool.len()], &edit[2.min(edit.len())..]);
            pair.deliver(to, source, if edit[0] & 0x40 == 0 { forged } else { edit.to_vec() });
            if edit[0] & 0x20 != 0 {
                pair.send(to);
            }
            if edit[0] & 0x10 != 0 {
                pair.wait(Duration::from_millis(50 * u64::from(which)));
            }
            if edit[0] & 0x80 == 0 {
                pair.carry();
                pool.extend(pair.seen.drain(..).filter(|d| d.len() < 1_500));
                pool.truncate(256);
            }
        }
        for n in [0, 1] {
            let status = pair.hosts[n].engine.status(pair.now);
            assert_eq!(status.peers.len(), 1, "{status:?}");
        }
    });
}

struct Host {
    engine: Engine,
    addr: SocketAddr,
}

/// Two engines that may reach each other, directly and through a relay.
struct Pair {
    hosts: [Host; 2],
    now: Now,
    next: u32,
    under_way: [BTreeSet<Vec<u8>>; 2],
    wire: VecDeque<(usize, Source, Vec<u8>)>,
    /// Datagrams that were carried.
    seen: Vec<Vec<u8>>,
    /// STUN requests, which nobody answers.
    asked: Vec<Vec<u8>>,
    arrived: u64,
}

impl Pair {
    fn new() -> Self {
        let hosts = [0, 1]
            .map(|n| Host { engine: engine(n), addr: SocketAddr::from(([192, 0, 2, n as u8 + 1], 51_820)) });
        let under_way = [BTreeSet::new(), BTreeSet::new()];
        let (wire, seen, asked) = (VecDeque::new(), Vec::new(), Vec::new());
        let mut pair = Self { hosts, now: start(), next: 0, under_way, wire, seen, asked, arrived: 0 };
        for n in [0, 1] {
            let now = pair.now;
            let Host { engine, addr } = &mut pair.hosts[n];
            engine.handle_interfaces(now, &[LocalSocket { id: 0, addr: *addr }]);
            engine.handle_relay_state(now, RELAY, true);
            engine.handle_control_state(now, true);
            let pending = engine.check_update(now, &update(n).sign(&netmap_key())).unwrap();
            assert!(engine.apply_update(now, pending));
            pair.drain(n);
        }
        pair
    }

    /// One datagram of each kind between two such engines.
    fn datagrams() -> Vec<(&'static str, Vec<u8>)> {
        let mut pair = Self::new();
        pair.send(0);
        pair.carry();
        assert_eq!(pair.arrived, 1);
        let kind = |first: u8| pair.seen.iter().find(|d| d[0] == first).unwrap().clone();
        vec![("initiation", kind(1)), ("response", kind(2)), ("data", kind(4)), ("probe", kind(0xf1))]
    }

    fn send(&mut self, from: usize) {
        self.next += 1;
        let (src, dst) = (overlay(from), overlay(1 - from));
        let packet = udp(src, dst, &self.next.to_be_bytes());
        let mut out = Outbox::new();
        self.hosts[from].engine.handle_tun(self.now, &packet, &mut out);
        self.under_way[from].insert(packet);
        self.transmit(from, &out);
        self.drain(from);
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        for n in [0, 1] {
            self.hosts[n].engine.handle_timeout(self.now);
            self.drain(n);
        }
    }

    fn drain(&mut self, n: usize) {
        let (mut out, mut tun) = (Outbox::new(), TunOut::new(0));
        loop {
            let more = self.hosts[n].engine.poll_transmit(self.now, &mut out);
            self.transmit(n, &out);
            out.clear();
            if !more {
                break;
            }
        }
        while self.hosts[n].engine.poll_tun(&mut tun) {
            tun.clear();
        }
        while self.hosts[n].engine.poll_event().is_some() {}
    }

    fn transmit(&mut self, from: usize, out: &Outbox) {
        for (to, bytes) in out.datagrams() {
            let other = 1 - from;
            let source = match to {
                Destination::Direct { remote, .. } if remote == stun_server() => {
                    self.asked.push(bytes.to_vec());
                    continue;
                }
                Destination::Direct { remote, .. } if remote == self.hosts[other].addr => {
                    Source::Direct { socket: 0, remote: self.hosts[from].addr }
                }
                // To where the attacker pretends to be.
                Destination::Direct { .. } => continue,
                Destination::Relay { device: to, .. } if to == device(other) => {
                    Source::Relay { relay: RELAY, device: device(from) }
                }
                Destination::Relay { .. } => continue,
            };
            self.wire.push_back((other, source, bytes.to_vec()));
        }
    }

    fn carry(&mut self) {
        for _ in 0..1_000 {
            let Some((to, source, bytes)) = self.wire.pop_front() else { return };
            self.seen.push(bytes.clone());
            self.deliver(to, source, bytes);
        }
        panic!("two engines talk for ever");
    }

    fn deliver(&mut self, to: usize, source: Source, mut bytes: Vec<u8>) {
        let mut tun = TunOut::new(0);
        self.hosts[to].engine.handle_datagram(self.now, source, &mut bytes, 0, &mut tun);
        for packet in tun.iter() {
            assert!(self.under_way[1 - to].remove(packet), "nobody sent this, or it has arrived before");
            self.arrived += 1;
        }
        self.drain(to);
    }
}

fn device(n: usize) -> DeviceId {
    DeviceId::from_bytes([n as u8 + 1; 16])
}

fn overlay(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, n as u8 + 1)
}

fn stun_server() -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 1], 3_478))
}

fn netmap_key() -> NetmapSecretKey {
    NetmapSecretKey::from_bytes([10; 32])
}

fn control_key(n: usize) -> ControlSecretKey {
    ControlSecretKey::from_bytes([20 + n as u8; 32])
}

fn wg_key(n: usize) -> WgSecretKey {
    WgSecretKey::from_bytes([30 + n as u8; 32])
}

fn probe_key(n: usize) -> ProbeSecretKey {
    ProbeSecretKey::from_bytes([40 + n as u8; 32])
}

fn engine(n: usize) -> Engine {
    Engine::new(Config {
        identity: Identity {
            network: NetworkId::from_bytes([1; 16]),
            device: device(n),
            control: control_key(n).public(),
            netmap_key: netmap_key().public(),
            epoch: 1,
        },
        wg: wg_key(n),
        probe: probe_key(n),
        seed: [n as u8 + 1; 32],
        boot_id: [1; 16],
        mtu: MTU,
        handshake_floor: UnixTime::default(),
    })
}

fn update(n: usize) -> NetmapUpdate {
    let other = 1 - n;
    let open = |src: usize, dst: usize| allow(overlay(src).into(), overlay(dst).into());
    let peer = Peer {
        id: device(other),
        wg: wg_key(other).public(),
        probe: probe_key(other).public(),
        addrs: vec![overlay(other).into()],
        routes: Vec::new(),
        name: Some("peer".into()),
        user: None,
        tags: Vec::new(),
        home_relay: Some(RELAY),
        key_signature: None,
    };
    let relay = Relay {
        id: RELAY,
        name: "relay".into(),
        addrs: Vec::new(),
        stun: vec![stun_server()],
        cert_sha256: [0; 32],
        peer: false,
    };
    let netmap = Netmap {
        network: Network {
            id: NetworkId::from_bytes([1; 16]),
            name: "fuzz".into(),
            ipv4: "100.64.0.0/10".parse().unwrap(),
            ipv6: "fd00:1::/48".parse().unwrap(),
        },
        device: SelfDevice {
            id: device(n),
            name: "self".into(),
            addrs: vec![overlay(n).into()],
            user: None,
            tags: Vec::new(),
            attrs: Vec::new(),
        },
        peers: [(peer.id, peer.into())].into(),
        ingress: [open(other, n)].into(),
        egress: [open(n, other)].into(),
        relays: [(RELAY, relay)].into(),
        apps: [].into(),
    };
    NetmapUpdate {
        network: netmap.network.id,
        device: device(n),
        device_key: control_key(n).public(),
        epoch: 1,
        from: 0,
        to: 1,
        hash: netmap.hash(),
        lease_ms: 86_400_000,
        issued: start().unix,
        kind: UpdateKind::Snapshot(Box::new(netmap)),
    }
}

/// A rule that opens everything between two addresses.
fn allow(src: IpAddr, dst: IpAddr) -> FilterRule {
    rule(vec![src.into()], vec![dst.into()], DEFAULT_PROTOS.to_vec())
}

fn rule(src: Vec<IpRange>, dst: Vec<IpRange>, protos: Vec<u8>) -> FilterRule {
    FilterRule {
        id: RuleId(1),
        origin: "grants[0] line 1".into(),
        action: Action::Allow,
        staged: false,
        src,
        dst: dst.into_iter().map(|net| FilterDst { net, ports: PortRange::ALL }).collect(),
        protos,
        active: None,
    }
}

/// Packets inside the tunnel: headers, options, extensions, fragments, quotations. What can't be read is dropped; what
/// passes, passes by a rule only; and what the filter says itself can be read.
#[test]
fn ip_packets() {
    let seeds = corpus("ip_packets", packets());
    check!().with_iterations(inputs(2)).for_each(|input: &[u8]| {
        judge(input);
        judge(&pick(input, &seeds));
    });
}

fn judge(bytes: &[u8]) {
    let parsed = Packet::parse(bytes);
    if let Ok(packet) = &parsed {
        assert!(bytes.starts_with(packet.bytes));
        assert_eq!(Packet::parse(packet.bytes).as_ref(), Ok(packet));
        assert!(packet.fragment.is_none_or(|f| f.offset < f.end));
        let quoted = packet.quoted();
        assert!(quoted.is_none_or(|q| q.addrs.src().is_ipv4() == q.addrs.dst().is_ipv4()));
    }
    let everything = || {
        let all = vec![IpRange::ALL_V4, IpRange::ALL_V6];
        vec![rule(all.clone(), all, (0..=u8::MAX).collect())]
    };
    let now = start();
    for direction in [Direction::Egress, Direction::Ingress] {
        let judge = |filter: &mut Filter| match direction {
            Direction::Egress => filter.egress(now, bytes, 1),
            Direction::Ingress => filter.ingress(now, bytes, 1),
        };
        let mut filter = Filter::new([1, 2]);
        assert!(matches!(judge(&mut filter), Verdict::Drop(_)), "nothing allows it");
        read_outputs(&mut filter);
        filter.set_rules(everything(), everything(), 1, now);
        let verdict = judge(&mut filter);
        assert!(parsed.is_ok() || verdict != Verdict::Pass);
        for ended in filter.close_all(EndReason::Stopped, now) {
            if let Some(notice) = ended.notice() {
                assert!(Packet::parse(&notice).is_ok());
            }
        }
        assert!(matches!(judge(&mut filter), Verdict::Drop(_)), "nothing allows it any more");
        read_outputs(&mut filter);
    }
}

fn read_outputs(filter: &mut Filter) {
    let mut count = 0;
    while let Some(output) = filter.poll_output() {
        count += 1;
        let (Output::Local(packet) | Output::Peer { packet, .. }) = output;
        assert!(Packet::parse(&packet).is_ok() && packet.len() <= MAX_ICMP_ERROR);
    }
    assert!(count <= MAX_OUTPUTS);
}

/// Good packets of every kind that the parser tells apart.
fn packets() -> Vec<(&'static str, Vec<u8>)> {
    let v4 = Addrs::V4 { src: overlay(0), dst: overlay(1) };
    let v6 = Addrs::V6 {
        src: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
        dst: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
    };
    let syn = |addrs| {
        Segment { addrs, src_port: 40_000, dst_port: 443, seq: 7, ack: None, flags: TCP_SYN }.to_bytes()
    };
    let echo = |addrs, proto| build::stub(addrs, proto, Selector::Echo { request: true, id: 9 });
    // A router alert and two paddings before the same segment.
    let mut options = syn(v4);
    options[0] = 0x47;
    options[3] += 8;
    options.splice(20..20, [148, 4, 0, 0, 1, 1, 1, 0]);
    // Hop-by-hop and destination options before it.
    let mut extensions = syn(v6);
    extensions[5] += 16;
    extensions[6] = 0;
    extensions.splice(40..40, [60, 0, 5, 2, 0, 0, 1, 0, PROTO_TCP, 0, 1, 4, 0, 0, 0, 0]);
    let mut first_v4 = udp(overlay(0), overlay(1), &[5; 24]);
    first_v4[6] = 0x20;
    let mut later_v4 = first_v4.clone();
    later_v4[6..8].copy_from_slice(&4_u16.to_be_bytes());
    let mut first_v6 = syn(v6);
    first_v6[5] = 24 + 8;
    first_v6[6] = 44;
    first_v6.splice(40..40, [PROTO_TCP, 0, 0, 1, 0, 0, 0, 8]);
    first_v6.extend([0; 4]);
    vec![
        ("tcp_v4", syn(v4)),
        ("tcp_v6", syn(v6)),
        ("udp_v4", udp(overlay(0), overlay(1), b"payload")),
        ("echo_v4", echo(v4, PROTO_ICMP)),
        ("echo_v6", echo(v6, 58)),
        ("error_v4", build::prohibited(v4, &syn(v4.reversed()))),
        ("error_v6", build::prohibited(v6, &syn(v6.reversed()))),
        ("sctp_v4", build::stub(v4, 132, Selector::Ports { src: 1, dst: 2 })),
        ("gre_v6", build::stub(v6, 47, Selector::None)),
        ("options_v4", options),
        ("extensions_v6", extensions),
        ("first_fragment_v4", first_v4),
        ("later_fragment_v4", later_v4),
        ("first_fragment_v6", first_v6),
    ]
}

#[test]
fn the_packets_to_tamper_with_are_good() {
    for (name, packet) in packets() {
        let read = Packet::parse(&packet);
        assert!(read.is_ok_and(|p| p.bytes.len() == packet.len()), "{name}: {read:?}");
    }
}

/// A UDP packet from port 4 000 to port 5 000.
fn udp(src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let ports = Selector::Ports { src: 4_000, dst: 5_000 };
    let mut packet = build::stub(Addrs::V4 { src, dst }, PROTO_UDP, ports);
    packet.extend(payload);
    let total = packet.len() as u16;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[24..26].copy_from_slice(&(total - 20).to_be_bytes());
    packet
}
