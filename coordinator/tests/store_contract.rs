//! What every store must do, as one suite over the trait; and the server's behaviour when a store can't.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::path::Path;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use tokio_util::sync::CancellationToken;
use warren_common::ids::NetworkId;
use warren_common::keys::{ControlPublicKey, Fingerprint, NetmapSecretKey, ProbePublicKey, WgPublicKey};
use warren_common::time::UnixTime;
use warren_common::wire::control::{ClientBody, Ping};
use warren_coordinator::domain::{
    Change, Command, EnrollRequest, NewAuthKey, PolicySource, Refusal, Reply, Settings, State,
};
use warren_coordinator::os;
use warren_coordinator::push::{Config, Coordinator};
use warren_coordinator::relays::Relays;
use warren_coordinator::server::{Handle, MAX_CONFLICTS, Server};
use warren_coordinator::store::{Commit, Loaded, MAX_LOG, Newer, SqliteStore, Store, StoreError};

const NOW: UnixTime = UnixTime::from_secs(1_000_000_000);

fn settings() -> Settings {
    Settings {
        network: NetworkId::from_bytes([1; 16]),
        name: "test".into(),
        root: Fingerprint::from_bytes([2; 32]),
        ipv4: "100.64.0.0/10".parse().unwrap(),
        ipv6: "fd00::/48".parse().unwrap(),
        epoch: 1,
        revisions_reserved: 0,
    }
}

fn first() -> Vec<Change> {
    vec![Change::PutSettings(Box::new(settings()))]
}

fn enroll(key: &warren_common::auth_key::AuthKey, n: u8) -> Command {
    Command::Enroll(Box::new(EnrollRequest {
        control: ControlPublicKey::from_bytes([n; 32]),
        wg: WgPublicKey::from_bytes([n; 32]),
        probe: ProbePublicKey::from_bytes([n; 32]),
        auth_key: key.clone(),
        hostname: "host".into(),
        os: "linux".into(),
        version: "1".into(),
    }))
}

/// A state with one of everything, and the commits that lead to it.
fn history() -> (State, Vec<Vec<Change>>) {
    let (mut state, mut commits) = (State::new(settings()), vec![first()]);
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let mut run = |state: &mut State, command: &Command| {
        let (changes, reply) = state.apply(command, NOW, &mut rng).unwrap();
        for change in &changes {
            state.absorb(change.clone());
        }
        commits.push(changes);
        reply
    };
    let new = NewAuthKey { user: Some("ann@x.org".into()), reusable: true, ..NewAuthKey::default() };
    let Reply::AuthKey(key) = run(&mut state, &Command::CreateAuthKey(new)) else { unreachable!() };
    run(&mut state, &enroll(&key, 1));
    let Reply::Admitted { device, .. } = run(&mut state, &enroll(&key, 2)) else { unreachable!() };
    run(&mut state, &Command::RemoveDevice(device));
    run(&mut state, &Command::CreateRelay("fra1".into()));
    run(&mut state, &Command::SetPolicy { source: PolicySource::Api, text: "{}".into() });
    run(&mut state, &Command::ReserveRevisions);
    (state, commits)
}

/// The contract. `open` gives another connection to the same, at first empty, database.
async fn contract<S: Store>(mut open: impl AsyncFnMut() -> S) {
    let mut store = open().await;
    assert_eq!(store.load().await.unwrap(), None);
    let (state, commits) = history();
    let mut version = 0;
    for changes in &commits {
        match store.commit(version, changes, NOW).await.unwrap() {
            Commit::Committed(next) => {
                assert_eq!(next, version + 1);
                version = next;
            }
            Commit::Conflict(newer) => panic!("{newer:?}"),
        }
    }
    // What was committed is there, for others and after a restart.
    let mut other = open().await;
    let loaded = other.load().await.unwrap();
    assert_eq!(loaded, Some(Loaded { version, state: state.clone() }));

    // A writer that is behind hears what it missed, and changes nothing.
    let rest = vec![Change::EndRest(*state.resting().keys().next().unwrap())];
    let behind = version - 2;
    let missed = commits[commits.len() - 2..].concat();
    let conflict = other.commit(behind, &rest, NOW).await.unwrap();
    assert_eq!(conflict, Commit::Conflict(Newer { version, changes: missed }));
    assert_eq!(other.load().await.unwrap().unwrap().state, state);

    // All or nothing: a commit that fails in its second change has not made the first.
    let device = state.devices().values().next().unwrap();
    let twin = warren_coordinator::domain::Device {
        id: warren_common::ids::DeviceId::from_bytes([9; 16]),
        ..device.clone()
    };
    let impossible = [rest.clone(), vec![Change::PutDevice(Box::new(twin))]].concat();
    assert!(matches!(store.commit(version, &impossible, NOW).await, Err(StoreError::Unavailable(_))));
    assert_eq!(store.load().await.unwrap(), Some(Loaded { version, state: state.clone() }));
    assert_eq!(store.commit(version, &rest, NOW).await.unwrap(), Commit::Committed(version + 1));
    version += 1;

    // Two writers at once: one wins, the other hears of it.
    let remove = vec![Change::RemovePolicy];
    let (one, two) = tokio::join!(store.commit(version, &remove, NOW), other.commit(version, &remove, NOW));
    let won = [&one, &two].iter().filter(|r| matches!(r, Ok(Commit::Committed(_)))).count();
    assert_eq!(won, 1, "{one:?} {two:?}");
    version += 1;

    // The log is bounded; who is further behind must load everything.
    for _ in 0..MAX_LOG + 1 {
        assert!(matches!(store.commit(version, &remove, NOW).await, Ok(Commit::Committed(_))));
        version += 1;
    }
    assert!(matches!(other.commit(1, &remove, NOW).await, Err(StoreError::TooFarBehind)));
    assert!(matches!(
        other.commit(version - 5, &remove, NOW).await,
        Ok(Commit::Conflict(Newer { changes, .. })) if changes.len() == 5
    ));
    // A version that nobody has reached is no one's to write on.
    assert!(other.commit(version + 1, &remove, NOW).await.is_err());
}

