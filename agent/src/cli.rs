//! The verbs of `warren` that talk to the daemon: arguments, exit codes, and what people read.

mod client;
mod render;
mod report;

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use warren_common::filter::{PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP};
use warren_common::ids::NetworkId;

use crate::api::{self, DEFAULT_SOCKET, Pong, Request, Verb, round_ms};
use crate::problem::Problem;

/// Time between two pings.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two pings that wait for a direct path.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Most pings of one command.
const MAX_PINGS: u32 = 1_000_000;

/// Turns an answer into what people read.
type Render = fn(&Value) -> Result<String, Problem>;

/// Options of every verb that talks to the daemon.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// Where the daemon listens.
    #[arg(long, global = true, value_name = "PATH", env = "WARREN_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The network meant, if there are several.
    #[arg(long, global = true, value_name = "ID")]
    network: Option<NetworkId>,
}

/// Verbs that talk to the daemon.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Connect this device; the first time, enrol it.
    ///
    /// Example: `warren up --coordinator https://warren.example --auth-key-file /etc/warren/key`
    Up(UpArgs),
    /// Disconnect and put the host back as it was. The device stays enrolled.
    ///
    /// Example: warren down
    Down(JsonArg),
    /// Leave the network and forget this device's keys.
    ///
    /// Example: warren logout
    Logout(JsonArg),
    /// Show this device, its peers, and what is not as it should be.
    ///
    /// Example: warren status --json
    Status(JsonArg),
    /// Measure the round trip to a peer, and show the way packets take.
    ///
    /// Example: warren ping -c 3 db1
    Ping(PingArgs),
    /// Show what the network around this host lets through.
    ///
    /// Example: warren netcheck
    Netcheck(JsonArg),
    /// Show whose overlay address it is.
    ///
    /// Example: warren whois 100.64.0.7
    Whois(WhoisArgs),
    /// Say whether a connection from here would be allowed, and why.
    ///
    /// Example: warren why db1:5432
    Why(WhyArgs),
    /// Show the versions of this command and of the daemon.
    ///
    /// Example: warren version
    Version(JsonArg),
    /// Write what support needs to know to a file, without secrets, names and addresses. Nothing is sent anywhere.
    ///
    /// Example: warren bugreport --output report.txt
    Bugreport(BugreportArgs),
}

/// How to print.
#[derive(Args, Clone, Copy, Debug)]
pub struct JsonArg {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// How to come up.
#[derive(Args, Debug)]
pub struct UpArgs {
    /// The coordinator's URL; needed the first time.
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,
    /// The auth key; needed the first time. Other users can see it in the process list: prefer --auth-key-file.
    #[arg(long, value_name = "KEY", conflicts_with = "auth_key_file")]
    auth_key: Option<String>,
    /// File that holds the auth key; - reads standard input.
    #[arg(long, value_name = "FILE")]
    auth_key_file: Option<PathBuf>,
    /// Refuse a coordinator whose root key has another fingerprint.
    #[arg(long, value_name = "sha256:…")]
    coordinator_fingerprint: Option<String>,
    /// The name to ask for; the host's own by default.
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// How long to wait until connected (500ms, 30s, 5m); 0s for not at all.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    output: JsonArg,
}

/// What to write, and where.
#[derive(Args, Debug)]
pub struct BugreportArgs {
    /// The file; by default a new one in this directory.
    #[arg(long, short = 'o', value_name = "FILE", conflicts_with = "json")]
    output: Option<PathBuf>,
    /// Also names of people, devices, networks and relays, and addresses.
    #[arg(long)]
    with_names: bool,
    /// Print one JSON document, and write no file.
    #[arg(long)]
    json: bool,
}

/// Whom to ping, and how often.
#[derive(Args, Debug)]
pub struct PingArgs {
    /// Name, overlay address or id of a peer.
    peer: String,
    /// How many times [default: 4; with --until-direct 120].
    #[arg(short = 'c', long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PINGS)))]
    count: Option<u32>,
    /// Go on, four times a second, until packets take a direct path; exit code 1 if they come not to.
    #[arg(long)]
    until_direct: bool,
    /// Print one JSON document per line.
    #[arg(long)]
    json: bool,
}

/// Whose address.
#[derive(Args, Debug)]
pub struct WhoisArgs {
    /// An overlay address, with or without a port.
    #[arg(value_name = "IP[:PORT]", value_parser = parse_address)]
    address: IpAddr,
    #[command(flatten)]
    output: JsonArg,
}

/// Which connection.
#[derive(Args, Debug)]
pub struct WhyArgs {
    /// Destination: name, address or id of a peer, with a port for protocols that have ports.
    #[arg(value_name = "DST[:PORT]", value_parser = parse_destination)]
    destination: (String, Option<u16>),
    /// Protocol: tcp, udp, icmp, sctp or a number. Without it tcp if a port is given, else icmp.
    #[arg(long, value_name = "PROTO", value_parser = parse_proto)]
    proto: Option<Proto>,
    #[command(flatten)]
    output: JsonArg,
}

/// A protocol as people write it; ICMP is another number in IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Proto {
    Icmp,
    Number(u8),
}

