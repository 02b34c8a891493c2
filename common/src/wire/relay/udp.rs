//! Packets of a relay session as plain UDP datagrams, beside the connection that authenticated it.
//!
//! `kind 1 | session 8 | counter 8 | sealed 32 | payload`. The payload is sealed already, end to end, so it is not sealed
//! again; what is sealed is whom the packet is for or from, 16 bytes, by ChaCha20-Poly1305 under a key of this session and
//! direction, with the counter as nonce and everything in front and the payload's length as associated data. So an
//! observer sees a number that was made for this session, a counter and lengths; and nobody without the key can send
//! anything that the other end takes for authentic. The keys come out of the proof of possession ([`super::Challenge`])
//! and never travel.
//!
//! Both directions have the same layout and length, so a relay passes a packet on by sealing 32 bytes anew in place, and
//! answers a [`Kind::Ping`] with a [`Kind::Pong`] of the same length: it never sends more than it was sent.
//!
//! The first byte is below 0x40, which no QUIC packet's is (RFC 9000, section 17): both live on one port.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::{Zeroize as _, ZeroizeOnDrop};

use super::MAX_PAYLOAD;

/// Bytes in front of the payload.
pub const UDP_HEADER: usize = CLEAR + SEALED;
/// Longest datagram in bytes: the longest payload that the frames on the connection carry, too.
pub const MAX_UDP_DATAGRAM: usize = UDP_HEADER + MAX_PAYLOAD;
/// Length of a ping that asks whether datagrams of a full packet pass, in bytes: with IPv6's and UDP's headers 48 more,
/// below the 1 460 that tunnels of access networks (PPPoE, DS-Lite) leave. Longer packets take the connection.
pub const FULL_UDP_DATAGRAM: usize = 1_400;

const CLEAR: usize = 1 + 8 + 8;
const SEALED: usize = 16 + 16;

/// What a datagram is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Device to relay: a packet; sealed is the destination.
    Send = 1,
    /// Relay to device: a packet; sealed is the source.
    Recv = 2,
    /// Device to relay; sealed is a [`Ping`]. The payload is padding.
    Ping = 3,
    /// Relay to device, as long as the ping; sealed is the same.
    Pong = 4,
    /// Relay to a device whose session rests; sealed is a [`Call`]. Sent once, and in place of each [`Kind::Pong`] from
    /// then on.
    Call = 5,
}

/// The part of a datagram that everybody can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Which session of the relay.
    pub session: u64,
    /// Never used twice in one direction of a session.
    pub counter: u64,
}

impl Head {
    /// The head of a datagram, authentic or not; `None` if it can't be one.
    pub fn peek(datagram: &[u8]) -> Option<Self> {
        let (kind, rest) = datagram.split_first()?;
        let (session, rest) = rest.split_first_chunk()?;
        let (counter, rest) = rest.split_first_chunk()?;
        let payload = rest.len().checked_sub(SEALED)?;
        let kind = match *kind {
            1 => Kind::Send,
            2 => Kind::Recv,
            3 => Kind::Ping,
            4 => Kind::Pong,
            5 => Kind::Call,
            _ => return None,
        };
        let empty = payload == 0 && matches!(kind, Kind::Send | Kind::Recv);
        (payload <= MAX_PAYLOAD && !empty).then(|| Self {
            kind,
            session: u64::from_be_bytes(*session),
            counter: u64::from_be_bytes(*counter),
        })
    }

    fn to_bytes(self) -> [u8; CLEAR] {
        let mut bytes = [0; CLEAR];
        bytes[0] = self.kind as u8;
        bytes[1..9].copy_from_slice(&self.session.to_be_bytes());
        bytes[9..].copy_from_slice(&self.counter.to_be_bytes());
        bytes
    }
}

/// True if a datagram on the common port is one of these, and false if it is QUIC's.
pub fn is_plain(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| *first < 0x40)
}

/// What a ping says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// Comes back.
    pub nonce: u64,
    /// Send what is for me to the address that this comes from. Without it a ping only asks for the answer: that it
    /// reached the relay does not mean that the answer reaches the device.
    pub settle: bool,
    /// The device goes: its session, if it rests, is over.
    pub leave: bool,
}

