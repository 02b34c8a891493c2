//! A cable with delay, jitter and loss, where the kernel has no netem: two TAP devices, one at each end, and threads of
//! the test's process that carry frames between them.
//!
//! Order is kept, as most networks do. The delay is at least the stated one; a busy machine adds to it, so tests look at
//! medians. The threads end when the devices go with their namespaces.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};

use super::netns;
use super::wait::Stopwatch;

/// Frames under way in one direction; more are dropped, as by a router's full queue. 50 ms of 500 Mbit/s.
const MAX_QUEUED: usize = 2_048;
/// Longest frame: 1 500 bytes and an Ethernet header, with room for a VLAN tag.
const MAX_FRAME: usize = 1_522;

/// What a cable does to frames, in each of its two directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Time on the way.
    pub delay: Duration,
    /// Added to it: evenly distributed from nothing to this.
    pub jitter: Duration,
    /// Frames lost out of a thousand.
    pub loss_per_mille: u32,
}

impl Link {
    /// A cable between two interfaces that this makes, each in its namespace, down and without addresses.
    pub(super) fn lay(self, ends: [(&str, &str); 2]) -> Result<()> {
        ensure!(self.loss_per_mille <= 1_000, "{} of a thousand can't be lost", self.loss_per_mille);
        let open = |(namespace, name): (&str, &str)| -> Result<Arc<File>> {
            let device = netns::enter(namespace, || tap(name))?;
            Ok(Arc::new(device.with_context(|| format!("making the TAP device {name}"))?))
        };
        let [one, other] = [open(ends[0])?, open(ends[1])?];
        self.carry(Arc::clone(&one), Arc::clone(&other));
        self.carry(other, one);
        Ok(())
    }

    /// Starts the two threads of one direction.
    fn carry(self, from: Arc<File>, to: Arc<File>) {
        static SEED: AtomicU64 = AtomicU64::new(1);
        let rng = ChaCha20Rng::seed_from_u64(SEED.fetch_add(1, Ordering::Relaxed));
        let way = Arc::new(Way { clock: Stopwatch::start(), state: Mutex::default(), news: Condvar::new() });
        let taking = Arc::clone(&way);
        std::thread::spawn(move || self.take(&from, &taking, rng));
        std::thread::spawn(move || way.give(&to));
    }

    fn take(self, mut from: &File, way: &Way, mut rng: ChaCha20Rng) {
        let mut buffer = [0; MAX_FRAME];
        let mut last = Duration::ZERO;
        loop {
            let n = match from.read(&mut buffer) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break, // the device is gone
            };
            if rng.next_u32() % 1_000 < self.loss_per_mille {
                continue;
            }
            let jitter = self.jitter.mul_f64(f64::from(rng.next_u32()) / f64::from(u32::MAX));
            last = last.max(way.clock.elapsed() + self.delay + jitter);
            let mut state = way.state();
            if state.frames.len() < MAX_QUEUED {
                state.frames.push_back((last, buffer[..n].to_vec()));
                way.news.notify_one();
            }
        }
        way.state().ended = true;
        way.news.notify_one();
    }
}

/// One direction of a cable.
struct Way {
    clock: Stopwatch,
    state: Mutex<Frames>,
    news: Condvar,
}

#[derive(Default)]
struct Frames {
    /// With the time at which each arrives.
    frames: VecDeque<(Duration, Vec<u8>)>,
    ended: bool,
}

impl Way {
    fn state(&self) -> MutexGuard<'_, Frames> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, mut to: &File) {
        let mut state = self.state();
        loop {
            let due = state.frames.front().map(|(due, _)| due.saturating_sub(self.clock.elapsed()));
            state = match due {
                Some(Duration::ZERO) => {
                    if let Some((_, frame)) = state.frames.pop_front() {
                        drop(state);
                        // A receiver that is down or full loses it.
                        let _ = to.write(&frame);
                    }
                    self.state()
                }
                Some(wait) => self.news.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0,
                None if state.ended => return,
                None => self.news.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Makes a TAP device in the namespace of this thread: one frame for each read and write.
fn tap(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an `ifreq` is plain data, for which all zeros are a value.
    #[expect(unsafe_code, reason = "the C structure has no constructor")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq`, which lives until the call returns.
    #[expect(unsafe_code, reason = "no crate in use has this request")]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}
