//! What the system has for the parts that are pure: clocks, randomness, and turns on a processor.

use std::time::{Duration, UNIX_EPOCH};

use rand_core::{CryptoRng, RngCore};
use rustix::time::{ClockId, clock_gettime};
use warren_common::time::{Instant, Now, UnixTime};

/// Both clocks, now.
pub(crate) fn now() -> Now {
    #[expect(clippy::disallowed_methods, reason = "the shell's clock module")]
    let unix = std::time::SystemTime::now();
    Now {
        boot: boot(),
        unix: match unix.duration_since(UNIX_EPOCH) {
            Ok(since) => UnixTime::default() + since,
            Err(before) => UnixTime::default() - before.duration(),
        },
    }
}

fn boot() -> Instant {
    let boot = clock_gettime(ClockId::Boottime);
    Instant::ZERO + Duration::new(boot.tv_sec.unsigned_abs(), boot.tv_nsec.unsigned_abs() as u32)
}

/// How long a thread with [`ShortTurns`] runs at a time when others wait, in nanoseconds: the least that the kernel takes.
const SHORT_TURN: u64 = 100_000;
/// Before all others that have no real-time priority.
const FIRST: i32 = -20;
/// Over how long at least is judged how much there is to do: a burst is no habit.
const WINDOW: Duration = Duration::from_millis(50);
/// The share of time that a thread waits for something to do below which it is one among others: what it does then is no
/// small thing in between.
const GREEDY: f64 = 0.4;
/// The share above which it goes first again.
const MODEST: f64 = 0.6;

/// A thread that has little to do, but soon: also on a processor that others keep busy.
///
/// Linux runs whose deadline is next (EEVDF), and who wants to run for short has an early one; since 6.12 it even ends
/// another's turn. That needs no privilege, but a thread that has just run is owed nothing for a moment, and if it is woken
/// in that moment it waits for up to a tick (4 ms). With the highest `nice` value the moment is too short to be met. That
/// takes CAP_SYS_NICE or RLIMIT_NICE; without them it is as far as it goes.
///
/// A thread that was told to let others go first, or that has a real-time priority, stays as it is.
#[derive(Debug)]
pub(crate) struct ShortTurns {
    /// The value that the thread began with.
    nice: i32,
    /// Whether it has the highest instead; `None`: it may not.
    first: Option<bool>,
    /// When the window began.
    began: Instant,
    /// How long in it there was nothing to do.
    waited: Duration,
}

impl ShortTurns {
    /// For the calling thread.
    pub(crate) fn take() -> Self {
        let nice = rustix::process::getpriority_process(None).unwrap_or(0);
        let mut first = None;
        if nice <= 0 {
            first = set_turns(FIRST).then_some(true);
            if first.is_none() {
                set_turns(nice); // best effort
            }
        }
        Self { nice, first, began: boot(), waited: Duration::ZERO }
    }

    /// Waits for something to do, by `wait`. A thread that never has to wait does not keep others from the processor: what
    /// it got of it says less, since interrupts and limits take their part.
    pub(crate) fn wait<T>(&mut self, wait: impl FnOnce() -> T) -> T {
        let Some(first) = self.first else { return wait() };
        let before = boot();
        let result = wait();
        let now = boot();
        self.waited += now.since(before);
        let elapsed = now.since(self.began);
        if elapsed >= WINDOW {
            let share = self.waited.as_secs_f64() / elapsed.as_secs_f64();
            if first && share < GREEDY {
                self.first = set_turns(self.nice).then_some(false);
            } else if !first && share > MODEST {
                self.first = set_turns(FIRST).then_some(true);
            }
            (self.began, self.waited) = (now, Duration::ZERO);
        }
        result
    }
}

/// What this thread has used of a processor.
pub(crate) fn used() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec.unsigned_abs() as u32)
}

/// Short turns for the calling thread, with a `nice` value; false if the system won't (Linux before 5.3 among them), or the
/// thread has a real-time priority.
fn set_turns(nice: i32) -> bool {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0, // the one it has, by the flag
        sched_flags: libc::SCHED_FLAG_KEEP_POLICY as u64,
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
            // Either ends when the windows say so, however long that takes.
            while turns.first == Some(true) {
                std::thread::sleep(Duration::from_micros(100)); // does much, outside of the wait
                turns.wait(|| {});
            }
            assert_eq!(nice(), before);
            while turns.first == Some(false) {
                turns.wait(|| std::thread::sleep(Duration::from_micros(100)));
            }
            assert_eq!(nice(), FIRST);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn who_was_told_to_let_others_go_first_does() {
        std::thread::spawn(|| {
            rustix::process::setpriority_process(None, 5).unwrap(); // of a thread, on Linux
            let mut turns = ShortTurns::take();
            assert_eq!(turns.first, None);
            turns.wait(|| std::thread::sleep(WINDOW));
            assert_eq!(rustix::process::getpriority_process(None).unwrap(), 5);
        })
        .join()
        .unwrap();
    }

    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    #[test]
    fn a_real_time_priority_is_kept() {
        std::thread::spawn(|| {
            let policy = || {
                #[expect(unsafe_code, reason = "no crate in use has this call")]
                // SAFETY: it has no arguments that point anywhere.
                let policy = unsafe { libc::sched_getscheduler(0) };
                policy
            };
            let param = libc::sched_param { sched_priority: 1 };
            #[expect(unsafe_code, reason = "no crate in use has this call")]
            // SAFETY: the kernel reads the structure and keeps nothing of it.
            if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) } != 0 {
                println!("skipped: no permission for a real-time priority (run as root)");
                return;
            }
            assert_eq!(ShortTurns::take().first, None);
            assert_eq!(policy(), libc::SCHED_FIFO);
        })
        .join()
        .unwrap();
    }
}
