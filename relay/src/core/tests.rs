use proptest::prelude::*;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use warren_common::keys::NetmapSecretKey;
use warren_common::time::UnixTime;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::{MAX_CONTROL_FRAMES, MAX_PAYLOAD};

use super::*;

mod absent;
mod udp;

const START_S: i64 = 1_800_000_000;

fn device(n: u8) -> DeviceId {
    DeviceId::from_bytes([n; 16])
}

fn probe(n: u8) -> ProbeSecretKey {
    ProbeSecretKey::from_bytes([n.wrapping_add(100); 32])
}

fn coordinator() -> NetmapSecretKey {
    NetmapSecretKey::from_bytes([77; 32])
}

fn limits() -> Limits {
    Limits {
        max_clients: 6,
        max_half_open: 3,
        queue_bytes: 10_000,
        total_queue_bytes: 320_000,
        ..Limits::default()
    }
}

/// A relay, its clock, and devices that speak the protocol rightly unless told otherwise.
struct World {
    relay: Relay,
    now: Now,
    rng: ChaCha20Rng,
    closed: Vec<(ConnId, RefusalCode)>,
}

impl World {
    /// Of a relay that has run for a while.
    fn new(limits: Limits) -> Self {
        let mut world = Self::restarted(limits);
        world.now = world.now + RETURN_TIME;
        world
    }

    /// Of one that starts now.
    fn restarted(limits: Limits) -> Self {
        let config = Config {
            network: NetworkId::from_bytes([1; 16]),
            relay: RelayId::from_bytes([2; 16]),
            cert_sha256: [3; 32],
            netmap_key: coordinator().public(),
            floor: 0,
            plain_udp: false,
            limits,
        };
        let now = Now { boot: Instant::from_nanos(1_000), unix: UnixTime::from_secs(START_S) };
        Self {
            relay: Relay::new(config, now.boot),
            now,
            rng: ChaCha20Rng::seed_from_u64(1),
            closed: Vec::new(),
        }
    }

    fn token(&self, n: u8, revision: u64, peers: &[u8]) -> RelayToken {
        RelayToken {
            network: self.relay.config.network,
            relay: self.relay.config.relay,
            device: device(n),
            probe: probe(n).public(),
            revision,
            expires: self.now.unix + Duration::from_secs(600),
            peers: peers.iter().map(|p| device(*p)).collect(),
        }
    }

    fn connect(&mut self) -> (ConnId, Challenge) {
        let conn = self.relay.handle_connected(self.now, &mut self.rng);
        self.settle();
        let frame = self.relay.next_frame(conn).unwrap();
        let Ok(Some(Frame::Challenge(challenge))) = Frame::decode(&frame.bytes) else { panic!("{frame:?}") };
        (conn, challenge)
    }

    fn auth(&mut self, conn: ConnId, challenge: Challenge, signed: &Signed, key: &ProbeSecretKey) {
        let config = &self.relay.config;
        let binding =
            Binding { network: config.network, relay: config.relay, cert_sha256: config.cert_sha256 };
        let token = TokenRef::new(signed).unwrap();
        let proof = challenge.prove(key, &binding, token).unwrap().proof;
        self.frame(conn, &Frame::Auth { proof, token });
    }

    /// Connects device `n` and authenticates it.
    fn join(&mut self, n: u8, revision: u64, peers: &[u8]) -> ConnId {
        let signed = self.token(n, revision, peers).sign(&coordinator());
        let (conn, challenge) = self.connect();
        self.auth(conn, challenge, &signed, &probe(n));
        conn
    }

    fn frame(&mut self, conn: ConnId, frame: &Frame<'_>) {
        self.relay.handle_frame(conn, self.now, &frame.to_vec());
        self.settle();
    }

    fn send(&mut self, conn: ConnId, to: u8, payload: &[u8]) {
        self.frame(conn, &Frame::Send { dst: device(to), payload });
    }

    fn settle(&mut self) {
        while let Some(output) = self.relay.poll_output() {
            if let Output::Close(conn, reason) = output {
                self.closed.push((conn, reason));
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.relay.handle_timeout(self.now);
        self.settle();
    }

    /// Everything that waits for `conn`.
    fn read(&mut self, conn: ConnId) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.relay.next_frame(conn)).map(|f| f.bytes.to_vec()).collect()
    }

