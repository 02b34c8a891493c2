//! What an idle client costs a relay: the bytes that the relay's threads hold for each, after some traffic. Printed for
//! docs/performance.md. The kernel's socket buffers are not in it.
#![expect(unsafe_code, reason = "a counting allocator is an allocator")]
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed test panics")]
#![expect(clippy::print_stdout, reason = "the figure is the result")]

#[path = "relay/support.rs"]
#[expect(dead_code, reason = "the relay's own tests use the rest")]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, Ordering};

use support::{Device, Transport, config, device};
use warren_common::wire::relay::Frame;
use warren_relay::core::Limits;
use warren_relay::server::RelayServer;

/// The goal for a client over QUIC or by WebSocket.
const GOAL: i64 = 64 * 1024;
/// Clients that are there before it is measured, so that what they share is not counted.
const FIRST: u8 = 20;
/// All clients.
const ALL: u8 = 140;

struct Counting;

static HELD: AtomicI64 = AtomicI64::new(0);

thread_local! {
    /// This thread is the clients', any other the relay's.
    static CLIENTS: Cell<bool> = const { Cell::new(false) };
}

fn count(bytes: i64) {
    if !CLIENTS.try_with(Cell::get).unwrap_or(false) {
        HELD.fetch_add(bytes, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller keeps `dealloc`'s contract, and `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller keeps `realloc`'s contract, and `ptr` came from `System`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes for each idle client over a transport.
fn per_client(transport: Transport) -> i64 {
    let relay = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let server = {
        let _context = relay.enter();
        RelayServer::start(config(dir.path(), Limits::default())).unwrap()
    };
    let clients = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    clients.block_on(async {
        let mut devices = Vec::new();
        let mut before = 0;
        for n in 1..=ALL {
            let mut new = Device::join(&server, transport, n, &[1, n - 1]).await;
            // Bursts each way, as a session has them once in a while.
            if let Some(last) = devices.last_mut() {
                for _ in 0..20 {
                    new.send(n - 1, &[n; 1_300]).await;
                }
                for _ in 0..20 {
                    let last: &mut Device = last;
                    assert_eq!(last.receive().await.0, device(n));
                }
            }
            new.stream(&Frame::Ping { nonce: 1 }).await;
            new.see().await;
            devices.push(new);
            if n == FIRST {
                before = HELD.load(Ordering::Relaxed);
            }
        }
        let held = (HELD.load(Ordering::Relaxed) - before) / i64::from(ALL - FIRST);
        assert_eq!(server.stats().core.clients, usize::from(ALL));
        held
    })
}

#[test]
fn an_idle_client_is_cheap() {
    CLIENTS.with(|clients| clients.set(true));
    for transport in [Transport::Quic, Transport::WebSocket] {
        let bytes = per_client(transport);
        println!("{transport:?}: {bytes} bytes per idle client");
        assert!((1..=GOAL).contains(&bytes), "{transport:?}: {bytes} bytes per idle client");
    }
}
