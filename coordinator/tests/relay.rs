//! Relays: the embedded one is in the netmaps and hears of revocations; others join with a one-use key.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper fails by panicking")]

mod support;

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use support::{Client, TestCoordinator};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use warren_common::keys::ControlSecretKey;
use warren_common::wire::control::{ClientBody, CoordinatorIdentity, RelayTokenRequest, ServerBody, Signed};
use warren_common::wire::relay_control::{
    RelayBody, RelayHello, RelayJoinKey, RelayMessage, RelayReport, RelayServerBody, RelayServerMessage,
};
use warren_common::wire::session::{ClientHandshake, Session};
use warren_common::wire::token::RelayToken;
use warren_coordinator::admin::Call;
use warren_coordinator::embedded_relay::RelayListen;

const ALL: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_relay_is_in_the_netmap_and_tokens_name_the_peers() {
    let listen = RelayListen { relay: support::free_addr(), stun: support::free_addr(), stun_second: None };
    let coordinator = TestCoordinator::start_with(|o| o.relay = Some(listen)).await;
    coordinator.set_policy(ALL).await;
    let mut one = Client::join(coordinator.addr, &coordinator.auth_key().await, 1, "one").await;
    let relay = one.netmap().relays.values().next().unwrap().clone();
    assert_eq!(
        (relay.name.as_str(), &relay.addrs, &relay.stun),
        ("embedded", &vec![listen.relay], &vec![listen.stun])
    );
    tokio::net::TcpStream::connect(relay.addrs[0]).await.expect("it listens there");
    let two = Client::join(coordinator.addr, &coordinator.auth_key().await, 2, "two").await;
    one.until(|n| n.peers.len() == 1).await;

    let request = ClientBody::RelayToken(RelayTokenRequest { relay: relay.id.to_bytes().to_vec() });
    one.send(request).await;
    let token = next_token(&mut one).await;
    assert_eq!((token.device, token.relay, token.probe), (one.id(), relay.id, one.keys.probe.public()));
    assert_eq!(token.peers, [two.id()]);
    // When it loses a peer it gets a newer token without asking, since the relay refuses the old one from now on.
    coordinator.call(Call::DeviceRemove { device: "two".into() }).await.unwrap();
    let newer = next_token(&mut one).await;
    assert!(newer.revision > token.revision && newer.peers.is_empty());
    let metrics = support::http_get(coordinator.addr, "/metrics").await.unwrap();
    for line in [
        "# TYPE warren_relay_clients gauge",
        "warren_relay_clients 0",
        "warren_relay_dropped_total{reason=\"not-permitted\"} 0",
        "warren_relay_closed_total{reason=\"possession\"} 0",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is missing in {metrics}");
    }
    let list = coordinator.call(Call::RelayList).await.unwrap();
    assert_eq!((&list[0]["embedded"], &list[0]["joined"]), (&true.into(), &true.into()));
}

