//! Between a relay and its coordinator: how a relay joins, and hears whose access has changed (docs/wire.md).
//!
//! The session is that of [`super::session`], over a WebSocket at `/relay/v1`, binary messages: the coordinator sends its
//! root-signed identity, then the Noise handshake, then these messages, one per session message. The relay's Noise static
//! key is its identity from then on. The key that verifies tokens comes from the root-signed identity.
//!
//! 1. The relay says `Hello`: its id, and the secret of its join key as long as no `Welcome` has come back. The first use
//!    of the secret binds the relay's Noise key to the id in one transaction; the same secret with the same key again is
//!    answered like the first time (a lost reply burns nothing), with another key it is refused.
//! 2. The coordinator answers `Welcome`, or `Refused` and closes.
//! 3. The relay says `Report`: where it can be reached and its certificate's hash, for the netmaps; again when it changes.
//! 4. The coordinator sends a `Command` whenever a device loses something. The relay has obeyed when its `Ack` comes.
//!    Commands are kept by the relay for the longest life of a token; after that no older token exists.
//!
//! A *peer relay* is a device that a grant lets relay. It needs no session of its own: it offers itself in its
//! [`super::control::Report`], is told by [`RelayDuty`] whether and as which relay to serve, and hears `Command`s, all in
//! its control session, in order.
//!
//! A relay that was away can't have heard of changes: `Hello.revision` is the newest command it obeyed and
//! `Welcome.floor` the revision that all tokens must have from now on (0: it missed nothing).

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use prost::Message;
use rand_core::{CryptoRng, RngCore};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::control::{Ping, Pong, Refused};
use crate::ids::{DeviceId, NetworkId, RelayId};
use crate::keys::Fingerprint;

/// Where a coordinator accepts relays.
pub const PATH: &str = "/relay/v1";
/// What a join key's text begins with.
pub const JOIN_KEY_PREFIX: &str = "wrelay-";
/// Most addresses of a kind that a relay may report; more are refused as malformed.
pub const MAX_ADDRS: usize = 8;
/// Most devices in one command; a coordinator sends several, or raises the floor.
pub const MAX_COMMAND_DEVICES: usize = 1_024;

const BYTES: usize = 16 + 32 + 16 + 32;

/// From a relay to its coordinator.
#[derive(Clone, PartialEq, Message)]
pub struct RelayMessage {
    /// What it says. Unknown kinds decode as `None` and are ignored.
    #[prost(oneof = "RelayBody", tags = "1, 2, 3, 4")]
    pub body: Option<RelayBody>,
}

/// What a relay can say.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum RelayBody {
    /// First of all: who it is.
    #[prost(message, tag = "1")]
    Hello(RelayHello),
    /// Where it can be reached.
    #[prost(message, tag = "2")]
    Report(RelayReport),
    /// A command is obeyed.
    #[prost(message, tag = "3")]
    Ack(RelayAck),
    /// Are you there?
    #[prost(message, tag = "4")]
    Ping(Ping),
}

/// Who a relay is. Its Noise static key must be the one bound to the id, or be bound by the secret now.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct RelayHello {
    /// Its id (in the join key), 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub relay: Vec<u8>,
    /// The join key's secret, 32 bytes; empty once it was welcomed.
    #[prost(bytes = "vec", tag = "2")]
    pub secret: Vec<u8>,
    /// Its version.
    #[prost(string, tag = "3")]
    pub version: String,
    /// The newest [`RelayCommand::revision`] it has obeyed since it started; 0 for none.
    #[prost(uint64, tag = "4")]
    pub revision: u64,
}

/// Without the join key's secret.
impl fmt::Debug for RelayHello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { relay, secret: _, version, revision } = self;
        let mut shown = f.debug_struct("RelayHello");
        shown
            .field("relay", relay)
            .field("version", version)
            .field("revision", revision)
            .finish_non_exhaustive()
    }
}

/// Where a relay can be reached.
#[derive(Clone, PartialEq, Message)]
pub struct RelayReport {
    /// `address:port` of QUIC (UDP) and TLS (TCP). Empty: the address the coordinator sees, with [`RelayReport::port`].
    #[prost(string, repeated, tag = "1")]
    pub addrs: Vec<String>,
    /// `address:port` of STUN. Empty: the address the coordinator sees, with [`RelayReport::stun_port`].
    #[prost(string, repeated, tag = "2")]
    pub stun: Vec<String>,
    /// SHA-256 of its certificate (DER), 32 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub cert_sha256: Vec<u8>,
    /// The port it listens on.
    #[prost(uint32, tag = "4")]
    pub port: u32,
    /// The port it answers STUN on; 0 for none.
    #[prost(uint32, tag = "5")]
    pub stun_port: u32,
    /// It shuts down soon: give its name to nobody new.
    #[prost(bool, tag = "6")]
    pub draining: bool,
}

