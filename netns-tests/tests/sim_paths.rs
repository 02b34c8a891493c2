//! What a path has to stand in virtual time: roaming, sleep, silence behind forgetful NATs, hard NATs, and a day's upkeep.

use std::net::IpAddr;
use std::time::Duration;

use warren_engine::paths::OPEN_SOCKETS;
use warren_netns_tests::sim::flows::{Gaps, Pair, Place};
use warren_netns_tests::sim::internet::{Link, NatId, Realm};
use warren_netns_tests::sim::nat::{Allocation, Degree, NatBehaviour};
use warren_netns_tests::sim::world::{APP_PORT, World};

const S: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

const fn nat(mapping: Degree, filtering: Degree, timeout: u64) -> NatBehaviour {
    NatBehaviour {
        mapping,
        allocation: Allocation::Preserving,
        filtering,
        timeout: Duration::from_secs(timeout),
        hairpin: false,
    }
}

const PORT_RESTRICTED: NatBehaviour = nat(Degree::EndpointIndependent, Degree::AddressAndPortDependent, 60);

#[expect(clippy::print_stdout, reason = "measured values are part of the result")]
fn print(what: &str, text: impl std::fmt::Display) {
    println!("{what}: {text}");
}

/// What happens to a device that is talking.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// It gets another address in the same network.
    Address,
    /// It goes to a network behind another router.
    Interface,
    /// It sleeps.
    Sleep(Duration),
    /// Its router starts anew, with another public address. It is told nothing.
    Router,
    /// From IPv4 to IPv6 and back.
    Family,
    /// The relay goes away for good.
    Relay,
}

#[expect(clippy::expect_used, reason = "a failed test panics")]
fn happen(pair: &mut Pair, event: Event) {
    let no = pair.devices[0];
    match event {
        Event::Address => {
            let nat = pair.nats[0].expect("behind a router");
            pair.world.roam(no, &[(Realm::Behind(nat), IpAddr::from([192, 168, 1, 77]))]);
        }
        Event::Interface => {
            let nat = pair.world.add_nat(PORT_RESTRICTED);
            pair.nats[0] = Some(nat);
            pair.world.roam(no, &[(Realm::Behind(nat), IpAddr::from([192, 168, 7, 7]))]);
        }
        Event::Sleep(duration) => {
            pair.world.sleep(no, duration);
            pair.world.run(duration + Duration::from_millis(1));
            pair.world.deliveries.clear();
            pair.start_measuring();
        }
        Event::Router => pair.world.reboot_nat(pair.nats[0].expect("behind a router")),
        Event::Family => {
            let addr = pair.world.fresh_v6();
            pair.world.roam(no, &[(Realm::Public, addr)]);
        }
        Event::Relay => pair.world.stop_relay(0),
    }
}

/// Both ends hear of it: the one that moved by its host, the other by what comes through the relay and not directly. A new stream
/// to the relay (0.12 s) and its token take a few round trips.
const ROAMING_GAP: Duration = Duration::from_millis(600);
/// The other end has no address of the new family, so it is silence that tells: 0.35 s in the stream's rhythm, and 0.4 s in which
/// an answer may come. Then the relay, a round trip away.
const FAMILY_GAP: Duration = Duration::from_millis(1_500);
/// The router restarted, and the stream to the relay is dead as well: 3 s to be sure of that here, after the 0.75 s above. Plain
/// UDP to the relay, which goes on from another address, is not simulated.
const ROUTER_GAP: Duration = Duration::from_millis(4_500);
/// A flow that repeats with doubling pauses may wait as long again.
const fn flow_gap(stream: Duration) -> Duration {
    stream.saturating_mul(2)
}

