//! Relay tokens: short-lived, signed by the coordinator, useless without the device's probe key.

use prost::Message;

use super::WireError;
use super::control::Signed;
use crate::ids::{DeviceId, NetworkId, RelayId};
use crate::keys::{NetmapPublicKey, NetmapSecretKey, ProbePublicKey, SignatureDomain};
use crate::time::UnixTime;

/// Longest life of a token, in seconds.
pub const MAX_TOKEN_LIFE_S: i64 = 600;
/// Most destinations one token permits; bounds a relay's memory per client to 64 KiB of ids.
pub const MAX_TOKEN_PEERS: usize = 4_096;

#[derive(Clone, PartialEq, Message)]
struct TokenMsg {
    #[prost(bytes = "vec", tag = "1")]
    network: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    relay: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    device: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    probe: Vec<u8>,
    #[prost(uint64, tag = "5")]
    revision: u64,
    #[prost(int64, tag = "6")]
    expires_s: i64,
    /// Ids laid end to end, 16 bytes each.
    #[prost(bytes = "vec", tag = "7")]
    peers: Vec<u8>,
}

/// Lets one device use one relay towards its peers for a few minutes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayToken {
    /// The network.
    pub network: NetworkId,
    /// The only relay it is good for.
    pub relay: RelayId,
    /// The device.
    pub device: DeviceId,
    /// The key whose possession the device must prove to the relay.
    pub probe: ProbePublicKey,
    /// The coordinator's revision when it was made; a relay told of a newer requirement refuses it.
    pub revision: u64,
    /// When it ends.
    pub expires: UnixTime,
    /// The devices it may send to, sorted.
    pub peers: Vec<DeviceId>,
}

impl RelayToken {
    const WHAT: &'static str = "relay token";

    /// Encodes and signs.
    pub fn sign(&self, key: &NetmapSecretKey) -> Signed {
        let payload = TokenMsg {
            network: self.network.to_bytes().to_vec(),
            relay: self.relay.to_bytes().to_vec(),
            device: self.device.to_bytes().to_vec(),
            probe: self.probe.as_bytes().to_vec(),
            revision: self.revision,
            expires_s: self.expires.as_secs(),
            peers: self.peers.iter().flat_map(|id| id.to_bytes()).collect(),
        }
        .encode_to_vec();
        let signature = key.sign(SignatureDomain::RelayToken, &payload).to_vec();
        Signed { payload, signature }
    }

    /// Verifies the signature and decodes. Relay, time and possession are the relay's to judge.
    ///
    /// # Errors
    /// A wrong signature or malformed contents.
    pub fn verify(signed: &Signed, key: &NetmapPublicKey) -> Result<Self, WireError> {
        if !key.verify(SignatureDomain::RelayToken, &signed.payload, &signed.signature) {
            return Err(WireError::Signature { what: Self::WHAT });
        }
        let msg =
            TokenMsg::decode(signed.payload.as_slice()).map_err(|e| WireError::decode(Self::WHAT, &e))?;
        let field = |field| WireError::field(Self::WHAT, field);
        let (peers, rest) = msg.peers.as_chunks::<16>();
        if !rest.is_empty() || peers.len() > MAX_TOKEN_PEERS {
            return Err(field("peers"));
        }
        Ok(Self {
            network: NetworkId::from_slice(&msg.network).ok_or(field("network"))?,
            relay: RelayId::from_slice(&msg.relay).ok_or(field("relay"))?,
            device: DeviceId::from_slice(&msg.device).ok_or(field("device"))?,
            probe: ProbePublicKey::from_slice(&msg.probe).ok_or(field("probe"))?,
            revision: msg.revision,
            expires: UnixTime::from_secs(msg.expires_s),
            peers: peers.iter().map(|id| DeviceId::from_bytes(*id)).collect(),
        })
    }
}
