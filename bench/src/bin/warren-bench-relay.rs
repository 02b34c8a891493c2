//! Our relay against coturn on one machine: packets per second and CPU for each, memory for idle clients. Servers run on
//! core 0, the load on another (`taskset -c 1`), over loopback. `cargo xtask bench relay` writes what this prints into
//! `docs/performance.md`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum as _};
use tokio::runtime::Runtime;
use warren_bench::relay::alone::Alone;
use warren_bench::relay::device::Transport;
use warren_bench::relay::hostile::Attack;
use warren_bench::relay::idle::{self, Kind};
use warren_bench::relay::latency::{Latencies, Over};
use warren_bench::relay::load::{ConnectionWay, Counted, TurnWay, UdpWay, Way, quic_ends, runtime};
use warren_bench::relay::server::{LOAD_CORE, RelayAt, Server, allow_files, serve};
use warren_bench::relay::storm::storm;

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
    /// How soon so many devices are in that come at once, over QUIC and over WebSockets.
    Storm {
        /// Devices.
        devices: u32,
    },
    /// Latency of a well-behaved pair beside each kind of bad client.
    Hostile {
        /// Seconds of each measurement: at most 20.
        seconds: u64,
        /// Repeats, interleaved.
        #[arg(long, default_value_t = 3)]
        repeats: usize,
        /// What the pair's packets go over.
        #[arg(long, value_enum, default_value = "plain")]
        over: Over,
        /// Megabits per second of each bad client's own link; 0: as many as its core can make.
        #[arg(long, default_value_t = 1_000)]
        link: u64,
        /// Relay and bad clients go before everything else on the machine as well, by SCHED_FIFO: for one that is busy.
        #[arg(long)]
        realtime: bool,
        /// Only these bad clients, beside `none`.
        #[arg(long, value_enum)]
        only: Vec<Attack>,
    },
    /// One kind of bad client, until killed.
    Attack {
        /// The relay, as `serve` prints it.
        relay: RelayAt,
        /// What it does.
        attack: Attack,
        /// Megabits per second of its link; 0: as many as its core can make.
        link: u64,
    },
    /// Latencies in microseconds, until so many seconds have passed: 50th, 99th percentile, and the per cent lost.
    Latency {
        /// The relay, as `serve` prints it.
        relay: RelayAt,
        /// What the packets go over.
        over: Over,
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
        What::Storm { devices } => storms(devices),
        What::Hostile { seconds, repeats, over, link, realtime, only } => {
            let attacks = Attack::value_variants().iter().copied();
            let attacks: Vec<Attack> = attacks
                .filter(|attack| *attack == Attack::None || only.is_empty() || only.contains(attack))
                .collect();
            hostile(repeats.max(1), &attacks, Conditions { seconds, over, link, realtime })
        }
        What::Attack { relay, attack, link } => {
            attack.run(relay, &runtime()?, (link > 0).then_some(link * 1_000_000))
        }
        What::Latency { relay, over, seconds } => latency(relay, over, seconds),
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
    let (warren, relay) = Server::warren(false, &[])?;
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
    allow_files(clients)?;
    println!("| idle clients | over | resident before, MiB | with them, MiB | KiB each |");
    println!("|---|---|---|---|---|");
    let connections = [Transport::Quic, Transport::WebSocket].map(Kind::Connection);
    for kind in [Kind::Resting, Kind::PlainUdp].into_iter().chain(connections) {
        // Each has a runtime of its own: with it go the clients' sockets.
        let runtime = runtime()?;
        let (mut server, relay) = Server::warren(false, &[])?;
        let before = server.memory()?;
        let held = match runtime.block_on(idle::hold(relay, kind, clients)) {
            Ok(held) => held,
            Err(error) => {
                let counted = server.stats().unwrap_or_else(|error| error.to_string());
                return Err(error).with_context(|| format!("{}; the relay counts {counted}", kind.name()));
            }
        };
        idle_row(kind.name(), &held, before, server.memory()?);
    }
    let (server, turn) = Server::coturn()?;
    let before = server.memory()?;
    let held = idle::allocations(turn, clients).context("coturn's allocations")?;
    idle_row("coturn: an allocation", &held, before, server.memory()?);
    Ok(())
}

fn idle_row(name: &str, held: &idle::Held, before: u64, with: u64) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let each = with.saturating_sub(before) as f64 / 1024.0 / f64::from(held.count);
    println!("| {} | {name} | {:.1} | {:.1} | {each:.1} |", held.count, mib(before), mib(with));
}

fn storms(devices: u32) -> Result<()> {
    allow_files(devices)?;
    let runtime = runtime()?;
    println!(
        "| devices at once, over | half are in after, s | 99 % | all | attempts that failed |\n|---|---|---|---|---|"
    );
    for transport in [Transport::Quic, Transport::WebSocket] {
        let (mut server, relay) = Server::warren(true, &[])?;
        let storm = runtime.block_on(storm(relay, transport, devices))?;
        let at = |percent: usize| {
            let last = storm.took.len().saturating_sub(1);
            storm
                .took
                .get((storm.took.len() * percent / 100).min(last))
                .map_or(f64::NAN, Duration::as_secs_f64)
        };
        println!(
            "| {devices}, {transport:?} | {:.2} | {:.2} | {:.2} | {:?} |",
            at(50),
            at(99),
            at(100),
            storm.failed
        );
        eprintln!("{transport:?}: {}", server.stats()?);
    }
    Ok(())
}

