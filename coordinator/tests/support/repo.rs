//! A git repository with people who sign their commits, all real: `git` and `ssh-keygen`.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Somebody with an SSH key.
pub struct Author {
    pub name: &'static str,
    key: PathBuf,
}

impl Author {
    pub fn new(dir: &Path, name: &'static str) -> Self {
        let key = dir.join(format!("key-{name}"));
        let args = ["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"];
        let done = Command::new("ssh-keygen").args(args).arg(&key).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Self { name, key }
    }

    /// Their line in an allowed-signers file.
    pub fn line(&self, options: &str) -> String {
        let public = std::fs::read_to_string(self.key.with_extension("pub")).unwrap();
        format!("{}@example.com {options} {}\n", self.name, public.trim())
    }
}

/// A repository with a branch `main`, and beside it an allowed-signers file.
pub struct Repo {
    dir: TempDir,
}

pub const FILE: &str = "policy.hujson";

/// A policy that allows one port.
pub fn policy(port: u16) -> String {
    format!(
        r#"{{"tagOwners": {{"tag:web": [], "tag:db": []}},
            "acls": [{{"action": "accept", "src": ["tag:web"], "dst": ["tag:db:{port}"]}}]}}"#
    )
}

impl Repo {
    pub fn new() -> Self {
        let this = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(this.path()).unwrap();
        this.git(&["init", "--quiet", "--initial-branch=main"]);
        this
    }

    /// Where the repository is.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("repo")
    }

    pub fn author(&self, name: &'static str) -> Author {
        Author::new(self.dir.path(), name)
    }

    pub fn signers_path(&self) -> PathBuf {
        self.dir.path().join("allowed_signers")
    }

    pub fn allow(&self, lines: &[String]) {
        std::fs::write(self.signers_path(), lines.concat()).unwrap();
    }

    /// Commits the file with this text, signed if there is an author: the commit's id.
    pub fn commit(&self, text: &str, author: Option<&Author>) -> String {
        std::fs::write(self.path().join(FILE), text).unwrap();
        self.git(&["add", "--all"]);
        self.commit_staged(author, &[])
    }

    pub fn commit_staged(&self, author: Option<&Author>, more: &[&str]) -> String {
        self.commit_dated(author, more, "@1700000000 +0000")
    }

    pub fn commit_dated(&self, author: Option<&Author>, more: &[&str], date: &str) -> String {
        let mut args: Vec<String> = Vec::new();
        if let Some(author) = author {
            let key = format!("user.signingkey={}", author.key.display());
            args.extend(["-c", "gpg.format=ssh", "-c", &key].map(str::to_owned));
        }
        args.extend(["commit", "--quiet", "--allow-empty", "-m", "policy"].map(str::to_owned));
        args.push(if author.is_some() { "--gpg-sign" } else { "--no-gpg-sign" }.to_owned());
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.run(&args, date);
        self.git(&["rev-parse", "HEAD"]).trim().to_owned()
    }

    /// Writes a commit with exactly this text: its id.
    pub fn write_commit(&self, text: &str) -> String {
        let path = self.dir.path().join("commit");
        std::fs::write(&path, text).unwrap();
        self.git(&["hash-object", "-t", "commit", "-w", path.to_str().unwrap()]).trim().to_owned()
    }

    /// Makes commits from a script of `git fast-import`.
    pub fn import(&self, script: &str) {
        let path = self.dir.path().join("script");
        std::fs::write(&path, script).unwrap();
        let done = Command::new("git")
            .args(["fast-import", "--quiet", "--force"])
            .current_dir(self.path())
            .stdin(std::fs::File::open(path).unwrap())
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    pub fn git(&self, args: &[&str]) -> String {
        self.run(args, "@1700000000 +0000")
    }

    fn run(&self, args: &[&str], date: &str) -> String {
        let done = Command::new("git")
            .args(args)
            .current_dir(self.path())
            .env("HOME", self.dir.path())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_AUTHOR_DATE", date)
            .env("GIT_COMMITTER_DATE", date)
            .envs([("GIT_AUTHOR_NAME", "A"), ("GIT_AUTHOR_EMAIL", "a@example.com")])
            .envs([("GIT_COMMITTER_NAME", "C"), ("GIT_COMMITTER_EMAIL", "c@example.com")])
            .output()
            .unwrap();
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }
}
