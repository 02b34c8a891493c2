//! The real `warrend` and `warren` against a made-up coordinator, in a network namespace of their own.
//!
//! Needs root (or a user namespace that may make network namespaces) and /dev/net/tun; says `skipped` otherwise.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a skipped test says so, a failed one panics")]

mod bad_input;
mod conditions;
mod fake;
mod first_contact;
mod hostile;
mod idle;
mod offloads;
mod revocation;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use warren_common::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId, UnixInterval};
use warren_common::netmap::AppGrant;
use warren_common::wire::control::ClientBody;

use fake::Fake;

const WARREND: &str = env!("CARGO_BIN_EXE_warrend");

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
    sh("ip link set out0 addrgenmode none");
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

impl Output {
    fn of(output: std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// It failed with this exit code and with one message, which says this and names a fix.
    fn failed(&self, code: i32, said: &str) {
        let lines: Vec<&str> = self.stderr.lines().filter(|line| !line.contains(" INFO ")).collect();
        let [message, fix] = lines.as_slice() else { panic!("not one message: {}", self.stderr) };
        assert!(message.contains(said), "`{said}` is not in: {}", self.stderr);
        assert!(message.starts_with("warren") && fix.starts_with("  fix: "), "{}", self.stderr);
        assert_eq!(self.code, code, "{}", self.stderr);
        assert_eq!(self.stdout, "");
    }
}

impl World {
    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run").join("w.sock")
    }

    fn command(&self, state_dir: &Path) -> Command {
        let mut command = Command::new(WARREND);
        command.arg("--state-dir").arg(state_dir).arg("--socket").arg(self.socket());
        command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Runs a daemon that can't start to its end.
    async fn refused(&self, args: &[&str]) -> Output {
        let mut command = self.command(&self.state_dir());
        Output::of(command.args(args).output().await.unwrap())
    }

    async fn refused_at(&self, state_dir: &Path) -> Output {
        Output::of(self.command(state_dir).output().await.unwrap())
    }

    /// Starts the daemon and waits until it listens.
    async fn start(&mut self) {
        let mut command = self.command(&self.state_dir());
        self.start_as(&mut command).await;
    }

    async fn start_as(&mut self, command: &mut Command) {
        self.daemon = Some(command.spawn().unwrap());
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
        let mut command = Command::new(env!("CARGO_BIN_EXE_warren"));
        Output::of(command.arg("--socket").arg(self.socket()).args(args).output().await.unwrap())
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
        // A name that this device isn't told is answered as far as it can be.
        let output = world.warren(&["why", "db9:22", "--json"]).await;
        let why: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!((output.code, &why["allowed"], &why["reason"]), (0, &false.into(), &"not-visible".into()));
        assert_eq!((&why["peer"], &why["path"], &why["filter"]), (&Value::Null, &Value::Null, &Value::Null));
        let why = world.warren(&["why", "db9:22"]).await.stdout;
        assert!(why.contains("no device called `db9` is visible") && why.contains("no policy rule"), "{why}");
        assert!(world.warren(&["whois", "100.64.0.2"]).await.stdout.contains("db1"));

        assert_eq!(world.warren(&["down"]).await.code, 0);
        assert_eq!(host(), before);
        let status = world.status().await;
        assert_eq!((&status["state"], &status["network"]["name"]), (&"stopped".into(), &"acme".into()));
        assert_eq!(status["coordinator"]["connected"], false);
        assert_eq!(world.warren(&["up"]).await.code, 0);
        assert!(world.end(libc::SIGTERM).await.success());
        assert_eq!(host(), before);
    });
}

#[test]
fn why_shows_the_line_where_a_rule_stands_now() {
    in_world(async |mut world| {
        let net = |text: &str| IpRange::from(text.parse::<IpAddr>().unwrap());
        let rule = FilterRule {
            id: RuleId(7),
            origin: "grants[0] line 3".into(),
            action: Action::Allow,
            staged: false,
            src: vec![net("100.64.0.1")],
            dst: vec![FilterDst { net: net("100.64.0.2"), ports: PortRange { first: 5432, last: 5432 } }],
            protos: vec![6],
            active: None,
        };
        world.fake.with(|w| {
            w.netmap.egress = BTreeSet::from([rule]);
            w.origins = Some(BTreeMap::from([(7, "grants[0] line 9".into())]));
        });
        world.join().await;
        // The file got six lines above the rule, and no netmap was sent for that.
        let why = world.warren(&["why", "db1:5432"]).await;
        assert!(why.code == 0 && why.stdout.contains("grants[0] line 9"), "{}", why.stdout);
        let near = world.warren(&["why", "db1:22", "--json"]).await;
        assert!(near.stdout.contains("grants[0] line 9"), "{}", near.stdout);
        // A coordinator that doesn't say, and none at all: the line it came with.
        world.fake.with(|w| w.origins = None);
        let why = world.warren(&["why", "db1:5432"]).await;
        assert!(why.stdout.contains("grants[0] line 3"), "{}", why.stdout);
        world._server.shutdown().await;
        world.health("coordinator-away").await;
        let why = world.warren(&["why", "db1:5432"]).await;
        assert!(why.stdout.contains("grants[0] line 3"), "{}", why.stdout);
    });
}

#[test]
fn whois_tells_an_application_what_a_peer_may_do_here() {
    in_world(async |mut world| {
        let net = |text: &str| IpRange::from(text.parse::<IpAddr>().unwrap());
        let may = |id: u64, who: &str, value: &str, until: i64| AppGrant {
            id: RuleId(id),
            name: "example.com/cap/edit".into(),
            src: vec![net(who)],
            dst: vec![net("100.64.0.1")],
            values: vec![value.into()],
            active: Some(vec![UnixInterval { from: 0, until }]),
        };
        world.fake.with(|w| {
            let ended = may(2, "100.64.0.2", "\"ended\"", 1);
            let others = may(3, "100.64.0.3", "\"of another\"", i64::MAX);
            let theirs = may(1, "100.64.0.2", r#"{"docs":["a"]}"#, i64::MAX);
            w.netmap.apps = BTreeSet::from([theirs, ended, others]);
            w.netmap.device.attrs = vec!["example.com/beta".into()];
        });
        world.join().await;
        let ask = async |world: &World| {
            let who = world.warren(&["whois", "--json", "100.64.0.2:40000"]).await;
            serde_json::from_str::<Value>(&who.stdout).unwrap()
        };
        let who = ask(&world).await;
        assert_eq!(who["name"], "db1");
        assert_eq!(
            who["capabilities"],
            serde_json::json!({"example.com/cap/edit": [{"docs": ["a"]}]}),
            "{who}"
        );
        let text = world.warren(&["whois", "100.64.0.2"]).await.stdout;
        assert!(
            text.contains("may:     example.com/cap/edit") && text.contains(r#"{"docs":["a"]}"#),
            "{text}"
        );
        let own = world.warren(&["whois", "--json", "100.64.0.1"]).await;
        assert!(!own.stdout.contains("capabilities"), "{}", own.stdout);
        assert_eq!(world.status().await["self"]["attributes"], serde_json::json!(["example.com/beta"]));
        // They are kept with the netmap, and hold without a coordinator.
        world._server.shutdown().await;
        world.end(libc::SIGKILL).await;
        world.start().await;
        world.health("coordinator-away").await;
        assert_eq!(ask(&world).await["capabilities"], who["capabilities"]);
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

fn enrolled_key(body: &ClientBody) -> Option<Vec<u8>> {
    match body {
        ClientBody::Enroll(enroll) => Some(enroll.wg.clone()),
        _ => None,
    }
}
