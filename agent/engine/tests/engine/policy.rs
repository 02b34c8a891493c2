//! What the netmap grants, when it stops granting it, and which netmaps are believed.

use std::net::IpAddr;
use std::time::Duration;

use warren_common::filter::{IpRange, RuleId, UnixInterval};
use warren_common::keys::{NetmapSecretKey, WgPublicKey};
use warren_common::netmap::{AppGrant, Netmap};
use warren_common::time::{Instant, Now};
use warren_common::wire::control::UpdateKind;
use warren_engine::engine::Engine;
use warren_engine::event::Event;
use warren_engine::io::Outbox;
use warren_engine::netmap::{
    MAX_LEASE, MAX_UPDATE_BYTES, MIN_LEASE, RestoreError, SavedNetmap, UpdateRefused,
};
use warren_engine::packet::{Addrs, Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Transport, build::Segment};
use warren_engine::status::LeaseStatus;

use crate::net::{Behind, LEASE, Net, device, engine, overlay, udp};

const S: Duration = Duration::from_secs(1);

fn pair() -> Net {
    Net::new(&[Behind::PortRestricted, Behind::PortRestricted])
}

/// A TCP connection from node 0 to node 1 with data both ways.
pub(crate) fn connect(net: &mut Net) -> impl Fn(usize, u32, u32, u8) -> Vec<u8> + use<> {
    let segment = |from: usize, seq: u32, ack: u32, flags: u8| {
        let (src_port, dst_port) = if from == 0 { (4_000, 443) } else { (443, 4_000) };
        let addrs = Addrs::new(overlay(from).into(), overlay(1 - from).into()).unwrap();
        let ack = (flags & TCP_ACK != 0).then_some(ack);
        Segment { addrs, src_port, dst_port, seq, ack, flags: flags & !TCP_ACK }.to_bytes()
    };
    net.send_packet(0, &segment(0, 100, 0, TCP_SYN));
    net.run(S);
    net.send_packet(1, &segment(1, 500, 101, TCP_SYN | TCP_ACK));
    net.run(S);
    net.send_packet(0, &segment(0, 101, 501, TCP_ACK));
    net.run(S);
    assert_eq!((net.nodes[0].got.len(), net.nodes[1].got.len()), (1, 2));
    segment
}

fn resets(net: &Net, n: usize) -> Vec<(u32, u16)> {
    let reset = |bytes: &Vec<u8>| match Packet::parse(bytes).ok()?.transport {
        Transport::Tcp(tcp) if tcp.has(TCP_RST) => Some((tcp.seq, tcp.dst_port)),
        _ => None,
    };
    net.nodes[n].got.iter().filter_map(reset).collect()
}

#[test]
fn revocation_cuts_a_flow_on_both_sides_and_resets_the_local_applications() {
    let mut net = pair();
    let segment = connect(&mut net);
    for n in 0..2 {
        net.netmaps[n].ingress.clear();
        net.netmaps[n].egress.clear();
        net.push_netmap(n);
    }
    net.run(S);
    assert_eq!(resets(&net, 0), [(501, 4_000)], "exactly the sequence number that its TCP expects");
    assert_eq!(resets(&net, 1), [(101, 443)]);
    for n in 0..2 {
        assert!(net.nodes[n].events.iter().any(|e| matches!(e, Event::FlowEnded { .. })));
    }
    let got = net.nodes[1].got.len();
    net.send_packet(0, &segment(0, 101, 501, TCP_ACK | TCP_FIN));
    net.run(S);
    assert_eq!(net.nodes[1].got.len(), got, "nothing passes any more");
}

