//! Devices with nothing to say, in virtual time: they come to rest, whatever their NATs do, and notice when they have slept. And
//! neighbours behind one NAT, who should not go round by the world.

use std::net::IpAddr;
use std::time::Duration;

use warren_netns_tests::sim::flows::{Pair, Place};
use warren_netns_tests::sim::internet::{Link, Realm};
use warren_netns_tests::sim::nat::{Allocation, Degree, NatBehaviour};
use warren_netns_tests::sim::world::{APP_PORT, Tally, World};

const S: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

const PORT_RESTRICTED: NatBehaviour = NatBehaviour {
    mapping: Degree::EndpointIndependent,
    allocation: Allocation::Preserving,
    filtering: Degree::AddressAndPortDependent,
    timeout: MINUTE,
    hairpin: false,
};

#[expect(clippy::print_stdout, reason = "measured values are part of the result")]
fn print(what: &str, text: impl std::fmt::Display) {
    println!("{what}: {text}");
}

fn open_policy() -> String {
    format!(
        r#"{{"tagOwners": {{"tag:a": ["admin@example.com"]}},
            "grants": [{{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["udp:{APP_PORT}"]}}]}}"#
    )
}

/// Datagrams of upkeep per device and hour of use, where each has six relayed conversations through two relays. A round each half a
/// minute, over the half a dozen ports that STUN servers saw the other end at and over both relays, and the same in answer to the
/// other end's: 16 600 were counted, and a fifth more is allowed.
const MAX_HARD_UPKEEP_PER_HOUR: f64 = 20_000.0;

#[test]
fn devices_behind_hard_nats_come_to_rest() {
    const DEVICES: usize = 30;
    let mut world = World::new(1);
    world.add_relay("other", Duration::from_millis(25));
    for n in 0..DEVICES as u8 {
        // It forgets before the next round, so that each one shows another port.
        let nat = world.add_nat(NatBehaviour { timeout: 20 * S, ..NatBehaviour::HARD });
        world
            .add_device("tag:a", Realm::Behind(nat), IpAddr::from([192, 168, 1, 10 + n]), Link::default())
            .unwrap();
    }
    world.run(2 * S);
    world.set_policy(open_policy()).unwrap();
    world.run(3 * S);
    let before = world.tally;
    for minute in 0..60 {
        for from in (0..DEVICES).filter(|_| minute % 2 == 0) {
            for away in [1, 7, 11] {
                world.send(from, (from + away) % DEVICES, false);
            }
        }
        world.run(MINUTE);
        world.deliveries.clear();
    }
    let count = |from: Tally, to: Tally| {
        let datagrams = |t: Tally| t.probes + t.stun + t.upkeep;
        (datagrams(to) - datagrams(from)) as f64 / DEVICES as f64
    };
    let used = count(before, world.tally);
    print("per device and hour of use behind hard NATs", format!("{used:.0} datagrams"));
    assert!(used <= MAX_HARD_UPKEEP_PER_HOUR, "{used}");
    // Who was asked last is in use for three minutes more, and its answer says so to the other end.
    world.run(10 * MINUTE);
    let before = world.tally;
    world.run(4 * 60 * MINUTE);
    let after = world.tally;
    assert_eq!((after.probes - before.probes, after.upkeep - before.upkeep), (0, 0), "nobody says anything");
}

