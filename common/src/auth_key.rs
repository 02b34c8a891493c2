//! The text of an auth key: which network, which root key, which key, and the secret.
//!
//! Carrying the root key's fingerprint lets a device refuse any coordinator but the right one before it says anything.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use rand_core::{CryptoRng, RngCore};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::ids::{AuthKeyId, NetworkId};
use crate::keys::Fingerprint;

/// What an auth key's text begins with.
pub const AUTH_KEY_PREFIX: &str = "wkey-";
const BYTES: usize = 16 + 32 + 16 + 32;

/// An auth key as a person or a provisioning script holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthKey {
    /// The network it admits to.
    pub network: NetworkId,
    /// Fingerprint of that network's root key.
    pub root: Fingerprint,
    /// Which key it is.
    pub id: AuthKeyId,
    /// What proves possession.
    pub secret: AuthKeySecret,
}

/// 256 random bits; zeroised on drop, never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct AuthKeySecret([u8; 32]);

impl AuthKeySecret {
    /// A fresh secret.
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// What is stored of it at rest. The secret has 256 bits of entropy, so a plain hash is enough.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::new().chain_update(b"warren auth key v1\0").chain_update(self.0).finalize().into()
    }
}

/// Why a text is not an auth key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an auth key: expected `{AUTH_KEY_PREFIX}` followed by 128 characters, as `warren-coordinator auth-key create` prints it; was it cut when it was copied?"
)]
pub struct ParseAuthKeyError;

impl fmt::Debug for AuthKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthKey({}, redacted)", self.id)
    }
}

impl fmt::Debug for AuthKeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthKeySecret(redacted)")
    }
}

impl AuthKey {
    /// The text to hand out: the only place where the secret is shown.
    pub fn expose(&self) -> String {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend_from_slice(&self.network.to_bytes());
        bytes.extend_from_slice(self.root.as_bytes());
        bytes.extend_from_slice(&self.id.to_bytes());
        bytes.extend_from_slice(&self.secret.0);
        let text = format!("{AUTH_KEY_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes));
        bytes.zeroize();
        text
    }
}

impl FromStr for AuthKey {
    type Err = ParseAuthKeyError;

    fn from_str(text: &str) -> Result<Self, ParseAuthKeyError> {
        let body = text.trim().strip_prefix(AUTH_KEY_PREFIX).ok_or(ParseAuthKeyError)?;
        let mut bytes = BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|_| ParseAuthKeyError)?;
        let key = (|| {
            let (network, rest) = bytes.split_first_chunk::<16>()?;
            let (root, rest) = rest.split_first_chunk::<32>()?;
            let (id, rest) = rest.split_first_chunk::<16>()?;
            let secret = <[u8; 32]>::try_from(rest).ok()?;
            Some(Self {
                network: NetworkId::from_bytes(*network),
                root: Fingerprint::from_bytes(*root),
                id: AuthKeyId::from_bytes(*id),
                secret: AuthKeySecret(secret),
            })
        })();
        bytes.zeroize();
        key.ok_or(ParseAuthKeyError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    #[test]
    fn text_round_trips_and_a_cut_one_is_refused() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let key = AuthKey {
            network: NetworkId::generate(1, &mut rng),
            root: Fingerprint::from_bytes([5; 32]),
            id: AuthKeyId::generate(1, &mut rng),
            secret: AuthKeySecret::generate(&mut rng),
        };
        let text = key.expose();
        assert_eq!(text.len(), AUTH_KEY_PREFIX.len() + 128);
        assert_eq!(text.parse(), Ok(key.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(key.clone()));
        assert_eq!(text[..text.len() - 4].parse::<AuthKey>(), Err(ParseAuthKeyError));
        assert!(!format!("{key:?}").contains(&text[100..]));
    }
}
