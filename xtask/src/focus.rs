//! One kind of test at a time, with its output on the terminal.

use std::process::Command;

use anyhow::Result;

use crate::setup;
use crate::shell::attached;
use crate::test::{FUZZ, LAB, build, in_namespaces, nextest_run};

/// Read by the simulator's tests: run this seed only.
const SIM_SEED: &str = "WARREN_SIM_SEED";

/// Read by the fuzz targets: random inputs for each.
const FUZZ_ITERATIONS: &str = "WARREN_FUZZ_ITERATIONS";

pub(crate) fn sim(seed: u64) -> Result<bool> {
    let mut command = nextest_run("binary(/^sim/)");
    run(command.arg("--no-capture").env(SIM_SEED, seed.to_string()))
}

pub(crate) fn lab(filter: Option<&str>) -> Result<bool> {
    // Lab tests start the workspace's own programs, which a test run alone does not build.
    let filter = filter.map_or_else(|| LAB.to_owned(), |filter| format!("{LAB} and test(/{filter}/)"));
    Ok(attached(&mut build())? && run(&mut in_namespaces(nextest_run(&filter)))?)
}

pub(crate) fn fuzz(iterations: Option<u64>) -> Result<bool> {
    let mut command = nextest_run(FUZZ);
    if let Some(iterations) = iterations {
        command.env(FUZZ_ITERATIONS, iterations.to_string());
    }
    run(&mut command)
}

fn run(command: &mut Command) -> Result<bool> {
    setup::run()?;
    attached(command)
}