/// How soon both ends send directly again. The stream to the relay stands after 0.12 s; then addresses and pings take four times
/// 20 to 40 ms. 0.3 s were measured.
const ROAMING_DIRECT: Duration = Duration::from_millis(600);
/// The stream to the relay is dead as well, and the new one stands after 2.6 s; until then nobody can be told the new address.
/// 2.95 s were measured, and 3.65 s after a night's sleep.
const ROUTER_DIRECT: Duration = Duration::from_millis(4_000);
const NEVER: Duration = Duration::MAX;

/// Traffic goes on for a minute. After how much of it both ends sent directly to the end.
fn relayed_for(pair: &mut Pair) -> Duration {
    const SLICE: Duration = Duration::from_millis(50);
    let (start, mut last) = (pair.world.now.boot, Duration::ZERO);
    while pair.world.now.boot.since(start) < MINUTE {
        pair.run(SLICE);
        if pair.path_kind(0) != "direct" || pair.path_kind(1) != "direct" {
            last = pair.world.now.boot.since(start);
        }
    }
    last
}

#[test]
fn roaming_costs_a_stall_and_no_more() {
    let places = [Place::Public, Place::Behind(PORT_RESTRICTED)];
    for other in places {
        for (event, bound, direct) in [
            (Event::Address, ROAMING_GAP, ROAMING_DIRECT),
            (Event::Interface, ROAMING_GAP, ROAMING_DIRECT),
            (Event::Sleep(20 * S), ROUTER_GAP, ROUTER_DIRECT),
            (Event::Sleep(2 * 60 * S), ROUTER_GAP, ROUTER_DIRECT),
            (Event::Sleep(8 * 60 * MINUTE), ROUTER_GAP, ROUTER_DIRECT),
            (Event::Router, ROUTER_GAP, ROUTER_DIRECT),
            (Event::Family, FAMILY_GAP, NEVER), // the other end has IPv4 only
            (Event::Relay, ROAMING_GAP, Duration::ZERO),
        ] {
            let (mut worst, mut slowest, mut slowest_back) =
                (Gaps::default(), Duration::ZERO, Duration::ZERO);
            for seed in 1..=8 {
                let mut pair = Pair::new(seed, [Place::Behind(PORT_RESTRICTED), other]);
                pair.run(20 * S + Duration::from_millis(seed * 137));
                assert_eq!((pair.path_kind(0).as_str(), pair.path_kind(1).as_str()), ("direct", "direct"));
                pair.start_measuring();
                happen(&mut pair, event);
                slowest = slowest.max(relayed_for(&mut pair));
                let gaps = pair.gaps();
                assert_eq!(pair.path_kind(0) == "direct", direct != NEVER, "{event:?}, seed {seed}");
                worst = Gaps { stream: worst.stream.max(gaps.stream), flow: worst.flow.max(gaps.flow) };
                if let Event::Family = event {
                    let nat = pair.nats[0].expect("behind a router");
                    let home = (Realm::Behind(nat), IpAddr::from([192, 168, 1, 10]));
                    pair.start_measuring();
                    pair.world.roam(pair.devices[0], &[home]);
                    slowest_back = slowest_back.max(relayed_for(&mut pair));
                    let gaps = pair.gaps();
                    worst = Gaps { stream: worst.stream.max(gaps.stream), flow: worst.flow.max(gaps.flow) };
                    assert_eq!(pair.path_kind(0), "direct", "{event:?} and back, seed {seed}");
                }
            }
            print(
                &format!("{event:?}, the other end {}", name(other)),
                format!("longest gap {worst:?}, direct after {slowest:?}, and back after {slowest_back:?}"),
            );
            assert!(worst.stream <= bound, "{event:?}: {worst:?}");
            assert!(worst.flow <= flow_gap(bound), "{event:?}: {worst:?}");
            assert!(slowest <= direct, "{event:?}: direct after {slowest:?}");
            assert!(slowest_back <= ROAMING_DIRECT, "{event:?} and back: direct after {slowest_back:?}");
        }
    }
}

const fn name(place: Place) -> &'static str {
    match place {
        Place::Public => "public",
        Place::Behind(_) => "behind a port-restricted NAT",
    }
}

