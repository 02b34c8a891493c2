//! The policy as a file in a git repository: followed by polling and by webhook, every new commit's signature checked.
//!
//! A commit is put in force when it comes after the one in force, everything between them is signed by somebody who
//! may, the file is there, and the policy passes its own tests. Anything else changes nothing but `policy status`.

mod commit;
mod mirror;
mod signers;
mod sshsig;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Active, Report};
use crate::domain::{Command, GitCommit, PolicySource, Refusal};
use crate::os;
use crate::server::Stopping;

pub use commit::{CommitId, MAX_COMMIT, Untrusted};
pub use mirror::{
    FETCH_PATIENCE, GIT_PATIENCE, GitError, MAX_COMMITS_BYTES, MAX_MIRROR, MAX_NEW_COMMITS, Mirror,
};
pub use signers::{AllowedSigners, MAX_SIGNERS, MAX_SIGNERS_BYTES, NoSigner, SignersError};
pub use sshsig::{MAX_SIGNATURE, PublicKey, SignatureError, verify};

pub(crate) use mirror::read_secret;

/// How often a repository is looked at unless told otherwise.
pub const DEFAULT_POLL: Duration = Duration::from_secs(60);
/// The shortest time between two looks at the repository.
pub const MIN_POLL: Duration = Duration::from_secs(1);
/// The longest.
pub const MAX_POLL: Duration = Duration::from_secs(24 * 3_600);
/// The shortest time between two looks that webhooks ask for.
const HOOK_PAUSE: Duration = Duration::from_millis(250);
/// Most commits whose faults are listed in `policy status`.
const MAX_FAULTS: usize = 8;

/// What is followed, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GitOptions {
    /// The repository.
    pub url: GitUrl,
    /// The branch.
    pub branch: Branch,
    /// The policy file in it.
    pub path: RepoPath,
    /// How often it is looked at: [`MIN_POLL`] to [`MAX_POLL`].
    pub poll: Duration,
    /// What unsigned commits lead to.
    pub signatures: Signatures,
    /// Whose signatures count.
    pub allowed_signers: Option<PathBuf>,
    /// Follow the branch also when its history was rewritten.
    pub allow_rewrite: bool,
    /// File with the secret that webhooks prove they know.
    pub webhook_secret: Option<PathBuf>,
    /// File with the token for an https URL.
    pub token: Option<PathBuf>,
    /// Private key for an ssh URL.
    pub ssh_key: Option<PathBuf>,
    /// Host keys for an ssh URL; ssh's global file if `None`.
    pub known_hosts: Option<PathBuf>,
}

/// What unsigned commits lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Signatures {
    /// Signatures are not looked at
    Off,
    /// Commits without a good signature are applied, and `policy status` says so
    Warn,
    /// Every commit must be signed by an allowed signer
    Required,
}

/// How a repository is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// A directory of this host.
    File,
    /// HTTP over TLS.
    Https,
    /// OpenSSH.
    Ssh,
}

impl Scheme {
    /// Git's word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Https => "https",
            Self::Ssh => "ssh",
        }
    }
}

/// Where a repository is: `https://…`, `ssh://…`, `user@host:path`, or an absolute path. Never with a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GitUrl {
    text: String,
    scheme: Scheme,
}

impl GitUrl {
    /// As given.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// How it is reached.
    pub const fn scheme(&self) -> Scheme {
        self.scheme
    }
}

