//! Every parser of bytes from others, fed with a committed corpus, random bytes, and well-formed messages that were
//! tampered with, cut, repeated or spliced. A wrong input is an error; nothing panics. Here: the control channel, and
//! what is signed in it. The other `fuzz_*` files hold the rest.
//!
//! Bounded here ([`inputs`] each); `cargo bolero test` drives the same targets with a coverage-guided fuzzer. A failure
//! prints its seed; put the input into the target's corpus folder when it is fixed.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use bolero::check;
use prost::Message as _;
use warren_common::auth_key::{AUTH_KEY_PREFIX, AuthKey};
use warren_common::ids::{DeviceId, NetworkId};
use warren_common::keys::{ControlSecretKey, Fingerprint, NetmapSecretKey, RootSecretKey, SignatureDomain};
use warren_common::netmap::{Delta, Netmap};
use warren_common::wire::control::{
    ClientMessage, CoordinatorIdentity, DeltaMsg, NetmapMsg, NetmapUpdate, ServerMessage, Signed, UpdateKind,
};
use warren_common::wire::session::{self, ClientHandshake, Session};
use warren_common::wire::token::RelayToken;
use warren_netns_tests::fuzz::{corpus, each, golden, inputs, pick, tamper};

#[test]
fn control_messages() {
    let seeds = corpus(
        "control_messages",
        ["snapshot", "delta", "snapshot_capability", "delta_capability", "identity"]
            .map(|name| (name, golden(name)))
            .to_vec(),
    );
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        each(input, &seeds, |bytes| {
            if let Ok(message) = ClientMessage::decode(bytes) {
                assert_eq!(ClientMessage::decode(message.encode_to_vec().as_slice()), Ok(message));
            }
            if let Ok(message) = ServerMessage::decode(bytes) {
                assert_eq!(ServerMessage::decode(message.encode_to_vec().as_slice()), Ok(message));
            }
        });
    });
}

/// What a signer signs may be nonsense too: the decoder behind the signature must hold on its own.
#[test]
fn signed_documents() {
    let (netmap, root) = (NetmapSecretKey::from_bytes([10; 32]), RootSecretKey::from_bytes([11; 32]));
    let payloads = corpus(
        "signed_documents",
        ["snapshot", "delta", "lease", "snapshot_capability", "delta_capability", "relay_token", "identity"]
            .map(|name| (name, payload(name)))
            .to_vec(),
    );
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        each(input, &payloads, |payload| {
            let sign = |signature: &[u8]| Signed { payload: payload.to_vec(), signature: signature.to_vec() };
            let update = sign(&netmap.sign(SignatureDomain::Netmap, payload));
            if let Ok(read) = NetmapUpdate::verify(&update, &netmap.public()) {
                assert_eq!(NetmapUpdate::verify(&read.sign(&netmap), &netmap.public()), Ok(read));
            }
            let token = sign(&netmap.sign(SignatureDomain::RelayToken, payload));
            if let Ok(read) = RelayToken::verify(&token, &netmap.public()) {
                assert_eq!(RelayToken::verify(&read.sign(&netmap), &netmap.public()), Ok(read));
            }
            let identity = sign(&root.sign(SignatureDomain::CoordinatorIdentity, payload));
            let _ = CoordinatorIdentity::verify(&identity, &root.public().fingerprint());
            let _ = CoordinatorIdentity::claimed_fingerprint(&identity);
            assert!(NetmapUpdate::verify(&sign(&[0; 64]), &netmap.public()).is_err());
        });
    });
}

/// What decodes encodes to the same thing, and deltas lead where they should from any netmap that decodes.
#[test]
fn netmaps() {
    let key = NetmapSecretKey::from_bytes([10; 32]);
    let encoded = |name: &str| match update_of(name, &key) {
        UpdateKind::Snapshot(netmap) => NetmapMsg::from(netmap.as_ref()).encode_to_vec(),
        UpdateKind::Delta(delta) => DeltaMsg::from(delta.as_ref()).encode_to_vec(),
        other => panic!("the golden {name} is {other:?}"),
    };
    let names = [
        ("netmap", "snapshot"),
        ("delta", "delta"),
        ("netmap_capability", "snapshot_capability"),
        ("delta_capability", "delta_capability"),
    ];
    let seeds = corpus("netmaps", names.map(|(name, update)| (name, encoded(update))).to_vec());
    let UpdateKind::Snapshot(base) = update_of("snapshot_capability", &key) else {
        panic!("the golden snapshot is none")
    };
    check!().with_iterations(inputs(4)).for_each(|input: &[u8]| {
        each(input, &seeds, |bytes| {
            if let Some(netmap) = NetmapMsg::decode(bytes).ok().and_then(|m| Netmap::try_from(m).ok()) {
                let again = NetmapMsg::decode(NetmapMsg::from(&netmap).encode_to_vec().as_slice()).unwrap();
                assert_eq!(Netmap::try_from(again).as_ref(), Ok(&netmap));
                let mut applied = base.as_ref().clone();
                applied.apply(Netmap::diff(&base, &netmap));
                assert_eq!((applied.hash(), &applied), (netmap.hash(), &netmap));
                let between = Netmap::without_removed(&base, &netmap);
                assert!(between.peers.keys().all(|id| base.peers.contains_key(id)));
            }
            if let Some(delta) = DeltaMsg::decode(bytes).ok().and_then(|m| Delta::try_from(m).ok()) {
                let again = DeltaMsg::decode(DeltaMsg::from(&delta).encode_to_vec().as_slice()).unwrap();
                assert_eq!(Delta::try_from(again).as_ref(), Ok(&delta));
                let mut applied = base.as_ref().clone();
                applied.apply(delta.clone());
                let once = applied.clone();
                applied.apply(delta);
                assert_eq!(applied, once, "a delta that is applied twice changes nothing more");
            }
        });
    });
}

