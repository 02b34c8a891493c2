//! The control protocol's messages, and the signed documents that travel in it.

use prost::Message;

use super::WireError;
use super::relay_control::{RelayCommand, RelayDuty, RelayOffer};
use crate::ids::{DeviceId, NetworkId};
use crate::keys::{
    ControlPublicKey, Fingerprint, NetmapPublicKey, NetmapSecretKey, RootPublicKey, RootSecretKey,
    SignatureDomain,
};
use crate::netmap::{Delta, Netmap};
use crate::time::UnixTime;

pub use super::netmap::{DeltaMsg, NetmapMsg};

/// Anything signed: the bytes as sent, and the signature over the domain's tag and them.
#[derive(Clone, PartialEq, Message)]
pub struct Signed {
    /// The encoded document.
    #[prost(bytes = "vec", tag = "1")]
    pub payload: Vec<u8>,
    /// Ed25519.
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

/// The document that vouches for a coordinator's keys, as encoded.
#[derive(Clone, PartialEq, Message)]
struct IdentityMsg {
    #[prost(bytes = "vec", tag = "1")]
    network: Vec<u8>,
    #[prost(string, tag = "2")]
    network_name: String,
    #[prost(bytes = "vec", tag = "3")]
    root: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    control: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    netmap: Vec<u8>,
    #[prost(uint64, tag = "6")]
    epoch: u64,
}

/// What a coordinator is: signed by the network's root key and sent in the clear before the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoordinatorIdentity {
    /// The network it serves.
    pub network: NetworkId,
    /// The network's name.
    pub network_name: String,
    /// The key that names the network.
    pub root: RootPublicKey,
    /// The coordinator's Noise static key.
    pub control: ControlPublicKey,
    /// The key that signs netmaps and relay tokens.
    pub netmap: NetmapPublicKey,
    /// Raised by each restore from a backup; an older one is refused.
    pub epoch: u64,
}

impl CoordinatorIdentity {
    const WHAT: &'static str = "coordinator identity";

    /// Encodes and signs.
    pub fn sign(&self, root: &RootSecretKey) -> Signed {
        let payload = IdentityMsg {
            network: self.network.to_bytes().to_vec(),
            network_name: self.network_name.clone(),
            root: self.root.as_bytes().to_vec(),
            control: self.control.as_bytes().to_vec(),
            netmap: self.netmap.as_bytes().to_vec(),
            epoch: self.epoch,
        }
        .encode_to_vec();
        let signature = root.sign(SignatureDomain::CoordinatorIdentity, &payload).to_vec();
        Signed { payload, signature }
    }

    /// Verifies that `signed` is by the root key with `fingerprint`, and decodes it.
    ///
    /// # Errors
    /// Malformed, another network's root key, or a wrong signature.
    pub fn verify(signed: &Signed, fingerprint: &Fingerprint) -> Result<Self, WireError> {
        let msg =
            IdentityMsg::decode(signed.payload.as_slice()).map_err(|e| WireError::decode(Self::WHAT, &e))?;
        let root = RootPublicKey::from_slice(&msg.root).ok_or(WireError::field(Self::WHAT, "root"))?;
        if root.fingerprint() != *fingerprint
            || !root.verify(SignatureDomain::CoordinatorIdentity, &signed.payload, &signed.signature)
        {
            return Err(WireError::Signature { what: Self::WHAT });
        }
        Ok(Self {
            network: NetworkId::from_slice(&msg.network).ok_or(WireError::field(Self::WHAT, "network"))?,
            network_name: msg.network_name,
            root,
            control: ControlPublicKey::from_slice(&msg.control)
                .ok_or(WireError::field(Self::WHAT, "control"))?,
            netmap: NetmapPublicKey::from_slice(&msg.netmap).ok_or(WireError::field(Self::WHAT, "netmap"))?,
            epoch: msg.epoch,
        })
    }

    /// The root key's fingerprint that `signed` claims, unverified: for a first contact over verified https.
    pub fn claimed_fingerprint(signed: &Signed) -> Option<Fingerprint> {
        let msg = IdentityMsg::decode(signed.payload.as_slice()).ok()?;
        Some(RootPublicKey::from_slice(&msg.root)?.fingerprint())
    }
}