/// A command is obeyed: the relay takes and hands out nothing any more that it forbids. What a transport had already taken
/// to write (some 32 KiB per receiver, and the kernel's buffer) may still arrive, within milliseconds on a path that flows.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RelayAck {
    /// The command's revision.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
}

/// From a coordinator to a relay.
#[derive(Clone, PartialEq, Message)]
pub struct RelayServerMessage {
    /// What it says. Unknown kinds decode as `None` and are ignored.
    #[prost(oneof = "RelayServerBody", tags = "1, 2, 3, 4")]
    pub body: Option<RelayServerBody>,
}

/// What a coordinator can say to a relay.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum RelayServerBody {
    /// The relay is in.
    #[prost(message, tag = "1")]
    Welcome(RelayWelcome),
    /// It is not; the session ends. Codes as in [`super::control::RefusedCode`].
    #[prost(message, tag = "2")]
    Refused(Refused),
    /// Somebody's access has changed.
    #[prost(message, tag = "3")]
    Command(RelayCommand),
    /// Answer to `Ping`.
    #[prost(message, tag = "4")]
    Pong(Pong),
}

/// The relay is in.
#[derive(Clone, PartialEq, Message)]
pub struct RelayWelcome {
    /// The relay's name, for its log.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The revision that every token must have from now on; 0 changes nothing.
    #[prost(uint64, tag = "2")]
    pub floor: u64,
    /// The coordinator's clock in microseconds since the Unix epoch: a relay whose own is off says so.
    #[prost(int64, tag = "3")]
    pub unix_us: i64,
}

/// Somebody's access has changed. Obeyed as a whole, in order, before the `Ack`.
#[derive(Clone, PartialEq, Message)]
pub struct RelayCommand {
    /// The coordinator's revision that it belongs to; never goes down.
    #[prost(uint64, tag = "1")]
    pub revision: u64,
    /// Devices that need a token of at least a revision. Forwarding from and to them stops until they present one.
    #[prost(message, repeated, tag = "2")]
    pub minimums: Vec<MinimumRevision>,
    /// Devices that are out: their connections end, no token of theirs counts. 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub revoked: Vec<Vec<u8>>,
    /// The revision that every token must have from now on; 0 changes nothing.
    #[prost(uint64, tag = "4")]
    pub floor: u64,
}

impl RelayCommand {
    /// Tokens of `devices` count only from `revision` on, and `revoked` devices are out. Names them one by one while they
    /// fit; for more, nobody's older token counts.
    pub fn restrict(revision: u64, devices: &[DeviceId], revoked: &[DeviceId]) -> Self {
        if devices.len() + revoked.len() > MAX_COMMAND_DEVICES {
            return Self { revision, floor: revision, ..Self::default() };
        }
        let minimum = |d: &DeviceId| MinimumRevision { device: d.to_bytes().to_vec(), revision };
        Self {
            revision,
            minimums: devices.iter().map(minimum).collect(),
            revoked: revoked.iter().map(|d| d.to_bytes().to_vec()).collect(),
            floor: 0,
        }
    }
}

/// A device needs a newer token.
#[derive(Clone, PartialEq, Message)]
pub struct MinimumRevision {
    /// The device, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// The lowest revision its token may have.
    #[prost(uint64, tag = "2")]
    pub revision: u64,
}

/// A device offers to relay, should policy let it.
#[derive(Clone, PartialEq, Message)]
pub struct RelayOffer {
    /// `address:port` where it would listen: QUIC and plain UDP on UDP, TLS on TCP. At most [`MAX_ADDRS`].
    #[prost(string, repeated, tag = "1")]
    pub addrs: Vec<String>,
    /// SHA-256 of its certificate (DER), 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub cert_sha256: Vec<u8>,
}

/// What an offer has come to: the first answer to it in a session, and news after that.
#[derive(Clone, PartialEq, Message)]
pub struct RelayDuty {
    /// The id to serve as, 16 bytes; empty: serve nobody.
    #[prost(bytes = "vec", tag = "1")]
    pub relay: Vec<u8>,
    /// The revision that every token must have from now on.
    #[prost(uint64, tag = "2")]
    pub floor: u64,
}

/// A relay's join key, as `warren-coordinator relay create` prints it: good for one relay, once.
#[derive(Clone, PartialEq, Eq)]
pub struct RelayJoinKey {
    /// The network.
    pub network: NetworkId,
    /// Fingerprint of that network's root key: the relay refuses any other coordinator.
    pub root: Fingerprint,
    /// The id that the relay will have.
    pub relay: RelayId,
    /// What proves possession.
    pub secret: RelayJoinSecret,
}

