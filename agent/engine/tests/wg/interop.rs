//! Against boringtun, another implementation. It reads its own clock, so ours stands still beside it.

use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use warren_common::keys::{WgPublicKey, WgSecretKey};
use warren_common::time::Now;
use warren_engine::wg::{Device, DropReason, MAX_FREE_BURST, PeerHandle, Received, SealError, TransmitKind};

use crate::net::{Net, ip_packet, packet_id, secs, source, start};

struct Pair {
    ours: Device,
    peer: PeerHandle,
    theirs: Tunn,
    now: Now,
}

fn pair(psk: Option<[u8; 32]>, handshakes_before_load: u64) -> Pair {
    let mut rng = ChaCha20Rng::seed_from_u64(77);
    let (our_secret, their_secret) = (WgSecretKey::generate(&mut rng), WgSecretKey::generate(&mut rng));
    let mut ours = Device::new(our_secret.clone(), [3; 32], 5);
    let their_static = x25519::StaticSecret::from(*their_secret.expose());
    let their_public = x25519::PublicKey::from(&their_static);
    let peer = ours.add_peer(WgPublicKey::from_bytes(their_public.to_bytes()), psk, None).unwrap();
    let limiter = Arc::new(RateLimiter::new(&their_public, handshakes_before_load));
    let theirs = Tunn::new(
        their_static,
        x25519::PublicKey::from(*our_secret.public().as_bytes()),
        psk,
        None,
        42,
        Some(limiter),
    );
    Pair { ours, peer, theirs, now: start() }
}

impl Pair {
    /// Carries datagrams both ways until all is quiet, beginning with `to_us`. Returns the ids of packets that came
    /// out at our side and at theirs.
    fn settle(&mut self, to_us: Vec<Vec<u8>>) -> (Vec<u64>, Vec<u64>) {
        let (mut at_us, mut at_them) = (Vec::new(), Vec::new());
        let (mut to_us, mut out) = (to_us, [0; 2048]);
        for _ in 0..20 {
            for mut datagram in std::mem::take(&mut to_us) {
                match self.ours.handle(self.now, source(1), &mut datagram) {
                    Ok(Received::Data { packet, .. }) => at_us.push(packet_id(&datagram[packet])),
                    Ok(_) | Err(DropReason::CookieSent) => {}
                    Err(reason) => panic!("dropped: {reason}"),
                }
            }
            while let Some(transmit) = self.ours.poll_transmit(self.now, &mut out) {
                self.deliver(&out[..transmit.len], &mut to_us, &mut at_them);
            }
        }
        (at_us, at_them)
    }

    fn deliver(&mut self, datagram: &[u8], to_us: &mut Vec<Vec<u8>>, at_them: &mut Vec<u64>) {
        let mut buffer = [0; 2048];
        let mut input = datagram;
        loop {
            let from = Some([192, 0, 2, 0].into());
            match self.theirs.decapsulate(from, input, &mut buffer) {
                TunnResult::WriteToNetwork(reply) => to_us.push(reply.to_vec()),
                TunnResult::WriteToTunnelV4(packet, _) => {
                    at_them.push(packet_id(packet));
                    break;
                }
                TunnResult::WriteToTunnelV6(..) => panic!("no IPv6 was sent"),
                TunnResult::Done => break,
                TunnResult::Err(error) => panic!("they dropped it: {error:?}"),
            }
            input = &[];
        }
    }

    fn they_send(&mut self, id: u64, len: usize) -> Option<Vec<u8>> {
        let mut buffer = [0; 2048];
        match self.theirs.encapsulate(&ip_packet(id, len), &mut buffer) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram.to_vec()),
            TunnResult::Done => None,
            other => panic!("{other:?}"),
        }
    }

    fn we_send(&mut self, id: u64, len: usize) -> Result<Vec<u8>, SealError> {
        let mut out = [0; 2048];
        self.ours.seal(self.peer, self.now, &ip_packet(id, len), &mut out).map(|len| out[..len].to_vec())
    }

    /// Packets of many sizes both ways in the present sessions.
    fn exchange(&mut self, first_id: u64) {
        for (n, len) in [28, 29, 44, 100, 1279, 1280, 1420].into_iter().enumerate() {
            let id = first_id + n as u64;
            let datagram = self.we_send(id, len).unwrap();
            let (mut back, mut got) = (Vec::new(), Vec::new());
            self.deliver(&datagram, &mut back, &mut got);
            assert_eq!(got, [id]);
            let datagram = self.they_send(id, len).unwrap();
            let (got, _) = self.settle(vec![datagram]);
            assert_eq!(got, [id]);
        }
    }
}

