//! What finding the peer costs: a small packet each way with 1 to 10 000 peers that all have sessions, whose turns follow no
//! order; and where only ten of the 10 000 talk. Routing, judging and sealing; finding the session, opening and judging. The cipher's part is the same in all rows.

#![expect(clippy::expect_used, reason = "a benchmark that can't be set up has nothing to say")]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use warren_bench::crowd::Crowd;

/// How many have sessions, and how many of them talk.
const PEERS: [(usize, usize); 5] = [(1, 1), (10, 10), (1_000, 1_000), (10_000, 10_000), (10_000, 10)];
/// Packets measured at a time, a count: few enough that the packets themselves stay in the cache.
const TURN: u64 = 128;

/// Whose turn it is, in an order that no cache guesses.
struct Order {
    state: u64,
    peers: usize,
}

impl Order {
    fn next(&mut self, count: u64) -> Vec<usize> {
        let mut next = || {
            self.state = self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (self.state >> 33) as usize % self.peers
        };
        (0..count).map(|_| next()).collect()
    }
}

/// Runs `measure` with the turns of `times` packets.
fn turns(times: u64, mut measure: impl FnMut(u64) -> Duration) -> Duration {
    let (whole, rest) = (times / TURN, times % TURN);
    std::iter::repeat_n(TURN, whole as usize).chain((rest > 0).then_some(rest)).map(&mut measure).sum()
}

fn peers(c: &mut Criterion) {
    for (count, talking) in PEERS {
        let mut crowd = Crowd::connect(count).expect("sessions with all");
        let mut order = Order { state: 1, peers: talking };
        let row = format!("{talking} of {count}");
        let mut group = c.benchmark_group("peers");
        group.bench_function(BenchmarkId::new("send", &row), |b| {
            b.iter_custom(|times| {
                turns(times, |n| {
                    let packets = crowd.packets(&order.next(n));
                    let began = Instant::now();
                    let waiting = packets.iter().map(|packet| crowd.send(packet)).last();
                    let took = began.elapsed();
                    assert!(waiting.is_some_and(|waiting| waiting > 0), "nothing was sent");
                    crowd.clear();
                    took
                })
            });
        });
        group.bench_function(BenchmarkId::new("receive", &row), |b| {
            b.iter_custom(|times| {
                turns(times, |n| {
                    let mut sealed = crowd.seal(&order.next(n)).expect("sealed packets");
                    let began = Instant::now();
                    let mut waiting = 0;
                    for (from, datagram) in &mut sealed {
                        waiting = crowd.receive(*from, datagram);
                    }
                    let took = began.elapsed();
                    assert_eq!(waiting as u64, n, "all of them came");
                    crowd.clear();
                    took
                })
            });
        });
        group.finish();
    }
}

criterion_group!(benches, peers);
criterion_main!(benches);
