//! The two things that the pure parts don't do themselves: read the clocks, and draw randomness.

use std::time::{Duration, UNIX_EPOCH};

use rand_core::{CryptoRng, RngCore};
use rustix::time::{ClockId, clock_gettime};
use warren_common::time::{Instant, Now, UnixTime};

/// Both clocks, now.
pub(crate) fn now() -> Now {
    let boot = clock_gettime(ClockId::Boottime);
    let boot = Duration::new(boot.tv_sec.unsigned_abs(), boot.tv_nsec.unsigned_abs() as u32);
    #[expect(clippy::disallowed_methods, reason = "the shell's clock module")]
    let unix = std::time::SystemTime::now();
    Now {
        boot: Instant::ZERO + boot,
        unix: match unix.duration_since(UNIX_EPOCH) {
            Ok(since) => UnixTime::default() + since,
            Err(before) => UnixTime::default() - before.duration(),
        },
    }
}

/// The operating system's generator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OsRng;

impl CryptoRng for OsRng {}

impl RngCore for OsRng {
    fn next_u32(&mut self) -> u32 {
        rand_core::impls::next_u32_via_fill(self)
    }

    fn next_u64(&mut self) -> u64 {
        rand_core::impls::next_u64_via_fill(self)
    }

    #[expect(clippy::disallowed_methods, reason = "the shell's one generator")]
    #[expect(
        clippy::expect_used,
        reason = "without entropy no key may be made: stopping is the only safe answer"
    )]
    fn fill_bytes(&mut self, dest: &mut [u8]) {
        getrandom::fill(dest).expect("the operating system has no randomness");
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand_core::Error> {
        self.fill_bytes(dest);
        Ok(())
    }
}
