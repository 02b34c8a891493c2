//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::Value;

use crate::admin::{Call, Failure, call};
use crate::embedded_relay::RelayListen;
use crate::policy_file;
use crate::serve::{NetworkName, Options, PublicUrl};

/// Warren's coordinator: decides who may reach what, and tells every agent at once.
#[derive(Debug, Parser)]
#[command(name = "warren-coordinator", version, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Where the coordinator keeps its state, for every verb.
#[derive(Clone, Debug, Args)]
pub struct StateDir {
    /// The coordinator's state directory
    #[arg(
        long,
        value_name = "DIR",
        env = "WARREN_COORDINATOR_STATE_DIR",
        default_value = "/var/lib/warren-coordinator",
        global = true
    )]
    pub state_dir: PathBuf,
}

/// Where, and in which form to answer.
#[derive(Clone, Debug, Args)]
pub struct Ask {
    /// Where the coordinator's socket is.
    #[command(flatten)]
    pub dir: StateDir,
    /// Print one JSON document
    #[arg(long, global = true)]
    pub json: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run the coordinator
    #[command(
        after_help = "Examples:\n  warren-coordinator serve --state-dir /var/lib/warren-coordinator --listen 0.0.0.0:8080 \\\n      --public-url http://203.0.113.10:8080 --policy /etc/warren/policy.hujson"
    )]
    Serve(Box<ServeArgs>),
    /// Make, list and revoke the keys that let devices in
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator auth-key create --tag tag:web --expires 1h\n  warren-coordinator auth-key create --user ann@example.com --reusable"
    )]
    AuthKey(AuthKeyVerb),
    /// See and manage devices
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator device list\n  warren-coordinator device remove web-1"
    )]
    Device(DeviceVerb),
    /// See and manage users
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator user list\n  warren-coordinator user suspend ann@example.com"
    )]
    User(UserVerb),
    /// See and set the policy
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator policy status\n  warren-coordinator policy set policy.hujson"
    )]
    Policy(PolicyVerb),
    /// See and manage relays
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator relay create fra1\n  warren-coordinator relay list"
    )]
    Relay(RelayVerb),
}

/// `serve`
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub dir: StateDir,
    /// Where to listen for agents
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Under which URL agents reach this coordinator
    #[arg(long, value_name = "URL")]
    pub public_url: PublicUrl,
    /// The policy file; watched, and applied when it changes
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// The database, sqlite:///path/to/file; the default is in the state directory
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// The TLS certificate chain (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The TLS private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Don't run a relay and STUN server inside the coordinator
    #[arg(long, conflicts_with_all = ["relay_listen", "stun_listen"])]
    pub no_embedded_relay: bool,
    /// Where the embedded relay listens (UDP and TCP)
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:3340")]
    pub relay_listen: SocketAddr,
    /// Where the embedded STUN server listens (UDP)
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:3478")]
    pub stun_listen: SocketAddr,
    /// The pool of IPv4 overlay addresses; 100.64.0.0/10 in a new network
    #[arg(long, value_name = "CIDR")]
    pub ipv4_pool: Option<Ipv4Net>,
    /// The prefix of IPv6 overlay addresses; derived from the network's id in a new network
    #[arg(long, value_name = "CIDR")]
    pub ipv6_prefix: Option<Ipv6Net>,
    /// The network's name, for people; the host of --public-url in a new network
    #[arg(long, value_name = "NAME")]
    pub network_name: Option<NetworkName>,
    /// How long an agent works without hearing from us: 5m to 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    pub lease: Duration,
}

impl ServeArgs {
    /// What `serve` needs.
    pub fn options(self) -> Options {
        Options {
            state_dir: self.dir.state_dir,
            listen: self.listen,
            public_url: self.public_url,
            policy: self.policy,
            database: self.database,
            tls: self.tls_cert.zip(self.tls_key),
            relay: (!self.no_embedded_relay)
                .then_some(RelayListen { relay: self.relay_listen, stun: self.stun_listen }),
            ipv4_pool: self.ipv4_pool,
            ipv6_prefix: self.ipv6_prefix,
            lease: self.lease,
            network_name: self.network_name,
        }
    }
}

