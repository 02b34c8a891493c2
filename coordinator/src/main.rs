//! `warren-coordinator`: see `--help`.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use warren_coordinator::cli::{Cli, RestoredArgs, Verb, administer};
use warren_coordinator::serve::{Options, ServeError, restored, serve};

fn main() -> ExitCode {
    match Cli::parse().verb {
        Verb::Serve(args) => match run(args.options()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.text, "", error.usage),
        },
        Verb::Restored(args) => match raise_epoch(args) {
            Ok(epoch) => say(&format!("the network's epoch is {epoch} now; start the coordinator again")),
            Err(error) => fail(&error.text, "", error.usage),
        },
        verb => match administer(verb) {
            Ok(text) => say(&text),
            Err(failure) => fail(&failure.text, &failure.fix, failure.usage),
        },
    }
}

fn say(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE, // nobody reads us any more
    }
}

fn raise_epoch(args: RestoredArgs) -> Result<u64, Box<ServeError>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime
        .map_err(|e| Box::new(ServeError { text: format!("can't start threads: {e}"), usage: false }))?;
    runtime.block_on(restored(&args.dir.state_dir, args.database.as_deref()))
}

fn fail(text: &str, fix: &str, usage: bool) -> ExitCode {
    let fix = if fix.is_empty() { String::new() } else { format!("\n  fix: {fix}") };
    // If stderr is gone, the exit code still tells.
    let _ = writeln!(std::io::stderr(), "error: {text}{fix}");
    ExitCode::from(if usage { 2 } else { 1 })
}

fn run(options: Options) -> Result<(), Box<ServeError>> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let failed =
        |what: &str, e: std::io::Error| Box::new(ServeError { text: format!("{what}: {e}"), usage: false });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| failed("can't start threads", e))?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed("can't take signals", e))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed("can't take signals", e))?;
        let serving = serve(options, stop.clone());
        tokio::pin!(serving);
        loop {
            tokio::select! {
                ended = &mut serving => return ended,
                _ = terminate.recv() => stop.cancel(),
                _ = interrupt.recv() => stop.cancel(),
            }
        }
    })
}
