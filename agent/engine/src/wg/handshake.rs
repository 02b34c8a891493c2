//! The Noise handshake (IKpsk2) by snow, with a key agreement that refuses low-order points and wipes its secrets.

use std::sync::LazyLock;

use rand_core::{CryptoRng, RngCore};
use snow::HandshakeState;
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{BoxedCryptoResolver, CryptoResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use warren_common::keys::{KEY_LEN, WgPublicKey, WgSecretKey};
use warren_common::time::UnixTime;
use zeroize::{Zeroize as _, Zeroizing};

use super::message::{INITIATION_NOISE, RESPONSE_NOISE};

const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Where IKpsk2 mixes the pre-shared key in: after the second message's agreements.
const PSK_POSITION: u8 = 2;

static PARAMS: LazyLock<Option<NoiseParams>> =
    LazyLock::new(|| "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s".parse().ok());

/// A handshake message that doesn't fit ours: forged, damaged, for another key, or with a low-order point.
#[derive(Debug)]
pub(super) struct BadHandshake;

impl From<snow::Error> for BadHandshake {
    fn from(_: snow::Error) -> Self {
        Self
    }
}

/// Our key pair. The public half is kept, since deriving it costs as much as an agreement.
pub(super) struct StaticKeys {
    secret: WgSecretKey,
    pub(super) public: WgPublicKey,
}

impl StaticKeys {
    pub(super) fn new(secret: WgSecretKey) -> Self {
        let public = secret.public();
        Self { secret, public }
    }

    fn builder(&self, rng: &mut (impl RngCore + CryptoRng)) -> Result<snow::Builder<'_>, BadHandshake> {
        let resolver =
            WipingResolver { inner: warren_common::noise::resolver(rng), static_public: self.public };
        let params = PARAMS.as_ref().ok_or(BadHandshake)?.clone();
        let boxed: BoxedCryptoResolver = Box::new(resolver);
        Ok(snow::Builder::with_resolver(params, boxed)
            .prologue(PROLOGUE)?
            .local_private_key(self.secret.expose())?)
    }
}

/// The keys of a new session, as seen from our side.
pub(super) struct TransportKeys {
    pub(super) send: Zeroizing<[u8; KEY_LEN]>,
    pub(super) receive: Zeroizing<[u8; KEY_LEN]>,
}

/// An initiation of ours that waits for its response.
pub(super) struct Initiator(HandshakeState);

impl Initiator {
    /// Starts a handshake and writes the Noise part of the initiation.
    pub(super) fn start(
        keys: &StaticKeys,
        peer: &WgPublicKey,
        psk: &[u8; KEY_LEN],
        timestamp: Timestamp,
        message: &mut [u8],
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<Self, BadHandshake> {
        let mut noise = keys
            .builder(rng)?
            .remote_public_key(peer.as_bytes())?
            .psk(PSK_POSITION, psk)?
            .build_initiator()?;
        noise.write_message(&timestamp.0, &mut message[INITIATION_NOISE])?;
        Ok(Self(noise))
    }

    /// Reads the response. A bad one changes nothing: the true one may still come.
    pub(super) fn finish(&mut self, response: &[u8]) -> Result<TransportKeys, BadHandshake> {
        self.0.read_message(&response[RESPONSE_NOISE], &mut [0; KEY_LEN])?;
        let (mut send, mut receive) = self.0.dangerously_get_raw_split();
        let keys = TransportKeys { send: Zeroizing::new(send), receive: Zeroizing::new(receive) };
        send.zeroize();
        receive.zeroize();
        Ok(keys)
    }
}

/// A peer's initiation, read and authentic.
pub(super) struct Responder {
    noise: HandshakeState,
    pub(super) peer: WgPublicKey,
    pub(super) timestamp: Timestamp,
}

impl Responder {
    pub(super) fn read(
        keys: &StaticKeys,
        initiation: &[u8],
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<Self, BadHandshake> {
        let mut noise = keys.builder(rng)?.build_responder()?;
        let mut payload = [0; KEY_LEN];
        let len = noise.read_message(&initiation[INITIATION_NOISE], &mut payload)?;
        let timestamp = payload[..len].try_into().map_err(|_| BadHandshake)?;
        let peer = noise.get_remote_static().and_then(WgPublicKey::from_slice).ok_or(BadHandshake)?;
        Ok(Self { noise, peer, timestamp: Timestamp(timestamp) })
    }

    /// Writes the Noise part of the response.
    pub(super) fn respond(
        mut self,
        psk: &[u8; KEY_LEN],
        response: &mut [u8],
    ) -> Result<TransportKeys, BadHandshake> {
        self.noise.set_psk(usize::from(PSK_POSITION), psk)?;
        self.noise.write_message(&[], &mut response[RESPONSE_NOISE])?;
        let (mut receive, mut send) = self.noise.dangerously_get_raw_split();
        let keys = TransportKeys { send: Zeroizing::new(send), receive: Zeroizing::new(receive) };
        send.zeroize();
        receive.zeroize();
        Ok(keys)
    }
}

/// A TAI64N time stamp: what makes each initiation newer than the last. Orders as its bytes do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Timestamp([u8; 12]);

/// Makes time stamps that only ever grow, whatever the wall clock does.
#[derive(Default)]
pub(super) struct TimestampClock {
    /// The last one, in nanoseconds since the Unix epoch.
    last: u64,
}

impl TimestampClock {
    /// Time stamps are rounded down to 2^24 ns (17 ms), so that they don't reveal the fine state of our clock.
    const GRAIN: u64 = 1 << 24;
    /// TAI64 labels count from 2^62; the 10 is TAI's lead over UTC in 1970, as other implementations have it.
    const TAI64_EPOCH: u64 = (1 << 62) + 10;

