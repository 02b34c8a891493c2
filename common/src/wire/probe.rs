//! Probes: what agents say to each other beside WireGuard, to find a path and to measure it (docs/wire.md).
//!
//! A probe travels on the WireGuard socket, through a relay, or through the coordinator's signal channel, always
//! sealed: to anyone but the two devices it is a magic, a tag that only they can compute, and noise.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use arrayvec::ArrayVec;
use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{Key, Tag, XChaCha20Poly1305, XNonce};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::WireError;
use crate::keys::{ProbePublicKey, ProbeSecretKey};

/// How a probe begins: no WireGuard message (1 to 4 and three zeros), no STUN message (two leading zero bits).
pub const MAGIC: [u8; 4] = [0xf1, b'W', b'r', b'1'];
/// Bytes of the tag that names a direction between two devices to them alone.
pub const TAG_LEN: usize = 8;
/// Bytes of the random nonce.
pub const NONCE_LEN: usize = 24;
/// Bytes of a transaction id.
pub const TXID_LEN: usize = 12;
/// Bytes before the sealed message.
pub const HEADER_LEN: usize = MAGIC.len() + TAG_LEN + NONCE_LEN;
/// Bytes that sealing adds to a message.
pub const OVERHEAD: usize = HEADER_LEN + AEAD_TAG_LEN;
/// Most addresses one message may list: more than a host with several networks and families has, and small enough
/// that trying them all is no flood.
pub const MAX_CANDIDATES: usize = 16;
/// Longest probe but for a padded ping, in bytes.
pub const MAX_PROBE_LEN: usize = OVERHEAD + 2 + 1 + MAX_CANDIDATES * (1 + ENDPOINT_LEN) + 1;
/// Longest ping, in bytes: about the longest packet that an Ethernet with jumbo frames carries.
pub const MAX_PADDED_LEN: usize = 9_216;

const AEAD_TAG_LEN: usize = 16;
const ENDPOINT_LEN: usize = 18;
/// Ping and pong have one length, so that an observer can't tell them apart and an answer is no longer than a question.
const PING_BODY_LEN: usize = 1 + TXID_LEN + 1 + ENDPOINT_LEN;
const WHAT: &str = "probe";

/// Pairs a question with its answer; unpredictable.
pub type TxId = [u8; TXID_LEN];

/// Where a candidate address comes from. Open: an unknown kind is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CandidateKind {
    /// An address of one of the sender's interfaces.
    Local,
    /// What a STUN server saw.
    Reflexive,
    /// What another peer saw.
    Observed,
    /// A port that the sender's router forwards.
    Mapped,
    /// Somebody told the sender that it is reached there.
    Static,
    /// A port that the sender's NAT is likely to give out next.
    Predicted,
}

impl CandidateKind {
    /// For people and their programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Reflexive => "reflexive",
            Self::Observed => "observed",
            Self::Mapped => "mapped",
            Self::Static => "static",
            Self::Predicted => "predicted",
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Local => 0,
            Self::Reflexive => 1,
            Self::Observed => 2,
            Self::Mapped => 3,
            Self::Predicted => 4,
            Self::Static => 5,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Local),
            1 => Some(Self::Reflexive),
            2 => Some(Self::Observed),
            3 => Some(Self::Mapped),
            4 => Some(Self::Predicted),
            5 => Some(Self::Static),
            _ => None,
        }
    }
}

/// What a NAT does with the outside port when the same socket sends elsewhere (RFC 4787 section 4.1). Open: an unknown
/// kind counts as not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ports {
    /// It stays: there is no NAT, or one with endpoint-independent mapping.
    Fixed,
    /// It is another one, and the next can be told.
    Predictable,
    /// It is another one, and any.
    Random,
}

impl Ports {
    const fn code(self) -> u8 {
        match self {
            Self::Fixed => 1,
            Self::Predictable => 2,
            Self::Random => 3,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Fixed),
            2 => Some(Self::Predictable),
            3 => Some(Self::Random),
            _ => None,
        }
    }
}

/// An address at which its sender may be reachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Candidate {
    /// Where it comes from.
    pub kind: CandidateKind,
    /// The address.
    pub addr: SocketAddr,
}