/// What a netmap update holds, as encoded.
#[derive(Clone, PartialEq, Message)]
struct UpdateMsg {
    #[prost(bytes = "vec", tag = "1")]
    network: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    device: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    device_key: Vec<u8>,
    #[prost(uint64, tag = "4")]
    epoch: u64,
    #[prost(uint64, tag = "5")]
    from: u64,
    #[prost(uint64, tag = "6")]
    to: u64,
    #[prost(bytes = "vec", tag = "7")]
    hash: Vec<u8>,
    #[prost(uint64, tag = "8")]
    lease_ms: u64,
    #[prost(int64, tag = "9")]
    issued_us: i64,
    #[prost(oneof = "UpdateBody", tags = "10, 11, 12")]
    body: Option<UpdateBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum UpdateBody {
    #[prost(message, tag = "10")]
    Snapshot(NetmapMsg),
    #[prost(message, tag = "11")]
    Delta(DeltaMsg),
    #[prost(message, tag = "12")]
    Lease(Empty),
}

/// A message without fields.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Empty {}

/// What changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpdateKind {
    /// The whole netmap; `from` is 0.
    Snapshot(Box<Netmap>),
    /// What turns revision `from` into `to`.
    Delta(Box<Delta>),
    /// Nothing but the lease: `from == to`.
    Lease,
}

/// A netmap update: made for one device, numbered, leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetmapUpdate {
    /// The network.
    pub network: NetworkId,
    /// The device it is made for.
    pub device: DeviceId,
    /// That device's control key.
    pub device_key: ControlPublicKey,
    /// The coordinator's epoch.
    pub epoch: u64,
    /// The revision it starts from (0 for a snapshot).
    pub from: u64,
    /// The revision it leads to.
    pub to: u64,
    /// [`Netmap::hash`] at `to`.
    pub hash: [u8; 32],
    /// How long what it grants lasts from receipt, in milliseconds: 5 min to 7 d.
    pub lease_ms: u64,
    /// When the coordinator made it.
    pub issued: UnixTime,
    /// What changes.
    pub kind: UpdateKind,
}

impl NetmapUpdate {
    const WHAT: &'static str = "netmap update";

    /// Encodes and signs.
    pub fn sign(&self, key: &NetmapSecretKey) -> Signed {
        let payload = UpdateMsg {
            network: self.network.to_bytes().to_vec(),
            device: self.device.to_bytes().to_vec(),
            device_key: self.device_key.as_bytes().to_vec(),
            epoch: self.epoch,
            from: self.from,
            to: self.to,
            hash: self.hash.to_vec(),
            lease_ms: self.lease_ms,
            issued_us: self.issued.as_micros(),
            body: Some(match &self.kind {
                UpdateKind::Snapshot(netmap) => UpdateBody::Snapshot(netmap.as_ref().into()),
                UpdateKind::Delta(delta) => UpdateBody::Delta(delta.as_ref().into()),
                UpdateKind::Lease => UpdateBody::Lease(Empty {}),
            }),
        }
        .encode_to_vec();
        let signature = key.sign(SignatureDomain::Netmap, &payload).to_vec();
        Signed { payload, signature }
    }

    /// Verifies the signature, then decodes. Whether the update is *for us* and *newer* is the engine's to judge.
    ///
    /// # Errors
    /// A wrong signature, or (from a coordinator that signs nonsense) malformed contents.
    pub fn verify(signed: &Signed, key: &NetmapPublicKey) -> Result<Self, WireError> {
        if !key.verify(SignatureDomain::Netmap, &signed.payload, &signed.signature) {
            return Err(WireError::Signature { what: Self::WHAT });
        }
        let msg =
            UpdateMsg::decode(signed.payload.as_slice()).map_err(|e| WireError::decode(Self::WHAT, &e))?;
        let field = |field| WireError::field(Self::WHAT, field);
        Ok(Self {
            network: NetworkId::from_slice(&msg.network).ok_or(field("network"))?,
            device: DeviceId::from_slice(&msg.device).ok_or(field("device"))?,
            device_key: ControlPublicKey::from_slice(&msg.device_key).ok_or(field("device_key"))?,
            epoch: msg.epoch,
            from: msg.from,
            to: msg.to,
            hash: msg.hash.as_slice().try_into().map_err(|_| field("hash"))?,
            lease_ms: msg.lease_ms,
            issued: UnixTime::from_micros(msg.issued_us),
            kind: match msg.body.ok_or(field("body"))? {
                UpdateBody::Snapshot(netmap) => UpdateKind::Snapshot(Box::new(netmap.try_into()?)),
                UpdateBody::Delta(delta) => UpdateKind::Delta(Box::new(delta.try_into()?)),
                UpdateBody::Lease(_) => UpdateKind::Lease,
            },
        })
    }
}

