use proptest::prelude::*;

use super::*;
use crate::keys::NetmapSecretKey;
use crate::time::UnixTime;
use crate::wire::token::RelayToken;

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn id(byte: u8) -> DeviceId {
    DeviceId::from_bytes([byte; 16])
}

/// What a frame owns, so that proptest can make it.
#[derive(Debug, Clone)]
enum Made {
    Challenge([u8; 32], [u8; 32]),
    Auth([u8; 32], Signed),
    Ready(u64),
    Refused(u8, String),
    Send([u8; 16], Vec<u8>),
    Recv([u8; 16], Vec<u8>),
    Ping(u64),
    Pong(u64),
    PeerGone([u8; 16], u8),
    TokenWanted(u8),
    TokenRefresh(Signed),
    Drain(u32),
    UdpOffer(u64),
    UdpLost(u64),
    Rest,
}

impl Made {
    fn frame(&self) -> Frame<'_> {
        match self {
            Self::Challenge(ephemeral, nonce) => Frame::Challenge(Challenge {
                ephemeral: ProbePublicKey::from_bytes(*ephemeral),
                nonce: *nonce,
            }),
            Self::Auth(proof, signed) => Frame::Auth { proof: *proof, token: TokenRef::new(signed).unwrap() },
            Self::Ready(revision) => Frame::Ready { revision: *revision },
            Self::Refused(code, text) => Frame::Refused { code: RefusalCode::from_u8(*code), text },
            Self::Send(dst, payload) => Frame::Send { dst: DeviceId::from_bytes(*dst), payload },
            Self::Recv(src, payload) => Frame::Recv { src: DeviceId::from_bytes(*src), payload },
            Self::Ping(nonce) => Frame::Ping { nonce: *nonce },
            Self::Pong(nonce) => Frame::Pong { nonce: *nonce },
            Self::PeerGone(device, why) => {
                Frame::PeerGone { device: DeviceId::from_bytes(*device), why: GoneReason::from_u8(*why) }
            }
            Self::TokenWanted(why) => Frame::TokenWanted { why: WantedReason::from_u8(*why) },
            Self::TokenRefresh(signed) => Frame::TokenRefresh { token: TokenRef::new(signed).unwrap() },
            Self::Drain(after_ms) => Frame::Drain { after_ms: *after_ms },
            Self::UdpOffer(session) => Frame::UdpOffer { session: *session },
            Self::UdpLost(counter) => Frame::UdpLost { counter: *counter },
            Self::Rest => Frame::Rest,
        }
    }
}

fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 1..=max)
}

fn signed() -> impl Strategy<Value = Signed> {
    (bytes(300), prop::collection::vec(any::<u8>(), 64))
        .prop_map(|(payload, signature)| Signed { payload, signature })
}

fn made() -> impl Strategy<Value = Made> {
    prop_oneof![
        (any::<[u8; 32]>(), any::<[u8; 32]>()).prop_map(|(a, b)| Made::Challenge(a, b)),
        (any::<[u8; 32]>(), signed()).prop_map(|(a, b)| Made::Auth(a, b)),
        any::<u64>().prop_map(Made::Ready),
        (any::<u8>(), "\\PC{0,60}").prop_map(|(a, b)| Made::Refused(a, b)),
        (any::<[u8; 16]>(), bytes(MAX_PAYLOAD)).prop_map(|(a, b)| Made::Send(a, b)),
        (any::<[u8; 16]>(), bytes(MAX_PAYLOAD)).prop_map(|(a, b)| Made::Recv(a, b)),
        any::<u64>().prop_map(Made::Ping),
        any::<u64>().prop_map(Made::Pong),
        (any::<[u8; 16]>(), any::<u8>()).prop_map(|(a, b)| Made::PeerGone(a, b)),
        any::<u8>().prop_map(Made::TokenWanted),
        signed().prop_map(Made::TokenRefresh),
        any::<u32>().prop_map(Made::Drain),
        any::<u64>().prop_map(Made::UdpOffer),
        any::<u64>().prop_map(Made::UdpLost),
        Just(Made::Rest),
    ]
}

