//! A policy in a git repository: only what may be put in force is, and everything else is said and changes nothing.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

mod support;

use std::time::Duration;

use ring::hmac;
use serde_json::Value;
use support::process::verb;
use support::repo::{FILE, Repo, policy};
use support::{Client, PATIENCE, TestCoordinator, http_send};
use warren_coordinator::admin::Call;
use warren_coordinator::policy_source::Source;
use warren_coordinator::policy_source::git::{GitOptions, MAX_COMMIT, MAX_NEW_COMMITS, MIN_POLL, Signatures};

fn options(repo: &Repo) -> GitOptions {
    GitOptions {
        url: repo.path().to_str().unwrap().parse().unwrap(),
        branch: "main".parse().unwrap(),
        path: FILE.parse().unwrap(),
        poll: MIN_POLL,
        signatures: Signatures::Required,
        allowed_signers: Some(repo.signers_path()),
        allow_rewrite: false,
        webhook_secret: None,
        token: None,
        ssh_key: None,
        known_hosts: None,
    }
}

async fn follow(repo: &Repo, edit: impl FnOnce(&mut GitOptions)) -> TestCoordinator {
    let mut git = options(repo);
    edit(&mut git);
    TestCoordinator::start_with(|o| o.policy = Source::Git(Box::new(git))).await
}

