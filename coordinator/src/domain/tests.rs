use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use warren_common::auth_key::{AuthKey, AuthKeySecret};
use warren_common::ids::NetworkId;
use warren_common::keys::{Fingerprint, ProbePublicKey, WgPublicKey};
use warren_common::netmap::MAX_PEER_RELAYS;

use super::reach::Reach;
use super::records::PeerRecords;
use super::*;

fn settings(pool: &str) -> Settings {
    Settings {
        network: NetworkId::from_bytes([1; 16]),
        name: "test".into(),
        root: Fingerprint::from_bytes([2; 32]),
        ipv4: pool.parse().unwrap(),
        ipv6: "fd00::/48".parse().unwrap(),
        epoch: 1,
        revisions_reserved: 0,
    }
}

/// A state and the generator and clock it is driven with.
struct World {
    state: State,
    rng: ChaCha20Rng,
    now: UnixTime,
}

impl World {
    fn new(pool: &str) -> Self {
        Self {
            state: State::new(settings(pool)),
            rng: ChaCha20Rng::seed_from_u64(3),
            now: UnixTime::from_secs(1_000_000_000),
        }
    }

    fn run(&mut self, command: &Command) -> Result<Reply, Refusal> {
        let (changes, reply) = self.state.apply(command, self.now, &mut self.rng)?;
        changes.into_iter().for_each(|change| {
            self.state.absorb(change);
        });
        Ok(reply)
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    fn key(&mut self, new: NewAuthKey) -> AuthKey {
        match self.run(&Command::CreateAuthKey(new)) {
            Ok(Reply::AuthKey(key)) => key,
            other => panic!("{other:?}"),
        }
    }

    fn enroll(&mut self, key: &AuthKey, device: u8) -> Result<(DeviceId, u64), Refusal> {
        match self.run(&enroll(key, device, "host"))? {
            Reply::Admitted { device, generation } => Ok((device, generation)),
            other => panic!("{other:?}"),
        }
    }

    fn resume(&mut self, (device, generation): (DeviceId, u64), seed: u8) -> Result<u64, Refusal> {
        let control = ControlPublicKey::from_bytes([seed; 32]);
        let command = Command::Resume { device, control, generation, version: String::new() };
        match self.run(&command)? {
            Reply::Admitted { generation, .. } => Ok(generation),
            other => panic!("{other:?}"),
        }
    }
}

fn enroll(key: &AuthKey, device: u8, hostname: &str) -> Command {
    Command::Enroll(Box::new(EnrollRequest {
        control: ControlPublicKey::from_bytes([device; 32]),
        wg: WgPublicKey::from_bytes([device; 32]),
        probe: ProbePublicKey::from_bytes([device; 32]),
        auth_key: key.clone(),
        hostname: hostname.into(),
        os: "linux".into(),
        version: "0.1".into(),
    }))
}

fn reusable() -> NewAuthKey {
    NewAuthKey { reusable: true, ..NewAuthKey::default() }
}

fn tagged(tag: &str) -> NewAuthKey {
    NewAuthKey { tags: vec![tag.into()], reusable: true, ..NewAuthKey::default() }
}

/// By [`RELAYING`] and no other policy, worked out by hand.
fn granted_relays(state: &State, user: DeviceId) -> BTreeSet<RelayId> {
    let active = |d: &&Device| state.device_state(d) == DeviceState::Active;
    let tagged = |d: &Device, tag: &str| d.tags.iter().any(|t| t == tag);
    let in_force = state.policy().is_some_and(|p| p.text == RELAYING);
    if !in_force || state.device(user).filter(active).is_none_or(|d| !tagged(d, "tag:a")) {
        return BTreeSet::new();
    }
    let relays = state.devices().values().filter(active).filter(|d| d.relay.is_some() && tagged(d, "tag:b"));
    relays.map(Device::relay_id).collect::<BTreeSet<_>>().into_iter().take(MAX_PEER_RELAYS).collect()
}

#[test]
fn an_offer_to_relay_is_taken_with_addresses_that_others_may_be_sent_to() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(tagged("tag:b"));
    let (device, _) = world.enroll(&key, 1).unwrap();
    let report = |addrs: &[&str]| {
        let addrs = addrs.iter().map(|a| a.parse().unwrap()).collect();
        let relay = Some(RelayOffer { addrs, cert_sha256: [9; 32] });
        Command::Report { device, home_relay: None, routes: vec![], relay }
    };
    let fine = ["192.0.2.1:3340", "10.0.0.7:3340", "[2001:db8::1]:3340"];
    let bad = [
        "127.0.0.1:3340",
        "0.0.0.0:3340",
        "100.64.0.9:3340",
        "224.0.0.1:3340",
        "[fd00::1]:3340",
        "192.0.2.1:0",
    ];
    world.run(&report(&[&bad[..], &fine[..]].concat())).unwrap();
    let kept = world.state.device(device).unwrap().relay.clone().unwrap();
    assert_eq!(kept.addrs, fine.map(|a| a.parse().unwrap()));
    world.run(&report(&bad)).unwrap();
    assert_eq!(world.state.device(device).unwrap().relay, None);
    // Its id as a relay stays, and is not its id as a device.
    let id = world.state.device(device).unwrap().relay_id();
    assert_eq!(world.state.device(device).unwrap().relay_id(), id);
    assert_ne!(id.to_bytes(), device.to_bytes());
}

