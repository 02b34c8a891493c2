//! Promise 3: a device learns of a peer only what a grant gives it a need for, and a one-way grant leaks no more than
//! needed to answer. Looked at in the bytes that are sent, not in what they are meant to be.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use warren_common::ids::NetworkId;
use warren_common::keys::{ControlPublicKey, Fingerprint, ProbePublicKey, WgPublicKey};
use warren_common::netmap::Netmap;
use warren_common::time::UnixTime;
use warren_common::wire::control::NetmapMsg;
use warren_coordinator::domain::reach::Reach;
use warren_coordinator::domain::records::PeerRecords;
use warren_coordinator::domain::{
    Command, Device, EnrollRequest, NewAuthKey, PolicySource, Reply, Settings, State,
};

const NOW: UnixTime = UnixTime::from_secs(1_000_000_000);
/// The roles of the little world: `tag:t0` …
const TAGS: usize = 4;

struct World {
    state: State,
    rng: ChaCha20Rng,
    next: u8,
}

impl World {
    fn new() -> Self {
        let settings = Settings {
            network: NetworkId::from_bytes([1; 16]),
            name: "test".into(),
            root: Fingerprint::from_bytes([2; 32]),
            ipv4: "100.64.0.0/10".parse().unwrap(),
            ipv6: "fd00:1234:5678::/48".parse().unwrap(),
            epoch: 1,
            revisions_reserved: 0,
        };
        Self { state: State::new(settings), rng: ChaCha20Rng::seed_from_u64(1), next: 100 }
    }

    fn run(&mut self, command: &Command) -> Reply {
        let (changes, reply) = self.state.apply(command, NOW, &mut self.rng).unwrap();
        changes.into_iter().for_each(|change| drop(self.state.absorb(change)));
        reply
    }

    /// Lets a device in: of a user, or with tags.
    fn join(&mut self, user: Option<&str>, tags: &[String], hostname: &str) -> Device {
        let new = NewAuthKey { user: user.map(str::to_owned), tags: tags.to_vec(), ..NewAuthKey::default() };
        let Reply::AuthKey(auth_key) = self.run(&Command::CreateAuthKey(new)) else { unreachable!() };
        self.next += 1;
        let n = self.next;
        let request = EnrollRequest {
            control: ControlPublicKey::from_bytes([n; 32]),
            wg: WgPublicKey::from_bytes([n ^ 0x55; 32]),
            probe: ProbePublicKey::from_bytes([n ^ 0xaa; 32]),
            auth_key,
            hostname: hostname.into(),
            os: format!("os-of-{hostname}"),
            version: format!("version-of-{hostname}"),
        };
        let Reply::Admitted { device, .. } = self.run(&Command::Enroll(Box::new(request))) else {
            unreachable!()
        };
        self.state.device(device).unwrap().clone()
    }

    fn policy(&mut self, text: &str) {
        self.run(&Command::SetPolicy { source: PolicySource::Api, text: text.into() });
    }

    fn netmap(&self, device: &Device) -> Netmap {
        Reach::compute(&self.state, NOW).netmap(&self.state, device.id, &PeerRecords::default()).unwrap()
    }
}

fn bytes(netmap: &Netmap) -> Vec<u8> {
    NetmapMsg::from(netmap).encode_to_vec()
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// What a netmap says of `other`, by what can be found in its bytes.
fn traces(netmap: &Netmap, other: &Device) -> BTreeSet<&'static str> {
    let sent = bytes(netmap);
    let facts: [(&str, Vec<u8>); 8] = [
        ("id", other.id.to_bytes().to_vec()),
        ("control key", other.control.as_bytes().to_vec()),
        ("wg key", other.wg.as_bytes().to_vec()),
        ("probe key", other.probe.as_bytes().to_vec()),
        ("address", other.ipv6.octets().to_vec()),
        ("name", other.name.clone().into_bytes()),
        ("os", other.os.clone().into_bytes()),
        ("version", other.version.clone().into_bytes()),
    ];
    let mut found: BTreeSet<&str> =
        facts.iter().filter(|(_, fact)| holds(&sent, fact)).map(|(what, _)| *what).collect();
    // Four bytes may occur by chance: these are looked for where they can stand.
    let v4 = other.addrs()[0];
    let in_rules =
        netmap.ingress.iter().chain(&netmap.egress).any(|rule| {
            let nets = rule.src.iter().chain(rule.dst.iter().map(|d| &d.net));
            // A range of many addresses says nothing of one.
            nets.into_iter().any(|net| net.first() == v4 && net.last() == v4)
        }) || netmap.apps.iter().flat_map(|app| &app.src).any(|net| net.first() == v4 && net.last() == v4);
    if in_rules || netmap.peers.values().any(|p| p.addrs.contains(&v4)) {
        found.insert("address");
    }
    found
}

