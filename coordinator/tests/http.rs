//! The listener: TLS, bounds on connections that don't get anywhere, health and metrics.

mod support;

use std::sync::Arc;

use rustls::pki_types::ServerName;
use support::{Client, DeviceKeys, TestCoordinator, http_get};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Error;
use tokio_util::sync::CancellationToken;
use warren_common::ids::NetworkId;
use warren_common::keys::ControlSecretKey;
use warren_common::wire::control::RefusedCode;
use warren_coordinator::api::{self, Shared};
use warren_coordinator::policy_source::{Active, Source};
use warren_coordinator::relays::Relays;

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_served_with_the_given_certificate() {
    let made = rcgen::generate_simple_self_signed(vec!["c.example".into()]).unwrap();
    let coordinator = TestCoordinator::start_tls(&made.cert.pem(), &made.signing_key.serialize_pem()).await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(coordinator.addr).await.unwrap();
    let mut stream = connector.connect(ServerName::try_from("c.example").unwrap(), stream).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: c\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut response = String::new();
    // The end of a TLS stream may come without a goodbye; what was read counts.
    let _ = stream.read_to_string(&mut response).await;
    assert!(response.starts_with("HTTP/1.1 200") && response.ends_with("ok\n"), "{response}");
    // Without TLS there is nothing to hear.
    let plain = http_get(coordinator.addr, "/healthz").await;
    assert!(plain.is_none_or(|r| !r.starts_with("HTTP")));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_do_not_finish_their_handshake_are_bounded() {
    let coordinator = TestCoordinator::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (handle, stop) = (coordinator.dead_handle(), CancellationToken::new());
    let shared = Shared {
        handle,
        relays: Relays::new(None, 1),
        identity: vec![1, 2, 3],
        control_key: ControlSecretKey::from_bytes([1; 32]),
        network: NetworkId::from_bytes([1; 16]),
        half_open: Arc::new(Semaphore::new(2)),
        policy: Active::new(Source::Api, coordinator.dead_handle()),
        webhook: None,
        https: false,
        stop: stop.clone(),
    };
    let task = support::spawn(api::serve(listener, None, api::router(Arc::new(shared)), stop.clone()));
    let url = |path: &str| format!("ws://{addr}{path}");
    let first = connect_async(url("/control/v1")).await.unwrap();
    let _second = connect_async(url("/relay/v1")).await.unwrap();
    for path in ["/control/v1", "/relay/v1"] {
        let error = connect_async(url(path)).await.unwrap_err();
        assert!(matches!(&error, Error::Http(response) if response.status() == 503), "{error}");
    }
    drop(first);
    while connect_async(url("/control/v1")).await.is_err() {
        tokio::task::yield_now().await;
    }
    // A coordinator that has stopped says so.
    assert!(http_get(addr, "/healthz").await.unwrap().starts_with("HTTP/1.1 503"));
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_and_name_nobody() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key().await;
    let _client = Client::join(coordinator.addr, &key, 1, "secret-name").await;
    let mut stranger = Client::connect(coordinator.addr, &key.root, &DeviceKeys::new(2)).await.unwrap();
    assert_eq!(stranger.enroll(&key, "x").await.unwrap_err().code, RefusedCode::AuthKeyUsed.as_str());
    let text = http_get(coordinator.addr, "/metrics").await.unwrap();
    for line in [
        "warren_devices 1",
        "warren_devices_online 1",
        "warren_snapshots_total 1",
        "warren_refused_total 1",
        "warren_store_up 1",
        "warren_relays_joined 0",
        "warren_policy_source_up 1",
        "warren_agents_ahead_total 0",
        "# TYPE warren_snapshots_total counter",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing:\n{text}");
    }
    assert!(!text.contains("secret-name"));
    assert!(http_get(coordinator.addr, "/nothing").await.unwrap().starts_with("HTTP/1.1 404"));
}