/// From the start of an attack until the measurement.
const ATTACK_AHEAD: Duration = Duration::from_secs(1);
/// How far an attack may move a percentile: the goal.
const GOAL: f64 = 1.2;

fn latency(relay: RelayAt, over: Over, seconds: u64) -> Result<()> {
    let measured = Latencies::measure(relay, &runtime()?, over, Duration::from_secs(seconds))?;
    println!("{} {} {}", measured.percentile(50), measured.percentile(99), measured.lost());
    Ok(())
}

/// A program of our own beside others of the load, before them (`chrt`) or after them (`nice`).
fn own(first: &[&str]) -> Result<Command> {
    let mut command = Command::new("taskset");
    command.args(["-c", LOAD_CORE]).args(first).arg(std::env::current_exe()?);
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

/// 50th and 99th percentile, per cent lost, and the part of its core that the relay used.
type Beside = [f64; 4];

#[derive(Clone, Copy, Debug)]
struct Conditions {
    seconds: u64,
    over: Over,
    link: u64,
    realtime: bool,
}

fn hostile(repeats: usize, attacks: &[Attack], conditions: Conditions) -> Result<()> {
    let Conditions { seconds, over, link, realtime } = conditions;
    let mut all: Vec<Vec<Beside>> = vec![Vec::new(); attacks.len()];
    let alone = Alone::on_core()?;
    for _ in 0..repeats {
        for (attack, results) in attacks.iter().zip(&mut all) {
            results.push(beside(*attack, conditions)?);
        }
    }
    drop(alone);
    let link = if link == 0 { "as much as it can make".to_owned() } else { format!("{link} Mbit/s") };
    println!(
        "A pair over {}, {repeats} interleaved repeats of {seconds} s: medians with least and most, and the medians of each repeat's ratio \
         to `nobody`. The relay has core 0 for itself; the pair and the bad client share core 1 with the rest of the machine, where the pair \
         goes first (SCHED_FIFO). {} \
         The bad client's own link carries {link}.{} Goal: at most {GOAL}.\n",
        over.name(),
        if over == Over::Plain {
            "A packet has arrived when the kernel has it for the receiver."
        } else {
            "A packet has arrived when the receiver has it."
        },
        if realtime { " Relay and bad client go before everything else on the machine, too." } else { "" }
    );
    println!(
        "| beside | p50, µs | to nobody | p99, µs | to nobody | lost, % | relay's core, % |\n|---|---|---|---|---|---|---|"
    );
    for (attack, results) in attacks.iter().zip(&all) {
        let of = |at: usize, digits| spread(results.iter().map(|beside| beside[at]).collect(), digits);
        let ratio = |at: usize| {
            let ratios = results.iter().zip(&all[0]).map(|(beside, nobody)| beside[at] / nobody[at]);
            spread(ratios.collect(), 2)
        };
        println!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            attack.name(),
            of(0, 0),
            ratio(0),
            of(1, 0),
            ratio(1),
            of(2, 2),
            of(3, 0)
        );
    }
    Ok(())
}

fn beside(attack: Attack, conditions: Conditions) -> Result<Beside> {
    let Conditions { seconds, over, link, realtime } = conditions;
    let word = |value: Option<clap::builder::PossibleValue>| {
        Ok::<_, anyhow::Error>(value.context("a word")?.get_name().to_owned())
    };
    let (server_first, attacker_first): (&[&str], &[&str]) =
        if realtime { (&["chrt", "-f", "8"], &["chrt", "-f", "1"]) } else { (&[], &["nice", "-n", "10"]) };
    let (mut server, relay) = Server::warren(true, server_first)?;
    let at = relay.to_string();
    let attacker = own(attacker_first)?
        .args(["attack", &at, &word(attack.to_possible_value())?, &link.to_string()])
        .spawn()
        .context("starting an attack")?;
    let mut attacker = Killed(attacker);
    std::thread::sleep(ATTACK_AHEAD);
    let (began, cpu) = (now(), server.cpu()?);
    let measured = own(&["chrt", "-f", "10"])?
        .args(["latency", &at, &word(over.to_possible_value())?, &seconds.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    let used = (server.cpu()? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    let counted = server.stats()?;
    ensure!(measured.status.success(), "no pair beside {}; the relay counts {counted}", attack.name());
    ensure!(attacker.0.try_wait()?.is_none(), "the attack ({}) ended", attack.name());
    eprintln!("{}: {counted}", attack.name());
    let text = String::from_utf8(measured.stdout)?;
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let &[p50, p99, lost] = numbers.as_slice() else { bail!("three numbers") };
    Ok([p50, p99, lost, 100.0 * used])
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
