//! MAC1, MAC2 and cookies: what a message must prove before we spend a key agreement on it (whitepaper, 5.3 and 5.4.4).

use std::net::IpAddr;
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use rand_core::{CryptoRng, RngCore};
use subtle::ConstantTimeEq as _;
use warren_common::keys::WgPublicKey;
use warren_common::time::Instant;
use zeroize::Zeroizing;

use crate::io::Source;

use super::message::{self, COOKIE_LEN, MAC_LEN};

/// How long a cookie secret, and so each cookie made with it, is good (whitepaper, 5.4.7).
const COOKIE_LIFE: Duration = Duration::from_secs(120);

/// How long we use a cookie that we were given: shorter than its life by the time it may have been under way.
const COOKIE_USE: Duration = Duration::from_secs(115);

type Mac = [u8; MAC_LEN];

/// What a cookie is bound to: address *and* port, since many devices share one address behind a NAT; on a relay the
/// device that the relay vouches for.
fn cookie_input(source: Source) -> [u8; 33] {
    let mut bytes = [0; 33];
    match source {
        Source::Direct { socket: _, remote } => {
            match remote.ip() {
                IpAddr::V4(ip) => {
                    bytes[0] = 4;
                    bytes[1..5].copy_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes[0] = 6;
                    bytes[1..17].copy_from_slice(&ip.octets());
                }
            }
            bytes[17..19].copy_from_slice(&remote.port().to_be_bytes());
        }
        Source::Relay { relay, device } => {
            bytes[0] = 1;
            bytes[1..17].copy_from_slice(&relay.to_bytes());
            bytes[17..].copy_from_slice(&device.to_bytes());
        }
        Source::Signal { device } => {
            bytes[0] = 2;
            bytes[17..].copy_from_slice(&device.to_bytes());
        }
    }
    bytes
}

/// The two keys that follow from the public key of a message's *receiver*.
pub(super) struct ReceiverKeys {
    mac1: [u8; 32],
    cookie: [u8; 32],
}

impl ReceiverKeys {
    pub(super) fn new(receiver: &WgPublicKey) -> Self {
        let derive = |label: &[u8; 8]| {
            Blake2s256::new().chain_update(label).chain_update(receiver.as_bytes()).finalize().into()
        };
        Self { mac1: derive(b"mac1----"), cookie: derive(b"cookie--") }
    }

    /// True if `message` (an initiation or a response) carries the right MAC1: its sender knows our public key.
    pub(super) fn verify_mac1(&self, message: &[u8]) -> bool {
        let (covered, rest) = message.split_at(message.len().saturating_sub(2 * MAC_LEN));
        rest.get(..MAC_LEN).is_some_and(|mac1| keyed_mac(&self.mac1, covered).ct_eq(mac1).into())
    }

    /// Writes MAC1, and MAC2 if there is a cookie, at the end of `message`. Returns MAC1.
    pub(super) fn sign(&self, message: &mut [u8], cookie: Option<&Mac>) -> Mac {
        let at = message.len().saturating_sub(2 * MAC_LEN);
        let mac1 = keyed_mac(&self.mac1, &message[..at]);
        message[at..at + MAC_LEN].copy_from_slice(&mac1);
        if let Some(cookie) = cookie {
            let mac2 = keyed_mac(cookie, &message[..at + MAC_LEN]);
            message[at + MAC_LEN..].copy_from_slice(&mac2);
        }
        mac1
    }

    /// The cookie in a reply to the message that carried `mac1`.
    pub(super) fn open_cookie(&self, reply: &[u8; COOKIE_LEN], mac1: &Mac) -> Option<Mac> {
        let mut cookie: Mac = *reply[32..].first_chunk()?;
        XChaCha20Poly1305::new(&self.cookie.into())
            .decrypt_in_place_detached(
                XNonce::from_slice(&reply[8..32]),
                mac1,
                &mut cookie,
                Tag::from_slice(&reply[48..]),
            )
            .ok()
            .map(|()| cookie)
    }

    fn seal_cookie(&self, reply: &mut [u8; COOKIE_LEN], cookie: Mac, mac1: &[u8]) -> bool {
        let (header, sealed) = reply.split_at_mut(32);
        sealed[..MAC_LEN].copy_from_slice(&cookie);
        XChaCha20Poly1305::new(&self.cookie.into())
            .encrypt_in_place_detached(XNonce::from_slice(&header[8..]), mac1, &mut sealed[..MAC_LEN])
            .is_ok_and(|tag| {
                sealed[MAC_LEN..].copy_from_slice(&tag);
                true
            })
    }
}