#[test]
fn what_an_update_takes_away_ends_before_the_update_is_saved() {
    let mut net = pair();
    let _segment = connect(&mut net);
    // Node 0 loses its grant, and gets another one.
    let egress = std::mem::take(&mut net.netmaps[0].egress);
    net.netmaps[0].egress = net.netmaps[1].egress.clone();
    let update = net.snapshot(0, 7);
    let now = net.now;
    let engine = &mut net.nodes[0].engine;
    let held = engine.held();
    let pending = engine.check_update(now, &update).unwrap();
    engine.restrict(now, &pending);
    let netmap = engine.netmap().unwrap();
    assert!(netmap.egress.is_empty(), "what is new waits: {:?}", netmap.egress);
    let (before, after) = (held.unwrap(), engine.held().unwrap());
    assert_eq!((before.0, before.1), (after.0, after.1), "the revision waits, too");
    assert_ne!(before.2, after.2, "a delta on top of this can't add up");
    net.drain(0);
    assert_eq!(resets(&net, 0), [(501, 4_000)]);
    // Once more changes nothing; then the whole of it.
    let engine = &mut net.nodes[0].engine;
    engine.restrict(now, &pending);
    assert_eq!(engine.held(), Some(after));
    assert!(engine.apply_update(now, pending));
    assert_eq!(engine.netmap().unwrap().egress, net.netmaps[0].egress);
    assert_eq!(engine.held().unwrap().1, 7);
    // An update that only adds takes nothing away.
    net.netmaps[0].egress.extend(egress);
    let update = net.snapshot(0, 8);
    let engine = &mut net.nodes[0].engine;
    let before = engine.held();
    let pending = engine.check_update(now, &update).unwrap();
    engine.restrict(now, &pending);
    assert_eq!(engine.held(), before);
}

#[test]
fn either_end_alone_is_enough() {
    for open in 0..2 {
        let mut net = pair();
        let shut = 1 - open;
        net.netmaps[shut].ingress.clear();
        net.netmaps[shut].egress.clear();
        net.push_netmap(shut);
        net.send(0, 1, b"denied");
        net.run(S);
        assert!(net.nodes[1].got.is_empty());
        let counter = if open == 0 { (1, "ingress-no-rule") } else { (0, "egress-no-rule") };
        assert_eq!(net.drops(counter.0, counter.1), 1);
    }
}

#[test]
fn a_removed_peer_is_gone_and_a_new_key_is_another_peer() {
    let mut net = pair();
    net.send(0, 1, b"first");
    net.run(S);
    net.netmaps[1].peers.clear();
    net.push_netmap(1);
    net.send(0, 1, b"second");
    net.run(S);
    assert!(!net.nodes[1].got.iter().any(|p| p.ends_with(b"second")));
    assert!(net.drops(1, "wireguard-unknown-index") > 0, "its session is wiped");
    assert_eq!(net.nodes[1].engine.whois(net.now, overlay(0).into()), None);
    let mut peer = net.netmaps[0].peers[&device(1)].as_ref().clone();
    peer.wg = WgPublicKey::from_bytes(*net.nodes[0].keys.2.public().as_bytes());
    net.netmaps[0].peers.insert(device(1), peer.into());
    net.push_netmap(0);
    assert_eq!(net.path_kind(0, 1), "none");
}

#[test]
fn a_source_that_belongs_to_somebody_else_is_dropped_at_both_ends() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing, Behind::Nothing]);
    net.send_packet(0, &udp(overlay(2), overlay(1), 1, 2, b"spoofed"));
    assert_eq!(net.drops(0, "egress-spoofed-source"), 1);
    // An agent that doesn't check: it believes that node 2's address is its own.
    net.netmaps[0].device.addrs = vec![overlay(2).into()];
    net.netmaps[0].egress.insert(crate::net::allow(900, overlay(2), overlay(1)));
    net.push_netmap(0);
    net.send_packet(0, &udp(overlay(2), overlay(1), 1, 2, b"spoofed"));
    net.run(S);
    assert!(net.nodes[1].got.is_empty());
    assert_eq!(net.drops(1, "ingress-spoofed-source"), 1);
}

#[test]
fn a_flow_ends_when_its_rules_window_closes_without_a_coordinator() {
    let mut net = pair();
    let now = net.now.unix.as_secs();
    for n in 0..2 {
        let window = |mut rule: warren_common::filter::FilterRule| {
            rule.active = Some(vec![UnixInterval { from: now - 10, until: now + 30 }]);
            rule
        };
        let map = &mut net.netmaps[n];
        map.ingress = map.ingress.iter().cloned().map(window).collect();
        map.egress = map.egress.iter().cloned().map(window).collect();
        net.push_netmap(n);
    }
    net.set_control(0, false);
    net.set_control(1, false);
    net.send(0, 1, b"inside");
    net.run(S);
    assert_eq!(net.nodes[1].got.len(), 1);
    net.run(40 * S);
    assert!(net.nodes[0].events.iter().any(|e| matches!(e, Event::FlowEnded { .. })));
    net.send(0, 1, b"outside");
    net.run(S);
    assert!(!net.nodes[1].got.iter().any(|p| p.ends_with(b"outside")));
}

