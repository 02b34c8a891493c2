//! Frames between a device and a relay: fixed layouts, big endian, one type byte first (docs/wire.md).
//!
//! They travel in two ways. Over QUIC (its version agreed by [`ALPN`]) on one stream, each behind its length in three bytes,
//! see [`put_on_stream`] and [`Deframer`]; a datagram holds exactly one frame, of type `Send` or `Recv`, and data that no
//! datagram can hold goes over the stream. Over TCP as binary messages of a WebSocket inside TLS ([`WEBSOCKET_PATH`]), one
//! frame each.
//!
//! 1. The relay sends `Challenge`. 2. The device answers with `Auth`: a token and the proof that it holds the probe key
//!    which the token names. 3. The relay says `Ready`, or `Refused` and closes. 4. `Send` turns into `Recv`: the relay
//!    overwrites the destination with the source that the token proved, so no device can speak for another.
//!
//! Once that is done, packets can also go as plain UDP beside the connection: see [`udp`].
//!
//! A frame of an unknown type decodes as `None` and is ignored; a known type with a wrong length is an error.

use blake2::digest::Mac as _;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::WireError;
use super::control::Signed;
use super::token::MAX_TOKEN_PEERS;
use crate::ids::{DeviceId, NetworkId, RelayId};
use crate::keys::{ProbePublicKey, ProbeSecretKey, SIGNATURE_LEN, SharedSecret};

mod queue;
pub mod udp;

pub use queue::{
    Class, DATA_QUEUE_BYTES, FrameQueue, MAX_CONTROL_FRAMES, MAX_FLOWS, MAX_HANDSHAKE_FRAMES, Pushed,
    QueuedFrame,
};
use udp::UdpKeys;

/// What QUIC offers as application protocol; names the version.
pub const ALPN: &[u8] = b"warren-relay/1";
/// What TLS over TCP offers as application protocol: firewalls that look for it let HTTP through.
pub const WEBSOCKET_ALPN: &[u8] = b"http/1.1";
/// Where the WebSocket of a session is; names the version.
pub const WEBSOCKET_PATH: &str = "/packets/v1";
/// The server name in the TLS hello. It says nothing: the certificate is pinned by its hash.
pub const SERVER_NAME: &str = "warren-relay";
/// Longest payload of `Send` and `Recv` in bytes: a sealed packet of a 1 500-byte path, with room to spare.
pub const MAX_PAYLOAD: usize = 1_600;
/// Longest token in bytes, without its signature: all the peers it may hold, and 256 bytes for the rest.
pub const MAX_TOKEN_LEN: usize = 16 * MAX_TOKEN_PEERS + 256;
/// Longest frame in bytes (`Auth` with the longest token): what a stranger can make a relay buffer.
pub const MAX_FRAME: usize = 1 + 32 + SIGNATURE_LEN + MAX_TOKEN_LEN;
/// Longest text of a refusal in bytes.
pub const MAX_TEXT: usize = 255;
/// Bytes of a frame before its payload, for `Send` and `Recv`.
pub const DATA_HEADER: usize = 1 + 16;
/// Bytes of the length in front of a frame on a stream.
pub const STREAM_HEADER: usize = 3;

/// What a [`Deframer`] keeps allocated between frames, in bytes.
const KEPT_BUFFER: usize = 16 * 1024;
const WHAT: &str = "relay frame";
const POSSESSION: &[u8] = b"warren relay possession v1\0";
const UDP: &[u8] = b"warren relay udp v1\0";

const CHALLENGE: u8 = 0x01;
const AUTH: u8 = 0x02;
const READY: u8 = 0x03;
const REFUSED: u8 = 0x04;
const SEND: u8 = 0x05;
const RECV: u8 = 0x06;
const PING: u8 = 0x07;
const PONG: u8 = 0x08;
const PEER_GONE: u8 = 0x09;
const TOKEN_WANTED: u8 = 0x0a;
const TOKEN_REFRESH: u8 = 0x0b;
const DRAIN: u8 = 0x0c;
const UDP_OFFER: u8 = 0x0d;
const UDP_LOST: u8 = 0x0e;
const REST: u8 = 0x0f;

