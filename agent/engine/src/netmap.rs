//! Which netmap updates are believed, how long what they grant lasts, and what survives a restart.
//!
//! An update must be signed by the network's netmap key, made for this device and key, of the epoch that the root key
//! vouches for, and newer than what is held: a snapshot replaces, a delta continues exactly where the held revision ends, a lease renews it. The shell persists
//! [`PendingUpdate::to_saved`] before it applies the update, so that an older one stays refused across restarts.
//!
//! The lease counts from receipt on the boot clock, which runs during sleep. It is saved as *what remained at a moment*,
//! with that moment on both clocks: within the same boot the boot clock decides; after a reboot the wall clock's advance
//! since then is taken off, and a clock set back takes off nothing, so that turning it back never wins more than the
//! lease had left.

use std::time::Duration;

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use warren_common::ids::{DeviceId, NetworkId};
use warren_common::keys::{ControlPublicKey, NetmapPublicKey};
use warren_common::netmap::{MAX_APPS, MAX_PEERS, MAX_RELAYS, MAX_RULES, Netmap};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::WireError;
use warren_common::wire::control::{NetmapMsg, NetmapUpdate, Signed, UpdateKind};

use crate::status::LeaseStatus;

/// Shortest lease a coordinator may give: shorter ones would cut devices off at every hiccup.
pub const MIN_LEASE: Duration = Duration::from_secs(5 * 60);
/// Longest lease: bounds how long a revoked device that no coordinator reaches keeps its grants.
pub const MAX_LEASE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Longest update that is looked at, in bytes: what one control message can hold.
pub const MAX_UPDATE_BYTES: usize = warren_common::wire::session::MAX_MESSAGE;

const SAVED_VERSION: u32 = 1;
const CHECKSUM_LEN: usize = 32;

/// Who we are, for what signs updates and for whom they are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The network.
    pub network: NetworkId,
    /// This device.
    pub device: DeviceId,
    /// This device's control key.
    pub control: ControlPublicKey,
    /// The key that signs netmaps.
    pub netmap_key: NetmapPublicKey,
    /// The epoch that the root key vouches for. The netmap key alone can't begin another: whoever holds only that could
    /// otherwise make a device refuse its coordinator for ever.
    pub epoch: u64,
}

/// Why an update is not accepted. What is held stays in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateRefused {
    /// It isn't signed by the network's netmap key.
    #[error("the update is not signed by this network's netmap key")]
    BadSignature,
    /// It is signed, but nonsense.
    #[error("the signed update is malformed: {0}")]
    Malformed(WireError),
    /// It is for another network.
    #[error("the update is for network {got}, not {want}")]
    WrongNetwork {
        /// The update's.
        got: NetworkId,
        /// Ours.
        want: NetworkId,
    },
    /// It is for another device, or for a former key of this one.
    #[error("the update is for device {got} or another key of it, not for {want}")]
    WrongDevice {
        /// The update's.
        got: DeviceId,
        /// Ours.
        want: DeviceId,
    },
    /// It is of another epoch than the one that the root key vouches for: mostly from before the coordinator was restored
    /// from a backup.
    #[error("the update is of epoch {got}, and the network is at {want}")]
    WrongEpoch {
        /// The update's.
        got: u64,
        /// Ours.
        want: u64,
    },
    /// It is not newer than what is held.
    #[error("the update leads to revision {got}, and {held} is held")]
    OldRevision {
        /// Where the update leads.
        got: u64,
        /// Ours.
        held: u64,
    },
    /// It starts from a revision (or epoch) that is not held.
    #[error("the update starts from revision {from}, and {held} is held: a snapshot is needed")]
    GapInRevisions {
        /// Where the update starts.
        from: u64,
        /// Ours, 0 for none.
        held: u64,
    },
    /// It doesn't lead to the netmap that the coordinator meant.
    #[error("the update doesn't lead to the netmap it was made for: a snapshot is needed")]
    HashMismatch {
        /// What it takes away, without what it adds: persist and apply this, then ask for a snapshot. `None` if the
        /// update was a whole one.
        restriction: Option<Box<PendingUpdate>>,
    },
    /// Its lease is out of bounds.
    #[error("the update's lease of {} s is not between 5 minutes and 7 days", .got.as_secs())]
    LeaseOutOfRange {
        /// The update's.
        got: Duration,
    },
    /// It is longer, or leads to a larger netmap, than an agent holds.
    #[error("the update, or the netmap it leads to, is too big")]
    TooBig,
}

impl UpdateRefused {
    /// True if a snapshot would help: the acknowledgement should ask for one.
    pub const fn wants_snapshot(&self) -> bool {
        matches!(self, Self::GapInRevisions { .. } | Self::HashMismatch { .. })
    }
}

