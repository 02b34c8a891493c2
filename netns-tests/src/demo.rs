//! The product shown end to end, on real packets: a coordinator with its relay on the internet of a [`Lab`], two agents
//! behind two port-restricted NATs, two more behind symmetric ones. Every row of the table says what was expected and
//! what was seen; one that is not as expected fails the demo.

use std::mem::ManuallyDrop;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::{Lab, NatKind, RouterSpec, Stopwatch, eventually, monotonic_ms, workspace_binary};
use crate::programs::{Agent, Coordinator, number, tool};

/// Bound for what must happen; only a failing demo waits this long.
const LIMIT: Duration = Duration::from_secs(30);
/// Pings, one a second, while agents behind symmetric NATs are watched: several rounds of looking for a direct path.
const WATCH_PINGS: usize = 5;
/// Bytes of each TCP transfer.
const TRANSFER: u64 = 1 << 20;
/// Bytes per second of the transfer that is cut.
const CUT_RATE: u64 = 1 << 20;
/// How long policy may take from the edit of its file to the last byte: the file is looked at four times a second.
const CUT_LIMIT_MS: u64 = 2_000;

/// Ports of the servers on `bob`, by what policy says about them.
const TCP: u16 = 7000;
const UDP: u16 = 7001;
const REVOKED: u16 = 7002;
const DENIED: u16 = 7003;

/// The policy. The grant for [`REVOKED`] stands alone on its line, which the demo removes later.
fn policy(with_revoked: bool) -> String {
    let revoked = if with_revoked {
        format!("    {{\"src\": [\"tag:ann\"], \"dst\": [\"tag:bob\"], \"ip\": [\"tcp:{REVOKED}\"]}},\n")
    } else {
        String::new()
    };
    format!(
        "{{\n  \"tagOwners\": {{\"tag:ann\": [], \"tag:bob\": [], \"tag:far\": []}},\n  \"grants\": [\n    \
         {{\"src\": [\"tag:ann\"], \"dst\": [\"tag:bob\"], \"ip\": [\"icmp:*\", \"ipv6-icmp:*\", \"tcp:{TCP}\", \"udp:{UDP}\"]}},\n\
         {revoked}    {{\"src\": [\"tag:far\"], \"dst\": [\"tag:far\"], \"ip\": [\"*\"]}},\n  ],\n}}\n"
    )
}

/// Runs the demo and prints its table; true if every row is as expected. With `keep` everything is left running.
///
/// # Errors
/// The lab, the coordinator or an agent could not be started at all.
pub fn run(keep: bool) -> Result<bool> {
    let lab = Lab::new("demo")?;
    remove_on_signal(&lab)?;
    let mut table = Table::default();
    let world = ManuallyDrop::new(World::new(&lab, &mut table));
    // Dropped by hand, so that `keep` can leave the programs alone.
    let shown = match &*world {
        Ok(world) => world.show(&mut table),
        Err(error) => {
            table.row("setting up", Err(anyhow::anyhow!("{error:#}")));
            Ok(())
        }
    };
    table.print();
    if let Err(error) = &shown {
        say(&format!("error: {error:#}"));
    }
    let good = shown.is_ok() && table.is_good();
    if !good {
        lab.show_logs();
    }
    match (keep, &*world) {
        (true, Ok(world)) => {
            lab.keep()?;
            world.how_to_reach()?;
        }
        _ => drop(ManuallyDrop::into_inner(world)),
    }
    Ok(good)
}

/// Ctrl-C and SIGTERM remove the lab with all its programs before the process ends.
fn remove_on_signal(lab: &Lab) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let remove = lab.remover();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        // The other thread must not tell of all that fails now: whoever prints waits for the end.
        let _quiet = std::io::stdout().lock();
        remove();
        std::process::exit(130);
    });
    Ok(())
}

/// Everything that runs.
struct World {
    coordinator: Coordinator,
    ann: Agent,
    bob: Agent,
    cyd: Agent,
    dee: Agent,
}

impl World {
    fn new(lab: &Lab, table: &mut Table) -> Result<Self> {
        say("starting a coordinator with its relay, and four agents behind NATs");
        let coordinator = Coordinator::start(lab.host("coord")?, &policy(true))?;
        let mut agent = |name: &str, tag: &str, nat: NatKind| -> Result<Agent> {
            let router = lab.router(&format!("nat_{name}"), RouterSpec::new(nat))?;
            let key = coordinator.auth_key(tag)?;
            let agent = Agent::start(router.host(name)?)?;
            let watch = Stopwatch::start();
            let joined = agent.up(&coordinator.url, &key);
            let row = format!("{name}, behind a {} NAT, joins", nat_name(nat));
            table.row(&row, joined.map(|ips| format!("{} ms; {ips}", millis(&watch))));
            Ok(agent)
        };
        Ok(Self {
            ann: agent("ann", "tag:ann", NatKind::PortRestricted)?,
            bob: agent("bob", "tag:bob", NatKind::PortRestricted)?,
            cyd: agent("cyd", "tag:far", NatKind::Symmetric)?,
            dee: agent("dee", "tag:far", NatKind::Symmetric)?,
            coordinator,
        })
    }