#[test]
fn the_end_of_the_lease_denies_everything_until_a_renewal() {
    let mut net = pair();
    let _ = connect(&mut net);
    net.run(LEASE - 30 * S);
    net.push_netmap(1);
    net.send(0, 1, b"still allowed");
    net.run(S);
    assert!(net.nodes[1].got.iter().any(|p| p.ends_with(b"still allowed")));
    net.run(60 * S);
    assert!(net.nodes[0].events.contains(&Event::LeaseEnded));
    assert_eq!(net.nodes[0].engine.status(net.now).lease, LeaseStatus::Ended);
    let before = (net.direct, net.relayed);
    net.send(0, 1, b"denied");
    net.send(1, 0, b"denied too");
    net.run(S);
    assert!(!net.nodes[1].got.iter().any(|p| p.ends_with(b"denied")));
    assert!(!net.nodes[0].got.iter().any(|p| p.ends_with(b"denied too")));
    assert!(net.drops(0, "egress-lease-ended") >= 1 && net.drops(0, "nothing-granted") >= 1);
    assert!(net.direct + net.relayed > before.0 + before.1, "node 1 still tries");
    let now = net.now;
    assert_eq!(net.nodes[0].engine.start_ping(now, device(1)), None);
    assert_eq!(net.nodes[0].engine.why(now, overlay(1).into(), 17, 1).reason, "lease-ended");
    // A lease update is enough.
    let (_, revision, _) = net.nodes[0].engine.held().unwrap();
    let signed = net.update(0, UpdateKind::Lease, revision, revision).sign(&net.root);
    let pending = net.nodes[0].engine.check_update(now, &signed).unwrap();
    assert!(net.nodes[0].engine.apply_update(now, pending));
    net.drain(0);
    net.send(0, 1, b"allowed again");
    net.run(6 * S);
    assert!(net.nodes[1].got.iter().any(|p| p.ends_with(b"allowed again")));
}

#[test]
fn a_lapsed_lease_denies_even_if_the_timer_is_late() {
    let mut net = pair();
    net.send(0, 1, b"first");
    net.run(S);
    let late = net.now + LEASE;
    let mut out = Outbox::new();
    let packet = udp(overlay(0), overlay(1), 4_000, 5_000, b"late");
    net.nodes[0].engine.handle_tun(late, &packet, &mut out);
    assert!(out.is_empty());
}

