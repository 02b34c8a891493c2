//! The rows of the state. Their JSON form is what the store keeps: a new field needs `#[serde(default)]`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::net::SocketAddr;
use warren_common::ids::{AuthKeyId, DeviceId, NetworkId, RelayId, UserId};
use warren_common::keys::{ControlPublicKey, Fingerprint, ProbePublicKey, WgPublicKey};
use warren_common::time::UnixTime;

/// Facts about the network as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The network's id.
    pub network: NetworkId,
    /// Its name, for people.
    pub name: String,
    /// Fingerprint of its root key; ties the database to the key files.
    pub root: Fingerprint,
    /// The pool of IPv4 overlay addresses.
    pub ipv4: Ipv4Net,
    /// The prefix of IPv6 overlay addresses.
    pub ipv6: Ipv6Net,
    /// Raised by each restore from a backup.
    pub epoch: u64,
    /// Revisions below this may have been sent; after a restart numbering goes on from here.
    pub revisions_reserved: u64,
}

/// One enrolled agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its id.
    pub id: DeviceId,
    /// Its control key: what it proves in each session.
    pub control: ControlPublicKey,
    /// Its WireGuard key.
    pub wg: WgPublicKey,
    /// Its probe key.
    pub probe: ProbePublicKey,
    /// Its name, unique in the network.
    pub name: String,
    /// The host name it asked for, sanitised.
    pub hostname: String,
    /// Its IPv4 overlay address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 overlay address.
    pub ipv6: Ipv6Addr,
    /// The user it belongs to; `None` for a workload.
    pub user: Option<UserId>,
    /// Its tags, sorted.
    pub tags: Vec<String>,
    /// Removed after it was offline for a while.
    pub ephemeral: bool,
    /// An administrator (or its auth key) admitted it.
    pub approved: bool,
    /// It must enrol again, since an administrator said so.
    pub expired: bool,
    /// It must enrol again, since two hosts used its state directory.
    pub copied: bool,
    /// Which copy of its state directory is the live one.
    pub generation: Generation,
    /// The auth key that admitted it last.
    pub auth_key: AuthKeyId,
    /// Its operating system, as it says.
    pub os: String,
    /// Its agent's version, as it says.
    pub version: String,
    /// When it enrolled first.
    pub created: UnixTime,
    /// The relay it listens on.
    pub home_relay: Option<RelayId>,
    /// Subnets it offers to route, sorted.
    pub routes: Vec<IpNet>,
    /// It offers to relay.
    #[serde(default)]
    pub relay: Option<RelayOffer>,
}

impl Device {
    /// Its overlay addresses, IPv4 first.
    pub fn addrs(&self) -> [IpAddr; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }

    /// The id it has as a peer relay: always the same, and nobody who does not know its control key, which its peers are
    /// never told, can tell from it which device it is.
    pub fn relay_id(&self) -> RelayId {
        let hash = Sha256::new()
            .chain_update(b"warren peer relay v1\0")
            .chain_update(self.id.to_bytes())
            .chain_update(self.control.as_bytes())
            .finalize();
        RelayId::from_bytes(std::array::from_fn(|at| hash[at]))
    }
}

/// How a device can be reached as a relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayOffer {
    /// Where it listens, in its order.
    pub addrs: Vec<SocketAddr>,
    /// SHA-256 of its certificate.
    pub cert_sha256: [u8; 32],
}

/// The session generation: rotates at each connect, so that a copied state directory shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// The one the agent is known to have on disk.
    pub current: u64,
    /// The one it was told to persist; becomes current when confirmed or presented.
    pub pending: Option<u64>,
    /// False until the agent has used or confirmed a generation: then a repeated enrolment is a lost reply.
    pub confirmed: bool,
}

/// What stands between a device and the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Nothing.
    Active,
    /// Two hosts used its state directory; it must enrol again.
    NeedsLogin,
    /// An administrator wants it to enrol again.
    Expired,
    /// An administrator must approve it.
    AwaitsApproval,
    /// Its user is suspended.
    Suspended,
}

impl DeviceState {
    /// The word in JSON and tables.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::NeedsLogin => "needs-login",
            Self::Expired => "expired",
            Self::AwaitsApproval => "awaits-approval",
            Self::Suspended => "suspended",
        }
    }
}

/// A person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Their id.
    pub id: UserId,
    /// Their e-mail address, in lower case: the name policy knows them by.
    pub email: String,
    /// Their devices are cut while this is set.
    pub suspended: bool,
    /// When they were added.
    pub created: UnixTime,
}

/// An auth key at rest: its secret is a hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthKeyRecord {
    /// Its id.
    pub id: AuthKeyId,
    /// [`warren_common::auth_key::AuthKeySecret::hash`] of its secret.
    pub hash: [u8; 32],
    /// Tags that devices enrolled with it get, sorted.
    pub tags: Vec<String>,
    /// The user that devices enrolled with it belong to.
    pub user: Option<UserId>,
    /// Good for any number of devices.
    pub reusable: bool,
    /// Devices enrolled with it are ephemeral.
    pub ephemeral: bool,
    /// When it was made.
    pub created: UnixTime,
    /// Until when it admits.
    pub expires: UnixTime,
    /// The device that used a one-use key.
    pub used_by: Option<DeviceId>,
}

/// A relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRecord {
    /// Its id.
    pub id: RelayId,
    /// Its name, unique.
    pub name: String,
    /// It runs inside the coordinator.
    pub embedded: bool,
    /// Hash of the one-use join key's secret; `None` for the embedded relay.
    pub join_hash: Option<[u8; 32]>,
    /// The control key it joined with.
    pub control: Option<ControlPublicKey>,
    /// Where it listens.
    pub addrs: Vec<SocketAddr>,
    /// Where it answers STUN.
    pub stun: Vec<SocketAddr>,
    /// SHA-256 of its certificate; `None` until it joined.
    pub cert_sha256: Option<[u8; 32]>,
    /// When it was made.
    pub created: UnixTime,
}

/// Where the policy comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicySource {
    /// A file given with `--policy`: its path.
    File(String),
    /// A commit of a repository given with `--policy-git`.
    Git(Box<GitCommit>),
    /// `policy set`, or the HTTP API.
    Api,
}

/// A commit that a policy was taken from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitCommit {
    /// The repository.
    pub url: String,
    /// The branch.
    pub branch: String,
    /// The file in it.
    pub path: String,
    /// The commit's id in hexadecimal.
    pub commit: String,
    /// Who signed it, as the allowed-signers file calls them; `None` if nobody did or that was not asked for.
    pub signer: Option<String>,
    /// What is doubtful about it or the commits before it.
    pub warnings: Vec<String>,
}

/// The policy in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRecord {
    /// Its text as given.
    pub text: String,
    /// SHA-256 of the text.
    pub sha256: [u8; 32],
    /// Counts accepted policies, from 1.
    pub revision: u64,
    /// When it was accepted.
    pub applied: UnixTime,
    /// Where it came from.
    pub source: PolicySource,
}