/// From an agent to its coordinator.
#[derive(Clone, PartialEq, Message)]
pub struct ClientMessage {
    /// What it says. Unknown kinds decode as `None` and are ignored.
    #[prost(oneof = "ClientBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    pub body: Option<ClientBody>,
}

/// What an agent can say.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum ClientBody {
    /// A device that is not in the network yet asks to be let in.
    #[prost(message, tag = "1")]
    Enroll(Enroll),
    /// An enrolled device opens a session.
    #[prost(message, tag = "2")]
    Resume(Resume),
    /// The new session generation is on the agent's disk.
    #[prost(message, tag = "3")]
    ConfirmGeneration(ConfirmGeneration),
    /// How an update ended.
    #[prost(message, tag = "4")]
    Ack(Ack),
    /// Facts about the device.
    #[prost(message, tag = "5")]
    Report(Report),
    /// Bytes for a peer that no path reaches yet.
    #[prost(message, tag = "6")]
    Signal(Signal),
    /// A token for a relay, please.
    #[prost(message, tag = "7")]
    RelayToken(RelayTokenRequest),
    /// Are you there?
    #[prost(message, tag = "8")]
    Ping(Ping),
    /// The device leaves the network for good.
    #[prost(message, tag = "9")]
    Logout(Empty),
    /// Where do these rules stand in the policy now?
    #[prost(message, tag = "10")]
    RuleOrigins(RuleOriginsRequest),
    /// What the device's filter decided, as far as people should hear of it.
    #[prost(message, tag = "11")]
    FilterReport(FilterReport),
}

/// A device asks to be let in. Sent inside the handshaken session only. Its control key is the Noise static key.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub struct Enroll {
    /// The auth key's text.
    #[prost(string, tag = "1")]
    pub auth_key: String,
    /// The name it would like; duplicates get a suffix.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// WireGuard public key, 32 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub wg: Vec<u8>,
    /// Probe public key, 32 bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub probe: Vec<u8>,
    /// Operating system, such as `linux`.
    #[prost(string, tag = "5")]
    pub os: String,
    /// The agent's version.
    #[prost(string, tag = "6")]
    pub version: String,
}

/// Without the auth key.
impl std::fmt::Debug for Enroll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { auth_key: _, hostname, wg: _, probe: _, os, version } = self;
        let mut shown = f.debug_struct("Enroll");
        shown.field("hostname", hostname).field("os", os).field("version", version).finish_non_exhaustive()
    }
}

/// An enrolled device opens a session.
#[derive(Clone, PartialEq, Message)]
pub struct Resume {
    /// Who it is (the control key must agree), 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// The session generation it last persisted.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// The epoch of the netmap it holds (0 for none).
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// The revision of the netmap it holds (0 for none).
    #[prost(uint64, tag = "4")]
    pub revision: u64,
    /// That netmap's hash.
    #[prost(bytes = "vec", tag = "5")]
    pub hash: Vec<u8>,
    /// The agent's version.
    #[prost(string, tag = "6")]
    pub version: String,
}

/// The agent has persisted the generation it was given.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ConfirmGeneration {
    /// That generation.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
}

/// How an update ended at the agent.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    /// The agent's epoch now.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// The agent's revision now.
    #[prost(uint64, tag = "2")]
    pub revision: u64,
    /// True if the agent wants a snapshot: the delta did not start at its revision or the hash differed.
    #[prost(bool, tag = "3")]
    pub want_snapshot: bool,
    /// Why, for the coordinator's log.
    #[prost(string, tag = "4")]
    pub reason: String,
}