#[test]
fn we_initiate_with_and_without_a_pre_shared_key_and_renew() {
    for psk in [None, Some([0x42; 32])] {
        let mut pair = pair(psk, u64::MAX);
        assert_eq!(pair.we_send(1, 60), Err(SealError::Queued));
        let (_, got) = pair.settle(Vec::new());
        assert_eq!(got, [1]);
        pair.exchange(100);
        for round in 1..4 {
            pair.now = pair.now + secs(121);
            assert!(pair.we_send(2, 60).is_ok(), "sent in the old session, and renews it");
            pair.settle(Vec::new());
            pair.exchange(100 + 10 * round);
        }
    }
}

#[test]
fn they_initiate_with_and_without_a_pre_shared_key_and_renew() {
    for psk in [None, Some([0x42; 32])] {
        let mut pair = pair(psk, u64::MAX);
        let initiation = pair.they_send(1, 60).unwrap();
        let (got, _) = pair.settle(vec![initiation]);
        assert_eq!(got, [1]);
        pair.exchange(100);
        for round in 1..4 {
            pair.now = pair.now + secs(121);
            // Their time stamps count their own wall clock in steps that are shorter than this.
            let before = std::iter::repeat_with(|| {
                let mut buffer = [0; 2048];
                match pair.theirs.format_handshake_initiation(&mut buffer, true) {
                    TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
                    other => panic!("{other:?}"),
                }
            })
            .next()
            .unwrap();
            pair.settle(vec![before]);
            pair.exchange(100 + 10 * round);
        }
    }
}

#[test]
fn different_pre_shared_keys_make_no_session() {
    let mut pair = pair(Some([1; 32]), u64::MAX);
    let mut rng = ChaCha20Rng::seed_from_u64(77);
    let (our_secret, their_secret) = (WgSecretKey::generate(&mut rng), WgSecretKey::generate(&mut rng));
    pair.theirs = Tunn::new(
        x25519::StaticSecret::from(*their_secret.expose()),
        x25519::PublicKey::from(*our_secret.public().as_bytes()),
        Some([2; 32]),
        None,
        42,
        None,
    );
    let _ = pair.we_send(1, 60);
    let mut out = [0; 2048];
    let initiation = pair.ours.poll_transmit(pair.now, &mut out).unwrap();
    let (mut to_us, mut got) = (Vec::new(), Vec::new());
    pair.deliver(&out[..initiation.len], &mut to_us, &mut got);
    let dropped = pair.ours.handle(pair.now, source(1), &mut to_us[0]);
    assert_eq!(dropped, Err(DropReason::BadHandshake));
}

#[test]
fn we_return_their_cookie_when_they_are_busy() {
    let mut pair = pair(None, 0);
    let _ = pair.we_send(1, 60);
    let (_, got) = pair.settle(Vec::new());
    assert!(got.is_empty(), "they asked for a cookie instead");
    pair.now = pair.now + secs(6);
    pair.ours.handle_timeout(pair.now);
    let (_, got) = pair.settle(Vec::new());
    assert_eq!(got, [1]);
}

#[test]
fn they_return_our_cookie_when_we_are_busy() {
    let mut pair = pair(None, u64::MAX);
    // Someone who knows our public key keeps us busy with initiations that lead nowhere.
    let stranger = Net::new(5, None, [None, None]);
    let [mut stranger, _] = stranger.hosts;
    let us = stranger.device.add_peer(pair.ours.public_key(), None, None).unwrap();
    let mut out = [0; 2048];
    stranger.device.initiate(us, pair.now);
    let transmit = stranger.device.poll_transmit(pair.now, &mut out).unwrap();
    assert_eq!(transmit.kind, TransmitKind::Initiation);
    for _ in 0..MAX_FREE_BURST {
        let handled = pair.ours.handle(pair.now, source(66), &mut out[..transmit.len].to_vec());
        assert_eq!(handled, Err(DropReason::UnknownPeer));
    }
    let initiation = pair.they_send(1, 60).unwrap();
    pair.settle(vec![initiation]);
    assert_eq!(pair.ours.counters().cookies_sent, 1);
    assert!(!pair.ours.has_session(pair.peer, pair.now));
    let mut buffer = [0; 2048];
    let TunnResult::WriteToNetwork(again) = pair.theirs.format_handshake_initiation(&mut buffer, true) else {
        panic!("no initiation");
    };
    let again = again.to_vec();
    let (got, _) = pair.settle(vec![again]);
    assert_eq!(got, [1]);
    assert_eq!(pair.ours.counters().cookies_sent, 1);
}
