use std::net::Ipv4Addr;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::filter::{FilterDst, PortRange, RuleId, UnixInterval};
use crate::wire::control::{DeltaMsg, NetmapMsg};

fn addr() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn range() -> impl Strategy<Value = IpRange> {
    (any::<u32>(), any::<u32>()).prop_map(|(a, b)| {
        IpRange::new(Ipv4Addr::from(a.min(b)).into(), Ipv4Addr::from(a.max(b)).into()).unwrap()
    })
}

fn rule() -> impl Strategy<Value = FilterRule> {
    let window = (any::<i64>(), any::<i64>()).prop_map(|(from, until)| UnixInterval { from, until });
    let dst = (range(), any::<u16>())
        .prop_map(|(net, p)| FilterDst { net, ports: PortRange { first: p, last: p } });
    (
        0..40u64,
        any::<bool>(),
        any::<bool>(),
        vec(range(), 0..3),
        vec(dst, 0..3),
        proptest::option::of(vec(window, 0..2)),
    )
        .prop_map(|(id, deny, staged, src, dst, active)| FilterRule {
            id: RuleId(id),
            origin: format!("grants[{id}]"),
            action: if deny { Action::Deny } else { Action::Allow },
            staged,
            src,
            dst,
            protos: vec![6],
            active,
        })
}

fn peer(n: u8) -> impl Strategy<Value = Peer> {
    (0..3u8, vec(addr(), 0..3), proptest::option::of("[a-z]{1,8}"), any::<bool>()).prop_map(
        move |(key, addrs, name, home)| Peer {
            id: DeviceId::from_bytes([n; 16]),
            wg: WgPublicKey::from_bytes([key; 32]),
            probe: ProbePublicKey::from_bytes([key; 32]),
            addrs,
            routes: vec!["10.0.0.0/8".parse().unwrap()],
            user: name.clone(),
            name,
            tags: vec!["tag:x".into()],
            home_relay: home.then(|| RelayId::from_bytes([1; 16])),
            key_signature: None,
        },
    )
}

fn relay(n: u8) -> impl Strategy<Value = Relay> {
    (any::<u8>(), any::<bool>()).prop_map(move |(cert, peer)| Relay {
        id: RelayId::from_bytes([n; 16]),
        name: "r".into(),
        addrs: vec!["203.0.113.1:443".parse().unwrap(), "[2001:db8::1]:443".parse().unwrap()],
        stun: vec![],
        cert_sha256: [cert; 32],
        peer,
    })
}

fn app() -> impl Strategy<Value = AppGrant> {
    let addr = |n: u8| IpRange::from(IpAddr::from([100, 64, 0, n]));
    (0..3u64, btree_set(0..4u8, 0..3), 0..2u8, any::<bool>()).prop_map(move |(id, src, value, ends)| {
        AppGrant {
            id: RuleId(id),
            name: format!("example.com/cap/{}", id % 2),
            src: src.into_iter().map(|n| addr(2 * n)).collect(),
            dst: vec![addr(100)],
            values: vec![value.to_string()],
            active: ends.then(|| vec![UnixInterval { from: 0, until: 9 }]),
        }
    })
}

prop_compose! {
    fn netmap()(
        name in "[a-z]{1,8}",
        addrs in vec(addr(), 0..3),
        peers in btree_map(0..8u8, Just(()), 0..8).prop_flat_map(|m| m.into_keys().map(peer).collect::<Vec<_>>()),
        ingress in btree_set(rule(), 0..6),
        egress in btree_set(rule(), 0..6),
        relays in btree_map(0..3u8, Just(()), 0..3).prop_flat_map(|m| m.into_keys().map(relay).collect::<Vec<_>>()),
        apps in btree_set(app(), 0..4),
    ) -> Netmap {
        Netmap {
            network: Network {
                id: NetworkId::from_bytes([9; 16]),
                name: name.clone(),
                ipv4: "100.64.0.0/10".parse().unwrap(),
                ipv6: "fd00::/48".parse().unwrap(),
            },
            device: SelfDevice { id: DeviceId::from_bytes([7; 16]), name, addrs, user: None, tags: vec![] , attrs: Vec::new()},
            peers: peers.into_iter().map(|p| (p.id, Arc::new(p))).collect(),
            ingress,
            egress,
            relays: relays.into_iter().map(|r| (r.id, r)).collect(),
            apps,
        }
    }
}