async fn next_token(client: &mut Client) -> RelayToken {
    loop {
        match client.next_other().await.expect("the session is open") {
            ServerBody::RelayToken(grant) => {
                return RelayToken::verify(&grant.token.unwrap(), &client.identity.netmap).unwrap();
            }
            ServerBody::Presence(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

struct Relay {
    socket: tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>,
    session: Session,
}

impl Relay {
    async fn connect(coordinator: &TestCoordinator, key: &RelayJoinKey, secret: &ControlSecretKey) -> Self {
        let (mut socket, _) = connect_async(format!("ws://{}/relay/v1", coordinator.addr)).await.unwrap();
        let identity = socket.next().await.unwrap().unwrap().into_data();
        let identity = CoordinatorIdentity::verify(&Signed::decode(identity).unwrap(), &key.root).unwrap();
        let mut rng = ChaCha20Rng::seed_from_u64(9);
        let (handshake, hello) =
            ClientHandshake::start(secret, &identity.control, identity.network, &mut rng).unwrap();
        socket.send(Message::Binary(hello.into())).await.unwrap();
        let answer = socket.next().await.unwrap().unwrap().into_data();
        Self { session: handshake.finish(&answer).unwrap(), socket }
    }

    async fn send(&mut self, body: RelayBody) {
        let message = RelayMessage { body: Some(body) }.encode_to_vec();
        for frame in self.session.seal(&message).unwrap() {
            self.socket.send(Message::Binary(frame.into())).await.unwrap();
        }
    }

    async fn next(&mut self) -> RelayServerBody {
        loop {
            let message = tokio::time::timeout(support::PATIENCE, self.socket.next()).await.unwrap();
            if let Message::Binary(frame) = message.unwrap().unwrap()
                && let Some(message) = self.session.open(&frame).unwrap()
            {
                return RelayServerMessage::decode(message.as_slice()).unwrap().body.unwrap();
            }
        }
    }

    async fn hello(&mut self, key: &RelayJoinKey, secret: bool, revision: u64) -> RelayServerBody {
        self.send(RelayBody::Hello(RelayHello {
            relay: key.relay.to_bytes().to_vec(),
            secret: if secret { key.secret.expose().to_vec() } else { Vec::new() },
            version: "test".into(),
            revision,
        }))
        .await;
        self.next().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_joins_once_and_hears_of_changes() {
    let coordinator = TestCoordinator::start().await;
    coordinator.set_policy(ALL).await;
    let mut one = Client::join(coordinator.addr, &coordinator.auth_key().await, 1, "one").await;
    let made = coordinator.call(Call::RelayCreate { name: "fra1".into() }).await.unwrap();
    let key: RelayJoinKey = made["join_key"].as_str().unwrap().parse().unwrap();
    let again = coordinator.call(Call::RelayCreate { name: "fra1".into() }).await.unwrap_err();
    assert!(again.text.contains("exists already"));

    let secret = ControlSecretKey::from_bytes([1; 32]);
    let mut relay = Relay::connect(&coordinator, &key, &secret).await;
    let RelayServerBody::Welcome(welcome) = relay.hello(&key, true, 0).await else { panic!() };
    assert_eq!(welcome.name, "fra1");
    assert!(welcome.floor > 0);
    // Not in a netmap before it has said where it is.
    let report = RelayReport {
        addrs: vec![],
        stun: vec![],
        cert_sha256: vec![5; 32],
        port: 443,
        stun_port: 3478,
        draining: false,
    };
    relay.send(RelayBody::Report(report.clone())).await;
    one.until(|n| n.relays.len() == 1).await;
    let seen = &one.netmap().relays[&key.relay];
    assert_eq!(seen.addrs, ["127.0.0.1:443".parse().unwrap()]);
    assert_eq!(seen.stun, ["127.0.0.1:3478".parse().unwrap()]);

    // Another relay can't use the key again; the first may, after a lost reply, and without the secret.
    let mut thief = Relay::connect(&coordinator, &key, &ControlSecretKey::from_bytes([2; 32])).await;
    assert!(matches!(thief.hello(&key, true, 0).await, RelayServerBody::Refused(_)));
    let two = Client::join(coordinator.addr, &coordinator.auth_key().await, 2, "two").await;
    one.until(|n| n.peers.len() == 1).await;
    coordinator.call(Call::DeviceRemove { device: "two".into() }).await.unwrap();
    let RelayServerBody::Command(command) = relay.next().await else { panic!() };
    assert_eq!(command.revoked, [two.id().to_bytes().to_vec()]);
    assert_eq!(command.minimums[0].device, one.id().to_bytes().to_vec());
    drop(relay);
    let mut relay = Relay::connect(&coordinator, &key, &secret).await;
    let RelayServerBody::Welcome(welcome) = relay.hello(&key, false, command.revision).await else {
        panic!()
    };
    assert_eq!(welcome.floor, 0, "it missed nothing");

    // Draining takes it out of the netmaps, removal ends its session.
    relay.send(RelayBody::Report(RelayReport { draining: true, ..report })).await;
    one.until(|n| n.relays.is_empty()).await;
    coordinator.call(Call::RelayRemove { relay: "fra1".into() }).await.unwrap();
    let closed =
        async { while let Some(Ok(Message::Binary(_) | Message::Ping(_))) = relay.socket.next().await {} };
    tokio::time::timeout(support::PATIENCE, closed).await.unwrap();
}