    pub(super) fn next(&mut self, unix: UnixTime) -> Timestamp {
        let wall = nanos(unix) & !(Self::GRAIN - 1);
        self.last = wall.max(self.last.saturating_add(1));
        let mut bytes = [0; 12];
        let (seconds, fraction) = (self.last / 1_000_000_000, self.last % 1_000_000_000);
        bytes[..8].copy_from_slice(&(Self::TAI64_EPOCH + seconds).to_be_bytes());
        bytes[8..].copy_from_slice(&(fraction as u32).to_be_bytes());
        Timestamp(bytes)
    }

    pub(super) fn raise(&mut self, floor: UnixTime) {
        self.last = self.last.max(nanos(floor));
    }

    pub(super) fn floor(&self) -> UnixTime {
        UnixTime::from_micros(i64::try_from(self.last / 1_000 + 1).unwrap_or(i64::MAX))
    }
}

fn nanos(unix: UnixTime) -> u64 {
    u64::try_from(unix.as_micros()).unwrap_or(0).saturating_mul(1_000)
}

/// True for the points whose agreement with any key is zero, in any encoding (RFC 7748, section 6.1).
pub(super) fn is_low_order(key: &WgPublicKey) -> bool {
    const ORDER_8_A: [u8; KEY_LEN] = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda,
        0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ];
    const ORDER_8_B: [u8; KEY_LEN] = [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04,
        0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ];
    let mut bytes = *key.as_bytes();
    bytes[31] &= 0x7f; // X25519 ignores the top bit
    if bytes == ORDER_8_A || bytes == ORDER_8_B {
        return true;
    }
    let [low, middle @ .., high] = bytes;
    let all = |value| middle.iter().all(|byte| *byte == value);
    // 0 and 1, and with p = 2^255 - 19 their other encodings p and p + 1, and -1 = p - 1.
    (all(0) && high == 0 && low <= 1) || (all(0xff) && high == 0x7f && (0xec..=0xee).contains(&low))
}

struct WipingResolver {
    inner: Box<dyn CryptoResolver + Send>,
    static_public: WgPublicKey,
}

impl CryptoResolver for WipingResolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        self.inner.resolve_rng()
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519).then(|| {
            Box::new(WipingDh { secret: WgSecretKey::from_bytes([0; KEY_LEN]), public: self.static_public })
                as Box<dyn Dh>
        })
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        self.inner.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        self.inner.resolve_cipher(choice)
    }
}

/// X25519 whose secret is wiped on drop and whose agreement fails on an all-zero result.
struct WipingDh {
    secret: WgSecretKey,
    public: WgPublicKey,
}

