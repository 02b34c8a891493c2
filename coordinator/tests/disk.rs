//! The real coordinator on a real file system that gets full, and beside other writers of its database.
//!
//! Needs root (or a user namespace that may mount a tmpfs); says `skipped` otherwise.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a skipped test says so, a failed one panics")]

mod support;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::process::{Running, fails, serve, until, up, verb};
use support::{Client, DeviceKeys, free_addr, http_get};
use warren_common::auth_key::AuthKey;
use warren_common::ids::DeviceId;
use warren_common::wire::control::RefusedCode;
use warren_coordinator::domain::{Change, State};
use warren_coordinator::os;
use warren_coordinator::store::{Commit, SqliteStore, Store as _};

/// Runs a test in a mount namespace of its own with a small tmpfs at the path it gets, or says why not.
#[expect(unsafe_code, reason = "no crate in use has unshare")]
fn on_a_small_disk(test: impl AsyncFnOnce(PathBuf)) {
    let dir = tempfile::tempdir().unwrap();
    // SAFETY: takes no pointer; it moves only the calling test thread to a new namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        println!("skipped: no permission to make a mount namespace (run as root)");
        return;
    }
    let mount = format!(
        "mount --make-rprivate / && mount -t tmpfs -o size=4m,mode=0700 warren {}",
        dir.path().display()
    );
    let done = std::process::Command::new("sh").args(["-c", &mount]).output().unwrap();
    assert!(done.status.success(), "{mount}: {}", String::from_utf8_lossy(&done.stderr));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test(dir.path().to_owned()));
}

/// Takes all the room there is on the disk of `dir`, but for `rest` bytes.
fn fill(dir: &Path, rest: usize) -> PathBuf {
    let path = dir.join("filler");
    let spare = dir.join("spare");
    std::fs::write(&spare, vec![1; rest]).unwrap();
    let mut file = std::fs::File::create(&path).unwrap();
    while file.write(&[1; 4_096]).is_ok_and(|n| n > 0) {}
    std::fs::remove_file(spare).unwrap();
    path
}

fn devices(state: &Path) -> Vec<DeviceId> {
    let (code, list, err) = verb(state, &["device", "list", "--json"]);
    assert_eq!(code, 0, "{err}");
    let list: Vec<Value> = serde_json::from_str(&list).unwrap();
    list.iter().map(|d| d["id"].as_str().unwrap().parse().unwrap()).collect()
}

fn reusable_key(state: &Path) -> AuthKey {
    let (code, key, err) = verb(state, &["auth-key", "create", "--reusable", "--tag", "tag:x"]);
    assert_eq!(code, 0, "{err}");
    key.parse().unwrap()
}

#[test]
fn a_full_disk_refuses_changes_keeps_what_was_said_and_is_over_when_there_is_room() {
    on_a_small_disk(async |disk| {
        let (state, addr) = (disk.join("state"), free_addr());
        let mut server = serve(&state, addr);
        up(addr).await;
        let key = reusable_key(&state);
        let mut first = Client::join(addr, &key, 0, "first").await;
        let filler = fill(&disk, 200 << 10);

        // Devices join until one is told that nothing can be stored.
        let mut acknowledged = vec![first.id()];
        let refused = loop {
            let keys = DeviceKeys::new(acknowledged.len() as u64);
            let mut client = Client::connect(addr, &key.root, &keys).await.unwrap();
            match client.enroll(&key, "host").await {
                Ok(_) => acknowledged.push(client.id()),
                Err(refused) => break refused,
            }
        };
        assert_eq!(refused.code, RefusedCode::StoreUnavailable.as_str());
        assert!(refused.fix.contains("disk space"), "{refused:?}");
        let health = http_get(addr, "/healthz").await.unwrap();
        assert!(health.starts_with("HTTP/1.1 503") && health.contains("full"), "{health}");
        let (code, list, _) = verb(&state, &["health", "--json"]);
        let list: Value = serde_json::from_str(&list).unwrap();
        assert_eq!((code, list[0]["code"].as_str()), (0, Some("store-unavailable")), "{list}");
        // Something smaller may still fit; what does not is refused with what to do.
        let mut keys = 1;
        let err = loop {
            match verb(&state, &["auth-key", "create"]) {
                (0, ..) => keys += 1,
                (code, _, err) => {
                    assert_eq!(code, 1);
                    break err;
                }
            }
        };
        assert!(err.contains("fix:") && err.contains("disk space"), "{err}");
        // What only reads goes on, and so does a session that stands.
        assert_eq!(devices(&state).len(), acknowledged.len());
        first.ping().await;

        // Killed and started on the full disk: it says what is wrong or serves, and has lost nothing either way.
        server.kill();
        let again = serve(&state, addr);
        until(|| async { http_get(addr, "/healthz").await.is_some() }).await;
        assert_eq!(devices(&state), sorted(&acknowledged));
        drop(again);

        // Room again: it goes on by itself, without anybody asking for anything.
        let mut server = serve(&state, addr);
        until(|| async { http_get(addr, "/healthz").await.is_some_and(|r| r.starts_with("HTTP/1.1 503")) })
            .await;
        std::fs::remove_file(filler).unwrap();
        up(addr).await;
        let (_, list, _) = verb(&state, &["health", "--json"]);
        assert!(!list.contains("store-unavailable"), "{list}");
        let late = Client::join(addr, &key, 9_000, "late").await;
        acknowledged.push(late.id());
        server.kill();
        let _server = serve(&state, addr);
        up(addr).await;
        assert_eq!(devices(&state), sorted(&acknowledged));
        let (_, list, _) = verb(&state, &["auth-key", "list", "--json"]);
        assert_eq!(serde_json::from_str::<Vec<Value>>(&list).unwrap().len(), keys);
    });
}

