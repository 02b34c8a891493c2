//! Probes between devices. See `fuzz.rs` for the method.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::net::SocketAddr;

use arrayvec::ArrayVec;
use bolero::check;
use warren_common::keys::ProbeSecretKey;
use warren_common::wire::probe::{
    Candidate, CandidateKind, MAX_PROBE_LEN, Message, NONCE_LEN, OVERHEAD, ProbeKeys, TXID_LEN,
};
use warren_netns_tests::fuzz::{corpus, each, inputs};

#[test]
fn probe_messages() {
    let plain = |message: &Message| {
        let mut out = ArrayVec::new();
        message.encode(&mut out);
        out.to_vec()
    };
    let names = ["ping", "pong", "pong_relayed", "candidates"];
    let seeds = corpus("probe_messages", names.into_iter().zip(probe_examples().iter().map(plain)).collect());
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        each(input, &seeds, |bytes| {
            let Ok(message) = Message::decode(bytes) else { return };
            let mut again = ArrayVec::<u8, MAX_PROBE_LEN>::new();
            message.encode(&mut again);
            assert!(again.len() + OVERHEAD <= MAX_PROBE_LEN);
            assert_eq!(Message::decode(&again), Ok(message));
        });
    });
}

#[test]
fn probes() {
    let (a, b) = (ProbeSecretKey::from_bytes([1; 32]), ProbeSecretKey::from_bytes([2; 32]));
    let ours = ProbeKeys::derive(&a, &a.public(), &b.public()).unwrap();
    let theirs = ProbeKeys::derive(&b, &b.public(), &a.public()).unwrap();
    let names = ["ping", "pong", "pong_relayed", "candidates"];
    let sealed = probe_examples().map(|message| ours.seal(&message, [9; NONCE_LEN]).to_vec());
    let seeds = corpus("probes", names.into_iter().zip(sealed).collect());
    check!().with_iterations(inputs(4)).for_each(|input: &[u8]| {
        each(input, &seeds, |bytes| {
            let genuine = seeds.iter().any(|seed| seed == bytes);
            assert_eq!(theirs.open(bytes).is_ok(), genuine, "a probe that nobody sealed");
            assert!(ours.open(bytes).is_err(), "a reflected probe");
        });
    });
}

fn probe_examples() -> [Message; 4] {
    let v4 = SocketAddr::from(([192, 0, 2, 1], 51_820));
    let v6 = SocketAddr::new("2001:db8::1".parse().unwrap(), 7);
    let candidates = [
        Candidate { kind: CandidateKind::Local, addr: v4 },
        Candidate { kind: CandidateKind::Reflexive, addr: v6 },
    ];
    [
        Message::Ping { txid: [3; TXID_LEN] },
        Message::Pong { txid: [3; TXID_LEN], observed: Some(v4) },
        Message::Pong { txid: [3; TXID_LEN], observed: None },
        Message::Candidates { request: true, candidates: candidates.into_iter().collect(), ports: None },
    ]
}
