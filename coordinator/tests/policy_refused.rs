//! Commits that may not be put in force, one kind each, against the real program: nothing changes, and the log, the API and
//! `policy status` say which commit it is and why.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::Value;
use support::process::{Running, serve_logging, until, up, verb};
use support::repo::{Author, FILE, Repo, policy};
use support::{free_addr, http_get, http_send};

#[tokio::test(flavor = "multi_thread")]
async fn an_unsigned_commit_changes_nothing_and_everybody_says_so() {
    let world = World::new().await;
    let unsigned = world.repo.commit(&policy(2), None);
    world.refused(&unsigned, "it is not signed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_signed_by_a_stranger_changes_nothing_and_everybody_says_so() {
    let world = World::new().await;
    let eve = world.repo.author("eve");
    let strange = world.repo.commit(&policy(2), Some(&eve));
    world.refused(&strange, "is not among the allowed signers").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_with_anothers_signature_changes_nothing_and_everybody_says_so() {
    let world = World::new().await;
    // Signed by Ann for one policy, and then another tree is put under her signature.
    let signed = world.repo.commit(&policy(2), Some(&world.ann));
    world.repo.commit(&policy(3), None);
    let tree = world.repo.git(&["rev-parse", "HEAD^{tree}"]);
    let text = world.repo.git(&["cat-file", "commit", &signed]);
    let (old_tree, rest) = text.split_once('\n').unwrap();
    assert!(old_tree.starts_with("tree ") && rest.contains("gpgsig"));
    let forged = world.repo.write_commit(&format!("tree {}\n{rest}", tree.trim()));
    world.repo.git(&["reset", "--quiet", "--hard", &forged]);
    world.refused(&forged, "signature").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_force_pushed_commit_changes_nothing_and_everybody_says_so() {
    let world = World::new().await;
    world.repo.git(&["checkout", "--quiet", "--orphan", "other"]);
    let other = world.repo.commit(&policy(2), Some(&world.ann));
    world.repo.git(&["branch", "--force", "main", "other"]);
    world.refused(&other, "history was rewritten").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_with_a_syntax_error_changes_nothing_and_everybody_says_so() {
    let world = World::new().await;
    let wrong = world.repo.commit("{\n  \"acls\": [\n  }\n", Some(&world.ann));
    world.refused(&wrong, &format!("{FILE}:3")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_tests_fail_changes_nothing_and_everybody_says_so() {
    let world = World::new().await;
    let tests = r#"{"tests": [{"src": "tag:web", "accept": ["tag:db:9"]}],"#;
    let failing = world.repo.commit(&policy(2).replacen('{', tests, 1), Some(&world.ann));
    world.refused(&failing, "tests[0]").await;
}

/// A coordinator that follows a repository in which Ann may sign; her first commit is in force.
struct World {
    repo: Repo,
    ann: Author,
    _server: Running,
    addr: SocketAddr,
    state: PathBuf,
    log: PathBuf,
    token: String,
    before: Seen,
}

/// What is in force, as everybody can see.
#[derive(PartialEq, Debug)]
struct Seen {
    commit: String,
    number: u64,
    etag: String,
    text: String,
    /// Of the netmaps: an agent is told something only under a new one.
    revision: String,
}

impl World {
    async fn new() -> Self {
        let repo = Repo::new();
        let ann = repo.author("ann");
        repo.allow(&[ann.line("namespaces=\"git\"")]);
        let first = repo.commit(&policy(1), Some(&ann));
        let beside = |name: &str| repo.path().with_extension(name);
        let (state, log, addr) = (beside("state"), beside("log"), free_addr());
        let (path, signers) = (repo.path(), repo.signers_path());
        let more = [
            "--policy-git",
            path.to_str().unwrap(),
            "--policy-git-poll",
            "1s",
            "--policy-git-allowed-signers",
            signers.to_str().unwrap(),
        ];
        let server = serve_logging(&state, addr, &more, &log);
        up(addr).await;
        let (code, token, err) = verb(&state, &["api-token", "create", "ci"]);
        assert_eq!(code, 0, "{err}");
        let nothing = Seen {
            commit: String::new(),
            number: 0,
            etag: String::new(),
            text: String::new(),
            revision: String::new(),
        };
        let token = format!("Bearer {}", token.trim());
        let mut world = Self { repo, ann, _server: server, addr, state, log, token, before: nothing };
        until(|| async { world.status()["commit"] == first.as_str() }).await;
        world.before = world.seen().await;
        world
    }

    /// `policy status --json` of the program.
    fn status(&self) -> Value {
        let (code, out, err) = verb(&self.state, &["policy", "status", "--json"]);
        assert_eq!(code, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    }

    async fn get(&self, path: &str) -> (String, String) {
        let headers = [("authorization", self.token.as_str())];
        let answer = http_send(self.addr, "GET", path, &headers, "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    async fn seen(&self) -> Seen {
        let status = self.status();
        let (head, text) = self.get("/api/v1/policy").await;
        let metrics = http_get(self.addr, "/metrics").await.unwrap();
        let line = |text: &str, prefix: &str| {
            text.lines().find_map(|l| l.strip_prefix(prefix)).unwrap().trim().to_owned()
        };
        Seen {
            commit: status["commit"].as_str().unwrap().to_owned(),
            number: status["revision"].as_u64().unwrap(),
            etag: line(&head, "etag:"),
            text,
            revision: line(&metrics, "warren_revision "),
        }
    }

    /// `head` is looked at and refused for a reason that contains `why`, by `policy status`, the API and the log.
    async fn refused(&self, head: &str, why: &str) {
        until(|| async {
            let status = self.status();
            status["head"] == head && !status["error"].is_null()
        })
        .await;
        let status = self.status();
        let (_, api) = self.get("/api/v1/policy/status").await;
        let api: Value = serde_json::from_str(&api).unwrap();
        for found in [&status, &api] {
            let error = found["error"].as_str().unwrap();
            assert!(error.contains(why) && error.contains(&head[..12]), "{error}");
            assert_eq!(found["head"], head);
        }
        let (code, text, _) = verb(&self.state, &["policy", "status"]);
        assert!(code == 0 && text.contains(why) && text.contains(&head[..12]), "for people: {text}");
        let log = std::fs::read_to_string(&self.log).unwrap();
        let line = log.lines().find(|l| l.contains("ERROR") && l.contains("stays in force"));
        let line = line.unwrap_or_else(|| panic!("the log says nothing: {log}"));
        assert!(line.contains(&head[..12]), "{line}");
        assert!(log.contains(why), "{log}");
        assert_eq!(self.seen().await, self.before, "something changed");
    }
}