/// `auth-key …`
#[derive(Debug, Subcommand)]
pub enum AuthKeyVerb {
    /// Make a key; prints it alone, once
    Create {
        /// A tag for the devices it lets in; repeatable
        #[arg(long = "tag", value_name = "tag:x", conflicts_with = "user")]
        tags: Vec<String>,
        /// The user the devices belong to
        #[arg(long, value_name = "EMAIL")]
        user: Option<String>,
        /// Let in any number of devices, not one
        #[arg(long)]
        reusable: bool,
        /// Its devices are removed after 30 minutes offline
        #[arg(long)]
        ephemeral: bool,
        /// How long the key works, such as 30m, 1h, 7d [default: 24h]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        expires: Option<Duration>,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// List keys (never their secrets)
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Take a key back; devices it let in stay
    Revoke {
        /// The key's id, key_…
        key: String,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
}

/// `device …`
#[derive(Debug, Subcommand)]
pub enum DeviceVerb {
    /// List devices
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Show one device whole
    Show(DeviceArg),
    /// Admit a device that awaits approval
    Approve(DeviceArg),
    /// Cut a device off until it enrols again
    Expire(DeviceArg),
    /// Remove a device for good
    Remove(DeviceArg),
}

/// One device.
#[derive(Debug, Args)]
pub struct DeviceArg {
    /// The device's name or id
    pub device: String,
    /// Where and how.
    #[command(flatten)]
    pub ask: Ask,
}

/// `user …`
#[derive(Debug, Subcommand)]
pub enum UserVerb {
    /// List users
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Add a user
    Create(UserArg),
    /// Cut all of a user's devices off
    Suspend(UserArg),
    /// Let a suspended user's devices back in
    Restore(UserArg),
    /// Remove a user with their devices and auth keys
    Remove(UserArg),
}

/// One user.
#[derive(Debug, Args)]
pub struct UserArg {
    /// The user's e-mail address
    pub email: String,
    /// Where and how.
    #[command(flatten)]
    pub ask: Ask,
}

/// `policy …`
#[derive(Debug, Subcommand)]
pub enum PolicyVerb {
    /// Print the policy in force
    Get {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Put a policy in force (unless it comes from a file)
    Set {
        /// The policy file; - for stdin
        file: PathBuf,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Where the policy comes from, and what is wrong with it
    Status {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
}

/// `relay …`
#[derive(Debug, Subcommand)]
pub enum RelayVerb {
    /// List relays
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Make a relay's join key; prints it alone, once
    Create {
        /// The relay's name
        name: String,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Remove a relay
    Remove {
        /// The relay's name or id
        relay: String,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
}

/// A length of time as people write it: `90s`, `30m`, `1h`, `7d`, `1h30m`.
///
/// # Errors
/// Anything else.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("`{text}` is not a length of time: expected a number with s, m, h or d, such as 30m");
    let (mut total, mut rest) = (0u64, text);
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = match rest[digits..].chars().next() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3_600,
            Some('d') => 86_400,
            _ => return Err(wrong()),
        };
        total = number.checked_mul(unit).and_then(|n| total.checked_add(n)).ok_or_else(wrong)?;
        rest = &rest[digits + 1..];
    }
    if total == 0 { Err(wrong()) } else { Ok(Duration::from_secs(total)) }
}

/// Carries out any verb but `serve`: what to print on stdout.
///
/// # Errors
/// What the coordinator, or reading a file, says.
pub fn administer(verb: Verb) -> Result<String, Failure> {
    let (ask, request) = request(verb)?;
    let value = call(&ask.dir.state_dir, &request)?;
    Ok(if ask.json { format!("{value:#}") } else { present(&request, &value) })
}

fn request(verb: Verb) -> Result<(Ask, Call), Failure> {
    Ok(match verb {
        Verb::Serve(_) => {
            return Err(Failure { text: "`serve` is no question".into(), fix: String::new(), usage: true });
        }
        Verb::AuthKey(AuthKeyVerb::Create { tags, user, reusable, ephemeral, expires, ask }) => {
            let life_s = expires.map(|e| e.as_secs());
            (ask, Call::AuthKeyCreate { tags, user, reusable, ephemeral, life_s })
        }
        Verb::AuthKey(AuthKeyVerb::List { ask }) => (ask, Call::AuthKeyList),
        Verb::AuthKey(AuthKeyVerb::Revoke { key, ask }) => (ask, Call::AuthKeyRevoke { key }),
        Verb::Device(DeviceVerb::List { ask }) => (ask, Call::DeviceList),
        Verb::Device(DeviceVerb::Show(a)) => (a.ask, Call::DeviceShow { device: a.device }),
        Verb::Device(DeviceVerb::Approve(a)) => (a.ask, Call::DeviceApprove { device: a.device }),
        Verb::Device(DeviceVerb::Expire(a)) => (a.ask, Call::DeviceExpire { device: a.device }),
        Verb::Device(DeviceVerb::Remove(a)) => (a.ask, Call::DeviceRemove { device: a.device }),
        Verb::User(UserVerb::List { ask }) => (ask, Call::UserList),
        Verb::User(UserVerb::Create(a)) => (a.ask, Call::UserCreate { email: a.email }),
        Verb::User(UserVerb::Suspend(a)) => (a.ask, Call::UserSuspend { email: a.email }),
        Verb::User(UserVerb::Restore(a)) => (a.ask, Call::UserRestore { email: a.email }),
        Verb::User(UserVerb::Remove(a)) => (a.ask, Call::UserRemove { email: a.email }),
        Verb::Policy(PolicyVerb::Get { ask }) => (ask, Call::PolicyGet),
        Verb::Policy(PolicyVerb::Set { file, ask }) => {
            let read = if file.as_os_str() == "-" {
                std::io::read_to_string(std::io::stdin()).map_err(|e| format!("can't read stdin: {e}"))
            } else {
                policy_file::read(&file)
            };
            let fix = || "name a readable policy file".to_owned();
            let text = read.map_err(|text| Failure { text, fix: fix(), usage: true })?;
            (ask, Call::PolicySet { text })
        }
        Verb::Policy(PolicyVerb::Status { ask }) => (ask, Call::PolicyStatus),
        Verb::Relay(RelayVerb::List { ask }) => (ask, Call::RelayList),
        Verb::Relay(RelayVerb::Create { name, ask }) => (ask, Call::RelayCreate { name }),
        Verb::Relay(RelayVerb::Remove { relay, ask }) => (ask, Call::RelayRemove { relay }),
    })
}

/// The answer for people.
fn present(call: &Call, value: &Value) -> String {
    match call {
        Call::AuthKeyCreate { .. } => text(&value["key"]),
        Call::RelayCreate { .. } => text(&value["join_key"]),
        Call::PolicyGet => text(&value["policy"]),
        Call::AuthKeyList => {
            table(value, &["id", "user", "tags", "reusable", "ephemeral", "expires_at", "used_by"])
        }
        Call::DeviceList => table(value, &["id", "name", "ips", "user", "tags", "state", "online"]),
        Call::UserList => table(value, &["id", "email", "devices", "suspended"]),
        Call::RelayList => table(value, &["id", "name", "embedded", "joined", "addrs", "stun"]),
        Call::DeviceShow { .. } | Call::PolicyStatus | Call::PolicySet { .. } => {
            let mut shown = Table::new();
            shown.load_style(NOTHING);
            for (key, value) in value.as_object().into_iter().flatten() {
                shown.add_row([key.clone(), text(value)]);
            }
            trimmed(&shown)
        }
        Call::AuthKeyRevoke { .. }
        | Call::DeviceApprove { .. }
        | Call::DeviceExpire { .. }
        | Call::DeviceRemove { .. }
        | Call::UserCreate { .. }
        | Call::UserSuspend { .. }
        | Call::UserRestore { .. }
        | Call::UserRemove { .. }
        | Call::RelayRemove { .. } => "done".to_owned(),
    }
}

fn table(rows: &Value, columns: &[&str]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(columns.iter().map(|c| c.to_uppercase()));
    for row in rows.as_array().into_iter().flatten() {
        table.add_row(columns.iter().map(|c| text(&row[*c])));
    }
    trimmed(&table)
}

fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(","),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lengths_of_time() {
        assert_eq!(parse_duration("1h30m").unwrap(), Duration::from_secs(5_400));
        assert_eq!(parse_duration("7d").unwrap(), Duration::from_secs(604_800));
        for bad in ["", "0s", "1", "h", "1x", "-1h", "999999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
