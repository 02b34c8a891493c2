//! What others can make grow, at its bound: the next one is refused, and nobody else notices.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

mod support;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use support::repo::Repo;
use support::{TestCoordinator, http_get, http_send};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use warren_common::auth_key::{AuthKey, AuthKeySecret};
use warren_common::ids::{ApiTokenId, AuthKeyId, DeviceId, NetworkId, UserId};
use warren_common::keys::{ControlPublicKey, Fingerprint, ProbePublicKey, WgPublicKey};
use warren_common::time::UnixTime;
use warren_coordinator::admin::{Call, MAX_ADMIN_CONNECTIONS, MAX_CALL, socket_path};
use warren_coordinator::api::{MAX_FRAME, MAX_WEBHOOKS};
use warren_coordinator::domain::{
    ApiTokenRecord, AuthKeyRecord, Change, Command, Device, EnrollRequest, Generation, MAX_API_TOKENS,
    MAX_AUTH_KEYS, MAX_DEVICES, MAX_USERS, NewApiToken, NewAuthKey, Refusal, Settings, State, User,
};
use warren_coordinator::policy_source::Source;
use warren_coordinator::policy_source::git::{GitOptions, Signatures};

const NOW: UnixTime = UnixTime::from_secs(1_000_000_000);

fn state() -> State {
    State::new(Settings {
        network: NetworkId::from_bytes([1; 16]),
        name: "test".into(),
        root: Fingerprint::from_bytes([2; 32]),
        ipv4: "100.64.0.0/10".parse().unwrap(),
        ipv6: "fd00::/48".parse().unwrap(),
        epoch: 1,
        revisions_reserved: 0,
    })
}

fn bytes<const N: usize>(n: usize) -> [u8; N] {
    let mut out = [0; N];
    out[..8].copy_from_slice(&(n as u64).to_be_bytes());
    out
}

fn later() -> UnixTime {
    NOW + Duration::from_secs(60)
}

fn refused(state: &State, command: &Command) -> Option<usize> {
    match state.apply(command, NOW, &mut ChaCha20Rng::seed_from_u64(1)) {
        Err(Refusal::TooMany { max, .. }) => Some(max),
        other => panic!("{other:?}"),
    }
}

#[test]
fn keys_tokens_and_users_are_bounded() {
    let mut state = state();
    for n in 0..MAX_AUTH_KEYS {
        state.absorb(Change::PutAuthKey(Box::new(auth_key_record(n, [0; 32]))));
    }
    assert_eq!(refused(&state, &Command::CreateAuthKey(NewAuthKey::default())), Some(MAX_AUTH_KEYS));
    for n in 0..MAX_API_TOKENS {
        state.absorb(Change::PutApiToken(Box::new(ApiTokenRecord {
            id: ApiTokenId::from_bytes(bytes(n)),
            name: n.to_string(),
            hash: [0; 32],
            write: false,
            created: NOW,
            expires: later(),
        })));
    }
    let new = NewApiToken { name: "one more".into(), ..NewApiToken::default() };
    assert_eq!(refused(&state, &Command::CreateApiToken(new)), Some(MAX_API_TOKENS));
    for n in 0..MAX_USERS {
        state.absorb(Change::PutUser(User {
            id: UserId::from_bytes(bytes(n)),
            email: format!("{n}@example.com"),
            suspended: false,
            created: NOW,
        }));
    }
    assert_eq!(refused(&state, &Command::CreateUser("one@more.org".into())), Some(MAX_USERS));
}

fn auth_key_record(n: usize, hash: [u8; 32]) -> AuthKeyRecord {
    AuthKeyRecord {
        id: AuthKeyId::from_bytes(bytes(n)),
        hash,
        tags: Vec::new(),
        user: None,
        reusable: true,
        ephemeral: false,
        created: NOW,
        expires: later(),
        used_by: None,
    }
}

