//! A device without an auth key meets a coordinator: it learns who is there, gives nothing away and is told what to do.

use std::sync::Arc;

use rustls::pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;

use super::*;

#[test]
fn plain_http_proves_nothing_and_a_fingerprint_does() {
    in_world(async |mut world| {
        world.start().await;
        let up =
            async |more: &[&str]| world.warren(&[&["up", "--coordinator", &world.url], more].concat()).await;
        up(&[]).await.failed(2, "nothing proves who answers");
        up(&["--coordinator-fingerprint", "sha256:x"]).await.failed(2, "fingerprint");
        let other = Fake::new().fingerprint();
        up(&["--coordinator-fingerprint", &other]).await.failed(1, "is not the expected one");
        let right = world.fake.fingerprint();
        let output = up(&["--coordinator-fingerprint", &right]).await;
        output.failed(1, "not enrolled in the network `acme`");
        assert!(output.stderr.contains("warren-coordinator auth-key create"), "{}", output.stderr);
        world.warren(&["up"]).await.failed(1, "it needs an auth key");
        assert_eq!(world.status().await["state"], "needs-login");
        assert!(world.fake.with(|w| w.heard.is_empty()));
        // Nobody there, or somebody who says nothing: it never hangs.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let args = ["up", "--coordinator", &url, "--coordinator-fingerprint", &right, "--timeout", "500ms"];
        world.warren(&args).await.failed(1, "nobody has answered at");
        drop(silent);
        world.warren(&args).await.failed(1, "can't be reached");
        // And with a key it joins.
        assert_eq!(world.up(&world.fake.auth_key()).await.code, 0);
    });
}

#[test]
fn https_counts_if_its_certificate_is_verified() {
    in_world(async |mut world| {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let roots = world.dir.path().join("roots.pem");
        std::fs::write(&roots, made.cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let fake = world.fake.clone();
        let mut server = tokio::task::JoinSet::new();
        server.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(stream).await {
                    fake.session(stream).await;
                }
            }
        });

        world.start().await;
        world.warren(&["up", "--coordinator", &url]).await.failed(1, "has no valid certificate");
        world.end(libc::SIGTERM).await;
        let mut command = world.command(&world.state_dir());
        world.start_as(command.env("SSL_CERT_FILE", &roots)).await;
        let output = world.warren(&["up", "--coordinator", &url]).await;
        output.failed(1, "not enrolled in the network `acme`");
        // Also a verified coordinator must be the one that was asked for.
        let other = Fake::new().fingerprint();
        let args = ["up", "--coordinator", &url, "--coordinator-fingerprint", &other];
        world.warren(&args).await.failed(1, "is not the expected one");
        assert!(world.fake.with(|w| w.heard.is_empty()));
    });
}
