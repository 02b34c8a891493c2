//! A laboratory of real kernels' network stacks: hosts, LANs, NAT routers and a small internet, each in
//! its own network namespace.
//!
//! A [`Lab`] owns an *internet*: one [`Segment`] with 203.0.113.0/24 and 2001:db8::/64 that is connected
//! to nothing else, so no packet of a lab can reach the machine that runs it. Segments hold [`Host`]s and
//! [`Router`]s; a router has a LAN segment of its own, which again holds hosts and routers (a router
//! behind a router is a double NAT). Several labs live beside each other: names are unique and no
//! interface ever exists outside a namespace.
//!
//! A host runs programs ([`Host::spawn`], [`Host::run`]) or closures ([`Host::enter`], for sockets).
//! Everything ends with the lab: when the last of its parts is dropped, also by a panic, its processes
//! are killed and its namespaces removed. What an owner leaves behind that was killed itself, [`sweep`] removes, which every new
//! lab calls first.
//!
//! A lab needs root (of the machine, or of a user namespace as in `unshare -Urnm`) and a few tools.
//! Where these are missing [`test()`] says so on one line that `cargo xtask test` counts.

mod host;
mod link;
mod nat;
mod netns;
mod process;
mod wait;

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::{Ipv4Net, Ipv6Net};

pub use host::{Host, Interface};
pub use link::Link;
pub use nat::{Egress, NatKind, Refusal, Router, RouterSpec};
pub use netns::{list, sweep};
pub use process::Process;
pub use wait::{Stopwatch, eventually, monotonic_ms};

use netns::LabName;

/// The documentation prefixes (RFC 5737, RFC 3849) that stand for the public internet.
const INTERNET_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24);
const INTERNET_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 64);

/// First host number given out in a segment; lower ones are for the gateway and for the test's own use.
const FIRST_HOST: u32 = 10;

/// Host number of a segment's gateway.
const GATEWAY: u32 = 1;

/// Set by `cargo xtask`, which installs what tests run before it runs them.
const SETUP_DONE: &str = "WARREN_SETUP_DONE";

/// What a lab shells out to, with the Debian package that holds it.
const TOOLS: [(&str, &str); 4] =
    [("ip", "iproute2"), ("nft", "nftables"), ("conntrack", "conntrack"), ("ping", "iputils-ping")];

/// A private world of network namespaces; see the module's documentation.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
    internet: Segment,
}

/// What hosts and segments share with their lab.
#[derive(Debug)]
struct Shared {
    name: LabName,
    title: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Every host's name, to refuse a second one of the same name.
    hosts: Vec<String>,
    /// LANs made so far: numbers their default subnets.
    lans: u8,
    /// Ports made so far: numbers the bridge ends of cables.
    ports: u32,
    /// Log files of spawned processes, oldest first.
    logs: Vec<PathBuf>,
    /// Whether dropping the lab leaves it alone.
    keep: bool,
}

impl Lab {
    /// Makes a lab with an empty internet. `title` names it in messages.
    ///
    /// # Errors
    /// When the machine cannot hold a lab (not root, a tool or a kernel feature is missing).
    pub fn new(title: &str) -> Result<Self> {
        Self::with_internet(title, INTERNET_V4)
    }

    /// The same with another IPv4 subnet for the internet: some programs refuse documentation addresses.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn with_internet(title: &str, subnet: Ipv4Net) -> Result<Self> {
        if let Some(why) = missing() {
            bail!("cannot make a lab: {why}");
        }
        sweep(false);
        let name = LabName::next()?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(name.dir())
            .with_context(|| format!("creating {}", name.dir().display()))?;
        let shared = Arc::new(Shared { name, title: title.to_owned(), state: Mutex::default() });
        let netns = shared.new_netns("internet")?;
        let internet = Segment::new(&shared, netns, "br0", subnet, Some(INTERNET_V6))?;
        // IPv6 is routed, so that a router can have a public prefix behind it; IPv4 is one flat subnet.
        netns::sysctl(&internet.inner.netns, &["net.ipv6.conf.all.forwarding=1"])?;
        Ok(Self { shared, internet })
    }

    /// The public internet of this lab.
    pub fn internet(&self) -> &Segment {
        &self.internet
    }

    /// A dual-stack host with public addresses.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn host(&self, name: &str) -> Result<Host> {
        self.internet.host(name)
    }

    /// A NAT router with a public address and an empty LAN.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn router(&self, name: &str, spec: RouterSpec) -> Result<Router> {
        self.internet.router(name, spec)
    }

    /// The name that all namespaces of this lab start with.
    pub fn name(&self) -> &str {
        self.shared.name.as_str()
    }

    /// The lab's private directory; it goes with the lab.
    pub fn dir(&self) -> PathBuf {
        self.shared.name.dir()
    }

    /// The log files of all programs that were started in it, oldest first.
    pub fn logs(&self) -> Vec<PathBuf> {
        self.shared.state().logs.clone()
    }

    /// Prints the ends of all programs' logs.
    pub fn show_logs(&self) {
        self.shared.show_logs();
    }

    /// What removes this lab at once from any thread, for whoever handles a signal. Idempotent.
    pub fn remover(&self) -> impl Fn() + Send + 'static {
        let name = self.shared.name.clone();
        move || name.remove()
    }

    /// Leaves everything in place when the lab is dropped and when its owner ends, to be looked at by
    /// hand; [`sweep`]`(true)` removes it later.
    ///
    /// # Errors
    /// When the marker file cannot be written.
    pub fn keep(&self) -> Result<()> {
        self.shared.name.keep()?;
        self.shared.state().keep = true;
        Ok(())
    }
}

