//! The embedded store: one SQLite file in WAL mode, `synchronous=FULL`, one connection that writes.

use std::fs::{OpenOptions, Permissions};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Connection as _, Row as _, SqliteConnection};
use warren_common::time::UnixTime;

use super::{Commit, Loaded, Newer, Store, StoreError};
use crate::domain::{
    ApiTokenRecord, AuthKeyRecord, Change, Device, PolicyRecord, RelayRecord, Settings, State, User,
};

/// How many versions the change log keeps: what another writer may be behind before it must load everything.
pub const MAX_LOG: u64 = 4_096;
/// How long a write waits for another process's lock. Short: the coordinator serves nobody meanwhile.
const BUSY: Duration = Duration::from_millis(500);
/// Fresh databases and old ones alike come to the newest schema with these, forward only.
static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

/// See the module.
#[derive(Debug)]
pub struct SqliteStore {
    connection: SqliteConnection,
    path: String,
}

impl SqliteStore {
    /// Opens `path`, making it (mode 0600) if it isn't there, and migrates it.
    ///
    /// # Errors
    /// As [`super::Database::open`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let name = path.display().to_string();
        let open_error = |why: String| StoreError::Open { path: name.clone(), why };
        // SQLite gives its journal files the mode of the database.
        let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path);
        file.and_then(|f| f.set_permissions(Permissions::from_mode(0o600)))
            .map_err(|e| open_error(format!("{e}; check that its directory exists and is writable")))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY)
            .foreign_keys(true);
        let mut connection =
            SqliteConnection::connect_with(&options).await.map_err(|e| classify(&name, e))?;
        MIGRATIONS.run(&mut connection).await.map_err(|e| match e {
            MigrateError::Execute(e) | MigrateError::ExecuteMigration(e, _) => classify(&name, e),
            MigrateError::VersionMissing(_) | MigrateError::VersionTooNew(..) => {
                open_error("it was made by a newer version; install that version again".into())
            }
            other => open_error(other.to_string()),
        })?;
        Ok(Self { connection, path: name })
    }

    /// Bounds the database's size in pages of 4 KiB, as a full disk would: for tests of that case.
    ///
    /// # Errors
    /// The database is away.
    pub async fn limit_pages(&mut self, pages: u32) -> Result<(), StoreError> {
        let sql = sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
        sqlx::query(sql).execute(&mut self.connection).await.map_err(|e| classify(&self.path, e))?;
        Ok(())
    }

    async fn rows<T: DeserializeOwned>(&mut self, sql: &'static str) -> Result<Vec<T>, StoreError> {
        let rows = sqlx::query(sql).fetch_all(&mut self.connection).await;
        let rows = rows.map_err(|e| classify(&self.path, e))?;
        rows.iter()
            .map(|row| {
                let body: String = row.try_get(0).map_err(|e| classify(&self.path, e))?;
                serde_json::from_str(&body).map_err(|e| self.corrupt(&e))
            })
            .collect()
    }

    fn corrupt(&self, why: &dyn std::fmt::Display) -> StoreError {
        StoreError::Corrupt { path: self.path.clone(), why: why.to_string() }
    }

    async fn version(connection: &mut SqliteConnection) -> sqlx::Result<u64> {
        let version: Option<i64> =
            sqlx::query_scalar("SELECT version FROM state WHERE id = 1").fetch_optional(connection).await?;
        Ok(version.map_or(0, i64::unsigned_abs))
    }

    async fn newer(&mut self, than: u64) -> Result<Newer, StoreError> {
        let rows = sqlx::query("SELECT version, changes FROM change_log WHERE version > $1 ORDER BY version")
            .bind(than as i64)
            .fetch_all(&mut self.connection)
            .await
            .map_err(|e| classify(&self.path, e))?;
        let mut newer = Newer { version: than, changes: Vec::new() };
        for row in &rows {
            let version: i64 = row.try_get(0).map_err(|e| classify(&self.path, e))?;
            let changes: String = row.try_get(1).map_err(|e| classify(&self.path, e))?;
            if version.unsigned_abs() != newer.version + 1 {
                return Err(StoreError::TooFarBehind);
            }
            newer.version += 1;
            let changes: Vec<Change> = serde_json::from_str(&changes).map_err(|e| self.corrupt(&e))?;
            newer.changes.extend(changes);
        }
        if rows.is_empty() { Err(StoreError::TooFarBehind) } else { Ok(newer) }
    }
}