#[tokio::test]
async fn sqlite_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    contract(async || SqliteStore::open(&path).await.unwrap()).await;
}

#[tokio::test]
async fn a_full_disk_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let mut store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(store.commit(0, &first(), NOW).await.unwrap(), Commit::Committed(1));
    store.limit_pages(1).await.unwrap();
    let state = State::new(settings());
    let big = |n: u64| {
        let mut rng = ChaCha20Rng::seed_from_u64(n);
        let text = format!("{{ /* {} */ }}", "x".repeat(100_000));
        state.apply(&Command::SetPolicy { source: PolicySource::Api, text }, NOW, &mut rng).unwrap().0
    };
    let error = store.commit(1, &big(1), NOW).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(why) if why.contains("full")), "{error}");
    assert_eq!(store.load().await.unwrap().unwrap().version, 1);
    store.limit_pages(1_000_000).await.unwrap();
    assert_eq!(store.commit(1, &big(1), NOW).await.unwrap(), Commit::Committed(2));
}

#[tokio::test]
async fn another_processs_lock_is_waited_for_briefly_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let mut store = SqliteStore::open(&path).await.unwrap();
    store.commit(0, &first(), NOW).await.unwrap();
    let lock = hold_lock(&path).await;
    let error = store.commit(1, &first(), NOW).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(why) if why.contains("locked")), "{error}");
    drop(lock);
    assert_eq!(store.commit(1, &first(), NOW).await.unwrap(), Commit::Committed(2));
}

async fn hold_lock(path: &Path) -> sqlx::SqliteConnection {
    use sqlx::Connection as _;
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut lock = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut lock).await.unwrap();
    lock
}

#[tokio::test]
async fn a_file_that_is_no_database_and_a_newer_one_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    std::fs::write(&path, [0x5a; 4_096]).unwrap();
    assert!(matches!(SqliteStore::open(&path).await, Err(StoreError::Corrupt { .. })));
    std::fs::remove_file(&path).unwrap();
    drop(SqliteStore::open(&path).await.unwrap());
    {
        use sqlx::Connection as _;
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
        let mut db = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
        sqlx::query(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             VALUES (9999, 'from the future', TRUE, x'00', 0)",
        )
        .execute(&mut db)
        .await
        .unwrap();
        db.close().await.unwrap();
    }
    let error = SqliteStore::open(&path).await.unwrap_err().to_string();
    assert!(error.contains("newer version"), "{error}");
    let error = SqliteStore::open(&dir.path().join("no/such/db")).await.unwrap_err().to_string();
    assert!(error.contains("can't open the database"), "{error}");
}

/// A store that fails as often as it is told to.
struct Flaky {
    inner: SqliteStore,
    failures: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    /// Writes this on its own before the next commit, as another coordinator would.
    meddle: std::sync::Arc<std::sync::Mutex<Vec<Vec<Change>>>>,
}

impl Store for Flaky {
    async fn load(&mut self) -> Result<Option<Loaded>, StoreError> {
        self.inner.load().await
    }

    async fn commit(
        &mut self,
        expected: u64,
        changes: &[Change],
        at: UnixTime,
    ) -> Result<Commit, StoreError> {
        use std::sync::atomic::Ordering::SeqCst;
        if self.failures.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Err(StoreError::Unavailable("no space left".into()));
        }
        let meddle = self.meddle.lock().unwrap().pop();
        if let Some(meddle) = meddle {
            let version = self.inner.load().await?.map_or(0, |l| l.version);
            self.inner.commit(version, &meddle, at).await?;
        }
        self.inner.commit(expected, changes, at).await
    }

    async fn close(self) -> Result<(), StoreError> {
        self.inner.close().await
    }
}

struct Lab {
    handle: Handle,
    failures: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    meddle: std::sync::Arc<std::sync::Mutex<Vec<Vec<Change>>>>,
    stop: CancellationToken,
    tasks: tokio::task::JoinSet<()>,
}