#[test]
fn the_same_inputs_give_the_same_changes() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(reusable());
    let decide = || {
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        world.state.apply(&enroll(&key, 1, "a"), world.now, &mut rng).unwrap()
    };
    assert_eq!(decide(), decide());
}

#[test]
fn identity_comes_from_the_key_alone_and_names_get_suffixes() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(NewAuthKey {
        user: Some("Ann@Example.com".into()),
        reusable: true,
        ephemeral: true,
        ..NewAuthKey::default()
    });
    for n in 1..4 {
        world.enroll(&key, n).unwrap();
    }
    let names: BTreeSet<&str> = world.state.devices().values().map(|d| d.name.as_str()).collect();
    assert_eq!(names, BTreeSet::from(["host", "host-1", "host-2"]));
    let ann = world.state.user_by_email("ann@example.com").unwrap().id;
    assert!(world.state.devices().values().all(|d| d.user == Some(ann) && d.ephemeral && d.tags.is_empty()));
    let both = NewAuthKey { user: Some("a@b".into()), tags: vec!["tag:x".into()], ..NewAuthKey::default() };
    assert!(matches!(world.run(&Command::CreateAuthKey(both)), Err(Refusal::Invalid { .. })));
}

#[test]
fn one_use_expiry_and_wrong_secrets() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(NewAuthKey::default());
    let wrong = AuthKey { secret: AuthKeySecret::generate(&mut world.rng), ..key.clone() };
    assert_eq!(world.enroll(&wrong, 1), Err(Refusal::AuthKeyInvalid));
    let elsewhere = AuthKey { network: NetworkId::from_bytes([9; 16]), ..key.clone() };
    assert_eq!(world.enroll(&elsewhere, 1), Err(Refusal::AuthKeyInvalid));
    let first = world.enroll(&key, 1).unwrap();
    assert_eq!(world.enroll(&key, 1).unwrap(), first, "a lost reply");
    assert_eq!(world.enroll(&key, 2), Err(Refusal::AuthKeyUsed));
    // Also after its end: the device is in.
    world.pass(DEFAULT_AUTH_KEY_LIFE);
    assert_eq!(world.enroll(&key, 1).unwrap(), first);
    // But not any more once the device has used what it got.
    world.resume(first, 1).unwrap();
    assert_eq!(world.enroll(&key, 1), Err(Refusal::AuthKeyUsed));

    let key = world.key(NewAuthKey { life: Some(Duration::from_secs(60)), ..reusable() });
    world.enroll(&key, 3).unwrap();
    world.pass(Duration::from_secs(60));
    assert!(matches!(world.enroll(&key, 4), Err(Refusal::AuthKeyExpired(_))));
    world.pass(Duration::from_secs(8 * 24 * 3_600));
    world.run(&Command::Sweep).unwrap();
    assert!(world.state.auth_keys().is_empty());
    assert_eq!(world.enroll(&key, 4), Err(Refusal::AuthKeyInvalid));
}

#[test]
fn wireguard_keys_are_one_devices() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(reusable());
    world.enroll(&key, 1).unwrap();
    let Command::Enroll(mut request) = enroll(&key, 2, "b") else { unreachable!() };
    request.wg = WgPublicKey::from_bytes([1; 32]);
    assert!(matches!(world.run(&Command::Enroll(request)), Err(Refusal::Invalid { .. })));
}

