//! What relays do to those who have no other way, in virtual time: they die without a word, end, drain, are restarted and
//! come back, in several regions, with ends that share a home and ends that don't.
//!
//! The two ends are behind NATs that no packet gets through unasked, so everything between them is relayed. A stream of 20
//! datagrams a second runs each way, and beside it a flow that, as TCP does, waits for acknowledgements and repeats. The
//! longest gaps over many seeds are printed.

use std::time::Duration;

use warren_common::ids::RelayId;
use warren_netns_tests::sim::flows::{Gaps, Pair, Place};
use warren_netns_tests::sim::internet::{Link, Realm};
use warren_netns_tests::sim::nat::{Degree, NatBehaviour};
use warren_netns_tests::sim::relays::RelayNo;
use warren_netns_tests::sim::world::{APP_PORT, World};

const S: Duration = Duration::from_secs(1);
const SEEDS: u64 = 40;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const HARD: NatBehaviour = NatBehaviour::HARD;

/// One-way delays from the coordinator's region to the relays beside its own.
const REGIONS: [Duration; 3] = [ms(25), ms(45), ms(80)];

/// Silence on a relay is suspicious after 300 ms and in doubt 500 ms later, with round trips to 250 ms; then a packet crosses
/// another relay, in the farthest region. The rest is what waits for the next turn of the stream.
const KILLED_GAP: Duration = Duration::from_millis(1_500);
/// What the issue asks for at most.
const PROMISED_KILLED: Duration = Duration::from_secs(2);
const PROMISED_RESTARTED: Duration = Duration::from_secs(1);
/// A restart is announced, so that nothing need be lost: packets only take another way, which may be longer.
const DRAINED_GAP: Duration = Duration::from_millis(400);

#[expect(clippy::print_stdout, reason = "measured values are part of the result")]
fn print(what: &str, text: impl std::fmt::Display) {
    println!("{what}: {text}");
}

/// A world with four relays and two relayed devices near these positions, that have talked for a while.
fn pair(seed: u64, positions: [Duration; 2]) -> Pair {
    let mut world = World::new(seed);
    for (n, position) in REGIONS.iter().enumerate() {
        world.add_relay(&format!("region{n}"), *position);
    }
    let mut pair = Pair::within(world, [Place::Behind(HARD); 2], positions);
    pair.run(20 * S + ms(seed * 137));
    for at in [0, 1] {
        assert_eq!(pair.path_kind(at), "relay", "seed {seed}: {:?}", pair.path(at));
    }
    pair
}

/// Where two ends can be: near one relay, or each near its own.
const SHARED: [Duration; 2] = [ms(2), ms(3)];
const APART: [Duration; 2] = [ms(2), ms(43)];

#[expect(clippy::expect_used, reason = "a failed test panics")]
fn home(pair: &Pair, at: usize) -> RelayNo {
    let home: RelayId = pair.world.devices[pair.devices[at]].home_relay().expect("a home");
    pair.world.relay_no(home).expect("of this world")
}

fn worse(a: Gaps, b: Gaps) -> Gaps {
    Gaps { stream: a.stream.max(b.stream), flow: a.flow.max(b.flow) }
}

/// Runs `event` for many seeds in the middle of a conversation; the worst gaps until 40 s later, when both ends have to be
/// well again.
fn across(what: &str, positions: [Duration; 2], event: impl Fn(&mut Pair)) -> Gaps {
    let mut worst = Gaps::default();
    for seed in 1..=SEEDS {
        let mut pair = pair(seed, positions);
        assert_eq!(home(&pair, 0) == home(&pair, 1), positions == SHARED, "{what}, seed {seed}");
        pair.start_measuring();
        event(&mut pair);
        pair.run(40 * S);
        worst = worse(worst, pair.gaps());
        for at in [0, 1] {
            let now = home(&pair, at);
            assert!(pair.world.relay_up(now), "{what}, seed {seed}: {at} is at home at {now}, which is gone");
            assert_eq!(pair.path_kind(at), "relay", "{what}, seed {seed}");
        }
    }
    print(what, format!("longest gaps over {SEEDS} seeds {worst:?}"));
    worst
}

#[test]
fn a_shared_home_that_is_killed_costs_less_than_two_seconds() {
    let worst = across("the home of both is killed", SHARED, |pair| {
        let home = home(pair, 0);
        pair.world.kill_relay(home);
    });
    assert!(worst.stream <= KILLED_GAP && KILLED_GAP <= PROMISED_KILLED, "{worst:?}");
    assert!(worst.flow <= PROMISED_KILLED, "{worst:?}");
}