    /// The payloads that wait for `conn`, with their source.
    fn received(&mut self, conn: ConnId) -> Vec<(DeviceId, Vec<u8>)> {
        let frames = self.read(conn);
        frames
            .iter()
            .filter_map(|frame| match Frame::decode(frame) {
                Ok(Some(Frame::Recv { src, payload })) => Some((src, payload.to_vec())),
                _ => None,
            })
            .collect()
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.relay.stats().counters.dropped(reason)
    }

    fn last_close(&self) -> Option<RefusalCode> {
        self.closed.last().map(|(_, reason)| *reason)
    }
}

#[test]
fn two_devices_reach_each_other_and_the_relay_stamps_the_source() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[2]), world.join(2, 1, &[1]));
    assert_eq!(world.read(a), [Frame::Ready { revision: 1 }.to_vec()]);
    world.send(a, 2, b"hello");
    world.send(b, 1, b"there");
    assert_eq!(world.received(b), [(device(1), b"hello".to_vec())]);
    assert_eq!(world.received(a), [(device(2), b"there".to_vec())]);
    let stats = world.relay.stats();
    assert_eq!((stats.clients, stats.counters.forwarded_packets, stats.queued_bytes), (2, 2, 0));
}

#[test]
fn a_stolen_or_replayed_token_without_the_probe_key_gets_nothing() {
    let mut world = World::new(limits());
    let signed = world.token(1, 1, &[2]).sign(&coordinator());
    let (conn, challenge) = world.connect();
    world.auth(conn, challenge, &signed, &probe(9));
    assert_eq!(world.closed, [(conn, RefusalCode::Possession)]);
    // The proof of another connection, recorded and replayed.
    let (first, challenge) = world.connect();
    let (second, _) = world.connect();
    world.auth(first, challenge, &signed, &probe(1));
    world.auth(second, challenge, &signed, &probe(1));
    assert_eq!(world.closed[1..], [(second, RefusalCode::Possession)]);
    assert_eq!(world.relay.stats().clients, 1);
}

#[test]
fn tokens_are_judged_by_signer_network_relay_and_time() {
    let mut world = World::new(limits());
    let good = world.token(1, 1, &[2]);
    let now = world.now.unix;
    let cases = [
        (good.sign(&NetmapSecretKey::from_bytes([78; 32])), RefusalCode::TokenInvalid),
        (
            RelayToken { network: NetworkId::from_bytes([9; 16]), ..good.clone() }.sign(&coordinator()),
            RefusalCode::OtherRelay,
        ),
        (
            RelayToken { relay: RelayId::from_bytes([9; 16]), ..good.clone() }.sign(&coordinator()),
            RefusalCode::OtherRelay,
        ),
        (RelayToken { expires: now, ..good.clone() }.sign(&coordinator()), RefusalCode::TokenExpired),
        (
            RelayToken { expires: now + Duration::from_secs(661), ..good.clone() }.sign(&coordinator()),
            RefusalCode::TokenLife,
        ),
    ];
    for (signed, reason) in cases {
        let (conn, challenge) = world.connect();
        world.auth(conn, challenge, &signed, &probe(1));
        assert_eq!(world.last_close(), Some(reason));
        assert!(world.relay.stats().counters.closed(reason) > 0);
    }
    let (conn, challenge) = world.connect();
    world.auth(conn, challenge, &good.sign(&coordinator()), &probe(1));
    assert_eq!(world.relay.stats().clients, 1);
}

#[test]
fn a_session_ends_with_its_token_unless_refreshed() {
    let mut world = World::new(Limits { idle_timeout: Duration::from_secs(10_000), ..limits() });
    let (a, b) = (world.join(1, 1, &[2]), world.join(2, 1, &[1]));
    world.read(a);
    world.pass(Duration::from_secs(480));
    assert_eq!(world.read(a), [Frame::TokenWanted { why: WantedReason::Expiring }.to_vec()]);
    let signed = world.token(1, 1, &[2]).sign(&coordinator());
    world.frame(a, &Frame::TokenRefresh { token: TokenRef::new(&signed).unwrap() });
    assert_eq!(world.read(a), [Frame::Ready { revision: 1 }.to_vec()]);
    world.pass(Duration::from_secs(120));
    assert_eq!(world.closed, [(b, RefusalCode::TokenExpired)]);
    assert_eq!(world.relay.stats().clients, 1);
    // Also when the timer is late.
    world.now = world.now + Duration::from_secs(481);
    world.send(a, 2, b"late");
    assert_eq!(world.last_close(), Some(RefusalCode::TokenExpired));
}

