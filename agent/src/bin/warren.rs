//! `warren`: the command line of Warren.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use warren_agent::cli::{self, AgentCommand, Target};
use warren_agent::policy_cli::{self, PolicyCommand};

/// Reach your network, and see why not.
#[derive(Debug, Parser)]
#[command(name = "warren", version)]
struct Cli {
    #[command(flatten)]
    target: Target,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Agent(AgentCommand),
    /// Work on policy files, offline.
    #[command(subcommand)]
    Policy(PolicyCommand),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Command::Agent(command) => cli::run(&cli.target, command),
        Command::Policy(command) => policy_cli::run(command),
    }
}
