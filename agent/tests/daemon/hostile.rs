//! A coordinator that lies: it holds the network's keys, or some of them, and gives the agent a netmap that it must not
//! take, to begin with, in the middle of a session, and after a restart.

use serde_json::Value;
use warren_agent::entropy::OsEntropy;
use warren_common::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId};
use warren_common::ids::{DeviceId, NetworkId};
use warren_common::keys::{ControlSecretKey, NetmapSecretKey};
use warren_common::netmap::Netmap;
use warren_common::wire::control::{NetmapUpdate, Signed, UpdateKind};

use crate::fake::Fake;
use crate::{World, in_world, wait};

const HELD: u64 = 7;
const EPOCH: u64 = 2;

/// Updates that must be refused by an agent which holds revision [`HELD`] of [`EPOCH`], and a word of the reason. Each
/// would open the agent to everybody.
fn lies(fake: &Fake) -> Vec<(&'static str, Signed, &'static str)> {
    let open = open_to_everybody(fake.with(|w| w.netmap.clone()));
    let update = || fake.update(HELD + 1, open.clone());
    let with = |change: &dyn Fn(&mut NetmapUpdate)| {
        let mut update = update();
        change(&mut update);
        fake.sign(&update)
    };
    let mut unsigned = fake.sign(&update());
    unsigned.signature.clear();
    let mut tampered = fake.sign(&update());
    *tampered.payload.last_mut().unwrap() ^= 1;
    let mut others = open.clone();
    others.device.id = DeviceId::from_bytes([6; 16]);
    vec![
        ("unsigned", unsigned, "not signed"),
        ("tampered with", tampered, "not signed"),
        ("signed by a stranger", update().sign(&NetmapSecretKey::generate(&mut OsEntropy)), "not signed"),
        ("older", with(&|u| u.to = HELD - 1), "revision"),
        ("forked: the same revision, other contents", with(&|u| u.to = HELD), "revision"),
        ("of an older epoch", with(&|u| u.epoch = EPOCH - 1), "epoch"),
        ("of an epoch that the root key did not sign", with(&|u| u.epoch = EPOCH + 1), "epoch"),
        ("for another device", with(&|u| u.device = others.device.id), "device"),
        (
            "for another key of this device",
            with(&|u| u.device_key = ControlSecretKey::generate(&mut OsEntropy).public()),
            "device",
        ),
        (
            "for this device, with another's netmap in it",
            with(&|u| {
                u.hash = others.hash();
                u.kind = UpdateKind::Snapshot(Box::new(others.clone()));
            }),
            "device",
        ),
        ("for another network", with(&|u| u.network = NetworkId::from_bytes([8; 16])), "network"),
        ("not what its hash says", with(&|u| u.hash = [1; 32]), "netmap it was made for"),
        ("with a lease of a year", with(&|u| u.lease_ms = 365 * 86_400_000), "lease"),
    ]
}

fn open_to_everybody(mut netmap: Netmap) -> Netmap {
    let all = || IpRange::from(std::net::IpAddr::from([100, 64, 0, 2]));
    let rule = FilterRule {
        id: RuleId(1),
        origin: "nowhere".into(),
        action: Action::Allow,
        staged: false,
        src: vec![all()],
        dst: vec![FilterDst {
            net: IpRange::from(std::net::IpAddr::from([100, 64, 0, 1])),
            ports: PortRange::ALL,
        }],
        protos: Vec::new(),
        active: None,
    };
    netmap.ingress.insert(rule);
    netmap
}

impl World {
    /// Tells every lie in the session that stands; each is refused by its reason and changes nothing.
    async fn hears_lies(&self) {
        for (what, lie, reason) in lies(&self.fake) {
            let before = self.fake.acks().len();
            self.fake.push(lie);
            wait(|| self.fake.acks().len() > before).await;
            let ack = self.fake.acks().pop().unwrap();
            assert!(ack.reason.contains(reason), "{what}: {ack:?}");
            assert_eq!((ack.epoch, ack.revision), (EPOCH, HELD), "{what}");
            assert_eq!(self.incoming().await, "no-rule", "{what}");
        }
    }

