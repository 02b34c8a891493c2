//! What can be asked of the domain, and the answers.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use warren_common::auth_key::AuthKey;
use warren_common::ids::{ApiTokenId, AuthKeyId, DeviceId, RelayId, UserId};
use warren_common::keys::{ControlPublicKey, ProbePublicKey, WgPublicKey};
use warren_common::time::UnixTime;
use warren_common::wire::control::RefusedCode;

use super::entity::{PolicySource, RelayOffer};
use super::token::{ApiToken, NewApiToken};

/// A device asks to be let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnrollRequest {
    /// Its control key, as proved by the handshake.
    pub control: ControlPublicKey,
    /// Its WireGuard key.
    pub wg: WgPublicKey,
    /// Its probe key.
    pub probe: ProbePublicKey,
    /// What admits it.
    pub auth_key: AuthKey,
    /// The name it would like.
    pub hostname: String,
    /// Its operating system.
    pub os: String,
    /// Its agent's version.
    pub version: String,
}

/// What a new auth key is good for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewAuthKey {
    /// Tags for the devices it admits.
    pub tags: Vec<String>,
    /// E-mail address of the user the devices belong to; the user is added if new.
    pub user: Option<String>,
    /// Good for any number of devices.
    pub reusable: bool,
    /// Its devices are removed after they were offline for a while.
    pub ephemeral: bool,
    /// How long it admits; [`super::DEFAULT_AUTH_KEY_LIFE`] if `None`.
    pub life: Option<Duration>,
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Makes an auth key.
    CreateAuthKey(NewAuthKey),
    /// Takes an auth key back.
    RevokeAuthKey(AuthKeyId),
    /// Makes a token of the HTTP API.
    CreateApiToken(NewApiToken),
    /// Takes a token of the HTTP API back.
    RevokeApiToken(ApiTokenId),
    /// Lets a device in.
    Enroll(Box<EnrollRequest>),
    /// Opens a session of an enrolled device.
    Resume {
        /// Who it says it is.
        device: DeviceId,
        /// Its control key, as proved by the handshake.
        control: ControlPublicKey,
        /// The session generation it has on disk.
        generation: u64,
        /// Its agent's version.
        version: String,
    },
    /// The agent has the pending generation on disk.
    ConfirmGeneration {
        /// The device.
        device: DeviceId,
        /// That generation.
        generation: u64,
    },
    /// Facts that the device reports about itself.
    Report {
        /// The device.
        device: DeviceId,
        /// The relay it listens on.
        home_relay: Option<RelayId>,
        /// Subnets it offers to route.
        routes: Vec<IpNet>,
        /// How it can be reached as a relay, should policy let it be one.
        relay: Option<RelayOffer>,
    },
    /// Removes a device; its addresses rest.
    RemoveDevice(DeviceId),
    /// Admits a device that awaits approval.
    ApproveDevice(DeviceId),
    /// Makes a device enrol again.
    ExpireDevice(DeviceId),
    /// Adds a user.
    CreateUser(String),
    /// Cuts a user's devices, or lets them back.
    SuspendUser {
        /// The user.
        user: UserId,
        /// True to cut.
        suspended: bool,
    },
    /// Removes a user with their devices and auth keys.
    RemoveUser(UserId),
    /// Makes a relay's join key.
    CreateRelay(String),
    /// A relay opens a session.
    JoinRelay {
        /// Who it says it is.
        relay: RelayId,
        /// Its control key, as proved by the handshake.
        control: ControlPublicKey,
        /// Hash of the join key's secret, if it gave one.
        secret: Option<[u8; 32]>,
    },
    /// A relay says where it is.
    ReportRelay {
        /// The relay.
        relay: RelayId,
        /// Its control key.
        control: ControlPublicKey,
        /// Where it listens; nowhere takes it out of the netmaps.
        addrs: Vec<SocketAddr>,
        /// Where it answers STUN.
        stun: Vec<SocketAddr>,
        /// SHA-256 of its certificate.
        cert_sha256: [u8; 32],
    },
    /// The embedded relay is up (again).
    SetEmbeddedRelay {
        /// Its name.
        name: String,
        /// Where it listens.
        addrs: Vec<SocketAddr>,
        /// Where it answers STUN.
        stun: Vec<SocketAddr>,
        /// SHA-256 of its certificate.
        cert_sha256: [u8; 32],
    },
    /// Removes a relay.
    RemoveRelay(RelayId),
    /// Puts a policy in force.
    SetPolicy {
        /// Where it comes from; must be the active source.
        source: PolicySource,
        /// The file's text.
        text: String,
    },
    /// Puts a policy from the API in force, in place of the one that its author has read.
    EditPolicy {
        /// The policy's text.
        text: String,
        /// SHA-256 of the text of the policy in force; `None` if there must be none yet.
        expected: Option<[u8; 32]>,
    },
    /// Reserves the next block of revision numbers.
    ReserveRevisions,
    /// Forgets what is over: rests, and keys and tokens long past their end.
    Sweep,
}

/// What a carried-out command tells its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Done,
    /// The new auth key: the only time its secret is seen.
    AuthKey(AuthKey),
    /// The new token of the HTTP API: the only time its secret is seen.
    ApiToken(ApiToken),
    /// The device may open a session and should persist this generation.
    Admitted {
        /// The device.
        device: DeviceId,
        /// The generation to persist.
        generation: u64,
    },
    /// The new relay and its join key's text.
    Relay {
        /// Its id.
        id: RelayId,
        /// What it joins with; the only time it is seen.
        join_key: String,
    },
    /// The relay is in.
    Joined {
        /// Its name.
        name: String,
    },
    /// The policy in force has this number now.
    Policy {
        /// Its number.
        revision: u64,
    },
}