/// Waits until `policy status` is as wanted.
async fn status(coordinator: &TestCoordinator, wanted: impl Fn(&Value) -> bool) -> Value {
    let poll = async {
        loop {
            let status = coordinator.call(Call::PolicyStatus).await.unwrap();
            if wanted(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, poll).await {
        Ok(status) => status,
        Err(_) => panic!("{:#}", coordinator.call(Call::PolicyStatus).await.unwrap()),
    }
}

async fn applied(coordinator: &TestCoordinator, commit: &str) -> Value {
    status(coordinator, |s| s["commit"] == commit && s["error"].is_null()).await
}

/// Waits until `head` was looked at and refused with a reason that contains `why`; `commit` is still in force.
async fn refused(coordinator: &TestCoordinator, head: &str, commit: &str, why: &str) -> Value {
    let status = status(coordinator, |s| s["head"] == head && !s["error"].is_null()).await;
    let error = status["error"].as_str().unwrap();
    assert!(error.contains(why) && error.contains(&head[..12]), "{error}");
    assert_eq!(status["commit"], commit);
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn only_commits_that_are_all_signed_by_allowed_people_are_applied() {
    let repo = Repo::new();
    let (ann, eve) = (repo.author("ann"), repo.author("eve"));
    repo.allow(&[ann.line("namespaces=\"git\"")]);
    let first = repo.commit(&policy(1), Some(&ann));
    let coordinator = follow(&repo, |_| {}).await;
    let found = applied(&coordinator, &first).await;
    assert_eq!(
        (found["source"].as_str(), found["revision"].as_u64(), found["signer"].as_str()),
        (Some("git"), Some(1), Some("ann@example.com"))
    );
    assert_eq!((found["branch"].as_str(), found["path"].as_str()), (Some("main"), Some(FILE)));

    // It reaches the agents, and a later commit does too.
    let key = coordinator.auth_key_with(&["tag:web"], false).await;
    let mut web = Client::join(coordinator.addr, &key, 1, "web").await;
    let key = coordinator.auth_key_with(&["tag:db"], false).await;
    let db = Client::join(coordinator.addr, &key, 2, "db").await;
    web.until(|n| n.peers.contains_key(&db.id())).await;
    let second = repo.commit(&policy(2), Some(&ann));
    assert_eq!(applied(&coordinator, &second).await["revision"], 2);
    web.until(|n| n.egress.iter().any(|r| r.dst.iter().any(|d| d.ports.first == 2))).await;

    // Several at once, merges too.
    repo.git(&["checkout", "--quiet", "-b", "side"]);
    std::fs::write(repo.path().join("README"), "about").unwrap();
    repo.git(&["add", "--all"]);
    repo.commit_staged(Some(&ann), &[]);
    repo.git(&["checkout", "--quiet", "main"]);
    repo.commit(&policy(3), Some(&ann));
    repo.git(&["merge", "--quiet", "--no-commit", "--no-ff", "side"]);
    let merged = repo.commit_staged(Some(&ann), &[]);
    assert_eq!(applied(&coordinator, &merged).await["revision"], 3);

    // A commit that doesn't change the policy is applied, and is no new policy.
    let same = repo.commit_staged(Some(&ann), &[]);
    assert_eq!(applied(&coordinator, &same).await["revision"], 3);

    // A stranger's signature, none at all, and a good one on top of that.
    let stranger = repo.commit(&policy(4), Some(&eve));
    refused(&coordinator, &stranger, &same, "is not among the allowed signers").await;
    repo.git(&["reset", "--quiet", "--hard", &same]);
    let unsigned = repo.commit(&policy(5), None);
    refused(&coordinator, &unsigned, &same, "it is not signed").await;
    let on_top = repo.commit(&policy(6), Some(&ann));
    let found = refused(&coordinator, &on_top, &same, "it is not signed").await;
    assert!(found["error"].as_str().unwrap().contains(&unsigned[..12]), "the guilty one is named: {found}");
    let health = coordinator.call(Call::Health).await.unwrap();
    assert!(health.as_array().unwrap().iter().any(|item| item["code"] == "policy-refused"), "{health}");

    // Without the bad one it goes on: the branch still comes after what is in force.
    repo.git(&["reset", "--quiet", "--hard", &same]);
    let good = repo.commit(&policy(7), Some(&ann));
    assert_eq!(applied(&coordinator, &good).await["revision"], 4);
    let health = coordinator.call(Call::Health).await.unwrap();
    assert_eq!(health, serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_count_between_their_dates_whatever_a_commit_says() {
    let repo = Repo::new();
    let (ann, bob) = (repo.author("ann"), repo.author("bob"));
    repo.allow(&[ann.line(""), bob.line("valid-before=\"20990101Z\"")]);
    let first = repo.commit(&policy(1), Some(&bob));
    let coordinator = follow(&repo, |_| {}).await;
    assert_eq!(applied(&coordinator, &first).await["signer"], "bob@example.com");
    // Bob's key is revoked by a date; the commit's own date is before it, as he may write it.
    repo.allow(&[ann.line(""), bob.line("valid-before=\"20240101Z\"")]);
    let late = repo.commit_dated(Some(&bob), &[], "@1600000000 +0000");
    refused(&coordinator, &late, &first, "does not count now").await;
    // A key that counts from tomorrow, and a commit that is older than its key.
    repo.allow(&[bob.line("valid-after=\"20990101Z\"")]);
    refused(&coordinator, &late, &first, "does not count now").await;
    repo.allow(&[bob.line("valid-after=\"20240101Z\"")]);
    status(&coordinator, |s| s["error"].as_str().is_some_and(|e| e.contains("at the commit's own date")))
        .await;
    // For another purpose; not at all; a file that makes no sense; no file.
    repo.allow(&[bob.line("namespaces=\"file\"")]);
    status(&coordinator, |s| s["error"].as_str().is_some_and(|e| e.contains("not allowed to sign for git")))
        .await;
    repo.allow(&[ann.line("")]);
    status(&coordinator, |s| s["error"].as_str().is_some_and(|e| e.contains("not among the allowed"))).await;
    repo.allow(&[ann.line(""), "bob cert-authority ssh-ed25519 AAAA\n".into()]);
    status(&coordinator, |s| s["error"].as_str().is_some_and(|e| e.contains("allowed_signers:2"))).await;
    std::fs::remove_file(repo.signers_path()).unwrap();
    status(&coordinator, |s| {
        s["error"].as_str().is_some_and(|e| e.contains("can't read the allowed-signers"))
    })
    .await;
    repo.allow(&[bob.line("")]);
    applied(&coordinator, &late).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewritten_history_is_refused_unless_that_is_wanted() {
    let repo = Repo::new();
    let ann = repo.author("ann");
    repo.allow(&[ann.line("")]);
    let first = repo.commit(&policy(1), Some(&ann));
    let second = repo.commit(&policy(2), Some(&ann));
    let mut coordinator = follow(&repo, |_| {}).await;
    applied(&coordinator, &second).await;
    // Back to an older commit, signed as it is: who can write to the repository must not bring old rights back.
    repo.git(&["reset", "--quiet", "--hard", &first]);
    refused(&coordinator, &first, &second, "history was rewritten").await;
    let other = repo.commit(&policy(3), Some(&ann));
    refused(&coordinator, &other, &second, "history was rewritten").await;
    // Also if the mirror is new and the repository has forgotten the commit.
    repo.git(&["reflog", "expire", "--expire=now", "--all"]);
    repo.git(&["gc", "--quiet", "--prune=now"]);
    coordinator.stop().await;
    std::fs::remove_dir_all(coordinator.state_dir().join("policy-git")).unwrap();
    coordinator.restart().await;
    refused(&coordinator, &other, &second, "history was rewritten").await;

    let mut wanted = options(&repo);
    wanted.allow_rewrite = true;
    coordinator.restart_with(|o| o.policy = Source::Git(Box::new(wanted))).await;
    applied(&coordinator, &other).await;
    // Signatures count then as well.
    repo.git(&["reset", "--quiet", "--hard", &first]);
    let unsigned = repo.commit(&policy(4), None);
    refused(&coordinator, &unsigned, &other, "it is not signed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_good_policy_changes_nothing() {
    let repo = Repo::new();
    let ann = repo.author("ann");
    repo.allow(&[ann.line("")]);
    let first = repo.commit(&policy(1), Some(&ann));
    let coordinator = follow(&repo, |_| {}).await;
    applied(&coordinator, &first).await;
    let bad = repo.commit("{\n  \"acls\": 7\n}", Some(&ann));
    refused(&coordinator, &bad, &first, "policy.hujson:2").await;
    let failing = policy(1).replacen('{', r#"{"tests": [{"src": "tag:web", "accept": ["tag:db:9"]}],"#, 1);
    let failing = repo.commit(&failing, Some(&ann));
    refused(&coordinator, &failing, &first, "tests[0]").await;
    let large = repo.commit(&" ".repeat(warren_common::policy::MAX_POLICY_BYTES + 1), Some(&ann));
    refused(&coordinator, &large, &first, "larger than a policy may be").await;
    std::fs::remove_file(repo.path().join(FILE)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", repo.path().join(FILE)).unwrap();
    repo.git(&["add", "--all"]);
    let link = repo.commit_staged(Some(&ann), &[]);
    refused(&coordinator, &link, &first, "symbolic link").await;
    repo.git(&["rm", "--quiet", FILE]);
    let gone = repo.commit_staged(Some(&ann), &[]);
    refused(&coordinator, &gone, &first, "there is no file policy.hujson").await;
    // A repository that is not there, and one that is there again.
    std::fs::rename(repo.path(), repo.path().with_extension("away")).unwrap();
    let away = status(&coordinator, |s| s["error"].as_str().is_some_and(|e| e.contains("can't fetch"))).await;
    assert_eq!(away["commit"], first.as_str());
    std::fs::rename(repo.path().with_extension("away"), repo.path()).unwrap();
    let good = repo.commit(&policy(2), Some(&ann));
    applied(&coordinator, &good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_can_be_a_warning_or_nothing_and_a_restart_remembers() {
    let repo = Repo::new();
    let ann = repo.author("ann");
    repo.allow(&[ann.line("")]);
    let first = repo.commit(&policy(1), None);
    let mut coordinator = follow(&repo, |o| o.signatures = Signatures::Warn).await;
    let found = applied(&coordinator, &first).await;
    assert!(found["warnings"][0].as_str().unwrap().contains("it is not signed"), "{found}");
    let health = coordinator.call(Call::Health).await.unwrap();
    assert_eq!(health[0]["code"], "policy-unsigned");
    // Nothing new after a restart, also without the repository: the same policy, the same commit, the same warning.
    std::fs::rename(repo.path(), repo.path().with_extension("away")).unwrap();
    coordinator.restart().await;
    let away = status(&coordinator, |s| !s["error"].is_null()).await;
    assert_eq!((away["commit"].as_str(), away["revision"].as_u64()), (Some(first.as_str()), Some(1)));
    std::fs::rename(repo.path().with_extension("away"), repo.path()).unwrap();
    let found = applied(&coordinator, &first).await;
    assert!(found["warnings"][0].as_str().unwrap().contains("it is not signed"), "{found}");

    let mut off = options(&repo);
    (off.signatures, off.allowed_signers) = (Signatures::Off, None);
    coordinator.restart_with(|o| o.policy = Source::Git(Box::new(off))).await;
    let second = repo.commit(&policy(2), None);
    assert_eq!(applied(&coordinator, &second).await["warnings"], serde_json::json!([]));

    // Exactly one source is active: the API is refused, and a file takes over only when it is made the source.
    let refused = coordinator.call(Call::PolicySet { text: "{}".into() }).await.unwrap_err();
    assert!(refused.text.contains("git repository"), "{refused:?}");
    let file = repo.path().with_extension("file");
    std::fs::write(&file, policy(3)).unwrap();
    coordinator.restart_with(|o| o.policy = Source::File(file.clone())).await;
    let found = status(&coordinator, |s| s["revision"] == 3).await;
    assert_eq!((found["source"].as_str(), found["applied_from"].as_str()), (Some("file"), Some("file")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_with_the_secret_is_followed_at_once_and_others_are_not() {
    let repo = Repo::new();
    let ann = repo.author("ann");
    repo.allow(&[ann.line("")]);
    let first = repo.commit(&policy(1), Some(&ann));
    let secret = repo.path().with_extension("secret");
    std::fs::write(&secret, "correct-horse\n").unwrap();
    let coordinator = follow(&repo, |o| {
        o.poll = Duration::from_secs(3_600);
        o.webhook_secret = Some(secret);
    })
    .await;
    applied(&coordinator, &first).await;
    let hook = async |headers: &[(&str, &str)], body: &str| {
        http_send(coordinator.addr, "POST", "/api/v1/policy/webhook", headers, body).await
    };
    let second = repo.commit(&policy(2), Some(&ann));
    let body = r#"{"ref": "refs/heads/main"}"#;
    let mac = |key: &[u8]| {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), body.as_bytes());
        format!("sha256={}", data_encoding::HEXLOWER.encode(tag.as_ref()))
    };
    for headers in
        [vec![], vec![("x-hub-signature-256", mac(b"wrong"))], vec![("x-gitlab-token", "wrong".to_owned())]]
    {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let answer = hook(&headers, body).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    }
    let looked = coordinator.call(Call::PolicyStatus).await.unwrap();
    assert_eq!(looked["head"], first.as_str(), "nobody looked");
    let answer = hook(&[("x-hub-signature-256", &mac(b"correct-horse"))], body).await;
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    applied(&coordinator, &second).await;
    let third = repo.commit(&policy(3), Some(&ann));
    let answer = hook(&[("x-gitlab-token", "correct-horse")], body).await;
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    applied(&coordinator, &third).await;
    let metrics = support::http_get(coordinator.addr, "/metrics").await.unwrap();
    for line in [
        "warren_policy_webhooks_total 2",
        "warren_policy_webhooks_refused_total 3",
        "warren_policy_source_up 1",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}:\n{metrics}");
    }
    // Longer than any webhook: refused before it is read whole.
    let long = " ".repeat(warren_coordinator::api::MAX_WEBHOOK + 1);
    let answer = hook(&[("x-gitlab-token", "correct-horse")], &long).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 403"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_can_not_make_us_run_anything() {
    let repo = Repo::new();
    let ann = repo.author("ann");
    repo.allow(&[ann.line("")]);
    let first = repo.commit(&policy(1), Some(&ann));
    let marker = repo.path().with_extension("marker");
    let script = repo.path().with_extension("script");
    std::fs::write(&script, format!("#!/bin/sh\ntouch {}\nexec \"$@\"\n", marker.display())).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = script.to_str().unwrap();
    for name in [
        "uploadpack.packObjectsHook",
        "core.fsmonitor",
        "core.sshCommand",
        "core.gitProxy",
        "credential.helper",
    ] {
        repo.git(&["config", name, script]);
    }
    for hook in ["pre-receive", "reference-transaction", "post-checkout", "pre-auto-gc"] {
        let path = repo.path().join(".git/hooks").join(hook);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(script, path).unwrap();
    }
    let _ = std::fs::remove_file(&marker); // the commands above may have run it, here
    let coordinator = follow(&repo, |_| {}).await;
    applied(&coordinator, &first).await;
    assert!(!marker.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_at_the_start_are_named() {
    let repo = Repo::new();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let url = repo.path().to_str().unwrap().to_owned();
    let serve = |more: &[&str]| {
        let base =
            ["serve", "--no-embedded-relay", "--listen", "127.0.0.1:0", "--public-url", "http://c.example"];
        verb(&state, &[&base[..], more].concat())
    };
    for (args, said) in [
        (vec!["--policy-git", "http://x/y"], "expected https://"),
        (vec!["--policy-git", &url], "--policy-git-allowed-signers"),
        (vec!["--policy-git", &url, "--policy", "x"], "cannot be used with"),
        (vec!["--policy-git-branch", "x"], "--policy-git"),
        (vec!["--policy-git", &url, "--policy-git-branch", "a..b"], "not the name of a branch"),
        (vec!["--policy-git", &url, "--policy-git-path", "../x"], "not the path of a file"),
        (vec!["--policy-git", &url, "--policy-git-poll", "0s"], "length of time"),
        (vec!["--policy-git", &url, "--policy-git-signatures", "off", "--policy-git-poll", "2d"], "24h"),
        (
            vec!["--policy-git", &url, "--policy-git-allowed-signers", "/nonexistent"],
            "can't read the allowed-signers",
        ),
        (vec!["--policy-git", "git@h:x", "--policy-git-signatures", "off"], "--policy-git-ssh-key"),
        (
            vec![
                "--policy-git",
                &url,
                "--policy-git-signatures",
                "off",
                "--policy-git-webhook-secret-file",
                "/nonexistent",
            ],
            "can't read /nonexistent",
        ),
    ] {
        let (code, _, err) = serve(&args);
        assert!(code == 2 && err.contains(said), "{args:?}: {code} {err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_too_much_is_refused() {
    let repo = Repo::new();
    let ann = repo.author("ann");
    repo.allow(&[ann.line("")]);
    let first = repo.commit(&policy(1), Some(&ann));
    let coordinator = follow(&repo, |_| {}).await;
    applied(&coordinator, &first).await;
    // Unsigned commits: some are named, the others counted.
    (0..10).for_each(|_| drop(repo.commit_staged(None, &[])));
    let tenth = repo.git(&["rev-parse", "HEAD"]).trim().to_owned();
    refused(&coordinator, &tenth, &first, "and 2 more").await;
    // More commits than are checked at once, and one that is too long to be looked at.
    let import = |count: usize, message: &str| {
        let mut script = format!("reset refs/heads/main\nfrom {first}\n\n");
        for n in 0..count {
            let from = if n == 0 { format!("from {first}\n") } else { String::new() };
            script.push_str(&format!(
                "commit refs/heads/main\ncommitter A <a@example.com> {} +0000\ndata {}\n{message}\n{from}\n",
                1_700_000_001 + n,
                message.len(),
            ));
        }
        repo.import(&script);
        repo.git(&["rev-parse", "main"]).trim().to_owned()
    };
    let many = import(MAX_NEW_COMMITS + 1, "x");
    refused(&coordinator, &many, &first, "more than 10 000 new commits").await;
    let long = import(1, &"x".repeat(MAX_COMMIT));
    refused(&coordinator, &long, &first, "a commit of more than 1 MiB").await;
    let long = import(70, &"x".repeat(MAX_COMMIT - 1_000));
    refused(&coordinator, &long, &first, "a longer answer").await;
}
