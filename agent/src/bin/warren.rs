//! `warren`: the command line of Warren.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use warren_agent::policy_cli::{self, PolicyCommand};

/// Reach your network, and see why not.
#[derive(Debug, Parser)]
#[command(name = "warren", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Work on policy files, offline.
    #[command(subcommand)]
    Policy(PolicyCommand),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Policy(command) => policy_cli::run(command),
    }
}
