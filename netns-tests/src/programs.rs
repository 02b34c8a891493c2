//! Our programs as the demo and the lab tests run them, each in a host of its own.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::{Host, Process, eventually, workspace_binary};

/// Bound for a start; only a failing run waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// The coordinator's port.
pub const CONTROL: u16 = 8080;
/// A relay's port, on the coordinator's host as well.
pub const RELAY: u16 = 3340;
const STUN: u16 = 3478;

/// A running coordinator, with its embedded relay or without.
#[derive(Debug)]
pub struct Coordinator {
    /// Where it runs.
    pub host: Host,
    /// What agents are told.
    pub url: String,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its policy file, if it has one.
    pub policy: PathBuf,
    /// The program itself.
    pub process: Process,
    /// Where its policy comes from, as arguments of `serve`.
    source: Vec<OsString>,
    embedded_relay: bool,
    /// The address that it listens on: every one of IPv4, or of both families.
    any: &'static str,
}

/// Every address of IPv4.
const ANY_V4: &str = "0.0.0.0";
/// Every address of both families.
const ANY: &str = "[::]";

impl Coordinator {
    /// Starts one with this policy and an embedded relay, and waits until it serves.
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start(host: Host, policy_text: &str) -> Result<Self> {
        Self::with_file(host, policy_text, true, ANY_V4)
    }

    /// Starts one whose policy comes from where these arguments of `serve` say, with an embedded relay, and waits until
    /// it serves.
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start_from(host: Host, source: Vec<OsString>) -> Result<Self> {
        Self::new(host, source, true, ANY_V4)
    }

    /// Starts one with this policy, but without a relay or a STUN server, and waits until it serves.
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start_without_relay(host: Host, policy_text: &str) -> Result<Self> {
        Self::with_file(host, policy_text, false, ANY_V4)
    }

    /// The same that can be reached by IPv6 as well, see [`Self::url_v6`].
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start_dual_stack(host: Host, policy_text: &str) -> Result<Self> {
        Self::with_file(host, policy_text, false, ANY)
    }

    /// Starts one with an embedded relay that agents reach by https, with this certificate and key (PEM).
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start_https(host: Host, policy_text: &str, certificate: &Path, key: &Path) -> Result<Self> {
        let policy = host.dir().join("policy.hujson");
        fs::write(&policy, policy_text)?;
        let source = [OsString::from("--policy"), policy.into(), "--tls-cert".into(), certificate.into()];
        let source = source.into_iter().chain(["--tls-key".into(), key.into()]).collect();
        let url = format!("https://{}:{CONTROL}", host.v4());
        Self::at(host, url, source, true, ANY_V4)
    }

    /// What agents without IPv4 are told.
    ///
    /// # Errors
    /// Its host has no IPv6.
    pub fn url_v6(&self) -> Result<String> {
        Ok(format!("http://[{}]:{CONTROL}", self.host.v6().context("the host has no IPv6")?))
    }

    fn with_file(host: Host, policy_text: &str, embedded_relay: bool, any: &'static str) -> Result<Self> {
        let policy = host.dir().join("policy.hujson");
        fs::write(&policy, policy_text)?;
        Self::new(host, vec!["--policy".into(), policy.into()], embedded_relay, any)
    }

    fn new(host: Host, source: Vec<OsString>, embedded_relay: bool, any: &'static str) -> Result<Self> {
        let url = format!("http://{}:{CONTROL}", host.v4());
        Self::at(host, url, source, embedded_relay, any)
    }

    fn at(
        host: Host,
        url: String,
        source: Vec<OsString>,
        embedded_relay: bool,
        any: &'static str,
    ) -> Result<Self> {
        let (state_dir, policy) = (host.dir().join("state"), host.dir().join("policy.hujson"));
        let process = Self::spawn(&host, &url, &state_dir, &source, embedded_relay, any)?;
        Ok(Self { host, url, state_dir, policy, process, source, embedded_relay, any })
    }

    /// Starts it again on the same state, after [`Process::kill`] or [`Process::stop`].
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start_again(&mut self) -> Result<()> {
        let Self { host, url, state_dir, source, .. } = self;
        self.process = Self::spawn(host, url, state_dir, source, self.embedded_relay, self.any)?;
        Ok(())
    }

