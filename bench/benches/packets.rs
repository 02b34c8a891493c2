//! What the packet path is made of, per super-frame of 47 packets: cutting, joining, and both halves with judging and the
//! cipher. The filter alone is in `agent/engine/benches`.

#![expect(clippy::expect_used, reason = "a benchmark that can't be set up has nothing to say")]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use warren_bench::memory::{SEGMENT, SEGMENTS, Tunnel, super_frame};
use warren_engine::io::{Added, TunOffload, TunOut};
use warren_engine::offload::segment::SuperFrame;
use warren_engine::offload::vnet::{HEADER_LEN, Header};

/// Measured halves between looks at the timers.
const TICK: u64 = 4_096;

fn cut(frame: &[u8]) -> SuperFrame<'_> {
    let header = Header::read(frame).expect("a virtio header");
    SuperFrame::new(header.gso.expect("a super-frame"), header.checksum, &frame[HEADER_LEN..]).expect("sound")
}

/// Cutting and joining alone.
fn offload(c: &mut Criterion) {
    let mut group = c.benchmark_group("super-frame");
    group.throughput(Throughput::Bytes((SEGMENTS * SEGMENT) as u64));
    let frame = super_frame([10, 99, 0, 1].into(), [10, 99, 0, 2].into(), SEGMENTS, SEGMENT);
    let frame_to_cut = cut(&frame);
    let mut out = vec![0; 2_048];
    group.bench_function("segment", |b| {
        b.iter(|| (0..SEGMENTS).map(|n| black_box(frame_to_cut.write(n, &mut out))).sum::<usize>());
    });
    let packets: Vec<Vec<u8>> = (0..SEGMENTS)
        .map(|n| {
            let len = frame_to_cut.write(n, &mut out);
            out[..len].to_vec()
        })
        .collect();
    let mut tun = TunOut::vectored(TunOffload { tcp: true, udp: true });
    group.bench_function("coalesce", |b| {
        b.iter(|| {
            tun.clear();
            assert!(packets.iter().all(|packet| tun.add(0, packet) == Added::Yes));
            tun.settle(|_, _, _| true);
            black_box(tun.len())
        });
    });
    assert_eq!(tun.len(), 1, "all of it is one frame");
    group.finish();
}

/// The engine's halves: judge, cut and seal; open, join and judge.
fn engine(c: &mut Criterion) {
    let mut tunnel = Tunnel::connect(1).expect("a tunnel");
    let mut group = c.benchmark_group("super-frame");
    group.throughput(Throughput::Bytes((SEGMENTS * SEGMENT) as u64));
    for (name, sealing) in [("seal", true), ("open", false)] {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let mut total = Duration::ZERO;
                for n in 0..times {
                    let began = Instant::now();
                    tunnel.seal();
                    let between = Instant::now();
                    assert_eq!(tunnel.open(), SEGMENTS * SEGMENT);
                    total += if sealing { between - began } else { between.elapsed() };
                    if n % TICK == 0 {
                        tunnel.tick();
                    }
                }
                total
            });
        });
    }
    group.finish();
}

criterion_group!(benches, offload, engine);
criterion_main!(benches);
