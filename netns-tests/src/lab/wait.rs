//! Real time, in the one place of the lab that reads it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(10);

/// Measures how long something took.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    #[expect(clippy::disallowed_methods, reason = "the lab runs real programs in real time")]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Waits until `probe` returns something, for at most `limit`. The limit is a bound for failing tests
/// and should be generous: a passing test never waits longer than the condition takes.
///
/// # Errors
/// When the limit passes (the message holds `what`), or at once when `probe` fails.
pub fn eventually<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let watch = Stopwatch::start();
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if watch.elapsed() > limit {
            bail!("after {} s still not: {what}", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

/// Milliseconds on CLOCK_MONOTONIC, which all processes and namespaces of one machine share: what two
/// programs of a lab print can be subtracted.
pub fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both are never negative: the clock starts at boot.
    now.tv_sec.unsigned_abs() * 1_000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_the_condition_and_names_what_never_came() {
        let mut left = 3;
        let got = eventually("count", Duration::from_secs(30), || {
            left -= 1;
            Ok((left == 0).then_some("done"))
        });
        assert_eq!(got.unwrap(), "done");
        let never = eventually::<()>("the moon", Duration::ZERO, || Ok(None));
        assert!(never.unwrap_err().to_string().contains("the moon"));
    }
}