/// Rules over so few addresses, ports and times that they often meet.
fn rules() -> impl Strategy<Value = BTreeSet<FilterRule>> {
    let range = (0..4u8, 0..3u8).prop_map(|(first, more)| {
        IpRange::new(
            Ipv4Addr::from([10, 0, 0, first]).into(),
            Ipv4Addr::from([10, 0, 0, first + more]).into(),
        )
        .unwrap()
    });
    let ports = (0..3u16, 0..2u16).prop_map(|(first, more)| PortRange { first, last: first + more });
    let dst = (range.clone(), ports).prop_map(|(net, ports)| FilterDst { net, ports });
    let window = (0..3i64, 0..3i64).prop_map(|(from, more)| UnixInterval { from, until: from + more });
    let rule = (
        (0..2u64, proptest::bool::weighted(0.2), proptest::bool::weighted(0.1)),
        vec(range, 0..3),
        vec(dst, 0..3),
        prop_oneof![Just(vec![]), Just(vec![6]), Just(vec![6, 17])],
        proptest::option::of(vec(window, 0..3)),
    )
        .prop_map(|((id, deny, staged), src, dst, protos, active)| FilterRule {
            id: RuleId(id),
            origin: String::new(),
            action: if deny { Action::Deny } else { Action::Allow },
            staged,
            src,
            dst,
            protos,
            active,
        });
    btree_set(rule, 0..4)
}

/// Every packet that rules of [`rules`] can tell apart.
fn packets() -> impl Iterator<Item = (IpAddr, IpAddr, u8, u16, i64)> {
    let addr = |n: u8| IpAddr::from([10, 0, 0, n]);
    let points = (0..7u8).flat_map(|s| (0..7u8).map(move |d| (s, d)));
    points.flat_map(move |(s, d)| {
        let rest = [1, 6, 17]
            .into_iter()
            .flat_map(|p| (0..4u16).flat_map(move |port| (0..5i64).map(move |t| (p, port, t))));
        rest.map(move |(proto, port, now)| (addr(s), addr(d), proto, port, now))
    })
}

/// The smallest netmap, for golden values.
fn golden() -> Netmap {
    Netmap {
        network: Network {
            id: NetworkId::from_bytes([1; 16]),
            name: "net".into(),
            ipv4: "100.64.0.0/10".parse().unwrap(),
            ipv6: "fd00::/48".parse().unwrap(),
        },
        device: SelfDevice {
            id: DeviceId::from_bytes([2; 16]),
            name: "a".into(),
            addrs: vec!["100.64.0.1".parse().unwrap()],
            user: Some("u@example.com".into()),
            tags: vec![],
            attrs: Vec::new(),
        },
        peers: BTreeMap::new(),
        ingress: BTreeSet::new(),
        egress: BTreeSet::new(),
        relays: BTreeMap::new(),
        apps: BTreeSet::new(),
    }
}