/// One frame, borrowing from the bytes it was decoded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Relay to device, first of all: `01 | ephemeral 32 | nonce 32`.
    Challenge(Challenge),
    /// Device to relay: `02 | proof 32 | signature 64 | token`.
    Auth {
        /// [`Challenge::prove`].
        proof: [u8; 32],
        /// The coordinator's token.
        token: TokenRef<'a>,
    },
    /// Relay to device, after `Auth` and after each accepted `TokenRefresh`: `03 | revision 8`.
    Ready {
        /// The revision of the token that counts now.
        revision: u64,
    },
    /// Relay to device, last of all: `04 | code 1 | text`. Over QUIC code and text are those of the connection's close.
    Refused {
        /// Why.
        code: RefusalCode,
        /// The same for people, at most [`MAX_TEXT`] bytes of UTF-8.
        text: &'a str,
    },
    /// Device to relay: `05 | destination 16 | payload`.
    Send {
        /// To whom.
        dst: DeviceId,
        /// Sealed bytes, at most [`MAX_PAYLOAD`].
        payload: &'a [u8],
    },
    /// Relay to device: `06 | source 16 | payload`.
    Recv {
        /// From whom; the relay's word.
        src: DeviceId,
        /// Sealed bytes, at most [`MAX_PAYLOAD`].
        payload: &'a [u8],
    },
    /// Either way: `07 | nonce 8`.
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// Answer to `Ping`: `08 | nonce 8`.
    Pong {
        /// As asked.
        nonce: u64,
    },
    /// Relay to device: a `Send` went nowhere. `09 | device 16 | why 1`.
    PeerGone {
        /// The destination.
        device: DeviceId,
        /// Why it went nowhere.
        why: GoneReason,
    },
    /// Relay to device: present another token soon. `0a | why 1`.
    TokenWanted {
        /// Why.
        why: WantedReason,
    },
    /// Device to relay: `0b | signature 64 | token`.
    TokenRefresh {
        /// A token for the same device and probe key.
        token: TokenRef<'a>,
    },
    /// Relay to device: go elsewhere within this time. `0c | milliseconds 4`.
    Drain {
        /// Until the relay closes, in milliseconds.
        after_ms: u32,
    },
    /// Relay to device, after the first `Ready`: packets may also come as plain UDP, to the port number of this
    /// connection. `0d | session 8`.
    UdpOffer {
        /// [`udp::Head::session`].
        session: u64,
    },
    /// Device to relay: send nothing over UDP until a datagram with a counter above this asks for it, and nothing more by the
    /// UDP of the session that this one took over. `0e | counter 8`.
    UdpLost {
        /// The newest that the device has used.
        counter: u64,
    },
    /// Device to relay: packets take plain UDP, so this connection need not be kept. The relay closes it with
    /// [`RefusalCode::Resting`] and the session goes on without it, or ignores this. `0f`
    Rest,
}

/// A signed token as it lies in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRef<'a> {
    signature: &'a [u8; SIGNATURE_LEN],
    payload: &'a [u8],
}

impl<'a> TokenRef<'a> {
    /// The parts of `signed`; `None` if its signature or length can't be that of a token.
    pub fn new(signed: &'a Signed) -> Option<Self> {
        let signature = signed.signature.as_slice().try_into().ok()?;
        (signed.payload.len() <= MAX_TOKEN_LEN).then_some(Self { signature, payload: &signed.payload })
    }

    /// An owned copy, for [`super::token::RelayToken::verify`].
    pub fn to_signed(self) -> Signed {
        Signed { payload: self.payload.to_vec(), signature: self.signature.to_vec() }
    }

    fn digest(self) -> [u8; 32] {
        Sha256::new().chain_update(self.signature).chain_update(self.payload).finalize().into()
    }
}