/// Facts about the device that may change.
#[derive(Clone, PartialEq, Message)]
pub struct Report {
    /// The relay it listens on, 16 bytes; empty for none.
    #[prost(bytes = "vec", tag = "1")]
    pub home_relay: Vec<u8>,
    /// Its host name.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Subnets it offers to route.
    #[prost(string, repeated, tag = "3")]
    pub routes: Vec<String>,
    /// It offers to relay.
    #[prost(message, optional, tag = "4")]
    pub relay: Option<RelayOffer>,
}

/// Sealed bytes from one device to another; the coordinator can't read them and forwards between peers only.
#[derive(Clone, PartialEq, Message)]
pub struct Signal {
    /// The other end: destination from an agent, source from a coordinator. 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// A sealed probe message, at most 1 200 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub sealed: Vec<u8>,
}

/// Asks for a relay token.
#[derive(Clone, PartialEq, Message)]
pub struct RelayTokenRequest {
    /// For which relay, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub relay: Vec<u8>,
}

/// Keeps a session alive and measures the clocks.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Ping {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
}

/// Most rules one [`RuleOriginsRequest`] may ask for: more than `warren why` shows.
pub const MAX_RULE_ORIGINS: usize = 32;

/// Asks where rules stand in the policy now: lines move without a netmap changing.
#[derive(Clone, PartialEq, Message)]
pub struct RuleOriginsRequest {
    /// Comes back in the answer.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// Ids of rules in the netmap that was sent, at most [`MAX_RULE_ORIGINS`].
    #[prost(fixed64, repeated, tag = "2")]
    pub rules: Vec<u64>,
}

/// Most staged rules that one [`FilterReport`] speaks of; the others wait for the next.
pub const MAX_STAGED_HITS: usize = 1_024;
/// Most differing verdicts that one [`FilterReport`] speaks of: as many as an agent remembers.
pub const MAX_DIFFERING: usize = 64;

/// What a device's filter has seen since its last report.
#[derive(Clone, PartialEq, Message)]
pub struct FilterReport {
    /// Staged rules that matched, at most [`MAX_STAGED_HITS`].
    #[prost(message, repeated, tag = "1")]
    pub staged: Vec<StagedHits>,
    /// Connections that a peer let out and this device refused, at most [`MAX_DIFFERING`].
    #[prost(message, repeated, tag = "2")]
    pub differing: Vec<DifferingVerdict>,
}

/// What a staged rule would have decided since the last report.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct StagedHits {
    /// The rule.
    #[prost(fixed64, tag = "1")]
    pub rule: u64,
    /// Connections from the device.
    #[prost(uint64, tag = "2")]
    pub sent: u64,
    /// Connections to the device.
    #[prost(uint64, tag = "3")]
    pub received: u64,
}

/// A connection that a peer let out and the reporting device refused.
#[derive(Clone, PartialEq, Message)]
pub struct DifferingVerdict {
    /// The peer, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub peer: Vec<u8>,
    /// Source address, 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub src: Vec<u8>,
    /// Destination address, 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub dst: Vec<u8>,
    /// The IP protocol.
    #[prost(uint32, tag = "4")]
    pub proto: u32,
    /// Destination port, or zero.
    #[prost(uint32, tag = "5")]
    pub port: u32,
    /// A stable word for why it was refused: `no-rule` or `denied-by-rule`.
    #[prost(string, tag = "6")]
    pub reason: String,
    /// The revision of the reporting device's rules.
    #[prost(uint64, tag = "7")]
    pub revision: u64,
    /// Packets refused so far.
    #[prost(uint64, tag = "8")]
    pub count: u64,
}

/// From a coordinator to an agent.
#[derive(Clone, PartialEq, Message)]
pub struct ServerMessage {
    /// What it says. Unknown kinds decode as `None` and are ignored.
    #[prost(oneof = "ServerBody", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub body: Option<ServerBody>,
}