#[test]
fn a_refresh_is_for_the_same_device_and_never_goes_back() {
    let mut world = World::new(limits());
    let a = world.join(1, 5, &[2]);
    let older = world.token(1, 4, &[2, 3]).sign(&coordinator());
    world.frame(a, &Frame::TokenRefresh { token: TokenRef::new(&older).unwrap() });
    assert_eq!(world.dropped(DropReason::OldToken), 1);
    let other = world.token(2, 6, &[3]).sign(&coordinator());
    world.frame(a, &Frame::TokenRefresh { token: TokenRef::new(&other).unwrap() });
    assert_eq!(world.closed, [(a, RefusalCode::Possession)]);
}

#[test]
fn refreshes_are_bounded() {
    let mut world = World::new(limits());
    let a = world.join(1, 5, &[2]);
    let signed = world.token(1, 5, &[2]).sign(&coordinator());
    for _ in 0..30 {
        world.frame(a, &Frame::TokenRefresh { token: TokenRef::new(&signed).unwrap() });
        world.read(a);
    }
    assert_eq!(world.dropped(DropReason::RefreshLimited), 20);
}

#[test]
fn revocation_stops_forwarding_at_once_in_both_directions() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[2]), world.join(2, 1, &[1]));
    world.send(a, 2, b"before");
    world.relay.revoke(device(1), 2, world.now);
    world.settle();
    assert_eq!(world.closed, [(a, RefusalCode::Revoked)]);
    assert_eq!(world.received(b), [], "what waited is withdrawn");
    assert_eq!(world.dropped(DropReason::Withdrawn), 1);
    world.send(a, 2, b"after");
    world.send(b, 1, b"after");
    assert_eq!(world.received(b), []);
    world.join(1, 1, &[2]);
    assert_eq!(world.last_close(), Some(RefusalCode::TokenStale));
    // Let in again, later.
    let a = world.join(1, 3, &[2]);
    world.send(a, 2, b"again");
    assert_eq!(world.received(b), [(device(1), b"again".to_vec())]);
}

#[test]
fn a_minimum_revision_suspends_until_a_newer_token() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[2]), world.join(2, 1, &[1]));
    world.read(a);
    world.send(a, 2, b"waits");
    world.send(b, 1, b"waits");
    world.relay.set_minimum_revision(device(1), 2, world.now);
    world.send(a, 2, b"no");
    world.send(b, 1, b"no");
    assert_eq!((world.received(b), world.dropped(DropReason::Withdrawn)), (vec![], 2));
    assert_eq!(world.read(a), [Frame::TokenWanted { why: WantedReason::Stale }.to_vec()]);
    assert_eq!(world.dropped(DropReason::Suspended), 2);
    let old = world.token(1, 1, &[2]).sign(&coordinator());
    let new = world.token(1, 2, &[2]).sign(&coordinator());
    world.frame(a, &Frame::TokenRefresh { token: TokenRef::new(&new).unwrap() });
    world.send(a, 2, b"yes");
    assert_eq!(world.received(b), [(device(1), b"yes".to_vec())]);
    // A minimum that the token meets already changes nothing.
    world.relay.set_minimum_revision(device(1), 2, world.now);
    world.send(a, 2, b"still");
    assert_eq!(world.received(b), [(device(1), b"still".to_vec())]);
    world.frame(a, &Frame::TokenRefresh { token: TokenRef::new(&old).unwrap() });
    assert_eq!(world.closed, [(a, RefusalCode::TokenStale)]);
}