async fn lab(dir: &Path) -> Lab {
    let mut inner = SqliteStore::open(&dir.join("db")).await.unwrap();
    inner.commit(0, &first(), NOW).await.unwrap();
    let loaded = inner.load().await.unwrap().unwrap();
    let (failures, meddle) = Default::default();
    let store =
        Flaky { inner, failures: std::sync::Arc::clone(&failures), meddle: std::sync::Arc::clone(&meddle) };
    let config = Config { netmap_key: NetmapSecretKey::from_bytes([1; 32]), lease: Duration::from_secs(600) };
    let coordinator = Coordinator::new(config, loaded.state, os::now());
    let relays = Relays::new(None, coordinator.revision());
    let (server, handle) = Server::new(coordinator, store, loaded.version, relays);
    let (stop, mut tasks) = (CancellationToken::new(), tokio::task::JoinSet::new());
    tasks.spawn(server.run(stop.clone()));
    Lab { handle, failures, meddle, stop, tasks }
}

#[tokio::test]
async fn the_server_refuses_while_the_store_fails_and_goes_on_after() {
    let dir = tempfile::tempdir().unwrap();
    let mut lab = lab(dir.path()).await;
    let create = || Command::CreateAuthKey(NewAuthKey::default());
    assert!(lab.handle.command(create()).await.unwrap().is_ok());
    lab.failures.store(3, std::sync::atomic::Ordering::SeqCst);
    for _ in 0..3 {
        let refusal = lab.handle.command(create()).await.unwrap().unwrap_err();
        assert!(matches!(refusal, Refusal::StoreUnavailable(_)), "{refusal:?}");
        let (keys, error) = lab
            .handle
            .look(|c, health| (c.state().auth_keys().len(), health.store_error.clone()))
            .await
            .unwrap();
        assert_eq!(keys, 1, "nothing half done");
        assert!(error.unwrap().contains("no space left"));
    }
    assert!(lab.handle.command(create()).await.unwrap().is_ok());
    assert_eq!(lab.handle.look(|_, health| health.store_error.clone()).await.unwrap(), None);
    lab.stop.cancel();
    lab.tasks.join_next().await.unwrap().unwrap();
    let mut store = SqliteStore::open(&dir.path().join("db")).await.unwrap();
    assert_eq!(store.load().await.unwrap().unwrap().state.auth_keys().len(), 2);
}

#[tokio::test]
async fn a_conflict_is_decided_again_on_the_fresh_state() {
    let dir = tempfile::tempdir().unwrap();
    let lab = lab(dir.path()).await;
    let key = match lab.handle.command(Command::CreateAuthKey(NewAuthKey::default())).await.unwrap() {
        Ok(Reply::AuthKey(key)) => key,
        other => panic!("{other:?}"),
    };
    // Another coordinator uses the one-use key first.
    let twin = lab.handle.look(|c, _| c.state().clone()).await.unwrap();
    let mut rng = ChaCha20Rng::seed_from_u64(9);
    let (changes, _) = twin.apply(&enroll(&key, 7), os::now().unix, &mut rng).unwrap();
    lab.meddle.lock().unwrap().push(changes);
    assert_eq!(lab.handle.command(enroll(&key, 8)).await.unwrap(), Err(Refusal::AuthKeyUsed));
    let (devices, conflicts) =
        lab.handle.look(|c, health| (c.state().devices().len(), health.conflicts)).await.unwrap();
    assert_eq!((devices, conflicts), (1, 1));
}

#[tokio::test]
async fn writers_that_are_always_faster_are_given_up_on_and_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let lab = lab(dir.path()).await;
    let create = || Command::CreateAuthKey(NewAuthKey::default());
    assert!(lab.handle.command(create()).await.unwrap().is_ok());
    lab.meddle.lock().unwrap().extend((0..MAX_CONFLICTS).map(|_| vec![Change::RemovePolicy]));
    let refusal = lab.handle.command(create()).await.unwrap().unwrap_err();
    assert!(matches!(&refusal, Refusal::StoreUnavailable(why) if why.contains("faster")), "{refusal:?}");
    assert!(lab.handle.command(create()).await.unwrap().is_ok());
    let (keys, conflicts) =
        lab.handle.look(|c, health| (c.state().auth_keys().len(), health.conflicts)).await.unwrap();
    assert_eq!((keys, conflicts), (2, MAX_CONFLICTS as u64));
}

#[tokio::test]
async fn a_session_that_reads_too_slowly_loses_its_connection() {
    let dir = tempfile::tempdir().unwrap();
    let lab = lab(dir.path()).await;
    let (sender, mut outbound) = tokio::sync::mpsc::channel(2);
    let session = lab.handle.connect(ControlPublicKey::from_bytes([1; 32]), sender).await.unwrap().unwrap();
    // As many answers as fit, and one.
    for nonce in 0..=2 {
        lab.handle.message(session, ClientBody::Ping(Ping { nonce })).await.unwrap();
    }
    assert_eq!(lab.handle.look(|_, health| health.slow_sessions).await.unwrap(), 1);
    let mut told = 0;
    while outbound.recv().await.is_some() {
        told += 1;
    }
    assert_eq!(told, 2);
}
