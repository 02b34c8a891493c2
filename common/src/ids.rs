//! Typed identifiers: 128 bits, 48 of creation time and 80 of randomness, so that they sort by age and never repeat.
//!
//! Text is a prefix that names the type and 26 characters of Crockford's base 32 in lower case: `dev_01j…`.
//! An id is a name, never a secret and never an address.

use std::fmt;
use std::str::FromStr;

use rand_core::RngCore;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const TEXT_LEN: usize = 26;

/// Why a text is not an id of the wanted type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text does not begin with the prefix of the wanted type.
    #[error("`{text}` is not a {what} id: it must begin with `{prefix}`")]
    Prefix {
        /// The text as given.
        text: String,
        /// The kind of thing wanted, such as `device`.
        what: &'static str,
        /// The prefix it must begin with.
        prefix: &'static str,
    },
    /// What follows the prefix is not 26 characters of base 32 within 128 bits.
    #[error(
        "`{text}` is not a {what} id: `{prefix}` must be followed by 26 characters of 0-9 a-z without i, l, o, u"
    )]
    Body {
        /// The text as given.
        text: String,
        /// The kind of thing wanted, such as `device`.
        what: &'static str,
        /// The prefix it begins with.
        prefix: &'static str,
    },
}

fn encode(bits: u128) -> [u8; TEXT_LEN] {
    let mut out = [0; TEXT_LEN];
    let mut rest = bits;
    for slot in out.iter_mut().rev() {
        *slot = ALPHABET[(rest & 31) as usize];
        rest >>= 5;
    }
    out
}

fn decode(text: &str) -> Option<u128> {
    if text.len() != TEXT_LEN || text.as_bytes()[0] > b'7' {
        return None; // 26 characters hold 130 bits: the first may use only three
    }
    text.bytes().try_fold(0u128, |acc, byte| {
        let value = ALPHABET.iter().position(|c| *c == byte)?;
        Some(acc << 5 | value as u128)
    })
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// What the text form begins with.
            pub const PREFIX: &'static str = $prefix;

            /// A new id made at `unix_ms` (milliseconds since the Unix epoch; the low 48 bits count).
            pub fn generate(unix_ms: u64, rng: &mut impl RngCore) -> Self {
                let mut bytes = [0; 16];
                rng.fill_bytes(&mut bytes[6..]);
                bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
                Self(bytes)
            }

            /// The id with exactly these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The 16 bytes, big endian.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0
            }

            /// The id in `bytes`, if there are exactly 16 of them.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Self::PREFIX)?;
                encode(u128::from_be_bytes(self.0)).iter().try_for_each(|c| write!(f, "{}", char::from(*c)))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let body = text.strip_prefix($prefix).ok_or_else(|| ParseIdError::Prefix {
                    text: text.to_owned(), what: $what, prefix: $prefix,
                })?;
                decode(body).map(|bits| Self(bits.to_be_bytes())).ok_or_else(|| ParseIdError::Body {
                    text: text.to_owned(), what: $what, prefix: $prefix,
                })
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

id_type!(
    /// One administrative domain.
    NetworkId, "net_", "network"
);
id_type!(
    /// One enrolled agent.
    DeviceId, "dev_", "device"
);
id_type!(
    /// A person, from an identity provider.
    UserId, "usr_", "user"
);
id_type!(
    /// A relay server.
    RelayId, "rly_", "relay"
);
id_type!(
    /// An auth key (the id is public, its secret is not part of it).
    AuthKeyId, "key_", "auth key"
);

id_type!(
    /// A token of the HTTP API; its secret is apart.
    ApiTokenId, "tok_", "API token"
);

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    #[test]
    fn text_round_trips_and_sorts_by_age() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let old = DeviceId::generate(1_000, &mut rng);
        let new = DeviceId::generate(1_001, &mut rng);
        assert!(old < new && old.to_string() < new.to_string());
        assert_eq!(old.to_string().parse(), Ok(old));
        assert_eq!(DeviceId::from_bytes([0xff; 16]).to_string(), "dev_7zzzzzzzzzzzzzzzzzzzzzzzzz");
    }

    #[test]
    fn wrong_prefix_and_body_are_named() {
        let error = "usr_00000000000000000000000000".parse::<DeviceId>().unwrap_err();
        assert!(matches!(error, ParseIdError::Prefix { prefix: "dev_", .. }));
        for body in [
            "",
            "0000000000000000000000000",
            "80000000000000000000000000",
            "0000000000000000000000000u",
            "é000000000000000000000000",
        ] {
            assert!(
                matches!(format!("dev_{body}").parse::<DeviceId>(), Err(ParseIdError::Body { .. })),
                "{body}"
            );
        }
    }
}