#[test]
fn a_suspended_session_that_stays_so_ends() {
    let mut world = World::new(limits());
    let a = world.join(1, 1, &[2]);
    world.relay.set_floor(2, world.now);
    world.pass(STALE_GRACE - Duration::from_millis(1));
    assert_eq!(world.closed, []);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.closed, [(a, RefusalCode::TokenStale)]);
    world.join(1, 1, &[2]);
    assert_eq!(world.last_close(), Some(RefusalCode::TokenStale));
    world.join(1, 2, &[2]);
    assert_eq!(world.relay.stats().clients, 1);
}

#[test]
fn minimums_are_forgotten_when_no_older_token_can_live() {
    let mut world = World::new(limits());
    world.relay.set_minimum_revision(device(1), 9, world.now);
    world.pass(TOKEN_MEMORY - Duration::from_nanos(1));
    assert_eq!(world.relay.stats().minimums, 1);
    world.pass(Duration::from_nanos(1));
    assert_eq!(world.relay.stats().minimums, 0);
}

#[test]
fn too_many_minimums_become_a_floor() {
    let mut world = World::new(limits());
    for n in 0..=MAX_MINIMUMS as u128 {
        world.relay.set_minimum_revision(DeviceId::from_bytes(n.to_be_bytes()), 7, world.now);
    }
    let stats = world.relay.stats();
    assert_eq!((stats.minimums, stats.floor), (1, 7));
    world.join(1, 6, &[]);
    assert_eq!(world.last_close(), Some(RefusalCode::TokenStale));
}

#[test]
fn what_the_token_does_not_permit_is_dropped_and_said_so() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[1, 3]), world.join(2, 1, &[1]));
    world.read(a);
    for to in [2, 1, 3] {
        world.send(a, to, b"x");
    }
    let gone = |n, why| Frame::PeerGone { device: device(n), why }.to_vec();
    assert_eq!(
        world.read(a),
        [
            gone(2, GoneReason::NotPermitted),
            gone(1, GoneReason::NotPermitted),
            gone(3, GoneReason::NotConnected)
        ]
    );
    assert_eq!(world.received(b), []);
    for _ in 0..100 {
        world.send(a, 3, b"x");
        world.read(a);
    }
    assert_eq!(world.dropped(DropReason::NoticeLimited), 100 + 3 - 32);
}

#[test]
fn a_newer_connection_replaces_the_older() {
    let mut world = World::new(limits());
    let b = world.join(2, 1, &[1]);
    let old = world.join(1, 1, &[2]);
    let new = world.join(1, 1, &[2]);
    assert_eq!(world.closed, [(old, RefusalCode::Replaced)]);
    world.relay.handle_disconnected(old);
    world.send(b, 1, b"x");
    world.send(old, 2, b"x");
    assert_eq!((world.received(new).len(), world.received(b).len()), (1, 0));
}

#[test]
fn half_open_connections_are_bounded_in_number_and_time() {
    let mut world = World::new(limits());
    let conns: Vec<ConnId> = (0..5).map(|_| world.connect().0).collect();
    assert_eq!(world.closed, [(conns[0], RefusalCode::Busy), (conns[1], RefusalCode::Busy)]);
    assert_eq!(world.relay.stats().half_open, 3);
    world.pass(Duration::from_secs(10));
    assert_eq!(world.closed[2..].iter().map(|c| c.1).collect::<Vec<_>>(), [RefusalCode::AuthTimeout; 3]);
    assert_eq!(world.relay.poll_timeout(), None);
}

#[test]
fn clients_are_bounded_and_one_of_them_may_still_reconnect() {
    let mut world = World::new(limits());
    for n in 0..6 {
        world.join(n, 1, &[]);
    }
    world.join(6, 1, &[]);
    assert_eq!(world.last_close(), Some(RefusalCode::Busy));
    world.join(5, 1, &[]);
    assert_eq!(world.last_close(), Some(RefusalCode::Replaced));
    assert_eq!(world.relay.stats().clients, 6);
}