    fn show(&self, table: &mut Table) -> Result<()> {
        self.meet(table);
        let bob = self.bob.addresses()?;
        self.talk(table, &bob)?;
        self.denied(table, &bob);
        self.far(table);
        table.row("edit of the policy file cuts a running TCP transfer", self.cut(&bob));
        Ok(())
    }

    /// First through the relay, then direct.
    fn meet(&self, table: &mut Table) {
        let watch = Stopwatch::start();
        let first = self.ann.ping("bob", 1).and_then(|pongs| {
            let pong = pongs.first().context("no answer")?;
            ensure!(pong["path"]["kind"] == "relay", "it went {}", pong["path"]["kind"]);
            Ok(format!("{} ms; round trip {} ms", millis(&watch), pong["rtt_ms"]))
        });
        table.row("first packet ann -> bob goes through the relay", first);
        let direct = eventually("a direct path", LIMIT, || {
            let peer = self.ann.peer("bob")?;
            Ok((peer["path"]["kind"] == "direct").then_some(peer))
        });
        let direct = direct.map(|peer| {
            let path = &peer["path"];
            format!("{} ms after the first packet; {}", millis(&watch), text(&path["endpoint"]))
        });
        table.row("ann <-> bob become direct", direct);
        let pinged = self.ann.ping("bob", 2).and_then(|pongs| {
            let last = pongs.last().context("no answer")?;
            ensure!(last["path"]["kind"] == "direct", "it went {}", last["path"]["kind"]);
            Ok(format!("round trip {} ms", last["rtt_ms"]))
        });
        table.row("packets ann -> bob go the direct way", pinged);
    }

    fn talk(&self, table: &mut Table, bob: &[IpAddr]) -> Result<()> {
        for ip in bob {
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let _tcp = self.bob.serve("tcp-serve", *ip, TCP)?;
            let _udp = self.bob.serve("udp-echo", *ip, UDP)?;
            table.row(&format!("ICMP ann -> bob over {family}"), self.ann.icmp(*ip));
            table.row(&format!("TCP ann -> bob over {family}"), self.transfer(&self.ann, *ip, TCP));
            table.row(&format!("UDP ann -> bob over {family}"), udp(&self.ann, *ip));
        }
        Ok(())
    }

    fn transfer(&self, from: &Agent, ip: IpAddr, port: u16) -> Result<String> {
        let watch = Stopwatch::start();
        let end = tool(&from.host, &["tcp-stream", &at(ip, port), "--total", &TRANSFER.to_string()])?;
        ensure!(end["how"] == "complete", "the transfer ended: {end}");
        Ok(format!("{} MiB there and back in {} ms, byte for byte", TRANSFER >> 20, millis(&watch)))
    }

    /// A port that no rule allows: refused at once at the source, and closed at the destination too.
    fn denied(&self, table: &mut Table, bob: &[IpAddr]) {
        for ip in bob {
            let tried = (|| {
                let _server = self.bob.serve("tcp-serve", *ip, DENIED)?;
                let watch = Stopwatch::start();
                let end = tool(&self.ann.host, &["tcp-stream", &at(*ip, DENIED), "--total", "1"])?;
                let how = text(&end["how"]);
                ensure!(how == "refused" || how == "prohibited", "the connection ended: {end}");
                Ok(format!("{how} after {} ms", millis(&watch)))
            })();
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            table.row(&format!("ann -> bob:{DENIED} is denied over {family}"), tried);
        }
        let here = self.ann.why("bob", DENIED).and_then(|why| {
            ensure!(why["allowed"] == false, "{why}");
            let dropped = &why["filter"]["drops"][0];
            ensure!(dropped["direction"] == "egress", "no drop is remembered: {why}");
            Ok(format!(
                "{}: {}; packets dropped: {}",
                text(&why["reason"]),
                text(&why["text"]),
                dropped["count"]
            ))
        });
        table.row("  reason at ann (warren why)", here);
        // A device that only answers is not told the names of those who may come: it knows addresses.
        let there = self.ann.addresses().and_then(|ann| {
            let ann = ann.first().context("ann has no address")?;
            let why = self.bob.why(&ann.to_string(), DENIED)?;
            let incoming = &why["filter"]["ingress"]["outcome"];
            ensure!(incoming == "no-rule", "{why}");
            Ok(format!("connections from {ann} to port {DENIED} here: {}", text(incoming)))
        });
        table.row("  reason at bob (warren why)", there);
    }

