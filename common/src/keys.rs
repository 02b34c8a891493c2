//! Key types. A device has three X25519 pairs (control, WireGuard, probe); a network has Ed25519 pairs (root, netmap).
//!
//! Secret keys are zeroised on drop and never printed. Every type is distinct, so that a key can't be used for
//! another purpose by accident. Text is a prefix that names the type and unpadded URL-safe base 64.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use ed25519_dalek::Signer as _;
use rand_core::{CryptoRng, RngCore};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of every key here, secret or public.
pub const KEY_LEN: usize = 32;
/// Bytes of an Ed25519 signature (RFC 8032).
pub const SIGNATURE_LEN: usize = 64;

/// Why a text is not a key of the wanted type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {what}: expected `{prefix}` followed by 43 characters of URL-safe base 64")]
pub struct ParseKeyError {
    /// The kind of key wanted.
    pub what: &'static str,
    /// The prefix it must begin with.
    pub prefix: &'static str,
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// What the text form begins with.
            pub const PREFIX: &'static str = $prefix;

            /// The key with these bytes.
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// The key's bytes.
            pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// The key in `bytes`, if there are exactly 32 of them.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}", Self::PREFIX, BASE64URL_NOPAD.encode_display(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseKeyError;

            fn from_str(text: &str) -> Result<Self, ParseKeyError> {
                decode_key(text, $prefix).map(Self).ok_or(ParseKeyError { what: $what, prefix: $prefix })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

fn decode_key(text: &str, prefix: &str) -> Option<[u8; KEY_LEN]> {
    let mut decoded = BASE64URL_NOPAD.decode(text.strip_prefix(prefix)?.as_bytes()).ok()?;
    let key = decoded.as_slice().try_into().ok();
    decoded.zeroize();
    key
}

macro_rules! secret_key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// A fresh key.
            pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
                let mut bytes = [0; KEY_LEN];
                rng.fill_bytes(&mut bytes);
                Self(bytes)
            }

            /// The key with these bytes.
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// The secret itself: for the primitive that uses it and the file that keeps it.
            pub const fn expose(&self) -> &[u8; KEY_LEN] {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(redacted)"))
            }
        }
    };
}

macro_rules! x25519_pair {
    ($secret:ident, $public:ident) => {
        impl $secret {
            /// The public half.
            pub fn public(&self) -> $public {
                let secret = x25519_dalek::StaticSecret::from(self.0);
                $public(x25519_dalek::PublicKey::from(&secret).to_bytes())
            }

            /// X25519 (RFC 7748) with `theirs`. `None` if the result is all zero, as low-order points make it.
            pub fn diffie_hellman(&self, theirs: &$public) -> Option<SharedSecret> {
                let secret = x25519_dalek::StaticSecret::from(self.0);
                let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(theirs.0));
                shared.was_contributory().then(|| SharedSecret(shared.to_bytes()))
            }
        }
    };
}

secret_key!(
    /// The secret that names a device to its coordinator (Noise static key).
    ControlSecretKey
);
public_key!(
    /// A device's or a coordinator's Noise static key.
    ControlPublicKey, "ctl:", "control key"
);
x25519_pair!(ControlSecretKey, ControlPublicKey);

secret_key!(
    /// A device's WireGuard static secret.
    WgSecretKey
);
public_key!(
    /// A device's WireGuard static public key.
    WgPublicKey, "wg:", "WireGuard key"
);
x25519_pair!(WgSecretKey, WgPublicKey);

secret_key!(
    /// The secret that authenticates a device's probes and its use of relay tokens.
    ProbeSecretKey
);
public_key!(
    /// A device's probe key.
    ProbePublicKey, "prb:", "probe key"
);
x25519_pair!(ProbeSecretKey, ProbePublicKey);

secret_key!(
    /// The result of a key agreement: input for a key derivation, never a key itself.
    SharedSecret
);
public_key!(
    /// The Ed25519 key that names a network and vouches for its coordinator's keys.
    RootPublicKey, "root:", "root key"
);
public_key!(
    /// The Ed25519 key that netmaps and relay tokens are signed with.
    NetmapPublicKey, "map:", "netmap key"
);

/// What a signature is for; prefixed to the signed bytes so that one kind can never pass as another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureDomain {
    /// A coordinator's identity document, by the root key.
    CoordinatorIdentity,
    /// A netmap update, by the netmap key.
    Netmap,
    /// A relay token, by the netmap key.
    RelayToken,
}

