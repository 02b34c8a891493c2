//! The demo that `cargo xtask demo` runs; see [`warren_netns_tests::demo`].

use std::process::ExitCode;

use warren_netns_tests::demo;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let keep = match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => false,
        ["--keep"] => true,
        _ => {
            demo::say("usage: warren-demo [--keep]");
            return ExitCode::from(2);
        }
    };
    match demo::run(keep) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            demo::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
