//! Edits of the policy while a connection runs: real programs, real packets, the time to each cut.
//!
//! The times are printed, not judged: they depend on the machine's load. What is judged is that each edit changes the
//! verdict of the running connection, that the application is told, and that the way back works too.
#![expect(clippy::print_stdout, reason = "the times are what this test is for")]

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_common::time::UnixTime;
use warren_netns_tests::lab::{self, Lab, eventually, monotonic_ms, workspace_binary};
use warren_netns_tests::programs::{Agent, Coordinator, number, tool};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);
/// Edits that cut.
const ROUNDS: usize = 20;
/// Bytes per second of the transfers.
const RATE: u64 = 1 << 20;
const PORT: u16 = 7000;
/// How long the rule that expires lasts, in seconds: enough for a connection to start on a busy machine.
const EXPIRES_IN: i64 = 20;

fn policy(allowed: bool) -> String {
    let port = if allowed { PORT } else { PORT + 1 };
    format!(
        "{{\n  \"tagOwners\": {{\"tag:ann\": [], \"tag:bob\": []}},\n  \"grants\": [\n    \
         {{\"src\": [\"tag:ann\"], \"dst\": [\"tag:bob\"], \"ip\": [\"icmp:*\", \"tcp:{port}\"]}},\n  ],\n}}\n"
    )
}

#[test]
fn an_edit_of_the_file_cuts_a_running_connection_and_another_opens_it_again() -> Result<()> {
    lab::test("policy", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, &policy(true))?;
        let (ann, bob) = (join(lab, &coordinator, "ann")?, join(lab, &coordinator, "bob")?);
        let ip = *bob.addresses()?.first().context("bob has an address")?;
        ann.ping("bob", 1)?;
        let mut cuts = Vec::new();
        for _ in 0..ROUNDS {
            cuts.push(cut(&ann, &bob, ip, || {
                let edited_ms = monotonic_ms();
                coordinator.edit_policy(&policy(false))?;
                Ok(edited_ms)
            })?);
            coordinator.edit_policy(&policy(true))?;
            allowed_again(&ann)?;
        }
        show("the edit of the file", &mut cuts);
        Ok(())
    })
}

#[test]
fn a_signed_commit_cuts_a_running_connection_and_a_webhook_makes_it_quick() -> Result<()> {
    lab::test("policy_git", |lab| {
        let host = lab.host("coord")?;
        let repo = Repo::new(host.dir())?;
        repo.commit(&policy(true), true)?;
        let coordinator = Coordinator::start_from(host, repo.source())?;
        eventually("the first commit is in force", LIMIT, || {
            Ok((coordinator.ask(&["policy", "status"])?["revision"] == 1).then_some(()))
        })?;
        let (ann, bob) = (join(lab, &coordinator, "ann")?, join(lab, &coordinator, "bob")?);
        let ip = *bob.addresses()?.first().context("bob has an address")?;
        ann.ping("bob", 1)?;
        let mut cuts = Vec::new();
        for _ in 0..ROUNDS {
            cuts.push(cut(&ann, &bob, ip, || {
                repo.commit(&policy(false), true)?;
                let pushed_ms = monotonic_ms();
                webhook(&coordinator)?;
                Ok(pushed_ms)
            })?);
            repo.commit(&policy(true), true)?;
            webhook(&coordinator)?;
            allowed_again(&ann)?;
        }
        show("the signed commit and its webhook", &mut cuts);
        // What nobody has signed changes nothing, whoever asks for it.
        let before = coordinator.ask(&["policy", "status"])?;
        repo.commit(&policy(false), false)?;
        webhook(&coordinator)?;
        let after = eventually("the unsigned commit is refused", LIMIT, || {
            let status = coordinator.ask(&["policy", "status"])?;
            Ok(status["error"].as_str().is_some_and(|e| e.contains("not signed")).then_some(status))
        })?;
        ensure!(after["commit"] == before["commit"], "in force now: {after}");
        ensure!(ann.why("bob", PORT)?["allowed"] == true, "it cut all the same");
        Ok(())
    })
}

#[test]
fn a_rule_that_expires_ends_a_running_connection_though_the_coordinator_is_gone() -> Result<()> {
    lab::test("policy_expires", |lab| {
        let mut coordinator = Coordinator::start(lab.host("coord")?, &policy(false))?;
        let (ann, bob) = (join(lab, &coordinator, "ann")?, join(lab, &coordinator, "bob")?);
        let ip = *bob.addresses()?.first().context("bob has an address")?;
        let ends = now()? + EXPIRES_IN;
        let rule = format!("\"tcp:{PORT}\"], \"expires\": \"{}\"", UnixTime::from_secs(ends).to_rfc3339());
        coordinator.edit_policy(&policy(true).replace(&format!("\"tcp:{PORT}\"]"), &rule))?;
        allowed_again(&ann)?;
        let cut_ms = cut(&ann, &bob, ip, || {
            coordinator.process.kill()?;
            ensure!(now()? < ends, "the rule expired before the connection ran");
            Ok(monotonic_ms() + u64::try_from(ends - now()?)? * 1_000)
        })?;
        println!("from the end of the rule's last second to the last byte: {cut_ms} ms");
        ensure!(now()? >= ends, "the connection ended before the rule did");
        ensure!(ann.why("bob", PORT)?["allowed"] == false);
        Ok(())
    })
}

