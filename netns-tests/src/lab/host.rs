//! A machine of the lab.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};

use super::{GATEWAY, Link, Process, Segment, Shared, netns};

/// One machine: a namespace, its interfaces and its programs.
#[derive(Debug)]
pub struct Host {
    shared: Arc<Shared>,
    name: String,
    netns: String,
    dir: PathBuf,
    interfaces: Mutex<Vec<Interface>>,
    env: Mutex<Vec<(String, String)>>,
}

/// One network card of a host.
#[derive(Clone, Debug)]
pub struct Interface {
    /// The name inside the host.
    pub name: String,
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address, where the segment has IPv6.
    pub v6: Option<Ipv6Addr>,
    pub(super) segment: Segment,
    port: String,
}

impl Host {
    pub(super) fn new(shared: &Arc<Shared>, name: &str) -> Result<Self> {
        let netns = shared.new_netns(name)?;
        let dir = shared.name.dir().join(name);
        fs::create_dir_all(dir.join("run"))?;
        Ok(Self {
            shared: Arc::clone(shared),
            name: name.to_owned(),
            netns,
            dir,
            interfaces: Mutex::default(),
            env: Mutex::default(),
        })
    }

    /// The name given by the test.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace's name, for `ip netns exec`.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// A directory of this host's own, for state and logs; it goes with the lab. Programs of this host
    /// see its `run` folder as `/run`, so that sockets and pid files of two hosts never meet.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The IPv4 address of the first interface.
    ///
    /// # Panics
    /// Never for a host made by a segment: it has an interface.
    pub fn v4(&self) -> Ipv4Addr {
        self.interface(0).v4
    }