/// Why a command was not carried out. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Unknown auth key, wrong secret, or one of another network: never says which.
    #[error("the auth key is not valid in this network")]
    AuthKeyInvalid,
    /// A one-use key that another device has used.
    #[error("the auth key is one-use and has been used")]
    AuthKeyUsed,
    /// Past its end.
    #[error("the auth key expired at {}", .0.to_rfc3339())]
    AuthKeyExpired(UnixTime),
    /// Unknown relay, or a join key's secret that is wrong or used by another relay.
    #[error("the relay's join key is not valid, or another relay has used it")]
    JoinKeyInvalid,
    /// No such device, or not with this control key.
    #[error("the device is not in this network")]
    UnknownDevice,
    /// The device must enrol again.
    #[error("the device is {0} and must enrol again")]
    NeedsLogin(&'static str),
    /// The device waits for an administrator, or its user is suspended.
    #[error("the device may not connect: {0}")]
    NotAdmitted(&'static str),
    /// The generation is not the live one.
    #[error("another host uses a copy of this device's state directory")]
    CopiedState {
        /// The device that two hosts claim to be.
        device: DeviceId,
    },
    /// No address is left.
    #[error("the address pool {0} is used up")]
    PoolExhausted(String),
    /// A bound is reached.
    #[error("the network has {max} {what}, which is the most there may be")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        max: usize,
    },
    /// Something given makes no sense.
    #[error("{what} `{text}` is not valid: {why}")]
    Invalid {
        /// What was given.
        what: &'static str,
        /// As given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It exists already.
    #[error("{what} `{name}` exists already")]
    Exists {
        /// What.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// It doesn't exist.
    #[error("there is no {what} `{name}`")]
    NotFound {
        /// What.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The policy doesn't parse, makes no sense or fails its own tests.
    #[error("the policy is refused:\n{0}")]
    PolicyInvalid(String),
    /// Another source is active.
    #[error("the active policy source is the file {0}")]
    PolicySourceIsFile(String),
    /// Another source is active.
    #[error("the active policy source is the git repository {0}")]
    PolicySourceIsGit(String),
    /// The policy in force is not the one that was to be replaced.
    #[error("the policy was changed meanwhile")]
    PolicyChanged,
    /// The store can't take it now.
    #[error("the coordinator can't store anything now: {0}")]
    StoreUnavailable(String),
    /// A limit is reached for the moment.
    #[error("the coordinator is busy: {0}")]
    Busy(&'static str),
}

impl Refusal {
    /// The stable word agents act on.
    pub const fn code(&self) -> RefusedCode {
        match self {
            Self::AuthKeyInvalid | Self::JoinKeyInvalid => RefusedCode::AuthKeyInvalid,
            Self::AuthKeyUsed => RefusedCode::AuthKeyUsed,
            Self::AuthKeyExpired(_) => RefusedCode::AuthKeyExpired,
            Self::UnknownDevice => RefusedCode::UnknownDevice,
            Self::NeedsLogin(_) => RefusedCode::NeedsLogin,
            Self::CopiedState { .. } => RefusedCode::CopiedState,
            Self::StoreUnavailable(_) => RefusedCode::StoreUnavailable,
            Self::Busy(_) => RefusedCode::Busy,
            Self::NotAdmitted(_)
            | Self::PoolExhausted(_)
            | Self::TooMany { .. }
            | Self::Invalid { .. }
            | Self::Exists { .. }
            | Self::NotFound { .. }
            | Self::PolicyInvalid(_)
            | Self::PolicySourceIsFile(_)
            | Self::PolicySourceIsGit(_)
            | Self::PolicyChanged => RefusedCode::Other,
        }
    }

    /// What to do about it.
    pub const fn fix(&self) -> &'static str {
        match self {
            Self::AuthKeyInvalid => {
                "check that the whole key was copied and belongs to this coordinator; make one with `warren-coordinator auth-key create`"
            }
            Self::AuthKeyUsed | Self::AuthKeyExpired(_) => {
                "make a new key with `warren-coordinator auth-key create`"
            }
            Self::JoinKeyInvalid => "make a new relay and key with `warren-coordinator relay create`",
            Self::UnknownDevice => "run `warren logout`, then `warren up` with a new auth key",
            Self::NeedsLogin(_) => "run `warren up` with a new auth key",
            Self::NotAdmitted(_) => {
                "ask an administrator: `warren-coordinator device show` says what is missing"
            }
            Self::CopiedState { .. } => {
                "on the copy: stop the agent, delete its state directory and join as a new device; then run `warren up` with a new auth key on the original"
            }
            Self::PoolExhausted(_) => {
                "remove devices (their addresses rest 7 days) or restart the coordinator with a larger --ipv4-pool that contains the old one"
            }
            Self::TooMany { .. } => "remove what is no longer needed",
            Self::Invalid { .. } => "correct it and try again",
            Self::Exists { .. } => "choose another name",
            Self::NotFound { .. } => "see the `list` verb for what there is",
            Self::PolicyInvalid(_) => "correct the file; the last accepted policy stays in force",
            Self::PolicySourceIsFile(_) => "edit that file: it is applied when it is saved",
            Self::PolicySourceIsGit(_) => "commit to that repository: it is applied when it is pushed",
            Self::PolicyChanged => "read it again, make the change there, and send it with the new ETag",
            Self::StoreUnavailable(_) => {
                "check the coordinator's disk space and permissions; it goes on by itself once it can write"
            }
            Self::Busy(_) => "try again in a moment",
        }
    }
}