/// Seconds since the Unix epoch by the machine's clock, which the agents judge by.
#[expect(clippy::disallowed_methods, reason = "the rule's end is set by the clock that the agents read")]
fn now() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
}

fn allowed_again(ann: &Agent) -> Result<()> {
    eventually("the policy allows it again", LIMIT, || {
        Ok((ann.why("bob", PORT)?["allowed"] == true).then_some(()))
    })
}

fn show(from: &str, cuts: &mut [u64]) {
    cuts.sort_unstable();
    println!("from {from} to the last byte, {ROUNDS} runs: {cuts:?} ms");
    println!("p50 {} ms, p99 {} ms", nearest(cuts, 50), nearest(cuts, 99));
}

/// A repository with a policy, and one person who may sign for it.
struct Repo {
    dir: PathBuf,
}

impl Repo {
    fn new(host_dir: &Path) -> Result<Self> {
        let this = Self { dir: host_dir.join("repo") };
        fs::create_dir(&this.dir)?;
        this.run("git", &["init", "--quiet", "--initial-branch=main"])?;
        this.run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", "../key"])?;
        let public = fs::read_to_string(this.beside("key.pub"))?;
        fs::write(this.beside("allowed_signers"), format!("ann@example.com {public}"))?;
        fs::write(this.beside("hook.secret"), SECRET)?;
        Ok(this)
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.dir.with_file_name(name)
    }

    /// The arguments of `serve` that follow it, by webhook only.
    fn source(&self) -> Vec<OsString> {
        let signers = self.beside("allowed_signers").into();
        let secret = self.beside("hook.secret").into();
        vec![
            "--policy-git".into(),
            self.dir.clone().into(),
            "--policy-git-poll".into(),
            "1h".into(),
            "--policy-git-allowed-signers".into(),
            signers,
            "--policy-git-webhook-secret-file".into(),
            secret,
        ]
    }

    fn commit(&self, text: &str, signed: bool) -> Result<()> {
        fs::write(self.dir.join("policy.hujson"), text)?;
        self.run("git", &["add", "--all"])?;
        let sign = if signed { "--gpg-sign" } else { "--no-gpg-sign" };
        let key = format!("user.signingkey={}", self.beside("key").display());
        self.run("git", &["-c", "gpg.format=ssh", "-c", &key, "commit", "--quiet", sign, "-m", "policy"])
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let mut command = Command::new(program);
        command.args(args).current_dir(&self.dir);
        command.envs([("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_NOSYSTEM", "1")]);
        for who in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{who}_NAME"), "Ann").env(format!("GIT_{who}_EMAIL"), "ann@example.com");
        }
        let output = command.output().with_context(|| format!("{program} can't be run"))?;
        ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

const SECRET: &str = "correct-horse";

/// Says on the coordinator's host that the repository has news, as GitLab does.
fn webhook(coordinator: &Coordinator) -> Result<()> {
    let mut command = coordinator.host.command("bash");
    let script = format!(
        "exec 3<>/dev/tcp/{}/8080; printf 'POST /api/v1/policy/webhook HTTP/1.1\\r\\nhost: x\\r\\n\
         x-gitlab-token: {SECRET}\\r\\ncontent-length: 2\\r\\n\\r\\n{{}}' >&3; head -n 1 <&3",
        coordinator.host.v4()
    );
    let output = command.args(["-c", &script]).output()?;
    let answer = String::from_utf8_lossy(&output.stdout);
    ensure!(answer.starts_with("HTTP/1.1 202"), "the webhook was answered: {answer}");
    Ok(())
}

fn join(lab: &Lab, coordinator: &Coordinator, name: &str) -> Result<Agent> {
    let agent = Agent::start(lab.host(name)?)?;
    agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
    Ok(agent)
}

/// Milliseconds from `deny`, which says when that was, to the last byte of a transfer that it cuts.
fn cut(ann: &Agent, bob: &Agent, ip: IpAddr, deny: impl FnOnce() -> Result<u64>) -> Result<u64> {
    let server = SocketAddr::new(ip, PORT).to_string();
    let _server = bob.serve("tcp-serve", ip, PORT)?;
    let mut command = ann.host.command(workspace_binary("lab-tool")?);
    command.args(["tcp-stream", &server, "--rate", &RATE.to_string()]);
    let mut stream = ann.host.spawn(command)?;
    stream.wait_for_line("echoed", LIMIT)?;
    let denied_ms = deny()?;
    let end: Value = serde_json::from_str(&stream.wait_for_line("\"end\"", LIMIT)?)?;
    ensure!(end["how"] == "reset", "the application saw: {end}");
    let again = tool(&ann.host, &["tcp-stream", &server, "--total", "1"])?;
    ensure!(again["how"] == "refused" || again["how"] == "prohibited", "a new connection ended: {again}");
    Ok(number(&end["last_byte_ms"])?.saturating_sub(denied_ms))
}

/// The value that this share of the sorted values does not exceed (nearest rank).
fn nearest(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}