impl Store for SqliteStore {
    async fn load(&mut self) -> Result<Option<Loaded>, StoreError> {
        let version = Self::version(&mut self.connection).await.map_err(|e| classify(&self.path, e))?;
        let settings: Vec<Settings> = self.rows("SELECT body FROM settings").await?;
        let Some(settings) = settings.into_iter().next() else {
            return if version == 0 { Ok(None) } else { Err(self.corrupt(&"its settings are missing")) };
        };
        let mut state = State::new(settings);
        let devices: Vec<Device> = self.rows("SELECT body FROM devices").await?;
        let users: Vec<User> = self.rows("SELECT body FROM users").await?;
        let keys: Vec<AuthKeyRecord> = self.rows("SELECT body FROM auth_keys").await?;
        let tokens: Vec<ApiTokenRecord> = self.rows("SELECT body FROM api_tokens").await?;
        let relays: Vec<RelayRecord> = self.rows("SELECT body FROM relays").await?;
        let policy: Vec<PolicyRecord> = self.rows("SELECT body FROM policy").await?;
        let rests = sqlx::query_as::<_, (String, i64)>("SELECT addr, until_us FROM resting")
            .fetch_all(&mut self.connection)
            .await
            .map_err(|e| classify(&self.path, e))?;
        let rests: Vec<Change> = rests
            .into_iter()
            .map(|(addr, until)| {
                let addr: IpAddr = addr.parse().map_err(|e| self.corrupt(&e))?;
                Ok(Change::Rest(addr, UnixTime::from_micros(until)))
            })
            .collect::<Result<_, StoreError>>()?;
        let changes = users
            .into_iter()
            .map(Change::PutUser)
            .chain(devices.into_iter().map(|d| Change::PutDevice(Box::new(d))))
            .chain(keys.into_iter().map(|k| Change::PutAuthKey(Box::new(k))))
            .chain(tokens.into_iter().map(|t| Change::PutApiToken(Box::new(t))))
            .chain(relays.into_iter().map(|r| Change::PutRelay(Box::new(r))))
            .chain(policy.into_iter().map(|p| Change::PutPolicy(Box::new(p))))
            .chain(rests);
        for change in changes {
            state.absorb(change);
        }
        Ok(Some(Loaded { version, state }))
    }

    async fn commit(
        &mut self,
        expected: u64,
        changes: &[Change],
        at: UnixTime,
    ) -> Result<Commit, StoreError> {
        let mut result = self.attempt(expected, changes, at).await;
        if result.as_ref().is_err_and(is_full) {
            // Perhaps it is our own log that fills the disk. If this fails too, the first error says what is wrong.
            let _ = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut self.connection).await;
            result = self.attempt(expected, changes, at).await;
        }
        match result.map_err(|e| classify(&self.path, e))? {
            Some(version) => Ok(Commit::Committed(version)),
            None => Ok(Commit::Conflict(self.newer(expected).await?)),
        }
    }

    async fn close(self) -> Result<(), StoreError> {
        let path = self.path;
        self.connection.close().await.map_err(|e| classify(&path, e))
    }
}

impl SqliteStore {
    /// The new version, or `None` if the state is not at `expected`; nothing is open afterwards.
    async fn attempt(
        &mut self,
        expected: u64,
        changes: &[Change],
        at: UnixTime,
    ) -> sqlx::Result<Option<u64>> {
        // Not sqlx's transactions: when the disk is full SQLite rolls back by itself, and sqlx's own count of open
        // transactions then never comes back to zero.
        let result = self.transact(expected, changes, at).await;
        if !matches!(result, Ok(Some(_))) {
            // If there is nothing (left) to roll back, that is the wanted state as well.
            let _ = sqlx::query("ROLLBACK").execute(&mut self.connection).await;
        }
        result
    }

    /// The new version, or `None` (and an open transaction) if the state is not at `expected`.
    async fn transact(
        &mut self,
        expected: u64,
        changes: &[Change],
        at: UnixTime,
    ) -> sqlx::Result<Option<u64>> {
        let connection = &mut self.connection;
        sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
        if Self::version(connection).await? != expected {
            return Ok(None);
        }
        for change in changes {
            write(connection, change).await?;
        }
        let next = expected + 1;
        sqlx::query("INSERT INTO change_log (version, at_us, changes) VALUES ($1, $2, $3)")
            .bind(next as i64)
            .bind(at.as_micros())
            .bind(json(&changes)?)
            .execute(&mut *connection)
            .await?;
        sqlx::query("DELETE FROM change_log WHERE version <= $1")
            .bind(next.saturating_sub(MAX_LOG) as i64)
            .execute(&mut *connection)
            .await?;
        sqlx::query(
            "INSERT INTO state (id, version) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET version = $1",
        )
        .bind(next as i64)
        .execute(&mut *connection)
        .await?;
        sqlx::query("COMMIT").execute(&mut *connection).await?;
        Ok(Some(next))
    }
}

