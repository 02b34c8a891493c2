//! Our relay against coturn on one machine: packets per second and CPU for each, memory for idle clients. Servers run on
//! core 0, the load on another (`taskset -c 1`), over loopback. `cargo xtask bench relay` writes what this prints into
//! `docs/performance.md`.

#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum as _};
use tokio::runtime::Runtime;
use warren_bench::relay::device::Transport;
use warren_bench::relay::hostile::{Attack, latencies};
use warren_bench::relay::idle::{self, Kind};
use warren_bench::relay::load::{ConnectionWay, Counted, TurnWay, UdpWay, Way, quic_ends, runtime};
use warren_bench::relay::server::{RelayAt, Server, serve};

/// Sealed packets: a full one, and one that holds next to nothing.
const SIZES: [usize; 2] = [1_300, 96];
/// Packets in one call where there are many: what fits one IP packet of full ones.
const MANY: usize = 44;
/// Time of one measurement.
const SPAN: Duration = Duration::from_secs(1);
/// Packets per second of one column: far from what anything here can't do. The other has as many as the load can send.
const EASY: f64 = 10_000.0;

/// Example: taskset -c 1 warren-bench-relay packets 3
#[derive(Debug, Parser)]
#[command(name = "warren-bench-relay")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Our relay, for the others; its state is made in this directory.
    Serve {
        /// The directory.
        state: PathBuf,
        /// As the product limits each device.
        #[arg(long)]
        limited: bool,
    },
    /// Packets per second and CPU for each, as often as this, interleaved.
    Packets {
        /// Repeats.
        repeats: usize,
    },
    /// Memory for each idle client.
    Idle {
        /// Clients.
        clients: u32,
    },
    /// Latency of a well-behaved pair beside each kind of bad client, in seconds for each.
    Hostile {
        /// Seconds.
        seconds: u64,
    },
    /// One kind of bad client, until killed.
    Attack {
        /// The relay, as `serve` prints it.
        relay: RelayAt,
        /// What it does.
        attack: Attack,
    },
    /// Latencies in microseconds, until so many seconds have passed: 50th, 99th percentile, and the per cent lost.
    Latency {
        /// The relay, as `serve` prints it.
        relay: RelayAt,
        /// Seconds.
        seconds: u64,
    },
}

