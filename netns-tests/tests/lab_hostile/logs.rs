//! What programs write when they are told to write everything: no secret at any level; no address and no name of a
//! customer above debug. And what they keep and print: no secret in the coordinator's database, or in what verbs show.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use data_encoding::{BASE64, BASE64URL_NOPAD};
use serde_json::Value;
use warren_agent::entropy::OsEntropy;
use warren_common::wire::control::{Ack, ClientBody};
use warren_coordinator::keys::Keys;
use warren_netns_tests::lab::{self, Host, Lab, NatKind, RouterSpec, eventually, workspace_binary};
use warren_netns_tests::programs::{Agent, Coordinator, Relay, tool};

use crate::LIMIT;
use crate::secrets::Secret;
use crate::thief::{Inside, Loot, Session};

const TCP: u16 = 7000;
const DENIED: u16 = 7003;
const USER: &str = "quentin.sparrow@corp.example";

/// The policy, with or without the rule that a transfer runs by.
fn policy(with_tcp: bool) -> String {
    let tcp = if with_tcp { r#", "tcp:7000""# } else { "" };
    format!(
        r#"{{"tagOwners": {{"tag:server": []}},
            "grants": [{{"src": ["{USER}"], "dst": ["tag:server"], "ip": ["icmp:*", "ipv6-icmp:*"{tcp}]}}]}}"#
    )
}

/// Everything that is secret or private in a lab that has lived through all that programs log about.
#[derive(Default)]
struct Known {
    secrets: Vec<Secret>,
    /// What every relay token of a device holds. It is no secret by itself, but nobody logs it for another reason.
    tokens: Vec<Secret>,
    private: BTreeSet<String>,
}

/// The coordinator's files that hold its own secrets: all are key files, the database is none.
const KEY_FILES: [&str; 4] = ["root.key", "control.key", "netmap.key", warren_relay::tls::FILE];

impl Known {
    fn key(&mut self, what: &str, text: &str) -> Result<String> {
        let text = text.trim().to_owned();
        self.secrets.push(Secret::of_key(what, &text)?);
        Ok(text)
    }

    /// Keys, tokens, name and addresses of an agent.
    fn agent(&mut self, agent: &Agent) -> Result<()> {
        let name = agent.host.name();
        self.secrets.extend(Secret::of_agent(name, &agent.state_dir)?);
        let probe = Loot::take(agent)?.keys.probe.public();
        self.tokens.push(Secret::new(format!("relay token of {name}"), probe.as_bytes()));
        self.private.insert(name.to_owned());
        self.private.insert(agent.host.v4().to_string());
        self.private.extend(agent.addresses()?.iter().map(ToString::to_string));
        let netcheck = agent.json(&["netcheck", "--json"])?;
        let public =
            netcheck["ipv4"].as_str().and_then(|addr| addr.rsplit_once(':')).context("a public address")?;
        self.private.insert(public.0.to_owned());
        Ok(())
    }

    fn coordinator(&mut self, coordinator: &Coordinator) -> Result<()> {
        let keys = Keys::load(&coordinator.state_dir, false, &mut OsEntropy)?;
        self.secrets.push(Secret::new("root key", keys.root.expose()));
        self.secrets.push(Secret::new("coordinator's control key", keys.control.expose()));
        self.secrets.push(Secret::new("netmap key", keys.netmap.expose()));
        self.certificate("coordinator", &coordinator.state_dir)
    }

    fn relay(&mut self, relay: &Relay) -> Result<()> {
        let state: Value = serde_json::from_slice(&fs::read(relay.state_dir.join("relay.json"))?)?;
        let key = state["secret"].as_str().context("a relay has a key")?;
        self.secrets.push(Secret::new("relay's control key", &BASE64URL_NOPAD.decode(key.as_bytes())?));
        self.certificate("relay", &relay.state_dir)
    }