proptest! {
    #[test]
    fn applying_the_difference_gives_the_new_netmap(old in netmap(), new in netmap()) {
        let delta = Netmap::diff(&old, &new);
        let delta = Delta::try_from(DeltaMsg::from(&delta)).unwrap();
        let mut got = old;
        got.apply(delta);
        prop_assert_eq!(got.hash(), new.hash());
        prop_assert_eq!(got, new);
    }

    #[test]
    fn the_step_between_only_takes_away(old in netmap(), new in netmap()) {
        let step = Netmap::without_removed(&old, &new);
        prop_assert!(step.peers.iter().all(|(id, p)| old.peers.get(id) == Some(p)));
        prop_assert!(step.peers.keys().all(|id| new.peers.contains_key(id)));
        let held = |map: &Netmap| -> BTreeSet<(RuleId, String, Vec<String>, bool, u8)> {
            let by = |app: &AppGrant, who: u8| app.src.iter().any(|r| r.contains([100, 64, 0, who].into()));
            let each = |app: &AppGrant, who: u8| (app.id, app.name.clone(), app.values.clone(), app.active.is_some(), who);
            let grants = map.apps.iter().flat_map(|app| (0..9).map(move |who| (app, who)));
            grants.filter(|(app, who)| by(app, *who)).map(|(app, who)| each(app, who)).collect()
        };
        prop_assert_eq!(held(&step), &held(&old) & &held(&new));
        let mut got = step.clone();
        got.apply(Netmap::diff(&step, &new));
        prop_assert_eq!(got, new);
    }

    #[test]
    fn the_step_between_allows_what_both_allow(old in rules(), new in rules()) {
        let step = common_rules(&old, &new);
        for (src, dst, proto, port, now) in packets() {
            let allows = |rules: &BTreeSet<FilterRule>| {
                let hit = |action| {
                    let mut active = rules.iter().filter(|r| r.action == action && !r.staged && r.is_active(now));
                    active.any(|r| r.covers(src, dst, proto, port))
                };
                hit(Action::Allow) && !hit(Action::Deny)
            };
            prop_assert_eq!(allows(&step), allows(&old) && allows(&new));
        }
    }

    #[test]
    fn the_wire_form_round_trips(map in netmap()) {
        let back = Netmap::try_from(NetmapMsg::from(&map)).unwrap();
        prop_assert_eq!(back.hash(), map.hash());
        prop_assert_eq!(back, map);
    }

    #[test]
    fn different_netmaps_have_different_hashes(a in netmap(), b in netmap()) {
        prop_assert_eq!(a == b, a.hash() == b.hash());
    }
}

#[test]
fn the_hash_is_golden() {
    let hash = data_encoding::HEXLOWER.encode(&golden().hash());
    assert_eq!(hash, "a3b9f65c90bb806f7d1c0b7cd50928a3155a1f20769bdbc6e37def8c788be2bd");
}

#[test]
fn a_rule_that_gets_another_source_is_not_taken_away() {
    let range = |n: u8| IpRange::from(IpAddr::from([100, 64, 0, n]));
    let rule = |id: u64, origin: &str, src: Vec<IpRange>| FilterRule {
        id: RuleId(id),
        origin: origin.into(),
        action: Action::Allow,
        staged: false,
        src,
        dst: vec![FilterDst { net: range(9), ports: PortRange { first: 22, last: 22 } }],
        protos: vec![],
        active: None,
    };
    let old = BTreeSet::from([rule(1, "grants[0] line 3", vec![range(1), range(2)])]);
    // Another device joins, or the file gets a line above or another text: what was allowed stays as it is.
    for new in [
        rule(1, "grants[0] line 3", vec![range(1), range(2), range(3)]),
        rule(1, "grants[0] line 4", vec![range(1), range(2)]),
        rule(2, "grants[0] line 3", vec![range(1), range(2)]),
    ] {
        assert_eq!(common_rules(&old, &BTreeSet::from([new])), old);
    }
    // One leaves: the other stays.
    let new = BTreeSet::from([rule(1, "grants[0] line 3", vec![range(2), range(3)])]);
    let step = common_rules(&old, &new);
    assert_eq!(step, BTreeSet::from([rule(1, "grants[0] line 3", vec![range(2)])]));
}

#[test]
fn too_much_to_compare_is_taken_away_whole() {
    let range = |n: u32| IpRange::from(IpAddr::from(n.to_be_bytes()));
    let rule = |first: u32, count: u32| FilterRule {
        id: RuleId(1),
        origin: String::new(),
        action: Action::Allow,
        staged: false,
        src: vec![range(0)],
        dst: (first..first + count).map(|n| FilterDst { net: range(n), ports: PortRange::ALL }).collect(),
        protos: vec![],
        active: None,
    };
    let step =
        |count| common_rules(&BTreeSet::from([rule(0, count)]), &BTreeSet::from([rule(1, count)])).len();
    // 2 048 squared is MAX_NARROW_WORK.
    assert_eq!((step(2_000), step(2_049)), (1, 0));
}
