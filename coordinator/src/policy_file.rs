//! Watches the policy file and puts each good edit in force. A bad one changes nothing but the status.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;

use warren_common::policy::MAX_POLICY_BYTES;

use crate::domain::{Command, PolicySource, Refusal, Reply};
use crate::server::Handle;

/// How often the file is looked at.
pub const POLL: Duration = Duration::from_millis(250);
/// How long after a change the file is read at each look, since clocks of file systems tick slowly.
const SETTLE: Duration = Duration::from_secs(2);
/// How often a file that was refused is tried again: its tests may pass once a device has joined, or the store works.
const RETRY: Duration = Duration::from_secs(5);

/// What is wrong with the policy source now; `None` if nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyError {
    /// For people, over several lines.
    pub text: Option<String>,
}

/// Reads a policy file whole.
///
/// # Errors
/// It can't be read, is too large or is not UTF-8, for people.
pub fn read(path: &Path) -> Result<String, String> {
    let attempt = || -> io::Result<String> {
        if fs::metadata(path)?.len() > MAX_POLICY_BYTES as u64 {
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
    handle: Handle,
    error: Arc<Mutex<PolicyError>>,
    seen: Option<Stamp>,
    tried: Option<String>,
    changed: Instant,
    retry: Option<Instant>,
}

/// What changes when a file is edited or replaced.
type Stamp = (u64, u64, i64, i64, i64, i64, u64);

impl Watcher {
    /// Watches `path`; what is wrong with it goes to `error`.
    pub fn new(path: PathBuf, handle: Handle, error: Arc<Mutex<PolicyError>>) -> Self {
        Self { path, handle, error, seen: None, tried: None, changed: Instant::now(), retry: None }
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
        match self.handle.command(command).await {
            Ok(Ok(Reply::Policy { revision })) => {
                tracing::info!(revision, "policy in force");
                self.retry = None;
                self.report(None);
            }
            Ok(Ok(_)) | Err(_) => {}
            Ok(Err(refusal)) => {
                self.retry = Some(now + RETRY);
                self.report(Some(match refusal {
                    Refusal::PolicyInvalid(why) => why,
                    other => other.to_string(),
                }));
            }
        }
    }

    fn report(&self, text: Option<String>) {
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        if error.text != text {
            match &text {
                Some(why) => tracing::error!(
                    "the policy file {} is refused, the last accepted policy stays in force: {why}",
                    self.path.display()
                ),
                None => tracing::info!("the policy file {} is good again", self.path.display()),
            }
            error.text = text;
        }
    }
}