impl Ping {
    /// As sealed.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.nonce.to_be_bytes());
        bytes[8] = u8::from(self.settle) | u8::from(self.leave) << 1;
        bytes
    }

    /// What was sealed; unknown flags and the rest are ignored.
    pub fn from_bytes(bytes: &[u8; 16]) -> Self {
        let [n0, n1, n2, n3, n4, n5, n6, n7, flags, ..] = *bytes;
        Self {
            nonce: u64::from_be_bytes([n0, n1, n2, n3, n4, n5, n6, n7]),
            settle: flags & 1 != 0,
            leave: flags & 2 != 0,
        }
    }
}

/// Why a device is called while its session rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calling {
    /// There is something to say that takes a connection.
    Connect,
    /// The relay drains: go elsewhere, as with [`super::Frame::Drain`].
    Drain {
        /// Until the relay closes, in milliseconds.
        after_ms: u32,
    },
}

/// What a call says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Of the ping that this answers, if it does.
    pub nonce: Option<u64>,
    /// Why.
    pub why: Calling,
}

impl Call {
    /// As sealed.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.nonce.unwrap_or_default().to_be_bytes());
        bytes[8] = u8::from(self.nonce.is_some());
        if let Calling::Drain { after_ms } = self.why {
            bytes[8] |= 2;
            bytes[9..13].copy_from_slice(&after_ms.to_be_bytes());
        }
        bytes
    }

    /// What was sealed; unknown flags and the rest are ignored.
    pub fn from_bytes(bytes: &[u8; 16]) -> Self {
        let [n0, n1, n2, n3, n4, n5, n6, n7, flags, m0, m1, m2, m3, ..] = *bytes;
        let after_ms = u32::from_be_bytes([m0, m1, m2, m3]);
        Self {
            nonce: (flags & 1 != 0).then_some(u64::from_be_bytes([n0, n1, n2, n3, n4, n5, n6, n7])),
            why: if flags & 2 != 0 { Calling::Drain { after_ms } } else { Calling::Connect },
        }
    }
}

/// The two keys of a session, as one end uses them.
#[derive(Clone, ZeroizeOnDrop)]
pub struct UdpKeys {
    /// Of what this end sends.
    seal: [u8; 32],
    /// Of what it receives.
    open: [u8; 32],
}

impl std::fmt::Debug for UdpKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UdpKeys")
    }
}

impl UdpKeys {
    pub(super) const fn new(seal: [u8; 32], open: [u8; 32]) -> Self {
        Self { seal, open }
    }

    /// Seals what this end sends. Made for each batch: an idle session holds only the key.
    pub fn sealer(&self) -> UdpCipher {
        UdpCipher::new(&self.seal)
    }

    /// Opens what this end receives.
    pub fn opener(&self) -> UdpCipher {
        UdpCipher::new(&self.open)
    }
}

/// One direction of a session.
pub struct UdpCipher(LessSafeKey);

impl std::fmt::Debug for UdpCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UdpCipher")
    }
}