/// A network with both families: IPv4 behind a translator, IPv6 behind a firewall that lets in answers only.
struct Site {
    nat: NatId,
    v4: (Realm, IpAddr),
    v6: (Realm, IpAddr),
}

impl Site {
    fn new(pair: &mut Pair, number: u8) -> Self {
        let nat = pair.world.add_nat(PORT_RESTRICTED);
        // What shows the world the address that it has inside only filters.
        let v6 = pair.world.fresh_v6();
        let firewall = pair.world.net.add_nat(Realm::Public, v6, PORT_RESTRICTED);
        let v4 = (Realm::Behind(nat), IpAddr::from([192, 168, number, 10]));
        Self { nat, v4, v6: (Realm::Behind(firewall), v6) }
    }
}

/// What happens to one who is on a train, in this order, and then again.
const TRAIN: [&str; 6] = [
    "another address in the same network",
    "another network",
    "back again",
    "the router restarts with another public address",
    "IPv4 goes, IPv6 comes",
    "IPv6 goes, IPv4 comes",
];
/// How soon both ends send directly again after each: no later than if it were the only move.
const TRAIN_DIRECT: [Duration; 6] =
    [ROAMING_DIRECT, ROAMING_DIRECT, ROAMING_DIRECT, ROUTER_DIRECT, ROAMING_DIRECT, ROAMING_DIRECT];
#[test]
fn who_moves_every_few_seconds_is_reached_directly_as_soon_as_the_first_time() {
    const TURN: Duration = Duration::from_millis(4_500);
    const SLICE: Duration = Duration::from_millis(50);
    let (mut slowest, mut worst) = ([Duration::ZERO; TRAIN.len()], [Duration::ZERO; TRAIN.len()]);
    for seed in 1..=8 {
        let mut pair = Pair::new(seed, [Place::Behind(PORT_RESTRICTED); 2]);
        let [home, office, other] = [1, 2, 3].map(|number| Site::new(&mut pair, number));
        let [a, b] = pair.devices;
        pair.world.roam(a, &[home.v4]);
        pair.world.roam(b, &[other.v4, other.v6]);
        pair.run(5 * S + Duration::from_millis(seed * 137));
        let direct = |pair: &Pair| pair.path_kind(0) == "direct" && pair.path_kind(1) == "direct";
        assert!(direct(&pair));
        for turn in 0..2 * TRAIN.len() {
            let what = turn % TRAIN.len();
            pair.start_measuring();
            let other_v4 = (home.v4.0, IpAddr::from([192, 168, 1, 77]));
            match what {
                0 => pair.world.roam(a, &[other_v4]),
                1 => pair.world.roam(a, &[office.v4]),
                2 | 5 => pair.world.roam(a, &[home.v4]),
                3 => pair.world.reboot_nat(home.nat),
                _ => pair.world.roam(a, &[home.v6]),
            }
            let (mut last_relayed, start) = (Duration::ZERO, pair.world.now.boot);
            loop {
                pair.run(SLICE);
                let since = pair.world.now.boot.since(start);
                if !direct(&pair) {
                    last_relayed = since;
                    assert!(since < MINUTE, "{}: {}", TRAIN[what], pair.world.describe(a, b));
                } else if since >= TURN {
                    break;
                }
            }
            let endpoint = pair.path(1).and_then(|path| path.endpoint);
            assert_eq!(endpoint.is_some_and(|addr| addr.is_ipv6()), what == 4, "{}", TRAIN[what]);
            slowest[what] = slowest[what].max(last_relayed);
            worst[what] = worst[what].max(pair.gaps().stream);
        }
    }
    for n in 0..TRAIN.len() {
        print(TRAIN[n], format!("longest gap {:?}, direct again after {:?}", worst[n], slowest[n]));
    }
    for n in 0..TRAIN.len() {
        let gap = if n == 3 { ROUTER_GAP } else { ROAMING_GAP };
        assert!(worst[n] <= gap, "{}: longest gap {:?}", TRAIN[n], worst[n]);
        assert!(slowest[n] <= TRAIN_DIRECT[n], "{}: direct again after {:?}", TRAIN[n], slowest[n]);
    }
}

