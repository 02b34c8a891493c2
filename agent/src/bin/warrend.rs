//! `warrend`: the agent's daemon.

use std::io::{self, IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use warren_agent::api::DEFAULT_SOCKET;
use warren_agent::daemon::{self, DEFAULT_TUN, Options};
use warren_agent::egress::Egress;
use warren_agent::os::{MARK, Offloads};
use warren_agent::peer_relay::PeerRelayOptions;
use warren_agent::problem::Problem;

/// The agent of this device: holds its keys, its tunnels and its filter. Runs in the foreground; SIGTERM stops it and
/// puts the host back as it was. RUST_LOG sets what it logs (default: info).
///
/// Example: warrend --state-dir /var/lib/warren --socket /run/warren/warren.sock
#[derive(Debug, Parser)]
#[command(name = "warrend", version)]
struct Args {
    /// Where keys and the last netmap are kept (made with mode 0700).
    #[arg(long, value_name = "DIR", default_value = "/var/lib/warren")]
    state_dir: PathBuf,
    /// Where `warren` finds the daemon.
    #[arg(long, value_name = "PATH", env = "WARREN_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Name of the TUN device.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_TUN)]
    tun: String,
    /// UDP port of tunnels; by default the last one, at first a free one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    listen_port: Option<u16>,
    /// User (name or number) that may run `warren up`, `down` and `logout` beside root.
    #[arg(long, value_name = "USER")]
    operator: Option<String>,
    /// Do without some of the kernel's help for many packets at a time, if it is broken here: tun, tun-udp, udp-send,
    /// udp-receive, all.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    without_offload: Vec<String>,
    /// Don't ask the router to forward a port (PCP, NAT-PMP, UPnP).
    #[arg(long)]
    no_port_mapping: bool,
    /// Where others reach this host's UDP port, if a router forwards it by hand: peers are told. Repeatable, up to eight times.
    #[arg(long, value_name = "ADDR:PORT", env = "WARREN_ENDPOINT", value_delimiter = ',')]
    endpoint: Vec<SocketAddr>,
    /// HTTP proxy for the coordinator and, where UDP does not pass, for relays: `http://[user:password@]host:port`, or `none`.
    /// By default HTTPS_PROXY of the environment, where a password does not show in the list of processes; NO_PROXY lists
    /// exceptions either way.
    #[arg(long, value_name = "URL")]
    proxy: Option<String>,
    /// Certificate authorities (PEM) that may vouch for an https coordinator, beside the system's.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Relay for other devices at this port (UDP and TCP), for those whom the policy lets (a grant of `warren/cap/relay` to this
    /// device). 0: never.
    #[arg(long, value_name = "N", default_value_t = 0)]
    relay_port: u16,
    /// Where others reach that port, if that is another address (a router that forwards it). Repeatable.
    #[arg(long, value_name = "ADDR:PORT")]
    relay_advertise: Vec<SocketAddr>,
    /// What one device may send through this one in the long run, in Mbit/s.
    #[arg(long, value_name = "MBIT", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    relay_rate: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            // A closed stderr leaves nobody to tell.
            let _ = writeln!(io::stderr(), "warrend: {problem}");
            ExitCode::from(problem.exit)
        }
    }
}

fn start(args: Args) -> Result<(), Problem> {
    let operator = args.operator.as_deref().map(user_id).transpose()?;
    let offloads = Offloads::without(args.without_offload.iter().map(String::as_str)).map_err(|name| {
        Problem::usage(
            "unknown-offload",
            format!("there is no offload `{name}`"),
            "name some of tun, tun-udp, udp-send, udp-receive, or all",
        )
    })?;
    let egress = Egress::from_settings(MARK, args.proxy.as_deref(), args.ca.as_deref(), |name| {
        std::env::var(name).ok()
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| {
        Problem::new(
            "runtime",
            format!("the daemon can't start: {e}"),
            "raise the limit of open files (ulimit -n)",
        )
    })?;
    runtime.block_on(daemon::run(Options {
        state_dir: args.state_dir,
        socket: args.socket,
        tun: args.tun,
        listen_port: args.listen_port,
        operator,
        offloads,
        port_mapping: !args.no_port_mapping,
        endpoints: args.endpoint,
        egress: Arc::new(egress),
        relay: (args.relay_port != 0).then_some(PeerRelayOptions {
            port: args.relay_port,
            advertise: args.relay_advertise,
            rate: args.relay_rate * 1_000_000 / 8,
        }),
    }))
}

/// The id of a user of this host.
fn user_id(user: &str) -> Result<u32, Problem> {
    if let Ok(id) = user.parse() {
        return Ok(id);
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(user)).then(|| fields.nth(1)?.parse().ok()).flatten()
        })
        .next()
        .ok_or_else(|| {
            Problem::usage(
                "unknown-user",
                format!("there is no user `{user}` in /etc/passwd"),
                "give --operator a user of this host, or a user id",
            )
        })
}