#[test]
fn a_one_way_grant_tells_each_end_what_it_needs_and_others_nothing() {
    let mut world = World::new();
    let tag = |name: &str| [format!("tag:{name}")];
    let web =
        [world.join(None, &tag("web"), "webserver-one"), world.join(None, &tag("web"), "webserver-two")];
    let db = world.join(None, &tag("db"), "database-one");
    let lonely = world.join(None, &tag("lonely"), "lonely-one");
    let ann = world.join(Some("ann@example.com"), &[], "laptop-of-ann");
    let bob = world.join(Some("bob@example.com"), &[], "laptop-of-bob");
    let everybody = [&web[0], &web[1], &db, &lonely, &ann, &bob];
    // Without a policy nobody hears of anybody.
    for (one, other) in everybody.iter().flat_map(|a| everybody.iter().map(move |b| (a, b))) {
        if one.id != other.id {
            assert_eq!(traces(&world.netmap(one), other), BTreeSet::new(), "{} of {}", one.name, other.name);
        }
    }
    world.policy(
        r#"{"tagOwners": {"tag:web": [], "tag:db": [], "tag:lonely": []},
            "groups": {"group:secret-project": ["ann@example.com"]},
            "hosts": {"secret-host": "100.64.9.9"},
            "acls": [{"action": "accept", "src": ["tag:web"], "dst": ["tag:db:5432"]},
                     {"action": "accept", "src": ["group:secret-project"], "dst": ["tag:web:443"]}]}"#,
    );
    let reach = BTreeSet::from(["id", "wg key", "probe key", "address", "name"]);
    let answer = BTreeSet::from(["id", "wg key", "probe key", "address"]);
    let nothing = BTreeSet::new();
    let expect = |one: &Device, other: &Device| match (one.name.as_str(), other.name.as_str()) {
        (a, "database-one") if a.starts_with("webserver") => &reach,
        ("database-one", b) if b.starts_with("webserver") => &answer,
        ("laptop-of-ann", b) if b.starts_with("webserver") => &reach,
        (a, "laptop-of-ann") if a.starts_with("webserver") => &answer,
        // Not the other web server, nor who else is in the same rule.
        _ => &nothing,
    };
    for (one, other) in everybody.iter().flat_map(|a| everybody.iter().map(move |b| (a, b))) {
        if one.id != other.id {
            assert_eq!(
                &traces(&world.netmap(one), other),
                expect(one, other),
                "{} of {}",
                one.name,
                other.name
            );
        }
    }
    // Who only answers may open nothing, hears who asks, and never the policy's own words.
    let netmap = world.netmap(&db);
    assert!(netmap.egress.is_empty() && !netmap.ingress.is_empty());
    assert_eq!(world.netmap(&web[0]).peers[&ann.id].user.as_deref(), Some("ann@example.com"));
    for device in everybody {
        let sent = bytes(&world.netmap(device));
        for word in ["secret-project", "secret-host", "bob@example.com"] {
            assert!(device.id == bob.id || !holds(&sent, word.as_bytes()), "{} hears of {word}", device.name);
        }
    }
    // What is taken away is gone.
    world.policy("{}");
    assert_eq!(traces(&world.netmap(&web[0]), &db), nothing);
}

fn grant() -> impl Strategy<Value = (usize, usize, u16)> {
    (0..TAGS, 0..TAGS, 1..5u16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// In a random little world, each device's netmap is about exactly those that some rule connects it with.
    #[test]
    fn nobody_else_is_in_a_netmap(
        devices in prop::collection::vec(prop::collection::btree_set(0..TAGS, 1..3), 2..7),
        grants in prop::collection::vec(grant(), 0..4),
    ) {
        let mut world = World::new();
        let joined: Vec<Device> = devices
            .iter()
            .enumerate()
            .map(|(n, tags)| {
                let tags: Vec<String> = tags.iter().map(|t| format!("tag:t{t}")).collect();
                world.join(None, &tags, &format!("device-number-{n}-of-the-world"))
            })
            .collect();
        let rules: Vec<String> = grants
            .iter()
            .map(|(src, dst, port)| {
                format!(r#"{{"action": "accept", "src": ["tag:t{src}"], "dst": ["tag:t{dst}:{port}"]}}"#)
            })
            .collect();
        let owners: Vec<String> = (0..TAGS).map(|t| format!(r#""tag:t{t}": []"#)).collect();
        // A capability of everybody at everybody, which opens nothing.
        let grants_of_apps = r#"{"src": ["*"], "dst": ["*"], "app": {"example.com/cap/x": [{"y": 1}]}}"#;
        world.policy(&format!(
            r#"{{"tagOwners": {{{}}}, "acls": [{}], "grants": [{grants_of_apps}]}}"#,
            owners.join(","), rules.join(","),
        ));
        for (a, one) in joined.iter().enumerate() {
            let netmap = world.netmap(one);
            for (b, other) in joined.iter().enumerate().filter(|(b, _)| *b != a) {
                let allowed = |from: usize, to: usize| {
                    grants.iter().any(|(s, d, _)| devices[from].contains(s) && devices[to].contains(d))
                };
                let wanted: &[&str] = match (allowed(a, b), allowed(b, a)) {
                    (true, _) => &["id", "wg key", "probe key", "address", "name"],
                    (false, true) => &["id", "wg key", "probe key", "address"],
                    (false, false) => &[],
                };
                prop_assert_eq!(traces(&netmap, other), wanted.iter().copied().collect::<BTreeSet<_>>());
                let may = netmap.apps.iter().any(|app| {
                    app.values == [r#"{"y":1}"#] && app.src.iter().any(|r| r.contains(other.ipv4.into()))
                });
                prop_assert_eq!(may, !wanted.is_empty());
            }
        }
    }
}