/// What a probe says.
#[expect(
    clippy::large_enum_variant,
    reason = "lives on the stack for one call; a box would allocate per probe"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Are you there?
    Ping {
        /// Comes back in the answer.
        txid: TxId,
    },
    /// Yes.
    Pong {
        /// As asked.
        txid: TxId,
        /// Where the ping came from, unless it came through a relay.
        observed: Option<SocketAddr>,
    },
    /// Where I may be: try these addresses now, and tell me yours.
    Candidates {
        /// The sender has none of the receiver's addresses and asks for them.
        request: bool,
        /// The sender's addresses, at most [`MAX_CANDIDATES`].
        candidates: ArrayVec<Candidate, MAX_CANDIDATES>,
        /// What the sender's NAT does with ports, if known.
        ports: Option<Ports>,
    },
    /// I have opened ports towards you, and can't know which: try mine at this address.
    Guess {
        /// The sender's address outside of its NAT, with a port that they are near to; 0 if they may be any.
        near: SocketAddr,
    },
    /// Something a later version says.
    Unknown,
}

const PING: u8 = 1;
const PONG: u8 = 2;
const CANDIDATES: u8 = 3;
const GUESS: u8 = 4;

/// The keys between two devices, one for each direction. Made once for each peer that is in use.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ProbeKeys {
    seal: [u8; 32],
    open: [u8; 32],
    seal_tag: [u8; TAG_LEN],
    open_tag: [u8; TAG_LEN],
}

impl std::fmt::Debug for ProbeKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProbeKeys(redacted)")
    }
}

impl ProbeKeys {
    /// Derives them from X25519 of the two probe keys. `None` if their public key is a low-order point.
    pub fn derive(
        mine: &ProbeSecretKey,
        my_public: &ProbePublicKey,
        theirs: &ProbePublicKey,
    ) -> Option<Self> {
        let shared = mine.diffie_hellman(theirs)?;
        let kdf = |label: &[u8], from: &ProbePublicKey, to: &ProbePublicKey| -> [u8; 32] {
            let mut mac = Blake2sMac256::new(shared.expose().into());
            mac.update(label);
            mac.update(from.as_bytes());
            mac.update(to.as_bytes());
            mac.finalize_fixed().into()
        };
        let tag = |from, to| {
            let long = kdf(b"warren probe tag v1\0", from, to);
            std::array::from_fn(|i| long[i])
        };
        Some(Self {
            seal: kdf(b"warren probe key v1\0", my_public, theirs),
            open: kdf(b"warren probe key v1\0", theirs, my_public),
            seal_tag: tag(my_public, theirs),
            open_tag: tag(theirs, my_public),
        })
    }

    /// The tag that probes from the peer carry.
    pub fn open_tag(&self) -> [u8; TAG_LEN] {
        self.open_tag
    }

    /// `message` as a probe to the peer. `nonce` must be random and never used twice.
    pub fn seal(&self, message: &Message, nonce: [u8; NONCE_LEN]) -> ArrayVec<u8, MAX_PROBE_LEN> {
        let mut out = ArrayVec::new();
        self.write_head(&mut out, message, nonce);
        let tag = self.seal_body(&mut out, nonce);
        put(&mut out, &tag);
        out
    }

    /// A ping as a probe of `len` bytes: it arrives only where so long a datagram does. `nonce` as above; `len` is at
    /// least what a ping takes, and at most [`MAX_PADDED_LEN`], or else the nearest of these.
    pub fn seal_padded(&self, txid: TxId, nonce: [u8; NONCE_LEN], len: usize) -> Vec<u8> {
        let mut head = ArrayVec::<u8, MAX_PROBE_LEN>::new();
        self.write_head(&mut head, &Message::Ping { txid }, nonce);
        let mut out = head.to_vec();
        out.resize(len.clamp(head.len() + AEAD_TAG_LEN, MAX_PADDED_LEN) - AEAD_TAG_LEN, 0);
        let tag = self.seal_body(&mut out, nonce);
        out.extend(tag);
        out
    }

    fn write_head(&self, out: &mut ArrayVec<u8, MAX_PROBE_LEN>, message: &Message, nonce: [u8; NONCE_LEN]) {
        put(out, &MAGIC);
        put(out, &self.seal_tag);
        put(out, &nonce);
        message.encode(out);
    }

    fn seal_body(&self, probe: &mut [u8], nonce: [u8; NONCE_LEN]) -> [u8; AEAD_TAG_LEN] {
        let (head, body) = probe.split_at_mut(HEADER_LEN);
        let cipher = XChaCha20Poly1305::new(Key::from_slice(&self.seal));
        let associated: &[u8] = &head[..MAGIC.len() + TAG_LEN];
        #[expect(clippy::expect_used, reason = "fails only for a plaintext of 256 GiB")]
        let tag = cipher
            .encrypt_in_place_detached(XNonce::from_slice(&nonce), associated, body)
            .expect("short plaintext");
        tag.into()
    }