#[test]
fn a_home_of_one_end_that_is_killed_costs_less_than_two_seconds() {
    for (at, what) in [(0, "the home of the first is killed"), (1, "the home of the second is killed")] {
        let worst = across(what, APART, |pair| {
            let home = home(pair, at);
            pair.world.kill_relay(home);
        });
        assert!(worst.stream <= KILLED_GAP, "{what}: {worst:?}");
        assert!(worst.flow <= PROMISED_KILLED, "{what}: {worst:?}");
    }
}

#[test]
fn a_relay_that_ends_with_its_connections_costs_a_moment() {
    for (positions, what) in [(SHARED, "the home of both ends"), (APART, "the home of the first ends")] {
        let worst = across(what, positions, |pair| {
            let home = home(pair, 0);
            pair.world.stop_relay(home);
        });
        assert!(worst.stream <= DRAINED_GAP, "{what}: {worst:?}");
    }
}

/// A restart as an administrator makes it: drain, a moment later close, and half a second later there is a new process.
fn restart(pair: &mut Pair, no: RelayNo) {
    pair.world.drain_relay(no, 10 * S);
    pair.run(ms(700));
    pair.world.close_relay(no);
    pair.run(ms(500));
    pair.world.start_relay(no);
}

#[test]
fn a_restart_with_drain_leaves_no_gap_where_there_is_another_relay() {
    for (positions, at, what) in [
        (SHARED, 0, "the home of both is restarted"),
        (APART, 0, "the home of the first is restarted"),
        (APART, 1, "the home of the second is restarted"),
    ] {
        let worst = across(what, positions, |pair| {
            let home = home(pair, at);
            restart(pair, home);
        });
        assert!(worst.stream <= DRAINED_GAP && DRAINED_GAP <= PROMISED_RESTARTED, "{what}: {worst:?}");
    }
}

/// While there is no relay, for half a second here, there is no way: what is measured beyond that is how soon both are back, and
/// whether what was sent meanwhile arrives then. Else a flow that repeats waits as long again as it has already.
#[test]
fn a_restart_of_the_only_relay_costs_less_than_a_second() {
    let mut worst = Gaps::default();
    for seed in 1..=SEEDS {
        let mut pair = Pair::new(seed, [Place::Behind(HARD); 2]);
        pair.run(20 * S + ms(seed * 137));
        assert_eq!(pair.path_kind(0), "relay");
        pair.start_measuring();
        restart(&mut pair, 0);
        pair.run(10 * S);
        worst = worse(worst, pair.gaps());
    }
    print("restart of the only relay", format!("longest gaps over {SEEDS} seeds {worst:?}"));
    assert!(worst.stream <= PROMISED_RESTARTED, "{worst:?}");
    assert!(worst.flow <= PROMISED_RESTARTED, "{worst:?}");
}

/// Both relays that the ends know of die, one after the other, before anything has been put right.
#[test]
fn two_relays_that_are_killed_within_a_second_are_survived() {
    let mut worst = Gaps::default();
    for seed in 1..=SEEDS {
        let mut pair = pair(seed, APART);
        let homes = [home(&pair, 0), home(&pair, 1)];
        pair.start_measuring();
        pair.world.kill_relay(homes[0]);
        pair.run(ms(700));
        pair.world.kill_relay(homes[1]);
        pair.run(60 * S);
        worst = worse(worst, pair.gaps());
        assert_eq!(pair.path_kind(0), "relay", "seed {seed}");
    }
    print("both homes are killed 0.7 s apart", format!("longest gaps over {SEEDS} seeds {worst:?}"));
    // Nothing is prepared for that: death is proved, new homes are chosen, connected and announced.
    assert!(worst.stream <= 6 * S, "{worst:?}");
}

/// A relay that stands still for a moment is no dead relay: packets go round it meanwhile, and the homes stay.
#[test]
fn a_false_alarm_moves_no_home_and_the_pair_comes_back() {
    let mut worst = Gaps::default();
    for seed in 1..=SEEDS {
        let mut pair = pair(seed, SHARED);
        let before = home(&pair, 0);
        pair.start_measuring();
        pair.world.freeze_relay(before, ms(1_200));
        pair.run(90 * S);
        worst = worse(worst, pair.gaps());
        assert_eq!([home(&pair, 0), home(&pair, 1)], [before; 2], "seed {seed}");
        let path = pair.path(0).expect("a path");
        assert_eq!(path.relay, Some(pair.world.relay_name(before)), "seed {seed}: back at the nearest");
    }
    print("a relay stands still for 1.2 s", format!("longest gaps over {SEEDS} seeds {worst:?}"));
    assert!(worst.stream <= KILLED_GAP, "{worst:?}");
}