#[test]
fn a_slow_reader_loses_old_data_but_no_handshake() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[2]), world.join(2, 1, &[1]));
    let mut handshake = [0; 148];
    handshake[0] = 1;
    world.send(a, 2, &handshake);
    for n in 0..100u8 {
        world.send(a, 2, &[n.max(5); 1_000]);
        assert!(world.relay.stats().queued_bytes <= limits().queue_bytes);
    }
    let got = world.received(b);
    assert_eq!(got[0].1, handshake);
    assert_eq!(got.last().unwrap().1, [99; 1_000]);
    assert_eq!(got.len() as u64, 101 - world.dropped(DropReason::QueueFull));
    for _ in 0..100 {
        world.send(a, 2, &handshake);
    }
    assert_eq!((world.received(b).len(), world.dropped(DropReason::HandshakeQueueFull)), (64, 36));
}

#[test]
fn memory_for_all_queues_is_bounded_and_who_reads_always_gets_some() {
    const SLOW: u8 = 100;
    let limits = Limits {
        max_clients: 200,
        queue_bytes: 20_000,
        total_queue_bytes: 320_000,
        rate: u64::MAX,
        ..Limits::default()
    };
    let mut world = World::new(limits.clone());
    let (slow, reader): (Vec<u8>, u8) = ((1..=SLOW).collect(), SLOW + 1);
    let a = world.join(0, 1, &[&slow[..], &[reader]].concat());
    for n in &slow {
        world.join(*n, 1, &[]);
    }
    let conn = world.join(reader, 1, &[]);
    for _ in 0..20 {
        for n in &slow {
            world.send(a, *n, &[9; 1_000]);
            assert!(world.relay.stats().queued_bytes <= limits.total_queue_bytes);
        }
        world.send(a, reader, &[9; 1_000]);
        assert_eq!(world.received(conn).len(), 1, "{:?}", world.relay.stats());
    }
    assert!(world.dropped(DropReason::MemoryFull) > 500);
}

#[test]
fn who_floods_a_device_delays_and_loses_only_own_packets() {
    let mut world = World::new(Limits { max_clients: 6, ..Limits::default() });
    let [flood, calm] = [1, 2].map(|n| world.join(n, 1, &[3]));
    let to = world.join(3, 1, &[]);
    world.read(to);
    let mut calm_at = Vec::new();
    // The receiver takes 100 packets in the time in which one device sends 200 and the other 10.
    for turn in 0..100u8 {
        world.pass(Duration::from_millis(100));
        for n in 0..200 {
            world.send(flood, 3, &[9; 1_300]);
            if n % 20 == 0 {
                world.send(calm, 3, &[turn; 1_300]);
            }
        }
        for at in 0..100 {
            let Some(frame) = world.relay.next_frame(to) else { break };
            if let Ok(Some(Frame::Recv { src, payload })) = Frame::decode(&frame.bytes)
                && src == device(2)
            {
                assert_eq!(payload[0], turn, "it never waits for the next turn");
                calm_at.push(at);
            }
        }
    }
    assert_eq!(calm_at.len(), 1_000, "it loses nothing");
    assert!(calm_at.iter().all(|at| *at < 2 * 10 + 1), "at most one packet of the flood goes before each");
    assert_eq!(world.dropped(DropReason::QueueFull) + world.dropped(DropReason::RateLimited), {
        let taken = 100 * 100 - 1_000;
        let waiting = world.received(to).len() as u64;
        100 * 200 - taken - waiting
    });
}

#[test]
fn who_reads_nothing_is_cut_off() {
    let mut world = World::new(limits());
    let a = world.join(1, 1, &[]);
    for nonce in 0..=MAX_CONTROL_FRAMES as u64 {
        world.frame(a, &Frame::Ping { nonce });
    }
    assert_eq!(world.closed, [(a, RefusalCode::SlowReader)]);
}

#[test]
fn the_rate_of_a_device_is_limited_and_survives_its_reconnect() {
    let rate = Limits { rate: 10_000, burst: 20_000, ..limits() };
    let mut world = World::new(rate);
    let b = world.join(2, 1, &[]);
    let mut a = world.join(1, 1, &[2]);
    let frame = 1_000 + PACKET_OVERHEAD + 17;
    let mut got = 0;
    for n in 0..100 {
        if n == 50 {
            a = world.join(1, 1, &[2]);
        }
        world.send(a, 2, &[9; 1_000]);
        got += world.received(b).len();
    }
    assert_eq!(got, 20_000 / frame);
    world.pass(Duration::from_secs(1));
    for _ in 0..100 {
        world.send(a, 2, &[9; 1_000]);
        got += world.received(b).len();
    }
    assert!(got <= 30_000 / frame);
    assert_eq!(world.dropped(DropReason::RateLimited), 200 - got as u64);
}