/// A first packet needs a handshake through the relay: two frames of 40 ms each way, and the answer.
const FIRST_ANSWER: Duration = Duration::from_millis(4 * 40 + 20);

#[test]
fn the_first_packet_after_a_silence_arrives_at_once() {
    for timeout in [3, 10, 30, 60, 300] {
        let behaviour = nat(Degree::EndpointIndependent, Degree::AddressAndPortDependent, timeout);
        for seed in 1..=4 {
            let mut pair = Pair::new(seed, [Place::Behind(behaviour); 2]);
            assert!(pair.ask(10 * S).is_some());
            // Time to find out how long the NAT remembers; somebody talks now and then.
            for _ in 0..40 {
                assert!(pair.ask(15 * S).is_some());
            }
            // 168: with the questions around it a session would else be 180 s old while a packet of it travels.
            for silence in [2, 4, 9, 25, 40, 60, 80, 120, 168, 200, 600] {
                assert!(pair.ask(5 * S).is_some());
                pair.world.run(Duration::from_secs(silence));
                let took = pair.ask(5 * S);
                let what = format!("NAT of {timeout} s, {silence} s of silence");
                assert!(took.is_some_and(|took| took <= FIRST_ANSWER), "{what}, seed {seed}: {took:?}");
                if seed == 1 {
                    print(&what, format!("answer after {took:?}"));
                }
            }
        }
    }
}

/// Datagrams of upkeep per device and hour of use: a device talks to three others all the time, and three others to it, so that
/// it has six paths to keep open behind a NAT that forgets after 30 s: 1 140 probes, 430 of STUN and 240 of WireGuard's were
/// counted, and a fifth more is allowed.
const MAX_UPKEEP_PER_HOUR: f64 = 2_200.0;
/// The same in bytes, without headers.
const MAX_UPKEEP_BYTES_PER_HOUR: f64 = 330_000.0;

#[test]
fn a_day_of_fifty_devices_costs_little() {
    const DEVICES: usize = 50;
    let mut world = World::new(1);
    for n in 0..DEVICES as u8 {
        let behaviour = nat(Degree::EndpointIndependent, Degree::AddressAndPortDependent, 30);
        let nat = world.add_nat(behaviour);
        world
            .add_device("tag:a", Realm::Behind(nat), IpAddr::from([192, 168, 1, 10 + n]), Link::default())
            .unwrap();
    }
    world.run(2 * S);
    world
        .set_policy(format!(
            r#"{{"tagOwners": {{"tag:a": ["admin@example.com"]}},
                "grants": [{{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["udp:{APP_PORT}"]}}]}}"#
        ))
        .unwrap();
    world.run(3 * S);
    let before = world.tally;
    // Day: each device asks three others, every two minutes. Night: nobody says anything.
    for minute in 0..24 * 60u32 {
        if (8 * 60..18 * 60).contains(&minute) && minute.is_multiple_of(2) {
            for from in 0..DEVICES {
                for away in [1, 7, 20] {
                    world.send(from, (from + away) % DEVICES, false);
                }
            }
        }
        world.run(MINUTE);
        world.deliveries.clear();
    }
    let after = world.tally;
    let hours = 10.0 * DEVICES as f64;
    let per_hour = |count: fn(&warren_netns_tests::sim::world::Tally) -> u64| {
        (count(&after) - count(&before)) as f64 / hours
    };
    let [probes, stun, upkeep] = [per_hour(|t| t.probes), per_hour(|t| t.stun), per_hour(|t| t.upkeep)];
    let bytes = per_hour(|t| t.upkeep_bytes);
    print(
        "per device and hour of use",
        format!(
            "{probes:.0} probes, {stun:.0} STUN, {upkeep:.0} handshakes and keep-alives, {bytes:.0} bytes"
        ),
    );
    assert!(probes + stun + upkeep <= MAX_UPKEEP_PER_HOUR);
    assert!(bytes <= MAX_UPKEEP_BYTES_PER_HOUR);
}

