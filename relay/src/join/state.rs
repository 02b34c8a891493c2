//! What a relay of its own remembers: which relay of which network it is, and the key that proves it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};
use warren_common::ids::{NetworkId, RelayId};
use warren_common::keys::{ControlSecretKey, Fingerprint};
use warren_common::wire::relay_control::{RelayJoinKey, RelayJoinSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::os::OsRng;
use crate::tls::write_private;

const FILE: &str = "relay.json";
const LOCK: &str = "lock";
const VERSION: u32 = 1;

/// Why the state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process serves from it.
    #[error("another relay runs with the state directory {0}: stop it, or choose another directory")]
    InUse(PathBuf),
    /// The file holds something else.
    #[error(
        "{path} is not a relay's state: {why}. Restore it from a backup, or remove it and join with a new key"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// There is neither state nor key.
    #[error(
        "this relay has not joined yet and there is no join key: make one with `warren-coordinator relay create NAME` and give it with --join-key"
    )]
    NoJoinKey,
    /// The state and the key are of two relays.
    #[error(
        "the state directory belongs to relay {ours}, the join key is for {theirs}: choose another --state-dir for another relay"
    )]
    OtherRelay {
        /// The state's.
        ours: RelayId,
        /// The key's.
        theirs: RelayId,
    },
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    network: NetworkId,
    root: Fingerprint,
    relay: RelayId,
    secret: SecretText,
    joined: bool,
}

/// Base 64 of the key; zeroised on drop.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
struct SecretText(String);

/// The state, and the lock that keeps it ours.
pub struct State {
    path: PathBuf,
    stored: Stored,
    secret: ControlSecretKey,
    join_secret: Option<RelayJoinSecret>,
    _lock: File,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("relay", &self.stored.relay).finish_non_exhaustive()
    }
}

impl State {
    /// Takes the directory; a first start writes the identity there before anything is sent.
    ///
    /// # Errors
    /// It is damaged, in use, another relay's, or can't be read or written.
    pub fn open(dir: &Path, join_key: Option<&RelayJoinKey>) -> Result<Self, StateError> {
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::File { path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(file(dir))?;
        let lock_path = dir.join(LOCK);
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(file(&lock_path))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StateError::InUse(dir.to_owned()),
            TryLockError::Error(source) => StateError::File { path: lock_path, source },
        })?;

        let path = dir.join(FILE);
        let corrupt = |why: String| StateError::Corrupt { path: path.clone(), why };
        let stored = match fs::read(&path).map(Zeroizing::new) {
            Ok(bytes) => serde_json::from_slice::<Stored>(&bytes).map_err(|e| corrupt(e.to_string()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = join_key.ok_or(StateError::NoJoinKey)?;
                let secret = ControlSecretKey::generate(&mut OsRng);
                let stored = Stored {
                    version: VERSION,
                    network: key.network,
                    root: key.root,
                    relay: key.relay,
                    secret: SecretText(BASE64URL_NOPAD.encode(secret.expose())),
                    joined: false,
                };
                save(&path, &stored)?;
                stored
            }
            Err(source) => return Err(file(&path)(source)),
        };
        if stored.version != VERSION {
            return Err(corrupt(format!("version {} is not {VERSION}", stored.version)));
        }
        let secret = BASE64URL_NOPAD.decode(stored.secret.0.as_bytes()).map(Zeroizing::new);
        let secret = secret.ok().and_then(|bytes| <[u8; 32]>::try_from(bytes.as_slice()).ok());
        let secret = ControlSecretKey::from_bytes(secret.ok_or_else(|| corrupt("no secret key".to_owned()))?);
        if let Some(key) = join_key.filter(|key| key.relay != stored.relay) {
            return Err(StateError::OtherRelay { ours: stored.relay, theirs: key.relay });
        }
        if join_key.is_none() && !stored.joined {
            return Err(StateError::NoJoinKey);
        }
        let join_secret = join_key.filter(|_| !stored.joined).map(|key| key.secret.clone());
        Ok(Self { path, stored, secret, join_secret, _lock: lock })
    }

    /// The coordinator has welcomed us: the key binds us from now on, the join key has done its work.
    pub(super) fn joined(&mut self) -> Result<(), StateError> {
        if !self.stored.joined {
            self.stored.joined = true;
            save(&self.path, &self.stored)?;
            self.join_secret = None;
        }
        Ok(())
    }

    pub(super) const fn network(&self) -> NetworkId {
        self.stored.network
    }

    pub(super) const fn root(&self) -> &Fingerprint {
        &self.stored.root
    }

    pub(super) const fn relay(&self) -> RelayId {
        self.stored.relay
    }

    pub(super) const fn secret(&self) -> &ControlSecretKey {
        &self.secret
    }

    /// As long as it is needed.
    pub(super) const fn join_secret(&self) -> Option<&RelayJoinSecret> {
        self.join_secret.as_ref()
    }
}

fn save(path: &Path, stored: &Stored) -> Result<(), StateError> {
    let file = |source| StateError::File { path: path.to_owned(), source };
    let bytes = Zeroizing::new(serde_json::to_vec_pretty(stored).map_err(|e| file(e.into()))?);
    write_private(path, &bytes).map_err(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn key(relay: u8) -> RelayJoinKey {
        RelayJoinKey {
            network: NetworkId::from_bytes([1; 16]),
            root: Fingerprint::from_bytes([2; 32]),
            relay: RelayId::from_bytes([relay; 16]),
            secret: RelayJoinSecret::from_slice(&[4; 32]).unwrap(),
        }
    }

    #[test]
    fn the_key_is_needed_until_welcomed_and_the_identity_stays() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(State::open(dir.path(), None), Err(StateError::NoJoinKey)));
        let first = State::open(dir.path(), Some(&key(3))).unwrap();
        let public = first.secret().public();
        assert!(first.join_secret().is_some());
        assert!(matches!(State::open(dir.path(), Some(&key(3))), Err(StateError::InUse(_))));
        drop(first);
        // The welcome got lost: the same identity asks again, with the same secret.
        assert!(matches!(State::open(dir.path(), None), Err(StateError::NoJoinKey)));
        let mut again = State::open(dir.path(), Some(&key(3))).unwrap();
        assert_eq!(again.secret().public(), public);
        again.joined().unwrap();
        assert!(again.join_secret().is_none());
        drop(again);
        let later = State::open(dir.path(), None).unwrap();
        assert_eq!((later.secret().public(), later.relay()), (public, key(3).relay));
        drop(later);
        assert!(matches!(State::open(dir.path(), Some(&key(9))), Err(StateError::OtherRelay { .. })));
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_corrupt_state_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(State::open(dir.path(), Some(&key(3))).unwrap());
        let path = dir.path().join(FILE);
        let good = fs::read_to_string(&path).unwrap();
        for bad in [
            String::new(),
            good[..good.len() / 2].to_owned(),
            good.replace("\"version\": 1", "\"version\": 9"),
        ] {
            fs::write(&path, &bad).unwrap();
            assert!(
                matches!(State::open(dir.path(), Some(&key(3))), Err(StateError::Corrupt { .. })),
                "{bad}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), bad);
        }
    }
}
