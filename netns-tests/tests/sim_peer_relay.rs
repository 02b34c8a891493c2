//! Peer relays in virtual time: two devices that no packet reaches unasked, relays of the network far away, and a device
//! nearby that the policy lets relay for them, or not.

use std::time::Duration;

use warren_netns_tests::sim::flows::{Pair, Place};
use warren_netns_tests::sim::internet::{Link, Realm};
use warren_netns_tests::sim::nat::NatBehaviour;
use warren_netns_tests::sim::relays::RelayNo;
use warren_netns_tests::sim::world::{APP_PORT, World};

const S: Duration = Duration::from_secs(1);
const SEEDS: u64 = 20;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const HARD: NatBehaviour = NatBehaviour::HARD;

/// One way from both devices to the coordinator's relay.
const FAR: Duration = ms(60);
/// What two ends that see each other need to be connected to the peer relay, to ask through it, and to move: the first rounds
/// of probes, a handshake, one more round.
const MOVED_WITHIN: Duration = Duration::from_secs(12);
/// As for any relay that is killed (`sim_relays`).
const KILLED_GAP: Duration = Duration::from_secs(2);
/// Promise 4, and one way through the far relay for what was on its way.
const CUT_WITHIN: Duration = Duration::from_secs(1);

#[expect(clippy::print_stdout, reason = "measured values are part of the result")]
fn print(what: &str, text: impl std::fmt::Display) {
    println!("{what}: {text}");
}

fn policy(users: &str) -> String {
    let relay = match users {
        "" => String::new(),
        users => format!(r#", {{"src": [{users}], "dst": ["tag:gw"], "app": {{"warren/cap/relay": []}}}}"#),
    };
    format!(
        r#"{{"tagOwners": {{"tag:a": ["admin@example.com"], "tag:gw": ["admin@example.com"]}},
            "grants": [{{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["udp:{APP_PORT}"]}}{relay}]}}"#
    )
}

/// Two relayed devices that have talked for a while, and a third that offers to relay near them.
fn pair(seed: u64) -> (Pair, RelayNo) {
    let mut world = World::new(seed);
    let addr = world.fresh_addr();
    let gw =
        world.add_device_at("tag:gw", &[(Realm::Public, addr)], Link { position: FAR, ..Link::default() });
    let gw = gw.unwrap_or_else(|e| panic!("the device was refused: {e}"));
    let mut pair = Pair::within(world, [Place::Behind(HARD); 2], [FAR; 2]);
    let relay = pair.world.add_peer_relay(gw, FAR);
    pair.run(20 * S + ms(seed * 137));
    (pair, relay)
}

fn set_policy(pair: &mut Pair, users: &str) {
    pair.world.set_policy(policy(users)).unwrap_or_else(|e| panic!("the policy was refused: {e}"));
}

/// True if both ends say that they talk through that relay.
fn on(pair: &Pair, relay: RelayNo) -> bool {
    let name = |path: warren_engine::status::PathStatus| path.relay.unwrap_or_default();
    let id = pair.world.relay_id(relay).to_string();
    let called = format!("peer-{}", &id[id.len() - 6..]);
    [0, 1].iter().all(|at| pair.path(*at).is_some_and(|path| name(path) == called))
}

/// Waits until the pair has moved; how long that took.
fn move_to(pair: &mut Pair, relay: RelayNo, seed: u64) -> Duration {
    let since = pair.world.now.boot;
    while !on(pair, relay) {
        pair.run(ms(100));
        let took = pair.world.now.boot.since(since);
        assert!(took <= MOVED_WITHIN, "seed {seed}: {:?} {:?}", pair.path(0), pair.path(1));
    }
    pair.world.now.boot.since(since)
}

#[test]
fn a_pair_moves_to_a_near_peer_relay_that_both_have_a_grant_for_and_back_when_it_dies() {
    let (mut slowest, mut longest) = (Duration::ZERO, Duration::ZERO);
    for seed in 0..SEEDS {
        let (mut pair, relay) = pair(seed);
        assert!(!pair.world.relay_up(relay), "seed {seed}: an offer alone is not enough");
        pair.start_measuring();
        set_policy(&mut pair, r#""tag:a""#);
        slowest = slowest.max(move_to(&mut pair, relay, seed));
        pair.run(5 * S);
        assert!(on(&pair, relay) && pair.world.relay_forwarded(relay) > 100, "seed {seed}: it stays");
        let moving = pair.gaps();
        assert!(moving.stream <= ms(400), "seed {seed}: moving cost {moving:?}");
        // Nobody is at home there.
        let homes = pair.devices.map(|no| pair.world.devices[no].home_relay());
        assert!(homes.iter().all(|home| *home != Some(pair.world.relay_id(relay))), "seed {seed}");

        pair.start_measuring();
        pair.world.kill_relay(relay);
        pair.run(10 * S);
        let gaps = pair.gaps();
        assert!(gaps.stream <= KILLED_GAP, "seed {seed}: {gaps:?}");
        longest = longest.max(gaps.stream);
        assert!(!on(&pair, relay), "seed {seed}");
    }
    print("moved to the peer relay after, at most", format!("{} ms", slowest.as_millis()));
    print("longest gap when it dies without a word", format!("{} ms", longest.as_millis()));
}

#[test]
fn a_grant_that_goes_is_cut_at_the_relay_and_the_pair_goes_on_elsewhere() {
    let mut longest = Duration::ZERO;
    for seed in 0..SEEDS {
        let (mut pair, relay) = pair(seed);
        set_policy(&mut pair, r#""tag:a""#);
        move_to(&mut pair, relay, seed);
        pair.run(2 * S);
        // One end loses it: enough for both.
        let one = pair.world.overlay_addr(pair.devices[0], false).unwrap_or_else(|| panic!("no address"));
        pair.start_measuring();
        set_policy(&mut pair, &format!("\"{one}\""));
        pair.run(CUT_WITHIN);
        let carried = pair.world.relay_forwarded(relay);
        pair.run(10 * S);
        assert_eq!(pair.world.relay_forwarded(relay), carried, "seed {seed}: it still carries packets");
        let gaps = pair.gaps();
        assert!(gaps.stream <= S, "seed {seed}: {gaps:?}");
        longest = longest.max(gaps.stream);
        assert!(pair.world.relay_up(relay), "seed {seed}: for the other end");
        set_policy(&mut pair, "");
        pair.run(S);
        assert!(!pair.world.relay_up(relay), "seed {seed}: for nobody");
    }
    print("longest gap when the grant goes", format!("{} ms", longest.as_millis()));
}

#[test]
fn a_device_that_relays_and_restarts_is_used_again() {
    for seed in 0..SEEDS {
        let (mut pair, relay) = pair(seed);
        set_policy(&mut pair, r#""tag:a""#);
        move_to(&mut pair, relay, seed);
        pair.world.stop_coordinator();
        pair.run(5 * S);
        assert!(on(&pair, relay), "seed {seed}: it needs no coordinator");
        pair.world.start_coordinator();
        pair.run(10 * S);
        assert!(on(&pair, relay), "seed {seed}: {:?}", pair.path(0));
    }
}