#[test]
fn generations_rotate_and_a_copy_is_caught() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(NewAuthKey::default());
    let (id, first) = world.enroll(&key, 1).unwrap();
    assert_eq!(world.resume((id, first), 2), Err(Refusal::UnknownDevice), "another control key");
    // A welcome that was lost: the agent comes with what it has, or with what it was given.
    let second = world.resume((id, first), 1).unwrap();
    let third = world.resume((id, first), 1).unwrap();
    let fourth = world.resume((id, third), 1).unwrap();
    assert_eq!(world.resume((id, second), 1), Err(Refusal::CopiedState { device: id }));
    world.run(&Command::ConfirmGeneration { device: id, generation: fourth }).unwrap();
    assert_eq!(world.resume((id, third), 1), Err(Refusal::CopiedState { device: id }));
    let stale = Command::ConfirmGeneration { device: id, generation: third };
    assert_eq!(world.run(&stale), Err(Refusal::CopiedState { device: id }));
    for change in world.state.flag_copied(id) {
        world.state.absorb(change);
    }
    let device = world.state.device(id).unwrap();
    assert_eq!(world.state.device_state(device), DeviceState::NeedsLogin);
    assert_eq!(world.resume((id, fourth), 1), Err(Refusal::CopiedState { device: id }));
    // Signing in again heals it and keeps id, name and addresses.
    let fresh = world.key(NewAuthKey::default());
    let (again, generation) = world.enroll(&fresh, 1).unwrap();
    assert_eq!(again, id);
    world.resume((id, generation), 1).unwrap();
}

#[test]
fn addresses_rest_and_a_used_up_pool_says_so() {
    let mut world = World::new("10.0.0.0/30");
    let key = world.key(reusable());
    let (one, _) = world.enroll(&key, 1).unwrap();
    world.enroll(&key, 2).unwrap();
    assert!(matches!(world.enroll(&key, 3), Err(Refusal::PoolExhausted(_))));
    let address = world.state.device(one).unwrap().ipv4;
    world.run(&Command::RemoveDevice(one)).unwrap();
    assert!(matches!(world.enroll(&key, 3), Err(Refusal::PoolExhausted(_))), "it rests");
    world.pass(REST);
    let key = world.key(reusable());
    let (three, _) = world.enroll(&key, 3).unwrap();
    assert_eq!(world.state.device(three).unwrap().ipv4, address);
    world.run(&Command::Sweep).unwrap();
    assert!(world.state.resting().is_empty());
}

#[test]
fn removing_a_user_takes_devices_and_keys_along() {
    let mut world = World::new("100.64.0.0/10");
    let key = world.key(NewAuthKey { user: Some("ann@x.org".into()), ..reusable() });
    let (device, generation) = world.enroll(&key, 1).unwrap();
    let user = world.state.user_by_email("ann@x.org").unwrap().id;
    world.run(&Command::SuspendUser { user, suspended: true }).unwrap();
    assert!(matches!(world.resume((device, generation), 1), Err(Refusal::NotAdmitted(_))));
    assert!(matches!(world.enroll(&key, 2), Err(Refusal::NotAdmitted(_))));
    world.run(&Command::RemoveUser(user)).unwrap();
    assert!(world.state.devices().is_empty() && world.state.auth_keys().is_empty());
    assert!(world.state.user_by_email("ann@x.org").is_none());
}

#[test]
fn bounds_on_what_a_caller_gives() {
    let mut world = World::new("100.64.0.0/10");
    let tags = (0..=MAX_TAGS).map(|n| format!("tag:t{n}")).collect();
    let new = NewAuthKey { tags, ..NewAuthKey::default() };
    assert!(matches!(world.run(&Command::CreateAuthKey(new)), Err(Refusal::TooMany { .. })));
    let new = NewAuthKey { life: Some(MAX_AUTH_KEY_LIFE + Duration::from_secs(1)), ..NewAuthKey::default() };
    assert!(matches!(world.run(&Command::CreateAuthKey(new)), Err(Refusal::Invalid { .. })));
    let key = world.key(reusable());
    let Command::Enroll(mut request) = enroll(&key, 1, &"x".repeat(10_000)) else { unreachable!() };
    request.os = "o".repeat(10_000);
    world.run(&Command::Enroll(request)).unwrap();
    let device = world.state.devices().values().next().unwrap().clone();
    assert!(device.name.len() <= MAX_NAME && device.os.len() <= 64);
    let routes =
        (0..=u8::MAX).flat_map(|a| [0, 1].map(|b| format!("10.{a}.{b}.0/24").parse().unwrap())).collect();
    world.run(&Command::Report { device: device.id, home_relay: None, routes, relay: None }).unwrap();
    assert_eq!(world.state.device(device.id).unwrap().routes.len(), MAX_ROUTES);
    assert!(matches!(world.run(&Command::CreateRelay("Not A Name".into())), Err(Refusal::Invalid { .. })));
    for n in 0..MAX_RELAYS {
        world.run(&Command::CreateRelay(format!("r{n}"))).unwrap();
    }
    assert!(matches!(world.run(&Command::CreateRelay("more".into())), Err(Refusal::TooMany { .. })));
}

