//! The control protocol over a real WebSocket.

mod support;

use std::time::Duration;

use support::{Client, DeviceKeys, TestCoordinator};
use warren_common::auth_key::AuthKey;
use warren_common::wire::control::{Ack, ClientBody, Ping, ServerBody, UpdateKind};
use warren_coordinator::admin::Call;

#[tokio::test(flavor = "multi_thread")]
async fn first_contact_ends_in_a_signed_snapshot() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let mut client = Client::connect(coordinator.addr, &key.root, &DeviceKeys::new(1)).await.unwrap();
    let welcome = client.enroll(&key, "Ann's Laptop").await.unwrap();
    assert!(welcome.generation != 0 && welcome.unix_us > 0);
    client.confirm(&welcome).await;
    let update = client.next_update().await;
    assert!(matches!(update.kind, UpdateKind::Snapshot(_)));
    assert_eq!(update.lease_ms, 3_600_000);
    let netmap = client.netmap();
    assert_eq!(netmap.network.id, key.network);
    assert_eq!(netmap.device.name, "ann-s-laptop");
    assert_eq!(netmap.device.addrs.len(), 2);
    assert!(netmap.peers.is_empty() && netmap.ingress.is_empty() && netmap.egress.is_empty());
    let devices = coordinator.devices().await;
    assert_eq!(
        (devices[0]["name"].as_str(), devices[0]["online"].as_bool()),
        (Some("ann-s-laptop"), Some(true))
    );
    client.send(ClientBody::Ping(Ping { nonce: 7 })).await;
    assert!(matches!(client.next_other().await, Some(ServerBody::Pong(pong)) if pong.nonce == 7));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_is_called_what_it_is_told_and_devices_hear_of_it() {
    let mut coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let client = Client::join(coordinator.addr, &key, 1, "a").await;
    assert_eq!(client.identity.network_name, "127.0.0.1", "the host of the public URL");
    let mut disk = client.close().await;
    for name in [Some("Acme Ltd"), None] {
        coordinator.restart_with(|o| o.network_name = name.map(|n| n.parse().unwrap())).await;
        let mut client = Client::connect(coordinator.addr, &key.root, &DeviceKeys::new(1)).await.unwrap();
        assert_eq!(client.identity.network_name, "Acme Ltd", "and it stays so");
        let welcome = client.resume(disk).await.unwrap();
        client.confirm(&welcome).await;
        client.until(|netmap| netmap.network.name == "Acme Ltd").await;
        disk = client.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_coordinator_or_network_is_refused_by_the_agent_before_it_says_anything() {
    let (one, two) = (TestCoordinator::start().await, TestCoordinator::start().await);
    let key = one.auth_key().await;
    let error = Client::connect(two.addr, &key.root, &DeviceKeys::new(1)).await.err().unwrap();
    assert!(error.contains("signature"), "{error}");
    // Even if the agent went on, the other network would not know the key.
    let root = two.auth_key().await.root;
    let mut client = Client::connect(two.addr, &root, &DeviceKeys::new(1)).await.unwrap();
    let refused = client.enroll(&key, "x").await.unwrap_err();
    assert_eq!(refused.code, "auth-key-invalid");
    assert!(client.next().await.is_none(), "the session is closed");
    assert!(two.devices().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_and_an_unknown_key_look_the_same() {
    let coordinator = TestCoordinator::start().await;
    let (key, other) = (coordinator.auth_key().await, coordinator.auth_key().await);
    let forged = [
        AuthKey { secret: other.secret.clone(), ..key.clone() },
        AuthKey { id: warren_common::ids::AuthKeyId::from_bytes([1; 16]), ..key.clone() },
    ];
    for (seed, forged) in forged.iter().enumerate() {
        let keys = DeviceKeys::new(seed as u64);
        let mut client = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
        let refused = client.enroll(forged, "x").await.unwrap_err();
        assert_eq!(refused.code, "auth-key-invalid");
        assert!(refused.fix.contains("auth-key create"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_one_use_key_makes_one_device() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let mut client = Client::join(coordinator.addr, &key, 1, "one").await;
    let mut second = Client::connect(coordinator.addr, &key.root, &DeviceKeys::new(2)).await.unwrap();
    let refused = second.enroll(&key, "two").await.unwrap_err();
    assert_eq!(refused.code, "auth-key-used");
    assert_eq!(coordinator.devices().await.len(), 1);
    // The first is not disturbed.
    client.send(ClientBody::Ping(Ping { nonce: 1 })).await;
    assert!(matches!(client.next_other().await, Some(ServerBody::Pong(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_says_so() {
    let coordinator = TestCoordinator::start().await;
    let call =
        Call::AuthKeyCreate { tags: vec![], user: None, reusable: true, ephemeral: false, life_s: Some(1) };
    let key: AuthKey = coordinator.call(call).await.unwrap()["key"].as_str().unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let mut client = Client::connect(coordinator.addr, &key.root, &DeviceKeys::new(1)).await.unwrap();
    assert_eq!(client.enroll(&key, "late").await.unwrap_err().code, "auth-key-expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_uses_of_a_one_use_key_make_one_device() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let (addr, root) = (coordinator.addr, key.root);
    let tries: Vec<_> = (0..16)
        .map(|seed| {
            let key = key.clone();
            support::spawn(async move {
                let mut client = Client::connect(addr, &root, &DeviceKeys::new(seed)).await.unwrap();
                client.enroll(&key, "racer").await.map_err(|r| r.code)
            })
        })
        .collect();
    let mut welcomed = 0;
    for attempt in tries {
        match attempt.await.unwrap() {
            Ok(_) => welcomed += 1,
            Err(code) => assert_eq!(code, "auth-key-used"),
        }
    }
    assert_eq!((welcomed, coordinator.devices().await.len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_burns_nothing() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let keys = DeviceKeys::new(1);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
        ids.push(client.enroll(&key, "retry").await.unwrap().device);
        // The agent dies before it has persisted or confirmed anything.
    }
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(coordinator.devices().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn resuming_an_unchanged_netmap_costs_a_lease() {
    let mut coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let keys = DeviceKeys::new(1);
    let disk = Client::join(coordinator.addr, &key, 1, "a").await.close().await;
    let mut client = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    let welcome = client.resume(disk.clone()).await.unwrap();
    assert_ne!(welcome.generation, disk.generation);
    client.confirm(&welcome).await;
    let update = client.next_update().await;
    assert!(matches!(update.kind, UpdateKind::Lease), "{update:?}");
    let disk = client.close().await;

    // Also after a restart of the coordinator, which must not use a revision again.
    coordinator.restart().await;
    let mut client = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    let welcome = client.resume(disk.clone()).await.unwrap();
    client.confirm(&welcome).await;
    assert!(matches!(client.next_update().await.kind, UpdateKind::Lease));

    // And an agent that lost its netmap gets a snapshot under a newer number.
    let mut disk = client.close().await;
    disk.netmap = None;
    let revision = disk.revision;
    let mut client = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    client.resume(disk).await.unwrap();
    let update = client.next_update().await;
    assert!(matches!(update.kind, UpdateKind::Snapshot(_)) && update.to > revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_state_directory_puts_both_in_needs_login() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let keys = DeviceKeys::new(1);
    let copy = Client::join(coordinator.addr, &key, 1, "a").await.close().await;
    let mut original = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    let welcome = original.resume(copy.clone()).await.unwrap();
    original.confirm(&welcome).await;
    original.next_update().await;
    // The copy comes with the generation that the original has left behind.
    let mut clone = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    assert_eq!(clone.resume(copy).await.unwrap_err().code, "copied-state");
    let farewell = original.next_other().await;
    assert!(matches!(&farewell, Some(ServerBody::Refused(r)) if r.code == "copied-state"), "{farewell:?}");
    let disk = original.close().await;
    let mut again = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    assert_eq!(again.resume(disk).await.unwrap_err().code, "copied-state");
    assert_eq!(coordinator.devices().await[0]["state"], "needs-login");
    // The key that let it in doesn't heal it; a new one does.
    let mut old_key = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    assert_eq!(old_key.enroll(&key, "a").await.unwrap_err().code, "auth-key-used");
    let fresh = coordinator.auth_key().await;
    Client::join(coordinator.addr, &fresh, 1, "a").await;
    assert_eq!(coordinator.devices().await[0]["state"], "active");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_can_make_the_coordinator_buffer_no_more_than_a_stranger_can() {
    let coordinator = TestCoordinator::start().await;
    let mut hostile = Client::join(coordinator.addr, &coordinator.auth_key().await, 1, "a").await;
    let mut other = Client::join(coordinator.addr, &coordinator.auth_key().await, 2, "b").await;
    let reason = "x".repeat(2 * warren_common::wire::session::MAX_MESSAGE_UNTRUSTED);
    hostile.send(ClientBody::Ack(Ack { epoch: 1, revision: 1, want_snapshot: true, reason })).await;
    while hostile.next().await.is_some() {}
    other.send(ClientBody::Ping(Ping { nonce: 1 })).await;
    assert!(matches!(other.next_other().await, Some(ServerBody::Pong(_) | ServerBody::Presence(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_ends_the_session_and_logout_removes() {
    let coordinator = TestCoordinator::start().await;
    let mut one = Client::join(coordinator.addr, &coordinator.auth_key().await, 1, "one").await;
    let mut two = Client::join(coordinator.addr, &coordinator.auth_key().await, 2, "two").await;
    coordinator.call(Call::DeviceRemove { device: "one".into() }).await.unwrap();
    assert!(matches!(one.next_other().await, Some(ServerBody::Refused(r)) if r.code == "unknown-device"));
    assert!(one.next().await.is_none());
    two.send(ClientBody::Logout(warren_common::wire::control::Empty {})).await;
    assert!(matches!(two.next_other().await, Some(ServerBody::Refused(r)) if r.code == "unknown-device"));
    assert!(coordinator.devices().await.is_empty());
}
