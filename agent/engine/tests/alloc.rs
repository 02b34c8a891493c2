//! The data path allocates nothing once it is warm: from one engine's TUN to the other's, in batches.
#![expect(unsafe_code, reason = "a counting allocator is an allocator")]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a failed test panics")]

#[path = "engine/net.rs"]
#[expect(dead_code, reason = "the scenarios use the rest")]
mod net;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use net::{Behind, Net, overlay, super_frame, udp};
use warren_engine::io::{Arrival, Destination, Outbox, Source, TunOffload, TunOut};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // Nothing is counted while a thread starts or ends; the test's own thread lives.
    let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `realloc`'s contract, and `ptr` came from `System`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_warm_data_path_allocates_nothing() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    for _ in 0..10 {
        net.send(0, 1, &[7; 1_200]);
        net.send(1, 0, &[7; 1_200]);
        net.run(Duration::from_millis(100));
    }
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"));

    let packets = [
        udp(overlay(0), overlay(1), 4_000, 5_000, &[7; 1_200]),
        udp(overlay(1), overlay(0), 5_000, 4_000, &[7; 1_200]),
    ];
    let (mut out, mut tun) = (Outbox::new(), TunOut::new(10));
    let mut scratch = vec![0; 65_536];
    let mut passed = 0;
    let mut before = 0;
    let now = net.now;
    for round in 0..200u64 {
        if round == 100 {
            before = ALLOCATIONS.get();
        }
        let now = now + Duration::from_micros(100 * round);
        for (from, packet) in packets.iter().enumerate() {
            let to = 1 - from;
            for _ in 0..32 {
                net.nodes[from].engine.handle_tun(now, packet, &mut out);
            }
            for (transmit, bytes) in out.iter() {
                let Destination::Direct { remote, .. } = transmit.to else { panic!("not direct") };
                assert_eq!((remote, transmit.segment_size.is_some()), (net.nodes[to].local, true));
                let data = &mut scratch[..bytes.len()];
                data.copy_from_slice(bytes);
                let source = Source::Direct { socket: 0, remote: net.nodes[from].local };
                let stride = transmit.segment_size.unwrap_or(transmit.len);
                net.nodes[to].engine.handle_datagram(now, source, data, stride, &mut tun);
            }
            out.clear();
            passed += tun.len();
            assert!(tun.iter().all(|got| got == packet));
            tun.clear();
            for node in &mut net.nodes {
                assert!(!node.engine.poll_transmit(now, &mut out) && out.is_empty());
                assert!(node.engine.poll_event().is_none());
                node.engine.poll_timeout(now);
            }
        }
    }
    assert_eq!(passed, 200 * 2 * 32);
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations in 6400 packets");
}

#[test]
fn a_warm_vectored_path_allocates_nothing() {
    let mut net = Net::new(&[Behind::Nothing, Behind::Nothing]);
    for _ in 0..10 {
        net.send(0, 1, &[7; 1_200]);
        net.send(1, 0, &[7; 1_200]);
        net.run(Duration::from_millis(100));
    }
    assert_eq!((net.path_kind(0, 1), net.path_kind(1, 0)), ("direct", "direct"));
    let mut frames = [true, false].map(|tcp| super_frame(overlay(0), overlay(1), tcp, 40, 1_200));
    let mut out = Outbox::new();
    let mut tun = TunOut::vectored(TunOffload { tcp: true, udp: true });
    let mut scratch = vec![0; 65_536];
    let (mut passed, mut bytes, mut before) = (0, 0, 0);
    for round in 0..200u64 {
        if round == 100 {
            before = ALLOCATIONS.get();
        }
        let now = net.now + Duration::from_micros(100 * round);
        for frame in &mut frames {
            net.nodes[0].engine.handle_tun_frame(now, frame, false, &mut out);
            for (transmit, sealed) in out.iter() {
                let data = &mut scratch[..sealed.len()];
                data.copy_from_slice(sealed);
                let source = Source::Direct { socket: 0, remote: net.nodes[0].local };
                let arrival = Arrival { stride: transmit.segment_size.unwrap_or(0), ..Arrival::default() };
                net.nodes[1].engine.handle_datagrams(now, source, arrival, data, &mut tun);
            }
            out.clear();
            passed += tun.len();
            bytes += tun.frames().flatten().map(<[u8]>::len).sum::<usize>();
            tun.clear();
        }
        for node in &mut net.nodes {
            assert!(!node.engine.poll_transmit(now, &mut out));
            assert!(node.engine.poll_event().is_none());
            node.engine.poll_timeout(now);
            out.clear();
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations in 8000 packets");
    let sent: usize = frames.iter().map(Vec::len).sum();
    assert_eq!((passed, bytes), (200 * 2, 200 * sent), "each super-frame came out as one");
}