/// What a coordinator can say.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum ServerBody {
    /// Answer to `Enroll` and `Resume`: the session stands.
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    /// The coordinator won't; the session ends.
    #[prost(message, tag = "2")]
    Refused(Refused),
    /// A signed [`NetmapUpdate`].
    #[prost(message, tag = "3")]
    Update(Signed),
    /// Bytes from a peer.
    #[prost(message, tag = "4")]
    Signal(Signal),
    /// A signed relay token.
    #[prost(message, tag = "5")]
    RelayToken(RelayTokenGrant),
    /// Answer to `Ping`.
    #[prost(message, tag = "6")]
    Pong(Pong),
    /// Which peers are connected to the coordinator; advisory, grants nothing.
    #[prost(message, tag = "7")]
    Presence(Presence),
    /// Answer to `RuleOrigins`.
    #[prost(message, tag = "8")]
    RuleOrigins(RuleOrigins),
    /// Whether the device is to serve as a relay, as it offered.
    #[prost(message, tag = "9")]
    RelayDuty(RelayDuty),
    /// Whose access to the relay that it serves as has changed.
    #[prost(message, tag = "10")]
    RelayCommand(RelayCommand),
}

/// The session stands.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The device's id, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub device: Vec<u8>,
    /// The generation to persist and confirm.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// The coordinator's clock in microseconds since the Unix epoch.
    #[prost(int64, tag = "3")]
    pub unix_us: i64,
}

/// The coordinator won't.
#[derive(Clone, PartialEq, Message)]
pub struct Refused {
    /// A stable word: see [`RefusedCode`].
    #[prost(string, tag = "1")]
    pub code: String,
    /// What is wrong, for people.
    #[prost(string, tag = "2")]
    pub text: String,
    /// What to do about it.
    #[prost(string, tag = "3")]
    pub fix: String,
}

/// The codes a refusal can carry; readers treat unknown ones as [`RefusedCode::Other`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedCode {
    /// No such auth key, or its secret is wrong.
    AuthKeyInvalid,
    /// The one-use key has been used by another device.
    AuthKeyUsed,
    /// The key is past its end.
    AuthKeyExpired,
    /// The device is not in the network (any more).
    UnknownDevice,
    /// The device must sign in again.
    NeedsLogin,
    /// Two hosts use one state directory.
    CopiedState,
    /// The coordinator can't store anything now; try again later.
    StoreUnavailable,
    /// Versions have nothing in common.
    Version,
    /// The coordinator or a limit is full; try again later.
    Busy,
    /// Anything else.
    Other,
}

impl RefusedCode {
    const ALL: [(Self, &'static str); 9] = [
        (Self::AuthKeyInvalid, "auth-key-invalid"),
        (Self::AuthKeyUsed, "auth-key-used"),
        (Self::AuthKeyExpired, "auth-key-expired"),
        (Self::UnknownDevice, "unknown-device"),
        (Self::NeedsLogin, "needs-login"),
        (Self::CopiedState, "copied-state"),
        (Self::StoreUnavailable, "store-unavailable"),
        (Self::Version, "version"),
        (Self::Busy, "busy"),
    ];

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(code, _)| *code == self).map_or("other", |(_, word)| word)
    }

    /// The code of a word.
    pub fn parse(word: &str) -> Self {
        Self::ALL.iter().find(|(_, w)| *w == word).map_or(Self::Other, |(code, _)| *code)
    }
}

/// A relay token.
#[derive(Clone, PartialEq, Message)]
pub struct RelayTokenGrant {
    /// For which relay, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub relay: Vec<u8>,
    /// The signed token.
    #[prost(message, optional, tag = "2")]
    pub token: Option<Signed>,
}

/// Answer to `Ping`.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Pong {
    /// As asked.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// The coordinator's clock in microseconds since the Unix epoch.
    #[prost(int64, tag = "2")]
    pub unix_us: i64,
}

/// Which peers are connected to the coordinator.
#[derive(Clone, PartialEq, Message)]
pub struct Presence {
    /// Ids of peers that are now online, 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub online: Vec<Vec<u8>>,
    /// Ids of peers that are now offline.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub offline: Vec<Vec<u8>>,
}

/// Where rules stand in the policy now. Rules that the device's netmap doesn't hold are left out.
#[derive(Clone, PartialEq, Message)]
pub struct RuleOrigins {
    /// As asked.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// The rules.
    #[prost(message, repeated, tag = "2")]
    pub rules: Vec<RuleOrigin>,
}

/// Where one rule stands.
#[derive(Clone, PartialEq, Message)]
pub struct RuleOrigin {
    /// Its id.
    #[prost(fixed64, tag = "1")]
    pub rule: u64,
    /// Its place, `grants[3] line 41`.
    #[prost(string, tag = "2")]
    pub origin: String,
}
