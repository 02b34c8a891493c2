//! What strangers and devices can send to a relay, and a relay to a device: see `fuzz.rs` for the method.
#![cfg(test)]

use std::net::Ipv4Addr;
use std::time::Duration;

use bolero::check;
use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::Signed;
use warren_common::wire::relay::udp::{Head, Kind, Ping, UDP_HEADER, UdpKeys};
use warren_common::wire::relay::{
    Binding, Deframer, Frame, GoneReason, RefusalCode, TokenRef, WantedReason, put_on_stream,
};
use warren_common::wire::relay_control::{
    JOIN_KEY_PREFIX, MinimumRevision, RelayBody, RelayCommand, RelayHello, RelayJoinKey, RelayMessage,
    RelayServerBody, RelayServerMessage,
};
use warren_common::wire::token::RelayToken;
use warren_netns_tests::fuzz::{corpus, each, inputs, tamper};
use warren_relay::core::{Config, ConnId, Limits, Relay, UdpPath};
use warren_relay::stun;

fn device(n: u8) -> DeviceId {
    DeviceId::from_bytes([n; 16])
}

fn token(n: u8) -> Signed {
    RelayToken {
        network: NetworkId::from_bytes([1; 16]),
        relay: RelayId::from_bytes([2; 16]),
        device: device(n),
        probe: ProbeSecretKey::from_bytes([n; 32]).public(),
        revision: 1,
        expires: UnixTime::from_secs(1_600),
        peers: vec![device(1), device(2)],
    }
    .sign(&NetmapSecretKey::from_bytes([3; 32]))
}

/// One frame of each type.
fn frames() -> Vec<Vec<u8>> {
    let signed = token(1);
    let token = TokenRef::new(&signed).unwrap();
    let challenge = warren_common::wire::relay::Challenge {
        ephemeral: ProbeSecretKey::from_bytes([9; 32]).public(),
        nonce: [8; 32],
    };
    [
        Frame::Challenge(challenge),
        Frame::Auth { proof: [7; 32], token },
        Frame::Ready { revision: 1 },
        RefusalCode::Busy.frame(),
        Frame::Send { dst: device(2), payload: b"payload" },
        Frame::Recv { src: device(2), payload: b"forged" },
        Frame::Ping { nonce: 1 },
        Frame::Pong { nonce: 1 },
        Frame::PeerGone { device: device(2), why: GoneReason::NotConnected },
        Frame::TokenWanted { why: WantedReason::Stale },
        Frame::TokenRefresh { token },
        Frame::Drain { after_ms: 1 },
        Frame::UdpOffer { session: 1 },
        Frame::UdpLost { counter: 1 },
        Frame::Rest,
    ]
    .map(|frame| frame.to_vec())
    .to_vec()
}

#[test]
fn relay_frames() {
    let seeds = frames();
    let names = [
        "challenge",
        "auth",
        "ready",
        "refused",
        "send",
        "recv",
        "ping",
        "pong",
        "gone",
        "wanted",
        "refresh",
        "drain",
        "udp_offer",
        "udp_lost",
    ];
    corpus("relay_frames", names.into_iter().zip(seeds.clone()).collect());
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        for seed in &seeds {
            let bytes = tamper(seed, input);
            if let Ok(Some(frame)) = Frame::decode(&bytes) {
                assert_eq!(frame.to_vec(), bytes, "one encoding per frame");
            }
        }
    });
}

#[test]
fn relay_stream() {
    let mut seed = Vec::new();
    frames().iter().for_each(|frame| put_on_stream(frame, &mut seed));
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        let (stream, mut deframer) = (tamper(&seed, input), Deframer::default());
        for part in stream.chunks(usize::from(input.first().copied().unwrap_or(0)) + 1) {
            deframer.buffer().extend_from_slice(part);
            loop {
                match deframer.next_frame() {
                    Ok(Some(frame)) => drop(Frame::decode(frame).map(|frame| frame.is_some())),
                    Ok(None) => break,
                    Err(_) => return, // the stream is closed
                }
            }
        }
    });
}

fn config() -> Config {
    Config {
        network: NetworkId::from_bytes([1; 16]),
        relay: RelayId::from_bytes([2; 16]),
        cert_sha256: [4; 32],
        netmap_key: NetmapSecretKey::from_bytes([3; 32]).public(),
        floor: 0,
        plain_udp: true,
        limits: Limits::default(),
    }
}

/// Whatever a device sends, its peer hears from that device only, and a stranger is never heard.
#[test]
fn relay_core() {
    let seeds = frames();
    let now = Now { boot: Instant::from_nanos(1), unix: UnixTime::from_secs(1_000) };
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        let mut relay = Relay::new(config(), now.boot);
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let (sender, receiver) = (join(&mut relay, &mut rng, now, 1), join(&mut relay, &mut rng, now, 2));
        assert_eq!(relay.stats().clients, 2);
        let stranger = relay.handle_connected(now, &mut rng);
        for (i, edit) in input.chunks(16).take(32).enumerate() {
            let seed = &seeds[usize::from(edit[0]) % seeds.len()];
            let from = if edit[0] & 0x80 == 0 { sender } else { stranger };
            relay.handle_frame(from, now + Duration::from_millis(i as u64), &tamper(seed, edit));
            while relay.poll_output().is_some() {}
            while let Some(frame) = relay.next_frame(receiver) {
                if let Ok(Some(Frame::Recv { src, .. })) = Frame::decode(&frame.bytes) {
                    assert_eq!((src, from), (device(1), sender));
                }
            }
        }
        assert!(relay.stats().clients <= 2);
    });
}