fn sorted(ids: &[DeviceId]) -> Vec<DeviceId> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids
}

#[test]
fn a_disk_that_is_full_before_the_first_start_is_named() {
    on_a_small_disk(async |disk| {
        let filler = fill(&disk, 0);
        let state = disk.join("state");
        let args = [
            "--no-embedded-relay",
            "--listen",
            "127.0.0.1:0",
            "--public-url",
            "http://c.example",
            "--state-dir",
        ];
        let (code, err) = fails(&[&args[..], &[state.to_str().unwrap()]].concat());
        let said = err.to_lowercase();
        assert!(code == 1 && (said.contains("no space left") || said.contains("disk is full")), "{err}");
        // With room, what is half made is no obstacle.
        std::fs::remove_file(filler).unwrap();
        let addr = free_addr();
        let _server = serve(&state, addr);
        up(addr).await;
    });
}

/// What another process does to the database of a running coordinator.
async fn meddle(state: &Path, change: impl Fn(&State) -> Vec<Change>) {
    let mut store = SqliteStore::open(&state.join("warren.db")).await.unwrap();
    loop {
        let loaded = store.load().await.unwrap().unwrap();
        // The coordinator may write at the same moment; then it is tried again, as it would do.
        if let Commit::Committed(_) =
            store.commit(loaded.version, &change(&loaded.state), os::now().unix).await.unwrap()
        {
            return store.close().await.unwrap();
        }
    }
}

fn metric(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is missing")).parse().unwrap()
}

async fn started(dir: &Path) -> (Running, PathBuf, std::net::SocketAddr) {
    let (state, addr) = (dir.join("state"), free_addr());
    let server = serve(&state, addr);
    up(addr).await;
    (server, state, addr)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_writer_of_the_database_is_heard_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, state, addr) = started(dir.path()).await;
    let key = reusable_key(&state);
    let policy = dir.path().join("policy");
    std::fs::write(&policy, r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#).unwrap();
    assert_eq!(verb(&state, &["policy", "set", policy.to_str().unwrap()]).0, 0);
    let mut one = Client::join(addr, &key, 1, "one").await;
    let two = Client::join(addr, &key, 2, "two").await;
    one.until(|n| n.peers.contains_key(&two.id())).await;

    // Another process removes a device; ours hears of it with its next write, whatever that is, and tells the agents.
    meddle(&state, |_| vec![Change::RemoveDevice(two.id())]).await;
    let three = Client::join(addr, &key, 3, "three").await;
    one.until(|n| !n.peers.contains_key(&two.id()) && n.peers.contains_key(&three.id())).await;
    assert_eq!(devices(&state), sorted(&[one.id(), three.id()]));
    let metrics = http_get(addr, "/metrics").await.unwrap();
    assert_eq!(metric(&metrics, "warren_commit_conflicts_total"), 1);
    assert_eq!(metric(&metrics, "warren_store_up"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_somebody_holds_locked_is_survived() {
    use sqlx::Connection as _;
    let dir = tempfile::tempdir().unwrap();
    let (_server, state, addr) = started(dir.path()).await;
    let key = reusable_key(&state);
    let one = Client::join(addr, &key, 1, "one").await;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(state.join("warren.db"));
    let mut lock = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut lock).await.unwrap();
    let mut client = Client::connect(addr, &key.root, &DeviceKeys::new(2)).await.unwrap();
    let refused = client.enroll(&key, "two").await.unwrap_err();
    assert_eq!(refused.code, RefusedCode::StoreUnavailable.as_str());
    let health = http_get(addr, "/healthz").await.unwrap();
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("locked"), "{health}");
    sqlx::query("ROLLBACK").execute(&mut lock).await.unwrap();
    up(addr).await;
    let two = Client::join(addr, &key, 2, "two").await;
    assert_eq!(devices(&state), sorted(&[one.id(), two.id()]));
}