impl FromStr for GitUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            "not the URL of a repository that can be followed: expected https://HOST/PATH, ssh://USER@HOST/PATH, \
             USER@HOST:PATH or an absolute path"
                .to_owned()
        };
        let strange = |c: char| c.is_whitespace() || c.is_control();
        if text.contains(strange) || text.starts_with('-') {
            return Err(wrong());
        }
        let host_of = |rest: &str| rest.split('/').next().unwrap_or_default().to_owned();
        let scheme = match text.split_once("://") {
            Some(("https", rest)) if host_of(rest).contains('@') => {
                return Err(
                    "put the password or token into a file and name it with --policy-git-token-file".into()
                );
            }
            Some(("https", rest)) if !host_of(rest).is_empty() => Scheme::Https,
            Some(("ssh", rest)) => {
                let host = host_of(rest);
                let (user, host) = host.split_once('@').unwrap_or(("", &host));
                if host.is_empty() || host.starts_with('-') || user.contains(':') {
                    return Err(wrong());
                }
                Scheme::Ssh
            }
            Some(("file", rest)) if rest.starts_with('/') => Scheme::File,
            Some(_) => return Err(wrong()),
            None if text.starts_with('/') => Scheme::File,
            None => match text.split_once(':') {
                Some((host, path)) if !host.contains('/') && !path.is_empty() => match host.split_once('@') {
                    Some((_, host)) if !host.is_empty() && !host.starts_with('-') => Scheme::Ssh,
                    _ => return Err(wrong()),
                },
                _ => return Err(wrong()),
            },
        };
        Ok(Self { text: text.to_owned(), scheme })
    }
}

/// A branch's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branch(String);