    /// Two symmetric NATs: no direct path exists, the relay carries everything.
    fn far(&self, table: &mut Table) {
        let talked = (|| {
            let dee = self.dee.addresses()?;
            let watch = Stopwatch::start();
            for pong in self.cyd.ping("dee", WATCH_PINGS)? {
                ensure!(pong["path"]["kind"] == "relay", "it went {pong}");
            }
            let ip = *dee.first().context("dee has no address")?;
            let _server = self.dee.serve("tcp-serve", ip, TCP)?;
            let done = self.transfer(&self.cyd, ip, TCP)?;
            let kind = self.cyd.peer("dee")?["path"]["kind"].clone();
            ensure!(kind == "relay", "the path is {kind}");
            Ok(format!("after {} ms still; {done}", millis(&watch)))
        })();
        table.row("cyd <-> dee, both behind symmetric NATs, stay on the relay", talked);
    }

    /// An edit of the policy file ends a running transfer.
    fn cut(&self, bob: &[IpAddr]) -> Result<String> {
        let ip = *bob.first().context("bob has no address")?;
        let _server = self.bob.serve("tcp-serve", ip, REVOKED)?;
        let mut command = self.ann.host.command(workspace_binary("lab-tool")?);
        command.args(["tcp-stream", &at(ip, REVOKED), "--rate", &CUT_RATE.to_string()]);
        let mut stream = self.ann.host.spawn(command)?;
        stream.wait_for_line("echoed", LIMIT)?;
        let edited_ms = monotonic_ms();
        self.coordinator.edit_policy(&policy(false))?;
        let line = stream.wait_for_line("\"end\"", LIMIT)?;
        let end: Value = serde_json::from_str(&line).context("the end of the transfer")?;
        let took = number(&end["last_byte_ms"])?.saturating_sub(edited_ms);
        let noticed = number(&end["mono_ms"])?.saturating_sub(edited_ms);
        ensure!(end["how"] == "reset", "the application saw: {end}");
        ensure!(took <= CUT_LIMIT_MS, "it took {took} ms");
        let again = tool(&self.ann.host, &["tcp-stream", &at(ip, REVOKED), "--total", "1"])?;
        ensure!(again["how"] == "refused" || again["how"] == "prohibited", "a new connection ended: {again}");
        Ok(format!("last byte {took} ms after the edit; the application saw a reset at {noticed} ms"))
    }

    fn how_to_reach(&self) -> Result<()> {
        say("\nIt runs on. To look around (as root):");
        for agent in [&self.ann, &self.bob, &self.cyd, &self.dee] {
            say(&format!("  {} --socket {} status", show(&workspace_binary("warren")?), show(&agent.socket)));
            say(&format!("  ip netns exec {} bash", agent.host.netns()));
        }
        let coordinator = show(&workspace_binary("warren-coordinator")?);
        say(&format!("  {coordinator} device list --state-dir {}", show(&self.coordinator.state_dir)));
        say(&format!("  $EDITOR {}", show(&self.coordinator.policy)));
        say(&format!("To stop it and remove everything:\n  {} sweep", show(&workspace_binary("lab-tool")?)));
        Ok(())
    }
}

fn udp(from: &Agent, ip: IpAddr) -> Result<String> {
    let end = tool(&from.host, &["udp-ping", &at(ip, UDP), "--count", "20"])?;
    ensure!(end["sent"] == end["received"], "{} of {} came back", end["received"], end["sent"]);
    Ok(format!("{} of {} datagrams came back", end["received"], end["sent"]))
}

fn at(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn millis(watch: &Stopwatch) -> u128 {
    watch.elapsed().as_millis()
}

const fn nat_name(nat: NatKind) -> &'static str {
    match nat {
        NatKind::FullCone => "full-cone",
        NatKind::AddressRestricted => "address-restricted",
        NatKind::PortRestricted => "port-restricted",
        NatKind::Symmetric => "symmetric",
    }
}

/// What was shown so far.
#[derive(Default)]
struct Table {
    rows: Vec<(String, Result<String, String>)>,
}

impl Table {
    fn row(&mut self, what: &str, seen: Result<String>) {
        let seen = seen.map_err(|error| format!("{error:#}"));
        if let Err(why) = &seen {
            say(&format!("not as expected: {what}: {why}"));
        }
        self.rows.push((what.to_owned(), seen));
    }

    fn is_good(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|(_, seen)| seen.is_ok())
    }

    fn print(&self) {
        let width = self.rows.iter().map(|(what, _)| what.chars().count()).max().unwrap_or(0);
        say("");
        for (what, seen) in &self.rows {
            let (mark, text) = match seen {
                Ok(text) => ("ok  ", text),
                Err(text) => ("FAIL", text),
            };
            say(&format!("{mark}  {what:width$}  {text}"));
        }
        let failed = self.rows.iter().filter(|(_, seen)| seen.is_err()).count();
        say(&format!("\n{} of {} rows as expected", self.rows.len() - failed, self.rows.len()));
    }
}

/// Prints one line, or several.
#[expect(clippy::print_stdout, reason = "the table is what the demo is for")]
pub fn say(text: &str) {
    println!("{text}");
}
