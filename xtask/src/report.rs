//! What happened: steps with durations as they end, and the one line that counts everything.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::shell::{Finished, logged, now, say};

/// How much of a failed step's log is shown; the whole of it is in the log file.
const MAX_SHOWN_LINES: usize = 300;

/// Results of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// A run of several steps.
pub(crate) struct Report {
    steps: usize,
    at: usize,
    counts: Counts,
    /// Reasons of skipped tests, with how many gave that one.
    skips: BTreeMap<String, u64>,
    took: Vec<(String, Duration)>,
}

impl Report {
    pub(crate) fn new(steps: usize) -> Self {
        Self { steps, at: 0, counts: Counts::default(), skips: BTreeMap::new(), took: Vec::new() }
    }

    /// A step that is good or bad as a whole, which counts as one test. Returns whether it was good.
    pub(crate) fn check(&mut self, name: &str, command: &mut Command) -> bool {
        self.step(name, |_| {
            let done = logged(name, command)?;
            Ok((Counts { passed: done.success.into(), failed: (!done.success).into(), skipped: 0 }, done))
        })
    }

    /// A step that runs tests, which `count` finds in its output.
    pub(crate) fn tests(
        &mut self,
        name: &str,
        command: &mut Command,
        count: fn(&str) -> Option<Counts>,
    ) -> bool {
        self.step(name, |report| {
            let done = logged(name, command)?;
            let found = count(&done.output);
            let mut counts = found.unwrap_or_default();
            // A command that fails without a failed test (a build error, a crash) is one failure, and so is
            // one that tells no result.
            if (!done.success && counts.failed == 0) || found.is_none() {
                counts.failed += 1;
            }
            for reason in done.output.lines().filter_map(|line| line.trim_start().strip_prefix("skipped: ")) {
                // The harness counts a skipped test as passed. `end` adds up what is in `counts`.
                counts.passed = counts.passed.saturating_sub(1);
                counts.skipped += 1;
                *report.skips.entry(reason.to_owned()).or_default() += 1;
            }
            Ok((counts, done))
        })
    }

