//! Every parser of bytes from others, fed with a committed corpus, random bytes, and well-formed messages that were
//! tampered with, cut, repeated or spliced. A wrong input is an error; nothing panics.
//!
//! Bounded here ([`ITERATIONS`] inputs each); `cargo bolero test` drives the same targets with a coverage-guided
//! fuzzer. A failure prints its seed; put the input into the target's corpus folder when it is fixed.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use bolero::check;
use prost::Message as _;
use warren_common::auth_key::AuthKey;
use warren_common::ids::NetworkId;
use warren_common::keys::{ControlSecretKey, NetmapSecretKey, RootSecretKey, SignatureDomain};
use warren_common::wire::control::{ClientMessage, CoordinatorIdentity, NetmapUpdate, ServerMessage, Signed};
use warren_common::wire::session::{self, ClientHandshake, Session};
use warren_common::wire::token::RelayToken;

/// Inputs per target, where nothing else is asked for; a tenth where each input costs cryptography.
const ITERATIONS: usize = 20_000;

/// `WARREN_FUZZ_ITERATIONS`, or [`ITERATIONS`].
fn iterations() -> usize {
    let asked = std::env::var("WARREN_FUZZ_ITERATIONS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(ITERATIONS)
}

/// Applies `input` as a list of edits to `seed`: flips bytes, cuts, repeats, splices.
fn tamper(seed: &[u8], input: &[u8]) -> Vec<u8> {
    let mut out = seed.to_vec();
    for edit in input.chunks_exact(4) {
        let at = usize::from(u16::from_be_bytes([edit[1], edit[2]])) % out.len().max(1);
        match edit[0] % 5 {
            0 if !out.is_empty() => out[at] ^= edit[3].max(1),
            1 => out.truncate(at),
            2 if out.len() < 65_536 => out.extend_from_within(at..),
            3 if out.len() < 65_536 => out.insert(at, edit[3]),
            4 => out.extend_from_slice(input),
            _ => {}
        }
    }
    out
}

/// The golden frame `name`, as the first release sent it.
fn golden(name: &str) -> Vec<u8> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../common/tests/golden").join(format!("{name}.hex"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|b| u8::from_str_radix(std::str::from_utf8(b).unwrap(), 16).unwrap()).collect()
}

/// Runs `target` over `input` itself and over each of `seeds` tampered with by `input`.
fn each(input: &[u8], seeds: &[Vec<u8>], target: impl Fn(&[u8])) {
    target(input);
    for seed in seeds {
        target(&tamper(seed, input));
    }
}

#[test]
fn control_messages() {
    let seeds: Vec<_> = ["snapshot", "delta", "identity"].map(golden).to_vec();
    check!().with_iterations(iterations()).for_each(|input: &[u8]| {
        each(input, &seeds, |bytes| {
            let _ = ClientMessage::decode(bytes);
            let _ = ServerMessage::decode(bytes);
        });
    });
}

/// What a signer signs may be nonsense too: the decoder behind the signature must hold on its own.
#[test]
fn signed_documents() {
    let (netmap, root) = (NetmapSecretKey::from_bytes([10; 32]), RootSecretKey::from_bytes([11; 32]));
    let payloads: Vec<_> = ["snapshot", "delta", "lease", "relay_token", "identity"]
        .map(|name| Signed::decode(golden(name).as_slice()).unwrap().payload)
        .to_vec();
    check!().with_iterations(iterations() / 10).for_each(|input: &[u8]| {
        each(input, &payloads, |payload| {
            let sign = |signature: &[u8]| Signed { payload: payload.to_vec(), signature: signature.to_vec() };
            let update = sign(&netmap.sign(SignatureDomain::Netmap, payload));
            let _ = NetmapUpdate::verify(&update, &netmap.public());
            let token = sign(&netmap.sign(SignatureDomain::RelayToken, payload));
            let _ = RelayToken::verify(&token, &netmap.public());
            let identity = sign(&root.sign(SignatureDomain::CoordinatorIdentity, payload));
            let _ = CoordinatorIdentity::verify(&identity, &root.public().fingerprint());
            assert!(NetmapUpdate::verify(&sign(&[0; 64]), &netmap.public()).is_err());
        });
    });
}

#[test]
fn control_handshake() {
    let (client, server) = (ControlSecretKey::from_bytes([11; 32]), ControlSecretKey::from_bytes([12; 32]));
    let network = NetworkId::from_bytes([1; 16]);
    let (_, hello) = ClientHandshake::start(&client, &server.public(), network, &mut rng()).unwrap();
    let (_, _, answer) = session::accept(&server, network, &hello, &mut rng()).unwrap();
    check!().with_iterations(iterations() / 10).for_each(|input: &[u8]| {
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
    check!().with_iterations(iterations() / 10).for_each(|input: &[u8]| {
        let (mut client, mut server) = sessions();
        let frame = client.seal(input).unwrap().remove(0);
        let tampered = tamper(&frame, input);
        assert_eq!(server.open(&tampered).is_ok(), tampered == frame, "a frame that nobody sealed");
    });
}

#[test]
fn auth_keys() {
    check!().with_iterations(iterations()).for_each(|input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        let _ = text.parse::<AuthKey>();
        let _ = format!("wkey-{text}").parse::<AuthKey>();
    });
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
