//! The programs of the demo, each in a host of its own.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::{Host, Process, Router, eventually, workspace_binary};

/// Bound for a start; only a failing demo waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// Ports of the coordinator's host: control, relay, STUN.
const CONTROL: u16 = 8080;
const RELAY: u16 = 3340;
const STUN: u16 = 3478;

/// A running coordinator with its embedded relay.
pub(super) struct Coordinator {
    host: Host,
    pub(super) url: String,
    pub(super) state_dir: PathBuf,
    pub(super) policy: PathBuf,
    _process: Process,
}

impl Coordinator {
    pub(super) fn start(host: Host, policy_text: &str) -> Result<Self> {
        let (state_dir, policy) = (host.dir().join("state"), host.dir().join("policy.hujson"));
        fs::write(&policy, policy_text)?;
        let url = format!("http://{}:{CONTROL}", host.v4());
        let mut command = host.command(workspace_binary("warren-coordinator")?);
        command.arg("serve").arg("--state-dir").arg(&state_dir).arg("--policy").arg(&policy);
        command.args(["--listen", &format!("0.0.0.0:{CONTROL}"), "--public-url", &url]);
        command.args(["--relay-listen", &format!("0.0.0.0:{RELAY}")]);
        command.args(["--stun-listen", &format!("0.0.0.0:{STUN}")]);
        let mut process = host.spawn(command)?;
        process.wait_for_line("the coordinator serves", LIMIT)?;
        Ok(Self { host, url, state_dir, policy, _process: process })
    }

    /// A one-use auth key for devices with this tag.
    pub(super) fn auth_key(&self, tag: &str) -> Result<String> {
        let mut command = self.host.command(workspace_binary("warren-coordinator")?);
        command.args(["auth-key", "create", "--tag", tag, "--expires", "1h", "--state-dir"]);
        command.arg(&self.state_dir);
        Ok(printed(&mut command)?.trim().to_owned())
    }

    /// Replaces the policy file as an editor does: in one step.
    pub(super) fn edit_policy(&self, text: &str) -> Result<()> {
        let new = self.policy.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.policy).context("replacing the policy file")
    }
}

/// A running agent behind a router.
pub(super) struct Agent {
    pub(super) host: Host,
    pub(super) socket: PathBuf,
    _process: Process,
    _router: Router,
}

impl Agent {
    pub(super) fn start(host: Host, router: Router) -> Result<Self> {
        let socket = host.dir().join("agent").join("warren.sock");
        let mut command = host.command(workspace_binary("warrend")?);
        command.arg("--state-dir").arg(host.dir().join("state")).arg("--socket").arg(&socket);
        let process = host.spawn(command)?;
        let agent = Self { host, socket, _process: process, _router: router };
        eventually("warrend answers", LIMIT, || {
            Ok(agent.warren(&["status"])?.status.success().then_some(()))
        })?;
        Ok(agent)
    }

    /// Joins; the overlay addresses.
    pub(super) fn up(&self, coordinator: &str, key: &str) -> Result<String> {
        let args = ["up", "--coordinator", coordinator, "--auth-key", key, "--hostname", self.host.name()];
        let output = self.warren(&args)?;
        ensure!(output.status.success(), "warren up: {}", String::from_utf8_lossy(&output.stderr).trim());
        let ips: Vec<String> = self.addresses()?.iter().map(IpAddr::to_string).collect();
        Ok(ips.join(" "))
    }

    /// The overlay addresses.
    pub(super) fn addresses(&self) -> Result<Vec<IpAddr>> {
        let status = self.json(&["status", "--json"])?;
        let ips = status["self"]["ips"].as_array().context("this device has no addresses")?;
        ips.iter().map(|ip| Ok(ip.as_str().context("an address is a string")?.parse()?)).collect()
    }

    /// A peer's entry of `warren status --json`.
    pub(super) fn peer(&self, name: &str) -> Result<Value> {
        let status = self.json(&["status", "--json"])?;
        let peers = status["peers"].as_array().cloned().unwrap_or_default();
        peers
            .into_iter()
            .find(|peer| peer["name"] == name)
            .with_context(|| format!("no peer {name} in {status}"))
    }

    /// The answers of `warren ping --json`; fails if one is missing.
    pub(super) fn ping(&self, peer: &str, count: usize) -> Result<Vec<Value>> {
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
    pub(super) fn why(&self, peer: &str, port: u16) -> Result<Value> {
        let output = self.warren(&["why", &format!("{peer}:{port}"), "--json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("warren why: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// The kernel's own ping over the overlay.
    pub(super) fn icmp(&self, to: IpAddr) -> Result<String> {
        let output = self.host.run("ping", &["-n", "-c", "5", "-i", "0.2", "-W", "2", &to.to_string()])?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && text.contains(" 0% packet loss"), "ping: {}", text.trim());
        let times = text.lines().find(|line| line.contains("min/avg/max")).unwrap_or_default();
        Ok(format!("5 of 5 echoes; {times}"))
    }

    /// Starts a server of lab-tool on this agent's host.
    pub(super) fn serve(&self, verb: &str, ip: IpAddr, port: u16) -> Result<Process> {
        let mut command = self.host.command(workspace_binary("lab-tool")?);
        command.args([verb, &std::net::SocketAddr::new(ip, port).to_string()]);
        let mut server = self.host.spawn(command)?;
        server.wait_for_line("listening", LIMIT)?;
        Ok(server)
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        let output = self.warren(args)?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("warren {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())
        })
    }

    /// The command line talks to the daemon's socket, which is a file: it needs no namespace.
    fn warren(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(workspace_binary("warren")?);
        command.arg("--socket").arg(&self.socket).args(args);
        command.output().context("running warren")
    }
}

/// Runs a verb of lab-tool to its end; the last line it printed.
pub(super) fn tool(host: &Host, args: &[&str]) -> Result<Value> {
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

pub(super) fn number(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no number"))
}

fn printed(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?)
}