    /// The private key of a relay's certificate.
    fn certificate(&mut self, of: &str, state_dir: &Path) -> Result<()> {
        let pem = fs::read_to_string(state_dir.join(warren_relay::tls::FILE))?;
        let body = pem.split("PRIVATE KEY-----").nth(1).and_then(|rest| rest.split("-----").next());
        let body: String = body.context("a private key")?.split_whitespace().collect();
        let der = BASE64.decode(body.as_bytes())?;
        // RFC 5915: version 1, then the number as 32 bytes.
        let mark = [2, 1, 1, 4, 32];
        let at =
            der.windows(mark.len()).position(|w| w == mark).context("an elliptic curve key")? + mark.len();
        self.secrets.push(Secret::new(format!("certificate key of {of}"), &der[at..at + 32]));
        Ok(())
    }
}

impl Known {
    fn nothing_secret_in(&self, bytes: &[u8], place: &str) -> Result<()> {
        self.secrets.iter().try_for_each(|secret| secret.is_not_in(bytes, place))
    }

    /// Verbs of both sides, the metrics, and the coordinator's database show no secret.
    fn nothing_secret_is_shown(&self, coordinator: &Coordinator, agent: &Agent) -> Result<()> {
        for verb in [
            &["status", "--json"][..],
            &["bugreport", "--json"],
            &["netcheck", "--json"],
            &["why", "billingdb:7000"],
        ] {
            let output = agent.warren(verb)?;
            ensure!(!output.stdout.is_empty(), "warren {verb:?} says nothing");
            self.nothing_secret_in(&[output.stdout, output.stderr].concat(), &format!("warren {verb:?}"))?;
        }
        for verb in [
            &["auth-key", "list", "--json"][..],
            &["device", "list", "--json"],
            &["device", "show", "billingdb", "--json"],
            &["user", "list", "--json"],
            &["relay", "list", "--json"],
            &["policy", "status", "--json"],
        ] {
            let output = coordinator.admin(verb)?;
            self.nothing_secret_in(output.as_bytes(), &format!("warren-coordinator {verb:?}"))?;
        }
        let mut searched = 0;
        for file in fs::read_dir(&coordinator.state_dir)? {
            let path = file?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_file() && !KEY_FILES.contains(&name.as_str()) {
                self.nothing_secret_in(&fs::read(&path)?, &format!("the coordinator's file {name}"))?;
                searched += 1;
            }
        }
        ensure!(searched > 0, "there is no database");
        Ok(())
    }
}

/// A host whose programs write everything.
fn talkative(host: Host) -> Host {
    host.set_env("RUST_LOG", "trace");
    host
}

/// An agent behind a NAT of its own.
fn agent(lab: &Lab, name: &str) -> Result<Agent> {
    let router = lab.router(&format!("n_{name}"), RouterSpec::new(NatKind::PortRestricted))?;
    Agent::start(talkative(router.host(name)?))
}

/// Lines of a log with their level; a line without one continues the one before.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let levels = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"];
    let mut level = "ERROR";
    text.lines().map(move |line| {
        if let Some(word) = line.split_whitespace().nth(1)
            && levels.contains(&word)
        {
            level = word;
        }
        (level, line)
    })
}