/// Runs a verb. Prints its answer or its problem and returns the exit code.
pub fn run(target: &Target, command: AgentCommand) -> ExitCode {
    let json = match &command {
        AgentCommand::Up(args) => args.output.json,
        AgentCommand::Down(output)
        | AgentCommand::Logout(output)
        | AgentCommand::Status(output)
        | AgentCommand::Netcheck(output)
        | AgentCommand::Version(output) => output.json,
        AgentCommand::Ping(args) => args.json,
        AgentCommand::Whois(args) => args.output.json,
        AgentCommand::Why(args) => args.output.json,
        AgentCommand::Bugreport(args) => args.json,
    };
    match execute(target, command, json) {
        Ok(code) => ExitCode::from(code),
        Err(problem) => {
            // A closed stderr leaves nobody to tell.
            let _ = writeln!(io::stderr(), "warren: {problem}");
            ExitCode::from(problem.exit)
        }
    }
}

fn execute(target: &Target, command: AgentCommand, json: bool) -> Result<u8, Problem> {
    let ask = |verb| client::ask(&target.socket, &Request { network: target.network, verb });
    let (answer, text): (Value, Render) = match command {
        AgentCommand::Up(args) => (ask(up_verb(args)?)?, render::up),
        AgentCommand::Down(_) => (ask(Verb::Down)?, |_| Ok("down\n".into())),
        AgentCommand::Logout(_) => (ask(Verb::Logout)?, render::logout),
        AgentCommand::Status(_) => (ask(Verb::Status)?, render::status),
        AgentCommand::Netcheck(_) => (ask(Verb::Netcheck)?, render::netcheck),
        AgentCommand::Whois(args) => (ask(Verb::Whois { ip: args.address })?, render::whois),
        AgentCommand::Why(args) => (ask(why_verb(&args)?)?, render::why),
        AgentCommand::Bugreport(args) => {
            let report = ask(Verb::Bugreport { names: args.with_names })?;
            // Measured anew; an agent that is not up has nothing to measure with.
            let check = ask(Verb::Netcheck).map(|check| report::netcheck(check, args.with_names));
            let report = report::whole(report, check);
            if !args.json {
                let path = report::write(args.output, &report)?;
                print(&format!("written to {}; look through it before you pass it on\n", path.display()))?;
                return Ok(0);
            }
            (report, |_| Ok(String::new()))
        }
        AgentCommand::Version(_) => {
            // Also without a daemon there is a version to show.
            let daemon = ask(Verb::Version).ok().map(|v| v["version"].clone());
            (json!({ "version": env!("CARGO_PKG_VERSION"), "daemon": daemon }), render::version)
        }
        AgentCommand::Ping(args) => return ping(&args, &mut |verb| ask(verb)),
    };
    print(&if json { pretty(&answer) } else { text(&answer)? })?;
    Ok(0)
}

fn up_verb(args: UpArgs) -> Result<Verb, Problem> {
    let auth_key = match (&args.auth_key, &args.auth_key_file) {
        (Some(key), _) => Some(key.trim().to_owned()),
        (None, Some(path)) => Some(read_key(path)?),
        (None, None) => None,
    };
    Ok(Verb::Up(api::Up {
        coordinator: args.coordinator,
        auth_key,
        fingerprint: args.coordinator_fingerprint,
        hostname: args.hostname,
        timeout_ms: u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX),
    }))
}

fn read_key(path: &Path) -> Result<String, Problem> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text))
    };
    read.map_err(|e| {
        Problem::usage(
            "auth-key-file",
            format!("the auth key file `{}` can't be read: {}", path.display(), crate::problem::io_text(&e)),
            "check the path and its permissions",
        )
    })?;
    Ok(text.trim().to_owned())
}

fn why_verb(args: &WhyArgs) -> Result<Verb, Problem> {
    let (dst, port) = args.destination.clone();
    let proto = args.proto.unwrap_or(if port.is_some() { Proto::Number(PROTO_TCP) } else { Proto::Icmp });
    let proto = match proto {
        Proto::Icmp if dst.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) => PROTO_ICMPV6,
        Proto::Icmp => PROTO_ICMP,
        Proto::Number(number) => number,
    };
    if warren_common::filter::has_ports(proto) && port.is_none() {
        return Err(Problem::usage(
            "no-port",
            "this protocol has ports, and the destination names none",
            "write DST:PORT, for example `warren why db1:5432`",
        ));
    }
    Ok(Verb::Why { dst, port: port.unwrap_or(0), proto })
}

