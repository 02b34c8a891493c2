//! One session: two keys, two counters. The only code on the path of every packet.

use std::ops::Range;
use std::time::Duration;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use warren_common::keys::KEY_LEN;
use warren_common::time::Instant;
use zeroize::Zeroizing;

use super::handshake::TransportKeys;
use super::message::{self, DATA_HEADER_LEN, DATA_OVERHEAD, TAG_LEN};
use super::replay::ReplayWindow;
use super::{DropReason, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME};

pub(super) struct Session {
    /// Our index: what the peer writes into its messages.
    pub(super) local: u32,
    /// The peer's index: what we write into ours.
    remote: u32,
    pub(super) created: Instant,
    /// We sent the initiation.
    pub(super) initiator: bool,
    /// Age at which we renew it when we send.
    pub(super) renew_after: Duration,
    send_key: Zeroizing<[u8; KEY_LEN]>,
    receive_key: Zeroizing<[u8; KEY_LEN]>,
    pub(super) sent: u64,
    window: ReplayWindow,
}

impl Session {
    pub(super) fn new(
        local: u32,
        remote: u32,
        initiator: bool,
        renew_after: Duration,
        keys: TransportKeys,
        now: Instant,
    ) -> Self {
        Self {
            local,
            remote,
            created: now,
            initiator,
            renew_after,
            send_key: keys.send,
            receive_key: keys.receive,
            sent: 0,
            window: ReplayWindow::new(),
        }
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        now.since(self.created)
    }

    pub(super) fn can_send(&self, now: Instant) -> bool {
        self.age(now) < REJECT_AFTER_TIME && self.sent < REJECT_AFTER_MESSAGES
    }

    /// The key for sealing, for one batch.
    pub(super) fn sealing_key(&self) -> LessSafeKey {
        aead(&self.send_key)
    }

    /// The key for opening, for one batch.
    pub(super) fn opening_key(&self) -> LessSafeKey {
        aead(&self.receive_key)
    }

    /// Seals in place the `padded` bytes that lie in `out` behind the place of the header; `out` must hold
    /// `padded + DATA_OVERHEAD`. Returns the datagram's length.
    pub(super) fn seal(&mut self, key: &LessSafeKey, padded: usize, out: &mut [u8]) -> usize {
        let (header, rest) = out.split_at_mut(DATA_HEADER_LEN);
        header.copy_from_slice(&message::data_header(self.remote, self.sent));
        let (body, rest) = rest.split_at_mut(padded);
        #[expect(
            clippy::expect_used,
            reason = "ring refuses only bodies near 2^38 bytes, and callers allow 65 535"
        )]
        let tag = key
            .seal_in_place_separate_tag(nonce(self.sent), Aad::empty(), body)
            .expect("a packet is far shorter than 2^38 bytes");
        rest[..TAG_LEN].copy_from_slice(tag.as_ref());
        self.sent += 1;
        padded + DATA_OVERHEAD
    }

    /// Opens a data message in place and returns where its (padded) packet is.
    pub(super) fn open(
        &mut self,
        key: &LessSafeKey,
        counter: u64,
        datagram: &mut [u8],
        now: Instant,
    ) -> Result<Range<usize>, DropReason> {
        if self.age(now) >= REJECT_AFTER_TIME || counter >= REJECT_AFTER_MESSAGES {
            return Err(DropReason::SessionExpired);
        }
        if !self.window.would_accept(counter) {
            return Err(DropReason::Replayed);
        }
        let body = datagram.get_mut(DATA_HEADER_LEN..).ok_or(DropReason::Malformed)?;
        let len =
            key.open_in_place(nonce(counter), Aad::empty(), body).map_err(|_| DropReason::BadTag)?.len();
        if !self.window.accept(counter) {
            return Err(DropReason::Replayed);
        }
        Ok(DATA_HEADER_LEN..DATA_HEADER_LEN + len)
    }
}

