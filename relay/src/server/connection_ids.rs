//! QUIC connection ids that this relay knows for its own, also after a restart (RFC 9000, section 5.1).
//!
//! quinn has two kinds: random ones, which can't be told from a stranger's, so that every stray packet would get a
//! stateless reset; and hashed ones with 24 random bits. Those meet: the id in a Retry is not compared with those of the
//! connections that exist, and a device whose Retry names a connection of another's hears nothing until it gives up. With
//! 1 500 devices that came at once that happened every second time.

use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use rand_core::RngCore as _;
use ring::hmac::{self, HMAC_SHA256};

use crate::os::OsRng;

/// Random bytes of an id.
const RANDOM: usize = 6;
/// Bytes of an id: a stranger's guess is right once in 65 536.
const LEN: usize = RANDOM + 2;

/// Makes them.
#[derive(Debug)]
pub(super) struct ConnectionIds {
    key: hmac::Key,
}

impl ConnectionIds {
    /// The same ids are its own for everyone with the same secret.
    pub(super) fn new(secret: &[u8; 32]) -> Self {
        Self { key: hmac::Key::new(HMAC_SHA256, secret) }
    }

    fn with(&self, random: &[u8]) -> ConnectionId {
        let tag = hmac::sign(&self.key, random);
        let mut id = [0; LEN];
        id[..RANDOM].copy_from_slice(random);
        id[RANDOM..].copy_from_slice(&tag.as_ref()[..LEN - RANDOM]);
        ConnectionId::new(&id)
    }
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut random = [0; RANDOM];
        OsRng.fill_bytes(&mut random);
        self.with(&random)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        let own = id.len() == LEN && self.with(&id[..RANDOM]) == *id;
        own.then_some(()).ok_or(InvalidCid)
    }

    fn cid_len(&self) -> usize {
        LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn its_own_are_told_from_others_also_after_a_restart() {
        let (mut ids, again, other) =
            (ConnectionIds::new(&[1; 32]), ConnectionIds::new(&[1; 32]), ConnectionIds::new(&[2; 32]));
        let made: Vec<_> = (0..100).map(|_| ids.generate_cid()).collect();
        assert!(made.iter().all(|id| id.len() == ids.cid_len() && again.validate(id).is_ok()));
        assert!(made.iter().filter(|id| other.validate(id).is_ok()).count() < 3);
        assert!(ids.validate(&ConnectionId::new(&made[0][..LEN - 1])).is_err());
        assert!(ids.validate(&ConnectionId::new(&[0; 20])).is_err());
    }

    #[test]
    fn those_of_ten_thousand_devices_do_not_meet() {
        let mut ids = ConnectionIds::new(&[1; 32]);
        let made = 100_000;
        assert_eq!((0..made).map(|_| ids.generate_cid()).collect::<BTreeSet<_>>().len(), made);
    }
}