#[test]
fn control_handshake() {
    let (client, server) = (ControlSecretKey::from_bytes([11; 32]), ControlSecretKey::from_bytes([12; 32]));
    let network = NetworkId::from_bytes([1; 16]);
    let mut shared = rng();
    let (_, hello) = ClientHandshake::start(&client, &server.public(), network, &mut shared).unwrap();
    let (_, _, answer) = session::accept(&server, network, &hello, &mut shared).unwrap();
    corpus("control_handshake", vec![("handshake_1", hello.clone()), ("handshake_2", answer.clone())]);
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        each(input, std::slice::from_ref(&hello), |bytes| {
            let accepted = session::accept(&server, network, bytes, &mut rng());
            assert_eq!(accepted.is_ok(), bytes == hello, "a hello that nobody made");
        });
        let tampered = tamper(&answer, input);
        let (handshake, _) = ClientHandshake::start(&client, &server.public(), network, &mut rng()).unwrap();
        assert_eq!(handshake.finish(&tampered).is_ok(), tampered == answer, "an answer that nobody gave");
    });
}

#[test]
fn control_frames() {
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        let (mut client, mut server) = sessions();
        let frame = client.seal(input).unwrap().remove(0);
        let tampered = tamper(&frame, input);
        assert_eq!(server.open(&tampered).is_ok(), tampered == frame, "a frame that nobody sealed");
    });
}

/// The ids and keys that people copy from one place to another.
#[test]
fn texts() {
    let key = format!("{AUTH_KEY_PREFIX}{}", "A".repeat(128));
    let seeds = corpus(
        "texts",
        vec![
            ("auth_key", key.into_bytes()),
            ("network", NetworkId::from_bytes([1; 16]).to_string().into_bytes()),
            ("device", DeviceId::from_bytes([2; 16]).to_string().into_bytes()),
            ("url", b"https://[2001:db8::1]:8443/base".to_vec()),
            ("fingerprint", Fingerprint::from_bytes([3; 32]).to_string().into_bytes()),
        ],
    );
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        for bytes in [input, &pick(input, &seeds)] {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(key) = text.parse::<AuthKey>() {
                assert_eq!(key.expose(), text.trim());
            }
            if let Ok(id) = text.parse::<NetworkId>() {
                assert_eq!(id.to_string().parse(), Ok(id));
            }
            if let Ok(id) = text.parse::<DeviceId>() {
                assert_eq!(id.to_string().parse(), Ok(id));
            }
            let _ = text.parse::<warren_common::url::CoordinatorUrl>();
            if let Ok(fingerprint) = text.parse::<Fingerprint>() {
                assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
            }
        }
    });
}

fn payload(name: &str) -> Vec<u8> {
    Signed::decode(golden(name).as_slice()).unwrap().payload
}

fn update_of(name: &str, key: &NetmapSecretKey) -> UpdateKind {
    NetmapUpdate::verify(&Signed::decode(golden(name).as_slice()).unwrap(), &key.public()).unwrap().kind
}

fn rng() -> rand_chacha::ChaCha20Rng {
    rand_core::SeedableRng::seed_from_u64(1)
}

fn sessions() -> (Session, Session) {
    let (client, server) = (ControlSecretKey::from_bytes([11; 32]), ControlSecretKey::from_bytes([12; 32]));
    let network = NetworkId::from_bytes([1; 16]);
    let (handshake, hello) = ClientHandshake::start(&client, &server.public(), network, &mut rng()).unwrap();
    let (server, _, answer) = session::accept(&server, network, &hello, &mut rng()).unwrap();
    (handshake.finish(&answer).unwrap(), server)
}
