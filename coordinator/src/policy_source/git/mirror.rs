//! The bare mirror of the policy's branch in the state directory, kept by the system's `git`.
//!
//! What comes from the remote side is parsed by a process of its own, which is locked down: an empty environment, no
//! configuration but ours, no hooks, one transport, no prompts, no redirects, bounded time and bounded output. The
//! reason for `git` and not a library is in docs/adr/0012.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use data_encoding::BASE64;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;
use warren_common::policy::MAX_POLICY_BYTES;

use super::commit::{CommitId, MAX_COMMIT};
use super::{GitOptions, Scheme};
use crate::os;

/// How long fetching may take.
pub const FETCH_PATIENCE: Duration = Duration::from_secs(120);
/// How long anything else may take.
pub const GIT_PATIENCE: Duration = Duration::from_secs(30);
/// Largest mirror, in bytes: far beyond any repository of policies.
pub const MAX_MIRROR: u64 = 1 << 30;
/// Most commits that may be new at once: each is checked.
pub const MAX_NEW_COMMITS: usize = 10_000;
/// What all new commit objects may take together, in bytes.
pub const MAX_COMMITS_BYTES: usize = 64 << 20;
/// How much of what git says on stderr is kept, in bytes.
const MAX_STDERR: usize = 2_048;
/// How often the mirror's size is looked at while it grows.
const SIZE_INTERVAL: Duration = Duration::from_millis(500);

/// The remote branch, as fetched last.
const HEAD: &str = "refs/warren/head";
/// What is in force: keeps the commit from being collected after the branch was rewritten.
const APPLIED: &str = "refs/warren/applied";

/// Variables of our environment that reach git: how to get out, and whom to trust there.
const KEPT: [&str; 12] = [
    "PATH",
    "TMPDIR",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
    "GIT_SSL_CAPATH",
];

/// Configuration that holds for each run, whatever a file says.
const CONFIG: [&str; 16] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "protocol.allow=never",
    "http.followRedirects=false",
    "http.lowSpeedLimit=1000",
    "http.lowSpeedTime=30",
    "credential.helper=",
    "transfer.credentialsInUrl=die",
    "transfer.bundleURI=false",
    "transfer.fsckObjects=true",
    "fetch.recurseSubmodules=false",
    "fetch.writeCommitGraph=false",
    // Housekeeping runs inside the fetch and its time, not behind our back.
    "gc.autoDetach=false",
    "maintenance.autoDetach=false",
    "gc.pruneExpire=now",
    "gc.reflogExpire=now",
];

