//! Nanoseconds per packet for sealing and opening on one core, printed for people; not a test.
//!
//! `cargo run --release -p warren-engine --example wg_throughput`

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark reads the clock, prints, and fails by panicking"
)]

use std::time::Instant;

use warren_common::keys::WgSecretKey;
use warren_common::time::{self, Now, UnixTime};
use warren_engine::io::Source;
use warren_engine::wg::{DATA_OVERHEAD, Device, PeerHandle};

const PACKET: usize = 1420;
const BATCH: usize = 2_000;
const ROUNDS: usize = 60;

fn main() {
    let now =
        Now { boot: time::Instant::from_nanos(1_000_000_000), unix: UnixTime::from_secs(1_800_000_000) };
    let source = Source::Direct { socket: 0, remote: ([192, 0, 2, 1], 40_000).into() };
    let ((mut a, to_b), (mut b, _)) = connected(now, source);
    let mut packet = [0; PACKET];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(PACKET as u16).to_be_bytes());

    let mut sealed = vec![[0; PACKET + DATA_OVERHEAD]; BATCH];
    let (mut seal, mut open, mut handshake) = (f64::MAX, f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        for out in &mut sealed {
            a.seal(to_b, now, &packet, out).unwrap();
        }
        seal = seal.min(began.elapsed().as_nanos() as f64 / BATCH as f64);
        let began = Instant::now();
        for datagram in &mut sealed {
            b.handle(now, source, datagram).unwrap();
        }
        open = open.min(began.elapsed().as_nanos() as f64 / BATCH as f64);
        let began = Instant::now();
        connected(now, source);
        handshake = handshake.min(began.elapsed().as_nanos() as f64 / 1_000.0);
    }
    let gbits = |ns: f64| PACKET as f64 * 8.0 / ns;
    println!(
        "seal {seal:.0} ns ({:.1} Gbit/s), open {open:.0} ns ({:.1} Gbit/s) per {PACKET}-byte packet, best of {ROUNDS} rounds",
        gbits(seal),
        gbits(open)
    );
    println!("two devices made and connected in {handshake:.0} us");
}

fn connected(now: Now, source: Source) -> ((Device, PeerHandle), (Device, PeerHandle)) {
    let secrets = [[1; 32], [2; 32]].map(WgSecretKey::from_bytes);
    let [mut a, mut b] = [0, 1].map(|n: u8| Device::new(secrets[usize::from(n)].clone(), [n; 32], n));
    let to_b = a.add_peer(b.public_key(), None, None).unwrap();
    let to_a = b.add_peer(a.public_key(), None, None).unwrap();
    for device in [&mut a, &mut b] {
        device.set_mtu(PACKET);
    }
    let mut out = [0; 2048];
    a.initiate(to_b, now);
    for turn in 0..3 {
        let (from, to) = if turn % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let len = from.poll_transmit(now, &mut out).unwrap().len;
        to.handle(now, source, &mut out[..len]).unwrap();
    }
    ((a, to_b), (b, to_a))
}