    /// The message in a probe from the peer.
    ///
    /// # Errors
    /// It isn't from the peer to us, or (from a peer that speaks nonsense) malformed.
    pub fn open(&self, probe: &[u8]) -> Result<Message, WireError> {
        if probe.len() < OVERHEAD || probe.len() > MAX_PADDED_LEN || peek_tag(probe) != Some(self.open_tag) {
            return Err(WireError::field(WHAT, "header"));
        }
        let (head, sealed) = probe.split_at(HEADER_LEN);
        let (associated, nonce) = head.split_at(MAGIC.len() + TAG_LEN);
        let (body, tag) = sealed.split_at(sealed.len() - AEAD_TAG_LEN);
        let mut plain = ArrayVec::<u8, MAX_PADDED_LEN>::new();
        put(&mut plain, body);
        XChaCha20Poly1305::new(Key::from_slice(&self.open))
            .decrypt_in_place_detached(
                XNonce::from_slice(nonce),
                associated,
                &mut plain,
                Tag::from_slice(tag),
            )
            .map_err(|_| WireError::Signature { what: WHAT })?;
        Message::decode(&plain)
    }
}

/// True if `datagram` is a probe by its magic.
pub fn is_probe(datagram: &[u8]) -> bool {
    datagram.starts_with(&MAGIC)
}

/// The tag of a probe, if `datagram` is one: whose it is, unauthenticated.
pub fn peek_tag(datagram: &[u8]) -> Option<[u8; TAG_LEN]> {
    datagram.strip_prefix(&MAGIC)?.first_chunk().copied()
}

impl Message {
    /// Appends what [`ProbeKeys::seal`] seals.
    pub fn encode(&self, out: &mut ArrayVec<u8, MAX_PROBE_LEN>) {
        match self {
            Self::Ping { txid } => {
                put(out, &[PING]);
                put(out, txid);
                put(out, &[0; 1 + ENDPOINT_LEN]);
            }
            Self::Pong { txid, observed } => {
                put(out, &[PONG]);
                put(out, txid);
                put(out, &[u8::from(observed.is_some())]);
                put(out, &observed.map_or([0; ENDPOINT_LEN], encode_endpoint));
            }
            Self::Candidates { request, candidates, ports } => {
                put(out, &[CANDIDATES, u8::from(*request), candidates.len() as u8]);
                for candidate in candidates {
                    put(out, &[candidate.kind.code()]);
                    put(out, &encode_endpoint(candidate.addr));
                }
                if let Some(ports) = ports {
                    put(out, &[ports.code()]);
                }
            }
            Self::Guess { near } => {
                put(out, &[GUESS]);
                put(out, &encode_endpoint(*near));
            }
            Self::Unknown => put(out, &[0]),
        }
    }

    /// Reads what [`ProbeKeys::open`] opened. Unknown kinds of messages and candidates are ignored.
    ///
    /// # Errors
    /// The message is cut short, or lists more than [`MAX_CANDIDATES`].
    pub fn decode(plain: &[u8]) -> Result<Self, WireError> {
        let field = |name| WireError::field(WHAT, name);
        let (kind, body) = plain.split_first().ok_or(field("kind"))?;
        match *kind {
            PING | PONG => {
                // A later version may append: what follows is ignored.
                let body: &[u8; PING_BODY_LEN - 1] = body.first_chunk().ok_or(field("ping"))?;
                let (txid, observed) = body.split_first_chunk().ok_or(field("txid"))?;
                if *kind == PING {
                    return Ok(Self::Ping { txid: *txid });
                }
                let (known, endpoint) = observed.split_first().ok_or(field("observed"))?;
                let observed = if *known == 1 { decode_endpoint(endpoint) } else { None };
                Ok(Self::Pong { txid: *txid, observed })
            }
            CANDIDATES => {
                let ([flags, count], list) = body.split_first_chunk().ok_or(field("candidates"))?;
                let count = usize::from(*count);
                let (entries, _) = list.as_chunks::<{ 1 + ENDPOINT_LEN }>();
                if count > MAX_CANDIDATES || entries.len() < count {
                    return Err(field("candidates"));
                }
                let candidates = entries[..count]
                    .iter()
                    .filter_map(|entry| {
                        let kind = CandidateKind::from_code(entry[0])?;
                        Some(Candidate { kind, addr: decode_endpoint(&entry[1..])? })
                    })
                    .collect();
                let ports = list.get(count * (1 + ENDPOINT_LEN)).and_then(|code| Ports::from_code(*code));
                Ok(Self::Candidates { request: flags & 1 == 1, candidates, ports })
            }
            GUESS => {
                let near = body.get(..ENDPOINT_LEN).and_then(decode_endpoint).ok_or(field("guess"))?;
                Ok(Self::Guess { near })
            }
            _ => Ok(Self::Unknown),
        }
    }
}

