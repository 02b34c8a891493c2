//! Forged, damaged, repeated and random datagrams, floods, and bad keys.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use warren_common::keys::{WgPublicKey, WgSecretKey};
use warren_engine::io::Source;
use warren_engine::wg::{
    AddPeerError, DATA_OVERHEAD, Destination, Device, DropReason, INITIATION_INTERVAL, MAX_FREE_BURST,
    MAX_PACKET, MAX_PROVED_BURST, MAX_QUEUED_BYTES, MAX_QUEUED_PACKETS, MAX_REPLIES, MAX_SOURCE_BURST,
    MIN_TRANSMIT_BUFFER, Received, SealError, TransmitKind,
};

use crate::net::{Net, ip_packet, ms, packet_id, secs, source, start};

/// One genuine datagram of each kind from host 0 to host 1 that host 1 would accept now.
fn genuine(net: &mut Net) -> Vec<Vec<u8>> {
    net.connect();
    let now = net.now;
    let mut out = [0; 2048];
    let [a, b] = &mut net.hosts;
    let mut all = Vec::new();
    let len = a.device.seal(a.peer, now, &ip_packet(7, 90), &mut out).unwrap();
    all.push(out[..len].to_vec());
    let later = now + secs(6);
    a.device.initiate(a.peer, later);
    let len = a.device.poll_transmit(later, &mut out).unwrap().len;
    all.push(out[..len].to_vec());
    b.device.initiate(b.peer, later);
    let len = b.device.poll_transmit(later, &mut out).unwrap().len;
    a.device.handle(later, source(1), &mut out[..len]).unwrap();
    let len = a.device.poll_transmit(later, &mut out).unwrap().len;
    all.push(out[..len].to_vec());
    net.now = later;
    all
}

