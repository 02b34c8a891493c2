//! What a process finds on its own disk after a crash, a bad copy or somebody's edit, and what local callers say over its
//! socket. A damaged file is named and left as it is. See `fuzz.rs` for the method.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper fails by panicking")]

use std::fs;
use std::path::Path;

use bolero::check;
use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use sha2::{Digest as _, Sha256};
use warren_agent::api::Request;
use warren_agent::os::journal::Journal;
use warren_agent::problem::Problem;
use warren_agent::state::{NetworkDir, StateDir};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{ControlPublicKey, Fingerprint, NetmapSecretKey, ProbeSecretKey, WgSecretKey};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::Signed;
use warren_common::wire::relay_control::{RelayJoinKey, RelayJoinSecret};
use warren_coordinator::admin::Call;
use warren_coordinator::keys::{KeyError, Keys};
use warren_engine::engine::{Config, Engine};
use warren_engine::netmap::{Identity, SavedNetmap};
use warren_netns_tests::fuzz::{corpus, golden, inputs, pick, tamper};
use warren_relay::join::{State, StateError};

const NETWORK: NetworkId = NetworkId::from_bytes([1; 16]);

type Load = fn(&StateDir, &NetworkDir) -> Result<(), Problem>;

/// The agent's files: name, kind in the first line, what reads it.
const AGENT_FILES: [(&str, &str, Load); 7] = [
    ("settings", "settings", |state, _| state.settings().map(drop)),
    ("journal", "journal", |state, _| state.journal::<Journal>().map(drop)),
    ("keys", "keys", |_, network| network.keys().map(drop)),
    ("identity", "identity", |_, network| network.identity().map(drop)),
    ("device", "device", |_, network| network.membership().map(drop)),
    ("handshakes", "handshakes", |_, network| network.handshake_floor().map(drop)),
    ("netmap", "netmap", |_, network| network.netmap().map(drop)),
];

#[test]
fn agent_state_files() {
    let key = |prefix: &str| format!("{prefix}{}", "A".repeat(43));
    let identity = serde_json::json!({
        "url": "https://warren.example", "root": Fingerprint::from_bytes([2; 32]), "network_name": "fuzz",
        "control": key("ctl:"), "netmap": key("map:"), "epoch": 1,
    });
    let settings =
        serde_json::json!({"network": NETWORK, "want_up": true, "port": 51_820, "hostname": "box"});
    let seeds = corpus(
        "agent_state_files",
        vec![
            ("settings", settings.to_string().into_bytes()),
            ("journal", br#"{"boot_id":"b","changes":[{"kind":"nft","table":"t"}]}"#.to_vec()),
            ("keys", [[1; 32], [2; 32], [3; 32]].concat()),
            ("identity", identity.to_string().into_bytes()),
            (
                "device",
                serde_json::json!({"device": DeviceId::from_bytes([2; 16]), "generation": 7})
                    .to_string()
                    .into_bytes(),
            ),
            ("handshakes", b"1800000000000000".to_vec()),
            ("netmap", saved_netmap().as_bytes().to_vec()),
        ],
    );
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("state")).unwrap();
    let network = state.network(NETWORK).unwrap();
    let folder = dir.path().join("state/networks").join(NETWORK.to_string());
    let path_of = |name: &str| {
        let own = matches!(name, "settings" | "journal");
        if own { dir.path().join("state").join(name) } else { folder.join(name) }
    };
    let read = |nth: usize, bytes: &[u8]| {
        let (name, _, load) = AGENT_FILES[nth];
        let path = path_of(name);
        fs::write(&path, bytes).unwrap();
        let result = load(&state, &network);
        assert!(fs::read(&path).unwrap() == bytes, "{} was changed", path.display());
        if let Err(problem) = &result {
            assert_eq!(problem.code, "state-damaged", "{problem}");
            assert!(problem.text.contains(name), "{problem}");
        }
        result.is_ok()
    };
    for (nth, seed) in seeds.iter().enumerate() {
        assert!(read(nth, &with_header(AGENT_FILES[nth].1, seed)), "{} is a good file", AGENT_FILES[nth].0);
    }
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        let (which, rest) = input.split_first().unwrap_or((&0, &[]));
        let nth = usize::from(*which) % AGENT_FILES.len();
        let kind = AGENT_FILES[nth].1;
        // A changed file shows by its first line; contents under a right first line are read.
        let good = with_header(kind, &seeds[nth]);
        let changed = tamper(&good, rest);
        assert_eq!(read(nth, &changed), changed == good, "a file that nobody wrote");
        assert!(!read(nth, input));
        read(nth, &with_header(kind, &tamper(&seeds[nth], rest)));
        read(nth, &with_header(kind, rest));
    });
}

fn with_header(kind: &str, body: &[u8]) -> Vec<u8> {
    let hash = data_encoding::HEXLOWER.encode(&Sha256::digest(body));
    [format!("warren-state-1 {kind} sha256:{hash}\n").as_bytes(), body].concat()
}