proptest! {
    #[test]
    fn frames_round_trip_and_know_their_length(made in made()) {
        let encoded = made.frame().to_vec();
        prop_assert_eq!(encoded.len(), made.frame().encoded_len());
        prop_assert!(encoded.len() <= MAX_FRAME);
        prop_assert_eq!(Frame::decode(&encoded).unwrap(), Some(made.frame()));
    }

    #[test]
    fn perturbed_frames_never_panic(made in made(), at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut encoded = made.frame().to_vec();
        let at = at.index(encoded.len());
        encoded[at] = to;
        if let Ok(Some(frame)) = Frame::decode(&encoded) {
            prop_assert_eq!(frame.to_vec(), encoded.clone());
        }
        encoded.truncate(cut.index(encoded.len()));
        let _ = Frame::decode(&encoded);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(Some(frame)) = Frame::decode(&bytes) {
            prop_assert_eq!(frame.to_vec(), bytes);
        }
    }

    #[test]
    fn a_stream_is_cut_where_it_was_joined(frames in prop::collection::vec(made(), 1..8), step in 1usize..700) {
        let frames: Vec<Vec<u8>> = frames.iter().map(|m| m.frame().to_vec()).collect();
        let mut stream = Vec::new();
        frames.iter().for_each(|frame| put_on_stream(frame, &mut stream));
        let (mut deframer, mut got) = (Deframer::default(), Vec::new());
        for part in stream.chunks(step) {
            deframer.buffer().extend_from_slice(part);
            while let Some(frame) = deframer.next_frame().unwrap() {
                got.push(frame.to_vec());
            }
        }
        prop_assert_eq!(got, frames);
        prop_assert!(deframer.buffer().is_empty());
    }
}

#[test]
fn golden_bytes() {
    let signed = Signed { payload: vec![0xaa, 0xbb], signature: vec![0x55; 64] };
    let token = TokenRef::new(&signed).unwrap();
    let challenge = Challenge { ephemeral: ProbePublicKey::from_bytes([1; 32]), nonce: [2; 32] };
    let cases = [
        (Frame::Challenge(challenge), format!("01{}{}", "01".repeat(32), "02".repeat(32))),
        (Frame::Auth { proof: [3; 32], token }, format!("02{}{}aabb", "03".repeat(32), "55".repeat(64))),
        (Frame::Ready { revision: 0x1234 }, "030000000000001234".to_owned()),
        (Frame::Refused { code: RefusalCode::Busy, text: "full" }, "040a66756c6c".to_owned()),
        (Frame::Send { dst: id(4), payload: &[9, 8] }, format!("05{}0908", "04".repeat(16))),
        (Frame::Recv { src: id(5), payload: &[7] }, format!("06{}07", "05".repeat(16))),
        (Frame::Ping { nonce: 1 }, "070000000000000001".to_owned()),
        (Frame::Pong { nonce: 2 }, "080000000000000002".to_owned()),
        (
            Frame::PeerGone { device: id(6), why: GoneReason::NotConnected },
            format!("09{}01", "06".repeat(16)),
        ),
        (Frame::TokenWanted { why: WantedReason::Stale }, "0a02".to_owned()),
        (Frame::TokenRefresh { token }, format!("0b{}aabb", "55".repeat(64))),
        (Frame::Drain { after_ms: 3_000 }, "0c00000bb8".to_owned()),
        (Frame::UdpOffer { session: 0x0102_0304_0506_0708 }, "0d0102030405060708".to_owned()),
        (Frame::UdpLost { counter: 9 }, "0e0000000000000009".to_owned()),
        (Frame::Rest, "0f".to_owned()),
    ];
    for (frame, expected) in cases {
        assert_eq!(hex(&frame.to_vec()), expected);
    }
    let mut stream = Vec::new();
    put_on_stream(&Frame::Drain { after_ms: 3_000 }.to_vec(), &mut stream);
    assert_eq!(hex(&stream), "0000050c00000bb8");
    let codes: Vec<u8> = RefusalCode::KNOWN.iter().map(|c| c.to_u8()).collect();
    assert_eq!(codes, (1..=15).collect::<Vec<u8>>());
}

#[test]
fn unknown_types_are_skipped_and_wrong_lengths_refused() {
    assert_eq!(Frame::decode(&[0x7f, 1, 2, 3]), Ok(None));
    assert!(Frame::decode(&[]).is_err());
    assert!(Frame::decode(&[PING, 0]).is_err());
    let mut send = Frame::Send { dst: id(1), payload: &[0; MAX_PAYLOAD] }.to_vec();
    assert!(Frame::decode(&send).is_ok());
    send.push(0);
    assert!(Frame::decode(&send).is_err(), "payload above MAX_PAYLOAD");
    assert!(Frame::decode(&send[..DATA_HEADER]).is_err(), "empty payload");
    let long = Signed { payload: vec![0; MAX_TOKEN_LEN + 1], signature: vec![0; 64] };
    assert_eq!(TokenRef::new(&long), None);
    let mut refresh = vec![TOKEN_REFRESH];
    refresh.resize(1 + 64 + MAX_TOKEN_LEN + 1, 0);
    assert!(Frame::decode(&refresh).is_err(), "token above MAX_TOKEN_LEN");
}