#[test]
fn the_silent_are_cut_off_and_the_others_are_not() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[]), world.join(2, 1, &[]));
    for nonce in 0..8 {
        world.pass(Duration::from_secs(10));
        world.frame(a, &Frame::Ping { nonce });
    }
    assert_eq!(world.closed, [(b, RefusalCode::Idle)]);
}

#[test]
fn out_of_place_frames_close_the_connection() {
    let mut world = World::new(limits());
    let signed = world.token(1, 1, &[]).sign(&coordinator());
    let token = TokenRef::new(&signed).unwrap();
    let challenge = Challenge { ephemeral: ProbePublicKey::from_bytes([1; 32]), nonce: [0; 32] };
    for frame in [
        Frame::Auth { proof: [0; 32], token },
        Frame::Challenge(challenge),
        Frame::Ready { revision: 1 },
        RefusalCode::Busy.frame(),
        Frame::Recv { src: device(2), payload: b"forged" },
        Frame::Drain { after_ms: 0 },
    ] {
        let a = world.join(1, 1, &[]);
        world.frame(a, &frame);
        assert_eq!(world.last_close(), Some(RefusalCode::Protocol), "{frame:?}");
    }
    let (half_open, _) = world.connect();
    world.frame(half_open, &Frame::Send { dst: device(1), payload: b"early" });
    assert_eq!(world.dropped(DropReason::NotAuthenticated), 1);
    world.frame(half_open, &Frame::TokenRefresh { token });
    assert_eq!(world.last_close(), Some(RefusalCode::Protocol));
}

#[test]
fn drain_tells_everyone_and_close_all_ends_all() {
    let mut world = World::new(limits());
    let (a, b) = (world.join(1, 1, &[]), world.join(2, 1, &[]));
    world.read(a);
    world.relay.drain(Duration::from_secs(3));
    assert_eq!(world.read(a), [Frame::Drain { after_ms: 3_000 }.to_vec()]);
    world.connect();
    world.relay.close_all(RefusalCode::ShuttingDown);
    world.settle();
    assert_eq!(world.closed.len(), 3);
    assert_eq!(world.relay.stats().clients + world.relay.stats().half_open, 0);
    assert!(world.read(b).is_empty());
}

#[derive(Debug, Clone)]
enum Pick {
    /// The session of a device.
    Session(u8),
    /// Any connection that ever was.
    Any(prop::sample::Index),
}