/// An accepted update that is not in force yet. Persist [`to_saved`](Self::to_saved), then apply it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingUpdate {
    pub(crate) held: Held,
    received: Now,
    boot_id: [u8; 16],
}

impl PendingUpdate {
    /// The epoch it is of.
    pub const fn epoch(&self) -> u64 {
        self.held.epoch
    }

    /// The revision it leads to.
    pub const fn revision(&self) -> u64 {
        self.held.revision
    }

    /// The netmap it leads to.
    pub const fn netmap(&self) -> &Netmap {
        &self.held.netmap
    }

    /// What to persist before applying it.
    pub fn to_saved(&self) -> SavedNetmap {
        self.held.to_saved(self.received, self.boot_id)
    }
}

/// A netmap and its lease as bytes for a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedNetmap(Vec<u8>);

impl SavedNetmap {
    /// The bytes to write.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Bytes as read; whether they are any good is found when they are restored.
    pub const fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// Why a saved netmap can't be used. The agent then waits for a snapshot, and denies everything meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are damaged.
    #[error("the saved netmap is damaged; remove the file, and the coordinator will send a new one")]
    Corrupt,
    /// A later version wrote it.
    #[error(
        "the saved netmap has format {got}, and this version reads format {SAVED_VERSION}; upgrade the agent"
    )]
    Version {
        /// The file's.
        got: u32,
    },
    /// It belongs to another network or device.
    #[error("the saved netmap is of another network or device; remove the file")]
    Foreign,
}

/// The netmap in force, by the coordinator's numbering, and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) netmap: Netmap,
    pub(crate) epoch: u64,
    pub(crate) revision: u64,
    pub(crate) hash: [u8; 32],
    pub(crate) lease_ends: Instant,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedMsg {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(uint64, tag = "3")]
    revision: u64,
    #[prost(uint64, tag = "4")]
    remaining_ms: u64,
    #[prost(bytes = "vec", tag = "5")]
    boot_id: Vec<u8>,
    #[prost(uint64, tag = "6")]
    seen_boot_ns: u64,
    #[prost(int64, tag = "7")]
    seen_unix_us: i64,
    #[prost(message, optional, tag = "8")]
    netmap: Option<NetmapMsg>,
}

impl Held {
    /// What is left of the lease.
    pub(crate) fn remaining(&self, now: Now) -> Duration {
        self.lease_ends.since(now.boot)
    }

    pub(crate) fn lease_status(&self, now: Now) -> LeaseStatus {
        match self.remaining(now) {
            Duration::ZERO => LeaseStatus::Ended,
            left => LeaseStatus::Valid { remaining_ms: millis(left) },
        }
    }

    pub(crate) fn to_saved(&self, now: Now, boot_id: [u8; 16]) -> SavedNetmap {
        let body = SavedMsg {
            version: SAVED_VERSION,
            epoch: self.epoch,
            revision: self.revision,
            remaining_ms: millis(self.remaining(now)),
            boot_id: boot_id.to_vec(),
            seen_boot_ns: now.boot.as_nanos(),
            seen_unix_us: now.unix.as_micros(),
            netmap: Some((&self.netmap).into()),
        }
        .encode_to_vec();
        let mut bytes = Sha256::digest(&body).to_vec();
        bytes.extend(body);
        SavedNetmap(bytes)
    }

    pub(crate) fn restore(
        saved: &SavedNetmap,
        identity: &Identity,
        now: Now,
        boot_id: [u8; 16],
    ) -> Result<Self, RestoreError> {
        let (checksum, body) = saved.0.split_first_chunk::<CHECKSUM_LEN>().ok_or(RestoreError::Corrupt)?;
        if checksum[..] != Sha256::digest(body)[..] {
            return Err(RestoreError::Corrupt);
        }
        let msg = SavedMsg::decode(body).map_err(|_| RestoreError::Corrupt)?;
        if msg.version != SAVED_VERSION {
            return Err(RestoreError::Version { got: msg.version });
        }
        let netmap = msg.netmap.ok_or(RestoreError::Corrupt)?;
        let netmap = Netmap::try_from(netmap).map_err(|_| RestoreError::Corrupt)?;
        if netmap.network.id != identity.network || netmap.device.id != identity.device {
            return Err(RestoreError::Foreign);
        }
        let elapsed = if msg.boot_id == boot_id {
            now.boot.since(Instant::from_nanos(msg.seen_boot_ns))
        } else {
            now.unix.since(UnixTime::from_micros(msg.seen_unix_us))
        };
        let remaining = Duration::from_millis(msg.remaining_ms).min(MAX_LEASE).saturating_sub(elapsed);
        let hash = netmap.hash();
        let lease_ends = now.boot + remaining;
        Ok(Self { netmap, epoch: msg.epoch, revision: msg.revision, hash, lease_ends })
    }
}