impl Default for Branch {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl FromStr for Branch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/+".contains(c);
        let bad_part =
            |p: &str| p.is_empty() || p.starts_with(['.', '-']) || p.ends_with('.') || p.ends_with(".lock");
        if text.len() > 255
            || text.contains("..")
            || !text.chars().all(allowed)
            || text.split('/').any(bad_part)
        {
            return Err(format!("`{text}` is not the name of a branch: expected a name such as main"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Display for Branch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The path of a file in a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoPath(String);

impl RepoPath {
    /// As given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for RepoPath {
    fn default() -> Self {
        Self("policy.hujson".to_owned())
    }
}

impl FromStr for RepoPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad_part = |p: &str| matches!(p, "" | "." | "..") || p.starts_with(':');
        if text.len() > 4_096 || text.chars().any(char::is_control) || text.split('/').any(bad_part) {
            return Err(format!(
                "`{text}` is not the path of a file in a repository: expected one such as policy.hujson"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Follows one branch.
#[derive(Debug)]
pub struct Follower {
    options: GitOptions,
    mirror: Mirror,
    active: Active,
    wake: Arc<Notify>,
}

/// What one look has found.
struct Look {
    head: Option<CommitId>,
    error: Option<String>,
}

impl Look {
    const fn failed(head: Option<CommitId>, error: String) -> Self {
        Self { head, error: Some(error) }
    }
}

impl Follower {
    /// Follows as `options` say; a webhook asks for a look through `wake`.
    pub const fn new(options: GitOptions, mirror: Mirror, active: Active, wake: Arc<Notify>) -> Self {
        Self { options, mirror, active, wake }
    }

    /// Follows until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                looked = self.look() => if looked.is_err() { return },
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.options.poll) => {}
                () = async { tokio::time::sleep(HOOK_PAUSE).await; self.wake.notified().await } => {}
            }
        }
    }

    /// Looks once, now, and puts in force what may be.
    ///
    /// # Errors
    /// The coordinator is stopping.
    pub async fn look(&self) -> Result<(), Stopping> {
        let look = match self.mirror.fetch().await {
            Ok(head) => self.consider(head).await?,
            Err(error) => Look::failed(None, error.to_string()),
        };
        self.active.report(Report {
            error: look.error,
            head: look.head.map(|id| id.to_string()),
            checked: Some(os::now().unix),
        });
        Ok(())
    }

    async fn consider(&self, head: CommitId) -> Result<Look, Stopping> {
        let in_force = self.in_force().await?;
        let same_branch = in_force
            .as_ref()
            .filter(|c| c.url == self.options.url.as_str() && c.branch == self.options.branch.0);
        let applied = same_branch.and_then(|c| CommitId::parse(&c.commit));
        let same_file = same_branch.is_some_and(|c| c.path == self.options.path.0);
        if same_file && applied.as_ref() == Some(&head) {
            return Ok(Look { head: Some(head), error: None });
        }
        let checked = match self.check(&head, applied.as_ref()).await {
            Ok(checked) => checked,
            Err(error) => {
                return Ok(Look::failed(
                    Some(head.clone()),
                    format!("commit {} is refused: {error}", head.short()),
                ));
            }
        };
        let source = PolicySource::Git(Box::new(GitCommit {
            url: self.options.url.text.clone(),
            branch: self.options.branch.0.clone(),
            path: self.options.path.0.clone(),
            commit: head.to_string(),
            signer: checked.signer,
            warnings: checked.warnings.clone(),
        }));
        let command = Command::SetPolicy { source, text: checked.text };
        match self.active.command(command).await? {
            Ok(revision) => {
                tracing::info!(revision, commit = %head, "policy in force");
                checked
                    .warnings
                    .iter()
                    .for_each(|why| tracing::warn!("the policy in force is doubtful: {why}"));
                let kept = self.mirror.keep(&head).await;
                // Without it, a rewritten history may be taken for a foreign one after some months.
                if let Err(error) = kept {
                    tracing::warn!(%error, "the applied commit is not marked in the mirror");
                }
                Ok(Look { head: Some(head), error: None })
            }
            Err(refusal) => {
                let why = match refusal {
                    Refusal::PolicyInvalid(why) => format!("commit {} is refused:\n{why}", head.short()),
                    other => other.to_string(),
                };
                Ok(Look::failed(Some(head), why))
            }
        }
    }

    async fn in_force(&self) -> Result<Option<GitCommit>, Stopping> {
        let source = self.active.handle().look(|c, _| c.state().policy().map(|p| p.source.clone())).await?;
        Ok(match source {
            Some(PolicySource::Git(commit)) => Some(*commit),
            Some(PolicySource::File(_) | PolicySource::Api) | None => None,
        })
    }

    /// The text of a commit that may be put in force after `applied`.
    async fn check(&self, head: &CommitId, applied: Option<&CommitId>) -> Result<Checked, String> {
        let told = |e: GitError| e.to_string();
        let mut base = None;
        if let Some(old) = applied {
            let known = self.mirror.has(old).await.map_err(told)?;
            let after = known && self.mirror.descends(old, head).await.map_err(told)?;
            if !after && !self.options.allow_rewrite {
                return Err(format!(
                    "the history was rewritten: it does not come after commit {}, which is in force. Put it back, or \
                     start the coordinator with --policy-git-allow-rewrite",
                    old.short()
                ));
            }
            base = Some(old).filter(|_| known);
        }
        let (signer, warnings) = self.signatures(head, base).await?;
        let text = self.mirror.file(head).await.map_err(told)?;
        Ok(Checked { text, signer, warnings })
    }

    /// Who signed `head`, and what is wrong with signatures since `base` if that is not refused.
    async fn signatures(
        &self,
        head: &CommitId,
        base: Option<&CommitId>,
    ) -> Result<(Option<String>, Vec<String>), String> {
        let signers = match (self.options.signatures, &self.options.allowed_signers) {
            (Signatures::Off, _) => return Ok((None, Vec::new())),
            (_, Some(path)) => AllowedSigners::read(path).map_err(|e| e.to_string()),
            (_, None) => Ok(AllowedSigners::default()),
        };
        let signers = match (signers, self.options.signatures) {
            (Ok(signers), _) => signers,
            (Err(why), Signatures::Required) => return Err(why),
            (Err(why), _) => return Ok((None, vec![why])),
        };
        let commits = self.mirror.new_commits(head, base).await.map_err(|e| e.to_string())?;
        let now = os::now().unix.as_secs();
        let (mut signer, mut faults) = (None, Vec::new());
        for (id, raw) in &commits {
            match commit::signer(raw, &signers, now) {
                Ok(who) if id == head => signer = Some(who.to_owned()),
                Ok(_) => {}
                Err(why) => faults.push(format!("commit {} has no good signature: {why}", id.short())),
            }
        }
        let more = faults.len().saturating_sub(MAX_FAULTS);
        faults.truncate(MAX_FAULTS);
        if more > 0 {
            faults.push(format!("and {more} more"));
        }
        match self.options.signatures {
            Signatures::Required if !faults.is_empty() => Err(faults.join("; ")),
            _ => Ok((signer, faults)),
        }
    }
}

/// A commit that may be put in force.
struct Checked {
    text: String,
    signer: Option<String>,
    warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever a repository or a file holds, it is judged and nothing panics.
        #[test]
        fn hostile_bytes_are_refused(
            raw in prop::collection::vec(any::<u8>(), 0..400),
            text in "(?s).{0,200}",
            line in r#"[a-z@*,! ="]{0,12} ?(namespaces|valid-before|cert-authority)?=?"?[0-9Z]{0,14}"? ?(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp256)? ?[A-Za-z0-9+/=]{0,80}"#,
        ) {
            let signers = AllowedSigners::default();
            prop_assert!(commit::signer(&raw, &signers, 0).is_err());
            let object = [b"committer A <a> 1 +0000\ngpgsig ".as_slice(), &raw, b"\n\nmessage"].concat();
            prop_assert!(commit::signer(&object, &signers, 0).is_err());
            prop_assert!(verify(&text, b"message").is_err());
            let blob = data_encoding::BASE64.encode(&[b"SSHSIG\0\0\0\x01".as_slice(), &raw].concat());
            let armoured = format!("-----BEGIN SSH SIGNATURE-----\n{blob}\n-----END SSH SIGNATURE-----");
            prop_assert!(verify(&armoured, b"message").is_err());
            let _ = AllowedSigners::parse(&text);
            let _ = AllowedSigners::parse(&line);
            let (url, branch, path) = (text.parse::<GitUrl>(), text.parse::<Branch>(), text.parse::<RepoPath>());
            // Nothing that could be taken for an option reaches git.
            prop_assert!(url.is_err() || !text.starts_with('-'));
            prop_assert!(branch.is_err() || !text.starts_with('-'));
            prop_assert!(path.is_err() || !text.starts_with(':'));
        }
    }

    #[test]
    fn urls() {
        let scheme = |text: &str| text.parse::<GitUrl>().map(|url| url.scheme());
        assert_eq!(scheme("https://git.example/team/policy.git"), Ok(Scheme::Https));
        assert_eq!(scheme("ssh://git@git.example:2222/policy"), Ok(Scheme::Ssh));
        assert_eq!(scheme("git@git.example:team/policy.git"), Ok(Scheme::Ssh));
        assert_eq!(scheme("/srv/policy.git"), Ok(Scheme::File));
        assert_eq!(scheme("file:///srv/policy.git"), Ok(Scheme::File));
        for bad in [
            "http://git.example/x",
            "git://git.example/x",
            "ext::sh -c id",
            "ext::id",
            "--upload-pack=id",
            "https://",
            "ssh://-oProxyCommand=id/x",
            "ssh://a:b@host/x",
            "git@-oProxyCommand=id:x",
            "relative/path",
            "file://host/x",
            "https://git.example/a b",
            "",
        ] {
            assert!(scheme(bad).is_err(), "{bad}");
        }
        let with_password = "https://ann:secret@git.example/x".parse::<GitUrl>().unwrap_err();
        assert!(with_password.contains("token-file") && !with_password.contains("secret"));
    }

    #[test]
    fn branches_and_paths() {
        for good in ["main", "release/1.x", "a-b_c+d"] {
            assert!(good.parse::<Branch>().is_ok(), "{good}");
        }
        for bad in ["", "-f", "a..b", "a/", "/a", "a b", "a:b", "a~1", "a^", "x.lock", ".a", "a/.b", "@{-1}"]
        {
            assert!(bad.parse::<Branch>().is_err(), "{bad}");
        }
        for good in ["policy.hujson", "net/prod/policy.hujson", "with blank"] {
            assert!(good.parse::<RepoPath>().is_ok(), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", ":(top)x", "a\nb"] {
            assert!(bad.parse::<RepoPath>().is_err(), "{bad}");
        }
    }
}