#[test]
fn no_truncation_and_no_changed_bit_passes() {
    let mut net = Net::new(21, None, [None, None]);
    let all = genuine(&mut net);
    let now = net.now;
    let device = &mut net.hosts[1].device;
    for (nth, datagram) in all.iter().enumerate() {
        for len in 0..datagram.len() {
            let mut cut = datagram[..len].to_vec();
            assert!(device.handle(now, source(0), &mut cut).is_err(), "{len}");
        }
        let mut longer = [&datagram[..], &[0]].concat();
        assert!(device.handle(now, source(0), &mut longer).is_err());
        for bit in 0..datagram.len() * 8 {
            let mut changed = datagram.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // MAC2 is looked at only under load, and is all zero here.
            let in_mac2 = nth > 0 && bit / 8 >= datagram.len() - 16;
            if !in_mac2 {
                let result = device.handle(now, source(0), &mut changed);
                assert!(result.is_err(), "message {nth}, bit {bit}: {result:?}");
            }
        }
    }
    for (nth, datagram) in all.iter().enumerate() {
        let first = device.handle(now, source(0), &mut datagram.clone());
        assert!(first.is_ok(), "message {nth}: {first:?}");
        let second = device.handle(now, source(0), &mut datagram.clone());
        let wanted = [DropReason::Replayed, DropReason::ReplayedInitiation, DropReason::UnknownIndex];
        assert_eq!(second, Err(wanted[nth]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, rng_seed: RngSeed::Fixed(0x5EED), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_and_spliced_datagrams_never_panic_or_pass(
        seed in any::<u64>(),
        inputs in prop::collection::vec((0usize..4, any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 0..200)), 1..60),
    ) {
        let mut net = Net::new(seed, None, [None, None]);
        let all = genuine(&mut net);
        let now = net.now;
        let device = &mut net.hosts[1].device;
        for (kind, at, bytes) in inputs {
            let mut datagram = match all.get(kind) {
                Some(base) => {
                    let mut spliced = base.clone();
                    let at = at.index(base.len());
                    let end = (at + bytes.len()).min(base.len());
                    spliced[at..end].copy_from_slice(&bytes[..end - at]);
                    // MAC2 is looked at only under load.
                    let checked = base.len() - if kind > 0 { 16 } else { 0 };
                    if spliced[..checked] == base[..checked] { continue; }
                    spliced
                }
                None => bytes,
            };
            prop_assert!(device.handle(now, source(3), &mut datagram).is_err());
            let mut out = [0; 2048];
            while device.poll_transmit(now, &mut out).is_some() {}
        }
    }
}

#[test]
fn authentic_garbage_inside_is_not_a_packet() {
    let mut net = Net::new(22, None, [None, None]);
    net.connect();
    let mut out = [0; 2048];
    for garbage in [&[0x45; 60][..], &[0xff; 33], &[0x60; 39]] {
        let [a, b] = &mut net.hosts;
        let len = a.device.seal(a.peer, net.now, garbage, &mut out).unwrap();
        let result = b.device.handle(net.now, source(0), &mut out[..len]);
        assert_eq!(result, Err(DropReason::NotIp));
    }
}

#[test]
fn keys_that_protect_nothing_or_exist_are_refused() {
    let secret = WgSecretKey::from_bytes([5; 32]);
    let mut device = Device::new(secret.clone(), [0; 32], 0);
    let other = WgSecretKey::from_bytes([6; 32]).public();
    let mut add = |key| device.add_peer(key, None, None);
    assert_eq!(add(WgPublicKey::from_bytes([0; 32])), Err(AddPeerError::LowOrderKey));
    assert_eq!(add(secret.public()), Err(AddPeerError::OwnKey));
    assert!(add(other).is_ok());
    assert_eq!(add(other), Err(AddPeerError::Duplicate));
}

#[test]
fn the_number_of_peers_is_bounded() {
    let mut device = Device::new(WgSecretKey::from_bytes([5; 32]), [0; 32], 0);
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let mut key = || {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        WgPublicKey::from_bytes(bytes)
    };
    for _ in 0..warren_engine::wg::MAX_PEERS {
        device.add_peer(key(), None, None).unwrap();
    }
    assert_eq!(device.add_peer(key(), None, None), Err(AddPeerError::TooMany));
}

#[test]
fn waiting_packets_are_bounded_over_all_peers() {
    let mut device = Device::new(WgSecretKey::from_bytes([5; 32]), [0; 32], 0);
    let mut out = vec![0; MAX_PACKET + DATA_OVERHEAD];
    let packet = vec![0x45; 60_000];
    let mut peers = Vec::new();
    let per_peer = MAX_QUEUED_PACKETS * packet.len();
    for n in 0..MAX_QUEUED_BYTES / per_peer + 2 {
        let key = WgSecretKey::from_bytes([n as u8 + 10; 32]).public();
        peers.push(device.add_peer(key, None, None).unwrap());
    }
    let mut queued = 0;
    for peer in &peers {
        for _ in 0..MAX_QUEUED_PACKETS {
            match device.seal(*peer, start(), &packet, &mut out) {
                Err(SealError::Queued) => queued += packet.len(),
                Err(SealError::QueueFull) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(queued <= MAX_QUEUED_BYTES && queued > MAX_QUEUED_BYTES - per_peer);
    for peer in &peers[..2] {
        device.remove_peer(*peer);
    }
    assert_eq!(device.seal(peers[2], start(), &packet, &mut out), Err(SealError::Queued), "room again");
}

#[test]
fn sizes_and_buffers_are_checked() {
    let mut net = Net::new(23, None, [None, None]);
    net.connect();
    let now = net.now;
    let host = &mut net.hosts[0];
    let mut seal = |packet: &[u8], room: usize| host.device.seal(host.peer, now, packet, &mut vec![0; room]);
    assert_eq!(seal(&[], 2000), Err(SealError::PacketSize));
    assert_eq!(seal(&vec![0; MAX_PACKET + 1], 70_000), Err(SealError::PacketSize));
    assert_eq!(seal(&[0; 33], 79), Err(SealError::BufferTooSmall { needed: 80 }));
    assert_eq!(seal(&[0; 33], 80), Ok(80));
    assert_eq!(seal(&vec![0; MAX_PACKET], 70_000), Ok(MAX_PACKET + DATA_OVERHEAD));
    assert_eq!(seal(&[0; 1279], 2000), Ok(1280 + DATA_OVERHEAD), "padded");
    host.device.set_mtu(1275);
    let mut out = [0; 2000];
    assert_eq!(
        host.device.seal(host.peer, now, &[0; 1270], &mut out),
        Ok(1275 + DATA_OVERHEAD),
        "not past the MTU"
    );
    host.device.initiate(host.peer, now + secs(6));
    assert_eq!(host.device.poll_transmit(now, &mut [0; MIN_TRANSMIT_BUFFER - 1]), None);
}

/// Initiations from `count` different strangers, each knowing the public key of `to`.
fn strangers(to: WgPublicKey, count: usize) -> Vec<Vec<u8>> {
    let mut out = [0; 2048];
    (0..count)
        .map(|n| {
            let mut secret = [77; 32];
            secret[..8].copy_from_slice(&(n as u64).to_be_bytes());
            let mut device = Device::new(WgSecretKey::from_bytes(secret), secret, 0);
            let peer = device.add_peer(to, None, None).unwrap();
            device.initiate(peer, start());
            let len = device.poll_transmit(start(), &mut out).unwrap().len;
            out[..len].to_vec()
        })
        .collect()
}

#[test]
fn a_flood_costs_a_bounded_number_of_agreements_and_a_peer_gets_in_by_cookie() {
    let mut net = Net::new(24, None, [None, None]);
    let flood = strangers(net.hosts[1].device.public_key(), 1);
    let now = net.now;
    let mut out = [0; 2048];
    let mut reasons = std::collections::BTreeMap::new();
    for n in 0..10_000u32 {
        let from = Source::Direct { socket: 0, remote: (n.to_be_bytes(), 9).into() };
        let device = &mut net.hosts[1].device;
        let reason = device.handle(now, from, &mut flood[0].clone()).unwrap_err();
        *reasons.entry(reason).or_insert(0) += 1;
        if n % 2 == 0 {
            while device.poll_transmit(now, &mut out).is_some() {}
        }
    }
    assert_eq!(reasons[&DropReason::UnknownPeer], MAX_FREE_BURST);
    assert_eq!(reasons[&DropReason::CookieSent], 10_000 - MAX_FREE_BURST);

    // While it goes on, a real peer is asked for its cookie once and gets in with its next try.
    net.link.delay_ms = (0, 0);
    net.post(0);
    net.run(ms(0));
    for _ in 0..70 {
        for n in 0..20u8 {
            let device = &mut net.hosts[1].device;
            let _ = device.handle(net.now, source(100 + n), &mut flood[0].clone());
        }
        net.drain(1);
        net.run(ms(100));
    }
    let host = &net.hosts[0];
    assert!(host.device.has_session(host.peer, net.now));
    assert_eq!(host.count(TransmitKind::Initiation), 2);
}

#[test]
fn replies_that_nobody_fetches_are_bounded() {
    let mut net = Net::new(25, None, [None, None]);
    let flood = strangers(net.hosts[1].device.public_key(), 1);
    let now = net.now;
    let device = &mut net.hosts[1].device;
    let floods = MAX_FREE_BURST as usize + MAX_REPLIES + 50;
    for n in 0..floods {
        let _ = device.handle(now, source(n as u8), &mut flood[0].clone());
    }
    assert_eq!(device.counters().replies_dropped, 50);
    let mut out = [0; 2048];
    let fetched = std::iter::from_fn(|| device.poll_transmit(now, &mut out)).count();
    assert_eq!(fetched, MAX_REPLIES);
}

#[test]
fn a_source_that_returns_cookies_is_bounded_too_and_so_are_all_together() {
    let mut us = Device::new(WgSecretKey::from_bytes([1; 32]), [1; 32], 0);
    let now = start();
    let mut out = [0; 2048];
    let flood = strangers(us.public_key(), 1);
    for _ in 0..MAX_FREE_BURST {
        let _ = us.handle(now, source(0), &mut flood[0].clone());
    }
    // Makes a stranger ask from `n`, and ask again with the cookie that it got.
    let mut ask_with_cookie = |n: u32, times: u32| {
        let from = Source::Direct { socket: 0, remote: (n.to_be_bytes(), 9).into() };
        let mut secret = [99; 32];
        secret[..4].copy_from_slice(&n.to_be_bytes());
        let mut stranger = Device::new(WgSecretKey::from_bytes(secret), secret, 0);
        let peer = stranger.add_peer(us.public_key(), None, None).unwrap();
        stranger.initiate(peer, now);
        let len = stranger.poll_transmit(now, &mut out).unwrap().len;
        let asked = us.handle(now, from, &mut out[..len]);
        assert_eq!(asked, Err(DropReason::CookieSent));
        let len = us.poll_transmit(now, &mut out).unwrap().len;
        let cookie = stranger.handle(now, from, &mut out[..len]).unwrap();
        assert_eq!(cookie, Received::Cookie { peer });
        assert_eq!(cookie.authenticated(), None);
        let mut later = now;
        (0..times)
            .map(|_| {
                later = later + secs(6);
                stranger.handle_timeout(later);
                let len = stranger.poll_transmit(later, &mut out).unwrap().len;
                us.handle(now, from, &mut out[..len]).unwrap_err()
            })
            .collect::<Vec<_>>()
    };
    let reasons = ask_with_cookie(1, MAX_SOURCE_BURST + 1);
    let (last, processed) = reasons.split_last().unwrap();
    assert!(processed.iter().all(|r| *r == DropReason::UnknownPeer));
    assert_eq!(*last, DropReason::RateLimited);
    let more = (2..MAX_PROVED_BURST)
        .flat_map(|n| ask_with_cookie(n, 1))
        .filter(|reason| *reason == DropReason::UnknownPeer)
        .count();
    assert_eq!(more as u32, MAX_PROVED_BURST - MAX_SOURCE_BURST);
}

#[test]
fn initiations_of_one_peer_are_spaced() {
    let mut net = Net::new(26, None, [None, None]);
    let now = net.now;
    let [a, b] = &mut net.hosts;
    assert!(b.device.handle(now, source(0), &mut a.initiation(now)).is_ok());
    a.device.handle_timeout(now + secs(6));
    let (_, mut next) = a.transmit(now + secs(6)).unwrap();
    let soon = now + INITIATION_INTERVAL / 2;
    assert_eq!(b.device.handle(soon, source(0), &mut next.clone()), Err(DropReason::InitiationTooSoon));
    let later = now + INITIATION_INTERVAL;
    assert!(b.device.handle(later, source(0), &mut next).is_ok());
}

#[test]
fn bad_responses_are_tried_a_bounded_number_of_times() {
    let mut net = Net::new(27, None, [None, None]);
    let now = net.now;
    let mut out = [0; 2048];
    let [a, b] = &mut net.hosts;
    a.device.initiate(a.peer, now);
    let len = a.device.poll_transmit(now, &mut out).unwrap().len;
    // Made by someone with the same key pair as the peer but another pre-shared key: MAC1 is right.
    let key = b.device.peer_key(b.peer).unwrap();
    b.device.remove_peer(b.peer);
    b.device.add_peer(key, Some([1; 32]), None).unwrap();
    b.device.handle(now, source(0), &mut out[..len]).unwrap();
    let len = b.device.poll_transmit(now, &mut out).unwrap().len;
    let reasons: Vec<_> =
        (0..10).map(|_| a.device.handle(now, source(1), &mut out[..len].to_vec()).unwrap_err()).collect();
    assert_eq!(reasons[..8], [DropReason::BadHandshake; 8]);
    assert_eq!(reasons[8..], [DropReason::TooManyResponses; 2]);
}

#[test]
fn a_thousand_peers_at_once_all_get_a_session() {
    const PEERS: u32 = 1_000;
    let own = WgSecretKey::from_bytes([1; 32]);
    let mut us = Device::new(own.clone(), [1; 32], 0);
    let from = |n: u32| Source::Direct { socket: 0, remote: ((0x0a00_0000 + n).to_be_bytes(), 9).into() };
    let mut now = start();
    let mut clients = Vec::new();
    let mut by_slot = std::collections::BTreeMap::new();
    for n in 0..PEERS {
        let mut secret = [7; 32];
        secret[..4].copy_from_slice(&n.to_be_bytes());
        let secret = WgSecretKey::from_bytes(secret);
        let handle = us.add_peer(secret.public(), None, None).unwrap();
        by_slot.insert(handle.slot(), n);
        let mut client = Device::new(secret.clone(), [n as u8; 32], 0);
        let to_us = client.add_peer(own.public(), None, None).unwrap();
        client.queue(to_us, now, &ip_packet(n.into(), 60)).unwrap();
        clients.push((client, handle));
    }
    let mut out = [0; 2048];
    let (mut arrived, mut agreements, mut cookies) = (std::collections::BTreeSet::new(), 0, 0);
    let end = now + secs(60);
    while arrived.len() < PEERS as usize && now.boot < end.boot {
        for n in 0..PEERS {
            let client = &mut clients[n as usize].0;
            client.handle_timeout(now);
            while let Some(transmit) = client.poll_transmit(now, &mut out) {
                match us.handle(now, from(n), &mut out[..transmit.len]) {
                    Ok(Received::Data { packet, .. }) => {
                        arrived.insert(packet_id(&out[packet]));
                    }
                    Ok(Received::Initiation { .. }) => agreements += 1,
                    Ok(_) => {}
                    Err(DropReason::CookieSent) => cookies += 1,
                    Err(reason) => assert_eq!(reason, DropReason::RateLimited),
                }
            }
            us.handle_timeout(now);
            while let Some(transmit) = us.poll_transmit(now, &mut out) {
                let to = match transmit.to {
                    Destination::Reply { source, .. } => (0..PEERS).find(|n| from(*n) == source).unwrap(),
                    Destination::Peer(peer) => by_slot[&peer.slot()],
                };
                let _ = clients[to as usize].0.handle(now, from(to), &mut out[..transmit.len]);
            }
        }
        now = now + ms(10);
    }
    let took = now.boot.since(start().boot);
    assert_eq!(arrived.len(), PEERS as usize, "in {took:?}: {agreements} handshakes, {cookies} cookies");
    assert!(clients.iter().all(|(_, handle)| us.has_session(*handle, now)));
    // One for each, and few that were made twice.
    assert!(agreements <= PEERS + PEERS / 10, "{agreements} handshakes");
}