impl Dh for WipingDh {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        KEY_LEN
    }

    fn priv_len(&self) -> usize {
        KEY_LEN
    }

    /// Only the static key is ever set (an ephemeral one is generated), and its public half is here from the start.
    fn set(&mut self, privkey: &[u8]) {
        if let Ok(secret) = privkey.try_into() {
            self.secret = WgSecretKey::from_bytes(secret);
        }
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        let mut secret = Zeroizing::new([0; KEY_LEN]);
        rng.try_fill_bytes(secret.as_mut())?;
        self.secret = WgSecretKey::from_bytes(*secret);
        self.public = self.secret.public();
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        self.public.as_bytes()
    }

    fn privkey(&self) -> &[u8] {
        self.secret.expose()
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let theirs = pubkey.get(..KEY_LEN).and_then(WgPublicKey::from_slice).ok_or(snow::Error::Dh)?;
        let shared = self.secret.diffie_hellman(&theirs).ok_or(snow::Error::Dh)?;
        out.get_mut(..KEY_LEN).ok_or(snow::Error::Dh)?.copy_from_slice(shared.expose());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::message;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng as _;

    fn keys(rng: &mut ChaCha20Rng) -> StaticKeys {
        StaticKeys::new(WgSecretKey::generate(rng))
    }

    #[test]
    fn both_sides_get_the_same_keys_and_a_bad_response_changes_nothing() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let (a, b) = (keys(&mut rng), keys(&mut rng));
        let psk = [7; 32];
        let mut initiation = message::initiation(1);
        let stamp = TimestampClock::default().next(UnixTime::from_secs(5));
        let mut initiator = Initiator::start(&a, &b.public, &psk, stamp, &mut initiation, &mut rng).unwrap();
        let responder = Responder::read(&b, &initiation, &mut rng).unwrap();
        assert!(responder.peer == a.public && responder.timestamp == stamp);
        let mut response = message::response(2, 1);
        let theirs = responder.respond(&psk, &mut response).unwrap();

        let mut forged = response;
        forged[15] ^= 1;
        assert!(initiator.finish(&forged).is_err());
        let ours = initiator.finish(&response).unwrap();
        assert_eq!(ours.send, theirs.receive);
        assert_eq!(ours.receive, theirs.send);
        assert_ne!(ours.send, ours.receive);
    }

    #[test]
    fn another_pre_shared_key_or_receiver_fails() {
        let mut rng = ChaCha20Rng::seed_from_u64(2);
        let (a, b, c) = (keys(&mut rng), keys(&mut rng), keys(&mut rng));
        let mut initiation = message::initiation(1);
        let stamp = TimestampClock::default().next(UnixTime::from_secs(5));
        let mut initiator =
            Initiator::start(&a, &b.public, &[1; 32], stamp, &mut initiation, &mut rng).unwrap();
        assert!(Responder::read(&c, &initiation, &mut rng).is_err());
        let mut response = message::response(2, 1);
        Responder::read(&b, &initiation, &mut rng).unwrap().respond(&[2; 32], &mut response).unwrap();
        assert!(initiator.finish(&response).is_err());
    }

    #[test]
    fn low_order_points_are_known_and_refused_as_ephemeral_keys() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let secret = WgSecretKey::generate(&mut rng);
        let b = StaticKeys::new(secret.clone());
        let mut points = vec![[0; 32], [0xff; 32]];
        points[1][31] = 0x7f;
        for low in [0xec, 0xed, 0xee] {
            let mut point = points[1];
            point[0] = low;
            points.push(point);
        }
        points.swap_remove(1);
        points.push([0; 32]);
        points.last_mut().unwrap()[0] = 1;
        for text in [
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        ] {
            let byte = |i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap();
            points.push(std::array::from_fn(byte));
        }
        assert_eq!(points.len(), 7);
        for mut point in points {
            for top in [0, 0x80] {
                point[31] |= top;
                let key = WgPublicKey::from_bytes(point);
                assert!(is_low_order(&key), "{point:02x?}");
                assert!(secret.diffie_hellman(&key).is_none(), "{point:02x?}");
                let mut initiation = message::initiation(1);
                initiation[8..40].copy_from_slice(&point);
                assert!(Responder::read(&b, &initiation, &mut rng).is_err());
            }
        }
        assert!(!is_low_order(&secret.public()));
    }

    #[test]
    fn time_stamps_grow_even_when_the_wall_clock_goes_back() {
        let mut clock = TimestampClock::default();
        let now = UnixTime::from_secs(1_800_000_000);
        let first = clock.next(now);
        assert_eq!(first.0[..8], (0x4000_0000_0000_000a_u64 + 1_800_000_000 - 1).to_be_bytes(), "whitened");
        let second = clock.next(now);
        let back = clock.next(UnixTime::from_secs(10));
        assert!(first < second && second < back);
        assert!(back < clock.next(UnixTime::from_secs(1_800_000_001)));

        let mut restarted = TimestampClock::default();
        restarted.raise(clock.floor());
        assert!(restarted.next(UnixTime::from_micros(-5)) > clock.next(UnixTime::default()));
    }
}