impl SignatureDomain {
    const fn tag(self) -> &'static [u8] {
        match self {
            Self::CoordinatorIdentity => b"warren coordinator identity v1\0",
            Self::Netmap => b"warren netmap update v1\0",
            Self::RelayToken => b"warren relay token v1\0",
        }
    }

    fn message(self, bytes: &[u8]) -> Vec<u8> {
        [self.tag(), bytes].concat()
    }
}

macro_rules! ed25519_pair {
    ($(#[$doc:meta])* $secret:ident, $public:ident) => {
        $(#[$doc])*
        // The pair, since working out the public half costs as much as a signature. Zeroised on drop by the library.
        #[derive(Clone)]
        pub struct $secret(ed25519_dalek::SigningKey);

        impl $secret {
            /// A fresh key.
            pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
                let mut bytes = Zeroizing::new([0; KEY_LEN]);
                rng.fill_bytes(bytes.as_mut());
                Self(ed25519_dalek::SigningKey::from_bytes(&bytes))
            }

            /// The key with these bytes.
            pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(ed25519_dalek::SigningKey::from_bytes(&Zeroizing::new(bytes)))
            }

            /// The secret itself: for the file that keeps it.
            pub fn expose(&self) -> &[u8; KEY_LEN] {
                self.0.as_bytes()
            }

            /// The public half.
            pub fn public(&self) -> $public {
                $public(self.0.verifying_key().to_bytes())
            }

            /// Signs `bytes` (as they will be sent) for `domain`.
            pub fn sign(&self, domain: SignatureDomain, bytes: &[u8]) -> [u8; SIGNATURE_LEN] {
                self.0.sign(&domain.message(bytes)).to_bytes()
            }
        }

        impl fmt::Debug for $secret {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($secret), "(redacted)"))
            }
        }

        impl $public {
            /// True if `signature` is this key's over `bytes` for `domain` (strict verification, RFC 8032).
            #[must_use]
            pub fn verify(&self, domain: SignatureDomain, bytes: &[u8], signature: &[u8]) -> bool {
                let (Ok(key), Ok(signature)) = (
                    ed25519_dalek::VerifyingKey::from_bytes(&self.0),
                    ed25519_dalek::Signature::from_slice(signature),
                ) else {
                    return false;
                };
                key.verify_strict(&domain.message(bytes), &signature).is_ok()
            }
        }
    };
}

ed25519_pair!(
    /// The Ed25519 secret that names a network.
    RootSecretKey,
    RootPublicKey
);
ed25519_pair!(
    /// The Ed25519 secret that signs netmaps and relay tokens.
    NetmapSecretKey,
    NetmapPublicKey
);

impl RootPublicKey {
    /// What auth keys carry and people compare: the SHA-256 of the key.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(Sha256::digest(self.0).into())
    }
}

public_key!(
    /// The SHA-256 of a network's root key.
    Fingerprint, "sha256:", "coordinator fingerprint"
);

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    fn rng() -> ChaCha20Rng {
        ChaCha20Rng::seed_from_u64(7)
    }

    #[test]
    fn secrets_are_redacted_in_debug() {
        let secret = WgSecretKey::from_bytes([0xAB; 32]);
        assert_eq!(format!("{secret:?}"), "WgSecretKey(redacted)");
    }

    #[test]
    fn agreement_is_symmetric_and_refuses_low_order_points() {
        let (a, b) = (ProbeSecretKey::generate(&mut rng()), ProbeSecretKey::from_bytes([9; 32]));
        let (ab, ba) = (a.diffie_hellman(&b.public()).unwrap(), b.diffie_hellman(&a.public()).unwrap());
        assert_eq!(ab.expose(), ba.expose());
        assert!(a.diffie_hellman(&ProbePublicKey::from_bytes([0; 32])).is_none());
    }

    #[test]
    fn a_signature_is_good_for_its_domain_and_bytes_only() {
        let key = NetmapSecretKey::generate(&mut rng());
        let signature = key.sign(SignatureDomain::Netmap, b"hello");
        assert!(key.public().verify(SignatureDomain::Netmap, b"hello", &signature));
        assert!(!key.public().verify(SignatureDomain::RelayToken, b"hello", &signature));
        assert!(!key.public().verify(SignatureDomain::Netmap, b"hellp", &signature));
        assert!(!key.public().verify(SignatureDomain::Netmap, b"hello", &signature[..63]));
    }

    #[test]
    fn text_round_trips_and_another_kind_is_refused() {
        let key = WgSecretKey::generate(&mut rng()).public();
        assert_eq!(key.to_string().parse(), Ok(key));
        assert!(key.to_string().parse::<ProbePublicKey>().is_err());
        assert!("wg:short".parse::<WgPublicKey>().is_err());
    }
}