#[test]
fn the_longest_token_fits_a_frame() {
    let token = RelayToken {
        network: NetworkId::from_bytes([255; 16]),
        relay: RelayId::from_bytes([255; 16]),
        device: id(255),
        probe: ProbePublicKey::from_bytes([255; 32]),
        revision: u64::MAX,
        expires: UnixTime::from_micros(i64::MAX),
        peers: vec![id(255); MAX_TOKEN_PEERS],
    };
    let signed = token.sign(&NetmapSecretKey::from_bytes([1; 32]));
    let frame = Frame::Auth { proof: [0; 32], token: TokenRef::new(&signed).unwrap() };
    assert!(frame.encoded_len() <= MAX_FRAME);
}

#[test]
fn a_stream_length_out_of_bounds_is_refused() {
    for length in [0, MAX_FRAME as u32 + 1, 0x00ff_ffff] {
        let mut deframer = Deframer::default();
        deframer.buffer().extend_from_slice(&length.to_be_bytes()[1..]);
        assert!(deframer.next_frame().is_err());
    }
}

#[test]
fn a_refusal_text_is_cut_at_a_character() {
    let text = "é".repeat(MAX_TEXT);
    let encoded = Frame::Refused { code: RefusalCode::Busy, text: &text }.to_vec();
    let Ok(Some(Frame::Refused { text: got, .. })) = Frame::decode(&encoded) else { panic!("not decoded") };
    assert_eq!(got, "é".repeat(MAX_TEXT / 2));
    for code in RefusalCode::KNOWN {
        assert!(code.text().len() <= MAX_TEXT);
        assert_eq!(RefusalCode::from_u8(code.to_u8()), *code);
    }
}

#[test]
fn a_proof_is_good_for_its_key_channel_challenge_and_token_only() {
    let (device, thief, ephemeral) = (
        ProbeSecretKey::from_bytes([1; 32]),
        ProbeSecretKey::from_bytes([2; 32]),
        ProbeSecretKey::from_bytes([3; 32]),
    );
    let challenge = Challenge { ephemeral: ephemeral.public(), nonce: [4; 32] };
    let binding = Binding {
        network: NetworkId::from_bytes([5; 16]),
        relay: RelayId::from_bytes([6; 16]),
        cert_sha256: [7; 32],
    };
    let signed = Signed { payload: vec![1], signature: vec![2; 64] };
    let token = TokenRef::new(&signed).unwrap();
    let Proven { proof, udp } = challenge.prove(&device, &binding, token).unwrap();
    assert_eq!(hex(&proof), "b5bcca6e5ec783bced28a19c0525a4d333f019b8adb34951bfc088ca9f687de7");
    let check = |challenge: Challenge, binding: Binding, signed: &Signed, proof: [u8; 32]| {
        let token = TokenRef::new(signed).unwrap();
        challenge.check(&ephemeral, &device.public(), &binding, token, &proof).is_some()
    };
    assert!(check(challenge, binding, &signed, proof));
    let theirs = challenge.check(&ephemeral, &device.public(), &binding, token, &proof).unwrap();
    let head = udp::Head { kind: udp::Kind::Send, session: 1, counter: 2 };
    let mut datagram = [0; udp::UDP_HEADER + 1];
    assert!(udp.sealer().seal(head, [9; 16], &mut datagram));
    assert_eq!(theirs.opener().open(&datagram), Some([9; 16]));
    assert_eq!(
        hex(&datagram[17..udp::UDP_HEADER]),
        "bb2892a2724d1d15e7e1ef53689edfbf089be7471fbdc6711ff31e6a21c5ae7c"
    );
    assert!(theirs.sealer().seal(head, [8; 16], &mut datagram));
    assert_eq!(udp.opener().open(&datagram), Some([8; 16]));
    let stolen = challenge.prove(&thief, &binding, token).unwrap();
    assert!(!check(challenge, binding, &signed, stolen.proof));
    assert_eq!(stolen.udp.opener().open(&datagram), None);
    assert!(!check(Challenge { nonce: [0; 32], ..challenge }, binding, &signed, proof));
    assert!(!check(challenge, Binding { cert_sha256: [0; 32], ..binding }, &signed, proof));
    assert!(!check(challenge, Binding { relay: RelayId::from_bytes([0; 16]), ..binding }, &signed, proof));
    let other = Signed { payload: vec![9], ..signed.clone() };
    assert!(!check(challenge, binding, &other, proof));
    let low_order = Challenge { ephemeral: ProbePublicKey::from_bytes([0; 32]), nonce: [0; 32] };
    assert!(low_order.prove(&device, &binding, token).is_none());
}

#[test]
fn handshake_messages_are_told_by_type_and_length() {
    let message = |kind: u8, len: usize| {
        let mut bytes = vec![0; len];
        bytes[0] = kind;
        bytes
    };
    for (kind, len) in [(1, 148), (2, 92), (3, 64)] {
        assert!(is_handshake(&message(kind, len)));
        assert!(!is_handshake(&message(kind, len + 1)));
    }
    assert!(!is_handshake(&message(4, 148)));
    assert!(!is_handshake(&[]));
}