/// Sixteen bytes of address (IPv4 as an IPv4-mapped one, RFC 4291 section 2.5.5.2) and two of port.
fn encode_endpoint(endpoint: SocketAddr) -> [u8; ENDPOINT_LEN] {
    let ip = match endpoint.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut out = [0; ENDPOINT_LEN];
    out[..16].copy_from_slice(&ip.octets());
    out[16..].copy_from_slice(&endpoint.port().to_be_bytes());
    out
}

fn decode_endpoint(bytes: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = bytes.split_first_chunk::<16>()?;
    let port = u16::from_be_bytes(port.try_into().ok()?);
    Some(SocketAddr::new(Ipv6Addr::from(*ip).to_canonical(), port))
}

fn put<const N: usize>(out: &mut ArrayVec<u8, N>, bytes: &[u8]) {
    // N is the longest probe; `open` checks lengths first and messages are bounded by MAX_CANDIDATES.
    let fits = out.try_extend_from_slice(bytes);
    debug_assert!(fits.is_ok(), "MAX_PROBE_LEN is too short");
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_encoding::HEXLOWER;
    use proptest::prelude::*;

    fn keys() -> (ProbeKeys, ProbeKeys) {
        let (a, b) = (ProbeSecretKey::from_bytes([1; 32]), ProbeSecretKey::from_bytes([2; 32]));
        let (pa, pb) = (a.public(), b.public());
        (ProbeKeys::derive(&a, &pa, &pb).unwrap(), ProbeKeys::derive(&b, &pb, &pa).unwrap())
    }

    fn messages() -> [Message; 6] {
        let v4 = SocketAddr::from(([192, 0, 2, 1], 51_820));
        let v6 = SocketAddr::new("2001:db8::1".parse().unwrap(), 7);
        let candidates = [
            Candidate { kind: CandidateKind::Local, addr: v4 },
            Candidate { kind: CandidateKind::Reflexive, addr: v6 },
        ];
        [
            Message::Ping { txid: [3; TXID_LEN] },
            Message::Pong { txid: [3; TXID_LEN], observed: Some(v4) },
            Message::Pong { txid: [3; TXID_LEN], observed: None },
            Message::Candidates { request: true, candidates: candidates.into_iter().collect(), ports: None },
            Message::Candidates { request: false, candidates: ArrayVec::new(), ports: Some(Ports::Random) },
            Message::Guess { near: v4 },
        ]
    }

    #[test]
    fn golden_bytes() {
        let (a, _) = keys();
        let golden = include_str!("../../tests/golden/probes.hex");
        let sealed: Vec<_> = messages().iter().map(|m| HEXLOWER.encode(&a.seal(m, [9; NONCE_LEN]))).collect();
        assert_eq!(golden.lines().collect::<Vec<_>>(), sealed);
    }

    #[test]
    fn what_one_seals_only_the_other_opens() {
        let (a, b) = keys();
        for message in messages() {
            let probe = a.seal(&message, [9; NONCE_LEN]);
            assert!(is_probe(&probe) && peek_tag(&probe) == Some(b.open_tag()));
            assert_eq!(b.open(&probe), Ok(message));
            assert!(a.open(&probe).is_err(), "a reflected probe is not the peer's");
        }
        let (ping, pong) = (&messages()[0], &messages()[1]);
        assert_eq!(a.seal(ping, [0; 24]).len(), a.seal(pong, [0; 24]).len());
    }

    #[test]
    fn kinds_of_candidates_arrive_as_sent_and_unknown_ones_not_at_all() {
        let kinds: Vec<CandidateKind> = (0..=u8::MAX).filter_map(CandidateKind::from_code).collect();
        assert!(kinds.iter().enumerate().all(|(code, kind)| usize::from(kind.code()) == code));
        let words: Vec<&str> = kinds.iter().map(|kind| kind.as_str()).collect();
        assert_eq!(words, ["local", "reflexive", "observed", "mapped", "predicted", "static"]);
    }

    #[test]
    fn the_longest_message_fits_and_a_longer_list_is_refused() {
        let (a, b) = keys();
        let one = Candidate { kind: CandidateKind::Mapped, addr: SocketAddr::from(([1, 2, 3, 4], 5)) };
        let candidates = [one; MAX_CANDIDATES].into();
        let message = Message::Candidates { request: false, candidates, ports: Some(Ports::Fixed) };
        let probe = a.seal(&message, [9; NONCE_LEN]);
        assert_eq!(probe.len(), MAX_PROBE_LEN);
        const { assert!(MAX_PROBE_LEN <= 1_200, "a signal carries at most 1 200 bytes") };
        assert_eq!(b.open(&probe), Ok(message));
        let mut plain = vec![CANDIDATES, 0, MAX_CANDIDATES as u8 + 1];
        plain.extend([0; (MAX_CANDIDATES + 1) * (1 + ENDPOINT_LEN)]);
        assert!(Message::decode(&plain).is_err());
    }

    #[test]
    fn unknown_kinds_and_appended_fields_are_ignored() {
        assert_eq!(Message::decode(&[77, 1, 2]), Ok(Message::Unknown));
        let mut plain = ArrayVec::new();
        messages()[1].encode(&mut plain);
        put(&mut plain, b"later");
        assert_eq!(Message::decode(&plain), Ok(messages()[1].clone()));
        let mut entry = vec![CANDIDATES, 0, 1, 200];
        entry.extend([1; ENDPOINT_LEN]);
        assert_eq!(
            Message::decode(&entry),
            Ok(Message::Candidates { request: false, candidates: ArrayVec::new(), ports: None })
        );
    }

    #[test]
    fn a_padded_ping_is_as_long_as_asked_for_and_still_a_ping() {
        let (a, b) = keys();
        let txid = [3; TXID_LEN];
        let shortest = a.seal(&messages()[0], [9; NONCE_LEN]);
        assert_eq!(a.seal_padded(txid, [9; NONCE_LEN], 0), shortest.to_vec());
        for len in [shortest.len() + 1, MAX_PROBE_LEN + 1, 1_200, MAX_PADDED_LEN] {
            let probe = a.seal_padded(txid, [9; NONCE_LEN], len);
            assert_eq!((probe.len(), b.open(&probe)), (len, Ok(Message::Ping { txid })));
        }
        let mut longer = a.seal_padded(txid, [9; NONCE_LEN], usize::MAX);
        assert_eq!(longer.len(), MAX_PADDED_LEN);
        longer.push(0);
        assert!(b.open(&longer).is_err());
    }

    #[test]
    fn what_a_nat_does_with_ports_is_open_to_later_kinds() {
        let decode = |code: u8| match Message::decode(&[CANDIDATES, 0, 0, code]) {
            Ok(Message::Candidates { ports, .. }) => ports,
            other => panic!("{other:?}"),
        };
        assert_eq!([1, 2, 3].map(decode), [Ports::Fixed, Ports::Predictable, Ports::Random].map(Some));
        assert_eq!([0, 77].map(decode), [None, None]);
        assert!(Message::decode(&[GUESS, 1, 2]).is_err());
    }

    proptest! {
        #[test]
        fn garbage_and_changed_probes_never_panic_and_never_open(
            garbage in proptest::collection::vec(any::<u8>(), 0..600),
            at in 0usize..400, bit in 0u8..8, cut in 0usize..400,
        ) {
            let (a, b) = keys();
            prop_assert!(b.open(&garbage).is_err());
            let _ = Message::decode(&garbage);
            let mut forged = MAGIC.to_vec();
            forged.extend(b.open_tag());
            forged.extend(&garbage);
            prop_assert!(b.open(&forged).is_err());
            for message in messages() {
                let probe = a.seal(&message, [9; NONCE_LEN]);
                let mut changed = probe.to_vec();
                let at = at % changed.len();
                changed[at] ^= 1 << bit;
                prop_assert!(b.open(&changed).is_err());
                prop_assert!(b.open(&probe[..cut % probe.len()]).is_err());
            }
        }
    }
}
