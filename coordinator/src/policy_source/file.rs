//! Watches the policy file and puts each good edit in force. A bad one changes nothing but the status.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;
use warren_common::policy::MAX_POLICY_BYTES;

use super::{Active, Report};
use crate::domain::{Command, PolicySource, Refusal};

/// How often the file is looked at.
pub const POLL: Duration = Duration::from_millis(250);
/// How long after a change the file is read at each look, since clocks of file systems tick slowly.
const SETTLE: Duration = Duration::from_secs(2);
/// How often a file that was refused is tried again: its tests may pass once a device has joined, or the store works.
const RETRY: Duration = Duration::from_secs(5);

/// Reads a policy file whole.
///
/// # Errors
/// It can't be read, is no file, is too large or is not UTF-8, for people.
pub fn read(path: &Path) -> Result<String, String> {
    let attempt = || -> io::Result<String> {
        let meta = fs::metadata(path)?;
        if !meta.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        if meta.len() > MAX_POLICY_BYTES as u64 {
            return Err(io::Error::other(format!("it is longer than {MAX_POLICY_BYTES} bytes")));
        }
        fs::read_to_string(path)
    };
    attempt().map_err(|e| format!("can't read the policy file {}: {e}", path.display()))
}

/// The watcher of one file.
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    active: Active,
    seen: Option<Stamp>,
    tried: Option<String>,
    changed: Instant,
    retry: Option<Instant>,
}

/// What changes when a file is edited or replaced.
type Stamp = (u64, u64, i64, i64, i64, i64, u64);

impl Watcher {
    /// Watches `path`, which `active` names.
    pub fn new(path: PathBuf, active: Active) -> Self {
        Self { path, active, seen: None, tried: None, changed: Instant::now(), retry: None }
    }

    /// Watches until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval(POLL);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => self.look().await,
            }
        }
    }

    /// Looks once, now; the first look puts the file in force at the start.
    pub async fn look(&mut self) {
        let now = Instant::now();
        let stamp = fs::metadata(&self.path)
            .ok()
            .map(|m| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec(), m.len()));
        if stamp != self.seen || self.tried.is_none() {
            self.seen = stamp;
            self.changed = now;
        }
        let retry = self.retry.is_some_and(|at| now >= at);
        if !retry && now.duration_since(self.changed) > SETTLE {
            return;
        }
        let text = match read(&self.path) {
            Ok(text) => text,
            Err(error) => {
                self.tried = Some(String::new());
                self.retry = Some(now + RETRY);
                return self.report(Some(error));
            }
        };
        if !retry && self.tried.as_ref() == Some(&text) {
            return;
        }
        let source = PolicySource::File(self.path.display().to_string());
        let command = Command::SetPolicy { source, text: text.clone() };
        self.tried = Some(text);
        match self.active.command(command).await {
            Ok(Ok(revision)) => {
                tracing::info!(revision, "policy in force");
                self.retry = None;
                self.report(None);
            }
            Err(_) => {} // stopping
            Ok(Err(refusal)) => {
                self.retry = Some(now + RETRY);
                self.report(Some(match refusal {
                    Refusal::PolicyInvalid(why) => why,
                    other => other.to_string(),
                }));
            }
        }
    }

    fn report(&self, error: Option<String>) {
        self.active.report(Report { error, ..Report::default() });
    }
}
