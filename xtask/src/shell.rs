//! Running programs: found, logged, and with a sign of life while they take long.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// How often a long step says that it still runs.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// How often a running step is looked at.
const POLL: Duration = Duration::from_millis(50);

/// What a program left.
pub(crate) struct Finished {
    pub(crate) success: bool,
    /// Standard output and error, in order.
    pub(crate) output: String,
    pub(crate) log: PathBuf,
    pub(crate) took: Duration,
}

/// Runs to the end with all output in `target/xtask/NAME.log`.
pub(crate) fn logged(name: &str, command: &mut Command) -> Result<Finished> {
    let log = log_dir()?.join(format!("{name}.log"));
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let start = now();
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let mut told = Duration::ZERO;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(POLL);
        if start.elapsed() >= told + SIGN_OF_LIFE {
            told = start.elapsed();
            say(&format!("      {name} still runs after {} s", told.as_secs()));
        }
    };
    let output = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    Ok(Finished { success: status.success(), output, log, took: start.elapsed() })
}

/// Runs with the terminal's own input and output; whether it succeeded.
pub(crate) fn attached(command: &mut Command) -> Result<bool> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    Ok(status.success())
}

/// `cargo`, in the workspace's root, without colours: most of what it prints is read from a file.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).env("CARGO_TERM_COLOR", "never");
    // What cargo told this program about itself: build scripts (ring's) would see it as a change and build again,
    // and once more at the next plain `cargo build`.
    for (key, _) in std::env::vars_os() {
        let about_us = ["CARGO_PKG_", "CARGO_MANIFEST_"];
        if key.to_str().is_some_and(|key| about_us.iter().any(|prefix| key.starts_with(prefix))) {
            command.env_remove(key);
        }
    }
    command
}

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Finds a program on PATH, in cargo's folder, or among the administrators' tools, which an ordinary
/// user's PATH often lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    // Line `Uid: real effective saved filesystem`.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.and_then(|uids| uids.split_whitespace().nth(1)) == Some("0")
}

fn log_dir() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let dir = target.join("xtask");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

#[expect(clippy::disallowed_methods, reason = "steps are timed for the reader only")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// One line, or several, for the reader.
#[expect(clippy::print_stdout, reason = "a command's output is its purpose")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}