/// Runs the body of a test in a fresh lab. Where the machine cannot hold a lab, prints `skipped: <why>`,
/// which `cargo xtask test` counts and shows, and succeeds; under `cargo xtask`, which installs them, a missing program is
/// a failure. When the body fails, the ends of all programs' logs are printed.
///
/// # Errors
/// What making the lab or the body returned.
pub fn test(title: &str, body: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    test_with(title, &[], body)
}

/// The same for a test that runs more programs than labs do: each with the Debian package that holds it.
///
/// # Errors
/// What making the lab or the body returned.
pub fn test_with(
    title: &str,
    programs: &[(&str, &str)],
    body: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    test_in(title, INTERNET_V4, programs, body)
}

/// The same in a lab whose internet has this subnet, see [`Lab::with_internet`].
///
/// # Errors
/// What making the lab or the body returned.
pub fn test_in(
    title: &str,
    internet: Ipv4Net,
    programs: &[(&str, &str)],
    body: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    let why = missing_rights().or_else(|| missing_program(&TOOLS)).or_else(|| missing_program(programs));
    if let Some(why) = why {
        let promised = std::env::var_os(SETUP_DONE).is_some() && missing_rights().is_none();
        ensure!(!promised, "{why}, and it ran");
        say(&format!("skipped: {why}"));
        return Ok(());
    }
    let lab = Lab::with_internet(title, internet)?;
    let result = body(&lab);
    if result.is_err() {
        lab.shared.show_logs();
    }
    result
}

impl Drop for Shared {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        if !self.state().keep {
            self.name.remove();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new namespace with lo up, no duplicate address detection (it costs a second per address) and
    /// bridges that do not pass their frames through nftables a second time.
    fn new_netns(&self, host: &str) -> Result<String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        ensure!(
            !host.is_empty() && host.len() <= 16 && host.chars().all(plain),
            "a host's name has 1 to 16 letters, digits or underscores, not {host:?}"
        );
        {
            let mut state = self.state();
            ensure!(
                !state.hosts.iter().any(|known| known == host),
                "lab {} has a host {host} already",
                self.title
            );
            state.hosts.push(host.to_owned());
        }
        let netns = self.name.netns(host);
        netns::add(&netns)?;
        netns::sysctl(
            &netns,
            &[
                "net.bridge.bridge-nf-call-iptables=0",
                "net.bridge.bridge-nf-call-ip6tables=0",
                "net.ipv6.conf.default.accept_dad=0",
                "net.ipv6.conf.all.keep_addr_on_down=1",
            ],
        )?;
        Ok(netns)
    }

    fn next_port(&self) -> String {
        let mut state = self.state();
        state.ports += 1;
        format!("p{}", state.ports)
    }

    /// Prints the ends of all logs: called when a test fails.
    fn show_logs(&self) {
        /// Enough for a stack trace or the last round of a conversation.
        const MAX_LINES: usize = 40;
        for log in &self.state().logs {
            let text = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(MAX_LINES)..];
            say(&format!("--- {}: last {} of {} lines", log.display(), tail.len(), lines.len()));
            for line in tail {
                say(line);
            }
        }
    }
}

/// One broadcast domain: a bridge that hosts and routers are plugged into.
#[derive(Clone, Debug)]
pub struct Segment {
    inner: Arc<SegmentInner>,
}

#[derive(Debug)]
struct SegmentInner {
    shared: Arc<Shared>,
    netns: String,
    bridge: String,
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
    next_host: Mutex<u32>,
}