/// Judges an update against what is held.
pub(crate) fn check(
    identity: &Identity,
    held: Option<&Held>,
    boot_id: [u8; 16],
    now: Now,
    signed: &Signed,
) -> Result<PendingUpdate, UpdateRefused> {
    if signed.payload.len() > MAX_UPDATE_BYTES {
        return Err(UpdateRefused::TooBig);
    }
    let update = NetmapUpdate::verify(signed, &identity.netmap_key).map_err(|error| match error {
        WireError::Signature { .. } => UpdateRefused::BadSignature,
        other => UpdateRefused::Malformed(other),
    })?;
    if update.network != identity.network {
        return Err(UpdateRefused::WrongNetwork { got: update.network, want: identity.network });
    }
    if update.device != identity.device || update.device_key != identity.control {
        return Err(UpdateRefused::WrongDevice { got: update.device, want: identity.device });
    }
    let lease = Duration::from_millis(update.lease_ms);
    if !(MIN_LEASE..=MAX_LEASE).contains(&lease) {
        return Err(UpdateRefused::LeaseOutOfRange { got: lease });
    }
    let (epoch, revision) = held.map_or((0, 0), |h| (h.epoch, h.revision));
    let want = identity.epoch.max(epoch);
    if update.epoch != want {
        return Err(UpdateRefused::WrongEpoch { got: update.epoch, want });
    }
    let same_epoch = update.epoch == epoch;
    let old = UpdateRefused::OldRevision { got: update.to, held: revision };
    let gap = UpdateRefused::GapInRevisions { from: update.from, held: revision };
    let base = held.filter(|_| same_epoch);
    let pending = |netmap, lease_ends| PendingUpdate {
        held: Held { netmap, epoch: update.epoch, revision: update.to, hash: update.hash, lease_ends },
        received: now,
        boot_id,
    };
    let lease_ends = now.boot + lease;
    match update.kind {
        UpdateKind::Snapshot(netmap) => {
            // The same revision once more is a renewal if it is the same netmap, a fork if it isn't.
            if base
                .is_some_and(|h| update.to < h.revision || update.to == h.revision && update.hash != h.hash)
            {
                return Err(old);
            }
            // No removed ones are lost with it: a snapshot replaces all there is.
            if netmap.hash() != update.hash {
                return Err(UpdateRefused::HashMismatch { restriction: None });
            }
            fits(identity, *netmap).map(|netmap| pending(netmap, lease_ends))
        }
        UpdateKind::Delta(delta) => {
            let held = base.ok_or_else(|| gap.clone())?;
            if update.to <= held.revision {
                return Err(old);
            }
            if update.from != held.revision {
                return Err(gap);
            }
            let mut netmap = held.netmap.clone();
            netmap.apply(*delta);
            if netmap.hash() != update.hash {
                return Err(UpdateRefused::HashMismatch {
                    restriction: Some(restriction(held, &netmap, now, boot_id)),
                });
            }
            fits(identity, netmap).map(|netmap| pending(netmap, lease_ends))
        }
        UpdateKind::Lease => {
            let held = base.ok_or_else(|| gap.clone())?;
            if update.to < held.revision {
                return Err(old);
            }
            if update.to > held.revision {
                return Err(gap);
            }
            if update.hash != held.hash {
                return Err(UpdateRefused::HashMismatch { restriction: None });
            }
            Ok(pending(held.netmap.clone(), lease_ends))
        }
    }
}

/// What a delta that doesn't add up takes away. The revision stays, the hash is what it really is, so that a later delta
/// on top can't add up either.
fn restriction(held: &Held, meant: &Netmap, now: Now, boot_id: [u8; 16]) -> Box<PendingUpdate> {
    let netmap = Netmap::without_removed(&held.netmap, meant);
    let hash = netmap.hash();
    let held = Held { netmap, hash, ..held.clone() };
    Box::new(PendingUpdate { held, received: now, boot_id })
}

fn fits(identity: &Identity, netmap: Netmap) -> Result<Netmap, UpdateRefused> {
    if netmap.network.id != identity.network {
        return Err(UpdateRefused::WrongNetwork { got: netmap.network.id, want: identity.network });
    }
    if netmap.device.id != identity.device {
        return Err(UpdateRefused::WrongDevice { got: netmap.device.id, want: identity.device });
    }
    let fits = netmap.peers.len() <= MAX_PEERS
        && netmap.relays.len() <= MAX_RELAYS
        && netmap.apps.len() <= MAX_APPS
        && netmap.ingress.len() <= MAX_RULES
        && netmap.egress.len() <= MAX_RULES;
    if fits { Ok(netmap) } else { Err(UpdateRefused::TooBig) }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
