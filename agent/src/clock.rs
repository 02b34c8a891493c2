//! The agent's clocks: the only place that reads them, and the timer that runs on the same one.

use std::io;
use std::time::Duration;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use warren_common::time::{Instant, Now, UnixTime};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Reads both clocks.
pub fn now() -> Now {
    let boot = clock_gettime(ClockId::Boottime);
    let wall = clock_gettime(ClockId::Realtime);
    // Neither clock is before its zero, except a wall clock set before 1970: `as_micros` then is negative, as it should be.
    let nanos = |t: Timespec| u64::try_from(t.tv_sec).unwrap_or(0) * 1_000_000_000 + t.tv_nsec as u64;
    Now {
        boot: Instant::from_nanos(nanos(boot)),
        unix: UnixTime::from_micros(wall.tv_sec * 1_000_000 + wall.tv_nsec / 1_000),
    }
}

/// Names this boot of the machine: readings of [`Now::boot`] compare only within one boot.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// One timer on `CLOCK_BOOTTIME`: after a sleep of the machine it fires at once, where tokio's would wait on.
#[derive(Debug)]
pub struct BootTimer {
    fd: AsyncFd<std::os::fd::OwnedFd>,
    armed: Option<Instant>,
}

impl BootTimer {
    /// A timer that never fires.
    ///
    /// # Errors
    /// The kernel has no file descriptor left.
    #[expect(unsafe_code, reason = "registering a raw descriptor with the runtime")]
    pub fn new() -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // SAFETY: `fd` is an open descriptor that nothing else owns; the `AsyncFd` keeps it and never hands it out.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)?;
        Ok(Self { fd, armed: None })
    }

    /// Fires at `at` or, if it is armed already, at most a little earlier: a later deadline than the armed one costs no
    /// system call, and a caller that wakes early just sets the timer again.
    ///
    /// # Errors
    /// Only if the kernel refuses the time.
    pub fn set(&mut self, at: Instant) -> io::Result<()> {
        if self.armed.is_some_and(|armed| armed <= at) {
            return Ok(());
        }
        // All zero disarms, so a deadline in the past is the first nanosecond after boot.
        let nanos = at.as_nanos().clamp(1, i64::MAX as u64);
        let value =
            Timespec { tv_sec: (nanos / 1_000_000_000) as i64, tv_nsec: (nanos % 1_000_000_000) as i64 };
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(self.fd.get_ref(), TimerfdTimerFlags::ABSTIME, &spec)?;
        self.armed = Some(at);
        Ok(())
    }

    /// Waits until the timer fires. Cancel safe.
    pub async fn fired(&mut self) {
        loop {
            let Ok(mut guard) = self.fd.readable().await else {
                return; // the runtime is shutting down
            };
            let mut count = [0; 8];
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut count)?)) {
                Ok(_) => {
                    self.armed = None;
                    return;
                }
                Err(_would_block) => {}
            }
        }
    }
}

/// Longest the agent sleeps without looking at its clocks again: bounds the delay of wall-clock work
/// (policy windows, lease ends across reboots) after the wall clock jumps.
pub const MAX_SLEEP: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_move_forward() {
        let (a, b) = (now(), now());
        assert!(b.boot >= a.boot && a.unix > UnixTime::from_secs(1_600_000_000));
        assert_eq!(boot_id().unwrap().len(), 36);
    }

    #[tokio::test]
    async fn the_timer_fires_at_its_deadline_also_a_past_one() {
        let mut timer = BootTimer::new().unwrap();
        let deadline = now().boot + Duration::from_millis(5);
        timer.set(deadline).unwrap();
        timer.set(deadline + Duration::from_secs(60)).unwrap();
        timer.fired().await;
        assert!(now().boot >= deadline);
        timer.set(Instant::ZERO).unwrap();
        timer.fired().await;
    }
}