#[test]
fn logs_hold_no_secret_and_above_debug_no_names_and_addresses() -> Result<()> {
    lab::test("logs", |lab| {
        let mut known = Known::default();
        let mut coordinator = Coordinator::start(talkative(lab.host("coord")?), &policy(true))?;
        let relay = Relay::start(talkative(lab.host("fra")?), &coordinator, "fra")?;
        // A relay's join key is only shown once; this one is never used.
        known.key("join key", &coordinator.admin(&["relay", "create", "ams"])?)?;
        let (mut ann, bob) = (agent(lab, "quentinslapt")?, agent(lab, "billingdb")?);
        known.private.insert(USER.to_owned());

        // Joining, well and badly.
        coordinator.admin(&["user", "create", USER])?;
        let key = coordinator.admin(&["auth-key", "create", "--user", USER, "--expires", "1h"])?;
        let ann_key = known.key("auth key of a user", &key)?;
        ann.up(&coordinator.url, &ann_key)?;
        ensure!(bob.up(&coordinator.url, &ann_key).is_err(), "a used key is good");
        ensure!(bob.up(&coordinator.url, &ann_key[..ann_key.len() - 9]).is_err(), "half a key is good");
        let bob_key = known.key("auth key of a server", &coordinator.auth_key("tag:server")?)?;
        bob.up(&coordinator.url, &bob_key)?;

        // Talking, over the relay and directly; being denied, cut, and denied by the other end.
        ann.ping("billingdb", 1)?;
        eventually("a direct path", LIMIT, || {
            Ok((ann.peer("billingdb")?["path"]["kind"] == "direct").then_some(()))
        })?;
        let to = *bob.addresses()?.first().context("an address")?;
        let _server = bob.serve("tcp-serve", to, TCP)?;
        ann.icmp(to)?;
        tool(&ann.host, &["tcp-stream", &format!("{to}:{DENIED}"), "--total", "1"])?;
        let mut command = ann.host.command(workspace_binary("lab-tool")?);
        command.args(["tcp-stream", &format!("{to}:{TCP}"), "--rate", "100000"]);
        let mut stream = ann.host.spawn(command)?;
        stream.wait_for_line("echoed", LIMIT)?;
        coordinator.edit_policy("{ this is no policy")?;
        eventually("the bad policy is told of", LIMIT, || {
            Ok(coordinator.process.log()?.contains("ERROR").then_some(()))
        })?;
        coordinator.edit_policy(&policy(false))?;
        stream.wait_for_line("\"end\"", LIMIT)?;

        // Everything of each device is known by now; then programs come and go, and a device is removed.
        known.agent(&ann)?;
        known.agent(&bob)?;
        known.coordinator(&coordinator)?;
        known.relay(&relay)?;
        known.nothing_secret_is_shown(&coordinator, &ann)?;
        coordinator.process.kill()?;
        ann.process.stop(LIMIT)?;
        ann.start_again()?;
        coordinator.start_again()?;
        eventually("the session is back", LIMIT, || {
            Ok((bob.json(&["status", "--json"])?["coordinator"]["connected"] == true).then_some(()))
        })?;
        coordinator.admin(&["device", "remove", "billingdb"])?;
        eventually("the removed device is told", LIMIT, || {
            Ok((bob.json(&["status", "--json"])?["state"] == "needs-login").then_some(()))
        })?;
        drop((ann, bob, relay, coordinator));

        let mut levels = BTreeSet::new();
        for log in lab.logs() {
            let text = fs::read(&log)?;
            let name = log.display().to_string();
            known.nothing_secret_in(&text, &name)?;
            known.tokens.iter().try_for_each(|token| token.is_not_in(&text, &name))?;
            let text = String::from_utf8_lossy(&text);
            // What the lab's own traffic programs say is not the product's.
            if text.starts_with('{') {
                continue;
            }
            for (level, line) in lines(&text) {
                levels.insert(level.to_owned());
                if matches!(level, "INFO" | "WARN" | "ERROR") {
                    let told = known.private.iter().find(|private| line.contains(private.as_str()));
                    ensure!(told.is_none(), "{told:?} is told at {level} in {name}: {line}");
                }
            }
        }
        ensure!(levels.len() == 5, "only {levels:?} were written");
        Ok(())
    })
}

#[test]
fn a_device_writes_no_lines_of_its_own_into_the_coordinators_log() -> Result<()> {
    lab::test("forged-log", |lab| {
        let mut coordinator = Coordinator::start(lab.host("coord")?, &policy(true))?;
        let mut agent = Agent::start(lab.host("agent")?)?;
        agent.up(&coordinator.url, &coordinator.auth_key("tag:server")?)?;
        agent.process.stop(LIMIT)?;
        let inside = Inside::new(&agent.host)?;
        let session = Session::resume(&inside, &Loot::take(&agent)?)?;
        let line = "ERROR warren_coordinator: the coordinator was never here";
        let reason = format!("because\n2026-01-01T00:00:00.000000Z {line}\n\u{1b}[2J{}", "x".repeat(10_000));
        session.say(ClientBody::Ack(Ack { epoch: 1, revision: 1, want_snapshot: true, reason }))?;
        let told = coordinator.process.wait_for_line("did not apply", LIMIT)?;
        ensure!(
            told.contains("because\\n2026") && told.len() < 1_000 && !told.contains('\u{1b}'),
            "{told:?}"
        );
        ensure!(lines(&coordinator.process.log()?).all(|(level, _)| level != "ERROR"), "a line was forged");
        Ok(())
    })
}