macro_rules! open_code {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// One this version does not know.
            Other(u8),
        }

        impl $name {
            /// Every code this version knows.
            pub const KNOWN: &'static [Self] = &[$(Self::$variant,)*];

            /// The byte on the wire.
            pub const fn to_u8(self) -> u8 {
                match self {
                    $(Self::$variant => $code,)*
                    Self::Other(code) => code,
                }
            }

            /// The code of a byte.
            pub const fn from_u8(code: u8) -> Self {
                match code {
                    $($code => Self::$variant,)*
                    other => Self::Other(other),
                }
            }

            /// A stable word: label of a counter, value in JSON.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                    Self::Other(_) => "other",
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

open_code!(
    /// Why a relay ends a connection.
    RefusalCode {
        /// A frame that makes no sense there, or no sense at all.
        Protocol = 1 "protocol",
        /// The token's signature is not the coordinator's, or its contents are malformed.
        TokenInvalid = 2 "token-invalid",
        /// The token has ended.
        TokenExpired = 3 "token-expired",
        /// The token lives longer than tokens may: one of the clocks is off.
        TokenLife = 4 "token-life",
        /// The token was made before a change that the relay was told of.
        TokenStale = 5 "token-stale",
        /// The token is for another relay or network.
        OtherRelay = 6 "other-relay",
        /// The proof of possession is wrong.
        Possession = 7 "possession",
        /// The device has been revoked.
        Revoked = 8 "revoked",
        /// A newer connection of the same device took over.
        Replaced = 9 "replaced",
        /// The relay is full; another may have room.
        Busy = 10 "busy",
        /// No `Auth` in time.
        AuthTimeout = 11 "auth-timeout",
        /// Nothing heard for too long.
        Idle = 12 "idle",
        /// The device does not read what it is sent.
        SlowReader = 13 "slow-reader",
        /// The relay shuts down.
        ShuttingDown = 14 "shutting-down",
        /// Only the connection ends, as the device has asked; its session goes on over UDP.
        Resting = 15 "resting",
    }
);

impl RefusalCode {
    /// What happened and what to do, for people.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Protocol => "the relay could not make sense of a frame; do the versions fit?",
            Self::TokenInvalid => "the relay token is not signed by this network's coordinator",
            Self::TokenExpired => "the relay token has ended; ask the coordinator for another",
            Self::TokenLife => {
                "the relay token ends too far in the future; check the clocks of relay and coordinator"
            }
            Self::TokenStale => {
                "access has changed since the relay token was made; ask the coordinator for another"
            }
            Self::OtherRelay => "the relay token is for another relay or network",
            Self::Possession => "the device did not prove that it holds the probe key of its relay token",
            Self::Revoked => "the device is no longer allowed in this network",
            Self::Replaced => {
                "a newer connection of the same device took over; is its state directory copied?"
            }
            Self::Busy => "the relay is full; try another or try again later",
            Self::AuthTimeout => "the device did not authenticate in time",
            Self::Idle => "nothing was heard from the device for too long",
            Self::SlowReader => "the device does not read what it is sent",
            Self::ShuttingDown => "the relay shuts down; try another or try again later",
            Self::Resting => "the session goes on over UDP, as the device has asked",
            Self::Other(_) => "the relay closed the connection for a reason that this version does not know",
        }
    }

    /// The last frame of a connection that ends for this reason.
    pub const fn frame(self) -> Frame<'static> {
        Frame::Refused { code: self, text: self.text() }
    }
}

open_code!(
    /// Why a `Send` went nowhere.
    GoneReason {
        /// The destination is not connected to this relay.
        NotConnected = 1 "not-connected",
        /// The sender's token does not permit the destination: a newer token may.
        NotPermitted = 2 "not-permitted",
    }
);

open_code!(
    /// Why a relay wants another token.
    WantedReason {
        /// The present one ends soon.
        Expiring = 1 "expiring",
        /// The present one is older than a change that the relay was told of: nothing is forwarded until then.
        Stale = 2 "stale",
    }
);

/// What the relay sends first: made afresh for each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// The relay's ephemeral X25519 key.
    pub ephemeral: ProbePublicKey,
    /// Random bytes.
    pub nonce: [u8; 32],
}

/// The channel that a proof is good for; both ends know it without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The network.
    pub network: NetworkId,
    /// The relay.
    pub relay: RelayId,
    /// SHA-256 of the relay's certificate (DER): a relay in the middle has another.
    pub cert_sha256: [u8; 32],
}

