//! The candidate of `peers.sh` and `cargo xtask bench`: the product's engine, TUN and sockets with one static peer and a
//! policy file. What a coordinator would carry (the peers' sealed candidate addresses) goes through a datagram
//! socket in a directory that both sides share.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Parser;
use rand_core::RngCore as _;
use tokio::net::UnixDatagram;
use tracing_subscriber::EnvFilter;
use warren_agent::clock::{self, BootTimer, MAX_SLEEP};
use warren_agent::dataplane::{DataPlane, NoRelays, Ready};
use warren_agent::entropy::OsEntropy;
use warren_agent::os::tun::Tun;
use warren_agent::os::{Offloads, udp};
use warren_bench::pair::{Group, POLICY, Role, device_id};
use warren_engine::event::Event;
use warren_engine::io::{LocalSocket, Source};

/// Longest message through the directory: sealed candidate addresses.
const MAX_SIGNAL: usize = 4_096;

/// One end of a measured tunnel, in the foreground. Makes the TUN and leaves its address, MTU and state to others.
///
/// Example: warren-bench-node --role a --tun w0 --addr 10.99.0.1 --peer-addr 10.99.0.2 --listen 10.77.0.1:52000 --state /tmp/pair
#[derive(Debug, Parser)]
#[command(name = "warren-bench-node")]
struct Args {
    /// Which end this is.
    #[arg(long, value_enum)]
    role: Role,
    /// Name of the TUN device.
    #[arg(long)]
    tun: String,
    /// Our overlay address, in 10.99.0.0/16 or fd00:99::/48.
    #[arg(long)]
    addr: IpAddr,
    /// The other end's overlay address.
    #[arg(long)]
    peer_addr: IpAddr,
    /// Our address and UDP port on the underlay.
    #[arg(long)]
    listen: SocketAddr,
    /// The TUN's MTU.
    #[arg(long, default_value_t = 1_420)]
    mtu: u16,
    /// A directory that only both ends can use.
    #[arg(long)]
    state: PathBuf,
    /// A policy file instead of the built-in one, which lets everything pass by one grant.
    #[arg(long)]
    policy: Option<PathBuf>,
    /// As of `warrend`.
    #[arg(long, value_delimiter = ',')]
    without_offload: Vec<String>,
}

fn main() -> Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(args))
}

async fn run(args: Args) -> Result<()> {
    let policy =
        args.policy.as_deref().map(std::fs::read_to_string).transpose().context("the policy file")?;
    let addrs = match args.role {
        Role::A => vec![vec![args.addr], vec![args.peer_addr]],
        Role::B => vec![vec![args.peer_addr], vec![args.addr]],
    };
    let pair = Group::new([5; 32], addrs, policy.as_deref().unwrap_or(POLICY), args.mtu)?;
    let mut seed = [0; 32];
    OsEntropy.fill_bytes(&mut seed);
    let mut engine = pair.engine(args.role.index(), clock::now(), seed)?;

    let offloads = Offloads::without(args.without_offload.iter().map(String::as_str))
        .map_err(|name| anyhow::anyhow!("there is no offload {name}"))?;
    let (own, other) = (socket_of(&args.state, args.role), socket_of(&args.state, args.role.other()));
    // A socket that an earlier run left.
    let _ = std::fs::remove_file(&own);
    let signals = UnixDatagram::bind(&own).context("the shared directory")?;
    let sockets = udp::bind(Some(args.listen.port()), None, offloads)?;
    let id = sockets.iter().find(|s| s.bound().is_ipv4() == args.listen.is_ipv4()).context("no socket")?.id();
    engine.handle_interfaces(clock::now(), &[LocalSocket { id, addr: args.listen }]);
    let tun = Tun::open(&args.tun, offloads)?;
    let mut plane = DataPlane::new(sockets);
    plane.attach(&tun);
    tracing::info!(offloads = ?plane.offloads(Some(&tun)), "ready");
    let mut timer = BootTimer::new()?;
    let mut buffer = [0; MAX_SIGNAL];
    loop {
        let now = clock::now();
        plane.drain(now, &mut engine, Some(&tun), &mut NoRelays);
        while let Some(event) = engine.poll_event() {
            match event {
                // The other end may not have started yet; what it misses is said again.
                Event::Signal { sealed, .. } => drop(signals.try_send_to(&sealed, &other)),
                other => tracing::debug!(?other, "event"),
            }
        }
        let deadline = engine.poll_timeout(now).map_or(now.boot + MAX_SLEEP, |(at, _)| at);
        if deadline <= now.boot {
            engine.handle_timeout(now);
            continue;
        }
        timer.set(deadline)?;
        if plane.has_more() {
            tokio::task::yield_now().await; // as the daemon does
        }
        // In the daemon's order.
        let packets_first = !plane.has_more();
        let ready = tokio::select! {
            biased;
            ready = plane.ready(Some(&tun)), if packets_first => ready,
            () = timer.fired() => {
                engine.handle_timeout(clock::now());
                continue;
            }
            received = signals.recv(&mut buffer) => {
                let len = received?;
                let from = Source::Signal { device: device_id(args.role.other().index()) };
                plane.from_elsewhere(clock::now(), from, &mut buffer[..len], &mut engine, Some(&tun));
                continue;
            }
            ready = plane.ready(Some(&tun)), if !packets_first => ready,
        };
        let now = clock::now();
        match ready {
            Ready::Tun => plane.from_tun(now, &tun, &mut engine, &mut NoRelays)?,
            Ready::Udp(index) => plane.from_udp(now, index, Some(&mut engine), Some(&tun), &mut NoRelays),
        }
    }
}

fn socket_of(dir: &Path, role: Role) -> PathBuf {
    dir.join(format!("signal-{}.sock", role.name()))
}
