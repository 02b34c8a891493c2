//! `cargo xtask test`: all that CI checks, in the order that finds the cheapest mistake first.
//!
//! Cargo compiles the dependencies twice, once to check (clippy, doc) and once to run (build and all
//! tests), because every command names the whole workspace and so gets the same features.

use std::process::Command;

use anyhow::Result;

use crate::report::{Report, libtest, nextest};
use crate::setup;
use crate::shell::{cargo, find, is_root, logged};

/// Test binaries by what they need: real packets, or many random inputs.
pub(crate) const LAB: &str = "binary(/^lab_/)";
pub(crate) const FUZZ: &str = "binary(/^fuzz/)";

pub(crate) fn run() -> Result<bool> {
    let mut report = Report::new(10);
    report.here("setup", setup::run);
    report.check("fmt", cargo().args(["fmt", "--all", "--check"]));
    report.check("deny", cargo().args(["deny", "--workspace", "check", "licenses", "bans", "sources"]));
    report.check(
        "clippy",
        cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    );
    report.check(
        "doc",
        cargo().args(["doc", "--locked", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings"),
    );
    let test_steps = ["test", "doctest", "fuzz", "lab"];
    if report.check("build", &mut build()) {
        let rest = format!("not ({LAB} or {FUZZ})");
        report.tests(test_steps[0], &mut nextest_run(&rest), nextest);
        report.tests(test_steps[1], cargo().args(["test", "--locked", "--workspace", "--doc"]), libtest);
        report.tests(test_steps[2], &mut nextest_run(FUZZ), nextest);
        report.tests(test_steps[3], &mut in_namespaces(nextest_run(LAB)), nextest);
        report.skipped("marked #[ignore]", ignored()?);
    } else {
        for step in test_steps {
            report.not_run(step, "the build failed");
        }
    }
    Ok(report.finish())
}

/// Read by tests that run other programs: [`setup`] has installed those, so that one that is missing is a failure
/// and no reason to skip.
const SETUP_DONE: &str = "WARREN_SETUP_DONE";

/// Builds everything once: programs, libraries and tests, with one set of features.
pub(crate) fn build() -> Command {
    let mut command = cargo();
    command.args(["build", "--locked", "--workspace", "--all-targets"]);
    command
}

/// Runs the tests that `filter` selects, after [`setup`]; a test's own output is kept, because skips are told in it.
pub(crate) fn nextest_run(filter: &str) -> Command {
    let mut command = cargo();
    command.args(["nextest", "run", "--locked", "--workspace", "--no-fail-fast"]);
    command.args(["--success-output", "immediate", "--failure-output", "final", "-E", filter]);
    command.env(SETUP_DONE, "1");
    command
}

/// A lab needs root: of the machine or, where that is not us, of a user namespace. Where there is neither,
/// the tests say `skipped: …` themselves.
pub(crate) fn in_namespaces(command: Command) -> Command {
    if is_root() || !user_namespaces_work() {
        return command;
    }
    let mut wrapped = Command::new("unshare");
    wrapped.args(["-Urnm", "--propagation", "private", "sh", "-c"]);
    wrapped.arg(r#"mount -t tmpfs tmpfs /run && mkdir -p /run/netns && exec "$0" "$@""#);
    wrapped.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        wrapped.current_dir(dir);
    }
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            wrapped.env(key, value);
        }
    }
    wrapped
}

fn user_namespaces_work() -> bool {
    find("unshare").is_some()
        && Command::new("unshare")
            .args(["-Urnm", "--propagation", "private", "mount", "-t", "tmpfs", "tmpfs", "/run"])
            .output()
            .is_ok_and(|output| output.status.success())
}

/// How many tests are marked `#[ignore]`, so that they cannot hide.
fn ignored() -> Result<u64> {
    let list = ["nextest", "list", "--locked", "--workspace", "--run-ignored", "only"];
    let done = logged("ignored", cargo().args(list).args(["--message-format", "oneline"]))?;
    let names = done.output.lines().filter(|line| line.contains("::"));
    Ok(names.filter(|line| !line.trim_start().starts_with("Compiling")).count() as u64)
}