impl Segment {
    /// Makes the bridge inside an existing namespace and gives it the gateway addresses.
    fn new(
        shared: &Arc<Shared>,
        netns: String,
        bridge: &str,
        v4: Ipv4Net,
        v6: Option<Ipv6Net>,
    ) -> Result<Self> {
        let inner = SegmentInner {
            shared: Arc::clone(shared),
            netns,
            bridge: bridge.to_owned(),
            v4,
            v6,
            next_host: Mutex::new(FIRST_HOST),
        };
        let segment = Self { inner: Arc::new(inner) };
        let gateway = segment.v4_of(GATEWAY)?;
        let mut lines = format!(
            "link add {bridge} type bridge mcast_snooping 0\n\
             addr add {gateway}/{} dev {bridge}\n",
            v4.prefix_len()
        );
        if let (Some(net), Some(gateway)) = (v6, segment.v6_of(GATEWAY)) {
            lines += &format!("addr add {gateway}/{} dev {bridge} nodad\n", net.prefix_len());
        }
        lines += &format!("link set {bridge} up\n");
        netns::batch(&segment.inner.netns, &lines)?;
        Ok(segment)
    }

    /// A host with one address per family of the segment and a default route to its gateway.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn host(&self, name: &str) -> Result<Host> {
        let host = Host::new(&self.inner.shared, name)?;
        host.attach(self, "eth0")?;
        Ok(host)
    }

    /// A host on a cable with delay, jitter or loss.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn host_over(&self, name: &str, link: Link) -> Result<Host> {
        let host = Host::new(&self.inner.shared, name)?;
        host.attach_over(self, "eth0", Some(link))?;
        Ok(host)
    }

    /// A host without any IPv4 address.
    ///
    /// # Errors
    /// When the segment has no IPv6, the name is taken or a command fails.
    pub fn host_v6_only(&self, name: &str) -> Result<Host> {
        ensure!(self.inner.v6.is_some(), "the segment of {name} has no IPv6");
        let host = self.host(name)?;
        host.ip("addr flush dev eth0 to 0.0.0.0/0")?;
        Ok(host)
    }

    /// A router whose outside is plugged in here.
    ///
    /// # Errors
    /// When the name is taken, the options contradict each other or a command fails.
    pub fn router(&self, name: &str, spec: RouterSpec) -> Result<Router> {
        Router::new(self, name, spec)
    }

    /// The IPv4 subnet.
    pub fn subnet(&self) -> Ipv4Net {
        self.inner.v4
    }

    /// The gateway's IPv4 address.
    ///
    /// # Errors
    /// Never for a segment that was made.
    pub fn gateway(&self) -> Result<Ipv4Addr> {
        self.v4_of(GATEWAY)
    }

    /// The gateway's IPv6 address, where the segment has IPv6.
    pub fn gateway_v6(&self) -> Option<Ipv6Addr> {
        self.v6_of(GATEWAY)
    }

    fn v4_of(&self, host: u32) -> Result<Ipv4Addr> {
        let address = Ipv4Addr::from_bits(self.inner.v4.network().to_bits() + host);
        ensure!(
            self.inner.v4.contains(&address) && address != self.inner.v4.broadcast(),
            "no address is left in {}",
            self.inner.v4
        );
        Ok(address)
    }

    fn v6_of(&self, host: u32) -> Option<Ipv6Addr> {
        let net = self.inner.v6?;
        Some(Ipv6Addr::from_bits(net.network().to_bits() + u128::from(host)))
    }

    fn next_host(&self) -> u32 {
        let mut next = self.inner.next_host.lock().unwrap_or_else(PoisonError::into_inner);
        *next += 1;
        *next - 1
    }
}

/// What keeps this machine from holding a lab, if anything.
fn missing() -> Option<String> {
    missing_rights().or_else(|| missing_program(&TOOLS))
}

fn missing_rights() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root; run with sudo or under `unshare -Urnm`".into());
    }
    // It may be there for root of the machine only, and not for root of a user namespace.
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        return Some(format!("/dev/net/tun can't be opened: {error}"));
    }
    None
}

fn missing_program(programs: &[(&str, &str)]) -> Option<String> {
    programs.iter().find(|(program, _)| netns::tool(program).is_none()).map(|(program, package)| {
        format!("`{program}` is missing; `cargo xtask setup` installs it (Debian: {package})")
    })
}

/// Finds a program of this workspace beside the running one.
///
/// # Errors
/// When it has not been built, with the command that builds it.
pub fn workspace_binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    // Tests run from target/<profile>/deps, programs from target/<profile>.
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("{name} is not built; run `cargo build --workspace --all-targets` first"))
}

/// Prints to standard output, which is where the test harness and xtask look: skips, logs of failures, figures.
#[expect(clippy::print_stdout, reason = "skips and failing processes' logs are for the reader of a test run")]
pub fn say(line: &str) {
    println!("{line}");
}