impl UdpCipher {
    #[expect(clippy::expect_used, reason = "the key has the length that the algorithm asks for")]
    fn new(key: &[u8; 32]) -> Self {
        Self(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).expect("32 bytes")))
    }

    /// Writes the header over the first [`UDP_HEADER`] bytes of `datagram`; what comes after is the payload. The counter
    /// of `head` must not have been used with this key. False if `datagram` has no room for a header.
    #[must_use]
    pub fn seal(&self, head: Head, what: [u8; 16], datagram: &mut [u8]) -> bool {
        let Some((header, payload)) = datagram.split_first_chunk_mut::<UDP_HEADER>() else { return false };
        let clear = head.to_bytes();
        let mut sealed = what;
        let aad = Aad::from(associated(&clear, payload.len()));
        let Ok(tag) = self.0.seal_in_place_separate_tag(nonce(head.counter), aad, &mut sealed) else {
            return false; // only if there were more to seal than there is
        };
        header[..CLEAR].copy_from_slice(&clear);
        header[CLEAR..CLEAR + 16].copy_from_slice(&sealed);
        header[CLEAR + 16..].copy_from_slice(tag.as_ref());
        true
    }

    /// What is sealed in a datagram, if it is authentic: [`Head::peek`] gives the rest.
    pub fn open(&self, datagram: &[u8]) -> Option<[u8; 16]> {
        let (clear, rest) = datagram.split_first_chunk::<CLEAR>()?;
        let (sealed, payload) = rest.split_first_chunk::<SEALED>()?;
        let head = Head::peek(datagram)?;
        let mut sealed = *sealed;
        let aad = Aad::from(associated(clear, payload.len()));
        let opened = self.0.open_in_place(nonce(head.counter), aad, &mut sealed).ok()?;
        let what = (&*opened).try_into().ok();
        sealed.zeroize();
        what
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn associated(clear: &[u8; CLEAR], payload: usize) -> [u8; CLEAR + 2] {
    let mut bytes = [0; CLEAR + 2];
    bytes[..CLEAR].copy_from_slice(clear);
    bytes[CLEAR..].copy_from_slice(&(payload as u16).to_be_bytes()); // at most `MAX_PAYLOAD`
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ends() -> (UdpKeys, UdpKeys) {
        (UdpKeys::new([1; 32], [2; 32]), UdpKeys::new([2; 32], [1; 32]))
    }

    fn hex(bytes: &[u8]) -> String {
        data_encoding::HEXLOWER.encode(bytes)
    }

    #[test]
    fn the_header_of_the_first_release() {
        let head = Head { kind: Kind::Send, session: 0x0102_0304_0506_0708, counter: 9 };
        let mut datagram = [7; UDP_HEADER + 3];
        assert!(ends().0.sealer().seal(head, [5; 16], &mut datagram));
        assert_eq!(hex(&datagram[..CLEAR]), "0101020304050607080000000000000009");
        let sealed = "02457d3d5bb80e4256b46507447935497986e0e73c5a80b12b6368ed69a77278";
        assert_eq!(hex(&datagram[CLEAR..UDP_HEADER]), sealed);
        assert_eq!(hex(&datagram[UDP_HEADER..]), "070707");
    }

    proptest! {
        #[test]
        fn what_one_end_seals_the_other_opens_and_nothing_else(
            kind in prop::sample::select(vec![Kind::Send, Kind::Recv, Kind::Ping, Kind::Pong, Kind::Call]),
            (session, counter, what) in any::<(u64, u64, [u8; 16])>(),
            payload in prop::collection::vec(any::<u8>(), 1..MAX_PAYLOAD),
            (at, flip) in (0..UDP_HEADER, 1..=255u8),
        ) {
            let (device, relay) = ends();
            let head = Head { kind, session, counter };
            let mut datagram = vec![0; UDP_HEADER];
            datagram.extend_from_slice(&payload);
            prop_assert!(device.sealer().seal(head, what, &mut datagram));
            prop_assert_eq!(Head::peek(&datagram), Some(head));
            prop_assert_eq!(relay.opener().open(&datagram), Some(what));
            prop_assert_eq!(&datagram[UDP_HEADER..], &payload);
            prop_assert!(is_plain(&datagram));
            prop_assert_eq!(device.opener().open(&datagram), None, "the other direction");
            prop_assert_eq!(relay.opener().open(&datagram[..datagram.len() - 1]), None, "another length");
            datagram[at] ^= flip;
            prop_assert_eq!(relay.opener().open(&datagram), None, "another header");
        }

        #[test]
        fn anything_can_be_peeked_at_and_tried(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Head::peek(&bytes);
            prop_assert_eq!(ends().0.opener().open(&bytes), None);
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let peek = |kind: u8, payload: usize| {
            let mut datagram = vec![0; UDP_HEADER + payload];
            datagram[0] = kind;
            Head::peek(&datagram).is_some()
        };
        assert!(peek(1, 1) && peek(1, MAX_PAYLOAD) && peek(3, 0));
        assert!(!peek(1, 0) && !peek(2, 0) && !peek(1, MAX_PAYLOAD + 1) && !peek(3, MAX_PAYLOAD + 1));
        assert!(!peek(0, 5) && !peek(6, 5));
        assert!(!ends().0.sealer().seal(
            Head { kind: Kind::Send, session: 0, counter: 0 },
            [0; 16],
            &mut [0; UDP_HEADER - 1]
        ));
        for (settle, leave) in [(false, false), (true, false), (false, true), (true, true)] {
            let ping = Ping { nonce: 77, settle, leave };
            assert_eq!(Ping::from_bytes(&ping.to_bytes()), ping);
        }
        for nonce in [None, Some(0), Some(77)] {
            for why in [Calling::Connect, Calling::Drain { after_ms: 5_000 }] {
                let call = Call { nonce, why };
                assert_eq!(Call::from_bytes(&call.to_bytes()), call);
            }
        }
    }
}
