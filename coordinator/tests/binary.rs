//! The real binary: what it prints, how it fails, and that `kill -9` loses nothing acknowledged.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper fails by panicking")]

mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng};
use serde_json::Value;
use support::{Client, DeviceKeys, free_addr, http_get, verb};
use warren_common::auth_key::AuthKey;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(state_dir: &Path, addr: SocketAddr) -> Running {
    let child = support::binary()
        .args(["serve", "--no-embedded-relay", "--listen", &addr.to_string(), "--public-url"])
        .arg(format!("http://{addr}"))
        .arg("--state-dir")
        .arg(state_dir)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Running(child)
}

async fn up(addr: SocketAddr) {
    let healthy = async {
        while !http_get(addr, "/healthz").await.is_some_and(|r| r.ends_with("ok\n")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(support::PATIENCE, healthy).await.expect("it comes up");
}

/// Runs `serve` with these arguments; it must end by itself: exit code and stderr.
fn fails(args: &[&str]) -> (i32, String) {
    let out = support::binary().arg("serve").args(args).output().unwrap();
    (out.status.code().unwrap_or(-1), String::from_utf8(out.stderr).unwrap())
}

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
        server.0.kill().unwrap(); // SIGKILL
        server.0.wait().unwrap();
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
    let pid = rustix::process::Pid::from_child(&server.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(server.0.wait().unwrap().success());
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
