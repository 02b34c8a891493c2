//! Tokens of the HTTP API: made by an administrator on the coordinator's host, kept as hashes, always with an end.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use data_encoding::BASE64URL_NOPAD;
use rand_core::{CryptoRng, RngCore};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use warren_common::ids::ApiTokenId;
use warren_common::time::UnixTime;
use zeroize::{Zeroize as _, Zeroizing};

use super::apply::{Decision, done, not_found};
use super::command::{Refusal, Reply};
use super::name::MAX_NAME;
use super::{Change, State};

/// What a token's text begins with.
pub const API_TOKEN_PREFIX: &str = "wapi-";
/// Most tokens kept at a time, ended ones included.
pub const MAX_API_TOKENS: usize = 1_024;
/// How long a token works unless told otherwise.
pub const DEFAULT_API_TOKEN_LIFE: Duration = Duration::from_secs(90 * 24 * 3_600);
/// The longest life a token may have: a year and a day, so that a yearly rotation has time.
pub const MAX_API_TOKEN_LIFE: Duration = Duration::from_secs(366 * 24 * 3_600);
/// How long a token's record outlives it, so that `api-token list` shows what has just stopped working.
const MEMORY: Duration = Duration::from_secs(7 * 24 * 3_600);
const BYTES: usize = 16 + 32;

/// A token as its user holds it: 256 random bits and the id they belong to. Zeroised on drop, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiToken {
    /// Which token it is.
    pub id: ApiTokenId,
    secret: Zeroizing<[u8; 32]>,
}

/// What a new token is good for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewApiToken {
    /// What it is for, for people.
    pub name: String,
    /// It may change things, not only read.
    pub write: bool,
    /// How long it works; [`DEFAULT_API_TOKEN_LIFE`] if `None`.
    pub life: Option<Duration>,
}

/// A token at rest: its secret is a hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenRecord {
    /// Its id.
    pub id: ApiTokenId,
    /// What it is for, for people.
    pub name: String,
    /// Hash of its secret.
    pub hash: [u8; 32],
    /// It may change things, not only read.
    pub write: bool,
    /// When it was made.
    pub created: UnixTime,
    /// Until when it works.
    pub expires: UnixTime,
}

/// Why a text is not a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an API token: expected `{API_TOKEN_PREFIX}` and 64 characters, as `warren-coordinator api-token create` prints it"
)]
pub struct ParseApiTokenError;

impl ApiToken {
    fn generate(now: UnixTime, rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let id = ApiTokenId::generate(now.as_millis(), rng);
        let mut secret = Zeroizing::new([0; 32]);
        rng.fill_bytes(secret.as_mut());
        Self { id, secret }
    }

    /// The text to hand out: the only place where the secret is shown.
    pub fn expose(&self) -> String {
        let mut bytes = [0; BYTES];
        bytes[..16].copy_from_slice(&self.id.to_bytes());
        bytes[16..].copy_from_slice(self.secret.as_ref());
        let text = format!("{API_TOKEN_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes));
        bytes.zeroize();
        text
    }

    /// What is stored of it. The secret has 256 bits of entropy, so a plain hash is enough.
    fn hash(&self) -> [u8; 32] {
        Sha256::new()
            .chain_update(b"warren api token v1\0")
            .chain_update(self.secret.as_ref())
            .finalize()
            .into()
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiToken({}, redacted)", self.id)
    }
}

impl FromStr for ApiToken {
    type Err = ParseApiTokenError;

    fn from_str(text: &str) -> Result<Self, ParseApiTokenError> {
        let body = text.strip_prefix(API_TOKEN_PREFIX).ok_or(ParseApiTokenError)?;
        let bytes =
            BASE64URL_NOPAD.decode(body.as_bytes()).map(Zeroizing::new).map_err(|_| ParseApiTokenError)?;
        let (id, secret) = bytes.split_first_chunk::<16>().ok_or(ParseApiTokenError)?;
        let secret = <[u8; 32]>::try_from(secret).map_err(|_| ParseApiTokenError)?;
        Ok(Self { id: ApiTokenId::from_bytes(*id), secret: Zeroizing::new(secret) })
    }
}

impl State {
    /// The record of a token that works at `now`.
    pub fn api_token(&self, given: &ApiToken, now: UnixTime) -> Option<&ApiTokenRecord> {
        let record = self.api_tokens().get(&given.id);
        // The hash is compared even for an unknown id, so that time doesn't tell which ids exist.
        let right = bool::from(given.hash().ct_eq(&record.map_or([0; 32], |r| r.hash)));
        record.filter(|r| right && now < r.expires)
    }

    pub(super) fn create_api_token(
        &self,
        new: &NewApiToken,
        now: UnixTime,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Decision {
        let name = new.name.trim();
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            let why = "expected a name of at most 63 bytes that says what it is for";
            return Err(Refusal::Invalid { what: "token name", text: new.name.clone(), why });
        }
        if self.api_tokens().values().any(|t| t.name == name && now < t.expires) {
            return Err(Refusal::Exists { what: "API token", name: name.to_owned() });
        }
        let life = new.life.unwrap_or(DEFAULT_API_TOKEN_LIFE);
        if life.is_zero() || life > MAX_API_TOKEN_LIFE {
            let why = "an API token lives between 1 second and 366 days";
            return Err(Refusal::Invalid { what: "life", text: format!("{}s", life.as_secs()), why });
        }
        if self.api_tokens().len() >= MAX_API_TOKENS {
            return Err(Refusal::TooMany { what: "API tokens", max: MAX_API_TOKENS });
        }
        let token = ApiToken::generate(now, rng);
        let record = ApiTokenRecord {
            id: token.id,
            name: name.to_owned(),
            hash: token.hash(),
            write: new.write,
            created: now,
            expires: now + life,
        };
        Ok((vec![Change::PutApiToken(Box::new(record))], Reply::ApiToken(token)))
    }

    pub(super) fn revoke_api_token(&self, id: ApiTokenId) -> Decision {
        let token = self.api_tokens().get(&id).ok_or_else(|| not_found("API token", &id))?;
        done(vec![Change::RemoveApiToken(token.id)])
    }

    /// What is to be forgotten of tokens.
    pub(super) fn old_api_tokens(&self, now: UnixTime) -> impl Iterator<Item = Change> + '_ {
        let old = self.api_tokens().values().filter(move |t| now >= t.expires + MEMORY);
        old.map(|t| Change::RemoveApiToken(t.id))
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    #[test]
    fn text_round_trips_and_debug_is_silent() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let token = ApiToken::generate(UnixTime::from_secs(1), &mut rng);
        let text = token.expose();
        assert_eq!(text.parse::<ApiToken>(), Ok(token.clone()));
        assert_eq!(text.len(), API_TOKEN_PREFIX.len() + 64);
        assert!(!format!("{token:?}").contains(&text[40..]));
        for bad in ["", "wapi-", &text[1..], &text[..text.len() - 1], &format!("{text}A")] {
            assert_eq!(bad.parse::<ApiToken>(), Err(ParseApiTokenError), "{bad}");
        }
    }
}