#[test]
fn hard_nats_are_got_through_as_often_as_the_budget_allows() {
    const SEEDS: u64 = 20;
    let hard = |allocation| NatBehaviour {
        allocation,
        ..nat(Degree::AddressAndPortDependent, Degree::AddressAndPortDependent, 60)
    };
    for (what, places, least) in [
        ("sequential with port-restricted", [hard(Allocation::Sequential), PORT_RESTRICTED], 20),
        ("port-preserving with port-restricted", [hard(Allocation::Preserving), PORT_RESTRICTED], 20),
        ("random with port-restricted", [hard(Allocation::Random), PORT_RESTRICTED], 14),
        ("sequential with sequential", [hard(Allocation::Sequential); 2], 0),
        ("random with random", [hard(Allocation::Random); 2], 0),
    ] {
        let (mut direct, mut datagrams, mut most_sockets) = (0, 0, 0);
        for seed in 1..=SEEDS {
            let mut pair = Pair::new(seed, places.map(Place::Behind));
            let before = pair.world.tally.probes;
            for n in 0..12 {
                let answer = pair.ask(5 * S);
                let [a, b] = pair.devices;
                let (at_a, at_b) = (pair.world.describe(a, b), pair.world.describe(b, a));
                assert!(answer.is_some(), "{what}, seed {seed}, question {n}: {at_a}; {at_b}");
            }
            direct += usize::from(pair.path_kind(0) == "direct" && pair.path_kind(1) == "direct");
            datagrams = datagrams.max(pair.world.tally.probes - before);
            let sockets = pair.devices.map(|no| pair.world.devices[no].most_extra);
            most_sockets = most_sockets.max(sockets[0].max(sockets[1]));
            if pair.path_kind(0) != "direct" {
                let for_it = |id: &&u8| OPEN_SOCKETS.contains(id);
                let open = pair.devices.map(|no| pair.world.devices[no].extra.iter().filter(for_it).count());
                assert_eq!(open, [0, 0], "{what}: nothing stays open for nothing");
                let why = pair.why_not_direct(0).unwrap();
                let both_hard = places[0].mapping == places[1].mapping;
                assert_eq!(why, if both_hard { "both-symmetric" } else { "hard-nat" });
            }
        }
        print(
            what,
            format!(
                "{direct} of {SEEDS} direct within a minute, at most {datagrams} probes, {most_sockets} sockets"
            ),
        );
        assert!(direct >= least, "{what}");
        // 256 to open, 1 024 to guess, and what ordinary probing takes.
        assert!(datagrams <= 1_800, "{what}: {datagrams} probes in a minute");
        if places == [hard(Allocation::Random); 2] {
            assert!(most_sockets <= 1 && datagrams < 400, "two random ends never search");
        }
    }
}

/// Bytes of a datagram's headers and number, in IPv4; IPv6's header is 20 longer.
const DATAGRAM: u16 = 20 + 8 + 8;