    /// A step in this process.
    pub(crate) fn here(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> bool {
        self.begin(name);
        let start = now();
        let result = work();
        let good = result.is_ok();
        if let Err(error) = result {
            say(&format!("      {error:#}"));
        }
        let counts = Counts { passed: good.into(), failed: (!good).into(), skipped: 0 };
        self.end(name, counts, start.elapsed());
        good
    }

    /// Notes a step that could not be run because an earlier one failed.
    pub(crate) fn not_run(&mut self, name: &str, why: &str) {
        self.begin(name);
        say(&format!("      not run: {why}"));
        self.end(name, Counts { passed: 0, failed: 1, skipped: 0 }, Duration::ZERO);
    }

    /// Notes tests that were not run on purpose.
    pub(crate) fn skipped(&mut self, reason: &str, times: u64) {
        if times > 0 {
            self.counts.skipped += times;
            *self.skips.entry(reason.to_owned()).or_default() += times;
        }
    }

    /// Prints the durations, the skips and the last line; whether all is good.
    pub(crate) fn finish(self) -> bool {
        say("");
        for (name, took) in &self.took {
            say(&format!("{:>7.1} s  {name}", took.as_secs_f64()));
        }
        let total: Duration = self.took.iter().map(|(_, took)| *took).sum();
        say(&format!("{:>7.1} s  in all", total.as_secs_f64()));
        for (reason, times) in &self.skips {
            say(&format!("skipped {times}: {reason}"));
        }
        say(&self.counts.to_string());
        self.counts.failed == 0
    }

    fn step(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<(Counts, Finished)>) -> bool {
        self.begin(name);
        match work(self) {
            Ok((counts, done)) => {
                if counts.failed > 0 {
                    show(&done);
                }
                self.end(name, counts, done.took);
                counts.failed == 0
            }
            Err(error) => {
                say(&format!("      {error:#}"));
                self.end(name, Counts { passed: 0, failed: 1, skipped: 0 }, Duration::ZERO);
                false
            }
        }
    }

    fn begin(&mut self, name: &str) {
        self.at += 1;
        say(&format!("[{}/{}] {name}", self.at, self.steps));
    }

    fn end(&mut self, name: &str, counts: Counts, took: Duration) {
        let word = if counts.failed == 0 { "ok" } else { "FAILED" };
        say(&format!("      {name} {word} in {:.1} s ({counts})", took.as_secs_f64()));
        self.counts.passed += counts.passed;
        self.counts.failed += counts.failed;
        self.counts.skipped += counts.skipped;
        self.took.push((name.to_owned(), took));
    }
}

fn show(done: &Finished) {
    let progress = ["Compiling ", "Checking ", "Downloading ", "Downloaded ", "PASS ["];
    let told = |line: &&str| !progress.iter().any(|word| line.trim_start().starts_with(word));
    let lines: Vec<&str> = done.output.lines().filter(told).collect();
    let first = lines.len().saturating_sub(MAX_SHOWN_LINES);
    say(&format!(
        "      the last {} of {} lines of {}:",
        lines.len() - first,
        lines.len(),
        done.log.display()
    ));
    for line in &lines[first..] {
        say(line);
    }
}

/// Reads nextest's last line: `Summary [ 3.2s] 12/17 tests run: 10 passed (1 slow), 2 failed, 5 skipped`.
/// Its "skipped" are not counted: those are tests that the filter left out, which another step runs, and
/// tests marked `#[ignore]`, which `cargo xtask test` counts by listing them.
pub(crate) fn nextest(output: &str) -> Option<Counts> {
    let line = output.lines().rev().find(|line| line.trim_start().starts_with("Summary ["))?;
    let results = line.split_once("run:")?.1;
    let mut counts = Counts::default();
    for part in results.split(',') {
        let mut words = part.split_whitespace();
        let Some(number) = words.next().and_then(|number| number.parse::<u64>().ok()) else {
            continue;
        };
        match words.next() {
            Some("passed") => counts.passed += number,
            Some("failed" | "timed" | "exec") => counts.failed += number,
            _ => {}
        }
    }
    Some(counts)
}

/// Adds up the `test result:` lines of cargo's own harness.
pub(crate) fn libtest(output: &str) -> Option<Counts> {
    let mut counts = Counts::default();
    let mut results = output.lines().filter(|line| line.starts_with("test result:")).peekable();
    results.peek()?;
    for line in results {
        for part in line.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let Some(number) = words.next().and_then(|number| number.parse::<u64>().ok()) else {
                continue;
            };
            match words.next() {
                Some("passed") => counts.passed += number,
                Some("failed") => counts.failed += number,
                Some("ignored") => counts.skipped += number,
                _ => {}
            }
        }
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_nextest() {
        let all = "noise\n     Summary [   4.233s] 13 tests run: 13 passed (2 slow), 4 skipped\n";
        assert_eq!(nextest(all), Some(Counts { passed: 13, failed: 0, skipped: 0 }));
        let some =
            "  Summary [ 1s] 5/17 tests run: 2 passed, 1 failed, 2 timed out, 3 skipped\n  FAIL x\nerror: y";
        assert_eq!(nextest(some), Some(Counts { passed: 2, failed: 3, skipped: 0 }));
        assert_eq!(nextest("error: could not compile"), None);
    }

    #[test]
    fn reads_doctests() {
        let output = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0s\n\
                      test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(libtest(output), Some(Counts { passed: 4, failed: 2, skipped: 1 }));
        assert_eq!(libtest("error: could not compile"), None);
    }

    /// A report on one step whose program prints `text` and ends with `code`.
    fn told(name: &str, text: &str, code: u8) -> Report {
        let mut report = Report::new(1);
        let mut command = Command::new("sh");
        command.args(["-c", r#"printf '%s\n' "$0"; exit "$1""#, text, &code.to_string()]);
        report.tests(name, &mut command, nextest);
        report
    }

    #[test]
    fn skips_are_counted_and_a_run_without_a_result_is_a_failure() {
        let summary = "Summary [ 1s] 3 tests run: 3 passed, 0 skipped";
        let skipping =
            told("selftest-skips", &format!("    skipped: no root\n  skipped: no root\n{summary}"), 0);
        assert_eq!(skipping.counts, Counts { passed: 1, failed: 0, skipped: 2 });
        assert_eq!(skipping.skips.get("no root"), Some(&2));
        assert!(skipping.finish());

        let silent = told("selftest-silent", "all is well", 0);
        assert_eq!(silent.counts, Counts { passed: 0, failed: 1, skipped: 0 });
        let crashed = told("selftest-crashed", summary, 101);
        assert_eq!(crashed.counts, Counts { passed: 3, failed: 1, skipped: 0 });
        assert!(!crashed.finish());
    }

    #[test]
    fn the_last_line_is_plain() {
        let mut counts = Counts { passed: 7, failed: 0, skipped: 0 };
        assert_eq!(counts.to_string(), "7 passed, 0 failed");
        counts.skipped = 2;
        assert_eq!(counts.to_string(), "7 passed, 0 failed, 2 skipped");
    }
}