#[test]
fn only_the_right_updates_are_accepted() {
    let mut net = pair();
    let held = net.nodes[0].engine.held().unwrap();
    assert_eq!((held.0, held.1), (1, 1));
    let check = |signed| net.nodes[0].engine.check_update(net.now, &signed).map(|p| p.revision());
    let base = || net.update(0, UpdateKind::Snapshot(Box::new(net.netmaps[0].clone())), 0, 2);
    let sign = |update: &warren_common::wire::control::NetmapUpdate| update.sign(&net.root);
    assert_eq!(check(sign(&base())), Ok(2));

    let mut unsigned = sign(&base());
    unsigned.signature.clear();
    assert_eq!(check(unsigned), Err(UpdateRefused::BadSignature));
    let mut tampered = sign(&base());
    tampered.payload[40] ^= 1;
    assert_eq!(check(tampered), Err(UpdateRefused::BadSignature));
    assert_eq!(check(base().sign(&NetmapSecretKey::from_bytes([3; 32]))), Err(UpdateRefused::BadSignature));

    let mut other = base();
    other.network = warren_common::ids::NetworkId::from_bytes([8; 16]);
    assert!(matches!(check(sign(&other)), Err(UpdateRefused::WrongNetwork { .. })));
    assert!(matches!(check(net.snapshot(1, 2)), Err(UpdateRefused::WrongDevice { .. })));
    let mut former = base();
    former.device_key = net.nodes[1].keys.0.public();
    assert!(matches!(check(sign(&former)), Err(UpdateRefused::WrongDevice { .. })));
    // Signed for us, with another device's netmap inside.
    let mut mixed = base();
    mixed.kind = UpdateKind::Snapshot(Box::new(net.netmaps[1].clone()));
    mixed.hash = net.netmaps[1].hash();
    assert!(matches!(check(sign(&mixed)), Err(UpdateRefused::WrongDevice { .. })));

    let mut old = base();
    old.epoch = 0;
    assert_eq!(check(sign(&old)), Err(UpdateRefused::WrongEpoch { got: 0, want: 1 }));
    let mut restored = base();
    (restored.epoch, restored.to) = (2, 1);
    let restored = sign(&restored);
    let early = check(restored.clone());
    assert_eq!(early, Err(UpdateRefused::WrongEpoch { got: 2, want: 1 }), "the root key must vouch for it");

    let mut older = base();
    older.to = 0;
    assert_eq!(check(sign(&older)), Err(UpdateRefused::OldRevision { got: 0, held: 1 }));
    let mut same = base();
    same.to = 1;
    assert_eq!(check(sign(&same)), Ok(1), "the same once more renews the lease");
    let mut forked_map = net.netmaps[0].clone();
    forked_map.egress.clear();
    let mut forked = base();
    (forked.to, forked.hash) = (1, forked_map.hash());
    forked.kind = UpdateKind::Snapshot(Box::new(forked_map.clone()));
    assert_eq!(check(sign(&forked)), Err(UpdateRefused::OldRevision { got: 1, held: 1 }));

    for (lease, fine) in [
        (MIN_LEASE, true),
        (MIN_LEASE - S, false),
        (MAX_LEASE, true),
        (MAX_LEASE + S, false),
        (Duration::ZERO, false),
    ] {
        let mut update = base();
        update.lease_ms = lease.as_millis() as u64;
        assert_eq!(check(sign(&update)).is_ok(), fine, "{lease:?}");
    }

    let delta = UpdateKind::Delta(Box::new(Netmap::diff(&net.netmaps[0], &forked_map)));
    let mut update = net.update(0, delta, 1, 2);
    update.hash = forked_map.hash();
    assert_eq!(check(sign(&update)), Ok(2));
    (update.from, update.to) = (2, 3);
    let gap = check(sign(&update)).unwrap_err();
    assert!(gap.wants_snapshot() && gap == UpdateRefused::GapInRevisions { from: 2, held: 1 });
    (update.from, update.to) = (0, 1);
    assert_eq!(check(sign(&update)), Err(UpdateRefused::OldRevision { got: 1, held: 1 }));
    (update.from, update.to, update.epoch) = (1, 2, 2);
    let delta = sign(&update);

    let lease = net.update(0, UpdateKind::Lease, 1, 1);
    assert_eq!(check(sign(&lease)), Ok(1));
    let mut lease = net.update(0, UpdateKind::Lease, 2, 2);
    assert!(check(sign(&lease)).unwrap_err().wants_snapshot());
    (lease.to, lease.hash) = (1, [0; 32]);
    assert!(check(sign(&lease)).unwrap_err().wants_snapshot());

    let newest = net.snapshot(0, 9);
    net.nodes[0].engine.trust_epoch(2);
    net.nodes[0].engine.trust_epoch(1);
    let check = |signed| net.nodes[0].engine.check_update(net.now, &signed).map(|p| p.revision());
    assert_eq!(
        check(newest),
        Err(UpdateRefused::WrongEpoch { got: 1, want: 2 }),
        "of the branch left behind"
    );
    assert_eq!(check(restored), Ok(1), "a higher epoch numbers anew");
    assert!(check(delta).unwrap_err().wants_snapshot(), "and begins with a snapshot");
}

#[test]
fn an_update_that_is_too_long_is_not_even_verified() {
    let net = pair();
    let mut update = net.snapshot(0, 9);
    update.payload.resize(MAX_UPDATE_BYTES + 1, 0);
    let refused = net.nodes[0].engine.check_update(net.now, &update);
    assert_eq!(refused.unwrap_err(), UpdateRefused::TooBig);
    update.payload.pop();
    let refused = net.nodes[0].engine.check_update(net.now, &update);
    assert_eq!(refused.unwrap_err(), UpdateRefused::BadSignature);
}