    /// The IPv6 address of the first interface, where its segment has IPv6.
    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.interface(0).v6
    }

    /// The interface that was plugged in as number `n`.
    fn interface(&self, n: usize) -> Interface {
        self.interfaces()[n].clone()
    }

    pub(super) fn interfaces(&self) -> MutexGuard<'_, Vec<Interface>> {
        self.interfaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn named(&self, name: &str) -> Result<Interface> {
        self.interfaces()
            .iter()
            .find(|interface| interface.name == name)
            .cloned()
            .with_context(|| format!("host {} has no interface {name}", self.name))
    }

    /// Plugs a new interface into a segment and gives it addresses. Only the first interface gets the
    /// default route; [`Host::route_over`] moves it.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn attach(&self, segment: &Segment, name: &str) -> Result<Interface> {
        self.attach_over(segment, name, None)
    }

    /// The same over a cable with delay, jitter or loss.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn attach_over(&self, segment: &Segment, name: &str, link: Option<Link>) -> Result<Interface> {
        let number = segment.next_host();
        let interface = Interface {
            name: name.to_owned(),
            v4: segment.v4_of(number)?,
            v6: segment.v6_of(number),
            segment: segment.clone(),
            port: self.shared.next_port(),
        };
        let inner = &segment.inner;
        let (port, bridge) = (&interface.port, &inner.bridge);
        match link {
            None => netns::batch(
                &inner.netns,
                &format!("link add {port} type veth peer name {name} netns {}\n", self.netns),
            )?,
            Some(link) => link.lay([(&inner.netns, port), (&self.netns, name)])?,
        }
        netns::batch(&inner.netns, &format!("link set {port} master {bridge} up\n"))?;
        let mut lines =
            format!("addr add {}/{} broadcast + dev {name}\n", interface.v4, inner.v4.prefix_len());
        if let (Some(address), Some(net)) = (interface.v6, inner.v6) {
            lines += &format!("addr add {address}/{} dev {name} nodad\n", net.prefix_len());
        }
        lines += &format!("link set {name} up\n");
        netns::batch(&self.netns, &lines)?;
        let first = self.interfaces().is_empty();
        self.interfaces().push(interface.clone());
        if first {
            self.route_over(name)?;
        }
        Ok(interface)
    }

    /// Makes an interface the one that the default routes use.
    ///
    /// # Errors
    /// When there is no such interface or a command fails.
    pub fn route_over(&self, name: &str) -> Result<()> {
        let segment = self.named(name)?.segment;
        let gateway = segment.v4_of(GATEWAY)?;
        let mut lines = format!("route replace default via {gateway} dev {name}\n");
        if let Some(gateway) = segment.v6_of(GATEWAY) {
            lines += &format!("route replace ::/0 via {gateway} dev {name}\n");
        }
        netns::batch(&self.netns, &lines)
    }

    /// Adds one more IPv4 address of the same segment to the first interface.
    ///
    /// # Errors
    /// When the segment is full or the command fails.
    pub fn add_v4(&self) -> Result<Ipv4Addr> {
        let interface = self.interface(0);
        let address = interface.segment.v4_of(interface.segment.next_host())?;
        let len = interface.segment.subnet().prefix_len();
        self.ip(&format!("addr add {address}/{len} dev {}", interface.name))?;
        Ok(address)
    }

    /// Takes the interface down as an administrator does; its routes are gone until [`Host::link_up`].
    ///
    /// # Errors
    /// When the command fails.
    pub fn link_down(&self, name: &str) -> Result<()> {
        self.ip(&format!("link set {name} down"))
    }

    /// Takes the interface up again and makes it the default route.
    ///
    /// # Errors
    /// When the command fails.
    pub fn link_up(&self, name: &str) -> Result<()> {
        self.ip(&format!("link set {name} up"))?;
        self.route_over(name)
    }

    /// Pulls the cable: the interface stays up, but loses its carrier.
    ///
    /// # Errors
    /// When there is no such interface or the command fails.
    pub fn unplug(&self, name: &str) -> Result<()> {
        self.cable(name, "down")
    }

    /// Puts the cable back.
    ///
    /// # Errors
    /// When there is no such interface or the command fails.
    pub fn plug(&self, name: &str) -> Result<()> {
        self.cable(name, "up")
    }

    fn cable(&self, name: &str, state: &str) -> Result<()> {
        let interface = self.named(name)?;
        netns::batch(&interface.segment.inner.netns, &format!("link set {} {state}\n", interface.port))
    }

    /// Routes `destination` through a neighbour as if that were a router. This is how a hostile
    /// neighbour aims a packet with any destination address at another machine's network card.
    ///
    /// # Errors
    /// When the command fails.
    pub fn route_via(&self, destination: &str, neighbour: IpAddr) -> Result<()> {
        self.ip(&format!("route replace {destination} via {neighbour}"))
    }

    /// Runs one `ip` command inside the host; words are split at spaces.
    ///
    /// # Errors
    /// When the command fails, with what it printed.
    pub fn ip(&self, words: &str) -> Result<()> {
        netns::batch(&self.netns, &format!("{words}\n"))
    }

    /// Sets kernel parameters, each `KEY=VALUE`, inside the host.
    ///
    /// # Errors
    /// When a parameter does not exist or refuses the value.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        netns::sysctl(&self.netns, settings)
    }

    /// Loads nftables rules inside the host.
    ///
    /// # Errors
    /// When the rules are refused, with what `nft` printed.
    pub fn nft(&self, rules: &str) -> Result<()> {
        netns::feed(self.command("nft").args(["-f", "-"]), rules)
    }

    /// Runs a closure on a thread inside the host. Sockets opened there belong to the host for life, so
    /// they may be returned and used by the test directly.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        netns::enter(&self.netns, f)
    }

    /// Sets an environment variable for programs that are started here from now on.
    pub fn set_env(&self, key: &str, value: &str) {
        let mut env = self.env.lock().unwrap_or_else(PoisonError::into_inner);
        env.push((key.to_owned(), value.to_owned()));
    }

    /// A command that will run inside the host, with the host's own `/run`. Its process id is that of
    /// the program itself. Prefer [`Host::spawn`] for what must end with the lab in good order.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let program = program.as_ref();
        let found = program.to_str().and_then(netns::tool);
        let mut command = netns::ip();
        let env = self.env.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // The proxy of whoever runs the lab is out of reach in here.
        for name in ["HTTPS_PROXY", "NO_PROXY"] {
            command.env_remove(name).env_remove(name.to_ascii_lowercase());
        }
        command
            .envs(env)
            .env(netns::MARKER, self.shared.name.as_str())
            .args(["netns", "exec", &self.netns])
            .args(["sh", "-c", r#"mount --bind "$0" /run && exec "$@""#])
            .arg(self.dir.join("run"))
            .arg(found.as_deref().unwrap_or(program));
        command
    }

    /// Runs a program to its end and returns what it printed.
    ///
    /// # Errors
    /// When it cannot be started. A program that fails is not an error: see the status.
    pub fn run(&self, program: impl AsRef<Path>, args: &[&str]) -> Result<Output> {
        let mut command = self.command(program);
        command.args(args);
        command.output().with_context(|| format!("running {command:?}"))
    }

    /// Starts a long-running program made by [`Host::command`]. Its output goes to a log file, whose end
    /// is shown when the test fails.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Process> {
        let number = self.shared.state().logs.len();
        let process = Process::start(command, &self.dir, &self.name, number)?;
        self.shared.state().logs.push(process.log_path().to_owned());
        Ok(process)
    }

    /// Whether one ICMP echo comes back within a second.
    ///
    /// # Errors
    /// When `ping` cannot be started.
    pub fn pings(&self, to: IpAddr) -> Result<bool> {
        let output = self.run("ping", &["-n", "-c", "1", "-W", "1", &to.to_string()])?;
        Ok(output.status.success())
    }
}