/// A relay that comes back is used again, and nothing is lost by that.
#[test]
fn a_killed_relay_that_comes_back_is_home_again() {
    for seed in 1..=SEEDS / 4 {
        let mut pair = pair(seed, SHARED);
        let before = home(&pair, 0);
        pair.world.kill_relay(before);
        pair.run(40 * S);
        assert_ne!(home(&pair, 0), before);
        pair.world.start_relay(before);
        pair.run(3 * S);
        pair.start_measuring();
        // It has to be the nearest for a minute, in measurements that are made every five.
        pair.run(15 * 60 * S);
        assert_eq!([home(&pair, 0), home(&pair, 1)], [before; 2], "seed {seed}");
        let gaps = pair.gaps();
        assert!(gaps.stream <= ms(400), "seed {seed}: {gaps:?}");
    }
}

/// Connections to relays cost relays memory: who has no relayed conversation keeps one, who has one keeps two.
#[test]
fn only_those_who_need_it_are_connected_to_a_second_relay() {
    let mut world = World::new(7);
    for (n, position) in REGIONS.iter().enumerate() {
        world.add_relay(&format!("region{n}"), *position);
    }
    let open = NatBehaviour { mapping: Degree::EndpointIndependent, ..HARD };
    let devices: Vec<_> = [HARD, HARD, open, open, open]
        .into_iter()
        .enumerate()
        .map(|(n, behaviour)| {
            let nat = world.add_nat(behaviour);
            let addr = [192, 168, 1, 10 + n as u8].into();
            world.add_device("tag:a", Realm::Behind(nat), addr, Link::default()).unwrap()
        })
        .collect();
    world.run(2 * S);
    world
        .set_policy(format!(
            r#"{{"tagOwners": {{"tag:a": ["admin@example.com"]}},
                "grants": [{{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["udp:{APP_PORT}"]}}]}}"#
        ))
        .unwrap();
    world.run(3 * S);
    let connected = |world: &World, at: usize| world.devices[devices[at]].relays().count();
    for _ in 0..2 {
        for _ in 0..60 {
            // A relayed pair, and one that is direct after a moment.
            world.send(devices[0], devices[1], false);
            world.send(devices[2], devices[3], false);
            world.run(S);
        }
        let counts: Vec<usize> = (0..5).map(|at| connected(&world, at)).collect();
        print(
            "relays that two relayed, two direct and an idle device are connected to",
            format!("{counts:?}"),
        );
        assert_eq!(counts, [2, 2, 1, 1, 1]);
        // Both are silent for long enough: the second connection goes. That is no failure of the relay, and the next time it
        // is the one to meet at again.
        world.run(15 * 60 * S);
        assert_eq!((0..5).map(|at| connected(&world, at)).collect::<Vec<_>>(), [1; 5]);
    }
}

/// When a relay dies under many devices, the others get them over a while and not all at once.
#[test]
fn the_clients_of_a_killed_relay_come_to_the_others_spread_over_seconds() {
    const DEVICES: usize = 120;
    let mut world = World::new(11);
    for (n, position) in REGIONS.iter().enumerate() {
        world.add_relay(&format!("region{n}"), *position);
    }
    for n in 0..DEVICES as u8 {
        let nat = world.add_nat(HARD);
        let addr = [192, 168, 1, 2 + n].into();
        world.add_device("tag:a", Realm::Behind(nat), addr, Link::default()).unwrap();
        world.run(ms(150));
    }
    world.run(60 * S);
    assert_eq!(world.relay_clients(0), DEVICES);
    world.kill_relay(0);
    let (mut before, mut most) = (0, 0);
    for _ in 0..40 {
        world.run(S);
        let now: usize = (1..=REGIONS.len()).map(|no| world.relay_clients(no)).sum();
        most = most.max(now - before);
        before = now;
    }
    print(
        "idle clients of a killed relay",
        format!("{before} of {DEVICES} moved, {most} in the busiest second"),
    );
    assert_eq!(before, DEVICES);
    // Each notices at its own keep-alive, which come every 15 s.
    assert!(most <= DEVICES / 4, "{most}");
}