    /// What the agent says about connections from its peer.
    async fn incoming(&self) -> Value {
        let output = self.warren(&["why", "db1:22", "--json"]).await;
        let why: Value = serde_json::from_str(&output.stdout).unwrap();
        why["filter"]["ingress"]["outcome"].clone()
    }

    async fn rejoined(&self, acks: usize) {
        wait(|| self.fake.acks().len() > acks).await;
        assert_eq!(self.status().await["coordinator"]["connected"], true);
    }
}

#[test]
fn no_false_netmap_is_taken_in_a_session_or_after_a_restart() {
    in_world(async |mut world| {
        world.fake.with(|w| (w.epoch, w.revision) = (EPOCH, HELD));
        world.join().await;
        world.rejoined(0).await;
        world.hears_lies().await;
        // What it has persisted counts after a restart, also a sudden one.
        let acks = world.fake.acks().len();
        world.end(libc::SIGKILL).await;
        world.start().await;
        world.rejoined(acks).await;
        world.hears_lies().await;
        // The truth is taken by the same session.
        world.fake.with(|w| w.netmap = open_to_everybody(w.netmap.clone()));
        world.fake.push(world.fake.snapshot(HELD + 1));
        wait(|| world.fake.acks().iter().any(|a| a.revision == HELD + 1)).await;
        assert_eq!(world.incoming().await, "allowed");
    });
}

#[test]
fn a_first_netmap_is_judged_like_any_other() {
    in_world(async |mut world| {
        // The first update of the session is not this network's: the agent asks for nothing and stays without.
        world.fake.with(|w| w.signer = Some(NetmapSecretKey::generate(&mut OsEntropy)));
        world.start().await;
        let key = world.fake.auth_key();
        let output =
            world.warren(&["up", "--coordinator", &world.url, "--auth-key", &key, "--timeout", "2s"]).await;
        assert_eq!(output.code, 1, "{}", output.stderr);
        let ack = world.fake.acks().pop().unwrap();
        assert!(ack.revision == 0 && ack.reason.contains("not signed"), "{ack:?}");
        let status = world.status().await;
        assert_eq!((&status["self"], status["peers"].as_array().unwrap().len()), (&Value::Null, 0));
    });
}

#[test]
fn an_older_epoch_is_refused_after_a_restart_and_a_signed_newer_one_numbers_anew() {
    in_world(async |mut world| {
        world.fake.with(|w| (w.epoch, w.revision) = (EPOCH, HELD));
        world.join().await;
        world.rejoined(0).await;
        world.end(libc::SIGKILL).await;
        // The coordinator runs on an old backup: its identity says so, before the agent says anything.
        world.fake.with(|w| {
            (w.epoch, w.revision) = (EPOCH - 1, HELD + 100);
            w.heard.clear();
        });
        world.start().await;
        world.health("coordinator-restored").await;
        assert!(world.fake.with(|w| w.heard.is_empty()));
        assert_eq!(world.status().await["coordinator"]["revision"], HELD);
        world.end(libc::SIGKILL).await;
        // An administrator restored it by the book: the root key vouches for the next epoch.
        world.fake.with(|w| (w.epoch, w.revision) = (EPOCH + 1, 1));
        world.start().await;
        wait(|| world.fake.acks().iter().any(|a| (a.epoch, a.revision) == (EPOCH + 1, 1))).await;
        assert_eq!(world.status().await["coordinator"]["revision"], 1);
        // And what was signed before is of no use any more.
        let before = world.fake.acks().len();
        let mut left_behind = world.fake.update(HELD + 200, world.fake.with(|w| w.netmap.clone()));
        left_behind.epoch = EPOCH;
        world.fake.push(world.fake.sign(&left_behind));
        wait(|| world.fake.acks().len() > before).await;
        assert!(world.fake.acks().pop().unwrap().reason.contains("epoch"));
    });
}
