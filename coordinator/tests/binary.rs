//! The real binary: what it prints, how it fails, and that `kill -9` loses nothing acknowledged.

mod support;

use std::path::Path;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng};
use serde_json::Value;
use support::process::{fails, serve, serve_with, until, up, verb};
use support::{Client, DeviceKeys, free_addr, http_get};
use warren_common::auth_key::AuthKey;

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_at_any_moment_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let addr = free_addr();
    let mut server = serve(&state, addr);
    up(addr).await;
    let (code, key, _) = verb(&state, &["auth-key", "create", "--reusable", "--tag", "tag:x"]);
    assert_eq!(code, 0);
    assert_eq!(key.lines().count(), 1, "the key alone");
    let key: AuthKey = key.parse().unwrap();

    let mut rng = ChaCha20Rng::seed_from_u64(7);
    let (mut acknowledged, mut revisions, mut seed) = (Vec::new(), Vec::new(), 0);
    for _ in 0..12 {
        let (sender, mut welcomed) = tokio::sync::mpsc::unbounded_channel();
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (key, sender, first) = (key.clone(), sender.clone(), seed);
                seed += 1_000;
                support::spawn(async move {
                    for seed in first.. {
                        let keys = DeviceKeys::new(seed);
                        let Ok(mut client) = Client::connect(addr, &key.root, &keys).await else { return };
                        client.send(client.enroll_message(&key, "host")).await;
                        // Whoever is welcomed is in the network, whatever happens next.
                        match client.next().await {
                            Some(warren_common::wire::control::ServerBody::Welcome(welcome)) => {
                                sender.send((welcome.device.clone(), keys)).unwrap();
                                client.disk.device =
                                    warren_common::ids::DeviceId::from_slice(&welcome.device);
                            }
                            _ => return,
                        }
                        if let Some(warren_common::wire::control::ServerBody::Update(update)) =
                            client.next().await
                        {
                            let update = warren_common::wire::control::NetmapUpdate::verify(
                                &update,
                                &client.identity.netmap,
                            );
                            assert!(update.unwrap().to > 0);
                        }
                    }
                })
            })
            .collect();
        drop(sender);
        tokio::time::sleep(Duration::from_millis(u64::from(rng.next_u32() % 250))).await;
        server.kill();
        for worker in workers {
            worker.await.unwrap();
        }
        while let Some(device) = welcomed.recv().await {
            acknowledged.push(device);
        }
        server = serve(&state, addr);
        up(addr).await;
        let metrics = http_get(addr, "/metrics").await.unwrap();
        let revision = metrics.lines().find_map(|l| l.strip_prefix("warren_revision ")).unwrap();
        revisions.push(revision.parse::<u64>().unwrap());
    }
    assert!(revisions.is_sorted_by(|a, b| a < b), "a revision was used twice: {revisions:?}");
    let (code, list, _) = verb(&state, &["device", "list", "--json"]);
    assert_eq!(code, 0);
    let list: Vec<Value> = serde_json::from_str(&list).unwrap();
    let ids: Vec<&str> = list.iter().map(|d| d["id"].as_str().unwrap()).collect();
    assert!(!acknowledged.is_empty());
    for (id, _) in &acknowledged {
        let id = warren_common::ids::DeviceId::from_slice(id).unwrap().to_string();
        assert!(ids.contains(&id.as_str()), "{id} was acknowledged and is gone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn terminating_is_clean_and_the_verbs_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (code, out, err) = verb(&state, &["device", "list"]);
    assert!(
        code == 1 && out.is_empty() && err.contains("no coordinator runs") && err.contains("serve"),
        "{err}"
    );

    let addr = free_addr();
    let mut server = serve(&state, addr);
    up(addr).await;
    assert_eq!(verb(&state, &["auth-key", "create", "--tag", "tag:a", "--user", "a@b"]).0, 2);
    assert_eq!(verb(&state, &["auth-key", "create", "--tag", "web"]).0, 2);
    assert_eq!(verb(&state, &["auth-key", "create", "--expires", "never"]).0, 2);
    assert_eq!(verb(&state, &["device", "show", "nobody"]).0, 1);
    assert_eq!(verb(&state, &["frobnicate"]).0, 2);
    let (code, out, _) = verb(&state, &["auth-key", "create", "--user", "ann@example.com", "--json"]);
    let made: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, made["user"].as_str(), made["reusable"].as_bool()),
        (0, Some("ann@example.com"), Some(false))
    );
    let key: AuthKey = made["key"].as_str().unwrap().parse().unwrap();
    let (_, out, _) = verb(&state, &["auth-key", "list", "--json"]);
    assert!(!out.contains(&key.expose()[60..]), "secrets are shown once");
    let client = Client::join(addr, &key, 1, "laptop").await;
    let (code, out, _) = verb(&state, &["device", "show", "laptop", "--json"]);
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, shown["id"].as_str()), (0, Some(client.id().to_string().as_str())));
    let (_, out, _) = verb(&state, &["device", "list"]);
    assert!(out.contains("laptop") && out.starts_with("ID"), "{out}");
    let (_, out, _) = verb(&state, &["policy", "status", "--json"]);
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status["source"].as_str(), status["revision"].as_u64()), (Some("api"), Some(0)));
    let file = dir.path().join("policy");
    std::fs::write(&file, "{").unwrap();
    let (code, _, err) = verb(&state, &["policy", "set", file.to_str().unwrap()]);
    assert!(code == 2 && err.contains("stays in force"), "{err}");
    std::fs::write(&file, "{}").unwrap();
    assert_eq!(verb(&state, &["policy", "set", file.to_str().unwrap()]).0, 0);
    assert_eq!(verb(&state, &["policy", "get"]).1, "{}\n");
    let (_, join_key, _) = verb(&state, &["relay", "create", "fra1"]);
    assert!(join_key.starts_with("wrelay-") && join_key.lines().count() == 1);

    let mode = |path: &Path| {
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions())
    };
    assert_eq!(mode(&state) & 0o777, 0o700);
    for file in ["admin.sock", "root.key", "control.key", "netmap.key", "warren.db", "warren.db-wal"] {
        assert_eq!(mode(&state.join(file)) & 0o777, 0o600, "{file}");
    }
    server.terminate();
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_end_with_one_message_and_its_fix() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let state_dir = state.to_str().unwrap();
    let addr = free_addr();
    let (listen, url) = (addr.to_string(), format!("http://{addr}"));
    let base = ["--no-embedded-relay", "--state-dir", state_dir, "--listen", &listen, "--public-url", &url];
    let with = |more: &[&str]| fails(&[&base[..], more].concat());

    let (code, err) = fails(&["--state-dir", state_dir, "--listen", &listen, "--public-url", "c.example"]);
    assert!(code == 2 && err.contains("expected http://"), "{err}");
    let (code, err) = with(&["--database", "postgres://u:pw@db/x"]);
    assert!(code == 2 && err.contains("only SQLite") && !err.contains("pw"), "{err}");
    let (code, err) = with(&["--policy", "/nonexistent/policy"]);
    assert!(code == 2 && err.contains("can't read the policy file"), "{err}");
    let bad = dir.path().join("bad.hujson");
    std::fs::write(&bad, "{\n  \"acls\": 7\n}").unwrap();
    let (code, err) = with(&["--policy", bad.to_str().unwrap()]);
    assert!(code == 2 && err.contains("bad.hujson:2"), "{err}");
    let (code, err) = with(&["--lease", "1m"]);
    assert!(code == 2 && err.contains("5m"), "{err}");
    let (code, err) = with(&["--ipv4-pool", "10.0.0.0/31"]);
    assert!(code == 2 && err.contains("/30"), "{err}");
    let (code, err) = with(&["--tls-cert", "/nonexistent", "--tls-key", "/nonexistent"]);
    assert!(code == 2 && err.contains("certificate /nonexistent"), "{err}");
    let (code, err) = with(&["--tls-cert", "/nonexistent"]);
    assert!(code == 2 && err.contains("--tls-key"), "{err}");
    let made = rcgen::generate_simple_self_signed(vec!["c.example".into()]).unwrap();
    let other = rcgen::generate_simple_self_signed(vec!["c.example".into()]).unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, other.signing_key.serialize_pem()).unwrap();
    let tls = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
    let (code, err) = with(&tls);
    assert!(code == 2 && err.contains("private key") && err.contains("belongs to the certificate"), "{err}");
    std::fs::write(&key, "").unwrap();
    let (code, err) = with(&tls);
    assert!(code == 2 && err.contains("private key"), "{err}");
    // A directory that nobody may make, and one that is a file.
    for state_dir in ["/sys/warren", cert.to_str().unwrap()] {
        let (code, err) = fails(&["--state-dir", state_dir, "--listen", &listen, "--public-url", &url]);
        assert!(code == 1 && err.contains(state_dir) && err.contains("--state-dir"), "{err}");
    }

    let relay_port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = relay_port.local_addr().unwrap().to_string();
    let free = free_addr().to_string();
    for relay in
        [["--relay-listen", &port, "--stun-listen", &free], ["--relay-listen", &free, "--stun-listen", &port]]
    {
        let args = ["--state-dir", state_dir, "--listen", &listen, "--public-url", &url];
        let (code, err) = fails(&[&args[..], &relay[..]].concat());
        assert!(code == 1 && err.contains(&port) && err.contains("--relay-listen"), "{err}");
    }
    let taken = std::net::TcpListener::bind(addr).unwrap();
    let (code, err) = with(&[]);
    assert!(code == 1 && err.contains("another process has it"), "{err}");
    drop(taken);

    let server = serve(&state, addr);
    up(addr).await;
    let (code, err) = with(&[]);
    assert!(code == 1 && err.contains("another coordinator runs"), "{err}");
    drop(server);

    let key = state.join("netmap.key");
    let good = std::fs::read(&key).unwrap();
    std::fs::write(&key, "secret:oops").unwrap();
    let (code, err) = with(&[]);
    assert!(code == 1 && err.contains("netmap.key is damaged"), "{err}");
    std::fs::remove_file(&key).unwrap();
    let (code, err) = with(&[]);
    assert!(code == 1 && err.contains("is missing"), "{err}");
    std::fs::write(&key, good).unwrap();

    for part in ["warren.db-wal", "warren.db-shm"] {
        let _ = std::fs::remove_file(state.join(part)); // the garbage below must be what is read
    }
    std::fs::write(state.join("warren.db"), vec![0x5a; 8_192]).unwrap();
    let (code, err) = with(&[]);
    assert!(code == 1 && err.contains("is damaged") && err.contains("backup"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_raises_the_epoch_and_agents_follow() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let addr = free_addr();
    let mut server = serve(&state, addr);
    up(addr).await;
    let (_, key, _) = verb(&state, &["auth-key", "create"]);
    let key: AuthKey = key.parse().unwrap();
    let client = Client::join(addr, &key, 1, "laptop").await;
    let keys = client.keys.clone();
    let disk = client.close().await;
    assert_eq!(verb(&state, &["restored"]).0, 1, "not while it runs");
    server.terminate();
    assert!(!state.join("warren.db-wal").exists(), "a clean stop leaves one file");
    let backup = std::fs::read(state.join("warren.db")).unwrap();
    let backup_again = backup.clone();

    // Life goes on after the backup was taken: the agent sees newer numbers.
    let mut server = serve(&state, addr);
    up(addr).await;
    let mut client = Client::connect(addr, &key.root, &keys).await.unwrap();
    client.resume(disk.clone()).await.unwrap();
    client.next_update().await;
    let mut disk = client.close().await;
    disk.revision += 10_000;
    server.terminate();

    std::fs::write(state.join("warren.db"), backup).unwrap();
    // Nobody has said so: the agent's newer netmap gives it away.
    let mut server = serve(&state, addr);
    up(addr).await;
    let mut client = Client::connect(addr, &key.root, &keys).await.unwrap();
    client.resume(disk.clone()).await.unwrap();
    let (_, out, _) = verb(&state, &["health", "--json"]);
    assert!(out.contains("database-restored") && out.contains("warren-coordinator restored"), "{out}");
    server.terminate();

    let (code, out, err) = verb(&state, &["restored"]);
    assert!(code == 0 && out.contains("epoch is "), "{out}{err}");
    let mut server = serve(&state, addr);
    up(addr).await;
    let mut client = Client::connect(addr, &key.root, &keys).await.unwrap();
    let raised = client.identity.epoch;
    assert!(raised > disk.epoch && out.contains(&format!("epoch is {raised} now")), "{out}");
    client.resume(disk).await.unwrap();
    let update = client.next_update().await;
    assert_eq!(update.epoch, raised);
    server.terminate();

    // The same backup a second time: newer again.
    std::fs::write(state.join("warren.db"), backup_again).unwrap();
    // Epochs are counted in seconds.
    until(|| async { warren_coordinator::os::now().unix.as_secs().unsigned_abs() > raised }).await;
    assert_eq!(verb(&state, &["restored"]).0, 0);
    let _server = serve(&state, addr);
    up(addr).await;
    let client = Client::connect(addr, &key.root, &keys).await.unwrap();
    assert!(client.identity.epoch > raised);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_a_bad_policy_file_keeps_the_last_accepted_policy() {
    let dir = tempfile::tempdir().unwrap();
    let (state, policy) = (dir.path().join("state"), dir.path().join("policy.hujson"));
    let good = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
    std::fs::write(&policy, good).unwrap();
    let addr = free_addr();
    let args = ["--policy", policy.to_str().unwrap()];
    let mut server = serve_with(&state, addr, &args);
    up(addr).await;
    let (_, key, _) = verb(&state, &["auth-key", "create", "--reusable"]);
    let key: AuthKey = key.parse().unwrap();
    let mut one = Client::join(addr, &key, 1, "one").await;
    let two = Client::join(addr, &key, 2, "two").await;
    one.until(|n| n.peers.contains_key(&two.id())).await;
    let mut disk = one.close().await;
    let keys = DeviceKeys::new(1);

    let spoil: [(&str, &dyn Fn()); 6] = [
        ("policy.hujson:1", &|| std::fs::write(&policy, "{ nonsense").unwrap()),
        ("group:x", &|| {
            std::fs::write(
                &policy,
                r#"{"acls": [{"action": "accept", "src": ["group:x"], "dst": ["*:*"]}]}"#,
            )
            .unwrap();
        }),
        ("can't read the policy file", &|| std::fs::remove_file(&policy).unwrap()),
        ("it is no file", &|| std::fs::create_dir(&policy).unwrap()),
        ("it is no file", &|| {
            std::fs::remove_dir(&policy).unwrap();
            // Reading it would wait for a writer.
            let made = std::process::Command::new("mkfifo").arg(&policy).status().unwrap();
            assert!(made.success());
        }),
        ("UTF-8", &|| {
            std::fs::remove_file(&policy).unwrap();
            std::fs::write(&policy, [0xff, 0xfe, b'{', b'}']).unwrap();
        }),
    ];
    for (why, spoil) in spoil {
        server.kill(); // at any moment
        spoil();
        server = serve_with(&state, addr, &args);
        up(addr).await;
        let (code, out, _) = verb(&state, &["policy", "status", "--json"]);
        let status: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(
            (code, status["revision"].as_u64(), status["source"].as_str()),
            (0, Some(1), Some("file"))
        );
        let error = status["error"].as_str().unwrap_or_default().to_owned();
        assert!(error.contains(why), "{why}: {error}");
        let (code, out, _) = verb(&state, &["policy", "status"]);
        assert!(code == 0 && out.contains(error.lines().next().unwrap()), "{out}");
        let (_, out, _) = verb(&state, &["health"]);
        assert!(out.contains("[policy-refused]") && out.contains("fix: "), "{out}");
        assert_eq!(verb(&state, &["policy", "get"]).1.trim_end(), good);
        // The agents still have what it gives them.
        let mut one = Client::connect(addr, &key.root, &keys).await.unwrap();
        let welcome = one.resume(disk.clone()).await.unwrap();
        one.confirm(&welcome).await;
        one.ping().await;
        assert!(one.netmap().peers.contains_key(&two.id()));
        disk = one.close().await;
        // And no other source takes over meanwhile.
        let other = dir.path().join("other");
        std::fs::write(&other, "{}").unwrap();
        let (code, _, err) = verb(&state, &["policy", "set", other.to_str().unwrap()]);
        assert!(code == 1 && err.contains("policy.hujson"), "{err}");
    }
    std::fs::write(&policy, "{}").unwrap();
    until(|| async { verb(&state, &["policy", "status", "--json"]).1.contains("\"error\": null") }).await;
    assert_eq!(verb(&state, &["policy", "get"]).1, "{}\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_speaks_json_and_refuses_bad_usage() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let addr = free_addr();
    let _server = serve(&state, addr);
    up(addr).await;
    let json = |args: &[&str]| -> Value {
        let (code, out, err) = verb(&state, &[args, &["--json"]].concat());
        assert_eq!(code, 0, "{args:?}: {err}");
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out}"))
    };
    let file = dir.path().join("policy");
    std::fs::write(&file, "{}").unwrap();
    let key = json(&["auth-key", "create", "--tag", "tag:x"]);
    let auth_key: AuthKey = key["key"].as_str().unwrap().parse().unwrap();
    Client::join(addr, &auth_key, 1, "web-1").await;
    let token = json(&["api-token", "create", "ci", "--expires", "30d"]);
    assert!(token["token"].as_str().unwrap().starts_with("wapi-"));
    let (key, token) = (key["id"].as_str().unwrap().to_owned(), token["id"].as_str().unwrap().to_owned());
    for args in [
        &["auth-key", "list"][..],
        &["auth-key", "revoke", &key],
        &["device", "list"],
        &["device", "show", "web-1"],
        &["device", "approve", "web-1"],
        &["device", "expire", "web-1"],
        &["device", "remove", "web-1"],
        &["user", "create", "ann@example.com"],
        &["user", "list"],
        &["user", "suspend", "ann@example.com"],
        &["user", "restore", "ann@example.com"],
        &["user", "remove", "ann@example.com"],
        &["policy", "set", file.to_str().unwrap()],
        &["policy", "get"],
        &["policy", "status"],
        &["policy", "inventory"],
        &["relay", "create", "fra1"],
        &["relay", "list"],
        &["relay", "remove", "fra1"],
        &["api-token", "list"],
        &["api-token", "revoke", &token],
        &["health"],
    ] {
        json(args);
    }
    // Nothing there: a failure. Nonsense: bad usage. Each says what to do.
    for (args, code) in [
        (&["device", "remove", "web-1"][..], 1),
        (&["user", "suspend", "nobody@example.com"], 1),
        (&["relay", "remove", "fra1"], 1),
        (&["api-token", "revoke", &token], 1),
        (&["api-token", "revoke", "x"], 2),
        (&["auth-key", "revoke", "x"], 2),
        (&["user", "create", "no-address"], 2),
        (&["relay", "create", "Not A Name"], 2),
        (&["policy", "set", "/nonexistent"], 2),
        (&["api-token", "create", "x", "--expires", "9999d"], 2),
    ] {
        let (found, out, err) = verb(&state, args);
        assert!(found == code && out.is_empty() && err.contains("fix: "), "{args:?}: {found} {err}");
    }
    for args in [&["device"][..], &["device", "show"], &["policy", "frob"], &["relay", "create"], &["--json"]]
    {
        assert_eq!(verb(&state, args).0, 2, "{args:?}");
    }
    let (code, out, _) = verb(&state, &["relay", "list", "--help"]);
    assert!(code == 0 && out.contains("Example"), "{out}");
}