#[test]
fn a_device_that_slept_hears_of_changes_a_few_seconds_after_it_is_awake_though_it_was_idle() {
    for slept in [2 * MINUTE, 8 * 60 * MINUTE] {
        let mut pair = Pair::new(1, [Place::Behind(PORT_RESTRICTED), Place::Public]);
        let no = pair.devices[0];
        pair.world.run(15 * MINUTE);
        let revision = |pair: &Pair| {
            let device = &pair.world.devices[no];
            device.status(pair.world.now).map(|status| status.revision)
        };
        let before = revision(&pair);
        assert!(before.is_some());
        pair.world.sleep(no, slept);
        pair.world.run(slept + 6 * S);
        pair.world
            .set_policy(r#"{"tagOwners": {"tag:a": ["admin@example.com"]}, "grants": []}"#.to_owned())
            .unwrap();
        pair.world.run(3 * S);
        assert!(revision(&pair) > before, "slept for {slept:?}");
    }
}

/// Where `at` sends to.
fn endpoint(pair: &Pair, at: usize) -> Option<IpAddr> {
    Some(pair.path(at)?.endpoint?.ip())
}

fn pair_at(world: World, interfaces: [(Realm, IpAddr); 2]) -> Pair {
    let mut pair = Pair::within(world, [Place::Public; 2], [Duration::ZERO; 2]);
    for (at, interface) in interfaces.into_iter().enumerate() {
        pair.world.roam(pair.devices[at], &[interface]);
    }
    pair.world.run(5 * S);
    pair
}

#[test]
fn neighbours_behind_one_nat_meet_within_it_and_stay_there() {
    for hairpin in [false, true] {
        let mut world = World::new(3);
        let nat = world.add_nat(NatBehaviour { hairpin, ..PORT_RESTRICTED });
        let inside = [10, 11].map(|n| IpAddr::from([192, 168, 1, n]));
        let mut pair = pair_at(world, inside.map(|ip| (Realm::Behind(nat), ip)));
        assert!(pair.ask(5 * S).is_some());
        assert_eq!(
            [0, 1].map(|at| endpoint(&pair, at)),
            [Some(inside[1]), Some(inside[0])],
            "hairpin {hairpin}"
        );
        // They talk now and then, so that rounds look for something better in the middle of silences.
        for second in 0..1_200 {
            if second % 17 == 0 {
                pair.ask(S);
            } else {
                pair.world.run(S);
            }
            let ends = [0, 1].map(|at| endpoint(&pair, at));
            let within = [Some(inside[1]), Some(inside[0])];
            assert_eq!(ends, within, "hairpin {hairpin}, after {second} s");
            assert_eq!(pair.path_kind(0), "direct", "hairpin {hairpin}, after {second} s");
        }
    }
}

#[test]
fn neighbours_behind_one_carriers_nat_meet_at_its_outside_where_it_turns_packets_round() {
    for hairpin in [false, true] {
        let mut world = World::new(3);
        let carrier = world.add_nat(NatBehaviour { hairpin, ..PORT_RESTRICTED });
        let homes = [2, 3].map(|n| {
            let outside = IpAddr::from([100, 64, 7, n]);
            world.net.add_nat(Realm::Behind(carrier), outside, PORT_RESTRICTED)
        });
        let interfaces = homes.map(|home| (Realm::Behind(home), IpAddr::from([192, 168, 1, 10])));
        let mut pair = pair_at(world, interfaces);
        for _ in 0..10 {
            assert!(pair.ask(5 * S).is_some());
        }
        let kinds = [0, 1].map(|at| pair.path_kind(at));
        let expected = if hairpin { "direct" } else { "relay" };
        assert_eq!(kinds, [expected; 2], "hairpin {hairpin}");
    }
}

/// Which ways two neighbours took: looks at either end, every 20 ms while they talk.
#[derive(Debug, Default)]
struct Taken {
    inside: usize,
    outside: usize,
    /// No direct way yet.
    none: usize,
}

#[test]
fn neighbours_that_talk_seldom_stay_within_the_nat_that_would_turn_their_packets_round() {
    const LOOK: Duration = Duration::from_millis(20);
    const LOOKS: usize = 100;
    let inside = [10, 11].map(|n| IpAddr::from([192, 168, 1, n]));
    // Within a NAT's memory and beyond it, in step with rounds, and so seldom that both ends have come to rest.
    for pause in [3, 17, 59, 61, 100, 170, 185, 600] {
        // Either way is as long as the other here, so that chance decides whose answer is first.
        for jitter in [0, 1, 5] {
            let mut taken = Taken::default();
            for seed in 1..=2 {
                let mut world = World::new(seed);
                let nat = world.add_nat(NatBehaviour { hairpin: true, ..PORT_RESTRICTED });
                let mut pair = pair_at(world, inside.map(|ip| (Realm::Behind(nat), ip)));
                for no in pair.devices {
                    let host = pair.world.devices[no].host;
                    pair.world.net.link_mut(host).jitter = Duration::from_millis(jitter);
                }
                for talk in 0..50u64 {
                    let who = usize::from(talk % 2 == 1);
                    pair.world.send(pair.devices[who], pair.devices[1 - who], false);
                    for _ in 0..LOOKS {
                        for at in [0, 1] {
                            match endpoint(&pair, at) {
                                None => taken.none += 1,
                                Some(ip) if ip == inside[1 - at] => taken.inside += 1,
                                Some(_) => taken.outside += 1,
                            }
                        }
                        pair.world.run(LOOK);
                    }
                    // Not in step with what the agents do by themselves.
                    pair.world.run(S * pause + Duration::from_millis(talk * 137 % 1_000));
                }
            }
            print(&format!("neighbours, every {pause} s, jitter {jitter} ms"), format!("{taken:?}"));
            assert_eq!(taken.outside, 0);
            assert!(taken.inside > 9 * taken.none);
        }
    }
}
