//! A guard against a slower packet path that no noise disturbs: instructions counted by callgrind.
//!
//! Only our own code is counted: ring's assembler chooses by processor. A change that costs more than the slack fails here;
//! one that saves something should lower the numbers. They belong to the toolchain that `rust-toolchain.toml` pins and to
//! the profile that tests are built with.
#![expect(clippy::print_stdout, reason = "a skipped test says so, and measurements are for people")]

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Set by `cargo xtask`, which installs what tests run before it runs them.
const SETUP_DONE: &str = "WARREN_SETUP_DONE";
/// Super-frames counted, on top of what setting up costs.
const FRAMES: u64 = 50;
/// Packets of a super-frame.
const PACKETS: u64 = 47;
/// Instructions per packet outside of ring: to judge, cut, copy and sum up; and to check, join and judge.
const SEAL: u64 = 7_071;
const OPEN: u64 = 7_305;
/// How much more is no regression.
const SLACK: f64 = 1.10;

/// Instructions inside `function` and what it calls, but for ring's, per packet.
fn count(function: &str) -> Result<u64> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("callgrind");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--quiet"])
        .arg(format!("--toggle-collect=*{function}*"))
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(env!("CARGO_BIN_EXE_warren-bench-path"))
        .args(["fixed", &FRAMES.to_string()])
        .output()?;
    ensure!(output.status.success(), "valgrind: {}", String::from_utf8_lossy(&output.stderr));
    let listed =
        Command::new("callgrind_annotate").args(["--threshold=100", "--auto=no"]).arg(&file).output()?;
    let text = String::from_utf8_lossy(&listed.stdout);
    let number = |line: &str| line.split_whitespace().next()?.replace(',', "").parse::<u64>().ok();
    let total = text.lines().find(|l| l.contains("PROGRAM TOTALS")).and_then(number).context("a total")?;
    let is_ring = |line: &&str| line.contains("ring_core") || line.contains("/ring-0.");
    let ring: u64 = text.lines().filter(is_ring).filter_map(number).sum();
    ensure!(ring > 0 && total > ring, "{text}");
    // One transfer more shows that the path works before anything is measured.
    Ok((total - ring) / ((FRAMES + 1) * PACKETS))
}

#[test]
fn the_packet_path_takes_no_more_instructions_than_before() -> Result<()> {
    let absent = |program: &&str| Command::new(program).arg("--version").output().is_err();
    if let Some(program) = ["valgrind", "callgrind_annotate"].into_iter().find(absent) {
        let why = format!("`{program}` is missing; `cargo xtask setup` installs it (Debian: valgrind)");
        ensure!(std::env::var_os(SETUP_DONE).is_none(), "{why}, and it ran");
        println!("skipped: {why}");
        return Ok(());
    }
    for (name, function, wanted) in [("seal", "Tunnel::seal", SEAL), ("open", "Tunnel::open", OPEN)] {
        let got = count(function)?;
        println!("{name}: {got} instructions per packet outside of ring");
        ensure!(
            got as f64 <= wanted as f64 * SLACK,
            "{name} takes {got} instructions per packet, {wanted} before: find out why, or say why in the commit"
        );
    }
    Ok(())
}
