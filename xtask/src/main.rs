//! `cargo xtask VERB`: everything a developer or CI does with this repository beyond plain cargo.

mod bench;
mod demo;
mod focus;
mod report;
mod setup;
mod shell;
mod test;

use std::process::ExitCode;

use anyhow::Result;

const HELP: &str = "\
cargo xtask setup              install the tools that the tests need, where absent (apt, cargo install)
cargo xtask demo [--keep]      agents behind NATs meet, talk, are denied and are cut off; --keep leaves them running
cargo xtask test               everything that CI checks; ends with `N passed, M failed[, K skipped]`
cargo xtask sim SEED           replay one run of the simulator, with its output
cargo xtask lab [FILTER]       only the tests with real packets between network namespaces
cargo xtask bench [REPEATS]    the tunnel against others on this machine; writes the table of docs/performance.md
cargo xtask bench table        writes that table again from what was measured last
cargo xtask bench paths        how soon machines behind NATs meet: the table of docs/performance.md (minutes)
cargo xtask bench relay        the relay against coturn, and its idle clients; writes their table (minutes)
cargo xtask fuzz [ITERATIONS]  only the fuzz targets, with this many random inputs each

Logs of all steps are in target/xtask. Exit code: 0 good, 1 something failed, 2 wrong command line.
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [] | ["help" | "--help" | "-h"] => {
            shell::say(HELP.trim_end());
            Ok(true)
        }
        ["setup"] => setup::run().map(|()| true),
        ["demo"] => demo::run(false),
        ["demo", "--keep"] => demo::run(true),
        ["test"] => test::run(),
        ["sim", seed] => match seed.parse() {
            Ok(seed) => focus::sim(seed),
            Err(_) => return usage(&format!("the seed is a whole number, not {seed:?}")),
        },
        ["lab"] => focus::lab(None),
        ["lab", filter] => focus::lab(Some(filter)),
        ["bench"] => bench::run(3),
        ["bench", "paths"] => bench::paths(),
        ["bench", "relay"] => bench::relay(),
        ["bench", "table"] => bench::rewrite(),
        ["bench", repeats] => match repeats.parse() {
            Ok(repeats) => bench::run(repeats),
            Err(_) => {
                return usage(&format!(
                    "the repeats are a whole number, `paths`, `relay` or `table`, not {repeats:?}"
                ));
            }
        },
        ["fuzz"] => focus::fuzz(None),
        ["fuzz", iterations] => match iterations.parse() {
            Ok(iterations) => focus::fuzz(Some(iterations)),
            Err(_) => return usage(&format!("the iterations are a whole number, not {iterations:?}")),
        },
        _ => return usage(&format!("unknown: {}", words.join(" "))),
    };
    exit_code(done)
}

fn usage(wrong: &str) -> ExitCode {
    shell::say(&format!("{wrong}\n\n{}", HELP.trim_end()));
    ExitCode::from(2)
}

fn exit_code(done: Result<bool>) -> ExitCode {
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            shell::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
