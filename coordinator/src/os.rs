//! The only places where this crate reads a clock, asks the system for entropy, or makes private files.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use rand_core::{CryptoRng, RngCore};
use rustix::fs::FlockOperation;
use rustix::time::{ClockId, clock_gettime};
use warren_common::time::{Instant, Now, UnixTime};

/// Reads both clocks.
pub fn now() -> Now {
    let boot = clock_gettime(ClockId::Boottime);
    let wall = clock_gettime(ClockId::Realtime);
    let nanos = |secs: i64, nanos: i64| secs.unsigned_abs() * 1_000_000_000 + nanos.unsigned_abs();
    Now {
        boot: Instant::from_nanos(nanos(boot.tv_sec, boot.tv_nsec)),
        unix: UnixTime::from_micros(wall.tv_sec * 1_000_000 + wall.tv_nsec / 1_000),
    }
}

/// The operating system's generator.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsEntropy;

impl CryptoRng for OsEntropy {}

impl RngCore for OsEntropy {
    fn next_u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.fill_bytes(&mut bytes);
        u32::from_ne_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.fill_bytes(&mut bytes);
        u64::from_ne_bytes(bytes)
    }

    #[expect(clippy::disallowed_methods, reason = "the shell's one generator")]
    #[expect(
        clippy::expect_used,
        reason = "without entropy no key may be made: there is nothing to go on with"
    )]
    fn fill_bytes(&mut self, dest: &mut [u8]) {
        getrandom::fill(dest).expect("the operating system gives entropy");
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand_core::Error> {
        self.fill_bytes(dest);
        Ok(())
    }
}

/// Makes `dir` (mode 0700) if it isn't there, and takes group and others' rights away if they have any.
///
/// # Errors
/// It can't be made, or isn't ours.
pub fn private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// Writes a file of mode 0600 so that a reader sees the old or the new contents whole, also after a power cut.
///
/// # Errors
/// As the file system says; the old contents are still there then.
pub fn write_private(path: &Path, contents: &[u8]) -> io::Result<()> {
    let partial = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// Holds a state directory for one process, until dropped.
#[derive(Debug)]
pub struct DirLock(#[expect(dead_code, reason = "the lock lives as long as the open file")] File);

impl DirLock {
    /// Takes the lock of `dir`; `None` if another process has it.
    ///
    /// # Errors
    /// The lock file can't be made.
    pub fn take(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join("lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_files_are_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        private_dir(&dir).unwrap();
        let path = dir.join("key");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&path)), (0o700, 0o600));
    }

    #[test]
    fn one_process_has_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DirLock::take(dir.path()).unwrap();
        assert!(lock.is_some() && DirLock::take(dir.path()).unwrap().is_none());
        drop(lock);
        assert!(DirLock::take(dir.path()).unwrap().is_some());
    }
}
