//! The coordinator's three secrets, as files of mode 0600 in the state directory, and the identity they make.
//!
//! They are not in the database: who steals a copy of it can't sign anything.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use data_encoding::BASE64URL_NOPAD;
use rand_core::{CryptoRng, RngCore};
use warren_common::keys::{ControlSecretKey, KEY_LEN, NetmapSecretKey, RootSecretKey};
use warren_common::wire::control::{CoordinatorIdentity, Signed};
use zeroize::Zeroizing;

use crate::domain::Settings;
use crate::os;

/// The network's keys.
#[derive(Debug)]
pub struct Keys {
    /// Names the network; signs the identity.
    pub root: RootSecretKey,
    /// Noise static key.
    pub control: ControlSecretKey,
    /// Signs netmaps and relay tokens.
    pub netmap: NetmapSecretKey,
}

/// Why the keys can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file can't be read or written.
    #[error("can't use the key file {path}: {why}; check the owner and mode of the state directory")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
    /// The file holds no key.
    #[error("the key file {0} is damaged: restore it from a backup, every agent has pinned it")]
    Damaged(PathBuf),
    /// The database is another network's.
    #[error(
        "the key files in {0} belong to another network than the database: restore both from the same backup"
    )]
    OtherNetwork(PathBuf),
    /// The database is there but a key file is not.
    #[error("the key file {0} is missing: restore it from a backup, every agent has pinned it")]
    Missing(PathBuf),
}

const PREFIX: &str = "secret:";

impl Keys {
    /// Reads the keys in `dir`. Those that are missing are made if `fresh`, that is if there is no network yet.
    ///
    /// # Errors
    /// A file can't be read, written or understood, or is missing though there is a network.
    pub fn load(dir: &Path, fresh: bool, rng: &mut (impl RngCore + CryptoRng)) -> Result<Self, KeyError> {
        let mut key = |name: &str| -> Result<[u8; KEY_LEN], KeyError> {
            let path = dir.join(name);
            let io = |why| KeyError::Io { path: path.clone(), why };
            match fs::read_to_string(&path).map(Zeroizing::new) {
                Ok(text) => decode(&text).ok_or(KeyError::Damaged(path)),
                Err(error) if error.kind() == ErrorKind::InvalidData => Err(KeyError::Damaged(path)),
                Err(error) if error.kind() != ErrorKind::NotFound => Err(io(error)),
                Err(_) if !fresh => Err(KeyError::Missing(path)),
                Err(_) => {
                    let mut bytes = [0; KEY_LEN];
                    rng.fill_bytes(&mut bytes);
                    let text = Zeroizing::new(format!("{PREFIX}{}\n", BASE64URL_NOPAD.encode(&bytes)));
                    os::write_private(&path, text.as_bytes()).map_err(io)?;
                    Ok(bytes)
                }
            }
        };
        Ok(Self {
            root: RootSecretKey::from_bytes(key("root.key")?),
            control: ControlSecretKey::from_bytes(key("control.key")?),
            netmap: NetmapSecretKey::from_bytes(key("netmap.key")?),
        })
    }

    /// The root-signed document that each connection begins with.
    pub fn identity(&self, settings: &Settings) -> Signed {
        CoordinatorIdentity {
            network: settings.network,
            network_name: settings.name.clone(),
            root: self.root.public(),
            control: self.control.public(),
            netmap: self.netmap.public(),
            epoch: settings.epoch,
        }
        .sign(&self.root)
    }
}

fn decode(text: &str) -> Option<[u8; KEY_LEN]> {
    let bytes =
        BASE64URL_NOPAD.decode(text.trim().strip_prefix(PREFIX)?.as_bytes()).ok().map(Zeroizing::new)?;
    bytes.as_slice().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    #[test]
    fn keys_are_made_once_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        assert!(matches!(Keys::load(dir.path(), false, &mut rng), Err(KeyError::Missing(_))));
        let first = Keys::load(dir.path(), true, &mut rng).unwrap();
        let again = Keys::load(dir.path(), false, &mut rng).unwrap();
        assert_eq!(first.root.public(), again.root.public());
        assert_ne!(first.root.expose(), first.netmap.expose());
        fs::write(dir.path().join("netmap.key"), "secret:short").unwrap();
        assert!(matches!(Keys::load(dir.path(), true, &mut rng), Err(KeyError::Damaged(_))));
        fs::write(dir.path().join("netmap.key"), [0xff, 0xfe]).unwrap();
        assert!(matches!(Keys::load(dir.path(), true, &mut rng), Err(KeyError::Damaged(_))));
    }
}