/// What went wrong with git.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// There is none.
    #[error("git can't be started ({0}); install it, or use --policy FILE")]
    NotStarted(std::io::Error),
    /// Its directory can't be used.
    #[error("the mirror {path} can't be used: {why}")]
    Mirror {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        why: std::io::Error,
    },
    /// A file with a secret for the remote side can't be used.
    #[error("can't read {path}: {why}")]
    Secret {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It said no.
    #[error("git can't {what}: {said}")]
    Failed {
        /// What it was to do.
        what: &'static str,
        /// What it said.
        said: String,
    },
    /// It took too long.
    #[error("git took more than {} s to {what}", .after.as_secs())]
    TimedOut {
        /// What it was to do.
        what: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// It said, or the repository holds, more than is sound.
    #[error("the repository has {0}, which is more than is accepted here")]
    TooMuch(&'static str),
    /// It said something that makes no sense.
    #[error("git's answer to {0} makes no sense")]
    Nonsense(&'static str),
    /// The path names no file in that commit.
    #[error("there is no file {path} in commit {commit}")]
    NoFile {
        /// The path.
        path: String,
        /// The commit, short.
        commit: String,
    },
    /// The file can't be a policy.
    #[error("{path} in commit {commit} {why}")]
    BadFile {
        /// The path.
        path: String,
        /// The commit, short.
        commit: String,
        /// What is wrong.
        why: &'static str,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Mirror {
    dir: PathBuf,
    options: GitOptions,
}

struct Output {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

/// What one run of git is for, and what it may take.
struct Run<'r> {
    what: &'static str,
    stdin: &'r [u8],
    max_stdout: usize,
    patience: Duration,
    remote: bool,
}

impl Run<'static> {
    /// A short answer from the mirror itself.
    const fn local(what: &'static str) -> Self {
        Self { what, stdin: b"", max_stdout: 4_096, patience: GIT_PATIENCE, remote: false }
    }
}

impl Mirror {
    /// The mirror in `dir`, which the first fetch makes.
    pub const fn new(dir: PathBuf, options: GitOptions) -> Self {
        Self { dir, options }
    }

    /// Fetches the branch: its newest commit.
    ///
    /// # Errors
    /// No git, no mirror, the remote side can't be reached, there is no such branch, or it is too large.
    pub async fn fetch(&self) -> Result<CommitId, GitError> {
        os::private_dir(&self.dir).map_err(|why| GitError::Mirror { path: self.dir.clone(), why })?;
        let args = ["init", "--quiet", "--bare", "--object-format=sha1", "--template=", "."];
        self.ok(&args, Run::local("make a mirror")).await?;
        let refspec = format!("+refs/heads/{}:{HEAD}", self.options.branch);
        let args = [
            "fetch",
            "--quiet",
            "--no-tags",
            "--no-write-fetch-head",
            "--no-recurse-submodules",
            "--",
            self.options.url.as_str(),
            &refspec,
        ];
        let run = Run { patience: FETCH_PATIENCE, remote: true, ..Run::local("fetch the branch") };
        let grown = async {
            loop {
                tokio::time::sleep(SIZE_INTERVAL).await;
                if size_of(&self.dir.join("objects")) > MAX_MIRROR {
                    return;
                }
            }
        };
        tokio::select! {
            done = self.ok(&args, run) => done?,
            () = grown => return Err(GitError::TooMuch("more than 1 GiB of history")),
        };
        let head = self
            .ok(
                &["rev-parse", "--verify", "--quiet", &format!("{HEAD}^{{commit}}")],
                Run::local("find the branch"),
            )
            .await?;
        id_in(&head).ok_or(GitError::Nonsense("rev-parse"))
    }

    /// True if the mirror holds this commit.
    ///
    /// # Errors
    /// Git fails.
    pub async fn has(&self, commit: &CommitId) -> Result<bool, GitError> {
        let name = format!("{commit}^{{commit}}");
        self.yes(&["cat-file", "-e", &name], &[1, 128], Run::local("look for a commit")).await
    }

    /// True if `new` comes after `old`.
    ///
    /// # Errors
    /// Git fails.
    pub async fn descends(&self, old: &CommitId, new: &CommitId) -> Result<bool, GitError> {
        let args = ["merge-base", "--is-ancestor", old.as_str(), new.as_str()];
        self.yes(&args, &[1], Run::local("compare two commits")).await
    }

    /// The commits that `head` has and `applied` has not, oldest first, as raw objects. Only `head` itself if there is
    /// nothing applied to start from.
    ///
    /// # Errors
    /// Git fails, or there are too many.
    pub async fn new_commits(
        &self,
        head: &CommitId,
        applied: Option<&CommitId>,
    ) -> Result<Vec<(CommitId, Vec<u8>)>, GitError> {
        let ids = match applied {
            None => format!("{head}\n").into_bytes(),
            Some(applied) => {
                let (max, not) = (format!("--max-count={}", MAX_NEW_COMMITS + 1), format!("^{applied}"));
                let args = ["rev-list", "--topo-order", "--reverse", &max, head.as_str(), &not];
                let run =
                    Run { max_stdout: (MAX_NEW_COMMITS + 1) * 41, ..Run::local("list the new commits") };
                self.ok(&args, run).await?
            }
        };
        if ids.iter().filter(|b| **b == b'\n').count() > MAX_NEW_COMMITS {
            return Err(GitError::TooMuch("more than 10 000 new commits at once"));
        }
        let run = Run { stdin: &ids, max_stdout: MAX_COMMITS_BYTES, ..Run::local("read the new commits") };
        let objects = self.ok(&["cat-file", "--batch"], run).await?;
        batch(&ids, &objects)
    }

    /// The policy's text in a commit.
    ///
    /// # Errors
    /// Git fails, or there is no such file of a fitting size.
    pub async fn file(&self, commit: &CommitId) -> Result<String, GitError> {
        let path = self.options.path.as_str();
        let bad = |why| GitError::BadFile { path: path.to_owned(), commit: commit.short().to_owned(), why };
        let args = ["--literal-pathspecs", "ls-tree", "-z", "--long", commit.as_str(), "--", path];
        let entry = self.ok(&args, Run::local("look for the policy file")).await?;
        // `100644 blob <id> <size>\t<path>\0`
        let entry = String::from_utf8(entry).map_err(|_| GitError::Nonsense("ls-tree"))?;
        let Some((about, _)) = entry.split_once('\t') else {
            return Err(GitError::NoFile { path: path.to_owned(), commit: commit.short().to_owned() });
        };
        let words: Vec<&str> = about.split_whitespace().collect();
        let [mode, "blob", blob, size] = words.as_slice() else { return Err(bad("is no file")) };
        if !matches!(*mode, "100644" | "100755") {
            return Err(bad("is a symbolic link; name the file itself"));
        }
        let size: usize = size.parse().map_err(|_| GitError::Nonsense("ls-tree"))?;
        if size > MAX_POLICY_BYTES {
            return Err(bad("is larger than a policy may be"));
        }
        let blob = CommitId::parse(blob).ok_or(GitError::Nonsense("ls-tree"))?;
        let run = Run { max_stdout: size, ..Run::local("read the policy file") };
        let text = self.ok(&["cat-file", "blob", blob.as_str()], run).await?;
        String::from_utf8(text).map_err(|_| bad("is not UTF-8"))
    }

    /// Remembers what is in force.
    ///
    /// # Errors
    /// Git fails.
    pub async fn keep(&self, applied: &CommitId) -> Result<(), GitError> {
        self.ok(&["update-ref", APPLIED, applied.as_str()], Run::local("keep the applied commit")).await?;
        Ok(())
    }

    async fn ok(&self, args: &[&str], run: Run<'_>) -> Result<Vec<u8>, GitError> {
        let what = run.what;
        let output = self.run(args, run).await?;
        match output.code {
            Some(0) => Ok(output.stdout),
            _ => Err(GitError::Failed { what, said: output.said() }),
        }
    }

    /// A question whose answer is the exit code: one of `no`, or 0.
    async fn yes(&self, args: &[&str], no: &[i32], run: Run<'_>) -> Result<bool, GitError> {
        let what = run.what;
        let output = self.run(args, run).await?;
        match output.code {
            Some(0) => Ok(true),
            Some(code) if no.contains(&code) => Ok(false),
            _ => Err(GitError::Failed { what, said: output.said() }),
        }
    }

    async fn run(&self, args: &[&str], run: Run<'_>) -> Result<Output, GitError> {
        let mut command = self.command(run.remote)?;
        let mut child = command.args(args).spawn().map_err(GitError::NotStarted)?;
        let _group = Group(child.id());
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let work = async {
            let feed = async {
                if let Some(mut stdin) = stdin {
                    // If git doesn't want to hear it all, its exit code says why.
                    let _ = stdin.write_all(run.stdin).await;
                }
                Ok(())
            };
            let nonsense = |_| GitError::Nonsense(run.what);
            let read = async {
                let bytes = read_up_to(stdout, run.max_stdout).await.map_err(nonsense)?;
                if bytes.len() > run.max_stdout {
                    Err(GitError::TooMuch("a longer answer"))
                } else {
                    Ok(bytes)
                }
            };
            let complain = async { read_up_to(stderr, MAX_STDERR).await.map_err(nonsense) };
            let wait = async { child.wait().await.map_err(nonsense) };
            let ((), stdout, stderr, status) = tokio::try_join!(feed, read, complain, wait)?;
            Ok(Output { code: status.code(), stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() })
        };
        match timeout(run.patience, work).await {
            Ok(done) => done,
            Err(_) => Err(GitError::TimedOut { what: run.what, after: run.patience }),
        }
    }

    fn command(&self, remote: bool) -> Result<Command, GitError> {
        let mut command = Command::new("git");
        command.env_clear();
        for name in KEPT {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
            .envs([
                ("HOME", "/nonexistent"),
                ("LC_ALL", "C"),
                ("GIT_CONFIG_NOSYSTEM", "1"),
                ("GIT_CONFIG_GLOBAL", "/dev/null"),
                ("GIT_ATTR_NOSYSTEM", "1"),
                ("GIT_TERMINAL_PROMPT", "0"),
                ("GIT_NO_REPLACE_OBJECTS", "1"),
                ("GIT_NO_LAZY_FETCH", "1"),
                ("GIT_OPTIONAL_LOCKS", "0"),
                ("GIT_SSH_VARIANT", "ssh"),
            ])
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        if remote {
            self.reach(&mut command)?;
        }
        for setting in CONFIG {
            command.args(["-c", setting]);
        }
        command.arg("-c").arg(format!("protocol.{}.allow=always", self.options.url.scheme().word()));
        command.arg("--git-dir=.");
        Ok(command)
    }

    /// Adds what opens the remote side. Never as arguments, which every user of the host can read.
    fn reach(&self, command: &mut Command) -> Result<(), GitError> {
        match self.options.url.scheme() {
            Scheme::File => {}
            Scheme::Https => {
                if let Some(path) = &self.options.token {
                    let token = read_secret(path)?;
                    let login = BASE64.encode(format!("warren:{}", token.as_str()).as_bytes());
                    command.envs([
                        ("GIT_CONFIG_COUNT", "1"),
                        ("GIT_CONFIG_KEY_0", "http.extraHeader"),
                        ("GIT_CONFIG_VALUE_0", &format!("Authorization: Basic {login}")),
                    ]);
                }
            }
            Scheme::Ssh => {
                let mut ssh = OsString::from(
                    "ssh -F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes \
                     -o IdentityAgent=none -o ClearAllForwardings=yes -o ConnectTimeout=20",
                );
                for (option, path) in [
                    ("UserKnownHostsFile", &self.options.known_hosts),
                    ("IdentityFile", &self.options.ssh_key),
                ] {
                    if let Some(path) = path {
                        ssh.push(format!(" -o {option}="));
                        ssh.push(quoted(path)?);
                    }
                }
                command.env("GIT_SSH_COMMAND", ssh);
            }
        }
        Ok(())
    }
}

impl Output {
    /// What git said, in one line without control characters.
    fn said(&self) -> String {
        let lines = self.stderr.lines().map(str::trim).filter(|line| !line.is_empty());
        let text: Vec<&str> = lines.collect();
        let text: String = text.join("; ").chars().filter(|c| !c.is_control()).collect();
        match text.is_empty() {
            true => format!("it ended with {}", self.code.map_or("a signal".into(), |c| format!("code {c}"))),
            false => text,
        }
    }
}

/// The process group of one run; what is left of it ends with this.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let pid = self.0.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // Usually nobody is left.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Reads to the end, but keeps no more than `max` bytes and one.
async fn read_up_to(from: Option<impl AsyncRead + Unpin>, max: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        let mut from = from.take(max as u64 + 1);
        from.read_to_end(&mut bytes).await?;
        if bytes.len() <= max {
            return Ok(bytes);
        }
        // What is left is read all the same, so that the writer sees no broken pipe.
        from.set_limit(u64::MAX);
        tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    }
    Ok(bytes)
}

fn id_in(output: &[u8]) -> Option<CommitId> {
    CommitId::parse(std::str::from_utf8(output).ok()?.trim_end())
}

/// The answers of `cat-file --batch`: `<id> commit <size>`, the object, a newline, for each id in `asked`.
fn batch(asked: &[u8], mut answers: &[u8]) -> Result<Vec<(CommitId, Vec<u8>)>, GitError> {
    let nonsense = || GitError::Nonsense("cat-file");
    let asked = std::str::from_utf8(asked).map_err(|_| nonsense())?;
    let mut out = Vec::new();
    for id in asked.lines() {
        let end = answers.iter().position(|b| *b == b'\n').ok_or_else(nonsense)?;
        let line = std::str::from_utf8(&answers[..end]).map_err(|_| nonsense())?;
        let size: usize = match line.split(' ').collect::<Vec<_>>().as_slice() {
            [name, "commit", size] if *name == id => size.parse().map_err(|_| nonsense())?,
            _ => return Err(nonsense()),
        };
        if size > MAX_COMMIT {
            return Err(GitError::TooMuch("a commit of more than 1 MiB"));
        }
        let (object, rest) = answers[end + 1..].split_at_checked(size).ok_or_else(nonsense)?;
        answers = rest.strip_prefix(b"\n").ok_or_else(nonsense)?;
        out.push((CommitId::parse(id).ok_or_else(nonsense)?, object.to_vec()));
    }
    Ok(out)
}

/// Reads a secret of one line from a file.
pub(crate) fn read_secret(path: &Path) -> Result<zeroize::Zeroizing<String>, GitError> {
    let fail = |why: String| GitError::Secret { path: path.to_owned(), why };
    let text = std::fs::read_to_string(path).map(zeroize::Zeroizing::new).map_err(|e| fail(e.to_string()))?;
    let line = text.trim();
    if line.is_empty() || line.len() > 4_096 || line.contains(char::is_whitespace) {
        return Err(fail("expected one secret, alone on one line".into()));
    }
    Ok(zeroize::Zeroizing::new(line.to_owned()))
}

/// A path as one word for the shell that git starts ssh with, and for ssh.
fn quoted(path: &Path) -> Result<String, GitError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@".contains(c);
    let text = path.to_str().filter(|text| text.chars().all(plain));
    text.map(str::to_owned).ok_or_else(|| GitError::Secret {
        path: path.to_owned(),
        why: "its path may only have letters, digits and / . _ - + @".into(),
    })
}

/// Bytes of all files below `dir`; those that vanish meanwhile don't count.
fn size_of(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_of(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_read_strictly() {
        let id = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";
        let asked = format!("{id}\n");
        let answer = |text: &str| batch(asked.as_bytes(), format!("{id} {text}").as_bytes());
        assert_eq!(answer("commit 3\na\nb\n").unwrap()[0].1, b"a\nb");
        for bad in
            ["missing\n", "blob 1\na\n", "commit 4\na\nb\n", "commit x\n", "commit 99\na\n", "commit 1\nab\n"]
        {
            assert!(matches!(answer(bad), Err(GitError::Nonsense(_))), "{bad}");
        }
        assert!(matches!(answer(&format!("commit {}\n", MAX_COMMIT + 1)), Err(GitError::TooMuch(_))));
    }

    #[test]
    fn paths_for_ssh_can_not_carry_commands() {
        assert_eq!(quoted(Path::new("/etc/warren/id_ed25519")).unwrap(), "/etc/warren/id_ed25519");
        for bad in ["/a b", "/a'b", "/a;b", "/a$(b)", "/a\nb"] {
            assert!(quoted(Path::new(bad)).is_err(), "{bad}");
        }
    }
}