#[test]
fn of_a_delta_that_does_not_add_up_only_what_restricts_applies() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing, Behind::Nothing]);
    let mut meant = net.netmaps[0].clone();
    meant.egress.retain(|rule| rule.origin != "grants[101]");
    meant.egress.insert(crate::net::allow(77, overlay(0), overlay(2)));
    let delta = UpdateKind::Delta(Box::new(Netmap::diff(&net.netmaps[0], &meant)));
    let mut update = net.update(0, delta, 1, 2);
    update.hash = [1; 32];
    let now = net.now;
    let refused = net.nodes[0].engine.check_update(now, &update.sign(&net.root)).unwrap_err();
    assert!(refused.wants_snapshot());
    let UpdateRefused::HashMismatch { restriction: Some(restriction) } = refused else { panic!("{refused}") };
    assert!(!restriction.to_saved().as_bytes().is_empty());
    assert_eq!(restriction.revision(), 1);
    assert!(net.nodes[0].engine.apply_update(now, *restriction));
    let why = |net: &Net, n: usize| net.nodes[0].engine.why(net.now, overlay(n).into(), 17, 9);
    assert_eq!((why(&net, 1).allowed, why(&net, 2).allowed), (false, true));
    assert!(!net.nodes[0].engine.netmap().unwrap().egress.iter().any(|r| r.origin == "grants[77]"));
    net.netmaps[0] = meant;
    net.push_netmap(0);
    assert!(why(&net, 2).allowed && !why(&net, 1).allowed);
}

/// A second engine on the same keys and state: the agent after a restart.
fn restart(net: &Net, n: usize, boot_id: u8, now: Now, saved: &SavedNetmap) -> Result<Engine, RestoreError> {
    let mut engine = if boot_id == 1 {
        engine(n, &net.nodes[n].keys, &net.root)
    } else {
        crate::net::engine_booted(n, &net.nodes[n].keys, &net.root, [boot_id; 16])
    };
    engine.restore(now, saved).map(|()| engine)
}

#[test]
fn a_restart_keeps_netmap_numbering_and_what_is_left_of_the_lease() {
    let net = pair();
    let saved = net.nodes[0].engine.to_saved(net.now).unwrap();
    let hour = 3_600 * S;
    let left = |engine: &Engine, now| match engine.status(now).lease {
        LeaseStatus::Valid { remaining_ms } => Duration::from_millis(remaining_ms),
        LeaseStatus::Ended | LeaseStatus::None => Duration::ZERO,
    };
    let before = left(&net.nodes[0].engine, net.now);

    let now = net.now + hour;
    let same_boot = restart(&net, 0, 1, now, &saved).unwrap();
    assert_eq!(left(&same_boot, now), before - hour);
    assert_eq!(same_boot.held(), net.nodes[0].engine.held());
    assert!(same_boot.why(now, overlay(1).into(), 6, 22).allowed);
    assert!(same_boot.check_update(now, &net.snapshot(0, 0)).is_err(), "older ones stay refused");

    // The wall clock jumped by years while the machine was up: the boot clock counts.
    let jumped = Now { boot: net.now.boot + hour, unix: net.now.unix + 100_000 * hour };
    assert_eq!(left(&restart(&net, 0, 1, jumped, &saved).unwrap(), jumped), before - hour);

    // After a reboot the wall clock counts, and one that was set back wins nothing.
    let rebooted = Now { boot: Instant::ZERO + S, unix: net.now.unix + hour };
    assert_eq!(left(&restart(&net, 0, 2, rebooted, &saved).unwrap(), rebooted), before - hour);
    let set_back = Now { boot: Instant::ZERO + S, unix: net.now.unix - hour };
    assert_eq!(left(&restart(&net, 0, 2, set_back, &saved).unwrap(), set_back), before);
    let too_late = Now { boot: Instant::ZERO + S, unix: net.now.unix + 25 * hour };
    let mut ended = restart(&net, 0, 2, too_late, &saved).unwrap();
    assert_eq!(ended.status(too_late).lease, LeaseStatus::Ended);
    assert_eq!(ended.poll_event(), Some(Event::LeaseEnded));
    assert!(!ended.why(too_late, overlay(1).into(), 6, 22).allowed);
}

#[test]
fn a_damaged_or_foreign_file_is_refused() {
    let net = pair();
    let saved = net.nodes[0].engine.to_saved(net.now).unwrap();
    let bytes = saved.as_bytes();
    for at in (0..bytes.len()).step_by(7) {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 0x40;
        let error = restart(&net, 0, 1, net.now, &SavedNetmap::from_bytes(damaged)).unwrap_err();
        assert_eq!(error, RestoreError::Corrupt);
        let cut = SavedNetmap::from_bytes(bytes[..at].to_vec());
        assert_eq!(restart(&net, 0, 1, net.now, &cut).unwrap_err(), RestoreError::Corrupt);
    }
    assert_eq!(restart(&net, 1, 1, net.now, &saved).unwrap_err(), RestoreError::Foreign);
}

