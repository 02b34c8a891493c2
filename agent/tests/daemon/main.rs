//! The real `warrend` and `warren` against a made-up coordinator, in a network namespace of their own.
//!
//! Needs root (or a user namespace that may make network namespaces) and /dev/net/tun; says `skipped` otherwise.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a skipped test says so, a failed one panics")]

mod fake;
mod hostile;
mod revocation;

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use warren_common::wire::control::ClientBody;

use fake::Fake;

/// One host with an agent, and its coordinator.
struct World {
    dir: tempfile::TempDir,
    fake: Fake,
    url: String,
    _server: tokio::task::JoinSet<()>,
    daemon: Option<Child>,
}

/// Runs a test in a fresh network and mount namespace, or says why not.
fn in_world(test: impl AsyncFnOnce(World)) {
    if !enter_namespaces() {
        return;
    }
    sh("ip link set lo up");
    // A bridge without ports never has a carrier, so nothing about it changes behind the test's back.
    sh("ip link add out0 type bridge");
    sh("ip addr add 192.0.2.5/24 dev out0");
    sh("ip link set out0 up");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let fake = Fake::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = fake.serve(listener);
        let dir = tempfile::tempdir().unwrap();
        test(World { dir, fake, url, _server: server, daemon: None }).await;
    });
}

#[expect(unsafe_code, reason = "no crate in use has unshare")]
fn enter_namespaces() -> bool {
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: there is no /dev/net/tun");
        return false;
    }
    // SAFETY: takes no pointer; it moves only the calling test thread to new namespaces.
    if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
        println!("skipped: no permission to make a network namespace (run as root)");
        return false;
    }
    sh("mount --make-rprivate /");
    true
}