#[derive(Debug, Clone)]
enum Step {
    Connect,
    Join { who: u8, revision: u64, peers: Vec<u8> },
    Auth { conn: Pick, who: u8, key: u8, revision: u64, peers: Vec<u8>, life_s: u64 },
    Refresh { conn: Pick, who: u8, revision: u64, peers: Vec<u8> },
    Send { conn: Pick, to: u8, len: usize },
    Raw { conn: Pick, bytes: Vec<u8> },
    Minimum { who: u8, revision: u64 },
    Revoke { who: u8, revision: u64 },
    Floor { revision: u64 },
    Read { conn: Pick },
    Gone { conn: Pick },
    Pass { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let conn = || {
        prop_oneof![
            4 => (0u8..5).prop_map(Pick::Session),
            1 => any::<prop::sample::Index>().prop_map(Pick::Any),
        ]
    };
    let peers = || prop::collection::vec(0u8..5, 1..4);
    prop_oneof![
        3 => Just(Step::Connect),
        6 => (0u8..5, 1u64..7, peers()).prop_map(|(who, revision, peers)| Step::Join { who, revision, peers }),
        6 => (conn(), 0u8..5, 0u8..12, 1u64..5, peers(), 1u64..700).prop_map(|(conn, who, key, revision, peers, life_s)| {
            // Mostly the right key.
            Step::Auth { conn, who, key: if key < 5 { key } else { who }, revision, peers, life_s }
        }),
        2 => (conn(), 0u8..5, 1u64..6, peers()).prop_map(|(conn, who, revision, peers)| Step::Refresh { conn, who, revision, peers }),
        12 => (conn(), 0u8..5, 1usize..MAX_PAYLOAD).prop_map(|(conn, to, len)| Step::Send { conn, to, len }),
        2 => (conn(), prop::collection::vec(any::<u8>(), 0..120)).prop_map(|(conn, bytes)| Step::Raw { conn, bytes }),
        2 => (0u8..5, 1u64..5).prop_map(|(who, revision)| Step::Minimum { who, revision }),
        1 => (0u8..5, 1u64..5).prop_map(|(who, revision)| Step::Revoke { who, revision }),
        1 => (1u64..5).prop_map(|revision| Step::Floor { revision }),
        6 => conn().prop_map(|conn| Step::Read { conn }),
        1 => conn().prop_map(|conn| Step::Gone { conn }),
        2 => (0u64..30_000).prop_map(|ms| Step::Pass { ms }),
    ]
}

/// What a device is entitled to, kept apart from the relay's own books.
#[derive(Debug, Clone)]
struct Entitled {
    who: u8,
    revision: u64,
    peers: Vec<u8>,
    until: UnixTime,
}

#[derive(Default)]
struct Model {
    challenges: BTreeMap<ConnId, Challenge>,
    entitled: BTreeMap<ConnId, Entitled>,
    /// With the time when no token from before can be alive any more.
    minimum: BTreeMap<u8, (u64, UnixTime)>,
    floor: u64,
}

impl Model {
    fn require(&mut self, who: u8, revision: u64, now: UnixTime) {
        let earlier = self.minimum.get(&who).filter(|(_, until)| now < *until).map_or(0, |(r, _)| *r);
        self.minimum.insert(who, (revision.max(earlier), now + TOKEN_MEMORY));
    }

