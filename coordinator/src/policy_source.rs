//! Where the policy comes from: a watched file, a followed git repository, or the API. Exactly one is active.
//!
//! Whatever the active source holds, the last accepted policy stays in force until a better one is accepted, also over
//! a restart. What is wrong with the source is a [`Report`], for `policy status` and the health list.

pub mod file;
pub mod git;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use data_encoding::HEXLOWER;
use serde_json::{Value, json};
use warren_common::time::UnixTime;

use crate::domain::{Command, PolicySource, Refusal, Reply, State};
use crate::server::{Handle, Stopping};
use git::GitOptions;

/// The source that is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `policy set` and the HTTP API.
    Api,
    /// A file of this host.
    File(PathBuf),
    /// A branch of a repository.
    Git(Box<GitOptions>),
}

/// What the active source has found last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Why what it holds now is not in force; `None` if it is.
    pub error: Option<String>,
    /// The newest commit of a repository.
    pub head: Option<String>,
    /// When a repository was looked at.
    pub checked: Option<UnixTime>,
}

/// The active source, for everybody who asks about it or wants to write through it.
#[derive(Clone, Debug)]
pub struct Active(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    source: Source,
    handle: Handle,
    report: Mutex<Report>,
}

impl Active {
    /// The one source of the coordinator behind `handle`.
    pub fn new(source: Source, handle: Handle) -> Self {
        Self(Arc::new(Shared { source, handle, report: Mutex::default() }))
    }

    /// Which it is.
    pub fn source(&self) -> &Source {
        &self.0.source
    }

    /// What it has found last.
    pub fn found(&self) -> Report {
        self.locked().clone()
    }

    /// Puts a policy from outside in force, if the API is the active source and the policy in force is still the one
    /// with the SHA-256 `expected` (none, if that is `Some(None)`): its number.
    ///
    /// # Errors
    /// Stopping; the inner error says why the policy is refused.
    pub async fn put(
        &self,
        text: String,
        expected: Option<Option<[u8; 32]>>,
    ) -> Result<Result<u64, Refusal>, Stopping> {
        let command = match (self.source(), expected) {
            (Source::File(path), _) => {
                return Ok(Err(Refusal::PolicySourceIsFile(path.display().to_string())));
            }
            (Source::Git(git), _) => return Ok(Err(Refusal::PolicySourceIsGit(git.url.as_str().to_owned()))),
            (Source::Api, None) => Command::SetPolicy { source: PolicySource::Api, text },
            (Source::Api, Some(expected)) => Command::EditPolicy { text, expected },
        };
        self.command(command).await
    }

    /// `policy status`: what is in force, where policy comes from, and what is wrong with what is there now.
    ///
    /// # Errors
    /// Stopping.
    pub async fn status(&self) -> Result<Value, Stopping> {
        let this = self.clone();
        self.0
            .handle
            .look(move |c, _| status(c.state(), this.source(), &this.found(), c.policy_error()))
            .await
    }

    fn handle(&self) -> &Handle {
        &self.0.handle
    }

    /// Puts what the source holds in force: the number of the policy in force then.
    async fn command(&self, command: Command) -> Result<Result<u64, Refusal>, Stopping> {
        Ok(match self.0.handle.command(command).await? {
            Ok(Reply::Policy { revision }) => Ok(revision),
            Ok(_) => Ok(0), // no command of ours has another reply
            Err(refusal) => Err(refusal),
        })
    }

    /// Remembers what the source has found, and logs what is new about it.
    fn report(&self, new: Report) {
        let mut old = self.locked();
        let name = self.source().to_string();
        match (&old.error, &new.error) {
            (before, Some(why)) if before.as_ref() != Some(why) => {
                tracing::error!("{name} is refused, the last accepted policy stays in force: {why}");
            }
            (Some(_), None) => tracing::info!("{name} is good again"),
            _ => {}
        }
        *old = new;
    }

    fn locked(&self) -> MutexGuard<'_, Report> {
        self.0.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Api => f.write_str("the policy API"),
            Self::File(path) => write!(f, "the policy file {}", path.display()),
            Self::Git(git) => write!(f, "the policy repository {}", git.url.as_str()),
        }
    }
}

/// What is doubtful about the policy in force: its commits have no good signatures.
pub fn doubts(state: &State) -> &[String] {
    match state.policy().map(|p| &p.source) {
        Some(PolicySource::Git(commit)) => &commit.warnings,
        _ => &[],
    }
}

/// The document of `policy status`. Fields are only ever added; those that don't apply are `null`.
fn status(state: &State, source: &Source, found: &Report, compile_error: Option<&str>) -> Value {
    let policy = state.policy();
    let in_force = policy.map(|p| match &p.source {
        PolicySource::Api => "api",
        PolicySource::File(_) => "file",
        PolicySource::Git(_) => "git",
    });
    let mut value = json!({
        "source": match source {
            Source::Api => "api",
            Source::File(_) => "file",
            Source::Git(_) => "git",
        },
        "path": match source {
            Source::Api => Value::Null,
            Source::File(path) => json!(path.display().to_string()),
            Source::Git(git) => json!(git.path.as_str()),
        },
        "revision": policy.map_or(0, |p| p.revision),
        "applied_at": policy.map(|p| p.applied.to_rfc3339()),
        "applied_from": in_force,
        "sha256": policy.map(|p| HEXLOWER.encode(&p.sha256)),
        "error": found.error.as_deref().or(compile_error),
        "warnings": doubts(state),
    });
    if let Source::Git(git) = source {
        let applied = policy.and_then(|p| match &p.source {
            PolicySource::Git(commit) => Some(commit),
            PolicySource::Api | PolicySource::File(_) => None,
        });
        value["url"] = json!(git.url.as_str());
        value["branch"] = json!(git.branch.to_string());
        value["commit"] = json!(applied.map(|c| &c.commit));
        value["signer"] = json!(applied.and_then(|c| c.signer.as_ref()));
        value["head"] = json!(found.head);
        value["checked_at"] = json!(found.checked.map(UnixTime::to_rfc3339));
    }
    value
}