#[test]
fn traffic_survives_a_restart_of_one_agent() {
    let mut net = pair();
    let segment = connect(&mut net);
    let saved = net.nodes[0].engine.to_saved(net.now).unwrap();
    let now = net.now + 2 * S;
    net.run(2 * S);
    let mut fresh = restart(&net, 0, 1, now, &saved).unwrap();
    let local = warren_engine::io::LocalSocket { id: 0, addr: net.nodes[0].local };
    fresh.handle_interfaces(now, &[local]);
    fresh.handle_relay_state(now, crate::net::RELAY, true);
    net.nodes[0].engine = fresh;
    net.drain(0);
    let got = net.nodes[1].got.len();
    net.send_packet(0, &segment(0, 101, 501, TCP_ACK));
    net.run(2 * S);
    assert_eq!(net.nodes[1].got.len(), got + 1);
    assert!(resets(&net, 0).is_empty() && resets(&net, 1).is_empty());
    assert_eq!(net.path_kind(0, 1), "direct");
}

#[test]
fn whois_tells_applications_what_a_peer_may_do_as_long_as_the_policy_says_so() {
    let mut net = pair();
    let now = net.now.unix.as_secs();
    let grant = |id: u64, value: &str, from: u8| AppGrant {
        id: RuleId(id),
        name: "example.com/cap/edit".into(),
        src: vec![IpRange::from(IpAddr::from(overlay(from.into())))],
        dst: vec![IpRange::from(IpAddr::from(overlay(0)))],
        values: vec![value.into()],
        active: None,
    };
    let ending =
        AppGrant { active: Some(vec![UnixInterval { from: now, until: now + 60 }]), ..grant(2, "2", 1) };
    let other_family = AppGrant { dst: vec![IpRange::ALL_V6], ..grant(4, "4", 1) };
    net.netmaps[0].apps = [grant(1, r#"{"docs": ["a"]}"#, 1), ending, grant(3, "3", 7), other_family].into();
    net.push_netmap(0);
    let may = |net: &Net| {
        let who = net.nodes[0].engine.whois(net.now, overlay(1).into()).unwrap();
        serde_json::to_string(&who.capabilities).unwrap()
    };
    assert_eq!(may(&net), r#"{"example.com/cap/edit":[{"docs":["a"]},2]}"#);
    assert!(net.nodes[0].engine.whois(net.now, overlay(0).into()).unwrap().capabilities.is_empty());
    // The coordinator is gone: what has an end ends, and everything does with the lease.
    net.set_control(0, false);
    net.run(61 * S);
    assert_eq!(may(&net), r#"{"example.com/cap/edit":[{"docs":["a"]}]}"#);
    net.run(LEASE);
    assert!(net.nodes[0].engine.whois(net.now, overlay(1).into()).is_none(), "nobody is known any more");
}

#[test]
fn why_and_whois_name_what_decides() {
    let mut net = pair();
    let why = |net: &Net, dst: &str| net.nodes[0].engine.why(net.now, dst.parse().unwrap(), 6, 22);
    let allowed = why(&net, "100.64.0.2");
    assert!(allowed.allowed && allowed.text.contains("grants[101]"), "{}", allowed.text);
    assert_eq!(why(&net, "100.64.0.1").reason, "self");
    assert_eq!(why(&net, "100.64.0.9").reason, "not-visible");
    let unknown = net.nodes[0].engine.why_unknown(net.now, "db9");
    assert_eq!((unknown.allowed, unknown.reason), (false, "not-visible"));
    assert!(unknown.text.contains("`db9`") && unknown.text.contains("no policy rule"), "{}", unknown.text);
    net.netmaps[0].egress.clear();
    net.push_netmap(0);
    assert_eq!(why(&net, "100.64.0.2").reason, "no-rule");
    let who = net.nodes[0].engine.whois(net.now, overlay(1).into()).unwrap();
    assert_eq!(
        (who.id, who.name.as_deref(), who.is_self, who.exact),
        (device(1), Some("node-1"), false, true)
    );
    assert!(net.nodes[0].engine.whois(net.now, overlay(0).into()).unwrap().is_self);
    let status = serde_json::to_value(net.nodes[0].engine.status(net.now)).unwrap();
    assert_eq!(status["peers"][0]["path"]["kind"], "none");
    assert_eq!(status["self"]["name"], "node-0");
    net.set_control(0, false);
}