#[test]
fn a_policy_is_numbered_once_per_text() {
    let mut world = World::new("100.64.0.0/10");
    let set = |text: &str| Command::SetPolicy { source: PolicySource::Api, text: text.into() };
    assert_eq!(world.run(&set("{}")), Ok(Reply::Policy { revision: 1 }));
    assert_eq!(world.run(&set("{}")), Ok(Reply::Policy { revision: 1 }));
    assert!(matches!(world.run(&set("{")), Err(Refusal::PolicyInvalid(_))));
    assert_eq!(world.run(&set("{ }")), Ok(Reply::Policy { revision: 2 }));
    assert_eq!(world.state.policy().unwrap().text, "{ }");
}

/// Policies that between them use each kind of selector the coordinator feeds.
const POLICIES: [&str; 5] = [
    "{}",
    r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#,
    r#"{"acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:22"]},
                 {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*", "tag:a:80"]}],
        "tagOwners": {"tag:a": [], "tag:b": []}}"#,
    r#"{"groups": {"group:g": ["ann@x.org"]},
        "grants": [{"src": ["group:g"], "dst": ["autogroup:tagged"], "ip": ["tcp:443"]},
                   {"src": ["user:*@x.org"], "dst": ["*"], "ip": ["icmp"]}]}"#,
    RELAYING,
];

/// Devices with `tag:a` may use those with `tag:b` as relays.
const RELAYING: &str = r#"{"tagOwners": {"tag:a": [], "tag:b": []},
    "grants": [{"src": ["tag:a"], "dst": ["tag:b"], "app": {"warren/cap/relay": []}},
               {"src": ["*"], "dst": ["tag:a"], "ip": ["*"]}]}"#;

fn offer(addr: &str) -> RelayOffer {
    RelayOffer { addrs: vec![addr.parse().unwrap()], cert_sha256: [9; 32] }
}