#[test]
fn devices_are_bounded() {
    let mut state = state();
    let secret = AuthKeySecret::generate(&mut ChaCha20Rng::seed_from_u64(1));
    state.absorb(Change::PutAuthKey(Box::new(auth_key_record(0, secret.hash()))));
    for n in 0..MAX_DEVICES {
        state.absorb(Change::PutDevice(Box::new(Device {
            id: DeviceId::from_bytes(bytes(n)),
            control: ControlPublicKey::from_bytes(bytes(n)),
            wg: WgPublicKey::from_bytes(bytes(n)),
            probe: ProbePublicKey::from_bytes(bytes(n)),
            name: format!("d{n}"),
            hostname: "d".into(),
            ipv4: u32::try_from(n).unwrap().into(),
            ipv6: (n as u128).into(),
            user: None,
            tags: Vec::new(),
            ephemeral: false,
            approved: true,
            expired: false,
            copied: false,
            generation: Generation { current: 1, pending: None, confirmed: true },
            auth_key: AuthKeyId::from_bytes(bytes(0)),
            os: String::new(),
            version: String::new(),
            created: NOW,
            home_relay: None,
            routes: Vec::new(),
            relay: None,
        })));
    }
    let request = EnrollRequest {
        control: ControlPublicKey::from_bytes([0xff; 32]),
        wg: WgPublicKey::from_bytes([0xff; 32]),
        probe: ProbePublicKey::from_bytes([0xff; 32]),
        auth_key: AuthKey {
            network: state.settings().network,
            root: state.settings().root,
            id: AuthKeyId::from_bytes(bytes(0)),
            secret,
        },
        hostname: "one-more".into(),
        os: String::new(),
        version: String::new(),
    };
    assert_eq!(refused(&state, &Command::Enroll(Box::new(request))), Some(MAX_DEVICES));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_socket_takes_so_many_callers_and_so_long_calls() {
    let coordinator = TestCoordinator::start().await;
    let path = socket_path(&coordinator.state_dir());
    let mut idle: Vec<UnixStream> =
        (0..MAX_ADMIN_CONNECTIONS).map(|_| UnixStream::connect(&path).unwrap()).collect();
    // One more is hung up on: nothing comes but the end.
    let mut more = UnixStream::connect(&path).unwrap();
    more.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut answer = Vec::new();
    let _ = more.write_all(b"{\"verb\": \"health\"}\n");
    // A reset is an end as well.
    let _ = more.read_to_end(&mut answer);
    assert!(answer.is_empty());
    idle.clear();
    support::process::until(|| async { coordinator.call(Call::Health).await.is_ok() }).await;

    let path = path.clone();
    let long = tokio::task::spawn_blocking(move || {
        let mut stream = UnixStream::connect(&path).unwrap();
        let chunk = vec![b' '; 1 << 20];
        let mut sent = 0;
        while sent <= MAX_CALL && stream.write_all(&chunk).is_ok() {
            sent += chunk.len() as u64;
        }
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    });
    let answer = long.await.unwrap();
    assert!(answer.is_empty() || answer.contains("makes no sense"), "{answer}");
    assert!(coordinator.call(Call::Health).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_too_long_ends_its_connection_only() {
    let coordinator = TestCoordinator::start().await;
    for path in ["/control/v1", "/relay/v1"] {
        let (mut socket, _) = connect_async(format!("ws://{}{path}", coordinator.addr)).await.unwrap();
        socket.next().await.unwrap().unwrap(); // the identity
        let _ = socket.send(Message::Binary(vec![0; MAX_FRAME + 1].into())).await;
        let ends = async {
            while let Some(Ok(message)) = socket.next().await {
                assert!(!message.is_binary(), "{message:?}");
            }
        };
        tokio::time::timeout(support::PATIENCE, ends).await.unwrap();
    }
    assert!(http_get(coordinator.addr, "/healthz").await.unwrap().ends_with("ok\n"));
}

fn git(repo: &Repo) -> GitOptions {
    GitOptions {
        url: repo.path().to_str().unwrap().parse().unwrap(),
        branch: "main".parse().unwrap(),
        path: "policy.hujson".parse().unwrap(),
        poll: Duration::from_secs(1),
        signatures: Signatures::Required,
        allowed_signers: Some(repo.signers_path()),
        allow_rewrite: false,
        webhook_secret: None,
        token: None,
        ssh_key: None,
        known_hosts: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_are_read_a_few_at_a_time() {
    let repo = Repo::new();
    repo.allow(&[]);
    repo.commit("{}", None);
    let secret = repo.path().with_extension("secret");
    std::fs::write(&secret, "secret").unwrap();
    let mut options = git(&repo);
    options.webhook_secret = Some(secret);
    let coordinator = TestCoordinator::start_with(|o| o.policy = Source::Git(Box::new(options))).await;
    let path = "/api/v1/policy/webhook";
    let mut slow = Vec::new();
    for _ in 0..MAX_WEBHOOKS {
        let mut stream = TcpStream::connect(coordinator.addr).await.unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nslow");
        stream.write_all(head.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    let hook =
        async || http_send(coordinator.addr, "POST", path, &[("x-gitlab-token", "secret")], "{}").await;
    support::process::until(|| async { hook().await.starts_with("HTTP/1.1 503") }).await;
    slow.pop();
    support::process::until(|| async { hook().await.starts_with("HTTP/1.1 202") }).await;
}