/// A device's proof, and what else only the two ends know.
#[derive(Debug)]
pub struct Proven {
    /// For [`Frame::Auth`].
    pub proof: [u8; 32],
    /// The device's keys for plain UDP.
    pub udp: UdpKeys,
}

impl Challenge {
    /// The device's proof that it holds `secret`, the probe key which `token` names, on this channel and now. `None` if
    /// the relay's key is of low order. With L = `"warren relay possession v1\0"` and the key
    /// K = SHA-256(L ‖ X25519(secret, ephemeral) ‖ ephemeral ‖ probe public key), it is keyed BLAKE2s-256 over
    /// L ‖ network ‖ relay ‖ certificate hash ‖ nonce ‖ SHA-256(token signature ‖ token). The UDP key of one direction is
    /// the same with L = `"warren relay udp v1\0"` and after it the direction (1 to the relay, 2 to the device), under K.
    pub fn prove(&self, secret: &ProbeSecretKey, binding: &Binding, token: TokenRef<'_>) -> Option<Proven> {
        let shared = secret.diffie_hellman(&self.ephemeral)?;
        let transcript = self.transcript(&shared, &secret.public(), binding, token);
        let [to_relay, to_device] = transcript.udp_keys();
        Some(Proven {
            proof: transcript.mac(POSSESSION).finalize().into_bytes().into(),
            udp: UdpKeys::new(to_relay, to_device),
        })
    }

    /// The relay's check of [`Challenge::prove`], in constant time; `ephemeral` is the secret of its challenge. If it
    /// holds, the relay's keys for plain UDP.
    #[must_use]
    pub fn check(
        &self,
        ephemeral: &ProbeSecretKey,
        device: &ProbePublicKey,
        binding: &Binding,
        token: TokenRef<'_>,
        proof: &[u8; 32],
    ) -> Option<UdpKeys> {
        let shared = ephemeral.diffie_hellman(device)?;
        let transcript = self.transcript(&shared, device, binding, token);
        transcript.mac(POSSESSION).verify(proof.into()).ok()?;
        let [to_relay, to_device] = transcript.udp_keys();
        Some(UdpKeys::new(to_device, to_relay))
    }

    fn transcript<'a>(
        &'a self,
        shared: &SharedSecret,
        device: &ProbePublicKey,
        binding: &'a Binding,
        token: TokenRef<'_>,
    ) -> Transcript<'a> {
        let key = Sha256::new()
            .chain_update(POSSESSION)
            .chain_update(shared.expose())
            .chain_update(self.ephemeral.as_bytes())
            .chain_update(device.as_bytes())
            .finalize();
        Transcript { key: Zeroizing::new(key.into()), binding, nonce: &self.nonce, token: token.digest() }
    }
}

/// What both ends have said and know.
struct Transcript<'a> {
    key: Zeroizing<[u8; 32]>,
    binding: &'a Binding,
    nonce: &'a [u8; 32],
    token: [u8; 32],
}

impl Transcript<'_> {
    fn mac(&self, label: &[u8]) -> blake2::Blake2sMac256 {
        blake2::Blake2sMac256::new(self.key.as_slice().into())
            .chain_update(label)
            .chain_update(self.binding.network.to_bytes())
            .chain_update(self.binding.relay.to_bytes())
            .chain_update(self.binding.cert_sha256)
            .chain_update(self.nonce)
            .chain_update(self.token)
    }

    /// To the relay, and to the device.
    fn udp_keys(&self) -> [[u8; 32]; 2] {
        [1, 2].map(|direction| self.mac(&[UDP, &[direction]].concat()).finalize().into_bytes().into())
    }
}

