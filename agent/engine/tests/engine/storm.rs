//! Everybody at once: a site's devices after a power cut, or all of a server's peers after it was away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use warren_common::filter::IpRange;
use warren_common::ids::DeviceId;
use warren_common::keys::{ProbeSecretKey, WgSecretKey};
use warren_common::netmap::Peer;
use warren_common::time::Now;
use warren_engine::engine::Engine;
use warren_engine::io::{Destination, Outbox, Source, TunOut};
use warren_engine::wg::{Device, MAX_FREE_BURST, PeerHandle};

use crate::net::{Behind, Net, RELAY, overlay, udp};

const PEERS: u32 = 1_000;
/// Datagrams that are taken before answers are sent, a count: those of a busy socket.
const TURN: usize = 32;
/// All of them, with time to be asked for cookies and to try again after five seconds.
const BOUND: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(10);

/// One of them: any WireGuard.
struct Client {
    device: Device,
    hub: PeerHandle,
    from: Source,
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(100, 65, 0, 1)) + n)
}

fn id(n: u32) -> DeviceId {
    let mut bytes = [5; 16];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    DeviceId::from_bytes(bytes)
}

/// A hub that lets them all in, and them. Every second one comes through the relay.
fn crowd() -> (Net, Vec<Client>) {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    let mut rng = ChaCha20Rng::seed_from_u64(2);
    let hub_key = net.nodes[0].keys.1.public();
    let model: Peer = net.netmaps[0].peers.values().next().unwrap().as_ref().clone();
    let mut clients = Vec::new();
    for n in 0..PEERS {
        let secret = WgSecretKey::generate(&mut rng);
        let peer = Peer {
            id: id(n),
            wg: secret.public(),
            probe: ProbeSecretKey::generate(&mut rng).public(),
            addrs: vec![address(n).into()],
            name: Some(format!("peer-{n}")),
            ..model.clone()
        };
        net.netmaps[0].peers.insert(peer.id, peer.into());
        let mut device = Device::new(secret, [n as u8; 32], 0);
        let hub = device.add_peer(hub_key, None, None).unwrap();
        let remote = SocketAddr::from(([198, 18, (n >> 8) as u8, n as u8], 51_820));
        let from = if n % 2 == 0 {
            Source::Direct { socket: 0, remote }
        } else {
            Source::Relay { relay: RELAY, device: id(n) }
        };
        clients.push(Client { device, hub, from });
    }
    let everybody = (0..PEERS).map(|n| IpRange::from(IpAddr::from(address(n))));
    let mut rule = net.netmaps[0].ingress.first().unwrap().clone();
    rule.src.extend(everybody);
    net.netmaps[0].ingress = [rule].into();
    net.push_netmap(0);
    net.drain(0);
    (net, clients)
}

fn client_at(to: Destination) -> Option<u32> {
    match to {
        Destination::Direct { remote: SocketAddr::V4(remote), .. } => match remote.ip().octets() {
            [198, 18, high, low] => Some(u32::from(high) << 8 | u32::from(low)),
            _ => None,
        },
        Destination::Relay { device, .. } => (0..PEERS).find(|n| id(*n) == device),
        Destination::Direct { .. } => None,
    }
}

/// Hands out what the hub has to say. Returns how many handshakes it answered.
fn answer(hub: &mut Engine, now: Now, clients: &mut [Client]) -> usize {
    let (mut out, mut answered) = (Outbox::new(), 0);
    loop {
        let more = hub.poll_transmit(now, &mut out);
        for (to, datagram) in out.datagrams() {
            // Probes are none of WireGuard's.
            let ([2..=4, 0, 0, 0, ..], Some(n)) = (datagram, client_at(to)) else { continue };
            answered += usize::from(datagram[0] == 2);
            let client = &mut clients[n as usize];
            let _ = client.device.handle(now, client.from, &mut datagram.to_vec());
        }
        out.clear();
        if !more {
            return answered;
        }
    }
}

#[test]
fn a_thousand_peers_that_call_at_once_all_get_through() {
    let (mut net, mut clients) = crowd();
    let hub = &mut net.nodes[0].engine;
    let (mut now, begin) = (net.now, net.now);
    for (n, client) in (0..).zip(&mut clients) {
        let packet = udp(address(n), overlay(0), 4_000, 5_000, &n.to_be_bytes());
        client.device.queue(client.hub, now, &packet).unwrap();
    }
    let (mut arrived, mut answered, mut tun) = (BTreeSet::new(), 0, TunOut::new(0));
    let mut waits = BTreeMap::new();
    while arrived.len() < PEERS as usize && now.boot < begin.boot + BOUND {
        let mut buffer = [0; 2_048];
        let mut turn = Vec::new();
        for client in &mut clients {
            client.device.handle_timeout(now);
            while let Some(sent) = client.device.poll_transmit(now, &mut buffer) {
                turn.push((client.from, buffer[..sent.len].to_vec()));
            }
        }
        for datagrams in turn.chunks_mut(TURN) {
            for (from, datagram) in datagrams {
                hub.handle_datagram(now, *from, datagram, 0, &mut tun);
                for packet in tun.iter() {
                    let n = u32::from_be_bytes(packet[28..32].try_into().unwrap());
                    arrived.insert(n);
                    waits.entry(n).or_insert(now.boot.since(begin.boot));
                }
                tun.clear();
            }
            answered += answer(hub, now, &mut clients);
        }
        while hub.poll_event().is_some() {}
        if hub.poll_timeout(now).is_some_and(|(at, _)| at <= now.boot) {
            hub.handle_timeout(now);
        }
        answered += answer(hub, now, &mut clients);
        now = now + TICK;
    }
    let took = now.boot.since(begin.boot);
    let drops = hub.status(now).drops;
    let told: Vec<_> = drops.iter().filter(|(_, count)| **count > 0).collect();
    assert_eq!(arrived.len(), PEERS as usize, "after {took:?}; {answered} answers; {told:?}");
    // The first come at once, the others when they return their cookies: one agreement for each, and few made twice.
    let at_once = waits.values().filter(|wait| **wait <= TICK).count();
    assert!(at_once >= MAX_FREE_BURST as usize, "{at_once}");
    assert!(answered <= (PEERS + PEERS / 10) as usize, "{answered} answers");
    assert_eq!((drops["outbox-full"], drops["no-path"]), (0, 0), "{told:?}");
}