#[derive(Clone, Debug)]
enum Step {
    Enroll(u8, u8),
    Resume(u8, bool),
    Remove(u8),
    Expire(u8),
    Offer(u8, bool),
    Suspend(bool),
    Policy(usize),
    Pass(u32),
    Sweep,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..12u8, 0..4u8).prop_map(|(device, key)| Step::Enroll(device, key)),
        3 => (0..12u8, proptest::bool::weighted(0.9)).prop_map(|(device, right)| Step::Resume(device, right)),
        2 => (0..12u8).prop_map(Step::Remove),
        1 => (0..12u8).prop_map(Step::Expire),
        3 => (0..12u8, proptest::bool::weighted(0.7)).prop_map(|(device, relays)| Step::Offer(device, relays)),
        1 => any::<bool>().prop_map(Step::Suspend),
        2 => (0..POLICIES.len()).prop_map(Step::Policy),
        1 => (1..10 * 24 * 3_600u32).prop_map(Step::Pass),
        1 => Just(Step::Sweep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn invariants_hold_whatever_happens(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new("10.9.0.0/28");
        let keys = [
            world.key(NewAuthKey::default()),
            world.key(NewAuthKey { user: Some("ann@x.org".into()), ..reusable() }),
            world.key(tagged("tag:a")),
            world.key(tagged("tag:b")),
        ];
        let ann = world.state.user_by_email("ann@x.org").unwrap().id;
        let mut reach = Reach::compute(&world.state, world.now);
        let mut records = PeerRecords::default();
        let mut one_use_by = BTreeSet::new();
        for step in steps {
            let id_of = |world: &World, n: u8| {
                world.state.device_by_control(&ControlPublicKey::from_bytes([n; 32])).map(|d| (d.id, d.generation))
            };
            let (command, touched) = match step {
                Step::Enroll(n, key) => (enroll(&keys[usize::from(key)], n, "host"), None),
                Step::Resume(n, right) => {
                    let Some((device, generation)) = id_of(&world, n) else { continue };
                    let generation = if right { generation.pending.unwrap_or(generation.current) } else { 1 };
                    let control = ControlPublicKey::from_bytes([n; 32]);
                    (Command::Resume { device, control, generation, version: String::new() }, Some(device))
                }
                Step::Remove(n) => {
                    let Some((device, _)) = id_of(&world, n) else { continue };
                    (Command::RemoveDevice(device), Some(device))
                }
                Step::Expire(n) => {
                    let Some((device, _)) = id_of(&world, n) else { continue };
                    (Command::ExpireDevice(device), Some(device))
                }
                Step::Offer(n, relays) => {
                    let Some((device, _)) = id_of(&world, n) else { continue };
                    let relay = relays.then(|| offer(&format!("192.0.2.{n}:3340")));
                    (Command::Report { device, home_relay: None, routes: vec![], relay }, Some(device))
                }
                Step::Suspend(suspended) => (Command::SuspendUser { user: ann, suspended }, None),
                Step::Policy(n) => {
                    (Command::SetPolicy { source: PolicySource::Api, text: POLICIES[n].into() }, None)
                }
                Step::Pass(seconds) => {
                    world.pass(Duration::from_secs(seconds.into()));
                    continue;
                }
                Step::Sweep => (Command::Sweep, None),
            };
            let before = world.state.clone();
            let result = world.state.apply(&command, world.now, &mut world.rng);
            let Ok((changes, reply)) = result else {
                prop_assert_eq!(&world.state, &before, "a refusal changed something");
                continue;
            };
            if let (Command::Enroll(request), Reply::Admitted { device, .. }) = (&command, &reply)
                && request.auth_key.id == keys[0].id
            {
                one_use_by.insert(*device);
            }
            // Absorbing and taking back is no change.
            let mut inverses: Vec<Change> = changes.iter().map(|c| world.state.absorb(c.clone())).collect();
            let after = world.state.clone();
            while let Some(inverse) = inverses.pop() {
                world.state.absorb(inverse);
            }
            prop_assert_eq!(&world.state, &before);
            world.state = after;

            // Following single devices ends where computing everything anew does.
            let whole = matches!(command, Command::SuspendUser { .. } | Command::SetPolicy { .. });
            let device = match reply {
                Reply::Admitted { device, .. } => Some(device),
                _ => touched,
            };
            let anew = Reach::compute(&world.state, world.now);
            let mut recomputed = reach.clone();
            let by_recomputing = recomputed.recompute(&world.state, world.now);
            if !whole {
                let devices: BTreeSet<DeviceId> = device.into_iter().collect();
                let by_following = reach.follow(&world.state, &devices, &devices, world.now);
                prop_assert_eq!(&by_following.relays, &by_recomputing.relays);
                prop_assert_eq!(&by_following.lost, &by_recomputing.lost);
                prop_assert_eq!(&by_following.out, &by_recomputing.out);
                prop_assert!(by_recomputing.touched.is_subset(&by_following.touched));
            } else {
                reach = recomputed;
            }
            // Records stay right though they are brought up to date for some only.
            let some = world.state.devices().keys().filter(|id| id.to_bytes()[15] % 2 == 0);
            records.prepare(&world.state, some.copied());
            for id in world.state.devices().keys() {
                let fresh = anew.netmap(&world.state, *id, &PeerRecords::default());
                // Promise 3: nobody learns of a relay without a grant.
                let relays = fresh.iter().flat_map(|netmap| netmap.relays.values());
                let listed: BTreeSet<RelayId> = relays.filter(|r| r.peer).map(|r| r.id).collect();
                prop_assert_eq!(listed, granted_relays(&world.state, *id));
                prop_assert_eq!(reach.netmap(&world.state, *id, &records), fresh);
                // Whom one sees, sees it.
                for peer in reach.peers(*id).into_iter().flatten().map(|(peer, _)| peer) {
                    prop_assert!(reach.peers(*peer).is_some_and(|p| p.contains_key(id)));
                }
            }

            let devices: Vec<&Device> = world.state.devices().values().collect();
            let unique = |count: usize| count == devices.len();
            prop_assert!(unique(devices.iter().map(|d| d.ipv4).collect::<BTreeSet<_>>().len()));
            prop_assert!(unique(devices.iter().map(|d| d.ipv6).collect::<BTreeSet<_>>().len()));
            prop_assert!(unique(devices.iter().map(|d| &d.name).collect::<BTreeSet<_>>().len()));
            prop_assert!(unique(devices.iter().map(|d| d.wg).collect::<BTreeSet<_>>().len()));
            prop_assert!(devices.iter().all(|d| world.state.settings().ipv4.contains(&d.ipv4)));
            prop_assert!(one_use_by.len() <= 1, "a one-use key let two devices in");
        }
    }
}
