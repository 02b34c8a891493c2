//! Memory: nothing is allocated per packet, and an idle peer is small. A test binary of its own, since it counts.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and prints what it measured"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use warren_common::keys::{WgPublicKey, WgSecretKey};
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::io::Source;
use warren_engine::wg::{Device, PeerHandle, Received};

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// Allocations and live bytes of this thread: tests run beside each other.
    static COUNTS: Cell<(u64, i64)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count(allocations: u64, bytes: i64) {
    COUNTS.set((COUNTS.get().0 + allocations, COUNTS.get().1 + bytes));
}

#[expect(unsafe_code, reason = "an allocator can't be written without")]
// SAFETY: every call is passed to `System` unchanged; what is counted never touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(1, layout.size() as i64);
        // SAFETY: the caller keeps `alloc`'s contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, -(layout.size() as i64));
        // SAFETY: the caller keeps `dealloc`'s contract, and all memory here came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(1, size as i64 - layout.size() as i64);
        // SAFETY: the caller keeps `realloc`'s contract, and all memory here came from `System`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

const SOURCE: Source = Source::Direct {
    socket: 0,
    remote: std::net::SocketAddr::V4(std::net::SocketAddrV4::new(
        std::net::Ipv4Addr::new(192, 0, 2, 1),
        40_000,
    )),
};

fn start() -> Now {
    Now { boot: Instant::from_nanos(1_000_000_000_000), unix: UnixTime::from_secs(1_800_000_000) }
}

/// Two devices with a confirmed session.
fn connected() -> [(Device, PeerHandle); 2] {
    let secrets = [[1; 32], [2; 32]].map(WgSecretKey::from_bytes);
    let mut a = Device::new(secrets[0].clone(), [3; 32], 0);
    let mut b = Device::new(secrets[1].clone(), [4; 32], 0);
    let to_b = a.add_peer(secrets[1].public(), None, None).unwrap();
    let to_a = b.add_peer(secrets[0].public(), None, None).unwrap();
    let mut out = [0; 2048];
    a.initiate(to_b, start());
    for n in 0..3 {
        let (from, to) = if n % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let len = from.poll_transmit(start(), &mut out).unwrap().len;
        to.handle(start(), SOURCE, &mut out[..len]).unwrap();
    }
    while a.poll_event().is_some() || b.poll_event().is_some() {}
    [(a, to_b), (b, to_a)]
}

#[test]
fn no_packet_allocates_in_either_direction() {
    let [(mut a, to_b), (mut b, to_a)] = connected();
    let mut packet = vec![0; 1280];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&1280u16.to_be_bytes());
    let mut out = [0; 2048];
    let before = COUNTS.get().0;
    let mut now = start();
    // A hundred seconds of traffic, with its timers, up to just before the first renewal.
    for n in 0..10_000 {
        now = now + Duration::from_millis(10);
        let len = a.seal(to_b, now, &packet, &mut out).unwrap();
        let got = b.handle(now, SOURCE, &mut out[..len]).unwrap();
        assert!(matches!(got, Received::Data { .. }));
        if n % 7 == 0 {
            let len = b.seal(to_a, now, &packet[..], &mut out).unwrap();
            a.handle(now, SOURCE, &mut out[..len]).unwrap();
        }
        for device in [&mut a, &mut b] {
            assert_eq!(device.poll_transmit(now, &mut out), None);
            assert_eq!(device.poll_event(), None);
            if device.poll_timeout().unwrap().0 <= now.boot {
                device.handle_timeout(now);
            }
        }
    }
    assert_eq!(COUNTS.get().0 - before, 0, "allocations in 11 400 packets");
}

#[test]
fn ten_thousand_idle_peers_take_less_than_300_bytes_each() {
    const PEERS: usize = 10_000;
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let keys: Vec<WgPublicKey> = (0..PEERS)
        .map(|_| {
            let mut bytes = [0; 32];
            rng.fill_bytes(&mut bytes);
            WgPublicKey::from_bytes(bytes)
        })
        .collect();
    let mut device = Device::new(WgSecretKey::from_bytes([1; 32]), [2; 32], 0);
    let before = COUNTS.get().1;
    for key in &keys {
        device.add_peer(*key, None, None).unwrap();
    }
    let each = (COUNTS.get().1 - before) / PEERS as i64;
    println!("{each} bytes for an idle peer");
    assert!(each <= 300, "{each} bytes");
    assert_eq!(device.poll_timeout(), None, "and no timer");
}

#[test]
fn an_active_peer_shrinks_to_an_idle_one_when_its_sessions_are_over() {
    let [(mut a, to_b), _] = connected();
    let mut now = start() + Duration::from_secs(60);
    let active = COUNTS.get().1;
    while let Some((at, _)) = a.poll_timeout() {
        now = now + at.since(now.boot);
        a.handle_timeout(now);
        let mut out = [0; 2048];
        while a.poll_transmit(now, &mut out).is_some() {}
    }
    let freed = active - COUNTS.get().1;
    println!("{freed} bytes for an active peer");
    assert!((1_200..2_048).contains(&freed), "session and timers, {freed} bytes");
    assert!(!a.has_session(to_b, now));
}