/// A cookie that a busy peer gave us.
pub(super) struct Cookie {
    value: Mac,
    received: Instant,
}

impl Cookie {
    pub(super) const fn new(value: Mac, received: Instant) -> Self {
        Self { value, received }
    }

    /// The cookie, while it is good.
    pub(super) fn value(&self, now: Instant) -> Option<&Mac> {
        (now.since(self.received) < COOKIE_USE).then_some(&self.value)
    }
}

/// Makes and checks the cookies we hand out while busy. Keeps nothing per sender.
pub(super) struct CookieMaker {
    secret: Zeroizing<[u8; 32]>,
    made: Option<Instant>,
}

impl CookieMaker {
    pub(super) fn new() -> Self {
        Self { secret: Zeroizing::new([0; 32]), made: None }
    }

    /// True if `message` carries the MAC2 that only the receiver of our cookie at `source` can make.
    pub(super) fn verify_mac2(&self, now: Instant, source: Source, message: &[u8]) -> bool {
        if self.made.is_none_or(|made| now.since(made) >= COOKIE_LIFE) {
            return false;
        }
        let (covered, mac2) = message.split_at(message.len().saturating_sub(MAC_LEN));
        keyed_mac(&self.cookie(source), covered).ct_eq(mac2).into()
    }

    /// The reply that gives `source` its cookie, in answer to `message` sent by the peer's index `sender`.
    pub(super) fn reply(
        &mut self,
        now: Instant,
        source: Source,
        sender: u32,
        message: &[u8],
        keys: &ReceiverKeys,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Option<[u8; COOKIE_LEN]> {
        if self.made.is_none_or(|made| now.since(made) >= COOKIE_LIFE) {
            rng.fill_bytes(self.secret.as_mut());
            self.made = Some(now);
        }
        let mut reply = message::cookie(sender);
        rng.fill_bytes(&mut reply[8..32]);
        let at = message.len().checked_sub(2 * MAC_LEN)?;
        let mac1 = &message[at..at + MAC_LEN];
        keys.seal_cookie(&mut reply, self.cookie(source), mac1).then_some(reply)
    }

    fn cookie(&self, source: Source) -> Mac {
        keyed_mac(self.secret.as_ref(), &cookie_input(source))
    }
}

fn keyed_mac(key: &[u8], bytes: &[u8]) -> Mac {
    #[expect(
        clippy::expect_used,
        reason = "BLAKE2s refuses only keys over 32 bytes, and every caller's key is an array of 16 or 32"
    )]
    let mut mac = Blake2sMac::<U16>::new_from_slice(key).expect("a key of 16 or 32 bytes");
    mac.update(bytes);
    mac.finalize_fixed().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;
    use warren_common::ids::DeviceId;
    use warren_common::keys::WgSecretKey;

    #[test]
    fn a_cookie_is_for_one_source_one_message_and_two_minutes() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let keys = ReceiverKeys::new(&WgSecretKey::generate(&mut rng).public());
        let mut maker = CookieMaker::new();
        let udp = |text: &str| Source::Direct { socket: 0, remote: text.parse().unwrap() };
        let source = udp("192.0.2.1:1000");
        let now = Instant::ZERO + Duration::from_secs(50);

        let mut message = message::initiation(9);
        let mac1 = keys.sign(&mut message, None);
        assert!(keys.verify_mac1(&message));
        assert!(!maker.verify_mac2(now, source, &message));

        let reply = maker.reply(now, source, 9, &message, &keys, &mut rng).unwrap();
        assert!(keys.open_cookie(&reply, &[0; 16]).is_none(), "other MAC1");
        let cookie = keys.open_cookie(&reply, &mac1).unwrap();
        keys.sign(&mut message, Some(&cookie));
        assert!(maker.verify_mac2(now, source, &message));
        for other in [
            udp("192.0.2.1:1001"),
            udp("192.0.2.2:1000"),
            Source::Signal { device: DeviceId::from_bytes([0; 16]) },
        ] {
            assert!(!maker.verify_mac2(now, other, &message));
        }
        message[20] ^= 1;
        assert!(!maker.verify_mac2(now, source, &message));
        message[20] ^= 1;
        assert!(!maker.verify_mac2(now + COOKIE_LIFE, source, &message));

        let held = Cookie::new(cookie, now);
        assert!(held.value(now + Duration::from_secs(114)).is_some());
        assert!(held.value(now + Duration::from_secs(115)).is_none());
    }
}