/// 256 random bits; zeroised on drop, never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct RelayJoinSecret([u8; 32]);

impl RelayJoinSecret {
    /// A fresh secret.
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The secret in `bytes`, if there are exactly 32 of them.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The secret itself: for [`RelayHello::secret`].
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// What a coordinator stores of it. The secret has 256 bits of entropy, so a plain hash is enough.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::new().chain_update(b"warren relay join key v1\0").chain_update(self.0).finalize().into()
    }
}

impl fmt::Debug for RelayJoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RelayJoinSecret(redacted)")
    }
}

impl fmt::Debug for RelayJoinKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RelayJoinKey({}, redacted)", self.relay)
    }
}

impl RelayJoinKey {
    /// The text to hand out: the only place where the secret is shown.
    pub fn expose(&self) -> String {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend_from_slice(&self.network.to_bytes());
        bytes.extend_from_slice(self.root.as_bytes());
        bytes.extend_from_slice(&self.relay.to_bytes());
        bytes.extend_from_slice(&self.secret.0);
        let text = format!("{JOIN_KEY_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes));
        bytes.zeroize();
        text
    }
}

/// Why a text is not a relay's join key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a relay join key: expected `{JOIN_KEY_PREFIX}` followed by 128 characters, as `warren-coordinator relay create` prints it; was it cut when it was copied?"
)]
pub struct ParseJoinKeyError;

impl FromStr for RelayJoinKey {
    type Err = ParseJoinKeyError;

    fn from_str(text: &str) -> Result<Self, ParseJoinKeyError> {
        let body = text.trim().strip_prefix(JOIN_KEY_PREFIX).ok_or(ParseJoinKeyError)?;
        let mut bytes = BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|_| ParseJoinKeyError)?;
        let key = (|| {
            let (network, rest) = bytes.split_first_chunk::<16>()?;
            let (root, rest) = rest.split_first_chunk::<32>()?;
            let (relay, rest) = rest.split_first_chunk::<16>()?;
            Some(Self {
                network: NetworkId::from_bytes(*network),
                root: Fingerprint::from_bytes(*root),
                relay: RelayId::from_bytes(*relay),
                secret: RelayJoinSecret::from_slice(rest)?,
            })
        })();
        bytes.zeroize();
        key.ok_or(ParseJoinKeyError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{ClientBody, ClientMessage, Enroll};
    use proptest::prelude::*;

    #[test]
    fn a_join_key_round_trips_and_a_cut_one_is_refused() {
        let key = RelayJoinKey {
            network: NetworkId::from_bytes([1; 16]),
            root: Fingerprint::from_bytes([2; 32]),
            relay: RelayId::from_bytes([3; 16]),
            secret: RelayJoinSecret([4; 32]),
        };
        let text = key.expose();
        assert_eq!(text.len(), JOIN_KEY_PREFIX.len() + 128);
        assert_eq!(format!(" {text}\n").parse(), Ok(key.clone()));
        assert_eq!(text[..text.len() - 4].parse::<RelayJoinKey>(), Err(ParseJoinKeyError));
        assert!(text.replace("wrelay-", "wkey-").parse::<RelayJoinKey>().is_err());
        assert!(!format!("{key:?}").contains(&text[100..]));
    }

    #[test]
    fn messages_with_a_secret_do_not_show_it() {
        let hello = RelayHello { secret: vec![201; 32], ..RelayHello::default() };
        let shown = format!("{:?}", RelayMessage { body: Some(RelayBody::Hello(hello)) });
        assert!(shown.contains("RelayHello") && !shown.contains("201"), "{shown}");
        let enroll = Enroll { auth_key: "wkey-secret".into(), hostname: "h".into(), ..Enroll::default() };
        let shown = format!("{:?}", ClientMessage { body: Some(ClientBody::Enroll(enroll)) });
        assert!(shown.contains("Enroll") && !shown.contains("secret"), "{shown}");
    }

    #[test]
    fn golden_bytes() {
        let command = RelayServerMessage {
            body: Some(RelayServerBody::Command(RelayCommand {
                revision: 7,
                minimums: vec![MinimumRevision { device: vec![1; 2], revision: 7 }],
                revoked: vec![vec![2; 2]],
                floor: 5,
            })),
        };
        let bytes = command.encode_to_vec();
        let hex = data_encoding::HEXLOWER.encode(&bytes);
        assert_eq!(hex, "1a1008071206 0a020101 1007 1a020202 2005".replace(' ', ""));
        assert_eq!(RelayServerMessage::decode(bytes.as_slice()), Ok(command));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = RelayMessage::decode(bytes.as_slice());
            let _ = RelayServerMessage::decode(bytes.as_slice());
        }
    }
}