    fn spawn(
        host: &Host,
        url: &str,
        state_dir: &Path,
        source: &[OsString],
        embedded_relay: bool,
        any: &str,
    ) -> Result<Process> {
        let mut command = host.command(workspace_binary("warren-coordinator")?);
        command.arg("serve").arg("--state-dir").arg(state_dir).args(source);
        command.args(["--listen", &format!("{any}:{CONTROL}"), "--public-url", url]);
        if embedded_relay {
            command.args(["--relay-listen", &format!("{any}:{RELAY}")]);
            command.args(["--stun-listen", &format!("{any}:{STUN}")]);
        } else {
            command.arg("--no-embedded-relay");
        }
        let mut process = host.spawn(command)?;
        process.wait_for_line("the coordinator serves", LIMIT)?;
        Ok(process)
    }

    /// What an admin verb, which has to succeed, prints.
    ///
    /// # Errors
    /// The verb fails.
    pub fn admin(&self, args: &[&str]) -> Result<String> {
        let mut command = self.host.command(workspace_binary("warren-coordinator")?);
        command.args(args).arg("--state-dir").arg(&self.state_dir);
        printed(&mut command)
    }

    /// What an admin verb, called with `--json`, prints.
    ///
    /// # Errors
    /// The verb fails.
    pub fn ask(&self, args: &[&str]) -> Result<Value> {
        let text = self.admin(&[args, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("{}: {text}", args.join(" ")))
    }

    /// A one-use auth key for devices with this tag.
    ///
    /// # Errors
    /// The coordinator refuses.
    pub fn auth_key(&self, tag: &str) -> Result<String> {
        let key = self.admin(&["auth-key", "create", "--tag", tag, "--expires", "1h"])?;
        Ok(key.trim().to_owned())
    }

    /// Replaces the policy file as an editor does: in one step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn edit_policy(&self, text: &str) -> Result<()> {
        let new = self.policy.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.policy).context("replacing the policy file")
    }
}

/// A running relay of its own, beside the coordinator's.
#[derive(Debug)]
pub struct Relay {
    /// Where it runs.
    pub host: Host,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// The program itself.
    pub process: Process,
    coordinator: String,
    join_key: String,
    any: &'static str,
}

impl Relay {
    /// Makes a join key for a relay called `name`, starts it with that, and waits until it has joined.
    ///
    /// # Errors
    /// It does not come to join.
    pub fn start(host: Host, coordinator: &Coordinator, name: &str) -> Result<Self> {
        let join_key = coordinator.admin(&["relay", "create", name])?;
        let mut relay = Self::new(host, &coordinator.url, join_key.trim(), coordinator.any)?;
        relay.process.wait_for_line("joined", LIMIT)?;
        Ok(relay)
    }

    /// Starts one that joins with this key, whether it then can or not.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn with_key(host: Host, coordinator: &str, join_key: &str) -> Result<Self> {
        Self::new(host, coordinator, join_key, ANY_V4)
    }

    fn new(host: Host, coordinator: &str, join_key: &str, any: &'static str) -> Result<Self> {
        let state_dir = host.dir().join("state");
        let process = Self::spawn(&host, coordinator, join_key, &state_dir, any)?;
        Ok(Self {
            host,
            state_dir,
            process,
            coordinator: coordinator.to_owned(),
            join_key: join_key.to_owned(),
            any,
        })
    }

    /// Starts it again on the same state, after [`Process::kill`] or [`Process::stop`].
    ///
    /// # Errors
    /// It does not come to join.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.host, &self.coordinator, &self.join_key, &self.state_dir, self.any)?;
        self.process.wait_for_line("joined", LIMIT)?;
        Ok(())
    }

    fn spawn(host: &Host, coordinator: &str, join_key: &str, state_dir: &Path, any: &str) -> Result<Process> {
        let mut command = host.command(workspace_binary("warren-relay")?);
        command.args(["serve", "--coordinator", coordinator, "--join-key", join_key, "--state-dir"]);
        command.arg(state_dir).args(["--listen", &format!("{any}:{RELAY}")]);
        command.args(["--stun-listen", &format!("{any}:{STUN}")]);
        let v6 = host.v6().filter(|_| any == ANY).map(IpAddr::from);
        for ip in [IpAddr::from(host.v4())].into_iter().chain(v6) {
            command.args(["--advertise", &SocketAddr::new(ip, RELAY).to_string()]);
            command.args(["--advertise-stun", &SocketAddr::new(ip, STUN).to_string()]);
        }
        host.spawn(command)
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    /// Where it runs.
    pub host: Host,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// The daemon itself.
    pub process: Process,
    /// What it is told on its command line beside where its things are, the next time that it starts.
    pub args: Vec<OsString>,
}