/// ring's key object, made anew per batch: that costs 18 ns, while kept ones would hold half a kilobyte each that ring
/// doesn't wipe.
fn aead(key: &[u8; KEY_LEN]) -> LessSafeKey {
    #[expect(clippy::expect_used, reason = "ring refuses only another length than the algorithm's 32 bytes")]
    let key = UnboundKey::new(&CHACHA20_POLY1305, key).expect("32 bytes");
    LessSafeKey::new(key)
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::REKEY_AFTER_TIME;
    use proptest::prelude::*;

    fn pair() -> (Session, Session) {
        let keys = |send, receive| TransportKeys {
            send: Zeroizing::new([send; 32]),
            receive: Zeroizing::new([receive; 32]),
        };
        (
            Session::new(1, 2, true, REKEY_AFTER_TIME, keys(1, 2), Instant::ZERO),
            Session::new(2, 1, false, REKEY_AFTER_TIME, keys(2, 1), Instant::ZERO),
        )
    }

    impl Session {
        fn seal_packet(&mut self, packet: &[u8], padded: usize, out: &mut [u8]) -> usize {
            out[DATA_HEADER_LEN..][..padded].fill(0);
            out[DATA_HEADER_LEN..][..packet.len()].copy_from_slice(packet);
            let key = self.sealing_key();
            self.seal(&key, padded, out)
        }

        fn open_packet(
            &mut self,
            counter: u64,
            datagram: &mut [u8],
            now: Instant,
        ) -> Result<Range<usize>, DropReason> {
            let key = self.opening_key();
            self.open(&key, counter, datagram, now)
        }
    }

    #[test]
    fn a_session_ends_by_age_and_by_count() {
        let (mut a, mut b) = pair();
        let mut out = [0; 100];
        let len = a.seal_packet(b"x", 16, &mut out);
        let late = Instant::ZERO + REJECT_AFTER_TIME;
        assert!(a.can_send(late - Duration::from_nanos(1)) && !a.can_send(late));
        assert_eq!(b.open_packet(0, &mut out[..len], late), Err(DropReason::SessionExpired));
        a.sent = REJECT_AFTER_MESSAGES - 1;
        assert!(a.can_send(Instant::ZERO));
        let len = a.seal_packet(b"x", 16, &mut out);
        assert!(!a.can_send(Instant::ZERO));
        assert!(b.open_packet(REJECT_AFTER_MESSAGES - 1, &mut out[..len], Instant::ZERO).is_ok());
        assert_eq!(
            b.open_packet(REJECT_AFTER_MESSAGES, &mut out[..len], Instant::ZERO),
            Err(DropReason::SessionExpired)
        );
    }

    proptest! {
        #[test]
        fn any_size_round_trips_once_and_no_changed_byte_passes(
            packet in prop::collection::vec(any::<u8>(), 0..2000),
            pad in 0usize..16,
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let (mut a, mut b) = pair();
            let padded = packet.len() + pad;
            let mut out = vec![0xaa; padded + DATA_OVERHEAD + 3];
            let len = a.seal_packet(&packet, padded, &mut out);
            prop_assert_eq!(len, padded + DATA_OVERHEAD);

            let mut changed = out[..len].to_vec();
            let at = DATA_HEADER_LEN + at.index(len - DATA_HEADER_LEN);
            changed[at] ^= flip;
            prop_assert_eq!(b.open_packet(0, &mut changed, Instant::ZERO), Err(DropReason::BadTag));

            let mut copy = out[..len].to_vec();
            let range = b.open_packet(0, &mut copy, Instant::ZERO).unwrap();
            prop_assert_eq!(&copy[range.start..][..packet.len()], &packet[..]);
            prop_assert!(copy[range][packet.len()..].iter().all(|byte| *byte == 0));
            prop_assert_eq!(b.open_packet(0, &mut out[..len], Instant::ZERO), Err(DropReason::Replayed));
        }
    }
}