/// What a netmap file holds is believed only if it is of this network and device, and then it is in force.
#[test]
fn saved_netmaps() {
    let seeds = corpus("saved_netmaps", vec![("netmap", saved_netmap().as_bytes()[32..].to_vec())]);
    check!().with_iterations(inputs(20)).for_each(|input: &[u8]| {
        for body in [input, &tamper(&seeds[0], input)] {
            let saved = [Sha256::digest(body).as_slice(), body].concat();
            let mut engine = engine();
            match engine.restore(now(), &SavedNetmap::from_bytes(saved)) {
                Ok(()) => {
                    let (_, _, hash) = engine.held().unwrap();
                    assert_eq!(engine.netmap().unwrap().hash(), hash);
                    assert_eq!(engine.status(now()).network.unwrap().id, NETWORK);
                    let again = engine.to_saved(now()).unwrap();
                    assert!(engine.restore(now(), &again).is_ok());
                }
                Err(_) => assert!(engine.held().is_none()),
            }
        }
        let whole = tamper(saved_netmap().as_bytes(), input);
        let good = whole == saved_netmap().as_bytes();
        assert_eq!(engine().restore(now(), &SavedNetmap::from_bytes(whole)).is_ok(), good);
    });
}

fn now() -> Now {
    Now { boot: Instant::from_nanos(1_000_000_000_000), unix: UnixTime::from_secs(1_700_000_100) }
}

/// An engine of the device that the golden netmap is for.
fn engine() -> Engine {
    Engine::new(Config {
        identity: Identity {
            network: NETWORK,
            device: DeviceId::from_bytes([2; 16]),
            control: ControlPublicKey::from_bytes([8; 32]),
            netmap_key: NetmapSecretKey::from_bytes([10; 32]).public(),
            epoch: 1,
        },
        wg: WgSecretKey::from_bytes([3; 32]),
        probe: ProbeSecretKey::from_bytes([4; 32]),
        seed: [5; 32],
        boot_id: [6; 16],
        mtu: 1_280,
        handshake_floor: UnixTime::default(),
    })
}

fn saved_netmap() -> SavedNetmap {
    let signed = Signed::decode(golden("snapshot").as_slice()).unwrap();
    engine().check_update(now(), &signed).expect("the golden snapshot is good").to_saved()
}

#[test]
fn relay_state_files() {
    let key = RelayJoinKey {
        network: NETWORK,
        root: Fingerprint::from_bytes([2; 32]),
        relay: RelayId::from_bytes([3; 16]),
        secret: RelayJoinSecret::from_slice(&[4; 32]).unwrap(),
    };
    let good = serde_json::json!({
        "version": 1, "network": key.network, "root": key.root, "relay": key.relay,
        "secret": "A".repeat(43), "joined": true,
    });
    let seeds = corpus("relay_state_files", vec![("relay.json", good.to_string().into_bytes())]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("relay.json");
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let result = State::open(dir.path(), Some(&key));
        assert!(fs::read(&path).unwrap() == bytes, "the file was changed");
        result
    };
    open(&seeds[0]).expect("a good file");
    check!().with_iterations(inputs(20)).for_each(|input: &[u8]| {
        for bytes in [input, &tamper(&seeds[0], input)] {
            match open(bytes) {
                Ok(_) | Err(StateError::OtherRelay { .. }) => {}
                Err(StateError::Corrupt { path: named, .. }) => assert_eq!(named, path),
                Err(other) => panic!("{other}"),
            }
        }
    });
}

#[test]
fn coordinator_key_files() {
    const NAMES: [&str; 3] = ["root.key", "control.key", "netmap.key"];
    let seeds = corpus(
        "coordinator_key_files",
        vec![("root.key", format!("secret:{}\n", "A".repeat(43)).into_bytes())],
    );
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let load = || Keys::load(dir.path(), false, &mut ChaCha20Rng::seed_from_u64(1));
    NAMES.iter().for_each(|name| write(name, &seeds[0]));
    load().expect("good files");
    check!().with_iterations(inputs(20)).for_each(|input: &[u8]| {
        let (which, rest) = input.split_first().unwrap_or((&0, &[]));
        let name = NAMES[usize::from(*which) % NAMES.len()];
        for bytes in [rest, &tamper(&seeds[0], rest)] {
            write(name, bytes);
            match load() {
                Ok(_) => {}
                Err(KeyError::Damaged(path)) => assert_eq!(path, dir.path().join(name)),
                Err(other) => panic!("{other}"),
            }
            assert!(read(&dir.path().join(name)) == bytes);
        }
        write(name, &seeds[0]);
    });
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// What decodes encodes to the same thing.
#[test]
fn local_requests() {
    let texts = [
        ("up", r#"{"verb":"up","coordinator":"https://warren.example","auth_key":"wkey-x","timeout_ms":1}"#),
        (
            "why",
            r#"{"network":"net_00000000000000000000000000","verb":"why","dst":"db","port":22,"proto":6}"#,
        ),
        ("whois", r#"{"verb":"whois","ip":"fd00::1"}"#),
        (
            "auth_key_create",
            r#"{"verb":"auth-key-create","tags":["tag:a"],"user":null,"reusable":true,"ephemeral":false,"life_s":3600}"#,
        ),
        ("policy_set", r#"{"verb":"policy-set","text":"{}"}"#),
    ];
    let seeds = corpus("local_requests", texts.map(|(name, text)| (name, text.as_bytes().to_vec())).to_vec());
    for seed in &seeds {
        let request = serde_json::from_slice::<Request>(seed).is_ok();
        assert!(request || serde_json::from_slice::<Call>(seed).is_ok(), "{}", String::from_utf8_lossy(seed));
    }
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        for bytes in [input, &pick(input, &seeds)] {
            if let Ok(request) = serde_json::from_slice::<Request>(bytes) {
                let text = serde_json::to_string(&request).unwrap();
                assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
            }
            if let Ok(call) = serde_json::from_slice::<Call>(bytes) {
                let value = serde_json::to_value(&call).unwrap();
                let again: Call = serde_json::from_value(value.clone()).unwrap();
                assert_eq!(serde_json::to_value(&again).unwrap(), value);
            }
        }
    });
}
