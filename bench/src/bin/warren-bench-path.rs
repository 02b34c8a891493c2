//! The packet path in memory, without a kernel: how long its halves take, how it scales over threads, and a fixed amount
//! of work for instruction counts.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a benchmark reads the clock and prints"
)]

use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use warren_bench::memory::{Hub, SEGMENT, SEGMENTS, Tunnel};

/// Example: warren-bench-path shards 2
#[derive(Debug, Parser)]
#[command(name = "warren-bench-path")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Nanoseconds per packet of each half.
    Halves,
    /// Gbit/s of one shard on one thread, and of this many on as many threads.
    Shards {
        /// Threads.
        threads: usize,
    },
    /// Gbit/s of one engine with several busy peers, alone and with helpers for a turn's sealing and opening.
    Together {
        /// Busy peers.
        peers: usize,
        /// Threads, the engine's owner included.
        threads: usize,
    },
    /// This many super-frames, and nothing else that takes long.
    Fixed {
        /// Super-frames of 47 packets.
        frames: usize,
    },
}

/// Time of one measurement.
const SPAN: Duration = Duration::from_millis(1_500);
/// Super-frames between looks at the timers.
const TICK: usize = 4_096;

fn main() -> Result<()> {
    match Args::parse().what {
        What::Halves => halves(),
        What::Shards { threads } => shards(threads),
        What::Together { peers, threads } => together(peers, threads),
        What::Fixed { frames } => fixed(frames),
    }
}

fn together(peers: usize, threads: usize) -> Result<()> {
    let mut ratios = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        let (one, all) = (hub_rates(peers, 1)?, hub_rates(peers, threads)?);
        for (way, name) in ["sealing", "opening"].into_iter().enumerate() {
            let (one, all) = (one[way], all[way]);
            println!(
                "{name}: alone {one:.2} Gbit/s, {threads} threads {all:.2} Gbit/s, {:.2} times",
                all / one
            );
            ratios[way].push(all / one);
        }
    }
    for (ratios, name) in ratios.iter_mut().zip(["sealing", "opening"]) {
        ratios.sort_by(f64::total_cmp);
        println!("{name}, median: {:.2} times", ratios[ratios.len() / 2]);
    }
    Ok(())
}

/// Payload that a hub seals, and that it opens, with this many peers and threads.
fn hub_rates(peers: usize, threads: usize) -> Result<[f64; 2]> {
    let mut hub = Hub::connect(peers, threads)?;
    let (mut sealing, mut opening, mut sealed, mut opened) = (Duration::ZERO, Duration::ZERO, 0, 0);
    while sealing + opening < SPAN {
        for _ in 0..TICK / peers {
            hub.prepare();
            let began = Instant::now();
            opened += hub.open();
            opening += began.elapsed();
            let began = Instant::now();
            hub.seal();
            sealing += began.elapsed();
            sealed += peers * SEGMENTS * SEGMENT;
        }
        hub.tick();
    }
    let gbits = |bytes: usize, time: Duration| bytes as f64 * 8.0 / time.as_nanos() as f64;
    Ok([gbits(sealed, sealing), gbits(opened, opening)])
}

fn halves() -> Result<()> {
    let mut tunnel = Tunnel::connect(1)?;
    let (mut seal, mut open) = (f64::MAX, f64::MAX);
    for _ in 0..40 {
        let (mut sealing, mut opening) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..100 {
            let began = Instant::now();
            tunnel.seal();
            let between = Instant::now();
            tunnel.open();
            sealing += between - began;
            opening += between.elapsed();
        }
        let per_packet = |time: Duration| time.as_nanos() as f64 / (100 * SEGMENTS) as f64;
        seal = seal.min(per_packet(sealing));
        open = open.min(per_packet(opening));
        tunnel.tick();
    }
    let gbits = |ns: f64| SEGMENT as f64 * 8.0 / ns;
    println!("judge, cut and seal  {seal:>5.0} ns per packet ({:.1} Gbit/s of payload)", gbits(seal));
    println!("open, join and judge {open:>5.0} ns per packet ({:.1} Gbit/s of payload)", gbits(open));
    Ok(())
}

fn shards(threads: usize) -> Result<()> {
    let mut ratios = Vec::new();
    for _ in 0..5 {
        let (one, all) = (rate(1)?, rate(threads)?);
        println!("1 shard: {one:.2} Gbit/s, {threads} shards: {all:.2} Gbit/s, {:.2} times", all / one);
        ratios.push(all / one);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median: {:.2} times", ratios[ratios.len() / 2]);
    Ok(())
}

/// Payload through this many tunnels, each a shard with its own peers on its own thread, both ends in it.
fn rate(threads: usize) -> Result<f64> {
    let barrier = Barrier::new(threads);
    let bytes = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|n| {
                let barrier = &barrier;
                scope.spawn(move || -> Result<usize> {
                    let mut tunnel = Tunnel::connect(n as u64)?;
                    barrier.wait();
                    let began = Instant::now();
                    let (mut bytes, mut frames) = (0, 0);
                    while began.elapsed() < SPAN {
                        bytes += tunnel.transfer();
                        frames += 1;
                        if frames % TICK == 0 {
                            tunnel.tick();
                        }
                    }
                    Ok(bytes)
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .sum::<Result<usize>>()
    })?;
    Ok(bytes as f64 * 8.0 / SPAN.as_nanos() as f64)
}

fn fixed(frames: usize) -> Result<()> {
    let mut tunnel = Tunnel::connect(1)?;
    let bytes: usize = (0..frames).map(|_| tunnel.transfer()).sum();
    ensure!(bytes == frames * SEGMENTS * SEGMENT, "{bytes} bytes passed");
    Ok(())
}