impl Agent {
    /// Starts a daemon that has not joined yet, and waits until it answers.
    ///
    /// # Errors
    /// It does not answer.
    pub fn start(host: Host) -> Result<Self> {
        Self::start_with(host, Vec::new())
    }

    /// The same with more on its command line.
    ///
    /// # Errors
    /// It does not answer.
    pub fn start_with(host: Host, args: Vec<OsString>) -> Result<Self> {
        let socket = host.dir().join("agent").join("warren.sock");
        let state_dir = host.dir().join("state");
        let process = Self::spawn(&host, &state_dir, &socket, &args)?;
        let agent = Self { host, socket, state_dir, process, args };
        agent.wait_until_it_answers()?;
        Ok(agent)
    }

    /// Starts it again on the same state, after [`Process::kill`] or [`Process::stop`].
    ///
    /// # Errors
    /// It does not answer.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.host, &self.state_dir, &self.socket, &self.args)?;
        self.wait_until_it_answers()
    }

    fn spawn(host: &Host, state_dir: &Path, socket: &Path, args: &[OsString]) -> Result<Process> {
        let mut command = host.command(workspace_binary("warrend")?);
        command.arg("--state-dir").arg(state_dir).arg("--socket").arg(socket).args(args);
        host.spawn(command)
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        eventually("warrend answers", LIMIT, || Ok(self.warren(&["status"])?.status.success().then_some(())))
    }

    /// Joins; the overlay addresses.
    ///
    /// # Errors
    /// The daemon or the coordinator refuses.
    pub fn up(&self, coordinator: &str, key: &str) -> Result<String> {
        let args = ["up", "--coordinator", coordinator, "--auth-key", key, "--hostname", self.host.name()];
        let output = self.warren(&args)?;
        ensure!(output.status.success(), "warren up: {}", String::from_utf8_lossy(&output.stderr).trim());
        let ips: Vec<String> = self.addresses()?.iter().map(IpAddr::to_string).collect();
        Ok(ips.join(" "))
    }

    /// The overlay addresses.
    ///
    /// # Errors
    /// It has none.
    pub fn addresses(&self) -> Result<Vec<IpAddr>> {
        let status = self.json(&["status", "--json"])?;
        let ips = status["self"]["ips"].as_array().context("this device has no addresses")?;
        ips.iter().map(|ip| Ok(ip.as_str().context("an address is a string")?.parse()?)).collect()
    }

    /// Waits until it is connected to the coordinator.
    ///
    /// # Errors
    /// It is not.
    pub fn wait_until_connected(&self) -> Result<()> {
        let what = format!("{} is connected to the coordinator", self.host.name());
        eventually(&what, LIMIT, || {
            let status = self.json(&["status", "--json"])?;
            Ok((status["coordinator"]["connected"] == true).then_some(()))
        })
    }

    /// Waits until a relay carries its packets.
    ///
    /// # Errors
    /// None does.
    pub fn wait_until_relayed(&self) -> Result<()> {
        eventually(&format!("{} is connected to a relay", self.host.name()), LIMIT, || {
            Ok(self.process.log()?.contains("relay connected").then_some(()))
        })
    }

    /// Has it start anew without knowing where its peers were, once it is stopped.
    ///
    /// # Errors
    /// What it knows can't be removed.
    pub fn forget_paths(&self) -> Result<()> {
        for network in fs::read_dir(self.state_dir.join("networks"))? {
            let file = network?.path().join("resume");
            if file.exists() {
                fs::remove_file(file)?;
            }
        }
        Ok(())
    }

    /// The codes of what is not as it should be.
    ///
    /// # Errors
    /// It does not answer.
    pub fn health(&self) -> Result<Vec<String>> {
        let status = self.json(&["status", "--json"])?;
        let items = status["health"].as_array().context("health")?;
        Ok(items.iter().filter_map(|item| item["code"].as_str().map(str::to_owned)).collect())
    }

    /// Waits until packets to a peer take this kind of path: `direct` or `relay`. Makes some, so that one is looked for.
    ///
    /// # Errors
    /// They don't.
    pub fn wait_for_path(&self, peer: &str, kind: &str) -> Result<()> {
        // Whether it is answered is another question: what carries it may be about to come back.
        let _ = self.ping(peer, 1);
        eventually(&format!("{} reaches {peer} over {kind}", self.host.name()), LIMIT, || {
            Ok((self.peer(peer)?["path"]["kind"] == kind).then_some(()))
        })
    }

    /// A peer's entry of `warren status --json`.
    ///
    /// # Errors
    /// There is no such peer.
    pub fn peer(&self, name: &str) -> Result<Value> {
        let status = self.json(&["status", "--json"])?;
        let peers = status["peers"].as_array().cloned().unwrap_or_default();
        peers
            .into_iter()
            .find(|peer| peer["name"] == name)
            .with_context(|| format!("no peer {name} in {status}"))
    }

    /// The answers of `warren ping --json`; fails if one is missing.
    ///
    /// # Errors
    /// An answer is missing.
    pub fn ping(&self, peer: &str, count: usize) -> Result<Vec<Value>> {
        let output = self.warren(&["ping", peer, "--json", "-c", &count.to_string()])?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(
            output.status.success(),
            "warren ping: {text} {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let pongs: Vec<Value> = lines.into_iter().filter(|line| line["rtt_ms"].is_number()).collect();
        ensure!(pongs.len() == count, "{} of {count} answers: {text}", pongs.len());
        Ok(pongs)
    }

    /// `warren why PEER:PORT --json`, whatever it says.
    ///
    /// # Errors
    /// It says nothing.
    pub fn why(&self, peer: &str, port: u16) -> Result<Value> {
        let output = self.warren(&["why", &format!("{peer}:{port}"), "--json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("warren why: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// The kernel's own ping over the overlay.
    ///
    /// # Errors
    /// An answer is missing.
    pub fn icmp(&self, to: IpAddr) -> Result<String> {
        let output = self.host.run("ping", &["-n", "-c", "5", "-i", "0.2", "-W", "2", &to.to_string()])?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && text.contains(" 0% packet loss"), "ping: {}", text.trim());
        let times = text.lines().find(|line| line.contains("min/avg/max")).unwrap_or_default();
        Ok(format!("5 of 5 echoes; {times}"))
    }

    /// Starts a server of lab-tool on this agent's host.
    ///
    /// # Errors
    /// It does not come to listen.
    pub fn serve(&self, verb: &str, ip: IpAddr, port: u16) -> Result<Process> {
        let mut command = self.host.command(workspace_binary("lab-tool")?);
        command.args([verb, &SocketAddr::new(ip, port).to_string()]);
        let mut server = self.host.spawn(command)?;
        server.wait_for_line("listening", LIMIT)?;
        Ok(server)
    }

    /// What a verb of `warren`, called with `--json`, prints.
    ///
    /// # Errors
    /// It prints no JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let output = self.warren(args)?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("warren {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())
        })
    }

    /// Runs `warren`. It talks to the daemon's socket, which is a file: it needs no namespace.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn warren(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(workspace_binary("warren")?);
        command.arg("--socket").arg(&self.socket).args(args);
        command.output().context("running warren")
    }
}

/// Runs a verb of lab-tool to its end; the last line it printed.
///
/// # Errors
/// It printed nothing.
pub fn tool(host: &Host, args: &[&str]) -> Result<Value> {
    let output = host.run(workspace_binary("lab-tool")?, args)?;
    let text = String::from_utf8(output.stdout)?;
    let last = text.lines().last().with_context(|| {
        format!(
            "lab-tool {} said nothing: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })?;
    serde_json::from_str(last).context("a line of lab-tool")
}

/// The value as a number.
///
/// # Errors
/// It is none.
pub fn number(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no number"))
}

fn printed(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?)
}
