//! What is kept for a restart while the coordinator is away: relay tokens, and where peers were reached.
//!
//! It is saved a moment after it changed, beside everything else: no control event waits for it, and losing it costs
//! only time.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::JoinHandle;
use warren_common::ids::RelayId;
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::Signed;
use warren_common::wire::token::RelayToken;
use warren_engine::engine::Engine;
use warren_engine::paths::{CANDIDATE_AGE, PathHint};

use super::Up;
use crate::state::Resume;

/// Changes come in bursts (a new path, then a better one): they are saved together.
const SETTLE: Duration = Duration::from_secs(1);

pub(super) struct Keep {
    /// What is on disk, or on its way there.
    saved: Resume,
    /// The latest token of each relay that we are connected to, or want to be.
    tokens: BTreeMap<RelayId, Signed>,
    /// Tokens of the last run, each until its relay is connected to.
    restored: BTreeMap<RelayId, Signed>,
    /// When to see whether anything has changed.
    due: Option<Instant>,
    task: Option<JoinHandle<()>>,
}

impl Keep {
    pub(super) fn new(saved: Resume) -> Self {
        let tokens = saved.tokens.clone();
        Self { saved, restored: tokens.clone(), tokens, due: None, task: None }
    }

    /// Paths may have changed.
    pub(super) fn changed(&mut self, now: Instant) {
        self.due.get_or_insert(now + SETTLE);
    }

    /// When [`Up::keep_if_due`] has something to do.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn token(&mut self, now: Instant, relay: RelayId, token: Signed) {
        self.tokens.insert(relay, token);
        self.changed(now);
    }

    /// The relay is left, or gone from the netmap.
    pub(super) fn forget_token(&mut self, now: Instant, relay: RelayId) {
        if self.tokens.remove(&relay).is_some() {
            self.changed(now);
        }
    }

    /// Paths of the last run, unless it ended too long ago for them to mean anything.
    pub(super) fn paths(&self, now: UnixTime) -> &[PathHint] {
        if now.since(self.saved.at) < CANDIDATE_AGE { &self.saved.paths } else { &[] }
    }

    /// Waits for a save under way.
    pub(super) async fn settle(&mut self) {
        if let Some(task) = self.task.take() {
            let _ = task.await; // it has told its own failure
        }
    }
}

impl Up {
    /// A token of the last run, if it is good still. Given out once: from then on the coordinator is asked.
    pub(super) fn restored_token(&mut self, now: Now, relay: RelayId) -> Option<Signed> {
        let token = self.keep.restored.remove(&relay)?;
        let key = self.identity.as_ref()?.netmap;
        RelayToken::verify(&token, &key).is_ok_and(|t| t.expires > now.unix).then_some(token)
    }

    /// What to keep, as it is now.
    pub(super) fn resume(&self, now: Now) -> Resume {
        let netmap = self.engine.as_ref().and_then(Engine::netmap);
        let known = |relay: &RelayId| netmap.is_some_and(|m| m.relays.contains_key(relay));
        Resume {
            at: now.unix,
            tokens: self.keep.tokens.iter().filter(|(r, _)| known(r)).map(|(r, t)| (*r, t.clone())).collect(),
            paths: self.engine.as_ref().map_or_else(Vec::new, Engine::path_hints),
        }
    }

    pub(super) fn keep_if_due(&mut self, now: Now) {
        if self.keep.due.is_none_or(|at| at > now.boot) {
            return;
        }
        if self.keep.task.as_ref().is_some_and(|task| !task.is_finished()) {
            self.keep.due = Some(now.boot + SETTLE);
            return;
        }
        self.keep.due = None;
        let resume = self.resume(now);
        if (&resume.tokens, &resume.paths) == (&self.keep.saved.tokens, &self.keep.saved.paths) {
            return;
        }
        self.keep.saved = resume.clone();
        let dir = self.dir.clone();
        self.keep.task = Some(tokio::task::spawn_blocking(move || {
            if let Err(problem) = dir.save_resume(&resume) {
                tracing::warn!("what a restart would need is not saved: {}", problem.text);
            }
        }));
    }
}