impl<'a> Frame<'a> {
    /// Reads one frame: the whole of `bytes`. `None` for a type that this version does not know.
    ///
    /// # Errors
    /// A known type with a wrong length, or a text that is not UTF-8.
    pub fn decode(bytes: &'a [u8]) -> Result<Option<Self>, WireError> {
        let (kind, body) = bytes.split_first().ok_or(field("type"))?;
        Ok(Some(match *kind {
            CHALLENGE => {
                let (ephemeral, nonce) = fixed::<32>(body, "challenge")?;
                Self::Challenge(Challenge {
                    ephemeral: ProbePublicKey::from_bytes(*ephemeral),
                    nonce: *exact(nonce, "challenge")?,
                })
            }
            AUTH => {
                let (proof, rest) = fixed::<32>(body, "proof")?;
                Self::Auth { proof: *proof, token: token(rest)? }
            }
            READY => Self::Ready { revision: u64::from_be_bytes(*exact(body, "revision")?) },
            REFUSED => {
                let (code, text) = body.split_first().ok_or(field("code"))?;
                if text.len() > MAX_TEXT {
                    return Err(field("text"));
                }
                Self::Refused {
                    code: RefusalCode::from_u8(*code),
                    text: std::str::from_utf8(text).map_err(|_| field("text"))?,
                }
            }
            SEND => {
                let (dst, payload) = data(body)?;
                Self::Send { dst, payload }
            }
            RECV => {
                let (src, payload) = data(body)?;
                Self::Recv { src, payload }
            }
            PING => Self::Ping { nonce: u64::from_be_bytes(*exact(body, "nonce")?) },
            PONG => Self::Pong { nonce: u64::from_be_bytes(*exact(body, "nonce")?) },
            PEER_GONE => {
                let (device, why) = fixed::<16>(body, "device")?;
                let [why] = *exact(why, "why")?;
                Self::PeerGone { device: DeviceId::from_bytes(*device), why: GoneReason::from_u8(why) }
            }
            TOKEN_WANTED => {
                let [why] = *exact(body, "why")?;
                Self::TokenWanted { why: WantedReason::from_u8(why) }
            }
            TOKEN_REFRESH => Self::TokenRefresh { token: token(body)? },
            DRAIN => Self::Drain { after_ms: u32::from_be_bytes(*exact(body, "milliseconds")?) },
            UDP_OFFER => Self::UdpOffer { session: u64::from_be_bytes(*exact(body, "session")?) },
            UDP_LOST => Self::UdpLost { counter: u64::from_be_bytes(*exact(body, "counter")?) },
            REST => {
                let [] = *exact(body, "length")?;
                Self::Rest
            }
            _ => return Ok(None),
        }))
    }

    /// Bytes that [`Frame::encode_into`] appends.
    pub const fn encoded_len(&self) -> usize {
        1 + match self {
            Self::Challenge(_) => 64,
            Self::Auth { token, .. } => 32 + SIGNATURE_LEN + token.payload.len(),
            Self::Ready { .. }
            | Self::Ping { .. }
            | Self::Pong { .. }
            | Self::UdpOffer { .. }
            | Self::UdpLost { .. } => 8,
            Self::Refused { text, .. } => 1 + cut(text).len(),
            Self::Send { payload, .. } | Self::Recv { payload, .. } => 16 + payload.len(),
            Self::PeerGone { .. } => 17,
            Self::TokenWanted { .. } => 1,
            Self::TokenRefresh { token } => SIGNATURE_LEN + token.payload.len(),
            Self::Drain { .. } => 4,
            Self::Rest => 0,
        }
    }

    /// Appends the frame to `out`. A text is cut to [`MAX_TEXT`] bytes; a payload is the caller's to bound.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.reserve(self.encoded_len());
        match self {
            Self::Challenge(challenge) => {
                out.push(CHALLENGE);
                out.extend_from_slice(challenge.ephemeral.as_bytes());
                out.extend_from_slice(&challenge.nonce);
            }
            Self::Auth { proof, token } => {
                out.push(AUTH);
                out.extend_from_slice(proof);
                put_token(out, *token);
            }
            Self::Ready { revision } => put(out, READY, &[&revision.to_be_bytes()]),
            Self::Refused { code, text } => put(out, REFUSED, &[&[code.to_u8()], cut(text).as_bytes()]),
            Self::Send { dst, payload } => put(out, SEND, &[&dst.to_bytes(), payload]),
            Self::Recv { src, payload } => put(out, RECV, &[&src.to_bytes(), payload]),
            Self::Ping { nonce } => put(out, PING, &[&nonce.to_be_bytes()]),
            Self::Pong { nonce } => put(out, PONG, &[&nonce.to_be_bytes()]),
            Self::PeerGone { device, why } => put(out, PEER_GONE, &[&device.to_bytes(), &[why.to_u8()]]),
            Self::TokenWanted { why } => put(out, TOKEN_WANTED, &[&[why.to_u8()]]),
            Self::TokenRefresh { token } => {
                out.push(TOKEN_REFRESH);
                put_token(out, *token);
            }
            Self::Drain { after_ms } => put(out, DRAIN, &[&after_ms.to_be_bytes()]),
            Self::UdpOffer { session } => put(out, UDP_OFFER, &[&session.to_be_bytes()]),
            Self::UdpLost { counter } => put(out, UDP_LOST, &[&counter.to_be_bytes()]),
            Self::Rest => put(out, REST, &[]),
        }
    }

    /// The frame as bytes of its own.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_into(&mut out);
        out
    }
}

