//! What the system has for the parts that are pure: clocks, randomness, and turns on a processor.

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

/// How long a thread with [`ShortTurns`] runs at a time when others wait, in nanoseconds: the least that the kernel takes.
const SHORT_TURN: u64 = 100_000;
/// Before all others that have no real-time priority.
const FIRST: i32 = -20;
/// Turns between two looks at the clock.
const LOOK: u32 = 64;
/// Over how long at least is judged what the thread uses: a burst is no habit.
const WINDOW: Duration = Duration::from_millis(50);
/// The share of a processor from which on it is one among others: more than that is no small thing to do in between.
const GREEDY: f64 = 0.6;
/// The share below which it goes first again; less than what one of two gets that both could use a whole one.
const MODEST: f64 = 0.4;

/// A thread that has little to do, but soon: also on a processor that others keep busy.
///
/// Linux runs whose deadline is next (EEVDF), and who wants to run for short has an early one; since 6.12 it even ends
/// another's turn. That needs no privilege, but a thread that has just run is owed nothing for a moment, and if it is woken
/// in that moment it waits for up to a tick (4 ms). With the highest `nice` value the moment is too short to be met. That
/// takes CAP_SYS_NICE or RLIMIT_NICE; without them, and on older kernels, it is as far as it goes.
#[derive(Debug)]
pub(crate) struct ShortTurns {
    /// The value that the thread began with.
    nice: i32,
    /// Whether it has the highest instead; `None`: it may not.
    first: Option<bool>,
    turns: u32,
    looked: Instant,
    used: Duration,
}

impl ShortTurns {
    /// For the calling thread.
    pub(crate) fn take() -> Self {
        let nice = rustix::process::getpriority_process(None).unwrap_or(0);
        let first = set_turns(FIRST).then_some(true);
        if first.is_none() {
            set_turns(nice); // best effort
        }
        Self { nice, first, turns: 0, looked: now().boot, used: used() }
    }

    /// Once for each turn: a thread that has much to do after all does not keep others from the processor.
    pub(crate) fn one(&mut self) {
        let Some(first) = self.first else { return };
        self.turns += 1;
        if self.turns < LOOK {
            return;
        }
        self.turns = 0;
        let now = now().boot;
        let elapsed = now.since(self.looked);
        if elapsed < WINDOW {
            return;
        }
        let used = used();
        let share = (used - self.used).as_secs_f64() / elapsed.as_secs_f64();
        if first && share > GREEDY {
            self.first = set_turns(self.nice).then_some(false);
        } else if !first && share < MODEST {
            self.first = set_turns(FIRST).then_some(true);
        }
        (self.looked, self.used) = (now, used);
    }
}

/// What this thread has used of a processor.
pub(crate) fn used() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec.unsigned_abs() as u32)
}

/// Short turns for the calling thread, with a `nice` value; false if the system won't.
fn set_turns(nice: i32) -> bool {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SHORT_TURN,
        sched_deadline: 0,
        sched_period: 0,
    };
    #[expect(unsafe_code, reason = "no crate in use has this call")]
    // SAFETY: the kernel reads as many bytes as the structure says it has, and keeps none of them.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    result == 0
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

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    #[test]
    fn who_has_little_to_do_goes_first_and_who_has_much_does_not() {
        // A thread of its own: what it changes is of the thread.
        std::thread::spawn(|| {
            let nice = || rustix::process::getpriority_process(None).unwrap();
            let before = nice();
            let mut turns = ShortTurns::take();
            if turns.first.is_none() {
                assert_eq!(nice(), before);
                println!("skipped: no permission to go before others (run as root)");
                return;
            }
            assert_eq!(nice(), FIRST);
            // Either ends when the thread's use of its processor says so, however long that takes.
            while turns.first == Some(true) {
                let until = used() + Duration::from_micros(100);
                while used() < until {
                    std::hint::spin_loop();
                }
                turns.one();
            }
            assert_eq!(nice(), before);
            while turns.first == Some(false) {
                std::thread::sleep(Duration::from_micros(100));
                turns.one();
            }
            assert_eq!(nice(), FIRST);
        })
        .join()
        .unwrap();
    }
}