fn ping(args: &PingArgs, ask: &mut dyn FnMut(Verb) -> Result<Value, Problem>) -> Result<u8, Problem> {
    let mut rtts = Vec::new();
    let (usual, pause) = if args.until_direct { (120, LOOK_INTERVAL) } else { (4, PING_INTERVAL) };
    let (count, mut sent, mut direct) = (args.count.unwrap_or(usual), 0, false);
    while sent < count && !direct {
        if sent > 0 {
            std::thread::sleep(pause);
        }
        sent += 1;
        let seq = sent;
        let pong: Pong = client::decode(ask(Verb::Ping { peer: args.peer.clone() })?)?;
        rtts.extend(pong.rtt_ms);
        direct = args.until_direct && pong.rtt_ms.is_some() && pong.path.kind == "direct";
        print(&if args.json {
            format!("{}\n", json!({ "seq": seq, "rtt_ms": pong.rtt_ms, "path": pong.path }))
        } else {
            render::pong(seq, &args.peer, &pong)
        })?;
    }
    let summary = ping_summary(sent, &rtts);
    print(&if args.json { format!("{summary}\n") } else { render::ping_summary(&summary) })?;
    if args.until_direct && !direct {
        return Err(not_direct(&args.peer, sent, ask));
    }
    Ok(u8::from(rtts.is_empty()))
}

/// Why all those pings found no direct path, as the daemon sees it.
fn not_direct(peer: &str, sent: u32, ask: &mut dyn FnMut(Verb) -> Result<Value, Problem>) -> Problem {
    let status = ask(Verb::Status).unwrap_or_default();
    let mut peers = status["peers"].as_array().into_iter().flatten();
    let named = |p: &&Value| {
        let is = |value: &Value| value.as_str().is_some_and(|text| text.eq_ignore_ascii_case(peer));
        is(&p["name"]) || is(&p["id"]) || p["ips"].as_array().is_some_and(|ips| ips.iter().any(is))
    };
    let why = peers.find(named).and_then(|p| p["why_not_direct"].as_str()).unwrap_or("it is not known why");
    Problem::new(
        "not-direct",
        format!("no direct path to {peer} after {sent} pings: {why}"),
        "`warren netcheck`, here and there, shows what lies between; a router that forwards ports (UPnP, NAT-PMP, PCP) or open UDP helps",
    )
}

fn ping_summary(sent: u32, rtts: &[f64]) -> Value {
    let min = rtts.iter().copied().reduce(f64::min);
    let max = rtts.iter().copied().reduce(f64::max);
    let avg = (!rtts.is_empty()).then(|| round_ms(rtts.iter().sum::<f64>() / rtts.len() as f64));
    json!({ "sent": sent, "received": rtts.len(), "min_ms": min, "avg_ms": avg, "max_ms": max })
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn print(text: &str) -> Result<(), Problem> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader has seen enough (`| head`).
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Problem::new(
            "output",
            format!("the answer can't be written: {}", crate::problem::io_text(&e)),
            "check where the output goes",
        )),
        _ => Ok(()),
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "write a number and a unit, such as 30s".to_owned())?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" | "" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        "h" => Ok(Duration::from_secs(number.saturating_mul(3_600))),
        _ => Err("the unit must be ms, s, m or h".to_owned()),
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    bare.parse()
        .or_else(|_| text.parse::<SocketAddr>().map(|a| a.ip()))
        .map_err(|_| "write an address, such as 100.64.0.7, 100.64.0.7:22 or [fd00::7]:22".to_owned())
}

fn parse_destination(text: &str) -> Result<(String, Option<u16>), String> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok((text.to_owned(), None));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok((address.ip().to_string(), Some(address.port())));
    }
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => {
            (name, Some(port.parse().map_err(|_| format!("`{port}` is not a port (0 to 65535)"))?))
        }
        None => (text, None),
    };
    if name.is_empty() {
        return Err("the destination has no name".to_owned());
    }
    Ok((name.trim_start_matches('[').trim_end_matches(']').to_owned(), port))
}

fn parse_proto(text: &str) -> Result<Proto, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "tcp" => Proto::Number(PROTO_TCP),
        "udp" => Proto::Number(PROTO_UDP),
        "sctp" => Proto::Number(PROTO_SCTP),
        "icmp" => Proto::Icmp,
        other => {
            Proto::Number(other.parse().map_err(|_| "write tcp, udp, icmp, sctp or a number".to_owned())?)
        }
    })
}

#[cfg(test)]
mod tests;