fn field(field: &'static str) -> WireError {
    WireError::field(WHAT, field)
}

fn fixed<'a, const N: usize>(
    bytes: &'a [u8],
    name: &'static str,
) -> Result<(&'a [u8; N], &'a [u8]), WireError> {
    bytes.split_first_chunk().ok_or(field(name))
}

fn exact<'a, const N: usize>(bytes: &'a [u8], name: &'static str) -> Result<&'a [u8; N], WireError> {
    bytes.try_into().map_err(|_| field(name))
}

fn token(bytes: &[u8]) -> Result<TokenRef<'_>, WireError> {
    let (signature, payload) = fixed(bytes, "signature")?;
    if payload.len() > MAX_TOKEN_LEN {
        return Err(field("token"));
    }
    Ok(TokenRef { signature, payload })
}

fn data(bytes: &[u8]) -> Result<(DeviceId, &[u8]), WireError> {
    let (id, payload) = fixed(bytes, "device")?;
    if payload.is_empty() || payload.len() > MAX_PAYLOAD {
        return Err(field("payload"));
    }
    Ok((DeviceId::from_bytes(*id), payload))
}

fn put(out: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    out.push(kind);
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

fn put_token(out: &mut Vec<u8>, token: TokenRef<'_>) {
    out.extend_from_slice(token.signature);
    out.extend_from_slice(token.payload);
}

const fn cut(text: &str) -> &str {
    let mut end = if text.len() > MAX_TEXT { MAX_TEXT } else { text.len() };
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.split_at(end).0
}

/// True if a payload is a WireGuard handshake or cookie message: one of these lost costs seconds, a data packet doesn't.
pub fn is_handshake(payload: &[u8]) -> bool {
    matches!(
        (payload.first_chunk(), payload.len()),
        (Some([1, 0, 0, 0]), 148) | (Some([2, 0, 0, 0]), 92) | (Some([3, 0, 0, 0]), 64)
    )
}

/// Appends `frame` to `out` as it stands on a stream: behind its length in three bytes.
pub fn put_on_stream(frame: &[u8], out: &mut Vec<u8>) {
    debug_assert!(frame.len() <= MAX_FRAME, "frames are bounded by their encoders");
    out.extend_from_slice(&(frame.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(frame);
}

/// Cuts a stream into frames; holds at most one frame and what came with it.
#[derive(Debug, Default)]
pub struct Deframer {
    buffer: Vec<u8>,
    start: usize,
}

impl Deframer {
    /// Where to append what was read. Frames handed out so far are gone from it, and so is the room for a long one.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BUFFER {
            self.buffer = Vec::new();
        }
        &mut self.buffer
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// A length of zero or above [`MAX_FRAME`]: the stream must be closed.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, WireError> {
        let rest = &self.buffer[self.start..];
        let Some((length, body)) = rest.split_first_chunk::<STREAM_HEADER>() else { return Ok(None) };
        let length = u32::from_be_bytes([0, length[0], length[1], length[2]]) as usize;
        if length == 0 || length > MAX_FRAME {
            return Err(field("length"));
        }
        if body.len() < length {
            return Ok(None);
        }
        let from = self.start + STREAM_HEADER;
        self.start = from + length;
        Ok(Some(&self.buffer[from..self.start]))
    }
}

#[cfg(test)]
mod tests;
