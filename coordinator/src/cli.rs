//! The command line.

mod ask;
mod serve;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

pub use ask::administer;
pub use serve::{GitArgs, ServeArgs};

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
        after_help = "Examples:\n  warren-coordinator serve --state-dir /var/lib/warren-coordinator --listen 0.0.0.0:8080 \\\n      --public-url http://203.0.113.10:8080 --policy /etc/warren/policy.hujson\n  warren-coordinator serve --listen 0.0.0.0:443 --public-url https://warren.example.com \\\n      --tls-cert chain.pem --tls-key key.pem \\\n      --policy-git https://git.example.com/net/policy.git --policy-git-allowed-signers /etc/warren/allowed_signers"
    )]
    Serve(Box<ServeArgs>),
    /// Say that the database was restored from a backup (the coordinator must not run)
    ///
    /// Raises the network's epoch, so that agents accept netmaps with numbers that they have seen before the restore.
    #[command(after_help = "Example:\n  warren-coordinator restored --state-dir /var/lib/warren-coordinator")]
    Restored(RestoredArgs),
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
    /// Make, list and revoke tokens of the HTTP API
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator api-token create ci --expires 30d\n  warren-coordinator api-token list"
    )]
    ApiToken(ApiTokenVerb),
    /// What is not as it should be, and what to do about it
    #[command(after_help = "Example:\n  warren-coordinator health --json")]
    Health {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// See and manage relays
    #[command(
        subcommand,
        after_help = "Examples:\n  warren-coordinator relay create fra1\n  warren-coordinator relay list"
    )]
    Relay(RelayVerb),
}

/// `restored`
#[derive(Clone, Debug, Args)]
pub struct RestoredArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub dir: StateDir,
    /// The database, if `serve` is given one
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
}

/// `auth-key …`
#[derive(Debug, Subcommand)]
pub enum AuthKeyVerb {
    /// Make a key; prints it alone, once
    #[command(
        after_help = "Example:\n  warren-coordinator auth-key create --tag tag:web --expires 1h > web.key"
    )]
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
    #[command(after_help = "Example:\n  warren-coordinator auth-key list --json")]
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Take a key back; devices it let in stay
    #[command(after_help = "Example:\n  warren-coordinator auth-key revoke key_01j9zk3v8q6m4t2r7x5w1y0a9b")]
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
    #[command(after_help = "Example:\n  warren-coordinator device list")]
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Show one device whole
    #[command(after_help = "Example:\n  warren-coordinator device show web-1 --json")]
    Show(DeviceArg),
    /// Admit a device that awaits approval
    #[command(after_help = "Example:\n  warren-coordinator device approve laptop")]
    Approve(DeviceArg),
    /// Cut a device off until it enrols again
    #[command(after_help = "Example:\n  warren-coordinator device expire laptop")]
    Expire(DeviceArg),
    /// Remove a device for good
    #[command(after_help = "Example:\n  warren-coordinator device remove web-1")]
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
    #[command(after_help = "Example:\n  warren-coordinator user list")]
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Add a user
    #[command(after_help = "Example:\n  warren-coordinator user create ann@example.com")]
    Create(UserArg),
    /// Cut all of a user's devices off
    #[command(after_help = "Example:\n  warren-coordinator user suspend ann@example.com")]
    Suspend(UserArg),
    /// Let a suspended user's devices back in
    #[command(after_help = "Example:\n  warren-coordinator user restore ann@example.com")]
    Restore(UserArg),
    /// Remove a user with their devices and auth keys
    #[command(after_help = "Example:\n  warren-coordinator user remove ann@example.com")]
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
    #[command(after_help = "Example:\n  warren-coordinator policy get > policy.hujson")]
    Get {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Put a policy in force (unless it comes from a file or a repository)
    #[command(after_help = "Example:\n  warren-coordinator policy set policy.hujson")]
    Set {
        /// The policy file; - for stdin
        file: PathBuf,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Where the policy comes from, and what is wrong with it
    #[command(after_help = "Example:\n  warren-coordinator policy status --json")]
    Status {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Print users and devices as `warren policy test` and `diff` take them
    #[command(after_help = "Example:\n  warren-coordinator policy inventory > inventory.json")]
    Inventory {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
}

/// `api-token …`
#[derive(Debug, Subcommand)]
pub enum ApiTokenVerb {
    /// Make a token for the HTTP API; prints it alone, once
    #[command(after_help = "Example:\n  warren-coordinator api-token create ci --expires 30d > ci.token")]
    Create {
        /// What it is for
        name: String,
        /// Let it change things, not only read
        #[arg(long)]
        write: bool,
        /// How long the token works, such as 1h, 30d [default: 90d]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        expires: Option<Duration>,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// List tokens (never their secrets)
    #[command(after_help = "Example:\n  warren-coordinator api-token list")]
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Take a token back, at once
    #[command(after_help = "Example:\n  warren-coordinator api-token revoke tok_01j9zk3v8q6m4t2r7x5w1y0a9b")]
    Revoke {
        /// The token's id, tok_…
        token: String,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
}

/// `relay …`
#[derive(Debug, Subcommand)]
pub enum RelayVerb {
    /// List relays
    #[command(after_help = "Example:\n  warren-coordinator relay list")]
    List {
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Make a relay's join key; prints it alone, once
    #[command(after_help = "Example:\n  warren-coordinator relay create fra1 > fra1.key")]
    Create {
        /// The relay's name
        name: String,
        /// Where and how.
        #[command(flatten)]
        ask: Ask,
    },
    /// Remove a relay
    #[command(after_help = "Example:\n  warren-coordinator relay remove fra1")]
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_help_with_an_example() {
        fn look(command: &clap::Command, path: &str) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(path) || path == "warren-coordinator", "{path}: {help}");
            assert!(command.get_about().is_some(), "{path}");
            for verb in command.get_subcommands().filter(|c| c.get_name() != "help") {
                look(verb, &format!("{path} {}", verb.get_name()));
            }
        }
        look(&Cli::command(), "warren-coordinator");
    }

    #[test]
    fn examples_are_valid() {
        fn look(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let joined = help.replace("\\\n", " ");
            for line in joined.lines().filter_map(|l| l.trim().strip_prefix("warren-coordinator ")) {
                let line = line.split(" > ").next().unwrap();
                let words = ["warren-coordinator"].into_iter().chain(line.split_whitespace());
                assert!(Cli::try_parse_from(words).is_ok(), "{line}");
            }
            command.get_subcommands().for_each(look);
        }
        look(&Cli::command());
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