fn main() -> Result<()> {
    match Args::parse().what {
        // As the product: as many threads as there are cores.
        What::Serve { state, limited } => Runtime::new()?.block_on(serve(state, limited)),
        What::Packets { repeats } => packets(repeats.max(1)),
        What::Idle { clients } => idle_clients(clients),
        What::Hostile { seconds } => hostile(seconds),
        What::Attack { relay, attack } => attack.run(relay, &runtime()?),
        What::Latency { relay, seconds } => latency(relay, seconds),
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Candidate {
    Udp { batch: usize },
    Connection(Transport),
    Turn { batch: usize },
}

const CANDIDATES: [(&str, Candidate); 6] = [
    ("plain UDP", Candidate::Udp { batch: 1 }),
    ("plain UDP, batches", Candidate::Udp { batch: MANY }),
    ("QUIC datagrams", Candidate::Connection(Transport::Quic)),
    ("WebSocket", Candidate::Connection(Transport::WebSocket)),
    ("coturn, channel", Candidate::Turn { batch: 1 }),
    ("coturn, channel, batches", Candidate::Turn { batch: MANY }),
];

/// Microseconds of CPU for each packet at an easy rate and at full load, and packets per second that arrive then.
type Numbers = [f64; 3];

fn packets(repeats: usize) -> Result<()> {
    let (warren, relay) = Server::warren(false)?;
    let (coturn, turn) = Server::coturn()?;
    let (runtime, mut all) = (runtime()?, Vec::new());
    for _ in 0..repeats {
        for size in SIZES {
            for (_, candidate) in CANDIDATES {
                let server = if matches!(candidate, Candidate::Turn { .. }) { &coturn } else { &warren };
                let ends = quic_ends(&runtime)?;
                let mut way: Box<dyn Way> = match candidate {
                    Candidate::Udp { batch } => Box::new(UdpWay::new(relay, &runtime, &ends, size, batch)?),
                    Candidate::Connection(transport) => {
                        Box::new(ConnectionWay::new(relay, &runtime, &ends, transport, size)?)
                    }
                    Candidate::Turn { batch } => Box::new(TurnWay::new(turn, size, batch)?),
                };
                let (_, easy) = measure(server, way.as_mut(), EASY)?;
                let (counted, full) = measure(server, way.as_mut(), f64::INFINITY)?;
                all.push([easy, full, counted.rate()]);
            }
        }
    }
    println!(
        "Medians of {repeats} interleaved repeats, with least and most. CPU is all that the relay's process takes for each packet that \
         arrives, the kernel's work for it included; a core's worth is what that leaves room for in a second. What arrived at full \
         load is bounded by the load's own core and by what else the machine does. Batches: the sender gives the kernel {MANY} \
         packets at a time (`UDP_SEGMENT`).\n"
    );
    println!(
        "| sealed packet | over | CPU at {EASY:.0}/s, µs | CPU at full load, µs | a core's worth, packets/s | arrived, packets/s |"
    );
    println!("|---|---|---|---|---|---|");
    for (s, size) in SIZES.iter().enumerate() {
        for (c, (name, _)) in CANDIDATES.iter().enumerate() {
            let of = |what: fn(&Numbers) -> f64, digits: usize| {
                let turns = all.iter().skip(s * CANDIDATES.len() + c).step_by(SIZES.len() * CANDIDATES.len());
                spread(turns.map(what).collect(), digits)
            };
            println!(
                "| {size} B | {name} | {} | {} | {} | {} |",
                of(|n| n[0], 2),
                of(|n| n[1], 2),
                of(|n| 1e6 / n[1], 0),
                of(|n| n[2], 0)
            );
        }
    }
    Ok(())
}

fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    format!("{:.digits$} ({least:.digits$}–{most:.digits$})", values[values.len() / 2])
}

/// What arrives at a rate, and microseconds of CPU for each of it.
fn measure(server: &Server, way: &mut dyn Way, rate: f64) -> Result<(Counted, f64)> {
    let before = server.cpu()?;
    let counted = way.run(rate, SPAN)?;
    let used = server.cpu()? - before;
    Ok((counted, used.as_secs_f64() * 1e6 / counted.arrived.max(1) as f64))
}

fn idle_clients(clients: u32) -> Result<()> {
    let runtime = runtime()?;
    println!("| idle clients | of our relay over | resident before, MiB | with them, MiB | KiB each |");
    println!("|---|---|---|---|---|");
    let connections = [Transport::Quic, Transport::WebSocket].map(Kind::Connection);
    for kind in [Kind::Resting, Kind::PlainUdp].into_iter().chain(connections) {
        let (server, relay) = Server::warren(false)?;
        idle_row(kind.name(), clients, &server, |clients| ours(&runtime, relay, kind, clients))?;
    }
    let (server, turn) = Server::coturn()?;
    idle_row("coturn: an allocation", clients, &server, |clients| idle::allocations(turn, clients))
}

fn ours(runtime: &Runtime, relay: RelayAt, kind: Kind, clients: u32) -> Result<idle::Held> {
    runtime.block_on(idle::hold(relay, kind, clients))
}

fn idle_row(
    name: &str,
    clients: u32,
    server: &Server,
    hold: impl FnOnce(u32) -> Result<idle::Held>,
) -> Result<()> {
    let before = server.memory()?;
    let held = hold(clients).context("holding clients")?;
    let with = server.memory()?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let each = with.saturating_sub(before) as f64 / 1024.0 / f64::from(held.count);
    println!("| {} | {name} | {:.1} | {:.1} | {each:.1} |", held.count, mib(before), mib(with));
    Ok(())
}

/// Packets per second of the pair whose latency is measured.
const CALM: u32 = 500;
/// From the start of an attack until the measurement.
const ATTACK_AHEAD: Duration = Duration::from_secs(1);

fn latency(relay: RelayAt, seconds: u64) -> Result<()> {
    let (took, sent) = latencies(relay, &runtime()?, CALM, Duration::from_secs(seconds))?;
    let at = |part: usize| took.get(took.len() * part / 100).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6);
    println!("{} {} {}", at(50), at(99), 100.0 * (1.0 - took.len() as f64 / sent as f64));
    Ok(())
}

/// A program of our own that must not be held up by the others on its core, where the system allows that.
fn own(first: &str, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(first);
    command.args(words).arg(std::env::current_exe()?);
    Ok(command)
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hostile(seconds: u64) -> Result<()> {
    println!("| beside | p50, µs | p99, µs | lost, % |\n|---|---|---|---|");
    for attack in Attack::value_variants() {
        let (_server, relay) = Server::warren(true)?;
        let word = attack.to_possible_value().context("a word")?;
        let attacker = own("nice", &["-n", "10"])?
            .args(["attack", &relay.to_string(), word.get_name()])
            .spawn()
            .context("starting an attack")?;
        let mut attacker = Killed(attacker);
        std::thread::sleep(ATTACK_AHEAD);
        let measured = own("chrt", &["-f", "10"])?
            .args(["latency", &relay.to_string(), &seconds.to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(measured.status.success(), "the pair did not get through beside {}", attack.name());
        ensure!(attacker.0.try_wait()?.is_none(), "the attack ({}) ended", attack.name());
        let text = String::from_utf8(measured.stdout)?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let &[p50, p99, lost] = numbers.as_slice() else { bail!("three numbers") };
        println!("| {} | {p50:.0} | {p99:.0} | {lost:.2} |", attack.name());
    }
    Ok(())
}