fn sh(command: &str) -> String {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What the agent may touch, as text, without counters.
fn host() -> String {
    sh(
        "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -br addr; nft list ruleset",
    )
}

struct Output {
    code: i32,
    stdout: String,
    stderr: String,
}

impl World {
    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run").join("w.sock")
    }

    fn spawn(&self) -> Child {
        Command::new(env!("CARGO_BIN_EXE_warrend"))
            .arg("--state-dir")
            .arg(self.state_dir())
            .arg("--socket")
            .arg(self.socket())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Starts the daemon and waits until it listens.
    async fn start(&mut self) {
        let child = self.spawn();
        self.daemon = Some(child);
        wait(|| std::os::unix::net::UnixStream::connect(self.socket()).is_ok()).await;
    }

    async fn end(&mut self, signal: i32) -> ExitStatus {
        let mut child = self.daemon.take().unwrap();
        let pid = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        child.wait().await.unwrap()
    }

    async fn warren(&self, args: &[&str]) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_warren"))
            .arg("--socket")
            .arg(self.socket())
            .args(args)
            .output()
            .await
            .unwrap();
        Output {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    async fn up(&self, key: &str) -> Output {
        self.warren(&["up", "--coordinator", &self.url, "--auth-key", key, "--timeout", "20s"]).await
    }

    async fn join(&mut self) {
        self.start().await;
        let output = self.up(&self.fake.auth_key()).await;
        assert_eq!(output.code, 0, "{}", output.stderr);
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.warren(&["status", "--json"]).await.stdout).unwrap()
    }

    /// Waits for a health item.
    async fn health(&self, code: &str) -> Value {
        loop {
            let status = self.status().await;
            let items = status["health"].as_array().unwrap();
            if let Some(item) = items.iter().find(|item| item["code"] == code) {
                return item.clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Waits for something that must come; the test's own time limit is the bound.
async fn wait(mut done: impl FnMut() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn it_joins_shows_the_contract_s_status_and_leaves_nothing_behind() {
    in_world(async |mut world| {
        let before = host();
        world.join().await;
        let status = world.status().await;
        assert_eq!(status["state"], "running");
        assert_eq!(status["network"]["name"], "acme");
        assert_eq!(status["self"]["name"], "laptop");
        assert_eq!(status["self"]["ips"][0], "100.64.0.1");
        assert_eq!(status["coordinator"]["connected"], true);
        assert_eq!(status["coordinator"]["revision"], 1);
        assert_eq!(status["peers"][0]["name"], "db1");
        assert_eq!(status["peers"][0]["path"]["kind"], "none");
        assert_eq!(status["health"], serde_json::json!([]));
        assert!(sh("ip addr show warren0").contains("100.64.0.1/32"));
        assert!(sh("ip route get 100.64.0.2").contains("dev warren0"));

        for (args, code, said) in [
            (vec!["ping", "-c", "1", "nobody"], 1, "no peer of this device"),
            (vec!["whois", "100.64.0.9"], 1, "no device"),
            (vec!["up", "--auth-key", "wkey-x"], 2, "not an auth key"),
            (vec!["up", "--coordinator", "warren"], 2, "not the URL"),
            (vec!["--network", "net_00000000000000000000000000", "status"], 2, "not in network"),
        ] {
            let output = world.warren(&args).await;
            assert_eq!(output.code, code, "{args:?}");
            assert!(output.stderr.contains(said) && output.stderr.contains("fix: "), "{}", output.stderr);
        }
        assert!(world.warren(&["why", "db1:5432"]).await.stdout.starts_with("denied"));
        assert!(world.warren(&["whois", "100.64.0.2"]).await.stdout.contains("db1"));

        assert_eq!(world.warren(&["down"]).await.code, 0);
        assert_eq!(host(), before);
        assert_eq!(world.status().await["state"], "stopped");
        assert_eq!(world.warren(&["up"]).await.code, 0);
        assert!(world.end(libc::SIGTERM).await.success());
        assert_eq!(host(), before);
    });
}

#[test]
fn after_kill_9_nothing_leaks_and_the_next_start_goes_on_without_a_coordinator() {
    in_world(async |mut world| {
        let before = host();
        world.join().await;
        world.end(libc::SIGKILL).await;
        sh("! ip route get 100.64.0.2");
        assert!(sh("nft list ruleset").contains("ip daddr 100.64.0.1"));

        world._server.shutdown().await;
        world.start().await;
        let item = world.health("coordinator-away").await;
        assert_eq!(item["severity"], "warning");
        let status = world.status().await;
        assert_eq!(
            (&status["state"], &status["coordinator"]["connected"]),
            (&"running".into(), &false.into())
        );
        assert!(sh("ip route get 100.64.0.2").contains("dev warren0"));
        assert!(world.end(libc::SIGTERM).await.success());
        assert_eq!(host(), before);
    });
}

#[test]
fn an_older_netmap_is_refused_also_after_a_restart() {
    in_world(async |mut world| {
        world.fake.with(|w| w.revision = 7);
        world.join().await;
        world.end(libc::SIGKILL).await;
        world.fake.with(|w| {
            w.revision = 6;
            w.heard.clear();
            w.netmap.peers.clear();
        });
        world.start().await;
        wait(|| !world.fake.acks().is_empty()).await;
        let ack = world.fake.acks().remove(0);
        assert_eq!((ack.revision, ack.want_snapshot), (7, false));
        let resumed = world.fake.with(|w| {
            w.heard.iter().any(|b| matches!(b, ClientBody::Resume(r) if r.revision == 7 && r.generation == 1))
        });
        assert!(resumed);
        assert_eq!(world.status().await["peers"].as_array().unwrap().len(), 1);
    });
}

#[test]
fn a_refused_key_leaves_nothing_and_another_root_key_hears_nothing() {
    in_world(async |mut world| {
        let before = host();
        world.start().await;
        for code in ["auth-key-expired", "auth-key-used", "auth-key-invalid"] {
            world.fake.with(|w| w.refuse = Some(code));
            let output = world.up(&world.fake.auth_key()).await;
            assert_eq!(output.code, 1);
            assert!(output.stderr.contains(code), "{}", output.stderr);
        }
        world.fake.with(|w| w.heard.clear());
        let output = world.up(&Fake::new().auth_key()).await;
        assert_eq!(output.code, 1);
        assert!(output.stderr.contains("not the expected one"), "{}", output.stderr);
        assert!(world.fake.with(|w| w.heard.is_empty()));
        assert_eq!(world.status().await["state"], "needs-login");
        assert_eq!(host(), before);
        // And with a good one it joins.
        world.fake.with(|w| w.refuse = None);
        assert_eq!(world.up(&world.fake.auth_key()).await.code, 0);
    });
}

#[test]
fn a_colliding_pool_is_refused_with_both_sides_named() {
    in_world(async |mut world| {
        sh("ip route add 100.64.3.0/24 via 192.0.2.9");
        let before = host();
        world.start().await;
        let output = world.up(&world.fake.auth_key()).await;
        assert_eq!(output.code, 1);
        assert!(
            output.stderr.contains("100.64.0.0/16") && output.stderr.contains("100.64.3.0/24"),
            "{}",
            output.stderr
        );
        assert_eq!(host(), before);
        sh("ip route del 100.64.3.0/24");
        assert_eq!(world.warren(&["up"]).await.code, 0);
    });
}

#[test]
fn a_copied_state_must_log_in_again_and_a_wrong_clock_is_told() {
    in_world(async |mut world| {
        let before = host();
        world.fake.with(|w| w.clock_offset = Duration::from_secs(3_600));
        world.join().await;
        assert!(world.health("clock-skew").await["text"].as_str().unwrap().contains("behind"));
        world.end(libc::SIGKILL).await;
        world.fake.with(|w| w.refuse = Some("copied-state"));
        world.start().await;
        assert_eq!(world.health("copied-state").await["severity"], "error");
        assert_eq!(world.status().await["state"], "needs-login");
        assert_eq!(host(), before);
        // A new key makes a new device.
        let old = world.fake.with(|w| w.heard.iter().find_map(enrolled_key).unwrap());
        world.fake.with(|w| {
            w.refuse = None;
            w.heard.clear();
        });
        assert_eq!(world.up(&world.fake.auth_key()).await.code, 0);
        assert_ne!(world.fake.with(|w| w.heard.iter().find_map(enrolled_key).unwrap()), old);
    });
}

fn enrolled_key(body: &ClientBody) -> Option<Vec<u8>> {
    match body {
        ClientBody::Enroll(enroll) => Some(enroll.wg.clone()),
        _ => None,
    }
}

#[test]
fn on_a_full_disk_an_update_waits_and_then_applies() {
    in_world(async |mut world| {
        std::fs::create_dir(world.state_dir()).unwrap();
        sh(&format!("mount -t tmpfs -o size=128k,mode=700 tmpfs {}", world.state_dir().display()));
        world.join().await;
        wait(|| !world.fake.acks().is_empty()).await;
        sh(&format!("cat /dev/zero > {}/filler 2>/dev/null; true", world.state_dir().display()));
        world.fake.with(|w| w.netmap.peers.clear());
        world.fake.push(world.fake.snapshot(2));
        assert_eq!(world.health("disk-full").await["severity"], "error");
        let status = world.status().await;
        assert_eq!(status["coordinator"]["revision"], 1);
        assert_eq!(world.fake.acks().len(), 1);
        std::fs::remove_file(world.state_dir().join("filler")).unwrap();
        wait(|| world.fake.acks().iter().any(|a| a.revision == 2)).await;
        let status = world.status().await;
        assert_eq!(
            (&status["coordinator"]["revision"], &status["health"]),
            (&2.into(), &serde_json::json!([]))
        );
    });
}

#[test]
fn logout_forgets_the_keys_and_tells_the_coordinator() {
    in_world(async |mut world| {
        world.join().await;
        let output = world.warren(&["logout", "--json"]).await;
        assert_eq!(output.code, 0);
        assert_eq!(serde_json::from_str::<Value>(&output.stdout).unwrap()["coordinator_told"], true);
        wait(|| world.fake.with(|w| w.heard.iter().any(|b| matches!(b, ClientBody::Logout(_))))).await;
        assert_eq!(std::fs::read_dir(world.state_dir().join("networks")).unwrap().count(), 0);
        assert_eq!(world.status().await["state"], "needs-login");
        assert_eq!(world.warren(&["up"]).await.code, 1);
    });
}

#[test]
fn starts_that_can_t_work_end_with_one_message() {
    in_world(async |mut world| {
        world.join().await;
        let second = world.spawn().wait_with_output().await.unwrap();
        assert_eq!(second.status.code(), Some(1));
        let said = String::from_utf8(second.stderr).unwrap();
        assert!(said.contains("another agent") && said.contains("fix: "), "{said}");
        world.end(libc::SIGKILL).await;

        let network = std::fs::read_dir(world.state_dir().join("networks")).unwrap().next().unwrap().unwrap();
        let keys = network.path().join("keys");
        let mut bytes = std::fs::read(&keys).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&keys, &bytes).unwrap();
        let damaged = world.spawn().wait_with_output().await.unwrap();
        assert_eq!(damaged.status.code(), Some(1));
        let said = String::from_utf8(damaged.stderr).unwrap();
        assert!(said.contains("keys` is damaged") && said.contains("fix: "), "{said}");
        assert_eq!(std::fs::read(&keys).unwrap(), bytes);
    });
}