#[test]
fn packets_are_as_long_as_the_path_allows() {
    // IPv4, UDP and WireGuard take 60 bytes, and lengths are tried in steps of 16.
    for (mtu, usable) in [(1_500, 1_420), (1_480, 1_420), (1_400, 1_328), (1_280, 1_216), (1_260, 1_200)] {
        for fragments in [true, false] {
            for other in [Place::Public, Place::Behind(PORT_RESTRICTED)] {
                let mut pair = Pair::new(3, [Place::Behind(PORT_RESTRICTED), other]);
                let host = pair.world.devices[pair.devices[1]].host;
                let link = *pair.world.net.link_mut(host);
                *pair.world.net.link_mut(host) = Link { mtu, fragments, ..link };
                assert!(pair.ask(5 * S).is_some());
                pair.world.run(5 * S);
                let what = format!("{mtu} bytes, fragments {fragments}");
                for at in [0, 1] {
                    assert_eq!(pair.path_kind(at), "direct");
                    assert_eq!(pair.path(at).and_then(|p| p.mtu), Some(usize::from(usable)), "{what}");
                }
                assert!(pair.ask_long(S, false, usable - DATAGRAM).is_some(), "{what}");
                pair.world.too_big.clear();
                if usable < 1_420 {
                    assert!(pair.ask_long(S, false, usable - DATAGRAM + 1).is_none(), "{what}");
                    let v6 = usable.max(1_280);
                    assert!(pair.ask_long(S, true, v6 + 1 - DATAGRAM - 20).is_none(), "{what}");
                    let told = std::mem::take(&mut pair.world.too_big);
                    assert_eq!(told, [(pair.devices[0], usable), (pair.devices[0], v6)], "{what}");
                    // What IPv6 may always send is cut outside of the tunnel.
                    let passes = fragments || usable >= v6;
                    // Else the relay might carry it, by way of precaution after the silence.
                    assert!(pair.ask(S).is_some());
                    assert_eq!(pair.ask_long(S, true, v6 - DATAGRAM - 20).is_some(), passes, "{what}");
                }
                assert!(pair.world.too_big.is_empty());
            }
        }
    }
}

/// Silence is noticed after 1 s, and a ping after 0.3 s more answered; three padded ones are waited for.
const NARROWED_GAP: Duration = Duration::from_millis(3_500);

#[test]
fn a_path_that_becomes_narrower_without_a_word_is_noticed() {
    let mut worst = Duration::ZERO;
    for seed in 1..=8 {
        let mut pair = Pair::new(seed, [Place::Behind(PORT_RESTRICTED), Place::Behind(PORT_RESTRICTED)]);
        assert!(pair.ask(10 * S).is_some());
        assert_eq!(pair.path(0).and_then(|p| p.mtu), Some(1_420));
        let host = pair.world.devices[pair.devices[1]].host;
        let link = *pair.world.net.link_mut(host);
        *pair.world.net.link_mut(host) = Link { mtu: 1_280, fragments: false, ..link };
        let start = pair.world.now.boot;
        while pair.world.too_big.is_empty() {
            pair.world.send_long(pair.devices[0], pair.devices[1], false, 1_300);
            pair.world.run(Duration::from_millis(50));
            assert!(pair.world.now.boot.since(start) <= NARROWED_GAP, "seed {seed}");
        }
        worst = worst.max(pair.world.now.boot.since(start));
        pair.world.run(2 * S);
        assert_eq!(pair.path(0).and_then(|p| p.mtu), Some(1_216), "seed {seed}");
    }
    print("a path of 1 500 bytes becomes one of 1 280", format!("told after {worst:?}"));
}

#[test]
fn senders_of_long_packets_are_told_at_a_bounded_rate() {
    const PER_SECOND: usize = 100; // the engine's MAX_TOO_BIG_PER_SECOND
    let mut pair = Pair::new(3, [Place::Public, Place::Public]);
    let host = pair.world.devices[pair.devices[1]].host;
    let link = *pair.world.net.link_mut(host);
    *pair.world.net.link_mut(host) = Link { mtu: 1_280, ..link };
    assert!(pair.ask(5 * S).is_some());
    for _ in 0..2 {
        pair.world.run(5 * S);
        pair.world.too_big.clear();
        for _ in 0..3 * PER_SECOND {
            pair.world.send_long(pair.devices[0], pair.devices[1], false, 1_300);
        }
        assert_eq!(pair.world.too_big.len(), PER_SECOND);
    }
}
