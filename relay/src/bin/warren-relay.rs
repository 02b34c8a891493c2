//! `warren-relay`: a relay of its own. The coordinator embeds the same library.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use warren_common::url::CoordinatorUrl;
use warren_common::wire::relay_control::RelayJoinKey;
use warren_relay::core::Limits;
use warren_relay::join::{JoinConfig, JoinError, StateError, run};
use warren_relay::observe::{self, Observed};

/// Carries sealed packets between devices that can't reach each other directly.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Join a coordinator and serve until told to stop.
    #[command(after_help = "Examples:
  warren-coordinator relay create fra
  warren-relay serve --listen 0.0.0.0:443 --stun-listen 0.0.0.0:3478 --advertise 203.0.113.7:443 \\
      --coordinator https://warren.example --join-key wrelay-… --state-dir /var/lib/warren-relay")]
    Serve(Serve),
}

#[derive(clap::Args)]
struct Serve {
    /// Where to listen: QUIC on UDP and TLS on TCP.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Where to answer STUN (UDP).
    #[arg(long, value_name = "ADDR:PORT")]
    stun_listen: Option<SocketAddr>,
    /// A second address of this host for STUN, with another port: lets devices find out how their NAT behaves (RFC 5780).
    #[arg(long, value_name = "ADDR:PORT", requires = "stun_listen")]
    stun_second: Option<SocketAddr>,
    /// Where devices reach it, if that is another address (behind a NAT, or listening on all addresses). Repeatable.
    #[arg(long, value_name = "ADDR:PORT")]
    advertise: Vec<SocketAddr>,
    /// Where devices reach its STUN service, if that is another address. Repeatable.
    #[arg(long, value_name = "ADDR:PORT")]
    advertise_stun: Vec<SocketAddr>,
    /// The coordinator's URL.
    #[arg(long, value_name = "URL")]
    coordinator: CoordinatorUrl,
    /// The key that `warren-coordinator relay create` printed; not needed any more once joined.
    #[arg(long, value_name = "KEY", env = "WARREN_RELAY_JOIN_KEY", hide_env_values = true)]
    join_key: Option<String>,
    /// Where identity and certificate are kept.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// What one device may send in the long run, in Mbit/s.
    #[arg(long, value_name = "MBIT", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    device_rate: u64,
    /// Where to answer HTTP for `/metrics` and `/healthz`; nobody but the operator should reach it.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics_listen: Option<SocketAddr>,
    /// How long devices may take to go to another relay when this one is stopped, in seconds. It serves on meanwhile.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=300))]
    drain_time: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let Command::Serve(serve) = cli.command;
    // Not clap's to parse: it would show what it could not understand.
    let join_key = match serve.join_key.as_deref().map(str::parse::<RelayJoinKey>).transpose() {
        Ok(key) => key,
        Err(error) => {
            tracing::error!("--join-key: {error}");
            return ExitCode::from(2);
        }
    };
    match block_on(serve, join_key) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let usage = matches!(
                error.downcast_ref(),
                Some(JoinError::State(
                    StateError::NoJoinKey | StateError::OtherRelay { .. } | StateError::Corrupt { .. }
                ))
            );
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

#[tokio::main]
async fn block_on(serve: Serve, join_key: Option<RelayJoinKey>) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let signals = async {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        stop.cancel();
        // Who asks twice does not want to wait.
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    let rate = serve.device_rate * 1_000_000 / 8;
    let config = JoinConfig {
        coordinator: serve.coordinator,
        join_key,
        state_dir: serve.state_dir,
        listen: serve.listen,
        stun_listen: serve.stun_listen,
        stun_second: serve.stun_second,
        advertise: serve.advertise,
        advertise_stun: serve.advertise_stun,
        drain: Duration::from_secs(serve.drain_time),
        limits: Limits { rate, ..Limits::default() },
    };
    let observed = Observed::default();
    let metrics = match serve.metrics_listen {
        Some(addr) => Some(
            observe::serve(addr, observed.clone())
                .await
                .with_context(|| format!("--metrics-listen {addr}: can't listen there"))?,
        ),
        None => None,
    };
    let metrics = async {
        match metrics {
            Some(serving) => serving.await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = run(config, stop.clone(), observed) => Ok(ended?),
        () = signals => Ok(()),
        ended = metrics => Ok(ended?),
    }
}