fn json(value: &impl Serialize) -> sqlx::Result<String> {
    serde_json::to_string(value).map_err(|e| sqlx::Error::Encode(Box::new(e)))
}

async fn write(connection: &mut SqliteConnection, change: &Change) -> sqlx::Result<()> {
    let query = match change {
        Change::PutSettings(settings) => sqlx::query(
            "INSERT INTO settings (id, body) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET body = $1",
        )
        .bind(json(settings)?),
        Change::PutDevice(d) => sqlx::query(
            "INSERT INTO devices (id, control_key, wg_key, name, ipv4, ipv6, body) VALUES ($1, $2, $3, $4, $5, $6, $7) \
             ON CONFLICT (id) DO UPDATE SET control_key = $2, wg_key = $3, name = $4, ipv4 = $5, ipv6 = $6, body = $7",
        )
        .bind(d.id.to_string())
        .bind(d.control.to_string())
        .bind(d.wg.to_string())
        .bind(d.name.clone())
        .bind(d.ipv4.to_string())
        .bind(d.ipv6.to_string())
        .bind(json(d)?),
        Change::RemoveDevice(id) => sqlx::query("DELETE FROM devices WHERE id = $1").bind(id.to_string()),
        Change::PutUser(user) => sqlx::query(
            "INSERT INTO users (id, email, body) VALUES ($1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET email = $2, body = $3",
        )
        .bind(user.id.to_string())
        .bind(user.email.clone())
        .bind(json(user)?),
        Change::RemoveUser(id) => sqlx::query("DELETE FROM users WHERE id = $1").bind(id.to_string()),
        Change::PutAuthKey(key) => sqlx::query(
            "INSERT INTO auth_keys (id, body) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET body = $2",
        )
        .bind(key.id.to_string())
        .bind(json(key)?),
        Change::RemoveAuthKey(id) => sqlx::query("DELETE FROM auth_keys WHERE id = $1").bind(id.to_string()),
        Change::PutApiToken(token) => sqlx::query(
            "INSERT INTO api_tokens (id, body) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET body = $2",
        )
        .bind(token.id.to_string())
        .bind(json(token)?),
        Change::RemoveApiToken(id) => {
            sqlx::query("DELETE FROM api_tokens WHERE id = $1").bind(id.to_string())
        }
        Change::PutRelay(relay) => sqlx::query(
            "INSERT INTO relays (id, name, body) VALUES ($1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET name = $2, body = $3",
        )
        .bind(relay.id.to_string())
        .bind(relay.name.clone())
        .bind(json(relay)?),
        Change::RemoveRelay(id) => sqlx::query("DELETE FROM relays WHERE id = $1").bind(id.to_string()),
        Change::PutPolicy(policy) => sqlx::query(
            "INSERT INTO policy (id, body) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET body = $1",
        )
        .bind(json(policy)?),
        Change::RemovePolicy => sqlx::query("DELETE FROM policy"),
        Change::Rest(addr, until) => sqlx::query(
            "INSERT INTO resting (addr, until_us) VALUES ($1, $2) ON CONFLICT (addr) DO UPDATE SET until_us = $2",
        )
        .bind(addr.to_string())
        .bind(until.as_micros()),
        Change::EndRest(addr) => sqlx::query("DELETE FROM resting WHERE addr = $1").bind(addr.to_string()),
    };
    query.execute(connection).await?;
    Ok(())
}

/// SQLite's primary result codes for a file that is no (sound) database: SQLITE_CORRUPT and SQLITE_NOTADB.
const DAMAGED: [i32; 2] = [11, 26];

/// SQLITE_FULL.
const FULL: i32 = 13;

/// SQLite's primary result code; extended codes keep it in their low byte.
fn code_of(error: &sqlx::Error) -> Option<i32> {
    let code = error.as_database_error()?.code()?.parse::<i32>().ok()?;
    Some(code & 0xff)
}

fn is_full(error: &sqlx::Error) -> bool {
    code_of(error) == Some(FULL)
}

fn classify(path: &str, error: sqlx::Error) -> StoreError {
    let damaged = code_of(&error).is_some_and(|code| DAMAGED.contains(&code));
    let why = error.as_database_error().map_or_else(|| error.to_string(), |e| e.message().to_owned());
    if damaged { StoreError::Corrupt { path: path.to_owned(), why } } else { StoreError::Unavailable(why) }
}
