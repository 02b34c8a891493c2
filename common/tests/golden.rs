//! Frames of the first release, byte for byte. A change that moves one of them breaks agents in the field.
//!
//! `WARREN_BLESS=1 cargo test -p warren-common --test golden` writes fixtures that do not exist yet, never others.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use data_encoding::HEXLOWER;
use prost::Message;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use warren_common::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId, UnixInterval};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{
    ControlPublicKey, ControlSecretKey, NetmapSecretKey, ProbePublicKey, RootSecretKey, WgPublicKey,
};
use warren_common::netmap::{AppGrant, Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::time::UnixTime;
use warren_common::wire::control::{
    Ack, ClientBody, ClientMessage, CoordinatorIdentity, Enroll, NetmapUpdate, Refused, Resume, ServerBody,
    ServerMessage, Signal, Signed, UpdateKind, Welcome,
};
use warren_common::wire::session::{self, ClientHandshake};
use warren_common::wire::token::RelayToken;

fn golden(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"));
    let lines: Vec<_> = bytes.chunks(48).map(|line| HEXLOWER.encode(line)).collect();
    let got = lines.join("\n") + "\n";
    if std::env::var_os("WARREN_BLESS").is_some() && !path.exists() {
        std::fs::write(&path, &got).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(got, want, "{name} moved");
}

fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(1)
}

fn netmap() -> Netmap {
    let net = |text: &str| IpRange::from(text.parse::<ipnet::IpNet>().unwrap());
    let rule = FilterRule {
        id: RuleId(0x1122_3344_5566_7788),
        origin: "grants[0] line 3".into(),
        action: Action::Allow,
        staged: false,
        src: vec![net("100.64.0.2/32"), net("fd00::2/128")],
        dst: vec![FilterDst { net: net("100.64.0.1/32"), ports: PortRange { first: 22, last: 80 } }],
        protos: vec![6, 17],
        active: Some(vec![UnixInterval { from: 1_700_000_000, until: 1_800_000_000 }]),
    };
    let deny =
        FilterRule { action: Action::Deny, staged: true, active: None, protos: vec![], ..rule.clone() };
    let peer = Peer {
        id: DeviceId::from_bytes([3; 16]),
        wg: WgPublicKey::from_bytes([4; 32]),
        probe: ProbePublicKey::from_bytes([5; 32]),
        addrs: vec!["100.64.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        routes: vec!["10.0.0.0/8".parse().unwrap()],
        name: Some("peer".into()),
        user: None,
        tags: vec!["tag:server".into()],
        home_relay: Some(RelayId::from_bytes([6; 16])),
        key_signature: None,
    };
    let relay = Relay {
        id: RelayId::from_bytes([6; 16]),
        name: "home".into(),
        addrs: vec!["203.0.113.1:443".parse().unwrap()],
        stun: vec!["203.0.113.1:3478".parse().unwrap()],
        cert_sha256: [7; 32],
        peer: false,
    };
    Netmap {
        network: Network {
            id: NetworkId::from_bytes([1; 16]),
            name: "golden".into(),
            ipv4: "100.64.0.0/10".parse().unwrap(),
            ipv6: "fd00::/48".parse().unwrap(),
        },
        device: SelfDevice {
            id: DeviceId::from_bytes([2; 16]),
            name: "self".into(),
            addrs: vec!["100.64.0.1".parse().unwrap()],
            user: Some("ada@example.com".into()),
            tags: vec![],
            attrs: Vec::new(),
        },
        peers: BTreeMap::from([(peer.id, peer.into())]),
        ingress: BTreeSet::from([rule, deny.clone()]),
        egress: BTreeSet::from([deny]),
        relays: BTreeMap::from([(relay.id, relay)]),
        apps: BTreeSet::new(),
    }
}

/// The same with an application capability and an attribute: what came later leaves the bytes and the hash of what lacks it
/// as they were.
fn with_capability() -> Netmap {
    let app = AppGrant {
        id: RuleId(3),
        name: "example.com/cap/edit".into(),
        src: vec![IpRange::from(IpAddr::from([100, 64, 0, 2]))],
        dst: vec![IpRange::from(IpAddr::from([100, 64, 0, 1]))],
        values: vec![r#"{"docs":["a"]}"#.into()],
        active: Some(vec![UnixInterval { from: 1_700_000_000, until: 1_800_000_000 }]),
    };
    let mut netmap = netmap();
    netmap.device.attrs = vec!["example.com/beta".into()];
    Netmap { apps: BTreeSet::from([app]), ..netmap }
}

fn update(netmap: &Netmap, kind: UpdateKind, from: u64) -> NetmapUpdate {
    NetmapUpdate {
        network: NetworkId::from_bytes([1; 16]),
        device: DeviceId::from_bytes([2; 16]),
        device_key: ControlPublicKey::from_bytes([8; 32]),
        epoch: 1,
        from,
        to: 42,
        hash: netmap.hash(),
        lease_ms: 86_400_000,
        issued: UnixTime::from_secs(1_700_000_000),
        kind,
    }
}

#[test]
fn identity() {
    let root = RootSecretKey::generate(&mut rng());
    let identity = CoordinatorIdentity {
        network: NetworkId::from_bytes([1; 16]),
        network_name: "golden".into(),
        root: root.public(),
        control: ControlPublicKey::from_bytes([9; 32]),
        netmap: NetmapSecretKey::from_bytes([10; 32]).public(),
        epoch: 1,
    };
    let signed = identity.sign(&root);
    golden("identity", &signed.encode_to_vec());
    assert_eq!(CoordinatorIdentity::verify(&signed, &root.public().fingerprint()), Ok(identity));
    let other = RootSecretKey::from_bytes([3; 32]).public().fingerprint();
    assert!(CoordinatorIdentity::verify(&signed, &other).is_err());
}

#[test]
fn updates() {
    let key = NetmapSecretKey::from_bytes([10; 32]);
    let mut old = netmap();
    old.peers.clear();
    old.ingress.clear();
    let (new, later) = (netmap(), with_capability());
    let delta = Netmap::diff(&old, &new);
    let gains = Netmap::diff(&new, &later);
    for (name, update) in [
        ("snapshot", update(&new, UpdateKind::Snapshot(Box::new(new.clone())), 0)),
        ("delta", update(&new, UpdateKind::Delta(Box::new(delta)), 41)),
        ("lease", update(&new, UpdateKind::Lease, 42)),
        ("snapshot_capability", update(&later, UpdateKind::Snapshot(Box::new(later.clone())), 0)),
        ("delta_capability", update(&later, UpdateKind::Delta(Box::new(gains)), 41)),
    ] {
        let signed = update.sign(&key);
        golden(name, &signed.encode_to_vec());
        let read = Signed::decode(signed.encode_to_vec().as_slice()).unwrap();
        assert_eq!(NetmapUpdate::verify(&read, &key.public()), Ok(update));
        let tampered = Signed { payload: [read.payload.as_slice(), &[0]].concat(), ..read };
        assert!(NetmapUpdate::verify(&tampered, &key.public()).is_err());
    }
}

#[test]
fn relay_token() {
    let key = NetmapSecretKey::from_bytes([10; 32]);
    let token = RelayToken {
        network: NetworkId::from_bytes([1; 16]),
        relay: RelayId::from_bytes([6; 16]),
        device: DeviceId::from_bytes([2; 16]),
        probe: ProbePublicKey::from_bytes([5; 32]),
        revision: 42,
        expires: UnixTime::from_secs(1_700_000_600),
        peers: vec![DeviceId::from_bytes([3; 16])],
    };
    let signed = token.sign(&key);
    golden("relay_token", &signed.encode_to_vec());
    assert_eq!(RelayToken::verify(&signed, &key.public()), Ok(token));
    // A netmap key's signature for another purpose is none here.
    assert!(NetmapUpdate::verify(&signed, &key.public()).is_err());
}

#[test]
fn session_and_messages() {
    let mut rng = rng();
    let (client, server) = (ControlSecretKey::from_bytes([11; 32]), ControlSecretKey::from_bytes([12; 32]));
    let network = NetworkId::from_bytes([1; 16]);
    let (handshake, hello) = ClientHandshake::start(&client, &server.public(), network, &mut rng).unwrap();
    golden("handshake_1", &hello);
    let (mut server, _, answer) = session::accept(&server, network, &hello, &mut rng).unwrap();
    golden("handshake_2", &answer);
    let mut client = handshake.finish(&answer).unwrap();
    let up = [
        ClientBody::Enroll(Enroll {
            auth_key: "wkey-x".into(),
            hostname: "box".into(),
            wg: vec![4; 32],
            probe: vec![5; 32],
            os: "linux".into(),
            version: "0.1.0".into(),
        }),
        ClientBody::Resume(Resume {
            device: vec![2; 16],
            generation: 7,
            epoch: 1,
            revision: 42,
            hash: vec![1; 32],
            version: "0.1.0".into(),
        }),
        ClientBody::Ack(Ack { epoch: 1, revision: 42, want_snapshot: true, reason: "hash".into() }),
        ClientBody::Signal(Signal { device: vec![3; 16], sealed: vec![1, 2, 3] }),
    ];
    for (i, body) in up.into_iter().enumerate() {
        let message = ClientMessage { body: Some(body) };
        let frame = client.seal(&message.encode_to_vec()).unwrap().remove(0);
        golden(&format!("client_{i}"), &frame);
        let read = server.open(&frame).unwrap().unwrap();
        assert_eq!(ClientMessage::decode(read.as_slice()), Ok(message));
    }
    let down = [
        ServerBody::Welcome(Welcome { device: vec![2; 16], generation: 8, unix_us: 1_700_000_000_000_000 }),
        ServerBody::Refused(Refused { code: "busy".into(), text: "t".into(), fix: "f".into() }),
    ];
    for (i, body) in down.into_iter().enumerate() {
        let message = ServerMessage { body: Some(body) };
        let frame = server.seal(&message.encode_to_vec()).unwrap().remove(0);
        golden(&format!("server_{i}"), &frame);
        let read = client.open(&frame).unwrap().unwrap();
        assert_eq!(ServerMessage::decode(read.as_slice()), Ok(message));
    }
}

#[test]
fn unknown_kinds_are_ignored_not_refused() {
    // Field 100, length-delimited, as a newer coordinator might send it.
    let message = ServerMessage::decode(&[0xa2, 0x06, 0x01, 0x00][..]).unwrap();
    assert_eq!(message.body, None);
}