    fn current(&self, conn: ConnId, now: UnixTime) -> Option<&Entitled> {
        let entitled = self.entitled.get(&conn)?;
        let minimum = self.minimum.get(&entitled.who).filter(|(_, until)| now < *until);
        let minimum = minimum.map_or(0, |(revision, _)| *revision).max(self.floor);
        (entitled.revision >= minimum && now < entitled.until).then_some(entitled)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever comes in whatever order: nothing panics, everything is bounded, and what is delivered was sent by the
    /// device named as its source, on a connection that was entitled to send it there.
    #[test]
    fn any_order_of_anything(steps in prop::collection::vec(step(), 1..150)) {
        let mut world = World::restarted(limits());
        let mut model = Model::default();
        let mut conns: Vec<ConnId> = Vec::new();
        let mut permitted: BTreeSet<(u8, u8, u32)> = BTreeSet::new();
        let mut serial = 0u32;
        for step in steps {
            let sessions = world.relay.sessions.clone();
            let pick = |pick: Pick| match pick {
                Pick::Session(who) => sessions.get(&device(who)).copied(),
                Pick::Any(index) => (!conns.is_empty()).then(|| conns[index.index(conns.len())]),
            };
            match step {
                Step::Connect => {
                    let (conn, challenge) = world.connect();
                    conns.push(conn);
                    model.challenges.insert(conn, challenge);
                }
                Step::Join { who, revision, peers } => {
                    let (conn, challenge) = world.connect();
                    conns.push(conn);
                    model.challenges.insert(conn, challenge);
                    let token = world.token(who, revision, &peers);
                    world.auth(conn, challenge, &token.sign(&coordinator()), &probe(who));
                    if world.relay.session(conn).is_some() {
                        model.entitled.insert(conn, Entitled { who, revision, peers, until: token.expires });
                        prop_assert!(model.current(conn, world.now.unix).is_some(), "a session without a current token");
                    }
                }
                Step::Auth { conn, who, key, revision, peers, life_s } => if let Some(conn) = pick(conn) {
                    let until = world.now.unix + Duration::from_secs(life_s);
                    let token = RelayToken { expires: until, ..world.token(who, revision, &peers) };
                    let before = world.relay.session(conn).is_some();
                    world.auth(conn, model.challenges[&conn], &token.sign(&coordinator()), &probe(key));
                    let after = world.relay.session(conn).is_some();
                    if !before && after {
                        prop_assert_eq!(who, key, "a session without possession");
                        model.entitled.insert(conn, Entitled { who, revision, peers, until });
                        prop_assert!(model.current(conn, world.now.unix).is_some(), "a session without a current token");
                    }
                },
                Step::Refresh { conn, who, revision, peers } => if let Some(conn) = pick(conn) {
                    let token = world.token(who, revision, &peers);
                    let signed = token.sign(&coordinator());
                    world.frame(conn, &Frame::TokenRefresh { token: TokenRef::new(&signed).unwrap() });
                    if let (Some(session), Some(entitled)) = (world.relay.session(conn), model.entitled.get_mut(&conn))
                        && session.revision == revision && entitled.who == who
                        && session.peers == sorted(token.peers)
                    {
                        *entitled = Entitled { who, revision, peers, until: token.expires };
                    }
                },
                Step::Send { conn, to, len } => if let Some(conn) = pick(conn) {
                    serial += 1;
                    let mut payload = vec![0xff; len.max(4)];
                    payload[..4].copy_from_slice(&serial.to_be_bytes());
                    if let Some(entitled) = model.current(conn, world.now.unix)
                        && entitled.peers.contains(&to) && to != entitled.who
                    {
                        permitted.insert((entitled.who, to, serial));
                    }
                    world.send(conn, to, &payload);
                },
                Step::Raw { conn, bytes } => if let Some(conn) = pick(conn) {
                    world.relay.handle_frame(conn, world.now, &bytes);
                },
                Step::Minimum { who, revision } => {
                    world.relay.set_minimum_revision(device(who), revision, world.now);
                    model.require(who, revision, world.now.unix);
                    permitted.retain(|(src, ..)| *src != who);
                }
                Step::Revoke { who, revision } => {
                    world.relay.revoke(device(who), revision, world.now);
                    model.require(who, revision, world.now.unix);
                    permitted.retain(|(src, ..)| *src != who);
                }
                Step::Floor { revision } => {
                    world.relay.set_floor(revision, world.now);
                    if revision > model.floor {
                        model.floor = revision;
                        permitted.clear();
                    }
                }
                Step::Read { conn } => if let Some(conn) = pick(conn) {
                    let reader = world.relay.session(conn).map(|s| s.device);
                    for (src, payload) in world.received(conn) {
                        let serial = u32::from_be_bytes(*payload.first_chunk().unwrap());
                        let (src, dst) = (src.to_bytes()[0], reader.unwrap().to_bytes()[0]);
                        prop_assert!(model.current(conn, world.now.unix).is_some(), "delivered to a suspended session");
                        prop_assert!(permitted.contains(&(src, dst, serial)), "{src} to {dst} was not permitted");
                    }
                },
                Step::Gone { conn } => if let Some(conn) = pick(conn) {
                    world.relay.handle_disconnected(conn);
                },
                Step::Pass { ms } => world.pass(Duration::from_millis(ms)),
            }
            world.settle();
            let (relay, bounds) = (&world.relay, limits());
            let stats = relay.stats();
            prop_assert!(stats.clients <= bounds.max_clients && stats.half_open <= bounds.max_half_open);
            prop_assert!(stats.queued_bytes <= bounds.total_queue_bytes);
            prop_assert_eq!(relay.conns.len(), stats.clients + stats.half_open);
            prop_assert_eq!(relay.timers.len(), relay.conns.len());
            prop_assert!(relay.conns.iter().all(|(id, c)| c.queue.is_empty() || relay.woken.contains(id)));
            prop_assert!(relay.woken.iter().all(|id| relay.conns.contains_key(id)));
            let queued = relay.conns.values().map(|c| c.queue.data_bytes()).sum::<usize>();
            prop_assert_eq!(stats.queued_bytes, queued + relay.absent.data_bytes());
            for (device, conn) in &relay.sessions {
                prop_assert_eq!(relay.session(*conn).map(|s| s.device), Some(*device));
            }
        }
        world.relay.close_all(RefusalCode::ShuttingDown);
        let stats = world.relay.stats();
        prop_assert_eq!((stats.clients, stats.half_open, stats.queued_bytes), (0, 0, 0));
        prop_assert!(world.relay.poll_timeout().is_none());
    }
}
