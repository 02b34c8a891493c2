//! Where the state is kept. A write is one transaction, with the state's version as its optimistic lock.
//!
//! The domain decides in memory; the store takes the changes or says why not. What the memory publishes is what a
//! commit has made durable. [`Database`] chooses the engine; the contract tests run over [`Store`].

mod sqlite;

use std::path::{Path, PathBuf};

use warren_common::time::UnixTime;

use crate::domain::{Change, State};

pub use sqlite::{MAX_LOG, SqliteStore};

/// What a store does. Methods take `&mut self`: there is one writer.
pub trait Store: Send {
    /// Everything there is and its version; `None` in a new, empty store.
    fn load(&mut self) -> impl Future<Output = Result<Option<Loaded>, StoreError>> + Send;

    /// Makes `changes` durable, if the state is still at version `expected` (0 for an empty store). All or nothing.
    fn commit(
        &mut self,
        expected: u64,
        changes: &[Change],
        at: UnixTime,
    ) -> impl Future<Output = Result<Commit, StoreError>> + Send;

    /// Lets go of the store in good order; without it, it puts itself right when it is opened again.
    fn close(self) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// A stored state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Its version.
    pub version: u64,
    /// The state.
    pub state: State,
}

/// How a commit ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commit {
    /// Durable, as this version.
    Committed(u64),
    /// Another writer was first: nothing is changed. Absorb what it did and decide again.
    Conflict(Newer),
}

/// What another writer did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newer {
    /// The version that these lead to.
    pub version: u64,
    /// Its changes, in order.
    pub changes: Vec<Change>,
}

/// Why a store can't.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It may work again by itself: disk full, locked, I/O error. Nothing is half done.
    #[error("the database can't be written: {0}")]
    Unavailable(String),
    /// The database's contents make no sense.
    #[error(
        "the database {path} is damaged: {why}. Restore the newest backup of it, or move the file away to start a new network"
    )]
    Corrupt {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// It can't be opened at all.
    #[error("can't open the database {path}: {why}")]
    Open {
        /// The file.
        path: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// A URL names an engine that isn't there.
    #[error(
        "--database {0}: only SQLite is supported by this version; use sqlite:///path/to/file or leave --database out"
    )]
    Engine(String),
    /// Another writer is so far ahead that its changes are no longer in the log.
    #[error("another coordinator changed the database too much to catch up; restart this one")]
    TooFarBehind,
}

/// A store of whichever engine is configured.
#[derive(Debug)]
pub enum Database {
    /// SQLite, embedded.
    Sqlite(SqliteStore),
}

impl Database {
    /// The file of `--database`, or the default in the state directory.
    ///
    /// # Errors
    /// [`StoreError::Engine`] for anything but `sqlite:`.
    pub fn path_of(url: Option<&str>, state_dir: &Path) -> Result<PathBuf, StoreError> {
        let Some(url) = url else { return Ok(state_dir.join("warren.db")) };
        let path = url.strip_prefix("sqlite:").ok_or_else(|| StoreError::Engine(redact(url)))?;
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() || path.contains(['?', '#']) {
            return Err(StoreError::Engine(redact(url)));
        }
        Ok(PathBuf::from(path))
    }

    /// Opens the database, making or migrating it as needed.
    ///
    /// # Errors
    /// It can't be opened, is damaged, or was made by a newer version.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self::Sqlite(SqliteStore::open(path).await?))
    }
}

impl Store for Database {
    async fn load(&mut self) -> Result<Option<Loaded>, StoreError> {
        match self {
            Self::Sqlite(store) => store.load().await,
        }
    }

    async fn commit(
        &mut self,
        expected: u64,
        changes: &[Change],
        at: UnixTime,
    ) -> Result<Commit, StoreError> {
        match self {
            Self::Sqlite(store) => store.commit(expected, changes, at).await,
        }
    }

    async fn close(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.close().await,
        }
    }
}

/// A database URL without what may be a password.
fn redact(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://…@{host}"),
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sqlite_urls_name_a_file() {
        let dir = Path::new("/var/lib/x");
        let path = |url| Database::path_of(url, dir);
        assert_eq!(path(None).unwrap(), dir.join("warren.db"));
        assert_eq!(path(Some("sqlite:///a/b.db")).unwrap(), Path::new("/a/b.db"));
        assert_eq!(path(Some("sqlite:b.db")).unwrap(), Path::new("b.db"));
        for url in ["postgres://u:secret@db/x", "mysql:x", "sqlite:", "/a/b.db"] {
            let error = path(Some(url)).unwrap_err().to_string();
            assert!(error.contains("only SQLite") && !error.contains("secret"), "{error}");
        }
    }
}