/// Whatever comes over UDP, nothing longer goes out, and to no address but those of the two devices.
#[test]
fn relay_udp() {
    let now = Now { boot: Instant::from_nanos(1), unix: UnixTime::from_secs(1_000) };
    let path = |n: u8| UdpPath { remote: (Ipv4Addr::new(192, 0, 2, n), 9).into(), local: None };
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        let mut relay = Relay::new(config(), now.boot);
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut seeds = Vec::new();
        for n in [1, 2] {
            let (conn, keys) = join_udp(&mut relay, &mut rng, now, n);
            let session = loop {
                let frame = relay.next_frame(conn).unwrap();
                if let Ok(Some(Frame::UdpOffer { session })) = Frame::decode(&frame.bytes) {
                    break session;
                }
            };
            let ping = Ping { nonce: 1, settle: true, leave: false }.to_bytes();
            let other = device(3 - n).to_bytes();
            for (counter, kind, what) in
                [(0, Kind::Ping, ping), (1, Kind::Send, other), (2, Kind::Ping, ping)]
            {
                let mut datagram = vec![0; UDP_HEADER + 40];
                assert!(keys.sealer().seal(Head { kind, session, counter }, what, &mut datagram));
                seeds.push((n, datagram));
            }
        }
        for (i, edit) in input.chunks(16).take(32).enumerate() {
            let (n, seed) = &seeds[usize::from(edit[0]) % seeds.len()];
            // Unchanged as well: a good datagram at any time, and again.
            let mut buffer = if edit[0] & 0x80 == 0 { seed.clone() } else { tamper(seed, edit) };
            let (len, mut sends) = (buffer.len(), Vec::new());
            let stride = if edit[0] & 0x40 == 0 { len } else { usize::from(edit[edit.len() - 1]) };
            let now = now + Duration::from_millis(i as u64);
            relay.handle_udp(now, path(*n), &mut buffer, stride, &mut sends);
            assert!(sends.iter().map(|s| s.range.len()).sum::<usize>() <= len);
            assert!(sends.iter().all(|s| s.range.end <= len && (s.to == path(1) || s.to == path(2))));
            assert!(relay.poll_datagram().is_none());
        }
        assert_eq!(relay.stats().clients, 2);
    });
}

fn join(relay: &mut Relay, rng: &mut ChaCha20Rng, now: Now, n: u8) -> ConnId {
    join_udp(relay, rng, now, n).0
}

fn join_udp(relay: &mut Relay, rng: &mut ChaCha20Rng, now: Now, n: u8) -> (ConnId, UdpKeys) {
    let conn = relay.handle_connected(now, rng);
    let challenge = relay.next_frame(conn).unwrap();
    let Ok(Some(Frame::Challenge(challenge))) = Frame::decode(&challenge.bytes) else {
        panic!("no challenge")
    };
    let binding = Binding {
        network: NetworkId::from_bytes([1; 16]),
        relay: RelayId::from_bytes([2; 16]),
        cert_sha256: [4; 32],
    };
    let signed = token(n);
    let token = TokenRef::new(&signed).unwrap();
    let proven = challenge.prove(&ProbeSecretKey::from_bytes([n; 32]), &binding, token).unwrap();
    relay.handle_frame(conn, now, &Frame::Auth { proof: proven.proof, token }.to_vec());
    (conn, proven.udp)
}

#[test]
fn relay_control() {
    let key = format!("{JOIN_KEY_PREFIX}{}", "A".repeat(128));
    let hello = RelayMessage { body: Some(RelayBody::Hello(RelayHello::default())) };
    let command = RelayServerMessage { body: Some(RelayServerBody::Command(command())) };
    let seeds = corpus(
        "relay_control",
        vec![
            ("hello", hello.encode_to_vec()),
            ("command", command.encode_to_vec()),
            ("join_key", key.into_bytes()),
        ],
    );
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        each(input, &seeds, |bytes| {
            if let Ok(message) = RelayMessage::decode(bytes) {
                assert_eq!(RelayMessage::decode(message.encode_to_vec().as_slice()), Ok(message));
            }
            if let Ok(message) = RelayServerMessage::decode(bytes) {
                assert_eq!(RelayServerMessage::decode(message.encode_to_vec().as_slice()), Ok(message));
            }
            let text = String::from_utf8_lossy(bytes);
            if let Ok(key) = text.parse::<RelayJoinKey>() {
                assert_eq!(key.expose(), text.trim());
            }
        });
    });
}

fn command() -> RelayCommand {
    RelayCommand {
        revision: 7,
        minimums: vec![MinimumRevision { device: vec![1; 16], revision: 7 }],
        revoked: vec![vec![2; 16]],
        floor: 5,
    }
}

#[test]
fn stun_questions() {
    let mut seed = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    seed.extend_from_slice(&[7; 12]);
    let from = "[2001:db8::1]:1".parse().unwrap();
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        // As a header's length, the rest would hardly ever be right.
        let mut whole = [&seed, input].concat();
        whole[2..4].copy_from_slice(&(input.len() as u16).to_be_bytes());
        for question in [input, &tamper(&seed, input), &whole] {
            for other in [None, Some(from)] {
                if let Some(answer) = stun::answer(question, from, other) {
                    assert!(answer.bytes.len() <= question.len() + stun::MAX_GROWTH);
                }
            }
        }
    });
}
